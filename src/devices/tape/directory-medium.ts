/**
 * A cartridge in a directory: each file of the tape is a file `000000.tar`, `000001.tar`, … there; the border between two is the
 * file mark, and a file that has no mark behind it ends in `.part`. `cartridge.json` remembers the size of records. A file
 * `write-protected` protects it.
 */
import { constants } from 'node:fs';
import { access, readFile, readdir, rename, rm, stat, statfs, truncate } from 'node:fs/promises';
import { join } from 'node:path';

import { errnoOf } from '../../errors.js';
import { DEFAULT_RECORD_BYTES, MAX_RECORD_BYTES, RECORD_STEP_BYTES } from '../../format/tape.js';
import { fsyncDirectory, writeFileDurable } from '../../fs.js';
import { StandInFile, lengthOf, type FileOnTape, type Medium } from './medium.js';

const STATE_FILE = 'cartridge.json';
const PROTECT_FILE = 'write-protected';

const nameOf = (file: number): string => `${String(file).padStart(6, '0')}.tar`;

/** See the file comment. */
export class DirectoryMedium implements Medium {
  readonly markBytes = 4096;
  readonly #directory: string;
  #recordBytes: number;
  #files: FileOnTape[];
  #open:
    { readonly file: number; readonly handle: StandInFile; readonly writing: boolean } | undefined;

  private constructor(directory: string, files: FileOnTape[], recordBytes: number) {
    this.#directory = directory;
    this.#files = files;
    this.#recordBytes = recordBytes;
  }

  static async open(directory: string): Promise<DirectoryMedium> {
    const names = new Set(await readdir(directory));
    const files: FileOnTape[] = [];
    for (let n = 0; ; n++) {
      const closed = names.has(nameOf(n));
      if (!closed && !names.has(`${nameOf(n)}.part`)) break;
      const found = await stat(join(directory, closed ? nameOf(n) : `${nameOf(n)}.part`));
      files.push({ bytes: found.size, closed });
      if (!closed) break;
    }
    return new DirectoryMedium(directory, files, await storedRecordBytes(directory));
  }

  get recordBytes(): number {
    return this.#recordBytes;
  }

  get files(): readonly FileOnTape[] {
    return this.#files;
  }

  async isProtected(): Promise<boolean> {
    try {
      await access(this.#directory, constants.W_OK);
      await access(join(this.#directory, PROTECT_FILE));
      return true;
    } catch (error) {
      return errnoOf(error) !== 'ENOENT';
    }
  }

  async freeBytes(): Promise<number> {
    const { bavail, bsize } = await statfs(this.#directory);
    return bavail * bsize;
  }

  async read(file: number, into: Buffer, offset: number): Promise<number> {
    return (await this.#handleOf(file, false)).read(into, offset);
  }

  async cut(file: number, offset: number, recordBytes: number): Promise<void> {
    await this.#release();
    if (file === 0 && offset === 0) this.#recordBytes = recordBytes;
    for (let n = this.#files.length - 1; n > file; n--) await this.#remove(n);
    const name = join(this.#directory, nameOf(file));
    const there = this.#files[file];
    if (there?.closed === true) await rename(name, `${name}.part`);
    this.#files = this.#files.slice(0, file);
    if (there !== undefined) await truncate(`${name}.part`, offset);
    this.#files.push({ bytes: offset, closed: false });
    await this.#handleOf(file, true);
    if (file > 0) return;
    const state = Buffer.from(`${JSON.stringify({ recordBytes: this.#recordBytes })}\n`);
    await writeFileDurable(join(this.#directory, STATE_FILE), state);
  }

  async append(parts: readonly Buffer[]): Promise<void> {
    const file = this.#files.length - 1;
    const bytes = this.#files[file]?.bytes ?? 0;
    await (await this.#handleOf(file, true)).write(parts, bytes);
    this.#files[file] = { bytes: bytes + lengthOf(parts), closed: false };
  }

  async mark(): Promise<void> {
    const file = this.#files.length - 1;
    await (await this.#handleOf(file, true)).sync();
    await this.#release();
    const name = join(this.#directory, nameOf(file));
    await rename(`${name}.part`, name);
    this.#files[file] = { bytes: this.#files[file]?.bytes ?? 0, closed: true };
    await fsyncDirectory(this.#directory);
  }

  async drop(file: number): Promise<void> {
    await this.#release();
    for (let n = this.#files.length - 1; n >= file; n--) await this.#remove(n);
    this.#files = this.#files.slice(0, file);
    await fsyncDirectory(this.#directory);
  }

  close(): Promise<void> {
    return this.#release();
  }

  async #remove(file: number): Promise<void> {
    const name = join(this.#directory, nameOf(file));
    await rm(name, { force: true });
    await rm(`${name}.part`, { force: true });
  }

  async #handleOf(file: number, writing: boolean): Promise<StandInFile> {
    const open = this.#open;
    if (open?.file === file && (open.writing || !writing)) return open.handle;
    await this.#release();
    const closed = this.#files[file]?.closed === true;
    const name = join(this.#directory, closed ? nameOf(file) : `${nameOf(file)}.part`);
    const handle = await StandInFile.open(name, writing);
    this.#open = { file, handle, writing };
    return handle;
  }

  async #release(): Promise<void> {
    const handle = this.#open?.handle;
    this.#open = undefined;
    await handle?.close();
  }
}

async function storedRecordBytes(directory: string): Promise<number> {
  try {
    const o: unknown = JSON.parse(await readFile(join(directory, STATE_FILE), 'utf8'));
    const n = typeof o === 'object' && o !== null && 'recordBytes' in o ? o.recordBytes : 0;
    if (typeof n === 'number' && n >= RECORD_STEP_BYTES && n <= MAX_RECORD_BYTES) return n;
  } catch (error) {
    if (errnoOf(error) !== 'ENOENT' && !(error instanceof SyntaxError)) throw error;
  }
  return DEFAULT_RECORD_BYTES;
}
