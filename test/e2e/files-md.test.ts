/**
 * Files out of disks that are members of MD arrays, by the built program: what Debian's mdadm has made (test/fixtures/md) is captured as
 * it is, and looked into with every command that shows files. B2_E2E_FULL=1 also reads a thin volume, in the tiny virtual machine.
 */
import { createHash } from 'node:crypto';
import { existsSync, mkdirSync, readFileSync, writeFileSync } from 'node:fs';
import { afterAll, beforeAll, expect, it } from 'vitest';

import { B2 } from '../support/b2.js';
import { tool } from '../support/disks.js';
import { LOOP_NEEDS } from '../support/loop.js';
import { MD_TOOLS, memberSums, unpackMembers } from '../support/md.js';
import { requires } from '../support/requires.js';
import { mountsBelow, tempDir, type TempDir } from '../support/tmp.js';

const needs = {
  ...LOOP_NEEDS,
  tools: [...(LOOP_NEEDS.tools ?? []), ...MD_TOOLS, 'unshare', 'nsenter', 'e2fsck'],
  paths: [...(LOOP_NEEDS.paths ?? []), '/dev/fuse'],
};
const FULL = process.env['B2_E2E_FULL'] === '1';
/** Where mdadm has put the data of a small member with metadata 1.2, and how long the array is. */
const DATA = { offset: 1024 * 1024, bytes: 9 * 1024 * 1024 };

const sha256 = (bytes: Uint8Array): string => createHash('sha256').update(bytes).digest('hex');
const sumOf = (label: string, path: string): string | undefined =>
  memberSums().find(([, l, p]) => l === label && p === path)?.[0];

interface Listed {
  readonly fileSystems: readonly {
    readonly name: string;
    readonly arrays?: readonly {
      readonly level: string;
      readonly version: string;
      readonly role: number;
    }[];
  }[];
  readonly entries?: readonly { readonly path: string }[];
}
interface Verified {
  readonly restoreTests: readonly {
    readonly fileSystems?: readonly {
      readonly name: string;
      readonly type: string;
      readonly state: string;
      readonly how?: string;
      readonly message?: string;
    }[];
  }[];
}

requires(needs).describe('files out of members of MD arrays', () => {
  let dir: TempDir;
  let b2: B2;
  const member = (name: string): string => dir.join(`members/${name}`);

  beforeAll(async () => {
    dir = tempDir();
    b2 = new B2(dir);
    for (const name of ['members', 'm', 'array']) mkdirSync(dir.join(name));
    unpackMembers(dir.join('members'));
    await b2.json(['init', '--encryption', 'none']);
  });
  afterAll(() => dir.remove());

  it('a server with /boot and LVM on arrays: its files are there as they were', async () => {
    await b2.json(['snapshot', member('server'), '--volume', 'web1/sda']);
    const listed = await b2.json<Listed>(['ls', 'web1/sda:p1:/']);
    expect(listed.entries?.map((e) => e.path)).toEqual([
      '/late',
      '/lost+found',
      '/numbers',
      '/random',
    ]);
    expect(
      listed.fileSystems.map((f) => [f.name, f.arrays?.map((a) => `${a.level} ${a.version}`)]),
    ).toEqual([
      ['p1', ['raid1 1.0']],
      ['mdvg/root', ['raid1 1.2']],
      ['mdvg/inner', ['raid1 1.2', 'raid1 1.0']],
    ]);
    const cat = await b2.run('cat', 'web1/sda:mdvg/root:/numbers');
    expect(sha256(Buffer.from(cat.stdout))).toBe(sumOf('root', '/numbers'));
    expect(cat.stderr).toMatch(
      /mdvg\/root: read from one member of the RAID 1 array "lab:pv" \(MD 1\.2, 2/,
    );

    const log = dir.join('log');
    await b2.json(['mount', dir.join('m'), '--volume', 'web1/sda', '--files', '--log', log]);
    try {
      const top = dir.join('m/latest');
      for (const [path, label] of [
        ['p1', 'boot'],
        ['mdvg/root', 'root'],
        ['mdvg/inner', 'inner'],
        ...(FULL ? [['mdvg/thin', 'thin'] as const] : []),
      ] as const)
        for (const file of ['/late', '/numbers', '/random'])
          expect([path, file, sha256(readFileSync(`${top}/${path}${file}`))]).toEqual([
            path,
            file,
            sumOf(label, file),
          ]);
      // The member itself, and the whole disk, are there as before.
      expect(existsSync(`${top}/p2.img`)).toBe(true);
      expect(existsSync(`${top}/p2`)).toBe(false);
    } finally {
      await b2.run('umount', dir.join('m'));
    }
    expect(mountsBelow(dir.path)).toEqual([]);
    const said = readFileSync(log, 'utf8');
    expect(said).toMatch(/p1: read from one member of the RAID 1 array/);
    expect(said).toMatch(
      /"warning".*mdvg\/inner: .*; the array knew 1 of its 2 members to be missing/,
    );
  });

  it('history, diff, restore and fsck see through the array', async () => {
    const disk = member('r1-12');
    await b2.json(['snapshot', disk, '--volume', 'web1/sdb']);
    const where = `loop,offset=${DATA.offset},sizelimit=${DATA.bytes}`;
    tool('mount', ['-o', where, disk, dir.join('array')]);
    try {
      writeFileSync(dir.join('array/late'), 'changed\n');
    } finally {
      tool('umount', [dir.join('array')]);
    }
    await b2.json(['snapshot', disk, '--volume', 'web1/sdb']);
    const history = await b2.json<{ readonly versions: readonly { readonly sha256?: string }[] }>([
      'history',
      'web1/sdb:/late',
    ]);
    expect(history.versions.map((v) => v.sha256)).toEqual(
      ['changed\n', 'fsynced\n'].map((text) => sha256(Buffer.from(text))),
    );
    const diff = await b2.json<{
      readonly changes: readonly { readonly change: string; readonly path: string }[];
    }>(['diff', 'web1/sdb', '--from', '#1', '--to', '#2']);
    expect(diff.changes.map((c) => c.path)).toContain('/late');
    expect(diff.changes.map((c) => c.path)).not.toContain('/numbers');
    await b2.json(['restore', 'web1/sdb', dir.join('out'), '--path', '/', '--at', '#1']);
    for (const file of ['late', 'numbers', 'random'])
      expect(sha256(readFileSync(dir.join(`out/${file}`)))).toBe(sumOf('r1-12', `/${file}`));
    const { restoreTests } = await b2.json<Verified>(['verify', 'web1/sdb', '--fsck']);
    expect(restoreTests[0]?.fileSystems).toEqual([
      {
        name: 'disk',
        type: 'ext4',
        state: 'sound',
        how: expect.stringMatching(
          /^mounted, journal replayed, e2fsck -fn; read from one member of the RAID 1 array "lab:r1-12"/,
        ) as unknown,
      },
    ]);
  });

  it('of a member that does not hold all, nothing is shown, and why is said', async () => {
    // An ext4 begins where the member does.
    await b2.json(['snapshot', member('r5-10'), '--volume', 'web1/sdc']);
    const listed = await b2.run('ls', 'web1/sdc');
    expect(listed.code).toBe(4);
    expect(listed.stdout).toBe('');
    expect(listed.stderr).toMatch(
      /disk: it is a member of a RAID 5 array "lab:r5-10" \(MD 1\.0, 3 disks, UUID \S+\) and is not shown: one of the 3 members/,
    );
    expect(listed.stderr).toContain('no file system was found (disk: linux_raid_member)');
    const { restoreTests } = await b2.json<Verified>(['verify', 'web1/sdc', '--fsck']);
    expect(restoreTests[0]?.fileSystems).toMatchObject([
      { name: 'disk', state: 'unchecked', message: expect.stringContaining('RAID 5') as unknown },
    ]);
  });
});
