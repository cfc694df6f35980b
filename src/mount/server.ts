/**
 * A mount that is being served: attaches, reads the kernel's requests in a thread of its own and answers them here, until it is
 * unmounted by somebody, or by {@link Mounted.close}. The main thread never waits for the kernel, so it cannot wait for itself.
 */
import { closeSync, writeFileSync, writeSync, writevSync } from 'node:fs';
import { Worker } from 'node:worker_threads';

import type { Clock } from '../clock.js';
import { B2Error, errnoOf, messageOf } from '../errors.js';
import type { EventSink } from '../events.js';
import { workerFile } from '../workers.js';
import { attach, detach, type Attached } from './attach.js';
import { wakePipe } from './native.js';
import type { ReaderMessage, ReaderStart } from './reader-worker.js';
import { MountSession } from './session.js';
import type { MountTree } from './tree.js';

/** Requests of the kernel that are under way at most; more stay with the kernel. */
const MAX_PENDING = 512;
/** How far the kernel reads ahead, where we may say so (root). */
const READ_AHEAD_KIB = 1024;
/** The kernel greets a new file system at once. */
const GREETING_MS = 10_000;

export interface ServeMountOptions {
  readonly tree: MountTree;
  /** An existing directory. */
  readonly mountpoint: string;
  readonly events: EventSink;
  readonly clock: Clock;
}

export interface Mounted {
  /** Absolute, without symbolic links. */
  readonly mountpoint: string;
  /** Resolves when it is not mounted any more and everything of the mount is closed, the tree excepted. Rejects where serving broke down. */
  readonly ended: Promise<void>;
  /** Unmounts; files that are open in it fail from then on. Resolves as `ended` does. */
  close(): Promise<void>;
}

/** Mounts and serves. Resolves when the mount is live. */
export async function serveMount(options: ServeMountOptions): Promise<Mounted> {
  const { tree, clock } = options;
  const attached = await attach(options.mountpoint);
  const server = new MountServer(options, attached);
  const late = new AbortController();
  const isGreeted = await Promise.race([
    server.session.ready.then(() => true),
    server.ended.then(
      () => false,
      () => false,
    ),
    clock.sleep(GREETING_MS, late.signal).then(() => false),
  ]);
  late.abort();
  if (!isGreeted) {
    await server.close();
    throw new B2Error(
      'unsupported',
      `${attached.mountpoint}: the kernel did not begin to talk FUSE 7.23 or newer`,
    );
  }
  readFurtherAhead(attached.device);
  // Not earlier: with the first look at it the volumes are listed.
  await tree.volumes();
  return server;
}

/** The kernel reads 128 KiB ahead of who reads on and on, which is little for us. Only root may change it; without it all works, slower. */
function readFurtherAhead(device: string): void {
  if (process.geteuid?.() !== 0) return;
  try {
    writeFileSync(`/sys/class/bdi/${device}/read_ahead_kb`, `${READ_AHEAD_KIB}`);
  } catch {
    return; // /sys is read-only in many containers
  }
}

class MountServer implements Mounted {
  readonly mountpoint: string;
  readonly ended: Promise<void>;
  readonly session: MountSession;
  readonly #attached: Attached;
  readonly #events: EventSink;
  readonly #pending = new SharedArrayBuffer(4);
  readonly #wake = wakePipe();
  readonly #worker: Worker;
  readonly #onExit: () => void;
  #isGone = false;
  #closing: Promise<void> | undefined;

  constructor(options: ServeMountOptions, attached: Attached) {
    const { tree } = options;
    this.#attached = attached;
    this.#events = options.events;
    this.mountpoint = attached.mountpoint;
    this.session = new MountSession({
      root: tree.root(),
      totalBytes: async () => (await tree.volumes()).reduce((sum, v) => sum + v.sizeBytes, 0),
      reply: (header, payload) => this.#reply(header, payload),
      events: options.events,
      uid: process.geteuid?.() ?? 0,
      gid: process.getegid?.() ?? 0,
    });
    const start: ReaderStart = {
      b2Reader: true,
      fuseFd: attached.fuseFd,
      wakeFd: this.#wake.readFd,
      pending: this.#pending,
      maxPending: MAX_PENDING,
    };
    this.#worker = new Worker(workerFile(new URL('./reader-worker.js', import.meta.url)), {
      workerData: start,
      name: 'b2 mount',
    });
    // The end of the process waits for its threads, and this one waits for the kernel.
    this.#onExit = () => this.#wakeReader();
    process.on('exit', this.#onExit);
    this.ended = this.#serve();
    // Who is interested awaits it; a failure before that is not unhandled.
    this.ended.catch(() => undefined);
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

  #reply(header: Buffer, payload: Uint8Array | undefined): boolean {
    try {
      if (payload === undefined) writeSync(this.#attached.fuseFd, header);
      else writevSync(this.#attached.fuseFd, [header, payload]);
      return true;
    } catch (error) {
      const code = errnoOf(error);
      // ENOENT: who asked was interrupted. ENODEV and ENOTCONN: unmounted.
      if (code === 'ENOENT' || code === 'ENODEV' || code === 'ENOTCONN' || code === 'EBADF')
        return false;
      this.#events({
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
          if (message.type === 'end') return resolve();
          const all = Buffer.from(
            message.bytes.buffer,
            message.bytes.byteOffset,
            message.bytes.byteLength,
          );
          for (let at = 0; at + 4 <= all.length;) {
            const length = all.readUInt32LE(at);
            const handled = this.session.handle(all.subarray(at, at + length)).finally(() => {
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
      await this.session.close();
      // With the last descriptor the connection ends: whoever still has a file open there gets errors.
      closeSync(this.#attached.fuseFd);
      closeSync(this.#wake.readFd);
      closeSync(this.#wake.writeFd);
      await detach(this.#attached.device).catch((error: unknown) => {
        this.#events({ type: 'warning', message: messageOf(error) });
      });
      await this.#attached.watchdog.stop();
    }
  }

  close(): Promise<void> {
    this.#closing ??= this.#close();
    return this.#closing;
  }

  async #close(): Promise<void> {
    if (!this.#isGone) {
      try {
        const how = await detach(this.#attached.device);
        if (how === 'detached') {
          this.#events({
            type: 'warning',
            message: `${this.mountpoint} was in use: files that are open in it cannot be read any more`,
          });
        } else if (how === 'covered') {
          this.#events({
            type: 'warning',
            message: `${this.mountpoint}: something else is mounted over it; what is below stays until that is unmounted`,
          });
        }
      } catch (error) {
        this.#events({ type: 'warning', message: messageOf(error) });
      }
      if (!this.#isGone) this.#wakeReader();
    }
    await this.ended;
  }
}
