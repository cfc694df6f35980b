/**
 * Members of arrays that Debian's mdadm and kernel have made: what one of them tells of its array is what mdadm says, what it holds all
 * of is shown, every file as it was, and of everything else nothing is.
 */
import { createHash } from 'node:crypto';
import { mkdirSync } from 'node:fs';
import { afterAll, beforeAll, expect, it } from 'vitest';

import { systemClock } from '../../../src/clock.js';
import type { B2Event } from '../../../src/events.js';
import { openFileAccess } from '../../../src/files/access.js';
import { findAreas, isForLvm, whyNotShown, type FoundArea } from '../../../src/files/layout.js';
import { readMdMember } from '../../../src/files/md.js';
import { FileImage } from '../../support/image-memory.js';
import { LOOP_NEEDS } from '../../support/loop.js';
import {
  diskOfMembers,
  MD_TOOLS,
  memberFacts,
  memberSums,
  unpackMembers,
} from '../../support/md.js';
import { requires } from '../../support/requires.js';
import { tempDir, type TempDir } from '../../support/tmp.js';

const needs = {
  ...LOOP_NEEDS,
  tools: [...(LOOP_NEEDS.tools ?? []), ...MD_TOOLS, 'unshare', 'nsenter'],
  paths: [...(LOOP_NEEDS.paths ?? []), '/dev/fuse'],
};

/** Of which nothing is shown, and the reason. */
const NAMED: Readonly<Record<string, RegExp>> = {
  bad: /RAID 1 array "lab:bad" .*: it has bad blocks, .* \(2 in its list, 12\.0 KiB, the first at sector 8192\)$/,
  ddf: /BIOS RAID in the format of SNIA \(DDF\)/,
  imsm: /BIOS RAID in the format of Intel \(IMSM\)/,
  journal: /it is the journal of the array$/,
  'linear-two': /one of the 2 members of a linear array holds only/,
  'r0-10': /one of the 2 members of a RAID 0 holds only/,
  'r0-12': /one of the 2 members of a RAID 0 holds only/,
  'r10-far': /one of the 2 members of a RAID 10 holds only/,
  'r5-090': /one of the 3 members of a RAID 5 holds only/,
  'r5-10': /one of the 3 members of a RAID 5 holds only/,
  'r5-12': /one of the 3 members of a RAID 5 holds only/,
  r6: /one of the 4 members of a RAID 6 holds only/,
  rebuild: /it was still being rebuilt \([\d.]+ [KM]?i?B of 29\.0 MiB were done\)$/,
  'rebuild-090': /it is a spare, or was still being rebuilt/,
  replacement: /it was being made the replacement of another member/,
  reshape: /the array was being reshaped/,
  'resync-second': /it was being brought into step with the first member/,
  spare: /it is a spare: /,
  'spare-090': /it is a spare, or /,
};
/** What is shown of them: names in the disk, file systems by their labels. */
const SHOWN = [
  'degraded',
  'degraded-090',
  'linear-one',
  'not-bad',
  'parts-10',
  'parts-12',
  'r0-one',
  'r1-090',
  'r1-10',
  'r1-11',
  'r1-12',
  'r1-second',
  'r10-near',
  'rebuild-source',
  'server',
  'stale',
];

requires(needs).describe('members of arrays that mdadm has made', () => {
  let dir: TempDir;
  let members: string;
  let names: readonly string[];
  const areasOf = async (path: string): Promise<readonly FoundArea[]> => {
    const image = new FileImage(path);
    try {
      return await findAreas(image, path);
    } finally {
      await image.close();
    }
  };

  beforeAll(() => {
    dir = tempDir();
    members = dir.join('members');
    mkdirSync(members);
    names = unpackMembers(members);
  });
  afterAll(() => dir.remove());

  it('are shown, or named with the reason', async () => {
    // Of an array that is just being made there is nothing to show, but nothing against it either.
    expect([...Object.keys(NAMED), ...SHOWN, 'resync-first'].sort()).toEqual(names);
    for (const [name, reason] of Object.entries(NAMED)) {
      const areas = await areasOf(`${members}/${name}`);
      expect([name, areas.map((a) => a.holds)]).toEqual([name, ['none']]);
      expect(whyNotShown(areas[0]!)).toMatch(reason);
    }
    for (const name of SHOWN) {
      const areas = await areasOf(`${members}/${name}`);
      expect([name, areas.flatMap((a) => whyNotShown(a) ?? [])]).toEqual([name, []]);
      expect(areas.filter((a) => a.holds === 'files').length).toBeGreaterThan(0);
      expect(areas.every((a) => (a.members ?? []).length > 0)).toBe(true);
    }
    expect((await areasOf(`${members}/parts-10`)).map((a) => a.name)).toEqual(['p1', 'p2']);
  });

  it('say of their array what mdadm says', async () => {
    const facts = memberFacts();
    expect(facts.size).toBeGreaterThan(30);
    for (const name of names) {
      const said = facts.get(name);
      if (said === undefined || name === 'ddf' || name === 'imsm') continue;
      const image = new FileImage(`${members}/${name}`);
      const found = await readMdMember(image, { offsetBytes: 0, sizeBytes: image.sizeBytes });
      await image.close();
      const { array, data } = found ?? {};
      expect([name, array?.version, array?.uuid, array?.level, String(array?.disks)]).toEqual([
        name,
        said.get('Version')?.replace('0.90.00', '0.90').replace('0.91.00', '0.91'),
        (said.get('Array UUID') ?? said.get('UUID'))?.split(' ')[0],
        said.get('Raid Level'),
        said.get('Raid Devices')?.split(' ')[0],
      ]);
      const isOld = array?.version === '0.90';
      // mdadm shows only the lower half of that counter of version 0.90, in another way.
      if (!isOld) expect([name, String(array?.events)]).toEqual([name, said.get('Events')]);
      const role = /^(?:Active|Replacement) device (\d+)/.exec(said.get('Device Role') ?? '')?.[1];
      if (!isOld)
        expect([name, array?.role]).toEqual([name, role === undefined ? undefined : Number(role)]);
      if (data === undefined || isOld) continue;
      const sectors = (key: string): number => Number(said.get(key)?.split(' ')[0] ?? 0);
      expect([name, data.offsetBytes / 512]).toEqual([name, sectors('Data Offset')]);
      const used = sectors('Used Dev Size') || sectors('Avail Dev Size');
      if (array?.level === 'raid1') expect([name, data.sizeBytes / 512]).toEqual([name, used]);
    }
  });

  it('give every file as it was, and what is known of the array', async () => {
    const wholeDisks = ['server', 'parts-10', 'ddf', 'imsm'];
    const inPartitions = names.filter((name) => !wholeDisks.includes(name));
    const images = [
      diskOfMembers(dir, members, inPartitions),
      `${members}/parts-10`,
      `${members}/server`,
    ];
    const read: string[] = [];
    const events: B2Event[] = [];
    for (const path of images) {
      const access = await openFileAccess({
        openImage: () => Promise.resolve(new FileImage(path)),
        name: 'lab',
        backend: 'kernel',
        clock: systemClock,
        events: (event) => events.push(event),
        cacheDir: dir.join('cache'),
      });
      try {
        for (const fileSystem of access.fileSystems) {
          const wanted = memberSums().filter(([, label]) => label === fileSystem.label);
          expect([fileSystem.name, fileSystem.label, wanted.length > 0]).toContain(true);
          expect(fileSystem.arrays?.length).toBeGreaterThan(0);
          for (const [sum, label, file] of wanted) {
            const hash = createHash('sha256');
            for await (const piece of access.read({ fileSystem, path: file })) hash.update(piece);
            expect([label, file, hash.digest('hex')]).toEqual([label, file, sum]);
            read.push(label);
          }
          // Where the file lies is where it is in the image, through the array and the volume.
          const place = { fileSystem, path: '/random' };
          const [first] = (await access.extents(place)) ?? [];
          const image = new FileImage(path);
          const there = Buffer.alloc(3000);
          await image.read(there, first?.imageOffset ?? 0);
          await image.close();
          const [sum] = wanted.find(([, , file]) => file === '/random') ?? [];
          expect(createHash('sha256').update(there).digest('hex')).toBe(sum);
        }
      } finally {
        await access.close();
      }
    }
    expect([...new Set(read)].sort()).toEqual(
      [
        'bad boot degraded degraded090 inner linear-one parts-10-a parts-10-b parts-12-a parts-12-b r0-one',
        'r1-090 r1-10 r1-11 r1-12 r1-second r10-near rebuild root',
      ]
        .join(' ')
        .split(' '),
    );
    const said = events.flatMap((e) => ('message' in e ? [`${e.type} ${e.message}`] : []));
    expect(said).toContainEqual(
      expect.stringMatching(
        /^warning p\d+: read from one member of the RAID 1 array "lab:degraded" .*; the array knew 1 of its 2 members to be missing or failed /,
      ),
    );
    expect(said).toContainEqual(
      expect.stringMatching(/^detail p1: its superblock was written 20\d\d-\S+Z, events \d+$/),
    );
    expect(said).toContainEqual(
      expect.stringMatching(
        /^note p1: read from one member of the RAID 1 array "lab:boot" \(MD 1\.0, 2/,
      ),
    );
  });

  it('two of one array in one image are shown once, the newest', async () => {
    const disk = diskOfMembers(dir, members, ['stale', 'degraded']);
    const areas = await areasOf(disk);
    expect(areas.map((a) => [a.name, a.holds])).toEqual([
      ['p1', 'none'],
      ['p2', 'files'],
    ]);
    expect(whyNotShown(areas[0]!)).toMatch(
      /^it is an older member of the RAID 1 array "lab:degraded"/,
    );
  });

  it('leave to LVM only what is thin', async () => {
    const areas = await areasOf(`${members}/server`);
    const [container] = areas.filter(isForLvm);
    expect(container).toMatchObject({ name: 'p2', type: 'LVM2_member' });
    expect(container?.left?.map((l) => l.volume)).toEqual(['mdvg/thin']);
  });
});
