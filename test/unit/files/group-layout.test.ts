/** What lies on several volumes of a group: found where all of it is there, named where it is not, and nothing else of the others. */
import { beforeEach, describe, expect, it } from 'vitest';

import { systemClock } from '../../../src/clock.js';
import { crc32c, giveIdentity, readBtrfs } from '../../../src/files/btrfs.js';
import type { Companions, FindCompanions } from '../../../src/files/companions.js';
import { findPointAreas, type PointLayout } from '../../../src/files/group-layout.js';
import { lookAt, type Look } from '../../../src/files/history-look.js';
import { isForLvm, whyNotShown } from '../../../src/files/layout.js';
import { volumePieces } from '../../../src/files/lvm.js';
import { MemoryImage } from '../../support/image-memory.js';
import {
  EXTENT,
  groupText,
  lvText,
  START,
  UUIDS,
  writePv,
  type PvOptions,
} from '../../support/lvm-metadata.js';

const MIB = 1024 * 1024;
const BYTES = 3 * MIB;

/** A disk that is one physical volume. */
function physicalVolume(seed: number, options: PvOptions): MemoryImage {
  const image = new MemoryImage([{ length: BYTES, hole: false }], seed);
  image.content.fill(0, 0, START);
  writePv(image.content, 0, BYTES, options);
  return image;
}

/** As much of an ext4 as is needed to be taken for one. */
function ext4(image: MemoryImage, at: number): void {
  image.content.fill(0, at, at + 2048);
  image.content.writeUInt16LE(0xef53, at + 1024 + 0x38);
  image.content.writeUInt32LE(1, at + 1024 + 0x4c);
  image.content.writeUInt32LE(192, at + 1024 + 4);
  image.content.writeUInt32LE(8192, at + 1024 + 0x20);
  image.content.writeUInt32LE(0x40, at + 1024 + 0x60);
}

const at = (extent: number): number => START + extent * EXTENT;
/** A volume on both disks, and one on the first alone. */
const both = lvText('both', [
  { extents: 2, stripes: [['pv0', 1]] },
  { extents: 3, stripes: [['pv1', 4]] },
]);
const home = lvText('home', [{ extents: 2, stripes: [['pv0', 5]] }]);
const away = lvText('away', [{ extents: 2, stripes: [['pv1', 10]] }]);

let asked = 0;
beforeEach(() => {
  asked = 0;
});

function others(
  there: Readonly<Record<string, MemoryImage>>,
  missing: Companions['missing'] = [],
): FindCompanions {
  return () => {
    asked++;
    return Promise.resolve({
      group: 'data',
      there: Object.entries(there).map(([volume, image], index) => ({
        volume,
        index,
        openImage: () => Promise.resolve(image),
      })),
      missing,
    });
  };
}
const look = (image: MemoryImage, companions?: FindCompanions): Promise<PointLayout> =>
  findPointAreas({ openImage: () => Promise.resolve(image), name: 'web/sda #1', companions });
const shown = ({ areas }: PointLayout): readonly string[] =>
  areas.filter((a) => a.holds === 'files' && whyNotShown(a) === undefined).map((a) => a.name);
const reasons = ({ areas }: PointLayout): readonly string[] =>
  areas.flatMap((a) => (a.left ?? []).map((l) => l.reason));

describe('a volume group on two volumes', () => {
  const disks = (lvs: readonly string[]): readonly [MemoryImage, MemoryImage] => {
    const text = groupText(lvs);
    const pair = [
      physicalVolume(1, { uuid: UUIDS[0], text }),
      physicalVolume(2, { uuid: UUIDS[1], text }),
    ] as const;
    ext4(pair[0], at(1));
    ext4(pair[0], at(5));
    ext4(pair[1], at(10));
    return pair;
  };

  it('is read from both, byte by byte, seen from either', async () => {
    const [a, b] = disks([both, home, away]);
    const wanted = Buffer.concat([
      a.content.subarray(at(1), at(3)),
      b.content.subarray(at(4), at(7)),
    ]);
    for (const [own, other] of [
      [a, b],
      [b, a],
    ] as const) {
      const layout = await look(own, others({ 'web/other': other }));
      expect(shown(layout)).toEqual(['vg/both', 'vg/home', 'vg/away']);
      expect(layout.others).toEqual(['web/other']);
      expect([layout.missing, reasons(layout)]).toEqual([[], []]);
      const volume = layout.areas.find((x) => x.name === 'vg/both')?.volume?.volume;
      if (volume === undefined) throw new Error('it is no volume');
      const image = await layout.openImage();
      const found = Buffer.alloc(volume.sizeBytes);
      let done = 0;
      for (const { imageOffset, length } of volumePieces(volume, 0, volume.sizeBytes)) {
        await image.read(found.subarray(done, done + length), imageOffset);
        done += length;
      }
      expect(found.equals(wanted)).toBe(true);
      await image.close();
    }
    expect(asked).toBe(2);
    // What was opened to look and to read is closed.
    expect([a.closed, b.closed]).toEqual([4, 4]);
  });

  it('of which nothing lies on the other one is looked at alone', async () => {
    const [a] = disks([home]);
    const layout = await look(a, others({}));
    expect([shown(layout), layout.isSpread, asked]).toEqual([['vg/home'], false, 0]);
  });

  it('of which a part is missing: it is said of what and why, and the rest is there', async () => {
    const [a, b] = disks([both, home]);
    const why = 'web/sdb has no point of that instant';
    const wanted = `vg/both: a part of it lies on a physical volume that is not in this image: ${why}`;
    const layout = await look(a, others({}, [{ volume: 'web/sdb', reason: why }]));
    expect([shown(layout), layout.missing]).toEqual([['vg/home'], [wanted]]);
    expect(layout.areas.some(isForLvm)).toBe(false);

    // One that cannot be read counts as missing.
    b.damaged.push({ offset: 0, length: BYTES, message: 'a pack is damaged' });
    const damaged = await look(a, others({ 'web/sdb': b }));
    expect(shown(damaged)).toEqual(['vg/home']);
    expect(damaged.missing).toEqual([
      expect.stringContaining('web/sdb cannot be read: a pack is damaged'),
    ]);

    // Its metadata can, and what lies there not: no more is lost than that.
    b.damaged.length = 0;
    b.damaged.push({ offset: at(0), length: BYTES - at(0), message: 'another pack is damaged' });
    const [c] = disks([both, home, away]);
    const later = await look(c, others({ 'web/sdb': b }));
    expect(shown(later)).toEqual(['vg/home']);
    expect(later.missing.join()).toContain('another pack is damaged');
    b.damaged.length = 0;

    // All are there, and it is nowhere.
    const elsewhere = await look(
      a,
      others({ 'web/sdc': new MemoryImage([{ length: MIB, hole: true }]) }),
    );
    expect([shown(elsewhere), elsewhere.missing]).toEqual([['vg/home'], []]);
    expect(reasons(elsewhere)).toEqual([
      expect.stringContaining('no other volume of the group "data" has the rest at that instant'),
    ]);

    // Of no group.
    const alone = await look(a);
    expect([shown(alone), alone.missing, alone.isSpread]).toEqual([['vg/home'], [], true]);
    expect(alone.elsewhere).toEqual([wanted.replace(`: ${why}`, '')]);
    expect([layout.elsewhere, elsewhere.elsewhere]).toEqual([
      [],
      [expect.stringContaining(wanted.replace(why, ''))],
    ]);
  });

  it('of which a part is missing: of a file on it nobody says that it is not there', async () => {
    const [a] = disks([both, home]);
    const found = async (path: string): Promise<Look['found']> => {
      const signal = new AbortController().signal;
      const openImage = (): Promise<MemoryImage> => Promise.resolve(a);
      const common = { name: 'web/sda #1', clock: systemClock, events: () => undefined, signal };
      const look = await lookAt({ ...common, openImage, path, backend: 'vm', cacheDir: '/none' });
      return look.found;
    };
    const isMissing = { state: 'unreadable', reason: expect.stringContaining('vg/both: a part') };
    expect(await found('vg/both:/etc/x')).toEqual(isMissing);
    expect(await found('label-of-both:/etc/x')).toEqual(isMissing);
  });

  it('needs no metadata on each of its disks', async () => {
    const text = groupText([both]);
    const a = physicalVolume(1, { uuid: UUIDS[0] });
    const b = physicalVolume(2, { uuid: UUIDS[1], text });
    ext4(a, at(1));
    expect(shown(await look(a, others({ 'web/sdb': b })))).toEqual(['vg/both']);
    expect(shown(await look(b, others({ 'web/sda': a })))).toEqual(['vg/both']);
  });

  it('nothing else of the others is shown, and names stay what they are alone', async () => {
    const [a, b] = disks([both, home]);
    const text = groupText([lvText('root', [{ extents: 2, stripes: [['pv0', 0]] }])])
      .replace('vgvgvg-id', 'others-id')
      .replaceAll('AAAAAA', 'CCCCCC');
    const c = physicalVolume(3, { uuid: UUIDS[0].replaceAll('A', 'C'), text });
    ext4(c, at(0));
    const d = new MemoryImage([{ length: MIB, hole: true }]);
    ext4(d, 0);
    const layout = await look(a, others({ 'web/sdc': c, 'web/sdd': d, 'web/sdb': b }));
    expect(shown(layout)).toEqual(['vg/both', 'vg/home']);
    expect(layout.others).toEqual(['web/sdb']);
    expect(layout.areas.some((x) => x.name.startsWith('web/sdc'))).toBe(false);
  });

  it('a copy of one of its disks: the own one counts, and of two others none', async () => {
    const [a, b] = disks([both, home]);
    const [x, y] = disks([both, home]);
    expect(shown(await look(a, others({ 'web/sdb': b, 'web/copy': x })))).toEqual([
      'vg/both',
      'vg/home',
    ]);
    const layout = await look(a, others({ 'web/sdb': b, 'web/copy': y }));
    expect(shown(layout)).toEqual(['vg/home']);
    expect(reasons(layout).join()).toContain(
      'web/copy:disk and web/sdb:disk are copies of one physical volume',
    );
  });
});

describe('btrfs on several volumes', () => {
  const SUPER = 64 * 1024;
  const FSID = Buffer.alloc(16, 0x5a);
  const device = (id: number, devices: number, fsid = FSID): MemoryImage => {
    const image = new MemoryImage([{ length: MIB, hole: true }]);
    const bytes = image.content.subarray(SUPER, SUPER + 4096);
    fsid.copy(bytes, 0x20);
    bytes.write('_BHRfS_M', 0x40, 'latin1');
    bytes.writeBigUInt64LE(BigInt(devices), 0x88);
    bytes.writeBigUInt64LE(BigInt(id), 0xc9);
    bytes.writeUInt32LE(crc32c(bytes.subarray(32)), 0);
    return image;
  };

  it('is one file system with its other devices, where each of them is there once', async () => {
    const three = [1, 2, 3].map((id) => device(id, 3));
    const [a, b, c] = three as [MemoryImage, MemoryImage, MemoryImage];
    const foreign = device(2, 3, Buffer.alloc(16, 1));
    const layout = await look(b, others({ 'web/sda': a, 'web/x': foreign, 'web/sdc': c }));
    expect(shown(layout)).toEqual(['disk']);
    const [area] = layout.areas;
    const image = await layout.openImage();
    for (const [i, part] of [area, ...(area?.parts ?? [])].entries()) {
      const found = await readBtrfs(image, part?.offsetBytes);
      expect(found).toEqual({ fsid: FSID.toString('hex'), devices: 3, device: [2n, 1n, 3n][i] });
    }
    const lacks = await look(b, others({ 'web/sda': a }, [{ volume: 'web/sdc', reason: 'gone' }]));
    expect(shown(lacks)).toEqual([]);
    expect(lacks.missing).toEqual(['the btrfs in disk: gone']);
    expect(lacks.areas.map(whyNotShown)).toEqual([
      'the btrfs in it lies on 3 devices and is not shown: gone',
    ]);
    const twice = await look(b, others({ 'web/sda': a, 'web/sdc': c, 'web/copy': device(3, 3) }));
    expect(shown(twice)).toEqual([]);
    expect(await look(b).then(shown)).toEqual([]);
  });

  it('may lie on two partitions of one volume, which needs no other one', async () => {
    const disk = new MemoryImage([{ length: 4 * MIB, hole: true }]);
    disk.content.writeUInt16LE(0xaa55, 510);
    for (const i of [0, 1]) {
      const entry = 446 + i * 16;
      disk.content.writeUInt8(0x83, entry + 4);
      disk.content.writeUInt32LE((2048 * (i * 3 + 2)) / 2, entry + 8);
      disk.content.writeUInt32LE(2048, entry + 12);
      device(i + 1, 2).content.copy(disk.content, (1024 * 1024 * (i * 3 + 2)) / 2);
    }
    const layout = await look(disk, others({}));
    expect([shown(layout), layout.isSpread, asked]).toEqual([['p1'], false, 0]);
    expect(layout.areas[0]?.parts?.map((p) => [p.name, p.offsetBytes])).toEqual([
      ['p2', 2.5 * MIB],
    ]);
  });

  it('gets an identity of its own without a change of what is in it', async () => {
    const image = device(1, 2);
    const writable = Object.assign(image, {
      write: (data: Uint8Array, offset: number): Promise<void> => {
        image.content.set(data, offset);
        return Promise.resolve();
      },
    });
    const fsid = Buffer.alloc(16, 7);
    for (const other of [fsid, Buffer.alloc(16, 8)]) {
      await giveIdentity(writable, [0], other);
      const bytes = image.content.subarray(SUPER, SUPER + 4096);
      expect(bytes.subarray(0x20, 0x30).equals(other)).toBe(true);
      // metadata_uuid: what the trees carry.
      expect(bytes.subarray(0x23b, 0x24b).equals(FSID)).toBe(true);
      expect(bytes.readBigUInt64LE(0xbc)).toBe(0x400n);
      expect(bytes.readUInt32LE(0)).toBe(crc32c(bytes.subarray(32)));
    }
    image.content.writeUInt8(1, SUPER + 100);
    await expect(giveIdentity(writable, [0], fsid)).rejects.toThrow(/super block .* is damaged/);
    image.content.writeUInt16LE(1, SUPER + 0xc4);
    await expect(giveIdentity(writable, [0], fsid)).rejects.toThrow(/checksums/);
  });

  it('its checksum is CRC-32C', () => {
    // RFC 3720, B.4.
    expect(crc32c(Buffer.alloc(32))).toBe(0x8a9136aa);
    expect(crc32c(Buffer.from('123456789'))).toBe(0xe3069283);
  });
});
