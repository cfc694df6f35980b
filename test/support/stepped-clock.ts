import type { Clock } from '../../src/clock.js';

/** Lets everything that waits for memory, not for time, go on. */
export async function settle(turns = 60): Promise<void> {
  for (let i = 0; i < turns; i++) await new Promise<void>((resolve) => setImmediate(resolve));
}

/**
 * A clock of one simulated host. Time passes only in `advanceMs`; sleepers wake in order, each at its own moment,
 * and what they start is let run before time goes on.
 */
export class SteppedClock implements Clock {
  #wallNs: bigint;
  #monoNs: bigint;
  #sleepers: { dueNs: bigint; wake: () => void }[] = [];

  constructor(wallNs = 1_700_000_000_000_000_000n, monoNs = 5_000_000_000n) {
    this.#wallNs = wallNs;
    this.#monoNs = monoNs;
  }

  nowNs(): bigint {
    return this.#wallNs;
  }

  monotonicNs(): bigint {
    return this.#monoNs;
  }

  sleep(ms: number, signal?: AbortSignal): Promise<void> {
    return new Promise((resolve) => {
      if (signal?.aborted === true) return resolve();
      const stop = (): void => {
        this.#sleepers = this.#sleepers.filter((other) => other !== sleeper);
        resolve();
      };
      const wake = (): void => {
        signal?.removeEventListener('abort', stop);
        resolve();
      };
      const sleeper = { dueNs: this.#monoNs + BigInt(Math.ceil(ms * 1e6)), wake };
      this.#sleepers.push(sleeper);
      signal?.addEventListener('abort', stop, { once: true });
    });
  }

  async advanceMs(ms: number): Promise<void> {
    const endNs = this.#monoNs + BigInt(Math.round(ms * 1e6));
    for (;;) {
      await settle();
      const next = this.#sleepers.reduce<bigint | undefined>(
        (least, { dueNs }) => (least === undefined || dueNs < least ? dueNs : least),
        undefined,
      );
      const stopNs = next === undefined || next > endNs ? endNs : next;
      if (stopNs > this.#monoNs) {
        this.#wallNs += stopNs - this.#monoNs;
        this.#monoNs = stopNs;
      }
      const due = this.#sleepers.filter(({ dueNs }) => dueNs <= this.#monoNs);
      if (due.length === 0) return;
      this.#sleepers = this.#sleepers.filter(({ dueNs }) => dueNs > this.#monoNs);
      for (const { wake } of due) wake();
    }
  }

  /** Time goes by while the machine is suspended: the wall clock moves on, the monotonic one and its sleepers do not. */
  suspendMs(ms: number): void {
    this.#wallNs += BigInt(Math.round(ms * 1e6));
  }

  /** Sleepers now. */
  get sleeping(): number {
    return this.#sleepers.length;
  }
}
