/**
 * Takes packs of the repository into memory as they are, to be written to a tape: in pieces of whole frames, each of which is checked while it is still in the
 * processor's cache. The first piece begins with the header of the pack, the last one ends with its footer and trailer, and both are checked with it.
 */
import { B2Error, ioError } from '../errors.js';
import { CHUNK_ENTRY_BYTES, FRAME_HEADER_BYTES } from '../format/frame.js';
import { packName } from '../format/names.js';
import {
  PACK_HEADER_BYTES,
  PACK_TRAILER_BYTES,
  decodeFooter,
  decodePackHeader,
  decodeTrailer,
  type FooterFrame,
} from '../format/pack.js';
import { HASH_BYTES } from '../hash.js';
import { DIRECT_ALIGN_BYTES } from '../memory.js';
import { frameWhat, openFrameBytes, type OpenPack } from '../repo/pack-reader.js';
import type { PackContext } from '../repo/pack-writer.js';
import { roundDown, roundUp } from '../units.js';
import type { SourcePack } from './pack-maker.js';

/** How a pack can be copied. */
export interface CopyPlan {
  readonly frames: number;
  readonly sizeBytes: number;
  /** In so many pieces, */
  readonly pieces: number;
  /** each of which needs this much memory at most. */
  readonly roomBytes: number;
}

/** A piece of a pack to be copied, which must be what it was when that was planned. */
export interface CopyJob extends CopyPlan {
  readonly packId: string;
  readonly piece: number;
  /** Where the pack's first byte will come to lie in a file of the tape, modulo {@link DIRECT_ALIGN_BYTES}, as far as is known: the memory is filled likewise, so that it can be written from there. */
  readonly phase: number;
}

/** A piece in memory: bytes `at` to `at + length` of its buffer; there are {@link COPY_HEAD_BYTES} before them at least. */
export interface CopiedPiece {
  readonly at: number;
  readonly length: number;
}

/** Room before a piece, for the beginning of the record that it goes on. */
export const COPY_HEAD_BYTES = 256 * 1024;
/** A piece has the frames that begin in so many bytes. With what reaches over their end, and the room before, it takes a little less than 4 MiB. */
const PIECE_BYTES = 3.5 * 1024 * 1024;
/** What the page cache holds is read this much at a time: the processor's cache keeps it until it is checked. */
const CACHED_READ_BYTES = 31 * DIRECT_ALIGN_BYTES;
/** So many such reads are made in one turn of the event loop. */
const READS_PER_TURN = 8;

const HINT = { hint: 'Run "b2 verify" to see which points need it.' } as const;
const nextTurn = (): Promise<void> => new Promise((resolve) => setImmediate(resolve));

/** The pieces of a pack with these frames, of which there is at least one. */
export function planCopy(frames: readonly FooterFrame[], sizeBytes: number): CopyPlan {
  const pieces = Math.floor((frames.at(-1)?.offset ?? 0) / PIECE_BYTES) + 1;
  let most = 0;
  let end = sizeBytes;
  let piece = pieces - 1;
  for (let i = frames.length - 1; i >= 0; i--) {
    const offset = frames[i]?.offset ?? 0;
    const before = i === 0 ? -1 : Math.floor((frames[i - 1]?.offset ?? 0) / PIECE_BYTES);
    if (before === piece) continue;
    const from = i === 0 ? 0 : offset;
    most = Math.max(most, end - from);
    end = from;
    piece = before;
  }
  const roomBytes = roundUp(COPY_HEAD_BYTES + most + 2 * DIRECT_ALIGN_BYTES, DIRECT_ALIGN_BYTES);
  return { frames: frames.length, sizeBytes, pieces, roomBytes };
}

/** Kind `failed` unless the pack is what it was when the export was planned. */
function requirePlanned(pack: OpenPack, job: CopyJob): void {
  const same =
    pack.sealed &&
    pack.header.generation === 0 &&
    pack.footer.frames.length === job.frames &&
    pack.sizeBytes === job.sizeBytes;
  if (same) return;
  throw new B2Error('failed', `pack ${job.packId} was changed while the export was under way`, {
    retryable: true,
    hint: 'Run the export again; it overwrites what it left unfinished.',
  });
}

/** Index of the first frame that begins at `offset` or behind. */
function frameFrom(frames: readonly FooterFrame[], offset: number): number {
  let low = 0;
  let high = frames.length;
  while (low < high) {
    const mid = (low + high) >>> 1;
    if ((frames[mid]?.offset ?? 0) < offset) low = mid + 1;
    else high = mid;
  }
  return low;
}

/**
 * Reads a piece to `out`. `isCached`: the page cache has the pack, as far as is known. Kind `damaged` if anything of the piece is not right, `failed` (retryable) if the
 * pack is not the one that was planned.
 */
export async function copyPiece(
  ctx: PackContext,
  pack: OpenPack,
  source: SourcePack,
  job: CopyJob,
  out: Buffer,
  isCached: boolean,
): Promise<CopiedPiece> {
  requirePlanned(pack, job);
  if (out.length < job.roomBytes) throw new Error('the pack is larger than was planned');
  const piece = new Piece(ctx, pack, source, job, out, isCached);
  await piece.read();
  return piece.finish();
}

class Piece {
  readonly #ctx: PackContext;
  readonly #pack: OpenPack;
  readonly #source: SourcePack;
  readonly #job: CopyJob;
  readonly #out: Buffer;
  readonly #from: number;
  readonly #to: number;
  readonly #isCached: boolean;
  /** Where the pack's first byte would lie in `out`: mostly before its beginning. */
  readonly #shift: number;
  /** The next frame to be checked, the first one that is not of this piece, and the index of the next chunk. */
  #frame: number;
  readonly #endFrame: number;
  #chunk = 0;

  constructor(
    ctx: PackContext,
    pack: OpenPack,
    source: SourcePack,
    job: CopyJob,
    out: Buffer,
    isCached: boolean,
  ) {
    this.#ctx = ctx;
    this.#pack = pack;
    this.#source = source;
    this.#job = job;
    this.#out = out;
    const { frames } = pack.footer;
    const { piece, pieces, sizeBytes } = job;
    const isLast = piece === pieces - 1;
    this.#frame = frameFrom(frames, piece * PIECE_BYTES);
    this.#endFrame = isLast ? frames.length : frameFrom(frames, (piece + 1) * PIECE_BYTES);
    this.#from = piece === 0 ? 0 : (frames[this.#frame]?.offset ?? sizeBytes);
    this.#to = isLast ? sizeBytes : (frames[this.#endFrame]?.offset ?? sizeBytes);
    // Reads around the page cache begin on a border, in the pack and in memory.
    const [begin, phase] = isCached
      ? [this.#from, (job.phase + this.#from) % DIRECT_ALIGN_BYTES]
      : [roundDown(this.#from, DIRECT_ALIGN_BYTES), 0];
    this.#isCached = isCached;
    this.#shift = COPY_HEAD_BYTES + phase - begin;
    for (let i = 0; i < this.#frame; i++) this.#chunk += frames[i]?.count ?? 0;
  }

  /** What is in memory a little at a time, each bit checked at once; anything else in one read around the page cache, where memory and file system allow that. */
  async read(): Promise<void> {
    if (this.#to <= this.#from) return;
    if (!this.#isCached) {
      const begin = roundDown(this.#from, DIRECT_ALIGN_BYTES);
      await this.#read(begin, roundUp(this.#to, DIRECT_ALIGN_BYTES) - begin);
      this.#check(this.#to);
      return;
    }
    let reads = 0;
    for (let at = this.#from; at < this.#to;) {
      at += await this.#read(at, Math.min(CACHED_READ_BYTES, this.#to - at));
      this.#check(at);
      if (++reads % READS_PER_TURN === 0) await nextTurn();
    }
  }

  /** Bytes `at` to `at + length` of the pack, as far as it goes; resolves to how many there are. */
  async #read(at: number, length: number): Promise<number> {
    const { packId, sizeBytes } = this.#job;
    const begin = at + this.#shift;
    let got: number;
    try {
      got = await this.#pack.readRaw(this.#out.subarray(begin, begin + length), at);
    } catch (error) {
      throw ioError('read', packName(packId), error);
    }
    if (got < Math.min(length, sizeBytes - at))
      throw new B2Error('damaged', `pack ${packId}: it ends before its size`, HINT);
    return got;
  }

  /** Checks the frames of the piece that end before `have`. */
  #check(have: number): void {
    const { footer } = this.#pack;
    const { opener } = this.#source;
    for (; this.#frame < this.#endFrame; this.#frame++) {
      const frame = footer.frames[this.#frame];
      if (frame === undefined || frame.offset + FRAME_HEADER_BYTES + frame.storedBytes > have)
        return;
      const at = frame.offset + this.#shift;
      if (!this.#source.unseal(frame, this.#out, at)) this.#damaged(frame);
      // What is deduplicated later goes by the ids in the footer.
      for (let sub = 0; sub < frame.count; sub++, this.#chunk++) {
        const id = opener.plainAt + sub * CHUNK_ENTRY_BYTES;
        const known = this.#chunk * HASH_BYTES;
        const same =
          opener.plain.compare(footer.ids, known, known + HASH_BYTES, id, id + HASH_BYTES) === 0 &&
          opener.plain.readUInt32LE(id + HASH_BYTES) === footer.lengths[this.#chunk];
        if (!same) this.#damaged(frame);
      }
    }
  }

  /** Says what is wrong with a frame. */
  #damaged(frame: FooterFrame): never {
    const { packId } = this.#job;
    const at = frame.offset + this.#shift;
    const bytes = this.#out.subarray(at, at + FRAME_HEADER_BYTES + frame.storedBytes);
    openFrameBytes(this.#ctx, this.#source.sealer, packId, bytes);
    const what = frameWhat(packId, frame.number);
    throw new B2Error('damaged', `${what}: it is not what the footer says`, HINT);
  }

  /** Checks header and footer, where they are in the piece, in the bytes that were read. */
  finish(): CopiedPiece {
    const { packId, piece, pieces } = this.#job;
    const { keys, repositoryId } = this.#ctx;
    const bytes = this.#out.subarray(this.#from + this.#shift, this.#to + this.#shift);
    if (this.#frame !== this.#endFrame)
      throw new B2Error('damaged', `pack ${packId}: a frame reaches behind its end`, HINT);
    if (piece === 0) {
      const header = decodePackHeader(bytes.subarray(0, PACK_HEADER_BYTES), {
        packId,
        repositoryId,
      });
      if (header.encrypted !== keys.encrypted || header.generation !== 0)
        throw new B2Error('damaged', `pack ${packId}: its header is not what it was`, HINT);
    }
    if (piece === pieces - 1) this.#checkFooter(bytes);
    return { at: this.#from + this.#shift, length: bytes.length };
  }

  #checkFooter(bytes: Buffer): void {
    const { packId, sizeBytes } = this.#job;
    const { footer, validBytes } = this.#pack;
    const trailer = decodeTrailer(bytes.subarray(-PACK_TRAILER_BYTES), sizeBytes);
    if (trailer?.offset !== validBytes)
      throw new B2Error('damaged', `pack ${packId}: its trailer is not what it was`, HINT);
    const at = trailer.offset - this.#from;
    const found = decodeFooter(
      bytes.subarray(at, at + trailer.lengthBytes),
      packId,
      this.#ctx.keys,
    );
    if (!found.ids.equals(footer.ids) || found.frames.length !== footer.frames.length)
      throw new B2Error('damaged', `pack ${packId}: its footer is not what it was`, HINT);
  }
}
