import { crc32 } from 'node:zlib';

import fc from 'fast-check';
import { describe, expect, it } from 'vitest';

import {
  growMbrLast,
  gptEntriesBytes,
  guidAt,
  moveGpt,
  parseGptEntries,
  parseGptHeader,
  parseMbr,
  type Gpt,
} from '../../../src/devices/gpt.js';
import { isKind } from '../../../src/errors.js';

const MIB = 1024 * 1024;

interface Shape {
  readonly sectorBytes: number;
  readonly sectors: number;
  /** First and last sector of each. */
  readonly partitions: readonly (readonly [number, number])[];
}

/** A disk's bytes with a GPT as the specification draws it, made without the code under test. */
function makeDisk({ sectorBytes, sectors, partitions }: Shape): Uint8Array {
  const disk = new Uint8Array(sectors * sectorBytes);
  const v = new DataView(disk.buffer);
  const entriesSectors = 16384 / sectorBytes;
  const entriesLba = 2;
  const backupLba = sectors - 1;
  const at = entriesLba * sectorBytes;
  partitions.forEach(([first, last], i) => {
    disk.fill(0x40 + i, at + i * 128, at + i * 128 + 32);
    v.setBigUint64(at + i * 128 + 32, BigInt(first), true);
    v.setBigUint64(at + i * 128 + 40, BigInt(last), true);
    disk.set(Buffer.from(`part ${i}`, 'utf16le'), at + i * 128 + 56);
  });
  const entries = disk.slice(at, at + 16384);
  disk.set(entries, (backupLba - entriesSectors) * sectorBytes);
  for (const [mine, other, table] of [
    [1, backupLba, entriesLba],
    [backupLba, 1, backupLba - entriesSectors],
  ] as const) {
    const h = mine * sectorBytes;
    disk.set(Buffer.from('EFI PART'), h);
    v.setUint32(h + 8, 0x10000, true);
    v.setUint32(h + 12, 92, true);
    v.setBigUint64(h + 24, BigInt(mine), true);
    v.setBigUint64(h + 32, BigInt(other), true);
    v.setBigUint64(h + 40, BigInt(entriesLba + entriesSectors), true);
    v.setBigUint64(h + 48, BigInt(backupLba - entriesSectors - 1), true);
    disk.fill(0xdd, h + 56, h + 72);
    v.setBigUint64(h + 72, BigInt(table), true);
    v.setUint32(h + 80, 128, true);
    v.setUint32(h + 84, 128, true);
    v.setUint32(h + 88, crc32(entries), true);
    v.setUint32(h + 16, crc32(disk.slice(h, h + 92)), true);
  }
  disk.set([0, 0, 2, 0, 0xee, 0xff, 0xff, 0xff, 1, 0, 0, 0], 446);
  v.setUint32(446 + 12, sectors - 1, true);
  disk.set([0x55, 0xaa], 510);
  return disk;
}

function read(disk: Uint8Array, sectorBytes: number, lba: number): Gpt {
  const headerSector = disk.slice(lba * sectorBytes, (lba + 1) * sectorBytes);
  const header = parseGptHeader(headerSector, lba);
  const at = header.entriesLba * sectorBytes;
  const entries = disk.slice(at, at + gptEntriesBytes(header));
  return {
    sectorBytes,
    header,
    headerSector,
    entries,
    partitions: parseGptEntries(header, entries),
  };
}

const shapes = fc
  .record({
    sectorBytes: fc.constantFrom(512, 4096),
    cuts: fc.uniqueArray(fc.integer({ min: 40, max: 900 }), { minLength: 2, maxLength: 8 }),
    sectors: fc.integer({ min: 1000, max: 1200 }),
    more: fc.integer({ min: 0, max: 5000 }),
  })
  .map(({ sectorBytes, cuts, sectors, more }) => {
    const sorted = cuts.toSorted((a, b) => a - b);
    const partitions: (readonly [number, number])[] = [];
    for (let i = 0; i + 1 < sorted.length; i += 2)
      partitions.push([sorted[i] ?? 0, sorted[i + 1] ?? 0]);
    return { sectorBytes, sectors, more, partitions: partitions.toReversed() };
  });

describe('GPT', () => {
  it('reads what the specification draws', () => {
    const disk = makeDisk({
      sectorBytes: 512,
      sectors: 2000,
      partitions: [
        [100, 199],
        [40, 99],
      ],
    });
    for (const lba of [1, 1999]) {
      const gpt = read(disk, 512, lba);
      expect(gpt.header).toMatchObject({
        myLba: lba,
        alternateLba: 2000 - lba,
        firstUsableLba: 34,
        lastUsableLba: 1966,
        entryCount: 128,
      });
      expect(gpt.partitions.map((p) => [p.number, p.firstLba, p.lastLba, p.name])).toEqual([
        [1, 100, 199, 'part 0'],
        [2, 40, 99, 'part 1'],
      ]);
    }
  });

  it('prints GUIDs as the specification orders their bytes', () => {
    // EFI system partition, UEFI 2.10 table 5.7.
    const bytes = Buffer.from('28732ac11ff8d211ba4b00a0c93ec93b', 'hex');
    expect(guidAt(bytes, 0)).toBe('c12a7328-f81f-11d2-ba4b-00a0c93ec93b');
  });

  it('moves any table to any larger disk: both copies sound, partitions the same but for the last one grown', () => {
    fc.assert(
      fc.property(shapes, fc.boolean(), ({ sectorBytes, sectors, more, partitions }, growLast) => {
        const old = makeDisk({ sectorBytes, sectors, partitions });
        const disk = new Uint8Array((sectors + more) * sectorBytes);
        disk.set(old);
        const before = read(disk, sectorBytes, 1);
        const { steps, grown } = moveGpt(before, disk.subarray(0, sectorBytes), disk.byteLength, {
          growLast,
        });
        for (const write of steps.flat()) disk.set(write.data, write.offset);
        const primary = read(disk, sectorBytes, 1);
        const backup = read(disk, sectorBytes, primary.header.alternateLba);
        expect(primary.header.alternateLba).toBe(sectors + more - 1);
        expect(backup.partitions).toEqual(primary.partitions);
        expect(primary.header).toMatchObject({
          diskGuid: before.header.diskGuid,
          firstUsableLba: before.header.firstUsableLba,
        });
        expect(
          primary.partitions.map((p) => (p.number === grown?.number ? { ...p, lastLba: 0 } : p)),
        ).toEqual(
          before.partitions.map((p) => (p.number === grown?.number ? { ...p, lastLba: 0 } : p)),
        );
        if (grown !== undefined) {
          const now = primary.partitions.find((p) => p.number === grown.number);
          expect(grown.newBytes).toBeGreaterThan(grown.oldBytes);
          expect(((now?.lastLba ?? 0) - (now?.firstLba ?? 0) + 1) * sectorBytes).toBe(
            grown.newBytes,
          );
          expect((grown.offsetBytes + grown.newBytes) % MIB).toBe(0);
        }
        expect(new DataView(disk.buffer).getUint32(446 + 12, true)).toBe(
          more === 0 && steps.length === 0 ? sectors - 1 : sectors + more - 1,
        );
        // The partitions' own bytes, zeros in this disk, were not written to.
        for (const p of before.partitions) {
          const range = [p.firstLba * sectorBytes, (p.lastLba + 1) * sectorBytes] as const;
          expect(
            Buffer.from(disk.buffer)
              .subarray(...range)
              .equals(Buffer.alloc(range[1] - range[0])),
          ).toBe(true);
        }
        // What is there after a move needs no other.
        expect(
          moveGpt(primary, disk.subarray(0, sectorBytes), disk.byteLength, { growLast }).steps,
        ).toEqual([]);
      }),
      { numRuns: 60 },
    );
  });

  it('finds every flipped bit of header and entries', () => {
    const disk = makeDisk({ sectorBytes: 512, sectors: 2000, partitions: [[100, 199]] }).slice(
      0,
      34 * 512,
    );
    const limit = 92 + 128;
    for (let i = 0; i < limit * 8; i++) {
      const at = i < 92 * 8 ? 512 * 8 + i : 1024 * 8 + (i - 92 * 8);
      const copy = Uint8Array.from(disk);
      copy[at >> 3] = (copy[at >> 3] ?? 0) ^ (1 << (at & 7));
      expect(() => read(copy, 512, 1)).toThrow();
    }
  });

  it('throws nothing but damaged or unsupported, whatever the bytes', () => {
    const base = makeDisk({ sectorBytes: 512, sectors: 2000, partitions: [[100, 199]] }).slice(
      512,
      1024,
    );
    fc.assert(
      fc.property(
        fc.integer({ min: 8, max: 91 }),
        fc.uint8Array({ minLength: 1, maxLength: 40 }),
        (at, noise) => {
          const sector = Uint8Array.from(base);
          sector.set(noise.subarray(0, 92 - at), at);
          const v = new DataView(sector.buffer);
          // A checksum that is right, over values that are not.
          const size = v.getUint32(12, true);
          if (size >= 92 && size <= 512) {
            v.setUint32(16, 0, true);
            v.setUint32(16, crc32(sector.subarray(0, size)), true);
          }
          try {
            const header = parseGptHeader(sector, 1);
            expect(gptEntriesBytes(header)).toBeLessThanOrEqual(4 * MIB);
          } catch (error) {
            expect(isKind(error, 'damaged', 'unsupported')).toBe(true);
          }
        },
      ),
      { numRuns: 500 },
    );
  });

  it('rejects overlapping and outlying partitions behind a right checksum', () => {
    for (const partitions of [
      [
        [100, 199],
        [199, 300],
      ],
      [[20, 50]],
      [[100, 1990]],
      [[200, 100]],
    ] as const) {
      expect(() => read(makeDisk({ sectorBytes: 512, sectors: 2000, partitions }), 512, 1)).toThrow(
        /overlap|outside/,
      );
    }
  });
});

describe('MBR', () => {
  function mbr(
    ...entries: readonly (readonly [type: number, first: number, sectors: number])[]
  ): Uint8Array {
    const sector = new Uint8Array(512);
    const v = new DataView(sector.buffer);
    v.setUint32(440, 0xcafe_0001, true);
    entries.forEach(([type, first, sectors], i) => {
      v.setUint8(446 + i * 16 + 4, type);
      v.setUint32(446 + i * 16 + 8, first, true);
      v.setUint32(446 + i * 16 + 12, sectors, true);
    });
    sector.set([0x55, 0xaa], 510);
    return sector;
  }

  it('is not seen in boot records of FAT and NTFS, in noise, or in zeros', () => {
    const fat = mbr();
    fat.set(Buffer.from('FAT32   '), 0x52);
    const ntfs = mbr([7, 63, 1000]);
    ntfs.set(Buffer.from('NTFS    '), 3);
    const status = mbr([0x83, 63, 1000]);
    status[446] = 0x17;
    for (const sector of [fat, ntfs, status, new Uint8Array(512), mbr([0x83, 5000, 10])])
      expect(parseMbr(sector, 2000)).toBeUndefined();
    expect(parseMbr(mbr([0x83, 63, 1000]), 2000)).toMatchObject({
      id: 'cafe0001',
      protective: false,
    });
  });

  it('lets the partition that lies last grow, whatever its slot', () => {
    const { steps, grown } = growMbrLast(
      mbr([0x83, 6144, 2048], [0x83, 2048, 4096]),
      512,
      100 * MIB + 700,
    );
    expect(grown).toEqual({ number: 1, offsetBytes: 3 * MIB, oldBytes: MIB, newBytes: 97 * MIB });
    const after = parseMbr(steps[0]?.[0]?.data ?? new Uint8Array(), 300_000);
    expect(after?.entries).toEqual([
      { slot: 1, active: false, type: 0x83, firstLba: 6144, sectors: 97 * 2048 },
      { slot: 2, active: false, type: 0x83, firstLba: 2048, sectors: 4096 },
    ]);
  });

  it('stops where its 32 bits end', () => {
    const { grown } = growMbrLast(mbr([0x83, 2048, 2048]), 512, 3 * 2 ** 40);
    expect((grown?.offsetBytes ?? 0) + (grown?.newBytes ?? 0)).toBeLessThanOrEqual(2 ** 32 * 512);
    expect(grown?.newBytes).toBeGreaterThan(1.9 * 2 ** 40);
  });

  it('does nothing where there is nothing to gain, and refuses extended and protective ones', () => {
    expect(growMbrLast(mbr([0x83, 2048, 2048]), 512, 2 * MIB)).toEqual({
      steps: [],
      grown: undefined,
    });
    expect(() => growMbrLast(mbr([0x0f, 2048, 2048]), 512, 20 * MIB)).toThrow(/logical/);
    expect(() => growMbrLast(mbr([0xee, 1, 2048]), 512, 20 * MIB)).toThrow(/protects a GPT/);
  });
});
