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

/** A shell that outlives this process, however it ends, and then does something. */
export interface Watcher {
  readonly pid: number | undefined;
  /** After what it watches over was ended in order: lets it go, and resolves when it has ended. */
  stop(): Promise<void>;
}

/**
 * Starts a shell with `script`, whose standard input ends when this process does. `heard` resolves when it has said something on
 * its standard output, for a script that does, or has ended. Where it cannot be started only being killed is not cared for, which
 * is no reason to fail.
 */
export function startWatcher(
  script: string,
  name: string,
  args: readonly string[],
  output: 'heard' | 'ignored',
): Watcher & { readonly heard: Promise<void> } {
  const shell = existsSync('/bin/sh') ? '/bin/sh' : 'sh';
  const child: ChildProcess = spawn(shell, ['-c', script, name, ...args], {
    stdio: ['pipe', output === 'heard' ? 'pipe' : 'ignore', 'ignore'],
    // A session of its own: Ctrl-C is not for it. Nothing of the environment: it may hold secrets.
    detached: true,
    env: { PATH: `${process.env['PATH'] ?? ''}:/usr/bin:/bin:/usr/sbin:/sbin`, LC_ALL: 'C' },
    cwd: '/',
  });
  child.stdin?.on('error', () => undefined);
  const ended = once(child, 'exit').then(
    () => undefined,
    () => undefined,
  );
  const heard = Promise.race([
    new Promise<void>((resolve) => child.stdout?.once('data', () => resolve())),
    ended,
  ]).then(() => void child.stdout?.destroy());
  child.unref();
  return {
    pid: child.pid,
    heard,
    async stop() {
      child.ref();
      child.stdin?.destroy();
      await ended;
    },
  };
}

/**
 * Has `path`, an absolute one that is there and is ours alone, removed as soon as this process has ended, however it does. Resolves
 * when the watcher has seen it.
 */
export async function removeWhenKilled(path: string): Promise<Watcher> {
  const { heard, ...watcher } = startWatcher(SCRIPT, 'b2-leftovers', [path], 'heard');
  await heard;
  return watcher;
}
