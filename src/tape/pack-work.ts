/**
 * The work on packs that costs CPU, for one thread: making a pack for a tape out of packs of the repository, checking one that
 * was read from a tape, and taking chunks out of it.
 */
import { systemClock } from '../clock.js';
import { B2Error, ioError, isKind, messageOf } from '../errors.js';
import {
  CHUNK_ENTRY_BYTES,
  FRAME_HEADER_BYTES,
  FrameType,
  decodeChunkEntries,
  decodeFrameHeader,
  encodeChunkEntry,
  encodeFrameHeader,
  type FrameHeader,
} from '../format/frame.js';
import { packName } from '../format/names.js';
import {
  PACK_HEADER_BYTES,
  decodePackHeader,
  encodeFooter,
  encodePackHeader,
  type FooterFrame,
} from '../format/pack.js';
import { SEAL_BYTES, numberNonce, type Sealer } from '../format/seal.js';
import {
  OpenPack,
  frameWhat,
  openFrameBytes,
  readFooter,
  verifiedChunks,
  type OpenFrame,
} from '../repo/pack-reader.js';
import type { PackContext } from '../repo/pack-writer.js';
import {
  READ_BYTES,
  bulkRead,
  readSlots,
  type PackFrames,
  type WantedFrame,
} from '../restore/bulk-read.js';
import { salvagePack } from '../repair/salvage.js';
import { MapStore } from './map-store.js';

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

const PROBE_BYTES = 512 * 1024;
/** Packs after which it is asked again whether the page cache has them. */
const GUESS_FOR_PACKS = 8;
/** What comes faster comes from memory. */
const CACHED_BYTES_PER_S = 1.4e9;

/** One call at a time. */
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

  constructor(ctx: PackContext) {
    this.#ctx = ctx;
  }

  /** Writes the pack to `out` and returns its length. Kind `damaged` if a chunk it needs is. */
  async build(job: BuildJob, out: Buffer): Promise<number> {
    const { keys, repositoryId } = this.#ctx;
    const sealer = keys.packSealer(job.packId);
    const header = encodePackHeader({
      packId: job.packId,
      repositoryId,
      encrypted: keys.encrypted,
      generation: 0,
      createdNs: job.createdNs,
    });
    let at = header.copy(out, 0);
    const frames: FooterFrame[] = [];
    const ids: Buffer[] = [];
    const lengths: number[] = [];
    const aad = Buffer.alloc(16 + FRAME_HEADER_BYTES);
    aad.write(job.packId, 0, 'hex');
    const add = (h: FrameHeader, parts: readonly Buffer[], head: Buffer): void => {
      encodeFrameHeader(h, out, at);
      out.copy(aad, 16, at, at + FRAME_HEADER_BYTES);
      sealer.sealInto(numberNonce(h.number), aad, parts, out, at + FRAME_HEADER_BYTES);
      const { number, storedBytes, plainBytes, type, compression, count } = h;
      frames.push({ number, offset: at, storedBytes, plainBytes, type, compression, count });
      for (const e of decodeChunkEntries(head, h, `pack ${job.packId}`)) {
        ids.push(Buffer.from(e.id));
        lengths.push(e.lengthBytes);
      }
      at += FRAME_HEADER_BYTES + storedBytes;
    };
    for await (const piece of bulkRead(this.#wanted(job.sources), await this.#slotsFor(job))) {
      const { packId } = piece.pack;
      if (piece.failure !== undefined) throw ioError('read', packName(packId), piece.failure);
      const source = this.#ctx.keys.packSealer(packId);
      for (const { frame, tag } of piece.frames) {
        const bytes = piece.bytesOf(frame);
        if (bytes === undefined)
          throw new B2Error(
            'damaged',
            `${frameWhat(packId, frame.number)}: the pack ends before it`,
            {
              hint: 'Run "b2 verify" to see which points need it.',
            },
          );
        const number = frames.length;
        if (tag.length === frame.count) this.#copy(source, packId, frame, bytes, number, add);
        else this.#choose(source, packId, bytes, tag, number, add);
      }
    }
    const footer = { frames, ids: Buffer.concat(ids), lengths: Uint32Array.from(lengths) };
    const end = encodeFooter(footer, job.packId, at, Buffer.from(job.salt, 'hex'), keys);
    if (at + end.length > out.length) throw new Error('the pack is larger than was planned');
    return at + end.copy(out, at);
  }

  /**
   * Packs that are in the page cache already (they were just read or made) are taken from there, which leaves the disk to the writing; others are read around
   * it, because nothing of them is needed again. Told by how long a read takes: a wrong guess costs time only.
   */
  async #slotsFor(job: BuildJob): Promise<readonly [Buffer, Buffer]> {
    const [first] = job.sources;
    if (first === undefined || this.#guessed !== undefined) {
      const guessed = this.#guessed ?? this.#slots;
      if (--this.#guessFor === 0) this.#guessed = undefined;
      return guessed;
    }
    this.#guessFor = GUESS_FOR_PACKS;
    this.#guessed = await this.#guessSlots(first);
    return this.#guessed;
  }

  async #guessSlots(first: WantedChunks): Promise<readonly [Buffer, Buffer]> {
    this.#cacheSlots ??= [
      Buffer.allocUnsafeSlow(READ_BYTES),
      Buffer.allocUnsafeSlow(READ_BYTES),
    ] as const;
    const pack = await OpenPack.open(this.#ctx, first.packId);
    try {
      const frame = pack.frame(Math.floor((first.keys[0] ?? 0) / KEY_STEP));
      const probe = this.#cacheSlots[0].subarray(0, PROBE_BYTES);
      const startNs = systemClock.monotonicNs();
      const bytes = await pack.readRaw(probe, frame?.offset ?? 0);
      const ns = Number(systemClock.monotonicNs() - startNs);
      return bytes * 1e9 > CACHED_BYTES_PER_S * ns ? this.#cacheSlots : this.#slots;
    } catch (error) {
      if (!isKind(error, 'io')) throw error;
      return this.#slots; // the reading itself will say so
    } finally {
      await pack.close();
    }
  }

  /** The frame as it is, under another seal. Its chunks are what they were when the seal was made. */
  #copy(
    source: Sealer,
    packId: string,
    frame: FooterFrame,
    bytes: Buffer,
    number: number,
    add: (h: FrameHeader, parts: readonly Buffer[], head: Buffer) => void,
  ): void {
    const what = frameWhat(packId, frame.number);
    const old = decodeFrameHeader(bytes, 0, what);
    if (old.number !== frame.number || old.type !== FrameType.chunks)
      throw new B2Error('damaged', `${what}: another frame lies there`);
    const aad = Buffer.allocUnsafe(16 + FRAME_HEADER_BYTES);
    aad.write(packId, 0, 'hex');
    bytes.copy(aad, 16, 0, FRAME_HEADER_BYTES);
    this.#scratch = atLeast(this.#scratch, old.storedBytes);
    const plain = source.open(
      numberNonce(old.number),
      aad,
      bytes.subarray(FRAME_HEADER_BYTES, FRAME_HEADER_BYTES + old.storedBytes),
      this.#scratch.subarray(0, old.storedBytes - SEAL_BYTES),
    );
    if (plain === undefined)
      throw new B2Error('damaged', `${what}: the seal does not open`, {
        hint: 'Run "b2 verify" to see which points need it.',
      });
    add({ ...old, number }, [plain], plain.subarray(0, old.headBytes));
  }

  /** A frame of some of the chunks of another. */
  #choose(
    source: Sealer,
    packId: string,
    bytes: Buffer,
    wanted: Uint32Array,
    number: number,
    add: (h: FrameHeader, parts: readonly Buffer[], head: Buffer) => void,
  ): void {
    const open = openFrameBytes(this.#ctx, source, packId, bytes);
    const chunks = verifiedChunks(open, packId, this.#ctx.keys);
    const head = Buffer.alloc(wanted.length * CHUNK_ENTRY_BYTES);
    const bodies: Buffer[] = [];
    wanted.forEach((key, i) => {
      const sub = key % KEY_STEP;
      const entry = chunks.entries[sub];
      if (entry === undefined)
        throw new B2Error(
          'damaged',
          `${frameWhat(packId, open.header.number)}: it has no chunk ${sub}`,
        );
      encodeChunkEntry(entry.id, entry.lengthBytes, head, i * CHUNK_ENTRY_BYTES);
      bodies.push(chunks.body.subarray(chunks.starts[sub], chunks.starts[sub + 1]));
    });
    const plain = Buffer.concat(bodies);
    const room = Buffer.allocUnsafe(Math.max(16, plain.length - (plain.length >> 4)));
    const packed = this.#ctx.lz4.compress(plain, room);
    const body = packed > 0 ? room.subarray(0, packed) : plain;
    add(
      {
        type: FrameType.chunks,
        compression: packed > 0 ? 1 : 0,
        count: wanted.length,
        number,
        storedBytes: head.length + body.length + SEAL_BYTES,
        plainBytes: plain.length,
        headBytes: head.length,
      },
      [head, body],
      head,
    );
  }

  async *#wanted(sources: readonly WantedChunks[]): AsyncGenerator<PackFrames<Uint32Array>, void> {
    for (const { packId, keys } of sources) {
      const pack = await OpenPack.open(this.#ctx, packId);
      const frames: WantedFrame<Uint32Array>[] = [];
      for (const { number, from, to } of framesOf(keys)) {
        const frame = pack.frame(number);
        if (frame === undefined) {
          await pack.close();
          throw new B2Error('damaged', `${frameWhat(packId, number)}: the pack has no such frame`, {
            hint: 'Run "b2 verify" to see which points need it.',
          });
        }
        frames.push({ frame, tag: keys.subarray(from, to) });
      }
      yield { pack, frames };
    }
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
    for (const frame of frames) {
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
