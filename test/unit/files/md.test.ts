/** Superblocks of MD as b2 reads them by itself, built here byte by byte (include/uapi/linux/raid/md_p.h). */
import fc from 'fast-check';
import { describe, expect, it } from 'vitest';

import { inspectDevice } from '../../../src/devices/inspect.js';
import { findAreas, readableImage, whyNotShown } from '../../../src/files/layout.js';
import {
  describeAge,
  describeMember,
  readMdMember,
  superblockOffset,
} from '../../../src/files/md.js';
import { MemoryImage } from '../../support/image-memory.js';

const KIB = 1024;
const MIB = KIB * KIB;
const SIZE = 4 * MIB;
const DATA_SECTORS = 2048; // of what lies before the data: 1 MiB
const MAX_SECTOR = 0xffff_ffff_ffff_ffffn;
/** 2026-11-23 08:00:00 UTC, and an array that is a day older. */
const WRITTEN = 1_795_420_800;

type Version1 = '1.0' | '1.1' | '1.2';

interface Options1 {
  readonly version?: Version1;
  readonly level?: number;
  readonly layout?: number;
  readonly chunkSectors?: number;
  readonly disks?: number;
  readonly features?: number;
  /** By device number; the own one is `device`. */
  readonly roles?: readonly number[];
  readonly device?: number;
  readonly sizeSectors?: number;
  readonly dataOffset?: number;
  readonly dataSectors?: number;
  readonly recoveryOffset?: number;
  readonly resyncOffset?: bigint;
  readonly createdSeconds?: number;
  readonly flags?: number;
  readonly bitmapOffset?: number;
  readonly badBlocks?: {
    readonly offset: number;
    readonly sectors: number;
    readonly shift?: number;
  };
  readonly name?: string;
  readonly uuid?: string;
  readonly events?: number;
  /** After the fields and before the checksum. */
  readonly change?: (superblock: Buffer) => void;
}

/** The sum as the kernel has it, but in whole numbers without an end. */
function sum1(superblock: Buffer, length: number): number {
  let sum = 0n;
  for (let i = 0; i + 4 <= length; i += 4) if (i !== 216) sum += BigInt(superblock.readUInt32LE(i));
  if (length % 4 !== 0) sum += BigInt(superblock.readUInt16LE(length - 2));
  return Number(((sum & 0xffff_ffffn) + (sum >> 32n)) & 0xffff_ffffn);
}

function write1(area: Buffer, options: Options1 = {}): void {
  const { version = '1.2', roles = [0, 1], device = 0, disks = 2 } = options;
  const at = superblockOffset(version, area.length) ?? NaN;
  const isEnd = version === '1.0';
  const dataOffset = options.dataOffset ?? (isEnd ? 0 : DATA_SECTORS);
  const dataSectors =
    options.dataSectors ?? (isEnd ? at / 512 : Math.floor(area.length / 512)) - dataOffset;
  const s = Buffer.alloc(4096);
  s.writeUInt32LE(0xa92b4efc, 0);
  s.writeUInt32LE(1, 4);
  s.writeUInt32LE(options.features ?? 0, 8);
  s.write(options.uuid ?? '00112233445566778899aabbccddeeff', 16, 'hex');
  s.write(options.name ?? 'web1:boot', 32);
  s.writeBigUInt64LE(BigInt(options.createdSeconds ?? WRITTEN - 86_400), 64);
  s.writeInt32LE(options.level ?? 1, 72);
  s.writeUInt32LE(options.layout ?? 0, 76);
  s.writeBigUInt64LE(BigInt(options.sizeSectors ?? dataSectors), 80);
  s.writeUInt32LE(options.chunkSectors ?? 0, 88);
  s.writeUInt32LE(disks, 92);
  s.writeInt32LE(options.bitmapOffset ?? 0, 96);
  s.writeBigUInt64LE(BigInt(dataOffset), 128);
  s.writeBigUInt64LE(BigInt(dataSectors), 136);
  s.writeBigUInt64LE(BigInt(at / 512), 144);
  s.writeBigUInt64LE(BigInt(options.recoveryOffset ?? 0), 152);
  s.writeUInt32LE(device, 160);
  s[184] = options.flags ?? 0;
  s[185] = options.badBlocks?.shift ?? 0;
  s.writeUInt16LE(options.badBlocks?.sectors ?? 0, 186);
  s.writeInt32LE(options.badBlocks?.offset ?? 0, 188);
  s.writeBigUInt64LE((123_456n << 40n) | BigInt(WRITTEN), 192);
  s.writeBigUInt64LE(BigInt(options.events ?? 42), 200);
  s.writeBigUInt64LE(options.resyncOffset ?? MAX_SECTOR, 208);
  s.writeUInt32LE(roles.length, 220);
  roles.forEach((role, i) => s.writeUInt16LE(role, 256 + 2 * i));
  options.change?.(s);
  s.writeUInt32LE(sum1(s, Math.min(4096, 256 + 2 * s.readUInt32LE(220))), 216);
  s.copy(area, at);
}

interface Options090 {
  readonly minor?: number;
  readonly level?: number;
  readonly disks?: number;
  /** Role and state of each number. */
  readonly members?: readonly (readonly [role: number, state: number])[];
  readonly number?: number;
  readonly state?: number;
  readonly checkpoint?: number;
  readonly sizeKib?: number;
  readonly chunkBytes?: number;
  readonly isBigEndian?: boolean;
}

function write090(area: Buffer, options: Options090 = {}): void {
  const at = superblockOffset('0.90', area.length) ?? NaN;
  const words = new Uint32Array(1024);
  const members = options.members ?? [
    [0, 0x6],
    [1, 0x6],
  ];
  words.set([0xa92b4efc, 0, options.minor ?? 90, 0, 0, 0x0a0b0c0d, WRITTEN - 86_400]);
  words[7] = options.level ?? 1;
  words[8] = options.sizeKib ?? at / KIB;
  words[10] = options.disks ?? 2;
  words.set([1, 2, 3], 13);
  words.set([WRITTEN, options.state ?? 1], 32);
  words.set([7, 1, 7, 1, options.checkpoint ?? 0], 39);
  words[65] = options.chunkBytes ?? 0;
  members.forEach(([role, state], i) => words.set([i, 8, i, role, state], 128 + 32 * i));
  words[992] = options.number ?? 0;
  let sum = 0n;
  words.forEach((word, i) => (sum += i === 38 ? 0n : BigInt(word)));
  words[38] = Number(((sum & 0xffff_ffffn) + (sum >> 32n)) & 0xffff_ffffn);
  words.forEach((word, i) => {
    if (options.isBigEndian === true) area.writeUInt32BE(word, at + 4 * i);
    else area.writeUInt32LE(word, at + 4 * i);
  });
}

/** An ext4 super block at the beginning, of so many bytes. */
function writeExt4(area: Buffer, sizeBytes: number): void {
  area.writeUInt16LE(0xef53, 1024 + 0x38);
  area.writeUInt32LE(1, 1024 + 0x4c);
  area.writeUInt32LE(sizeBytes / KIB, 1024 + 4);
  area.writeUInt32LE(8192, 1024 + 0x20);
  area.writeUInt32LE(0x40, 1024 + 0x60);
}

function imageWith(write: (area: Buffer) => void, bytes = SIZE): MemoryImage {
  const image = new MemoryImage([{ length: bytes, hole: true }]);
  write(image.content);
  return image;
}

const ALL = { offsetBytes: 0, sizeBytes: SIZE };

async function memberWith(options: Options1): ReturnType<typeof readMdMember> {
  return readMdMember(
    imageWith((area) => write1(area, options)),
    ALL,
  );
}

async function reasonWith(options: Options1): Promise<string | undefined> {
  const member = await memberWith(options);
  expect(member?.data === undefined).toBe(member?.reason !== undefined);
  return member?.reason;
}

async function reason090(options: Options090): Promise<string | undefined> {
  const member = await readMdMember(
    imageWith((area) => write090(area, options)),
    ALL,
  );
  expect(member?.data === undefined).toBe(member?.reason !== undefined);
  return member?.reason;
}

describe('a member of a RAID 1', () => {
  it('has its superblock where its version says, and its data where that says', async () => {
    for (const version of ['1.0', '1.1', '1.2'] as const) {
      const member = await memberWith({ version, device: 1 });
      const at = { '1.0': SIZE - 8192, '1.1': 0, '1.2': 4096 }[version];
      const offsetBytes = version === '1.0' ? 0 : MIB;
      expect(member).toEqual({
        superblockOffset: at,
        array: {
          version,
          level: 'raid1',
          disks: 2,
          uuid: '00112233:44556677:8899aabb:ccddeeff',
          name: 'web1:boot',
          role: 1,
          missing: 0,
          events: 42,
          updated: '2026-11-23T08:00:00.000000000Z',
        },
        data: { offsetBytes, sizeBytes: (version === '1.0' ? at : SIZE) - offsetBytes },
        caveats: [],
      });
    }
    const old = await readMdMember(
      imageWith((area) => write090(area)),
      ALL,
    );
    expect(old).toMatchObject({
      superblockOffset: SIZE - 64 * KIB,
      array: {
        version: '0.90',
        uuid: '0a0b0c0d:00000001:00000002:00000003',
        role: 0,
        events: 2 ** 32 + 7,
      },
      data: { offsetBytes: 0, sizeBytes: SIZE - 64 * KIB },
    });
    expect(describeMember(old!)).toContain('RAID 1 array (MD 0.90, 2 disks, UUID 0a0b0c0d:');
    expect(describeAge(old!)).toBe(
      'its superblock was written 2026-11-23T08:00:00Z, events 4294967303',
    );
  });

  it('is as long as the array uses of it, and any number of them will do', async () => {
    const member = await memberWith({ sizeSectors: 100, disks: 5, roles: [3, 1, 0, 2, 4] });
    expect(member?.data).toEqual({ offsetBytes: MIB, sizeBytes: 100 * 512 });
    expect(member?.array?.role).toBe(3);
    expect(await reasonWith({ disks: 1, roles: [0] })).toBeUndefined();
    expect(
      await reasonWith({ roles: Array.from({ length: 1920 }, (_, i) => (i < 2 ? i : 0xfffe)) }),
    ).toBeUndefined();
  });

  it('says that it knows others to be missing, and that it may be late', async () => {
    const lone = await memberWith({ roles: [0xfffe, 1], device: 1 });
    expect(lone?.array).toMatchObject({ missing: 1, role: 1 });
    expect(lone?.caveats).toEqual([
      'the array knew 1 of its 2 members to be missing or failed when this one was written',
    ]);
    expect((await memberWith({ flags: 1 }))?.caveats).toEqual([
      'it is a member that writes may reach later than the others (write-mostly)',
    ]);
    const old = await readMdMember(
      imageWith((area) =>
        write090(area, {
          members: [
            [0, 0x6],
            [1, 0x9],
          ],
        }),
      ),
      ALL,
    );
    expect(old?.caveats).toHaveLength(1);
    // The one that was brought in instead has another number, and not its place.
    const replaced = await memberWith({ roles: [0xfffe, 1, 0], device: 2 });
    expect(replaced).toMatchObject({ array: { missing: 0, role: 0 }, caveats: [] });
  });

  it('that does not hold all of it, or may not, is named with the reason', async () => {
    expect(await reasonWith({ roles: [0xffff, 1] })).toMatch(/^it is a spare/);
    expect(await reasonWith({ roles: [0, 1], device: 2 })).toMatch(/^it is a spare/);
    expect(await reasonWith({ roles: [0xfffe, 1] })).toMatch(/given it up as faulty/);
    expect(await reasonWith({ roles: [0xfffd, 1] })).toBe('it is the journal of the array');
    expect(await reasonWith({ roles: [7, 1] })).toMatch(/place in the array is none/);
    expect(await reasonWith({ features: 0x2, recoveryOffset: 2048 })).toBe(
      'it was still being rebuilt (1.0 MiB of 3.0 MiB were done)',
    );
    expect(await reasonWith({ features: 0x82 })).toMatch(/still being rebuilt/);
    expect(await reasonWith({ features: 0x12 })).toMatch(/replacement of another member \(0 B of/);
    expect(await reasonWith({ features: 0x10 })).toBe(
      'it was being made the replacement of another member',
    );
    for (const features of [0x4, 0x44, 0x24, 0x20, 0x40])
      expect(await reasonWith({ features })).toMatch(/being reshaped/);
    expect(await reasonWith({ features: 0x100 })).toMatch(/one of a cluster/);
    for (const features of [0x200, 0x400, 0x800])
      expect(await reasonWith({ features })).toMatch(/journal of its own/);
    expect(await reasonWith({ features: 0x8000_2001 })).toBe(
      'its superblock has features that b2 does not know (0x80002000)',
    );
    for (const at of [12, 228, 255])
      expect(await reasonWith({ change: (s) => (s[at] = 1) })).toMatch(
        /fields that b2 does not know/,
      );
    expect(await reasonWith({ change: (s) => s.writeUInt32LE(4096, 224) })).toBeUndefined();
    expect(await reasonWith({ change: (s) => s.writeUInt32LE(3, 224) })).toMatch(/does not know/);
  });

  it('of version 0.90 likewise', async () => {
    expect(await reason090({ minor: 91 })).toMatch(/being reshaped/);
    const withOwn = (state: number): Promise<string | undefined> =>
      reason090({
        members: [
          [0, state],
          [1, 0x6],
        ],
      });
    expect(await withOwn(0x9)).toMatch(/given it up as faulty/);
    expect(await withOwn(0)).toMatch(/spare, or was still being rebuilt/);
    expect(await withOwn(0x2)).toMatch(/spare, or was still being rebuilt/);
    expect(await reason090({ number: 5 })).toMatch(/spare, or was/);
    expect(await reason090({ number: 4_000_000_000 })).toMatch(/spare, or was/);
    expect(await reason090({ sizeKib: SIZE / KIB })).toMatch(/data where it cannot be/);
    expect(await reason090({ minor: 92 })).toMatch(/version 0\.92, which b2 does not know/);
    expect(await reason090({ isBigEndian: true })).toMatch(/by a big-endian machine/);
    expect(await reason090({ disks: 28 })).toMatch(/more places than can be/);
    expect(await reason090({ level: 5 })).toMatch(/one of the 2 members of a RAID 5 holds only/);
    expect(
      await reason090({ level: 0, disks: 1, members: [[0, 6]], chunkBytes: 65_536, sizeKib: 0 }),
    ).toBeUndefined();
  });

  it('whose data lies where it cannot be is refused', async () => {
    const nonsense: Options1[] = [
      { dataOffset: 4 },
      { dataSectors: 9, sizeSectors: 9 },
      { dataSectors: SIZE / 512 - DATA_SECTORS + 1 },
      { sizeSectors: SIZE / 512 },
      { sizeSectors: 0 },
      { version: '1.0', dataOffset: 8, dataSectors: SIZE / 512 - 16 },
      { change: (s) => s.writeBigUInt64LE(MAX_SECTOR, 128) },
      { change: (s) => s.writeBigUInt64LE(MAX_SECTOR, 136) },
      { change: (s) => s.writeBigUInt64LE(1n << 60n, 80) },
    ];
    for (const options of nonsense)
      expect(await reasonWith(options)).toBe('its superblock has its data where it cannot be');
  });

  it('with a bad block log is refused where that has entries', async () => {
    const log = (entries: readonly bigint[], shift = 0): Promise<string | undefined> => {
      const image = imageWith((area) => {
        write1(area, { features: 0x8, badBlocks: { offset: 16, sectors: 8, shift } });
        area.fill(0xff, 4096 + 16 * 512, 4096 + 24 * 512);
        entries.forEach((e, i) => area.writeBigUInt64LE(e, 4096 + 16 * 512 + 8 * i));
      });
      return readMdMember(image, ALL).then((m) => m?.reason);
    };
    expect(await log([])).toBeUndefined();
    expect(await log([0n])).toBeUndefined();
    expect(await log([(5000n << 10n) | 16n, (9000n << 10n) | 8n])).toBe(
      'it has bad blocks, where it lacks what other members have (2 in its list, 12.0 KiB, the first at sector 5000)',
    );
    expect(await log([(5n << 10n) | 1n], 3)).toContain(
      '1 in its list, 4.0 KiB, the first at sector 40',
    );
    for (const badBlocks of [
      { offset: 0, sectors: 8 },
      { offset: 16, sectors: 0 },
      { offset: 16, sectors: 9 },
      { offset: -100, sectors: 8 },
      { offset: 2 ** 31 - 1, sectors: 8 },
      { offset: 16, sectors: 8, shift: 200 },
    ])
      expect(await reasonWith({ features: 0x8, badBlocks })).toMatch(/list of them cannot be read/);
    // The kernel reads the list only where the feature says that there is one.
    expect(await reasonWith({ badBlocks: { offset: 0, sectors: 9 } })).toBeUndefined();
  });

  it('that may not have been brought into step with the first one is refused', async () => {
    const second = { device: 1, createdSeconds: WRITTEN };
    expect(await reasonWith({ ...second, resyncOffset: 2048n })).toMatch(
      /being brought into step with the first member of the array \(1\.0 MiB of 3\.0 MiB/,
    );
    expect(
      await reasonWith({ ...second, resyncOffset: BigInt(SIZE / 512 - DATA_SECTORS) }),
    ).toBeUndefined();
    // From the first the others get it, and without another there is nothing to differ from.
    expect(await reasonWith({ createdSeconds: WRITTEN, resyncOffset: 2048n })).toBeUndefined();
    expect(await reasonWith({ ...second, roles: [0xfffe, 1], resyncOffset: 0n })).toBeUndefined();
    expect(await reasonWith({ createdSeconds: WRITTEN, resyncOffset: 0n, flags: 1 })).toMatch(
      /so new/,
    );
    // In use, the array does not say; then its age tells.
    expect(await reasonWith({ ...second, resyncOffset: 0n })).toMatch(/the array is so new/);
    expect(await reasonWith({ device: 1, resyncOffset: 0n, createdSeconds: WRITTEN - 3 })).toMatch(
      /so new/,
    );
    expect(
      await reasonWith({ device: 1, resyncOffset: 0n, createdSeconds: WRITTEN - 4 }),
    ).toBeUndefined();
    // Or the last bit of its bitmap.
    const withBitmap = async (change: (bitmap: Buffer) => void): Promise<string | undefined> => {
      const image = imageWith((area) => {
        write1(area, { ...second, resyncOffset: 0n, features: 0x1, bitmapOffset: 8 });
        const bitmap = area.subarray(8192, 12_288);
        bitmap.write('bitm');
        bitmap.writeUInt32LE(4, 4);
        bitmap.write('00112233445566778899aabbccddeeff', 8, 'hex');
        bitmap.writeBigUInt64LE(BigInt(3 * MIB) / 512n, 40);
        bitmap.writeUInt32LE(256 * KIB, 52);
        bitmap[256] = 0xff;
        bitmap[257] = 0x07; // of twelve bits all but the last
        change(bitmap);
      });
      return (await readMdMember(image, ALL))?.reason;
    };
    expect(await withBitmap(() => undefined)).toBeUndefined();
    const notSaid: readonly ((b: Buffer) => void)[] = [
      (b) => (b[257] = 0x0f),
      (b) => (b[8] = 1),
      (b) => (b[0] = 1),
      (b) => b.writeUInt32LE(6, 4),
      (b) => b.writeUInt32LE(0, 52),
      (b) => b.writeBigUInt64LE(0n, 40),
      (b) => b.writeBigUInt64LE(MAX_SECTOR, 40),
    ];
    for (const change of notSaid) expect(await withBitmap(change)).toMatch(/so new/);
    const at = superblockOffset('0.90', SIZE) ?? 0;
    const age = { number: 1, state: 0 };
    expect(at).toBe(SIZE - 64 * KIB);
    expect(await reason090({ ...age, checkpoint: 64 })).toMatch(
      /\(32\.0 KiB of 3\.9 MiB were done\)/,
    );
    expect(await reason090({ number: 0, state: 0, checkpoint: 64 })).toBeUndefined();
    expect(await reason090(age)).toBeUndefined();
  });
});

describe('of other levels', () => {
  it('only what one member holds all of is shown', async () => {
    const near = (disks: number, layout: number): Promise<string | undefined> =>
      reasonWith({
        level: 10,
        disks,
        layout,
        chunkSectors: 128,
        roles: Array.from({ length: disks }, (_, i) => i),
      });
    expect(await near(2, 0x102)).toBeUndefined();
    expect(await near(3, 0x103)).toBeUndefined();
    for (const [disks, layout] of [
      [3, 0x102],
      [4, 0x102],
      [2, 0x201],
      [2, 0x10201],
      [2, 0x10102],
      [2, 0x20102],
      [1, 0x101],
      [256, 0x100],
    ] as const)
      expect(await near(disks, layout)).toMatch(/members of a RAID 10 holds only a part/);
    expect(await reasonWith({ level: 10, layout: 0x102 })).toMatch(/no chunk size/);
    for (const level of [0, -1]) {
      const options = { level, chunkSectors: 128, sizeSectors: 0 };
      expect(await reasonWith({ ...options, disks: 1, roles: [0] })).toBeUndefined();
      expect(await reasonWith(options)).toMatch(
        /one of the 2 members of a (RAID 0|linear array) holds only/,
      );
    }
    for (const level of [4, 5, 6]) expect(await reasonWith({ level })).toMatch(/holds only a part/);
    for (const level of [-4, -5, 2, 7, 99])
      expect(await reasonWith({ level })).toBe(`b2 does not know arrays of level ${level}`);
    // Whole chunks only.
    const member = await memberWith({
      level: 0,
      chunkSectors: 128,
      disks: 1,
      roles: [0],
      dataSectors: 1000,
    });
    expect(member?.data?.sizeBytes).toBe(7 * 128 * 512);
  });
});

describe('a superblock', () => {
  it('that is damaged, or of a version of its own, is named; one of another place is none', async () => {
    const flipped = imageWith((area) => write1(area));
    flipped.content[4096 + 100] = 0xff;
    expect(await readMdMember(flipped, ALL)).toEqual({
      superblockOffset: 4096,
      reason: 'the checksum of its superblock (version 1.2) is wrong',
      caveats: [],
    });
    const old = imageWith((area) => write090(area));
    old.content[SIZE - 64 * KIB + 100] = 1;
    expect((await readMdMember(old, ALL))?.reason).toBe(
      'the checksum of its superblock (version 0.90) is wrong',
    );
    expect((await memberWith({ change: (s) => s.writeUInt32LE(2, 4) }))?.reason).toBe(
      'its superblock is of version 2, which b2 does not know',
    );
    expect((await memberWith({ change: (s) => s.writeUInt32LE(1921, 220) }))?.reason).toMatch(
      /more places than can be/,
    );
    expect(await memberWith({ change: (s) => s.writeBigUInt64LE(9n, 144) })).toBeUndefined();
    expect(
      await readMdMember(
        imageWith(() => undefined),
        ALL,
      ),
    ).toBeUndefined();
    for (const sizeBytes of [0, 511, 4096, 8191])
      expect(
        await readMdMember(
          imageWith(() => undefined),
          { offsetBytes: 0, sizeBytes },
        ),
      ).toBeUndefined();
  });

  it('with any one byte of it changed gives nothing', async () => {
    for (const [write, at, bytes] of [
      [(area: Buffer) => write1(area), 4096, 256 + 4],
      [(area: Buffer) => write090(area), SIZE - 64 * KIB, 4096],
    ] as const) {
      const image = imageWith(write);
      for (let i = 0; i < bytes; i++) {
        const was = image.content[at + i] ?? 0;
        image.content[at + i] = was ^ (1 << (i % 8));
        expect([i, (await readMdMember(image, ALL))?.data]).toEqual([i, undefined]);
        image.content[at + i] = was;
      }
      expect((await readMdMember(image, ALL))?.data).toBeDefined();
    }
  });

  it('beside one of another array decides nothing', async () => {
    const image = imageWith((area) => {
      write1(area);
      write1(area, { version: '1.0', uuid: 'ff'.repeat(16) });
    });
    expect((await readMdMember(image, ALL))?.reason).toMatch(/superblocks of two arrays/);
    // A damaged one beside it is none.
    image.content[SIZE - 8192 + 16] = 0;
    expect((await readMdMember(image, ALL))?.data?.offsetBytes).toBe(MIB);
  });

  it('whatever is in it, is read without an error and never gives what lies outside', async () => {
    const base = [
      imageWith((area) => write1(area, { version: '1.0', features: 0x9, bitmapOffset: -8 })),
      imageWith((area) => write1(area, { features: 0x8, badBlocks: { offset: 16, sectors: 8 } })),
      imageWith((area) => write090(area)),
    ];
    const places = [SIZE - 8192, 4096, SIZE - 64 * KIB];
    await fc.assert(
      fc.asyncProperty(
        fc.nat(2),
        fc.array(fc.tuple(fc.nat(300), fc.nat(255)), { maxLength: 6 }),
        fc.boolean(),
        fc.nat(SIZE),
        async (which, changes, isSound, cut) => {
          const { content } = base[which]!;
          const at = places[which]!;
          const image = imageWith((area) => content.copy(area));
          for (const [i, byte] of changes) image.content[at + i] = byte;
          // With a good checksum what is behind it is looked at, too.
          if (isSound && which < 2) {
            const s = image.content.subarray(at, at + 4096);
            const max = s.readUInt32LE(220);
            if (max <= 1920) s.writeUInt32LE(sum1(s, 256 + 2 * max), 216);
          }
          for (const sizeBytes of [SIZE, cut]) {
            const member = await readMdMember(image, { offsetBytes: 0, sizeBytes });
            if (member === undefined) continue;
            expect(member.data === undefined).toBe(member.reason !== undefined);
            const { offsetBytes = 0, sizeBytes: bytes = 0 } = member.data ?? {};
            expect(Number.isSafeInteger(offsetBytes) && offsetBytes >= 0).toBe(true);
            expect(Number.isSafeInteger(bytes) && offsetBytes + bytes <= sizeBytes).toBe(true);
            JSON.stringify(member);
          }
        },
      ),
      { numRuns: 150 },
    );
  });
});

describe('areas', () => {
  const shown = async (
    image: MemoryImage,
  ): Promise<readonly (readonly [string, string, number, number])[]> =>
    (await findAreas(image, 'test')).map((a) => [a.name, a.type, a.offsetBytes, a.sizeBytes]);
  const why = async (image: MemoryImage): Promise<readonly (string | undefined)[]> =>
    (await findAreas(image, 'test')).map(whyNotShown);

  /** An MBR with one partition from 1 MiB to the end. */
  const partitioned = (
    write: (area: Buffer) => void,
    image = imageWith(() => undefined, SIZE + MIB),
  ): MemoryImage => {
    image.content.writeUInt16LE(0xaa55, 510);
    image.content.set([0, 0, 2, 0, 0x83, 0xff, 0xff, 0xff], 446);
    image.content.writeUInt32LE(2048, 454);
    image.content.writeUInt32LE(SIZE / 512, 458);
    image.content.writeUInt32LE(0x1234, 440);
    write(image.content.subarray(MIB));
    return image;
  };

  it('of a member are those of the array, where they lie in the image', async () => {
    const image = partitioned((area) => {
      write1(area);
      writeExt4(area.subarray(MIB), 3 * MIB);
    });
    expect(await shown(image)).toEqual([['p1', 'ext4', 2 * MIB, 3 * MIB]]);
    // The one that was there before the array was made is not looked at.
    writeExt4(image.content.subarray(MIB), SIZE);
    image.content.writeUInt32LE(0xef53, MIB + MIB + 1024 + 0x38 - 2);
    const { table } = await inspectDevice(readableImage(image, 'test'), () =>
      Promise.resolve(undefined),
    );
    expect(table?.partitions[0]?.contents.map((c) => c.type)).toEqual([
      'linux_raid_member',
      'ext4',
    ]);
    expect(await shown(image)).toEqual([['p1', 'linux_raid_member', MIB, SIZE]]);
  });

  it('with the superblock at the end are not taken for a file system that begins where the member does', async () => {
    for (const version of ['1.0', '0.90'] as const) {
      const end = superblockOffset(version, SIZE) ?? 0;
      const image = (level: number, ext4Bytes: number): MemoryImage =>
        partitioned((area) => {
          writeExt4(area, ext4Bytes);
          if (version === '1.0') write1(area, { version, level });
          else write090(area, { level });
        });
      expect(await shown(image(1, end))).toEqual([['p1', 'ext4', MIB, end]]);
      expect(await why(image(5, end))).toEqual([
        expect.stringMatching(
          /member of a RAID 5 array .*: one of the 2 members of a RAID 5 holds only a part/,
        ),
      ]);
      expect(await why(image(0, end))).toEqual([expect.stringContaining('RAID 0')]);
      // One that covers the superblock was not made in the array.
      expect(await why(image(1, SIZE))).toEqual([
        'the ext4 in it is larger than the array that it lies in',
      ]);
    }
  });

  it('of a whole disk: a superblock in a partition is the partition’s', async () => {
    // MBR, the partition ends where the disk does: both have their superblock of version 0.90 in one place.
    const image = partitioned((area) => {
      write090(area);
      writeExt4(area, SIZE - 64 * KIB);
    });
    expect(await shown(image)).toEqual([['p1', 'ext4', MIB, SIZE - 64 * KIB]]);
    // A table in the array.
    const whole = partitioned(
      (area) => writeExt4(area, SIZE),
      imageWith(() => undefined, SIZE + 2 * MIB),
    );
    write1(whole.content, { version: '1.0' });
    expect(await shown(whole)).toEqual([['p1', 'ext4', MIB, SIZE]]);
    expect((await findAreas(whole, 'test'))[0]?.members?.[0]?.array?.version).toBe('1.0');
    write1(whole.content, { version: '1.0', level: 0 });
    expect(await why(whole)).toEqual([expect.stringContaining('RAID 0')]);
    // The table was there before the disk became a member.
    const before = partitioned((area) => writeExt4(area, SIZE));
    write1(before.content, { level: 5 });
    expect(await why(before)).toEqual([expect.stringContaining('RAID 5')]);
    before.content[4096 + 20] = 1;
    expect(await shown(before)).toEqual([['p1', 'ext4', MIB, SIZE]]);
  });

  it('in partitions of an array are named after both, and arrays in them are looked into', async () => {
    const inner = partitioned((area) => {
      write1(area, { version: '1.1', uuid: 'ab'.repeat(16) });
      writeExt4(area.subarray(MIB), 3 * MIB);
    });
    const image = imageWith(() => undefined, SIZE + 2 * MIB);
    write1(image.content);
    inner.content.copy(image.content, MIB);
    expect(await shown(image)).toEqual([['p1', 'ext4', 3 * MIB, 3 * MIB]]);
    const outer = imageWith(() => undefined, SIZE + 4 * MIB);
    partitioned(() => undefined, outer);
    outer.content.writeUInt32LE((SIZE + 2 * MIB) / 512, 458);
    image.content.copy(outer.content, MIB);
    const [area] = await findAreas(outer, 'test');
    expect(area).toMatchObject({ name: 'p1p1', type: 'ext4', offsetBytes: 4 * MIB });
    expect(area?.members?.map((m) => m.array?.version)).toEqual(['1.2', '1.1']);
  });

  it('never reach beyond the array, whatever a partition table in it says', async () => {
    const disk = imageWith(() => undefined, SIZE + 4 * MIB);
    const table = partitioned((area) => writeExt4(area, 2 * MIB));
    write1(disk.content, { sizeSectors: (4 * MIB) / 512 });
    table.content.copy(disk.content, MIB);
    // A partition of 4 MiB from 1 MiB on, in an array of 4 MiB.
    expect(await shown(disk)).toEqual([['p1', 'ext4', 2 * MIB, 3 * MIB]]);
    writeExt4(disk.content.subarray(2 * MIB), SIZE);
    expect(await why(disk)).toEqual(['the ext4 in it is larger than the array that it lies in']);
  });

  it('of several members of one array are those of the newest', async () => {
    const image = imageWith(() => undefined, 2 * SIZE + MIB);
    partitioned(() => undefined, image);
    image.content.set([0, 0, 2, 0, 0x83, 0xff, 0xff, 0xff], 462);
    image.content.writeUInt32LE((SIZE + MIB) / 512, 470);
    image.content.writeUInt32LE(SIZE / 512, 474);
    for (const [i, events] of [41, 42].entries()) {
      const area = image.content.subarray(MIB + i * SIZE, MIB + (i + 1) * SIZE);
      write1(area, { device: i, events });
      writeExt4(area.subarray(MIB), 3 * MIB);
    }
    const areas = await findAreas(image, 'test');
    expect(areas.map((a) => [a.name, a.holds])).toEqual([
      ['p1', 'none'],
      ['p2', 'files'],
    ]);
    expect(whyNotShown(areas[0]!)).toMatch(
      /^it is an older member of the RAID 1 array .* of which p2 is one/,
    );
  });

  it('of disks that a BIOS puts together are none', async () => {
    const image = partitioned(
      (area) => writeExt4(area, SIZE - MIB),
      imageWith(() => undefined, SIZE + 3 * MIB),
    );
    const end = image.content.length;
    image.content.write('Intel Raid ISM Cfg Sig. 1.1.00', end - 1024);
    // A disk without volumes.
    expect(await shown(image)).toEqual([['p1', 'ext4', MIB, SIZE]]);
    image.content[end - 1024 + 0x39] = 1;
    expect(await why(image)).toEqual([
      expect.stringContaining('BIOS RAID in the format of Intel (IMSM)'),
    ]);
    image.content.fill(0, end - 1024);
    image.content.writeUInt32BE(0xde11de11, end - 512);
    expect(await why(image)).toEqual([expect.stringContaining('(DDF)')]);
  });
});
