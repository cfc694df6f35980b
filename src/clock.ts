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

// Date.now() has millisecond resolution; the monotonic clock supplies the digits below it. What one is ahead of the other is known
// from below only (the millisecond may be just over, and this process may have been made to wait between the two), so the most that
// was seen counts: it is never too much, and soon exact. A time is then never later than it was, which a point in time relies on:
// what was done before it is in it. Where it cannot be so much any more, the wall clock was put back.
let aheadNs: bigint | undefined;

export const systemClock: Clock = {
  nowNs() {
    const before = process.hrtime.bigint();
    const wallNs = BigInt(Date.now()) * 1_000_000n;
    const after = process.hrtime.bigint();
    const least = wallNs - after;
    if (aheadNs === undefined || least > aheadNs || aheadNs > wallNs + 1_000_000n - before)
      aheadNs = least;
    return after + aheadNs;
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
