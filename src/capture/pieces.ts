/** Blocks become chunks and holes of a pack. */
import { STRIPE_BLOCKS } from '../format/extent.js';
import type { PlacedExtent, VolumeWriter } from '../repo/volume-writer.js';
import { BLOCK_BYTES, blocksOf } from '../units.js';
import type { StagedBlocks } from './staging.js';

/** A run of blocks that is stored or is zeros. */
interface Piece {
  /** Index of the first block in the staged list. */
  readonly index: number;
  readonly count: number;
  readonly isHole: boolean;
  /** The whole window of a chunk: stored alone in its frame, as a scan does, so that both make the same chunk. */
  readonly isWhole: boolean;
}

const ZEROS = Buffer.alloc(BLOCK_BYTES);

function isZero(bytes: Buffer): boolean {
  return bytes.equals(bytes.length === BLOCK_BYTES ? ZEROS : ZEROS.subarray(0, bytes.length));
}

/**
 * Cuts staged blocks into pieces: no piece crosses a window of `chunkBlocks`; zeros become holes, except inside whole windows
 * that hold other data too. Ascending; together they are all the blocks.
 */
export function piecesOf(staged: StagedBlocks, chunkBlocks: number, deviceBlocks: number): Piece[] {
  const { blocks } = staged;
  const pieces: Piece[] = [];
  for (let i = 0; i < blocks.length;) {
    const first = blocks[i] ?? 0;
    const windowEnd = Math.min(deviceBlocks, (Math.floor(first / chunkBlocks) + 1) * chunkBlocks);
    let n = 1;
    while (first + n < windowEnd && blocks[i + n] === first + n) n++;
    const zero: boolean[] = [];
    for (let k = 0; k < n; k++) zero.push(isZero(staged.bytesAt(i + k)));
    const isWhole = first % chunkBlocks === 0 && first + n === windowEnd;
    if (isWhole && zero.includes(false)) {
      pieces.push({ index: i, count: n, isHole: false, isWhole: true });
    } else {
      for (let k = 0; k < n;) {
        let m = k + 1;
        while (m < n && zero[m] === zero[k]) m++;
        pieces.push({ index: i + k, count: m - k, isHole: zero[k] === true, isWhole: false });
        k = m;
      }
    }
    i += n;
  }
  return pieces;
}

/**
 * Adds the blocks of a device of `sizeBytes` to the writer's open pack; returns where they are, ascending. Pieces smaller than a
 * chunk share frames of up to a chunk's bytes, compressed and sealed together; neighbouring holes become one extent. Nothing is durable
 * before the commit that names the extents.
 */
export async function storeBlocks(
  writer: VolumeWriter,
  content: StagedBlocks,
  sizeBytes: number,
): Promise<PlacedExtent[]> {
  const { repo } = writer;
  const pack = await writer.openPack();
  const extents: PlacedExtent[] = [];
  let shared: { bytes: Buffer; id: Buffer; block: number; count: number }[] = [];
  let sharedBytes = 0;
  const flushShared = async (): Promise<void> => {
    if (shared.length === 0) return;
    await pack.flush();
    const frame = pack.addChunks(shared);
    shared.forEach((s, sub) => {
      extents.push({ block: s.block, count: s.count, packId: pack.packId, frame, sub, skip: 0 });
    });
    shared = [];
    sharedBytes = 0;
  };
  for (const piece of piecesOf(content, blocksOf(repo.chunkBytes), blocksOf(sizeBytes))) {
    const block = content.blocks[piece.index] ?? 0;
    if (piece.isHole) {
      addHole(extents, block, piece.count);
      continue;
    }
    const parts: Buffer[] = [];
    for (let k = 0; k < piece.count; k++) parts.push(content.bytesAt(piece.index + k));
    const [only] = parts;
    const bytes = parts.length === 1 && only !== undefined ? only : Buffer.concat(parts);
    const id = repo.keys.chunkId(bytes);
    if (piece.isWhole) {
      await pack.flush();
      const frame = pack.addChunk(bytes, id);
      extents.push({ block, count: piece.count, packId: pack.packId, frame, sub: 0, skip: 0 });
      continue;
    }
    if (sharedBytes + bytes.length > repo.chunkBytes) await flushShared();
    shared.push({ bytes, id, block, count: piece.count });
    sharedBytes += bytes.length;
  }
  await flushShared();
  return extents.sort((a, b) => a.block - b.block);
}

/** Adds a hole, to the one before it where they touch and are in one stripe. */
function addHole(extents: PlacedExtent[], block: number, count: number): void {
  const last = extents.at(-1);
  if (
    last !== undefined &&
    last.packId === undefined &&
    last.block + last.count === block &&
    Math.floor(last.block / STRIPE_BLOCKS) === Math.floor(block / STRIPE_BLOCKS)
  ) {
    extents[extents.length - 1] = { ...last, count: last.count + count };
    return;
  }
  extents.push({ block, count, packId: undefined, frame: 0, sub: 0, skip: 0 });
}

/**
 * `extents` (ascending) and, where the device has grown since `oldBytes`, the block in which its old end lay: a commit must name it
 * (FORMAT.md section 8). As zeros, so only for a commit that is no point, and while that block is still to be read.
 */
export function namingOldEnd(
  extents: readonly PlacedExtent[],
  oldBytes: number | undefined,
  sizeBytes: number,
): readonly PlacedExtent[] {
  if (oldBytes === undefined || sizeBytes <= oldBytes || oldBytes % BLOCK_BYTES === 0)
    return extents;
  const block = Math.floor(oldBytes / BLOCK_BYTES);
  if (extents.some((e) => e.block <= block && block < e.block + e.count)) return extents;
  const at = extents.findIndex((e) => e.block > block);
  const hole = { block, count: 1, packId: undefined, frame: 0, sub: 0, skip: 0 };
  return extents.toSpliced(at < 0 ? extents.length : at, 0, hole);
}
