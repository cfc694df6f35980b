/** What `mount --files` leaves out, and that it says so. */
import { afterEach, expect, it } from 'vitest';
import { systemClock } from '../../../src/clock.js';
import type { B2Event } from '../../../src/events.js';
import { FilesView, type FilesSource } from '../../../src/mount/files-view.js';
import { MemoryImage } from '../../support/image-memory.js';

const events: B2Event[] = [];
const view = new FilesView({
  clock: systemClock,
  events: (event) => events.push(event),
  cacheDir: '/nonexistent',
});
afterEach(() => view.close());

const source = (volume: string, point: number, write: (disk: Buffer) => void): FilesSource => ({
  key: `${volume}:${point}`,
  volume,
  name: `${volume} #${point}`,
  mtimeNs: 0n,
  openImage: () => {
    const image = new MemoryImage([{ length: 1024 * 1024, hole: true }]);
    write(image.content);
    return Promise.resolve(image);
  },
});

it('names logical volumes and parts of a larger file system once for a volume, and shows none of them', async () => {
  const lvm = (disk: Buffer): void => {
    disk.write('LABELONE', 512);
    disk.write('LVM2 001', 512 + 24);
  };
  const btrfs = (disk: Buffer): void => {
    disk.write('_BHRfS_M', 65_536 + 64, 'latin1');
    disk.writeBigUInt64LE(3n, 65_536 + 136);
  };
  expect(await view.names(source('web/sda', 1, lvm))).toEqual([]);
  expect(await view.names(source('web/sda', 2, lvm))).toEqual([]);
  expect(await view.names(source('web/sdb', 1, btrfs))).toEqual([]);
  expect(events.map((e) => ('message' in e ? e.message : ''))).toEqual([
    expect.stringMatching(
      /^web\/sda, disk: logical volumes \(LVM\) in it are not shown here, .*\(its label is damaged\)/,
    ),
    expect.stringMatching(/^web\/sdb, disk: the btrfs in it lies on 3 devices and is not shown/),
  ]);
});
