/** Which frames the chains of all volumes use: what prune must keep and verify must find whole. */
import { B2Error } from '../errors.js';
import { HOLE } from '../format/extent.js';
import { VolumeHistory } from '../repo/history.js';
import { unnotedLoss } from '../repo/lost.js';
import type { Repository } from '../repo/repository.js';
import type { SegmentSource } from '../repo/segments/source.js';
import { listVolumeIds } from '../repo/volume.js';
import { blocksOf } from '../units.js';

/** A set of frames, by pack: one bit a frame. */
export class FrameSet {
  private readonly packs = new Map<string, Uint32Array>();

  /** Adds frames [from, to] of a pack. */
  add(packId: string, from: number, to = from): void {
    let bits = this.packs.get(packId);
    const words = (to >>> 5) + 1;
    if (bits === undefined || bits.length < words) {
      const grown = new Uint32Array(Math.max(words, 16, (bits?.length ?? 0) * 2));
      if (bits !== undefined) grown.set(bits);
      bits = grown;
      this.packs.set(packId, bits);
    }
    for (let f = from; f <= to; f++) bits[f >>> 5] = (bits[f >>> 5] ?? 0) | (1 << (f & 31));
  }

  has(packId: string, frame: number): boolean {
    return (((this.packs.get(packId)?.[frame >>> 5] ?? 0) >>> (frame & 31)) & 1) === 1;
  }

  hasPack(packId: string): boolean {
    return this.packs.has(packId);
  }

  packIds(): IterableIterator<string> {
    return this.packs.keys();
  }

  /** The frames of a pack, ascending. */
  *framesOf(packId: string): IterableIterator<number> {
    const bits = this.packs.get(packId);
    if (bits === undefined) return;
    for (let w = 0; w < bits.length; w++) {
      const word = bits[w] ?? 0;
      for (let b = 0; word !== 0 && b < 32; b++) if (((word >>> b) & 1) === 1) yield w * 32 + b;
    }
  }
}

/** Frames in use: of chunks, and of commits. Extents frames live with the commits of their pack (FORMAT.md 5.3). */
export interface Liveness {
  readonly chunks: FrameSet;
  readonly commits: FrameSet;
}

/**
 * Walks every record of every volume's history. Kind `refused` if a history cannot be read whole: then nobody can say what is
 * not needed.
 */
export async function findLiveness(repo: Repository, signal?: AbortSignal): Promise<Liveness> {
  const live: Liveness = { chunks: new FrameSet(), commits: new FrameSet() };
  for (const { id } of await listVolumeIds(repo)) {
    const history = await VolumeHistory.open(repo, id);
    try {
      const [loss] = await unnotedLoss(history);
      const problem =
        history.problems[0]?.error.message ??
        (loss === undefined
          ? undefined
          : `commits ${loss.firstSeq} to ${loss.lastSeq} are missing`);
      if (history.chain.gap !== undefined || problem !== undefined) {
        throw new B2Error(
          'refused',
          `the history of volume ${id} cannot be read whole (${problem ?? `commit ${history.chain.gap?.seq} is missing`}), so nothing can be called unused`,
          { hint: 'Run "b2 verify" and "b2 repair" first.' },
        );
      }
      for (const source of [...history.sources, ...history.fulls]) {
        signal?.throwIfAborted();
        await markSource(source, live, blocksOf(repo.chunkBytes));
      }
    } finally {
      await history.close();
    }
  }
  return live;
}

/** Adds everything that a segment names to `live`. */
export async function markSource(
  source: SegmentSource,
  live: Liveness,
  chunkBlocks: number,
): Promise<void> {
  const ids: string[] = [];
  for (let p = 0; p < source.index.packCount; p++) ids.push(await source.packId(p));
  for (let i = 0; i < source.index.extents.length; i++) {
    const page = await source.extentPage(i, false);
    for (let r = 0; r < page.length; r++) {
      const pack = page.pack(r);
      if (pack === HOLE) continue;
      const frame = page.frame(r);
      const id = ids[pack];
      if (id === undefined)
        throw new B2Error(
          'damaged',
          `${source.name}: a record names pack ${pack} of ${ids.length}`,
        );
      live.chunks.add(
        id,
        frame,
        frame + Math.floor((page.skip(r) + page.count(r) - 1) / chunkBlocks),
      );
    }
  }
  for (let i = 0; i < source.index.commits.length; i++) {
    const page = await source.commitPage(i, false);
    for (let r = 0; r < page.length; r++) {
      const commit = page.record(r);
      const id = ids[commit.pack];
      if (id !== undefined) live.commits.add(id, commit.frame);
    }
  }
}
