/** What `b2 watch` says where no dashboard is: lines for people, for the journal, or JSON lines. */
import { fstatSync } from 'node:fs';
import { className, coverageName } from '../../format/commit.js';
import {
  formatBytes,
  formatDuration,
  formatTimeLocal,
  formatTimeNs,
  printable,
} from '../../human.js';
import { BLOCK_BYTES } from '../../units.js';
import { pointReport, problemReport, type DeviceReport } from '../../watch/report.js';
import type { WatchEvent } from '../../watch/types.js';
import type { CommandContext } from '../spec.js';

/** A JSON line. */
interface LogRecord {
  readonly type: string;
  readonly [field: string]: unknown;
}

/** Priorities of syslog(3). */
const Priority = { error: 3, warning: 4, notice: 5, info: 6, debug: 7 } as const;
type Priority = (typeof Priority)[keyof typeof Priority];

/** How often devices that are as they should be are told of. */
export const SUMMARY_MS = 300_000;

export interface WatchLog {
  event(event: WatchEvent): void;
  /** A line about the watch as a whole. */
  say(priority: keyof typeof Priority, message: string, hint?: string): void;
  /** Every now and then: how the devices are. */
  summary(devices: readonly DeviceReport[]): void;
}

/** True if standard output is the journal: `JOURNAL_STREAM` names its device and inode (systemd.exec(5)). */
export function isJournal(env: CommandContext['env'], fd = 1): boolean {
  const stream = /^(\d+):(\d+)$/.exec(env['JOURNAL_STREAM'] ?? '');
  if (stream === null) return false;
  try {
    const { dev, ino } = fstatSync(fd, { bigint: true });
    return String(dev) === stream[1] && String(ino) === stream[2];
  } catch {
    return false;
  }
}

/** `message` with the device it is about, which most name already. */
export function about(device: string, message: string): string {
  return message.includes(device) ? message : `${device}: ${message}`;
}

function summaryText(d: DeviceReport): string {
  const lag = d.lagMs === undefined ? 'lag unknown' : `lag ${formatDuration(d.lagMs / 1000)}`;
  const scan =
    d.scan === undefined
      ? ''
      : `, ${formatBytes(d.scan.doneBytes)} of ${formatBytes(d.scan.totalBytes)} read`;
  const last = d.lastPoint === undefined ? '' : `, last #${d.lastPoint.seq}`;
  return `${d.device}: ${d.state}${scan}, ${lag}, ${d.points} points${last}, writes ${formatBytes(d.changedBytesPerSecond)}/s, stores ${formatBytes(d.storedBytesPerSecond)}/s`;
}

const STATE_PRIORITY: Readonly<Record<string, keyof typeof Priority>> = {
  failed: 'error',
  outage: 'error',
  absent: 'warning',
  resync: 'warning',
};

export function openLog(
  context: Pick<CommandContext, 'output' | 'flags' | 'clock' | 'env'>,
  journal = isJournal(context.env),
): WatchLog {
  const { output, flags, clock } = context;
  const line = (priority: keyof typeof Priority, record: LogRecord, text: string): void => {
    if (!flags.json) {
      const level: Priority = Priority[priority];
      if (flags.quiet && level > Priority.warning) return;
      if (!flags.verbose && level > Priority.info) return;
    }
    const clean = printable(text);
    output.line(
      record,
      journal ? `<${Priority[priority]}>${clean}` : `${formatTimeLocal(clock.nowNs())}  ${clean}`,
    );
  };
  const time = (): string => formatTimeNs(clock.nowNs());
  return {
    event(event) {
      const { type, device } = event;
      switch (event.type) {
        case 'state': {
          const { state, message } = event;
          line(
            STATE_PRIORITY[state] ?? 'notice',
            { type, time: time(), device, state, message },
            `${state}: ${about(device, message)}`,
          );
          return;
        }
        case 'point': {
          const { point, volume } = event;
          line(
            'debug',
            { type, device, volume, ...pointReport(point) },
            `${device}: point #${point.seq}, ${className(point.pointClass)}, ${coverageName(point.coverage)}, ${formatBytes(point.blocks * BLOCK_BYTES)} changed, ${formatBytes(point.storedBytes)} stored, durable after ${Math.round(point.ageMs)} ms`,
          );
          return;
        }
        case 'frozen': {
          const { frozenMs, mountPoints, unasked } = event;
          line(
            'debug',
            { type, time: time(), device, frozenMs, mountPoints, unasked },
            `${device}: ${mountPoints.join(', ')} frozen for ${frozenMs.toFixed(1)} ms${unasked ? ', because writes left no other way to an exact point' : ''}`,
          );
          return;
        }
        case 'problem': {
          const { problem } = event;
          const hint = problem.hint === undefined ? '' : ` (${problem.hint})`;
          line(
            'warning',
            { type, device, ...problemReport(problem) },
            `${about(device, problem.message)}${hint}`,
          );
          return;
        }
        case 'notice':
          line(
            'info',
            { type, time: time(), device, message: event.message },
            about(device, event.message),
          );
          return;
      }
    },
    say(priority, message, hint) {
      const record = { type: 'log', time: time(), priority, message };
      line(
        priority,
        hint === undefined ? record : { ...record, hint },
        hint === undefined ? message : `${message} (${hint})`,
      );
    },
    summary(devices) {
      for (const d of devices) line('info', { type: 'status', time: time(), ...d }, summaryText(d));
    },
  };
}
