import fc from 'fast-check';
import { describe, expect, it } from 'vitest';
import { Coverage, PointClass } from '../../../src/format/commit.js';
import type { JournalCommit } from '../../../src/repo/blockmap.js';
import { memorySegment } from '../../../src/repo/segments/memory.js';
import { openSegment } from '../../../src/repo/segments/reader.js';
import type { SegmentSource } from '../../../src/repo/segments/source.js';
import { putMemorySegment } from '../../../src/repo/segments/writer.js';
import { Timeline, type CoverageInterval } from '../../../src/repo/timeline.js';
import { commitOf, hashOf, testBench } from '../../support/segment-model.js';

async function all<T>(items: AsyncIterable<T>): Promise<T[]> {
  const list: T[] = [];
  for await (const item of items) list.push(item);
  return list;
}

/** Commits at the given instants (seconds), the first of sequence number 1. */
function at(...instants: readonly number[]): JournalCommit[] {
  return instants.map((t, i) => commitOf({ seq: i + 1, instantNs: BigInt(t) * 1_000_000_000n }));
}

const s = (seconds: number): bigint => BigInt(seconds) * 1_000_000_000n;

/** In segments of `size` commits; the last is in memory. */
async function sources(commits: readonly JournalCommit[], size: number): Promise<SegmentSource[]> {
  const bench = testBench();
  const deltas: SegmentSource[] = [];
  for (let i = 0; i < commits.length; i += size) {
    const part = commits.slice(i, i + size);
    const source = memorySegment(part, hashOf((part[0]?.firstSeq ?? 1) - 1));
    const last = i + size >= commits.length;
    deltas.push(
      last
        ? source
        : await openSegment(bench.context, await putMemorySegment(bench.target(), source)),
    );
  }
  return deltas;
}

describe('Timeline', () => {
  it('finds the newest point not after a time, as a linear search does', async () => {
    await fc.assert(
      fc.asyncProperty(
        fc.array(
          fc.record({
            t: fc.nat(60),
            pointClass: fc.constantFrom(0, 1, 2, 3, 4) as fc.Arbitrary<PointClass>,
          }),
          {
            minLength: 1,
            maxLength: 40,
          },
        ),
        fc.nat(70),
        fc.constantFrom(1, 2, 4) as fc.Arbitrary<PointClass>,
        async (list, t, minClass) => {
          const commits = list.map((c, i) =>
            commitOf({ seq: i + 1, instantNs: s(c.t), pointClass: c.pointClass }),
          );
          const ok = commits.filter(
            (c) => c.record.instantNs <= s(t) && c.record.pointClass >= minClass,
          );
          const best = ok.reduce<JournalCommit | undefined>(
            (b, c) => (b === undefined || c.record.instantNs >= b.record.instantNs ? c : b),
            undefined,
          );
          const last = ok.at(-1);
          const found = await new Timeline(await sources(commits, 7)).before(s(t), minClass);
          expect(found?.point).toEqual(best?.record);
          expect(found?.later).toEqual(best === last ? undefined : last?.record);
        },
      ),
      { numRuns: 60 },
    );
  });

  it('is not misled for ever by a machine that believed it was 1970', async () => {
    const timeline = new Timeline(await sources(at(1000, 1001, 1002, 5, 6, 1003, 1004), 3));
    const found = await timeline.before(s(1001));
    expect(found?.point.seq).toBe(2);
    expect(found?.later?.seq).toBe(5);
    expect((await timeline.before(s(1003)))?.point.seq).toBe(6);
    expect((await timeline.before(s(1003)))?.later).toBeUndefined();
    expect((await timeline.latest())?.seq).toBe(7);
  });

  it('reaches every point by its own instant after the clock was put back', async () => {
    const timeline = new Timeline(await sources(at(100, 110, 120, 130, 95, 105, 115), 2));
    for (const [t, seq] of [
      [110, 2],
      [130, 4],
      [95, 5],
      [105, 6],
    ] as const) {
      expect((await timeline.before(s(t)))?.point.seq).toBe(seq);
    }
    expect((await timeline.before(s(130)))?.later?.seq).toBe(7);
    expect(await timeline.before(s(94))).toBeUndefined();
  });

  it('lists, counts and looks up', async () => {
    const commits = Array.from({ length: 3000 }, (_, i) =>
      commitOf({ seq: i + 1, instantNs: s(i), pointClass: i % 3 === 0 ? 1 : 2 }),
    );
    const timeline = new Timeline(await sources(commits, 1300));
    expect(timeline.counts).toEqual({ commits: 3000, exactPoints: 2000 });
    const seqs = async (o: Parameters<Timeline['list']>[0]): Promise<number[]> =>
      (await all(timeline.list(o))).map((c) => c.seq);
    expect(await seqs({ sinceNs: s(1298), untilNs: s(1303) })).toEqual([1299, 1301, 1302, 1304]);
    expect(
      await seqs({
        sinceNs: s(1298),
        untilNs: s(1303),
        newestFirst: true,
        minClass: PointClass.none,
      }),
    ).toEqual([1304, 1303, 1302, 1301, 1300, 1299]);
    expect(await seqs({})).toHaveLength(2000);
    expect((await timeline.first())?.seq).toBe(1);
    expect((await timeline.latest(PointClass.none))?.seq).toBe(3000);
    expect((await timeline.latest())?.seq).toBe(3000);
    expect(await timeline.bySeq(1301)).toEqual(commits[1300]?.record);
    expect(await timeline.bySeq(3001)).toBeUndefined();
    expect(await timeline.bySeq(0)).toBeUndefined();
    const empty = new Timeline([]);
    expect(await empty.before(s(5))).toBeUndefined();
    expect(await empty.first()).toBeUndefined();
  });

  it('reads one page to find a time among many', async () => {
    const commits = Array.from({ length: 20_000 }, (_, i) =>
      commitOf({ seq: i + 1, instantNs: s(i) }),
    );
    const source = memorySegment(commits, hashOf(0));
    const read: number[] = [];
    const counted: SegmentSource = {
      ...source,
      commitPage: (i, keep) => {
        if (!read.includes(i)) read.push(i);
        return source.commitPage(i, keep);
      },
    };
    expect((await new Timeline([counted]).before(s(12_345)))?.point.seq).toBe(12_346);
    expect(read).toHaveLength(1);
  });

  describe('coverage', () => {
    const { exact, coalesced, unknown } = Coverage;
    const commits = [
      [0, exact],
      [10, exact],
      [20, exact],
      [30, unknown],
      [40, coalesced],
      [50, coalesced],
      [45, exact],
      [60, exact],
    ].map(([t = 0, coverage = 0], i) =>
      commitOf({
        seq: i + 1,
        instantNs: s(t),
        coverage: coverage as Coverage,
        pointClass: i % 2 === 0 ? 2 : 0,
      }),
    );
    const short = (v: CoverageInterval) => [
      Number(v.fromNs / s(1)),
      Number(v.toNs / s(1)),
      v.coverage,
      v.clockSteppedBack,
    ];

    it.each([1, 2, 3, 5, 100])('joins equal neighbours, in segments of %i', async (size) => {
      const timeline = new Timeline(await sources(commits, size));
      const list = await all(timeline.coverage());
      expect(list.map(short)).toEqual([
        [0, 20, exact, false],
        [20, 30, unknown, false],
        [30, 50, coalesced, false],
        [45, 60, exact, true],
      ]);
      expect(list.map((v) => [v.afterSeq, v.uptoSeq])).toEqual([
        [1, 3],
        [3, 4],
        [4, 6],
        [7, 8],
      ]);
    });

    it.each([1, 2, 3, 100])('is clipped to the range, in segments of %i', async (size) => {
      const timeline = new Timeline(await sources(commits, size));
      expect((await all(timeline.coverage({ sinceNs: s(15), untilNs: s(35) }))).map(short)).toEqual(
        [
          [15, 20, exact, false],
          [20, 30, unknown, false],
          [30, 35, coalesced, false],
        ],
      );
      expect((await all(timeline.coverage({ sinceNs: s(32), untilNs: s(34) }))).map(short)).toEqual(
        [[32, 34, coalesced, false]],
      );
      expect(await all(timeline.coverage({ sinceNs: s(70) }))).toEqual([]);
    });
  });
});
