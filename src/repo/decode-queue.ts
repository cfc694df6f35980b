/**
 * Orders to threads and their answers in shared memory. A message for each would cost more than all else that JavaScript does for a chunk:
 * here whoever has work takes the next, and only who sleeps is called (the caller sends the message; this says when).
 *
 * Every group of orders names at least one slot, and a slot is in one group at a time. So the queue, which has room for as many groups as there
 * are slots, never overflows. One thread gives orders; any number take them.
 */
import type { FooterFrame } from '../format/pack.js';
import type { Compression, FrameType } from '../format/frame.js';

/** Frames of one pack and the slots for their chunks, in the same order. */
export interface DecodeGroup {
  readonly packId: string;
  readonly frames: readonly FooterFrame[];
  readonly slots: readonly number[];
}

const PENDING = 0;
const GOOD = 1;
const BAD = 2;

// Int32 words of the head.
const HEAD = 0;
const TAIL = 1;
/** 1: the one who gave the orders wants to be called for the next answer. */
const CALLER_SLEEPS = 2;
const THREADS = 3;
/** Threads that can be told apart. */
const MAX_THREADS = 61;
const HEAD_WORDS = THREADS + MAX_THREADS;

// Int32 words of a slot's order.
const NEXT = 0;
const STATE = 1;
const PACK = 2;
const NUMBER = 6;
const OFFSET = 7; // low, high
const STORED = 9;
const PLAIN = 10;
const TYPE = 11;
const COMPRESSION = 12;
const COUNT = 13;
const SLOT_WORDS = 16;

const PACK_ID_BYTES = 16;
const TWO_32 = 2 ** 32;

/** Memory for {@link DecodeQueue}. */
export function decodeQueueMemory(slots: number): SharedArrayBuffer {
  return new SharedArrayBuffer((HEAD_WORDS + ringWords(slots) + slots * SLOT_WORDS) * 4);
}

/** A power of two, so that numbers that wrap around at 2³² stay in step. */
function ringWords(slots: number): number {
  return 2 ** Math.ceil(Math.log2(Math.max(1, slots)));
}

export class DecodeQueue {
  readonly #words: Int32Array;
  readonly #slots: number;
  readonly #mask: number;
  readonly #orders: number;
  /** The pack whose id was written or read last: the next is nearly always of the same. */
  #packId = '';
  readonly #packWords = new Int32Array(PACK_ID_BYTES / 4);

  constructor(memory: SharedArrayBuffer, slots: number) {
    this.#words = new Int32Array(memory);
    this.#slots = slots;
    this.#mask = ringWords(slots) - 1;
    this.#orders = HEAD_WORDS + ringWords(slots);
  }

  /** Appends a group (of at least one frame, to slots that are in no other). */
  give({ packId, frames, slots }: DecodeGroup): void {
    const words = this.#words;
    if (packId !== this.#packId) {
      Buffer.from(this.#packWords.buffer).write(packId, 'hex');
      this.#packId = packId;
    }
    for (const [i, frame] of frames.entries()) {
      const at = this.#at(slots[i]);
      words[at + NEXT] = i + 1 < frames.length ? (slots[i + 1] ?? -1) : -1;
      words[at + STATE] = PENDING;
      words.set(this.#packWords, at + PACK);
      words[at + NUMBER] = frame.number;
      words[at + OFFSET] = (frame.offset % TWO_32) | 0;
      words[at + OFFSET + 1] = Math.floor(frame.offset / TWO_32);
      words[at + STORED] = frame.storedBytes;
      words[at + PLAIN] = frame.plainBytes;
      words[at + TYPE] = frame.type;
      words[at + COMPRESSION] = frame.compression;
      words[at + COUNT] = frame.count;
    }
    const tail = Atomics.load(words, TAIL);
    words[HEAD_WORDS + (tail & this.#mask)] = slots[0] ?? -1;
    Atomics.store(words, TAIL, (tail + 1) | 0);
  }

  /** The oldest group that no thread has taken. */
  take(): DecodeGroup | undefined {
    const words = this.#words;
    let first: number;
    for (;;) {
      const head = Atomics.load(words, HEAD);
      if (head === Atomics.load(words, TAIL)) return undefined;
      first = Atomics.load(words, HEAD_WORDS + (head & this.#mask));
      if (Atomics.compareExchange(words, HEAD, head, (head + 1) | 0) === head) break;
    }
    const frames: FooterFrame[] = [];
    const slots: number[] = [];
    for (let slot = first; slot >= 0; slot = words[this.#at(slot) + NEXT] ?? -1) {
      const at = this.#at(slot);
      slots.push(slot);
      frames.push({
        number: words[at + NUMBER] ?? 0,
        offset: (words[at + OFFSET + 1] ?? 0) * TWO_32 + ((words[at + OFFSET] ?? 0) >>> 0),
        storedBytes: words[at + STORED] ?? 0,
        plainBytes: words[at + PLAIN] ?? 0,
        type: (words[at + TYPE] ?? 0) as FrameType,
        compression: (words[at + COMPRESSION] ?? 0) as Compression,
        count: words[at + COUNT] ?? 0,
      });
    }
    return { packId: this.#packIdAt(this.#at(first) + PACK), frames, slots };
  }

  /** Says what became of a group that was taken; true: whoever gave it is to be called. Its slots are not touched any more. */
  answer(slots: readonly number[], good: readonly boolean[]): boolean {
    const words = this.#words;
    // The first one last: it says that all are there.
    for (let i = slots.length - 1; i >= 0; i--)
      Atomics.store(words, this.#at(slots[i]) + STATE, good[i] === true ? GOOD : BAD);
    return Atomics.exchange(words, CALLER_SLEEPS, 0) === 1;
  }

  /** What became of a group; undefined: it is not answered yet. */
  answerOf(slots: readonly number[]): boolean[] | undefined {
    const words = this.#words;
    if (Atomics.load(words, this.#at(slots[0]) + STATE) === PENDING) return undefined;
    return slots.map((slot) => Atomics.load(words, this.#at(slot) + STATE) === GOOD);
  }

  /** Whoever gives orders: look for answers after this; the next one that comes is called out. */
  expectCall(): void {
    Atomics.store(this.#words, CALLER_SLEEPS, 1);
  }

  /** A thread that found nothing: it will be called. False if there is something now. */
  sleep(thread: number): boolean {
    const words = this.#words;
    Atomics.store(words, THREADS + thread, 1);
    if (Atomics.load(words, HEAD) === Atomics.load(words, TAIL)) return true;
    // Who was to be called in this very moment is called for nothing.
    Atomics.store(words, THREADS + thread, 0);
    return false;
  }

  /** True if the thread sleeps, and is to be called now. */
  wake(thread: number): boolean {
    return Atomics.exchange(this.#words, THREADS + thread, 0) === 1;
  }

  #at(slot: number | undefined): number {
    if (slot === undefined || slot < 0 || slot >= this.#slots)
      throw new RangeError(`no slot ${slot}`);
    return this.#orders + slot * SLOT_WORDS;
  }

  #packIdAt(at: number): string {
    const words = this.#words;
    const known = this.#packWords;
    if (known.every((word, i) => word === words[at + i]) && this.#packId !== '')
      return this.#packId;
    known.set(words.subarray(at, at + known.length));
    this.#packId = Buffer.from(known.buffer).toString('hex');
    return this.#packId;
  }
}
