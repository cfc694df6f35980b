/** Histories of small volumes for tests of the manifest, and what they mean: FORMAT.md section 8 walked literally, block by block. */
import { CommitFlag, type Coverage, type PointClass } from '../../src/format/commit.js';
import { HOLE, STRIPE_BLOCKS, type Extent } from '../../src/format/extent.js';
import { keyRing, type KeyRing } from '../../src/format/seal.js';
import type { CommitRecord } from '../../src/format/segment.js';
import type { JournalCommit, ResolvedExtent } from '../../src/repo/blockmap.js';
import { PageCache } from '../../src/repo/segments/page-cache.js';
import type { SegmentContext } from '../../src/repo/segments/reader.js';
import type { SegmentTarget } from '../../src/repo/segments/writer.js';
import type { Store } from '../../src/repo/store.js';
import { MemoryStore } from './store-memory.js';

export const VOLUME = '11'.repeat(16);
export const REPOSITORY = '22'.repeat(16);
export const CHUNK_BLOCKS = 16;

/** Small, seeded, and good enough for test data (mulberry32). */
export function seededInts(seed: number): (below: number) => number {
  let s = seed >>> 0;
  return (below) => {
    s = (s + 0x6d2b79f5) >>> 0;
    let t = Math.imul(s ^ (s >>> 15), s | 1);
    t ^= t + Math.imul(t ^ (t >>> 7), t | 61);
    return ((t ^ (t >>> 14)) >>> 0) % below;
  };
}

export function packIdOf(n: number): string {
  return (n + 0x1000).toString(16).padStart(8, '0').repeat(4);
}

export function hashOf(seq: number): Buffer {
  const h = Buffer.alloc(32);
  if (seq > 0) h.writeUInt32LE(seq, 0);
  if (seq > 0) h[31] = 0xee;
  return h;
}

export interface Bench {
  readonly store: Store;
  readonly keys: KeyRing;
  readonly context: SegmentContext;
  /** A target with a salt of its own. */
  target(): SegmentTarget;
}

export function testBench(encrypted = false, store: Store = new MemoryStore()): Bench {
  const keys = keyRing(Buffer.alloc(32, 7), encrypted);
  let salts = 0;
  return {
    store,
    keys,
    context: { store, keys, repositoryId: REPOSITORY, volumeId: VOLUME, cache: new PageCache() },
    target() {
      const salt = Buffer.alloc(16, 0xa5);
      salt.writeUInt32LE(++salts, 0);
      return {
        store,
        keys,
        repositoryId: REPOSITORY,
        volumeId: VOLUME,
        chunkBlocks: CHUNK_BLOCKS,
        salt,
        createdNs: 1_700_000_000_000_000_000n,
      };
    },
  };
}

export interface CommitSketch {
  readonly seq: number;
  readonly firstSeq?: number;
  readonly full?: boolean;
  readonly extents?: readonly Extent[];
  readonly packIds?: readonly string[];
  readonly sizeBytes?: number;
  readonly instantNs?: bigint;
  readonly pointClass?: PointClass;
  readonly coverage?: Coverage;
}

export function commitOf(c: CommitSketch): JournalCommit {
  const firstSeq = c.firstSeq ?? c.seq;
  const full = c.full ?? false;
  const extents = c.extents ?? [];
  const record: CommitRecord = {
    seq: c.seq,
    firstSeq,
    pointClass: c.pointClass ?? 2,
    coverage: c.coverage ?? 0,
    flags: (full ? CommitFlag.full : 0) | (firstSeq === c.seq ? 0 : CommitFlag.merged),
    epoch: 1,
    instantNs: c.instantNs ?? BigInt(c.seq) * 1_000_000_000n,
    startedNs: BigInt(c.seq) * 1_000_000_000n - 5n,
    writtenNs: BigInt(c.seq) * 1_000_000_000n + 5n,
    sizeBytes: c.sizeBytes ?? 4096 * 1024,
    hash: hashOf(c.seq),
    packId: packIdOf(c.seq % 7),
    frame: c.seq,
    blocks: extents.reduce((n, e) => n + e.count, 0),
    storedBytes: 77,
  };
  return { seq: c.seq, firstSeq, full, packIds: c.packIds ?? [], extents, record };
}

export interface RandomHistory {
  readonly commits: readonly JournalCommit[];
  readonly blocks: number;
}

/**
 * `count` commits on a device of `blocks` blocks that lies across a stripe border: small chunks, runs, holes, hot blocks, full commits now and
 * then and, if asked for, merged commits and a device that grows (then the commit names what was gained).
 */
export function randomHistory(
  seed: number,
  count: number,
  options: {
    readonly merged?: boolean;
    readonly resize?: boolean;
    readonly fullEvery?: number;
  } = {},
): RandomHistory {
  const pick = seededInts(seed);
  const around = STRIPE_BLOCKS;
  let blocks = around + 200;
  const commits: JournalCommit[] = [];
  let seq = 0;
  for (let n = 0; n < count; n++) {
    const firstSeq = seq + 1;
    seq = firstSeq + (options.merged === true && pick(4) === 0 ? pick(5) : 0);
    const packIds = [packIdOf(pick(20)), packIdOf(20 + pick(20))];
    const extents: Extent[] = [];
    const before = blocks;
    if (options.resize === true && pick(6) === 0) blocks = around + 100 + pick(150);
    let block = around - 150 + pick(100);
    while (block < blocks && extents.length < 12) {
      const room = Math.min(blocks, block < around ? around : Infinity) - block;
      const kind = pick(4);
      const frame = pick(50);
      const base = { block, seq: pick(seq - firstSeq + 1), pack: pick(2), frame };
      if (kind === 0) {
        const skip = pick(CHUNK_BLOCKS - 1);
        extents.push({
          ...base,
          count: Math.min(room, 1 + pick(CHUNK_BLOCKS - skip)),
          sub: pick(9),
          skip,
        });
      } else if (kind === 1) {
        const length = Math.min(room, CHUNK_BLOCKS + 1 + pick(60));
        const skip = pick(CHUNK_BLOCKS);
        const run = skip + length > CHUNK_BLOCKS;
        extents.push({ ...base, count: length, sub: run ? 0 : pick(3), skip });
      } else if (kind === 2) {
        extents.push({
          ...base,
          count: Math.min(room, 1 + pick(40)),
          pack: HOLE,
          frame: 0,
          sub: 0,
          skip: 0,
        });
      } else {
        extents.push({ ...base, count: 1, sub: pick(100), skip: pick(CHUNK_BLOCKS) });
      }
      const last = extents.at(-1);
      if (last !== undefined) block = last.block + last.count + (pick(2) === 0 ? 0 : pick(60));
    }
    let list = extents.filter((e) => e.block + e.count <= blocks);
    if (blocks > before) {
      list = list.filter((e) => e.block + e.count <= before);
      list.push({
        block: before,
        count: blocks - before,
        seq: 0,
        pack: HOLE,
        frame: 0,
        sub: 0,
        skip: 0,
      });
    }
    const every = options.fullEvery ?? 0;
    commits.push(
      commitOf({
        seq,
        firstSeq,
        full: every > 0 && pick(every) === 0,
        extents: list,
        packIds,
        sizeBytes: blocks * 4096 - (pick(2) === 0 ? 512 : 0),
      }),
    );
  }
  return { commits, blocks };
}

/** Where a block lies, exactly; undefined: zeros. */
export type BlockPlace = string | undefined;

function placeOf(
  packId: string,
  frame: number,
  sub: number,
  skip: number,
  count: number,
  i: number,
): string {
  const at = skip + i;
  if (skip + count <= CHUNK_BLOCKS) return `${packId}/${frame}/${sub}/${at}`;
  return `${packId}/${frame + Math.floor(at / CHUNK_BLOCKS)}/0/${at % CHUNK_BLOCKS}`;
}

/** Section 8, literally: the map after commit `seq`; only blocks that are data. */
export function walk(commits: readonly JournalCommit[], seq: number): Map<number, string> {
  const map = new Map<number, string>();
  let size = 0;
  for (const c of commits) {
    if (c.seq > seq) break;
    if (c.full) map.clear();
    size = Math.ceil(c.record.sizeBytes / 4096);
    for (const b of map.keys()) if (b >= size) map.delete(b);
    if (Buffer.isBuffer(c.extents)) throw new Error('the model wants decoded extents');
    for (const e of c.extents) {
      for (let i = 0; i < e.count; i++) {
        if (e.pack === HOLE) map.delete(e.block + i);
        else
          map.set(
            e.block + i,
            placeOf(c.packIds[e.pack] ?? '?', e.frame, e.sub, e.skip, e.count, i),
          );
      }
    }
  }
  for (const b of map.keys()) if (b >= size) map.delete(b);
  return map;
}

/** The data blocks of resolved extents, after checking that they cover [from, to) in order. */
export function blocksOfExtents(
  list: readonly ResolvedExtent[],
  from: number,
  to: number,
): Map<number, string> {
  const map = new Map<number, string>();
  let at = from;
  for (const e of list) {
    if (e.block !== at || e.count < 1) throw new Error(`extent at ${e.block} where ${at} is next`);
    at += e.count;
    if (e.packId === undefined) {
      if (e.frame !== 0 || e.sub !== 0 || e.skip !== 0) throw new Error('a hole with a place');
      continue;
    }
    for (let i = 0; i < e.count; i++) {
      map.set(e.block + i, placeOf(e.packId, e.frame, e.sub, e.skip, e.count, i));
    }
  }
  if (at !== to) throw new Error(`extents end at ${at}, not ${to}`);
  return map;
}

/** The part of `map` in [from, to). */
export function partOf(
  map: ReadonlyMap<number, string>,
  from: number,
  to: number,
): Map<number, string> {
  return new Map([...map].filter(([b]) => b >= from && b < to).sort(([a], [b]) => a - b));
}
