/**
 * A tape drive behind Linux's st driver (Documentation/scsi/st.rst): `/dev/nst0`, `/dev/st0`, `/dev/tape/by-id/…`. The node stays open for all of the work, so
 * whether closing it rewinds makes no difference to us.
 *
 * At the early warning st fails one write with ENOSPC and lets the next one pass, in turn, until the end of the medium. So a write that
 * failed that way is tried once more: if it then goes well it was the warning, if not the cartridge is full.
 */
import { constants } from 'node:fs';
import { open, type FileHandle } from 'node:fs/promises';

import type { Clock } from '../../clock.js';
import { B2Error, errnoOf, ioError } from '../../errors.js';
import { MAX_RECORD_BYTES } from '../../format/tape.js';
import { tapeDriveStatus, tapeOperation } from '../../syscalls.js';
import type { TapeDrive, TapeRead, TapeStatus, TapeWritten } from './drive.js';
import { writeProtected } from './file-drive.js';

// Operations of linux/mtio.h.
const MT = {
  fsf: 1,
  fsr: 3,
  bsr: 4,
  weof: 5,
  rewind: 6,
  offline: 7,
  eom: 12,
  setBlock: 20,
  load: 30,
  compression: 32,
} as const;

// Status bits of linux/mtio.h (GMT_…).
const GMT_WR_PROT = 0x0400_0000;
const GMT_EOD = 0x0800_0000;
const GMT_ONLINE = 0x0100_0000;
const GMT_DR_OPEN = 0x0004_0000;

/** How long a cartridge may take to become ready: large ones thread for more than a minute. */
const READY_MS = 180_000;
/** How long a drive may say that there is nothing in it, after one was put in. */
const EMPTY_MS = 20_000;
const POLL_MS = 500;

/** See the file comment. */
export class StDrive implements TapeDrive {
  readonly path: string;
  readonly streams = true;
  readonly #clock: Pick<Clock, 'sleep' | 'monotonicNs'>;
  #handle: FileHandle;
  #readOnly: boolean;
  #recordBytes = 0;
  /** Length of the blocks in the fixed block mode, in which a longer read gets several of them; 0 in the variable one. */
  #blockBytes = 0;
  #warned = false;

  private constructor(
    path: string,
    clock: Pick<Clock, 'sleep' | 'monotonicNs'>,
    handle: FileHandle,
    readOnly: boolean,
  ) {
    this.path = path;
    this.#clock = clock;
    this.#handle = handle;
    this.#readOnly = readOnly;
  }

  static async open(path: string, clock: Pick<Clock, 'sleep' | 'monotonicNs'>): Promise<StDrive> {
    const { handle, readOnly } = await openNode(path);
    return new StDrive(path, clock, handle, readOnly);
  }

  async status(): Promise<TapeStatus> {
    try {
      const { flags, file, block, blockBytes } = await tapeDriveStatus(this.#handle.fd);
      return {
        loaded: (flags & GMT_ONLINE) !== 0 && (flags & GMT_DR_OPEN) === 0,
        writeProtected: (flags & GMT_WR_PROT) !== 0 || this.#readOnly,
        atEnd: (flags & GMT_EOD) !== 0,
        file: file < 0 ? undefined : file,
        record: block < 0 ? undefined : block,
        blockBytes,
      };
    } catch (error) {
      throw ioError('ask', this.path, error);
    }
  }

  async setRecordBytes(recordBytes: number, fixed: boolean): Promise<void> {
    this.#recordBytes = recordBytes;
    try {
      if (!fixed) {
        await this.#operate(MT.setBlock, 0, 'set variable blocks');
        this.#blockBytes = 0;
        return;
      }
    } catch (error) {
      // A drive without variable blocks: fixed ones are then the only way.
      if (!(error instanceof B2Error) || error.kind !== 'io') throw error;
    }
    await this.#operate(MT.setBlock, recordBytes, `set blocks of ${recordBytes} bytes`);
    this.#blockBytes = recordBytes;
  }

  async setCompression(on: boolean): Promise<boolean> {
    try {
      await tapeOperation(this.#handle.fd, MT.compression, on ? 1 : 0);
      return true;
    } catch {
      return false; // no such mode page: the drive does not compress, or cannot be told
    }
  }

  rewind(): Promise<void> {
    this.#warned = false;
    return this.#operate(MT.rewind, 1, 'rewind');
  }

  async spaceFiles(count: number): Promise<void> {
    if (count > 0) await this.#operate(MT.fsf, count, `go ${count} files forward`);
  }

  backRecords(count: number): Promise<void> {
    return this.#operate(MT.bsr, count, `go ${count} records back`);
  }

  skipRecord(): Promise<void> {
    return this.#operate(MT.fsr, 1, 'go over a record');
  }

  toEndOfData(): Promise<void> {
    return this.#operate(MT.eom, 1, 'go to the end of data');
  }

  async read(into: Buffer): Promise<TapeRead> {
    const most = this.#blockBytes > 0 ? this.#blockBytes : MAX_RECORD_BYTES;
    const limit = Math.min(into.length, most);
    try {
      const { bytesRead } = await this.#handle.read(into, 0, limit, null);
      return bytesRead === 0 ? { kind: 'mark' } : { kind: 'record', bytes: bytesRead };
    } catch (error) {
      // st at the end of data: a blank check reads as EIO, with the head at the end (the status says so).
      if (errnoOf(error) === 'EIO' && (await this.#atEndOfData())) return { kind: 'end' };
      throw await this.#failure('read', error);
    }
  }

  async #atEndOfData(): Promise<boolean> {
    try {
      return ((await tapeDriveStatus(this.#handle.fd)).flags & GMT_EOD) !== 0;
    } catch {
      return false;
    }
  }

  async write(parts: readonly Buffer[]): Promise<TapeWritten> {
    let records = 0;
    for (const part of parts) {
      for (let at = 0; at < part.length; at += this.#recordBytes) {
        const record = part.subarray(at, at + this.#recordBytes);
        if (!(await this.#writeRecord(record))) return { records, earlyWarning: true, full: true };
        records++;
      }
    }
    return { records, earlyWarning: this.#warned, full: false };
  }

  /** False if the cartridge takes no more. */
  async #writeRecord(record: Buffer): Promise<boolean> {
    for (let tries = 1; ; tries++) {
      try {
        const { bytesWritten } = await this.#handle.write(record, 0, record.length, null);
        if (bytesWritten !== record.length)
          throw new B2Error(
            'io',
            `write ${this.path}: only ${bytesWritten} of ${record.length} bytes of a record were taken`,
          );
        return true;
      } catch (error) {
        if (errnoOf(error) !== 'ENOSPC') throw await this.#failure('write', error);
        this.#warned = true;
        if (tries === 2) return false;
      }
    }
  }

  async writeMarks(count: number): Promise<{ earlyWarning: boolean }> {
    for (let tries = 1; ; tries++) {
      try {
        await tapeOperation(this.#handle.fd, MT.weof, count);
        return { earlyWarning: this.#warned };
      } catch (error) {
        if (errnoOf(error) !== 'ENOSPC') throw await this.#failure('write a file mark on', error);
        this.#warned = true;
        // Behind the early warning the mark is written, and ENOSPC is the warning again.
        if (tries === 2) return { earlyWarning: true };
      }
    }
  }

  eject(): Promise<void> {
    return this.#operate(MT.offline, 1, 'eject the cartridge');
  }

  async load(): Promise<void> {
    this.#warned = false;
    // The kernel learns of another cartridge when the node is opened.
    await this.#handle.close();
    const { handle, readOnly } = await openNode(this.path);
    this.#handle = handle;
    this.#readOnly = readOnly;
    await tapeOperation(this.#handle.fd, MT.load, 1).catch(() => undefined); // loaded already, or no such command
    const startNs = this.#clock.monotonicNs();
    while (!(await this.status()).loaded) {
      const waitedMs = Number(this.#clock.monotonicNs() - startNs) / 1e6;
      const limitMs = (await this.#isEmpty()) ? EMPTY_MS : READY_MS;
      if (waitedMs > limitMs) throw noCartridge(this.path);
      await this.#clock.sleep(POLL_MS);
      await this.#handle.close();
      ({ handle: this.#handle, readOnly: this.#readOnly } = await openNode(this.path));
    }
  }

  /** The drive says that there is no cartridge in it, rather than that it is not ready. */
  async #isEmpty(): Promise<boolean> {
    try {
      return ((await tapeDriveStatus(this.#handle.fd)).flags & GMT_DR_OPEN) !== 0;
    } catch {
      return false;
    }
  }

  async close(): Promise<void> {
    try {
      await this.#handle.close();
    } catch (error) {
      throw ioError('close', this.path, error);
    }
  }

  async #operate(operation: number, count: number, what: string): Promise<void> {
    try {
      await tapeOperation(this.#handle.fd, operation, count);
    } catch (error) {
      throw await this.#failure(what, error);
    }
  }

  async #failure(what: string, error: unknown): Promise<B2Error> {
    if (error instanceof B2Error) return error;
    const errno = errnoOf(error);
    if (errno === 'ENOMEDIUM') return noCartridge(this.path);
    if (errno === 'EACCES' || errno === 'EROFS' || errno === 'EBADF') {
      const status = await this.status().catch(() => undefined);
      if (status?.writeProtected === true) return writeProtected(this.path);
    }
    const at = await this.status().catch(() => undefined);
    const where = at?.file === undefined ? '' : ` at file ${at.file}, record ${at.record ?? '?'}`;
    return ioError(what, `${this.path}${where}`, error);
  }
}

function noCartridge(path: string): B2Error {
  return new B2Error('not-found', `there is no cartridge in ${path}`, {
    hint: 'Put one in, and wait until the drive is ready ("mt -f DEVICE status").',
  });
}

/** Opens without waiting for a cartridge; a protected one only lets itself be read. */
async function openNode(path: string): Promise<{ handle: FileHandle; readOnly: boolean }> {
  const { O_RDWR, O_RDONLY, O_NONBLOCK } = constants;
  let handle: FileHandle;
  let readOnly = false;
  try {
    handle = await open(path, O_RDWR | O_NONBLOCK);
  } catch (error) {
    if (errnoOf(error) === 'EBUSY') {
      throw new B2Error('refused', `${path} is in use by another program`, {
        cause: error,
        hint: 'Wait for it, or find it with "fuser -v" on the device.',
      });
    }
    if (errnoOf(error) === 'ENOENT')
      throw new B2Error('not-found', `there is no tape drive ${path}`, {
        cause: error,
        hint: '"lsscsi -g" lists the drives (/dev/nst0, …); a directory or file stands in for one as file:PATH.',
      });
    if (errnoOf(error) !== 'EROFS' && errnoOf(error) !== 'EACCES')
      throw ioError('open', path, error);
    readOnly = true;
    try {
      handle = await open(path, O_RDONLY | O_NONBLOCK);
    } catch (again) {
      throw ioError('open', path, again);
    }
  }
  const found = await handle.stat();
  if (!found.isCharacterDevice()) {
    await handle.close();
    throw new B2Error('refused', `${path} is not a tape drive`, {
      hint: 'Tape drives are /dev/nst0, …; a directory stands in for one as file:PATH.',
    });
  }
  return { handle, readOnly };
}
