/**
 * Mounting and unmounting: root with the system calls, everybody else through the set-uid program fusermount3. And the watchdog, which
 * unmounts when the server has died without doing so.
 */
import { spawn } from 'node:child_process';
import { once } from 'node:events';
import { closeSync, constants, openSync } from 'node:fs';
import { readFile, realpath, stat } from 'node:fs/promises';
import { basename, dirname, join, resolve } from 'node:path';

import { systemRandom } from '../clock.js';
import { B2Error, errnoOf, ioError, messageOf } from '../errors.js';
import { startWatcher, type Watcher } from '../leftovers.js';
import {
  mountReadOnly,
  receiveDescriptor,
  setNonBlocking,
  socketPair,
  unmountPath,
} from './native.js';

/** As the kernel lists our mounts. */
export const MOUNT_TYPE = 'fuse.b2';
const SUBTYPE = 'b2';

/** A line of /proc/self/mountinfo. */
export interface MountInfo {
  /** `0:45`: names the mounted file system as long as it is there. The next one may get the same. */
  readonly device: string;
  /** What is mounted, as it is written there; of ours: {@link newSource}. */
  readonly source: string;
  readonly mountpoint: string;
  readonly type: string;
}

/** Parses /proc/self/mountinfo; the last line with a mount point is the one that is seen. */
export function parseMountInfo(text: string): readonly MountInfo[] {
  return text.split('\n').flatMap((line) => {
    const fields = line.split(' ');
    const dash = fields.indexOf('-', 6);
    const [, , device, , raw] = fields;
    const type = fields[dash + 1];
    const source = fields[dash + 2];
    if (dash < 0 || device === undefined || raw === undefined) return [];
    if (type === undefined || source === undefined) return [];
    const mountpoint = raw.replace(/\\([0-7]{3})/g, (_, code: string) =>
      String.fromCharCode(parseInt(code, 8)),
    );
    return [
      {
        device,
        source,
        mountpoint: Buffer.from(mountpoint, 'latin1').toString('utf8'),
        type,
      },
    ];
  });
}

async function mounts(): Promise<readonly MountInfo[]> {
  // As latin1, so that an escape is one byte whatever the name's encoding.
  return parseMountInfo(await readFile('/proc/self/mountinfo', 'latin1'));
}

/** What is mounted at exactly this path and seen there. */
async function mountedAt(path: string): Promise<MountInfo | undefined> {
  return (await mounts()).findLast((m) => m.mountpoint === path);
}

/**
 * The absolute path without symbolic links. The last part is not looked at: it may be a mount whose server is dead or is this
 * process.
 */
async function canonical(path: string): Promise<string> {
  const absolute = resolve(path);
  if (absolute === '/') return absolute;
  return join(await realpath(dirname(absolute)), basename(absolute));
}

function isRoot(): boolean {
  return process.geteuid?.() === 0;
}

/** A mount that was made: the descriptor through which the kernel asks. */
export interface Attached {
  /** /dev/fuse, non-blocking; the caller closes it. */
  readonly fuseFd: number;
  readonly mountpoint: string;
  readonly device: string;
  /** Names this mount for {@link detach}. */
  readonly source: string;
  readonly watchdog: Watcher;
}

/**
 * A name that no other mount has. The kernel's own names of a mount (its id and device) are given to the next one at once: who
 * unmounts late by them takes a mount away that somebody else has just made.
 */
function newSource(): string {
  return `b2-${Buffer.from(systemRandom(8)).toString('hex')}`;
}

/**
 * Mounts at a directory. The caller must be reading requests before anybody looks into it. Kinds `not-found`, `refused`,
 * `unsupported`, `io`.
 */
export async function attach(path: string): Promise<Attached> {
  const mountpoint = await checkMountpoint(path);
  const source = newSource();
  const fuseFd = isRoot()
    ? await attachAsRoot(mountpoint, source)
    : await attachAsUser(mountpoint, source);
  try {
    const info = (await mounts()).findLast((m) => m.source === source && m.type === MOUNT_TYPE);
    if (info?.mountpoint !== mountpoint)
      throw new B2Error('failed', `${mountpoint}: mounted, but not in the list of mounts`);
    const { device } = info;
    return { fuseFd, mountpoint, device, source, watchdog: startWatchdog(source) };
  } catch (error) {
    // Ends the connection; what is left of the mount is taken away as after a crash.
    closeSync(fuseFd);
    await detach(source).catch(() => undefined);
    throw error;
  }
}

async function checkMountpoint(path: string): Promise<string> {
  const existing = await mountedAt(await canonical(path).catch(() => resolve(path)));
  if (existing?.type === MOUNT_TYPE) {
    throw new B2Error('refused', `${path}: a b2 mount is there already`, {
      hint: `"b2 umount ${path}" takes it down.`,
    });
  }
  try {
    const real = await realpath(path);
    if ((await stat(real)).isDirectory()) return real;
  } catch (error) {
    throw errnoOf(error) === 'ENOENT'
      ? new B2Error('not-found', `there is no directory ${path} to mount at`, {
          cause: error,
          hint: `mkdir -p ${path}`,
        })
      : ioError('mount at', path, error);
  }
  throw new B2Error('refused', `cannot mount at ${path}: it is no directory`);
}

async function attachAsRoot(mountpoint: string, source: string): Promise<number> {
  let fd: number;
  try {
    fd = openSync('/dev/fuse', constants.O_RDWR | constants.O_NONBLOCK);
  } catch (error) {
    throw new B2Error('unsupported', `cannot open /dev/fuse: ${messageOf(error)}`, {
      cause: error,
      hint: 'Load the module (modprobe fuse); a container must be given the device.',
    });
  }
  const uid = process.geteuid?.() ?? 0;
  const gid = process.getegid?.() ?? 0;
  try {
    await mountReadOnly(
      source,
      mountpoint,
      MOUNT_TYPE,
      `fd=${fd},rootmode=40000,user_id=${uid},group_id=${gid},default_permissions`,
    );
    return fd;
  } catch (error) {
    closeSync(fd);
    throw ioError('mount at', mountpoint, error);
  }
}

async function attachAsUser(mountpoint: string, source: string): Promise<number> {
  const [ours, theirs] = socketPair();
  try {
    const done = await runFusermount(
      [
        '-o',
        `ro,nosuid,nodev,noatime,default_permissions,fsname=${source},subtype=${SUBTYPE}`,
        '--',
        mountpoint,
      ],
      theirs,
    );
    if (done.code !== 0) {
      throw new B2Error(
        'io',
        `cannot mount at ${mountpoint}: ${done.stderr || `fusermount3 ended with ${done.code}`}`,
        {
          hint: 'The directory must be yours and /dev/fuse must be there; root needs no fusermount3.',
        },
      );
    }
    const fd = receiveDescriptor(ours);
    if (fd === undefined)
      throw new B2Error('io', `cannot mount at ${mountpoint}: fusermount3 sent no descriptor`);
    setNonBlocking(fd);
    return fd;
  } finally {
    closeSync(ours);
    closeSync(theirs);
  }
}

async function runFusermount(
  args: readonly string[],
  socketFd?: number,
): Promise<{ readonly code: number | null; readonly stderr: string }> {
  const child = spawn('fusermount3', [...args], {
    stdio: ['ignore', 'ignore', 'pipe', socketFd ?? 'ignore'],
    env: {
      PATH: SEARCH_PATH,
      LC_ALL: 'C',
      ...(socketFd === undefined ? {} : { _FUSE_COMMFD: '3' }),
    },
    cwd: '/',
  });
  let stderr = '';
  child.stderr?.setEncoding('utf8').on('data', (text: string) => {
    if (stderr.length < 4096) stderr += text;
  });
  try {
    const [code] = (await once(child, 'close')) as [number | null];
    return { code, stderr: stderr.trim().replace(/^fusermount3: /, '') };
  } catch (error) {
    throw new B2Error('unsupported', `cannot run fusermount3: ${messageOf(error)}`, {
      cause: error,
      hint: 'Users other than root mount through fusermount3: install the package fuse3.',
    });
  }
}

const SEARCH_PATH = `${process.env['PATH'] ?? ''}:/usr/bin:/bin:/usr/sbin:/sbin`;

/** Takes away whatever is seen at the path. EBUSY as an error with that code, unless `detach`. */
async function unmountNow(mountpoint: string, detach: boolean): Promise<void> {
  if (isRoot()) return unmountPath(mountpoint, detach);
  const done = await runFusermount(['-u', ...(detach ? ['-z'] : []), '--', mountpoint]);
  if (done.code === 0) return;
  const code = /busy/i.test(done.stderr) ? 'EBUSY' : 'EIO';
  throw Object.assign(new Error(done.stderr || `fusermount3 ended with ${done.code}`), { code });
}

/** How an unmount went: `gone` where it was not mounted any more, `covered` where something else is mounted over it. */
export type Unmounted = 'done' | 'detached' | 'gone' | 'covered';

/**
 * Unmounts this very file system, wherever it has been moved to. One that is in use is detached: it cannot be reached by its path
 * any more, and who has it open keeps it until the server closes the connection.
 */
export async function detach(source: string): Promise<Unmounted> {
  const all = await mounts();
  const mine = all.findLast((m) => m.source === source && m.type === MOUNT_TYPE);
  if (mine === undefined) return 'gone';
  if (all.findLast((m) => m.mountpoint === mine.mountpoint) !== mine) return 'covered';
  try {
    await unmountNow(mine.mountpoint, false);
    return 'done';
  } catch (error) {
    if (errnoOf(error) !== 'EBUSY') throw ioError('unmount', mine.mountpoint, error);
    await unmountNow(mine.mountpoint, true);
    return 'detached';
  }
}

/** What `b2 umount` does. Kinds `not-found` (nothing mounted there), `refused` (not ours), `io` (in use, unless `lazy`). */
export async function unmountByUser(path: string, lazy: boolean): Promise<string> {
  let mountpoint = await canonical(path).catch((error: unknown) => {
    throw ioError('unmount', path, error);
  });
  let info = await mountedAt(mountpoint);
  if (info === undefined) {
    // A symbolic link to the mount point, or nothing.
    mountpoint = await realpath(path).catch(() => mountpoint);
    info = await mountedAt(mountpoint);
  }
  if (info === undefined) throw new B2Error('not-found', `nothing is mounted at ${path}`);
  if (info.type !== MOUNT_TYPE) {
    throw new B2Error('refused', `${path} is no b2 mount but ${info.type}`, {
      hint: 'Use umount for it.',
    });
  }
  try {
    await unmountNow(mountpoint, lazy);
    return mountpoint;
  } catch (error) {
    if (errnoOf(error) !== 'EBUSY') throw ioError('unmount', path, error);
    throw new B2Error('io', `${path} is in use`, {
      cause: error,
      retryable: true,
      hint: `"fuser -vm ${path}" shows who uses it; --lazy takes it away now and frees it when they are done.`,
    });
  }
}

/**
 * Until end of file: the server lives. Then: is its mount still there, and what is seen at its place? $1 source, $2 who unmounts.
 * No signal ends it early: it must outlive the server.
 */
const WATCHDOG = `
trap '' HUP INT TERM
while read -r _; do :; done
find_mine() {
  point=
  while read -r _ _ _ _ at rest; do
    case " $rest" in *" - fuse.b2 $1 "*) point=$at ;; *) [ "$point" = "$at" ] && point= ;; esac
  done </proc/self/mountinfo
  [ -n "$point" ] || exit 0
  point=$(printf '%b.' "$(printf '%s' "$point" | sed 's/\\\\/\\\\0/g')")
  point=\${point%.}
}
find_mine "$1"
if [ "$2" != root ]; then exec fusermount3 -u -z -- "$point"; fi
umount -i -c -l -- "$point" && exit 0
find_mine "$1"
umount -l "$point"
`;

/** Unmounts as soon as this process has ended, however it does. */
function startWatchdog(source: string): Watcher {
  const args = [source, isRoot() ? 'root' : 'user'];
  return startWatcher(WATCHDOG, 'b2-mount-watchdog', args, 'ignored');
}
