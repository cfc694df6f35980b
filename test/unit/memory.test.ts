import { describe, expect, it } from 'vitest';

import {
  adoptAligned,
  alignedMemory,
  BOUNCE_BYTES,
  isPageAligned,
  withBounce,
} from '../../src/memory.js';

describe('page-aligned memory', () => {
  it('is zeroed, of the size asked for, and known as aligned at page boundaries only', () => {
    const memory = alignedMemory(10_000);
    expect(memory.byteLength).toBe(10_000);
    expect(memory.every((byte) => byte === 0)).toBe(true);
    expect(isPageAligned(memory)).toBe(true);
    expect(isPageAligned(memory.subarray(4096))).toBe(true);
    expect(isPageAligned(memory.subarray(512))).toBe(false);
    expect(isPageAligned(new Uint8Array(65536))).toBe(false);
    expect(isPageAligned(Buffer.alloc(8192))).toBe(false);
  });

  it('can be shared, and adopted by another thread', () => {
    const memory = alignedMemory(4096, true);
    expect(memory.buffer).toBeInstanceOf(SharedArrayBuffer);
    const received = structuredClone(memory.buffer);
    expect(isPageAligned(new Uint8Array(received))).toBe(false);
    adoptAligned(received);
    expect(isPageAligned(new Uint8Array(received))).toBe(true);
    memory[7] = 42;
    expect(new Uint8Array(received)[7]).toBe(42);
  });

  it('rejects sizes that cannot be', () => {
    for (const bytes of [0, -1, 1.5, Number.NaN, 2 ** 32 + 1])
      expect(() => alignedMemory(bytes)).toThrow(RangeError);
  });

  it('lends bounce buffers, never one to two, and takes them back from who fails', async () => {
    const inUse = new Set<number>();
    let most = 0;
    const results = await Promise.allSettled(
      Array.from({ length: 100 }, (_, i) =>
        withBounce(async (slot) => {
          expect(slot.byteLength).toBe(BOUNCE_BYTES);
          expect(isPageAligned(slot)).toBe(true);
          expect(inUse.has(slot.byteOffset)).toBe(false);
          inUse.add(slot.byteOffset);
          most = Math.max(most, inUse.size);
          await new Promise((resolve) => setImmediate(resolve));
          inUse.delete(slot.byteOffset);
          if (i % 3 === 0) throw new Error('as planned');
        }),
      ),
    );
    expect(results.filter((r) => r.status === 'rejected')).toHaveLength(34);
    expect(inUse.size).toBe(0);
    expect(most).toBe(8);
  });
});
