/** What the dashboard of `b2 watch` shows, and the words for it. Pure: see dashboard.tsx for drawing. */
import { formatBytes, formatDuration, formatPercent, printable } from '../human.js';
import { displayWidth } from './table.js';

export interface DashboardDevice {
  /** Name of the volume, or the path while there is none. */
  readonly name: string;
  readonly state: string;
  readonly lagMs: number | undefined;
  /** A sample a second, oldest first; undefined where it was not known. */
  readonly lagHistory: readonly (number | undefined)[];
  /** Of a first scan or compare. */
  readonly scan: { readonly doneBytes: number; readonly totalBytes: number } | undefined;
  readonly writtenBytesPerSecond: number;
  readonly capturedBytesPerSecond: number;
  readonly storedBytesPerSecond: number;
  readonly points: number;
}

export interface DashboardPoint {
  /** Local, `18:40:11`. */
  readonly time: string;
  readonly device: string;
  readonly id: string;
  readonly class: string;
  readonly coverage: string;
  readonly storedBytes: number;
  readonly ageMs: number;
}

export interface DashboardAlarm {
  readonly time: string;
  readonly message: string;
}

export interface DashboardView {
  readonly host: string;
  /** Local time of day. */
  readonly time: string;
  readonly upSeconds: number;
  readonly repository: string;
  readonly repositoryBytes: number | undefined;
  readonly freeBytes: number | undefined;
  /** The time between points; lag up to twice this is as it should be. */
  readonly intervalMs: number;
  readonly devices: readonly DashboardDevice[];
  /** Newest first. */
  readonly points: readonly DashboardPoint[];
  /** Newest first. */
  readonly alarms: readonly DashboardAlarm[];
  /** What was done last by hand, or what is being done. */
  readonly message: string | undefined;
}

const BARS = '▁▂▃▄▅▆▇█';
/** A lag of this many intervals fills the bar. */
const FULL_INTERVALS = 8;

/**
 * The last `width` samples as bars: the lowest for no lag, the highest for eight intervals or more (each bar is half of the next), `·`
 * where it was not known.
 */
export function sparkline(
  samples: readonly (number | undefined)[],
  width: number,
  intervalMs: number,
): string {
  const shown = samples.slice(-width).map((lagMs) => {
    if (lagMs === undefined) return '·';
    const ratio = lagMs / (FULL_INTERVALS * intervalMs);
    const level = ratio <= 0 ? 0 : Math.ceil(BARS.length - 1 + Math.log2(ratio) - 1e-9);
    return BARS[Math.min(BARS.length - 1, Math.max(0, level))] ?? '·';
  });
  return shown.join('').padStart(width);
}

export type Mood = 'good' | 'busy' | 'bad';

/** Whether a device is as it should be. */
export function moodOf(d: DashboardDevice, intervalMs: number): Mood {
  switch (d.state) {
    case 'exact':
      return d.lagMs !== undefined && d.lagMs > 10 * intervalMs ? 'busy' : 'good';
    case 'stopped':
      return 'good';
    case 'outage':
    case 'absent':
    case 'failed':
      return 'bad';
    default:
      return 'busy';
  }
}

/** `resync 43.1%`, `exact`. */
export function stateText(d: DashboardDevice): string {
  const isScanning = d.state === 'baseline' || d.state === 'resync';
  return isScanning && d.scan !== undefined && d.scan.totalBytes > 0
    ? `${d.state} ${formatPercent(d.scan.doneBytes / d.scan.totalBytes).replace(/\.\d%/, '%')}`
    : d.state;
}

/** `35 ms`, `1.2s`. */
export function ageText(ms: number): string {
  return ms < 1000 ? `${Math.round(ms)} ms` : formatDuration(ms / 1000);
}

export function lagText(lagMs: number | undefined): string {
  return lagMs === undefined ? '?' : lagMs === 0 ? '0' : ageText(lagMs);
}

/** Bytes a second in at most 9 columns; nothing for none. */
export function rateText(bytesPerSecond: number): string {
  if (bytesPerSecond < 1) return '-';
  const text = formatBytes(Math.round(bytesPerSecond));
  return text.length > 9 ? text.replace(/\.\d/, '') : text;
}

/** `text` in exactly `width` columns: cut at its end (its start with `keepEnd`) with an ellipsis, or filled up. */
export function fit(
  text: string,
  width: number,
  options: { readonly align?: 'left' | 'right'; readonly keepEnd?: boolean } = {},
): string {
  const clean = printable(text);
  if (width <= 0) return '';
  let chars = [...clean];
  if (displayWidth(clean) > width) {
    while (chars.length > 0 && displayWidth(chars.join('')) > width - 1)
      chars = options.keepEnd === true ? chars.slice(1) : chars.slice(0, -1);
    chars = options.keepEnd === true ? ['…', ...chars] : [...chars, '…'];
  }
  const shown = chars.join('');
  const space = ' '.repeat(Math.max(0, width - displayWidth(shown)));
  return options.align === 'right' ? space + shown : shown + space;
}

/** Columns of the table of devices for a width of the terminal. */
export interface DeviceColumns {
  readonly name: number;
  readonly state: number;
  readonly lag: number;
  readonly spark: number;
  readonly rate: number;
}

export function deviceColumns(columns: number): DeviceColumns {
  const state = 13;
  const lag = 7;
  const rate = 9;
  // Marker, and a space between columns.
  const rest = Math.max(16, columns - 2 - state - lag - 3 * rate - 6);
  const name = Math.min(40, Math.max(8, Math.floor(rest * 0.5)));
  return { name, state, lag, rate, spark: Math.min(60, Math.max(4, rest - name)) };
}

/** How many lines each part gets. The frame stays below the height of the terminal, or it would flicker. */
export interface Rows {
  readonly devices: number;
  readonly points: number;
  readonly alarms: number;
}

/** Lines that are always there: title, repository, head of the table, message, keys, and the heads of two lists with a space before each. */
const FIXED_ROWS = 3 + 1 + 1 + 2 + 4;

export function shareRows(rows: number, devices: number, alarms: number): Rows {
  let left = Math.max(3, rows - 1 - FIXED_ROWS);
  const shownDevices = Math.max(1, Math.min(devices, Math.max(1, left - 4)));
  left = Math.max(0, left - shownDevices);
  const shownAlarms = Math.min(alarms, Math.max(1, Math.floor(left / 2)));
  return {
    devices: shownDevices,
    alarms: Math.max(1, shownAlarms),
    points: Math.max(1, left - Math.max(1, shownAlarms)),
  };
}
