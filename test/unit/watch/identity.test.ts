/** Which device is which, and what a second look at it says. */
import { mkdirSync, symlinkSync, truncateSync, writeFileSync } from 'node:fs';
import { describe, expect, it } from 'vitest';
import type { DeviceFacts } from '../../../src/devices/device.js';
import type { DeviceContents } from '../../../src/devices/inspect.js';
import { openReadDevice } from '../../../src/devices/open.js';
import {
  compareDevices,
  isReleasing,
  presenceOf,
  type KnownDevice,
} from '../../../src/watch/identity.js';
import { memoryDevice } from '../../support/device-memory.js';
import { tempDir, type TempDir } from '../../support/tmp.js';

const ext4 = (uuid: string): DeviceContents => ({
  contents: [{ type: 'ext4', usage: 'filesystem', uuid }],
});
const gpt = (id: string): DeviceContents => ({
  table: { type: 'gpt', id, sectorBytes: 512, problems: [], partitions: [] },
  contents: [],
});
const known = (
  identity: Record<string, string>,
  contents?: DeviceContents,
  kind: 'block' | 'file' = 'block',
): KnownDevice => ({ kind, identity, contents });

describe('two looks at a device', () => {
  const cases: readonly [string, KnownDevice, KnownDevice, string, string][] = [
    ['serial', known({ serial: 'A' }), known({ serial: 'A' }), 'same', 'serial number A'],
    ['serial differs', known({ serial: 'A' }), known({ serial: 'B' }), 'other', 'B, not A'],
    [
      'one of two differs',
      known({ wwn: 'w', serial: 'A' }),
      known({ wwn: 'w', serial: 'B' }),
      'other',
      'serial number B, not A',
    ],
    [
      'another partition of the same disk',
      known({ serial: 'A', partitionUuid: 'p1' }),
      known({ serial: 'A', partitionUuid: 'p2' }),
      'other',
      'partition UUID p2, not p1',
    ],
    [
      'hardware decides before contents',
      known({ serial: 'A' }, gpt('g1')),
      known({ serial: 'A' }, gpt('g2')),
      'same',
      'serial number A',
    ],
    ['a logical volume', known({ dmUuid: 'L' }), known({ dmUuid: 'L' }), 'same', 'UUID L'],
    ['what only one of them has', known({ serial: 'A' }), known({}), 'unknown', 'no serial'],
    ['disk GUID', known({}, gpt('g1')), known({}, gpt('g1')), 'same', 'GPT disk id g1'],
    ['disk GUID differs', known({}, gpt('g1')), known({}, gpt('g2')), 'other', 'g2, not g1'],
    ['file system', known({}, ext4('u1')), known({}, ext4('u1')), 'same', 'UUID u1'],
    ['file system differs', known({}, ext4('u1')), known({}, ext4('u2')), 'other', 'u2, not u1'],
    ['a table now, a file system then', known({}, ext4('u')), known({}, gpt('g')), 'unknown', ''],
    [
      'an MBR without a signature',
      known({}, { table: { ...gptTable('0x00000000'), type: 'mbr' }, contents: [] }),
      known({}, { table: { ...gptTable('0x00000000'), type: 'mbr' }, contents: [] }),
      'unknown',
      '',
    ],
    ['nothing', known({}), known({}), 'unknown', 'nothing'.slice(0, 0)],
    [
      'backing file, made anew inside',
      known({ loopFile: '/a' }, ext4('u1')),
      known({ loopFile: '/a' }, ext4('u2')),
      'same',
      'backing file /a',
    ],
    [
      'another backing file',
      known({ loopFile: '/a' }),
      known({ loopFile: '/b' }),
      'other',
      'backing file /b, not /a',
    ],
    [
      'a backing file that was renamed',
      known({ loopFile: '/a' }, ext4('u1')),
      known({ loopFile: '/b' }, ext4('u1')),
      'same',
      'UUID u1',
    ],
    [
      'the same file',
      known({ inode: '1:2' }, undefined, 'file'),
      known({ inode: '1:2' }, undefined, 'file'),
      'same',
      'the same file',
    ],
    [
      'another file of other contents',
      known({ inode: '1:2' }, ext4('u1'), 'file'),
      known({ inode: '1:3' }, ext4('u2'), 'file'),
      'other',
      'u2, not u1',
    ],
  ];
  for (const [name, before, now, verdict, because] of cases) {
    it(`${name}: ${verdict}`, () => {
      const found = compareDevices(before, now);
      expect(found.verdict).toBe(verdict);
      expect(found.because).toContain(because);
    });
  }
});

function gptTable(id: string) {
  return { type: 'gpt' as const, id, sectorBytes: 512, problems: [], partitions: [] };
}

interface Fake {
  readonly roots: { readonly sys: string; readonly proc: string; readonly dev: string };
  put(file: string, text: string): void;
}

/** A /sys with disk 7:7 (loop7) and its partition 259:1. */
function fakeSys(dir: TempDir): Fake {
  const sys = dir.join('sys');
  const own = dir.join('sys/devices/loop7');
  mkdirSync(`${own}/loop7p1`, { recursive: true });
  mkdirSync(`${own}/loop`, { recursive: true });
  mkdirSync(`${sys}/dev/block`, { recursive: true });
  symlinkSync('../../devices/loop7', `${sys}/dev/block/7:7`);
  symlinkSync('../../devices/loop7/loop7p1', `${sys}/dev/block/259:1`);
  const put = (file: string, text: string): void => writeFileSync(`${own}/${file}`, `${text}\n`);
  put('size', '2048');
  put('diskseq', '41');
  put('loop/autoclear', '0');
  put('loop7p1/size', '1024');
  return { roots: { sys, proc: dir.join('proc'), dev: dir.join('dev') }, put };
}

const facts = (more: Partial<DeviceFacts> = {}): DeviceFacts => ({
  ...memoryDevice(Buffer.alloc(512)).facts,
  path: '/dev/loop7',
  devNumber: '7:7',
  diskSequence: 41n,
  sizeBytes: 2048 * 512,
  ...more,
});

describe('whether a device is there', () => {
  it('says its size, also of a partition', async () => {
    await using dir = tempDir();
    const { roots } = fakeSys(dir);
    expect(await presenceOf(facts(), false, roots)).toEqual({ kind: 'here', sizeBytes: 1048576 });
    const partition = facts({
      devNumber: '259:1',
      partitionOf: { diskPath: '/dev/loop7', offsetBytes: 4096 },
    });
    expect(await presenceOf(partition, false, roots)).toEqual({ kind: 'here', sizeBytes: 524288 });
  });

  it('notices that it has gone, is empty, or is another', async () => {
    await using dir = tempDir();
    const { roots, put } = fakeSys(dir);
    expect(await presenceOf(facts({ devNumber: '7:8' }), false, roots)).toMatchObject({
      kind: 'gone',
      why: '/dev/loop7 has been removed',
    });
    put('diskseq', '42');
    expect(await presenceOf(facts(), false, roots)).toMatchObject({
      kind: 'gone',
      why: 'another medium is behind /dev/loop7 now',
    });
    const partition = facts({
      devNumber: '259:1',
      partitionOf: { diskPath: '/dev/loop7', offsetBytes: 4096 },
    });
    expect(await presenceOf(partition, false, roots)).toMatchObject({ kind: 'gone' });
    put('diskseq', '41');
    put('size', '0');
    expect(await presenceOf(facts(), false, roots)).toMatchObject({ kind: 'gone' });
  });

  it('notices that a loop device is to be detached, unless it always was', async () => {
    await using dir = tempDir();
    const { roots, put } = fakeSys(dir);
    expect(await isReleasing(facts(), roots)).toBe(false);
    put('loop/autoclear', '1');
    expect(await isReleasing(facts(), roots)).toBe(true);
    expect(await presenceOf(facts(), false, roots)).toMatchObject({ kind: 'released' });
    expect(await presenceOf(facts(), true, roots)).toMatchObject({ kind: 'here' });
    const partition = facts({
      devNumber: '259:1',
      partitionOf: { diskPath: '/dev/loop7', offsetBytes: 4096 },
    });
    expect(await presenceOf(partition, false, roots)).toMatchObject({ kind: 'released' });
  });

  it('knows a file by its inode', async () => {
    await using dir = tempDir();
    const file = dir.join('disk.img');
    writeFileSync(file, '');
    truncateSync(file, 8192);
    const device = await openReadDevice(file);
    try {
      expect(await presenceOf(device.facts, false)).toEqual({ kind: 'here', sizeBytes: 8192 });
      truncateSync(file, 4096);
      expect(await presenceOf(device.facts, false)).toEqual({ kind: 'here', sizeBytes: 4096 });
      const other = { ...device.facts, identity: { inode: '1:1' } };
      expect(await presenceOf(other, false)).toMatchObject({ kind: 'gone' });
      expect(
        await presenceOf({ ...device.facts, realPath: dir.join('none') }, false),
      ).toMatchObject({ kind: 'gone' });
    } finally {
      await device.close();
    }
  });
});
