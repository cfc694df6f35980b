/**
 * The overlay file as bytes. All integers are little-endian; sizes in bytes. A block is 4096 bytes.
 *
 * | offset | size | what |
 * | --- | --- | --- |
 * | 0 | 4096 | header, written once: magic `B2OVERLY`, u32 version 1, u32 zero, u64 size of the image, 16 random bytes (the overlay's id), u32 length of the identity, u32 crc32 of bytes 0 to 43 and of the identity, identity (JSON) |
 * | 4096 | 2 × 4096 | intents, two slots |
 * | 16384 | 2 × 4096 each | map pages, two slots a page: page P at 16384 + P × 8192 |
 * | data offset | size of the image, rounded up to a block | block N at data offset + N × 4096; sparse |
 *
 * There are ceil(blocks / 16128) pages; the data offset is the end of the last page rounded up to 1 MiB.
 *
 * A map slot: magic `B2OM`, u32 crc32 of the rest of the slot, u32 page, u32 zero, u64 generation (from 1, one more
 * with every write of the page), 16 bytes id, 24 bytes zero; from byte 64 on two bits a block, lowest bits first:
 * 0 the block is the base's, 1 its data is here, 2 it reads as zeros (3 is damage). A page of which both slots are all
 * zero has never been written: every block is the base's.
 *
 * An intent slot: magic `B2OI`, u32 crc32 of the rest of the slot, u64 sequence, 16 bytes id, u32 zero, u32 count,
 * `count` (≤ 1000) u32 page numbers: the pages of which a slot may be torn. Closing writes one without pages.
 *
 * **Crash protocol.** The state of a block changes in memory first. A flush (or FUA) makes it durable:
 * 1. write the intent (the slot that does not hold the newest one) with the pages that are going to be written;
 * 2. fdatasync: data of every block that is going to be marked, and the intent, are durable;
 * 3. write each page, generation + 1, over its older slot;
 * 4. fdatasync; only now the flush is answered.
 *
 * A crash leaves each page as it was before the flush or as it is after it. Both are right, block by block: nobody has
 * been told that the flush is done, and data is durable before any page says that it is there. A slot torn in step 3
 * fails its checksum and its sibling stands; it is repaired at the next opening, before anything else is written. A slot
 * that fails its checksum and is not named by the newest intent was whole once: that is damage, and it is said, because
 * the sibling may be older than what a flush has promised. The same holds for generations that do not follow each other.
 * Overwriting a block that is here already goes in place: a crash leaves each sector old or new, as on a disk. Contents
 * have no checksum: what the medium returns is believed, as a disk's is.
 *
 * After a failed fdatasync nothing can be promised any more (the kernel may have dropped what it could not write), so
 * the overlay refuses all further writes and flushes until it is opened again.
 */
import { crc32 } from 'node:zlib';

export const OVERLAY_BLOCK_BYTES = 4096;
export const SLOT_BYTES = 4096;
export const HEADER_BYTES = 4096;
export const MAP_OFFSET = 16384;
const SLOT_HEADER_BYTES = 64;
/** Bytes of the states of one page, two bits a block. */
export const PAGE_STATE_BYTES = SLOT_BYTES - SLOT_HEADER_BYTES;
export const BLOCKS_PER_PAGE = PAGE_STATE_BYTES * 4;
export const MAX_INTENT_PAGES = 1000;
const ID_BYTES = 16;
const IDENTITY_AT = 48;
export const MAX_IDENTITY_BYTES = HEADER_BYTES - IDENTITY_AT;

const HEADER_MAGIC = 'B2OVERLY';
const MAP_MAGIC = 'B2OM';
const INTENT_MAGIC = 'B2OI';
const VERSION = 1;

/** What a block's two bits say. */
export const BlockState = { base: 0, data: 1, zero: 2 } as const;
export type BlockState = (typeof BlockState)[keyof typeof BlockState];

/** Where things lie in the overlay of an image of `sizeBytes`. */
export interface OverlayLayout {
  readonly sizeBytes: number;
  readonly blocks: number;
  readonly pages: number;
  readonly dataOffset: number;
  readonly fileBytes: number;
}

export function overlayLayout(sizeBytes: number): OverlayLayout {
  const blocks = Math.ceil(sizeBytes / OVERLAY_BLOCK_BYTES);
  const pages = Math.ceil(blocks / BLOCKS_PER_PAGE);
  const dataOffset = Math.ceil((MAP_OFFSET + pages * 2 * SLOT_BYTES) / 1_048_576) * 1_048_576;
  return {
    sizeBytes,
    blocks,
    pages,
    dataOffset,
    fileBytes: dataOffset + blocks * OVERLAY_BLOCK_BYTES,
  };
}

/** Where slot 0 or 1 of map page `page` lies. */
export function mapSlotOffset(page: number, slot: 0 | 1): number {
  return MAP_OFFSET + (page * 2 + slot) * SLOT_BYTES;
}

/** Where intent slot 0 or 1 lies. */
export function intentSlotOffset(slot: 0 | 1): number {
  return HEADER_BYTES + slot * SLOT_BYTES;
}

export interface OverlayHeader {
  readonly sizeBytes: number;
  readonly id: Buffer;
  /** JSON text of at most {@link MAX_IDENTITY_BYTES} bytes. */
  readonly identity: string;
}

export function buildHeader(header: OverlayHeader): Buffer {
  const identity = Buffer.from(header.identity, 'utf8');
  if (identity.length > MAX_IDENTITY_BYTES)
    throw new RangeError('the identity is too long for the header');
  const out = Buffer.alloc(HEADER_BYTES);
  out.write(HEADER_MAGIC, 0, 'latin1');
  out.writeUInt32LE(VERSION, 8);
  out.writeBigUInt64LE(BigInt(header.sizeBytes), 16);
  out.set(header.id.subarray(0, ID_BYTES), 24);
  out.writeUInt32LE(identity.length, 40);
  out.set(identity, IDENTITY_AT);
  out.writeUInt32LE(crc32(identity, crc32(out.subarray(0, 44))), 44);
  return out;
}

/** `foreign`: this is no overlay at all; `damaged`: it was one. */
export function parseHeader(bytes: Buffer): OverlayHeader | 'foreign' | 'damaged' | 'newer' {
  if (bytes.length < HEADER_BYTES || bytes.toString('latin1', 0, 8) !== HEADER_MAGIC)
    return 'foreign';
  const identityBytes = bytes.readUInt32LE(40);
  if (identityBytes > MAX_IDENTITY_BYTES) return 'damaged';
  const identity = bytes.subarray(IDENTITY_AT, IDENTITY_AT + identityBytes);
  if (crc32(identity, crc32(bytes.subarray(0, 44))) !== bytes.readUInt32LE(44)) return 'damaged';
  if (bytes.readUInt32LE(8) !== VERSION) return 'newer';
  const sizeBytes = Number(bytes.readBigUInt64LE(16));
  if (!Number.isSafeInteger(sizeBytes)) return 'damaged';
  return {
    sizeBytes,
    id: Buffer.from(bytes.subarray(24, 40)),
    identity: identity.toString('utf8'),
  };
}

function isZero(bytes: Buffer): boolean {
  return bytes.equals(ZERO_SLOT);
}
const ZERO_SLOT = Buffer.alloc(SLOT_BYTES);

export function buildMapSlot(
  id: Buffer,
  page: number,
  generation: bigint,
  states: Uint8Array,
): Buffer {
  const out = Buffer.alloc(SLOT_BYTES);
  out.write(MAP_MAGIC, 0, 'latin1');
  out.writeUInt32LE(page, 8);
  out.writeBigUInt64LE(generation, 16);
  out.set(id, 24);
  out.set(states, SLOT_HEADER_BYTES);
  out.writeUInt32LE(crc32(out.subarray(8)), 4);
  return out;
}

export interface MapSlot {
  readonly generation: bigint;
  readonly states: Uint8Array;
}

export function parseMapSlot(
  bytes: Buffer,
  id: Buffer,
  page: number,
): MapSlot | 'empty' | 'invalid' {
  if (isZero(bytes)) return 'empty';
  if (bytes.toString('latin1', 0, 4) !== MAP_MAGIC) return 'invalid';
  if (crc32(bytes.subarray(8)) !== bytes.readUInt32LE(4)) return 'invalid';
  if (bytes.readUInt32LE(8) !== page || !bytes.subarray(24, 40).equals(id)) return 'invalid';
  const generation = bytes.readBigUInt64LE(16);
  if (generation === 0n) return 'invalid';
  const states = new Uint8Array(bytes.subarray(SLOT_HEADER_BYTES));
  // State 3 does not exist: both bits of a pair set.
  if (states.some((byte) => (byte & (byte >> 1) & 0x55) !== 0)) return 'invalid';
  return { generation, states };
}

export interface Intent {
  readonly sequence: bigint;
  readonly pages: readonly number[];
}

export function buildIntent(id: Buffer, intent: Intent): Buffer {
  if (intent.pages.length > MAX_INTENT_PAGES) throw new RangeError('too many pages for an intent');
  const out = Buffer.alloc(SLOT_BYTES);
  out.write(INTENT_MAGIC, 0, 'latin1');
  out.writeBigUInt64LE(intent.sequence, 8);
  out.set(id, 16);
  out.writeUInt32LE(intent.pages.length, 36);
  intent.pages.forEach((page, i) => out.writeUInt32LE(page, 40 + 4 * i));
  out.writeUInt32LE(crc32(out.subarray(8)), 4);
  return out;
}

export function parseIntent(bytes: Buffer, id: Buffer): Intent | 'empty' | 'invalid' {
  if (isZero(bytes)) return 'empty';
  if (bytes.toString('latin1', 0, 4) !== INTENT_MAGIC) return 'invalid';
  if (crc32(bytes.subarray(8)) !== bytes.readUInt32LE(4)) return 'invalid';
  if (!bytes.subarray(16, 32).equals(id)) return 'invalid';
  const count = bytes.readUInt32LE(36);
  if (count > MAX_INTENT_PAGES) return 'invalid';
  const pages: number[] = [];
  for (let i = 0; i < count; i++) pages.push(bytes.readUInt32LE(40 + 4 * i));
  return { sequence: bytes.readBigUInt64LE(8), pages };
}
