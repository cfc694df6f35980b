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
import { captureGroup } from '../support/group-points.js';
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

const sums = readFileSync(`${FIXTURE}sums`, 'utf8')
  .trim()
  .split('\n')
  .map((line): readonly [string, string] => {
    const [sum = '', path = ''] = line.split('  ');
    return [sum, path];
  });
/** Those of volumes: what lies on the first disk alone, too. */
const sumsOf = (...names: readonly string[]): readonly (readonly [string, string])[] =>
  sums.filter(([, path]) => names.includes(path.split('/')[0] ?? ''));
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
  let points: Readonly<Record<string, number>>;
  const at = (volume: string): readonly string[] => ['--at', `#${points[volume]}`];

  beforeAll(async () => {
    dir = tempDir();
    b2 = new B2(dir);
    tool('tar', ['-C', dir.path, '-xSzf', `${FIXTURE}disks.tar.gz`]);
    await b2.json(['init', '--encryption', 'none']);
    const now = systemClock.nowNs();
    const files = { a: dir.join('a'), b: dir.join('b') };
    points = await captureGroup(b2.repository, files, now - 60_000_000_000n);
    // Afterwards the second disk is written to alone.
    spoil(files.b, 1024 * 1024, 90 * 1024 * 1024);
    await captureGroup(b2.repository, { b: files.b }, now - 30_000_000_000n);
  });
  afterAll(() => dir.remove());

  it('linear and striped ones, from each of the disks, at that instant', async () => {
    for (const volume of ['a', 'b']) {
      for (const [sum, path] of sumsOf('linear', 'striped')) {
        const ended = await b2.run(
          'cat',
          `lab/${volume}:twovg/${path.replace('/', ':')}`,
          ...at(volume),
        );
        console.log(ended.stderr, ended.code);
        expect(sha256(Buffer.from(ended.stdout, 'utf8')), path).toBe(sum);
      }
    }
  });
});
