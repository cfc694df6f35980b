/** The local catalogue for commands: useful, never necessary. */
import { isKind, messageOf } from '../../errors.js';
import { Catalogue } from '../../repo/catalogue.js';
import type { Repository } from '../../repo/repository.js';
import type { CommandContext } from '../spec.js';

/**
 * Runs `fn` with the catalogue of the repository; where it cannot be used, with undefined, after a warning. One that cannot be written any
 * more (a full disk) is a warning too: neither a point that was captured nor damage that was found is lost for it.
 */
export async function withCatalogue<T>(
  context: CommandContext,
  repo: Repository,
  fn: (catalogue: Catalogue | undefined) => Promise<T>,
): Promise<T> {
  const warn = (message: string): void => context.events({ type: 'warning', message });
  let catalogue: Catalogue | undefined;
  try {
    catalogue = await Catalogue.open({
      cacheDir: context.settings.cacheDir,
      repositoryId: repo.id,
      clock: context.clock,
      warn,
      lenient: true,
    });
  } catch (error) {
    if (!isKind(error, 'io', 'no-space', 'damaged', 'not-found', 'exists')) throw error;
    warn(`${messageOf(error)}; going on without it`);
  }
  try {
    return await fn(catalogue);
  } finally {
    await catalogue?.close();
  }
}
