/**
 * Reads of whoever reads much: chunks are decoded by threads ({@link DecodePool}), side by side, and ahead of a reader who goes on and on.
 *
 * Decoded chunks lie in slots of shared memory, whose number bounds the memory. A slot belongs to a group of frames that a read waits for, or
 * to an entry: a chunk that was read ahead, or of which a read has taken only a part. Entries that nobody waits for make room, the oldest first. Groups
 * wait for slots in turn and hold none meanwhile, so that they cannot wait for each other. Reading ahead never waits: it takes what is free, and no more than half.
 *
 * What the threads cannot deliver, for whatever reason (damage, a pack that has changed, a thread that died), is read in the ordinary way,
 * which also knows what to say about it.
 */
import type { FooterFrame } from '../format/pack.js';
import { FrameType } from '../format/frame.js';
import type { Loan } from '../image.js';
import { copyBytes } from '../memory-copy.js';
import { DecodePool, type FrameDecoder } from './decode-pool.js';
import type { PackCache } from './pack-reader.js';
import type { Repository } from './repository.js';

/** A part of one chunk that a read wants: `length` bytes from `from` in it, to go to `at`. */
export interface ChunkPart {
  readonly packId: string;
  readonly frame: number;
  readonly sub: number;
  readonly from: number;
  readonly at: number;
  readonly length: number;
}

/** Memory of all slots. */
export const READ_AHEAD_BYTES = 32 * 1024 * 1024;
/** Frames that one thread decodes at a time: enough that asking costs little, few enough that the threads share a read. */
const GROUP_FRAMES = 8;

interface Entry {
  readonly slot: number;
  /** False: it could not be had; the entry is gone then. */
  ready: Promise<boolean>;
  isLoading: boolean;
  users: number;
  plainBytes: number;
}

/** Parts of neighbouring frames, each of another one. */
interface Group {
  readonly packId: string;
  readonly parts: ChunkPart[];
}

export interface ReadAheadOptions {
  readonly packs: PackCache;
  readonly decoder: FrameDecoder;
}

export class ReadAhead {
  readonly #packs: PackCache;
  readonly #decoder: FrameDecoder;
  readonly #free: number[];
  readonly #entries = new Map<string, Entry>();
  readonly #queue: { readonly count: number; readonly resolve: (slots: number[]) => void }[] = [];
  /** Parts that are lent. */
  #lent = 0;
  #isClosed = false;

  constructor(options: ReadAheadOptions) {
    this.#packs = options.packs;
    this.#decoder = options.decoder;
    this.#free = options.decoder.slots.map((_, i) => i);
  }

  /** Slots in use: for tests. */
  get held(): {
    readonly entries: number;
    readonly free: number;
    readonly waiting: number;
    readonly lent: number;
  } {
    return {
      entries: this.#entries.size,
      free: this.#free.length,
      waiting: this.#queue.length,
      lent: this.#lent,
    };
  }

  /** False while the threads start, and where they cannot work; asking starts them. */
  isReady(): boolean {
    return !this.#isClosed && this.#decoder.isReady();
  }

  /** True if the chunk is here or on its way. */
  has(part: ChunkPart): boolean {
    return this.#entries.size > 0 && part.sub === 0 && this.#entries.has(keyOf(part));
  }

  /**
   * Fills `into` with what `parts` (ascending) name; `slow` reads a part in the ordinary way. Rejects with what `slow` rejects with, and only
   * when nothing is written to `into` any more.
   */
  async read(
    parts: readonly ChunkPart[],
    into: Uint8Array,
    slow: (part: ChunkPart) => Promise<void>,
  ): Promise<void> {
    const jobs: Promise<void>[] = [];
    const rest: ChunkPart[] = [];
    for (const part of parts) {
      const entry = part.sub === 0 ? this.#entries.get(keyOf(part)) : undefined;
      if (entry === undefined) rest.push(part);
      else jobs.push(this.#fromEntry(part, entry, into, slow));
    }
    for (const group of groupsOf(rest)) jobs.push(this.#fromGroup(group, into, slow));
    for (const result of await Promise.allSettled(jobs))
      if (result.status === 'rejected') throw result.reason;
  }

  /**
   * The memory of `parts` (ascending, and of chunks that are no shorter) as it lies in the slots, in their order. Undefined where that cannot be had at
   * once or not of all of them: whoever waits must hold no slots meanwhile, and waits in {@link read}.
   */
  async lend(parts: readonly ChunkPart[]): Promise<Loan | undefined> {
    if (this.#isClosed || parts.some((p) => p.sub !== 0)) return undefined;
    // Who keeps it long, a client that takes its data slowly, must not keep it from all others.
    if (this.#lent + parts.length > this.#decoder.slots.length / 4) return undefined;
    this.#lent += parts.length;
    const known = parts.map((part) => this.#entries.get(keyOf(part)));
    // Before room is made: these must stay.
    for (const entry of known) if (entry !== undefined) entry.users++;
    const rest = parts.filter((_, i) => known[i] === undefined);
    const slots = this.#acquireNow(rest.length);
    const lent: { part: ChunkPart; slot: number; plainBytes: number; entry?: Entry }[] = [];
    let isWhole = slots !== undefined;
    if (slots !== undefined) {
      let at = 0;
      const jobs = groupsOf(rest).map((group) => {
        const mine = slots.slice(at, at + group.parts.length);
        at += mine.length;
        return this.#decodeInto(group, mine);
      });
      const plain = (await Promise.all(jobs)).flat();
      let next = 0;
      for (const [i, part] of parts.entries()) {
        const entry = known[i];
        if (entry === undefined) {
          const plainBytes = plain[next] ?? -1;
          lent.push({ part, slot: slots[next++] ?? 0, plainBytes });
        } else {
          const { slot, plainBytes } = entry;
          const isThere = await entry.ready;
          lent.push({ part, slot, plainBytes: isThere ? plainBytes : -1, entry });
        }
      }
      isWhole = lent.every((l) => l.part.from + l.part.length <= l.plainBytes);
    } else {
      for (const entry of known) if (entry !== undefined) entry.users--;
      this.#lent -= parts.length;
      this.#serveQueue();
    }
    let isReleased = slots === undefined;
    const release = (): void => {
      if (isReleased) return;
      isReleased = true;
      this.#lent -= parts.length;
      const done: number[] = [];
      for (const { part, slot, plainBytes, entry } of lent) {
        if (entry !== undefined) this.#leave(part, entry);
        else if (!this.#keep(part, slot, plainBytes)) done.push(slot);
      }
      this.#give(done);
    };
    if (!isWhole) {
      release();
      return undefined;
    }
    const views = lent.map(({ part, slot }) =>
      this.#slot(slot).subarray(part.from, part.from + part.length),
    );
    return { views, release };
  }

  /** Decodes the chunks of `parts` for a read to come, as far as there is room. Never rejects. */
  async prefetch(parts: readonly ChunkPart[]): Promise<void> {
    const wanted = parts.filter((p) => p.sub === 0 && !this.#entries.has(keyOf(p)));
    await Promise.all(groupsOf(wanted).map((group) => this.#prefetchGroup(group)));
  }

  /** Nothing is decoded any more when this resolves; reads go on in the ordinary way. */
  async close(): Promise<void> {
    this.#isClosed = true;
    for (const { resolve } of this.#queue.splice(0)) resolve([]);
    await this.#decoder.close();
  }

  async #fromEntry(
    part: ChunkPart,
    entry: Entry,
    into: Uint8Array,
    slow: (part: ChunkPart) => Promise<void>,
  ): Promise<void> {
    entry.users++;
    let isDone = false;
    try {
      isDone = (await entry.ready) && this.#copy(part, entry.slot, entry.plainBytes, into);
    } finally {
      this.#leave(part, entry);
    }
    if (!isDone) await slow(part);
  }

  /** After a read of an entry. */
  #leave(part: ChunkPart, entry: Entry): void {
    entry.users--;
    // Who goes on does not come back to a chunk that was read to its end.
    const isUsedUp = part.from + part.length >= entry.plainBytes;
    if (isUsedUp && entry.users === 0 && this.#entries.get(keyOf(part)) === entry) {
      this.#entries.delete(keyOf(part));
      this.#give([entry.slot]);
    } else {
      this.#serveQueue();
    }
  }

  /** After a read of a chunk in `slot`: keeps it where only a part was wanted, because the rest is what comes next if the reader goes on. */
  #keep(part: ChunkPart, slot: number, plainBytes: number): boolean {
    const key = keyOf(part);
    if (part.from + part.length >= plainBytes || this.#entries.has(key)) return false;
    this.#entries.set(key, {
      slot,
      ready: Promise.resolve(true),
      isLoading: false,
      users: 0,
      plainBytes,
    });
    return true;
  }

  /** Decodes a group into as many slots; the plain length of each chunk, or −1 where it could not be had. */
  async #decodeInto(group: Group, slots: readonly number[]): Promise<number[]> {
    const frames = await this.#framesOf(group);
    const list = frames.flatMap((frame, i) => {
      const slot = slots[i];
      return frame === undefined || slot === undefined ? [] : [{ i, frame, slot }];
    });
    const plain = group.parts.map(() => -1);
    if (list.length === 0) return plain;
    const good = await this.#decoder.decode(
      group.packId,
      list.map((l) => l.frame),
      list.map((l) => l.slot),
    );
    list.forEach(({ i, frame }, k) => {
      if (good[k] === true) plain[i] = frame.plainBytes;
    });
    return plain;
  }

  async #fromGroup(
    group: Group,
    into: Uint8Array,
    slow: (part: ChunkPart) => Promise<void>,
  ): Promise<void> {
    const frames = await this.#framesOf(group);
    const missed: ChunkPart[] = [];
    const parts = group.parts.filter((part, i) => {
      if (frames[i] === undefined) missed.push(part);
      return frames[i] !== undefined;
    });
    const list = frames.filter((f) => f !== undefined);
    const slots = list.length === 0 ? [] : await this.#acquire(list.length);
    if (slots.length < list.length) {
      missed.push(...parts);
    } else if (list.length > 0) {
      const good = await this.#decoder.decode(group.packId, list, slots);
      const done: number[] = [];
      parts.forEach((part, i) => {
        const slot = slots[i] ?? 0;
        const plainBytes = list[i]?.plainBytes ?? 0;
        const isDone = good[i] === true && this.#copy(part, slot, plainBytes, into);
        if (!isDone) missed.push(part);
        if (!isDone || !this.#keep(part, slot, plainBytes)) done.push(slot);
      });
      this.#give(done);
    }
    for (const part of missed) await slow(part);
  }

  async #prefetchGroup(group: Group): Promise<void> {
    const frames = await this.#framesOf(group);
    const list: { readonly key: string; readonly frame: FooterFrame; readonly slot: number }[] = [];
    for (const [i, frame] of frames.entries()) {
      const part = group.parts[i];
      if (frame === undefined || part === undefined) continue;
      const key = keyOf(part);
      if (this.#isClosed || this.#entries.has(key)) continue;
      const slot = this.#spareSlot();
      if (slot === undefined) break;
      list.push({ key, frame, slot });
      // So that it is found from now on; what it waits for is said below, before anybody can look.
      this.#entries.set(key, {
        slot,
        ready: Promise.resolve(false),
        isLoading: true,
        users: 0,
        plainBytes: frame.plainBytes,
      });
    }
    if (list.length === 0) return;
    const decoded = this.#decoder.decode(
      group.packId,
      list.map((l) => l.frame),
      list.map((l) => l.slot),
    );
    await Promise.all(
      list.map(({ key, slot }, i) => {
        const entry = this.#entries.get(key);
        if (entry === undefined) return undefined;
        entry.ready = decoded.then((good) => {
          entry.isLoading = false;
          if (good[i] === true) {
            this.#serveQueue();
            return true;
          }
          this.#entries.delete(key);
          this.#give([slot]);
          return false;
        });
        return entry.ready;
      }),
    );
  }

  /** The frames of a group as the pack's footer has them; undefined where the threads cannot open one. */
  async #framesOf(group: Group): Promise<readonly (FooterFrame | undefined)[]> {
    const slotBytes = this.#decoder.slots[0]?.length ?? 0;
    try {
      return await this.#packs.use(group.packId, (pack) =>
        Promise.resolve(
          group.parts.map((part) => {
            const frame = pack.frame(part.frame);
            const fits =
              frame !== undefined &&
              part.sub === 0 &&
              frame.count === 1 &&
              frame.type === FrameType.chunks &&
              frame.plainBytes <= slotBytes;
            return fits ? frame : undefined;
          }),
        ),
      );
    } catch {
      return group.parts.map(() => undefined); // the ordinary way says what is wrong
    }
  }

  /** Copies a part, and zeros where the chunk that ends the device is short; false if the chunk is shorter than that. */
  #copy(part: ChunkPart, slot: number, plainBytes: number, into: Uint8Array): boolean {
    const have = Math.max(0, Math.min(part.length, plainBytes - part.from));
    // The ordinary way knows how much may be missing.
    if (have < part.length) return false;
    copyBytes(
      into.subarray(part.at, part.at + part.length),
      this.#slot(slot).subarray(part.from, part.from + part.length),
    );
    return true;
  }

  /** As many slots, in turn; fewer where that cannot be. */
  async #acquire(count: number): Promise<number[]> {
    if (this.#isClosed || count > this.#decoder.slots.length) return [];
    const now = this.#acquireNow(count);
    if (now !== undefined) return now;
    return new Promise((resolve) => this.#queue.push({ count, resolve }));
  }

  /** The same without waiting. */
  #acquireNow(count: number): number[] | undefined {
    if (count === 0) return [];
    if (this.#isClosed || this.#queue.length > 0 || !this.#makeRoom(count)) return undefined;
    return this.#free.splice(-count);
  }

  #slot(slot: number): Buffer {
    const memory = this.#decoder.slots[slot];
    if (memory === undefined) throw new Error(`no slot ${slot}`);
    return memory;
  }

  #give(slots: readonly number[]): void {
    this.#free.push(...slots);
    this.#serveQueue();
  }

  #serveQueue(): void {
    for (;;) {
      const first = this.#queue[0];
      if (first === undefined || !this.#makeRoom(first.count)) return;
      this.#queue.shift();
      first.resolve(this.#free.splice(-first.count));
    }
  }

  /** Lets entries go until so many slots are free. */
  #makeRoom(count: number): boolean {
    if (this.#free.length >= count) return true;
    for (const [key, entry] of this.#entries) {
      if (entry.isLoading || entry.users > 0) continue;
      this.#entries.delete(key);
      this.#free.push(entry.slot);
      if (this.#free.length >= count) return true;
    }
    return false;
  }

  /** A slot for reading ahead, if that leaves half of them to those who wait. */
  #spareSlot(): number | undefined {
    const half = this.#decoder.slots.length / 2;
    if (this.#queue.length > 0) return undefined;
    if (this.#entries.size >= half) {
      for (const [key, entry] of this.#entries) {
        if (entry.isLoading || entry.users > 0) continue;
        this.#entries.delete(key);
        this.#free.push(entry.slot);
        break;
      }
    }
    return this.#entries.size >= half ? undefined : this.#free.pop();
  }
}

function keyOf(part: ChunkPart): string {
  return `${part.packId}/${part.frame}`;
}

/** Parts of one pack with ascending frames, as they follow each other, at most {@link GROUP_FRAMES}. */
function groupsOf(parts: readonly ChunkPart[]): Group[] {
  const groups: Group[] = [];
  let last: Group | undefined;
  let lastFrame = 0;
  for (const part of parts) {
    if (
      last === undefined ||
      last.packId !== part.packId ||
      part.frame <= lastFrame ||
      last.parts.length >= GROUP_FRAMES
    ) {
      last = { packId: part.packId, parts: [] };
      groups.push(last);
    }
    last.parts.push(part);
    lastFrame = part.frame;
  }
  return groups;
}

/** For `repo`, whose store other threads can open by `storeUrl`. `failed` is told once if the threads break down. */
export function openReadAhead(
  repo: Repository,
  storeUrl: string,
  failed?: (error: unknown) => void,
): ReadAhead {
  const decoder = new DecodePool({
    handle: repo.handle(storeUrl),
    slabBytes: READ_AHEAD_BYTES,
    ...(failed === undefined ? {} : { failed }),
  });
  return new ReadAhead({ packs: repo.packs, decoder });
}
