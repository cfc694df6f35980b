/**
 * Files out of volume groups and file systems that lie on several disks, each of which is a volume: two disks that Debian's LVM and
 * kernel have made (test/fixtures/lvm-two-disks), every file of them compared with what that machine said of it, and btrfs of this
 * machine's own kernel.
 */
import { createHash } from 'node:crypto';
import { closeSync, existsSync, openSync, readFileSync, writeSync } from 'node:fs';
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
/** RAID and thin volumes, too, for which a virtual machine is started: a minute more. */
const FULL = process.env['B2_TEST_GROUP_FULL'] === '1';
const hasKernel = (await findGuestKernel()) !== undefined;
const needs = {
  ...LOOP_NEEDS,
  tools: [
    ...(LOOP_NEEDS.tools ?? []),
    'unshare',
    'nsenter',
    'tar',
    'gzip',
    ...(FULL ? ['qemu-system-x86_64', 'busybox', 'lvm', 'perl'] : []),
  ],
  paths: [...(LOOP_NEEDS.paths ?? []), '/dev/fuse'],
  also: () => (hasKernel || !FULL ? undefined : 'a kernel in /boot with modules'),
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

  beforeAll(async () => {
    dir = tempDir();
    b2 = new B2(dir);
    tool('tar', ['-C', dir.path, '-xSzf', `${FIXTURE}disks.tar.gz`]);
    await mkdir(dir.join('m'));
    await b2.json(['init', '--encryption', 'none']);
    const now = systemClock.nowNs();
    const files = { a: dir.join('a'), b: dir.join('b') };
    const points = await captureGroup(b2.repository, files, now - 2n * MINUTE_NS, 'together');
    expect(Object.keys(points)).toEqual(['a', 'b']);
    // Afterwards the second disk is written to alone: a point of it that belongs to no other. Its metadata stays.
    spoil(files.b, 2 * MIB, 90 * MIB);
    await captureGroup(b2.repository, { b: files.b }, now - MINUTE_NS);
  });
  afterAll(() => dir.remove());

  it('shows what lies on both as it was at their common instant, seen from either', async () => {
    const log = dir.join('log');
    await b2.json(['mount', dir.join('m'), '--files', '--log', log]);
    try {
      // The names of volumes that only LVM can read need a machine; plain ones are reached without.
      const plain = /^(home|linear|striped)\//;
      const wanted = sums.filter(([, path = '']) => FULL || plain.test(path));
      expect(wanted.length).toBeGreaterThan(8);
      for (const top of [dir.join('m/lab/a/latest'), dir.join('m/lab/b/snapshots/together')]) {
        expect(await readdir(top)).toContain('twovg');
        const found: string[][] = [];
        for (const [, path = ''] of wanted) {
          const place = path.startsWith('boot/')
            ? `${dir.join('m/lab/a/latest/p1')}${path.slice(4)}`
            : `${top}/twovg/${path}`;
          found.push([sha256(await readFile(place)), path]);
        }
        expect(found).toEqual(wanted);
      }
      if (FULL)
        expect((await readdir(dir.join('m/lab/a/latest/twovg'))).sort()).toEqual(
          'home linear raid1 striped thin'.split(' '),
        );
      // The newest point of the second disk has no counterpart: the one that there is is of another instant.
      expect(existsSync(dir.join('m/lab/b/latest/twovg/linear'))).toBe(false);
      expect(readFileSync(log, 'utf8')).toContain('lab/a has no point of that instant');
    } finally {
      await b2.run('umount', dir.join('m'));
    }
  });

  it('b2 cat reads one of them, and says together with what', async () => {
    const [wanted = ''] = sums.find(([, path]) => path === 'striped/late') ?? [];
    const ended = await b2.run('cat', 'lab/a:twovg/striped:/late');
    expect([ended.code, sha256(Buffer.from(ended.stdout))]).toEqual([0, wanted]);
    expect(ended.stderr).toContain('read together with lab/b, at the same instant');
  });

  it('takes the newest point that both have where a time was meant, and none for another that was named', async () => {
    const [wanted = ''] = sums.find(([, path]) => path === 'striped/late') ?? [];
    const ended = await b2.run('cat', 'lab/b:twovg/striped:/late');
    expect([ended.code, sha256(Buffer.from(ended.stdout))]).toEqual([0, wanted]);
    expect(ended.stderr).toContain('what lies on several disks is read from point #1, ');
    // LVM itself is asked for the rest of that group.
    if (!FULL) return;
    const named = await b2.run('cat', 'lab/b:twovg/striped:/late', '--at', '#2');
    expect([named.code, named.stdout]).toEqual([4, '']);
    expect(named.stderr).toContain('lab/a has no point of that instant');
  });

  const full = FULL ? it : undefined;
  full?.('b2 verify --fsck checks each of them once for both', async () => {
    interface Verified {
      readonly restoreTests: readonly {
        readonly volume: string;
        readonly fileSystems: readonly {
          readonly name: string;
          readonly state: string;
          readonly how: string;
        }[];
      }[];
    }
    const { restoreTests } = await b2.json<Verified>(['verify', '--fsck', '--at', 'together']);
    const both = 'home linear striped raid1 thin'.split(' ').map((name) => `twovg/${name}`);
    for (const [volume, names] of [
      ['lab/a', ['p1', ...both]],
      ['lab/b', both],
    ] as const) {
      const found = restoreTests.find((t) => t.volume === volume)?.fileSystems ?? [];
      expect(found.map((f) => f.name)).toEqual(names);
      for (const { state, how } of found) {
        expect(state).toBe('sound');
        expect(how).toMatch(/^mounted, journal replayed, e2fsck -fn/);
        expect(how.includes('once for all volumes')).toBe(volume === 'lab/b');
      }
    }
  });

  full?.('says that one side of a mirror is all that was read', async () => {
    await captureGroup(b2.repository, { a: dir.join('a') }, systemClock.nowNs());
    const ended = await b2.run('ls', 'lab/a:twovg/raid1:/', '--at', '#2');
    expect([ended.code, ended.stdout]).toEqual([0, expect.stringContaining('numbers')]);
    expect(ended.stderr).toMatch(/warning: twovg\/raid1: its volume group is not all here/);
  });
});
