/** Answers the kernel's requests from a tree: node ids, open files and directories, bounds on memory. Knows no /dev/fuse. */
import { BufferPool } from '../buffer-pool.js';
import { errnoOf, messageOf, isKind } from '../errors.js';
import type { EventSink } from '../events.js';
import { encodeName } from '../files/names.js';
import {
  DirectoryReply,
  Errno,
  MAX_NAME_BYTES,
  OPEN_KEEP_CACHE,
  ROOT_NODE,
  Whence,
  attributesReply,
  entryReply,
  initReply,
  openReply,
  parseHeader,
  parseRequest,
  replyHeader,
  seekReply,
  statfsReply,
  xattrSizeReply,
  type Attributes,
  type Header,
  type Request,
  type Validity,
} from './protocol.js';
import type { OpenFile, TreeDirectory, TreeEntry, TreeFile, TreeListed, TreeNode } from './tree.js';

/** How long the kernel may remember a name that does not change while it is there (thinning may remove it). */
const NAME_VALID_MS = 60_000;
/** Attributes of a node never change. */
const ATTRIBUTES_VALID_MS = 3_600_000;
/** Bytes that reads under way may hold; further reads wait. */
const READ_BYTES_IN_FLIGHT = 64 * 1024 * 1024;
/** Memory for answers that is kept. */
const KEPT_BYTES = 8 * 1024 * 1024;
/** Warnings that are remembered so that each is told once. */
const REMEMBERED_WARNINGS = 256;
const UNKNOWN_INODE = 0xffff_ffff;

export interface SessionOptions {
  readonly root: TreeDirectory;
  /** Bytes that `statfs` tells as the size. */
  readonly totalBytes: () => Promise<number>;
  /** Sends a reply, the parts of `payload` one after the other, and has done with them when it returns; false where nobody takes it any more. */
  readonly reply: (header: Buffer, ...payload: readonly Uint8Array[]) => boolean;
  readonly events: EventSink;
  readonly uid: number;
  readonly gid: number;
  /** True if nodes may have extended attributes; otherwise the kernel is told once that there are none. */
  readonly xattrs: boolean;
}

/** What file systems inside may answer; anything else is an I/O error, and told. */
const ERRNO_OF: Readonly<Record<string, Errno>> = {
  ENODATA: Errno.ENODATA,
  ENOTSUP: Errno.ENODATA,
  EOPNOTSUPP: Errno.ENODATA,
  ERANGE: Errno.ERANGE,
};

interface KnownNode {
  readonly id: number;
  readonly node: TreeNode;
  readonly parent: number;
  readonly mapKey: string;
  /** How often the kernel has been told of it, less what it forgot. */
  lookups: number;
}

interface OpenDirectory {
  readonly node: KnownNode;
  readonly directory: TreeDirectory;
  /** The listing and how many entries it has given; undefined before the first and after a rewind. */
  listing: AsyncGenerator<TreeListed> | undefined;
  given: number;
  /** Read, but it did not fit into the last reply. */
  waiting: TreeListed | undefined;
  /** One request at a time. */
  turn: Promise<unknown>;
}

/** Thrown by handlers to answer with an errno. */
class Refusal extends Error {
  readonly errno: Errno;

  constructor(errno: Errno) {
    super(`errno ${errno}`);
    this.errno = errno;
  }
}

export class MountSession {
  readonly #options: SessionOptions;
  readonly #nodes = new Map<number, KnownNode>();
  readonly #ids = new Map<string, KnownNode>();
  readonly #files = new Map<number, OpenFile>();
  readonly #directories = new Map<number, OpenDirectory>();
  readonly #warned = new Set<string>();
  readonly #waitingReads: { readonly bytes: number; readonly start: () => void }[] = [];
  readonly #buffers = new BufferPool(KEPT_BYTES);
  #bytesInFlight = 0;
  #nextNode = ROOT_NODE + 1;
  #nextHandle = 1;
  #isReady = false;
  #onReady: () => void = () => undefined;
  /** Resolves when the kernel has greeted us. */
  readonly ready: Promise<void>;

  constructor(options: SessionOptions) {
    this.#options = options;
    const root: KnownNode = {
      id: ROOT_NODE,
      node: options.root,
      parent: ROOT_NODE,
      mapKey: '',
      lookups: 1,
    };
    this.#nodes.set(ROOT_NODE, root);
    this.ready = new Promise((resolve) => {
      this.#onReady = resolve;
    });
  }

  /** For tests: what is held. */
  get held(): {
    readonly nodes: number;
    readonly files: number;
    readonly directories: number;
    readonly readBytes: number;
  } {
    return {
      nodes: this.#nodes.size,
      files: this.#files.size,
      directories: this.#directories.size,
      readBytes: this.#bytesInFlight,
    };
  }

  /** Answers one request. `bytes` may be reused when it returns to the caller. Never rejects. */
  async handle(bytes: Buffer): Promise<void> {
    const header = parseHeader(bytes);
    if (header === undefined) {
      this.#warn('a request that is none came from the kernel; it was dropped');
      return;
    }
    const request = parseRequest(header, bytes);
    try {
      await this.#answer(header, request);
    } catch (error) {
      this.#send(header.unique, undefined, this.#errnoOf(error, request));
    }
  }

  /** Closes what is open. */
  async close(): Promise<void> {
    for (const file of this.#files.values()) await file.close();
    this.#files.clear();
    for (const directory of this.#directories.values()) await this.#endListing(directory);
    this.#directories.clear();
  }

  #warn(message: string): void {
    if (this.#warned.has(message)) return;
    for (const old of this.#warned) {
      if (this.#warned.size < REMEMBERED_WARNINGS) break;
      this.#warned.delete(old);
    }
    this.#warned.add(message);
    this.#options.events({ type: 'warning', message });
  }

  #errnoOf(error: unknown, request: Request): number {
    if (error instanceof Refusal) return error.errno;
    const known = ERRNO_OF[errnoOf(error) ?? ''];
    if (known !== undefined) return known;
    // A snapshot or point that went away while somebody looked at it.
    if (request.op === 'lookup' && isKind(error, 'not-found')) return Errno.ENOENT;
    this.#warn(`${request.op}: answered with an I/O error: ${messageOf(error)}`);
    return Errno.EIO;
  }

  #send(unique: bigint, payload: Uint8Array | undefined, errno = 0): boolean {
    const header = replyHeader(unique, errno, payload?.byteLength ?? 0);
    return payload === undefined
      ? this.#options.reply(header)
      : this.#options.reply(header, payload);
  }

  async #answer(header: Header, request: Request): Promise<void> {
    const { unique } = header;
    switch (request.op) {
      case 'init': {
        const reply = initReply(request);
        this.#send(unique, reply, reply === undefined ? Errno.EPROTO : 0);
        if (reply !== undefined && !this.#isReady) {
          this.#isReady = true;
          this.#onReady();
        }
        return;
      }
      case 'lookup':
        return this.#lookup(unique, header.node, request.name);
      case 'forget':
        for (const { node, count } of request.items) this.#forget(node, count);
        return;
      case 'getattr': {
        const known = this.#known(header.node);
        const { attributes, valid } = await this.#attributes(known);
        this.#send(unique, attributesReply(attributes, valid));
        return;
      }
      case 'open': {
        const { node } = this.#known(header.node);
        if (node.kind !== 'file')
          throw new Refusal(node.kind === 'directory' ? Errno.EISDIR : Errno.EINVAL);
        if (request.writing) throw new Refusal(Errno.EROFS);
        return this.#openFile(unique, node);
      }
      case 'opendir': {
        const known = this.#known(header.node);
        if (known.node.kind !== 'directory') throw new Refusal(Errno.ENOTDIR);
        const handle = this.#nextHandle++;
        this.#directories.set(handle, {
          node: known,
          directory: known.node,
          listing: undefined,
          given: 0,
          waiting: undefined,
          turn: Promise.resolve(),
        });
        if (!this.#send(unique, openReply(handle, 0))) this.#directories.delete(handle);
        return;
      }
      case 'read':
        return this.#read(unique, request.handle, request.offset, request.length);
      case 'readdir':
      case 'readdirplus': {
        const directory = this.#directories.get(request.handle);
        if (directory === undefined) throw new Refusal(Errno.EBADF);
        const mine = directory.turn.then(() =>
          this.#readDirectory(
            unique,
            directory,
            request.offset,
            request.length,
            request.op === 'readdirplus',
          ),
        );
        directory.turn = mine.catch(() => undefined);
        return mine;
      }
      case 'release': {
        const file = this.#files.get(request.handle);
        this.#files.delete(request.handle);
        // Who closed it does not wait for this answer.
        this.#send(unique, undefined);
        await file?.close();
        return;
      }
      case 'releasedir': {
        const directory = this.#directories.get(request.handle);
        this.#directories.delete(request.handle);
        this.#send(unique, undefined);
        if (directory !== undefined) await this.#endListing(directory);
        return;
      }
      case 'lseek': {
        const file = this.#files.get(request.handle);
        if (file === undefined) throw new Refusal(Errno.EBADF);
        const what =
          request.whence === Whence.data
            ? 'data'
            : request.whence === Whence.hole
              ? 'hole'
              : undefined;
        if (what === undefined) throw new Refusal(Errno.EINVAL);
        if (request.offset >= file.sizeBytes) throw new Refusal(Errno.ENXIO);
        const found = await file.seek(request.offset, what);
        if (found === undefined) throw new Refusal(Errno.ENXIO);
        this.#send(unique, seekReply(found));
        return;
      }
      case 'readlink': {
        const { node } = this.#known(header.node);
        if (node.kind !== 'symlink' || node.readlink === undefined) throw new Refusal(Errno.EINVAL);
        this.#send(unique, await node.readlink());
        return;
      }
      case 'getxattr':
      case 'listxattr': {
        if (!this.#options.xattrs) throw new Refusal(Errno.ENOSYS);
        const { xattrs } = this.#known(header.node).node;
        const value =
          request.op === 'listxattr'
            ? ((await xattrs?.list()) ?? Buffer.alloc(0))
            : await xattrs?.get(request.name);
        if (value === undefined) throw new Refusal(Errno.ENODATA);
        if (request.size === 0) this.#send(unique, xattrSizeReply(value.length));
        else if (value.length > request.size) throw new Refusal(Errno.ERANGE);
        else this.#send(unique, value);
        return;
      }
      case 'statfs':
        this.#send(unique, statfsReply(await this.#options.totalBytes()));
        return;
      case 'nothing':
      case 'destroy':
        this.#send(unique, undefined);
        return;
      case 'interrupt':
        // Allowed to be ignored: the request that it means is answered as always.
        return;
      case 'refused':
        throw new Refusal(request.errno);
    }
  }

  #known(id: number): KnownNode {
    const known = this.#nodes.get(id);
    if (known === undefined) throw new Refusal(Errno.ESTALE);
    return known;
  }

  /** The node id of what a name stands for, counted as one lookup. */
  #remember(parent: KnownNode, name: string, node: TreeNode): KnownNode {
    // A directory has one place; a file may be reached by several, and is one file then, with one page cache.
    const mapKey = node.kind === 'directory' ? `${parent.id}/${name}/${node.key}` : node.key;
    let known = this.#ids.get(mapKey);
    if (known === undefined) {
      known = { id: this.#nextNode++, node, parent: parent.id, mapKey, lookups: 0 };
      this.#ids.set(mapKey, known);
      this.#nodes.set(known.id, known);
    }
    known.lookups++;
    return known;
  }

  #forget(id: number, count: number): void {
    const known = this.#nodes.get(id);
    if (known === undefined || id === ROOT_NODE) return;
    known.lookups -= count;
    if (known.lookups > 0) return;
    this.#nodes.delete(id);
    this.#ids.delete(known.mapKey);
  }

  async #attributes(
    known: KnownNode,
  ): Promise<{ readonly attributes: Attributes; readonly valid: number }> {
    const { uid, gid } = this.#options;
    const { node, id } = known;
    const common = { node: id, mtimeNs: node.mtimeNs, uid, gid };
    const own = await node.attributes?.();
    if (own !== undefined) {
      return { attributes: { ...own, node: id, kind: node.kind }, valid: ATTRIBUTES_VALID_MS };
    }
    if (node.kind === 'directory') {
      // Of the root of a file system they are known when somebody has looked into it.
      const valid = node.attributes === undefined ? ATTRIBUTES_VALID_MS : 0;
      return { attributes: this.#directoryAttributes(known, node), valid };
    }
    if (node.kind !== 'file') throw new Error('a node without attributes');
    const allocated = await node.allocatedBytes();
    const blocks = Math.ceil((allocated ?? node.sizeBytes) / 512);
    const attributes: Attributes = {
      ...common,
      kind: 'file',
      sizeBytes: node.sizeBytes,
      blocks,
      permissions: 0o400,
      links: 1,
    };
    return { attributes, valid: allocated === undefined ? 0 : ATTRIBUTES_VALID_MS };
  }

  #directoryAttributes(known: KnownNode, node: TreeDirectory): Attributes {
    const { uid, gid } = this.#options;
    return {
      node: known.id,
      kind: 'directory',
      sizeBytes: 0,
      blocks: 0,
      mtimeNs: node.mtimeNs,
      permissions: 0o500,
      links: 2,
      uid,
      gid,
    };
  }

  async #lookup(unique: bigint, parentId: number, name: string): Promise<void> {
    const parent = this.#known(parentId);
    if (parent.node.kind !== 'directory') throw new Refusal(Errno.ENOTDIR);
    const entry =
      Buffer.byteLength(name) > MAX_NAME_BYTES ? undefined : await parent.node.lookup(name);
    if (entry === undefined) throw new Refusal(Errno.ENOENT);
    const known = this.#remember(parent, name, entry.node);
    let isSent = false;
    try {
      const { attributes, valid } = await this.#attributes(known);
      isSent = this.#send(
        unique,
        entryReply(attributes, { entryMs: validityOf(entry), attributesMs: valid }),
      );
    } finally {
      if (!isSent) this.#forget(known.id, 1);
    }
  }

  async #openFile(unique: bigint, node: TreeFile): Promise<void> {
    const file = await node.open();
    const handle = this.#nextHandle++;
    this.#files.set(handle, file);
    if (this.#send(unique, openReply(handle, OPEN_KEEP_CACHE))) return;
    this.#files.delete(handle);
    await file.close();
  }

  async #read(unique: bigint, handle: number, offset: number, wanted: number): Promise<void> {
    const file = this.#files.get(handle);
    if (file === undefined) throw new Refusal(Errno.EBADF);
    const length = Math.max(0, Math.min(wanted, file.sizeBytes - offset));
    if (length === 0) {
      this.#send(unique, undefined);
      return;
    }
    if (this.#bytesInFlight + length > READ_BYTES_IN_FLIGHT || this.#waitingReads.length > 0) {
      await new Promise<void>((start) => this.#waitingReads.push({ bytes: length, start }));
    } else {
      this.#bytesInFlight += length;
    }
    try {
      const loan = await file.lend?.(offset, length);
      if (loan !== undefined) {
        this.#options.reply(replyHeader(unique, 0, length), ...loan.views);
        loan.release();
        return;
      }
      const data = this.#buffers.take(length);
      await file.read(data, offset);
      this.#send(unique, data);
      // Only here: after a failure somebody may still be filling it.
      this.#buffers.give(data);
    } finally {
      this.#bytesInFlight -= length;
      this.#startReads();
    }
  }

  #startReads(): void {
    for (;;) {
      const next = this.#waitingReads[0];
      if (next === undefined || this.#bytesInFlight + next.bytes > READ_BYTES_IN_FLIGHT) return;
      this.#waitingReads.shift();
      this.#bytesInFlight += next.bytes;
      next.start();
    }
  }

  async #endListing(directory: OpenDirectory): Promise<void> {
    await directory.turn;
    await directory.listing?.return(undefined);
    directory.listing = undefined;
    directory.waiting = undefined;
    directory.given = 0;
  }

  /** Offsets: 0 is `.`, 1 is `..`, 2 the first entry. */
  async #readDirectory(
    unique: bigint,
    open: OpenDirectory,
    offset: number,
    limit: number,
    plus: boolean,
  ): Promise<void> {
    const reply = new DirectoryReply(limit, plus);
    const counted: number[] = [];
    let isSent = false;
    try {
      let at = offset;
      for (const [i, name] of ['.', '..'].entries()) {
        const bytes = Buffer.from(name);
        if (at !== i || !reply.fits(bytes)) continue;
        reply.add(bytes, 'directory', i === 0 ? open.node.id : open.node.parent, ++at);
      }
      while (at >= 2) {
        const listed = await this.#entryAt(open, at - 2);
        if (listed === undefined) break;
        const bytes = encodeName(listed.name);
        if (!reply.fits(bytes)) {
          open.waiting = listed;
          open.given--;
          break;
        }
        at++;
        const { entry } = listed;
        if (!plus || entry === undefined || entry.node.kind !== 'directory') {
          // Some inode number has to be there, the true one is known only after a lookup: what libfuse says, too.
          reply.add(bytes, listed.kind, UNKNOWN_INODE, at);
          continue;
        }
        const known = this.#remember(open.node, listed.name, entry.node);
        counted.push(known.id);
        const valid: Validity = { entryMs: validityOf(entry), attributesMs: ATTRIBUTES_VALID_MS };
        const attributes = this.#directoryAttributes(known, entry.node);
        reply.add(bytes, listed.kind, known.id, at, { attributes, valid });
      }
      isSent = this.#send(unique, reply.finish());
    } finally {
      if (!isSent) for (const id of counted) this.#forget(id, 1);
    }
  }

  /** The entry with this number; listings go forward, and begin anew to go back. */
  async #entryAt(open: OpenDirectory, index: number): Promise<TreeListed | undefined> {
    if (open.listing === undefined || index < open.given) {
      await open.listing?.return(undefined);
      open.listing = open.directory.list();
      open.given = 0;
      open.waiting = undefined;
    }
    for (;;) {
      let listed = open.waiting;
      open.waiting = undefined;
      if (listed === undefined) {
        const next = await open.listing.next();
        if (next.done === true) return undefined;
        listed = next.value;
      }
      open.given++;
      if (open.given > index) return listed;
    }
  }
}

function validityOf(entry: TreeEntry): number {
  return entry.isVolatile ? 0 : NAME_VALID_MS;
}
