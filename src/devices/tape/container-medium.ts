/**
 * A cartridge in one file (FORMAT.md 11.6): the records of each file of the tape one after the other, and behind them a mark, which says where its file
 * begins. An empty file is a blank cartridge; one that b2 has not written holds something foreign. Without write permission it is protected.
 */
import { constants } from 'node:fs';
import { access, statfs, truncate } from 'node:fs/promises';
import { dirname } from 'node:path';

import { systemRandom } from '../../clock.js';
import { B2Error } from '../../errors.js';
import { DEFAULT_RECORD_BYTES } from '../../format/tape.js';
import {
  CONTAINER_BLOCK_BYTES,
  decodeContainerHeader,
  decodeContainerMark,
  encodeContainerHeader,
  encodeContainerMark,
  type ContainerHeader,
} from '../../format/tape-container.js';
import { fsyncDirectory, systemFileCalls } from '../../fs.js';
import { roundDown, roundUp } from '../../units.js';
import { StandInFile, lengthOf, type FileOnTape, type Medium } from './medium.js';

const SCAN_BYTES = 4 * 1024 * 1024;

/** A file of the tape; it ends where the next one's mark stands, or with the container. */
interface Part extends FileOnTape {
  readonly from: number;
}

/** See the file comment. */
export class ContainerMedium implements Medium {
  readonly markBytes = CONTAINER_BLOCK_BYTES;
  readonly #path: string;
  /** Undefined for a blank one, and for what is not of b2. */
  #header: ContainerHeader | undefined;
  #files: Part[];
  #handle: { readonly file: StandInFile; readonly writing: boolean } | undefined;

  private constructor(path: string, header: ContainerHeader | undefined, files: Part[]) {
    this.#path = path;
    this.#header = header;
    this.#files = files;
  }

  static async open(path: string): Promise<ContainerMedium> {
    const file = await StandInFile.open(path, false);
    try {
      const { header, files } = await contentsOf(file);
      return new ContainerMedium(path, header, files);
    } finally {
      await file.close();
    }
  }

  get recordBytes(): number {
    return this.#header?.recordBytes ?? DEFAULT_RECORD_BYTES;
  }

  get files(): readonly FileOnTape[] {
    return this.#files;
  }

  async isProtected(): Promise<boolean> {
    try {
      await access(this.#path, constants.W_OK);
      return false;
    } catch {
      return true;
    }
  }

  async freeBytes(): Promise<number> {
    const { bavail, bsize } = await statfs(this.#path);
    return bavail * bsize;
  }

  async read(file: number, into: Buffer, offset: number): Promise<number> {
    const part = this.#files[file];
    if (part === undefined) return 0;
    const wanted = into.subarray(0, Math.max(0, Math.min(into.length, part.bytes - offset)));
    return (await this.#open(false)).read(wanted, part.from + offset);
  }

  async cut(file: number, offset: number, recordBytes: number): Promise<void> {
    if (file === 0 && offset === 0) {
      const header = { id: Buffer.from(systemRandom(16)).toString('hex'), recordBytes };
      await this.#shorten(0);
      const handle = await this.#open(true);
      await handle.write([encodeContainerHeader(header)], 0);
      await handle.sync();
      await fsyncDirectory(dirname(this.#path));
      this.#header = header;
      this.#files = [{ from: CONTAINER_BLOCK_BYTES, bytes: 0, closed: false }];
      return;
    }
    this.#requireOwn();
    const there = this.#files[file];
    const before = this.#files[file - 1];
    const from = there?.from ?? (before === undefined ? 0 : endOf(before));
    // A record that was torn off is filled up: what comes next begins on a border.
    const bytes = roundUp(offset, CONTAINER_BLOCK_BYTES);
    this.#files = this.#files.slice(0, file);
    await this.#shorten(from + bytes);
    this.#files.push({ from, bytes, closed: false });
  }

  async append(parts: readonly Buffer[]): Promise<void> {
    this.#requireOwn();
    const { at, part } = this.#last();
    await (await this.#open(true)).write(parts, part.from + part.bytes);
    this.#files[at] = { ...part, bytes: part.bytes + lengthOf(parts) };
  }

  async mark(): Promise<void> {
    const header = this.#requireOwn();
    const { at, part } = this.#last();
    const handle = await this.#open(true);
    const end = part.from + part.bytes;
    // Records first: a mark says that they are there.
    await handle.sync();
    await handle.write([encodeContainerMark({ ...header, file: at, from: part.from }, end)], end);
    await handle.sync();
    this.#files[at] = { ...part, closed: true };
  }

  async drop(file: number): Promise<void> {
    const first = this.#files[file];
    if (first === undefined) return;
    this.#files = this.#files.slice(0, file);
    await this.#shorten(first.from);
    await (await this.#open(true)).sync();
  }

  async close(): Promise<void> {
    const handle = this.#handle?.file;
    this.#handle = undefined;
    await handle?.close();
  }

  /** Kind `refused` for a file that b2 has not written: nothing is added to it. */
  #requireOwn(): ContainerHeader {
    if (this.#header !== undefined) return this.#header;
    throw new B2Error('refused', `${this.#path} holds something that is not a cartridge of b2`, {
      hint: 'It can only be written from its beginning, with --force.',
    });
  }

  #last(): { readonly at: number; readonly part: Part } {
    const at = this.#files.length - 1;
    const part = this.#files[at];
    if (part === undefined) throw new Error('no file of the tape is open');
    return { at, part };
  }

  async #shorten(bytes: number): Promise<void> {
    await truncate(this.#path, bytes);
  }

  async #open(writing: boolean): Promise<StandInFile> {
    const open = this.#handle;
    if (open !== undefined && (open.writing || !writing)) return open.file;
    await this.close();
    const file = await StandInFile.open(this.#path, writing, false);
    this.#handle = { file, writing };
    return file;
  }
}

/** Where what follows a file with its mark begins. */
function endOf(part: Part): number {
  return part.from + part.bytes + CONTAINER_BLOCK_BYTES;
}

async function contentsOf(
  file: StandInFile,
): Promise<{ header: ContainerHeader | undefined; files: Part[] }> {
  const size = Number((await systemFileCalls.fstat(file.fd)).size);
  if (size === 0) return { header: undefined, files: [] };
  const block = async (at: number): Promise<Buffer> => {
    const b = Buffer.alloc(CONTAINER_BLOCK_BYTES);
    return b.subarray(0, await file.read(b, at));
  };
  const last = roundDown(size, CONTAINER_BLOCK_BYTES) - CONTAINER_BLOCK_BYTES;
  // Where the header is damaged a mark at the very end tells the same.
  const header =
    decodeContainerHeader(await block(0)) ??
    (last > 0 ? decodeContainerMark(await block(last), last) : undefined);
  if (header === undefined)
    return { header: undefined, files: [{ from: 0, bytes: size, closed: false }] };
  const isMark = (b: Buffer, at: number): ReturnType<typeof decodeContainerMark> => {
    const mark = decodeContainerMark(b, at);
    return mark?.id === header.id ? mark : undefined;
  };
  /** Marks in [from, to): all of them, or the last one. */
  const scan = async (from: number, to: number): Promise<number[]> => {
    const found: number[] = [];
    const piece = Buffer.allocUnsafe(SCAN_BYTES);
    for (let at = from; at < to; at += SCAN_BYTES) {
      const got = await file.read(piece.subarray(0, Math.min(SCAN_BYTES, to - at)), at);
      for (let i = 0; i + CONTAINER_BLOCK_BYTES <= got; i += CONTAINER_BLOCK_BYTES)
        if (isMark(piece.subarray(i, i + CONTAINER_BLOCK_BYTES), at + i) !== undefined)
          found.push(at + i);
    }
    return found;
  };
  // From the last mark back along the chain; the last file may be without one.
  let end = last + CONTAINER_BLOCK_BYTES;
  let lastMark: number | undefined;
  while (lastMark === undefined && end > CONTAINER_BLOCK_BYTES) {
    const from = Math.max(
      CONTAINER_BLOCK_BYTES,
      end - (end === last + CONTAINER_BLOCK_BYTES ? CONTAINER_BLOCK_BYTES : SCAN_BYTES),
    );
    lastMark = (await scan(from, end)).at(-1);
    end = from;
  }
  let marks: number[] = [];
  for (let at = lastMark; at !== undefined;) {
    marks.unshift(at);
    const mark = isMark(await block(at), at);
    if (mark === undefined || (mark.from === CONTAINER_BLOCK_BYTES) !== (mark.file === 0)) {
      // A link of the chain is damaged: every block is looked at.
      marks = await scan(CONTAINER_BLOCK_BYTES, size);
      break;
    }
    at = mark.file === 0 ? undefined : mark.from - CONTAINER_BLOCK_BYTES;
  }
  const files: Part[] = [];
  let from = CONTAINER_BLOCK_BYTES;
  for (const at of marks) {
    files.push({ from, bytes: at - from, closed: true });
    from = at + CONTAINER_BLOCK_BYTES;
  }
  if (from < size) files.push({ from, bytes: size - from, closed: false });
  return { header: { id: header.id, recordBytes: header.recordBytes }, files };
}
