/** What people write for a point in time (cli.md, "Times"). */
import { B2Error } from './errors.js';

/** A parsed time. A name is whatever is nothing else: a snapshot's, perhaps. */
export type When =
  | { readonly kind: 'latest' }
  /** `text`: as it was written, where it is a date or time, which may be a snapshot's name as well. */
  | { readonly kind: 'instant'; readonly ns: bigint; readonly text?: string }
  | { readonly kind: 'point'; readonly seq: number }
  | { readonly kind: 'name'; readonly name: string };

const UNIT_NS: Readonly<Record<string, bigint>> = {
  s: 1_000_000_000n,
  m: 60_000_000_000n,
  h: 3_600_000_000_000n,
  d: 86_400_000_000_000n,
  w: 604_800_000_000_000n,
};
const LONG: Readonly<Record<string, string>> = {
  sec: 's',
  second: 's',
  min: 'm',
  minute: 'm',
  hour: 'h',
  day: 'd',
  week: 'w',
};

const ISO =
  /^(\d{4})-(\d\d)-(\d\d)(?:[T ](\d\d)(?::?(\d\d)(?::?(\d\d)(?:[.,](\d{1,9}))?)?)?)?\s*(Z|z|[+-]\d\d(?::?\d\d)?)?$/;

function daysIn(year: number, month: number): number {
  return new Date(Date.UTC(year, month, 0)).getUTCDate();
}

function parseIso(text: string): bigint | undefined {
  const m = ISO.exec(text);
  if (m === null) return undefined;
  const n = (i: number): number => Number(m[i] ?? '0');
  const [year, month, day, hour, minute, second] = [n(1), n(2), n(3), n(4), n(5), n(6)];
  if (
    month < 1 ||
    month > 12 ||
    day < 1 ||
    day > daysIn(year, month) ||
    hour > 23 ||
    minute > 59 ||
    second > 59
  ) {
    throw new B2Error('usage', `"${text}" is not a date and time that exists`);
  }
  const fraction = BigInt((m[7] ?? '').padEnd(9, '0'));
  const zone = m[8];
  let ms: number;
  if (zone === undefined) {
    ms = new Date(year, month - 1, day, hour, minute, second).getTime(); // local time, as people mean it
  } else {
    let offset = 0;
    if (zone.toUpperCase() !== 'Z') {
      const sign = zone.startsWith('-') ? -1 : 1;
      const digits = zone.slice(1).replace(':', '').padEnd(4, '0');
      offset = sign * (Number(digits.slice(0, 2)) * 60 + Number(digits.slice(2)));
    }
    ms = Date.UTC(year, month - 1, day, hour, minute, second) - offset * 60_000;
  }
  if (ms < 0) throw new B2Error('usage', `"${text}" is before 1970`);
  return BigInt(ms) * 1_000_000n + fraction;
}

/**
 * Parses `latest`, `now`, `#1234`, ISO 8601 with or without zone (local), `5m ago`, `2 hours ago`; anything else is a name.
 * `nowNs` is the wall clock. Kind `usage` for a date that does not exist.
 */
export function parseWhen(text: string, nowNs: bigint): When {
  const t = text.trim();
  if (t === '') throw new B2Error('usage', 'an empty time');
  if (t === 'latest') return { kind: 'latest' };
  if (t === 'now') return { kind: 'instant', ns: nowNs };
  const point = /^#(\d{1,15})$/.exec(t);
  if (point !== null) return { kind: 'point', seq: Number(point[1]) };
  const ago = /^(\d{1,9})\s*([a-z]+)\s+ago$/i.exec(t);
  // Months to some, minutes to others: the wrong one would restore something else.
  if (ago?.[2] === 'M')
    throw new B2Error('usage', `"${text}" is not a time: M may be minutes or months`, {
      hint: `Write "${ago[1] ?? ''}m ago" for minutes; for months a date.`,
    });
  if (ago !== null) {
    const word = (ago[2] ?? '').toLowerCase();
    const unit = UNIT_NS[word] ?? UNIT_NS[LONG[word.replace(/s$/, '')] ?? ''];
    if (unit !== undefined) {
      const ns = nowNs - BigInt(ago[1] ?? '0') * unit;
      return { kind: 'instant', ns: ns < 0n ? 0n : ns };
    }
  }
  const iso = parseIso(t);
  if (iso !== undefined) return { kind: 'instant', ns: iso, text: t };
  return { kind: 'name', name: t };
}

/**
 * Whether `text` always means the moment it is read at, or one counted from it (`latest`, `now`, `5m ago`): a snapshot of such a name
 * could not be named.
 */
export function isRelativeTime(text: string): boolean {
  if (/^\d{4}-/.test(text)) return false; // a date, whether it exists or not
  const when = parseWhen(text, 0n);
  return when.kind === 'latest' || when.kind === 'instant';
}
