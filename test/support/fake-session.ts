/** A watched device that does what a test says. */
import type { CapturedPoint } from '../../src/capture/live-capture.js';
import { B2Error, type ErrorKind } from '../../src/errors.js';
import { Coverage, PointClass } from '../../src/format/commit.js';
import type {
  PointRequest,
  WatchEvent,
  WatchSession,
  WatchState,
  WatchStatus,
} from '../../src/watch/types.js';

export function capturedPoint(seq: number, more: Partial<CapturedPoint> = {}): CapturedPoint {
  return {
    seq,
    instantNs: 1_700_000_000_000_000_000n + BigInt(seq) * 1_000_000_000n,
    instantSourceNs: seq * 1e9,
    pointClass: PointClass.crash,
    coverage: Coverage.exact,
    blocks: 3,
    storedBytes: 1000,
    rounds: 1,
    cutMs: 2,
    ageMs: 12.3456,
    ...more,
  };
}

export class FakeSession implements WatchSession {
  readonly done: Promise<void>;
  readonly ready: Promise<void>;
  readonly asked: PointRequest[] = [];
  /** Classes of points that cannot be had. */
  refused: readonly PointClass[] = [];
  resyncs = 0;
  stops: number[] = [];
  seq = 0;
  current: Partial<WatchStatus> = {};
  private readonly device: string;
  private readonly onEvent: (event: WatchEvent) => void;
  private settle: { end: () => void; fail: (error: unknown) => void; ready: () => void };

  constructor(device: string, onEvent: (event: WatchEvent) => void) {
    this.device = device;
    this.onEvent = onEvent;
    let end = (): void => undefined;
    let fail: (error: unknown) => void = () => undefined;
    let ready = (): void => undefined;
    this.done = new Promise((resolve, reject) => {
      end = resolve;
      fail = reject;
    });
    this.ready = new Promise((resolve, reject) => {
      ready = resolve;
      this.done.then(() => reject(new Error('ended')), reject);
    });
    this.done.catch(() => undefined);
    this.ready.catch(() => undefined);
    this.settle = { end, fail, ready };
  }

  becomeReady(): void {
    this.set('exact');
    this.settle.ready();
  }

  set(state: WatchState): void {
    this.current = { ...this.current, state };
    this.onEvent({ type: 'state', device: this.device, state, message: `now ${state}` });
  }

  fail(message: string, retryable = false, kind: ErrorKind = 'io'): void {
    this.current = { ...this.current, state: 'failed' };
    this.settle.fail(new B2Error(kind, message, { retryable, hint: 'Look at it.' }));
  }

  status(): WatchStatus {
    return {
      device: this.device,
      volume: `host${this.device}`,
      volumeId: `id-of-${this.device}`,
      state: 'starting',
      sizeBytes: 1 << 20,
      source: { kind: 'trace', why: 'because', isFallback: false },
      lagMs: 0,
      lastPoint: undefined,
      points: this.seq,
      scan: undefined,
      changedBytesPerSecond: 0,
      capturedBytesPerSecond: 0,
      storedBytesPerSecond: 0,
      pendingBytes: 0,
      stagedBytes: 0,
      memoryBytes: 0,
      losses: 0,
      lastProblem: undefined,
      freezes: { count: 0, longestMs: 0 },
      unreadable: { bytes: 0, ranges: [] },
      ...this.current,
    };
  }

  point(request: PointRequest): Promise<CapturedPoint> {
    this.asked.push(request);
    if (this.refused.includes(request.pointClass))
      return Promise.reject(new B2Error('unsupported', `no class ${request.pointClass} here`));
    return Promise.resolve(capturedPoint(++this.seq, { pointClass: request.pointClass }));
  }

  /** Tells of a point, as a real session does before a request for one is answered. */
  announce(point: CapturedPoint): void {
    this.onEvent({ type: 'point', device: this.device, volume: `host${this.device}`, point });
  }

  hashOf(seq: number): string | undefined {
    return `hash-${seq}`;
  }

  resync(): void {
    this.resyncs++;
  }

  stop(finalMs: number): Promise<void> {
    this.stops.push(finalMs);
    this.current = { ...this.current, state: 'stopped' };
    this.settle.end();
    return Promise.resolve();
  }
}
