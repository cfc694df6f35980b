/**
 * Blocks of a device that cannot be read: found, kept in mind, told.
 *
 * What cannot be read is unknown. It is never stored as anything: the repository keeps what it holds of those blocks from before. As
 * long as there are such blocks no point is exact: points are of class `fuzzy` then, and say which bytes they do not know.
 */
import type { ByteRange, ReadDevice } from '../devices/device.js';
import { B2Error, isKind } from '../errors.js';
import { BLOCK_BYTES, blocksOf } from '../units.js';

/** 256 MiB: a device with more is failing altogether, and each read of it may take seconds. */
export const MAX_BAD_BLOCKS = 65_536;
/** Ranges that are listed. */
const MAX_RANGES = 100;

/**
 * Reads [offset, offset + length), block by block where that fails as a whole, and returns the blocks that could not be read (their
 * bytes in `into` mean nothing). `offset` is that of a block. Rejects where the device has gone, has another size, or no block of
 * it can be read.
 */
export async function readAround(
  device: ReadDevice,
  into: Uint8Array,
  offset: number,
  length: number,
): Promise<readonly number[]> {
  let failure: B2Error | undefined;
  try {
    if ((await device.read(into, offset)) >= length) return [];
  } catch (error) {
    if (!isKind(error, 'io')) throw error;
    failure = error;
  }
  const { sizeBytes } = device.facts;
  // A device that is gone altogether is not one with bad blocks.
  const now = await device.refresh();
  if (failure === undefined || now.sizeBytes < sizeBytes) {
    throw (
      failure ??
      new B2Error('io', `${device.facts.path} ends before byte ${offset + length}`, {
        hint: 'The device has shrunk or is going away; check the kernel log (dmesg).',
      })
    );
  }
  const bad: number[] = [];
  for (let at = 0; at < length; at += BLOCK_BYTES) {
    const end = Math.min(at + BLOCK_BYTES, into.byteLength);
    if (!(await canRead(device, into.subarray(at, end), offset + at)))
      bad.push((offset + at) / BLOCK_BYTES);
  }
  if (bad.length < blocksOf(length) || (await isAnyReadable(device, into, offset, length)))
    return bad;
  throw failure;
}

async function canRead(device: ReadDevice, into: Uint8Array, offset: number): Promise<boolean> {
  try {
    await device.read(into, offset);
    return true;
  } catch (error) {
    if (isKind(error, 'io')) return false;
    throw error;
  }
}

/** Somewhere else: at its start, in its middle, at its end. */
async function isAnyReadable(
  device: ReadDevice,
  into: Uint8Array,
  offset: number,
  length: number,
): Promise<boolean> {
  const blocks = blocksOf(device.facts.sizeBytes);
  for (const block of [0, Math.floor(blocks / 2), blocks - 1]) {
    const at = block * BLOCK_BYTES;
    if (at >= offset && at < offset + length) continue;
    if (await canRead(device, into.subarray(0, BLOCK_BYTES), at)) return true;
  }
  return false;
}

/** Blocks in ascending order as ranges of bytes, the last of them not behind `sizeBytes`; the first hundred. */
export function rangesOf(blocks: Iterable<number>, sizeBytes: number): readonly ByteRange[] {
  const ranges: ByteRange[] = [];
  let first = -1;
  let end = -1;
  const close = (): void => {
    if (first < 0) return;
    const offset = first * BLOCK_BYTES;
    ranges.push({ offset, length: Math.min(end * BLOCK_BYTES, sizeBytes) - offset });
  };
  for (const block of [...blocks].sort((a, b) => a - b)) {
    if (block === end) {
      end++;
      continue;
    }
    close();
    if (ranges.length >= MAX_RANGES) return ranges;
    first = block;
    end = block + 1;
  }
  close();
  return ranges.slice(0, MAX_RANGES);
}
