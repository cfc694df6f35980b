import { describe, expect, it } from 'vitest';
import { HOLE, type Extent } from '../../../src/format/extent.js';
import { BlockMap, type JournalCommit, type ResolvedExtent } from '../../../src/repo/blockmap.js';
import { memorySegment } from '../../../src/repo/segments/memory.js';
import { mergeSegments, putFullMap } from '../../../src/repo/segments/merge.js';
import { openSegment } from '../../../src/repo/segments/reader.js';
import type { SegmentSource } from '../../../src/repo/segments/source.js';
import { putMemorySegment } from '../../../src/repo/segments/writer.js';
import {
  blocksOfExtents,
  CHUNK_BLOCKS,
  commitOf,
  hashOf,
  packIdOf,
  partOf,
  randomHistory,
  seededInts,
  testBench,
  walk,
} from '../../support/segment-model.js';

const prev = (commits: readonly JournalCommit[]): Buffer => hashOf((commits[0]?.firstSeq ?? 1) - 1);

async function scanAll(map: BlockMap, from = 0, to = map.blocks): Promise<ResolvedExtent[]> {
  const all: ResolvedExtent[] = [];
  for await (const batch of map.scan(from, to)) all.push(...batch);
  return all;
}

/** The history in segments: cut at random, some of them merged, full maps at random points, the rest as journal. */
async function spread(seed: number, commits: readonly JournalCommit[], encrypted: boolean) {
  const pick = seededInts(seed);
  const bench = testBench(encrypted);
  const open = async (name: Promise<string>): Promise<SegmentSource> =>
    openSegment(bench.context, await name);
  let deltas: SegmentSource[] = [];
  let at = 0;
  const journalFrom = commits.length - pick(4);
  while (at < journalFrom) {
    const part = commits.slice(at, Math.min(journalFrom, at + 1 + pick(6)));
    deltas.push(await open(putMemorySegment(bench.target(), memorySegment(part, prev(part)))));
    at += part.length;
  }
  if (deltas.length > 3) {
    const from = pick(2);
    const to = from + 2 + pick(deltas.length - from - 2);
    const merged = await open(mergeSegments(bench.target(), deltas.slice(from, to), 1));
    deltas = [...deltas.slice(0, from), merged, ...deltas.slice(to)];
  }
  const fulls: SegmentSource[] = [];
  for (let n = 0; n < 2 && deltas.length > 0; n++) {
    const seq = commits[pick(journalFrom)]?.seq ?? 1;
    fulls.push(await open(putFullMap(bench.target(), { deltas, fulls }, seq)));
  }
  const rest = commits.slice(at);
  if (rest.length > 0) deltas.push(memorySegment(rest, prev(rest)));
  return { deltas, fulls };
}

describe('BlockMap', () => {
  it.each(Array.from({ length: 24 }, (_, i) => i + 1))(
    'says what a literal walk of the chain says (seed %i)',
    async (seed) => {
      const pick = seededInts(seed * 7919);
      const { commits } = randomHistory(seed, 30, {
        merged: seed % 3 === 0,
        resize: seed % 4 === 0,
        fullEvery: seed % 2 === 0 ? 12 : 0,
      });
      const history = await spread(seed, commits, seed % 5 === 0);
      for (const c of commits) {
        const map = await BlockMap.open(history, c.seq, CHUNK_BLOCKS);
        const expected = walk(commits, c.seq);
        expect(map.commit).toEqual(c.record);
        expect(map.blocks).toBe(Math.ceil(c.record.sizeBytes / 4096));
        expect(blocksOfExtents(await scanAll(map), 0, map.blocks)).toEqual(
          partOf(expected, 0, map.blocks),
        );
        for (let n = 0; n < 4; n++) {
          const from = map.blocks - 1 - pick(500);
          const to = from + pick(map.blocks - from + 1);
          const want = partOf(expected, from, to);
          expect(blocksOfExtents(await map.resolve(from, to), from, to)).toEqual(want);
          expect(blocksOfExtents(await scanAll(map, from, to), from, to)).toEqual(want);
        }
      }
    },
  );

  it('reads few pages of a block that every commit writes', async () => {
    const hot = (seq: number): Extent[] => [
      { block: 5, count: seq % 10_000 === 0 ? 3 : 1, seq: 0, pack: 0, frame: seq, sub: 0, skip: 0 },
      { block: 9, count: 1, seq: 0, pack: 0, frame: seq, sub: 1, skip: 0 },
    ];
    const count = 40_000;
    const commits = Array.from({ length: count }, (_, i) =>
      commitOf({ seq: i + 1, extents: hot(i + 1), packIds: [packIdOf(1)] }),
    );
    const source = memorySegment(commits, hashOf(0));
    const read = new Set<number>();
    const counted: SegmentSource = {
      ...source,
      extentPage: (i, keep) => {
        read.add(i);
        return source.extentPage(i, keep);
      },
    };
    for (const seq of [1, 999, 9999, 15_000, 20_000, 34_567, 39_999, count]) {
      const map = await BlockMap.open({ deltas: [counted], fulls: [] }, seq, CHUNK_BLOCKS);
      read.clear();
      const got = await map.resolve(4, 11);
      expect(read.size).toBeLessThan(18);
      const place = (block: number): number | undefined =>
        got.find((e) => e.block <= block && block < e.block + e.count)?.frame;
      expect(place(5)).toBe(seq);
      expect(place(9)).toBe(seq);
      const longer = Math.floor(seq / 10_000) * 10_000;
      expect(place(7)).toBe(longer);
      expect(place(4)).toBe(0);
    }
    expect(source.index.extents.length).toBe(20);
  });

  it('joins neighbours only where the frames in between are known to hold one chunk', async () => {
    const run = (block: number, count: number, frame: number, skip = 0): Extent => ({
      block,
      count,
      seq: 0,
      pack: 0,
      frame,
      sub: 0,
      skip,
    });
    const open = async (list: Extent[]): Promise<readonly ResolvedExtent[]> => {
      const source = memorySegment(
        [commitOf({ seq: 1, extents: list, packIds: [packIdOf(1)] })],
        hashOf(0),
      );
      return (await BlockMap.open({ deltas: [source], fulls: [] }, 1, CHUNK_BLOCKS)).resolve(
        0,
        100,
      );
    };
    expect(await open([run(0, 32, 4), run(32, 32, 6)])).toHaveLength(2); // one run, and the zeros behind
    expect(await open([run(0, 16, 4), run(16, 16, 5)])).toHaveLength(3); // frame 5 may hold other chunks first
    expect(await open([run(0, 32, 4), run(32, 8, 6)])).toHaveLength(3); // nor is it known that frame 6 holds one
    expect(await open([run(0, 20, 4), run(20, 12, 5, 4)])).toHaveLength(2); // the rest of the chunk that the run ends in
    expect(await open([run(0, 4, 4), run(4, 4, 4, 4)])).toHaveLength(2);
    expect(await open([run(0, 4, 4), { ...run(4, 4, 4, 4), sub: 1 }])).toHaveLength(3);
    expect(
      await open([
        run(0, 4, 4),
        { block: 4, count: 96, seq: 0, pack: HOLE, frame: 0, sub: 0, skip: 0 },
      ]),
    ).toEqual([
      { block: 0, count: 4, packId: packIdOf(1), frame: 4, sub: 0, skip: 0 },
      { block: 4, count: 96, packId: undefined, frame: 0, sub: 0, skip: 0 },
    ]);
  });

  it('refuses what is not there', async () => {
    const { commits } = randomHistory(3, 12, { merged: true });
    const merged = commits.find((c) => c.firstSeq !== c.seq);
    const deltas = [memorySegment(commits, hashOf(0))];
    const last = commits.at(-1)?.seq ?? 0;
    const open = (seq: number) => BlockMap.open({ deltas, fulls: [] }, seq, CHUNK_BLOCKS);
    await expect(open(0)).rejects.toMatchObject({ kind: 'not-found' });
    await expect(open(last + 1)).rejects.toMatchObject({ kind: 'not-found' });
    expect(merged).toBeDefined();
    await expect(open(merged?.firstSeq ?? 0)).rejects.toMatchObject({ kind: 'not-found' });
    const tail = commits.slice(6);
    const gap = [memorySegment(commits.slice(0, 3), hashOf(0)), memorySegment(tail, prev(tail))];
    await expect(
      BlockMap.open({ deltas: gap, fulls: [] }, last, CHUNK_BLOCKS),
    ).rejects.toMatchObject({
      kind: 'damaged',
    });
    const map = await open(last);
    await expect(map.resolve(0, map.blocks + 1)).rejects.toThrow(RangeError);
    await expect(map.resolve(0, 0)).resolves.toEqual([]);
  });
});
