/**
 * The dedupe index: where every chunk of a repository lies. One object a process, used by its main thread; look-ups, in any
 * thread, go through {@link DedupeView}s made from what `share` gives out.
 *
 * It knows the sealed packs. What a session stores is entered in a table of its own, which becomes part of the
 * index when the session ends well and is forgotten when it does not.
 */
import { abortError } from '../../workers.js';
import { packIdOf } from '../../format/names.js';
import type { PackReadContext } from '../pack-reader.js';
import { loadDedupeCache, saveDedupeCache } from './cache-file.js';
import { readPackChunks, type PackChunks } from './footers.js';
import { PackFlag, PackTable } from './packs.js';
import { ChunkTable, RUN_CHUNKS } from './table.js';
import { DedupeView, type DedupeShared } from './view.js';

/** Places that must not be reused. */
export interface ExcludedPlaces {
  /** Whole packs. */
  readonly packs: Iterable<string>;
  /** Frames, by pack. */
  readonly frames: Iterable<readonly [packId: string, frames: readonly number[]]>;
}

export interface OpenDedupeOptions {
  readonly ctx: PackReadContext;
  /** Where the local copy of the index is kept; undefined: nowhere, every footer is read. */
  readonly cacheFile: string | undefined;
  readonly signal?: AbortSignal | undefined;
  /** Footers read at a time; default 8. */
  readonly readers?: number;
  /** After each footer read. */
  readonly onProgress?: (donePacks: number, totalPacks: number) => void;
}

/** How an index came to know its packs. */
export interface DedupeOpening {
  /** Packs known from the local file. */
  readonly cachedPacks: number;
  /** Packs whose footer was read now. */
  readonly readPacks: number;
  /** Packs without a good footer: being written, abandoned or damaged. Nothing of them is reused. */
  readonly skippedPacks: number;
}

const DEFAULT_READERS = 8;
/** Full ids kept of a session, 36 bytes each: more than the packs that are being written can hold. */
const MAX_RECENT_IDS = 1 << 20;
/** Of the chunks of the index, when more than one in this many belongs to packs that are gone, it is built anew. */
const GONE_SHARE = 5;
const SPARE_PACKS = 256;

const runsFor = (chunks: number): number => Math.ceil(chunks / RUN_CHUNKS);

/** See the file comment. */
export class DedupeIndex {
  private readonly ctx: PackReadContext;
  private readonly cacheFile: string | undefined;
  private readonly readers: number;
  private packs: PackTable;
  private base: ChunkTable;
  private session: ChunkTable | undefined;
  private numberOf = new Map<string, number>();
  private excludedFrames = new Map<string, readonly number[]>();
  private excludedPacks = new Set<string>();
  private dirty = false;
  private last: DedupeOpening = { cachedPacks: 0, readPacks: 0, skippedPacks: 0 };

  private constructor(options: OpenDedupeOptions, packs: PackTable, base: ChunkTable) {
    this.ctx = options.ctx;
    this.cacheFile = options.cacheFile;
    this.readers = options.readers ?? DEFAULT_READERS;
    this.packs = packs;
    this.base = base;
    for (let i = 0; i < packs.count; i++) {
      if ((packs.flagsOf(i) & PackFlag.unusable) === 0) this.numberOf.set(packs.idOf(i), i);
    }
  }

  /** Loads the local copy and reads the footers of the packs that it does not know. Rejects with what listing the store rejects with. */
  static async open(options: OpenDedupeOptions): Promise<DedupeIndex> {
    const cached =
      options.cacheFile === undefined
        ? undefined
        : await loadDedupeCache(options.cacheFile, options.ctx.repositoryId);
    const index = new DedupeIndex(
      options,
      cached?.packs ?? PackTable.create(SPARE_PACKS),
      cached?.table ?? ChunkTable.create(0, 0, 0),
    );
    await index.refresh(options);
    return index;
  }

  /** Chunks that can be found, about: a chunk that is stored twice counts twice. */
  get chunkCount(): number {
    return this.base.entries + (this.session?.entries ?? 0);
  }

  /** Packs that are offered. */
  get packCount(): number {
    return this.numberOf.size;
  }

  /** Bytes of shared memory it has reserved; those never written to are not taken from the system. */
  get memoryBytes(): number {
    const { ids, flags, sizes, chunks } = this.packs.memory;
    const packs = ids.byteLength + flags.byteLength + sizes.byteLength + chunks.byteLength;
    return this.base.memoryBytes + (this.session?.memoryBytes ?? 0) + packs;
  }

  /** How the last `open` or `refresh` went. */
  get opening(): DedupeOpening {
    return this.last;
  }

  /**
   * Compares with the packs that are in the store now: new ones are added, those that are gone or were compacted are not offered as
   * they were. Not during a session.
   */
  async refresh(
    options: {
      readonly signal?: AbortSignal | undefined;
      readonly onProgress?: (done: number, total: number) => void;
    } = {},
  ): Promise<void> {
    this.refuseSession();
    const listed = new Map<string, number>();
    let unknownBytes = 0;
    const unknown: string[] = [];
    for await (const { name, sizeBytes } of this.ctx.store.list('packs')) {
      const packId = packIdOf(name);
      if (packId === undefined) continue;
      listed.set(packId, sizeBytes);
      if (this.isKnown(packId, sizeBytes)) continue;
      unknown.push(packId);
      unknownBytes += sizeBytes;
    }
    const cachedPacks = listed.size - unknown.length;
    for (const [packId, number] of this.numberOf) {
      if (this.isKnown(packId, listed.get(packId))) continue;
      this.packs.set(number, PackFlag.unusable);
      this.numberOf.delete(packId);
      this.dirty = true;
    }
    this.dropGone();
    if (this.packs.capacity < this.packs.count + unknown.length) {
      this.packs = this.packs.grown(this.packs.count + unknown.length + SPARE_PACKS);
    }
    let next = 0;
    let done = 0;
    let readPacks = 0;
    let readBytes = 0;
    let chunks = 0;
    const reader = async (): Promise<void> => {
      for (;;) {
        const packId = unknown[next++];
        if (packId === undefined) return;
        if (options.signal?.aborted === true)
          throw abortError(options.signal, 'reading the index of chunks');
        const found = await readPackChunks(this.ctx, packId);
        done++;
        if (found !== undefined) {
          readPacks++;
          readBytes += found.sizeBytes;
          chunks += found.places.length;
          this.addPack(
            packId,
            found,
            found.sizeBytes,
            (chunks / readBytes) * (unknownBytes - readBytes),
          );
        }
        options.onProgress?.(done, unknown.length);
      }
    };
    // All of them end before this does: nothing may still read from the store afterwards.
    const ended = await Promise.allSettled(Array.from({ length: this.readers }, reader));
    for (const end of ended) if (end.status === 'rejected') throw end.reason;
    this.last = { cachedPacks, readPacks, skippedPacks: unknown.length - readPacks };
  }

  /** What must not be offered from now on, in place of what was said before. Not during a session. */
  setExcluded(places: ExcludedPlaces): void {
    this.refuseSession();
    this.excludedPacks = new Set(places.packs);
    this.excludedFrames = new Map(places.frames);
    for (let i = 0; i < this.packs.count; i++) this.packs.unset(i, PackFlag.condemned);
    for (const packId of this.excludedPacks) {
      const number = this.numberOf.get(packId);
      if (number !== undefined) this.packs.set(number, PackFlag.condemned);
    }
  }

  /**
   * Begins a session that may store up to `chunks` chunks in up to `packs` packs. One at a time; end it with `endSession`.
   */
  startSession(chunks: number, packs: number): void {
    this.refuseSession();
    this.packs = this.packs.grown(this.packs.count + packs + SPARE_PACKS);
    // A pack begins a run, and each chunk that is not stored ends none: at most one run a pack is not full.
    this.session = ChunkTable.create(
      chunks,
      runsFor(chunks) + packs + 64,
      Math.min(chunks + packs * RUN_CHUNKS, MAX_RECENT_IDS),
    );
  }

  /**
   * What a thread needs for a {@link DedupeView}. With `reuse` false only what this session has stored is offered: for
   * a writer that cannot know what prune means to delete.
   */
  share(reuse = true): DedupeShared {
    const excludedFrames = new Map<number, readonly number[]>();
    for (const [packId, frames] of this.excludedFrames) {
      const number = this.numberOf.get(packId);
      if (number !== undefined) excludedFrames.set(number, frames);
    }
    return {
      packs: this.packs.memory,
      base: reuse ? this.base.memory : undefined,
      session: this.session?.memory,
      excludedFrames,
    };
  }

  /** A view for this thread. */
  view(reuse = true): DedupeView {
    return new DedupeView(this.share(reuse), this.ctx);
  }

  /** The id of pack `number`, as views give numbers. */
  packIdOf(number: number): string {
    return this.packs.idOf(number);
  }

  /** True if the session under way writes, or has written, pack `number`. */
  isOwn(number: number): boolean {
    return (this.packs.flagsOf(number) & PackFlag.own) !== 0;
  }

  /** Packs whose footer could not be read to verify a hit: their chunks were stored again. Worth a `b2 verify`. */
  unreadablePacks(): string[] {
    const ids: string[] = [];
    for (let i = 0; i < this.packs.count; i++) {
      if ((this.packs.flagsOf(i) & PackFlag.unreadable) !== 0) ids.push(this.packs.idOf(i));
    }
    return ids;
  }

  /**
   * Ends the session. `keep`: what it stored in packs that are sealed by now belongs to the index. Otherwise all of it is forgotten (packs
   * that were sealed are found again by `refresh`).
   */
  endSession(keep: boolean): void {
    const { session } = this;
    if (session === undefined) return;
    this.session = undefined;
    const { packs } = this;
    const sealed = (pack: number): boolean =>
      (packs.flagsOf(pack) & (PackFlag.sealed | PackFlag.unusable)) === PackFlag.sealed;
    for (let i = 0; i < packs.count; i++) {
      if ((packs.flagsOf(i) & PackFlag.own) === 0) continue;
      packs.unset(i, PackFlag.own);
      if (keep && sealed(i)) this.numberOf.set(packs.idOf(i), i);
      else packs.set(i, PackFlag.unusable);
    }
    if (!keep || session.entries === 0) return;
    this.makeRoom(session.entries, session.runCount, 0);
    this.dirty = true;
    this.copyEntries(session, (pack) => (sealed(pack) ? pack : undefined));
  }

  /** Writes the local copy if anything has changed since it was read. Rejects with B2Error; the index goes on working. */
  async save(): Promise<void> {
    this.refuseSession();
    if (this.cacheFile === undefined || !this.dirty) return;
    await saveDedupeCache(this.cacheFile, this.ctx.repositoryId, this.packs, this.base);
    this.dirty = false;
  }

  private refuseSession(): void {
    if (this.session !== undefined) throw new Error('the dedupe index has a session under way');
  }

  private addPack(
    packId: string,
    found: PackChunks,
    sizeBytes: number,
    expectedMore: number,
  ): void {
    const chunks = found.places.length;
    const number = this.packs.add(packId, 0);
    this.packs.setSealed(number, sizeBytes, chunks);
    if (this.excludedPacks.has(packId)) this.packs.set(number, PackFlag.condemned);
    this.numberOf.set(packId, number);
    this.makeRoom(chunks, runsFor(chunks), expectedMore);
    this.dirty = true;
    for (let from = 0; from < chunks; from += RUN_CHUNKS) {
      const first = this.base.takeRun(number, from);
      if (first === undefined) throw new Error('no room was made for the chunks of a pack');
      const count = Math.min(RUN_CHUNKS, chunks - from);
      for (let i = 0; i < count; i++) {
        const at = (from + i) * 8;
        const check = (found.ids[at + 1] ?? 0) & 0xffff;
        if (!this.base.insertAlone(first + i, found.ids[at] ?? 0, check))
          throw new Error('no room was made for a chunk');
      }
    }
  }

  /** Makes the base large enough for `chunks` more in `runs` runs; when it has to be moved, for `expected` chunks beyond that too. */
  private makeRoom(chunks: number, runs: number, expected: number): void {
    const { base } = this;
    const freeRuns = base.runs.length / 2 - base.runCount;
    if (base.room >= chunks && freeRuns >= runs) return;
    const more = Math.ceil(Math.max(expected * 1.03, base.entries * 0.1, 1024));
    const grown = ChunkTable.create(
      base.entries + chunks + more,
      base.runCount + runs + runsFor(more * 1.1) + 64,
      0,
    );
    this.base = grown;
    this.copyEntries(base, (pack) => (pack < this.packs.count ? pack : undefined));
  }

  /**
   * Copies entries of `from` to the base, which has room for them: those whose pack `packFor` gives a number to, under that number.
   */
  private copyEntries(from: ChunkTable, packFor: (pack: number) => number | undefined): void {
    const { base } = this;
    const target = new Map<number, number>();
    // In order of runs, so that the copy is as compact as the original.
    for (let run = 0; run < from.runCount; run++) {
      const first = run * RUN_CHUNKS;
      const pack = packFor(from.packOf(first));
      if (pack === undefined) continue;
      const taken = base.takeRun(pack, from.chunkOf(first));
      if (taken === undefined) throw new Error('no room was made for copied runs');
      target.set(run, taken);
    }
    for (const value of from.slots) {
      if (value === 0) continue;
      const ordinal = value - 1;
      const first = target.get(Math.floor(ordinal / RUN_CHUNKS));
      if (first === undefined) continue;
      const at = first + (ordinal % RUN_CHUNKS);
      if (!base.insertAlone(at, from.tags[ordinal] ?? 0, from.checks[ordinal] ?? 0)) {
        throw new Error('no room was made for copied chunks');
      }
    }
  }

  /** Builds base and pack table anew, without the packs that are gone, if too much belongs to those. */
  private dropGone(): void {
    const old = this.packs;
    const count = old.count;
    let goneChunks = 0;
    let gonePacks = 0;
    for (let i = 0; i < count; i++) {
      if (!this.isGone(i)) continue;
      gonePacks++;
      goneChunks += old.chunksOf(i);
    }
    if (goneChunks * GONE_SHARE <= this.base.entries && gonePacks * 2 <= count) return;
    const packs = PackTable.create(count - gonePacks + SPARE_PACKS);
    const numbers = new Map<number, number>();
    for (let i = 0; i < count; i++) {
      if (this.isGone(i)) continue;
      const number = packs.add(old.idOf(i), old.flagsOf(i));
      packs.setSealed(number, old.sizeOf(i), old.chunksOf(i));
      numbers.set(i, number);
      this.numberOf.set(old.idOf(i), number);
    }
    const table = this.base;
    let live = 0;
    for (const value of table.slots)
      if (value !== 0 && numbers.has(table.packOf(value - 1))) live++;
    this.base = ChunkTable.create(live + 1024, table.runCount + 64, 0);
    this.copyEntries(table, (pack) => numbers.get(pack));
    this.packs = packs;
  }

  /** True if the pack is offered and still has the size it had. Compaction, which alone changes a sealed pack, makes it smaller. */
  private isKnown(packId: string, sizeBytes: number | undefined): boolean {
    const number = this.numberOf.get(packId);
    return number !== undefined && !this.isGone(number) && this.packs.sizeOf(number) === sizeBytes;
  }

  private isGone(pack: number): boolean {
    return (this.packs.flagsOf(pack) & PackFlag.unusable) !== 0;
  }
}
