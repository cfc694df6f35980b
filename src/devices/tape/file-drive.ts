/**
 * A directory that stands in for a tape drive, for removable disks and for tests: `file:PATH[?size=650M&reserve=8M&fault=…]`.
 *
 * What PATH means when the drive is loaded (a mount point, a link) is the cartridge. Each file of the tape is a file
 * `000000.tar`, `000001.tar`, … there; the border between two is the file mark, and a file that has no mark behind it ends in
 * `.part`. `cartridge.json` remembers the size of records. A file `write-protected` protects it.
 *
 * Faults are for tests and drills, separated by commas: `pull@N` (the cartridge is gone with the Nth record moved), `write@N` and
 * `read@N` (the Nth record fails once), `bad@FILE:RECORD` (that record cannot be read), `nowarn` (no early warning).
 */
import { constants } from 'node:fs';
import {
  access,
  mkdir,
  open,
  readFile,
  readdir,
  realpath,
  rename,
  rm,
  stat,
  type FileHandle,
} from 'node:fs/promises';
import { join } from 'node:path';

import { B2Error, errnoOf, ioError } from '../../errors.js';
import { DEFAULT_RECORD_BYTES, RECORD_STEP_BYTES, MAX_RECORD_BYTES } from '../../format/tape.js';
import { fsyncDirectory, writeFileDurable } from '../../fs.js';
import { parseSize } from '../../human.js';
import type { TapeDrive, TapeRead, TapeStatus, TapeWritten } from './drive.js';

export interface FileDriveFaults {
  /** Records moved (read or written, counted from 1) with which the cartridge is gone. */
  readonly pullAt?: number | undefined;
  /** The Nth record written fails, once. */
  readonly writeErrorAt?: number | undefined;
  /** The Nth record read fails, once. */
  readonly readErrorAt?: number | undefined;
  /** Records that cannot be read, as `FILE:RECORD`. */
  readonly bad: ReadonlySet<string>;
  /** No early warning: the end comes as `full` at once. */
  readonly noWarning: boolean;
}

export interface FileDriveOptions {
  /** Bytes that fit on a cartridge; undefined: as many as the file system has. */
  readonly sizeBytes?: number | undefined;
  /** Bytes before the end at which the drive warns. */
  readonly reserveBytes?: number | undefined;
  readonly faults?: FileDriveFaults | undefined;
}

const NO_FAULTS: FileDriveFaults = { bad: new Set(), noWarning: false };
const STATE_FILE = 'cartridge.json';
const PROTECT_FILE = 'write-protected';
/** What a file mark takes of the size. */
const MARK_BYTES = 4096;
const RESERVE_SHARE = 0.1;
const RESERVE_MAX = 64 * 1024 * 1024;

/** True if `path` names a stand-in rather than a drive. */
export function isFileDrive(path: string): boolean {
  return path.startsWith('file:');
}

/** The directory and options in `file:PATH?…`. Kind `usage` for what is neither. */
export function parseFileDrive(text: string): { path: string; options: FileDriveOptions } {
  const rest = text.replace(/^file:(\/\/(?=\/))?/, '');
  const at = rest.lastIndexOf('?');
  const path = at < 0 ? rest : rest.slice(0, at);
  if (path === '') throw new B2Error('usage', `${text} names no directory`);
  const options: { -readonly [K in keyof FileDriveOptions]: FileDriveOptions[K] } = {};
  for (const [key, value] of new URLSearchParams(at < 0 ? '' : rest.slice(at + 1))) {
    try {
      if (key === 'size') options.sizeBytes = parseSize(value);
      else if (key === 'reserve') options.reserveBytes = parseSize(value);
      else if (key === 'fault') options.faults = parseFaults(value);
      else throw new RangeError('there is no such option');
    } catch (error) {
      if (!(error instanceof RangeError)) throw error;
      throw new B2Error('usage', `${text}: ${key}: ${error.message}`, {
        hint: 'The options are size, reserve and fault: file:/media/disk?size=650M.',
      });
    }
  }
  return { path, options };
}

function parseFaults(text: string): FileDriveFaults {
  let faults: FileDriveFaults = NO_FAULTS;
  for (const one of text.split(',')) {
    const m = /^(?:(pull|write|read)@(\d+)|bad@(\d+:\d+)|(nowarn))$/.exec(one);
    if (m === null) throw new RangeError(`no such fault: ${one}`);
    const n = Number(m[2]);
    if (m[1] === 'pull') faults = { ...faults, pullAt: n };
    else if (m[1] === 'write') faults = { ...faults, writeErrorAt: n };
    else if (m[1] === 'read') faults = { ...faults, readErrorAt: n };
    else if (m[3] !== undefined) faults = { ...faults, bad: new Set([...faults.bad, m[3]]) };
    else faults = { ...faults, noWarning: true };
  }
  return faults;
}

const nameOf = (file: number): string => `${String(file).padStart(6, '0')}.tar`;

interface FileOnTape {
  bytes: number;
  /** A mark follows. */
  closed: boolean;
}

/** See the file comment. */
export class FileDrive implements TapeDrive {
  readonly path: string;
  readonly #link: string;
  readonly #options: FileDriveOptions;
  readonly #faults: FileDriveFaults;
  #directory = '';
  #files: FileOnTape[] | undefined;
  /** Of the records on the cartridge. */
  #recordBytes = DEFAULT_RECORD_BYTES;
  /** Asked for; counts from the next time that the cartridge is written from its beginning. */
  #nextRecordBytes: number | undefined;
  #file = 0;
  #offset = 0;
  #handle:
    { readonly file: number; readonly handle: FileHandle; readonly writing: boolean } | undefined;
  #moved = 0;
  #written = 0;
  #read = 0;
  #gone = false;

  private constructor(path: string, link: string, options: FileDriveOptions) {
    this.path = path;
    this.#link = link;
    this.#options = options;
    this.#faults = options.faults ?? NO_FAULTS;
  }

  /** `text` is `file:PATH…`. A directory that is not there is a drive without a cartridge. */
  static async open(text: string): Promise<FileDrive> {
    const { path, options } = parseFileDrive(text);
    const drive = new FileDrive(text, path, options);
    await drive.#mount();
    return drive;
  }

  /** Looks at what the path means now. */
  async #mount(): Promise<void> {
    await this.#release();
    this.#files = undefined;
    this.#nextRecordBytes = undefined;
    this.#file = 0;
    this.#offset = 0;
    this.#gone = false;
    try {
      this.#directory = await realpath(this.#link);
      if (!(await stat(this.#directory)).isDirectory())
        throw new B2Error('refused', `${this.#link} is not a directory`, {
          hint: 'A directory stands in for a cartridge: make one, and name it as file:PATH.',
        });
      const names = new Set(await readdir(this.#directory));
      const files: FileOnTape[] = [];
      for (let n = 0; ; n++) {
        const closed = names.has(nameOf(n));
        if (!closed && !names.has(`${nameOf(n)}.part`)) break;
        const found = await stat(join(this.#directory, closed ? nameOf(n) : `${nameOf(n)}.part`));
        files.push({ bytes: found.size, closed });
        if (!closed) break;
      }
      this.#recordBytes = await this.#storedRecordBytes();
      this.#files = files;
    } catch (error) {
      if (errnoOf(error) === 'ENOENT') return;
      throw ioError('load', this.path, error);
    }
  }

  async #storedRecordBytes(): Promise<number> {
    try {
      const o: unknown = JSON.parse(await readFile(join(this.#directory, STATE_FILE), 'utf8'));
      const n = typeof o === 'object' && o !== null && 'recordBytes' in o ? o.recordBytes : 0;
      if (typeof n === 'number' && n >= RECORD_STEP_BYTES && n <= MAX_RECORD_BYTES) return n;
    } catch (error) {
      if (errnoOf(error) !== 'ENOENT' && !(error instanceof SyntaxError)) throw error;
    }
    return DEFAULT_RECORD_BYTES;
  }

  #medium(): FileOnTape[] {
    if (this.#gone) throw this.#error('the cartridge was pulled');
    if (this.#files === undefined)
      throw new B2Error('not-found', `there is no cartridge in ${this.path}`, {
        hint: `Mount the disk, or make the directory ${this.#link}.`,
      });
    return this.#files;
  }

  #error(what: string, cause?: unknown): B2Error {
    const where = `file ${this.#file}, record ${Math.floor(this.#offset / this.#recordBytes)}`;
    return new B2Error('io', `${this.path}: ${where}: ${what}`, { cause });
  }

  async status(): Promise<TapeStatus> {
    const loaded = this.#files !== undefined && !this.#gone;
    return {
      loaded,
      writeProtected: loaded && (await this.#isProtected()),
      file: loaded ? this.#file : undefined,
      record: loaded ? Math.floor(this.#offset / this.#recordBytes) : undefined,
    };
  }

  async #isProtected(): Promise<boolean> {
    try {
      await access(this.#directory, constants.W_OK);
      await access(join(this.#directory, PROTECT_FILE));
      return true;
    } catch (error) {
      return errnoOf(error) !== 'ENOENT';
    }
  }

  async setRecordBytes(recordBytes: number, _fixed: boolean): Promise<void> {
    this.#medium();
    this.#nextRecordBytes = recordBytes;
  }

  setCompression(): Promise<boolean> {
    return Promise.resolve(false);
  }

  async rewind(): Promise<void> {
    this.#medium();
    this.#file = 0;
    this.#offset = 0;
  }

  async spaceFiles(count: number): Promise<void> {
    const files = this.#medium();
    for (let i = 0; i < count; i++) {
      if (files[this.#file]?.closed !== true) {
        this.#offset = files[this.#file]?.bytes ?? 0;
        throw this.#error('there is no file mark before the end of data');
      }
      this.#file++;
      this.#offset = 0;
    }
  }

  async backRecords(count: number): Promise<void> {
    this.#medium();
    const records = Math.ceil(this.#offset / this.#recordBytes);
    if (records < count) throw this.#error(`there are no ${count} records before this one`);
    this.#offset = (records - count) * this.#recordBytes;
  }

  async skipRecord(): Promise<void> {
    const file = this.#medium()[this.#file];
    this.#offset = Math.min(file?.bytes ?? 0, this.#offset + this.#recordBytes);
  }

  async toEndOfData(): Promise<void> {
    const files = this.#medium();
    const last = files.at(-1);
    this.#file = last === undefined || last.closed ? files.length : files.length - 1;
    this.#offset = files[this.#file]?.bytes ?? 0;
  }

  async read(into: Buffer): Promise<TapeRead> {
    const files = this.#medium();
    const file = files[this.#file];
    if (file === undefined) return { kind: 'end' };
    if (this.#offset >= file.bytes) {
      if (!file.closed) return { kind: 'end' };
      this.#file++;
      this.#offset = 0;
      return { kind: 'mark' };
    }
    this.#move();
    const record = `${this.#file}:${Math.floor(this.#offset / this.#recordBytes)}`;
    if (this.#faults.bad.has(record) || ++this.#read === this.#faults.readErrorAt)
      throw this.#error('the record cannot be read (fault asked for)');
    const bytes = Math.min(this.#recordBytes, file.bytes - this.#offset);
    if (bytes > into.length) throw this.#error(`the record is larger than ${into.length} bytes`);
    try {
      const handle = await this.#handleOf(this.#file, false);
      const { bytesRead } = await handle.read(into, 0, bytes, this.#offset);
      if (bytesRead !== bytes) throw this.#error('the file has become shorter');
    } catch (error) {
      throw ioError('read', this.path, error);
    }
    this.#offset += bytes;
    return { kind: 'record', bytes };
  }

  async write(data: Buffer): Promise<TapeWritten> {
    this.#medium();
    if (await this.#isProtected()) throw writeProtected(this.path);
    await this.#truncate();
    let records = 0;
    const wanted = data.length / this.#recordBytes;
    const room = this.#room();
    let full = false;
    while (records < wanted) {
      if ((records + 1) * this.#recordBytes > room) {
        full = true;
        break;
      }
      this.#move();
      if (++this.#written === this.#faults.writeErrorAt)
        throw this.#error('the record cannot be written (fault asked for)');
      records++;
    }
    const bytes = records * this.#recordBytes;
    const file = this.#files?.[this.#file];
    if (bytes > 0 && file !== undefined) {
      try {
        const handle = await this.#handleOf(this.#file, true);
        for (let at = 0; at < bytes;) {
          const { bytesWritten } = await handle.write(data, at, bytes - at, this.#offset + at);
          at += bytesWritten;
        }
        file.bytes = this.#offset + bytes;
        this.#offset += bytes;
      } catch (error) {
        if (errnoOf(error) !== 'ENOSPC') throw ioError('write', this.path, error);
        // What of it has arrived is not known, and need not be: it is not counted.
        await this.#handle?.handle.truncate(this.#offset);
        return { records: 0, earlyWarning: true, full: true };
      }
    }
    return { records, earlyWarning: full || this.#warns(), full };
  }

  async writeMarks(count: number): Promise<{ earlyWarning: boolean }> {
    const files = this.#medium();
    if (await this.#isProtected()) throw writeProtected(this.path);
    await this.#truncate();
    try {
      for (let i = 0; i < count; i++) {
        const file = files[this.#file];
        // A second mark at the end of data is the end of data itself.
        if (file === undefined || (file.bytes === 0 && this.#file > 0)) {
          await this.#release();
          if (file !== undefined) await this.#remove(this.#file);
          files.length = Math.min(files.length, this.#file);
          break;
        }
        const handle = await this.#handleOf(this.#file, true);
        await handle.datasync();
        await this.#release();
        const name = join(this.#directory, nameOf(this.#file));
        await rename(`${name}.part`, name);
        file.closed = true;
        this.#file++;
        this.#offset = 0;
      }
      await fsyncDirectory(this.#directory);
      await this.#handle?.handle.datasync();
    } catch (error) {
      throw ioError('write', this.path, error);
    }
    return { earlyWarning: this.#warns() };
  }

  eject(): Promise<void> {
    return this.#release();
  }

  load(): Promise<void> {
    return this.#mount();
  }

  close(): Promise<void> {
    return this.#release();
  }

  /** Makes the head's place the end of data, and its file one that can be written. */
  async #truncate(): Promise<void> {
    const files = this.#medium();
    const file = files[this.#file];
    const atEnd =
      this.#file === files.length - 1 && file?.closed === false && file.bytes === this.#offset;
    if (atEnd) return;
    await this.#release();
    try {
      if (this.#file === 0 && this.#offset === 0) {
        await mkdir(this.#directory, { recursive: true });
        this.#recordBytes = this.#nextRecordBytes ?? this.#recordBytes;
      }
      for (let n = files.length - 1; n > this.#file; n--) await this.#remove(n);
      const part = join(this.#directory, `${nameOf(this.#file)}.part`);
      if (file?.closed === true) await rename(part.slice(0, -'.part'.length), part);
      files.length = this.#file;
      files.push({ bytes: this.#offset, closed: false });
      const handle = await this.#handleOf(this.#file, true);
      await handle.truncate(this.#offset);
      const state = Buffer.from(`${JSON.stringify({ recordBytes: this.#recordBytes })}\n`);
      if (this.#file === 0) await writeFileDurable(join(this.#directory, STATE_FILE), state);
    } catch (error) {
      throw ioError('write', this.path, error);
    }
  }

  async #remove(file: number): Promise<void> {
    const name = join(this.#directory, nameOf(file));
    await rm(name, { force: true });
    await rm(`${name}.part`, { force: true });
  }

  #used(): number {
    return (this.#files ?? []).reduce((sum, f) => sum + f.bytes + (f.closed ? MARK_BYTES : 0), 0);
  }

  #room(): number {
    return (this.#options.sizeBytes ?? Number.POSITIVE_INFINITY) - this.#used();
  }

  #warns(): boolean {
    const { sizeBytes } = this.#options;
    if (sizeBytes === undefined || this.#faults.noWarning) return false;
    const reserve =
      this.#options.reserveBytes ?? Math.min(RESERVE_MAX, Math.floor(sizeBytes * RESERVE_SHARE));
    return this.#room() < reserve;
  }

  #move(): void {
    if (++this.#moved === this.#faults.pullAt) this.#gone = true;
    this.#medium();
  }

  async #handleOf(file: number, writing: boolean): Promise<FileHandle> {
    const open_ = this.#handle;
    if (open_ !== undefined && open_.file === file && (open_.writing || !writing))
      return open_.handle;
    await this.#release();
    const closed = this.#files?.[file]?.closed === true;
    const name = join(this.#directory, closed ? nameOf(file) : `${nameOf(file)}.part`);
    const flags = writing ? constants.O_RDWR | constants.O_CREAT : constants.O_RDONLY;
    const handle = await open(name, flags | constants.O_NOFOLLOW, 0o600);
    this.#handle = { file, handle, writing };
    return handle;
  }

  async #release(): Promise<void> {
    const handle = this.#handle?.handle;
    this.#handle = undefined;
    await handle?.close();
  }
}

/** The error of a write to a protected cartridge. */
export function writeProtected(path: string): B2Error {
  return new B2Error('refused', `the cartridge in ${path} is write protected`, {
    hint: 'Take it out and move its tab, or put in another cartridge.',
  });
}
