/**
 * Real block devices for tests: loop devices on sparse files in a {@link TempDir}, file systems on them,
 * mounts. Everything is undone when the directory is removed, and by the next run's sweep if this one dies.
 * Needs root and {@link LOOP_NEEDS}.
 */
import { execFile } from 'node:child_process';
import { closeSync, ftruncateSync, mkdirSync, openSync } from 'node:fs';
import { promisify } from 'node:util';
import { systemClock } from '../../src/clock.js';
import { messageOf } from '../../src/errors.js';
import { deletePartitions, type TempDir } from './tmp.js';
import { findTool, type Needs } from './requires.js';

export const LOOP_NEEDS: Needs = {
  root: true,
  tools: ['losetup', 'mount', 'umount'],
  paths: ['/dev/loop-control'],
};

const execute = promisify(execFile);

/** Runs a program to its end and resolves to its stdout; rejects with its stderr in the message. */
export async function runTool(name: string, ...args: readonly string[]): Promise<string> {
  const { stdout } = await execute(findTool(name) ?? name, args, { maxBuffer: 2 ** 26 });
  return stdout;
}

export interface LoopOptions {
  /** 512 (default) or 4096. */
  readonly sectorBytes?: 512 | 4096;
  readonly readOnly?: boolean;
}

export interface Loop {
  /** `/dev/loop3` */
  readonly device: string;
  readonly file: string;
  detach(): Promise<void>;
}

/** A sparse file of `bytes` bytes in `dir`. */
export function sparseFile(dir: TempDir, name: string, bytes: number): string {
  const path = dir.join(name);
  const fd = openSync(path, 'wx', 0o600);
  try {
    ftruncateSync(fd, bytes);
  } finally {
    closeSync(fd);
  }
  return path;
}

/** Attaches `file` (below `dir`) to a free loop device; detached at the latest with the directory. */
export async function attachLoop(
  dir: TempDir,
  file: string,
  options: LoopOptions = {},
): Promise<Loop> {
  const args = ['--find', '--show', '--sector-size', String(options.sectorBytes ?? 512)];
  if (options.readOnly === true) args.push('--read-only');
  const device = (await runTool('losetup', ...args, file)).trim();
  // Those that partx has made outlive who had the device before, if that died or did not take them away.
  deletePartitions(device);
  let isAttached = true;
  const detach = async (): Promise<void> => {
    if (!isAttached) return;
    isAttached = false;
    await runTool('losetup', '--detach', device);
  };
  dir.onRemove(detach);
  return { device, file, detach };
}

/** A new loop device of `bytes` bytes, all holes. */
export async function newLoop(
  dir: TempDir,
  name: string,
  bytes: number,
  options: LoopOptions = {},
): Promise<Loop> {
  return attachLoop(dir, sparseFile(dir, name, bytes), options);
}

export type FileSystem = 'ext4' | 'xfs' | 'btrfs' | 'vfat' | 'ntfs' | 'swap';

const MAKE: Readonly<Record<FileSystem, readonly [string, ...string[]]>> = {
  ext4: ['mkfs.ext4', '-q', '-F', '-E', 'lazy_itable_init=0,lazy_journal_init=0'],
  xfs: ['mkfs.xfs', '-q', '-f'],
  btrfs: ['mkfs.btrfs', '-q', '-f'],
  vfat: ['mkfs.vfat'],
  ntfs: ['mkfs.ntfs', '--quiet', '--fast', '--force'],
  swap: ['mkswap', '-q'],
};

/** The program that {@link makeFileSystem} needs, for {@link Needs.tools}. */
export function makerOf(type: FileSystem): string {
  return MAKE[type][0];
}

export async function makeFileSystem(type: FileSystem, device: string): Promise<void> {
  const [tool, ...args] = MAKE[type];
  await runTool(tool, ...args, device);
}

export interface Mount {
  readonly path: string;
  /** With `options` of umount(8). */
  unmount(...options: readonly string[]): Promise<void>;
}

/** Mounts `device` on a new directory `name` of `dir`; unmounted at the latest with the directory. */
export async function mountDevice(
  dir: TempDir,
  device: string,
  name: string,
  options?: string,
): Promise<Mount> {
  const path = dir.join(name);
  mkdirSync(path, { recursive: true });
  await runTool('mount', ...(options === undefined ? [] : ['-o', options]), device, path);
  let isMounted = true;
  const unmount = async (...options: readonly string[]): Promise<void> => {
    if (!isMounted) return;
    await runTool('umount', ...options, path);
    isMounted = false;
  };
  dir.onRemove(() => unmount());
  return { path, unmount };
}

/** Freezes it (thaw it by `fsfreeze --unfreeze`). A watch that has frozen it itself, as where writers outrun it, is waited for. */
export async function freezeMount(path: string): Promise<void> {
  for (let tries = 0; ; tries++) {
    try {
      await runTool('fsfreeze', '--freeze', path);
      return;
    } catch (error) {
      if (tries === 100 || !messageOf(error).includes('resource busy')) throw error;
      await systemClock.sleep(100);
    }
  }
}
