/** Threads that decode frames into shared memory, for {@link ReadAhead}. */
import { availableParallelism } from 'node:os';
import { MessageChannel, type MessagePort } from 'node:worker_threads';

import type { FooterFrame } from '../format/pack.js';
import { alignedMemory } from '../memory.js';
import { runWorkers } from '../workers.js';
import { DecodeQueue, decodeQueueMemory } from './decode-queue.js';
import type { DecodeStart, FromDecoder, ToDecoder } from './decode-worker.js';
import type { RepositoryHandle } from './handle.js';

/** Decodes frames of one chunk into slots. */
export interface FrameDecoder {
  /** Memory of each slot. Only its content between a `decode` that said it is good and the next one into it is of use. */
  readonly slots: readonly Buffer[];
  /** False until it can begin at once, and when it has broken down; asking starts it. */
  isReady(): boolean;
  /**
   * Puts the chunk of each frame into the slot at the same index; resolves to which of them are there, whole and verified. Never rejects:
   * of what cannot be had, for whatever reason, the answer is false.
   */
  decode(
    packId: string,
    frames: readonly FooterFrame[],
    slots: readonly number[],
  ): Promise<readonly boolean[]>;
  /** No slot changes any more when this resolves. */
  close(): Promise<void>;
}

const DECODE_WORKER = new URL('./decode-worker.js', import.meta.url);
/** More threads than this bring nothing: one thread hands on what they decode. */
const MAX_THREADS = 4;

interface Waiting {
  readonly slots: readonly number[];
  readonly resolve: (good: readonly boolean[]) => void;
}

interface Thread {
  readonly port: MessagePort;
  isReady: boolean;
}

export interface DecodePoolOptions {
  readonly handle: RepositoryHandle;
  readonly slabBytes: number;
  readonly threads?: number;
  /** What the threads run: another module in tests. */
  readonly module?: URL;
  /** Told once if the threads break down; all goes on without them. */
  readonly failed?: (error: unknown) => void;
}

export class DecodePool implements FrameDecoder {
  readonly slots: readonly Buffer[];
  readonly #options: DecodePoolOptions;
  readonly #slab: SharedArrayBuffer;
  readonly #slotBytes: number;
  readonly #stop = new AbortController();
  readonly #queueMemory: SharedArrayBuffer;
  readonly #queue: DecodeQueue;
  /** Groups that are not answered, the oldest first. */
  #waiting: Waiting[] = [];
  #threads: Thread[] = [];
  #ended: Promise<void> | undefined;
  #isBroken = false;

  constructor(options: DecodePoolOptions) {
    this.#options = options;
    this.#slotBytes = options.handle.chunkBytes;
    this.#slab = alignedMemory(options.slabBytes, true).buffer;
    const count = Math.floor(options.slabBytes / this.#slotBytes);
    this.slots = Array.from({ length: count }, (_, i) =>
      Buffer.from(this.#slab, i * this.#slotBytes, this.#slotBytes),
    );
    this.#queueMemory = decodeQueueMemory(count);
    this.#queue = new DecodeQueue(this.#queueMemory, count);
  }

  isReady(): boolean {
    if (this.#ended === undefined && !this.#isBroken) this.#start();
    return !this.#isBroken && this.#threads.some((t) => t.isReady);
  }

  decode(
    packId: string,
    frames: readonly FooterFrame[],
    slots: readonly number[],
  ): Promise<readonly boolean[]> {
    if (frames.length === 0 || this.#isBroken || !this.#threads.some((t) => t.isReady))
      return Promise.resolve(frames.map(() => false));
    this.#queue.give({ packId, frames, slots });
    const sleeper = this.#threads.findIndex((t, i) => t.isReady && this.#queue.wake(i));
    if (sleeper >= 0) this.#call(sleeper);
    return new Promise((resolve) => this.#waiting.push({ slots, resolve }));
  }

  async close(): Promise<void> {
    const wasBroken = this.#isBroken;
    this.#isBroken = true;
    if (!wasBroken) this.#stop.abort();
    await this.#ended;
  }

  #start(): void {
    const count = this.#options.threads ?? Math.min(MAX_THREADS, availableParallelism());
    this.#queue.expectCall();
    const channels = Array.from({ length: count }, () => new MessageChannel());
    this.#threads = channels.map(({ port1 }) => {
      const thread: Thread = { port: port1, isReady: false };
      port1.on('message', (message: FromDecoder) => {
        if (message === 'ready') thread.isReady = true;
        else this.#collect();
      });
      return thread;
    });
    const jobs = channels.map(({ port2 }): DecodeStart => ({
      handle: this.#options.handle,
      slab: this.#slab,
      slotBytes: this.#slotBytes,
      queue: this.#queueMemory,
      port: port2,
    }));
    this.#ended = runWorkers<DecodeStart, undefined>(this.#options.module ?? DECODE_WORKER, jobs, {
      what: 'reading ahead',
      signal: this.#stop.signal,
      transfer: (index) => [jobs[index]?.port].filter((port) => port !== undefined),
    }).then(
      () => this.#broken(undefined),
      (error: unknown) => this.#broken(error),
    );
  }

  #call(thread: number): void {
    const message: ToDecoder = 'work';
    this.#threads[thread]?.port.postMessage(message);
  }

  /** Hands on what the threads have answered. */
  #collect(): void {
    this.#queue.expectCall();
    this.#waiting = this.#waiting.filter(({ slots, resolve }) => {
      const good = this.#queue.answerOf(slots);
      if (good !== undefined) resolve(good);
      return good === undefined;
    });
  }

  /** Every thread has ended: what they had not answered is not there. */
  #broken(error: unknown): void {
    const wasClosed = this.#stop.signal.aborted;
    this.#isBroken = true;
    for (const { port } of this.#threads) port.close();
    for (const { slots, resolve } of this.#waiting.splice(0)) resolve(slots.map(() => false));
    if (!wasClosed) this.#options.failed?.(error);
  }
}
