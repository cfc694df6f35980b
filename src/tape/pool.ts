/** Threads that make, check and open packs of tapes, with memory that they share and that is bounded by the buffers handed out. */
import { MessageChannel, type MessagePort } from 'node:worker_threads';

import { B2Error } from '../errors.js';
import { alignedMemory, isPageAligned } from '../memory.js';
import { contextOf, type RepositoryHandle } from '../repo/handle.js';
import type { Store } from '../repo/store.js';
import { fromPortableError, runWorkers, warmWorkers } from '../workers.js';
import { roundUp } from '../units.js';
import type { CopyJob } from './pack-copier.js';
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

/** A pack that was made, or a piece of one: bytes `at` to `at + length` of `memory`. Call `recycle` once when they are not needed any more. */
export interface ReadyBytes {
  readonly memory: Buffer<SharedArrayBuffer>;
  readonly at: number;
  readonly length: number;
  readonly recycle: () => void;
}

const WORKER = new URL('./worker.js', import.meta.url);

/** Starts threads that the next {@link PackPool.with} uses, for a command that has something else to do first. */
export function warmPackPool(): void {
  warmWorkers(WORKER, DEFAULT_TAPE_WORKERS);
}

interface Waiting {
  /** Of which a message from another thread has another view: page-aligned memory is known by this one. */
  readonly buffer: SharedArrayBuffer;
  readonly resolve: (from: { answer: WorkAnswer; buffer: SharedArrayBuffer }) => void;
  readonly reject: (error: unknown) => void;
}

/** Buffers that wait to be used again. Fresh memory costs more than what is done with it: each page of it is a fault. */
const KEEP_BUFFERS = 16;
const LEAST_BUFFER_BYTES = 1024 * 1024;
/** From here on sizes are close together: what is behind the end of a pack is memory all the same. */
const FINE_BUFFER_BYTES = 4 * 1024 * 1024;
/** So many buffers of a pool are page-aligned and in huge pages, which reserve much address space and are freed late. */
const MAX_ALIGNED = 12;
/**
 * Pieces of packs share one piece of memory: by itself none of them would begin where huge pages do, and direct I/O takes a third longer
 * then. Only the slots that are used take memory.
 */
const SLOT_BYTES = 4 * 1024 * 1024;
const SLOTS = 40;

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
  #aligned = 0;
  #slots: Buffer<SharedArrayBuffer>[] | undefined;

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
    while (size < bytes && size < FINE_BUFFER_BYTES) size *= 2;
    if (size < bytes) size = roundUp(bytes, FINE_BUFFER_BYTES);
    return this.#make(size);
  }

  #make(size: number): SharedArrayBuffer {
    if (size >= FINE_BUFFER_BYTES && this.#aligned < MAX_ALIGNED) {
      this.#aligned++;
      try {
        return alignedMemory(size, true).buffer;
      } catch {
        // no address space for it: ordinary memory does as well
      }
    }
    return new SharedArrayBuffer(size);
  }

  recycle(buffer: SharedArrayBuffer): void {
    if (this.#free.length < KEEP_BUFFERS && buffer.byteLength > 0) this.#free.push(buffer);
  }

  /** Makes a pack of at most `roomBytes`. */
  async build(job: BuildJob, roomBytes: number): Promise<ReadyBytes> {
    const { answer, buffer } = await this.#call(this.buffer(roomBytes), (id, b) => ({
      type: 'build',
      id,
      job,
      buffer: b,
    }));
    if (answer.type !== 'built') throw new Error('the answer to another question');
    return {
      memory: Buffer.from(buffer),
      at: 0,
      length: answer.length,
      recycle: () => {
        this.recycle(buffer);
      },
    };
  }

  /** Reads a piece of a pack of the repository as it is, checked. */
  async copy(job: CopyJob): Promise<ReadyBytes> {
    const { memory, recycle } = this.#room(job.roomBytes);
    const { answer } = await this.#call(memory.buffer, (id, buffer) => ({
      type: 'copy',
      id,
      job,
      buffer,
      offset: memory.byteOffset,
      aligned: isPageAligned(memory),
    }));
    if (answer.type !== 'copied') throw new Error('the answer to another question');
    return { memory, ...answer.piece, recycle };
  }

  /** Memory for a piece. */
  #room(bytes: number): Pick<ReadyBytes, 'memory' | 'recycle'> {
    this.#slots ??= this.#makeSlots();
    const slot = bytes <= SLOT_BYTES ? this.#slots.pop() : undefined;
    if (slot !== undefined) return { memory: slot, recycle: () => this.#slots?.push(slot) };
    const buffer = this.buffer(bytes);
    return {
      memory: Buffer.from(buffer),
      recycle: () => {
        this.recycle(buffer);
      },
    };
  }

  #makeSlots(): Buffer<SharedArrayBuffer>[] {
    try {
      const { buffer } = alignedMemory(SLOTS * SLOT_BYTES, true);
      return Array.from({ length: SLOTS }, (_, i) =>
        Buffer.from(buffer, i * SLOT_BYTES, SLOT_BYTES),
      ).reverse();
    } catch {
      return []; // no address space for it: other buffers do as well
    }
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
      this.#calls.set(id, { buffer, resolve, reject, port });
      this.#ports[port]?.postMessage(message(id, buffer));
    });
  }

  #answer(message: FromWork): void {
    const call = this.#calls.get(message.id);
    if (call === undefined) return;
    this.#calls.delete(message.id);
    this.#load[call.port] = (this.#load[call.port] ?? 1) - 1;
    if (message.error !== undefined) call.reject(fromPortableError(message.error));
    else call.resolve({ answer: message.answer, buffer: call.buffer });
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
