import { ExitCode } from '../../errors.js';
import { findVolume } from '../../repo/volume.js';
import { repair, type RepairAction, type RepairRest } from '../../repair/repair.js';
import type { Style } from '../../ui/style.js';
import type { RepairInput } from '../repair.js';
import type { CommandContext, Outcome } from '../spec.js';
import { withCatalogue } from './catalogue.js';
import { volumesOf, withRepository } from './session.js';

export interface RepairAnswer {
  readonly dryRun: boolean;
  readonly actions: readonly RepairAction[];
  /** What is wrong and cannot be mended. */
  readonly left: readonly RepairRest[];
}

export function run(context: CommandContext, input: RepairInput): Promise<Outcome<RepairAnswer>> {
  return withRepository(context, async (repo) => {
    const { options } = input;
    const known = input.arguments.volume.length === 0 ? [] : await volumesOf(context, repo);
    const wanted = input.arguments.volume.map((text) => findVolume(known, text).id);
    const dryRun = options['dry-run'];
    const report = await repair(repo, {
      volumeIds: wanted.length === 0 ? undefined : wanted,
      dryRun,
      data: !options['no-data'],
      storeUrl: repo.store.url,
      signal: context.signal,
      events: context.events,
    });
    if (!dryRun) {
      await withCatalogue(context, repo, async (catalogue) => {
        // What was seen of a volume that has lost commits would look like a repository that was put back.
        for (const id of report.changedVolumes) await catalogue?.forgetTip(id);
        await catalogue?.rebuild(repo);
        await catalogue?.recordEvent({
          kind: 'repair',
          content: { actions: report.actions.length, left: report.left.length },
        });
      });
    }
    return {
      data: { dryRun, actions: report.actions, left: report.left },
      code: report.left.length > 0 ? ExitCode.partial : ExitCode.ok,
    };
  });
}

export function text(a: RepairAnswer, style: Style): string {
  const lines = a.actions.map(
    (x) =>
      `${a.dryRun ? style.yellow('would do') : style.green('done')}  ${x.object}: ${x.message}`,
  );
  for (const l of a.left) lines.push(`${style.red('left')}  ${l.object}: ${l.message}`);
  if (lines.length === 0) return 'nothing to repair';
  if (a.actions.length > 0 && !a.dryRun) lines.push('Run "b2 verify" to see that all is well.');
  return lines.join('\n');
}
