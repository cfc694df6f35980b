/** What restore refuses, with the exact codes and words, and that nothing was changed then. */
import { spawn } from 'node:child_process';
import { mkdirSync, writeFileSync } from 'node:fs';
import { afterEach, describe, expect, it } from 'vitest';
import type { RestoreAnswer } from '../../src/commands/run/restore.js';
import { B2 } from '../support/b2.js';
import { DISK_NEEDS, addPartitions, noise, pokeWithDd, tool } from '../support/disks.js';
import { attachLoop, makeFileSystem, mountDevice, newLoop, sparseFile } from '../support/loop.js';
import { requires } from '../support/requires.js';
import { cmp, copySparse } from '../support/source.js';
import { tempDir, type TempDir } from '../support/tmp.js';

const MIB = 1024 * 1024;
const SIZE = 8 * MIB;
const dirs: TempDir[] = [];
afterEach(async () => {
  for (const dir of dirs.splice(0)) await dir.remove();
});

/** A repository with a volume "v" of 8 MiB. */
async function made(
  where?: (dir: TempDir) => Promise<string>,
): Promise<{ dir: TempDir; b2: B2; image: string }> {
  const dir = tempDir();
  dirs.push(dir);
  const b2 = new B2(dir, {}, await where?.(dir));
  await b2.json(['init', '--encryption', 'none']);
  const image = sparseFile(dir, 'image', SIZE);
  pokeWithDd(image, MIB, noise(1, 100_000));
  await b2.json(['snapshot', image, '--volume', 'v']);
  return { dir, b2, image };
}

/** Refused also with --force, told by --plan, and the target's bytes (in `file`) are as before. */
async function expectObstacle(
  b2: B2,
  dir: TempDir,
  target: string,
  file: string,
  reason: string,
): Promise<void> {
  copySparse(file, dir.join('as-before'));
  for (const extra of [[], ['--force'], ['--force', '--full']]) {
    expect(await b2.error(['restore', 'v', target, ...extra])).toEqual({
      type: 'error',
      code: 1,
      message: `will not restore to ${target}: ${reason}`,
      hint: 'Unmount or stop what uses it, or choose another target. --force does not override this.',
    });
  }
  const { plan } = await b2.json<RestoreAnswer>(['restore', 'v', target, '--plan']);
  expect(plan?.obstacles).toEqual(reason.split('; '));
  cmp(file, dir.join('as-before'));
}

requires({ ...DISK_NEEDS, tools: [...(DISK_NEEDS.tools ?? []), 'cmp'] }).describe(
  'restore refuses',
  () => {
    it('a mounted device, and a disk with a mounted partition', async () => {
      const { dir, b2 } = await made();
      const loop = await newLoop(dir, 'disk', 32 * MIB);
      await makeFileSystem('ext4', loop.device);
      const mount = await mountDevice(dir, loop.device, 'mnt');
      await expectObstacle(
        b2,
        dir,
        loop.device,
        loop.file,
        `${loop.device} is mounted on ${mount.path}`,
      );
      await expectObstacle(
        b2,
        dir,
        loop.file,
        loop.file,
        `${loop.file} is attached as loop device ${loop.device}; ${loop.device}, which lies in ${loop.file}, is mounted on ${mount.path}`,
      );

      const disk = await newLoop(dir, 'disk2', 48 * MIB);
      tool('sfdisk', ['--quiet', disk.device], 'label: gpt\nsize=32MiB\n');
      const [part = ''] = addPartitions(dir, disk.device, 1);
      await makeFileSystem('ext4', part);
      const mount2 = await mountDevice(dir, part, 'mnt2');
      await expectObstacle(b2, dir, disk.device, disk.file, `${part} is mounted on ${mount2.path}`);
      await mount.unmount();
      await mount2.unmount();
      await b2.json(['restore', 'v', loop.device, '--force']);
    });

    it('active swap', async () => {
      const { dir, b2 } = await made();
      const loop = await newLoop(dir, 'swap', 32 * MIB);
      await makeFileSystem('swap', loop.device);
      tool('swapon', [loop.device]);
      let isOn = true;
      const off = (): void => {
        if (isOn) tool('swapoff', [loop.device]);
        isOn = false;
      };
      dir.onRemove(off);
      await expectObstacle(b2, dir, loop.device, loop.file, `${loop.device} is in use as swap`);
      off();
      expect((await b2.error(['restore', 'v', loop.device])).message).toBe(
        `will not restore to ${loop.device}: it holds swap space`,
      );
    });

    it('a device that is too small, naming both sizes', async () => {
      const { dir, b2 } = await made();
      const loop = await newLoop(dir, 'small', SIZE - 4096);
      await expectObstacle(
        b2,
        dir,
        loop.device,
        loop.file,
        `${loop.device} is too small: it has 8.0 MiB (8384512 bytes), the image needs 8.0 MiB (8388608 bytes), 4.0 KiB (4096 bytes) more`,
      );
    });

    it('a device that a process has open for writing', async () => {
      const { dir, b2 } = await made();
      const loop = await newLoop(dir, 'disk', 2 * SIZE);
      const child = spawn('sh', ['-c', 'exec 3<>"$0"; echo open; exec sleep 300', loop.device], {
        stdio: ['ignore', 'pipe', 'ignore'],
      });
      const ended = new Promise((resolve) => child.once('exit', resolve));
      try {
        await new Promise((resolve) => child.stdout.once('data', resolve));
        await expectObstacle(
          b2,
          dir,
          loop.device,
          loop.file,
          `${loop.device} is open for writing in sleep (process ${child.pid})`,
        );
      } finally {
        child.kill('SIGKILL');
        await ended;
      }
    });

    it('what holds the repository', async () => {
      const { dir, b2 } = await made(async (d) => {
        const loop = await newLoop(d, 'store', 64 * MIB);
        await makeFileSystem('ext4', loop.device);
        const mount = await mountDevice(d, loop.device, 'store-mnt');
        return `${mount.path}/repo`;
      });
      const file = dir.join('store');
      const device = tool('losetup', ['-n', '-O', 'NAME', '-j', file]).trim();
      const inside = await b2.error(['restore', 'v', `${b2.repository}/config`, '--force']);
      expect(inside.code).toBe(1);
      expect(inside.message).toMatch(/lies inside the repository/);
      expect((await b2.error(['restore', 'v', `${b2.repository}/new.img`])).message).toBe(
        `will not restore to ${b2.repository}/new.img: ${b2.repository}/new.img lies inside the repository ${b2.repository}`,
      );
      for (const target of [device, file]) {
        const error = await b2.error(['restore', 'v', target, '--force', '--full']);
        expect(error.code).toBe(1);
        expect(error.message).toContain(`${target} holds the repository ${b2.repository}`);
      }
      expect((await b2.run('points', 'v')).code).toBe(0);
    });

    it('what holds something, without --force', async () => {
      const { dir, b2, image } = await made();
      const loop = await newLoop(dir, 'disk', 2 * SIZE);
      const refusal = async (holds: string | RegExp): Promise<void> => {
        const error = await b2.error(['restore', 'v', loop.device]);
        expect(error).toMatchObject({
          code: 1,
          hint: 'If that may be overwritten, repeat the command with --force ("--plan" shows what would change).',
        });
        expect(error.message).toMatch(holds);
        const { plan } = await b2.json<RestoreAnswer>(['restore', 'v', loop.device, '--plan']);
        expect(plan?.contents.join(', ')).toMatch(holds);
      };
      await makeFileSystem('ext4', loop.device);
      await refusal(/an ext4 file system/);
      tool('wipefs', ['--all', '--quiet', loop.device]);
      tool('sfdisk', ['--quiet', loop.device], 'label: gpt\nsize=4MiB\n');
      await refusal(/partition table/);
      tool('blkdiscard', [loop.device]);
      pokeWithDd(loop.device, 0, noise(1, 4096));
      await refusal(/unknown data at the beginning/);
      tool('blkdiscard', [loop.device]);
      await b2.json(['restore', 'v', loop.device]);
      cmp(loop.device, image, SIZE);
    });

    it('a read-only device, a directory, a device that is not there', async () => {
      const { dir, b2 } = await made();
      const loop = await attachLoop(dir, sparseFile(dir, 'ro', 2 * SIZE), { readOnly: true });
      await expectObstacle(b2, dir, loop.device, loop.file, `${loop.device} is read-only`);
      mkdirSync(dir.join('directory'));
      expect(await b2.error(['restore', 'v', dir.join('directory'), '--force'])).toMatchObject({
        code: 1,
        message: expect.stringContaining('directory'),
      });
      expect(await b2.error(['restore', 'v', '/dev/no-such-disk', '--force'])).toMatchObject({
        message: expect.stringContaining('/dev/no-such-disk'),
      });
    });
  },
);

describe('restore to a file refuses', () => {
  it('one that is there, and leaves it as it was', async () => {
    const { dir, b2 } = await made();
    const old = dir.join('old');
    writeFileSync(old, noise(1, 12_345));
    copySparse(old, dir.join('as-before'));
    const error = await b2.error(['restore', 'v', old]);
    expect(error.code).toBe(1);
    expect(error.message).toMatch(
      /^will not restore to .*: it holds a file of 12\.1 KiB \(12345 bytes\)/,
    );
    cmp(old, dir.join('as-before'));
    expect(await b2.error(['restore', 'v', dir.join('no', 'where.img')])).toMatchObject({
      code: 1,
      message: `there is no directory ${dir.join('no')} for the image file where.img`,
    });
    const qcow2 = await b2.error(['restore', 'v', old, '--format', 'qcow2']);
    expect(qcow2.code).toBe(1);
    cmp(old, dir.join('as-before'));
  });
});
