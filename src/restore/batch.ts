/**
 * The plan of a restore: the extents of an image cut into pieces (each a part of one chunk), batch by batch in the order
 * of the target, with the order of the packs beside it. Typed arrays in shared memory: every thread works on the same
 * batch, and the memory has a bound that depends neither on the image's size nor on how scattered it is.
 */
import { HASH_BYTES } from '../hash.js';
import { BLOCK_BYTES } from '../units.js';

/** Pieces of one batch at most: 32 GiB of 64 KiB chunks. A batch takes 57 bytes a piece, 29 MiB in all; two are alive at a time. */
export const BATCH_PIECES = 512 * 1024;

/** `count` blocks of an image from `block`; what src/repo/blockmap.ts resolves has this form. */
export interface SourceExtent {
  readonly block: number;
  readonly count: number;
  /** Undefined: the blocks are zeros and the other fields mean nothing. */
  readonly packId: string | undefined;
  readonly frame: number;
  readonly sub: number;
  /** As in FORMAT.md 5.4; `skip + count` beyond a chunk makes it a run. */
  readonly skip: number;
}

/** States of a piece: bits of {@link Batch.state}. */
export const PieceState = {
  /** `hash` and `bytes` say what the target must hold. */
  known: 1,
  /** To be written. */
  wanted: 2,
  /** Its data cannot be had; the target gets zeros there (`bytes` is 0). */
  damaged: 4,
  /** The target was read and holds something else. */
  differs: 8,
} as const;

/**
 * One batch: the bytes [startBytes, endBytes) of the image. What no piece covers is zeros. Crosses threads by
 * structured clone; the arrays are shared, not copied.
 */
export interface Batch {
  readonly startBytes: number;
  readonly endBytes: number;
  readonly imageBytes: number;
  readonly count: number;
  readonly packIds: readonly string[];
  /** First block of each piece, ascending. */
  readonly block: Float64Array;
  /** Blocks of each piece. */
  readonly blocks: Uint16Array;
  /** Index in `packIds`. */
  readonly pack: Uint32Array;
  readonly frame: Uint32Array;
  readonly sub: Uint16Array;
  readonly skip: Uint16Array;
  /** Bytes of data in the piece once known; the rest of its blocks, up to the image's end, is zeros. */
  readonly bytes: Uint32Array;
  /** Keyed hash of those bytes, 32 a piece. */
  readonly hash: Uint8Array;
  readonly state: Uint8Array;
  /** Pieces grouped by pack: those of pack p are order[packStart[p]] to order[packStart[p + 1] − 1]. */
  readonly order: Uint32Array;
  readonly packStart: Uint32Array;
  /** [0]: the next pack that no thread has taken. */
  readonly control: Int32Array;
}

/** Offset of a piece in the image. */
export function pieceOffset(batch: Batch, piece: number): number {
  return (batch.block[piece] ?? 0) * BLOCK_BYTES;
}

/** Bytes that a piece covers of the image. */
export function pieceLength(batch: Batch, piece: number): number {
  return Math.min(
    (batch.blocks[piece] ?? 0) * BLOCK_BYTES,
    batch.imageBytes - pieceOffset(batch, piece),
  );
}

interface Arrays {
  readonly block: Float64Array;
  readonly blocks: Uint16Array;
  readonly pack: Uint32Array;
  readonly frame: Uint32Array;
  readonly sub: Uint16Array;
  readonly skip: Uint16Array;
  readonly bytes: Uint32Array;
  readonly hash: Uint8Array;
  readonly state: Uint8Array;
  readonly order: Uint32Array;
}

function allocate(pieces: number): Arrays {
  const shared = (bytes: number): SharedArrayBuffer => new SharedArrayBuffer(bytes * pieces);
  return {
    block: new Float64Array(shared(8)),
    blocks: new Uint16Array(shared(2)),
    pack: new Uint32Array(shared(4)),
    frame: new Uint32Array(shared(4)),
    sub: new Uint16Array(shared(2)),
    skip: new Uint16Array(shared(2)),
    bytes: new Uint32Array(shared(4)),
    hash: new Uint8Array(shared(HASH_BYTES)),
    state: new Uint8Array(shared(1)),
    order: new Uint32Array(shared(4)),
  };
}

export interface BatchOptions {
  readonly imageBytes: number;
  readonly chunkBytes: number;
  /** Default {@link BATCH_PIECES}. */
  readonly pieces?: number;
}

/**
 * Cuts `extents` (lists that together ascend without overlap; gaps are zeros) into batches that together cover the image without
 * gaps. Memory is used again: a batch is dead when the one after the next is asked for.
 */
export async function* planBatches(
  extents: AsyncIterable<readonly SourceExtent[]>,
  options: BatchOptions,
): AsyncGenerator<Batch, void> {
  const { imageBytes } = options;
  const capacity = options.pieces ?? BATCH_PIECES;
  const chunkBlocks = options.chunkBytes / BLOCK_BYTES;
  const imageBlocks = Math.ceil(imageBytes / BLOCK_BYTES);
  const memory: Arrays[] = [];
  let turn = 0;
  let arrays = (memory[0] = allocate(capacity));
  let packs = new Map<string, number>();
  let count = 0;
  let startBlock = 0;
  let reached = 0;

  const finish = (endBlock: number): Batch => {
    const packIds = [...packs.keys()];
    const packStart = new Uint32Array(new SharedArrayBuffer(4 * (packIds.length + 1)));
    for (let i = 0; i < count; i++) {
      const next = (arrays.pack[i] ?? 0) + 1;
      packStart[next] = (packStart[next] ?? 0) + 1;
    }
    for (let p = 1; p < packStart.length; p++)
      packStart[p] = (packStart[p] ?? 0) + (packStart[p - 1] ?? 0);
    const at = packStart.slice();
    for (let i = 0; i < count; i++) {
      const p = arrays.pack[i] ?? 0;
      const to = at[p] ?? 0;
      arrays.order[to] = i;
      at[p] = to + 1;
    }
    const batch: Batch = {
      ...arrays,
      startBytes: startBlock * BLOCK_BYTES,
      endBytes: Math.min(endBlock * BLOCK_BYTES, imageBytes),
      imageBytes,
      count,
      packIds,
      packStart,
      control: new Int32Array(new SharedArrayBuffer(4)),
    };
    startBlock = endBlock;
    turn ^= 1;
    arrays = memory[turn] ??= allocate(capacity);
    packs = new Map();
    count = 0;
    return batch;
  };

  for await (const list of extents)
    for (const extent of list) {
      if (extent.block < reached) {
        throw new Error(`extents overlap or do not ascend at block ${extent.block}`);
      }
      const end = Math.min(extent.block + extent.count, imageBlocks);
      reached = Math.max(reached, end);
      if (extent.packId === undefined || extent.block >= imageBlocks) continue;
      const isRun = extent.skip + extent.count > chunkBlocks;
      let { block, frame, skip } = extent;
      while (block < end) {
        if (count === capacity) yield finish(block);
        let pack = packs.get(extent.packId);
        if (pack === undefined) {
          pack = packs.size;
          packs.set(extent.packId, pack);
        }
        const blocks = Math.min(end - block, isRun ? chunkBlocks - skip : end - block);
        arrays.block[count] = block;
        arrays.blocks[count] = blocks;
        arrays.pack[count] = pack;
        arrays.frame[count] = frame;
        arrays.sub[count] = extent.sub;
        arrays.skip[count] = skip;
        arrays.bytes[count] = 0;
        arrays.state[count] = 0;
        count++;
        block += blocks;
        skip = 0;
        frame++;
      }
    }
  if (imageBlocks > startBlock) yield finish(imageBlocks);
}
