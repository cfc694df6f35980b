/**
 * The short way through a frame of one chunk, which nearly all frames are: the same checks as `openFrameBytes` and
 * `verifiedChunks` make, without their intermediate objects (a third of a restore's work in JavaScript). It only says
 * yes or no; who gets a no takes the long way, which says what is wrong.
 */
import { CHUNK_ENTRY_BYTES, FRAME_HEADER_BYTES, FRAME_MAGIC, FrameType } from '../format/frame.js';
import type { FooterFrame } from '../format/pack.js';
import { HASH_BYTES } from '../hash.js';
import { OpenRoom, SEAL_BYTES, type SealOpener, type Sealer } from '../format/seal.js';
import { copyBytes } from '../memory-copy.js';
import type { PackReadContext } from './pack-reader.js';

/** A pack's id in the associated data of its frames. */
const PACK_ID_BYTES = 16;

/** Memory that the {@link SingleChunks} of a thread share. */
export class ChunkRoom extends OpenRoom {
  private scratch = Buffer.alloc(0);
  private view = this.scratch;

  /** Room for a chunk of so many bytes, the same memory each time. */
  chunk(bytes: number): Buffer {
    if (this.view.length === bytes) return this.view;
    if (this.scratch.length < bytes) this.scratch = Buffer.allocUnsafeSlow(bytes * 2);
    this.view = this.scratch.subarray(0, bytes);
    return this.view;
  }
}

/** Opens frames of one pack. */
export class SingleChunks {
  private readonly ctx: PackReadContext;
  private readonly room: ChunkRoom;
  private readonly opener: SealOpener;
  /** Of the header in the associated data. Much less code than Buffer's own methods, and compiled much sooner. */
  private readonly header: DataView;
  private readonly nonceNumber: DataView;

  constructor(ctx: PackReadContext, packId: string, sealer: Sealer, room: ChunkRoom) {
    this.ctx = ctx;
    this.room = room;
    this.opener = sealer.opener(PACK_ID_BYTES + FRAME_HEADER_BYTES, room);
    const { aad, nonce } = this.opener;
    aad.write(packId, 0, 'hex');
    this.header = new DataView(aad.buffer, aad.byteOffset + PACK_ID_BYTES, FRAME_HEADER_BYTES);
    this.nonceNumber = new DataView(nonce.buffer, nonce.byteOffset, nonce.length);
  }

  /**
   * Puts the chunk of `frame`, which begins at `at` in `bytes`, into `into` (as long as the frame's `plainBytes`). True if header, seal,
   * length and id are right and as the footer says; otherwise anything may be in `into`.
   * The header's own checksum is not looked at: the seal covers every byte of the header.
   */
  open(frame: FooterFrame, bytes: Buffer, at: number, into: Buffer): boolean {
    if (into.length !== frame.plainBytes || !this.unseal(frame, bytes, at)) return false;
    const { plain, plainAt } = this.opener;
    const from = plainAt + CHUNK_ENTRY_BYTES;
    const end = plainAt + frame.storedBytes - SEAL_BYTES;
    if (frame.compression === 0) {
      if (end - from !== into.length) return false;
      copyBytes(into, plain.subarray(from, end));
    } else if (!this.ctx.lz4.decompressPart(plain, from, end - from, into)) {
      return false;
    }
    return this.ctx.keys.isChunk(into, plain, plainAt);
  }

  /** The same for who does not need the chunk. */
  check(frame: FooterFrame, bytes: Buffer, at: number): boolean {
    const { plainBytes } = frame;
    if (frame.compression !== 0) return this.open(frame, bytes, at, this.room.chunk(plainBytes));
    if (!this.unseal(frame, bytes, at)) return false;
    const { plain, plainAt } = this.opener;
    const from = plainAt + CHUNK_ENTRY_BYTES;
    const end = plainAt + frame.storedBytes - SEAL_BYTES;
    return (
      end - from === plainBytes && this.ctx.keys.isChunk(plain.subarray(from, end), plain, plainAt)
    );
  }

  /** True if `ids` holds the id of the chunk that was found right last from `at`. */
  hasId(ids: Buffer, at: number): boolean {
    const { plain, plainAt } = this.opener;
    return plain.compare(ids, at, at + HASH_BYTES, plainAt, plainAt + HASH_BYTES) === 0;
  }

  /** Copies the id of the chunk that was found right last to `ids` from `at`. */
  copyId(ids: Buffer, at: number): void {
    const { plain, plainAt } = this.opener;
    plain.copy(ids, at, plainAt, plainAt + HASH_BYTES);
  }

  private unseal(frame: FooterFrame, bytes: Buffer, at: number): boolean {
    const { storedBytes, plainBytes } = frame;
    const { header, opener } = this;
    const body = at + FRAME_HEADER_BYTES;
    if (bytes.length < body + storedBytes || storedBytes < CHUNK_ENTRY_BYTES + SEAL_BYTES)
      return false;
    for (let i = 0; i < FRAME_HEADER_BYTES; i++) header.setUint8(i, bytes[at + i] ?? 0);
    if (
      header.getUint32(0, true) !== FRAME_MAGIC ||
      header.getUint8(4) !== FrameType.chunks ||
      header.getUint8(5) !== frame.compression ||
      header.getUint16(6, true) !== 1 ||
      header.getUint32(8, true) !== frame.number ||
      header.getUint32(12, true) !== storedBytes ||
      header.getUint32(16, true) !== plainBytes ||
      header.getUint32(20, true) !== CHUNK_ENTRY_BYTES
    ) {
      return false;
    }
    this.nonceNumber.setUint32(0, frame.number, true);
    if (!opener.open(bytes, body, body + storedBytes)) return false;
    return opener.plain.readUInt32LE(opener.plainAt + HASH_BYTES) === plainBytes;
  }
}
