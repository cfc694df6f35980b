/**
 * Reads packs (FORMAT.md section 5): footers, frames, and forward reading of packs that were never sealed. Everything is
 * verified on the way: checksum of the header, seal, chunk ids.
 */
import { BufferPool } from '../buffer-pool.js';
import { B2Error, isKind } from '../errors.js';
import { damaged } from '../format/bytes.js';
import {
  FRAME_HEADER_BYTES,
  FrameType,
  decodeChunkEntries,
  decodeFrameHeader,
  type ChunkEntry,
  type FrameHeader,
} from '../format/frame.js';
import { packName } from '../format/names.js';
import {
  PACK_HEADER_BYTES,
  PACK_TRAILER_BYTES,
  decodeFooter,
  decodePackHeader,
  decodeTrailer,
  type FooterFrame,
  type PackFooter,
  type PackHeader,
} from '../format/pack.js';
import { numberNonce, type KeyRing, type Sealer } from '../format/seal.js';
import { HASH_BYTES } from '../hash.js';
import type { Lz4 } from '../lz4.js';
import type { ReadAhead } from './read-ahead.js';
import { ChunkRoom, SingleChunks } from './single-chunks.js';
import type { ObjectReader, Store } from './store.js';

/** What reading packs needs. */
export interface PackReadContext {
  readonly store: Store;
  readonly keys: KeyRing;
  readonly lz4: Lz4;
  readonly repositoryId: string;
}

/** A frame whose seal has been opened and whose body is decompressed. Chunk ids have not been compared yet. */
export interface OpenFrame {
  readonly header: FrameHeader;
  readonly head: Buffer;
  readonly body: Buffer;
}

/** The chunks of a frame, each verified against its id. */
export interface FrameChunks {
  readonly entries: readonly ChunkEntry[];
  readonly body: Buffer;
  /** Where chunk i starts in `body`; one more entry for the end. */
  readonly starts: readonly number[];
}

/** Bytes read at the end of a pack in the hope of getting footer and trailer at once. */
const TAIL_GUESS_BYTES = 128 * 1024;
/** Forward reading reads this much at a time. */
const FORWARD_BYTES = 4 * 1024 * 1024;
/** Memory for frames as they are stored, used again. */
const stored = new BufferPool(4 * 1024 * 1024);
const room = new ChunkRoom();
const TRAILER_MAGIC = Buffer.from('B2PE', 'latin1');

export function frameWhat(packId: string, frame: number): string {
  return `pack ${packId}, frame ${frame}`;
}

/**
 * Opens the seal of one frame. `bytes` starts at the frame's header and holds all of it. `into`, if given, takes an
 * uncompressed body (its length must be the plain length). `scratch`, if given, may be used for what the seal holds, which head and body then share.
 * Kind `damaged` unless everything is right.
 */
export function openFrameBytes(
  ctx: { readonly lz4: Lz4 },
  sealer: Sealer,
  packId: string,
  bytes: Buffer,
  into?: Buffer,
  scratch?: Buffer,
): OpenFrame {
  const header = decodeFrameHeader(bytes, 0, `pack ${packId}`);
  const what = frameWhat(packId, header.number);
  const aad = Buffer.allocUnsafe(16 + FRAME_HEADER_BYTES);
  aad.write(packId, 0, 'hex');
  bytes.copy(aad, 16, 0, FRAME_HEADER_BYTES);
  const end = FRAME_HEADER_BYTES + header.storedBytes;
  if (bytes.length < end) throw damaged(what, bytes.length, 'the frame is cut off');
  const plain = sealer.open(
    numberNonce(header.number),
    aad,
    bytes.subarray(FRAME_HEADER_BYTES, end),
    scratch,
  );
  if (plain === undefined) throw damaged(what, 0, 'the seal does not open');
  const head = plain.subarray(0, header.headBytes);
  const stored = plain.subarray(header.headBytes);
  if (header.compression === 0) {
    if (stored.length !== header.plainBytes)
      throw damaged(what, 0, 'the body has another length than the header says');
    if (into === undefined) return { header, head, body: stored };
    stored.copy(into);
    return { header, head, body: into };
  }
  const body = into ?? Buffer.allocUnsafe(header.plainBytes);
  if (body.length !== header.plainBytes || !ctx.lz4.decompress(stored, body)) {
    throw damaged(what, 0, 'the body does not decompress');
  }
  return { header, head, body };
}

/** Splits an open chunk frame and compares every chunk with its id. */
export function verifiedChunks(frame: OpenFrame, packId: string, keys: KeyRing): FrameChunks {
  const what = frameWhat(packId, frame.header.number);
  if (frame.header.type !== FrameType.chunks) throw damaged(what, 0, 'not a frame of chunks');
  const entries = decodeChunkEntries(frame.head, frame.header, what);
  const starts = [0];
  let at = 0;
  for (const entry of entries) {
    const end = at + entry.lengthBytes;
    if (!keys.chunkId(frame.body.subarray(at, end)).equals(entry.id)) {
      throw damaged(what, at, 'a chunk is not what its id says');
    }
    starts.push(end);
    at = end;
  }
  return { entries, body: frame.body, starts };
}

/** One pack, open for reading. Get it from a {@link PackCache} or {@link OpenPack.open}; `close` it in the latter case. */
export class OpenPack {
  readonly header: PackHeader;
  readonly sealed: boolean;
  /** Bytes up to which frames are valid (of a sealed pack: all up to the footer). */
  readonly validBytes: number;
  readonly footer: PackFooter;
  private readonly ctx: PackReadContext;
  private readonly reader: ObjectReader;
  private readonly sealer: Sealer;
  private byNumber: Map<number, number> | undefined;
  private single: SingleChunks | undefined;

  private constructor(
    ctx: PackReadContext,
    reader: ObjectReader,
    header: PackHeader,
    found: { sealed: boolean; validBytes: number; footer: PackFooter },
    sealer: Sealer,
  ) {
    this.ctx = ctx;
    this.reader = reader;
    this.header = header;
    this.sealed = found.sealed;
    this.validBytes = found.validBytes;
    this.footer = found.footer;
    this.sealer = sealer;
  }

  get packId(): string {
    return this.header.packId;
  }

  /** Size of the object when it was opened. */
  get sizeBytes(): number {
    return this.reader.sizeBytes;
  }

  /** Bytes of memory that the footer takes, about. */
  get memoryBytes(): number {
    return (
      this.footer.frames.length * 80 +
      this.footer.ids.length +
      this.footer.lengths.byteLength +
      4096
    );
  }

  /**
   * Opens pack `packId`: reads its footer, or, of a pack without one, reads forward to the last valid frame. A sealed pack whose
   * footer is damaged counts as unsealed.
   */
  static async open(ctx: PackReadContext, packId: string): Promise<OpenPack> {
    const name = packName(packId);
    const reader = await ctx.store.open(name).catch((error: unknown) => {
      if (isKind(error, 'not-found')) {
        throw new B2Error('damaged', `pack ${packId} is missing from ${ctx.store.url}`, {
          cause: error,
          hint: 'Run "b2 verify" to see which points need it.',
        });
      }
      throw error;
    });
    try {
      const first = Buffer.alloc(PACK_HEADER_BYTES);
      let n = await reader.read(first, 0);
      // Nobody believes at first sight that there is nothing.
      if (n < Math.min(PACK_HEADER_BYTES, reader.sizeBytes)) n = await reader.read(first, 0);
      if (n < Math.min(PACK_HEADER_BYTES, reader.sizeBytes))
        throw damaged(`pack ${packId}`, n, 'it ends before its size');
      if (n < PACK_HEADER_BYTES || first.every((b) => b === 0)) {
        // A crash came before its first sync: it holds nothing (FORMAT.md section 5).
        return new OpenPack(
          ctx,
          reader,
          {
            packId,
            repositoryId: ctx.repositoryId,
            encrypted: ctx.keys.encrypted,
            generation: 0,
            createdNs: 0n,
          },
          {
            sealed: false,
            validBytes: 0,
            footer: { frames: [], ids: Buffer.alloc(0), lengths: new Uint32Array(0) },
          },
          ctx.keys.packSealer(packId),
        );
      }
      const header = decodePackHeader(first.subarray(0, n), {
        packId,
        repositoryId: ctx.repositoryId,
      });
      if (header.encrypted !== ctx.keys.encrypted) {
        throw damaged(`pack ${packId}`, 10, 'its encryption is not that of the repository');
      }
      const sealer = ctx.keys.packSealer(packId);
      const footer = await readFooter(ctx, reader, packId);
      if (footer !== undefined) {
        return new OpenPack(
          ctx,
          reader,
          header,
          { sealed: true, validBytes: footer.offset, footer: footer.footer },
          sealer,
        );
      }
      const forward = await readForward(ctx, reader, packId, sealer);
      return new OpenPack(ctx, reader, header, { sealed: false, ...forward }, sealer);
    } catch (error) {
      await reader.close();
      throw error;
    }
  }

  /** The frame with this number, or undefined if the pack has none (any more). */
  frame(number: number): FooterFrame | undefined {
    const { frames } = this.footer;
    const guess = frames[number];
    if (guess?.number === number) return guess;
    if (this.byNumber === undefined) {
      const map = new Map<number, number>();
      frames.forEach((f, i) => map.set(f.number, i));
      this.byNumber = map;
    }
    const index = this.byNumber.get(number);
    return index === undefined ? undefined : frames[index];
  }

  /** Reads and opens one frame. Kind `damaged` if it is not there or not right. */
  async readFrame(number: number): Promise<OpenFrame> {
    const what = frameWhat(this.packId, number);
    const frame = this.frame(number);
    if (frame === undefined) throw damaged(what, 0, 'the pack has no such frame');
    const bytes = Buffer.allocUnsafe(FRAME_HEADER_BYTES + frame.storedBytes);
    const n = await this.reader.read(bytes, frame.offset);
    if (n !== bytes.length) throw damaged(what, frame.offset + n, 'the pack ends within the frame');
    const open = openFrameBytes(this.ctx, this.sealer, this.packId, bytes);
    if (open.header.number !== number || open.header.type !== frame.type) {
      throw damaged(what, frame.offset, 'another frame lies where the footer says this one is');
    }
    return open;
  }

  /** The chunks of frame `number`, verified. */
  async readChunks(number: number): Promise<FrameChunks> {
    const quick = await this.readOneChunk(number);
    if (quick !== undefined) return quick;
    return verifiedChunks(await this.readFrame(number), this.packId, this.ctx.keys);
  }

  /** The short way, for a frame of one chunk; undefined where it is none, or not right, which the long way will say. */
  private async readOneChunk(number: number): Promise<FrameChunks | undefined> {
    const frame = this.frame(number);
    if (frame === undefined || frame.type !== FrameType.chunks || frame.count !== 1)
      return undefined;
    const bytes = stored.take(FRAME_HEADER_BYTES + frame.storedBytes);
    const n = await this.reader.read(bytes, frame.offset);
    this.single ??= new SingleChunks(this.ctx, this.packId, this.sealer, room);
    const body = Buffer.allocUnsafeSlow(frame.plainBytes);
    const isRight = n === bytes.length && this.single.open(frame, bytes, 0, body);
    stored.give(bytes);
    if (!isRight) return undefined;
    const id = Buffer.allocUnsafe(HASH_BYTES);
    this.single.copyId(id, 0);
    return { entries: [{ id, lengthBytes: body.length }], body, starts: [0, body.length] };
  }

  /** Raw bytes, for compaction and bulk reading. */
  async readRaw(into: Uint8Array, offset: number): Promise<number> {
    return this.reader.read(into, offset);
  }

  async close(): Promise<void> {
    await this.reader.close();
  }
}

/** The footer of an open pack and its offset, or undefined if it has none that is good. */
export async function readFooter(
  ctx: PackReadContext,
  reader: ObjectReader,
  packId: string,
): Promise<{ offset: number; footer: PackFooter } | undefined> {
  const size = reader.sizeBytes;
  if (size < PACK_HEADER_BYTES + PACK_TRAILER_BYTES) return undefined;
  const guess = Math.min(TAIL_GUESS_BYTES, size);
  const tail = Buffer.allocUnsafe(guess);
  if ((await reader.read(tail, size - guess)) !== guess) return undefined;
  const trailer = decodeTrailer(tail.subarray(guess - PACK_TRAILER_BYTES), size);
  if (trailer === undefined) return undefined;
  let bytes: Buffer;
  if (trailer.offset >= size - guess) {
    const at = trailer.offset - (size - guess);
    bytes = tail.subarray(at, at + trailer.lengthBytes);
  } else {
    bytes = Buffer.allocUnsafe(trailer.lengthBytes);
    if ((await reader.read(bytes, trailer.offset)) !== bytes.length) return undefined;
  }
  try {
    return { offset: trailer.offset, footer: decodeFooter(bytes, packId, ctx.keys) };
  } catch (error) {
    if (isKind(error, 'damaged')) return undefined; // read it forward instead; verify reports the footer
    throw error;
  }
}

async function readForward(
  ctx: PackReadContext,
  reader: ObjectReader,
  packId: string,
  sealer: Sealer,
): Promise<{ validBytes: number; footer: PackFooter }> {
  const frames: FooterFrame[] = [];
  const ids: Buffer[] = [];
  const lengths: number[] = [];
  let window: Buffer = Buffer.alloc(0);
  let base = PACK_HEADER_BYTES;
  let at = base;
  let last = -1;
  const have = async (bytes: number): Promise<boolean> => {
    if (at + bytes <= base + window.length) return true;
    // No more than there is: opening a small pack must not cost 4 MiB.
    const next = Buffer.allocUnsafe(
      Math.max(bytes, Math.min(FORWARD_BYTES, reader.sizeBytes - at)),
    );
    const n = await reader.read(next, at);
    window = next.subarray(0, n);
    base = at;
    return n >= bytes;
  };
  /** Passes over what lies at `at`; false if that is nothing valid. */
  const step = async (): Promise<boolean> => {
    if (!(await have(FRAME_HEADER_BYTES))) return false;
    let header: FrameHeader;
    try {
      header = decodeFrameHeader(window, at - base, `pack ${packId}`);
    } catch (error) {
      if (isKind(error, 'damaged')) return false;
      throw error;
    }
    const total = FRAME_HEADER_BYTES + header.storedBytes;
    if (!(await have(total))) return false;
    if (header.type === FrameType.footer) {
      at += total;
      if (
        (await have(PACK_TRAILER_BYTES)) &&
        window.subarray(at - base, at - base + 4).equals(TRAILER_MAGIC)
      ) {
        at += PACK_TRAILER_BYTES;
      }
      return true;
    }
    if (header.number <= last) return false;
    try {
      const open = openFrameBytes(
        ctx,
        sealer,
        packId,
        window.subarray(at - base, at - base + total),
      );
      if (header.type === FrameType.chunks) {
        for (const e of decodeChunkEntries(open.head, header, `pack ${packId}`)) {
          ids.push(Buffer.from(e.id));
          lengths.push(e.lengthBytes);
        }
      }
    } catch (error) {
      if (isKind(error, 'damaged')) return false;
      throw error;
    }
    last = header.number;
    frames.push({
      number: header.number,
      offset: at,
      storedBytes: header.storedBytes,
      plainBytes: header.plainBytes,
      type: header.type,
      compression: header.compression,
      count: header.count,
    });
    at += total;
    return true;
  };
  // Where valid frames end before the object does, once more: a read that went wrong must not pass for the torn end of a crash, or
  // whoever seals the pack would cut off commits that are there.
  let doubted = -1;
  for (;;) {
    if (await step()) continue;
    if (at === doubted || at >= reader.sizeBytes) break;
    doubted = at;
    window = Buffer.alloc(0);
    base = at;
  }
  return {
    validBytes: at,
    footer: { frames, ids: Buffer.concat(ids), lengths: Uint32Array.from(lengths) },
  };
}

interface CacheEntry {
  readonly pack: Promise<OpenPack>;
  users: number;
  stale: boolean;
}

/**
 * Packs open for reading, at most `maxOpen` at once (least recently used goes first), and the chunks read last, at most
 * `maxChunkBytes`. Safe for concurrent use. A frame that is not where a remembered footer says (compaction, or a pack that has
 * grown) is looked for once more in a fresh footer.
 */
export class PackCache {
  private readonly ctx: PackReadContext;
  private readonly maxOpen: number;
  private readonly maxChunkBytes: number;
  private readonly packs = new Map<string, CacheEntry>();
  private readonly chunks = new Map<
    string,
    { readonly value: Promise<FrameChunks>; bytes: number }
  >();
  private chunkBytes = 0;
  private openAhead: (() => Promise<ReadAhead>) | undefined;
  private opening: Promise<void> | undefined;
  private ahead: ReadAhead | undefined;

  constructor(ctx: PackReadContext, limits: { maxOpen?: number; maxChunkBytes?: number } = {}) {
    this.ctx = ctx;
    this.maxOpen = limits.maxOpen ?? 128;
    this.maxChunkBytes = limits.maxChunkBytes ?? 32 * 1024 * 1024;
  }

  /** Lets readers have what `open` opens when the first of them asks for it. Closed with the cache. */
  allowReadAhead(open: () => Promise<ReadAhead>): void {
    this.openAhead ??= open;
  }

  /** Threads to decode in; undefined while they start, and where there are none. `start`: they are wanted now. */
  readAhead(start: boolean): ReadAhead | undefined {
    const open = this.openAhead;
    if (open === undefined || (!start && this.opening === undefined)) return undefined;
    this.opening ??= open().then(
      (ahead) => {
        this.ahead = ahead;
        ahead.isReady();
      },
      () => undefined, // everything goes on without
    );
    return this.ahead?.isReady() === true ? this.ahead : undefined;
  }

  /** Runs `fn` with the pack open; it stays open meanwhile. */
  async use<T>(packId: string, fn: (pack: OpenPack) => Promise<T>): Promise<T> {
    let entry = this.packs.get(packId);
    if (entry === undefined) {
      entry = { pack: OpenPack.open(this.ctx, packId), users: 0, stale: false };
      const mine = entry;
      entry.pack.catch(() => {
        if (this.packs.get(packId) === mine) this.packs.delete(packId);
      });
    } else {
      this.packs.delete(packId); // to the end: most recently used
    }
    this.packs.set(packId, entry);
    entry.users++;
    try {
      return await fn(await entry.pack);
    } finally {
      entry.users--;
      if (entry.stale && entry.users === 0) void closeQuietly(entry.pack);
      this.evict();
    }
  }

  /**
   * {@link use}, and once more with the pack opened anew if `fn` finds damage: a pack that somebody writes grows, and compaction
   * replaces one, while it is remembered here as it was. And if it cannot be read (kind `io`): what is open of a disk that was away stays
   * unreadable when that is back. `fn` must bear to be run twice.
   */
  async useAgain<T>(packId: string, fn: (pack: OpenPack) => Promise<T>): Promise<T> {
    try {
      return await this.use(packId, fn);
    } catch (error) {
      if (!isKind(error, 'damaged', 'io')) throw error;
      this.forget(packId);
      return this.use(packId, fn);
    }
  }

  /** Forgets what is remembered of a pack, so that the next use reads it anew. */
  forget(packId: string): void {
    const entry = this.packs.get(packId);
    if (entry === undefined) return;
    this.packs.delete(packId);
    entry.stale = true;
    if (entry.users === 0) void closeQuietly(entry.pack);
  }

  /** The verified chunks of a frame, from memory where they are. */
  async chunksOf(packId: string, frame: number): Promise<FrameChunks> {
    const key = `${packId}/${frame}`;
    const known = this.chunks.get(key);
    if (known !== undefined) {
      this.chunks.delete(key);
      this.chunks.set(key, known);
      return known.value;
    }
    const value = this.useAgain(packId, (pack) => pack.readChunks(frame));
    const entry = { value, bytes: 0 };
    this.chunks.set(key, entry);
    try {
      const chunks = await value;
      entry.bytes = chunks.body.length + 512;
      this.chunkBytes += entry.bytes;
      for (const [k, e] of this.chunks) {
        if (this.chunkBytes <= this.maxChunkBytes) break;
        if (e.bytes === 0 || e === entry) continue;
        this.chunks.delete(k);
        this.chunkBytes -= e.bytes;
      }
      return chunks;
    } catch (error) {
      if (this.chunks.get(key) === entry) this.chunks.delete(key);
      throw error;
    }
  }

  private evict(): void {
    if (this.packs.size <= this.maxOpen) return;
    for (const [id, entry] of this.packs) {
      if (this.packs.size <= this.maxOpen) return;
      if (entry.users > 0) continue;
      this.packs.delete(id);
      void closeQuietly(entry.pack);
    }
  }

  /** Closes everything. */
  async close(): Promise<void> {
    this.openAhead = undefined;
    await this.opening;
    await this.ahead?.close();
    const all = [...this.packs.values()];
    this.packs.clear();
    this.chunks.clear();
    this.chunkBytes = 0;
    await Promise.all(all.map((e) => closeQuietly(e.pack)));
  }
}

async function closeQuietly(pack: Promise<OpenPack>): Promise<void> {
  try {
    await (await pack).close();
  } catch {
    // It failed to open, which was reported then, or to close, which loses nothing of a read-only object.
  }
}
