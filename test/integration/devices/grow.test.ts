/** Growing what was restored to a larger target, with real file systems on loop devices and in files. */
import { mkdirSync, readFileSync, statfsSync, truncateSync, writeFileSync } from 'node:fs';

import { describe, expect } from 'vitest';

import { growTarget } from '../../../src/devices/grow.js';
import { inUseReasons } from '../../../src/devices/in-use.js';
import { runTool } from '../../../src/devices/run.js';
import { addPartitions, DISK_NEEDS, imageFile, noise, tool } from '../../support/disks.js';
import { attachLoop, makeFileSystem, makerOf, mountDevice } from '../../support/loop.js';
import { requires } from '../../support/requires.js';
import { tempDir } from '../../support/tmp.js';

const MIB = 1024 * 1024;
const needs = requires(DISK_NEEDS);
const TOOLS = {
  ext4: ['e2fsck', 'resize2fs'],
  xfs: ['xfs_growfs', 'xfs_repair'],
  btrfs: ['btrfs'],
} as const;
const CHECK = {
  ext4: ['e2fsck', '-f', '-n'],
  xfs: ['xfs_repair', '-n'],
  btrfs: ['btrfs', 'check', '--readonly'],
} as const;

describe('growing', () => {
  for (const type of ['ext4', 'xfs', 'btrfs'] as const) {
    const lab = requires({
      ...DISK_NEEDS,
      tools: [...(DISK_NEEDS.tools ?? []), makerOf(type), ...TOOLS[type]],
    });
    const oldMiB = type === 'xfs' ? 320 : 128;
    const newMiB = oldMiB + 200;

    for (const table of ['gpt', 'mbr', 'none'] as const) {
      for (const kind of ['device', 'file'] as const) {
        lab.it(`${type}, table ${table}, on a ${kind}`, async () => {
          await using dir = tempDir();
          const content = noise(1, 5 * MIB);
          const file = imageFile(dir, 'disk.img', oldMiB * MIB);
          const old = await attachLoop(dir, file);
          if (table !== 'none') {
            tool(
              'sfdisk',
              ['--quiet', '--no-reread', old.device],
              `label: ${table === 'gpt' ? 'gpt' : 'dos'}\nsize=4MiB\nstart=5MiB\n`,
            );
          }
          const offset = table === 'none' ? 0 : 5 * MIB;
          const room = oldMiB * MIB - offset - (table === 'gpt' ? MIB : 0);
          const place = await attachPart(file, offset, room);
          await makeFileSystem(type, place);
          tool('losetup', ['--detach', place]);
          await old.detach();
          const filled = await attachPart(file, offset, room);
          mkdirSync(dir.join('in'));
          tool('mount', [filled, dir.join('in')]);
          writeFileSync(dir.join('in/data'), content);
          tool('umount', [dir.join('in')]);
          tool('losetup', ['--detach', filled]);

          truncateSync(file, newMiB * MIB);
          const target = kind === 'file' ? file : (await attachLoop(dir, file)).device;
          const report = await growTarget(target);
          expect(report.notDone).toEqual([]);
          expect(report.done.map((line) => line.replace(/ (from|to) .*/, ''))).toEqual([
            ...(table === 'gpt' ? ['moved the backup partition table'] : []),
            ...(table === 'none' ? [] : ['grew partition 2']),
            `grew ${type === 'btrfs' ? 'a' : 'an'} ${type} file system`,
          ]);
          // Nothing is left behind, and there is nothing left to do.
          // A loop device ends with its last user, which may be whoever looks at new devices (udev, another test's namespace).
          await expect.poll(() => inUseReasons(target), { timeout: 30_000 }).toEqual([]);
          expect(await growTarget(target)).toEqual({ done: [], notDone: [] });

          if (table === 'gpt' && kind === 'device')
            expect(tool('sgdisk', ['--verify', target])).toContain('No problems found');
          if (kind === 'device' && table !== 'none') {
            const [, second = ''] = addPartitions(dir, target, 2);
            tool(CHECK[type][0], [...CHECK[type].slice(1), second]);
          }
          const grown = await attachPart(
            file,
            offset,
            newMiB * MIB - offset - (table === 'gpt' ? MIB : 0),
          );
          dir.onRemove(() => void tool('losetup', ['--detach', grown]));
          tool(CHECK[type][0], [...CHECK[type].slice(1), grown]);
          const mount = await mountDevice(dir, grown, 'out');
          expect(Buffer.compare(readFileSync(`${mount.path}/data`), content)).toBe(0);
          // XFS does not count its log, 64 MiB here.
          const { blocks, bsize } = statfsSync(mount.path);
          expect(blocks * bsize).toBeGreaterThan((newMiB - 100) * MIB);
        });
      }
    }
  }

  async function attachPart(file: string, offset: number, sizeBytes: number): Promise<string> {
    return tool('losetup', [
      '--find',
      '--show',
      '--offset',
      String(offset),
      '--sizelimit',
      String(sizeBytes),
      file,
    ]).trim();
  }

  needs.it('says what it cannot grow, and what to do', async () => {
    await using dir = tempDir();
    const file = imageFile(dir, 'swap.img', 16 * MIB);
    tool('mkswap', [file]);
    truncateSync(file, 32 * MIB);
    expect(await growTarget(file)).toEqual({
      done: [],
      notDone: [
        'swap space was left at its size: run mkswap on it with its label and UUID to use the space',
      ],
    });
  });

  needs.it('leaves a file system with errors alone', async () => {
    await using dir = tempDir();
    const file = imageFile(dir, 'fs.img', 32 * MIB);
    tool('mkfs.ext4', ['-q', '-b', '4096', file]);
    // The inode table's beginning: root directory and journal are gone.
    tool('debugfs', ['-w', '-R', 'clri <2>', file]);
    truncateSync(file, 64 * MIB);
    const report = await growTarget(file);
    expect(report.done).toEqual([]);
    expect(report.notDone).toHaveLength(1);
    expect(report.notDone[0]).toMatch(
      /^an ext4 file system was left at its size: its check failed.*Run e2fsck -f by hand/,
    );
  });

  needs.it('names the tool that is missing, and keeps the table it could move', async () => {
    await using dir = tempDir();
    const file = imageFile(dir, 'disk.img', 64 * MIB);
    tool('sfdisk', ['--quiet', file], 'label: gpt\nstart=1MiB\n');
    tool('mkfs.ext4', ['-q', '-E', `offset=${MIB}`, file, '50M']);
    truncateSync(file, 128 * MIB);
    const report = await growTarget(file, {
      run: (name, args, timeoutMs) =>
        name === 'resize2fs' ? Promise.resolve(undefined) : runTool(name, args, timeoutMs),
    });
    expect(report.done).toEqual([
      'moved the backup partition table to the end of the disk',
      'grew partition 1 from 62 MiB to 126 MiB',
    ]);
    expect(report.notDone).toEqual([
      'an ext4 file system was left at its size: resize2fs is not installed. Install the package that has resize2fs.',
    ]);
  });

  needs.it('does not touch a btrfs copy while the original is mounted', async () => {
    await using dir = tempDir();
    const original = imageFile(dir, 'a.img', 128 * MIB);
    tool('mkfs.btrfs', ['-q', original]);
    tool('cp', ['--sparse=always', original, dir.join('b.img')]);
    truncateSync(dir.join('b.img'), 256 * MIB);
    const { device } = await attachLoop(dir, original);
    await mountDevice(dir, device, 'm');
    const report = await growTarget(dir.join('b.img'));
    expect(report.done).toEqual([]);
    expect(report.notDone[0]).toContain(
      'a btrfs file system with the same UUID is mounted on this machine',
    );
  });

  needs.it('leaves logical partitions as they are', async () => {
    await using dir = tempDir();
    const file = imageFile(dir, 'disk.img', 64 * MIB);
    tool('sfdisk', ['--quiet', file], 'label: dos\nsize=10MiB\ntype=5\n5: size=10MiB\n');
    truncateSync(file, 128 * MIB);
    const report = await growTarget(file);
    expect(report.done).toEqual([]);
    expect(report.notDone[0]).toContain('b2 does not grow logical partitions');
  });
});
