import { describe, expect, it } from 'vitest';
import { isRelativeTime, parseWhen } from '../../src/when.js';

const NOW = 1_800_000_000_123_456_789n;
const S = 1_000_000_000n;

describe('parseWhen', () => {
  it.each([
    ['now', NOW],
    ['5m ago', NOW - 300n * S],
    ['5 minutes ago', NOW - 300n * S],
    ['2 hours ago', NOW - 7200n * S],
    ['1d ago', NOW - 86_400n * S],
    ['3 weeks ago', NOW - 3n * 604_800n * S],
    ['90 sec ago', NOW - 90n * S],
    ['999999999w ago', 0n],
    ['2026-11-22T15:04:05Z', 1_795_359_845n * S],
    ['2026-11-22 15:04:05.5Z', 1_795_359_845n * S + 500_000_000n],
    ['2026-11-22T15:04:05.123456789Z', 1_795_359_845n * S + 123_456_789n],
    ['2026-11-22T17:04:05+02:00', 1_795_359_845n * S],
    ['2026-11-22T10:04:05-0500', 1_795_359_845n * S],
    ['20261122', undefined],
  ])('%s', (text, ns) => {
    if (ns === undefined) expect(parseWhen(text, NOW)).toEqual({ kind: 'name', name: text });
    else expect(parseWhen(text, NOW)).toMatchObject({ kind: 'instant', ns });
  });

  it('takes a time without zone as local', () => {
    const ms = new Date(2026, 10, 22, 15, 4).getTime();
    expect(parseWhen('2026-11-22T15:04', NOW)).toEqual({
      kind: 'instant',
      ns: BigInt(ms) * 1_000_000n,
      text: '2026-11-22T15:04',
    });
    const day = new Date(2026, 10, 22).getTime();
    expect(parseWhen('2026-11-22', NOW)).toMatchObject({ ns: BigInt(day) * 1_000_000n });
  });

  it('knows points, names and latest', () => {
    expect(parseWhen('latest', NOW)).toEqual({ kind: 'latest' });
    expect(parseWhen('#1234', NOW)).toEqual({ kind: 'point', seq: 1234 });
    expect(parseWhen(' before-upgrade ', NOW)).toEqual({ kind: 'name', name: 'before-upgrade' });
    expect(parseWhen('5 apples ago', NOW)).toEqual({ kind: 'name', name: '5 apples ago' });
  });

  it.each(['2026-02-29', '2026-13-01', '2026-01-01T24:00', '1969-12-31T23:59:59Z', '', '2M ago'])(
    'refuses %j',
    (text) => {
      expect(() => parseWhen(text, NOW)).toThrowError(
        expect.objectContaining({ kind: 'usage', code: 2 }),
      );
    },
  );
});

it('tells times that are counted from now from dates and names', () => {
  for (const text of ['now', 'latest', '5m ago', '2 weeks ago'])
    expect(isRelativeTime(text)).toBe(true);
  for (const text of ['2026-11-22', '2026-02-30', '2026-11-22T15:04Z', 'long ago', 'nightly'])
    expect(isRelativeTime(text)).toBe(false);
});
