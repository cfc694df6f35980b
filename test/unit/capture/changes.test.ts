import fc from 'fast-check';
import { describe, expect, it } from 'vitest';
import { changedExtents } from '../../../src/capture/changes.js';
import type { PlacedExtent } from '../../../src/repo/volume-writer.js';

const CHUNK = 4;

/** Extents of a random layout of `blocks` blocks, without gaps. */
const layout = (blocks: number): fc.Arbitrary<PlacedExtent[]> =>
  fc
    .array(
      fc.record({
        count: fc.integer({ min: 1, max: 9 }),
        pack: fc.constantFrom(undefined, 'a', 'b'),
        frame: fc.integer({ min: 0, max: 3 }),
        sub: fc.integer({ min: 0, max: 1 }),
        skip: fc.integer({ min: 0, max: CHUNK - 1 }),
      }),
      { minLength: blocks, maxLength: blocks },
    )
    .map((list) => {
      const out: PlacedExtent[] = [];
      let block = 0;
      for (const e of list) {
        const count = Math.min(e.count, blocks - block);
        if (count <= 0) break;
        const run = e.skip + count > CHUNK;
        out.push(
          e.pack === undefined
            ? { block, count, packId: undefined, frame: 0, sub: 0, skip: 0 }
            : { block, count, packId: e.pack, frame: e.frame, sub: run ? 0 : e.sub, skip: e.skip },
        );
        block += count;
      }
      return out;
    });

/** The place of every block, as a text. */
function places(list: readonly PlacedExtent[]): Map<number, string> {
  const map = new Map<number, string>();
  for (const e of list) {
    for (let i = 0; i < e.count; i++) {
      const at = e.skip + i;
      const run = e.skip + e.count > CHUNK;
      map.set(
        e.block + i,
        e.packId === undefined
          ? 'zeros'
          : `${e.packId}/${run ? e.frame + Math.floor(at / CHUNK) : e.frame}/${e.sub}/${run ? at % CHUNK : at}`,
      );
    }
  }
  return map;
}

async function* batches(
  list: readonly PlacedExtent[],
  size: number,
): AsyncGenerator<readonly PlacedExtent[]> {
  for (let i = 0; i < list.length; i += size) yield list.slice(i, i + size);
}

describe('changedExtents', () => {
  it('gives exactly the blocks that differ, at their new places', async () => {
    await fc.assert(
      fc.asyncProperty(
        layout(40),
        layout(40),
        fc.integer({ min: 0, max: 40 }),
        fc.integer({ min: 1, max: 5 }),
        async (before, now, cut, size) => {
          const changed: PlacedExtent[] = [];
          const known = before.filter((e) => e.block < cut);
          for await (const e of changedExtents(now, batches(known, size), cut, CHUNK))
            changed.push(e);
          const old = places(before);
          const fresh = places(now);
          const got = places(changed);
          let end = 0;
          for (const e of changed) {
            expect(e.block).toBeGreaterThanOrEqual(end);
            end = e.block + e.count;
          }
          for (let b = 0; b < 40; b++) {
            const same = b < cut && old.get(b) === fresh.get(b);
            expect(got.get(b)).toBe(same ? undefined : fresh.get(b));
          }
        },
      ),
    );
  });

  it('gives everything where nothing was before', async () => {
    const now = [{ block: 0, count: 3, packId: 'a', frame: 0, sub: 0, skip: 0 }];
    const changed: PlacedExtent[] = [];
    for await (const e of changedExtents(now, undefined, 0, CHUNK)) changed.push(e);
    expect(changed).toEqual(now);
  });
});
