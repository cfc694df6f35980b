/** Partition tables and contents as the system's own tools make them, and what those tools say of ours. */
import { readFileSync, truncateSync } from 'node:fs';

import { describe, expect } from 'vitest';

import type { ReadDevice } from '../../../src/devices/device.js';
import { moveGpt } from '../../../src/devices/gpt.js';
import { settleGpt } from '../../../src/devices/grow.js';
import { describeContents, inspectDevice } from '../../../src/devices/inspect.js';
import { openReadDevice, openWriteDevice } from '../../../src/devices/open.js';
import { readPartitionTable } from '../../../src/devices/table.js';
import { DISK_NEEDS, imageFile, noise, tool } from '../../support/disks.js';
import {
  attachLoop,
  makeFileSystem,
  makerOf,
  newLoop,
  type FileSystem,
} from '../../support/loop.js';
import { requires } from '../../support/requires.js';
import { tempDir } from '../../support/tmp.js';

const MIB = 1024 * 1024;
const needs = requires(DISK_NEEDS);

async function reading<T>(path: string, use: (device: ReadDevice) => Promise<T>): Promise<T> {
  const device = await openReadDevice(path);
  try {
    return await use(device);
  } finally {
    await device.close();
  }
}

const GPT =
  'label: gpt\nfirst-lba: 40\nstart=1MiB, size=2MiB, name="boot é", type=U\nsize=5MiB, name=root\n';

describe('GPT', () => {
  for (const sectorBytes of [512, 4096] as const) {
    needs.it(
      `reads what sfdisk wrote in sectors of ${sectorBytes}, from the device and from its image`,
      async () => {
        await using dir = tempDir();
        const { device, file } = await newLoop(dir, 'disk.img', 16 * MIB, { sectorBytes });
        tool('sfdisk', ['--quiet', '--no-reread', device], GPT);
        const dump = tool('sfdisk', ['--json', device]);
        const told = JSON.parse(dump) as {
          partitiontable: {
            id: string;
            partitions: { start: number; size: number; uuid: string; type: string }[];
          };
        };
        for (const path of [device, file]) {
          const table = await reading(path, readPartitionTable);
          expect(table?.facts).toMatchObject({
            type: 'gpt',
            sectorBytes,
            problems: [],
            id: told.partitiontable.id.toLowerCase(),
          });
          expect(table?.facts.partitions).toEqual(
            told.partitiontable.partitions.map((p, i) => ({
              number: i + 1,
              offsetBytes: p.start * sectorBytes,
              sizeBytes: p.size * sectorBytes,
              type: p.type.toLowerCase(),
              kind: 'gpt',
              uuid: p.uuid.toLowerCase(),
              name: i === 0 ? 'boot é' : 'root',
            })),
          );
          expect(JSON.parse(JSON.stringify(table?.facts))).toEqual(table?.facts);
        }
      },
    );

    for (const [what, newBytes] of [
      ['much larger', 40 * MIB],
      ['larger by one sector', 16 * MIB + 4096],
      ['larger by less than a table', 16 * MIB + 5 * 4096],
    ] as const) {
      needs.it(
        `moves to the end of a disk that is ${what} (sectors of ${sectorBytes}), and sgdisk finds no fault`,
        async () => {
          await using dir = tempDir();
          const made = await newLoop(dir, 'disk.img', 16 * MIB, { sectorBytes });
          tool('sfdisk', ['--quiet', '--no-reread', made.device], GPT);
          const before = tool('sfdisk', ['--dump', made.device]);
          await made.detach();
          truncateSync(made.file, newBytes);
          const { device } = await attachLoop(dir, made.file, { sectorBytes });
          expect((await reading(device, readPartitionTable))?.facts.problems).not.toEqual([]);

          const target = await openWriteDevice(device, 'existing');
          try {
            expect(await settleGpt(target)).toBe(true);
            expect(await settleGpt(target)).toBe(false);
          } finally {
            await target.close();
          }
          expect((await reading(device, readPartitionTable))?.facts.problems).toEqual([]);
          expect(tool('sgdisk', ['--verify', device])).toContain('No problems found');
          expect(tool('sfdisk', ['--verify', device])).toContain('No errors detected');
          const partitions = (text: string): string[] =>
            text
              .split('\n')
              .filter((line) => line.startsWith('/dev/'))
              .map((line) => line.replace(/^\S+p(\d+)/, '$1'));
          expect(partitions(tool('sfdisk', ['--dump', device]))).toEqual(partitions(before));
          // Nothing but the tables was touched: the backup is found at the new end when the primary is gone.
          const bytes = readFileSync(device);
          const copy = imageFile(dir, 'copy.img', bytes.fill(0, sectorBytes, 2 * sectorBytes));
          const table = await reading(copy, readPartitionTable);
          expect(table?.facts.partitions).toHaveLength(2);
          expect(table?.primaryGpt).toBeUndefined();
          expect(table?.facts.problems.join()).toContain('primary');
        },
      );
    }
  }

  for (const [what, newBytes, expectedCases] of [
    ['overlaps the old backup', 16 * MIB + 8 * 512, 12],
    ['leaves the old backup behind', 20 * MIB, 14],
  ] as const) {
    needs.it(
      `has one sound table on disk after every single write of a move that ${what}`,
      async () => {
        await using dir = tempDir();
        const old = await newLoop(dir, 'disk.img', 16 * MIB);
        tool('sfdisk', ['--quiet', '--no-reread', old.device], GPT);
        await old.detach();
        truncateSync(old.file, newBytes);
        const { change, sizeBytes } = await reading(old.file, async (device) => {
          const table = await readPartitionTable(device);
          if (table?.primaryGpt === undefined) throw new Error('no table');
          return {
            change: moveGpt(table.primaryGpt, table.sector0, device.facts.sizeBytes, {
              growLast: true,
            }),
            sizeBytes: device.facts.sizeBytes,
          };
        });
        const bytes = readFileSync(old.file);
        expect(bytes.byteLength).toBe(sizeBytes);
        let cases = 0;
        for (const step of change.steps) {
          // Within a step the writes may reach the disk in any order: any subset of them.
          for (let subset = 0; subset < 2 ** step.length; subset++) {
            const copy = Buffer.from(bytes);
            step.forEach(
              (write, i) => (subset & (1 << i)) !== 0 && copy.set(write.data, write.offset),
            );
            const table = await reading(imageFile(dir, 'copy.img', copy), readPartitionTable);
            expect(table?.facts.partitions).toHaveLength(2);
            cases++;
          }
          for (const write of step) bytes.set(write.data, write.offset);
        }
        expect(cases).toBe(expectedCases);
      },
    );
  }

  needs.it(
    'refuses a smaller disk, a hybrid MBR and a damaged table, changing nothing',
    async () => {
      await using dir = tempDir();
      const { device, file } = await newLoop(dir, 'disk.img', 16 * MIB);
      tool('sfdisk', ['--quiet', '--no-reread', device], GPT);
      const table = await reading(device, readPartitionTable);
      const gpt = table?.primaryGpt;
      if (table === undefined || gpt === undefined) throw new Error('no table');
      expect(() => moveGpt(gpt, table.sector0, 15 * MIB, { growLast: false })).toThrow(
        /the disk ends at sector/,
      );
      tool('sgdisk', ['--hybrid', '1', device]);
      const hybrid = await reading(device, readPartitionTable);
      if (hybrid?.primaryGpt === undefined) throw new Error('no table');
      const { primaryGpt, sector0 } = hybrid;
      expect(() => moveGpt(primaryGpt, sector0, 32 * MIB, { growLast: false })).toThrow(
        /hybrid MBR/,
      );

      const bytes = readFileSync(file);
      bytes[512 + 60] = (bytes[512 + 60] ?? 0) ^ 1;
      truncateSync(imageFile(dir, 'damaged.img', bytes), 20 * MIB);
      const target = await openWriteDevice(dir.join('damaged.img'), 'existing');
      try {
        expect(await settleGpt(target)).toBe(false);
        expect((await readPartitionTable(target))?.facts.problems.join()).toContain(
          'GPT header in sector 1: wrong checksum',
        );
      } finally {
        await target.close();
      }
    },
  );
});

describe('MBR', () => {
  needs.it('reads primary and logical partitions as sfdisk does', async () => {
    await using dir = tempDir();
    const { device } = await newLoop(dir, 'disk.img', 64 * MIB);
    tool(
      'sfdisk',
      ['--quiet', '--no-reread', device],
      'label: dos\nlabel-id: 0xdeadbeef\nsize=4MiB, type=83, bootable\nsize=40MiB, type=5\n3: size=4MiB, type=82\n5: size=5MiB\n6: size=6MiB\n7: size=7MiB\n',
    );
    const told = JSON.parse(tool('sfdisk', ['--json', device])) as {
      partitiontable: { partitions: { node: string; start: number; size: number }[] };
    };
    const table = await reading(device, readPartitionTable);
    expect(table?.facts).toMatchObject({ type: 'mbr', id: 'deadbeef', problems: [] });
    expect(
      table?.facts.partitions.map((p) => [p.number, p.offsetBytes / 512, p.sizeBytes / 512]),
    ).toEqual(
      told.partitiontable.partitions.map((p) => [
        Number(/p(\d+)$/.exec(p.node)?.[1]),
        p.start,
        p.size,
      ]),
    );
    expect(table?.facts.partitions.map((p) => p.kind)).toEqual([
      'primary',
      'extended',
      'primary',
      'logical',
      'logical',
      'logical',
    ]);
    expect(table?.facts.partitions[0]).toMatchObject({ type: '0x83', uuid: 'deadbeef-01' });
  });

  needs.it('survives a chain of logical partitions that bites its tail', async () => {
    await using dir = tempDir();
    const { device, file } = await newLoop(dir, 'disk.img', 64 * MIB);
    tool(
      'sfdisk',
      ['--quiet', '--no-reread', device],
      'label: dos\nsize=40MiB, type=5\n5: size=5MiB\n6: size=6MiB\n',
    );
    const bytes = readFileSync(file);
    const table = await reading(device, readPartitionTable);
    const extended = table?.facts.partitions.find((p) => p.kind === 'extended')?.offsetBytes ?? 0;
    // The link of the first logical partition's sector: to itself.
    bytes.writeUInt32LE(0, extended + 446 + 16 + 8);
    const looped = await reading(imageFile(dir, 'loop.img', bytes), readPartitionTable);
    expect(looped?.facts.problems).toEqual(['the chain of logical partitions does not end']);
  });
});

describe('contents', () => {
  for (const type of [
    'ext4',
    'xfs',
    'btrfs',
    'vfat',
    'swap',
  ] as const satisfies readonly FileSystem[]) {
    requires({ ...DISK_NEEDS, tools: [...(DISK_NEEDS.tools ?? []), makerOf(type)] }).it(
      `finds ${type} as blkid does, on a disk and in a partition`,
      async () => {
        await using dir = tempDir();
        const size = type === 'xfs' ? 320 * MIB : 128 * MIB;
        const { device } = await newLoop(dir, 'fs.img', size);
        await makeFileSystem(type, device);
        tool('blockdev', ['--flushbufs', device]);
        const told = new Map(
          tool('blkid', ['-p', '-o', 'export', device])
            .split('\n')
            .map((line) => line.split('=', 2) as [string, string]),
        );
        const found = await reading(device, (d) => inspectDevice(d));
        expect(found.table).toBeUndefined();
        expect(found.contents).toHaveLength(1);
        expect(found.contents[0]).toMatchObject({ type: told.get('TYPE'), uuid: told.get('UUID') });
        const sizeBytes = found.contents[0]?.sizeBytes;
        if (sizeBytes !== undefined) expect(Math.abs(sizeBytes - size)).toBeLessThan(MIB);
        expect(JSON.parse(JSON.stringify(found))).toEqual(found);

        const disk = await newLoop(dir, 'disk.img', size + 4 * MIB);
        tool('sfdisk', ['--quiet', '--no-reread', disk.device], 'label: gpt\nstart=1MiB\n');
        tool('dd', [
          `if=${device}`,
          `of=${disk.device}`,
          'bs=1M',
          'seek=1',
          'conv=notrunc,fsync',
          'status=none',
        ]);
        tool('sgdisk', ['--move-second-header', disk.device]);
        const inside = await reading(disk.device, (d) => inspectDevice(d));
        expect(inside.table?.partitions[0]?.contents[0]).toMatchObject({
          type: told.get('TYPE'),
          uuid: told.get('UUID'),
        });
        expect(await reading(disk.device, (d) => describeContents(d))).toEqual([
          'a GPT partition table with one partition',
          expect.stringMatching(/ in partition 1$/),
        ]);
      },
    );
  }

  for (const [version, type] of [
    ['ext2', 'ext2'],
    ['ext3', 'ext3'],
  ] as const) {
    needs.it(`tells ${version} from its relatives`, async () => {
      await using dir = tempDir();
      const file = imageFile(dir, 'fs.img', 32 * MIB);
      tool('mkfs.ext4', ['-q', '-t', version, '-L', 'my label', file]);
      const found = await reading(file, (d) => inspectDevice(d));
      expect(found.contents[0]).toMatchObject({ type, label: 'my label', sizeBytes: 32 * MIB });
      expect(await reading(file, (d) => describeContents(d))).toEqual([
        `an ${type} file system labelled "my label"`,
      ]);
    });
  }

  needs.it('asks blkid about what it does not know itself', async () => {
    await using dir = tempDir();
    const bytes = Buffer.alloc(2 * MIB);
    // The superblock of a minix file system, version 3.
    bytes.writeUInt32LE(64, 1024);
    bytes.writeUInt16LE(4, 1024 + 6);
    bytes.writeUInt16LE(4, 1024 + 8);
    bytes.writeUInt16LE(16, 1024 + 10);
    bytes.writeUInt32LE(512, 1024 + 20);
    bytes.writeUInt16LE(0x4d5a, 1024 + 24);
    bytes.writeUInt16LE(1024, 1024 + 28);
    const found = await reading(imageFile(dir, 'fs.img', bytes), (d) => inspectDevice(d));
    expect(found.contents).toEqual([{ type: 'minix', usage: 'filesystem' }]);
    // Without blkid the bytes alone are reason enough to ask.
    const words = await reading(dir.join('fs.img'), (d) =>
      describeContents(d, async () => undefined),
    );
    expect(words).toEqual(['unknown data at the beginning (not all zeros)']);
  });

  needs.it('knows an empty target, and one with data at its end only', async () => {
    await using dir = tempDir();
    const file = imageFile(dir, 'disk.img', 8 * MIB);
    expect(await reading(file, (d) => describeContents(d))).toEqual([]);
    const bytes = Buffer.alloc(8 * MIB + 77);
    bytes[8 * MIB + 76] = 1;
    expect(await reading(imageFile(dir, 'end.img', bytes), (d) => describeContents(d))).toEqual([
      'unknown data at the end (not all zeros)',
    ]);
    expect(await reading(imageFile(dir, 'none.img', 0), (d) => describeContents(d))).toEqual([]);
    expect(
      (await reading(imageFile(dir, 'random.img', noise(5, 2 * MIB)), (d) => inspectDevice(d)))
        .contents,
    ).toEqual([]);
  });

  needs.it('agrees with wipefs that a zeroed disk is empty', async () => {
    await using dir = tempDir();
    const { device } = await newLoop(dir, 'disk.img', 16 * MIB);
    tool('sfdisk', ['--quiet', '--no-reread', device], GPT);
    const target = await openWriteDevice(device, 'existing');
    try {
      await target.zero(0, target.facts.sizeBytes);
      await target.sync();
    } finally {
      await target.close();
    }
    expect(tool('wipefs', [device])).toBe('');
    expect(await reading(device, (d) => describeContents(d))).toEqual([]);
  });
});
