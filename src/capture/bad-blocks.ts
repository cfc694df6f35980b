/**
 * Blocks of a device that cannot be read: found, kept in mind, told.
 *
 * What cannot be read is unknown. It is never stored as anything: the repository keeps what it holds of those blocks from before. As
 * long as there are such blocks no point is exact: points are of class `fuzzy` then, and say which bytes they do not know.
 */
import type { ByteRange, ReadDevice } from '../devices/device.js';
import { B2Error, isKind } from '../errors.js';
import { BLOCK_BYTES, blocksOf } from '../units.js';

/** Ranges that are listed. */
const MAX_RANGES = 100;
/** Blocks of one page of the bitmap: 4 KiB, for 128 MiB of the device. */
const PAGE_BLOCKS = 32_768;
/** Of a part of the device of which many blocks cannot be read: after so many in a row only a few of the rest are tried. */
const HASTY_BLOCKS = 4;

/**
 * The blocks that could not be read, as bits: 4 KiB for every 128 MiB of the device in which there are any, so that a device of which
 * much cannot be read costs no more than 32 MiB for each TiB, and is captured everywhere else.
 */
export class BadBlocks {
  private readonly pages = new Map<number, { readonly bits: Uint8Array; count: number }>();
  private count = 0;
  private listed: readonly ByteRange[] | undefined;

  get size(): number {
    return this.count;
  }

  /** Bytes of memory. */
  get bytes(): number {
    return this.pages.size * (PAGE_BLOCKS / 8);
  }

  has(block: number): boolean {
    const at = block % PAGE_BLOCKS;
    const bits = this.pages.get((block - at) / PAGE_BLOCKS)?.bits;
    return bits !== undefined && ((bits[at >> 3] ?? 0) & (1 << (at & 7))) !== 0;
  }

  /** True if it was not there. */
  add(block: number): boolean {
    if (this.has(block)) return false;
    const at = block % PAGE_BLOCKS;
    const number = (block - at) / PAGE_BLOCKS;
    let page = this.pages.get(number);
    if (page === undefined) {
      page = { bits: new Uint8Array(PAGE_BLOCKS / 8), count: 0 };
      this.pages.set(number, page);
    }
    page.bits[at >> 3] = (page.bits[at >> 3] ?? 0) | (1 << (at & 7));
    page.count++;
    this.count++;
    this.listed = undefined;
    return true;
  }

  /** True if it was there. */
  delete(block: number): boolean {
    if (!this.has(block)) return false;
    const at = block % PAGE_BLOCKS;
    const number = (block - at) / PAGE_BLOCKS;
    const page = this.pages.get(number);
    if (page === undefined) return false;
    page.bits[at >> 3] = (page.bits[at >> 3] ?? 0) & ~(1 << (at & 7));
    if (--page.count === 0) this.pages.delete(number);
    this.count--;
    this.listed = undefined;
    return true;
  }

  /** Those of [from, to), ascending. */
  *within(from: number, to: number): Generator<number> {
    for (const number of [...this.pages.keys()].sort((a, b) => a - b)) {
      const first = number * PAGE_BLOCKS;
      const end = Math.min(to, first + PAGE_BLOCKS);
      for (let block = Math.max(from, first); block < end; block++) {
        if (block % 8 === 0 && this.pages.get(number)?.bits[(block - first) >> 3] === 0) block += 7;
        else if (this.has(block)) yield block;
      }
    }
  }

  /** The first hundred ranges of bytes, on a device of `sizeBytes`. */
  ranges(sizeBytes: number): readonly ByteRange[] {
    this.listed ??= rangesOf(this.within(0, blocksOf(sizeBytes)), sizeBytes);
    return this.listed;
  }
}

/** Memory that {@link BadBlocks} takes at most for a device of so many blocks. */
export function badBytesAtMost(blocks: number): number {
  return Math.ceil(blocks / PAGE_BLOCKS) * (PAGE_BLOCKS / 8);
}

/**
 * Reads [offset, offset + length), block by block where that fails as a whole, and returns the blocks that could not be read (their
 * bytes in `into` mean nothing). `offset` is that of a block. Rejects where the device has gone, has another size, or no block of
 * it can be read.
 *
 * `hasty`: each failing read may take seconds. After some failures in a row only the middle and the end of what is left are tried, and
 * where those fail as well, all of it counts as unreadable.
 */
export async function readAround(
  device: ReadDevice,
  into: Uint8Array,
  offset: number,
  length: number,
  hasty = false,
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
  const canReadAt = (at: number): Promise<boolean> =>
    canRead(device, into.subarray(at, Math.min(at + BLOCK_BYTES, into.byteLength)), offset + at);
  let inARow = 0;
  let isProbed = false;
  for (let at = 0; at < length; at += BLOCK_BYTES) {
    if (hasty && inARow === HASTY_BLOCKS && !isProbed) {
      isProbed = true;
      const left = blocksOf(length - at);
      const probes = [at + Math.floor(left / 2) * BLOCK_BYTES, at + (left - 1) * BLOCK_BYTES];
      let isAny = false;
      for (const probe of probes) isAny ||= await canReadAt(probe);
      if (!isAny) {
        for (; at < length; at += BLOCK_BYTES) bad.push((offset + at) / BLOCK_BYTES);
        break;
      }
    }
    if (await canReadAt(at)) inARow = 0;
    else {
      inARow++;
      bad.push((offset + at) / BLOCK_BYTES);
    }
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

/** Ascending blocks as ranges of bytes, the last of them not behind `sizeBytes`; the first hundred. */
function rangesOf(blocks: Iterable<number>, sizeBytes: number): readonly ByteRange[] {
  const ranges: ByteRange[] = [];
  let first = -1;
  let end = -1;
  const close = (): void => {
    if (first < 0) return;
    const offset = first * BLOCK_BYTES;
    ranges.push({ offset, length: Math.min(end * BLOCK_BYTES, sizeBytes) - offset });
  };
  for (const block of blocks) {
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
