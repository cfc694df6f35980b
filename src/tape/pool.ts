/** Threads that make, check and open packs of tapes, with memory that they share and that is bounded by the buffers handed out. */
import { MessageChannel, type MessagePort } from 'node:worker_threads';

import { B2Error } from '../errors.js';
import { contextOf, type RepositoryHandle } from '../repo/handle.js';
import type { Store } from '../repo/store.js';
import { fromPortableError, runWorkers, warmWorkers } from '../workers.js';
import type { BuildJob } from './pack-maker.js';
import { PackWork, type PackChecked, type TakenChunk } from './pack-work.js';
import { doWork, type FromWork, type TapeJob, type ToWork, type WorkAnswer } from './worker.js';

/** Threads by default. */
export const DEFAULT_TAPE_WORKERS = 2;

export interface PoolOptions {
  readonly handle: RepositoryHandle;
  /** This thread's store, used where there are no threads. */
  readonly store: Store;
  /** 0 works in this thread, which any store can. */
  readonly workers?: number | undefined;
  readonly signal?: AbortSignal | undefined;
  /** For messages: "the export to /dev/nst0". */
  readonly what: string;
}

/** A pack that was made: its bytes are the first `length` of `buffer`. Give the buffer back with {@link PackPool.recycle}. */
export interface BuiltPack {
  readonly buffer: SharedArrayBuffer;
  readonly length: number;
}

const WORKER = new URL('./worker.js', import.meta.url);

/** Starts threads that the next {@link PackPool.with} uses, for a command that has something else to do first. */
export function warmPackPool(): void {
  warmWorkers(WORKER, DEFAULT_TAPE_WORKERS);
}

interface Waiting {
  readonly resolve: (from: { answer: WorkAnswer; buffer: SharedArrayBuffer }) => void;
  readonly reject: (error: unknown) => void;
}

/** Buffers that wait to be used again. Fresh memory costs more than what is done with it: each page of it is a fault. */
const KEEP_BUFFERS = 16;
const LEAST_BUFFER_BYTES = 1024 * 1024;

/** Calls may run at the same time; they are spread over the threads. */
export class PackPool {
  readonly #ports: MessagePort[] = [];
  readonly #load: number[] = [];
  readonly #calls = new Map<number, Waiting & { readonly port: number }>();
  readonly #free: SharedArrayBuffer[] = [];
  readonly #inline: PackWork | undefined;
  #inlineBefore: Promise<unknown> = Promise.resolve();
  #failure: { readonly error: unknown } | undefined;
  #next = 0;

  private constructor(options: PoolOptions, workers: number) {
    this.#inline =
      workers === 0 ? new PackWork(contextOf(options.handle, options.store)) : undefined;
  }

  /** Runs `fn` with a pool; its threads are gone when this settles. The first failure is thrown; `interrupted` if `signal` aborted. */
  static async with<T>(options: PoolOptions, fn: (pool: PackPool) => Promise<T>): Promise<T> {
    const isLocal = options.handle.storeUrl === undefined;
    const workers =
      isLocal && options.workers === undefined ? 0 : (options.workers ?? DEFAULT_TAPE_WORKERS);
    const pool = new PackPool(options, workers);
    if (workers === 0) {
      try {
        const result = await fn(pool);
        if (options.signal?.aborted === true) throw interrupted(options.what);
        return result;
      } finally {
        await pool.#inline?.close();
      }
    }
    const stop = new AbortController();
    const signal =
      options.signal === undefined ? stop.signal : AbortSignal.any([options.signal, stop.signal]);
    const jobs: TapeJob[] = [];
    for (let i = 0; i < workers; i++) {
      const { port1, port2 } = new MessageChannel();
      pool.#ports.push(port1);
      pool.#load.push(0);
      port1.on('message', (message: FromWork) => {
        pool.#answer(message);
      });
      jobs.push({ handle: options.handle, port: port2 });
    }
    const fail = (error: unknown): void => {
      pool.#fail(error);
      stop.abort(error);
    };
    const aborted = (): void => {
      fail(interrupted(options.what));
    };
    options.signal?.addEventListener('abort', aborted, { once: true });
    const threads = runWorkers<TapeJob, undefined>(WORKER, jobs, {
      what: options.what,
      signal,
      transfer: (index) => [jobs[index]?.port].filter((port) => port !== undefined),
    }).then(() => undefined, fail);
    try {
      const result = await fn(pool);
      for (const port of pool.#ports) port.postMessage({ type: 'end' } satisfies ToWork);
      await threads;
      if (pool.#failure === undefined) return result;
    } catch (error) {
      fail(error);
      await threads;
    } finally {
      options.signal?.removeEventListener('abort', aborted);
      for (const port of pool.#ports) port.close();
    }
    throw pool.#failure?.error;
  }

  /** Room for `bytes` at least. */
  buffer(bytes: number): SharedArrayBuffer {
    const at = this.#free.findIndex((b) => b.byteLength >= bytes);
    const [found] = at < 0 ? [] : this.#free.splice(at, 1);
    if (found !== undefined) return found;
    // Of few sizes, so that they fit again.
    let size = LEAST_BUFFER_BYTES;
    while (size < bytes) size *= 2;
    return new SharedArrayBuffer(size);
  }

  recycle(buffer: SharedArrayBuffer): void {
    if (this.#free.length < KEEP_BUFFERS && buffer.byteLength > 0) this.#free.push(buffer);
  }

  /** Makes a pack of at most `roomBytes`. */
  async build(job: BuildJob, roomBytes: number): Promise<BuiltPack> {
    const { answer, buffer } = await this.#call(this.buffer(roomBytes), (id, b) => ({
      type: 'build',
      id,
      job,
      buffer: b,
    }));
    if (answer.type !== 'built') throw new Error('the answer to another question');
    return { buffer, length: answer.length };
  }

  /** Checks a pack. */
  async check(
    packId: string,
    bytes: SharedArrayBuffer,
    length: number,
  ): Promise<PackChecked & { readonly buffer: SharedArrayBuffer }> {
    const { answer, buffer } = await this.#call(bytes, (id, b) => ({
      type: 'check',
      id,
      packId,
      buffer: b,
      length,
    }));
    if (answer.type !== 'checked') throw new Error('the answer to another question');
    return { ...answer.result, buffer };
  }

  /** Takes chunks out of a pack; the buffer is taken. */
  async take(
    packId: string,
    bytes: SharedArrayBuffer,
    length: number,
    keys: Uint32Array,
  ): Promise<{
    readonly taken: readonly TakenChunk[];
    readonly bytes: Buffer;
    readonly damaged: PackChecked['damaged'];
  }> {
    const { answer, buffer } = await this.#call(bytes, (id, b) => ({
      type: 'take',
      id,
      packId,
      buffer: b,
      length,
      keys,
    }));
    this.recycle(buffer);
    if (answer.type !== 'taken') throw new Error('the answer to another question');
    return { taken: answer.taken, bytes: Buffer.from(answer.bytes), damaged: answer.damaged };
  }

  async #call(
    buffer: SharedArrayBuffer,
    message: (id: number, buffer: SharedArrayBuffer) => Exclude<ToWork, { readonly type: 'end' }>,
  ): Promise<{ answer: WorkAnswer; buffer: SharedArrayBuffer }> {
    if (this.#failure !== undefined) throw this.#failure.error;
    const id = this.#next++;
    const inline = this.#inline;
    if (inline !== undefined) {
      const before = this.#inlineBefore;
      const mine = (async () => {
        await before.catch(() => undefined);
        return { answer: await doWork(inline, message(id, buffer)), buffer };
      })();
      this.#inlineBefore = mine;
      return mine;
    }
    const port = this.#load.indexOf(Math.min(...this.#load));
    this.#load[port] = (this.#load[port] ?? 0) + 1;
    return new Promise((resolve, reject) => {
      this.#calls.set(id, { resolve, reject, port });
      this.#ports[port]?.postMessage(message(id, buffer));
    });
  }

  #answer(message: FromWork): void {
    const call = this.#calls.get(message.id);
    if (call === undefined) return;
    this.#calls.delete(message.id);
    this.#load[call.port] = (this.#load[call.port] ?? 1) - 1;
    if (message.error !== undefined) call.reject(fromPortableError(message.error));
    else call.resolve({ answer: message.answer, buffer: message.buffer });
  }

  #fail(error: unknown): void {
    this.#failure ??= { error };
    for (const { reject } of this.#calls.values()) reject(error);
    this.#calls.clear();
  }
}

function interrupted(what: string): B2Error {
  return new B2Error('interrupted', `${what} was interrupted`);
}
