import { describe, expect, it } from 'vitest';
import {
  checkChain,
  checkPages,
  type ManifestFinding,
} from '../../../../src/repo/segments/chain.js';
import { memorySegment } from '../../../../src/repo/segments/memory.js';
import { openSegment } from '../../../../src/repo/segments/reader.js';
import type { JournalCommit, SegmentSource } from '../../../../src/repo/segments/source.js';
import { putMemorySegment } from '../../../../src/repo/segments/writer.js';
import { putFullMap } from '../../../../src/repo/segments/merge.js';
import { commitOf, hashOf, randomHistory, testBench } from '../../../support/segment-model.js';

async function findings(list: AsyncIterable<ManifestFinding>): Promise<ManifestFinding[]> {
  const all: ManifestFinding[] = [];
  for await (const f of list) all.push(f);
  return all;
}

function part(commits: readonly JournalCommit[], name: string): SegmentSource {
  return memorySegment(commits, hashOf((commits[0]?.firstSeq ?? 1) - 1), name);
}

const other = (c: JournalCommit): JournalCommit => ({
  ...c,
  record: { ...c.record, hash: Buffer.alloc(32, 0x99) },
});

describe('checkChain', () => {
  const { commits } = randomHistory(7, 60, { merged: true, fullEvery: 20 });
  const a = part(commits.slice(0, 20), 'a');
  const b = part(commits.slice(20, 40), 'b');
  const c = part(commits.slice(40), 'c');
  const last = commits.at(-1)?.seq ?? 0;

  it('finds nothing wrong with a good chain, what overlaps it, and its full maps', async () => {
    const bench = testBench();
    const full = await openSegment(
      bench.context,
      await putFullMap(bench.target(), { deltas: [a, b, c], fulls: [] }, commits[33]?.seq ?? 0),
    );
    const covered = [part(commits.slice(3, 9), 'covered')];
    expect(await findings(checkChain({ deltas: [a, b, c], fulls: [full] }, covered))).toEqual([]);
    expect(
      await findings(
        checkChain({ deltas: [a, part(commits.slice(15), 'overlapping')], fulls: [] }),
      ),
    ).toEqual([]);
    expect(await findings(checkChain({ deltas: [], fulls: [] }))).toEqual([]);
  });

  it('names the commits that are missing', async () => {
    const gap = { firstSeq: b.firstSeq, lastSeq: b.lastSeq };
    expect(await findings(checkChain({ deltas: [a, c], fulls: [] }))).toMatchObject([
      { object: 'c', ...gap },
    ]);
    expect(await findings(checkChain({ deltas: [b, c], fulls: [] }))).toMatchObject([
      { object: 'b', firstSeq: 1, lastSeq: a.lastSeq },
    ]);
  });

  it('finds a segment of another history', async () => {
    const forked = memorySegment(commits.slice(20, 40), hashOf(999_999), 'forked');
    expect(await findings(checkChain({ deltas: [a, forked, c], fulls: [] }))).toMatchObject([
      { object: 'forked', problem: expect.stringContaining('does not continue a') as string },
    ]);
    const changed = part(commits.slice(5, 8).map(other), 'changed');
    expect(await findings(checkChain({ deltas: [a, b, c], fulls: [] }, [changed]))).toHaveLength(3);
    const overlap = part([...commits.slice(15, 19).map(other), ...commits.slice(19)], 'overlap');
    const found = await findings(checkChain({ deltas: [a, overlap], fulls: [] }));
    expect(found.map((f) => f.firstSeq)).toEqual(commits.slice(15, 19).map((x) => x.seq));
  });

  it('finds epochs that fall and indexes that lie', async () => {
    const fallen = commits
      .slice(40)
      .map((x, i) => ({ ...x, record: { ...x.record, epoch: i === 0 ? 5 : 4 } }));
    const found = await findings(checkChain({ deltas: [a, b, part(fallen, 'c')], fulls: [] }));
    expect(found).toMatchObject([{ object: 'c', firstSeq: fallen[1]?.seq }]);
    const lie = (index: Partial<SegmentSource['index']>): SegmentSource => ({
      ...c,
      index: { ...c.index, ...index },
    });
    expect(
      await findings(checkChain({ deltas: [a, b, lie({ lastHash: hashOf(3) })], fulls: [] })),
    ).toHaveLength(1);
    expect(
      await findings(checkChain({ deltas: [a, b, lie({ lastFullFirstSeq: 1 })], fulls: [] })),
    ).toHaveLength(1);
    expect(
      await findings(checkChain({ deltas: [a, b, { ...c, lastSeq: last + 3 }], fulls: [] })),
    ).toHaveLength(1);
  });

  it('tells damaged pages, the commits they hold, and goes on', async () => {
    const bench = testBench(true);
    const many = Array.from({ length: 3000 }, (_, i) =>
      commitOf({
        seq: i + 1,
        extents: [{ block: i, count: 1, seq: 0, pack: 0, frame: 0, sub: 0, skip: 0 }],
        packIds: ['ab'.repeat(16)],
      }),
    );
    const name = await putMemorySegment(bench.target(), part(many, 'many'));
    const bytes = await bench.store.get(name);
    const whole = await openSegment(bench.context, name);
    for (const [table, at] of [
      ['commits', 1],
      ['extents', 0],
      ['packs', 0],
    ] as const) {
      const changed = Buffer.from(bytes);
      const offset = (whole.index[table].offset[at] ?? 0) + 20;
      changed[offset] = (changed[offset] ?? 0) ^ 1;
      await bench.store.put(name, changed);
      const reader = await openSegment(bench.context, name);
      const chain = await findings(checkChain({ deltas: [reader], fulls: [] }));
      const pages = await findings(checkPages(reader));
      expect(chain.map((f) => [f.firstSeq, f.lastSeq])).toEqual(
        table === 'commits' ? [[1025, 2048]] : [],
      );
      expect(pages.length).toBe(table === 'commits' ? 0 : 1);
      await reader.close();
    }
  });
});
