/**
 * The only place that reads clocks and randomness; everything else gets a {@link Clock} or {@link Random}
 * handed in, so that tests can set both.
 */
import { randomBytes } from 'node:crypto';

export interface Clock {
  /** Wall time in nanoseconds since 1970-01-01T00:00:00Z (UTC, as the kernel keeps it). May step. */
  nowNs(): bigint;
  /** Monotonic time in nanoseconds; never steps back; comparable only within one boot. */
  monotonicNs(): bigint;
  /** Resolves after `ms` milliseconds, or at once when `signal` aborts. */
  sleep(ms: number, signal?: AbortSignal): Promise<void>;
}

/** Cryptographically strong random bytes in production; seeded in tests. */
export type Random = (bytes: number) => Uint8Array;

export const systemRandom: Random = (bytes) => randomBytes(bytes);

// Date.now() has millisecond resolution; the monotonic clock supplies the digits below it, re-anchored
// when the wall clock has moved against it by more than 2 ms (a step, or slewing).
let anchorWallNs = 0n;
let anchorMonoNs = 0n;

export const systemClock: Clock = {
  nowNs() {
    const mono = process.hrtime.bigint();
    const wallMs = BigInt(Date.now()) * 1_000_000n;
    const estimate = anchorWallNs + (mono - anchorMonoNs);
    const drift = estimate - wallMs;
    if (anchorWallNs === 0n || drift < -1_000_000n || drift > 2_000_000n) {
      anchorWallNs = wallMs;
      anchorMonoNs = mono;
      return wallMs;
    }
    return estimate;
  },
  monotonicNs() {
    return process.hrtime.bigint();
  },
  sleep(ms, signal) {
    return new Promise((resolve) => {
      if (signal?.aborted === true) return resolve();
      const done = (): void => {
        clearTimeout(timer);
        signal?.removeEventListener('abort', done);
        resolve();
      };
      const timer = setTimeout(done, ms);
      signal?.addEventListener('abort', done, { once: true });
    });
  },
};
