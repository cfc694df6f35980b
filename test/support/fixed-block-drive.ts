/** A drive without a variable block mode, as some old ones are: a stand-in that reads blocks only with the length they were written with. */
import type { FileDrive } from '../../src/devices/tape/file-drive.js';
import type { TapeDrive, TapeRead, TapeStatus, TapeWritten } from '../../src/devices/tape/drive.js';
import { B2Error } from '../../src/errors.js';

/** See the file comment. */
export class FixedBlockDrive implements TapeDrive {
  readonly path: string;
  readonly streams: boolean;
  readonly #inner: FileDrive;
  /** Longer blocks it does not know. */
  readonly #mostBytes: number;
  #blockBytes: number;

  constructor(inner: FileDrive, blockBytes: number, mostBytes = 1024 * 1024) {
    this.path = inner.path;
    this.streams = inner.streams;
    this.#inner = inner;
    this.#blockBytes = blockBytes;
    this.#mostBytes = mostBytes;
  }

  async status(): Promise<TapeStatus> {
    return { ...(await this.#inner.status()), blockBytes: this.#blockBytes };
  }

  async setRecordBytes(recordBytes: number): Promise<void> {
    if (recordBytes > this.#mostBytes)
      throw new B2Error('io', `${this.path}: no blocks of ${recordBytes} bytes`);
    this.#blockBytes = recordBytes;
    await this.#inner.setRecordBytes(recordBytes, true);
  }

  async read(into: Buffer): Promise<TapeRead> {
    const found = await this.#inner.read(into);
    if (found.kind === 'record' && found.bytes !== this.#blockBytes)
      throw new B2Error('io', `${this.path}: a block of another length`);
    return found;
  }

  write(parts: readonly Buffer[]): Promise<TapeWritten> {
    return this.#inner.write(parts);
  }

  setCompression(): Promise<boolean> {
    return this.#inner.setCompression();
  }

  rewind(): Promise<void> {
    return this.#inner.rewind();
  }

  spaceFiles(count: number): Promise<void> {
    return this.#inner.spaceFiles(count);
  }

  backRecords(count: number): Promise<void> {
    return this.#inner.backRecords(count);
  }

  skipRecord(): Promise<void> {
    return this.#inner.skipRecord();
  }

  toEndOfData(): Promise<void> {
    return this.#inner.toEndOfData();
  }

  writeMarks(count: number): Promise<{ readonly earlyWarning: boolean }> {
    return this.#inner.writeMarks(count);
  }

  eject(): Promise<void> {
    return this.#inner.eject();
  }

  load(): Promise<void> {
    return this.#inner.load();
  }

  close(): Promise<void> {
    return this.#inner.close();
  }
}
