/** The tables of the cut against plain maps, with few slots so that the coarse level is used as much as the fine one. */
import { describe, expect, it } from 'vitest';
import { LatestTimes, PendingBlocks } from '../../../src/capture/block-times.js';
import { seeded } from '../../support/model-volume.js';

describe('latest times', () => {
  it.each([16, 256, 1 << 16])('are never earlier than what was noted, with %d slots', (slots) => {
    const random = seeded(slots);
    const blocks = 50_000;
    const model = new Map<number, number>();
    const table = new LatestTimes(blocks, slots);
    let forgotten = -1;
    for (let step = 0; step < 4000; step++) {
      const count =
        random() < 0.95 ? 1 + Math.floor(random() * 8) : 1 + Math.floor(random() * 5000);
      const block = Math.floor(random() * (blocks - count));
      table.note(block, count, step);
      for (let b = block; b < block + count; b++) model.set(b, step);
      if (step % 500 === 499) {
        forgotten = step - 100;
        table.forget(forgotten);
      }
    }
    expect([...model].filter(([b, t]) => t > forgotten && table.of(b) < t)).toEqual([]);
    if (slots === 1 << 16) {
      const exact = [...model].filter(([b, t]) => table.of(b) === t).length;
      expect(exact).toBeGreaterThan(0);
    }
    table.forget(5000);
    expect(table.of(Math.floor(random() * blocks))).toBe(Number.NEGATIVE_INFINITY);
  });

  it('stay within their memory', () => {
    const table = new LatestTimes(1 << 28, 1 << 12);
    for (let i = 0; i < 100_000; i++) table.note(i * 2621, 1, i);
    expect(table.bytes).toBeLessThanOrEqual(4096 * 16 + 131_072 * 8);
    expect(table.of(2621 * 99_999)).toBeGreaterThanOrEqual(99_999);
  });

  it('take blocks above 2^32', () => {
    const table = new LatestTimes(2 ** 41);
    table.note(2 ** 40 + 5, 1, 7);
    expect(table.of(2 ** 40 + 5)).toBe(7);
    expect(table.of(5)).toBe(Number.NEGATIVE_INFINITY);
  });
});

describe('pending blocks', () => {
  it.each([16, 256, 1 << 16])('give every block back, with %d slots', (slots) => {
    const random = seeded(slots + 1);
    const blocks = 40_000;
    const model = new Map<number, number>();
    const table = new PendingBlocks(blocks, slots);
    const added = new Set<number>();
    for (let step = 1; step < 400; step++) {
      const count = random() < 0.9 ? 1 + Math.floor(random() * 8) : 1 + Math.floor(random() * 5000);
      const block = Math.floor(random() * (blocks - count + 1));
      table.add(block, count, step);
      for (let b = block; b < block + count; b++) {
        model.set(b, Math.min(model.get(b) ?? step, step));
        added.add(b);
      }
      expect(table.size).toBeGreaterThanOrEqual(model.size);
      if (random() < 0.3) {
        const limit = Math.floor(random() * step);
        const taken = table.take(limit, random() < 0.5 ? 1 + Math.floor(random() * 300) : 100_000);
        expect([...taken]).toEqual([...new Set(taken)].sort((a, b) => a - b));
        // A block that has a slot and a bit may come twice.
        let strange = 0;
        for (const b of taken) if (!model.delete(b) && !added.has(b)) strange++;
        expect(strange).toBe(0);
        if (taken.length === 0) expect([...model.values()].filter((t) => t <= limit)).toEqual([]);
      }
      const least = [...model.values()].reduce((a, b) => Math.min(a, b), Number.POSITIVE_INFINITY);
      expect(table.earliest()).toBeLessThanOrEqual(least);
    }
    const rest: number[] = [];
    for (;;) {
      const taken = table.take(Number.POSITIVE_INFINITY, 1000);
      if (taken.length === 0) break;
      rest.push(...taken);
    }
    const found = new Set(rest);
    expect([...model.keys()].filter((b) => !found.has(b))).toEqual([]);
    expect(rest.filter((b) => !added.has(b))).toEqual([]);
    expect(table.size).toBe(0);
    expect(table.earliest()).toBe(Number.POSITIVE_INFINITY);
  });

  it('needs 32 MiB for a whole TiB', () => {
    const table = new PendingBlocks(1 << 28);
    table.add(0, 1 << 28, 1);
    expect(table.size).toBe(1 << 28);
    expect(table.bytes).toBeLessThan(34 * 1024 * 1024);
    const taken = table.take(1, 1000);
    expect(taken[0]).toBe(0);
    expect(table.size).toBe((1 << 28) - taken.length);
  });
});
