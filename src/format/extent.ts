/** Extent records (FORMAT.md 5.4): what blocks a commit replaces and where their data lie. */
import { damaged, readU64, writeU64 } from './bytes.js';

/** Bytes of one record. */
export const EXTENT_RECORD_BYTES = 28;
/** No record crosses a multiple of this many blocks (1 GiB). */
export const STRIPE_BLOCKS = 262_144;
/** The pack index that says "these blocks are zeros". */
export const HOLE = 0xffff_ffff;

/**
 * `count` blocks from `block`. If `pack` is {@link HOLE} they are zeros; else they lie in the pack with that index in the
 * pack table at hand, from block `skip` of chunk `sub` of frame `frame` on. Where `skip + count` is more than the blocks
 * of a full chunk the record is a run: `sub` is 0 and the next full chunks are in the next frames.
 */
export interface Extent {
  readonly block: number;
  readonly count: number;
  /** Sequence number minus the base of the list that the record is in. */
  readonly seq: number;
  readonly pack: number;
  readonly frame: number;
  readonly sub: number;
  readonly skip: number;
}

export function encodeExtent(e: Extent, into: Buffer, offset: number): void {
  const stripeEnd = Math.floor(e.block / STRIPE_BLOCKS) * STRIPE_BLOCKS + STRIPE_BLOCKS;
  if (e.count < 1 || e.block + e.count > stripeEnd) {
    throw new RangeError(`extent record crosses a stripe: block ${e.block}, count ${e.count}`);
  }
  writeU64(into, e.block, offset);
  into.writeUInt32LE(e.count, offset + 8);
  into.writeUInt32LE(e.seq, offset + 12);
  into.writeUInt32LE(e.pack, offset + 16);
  into.writeUInt32LE(e.frame, offset + 20);
  into.writeUInt16LE(e.sub, offset + 24);
  into.writeUInt16LE(e.skip, offset + 26);
}

/** Decodes one record and checks what can be checked without its pack table. `what` names the object in errors. */
export function decodeExtent(buf: Buffer, offset: number, what: string): Extent {
  const block = readU64(buf, offset, what);
  const count = buf.readUInt32LE(offset + 8);
  const pack = buf.readUInt32LE(offset + 16);
  const frame = buf.readUInt32LE(offset + 20);
  const sub = buf.readUInt16LE(offset + 24);
  const skip = buf.readUInt16LE(offset + 26);
  if (count < 1 || (block % STRIPE_BLOCKS) + count > STRIPE_BLOCKS) {
    throw damaged(
      what,
      offset,
      `extent of ${count} blocks at block ${block} crosses a stripe or is empty`,
    );
  }
  if (pack === HOLE && (frame | sub | skip) !== 0) {
    throw damaged(what, offset, 'a hole with a place');
  }
  return { block, count, seq: buf.readUInt32LE(offset + 12), pack, frame, sub, skip };
}

/** Encodes a list into one buffer. */
export function encodeExtents(list: readonly Extent[]): Buffer {
  const out = Buffer.allocUnsafe(list.length * EXTENT_RECORD_BYTES);
  list.forEach((e, i) => {
    encodeExtent(e, out, i * EXTENT_RECORD_BYTES);
  });
  return out;
}

/**
 * The part of `e` that lies in [from, to) blocks, with `frame` and `skip` moved along; `chunkBlocks` is the repository's chunk
 * size in blocks. The ranges must overlap.
 */
export function clipExtent(e: Extent, from: number, to: number, chunkBlocks: number): Extent {
  const start = Math.max(from, e.block);
  const end = Math.min(to, e.block + e.count);
  if (start >= end) throw new RangeError('clipExtent: no overlap');
  if (start === e.block && end === e.block + e.count) return e;
  const lead = start - e.block;
  if (e.pack === HOLE) return { ...e, block: start, count: end - start };
  if (e.skip + e.count <= chunkBlocks) {
    return { ...e, block: start, count: end - start, skip: e.skip + lead };
  }
  const at = e.skip + lead;
  return {
    ...e,
    block: start,
    count: end - start,
    frame: e.frame + Math.floor(at / chunkBlocks),
    skip: at % chunkBlocks,
  };
}
