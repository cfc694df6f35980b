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

/** A part of one chunk that a read wants: `length` bytes from `from` in it, which are at `at` of the image. */
export interface ChunkPart {
  /** Of pack and frame: the same for every part of a chunk, and of no other's. */
  readonly key: string;
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
  /** Settles when it is no longer loading; never rejects. */
  ready: Promise<unknown>;
  isLoading: boolean;
  /** False while it loads, and where it could not be had: it is gone then. */
  isGood: boolean;
  users: number;
  plainBytes: number;
}

/** A part whose chunk is in a slot; without an entry the slot is the reader's own. */
interface HeldPart {
  readonly part: ChunkPart;
  readonly slot: number;
  readonly plainBytes: number;
  readonly entry?: Entry;
}

const NOTHING_TO_WAIT_FOR = Promise.resolve();

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
    return this.#entries.size > 0 && part.sub === 0 && this.#entries.has(part.key);
  }

  /**
   * Fills `into`, which begins at `offset` of the image, with what `parts` (ascending) name; `slow` reads a part in the ordinary way. Rejects with what `slow` rejects with, and only
   * when nothing is written to `into` any more.
   */
  async read(
    parts: readonly ChunkPart[],
    into: Uint8Array,
    offset: number,
    slow: (part: ChunkPart) => Promise<void>,
  ): Promise<void> {
    const jobs: Promise<void>[] = [];
    const rest: ChunkPart[] = [];
    for (const part of parts) {
      const entry = part.sub === 0 ? this.#entries.get(part.key) : undefined;
      if (entry === undefined) rest.push(part);
      else jobs.push(this.#fromEntry(part, entry, into, offset, slow));
    }
    for (const group of groupsOf(rest)) jobs.push(this.#fromGroup(group, into, offset, slow));
    for (const result of await Promise.allSettled(jobs))
      if (result.status === 'rejected') throw result.reason;
  }

  /**
   * The memory of `parts` (ascending, and of chunks that are no shorter) as it lies in the slots, in their order. Undefined where that cannot be had at
   * once or not of all of them: whoever waits must hold no slots meanwhile, and waits in {@link read}.
   */
  async lend(parts: readonly ChunkPart[]): Promise<Loan | undefined> {
    if (this.#isClosed || parts.some((p) => p.sub !== 0) || !this.#mayLend(parts.length))
      return undefined;
    this.#lent += parts.length;
    const known = parts.map((part) => this.#entries.get(part.key));
    // Before room is made: these must stay.
    for (const entry of known) if (entry !== undefined) entry.users++;
    const rest = parts.filter((_, i) => known[i] === undefined);
    const slots = this.#acquireNow(rest.length);
    if (slots === undefined) {
      for (const entry of known) if (entry !== undefined) entry.users--;
      this.#lent -= parts.length;
      this.#serveQueue();
      return undefined;
    }
    let at = 0;
    const jobs = groupsOf(rest).map((group) => {
      const mine = slots.slice(at, at + group.parts.length);
      at += mine.length;
      return this.#decodeInto(group, mine);
    });
    const plain = (await Promise.all(jobs)).flat();
    const held: HeldPart[] = [];
    let next = 0;
    for (const [i, part] of parts.entries()) {
      const entry = known[i];
      if (entry === undefined) {
        const plainBytes = plain[next] ?? -1;
        held.push({ part, slot: slots[next++] ?? 0, plainBytes });
      } else {
        if (entry.isLoading) await entry.ready;
        const plainBytes = entry.isGood ? entry.plainBytes : -1;
        held.push({ part, slot: entry.slot, plainBytes, entry });
      }
    }
    const loan = this.#loanOf(held);
    if (held.every((h) => h.part.from + h.part.length <= h.plainBytes)) return loan;
    loan.release();
    return undefined;
  }

  /** {@link lend} where all of it is there already. */
  lendAtOnce(parts: readonly ChunkPart[]): Loan | undefined {
    if (this.#isClosed || !this.#mayLend(parts.length)) return undefined;
    const held: HeldPart[] = [];
    for (const part of parts) {
      const entry = part.sub === 0 ? this.#entries.get(part.key) : undefined;
      if (entry?.isGood !== true || part.from + part.length > entry.plainBytes) return undefined;
      held.push({ part, slot: entry.slot, plainBytes: entry.plainBytes, entry });
    }
    for (const { entry } of held) if (entry !== undefined) entry.users++;
    this.#lent += parts.length;
    return this.#loanOf(held);
  }

  /** Who keeps it long, a client that takes its data slowly, must not keep it from all others. */
  #mayLend(parts: number): boolean {
    return this.#lent + parts <= this.#decoder.slots.length / 2;
  }

  /** Of parts that count as lent, and whose entries count their user. */
  #loanOf(held: readonly HeldPart[]): Loan {
    let isReleased = false;
    const views = held.map(({ part, slot }) => {
      const memory = this.#slot(slot);
      const isAll = part.from === 0 && part.length === memory.length;
      return isAll ? memory : memory.subarray(part.from, part.from + part.length);
    });
    return {
      views,
      release: () => {
        if (isReleased) return;
        isReleased = true;
        this.#lent -= held.length;
        for (const { part, slot, plainBytes, entry } of held) {
          if (entry !== undefined) this.#drop(part, entry);
          else if (!this.#keep(part, slot, plainBytes)) this.#free.push(slot);
        }
        this.#serveQueue();
      },
    };
  }

  /** Decodes the chunks of `parts` for a read to come, as far as there is room. Never rejects. */
  async prefetch(parts: readonly ChunkPart[]): Promise<void> {
    const wanted = parts.filter((p) => p.sub === 0 && !this.#entries.has(p.key));
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
    offset: number,
    slow: (part: ChunkPart) => Promise<void>,
  ): Promise<void> {
    entry.users++;
    let isDone = false;
    try {
      if (entry.isLoading) await entry.ready;
      isDone = entry.isGood && this.#copy(part, entry.slot, entry.plainBytes, into, offset);
    } finally {
      this.#leave(part, entry);
    }
    if (!isDone) await slow(part);
  }

  /** After a read of an entry. */
  #leave(part: ChunkPart, entry: Entry): void {
    this.#drop(part, entry);
    this.#serveQueue();
  }

  /** The same; whoever waits for slots is served later. */
  #drop(part: ChunkPart, entry: Entry): void {
    entry.users--;
    // Who goes on does not come back to a chunk that was read to its end.
    const isUsedUp = part.from + part.length >= entry.plainBytes;
    if (!isUsedUp || entry.users > 0 || this.#entries.get(part.key) !== entry) return;
    this.#entries.delete(part.key);
    this.#free.push(entry.slot);
  }

  /** After a read of a chunk in `slot`: keeps it where only a part was wanted, because the rest is what comes next if the reader goes on. */
  #keep(part: ChunkPart, slot: number, plainBytes: number): boolean {
    if (part.from + part.length >= plainBytes || this.#entries.has(part.key)) return false;
    this.#entries.set(part.key, {
      slot,
      ready: NOTHING_TO_WAIT_FOR,
      isLoading: false,
      isGood: true,
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
    offset: number,
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
        const isDone = good[i] === true && this.#copy(part, slot, plainBytes, into, offset);
        if (!isDone) missed.push(part);
        if (!isDone || !this.#keep(part, slot, plainBytes)) done.push(slot);
      });
      this.#give(done);
    }
    for (const part of missed) await slow(part);
  }

  async #prefetchGroup(group: Group): Promise<void> {
    const frames = await this.#framesOf(group);
    const entries: { readonly key: string; readonly entry: Entry }[] = [];
    const wanted: FooterFrame[] = [];
    for (const [i, frame] of frames.entries()) {
      const key = group.parts[i]?.key;
      if (frame === undefined || key === undefined) continue;
      if (this.#isClosed || this.#entries.has(key)) continue;
      const slot = this.#spareSlot();
      if (slot === undefined) break;
      wanted.push(frame);
      const entry: Entry = {
        slot,
        ready: NOTHING_TO_WAIT_FOR, // said below, before anybody can look
        isLoading: true,
        isGood: false,
        users: 0,
        plainBytes: frame.plainBytes,
      };
      this.#entries.set(key, entry);
      entries.push({ key, entry });
    }
    if (entries.length === 0) return;
    const ready = this.#decoder
      .decode(
        group.packId,
        wanted,
        entries.map(({ entry }) => entry.slot),
      )
      .then((good) => {
        for (const [i, { key, entry }] of entries.entries()) {
          entry.isLoading = false;
          entry.isGood = good[i] === true;
          if (entry.isGood) continue;
          this.#entries.delete(key);
          this.#free.push(entry.slot);
        }
        this.#serveQueue();
      });
    for (const { entry } of entries) entry.ready = ready;
    await ready;
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
  #copy(
    part: ChunkPart,
    slot: number,
    plainBytes: number,
    into: Uint8Array,
    offset: number,
  ): boolean {
    const have = Math.max(0, Math.min(part.length, plainBytes - part.from));
    // The ordinary way knows how much may be missing.
    if (have < part.length) return false;
    copyBytes(
      into.subarray(part.at - offset, part.at - offset + part.length),
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
