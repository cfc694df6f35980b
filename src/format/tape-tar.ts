/**
 * The parts of tar that tapes use (POSIX.1-2001 pax, FORMAT.md section 11): ustar headers, and one global pax header a file
 * whose comment says which file of which tape it is.
 */
import { asBuffer } from './bytes.js';

/** Bytes of a tar block: headers are one, contents are padded to whole ones. */
export const TAR_BLOCK_BYTES = 512;

/** Zeros that end an archive. */
export const TAR_END_BYTES = 2 * TAR_BLOCK_BYTES;

const USTAR = Buffer.from('ustar\0' + '00', 'latin1');
const MAX_NAME = 100;
const MAX_SIZE = 0o77777777777;

/** What of a header is used here. */
export interface TarHeader {
  /** At most 100 characters of ASCII. */
  readonly name: string;
  readonly sizeBytes: number;
  /** `file`: a regular file; `global`: a pax header for the whole archive; `other`: anything else, passed over. */
  readonly type: 'file' | 'global' | 'other';
  /** Seconds since 1970. */
  readonly mtime: number;
}

const TYPE_FLAG = { file: '0', global: 'g', other: 'x' } as const;

function octal(into: Buffer, value: number, at: number, width: number): void {
  into.write(value.toString(8).padStart(width - 1, '0'), at, 'latin1');
}

function checksum(b: Buffer, at: number): number {
  let sum = 0;
  for (let i = 0; i < TAR_BLOCK_BYTES; i++) sum += i >= 148 && i < 156 ? 32 : (b[at + i] ?? 0);
  return sum;
}

/** The 512 bytes of a header. Throws RangeError for what does not fit. */
export function encodeTarHeader(h: TarHeader): Buffer {
  if (h.name.length > MAX_NAME || !/^[\x21-\x7e]+$/.test(h.name))
    throw new RangeError(`not a name for a tar header: ${h.name}`);
  if (!Number.isSafeInteger(h.sizeBytes) || h.sizeBytes < 0 || h.sizeBytes > MAX_SIZE)
    throw new RangeError(`a tar member of ${h.sizeBytes} bytes`);
  const b = Buffer.alloc(TAR_BLOCK_BYTES);
  b.write(h.name, 0, 'latin1');
  octal(b, 0o600, 100, 8);
  octal(b, 0, 108, 8);
  octal(b, 0, 116, 8);
  octal(b, h.sizeBytes, 124, 12);
  octal(b, h.mtime, 136, 12);
  b.write(TYPE_FLAG[h.type], 156, 'latin1');
  USTAR.copy(b, 257);
  b.write('root', 265, 'latin1');
  b.write('root', 297, 'latin1');
  b.write(`${checksum(b, 0).toString(8).padStart(6, '0')}\0 `, 148, 'latin1');
  return b;
}

function octalOf(b: Buffer, at: number, width: number): number | undefined {
  const m = /^ *([0-7]+)[ \0]*$/.exec(b.toString('latin1', at, at + width));
  const n = m === null ? Number.NaN : Number.parseInt(m[1] ?? '', 8);
  return Number.isSafeInteger(n) ? n : undefined;
}

/** The header in the block at `at`; undefined unless magic and checksum are right. */
export function decodeTarHeader(b: Buffer, at: number): TarHeader | undefined {
  if (b.length < at + TAR_BLOCK_BYTES || b.compare(USTAR, 0, 5, at + 257, at + 262) !== 0)
    return undefined;
  if (octalOf(b, at + 148, 8) !== checksum(b, at)) return undefined;
  const sizeBytes = octalOf(b, at + 124, 12);
  const mtime = octalOf(b, at + 136, 12);
  if (sizeBytes === undefined || mtime === undefined) return undefined;
  const raw = b.toString('latin1', at, at + MAX_NAME);
  const zero = raw.indexOf('\0');
  const flag = b.toString('latin1', at + 156, at + 157);
  return {
    name: zero < 0 ? raw : raw.slice(0, zero),
    sizeBytes,
    mtime,
    type: flag === '0' || flag === '\0' ? 'file' : flag === 'g' ? 'global' : 'other',
  };
}

/** Bytes that a member of `sizeBytes` takes behind its header. */
export function tarPaddedBytes(sizeBytes: number): number {
  return Math.ceil(sizeBytes / TAR_BLOCK_BYTES) * TAR_BLOCK_BYTES;
}

/** A global pax header with a comment (ASCII): its header block and its padded contents. */
export function encodeTarComment(comment: string, mtime: number): Buffer {
  const rest = ` comment=${comment}\n`;
  let length = rest.length + 1;
  while (String(length).length + rest.length !== length)
    length = String(length).length + rest.length;
  const body = Buffer.alloc(tarPaddedBytes(length));
  body.write(`${length}${rest}`, 0, 'latin1');
  const header = encodeTarHeader({
    name: 'pax_global_header',
    sizeBytes: length,
    type: 'global',
    mtime,
  });
  return Buffer.concat([header, body]);
}

/** The comment in the contents of a pax header; undefined if there is none. */
export function decodeTarComment(contents: Uint8Array): string | undefined {
  const text = asBuffer(contents).toString('latin1');
  for (let at = 0; at < text.length;) {
    const m = /^(\d{1,6}) ([^=\n]+)=/.exec(text.slice(at));
    const length = Number(m?.[1] ?? 0);
    if (m === null || length <= m[0].length || at + length > text.length) return undefined;
    if (m[2] === 'comment') return text.slice(at + m[0].length, at + length - 1);
    at += length;
  }
  return undefined;
}
