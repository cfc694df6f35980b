/**
 * The words of `b2 watch` that its parts share: one session a watched device (session.ts), the daemon that runs them
 * (daemon.ts), and what shows them (control socket, status, dashboard, log lines).
 */
import type { CapturedPoint } from '../capture/live-capture.js';
import type { GroupState } from '../capture/group.js';
import type { ByteRange } from '../devices/device.js';
import type { PointClass } from '../format/commit.js';

/**
 * What a session is doing:
 * - `starting`: opening the device, its source and its volume;
 * - `baseline`: the first scan; there is no point yet;
 * - `resync`: track was lost; everything is compared while capture goes on, and no new point is claimed before it is done;
 * - `exact`: points come at the interval while there are writes;
 * - `coalescing`: writes outrun the repository or the cut: points come, but later than the interval asks;
 * - `unreadable`: parts of the device cannot be read: everything else is captured, and no point is exact until they can be;
 * - `outage`: the repository takes no commits; changed blocks are remembered and nothing else;
 * - `absent`: the device is gone; the session waits for it to come back;
 * - `stopped`, `failed`: it has ended.
 */
export type WatchState =
  | 'starting'
  | 'baseline'
  | 'resync'
  | 'exact'
  | 'coalescing'
  | 'unreadable'
  | 'outage'
  | 'absent'
  | 'stopped'
  | 'failed';

export interface WatchProblem {
  /** Wall time. */
  readonly atNs: bigint;
  readonly message: string;
  readonly hint: string | undefined;
}

/** One watched device, now. Rates are means over about the last ten seconds. */
export interface WatchStatus {
  /** As it was given. */
  readonly device: string;
  /** Name of the volume; undefined until the volume is known. */
  readonly volume: string | undefined;
  readonly volumeId: string | undefined;
  readonly state: WatchState;
  readonly sizeBytes: number;
  readonly source:
    | { readonly kind: 'trace' | 'scan'; readonly why: string; readonly isFallback: boolean }
    | undefined;
  /** Age of the oldest acknowledged write that no durable point holds; 0 if there is none. Undefined while that is unknown. */
  readonly lagMs: number | undefined;
  readonly lastPoint: CapturedPoint | undefined;
  readonly points: number;
  /** Of a baseline or resync under way. */
  readonly scan: { readonly doneBytes: number; readonly totalBytes: number } | undefined;
  readonly changedBytesPerSecond: number;
  readonly capturedBytesPerSecond: number;
  readonly storedBytesPerSecond: number;
  readonly pendingBytes: number;
  readonly stagedBytes: number;
  readonly memoryBytes: number;
  /** The group that it makes points with. */
  readonly group?: GroupState | undefined;
  /** How often track was lost since the session began. */
  readonly losses: number;
  /** The last thing that went wrong, even if it is over. */
  readonly lastProblem: WatchProblem | undefined;
  /** What of the device cannot be read at present. */
  readonly unreadable: { readonly bytes: number; readonly ranges: readonly ByteRange[] };
  /** Of its file systems since the session began, in vain or not. */
  readonly freezes: { readonly count: number; readonly longestMs: number };
}

/** What a session tells while it runs; the daemon makes log lines, JSON lines and alarms of it. */
export type WatchEvent =
  | {
      readonly type: 'state';
      readonly device: string;
      readonly state: WatchState;
      readonly message: string;
    }
  | {
      readonly type: 'point';
      readonly device: string;
      readonly volume: string;
      readonly point: CapturedPoint;
    }
  /** File systems were frozen, for a point that was asked for or because writes left no other way to one (`unasked`). */
  | {
      readonly type: 'frozen';
      readonly device: string;
      readonly frozenMs: number;
      readonly mountPoints: readonly string[];
      readonly unasked: boolean;
    }
  | { readonly type: 'problem'; readonly device: string; readonly problem: WatchProblem }
  | { readonly type: 'notice'; readonly device: string; readonly message: string };

/** A point asked for by name or by hand. */
export interface PointRequest {
  /**
   * The least class that will do: `fuzzy` may lack what cannot be read of the device, `crash` needs nothing, `fs` freezes, `app` runs
   * the hooks and freezes.
   */
  readonly pointClass: PointClass;
  /** Aborting gives up; nothing stays frozen. */
  readonly signal?: AbortSignal;
}

/** One watched device. */
export interface WatchSession {
  /** Settles when the session has ended: resolves after {@link stop}, rejects when it could not go on. */
  readonly done: Promise<void>;
  /** Resolves with the first exact point after the start. (What systemd is told `READY=1` for is less: see service.ts.) */
  readonly ready: Promise<void>;
  status(): WatchStatus;
  /**
   * A durable point whose instant is not before the call. Rejects with a `B2Error` that says why none of that class can be had
   * (a device without mounted file systems cannot be frozen, the bound on the freeze would not hold, the device is absent …).
   */
  point(request: PointRequest): Promise<CapturedPoint>;
  /** Hash (hex) of the commit of a point that this session made, for pinning it; undefined if it is none of the last 256. */
  hashOf(seq: number): string | undefined;
  /** Compares the whole device again while capture goes on. */
  resync(): void;
  /** Tries for a last exact point for at most `finalMs`, records the clean stop, and ends. */
  stop(finalMs: number): Promise<void>;
}
