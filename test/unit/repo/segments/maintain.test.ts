import { describe, expect, it } from 'vitest';
import { parseSegmentName, type SegmentName } from '../../../../src/format/names.js';
import { BlockMap } from '../../../../src/repo/blockmap.js';
import { chooseSegments } from '../../../../src/repo/segments/choose.js';
import {
  DEFAULT_POLICY,
  maintainManifest,
  nextStep,
  type MaintenanceStep,
  type SegmentFacts,
} from '../../../../src/repo/segments/maintain.js';
import { memorySegment } from '../../../../src/repo/segments/memory.js';
import { openSegment } from '../../../../src/repo/segments/reader.js';
import { putMemorySegment } from '../../../../src/repo/segments/writer.js';
import type { Store } from '../../../../src/repo/store.js';
import { segmentName } from '../../../../src/format/names.js';
import {
  blocksOfExtents,
  CHUNK_BLOCKS,
  hashOf,
  partOf,
  randomHistory,
  testBench,
  VOLUME,
  walk,
} from '../../../support/segment-model.js';

const facts = (
  level: number | undefined,
  firstSeq: number,
  lastSeq: number,
  extentCount = 10,
  lastFullFirstSeq = 0,
): SegmentFacts => ({
  volumeId: VOLUME,
  level,
  firstSeq,
  lastSeq,
  extentCount,
  lastFullFirstSeq,
});

const policy = { fanOut: 4, minFullRecords: 100 };

/** Carries a step out on facts alone. */
function apply(segments: readonly SegmentFacts[], step: MaintenanceStep): SegmentFacts[] {
  const same = (a: SegmentName) => (b: SegmentName) => segmentName(a) === segmentName(b);
  switch (step.kind) {
    case 'delete':
      return segments.filter((s) => !same(step.segment)(s));
    case 'merge': {
      const inputs = segments.filter((s) => step.inputs.some(same(s)));
      const sum = inputs.reduce((n, s) => n + s.extentCount, 0);
      const first = Math.min(...inputs.map((s) => s.firstSeq));
      const last = Math.max(...inputs.map((s) => s.lastSeq));
      return [...segments.filter((s) => !inputs.includes(s)), facts(step.level, first, last, sum)];
    }
    case 'full':
      return [...segments, facts(undefined, 1, step.seq, 60)];
  }
}

describe('nextStep', () => {
  it('leaves a tidy manifest alone', () => {
    expect(nextStep([], policy)).toBeUndefined();
    expect(
      nextStep([facts(1, 1, 4), facts(0, 5, 5), facts(0, 6, 6), facts(0, 7, 7)], policy),
    ).toBeUndefined();
  });

  it('deletes what a crash left, first', () => {
    const left = facts(0, 1, 2);
    expect(nextStep([facts(1, 1, 8), left], policy)).toEqual({ kind: 'delete', segment: left });
  });

  it('merges the oldest neighbours of a level, and what lies between them', () => {
    const level0 = [1, 2, 3, 4, 5].map((n) => facts(0, n, n));
    expect(nextStep(level0, policy)).toEqual({
      kind: 'merge',
      inputs: level0.slice(0, 4),
      level: 1,
    });
    const mixed = [
      facts(1, 1, 4),
      facts(1, 5, 8),
      facts(0, 9, 9),
      facts(1, 10, 13),
      facts(1, 14, 17),
      facts(0, 18, 18),
    ];
    expect(nextStep(mixed, policy)).toEqual({ kind: 'merge', inputs: mixed.slice(0, 5), level: 2 });
    const apart = [facts(0, 1, 1), facts(0, 2, 2), facts(1, 3, 6), facts(0, 7, 7), facts(0, 8, 8)];
    expect(nextStep(apart, policy)).toBeUndefined();
  });

  it('merges on either side of a gap, never over it, and makes no map behind it without a full commit', () => {
    const behind = [10, 11, 12, 13].map((n) => facts(0, n, n));
    expect(nextStep([facts(0, 1, 1), ...behind], policy)).toMatchObject({
      kind: 'merge',
      inputs: behind.map(({ firstSeq }) => ({ firstSeq })),
    });
    expect(nextStep([facts(0, 1, 1), ...behind.slice(1)], policy)).toBeUndefined();
    const large = { ...facts(1, 10, 13), extentCount: 1_000_000 };
    expect(nextStep([facts(0, 1, 1), large], policy)).toBeUndefined();
    expect(nextStep([facts(0, 1, 1), { ...large, lastFullFirstSeq: 11 }], policy)).toEqual({
      kind: 'full',
      seq: 13,
    });
  });

  it('makes no segment of more than 2^32 commits', () => {
    const wide = [0, 1, 2, 3].map((n) => facts(0, 1 + n * 2 ** 31, (n + 1) * 2 ** 31));
    expect(nextStep(wide, policy)).toBeUndefined();
  });

  it('makes a full map when there is more in the deltas than in the last one', () => {
    expect(nextStep([facts(1, 1, 4, 99)], policy)).toBeUndefined();
    expect(nextStep([facts(1, 1, 4, 100)], policy)).toEqual({ kind: 'full', seq: 4 });
    const since = (n: number) => [
      facts(1, 1, 4, 400),
      facts(undefined, 1, 4, 300),
      facts(1, 5, 8, n),
    ];
    expect(nextStep(since(299), policy)).toBeUndefined();
    expect(nextStep(since(300), policy)).toEqual({ kind: 'full', seq: 8 });
    // Half of the one segment is older than the map.
    const across = (n: number) => [facts(undefined, 1, 4, 300), facts(1, 1, 8, n)];
    expect(nextStep(across(598), policy)).toBeUndefined();
    expect(nextStep(across(600), policy)).toEqual({ kind: 'full', seq: 8 });
  });

  it('needs no map beside a segment that is one full commit', () => {
    expect(nextStep([facts(0, 1, 1, 5000, 1)], policy)).toBeUndefined();
    expect(nextStep([facts(0, 1, 1, 5000, 1), facts(0, 2, 2, 4999)], policy)).toBeUndefined();
    expect(nextStep([facts(0, 1, 1, 5000, 1), facts(0, 2, 2, 5000)], policy)).toEqual({
      kind: 'full',
      seq: 2,
    });
  });

  it('keeps the segments few over a long history, and always comes to rest', () => {
    let segments: SegmentFacts[] = [];
    let most = 0;
    for (let seq = 1; seq <= 3000; seq++) {
      segments.push(facts(0, seq, seq));
      for (let steps = 0; ; steps++) {
        const step = nextStep(segments, policy);
        if (step === undefined) break;
        expect(steps).toBeLessThan(20);
        segments = apply(segments, step);
      }
      most = Math.max(most, segments.filter((s) => s.level !== undefined).length);
    }
    const { chain, covered } = chooseSegments(segments);
    expect(covered).toEqual([]);
    expect(chain.at(-1)?.uptoSeq).toBe(3000);
    expect(most).toBeLessThanOrEqual(3 * 6); // three of a level, 4^6 > 3000
    expect(DEFAULT_POLICY.fanOut).toBe(16);
  });
});

describe('maintainManifest', () => {
  const names = async (store: Store): Promise<SegmentName[]> => {
    const list: SegmentName[] = [];
    for await (const { name } of store.list(`volumes/${VOLUME}/manifest`)) {
      const parsed = parseSegmentName(name);
      if (parsed !== undefined) list.push(parsed);
    }
    return list;
  };

  const { commits } = randomHistory(11, 90, { merged: true, fullEvery: 40 });

  async function filled() {
    const bench = testBench(true);
    for (let i = 0; i < commits.length; i += 3) {
      const part = commits.slice(i, i + 3);
      await putMemorySegment(
        bench.target(),
        memorySegment(part, hashOf((part[0]?.firstSeq ?? 1) - 1)),
      );
    }
    return bench;
  }

  async function checkPoints(bench: Awaited<ReturnType<typeof filled>>): Promise<void> {
    const chosen = chooseSegments(await names(bench.store));
    const open = (s: SegmentName) => openSegment(bench.context, segmentName(s));
    const deltas = await Promise.all(chosen.chain.map((l) => open(l.segment)));
    const fulls = await Promise.all(chosen.fullMaps.map(open));
    for (const c of commits.filter((_, i) => i % 9 === 0 || i > 86)) {
      const map = await BlockMap.open({ deltas, fulls }, c.seq, CHUNK_BLOCKS);
      const from = map.blocks - 400;
      expect(blocksOfExtents(await map.resolve(from, map.blocks), from, map.blocks)).toEqual(
        partOf(walk(commits, c.seq), from, map.blocks),
      );
    }
    for (const r of [...deltas, ...fulls]) await r.close();
  }

  it('brings a manifest in order and changes no point', async () => {
    const bench = await filled();
    const done = await maintainManifest(bench.context, bench.target, () => names(bench.store), {
      policy,
    });
    expect(done).toEqual({ merged: 8, fullMaps: 1, deleted: 32 });
    const left = chooseSegments(await names(bench.store));
    expect(left.covered).toEqual([]);
    expect(left.chain.map((l) => l.segment.level)).toEqual([2, 1, 1, 1, 0, 0]);
    expect(left.fullMaps).toHaveLength(1);
    await checkPoints(bench);
    expect(
      await maintainManifest(bench.context, bench.target, () => names(bench.store), { policy }),
    ).toEqual({
      merged: 0,
      fullMaps: 0,
      deleted: 0,
    });
  });

  it('is harmless when it is cut off after any write, and ends the same when run again', async () => {
    for (let cut = 1; ; cut += 4) {
      const bench = await filled();
      let calls = 0;
      const counted =
        <A extends unknown[]>(call: (...args: A) => Promise<void>) =>
        async (...args: A): Promise<void> => {
          await call(...args);
          if (++calls === cut) throw new Error('power cut');
        };
      const store: Store = new Proxy(bench.store, {
        get(inner, key: keyof Store) {
          if (key === 'putStream')
            return counted((n: string, p: AsyncIterable<Uint8Array>) => inner.putStream(n, p));
          if (key === 'delete') return counted((n: string) => inner.delete(n));
          const member = inner[key];
          return typeof member === 'function' ? (member.bind(inner) as unknown) : member;
        },
      });
      const target = () => ({ ...bench.target(), store });
      const first = await maintainManifest(
        { ...bench.context, store },
        target,
        () => names(store),
        { policy },
      ).then(
        () => 'done',
        (e: unknown) => String(e),
      );
      if (first === 'done') {
        expect(cut).toBeGreaterThan(40);
        break;
      }
      expect(first).toContain('power cut');
      await checkPoints(bench);
      await maintainManifest(bench.context, bench.target, () => names(bench.store), { policy });
      await checkPoints(bench);
      expect(chooseSegments(await names(bench.store)).chain.map((l) => l.segment.level)).toEqual([
        2, 1, 1, 1, 0, 0,
      ]);
    }
  });

  it('stops between steps when it is told to', async () => {
    const bench = await filled();
    const done = await maintainManifest(bench.context, bench.target, () => names(bench.store), {
      policy,
      signal: AbortSignal.abort(),
    });
    expect(done).toEqual({ merged: 0, fullMaps: 0, deleted: 0 });
  });
});
