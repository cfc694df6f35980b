/** What the resolver, the timeline, merging and the chain checks need of a range of commits. */
import type { Extent } from '../../format/extent.js';
import type {
  CommitPage,
  CommitRecord,
  ExtentPage,
  SegmentIndex,
  StoredCommit,
} from '../../format/segment.js';

/**
 * The extents and commit records of a range of commits, in pages: a segment in a store, or one made of commits in
 * memory. Records hold sequence numbers from `firstSeq`. Pages are immutable and shared.
 */
export interface SegmentSource {
  /** The object's name, or what else it is, for errors. */
  readonly name: string;
  /** Undefined for a full map. */
  readonly level: number | undefined;
  readonly firstSeq: number;
  readonly lastSeq: number;
  readonly index: SegmentIndex;
  /** Extents page `i`. `keep` false: do not push out cached pages for it. */
  extentPage(i: number, keep?: boolean): Promise<ExtentPage>;
  commitPage(i: number, keep?: boolean): Promise<CommitPage>;
  /** Id `pack` of the pack table, 32 hex digits. The same string object for the same pack while it is cached. */
  packId(pack: number): Promise<string>;
}

/** A commit that is not in a segment yet (level 0), decoded. */
export interface JournalCommit {
  readonly seq: number;
  /** First sequence number it stands for. */
  readonly firstSeq: number;
  /** Blocks not named are zeros, whatever came before. */
  readonly full: boolean;
  /** The commit's pack table, 32 hex digits each. */
  readonly packIds: readonly string[];
  /**
   * The whole list (extents frames and commit), ascending without overlap; `seq` counts from `firstSeq`, `pack` indexes
   * `packIds`. As decoded records, or as the records' bytes one after the other.
   */
  readonly extents: readonly Extent[] | Buffer;
  readonly record: CommitRecord;
}

/** `stored` with its pack's id in place of the index; its memory is its own. */
export async function commitRecordOf(
  source: SegmentSource,
  stored: StoredCommit,
): Promise<CommitRecord> {
  const { pack, ...fields } = stored;
  return { ...fields, hash: Buffer.from(stored.hash), packId: await source.packId(pack) };
}

/** Index of the last commits page of `source` that can hold commit `seq`, or −1. */
export function commitPageOf(source: SegmentSource, seq: number): number {
  const t = source.index.commits;
  let lo = 0;
  let hi = t.length;
  while (lo < hi) {
    const mid = (lo + hi) >>> 1;
    if ((t.firstSeq[mid] ?? 0) <= seq) lo = mid + 1;
    else hi = mid;
  }
  return lo - 1;
}

/** The commit record with sequence number `seq`, or undefined if there is none (it may be part of a merged one). */
export async function findCommit(
  source: SegmentSource,
  seq: number,
): Promise<StoredCommit | undefined> {
  const p = commitPageOf(source, seq);
  if (p < 0) return undefined;
  const page = await source.commitPage(p);
  const i = page.lowerBound(seq);
  return i < page.length && page.seq(i) === seq ? page.record(i) : undefined;
}
