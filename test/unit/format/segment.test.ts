import { crc32 } from 'node:zlib';
import fc from 'fast-check';
import { describe, expect, it } from 'vitest';
import { encodeExtents, HOLE, STRIPE_BLOCKS } from '../../../src/format/extent.js';
import { keyRing } from '../../../src/format/seal.js';
import {
  COMMIT_RECORD_BYTES,
  commitPageTable,
  decodeCommitPage,
  decodeCommitRecord,
  decodeExtentPage,
  decodeSegmentHeader,
  decodeSegmentIndex,
  decodeSegmentTrailer,
  encodeCommitRecord,
  encodeSegmentHeader,
  encodeSegmentIndex,
  encodeSegmentTrailer,
  extentPageTable,
  openPage,
  PageType,
  pageTable,
  sealPage,
  type CommitFields,
  type SegmentHeader,
  type SegmentIndex,
} from '../../../src/format/segment.js';

const HEADER: SegmentHeader = {
  encrypted: true,
  level: 3,
  volumeId: '0123456789abcdef0123456789abcdef',
  repositoryId: 'fedcba9876543210fedcba9876543210',
  salt: Buffer.from('a0a1a2a3a4a5a6a7a8a9aaabacadaeaf', 'hex'),
  firstSeq: 0x0102_0304_0506,
  lastSeq: 0x0102_0304_0607,
  createdNs: 0x1122_3344_5566_7788n,
};

const COMMIT: CommitFields = {
  seq: 0x0102_0304_0507,
  firstSeq: 0x0102_0304_0506,
  pointClass: 3,
  coverage: 1,
  flags: 2,
  epoch: 9,
  instantNs: 0x1111_1111_1111_1111n,
  startedNs: 0x2222_2222_2222_2222n,
  writtenNs: 0x3333_3333_3333_3333n,
  sizeBytes: 0x1234_5600,
  hash: Buffer.alloc(32, 0xcc),
  frame: 0x44,
  blocks: 0x55,
  storedBytes: 0x66,
};

function sampleIndex(): SegmentIndex {
  const x: SegmentIndex = {
    extents: extentPageTable(1),
    commits: commitPageTable(1),
    packs: pageTable(1),
    packCount: 2,
    extentCount: 3,
    commitCount: 4,
    prevHash: Buffer.alloc(32, 0xaa),
    lastHash: Buffer.alloc(32, 0xbb),
    lastFullFirstSeq: 0x0102_0304_0506,
  };
  x.extents.offset.set([96]);
  x.extents.records.set([3]);
  x.extents.stored.set([100]);
  x.extents.firstBlock.set([7]);
  x.extents.endBlock.set([0x20]);
  x.commits.offset.set([96 + 116]);
  x.commits.number.set([1]);
  x.commits.records.set([4]);
  x.commits.stored.set([200]);
  x.commits.firstSeq.set([0x0102_0304_0507]);
  x.commits.leastInstantNs.set([1n]);
  x.commits.greatestInstantNs.set([0xff00_0000_0000_0000n]);
  x.commits.points.set([2]);
  x.packs.offset.set([96 + 116 + 216]);
  x.packs.number.set([2]);
  x.packs.records.set([2]);
  x.packs.stored.set([48]);
  return x;
}
const INDEX_OFFSET = 96 + 116 + 216 + 64;

describe('golden bytes', () => {
  it('header', () => {
    const hex =
      '4232534547000000' +
      '0100' +
      '0100' +
      '03000000' +
      '0123456789abcdef0123456789abcdef' +
      'fedcba9876543210fedcba9876543210' +
      'a0a1a2a3a4a5a6a7a8a9aaabacadaeaf' +
      '0605040302010000' +
      '0706040302010000' +
      '8877665544332211' +
      '00000000';
    const bytes = encodeSegmentHeader(HEADER);
    expect(bytes.toString('hex', 0, 92)).toBe(hex);
    expect(bytes.readUInt32LE(92)).toBe(0xbb96_a6f7);
    expect(decodeSegmentHeader(bytes, 'x')).toEqual(HEADER);
  });

  it('header of a full map', () => {
    const full = { ...HEADER, encrypted: false, level: undefined, firstSeq: 1 };
    const bytes = encodeSegmentHeader(full);
    expect(bytes.toString('hex', 8, 16)).toBe('0100' + '0200' + '00000000');
    expect(decodeSegmentHeader(bytes, 'x')).toEqual(full);
  });

  it('commit record', () => {
    const bytes = Buffer.alloc(COMMIT_RECORD_BYTES);
    encodeCommitRecord(COMMIT, 0x77, bytes, 0);
    expect(bytes.toString('hex')).toBe(
      '0705040302010000' +
        '0605040302010000' +
        '03' +
        '01' +
        '0200' +
        '09000000' +
        '1111111111111111' +
        '2222222222222222' +
        '3333333333333333' +
        '0056341200000000' +
        'cc'.repeat(32) +
        '77000000' +
        '44000000' +
        '5500000000000000' +
        '6600000000000000',
    );
    expect(decodeCommitRecord(bytes, 0, 'x')).toEqual({ ...COMMIT, pack: 0x77 });
  });

  it('index', () => {
    const bytes = encodeSegmentIndex(sampleIndex());
    expect(bytes.toString('hex')).toBe(
      '01000000' +
        '01000000' +
        '01000000' +
        '02000000' +
        '0300000000000000' +
        '0400000000000000' +
        'aa'.repeat(32) +
        'bb'.repeat(32) +
        '0605040302010000' +
        '0000000000000000' +
        ('6000000000000000' +
          '00000000' +
          '03000000' +
          '0700000000000000' +
          '2000000000000000' +
          '64000000' +
          '00000000') +
        ('d400000000000000' +
          '01000000' +
          '04000000' +
          '0705040302010000' +
          '0100000000000000' +
          '00000000000000ff' +
          'c8000000' +
          '02000000') +
        ('ac01000000000000' + '02000000' + '02000000' + '30000000' + '00000000'),
    );
    expect(decodeSegmentIndex(bytes, HEADER, INDEX_OFFSET, 'x')).toEqual(sampleIndex());
  });

  it('trailer', () => {
    const bytes = encodeSegmentTrailer(0x0102_0304);
    expect(bytes.toString('hex')).toBe('42325345' + '0403020100000000' + '02faa7d4');
    expect(decodeSegmentTrailer(bytes, 0x0102_0304 + 1000, 'x')).toBe(0x0102_0304);
  });

  it('page, without encryption', () => {
    const keys = keyRing(Buffer.alloc(32, 1), false);
    const header = encodeSegmentHeader({ ...HEADER, encrypted: false });
    const page = sealPage(
      keys.segmentSealer(HEADER.salt),
      header,
      PageType.packIds,
      5,
      Buffer.from('00112233', 'hex'),
    );
    expect(page.toString('hex', 0, 20)).toBe(
      '03' + '00' + '0000' + '05000000' + '14000000' + '04000000' + '00112233',
    );
    expect(page.length).toBe(36);
  });
});

describe('damage', () => {
  const flips = (bytes: Buffer, check: (flipped: Buffer) => void): void => {
    for (let bit = 0; bit < bytes.length * 8; bit++) {
      const flipped = Buffer.from(bytes);
      flipped[bit >> 3] = (flipped[bit >> 3] ?? 0) ^ (1 << (bit & 7));
      check(flipped);
    }
  };
  const cuts = (bytes: Buffer, check: (cut: Buffer) => void): void => {
    for (let n = 0; n < bytes.length; n++) check(bytes.subarray(0, n));
  };
  const damagedError = expect.objectContaining({ kind: 'damaged' }) as unknown;
  const thrown = (call: () => unknown): unknown => {
    try {
      call();
    } catch (error) {
      return error;
    }
    return 'nothing';
  };

  it('every flipped bit and every cut of a header or trailer is found', () => {
    const header = encodeSegmentHeader(HEADER);
    const trailer = encodeSegmentTrailer(4711);
    const decodeHeader = (b: Buffer) =>
      expect(thrown(() => decodeSegmentHeader(b, 'x'))).toEqual(damagedError);
    const decodeTrailer = (b: Buffer) =>
      expect(thrown(() => decodeSegmentTrailer(b, 9999, 'x'))).toEqual(damagedError);
    flips(header, decodeHeader);
    cuts(header, decodeHeader);
    flips(trailer, decodeTrailer);
    cuts(trailer, decodeTrailer);
  });

  it.each([true, false])(
    'every flipped bit and every cut of a page is found (encrypted: %s)',
    (encrypted) => {
      const sealer = keyRing(Buffer.alloc(32, 1), encrypted).segmentSealer(HEADER.salt);
      const header = encodeSegmentHeader({ ...HEADER, encrypted });
      for (const plain of [Buffer.from('00112233445566778899', 'hex'), Buffer.alloc(4000, 3)]) {
        const page = sealPage(sealer, header, PageType.extents, 5, plain);
        expect(openPage(sealer, header, PageType.extents, 5, page, 'x', 0)).toEqual(plain);
        const open = (b: Buffer) =>
          expect(thrown(() => openPage(sealer, header, PageType.extents, 5, b, 'x', 0))).toEqual(
            damagedError,
          );
        flips(page, open);
        cuts(page, open);
        expect(thrown(() => openPage(sealer, header, PageType.extents, 4, page, 'x', 0))).toEqual(
          damagedError,
        );
        expect(thrown(() => openPage(sealer, header, PageType.commits, 5, page, 'x', 0))).toEqual(
          damagedError,
        );
        const other = encodeSegmentHeader({ ...HEADER, encrypted, level: 4 });
        expect(thrown(() => openPage(sealer, other, PageType.extents, 5, page, 'x', 0))).toEqual(
          damagedError,
        );
      }
    },
  );

  it('a newer version is refused as such, not as damage', () => {
    const bytes = encodeSegmentHeader(HEADER);
    bytes.writeUInt16LE(2, 8);
    bytes.writeUInt32LE(crc32(bytes.subarray(0, 92)), 92);
    expect(thrown(() => decodeSegmentHeader(bytes, 'x'))).toMatchObject({ kind: 'unsupported' });
  });

  it.each<[string, (x: SegmentIndex) => void]>([
    ['a page that is not where it belongs', (x) => x.commits.offset.set([300])],
    ['a page number twice', (x) => x.packs.number.set([1])],
    ['a page without records', (x) => x.extents.records.set([0])],
    ['a count that does not add up', (x) => x.extents.records.set([4])],
    ['a page that ends before it starts', (x) => x.extents.endBlock.set([7])],
    ['a commits page outside the range', (x) => x.commits.firstSeq.set([5])],
    ['pages that do not fill the segment', (x) => x.packs.stored.set([47])],
  ])('an index with %s is refused', (_, change) => {
    const x = sampleIndex();
    change(x);
    const bytes = encodeSegmentIndex(x);
    expect(thrown(() => decodeSegmentIndex(bytes, HEADER, INDEX_OFFSET, 'x'))).toEqual(
      damagedError,
    );
  });

  it('an index of another length or with reserved bytes is refused', () => {
    const bytes = encodeSegmentIndex(sampleIndex());
    cuts(bytes, (b) =>
      expect(thrown(() => decodeSegmentIndex(b, HEADER, INDEX_OFFSET, 'x'))).toEqual(damagedError),
    );
    for (const at of [104, 111, 112 + 36, 112 + 40 + 48 + 20]) {
      const changed = Buffer.from(bytes);
      changed[at] = 1;
      expect(thrown(() => decodeSegmentIndex(changed, HEADER, INDEX_OFFSET, 'x'))).toEqual(
        damagedError,
      );
    }
  });

  const record = { block: 7, count: 1, seq: 0, pack: 0, frame: 0, sub: 0, skip: 0 };
  const good = [record, { ...record, seq: 1, count: 9 }, { ...record, block: 0x1f, pack: HOLE }];
  it.each([
    ['out of order', [record, record, good[2]]],
    ['with a lower block later', [{ ...record, block: 8 }, record, good[2]]],
    ['of a commit that is not there', [record, { ...record, seq: 0x102 }, good[2]]],
    ['in a pack that is not there', [record, { ...record, seq: 1, pack: 2 }, good[2]]],
    ['that ends elsewhere', [record, { ...record, seq: 1 }, record]],
    ['too few', [record, good[2]]],
  ])('extents %s are refused', (_, list) => {
    const full = (l: readonly (typeof record | undefined)[]) =>
      encodeExtents(l.map((e) => e ?? record));
    const decode = (b: Buffer) => decodeExtentPage(b, 0, sampleIndex(), HEADER, 'x');
    expect(decode(full(good)).length).toBe(3);
    expect(thrown(() => decode(full(list)))).toEqual(damagedError);
  });

  it('an extent across a stripe, a hole with a place, and holes or overlaps in a full map are refused', () => {
    const decode = (list: (typeof record)[], header = HEADER) => {
      const x = sampleIndex();
      const end = Math.max(...list.map((e) => e.block + e.count));
      x.extents.firstBlock.set([list[0]?.block ?? 0]);
      x.extents.endBlock.set([end]);
      x.extents.records.set([list.length]);
      const bytes = encodeExtents(list.map((e) => ({ ...e, count: 1 })));
      list.forEach((e, i) => bytes.writeUInt32LE(e.count, i * 28 + 8));
      return decodeExtentPage(bytes, 0, x, header, 'x');
    };
    const fullMap: SegmentHeader = { ...HEADER, level: undefined, firstSeq: 1 };
    expect(decode([{ ...record, block: STRIPE_BLOCKS - 5, count: 5 }]).length).toBe(1);
    expect(thrown(() => decode([{ ...record, block: STRIPE_BLOCKS - 5, count: 6 }]))).toEqual(
      damagedError,
    );
    expect(
      thrown(() =>
        decode([
          { ...record, count: 0 },
          { ...record, block: 9 },
        ]),
      ),
    ).toEqual(damagedError);
    expect(thrown(() => decode([{ ...record, pack: HOLE, frame: 1 }]))).toEqual(damagedError);
    expect(decode([record, { ...record, block: 8 }], fullMap).length).toBe(2);
    expect(thrown(() => decode([{ ...record, pack: HOLE }], fullMap))).toEqual(damagedError);
    expect(
      thrown(() =>
        decode(
          [
            { ...record, count: 3 },
            { ...record, block: 8 },
          ],
          fullMap,
        ),
      ),
    ).toEqual(damagedError);
    expect(thrown(() => decode([{ ...record, seq: 1 }], fullMap))).toEqual(damagedError);
  });

  it('commits that are not what the index says are refused', () => {
    const header = { ...HEADER, lastSeq: 0x0102_0304_0507 };
    const x = { ...sampleIndex(), commitCount: 1 };
    x.commits.records.set([1]);
    x.commits.leastInstantNs.set([COMMIT.instantNs]);
    x.commits.greatestInstantNs.set([COMMIT.instantNs]);
    x.commits.points.set([1]);
    const page = (c: Partial<CommitFields>, pack = 1) => {
      const bytes = Buffer.alloc(COMMIT_RECORD_BYTES);
      encodeCommitRecord({ ...COMMIT, ...c }, pack, bytes, 0);
      return bytes;
    };
    const decode = (b: Buffer) => decodeCommitPage(b, 0, x, header, 'x');
    expect(decode(page({})).record(0)).toEqual({ ...COMMIT, pack: 1 });
    expect(thrown(() => decode(page({}, 2)))).toEqual(damagedError);
    expect(thrown(() => decode(page({ pointClass: 1 })))).toEqual(damagedError);
    expect(thrown(() => decode(page({ instantNs: 5n })))).toEqual(damagedError);
    expect(thrown(() => decode(page({ firstSeq: 5 })))).toEqual(damagedError);
    expect(thrown(() => decode(page({ seq: COMMIT.seq - 1 })))).toEqual(damagedError);
    expect(thrown(() => decode(Buffer.concat([page({}), page({})])))).toEqual(damagedError);
    for (const [at, value] of [
      [16, 5],
      [17, 3],
      [18, 4],
      [18, 0],
      // Beyond 2^53.
      [7, 0xff],
      [15, 0xff],
      [55, 0xff],
      [103, 0xff],
      [111, 0xff],
    ] as const) {
      const bytes = page({});
      bytes[at] = value;
      expect(thrown(() => decode(bytes))).toEqual(damagedError);
    }
  });
});

describe('round trips', () => {
  const u32 = fc.integer({ min: 0, max: 0xffff_ffff });
  const u64 = fc.bigInt({ min: 0n, max: 0xffff_ffff_ffff_ffffn });
  const safe = fc.maxSafeNat();
  const bytes = (n: number) =>
    fc.uint8Array({ minLength: n, maxLength: n }).map((b) => Buffer.from(b));
  const id = bytes(16).map((b) => b.toString('hex'));

  it('headers', () => {
    fc.assert(
      fc.property(
        fc.record({
          encrypted: fc.boolean(),
          level: fc.integer({ min: 0, max: 255 }),
          volumeId: id,
          repositoryId: id,
          salt: bytes(16),
          firstSeq: fc.integer({ min: 1, max: 2 ** 50 }),
          span: u32,
          createdNs: u64,
        }),
        ({ span, ...h }) => {
          const header: SegmentHeader = { ...h, lastSeq: h.firstSeq + span };
          expect(decodeSegmentHeader(encodeSegmentHeader(header), 'x')).toEqual(header);
        },
      ),
    );
  });

  it('commit records', () => {
    fc.assert(
      fc.property(
        fc.record({
          seq: fc.integer({ min: 1, max: Number.MAX_SAFE_INTEGER }),
          pointClass: fc.constantFrom(0, 1, 2, 3, 4) as fc.Arbitrary<CommitFields['pointClass']>,
          coverage: fc.constantFrom(0, 1, 2) as fc.Arbitrary<CommitFields['coverage']>,
          flags: fc.integer({ min: 0, max: 3 }),
          epoch: u32,
          instantNs: u64,
          startedNs: u64,
          writtenNs: u64,
          sizeBytes: safe,
          hash: bytes(32),
          frame: u32,
          blocks: safe,
          storedBytes: safe,
        }),
        u32,
        (c, pack) => {
          const fields: CommitFields = { ...c, firstSeq: c.seq };
          const page = Buffer.alloc(COMMIT_RECORD_BYTES + 8);
          encodeCommitRecord(fields, pack, page, 8);
          expect(decodeCommitRecord(page, 8, 'x')).toEqual({ ...fields, pack });
        },
      ),
    );
  });

  it('pages of any content, compressed or not', () => {
    const keys = keyRing(Buffer.alloc(32, 3), true);
    const sealer = keys.segmentSealer(HEADER.salt);
    const header = encodeSegmentHeader(HEADER);
    fc.assert(
      fc.property(
        fc.uint8Array({ maxLength: 600 }),
        fc.integer({ min: 1, max: 30 }),
        fc.constantFrom(1, 2, 3, 4) as fc.Arbitrary<PageType>,
        u32,
        (part, times, type, number) => {
          const plain = Buffer.concat(Array.from({ length: times }, () => part));
          const page = sealPage(sealer, header, type, number, plain);
          expect(page.length).toBeLessThanOrEqual(plain.length + 32);
          expect(openPage(sealer, header, type, number, page, 'x', 0).equals(plain)).toBe(true);
        },
      ),
    );
  });
});
