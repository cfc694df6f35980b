import * as fc from 'fast-check';
import { describe, expect, it } from 'vitest';
import {
  dayName,
  dayOf,
  daySpan,
  fileName,
  hourSpan,
  pointName,
  seqOfPointName,
  volumePaths,
} from '../../../src/mount/names.js';

const NS = 1_763_820_245_123_456_789n; // 2025-11-22T14:04:05.123456789Z

describe('names of points', () => {
  it('are the time of day in UTC and the id, without colons', () => {
    expect(dayName(NS)).toBe('2025-11-22');
    expect(pointName(NS, 12)).toBe('14-04-05.123456789Z-#12');
    expect(seqOfPointName('14-04-05.123456789Z-#12')).toBe(12);
  });

  it('lead back to the span of day and hour that the instant lies in', () => {
    fc.assert(
      fc.property(fc.bigInt(0n, 4_102_444_800_000_000_000n), (ns) => {
        const day = daySpan(dayName(ns));
        expect(day).toEqual(dayOf(ns));
        const hour = day === undefined ? undefined : hourSpan(day, pointName(ns, 1).slice(0, 2));
        expect(hour !== undefined && ns >= hour.fromNs && ns <= hour.toNs).toBe(true);
      }),
    );
  });

  it.each(['2026-02-31', '2026-13-01', '2026-1-1', 'x', '', '2026-11-22Z', '1969-12-31'])(
    '%s is no day',
    (name) => {
      expect(daySpan(name)).toBeUndefined();
    },
  );

  it.each(['24', '1', '', '001', 'ab'])('%s is no hour', (name) => {
    expect(hourSpan({ fromNs: 0n, toNs: 1n }, name)).toBeUndefined();
  });

  it.each([
    '14-04-05.123456789Z-#0',
    '14-04-05.123456789Z-#012',
    '14-04-05Z-#1',
    '14-04-05.123456789Z-#99999999999999999',
    '',
  ])('%s is no point', (name) => {
    expect(seqOfPointName(name)).toBeUndefined();
  });
});

describe('file names', () => {
  it('hold nothing that a path cannot, and stay as they are where they can', () => {
    expect(fileName('before upgrade (ü)', '1')).toBe('before upgrade (ü)');
    expect(fileName('a:b%c', '1')).toBe('a%3Ab%25c');
    expect(fileName('.', '1')).toBe('%2E');
    expect(fileName('..', '1')).toBe('%2E%2E');
    expect(fileName('', '7')).toBe('~7');
    fc.assert(
      fc.property(
        fc.string({ maxLength: 300, unit: 'grapheme' }),
        fc.string({ maxLength: 300, unit: 'grapheme' }),
        (a, b) => {
          const [x, y] = [fileName(a, '1'), fileName(b, '2')];
          expect(x).not.toMatch(/[/\0:]/);
          expect(['', '.', '..']).not.toContain(x);
          expect(Buffer.byteLength(x)).toBeLessThanOrEqual(255);
          if (a !== b) expect(x).not.toBe(y);
        },
      ),
    );
  });
});

describe('paths of volumes', () => {
  const paths = (...names: readonly string[]): string[] =>
    volumePaths(names.map((name, i) => ({ id: `${i}`.repeat(32), name }))).map((p) => p.join('/'));

  it('are the names, split at slashes', () => {
    expect(paths('web/sda', 'web/sda/p1', 'disk')).toEqual(['web/sda', 'web/sda/p1', 'disk']);
  });

  it('are different for all volumes, and leave latest, snapshots and points to the volume above', () => {
    expect(paths('a', 'a', 'a/latest', 'a/points/x', '/', '')).toEqual([
      'a',
      'a~11111111',
      'a/latest~',
      'a/points~/x',
      '~44444444',
      '~55555555',
    ]);
  });
});
