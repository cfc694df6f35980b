/** Which of a volume's segments count (FORMAT.md 6.6). */
import { segmentName, type SegmentName } from '../../format/names.js';

/** A segment of the chain, and the commits (afterSeq, uptoSeq] that are taken from it. */
export interface ChainLink {
  readonly segment: SegmentName;
  readonly afterSeq: number;
  readonly uptoSeq: number;
}

export interface ChosenSegments {
  /** Delta segments, ascending, without overlap. A gap between two (or before the first) means missing commits. */
  readonly chain: readonly ChainLink[];
  /** Ascending by the point they hold. */
  readonly fullMaps: readonly SegmentName[];
  /** Delta segments whose commits the chain has from longer ones (left over by a crash between put and delete). */
  readonly covered: readonly SegmentName[];
}

/** Sorts out what the segments of a volume are for: of those that overlap the longest counts, of equals the highest level. */
export function chooseSegments(segments: readonly SegmentName[]): ChosenSegments {
  const fullMaps = segments
    .filter((s) => s.level === undefined)
    .sort((a, b) => a.lastSeq - b.lastSeq);
  const deltas = segments
    .filter((s) => s.level !== undefined)
    .sort(
      (a, b) => a.firstSeq - b.firstSeq || b.lastSeq - a.lastSeq || (b.level ?? 0) - (a.level ?? 0),
    );
  const chain: ChainLink[] = [];
  const used = new Set<string>();
  let upto = 0;
  let next = 0;
  while (next < deltas.length) {
    let best: SegmentName | undefined;
    for (; next < deltas.length; next++) {
      const s = deltas[next];
      if (s === undefined || s.firstSeq > upto + 1) break;
      if (s.lastSeq > (best?.lastSeq ?? upto)) best = s;
    }
    if (best === undefined) {
      const s = deltas[next];
      if (s !== undefined) upto = s.firstSeq - 1;
      continue;
    }
    chain.push({ segment: best, afterSeq: upto, uptoSeq: best.lastSeq });
    used.add(segmentName(best));
    upto = best.lastSeq;
  }
  return { chain, fullMaps, covered: deltas.filter((s) => !used.has(segmentName(s))) };
}
