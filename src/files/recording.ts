/**
 * Which blocks of an image were read. What a file system driver finds depends on nothing else: at another point where every one of
 * these blocks is the same, the same look would take the same course and find the same.
 */
import type { Image } from '../image.js';
import { BLOCK_BYTES, blocksOf } from '../units.js';

/** Blocks [from, to) of an image. */
export interface BlockRange {
  readonly from: number;
  readonly to: number;
}

/** Blocks that one entry of the map stands for: 4 KiB of bits for 128 MiB of the image. */
const PAGE_BLOCKS = 32_768;

/** A set of blocks. Memory: 4 KiB for each 128 MiB of the image in which there are any. */
export class BlockSet {
  readonly #pages = new Map<number, Uint32Array>();

  /** Adds the blocks that bytes [offset, offset + length) touch. */
  add(offset: number, length: number): void {
    if (length <= 0) return;
    const end = blocksOf(offset + length);
    for (let block = Math.floor(offset / BLOCK_BYTES); block < end; block++) {
      const key = Math.floor(block / PAGE_BLOCKS);
      let page = this.#pages.get(key);
      if (page === undefined) this.#pages.set(key, (page = new Uint32Array(PAGE_BLOCKS / 32)));
      const bit = block % PAGE_BLOCKS;
      page[bit >>> 5] = (page[bit >>> 5] ?? 0) | (1 << (bit & 31));
    }
  }

  /** Ascending, as few as possible. */
  ranges(): BlockRange[] {
    const ranges: { from: number; to: number }[] = [];
    for (const key of [...this.#pages.keys()].sort((a, b) => a - b)) {
      const page = this.#pages.get(key) ?? new Uint32Array();
      for (const [w, word] of page.entries()) {
        if (word === 0) continue;
        for (let bit = 0; bit < 32; bit++) {
          if (((word >>> bit) & 1) === 0) continue;
          const block = key * PAGE_BLOCKS + w * 32 + bit;
          const last = ranges.at(-1);
          if (last !== undefined && last.to === block) last.to++;
          else ranges.push({ from: block, to: block + 1 });
        }
      }
    }
    return ranges;
  }
}

/** Records what is read of one image, however often it is opened. */
export class Recorder {
  readonly #all = new BlockSet();
  #sinceMark: BlockSet | undefined;

  /** Everything read so far. */
  get all(): BlockRange[] {
    return this.#all.ranges();
  }

  /** What was read since {@link Recorder.mark}. */
  get sinceMark(): BlockRange[] {
    return this.#sinceMark?.ranges() ?? [];
  }

  mark(): void {
    this.#sinceMark = new BlockSet();
  }

  /**
   * The image, its reads recorded. Where it was told that there is a hole counts as read, because who knows that need not read it.
   * Closing it closes `base`.
   */
  wrap(base: Image): Image {
    const note = (offset: number, length: number): void => {
      this.#all.add(offset, length);
      this.#sinceMark?.add(offset, length);
    };
    return {
      sizeBytes: base.sizeBytes,
      logicalBlockBytes: base.logicalBlockBytes,
      read: (into, offset) => {
        note(offset, into.byteLength);
        return base.read(into, offset);
      },
      extents: async (offset, length, limit) => {
        const runs = await base.extents(offset, length, limit);
        for (const run of runs) if (run.hole) note(run.offset, run.length);
        return runs;
      },
      close: () => base.close(),
    };
  }
}
