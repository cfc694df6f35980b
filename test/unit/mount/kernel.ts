/** The kernel's side of FUSE as far as tests need it: builds requests, keeps the replies. */
import type { EventSink } from '../../../src/events.js';
import {
  IN_HEADER_BYTES,
  Opcode,
  OUT_HEADER_BYTES,
  ROOT_NODE,
} from '../../../src/mount/protocol.js';
import { MountSession } from '../../../src/mount/session.js';
import type { TreeDirectory } from '../../../src/mount/tree.js';

export function request(
  opcode: number,
  node: number,
  unique: bigint,
  body: Uint8Array = new Uint8Array(0),
): Buffer {
  const bytes = Buffer.alloc(IN_HEADER_BYTES + body.byteLength);
  bytes.writeUInt32LE(bytes.length, 0);
  bytes.writeUInt32LE(opcode, 4);
  bytes.writeBigUInt64LE(unique, 8);
  bytes.writeBigUInt64LE(BigInt(node), 16);
  bytes.set(body, IN_HEADER_BYTES);
  return bytes;
}

export interface Reply {
  readonly errno: number;
  readonly payload: Buffer;
}

export interface Listed {
  readonly name: string;
  readonly next: number;
  /** READDIRPLUS: 0 where the kernel must look it up itself. */
  readonly node: number;
  readonly isDirectory: boolean;
}

export class TestKernel {
  readonly session: MountSession;
  /** By unique, every reply whose header is sound; the others are in `broken`. */
  readonly replies = new Map<bigint, Reply>();
  readonly broken: string[] = [];
  #unique = 1n;

  constructor(
    root: TreeDirectory,
    events: EventSink = () => undefined,
    takes: () => boolean = () => true,
  ) {
    this.session = new MountSession({
      root,
      totalBytes: () => Promise.resolve(1024 * 1024),
      xattrs: false,
      reply: (header, ...parts) => {
        const unique = header.readBigUInt64LE(8);
        const payload = parts.length === 0 ? undefined : Buffer.concat(parts);
        const length = OUT_HEADER_BYTES + (payload?.byteLength ?? 0);
        const errno = 0 - header.readInt32LE(4);
        if (header.readUInt32LE(0) !== length || header.length !== OUT_HEADER_BYTES)
          this.broken.push('length');
        if (errno !== 0 && (payload !== undefined || errno < 0 || errno > 511))
          this.broken.push(`errno ${errno}`);
        if (this.replies.has(unique)) this.broken.push(`two replies to ${unique}`);
        if (!takes()) return false;
        this.replies.set(unique, { errno, payload: Buffer.from(payload ?? []) });
        return true;
      },
      events,
      uid: 7,
      gid: 8,
    });
  }

  async ask(opcode: number, node: number, body?: Uint8Array): Promise<Reply> {
    const unique = this.#unique++;
    await this.session.handle(request(opcode, node, unique, body));
    const reply = this.replies.get(unique);
    if (reply === undefined) throw new Error(`no reply to opcode ${opcode}`);
    return reply;
  }

  lookup(node: number, name: string): Promise<Reply> {
    return this.ask(Opcode.lookup, node, Buffer.from(`${name}\0`));
  }

  /** Node id of a path; throws `errno N`. */
  async walk(
    ...names: readonly string[]
  ): Promise<{ node: number; sizeBytes: number; blocks: number; mtimeNs: bigint; mode: number }> {
    let node = ROOT_NODE;
    let payload: Buffer = Buffer.alloc(128);
    for (const name of names) {
      const reply = await this.lookup(node, name);
      if (reply.errno !== 0) throw new Error(`errno ${reply.errno}`);
      payload = reply.payload;
      node = Number(payload.readBigUInt64LE(0));
    }
    return {
      node,
      sizeBytes: Number(payload.readBigUInt64LE(48)),
      blocks: Number(payload.readBigUInt64LE(56)),
      mtimeNs: payload.readBigUInt64LE(72) * 1_000_000_000n + BigInt(payload.readUInt32LE(96)),
      mode: payload.readUInt32LE(100),
    };
  }

  async open(node: number, directory = false): Promise<number> {
    const reply = await this.ask(directory ? Opcode.opendir : Opcode.open, node, Buffer.alloc(8));
    if (reply.errno !== 0) throw new Error(`errno ${reply.errno}`);
    return Number(reply.payload.readBigUInt64LE(0));
  }

  release(handle: number, directory = false): Promise<Reply> {
    const body = Buffer.alloc(24);
    body.writeBigUInt64LE(BigInt(handle), 0);
    return this.ask(directory ? Opcode.releasedir : Opcode.release, ROOT_NODE, body);
  }

  static readBody(handle: number, offset: number | bigint, length: number): Buffer {
    const body = Buffer.alloc(40);
    body.writeBigUInt64LE(BigInt(handle), 0);
    body.writeBigUInt64LE(BigInt(offset), 8);
    body.writeUInt32LE(length, 16);
    return body;
  }

  read(handle: number, offset: number | bigint, length: number): Promise<Reply> {
    return this.ask(Opcode.read, ROOT_NODE, TestKernel.readBody(handle, offset, length));
  }

  /** LSEEK; `data` 3, `hole` 4. The offset, or undefined for ENXIO. */
  async seek(handle: number, offset: number, whence: number): Promise<number | undefined> {
    const body = Buffer.alloc(24);
    body.writeBigUInt64LE(BigInt(handle), 0);
    body.writeBigUInt64LE(BigInt(offset), 8);
    body.writeUInt32LE(whence, 16);
    const reply = await this.ask(Opcode.lseek, ROOT_NODE, body);
    if (reply.errno === 6) return undefined;
    if (reply.errno !== 0) throw new Error(`errno ${reply.errno}`);
    return Number(reply.payload.readBigUInt64LE(0));
  }

  /** One READDIR(PLUS). */
  async readDirectory(
    handle: number,
    offset: number,
    limit: number,
    plus = false,
  ): Promise<Listed[]> {
    const opcode = plus ? Opcode.readdirplus : Opcode.readdir;
    const reply = await this.ask(opcode, ROOT_NODE, TestKernel.readBody(handle, offset, limit));
    if (reply.errno !== 0) throw new Error(`errno ${reply.errno}`);
    const { payload } = reply;
    if (payload.length > limit) throw new Error('more than asked for');
    const list: Listed[] = [];
    for (let at = 0; at < payload.length;) {
      const node = plus ? Number(payload.readBigUInt64LE(at)) : 0;
      if (plus) at += 128;
      const length = payload.readUInt32LE(at + 16);
      list.push({
        name: payload.toString('utf8', at + 24, at + 24 + length),
        next: Number(payload.readBigUInt64LE(at + 8)),
        node,
        isDirectory: payload.readUInt32LE(at + 20) === 4,
      });
      at += Math.ceil((24 + length) / 8) * 8;
    }
    return list;
  }

  /** All names of a directory, without `.` and `..`, read in pieces of `limit` bytes. */
  async list(node: number, limit = 4096, plus = false): Promise<Listed[]> {
    const handle = await this.open(node, true);
    const all: Listed[] = [];
    for (let offset = 0; ;) {
      const part = await this.readDirectory(handle, offset, limit, plus);
      if (part.length === 0) break;
      all.push(...part);
      offset = part.at(-1)?.next ?? 0;
    }
    await this.release(handle, true);
    return all.filter((l) => l.name !== '.' && l.name !== '..');
  }

  async names(node: number, limit?: number): Promise<string[]> {
    return (await this.list(node, limit)).map((l) => l.name);
  }
}
