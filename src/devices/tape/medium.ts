/** What a stand-in keeps the records and marks of its cartridge in: a directory, or one file. */
import { constants, writev } from 'node:fs';

import { errnoOf } from '../../errors.js';
import { readFully, systemFileCalls, writeFully } from '../../fs.js';
import { DIRECT_ALIGN_BYTES, alignedMemory, isPageAligned } from '../../memory.js';
import { roundDown, roundUp } from '../../units.js';
import { closeFd, openFd } from '../raw-io.js';

export interface FileOnTape {
  readonly bytes: number;
  /** A mark follows. */
  readonly closed: boolean;
}

/** Only the last file may be open, which is without a mark behind it. Rejects with system errors, or B2Errors that name the medium. */
export interface Medium {
  /** What the mark takes of the size. */
  readonly markBytes: number;
  /** Length of the records. */
  readonly recordBytes: number;
  readonly files: readonly FileOnTape[];
  isProtected(): Promise<boolean>;
  /** Bytes that its file system has left for it. */
  freeBytes(): Promise<number>;
  /** Reads from `offset` of `file` until `into` is full or the file ends; resolves to the bytes read. */
  read(file: number, into: Buffer, offset: number): Promise<number>;
  /**
   * Makes `offset` of `file`, which is there or comes next, the end of data, and that file the open one. At the very beginning, records are of
   * `recordBytes` from now on.
   */
  cut(file: number, offset: number, recordBytes: number): Promise<void>;
  /** Adds `parts` to the open file. Rejects with ENOSPC where there is no room; how much was added is then not known until {@link cut} says so. */
  append(parts: readonly Buffer[]): Promise<void>;
  /** Closes the open file with a mark, and makes everything durable. */
  mark(): Promise<void>;
  /** Removes file `file` and those behind it, durably. */
  drop(file: number): Promise<void>;
  close(): Promise<void>;
}

/** Bytes of all parts together. */
export function lengthOf(parts: readonly Buffer[]): number {
  return parts.reduce((sum, part) => sum + part.length, 0);
}

/** Parts are no smaller: each is a system call and a wake-up. */
const PART_STEP_BYTES = 1024 * 1024;
/** Direct writes under way at a time: a disk is not idle while the next one is on its way. */
const WRITES = 2;

/** Writes all of `data`, in a few large parts at once. None is under way any more when it settles. System errors. */
async function writeInParts(fd: number, data: Buffer, position: number): Promise<void> {
  const bytes = roundUp(Math.ceil(data.length / WRITES), PART_STEP_BYTES);
  const parts: Promise<void>[] = [];
  for (let at = 0; at < data.length; at += bytes)
    parts.push(writeFully(systemFileCalls, fd, data.subarray(at, at + bytes), position + at));
  for (const done of await Promise.allSettled(parts))
    if (done.status === 'rejected') throw done.reason;
}

/** Writes all of `parts`, one behind the other. System errors. */
async function writeTogether(
  fd: number,
  parts: readonly Buffer[],
  position: number,
): Promise<void> {
  const bytes = await new Promise<number>((resolve, reject) => {
    writev(fd, parts, position, (error, written) =>
      error === null ? resolve(written) : reject(error),
    );
  });
  let at = 0;
  for (const part of parts) {
    const missing = Math.min(part.length, at + part.length - bytes);
    if (missing > 0) {
      const from = part.length - missing;
      await writeFully(systemFileCalls, fd, part.subarray(from), position + at + from);
    }
    at += part.length;
  }
}

const MAX_SPARE = 2;
/** Bytes read ahead at once. */
const AHEAD_BYTES = 4 * 1024 * 1024;

// Memory of this kind is freed late: what one file does not need any more serves the next one.
const spare: (readonly [Buffer, Buffer])[] = [];

function takeSlots(): readonly [Buffer, Buffer] {
  const found = spare.pop();
  if (found !== undefined) return found;
  const { buffer } = alignedMemory(2 * AHEAD_BYTES);
  return [Buffer.from(buffer, 0, AHEAD_BYTES), Buffer.from(buffer, AHEAD_BYTES, AHEAD_BYTES)];
}

/** A part of a file in memory, or on its way there; fewer than {@link AHEAD_BYTES} reach the end of the file. */
interface Piece {
  readonly from: number;
  readonly slot: 0 | 1;
  readonly bytes: number;
}

/** Reads a file that does not change meanwhile from some place on, by direct I/O in large pieces, one ahead. One call at a time; `close` it. */
class ReadAhead {
  readonly #fd: number;
  readonly #slots = takeSlots();
  #have: Piece | undefined;
  #coming: { readonly from: number; readonly piece: Promise<Piece> } | undefined;

  constructor(fd: number) {
    this.#fd = fd;
  }

  /** Resolves to the bytes read: fewer than asked for at the end of the file only. System errors. */
  async read(into: Buffer, position: number): Promise<number> {
    let done = 0;
    while (done < into.length) {
      const at = position + done;
      let have = this.#have;
      if (have === undefined || at < have.from || at >= have.from + AHEAD_BYTES)
        have = await this.#load(roundDown(at, DIRECT_ALIGN_BYTES));
      const n = this.#slots[have.slot].copy(
        into,
        done,
        at - have.from,
        Math.max(at - have.from, have.bytes),
      );
      if (n === 0) break;
      done += n;
    }
    return done;
  }

  async #load(from: number): Promise<Piece> {
    const slot = this.#have?.slot === 0 ? 1 : 0;
    if (this.#coming?.from !== from) {
      await this.#settle();
      this.#start(from, slot);
    }
    const piece = await this.#coming?.piece;
    this.#coming = undefined;
    if (piece === undefined) throw new Error('nothing is being read');
    this.#have = piece;
    if (piece.bytes === AHEAD_BYTES) this.#start(from + AHEAD_BYTES, piece.slot === 0 ? 1 : 0);
    return piece;
  }

  #start(from: number, slot: 0 | 1): void {
    const piece = this.#piece(from, slot);
    piece.catch(() => undefined); // seen when it is awaited
    this.#coming = { from, piece };
  }

  async #piece(from: number, slot: 0 | 1): Promise<Piece> {
    let bytes = 0;
    while (bytes < AHEAD_BYTES) {
      const n = await systemFileCalls.read(
        this.#fd,
        this.#slots[slot].subarray(bytes),
        from + bytes,
      );
      bytes += n;
      // The end of a file needs no alignment, and nothing else lacks it.
      if (n === 0 || bytes % DIRECT_ALIGN_BYTES !== 0) break;
    }
    return { from, slot, bytes };
  }

  async #settle(): Promise<void> {
    await this.#coming?.piece.catch(() => undefined);
    this.#coming = undefined;
  }

  async close(): Promise<void> {
    await this.#settle();
    this.#have = undefined;
    if (spare.length < MAX_SPARE) spare.push(this.#slots);
  }
}

const { O_CREAT, O_DIRECT, O_NOFOLLOW, O_RDONLY, O_RDWR } = constants;

/**
 * A file that is read and written in large pieces: around the page cache where memory and file system allow it, because what goes to
 * a cartridge is not read again soon, and what is read back should come from the disk.
 */
export class StandInFile {
  readonly fd: number;
  /** Undefined where the file system has no such thing. */
  #directFd: number | undefined;
  #ahead: ReadAhead | undefined;
  /** Where the last read ended; undefined: none since the last write. */
  #readTo: number | undefined;

  private constructor(fd: number) {
    this.fd = fd;
  }

  /** System errors. `create`: makes it (mode 0600) where it is not there. */
  static async open(path: string, writing: boolean, create = writing): Promise<StandInFile> {
    const flags = (writing ? O_RDWR : O_RDONLY) | O_NOFOLLOW;
    const file = new StandInFile(await openFd(path, create ? flags | O_CREAT : flags));
    try {
      file.#directFd = await openFd(path, flags | O_DIRECT);
    } catch (error) {
      if (errnoOf(error) !== 'EINVAL') {
        await closeFd(file.fd);
        throw error;
      }
    }
    return file;
  }

  async read(into: Buffer, position: number): Promise<number> {
    const isNext = position === this.#readTo;
    this.#readTo = position + into.length;
    if (isNext && this.#directFd !== undefined) {
      this.#ahead ??= new ReadAhead(this.#directFd);
      try {
        return await this.#ahead.read(into, position);
      } catch {
        // One place that cannot be read must not cost its neighbours: this one by itself, which says what is wrong.
        await this.#stopReading();
      }
    }
    return readFully(systemFileCalls, this.fd, into, position);
  }

  /** Forgets what was read ahead. */
  async #stopReading(): Promise<void> {
    this.#readTo = undefined;
    await this.#ahead?.close();
    this.#ahead = undefined;
  }

  /** Writes `parts`, one behind the other. System errors; what of it has arrived is then not known. */
  async write(parts: readonly Buffer[], position: number): Promise<void> {
    if (this.#readTo !== undefined) await this.#stopReading();
    const [first] = parts;
    if (first === undefined) return;
    if (
      this.#directFd !== undefined &&
      position % DIRECT_ALIGN_BYTES === 0 &&
      parts.every((part) => isPageAligned(part) && part.length % DIRECT_ALIGN_BYTES === 0)
    ) {
      try {
        if (parts.length === 1) await writeInParts(this.#directFd, first, position);
        else await writeTogether(this.#directFd, parts, position);
        return;
      } catch (error) {
        if (errnoOf(error) !== 'EINVAL') throw error;
        // Opened, and then refused: some file systems find out only now.
        await closeFd(this.#directFd);
        this.#directFd = undefined;
      }
    }
    let at = position;
    for (const part of parts) {
      await writeFully(systemFileCalls, this.fd, part, at);
      at += part.length;
    }
  }

  async sync(): Promise<void> {
    await systemFileCalls.fdatasync(this.fd);
  }

  async close(): Promise<void> {
    await this.#stopReading();
    if (this.#directFd !== undefined) await closeFd(this.#directFd);
    await closeFd(this.fd);
  }
}
