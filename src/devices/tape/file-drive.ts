/**
 * A directory or a file that stands in for a cartridge, for removable disks and for tests:
 * `file:PATH[?size=650M&reserve=8M&rate=360M&fault=…]`.
 *
 * What PATH means when the drive is loaded (a mount point, a link) is the cartridge: a directory (directory-medium.ts) or a file
 * (container-medium.ts). It is full when `size`, or what its file system has left, is used up.
 *
 * Faults are for tests and drills, separated by commas: `pull@N` (the cartridge is gone with the Nth record moved), `write@N` and
 * `read@N` (the Nth record fails once), `bad@FILE:RECORD` (that record cannot be read), `nowarn` (no early warning).
 */
import { realpath, stat } from 'node:fs/promises';

import { systemClock, type Clock } from '../../clock.js';
import { B2Error, errnoOf, ioError } from '../../errors.js';
import { DEFAULT_RECORD_BYTES } from '../../format/tape.js';
import { parseSize } from '../../human.js';
import { ContainerMedium } from './container-medium.js';
import { DirectoryMedium } from './directory-medium.js';
import type { TapeDrive, TapeRead, TapeStatus, TapeWritten } from './drive.js';
import { lengthOf, type FileOnTape, type Medium } from './medium.js';

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
  /** Bytes a second that the drive takes at most; undefined: as many as the disk does. */
  readonly rateBytes?: number | undefined;
  readonly faults?: FileDriveFaults | undefined;
}

const NO_FAULTS: FileDriveFaults = { bad: new Set(), noWarning: false };
const RESERVE_SHARE = 0.1;
const RESERVE_MAX = 64 * 1024 * 1024;
/** Left on the file system for what it needs itself, and for marks. */
const SLACK_BYTES = 256 * 1024;

/** True if `path` names a stand-in rather than a drive. */
export function isFileDrive(path: string): boolean {
  return path.startsWith('file:');
}

/** The path and options in `file:PATH?…`. Kind `usage` for what is neither. */
export function parseFileDrive(text: string): { path: string; options: FileDriveOptions } {
  const rest = text.replace(/^file:(\/\/(?=\/))?/, '');
  const at = rest.lastIndexOf('?');
  const path = at < 0 ? rest : rest.slice(0, at);
  if (path === '') throw new B2Error('usage', `${text} names no directory or file`);
  const options: { -readonly [K in keyof FileDriveOptions]: FileDriveOptions[K] } = {};
  for (const [key, value] of new URLSearchParams(at < 0 ? '' : rest.slice(at + 1))) {
    try {
      if (key === 'size') options.sizeBytes = parseSize(value);
      else if (key === 'reserve') options.reserveBytes = parseSize(value);
      else if (key === 'rate') options.rateBytes = parseSize(value);
      else if (key === 'fault') options.faults = parseFaults(value);
      else throw new RangeError('there is no such option');
    } catch (error) {
      if (!(error instanceof RangeError)) throw error;
      throw new B2Error('usage', `${text}: ${key}: ${error.message}`, {
        hint: 'The options are size, reserve, rate and fault: file:/media/disk?size=650M.',
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

/** See the file comment. */
export class FileDrive implements TapeDrive {
  readonly path: string;
  readonly streams: boolean;
  readonly #link: string;
  readonly #options: FileDriveOptions;
  readonly #faults: FileDriveFaults;
  readonly #clock: Pick<Clock, 'sleep' | 'monotonicNs'>;
  #medium: Medium | undefined;
  /** Asked for; counts from the next time that the cartridge is written from its beginning. */
  #nextRecordBytes: number | undefined;
  #file = 0;
  #offset = 0;
  /** What the file system has left, as far as is known: it is asked again before that is used up. */
  #freeBytes = 0;
  #freeAsked = 0;
  /** Until when the records so far take a drive of `rateBytes`. */
  #busyUntilNs = 0n;
  #moved = 0;
  #written = 0;
  #read = 0;
  #gone = false;

  private constructor(
    path: string,
    link: string,
    options: FileDriveOptions,
    clock: Pick<Clock, 'sleep' | 'monotonicNs'>,
  ) {
    this.path = path;
    this.#link = link;
    this.#options = options;
    this.streams = options.rateBytes !== undefined;
    this.#faults = options.faults ?? NO_FAULTS;
    this.#clock = clock;
  }

  /** `text` is `file:PATH…`. A path that is not there is a drive without a cartridge. */
  static async open(
    text: string,
    clock: Pick<Clock, 'sleep' | 'monotonicNs'> = systemClock,
  ): Promise<FileDrive> {
    const { path, options } = parseFileDrive(text);
    const drive = new FileDrive(text, path, options, clock);
    await drive.#mount();
    return drive;
  }

  /** Looks at what the path means now. */
  async #mount(): Promise<void> {
    await this.#release();
    this.#medium = undefined;
    this.#nextRecordBytes = undefined;
    this.#file = 0;
    this.#offset = 0;
    this.#freeAsked = 0;
    this.#freeBytes = 0;
    this.#gone = false;
    try {
      const path = await realpath(this.#link);
      const found = await stat(path);
      if (!found.isDirectory() && !found.isFile())
        throw new B2Error('refused', `${this.#link} is neither a directory nor a file`, {
          hint: 'A directory or an ordinary file stands in for a cartridge; drives are named without "file:".',
        });
      this.#medium = found.isDirectory()
        ? await DirectoryMedium.open(path)
        : await ContainerMedium.open(path);
    } catch (error) {
      if (errnoOf(error) === 'ENOENT') return;
      throw ioError('load', this.path, error);
    }
  }

  #loaded(): Medium {
    if (this.#gone) throw this.#error('the cartridge was pulled');
    if (this.#medium === undefined)
      throw new B2Error('not-found', `there is no cartridge in ${this.path}`, {
        hint: `Mount the disk, or make the directory ${this.#link} (or an empty file of that name).`,
      });
    return this.#medium;
  }

  get #recordBytes(): number {
    return this.#medium?.recordBytes ?? DEFAULT_RECORD_BYTES;
  }

  #error(what: string, cause?: unknown): B2Error {
    const where = `file ${this.#file}, record ${Math.floor(this.#offset / this.#recordBytes)}`;
    return new B2Error('io', `${this.path}: ${where}: ${what}`, { cause });
  }

  async status(): Promise<TapeStatus> {
    const medium = this.#gone ? undefined : this.#medium;
    if (medium === undefined)
      return {
        loaded: false,
        writeProtected: false,
        atEnd: false,
        file: undefined,
        record: undefined,
        blockBytes: 0,
      };
    const last = medium.files.at(-1);
    return {
      loaded: true,
      writeProtected: await medium.isProtected(),
      atEnd:
        this.#file >= medium.files.length - (last?.closed === false ? 1 : 0) &&
        this.#offset >= (medium.files[this.#file]?.bytes ?? 0),
      file: this.#file,
      record: Math.floor(this.#offset / this.#recordBytes),
      blockBytes: 0,
    };
  }

  async setRecordBytes(recordBytes: number, _fixed: boolean): Promise<void> {
    this.#loaded();
    this.#nextRecordBytes = recordBytes;
  }

  setCompression(): Promise<boolean> {
    return Promise.resolve(false);
  }

  async rewind(): Promise<void> {
    this.#loaded();
    this.#file = 0;
    this.#offset = 0;
  }

  async spaceFiles(count: number): Promise<void> {
    const { files } = this.#loaded();
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
    this.#loaded();
    const records = Math.ceil(this.#offset / this.#recordBytes);
    if (records < count) throw this.#error(`there are no ${count} records before this one`);
    this.#offset = (records - count) * this.#recordBytes;
  }

  async skipRecord(): Promise<void> {
    const file = this.#loaded().files[this.#file];
    this.#offset = Math.min(file?.bytes ?? 0, this.#offset + this.#recordBytes);
  }

  async toEndOfData(): Promise<void> {
    const { files } = this.#loaded();
    const last = files.at(-1);
    this.#file = last === undefined || last.closed ? files.length : files.length - 1;
    this.#offset = files[this.#file]?.bytes ?? 0;
  }

  async read(into: Buffer): Promise<TapeRead> {
    const medium = this.#loaded();
    const file: FileOnTape | undefined = medium.files[this.#file];
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
      const got = await medium.read(this.#file, into.subarray(0, bytes), this.#offset);
      if (got !== bytes) throw this.#error('the file has become shorter');
    } catch (error) {
      throw ioError('read', this.path, error);
    }
    this.#offset += bytes;
    await this.#pace(bytes);
    return { kind: 'record', bytes };
  }

  async write(parts: readonly Buffer[]): Promise<TapeWritten> {
    const medium = await this.#beginWriting();
    const wantedBytes = lengthOf(parts);
    const wanted = wantedBytes / this.#recordBytes;
    const room = await this.#room(wantedBytes);
    let records = 0;
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
    if (bytes > 0) {
      try {
        await medium.append(firstBytes(parts, bytes));
        this.#offset += bytes;
        this.#freeBytes -= bytes;
      } catch (error) {
        if (!isNoSpace(error)) throw ioError('write', this.path, error);
        // What of it has arrived is not known, and need not be: it is not counted.
        await medium.cut(this.#file, this.#offset, this.#recordBytes);
        this.#freeAsked = 0;
        return { records: 0, earlyWarning: true, full: true };
      }
      await this.#pace(bytes);
    }
    return { records, earlyWarning: full || (await this.#warns()), full };
  }

  async writeMarks(count: number): Promise<{ earlyWarning: boolean }> {
    const medium = this.#loaded();
    try {
      for (let i = 0; i < count; i++) {
        // A second mark at the end of data is the end of data itself.
        if (this.#offset === 0 && this.#file > 0) {
          if (await medium.isProtected()) throw writeProtected(this.path);
          await medium.drop(this.#file);
          break;
        }
        await this.#beginWriting();
        await medium.mark();
        this.#freeBytes -= medium.markBytes;
        this.#file++;
        this.#offset = 0;
      }
    } catch (error) {
      throw ioError('write a file mark on', this.path, error);
    }
    return { earlyWarning: await this.#warns() };
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
  async #beginWriting(): Promise<Medium> {
    const medium = this.#loaded();
    const file = medium.files[this.#file];
    const atEnd =
      this.#file === medium.files.length - 1 &&
      file?.closed === false &&
      file.bytes === this.#offset;
    // At the very beginning the size of records may change.
    if (atEnd && (this.#file > 0 || this.#offset > 0)) return medium;
    if (await medium.isProtected()) throw writeProtected(this.path);
    try {
      const recordBytes = this.#nextRecordBytes ?? this.#recordBytes;
      await medium.cut(this.#file, this.#offset, recordBytes);
      this.#offset = medium.files[this.#file]?.bytes ?? this.#offset;
    } catch (error) {
      throw ioError('write', this.path, error);
    }
    this.#freeAsked = 0;
    return medium;
  }

  /** Bytes that still fit; exact enough for the next `wanted` ones. */
  async #room(wanted: number): Promise<number> {
    const medium = this.#loaded();
    const { sizeBytes } = this.#options;
    if (this.#freeBytes < this.#freeAsked / 2 + wanted + SLACK_BYTES) {
      try {
        this.#freeBytes = await medium.freeBytes();
      } catch (error) {
        throw ioError('ask for the free space of', this.path, error);
      }
      this.#freeAsked = this.#freeBytes;
    }
    const free = Math.max(0, this.#freeBytes - SLACK_BYTES);
    return sizeBytes === undefined ? free : Math.min(free, sizeBytes - usedBytes(medium));
  }

  async #warns(): Promise<boolean> {
    if (this.#faults.noWarning) return false;
    const { sizeBytes, reserveBytes } = this.#options;
    const room = await this.#room(0);
    const total = sizeBytes ?? usedBytes(this.#loaded()) + room;
    return room < (reserveBytes ?? Math.min(RESERVE_MAX, Math.floor(total * RESERVE_SHARE)));
  }

  /** Waits as long as a drive of that rate would take, which has a buffer of its own. */
  async #pace(bytes: number): Promise<void> {
    const { rateBytes } = this.#options;
    if (rateBytes === undefined) return;
    const nowNs = this.#clock.monotonicNs();
    // Time in which it had nothing to do is lost: a drive does not catch up.
    if (this.#busyUntilNs < nowNs) this.#busyUntilNs = nowNs;
    this.#busyUntilNs += BigInt(Math.round((bytes * 1e9) / rateBytes));
    const waitNs = this.#busyUntilNs - nowNs - DRIVE_BUFFER_NS;
    if (waitNs > 0n) await this.#clock.sleep(Number(waitNs) / 1e6);
  }

  #move(): void {
    if (++this.#moved === this.#faults.pullAt) this.#gone = true;
    this.#loaded();
  }

  async #release(): Promise<void> {
    try {
      await this.#medium?.close();
    } catch (error) {
      throw ioError('close', this.path, error);
    }
  }
}

/** A drive of a given rate has memory for so long; real ones have more. */
const DRIVE_BUFFER_NS = 200_000_000n;

function usedBytes(medium: Medium): number {
  return medium.files.reduce((sum, f) => sum + f.bytes + (f.closed ? medium.markBytes : 0), 0);
}

function isNoSpace(error: unknown): boolean {
  const errno = errnoOf(error);
  return errno === 'ENOSPC' || errno === 'EDQUOT' || errno === 'EFBIG';
}

/** The error of a write to a protected cartridge. */
export function writeProtected(path: string): B2Error {
  return new B2Error('refused', `the cartridge in ${path} is write protected`, {
    hint: 'Take it out and move its tab, or put in another cartridge.',
  });
}

/** The first `bytes` of what is in `parts`. */
function firstBytes(parts: readonly Buffer[], bytes: number): readonly Buffer[] {
  const out: Buffer[] = [];
  let left = bytes;
  for (const part of parts) {
    if (left === 0) break;
    const taken = part.subarray(0, left);
    out.push(taken);
    left -= taken.length;
  }
  return out;
}
