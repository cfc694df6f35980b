import { describe, expect, it } from 'vitest';

import type { FooterFrame } from '../../../src/format/pack.js';
import {
  DecodeQueue,
  decodeQueueMemory,
  type DecodeGroup,
} from '../../../src/repo/decode-queue.js';
import { dice } from '../../support/disks.js';

const PACKS = ['00'.repeat(16), 'ff'.repeat(16), '0123456789abcdef'.repeat(2)];

function frame(number: number): FooterFrame {
  return {
    number,
    offset: 2 ** 40 + 2 ** 31 + number * 70_001,
    storedBytes: 70_000 + number,
    plainBytes: 65_536,
    type: 1,
    compression: number % 2 === 0 ? 1 : 0,
    count: 1,
  };
}

function group(packId: string, slots: readonly number[], number: number): DecodeGroup {
  return { packId, slots, frames: slots.map((_, i) => frame(number + i)) };
}

/** The side that gives, and one that takes: both see the same memory. */
function queues(slots: number): [DecodeQueue, DecodeQueue] {
  const memory = decodeQueueMemory(slots);
  return [new DecodeQueue(memory, slots), new DecodeQueue(memory, slots)];
}

describe('the queue of orders to decode', () => {
  it('hands on what it was given, in turn, and the answers', () => {
    const [giver, taker] = queues(5);
    const first = group(PACKS[2] ?? '', [4, 0, 2], 7);
    const second = group(PACKS[0] ?? '', [1], 4_000_000);
    giver.give(first);
    giver.give(second);
    expect(taker.take()).toEqual(first);
    expect(giver.answerOf(first.slots)).toBeUndefined();
    expect(taker.take()).toEqual(second);
    expect(taker.take()).toBeUndefined();
    expect(taker.answer(first.slots, [true, false, true])).toBe(false);
    expect(giver.answerOf(first.slots)).toEqual([true, false, true]);
    expect(giver.answerOf(second.slots)).toBeUndefined();
    giver.expectCall();
    expect(taker.answer(second.slots, [])).toBe(true);
    expect(giver.answerOf(second.slots)).toEqual([false]);
    // The slots are free for others now.
    giver.give(group(PACKS[1] ?? '', [2, 4], 9));
    expect(giver.answerOf([2, 4])).toBeUndefined();
    expect(taker.take()?.packId).toBe(PACKS[1]);
  });

  it('calls a thread that sleeps once, and lets none fall asleep over work', () => {
    const [giver, taker] = queues(4);
    expect(giver.wake(0)).toBe(false);
    expect(taker.sleep(0)).toBe(true);
    expect(taker.sleep(3)).toBe(true);
    giver.give(group(PACKS[0] ?? '', [0], 1));
    expect(giver.wake(3)).toBe(true);
    expect(giver.wake(3)).toBe(false);
    expect(taker.sleep(1)).toBe(false);
    expect(giver.wake(1)).toBe(false);
    taker.take();
    expect(taker.sleep(1)).toBe(true);
    expect(giver.wake(0)).toBe(true);
  });

  it('never overflows, and gives each group to one of many', () => {
    for (const slots of [1, 3, 8, 33]) {
      const memory = decodeQueueMemory(slots);
      const giver = new DecodeQueue(memory, slots);
      const takers = Array.from({ length: 3 }, () => new DecodeQueue(memory, slots));
      const roll = dice(slots);
      let free = Array.from({ length: slots }, (_, i) => i);
      const given: DecodeGroup[] = [];
      const taken: DecodeGroup[] = [];
      let number = 0;
      for (let i = 0; i < 3000; i++) {
        if (free.length > 0 && roll(2) === 0) {
          const count = 1 + roll(Math.min(8, free.length));
          const next = group(PACKS[roll(3)] ?? '', free.slice(0, count), (number += 10));
          free = free.slice(count);
          giver.give(next);
          given.push(next);
          continue;
        }
        const got = takers[roll(3)]?.take();
        expect(got).toEqual(given.shift());
        if (got !== undefined) taken.push(got);
        if (taken.length === 0 || roll(2) === 0) continue;
        const [done] = taken.splice(roll(taken.length), 1);
        if (done === undefined) continue;
        const good = done.slots.map(() => roll(2) === 0);
        takers[roll(3)]?.answer(done.slots, good);
        expect(giver.answerOf(done.slots)).toEqual(good);
        free.push(...done.slots);
      }
      expect(number).toBeGreaterThan(1000);
    }
  });

  it('refuses slots that there are not', () => {
    const [giver, taker] = queues(2);
    expect(() => giver.give(group(PACKS[0] ?? '', [2], 0))).toThrow(RangeError);
    expect(() => taker.answer([-1], [true])).toThrow(RangeError);
  });
});
