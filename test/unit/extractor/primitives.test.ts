import { isDeepStrictEqual } from 'node:util';
import { crc32 as zlibCrc32 } from 'node:zlib';
import fc from 'fast-check';
import koffi from 'koffi';
import { parse, stringify } from 'yaml';
import { describe, expect, it } from 'vitest';
import { blake3Keyed, crc32, lz4Decode, parseYaml } from '../../extractor/extract.mjs';
import { keyed, lz4Literals, random } from './synthetic.js';

/** The input of the official test vectors: bytes 0 to 250, again and again. */
const vector = (length: number): Buffer =>
  Buffer.from(Uint8Array.from({ length }, (_, i) => i % 251));
const VECTOR_KEY = Buffer.from('whats the Elvish word for friend');

describe('BLAKE3, keyed', () => {
  // keyed_hash of test_vectors.json of the BLAKE3 project, first 32 bytes
  it.each([
    [0, '92b2b75604ed3c761f9d6f62392c8a9227ad0ea3f09573e783f1498a4ed60d26'],
    [1, '6d7878dfff2f485635d39013278ae14f1454b8c0a3a2d34bc1ab38228a80c95b'],
  ])('has the official value for %i bytes', (length, expected) => {
    expect(blake3Keyed(VECTOR_KEY, vector(length)).toString('hex')).toBe(expected);
  });

  it('agrees with the native package around every boundary', () => {
    const lengths = [
      2, 63, 64, 65, 127, 128, 1023, 1024, 1025, 2047, 2048, 2049, 3072, 3073, 4095, 4096, 4097,
      5120, 6144, 7168, 7169, 8192, 16384, 31744, 102400, 262144,
    ];
    for (const length of lengths) {
      const data = vector(length);
      expect(blake3Keyed(VECTOR_KEY, data).equals(keyed(VECTOR_KEY, data)), `${length} bytes`).toBe(
        true,
      );
    }
  });

  it('agrees with the native package for any key and data', () => {
    fc.assert(
      fc.property(
        fc.uint8Array({ minLength: 32, maxLength: 32 }),
        fc.uint8Array({ maxLength: 5000 }),
        (key, data) => {
          expect(blake3Keyed(key, data).equals(keyed(Buffer.from(key), Buffer.from(data)))).toBe(
            true,
          );
        },
      ),
      { numRuns: 200 },
    );
  });
});

it('crc32 agrees with zlib', () => {
  expect(crc32(Buffer.from('123456789'))).toBe(0xcbf43926);
  expect(crc32(vector(1000))).toBe(zlibCrc32(vector(1000)));
});

describe('LZ4 blocks', () => {
  const lib = koffi.load('liblz4.so.1');
  const bound = lib.func('int LZ4_compressBound(int)');
  const compress = lib.func('int LZ4_compress_default(const uint8_t *, _Out_ uint8_t *, int, int)');
  const lz4 = (plain: Buffer): Buffer => {
    const out = Buffer.alloc(Number(bound(plain.length)));
    const length = Number(compress(plain, out, plain.length, out.length));
    if (length <= 0) throw new Error('LZ4_compress_default failed');
    return out.subarray(0, length);
  };

  it('decodes what liblz4 writes', () => {
    const next = random(5);
    for (let round = 0; round < 120; round++) {
      const length = Math.floor(next() * (round % 10 === 0 ? 200_000 : 3000));
      const alphabet = 1 + Math.floor(next() * 20);
      const plain = Buffer.from(Uint8Array.from({ length }, () => Math.floor(next() * alphabet)));
      if (next() < 0.3) plain.fill(7, Math.floor(length / 3));
      expect(lz4Decode(lz4(plain), length).equals(plain)).toBe(true);
      expect(lz4Decode(lz4Literals(plain), length).equals(plain)).toBe(true);
    }
  });

  it('copies overlapping matches byte by byte', () => {
    // "ab", then 10 bytes from 2 back, then 5 literals
    const block = Buffer.from([0x26, 0x61, 0x62, 2, 0, 0x50, 0x31, 0x32, 0x33, 0x34, 0x35]);
    expect(lz4Decode(block, 17).toString()).toBe('abababababab12345');
  });

  it('refuses malformed blocks', () => {
    const plain = Buffer.from('abcabcabcabcabcabcabcabcabcabc-0123456789');
    const block = lz4(plain);
    expect(() => lz4Decode(block, plain.length + 1)).toThrow(/fewer bytes/);
    expect(() => lz4Decode(block, plain.length - 1)).toThrow(/more bytes/);
    for (let cut = 0; cut < block.length; cut++)
      expect(() => lz4Decode(block.subarray(0, cut), plain.length)).toThrow(RangeError);
    expect(() => lz4Decode(Buffer.from([0x10, 0x61, 0, 0, 0x00]), 5)).toThrow(/before the start/);
    expect(() => lz4Decode(Buffer.from([0x10, 0x61, 2, 0, 0x00]), 5)).toThrow(/before the start/);
    expect(() => lz4Decode(Buffer.alloc(0), 0)).toThrow(/last sequence/);
  });

  it('never writes past the announced size, whatever it is given', () => {
    fc.assert(
      fc.property(fc.uint8Array({ maxLength: 60 }), fc.nat(200), (block, length) => {
        let out: Buffer | null = null;
        try {
          out = lz4Decode(block, length);
        } catch (error) {
          expect(error).toBeInstanceOf(RangeError);
        }
        if (out !== null) expect(out.length).toBe(length);
      }),
      { numRuns: 500 },
    );
  });
});

describe('YAML', () => {
  /** Objects without prototype compare as plain ones. */
  const plain = (value: unknown): unknown => JSON.parse(JSON.stringify(value));

  /** A few texts with line ends (`:` and a line end, in flow style) do not survive the package's own reader. */
  function survives(source: string, value: unknown): boolean {
    try {
      return isDeepStrictEqual(parse(source), value);
    } catch {
      return false;
    }
  }

  it('reads what `yaml` writes, in every style', () => {
    const text = fc.oneof(
      fc.string({ maxLength: 120 }),
      fc.string({ unit: 'grapheme', maxLength: 120 }),
      fc.stringMatching(/^[0-9a-f]{16}$/),
      fc.base64String(),
      fc.string({
        unit: fc.constantFrom('a', ' ', '\n', ':', '#', '"', "'", '-', '\\', '\t', 'word '),
        maxLength: 120,
      }),
      fc.constantFrom(
        '',
        ' ',
        'null',
        'true',
        '~',
        '1e5',
        '0x1f',
        '- a',
        'a: b',
        'a #b',
        '[x]',
        '---',
        '...',
        '2026-01-01T00:00:00Z',
        '1_000',
        '.5',
        '.inf',
      ),
    );
    const scalar = fc.oneof(text, fc.integer(), fc.boolean(), fc.constant(null));
    const key = fc.record({
      id: fc.stringMatching(/^[0-9a-f]{16}$/),
      label: text,
      created: text,
      kind: fc.constantFrom('scrypt', 'file'),
      salt: fc.base64String(),
      N: fc.integer(),
      wrapped: text,
    });
    const config = fc.record({
      b2: text,
      version: fc.nat(),
      id: text,
      keys: fc.array(key, { maxLength: 3 }),
      list: fc.array(fc.oneof(scalar, fc.array(scalar, { maxLength: 3 })), { maxLength: 4 }),
      mac: scalar,
    });
    const options = fc.record({
      collectionStyle: fc.constantFrom('any' as const, 'flow' as const),
      defaultStringType: fc.constantFrom(
        'PLAIN' as const,
        'QUOTE_DOUBLE' as const,
        'QUOTE_SINGLE' as const,
        'BLOCK_FOLDED' as const,
        'BLOCK_LITERAL' as const,
      ),
      lineWidth: fc.constantFrom(0, 40, 80),
      indent: fc.constantFrom(2, 4),
      indentSeq: fc.boolean(),
    });
    fc.assert(
      fc.property(config, options, (value, style) => {
        const source = stringify(value, { ...style, aliasDuplicateObjects: false });
        fc.pre(survives(source, value));
        expect(plain(parseYaml(source)), source).toEqual(plain(value));
      }),
      { numRuns: 250 },
    );
  });

  it('reads what people write', () => {
    const source = `# made by hand
---
b2: repository   # a comment
a:
- 1
- - x
  - 'it''s'
- k: v
  l: { p: [1, "two", three four ], "q":null, }
folded: >-
  one
  two

  three
keep: |+
  a
   b

plain: several
  lines

  of it
double: "a\\
  b \\x41
  c"
...
`;
    expect(plain(parseYaml(source))).toEqual({
      b2: 'repository',
      a: [1, ['x', "it's"], { k: 'v', l: { p: [1, 'two', 'three four'], q: null } }],
      folded: 'one two\nthree',
      keep: 'a\n b\n\n',
      plain: 'several lines\nof it',
      double: 'ab A c',
    });
  });

  it.each([
    ['a: &x 1', /anchors/],
    ['a: *x', /anchors/],
    ['a: !!str 1', /anchors/],
    ['%YAML 1.2\n---\na: 1', /directives/],
    ['a: 1\na: 2', /twice/],
    ['{a: 1, a: 2}', /twice/],
    ['a: 1\n b: 2', /YAML, line/],
    ['a: b: c', /mapping within/],
    ['a: "x', /does not end/],
    ['a: "x" y', /behind a value/],
    ['a: [1, 2', /does not end/],
    ['a: 1\n---\nb: 2', /unexpected text/],
    ['a:\n\tb: 1', /tab/],
    ['? a\n: b', /unexpected \?/],
    ['a: "\\q"', /escape/],
    ['a\nb: 1', /YAML, line/],
  ])('refuses %j', (source, message) => {
    expect(() => parseYaml(source)).toThrow(message);
    expect(() => parseYaml(source)).toThrow(SyntaxError);
  });

  it('keeps keys like __proto__ to themselves', () => {
    const value = parseYaml('__proto__: 1');
    expect(Object.keys(value as object)).toEqual(['__proto__']);
  });
});
