/**
 * Temporary directories of tests. Their names carry the process that made them, so that what a dead run
 * left behind (directories, mounts below them, loop devices on files in them) is found and removed by the
 * next run, while a run that is still going on is left alone.
 */
import { execFileSync } from 'node:child_process';
import { mkdtempSync, readFileSync, readdirSync, readlinkSync, rmSync, statfsSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join, sep } from 'node:path';

/** Field 22 of /proc/PID/stat, the start of the process in clock ticks; undefined if there is none. */
function startTicks(pid: number): string | undefined {
  try {
    // The second field, the program's name in brackets, may itself contain blanks and brackets.
    const stat = readFileSync(`/proc/${pid}/stat`, 'utf8');
    return stat.slice(stat.lastIndexOf(')') + 2).split(' ')[19];
  } catch {
    return undefined;
  }
}

/** Process ids mean something only within their namespace. */
function pidNamespace(): string {
  return readlinkSync('/proc/self/ns/pid').replace(/\D/g, '');
}

const PATTERN = /^b2-test-(\d+)-(\d+)-(\d+)-/;

function prefix(): string {
  return `b2-test-${pidNamespace()}-${process.pid}-${startTicks(process.pid) ?? '0'}-`;
}

/** Mount points at or below `dir`, the deepest and newest first. */
export function mountsBelow(dir: string): readonly string[] {
  const points = readFileSync('/proc/self/mountinfo', 'utf8')
    .split('\n')
    .map((line) => line.split(' ')[4] ?? '')
    .map((path) =>
      path.replace(/\\([0-7]{3})/g, (_, code: string) => String.fromCharCode(parseInt(code, 8))),
    )
    .filter((path) => path === dir || path.startsWith(dir + sep));
  return points.toReversed();
}

/** Loop devices (`/dev/loop3`) whose backing file lies below `dir`, deleted files included. */
export function loopsBelow(dir: string): readonly string[] {
  return readdirSync('/sys/block')
    .filter((name) => /^loop\d+$/.test(name))
    .filter((name) => {
      try {
        return readFileSync(`/sys/block/${name}/loop/backing_file`, 'utf8').startsWith(dir + sep);
      } catch {
        return false;
      }
    })
    .map((name) => `/dev/${name}`);
}

/** So often, and with such pauses, a device that somebody else looks into (blkid, a mount namespace in the making) is asked for again. */
const BUSY_TRIES = 100;
const BUSY_PAUSE_MS = 100;

/**
 * Removes the nodes of a loop device's partitions, if there are any: made by partx, they would outlive it and stand in the way of its next
 * user. Waits ten seconds for others that have them open.
 */
export function deletePartitions(loop: string): void {
  const name = loop.replace('/dev/', '');
  for (let tries = 1; ; tries++) {
    if (!readdirSync(`/sys/block/${name}`).some((entry) => entry.startsWith(`${name}p`))) return;
    try {
      execFileSync('partx', ['--delete', loop], { stdio: 'pipe' });
    } catch (error) {
      if (tries >= BUSY_TRIES) throw error;
      pause();
    }
  }
}

function pause(): void {
  Atomics.wait(new Int32Array(new SharedArrayBuffer(4)), 0, 0, BUSY_PAUSE_MS);
}

/**
 * Unmounts, detaches and deletes everything in `dir`; throws when something is still in use. A loop device is gone when its last user lets
 * go: others that look into it, or have a copy of its mount in a name space of their own, are waited for, ten seconds.
 */
export function removeTree(dir: string): void {
  for (const point of mountsBelow(dir)) execFileSync('umount', [point], { stdio: 'pipe' });
  for (const loop of loopsBelow(dir)) {
    deletePartitions(loop);
    try {
      execFileSync('losetup', ['-d', loop], { stdio: 'pipe' });
    } catch (error) {
      // One that clears itself when its last user lets go may have gone since the look.
      if (loopsBelow(dir).includes(loop)) throw error;
    }
  }
  for (let tries = 1; loopsBelow(dir).length > 0; tries++) {
    if (tries >= BUSY_TRIES) throw new Error(`${loopsBelow(dir).join(', ')} cannot be detached`);
    pause();
  }
  rmSync(dir, { recursive: true, force: true, maxRetries: 3 });
}

/** Removes what dead runs left in `parent`; returns the directories removed. */
export function sweep(parent = tmpdir()): readonly string[] {
  const namespace = pidNamespace();
  const removed: string[] = [];
  for (const name of readdirSync(parent)) {
    const match = PATTERN.exec(name);
    if (match === null || match[1] !== namespace) continue;
    if (startTicks(Number(match[2])) === match[3]) continue;
    const dir = join(parent, name);
    try {
      removeTree(dir);
      removed.push(dir);
    } catch (error) {
      process.stderr.write(`cannot remove what a dead run left in ${dir}: ${String(error)}\n`);
    }
  }
  return removed;
}

export interface TempDir {
  readonly path: string;
  /** Absolute path of `names` below it. */
  join(...names: readonly string[]): string;
  /** Registers what {@link remove} does first; the last registered runs first. */
  onRemove(undo: () => void | Promise<void>): void;
  /** Undoes everything and deletes the directory; calling it again does nothing. */
  remove(): Promise<void>;
  [Symbol.asyncDispose](): Promise<void>;
}

/**
 * Where files lie in memory, for tests that make thousands of them and mean the calls, not the disk; $TMPDIR where there is no such place or
 * little room (a container's is 64 MiB).
 */
export function memoryDir(leastBytes = 512 * 1024 * 1024): string {
  try {
    const { bavail, bsize } = statfsSync('/dev/shm');
    return bavail * bsize >= leastBytes ? '/dev/shm' : tmpdir();
  } catch {
    return tmpdir();
  }
}

let swept = false;

/**
 * A new empty directory: `await using dir = tempDir()`, or `afterEach(() => dir.remove())`. Below $TMPDIR
 * unless `parent` says otherwise. The first call of a process sweeps after dead runs.
 */
export function tempDir(parent = tmpdir()): TempDir {
  if (!swept) {
    swept = true;
    sweep();
  }
  const path = mkdtempSync(join(parent, prefix()));
  const undos: (() => void | Promise<void>)[] = [];
  let isRemoved = false;
  const remove = async (): Promise<void> => {
    if (isRemoved) return;
    isRemoved = true;
    const failures: unknown[] = [];
    for (const undo of undos.toReversed()) {
      try {
        await undo();
      } catch (error) {
        failures.push(error);
      }
    }
    removeTree(path);
    if (failures.length > 0) throw new AggregateError(failures, `cleaning up ${path}`);
  };
  return {
    path,
    join: (...names) => join(path, ...names),
    onRemove: (undo) => void undos.push(undo),
    remove,
    [Symbol.asyncDispose]: remove,
  };
}
