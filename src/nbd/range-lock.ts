/** Exclusive access to ranges of whole numbers (blocks), first come first served. */

interface Claim {
  readonly first: number;
  readonly last: number;
  readonly released: Promise<void>;
}

export class RangeLock {
  readonly #claims = new Set<Claim>();

  /**
   * Runs `work` while no earlier claim that touches [first, last] is held. Each claim waits for earlier ones only, so
   * that there is no deadlock as long as `work` takes no second one.
   */
  async run<T>(first: number, last: number, work: () => Promise<T>): Promise<T> {
    const before = [...this.#claims].filter((claim) => claim.first <= last && first <= claim.last);
    let release = (): void => undefined;
    const claim: Claim = { first, last, released: new Promise((resolve) => (release = resolve)) };
    this.#claims.add(claim);
    try {
      for (const earlier of before) await earlier.released;
      return await work();
    } finally {
      this.#claims.delete(claim);
      release();
    }
  }

  /** Resolves when everything that was claimed before the call has been released. */
  async idle(): Promise<void> {
    await Promise.all(Array.from(this.#claims, (claim) => claim.released));
  }
}
