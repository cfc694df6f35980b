/** Failing media: loop devices over files that are too short or cannot grow give real EIO and ENOSPC. */
import { closeSync, ftruncateSync, openSync, statSync, truncateSync, writeSync } from 'node:fs';

import { describe, expect } from 'vitest';

import type { ReadDevice } from '../../../src/devices/device.js';
import { openReadDevice, openWriteDevice } from '../../../src/devices/open.js';
import { B2Error } from '../../../src/errors.js';
import { alignedMemory } from '../../../src/memory.js';
import { addPartitions, dice, DISK_NEEDS, imageFile, noise, tool } from '../../support/disks.js';
import { attachLoop, makeFileSystem, makerOf, mountDevice, newLoop } from '../../support/loop.js';
import { requires } from '../../support/requires.js';
import { tempDir } from '../../support/tmp.js';

const MIB = 1024 * 1024;
const needs = requires(DISK_NEEDS);

async function failure(promise: Promise<unknown>): Promise<B2Error> {
  try {
    await promise;
  } catch (error) {
    expect(error).toBeInstanceOf(B2Error);
    if (error instanceof B2Error) return error;
  }
  throw new Error('it succeeded');
}

describe('media that fail', () => {
  needs.it(
    'a read error names the device, the offset and the length, and spares the rest',
    async () => {
      await using dir = tempDir();
      const content = noise(1, 4 * MIB);
      const file = imageFile(dir, 'disk.img', content);
      const { device } = await attachLoop(dir, file);
      truncateSync(file, 2 * MIB);
      const source = await openReadDevice(device);
      try {
        for (const into of [alignedMemory(65536), new Uint8Array(65536)]) {
          const error = await failure(source.read(into, 3 * MIB));
          expect(error.kind).toBe('io');
          expect(error.retryable).toBe(true);
          expect(error.message).toContain(
            `read 65536 bytes at offset ${3 * MIB} of ${device}: EIO`,
          );
          expect(await source.read(into, MIB)).toBe(65536);
          expect(Buffer.compare(into, content.subarray(MIB, MIB + 65536))).toBe(0);
        }
      } finally {
        await source.close();
      }
    },
  );

  needs.it('a write error names the device, the offset and the length', async () => {
    await using dir = tempDir();
    tool('mount', ['-t', 'tmpfs', '-o', 'size=1m', 'none', dir.path]);
    dir.onRemove(() => void tool('umount', [dir.path]));
    const { device } = await newLoop(dir, 'disk.img', 8 * MIB);
    const target = await openWriteDevice(device, 'existing');
    try {
      const error = await failure(target.write(noise(2, 4 * MIB), MIB));
      expect(['io', 'no-space']).toContain(error.kind);
      expect(error.message).toContain(`write ${4 * MIB} bytes at offset ${MIB} of ${device}: E`);
    } finally {
      await target.close();
    }
  });

  needs.it('a full file system is no-space, with the file named', async () => {
    await using dir = tempDir();
    tool('mount', ['-t', 'tmpfs', '-o', 'size=1m', 'none', dir.path]);
    dir.onRemove(() => void tool('umount', [dir.path]));
    const target = await openWriteDevice(dir.join('target.img'), 'new');
    try {
      await target.truncate(8 * MIB);
      const error = await failure(target.write(noise(2, 4 * MIB), 4096));
      expect(error.kind).toBe('no-space');
      expect(error.message).toContain(
        `write ${4 * MIB} bytes at offset 4096 of ${dir.join('target.img')}: ENOSPC`,
      );
    } finally {
      await target.close();
    }
  });

  needs.it('a loop device that is empty has no medium', async () => {
    // Whoever looks for a free loop device may have it open, or have taken it.
    for (let tries = 1; ; tries++) {
      await using dir = tempDir();
      const { device, detach } = await newLoop(dir, 'disk.img', MIB);
      await detach();
      const opened = await openReadDevice(device).catch((error: unknown) => error);
      if (opened instanceof Error) {
        expect(opened.message).toMatch(/has no medium|ENXIO/);
        return;
      }
      await (opened as ReadDevice).close();
      expect(tries).toBeLessThan(50);
    }
  });
});

describe('facts', () => {
  needs.it('a partition is read through its disk, and says where it lies', async () => {
    await using dir = tempDir();
    const { device } = await newLoop(dir, 'disk.img', 16 * MIB);
    tool('sfdisk', ['--quiet', '--no-reread', device], 'label: gpt\nstart=2048, size=8192\n');
    const [partition = ''] = addPartitions(dir, device, 1);
    const source = await openReadDevice(partition);
    try {
      expect(source.facts).toMatchObject({
        kind: 'block',
        sizeBytes: 4 * MIB,
        partitionOf: { diskPath: device, offsetBytes: MIB },
        identity: { partitionNumber: '1' },
      });
      expect(source.facts.diskSequence).toBeTypeOf('bigint');
      // Another process's view of what we hold: the disk, not the partition.
      const held = tool('sh', [
        '-c',
        `for f in /proc/${process.pid}/fd/*; do readlink "$f" || true; done`,
      ]).split('\n');
      expect(held).toContain(device);
      expect(held).not.toContain(partition);
    } finally {
      await source.close();
    }
  });

  needs.it('a read-only device is no target', async () => {
    await using dir = tempDir();
    const { device } = await attachLoop(dir, imageFile(dir, 'disk.img', MIB), { readOnly: true });
    const error = await failure(openWriteDevice(device, 'existing'));
    expect(error.kind).toBe('refused');
    expect(error.message).toBe(`${device} is read-only`);
  });

  needs.it(
    'a new size of the device shows after refresh, and its zeroing keeps a loop file sparse',
    async () => {
      await using dir = tempDir();
      const { device, file } = await newLoop(dir, 'disk.img', 4 * MIB);
      const source = await openReadDevice(device);
      try {
        truncateSync(file, 6 * MIB);
        tool('losetup', ['--set-capacity', device]);
        expect(source.facts.sizeBytes).toBe(4 * MIB);
        expect((await source.refresh()).sizeBytes).toBe(6 * MIB);
        expect(source.facts.sizeBytes).toBe(6 * MIB);
      } finally {
        await source.close();
      }
      const target = await openWriteDevice(device, 'existing');
      try {
        await target.write(noise(1, 4 * MIB), 0);
        await target.sync();
        expect(statSync(file).blocks * 512).toBeGreaterThanOrEqual(4 * MIB);
        await target.zero(0, 6 * MIB);
        await target.sync();
        expect(statSync(file).blocks * 512).toBeLessThan(MIB);
      } finally {
        await target.close();
      }
    },
  );
});

describe('data ranges of a file that is being written', () => {
  for (const type of ['ext4', 'xfs', 'btrfs'] as const) {
    requires({ ...DISK_NEEDS, tools: [...(DISK_NEEDS.tools ?? []), makerOf(type)] }).it(
      `hold every block that was written before they were asked for, on ${type}`,
      async () => {
        await using dir = tempDir();
        const { device } = await newLoop(dir, 'fs.img', 512 * MIB);
        await makeFileSystem(type, device);
        const mount = await mountDevice(dir, device, 'm');
        const path = `${mount.path}/disk.img`;
        const fd = openSync(path, 'w+');
        const source = await openReadDevice(path);
        try {
          ftruncateSync(fd, 64 * MIB);
          await source.refresh();
          const roll = dice(3);
          const written = new Set<number>();
          for (let i = 0; i < 300; i++) {
            const block = roll((64 * MIB) / 4096);
            // Not synced: it waits in memory, without a place on the disk.
            writeSync(fd, noise(i, 4096), 0, 4096, block * 4096);
            written.add(block);
            if (i % 10 !== 0) continue;
            const ranges = await source.dataRanges(0, 64 * MIB);
            const missing = [...written].filter(
              (b) =>
                !ranges.some((r) => r.offset <= b * 4096 && r.offset + r.length >= (b + 1) * 4096),
            );
            expect(missing).toEqual([]);
            expect(ranges.reduce((sum, r) => sum + r.length, 0)).toBeLessThan(64 * MIB);
          }
        } finally {
          closeSync(fd);
          await source.close();
        }
      },
    );
  }
});
