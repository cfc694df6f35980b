import fc from 'fast-check';
import { describe, expect, it } from 'vitest';

import type { FooterFrame } from '../../../src/format/pack.js';
import {
  pieceLength,
  pieceOffset,
  planBatches,
  type Batch,
  type SourceExtent,
} from '../../../src/restore/batch.js';
import { GAP_BYTES, READ_BYTES, piecesOf } from '../../../src/restore/bulk-read.js';
import { holesOf, windowsOf } from '../../../src/restore/write-image.js';

const KIB = 1024;

async function* lists(extents: readonly SourceExtent[]): AsyncGenerator<readonly SourceExtent[]> {
  yield await Promise.resolve(extents);
}

const data = (block: number, count: number, more: Partial<SourceExtent> = {}): SourceExtent => ({
  block,
  count,
  packId: 'aa',
  frame: 0,
  sub: 0,
  skip: 0,
  ...more,
});

interface SeenPiece {
  readonly block: number;
  readonly blocks: number;
  readonly frame: number;
  readonly skip: number;
}

async function plan(
  extents: readonly SourceExtent[],
  imageBytes: number,
  pieces?: number,
): Promise<{ start: number; end: number; pieces: SeenPiece[] }[]> {
  const seen: { start: number; end: number; pieces: SeenPiece[] }[] = [];
  const options = { imageBytes, chunkBytes: 64 * KIB, ...(pieces === undefined ? {} : { pieces }) };
  for await (const batch of planBatches(lists(extents), options)) {
    seen.push({
      start: batch.startBytes,
      end: batch.endBytes,
      pieces: Array.from({ length: batch.count }, (_, i) => ({
        block: batch.block[i] ?? -1,
        blocks: batch.blocks[i] ?? -1,
        frame: batch.frame[i] ?? -1,
        skip: batch.skip[i] ?? -1,
      })),
    });
  }
  return seen;
}

describe('planBatches', () => {
  it('cuts runs at the borders of chunks', async () => {
    const [batch] = await plan([data(100, 40, { frame: 7, skip: 5 })], 200 * 4096);
    expect(batch).toEqual({
      start: 0,
      end: 200 * 4096,
      pieces: [
        { block: 100, blocks: 11, frame: 7, skip: 5 },
        { block: 111, blocks: 16, frame: 8, skip: 0 },
        { block: 127, blocks: 13, frame: 9, skip: 0 },
      ],
    });
  });

  it('covers the image without gaps, whatever the size of a batch', async () => {
    const extents = [data(3, 64), data(80, 1), data(81, 16), data(200, 30, { skip: 2 })];
    for (const size of [1, 2, 3, 100]) {
      const batches = await plan(extents, 300 * 4096 - 100, size);
      expect(batches[0]?.start).toBe(0);
      expect(batches.at(-1)?.end).toBe(300 * 4096 - 100);
      batches.forEach((b, i) => {
        if (i > 0) expect(b.start).toBe(batches[i - 1]?.end);
        expect(b.pieces.length).toBeLessThanOrEqual(size);
        for (const p of b.pieces) {
          expect(p.block * 4096).toBeGreaterThanOrEqual(b.start);
          expect((p.block + p.blocks) * 4096).toBeLessThanOrEqual(b.end);
        }
      });
      expect(batches.flatMap((b) => b.pieces).reduce((n, p) => n + p.blocks, 0)).toBe(
        64 + 1 + 16 + 30,
      );
    }
  });

  it('groups pieces by pack', async () => {
    const extents = [
      data(0, 1, { packId: 'bb' }),
      data(1, 1),
      data(2, 1, { packId: 'bb', frame: 1 }),
      data(3, 1, { packId: 'cc' }),
    ];
    for await (const batch of planBatches(lists(extents), {
      imageBytes: 4 * 4096,
      chunkBytes: 64 * KIB,
    })) {
      expect(batch.packIds).toEqual(['bb', 'aa', 'cc']);
      expect([...batch.packStart]).toEqual([0, 2, 3, 4]);
      expect([...batch.order.subarray(0, 4)]).toEqual([0, 2, 1, 3]);
    }
  });

  it('passes over holes and what lies past the end of the image', async () => {
    const [batch] = await plan(
      [data(0, 4, { packId: undefined }), data(5, 20), data(40, 2)],
      10 * 4096,
    );
    expect(batch?.pieces).toEqual([{ block: 5, blocks: 5, frame: 0, skip: 0 }]);
    expect(await plan([], 0)).toEqual([]);
    expect(await plan([], 4096)).toEqual([{ start: 0, end: 4096, pieces: [] }]);
  });

  it('refuses extents that overlap', async () => {
    await expect(plan([data(0, 4), data(3, 4)], 100 * 4096)).rejects.toThrow(/overlap/);
  });
});

describe('windowsOf and holesOf', () => {
  it('cover every byte once and cut no piece', async () => {
    const shape = fc.array(fc.tuple(fc.nat(3000), fc.integer({ min: 1, max: 40 })), {
      maxLength: 60,
    });
    await fc.assert(
      fc.asyncProperty(shape, fc.boolean(), fc.nat(4095), async (list, bigHoles, tail) => {
        let at = 0;
        const extents = list.map(([gap, count]) => {
          const e = data(at + gap, count);
          at += gap + count;
          return e;
        });
        const imageBytes = (at + 1) * 4096 - tail;
        for await (const batch of planBatches(lists(extents), {
          imageBytes,
          chunkBytes: 64 * KIB,
        })) {
          let end = batch.startBytes;
          let piece = 0;
          for (const w of windowsOf(batch, bigHoles)) {
            expect(w.offset).toBe(end);
            expect(w.length).toBeGreaterThan(0);
            if (!bigHoles || w.from < w.to) expect(w.length).toBeLessThanOrEqual(4 * KIB * KIB);
            end = w.offset + w.length;
            expect(w.from).toBe(piece);
            for (; piece < w.to; piece++) {
              expect(pieceOffset(batch, piece)).toBeGreaterThanOrEqual(w.offset);
              expect(pieceOffset(batch, piece) + pieceLength(batch, piece)).toBeLessThanOrEqual(
                end,
              );
            }
          }
          expect(end).toBe(batch.endBytes);
          expect(piece).toBe(batch.count);
          expect(covered(batch)).toBe(batch.endBytes - batch.startBytes);
        }
      }),
      { numRuns: 60 },
    );
  });
});

function covered(batch: Batch): number {
  let bytes = holesOf(batch).reduce((n, h) => n + h.length, 0);
  for (let i = 0; i < batch.count; i++) bytes += pieceLength(batch, i);
  return bytes;
}

describe('piecesOf', () => {
  const frames = (
    ...places: readonly (readonly [number, number])[]
  ): { frame: FooterFrame; tag: number }[] =>
    places.map(([offset, bytes], number) => ({
      frame: {
        number,
        offset,
        storedBytes: bytes - 32,
        plainBytes: 0,
        type: 1,
        compression: 0,
        count: 1,
      },
      tag: number,
    }));

  it('reads neighbours together, small gaps through, and large ones not', () => {
    const list = frames(
      [64, 10_000],
      [10_064, 5000],
      [15_064 + GAP_BYTES, 4000],
      [400_000, 100],
      [400_100 + GAP_BYTES + 1, 100],
    );
    expect(piecesOf(list).map((p) => [p.from, p.to])).toEqual([
      [0, 3],
      [3, 4],
      [4, 5],
    ]);
  });

  it('keeps pieces aligned, and at most one read long unless one frame is larger', () => {
    const list = frames(
      ...Array.from({ length: 300 }, (_, i) => [64 + i * 40_000, 40_000] as const),
      [64 + 300 * 40_000, READ_BYTES + 100],
    );
    const pieces = piecesOf(list);
    expect(pieces.length).toBeGreaterThan(3);
    let next = 0;
    for (const p of pieces) {
      expect(p.from).toBe(next);
      next = p.to;
      expect(p.offset % 4096).toBe(0);
      expect(p.length % 4096).toBe(0);
      if (p.to - p.from > 1) expect(p.length).toBeLessThanOrEqual(READ_BYTES);
    }
    expect(next).toBe(list.length);
  });
});
