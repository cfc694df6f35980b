import type { Clock } from '../../src/clock.js';

/** A clock that stands still until it is told to go on; `sleep` goes on by itself and resolves at once. */
export class ManualClock implements Clock {
  wallNs = 1_700_000_000_000_000_000n;
  monoNs = 1_000_000_000n;

  advanceMs(ms: number): void {
    const ns = BigInt(Math.round(ms * 1e6));
    this.wallNs += ns;
    this.monoNs += ns;
  }
  nowNs(): bigint {
    return this.wallNs;
  }
  monotonicNs(): bigint {
    return this.monoNs;
  }
  sleep(ms: number): Promise<void> {
    this.advanceMs(ms);
    return Promise.resolve();
  }
}
