/** NTFS as Windows leaves it in a crash: its contents are right, or there are none. In the tiny virtual machine, with ntfs-3g. */
import { execFileSync } from 'node:child_process';
import { readFileSync, truncateSync, writeFileSync } from 'node:fs';
import { afterAll, beforeAll, expect, it } from 'vitest';

import { systemClock } from '../../../src/clock.js';
import { messageOf } from '../../../src/errors.js';
import type { B2Event } from '../../../src/events.js';
import { openFileAccess } from '../../../src/files/access.js';
import { findGuestKernel } from '../../../src/files/guest.js';
import type { FileAccess } from '../../../src/files/types.js';
import { tool } from '../../support/disks.js';
import { FileImage } from '../../support/image-memory.js';
import { requires } from '../../support/requires.js';
import { tempDir, type TempDir } from '../../support/tmp.js';

const MIB = 1024 * 1024;
const PART = 16 * MIB;
const hasKernel = (await findGuestKernel()) !== undefined;
const needs = {
  tools: [
    'qemu-system-x86_64',
    'busybox',
    'sfdisk',
    'mkfs.ntfs',
    'ntfscp',
    'ntfsfix',
    'ntfsinfo',
    'ntfs-3g',
    'ntfs-3g.probe',
    'ntfsrecover',
  ],
  also: () => (hasKernel ? undefined : 'a kernel in /boot with modules'),
};

/** Offset and size of $LogFile's data: boot sector, record 2 of the MFT, the first run of its data attribute. */
function logFile(ntfs: Buffer): { readonly at: number; readonly sizeBytes: number } {
  const cluster = ntfs.readUInt16LE(11) * (ntfs[13] ?? 0);
  const record = Number(ntfs.readBigUInt64LE(0x30)) * cluster + 2 * 1024;
  let at = record + ntfs.readUInt16LE(record + 20);
  while (ntfs.readUInt32LE(at) !== 0x80) at += ntfs.readUInt32LE(at + 4);
  const run = at + ntfs.readUInt16LE(at + 32);
  const lengths = (ntfs[run] ?? 0) & 15;
  const places = (ntfs[run] ?? 0) >> 4;
  const cluster0 = ntfs.readUIntLE(run + 1 + lengths, places);
  return { at: cluster0 * cluster, sizeBytes: Number(ntfs.readBigUInt64LE(at + 48)) };
}

/** A restart page that says that Windows has the volume open: what it did last is in the log, if anywhere. */
function restartPage(logBytes: number, major: number, minor: number): Buffer {
  const page = Buffer.alloc(4096);
  const [usaAt, usaCount, areaAt, lsn] = [30, 9, 48, 0x100000n];
  page.write('RSTR', 0, 'latin1');
  page.writeUInt16LE(usaAt, 4);
  page.writeUInt16LE(usaCount, 6);
  page.writeUInt32LE(4096, 16); // system page
  page.writeUInt32LE(4096, 20); // log page
  page.writeUInt16LE(areaAt, 24);
  page.writeUInt16LE(minor, 26);
  page.writeUInt16LE(major, 28);
  page.writeBigUInt64LE(lsn, areaAt);
  page.writeUInt16LE(1, areaAt + 8); // clients
  page.writeUInt16LE(0xffff, areaAt + 10); // none free, the first in use
  page.writeUInt32LE(67 - logBytes.toString(2).length, areaAt + 16); // bits of a sequence number
  page.writeUInt16LE(64 + 160, areaAt + 20);
  page.writeUInt16LE(64, areaAt + 22);
  page.writeBigUInt64LE(BigInt(logBytes), areaAt + 24);
  page.writeUInt16LE(48, areaAt + 36);
  page.writeUInt16LE(64, areaAt + 38);
  page.writeUInt32LE(1, areaAt + 40);
  const client = areaAt + 64;
  page.writeBigUInt64LE(lsn, client);
  page.writeBigUInt64LE(lsn, client + 8);
  page.writeUInt32LE(0xffff_ffff, client + 16);
  page.writeUInt32LE(8, client + 28);
  page.write('NTFS', client + 32, 'utf16le');
  page.writeUInt16LE(1, usaAt);
  for (let i = 1; i < usaCount; i++) {
    page.copy(page, usaAt + 2 * i, i * 512 - 2, i * 512);
    page.writeUInt16LE(1, i * 512 - 2);
  }
  return page;
}

requires(needs).describe('a dirty NTFS', () => {
  let dir: TempDir;
  let access: FileAccess;
  const events: B2Event[] = [];
  const words = 'the words of the file\n';

  beforeAll(async () => {
    dir = tempDir();
    const clean = dir.join('clean');
    writeFileSync(clean, '');
    truncateSync(clean, PART);
    tool('mkfs.ntfs', ['--quiet', '--fast', '--force', clean]);
    writeFileSync(dir.join('words'), words);
    tool('ntfscp', ['-q', clean, dir.join('words'), 'words.txt']);
    const plain = readFileSync(clean);
    const { at, sizeBytes } = logFile(plain);
    const inUse = (major: number, minor: number): Buffer => {
      const bytes = Buffer.from(plain);
      for (const n of [0, 1]) restartPage(sizeBytes, major, minor).copy(bytes, at + n * 4096);
      return bytes;
    };
    const garbage = Buffer.from(plain);
    garbage.fill(0xa5, at, at + 8192);
    const changed = (name: string, change: (file: string) => void): Buffer => {
      writeFileSync(dir.join(name), plain);
      change(dir.join(name));
      return readFileSync(dir.join(name));
    };
    const asleep = changed('asleep', (file) => {
      writeFileSync(dir.join('hiberfil'), Buffer.concat([Buffer.from('hibr'), Buffer.alloc(8188)]));
      tool('ntfscp', ['-q', file, dir.join('hiberfil'), 'hiberfil.sys']);
    });
    const marked = changed('marked', (file) => void tool('ntfsfix', [file]));
    const disk = dir.join('disk');
    writeFileSync(disk, '');
    truncateSync(disk, 2 * MIB + 6 * PART);
    tool('sfdisk', ['-q', disk], `label: gpt\n${'size=16M\n'.repeat(6)}`);
    const parts = [plain, inUse(1, 1), inUse(2, 0), garbage, asleep, marked];
    for (const [i, bytes] of parts.entries()) {
      writeFileSync(dir.join('part'), bytes);
      execFileSync('dd', [
        `if=${dir.join('part')}`,
        `of=${disk}`,
        'bs=1M',
        `seek=${1 + i * 16}`,
        'conv=notrunc',
        'status=none',
      ]);
    }
    access = await openFileAccess({
      openImage: () => Promise.resolve(new FileImage(disk)),
      name: 'disk',
      backend: 'vm',
      clock: systemClock,
      events: (event) => events.push(event),
      cacheDir: dir.join('cache'),
    });
  });
  afterAll(async () => {
    await access.close();
    await dir.remove();
  });

  const look = async (part: number): Promise<string> => {
    const fileSystem = access.fileSystems.find((f) => f.name === `p${part}`);
    if (fileSystem === undefined) throw new Error(`no p${part}`);
    const pieces: Uint8Array[] = [];
    try {
      for await (const piece of access.read({ fileSystem, path: '/words.txt' })) pieces.push(piece);
      return Buffer.concat(pieces).toString();
    } catch (error) {
      return messageOf(error);
    }
  };
  const warnings = (part: number): readonly string[] =>
    events.flatMap((e) =>
      e.type === 'warning' && e.message.startsWith(`p${part}: `) ? [e.message] : [],
    );

  it('is read where the log has nothing to add, and refused where it cannot be replayed', async () => {
    expect(access.fileSystems.map((f) => f.type)).toEqual(Array.from({ length: 6 }, () => 'ntfs'));
    expect(await look(1)).toBe(words);
    expect(warnings(1)).toEqual([]);
    for (const part of [2, 3, 4]) {
      expect(await look(part)).toMatch(
        new RegExp(`^p${part}: Windows had this NTFS in use, and what its log has to add cannot`),
      );
    }
    expect(await look(5)).toBe(words);
    expect(warnings(5)).toEqual([expect.stringContaining('Windows was hibernated in this NTFS')]);
    expect(await look(6)).toBe(words);
    expect(warnings(6)).toEqual([expect.stringContaining('marked for a check by Windows')]);
  });
});
