/** Makes a pack for a tape in memory, of frames of packs of the repository: each sealed anew, whole or with some of its chunks. */
import { crc32 } from 'node:zlib';

import { B2Error } from '../errors.js';
import {
  CHUNK_ENTRY_BYTES,
  FRAME_HEADER_BYTES,
  FRAME_MAGIC,
  FrameType,
  decodeChunkEntries,
  decodeFrameHeader,
  encodeChunkEntry,
  encodeFrameHeader,
  type FrameHeader,
} from '../format/frame.js';
import { encodeFooter, encodePackHeader, type FooterFrame } from '../format/pack.js';
import {
  SEAL_BYTES,
  type OpenRoom,
  type SealMaker,
  type SealOpener,
  type Sealer,
} from '../format/seal.js';
import { HASH_BYTES } from '../hash.js';
import { frameWhat, openFrameBytes, verifiedChunks } from '../repo/pack-reader.js';
import type { PackContext } from '../repo/pack-writer.js';

/** Keys of chunks in a pack: frame number times this plus the index in the frame. */
export const KEY_STEP = 4096;

/** Chunks of one pack of the repository, as ascending keys. */
export interface WantedChunks {
  readonly packId: string;
  readonly keys: Uint32Array;
}

/** A pack to be made: the chunks of its sources, in this order; frames keep what they share. */
export interface BuildJob {
  readonly packId: string;
  readonly createdNs: bigint;
  /** 16 fresh random bytes, hex. */
  readonly salt: string;
  readonly sources: readonly WantedChunks[];
}

/** The frames that ascending keys lie in, with the range of keys of each. */
export function* framesOf(
  keys: Uint32Array,
): Generator<{ readonly number: number; readonly from: number; readonly to: number }, void> {
  for (let from = 0; from < keys.length;) {
    const number = Math.floor((keys[from] ?? 0) / KEY_STEP);
    let to = from + 1;
    while (to < keys.length && Math.floor((keys[to] ?? 0) / KEY_STEP) === number) to++;
    yield { number, from, to };
    from = to;
  }
}

/** A pack's id in the associated data of its frames. */
const PACK_ID_BYTES = 16;
const AAD_BYTES = PACK_ID_BYTES + FRAME_HEADER_BYTES;
/** Of a header: what its checksum covers. */
const CHECKED_BYTES = 28;
const HINT = { hint: 'Run "b2 verify" to see which points need it.' } as const;

/** The header in the associated data of a frame. Much less code than Buffer's own methods, and compiled much sooner. */
function headerIn(aad: Buffer): DataView {
  return new DataView(aad.buffer, aad.byteOffset + PACK_ID_BYTES, FRAME_HEADER_BYTES);
}

/** A pack of the repository that frames are taken of; one at a time is used with the same room. */
export class SourcePack {
  readonly packId: string;
  readonly sealer: Sealer;
  readonly opener: SealOpener;
  readonly header: DataView;
  private readonly nonceNumber: DataView;

  constructor(ctx: PackContext, packId: string, room: OpenRoom) {
    this.packId = packId;
    this.sealer = ctx.keys.packSealer(packId);
    this.opener = this.sealer.opener(AAD_BYTES, room);
    const { aad, nonce } = this.opener;
    aad.write(packId, 0, 'hex');
    this.header = headerIn(aad);
    this.nonceNumber = new DataView(nonce.buffer, nonce.byteOffset, nonce.length);
  }

  /**
   * Opens the seal of a frame of chunks that begins at `at` in `bytes`: true if header and seal are right and as the footer says. The
   * opener has what it holds then. The header's own checksum is not looked at: the seal covers every byte of the header.
   */
  unseal(frame: FooterFrame, bytes: Buffer, at: number): boolean {
    const { header, opener } = this;
    const { storedBytes, count } = frame;
    const body = at + FRAME_HEADER_BYTES;
    const headBytes = count * CHUNK_ENTRY_BYTES;
    if (bytes.length < body + storedBytes || storedBytes < headBytes + SEAL_BYTES) return false;
    for (let i = 0; i < FRAME_HEADER_BYTES; i++) header.setUint8(i, bytes[at + i] ?? 0);
    if (
      header.getUint32(0, true) !== FRAME_MAGIC ||
      header.getUint8(4) !== FrameType.chunks ||
      header.getUint8(5) !== frame.compression ||
      header.getUint16(6, true) !== count ||
      header.getUint32(8, true) !== frame.number ||
      header.getUint32(12, true) !== storedBytes ||
      header.getUint32(16, true) !== frame.plainBytes ||
      header.getUint32(20, true) !== headBytes
    ) {
      return false;
    }
    this.nonceNumber.setUint32(0, frame.number, true);
    if (!opener.open(bytes, body, body + storedBytes)) return false;
    let sum = 0;
    for (let i = 1; i <= count; i++)
      sum += opener.plain.readUInt32LE(opener.plainAt + i * CHUNK_ENTRY_BYTES - 4);
    return sum === frame.plainBytes;
  }
}

/** What a {@link PackMaker} holds at some time. */
export interface MakerMark {
  readonly at: number;
  readonly frames: number;
  readonly chunks: number;
}

/** See the file comment. */
export class PackMaker {
  private readonly ctx: PackContext;
  private readonly job: BuildJob;
  private readonly out: Buffer;
  private readonly maker: SealMaker;
  private readonly header: DataView;
  private readonly checked: Buffer;
  private readonly nonceNumber: DataView;
  private readonly frames: FooterFrame[] = [];
  private readonly ids: Buffer;
  private readonly lengths: Uint32Array;
  private chunks = 0;
  private at: number;

  constructor(ctx: PackContext, job: BuildJob, out: Buffer) {
    this.ctx = ctx;
    this.job = job;
    this.out = out;
    const { packId, createdNs } = job;
    const { encrypted } = ctx.keys;
    const { repositoryId } = ctx;
    const header = encodePackHeader({ packId, repositoryId, encrypted, generation: 0, createdNs });
    this.at = header.copy(out, 0);
    this.maker = ctx.keys.packSealer(packId).maker(AAD_BYTES);
    const { aad, nonce } = this.maker;
    aad.write(packId, 0, 'hex');
    this.header = headerIn(aad);
    this.checked = aad.subarray(PACK_ID_BYTES, PACK_ID_BYTES + CHECKED_BYTES);
    this.nonceNumber = new DataView(nonce.buffer, nonce.byteOffset, nonce.length);
    const most = job.sources.reduce((n, s) => n + s.keys.length, 0);
    this.ids = Buffer.allocUnsafe(most * HASH_BYTES);
    this.lengths = new Uint32Array(most);
  }

  mark(): MakerMark {
    return { at: this.at, frames: this.frames.length, chunks: this.chunks };
  }

  /** Takes back what was added since. It must not have been given away: the same frame numbers are used again. */
  rollBack(mark: MakerMark): void {
    this.at = mark.at;
    this.frames.length = mark.frames;
    this.chunks = mark.chunks;
  }

  /**
   * Adds the chunks `keys` of a frame, which begins at `from` in `bytes` and ends in them. A whole frame is copied as it is, under
   * another seal: its chunks are what they were when that was made. Kind `damaged` if the frame is.
   */
  add(
    source: SourcePack,
    frame: FooterFrame,
    keys: Uint32Array,
    bytes: Buffer,
    from: number,
  ): void {
    const isWhole = keys.length === frame.count;
    if (isWhole && source.unseal(frame, bytes, from)) {
      const { plain, plainAt } = source.opener;
      this.seal(source.header, plain, plainAt, plainAt + frame.storedBytes - SEAL_BYTES);
      return;
    }
    // The long way says what is wrong.
    const one = bytes.subarray(from, from + FRAME_HEADER_BYTES + frame.storedBytes);
    const what = frameWhat(source.packId, frame.number);
    const old = decodeFrameHeader(one, 0, what);
    if (old.number !== frame.number || old.type !== FrameType.chunks)
      throw new B2Error('damaged', `${what}: another frame lies there`, HINT);
    const open = openFrameBytes(this.ctx, source.sealer, source.packId, one);
    if (isWhole) {
      decodeChunkEntries(open.head, old, what);
      throw new B2Error('damaged', `${what}: it is not what the footer says`, HINT);
    }
    const { entries, body, starts } = verifiedChunks(open, source.packId, this.ctx.keys);
    const head = Buffer.alloc(keys.length * CHUNK_ENTRY_BYTES);
    const bodies: Buffer[] = [];
    keys.forEach((key, i) => {
      const sub = key % KEY_STEP;
      const entry = entries[sub];
      if (entry === undefined)
        throw new B2Error('damaged', `${what}: it has no chunk ${sub}`, HINT);
      encodeChunkEntry(entry.id, entry.lengthBytes, head, i * CHUNK_ENTRY_BYTES);
      bodies.push(body.subarray(starts[sub], starts[sub + 1]));
    });
    const plain = Buffer.concat(bodies);
    const room = Buffer.allocUnsafe(Math.max(16, plain.length - (plain.length >> 4)));
    const packed = this.ctx.lz4.compress(plain, room);
    const sealed = Buffer.concat([head, packed > 0 ? room.subarray(0, packed) : plain]);
    const header: FrameHeader = {
      type: FrameType.chunks,
      compression: packed > 0 ? 1 : 0,
      count: keys.length,
      number: 0, // set below
      storedBytes: sealed.length + SEAL_BYTES,
      plainBytes: plain.length,
      headBytes: head.length,
    };
    const headerBytes = Buffer.alloc(FRAME_HEADER_BYTES);
    encodeFrameHeader(header, headerBytes, 0);
    this.seal(
      new DataView(headerBytes.buffer, headerBytes.byteOffset, FRAME_HEADER_BYTES),
      sealed,
      0,
      sealed.length,
    );
  }

  /** Seals bytes `from` to `end` of `plain`, head and body, as the next frame; `like` is its header but for the number. */
  private seal(like: DataView, plain: Buffer, from: number, end: number): void {
    const { header, out, at, maker } = this;
    const number = this.frames.length;
    for (let i = 0; i < CHECKED_BYTES; i++) header.setUint8(i, like.getUint8(i));
    header.setUint32(8, number, true);
    header.setUint32(CHECKED_BYTES, crc32(this.checked), true);
    const storedBytes = end - from + SEAL_BYTES;
    const count = header.getUint16(6, true);
    if (out.length - at < FRAME_HEADER_BYTES + storedBytes)
      throw new Error('the pack is larger than was planned');
    for (let i = 0; i < FRAME_HEADER_BYTES; i++) out[at + i] = header.getUint8(i);
    this.nonceNumber.setUint32(0, number, true);
    maker.seal(plain, from, end, out, at + FRAME_HEADER_BYTES);
    this.frames.push({
      number,
      offset: at,
      storedBytes,
      plainBytes: header.getUint32(16, true),
      type: FrameType.chunks,
      compression: header.getUint8(5) === 1 ? 1 : 0,
      count,
    });
    for (let i = 0; i < count; i++, this.chunks++) {
      const entry = from + i * CHUNK_ENTRY_BYTES;
      plain.copy(this.ids, this.chunks * HASH_BYTES, entry, entry + HASH_BYTES);
      this.lengths[this.chunks] = plain.readUInt32LE(entry + HASH_BYTES);
    }
    this.at = at + FRAME_HEADER_BYTES + storedBytes;
  }

  /** Adds the footer; returns the length of the pack. */
  finish(): number {
    const { ctx, job, out, at, frames, chunks } = this;
    const ids = this.ids.subarray(0, chunks * HASH_BYTES);
    const footer = { frames, ids, lengths: this.lengths.subarray(0, chunks) };
    const end = encodeFooter(footer, job.packId, at, Buffer.from(job.salt, 'hex'), ctx.keys);
    if (at + end.length > out.length) throw new Error('the pack is larger than was planned');
    return at + end.copy(out, at);
  }
}
