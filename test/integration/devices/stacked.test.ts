/**
 * Device mapper and MD over disks. A test machine's kernel may have neither, so the kernel's tables are fixtures
 * here; the node is a loop device's, whose number they use.
 */
import { mkdirSync, statSync, symlinkSync, writeFileSync } from 'node:fs';
import { basename, dirname, join } from 'node:path';

import { describe, expect } from 'vitest';

import { inUseReasons } from '../../../src/devices/in-use.js';
import { blockInfo, type SystemRoots } from '../../../src/devices/sysfs.js';
import { DISK_NEEDS } from '../../support/disks.js';
import { newLoop } from '../../support/loop.js';
import { requires } from '../../support/requires.js';
import { tempDir, type TempDir } from '../../support/tmp.js';

interface Fixture {
  readonly name: string;
  readonly dev: string;
  readonly disk?: string;
  readonly holders?: readonly string[];
  readonly slaves?: readonly string[];
  readonly files?: Readonly<Record<string, string>>;
}

function world(
  dir: TempDir,
  devices: readonly Fixture[],
  mountinfo: string,
  swaps: string,
): SystemRoots {
  const roots = { sys: dir.join('sys'), proc: dir.join('proc'), dev: '/dev' };
  const put = (file: string, text: string): void => {
    mkdirSync(dirname(file), { recursive: true });
    writeFileSync(file, text);
  };
  put(join(roots.proc, 'self/mountinfo'), mountinfo);
  put(join(roots.proc, 'swaps'), `Filename Type Size Used Priority\n${swaps}`);
  mkdirSync(join(roots.sys, 'class/block'), { recursive: true });
  mkdirSync(join(roots.sys, 'dev/block'), { recursive: true });
  for (const device of devices) {
    const own = join(
      roots.sys,
      'devices/block',
      ...(device.disk === undefined ? [] : [device.disk]),
      device.name,
    );
    put(join(own, 'dev'), `${device.dev}\n`);
    put(join(own, 'size'), '2048\n');
    put(join(own, 'ro'), '0\n');
    if (device.disk === undefined) {
      put(join(own, 'queue/logical_block_size'), '4096\n');
      put(join(own, 'diskseq'), '17\n');
    } else {
      put(join(own, 'partition'), '2\n');
      put(join(own, 'start'), '63\n');
    }
    for (const [name, text] of Object.entries(device.files ?? {})) put(join(own, name), text);
    for (const kind of ['holders', 'slaves'] as const)
      for (const other of device[kind] ?? []) put(join(own, kind, other), '');
    symlinkSync(own, join(roots.sys, 'class/block', device.name));
    symlinkSync(own, join(roots.sys, 'dev/block', device.dev));
  }
  return roots;
}

function numbers(node: string): string {
  const { rdev } = statSync(node);
  return `${rdev >> 8}:${rdev & 0xff}`;
}

describe('stacked devices', () => {
  requires(DISK_NEEDS).it(
    'names the whole chain: LVM on MD on a partition; swap on it; the repository on it',
    async () => {
      await using dir = tempDir();
      const { device: node } = await newLoop(dir, 'disk.img', 1024 * 1024);
      const disk = basename(node);
      const roots = world(
        dir,
        [
          { name: disk, dev: numbers(node) },
          { name: `${disk}p2`, dev: '259:900', disk, holders: ['md0'] },
          { name: 'md0', dev: '9:0', holders: ['dm-0', 'dm-1'], slaves: [`${disk}p2`] },
          {
            name: 'dm-0',
            dev: '253:0',
            slaves: ['md0'],
            files: { 'dm/name': 'vg-root\n', 'dm/uuid': 'LVM-abc\n' },
          },
          { name: 'dm-1', dev: '253:1', slaves: ['md0'], files: { 'dm/name': 'vg-data\n' } },
        ],
        `1 0 253:0 / /srv\\040data rw - ext4 /dev/mapper/vg-root rw\n2 0 8:77 / /other rw - ext4 /dev/sdz rw\n`,
        '',
      );
      expect((await inUseReasons(node, { roots })).map((reason) => reason.text)).toEqual([
        `/dev/${disk}p2 is part of /dev/md0`,
        `/dev/md0, which lies on /dev/${disk}p2, is part of /dev/mapper/vg-root`,
        `/dev/md0, which lies on /dev/${disk}p2, is part of /dev/mapper/vg-data`,
        '/dev/mapper/vg-root, which lies on /dev/md0, is mounted on /srv data',
      ]);
      expect(await blockInfo(`${disk}p2`, roots)).toMatchObject({
        partition: { number: 2, diskName: disk, offsetBytes: 63 * 512 },
        sizeBytes: 1024 * 1024,
        logicalBlockBytes: 4096,
        diskSequence: 17n,
      });
      expect((await blockInfo('dm-0', roots)).identity).toEqual({
        dmName: 'vg-root',
        dmUuid: 'LVM-abc',
      });
      await expect(blockInfo('sdq', roots)).rejects.toMatchObject({ kind: 'not-found' });
    },
  );
});
