/**
 * The line to the kernel of one FUSE mount: a thread reads the requests, each is handled here, replies go back. The main thread
 * never waits for the kernel, so it cannot wait for itself; while the thread starts it only looks whether there is a request.
 */
import { writeSync, writevSync, closeSync } from 'node:fs';
import { Worker } from 'node:worker_threads';

import { B2Error, errnoOf, messageOf } from '../errors.js';
import type { EventSink } from '../events.js';
import { trackLoading, workerFile } from '../workers.js';
import { readRequest, wakePipe } from './native.js';
import { REQUEST_BUFFER_BYTES } from './protocol.js';
import type { ReaderData, ReaderMessage, ReaderStart } from './reader-worker.js';

export interface FuseChannelOptions {
  /** /dev/fuse, mounted, non-blocking. The caller closes it, after {@link FuseChannel.ended}. */
  readonly fuseFd: number;
  /** Answers one request through {@link FuseChannel.reply}. Never rejects. `bytes` may be reused when it returns to the caller. */
  readonly handle: (bytes: Buffer) => Promise<void>;
  readonly events: EventSink;
  /** Requests under way at most; more stay with the kernel. */
  readonly maxPending: number;
  /**
   * The first requests are read on this thread, which looks for them and does not wait; a thread of their own is started when none has
   * come for a moment. It takes as long to start as to open a repository, and who looks into a new mount would wait for it.
   */
  readonly startsHere?: boolean;
}

const READER = new URL('./reader-worker.js', import.meta.url);
/** Looks for a request, one directly after the other, before they become rarer: who asks mostly asks again. */
const EAGER_LOOKS = 50;
const LOOK_MS = 1;
/** Looks in vain, one a millisecond, until the thread is started; and when it is in any case. */
const QUIET_LOOKS = 20;
const THREAD_AFTER_MS = 250;

/** The thread that reads, which begins with it at once or, `ahead`, says first when it has loaded. */
function startReader(start: ReaderStart, ahead: boolean): Worker {
  const data: ReaderData = { b2Reader: true, start: ahead ? undefined : start };
  const worker = new Worker(workerFile(READER), { workerData: data, name: 'b2 mount' });
  if (ahead) {
    worker.postMessage(start);
    trackLoading(worker);
  }
  return worker;
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
  readonly #onExit: () => void;
  #worker: Worker | undefined;
  #isGone = false;
  #isStopped = false;

  constructor(options: FuseChannelOptions) {
    this.#options = options;
    if (options.startsHere !== true) this.#worker = this.#startReader(false);
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
    this.#isStopped = true;
    if (!this.#isGone) this.#wakeReader();
  }

  #startReader(ahead: boolean): Worker {
    const { fuseFd, maxPending } = this.#options;
    const start = { fuseFd, wakeFd: this.#wake.readFd, pending: this.#pending, maxPending };
    return startReader(start, ahead);
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
    const take = (request: Buffer): void => {
      const handled = this.#options.handle(request).finally(() => {
        under.delete(handled);
        done();
      });
      under.add(handled);
    };
    try {
      await new Promise<void>((resolve, reject) => {
        /** `said`: it has begun to read, or never will. */
        const listen = (worker: Worker, said: () => void): void => {
          worker.on('message', (message: ReaderMessage) => {
            said();
            if (message.type === 'loaded') return;
            if (message.type === 'end') return resolve();
            const { buffer, byteOffset, byteLength } = message.bytes;
            const all = Buffer.from(buffer, byteOffset, byteLength);
            for (let at = 0; at + 4 <= all.length;) {
              const length = all.readUInt32LE(at);
              take(all.subarray(at, at + length));
              at += Math.max(4, length);
            }
          });
          worker.on('error', (error) => {
            said();
            reject(error);
          });
          worker.on('exit', (code) => {
            said();
            reject(
              new B2Error(
                'failed',
                `the thread that reads the kernel's requests ended (exit ${code})`,
              ),
            );
          });
        };
        if (this.#worker !== undefined) listen(this.#worker, () => undefined);
        else this.#readHere(take, listen).then((isEnd) => (isEnd ? resolve() : undefined), reject);
      });
    } finally {
      this.#isGone = true;
      await this.#worker?.terminate();
      process.off('exit', this.#onExit);
      await Promise.all(under);
      closeSync(this.#wake.readFd);
      closeSync(this.#wake.writeFd);
    }
  }

  /** Reads until the thread does, which it starts. Resolves to true where no more requests come and there is no thread that says so. */
  async #readHere(
    take: (request: Buffer) => void,
    listen: (worker: Worker, said: () => void) => void,
  ): Promise<boolean> {
    const { fuseFd, maxPending } = this.#options;
    const pending = new Int32Array(this.#pending);
    const buffer = Buffer.allocUnsafeSlow(REQUEST_BUFFER_BYTES);
    let isDue = false;
    let hasThread = false;
    let inVain = EAGER_LOOKS;
    const due = setTimeout(() => (isDue = true), THREAD_AFTER_MS);
    try {
      for (;;) {
        // Not at once: whoever made this channel has not got it yet.
        await new Promise((resolve) => {
          if (inVain < EAGER_LOOKS) setImmediate(resolve);
          else setTimeout(resolve, LOOK_MS);
        });
        if (hasThread) return false;
        if (this.#isStopped) return this.#worker === undefined;
        let got: number | undefined;
        try {
          got = Atomics.load(pending, 0) < maxPending ? readRequest(fuseFd, buffer) : 0;
        } catch (error) {
          if (this.#worker === undefined) throw error;
          return false; // the thread says it: it must not be ended while it loads
        }
        if (got === undefined) return this.#worker === undefined;
        if (got > 0) {
          Atomics.add(pending, 0, 1);
          take(buffer.subarray(0, got));
        }
        inVain = got > 0 ? 0 : inVain + 1;
        if (this.#worker !== undefined) continue;
        if (isDue || inVain > EAGER_LOOKS + QUIET_LOOKS) {
          this.#worker = this.#startReader(true);
          listen(this.#worker, () => (hasThread = true));
        }
      }
    } finally {
      clearTimeout(due);
    }
  }
}
