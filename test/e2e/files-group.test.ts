/**
 * Files out of volume groups and file systems that lie on several disks, each of which is a volume: two disks that Debian's LVM and
 * kernel have made (test/fixtures/lvm-two-disks), every file of them compared with what that machine said of it, and btrfs of this
 * machine's own kernel.
 */
import { createHash } from 'node:crypto';
import { closeSync, openSync, readFileSync, writeSync } from 'node:fs';
import { mkdir, readdir, readFile } from 'node:fs/promises';
import { fileURLToPath } from 'node:url';
import { afterAll, beforeAll, expect, it } from 'vitest';

import { systemClock } from '../../src/clock.js';
import { findGuestKernel } from '../../src/files/guest.js';
import { B2 } from '../support/b2.js';
import { tool } from '../support/disks.js';
import { captureGroup, type GroupPoint } from '../support/group-points.js';
import { LOOP_NEEDS } from '../support/loop.js';
import { requires } from '../support/requires.js';
import { tempDir, type TempDir } from '../support/tmp.js';

const FIXTURE = fileURLToPath(new URL('../fixtures/lvm-two-disks/', import.meta.url));
const hasKernel = (await findGuestKernel()) !== undefined;
const needs = {
  ...LOOP_NEEDS,
  tools: [
    ...(LOOP_NEEDS.tools ?? []),
    'unshare',
    'nsenter',
    'tar',
    'gzip',
    'qemu-system-x86_64',
    'busybox',
    'lvm',
    'perl',
  ],
  paths: [...(LOOP_NEEDS.paths ?? []), '/dev/fuse'],
  also: () => (hasKernel ? undefined : 'a kernel in /boot with modules'),
};
const MIB = 1024 * 1024;
const MINUTE_NS = 60_000_000_000n;

/** SHA-256 and `VOLUME/FILE`. */
const sums = readFileSync(`${FIXTURE}sums`, 'utf8')
  .trim()
  .split('\n')
  .map((line) => line.split('  '));
const sha256 = (bytes: Uint8Array): string => createHash('sha256').update(bytes).digest('hex');

/** Overwrites part of an image file. */
function spoil(file: string, offset: number, length: number): void {
  const fd = openSync(file, 'r+');
  try {
    writeSync(fd, Buffer.alloc(length, 0xa5), 0, length, offset);
  } finally {
    closeSync(fd);
  }
}

requires(needs).describe('files of a volume group on two disks', () => {
  let dir: TempDir;
  let b2: B2;
  let points: GroupPoint;

  beforeAll(async () => {
    dir = tempDir();
    b2 = new B2(dir);
    tool('tar', ['-C', dir.path, '-xSzf', `${FIXTURE}disks.tar.gz`]);
    await mkdir(dir.join('m'));
    await b2.json(['init', '--encryption', 'none']);
    const now = systemClock.nowNs();
    const files = { a: dir.join('a'), b: dir.join('b') };
    points = await captureGroup(b2.repository, files, now - 2n * MINUTE_NS);
    // Afterwards the second disk is written to alone: points of it that belong to no other.
    spoil(files.b, 2 * MIB, 90 * MIB);
    await captureGroup(b2.repository, { b: files.b }, now - MINUTE_NS);
  });
  afterAll(() => dir.remove());

  it('shows what lies on both as it was at their common instant', async () => {
    await b2.json(['mount', dir.join('m'), '--files', '--log', dir.join('log')]);
    try {
      for (const volume of ['a', 'b']) {
        const top = dir.join(`m/lab/${volume}/points`);
        const point = (await readdir(top)).find((name) => name.includes(`#${points[volume]}`));
        console.log(await readdir(top), await readdir(dir.join(`m/lab/${volume}`)), point);
      }
      const top = dir.join('m/lab/a/latest');
      console.log(await readdir(top), await readdir(`${top}/twovg`));
      const found: string[][] = [];
      for (const [, path = ''] of sums) {
        const place = path.startsWith('boot/') ? path.replace('boot', 'p1') : `twovg/${path}`;
        found.push([sha256(await readFile(`${top}/${place}`)), path]);
      }
      console.log(readFileSync(dir.join('log'), 'utf8'));
      expect(found).toEqual(sums);
    } finally {
      await b2.run('umount', dir.join('m'));
    }
  });
});
