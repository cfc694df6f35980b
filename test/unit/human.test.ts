import fc from 'fast-check';
import { describe, expect, it } from 'vitest';
import {
  formatBytes,
  formatCount,
  formatDuration,
  formatPercent,
  formatRate,
  formatTimeLocal,
  formatTimeNs,
  parseDurationMs,
  parsePercent,
  parseSize,
  parseWhole,
  printable,
} from '../../src/human.js';

describe('formatBytes', () => {
  it.each([
    [0, '0 B'],
    [1023, '1023 B'],
    [1024, '1.0 KiB'],
    [65_536, '64.0 KiB'],
    [1024 ** 2 - 1, '1.0 MiB'],
    [1.5 * 1024 ** 3, '1.5 GiB'],
    [Number.MAX_SAFE_INTEGER, '8.0 PiB'],
    [-2048, '-2.0 KiB'],
  ])('%d → %s', (bytes, text) => {
    expect(formatBytes(bytes)).toBe(text);
  });

  it('never shows 1024 of a unit', () => {
    fc.assert(
      fc.property(fc.maxSafeNat(), (n) => {
        expect(formatBytes(n)).not.toMatch(/^1024(\.0)? /);
      }),
    );
  });
});

describe('formatDuration', () => {
  it.each([
    [-3, '0s'],
    [0.04, '0s'],
    [0.44, '0.4s'],
    [9.96, '10s'],
    [59.4, '59s'],
    [59.6, '1m 00s'],
    [185, '3m 05s'],
    [3599.7, '1h 00m'],
    [7830, '2h 10m'],
    [5 * 86_400 + 3 * 3600, '5d 03h'],
  ])('%d → %s', (seconds, text) => {
    expect(formatDuration(seconds)).toBe(text);
  });
});

it('formats rates, counts and ratios', () => {
  expect(formatRate(312.5 * 2 ** 20)).toBe('312.5 MiB/s');
  expect(formatCount(1_234_567n)).toBe('1 234 567');
  expect(formatCount(999)).toBe('999');
  expect(formatPercent(0.1234)).toBe('12.3%');
});

describe('times', () => {
  it('keep all nanoseconds, before 1970 too', () => {
    expect(formatTimeNs(0n)).toBe('1970-01-01T00:00:00.000000000Z');
    expect(formatTimeNs(1_700_000_000_123_456_789n)).toBe('2023-11-14T22:13:20.123456789Z');
    expect(formatTimeNs(-1n)).toBe('1969-12-31T23:59:59.999999999Z');
    expect(() => formatTimeNs(10n ** 30n)).toThrow(RangeError);
    expect(() => formatTimeNs(253_402_300_800_000_000_000n)).toThrow(RangeError);
  });

  it('are local for people and mean the same instant', () => {
    fc.assert(
      fc.property(fc.bigInt({ min: 0n, max: 4_000_000_000_000n }), (ms) => {
        const text = formatTimeLocal(ms * 1_000_000n + 999_999n);
        expect(Date.parse(text.replace(' ', 'T').replace(' ', ''))).toBe(Number(ms));
      }),
    );
  });
});

describe('parseSize', () => {
  it.each([
    ['0', 0],
    ['4096', 4096],
    ['64K', 65_536],
    ['64k', 65_536],
    ['64KiB', 65_536],
    ['1.5G', 1.5 * 2 ** 30],
    ['1TiB', 2 ** 40],
    ['512B', 512],
  ])('%s', (text, bytes) => {
    expect(parseSize(text)).toBe(bytes);
  });

  it.each(['', 'K', '64KB', '-1', '1e3', '0.3', '9999999T', '12Q', '1.1.1', '0x10'])(
    'refuses %j',
    (text) => {
      expect(() => parseSize(text)).toThrow(RangeError);
      expect(() => parseSize(text)).toThrow(`"${text}"`);
    },
  );
});

describe('parseDurationMs', () => {
  it.each([
    ['250ms', 250],
    ['1s', 1000],
    ['1.5s', 1500],
    ['1h30m', 5_400_000],
    ['1h 30m', 5_400_000],
    ['7d', 604_800_000],
    ['2W', 1_209_600_000],
  ])('%s', (text, ms) => {
    expect(parseDurationMs(text)).toBe(ms);
  });

  it.each(['', '5', 's', '5x', '-5s', '5s later', '99999999999999w'])('refuses %j', (text) => {
    expect(() => parseDurationMs(text)).toThrow(RangeError);
  });
});

it('parses percentages and whole numbers', () => {
  expect(parsePercent('2.5%')).toBe(0.025);
  expect(parsePercent('100%')).toBe(1);
  for (const text of ['0%', '101%', '5', '%', '-1%'])
    expect(() => parsePercent(text)).toThrow(RangeError);
  expect(parseWhole('7', 1)).toBe(7);
  for (const text of ['0', '1.5', '-1', '', '1e3', '9007199254740993']) {
    expect(() => parseWhole(text, 1)).toThrow(RangeError);
  }
});

it('shows control characters instead of sending them to the terminal', () => {
  expect(printable('a\u001b[31mb\nc\u202ed\u0085')).toBe('a\\x1b[31mb\\x0ac\\u{202e}d\\x85');
  expect(printable('grüße 日本')).toBe('grüße 日本');
});
