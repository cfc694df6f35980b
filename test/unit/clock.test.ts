import { describe, expect, it } from 'vitest';
import { systemClock } from '../../src/clock.js';

describe('the wall clock', () => {
  it('is never later than the kernel says, and goes on between two of its milliseconds', () => {
    const seen = new Set<bigint>();
    for (let n = 0; n < 20_000; n++) {
      const ns = systemClock.nowNs();
      // Read afterwards, and less than a millisecond more than it shows.
      expect(ns).toBeLessThan((BigInt(new Date().getTime()) + 1n) * 1_000_000n);
      seen.add(ns % 1_000_000n);
    }
    expect(seen.size).toBeGreaterThan(100);
  });
});
