/** The points that a history goes over, and between which of them some blocks stayed the same, told from the manifest alone. */
import { isKind } from '../errors.js';
import { CommitFlag, PointClass } from '../format/commit.js';
import type { ResolvedExtent } from '../repo/blockmap.js';
import type { VolumeHistory } from '../repo/history.js';
import { openBlockMap } from '../repo/point.js';
import { Timeline, type TimelineRange } from '../repo/timeline.js';
import { commitsThatWrote } from '../repo/written.js';
import type { BlockRange } from './recording.js';

export interface PointsWanted extends TimelineRange {
  /** Only these commits, whatever their class; default: every exact point. */
  readonly only?: ReadonlySet<number> | undefined;
}

/** Points of a volume in the order in which they were recorded, named by their index. */
export class HistoryPoints {
  readonly #history: VolumeHistory;
  readonly #seqs: readonly number[];
  readonly #instants: readonly bigint[];
  /** Index i: what lies between points i and i + 1 cannot be told from extents (a full commit, lost commits, another size). */
  readonly #breaks: ReadonlySet<number>;
  /** Points in the range whose image cannot be made, because commits are lost. They are not among the points. */
  readonly unreadable: number;

  private constructor(
    history: VolumeHistory,
    seqs: readonly number[],
    instants: readonly bigint[],
    breaks: ReadonlySet<number>,
    unreadable: number,
  ) {
    this.#history = history;
    this.#seqs = seqs;
    this.#instants = instants;
    this.#breaks = breaks;
    this.unreadable = unreadable;
  }

  /** Reads commits pages. The history must stay open as long as this is used. */
  static async open(history: VolumeHistory, wanted: PointsWanted): Promise<HistoryPoints> {
    const { sinceNs, untilNs, only } = wanted;
    const seqs: number[] = [];
    const instants: bigint[] = [];
    const breaks = new Set<number>();
    let unreadable = 0;
    let sizeBytes: number | undefined;
    let before: number | undefined;
    for await (const c of new Timeline(history.sources).list({ minClass: PointClass.none })) {
      const isBreak =
        (c.flags & CommitFlag.full) !== 0 ||
        (sizeBytes !== undefined && c.sizeBytes !== sizeBytes) ||
        (before !== undefined && c.firstSeq !== before + 1);
      sizeBytes = c.sizeBytes;
      before = c.seq;
      if (isBreak) breaks.add(seqs.length - 1);
      const isWanted = only === undefined ? c.pointClass >= PointClass.crash : only.has(c.seq);
      if (!isWanted) continue;
      if (sinceNs !== undefined && c.instantNs < sinceNs) continue;
      if (untilNs !== undefined && c.instantNs > untilNs) continue;
      if (history.unreadable.some((r) => c.seq >= r.firstSeq && c.seq <= r.lastSeq)) {
        unreadable++;
        continue;
      }
      seqs.push(c.seq);
      instants.push(c.instantNs);
    }
    return new HistoryPoints(history, seqs, instants, breaks, unreadable);
  }

  get count(): number {
    return this.#seqs.length;
  }

  seq(i: number): number {
    const seq = this.#seqs[i];
    if (seq === undefined) throw new RangeError(`no point ${i}`);
    return seq;
  }

  instantNs(i: number): bigint {
    const ns = this.#instants[i];
    if (ns === undefined) throw new RangeError(`no point ${i}`);
    return ns;
  }

  /** Index of the first point with that sequence number or a later one. */
  #indexOf(seq: number): number {
    let lo = 0;
    let hi = this.#seqs.length;
    while (lo < hi) {
      const mid = (lo + hi) >>> 1;
      if ((this.#seqs[mid] ?? 0) < seq) lo = mid + 1;
      else hi = mid;
    }
    return lo;
  }

  /** Marks of [lo, hi): 1 where, between the point and the next one, blocks of `ranges` may have been written. */
  async #written(ranges: readonly BlockRange[], lo: number, hi: number): Promise<Uint8Array> {
    const marks = new Uint8Array(hi - lo);
    for (const i of this.#breaks) if (i >= lo && i < hi) marks[i - lo] = 1;
    if (hi > lo) {
      await commitsThatWrote(
        this.#history.sources,
        ranges,
        this.seq(lo),
        this.seq(hi),
        (seq) => (marks[this.#indexOf(seq) - 1 - lo] = 1),
      );
    }
    return marks;
  }

  /**
   * The stretch of points around `i`, within [lo, hi] (all inclusive), in each of which every block of `ranges` (ascending) is what it
   * is at `i`. It may be longer in truth, never shorter.
   */
  async sameAround(
    i: number,
    ranges: readonly BlockRange[],
    lo: number,
    hi: number,
  ): Promise<{ readonly from: number; readonly to: number }> {
    const marks = await this.#written(ranges, lo, hi);
    let from = i;
    let to = i;
    while (from > lo && (marks[from - 1 - lo] === 0 || (await this.#same(i, from - 1, ranges))))
      from--;
    while (to < hi && (marks[to - lo] === 0 || (await this.#same(i, to + 1, ranges)))) to++;
    return { from, to };
  }

  /** Whether a block of `ranges` may have been written after point `a` and not after point `b`. */
  async written(ranges: readonly BlockRange[], a: number, b: number): Promise<boolean> {
    return (await this.#written(ranges, a, b)).includes(1);
  }

  /** Whether the blocks lie in the same places at both points: what is written anew and is the same is stored once. */
  async #same(a: number, b: number, ranges: readonly BlockRange[]): Promise<boolean> {
    try {
      const one = await openBlockMap(this.#history, this.seq(a));
      const other = await openBlockMap(this.#history, this.seq(b));
      if (one.commit.sizeBytes !== other.commit.sizeBytes) return false;
      for (const { from, to } of ranges) {
        const [x, y] = await Promise.all([one.resolve(from, to), other.resolve(from, to)]);
        if (!sameExtents(x, y)) return false;
      }
      return true;
    } catch (error) {
      // Then the point is looked at, which tells what is wrong.
      if (isKind(error, 'damaged', 'not-found')) return false;
      throw error;
    }
  }
}

/** Whether both lists name the same places in the same way. False does not mean that the bytes differ. */
export function sameExtents(a: readonly ResolvedExtent[], b: readonly ResolvedExtent[]): boolean {
  return (
    a.length === b.length &&
    a.every((x, i) => {
      const y = b[i];
      return (
        y !== undefined &&
        x.block === y.block &&
        x.count === y.count &&
        x.packId === y.packId &&
        x.frame === y.frame &&
        x.sub === y.sub &&
        x.skip === y.skip
      );
    })
  );
}
