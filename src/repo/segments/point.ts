/** What the state of a volume at a commit is made of (FORMAT.md section 8). */
import { B2Error } from '../../errors.js';
import { CommitFlag } from '../../format/commit.js';
import type { CommitRecord } from '../../format/segment.js';
import type { SourceWindow } from './records.js';
import { commitPageOf, commitRecordOf, findCommit, type SegmentSource } from './source.js';

/** The sources of a volume's history, as VolumeHistory has them. */
export interface HistorySources {
  /**
   * Deltas, ascending by first and by last sequence number; the last may be made of the journal. Where two overlap they agree.
   */
  readonly deltas: readonly SegmentSource[];
  /** Full maps in any order. */
  readonly fulls: readonly SegmentSource[];
}

export interface PointSources {
  /** Newest first; for every block the first window with a record of it decides, within a window the greatest sequence number. */
  readonly windows: readonly SourceWindow[];
  readonly commit: CommitRecord;
}

/** The deltas as windows without overlap, ascending. Commits that are missing between them (FORMAT.md 6.9) are in no window. */
export function chainWindows(deltas: readonly SegmentSource[]): SourceWindow[] {
  const windows: SourceWindow[] = [];
  let upto = 0;
  for (const source of deltas) {
    if (source.lastSeq <= upto) continue;
    windows.push({
      source,
      afterSeq: Math.max(upto, source.firstSeq - 1),
      uptoSeq: source.lastSeq,
    });
    upto = source.lastSeq;
  }
  return windows;
}

/**
 * Finds what commit `seq` needs: the newest full map not after it and the deltas since, or less where a full commit lies between. Kind
 * `not-found` if there is no such commit (it may have been merged into a later one), `damaged` if commits it needs are missing.
 */
export async function pointSources(h: HistorySources, seq: number): Promise<PointSources> {
  let base: SegmentSource | undefined;
  for (const m of h.fulls) {
    if (m.lastSeq <= seq && m.lastSeq > (base?.lastSeq ?? 0)) base = m;
  }
  const baseSeq = base?.lastSeq ?? 0;
  const newest = h.deltas.reduce((n, d) => Math.max(n, d.lastSeq), baseSeq);
  if (seq < 1 || seq > newest) throw noSuchPoint(seq);

  const windows: SourceWindow[] = [];
  let commit: CommitRecord | undefined;
  const lookUp = async (source: SegmentSource): Promise<CommitRecord> => {
    const stored = await findCommit(source, seq);
    if (stored === undefined) throw noSuchPoint(seq);
    return commitRecordOf(source, stored);
  };
  let need = seq;
  for (let i = h.deltas.length - 1; i >= 0 && need > baseSeq; i--) {
    const source = h.deltas[i];
    if (source === undefined || source.firstSeq > need) continue;
    if (source.lastSeq < need) throw missing(source.lastSeq + 1, need);
    commit ??= await lookUp(source);
    const afterSeq = Math.max(source.firstSeq - 1, baseSeq);
    const emptied = await lastFullBefore(source, afterSeq, need);
    windows.push({ source, afterSeq: emptied ?? afterSeq, uptoSeq: need });
    if (emptied !== undefined) return { windows, commit };
    need = source.firstSeq - 1;
  }
  if (need > baseSeq) throw missing(baseSeq + 1, need);
  if (base !== undefined) {
    commit ??= await lookUp(base);
    windows.push({ source: base, afterSeq: 0, uptoSeq: baseSeq });
  }
  if (commit === undefined) throw missing(1, seq);
  return { windows, commit };
}

/**
 * Of the last full commit of `source` in (afterSeq, uptoSeq]: the sequence number before its first, after which commits count.
 * Undefined if there is none.
 */
async function lastFullBefore(
  source: SegmentSource,
  afterSeq: number,
  uptoSeq: number,
): Promise<number | undefined> {
  const last = source.index.lastFullFirstSeq;
  if (last <= afterSeq) return undefined;
  if (last <= uptoSeq) return last - 1;
  // The last one lies behind the point; of those before it only the commits pages know.
  for (let p = commitPageOf(source, uptoSeq); p >= 0; p--) {
    const page = await source.commitPage(p, false);
    for (let i = page.length - 1; i >= 0; i--) {
      const seq = page.seq(i);
      if (seq > uptoSeq) continue;
      if (seq <= afterSeq) return undefined;
      if ((page.flags(i) & CommitFlag.full) !== 0) return page.record(i).firstSeq - 1;
    }
  }
  return undefined;
}

function missing(first: number, last: number): B2Error {
  return new B2Error(
    'damaged',
    `commits ${first} to ${last} of the volume are in no segment and in no journal`,
    {
      hint: 'Run "b2 repair" to rebuild the manifest from the packs.',
    },
  );
}

function noSuchPoint(seq: number): B2Error {
  return new B2Error('not-found', `the volume has no point #${seq}`, {
    hint: '"b2 points" lists those there are; thinning merges points away.',
  });
}
