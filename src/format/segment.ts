/** Segments (FORMAT.md section 7): the sorted extents of a range of commits, in sealed pages. */
import { crc32 } from 'node:zlib';
import { lz4 } from '../lz4.js';
import { checkZero, damaged, readU64, writeU64 } from './bytes.js';
import { CommitFlag, Coverage, coverageOf, pointClassOf, PointClass } from './commit.js';
import { EXTENT_RECORD_BYTES, HOLE, STRIPE_BLOCKS } from './extent.js';
import type { SegmentName } from './names.js';
import { newerVersion } from './pack.js';
import { numberNonce, SEAL_BYTES, type Sealer } from './seal.js';

/** "B2SEG" and three zeros; do not change. */
const SEGMENT_MAGIC = Buffer.from('4232534547000000', 'hex');
/** "B2SE"; do not change. */
const TRAILER_MAGIC = 0x4553_3242;
export const SEGMENT_VERSION = 1;
export const SEGMENT_HEADER_BYTES = 96;
export const SEGMENT_TRAILER_BYTES = 16;
export const PAGE_HEADER_BYTES = 16;
export const COMMIT_RECORD_BYTES = 112;
export const PACK_ID_BYTES = 16;
/** Bytes of the index before its tables. */
export const INDEX_FIXED_BYTES = 112;
export const EXTENTS_PER_PAGE = 4096;
export const COMMITS_PER_PAGE = 1024;
export const PACK_IDS_PER_PAGE = 4096;
/** Two hexadecimal digits in the object's name. */
export const MAX_SEGMENT_LEVEL = 255;
/** `LAST - FIRST` at most: records hold sequence numbers as 32 bits from FIRST. */
export const MAX_SEGMENT_SPAN = 0xffff_ffff;
/** Plain bytes of a page at most; an index of this size describes 26 billion extents. */
export const MAX_PAGE_BYTES = 256 * 1024 * 1024;

export const PageType = { extents: 1, commits: 2, packIds: 3, index: 4 } as const;
export type PageType = (typeof PageType)[keyof typeof PageType];

const FLAG_ENCRYPTED = 1;
const FLAG_FULL_MAP = 2;

export interface SegmentHeader extends SegmentName {
  readonly encrypted: boolean;
  /** 32 hex digits. */
  readonly repositoryId: string;
  /** 16 random bytes, never used for two segments. */
  readonly salt: Buffer;
  readonly createdNs: bigint;
}

function rangeProblem(n: SegmentName): string | undefined {
  if (n.firstSeq < 1 || n.lastSeq < n.firstSeq)
    return `sequence numbers ${n.firstSeq} to ${n.lastSeq}`;
  if (n.level === undefined)
    return n.firstSeq === 1 ? undefined : 'a full map that is not from 1 on';
  if (!Number.isInteger(n.level) || n.level < 0 || n.level > MAX_SEGMENT_LEVEL)
    return `level ${n.level}`;
  return n.lastSeq - n.firstSeq > MAX_SEGMENT_SPAN ? 'more than 2^32 sequence numbers' : undefined;
}

export function encodeSegmentHeader(h: SegmentHeader): Buffer {
  const problem = rangeProblem(h);
  if (problem !== undefined) throw new RangeError(`segment: ${problem}`);
  const out = Buffer.alloc(SEGMENT_HEADER_BYTES);
  SEGMENT_MAGIC.copy(out, 0);
  out.writeUInt16LE(SEGMENT_VERSION, 8);
  out.writeUInt16LE(
    (h.encrypted ? FLAG_ENCRYPTED : 0) | (h.level === undefined ? FLAG_FULL_MAP : 0),
    10,
  );
  out.writeUInt32LE(h.level ?? 0, 12);
  writeId(h.volumeId, out, 16);
  writeId(h.repositoryId, out, 32);
  if (h.salt.length !== 16) throw new RangeError('a salt is 16 bytes');
  h.salt.copy(out, 48);
  writeU64(out, h.firstSeq, 64);
  writeU64(out, h.lastSeq, 72);
  out.writeBigUInt64LE(h.createdNs, 80);
  out.writeUInt32LE(crc32(out.subarray(0, 92)), 92);
  return out;
}

/** Decodes and validates; `what` names the object in errors (kind `damaged`, or `unsupported` for a newer version). */
export function decodeSegmentHeader(buf: Buffer, what: string): SegmentHeader {
  if (buf.length < SEGMENT_HEADER_BYTES) throw damaged(what, 0, 'the segment header is cut off');
  if (!buf.subarray(0, 8).equals(SEGMENT_MAGIC)) throw damaged(what, 0, 'not a segment');
  if (buf.readUInt32LE(92) !== crc32(buf.subarray(0, 92))) {
    throw damaged(what, 92, 'the checksum of the segment header is wrong');
  }
  const version = buf.readUInt16LE(8);
  if (version !== SEGMENT_VERSION) throw newerVersion(what, version);
  checkZero(buf, 88, 92, what);
  const flags = buf.readUInt16LE(10);
  if ((flags & ~(FLAG_ENCRYPTED | FLAG_FULL_MAP)) !== 0)
    throw damaged(what, 10, `unknown flags ${flags}`);
  const level = buf.readUInt32LE(12);
  const fullMap = (flags & FLAG_FULL_MAP) !== 0;
  if (fullMap && level !== 0) throw damaged(what, 12, `a full map of level ${level}`);
  const header: SegmentHeader = {
    encrypted: (flags & FLAG_ENCRYPTED) !== 0,
    level: fullMap ? undefined : level,
    volumeId: buf.toString('hex', 16, 32),
    repositoryId: buf.toString('hex', 32, 48),
    salt: Buffer.from(buf.subarray(48, 64)),
    firstSeq: readU64(buf, 64, what),
    lastSeq: readU64(buf, 72, what),
    createdNs: buf.readBigUInt64LE(80),
  };
  const problem = rangeProblem(header);
  if (problem !== undefined) throw damaged(what, 12, problem);
  return header;
}

export interface PageHeader {
  readonly type: PageType;
  /** 0 none, 1 LZ4. */
  readonly compression: 0 | 1;
  readonly number: number;
  /** Bytes after the page header. */
  readonly storedBytes: number;
  /** Bytes of the body before compression. */
  readonly plainBytes: number;
}

function encodePageHeader(h: PageHeader): Buffer {
  const out = Buffer.alloc(PAGE_HEADER_BYTES);
  out[0] = h.type;
  out[1] = h.compression;
  out.writeUInt32LE(h.number, 4);
  out.writeUInt32LE(h.storedBytes, 8);
  out.writeUInt32LE(h.plainBytes, 12);
  return out;
}

/** Decodes the header of the page at `at` of the segment, which starts `buf`. */
export function decodePageHeader(buf: Buffer, what: string, at: number): PageHeader {
  if (buf.length < PAGE_HEADER_BYTES) throw damaged(what, at, 'the page header is cut off');
  const type = buf[0];
  const compression = buf[1];
  if (type !== 1 && type !== 2 && type !== 3 && type !== 4)
    throw damaged(what, at, `unknown page type ${type}`);
  if (compression !== 0 && compression !== 1)
    throw damaged(what, at, `unknown compression ${compression}`);
  if (buf.readUInt16LE(2) !== 0) throw damaged(what, at + 2, 'a reserved byte is not zero');
  const storedBytes = buf.readUInt32LE(8);
  const plainBytes = buf.readUInt32LE(12);
  if (
    plainBytes > MAX_PAGE_BYTES ||
    storedBytes < SEAL_BYTES ||
    storedBytes > plainBytes + SEAL_BYTES ||
    (compression === 0 && storedBytes !== plainBytes + SEAL_BYTES)
  ) {
    throw damaged(what, at, 'the lengths in the page header contradict each other');
  }
  return { type, compression, number: buf.readUInt32LE(4), storedBytes, plainBytes };
}

/** Compresses where that gains, seals, and returns page header and sealed body. `header` is the segment's 96 bytes. */
export function sealPage(
  sealer: Sealer,
  header: Buffer,
  type: PageType,
  number: number,
  plain: Uint8Array,
): Buffer {
  if (plain.byteLength > MAX_PAGE_BYTES)
    throw new RangeError(`a page of ${plain.byteLength} bytes`);
  // Less than an eighth gained is not worth the decompression of every read.
  const packed = Buffer.allocUnsafe(plain.byteLength - (plain.byteLength >>> 3));
  const packedBytes = lz4().compress(plain, packed);
  const body = packedBytes > 0 ? packed.subarray(0, packedBytes) : plain;
  const pageHeader = encodePageHeader({
    type,
    compression: packedBytes > 0 ? 1 : 0,
    number,
    storedBytes: body.byteLength + SEAL_BYTES,
    plainBytes: plain.byteLength,
  });
  const out = Buffer.allocUnsafe(PAGE_HEADER_BYTES + body.byteLength + SEAL_BYTES);
  pageHeader.copy(out, 0);
  const aad = Buffer.concat([header, pageHeader]);
  sealer.sealInto(numberNonce(number), aad, [body], out, PAGE_HEADER_BYTES);
  return out;
}

/**
 * Opens the page that `page` (header and sealed body, exactly) is, which must be of `type` and have `number`. The result has
 * memory of its own. `what` names the object and `at` the page's offset in it, for errors (kind `damaged`).
 */
export function openPage(
  sealer: Sealer,
  header: Buffer,
  type: PageType,
  number: number,
  page: Buffer,
  what: string,
  at: number,
): Buffer {
  const h = decodePageHeader(page, what, at);
  if (h.type !== type || h.number !== number) {
    throw damaged(
      what,
      at,
      `page ${h.number} of type ${h.type} where page ${number} of type ${type} belongs`,
    );
  }
  if (page.length !== PAGE_HEADER_BYTES + h.storedBytes)
    throw damaged(what, at, 'the page has another length');
  const aad = Buffer.concat([header, page.subarray(0, PAGE_HEADER_BYTES)]);
  const body = sealer.open(numberNonce(number), aad, page.subarray(PAGE_HEADER_BYTES));
  if (body === undefined)
    throw damaged(what, at, `page ${number} does not open: its bytes have changed`);
  if (h.compression === 0) return Buffer.from(body);
  const plain = Buffer.allocUnsafeSlow(h.plainBytes);
  if (!lz4().decompress(body, plain)) throw damaged(what, at, `page ${number} does not decompress`);
  return plain;
}

/** The fields of a commit record that do not depend on a pack table. */
export interface CommitFields {
  readonly seq: number;
  /** First sequence number it stands for. */
  readonly firstSeq: number;
  readonly pointClass: PointClass;
  /** Of the time since the commit before. */
  readonly coverage: Coverage;
  /** {@link CommitFlag}. */
  readonly flags: number;
  readonly epoch: number;
  readonly instantNs: bigint;
  readonly startedNs: bigint;
  readonly writtenNs: bigint;
  /** Size of the device at the instant. */
  readonly sizeBytes: number;
  /** Its hash in the chain, 32 bytes. */
  readonly hash: Buffer;
  /** Number of the commit's frame in its pack. */
  readonly frame: number;
  /** Blocks replaced. */
  readonly blocks: number;
  /** Bytes of the chunks first stored for this commit, as stored. */
  readonly storedBytes: number;
}

/** A commit record (7.3) with its pack by id. */
export interface CommitRecord extends CommitFields {
  /** Pack of the commit's frame, 32 hex digits. */
  readonly packId: string;
}

/** A commit record as it is in a page: the pack is an index in the segment's pack table. */
export interface StoredCommit extends CommitFields {
  readonly pack: number;
}

function commitProblem(c: CommitFields): string | undefined {
  if (c.firstSeq < 1 || c.firstSeq > c.seq)
    return `commit ${c.seq} stands for those from ${c.firstSeq} on`;
  if ((c.flags & ~(CommitFlag.full | CommitFlag.merged)) !== 0)
    return `commit ${c.seq} has flags ${c.flags}`;
  if (c.firstSeq !== c.seq && (c.flags & CommitFlag.merged) === 0) {
    return `commit ${c.seq} stands for several and is not merged`;
  }
  return undefined;
}

export function encodeCommitRecord(c: CommitFields, pack: number, into: Buffer, at: number): void {
  const problem = commitProblem(c);
  if (problem !== undefined) throw new RangeError(problem);
  if (c.hash.length !== 32) throw new RangeError('a hash is 32 bytes');
  writeU64(into, c.seq, at);
  writeU64(into, c.firstSeq, at + 8);
  into[at + 16] = c.pointClass;
  into[at + 17] = c.coverage;
  into.writeUInt16LE(c.flags, at + 18);
  into.writeUInt32LE(c.epoch, at + 20);
  into.writeBigUInt64LE(c.instantNs, at + 24);
  into.writeBigUInt64LE(c.startedNs, at + 32);
  into.writeBigUInt64LE(c.writtenNs, at + 40);
  writeU64(into, c.sizeBytes, at + 48);
  c.hash.copy(into, at + 56);
  into.writeUInt32LE(pack, at + 88);
  into.writeUInt32LE(c.frame, at + 92);
  writeU64(into, c.blocks, at + 96);
  writeU64(into, c.storedBytes, at + 104);
}

/** Decodes record `at` bytes into a commits page; the hash shares memory with `page`. */
export function decodeCommitRecord(page: Buffer, at: number, what: string): StoredCommit {
  const c: StoredCommit = {
    seq: readU64(page, at, what),
    firstSeq: readU64(page, at + 8, what),
    pointClass: pointClassOf(page.readUInt8(at + 16), what),
    coverage: coverageOf(page.readUInt8(at + 17), what),
    flags: page.readUInt16LE(at + 18),
    epoch: page.readUInt32LE(at + 20),
    instantNs: page.readBigUInt64LE(at + 24),
    startedNs: page.readBigUInt64LE(at + 32),
    writtenNs: page.readBigUInt64LE(at + 40),
    sizeBytes: readU64(page, at + 48, what),
    hash: page.subarray(at + 56, at + 88),
    pack: page.readUInt32LE(at + 88),
    frame: page.readUInt32LE(at + 92),
    blocks: readU64(page, at + 96, what),
    storedBytes: readU64(page, at + 104, what),
  };
  const problem = commitProblem(c);
  if (problem !== undefined) throw damaged(what, at, problem);
  return c;
}

/** Where the pages of one type are, as columns; entry i is page i of that type in ascending order. */
export interface PageTable {
  readonly length: number;
  /** Offset of the page header in the object. */
  readonly offset: Float64Array;
  /** The page's number in the file. */
  readonly number: Uint32Array;
  /** Records or pack ids in the page. */
  readonly records: Uint32Array;
  /** Bytes after the page header. */
  readonly stored: Uint32Array;
}

export interface ExtentPageTable extends PageTable {
  readonly firstBlock: Float64Array;
  /** The greatest block + count of the page. */
  readonly endBlock: Float64Array;
}

export interface CommitPageTable extends PageTable {
  readonly firstSeq: Float64Array;
  readonly leastInstantNs: BigUint64Array;
  readonly greatestInstantNs: BigUint64Array;
  /** Recovery points of class 2 or more. */
  readonly points: Uint32Array;
}

/** The index page (7.4). */
export interface SegmentIndex {
  readonly extents: ExtentPageTable;
  readonly commits: CommitPageTable;
  readonly packs: PageTable;
  /** Ids in the pack table. */
  readonly packCount: number;
  readonly extentCount: number;
  readonly commitCount: number;
  /** Of the commit before the segment's first, 32 bytes. */
  readonly prevHash: Buffer;
  /** Of the segment's last commit, 32 bytes. */
  readonly lastHash: Buffer;
  /** First sequence number of the last commit with flag full; 0 if there is none. */
  readonly lastFullFirstSeq: number;
}

/** Tables with room for `length` pages each. */
export function pageTable(length: number): PageTable {
  return {
    length,
    offset: new Float64Array(length),
    number: new Uint32Array(length),
    records: new Uint32Array(length),
    stored: new Uint32Array(length),
  };
}

export function extentPageTable(length: number): ExtentPageTable {
  return {
    ...pageTable(length),
    firstBlock: new Float64Array(length),
    endBlock: new Float64Array(length),
  };
}

export function commitPageTable(length: number): CommitPageTable {
  return {
    ...pageTable(length),
    firstSeq: new Float64Array(length),
    leastInstantNs: new BigUint64Array(length),
    greatestInstantNs: new BigUint64Array(length),
    points: new Uint32Array(length),
  };
}

const EXTENT_ENTRY_BYTES = 40;
const COMMIT_ENTRY_BYTES = 48;
const PACK_ENTRY_BYTES = 24;

/** The high half of a u64 at most, for those that are numbers here. */
const MAX_HIGH = 0x1f_ffff;

function viewOf(bytes: Buffer): DataView {
  return new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
}

/** The plain body of the index page. */
export function encodeSegmentIndex(x: SegmentIndex): Buffer {
  const a = x.extents.length;
  const b = x.commits.length;
  const d = x.packs.length;
  const out = Buffer.alloc(
    INDEX_FIXED_BYTES + EXTENT_ENTRY_BYTES * a + COMMIT_ENTRY_BYTES * b + PACK_ENTRY_BYTES * d,
  );
  out.writeUInt32LE(a, 0);
  out.writeUInt32LE(b, 4);
  out.writeUInt32LE(d, 8);
  out.writeUInt32LE(x.packCount, 12);
  writeU64(out, x.extentCount, 16);
  writeU64(out, x.commitCount, 24);
  if (x.prevHash.length !== 32 || x.lastHash.length !== 32)
    throw new RangeError('a hash is 32 bytes');
  x.prevHash.copy(out, 32);
  x.lastHash.copy(out, 64);
  writeU64(out, x.lastFullFirstSeq, 96);
  let at = INDEX_FIXED_BYTES;
  for (let i = 0; i < a; i++, at += EXTENT_ENTRY_BYTES) {
    writeU64(out, column(x.extents.offset, i), at);
    out.writeUInt32LE(column(x.extents.number, i), at + 8);
    out.writeUInt32LE(column(x.extents.records, i), at + 12);
    writeU64(out, column(x.extents.firstBlock, i), at + 16);
    writeU64(out, column(x.extents.endBlock, i), at + 24);
    out.writeUInt32LE(column(x.extents.stored, i), at + 32);
  }
  for (let i = 0; i < b; i++, at += COMMIT_ENTRY_BYTES) {
    writeU64(out, column(x.commits.offset, i), at);
    out.writeUInt32LE(column(x.commits.number, i), at + 8);
    out.writeUInt32LE(column(x.commits.records, i), at + 12);
    writeU64(out, column(x.commits.firstSeq, i), at + 16);
    out.writeBigUInt64LE(column(x.commits.leastInstantNs, i), at + 24);
    out.writeBigUInt64LE(column(x.commits.greatestInstantNs, i), at + 32);
    out.writeUInt32LE(column(x.commits.stored, i), at + 40);
    out.writeUInt32LE(column(x.commits.points, i), at + 44);
  }
  for (let i = 0; i < d; i++, at += PACK_ENTRY_BYTES) {
    writeU64(out, column(x.packs.offset, i), at);
    out.writeUInt32LE(column(x.packs.number, i), at + 8);
    out.writeUInt32LE(column(x.packs.records, i), at + 12);
    out.writeUInt32LE(column(x.packs.stored, i), at + 16);
  }
  return out;
}

/**
 * Decodes and validates the index of the segment with `header`. `indexOffset` is where the index page starts: the other
 * pages must fill the space between the header and it.
 */
export function decodeSegmentIndex(
  plain: Buffer,
  header: SegmentHeader,
  indexOffset: number,
  what: string,
): SegmentIndex {
  const bad = (at: number, problem: string) => damaged(`${what} (index)`, at, problem);
  if (plain.length < INDEX_FIXED_BYTES) throw bad(0, 'the index is cut off');
  const a = plain.readUInt32LE(0);
  const b = plain.readUInt32LE(4);
  const d = plain.readUInt32LE(8);
  const bytes =
    INDEX_FIXED_BYTES + EXTENT_ENTRY_BYTES * a + COMMIT_ENTRY_BYTES * b + PACK_ENTRY_BYTES * d;
  if (plain.length !== bytes) throw bad(0, `the index is ${plain.length} bytes long, not ${bytes}`);
  checkZero(plain, 104, INDEX_FIXED_BYTES, what);
  const index: SegmentIndex = {
    extents: extentPageTable(a),
    commits: commitPageTable(b),
    packs: pageTable(d),
    packCount: plain.readUInt32LE(12),
    extentCount: readU64(plain, 16, what),
    commitCount: readU64(plain, 24, what),
    prevHash: Buffer.from(plain.subarray(32, 64)),
    lastHash: Buffer.from(plain.subarray(64, 96)),
    lastFullFirstSeq: readU64(plain, 96, what),
  };
  let nextOffset = SEGMENT_HEADER_BYTES;
  let nextNumber = 0;
  // Thousands of entries, read by a program that has just started: calls count.
  const view = viewOf(plain);
  const u64 = (from: number): number => {
    const high = view.getUint32(from + 4, true);
    return high <= MAX_HIGH
      ? view.getUint32(from, true) + high * 0x1_0000_0000
      : readU64(plain, from, what);
  };
  const common = (t: PageTable, i: number, at: number, storedAt: number, most: number): void => {
    const offset = u64(at);
    const number = view.getUint32(at + 8, true);
    const records = view.getUint32(at + 12, true);
    const stored = view.getUint32(storedAt, true);
    if (offset !== nextOffset || number !== nextNumber || stored < SEAL_BYTES)
      throw bad(at, `page ${number} is not where it belongs`);
    if (records < 1 || records > most) throw bad(at + 12, 'a page with too many records, or none');
    t.offset[i] = offset;
    t.number[i] = number;
    t.records[i] = records;
    t.stored[i] = stored;
    nextNumber++;
    nextOffset += PAGE_HEADER_BYTES + stored;
  };
  let at = INDEX_FIXED_BYTES;
  let beforeBlock = 0;
  for (let i = 0; i < a; i++, at += EXTENT_ENTRY_BYTES) {
    const t = index.extents;
    common(t, i, at, at + 32, EXTENTS_PER_PAGE);
    if (view.getUint32(at + 36, true) !== 0) checkZero(plain, at + 36, at + 40, what);
    const firstBlock = u64(at + 16);
    const endBlock = u64(at + 24);
    if (endBlock <= firstBlock) throw bad(at + 16, 'a page that ends before it starts');
    if (firstBlock < beforeBlock) throw bad(at + 16, 'pages out of order');
    t.firstBlock[i] = firstBlock;
    t.endBlock[i] = endBlock;
    beforeBlock = firstBlock;
  }
  for (let i = 0; i < b; i++, at += COMMIT_ENTRY_BYTES) {
    const t = index.commits;
    common(t, i, at, at + 40, COMMITS_PER_PAGE);
    const first = u64(at + 16);
    t.firstSeq[i] = first;
    t.leastInstantNs[i] = view.getBigUint64(at + 24, true);
    t.greatestInstantNs[i] = view.getBigUint64(at + 32, true);
    t.points[i] = view.getUint32(at + 44, true);
    if (
      first < header.firstSeq ||
      first > header.lastSeq ||
      (i > 0 && first <= column(t.firstSeq, i - 1))
    ) {
      throw bad(at + 16, 'commits pages out of order');
    }
  }
  for (let i = 0; i < d; i++, at += PACK_ENTRY_BYTES) {
    common(index.packs, i, at, at + 16, PACK_IDS_PER_PAGE);
    checkZero(plain, at + 20, at + 24, what);
    if (i + 1 < d && index.packs.records[i] !== PACK_IDS_PER_PAGE)
      throw bad(at + 12, 'a pack id page that is not full');
  }
  if (nextOffset !== indexOffset) throw bad(0, 'the pages do not fill the segment');
  const sum = (t: PageTable): number => t.records.reduce((n, r) => n + r, 0);
  if (
    sum(index.extents) !== index.extentCount ||
    sum(index.commits) !== index.commitCount ||
    sum(index.packs) !== index.packCount
  ) {
    throw bad(12, 'the counts of the index do not add up');
  }
  if (index.commitCount < 1 || (header.level === undefined && index.commitCount !== 1)) {
    throw bad(24, `${index.commitCount} commits`);
  }
  if (index.lastFullFirstSeq > header.lastSeq) throw bad(96, 'a full commit outside the segment');
  return index;
}

/** The last 16 bytes of the object. */
export function encodeSegmentTrailer(indexOffset: number): Buffer {
  const out = Buffer.alloc(SEGMENT_TRAILER_BYTES);
  out.writeUInt32LE(TRAILER_MAGIC, 0);
  writeU64(out, indexOffset, 4);
  out.writeUInt32LE(crc32(out.subarray(0, 12)), 12);
  return out;
}

/** Offset of the index page, from the last 16 bytes of a segment of `sizeBytes`. */
export function decodeSegmentTrailer(trailer: Buffer, sizeBytes: number, what: string): number {
  const at = sizeBytes - SEGMENT_TRAILER_BYTES;
  if (trailer.length !== SEGMENT_TRAILER_BYTES) throw damaged(what, at, 'the segment is cut off');
  if (trailer.readUInt32LE(0) !== TRAILER_MAGIC)
    throw damaged(what, at, 'the segment has no trailer');
  if (trailer.readUInt32LE(12) !== crc32(trailer.subarray(0, 12))) {
    throw damaged(what, at, 'the checksum of the trailer is wrong');
  }
  const offset = readU64(trailer, 4, what);
  if (offset < SEGMENT_HEADER_BYTES || offset + PAGE_HEADER_BYTES + SEAL_BYTES > at) {
    throw damaged(what, at + 4, 'the index lies outside the segment');
  }
  return offset;
}

/**
 * The records of an extents page, left packed. All getters take an index in [0, length).
 */
export class ExtentPage {
  readonly length: number;
  readonly #view: DataView;
  readonly bytes: Buffer;

  constructor(bytes: Buffer) {
    this.bytes = bytes;
    this.length = Math.floor(bytes.length / EXTENT_RECORD_BYTES);
    this.#view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  }
  block(i: number): number {
    const at = i * EXTENT_RECORD_BYTES;
    return this.#view.getUint32(at, true) + this.#view.getUint32(at + 4, true) * 0x1_0000_0000;
  }
  count(i: number): number {
    return this.#view.getUint32(i * EXTENT_RECORD_BYTES + 8, true);
  }
  /** From the base of the list that the page is of. */
  seq(i: number): number {
    return this.#view.getUint32(i * EXTENT_RECORD_BYTES + 12, true);
  }
  pack(i: number): number {
    return this.#view.getUint32(i * EXTENT_RECORD_BYTES + 16, true);
  }
  frame(i: number): number {
    return this.#view.getUint32(i * EXTENT_RECORD_BYTES + 20, true);
  }
  sub(i: number): number {
    return this.#view.getUint16(i * EXTENT_RECORD_BYTES + 24, true);
  }
  skip(i: number): number {
    return this.#view.getUint16(i * EXTENT_RECORD_BYTES + 26, true);
  }
  /** The first index whose block is `block` or later. */
  lowerBound(block: number): number {
    let lo = 0;
    let hi = this.length;
    while (lo < hi) {
      const mid = (lo + hi) >>> 1;
      if (this.block(mid) < block) lo = mid + 1;
      else hi = mid;
    }
    return lo;
  }
}

/**
 * Validates extents page `i` of a segment against its index and wraps it. `what` names object and page for errors
 * (kind `damaged`).
 */
export function decodeExtentPage(
  plain: Buffer,
  i: number,
  index: SegmentIndex,
  header: SegmentHeader,
  what: string,
): ExtentPage {
  if (plain.length !== column(index.extents.records, i) * EXTENT_RECORD_BYTES) {
    throw damaged(what, 0, 'the page has another number of records than the index says');
  }
  const page = new ExtentPage(plain);
  const span = header.level === undefined ? 0 : header.lastSeq - header.firstSeq;
  let beforeBlock = -1;
  let beforeSeq = 0;
  let beforeEnd = 0;
  let end = 0;
  const view = viewOf(plain);
  for (let r = 0, at = 0; r < page.length; r++, at += EXTENT_RECORD_BYTES) {
    const high = view.getUint32(at + 4, true);
    const block = view.getUint32(at, true) + high * 0x1_0000_0000;
    const count = view.getUint32(at + 8, true);
    const seq = view.getUint32(at + 12, true);
    const pack = view.getUint32(at + 16, true);
    if (high > MAX_HIGH || count < 1 || (block % STRIPE_BLOCKS) + count > STRIPE_BLOCKS) {
      throw damaged(
        what,
        at,
        `extent of ${count} blocks at block ${block} crosses a stripe or is empty`,
      );
    }
    if (block < beforeBlock || (block === beforeBlock && seq <= beforeSeq)) {
      throw damaged(what, at, 'extents out of order');
    }
    if (seq > span) throw damaged(what, at, `extent of a commit that is not in the segment`);
    if (pack === HOLE) {
      if (header.level === undefined) throw damaged(what, at, 'a full map names a hole');
      if ((page.frame(r) | page.sub(r) | page.skip(r)) !== 0)
        throw damaged(what, at, 'a hole with a place');
    } else if (pack >= index.packCount) {
      throw damaged(what, at, `extent in pack ${pack} of ${index.packCount}`);
    }
    if (header.level === undefined && block < beforeEnd)
      throw damaged(what, at, 'a full map with an overlap');
    beforeBlock = block;
    beforeSeq = seq;
    beforeEnd = block + count;
    if (beforeEnd > end) end = beforeEnd;
  }
  if (page.block(0) !== index.extents.firstBlock[i] || end !== index.extents.endBlock[i]) {
    throw damaged(what, 0, 'the page covers other blocks than the index says');
  }
  return page;
}

/** The records of a commits page, left packed. All getters take an index in [0, length). */
export class CommitPage {
  readonly length: number;
  readonly bytes: Buffer;

  constructor(bytes: Buffer) {
    this.bytes = bytes;
    this.length = Math.floor(bytes.length / COMMIT_RECORD_BYTES);
  }
  seq(i: number): number {
    return readU64(this.bytes, i * COMMIT_RECORD_BYTES, 'commits page');
  }
  pointClass(i: number): number {
    return this.bytes.readUInt8(i * COMMIT_RECORD_BYTES + 16);
  }
  flags(i: number): number {
    return this.bytes.readUInt16LE(i * COMMIT_RECORD_BYTES + 18);
  }
  instantNs(i: number): bigint {
    return this.bytes.readBigUInt64LE(i * COMMIT_RECORD_BYTES + 24);
  }
  /** The whole record; its hash shares memory with the page. */
  record(i: number): StoredCommit {
    return decodeCommitRecord(this.bytes, i * COMMIT_RECORD_BYTES, 'commits page');
  }
  /** The first index whose sequence number is `seq` or later. */
  lowerBound(seq: number): number {
    let lo = 0;
    let hi = this.length;
    while (lo < hi) {
      const mid = (lo + hi) >>> 1;
      if (this.seq(mid) < seq) lo = mid + 1;
      else hi = mid;
    }
    return lo;
  }
}

/** True if {@link decodeCommitRecord} finds nothing wrong with the record. */
function isCommitRecord(view: DataView, at: number): boolean {
  const seqHigh = view.getUint32(at + 4, true);
  const firstHigh = view.getUint32(at + 12, true);
  const seq = view.getUint32(at, true) + seqHigh * 0x1_0000_0000;
  const first = view.getUint32(at + 8, true) + firstHigh * 0x1_0000_0000;
  const flags = view.getUint16(at + 18, true);
  return (
    seqHigh <= MAX_HIGH &&
    firstHigh <= MAX_HIGH &&
    view.getUint8(at + 16) <= PointClass.app &&
    view.getUint8(at + 17) <= Coverage.unknown &&
    view.getUint32(at + 52, true) <= MAX_HIGH &&
    view.getUint32(at + 100, true) <= MAX_HIGH &&
    view.getUint32(at + 108, true) <= MAX_HIGH &&
    first >= 1 &&
    first <= seq &&
    (flags & ~(CommitFlag.full | CommitFlag.merged)) === 0 &&
    (first === seq || (flags & CommitFlag.merged) !== 0)
  );
}

/** Validates commits page `i` of a segment against its index and wraps it. */
export function decodeCommitPage(
  plain: Buffer,
  i: number,
  index: SegmentIndex,
  header: SegmentHeader,
  what: string,
): CommitPage {
  const t = index.commits;
  if (plain.length !== column(t.records, i) * COMMIT_RECORD_BYTES) {
    throw damaged(what, 0, 'the page has another number of records than the index says');
  }
  const from = header.level === undefined ? 1 : header.firstSeq;
  let points = 0;
  let least = 0xffff_ffff_ffff_ffffn;
  let greatest = 0n;
  let firstSeq = 0;
  let lastSeq = 0;
  const view = viewOf(plain);
  for (let pos = 0; pos < plain.length; pos += COMMIT_RECORD_BYTES) {
    // Whoever wants one commit waits for the thousand of its page: no object is made of each that is right.
    if (!isCommitRecord(view, pos)) decodeCommitRecord(plain, pos, what);
    const seq = view.getUint32(pos, true) + view.getUint32(pos + 4, true) * 0x1_0000_0000;
    const first = view.getUint32(pos + 8, true) + view.getUint32(pos + 12, true) * 0x1_0000_0000;
    if (first < from || seq > header.lastSeq || first <= lastSeq)
      throw damaged(what, pos, `commit ${seq} out of order`);
    const pack = view.getUint32(pos + 88, true);
    if (pack >= index.packCount)
      throw damaged(what, pos, `commit in pack ${pack} of ${index.packCount}`);
    const instantNs = view.getBigUint64(pos + 24, true);
    if (view.getUint8(pos + 16) >= PointClass.crash) points++;
    if (instantNs < least) least = instantNs;
    if (instantNs > greatest) greatest = instantNs;
    if (pos === 0) firstSeq = seq;
    lastSeq = seq;
  }
  const isLast = i + 1 === t.length;
  if (
    firstSeq !== t.firstSeq[i] ||
    (isLast ? lastSeq !== header.lastSeq : lastSeq >= column(t.firstSeq, i + 1)) ||
    points !== t.points[i] ||
    least !== t.leastInstantNs[i] ||
    greatest !== t.greatestInstantNs[i]
  ) {
    throw damaged(what, 0, 'the page holds other commits than the index says');
  }
  return new CommitPage(plain);
}

/** Validates pack id page `i` and returns it: `records` ids of 16 bytes. */
export function checkPackIdPage(
  plain: Buffer,
  i: number,
  index: SegmentIndex,
  what: string,
): Buffer {
  if (plain.length !== column(index.packs.records, i) * PACK_ID_BYTES) {
    throw damaged(what, 0, 'the page has another number of pack ids than the index says');
  }
  return plain;
}

/** Element `i` of a column that is known to have it. */
export function column<T extends number | bigint>(
  values: { readonly [i: number]: T },
  i: number,
): T {
  const v = values[i];
  if (v === undefined) throw new RangeError(`no element ${i}`);
  return v;
}

function writeId(id: string, into: Buffer, at: number): void {
  if (!/^[0-9a-f]{32}$/.test(id)) throw new RangeError(`not an id: ${id}`);
  into.write(id, at, 16, 'hex');
}
