/** What a stand-in keeps the records and marks of its cartridge in: a directory, or one file. */
import { constants } from 'node:fs';

import { errnoOf } from '../../errors.js';
import { readFully, systemFileCalls, writeFully } from '../../fs.js';
import { DIRECT_ALIGN_BYTES, isPageAligned } from '../../memory.js';
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
  /** Adds to the open file. Rejects with ENOSPC where there is no room; how much was added is then not known until {@link cut} says so. */
  append(data: Buffer): Promise<void>;
  /** Closes the open file with a mark, and makes everything durable. */
  mark(): Promise<void>;
  /** Removes file `file` and those behind it, durably. */
  drop(file: number): Promise<void>;
  close(): Promise<void>;
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
    return readFully(systemFileCalls, this.fd, into, position);
  }

  async write(data: Buffer, position: number): Promise<void> {
    if (
      this.#directFd !== undefined &&
      isPageAligned(data) &&
      (data.length | position) % DIRECT_ALIGN_BYTES === 0
    ) {
      try {
        await writeFully(systemFileCalls, this.#directFd, data, position);
        return;
      } catch (error) {
        if (errnoOf(error) !== 'EINVAL') throw error;
        // Opened, and then refused: some file systems find out only now.
        await closeFd(this.#directFd);
        this.#directFd = undefined;
      }
    }
    await writeFully(systemFileCalls, this.fd, data, position);
  }

  async sync(): Promise<void> {
    await systemFileCalls.fdatasync(this.fd);
  }

  async close(): Promise<void> {
    if (this.#directFd !== undefined) await closeFd(this.#directFd);
    await closeFd(this.fd);
  }
}
