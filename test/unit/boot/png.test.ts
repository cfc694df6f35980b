/** Pictures: what we make of a PPM is a PNG of the same pixels. */
import { inflateSync } from 'node:zlib';
import { describe, expect, it } from 'vitest';
import { isPng, ppmToPng } from '../../../src/boot/png.js';

interface Chunk {
  readonly type: string;
  readonly data: Buffer;
}

function chunks(png: Buffer): readonly Chunk[] {
  const found: Chunk[] = [];
  for (let at = 8; at < png.length;) {
    const length = png.readUInt32BE(at);
    found.push({
      type: png.toString('latin1', at + 4, at + 8),
      data: png.subarray(at + 8, at + 8 + length),
    });
    at += length + 12;
  }
  return found;
}

describe('a PPM', () => {
  const pixels = Buffer.from(Array.from({ length: 3 * 2 * 3 }, (_, i) => i * 7));

  it.each(['P6\n3 2\n255\n', 'P6 # a comment\n# more\n3\n2 255 '])('%j becomes a PNG', (header) => {
    const png = ppmToPng(Buffer.concat([Buffer.from(header), pixels]));
    expect(isPng(png)).toBe(true);
    const [ihdr, idat, iend, ...more] = chunks(png);
    expect([ihdr?.type, idat?.type, iend?.type, more]).toEqual(['IHDR', 'IDAT', 'IEND', []]);
    expect(ihdr?.data.toString('hex')).toBe('00000003' + '00000002' + '0802000000');
    const lines = inflateSync(idat?.data ?? Buffer.alloc(0));
    expect(lines).toEqual(
      Buffer.concat([Buffer.of(0), pixels.subarray(0, 9), Buffer.of(0), pixels.subarray(9)]),
    );
    // The checksum of an empty IEND is known.
    expect(png.subarray(-4).toString('hex')).toBe('ae426082');
  });

  it.each(['', 'P5\n3 2\n255\n', 'P6\n3 2\n65535\n', 'P6\n0 2\n255\n', 'P6\n999999 999999\n255\n'])(
    'that is none (%j) is refused',
    (header) => {
      expect(() => ppmToPng(Buffer.concat([Buffer.from(header), pixels]))).toThrow(RangeError);
    },
  );

  it('that is cut short is refused', () => {
    const short = Buffer.concat([Buffer.from('P6\n3 2\n255\n'), pixels.subarray(1)]);
    expect(() => ppmToPng(short)).toThrow(/cut short/);
  });
});
