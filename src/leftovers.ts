/** What a process leaves on a disk when it is killed (SIGKILL), taken away by another one that sees it end. */
import { spawn, type ChildProcess } from 'node:child_process';
import { once } from 'node:events';
import { existsSync } from 'node:fs';

/**
 * $1 the path, which may be a directory. Until end of file: the owner lives. Device, inode and time of birth tell whether it is
 * still the same: another process may have taken the name over, and with it even the inode. No signal ends this early.
 */
const SCRIPT = `
trap '' HUP INT TERM
what=$(stat -c %d:%i:%w -- "$1") || exit 0
echo ready
while read -r _; do :; done
[ "$(stat -c %d:%i:%w -- "$1" 2>/dev/null)" = "$what" ] || exit 0
rm -rf --one-file-system -- "$1" 2>/dev/null || rm -rf -- "$1"
`;

/** Someone who removes a path as soon as this process has ended, however it does. */
export interface LeftoverWatch {
  readonly pid: number | undefined;
  /** After the path has been removed in order: lets the watcher end. Resolves when it has. */
  stop(): Promise<void>;
}

/**
 * Watches over `path`, an absolute one that is there and is ours alone. Resolves when the watcher has seen it. Where no shell can be
 * started, only being killed is not cared for: that is no reason to fail.
 */
export async function removeWhenKilled(path: string): Promise<LeftoverWatch> {
  const shell = existsSync('/bin/sh') ? '/bin/sh' : 'sh';
  const child: ChildProcess = spawn(shell, ['-c', SCRIPT, 'b2-leftovers', path], {
    stdio: ['pipe', 'pipe', 'ignore'],
    // A session of its own: Ctrl-C is not for it. Nothing of the environment: it may hold secrets.
    detached: true,
    env: { PATH: `${process.env['PATH'] ?? ''}:/usr/bin:/bin`, LC_ALL: 'C' },
    cwd: '/',
  });
  child.stdin?.on('error', () => undefined);
  const ended = once(child, 'exit').then(
    () => undefined,
    () => undefined,
  );
  await Promise.race([
    new Promise<void>((resolve) => child.stdout?.once('data', () => resolve())),
    ended,
  ]);
  child.stdout?.destroy();
  child.unref();
  return {
    pid: child.pid,
    async stop() {
      child.ref();
      child.stdin?.destroy();
      await ended;
    },
  };
}
