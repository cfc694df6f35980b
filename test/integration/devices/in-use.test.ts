/** Targets that something uses: each with a reason a person understands. */
import { spawn } from 'node:child_process';
import { once } from 'node:events';
import { mkdirSync, statSync } from 'node:fs';

import { describe, expect } from 'vitest';

import { systemClock } from '../../../src/clock.js';
import { inUseReasons } from '../../../src/devices/in-use.js';
import { openWriteDevice } from '../../../src/devices/open.js';
import { addPartitions, DISK_NEEDS, imageFile, tool } from '../../support/disks.js';
import { attachLoop, mountDevice, newLoop } from '../../support/loop.js';
import { requires, type Needs } from '../../support/requires.js';
import { tempDir, type TempDir } from '../../support/tmp.js';

const MIB = 1024 * 1024;
const needs = requires(DISK_NEEDS);
const needsBtrfs: Needs = { ...DISK_NEEDS, tools: [...(DISK_NEEDS.tools ?? []), 'mkfs.btrfs'] };

async function texts(target: string, repositoryPath?: string): Promise<readonly string[]> {
  const reasons = await inUseReasons(
    target,
    repositoryPath === undefined ? {} : { repositoryPath },
  );
  return reasons.map((reason) => reason.text);
}

/** A loop disk with two partitions. */
async function disk(
  dir: TempDir,
): Promise<{ device: string; file: string; one: string; two: string }> {
  const { device, file } = await newLoop(dir, 'disk.img', 64 * MIB);
  tool('sfdisk', ['--quiet', '--no-reread', device], 'label: gpt\nsize=30MiB\nsize=30MiB\n');
  const [one = '', two = ''] = addPartitions(dir, device, 2);
  return { device, file, one, two };
}

describe('in use', () => {
  needs.it('nothing uses a device that nothing uses', async () => {
    await using dir = tempDir();
    const { device, one, two } = await disk(dir);
    for (const target of [device, one, two]) expect(await texts(target)).toEqual([]);
    expect(await texts(imageFile(dir, 'free.img', MIB))).toEqual([]);
    expect(await texts(dir.join('new.img'))).toEqual([]);
  });

  needs.it(
    'a mounted partition, its disk, and the file behind the disk; not its neighbour',
    async () => {
      await using dir = tempDir();
      const { device, file, one, two } = await disk(dir);
      tool('mkfs.ext4', ['-q', one]);
      const mount = await mountDevice(dir, one, 'a mount point');
      expect(await texts(one)).toEqual([`${one} is mounted on ${mount.path}`]);
      expect(await texts(device)).toEqual([`${one} is mounted on ${mount.path}`]);
      expect(await texts(two)).toEqual([]);
      expect(await texts(file)).toEqual([
        `${file} is attached as loop device ${device}`,
        `${one}, which lies in ${file}, is mounted on ${mount.path}`,
      ]);
      await expect(openWriteDevice(device, 'existing')).rejects.toMatchObject({ kind: 'refused' });
      await expect(openWriteDevice(one, 'existing')).rejects.toMatchObject({ kind: 'refused' });
      await mount.unmount();
      expect(await texts(device)).toEqual([]);
    },
  );

  needs.it('a device under a loop device that is mounted', async () => {
    await using dir = tempDir();
    const { device, one } = await disk(dir);
    const upper = await attachLoop(dir, one);
    tool('mkfs.ext4', ['-q', upper.device]);
    const mount = await mountDevice(dir, upper.device, 'm');
    const found = await texts(device);
    expect(found).toContain(`${one} is attached as loop device ${upper.device}`);
    expect(found).toContain(`${upper.device}, which lies on ${one}, is mounted on ${mount.path}`);
  });

  needs.it('a mount that only another mount namespace sees, by the kernel refusing', async () => {
    await using dir = tempDir();
    const { device } = await newLoop(dir, 'disk.img', 16 * MIB);
    tool('mkfs.ext4', ['-q', device]);
    mkdirSync(dir.join('m'));
    const child = spawn(
      'unshare',
      [
        '--mount',
        '--propagation',
        // The mounts of tests beside this one go from the copy when they go.
        'slave',
        'sh',
        '-c',
        `mount ${device} ${dir.join('m')} && echo mounted && read line`,
      ],
      {
        stdio: ['pipe', 'pipe', 'inherit'],
      },
    );
    const ended = once(child, 'exit');
    try {
      await once(child.stdout, 'data');
      expect(await inUseReasons(device)).toEqual([
        {
          kind: 'busy',
          text: expect.stringContaining(
            `${device} is held exclusively by something that is not visible from here`,
          ) as string,
        },
      ]);
    } finally {
      child.stdin.end('\n');
      await ended;
    }
    expect(await texts(device)).toEqual([]);
  });

  needs.it('swap', async () => {
    await using dir = tempDir();
    const { device, one } = await disk(dir);
    tool('mkswap', [one]);
    tool('swapon', [one]);
    try {
      expect(await texts(device)).toEqual([`${one} is in use as swap`]);
    } finally {
      tool('swapoff', [one]);
    }
    expect(await texts(device)).toEqual([]);
  });

  requires(needsBtrfs).it('every device of a mounted btrfs file system', async () => {
    await using dir = tempDir();
    const first = await newLoop(dir, 'a.img', 128 * MIB);
    const second = await newLoop(dir, 'b.img', 128 * MIB);
    dir.onRemove(() => void tool('btrfs', ['device', 'scan', '--forget']));
    tool('mkfs.btrfs', ['-q', '-d', 'single', first.device, second.device]);
    const mount = await mountDevice(dir, first.device, 'm');
    expect(await texts(first.device)).toEqual([`${first.device} is mounted on ${mount.path}`]);
    expect(await texts(second.device)).toEqual([
      `${second.device} is mounted on ${mount.path} (as one device of a btrfs file system)`,
    ]);
  });

  needs.it('a process that has it open for writing, but not one that reads', async () => {
    await using dir = tempDir();
    const file = imageFile(dir, 'vm.img', MIB);
    for (const [redirection, expected] of [
      [
        '<>',
        [
          expect.stringMatching(
            new RegExp(`^${file} is open for writing in sh \\(process \\d+\\)$`),
          ) as string,
        ],
      ],
      ['<', []],
    ] as const) {
      const child = spawn(
        'sh',
        ['-c', `exec 5${redirection}"$1"; echo open; read line`, 'sh', file],
        { stdio: ['pipe', 'pipe', 'inherit'] },
      );
      const ended = once(child, 'exit');
      try {
        await once(child.stdout, 'data');
        expect(await texts(file)).toEqual(expected);
      } finally {
        child.stdin.end('\n');
        await ended;
      }
    }
  });

  needs.it('who only passes by uses nothing: looked at again before it counts', async () => {
    await using dir = tempDir();
    const file = imageFile(dir, 'vm.img', MIB);
    const child = spawn('sh', ['-c', 'exec 5<>"$1"; echo open; read line', 'sh', file], {
      stdio: ['pipe', 'pipe', 'inherit'],
    });
    const ended = once(child, 'exit');
    let looks = 0;
    try {
      await once(child.stdout, 'data');
      const sleep = async (): Promise<void> => {
        looks += 1;
        if (looks < 3) return;
        child.stdin.end('\n');
        await ended;
      };
      expect(await inUseReasons(file, { clock: { ...systemClock, sleep } })).toEqual([]);
      expect(looks).toBe(3);
    } finally {
      child.stdin.end('\n');
      await ended;
    }
  });

  needs.it('the device and the file that hold the repository', async () => {
    await using dir = tempDir();
    const { device, file, one, two } = await disk(dir);
    tool('mkfs.ext4', ['-q', one]);
    const mount = await mountDevice(dir, one, 'm');
    const repository = `${mount.path}/repo`;
    mkdirSync(repository);
    for (const target of [device, one, file])
      expect(await texts(target, repository)).toContain(
        `${target} holds the repository ${repository}`,
      );
    expect(await texts(two, repository)).toEqual([]);
    expect(await texts(`${repository}/packs.img`, repository)).toEqual([
      `${repository}/packs.img lies inside the repository ${repository}`,
    ]);
    expect(statSync(repository).isDirectory()).toBe(true);
  });
});
