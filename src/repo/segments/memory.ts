/** A segment made of commits in memory: the journal's commits, seen by the same code as segments in the store. */
import { asBuffer } from '../../format/bytes.js';
import { CommitFlag, PointClass } from '../../format/commit.js';
import { encodeExtents, EXTENT_RECORD_BYTES, HOLE } from '../../format/extent.js';
import {
  COMMIT_RECORD_BYTES,
  CommitPage,
  COMMITS_PER_PAGE,
  commitPageTable,
  encodeCommitRecord,
  ExtentPage,
  EXTENTS_PER_PAGE,
  extentPageTable,
  MAX_SEGMENT_SPAN,
  PACK_ID_BYTES,
  pageTable,
  type SegmentIndex,
} from '../../format/segment.js';
import { PackTable } from './pack-table.js';
import type { JournalCommit, SegmentSource } from './source.js';

/**
 * `commits` ascending and without a gap, at least one; `prevHash` is the hash of the commit before the first. Throws RangeError
 * otherwise. Copies what it needs.
 */
export function memorySegment(
  commits: readonly JournalCommit[],
  prevHash: Buffer,
  name = 'journal',
): SegmentSource {
  const first = commits[0];
  const last = commits.at(-1);
  if (first === undefined || last === undefined) throw new RangeError('no commits');
  const firstSeq = first.firstSeq;
  if (last.seq - firstSeq > MAX_SEGMENT_SPAN) throw new RangeError('more than 2^32 commits');
  const packs = new PackTable();
  const extentPages = sortedPages(commits, firstSeq, packs);
  const commitPages: CommitPage[] = [];
  let before = firstSeq - 1;
  let lastFullFirstSeq = 0;
  for (let at = 0; at < commits.length; at += COMMITS_PER_PAGE) {
    const part = commits.slice(at, at + COMMITS_PER_PAGE);
    const bytes = Buffer.alloc(part.length * COMMIT_RECORD_BYTES);
    part.forEach((c, i) => {
      if (c.firstSeq !== before + 1 || c.seq !== c.record.seq || c.firstSeq !== c.record.firstSeq) {
        throw new RangeError(`${name}: commit ${c.firstSeq} to ${c.seq} after ${before}`);
      }
      if (c.full !== ((c.record.flags & CommitFlag.full) !== 0)) {
        throw new RangeError(`${name}: commit ${c.seq} is full and is not`);
      }
      before = c.seq;
      if ((c.record.flags & CommitFlag.full) !== 0) lastFullFirstSeq = c.firstSeq;
      const pack = packs.indexOf(Buffer.from(c.record.packId, 'hex'), 0);
      encodeCommitRecord(c.record, pack, bytes, i * COMMIT_RECORD_BYTES);
    });
    commitPages.push(new CommitPage(bytes));
  }
  const ids = packs.bytes;
  const idStrings: string[] = [];
  for (let at = 0; at < ids.length; at += PACK_ID_BYTES) {
    idStrings.push(ids.toString('hex', at, at + PACK_ID_BYTES));
  }
  const index = indexOf(
    extentPages,
    commitPages,
    packs.count,
    prevHash,
    last.record.hash,
    lastFullFirstSeq,
  );
  return {
    name,
    level: 0,
    firstSeq,
    lastSeq: last.seq,
    index,
    extentPage: (i) => Promise.resolve(entry(extentPages, i)),
    commitPage: (i) => Promise.resolve(entry(commitPages, i)),
    packId: (pack) => Promise.resolve(entry(idStrings, pack)),
  };
}

function entry<T>(list: readonly T[], i: number): T {
  const v = list[i];
  if (v === undefined) throw new RangeError(`no element ${i}`);
  return v;
}

/** All records with the pack indexes of `packs` and sequence numbers from `firstSeq`, by block and then by commit. */
function sortedPages(
  commits: readonly JournalCommit[],
  firstSeq: number,
  packs: PackTable,
): ExtentPage[] {
  const lists = commits.map((c) => {
    const bytes = Buffer.isBuffer(c.extents) ? c.extents : encodeExtents(c.extents);
    return new ExtentPage(asBuffer(bytes));
  });
  const total = lists.reduce((n, l) => n + l.length, 0);
  const all = Buffer.allocUnsafe(total * EXTENT_RECORD_BYTES);
  let at = 0;
  let greatestBlock = 0;
  commits.forEach((c, k) => {
    const list = entry(lists, k);
    const map = c.packIds.map((id) => packs.indexOf(Buffer.from(id, 'hex'), 0));
    list.bytes.copy(all, at);
    for (let i = 0; i < list.length; i++, at += EXTENT_RECORD_BYTES) {
      const pack = list.pack(i);
      const seq = c.firstSeq + list.seq(i);
      if (seq > c.seq) throw new RangeError(`commit ${c.seq} has an extent of commit ${seq}`);
      all.writeUInt32LE(seq - firstSeq, at + 12);
      all.writeUInt32LE(pack === HOLE ? HOLE : entry(map, pack), at + 16);
      greatestBlock = Math.max(greatestBlock, list.block(i));
    }
  });
  const records = new ExtentPage(all);
  // Records were taken in the order of commits, and no commit names a block twice, so position breaks ties as the
  // sequence number would; both fit one number, which sorts without calls.
  const order = new Float64Array(total);
  if ((greatestBlock + 1) * total <= Number.MAX_SAFE_INTEGER) {
    for (let i = 0; i < total; i++) order[i] = records.block(i) * total + i;
    order.sort();
    for (let i = 0; i < total; i++) order[i] = (order[i] ?? 0) % total;
  } else {
    for (let i = 0; i < total; i++) order[i] = i;
    order.sort((a, b) => records.block(a) - records.block(b) || a - b);
  }
  const pages: ExtentPage[] = [];
  for (let from = 0; from < total; from += EXTENTS_PER_PAGE) {
    const n = Math.min(EXTENTS_PER_PAGE, total - from);
    const bytes = Buffer.allocUnsafe(n * EXTENT_RECORD_BYTES);
    for (let i = 0; i < n; i++) {
      const record = (order[from + i] ?? 0) * EXTENT_RECORD_BYTES;
      all.copy(bytes, i * EXTENT_RECORD_BYTES, record, record + EXTENT_RECORD_BYTES);
    }
    pages.push(new ExtentPage(bytes));
  }
  return pages;
}

function indexOf(
  extentPages: readonly ExtentPage[],
  commitPages: readonly CommitPage[],
  packCount: number,
  prevHash: Buffer,
  lastHash: Buffer,
  lastFullFirstSeq: number,
): SegmentIndex {
  const extents = extentPageTable(extentPages.length);
  let extentCount = 0;
  extentPages.forEach((page, p) => {
    let end = 0;
    for (let i = 0; i < page.length; i++) end = Math.max(end, page.block(i) + page.count(i));
    extents.number[p] = p;
    extents.records[p] = page.length;
    extents.firstBlock[p] = page.block(0);
    extents.endBlock[p] = end;
    extentCount += page.length;
  });
  const commits = commitPageTable(commitPages.length);
  let commitCount = 0;
  commitPages.forEach((page, p) => {
    commits.number[p] = p;
    commits.records[p] = page.length;
    commits.firstSeq[p] = page.seq(0);
    let least = page.instantNs(0);
    let greatest = least;
    for (let i = 0; i < page.length; i++) {
      const t = page.instantNs(i);
      if (t < least) least = t;
      if (t > greatest) greatest = t;
      if (page.pointClass(i) >= PointClass.crash) commits.points[p] = (commits.points[p] ?? 0) + 1;
    }
    commits.leastInstantNs[p] = least;
    commits.greatestInstantNs[p] = greatest;
    commitCount += page.length;
  });
  return {
    extents,
    commits,
    packs: pageTable(0),
    packCount,
    extentCount,
    commitCount,
    prevHash: Buffer.from(prevHash),
    lastHash: Buffer.from(lastHash),
    lastFullFirstSeq,
  };
}
