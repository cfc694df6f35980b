/** Stretches of points in which blocks of several volumes are the same, against a model that compares every block at every point. */
import fc from 'fast-check';
import { expect, it } from 'vitest';

import {
  GroupedPoints,
  rangesByVolume,
  rangesOf,
  type PointsOfOne,
} from '../../../src/files/history-group.js';

/** Contents of a volume's blocks at its points, and the instants of these. */
interface Model {
  readonly states: readonly (readonly number[])[];
  readonly instants: readonly bigint[];
}

function pointsOf({ states, instants }: Model): PointsOfOne {
  const same = (a: number, b: number, ranges: readonly { from: number; to: number }[]): boolean =>
    ranges.every(({ from, to }) => {
      for (let n = from; n < to; n++) if (states[a]?.[n] !== states[b]?.[n]) return false;
      return true;
    });
  return {
    count: states.length,
    instantNs: (i) => instants[i] ?? -1n,
    sameAround: (i, ranges, lo, hi) => {
      expect(i >= lo && i <= hi).toBe(true);
      let [from, to] = [i, i];
      while (from > lo && same(i, from - 1, ranges)) from--;
      while (to < hi && same(i, to + 1, ranges)) to++;
      return Promise.resolve({ from, to });
    },
    written: (ranges, a, b) => {
      expect(a).toBeLessThanOrEqual(b);
      for (let n = a; n < b; n++) if (!same(n, n + 1, ranges)) return Promise.resolve(true);
      return Promise.resolve(false);
    },
  };
}

it('numbers of blocks say whose they are', () => {
  const own = [{ from: 0, to: 5 }];
  const other = [
    { from: 0, to: 1 },
    { from: 7, to: 2 ** 39 },
  ];
  const all = [...rangesOf(0, own), ...rangesOf(2, other)];
  expect([...rangesByVolume(all)]).toEqual([
    [0, own],
    [2, other],
  ]);
  expect(all.every((r) => Number.isSafeInteger(r.to))).toBe(true);
});

const BLOCKS = 3;
const aState = fc.array(fc.integer({ min: 0, max: 1 }), { minLength: BLOCKS, maxLength: BLOCKS });
const aVolume = fc.array(aState, { minLength: 1, maxLength: 9 });

it('a stretch has the same blocks in every volume at every point of it, and is as long as it can be', async () => {
  await fc.assert(
    fc.asyncProperty(
      aVolume,
      fc.array(fc.array(fc.option(aState, { nil: undefined }), { minLength: 9, maxLength: 9 }), {
        minLength: 1,
        maxLength: 2,
      }),
      fc.nat(),
      async (states, others, pick) => {
        const own: Model = { states, instants: states.map((_, i) => BigInt(i * 10)) };
        /** Another volume lacks some instants, and has one that the volume lacks. */
        const models = others.map((list): Model => {
          const there = list
            .slice(0, states.length)
            .flatMap((s, i) => (s === undefined ? [] : [{ s, i }]));
          return { states: there.map((t) => t.s), instants: there.map((t) => BigInt(t.i * 10)) };
        });
        const grouped = new GroupedPoints(pointsOf(own), (volume, instants) => {
          expect([...instants]).toEqual(own.instants);
          return Promise.resolve(pointsOf(models[volume - 1] ?? own));
        });
        const i = pick % states.length;
        const whole = [{ from: 0, to: BLOCKS }];
        const ranges = [
          ...rangesOf(0, [{ from: 0, to: 1 }]),
          ...models.flatMap((_, n) => rangesOf(n + 1, whole)),
        ];
        const isLike = (k: number): boolean =>
          states[k]?.[0] === states[i]?.[0] &&
          others.every((list) => {
            const [x, y] = [list[k], list[i]];
            return x !== undefined && y !== undefined && x.join() === y.join();
          });
        let [from, to] = [i, i];
        if (others.every((list) => list[i] !== undefined)) {
          while (from > 0 && isLike(from - 1)) from--;
          while (to < states.length - 1 && isLike(to + 1)) to++;
        }
        expect(await grouped.sameAround(i, ranges, 0, states.length - 1)).toEqual({ from, to });
        if (from < to) expect(await grouped.written(ranges, from, to)).toBe(false);
        if (to < states.length - 1) expect(await grouped.written(ranges, i, to + 1)).toBe(true);
      },
    ),
  );
});

it('nothing of other volumes is opened where nothing of them was read', async () => {
  const own = { states: [[1], [1], [2]], instants: [1n, 2n, 3n] };
  const grouped = new GroupedPoints(pointsOf(own), () => Promise.reject(new Error('opened')));
  expect(await grouped.sameAround(0, [{ from: 0, to: 1 }], 0, 2)).toEqual({ from: 0, to: 1 });
  expect(await grouped.written([{ from: 0, to: 1 }], 0, 2)).toBe(true);
});
