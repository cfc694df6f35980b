/**
 * Reads the files of a tape: records put together to tar members again. What cannot be read costs as little as possible: an unreadable or torn
 * record counts as zeros of the same length, so that what lies behind keeps its place, and where no header stands where one should, the
 * next one is looked for.
 */
import type { TapeDrive } from '../devices/tape/drive.js';
import { isKind, messageOf } from '../errors.js';
import {
  TAR_BLOCK_BYTES,
  decodeTarComment,
  decodeTarHeader,
  tarPaddedBytes,
  type TarHeader,
} from '../format/tape-tar.js';
import { MAX_RECORD_BYTES, TAPE_ROOT, parseTapeComment, type TapeFileId } from '../format/tape.js';
import { MAX_PACK_BYTES } from '../format/pack.js';

/** A record that could not be used, or archives that are not what they should be. */
export interface TapeDamage {
  readonly file: number;
  readonly record: number;
  readonly reason: string;
}

export type TapeItem =
  /** Which file this is, as it says itself. */
  | { readonly kind: 'file'; readonly id: TapeFileId }
  /** `data` is in a buffer of its own, that of `buffer`, if that was given. `whole`: none of it lay in a damaged record. */
  | {
      readonly kind: 'member';
      readonly name: string;
      readonly data: Buffer<SharedArrayBuffer>;
      readonly file: number;
      readonly record: number;
      readonly whole: boolean;
    };

export interface ReadFileOptions {
  readonly drive: TapeDrive;
  /** Size of the records; 0 takes that of the first one. */
  readonly recordBytes: number;
  /** For messages: what file the head is in. */
  readonly file: number;
  /** Hears of damage. */
  readonly onDamage: (damage: TapeDamage) => void;
  /** Room for the data of a member. Default: new memory. */
  readonly buffer?: (bytes: number) => SharedArrayBuffer;
  /** Members to be passed over without keeping their data. */
  readonly skip?: (name: string) => boolean;
  /** Told the bytes of each record. */
  readonly onRecord?: (bytes: number) => void;
}

/** Unreadable records in a row after which a file is given up. */
const MAX_BAD_RECORDS = 64;
const MAX_HEADER_BYTES = 1024 * 1024;

/** The name of the repository's object that a member is; undefined for others. */
export function objectOfMember(name: string): string | undefined {
  return name.startsWith(TAPE_ROOT) ? name.slice(TAPE_ROOT.length) : undefined;
}

/** Records of one file as a stream of bytes. */
class Stream {
  /** `mark` or `end` once that was met. */
  ended: 'mark' | 'end' | undefined;
  /** Bytes handed out so far. */
  position = 0;
  recordBytes: number;
  /** Whether damage was met since this was set to false. */
  damaged = false;
  readonly #options: ReadFileOptions;
  readonly #room: Buffer = Buffer.allocUnsafeSlow(MAX_RECORD_BYTES);
  #back: Buffer = Buffer.alloc(0);
  #have: Buffer = Buffer.alloc(0);
  #record = 0;
  #bad = 0;

  constructor(options: ReadFileOptions) {
    this.#options = options;
    this.recordBytes = options.recordBytes;
  }

  /** The record in which the next byte lies. */
  get record(): number {
    return this.recordBytes === 0 ? 0 : Math.floor(this.position / this.recordBytes);
  }

  /** Fills `into` as far as the file goes. */
  async take(into: Buffer): Promise<number> {
    let at = 0;
    while (at < into.length) {
      if (this.#back.length > 0) {
        const n = this.#back.copy(into, at);
        this.#back = this.#back.subarray(n);
        at += n;
        continue;
      }
      if (this.#have.length === 0) {
        // Straight to where it belongs, where a record of any length has room there.
        const room =
          into.length - at >= MAX_RECORD_BYTES
            ? into.subarray(at, at + MAX_RECORD_BYTES)
            : undefined;
        if (!(await this.#next(room))) break;
        if (room !== undefined && this.#isIn(room)) {
          at += this.#have.length;
          this.#have = Buffer.alloc(0);
          continue;
        }
      }
      const n = this.#have.copy(into, at);
      this.#have = this.#have.subarray(n);
      at += n;
    }
    this.position += at;
    return at;
  }

  /** Puts bytes back: they come first again. */
  unread(bytes: Buffer): void {
    this.#back = Buffer.concat([bytes, this.#back]);
    this.position -= bytes.length;
  }

  #isIn(room: Buffer): boolean {
    return this.#have.buffer === room.buffer && this.#have.byteOffset === room.byteOffset;
  }

  /** Reads the next record, to `room` or to the stream's own. */
  async #next(room = this.#room): Promise<boolean> {
    if (this.ended !== undefined) return false;
    const { drive, file, onDamage, onRecord } = this.#options;
    for (;;) {
      try {
        const found = await drive.read(room);
        if (found.kind !== 'record') {
          this.ended = found.kind;
          return false;
        }
        this.#bad = 0;
        if (this.recordBytes === 0) this.recordBytes = found.bytes;
        onRecord?.(found.bytes);
        if (found.bytes !== this.recordBytes) {
          this.damaged = true;
          onDamage({
            file,
            record: this.#record,
            reason: `the record has ${found.bytes} bytes, not ${this.recordBytes}`,
          });
          room.fill(0, found.bytes, this.recordBytes);
        }
        this.#have = room.subarray(0, Math.max(this.recordBytes, 1));
        this.#record++;
        return true;
      } catch (error) {
        if (!isKind(error, 'io')) throw error;
        if (!(await drive.status()).loaded) throw error;
        onDamage({ file, record: this.#record, reason: messageOf(error) });
        this.damaged = true;
        if (++this.#bad > MAX_BAD_RECORDS || this.recordBytes === 0) {
          this.ended = 'end';
          return false;
        }
        await drive.skipRecord().catch(() => undefined); // then the head is behind it already
        this.#have = Buffer.alloc(this.recordBytes);
        this.#record++;
        return true;
      }
    }
  }

  /** Reads on to the mark. */
  async drain(): Promise<void> {
    this.#back = Buffer.alloc(0);
    do {
      this.position += this.#have.length;
      this.#have = Buffer.alloc(0);
    } while (await this.#next());
  }
}

/** How a file ended. */
export interface TapeFileEnd {
  /** `end`: with the end of data. */
  readonly ended: 'mark' | 'end';
  /** It had no record at all. */
  readonly empty: boolean;
  /** The archive does not end as one should: whoever wrote it was interrupted. */
  readonly breaksOff: boolean;
}

/** Reads one file to its mark; the head is then behind that. */
export async function* readTapeFile(
  options: ReadFileOptions,
): AsyncGenerator<TapeItem, TapeFileEnd> {
  const { file, onDamage } = options;
  const stream = new Stream(options);
  const block = Buffer.alloc(TAR_BLOCK_BYTES);
  let lost = false;
  /** Blocks of zeros in a row: two end an archive. */
  let zeros = 0;
  /** The data of the member before, from where a header stands in it. */
  let last: Buffer | undefined;
  const damage = (reason: string): void => {
    onDamage({ file, record: stream.record, reason });
  };
  for (;;) {
    const record = stream.record;
    stream.damaged = false;
    const n = await stream.take(block);
    if (n === 0) break;
    if (n < TAR_BLOCK_BYTES) {
      damage('a block of the archive is cut off');
      zeros = 0;
      break;
    }
    const header = decodeTarHeader(block, 0);
    if (header === undefined) {
      if (block.every((b) => b === 0)) {
        last = undefined;
        zeros++;
        continue;
      }
      zeros = 0;
      if (!lost) damage('there is no header of a tar member where one should be');
      lost = true;
      // A record that is missing altogether: the next header came too early, in what was taken for the data of the member before.
      if (last !== undefined) stream.unread(Buffer.concat([last, block]));
      last = undefined;
      continue;
    }
    lost = false;
    zeros = 0;
    last = undefined;
    if (
      header.sizeBytes > MAX_PACK_BYTES ||
      (header.type !== 'file' && header.sizeBytes > MAX_HEADER_BYTES)
    ) {
      damage(`a member of ${header.sizeBytes} bytes`);
      continue;
    }
    const padded = tarPaddedBytes(header.sizeBytes);
    const room = options.skip?.(header.name) === true ? undefined : options.buffer?.(padded);
    const whole = Buffer.from(room ?? new SharedArrayBuffer(padded), 0, padded);
    const got = await stream.take(whole);
    if (got < padded) {
      whole.fill(0, got);
      stream.damaged = true;
      damage(`the file ends within the member ${header.name}`);
    }
    const data = whole.subarray(0, header.sizeBytes);
    if (header.type === 'global') {
      const id = parseTapeComment(decodeTarComment(data) ?? '');
      if (id !== undefined) {
        if (id.file !== file) damage(`this says that it is file ${id.file}: a file mark is lost`);
        yield { kind: 'file', id };
      }
      continue;
    }
    if (header.type !== 'file' || options.skip?.(header.name) === true) continue;
    const hidden = nextIsHeader(header) ? headerWithin(whole) : undefined;
    last = hidden === undefined ? undefined : Buffer.from(whole.subarray(hidden));
    yield { kind: 'member', name: header.name, data, file, record, whole: !stream.damaged };
  }
  await stream.drain();
  return { ended: stream.ended ?? 'end', empty: stream.position === 0, breaksOff: zeros < 2 };
}

/** Only members that span records can hide the header of another. */
function nextIsHeader(header: TarHeader): boolean {
  return header.sizeBytes >= 4096;
}

/** Offset of the first good header in the data of a member, if there is one. */
function headerWithin(data: Buffer): number | undefined {
  for (let at = 0; at + TAR_BLOCK_BYTES <= data.length; at += TAR_BLOCK_BYTES) {
    const header = decodeTarHeader(data, at);
    if (
      header !== undefined &&
      (header.type === 'global' || objectOfMember(header.name) !== undefined)
    )
      return at;
  }
  return undefined;
}
