/** Commits (FORMAT.md 5.3): what one capture round adds to a volume. */
import { checkZero, damaged, readU64, writeU64 } from './bytes.js';
import { EXTENT_RECORD_BYTES, HOLE, decodeExtent, encodeExtent, type Extent } from './extent.js';
import { HASH_BYTES } from '../hash.js';
import { newerVersion } from './pack.js';

export const COMMIT_VERSION = 1;
const FIXED_BYTES = 160;
const EXTENTS_REF_BYTES = 48;
/** Extent records in one frame at most; more go to extents frames. */
export const MAX_FRAME_EXTENTS = 65_536;

/** How consistent a point is, from least to most. `none` is no recovery point. */
export const PointClass = { none: 0, fuzzy: 1, crash: 2, fs: 3, app: 4 } as const;
export type PointClass = (typeof PointClass)[keyof typeof PointClass];
export type PointClassName = keyof typeof PointClass;
const CLASS_NAMES: readonly PointClassName[] = ['none', 'fuzzy', 'crash', 'fs', 'app'];

export function className(c: PointClass): PointClassName {
  return CLASS_NAMES[c] ?? 'none';
}

/** How well the time since the commit before is covered. */
export const Coverage = { exact: 0, coalesced: 1, unknown: 2 } as const;
export type Coverage = (typeof Coverage)[keyof typeof Coverage];
export type CoverageName = keyof typeof Coverage;
const COVERAGE_NAMES: readonly CoverageName[] = ['exact', 'coalesced', 'unknown'];

export function coverageName(c: Coverage): CoverageName {
  return COVERAGE_NAMES[c] ?? 'unknown';
}

export function pointClassOf(value: number, what: string): PointClass {
  if (value === 0 || value === 1 || value === 2 || value === 3 || value === 4) return value;
  throw damaged(what, 2, `unknown class ${value}`);
}

export function coverageOf(value: number, what: string): Coverage {
  if (value === 0 || value === 1 || value === 2) return value;
  throw damaged(what, 3, `unknown coverage ${value}`);
}

export const CommitFlag = { full: 1, merged: 2 } as const;

/** A reference to a part of the extents in a frame of its own. */
export interface ExtentsRef {
  /** Index in the commit's pack table. */
  readonly pack: number;
  readonly frame: number;
  readonly records: number;
  /** {@link KeyRing.commitHash} of the frame's plain body. */
  readonly hash: Buffer;
}

export interface Commit {
  readonly pointClass: PointClass;
  readonly coverage: Coverage;
  readonly flags: number;
  readonly volumeId: string;
  readonly seq: number;
  readonly firstSeq: number;
  /** Hash of the commit before `firstSeq`; zeros for the first. */
  readonly prevHash: Buffer;
  /** Of a merged commit: the hash of the last one it stands for; else zeros. */
  readonly mergedHash: Buffer;
  readonly instantNs: bigint;
  readonly startedNs: bigint;
  readonly writtenNs: bigint;
  readonly sizeBytes: number;
  readonly epoch: number;
  readonly packIds: readonly string[];
  readonly extentsRefs: readonly ExtentsRef[];
  readonly extents: readonly Extent[];
  readonly facts: Readonly<Record<string, unknown>>;
}

export const ZERO_HASH: Buffer = Buffer.alloc(HASH_BYTES);

/** The plain body of a commit frame. */
export function encodeCommit(c: Commit): Buffer {
  const facts = Buffer.from(JSON.stringify(c.facts), 'utf8');
  const refsAt = FIXED_BYTES + 16 * c.packIds.length;
  const extentsAt = refsAt + EXTENTS_REF_BYTES * c.extentsRefs.length;
  const factsAt = extentsAt + EXTENT_RECORD_BYTES * c.extents.length;
  const b = Buffer.alloc(factsAt + facts.length);
  b.writeUInt16LE(COMMIT_VERSION, 0);
  b[2] = c.pointClass;
  b[3] = c.coverage;
  b.writeUInt32LE(c.flags, 4);
  b.write(c.volumeId, 8, 'hex');
  writeU64(b, c.seq, 24);
  writeU64(b, c.firstSeq, 32);
  c.prevHash.copy(b, 40);
  c.mergedHash.copy(b, 72);
  b.writeBigUInt64LE(c.instantNs, 104);
  b.writeBigUInt64LE(c.startedNs, 112);
  b.writeBigUInt64LE(c.writtenNs, 120);
  writeU64(b, c.sizeBytes, 128);
  b.writeUInt32LE(c.epoch, 136);
  b.writeUInt32LE(c.packIds.length, 140);
  b.writeUInt32LE(c.extentsRefs.length, 144);
  b.writeUInt32LE(c.extents.length, 148);
  b.writeUInt32LE(facts.length, 152);
  c.packIds.forEach((id, i) => b.write(id, FIXED_BYTES + 16 * i, 'hex'));
  c.extentsRefs.forEach((r, i) => {
    const at = refsAt + EXTENTS_REF_BYTES * i;
    b.writeUInt32LE(r.pack, at);
    b.writeUInt32LE(r.frame, at + 4);
    b.writeUInt32LE(r.records, at + 8);
    r.hash.copy(b, at + 16);
  });
  c.extents.forEach((e, i) => {
    encodeExtent(e, b, extentsAt + EXTENT_RECORD_BYTES * i);
  });
  facts.copy(b, factsAt);
  return b;
}

/** Decodes and validates the plain body of a commit frame; `what` names pack and frame in errors. */
export function decodeCommit(b: Buffer, what: string): Commit {
  if (b.length < FIXED_BYTES) throw damaged(what, 0, 'the commit is cut off');
  const version = b.readUInt16LE(0);
  if (version !== COMMIT_VERSION) throw newerVersion(what, version);
  checkZero(b, 156, 160, what);
  const p = b.readUInt32LE(140);
  const x = b.readUInt32LE(144);
  const n = b.readUInt32LE(148);
  const f = b.readUInt32LE(152);
  const refsAt = FIXED_BYTES + 16 * p;
  const extentsAt = refsAt + EXTENTS_REF_BYTES * x;
  const factsAt = extentsAt + EXTENT_RECORD_BYTES * n;
  if (factsAt + f !== b.length) throw damaged(what, 140, 'the counts do not fit the length');
  const packIds: string[] = [];
  for (let i = 0; i < p; i++)
    packIds.push(b.toString('hex', FIXED_BYTES + 16 * i, FIXED_BYTES + 16 * i + 16));
  const extentsRefs: ExtentsRef[] = [];
  for (let i = 0; i < x; i++) {
    const at = refsAt + EXTENTS_REF_BYTES * i;
    const pack = b.readUInt32LE(at);
    if (pack >= p) throw damaged(what, at, 'a reference outside the pack table');
    extentsRefs.push({
      pack,
      frame: b.readUInt32LE(at + 4),
      records: b.readUInt32LE(at + 8),
      hash: Buffer.from(b.subarray(at + 16, at + 48)),
    });
  }
  const extents = decodeExtentList(b.subarray(extentsAt, factsAt), p, what);
  let facts: unknown;
  try {
    facts = JSON.parse(b.toString('utf8', factsAt));
  } catch {
    throw damaged(what, factsAt, 'its facts are not JSON');
  }
  if (typeof facts !== 'object' || facts === null || Array.isArray(facts)) {
    throw damaged(what, factsAt, 'its facts are not an object');
  }
  const seq = readU64(b, 24, what);
  const firstSeq = readU64(b, 32, what);
  const flags = b.readUInt32LE(4);
  const merged = (flags & CommitFlag.merged) !== 0;
  if (seq < 1 || firstSeq < 1 || firstSeq > seq || (!merged && firstSeq !== seq)) {
    throw damaged(what, 24, `impossible sequence numbers ${firstSeq} to ${seq}`);
  }
  return {
    pointClass: pointClassOf(b[2] ?? 0, what),
    coverage: coverageOf(b[3] ?? 0, what),
    flags,
    volumeId: b.toString('hex', 8, 24),
    seq,
    firstSeq,
    prevHash: Buffer.from(b.subarray(40, 72)),
    mergedHash: Buffer.from(b.subarray(72, 104)),
    instantNs: b.readBigUInt64LE(104),
    startedNs: b.readBigUInt64LE(112),
    writtenNs: b.readBigUInt64LE(120),
    sizeBytes: readU64(b, 128, what),
    epoch: b.readUInt32LE(136),
    packIds,
    extentsRefs,
    extents,
    facts: facts as Record<string, unknown>,
  };
}

/** Decodes the records of `b` (a whole number of them); every pack index is below `packs` or {@link HOLE}. */
export function decodeExtentList(b: Buffer, packs: number, what: string): Extent[] {
  if (b.length % EXTENT_RECORD_BYTES !== 0) throw damaged(what, 0, 'a cut off extent record');
  const list: Extent[] = [];
  let end = 0;
  for (let at = 0; at < b.length; at += EXTENT_RECORD_BYTES) {
    const e = decodeExtent(b, at, what);
    if (e.pack !== HOLE && e.pack >= packs)
      throw damaged(what, at, 'a pack outside the pack table');
    if (e.block < end) throw damaged(what, at, 'extents overlap or are not in order');
    end = e.block + e.count;
    list.push(e);
  }
  return list;
}

/** The hash by which the next commit names this one. */
export function chainHash(
  commit: Commit,
  body: Buffer,
  commitHash: (body: Buffer) => Buffer,
): Buffer {
  return (commit.flags & CommitFlag.merged) !== 0 ? commit.mergedHash : commitHash(body);
}
