/**
 * Writes one pack (FORMAT.md section 5): frames into page-aligned memory, that to the store.
 *
 * Where the store can append, bytes go out as they come and `sync` makes them durable; where it cannot, the pack is kept
 * in memory and put whole by `seal`. The caller never has to know: what `sync` promises, `seal` promises too, and
 * `canSync` says whether the first can be had before the second.
 */
import { B2Error } from '../errors.js';
import { encodeChunkEntry, encodeFrameHeader } from '../format/frame.js';
import {
  CHUNK_ENTRY_BYTES,
  FRAME_HEADER_BYTES,
  FrameType,
  MAX_FRAME_CHUNKS,
  MAX_PACK_CHUNKS,
  MAX_PACK_FRAMES,
  type FrameHeader,
} from '../format/frame.js';
import { packName } from '../format/names.js';
import {
  MAX_PACK_BYTES,
  PACK_HEADER_BYTES,
  encodeFooter,
  encodePackHeader,
  type FooterFrame,
  type PackFooter,
} from '../format/pack.js';
import { SEAL_BYTES, numberNonce, type KeyRing, type Sealer } from '../format/seal.js';
import type { Lz4 } from '../lz4.js';
import { alignedMemory } from '../memory.js';
import { roundDown, roundUp } from '../units.js';
import type { Appender, Store } from './store.js';

/** Filled this far, a slab is written. */
export const FLUSH_BYTES = 4 * 1024 * 1024;
/** Room for the largest frame behind that. */
const SLAB_BYTES = 2 * FLUSH_BYTES;
/** Stored bytes of one frame at most, header included. */
const MAX_FRAME_BYTES = FLUSH_BYTES - 4096;
const ALIGN = 4096;

/** What everything that writes packs needs. */
export interface PackContext {
  readonly store: Store;
  readonly keys: KeyRing;
  readonly lz4: Lz4;
  readonly repositoryId: string;
  readonly chunkBytes: number;
}

/** Where a chunk is: frame and index in it. */
export interface ChunkPlace {
  readonly frame: number;
  readonly sub: number;
}

// WebAssembly memory reserves address space and is freed late: keep and share it.
const freeSlabs: Buffer[] = [];
const MAX_FREE_SLABS = 8;

function takeSlab(): Buffer {
  const kept = freeSlabs.pop();
  if (kept !== undefined) return kept;
  const memory = alignedMemory(SLAB_BYTES);
  return Buffer.from(memory.buffer, memory.byteOffset, SLAB_BYTES);
}

function giveSlab(slab: Buffer): void {
  if (freeSlabs.length < MAX_FREE_SLABS) freeSlabs.push(slab);
}

/** Worth a write of its own around the page cache. */
const DIRECT_BYTES = 256 * 1024;

/** Appends bytes [from, end) of the slab; what is aligned of them in a piece of its own, which can go around the page cache. */
async function appendParts(
  appender: Appender,
  slab: Buffer,
  from: number,
  end: number,
): Promise<void> {
  const first = roundUp(from, ALIGN);
  const last = roundDown(end, ALIGN);
  if (last - first < DIRECT_BYTES || (first === from && last === end))
    return appender.append(slab.subarray(from, end));
  const parts = [slab.subarray(from, first), slab.subarray(first, last), slab.subarray(last, end)];
  const done = await Promise.allSettled(
    parts.filter((part) => part.length > 0).map((part) => appender.append(part)),
  );
  // Only now is nobody reading the slab any more.
  for (const part of done) if (part.status === 'rejected') throw part.reason;
}

/**
 * One pack being written. Adding a frame is synchronous and goes to memory; when `wantsFlush` is true, `flush` must be
 * awaited before the next one. After any rejection the pack is dead: `abandon` it (what was synced stays readable).
 */
export class PackWriter {
  readonly packId: string;
  readonly canSync: boolean;
  private readonly ctx: PackContext;
  private readonly sealer: Sealer;
  private readonly aad: Buffer = Buffer.alloc(16 + FRAME_HEADER_BYTES);
  private readonly scratch: Buffer;
  private readonly frames: FooterFrame[] = [];
  private ids: Buffer = Buffer.allocUnsafe(512 * 32);
  private lengths: Uint32Array = new Uint32Array(512);
  private chunks = 0;
  private slab: Buffer = takeSlab();
  private spare: Buffer = takeSlab();
  /** Offset in the pack of slab[0]. */
  private base = 0;
  private fill = 0;
  /** Bytes of the slab, from its start, that were written already (unaligned flush) and wait for no one. */
  private written = 0;
  private inflight: Promise<void> = Promise.resolve();
  private appender: Appender | undefined;
  private readonly parts: Buffer[] = [];
  private done = false;

  private constructor(ctx: PackContext, packId: string, createdNs: bigint) {
    this.ctx = ctx;
    this.packId = packId;
    this.canSync = ctx.store.canAppend;
    this.sealer = ctx.keys.packSealer(packId);
    this.aad.write(packId, 0, 'hex');
    // Compressing must gain a sixteenth, or the plain bytes are stored: reading them is cheaper.
    this.scratch = Buffer.allocUnsafe(CHUNK_ENTRY_BYTES + ctx.chunkBytes - (ctx.chunkBytes >> 4));
    const header = encodePackHeader({
      packId,
      repositoryId: ctx.repositoryId,
      encrypted: ctx.keys.encrypted,
      generation: 0,
      createdNs,
    });
    header.copy(this.slab, 0);
    this.fill = PACK_HEADER_BYTES;
  }

  /** Starts a pack. `packId` is 16 fresh random bytes in hex: it must never have been used before. */
  static async create(ctx: PackContext, packId: string, createdNs: bigint): Promise<PackWriter> {
    const writer = new PackWriter(ctx, packId, createdNs);
    if (ctx.store.canAppend) {
      try {
        writer.appender = await ctx.store.openAppend(packName(packId), 'create');
      } catch (error) {
        await writer.abandon();
        throw error;
      }
    }
    return writer;
  }

  /** Bytes so far; after `seal`, of the whole pack, footer and all. */
  get sizeBytes(): number {
    return this.base + this.fill;
  }

  get frameCount(): number {
    return this.frames.length;
  }

  get chunkCount(): number {
    return this.chunks;
  }

  /** True when the pack should be sealed because of its limits. */
  get isFull(): boolean {
    return (
      this.frames.length >= MAX_PACK_FRAMES - 8 ||
      this.chunks >= MAX_PACK_CHUNKS - MAX_FRAME_CHUNKS ||
      this.sizeBytes >= MAX_PACK_BYTES / 2
    );
  }

  get wantsFlush(): boolean {
    return this.fill >= FLUSH_BYTES;
  }

  /** The id of chunk `index` (in order of adding). Shares memory. */
  idAt(index: number): Buffer {
    return this.ids.subarray(index * 32, index * 32 + 32);
  }

  /** Adds one chunk in a frame of its own; `id` must be its chunk id. Returns the frame number. */
  addChunk(chunk: Buffer, id: Buffer): number {
    const { scratch } = this;
    encodeChunkEntry(id, chunk.length, scratch, 0);
    const limit = CHUNK_ENTRY_BYTES + chunk.length - (chunk.length >> 4);
    const packed = this.ctx.lz4.compress(chunk, scratch.subarray(CHUNK_ENTRY_BYTES, limit));
    this.noteChunk(id, chunk.length);
    // Head and compressed body lie one behind the other: one call of the cipher instead of two.
    const parts =
      packed > 0
        ? [scratch.subarray(0, CHUNK_ENTRY_BYTES + packed)]
        : [scratch.subarray(0, CHUNK_ENTRY_BYTES), chunk];
    return this.addFrame(FrameType.chunks, packed > 0, 1, chunk.length, CHUNK_ENTRY_BYTES, parts);
  }

  /** Adds several chunks in one frame, compressed together. Returns the frame number; chunk i has sub i. */
  addChunks(list: readonly { readonly bytes: Buffer; readonly id: Buffer }[]): number {
    if (list.length < 1 || list.length > MAX_FRAME_CHUNKS)
      throw new RangeError(`${list.length} chunks in a frame`);
    const head = Buffer.allocUnsafe(list.length * CHUNK_ENTRY_BYTES);
    list.forEach((c, i) => {
      encodeChunkEntry(c.id, c.bytes.length, head, i * CHUNK_ENTRY_BYTES);
    });
    const plain = Buffer.concat(list.map((c) => c.bytes));
    const { packed, body } = this.compressed(plain);
    for (const c of list) this.noteChunk(c.id, c.bytes.length);
    return this.addFrame(FrameType.chunks, packed, list.length, plain.length, head.length, [
      head,
      body,
    ]);
  }

  /** Adds the plain body of an extents frame; at most MAX_FRAME_EXTENTS records. */
  addExtents(plain: Buffer): number {
    const { packed, body } = this.compressed(plain);
    return this.addFrame(FrameType.extents, packed, 0, plain.length, 0, [body]);
  }

  /** Adds the plain body of a commit frame. */
  addCommit(plain: Buffer): number {
    const { packed, body } = this.compressed(plain);
    return this.addFrame(FrameType.commit, packed, 0, plain.length, 0, [body]);
  }

  private compressed(plain: Buffer): { packed: boolean; body: Buffer } {
    const out = Buffer.allocUnsafe(Math.max(16, plain.length - (plain.length >> 4)));
    const n = plain.length < 64 ? 0 : this.ctx.lz4.compress(plain, out);
    return n > 0 ? { packed: true, body: out.subarray(0, n) } : { packed: false, body: plain };
  }

  private noteChunk(id: Buffer, lengthBytes: number): void {
    if (this.chunks === this.lengths.length) {
      const ids = Buffer.allocUnsafe(this.ids.length * 2);
      this.ids.copy(ids);
      this.ids = ids;
      const lengths = new Uint32Array(this.lengths.length * 2);
      lengths.set(this.lengths);
      this.lengths = lengths;
    }
    id.copy(this.ids, this.chunks * 32);
    this.lengths[this.chunks++] = lengthBytes;
  }

  private addFrame(
    type: 1 | 2 | 3,
    packed: boolean,
    count: number,
    plainBytes: number,
    headBytes: number,
    parts: readonly Buffer[],
  ): number {
    if (this.done) throw new Error(`pack ${this.packId} is closed`);
    let storedBytes = SEAL_BYTES;
    for (const part of parts) storedBytes += part.length;
    const total = FRAME_HEADER_BYTES + storedBytes;
    if (total > MAX_FRAME_BYTES) throw new RangeError(`a frame of ${total} bytes`);
    if (this.fill + total > SLAB_BYTES) throw new Error('flush was due before this frame');
    const number = this.frames.length;
    if (number >= MAX_PACK_FRAMES) throw new Error(`pack ${this.packId} is full`);
    const header: FrameHeader = {
      type,
      compression: packed ? 1 : 0,
      count,
      number,
      storedBytes,
      plainBytes,
      headBytes,
    };
    const at = this.fill;
    encodeFrameHeader(header, this.slab, at);
    this.slab.copy(this.aad, 16, at, at + FRAME_HEADER_BYTES);
    this.sealer.sealInto(numberNonce(number), this.aad, parts, this.slab, at + FRAME_HEADER_BYTES);
    this.frames.push({
      number,
      offset: this.base + at,
      storedBytes,
      plainBytes,
      type,
      compression: header.compression,
      count,
    });
    this.fill += total;
    return number;
  }

  /** Hands what is full to the store and waits for the writes before it, so that at most two are under way. */
  async flush(): Promise<void> {
    if (this.fill >= FLUSH_BYTES) await this.write(false);
  }

  /**
   * Everything added so far is durable when this resolves. Only where `canSync`; the pack stays open. The name of the
   * pack is durable too.
   */
  async sync(): Promise<void> {
    const appender = this.appender;
    if (appender === undefined) throw new Error('this store cannot sync an open pack');
    await this.write(true);
    await this.inflight;
    await appender.sync();
  }

  private async write(all: boolean): Promise<void> {
    const end = all ? this.fill : roundDown(this.fill, ALIGN);
    const from = this.written;
    const slab = this.slab;
    await this.inflight; // the spare slab is free again after this
    if (end <= from) return;
    if (this.appender === undefined) {
      this.parts.push(Buffer.from(slab.subarray(from, end)));
    } else {
      this.inflight = appendParts(this.appender, slab, from, end);
      this.inflight.catch(() => undefined); // seen by whoever awaits it next
    }
    // Offsets in the slab keep the alignment of offsets in the pack, so that later flushes can be direct again.
    const keepFrom = roundDown(end, ALIGN);
    const next = this.spare;
    slab.copy(next, 0, keepFrom, this.fill);
    this.spare = slab;
    this.slab = next;
    this.base += keepFrom;
    this.fill -= keepFrom;
    this.written = end - keepFrom;
  }

  /** What the footer will say. */
  footer(): PackFooter {
    return {
      frames: this.frames,
      ids: this.ids.subarray(0, this.chunks * 32),
      lengths: this.lengths.subarray(0, this.chunks),
    };
  }

  /** Writes footer and trailer; the pack is whole and durable when this resolves. `salt`: 16 fresh random bytes. */
  async seal(salt: Buffer): Promise<PackFooter> {
    const footer = this.footer();
    try {
      const bytes = encodeFooter(footer, this.packId, this.sizeBytes, salt, this.ctx.keys);
      // As a rule there is room for the footer behind the last frame, and one write does for both.
      const fits = this.fill + bytes.length <= SLAB_BYTES;
      if (fits) this.fill += bytes.copy(this.slab, this.fill);
      await this.write(true);
      await this.inflight;
      if (!fits) this.base += bytes.length;
      if (this.appender === undefined) {
        const parts = fits ? this.parts : [...this.parts, bytes];
        await this.ctx.store.put(packName(this.packId), Buffer.concat(parts), { ifAbsent: true });
      } else {
        if (!fits) await this.appender.append(bytes);
        await this.appender.sync();
      }
    } finally {
      await this.release();
    }
    return footer;
  }

  /** Lets go of the pack as it is: nothing more is written. Never rejects. */
  async abandon(): Promise<void> {
    await this.inflight.catch(() => undefined);
    await this.release();
  }

  private async release(): Promise<void> {
    if (this.done) return;
    this.done = true;
    this.parts.length = 0;
    giveSlab(this.slab);
    giveSlab(this.spare);
    try {
      await this.appender?.close();
    } catch (error) {
      // Everything that mattered was synced before; a failing close has nothing more to say about it.
      if (!(error instanceof B2Error)) throw error;
    }
  }
}
