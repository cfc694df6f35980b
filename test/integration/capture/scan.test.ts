/** Scans of real loop devices into real directories, with threads. */
import { readdirSync, truncateSync } from 'node:fs';
import { expect, it } from 'vitest';
import { openDirectoryStore } from '../../../src/repo/store-directory.js';
import { addPartitions, DISK_NEEDS, imageFile, tool } from '../../support/disks.js';
import { attachLoop, makeFileSystem, mountDevice, newLoop } from '../../support/loop.js';
import { requires } from '../../support/requires.js';
import {
  bedOn,
  caught,
  handleOf,
  packsIn,
  restored,
  testImage,
  type Bed,
} from '../../support/scan-bed.js';
import { tempDir, type TempDir } from '../../support/tmp.js';

const MiB = 1024 * 1024;

async function directoryBed(dir: TempDir, path: string): Promise<Bed> {
  const store = await openDirectoryStore(path, { create: true });
  dir.onRemove(() => store.close());
  return bedOn(store, handleOf({ storeUrl: path, packBytes: 2 * MiB }));
}

const openFiles = (): number => readdirSync('/proc/self/fd').length;

requires(DISK_NEEDS).describe('a scan in threads', () => {
  for (const sectorBytes of [512, 4096] as const) {
    it(`of a loop device with sectors of ${sectorBytes} bytes finds every byte`, async () => {
      await using dir = tempDir();
      const image = testImage(sectorBytes, 24 * MiB + sectorBytes * 3);
      const loop = await attachLoop(dir, imageFile(dir, 'disk', image), { sectorBytes });
      const bed = await directoryBed(dir, dir.join('repo'));
      const before = openFiles();
      const first = await bed.scan(loop.device, { workers: 2 });
      expect((await restored(bed, first)).equals(image)).toBe(true);
      const again = await bed.scan(loop.device, { workers: 2 });
      expect([again.stats.newChunks, again.packs]).toEqual([0, []]);
      expect((await restored(bed, again)).equals(image)).toBe(true);
      expect(openFiles()).toBe(before);
    });
  }

  it('of a partition finds the bytes of the partition', async () => {
    await using dir = tempDir();
    const image = testImage(3, 32 * MiB);
    image.fill(0, 0, MiB);
    const file = imageFile(dir, 'disk', image);
    tool('sfdisk', ['--quiet', file], 'label: gpt\nstart=4096, size=40960\n');
    const loop = await attachLoop(dir, file);
    const [partition] = addPartitions(dir, loop.device, 1);
    const bed = await directoryBed(dir, dir.join('repo'));
    const result = await bed.scan(partition ?? '', { workers: 2 });
    const expected = image.subarray(2 * MiB, 22 * MiB);
    expect((await restored(bed, result)).equals(expected)).toBe(true);
  });

  it('of a failing disk names it and the offset, or collects what cannot be read', async () => {
    await using dir = tempDir();
    const image = testImage(4, 24 * MiB);
    const file = imageFile(dir, 'disk', image);
    const loop = await attachLoop(dir, file);
    truncateSync(file, 13 * MiB + 8192); // reads behind it fail with EIO
    const bed = await directoryBed(dir, dir.join('repo'));
    const before = openFiles();
    const error = await caught(bed.scan(loop.device, { workers: 2 }));
    expect(error).toMatchObject({ kind: 'io' });
    expect(String(error)).toMatch(new RegExp(`at offset \\d+ of ${loop.device}: EIO`));
    expect((await packsIn(bed)).open).toEqual([]);
    const result = await bed.scan(loop.device, { workers: 2, onReadError: 'collect' });
    const end = 13 * MiB + 8192;
    expect(result.unreadable).toEqual([{ offset: end, length: 24 * MiB - end }]);
    image.fill(0, end);
    expect((await restored(bed, result)).equals(image)).toBe(true);
    expect(openFiles()).toBe(before);
  });

  it('into a file system that gets full says so, cleans up, and works when there is room', async () => {
    await using dir = tempDir();
    const image = testImage(5, 40 * MiB);
    const device = imageFile(dir, 'disk', image);
    const small = await newLoop(dir, 'small', 12 * MiB);
    await makeFileSystem('ext4', small.device);
    const mount = await mountDevice(dir, small.device, 'mnt');
    const bed = await directoryBed(dir, `${mount.path}/repo`);
    const before = openFiles();
    expect(await caught(bed.scan(device, { workers: 2 }))).toMatchObject({ kind: 'no-space' });
    expect(openFiles()).toBe(before);
    expect((await packsIn(bed)).open).toEqual([]);
    await bed.index.refresh();
    const part = await bed.scan(device, { workers: 2, range: { offset: 0, length: 2 * MiB } });
    expect((await restored(bed, part)).equals(image.subarray(0, 2 * MiB))).toBe(true);
    await bed.store.close();
  });
});
