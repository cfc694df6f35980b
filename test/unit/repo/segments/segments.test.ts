/** Writing, reading and merging segments, through a store. */
import { describe, expect, it } from 'vitest';
import { HOLE } from '../../../../src/format/extent.js';
import { parseSegmentName } from '../../../../src/format/names.js';
import type { JournalCommit } from '../../../../src/repo/blockmap.js';
import { memorySegment } from '../../../../src/repo/segments/memory.js';
import { mergeSegments, putFullMap } from '../../../../src/repo/segments/merge.js';
import { PageCache } from '../../../../src/repo/segments/page-cache.js';
import { openSegment, type SegmentReader } from '../../../../src/repo/segments/reader.js';
import {
  commitRecordOf,
  findCommit,
  type SegmentSource,
} from '../../../../src/repo/segments/source.js';
import { putMemorySegment, SegmentBuilder } from '../../../../src/repo/segments/writer.js';
import {
  hashOf,
  packIdOf,
  randomHistory,
  testBench,
  commitOf,
  VOLUME,
} from '../../../support/segment-model.js';

/** Everything a source says, with packs by id. */
async function contents(source: SegmentSource): Promise<{ extents: string[]; commits: unknown[] }> {
  const extents: string[] = [];
  for (let p = 0; p < source.index.extents.length; p++) {
    const page = await source.extentPage(p);
    for (let i = 0; i < page.length; i++) {
      const pack = page.pack(i) === HOLE ? 'hole' : await source.packId(page.pack(i));
      const seq = source.level === undefined ? 0 : source.firstSeq + page.seq(i);
      extents.push(
        [page.block(i), page.count(i), seq, pack, page.frame(i), page.sub(i), page.skip(i)].join(
          ' ',
        ),
      );
    }
  }
  const commits: unknown[] = [];
  for (let p = 0; p < source.index.commits.length; p++) {
    const page = await source.commitPage(p);
    for (let i = 0; i < page.length; i++)
      commits.push(await commitRecordOf(source, page.record(i)));
  }
  return { extents, commits };
}

/** What the commits say, sorted as a segment must be. */
function expected(commits: readonly JournalCommit[]): { extents: string[]; commits: unknown[] } {
  const rows = commits.flatMap((c) =>
    Buffer.isBuffer(c.extents)
      ? []
      : c.extents.map((e) => ({
          block: e.block,
          seq: c.firstSeq + e.seq,
          text: [
            e.block,
            e.count,
            c.firstSeq + e.seq,
            e.pack === HOLE ? 'hole' : c.packIds[e.pack],
            e.frame,
            e.sub,
            e.skip,
          ].join(' '),
        })),
  );
  rows.sort((a, b) => a.block - b.block || a.seq - b.seq);
  return { extents: rows.map((r) => r.text), commits: commits.map((c) => c.record) };
}

const small = { level: 0, firstSeq: 1, lastSeq: 2 };

describe('segments', () => {
  it.each([true, false])('come back as they were written (encrypted: %s)', async (encrypted) => {
    const bench = testBench(encrypted);
    const { commits } = randomHistory(42, 2500, { merged: true });
    const source = memorySegment(commits, hashOf(0));
    const name = await putMemorySegment(bench.target(), source);
    expect(parseSegmentName(name)).toEqual({
      volumeId: VOLUME,
      level: 0,
      firstSeq: 1,
      lastSeq: commits.at(-1)?.seq,
    });
    const reader = await openSegment(bench.context, name);
    expect(reader.index.extents.length).toBeGreaterThan(2);
    expect(reader.index.commits.length).toBe(3);
    const want = expected(commits);
    expect(await contents(source)).toEqual(want);
    expect(await contents(reader)).toEqual(want);
    expect(reader.index.prevHash).toEqual(hashOf(0));
    expect(reader.index.lastHash).toEqual(commits.at(-1)?.record.hash);
    const some = commits[1234];
    expect((await findCommit(reader, some?.seq ?? 0))?.instantNs).toBe(some?.record.instantNs);
    await reader.close();
  });

  it('read only what is asked for: the index at opening, then single pages', async () => {
    const bench = testBench(true);
    const { commits } = randomHistory(43, 3000);
    const name = await putMemorySegment(bench.target(), memorySegment(commits, hashOf(0)));
    let bytes = 0;
    const store = Object.assign(Object.create(bench.store) as typeof bench.store, {
      async open(n: string) {
        const object = await bench.store.open(n);
        return {
          sizeBytes: object.sizeBytes,
          async read(into: Uint8Array, offset: number) {
            bytes += into.byteLength;
            return object.read(into, offset);
          },
          close: () => object.close(),
        };
      },
    });
    const reader = await openSegment({ ...bench.context, store }, name);
    expect(bytes).toBe(65_536 + 96);
    expect(reader.sizeBytes).toBeGreaterThan(3 * 65_536);
    await reader.extentPage(0);
    const once = bytes;
    await reader.extentPage(0);
    expect(bytes).toBe(once);
    expect(once - 65_536 - 96).toBe((reader.index.extents.stored[0] ?? 0) + 16);
  });

  it('merge to what one segment of all commits would be', async () => {
    const bench = testBench(true);
    const { commits } = randomHistory(44, 900, { merged: true, fullEvery: 200 });
    const readers: SegmentReader[] = [];
    for (let i = 0; i < commits.length; i += 130) {
      const part = commits.slice(i, i + 130);
      const source = memorySegment(part, hashOf((part[0]?.firstSeq ?? 1) - 1));
      readers.push(
        await openSegment(bench.context, await putMemorySegment(bench.target(), source)),
      );
    }
    const merged = await openSegment(
      bench.context,
      await mergeSegments(bench.target(), readers, 1),
    );
    expect(await contents(merged)).toEqual(expected(commits));
    const whole = memorySegment(commits, hashOf(0));
    expect(merged.index.lastFullFirstSeq).toBe(whole.index.lastFullFirstSeq);
    expect(merged.index.lastFullFirstSeq).toBeGreaterThan(0);
    expect(merged.index.packCount).toBe(whole.index.packCount);
    expect(merged.level).toBe(1);
    await expect(
      mergeSegments(
        bench.target(),
        [readers[0], readers[2]].filter((r) => r !== undefined),
        1,
      ),
    ).rejects.toThrow('does not follow');
  });

  it('refuse to be merged into a chain that forks', async () => {
    const bench = testBench();
    const part = (first: number, prev: Buffer) =>
      memorySegment([commitOf({ seq: first }), commitOf({ seq: first + 1 })], prev);
    const inputs = [part(1, hashOf(0)), part(3, hashOf(77))];
    await expect(mergeSegments(bench.target(), inputs, 1)).rejects.toMatchObject({
      kind: 'damaged',
    });
    const names: string[] = [];
    for await (const o of bench.store.list('')) names.push(o.name);
    expect(names).toEqual([]);
  });

  it('as full maps hold no holes, no overlaps and the commit of their point', async () => {
    const bench = testBench();
    const { commits } = randomHistory(45, 200, { resize: true });
    const deltas = [memorySegment(commits, hashOf(0))];
    const at = commits[150];
    const full = await openSegment(
      bench.context,
      await putFullMap(bench.target(), { deltas, fulls: [] }, at?.seq ?? 0),
    );
    expect(full.header.level).toBeUndefined();
    expect(full.firstSeq).toBe(1);
    const got = await contents(full); // opening the pages checks order, overlap and holes
    expect(got.commits).toEqual([at?.record]);
    expect(got.extents.length).toBeGreaterThan(5);
    expect(full.index.prevHash).toEqual(Buffer.alloc(32));
  });

  it.each([true, false])(
    'find every flipped bit and every cut, or read the same (encrypted: %s)',
    async (encrypted) => {
      const bench = testBench(encrypted);
      const { commits } = randomHistory(46, 6);
      const source = memorySegment(commits, hashOf(0));
      const name = await putMemorySegment(bench.target(), source);
      const want = await contents(source);
      const bytes = await bench.store.get(name);
      const tryRead = async (changed: Buffer): Promise<void> => {
        await bench.store.put(name, changed);
        const reader = await openSegment({ ...bench.context, cache: new PageCache() }, name);
        expect(await contents(reader)).toEqual(want);
      };
      await tryRead(bytes);
      for (let bit = 0; bit < bytes.length * 8; bit += bit < 1200 ? 1 : 5) {
        const changed = Buffer.from(bytes);
        changed[bit >> 3] = (changed[bit >> 3] ?? 0) ^ (1 << (bit & 7));
        await expect(tryRead(changed), `bit ${bit}`).rejects.toMatchObject({ kind: 'damaged' });
      }
      for (let n = 0; n < bytes.length; n += 7) {
        await expect(tryRead(bytes.subarray(0, n)), `cut at ${n}`).rejects.toMatchObject({
          kind: 'damaged',
        });
      }
      await expect(tryRead(Buffer.concat([bytes, Buffer.from([0])]))).rejects.toMatchObject({
        kind: 'damaged',
      });
    },
  );

  it('in the place of another segment, volume or repository are refused', async () => {
    const bench = testBench(true);
    const [a, b] = [randomHistory(47, 5).commits, randomHistory(48, 6).commits];
    const nameA = await putMemorySegment(bench.target(), memorySegment(a, hashOf(0)));
    const nameB = await putMemorySegment(bench.target(), memorySegment(b, hashOf(0)));
    await bench.store.put(nameA, await bench.store.get(nameB));
    await expect(openSegment(bench.context, nameA)).rejects.toThrow('files were exchanged');
    await expect(
      openSegment({ ...bench.context, repositoryId: '33'.repeat(16) }, nameB),
    ).rejects.toThrow('another repository');
    const moved = nameB.replace(VOLUME, '44'.repeat(16));
    await bench.store.put(moved, await bench.store.get(nameB));
    await expect(
      openSegment({ ...bench.context, volumeId: '44'.repeat(16) }, moved),
    ).rejects.toThrow('exchanged');
    const wrongKey = testBench(true).context;
    const other = {
      ...wrongKey,
      store: bench.store,
      keys: {
        ...wrongKey.keys,
        segmentSealer: () => testBench(true).keys.segmentSealer(Buffer.alloc(16, 1)),
      },
    };
    await expect(openSegment(other, nameB)).rejects.toThrow('does not open');
  });
});

describe('memorySegment', () => {
  it('takes extents as bytes as well', async () => {
    const { commits } = randomHistory(49, 20, { merged: true });
    const packed = commits.map((c) => {
      const one = memorySegment([c], hashOf(0));
      if (Buffer.isBuffer(c.extents)) throw new Error('expected records');
      const bytes = Buffer.alloc(c.extents.length * 28);
      c.extents.forEach((e, i) => {
        bytes.writeUInt32LE(e.block, i * 28);
        bytes.writeUInt32LE(e.count, i * 28 + 8);
        bytes.writeUInt32LE(e.seq, i * 28 + 12);
        bytes.writeUInt32LE(e.pack, i * 28 + 16);
        bytes.writeUInt32LE(e.frame, i * 28 + 20);
        bytes.writeUInt16LE(e.sub, i * 28 + 24);
        bytes.writeUInt16LE(e.skip, i * 28 + 26);
      });
      expect(one.index.extentCount).toBe(c.extents.length);
      return { ...c, extents: bytes };
    });
    expect(await contents(memorySegment(packed, hashOf(0)))).toEqual(expected(commits));
  });

  it('sorts blocks far out as well as near ones', async () => {
    const far = 2 ** 40;
    const e = (block: number) => ({ block, count: 1, seq: 0, pack: 0, frame: 0, sub: 0, skip: 0 });
    const commits = Array.from({ length: 9000 }, (_, i) =>
      commitOf({ seq: i + 1, extents: [e(i % 3), e(far + (i % 5))], packIds: [packIdOf(1)] }),
    );
    expect(await contents(memorySegment(commits, hashOf(0)))).toEqual(expected(commits));
  });

  it('refuses commits with a gap, and records of another commit', () => {
    expect(() => memorySegment([commitOf({ seq: 1 }), commitOf({ seq: 3 })], hashOf(0))).toThrow(
      RangeError,
    );
    expect(() => memorySegment([], hashOf(0))).toThrow(RangeError);
    const wrong = commitOf({
      seq: 1,
      extents: [{ block: 0, count: 1, seq: 1, pack: 0, frame: 0, sub: 0, skip: 0 }],
      packIds: [packIdOf(1)],
    });
    expect(() => memorySegment([wrong], hashOf(0))).toThrow(RangeError);
  });
});

describe('SegmentBuilder', () => {
  const record = (seq: number) => commitOf({ seq }).record;
  const build = (
    use: (b: SegmentBuilder) => void,
    range: ConstructorParameters<typeof SegmentBuilder>[1] = small,
  ) => {
    const b = new SegmentBuilder(testBench().target(), range, hashOf(0));
    b.packIndex(Buffer.alloc(16, 1));
    use(b);
    return b.finish();
  };
  const both = (b: SegmentBuilder) => {
    b.addCommit(record(1), 0);
    b.addCommit(record(2), 0);
  };

  it.each<[string, (b: SegmentBuilder) => void]>([
    [
      'extents out of order',
      (b) => (b.addExtent(5, 1, 1, 0, 0, 0, 0), b.addExtent(4, 1, 1, 0, 0, 0, 0), both(b)),
    ],
    [
      'one block twice in a commit',
      (b) => (b.addExtent(5, 1, 1, 0, 0, 0, 0), b.addExtent(5, 1, 1, 0, 0, 0, 0), both(b)),
    ],
    ['an extent of a commit outside', (b) => (b.addExtent(5, 1, 3, 0, 0, 0, 0), both(b))],
    ['an extent across a stripe', (b) => (b.addExtent(262_143, 2, 1, 0, 0, 0, 0), both(b))],
    ['an unknown pack', (b) => (b.addExtent(5, 1, 1, 1, 0, 0, 0), both(b))],
    [
      'an extent after a commit',
      (b) => (b.addCommit(record(1), 0), b.addExtent(5, 1, 1, 0, 0, 0, 0)),
    ],
    ['a missing commit at the start', (b) => b.addCommit(record(2), 0)],
    ['a missing commit at the end', (b) => b.addCommit(record(1), 0)],
    ['a commit too many', (b) => (both(b), b.addCommit(record(3), 0))],
  ])('refuses %s', (_, use) => {
    expect(() => build(use)).toThrow(RangeError);
  });

  it('refuses holes and overlaps in a full map', () => {
    const full = { level: undefined, firstSeq: 1, lastSeq: 2 };
    const last = (b: SegmentBuilder) => b.addCommit(record(2), 0);
    expect(
      build(
        (b) => (b.addExtent(5, 2, 2, 0, 0, 0, 0), b.addExtent(7, 1, 2, 0, 0, 0, 0), last(b)),
        full,
      ).length,
    ).toBe(6);
    expect(() => build((b) => (b.addExtent(5, 1, 2, HOLE, 0, 0, 0), last(b)), full)).toThrow(
      RangeError,
    );
    expect(() =>
      build(
        (b) => (b.addExtent(5, 3, 2, 0, 0, 0, 0), b.addExtent(7, 1, 2, 0, 0, 0, 0), last(b)),
        full,
      ),
    ).toThrow(RangeError);
  });
});
