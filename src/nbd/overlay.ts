/**
 * A copy-on-write overlay: an image that can be written, the changes going to a file. Two kinds: one with a name, which
 * survives crashes of client, server and machine (overlay-format.ts has the layout and the crash protocol), and one
 * without, for as long as it is open.
 *
 * Who may run at once: reads take no lock (a read sees each block as it was before or after a write that goes on at
 * the same time); writes, zeros and trims hold the range of blocks that they touch, so that two of them that share a
 * block never lose each other's half; flushes are gathered into one commit at a time.
 */
import { constants } from 'node:fs';
import { open, unlink, type FileHandle } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { dirname, join, resolve } from 'node:path';

import { systemRandom, type Random } from '../clock.js';
import { B2Error, errnoOf, ioError, isKind } from '../errors.js';
import { fsyncDirectory, readFully, renameNoReplace, systemFileCalls, writeFully } from '../fs.js';
import type { Image, ImageExtent } from '../image.js';
import { punchHole, tryLock } from '../syscalls.js';
import {
  BLOCKS_PER_PAGE,
  BlockState,
  HEADER_BYTES,
  MAX_INTENT_PAGES,
  OVERLAY_BLOCK_BYTES,
  PAGE_STATE_BYTES,
  SLOT_BYTES,
  buildHeader,
  buildIntent,
  buildMapSlot,
  intentSlotOffset,
  mapSlotOffset,
  overlayLayout,
  parseHeader,
  parseIntent,
  parseMapSlot,
  type OverlayLayout,
} from './overlay-format.js';
import { RangeLock } from './range-lock.js';
import { checkRange, type WritableImage } from './writable.js';

/** Which point an overlay lies on. Over any other one its blocks would be garbage. */
export interface OverlayIdentity {
  /** Repository id, hexadecimal. */
  readonly repository: string;
  /** Volume id, hexadecimal. */
  readonly volume: string;
  /** Sequence number of the commit. */
  readonly seq: number;
  /** Hash of the commit, hexadecimal. */
  readonly hash: string;
  /** Of overlays that belong together, as disks of one machine: what they all say. Each is of use only with the others. */
  readonly set?: string | undefined;
}

/** The file under an overlay. Errors are B2Errors that name it. */
export interface OverlayFile {
  /** For messages. */
  readonly name: string;
  /** Fills `into`; the file is always long enough. */
  read(into: Uint8Array, offset: number): Promise<void>;
  write(data: Uint8Array, offset: number): Promise<void>;
  /** The range reads as zeros and gives its space back, or (where the file system cannot) nothing happens. */
  punch(offset: number, length: number): Promise<void>;
  /** Everything written is durable (fdatasync). */
  sync(): Promise<void>;
  close(): Promise<void>;
}

export interface OpenOverlayOptions {
  readonly path: string;
  /** The overlay closes it when it is closed, and also when opening fails. */
  readonly base: Image;
  readonly identity: OverlayIdentity;
  /** True: it must be there already (kind `not-found`). */
  readonly mustExist?: boolean;
  readonly random?: Random;
}

/**
 * Opens the overlay in the file `path`, or makes it (mode 0600, sparse) where there is none. Rejects with kind
 * `refused` if it belongs to another point or set or is no overlay, `held` if another process has it open, `damaged` if what
 * a flush promised is not there any more.
 */
export async function openOverlay(options: OpenOverlayOptions): Promise<WritableImage> {
  const { base, identity } = options;
  const path = resolve(options.path);
  const random = options.random ?? systemRandom;
  let handle: FileHandle | undefined;
  try {
    handle = await openIfExists(path);
    if (handle === undefined && options.mustExist === true)
      throw new B2Error('not-found', `the overlay ${path} is not there`);
    handle ??= await createOverlay(path, base.sizeBytes, identity, random);
    const stat = await handle.stat();
    if (!stat.isFile())
      throw new B2Error('refused', `${path} is not a regular file: an overlay must be one`);
    if (!tryLock(handle.fd)) {
      throw new B2Error('held', `the overlay ${path} is in use by another process`, {
        hint: 'Stop the other server first, or use another overlay file.',
      });
    }
    const header = Buffer.alloc(HEADER_BYTES);
    await readFully(systemFileCalls, handle.fd, header, 0);
    const id = checkHeader(path, header, stat.size, base.sizeBytes, identity);
    const overlay = new Overlay(base, new SystemOverlayFile(path, handle), id);
    await overlay.recover();
    return overlay;
  } catch (error) {
    await handle?.close();
    await base.close();
    throw ioError('open overlay', path, error);
  }
}

/** Makes the file of an overlay for an image of `sizeBytes`, durably, without opening it. Kind `exists` if something is there. */
export async function makeOverlay(
  path: string,
  sizeBytes: number,
  identity: OverlayIdentity,
  random: Random = systemRandom,
): Promise<void> {
  try {
    await (await createOverlay(path, sizeBytes, identity, random)).close();
  } catch (error) {
    throw ioError('make overlay', path, error);
  }
}

/**
 * An overlay in a file without a name in `directory` (default: that for temporary files). Its space is free when it is
 * closed or the process ends, however it ends. A flush does nothing: there is nothing to come back to.
 */
export async function openTemporaryOverlay(options: {
  readonly base: Image;
  readonly directory?: string;
  readonly random?: Random;
}): Promise<WritableImage> {
  const { base } = options;
  const directory = options.directory ?? tmpdir();
  const suffix = Buffer.from((options.random ?? systemRandom)(8)).toString('hex');
  const path = join(directory, `b2-overlay-${suffix}`);
  let handle: FileHandle | undefined;
  try {
    handle = await openNameless(directory, path);
    await handle.truncate(overlayLayout(base.sizeBytes).fileBytes);
    return new Overlay(base, new SystemOverlayFile(path, handle), undefined);
  } catch (error) {
    await handle?.close();
    await base.close();
    throw ioError('make temporary overlay in', directory, error);
  }
}

/** O_TMPFILE of open(2), whose number Node does not know; the same on all machines that Node runs on. */
const O_TMPFILE = 0o20000000 | constants.O_DIRECTORY;

/** Opens a new file that never has a name, or where the file system has no such files, one that loses the name `path` at once. */
async function openNameless(directory: string, path: string): Promise<FileHandle> {
  try {
    return await open(directory, O_TMPFILE | constants.O_RDWR, 0o600);
  } catch (error) {
    // Of a kernel, or a file system, that does not know it.
    if (!['EISDIR', 'EOPNOTSUPP', 'EINVAL'].includes(errnoOf(error) ?? '')) throw error;
  }
  const handle = await open(path, 'wx+', 0o600);
  try {
    await unlink(path);
  } catch (error) {
    await handle.close();
    throw error;
  }
  return handle;
}

/**
 * An overlay on any {@link OverlayFile} as long as {@link overlayLayout} says, all zeros when new. The header is the
 * caller's business, as is closing `base` and `file` when this rejects. `id` is 16 bytes.
 */
export async function openOverlayOn(
  base: Image,
  file: OverlayFile,
  id: Buffer,
): Promise<WritableImage> {
  const overlay = new Overlay(base, file, id);
  await overlay.recover();
  return overlay;
}

async function openIfExists(path: string): Promise<FileHandle | undefined> {
  try {
    // Without O_NONBLOCK a fifo would wait for a reader for ever.
    return await open(path, constants.O_RDWR | constants.O_NONBLOCK);
  } catch (error) {
    if (errnoOf(error) === 'ENOENT') return undefined;
    throw error;
  }
}

function identityText(identity: OverlayIdentity): string {
  const { repository, volume, seq, hash, set } = identity;
  return JSON.stringify({ repository, volume, seq, hash, set });
}

/** The file appears under its name whole: header durable, then renamed, then the directory durable. */
async function createOverlay(
  path: string,
  sizeBytes: number,
  identity: OverlayIdentity,
  random: Random,
): Promise<FileHandle> {
  const temporary = `${path}.${Buffer.from(random(6)).toString('hex')}.new`;
  const handle = await open(temporary, 'wx+', 0o600);
  try {
    await handle.truncate(overlayLayout(sizeBytes).fileBytes);
    const header = buildHeader({
      sizeBytes,
      id: Buffer.from(random(16)),
      identity: identityText(identity),
    });
    await writeFully(systemFileCalls, handle.fd, header, 0);
    await handle.sync();
    await renameNoReplace(temporary, path);
    await fsyncDirectory(dirname(path));
    return handle;
  } catch (error) {
    await handle.close();
    await unlink(temporary).catch(() => undefined);
    throw error;
  }
}

/** The overlay's id. */
function checkHeader(
  path: string,
  bytes: Buffer,
  fileBytes: number,
  sizeBytes: number,
  identity: OverlayIdentity,
): Buffer {
  const header = parseHeader(bytes);
  switch (header) {
    case 'foreign':
      throw new B2Error('refused', `${path} is not an overlay of b2; it is left as it is`, {
        hint: 'Name a file that does not exist yet.',
      });
    case 'newer':
      throw new B2Error('unsupported', `the overlay ${path} was made by a newer version of b2`);
    case 'damaged':
      throw damage(path, 0, 'the header fails its checksum');
    default:
  }
  const set = identityOf(header.identity)?.set;
  if (set !== identity.set) {
    throw new B2Error(
      'refused',
      identity.set === undefined
        ? `the overlay ${path} is one of several disks of a machine: written by itself it would not fit the others any more`
        : `the overlay ${path} does not belong to those of the other disks`,
      {
        hint:
          identity.set === undefined
            ? 'Start that machine again ("b2 boot --overlay" with the directory of them all), or name another file.'
            : 'Put back the one that does, or start over with a new name.',
      },
    );
  }
  if (header.identity !== identityText(identity) || header.sizeBytes !== sizeBytes) {
    throw new B2Error(
      'refused',
      `the overlay ${path} lies on another point: on ${pointText(header.identity, header.sizeBytes)}, ` +
        `not on ${pointText(identityText(identity), sizeBytes)}`,
      { hint: 'Serve the point that it was made for, or name a new overlay file.' },
    );
  }
  if (fileBytes < overlayLayout(sizeBytes).fileBytes)
    throw damage(path, fileBytes, 'the file ends here, too early');
  return header.id;
}

/** What the file says it is; undefined where that is no JSON. */
function identityOf(text: string): Partial<Record<keyof OverlayIdentity, unknown>> | undefined {
  try {
    return Object(JSON.parse(text)) as Partial<Record<keyof OverlayIdentity, unknown>>;
  } catch {
    return undefined;
  }
}

/** An identity for people, whatever the file says it is. */
function pointText(identity: string, sizeBytes: number): string {
  const found = identityOf(identity);
  if (found === undefined) return `"${identity}"`;
  const short = (id: unknown): string => String(id).slice(0, 8);
  return (
    `#${String(found.seq)} (hash ${short(found.hash)}) of volume ${short(found.volume)} ` +
    `in repository ${short(found.repository)}, ${sizeBytes} bytes`
  );
}

function damage(name: string, offset: number, problem: string): B2Error {
  return new B2Error('damaged', `overlay ${name}: at byte ${offset}: ${problem}`, {
    hint: 'What was written to it cannot be trusted any more; start over with a new overlay file.',
  });
}

class SystemOverlayFile implements OverlayFile {
  readonly name: string;
  readonly #handle: FileHandle;
  #canPunch = true;

  constructor(name: string, handle: FileHandle) {
    this.name = name;
    this.#handle = handle;
  }

  async read(into: Uint8Array, offset: number): Promise<void> {
    let got: number;
    try {
      got = await readFully(systemFileCalls, this.#handle.fd, into, offset);
    } catch (error) {
      throw ioError('read overlay', this.name, error);
    }
    if (got < into.length) throw damage(this.name, offset + got, 'the file ends here, too early');
  }

  async write(data: Uint8Array, offset: number): Promise<void> {
    try {
      await writeFully(systemFileCalls, this.#handle.fd, data, offset);
    } catch (error) {
      throw ioError('write overlay', this.name, error);
    }
  }

  async punch(offset: number, length: number): Promise<void> {
    if (!this.#canPunch) return;
    try {
      await punchHole(this.#handle.fd, offset, length);
    } catch (error) {
      if (!['ENOTSUP', 'EOPNOTSUPP', 'ENOSYS'].includes(errnoOf(error) ?? '')) {
        throw ioError('punch a hole into overlay', this.name, error);
      }
      this.#canPunch = false;
    }
  }

  async sync(): Promise<void> {
    try {
      await this.#handle.datasync();
    } catch (error) {
      throw ioError('sync overlay', this.name, error);
    }
  }

  async close(): Promise<void> {
    await this.#handle.close();
  }
}

/** A map page in memory. */
interface Page {
  readonly states: Uint8Array;
  /** 0: never written. */
  generation: bigint;
  /** The slot that holds `generation`; the other one is written next. */
  current: 0 | 1;
}

/** A run of blocks in one state. */
interface Run {
  readonly first: number;
  readonly blocks: number;
  readonly state: BlockState;
}

/** Writes of at most this much are joined with the rest of their first and last block into one call. */
const JOIN_BYTES = 64 * 1024;
/** Zeros are written in pieces of this size. */
const ZEROS = Buffer.alloc(1024 * 1024);
/** Pieces of one read that are under way at a time. */
const READ_PIECES = 16;

class Overlay implements WritableImage {
  readonly sizeBytes: number;
  readonly logicalBlockBytes: number;
  readonly #base: Image;
  readonly #file: OverlayFile;
  /** undefined: a temporary overlay, of which nothing but data is ever written. */
  readonly #id: Buffer | undefined;
  readonly #layout: OverlayLayout;
  readonly #pages = new Map<number, Page>();
  readonly #loading = new Map<number, Promise<Page>>();
  readonly #locks = new RangeLock();
  /** Pages whose states have changed since a commit took them. */
  readonly #dirty = new Set<number>();
  /** Pages that a commit began to write and could not finish: they must be in the next intent. */
  readonly #unfinished = new Set<number>();
  #unsynced = false;
  #intentSequence = 0n;
  #intentSlot: 0 | 1 = 1;
  /** Pages that the newest intent names: of these a slot may be torn. */
  #torn = new Set<number>();
  #running: Promise<void> = Promise.resolve();
  #queued: Promise<void> | undefined;
  /** The failure after which nothing can be promised any more. */
  #failed: B2Error | undefined;
  #closed = false;

  constructor(base: Image, file: OverlayFile, id: Buffer | undefined) {
    this.sizeBytes = base.sizeBytes;
    this.logicalBlockBytes = base.logicalBlockBytes;
    this.#base = base;
    this.#file = file;
    this.#id = id;
    this.#layout = overlayLayout(base.sizeBytes);
  }

  /** Reads the intents and repairs what a crash has torn. Before anything else; not for a temporary overlay. */
  async recover(): Promise<void> {
    const id = this.#id;
    if (id === undefined) return;
    let invalid = 0;
    for (const slot of [0, 1] as const) {
      const bytes = Buffer.alloc(SLOT_BYTES);
      await this.#file.read(bytes, intentSlotOffset(slot));
      const intent = parseIntent(bytes, id);
      if (intent === 'invalid') invalid++;
      if (typeof intent === 'string' || intent.sequence <= this.#intentSequence) continue;
      this.#intentSequence = intent.sequence;
      this.#intentSlot = slot;
      this.#torn = new Set(intent.pages);
    }
    if (invalid === 2)
      throw damage(this.#file.name, intentSlotOffset(0), 'both intents fail their checksums');
    for (const page of this.#torn) {
      if (page >= this.#layout.pages) {
        throw damage(
          this.#file.name,
          intentSlotOffset(this.#intentSlot),
          'the intent names a page that is not there',
        );
      }
      await this.#page(page);
    }
    await this.flush();
  }

  async read(into: Uint8Array, offset: number): Promise<void> {
    checkRange(this.sizeBytes, offset, into.length);
    this.#checkOpen();
    if (into.length === 0) return;
    const end = offset + into.length;
    const pieces: (() => Promise<void>)[] = [];
    for (const run of await this.#runs(offset, into.length)) {
      const from = Math.max(offset, run.first * OVERLAY_BLOCK_BYTES);
      const to = Math.min(end, (run.first + run.blocks) * OVERLAY_BLOCK_BYTES);
      const part = into.subarray(from - offset, to - offset);
      switch (run.state) {
        case BlockState.zero:
          part.fill(0);
          break;
        case BlockState.data:
          pieces.push(() => this.#file.read(part, this.#layout.dataOffset + from));
          break;
        case BlockState.base:
          pieces.push(() => this.#base.read(part, from));
          break;
      }
    }
    for (let i = 0; i < pieces.length; i += READ_PIECES) {
      await Promise.all(pieces.slice(i, i + READ_PIECES).map((piece) => piece()));
    }
  }

  async extents(offset: number, length: number, limit = Infinity): Promise<readonly ImageExtent[]> {
    checkRange(this.sizeBytes, offset, length);
    if (length === 0) return [];
    const end = offset + length;
    const out: { offset: number; length: number; hole: boolean }[] = [];
    const add = (from: number, bytes: number, hole: boolean): void => {
      const last = out.at(-1);
      if (last !== undefined && last.hole === hole) last.length += bytes;
      else out.push({ offset: from, length: bytes, hole });
    };
    for (const run of await this.#runs(offset, length)) {
      const from = Math.max(offset, run.first * OVERLAY_BLOCK_BYTES);
      const to = Math.min(end, (run.first + run.blocks) * OVERLAY_BLOCK_BYTES);
      if (run.state !== BlockState.base) {
        add(from, to - from, run.state === BlockState.zero);
      } else {
        let at = from;
        while (at < to && out.length <= limit) {
          const extents = await this.#base.extents(
            at,
            to - at,
            Number.isFinite(limit) ? limit + 1 : undefined,
          );
          for (const extent of extents) add(extent.offset, extent.length, extent.hole);
          const last = extents.at(-1);
          if (last === undefined)
            throw new Error('an image returned no extents for a range that is not empty');
          at = last.offset + last.length;
        }
      }
      // One more than asked for: only then is it sure where the last one ends.
      if (out.length > limit) break;
    }
    return out.slice(0, limit);
  }

  async write(data: Uint8Array, offset: number): Promise<void> {
    checkRange(this.sizeBytes, offset, data.length);
    if (data.length === 0) return;
    const { first, last } = blocksOfRange(offset, data.length);
    this.#checkOpen();
    await this.#locks.run(first, last, () => this.#writeLocked(data, offset));
  }

  async zero(offset: number, length: number, allocate: boolean): Promise<void> {
    checkRange(this.sizeBytes, offset, length);
    this.#checkOpen();
    if (length === 0) return;
    if (allocate) {
      for (let at = 0; at < length; at += ZEROS.length) {
        await this.write(ZEROS.subarray(0, Math.min(ZEROS.length, length - at)), offset + at);
      }
      return;
    }
    const { first, last } = blocksOfRange(offset, length);
    await this.#locks.run(first, last, async () => {
      const whole = this.#wholeBlocks(offset, length);
      const from = whole === undefined ? offset + length : whole.first * OVERLAY_BLOCK_BYTES;
      if (from > offset) await this.#writeLocked(ZEROS.subarray(0, from - offset), offset);
      if (whole === undefined) return;
      const to = (whole.last + 1) * OVERLAY_BLOCK_BYTES;
      if (to < offset + length)
        await this.#writeLocked(ZEROS.subarray(0, offset + length - to), to);
      await this.#discardLocked(whole.first, whole.last);
    });
  }

  async trim(offset: number, length: number): Promise<void> {
    checkRange(this.sizeBytes, offset, length);
    const whole = length === 0 ? undefined : this.#wholeBlocks(offset, length);
    if (whole === undefined) return;
    this.#checkOpen();
    await this.#locks.run(whole.first, whole.last, () =>
      this.#discardLocked(whole.first, whole.last),
    );
  }

  flush(): Promise<void> {
    if (this.#id === undefined) return Promise.resolve();
    // A commit that has not begun yet covers everything that resolved before this call.
    if (this.#queued !== undefined) return this.#queued;
    const queued = this.#running
      .catch(() => undefined)
      .then(() => {
        this.#queued = undefined;
        this.#running = this.#commit();
        return this.#running;
      });
    this.#queued = queued;
    return queued;
  }

  async close(): Promise<void> {
    if (this.#closed) return;
    this.#closed = true;
    try {
      await this.#locks.idle();
      await this.flush();
      // Says that no slot is torn: from now on one that fails its checksum is damage.
      if (this.#torn.size > 0) {
        await this.#writeIntent([]);
        await this.#sync();
      }
    } finally {
      await this.#file.close();
      await this.#base.close();
    }
  }

  // ---- blocks -------------------------------------------------------------------------------------------------

  /** The blocks that lie wholly within the range; the image's last one may be short. */
  #wholeBlocks(offset: number, length: number): { first: number; last: number } | undefined {
    const end = offset + length;
    const first = Math.ceil(offset / OVERLAY_BLOCK_BYTES);
    const past =
      end === this.sizeBytes ? this.#layout.blocks : Math.floor(end / OVERLAY_BLOCK_BYTES);
    return past > first ? { first, last: past - 1 } : undefined;
  }

  async #writeLocked(data: Uint8Array, offset: number): Promise<void> {
    this.#checkUsable();
    const end = offset + data.length;
    const { first, last } = blocksOfRange(offset, data.length);
    const before = await this.#missing(first, offset, end);
    const after = last === first ? before : await this.#missing(last, offset, end);
    const head =
      before?.subarray(0, Math.max(0, offset - first * OVERLAY_BLOCK_BYTES)) ??
      ZEROS.subarray(0, 0);
    const tail = after?.subarray(end - last * OVERLAY_BLOCK_BYTES) ?? ZEROS.subarray(0, 0);
    const at = this.#layout.dataOffset + offset - head.length;
    this.#unsynced = true;
    if (head.length + tail.length > 0 && data.length <= JOIN_BYTES) {
      await this.#file.write(Buffer.concat([head, data, tail]), at);
    } else {
      if (head.length > 0) await this.#file.write(head, at);
      await this.#file.write(data, at + head.length);
      if (tail.length > 0) await this.#file.write(tail, at + head.length + data.length);
    }
    // Set again: a commit may have cleared it while the write was under way.
    this.#unsynced = true;
    await this.#setStates(first, last, BlockState.data);
  }

  /**
   * The whole of `block` as it reads now (with zeros behind the image's end), if [offset, end) covers it in part and
   * its data is not here yet, so that the write must bring the rest along.
   */
  async #missing(block: number, offset: number, end: number): Promise<Buffer | undefined> {
    const from = block * OVERLAY_BLOCK_BYTES;
    const to = from + OVERLAY_BLOCK_BYTES;
    if (offset <= from && end >= to) return undefined;
    const state = await this.#state(block);
    if (state === BlockState.data) return undefined;
    const content = Buffer.alloc(OVERLAY_BLOCK_BYTES);
    const covered = offset <= from && end >= this.sizeBytes;
    if (state === BlockState.base && !covered) {
      await this.#base.read(content.subarray(0, Math.min(to, this.sizeBytes) - from), from);
    }
    return content;
  }

  /** Blocks read as zeros afterwards and what was stored of them is given back. */
  async #discardLocked(first: number, last: number): Promise<void> {
    this.#checkUsable();
    const offset = first * OVERLAY_BLOCK_BYTES;
    const runs = await this.#runs(offset, (last + 1) * OVERLAY_BLOCK_BYTES - offset);
    await this.#setStates(first, last, BlockState.zero);
    for (const run of runs) {
      if (run.state !== BlockState.data) continue;
      await this.#file.punch(
        this.#layout.dataOffset + run.first * OVERLAY_BLOCK_BYTES,
        run.blocks * OVERLAY_BLOCK_BYTES,
      );
    }
  }

  #checkOpen(): void {
    if (this.#closed) throw new Error(`overlay ${this.#file.name} is used after it was closed`);
  }

  #checkUsable(): void {
    if (this.#failed !== undefined) throw this.#failed;
  }

  // ---- states -------------------------------------------------------------------------------------------------

  async #state(block: number): Promise<BlockState> {
    const index = Math.floor(block / BLOCKS_PER_PAGE);
    const page = this.#pages.get(index) ?? (await this.#page(index));
    return stateIn(page.states, block - index * BLOCKS_PER_PAGE);
  }

  /** The states of the blocks that touch a range, as runs, in order. A run does not cross pages. */
  async #runs(offset: number, length: number): Promise<Run[]> {
    const { first, last } = blocksOfRange(offset, length);
    const runs: Run[] = [];
    for (let at = first; at <= last;) {
      const index = Math.floor(at / BLOCKS_PER_PAGE);
      const page = this.#pages.get(index) ?? (await this.#page(index));
      const start = index * BLOCKS_PER_PAGE;
      const past = Math.min(last + 1, start + BLOCKS_PER_PAGE);
      while (at < past) {
        const state = stateIn(page.states, at - start);
        let to = at + 1;
        while (to < past) {
          const within = to - start;
          // Four blocks at a time where they share a byte.
          if (within % 4 === 0 && to + 4 <= past && page.states[within / 4] === state * 0x55)
            to += 4;
          else if (stateIn(page.states, within) === state) to++;
          else break;
        }
        runs.push({ first: at, blocks: to - at, state });
        at = to;
      }
    }
    return runs;
  }

  async #setStates(first: number, last: number, state: BlockState): Promise<void> {
    for (let at = first; at <= last;) {
      const index = Math.floor(at / BLOCKS_PER_PAGE);
      if (!this.#pages.has(index)) await this.#page(index);
      const page = this.#ownPage(index);
      const start = index * BLOCKS_PER_PAGE;
      const past = Math.min(last + 1, start + BLOCKS_PER_PAGE);
      if (fillStates(page.states, at - start, past - start, state)) this.#dirty.add(index);
      at = past;
    }
  }

  #page(index: number): Promise<Page> {
    const loaded = this.#pages.get(index);
    if (loaded !== undefined) return Promise.resolve(loaded);
    let loading = this.#loading.get(index);
    if (loading === undefined) {
      loading = this.#load(index).finally(() => this.#loading.delete(index));
      this.#loading.set(index, loading);
    }
    return loading;
  }

  /** A loaded page, to be changed. */
  #ownPage(index: number): Page {
    let page = this.#pages.get(index) ?? UNTOUCHED;
    if (page === UNTOUCHED) this.#pages.set(index, (page = emptyPage()));
    return page;
  }

  async #load(index: number): Promise<Page> {
    const page = this.#id === undefined ? UNTOUCHED : await this.#readPage(index, this.#id);
    this.#pages.set(index, page);
    return page;
  }

  async #readPage(index: number, id: Buffer): Promise<Page> {
    const offset = mapSlotOffset(index, 0);
    const bytes = Buffer.alloc(2 * SLOT_BYTES);
    await this.#file.read(bytes, offset);
    const a = parseMapSlot(bytes.subarray(0, SLOT_BYTES), id, index);
    const b = parseMapSlot(bytes.subarray(SLOT_BYTES), id, index);
    if (a === 'empty' && b === 'empty') return UNTOUCHED;
    if (a === 'invalid' || b === 'invalid') {
      if (!this.#torn.has(index) || a === b)
        throw damage(this.#file.name, offset, 'a map page fails its checksum');
      // Written again with the next commit: recover() makes one before anything else.
      this.#dirty.add(index);
      const current = a === 'invalid' ? 1 : 0;
      const whole = a === 'invalid' ? b : a;
      if (typeof whole === 'string') return { ...emptyPage(), current };
      return { states: whole.states, generation: whole.generation, current };
    }
    const generationA = a === 'empty' ? 0n : a.generation;
    const generationB = b === 'empty' ? 0n : b.generation;
    const newer = generationA > generationB ? a : b;
    const step = generationA > generationB ? generationA - generationB : generationB - generationA;
    if (step !== 1n || newer === 'empty') {
      throw damage(
        this.#file.name,
        offset,
        'the generations of a map page do not follow each other',
      );
    }
    return { states: newer.states, generation: newer.generation, current: newer === a ? 0 : 1 };
  }

  // ---- durability ---------------------------------------------------------------------------------------------

  async #commit(): Promise<void> {
    this.#checkUsable();
    // Only those: who writes on and on makes new ones all the time, and a flush must end.
    const due = [...new Set([...this.#unfinished, ...this.#dirty])];
    if (due.length === 0 && this.#unsynced) await this.#sync();
    for (let at = 0; at < due.length; at += MAX_INTENT_PAGES)
      await this.#commitPages(due.slice(at, at + MAX_INTENT_PAGES));
  }

  async #commitPages(pages: readonly number[]): Promise<void> {
    // As they are now: what changes from here on is for the next commit.
    const writes = pages.map((index) => this.#takePage(index));
    try {
      await this.#writeIntent(pages);
      await this.#sync();
      for (const { index, slot, bytes } of writes)
        await this.#file.write(bytes, mapSlotOffset(index, slot));
      await this.#sync();
    } catch (error) {
      for (const index of pages) this.#unfinished.add(index);
      throw error;
    }
    for (const { index, page, slot } of writes) {
      page.current = slot;
      page.generation++;
      this.#unfinished.delete(index);
    }
  }

  #takePage(index: number): { index: number; page: Page; slot: 0 | 1; bytes: Buffer } {
    const page = this.#pages.get(index);
    if (page === undefined || this.#id === undefined)
      throw new Error(`map page ${index} is not loaded`);
    this.#dirty.delete(index);
    return {
      index,
      page,
      slot: page.current === 0 ? 1 : 0,
      bytes: buildMapSlot(this.#id, index, page.generation + 1n, page.states),
    };
  }

  async #writeIntent(pages: readonly number[]): Promise<void> {
    if (this.#id === undefined) throw new Error('a temporary overlay has no intents');
    const slot = this.#intentSlot === 0 ? 1 : 0;
    const sequence = this.#intentSequence + 1n;
    this.#unsynced = true;
    await this.#file.write(buildIntent(this.#id, { sequence, pages }), intentSlotOffset(slot));
    this.#intentSlot = slot;
    this.#intentSequence = sequence;
    this.#torn = new Set(pages);
  }

  async #sync(): Promise<void> {
    this.#unsynced = false;
    try {
      await this.#file.sync();
    } catch (error) {
      const reason = isKind(error, 'io', 'no-space')
        ? error
        : ioError('sync overlay', this.#file.name, error);
      this.#failed = new B2Error('io', `${reason.message}; the overlay takes no more writes`, {
        cause: error,
        hint: 'Writes since the last flush may be lost. Find out what is wrong with that disk, then open it again.',
      });
      throw this.#failed;
    }
  }
}

function emptyPage(): Page {
  return { states: new Uint8Array(PAGE_STATE_BYTES), generation: 0n, current: 1 };
}

/**
 * Stands for every page that was never written: of a large device whose metadata are read (fsck) that is nearly all of them, and each
 * would take 4 KiB of memory. Never changed.
 */
const UNTOUCHED = emptyPage();

function blocksOfRange(offset: number, length: number): { first: number; last: number } {
  return {
    first: Math.floor(offset / OVERLAY_BLOCK_BYTES),
    last: Math.floor((offset + length - 1) / OVERLAY_BLOCK_BYTES),
  };
}

function stateIn(states: Uint8Array, block: number): BlockState {
  const bits = ((states[block >> 2] ?? 0) >> ((block & 3) * 2)) & 3;
  // Pages with any other pair of bits are refused when they are read.
  return bits === 1 ? BlockState.data : bits === 2 ? BlockState.zero : BlockState.base;
}

/** Sets blocks [from, to); true if anything changed. */
function fillStates(states: Uint8Array, from: number, to: number, state: BlockState): boolean {
  let changed = false;
  for (let block = from; block < to;) {
    const index = block >> 2;
    const old = states[index] ?? 0;
    let now: number;
    if ((block & 3) === 0 && block + 4 <= to) {
      now = state * 0x55;
      block += 4;
    } else {
      const shift = (block & 3) * 2;
      now = (old & ~(3 << shift)) | (state << shift);
      block++;
    }
    if (now !== old) {
      states[index] = now;
      changed = true;
    }
  }
  return changed;
}
