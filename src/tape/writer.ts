/** Writes the files of a tape: tar archives, cut into records of one size. */
import type { TapeDrive, TapeWritten } from '../devices/tape/drive.js';
import {
  TAR_END_BYTES,
  encodeTarComment,
  encodeTarHeader,
  tarPaddedBytes,
} from '../format/tape-tar.js';
import { tapeComment, type TapeFileId, type TapeFileKind } from '../format/tape.js';
import { copyBytes } from '../memory-copy.js';
import { alignedMemory, isPageAligned } from '../memory.js';
import { roundDown, roundUp } from '../units.js';

/** Bytes handed to the drive at once, about. */
const BATCH_BYTES = 8 * 1024 * 1024;
/** Pieces of lent memory that wait for the drive at most; it is given all that wait at once, because it does nothing between two calls. */
const MAX_WAITING = 4;

// Memory of this kind is freed late: one pair serves all cartridges of a process, one after the other.
let kept: readonly [Buffer, Buffer] | undefined;

function takeBatches(bytes: number): readonly [Buffer, Buffer] {
  const found = kept;
  kept = undefined;
  if (found?.[0].length === bytes) return found;
  const { buffer } = alignedMemory(2 * bytes);
  return [Buffer.from(buffer, 0, bytes), Buffer.from(buffer, bytes, bytes)];
}

/** Where a member came to lie. */
export interface MemberPlace {
  readonly file: number;
  /** In which its header begins. */
  readonly record: number;
  /** Offset in the file behind it. */
  readonly end: number;
}

/** Whole records for the drive. */
interface Handed {
  readonly records: Buffer;
  /** Called when the memory is not needed any more. */
  readonly release?: (() => void) | undefined;
}

/** A border between members at which the archive could be ended. */
interface Border {
  readonly offset: number;
  /** The bytes before it that lie in the same record. */
  readonly prefix: Buffer;
}

/**
 * One cartridge being written; `release` it. While the drive writes one batch of records the next one is filled. The head of the drive must be where `file` begins. When the cartridge takes no more, the head goes back
 * to the last border between members behind which there is room for the end of an archive, so that `tar` finds a whole one in every file.
 */
export class TapeWriter {
  /** The drive has warned, or the cartridge is full: end what is open and change the cartridge. */
  nearEnd = false;
  /** The cartridge takes no more: what was added last is not on it. */
  isFull = false;
  /** Records that are on the cartridge. */
  records = 0;
  readonly #drive: TapeDrive;
  readonly #recordBytes: number;
  readonly #cartridgeId: string;
  readonly #mtime: number;
  #batch: Buffer;
  /** The one that the drive may be reading. */
  #other: Buffer;
  #fill = 0;
  /** Records that the drive was given and has not acknowledged. */
  #pending = 0;
  readonly #waiting: Handed[] = [];
  /** Settles when the drive has done with all that it was given. */
  #inFlight: Promise<void> | undefined;
  /** The same for what it is writing now. */
  #writing: Promise<void> | undefined;
  #failure: { readonly error: unknown } | undefined;
  #file: number;
  /** Records of this file that are on the cartridge. */
  #fileRecords = 0;
  #open = false;
  #borders: Border[] = [];
  /** Of the member that was begun: bytes that are still to come, and those that fill up its last block. */
  #memberBytes = 0;
  #padBytes = 0;
  #idle = true;

  /** `mtime`: seconds since 1970, for the archives. */
  constructor(
    drive: TapeDrive,
    options: {
      readonly recordBytes: number;
      readonly cartridgeId: string;
      readonly file: number;
      readonly mtime: number;
    },
  ) {
    this.#drive = drive;
    this.#recordBytes = options.recordBytes;
    this.#cartridgeId = options.cartridgeId;
    this.#mtime = options.mtime;
    this.#file = options.file;
    [this.#batch, this.#other] = takeBatches(roundUp(BATCH_BYTES, options.recordBytes));
  }

  /** Waits until the drive has done with what it was given, whatever comes of it. The writer is of no more use. */
  async release(): Promise<void> {
    await this.#inFlight;
    kept = [this.#batch, this.#other];
  }

  /** The file that is open, or that comes next. */
  get file(): number {
    return this.#file;
  }

  /** The drive has nothing to do. */
  get isIdle(): boolean {
    return this.#idle;
  }

  get isOpen(): boolean {
    return this.#open;
  }

  /** Bytes of all records that are on the cartridge. */
  get bytes(): number {
    return this.records * this.#recordBytes;
  }

  /** Bytes of the open file so far. */
  get fileBytes(): number {
    return (this.#fileRecords + this.#pending) * this.#recordBytes + this.#fill;
  }

  /** Members of the open file that end here or before stay on the cartridge, whatever comes. */
  get safeBytes(): number {
    return (this.#fileRecords - 1) * this.#recordBytes - TAR_END_BYTES;
  }

  /** Begins a file. */
  async beginFile(kind: TapeFileKind, sessionId: string): Promise<void> {
    if (this.#open) throw new Error('a file is open');
    const id: TapeFileId = { cartridgeId: this.#cartridgeId, sessionId, file: this.#file, kind };
    this.#fill = 0;
    this.#fileRecords = 0;
    this.#borders = [];
    this.#memberBytes = 0;
    this.#open = true;
    await this.#put([encodeTarComment(tapeComment(id), this.#mtime)]);
  }

  /** Adds a member. If the cartridge becomes full, `isFull` says so, and {@link endFile} what of the file is on it. */
  async addMember(name: string, data: Buffer): Promise<MemberPlace> {
    const place = await this.beginMember(name, data.length);
    await this.addData(data);
    return place;
  }

  /** Begins a member of `sizeBytes`, all of which come by {@link addData} before anything else does, unless the cartridge becomes full. */
  async beginMember(name: string, sizeBytes: number): Promise<MemberPlace> {
    if (this.#memberBytes > 0) throw new Error('a member is open');
    const start = this.fileBytes;
    this.#noteBorder(start);
    const header = encodeTarHeader({ name, sizeBytes, type: 'file', mtime: this.#mtime });
    await this.#put([header]);
    this.#memberBytes = sizeBytes;
    this.#padBytes = tarPaddedBytes(sizeBytes) - sizeBytes;
    const end = start + header.length + sizeBytes + this.#padBytes;
    return { file: this.#file, record: Math.floor(start / this.#recordBytes), end };
  }

  /** Adds the next bytes of the member that was begun. */
  async addData(data: Buffer): Promise<void> {
    if (data.length > this.#memberBytes) throw new Error('more bytes than the member has');
    this.#memberBytes -= data.length;
    await this.#put([data]);
    if (this.#memberBytes === 0) await this.#put([Buffer.alloc(this.#padBytes)]);
  }

  /**
   * {@link addData} of bytes `at` to `at + length` of `memory`, which the drive may write from where they are: then those before them are overwritten. `release` is
   * called when the memory is not needed any more.
   */
  async addLent(memory: Buffer, at: number, length: number, release: () => void): Promise<void> {
    const recordBytes = this.#recordBytes;
    const partial = this.#fill % recordBytes;
    const begin = at - partial;
    const bytes = roundDown(partial + length, recordBytes);
    if (bytes === 0 || begin < 0 || !isPageAligned(memory.subarray(begin)) || this.isFull) {
      await this.addData(memory.subarray(at, at + length));
      release();
      return;
    }
    if (length > this.#memberBytes) throw new Error('more bytes than the member has');
    this.#memberBytes -= length;
    if (this.#fill > partial) await this.#send();
    // The record that was begun is completed there, and the one that is begun at the end goes on here.
    copyBytes(memory.subarray(begin), this.#batch.subarray(0, partial));
    copyBytes(this.#batch, memory.subarray(begin + bytes, at + length));
    this.#fill = partial + length - bytes;
    while (this.#waiting.length >= MAX_WAITING) await this.#writing;
    this.#throwFailure();
    if (this.isFull) {
      release();
      return;
    }
    this.#give({ records: memory.subarray(begin, begin + bytes), release });
    if (this.#memberBytes === 0) await this.#put([Buffer.alloc(this.#padBytes)]);
  }

  /** Hands whole records to the drive, so that only a part of one waits here. */
  async settle(): Promise<void> {
    await this.#send();
  }

  /**
   * Ends the file and writes its mark, or marks. Resolves to the bytes of it that are on the cartridge: members that end behind them are not. 0: nothing of
   * the file is there, and it counts as not begun.
   */
  async endFile(marks = 1): Promise<number> {
    if (this.#memberBytes > 0 && !this.isFull) throw new Error('a member is open');
    this.#memberBytes = 0;
    let kept = this.fileBytes;
    if (!this.isFull) {
      this.#noteBorder(kept);
      await this.#put([Buffer.alloc(roundUp(kept + TAR_END_BYTES, this.#recordBytes) - kept)]);
      await this.#send();
      await this.#acknowledged();
    }
    if (this.isFull) kept = await this.#cut();
    this.#fill = 0;
    this.#open = false;
    const { earlyWarning } = await this.#drive.writeMarks(marks);
    if (earlyWarning) this.nearEnd = true;
    if (kept > 0) this.#file++;
    this.#fileRecords = 0;
    return kept;
  }

  /** Goes back to the last border that leaves room for the end of the archive, and ends it there. */
  async #cut(): Promise<number> {
    const flushed = this.#fileRecords * this.#recordBytes;
    const border = this.#borders.findLast(
      (b) => roundUp(b.offset + TAR_END_BYTES, this.#recordBytes) <= flushed,
    );
    const record = border === undefined ? 0 : Math.floor(border.offset / this.#recordBytes);
    const back = this.#fileRecords - record;
    if (back > 0) await this.#drive.backRecords(back);
    this.records -= back;
    this.#fileRecords = record;
    if (border === undefined) return 0;
    this.#fill = 0;
    this.isFull = false;
    const length =
      roundUp(border.offset + TAR_END_BYTES, this.#recordBytes) - record * this.#recordBytes;
    await this.#put([border.prefix, Buffer.alloc(length - border.prefix.length)]);
    await this.#send();
    await this.#acknowledged();
    const fits = !this.isFull;
    this.isFull = true;
    return fits ? border.offset : 0;
  }

  #noteBorder(offset: number): void {
    const inRecord = offset % this.#recordBytes;
    const prefix = Buffer.from(this.#batch.subarray(this.#fill - inRecord, this.#fill));
    const safe = this.safeBytes;
    // The last safe one may be needed; those before it never are.
    const first = this.#borders.findLastIndex((b) => b.offset <= safe);
    if (first > 0) this.#borders = this.#borders.slice(first);
    this.#borders.push({ offset, prefix });
  }

  async #put(parts: readonly Buffer[]): Promise<void> {
    for (const part of parts) {
      for (let at = 0; at < part.length && !this.isFull;) {
        const n = Math.min(part.length - at, this.#batch.length - this.#fill);
        copyBytes(this.#batch.subarray(this.#fill), part.subarray(at, at + n));
        at += n;
        this.#fill += n;
        if (this.#fill === this.#batch.length) await this.#send();
      }
    }
  }

  /** Gives the drive the whole records of the batch, and goes on with the other one. */
  async #send(): Promise<void> {
    await this.#acknowledged();
    const bytes = roundDown(this.#fill, this.#recordBytes);
    if (bytes === 0 || this.isFull) return;
    this.#give({ records: this.#batch.subarray(0, bytes) });
    this.#fill = this.#batch.copy(this.#other, 0, bytes, this.#fill);
    [this.#batch, this.#other] = [this.#other, this.#batch];
  }

  #give(handed: Handed): void {
    this.#waiting.push(handed);
    this.#pending += handed.records.length / this.#recordBytes;
    if (this.#idle) this.#inFlight = this.#work();
  }

  /** Has the drive write what waits, until nothing does. Never rejects. */
  async #work(): Promise<void> {
    this.#idle = false;
    while (this.#waiting.length > 0 && !this.isFull && this.#failure === undefined) {
      this.#writing = this.#write(this.#waiting.splice(0));
      await this.#writing;
    }
    // What the cartridge does not take is written again elsewhere.
    for (const { release } of this.#waiting.splice(0)) release?.();
    this.#pending = 0;
    this.#idle = true;
  }

  async #write(handed: readonly Handed[]): Promise<void> {
    try {
      const written = await this.#drive.write(handed.map((h) => h.records));
      this.#account(handed, written);
    } catch (error) {
      this.#failure = { error };
    } finally {
      for (const { release } of handed) release?.();
    }
  }

  #account(handed: readonly Handed[], { records, earlyWarning, full }: TapeWritten): void {
    for (const h of handed) this.#pending -= h.records.length / this.#recordBytes;
    this.#fileRecords += records;
    this.records += records;
    if (earlyWarning || full) this.nearEnd = true;
    this.isFull = full;
  }

  /** Waits for what the drive was given. */
  async #acknowledged(): Promise<void> {
    await this.#inFlight;
    this.#throwFailure();
  }

  #throwFailure(): void {
    const { error } = this.#failure ?? {};
    if (this.#failure === undefined) return;
    this.#failure = undefined;
    throw error;
  }
}
