import { expect, test } from 'vitest';

import { BufferPool } from '../../src/buffer-pool.js';

test('gives what was given back, of the length that is asked for', () => {
  const pool = new BufferPool(1024 * 1024);
  const first = pool.take(100_000);
  expect(first.length).toBe(100_000);
  pool.give(first);
  const again = pool.take(99_000);
  expect(again.length).toBe(99_000);
  expect(again.buffer).toBe(first.buffer);
  // It is in use: the next is another one.
  expect(pool.take(99_000).buffer).not.toBe(first.buffer);
});

test('keeps no more than it may, and what is asked for rather than what is not', () => {
  const pool = new BufferPool(1024 * 1024);
  const old = Array.from({ length: 40 }, () => pool.take(65_536));
  for (const buffer of old) pool.give(buffer);
  expect(pool.keptBytes).toBe(1024 * 1024);
  const now = Array.from({ length: 4 }, () => pool.take(262_144));
  for (const buffer of now) pool.give(buffer);
  expect(pool.keptBytes).toBeLessThanOrEqual(1024 * 1024);
  for (const buffer of now.toReversed()) expect(pool.take(262_144).buffer).toBe(buffer.buffer);
});

test.each([1, 20, 4096, 4097, 65_535, 262_164, 1_048_577, 4_194_304, 40_000_000])(
  'wastes little for %i bytes',
  (bytes) => {
    const pool = new BufferPool(1024);
    const buffer = pool.take(bytes);
    expect(buffer.length).toBe(bytes);
    expect(buffer.buffer.byteLength).toBeLessThanOrEqual(Math.max(4096, bytes * 1.25));
    pool.give(buffer);
    expect(pool.keptBytes).toBe(0);
  },
);

test('takes nothing that is not its own', () => {
  const pool = new BufferPool(1024 * 1024);
  pool.give(Buffer.from(new ArrayBuffer(4096)));
  pool.give(Buffer.allocUnsafe(10));
  expect(pool.keptBytes).toBe(0);
});
