/**
 * One image as one file that can be written, over FUSE: what a loop device lies on. The root of this file system is the file
 * itself (mounted with `rootmode=100000`).
 */
import { closeSync, constants, openSync } from 'node:fs';

import { B2Error, errnoOf, messageOf } from '../errors.js';
import type { EventSink } from '../events.js';
import type { WritableImage } from '../nbd/index.js';
import { FuseChannel } from './channel.js';
import {
  Errno,
  IN_HEADER_BYTES,
  OPEN_KEEP_CACHE,
  Opcode,
  ROOT_NODE,
  attributesReply,
  initReply,
  openReply,
  parseHeader,
  parseRequest,
  replyHeader,
  statfsReply,
  writeReply,
  type Header,
} from './protocol.js';

/** A loop device asks for 128 at a time; of up to 1 MiB each that bounds memory. */
const MAX_PENDING = 64;
const ATTRIBUTES_VALID_MS = 3_600_000;
/** Bytes before the data of a WRITE. */
const WRITE_BYTES = 40;
const ENOSPC = 28;

/** A new descriptor of /dev/fuse, non-blocking. Kind `unsupported` where there is none. */
export function openFuse(): number {
  try {
    return openSync('/dev/fuse', constants.O_RDWR | constants.O_NONBLOCK);
  } catch (error) {
    throw new B2Error('unsupported', `cannot open /dev/fuse: ${messageOf(error)}`, {
      cause: error,
      hint: 'Load the module (modprobe fuse); a container must be given the device.',
    });
  }
}

export interface BlockFileOptions {
  /** From {@link openFuse}; closed when {@link BlockFile.ended} settles. Somebody else mounts it. */
  readonly fuseFd: number;
  /** Stays the caller's. */
  readonly image: WritableImage;
  readonly events: EventSink;
  /** Told of every failed read and write (whoever asked gets EIO), and of the end of the connection where nobody wanted it. */
  readonly failed: (error: unknown) => void;
}

/** Answers the kernel until the file is unmounted. */
export class BlockFile {
  readonly #options: BlockFileOptions;
  readonly #channel: FuseChannel;
  /**
   * Settles when nobody asks any more, and nobody can: the descriptor is closed, and with it the connection, so that who still has
   * the file open gets errors and waits for nothing. Rejects with kind `io` where the kernel's requests can no longer be read, after
   * a warning and {@link BlockFileOptions.failed}.
   */
  readonly ended: Promise<void>;

  constructor(options: BlockFileOptions) {
    this.#options = options;
    this.#channel = new FuseChannel({
      fuseFd: options.fuseFd,
      handle: (bytes) => this.#handle(bytes),
      events: options.events,
      maxPending: MAX_PENDING,
    });
    this.ended = this.#serve();
    // Who is interested awaits it; a failure before that is not unhandled.
    this.ended.catch(() => undefined);
  }

  /** True when nobody can ask any more. */
  get isEnded(): boolean {
    return this.#channel.isGone;
  }

  async #serve(): Promise<void> {
    const { events, failed, fuseFd } = this.#options;
    try {
      await this.#channel.ended;
    } catch (error) {
      const failure = new B2Error(
        'io',
        `an image that file systems were mounted from cannot be read any more: ${messageOf(error)}`,
        { cause: error },
      );
      events({ type: 'warning', message: failure.message });
      failed(failure);
      throw failure;
    } finally {
      closeSync(fuseFd);
    }
  }

  /** Ends the connection: who still reads the file gets errors. */
  async close(): Promise<void> {
    this.#channel.stop();
    await this.ended.catch(() => undefined);
  }

  #send(unique: bigint, payload: Uint8Array | undefined, errno = 0): void {
    const header = replyHeader(unique, errno, payload?.byteLength ?? 0);
    if (payload === undefined) this.#channel.reply(header);
    else this.#channel.reply(header, payload);
  }

  async #handle(bytes: Buffer): Promise<void> {
    const header = parseHeader(bytes);
    if (header === undefined) return;
    try {
      if (header.opcode === Opcode.write) await this.#write(header, bytes);
      else await this.#answer(header, bytes);
    } catch (error) {
      this.#options.failed(error);
      const isFull = error instanceof B2Error && error.kind === 'no-space';
      this.#send(
        header.unique,
        undefined,
        isFull || errnoOf(error) === 'ENOSPC' ? ENOSPC : Errno.EIO,
      );
    }
  }

  async #answer({ unique, ...header }: Header, bytes: Buffer): Promise<void> {
    const { image } = this.#options;
    const request = parseRequest({ unique, ...header }, bytes);
    switch (request.op) {
      case 'init': {
        const reply = initReply(request);
        return this.#send(unique, reply, reply === undefined ? Errno.EPROTO : 0);
      }
      case 'getattr': {
        const blocks = Math.ceil(image.sizeBytes / 512);
        const attributes = {
          node: ROOT_NODE,
          kind: 'file',
          sizeBytes: image.sizeBytes,
          blocks,
          mtimeNs: 0n,
          permissions: 0o600,
          links: 1,
          uid: process.geteuid?.() ?? 0,
          gid: process.getegid?.() ?? 0,
        } as const;
        return this.#send(unique, attributesReply(attributes, ATTRIBUTES_VALID_MS));
      }
      case 'open':
        return this.#send(unique, openReply(1, OPEN_KEEP_CACHE));
      case 'read': {
        const length = Math.max(0, Math.min(request.length, image.sizeBytes - request.offset));
        const data = Buffer.allocUnsafe(length);
        if (length > 0) await image.read(data, request.offset);
        return this.#send(unique, data);
      }
      case 'nothing': // fsync: the overlay lives no longer than this process
      case 'release':
      case 'destroy':
        return this.#send(unique, undefined);
      case 'statfs':
        return this.#send(unique, statfsReply(image.sizeBytes));
      case 'forget':
      case 'interrupt':
        return undefined;
      default:
        // The kernel remembers and does without (flush, lseek, fallocate, …).
        return this.#send(unique, undefined, Errno.ENOSYS);
    }
  }

  async #write({ unique }: Header, bytes: Buffer): Promise<void> {
    const { image } = this.#options;
    const body = IN_HEADER_BYTES;
    const length = bytes.length >= body + WRITE_BYTES ? bytes.readUInt32LE(body + 16) : -1;
    if (length < 0 || bytes.length < body + WRITE_BYTES + length)
      return this.#send(unique, undefined, Errno.EINVAL);
    const offset = Number(bytes.readBigUInt64LE(body + 8));
    if (offset + length > image.sizeBytes) return this.#send(unique, undefined, ENOSPC);
    const data = bytes.subarray(body + WRITE_BYTES, body + WRITE_BYTES + length);
    if (length > 0) await image.write(data, offset);
    return this.#send(unique, writeReply(length));
  }
}
