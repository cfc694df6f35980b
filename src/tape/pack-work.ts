/**
 * The work on packs that costs CPU, for one thread: making a pack for a tape out of packs of the repository, checking one that
 * was read from a tape, and taking chunks out of it.
 */
import { systemClock } from '../clock.js';
import { B2Error, ioError, isKind, messageOf } from '../errors.js';
import { CHUNK_ENTRY_BYTES, FRAME_HEADER_BYTES, FrameType } from '../format/frame.js';
import { packName } from '../format/names.js';
import { PACK_HEADER_BYTES, decodePackHeader, type FooterFrame } from '../format/pack.js';
import { SEAL_BYTES, type Sealer } from '../format/seal.js';
import {
  PackCache,
  frameWhat,
  openFrameBytes,
  readFooter,
  verifiedChunks,
  type OpenFrame,
  type OpenPack,
} from '../repo/pack-reader.js';
import type { PackContext } from '../repo/pack-writer.js';
import { READ_BYTES, piecesOf, readSlots, type WantedFrame } from '../restore/bulk-read.js';
import { ChunkRoom, SingleChunks } from '../restore/single.js';
import { salvagePack } from '../repair/salvage.js';
import { MapStore } from './map-store.js';
import { copyPiece, type CopiedPiece, type CopyJob } from './pack-copier.js';
import { KEY_STEP, PackMaker, SourcePack, framesOf, type BuildJob } from './pack-maker.js';

/** A chunk wanted of a pack: its key. */
export interface TakenChunk {
  readonly key: number;
  /** Where its bytes begin in the answer. */
  readonly offset: number;
  readonly length: number;
}

/** What a pack that was read holds. */
export interface PackChecked {
  readonly frames: number;
  readonly chunks: number;
  readonly plainBytes: number;
  readonly sealed: boolean;
  readonly damaged: readonly { readonly frame: number; readonly reason: string }[];
}

export interface PackTaken {
  readonly taken: readonly TakenChunk[];
  readonly bytes: Buffer<ArrayBuffer>;
  /** Frames that were wanted and cannot be used. */
  readonly damaged: readonly { readonly frame: number; readonly reason: string }[];
}

/** Bytes that a frame takes in a pack made by {@link PackWork.build} at most, header and footer entries included. */
export function frameBytesAtMost(frame: FooterFrame, wanted: number): number {
  const footer = 20 + wanted * CHUNK_ENTRY_BYTES;
  return wanted === frame.count
    ? FRAME_HEADER_BYTES + frame.storedBytes + footer
    : FRAME_HEADER_BYTES + SEAL_BYTES + wanted * CHUNK_ENTRY_BYTES + frame.plainBytes + footer;
}

/** Bytes of a pack besides its frames. */
export const PACK_REST_BYTES = 1024;

/** Small enough for a read at once of what is in memory, which a busy machine interrupts seldom. */
const PROBE_BYTES = 60 * 1024;
const PROBES = 5;
/** Packs, or pieces of them, after which it is asked again whether the page cache has them. */
const GUESS_FOR_PACKS = 8;
/** What comes faster comes from memory. */
const CACHED_BYTES_PER_S = 1.4e9;

/** Packs of the repository that are kept open. */
const OPEN_PACKS = 4;

/** Frames of a pack that were read: they lie in `bytes`, which begin at `offset` of the pack and may be too short. */
interface PieceRead {
  readonly frames: readonly WantedFrame<Uint32Array>[];
  readonly offset: number;
  readonly bytes: Buffer;
}

/** Reads frames in order, in large pieces, one ahead. A piece is valid until the next one is asked for. */
async function* readAhead(
  pack: OpenPack,
  frames: readonly WantedFrame<Uint32Array>[],
  slots: readonly [Buffer, Buffer],
): AsyncGenerator<PieceRead, void> {
  const pieces = piecesOf(frames);
  const read = async (index: number): Promise<PieceRead | undefined> => {
    const piece = pieces[index];
    if (piece === undefined) return undefined;
    const { offset, length } = piece;
    // A single frame larger than a slot (up to 16 MiB) is rare: it gets memory of its own.
    const into =
      length <= READ_BYTES
        ? slots[index % 2 === 0 ? 0 : 1].subarray(0, length)
        : Buffer.allocUnsafeSlow(length);
    try {
      const bytes = into.subarray(0, await pack.readRaw(into, offset));
      return { frames: frames.slice(piece.from, piece.to), offset, bytes };
    } catch (error) {
      throw ioError('read', packName(pack.packId), error);
    }
  };
  let ahead = read(0);
  try {
    for (let next = 1; ; next++) {
      const piece = await ahead;
      if (piece === undefined) return;
      ahead = read(next);
      ahead.catch(() => undefined); // seen when it is awaited
      yield piece;
    }
  } finally {
    await ahead.catch(() => undefined); // the slots are quiet afterwards
  }
}

/** One call at a time. {@link close} it. */
export class PackWork {
  readonly #ctx: PackContext;
  /** Memory that reads around the page cache, and such that reads through it. */
  readonly #slots = readSlots();
  #cacheSlots: readonly [Buffer, Buffer] | undefined;
  /** Which of them is used for so many more packs. */
  #guessed: readonly [Buffer, Buffer] | undefined;
  #guessFor = 0;
  /** For what seals hold, and for decompressed bodies: memory that is used again costs less than new. */
  #scratch: Buffer = Buffer.alloc(0);
  #body: Buffer = Buffer.alloc(0);

  /** Of the repository: neighbouring packs for the tape come from the same one. */
  readonly #packs: PackCache;
  #source: SourcePack | undefined;
  readonly #room = new ChunkRoom();

  constructor(ctx: PackContext) {
    this.#ctx = ctx;
    this.#packs = new PackCache(ctx, { maxOpen: OPEN_PACKS });
  }

  /** Writes the pack to `out` and returns its length. Kind `damaged` if a chunk it needs is. */
  async build(job: BuildJob, out: Buffer): Promise<number> {
    const maker = new PackMaker(this.#ctx, job, out);
    for (const { packId, keys } of job.sources) {
      const mark = maker.mark();
      await this.#packs.useAgain(packId, async (pack) => {
        maker.rollBack(mark);
        await this.#addFrom(maker, pack, keys);
      });
    }
    return maker.finish();
  }

  /**
   * Reads a piece of a pack of the repository to `out` as it is, checked. Kind `damaged` if anything of it is not right, `failed` (retryable) if the pack is not
   * what it was when the export was planned.
   */
  copy(job: CopyJob, out: Buffer): Promise<CopiedPiece> {
    return this.#packs.useAgain(job.packId, async (pack) => {
      const isCached = (await this.#slotsFor(pack, PACK_HEADER_BYTES)) === this.#cacheSlots;
      return copyPiece(this.#ctx, pack, this.#sourceOf(job.packId), job, out, isCached);
    });
  }

  /** Opens frames of a pack of the repository; valid until the next one is asked for. */
  #sourceOf(packId: string): SourcePack {
    if (this.#source?.packId !== packId)
      this.#source = new SourcePack(this.#ctx, packId, this.#room);
    return this.#source;
  }

  /** Adds chunks of one pack of the repository. */
  async #addFrom(maker: PackMaker, pack: OpenPack, keys: Uint32Array): Promise<void> {
    const { packId } = pack;
    const wanted: WantedFrame<Uint32Array>[] = [];
    for (const { number, from, to } of framesOf(keys)) {
      const frame = pack.frame(number);
      if (frame === undefined)
        throw new B2Error('damaged', `${frameWhat(packId, number)}: the pack has no such frame`, {
          hint: 'Run "b2 verify" to see which points need it.',
        });
      wanted.push({ frame, tag: keys.subarray(from, to) });
    }
    const source = this.#sourceOf(packId);
    const slots = await this.#slotsFor(pack, wanted[0]?.frame.offset ?? 0);
    for await (const piece of readAhead(pack, wanted, slots)) {
      for (const { frame, tag } of piece.frames) {
        const at = frame.offset - piece.offset;
        if (at + FRAME_HEADER_BYTES + frame.storedBytes > piece.bytes.length)
          throw new B2Error(
            'damaged',
            `${frameWhat(packId, frame.number)}: the pack ends before it`,
            { hint: 'Run "b2 verify" to see which points need it.' },
          );
        maker.add(source, frame, tag, piece.bytes, at);
      }
    }
  }

  /**
   * Packs that are in the page cache already (they were just read or made) are taken from there, which leaves the disk to the writing; others are read around
   * it, because nothing of them is needed again. Told by how long a read takes: a wrong guess costs time only.
   */
  async #slotsFor(pack: OpenPack, offset: number): Promise<readonly [Buffer, Buffer]> {
    if (this.#guessed === undefined) {
      this.#guessFor = GUESS_FOR_PACKS;
      this.#guessed = await this.#guessSlots(pack, offset);
    }
    const guessed = this.#guessed;
    if (--this.#guessFor <= 0) this.#guessed = undefined;
    return guessed;
  }

  async #guessSlots(pack: OpenPack, offset: number): Promise<readonly [Buffer, Buffer]> {
    this.#cacheSlots ??= [
      Buffer.allocUnsafeSlow(READ_BYTES),
      Buffer.allocUnsafeSlow(READ_BYTES),
    ] as const;
    const probe = this.#cacheSlots[0].subarray(0, PROBE_BYTES);
    const rates: number[] = [];
    try {
      for (let i = 0; i < PROBES; i++) {
        const at = offset + Math.floor(((pack.sizeBytes - offset) * i) / PROBES);
        const startNs = systemClock.monotonicNs();
        const bytes = await pack.readRaw(probe, at);
        rates.push((bytes * 1e9) / Number(systemClock.monotonicNs() - startNs + 1n));
      }
    } catch (error) {
      if (!isKind(error, 'io')) throw error;
      return this.#slots; // the reading itself will say so
    }
    const median = rates.sort((a, b) => a - b)[PROBES >> 1] ?? 0;
    return median > CACHED_BYTES_PER_S ? this.#cacheSlots : this.#slots;
  }

  /** Closes the packs of the repository that are open. */
  close(): Promise<void> {
    return this.#packs.close();
  }

  /** Opens every frame of a pack and compares every chunk with its id. `packId` is what its name says. */
  async check(packId: string, bytes: Buffer): Promise<PackChecked> {
    const damaged: { frame: number; reason: string }[] = [];
    let chunks = 0;
    let plainBytes = 0;
    const { frames, sealed, damage } = await this.#layout(packId, bytes);
    damaged.push(...damage);
    const named = new Set(damage.map((d) => d.frame));
    const sealer = this.#ctx.keys.packSealer(packId);
    const single = new SingleChunks(this.#ctx, packId, sealer, this.#room);
    for (const frame of frames) {
      const isSingle = frame.type === FrameType.chunks && frame.count === 1;
      if (isSingle && single.check(frame, bytes, frame.offset)) {
        chunks++;
        plainBytes += frame.plainBytes;
        continue;
      }
      try {
        const open = this.#frame(sealer, packId, bytes, frame, true);
        if (frame.type === FrameType.chunks)
          chunks += verifiedChunks(open, packId, this.#ctx.keys).entries.length;
        plainBytes += frame.plainBytes;
      } catch (error) {
        if (!isKind(error, 'damaged')) throw error;
        if (!named.has(frame.number)) damaged.push({ frame: frame.number, reason: error.message });
      }
    }
    return { frames: frames.length, chunks, plainBytes, sealed, damaged };
  }

  /** The chunks with these (ascending) keys, verified. */
  async take(packId: string, bytes: Buffer, keys: Uint32Array): Promise<PackTaken> {
    const damaged: { frame: number; reason: string }[] = [];
    const taken: TakenChunk[] = [];
    const parts: Buffer[] = [];
    let offset = 0;
    const { frames, damage } = await this.#layout(packId, bytes);
    const byNumber = new Map(frames.map((f) => [f.number, f]));
    const sealer = this.#ctx.keys.packSealer(packId);
    for (const { number, from, to } of framesOf(keys)) {
      try {
        const frame = byNumber.get(number);
        if (frame === undefined)
          throw new B2Error(
            'damaged',
            (damage.find((d) => d.frame === number) ?? damage[0])?.reason ??
              `${frameWhat(packId, number)}: the pack has no such frame`,
          );
        const open = this.#frame(sealer, packId, bytes, frame, false);
        const { entries, body, starts } = verifiedChunks(open, packId, this.#ctx.keys);
        for (let i = from; i < to; i++) {
          const key = keys[i] ?? 0;
          const sub = key % KEY_STEP;
          const length = entries[sub]?.lengthBytes;
          if (length === undefined)
            throw new B2Error('damaged', `${frameWhat(packId, number)}: it has no chunk ${sub}`);
          parts.push(body.subarray(starts[sub], (starts[sub] ?? 0) + length));
          taken.push({ key, offset, length });
          offset += length;
        }
      } catch (error) {
        if (!isKind(error, 'damaged')) throw error;
        damaged.push({ frame: number, reason: messageOf(error) });
      }
    }
    const out = Buffer.from(new ArrayBuffer(offset));
    taken.forEach((t, i) => parts[i]?.copy(out, t.offset));
    return { taken, bytes: out, damaged };
  }

  /** A frame of a pack that is in memory, opened. `brief`: it is valid until the next one. Kind `damaged` unless all is right. */
  #frame(
    sealer: Sealer,
    packId: string,
    bytes: Buffer,
    frame: FooterFrame,
    brief: boolean,
  ): OpenFrame {
    const what = frameWhat(packId, frame.number);
    const end = frame.offset + FRAME_HEADER_BYTES + frame.storedBytes;
    if (end > bytes.length) throw new B2Error('damaged', `${what}: the pack ends within the frame`);
    const sealed = bytes.subarray(frame.offset, end);
    let open: OpenFrame;
    if (brief) {
      this.#scratch = atLeast(this.#scratch, frame.storedBytes);
      if (frame.compression !== 0) this.#body = atLeast(this.#body, frame.plainBytes);
      const body = frame.compression === 0 ? undefined : this.#body.subarray(0, frame.plainBytes);
      open = openFrameBytes(this.#ctx, sealer, packId, sealed, body, this.#scratch);
    } else {
      open = openFrameBytes(this.#ctx, sealer, packId, sealed);
    }
    if (open.header.number !== frame.number || open.header.type !== frame.type)
      throw new B2Error('damaged', `${what}: another frame lies where the footer says this one is`);
    return open;
  }

  /**
   * Where the frames of a pack are: as its footer says, or, where header or footer are damaged, all that open, also behind damage. `damage`: what
   * is wrong with the pack besides its frames, under the number ffffffff, and frames that were found and do not open.
   */
  async #layout(
    packId: string,
    bytes: Buffer,
  ): Promise<{
    readonly frames: readonly FooterFrame[];
    readonly sealed: boolean;
    readonly damage: readonly { readonly frame: number; readonly reason: string }[];
  }> {
    const what = `pack ${packId}`;
    let reason = `${what}: its footer is damaged`;
    if (bytes.length < PACK_HEADER_BYTES) {
      return {
        frames: [],
        sealed: false,
        damage: [{ frame: FOOTER_NUMBER, reason: `${what} is cut off` }],
      };
    }
    try {
      const { repositoryId, keys } = this.#ctx;
      const header = decodePackHeader(bytes.subarray(0, PACK_HEADER_BYTES), {
        packId,
        repositoryId,
      });
      if (header.encrypted !== keys.encrypted)
        throw new B2Error('damaged', `${what}: its encryption is not that of the repository`);
      const reader = await new MapStore('the tape', new Map([[what, bytes]])).open(what);
      const found = await readFooter(this.#ctx, reader, packId);
      if (found !== undefined) return { frames: found.footer.frames, sealed: true, damage: [] };
    } catch (error) {
      if (!isKind(error, 'damaged')) throw error;
      reason = error.message;
    }
    const { footer, damaged } = salvagePack(
      { packContext: () => this.#ctx, id: this.#ctx.repositoryId },
      packId,
      bytes,
    );
    return {
      frames: footer.frames,
      sealed: false,
      damage: [
        { frame: FOOTER_NUMBER, reason },
        ...damaged.map((d) => ({ frame: d.number, reason: d.reason })),
      ],
    };
  }
}

/** What stands for the number of a footer's frame (FORMAT.md 5.2). */
export const FOOTER_NUMBER = 0xffff_ffff;

function atLeast(buffer: Buffer, bytes: number): Buffer {
  return buffer.length >= bytes ? buffer : Buffer.allocUnsafe(bytes * 2);
}
