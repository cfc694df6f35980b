/** Walking the records of several sources in one order, and what of them is visible at the end. */
import { STRIPE_BLOCKS } from '../../format/extent.js';
import type { ExtentPage } from '../../format/segment.js';
import type { SegmentSource } from './source.js';

/** A source and the sequence numbers that count of it: those in (afterSeq, uptoSeq]. Of a full map everything counts. */
export interface SourceWindow {
  readonly source: SegmentSource;
  readonly afterSeq: number;
  readonly uptoSeq: number;
}

/** The first extents page of `source` that can hold a record reaching to block `from`. */
export function firstPageFor(source: SegmentSource, from: number): number {
  // No record crosses a stripe, so nothing that starts before the stripe of `from` reaches it. The page before the first one
  // that starts in the stripe may go on into it.
  const stripe = from - (from % STRIPE_BLOCKS);
  const { firstBlock, length } = source.index.extents;
  let lo = 0;
  let hi = length;
  while (lo < hi) {
    const mid = (lo + hi) >>> 1;
    if ((firstBlock[mid] ?? 0) < stripe) lo = mid + 1;
    else hi = mid;
  }
  return Math.max(0, lo - 1);
}

/**
 * The records of one window that touch blocks [from, to), in the order of the segment. `load` must be called first; then the
 * fields are those of the current record, until `done`. `step` returns false when `load` must be called again.
 */
export class RecordCursor {
  readonly source: SegmentSource;
  block = 0;
  end = 0;
  /** Absolute; 0 in a full map. */
  seq = 0;
  done = false;
  /** The page of the current record, and its index there. */
  page: ExtentPage | undefined;
  i = 0;
  readonly #from: number;
  readonly #to: number;
  readonly #base: number;
  readonly #least: number;
  readonly #most: number;
  #next: number;
  #ahead: Promise<ExtentPage> | undefined;
  #aheadPage = -1;

  constructor(window: SourceWindow, from: number, to: number) {
    this.source = window.source;
    this.#from = from;
    this.#to = to;
    const full = window.source.level === undefined;
    this.#base = full ? 0 : window.source.firstSeq;
    this.#least = full ? 0 : window.afterSeq + 1;
    this.#most = full ? 0 : window.uptoSeq;
    this.#next = from < to ? firstPageFor(window.source, from) : window.source.index.extents.length;
  }

  /** Moves to the next record within the page at hand. False: none is left there, call `load`. */
  step(): boolean {
    const page = this.page;
    if (page === undefined) return false;
    for (let i = this.i + 1; i < page.length; i++) {
      if (this.#take(page, i)) return true;
      if (this.done) return true;
    }
    this.page = undefined;
    return false;
  }

  /** Moves to the next record, loading pages. Sets `done` when there is none. */
  async load(): Promise<void> {
    const t = this.source.index.extents;
    for (;;) {
      const p = this.#wanted(this.#next);
      if (p === undefined) {
        this.done = true;
        this.page = undefined;
        return;
      }
      this.#next = p + 1;
      const ahead = this.#aheadPage === p ? this.#ahead : undefined;
      this.page = await (ahead ?? this.source.extentPage(p, false));
      const q = this.#wanted(p + 1);
      if (q !== undefined) {
        this.#aheadPage = q;
        this.#ahead = this.source.extentPage(q, false);
        // It is awaited by the next call of load, if there is one; a failure must wait for that.
        this.#ahead.catch(() => undefined);
      }
      this.i =
        (t.firstBlock[p] ?? 0) < this.#from
          ? this.page.lowerBound(this.#from - (this.#from % STRIPE_BLOCKS)) - 1
          : -1;
      if (this.step()) return;
    }
  }

  #wanted(from: number): number | undefined {
    const t = this.source.index.extents;
    for (let p = from; p < t.length; p++) {
      if ((t.firstBlock[p] ?? 0) >= this.#to) return undefined;
      if ((t.endBlock[p] ?? 0) > this.#from) return p;
    }
    return undefined;
  }

  #take(page: ExtentPage, i: number): boolean {
    const block = page.block(i);
    if (block >= this.#to) {
      this.done = true;
      return false;
    }
    const end = block + page.count(i);
    if (end <= this.#from) return false;
    const seq = this.#base + page.seq(i);
    if (seq < this.#least || seq > this.#most) return false;
    this.block = block;
    this.end = end;
    this.seq = seq;
    this.i = i;
    return true;
  }
}

/** Merges cursors: `top` is the one whose record is next by (block, seq). */
export class RecordHeap {
  readonly #heap: RecordCursor[] = [];

  /** Loads the first record of each cursor. */
  static async open(cursors: readonly RecordCursor[]): Promise<RecordHeap> {
    const heap = new RecordHeap();
    await Promise.all(cursors.map((c) => c.load()));
    for (const c of cursors) if (!c.done) heap.#push(c);
    return heap;
  }

  get top(): RecordCursor | undefined {
    return this.#heap[0];
  }

  /** Moves past the top record. False: call `load` before anything else. */
  step(): boolean {
    const top = this.#heap[0];
    if (top === undefined) return true;
    if (!top.step()) return false;
    this.#settle(top);
    return true;
  }

  async load(): Promise<void> {
    const top = this.#heap[0];
    if (top === undefined) return;
    await top.load();
    this.#settle(top);
  }

  #settle(top: RecordCursor): void {
    if (top.done) {
      const last = this.#heap.pop();
      if (last === undefined || last === top) return;
      this.#heap[0] = last;
    }
    this.#sink(0);
  }

  #push(c: RecordCursor): void {
    const heap = this.#heap;
    heap.push(c);
    let i = heap.length - 1;
    while (i > 0) {
      const parent = (i - 1) >> 1;
      const p = heap[parent];
      if (p === undefined || !before(c, p)) break;
      heap[i] = p;
      i = parent;
    }
    heap[i] = c;
  }

  #sink(at: number): void {
    const heap = this.#heap;
    const c = heap[at];
    if (c === undefined) return;
    let i = at;
    for (;;) {
      const left = heap[2 * i + 1];
      if (left === undefined) break;
      const right = heap[2 * i + 2];
      const useRight = right !== undefined && before(right, left);
      const child = useRight ? right : left;
      if (!before(child, c)) break;
      heap[i] = child;
      i = 2 * i + (useRight ? 2 : 1);
    }
    heap[i] = c;
  }
}

function before(a: RecordCursor, b: RecordCursor): boolean {
  return a.block < b.block || (a.block === b.block && a.seq < b.seq);
}

/** A visible part of a record: blocks [from, to) come from record `i` of `page`. */
export interface Piece {
  readonly from: number;
  readonly to: number;
  readonly source: SegmentSource;
  readonly page: ExtentPage;
  readonly i: number;
}

/** A record as {@link Sweep} takes it: blocks [block, end), written by commit `seq`. */
export interface SweepRecord {
  readonly block: number;
  readonly end: number;
  readonly seq: number;
  readonly source: SegmentSource;
  readonly page: ExtentPage | undefined;
  readonly i: number;
}

interface Active {
  readonly seq: number;
  readonly end: number;
  readonly source: SegmentSource;
  readonly page: ExtentPage;
  readonly i: number;
}

/**
 * Takes records in ascending order of (block, seq) and hands out what of each is visible (the greatest sequence number wins),
 * as pieces in ascending order, each as long as possible. What is in no piece is named by no record.
 *
 * The records that reach past the current block are kept as a stair: sequence numbers ascending, ends descending; a record
 * that an other one with a greater sequence number outreaches can never be seen again and is dropped. So memory is
 * bounded by the distinct ends in one stripe, and a block that was written a million times costs one entry.
 */
export class Sweep {
  readonly #out: (piece: Piece) => void;
  readonly #from: number;
  readonly #to: number;
  readonly #stair: Active[] = [];
  #pos = 0;

  /** Pieces are clipped to [from, to). */
  constructor(from: number, to: number, out: (piece: Piece) => void) {
    this.#from = from;
    this.#to = to;
    this.#out = out;
  }

  add(r: SweepRecord): void {
    const { page, block, end, seq } = r;
    if (page === undefined) throw new RangeError('a cursor without a record');
    this.#advance(block);
    const stair = this.#stair;
    let at = stair.length;
    while (at > 0 && (stair[at - 1]?.seq ?? 0) > seq) at--;
    const above = stair[at];
    if (above !== undefined && above.end >= end) return;
    if (at === stair.length) {
      const top = stair.at(-1);
      if (top !== undefined) this.#emit(top, block);
      this.#pos = block;
    }
    let keep = at;
    while (keep > 0 && (stair[keep - 1]?.end ?? 0) <= end) keep--;
    stair.splice(keep, at - keep, { seq, end, source: r.source, page, i: r.i });
  }

  finish(): void {
    this.#advance(Number.MAX_SAFE_INTEGER);
  }

  /** Hands out everything that ends at or before `block`. */
  #advance(block: number): void {
    for (;;) {
      const top = this.#stair.at(-1);
      if (top === undefined || top.end > block) return;
      this.#emit(top, top.end);
      this.#pos = top.end;
      this.#stair.pop();
    }
  }

  #emit(a: Active, end: number): void {
    const from = Math.max(this.#pos, this.#from);
    const to = Math.min(end, this.#to);
    if (from < to) this.#out({ from, to, source: a.source, page: a.page, i: a.i });
  }
}

/** Where the data of a piece lie: as frame, sub and skip of an extent record of `to - from` blocks. */
export interface Place {
  readonly frame: number;
  readonly sub: number;
  readonly skip: number;
}

/** The place of block `block` of record `i`, which is no hole; `chunkBlocks` as in FORMAT.md 5.4. */
export function placeAt(page: ExtentPage, i: number, block: number, chunkBlocks: number): Place {
  const frame = page.frame(i);
  const skip = page.skip(i);
  const at = skip + (block - page.block(i));
  if (skip + page.count(i) <= chunkBlocks) return { frame, sub: page.sub(i), skip: at };
  return { frame: frame + Math.floor(at / chunkBlocks), sub: 0, skip: at % chunkBlocks };
}

/**
 * Whether a record of `count` blocks at place `a` followed by one of `nextCount` blocks at `b` can be one record. A run may only
 * name frames that are known to hold a single chunk: those that a run names already.
 */
export function placesJoin(
  a: Place,
  count: number,
  b: Place,
  nextCount: number,
  chunkBlocks: number,
): boolean {
  const end = a.skip + count;
  const aRun = end > chunkBlocks;
  const bRun = b.skip + nextCount > chunkBlocks;
  if (!aRun && b.frame === a.frame && b.sub === a.sub && b.skip === end) {
    return !bRun || a.sub === 0;
  }
  return (
    aRun &&
    b.sub === 0 &&
    b.frame === a.frame + Math.floor(end / chunkBlocks) &&
    b.skip === end % chunkBlocks &&
    (bRun || b.skip !== 0)
  );
}

/** Pieces handed out at a time. */
const BATCH_PIECES = 4096;

/**
 * What is visible of `windows` in blocks [from, to), ascending, in batches: for each block the record with the greatest sequence number,
 * named holes included. Reads every page of the range once, in order; memory is two pages a window and a batch.
 */
export async function* visiblePieces(
  windows: readonly SourceWindow[],
  from: number,
  to: number,
): AsyncGenerator<Piece[]> {
  const heap = await RecordHeap.open(windows.map((w) => new RecordCursor(w, from, to)));
  let batch: Piece[] = [];
  const sweep = new Sweep(from, to, (piece) => batch.push(piece));
  for (;;) {
    const top = heap.top;
    if (top === undefined) break;
    sweep.add(top);
    if (!heap.step()) await heap.load();
    if (batch.length >= BATCH_PIECES) {
      yield batch;
      batch = [];
    }
  }
  sweep.finish();
  if (batch.length > 0) yield batch;
}
