/** Puts what live capture read into a repository: chunks, holes, one commit. */
import { isKind, type B2Error } from '../errors.js';
import { STRIPE_BLOCKS } from '../format/extent.js';
import type { VolumeWriter, PlacedExtent } from '../repo/volume-writer.js';
import { BLOCK_BYTES, blocksOf } from '../units.js';
import type { CaptureCommit, CaptureSink } from './live-capture.js';
import type { StagedBlocks } from './staging.js';

export interface WriterSinkOptions {
  /** Claims the volume. Called at the first commit, and again after one that failed. */
  readonly open: () => Promise<VolumeWriter>;
  /** Said in every commit: source, host, device. */
  readonly facts: Readonly<Record<string, unknown>>;
  /** Hears of failures that cost nothing (a pack that could not be sealed; it is read forward next time). */
  readonly warn: (error: B2Error) => void;
}

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
 * Commits to a volume through its one writer. Pieces smaller than a chunk share frames of up to a chunk's bytes, compressed and
 * sealed together; neighbouring holes become one extent. When a commit fails the writer is given up, and the volume claimed anew at the next; not after `lost-claim`: then every commit
 * rejects with it.
 */
export class WriterSink implements CaptureSink, AsyncDisposable {
  private readonly options: WriterSinkOptions;
  private writer: VolumeWriter | undefined;
  /** Another writer has taken over: taking the volume back would only make the two fight. */
  private lost: B2Error | undefined;

  constructor(options: WriterSinkOptions) {
    this.options = options;
  }

  async commit(commit: CaptureCommit): Promise<{ seq: number; storedBytes: number }> {
    if (this.lost !== undefined) throw this.lost;
    const writer = (this.writer ??= await this.options.open());
    try {
      const pack = await writer.openPack();
      const before = pack.sizeBytes;
      const extents = await this.store(writer, commit);
      const done = await writer.commit({
        pointClass: commit.pointClass,
        coverage: commit.coverage,
        full: writer.tipSeq === 0,
        instantNs: commit.instantNs,
        startedNs: commit.startedNs,
        sizeBytes: commit.sizeBytes,
        extents,
        storedBytes: pack.sizeBytes - before,
        facts: this.options.facts,
      });
      const storedBytes = pack.sizeBytes - before;
      if (writer.wantsFinish) await this.finish(writer);
      return { seq: done.seq, storedBytes };
    } catch (error) {
      if (isKind(error, 'lost-claim')) this.lost = error;
      await this.giveUp(writer);
      throw error;
    }
  }

  /** Seals the pack. The commit is acknowledged already and lives without that. */
  private async finish(writer: VolumeWriter): Promise<void> {
    try {
      await writer.finishPack();
    } catch (error) {
      if (!isKind(error, 'io', 'no-space')) throw error;
      this.options.warn(error);
      await this.giveUp(writer);
    }
  }

  private async giveUp(writer: VolumeWriter): Promise<void> {
    this.writer = undefined;
    await writer.close(this.options.warn).catch(() => undefined); // the error at hand is the one to report
  }

  /** Seals the open pack. */
  async close(): Promise<void> {
    const { writer } = this;
    this.writer = undefined;
    await writer?.close(this.options.warn);
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.close();
  }

  private async store(writer: VolumeWriter, commit: CaptureCommit): Promise<PlacedExtent[]> {
    const { content } = commit;
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
    for (const piece of piecesOf(content, blocksOf(repo.chunkBytes), blocksOf(commit.sizeBytes))) {
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
