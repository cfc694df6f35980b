/**
 * Keeps a service manager informed of a watch: ready, status, watchdog, more time while a start gets on.
 *
 * Ready is said when the changes of every device are captured (see {@link WatchDaemon.isReady}), not with the first exact point: a
 * first reading takes hours on a large disk, and a unit that multi-user.target wants would hold up the boot for as long. How far
 * that has come is in the status.
 */
import type { Clock } from '../clock.js';
import { formatBytes, formatDuration, formatPercent } from '../human.js';
import type { Notifier } from './notify.js';
import type { DeviceReport, WatchReport } from './report.js';

/** Lag above this counts as standing still if nothing else moves. */
const LAG_LIMIT_MS = 60_000;
const TICK_MS = 1_000;
const STATUS_EVERY_MS = 5_000;
const EXTEND_EVERY_MS = 10_000;
/** Time that is asked for at a time while a start makes progress, and for a last point. */
const EXTEND_MS = 120_000;
/** A start that has not moved for so long makes no progress: opening a large repository on a slow disk shows nothing meanwhile. */
const START_STALL_MS = 300_000;

/** Everything of a device that moves while its capture does. */
function movement(d: DeviceReport): string {
  return [d.state, d.points, d.lastPoint?.seq, d.scan?.doneBytes, d.stagedBytes].join(' ');
}

/** True where a device that stands still is as it should be. */
function mayRest(d: DeviceReport): boolean {
  switch (d.state) {
    case 'stopped':
    case 'failed':
    case 'absent':
    case 'outage': // changed blocks are remembered; the repository is what stands still
      return true;
    case 'exact':
    case 'coalescing':
    case 'unreadable':
      // Where parts cannot be read the lag is not known, and points come nevertheless.
      return d.state === 'unreadable'
        ? d.pendingBytes === 0
        : (d.lagMs ?? Infinity) <= LAG_LIMIT_MS;
    case 'starting':
    case 'baseline':
    case 'resync':
      return false;
  }
}

/** Tells whether capture progresses: no device has both something to do and stood still for longer than `limitMs`. */
export class Pulse {
  private readonly seen = new Map<string, { movement: string; atMs: number }>();

  /** Call it every now and then with the present state; `nowMs` of a monotonic clock. */
  beats(devices: readonly DeviceReport[], nowMs: number, limitMs: number): boolean {
    let beating = true;
    for (const d of devices) {
      const now = movement(d);
      const last = this.seen.get(d.device);
      if (last === undefined || last.movement !== now || mayRest(d) || d.capturedBytesPerSecond > 0)
        this.seen.set(d.device, { movement: now, atMs: nowMs });
      else if (nowMs - last.atMs > limitMs) beating = false;
    }
    return beating;
  }
}

function deviceText(d: DeviceReport): string {
  const name = d.volume ?? d.device;
  const isScanning = d.state === 'baseline' || d.state === 'resync';
  if (isScanning && d.scan !== undefined && d.scan.totalBytes > 0)
    return `${name} ${d.state} ${formatPercent(d.scan.doneBytes / d.scan.totalBytes)}`;
  const lag = d.lagMs === undefined ? '' : `, lag ${formatDuration(d.lagMs / 1000)}`;
  return `${name} ${d.state}${lag}`;
}

/** One line for `systemctl status`. */
export function statusLine(report: WatchReport): string {
  const stored = report.devices.reduce((n, d) => n + d.storedBytesPerSecond, 0);
  const list = report.devices.slice(0, 8).map(deviceText).join('; ');
  const more = report.devices.length > 8 ? `; and ${report.devices.length - 8} more` : '';
  return `${list}${more}; storing ${formatBytes(stored)}/s`;
}

export interface SuperviseOptions {
  readonly notifier: Notifier;
  readonly status: () => WatchReport;
  /** Whether READY may be said; asked about once a second until it may. */
  readonly isReady: () => boolean;
  readonly clock: Clock;
  /** Aborted when the watch has ended. */
  readonly signal: AbortSignal;
}

/** Runs until `signal` aborts; never rejects. */
export async function supervise(options: SuperviseOptions): Promise<void> {
  const { notifier, clock, signal } = options;
  const pulse = new Pulse();
  let isReady = false;
  const { watchdogMs } = notifier;
  const pingMs = watchdogMs === undefined ? Number.POSITIVE_INFINITY : watchdogMs / 2;
  const stallMs = Math.max(watchdogMs ?? START_STALL_MS, 2 * TICK_MS);
  const due = { ping: 0, status: 0, extend: 0 };
  let shown = '';
  while (!signal.aborted) {
    const report = options.status();
    const nowMs = Number(clock.monotonicNs()) / 1e6;
    if (!isReady && !report.stopping && options.isReady()) {
      isReady = true;
      notifier.ready(statusLine(report));
    }
    const beating = pulse.beats(report.devices, nowMs, isReady ? stallMs : START_STALL_MS);
    if (beating && nowMs >= due.ping) {
      notifier.watchdog();
      due.ping = nowMs + pingMs;
    }
    if (beating && !isReady && nowMs >= due.extend) {
      notifier.extendTimeout(EXTEND_MS);
      due.extend = nowMs + EXTEND_EVERY_MS;
    }
    const line = statusLine(report);
    if (line !== shown && nowMs >= due.status && !report.stopping) {
      notifier.status(line);
      shown = line;
      due.status = nowMs + STATUS_EVERY_MS;
    }
    await clock.sleep(Math.min(TICK_MS, pingMs), signal);
  }
}
