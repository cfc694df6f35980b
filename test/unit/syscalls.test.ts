import { closeSync, openSync, readFileSync, statSync, writeFileSync } from 'node:fs';

import { describe, expect, it } from 'vitest';

import { errnoOf } from '../../src/errors.js';
import {
  punchHole,
  seekData,
  seekHole,
  syncFs,
  tryLock,
  zeroRange,
  blkZeroOut,
  blockDeviceBytes,
} from '../../src/syscalls.js';
import { tempDir } from '../support/tmp.js';

const MIB = 1024 * 1024;

describe('system calls', () => {
  it('punches holes and finds data around them', async () => {
    await using dir = tempDir();
    const file = dir.join('f');
    writeFileSync(file, Buffer.alloc(4 * MIB, 7));
    const fd = openSync(file, 'r+');
    try {
      await punchHole(fd, MIB, 2 * MIB);
      expect(statSync(file).size).toBe(4 * MIB);
      expect(
        readFileSync(file)
          .subarray(MIB, 3 * MIB)
          .every((byte) => byte === 0),
      ).toBe(true);
      expect(readFileSync(file)[MIB - 1]).toBe(7);
      expect(await seekData(fd, 0)).toBe(0);
      expect(await seekHole(fd, 0)).toBe(MIB);
      expect(await seekData(fd, MIB)).toBe(3 * MIB);
      expect(await seekHole(fd, 3 * MIB)).toBe(4 * MIB);
      expect(await seekData(fd, 4 * MIB)).toBeUndefined();
      await zeroRange(fd, 0, 4096);
      expect(
        readFileSync(file)
          .subarray(0, 4096)
          .every((byte) => byte === 0),
      ).toBe(true);
      await syncFs(fd);
    } finally {
      closeSync(fd);
    }
  });

  it('fails with the code of its own call, also with many under way', async () => {
    await using dir = tempDir();
    writeFileSync(dir.join('f'), 'x');
    const fd = openSync(dir.join('f'), 'r');
    try {
      const codes = await Promise.all(
        Array.from({ length: 40 }, (_, i) =>
          (i % 2 === 0 ? blockDeviceBytes(fd) : seekHole(987_654, 0)).then(
            () => 'none',
            (error: unknown) => errnoOf(error),
          ),
        ),
      );
      expect(codes).toEqual(codes.map((_, i) => (i % 2 === 0 ? 'ENOTTY' : 'EBADF')));
      await expect(punchHole(fd, 0, 4096)).rejects.toMatchObject({
        code: 'EBADF',
        syscall: 'fallocate',
      });
      await expect(blkZeroOut(fd, 0, 4096)).rejects.toMatchObject({ syscall: 'BLKZEROOUT' });
    } finally {
      closeSync(fd);
    }
  });

  it('locks a file against another opener, until it is closed', async () => {
    await using dir = tempDir();
    writeFileSync(dir.join('f'), 'x');
    const first = openSync(dir.join('f'), 'r');
    const second = openSync(dir.join('f'), 'r');
    try {
      expect(tryLock(first)).toBe(true);
      expect(tryLock(second)).toBe(false);
      closeSync(first);
      expect(tryLock(second)).toBe(true);
    } finally {
      closeSync(second);
    }
  });
});
