/**
 * Looking up chunks, one thread's side of the dedupe index. The tables only name candidates; a hit is a hit when the full 32-byte
 * id of the candidate is the same, read from the footer of its pack, or, for chunks stored a moment ago, from the ids that the
 * session keeps in shared memory. What cannot be verified is a miss: the chunk is then stored again, and the new copy is found next time.
 */
import type { PackReadContext } from '../pack-reader.js';
import { FooterCache, idAtEquals, placeAt, readPackChunks } from './footers.js';
import { PackFlag, PackTable, type PackTableMemory } from './packs.js';
import { ChunkTable, RUN_CHUNKS, frameOfPlace, type PlaceWord, type TableMemory } from './table.js';

/** What a look-up says. */
export const Found = {
  /** Not there. */
  miss: 0,
  /** There: `pack` and `place` of the view say where. */
  hit: 1,
  /** It was not there and is now, at the place that was offered. */
  added: 2,
  /** Await {@link DedupeView.loadFooter}, then ask again. */
  needsFooter: 3,
} as const;
export type Found = (typeof Found)[keyof typeof Found];

/** All that a thread needs to look up chunks; crosses the border as it is. */
export interface DedupeShared {
  readonly packs: PackTableMemory;
  /** What the repository held when the index was opened. */
  readonly base: TableMemory | undefined;
  /** What this session has stored. */
  readonly session: TableMemory | undefined;
  /** Frames that must not be reused, by number of the pack. */
  readonly excludedFrames: ReadonlyMap<number, readonly number[]>;
}

/** Bytes of footers that one view keeps at most: some 400 packs of chunks of 64 KiB. */
const FOOTER_CACHE_BYTES = 16 * 1024 * 1024;

interface OpenRun {
  readonly firstOrdinal: number;
  readonly endOrdinal: number;
  readonly firstChunk: number;
}

/** One thread's look-ups. Not for use by two call stacks at once. */
export class DedupeView {
  readonly packs: PackTable;
  /** After a hit: the number of the pack. */
  pack = 0;
  /** After a hit: frame and chunk in it (see table.ts). */
  place: PlaceWord = 0;
  private readonly ctx: PackReadContext;
  private readonly base: ChunkTable | undefined;
  private readonly session: ChunkTable | undefined;
  private readonly excluded: ReadonlyMap<number, ReadonlySet<number>>;
  private readonly footers = new FooterCache(FOOTER_CACHE_BYTES);
  private readonly id = new Uint32Array(8);
  private readonly idBytes = Buffer.from(this.id.buffer);
  private wantedPack = -1;
  private freeSlot = -1;
  /** Runs that packs being written have open, by number of the pack. */
  private readonly runs = new Map<number, OpenRun>();

  constructor(shared: DedupeShared, ctx: PackReadContext) {
    this.ctx = ctx;
    this.packs = new PackTable(shared.packs);
    this.base = shared.base === undefined ? undefined : new ChunkTable(shared.base);
    this.session = shared.session === undefined ? undefined : new ChunkTable(shared.session);
    this.excluded = new Map(
      [...shared.excludedFrames].map(([pack, frames]) => [pack, new Set(frames)]),
    );
  }

  /** Looks for a chunk by its id (32 bytes). */
  find(id: Uint8Array): Found {
    this.idBytes.set(id);
    const tag = this.id[0] ?? 0;
    const check = (this.id[1] ?? 0) & 0xffff;
    if (this.base !== undefined) {
      const found = this.search(this.base, tag, check, false);
      if (found !== Found.miss) return found;
    }
    return this.session === undefined ? Found.miss : this.search(this.session, tag, check, true);
  }

  /**
   * Looks for a chunk, and if it is not there enters it at the place offered, chunk `chunkIndex` of pack `pack`: the caller
   * then puts it exactly there, and other threads may refer to it from now on. `added`, or `miss` if the
   * index is full: then the caller stores it and nobody will know.
   */
  findOrAdd(id: Uint8Array, pack: number, chunkIndex: number, place: PlaceWord): Found {
    const { session } = this;
    for (;;) {
      const found = this.find(id);
      if (found !== Found.miss || session === undefined || this.freeSlot < 0) return found;
      const ordinal = this.ordinalFor(session, pack, chunkIndex);
      if (ordinal === undefined) return Found.miss;
      session.prepare(ordinal, this.id[0] ?? 0, (this.id[1] ?? 0) & 0xffff, this.id, place);
      if (session.publish(this.freeSlot, ordinal) === undefined) return Found.added;
      // Another thread took the slot just now, perhaps with this very chunk.
    }
  }

  /** The footer that a look-up has asked for. If it cannot be had, nothing of that pack is offered any more, to any thread. */
  async loadFooter(): Promise<void> {
    const pack = this.wantedPack;
    const chunks = await readPackChunks(this.ctx, this.packs.idOf(pack));
    if (chunks === undefined) this.packs.set(pack, PackFlag.unusable | PackFlag.unreadable);
    else this.footers.set(pack, chunks);
  }

  /** A number for a pack that this thread begins to write. */
  beginPack(packId: string): number {
    return this.packs.add(packId, PackFlag.own);
  }

  /** The pack is sealed and durable: hits in it can be verified by its footer. */
  endPack(pack: number, sizeBytes: number, chunks: number): void {
    this.runs.delete(pack);
    this.packs.setSealed(pack, sizeBytes, chunks);
  }

  /** The pack will not be finished. */
  dropPack(pack: number): void {
    this.runs.delete(pack);
    this.packs.set(pack, PackFlag.unusable);
  }

  private search(table: ChunkTable, tag: number, check: number, live: boolean): Found {
    const { slots, tags, checks } = table;
    const size = slots.length;
    let slot = table.slotOf(tag);
    this.freeSlot = -1;
    for (let probe = 0; probe < size; probe++) {
      const value = live ? Atomics.load(slots, slot) : (slots[slot] ?? 0);
      if (value === 0) {
        this.freeSlot = slot;
        return Found.miss;
      }
      const ordinal = value - 1;
      if (tags[ordinal] === tag && checks[ordinal] === check) {
        const found = this.verify(table, ordinal, live);
        if (found !== Found.miss) return found;
      }
      slot = slot + 1 === size ? 0 : slot + 1;
    }
    return Found.miss;
  }

  private verify(table: ChunkTable, ordinal: number, live: boolean): Found {
    const pack = table.packOf(ordinal);
    const flags = this.packs.flagsOf(pack);
    if ((flags & (PackFlag.unusable | PackFlag.condemned)) !== 0) return Found.miss;
    let place = table.recentPlace(ordinal, this.id);
    if (place === undefined) {
      if (live && !table.recentIsPast(ordinal)) return Found.miss; // its full id is at hand and is another
      if ((flags & PackFlag.sealed) === 0) return Found.miss;
      const chunks = this.footers.get(pack);
      if (chunks === undefined) {
        this.wantedPack = pack;
        return Found.needsFooter;
      }
      const chunk = table.chunkOf(ordinal);
      if (!idAtEquals(chunks, chunk, this.id)) return Found.miss;
      place = placeAt(chunks, chunk);
    }
    if (this.excluded.get(pack)?.has(frameOfPlace(place)) === true) return Found.miss;
    this.pack = pack;
    this.place = place;
    return Found.hit;
  }

  private ordinalFor(session: ChunkTable, pack: number, chunkIndex: number): number | undefined {
    const run = this.runs.get(pack);
    if (run !== undefined && chunkIndex >= run.firstChunk) {
      const ordinal = run.firstOrdinal + (chunkIndex - run.firstChunk);
      if (ordinal < run.endOrdinal) return ordinal;
    }
    const first = session.takeRun(pack, chunkIndex);
    if (first === undefined) return undefined;
    this.runs.set(pack, {
      firstOrdinal: first,
      endOrdinal: first + RUN_CHUNKS,
      firstChunk: chunkIndex,
    });
    return first;
  }
}
