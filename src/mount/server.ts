/**
 * A mount that is being served: attaches and answers the kernel's requests, until it is unmounted by somebody, or by
 * {@link Mounted.close}.
 */
import { closeSync, writeFileSync } from 'node:fs';

import type { Clock } from '../clock.js';
import { B2Error, messageOf } from '../errors.js';
import type { EventSink } from '../events.js';
import { attach, detach, type Attached } from './attach.js';
import { FuseChannel } from './channel.js';
import { MountSession } from './session.js';
import type { MountTree } from './tree.js';

/** Requests of the kernel that are under way at most; more stay with the kernel. */
const MAX_PENDING = 512;
/** How far the kernel reads ahead, where we may say so (root). */
const READ_AHEAD_KIB = 4096;
/** The kernel greets a new file system at once; the thread that hears it may start late on a machine that is very busy. */
const GREETING_MS = 60_000;

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
  let failure: unknown;
  const how = await Promise.race([
    server.session.ready.then(() => 'greeted' as const),
    server.ended.then(
      () => 'unmounted' as const,
      (error: unknown) => {
        failure = error;
        return 'unmounted' as const;
      },
    ),
    clock.sleep(GREETING_MS, late.signal).then(() => 'late' as const),
  ]);
  late.abort();
  if (how !== 'greeted') {
    await server.close().catch(() => undefined);
    if (failure !== undefined) {
      throw new B2Error(
        'failed',
        `${attached.mountpoint}: the kernel's requests cannot be read: ${messageOf(failure)}`,
        { cause: failure },
      );
    }
    if (how === 'unmounted')
      throw new B2Error('failed', `${attached.mountpoint} was unmounted before it was ready`);
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
  readonly #channel: FuseChannel;
  #closing: Promise<void> | undefined;

  constructor(options: ServeMountOptions, attached: Attached) {
    const { tree } = options;
    this.#attached = attached;
    this.#events = options.events;
    this.mountpoint = attached.mountpoint;
    this.session = new MountSession({
      root: tree.root(),
      totalBytes: async () => (await tree.volumes()).reduce((sum, v) => sum + v.sizeBytes, 0),
      reply: (header, ...payload) => this.#channel.reply(header, ...payload),
      events: options.events,
      uid: process.geteuid?.() ?? 0,
      gid: process.getegid?.() ?? 0,
      xattrs: tree.hasFiles,
    });
    this.#channel = new FuseChannel({
      fuseFd: attached.fuseFd,
      handle: (bytes) => this.session.handle(bytes),
      events: options.events,
      maxPending: MAX_PENDING,
      startsHere: true,
    });
    this.ended = this.#serve();
    // Who is interested awaits it; a failure before that is not unhandled.
    this.ended.catch(() => undefined);
  }

  async #serve(): Promise<void> {
    try {
      await this.#channel.ended;
    } finally {
      await this.session.close();
      // With the last descriptor the connection ends: whoever still has a file open there gets errors.
      closeSync(this.#attached.fuseFd);
      await detach(this.#attached.source).catch((error: unknown) => {
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
    if (!this.#channel.isGone) {
      try {
        const how = await detach(this.#attached.source);
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
      this.#channel.stop();
    }
    await this.ended;
  }
}
