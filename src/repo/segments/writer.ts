/** Writes segments (FORMAT.md section 7) as a stream, in bounded memory. */
import { EXTENT_RECORD_BYTES, HOLE, STRIPE_BLOCKS } from '../../format/extent.js';
import { CommitFlag, PointClass } from '../../format/commit.js';
import { segmentName, type SegmentName } from '../../format/names.js';
import type { KeyRing, Sealer } from '../../format/seal.js';
import {
  COMMIT_RECORD_BYTES,
  COMMITS_PER_PAGE,
  commitPageTable,
  encodeCommitRecord,
  encodeSegmentHeader,
  encodeSegmentIndex,
  encodeSegmentTrailer,
  EXTENTS_PER_PAGE,
  extentPageTable,
  PACK_ID_BYTES,
  PACK_IDS_PER_PAGE,
  PAGE_HEADER_BYTES,
  PageType,
  pageTable,
  sealPage,
  type CommitFields,
  type PageTable,
  type SegmentIndex,
} from '../../format/segment.js';
import type { Store } from '../store.js';
import { PackTable } from './pack-table.js';
import { commitPageOf, type SegmentSource } from './source.js';

/** What one segment is written with. */
export interface SegmentTarget {
  readonly store: Store;
  readonly keys: KeyRing;
  readonly repositoryId: string;
  readonly volumeId: string;
  /** Blocks of a full chunk (chunkBytes / 4096). */
  readonly chunkBlocks: number;
  /** 16 random bytes, for this segment alone. */
  readonly salt: Uint8Array;
  readonly createdNs: bigint;
}

/** Which segment: `level` undefined is a full map (then `firstSeq` is 1). */
export interface SegmentRange {
  readonly level: number | undefined;
  readonly firstSeq: number;
  readonly lastSeq: number;
}

/** A list of column values that grows; page tables are made of these at the end. */
class PageRows {
  readonly offset: number[] = [];
  readonly number: number[] = [];
  readonly records: number[] = [];
  readonly stored: number[] = [];

  fill(t: PageTable): void {
    t.offset.set(this.offset);
    t.number.set(this.number);
    t.records.set(this.records);
    t.stored.set(this.stored);
  }
}

/**
 * Builds one segment. Calls: `addExtent` for all extents (ascending by block, then by sequence number), then `addCommit` for all
 * commits (ascending); `take` now and then for the bytes that are ready; `finish` for the rest. Everything that the
 * format demands is checked here: RangeError means a bug in the caller, and no segment is written.
 */
export class SegmentBuilder {
  readonly #header: Buffer;
  readonly #sealer: Sealer;
  readonly #range: SegmentRange;
  readonly #prevHash: Buffer;
  readonly #packs = new PackTable();
  readonly #extentPage = Buffer.allocUnsafe(EXTENTS_PER_PAGE * EXTENT_RECORD_BYTES);
  readonly #commitPage = Buffer.allocUnsafe(COMMITS_PER_PAGE * COMMIT_RECORD_BYTES);
  readonly #extentRows = new PageRows();
  readonly #firstBlocks: number[] = [];
  readonly #endBlocks: number[] = [];
  readonly #commitRows = new PageRows();
  readonly #firstSeqs: number[] = [];
  readonly #least: bigint[] = [];
  readonly #greatest: bigint[] = [];
  readonly #points: number[] = [];
  readonly #packRows = new PageRows();
  #ready: Buffer[] = [];
  #offset = 0;
  #pages = 0;
  #extents = 0;
  #pageExtents = 0;
  #pageFirst = 0;
  #pageEnd = 0;
  #lastBlock = -1;
  #lastExtentSeq = 0;
  #lastEnd = 0;
  #commits = 0;
  #pageCommits = 0;
  #lastSeq: number;
  #lastHash: Buffer | undefined;
  #lastFullFirstSeq = 0;
  #finished = false;

  /** `prevHash`: of the commit before the range (zeros for the first, and for a full map). */
  constructor(target: SegmentTarget, range: SegmentRange, prevHash: Buffer) {
    const salt = Buffer.from(target.salt);
    this.#range = range;
    this.#prevHash = Buffer.from(prevHash);
    this.#header = encodeSegmentHeader({
      volumeId: target.volumeId,
      repositoryId: target.repositoryId,
      encrypted: target.keys.encrypted,
      level: range.level,
      firstSeq: range.firstSeq,
      lastSeq: range.lastSeq,
      salt,
      createdNs: target.createdNs,
    });
    this.#sealer = target.keys.segmentSealer(salt);
    this.#lastSeq = range.firstSeq - 1;
    this.#emit(this.#header);
  }

  /** The index in this segment's pack table of the 16-byte id at `at` of `id`. */
  packIndex(id: Buffer, at = 0): number {
    return this.#packs.indexOf(id, at);
  }

  /** `seq` is absolute (ignored in a full map); `pack` from {@link SegmentBuilder.packIndex}, or HOLE. */
  addExtent(
    block: number,
    count: number,
    seq: number,
    pack: number,
    frame: number,
    sub: number,
    skip: number,
  ): void {
    if (this.#commits > 0) throw new RangeError('segment: an extent after the commits');
    const full = this.#range.level === undefined;
    const relative = full ? 0 : seq - this.#range.firstSeq;
    if (relative < 0 || (!full && seq > this.#range.lastSeq)) {
      throw new RangeError(`segment: extent of commit ${seq} outside its range`);
    }
    if (count < 1 || (block % STRIPE_BLOCKS) + count > STRIPE_BLOCKS) {
      throw new RangeError(`segment: extent of ${count} blocks at ${block} crosses a stripe`);
    }
    if (
      block < this.#lastBlock ||
      (block === this.#lastBlock && relative <= this.#lastExtentSeq) ||
      (full && (block < this.#lastEnd || pack === HOLE))
    ) {
      throw new RangeError(`segment: extent at block ${block} of commit ${seq} out of order`);
    }
    if (pack !== HOLE && pack >= this.#packs.count) throw new RangeError('segment: no such pack');
    this.#lastBlock = block;
    this.#lastExtentSeq = relative;
    this.#lastEnd = block + count;
    if (this.#pageExtents === 0) {
      this.#pageFirst = block;
      this.#pageEnd = 0;
    }
    if (this.#lastEnd > this.#pageEnd) this.#pageEnd = this.#lastEnd;
    const page = this.#extentPage;
    const at = this.#pageExtents * EXTENT_RECORD_BYTES;
    page.writeUInt32LE(block % 0x1_0000_0000, at);
    page.writeUInt32LE(Math.floor(block / 0x1_0000_0000), at + 4);
    page.writeUInt32LE(count, at + 8);
    page.writeUInt32LE(relative, at + 12);
    page.writeUInt32LE(pack, at + 16);
    page.writeUInt32LE(frame, at + 20);
    page.writeUInt16LE(sub, at + 24);
    page.writeUInt16LE(skip, at + 26);
    this.#extents++;
    this.#pageExtents++;
    if (this.#pageExtents === EXTENTS_PER_PAGE) this.#closeExtentPage();
  }

  /** `pack` from {@link SegmentBuilder.packIndex}. */
  addCommit(c: CommitFields, pack: number): void {
    const expected =
      this.#range.level === undefined
        ? c.seq === this.#range.lastSeq && this.#commits === 0
        : c.firstSeq === this.#lastSeq + 1;
    if (!expected || c.seq > this.#range.lastSeq) {
      throw new RangeError(`segment: commit ${c.firstSeq} to ${c.seq} after ${this.#lastSeq}`);
    }
    if (pack >= this.#packs.count) throw new RangeError('segment: no such pack');
    if (this.#pageExtents > 0) this.#closeExtentPage();
    encodeCommitRecord(c, pack, this.#commitPage, this.#pageCommits * COMMIT_RECORD_BYTES);
    const p = this.#commitRows.number.length;
    if (this.#pageCommits === 0) {
      this.#firstSeqs.push(c.seq);
      this.#least.push(c.instantNs);
      this.#greatest.push(c.instantNs);
      this.#points.push(0);
    }
    if (c.instantNs < (this.#least[p] ?? 0n)) this.#least[p] = c.instantNs;
    if (c.instantNs > (this.#greatest[p] ?? 0n)) this.#greatest[p] = c.instantNs;
    if (c.pointClass >= PointClass.crash) this.#points[p] = (this.#points[p] ?? 0) + 1;
    if ((c.flags & CommitFlag.full) !== 0) this.#lastFullFirstSeq = c.firstSeq;
    this.#lastSeq = c.seq;
    this.#lastHash = Buffer.from(c.hash);
    this.#commits++;
    this.#pageCommits++;
    if (this.#pageCommits === COMMITS_PER_PAGE) this.#closeCommitPage();
  }

  /** The bytes that are ready, in order. */
  take(): Buffer[] {
    const ready = this.#ready;
    this.#ready = [];
    return ready;
  }

  /** Closes the segment; the last bytes. */
  finish(): Buffer[] {
    if (this.#finished) throw new RangeError('segment: finished twice');
    this.#finished = true;
    if (this.#lastSeq !== this.#range.lastSeq || this.#lastHash === undefined) {
      throw new RangeError(`segment: commits end at ${this.#lastSeq}, not ${this.#range.lastSeq}`);
    }
    if (this.#pageCommits > 0) this.#closeCommitPage();
    const ids = this.#packs.bytes;
    const pageBytes = PACK_IDS_PER_PAGE * PACK_ID_BYTES;
    for (let at = 0; at < ids.length; at += pageBytes) {
      const plain = ids.subarray(at, at + pageBytes);
      this.#page(PageType.packIds, plain, plain.length / PACK_ID_BYTES, this.#packRows);
    }
    const indexOffset = this.#offset;
    const index: SegmentIndex = {
      extents: extentPageTable(this.#extentRows.number.length),
      commits: commitPageTable(this.#commitRows.number.length),
      packs: pageTable(this.#packRows.number.length),
      packCount: this.#packs.count,
      extentCount: this.#extents,
      commitCount: this.#commits,
      prevHash: this.#prevHash,
      lastHash: this.#lastHash,
      lastFullFirstSeq: this.#lastFullFirstSeq,
    };
    this.#extentRows.fill(index.extents);
    index.extents.firstBlock.set(this.#firstBlocks);
    index.extents.endBlock.set(this.#endBlocks);
    this.#commitRows.fill(index.commits);
    index.commits.firstSeq.set(this.#firstSeqs);
    index.commits.leastInstantNs.set(this.#least);
    index.commits.greatestInstantNs.set(this.#greatest);
    index.commits.points.set(this.#points);
    this.#packRows.fill(index.packs);
    const plain = encodeSegmentIndex(index);
    this.#emit(sealPage(this.#sealer, this.#header, PageType.index, this.#pages++, plain));
    this.#emit(encodeSegmentTrailer(indexOffset));
    return this.take();
  }

  #closeExtentPage(): void {
    const plain = this.#extentPage.subarray(0, this.#pageExtents * EXTENT_RECORD_BYTES);
    this.#page(PageType.extents, plain, this.#pageExtents, this.#extentRows);
    this.#firstBlocks.push(this.#pageFirst);
    this.#endBlocks.push(this.#pageEnd);
    this.#pageExtents = 0;
  }

  #closeCommitPage(): void {
    const plain = this.#commitPage.subarray(0, this.#pageCommits * COMMIT_RECORD_BYTES);
    this.#page(PageType.commits, plain, this.#pageCommits, this.#commitRows);
    this.#pageCommits = 0;
  }

  #page(type: PageType, plain: Buffer, records: number, rows: PageRows): void {
    const number = this.#pages++;
    const page = sealPage(this.#sealer, this.#header, type, number, plain);
    rows.offset.push(this.#offset);
    rows.number.push(number);
    rows.records.push(records);
    rows.stored.push(page.length - PAGE_HEADER_BYTES);
    this.#emit(page);
  }

  #emit(bytes: Buffer): void {
    this.#ready.push(bytes);
    this.#offset += bytes.length;
  }
}

/**
 * Puts a segment: `fill` feeds the builder and yields (anything) whenever finished pages may be handed to the store. No
 * object appears unless `fill` runs to its end. Resolves to the object's name.
 */
export async function putSegment(
  target: SegmentTarget,
  range: SegmentRange,
  prevHash: Buffer,
  fill: (builder: SegmentBuilder) => AsyncIterable<unknown>,
): Promise<string> {
  const parsed: SegmentName = { volumeId: target.volumeId, ...range };
  const name = segmentName(parsed);
  async function* parts(): AsyncGenerator<Uint8Array> {
    const builder = new SegmentBuilder(target, range, prevHash);
    for await (const _ of fill(builder)) yield* builder.take();
    yield* builder.finish();
  }
  await target.store.putStream(name, parts());
  return name;
}

/** Adds the commit records of `source` that lie in (afterSeq, uptoSeq], and yields after each page. */
export async function* copyCommits(
  builder: SegmentBuilder,
  source: SegmentSource,
  afterSeq: number,
  uptoSeq: number,
): AsyncGenerator<void> {
  const pages = source.index.commits.length;
  const map = new PackMap(builder, source);
  for (let p = Math.max(0, commitPageOf(source, afterSeq + 1)); p < pages; p++) {
    const page = await source.commitPage(p, false);
    for (let i = page.lowerBound(afterSeq + 1); i < page.length; i++) {
      const c = page.record(i);
      if (c.seq > uptoSeq) return;
      builder.addCommit(c, map.known(c.pack) ?? (await map.learn(c.pack)));
    }
    yield;
  }
}

/** From the pack indexes of a source to those of a segment being built; only packs that are named get one. */
export class PackMap {
  readonly #builder: SegmentBuilder;
  readonly #source: SegmentSource;
  readonly #map: Uint32Array;

  constructor(builder: SegmentBuilder, source: SegmentSource) {
    this.#builder = builder;
    this.#source = source;
    this.#map = new Uint32Array(source.index.packCount).fill(HOLE);
  }

  /** Undefined: `learn` it first. */
  known(pack: number): number | undefined {
    if (pack === HOLE) return HOLE;
    const index = this.#map[pack];
    return index === HOLE ? undefined : index;
  }

  async learn(pack: number): Promise<number> {
    const index = this.#builder.packIndex(Buffer.from(await this.#source.packId(pack), 'hex'));
    this.#map[pack] = index;
    return index;
  }
}

/**
 * Puts `source` (of {@link memorySegment}) as a segment of level 0. Resolves to the object's name. The packs it names must be sealed
 * (FORMAT.md 6.6).
 */
export function putMemorySegment(target: SegmentTarget, source: SegmentSource): Promise<string> {
  const range: SegmentRange = { level: 0, firstSeq: source.firstSeq, lastSeq: source.lastSeq };
  return putSegment(target, range, source.index.prevHash, async function* (builder) {
    const map = new PackMap(builder, source);
    for (let p = 0; p < source.index.extents.length; p++) {
      const page = await source.extentPage(p);
      for (let i = 0; i < page.length; i++) {
        const pack = map.known(page.pack(i)) ?? (await map.learn(page.pack(i)));
        const seq = source.firstSeq + page.seq(i);
        builder.addExtent(
          page.block(i),
          page.count(i),
          seq,
          pack,
          page.frame(i),
          page.sub(i),
          page.skip(i),
        );
      }
      yield;
    }
    yield* copyCommits(builder, source, source.firstSeq - 1, source.lastSeq);
  });
}
