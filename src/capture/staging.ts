/** Blocks that were read and wait for their commit, in memory of a fixed most size. */
import { BLOCK_BYTES } from '../units.js';

const SLAB_BLOCKS = 1024;
/** Memory grows by so much at a time. */
export const STAGE_STEP_BYTES = SLAB_BLOCKS * BLOCK_BYTES;

/** What a commit takes: distinct blocks, ascending. The bytes are valid until the commit resolves or rejects. */
export interface StagedBlocks {
  readonly blocks: Float64Array;
  /** Bytes of `blocks[index]`: a whole block, or less for the last block of the device. */
  bytesAt(index: number): Buffer;
}

/** At most `maxBlocks` blocks of the newest content; memory grows in steps of 4 MiB and is kept. */
export class Staging {
  readonly maxBlocks: number;
  private readonly slotOf = new Map<number, number>();
  private readonly slabs: Buffer[] = [];
  private used = 0;

  constructor(maxBlocks: number) {
    if (!Number.isSafeInteger(maxBlocks) || maxBlocks < 1)
      throw new RangeError(`staging of ${maxBlocks} blocks`);
    this.maxBlocks = maxBlocks;
  }

  get size(): number {
    return this.slotOf.size;
  }

  get bytes(): number {
    return this.slabs.length * SLAB_BLOCKS * BLOCK_BYTES;
  }

  /** True if `more` blocks fit, whether they are new or not. */
  hasRoomFor(more: number): boolean {
    return this.used + more <= this.maxBlocks;
  }

  /** Copies the content of a block, in place of what was staged of it before. Throws where there is no room. */
  put(block: number, content: Uint8Array): void {
    let slot = this.slotOf.get(block);
    if (slot === undefined) {
      if (this.used >= this.maxBlocks) throw new RangeError('staging is full');
      slot = this.used++;
      this.slotOf.set(block, slot);
    }
    this.slot(slot).set(content.subarray(0, BLOCK_BYTES));
  }

  private slot(slot: number): Buffer {
    const index = Math.floor(slot / SLAB_BLOCKS);
    let slab = this.slabs[index];
    if (slab === undefined) {
      slab = Buffer.allocUnsafeSlow(SLAB_BLOCKS * BLOCK_BYTES);
      this.slabs[index] = slab;
    }
    const at = (slot % SLAB_BLOCKS) * BLOCK_BYTES;
    return slab.subarray(at, at + BLOCK_BYTES);
  }

  /** Everything staged, for a device of `sizeBytes`. Nothing may be put before `clear`. */
  all(sizeBytes: number): StagedBlocks {
    const blocks = Float64Array.from(this.slotOf.keys()).sort();
    return {
      blocks,
      bytesAt: (index) => {
        const block = blocks[index] ?? -1;
        const slot = this.slotOf.get(block);
        if (slot === undefined) throw new RangeError(`no staged block at ${index}`);
        return this.slot(slot).subarray(0, Math.min(BLOCK_BYTES, sizeBytes - block * BLOCK_BYTES));
      },
    };
  }

  clear(): void {
    this.slotOf.clear();
    this.used = 0;
  }
}
