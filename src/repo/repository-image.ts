/** The image of a volume at a commit, read straight from the packs. */
import { B2Error } from '../errors.js';
import { zeroViews } from '../image.js';
import type { Image, ImageExtent, Lending, Loan } from '../image.js';
import { BLOCK_BYTES, blocksOf, roundDown, roundUp } from '../units.js';
import type { PackCache } from './pack-reader.js';
import type { ChunkPart, ReadAhead } from './read-ahead.js';
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
/** Whoever reads on and on, or much, has the manifest looked at for as much at a time; so many of these are remembered. */
const WINDOW_BYTES = 2 * 1024 * 1024;
const WINDOWS = 32;
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
  /** The parts of chunks in window 0, 1, …: the image never changes. */
  private readonly windows = new Map<number, readonly ChunkPart[]>();
  private readonly loading = new Map<number, Promise<readonly ChunkPart[]>>();

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
    this.note(offset, into.byteLength);
    const end = offset + into.byteLength;
    for (let at = offset; at < end;) {
      const stop = Math.min(end, roundDown(at, BLOCK_BYTES) + RESOLVE_BLOCKS * BLOCK_BYTES);
      await this.readPart(into.subarray(at - offset, stop - offset), at);
      at = stop;
    }
  }

  lend(offset: number, length: number): Lending {
    this.check(offset, length);
    if (length === 0 || length > MAX_LOAN_BYTES) return undefined;
    const isLarge = length >= LARGE_PIECES * this.options.chunkBytes;
    const ahead = this.options.packs.readAhead(isLarge);
    if (ahead === undefined) return undefined;
    const parts = this.remembered(offset, offset + length);
    if (!isLarge) {
      // Only what is there: for the rest the reader asks anyway.
      const loan = parts === undefined ? undefined : ahead.lendAtOnce(parts);
      if (parts === undefined || loan === undefined) return undefined;
      this.note(offset, length);
      return withHoles(loan, parts, offset, length);
    }
    this.note(offset, length);
    if (parts !== undefined) return this.lendParts(ahead, parts, offset, length);
    return this.partsOf(offset, offset + length, true).then((found) =>
      this.lendParts(ahead, found, offset, length),
    );
  }

  private lendParts(
    ahead: ReadAhead,
    parts: readonly ChunkPart[],
    offset: number,
    length: number,
  ): Lending {
    if (parts.length > MAX_LOAN_PIECES) return undefined;
    const loan = ahead.lendAtOnce(parts) ?? ahead.lend(parts);
    if (!(loan instanceof Promise)) return withHoles(loan, parts, offset, length);
    return loan.then((late) => late && withHoles(late, parts, offset, length));
  }

  /** A read: what comes next is decoded meanwhile if that is known. */
  private note(offset: number, length: number): void {
    const next = this.streams.note(offset, length);
    if (next !== undefined) this.readAhead(next.from, next.to);
  }

  private async readPart(into: Uint8Array, offset: number): Promise<void> {
    if (into.byteLength === 0) return;
    const end = offset + into.byteLength;
    const isMuch =
      this.streams.isStream || into.byteLength >= LARGE_PIECES * this.options.chunkBytes;
    const pieces = this.remembered(offset, end) ?? (await this.partsOf(offset, end, isMuch));
    fillHoles(into, offset, pieces);
    const { packs } = this.options;
    const ahead = packs.readAhead(pieces.length >= LARGE_PIECES);
    if (ahead !== undefined && (pieces.length >= LARGE_PIECES || pieces.some((p) => ahead.has(p))))
      return ahead.read(pieces, into, offset, (piece) => this.readPiece(piece, into, offset));
    let next = 0;
    const worker = async (): Promise<void> => {
      while (next < pieces.length) {
        const piece = pieces[next++];
        if (piece !== undefined) await this.readPiece(piece, into, offset);
      }
    };
    await Promise.all(Array.from({ length: Math.min(PARALLEL_FRAMES, pieces.length) }, worker));
  }

  /** Decodes what is at [from, to) while who wants it does something else. */
  private readAhead(from: number, to: number): void {
    const ahead = this.options.packs.readAhead(true);
    if (ahead === undefined) return;
    const done: Promise<void> = this.partsOf(from, to, true)
      .then((pieces) => ahead.prefetch(pieces))
      .catch(() => undefined) // the read will say it
      .finally(() => this.prefetches.delete(done));
    this.prefetches.add(done);
  }

  /** {@link partsOf} where the manifest need not be looked at. */
  private remembered(offset: number, end: number): ChunkPart[] | undefined {
    const parts: ChunkPart[] = [];
    for (let w = Math.floor(offset / WINDOW_BYTES); w * WINDOW_BYTES < end; w++) {
      const window = this.windows.get(w);
      if (window === undefined) return undefined;
      addClipped(parts, window, offset, end);
    }
    return parts;
  }

  /** The parts of chunks that make up [offset, end), ascending; the rest of it is holes. `isMuch`: whole windows are looked up and remembered. */
  private async partsOf(offset: number, end: number, isMuch: boolean): Promise<ChunkPart[]> {
    if (!isMuch) return this.resolveParts(offset, end);
    const parts: ChunkPart[] = [];
    for (let w = Math.floor(offset / WINDOW_BYTES); w * WINDOW_BYTES < end; w++)
      addClipped(parts, this.windows.get(w) ?? (await this.loadWindow(w)), offset, end);
    return parts;
  }

  private loadWindow(number: number): Promise<readonly ChunkPart[]> {
    const under = this.loading.get(number);
    if (under !== undefined) return under;
    const from = number * WINDOW_BYTES;
    const loading = this.resolveParts(from, Math.min(this.sizeBytes, from + WINDOW_BYTES))
      .then((parts) => {
        for (const oldest of this.windows.keys()) {
          if (this.windows.size < WINDOWS) break;
          this.windows.delete(oldest);
        }
        this.windows.set(number, parts);
        return parts;
      })
      .finally(() => this.loading.delete(number));
    this.loading.set(number, loading);
    return loading;
  }

  private async resolveParts(offset: number, end: number): Promise<ChunkPart[]> {
    const extents = await this.options.resolver.resolve(
      Math.floor(offset / BLOCK_BYTES),
      blocksOf(end),
    );
    const pieces: ChunkPart[] = [];
    for (const e of extents) {
      const from = Math.max(offset, e.block * BLOCK_BYTES);
      const to = Math.min(end, (e.block + e.count) * BLOCK_BYTES);
      if (from < to && e.packId !== undefined) this.addPieces(pieces, e, e.packId, from, to);
    }
    return pieces;
  }

  private addPieces(
    pieces: ChunkPart[],
    e: PlacedExtent,
    packId: string,
    from: number,
    to: number,
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
      const frame = e.frame + chunk;
      pieces.push({
        key: `${packId}/${frame}`,
        packId,
        frame,
        sub: e.sub,
        from: inChunk,
        at,
        length,
      });
      at += length;
    }
  }

  /** `into` is what is read from `offset`. */
  private async readPiece(p: ChunkPart, into: Uint8Array, offset: number): Promise<void> {
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
    const at = p.at - offset;
    into.set(body.subarray(start + p.from, start + p.from + have), at);
    into.fill(0, at + have, at + p.length);
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

/** Appends what `parts` (ascending) have of [from, to). */
function addClipped(
  into: ChunkPart[],
  parts: readonly ChunkPart[],
  from: number,
  to: number,
): void {
  let low = 0;
  for (let high = parts.length; low < high;) {
    const middle = (low + high) >>> 1;
    const part = parts[middle];
    if (part !== undefined && part.at + part.length <= from) low = middle + 1;
    else high = middle;
  }
  for (let part = parts[low]; part !== undefined && part.at < to; part = parts[++low]) {
    const begin = Math.max(from, part.at);
    const end = Math.min(to, part.at + part.length);
    if (end - begin === part.length) into.push(part);
    else into.push({ ...part, from: part.from + begin - part.at, at: begin, length: end - begin });
  }
}

/** Zeros in what is read from `offset` where there are no `parts`. */
function fillHoles(into: Uint8Array, offset: number, parts: readonly ChunkPart[]): void {
  let at = 0;
  for (const part of parts) {
    if (part.at - offset > at) into.fill(0, at, part.at - offset);
    at = part.at - offset + part.length;
  }
  into.fill(0, at);
}

/** The loan of `parts` with the holes between them. */
function withHoles(
  loan: Loan | undefined,
  parts: readonly ChunkPart[],
  offset: number,
  length: number,
): Loan | undefined {
  if (loan === undefined) return undefined;
  const views: Uint8Array[] = [];
  let at = offset;
  for (const [i, part] of parts.entries()) {
    const view = loan.views[i];
    if (view === undefined) throw new Error('a loan of fewer parts than were asked for');
    if (part.at > at) views.push(...zeroViews(part.at - at));
    views.push(view);
    at = part.at + part.length;
  }
  if (at < offset + length) views.push(...zeroViews(offset + length - at));
  return { views, release: () => loan.release() };
}
