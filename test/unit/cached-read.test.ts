import { closeSync, openSync, writeFileSync } from 'node:fs';
import { afterEach, beforeEach, expect, it } from 'vitest';
import { readCached } from '../../src/cached-read.js';
import { patternBytes } from '../support/image-memory.js';
import { tempDir, type TempDir } from '../support/tmp.js';

const SIZE = 1024 * 1024;
const content = patternBytes(SIZE, 3);
let dir: TempDir;
let fd: number;
beforeEach(async () => {
  dir = tempDir();
  writeFileSync(dir.join('file'), content);
  fd = openSync(dir.join('file'), 'r');
  await new Promise((resolve) => setImmediate(resolve));
});
afterEach(async () => {
  closeSync(fd);
  await dir.remove();
});

it('reads what was just written, into the middle of a buffer too, and stops at the end', () => {
  const whole = Buffer.alloc(8192, 0xee);
  // Undefined only where the file system or libc cannot do it.
  const got = readCached(fd, whole.subarray(100, 4196), 12_345);
  if (got === undefined) return;
  expect(got).toBe(4096);
  expect(whole.subarray(100, 4196).equals(content.subarray(12_345, 12_345 + 4096))).toBe(true);
  expect(whole.subarray(0, 100).every((byte) => byte === 0xee)).toBe(true);
  expect(whole.subarray(4196).every((byte) => byte === 0xee)).toBe(true);
  expect(readCached(fd, whole, SIZE - 100)).toBe(100);
  expect(readCached(fd, whole, SIZE)).toBe(undefined);
});

it('leaves errors to the ordinary read', () => {
  const directory = openSync(dir.path, 'r');
  expect(readCached(directory, Buffer.alloc(16), 0)).toBe(undefined);
  closeSync(directory);
  expect(readCached(1_000_000, Buffer.alloc(16), 0)).toBe(undefined);
});

it('lets the event loop have its turn', async () => {
  const into = Buffer.alloc(64 * 1024);
  if (readCached(fd, into, 0) === undefined) return;
  let bytes = into.length;
  while (readCached(fd, into, 0) !== undefined) bytes += into.length;
  expect(bytes).toBe(2 * SIZE);
  expect(readCached(fd, into, 0)).toBe(undefined);
  await new Promise((resolve) => setImmediate(resolve));
  await new Promise((resolve) => setImmediate(resolve));
  expect(readCached(fd, into, 0)).toBe(into.length);
});
