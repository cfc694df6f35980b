/** Pack header, footer and trailer (FORMAT.md 5.1, 5.5). */
import { crc32 } from 'node:zlib';
import { B2Error } from '../errors.js';
import { checkZero, damaged } from './bytes.js';
import {
  CHUNK_ENTRY_BYTES,
  FOOTER_NUMBER,
  FRAME_HEADER_BYTES,
  FrameType,
  decodeFrameHeader,
  encodeFrameHeader,
  type Compression,
} from './frame.js';
import { SEAL_BYTES, ZERO_NONCE, type KeyRing } from './seal.js';

export const PACK_HEADER_BYTES = 64;
export const PACK_TRAILER_BYTES = 16;
export const PACK_VERSION = 1;
/** Bytes of a pack at most. */
export const MAX_PACK_BYTES = 1024 * 1024 * 1024;
const PACK_MAGIC = Buffer.from('B2PACK\0\0', 'latin1'); // "B2PACK"; do not change
const TRAILER_MAGIC = 0x4550_3242; // "B2PE"; do not change
const FOOTER_ENTRY_BYTES = 20;
const SALT_BYTES = 16;

export interface PackHeader {
  readonly packId: string;
  readonly repositoryId: string;
  readonly encrypted: boolean;
  /** 0, plus 1 for each compaction. */
  readonly generation: number;
  readonly createdNs: bigint;
}

export function encodePackHeader(h: PackHeader): Buffer {
  const b = Buffer.alloc(PACK_HEADER_BYTES);
  PACK_MAGIC.copy(b, 0);
  b.writeUInt16LE(PACK_VERSION, 8);
  b.writeUInt16LE(h.encrypted ? 1 : 0, 10);
  b.writeUInt32LE(h.generation, 12);
  b.write(h.packId, 16, 'hex');
  b.write(h.repositoryId, 32, 'hex');
  b.writeBigUInt64LE(h.createdNs, 48);
  b.writeUInt32LE(crc32(b.subarray(0, 60)), 60);
  return b;
}

/** Refuses a newer version (kind `unsupported`), a broken header or one of another repository (kind `damaged`). */
export function decodePackHeader(
  b: Buffer,
  expect: { packId: string; repositoryId: string },
): PackHeader {
  const what = `pack ${expect.packId}`;
  if (b.length < PACK_HEADER_BYTES) throw damaged(what, 0, 'the header is cut off');
  if (!b.subarray(0, 8).equals(PACK_MAGIC)) throw damaged(what, 0, 'this is not a pack');
  if (b.readUInt32LE(60) !== crc32(b.subarray(0, 60))) {
    throw damaged(what, 0, 'the checksum of the header is wrong');
  }
  const version = b.readUInt16LE(8);
  if (version !== PACK_VERSION) throw newerVersion(what, version);
  checkZero(b, 56, 60, what);
  const packId = b.toString('hex', 16, 32);
  const repositoryId = b.toString('hex', 32, 48);
  if (packId !== expect.packId)
    throw damaged(what, 16, `it holds pack ${packId}: files were exchanged`);
  if (repositoryId !== expect.repositoryId) {
    throw damaged(what, 32, `it belongs to another repository (${repositoryId})`);
  }
  return {
    packId,
    repositoryId,
    encrypted: (b.readUInt16LE(10) & 1) === 1,
    generation: b.readUInt32LE(12),
    createdNs: b.readBigUInt64LE(48),
  };
}

export function newerVersion(what: string, version: number): B2Error {
  return new B2Error(
    'unsupported',
    `${what} has format version ${version}; this b2 reads version 1`,
    {
      hint: 'Use the b2 version that wrote it, or a newer one.',
    },
  );
}

/** One frame in a footer. */
export interface FooterFrame {
  readonly number: number;
  readonly offset: number;
  readonly storedBytes: number;
  readonly plainBytes: number;
  readonly type: FrameType;
  readonly compression: Compression;
  readonly count: number;
}

/** What a sealed pack says about itself. `ids` and `lengths` run over all chunks in order of frame and sub. */
export interface PackFooter {
  readonly frames: readonly FooterFrame[];
  /** 32 bytes a chunk. */
  readonly ids: Buffer;
  readonly lengths: Uint32Array;
}

/** The footer frame and the trailer, to be appended at `offset` of the pack. `salt` is 16 fresh random bytes. */
export function encodeFooter(
  footer: PackFooter,
  packId: string,
  offset: number,
  salt: Buffer,
  keys: KeyRing,
): Buffer {
  const chunks = footer.lengths.length;
  const body = Buffer.alloc(
    8 + footer.frames.length * FOOTER_ENTRY_BYTES + chunks * CHUNK_ENTRY_BYTES,
  );
  body.writeUInt32LE(footer.frames.length, 0);
  body.writeUInt32LE(chunks, 4);
  let at = 8;
  for (const f of footer.frames) {
    body.writeUInt32LE(f.number, at);
    body.writeUInt32LE(f.offset, at + 4);
    body.writeUInt32LE(f.storedBytes, at + 8);
    body.writeUInt32LE(f.plainBytes, at + 12);
    body[at + 16] = f.type;
    body[at + 17] = f.compression;
    body.writeUInt16LE(f.count, at + 18);
    at += FOOTER_ENTRY_BYTES;
  }
  for (let i = 0; i < chunks; i++) {
    footer.ids.copy(body, at, i * 32, i * 32 + 32);
    body.writeUInt32LE(footer.lengths[i] ?? 0, at + 32);
    at += CHUNK_ENTRY_BYTES;
  }
  const out = Buffer.alloc(
    FRAME_HEADER_BYTES + SALT_BYTES + body.length + SEAL_BYTES + PACK_TRAILER_BYTES,
  );
  encodeFrameHeader(
    {
      type: FrameType.footer,
      compression: 0,
      count: 0,
      number: FOOTER_NUMBER,
      storedBytes: SALT_BYTES + body.length + SEAL_BYTES,
      plainBytes: body.length,
      headBytes: 0,
    },
    out,
    0,
  );
  salt.copy(out, FRAME_HEADER_BYTES);
  const aad = Buffer.concat([
    Buffer.from(packId, 'hex'),
    out.subarray(0, FRAME_HEADER_BYTES + SALT_BYTES),
  ]);
  keys.footerSealer(salt).sealInto(ZERO_NONCE, aad, [body], out, FRAME_HEADER_BYTES + SALT_BYTES);
  const trailer = out.subarray(out.length - PACK_TRAILER_BYTES);
  trailer.writeUInt32LE(TRAILER_MAGIC, 0);
  trailer.writeUInt32LE(offset, 4);
  trailer.writeUInt32LE(out.length - PACK_TRAILER_BYTES, 8);
  trailer.writeUInt32LE(crc32(trailer.subarray(0, 12)), 12);
  return out;
}

/** Where the footer lies, from the last 16 bytes of a pack of `packBytes`; undefined if the pack is not sealed. */
export function decodeTrailer(
  b: Buffer,
  packBytes: number,
): { offset: number; lengthBytes: number } | undefined {
  if (b.length !== PACK_TRAILER_BYTES || b.readUInt32LE(0) !== TRAILER_MAGIC) return undefined;
  if (b.readUInt32LE(12) !== crc32(b.subarray(0, 12))) return undefined;
  const offset = b.readUInt32LE(4);
  const lengthBytes = b.readUInt32LE(8);
  if (offset < PACK_HEADER_BYTES || offset + lengthBytes + PACK_TRAILER_BYTES !== packBytes)
    return undefined;
  return { offset, lengthBytes };
}

/** Opens the footer frame `b` of pack `packId`. Kind `damaged` if anything about it is wrong. */
export function decodeFooter(b: Buffer, packId: string, keys: KeyRing): PackFooter {
  const what = `pack ${packId}: footer`;
  const header = decodeFrameHeader(b, 0, what);
  if (header.type !== FrameType.footer || header.compression !== 0)
    throw damaged(what, 0, 'not a footer');
  const start = FRAME_HEADER_BYTES + SALT_BYTES;
  if (header.storedBytes !== b.length - FRAME_HEADER_BYTES || b.length < start + SEAL_BYTES) {
    throw damaged(what, 0, 'the footer has another length than its trailer says');
  }
  const salt = b.subarray(FRAME_HEADER_BYTES, start);
  const aad = Buffer.concat([Buffer.from(packId, 'hex'), b.subarray(0, start)]);
  const body = keys.footerSealer(salt).open(ZERO_NONCE, aad, b.subarray(start));
  if (body === undefined) throw damaged(what, 0, 'its seal does not open');
  const n = body.readUInt32LE(0);
  const m = body.readUInt32LE(4);
  if (
    body.length !== 8 + n * FOOTER_ENTRY_BYTES + m * CHUNK_ENTRY_BYTES ||
    body.length !== header.plainBytes
  ) {
    throw damaged(what, 0, 'its counts do not fit its length');
  }
  const frames: FooterFrame[] = [];
  let at = 8;
  let chunks = 0;
  let before = -1;
  for (let i = 0; i < n; i++) {
    const number = body.readUInt32LE(at);
    const type = body[at + 16];
    const compression = body[at + 17];
    if (type !== 1 && type !== 2 && type !== 3) throw damaged(what, at, `frame of type ${type}`);
    if (compression !== 0 && compression !== 1)
      throw damaged(what, at, `compression ${compression}`);
    if (number <= before) throw damaged(what, at, 'frame numbers do not ascend');
    before = number;
    const frame: FooterFrame = {
      number,
      offset: body.readUInt32LE(at + 4),
      storedBytes: body.readUInt32LE(at + 8),
      plainBytes: body.readUInt32LE(at + 12),
      type,
      compression,
      count: body.readUInt16LE(at + 18),
    };
    chunks += frame.count;
    frames.push(frame);
    at += FOOTER_ENTRY_BYTES;
  }
  if (chunks !== m) throw damaged(what, 0, 'its frames hold another number of chunks');
  const ids = Buffer.allocUnsafe(m * 32);
  const lengths = new Uint32Array(m);
  for (let i = 0; i < m; i++) {
    body.copy(ids, i * 32, at, at + 32);
    lengths[i] = body.readUInt32LE(at + 32);
    at += CHUNK_ENTRY_BYTES;
  }
  return { frames, ids, lengths };
}
