/** The search for versions against a model, the recording image, and what the manifest says of blocks. */
import { describe, expect, it } from 'vitest';

import { B2Error } from '../../../src/errors.js';
import type { Found, Look } from '../../../src/files/history-look.js';
import { HistoryPoints } from '../../../src/files/history-points.js';
import { findVersions, type SearchOptions } from '../../../src/files/history.js';
import { BlockSet, Recorder, type BlockRange } from '../../../src/files/recording.js';
import { sameBlocks } from '../../../src/files/diff-blocks.js';
import type { FileEntry } from '../../../src/files/types.js';
import { VolumeHistory } from '../../../src/repo/history.js';
import { openBlockMap } from '../../../src/repo/point.js';
import { commitsThatWrote } from '../../../src/repo/written.js';
import { memorySegment } from '../../../src/repo/segments/memory.js';
import { MemoryImage } from '../../support/image-memory.js';
import { newModel, seeded } from '../../support/model-volume.js';
import { hashOf, randomHistory } from '../../support/segment-model.js';
import { MemoryStore } from '../../support/store-memory.js';

const BLOCK = 4096;

describe('the recording image', () => {
  it('knows the blocks that were read, and those after the mark', async () => {
    const recorder = new Recorder();
    const memory = new MemoryImage([
      { length: 40 * BLOCK, hole: false },
      { length: 10 * BLOCK, hole: true },
      { length: 10 * BLOCK, hole: false },
    ]);
    const image = recorder.wrap(memory);
    const bytes = Buffer.alloc(2 * BLOCK);
    await image.read(bytes, BLOCK - 1);
    expect(bytes.equals(memory.content.subarray(BLOCK - 1, 3 * BLOCK - 1))).toBe(true);
    await image.read(Buffer.alloc(1), 3 * BLOCK);
    expect(recorder.all).toEqual([{ from: 0, to: 4 }]);
    expect(recorder.sinceMark).toEqual([]);
    recorder.mark();
    // Who is told of a hole need not read it; of data only that it is there.
    expect(await image.extents(35 * BLOCK, 20 * BLOCK)).toHaveLength(3);
    await image.read(Buffer.alloc(BLOCK), 0);
    await image.read(Buffer.alloc(0), 20 * BLOCK);
    expect(recorder.sinceMark).toEqual([
      { from: 0, to: 1 },
      { from: 40, to: 50 },
    ]);
    expect(recorder.all).toEqual([
      { from: 0, to: 4 },
      { from: 40, to: 50 },
    ]);
    await image.close();
    expect(memory.closed).toBe(1);
  });

  it('joins ranges across its pages, far out as well', () => {
    const set = new BlockSet();
    const far = 2 ** 40;
    set.add(far, 3 * BLOCK);
    set.add(32_767 * BLOCK, 2 * BLOCK);
    set.add(5 * BLOCK + 1, 1);
    expect(set.ranges()).toEqual([
      { from: 5, to: 6 },
      { from: 32_767, to: 32_769 },
      { from: far / BLOCK, to: far / BLOCK + 3 },
    ]);
  });
});

/** A file over time, as the model has it: what it is at each point. */
interface State {
  /** Undefined: not there. */
  readonly version?: number;
  /** Of the file, or of its directory. */
  readonly ctime: number;
}

const entry = (path: string, mtime: number, ctime: number): FileEntry => ({
  path,
  kind: 'file',
  permissions: 0o644,
  links: 1,
  uid: 0,
  gid: 0,
  sizeBytes: 5,
  allocatedBytes: 4096,
  mtimeNs: BigInt(mtime),
  ctimeNs: BigInt(ctime),
  inode: 7n,
});

function foundAt(s: State): Found {
  return s.version === undefined
    ? { state: 'absent', nearest: entry('/dir', 0, s.ctime) }
    : { state: 'present', entry: entry('/dir/f', s.version, s.ctime), sha256: `${s.version}` };
}

/**
 * `written[i]`: between points i and i + 1 a block of the journal (0) or of the file (1) was written. Answers as the
 * manifest would.
 */
function bench(
  states: readonly State[],
  written: readonly (readonly number[])[],
  more: Partial<SearchOptions> & { readonly changeTimes?: boolean } = {},
): { options: SearchOptions; looks: number[] } {
  const looks: number[] = [];
  const touches = (i: number, ranges: readonly BlockRange[]): boolean =>
    (written[i] ?? []).some((block) => ranges.some((r) => r.from <= block && block < r.to));
  return {
    looks,
    options: {
      limit: more.limit ?? Infinity,
      extraLooks: more.extraLooks ?? 20,
      look: (i) => {
        if (looks.includes(i)) throw new Error(`point ${i} was looked at twice`);
        looks.push(i);
        const look: Look = {
          found: foundAt(states[i] ?? { ctime: 0 }),
          fileSystem: 'disk',
          hasChangeTimes: more.changeTimes ?? true,
          reads: [{ from: 0, to: 2 }],
          lookupReads: [{ from: 1, to: 2 }],
          backends: ['kernel'],
        };
        return Promise.resolve(look);
      },
      points: {
        count: states.length,
        sameAround: (i, ranges, lo, hi) => {
          let [from, to] = [i, i];
          while (from > lo && !touches(from - 1, ranges)) from--;
          while (to < hi && !touches(to, ranges)) to++;
          return Promise.resolve({ from, to });
        },
        written: (ranges, a, b) => {
          for (let i = a; i < b; i++) if (touches(i, ranges)) return Promise.resolve(true);
          return Promise.resolve(false);
        },
      },
    },
  };
}

/** Versions of the model, newest first. */
function truth(
  states: readonly State[],
): { version: number | undefined; first: number; last: number }[] {
  const list: { version: number | undefined; first: number; last: number }[] = [];
  states.forEach(({ version }, i) => {
    const last = list.at(-1);
    if (last !== undefined && last.version === version) last.last = i;
    else list.push({ version, first: i, last: i });
  });
  return list.reverse();
}

async function search(options: SearchOptions): Promise<{
  versions: { version: number | undefined; first: number; last: number }[];
  found: Awaited<ReturnType<typeof findVersions>>;
}> {
  const found = await findVersions(options);
  return {
    found,
    versions: found.versions.map(({ look, first, last }) => ({
      version: look.found.state === 'present' ? Number(look.found.sha256) : undefined,
      first,
      last,
    })),
  };
}

const always = (n: number): number[][] => Array.from({ length: n }, () => [0]);

describe('the search for versions', () => {
  it('needs one look where no block was written', async () => {
    const states = Array.from({ length: 100_000 }, () => ({ version: 1, ctime: 1 }));
    const { options, looks } = bench(states, []);
    const { versions, found } = await search(options);
    expect(versions).toEqual([{ version: 1, first: 0, last: 99_999 }]);
    expect(found).toMatchObject({ looked: 1, proven: 99_999, inferred: 0, unknown: 0 });
    expect(looks).toEqual([99_999]);
  });

  it('halves where only the journal was written, and finds a version that came and went', async () => {
    const n = 50_000;
    const states: State[] = Array.from({ length: n }, (_, i) =>
      i < 12_345
        ? { version: 1, ctime: 1 }
        : i < 12_350
          ? { version: 2, ctime: 2 }
          : i < 30_000
            ? { version: 1, ctime: 3 }
            : i < 30_001
              ? { ctime: 4 }
              : { version: 5, ctime: 5 },
    );
    const written = always(n);
    written[12_344] = [0, 1];
    written[12_349] = [0, 1];
    const { options, looks } = bench(states, written);
    const { versions, found } = await search(options);
    expect(versions.at(0)).toEqual({ version: 5, first: 30_001, last: n - 1 });
    expect(versions.slice(-3)).toEqual(truth(states).slice(-3));
    expect(looks.length).toBeLessThan(80);
    expect(found.unknown).toBe(0);
    expect(found.looked + found.proven + found.inferred).toBe(n);
    expect(found.versions.every((v) => v.startIsExact && v.endIsExact)).toBe(true);
  });

  it('does not trust an equal change time where blocks of the file were written', async () => {
    // The volume was put back: all is as before, but something else was there meanwhile.
    const states: State[] = Array.from({ length: 64 }, (_, i) =>
      i >= 20 && i < 40 ? { version: 2, ctime: 2 } : { version: 1, ctime: 1 },
    );
    const written = always(64);
    written[19] = [0, 1];
    written[39] = [0, 1];
    const { versions } = await search(bench(states, written).options);
    expect(versions).toEqual(truth(states));
    const blind = bench(states, written, { extraLooks: 0 });
    const { found } = await search(blind.options);
    expect(found.versions).toHaveLength(1);
    expect(found).toMatchObject({ looked: 2, inferred: 62, unknown: 0 });
  });

  it('infers nothing without change times, or when asked not to', async () => {
    const states: State[] = Array.from({ length: 40 }, () => ({ version: 1, ctime: 1 }));
    const fat = bench(states, always(40), { changeTimes: false, extraLooks: 5 });
    const { found } = await search(fat.options);
    expect(found).toMatchObject({ looked: 7, inferred: 0, unknown: 33 });
    const all = bench(states, always(40), { extraLooks: Infinity });
    const whole = await search(all.options);
    expect(whole.found).toMatchObject({ looked: 40, proven: 0, inferred: 0, unknown: 0 });
  });

  it('is right about every point when it looks at all it cannot prove, whatever the blocks say', async () => {
    const random = seeded(7);
    for (let round = 0; round < 200; round++) {
      const states: State[] = [{ version: 1, ctime: 0 }];
      const written: number[][] = [];
      for (let i = 1; i < 30; i++) {
        const before = states[i - 1] ?? { ctime: 0 };
        const isChange = random() < 0.3;
        const version = Math.floor(random() * 3);
        states.push(
          isChange
            ? { ctime: Math.floor(random() * 2), ...(version > 0 ? { version } : {}) }
            : before,
        );
        // What changes is written; what is written need not change.
        written.push(isChange ? [Math.floor(random() * 2)] : random() < 0.3 ? [0] : []);
      }
      const { options } = bench(states, written, { extraLooks: Infinity });
      const { versions, found } = await search(options);
      expect(versions).toEqual(truth(states));
      expect(found.looked + found.proven).toBe(30);
    }
  });

  it('stops at the newest versions, and says that there are older ones', async () => {
    const states: State[] = Array.from({ length: 1024 }, (_, i) => ({ version: i, ctime: i }));
    const { options, looks } = bench(states, always(1024), { limit: 3 });
    const { versions, found } = await search(options);
    expect(versions).toEqual(truth(states).slice(0, 3));
    expect(found.hasOlder).toBe(true);
    expect(looks.length).toBeLessThan(20);
  });

  it('points that cannot be told are a version of their own', async () => {
    const states: State[] = Array.from({ length: 9 }, () => ({ version: 1, ctime: 1 }));
    const { options } = bench(states, always(9), { extraLooks: Infinity });
    const { look } = options;
    const { found } = await search({
      ...options,
      look: async (i) => ({
        ...(await look(i)),
        ...(i === 3 || i === 4
          ? { found: { state: 'unreadable', reason: `pack ${i}` }, hasChangeTimes: false }
          : {}),
      }),
    });
    expect(found.versions.map((v) => [v.look.found.state, v.first, v.last])).toEqual([
      ['present', 5, 8],
      ['unreadable', 3, 4],
      ['present', 0, 2],
    ]);
  });

  it('what a look throws ends the search', async () => {
    const { options } = bench([{ version: 1, ctime: 1 }], []);
    const look = (): Promise<Look> => Promise.reject(new B2Error('unsupported', 'no'));
    await expect(findVersions({ ...options, look })).rejects.toThrow('no');
  });
});

describe('what the manifest says of blocks', () => {
  it('names every commit that wrote one of them, and no other', async () => {
    for (const seed of [1, 2, 3]) {
      const { commits, blocks } = randomHistory(seed, 60, { merged: true });
      const half = 31;
      const segments = [commits.slice(0, half), commits.slice(half)].map((part, i) =>
        memorySegment(part, hashOf(i === 0 ? 0 : (commits[half - 1]?.seq ?? 0))),
      );
      const random = seeded(seed);
      for (let round = 0; round < 40; round++) {
        const ranges: BlockRange[] = [];
        let at = blocks - 400 - Math.floor(random() * 9000);
        while (at < blocks - 20 && ranges.length < 5) {
          const to = at + 1 + Math.floor(random() * 20);
          ranges.push({ from: at, to });
          at = to + 1 + Math.floor(random() * (random() < 0.2 ? 6000 : 90));
        }
        const after = Math.floor(random() * 40);
        const upto = after + 1 + Math.floor(random() * 40);
        const told = new Set<number>();
        await commitsThatWrote(segments, ranges, after, upto, (seq) => told.add(seq));
        const expected = new Set<number>();
        for (const c of commits) {
          if (Buffer.isBuffer(c.extents)) throw new Error('the model has decoded extents');
          for (const e of c.extents) {
            const seq = c.firstSeq + e.seq;
            if (seq <= after || seq > upto) continue;
            if (ranges.some((r) => r.from < e.block + e.count && e.block < r.to)) expected.add(seq);
          }
        }
        expect([...told].sort((a, b) => a - b)).toEqual([...expected].sort((a, b) => a - b));
      }
    }
  });

  it('stretches are as long as the blocks are the same, over full commits and another size too', async () => {
    const random = seeded(11);
    const { repo, model, writer } = await newModel(new MemoryStore({ record: false }), random, {
      sizeBytes: 64 * BLOCK,
    });
    const states: Buffer[] = [];
    const all = Array.from({ length: 64 }, (_, i) => i);
    for (let n = 0; n < 60; n++) {
      if (n === 50) model.resize(80 * BLOCK);
      const changed = model.mutate(2);
      // The second full commit stores what is the same in the same places only where chunks are reused: told by places.
      await model.capture(writer, n === 0 || n === 25 ? all : changed, n === 0 || n === 25);
      states.push(Buffer.from(model.data));
    }
    await writer.close();
    const history = await VolumeHistory.open(repo, model.volumeId);
    const points = await HistoryPoints.open(history, {});
    expect(points.count).toBe(60);
    let [told, possible] = [0, 0];
    for (let round = 0; round < 60; round++) {
      const from = Math.floor(random() * 60);
      const range = { from, to: from + 1 + Math.floor(random() * 3) };
      const i = Math.floor(random() * 60);
      const part = (n: number): Buffer =>
        (states[n] ?? Buffer.alloc(0)).subarray(range.from * BLOCK, range.to * BLOCK);
      const same = await points.sameAround(i, [range], 0, 59);
      for (let n = same.from; n <= same.to; n++) {
        expect(part(n).equals(part(i))).toBe(true);
        expect(states[n]?.length).toBe(states[i]?.length);
      }
      told += same.to - same.from;
      let [lo, hi] = [i, i];
      while (lo > 0 && part(lo - 1).equals(part(i))) lo--;
      while (hi < 59 && part(hi + 1).equals(part(i))) hi++;
      possible += hi - lo;
      const last = Math.min(59, i + 5);
      if (!(await points.written([range], i, last))) expect(part(last).equals(part(i))).toBe(true);
    }
    // Most of it is told; the full commit in the middle ends stretches.
    expect(told).toBeGreaterThan(possible * 0.5);
    const some = await HistoryPoints.open(history, { only: new Set([3, 9]) });
    expect([some.count, some.seq(0), some.seq(1)]).toEqual([2, 3, 9]);
    const [a, b] = [await openBlockMap(history, 30), await openBlockMap(history, 31)];
    expect(await sameBlocks(a, a)).toBe(true);
    expect(await sameBlocks(a, b)).toBe(
      (states[29] ?? Buffer.of(1)).equals(states[30] ?? Buffer.of(2)),
    );
    await history.close();
  });
});
