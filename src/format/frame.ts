/** Frames of a pack (FORMAT.md 5.2). */
import { crc32 } from 'node:zlib';
import { checkZero, damaged } from './bytes.js';
import { SEAL_BYTES } from './seal.js';

export const FRAME_HEADER_BYTES = 32;
/** "B2FR"; do not change. */
export const FRAME_MAGIC = 0x5246_3242;
export const FrameType = { chunks: 1, extents: 2, commit: 3, footer: 4 } as const;
export type FrameType = (typeof FrameType)[keyof typeof FrameType];
export const Compression = { none: 0, lz4: 1 } as const;
export type Compression = (typeof Compression)[keyof typeof Compression];

/** Bytes of a chunk's entry in the head of its frame. */
export const CHUNK_ENTRY_BYTES = 36;
/** Chunks that share one frame at most. */
export const MAX_FRAME_CHUNKS = 4096;
/** Plain bytes of a frame's body at most. */
export const MAX_BODY_BYTES = 16 * 1024 * 1024;
/** The number of a footer frame. */
export const FOOTER_NUMBER = 0xffff_ffff;
/** Frames of a pack at most. */
export const MAX_PACK_FRAMES = 65_536;
/** Chunks of a pack at most: its footer stays below the limit of a body. */
export const MAX_PACK_CHUNKS = 262_144;

export interface FrameHeader {
  readonly type: FrameType;
  readonly compression: Compression;
  /** Chunks in the frame. */
  readonly count: number;
  readonly number: number;
  /** Bytes after the header. */
  readonly storedBytes: number;
  /** Bytes of the body before compression. */
  readonly plainBytes: number;
  readonly headBytes: number;
}

export function encodeFrameHeader(h: FrameHeader, into: Buffer, offset: number): void {
  into.writeUInt32LE(FRAME_MAGIC, offset);
  into[offset + 4] = h.type;
  into[offset + 5] = h.compression;
  into.writeUInt16LE(h.count, offset + 6);
  into.writeUInt32LE(h.number, offset + 8);
  into.writeUInt32LE(h.storedBytes, offset + 12);
  into.writeUInt32LE(h.plainBytes, offset + 16);
  into.writeUInt32LE(h.headBytes, offset + 20);
  into.writeUInt32LE(0, offset + 24);
  into.writeUInt32LE(crc32(into.subarray(offset, offset + 28)), offset + 28);
}

/** Decodes and validates a header; `what` names the pack and frame in errors (kind `damaged`). */
export function decodeFrameHeader(buf: Buffer, offset: number, what: string): FrameHeader {
  if (buf.length < offset + FRAME_HEADER_BYTES)
    throw damaged(what, offset, 'the frame header is cut off');
  if (buf.readUInt32LE(offset) !== FRAME_MAGIC) throw damaged(what, offset, 'no frame starts here');
  if (buf.readUInt32LE(offset + 28) !== crc32(buf.subarray(offset, offset + 28))) {
    throw damaged(what, offset, 'the checksum of the frame header is wrong');
  }
  checkZero(buf, offset + 24, offset + 28, what);
  const type = buf[offset + 4];
  const compression = buf[offset + 5];
  if (type !== 1 && type !== 2 && type !== 3 && type !== 4) {
    throw damaged(what, offset, `unknown frame type ${type}`);
  }
  if (compression !== 0 && compression !== 1) {
    throw damaged(what, offset, `unknown compression ${compression}`);
  }
  const count = buf.readUInt16LE(offset + 6);
  const number = buf.readUInt32LE(offset + 8);
  const storedBytes = buf.readUInt32LE(offset + 12);
  const plainBytes = buf.readUInt32LE(offset + 16);
  const headBytes = buf.readUInt32LE(offset + 20);
  const chunks = type === FrameType.chunks;
  if (
    (chunks ? count < 1 || count > MAX_FRAME_CHUNKS : count !== 0) ||
    headBytes !== count * CHUNK_ENTRY_BYTES ||
    plainBytes > MAX_BODY_BYTES ||
    storedBytes < headBytes + SEAL_BYTES ||
    storedBytes > headBytes + MAX_BODY_BYTES + 2 * SEAL_BYTES ||
    (type === FrameType.footer) !== (number === FOOTER_NUMBER)
  ) {
    throw damaged(what, offset, 'the fields of the frame header contradict each other');
  }
  return { type, compression, count, number, storedBytes, plainBytes, headBytes };
}

/** A chunk's entry in the head of its frame, and in a footer. */
export interface ChunkEntry {
  readonly id: Buffer;
  readonly lengthBytes: number;
}

export function encodeChunkEntry(
  id: Uint8Array,
  lengthBytes: number,
  into: Buffer,
  offset: number,
): void {
  into.set(id, offset);
  into.writeUInt32LE(lengthBytes, offset + 32);
}

/** Reads the head of a chunk frame; the lengths must add up to `plainBytes`. Ids share memory with `head`. */
export function decodeChunkEntries(head: Buffer, header: FrameHeader, what: string): ChunkEntry[] {
  const entries: ChunkEntry[] = [];
  let sum = 0;
  for (let i = 0; i < header.count; i++) {
    const at = i * CHUNK_ENTRY_BYTES;
    const lengthBytes = head.readUInt32LE(at + 32);
    entries.push({ id: head.subarray(at, at + 32), lengthBytes });
    sum += lengthBytes;
  }
  if (sum !== header.plainBytes)
    throw damaged(what, 0, 'the chunk lengths do not add up to the frame');
  return entries;
}
