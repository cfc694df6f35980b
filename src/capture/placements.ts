/** What a scan found, one entry for each chunk window of the device, in shared memory that the workers fill. */
import type { ByteRange } from '../devices/device.js';
import { STRIPE_BLOCKS } from '../format/extent.js';
import { frameOfPlace, sharesFrame, subOfPlace } from '../repo/dedupe/table.js';
import { BLOCK_BYTES, blocksOf } from '../units.js';

/** In place of a pack: the window is all zeros. */
export const WINDOW_HOLE = 0xffff_ffff;
/** In place of a pack: no worker has come to the window yet. */
export const WINDOW_UNKNOWN = 0xffff_fffe;

/** Eight bytes a window; crosses to other threads as it is. */
export interface PlacementMemory {
  /** u32 a window: number of the pack, or one of the values above. */
  readonly packs: SharedArrayBuffer;
  /** u32 a window: frame and chunk in it (dedupe/table.ts). */
  readonly places: SharedArrayBuffer;
}

/** A run of blocks and where its data lie; `packId` undefined: zeros. Never crosses a stripe (FORMAT.md 5.4). */
export interface ScannedExtent {
  readonly block: number;
  readonly count: number;
  readonly packId: string | undefined;
  readonly frame: number;
  readonly sub: number;
  readonly skip: number;
}

/** Where one window's data lie. */
export interface WindowPlace {
  /** Undefined: the window is all zeros. */
  readonly packId: string | undefined;
  readonly frame: number;
  readonly sub: number;
  /** False if the chunk is alone in its frame, so that it can be part of a run. */
  readonly sharesFrame: boolean;
}

/** The windows of a scanned range, in order. Takes 8 bytes a window: 128 MiB for 1 TiB in chunks of 64 KiB. */
export class Placements {
  readonly range: ByteRange;
  readonly chunkBytes: number;
  /** Windows in the range; the last may be short. */
  readonly windows: number;
  /** The packs that windows lie in. */
  readonly packIds: readonly string[];
  private readonly packs: Uint32Array;
  private readonly places: Uint32Array;

  constructor(
    range: ByteRange,
    chunkBytes: number,
    packIds: readonly string[],
    memory: PlacementMemory,
  ) {
    this.range = range;
    this.chunkBytes = chunkBytes;
    this.windows = Math.ceil(range.length / chunkBytes);
    this.packIds = packIds;
    this.packs = new Uint32Array(memory.packs);
    this.places = new Uint32Array(memory.places);
  }

  /** Window `index` (from 0; it starts at `range.offset + index · chunkBytes`). */
  at(index: number): WindowPlace {
    const pack = this.packs[index];
    const place = this.places[index];
    if (pack === undefined || place === undefined) throw new RangeError(`no window ${index}`);
    if (pack === WINDOW_HOLE) return { packId: undefined, frame: 0, sub: 0, sharesFrame: false };
    return {
      packId: this.packIds[pack],
      frame: frameOfPlace(place),
      sub: subOfPlace(place),
      sharesFrame: sharesFrame(place),
    };
  }

  /** True if the window is all zeros. */
  isHole(index: number): boolean {
    return this.packs[index] === WINDOW_HOLE;
  }

  /**
   * The whole range as extents in ascending order, holes included: windows whose data lie in consecutive frames, alone there,
   * become runs; neighbouring holes become one.
   */
  *extents(): Generator<ScannedExtent> {
    const chunkBlocks = this.chunkBytes / BLOCK_BYTES;
    const firstBlock = this.range.offset / BLOCK_BYTES;
    const blocks = blocksOf(this.range.length);
    for (let index = 0; index < this.windows;) {
      const block = firstBlock + index * chunkBlocks;
      const limit = Math.min(
        this.windows,
        index + (STRIPE_BLOCKS - (block % STRIPE_BLOCKS)) / chunkBlocks,
      );
      const pack = this.packs[index] ?? WINDOW_HOLE;
      const place = this.places[index] ?? 0;
      let end = index + 1;
      if (pack === WINDOW_HOLE) {
        while (end < limit && this.packs[end] === WINDOW_HOLE) end++;
      } else if (!sharesFrame(place) && subOfPlace(place) === 0) {
        // The next frame is one more in the upper half of the word.
        while (
          end < limit &&
          this.packs[end] === pack &&
          this.places[end] === place + (end - index) * 0x1_0000
        )
          end++;
      }
      const count = Math.min(end * chunkBlocks, blocks) - index * chunkBlocks;
      yield pack === WINDOW_HOLE
        ? { block, count, packId: undefined, frame: 0, sub: 0, skip: 0 }
        : {
            block,
            count,
            packId: this.packIds[pack],
            frame: frameOfPlace(place),
            sub: subOfPlace(place),
            skip: 0,
          };
      index = end;
    }
  }
}
