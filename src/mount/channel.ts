/**
 * The line to the kernel of one FUSE mount: a thread reads the requests, each is handled here, replies go back. The main thread
 * never waits for the kernel, so it cannot wait for itself.
 */
import { writeSync, writevSync, closeSync } from 'node:fs';
import { Worker } from 'node:worker_threads';

import { B2Error, errnoOf, messageOf } from '../errors.js';
import type { EventSink } from '../events.js';
import { trackLoading, workerFile } from '../workers.js';
import { wakePipe } from './native.js';
import type { ReaderData, ReaderMessage, ReaderStart } from './reader-worker.js';

export interface FuseChannelOptions {
  /** /dev/fuse, mounted, non-blocking. The caller closes it, after {@link FuseChannel.ended}. */
  readonly fuseFd: number;
  /** Answers one request through {@link FuseChannel.reply}. Never rejects. `bytes` may be reused when it returns to the caller. */
  readonly handle: (bytes: Buffer) => Promise<void>;
  readonly events: EventSink;
  /** Requests under way at most; more stay with the kernel. */
  readonly maxPending: number;
}

const READER = new URL('./reader-worker.js', import.meta.url);
/** A thread that waits for its channel. */
let spare: Worker | undefined;

/**
 * Starts the thread of the next {@link FuseChannel}, which takes as long as opening a repository: for who will mount when that is done.
 * It does not keep the process alive; one that ends before it is needed is not missed.
 */
export function warmChannel(): void {
  if (spare !== undefined) return;
  let file: URL;
  try {
    file = workerFile(READER);
  } catch {
    return; // the channel says it
  }
  const data: ReaderData = { b2Reader: true, start: undefined };
  const worker = new Worker(file, { workerData: data, name: 'b2 mount' });
  spare = worker;
  worker.on('error', forgetSpare).on('exit', forgetSpare).unref();
  trackLoading(worker);
}

function forgetSpare(): void {
  spare = undefined;
}

/** The thread that reads: the one that waits, or a new one. */
function startReader(start: ReaderStart): Worker {
  const waiting = spare;
  if (waiting === undefined) {
    const data: ReaderData = { b2Reader: true, start };
    return new Worker(workerFile(READER), { workerData: data, name: 'b2 mount' });
  }
  spare = undefined;
  waiting.off('error', forgetSpare).off('exit', forgetSpare).ref();
  waiting.postMessage(start);
  return waiting;
}

export class FuseChannel {
  /**
   * Settles when no more requests come and all that came are answered: resolves after an unmount or {@link FuseChannel.stop},
   * rejects where reading broke down.
   */
  readonly ended: Promise<void>;
  readonly #options: FuseChannelOptions;
  readonly #pending = new SharedArrayBuffer(4);
  readonly #wake = wakePipe();
  readonly #worker: Worker;
  readonly #onExit: () => void;
  #isGone = false;

  constructor(options: FuseChannelOptions) {
    this.#options = options;
    this.#worker = startReader({
      fuseFd: options.fuseFd,
      wakeFd: this.#wake.readFd,
      pending: this.#pending,
      maxPending: options.maxPending,
    });
    // The end of the process waits for its threads, and this one waits for the kernel.
    this.#onExit = () => this.#wakeReader();
    process.on('exit', this.#onExit);
    this.ended = this.#serve();
    // Who is interested awaits it; a failure before that is not unhandled.
    this.ended.catch(() => undefined);
  }

  /** True when no more requests come. */
  get isGone(): boolean {
    return this.#isGone;
  }

  /** Reads no more requests; whoever waits for an answer then waits until the descriptor is closed. */
  stop(): void {
    if (!this.#isGone) this.#wakeReader();
  }

  #wakeReader(): void {
    try {
      writeSync(this.#wake.writeFd, 'x');
    } catch {
      return; // the pipe is full: it is awake
    }
    const pending = new Int32Array(this.#pending);
    Atomics.store(pending, 0, 0);
    Atomics.notify(pending, 0);
  }

  /** Sends a reply in one system call; false where nobody takes it any more. */
  reply(header: Buffer, ...payload: readonly Uint8Array[]): boolean {
    try {
      if (payload.length === 0) writeSync(this.#options.fuseFd, header);
      else writevSync(this.#options.fuseFd, [header, ...payload]);
      return true;
    } catch (error) {
      const code = errnoOf(error);
      // ENOENT: who asked was interrupted. ENODEV and ENOTCONN: unmounted.
      if (code === 'ENOENT' || code === 'ENODEV' || code === 'ENOTCONN' || code === 'EBADF')
        return false;
      this.#options.events({
        type: 'warning',
        message: `the kernel did not take an answer: ${messageOf(error)}`,
      });
      return false;
    }
  }

  async #serve(): Promise<void> {
    const under = new Set<Promise<void>>();
    const pending = new Int32Array(this.#pending);
    const done = (): void => {
      Atomics.sub(pending, 0, 1);
      Atomics.notify(pending, 0);
    };
    try {
      await new Promise<void>((resolve, reject) => {
        this.#worker.on('message', (message: ReaderMessage) => {
          if (message.type === 'loaded') return;
          if (message.type === 'end') return resolve();
          const all = Buffer.from(
            message.bytes.buffer,
            message.bytes.byteOffset,
            message.bytes.byteLength,
          );
          for (let at = 0; at + 4 <= all.length;) {
            const length = all.readUInt32LE(at);
            const handled = this.#options.handle(all.subarray(at, at + length)).finally(() => {
              under.delete(handled);
              done();
            });
            under.add(handled);
            at += Math.max(4, length);
          }
        });
        this.#worker.on('error', reject);
        this.#worker.on('exit', (code) => {
          reject(
            new B2Error(
              'failed',
              `the thread that reads the kernel's requests ended (exit ${code})`,
            ),
          );
        });
      });
    } finally {
      this.#isGone = true;
      await this.#worker.terminate();
      process.off('exit', this.#onExit);
      await Promise.all(under);
      closeSync(this.#wake.readFd);
      closeSync(this.#wake.writeFd);
    }
  }
}
