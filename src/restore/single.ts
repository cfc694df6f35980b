/**
 * The short way through a frame of one chunk, which nearly all frames are: the same checks as `openFrameBytes` and
 * `verifiedChunks` make, without their intermediate objects (a third of a restore's work in JavaScript). It only says
 * yes or no; who gets a no takes the long way, which says what is wrong.
 */
import { CHUNK_ENTRY_BYTES, FRAME_HEADER_BYTES, FRAME_MAGIC, FrameType } from '../format/frame.js';
import type { FooterFrame } from '../format/pack.js';
import { NONCE_BYTES, type Sealer } from '../format/seal.js';
import type { PackReadContext } from '../repo/pack-reader.js';
import { copyBytes } from './copy.js';

/** Opens frames of one pack. */
export class SingleChunks {
  private readonly ctx: PackReadContext;
  private readonly sealer: Sealer;
  private readonly aad = Buffer.alloc(16 + FRAME_HEADER_BYTES);
  /** Of the header in `aad`. Much less code than Buffer's own methods, and compiled much sooner. */
  private readonly header = new DataView(this.aad.buffer, this.aad.byteOffset + 16);
  private readonly nonce = Buffer.alloc(NONCE_BYTES);
  private readonly nonceNumber = new DataView(this.nonce.buffer, this.nonce.byteOffset);
  /** Room for what a frame holds; used anew for each. */
  private plain = Buffer.alloc(0);

  constructor(ctx: PackReadContext, packId: string, sealer: Sealer) {
    this.ctx = ctx;
    this.sealer = sealer;
    this.aad.write(packId, 0, 'hex');
  }

  /**
   * Puts the chunk of `frame` into `into` (as long as the frame's `plainBytes`). Returns a buffer that begins with the
   * chunk's id (until the next call) if header, seal, length and id are right and as the footer says; undefined otherwise, with anything in `into`.
   * The header's own checksum is not looked at: the seal covers every byte of the header.
   */
  open(frame: FooterFrame, bytes: Buffer, into: Buffer): Buffer | undefined {
    const { storedBytes, plainBytes } = frame;
    const { header } = this;
    if (bytes.length !== FRAME_HEADER_BYTES + storedBytes || into.length !== plainBytes)
      return undefined;
    this.aad.set(bytes.subarray(0, FRAME_HEADER_BYTES), 16);
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
      return undefined;
    }
    this.nonceNumber.setUint32(0, frame.number, true);
    if (this.plain.length < storedBytes) this.plain = Buffer.allocUnsafeSlow(storedBytes * 2);
    const sealed = bytes.subarray(FRAME_HEADER_BYTES);
    const plain = this.sealer.open(this.nonce, this.aad, sealed, this.plain);
    if (plain === undefined || plain.length < CHUNK_ENTRY_BYTES) return undefined;
    if (plain.readUInt32LE(32) !== plainBytes) return undefined;
    const stored = plain.subarray(CHUNK_ENTRY_BYTES);
    if (frame.compression === 0) {
      if (stored.length !== plainBytes) return undefined;
      copyBytes(into, stored);
    } else if (!this.ctx.lz4.decompress(stored, into)) {
      return undefined;
    }
    return this.ctx.keys.chunkId(into).compare(plain, 0, 32) === 0 ? plain : undefined;
  }
}
