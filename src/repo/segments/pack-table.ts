/** The pack table of a segment being written: 16-byte ids to indexes, compactly (40 bytes a pack). */
import { PACK_ID_BYTES } from '../../format/segment.js';

const EMPTY = 0xffff_ffff;

export class PackTable {
  #ids: Buffer;
  #slots: Uint32Array;
  #count = 0;

  constructor() {
    this.#ids = Buffer.allocUnsafe(PACK_ID_BYTES * 256);
    this.#slots = new Uint32Array(512).fill(EMPTY);
  }

  get count(): number {
    return this.#count;
  }

  /** The ids in the order of their indexes; valid until the next {@link PackTable.indexOf}. */
  get bytes(): Buffer {
    return this.#ids.subarray(0, this.#count * PACK_ID_BYTES);
  }

  /** The index of the id at `at` of `from`; a new one if it was not here yet. */
  indexOf(from: Buffer, at: number): number {
    const slot = this.#find(from, at);
    const known = this.#slots[slot];
    if (known !== undefined && known !== EMPTY) return known;
    if (this.#count >= EMPTY - 1) throw new RangeError('a segment with 2^32 packs');
    const index = this.#count++;
    if (this.#count * PACK_ID_BYTES > this.#ids.length) {
      const larger = Buffer.allocUnsafe(this.#ids.length * 2);
      this.#ids.copy(larger);
      this.#ids = larger;
    }
    from.copy(this.#ids, index * PACK_ID_BYTES, at, at + PACK_ID_BYTES);
    this.#slots[slot] = index;
    if (this.#count * 2 > this.#slots.length) this.#grow();
    return index;
  }

  // Ids are random (keyed nowhere, chosen by nobody outside), so their own bytes are the hash.
  #find(from: Buffer, at: number): number {
    const mask = this.#slots.length - 1;
    let slot = from.readUInt32LE(at) & mask;
    for (;;) {
      const index = this.#slots[slot];
      if (index === undefined || index === EMPTY) return slot;
      const here = index * PACK_ID_BYTES;
      if (this.#ids.compare(from, at, at + PACK_ID_BYTES, here, here + PACK_ID_BYTES) === 0)
        return slot;
      slot = (slot + 1) & mask;
    }
  }

  #grow(): void {
    this.#slots = new Uint32Array(this.#slots.length * 2).fill(EMPTY);
    for (let i = 0; i < this.#count; i++) {
      this.#slots[this.#find(this.#ids, i * PACK_ID_BYTES)] = i;
    }
  }
}
