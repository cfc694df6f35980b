import fc from 'fast-check';
import { describe, expect, it } from 'vitest';
import {
  CommitFlag,
  ZERO_HASH,
  decodeCommit,
  decodeExtentList,
  encodeCommit,
  type Commit,
} from '../../../src/format/commit.js';
import {
  canonicalConfig,
  decodeConfig,
  encodeConfig,
  type RepositoryConfig,
} from '../../../src/format/config.js';
import { readU64, writeU64 } from '../../../src/format/bytes.js';
import {
  EXTENT_RECORD_BYTES,
  HOLE,
  STRIPE_BLOCKS,
  clipExtent,
  decodeExtent,
  encodeExtent,
  encodeExtents,
  type Extent,
} from '../../../src/format/extent.js';
import {
  decodeFrameHeader,
  encodeFrameHeader,
  type FrameHeader,
} from '../../../src/format/frame.js';
import { packIdOf, packName, parseSegmentName, segmentName } from '../../../src/format/names.js';
import { ObjectKind, decodeObject, encodeObject } from '../../../src/format/object.js';
import {
  decodeFooter,
  decodePackHeader,
  decodeTrailer,
  encodeFooter,
  encodePackHeader,
  type PackFooter,
} from '../../../src/format/pack.js';
import { ZERO_NONCE, keyRing, numberNonce, seal } from '../../../src/format/seal.js';

const KEYS = [keyRing(Buffer.alloc(32, 1), true), keyRing(Buffer.alloc(32, 1), false)] as const;
const ID = 'ab'.repeat(16);
const REPO = 'cd'.repeat(16);
const damaged = expect.objectContaining({ name: 'B2Error', kind: 'damaged' });

/** Decoding every truncation, and every flip of one bit, must fail with kind `damaged` (or another B2Error for the version). */
function everyChangeIsFound(
  bytes: Buffer,
  decode: (b: Buffer) => unknown,
  isHarmless: (at: number) => boolean = () => false,
): void {
  for (let n = 0; n < bytes.length; n++)
    expect(() => decode(bytes.subarray(0, n)), `cut to ${n}`).toThrowError();
  for (let at = 0; at < bytes.length; at++) {
    if (isHarmless(at)) continue;
    const bad = Buffer.from(bytes);
    bad[at] = (bad[at] ?? 0) ^ (1 << (at % 8));
    expect(() => decode(bad), `flip in byte ${at}`).toThrowError(
      expect.objectContaining({ name: 'B2Error' }),
    );
  }
}

describe('u64', () => {
  it('goes through exactly, and refuses what a number cannot hold', () => {
    fc.assert(
      fc.property(fc.integer({ min: 0, max: Number.MAX_SAFE_INTEGER }), (n) => {
        const b = Buffer.alloc(8);
        writeU64(b, n, 0);
        expect(b.readBigUInt64LE(0)).toBe(BigInt(n));
        expect(readU64(b, 0, 'x')).toBe(n);
      }),
    );
    expect(() => readU64(Buffer.from('0000000000002000', 'hex'), 0, 'x')).toThrowError(damaged);
    expect(() => writeU64(Buffer.alloc(8), -1, 0)).toThrowError(RangeError);
    expect(() => writeU64(Buffer.alloc(8), 2 ** 53, 0)).toThrowError(RangeError);
  });
});

const extentArb: fc.Arbitrary<Extent> = fc
  .record({
    block: fc.integer({ min: 0, max: 2 ** 40 }),
    count: fc.integer({ min: 1, max: STRIPE_BLOCKS }),
    seq: fc.integer({ min: 0, max: 0xffff_ffff }),
    pack: fc.integer({ min: 0, max: 0xffff_fffe }),
    frame: fc.integer({ min: 0, max: 0xffff_ffff }),
    sub: fc.integer({ min: 0, max: 0xffff }),
    skip: fc.integer({ min: 0, max: 0xffff }),
  })
  .map((e) => ({ ...e, count: Math.min(e.count, STRIPE_BLOCKS - (e.block % STRIPE_BLOCKS)) }));

describe('extent records', () => {
  it('go round', () => {
    fc.assert(
      fc.property(extentArb, (e) => {
        const b = Buffer.alloc(EXTENT_RECORD_BYTES);
        encodeExtent(e, b, 0);
        expect(decodeExtent(b, 0, 'x')).toEqual(e);
      }),
    );
  });

  it('have these bytes', () => {
    const e = { block: 0x1_0000_0002, count: 3, seq: 4, pack: 5, frame: 6, sub: 7, skip: 8 };
    expect(encodeExtents([e]).toString('hex')).toBe(
      '02000000010000000300000004000000050000000600000007000800',
    );
  });

  it('do not cross a stripe, either way', () => {
    const e = { block: STRIPE_BLOCKS - 1, count: 2, seq: 0, pack: 0, frame: 0, sub: 0, skip: 0 };
    expect(() => encodeExtents([e])).toThrowError(RangeError);
    const b = encodeExtents([{ ...e, count: 1 }]);
    b.writeUInt32LE(2, 8);
    expect(() => decodeExtent(b, 0, 'x')).toThrowError(damaged);
    b.writeUInt32LE(0, 8);
    expect(() => decodeExtent(b, 0, 'x')).toThrowError(damaged);
  });

  it('are refused with a place in a hole, out of order, or with a pack that is not in the table', () => {
    const hole = { block: 0, count: 1, seq: 0, pack: HOLE, frame: 0, sub: 0, skip: 0 };
    expect(() => decodeExtent(encodeExtents([{ ...hole, frame: 1 }]), 0, 'x')).toThrowError(
      damaged,
    );
    expect(() => decodeExtentList(encodeExtents([hole, hole]), 0, 'x')).toThrowError(damaged);
    expect(() => decodeExtentList(encodeExtents([{ ...hole, pack: 1 }]), 1, 'x')).toThrowError(
      damaged,
    );
    expect(() => decodeExtentList(encodeExtents([hole]).subarray(1), 1, 'x')).toThrowError(damaged);
  });

  it('can be clipped: every block keeps its place', () => {
    const place = (e: Extent, block: number): string => {
      const at = e.skip + block - e.block;
      return e.skip + e.count <= 16
        ? `${e.frame}/${e.sub}/${at}`
        : `${e.frame + Math.floor(at / 16)}/0/${at % 16}`;
    };
    fc.assert(
      fc.property(
        fc.integer({ min: 0, max: 100 }),
        fc.integer({ min: 1, max: 100 }),
        fc.integer({ min: 0, max: 15 }),
        fc.integer({ min: 0, max: 120 }),
        fc.integer({ min: 1, max: 120 }),
        (block, count, skip, from, length) => {
          const e: Extent = { block, count, seq: 0, pack: 1, frame: 10, sub: 0, skip };
          const to = from + length;
          if (from >= block + count || to <= block) return;
          const c = clipExtent(e, from, to, 16);
          expect(c.block).toBe(Math.max(from, block));
          expect(c.block + c.count).toBe(Math.min(to, block + count));
          for (let b = c.block; b < c.block + c.count; b++) expect(place(c, b)).toBe(place(e, b));
        },
      ),
    );
  });
});

describe('seals', () => {
  it.each(KEYS)('open only as they were made (encrypted $encrypted)', (keys) => {
    const sealer = keys.packSealer(ID);
    const aad = Buffer.from('aad');
    const sealed = seal(sealer, numberNonce(7), aad, [Buffer.from('he'), Buffer.from('llo')]);
    expect(sealed).toHaveLength(21);
    expect(sealer.open(numberNonce(7), aad, sealed)?.toString()).toBe('hello');
    expect(sealer.open(numberNonce(8), aad, sealed)).toBeUndefined();
    expect(sealer.open(numberNonce(7), Buffer.from('aae'), sealed)).toBeUndefined();
    expect(sealer.open(ZERO_NONCE, aad, Buffer.alloc(5))).toBeUndefined();
    expect(
      keyRing(Buffer.alloc(32, 2), keys.encrypted).packSealer(ID).open(numberNonce(7), aad, sealed),
    ).toBeUndefined();
    for (let at = 0; at < sealed.length; at++) {
      const bad = Buffer.from(sealed);
      bad[at] = (bad[at] ?? 0) ^ 1;
      expect(sealer.open(numberNonce(7), aad, bad)).toBeUndefined();
    }
  });
});

describe('frame headers', () => {
  const header: FrameHeader = {
    type: 1,
    compression: 1,
    count: 2,
    number: 9,
    storedBytes: 1000,
    plainBytes: 8192,
    headBytes: 72,
  };
  it('have these bytes and find every change', () => {
    const b = Buffer.alloc(32);
    encodeFrameHeader(header, b, 0);
    expect(b.toString('hex')).toBe(
      '4232465201010200' + '09000000e803000000200000' + '4800000000000000' + b.toString('hex', 28),
    );
    expect(decodeFrameHeader(b, 0, 'x')).toEqual(header);
    everyChangeIsFound(b, (x) => decodeFrameHeader(x, 0, 'x'));
  });

  it.each([
    { ...header, count: 0 },
    { ...header, count: 5000, headBytes: 180_000 },
    { ...header, headBytes: 36 },
    { ...header, storedBytes: 80 },
    { ...header, plainBytes: 17 * 1024 * 1024 },
    { ...header, type: 2 as const },
    { ...header, number: 0xffff_ffff },
  ])('that contradict themselves are refused: %j', (bad) => {
    const b = Buffer.alloc(32);
    encodeFrameHeader(bad, b, 0);
    expect(() => decodeFrameHeader(b, 0, 'x')).toThrowError(damaged);
  });
});

describe('pack header, footer and trailer', () => {
  const header = { packId: ID, repositoryId: REPO, encrypted: true, generation: 3, createdNs: 5n };
  it('the header goes round and finds every change, another pack and another repository', () => {
    const b = encodePackHeader(header);
    expect(decodePackHeader(b, header)).toEqual(header);
    everyChangeIsFound(b, (x) => decodePackHeader(x, header));
    expect(() => decodePackHeader(b, { packId: REPO, repositoryId: REPO })).toThrowError(
      /exchanged/,
    );
    expect(() => decodePackHeader(b, { packId: ID, repositoryId: ID })).toThrowError(
      /another repository/,
    );
  });

  it.each(KEYS)('the footer goes round and finds every change (encrypted $encrypted)', (keys) => {
    const footer: PackFooter = {
      frames: [
        {
          number: 0,
          offset: 64,
          storedBytes: 100,
          plainBytes: 4096,
          type: 1,
          compression: 1,
          count: 2,
        },
        {
          number: 4,
          offset: 196,
          storedBytes: 300,
          plainBytes: 200,
          type: 3,
          compression: 0,
          count: 0,
        },
      ],
      ids: Buffer.alloc(64, 7),
      lengths: Uint32Array.from([1000, 3096]),
    };
    const offset = 528;
    const b = encodeFooter(footer, ID, offset, Buffer.alloc(16, 9), keys);
    const trailer = decodeTrailer(b.subarray(b.length - 16), offset + b.length);
    expect(trailer).toEqual({ offset, lengthBytes: b.length - 16 });
    const frame = b.subarray(0, b.length - 16);
    expect(decodeFooter(frame, ID, keys)).toEqual(footer);
    everyChangeIsFound(frame, (x) => decodeFooter(x, ID, keys));
    expect(() => decodeFooter(frame, REPO, keys)).toThrowError(damaged);
    // A trailer that is wrong in any way only means that the pack counts as unsealed.
    for (let at = 0; at < 16; at++) {
      const bad = Buffer.from(b.subarray(b.length - 16));
      bad[at] = (bad[at] ?? 0) ^ 1;
      expect(decodeTrailer(bad, offset + b.length)).toBeUndefined();
    }
    expect(decodeTrailer(b.subarray(b.length - 16), offset + b.length + 1)).toBeUndefined();
  });
});

describe('commits', () => {
  const commit: Commit = {
    pointClass: 2,
    coverage: 1,
    flags: CommitFlag.full,
    volumeId: ID,
    seq: 5,
    firstSeq: 5,
    prevHash: Buffer.alloc(32, 3),
    mergedHash: ZERO_HASH,
    instantNs: 123_456_789_012_345_678n,
    startedNs: 1n,
    writtenNs: 2n,
    sizeBytes: 1_000_000,
    epoch: 4,
    packIds: [ID, REPO],
    extentsRefs: [{ pack: 0, frame: 1, records: 2, hash: Buffer.alloc(32, 8) }],
    extents: [
      { block: 1, count: 2, seq: 0, pack: 1, frame: 3, sub: 0, skip: 0 },
      { block: 9, count: 1, seq: 0, pack: HOLE, frame: 0, sub: 0, skip: 0 },
    ],
    facts: { source: 'scan', storedBytes: 77 },
  };
  it('go round', () => {
    expect(decodeCommit(encodeCommit(commit), 'x')).toEqual(commit);
    const empty: Commit = { ...commit, packIds: [], extentsRefs: [], extents: [], facts: {} };
    expect(decodeCommit(encodeCommit(empty), 'x')).toEqual(empty);
  });
  it('refuse every truncation, other versions and impossible numbers', () => {
    const b = encodeCommit(commit);
    for (let n = 0; n < b.length; n++)
      expect(() => decodeCommit(b.subarray(0, n), 'x')).toThrowError(damaged);
    const version = Buffer.from(b);
    version.writeUInt16LE(2, 0);
    expect(() => decodeCommit(version, 'x')).toThrowError(
      expect.objectContaining({ kind: 'unsupported' }),
    );
    for (const bad of [
      { ...commit, seq: 0, firstSeq: 0 },
      { ...commit, firstSeq: 6 },
      { ...commit, firstSeq: 4 },
      { ...commit, extentsRefs: [{ pack: 2, frame: 1, records: 2, hash: Buffer.alloc(32) }] },
    ]) {
      expect(() => decodeCommit(encodeCommit(bad), 'x')).toThrowError(damaged);
    }
    const cls = Buffer.from(b);
    cls[2] = 9;
    expect(() => decodeCommit(cls, 'x')).toThrowError(damaged);
  });
});

describe('sealed objects', () => {
  it.each(KEYS)(
    'open under their own name only, and find every change (encrypted $encrypted)',
    (keys) => {
      const b = encodeObject(
        ObjectKind.snapshot,
        'a/b',
        { n: 12n, s: 'x' },
        Buffer.alloc(16, 4),
        keys,
      );
      expect(decodeObject(ObjectKind.snapshot, 'a/b', b, keys)).toEqual({ n: '12', s: 'x' });
      expect(() => decodeObject(ObjectKind.snapshot, 'a/c', b, keys)).toThrowError(damaged);
      expect(() => decodeObject(ObjectKind.epoch, 'a/b', b, keys)).toThrowError(damaged);
      everyChangeIsFound(b, (x) => decodeObject(ObjectKind.snapshot, 'a/b', x, keys));
    },
  );
});

describe('names', () => {
  it('go round and nothing else passes', () => {
    expect(packIdOf(packName(ID))).toBe(ID);
    expect(packIdOf(`packs/cd/${ID}`)).toBeUndefined();
    expect(packIdOf(`packs/ab/${ID}x`)).toBeUndefined();
    for (const s of [
      { volumeId: ID, level: 0, firstSeq: 1, lastSeq: 9 },
      { volumeId: ID, level: 255, firstSeq: 2 ** 40, lastSeq: 2 ** 41 },
      { volumeId: ID, level: undefined, firstSeq: 1, lastSeq: 1 },
    ]) {
      expect(parseSegmentName(segmentName(s))).toEqual(s);
    }
    expect(
      parseSegmentName(`volumes/${ID}/manifest/00-0000000000000002-0000000000000001`),
    ).toBeUndefined();
    expect(
      parseSegmentName(`volumes/${ID}/manifest/00-ffffffffffffffff-ffffffffffffffff`),
    ).toBeUndefined();
  });
});

describe('config', () => {
  const config: RepositoryConfig = {
    id: ID,
    created: '2026-11-22T15:00:00.000Z',
    encryption: 'aes256-gcm',
    chunkBytes: 65_536,
    packBytes: 33_554_432,
    keys: [
      {
        id: '0123456789abcdef',
        label: 'a: "b" #c',
        created: '2026-11-22T15:00:00.000Z',
        kind: 'scrypt',
        salt: 'AAAA',
        N: 16_384,
        r: 8,
        p: 1,
        wrapped: 'BBBB',
      },
      {
        id: '1234567812345678',
        label: '',
        created: '2026-11-22T15:00:00.000Z',
        kind: 'file',
        salt: 'AAAA',
        wrapped: 'BBBB',
      },
    ],
    mac: 'CCCC',
  };
  it('goes round, also with ids that look like numbers', () => {
    const numeric = {
      ...config,
      id: '1'.repeat(32),
      keys: config.keys.map((k) => ({ ...k, id: '12345678901234e5' })),
    };
    expect(decodeConfig(encodeConfig(config))).toEqual(config);
    expect(decodeConfig(encodeConfig(numeric))).toEqual(numeric);
  });
  it('covers every field by the MAC', () => {
    const base = canonicalConfig(config).toString();
    const [first, second] = config.keys;
    if (first === undefined || second === undefined || first.kind !== 'scrypt')
      throw new Error('the test is wrong');
    for (const changed of [
      { ...config, id: REPO },
      { ...config, created: 'x' },
      { ...config, encryption: 'none' as const },
      { ...config, chunkBytes: 1 },
      { ...config, packBytes: 1 },
      { ...config, keys: [second, first] },
      { ...config, keys: [first] },
      { ...config, keys: [{ ...first, N: 32_768 }, second] },
      { ...config, keys: [{ ...first, wrapped: 'AAAA' }, second] },
      { ...config, keys: [{ ...first, label: 'other' }, second] },
    ]) {
      expect(canonicalConfig(changed).toString()).not.toBe(base);
    }
  });
  it.each([
    ['unknown: 1\n', /unknown: unknown key/],
    ['keys: []\n', /keys|duplicate|unique/i],
  ])('refuses more: %j', (more, message) => {
    expect(() =>
      decodeConfig(Buffer.concat([encodeConfig(config), Buffer.from(more)])),
    ).toThrowError(message);
  });
  it.each([
    ['chunkBytes: 65536', 'chunkBytes: 65537', /chunkBytes/],
    ['version: 1', 'version: 2', /version 2/],
    ['b2: repository', 'b2: other', /b2/],
    ['N: 16384', 'N: 16385', /keys\[0\]\.N/],
    ['N: 16384', 'N: 1024', /keys\[0\]\.N/],
    ['kind: file', 'kind: other', /keys\[1\]\.kind/],
    ['packBytes: 33554432', 'packBytes: 1', /packBytes/],
    ['encryption: aes256-gcm', 'encryption: none', /keys/],
  ])('refuses %s as %s', (from, to, message) => {
    const text = encodeConfig(config).toString();
    expect(text).toContain(from);
    expect(() => decodeConfig(Buffer.from(text.replace(from, to)))).toThrowError(message);
  });
  it('refuses anchors, other documents and noise', () => {
    for (const text of ['', '{', '- a', '&a b', '\0\0', 'a: 1\n---\nb: 2', 'x: '.repeat(40_000)]) {
      expect(() => decodeConfig(Buffer.from(text))).toThrowError(damaged);
    }
  });
});
