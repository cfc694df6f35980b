import { spawnSync } from 'node:child_process';
import { existsSync, mkdirSync, readFileSync, writeFileSync } from 'node:fs';
import { expect } from 'vitest';
import {
  LOOP_NEEDS,
  attachLoop,
  makeFileSystem,
  makerOf,
  mountDevice,
  newLoop,
  runTool,
  sparseFile,
  type FileSystem,
} from '../../support/loop.js';
import { requires } from '../../support/requires.js';
import { loopsBelow, mountsBelow, sweep, tempDir } from '../../support/tmp.js';

const MIB = 2 ** 20;

requires({ ...LOOP_NEEDS, tools: [...(LOOP_NEEDS.tools ?? []), makerOf('ext4')] }).describe(
  'loop devices of tests',
  () => {
    const { it } = requires({});
    it('attach, carry a file system, mount and leave nothing behind', async () => {
      const dir = tempDir();
      const loop = await newLoop(dir, 'disk.img', 32 * MIB, { sectorBytes: 4096 });
      const name = loop.device.slice('/dev/'.length);
      expect(readFileSync(`/sys/block/${name}/queue/logical_block_size`, 'utf8').trim()).toBe(
        '4096',
      );
      expect(loopsBelow(dir.path)).toEqual([loop.device]);
      await makeFileSystem('ext4', loop.device);
      const mount = await mountDevice(dir, loop.device, 'mnt with blank');
      writeFileSync(`${mount.path}/file`, 'hello');
      expect(mountsBelow(dir.path)).toEqual([mount.path]);
      await dir.remove();
      expect(existsSync(dir.path)).toBe(false);
      expect(loopsBelow(dir.path)).toEqual([]);
    });

    it('are swept when their run is dead, and left alone while it lives', async () => {
      await using parent = tempDir();
      // A process that is certainly gone: its pid, with a start time that nobody has now.
      const gone = spawnSync('true');
      const namespace = /b2-test-(\d+)-/.exec(parent.path)?.[1] ?? '';
      const dead = parent.join(`b2-test-${namespace}-${gone.pid}-1-xxxxxx`);
      mkdirSync(`${dead}/mnt`, { recursive: true });
      const image = `${dead}/disk.img`;
      await runTool('truncate', '-s', '16M', image);
      const device = (await runTool('losetup', '--find', '--show', image)).trim();
      await makeFileSystem('ext4', device);
      await runTool('mount', device, `${dead}/mnt`);

      const living = tempDir(parent.path);
      await attachLoop(living, sparseFile(living, 'b.img', MIB));
      expect(sweep(parent.path)).toEqual([dead]);
      expect(existsSync(dead)).toBe(false);
      expect(loopsBelow(dead)).toEqual([]);
      expect(loopsBelow(living.path)).toHaveLength(1);
      await living.remove();
    });
  },
);

const all: readonly FileSystem[] = ['xfs', 'btrfs', 'vfat', 'ntfs', 'swap'];
for (const type of all) {
  requires({ ...LOOP_NEEDS, tools: ['losetup', 'blkid', makerOf(type)] }).it(
    `makes ${type}`,
    async () => {
      await using dir = tempDir();
      const loop = await newLoop(dir, 'disk.img', 320 * MIB);
      await makeFileSystem(type, loop.device);
      const found = await runTool('blkid', '-p', '-o', 'value', '-s', 'TYPE', loop.device);
      expect(found.trim()).toBe(type);
    },
  );
}
