/**
 * The work on packs that costs CPU, for one thread: making a pack for a tape out of packs of the repository, checking one that
 * was read from a tape, and taking chunks out of it.
 */
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
  encodeFooter,
  encodePackHeader,
  type FooterFrame,
} from '../format/pack.js';
import { SEAL_BYTES, numberNonce, type Sealer } from '../format/seal.js';
import { OpenPack, frameWhat, openFrameBytes, verifiedChunks } from '../repo/pack-reader.js';
import type { PackContext } from '../repo/pack-writer.js';
import { bulkRead, readSlots, type PackFrames, type WantedFrame } from '../restore/bulk-read.js';
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

/** One call at a time. */
export class PackWork {
  readonly #ctx: PackContext;
  readonly #slots = readSlots();
  #scratch: Buffer = Buffer.alloc(0);

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
    for await (const piece of bulkRead(this.#wanted(job.sources), this.#slots)) {
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
    if (this.#scratch.length < old.storedBytes)
      this.#scratch = Buffer.allocUnsafe(old.storedBytes * 2);
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
    let pack: OpenPack;
    try {
      pack = await this.#open(packId, bytes);
    } catch (error) {
      if (!isKind(error, 'damaged')) throw error;
      return {
        frames: 0,
        chunks,
        plainBytes,
        sealed: false,
        damaged: [{ frame: 0, reason: error.message }],
      };
    }
    for (const frame of pack.footer.frames) {
      try {
        if (frame.type === FrameType.chunks) {
          chunks += (await pack.readChunks(frame.number)).entries.length;
        } else {
          await pack.readFrame(frame.number);
        }
        plainBytes += frame.plainBytes;
      } catch (error) {
        if (!isKind(error, 'damaged')) throw error;
        damaged.push({ frame: frame.number, reason: error.message });
      }
    }
    return { frames: pack.footer.frames.length, chunks, plainBytes, sealed: pack.sealed, damaged };
  }

  /** The chunks with these (ascending) keys, verified. */
  async take(packId: string, bytes: Buffer, keys: Uint32Array): Promise<PackTaken> {
    const damaged: { frame: number; reason: string }[] = [];
    const taken: TakenChunk[] = [];
    const parts: Buffer[] = [];
    let offset = 0;
    const lost = (frame: number, error: unknown): void => {
      if (!isKind(error, 'damaged')) throw error;
      damaged.push({ frame, reason: messageOf(error) });
    };
    let pack: OpenPack | undefined;
    try {
      pack = await this.#open(packId, bytes);
    } catch (error) {
      for (const { number } of framesOf(keys)) lost(number, error);
    }
    for (const { number, from, to } of pack === undefined ? [] : framesOf(keys)) {
      try {
        const { entries, body, starts } = await (pack?.readChunks(number) ?? Promise.reject());
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
        lost(number, error);
      }
    }
    const out = Buffer.from(new ArrayBuffer(offset));
    taken.forEach((t, i) => parts[i]?.copy(out, t.offset));
    return { taken, bytes: out, damaged };
  }

  async #open(packId: string, bytes: Buffer): Promise<OpenPack> {
    if (bytes.length < PACK_HEADER_BYTES) throw new B2Error('damaged', `pack ${packId} is cut off`);
    const store = new MapStore('the tape', new Map([[packName(packId), bytes]]));
    return OpenPack.open({ ...this.#ctx, store }, packId);
  }
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
