/** The image of a volume at a commit, read straight from the packs. */
import { B2Error } from '../errors.js';
import type { Image, ImageExtent, Loan } from '../image.js';
import { BLOCK_BYTES, blocksOf, roundDown, roundUp } from '../units.js';
import type { PackCache } from './pack-reader.js';
import type { ChunkPart } from './read-ahead.js';
import { Streams } from './streams.js';
import type { PlacedExtent } from './volume-writer.js';

/** Where the blocks of an image lie. */
export interface BlockResolver {
  /** Extents that cover [fromBlock, toBlock), ascending, without gaps or overlap, holes included. */
  resolve(fromBlock: number, toBlock: number): Promise<readonly PlacedExtent[]>;
}

/** Requests of as many pieces are worth asking other threads. */
const LARGE_PIECES = 4;
/** What is lent at most, in how many pieces. */
const MAX_LOAN_BYTES = 1024 * 1024;
const MAX_LOAN_PIECES = 64;
const ZEROS = new Uint8Array(MAX_LOAN_BYTES);
/** Frames read at once for one request. */
const PARALLEL_FRAMES = 8;
/** Blocks resolved at once (1 GiB): bounds memory for requests of any size. */
const RESOLVE_BLOCKS = 262_144;

export interface RepositoryImageOptions {
  readonly resolver: BlockResolver;
  readonly packs: PackCache;
  readonly chunkBytes: number;
  readonly sizeBytes: number;
  readonly logicalBlockBytes: number;
  /** Called by `close`. */
  readonly onClose?: () => Promise<void>;
}

export class RepositoryImage implements Image {
  readonly sizeBytes: number;
  readonly logicalBlockBytes: number;
  private readonly options: RepositoryImageOptions;
  private readonly chunkBlocks: number;
  private readonly streams: Streams;
  /** What is being read ahead. */
  private readonly prefetches = new Set<Promise<void>>();

  constructor(options: RepositoryImageOptions) {
    this.options = options;
    this.sizeBytes = options.sizeBytes;
    this.logicalBlockBytes = options.logicalBlockBytes;
    this.chunkBlocks = options.chunkBytes / BLOCK_BYTES;
    this.streams = new Streams(options.sizeBytes);
  }

  private check(offset: number, length: number): void {
    if (
      !Number.isSafeInteger(offset) ||
      !Number.isSafeInteger(length) ||
      offset < 0 ||
      length < 0 ||
      offset + length > this.sizeBytes
    ) {
      throw new RangeError(
        `[${offset}, +${length}) is not within the image of ${this.sizeBytes} bytes`,
      );
    }
  }

  async read(into: Uint8Array, offset: number): Promise<void> {
    this.check(offset, into.byteLength);
    const ahead = this.streams.note(offset, into.byteLength);
    if (ahead !== undefined) this.readAhead(ahead.from, ahead.to);
    const end = offset + into.byteLength;
    for (let at = offset; at < end;) {
      const stop = Math.min(end, roundDown(at, BLOCK_BYTES) + RESOLVE_BLOCKS * BLOCK_BYTES);
      await this.readPart(into.subarray(at - offset, stop - offset), at);
      at = stop;
    }
  }

  async lend(offset: number, length: number): Promise<Loan | undefined> {
    this.check(offset, length);
    if (length < LARGE_PIECES * this.options.chunkBytes || length > MAX_LOAN_BYTES)
      return undefined;
    const ahead = this.options.packs.readAhead(true);
    if (ahead === undefined) return undefined;
    const next = this.streams.note(offset, length);
    if (next !== undefined) this.readAhead(next.from, next.to);
    const pieces = await this.piecesOf(offset, offset + length, undefined);
    if (pieces.length > MAX_LOAN_PIECES) return undefined;
    const loan = await ahead.lend(pieces);
    if (loan === undefined) return undefined;
    const views: Uint8Array[] = [];
    let at = 0;
    pieces.forEach((piece, i) => {
      if (piece.at > at) views.push(ZEROS.subarray(0, piece.at - at));
      views.push(loan.views[i] ?? ZEROS.subarray(0, 0));
      at = piece.at + piece.length;
    });
    if (at < length) views.push(ZEROS.subarray(0, length - at));
    return { views, release: () => loan.release() };
  }

  private async readPart(into: Uint8Array, offset: number): Promise<void> {
    if (into.byteLength === 0) return;
    const end = offset + into.byteLength;
    const pieces = await this.piecesOf(offset, end, into);
    const { packs } = this.options;
    const ahead = packs.readAhead(pieces.length >= LARGE_PIECES);
    if (ahead !== undefined && (pieces.length >= LARGE_PIECES || pieces.some((p) => ahead.has(p))))
      return ahead.read(pieces, into, (piece) => this.readPiece(piece, into));
    let next = 0;
    const worker = async (): Promise<void> => {
      while (next < pieces.length) {
        const piece = pieces[next++];
        if (piece !== undefined) await this.readPiece(piece, into);
      }
    };
    await Promise.all(Array.from({ length: Math.min(PARALLEL_FRAMES, pieces.length) }, worker));
  }

  /** Decodes what is at [from, to) while who wants it does something else. */
  private readAhead(from: number, to: number): void {
    const ahead = this.options.packs.readAhead(true);
    if (ahead === undefined) return;
    const done: Promise<void> = this.piecesOf(from, to, undefined)
      .then((pieces) => ahead.prefetch(pieces))
      .catch(() => undefined) // the read will say it
      .finally(() => this.prefetches.delete(done));
    this.prefetches.add(done);
  }

  /** The pieces of chunks that make up [offset, end); holes are filled into `into`. */
  private async piecesOf(
    offset: number,
    end: number,
    into: Uint8Array | undefined,
  ): Promise<ChunkPart[]> {
    const extents = await this.options.resolver.resolve(
      Math.floor(offset / BLOCK_BYTES),
      blocksOf(end),
    );
    const pieces: ChunkPart[] = [];
    for (const e of extents) {
      const from = Math.max(offset, e.block * BLOCK_BYTES);
      const to = Math.min(end, (e.block + e.count) * BLOCK_BYTES);
      if (from >= to) continue;
      if (e.packId === undefined) into?.fill(0, from - offset, to - offset);
      else this.addPieces(pieces, e, e.packId, from, to, offset);
    }
    return pieces;
  }

  private addPieces(
    pieces: ChunkPart[],
    e: PlacedExtent,
    packId: string,
    from: number,
    to: number,
    offset: number,
  ): void {
    const run = e.skip + e.count > this.chunkBlocks;
    const chunkBytes = this.options.chunkBytes;
    // Byte position counted from the start of the first chunk.
    const base = e.block * BLOCK_BYTES - e.skip * BLOCK_BYTES;
    for (let at = from; at < to;) {
      const inRun = at - base;
      const chunk = run ? Math.floor(inRun / chunkBytes) : 0;
      const inChunk = run ? inRun % chunkBytes : inRun;
      const length = run ? Math.min(to - at, chunkBytes - inChunk) : to - at;
      pieces.push({
        packId,
        frame: e.frame + chunk,
        sub: e.sub,
        from: inChunk,
        at: at - offset,
        length,
      });
      at += length;
    }
  }

  private async readPiece(p: ChunkPart, into: Uint8Array): Promise<void> {
    const { entries, body, starts } = await this.options.packs.chunksOf(p.packId, p.frame);
    const entry = entries[p.sub];
    const start = starts[p.sub];
    if (entry === undefined || start === undefined) {
      throw new B2Error('damaged', `pack ${p.packId}, frame ${p.frame}: it has no chunk ${p.sub}`);
    }
    const have = Math.max(0, Math.min(p.length, entry.lengthBytes - p.from));
    // Only the chunk that ends the device is short, and only within its last block.
    if (p.length - have >= BLOCK_BYTES) {
      throw new B2Error(
        'damaged',
        `pack ${p.packId}, frame ${p.frame}: chunk ${p.sub} is shorter than the manifest says`,
      );
    }
    into.set(body.subarray(start + p.from, start + p.from + have), p.at);
    into.fill(0, p.at + have, p.at + p.length);
  }

  async extents(
    offset: number,
    length: number,
    limit = Number.POSITIVE_INFINITY,
  ): Promise<readonly ImageExtent[]> {
    this.check(offset, length);
    const list: { offset: number; length: number; hole: boolean }[] = [];
    const end = offset + length;
    for (let at = offset; at < end;) {
      const stop = Math.min(end, roundUp(at + 1, BLOCK_BYTES) + RESOLVE_BLOCKS * BLOCK_BYTES);
      const extents = await this.options.resolver.resolve(
        Math.floor(at / BLOCK_BYTES),
        blocksOf(stop),
      );
      for (const e of extents) {
        const from = Math.max(at, e.block * BLOCK_BYTES);
        const to = Math.min(stop, (e.block + e.count) * BLOCK_BYTES);
        if (from >= to) continue;
        const hole = e.packId === undefined;
        const last = list.at(-1);
        if (last !== undefined && last.hole === hole) {
          last.length += to - from;
        } else {
          if (list.length >= limit) return list;
          list.push({ offset: from, length: to - from, hole });
        }
      }
      at = stop;
    }
    return list;
  }

  async close(): Promise<void> {
    await Promise.all(this.prefetches);
    await this.options.onClose?.();
  }
}
