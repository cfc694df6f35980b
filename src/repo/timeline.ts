/** Timeline: the recovery points of a volume, by sequence number and by time. */
import { PointClass, type Coverage } from '../format/commit.js';
import type { CommitRecord } from '../format/segment.js';
import { chainWindows } from './segments/point.js';
import type { SourceWindow } from './segments/records.js';
import { commitRecordOf, findCommit, type SegmentSource } from './segments/source.js';

/** The answer to "the state at time T". */
export interface PointAt {
  readonly point: CommitRecord;
  /**
   * Set where the clock was put back: a point that was recorded after `point` although its instant is earlier. The person
   * must be told, because either can be the one that is meant.
   */
  readonly later: CommitRecord | undefined;
}

export interface TimelineRange {
  /** Instants from here on, inclusive. */
  readonly sinceNs?: bigint | undefined;
  /** Instants up to here, inclusive. */
  readonly untilNs?: bigint | undefined;
}

export interface ListOptions extends TimelineRange {
  /** Least class; default `crash`: exact points. `none` lists every commit. */
  readonly minClass?: PointClass | undefined;
  /** Newest first; default oldest first. */
  readonly newestFirst?: boolean | undefined;
}

/** How well the time between two instants is covered. */
export interface CoverageInterval {
  readonly fromNs: bigint;
  readonly toNs: bigint;
  readonly coverage: Coverage;
  /** Commits (afterSeq, uptoSeq] make it up. */
  readonly afterSeq: number;
  readonly uptoSeq: number;
  /** The clock was put back before it: it starts earlier than the interval before ended. */
  readonly clockSteppedBack: boolean;
}

/**
 * Reads commits pages on demand; costs nothing to make. Immutable, and to be used only as long as the sources are open. All times are
 * instants of commits, by the clock of the host that captured.
 *
 * When the clock steps. Instants are what the host's clock showed; it may have been wrong for a while (a machine that boots in
 * 1970, a clock two hours fast until it is set), so they need not ascend with the sequence numbers. {@link Timeline.before} goes by what
 * the clock showed: the point with the greatest instant not after T (of equals the last recorded). So every point can be
 * reached by the very instant it is listed with, and a few commits of a machine that believed it was 1970 do not answer
 * for every time since. Where time was passed twice the answer is ambiguous by nature, and `later` says so. Who wants the newest state
 * asks for {@link Timeline.latest}, which goes by sequence number alone.
 */
export class Timeline {
  readonly #windows: readonly SourceWindow[];

  /** `deltas` as in HistorySources. */
  constructor(deltas: readonly SegmentSource[]) {
    this.#windows = chainWindows(deltas);
  }

  /** Commits (after thinning: those that are left), and exact points among them; from the indexes alone. */
  get counts(): { readonly commits: number; readonly exactPoints: number } {
    let commits = 0;
    let exactPoints = 0;
    for (const { source } of this.#windows) {
      commits += source.index.commitCount;
      exactPoints += source.index.commits.points.reduce((n, p) => n + p, 0);
    }
    return { commits, exactPoints };
  }

  /** The first commit. */
  async first(): Promise<CommitRecord | undefined> {
    for await (const c of this.list({ minClass: PointClass.none })) return c;
    return undefined;
  }

  /** The newest commit of at least that class, by sequence number. */
  async latest(minClass: PointClass = PointClass.crash): Promise<CommitRecord | undefined> {
    for await (const c of this.list({ minClass, newestFirst: true })) return c;
    return undefined;
  }

  /** The commit with that sequence number. */
  async bySeq(seq: number): Promise<CommitRecord | undefined> {
    const w = this.#windows.find((x) => seq > x.afterSeq && seq <= x.uptoSeq);
    if (w === undefined) return undefined;
    const stored = await findCommit(w.source, seq);
    return stored === undefined ? undefined : commitRecordOf(w.source, stored);
  }

  /**
   * The newest point of at least `minClass` not after `timeNs`; see above for what that means when the clock stepped.
   */
  async before(
    timeNs: bigint,
    minClass: PointClass = PointClass.crash,
  ): Promise<PointAt | undefined> {
    const pages = this.#pages({ untilNs: timeNs, minClass });
    // The best that a page can hold is known from the index: pages with the best prospects first.
    const bound = (p: PageAt): bigint => (p.greatestNs < timeNs ? p.greatestNs : timeNs);
    const byProspect = [...pages].sort(
      (a, b) => compare(bound(b), bound(a)) || b.firstSeq - a.firstSeq,
    );
    let best: Found | undefined;
    for (const p of byProspect) {
      if (best !== undefined && bound(p) < best.instantNs) break;
      const page = await p.window.source.commitPage(p.page);
      for (let i = 0; i < page.length; i++) {
        const instantNs = page.instantNs(i);
        if (instantNs > timeNs || page.pointClass(i) < minClass) continue;
        const seq = page.seq(i);
        if (!inside(p.window, seq)) continue;
        if (
          best === undefined ||
          instantNs > best.instantNs ||
          (instantNs === best.instantNs && seq > best.seq)
        ) {
          best = { at: p, i, seq, instantNs };
        }
      }
    }
    if (best === undefined) return undefined;
    const last = await this.#lastRecorded(pages, timeNs, minClass);
    return {
      point: await record(best),
      later: last !== undefined && last.seq > best.seq ? await record(last) : undefined,
    };
  }

  /** Commits by sequence number whose instants lie in the range; streaming, one page at a time. */
  async *list(options: ListOptions = {}): AsyncGenerator<CommitRecord> {
    const { sinceNs, untilNs, minClass = PointClass.crash, newestFirst = false } = options;
    const pages = this.#pages({ sinceNs, untilNs, minClass });
    if (newestFirst) pages.reverse();
    for (const { window, page: p } of pages) {
      const page = await window.source.commitPage(p);
      for (let n = 0; n < page.length; n++) {
        const i = newestFirst ? page.length - 1 - n : n;
        const t = page.instantNs(i);
        if (page.pointClass(i) < minClass || !inside(window, page.seq(i))) continue;
        if ((sinceNs !== undefined && t < sinceNs) || (untilNs !== undefined && t > untilNs))
          continue;
        yield await commitRecordOf(window.source, page.record(i));
      }
    }
  }

  /**
   * The intervals between commits, oldest first, neighbours of equal coverage as one, clipped to the range. The first commit
   * has nothing before it and opens no interval. Streaming.
   */
  async *coverage(range: TimelineRange = {}): AsyncGenerator<CoverageInterval> {
    const { sinceNs, untilNs } = range;
    let before: { seq: number; instantNs: bigint } | undefined;
    let open: CoverageInterval | undefined;
    let steppedBack = false;
    const all = this.#pages({});
    for (let n = 0; n < all.length; n++) {
      const at = all[n];
      if (at === undefined) break;
      // Its intervals reach from the last instant of the page before to its own greatest one.
      const previous = all[n - 1];
      const least =
        previous !== undefined && previous.leastNs < at.leastNs ? previous.leastNs : at.leastNs;
      if (
        (sinceNs !== undefined && at.greatestNs < sinceNs) ||
        (untilNs !== undefined && least > untilNs)
      ) {
        before = undefined;
        continue;
      }
      if (before === undefined && previous !== undefined) before = await lastOf(previous);
      const page = await at.window.source.commitPage(at.page);
      for (let i = 0; i < page.length; i++) {
        const c = page.record(i);
        if (!inside(at.window, c.seq)) continue;
        const from = before;
        before = { seq: c.seq, instantNs: c.instantNs };
        if (from === undefined) continue;
        if (c.instantNs < from.instantNs) {
          steppedBack = true;
          if (open !== undefined) yield open;
          open = undefined;
          continue;
        }
        const fromNs = sinceNs !== undefined && from.instantNs < sinceNs ? sinceNs : from.instantNs;
        const toNs = untilNs !== undefined && c.instantNs > untilNs ? untilNs : c.instantNs;
        if (fromNs >= toNs) continue;
        if (
          open !== undefined &&
          open.coverage === c.coverage &&
          open.toNs === fromNs &&
          open.uptoSeq === from.seq
        ) {
          open = { ...open, toNs, uptoSeq: c.seq };
          continue;
        }
        if (open !== undefined) yield open;
        open = {
          fromNs,
          toNs,
          coverage: c.coverage,
          afterSeq: from.seq,
          uptoSeq: c.seq,
          clockSteppedBack: steppedBack,
        };
        steppedBack = false;
      }
    }
    if (open !== undefined) yield open;
  }

  /** The point recorded last among those not after `timeNs`. */
  async #lastRecorded(
    pages: readonly PageAt[],
    timeNs: bigint,
    minClass: PointClass,
  ): Promise<Found | undefined> {
    for (const p of pages.toReversed()) {
      const page = await p.window.source.commitPage(p.page);
      for (let i = page.length - 1; i >= 0; i--) {
        const instantNs = page.instantNs(i);
        const seq = page.seq(i);
        if (instantNs <= timeNs && page.pointClass(i) >= minClass && inside(p.window, seq)) {
          return { at: p, i, seq, instantNs };
        }
      }
    }
    return undefined;
  }

  /** Commits pages, ascending, that can hold what is asked for, going by the indexes. */
  #pages(want: TimelineRange & { readonly minClass?: PointClass }): PageAt[] {
    const { sinceNs, untilNs, minClass = PointClass.none } = want;
    const pages: PageAt[] = [];
    for (const window of this.#windows) {
      const t = window.source.index.commits;
      for (let page = 0; page < t.length; page++) {
        const leastNs = t.leastInstantNs[page] ?? 0n;
        const greatestNs = t.greatestInstantNs[page] ?? 0n;
        const firstSeq = t.firstSeq[page] ?? 0;
        if (sinceNs !== undefined && greatestNs < sinceNs) continue;
        if (untilNs !== undefined && leastNs > untilNs) continue;
        if (minClass >= PointClass.crash && t.points[page] === 0) continue;
        if (firstSeq > window.uptoSeq || (t.firstSeq[page + 1] ?? Infinity) <= window.afterSeq + 1)
          continue;
        pages.push({ window, page, firstSeq, leastNs, greatestNs });
      }
    }
    return pages;
  }
}

interface PageAt {
  readonly window: SourceWindow;
  readonly page: number;
  readonly firstSeq: number;
  readonly leastNs: bigint;
  readonly greatestNs: bigint;
}

interface Found {
  readonly at: PageAt;
  readonly i: number;
  readonly seq: number;
  readonly instantNs: bigint;
}

async function record(found: Found): Promise<CommitRecord> {
  const { source } = found.at.window;
  const page = await source.commitPage(found.at.page);
  return commitRecordOf(source, page.record(found.i));
}

/** The last commit of a page that counts. */
async function lastOf(at: PageAt): Promise<{ seq: number; instantNs: bigint } | undefined> {
  const page = await at.window.source.commitPage(at.page);
  for (let i = page.length - 1; i >= 0; i--) {
    const seq = page.seq(i);
    if (inside(at.window, seq)) return { seq, instantNs: page.instantNs(i) };
  }
  return undefined;
}

function inside(w: SourceWindow, seq: number): boolean {
  return seq > w.afterSeq && seq <= w.uptoSeq;
}

function compare(a: bigint, b: bigint): number {
  return a < b ? -1 : a > b ? 1 : 0;
}
