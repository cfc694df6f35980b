/** What the tape commands share: the drive, the source of further cartridges, the secrets. */
import type { TapeDrive } from '../../devices/tape/drive.js';
import { openTapeDrive } from '../../devices/tape/open.js';
import { isKind } from '../../errors.js';
import type { Secret } from '../../repo/keys.js';
import { askPassword, findSecrets } from '../../secrets.js';
import { openTapeView, type TapeView } from '../../tape/import.js';
import {
  changerSource,
  commandSource,
  terminalSource,
  type CartridgeSource,
} from '../../tape/media.js';
import type { CommandContext } from '../spec.js';
import { environmentOf, secretOf, secretPlaces } from './session.js';

/** Runs `fn` with the drive open, and closes it whatever happens. */
export async function withDrive<T>(
  context: CommandContext,
  device: string,
  fn: (drive: TapeDrive) => Promise<T>,
): Promise<T> {
  const drive = await openTapeDrive(device, context.clock);
  try {
    return await fn(drive);
  } finally {
    await drive.close();
  }
}

/** The changer, the command, or the terminal, whichever was asked for or is there. */
export function sourceOf(
  context: CommandContext,
  options: { readonly 'next-cartridge': string | undefined; readonly changer: string | undefined },
): CartridgeSource | undefined {
  if (options.changer !== undefined) return changerSource(options.changer);
  const command = options['next-cartridge'];
  if (command !== undefined) return commandSource(command, context.env, context.signal);
  return terminalSource();
}

/** Runs `fn` with the cartridge in the drive seen as a repository; asks for a password where nothing else was given. */
export async function withTapeView<T>(
  context: CommandContext,
  drive: TapeDrive,
  fn: (view: TapeView, secrets: readonly Secret[]) => Promise<T>,
): Promise<T> {
  const warn = (message: string): void => context.events({ type: 'warning', message });
  const env = environmentOf(context);
  let secrets: readonly Secret[] = (await findSecrets(secretPlaces(context))).map(secretOf);
  let view: TapeView;
  try {
    view = await openTapeView(drive, secrets, env, warn);
  } catch (error) {
    if (secrets.length > 0 || !isKind(error, 'wrong-key')) throw error;
    const password = await askPassword(`Password of the cartridge in ${drive.path}: `);
    if (password === undefined) throw error;
    secrets = [{ kind: 'password', password, source: 'the terminal' }];
    view = await openTapeView(drive, secrets, env, warn);
  }
  try {
    return await fn(view, secrets);
  } finally {
    await view.repo.close();
  }
}
