/** Partitions on loop devices, and reproducible contents, for tests of devices. */
import { execFileSync } from 'node:child_process';
import { truncateSync, writeFileSync } from 'node:fs';

import { LOOP_NEEDS } from './loop.js';
import { findTool, type Needs } from './requires.js';
import { deletePartitions, type TempDir } from './tmp.js';

/** What {@link addPartitions} and {@link tool} need besides loop devices. */
export const DISK_NEEDS: Needs = {
  ...LOOP_NEEDS,
  tools: [
    ...(LOOP_NEEDS.tools ?? []),
    'sfdisk',
    'sgdisk',
    'partx',
    'blkid',
    'wipefs',
    'mkfs.ext4',
    'mkswap',
  ],
};

/** Runs a tool and returns its output; throws with what it said when it fails. */
export function tool(
  name: string,
  args: readonly string[],
  input: string | Uint8Array = '',
): string {
  return execFileSync(findTool(name) ?? name, [...args], {
    encoding: 'utf8',
    input,
    env: { ...process.env, LC_ALL: 'C' },
    stdio: 'pipe',
  });
}

/** Bytes that look random and are the same for the same seed. */
export function noise(seed: number, length: number): Uint8Array<ArrayBuffer> {
  const words = new Uint32Array(Math.ceil(length / 4));
  let state = seed >>> 0 || 1;
  for (let i = 0; i < words.length; i++) {
    state ^= state << 13;
    state ^= state >>> 17;
    state ^= state << 5;
    words[i] = state >>> 0;
  }
  return new Uint8Array(words.buffer, 0, length);
}

/** Whole numbers in [0, below), the same for the same seed. */
export function dice(seed: number): (below: number) => number {
  let state = seed >>> 0;
  return (below) => {
    state = (state + 0x6d2b79f5) >>> 0;
    let t = Math.imul(state ^ (state >>> 15), state | 1);
    t ^= t + Math.imul(t ^ (t >>> 7), t | 61);
    return ((t ^ (t >>> 14)) >>> 0) % below;
  };
}

/** A file in `dir`: a hole of that many bytes, or those bytes. */
export function imageFile(dir: TempDir, name: string, content: number | Uint8Array): string {
  const file = dir.join(name);
  writeFileSync(file, typeof content === 'number' ? '' : content);
  if (typeof content === 'number') truncateSync(file, content);
  return file;
}

/**
 * Has the kernel make nodes for the partitions of the loop device; returns them in order. By partx, which asks for
 * each by BLKPG: that works in kernels that read no partition tables themselves (`losetup -P` makes none there).
 */
export function addPartitions(dir: TempDir, device: string, count: number): readonly string[] {
  tool('partx', ['--add', device]);
  dir.onRemove(() => deletePartitions(device));
  return Array.from({ length: count }, (_, i) => `${device}p${i + 1}`);
}

/** Writes `data` to a device or file by dd, around b2's code. */
export function pokeWithDd(path: string, offset: number, data: Uint8Array): void {
  tool(
    'dd',
    [
      `of=${path}`,
      'bs=4096',
      'oflag=seek_bytes',
      `seek=${offset}`,
      'conv=notrunc,fsync',
      'status=none',
    ],
    data,
  );
}
