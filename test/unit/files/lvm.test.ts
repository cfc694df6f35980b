/** LVM2's metadata as b2 reads it by itself, on physical volumes built here byte by byte. */
import { crc32 } from 'node:zlib';
import fc from 'fast-check';
import { describe, expect, it } from 'vitest';

import { findAreas, volumesIn } from '../../../src/files/layout.js';
import {
  findLogicalVolumes,
  lvmChecksum,
  parseLvmText,
  volumePieces,
  type LogicalVolume,
} from '../../../src/files/lvm.js';
import { placeVolumes, withVolumes } from '../../../src/files/volumes-image.js';
import { openTemporaryOverlay } from '../../../src/nbd/index.js';
import { MemoryImage } from '../../support/image-memory.js';
import {
  AREA_AT,
  AREA_BYTES,
  EXTENT,
  groupText,
  lvText,
  START,
  UUIDS,
  writePv,
  type PvOptions,
  type Segment,
} from '../../support/lvm-metadata.js';

const KIB = 1024;
const MIB = KIB * KIB;
/** LVM's own way to compute it, a nibble at a time (calc_crc of lib/misc/crc.c). */
function slowChecksum(bytes: Uint8Array): number {
  let crc = 0xf597a6cf;
  for (const byte of bytes) {
    crc ^= byte;
    for (let i = 0; i < 8; i++) crc = (crc & 1) !== 0 ? (crc >>> 1) ^ 0xedb88320 : crc >>> 1;
  }
  return crc >>> 0;
}

/** Two physical volumes of 2 MiB at 1 and 3 MiB of an image; 16 extents each. */
const PLACES = [
  { name: 'p1', offsetBytes: MIB, sizeBytes: 2 * MIB },
  { name: 'p2', offsetBytes: 3 * MIB, sizeBytes: 2 * MIB },
];

function imageOf(first: Partial<PvOptions>, second: Partial<PvOptions> = {}): MemoryImage {
  const image = new MemoryImage([{ length: 6 * MIB, hole: false }]);
  writePv(image.content, MIB, 2 * MIB, { uuid: UUIDS[0], ...first });
  writePv(image.content, 3 * MIB, 2 * MIB, { uuid: UUIDS[1], ...second });
  return image;
}

const data = (pv: 0 | 1, extent: number): number =>
  (PLACES[pv]?.offsetBytes ?? 0) + START + extent * EXTENT;

describe('the metadata', () => {
  it('takes no more time and memory than its length deserves, whatever is in it', async () => {
    const n = 2 ** 22;
    expect(parseLvmText(`${' '.repeat(n)}a=1${'#\n'.repeat(n)}#${'x'.repeat(n)}`).get('a')).toBe(1);
    expect(parseLvmText(`a="${'x'.repeat(n)}${'\\"'.repeat(n)}"`).get('a')).toHaveLength(2 * n);
    expect(() => parseLvmText(`a="${'x'.repeat(n)}`)).toThrow('no LVM text');
    expect(() => parseLvmText(`a="${'\\"'.repeat(n)}`)).toThrow('no LVM text');
    // Behind each zero byte the end was looked for anew.
    const zeros = `${'\0'.repeat(AREA_BYTES - 1024)}x`;
    const { left } = await findLogicalVolumes(imageOf({ text: zeros }), PLACES);
    expect(left.map((l) => l.reason)).toEqual(['it is no LVM text']);
  });

  it('is not followed where it names more volumes than anybody has', async () => {
    const lvs = Array.from({ length: 70_000 }, (_, i) => `v${i}{}`);
    const image = imageOf({ text: groupText([lvs.join(' ')]) });
    const { left, groups } = await findLogicalVolumes(image, PLACES);
    expect(left.map((l) => l.reason)).toEqual(['vg has too many volumes']);
    expect(groups.map((g) => g.shown)).toEqual(['vg']);
  });

  it('has checksums as LVM computes them', () => {
    expect(lvmChecksum(Buffer.from('LVM2'))).toBe(slowChecksum(Buffer.from('LVM2')));
    const all = Buffer.from(Array.from({ length: 256 }, (_, i) => i));
    expect(lvmChecksum(all)).toBe(slowChecksum(all));
    expect(lvmChecksum(all)).not.toBe(crc32(all));
  });

  it('is a text with sections, lists, comments and quoted text', () => {
    const text = 'a { b = "x\\"y" # c = 1\n l = [1, "two",\n3] e = [] n = -5 }\nc.d+e_f = 0.5';
    const found = parseLvmText(text);
    expect(found.get('a')).toEqual(
      new Map<string, unknown>([
        ['b', 'x"y'],
        ['l', [1, 'two', 3]],
        ['e', []],
        ['n', -5],
      ]),
    );
    expect(found.get('c.d+e_f')).toBe(0.5);
    for (const bad of ['a {', 'a = [1', 'a b', '= 1', 'a = "x', '}', `${'a {'.repeat(50)}`])
      expect(() => parseLvmText(bad)).toThrow();
  });

  it('nonsense is never a crash of another kind', async () => {
    await fc.assert(
      fc.asyncProperty(
        fc.string({ unit: fc.constantFrom(...'ab{}[]=,"\\#\n 1-') }),
        async (inside) => {
          const image = imageOf({ text: groupText([inside]) });
          const { volumes } = await findLogicalVolumes(image, PLACES);
          expect(volumes).toEqual([]);
        },
      ),
      { numRuns: 50 },
    );
  });
});

describe('logical volumes', () => {
  const linear = lvText('root', [
    { extents: 3, stripes: [['pv0', 2]] },
    { extents: 2, stripes: [['pv1', 5]] },
  ]);
  const striped = lvText('data', [
    {
      extents: 4,
      stripeKiB: 16,
      stripes: [
        ['pv0', 8],
        ['pv1', 9],
      ],
    },
  ]);

  it('are found with their segments, wherever the text lies in its ring', async () => {
    for (const textAt of [512, 8192, AREA_BYTES - 100]) {
      const found = await findLogicalVolumes(
        imageOf({ text: groupText([linear, striped]), textAt }),
        PLACES,
      );
      expect(found).toEqual({
        volumes: [
          {
            name: 'vg/root',
            sizeBytes: 5 * EXTENT,
            segments: [
              { offset: 0, length: 3 * EXTENT, stripeBytes: 3 * EXTENT, stripes: [data(0, 2)] },
              {
                offset: 3 * EXTENT,
                length: 2 * EXTENT,
                stripeBytes: 2 * EXTENT,
                stripes: [data(1, 5)],
              },
            ],
          },
          {
            name: 'vg/data',
            sizeBytes: 4 * EXTENT,
            segments: [
              {
                offset: 0,
                length: 4 * EXTENT,
                stripeBytes: 16 * KIB,
                stripes: [data(0, 8), data(1, 9)],
              },
            ],
          },
        ],
        left: [],
        groups: [
          { id: 'vgvgvg-id', shown: 'vg', place: 'p1', places: ['p1', 'p2'], isPartial: false },
        ],
        strays: [],
        copies: [],
      });
    }
  });

  it('of the newest metadata count', async () => {
    const image = imageOf(
      { text: groupText([striped], 'vg', 7) },
      { text: groupText([linear], 'vg', 8) },
    );
    const { volumes } = await findLogicalVolumes(image, PLACES);
    expect(volumes.map((v) => v.name)).toEqual(['vg/root']);
  });

  const reasonFor = async (lvs: readonly string[], places = PLACES): Promise<readonly string[]> => {
    const { volumes, left } = await findLogicalVolumes(imageOf({ text: groupText(lvs) }), places);
    expect(volumes).toEqual([]);
    return left.map((l) => l.reason);
  };

  it('that only LVM can read are named with the reason', async () => {
    const one = (segment: Segment, status?: string): string => lvText('x', [segment], status);
    expect(await reasonFor([one({ extents: 1, type: 'thin' })])).toEqual([
      'vg/x: it is of type thin',
    ]);
    expect(await reasonFor([one({ extents: 1, type: 'raid1' })])).toEqual([
      'vg/x: it is of type raid1',
    ]);
    expect(await reasonFor([one({ extents: 1, stripes: [['pvmove0', 0]] })])).toEqual([
      'vg/x: it is being moved, or lies on another logical volume',
    ]);
    expect(await reasonFor([one({ extents: 2, stripes: [['pv0', 15]] })])).toEqual([
      'vg/x: it lies outside of its physical volume',
    ]);
    expect(await reasonFor([one({ extents: 2, stripes: [['pv1', 0]] })], [PLACES[0]!])).toEqual([
      'vg/x: a part of it lies on a physical volume that is not in this image',
    ]);
    expect(
      await reasonFor([one({ extents: 2, stripes: [['pv1', 0]] }, '"READ", "VISIBLE", "MERGING"')]),
    ).toEqual(['vg/x: LVM is at work on it']);
    expect(
      await reasonFor([
        one({
          extents: 3,
          stripeKiB: 40,
          stripes: [
            ['pv0', 0],
            ['pv1', 0],
          ],
        }),
      ]),
    ).toEqual(['vg/x: its stripes make no sense']);
  });

  it('what is hidden or a pool is none, and a snapshot is no volume of its own', async () => {
    const cow = lvText('old', [{ extents: 1, stripes: [['pv0', 9]] }], '"READ", "WRITE"');
    const joined = (how: string): string =>
      lvText('snapshot0', [
        { extents: 5, type: 'snapshot', more: `origin = "root"\n${how} = "old"` },
      ]);
    const hidden = lvText('h', [{ extents: 1, stripes: [['pv0', 9]] }], '"READ", "WRITE"');
    const pool = lvText('pool', [{ extents: 1, type: 'thin-pool' }]);
    const image = imageOf({ text: groupText([linear, cow, joined('cow_store'), hidden, pool]) });
    const found = await findLogicalVolumes(image, PLACES);
    expect(found.volumes.map((v) => v.name)).toEqual(['vg/root']);
    expect(found.left).toEqual([
      { place: 'p1', volume: 'vg/old', reason: 'vg/old: it is a snapshot' },
    ]);
    expect(await reasonFor([linear, cow, joined('merging_store')])).toEqual([
      'vg/root: a snapshot is being merged into it',
      'vg/old: it is a snapshot',
    ]);
  });

  it('have names that are harmless, or are not shown', async () => {
    const parts: Segment[] = [{ extents: 1, stripes: [['pv0', 0]] }];
    for (const name of ['"$(reboot)"', '".."', '"a/b"', '"-x"', '"a b"']) {
      expect(await reasonFor([lvText(name, parts)])).toEqual(['vg/?: its name is none']);
      const image = imageOf({ text: groupText([linear], name) });
      const { volumes, left } = await findLogicalVolumes(image, PLACES);
      expect(volumes).toEqual([]);
      expect(left).toEqual([{ place: 'p1', reason: 'the name of its volume group is none' }]);
    }
    // What is called like a partition would hide one.
    const { volumes } = await findLogicalVolumes(
      imageOf({ text: groupText([linear], 'p1') }),
      PLACES,
    );
    expect(volumes.map((v) => v.name)).toEqual(['p1-vgvgvg/root']);
  });

  it('of damaged metadata are none', async () => {
    const reasonOf = async (at: number): Promise<unknown> => {
      const image = imageOf({ text: groupText([linear]) });
      image.content[MIB + at] = (image.content[MIB + at] ?? 0) ^ 1;
      const { volumes, left } = await findLogicalVolumes(image, PLACES);
      expect(volumes).toEqual([]);
      return left;
    };
    expect(await reasonOf(512 + 40)).toEqual([{ place: 'p1', reason: 'its label is damaged' }]);
    expect(await reasonOf(AREA_AT + 48)).toEqual([
      { place: 'p1', reason: 'the header of its metadata is damaged' },
    ]);
    expect(await reasonOf(AREA_AT + 600)).toEqual([
      { place: 'p1', reason: 'its metadata is damaged' },
    ]);
  });

  it('behind the end of an image read and write what lies in it', async () => {
    const base = imageOf({ text: groupText([linear, striped]) });
    for (let i = 0; i < base.content.length; i += 4)
      if (i >= 2 * MIB && i % (2 * MIB) < MIB) base.content.writeUInt32LE(i, i);
    const { volumes } = await findLogicalVolumes(base, PLACES);
    const placed = placeVolumes(base.sizeBytes, volumes);
    const image = withVolumes(await openTemporaryOverlay({ base }), placed);
    try {
      for (const { volume, offsetBytes } of placed) {
        // The same, byte by byte, by the definition of stripes.
        const byteAt = (v: LogicalVolume, at: number): number => {
          const s = v.segments.findLast((x) => x.offset <= at);
          if (s === undefined) throw new Error('no segment');
          const unit = Math.floor((at - s.offset) / s.stripeBytes);
          const stripe = s.stripes[unit % s.stripes.length] ?? NaN;
          const row = Math.floor(unit / s.stripes.length);
          return stripe + row * s.stripeBytes + ((at - s.offset) % s.stripeBytes);
        };
        await fc.assert(
          fc.asyncProperty(
            fc.nat(volume.sizeBytes - 1),
            fc.nat(100_000),
            async (offset, length) => {
              const bytes = Math.min(length, volume.sizeBytes - offset);
              const got = Buffer.alloc(bytes);
              await image.read(got, offsetBytes + offset);
              for (const i of [0, Math.floor(bytes / 2), bytes - 1])
                if (i >= 0 && i < bytes)
                  expect(got[i]).toBe(base.content[byteAt(volume, offset + i)]);
              const pieces = [...volumePieces(volume, offset, bytes)];
              expect(pieces.reduce((sum, p) => sum + p.length, 0)).toBe(bytes);
            },
          ),
          { numRuns: 25 },
        );
        const text = Buffer.from('written over a border of stripes and segments');
        const where = volume.name === 'vg/root' ? 3 * EXTENT - 20 : 16 * KIB - 20;
        await image.write(text, offsetBytes + where);
        const inImage = Buffer.alloc(1);
        for (const [i, byte] of text.entries()) {
          await image.read(inImage, byteAt(volume, where + i));
          expect(inImage[0]).toBe(byte);
        }
        await image.zero(offsetBytes + where, text.length, false);
        await image.read(text, offsetBytes + where);
        expect(text.every((byte) => byte === 0)).toBe(true);
      }
      const gap = Buffer.alloc(10, 1);
      await image.read(gap, base.sizeBytes);
      expect(gap.every((byte) => byte === 0)).toBe(true);
      await expect(image.write(gap, base.sizeBytes)).rejects.toThrow(RangeError);
      const runs = await image.extents(0, image.sizeBytes);
      expect(runs.reduce((at, r) => (expect(r.offset).toBe(at), at + r.length), 0)).toBe(
        image.sizeBytes,
      );
      expect(runs.some((r) => r.hole)).toBe(true);
      expect(await image.extents(0, image.sizeBytes, 1)).toHaveLength(1);
    } finally {
      await image.close();
    }
  });

  it('with file systems are areas of the image', async () => {
    const image = imageOf({ text: groupText([linear, striped]) });
    image.content.fill(0, 0, MIB);
    // An ext4 superblock at the beginning of root.
    const at = data(0, 2) + 1024;
    image.content.fill(0, at - 1024, at + 1024);
    image.content.writeUInt16LE(0xef53, at + 0x38);
    image.content.writeUInt32LE(1, at + 0x4c);
    image.content.writeUInt32LE(192, at + 4);
    image.content.writeUInt32LE(8192, at + 0x20);
    image.content.writeUInt32LE(0x40, at + 0x60);
    const whole = new MemoryImage([{ length: 2 * MIB, hole: false }]);
    image.content.copy(whole.content, 0, MIB, 3 * MIB);
    const areas = await findAreas(whole, 'test');
    // The second physical volume is missing: what lies on both is left to LVM, which says so.
    expect(areas.map((a) => [a.name, a.holds, a.left?.map((l) => l.reason)])).toEqual([
      [
        'disk',
        'container',
        [
          'vg/root: a part of it lies on a physical volume that is not in this image',
          'vg/data: a part of it lies on a physical volume that is not in this image',
        ],
      ],
    ]);
    expect(volumesIn(areas)).toEqual([]);
    const small = groupText([lvText('root', [{ extents: 3, stripes: [['pv0', 2]] }])]);
    writePv(whole.content, 0, 2 * MIB, { uuid: UUIDS[0], text: small });
    const [, root] = await findAreas(whole, 'test');
    expect(root).toMatchObject({
      name: 'vg/root',
      type: 'ext4',
      holds: 'files',
      sizeBytes: 3 * EXTENT,
      offsetBytes: 4 * MIB,
    });
  });
});
