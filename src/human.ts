/**
 * Sizes, rates, durations and times as people write and read them. Pure; no locale, no clock.
 * Parsers throw {@link RangeError} with a reason that names the text; callers add what it was for.
 */

const BINARY_UNITS = ['B', 'KiB', 'MiB', 'GiB', 'TiB', 'PiB', 'EiB'] as const;

/** `65536` → "64.0 KiB"; bytes below 1 KiB without a fraction. Negative numbers keep their sign. */
export function formatBytes(bytes: number): string {
  const sign = bytes < 0 ? '-' : '';
  let value = Math.abs(bytes);
  let unit = 0;
  while (value >= 1024 && unit < BINARY_UNITS.length - 1) {
    value /= 1024;
    unit += 1;
  }
  // 1023.96 KiB must become "1.0 MiB", not "1024.0 KiB".
  if (unit > 0 && unit < BINARY_UNITS.length - 1 && value >= 1023.95) {
    value /= 1024;
    unit += 1;
  }
  const digits = unit === 0 ? String(Math.round(value)) : value.toFixed(1);
  return `${sign}${digits} ${BINARY_UNITS[unit] ?? 'B'}`;
}

/** Bytes per second: "312.5 MiB/s". */
export function formatRate(bytesPerSecond: number): string {
  return `${formatBytes(Math.round(bytesPerSecond))}/s`;
}

/** Seconds as the two largest units: "0.4s", "12s", "3m 05s", "2h 10m", "5d 03h". Never negative. */
export function formatDuration(seconds: number): string {
  const value = Math.max(0, seconds);
  if (value < 9.95) return `${value.toFixed(1).replace(/\.0$/, '')}s`;
  const whole = Math.round(value);
  const two = (n: number): string => String(n).padStart(2, '0');
  if (whole < 60) return `${whole}s`;
  if (whole < 3600) return `${Math.floor(whole / 60)}m ${two(whole % 60)}s`;
  if (whole < 86_400)
    return `${Math.floor(whole / 3600)}h ${two(Math.floor((whole % 3600) / 60))}m`;
  return `${Math.floor(whole / 86_400)}d ${two(Math.floor((whole % 86_400) / 3600))}h`;
}

/** Whole numbers in groups of three: 1234567 → "1 234 567". */
export function formatCount(count: number | bigint): string {
  return String(count).replace(/\B(?=(\d{3})+(?!\d))/g, ' ');
}

/** A ratio as a percentage with one digit: 0.123 → "12.3%". */
export function formatPercent(ratio: number): string {
  return `${(ratio * 100).toFixed(1)}%`;
}

const NS_PER_SECOND = 1_000_000_000n;

function splitNs(ns: bigint): { readonly ms: number; readonly fraction: string } {
  let seconds = ns / NS_PER_SECOND;
  let rest = ns % NS_PER_SECOND;
  if (rest < 0n) {
    rest += NS_PER_SECOND;
    seconds -= 1n;
  }
  return { ms: Number(seconds) * 1000, fraction: String(rest).padStart(9, '0') };
}

/**
 * Nanoseconds since 1970 (UTC) as RFC 3339 with all nine digits: "2026-11-22T15:31:07.123456789Z".
 * This is the form of every time in `--json`. Throws RangeError outside the years 0 to 9999.
 */
export function formatTimeNs(ns: bigint): string {
  const { ms, fraction } = splitNs(ns);
  const date = new Date(ms);
  const year = date.getUTCFullYear();
  if (!(year >= 0 && year <= 9999)) throw new RangeError(`time out of range: ${ns} ns`);
  return `${date.toISOString().slice(0, 19)}.${fraction}Z`;
}

/**
 * The same instant for people: local time with milliseconds and the zone's offset,
 * "2026-11-22 16:31:07.123 +01:00". It can be given back to `--at`.
 */
export function formatTimeLocal(ns: bigint): string {
  const { ms, fraction } = splitNs(ns);
  const date = new Date(ms);
  const offset = -date.getTimezoneOffset();
  const local = new Date(ms + offset * 60_000).toISOString();
  const two = (n: number): string => String(n).padStart(2, '0');
  const abs = Math.abs(offset);
  const zone = `${offset < 0 ? '-' : '+'}${two(Math.floor(abs / 60))}:${two(abs % 60)}`;
  return `${local.slice(0, 10)} ${local.slice(11, 19)}.${fraction.slice(0, 3)} ${zone}`;
}

const SIZE_FACTORS: Readonly<Record<string, number>> = {
  '': 1,
  b: 1,
  k: 2 ** 10,
  m: 2 ** 20,
  g: 2 ** 30,
  t: 2 ** 40,
  p: 2 ** 50,
};

/**
 * "4096", "64K", "64KiB", "1.5G": bytes, powers of 1024. "64KB" is refused: it means 64,000 to some and
 * 65,536 to others. The result is a whole number of at most 2^53 − 1.
 */
export function parseSize(text: string): number {
  const match = /^(\d+(?:\.\d+)?)\s*([a-z]?)(i?b)?$/i.exec(text.trim());
  const factor = SIZE_FACTORS[(match?.[2] ?? '?').toLowerCase()];
  const suffix = (match?.[3] ?? '').toLowerCase();
  const letter = match?.[2] ?? '';
  if (match === null || factor === undefined || (suffix === 'b' && letter !== '')) {
    throw new RangeError(
      `"${text}" is not a size; write bytes, or a number with K, M, G or T (KiB, MiB, …)`,
    );
  }
  const bytes = Number(match[1]) * factor;
  if (!Number.isSafeInteger(bytes))
    throw new RangeError(`"${text}" is not a whole number of bytes below 2^53`);
  return bytes;
}

const DURATION_MS: Readonly<Record<string, number>> = {
  ms: 1,
  s: 1000,
  m: 60_000,
  h: 3_600_000,
  d: 86_400_000,
  w: 604_800_000,
};

/** "250ms", "1s", "1.5s", "5m", "1h30m", "7d", "2w" → milliseconds (whole). A bare number needs its unit. */
export function parseDurationMs(text: string): number {
  const trimmed = text.trim().toLowerCase();
  if (!/^(\d+(?:\.\d+)?(?:ms|[smhdw])\s*)+$/.test(trimmed)) {
    throw new RangeError(
      `"${text}" is not a duration; write for example 500ms, 10s, 5m, 1h30m or 7d`,
    );
  }
  let ms = 0;
  for (const part of trimmed.matchAll(/(\d+(?:\.\d+)?)(ms|[smhdw])/g)) {
    ms += Number(part[1]) * (DURATION_MS[part[2] ?? ''] ?? Number.NaN);
  }
  const whole = Math.round(ms);
  if (!Number.isSafeInteger(whole)) throw new RangeError(`"${text}" is too long a duration`);
  return whole;
}

/** "10%", "2.5%" → 0.1, 0.025; only above 0 and up to 100. */
export function parsePercent(text: string): number {
  const match = /^(\d+(?:\.\d+)?)%$/.exec(text.trim());
  const percent = Number(match?.[1] ?? Number.NaN);
  if (!(percent > 0 && percent <= 100)) {
    throw new RangeError(`"${text}" is not a percentage above 0% and up to 100%`);
  }
  return percent / 100;
}

/** A whole number of at least `least`. */
export function parseWhole(text: string, least = 0): number {
  const value = /^\d+$/.test(text.trim()) ? Number(text) : Number.NaN;
  if (!Number.isSafeInteger(value) || value < least) {
    throw new RangeError(`"${text}" is not a whole number of at least ${least}`);
  }
  return value;
}

/**
 * `text` made safe for a terminal and for one line: control characters, line ends and bidirectional
 * overrides (names come from disks and other hosts) are written as \xNN or \u{NNNN}.
 */
export function printable(text: string): string {
  return text.replace(
    /[\u0000-\u001f\u007f-\u009f\u2028\u2029\u202a-\u202e\u2066-\u2069\ufeff]/g,
    (char) => {
      const code = char.charCodeAt(0);
      return code < 256 ? `\\x${code.toString(16).padStart(2, '0')}` : `\\u{${code.toString(16)}}`;
    },
  );
}
