/** Turns "so many bytes done" into {@link ProgressEvent}s with a rate and an estimate of the rest. */
import type { Clock } from './clock.js';
import type { EventSink, ProgressEvent } from './events.js';

/** The rate is taken over about this long, so that one slow request does not make the estimate jump. */
const WINDOW_NS = 5_000_000_000n;
const SAMPLES_MAX = 64;

export interface ProgressOptions {
  readonly phase: string;
  /** Undefined where the end is not known. */
  readonly totalBytes?: number | undefined;
  readonly clock: Pick<Clock, 'monotonicNs'>;
  readonly events: EventSink;
  /** Least time between two events, in milliseconds; default 200. */
  readonly everyMs?: number;
}

export interface Progress {
  /** Adds to what is done; `bytes` ≥ 0. Cheap: most calls only add. */
  add(bytes: number): void;
  /** Sends a last event with everything done so far. Calling it twice does nothing more. */
  finish(): void;
}

/** Starts measuring now and sends the first event at once. */
export function startProgress(options: ProgressOptions): Progress {
  const { phase, totalBytes, clock, events } = options;
  const everyNs = BigInt(options.everyMs ?? 200) * 1_000_000n;
  const samples: { atNs: bigint; bytes: number }[] = [{ atNs: clock.monotonicNs(), bytes: 0 }];
  let doneBytes = 0;
  let sentNs = samples[0]?.atNs ?? 0n;
  let finished = false;

  const send = (nowNs: bigint): void => {
    sentNs = nowNs;
    samples.push({ atNs: nowNs, bytes: doneBytes });
    while (
      samples.length > SAMPLES_MAX ||
      (samples.length > 2 && nowNs - (samples[1]?.atNs ?? nowNs) >= WINDOW_NS)
    ) {
      samples.shift();
    }
    const first = samples[0] ?? { atNs: nowNs, bytes: doneBytes };
    const seconds = Number(nowNs - first.atNs) / 1e9;
    const rate = seconds > 0 ? (doneBytes - first.bytes) / seconds : 0;
    const event: { -readonly [K in keyof ProgressEvent]: ProgressEvent[K] } = {
      type: 'progress',
      phase,
      doneBytes,
      rateBytesPerSecond: Math.round(rate),
    };
    if (totalBytes !== undefined) {
      event.totalBytes = totalBytes;
      if (doneBytes >= totalBytes) event.etaSeconds = 0;
      else if (rate > 0) event.etaSeconds = Math.round((totalBytes - doneBytes) / rate);
    }
    events(event);
  };

  send(sentNs);
  return {
    add(bytes) {
      doneBytes += bytes;
      if (finished) return;
      const nowNs = clock.monotonicNs();
      if (nowNs - sentNs >= everyNs) send(nowNs);
    },
    finish() {
      if (finished) return;
      finished = true;
      send(clock.monotonicNs());
    },
  };
}
