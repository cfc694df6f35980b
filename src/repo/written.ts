/** Which commits wrote to some blocks: from the extents pages of the manifest that cover these blocks, nothing else is read. */
import { chainWindows } from './segments/point.js';
import { RecordCursor } from './segments/records.js';
import type { SegmentSource } from './segments/source.js';

/** Blocks [from, to). */
export interface Blocks {
  readonly from: number;
  readonly to: number;
}

/** Ranges nearer to each other than this are looked up in one go. */
const NEAR_BLOCKS = 4096;

/**
 * Calls `visit` with the sequence number of every commit in (afterSeq, uptoSeq] that names a block of `ranges` (ascending, without
 * overlap), in no order and perhaps repeatedly. Of a merged commit it is a number among those that it stands for. What a full commit
 * empties, and commits that are missing, are not told: see CommitRecord.flags and VolumeHistory.lost.
 */
export async function commitsThatWrote(
  deltas: readonly SegmentSource[],
  ranges: readonly Blocks[],
  afterSeq: number,
  uptoSeq: number,
  visit: (seq: number) => void,
): Promise<void> {
  for (const window of chainWindows(deltas)) {
    const after = Math.max(window.afterSeq, afterSeq);
    const upto = Math.min(window.uptoSeq, uptoSeq);
    if (after >= upto) continue;
    for (const near of clusters(ranges)) {
      const from = near[0]?.from ?? 0;
      const to = near.at(-1)?.to ?? 0;
      const cursor = new RecordCursor(
        { source: window.source, afterSeq: after, uptoSeq: upto },
        from,
        to,
      );
      await cursor.load();
      while (!cursor.done) {
        if (overlaps(near, cursor.block, cursor.end)) visit(cursor.seq);
        if (!cursor.step()) await cursor.load();
      }
    }
  }
}

function* clusters(ranges: readonly Blocks[]): Generator<readonly Blocks[]> {
  let near: Blocks[] = [];
  for (const range of ranges) {
    const last = near.at(-1);
    if (last !== undefined && range.from - last.to > NEAR_BLOCKS) {
      yield near;
      near = [];
    }
    near.push(range);
  }
  if (near.length > 0) yield near;
}

/** Whether one of `ranges` (ascending) has a block of [from, to). */
function overlaps(ranges: readonly Blocks[], from: number, to: number): boolean {
  let lo = 0;
  let hi = ranges.length;
  while (lo < hi) {
    const mid = (lo + hi) >>> 1;
    if ((ranges[mid]?.to ?? 0) <= from) lo = mid + 1;
    else hi = mid;
  }
  const first = ranges[lo];
  return first !== undefined && first.from < to;
}
