/** The packs that a dedupe index knows, by a small number, in memory that all threads share. */

/** What is known of a pack; bits of its flags. */
export const PackFlag = {
  /** It has a footer to verify hits with. */
  sealed: 1,
  /** Written by the session under way. */
  own: 2,
  /** Nothing of it is offered: it is gone, was abandoned, or its footer cannot be read. */
  unusable: 4,
  /** The footer could not be read when a hit was to be verified. */
  unreadable: 8,
  /** Nothing of it is offered because prune means to delete it. */
  condemned: 16,
} as const;

const ID_BYTES = 16;

/** Crosses to other threads as it is. */
export interface PackTableMemory {
  readonly ids: SharedArrayBuffer;
  readonly flags: SharedArrayBuffer;
  /** f64 a pack: bytes when its footer was read or written, 0 before. */
  readonly sizes: SharedArrayBuffer;
  /** u32 a pack: chunks in it. */
  readonly chunks: SharedArrayBuffer;
  readonly state: SharedArrayBuffer;
}

/** A thread's view of the packs. A pack's number, once given, stays. */
export class PackTable {
  readonly memory: PackTableMemory;
  private readonly ids: Buffer;
  private readonly flags: Int32Array;
  private readonly sizes: Float64Array;
  private readonly chunks: Uint32Array;
  private readonly state: Int32Array;

  constructor(memory: PackTableMemory) {
    this.memory = memory;
    this.ids = Buffer.from(memory.ids);
    this.flags = new Int32Array(memory.flags);
    this.sizes = new Float64Array(memory.sizes);
    this.chunks = new Uint32Array(memory.chunks);
    this.state = new Int32Array(memory.state);
  }

  /** Room for `packs` packs. */
  static create(packs: number): PackTable {
    return new PackTable({
      ids: new SharedArrayBuffer(packs * ID_BYTES),
      flags: new SharedArrayBuffer(packs * 4),
      sizes: new SharedArrayBuffer(packs * 8),
      chunks: new SharedArrayBuffer(packs * 4),
      state: new SharedArrayBuffer(4),
    });
  }

  get count(): number {
    return Math.min(Atomics.load(this.state, 0), this.flags.length);
  }

  get capacity(): number {
    return this.flags.length;
  }

  /** A number for pack `packId`. Throws RangeError if there is no room. */
  add(packId: string, flags: number): number {
    const pack = Atomics.add(this.state, 0, 1);
    if (pack >= this.flags.length) throw new RangeError('the pack table is full');
    this.ids.write(packId, pack * ID_BYTES, 'hex');
    Atomics.store(this.flags, pack, flags);
    return pack;
  }

  idOf(pack: number): string {
    if (pack < 0 || pack >= this.count) throw new RangeError(`no pack has number ${pack}`);
    return this.ids.toString('hex', pack * ID_BYTES, pack * ID_BYTES + ID_BYTES);
  }

  flagsOf(pack: number): number {
    return Atomics.load(this.flags, pack);
  }

  /** Sets how many packs a table read from a file holds. */
  restoreCount(packs: number): void {
    Atomics.store(this.state, 0, packs);
  }

  /** Says that the pack is sealed, its size and its chunks. */
  setSealed(pack: number, sizeBytes: number, chunks: number): void {
    this.sizes[pack] = sizeBytes;
    this.chunks[pack] = chunks;
    Atomics.or(this.flags, pack, PackFlag.sealed);
  }

  sizeOf(pack: number): number {
    return this.sizes[pack] ?? 0;
  }

  chunksOf(pack: number): number {
    return this.chunks[pack] ?? 0;
  }

  set(pack: number, flags: number): void {
    Atomics.or(this.flags, pack, flags);
  }

  unset(pack: number, flags: number): void {
    Atomics.and(this.flags, pack, ~flags);
  }

  /** The same packs with their numbers, in memory with room for `packs`. */
  grown(packs: number): PackTable {
    const count = this.count;
    const table = PackTable.create(Math.max(packs, count));
    this.ids.copy(table.ids, 0, 0, count * ID_BYTES);
    table.flags.set(this.flags.subarray(0, count));
    table.sizes.set(this.sizes.subarray(0, count));
    table.chunks.set(this.chunks.subarray(0, count));
    table.state[0] = count;
    return table;
  }
}
