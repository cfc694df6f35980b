/** What differs between the state a volume had and what a scan found: by place, without reading any data. */
import type { PlacedExtent } from '../repo/volume-writer.js';

/** The chunk and the block in it where block `at` of an extent lies. */
function placeOf(
  e: PlacedExtent,
  at: number,
  chunkBlocks: number,
): { frame: number; skip: number } {
  const inRun = e.skip + (at - e.block);
  if (e.skip + e.count <= chunkBlocks) return { frame: e.frame, skip: inRun };
  return { frame: e.frame + Math.floor(inRun / chunkBlocks), skip: inRun % chunkBlocks };
}

/** True if block `at`, and with it every block up to the end of the shorter of the two, lies at the same place. */
function samePlace(a: PlacedExtent, b: PlacedExtent, at: number, chunkBlocks: number): boolean {
  if (a.packId !== b.packId) return false;
  if (a.packId === undefined) return true;
  if (a.sub !== b.sub) return false;
  const pa = placeOf(a, at, chunkBlocks);
  const pb = placeOf(b, at, chunkBlocks);
  return pa.frame === pb.frame && pa.skip === pb.skip;
}

/** Blocks [from, to) of `e` as an extent of their own. */
export function clipPlaced(
  e: PlacedExtent,
  from: number,
  to: number,
  chunkBlocks: number,
): PlacedExtent {
  if (from === e.block && to === e.block + e.count) return e;
  if (e.packId === undefined) return { ...e, block: from, count: to - from };
  return { ...e, block: from, count: to - from, ...placeOf(e, from, chunkBlocks) };
}

/**
 * The extents of `now` that are not the same in `before`, ascending. Both ascend without gaps or overlap; `before` covers [0,
 * `beforeBlocks`) and blocks behind that count as different even where they are zeros.
 */
export async function* changedExtents(
  now: Iterable<PlacedExtent>,
  before: AsyncIterable<readonly PlacedExtent[]> | undefined,
  beforeBlocks: number,
  chunkBlocks: number,
): AsyncGenerator<PlacedExtent> {
  const batches = before?.[Symbol.asyncIterator]();
  let batch: readonly PlacedExtent[] = [];
  let index = 0;
  let done = batches === undefined;
  /** The extent of `before` that holds `block`, or undefined where there is none. */
  const at = async (block: number): Promise<PlacedExtent | undefined> => {
    while (!done) {
      const e = batch[index];
      if (e !== undefined) {
        if (e.block + e.count > block) return e;
        index++;
        continue;
      }
      const next = await batches?.next();
      if (next === undefined || next.done === true) done = true;
      else {
        batch = next.value;
        index = 0;
      }
    }
    return undefined;
  };
  try {
    for (const e of now) {
      const end = e.block + e.count;
      // Neighbouring different pieces of one extent are given out as one.
      let from = e.block;
      let block = e.block;
      while (block < end) {
        const old = block < beforeBlocks ? await at(block) : undefined;
        const stop = old === undefined ? end : Math.min(end, old.block + old.count, beforeBlocks);
        if (old !== undefined && samePlace(e, old, block, chunkBlocks)) {
          if (from < block) yield clipPlaced(e, from, block, chunkBlocks);
          from = stop;
        }
        block = stop;
      }
      if (from < end) yield clipPlaced(e, from, end, chunkBlocks);
    }
  } finally {
    await batches?.return?.(undefined);
  }
}
