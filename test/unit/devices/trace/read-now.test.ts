/** `readNow` on a pipe that has bytes, has none, and has ended. */
import { execFileSync } from 'node:child_process';
import { closeSync, constants, openSync, writeSync } from 'node:fs';
import { expect, it } from 'vitest';
import { readNow } from '../../../../src/syscalls.js';
import { tempDir } from '../../../support/tmp.js';

it('reads what is there, says when there is nothing, and when it is over', async () => {
  await using dir = tempDir();
  const path = dir.join('pipe');
  execFileSync('mkfifo', [path]);
  const reader = openSync(path, constants.O_RDONLY | constants.O_NONBLOCK);
  const writer = openSync(path, constants.O_WRONLY);
  const into = new Uint8Array(8);
  try {
    expect(readNow(reader, into)).toBe(-1);
    writeSync(writer, 'hello');
    expect(readNow(reader, into)).toBe(5);
    expect(Buffer.from(into).toString('latin1')).toBe('hello\0\0\0');
    expect(readNow(reader, into)).toBe(-1);
  } finally {
    closeSync(writer);
  }
  expect(readNow(reader, into)).toBe(0);
  closeSync(reader);
  expect(() => readNow(reader, into)).toThrow('EBADF');
});
