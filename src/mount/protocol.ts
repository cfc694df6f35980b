/**
 * The FUSE kernel protocol (linux/fuse.h, version 7.31 and newer), as far as a read-only file system, and one file that can be written, need it. Pure bytes: requests in, replies
 * out. Numbers are in the byte order of the machine, which the kernel shares with us; this program runs on little-endian ones.
 *
 * A request: u32 length, u32 opcode, u64 unique, u64 node, u32 uid, gid, pid, u16 extensions, u16 padding; then its own fields.
 * A reply: u32 length, i32 −errno, u64 unique; then its own fields.
 */

import { decodeName } from '../files/names.js';

/** Bytes of the header of a request, and of a reply. */
export const IN_HEADER_BYTES = 40;
export const OUT_HEADER_BYTES = 16;
/** What we tell the kernel that it may write at once: only the replay of a journal writes. */
export const MAX_WRITE_BYTES = 4096;
/** The kernel refuses to hand requests to a smaller buffer: FUSE_MIN_READ_BUFFER, and room for a write. */
export const REQUEST_BUFFER_BYTES = 8192 + MAX_WRITE_BYTES;
/** Bytes of one read at most: 256 pages, the kernel's own limit. */
export const MAX_READ_BYTES = 1024 * 1024;
/** Node id of the root. */
export const ROOT_NODE = 1;
/** Longest name that the file system knows. */
export const MAX_NAME_BYTES = 255;

const MAJOR = 7;
const MINOR = 31;

export const Opcode = {
  lookup: 1,
  forget: 2,
  getattr: 3,
  setattr: 4,
  readlink: 5,
  symlink: 6,
  mknod: 8,
  mkdir: 9,
  unlink: 10,
  rmdir: 11,
  rename: 12,
  link: 13,
  open: 14,
  read: 15,
  write: 16,
  statfs: 17,
  release: 18,
  fsync: 20,
  setxattr: 21,
  getxattr: 22,
  listxattr: 23,
  removexattr: 24,
  init: 26,
  opendir: 27,
  readdir: 28,
  releasedir: 29,
  fsyncdir: 30,
  create: 35,
  interrupt: 36,
  destroy: 38,
  ioctl: 39,
  batchForget: 42,
  fallocate: 43,
  readdirplus: 44,
  rename2: 45,
  lseek: 46,
  tmpfile: 51,
} as const;

/** errno values of Linux that replies carry. */
export const Errno = {
  ENOENT: 2,
  EIO: 5,
  ENXIO: 6,
  EBADF: 9,
  EINVAL: 22,
  ENOTDIR: 20,
  EISDIR: 21,
  ENOTTY: 25,
  EROFS: 30,
  ERANGE: 34,
  ENOSYS: 38,
  ENODATA: 61,
  EPROTO: 71,
  ESTALE: 116,
} as const;
export type Errno = (typeof Errno)[keyof typeof Errno];

/** Whence of {@link Request} `lseek`. */
export const Whence = { data: 3, hole: 4 } as const;

/** A request's header. */
export interface Header {
  readonly opcode: number;
  /** Names the reply. */
  readonly unique: bigint;
  readonly node: number;
}

/** What the kernel asks. `errno` of `refused` is what to answer. */
export type Request =
  | {
      readonly op: 'init';
      readonly major: number;
      readonly minor: number;
      readonly maxReadahead: number;
      readonly flags: number;
    }
  | { readonly op: 'lookup'; readonly name: string }
  | {
      readonly op: 'forget';
      readonly items: readonly { readonly node: number; readonly count: number }[];
    }
  | { readonly op: 'getattr' }
  | { readonly op: 'open'; readonly writing: boolean }
  | { readonly op: 'opendir' }
  | {
      readonly op: 'read' | 'readdir' | 'readdirplus';
      readonly handle: number;
      readonly offset: number;
      readonly length: number;
    }
  | { readonly op: 'release' | 'releasedir'; readonly handle: number }
  | {
      readonly op: 'lseek';
      readonly handle: number;
      readonly offset: number;
      readonly whence: number;
    }
  /** `size`: room for the answer; 0 asks how long it is. */
  | { readonly op: 'getxattr'; readonly name: Buffer; readonly size: number }
  | { readonly op: 'listxattr'; readonly size: number }
  | { readonly op: 'statfs' | 'readlink' | 'nothing' | 'interrupt' | 'destroy' }
  | { readonly op: 'refused'; readonly errno: Errno };

export type NodeKind = 'directory' | 'file' | 'symlink' | 'fifo' | 'socket' | 'block' | 'character';

/** Attributes of a node. Times are nanoseconds since 1970. */
export interface Attributes {
  readonly node: number;
  readonly kind: NodeKind;
  readonly sizeBytes: number;
  /** Allocated, in units of 512 bytes. */
  readonly blocks: number;
  readonly mtimeNs: bigint;
  /** Default: `mtimeNs`. */
  readonly atimeNs?: bigint;
  readonly ctimeNs?: bigint;
  /** The low 12 bits of the mode. */
  readonly permissions: number;
  readonly links: number;
  readonly uid: number;
  readonly gid: number;
  /** Of a device node, as the kernel packs it into 32 bits. Default 0. */
  readonly rdev?: number;
}

// Flags of INIT.
const ASYNC_READ = 1 << 0;
const BIG_WRITES = 1 << 5;
const DO_READDIRPLUS = 1 << 13;
const READDIRPLUS_AUTO = 1 << 14;
const PARALLEL_DIROPS = 1 << 18;
const MAX_PAGES = 1 << 22;
const WANTED =
  ASYNC_READ | BIG_WRITES | DO_READDIRPLUS | READDIRPLUS_AUTO | PARALLEL_DIROPS | MAX_PAGES;

/** Flags of an open file: keep what the page cache has of it; of a directory: its list may be cached. */
export const OPEN_KEEP_CACHE = 1 << 1;

/** Type bits of the mode; the types of directory entries are the same, shifted. */
const MODE_OF: Readonly<Record<NodeKind, number>> = {
  fifo: 0o010000,
  character: 0o020000,
  directory: 0o040000,
  block: 0o060000,
  file: 0o100000,
  symlink: 0o120000,
  socket: 0o140000,
};
const DIRENT_SHIFT = 12;
const O_ACCMODE = 3;
const ENTRY_BYTES = 128;
const ATTR_AT_IN_ENTRY = 40;
const DIRENT_BYTES = 24;

/** The header, or undefined where the bytes cannot be a request (they are to be dropped: there is nothing to answer). */
export function parseHeader(bytes: Buffer): Header | undefined {
  if (bytes.length < IN_HEADER_BYTES || bytes.readUInt32LE(0) !== bytes.length) return undefined;
  const node = bytes.readBigUInt64LE(16);
  return {
    opcode: bytes.readUInt32LE(4),
    unique: bytes.readBigUInt64LE(8),
    // Node ids are ours and small; any other is unknown, which −1 is too.
    node: node > BigInt(Number.MAX_SAFE_INTEGER) ? -1 : Number(node),
  };
}

function refused(errno: Errno): Request {
  return { op: 'refused', errno };
}

/** A number that may be too large to be exact: such offsets and handles lie beyond everything. */
function number64(bytes: Buffer, at: number): number {
  const value = bytes.readBigUInt64LE(at);
  return value > BigInt(Number.MAX_SAFE_INTEGER) ? Number.MAX_SAFE_INTEGER : Number(value);
}

const FIELD_BYTES: Readonly<Record<number, number>> = {
  [Opcode.forget]: 8,
  [Opcode.getattr]: 16,
  [Opcode.open]: 8,
  [Opcode.read]: 40,
  [Opcode.release]: 24,
  [Opcode.init]: 16,
  [Opcode.readdir]: 40,
  [Opcode.releasedir]: 24,
  [Opcode.batchForget]: 8,
  [Opcode.readdirplus]: 40,
  [Opcode.lseek]: 24,
  [Opcode.getxattr]: 8,
  [Opcode.listxattr]: 8,
};

/** The request that follows `header`. Never throws: what is too short or senseless is `refused` with EINVAL. */
export function parseRequest(header: Header, bytes: Buffer): Request {
  const body = IN_HEADER_BYTES;
  if (bytes.length < body + (FIELD_BYTES[header.opcode] ?? 0)) return refused(Errno.EINVAL);
  switch (header.opcode) {
    case Opcode.init:
      return {
        op: 'init',
        major: bytes.readUInt32LE(body),
        minor: bytes.readUInt32LE(body + 4),
        maxReadahead: bytes.readUInt32LE(body + 8),
        flags: bytes.readUInt32LE(body + 12),
      };
    case Opcode.lookup: {
      const end = bytes.indexOf(0, body);
      if (end <= body) return refused(Errno.EINVAL);
      return { op: 'lookup', name: decodeName(bytes.subarray(body, end)) };
    }
    case Opcode.forget:
      return { op: 'forget', items: [{ node: header.node, count: number64(bytes, body) }] };
    case Opcode.batchForget: {
      const count = Math.min(bytes.readUInt32LE(body), Math.floor((bytes.length - body - 8) / 16));
      const items = Array.from({ length: count }, (_, i) => ({
        node: number64(bytes, body + 8 + i * 16),
        count: number64(bytes, body + 16 + i * 16),
      }));
      return { op: 'forget', items };
    }
    case Opcode.getattr:
      return { op: 'getattr' };
    case Opcode.open:
      return { op: 'open', writing: (bytes.readUInt32LE(body) & O_ACCMODE) !== 0 };
    case Opcode.opendir:
      return { op: 'opendir' };
    case Opcode.read:
    case Opcode.readdir:
    case Opcode.readdirplus: {
      const length = bytes.readUInt32LE(body + 16);
      // More than was agreed on in INIT: not from the kernel that we talked to.
      if (length > MAX_READ_BYTES) return refused(Errno.EINVAL);
      const op =
        header.opcode === Opcode.read
          ? 'read'
          : header.opcode === Opcode.readdir
            ? 'readdir'
            : 'readdirplus';
      return { op, handle: number64(bytes, body), offset: number64(bytes, body + 8), length };
    }
    case Opcode.release:
      return { op: 'release', handle: number64(bytes, body) };
    case Opcode.releasedir:
      return { op: 'releasedir', handle: number64(bytes, body) };
    case Opcode.lseek:
      return {
        op: 'lseek',
        handle: number64(bytes, body),
        offset: number64(bytes, body + 8),
        whence: bytes.readUInt32LE(body + 16),
      };
    case Opcode.statfs:
      return { op: 'statfs' };
    case Opcode.fsync:
    case Opcode.fsyncdir:
      return { op: 'nothing' };
    case Opcode.interrupt:
      return { op: 'interrupt' };
    case Opcode.destroy:
      return { op: 'destroy' };
    case Opcode.readlink:
      return { op: 'readlink' };
    case Opcode.getxattr: {
      const end = bytes.indexOf(0, body + 8);
      if (end <= body + 8) return refused(Errno.EINVAL);
      const name = Buffer.from(bytes.subarray(body + 8, end));
      return { op: 'getxattr', name, size: bytes.readUInt32LE(body) };
    }
    case Opcode.listxattr:
      return { op: 'listxattr', size: bytes.readUInt32LE(body) };
    case Opcode.ioctl:
      return refused(Errno.ENOTTY);
    case Opcode.setattr:
    case Opcode.symlink:
    case Opcode.mknod:
    case Opcode.mkdir:
    case Opcode.unlink:
    case Opcode.rmdir:
    case Opcode.rename:
    case Opcode.rename2:
    case Opcode.link:
    case Opcode.write:
    case Opcode.setxattr:
    case Opcode.removexattr:
    case Opcode.create:
    case Opcode.tmpfile:
    case Opcode.fallocate:
      return refused(Errno.EROFS);
    default:
      // The kernel remembers ENOSYS and does without from then on (flush, statx, …).
      return refused(Errno.ENOSYS);
  }
}

/** The header of a reply that `payloadBytes` follow. `errno` 0 is success. */
export function replyHeader(unique: bigint, errno: number, payloadBytes: number): Buffer {
  const header = Buffer.allocUnsafe(OUT_HEADER_BYTES);
  header.writeUInt32LE(OUT_HEADER_BYTES + payloadBytes, 0);
  header.writeInt32LE(-errno, 4);
  header.writeBigUInt64LE(unique, 8);
  return header;
}

/** The answer to INIT; undefined where the kernel speaks a protocol too old for us. */
export function initReply(request: Extract<Request, { op: 'init' }>): Buffer | undefined {
  if (request.major < MAJOR || (request.major === MAJOR && request.minor < 23)) return undefined;
  const reply = Buffer.alloc(64);
  reply.writeUInt32LE(MAJOR, 0);
  reply.writeUInt32LE(request.major > MAJOR ? 0 : Math.min(request.minor, MINOR), 4);
  // A newer major: the kernel reads ours and asks again.
  if (request.major > MAJOR) return reply;
  reply.writeUInt32LE(request.maxReadahead, 8);
  reply.writeUInt32LE((request.flags & WANTED) >>> 0, 12);
  reply.writeUInt16LE(64, 16); // requests in the background at most
  reply.writeUInt16LE(48, 18); // from how many on the device counts as congested
  reply.writeUInt32LE(MAX_WRITE_BYTES, 20);
  reply.writeUInt32LE(1, 24); // granularity of times, in ns
  reply.writeUInt16LE(MAX_READ_BYTES / 4096, 28);
  return reply;
}

const NS = 1_000_000_000n;

function writeAttributes(into: Buffer, at: number, a: Attributes): void {
  into.writeBigUInt64LE(BigInt(a.node), at);
  into.writeBigUInt64LE(BigInt(a.sizeBytes), at + 8);
  into.writeBigUInt64LE(BigInt(a.blocks), at + 16);
  for (const [i, ns] of [a.atimeNs ?? a.mtimeNs, a.mtimeNs, a.ctimeNs ?? a.mtimeNs].entries()) {
    // Before 1970 the seconds are negative and the nanoseconds count forward from there.
    const seconds = (ns - (((ns % NS) + NS) % NS)) / NS;
    into.writeBigInt64LE(seconds, at + 24 + 8 * i);
    into.writeUInt32LE(Number(ns - seconds * NS), at + 48 + 4 * i);
  }
  into.writeUInt32LE(MODE_OF[a.kind] | a.permissions, at + 60);
  into.writeUInt32LE(a.links, at + 64);
  into.writeUInt32LE(a.uid, at + 68);
  into.writeUInt32LE(a.gid, at + 72);
  into.writeUInt32LE(a.rdev ?? 0, at + 76);
  into.writeUInt32LE(64 * 1024, at + 80); // the preferred size of reads
  into.writeUInt32LE(0, at + 84);
}

function writeValidity(
  into: Buffer,
  at: number,
  ms: number,
): { seconds: bigint; nanoseconds: number } {
  const seconds = BigInt(Math.floor(ms / 1000));
  into.writeBigUInt64LE(seconds, at);
  return { seconds, nanoseconds: (ms % 1000) * 1_000_000 };
}

/** How long the kernel may remember a name, and attributes. */
export interface Validity {
  readonly entryMs: number;
  readonly attributesMs: number;
}

function writeEntry(into: Buffer, at: number, a: Attributes, valid: Validity): void {
  into.writeBigUInt64LE(BigInt(a.node), at);
  into.writeBigUInt64LE(0n, at + 8); // generation: node ids are never used again
  const entry = writeValidity(into, at + 16, valid.entryMs);
  const attributes = writeValidity(into, at + 24, valid.attributesMs);
  into.writeUInt32LE(entry.nanoseconds, at + 32);
  into.writeUInt32LE(attributes.nanoseconds, at + 36);
  writeAttributes(into, at + ATTR_AT_IN_ENTRY, a);
}

/** The answer to LOOKUP. */
export function entryReply(a: Attributes, valid: Validity): Buffer {
  const reply = Buffer.alloc(ENTRY_BYTES);
  writeEntry(reply, 0, a, valid);
  return reply;
}

/** The answer to GETATTR. */
export function attributesReply(a: Attributes, validMs: number): Buffer {
  const reply = Buffer.alloc(104);
  reply.writeUInt32LE(writeValidity(reply, 0, validMs).nanoseconds, 8);
  writeAttributes(reply, 16, a);
  return reply;
}

/** The answer to OPEN and OPENDIR. */
export function openReply(handle: number, flags: number): Buffer {
  const reply = Buffer.alloc(16);
  reply.writeBigUInt64LE(BigInt(handle), 0);
  reply.writeUInt32LE(flags, 8);
  return reply;
}

/** The answer to WRITE: bytes written. */
export function writeReply(length: number): Buffer {
  const reply = Buffer.alloc(8);
  reply.writeUInt32LE(length, 0);
  return reply;
}

/** The answer to GETXATTR and LISTXATTR when they ask for the length. */
export function xattrSizeReply(length: number): Buffer {
  const reply = Buffer.alloc(8);
  reply.writeUInt32LE(length, 0);
  return reply;
}

/** The answer to LSEEK. */
export function seekReply(offset: number): Buffer {
  const reply = Buffer.alloc(8);
  reply.writeBigUInt64LE(BigInt(offset), 0);
  return reply;
}

/** The answer to STATFS: a full file system of `totalBytes`. */
export function statfsReply(totalBytes: number): Buffer {
  const reply = Buffer.alloc(80);
  reply.writeBigUInt64LE(BigInt(Math.ceil(totalBytes / 4096)), 0);
  reply.writeUInt32LE(4096, 40);
  reply.writeUInt32LE(MAX_NAME_BYTES, 44);
  reply.writeUInt32LE(4096, 48);
  return reply;
}

/** Collects entries of a directory up to a number of bytes. */
export class DirectoryReply {
  readonly #limit: number;
  readonly #plus: boolean;
  readonly #parts: Buffer[] = [];
  #bytes = 0;

  /** `plus`: READDIRPLUS. */
  constructor(limit: number, plus: boolean) {
    this.#limit = limit;
    this.#plus = plus;
  }

  /** True if an entry with this name still has room. */
  fits(name: Buffer): boolean {
    return this.#bytes + this.#length(name) <= this.#limit;
  }

  #length(name: Buffer): number {
    return (this.#plus ? ENTRY_BYTES : 0) + Math.ceil((DIRENT_BYTES + name.length) / 8) * 8;
  }

  /**
   * Adds an entry. `next` is the offset that the kernel asks for to go on behind it. `found`, for READDIRPLUS: as a LOOKUP would
   * answer, and counts as one; without it the kernel looks the name up itself.
   */
  add(
    name: Buffer,
    kind: Attributes['kind'],
    inode: number,
    next: number,
    found?: { readonly attributes: Attributes; readonly valid: Validity },
  ): void {
    const part = Buffer.alloc(this.#length(name));
    const at = this.#plus ? ENTRY_BYTES : 0;
    if (this.#plus && found !== undefined) writeEntry(part, 0, found.attributes, found.valid);
    part.writeBigUInt64LE(BigInt(inode), at);
    part.writeBigUInt64LE(BigInt(next), at + 8);
    part.writeUInt32LE(name.length, at + 16);
    part.writeUInt32LE(MODE_OF[kind] >> DIRENT_SHIFT, at + 20);
    name.copy(part, at + DIRENT_BYTES);
    this.#parts.push(part);
    this.#bytes += part.length;
  }

  finish(): Buffer {
    return Buffer.concat(this.#parts, this.#bytes);
  }
}
