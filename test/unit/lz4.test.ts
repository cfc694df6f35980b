import { randomBytes } from 'node:crypto';
import { describe, expect, test } from 'vitest';
import { lz4, openLz4Napi, type Lz4 } from '../../src/lz4.js';

const implementations: readonly [string, Lz4][] = [
  ['this thread’s', lz4()],
  ['lz4-napi', openLz4Napi()],
];

function packed(l: Lz4, plain: Buffer): Buffer {
  const out = Buffer.alloc(plain.length);
  const length = l.compress(plain, out);
  expect(length).toBeGreaterThan(0);
  return out.subarray(0, length);
}

describe.each(implementations)('%s LZ4', (_, l) => {
  test('decompresses a part of a buffer, wherever it lies', () => {
    const slots = [Buffer.alloc(70_000), Buffer.alloc(70_000)];
    for (let i = 0; i < 20; i++) {
      const plain = Buffer.concat([randomBytes(100 + i), Buffer.alloc(3000, i), randomBytes(50)]);
      const block = packed(l, plain);
      const slot = slots[i & 1] ?? Buffer.alloc(0);
      const at = i * 3000;
      block.copy(slot, at);
      const into = Buffer.alloc(plain.length);
      expect(l.decompressPart(slot, at, block.length, into)).toBe(true);
      expect(into.equals(plain)).toBe(true);
      expect(l.decompressPart(slot, at, block.length - 1, into)).toBe(false);
      expect(l.decompressPart(slot, at, block.length, Buffer.alloc(plain.length + 1))).toBe(false);
      expect(l.decompressPart(slot, at, block.length, Buffer.alloc(plain.length - 1))).toBe(false);
    }
  });

  test('refuses a part that is not there, and nothing', () => {
    const block = packed(l, Buffer.alloc(500, 1));
    const into = Buffer.alloc(500);
    expect(() => l.decompressPart(block, 1, block.length, into)).toThrow(RangeError);
    expect(() => l.decompressPart(block, -1, 3, into)).toThrow(RangeError);
    expect(() => l.decompressPart(block, 3, -1, into)).toThrow(RangeError);
    expect(l.decompressPart(block, 0, 0, into)).toBe(false);
  });
});
