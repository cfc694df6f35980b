/** BlockMap: for every block of a volume at one commit, where its data lie (FORMAT.md section 8). */
import { HOLE, STRIPE_BLOCKS } from '../format/extent.js';
import type { CommitRecord, ExtentPage } from '../format/segment.js';
import { blocksOf } from '../units.js';
import { pointSources, type HistorySources } from './segments/point.js';
import {
  firstPageFor,
  placeAt,
  placesJoin,
  Sweep,
  visiblePieces,
  type Piece,
  type Place,
  type SourceWindow,
} from './segments/records.js';
import type { SegmentSource } from './segments/source.js';

export type { JournalCommit } from './segments/source.js';
export type { HistorySources } from './segments/point.js';

/** `count` blocks from `block`, and where they lie: as an extent record says it (FORMAT.md 5.4), with the pack by id. */
export interface ResolvedExtent {
  readonly block: number;
  readonly count: number;
  /** 32 hex digits; undefined: the blocks are zeros, and the rest is 0. */
  readonly packId: string | undefined;
  readonly frame: number;
  readonly sub: number;
  readonly skip: number;
}

/** Ids of packs remembered at a time while scanning. */
const KNOWN_PACKS = 65_536;
/** Pages of one hot block are worth a binary search from this many on. */
const HOT_PAGES = 4;
/** Pages asked for at a time. */
const READ_AHEAD = 4;

/**
 * Immutable. Reads through the sources it was opened on, which must stay open as long as it is used. Calls may run at the same
 * time.
 */
export class BlockMap {
  /** The commit whose state this is. */
  readonly commit: CommitRecord;
  /** Blocks of the device; the last may be short. */
  readonly blocks: number;
  readonly #windows: readonly SourceWindow[];
  readonly #chunkBlocks: number;

  private constructor(windows: readonly SourceWindow[], commit: CommitRecord, chunkBlocks: number) {
    this.commit = commit;
    this.blocks = blocksOf(commit.sizeBytes);
    this.#windows = windows;
    this.#chunkBlocks = chunkBlocks;
  }

  /**
   * The state at commit `seq`. `chunkBlocks` is chunkBytes / 4096 of the repository. Reads one commits page. Kind `not-found` if there is no
   * such commit, `damaged` if commits that it needs are missing.
   */
  static async open(history: HistorySources, seq: number, chunkBlocks: number): Promise<BlockMap> {
    const { windows, commit } = await pointSources(history, seq);
    return new BlockMap(windows, commit, chunkBlocks);
  }

  get seq(): number {
    return this.commit.seq;
  }

  /**
   * Blocks [from, to) as ascending extents without gaps or overlap; neighbours that can be one are one. Made for ranges up to some GiB: reads
   * the pages that can hold records of the range, newest segment first, and stops when every block is accounted for. The range
   * must lie within the device (RangeError).
   */
  async resolve(from: number, to: number): Promise<ResolvedExtent[]> {
    this.#check(from, to);
    let gaps: Gap[] = from < to ? [{ from, to }] : [];
    const found: Piece[] = [];
    for (const window of this.#windows) {
      if (gaps.length === 0) break;
      gaps = await fillGaps(window, gaps, found);
    }
    found.sort((a, b) => a.from - b.from);
    const out = new Joiner(from, this.#chunkBlocks);
    const names = new PackNames();
    for (const piece of found) {
      out.piece(piece, names.known(piece) ?? (await names.learn(piece)));
    }
    return out.end(to);
  }

  /**
   * The same for ranges of any size, streaming: batches of ascending extents that together cover [from, to). Reads each page of the
   * range once, past the cache; memory is two pages a segment and a batch. It may be left early.
   */
  async *scan(from = 0, to = this.blocks): AsyncGenerator<ResolvedExtent[]> {
    this.#check(from, to);
    const out = new Joiner(from, this.#chunkBlocks);
    const names = new PackNames();
    for await (const batch of visiblePieces(this.#windows, from, to)) {
      for (const piece of batch) {
        out.piece(piece, names.known(piece) ?? (await names.learn(piece)));
      }
      const ready = out.take();
      if (ready.length > 0) yield ready;
    }
    const rest = out.end(to);
    if (rest.length > 0) yield rest;
  }

  #check(from: number, to: number): void {
    if (
      !Number.isSafeInteger(from) ||
      !Number.isSafeInteger(to) ||
      from < 0 ||
      from > to ||
      to > this.blocks
    ) {
      throw new RangeError(`blocks ${from} to ${to} of a device of ${this.blocks}`);
    }
  }
}

interface Gap {
  readonly from: number;
  readonly to: number;
}

/**
 * Appends to `found` what `window` says about the blocks of `gaps` (ascending, not empty); returns what it says nothing about.
 */
async function fillGaps(
  window: SourceWindow,
  gaps: readonly Gap[],
  found: Piece[],
): Promise<Gap[]> {
  const hullFrom = gaps[0]?.from ?? 0;
  const hullTo = gaps.at(-1)?.to ?? 0;
  const { source } = window;
  const pages = await neededPages(window, gaps);
  if (pages.length === 0) return [...gaps];
  const rest: Gap[] = [];
  let g = 0;
  let open = gaps[0];
  const sweep = new Sweep(hullFrom, hullTo, (piece) => {
    while (open !== undefined && open.to <= piece.from) {
      rest.push(open);
      open = gaps[++g];
    }
    while (open !== undefined && open.from < piece.to) {
      const from = Math.max(open.from, piece.from);
      const to = Math.min(open.to, piece.to);
      if (open.from < from) rest.push({ from: open.from, to: from });
      found.push(from === piece.from && to === piece.to ? piece : { ...piece, from, to });
      open = to < open.to ? { from: to, to: open.to } : gaps[++g];
      if (to === piece.to) break;
    }
  });
  const full = source.level === undefined;
  const base = full ? 0 : source.firstSeq;
  const least = full ? 0 : window.afterSeq + 1;
  const most = full ? 0 : window.uptoSeq;
  const record = {
    block: 0,
    end: 0,
    seq: 0,
    source,
    page: undefined as ExtentPage | undefined,
    i: 0,
  };
  const stripe = hullFrom - (hullFrom % STRIPE_BLOCKS);
  for (let n = 0; n < pages.length; n += READ_AHEAD) {
    const loaded = await Promise.all(
      pages.slice(n, n + READ_AHEAD).map((p) => source.extentPage(p)),
    );
    for (const page of loaded) {
      record.page = page;
      for (let i = page.lowerBound(stripe); i < page.length; i++) {
        const block = page.block(i);
        if (block >= hullTo) break;
        const end = block + page.count(i);
        if (end <= hullFrom) continue;
        const seq = base + page.seq(i);
        if (seq < least || seq > most) continue;
        record.block = block;
        record.end = end;
        record.seq = seq;
        record.i = i;
        sweep.add(record);
      }
    }
  }
  sweep.finish();
  for (; open !== undefined; open = gaps[++g]) rest.push(open);
  return rest;
}

/** The extents pages of the window that can say something about `gaps`, ascending. */
async function neededPages(window: SourceWindow, gaps: readonly Gap[]): Promise<number[]> {
  const { source } = window;
  const { firstBlock, endBlock, length } = source.index.extents;
  const hullTo = gaps.at(-1)?.to ?? 0;
  const pages: number[] = [];
  let g = 0;
  for (let p = firstPageFor(source, gaps[0]?.from ?? 0); p < length; p++) {
    const first = firstBlock[p] ?? 0;
    if (first >= hullTo) break;
    while (g + 1 < gaps.length && (gaps[g]?.to ?? 0) <= first) g++;
    const gap = gaps[g];
    if (gap === undefined) break;
    // The gap at hand is the first that ends behind the page's start; if that one starts behind the page's end, all do.
    if (gap.to > first && gap.from < (endBlock[p] ?? 0)) pages.push(p);
  }
  return source.level === undefined ? pages : withoutHotPages(window, pages);
}

/**
 * Leaves out pages that hold nothing but older versions of one often written block. Where many pages in a row start with the same block, all
 * but the last of them hold records that start there, by ascending sequence number: of those only the newest ones within the
 * window can be seen, and older ones that reach farther.
 */
async function withoutHotPages(window: SourceWindow, pages: readonly number[]): Promise<number[]> {
  const { source, uptoSeq, afterSeq } = window;
  const { firstBlock, endBlock } = source.index.extents;
  const kept: number[] = [];
  for (let n = 0; n < pages.length;) {
    const block = firstBlock[pages[n] ?? 0];
    let last = n;
    while (
      last + 1 < pages.length &&
      pages[last + 1] === (pages[last] ?? 0) + 1 &&
      firstBlock[pages[last + 1] ?? 0] === block
    ) {
      last++;
    }
    if (last - n + 1 < HOT_PAGES) {
      for (; n <= last; n++) kept.push(pages[n] ?? 0);
      continue;
    }
    const firstSeqOf = async (k: number): Promise<number> =>
      source.firstSeq + (await source.extentPage(pages[k] ?? 0)).seq(0);
    // The last page of the group whose first record is not too new.
    let lo = n;
    let hi = last + 1;
    while (lo < hi) {
      const mid = (lo + hi) >>> 1;
      if ((await firstSeqOf(mid)) <= uptoSeq) lo = mid + 1;
      else hi = mid;
    }
    const newest = lo - 1;
    const chosen = new Set<number>([last]);
    if (newest >= n) {
      chosen.add(newest);
      const page = await source.extentPage(pages[newest] ?? 0);
      let reach = 0;
      for (let i = 0; i < page.length && page.block(i) === block; i++) {
        const seq = source.firstSeq + page.seq(i);
        if (seq > afterSeq && seq <= uptoSeq)
          reach = Math.max(reach, page.block(i) + page.count(i));
      }
      for (let k = newest - 1; k >= n; k--) {
        const end = endBlock[pages[k] ?? 0] ?? 0;
        if (end <= reach) continue;
        chosen.add(k);
        reach = end;
      }
    }
    for (; n <= last; n++) if (chosen.has(n)) kept.push(pages[n] ?? 0);
  }
  return kept;
}

/** The ids of packs by source and index, so that most pieces need no promise. */
class PackNames {
  #names = new Map<SegmentSource, Map<number, string>>();
  #count = 0;

  /** Undefined: `learn` it first. The empty string stands for a hole. */
  known(piece: Piece): string | undefined {
    const pack = piece.page.pack(piece.i);
    return pack === HOLE ? '' : this.#names.get(piece.source)?.get(pack);
  }

  async learn(piece: Piece): Promise<string> {
    const pack = piece.page.pack(piece.i);
    const id = await piece.source.packId(pack);
    if (this.#count++ >= KNOWN_PACKS) {
      this.#names = new Map();
      this.#count = 1;
    }
    let names = this.#names.get(piece.source);
    if (names === undefined) this.#names.set(piece.source, (names = new Map<number, string>()));
    names.set(pack, id);
    return id;
  }
}

/** Strings pieces together: fills what is between them with holes, joins neighbours that can be one extent. */
class Joiner {
  readonly #chunkBlocks: number;
  #pos: number;
  #ready: ResolvedExtent[] = [];
  #block = 0;
  #count = 0;
  #packId: string | undefined;
  #place: Place = NOWHERE;

  constructor(from: number, chunkBlocks: number) {
    this.#pos = from;
    this.#chunkBlocks = chunkBlocks;
  }

  /** `packId` '' for a hole. */
  piece(p: Piece, packId: string): void {
    if (p.from > this.#pos) this.#add(this.#pos, p.from - this.#pos, undefined, NOWHERE);
    if (packId === '') this.#add(p.from, p.to - p.from, undefined, NOWHERE);
    else this.#add(p.from, p.to - p.from, packId, placeAt(p.page, p.i, p.from, this.#chunkBlocks));
    this.#pos = p.to;
  }

  /** What is finished; the last extent may go on and stays. */
  take(): ResolvedExtent[] {
    const ready = this.#ready;
    this.#ready = [];
    return ready;
  }

  /** The rest, up to block `to`. */
  end(to: number): ResolvedExtent[] {
    if (to > this.#pos) this.#add(this.#pos, to - this.#pos, undefined, NOWHERE);
    this.#pos = to;
    this.#flush();
    return this.take();
  }

  #add(block: number, count: number, packId: string | undefined, place: Place): void {
    if (
      this.#count > 0 &&
      this.#packId === packId &&
      (packId === undefined ||
        placesJoin(this.#place, this.#count, place, count, this.#chunkBlocks))
    ) {
      this.#count += count;
      return;
    }
    this.#flush();
    this.#block = block;
    this.#count = count;
    this.#packId = packId;
    this.#place = place;
  }

  #flush(): void {
    if (this.#count === 0) return;
    const { frame, sub, skip } = this.#place;
    this.#ready.push({
      block: this.#block,
      count: this.#count,
      packId: this.#packId,
      frame,
      sub,
      skip,
    });
    this.#count = 0;
  }
}

const NOWHERE: Place = { frame: 0, sub: 0, skip: 0 };
