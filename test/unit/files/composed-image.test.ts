/** Several images as one: every byte where it belongs, gaps between them, holes merged, and all closed. */
import fc from 'fast-check';
import { expect, it } from 'vitest';

import { composeImages, openComposed, placeImages } from '../../../src/files/composed-image.js';
import type { ImageExtent } from '../../../src/image.js';
import { MemoryImage, type RunSpec } from '../../support/image-memory.js';

const MIB = 1024 * 1024;

const anImage: fc.Arbitrary<readonly RunSpec[]> = fc.array(
  fc.record({ length: fc.integer({ min: 1, max: 300_000 }), hole: fc.boolean() }),
  { minLength: 1, maxLength: 4 },
);

/** Bytes and holes of the whole, made the plain way. */
function model(images: readonly MemoryImage[]): {
  readonly bytes: Buffer;
  readonly holes: Uint8Array;
} {
  const offsets = placeImages(images.map((i) => i.sizeBytes));
  const end = (offsets.at(-1) ?? 0) + (images.at(-1)?.sizeBytes ?? 0);
  const bytes = Buffer.alloc(end);
  const holes = new Uint8Array(end).fill(1);
  images.forEach((image, i) => {
    const at = offsets[i] ?? 0;
    image.content.copy(bytes, at);
    for (const run of image.runs)
      if (!run.hole) holes.fill(0, at + run.offset, at + run.offset + run.length);
  });
  return { bytes, holes };
}

function modelExtents(holes: Uint8Array, offset: number, length: number): readonly ImageExtent[] {
  const out: { offset: number; length: number; hole: boolean }[] = [];
  for (let at = offset; at < offset + length;) {
    const hole = holes[at] === 1;
    const next = holes.indexOf(hole ? 0 : 1, at);
    const end = Math.min(offset + length, next < 0 ? holes.length : next);
    out.push({ offset: at, length: end - at, hole });
    at = end;
  }
  return out;
}

it('begins each image at a whole MiB with a gap before it', () => {
  expect(placeImages([5 * MIB, 1, 3 * MIB + 7])).toEqual([0, 6 * MIB, 8 * MIB]);
  expect(placeImages([512])).toEqual([0]);
});

it('reads and tells holes as its parts do, across their borders', async () => {
  await fc.assert(
    fc.asyncProperty(
      fc.array(anImage, { minLength: 1, maxLength: 3 }),
      fc.array(fc.tuple(fc.nat(), fc.nat(), fc.integer({ min: 1, max: 4 })), {
        minLength: 1,
        maxLength: 5,
      }),
      async (specs, ranges) => {
        const images = specs.map((runs, i) => new MemoryImage(runs, i + 1));
        const { bytes, holes } = model(images);
        const composed = composeImages(images);
        expect(composed.sizeBytes).toBe(bytes.length);
        for (const [a, b, limit] of ranges) {
          const offset = a % (bytes.length + 1);
          const length = b % (bytes.length - offset + 1);
          const into = Buffer.alloc(length, 0xee);
          await composed.read(into, offset);
          expect(into.equals(bytes.subarray(offset, offset + length))).toBe(true);
          const wanted = modelExtents(holes, offset, length);
          expect(await composed.extents(offset, length)).toEqual(wanted);
          // With a limit they may end early, but what is told is right.
          const some = await composed.extents(offset, length, limit);
          expect(some.length).toBeLessThanOrEqual(limit);
          expect(some.length > 0 || length === 0).toBe(true);
          let at = offset;
          for (const { offset: begin, length: long, hole } of some) {
            expect(begin).toBe(at);
            at += long;
            expect(holes.subarray(begin, at).every((h) => (h === 1) === hole)).toBe(true);
          }
        }
        if (images.length > 1)
          await expect(composed.extents(bytes.length, 1)).rejects.toThrow(RangeError);
      },
    ),
    { numRuns: 15 },
  );
});

it('is of one image that image, of several closed with all of them, and needs the smallest sector of all', async () => {
  const one = new MemoryImage([{ length: 4096, hole: false }]);
  expect(composeImages([one])).toBe(one);
  const two = new MemoryImage([{ length: 4096, hole: false }]);
  const large = new (class extends MemoryImage {
    override readonly logicalBlockBytes = 4096;
  })([{ length: 4096, hole: false }]);
  const both = composeImages([large, two]);
  expect(both.logicalBlockBytes).toBe(512);
  await both.close();
  expect([large.closed, two.closed]).toEqual([1, 1]);
});

it('damage in one is an error of reads that touch it alone', async () => {
  const images = [1, 2].map((seed) => new MemoryImage([{ length: MIB, hole: false }], seed));
  images[1]?.damaged.push({ offset: 0, length: 4096, message: 'a bad pack' });
  const both = composeImages(images);
  await both.read(Buffer.alloc(MIB), 0);
  await expect(both.read(Buffer.alloc(2 * MIB), MIB)).rejects.toThrow('a bad pack');
});

it('closes what is open where another cannot be opened', async () => {
  const one = new MemoryImage([{ length: 4096, hole: false }]);
  const open = openComposed([() => Promise.resolve(one), () => Promise.reject(new Error('no'))]);
  await expect(open).rejects.toThrow('no');
  expect(one.closed).toBe(1);
});
