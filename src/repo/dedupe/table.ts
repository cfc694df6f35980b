/**
 * The hash table of the dedupe index: fingerprints of chunk ids in shared memory, without locks.
 *
 * A chunk has an *ordinal*, its number in the table. Ordinals come in runs of {@link RUN_CHUNKS}; a run says which pack its
 * chunks lie in and which chunk of the pack is its first, so that an ordinal stands for a place at 8 bytes a run. Of an id the table
 * keeps 48 bits, 6 bytes: enough to find candidates and to grow the table without the ids, and never believed. Slots hold
 * ordinal + 1; at a load of at most 3/4 the whole takes 11.5 bytes a chunk (limit: 16, 256 MiB for 1 TiB in chunks of 64 KiB).
 *
 * Several threads may look up and insert at once. An entry is written first and then published by an exchange of its
 * slot; entries are never changed or removed afterwards.
 */

/** Chunks of one run. */
export const RUN_CHUNKS = 64;
const RUN_SHIFT = 6;
/** Words of an entry in the ring of recent ids: 8 of id, 1 of place. */
const RECENT_WORDS = 9;
const MAX_LOAD = 0.75;
/** Ordinals are 32 bits, and slots hold them plus one. */
const MAX_ORDINALS = 0xffff_ff00;

/** The memory of a table; crosses to other threads as it is. */
export interface TableMemory {
  /** u32 each: 0 is free. */
  readonly slots: SharedArrayBuffer;
  /** u32 an ordinal: the first half of the fingerprint, which also says where in `slots` to look. */
  readonly tags: SharedArrayBuffer;
  /** u16 an ordinal: the rest of the fingerprint. */
  readonly checks: SharedArrayBuffer;
  /** Two u32 a run: pack index, first chunk. */
  readonly runs: SharedArrayBuffer;
  /** i32: runs taken, entries. */
  readonly state: SharedArrayBuffer;
  /** Full ids and places of the ordinals inserted last, of a table that grows by writing; else empty. */
  readonly recent: SharedArrayBuffer;
}

/**
 * A place as one word: frame number in the upper half (a pack has at most 65,536), then one bit that says that other chunks share the
 * frame, then the index of the chunk in it.
 */
export type PlaceWord = number;

export function placeWord(frame: number, sub: number, shared: boolean): PlaceWord {
  return ((frame << 16) | (shared ? 0x8000 : 0) | sub) >>> 0;
}
export const frameOfPlace = (place: PlaceWord): number => place >>> 16;
export const subOfPlace = (place: PlaceWord): number => place & 0x7fff;
export const sharesFrame = (place: PlaceWord): boolean => (place & 0x8000) !== 0;

/** A thread's view of a table. */
export class ChunkTable {
  readonly memory: TableMemory;
  readonly slots: Uint32Array;
  readonly tags: Uint32Array;
  readonly checks: Uint16Array;
  readonly runs: Uint32Array;
  readonly recent: Uint32Array;
  private readonly state: Int32Array;
  private readonly recentEntries: number;
  private readonly maxEntries: number;

  constructor(memory: TableMemory) {
    this.memory = memory;
    this.slots = new Uint32Array(memory.slots);
    this.tags = new Uint32Array(memory.tags);
    this.checks = new Uint16Array(memory.checks);
    this.runs = new Uint32Array(memory.runs);
    this.state = new Int32Array(memory.state);
    this.recent = new Uint32Array(memory.recent);
    this.recentEntries = Math.floor(this.recent.length / RECENT_WORDS);
    this.maxEntries = Math.floor(this.slots.length * 0.9);
  }

  /**
   * An empty table for `chunks` chunks in `runs` runs (at least one run for every 64 chunks). `recentIds`: how many full ids it
   * keeps. Memory is taken from the system only as it is used.
   */
  static create(chunks: number, runs: number, recentIds: number): ChunkTable {
    return ChunkTable.withSlots(Math.max(64, Math.ceil(chunks / MAX_LOAD)), runs, recentIds);
  }

  /** As `create`, by the number of slots. */
  static withSlots(slots: number, runs: number, recentIds = 0): ChunkTable {
    const ordinals = runs * RUN_CHUNKS;
    if (ordinals > MAX_ORDINALS || slots > MAX_ORDINALS) {
      throw new RangeError(`a dedupe table of ${slots} slots and ${runs} runs`);
    }
    return new ChunkTable({
      slots: new SharedArrayBuffer(slots * 4),
      tags: new SharedArrayBuffer(ordinals * 4),
      checks: new SharedArrayBuffer(ordinals * 2),
      runs: new SharedArrayBuffer(runs * 8),
      state: new SharedArrayBuffer(8),
      recent: new SharedArrayBuffer(recentIds * RECENT_WORDS * 4),
    });
  }

  /** Chunks in the table. */
  get entries(): number {
    return Atomics.load(this.state, 1);
  }

  /** Runs taken so far. */
  get runCount(): number {
    return Math.min(Atomics.load(this.state, 0), this.runs.length / 2);
  }

  /** Bytes of all its memory. */
  get memoryBytes(): number {
    const { slots, tags, checks, runs, state, recent } = this.memory;
    return [slots, tags, checks, runs, state, recent].reduce((sum, b) => sum + b.byteLength, 0);
  }

  /** Chunks that still fit without making look-ups slow. */
  get room(): number {
    return Math.max(0, Math.floor(this.slots.length * MAX_LOAD) - this.entries);
  }

  /** Sets what a table read from a file holds. */
  restoreState(runs: number, entries: number): void {
    Atomics.store(this.state, 0, runs);
    Atomics.store(this.state, 1, entries);
  }

  /** Where looking for `tag` starts. */
  slotOf(tag: number): number {
    return Math.floor((tag * this.slots.length) / 0x1_0000_0000);
  }

  packOf(ordinal: number): number {
    return this.runs[(ordinal >>> RUN_SHIFT) * 2] ?? 0;
  }

  /** Which chunk of its pack an ordinal is. */
  chunkOf(ordinal: number): number {
    return (this.runs[(ordinal >>> RUN_SHIFT) * 2 + 1] ?? 0) + (ordinal & (RUN_CHUNKS - 1));
  }

  /** A run for chunks from `firstChunk` of pack `pack` on: its first ordinal, or undefined if the table is full. */
  takeRun(pack: number, firstChunk: number): number | undefined {
    if (this.entries >= this.maxEntries) return undefined;
    const run = Atomics.add(this.state, 0, 1);
    if (run >= this.runs.length / 2) return undefined;
    this.runs[run * 2] = pack;
    this.runs[run * 2 + 1] = firstChunk;
    return run * RUN_CHUNKS;
  }

  /** Writes the fingerprint of `ordinal`, which is not published yet, and its full id if the table keeps recent ones. */
  prepare(ordinal: number, tag: number, check: number, id: Uint32Array, place: PlaceWord): void {
    this.tags[ordinal] = tag;
    this.checks[ordinal] = check;
    if (this.recentEntries === 0) return;
    const at = (ordinal % this.recentEntries) * RECENT_WORDS;
    for (let i = 0; i < 8; i++) this.recent[at + i] = id[i] ?? 0;
    this.recent[at + 8] = place;
  }

  /** Publishes `ordinal` in `slot` unless another thread was faster; then the ordinal it published there, else undefined. */
  publish(slot: number, ordinal: number): number | undefined {
    const found = Atomics.compareExchange(this.slots, slot, 0, ordinal + 1);
    if (found !== 0) return found - 1;
    Atomics.add(this.state, 1, 1);
    return undefined;
  }

  /** Adds an entry that is known not to be there; for one thread alone. False if the table is full. */
  insertAlone(ordinal: number, tag: number, check: number): boolean {
    const { slots } = this;
    if (this.entries >= this.maxEntries) return false;
    let slot = this.slotOf(tag);
    while (slots[slot] !== 0) slot = slot + 1 === slots.length ? 0 : slot + 1;
    this.tags[ordinal] = tag;
    this.checks[ordinal] = check;
    slots[slot] = ordinal + 1;
    this.state[1] = (this.state[1] ?? 0) + 1;
    return true;
  }

  /**
   * The place of `ordinal` if the full id kept for it is `id`; undefined if it is another or none is kept. A thread may be writing over
   * the entry meanwhile: then the words are of two ids and equal neither.
   */
  recentPlace(ordinal: number, id: Uint32Array): PlaceWord | undefined {
    if (this.recentEntries === 0) return undefined;
    const at = (ordinal % this.recentEntries) * RECENT_WORDS;
    const place = this.recent[at + 8];
    for (let i = 0; i < 8; i++) if (this.recent[at + i] !== id[i]) return undefined;
    return this.recent[at + 8] === place ? place : undefined; // unchanged all the time that the id was right
  }

  /** True if the full id of `ordinal` may have been written over by a later one. */
  recentIsPast(ordinal: number): boolean {
    return Atomics.load(this.state, 0) * RUN_CHUNKS - ordinal > this.recentEntries;
  }
}
