/**
 * The cores of a restore, in threads or in this one, behind one face. The main thread owns the target: it writes what
 * cores lay out and reads what they compare.
 */
import { MessageChannel, type MessagePort } from 'node:worker_threads';

import { B2Error } from '../errors.js';
import { alignedMemory } from '../memory.js';
import { contextOf, type RepositoryHandle } from '../repo/handle.js';
import type { PackReadContext } from '../repo/pack-reader.js';
import type { Store } from '../repo/store.js';
import { fromPortableError, runWorkers, warmWorkers } from '../workers.js';
import type { Batch } from './batch.js';
import {
  RestoreCore,
  SLOTS,
  SLOT_BYTES,
  slotsOf,
  type CheckResult,
  type CheckWindow,
  type PassOptions,
  type PassResult,
  type RunList,
} from './core.js';
import type { FromCore, RestoreJob, ToCore } from './worker.js';

/** Threads by default: what the machine this was measured on has, and what reading and hashing at disk speed needs. */
export const DEFAULT_WORKERS = 2;
const RESTORE_WORKER = new URL('./worker.js', import.meta.url);

/** Starts the threads of a restore that is to come, while the repository is being opened. */
export function warmRestore(workers = DEFAULT_WORKERS): void {
  warmWorkers(RESTORE_WORKER, workers);
}

/** One core, wherever it runs. */
export interface Core {
  /** Memory shared with the core: filled by the caller for `check`, by the core for writes. */
  readonly slots: readonly Buffer[];
  /** The batch that the next calls are about. */
  use(batch: Batch): void;
  pass(options: PassOptions): Promise<PassResult>;
  check(window: CheckWindow): Promise<CheckResult>;
}

export interface CoresOptions {
  readonly handle: RepositoryHandle;
  /** This thread's store. */
  readonly store: Store;
  /** Threads; 0 works in this one, which any store can. */
  readonly workers: number;
  readonly signal: AbortSignal | undefined;
  /** Writes the runs (offsets in `slot`) to the target. */
  readonly write: (slot: Buffer, runs: RunList) => Promise<void>;
  /** For messages: "the restore to /dev/sdb". */
  readonly what: string;
}

class InlineCore implements Core {
  readonly slots: readonly Buffer[];
  private readonly core: RestoreCore;
  private batch: Batch | undefined;

  constructor(ctx: PackReadContext, options: CoresOptions) {
    const slots = slotsOf(alignedMemory(SLOTS * SLOT_BYTES).buffer);
    this.slots = slots;
    this.core = new RestoreCore(ctx, slots, {
      isAborted: () => options.signal?.aborted === true,
      write: async (slot, runs) => options.write(slotAt(slots, slot), runs),
    });
  }

  use(batch: Batch): void {
    this.batch = batch;
  }

  pass(options: PassOptions): Promise<PassResult> {
    return this.core.pass(this.current(), options);
  }

  check(window: CheckWindow): Promise<CheckResult> {
    return Promise.resolve(this.core.check(this.current(), window));
  }

  private current(): Batch {
    if (this.batch === undefined) throw new Error('no batch yet');
    return this.batch;
  }
}

function slotAt(slots: readonly Buffer[], slot: number): Buffer {
  const found = slots[slot];
  if (found === undefined) throw new Error(`no slot ${slot}`);
  return found;
}

interface Waiting {
  readonly resolve: (result: PassResult | CheckResult) => void;
  readonly reject: (error: unknown) => void;
}

class ThreadCore implements Core {
  readonly slots: readonly Buffer[];
  readonly job: RestoreJob;
  private readonly port: MessagePort;
  private readonly calls = new Map<number, Waiting>();
  private nextId = 1;
  private failure: { readonly error: unknown } | undefined;

  constructor(options: CoresOptions, fail: (error: unknown) => void) {
    const slab = alignedMemory(SLOTS * SLOT_BYTES, true).buffer;
    const slots = slotsOf(slab);
    const { port1, port2 } = new MessageChannel();
    this.slots = slots;
    this.port = port1;
    this.job = { handle: options.handle, slab, port: port2 };
    port1.on('message', (message: FromCore) => {
      switch (message.type) {
        case 'write':
          options.write(slotAt(slots, message.slot), message.runs).then(
            () => {
              this.post({ type: 'written', slot: message.slot });
            },
            (error: unknown) => {
              fail(error);
            },
          );
          return;
        case 'passed':
        case 'checked':
          this.calls.get(message.id)?.resolve(message.result);
          this.calls.delete(message.id);
          return;
        case 'failed':
          this.calls.get(message.id)?.reject(fromPortableError(message.error));
          this.calls.delete(message.id);
          return;
      }
    });
  }

  use(batch: Batch): void {
    this.post({ type: 'batch', batch });
  }

  async pass(options: PassOptions): Promise<PassResult> {
    const result = await this.call((id) => ({ type: 'pass', id, options }));
    if (!('frames' in result)) throw new Error('the answer to another question');
    return result;
  }

  async check(window: CheckWindow): Promise<CheckResult> {
    const result = await this.call((id) => ({ type: 'check', id, window }));
    if (!('notZero' in result)) throw new Error('the answer to another question');
    return result;
  }

  /** Rejects every call, under way and later. */
  fail(error: unknown): void {
    this.failure ??= { error };
    for (const { reject } of this.calls.values()) reject(error);
    this.calls.clear();
  }

  end(): void {
    this.post({ type: 'end' });
  }

  close(): void {
    this.port.close();
  }

  private call(message: (id: number) => ToCore): Promise<PassResult | CheckResult> {
    return new Promise((resolve, reject) => {
      if (this.failure !== undefined) {
        reject(this.failure.error);
        return;
      }
      const id = this.nextId++;
      this.calls.set(id, { resolve, reject });
      this.post(message(id));
    });
  }

  private post(message: ToCore): void {
    this.port.postMessage(message);
  }
}

/**
 * Runs `fn` with cores; all are gone when it settles. The first failure, of a thread, of a write or of `fn`, is thrown;
 * kind `interrupted` if `signal` aborted.
 */
export async function withCores<T>(
  options: CoresOptions,
  fn: (cores: readonly Core[]) => Promise<T>,
): Promise<T> {
  const { handle, store, workers, what } = options;
  if (workers === 0 || handle.storeUrl === undefined) {
    const result = await fn([new InlineCore(contextOf(handle, store), options)]);
    if (options.signal?.aborted === true) throw interrupted(what);
    return result;
  }
  const stop = new AbortController();
  const signal =
    options.signal === undefined ? stop.signal : AbortSignal.any([options.signal, stop.signal]);
  let first: { readonly error: unknown } | undefined;
  const fail = (error: unknown): void => {
    first ??= { error };
    for (const core of cores) core.fail(error);
    stop.abort(error);
  };
  const cores: ThreadCore[] = [];
  for (let i = 0; i < workers; i++) cores.push(new ThreadCore(options, fail));
  const aborted = (): void => {
    fail(interrupted(what));
  };
  options.signal?.addEventListener('abort', aborted, { once: true });
  const jobs = cores.map((core) => core.job);
  const threads = runWorkers<RestoreJob, undefined>(RESTORE_WORKER, jobs, {
    what,
    signal,
    transfer: (index) => [jobs[index]?.port].filter((port) => port !== undefined),
  }).then(() => undefined, fail);
  try {
    const result = await fn(cores);
    for (const core of cores) core.end();
    await threads;
    if (first === undefined) return result;
  } catch (error) {
    fail(error);
    await threads;
  } finally {
    options.signal?.removeEventListener('abort', aborted);
    for (const core of cores) core.close();
  }
  throw first?.error;
}

function interrupted(what: string): B2Error {
  return new B2Error('interrupted', `${what} was interrupted`);
}
