/** Whether a part of a volume is the same at two points, told from the manifest. */
import type { BlockMap, ResolvedExtent } from '../repo/blockmap.js';
import { sameExtents } from './history-points.js';

/** Blocks compared at a time (1 GiB). */
const STEP_BLOCKS = 262_144;

/**
 * Whether blocks [from, to) lie in the same places. True: every byte is the same. False: most likely not. Reads extents pages of both up to the first
 * difference.
 */
export async function sameBlocks(
  a: BlockMap,
  b: BlockMap,
  from = 0,
  to: number = Math.max(a.blocks, b.blocks),
): Promise<boolean> {
  if (a.commit.sizeBytes !== b.commit.sizeBytes) return false;
  if (a.seq === b.seq) return true;
  for (let at = from; at < to; at += STEP_BLOCKS) {
    const end = Math.min(to, at + STEP_BLOCKS);
    const [x, y]: readonly ResolvedExtent[][] = await Promise.all([
      a.resolve(at, end),
      b.resolve(at, end),
    ]);
    if (x === undefined || y === undefined || !sameExtents(x, y)) return false;
  }
  return true;
}
