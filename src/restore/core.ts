/**
 * The part of a restore that costs CPU, for one thread: reading packs, opening frames, verifying chunks, laying the
 * bytes out for big writes, and hashing what the target holds. It never touches the target: bytes to be written, and
 * bytes read from it, pass through slots of memory that the main thread shares.
 */
import { B2Error, isKind, messageOf } from '../errors.js';
import { damaged } from '../format/bytes.js';
import { FRAME_HEADER_BYTES } from '../format/frame.js';
import type { FooterFrame, PackFooter } from '../format/pack.js';
import type { Sealer } from '../format/seal.js';
import { HASH_BYTES } from '../hash.js';
import {
  OpenPack,
  frameWhat,
  openFrameBytes,
  verifiedChunks,
  type FrameChunks,
  type PackReadContext,
} from '../repo/pack-reader.js';
import { BLOCK_BYTES, roundUp } from '../units.js';
import { PieceState, pieceLength, pieceOffset, type Batch } from './batch.js';
import {
  bulkRead,
  readSlots,
  type LoadedPiece,
  type PackFrames,
  type WantedFrame,
} from './bulk-read.js';
import { copyBytes } from './copy.js';
import { ChunkRoom, SingleChunks } from './single.js';

/** Bytes of a slot: one coalesced write, or one window read back. */
export const SLOT_BYTES = 4 * 1024 * 1024;
/** Slots of one core: one being filled, the others on their way to the target. */
export const SLOTS = 4;
/** Damaged frames described one by one in a batch; the rest is counted, and every range is listed in any case. */
const MAX_DESCRIBED = 1000;

/** A run of bytes of a slot that belongs at `target` of the device. Flat: target, offset in the slot, length. */
export type RunList = readonly number[];

/** What a core asks of the thread that owns the target. */
export interface CoreHost {
  /** Resolves when the runs of slot `slot` have been written and the slot may be filled again. */
  write(slot: number, runs: RunList): Promise<void>;
  /** True as soon as the work is to be given up. */
  isAborted(): boolean;
}

/**
 * What a pass over the packs of a batch is for:
 * - `ids`: what the target must hold, as far as footers tell (pieces that are whole chunks); no data is read;
 * - `parts`: the same for the other pieces, from their data;
 * - `cost`: only counts what `write` would read;
 * - `write`: writes the wanted pieces, and notes what the target must hold.
 */
export type PassMode = 'ids' | 'parts' | 'cost' | 'write';

export interface PassOptions {
  readonly mode: PassMode;
  /** `stop`: the first damaged frame ends the pass (kind `damaged`). `skip`: zeros are written in its place. */
  readonly onDamage: 'stop' | 'skip';
}

/** A frame that could not be used. */
export interface DamagedFrame {
  readonly packId: string;
  readonly frame: number;
  readonly reason: string;
}

export interface PassResult {
  readonly frames: number;
  /** Bytes read from packs (`cost`: that would be read). */
  readonly readBytes: number;
  readonly writtenBytes: number;
  readonly writes: number;
  readonly damaged: readonly DamagedFrame[];
}

/** A part of the target in slot `slot`: bytes [offset, offset + length), the pieces from `from` up to `to`. */
export interface CheckWindow {
  readonly slot: number;
  readonly offset: number;
  readonly length: number;
  readonly from: number;
  readonly to: number;
}

export interface CheckResult {
  readonly differingPieces: number;
  readonly differingBytes: number;
  /** Where zeros should be and are not: offset and length, alternating, ascending. */
  readonly notZero: readonly number[];
}

/** The slots in a core's slab. */
export function slotsOf(slab: ArrayBufferLike): readonly Buffer[] {
  return Array.from({ length: SLOTS }, (_, i) => Buffer.from(slab, i * SLOT_BYTES, SLOT_BYTES));
}

const ZEROS = Buffer.alloc(256 * 1024);

function isZero(view: Buffer): boolean {
  for (let at = 0; at < view.length; at += ZEROS.length) {
    const part = view.subarray(at, at + ZEROS.length);
    if (part.compare(ZEROS, 0, part.length) !== 0) return false;
  }
  return true;
}

/** Lays out pieces one behind the other in slots, and merges neighbours on the target into one write. */
class RunWriter {
  writtenBytes = 0;
  writes = 0;
  private readonly slots: readonly Buffer[];
  private readonly host: CoreHost;
  private readonly pending: (Promise<void> | undefined)[];
  private slot = 0;
  private fill = 0;
  private runs: number[] = [];
  private runEnd = -1;

  constructor(slots: readonly Buffer[], host: CoreHost) {
    this.slots = slots;
    this.host = host;
    this.pending = slots.map(() => undefined);
  }

  fits(length: number): boolean {
    return this.fill + length <= SLOT_BYTES;
  }

  /** Room for `length` bytes that belong at `target`; {@link fits} must have said yes. All of it must be filled. */
  take(target: number, length: number): Buffer {
    const from = this.fill;
    const last = this.runs.length - 1;
    if (target === this.runEnd) {
      this.runs[last] = (this.runs[last] ?? 0) + length;
    } else {
      this.runs.push(target, from, length);
      this.writes++;
    }
    // A length that is no multiple of a block ends the image, so nothing is appended to that run.
    this.runEnd = length % BLOCK_BYTES === 0 ? target + length : -1;
    this.fill = roundUp(from + length, BLOCK_BYTES);
    this.writtenBytes += length;
    return this.current().subarray(from, from + length);
  }

  /** Hands the slot on, and waits for the next one to be free. */
  async next(): Promise<void> {
    if (this.runs.length > 0) {
      const done = this.host.write(this.slot, this.runs);
      done.catch(() => undefined); // seen when the slot is needed again, or at the end
      this.pending[this.slot] = done;
    }
    this.runs = [];
    this.runEnd = -1;
    this.fill = 0;
    this.slot = (this.slot + 1) % this.slots.length;
    await this.pending[this.slot];
  }

  /** Everything handed over is written when this resolves. */
  async finish(): Promise<void> {
    await this.next();
    await Promise.all(this.pending);
  }

  /** Waits for writes under way, whatever comes of them: the slots are quiet afterwards. */
  async settle(): Promise<void> {
    await Promise.allSettled(this.pending);
  }

  private current(): Buffer {
    const slot = this.slots[this.slot];
    if (slot === undefined) throw new Error('no such slot');
    return slot;
  }
}

/** Where the chunks of each frame stand in a footer. */
class FooterIndex {
  private readonly footer: PackFooter;
  private readonly first: Uint32Array;
  private readonly byNumber = new Map<number, number>();

  constructor(footer: PackFooter) {
    this.footer = footer;
    this.first = new Uint32Array(footer.frames.length);
    let chunk = 0;
    footer.frames.forEach((f, i) => {
      this.first[i] = chunk;
      this.byNumber.set(f.number, i);
      chunk += f.count;
    });
  }

  /** Index in the footer of chunk `sub` of frame `number`, or undefined. */
  chunk(number: number, sub: number): number | undefined {
    const index = this.byNumber.get(number);
    const frame = index === undefined ? undefined : this.footer.frames[index];
    if (index === undefined || frame === undefined || sub >= frame.count) return undefined;
    return (this.first[index] ?? 0) + sub;
  }
}

/** What is at work on an open pack. */
interface PackWork {
  readonly pieces: Uint32Array;
  readonly sealer: Sealer;
  readonly single: SingleChunks;
}

/** Pieces [from, to) of a sorted list that lie in one frame. */
interface Span {
  readonly from: number;
  readonly to: number;
}

/** See the file comment. One pass or check at a time. */
export class RestoreCore {
  private readonly ctx: PackReadContext;
  private readonly slots: readonly Buffer[];
  private readonly host: CoreHost;
  private readonly read: readonly [Buffer, Buffer];
  private readonly room = new ChunkRoom();
  private scratch: Buffer = Buffer.alloc(0);

  /** `slots` are {@link SLOTS} page-aligned buffers of {@link SLOT_BYTES}. */
  constructor(ctx: PackReadContext, slots: readonly Buffer[], host: CoreHost) {
    this.ctx = ctx;
    this.slots = slots;
    this.host = host;
    this.read = readSlots();
  }

  /** Works on packs of the batch until none is left that no thread has taken. */
  async pass(batch: Batch, options: PassOptions): Promise<PassResult> {
    return new Pass(
      this.ctx,
      this.slots,
      this.host,
      this.read,
      (bytes) => this.scratchOf(bytes),
      this.room,
      batch,
      options,
    ).run();
  }

  /** Compares what slot `window.slot` holds with what the batch says, and marks the pieces that differ. */
  check(batch: Batch, window: CheckWindow): CheckResult {
    const slot = this.slots[window.slot];
    if (slot === undefined) throw new Error(`no slot ${window.slot}`);
    const { keys } = this.ctx;
    const hashes = Buffer.from(batch.hash.buffer, batch.hash.byteOffset, batch.hash.byteLength);
    const notZero: number[] = [];
    let differingPieces = 0;
    let differingBytes = 0;
    const hole = (from: number, to: number): void => {
      if (from >= to || isZero(slot.subarray(from, to))) return;
      for (let at = from; at < to;) {
        const end = Math.min(to, at + BLOCK_BYTES);
        if (!isZero(slot.subarray(at, end))) {
          const last = notZero.length - 1;
          const offset = window.offset + at;
          if (last > 0 && (notZero[last - 1] ?? 0) + (notZero[last] ?? 0) === offset) {
            notZero[last] = (notZero[last] ?? 0) + end - at;
          } else {
            notZero.push(offset, end - at);
          }
        }
        at = end;
      }
    };
    let at = 0;
    for (let piece = window.from; piece < window.to; piece++) {
      const from = pieceOffset(batch, piece) - window.offset;
      const length = pieceLength(batch, piece);
      const bytes = batch.bytes[piece] ?? 0;
      hole(at, from);
      at = from + length;
      const state = batch.state[piece] ?? 0;
      const same =
        (state & PieceState.known) !== 0 &&
        (bytes === 0 ||
          keys.isChunk(slot.subarray(from, from + bytes), hashes, piece * HASH_BYTES)) &&
        (bytes === length || isZero(slot.subarray(from + bytes, at)));
      batch.state[piece] = same ? state & ~PieceState.differs : state | PieceState.differs;
      if (same) continue;
      differingPieces++;
      differingBytes += length;
    }
    hole(at, window.length);
    return { differingPieces, differingBytes, notZero };
  }

  private scratchOf(bytes: number): Buffer {
    if (this.scratch.length < bytes) this.scratch = Buffer.allocUnsafeSlow(roundUp(bytes, 65536));
    return this.scratch.subarray(0, bytes);
  }
}

class Pass {
  private readonly ctx: PackReadContext;
  private readonly host: CoreHost;
  private readonly read: readonly [Buffer, Buffer];
  private readonly scratchOf: (bytes: number) => Buffer;
  private readonly room: ChunkRoom;
  private readonly batch: Batch;
  private readonly options: PassOptions;
  private readonly writer: RunWriter;
  private readonly hashes: Buffer;
  private readonly found: DamagedFrame[] = [];
  private frames = 0;
  private readBytes = 0;
  /** Where `direct` put, or was to put, its piece. */
  private lastTaken: Buffer | undefined;
  /** The piece that has its place there, and whose frame was found not to be right. */
  private bad: number | undefined;
  /** The pieces at work of the packs that are open, and what opens their frames. */
  private readonly work = new Map<OpenPack, PackWork>();
  /**
   * What `packs` found to be done with slots or the fresh pack. It runs ahead of `run`, which alone may use them, and
   * does this when it comes by.
   */
  private readonly later: (() => Promise<void>)[] = [];
  /** The pack that was opened anew last, because a frame was not where the footer remembered says. */
  private fresh: { readonly packId: string; readonly pack: Promise<OpenPack> } | undefined;

  constructor(
    ctx: PackReadContext,
    slots: readonly Buffer[],
    host: CoreHost,
    read: readonly [Buffer, Buffer],
    scratchOf: (bytes: number) => Buffer,
    room: ChunkRoom,
    batch: Batch,
    options: PassOptions,
  ) {
    this.ctx = ctx;
    this.host = host;
    this.read = read;
    this.scratchOf = scratchOf;
    this.room = room;
    this.batch = batch;
    this.options = options;
    this.writer = new RunWriter(slots, host);
    this.hashes = Buffer.from(batch.hash.buffer, batch.hash.byteOffset, batch.hash.byteLength);
  }

  async run(): Promise<PassResult> {
    let before: OpenPack | undefined;
    try {
      for await (const piece of bulkRead(this.packs(), this.read)) {
        if (this.host.isAborted()) throw new B2Error('interrupted', 'the restore was interrupted');
        await this.doLater();
        this.readBytes += piece.readBytes;
        if (before !== undefined && before !== piece.pack) this.work.delete(before);
        before = piece.pack;
        const work = this.work.get(piece.pack);
        if (work === undefined) throw new Error('a pack without work');
        for (let at = 0; ; at++) {
          at = this.quickFrames(piece, work, at);
          const wanted = piece.frames[at];
          if (wanted === undefined) break;
          await this.frame(piece, work, wanted);
        }
      }
      await this.doLater();
      await this.writer.finish();
    } finally {
      await this.writer.settle();
      await this.forgetFresh();
    }
    return {
      frames: this.frames,
      readBytes: this.readBytes,
      writtenBytes: this.writer.writtenBytes,
      writes: this.writer.writes,
      damaged: this.found,
    };
  }

  private async doLater(): Promise<void> {
    for (let task = this.later.shift(); task !== undefined; task = this.later.shift()) await task();
  }

  /** Takes packs and says which frames of them are to be read. */
  private async *packs(): AsyncGenerator<PackFrames<Span>, void> {
    const { batch } = this;
    for (;;) {
      const p = Atomics.add(batch.control, 0, 1);
      const packId = batch.packIds[p];
      if (packId === undefined || this.host.isAborted()) return;
      const pieces = this.piecesOf(p);
      if (pieces.length === 0) continue;
      let pack: OpenPack;
      try {
        pack = await OpenPack.open(this.ctx, packId);
      } catch (error) {
        this.later.push(() => this.lost(packId, pieces, error));
        continue;
      }
      let handedOn = false;
      try {
        if (this.options.mode === 'ids') {
          this.noteIds(pack, pieces);
          continue;
        }
        const { frames, missing } = this.framesOf(pack, pieces);
        if (this.options.mode === 'cost') {
          this.frames += frames.length;
          for (const { frame } of frames) this.readBytes += FRAME_HEADER_BYTES + frame.storedBytes;
          continue;
        }
        const sealer = this.ctx.keys.packSealer(packId);
        const work = {
          pieces,
          sealer,
          single: new SingleChunks(this.ctx, packId, sealer, this.room),
        };
        for (const { from, to } of missing) {
          this.later.push(() =>
            this.again(packId, this.frameOf(pieces, from), pieces.subarray(from, to), undefined),
          );
        }
        if (frames.length === 0) continue;
        this.work.set(pack, work);
        handedOn = true;
        yield { pack, frames };
      } finally {
        if (!handedOn) await pack.close();
      }
    }
  }

  /** The frames that hold the pieces, and the pieces whose frames the footer does not have. */
  private framesOf(
    pack: OpenPack,
    pieces: Uint32Array,
  ): { frames: WantedFrame<Span>[]; missing: Span[] } {
    const frames: WantedFrame<Span>[] = [];
    const missing: Span[] = [];
    for (let from = 0; from < pieces.length;) {
      const number = this.frameOf(pieces, from);
      let to = from + 1;
      while (to < pieces.length && this.frameOf(pieces, to) === number) to++;
      const frame = pack.frame(number);
      if (frame === undefined) missing.push({ from, to });
      else frames.push({ frame, tag: { from, to } });
      from = to;
    }
    return { frames, missing };
  }

  private frameOf(pieces: Uint32Array, i: number): number {
    return this.batch.frame[pieces[i] ?? 0] ?? 0;
  }

  /** The pieces of pack `p` that this pass is about, by frame, chunk and place on the target. */
  private piecesOf(p: number): Uint32Array {
    const { batch } = this;
    const { mode } = this.options;
    const all = batch.order.subarray(batch.packStart[p] ?? 0, batch.packStart[p + 1] ?? 0);
    const pieces = all.filter((i) => {
      const state = batch.state[i] ?? 0;
      if (mode === 'write' || mode === 'cost') return (state & PieceState.wanted) !== 0;
      return (state & (PieceState.known | PieceState.damaged)) === 0;
    });
    const compare = (a: number, b: number): number =>
      (batch.frame[a] ?? 0) - (batch.frame[b] ?? 0) ||
      (batch.sub[a] ?? 0) - (batch.sub[b] ?? 0) ||
      a - b;
    for (let i = 1; i < pieces.length; i++) {
      if (compare(pieces[i - 1] ?? 0, pieces[i] ?? 0) > 0) return pieces.sort(compare);
    }
    return pieces;
  }

  /** Notes the hash of every piece that is a whole chunk of the footer. */
  private noteIds(pack: OpenPack, pieces: Uint32Array): void {
    const { batch } = this;
    const index = new FooterIndex(pack.footer);
    for (const i of pieces) {
      if (batch.skip[i] !== 0) continue;
      const chunk = index.chunk(batch.frame[i] ?? 0, batch.sub[i] ?? 0);
      if (chunk === undefined) continue;
      const length = pack.footer.lengths[chunk] ?? 0;
      if (length > pieceLength(batch, i)) continue;
      pack.footer.ids.copy(
        this.hashes,
        i * HASH_BYTES,
        chunk * HASH_BYTES,
        (chunk + 1) * HASH_BYTES,
      );
      batch.bytes[i] = length;
      batch.state[i] = (batch.state[i] ?? 0) | PieceState.known;
    }
  }

  /** Goes through the frames from `at` on as long as that needs no waiting; returns the index of the first one that does. */
  private quickFrames(piece: LoadedPiece<Span>, work: PackWork, at: number): number {
    const { frames, failure } = piece;
    if (failure !== undefined) return at;
    for (let i = at; i < frames.length; i++) {
      const wanted = frames[i];
      const start = wanted === undefined ? -1 : piece.offsetOf(wanted.frame);
      if (wanted === undefined || start < 0) return i;
      if (this.quick(work, wanted, piece.bytes, start) !== 'done') return i;
      this.frames++;
    }
    return frames.length;
  }

  /**
   * The common case, a chunk that is used once and whole: straight to its place in the slot. `full`: the slot has no room for it;
   * `bad`: the frame is not right, and `lastTaken` is the place; `other`: not the common case.
   */
  private quick(
    work: PackWork,
    { frame, tag }: WantedFrame<Span>,
    bytes: Buffer,
    at: number,
  ): 'done' | 'full' | 'bad' | 'other' {
    if (this.options.mode !== 'write' || frame.count !== 1 || tag.to !== tag.from + 1)
      return 'other';
    const { batch } = this;
    const piece = work.pieces[tag.from] ?? 0;
    const length = pieceLength(batch, piece);
    if (batch.skip[piece] !== 0 || batch.sub[piece] !== 0 || frame.plainBytes > length)
      return 'other';
    if (this.bad === piece) return 'bad';
    if (!this.writer.fits(roundUp(length, BLOCK_BYTES))) return 'full';
    if (this.direct(work.single, frame, bytes, at, piece, length)) return 'done';
    this.bad = piece;
    return 'bad';
  }

  /** Opens one frame and deals with its pieces. */
  private async frame(
    loaded: LoadedPiece<Span>,
    work: PackWork,
    wanted: WantedFrame<Span>,
  ): Promise<void> {
    const { packId } = loaded.pack;
    const { frame, tag } = wanted;
    const { number } = frame;
    const { pieces } = work;
    const bytes = loaded.failure === undefined ? loaded.bytesOf(frame) : undefined;
    this.frames++;
    if (bytes !== undefined) {
      let quick = this.quick(work, wanted, bytes, 0);
      if (quick === 'full') {
        await this.writer.next();
        quick = this.quick(work, wanted, bytes, 0);
      }
      if (quick === 'done') return;
      if (quick === 'bad') {
        this.bad = undefined;
        // It stays in the slot as what it is to become: the slow way fills it, or zeros do.
        await this.again(packId, number, [pieces[tag.from] ?? 0], this.lastTaken);
        return;
      }
    }
    let chunks: FrameChunks | undefined;
    if (bytes !== undefined) {
      try {
        const into = frame.compression === 0 ? undefined : this.scratchOf(frame.plainBytes);
        chunks = this.verified(packId, work.sealer, number, bytes, into);
      } catch (error) {
        if (!isKind(error, 'damaged')) throw error;
      }
    }
    const mine = pieces.subarray(tag.from, tag.to);
    if (chunks === undefined) {
      await this.again(packId, number, mine, undefined);
      return;
    }
    for (const piece of mine) {
      const problem = this.note(chunks, piece);
      if (problem !== undefined) {
        await this.damage(packId, number, [piece], damaged(frameWhat(packId, number), 0, problem));
      } else if (this.options.mode === 'write') {
        await this.place(chunks, piece);
      }
    }
  }

  /** True if the frame was right: its chunk is in the slot then. Otherwise its place is in `lastTaken`. */
  private direct(
    single: SingleChunks,
    frame: FooterFrame,
    bytes: Buffer,
    at: number,
    piece: number,
    length: number,
  ): boolean {
    const { batch } = this;
    const { plainBytes } = frame;
    const to = this.writer.take(pieceOffset(batch, piece), length);
    this.lastTaken = to;
    // A chunk that leaves whole blocks of the piece without data is an error, which the long way words.
    if (roundUp(plainBytes, BLOCK_BYTES) < length) return false;
    const into = plainBytes === length ? to : to.subarray(0, plainBytes);
    if (!single.open(frame, bytes, at, into)) return false;
    if (plainBytes < length) to.fill(0, plainBytes);
    single.copyId(this.hashes, piece * HASH_BYTES);
    batch.bytes[piece] = plainBytes;
    batch.state[piece] = (batch.state[piece] ?? 0) | PieceState.known;
    return true;
  }

  private verified(
    packId: string,
    sealer: Sealer,
    number: number,
    bytes: Buffer,
    into: Buffer | undefined,
  ): FrameChunks {
    const open = openFrameBytes(this.ctx, sealer, packId, bytes, into);
    if (open.header.number !== number) {
      throw damaged(
        frameWhat(packId, number),
        0,
        'another frame lies where the footer says this one is',
      );
    }
    return verifiedChunks(open, packId, this.ctx.keys);
  }

  /** Notes what the target must hold for a piece; says what is wrong if the frame cannot supply it. */
  private note(chunks: FrameChunks, piece: number): string | undefined {
    const { batch } = this;
    const sub = batch.sub[piece] ?? 0;
    const entry = chunks.entries[sub];
    if (entry === undefined) return `it has no chunk ${sub}`;
    const skip = (batch.skip[piece] ?? 0) * BLOCK_BYTES;
    if (entry.lengthBytes <= skip)
      return `block ${batch.skip[piece]} lies past the end of chunk ${sub}`;
    const bytes = Math.min(entry.lengthBytes - skip, pieceLength(batch, piece));
    const start = (chunks.starts[sub] ?? 0) + skip;
    // Blocks between a chunk's end and the end of the piece are zeros only where the device ended: at most one, in part.
    if (roundUp(bytes, BLOCK_BYTES) < pieceLength(batch, piece))
      return `chunk ${sub} is shorter than the extent says`;
    const id =
      bytes === entry.lengthBytes
        ? entry.id
        : this.ctx.keys.chunkId(chunks.body.subarray(start, start + bytes));
    id.copy(this.hashes, piece * HASH_BYTES);
    batch.bytes[piece] = bytes;
    batch.state[piece] = (batch.state[piece] ?? 0) | PieceState.known;
    return undefined;
  }

  /** Copies the piece (already noted) to a slot. */
  private async place(chunks: FrameChunks, piece: number): Promise<void> {
    const { batch } = this;
    const length = pieceLength(batch, piece);
    if (!this.writer.fits(roundUp(length, BLOCK_BYTES))) await this.writer.next();
    const to = this.writer.take(pieceOffset(batch, piece), length);
    this.fillFrom(chunks, piece, to);
  }

  private fillFrom(chunks: FrameChunks, piece: number, to: Buffer): void {
    const start =
      (chunks.starts[this.batch.sub[piece] ?? 0] ?? 0) +
      (this.batch.skip[piece] ?? 0) * BLOCK_BYTES;
    const bytes = this.batch.bytes[piece] ?? 0;
    copyBytes(to, chunks.body.subarray(start, start + bytes));
    if (bytes < to.length) to.fill(0, bytes);
  }

  /**
   * The second way to a frame, after the first one failed: through a footer read now (compaction may have moved it) and
   * by a read of its own. `place` is where its only piece goes if that has room in a slot already.
   */
  private async again(
    packId: string,
    number: number,
    pieces: Iterable<number>,
    place: Buffer | undefined,
  ): Promise<void> {
    const list = [...pieces];
    let chunks: FrameChunks;
    try {
      chunks = await (await this.freshPack(packId)).readChunks(number);
    } catch (error) {
      await this.damage(packId, number, list, error, place);
      return;
    }
    for (const piece of list) {
      const problem = this.note(chunks, piece);
      if (problem !== undefined) {
        await this.damage(
          packId,
          number,
          [piece],
          damaged(frameWhat(packId, number), 0, problem),
          place,
        );
      } else if (place !== undefined) {
        this.fillFrom(chunks, piece, place);
      } else if (this.options.mode === 'write') {
        await this.place(chunks, piece);
      }
    }
  }

  private async freshPack(packId: string): Promise<OpenPack> {
    if (this.fresh?.packId !== packId) {
      await this.forgetFresh();
      this.fresh = { packId, pack: OpenPack.open(this.ctx, packId) };
    }
    return this.fresh.pack;
  }

  private async forgetFresh(): Promise<void> {
    const { fresh } = this;
    this.fresh = undefined;
    try {
      await (await fresh?.pack)?.close();
    } catch {
      // It failed to open, which was reported then; or to close, which loses nothing of what was read.
    }
  }

  /** Every piece of a pack that cannot be opened. */
  private async lost(packId: string, pieces: Uint32Array, error: unknown): Promise<void> {
    // What footers do not tell is found out, and reported, by the passes that need the data.
    if (this.options.mode === 'ids' || this.options.mode === 'cost') return;
    for (let from = 0; from < pieces.length;) {
      const number = this.frameOf(pieces, from);
      let to = from + 1;
      while (to < pieces.length && this.frameOf(pieces, to) === number) to++;
      await this.damage(packId, number, [...pieces.subarray(from, to)], error);
      from = to;
    }
  }

  /** Throws, or marks the pieces and lays out zeros for them. */
  private async damage(
    packId: string,
    number: number,
    pieces: readonly number[],
    error: unknown,
    place?: Buffer,
  ): Promise<void> {
    if (!isKind(error, 'damaged', 'io', 'not-found')) throw error;
    const { batch } = this;
    if (this.options.onDamage === 'stop') {
      const first = pieces[0] ?? 0;
      const from = pieceOffset(batch, first);
      const where = `bytes ${from} to ${from + pieceLength(batch, first) - 1} of the image`;
      throw new B2Error(error.kind, `${messageOf(error)} (needed for ${where})`, {
        cause: error,
        hint: 'Choose another point, or restore everything else with --skip-damaged. "b2 verify" says what is damaged and which points are whole.',
      });
    }
    if (this.found.length < MAX_DESCRIBED)
      this.found.push({ packId, frame: number, reason: messageOf(error) });
    for (const piece of pieces) {
      batch.bytes[piece] = 0;
      batch.state[piece] = (batch.state[piece] ?? 0) | PieceState.known | PieceState.damaged;
      const length = pieceLength(batch, piece);
      if (place !== undefined) {
        place.fill(0);
      } else if (this.options.mode === 'write') {
        if (!this.writer.fits(roundUp(length, BLOCK_BYTES))) await this.writer.next();
        this.writer.take(pieceOffset(batch, piece), length).fill(0);
      }
    }
  }
}
