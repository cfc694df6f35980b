/**
 * The registry of commands.
 *
 * To add the command `b2 NAME`:
 * 1. `src/commands/NAME.ts`: `const args`, `const options` (`as const satisfies …Specs`),
 *    `export type NameInput = Input<typeof args, typeof options>` and
 *    `export const nameCommand = defineCommand({…, load: () => import('./run/NAME.js')})`.
 *    It imports nothing heavy; completion.ts is the pattern. A command of two words ("key add") is in
 *    `key-add.ts` with `name: 'key add'`, and its first word is listed in {@link GROUPS}.
 * 2. `src/commands/run/NAME.ts` exports `run(context, input)`, which returns `{data, code?}`, and
 *    `text(data, style)`, which words it for people.
 * 3. A line in {@link COMMANDS}, in the order of the help text.
 * 4. `npm run man` rewrites man/; commit the pages (`npm run lint` fails until they agree).
 */
import { bootCommand } from './boot.js';
import { catCommand } from './cat.js';
import { completionCommand } from './completion.js';
import { demoCommand } from './demo.js';
import { diffCommand } from './diff.js';
import { exportTapeCommand } from './export-tape.js';
import { historyCommand } from './history.js';
import { importTapeCommand } from './import-tape.js';
import { initCommand } from './init.js';
import { keyAddCommand } from './key-add.js';
import { keyListCommand } from './key-list.js';
import { keyRemoveCommand } from './key-remove.js';
import { lsCommand } from './ls.js';
import { mountCommand } from './mount.js';
import { restoreCommand } from './restore.js';
import { pointsCommand } from './points.js';
import { serveNbdCommand } from './serve-nbd.js';
import { snapshotCommand } from './snapshot.js';
import { snapshotsCommand } from './snapshots.js';
import { tapeForgetCommand } from './tape-forget.js';
import { tapeListCommand } from './tape-list.js';
import { tapeVerifyCommand } from './tape-verify.js';
import { umountCommand } from './umount.js';
import { volumesCommand } from './volumes.js';
import { watchCommand } from './watch.js';
import { verifyCommand } from './verify.js';
import { repairCommand } from './repair.js';
import { statusCommand } from './status.js';
import { pruneCommand } from './prune.js';
import type { CommandSpec } from './spec.js';

export const COMMANDS: readonly CommandSpec[] = [
  initCommand,
  watchCommand,
  snapshotCommand,
  volumesCommand,
  pointsCommand,
  snapshotsCommand,
  statusCommand,
  restoreCommand,
  lsCommand,
  catCommand,
  historyCommand,
  diffCommand,
  mountCommand,
  umountCommand,
  serveNbdCommand,
  bootCommand,
  verifyCommand,
  exportTapeCommand,
  importTapeCommand,
  tapeListCommand,
  tapeVerifyCommand,
  tapeForgetCommand,
  pruneCommand,
  repairCommand,
  keyListCommand,
  keyAddCommand,
  keyRemoveCommand,
  completionCommand,
  demoCommand,
];

/** What the first word of commands with two words stands for: summary, no full stop. */
export const GROUPS: Readonly<Record<string, string>> = {
  serve: 'images as network block devices',
  tape: 'cartridges, and what is on them',
  key: 'passwords and key files of the repository',
};
