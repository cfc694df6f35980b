/** File systems of images, checked: as a crash left them, sound ones and damaged ones. */
import { readdirSync, readFileSync } from 'node:fs';
import { open, type FileHandle } from 'node:fs/promises';
import { expect, it } from 'vitest';
import { systemClock } from '../../../src/clock.js';
import { B2Error } from '../../../src/errors.js';
import type { Image } from '../../../src/image.js';
import { checkFileSystems } from '../../../src/verify/fsck.js';
import { testFileSystems } from '../../../src/verify/restore-test.js';
import { DISK_NEEDS, addPartitions, imageFile, tool } from '../../support/disks.js';
import {
  attachLoop,
  makeFileSystem,
  mountDevice,
  newLoop,
  sparseFile,
} from '../../support/loop.js';
import { requires } from '../../support/requires.js';
import { tempDir } from '../../support/tmp.js';

const MiB = 1024 * 1024;
const options = {
  name: 'host/disk',
  clock: systemClock,
  events: () => undefined,
  cacheDir: '/nonexistent',
};

class FileImage implements Image {
  readonly logicalBlockBytes = 512;
  readonly sizeBytes: number;
  /** Reads that reach this byte fail. */
  damagedAt = Number.POSITIVE_INFINITY;
  private readonly file: FileHandle;

  private constructor(file: FileHandle, sizeBytes: number) {
    this.file = file;
    this.sizeBytes = sizeBytes;
  }

  static async open(path: string): Promise<FileImage> {
    const file = await open(path, 'r');
    return new FileImage(file, (await file.stat()).size);
  }

  async read(into: Uint8Array, offset: number): Promise<void> {
    if (offset + into.byteLength > this.damagedAt)
      throw new B2Error('damaged', 'pack 1234, frame 5: the checksum is wrong');
    for (let done = 0; done < into.byteLength;) {
      const { bytesRead } = await this.file.read(into, done, into.byteLength - done, offset + done);
      if (bytesRead === 0) throw new Error('end of file');
      done += bytesRead;
    }
  }

  extents(
    offset: number,
    length: number,
  ): Promise<{ offset: number; length: number; hole: boolean }[]> {
    return Promise.resolve([{ offset, length, hole: false }]);
  }

  close(): Promise<void> {
    return this.file.close();
  }
}

const NEEDS = {
  ...DISK_NEEDS,
  tools: [
    ...(DISK_NEEDS.tools ?? []),
    'mkfs.xfs',
    'mkfs.btrfs',
    'mkfs.vfat',
    'mkfs.ntfs',
    'xfs_repair',
    'btrfs',
    'fsck.fat',
    'ntfsfix',
    'e2fsck',
    'debugfs',
    'unshare',
    'nsenter',
  ],
  paths: ['/dev/loop-control', '/dev/fuse'],
};

function loopsNow(): readonly string[] {
  return readdirSync('/sys/block').filter((name) => {
    try {
      return readFileSync(`/sys/block/${name}/loop/backing_file`, 'utf8').endsWith('/disk\n');
    } catch {
      return false;
    }
  });
}

requires(NEEDS).describe('the file systems of an image', () => {
  it('are found sound as a crash left them: journals are replayed, a FAT in use is no fault', async () => {
    await using dir = tempDir();
    const disk = sparseFile(dir, 'whole', 660 * MiB);
    const loop = await attachLoop(dir, disk);
    tool(
      'sfdisk',
      ['-q', loop.device],
      'label: gpt\nsize=64M\nsize=320M\nsize=128M\nsize=32M\nsize=32M\nsize=16M\n',
    );
    const [ext4 = '', xfs = '', btrfs = '', fat = '', ntfs = '', swap = ''] = addPartitions(
      dir,
      loop.device,
      6,
    );
    for (const [type, device] of [
      ['ext4', ext4],
      ['xfs', xfs],
      ['btrfs', btrfs],
      ['vfat', fat],
      ['ntfs', ntfs],
      ['swap', swap],
    ] as const)
      await makeFileSystem(type, device);
    // As if mounted: the dirty bit of FAT16.
    tool('dd', [`of=${fat}`, 'bs=1', 'seek=37', 'conv=notrunc', 'status=none'], Uint8Array.of(1));
    for (const [device, name] of [
      [ext4, 'a'],
      [xfs, 'b'],
      [btrfs, 'c'],
    ] as const) {
      const mount = await mountDevice(dir, device, name);
      for (let i = 0; i < 20; i++)
        tool('dd', [
          'if=/dev/zero',
          `of=${mount.path}/f${i}`,
          'bs=4k',
          'count=4',
          'conv=fsync',
          'status=none',
        ]);
    }
    tool('sync', ['-f', dir.join('a')]);
    // The copy of a mounted disk. A btrfs of the same UUID cannot be looked at beside its original.
    const crash = dir.join('crash');
    tool('dd', [
      `if=${loop.device}`,
      `of=${crash}`,
      'bs=4M',
      'iflag=direct',
      'conv=sparse',
      'status=none',
    ]);
    const before = loopsNow();
    const beside = await checkFileSystems(await FileImage.open(crash), options);
    expect(beside.map((c) => [c.name, c.type, c.state])).toEqual([
      ['p1', 'ext4', 'sound'],
      ['p2', 'xfs', 'sound'],
      ['p3', 'btrfs', 'unchecked'],
      ['p4', 'vfat', 'sound'],
      ['p5', 'ntfs', 'sound'],
    ]);
    expect(beside[0]?.how).toBe('mounted, journal replayed, e2fsck -fn');
    expect(beside[1]?.how).toBe('mounted, journal replayed, xfs_repair -n');
    expect(beside[2]?.message).toMatch(/btrfs that it is a copy of/);
    // Those of tests beside this one come and go; one of ours would stay.
    const isNew = (name: string): boolean => !before.includes(name);
    for (let i = 0; i < 300 && loopsNow().some(isNew); i++)
      await new Promise((resolve) => setTimeout(resolve, 100));
    expect(loopsNow().filter(isNew)).toEqual([]);
    const facts = await testFileSystems(
      await FileImage.open(crash),
      { volumeId: 'v1', volume: 'host/disk', seq: 7 },
      options,
    );
    expect(facts.findings.map((f) => f.severity)).toEqual(['note']);
  });

  it('are found faulty where they are, and btrfs without its original is checked', async () => {
    await using dir = tempDir();
    const disk = imageFile(dir, 'two', 200 * MiB);
    tool('sfdisk', ['-q', disk], 'label: dos\nsize=48M, type=83\nsize=140M, type=83\n');
    // An inode that two names claim to be alone.
    const part = imageFile(dir, 'part', 48 * MiB);
    tool('mkfs.ext4', ['-q', part]);
    tool('debugfs', ['-w', '-R', 'set_inode_field <2> links_count 77', part]);
    tool('dd', [`if=${part}`, `of=${disk}`, 'bs=1M', 'seek=1', 'conv=notrunc', 'status=none']);
    const other = imageFile(dir, 'other', 140 * MiB);
    tool('mkfs.btrfs', ['-q', other]);
    tool('dd', [`if=${other}`, `of=${disk}`, 'bs=1M', 'seek=49', 'conv=notrunc', 'status=none']);
    const image = await FileImage.open(disk);
    const { checks, findings } = await testFileSystems(
      image,
      { volumeId: 'v1', volume: 'host/disk', seq: 7 },
      options,
    );
    expect(checks).toMatchObject([
      { name: 'p1', type: 'ext4', state: 'faulty' },
      {
        name: 'p2',
        type: 'btrfs',
        state: 'sound',
        how: 'mounted, journal replayed, btrfs check --readonly',
      },
    ]);
    expect(findings).toHaveLength(1);
    expect(findings[0]).toMatchObject({
      severity: 'damage',
      kind: 'filesystem',
      object: 'volumes/v1',
    });
    expect(findings[0]?.message).toMatch(
      /^the ext4 in p1 of point #7 of volume host\/disk is not sound: e2fsck -fn ended with \d+: /,
    );
  });

  it('that cannot be read are no faults of the file system', async () => {
    await using dir = tempDir();
    const { file, device } = await newLoop(dir, 'ext4', 32 * MiB);
    await makeFileSystem('ext4', device);
    const image = await FileImage.open(file);
    image.damagedAt = MiB;
    const { checks, findings } = await testFileSystems(
      image,
      { volumeId: 'v1', volume: 'host/disk', seq: 7 },
      options,
    );
    expect(checks).toEqual([]);
    expect(findings).toMatchObject([
      {
        severity: 'damage',
        kind: 'filesystem',
        message:
          'point #7 of volume host/disk cannot be read: pack 1234, frame 5: the checksum is wrong',
      },
    ]);
  });
});
