import { describe, expect, test } from 'vitest';

import { MAX_WINDOW_BYTES, Streams, type Range } from '../../../src/repo/streams.js';
import { dice } from '../../support/disks.js';

const MIB = 1024 * 1024;

/** Reads from `from` to `to` in steps; what was to be read ahead. */
function readOn(streams: Streams, from: number, to: number, step: number): Range[] {
  const ranges: Range[] = [];
  for (let at = from; at < to; at += step) {
    const range = streams.note(at, Math.min(step, to - at));
    if (range !== undefined) ranges.push(range);
  }
  return ranges;
}

describe('reading on and on', () => {
  test.each([4096, 65_536, 262_144, 1_048_576])(
    'in steps of %i is read ahead of, in windows that grow, each place once',
    (step) => {
      const ranges = readOn(new Streams(64 * MIB), 0, 64 * MIB, step);
      expect(ranges[0]?.from).toBeLessThanOrEqual(Math.max(256 * 1024, 2 * step));
      ranges.forEach(({ from, to }, i) => {
        expect(to).toBeGreaterThan(from);
        expect(to - from).toBeLessThanOrEqual(MAX_WINDOW_BYTES);
        // What a window does not reach has been read itself meanwhile.
        expect(from).toBeGreaterThanOrEqual(ranges[i - 1]?.to ?? 0);
      });
      const covered = ranges.reduce((n, r) => n + r.to - r.from, 0);
      expect(covered).toBeGreaterThan(56 * MIB);
      expect(ranges.at(-1)?.to).toBe(64 * MIB);
      expect(Math.max(...ranges.map((r) => r.to - r.from))).toBeGreaterThan(MIB);
    },
  );

  test('is found in several places at a time, and with requests out of order', () => {
    const streams = new Streams(1024 * MIB);
    let found = 0;
    for (let i = 0; i < 64; i++) {
      for (const start of [0, 200 * MIB, 700 * MIB]) {
        const swapped = i ^ 1;
        if (streams.note(start + swapped * 65_536, 65_536) !== undefined) found++;
      }
    }
    expect(found).toBeGreaterThan(6);
  });
});

test('random reads are not read ahead of', () => {
  const streams = new Streams(1024 * MIB);
  const roll = dice(3);
  for (let i = 0; i < 20_000; i++)
    expect(streams.note(roll(1024 * 256 - 1) * 4096, 4096)).toBeUndefined();
});
