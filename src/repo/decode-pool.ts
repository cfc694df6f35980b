/** Threads that decode frames into shared memory, for {@link ReadAhead}. */
import { availableParallelism } from 'node:os';
import { MessageChannel, type MessagePort } from 'node:worker_threads';

import type { FooterFrame } from '../format/pack.js';
import { alignedMemory } from '../memory.js';
import { runWorkers } from '../workers.js';
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
  readonly count: number;
  readonly thread: number;
  readonly resolve: (good: readonly boolean[]) => void;
}

interface Thread {
  readonly port: MessagePort;
  /** Frames that it has not answered for. */
  under: number;
  isReady: boolean;
}

export interface DecodePoolOptions {
  readonly handle: RepositoryHandle;
  readonly slabBytes: number;
  readonly threads?: number;
  /** Told once if the threads break down; all goes on without them. */
  readonly failed?: (error: unknown) => void;
}

export class DecodePool implements FrameDecoder {
  readonly slots: readonly Buffer[];
  readonly #options: DecodePoolOptions;
  readonly #slab: SharedArrayBuffer;
  readonly #slotBytes: number;
  readonly #stop = new AbortController();
  readonly #waiting = new Map<number, Waiting>();
  #threads: Thread[] = [];
  #ended: Promise<void> | undefined;
  #nextId = 1;
  #isBroken = false;

  constructor(options: DecodePoolOptions) {
    this.#options = options;
    this.#slotBytes = options.handle.chunkBytes;
    this.#slab = alignedMemory(options.slabBytes, true).buffer;
    const count = Math.floor(options.slabBytes / this.#slotBytes);
    this.slots = Array.from({ length: count }, (_, i) =>
      Buffer.from(this.#slab, i * this.#slotBytes, this.#slotBytes),
    );
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
    let best = -1;
    this.#threads.forEach((t, i) => {
      if (t.isReady && (best < 0 || t.under < (this.#threads[best]?.under ?? 0))) best = i;
    });
    const thread = this.#threads[best];
    if (thread === undefined || this.#isBroken) return Promise.resolve(frames.map(() => false));
    const id = this.#nextId++;
    thread.under += frames.length;
    return new Promise((resolve) => {
      this.#waiting.set(id, { count: frames.length, thread: best, resolve });
      const message: ToDecoder = { type: 'decode', id, packId, frames, slots };
      thread.port.postMessage(message);
    });
  }

  async close(): Promise<void> {
    const wasBroken = this.#isBroken;
    this.#isBroken = true;
    if (!wasBroken) this.#stop.abort();
    await this.#ended;
  }

  #start(): void {
    const count = this.#options.threads ?? Math.min(MAX_THREADS, availableParallelism());
    const channels = Array.from({ length: count }, () => new MessageChannel());
    this.#threads = channels.map(({ port1 }) => {
      const thread: Thread = { port: port1, under: 0, isReady: false };
      port1.on('message', (message: FromDecoder) => {
        if (message.type === 'ready') thread.isReady = true;
        else this.#answer(message.id, message.good);
      });
      return thread;
    });
    const jobs = channels.map(({ port2 }): DecodeStart => ({
      handle: this.#options.handle,
      slab: this.#slab,
      slotBytes: this.#slotBytes,
      port: port2,
    }));
    this.#ended = runWorkers<DecodeStart, undefined>(DECODE_WORKER, jobs, {
      what: 'reading ahead',
      signal: this.#stop.signal,
      transfer: (index) => [jobs[index]?.port].filter((port) => port !== undefined),
    }).then(
      () => this.#broken(undefined),
      (error: unknown) => this.#broken(error),
    );
  }

  #answer(id: number, good: readonly boolean[]): void {
    const waiting = this.#waiting.get(id);
    if (waiting === undefined) return;
    this.#waiting.delete(id);
    const thread = this.#threads[waiting.thread];
    if (thread !== undefined) thread.under -= waiting.count;
    waiting.resolve(good);
  }

  /** Every thread has ended: what they had not answered is not there. */
  #broken(error: unknown): void {
    const wasClosed = this.#stop.signal.aborted;
    this.#isBroken = true;
    for (const { port } of this.#threads) port.close();
    for (const [id, { count }] of this.#waiting)
      this.#answer(
        id,
        Array.from({ length: count }, () => false),
      );
    if (!wasClosed) this.#options.failed?.(error);
  }
}
