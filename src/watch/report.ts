/**
 * What a watch shows of itself, as JSON has it: the answer to `status` on the control socket, `b2 status --json`, the JSON lines
 * of `b2 watch`, and what the dashboard draws. Fields are added, never renamed; times are RFC 3339 with nanoseconds.
 */
import type { CapturedPoint } from '../capture/live-capture.js';
import { className, coverageName } from '../format/commit.js';
import { formatTimeNs } from '../human.js';
import type { WatchProblem, WatchState, WatchStatus } from './types.js';

export interface PointReport {
  readonly id: string;
  readonly seq: number;
  readonly time: string;
  readonly class: string;
  readonly coverage: string;
  readonly blocks: number;
  readonly storedBytes: number;
  /** How old the instant was when the point was durable. */
  readonly ageMs: number;
  /** Name of the group whose other volumes have a point of the same instant. */
  readonly group?: string;
}

export interface ProblemReport {
  readonly time: string;
  readonly message: string;
  readonly hint?: string;
}

/** One watched device; see {@link WatchStatus}. What is not known is absent. */
export interface DeviceReport {
  readonly device: string;
  readonly volume?: string;
  readonly volumeId?: string;
  readonly state: WatchState;
  readonly sizeBytes: number;
  readonly source?: 'trace' | 'scan';
  readonly sourceReason?: string;
  readonly lagMs?: number;
  readonly lastPoint?: PointReport;
  readonly points: number;
  readonly scan?: { readonly doneBytes: number; readonly totalBytes: number };
  readonly changedBytesPerSecond: number;
  readonly capturedBytesPerSecond: number;
  readonly storedBytesPerSecond: number;
  readonly pendingBytes: number;
  readonly stagedBytes: number;
  readonly memoryBytes: number;
  readonly losses: number;
  readonly lastProblem?: ProblemReport;
  /** What of the device cannot be read: no point is exact until it can be, or was written anew. The first hundred ranges. */
  readonly unreadable?: {
    readonly bytes: number;
    readonly ranges: readonly { readonly offset: number; readonly length: number }[];
  };
  /** Of its file systems; absent if there was none. */
  readonly freezes?: { readonly count: number; readonly longestMs: number };
  /** The group that it makes points with; `missing`: devices that keep it from doing so at present. */
  readonly group?: { readonly name: string; readonly missing: readonly string[] };
}

/** One process that watches. */
export interface WatchReport {
  readonly pid: number;
  readonly repository: string;
  readonly repositoryId: string;
  readonly since: string;
  readonly stopping: boolean;
  readonly devices: readonly DeviceReport[];
}

/** Milliseconds with three digits. */
function ms(value: number): number {
  return Math.round(value * 1000) / 1000;
}

export function pointReport(p: CapturedPoint): PointReport {
  return {
    id: `#${p.seq}`,
    seq: p.seq,
    time: formatTimeNs(p.instantNs),
    class: className(p.pointClass),
    coverage: coverageName(p.coverage),
    blocks: p.blocks,
    storedBytes: p.storedBytes,
    ageMs: ms(p.ageMs),
    ...(p.group === undefined ? {} : { group: p.group }),
  };
}

export function problemReport(p: WatchProblem): ProblemReport {
  return {
    time: formatTimeNs(p.atNs),
    message: p.message,
    ...(p.hint === undefined ? {} : { hint: p.hint }),
  };
}

export function deviceReport(s: WatchStatus): DeviceReport {
  return {
    device: s.device,
    ...(s.volume === undefined ? {} : { volume: s.volume }),
    ...(s.volumeId === undefined ? {} : { volumeId: s.volumeId }),
    state: s.state,
    sizeBytes: s.sizeBytes,
    ...(s.source === undefined ? {} : { source: s.source.kind, sourceReason: s.source.why }),
    ...(s.lagMs === undefined ? {} : { lagMs: ms(s.lagMs) }),
    ...(s.lastPoint === undefined ? {} : { lastPoint: pointReport(s.lastPoint) }),
    points: s.points,
    ...(s.scan === undefined ? {} : { scan: s.scan }),
    changedBytesPerSecond: Math.round(s.changedBytesPerSecond),
    capturedBytesPerSecond: Math.round(s.capturedBytesPerSecond),
    storedBytesPerSecond: Math.round(s.storedBytesPerSecond),
    pendingBytes: s.pendingBytes,
    stagedBytes: s.stagedBytes,
    memoryBytes: s.memoryBytes,
    losses: s.losses,
    ...(s.lastProblem === undefined ? {} : { lastProblem: problemReport(s.lastProblem) }),
    ...(s.unreadable.bytes === 0 ? {} : { unreadable: s.unreadable }),
    ...(s.freezes.count === 0
      ? {}
      : { freezes: { count: s.freezes.count, longestMs: ms(s.freezes.longestMs) } }),
    ...(s.group === undefined ? {} : { group: { name: s.group.name, missing: s.group.missing } }),
  };
}
