/**
 * The pipeline of a scan, run by each worker (or by the caller's own thread): claim 4 MiB of the device, read it ahead into
 * page-aligned memory, drop zeros, hash, look up, compress and seal into a pack of its own. A worker shares with
 * the others only what is in shared memory: the next piece to claim, the dedupe index, the placements.
 */
import { setTimeout as sleep } from 'node:timers/promises';

import type { Clock, Random } from '../clock.js';
import type { ByteRange, ReadDevice } from '../devices/device.js';
import { B2Error, isKind } from '../errors.js';
import { packName } from '../format/names.js';
import { alignedMemory } from '../memory.js';
import { placeWord } from '../repo/dedupe/table.js';
import { Found, type DedupeView } from '../repo/dedupe/view.js';
import { PackWriter, type PackContext } from '../repo/pack-writer.js';
import { BLOCK_BYTES } from '../units.js';
import { WINDOW_HOLE, type PlacementMemory } from './placements.js';

/** Read at a time; a multiple of every chunk size. */
export const SEGMENT_BYTES = 4 * 1024 * 1024;
/** One piece is being worked on while the next one is read. */
const SLABS = 2;
/** Packs of one worker that may be on their way to the disk at once. */
const MAX_SEALING = 2;
/** How long to wait for the search for holes, which is far ahead of the reading as a rule. */
const HOLE_WAIT_MS = 1;

/** What the workers of a scan share; crosses to other threads as it is. */
export interface ScanShared {
  readonly placements: PlacementMemory;
  /** u8 a window: 1 if it may hold data, 0 if it is known to be zeros. */
  readonly data: SharedArrayBuffer;
  /** i32: next segment to claim, segments up to which `data` is filled in. */
  readonly control: SharedArrayBuffer;
  /** {@link COUNTERS} f64 a worker. */
  readonly counters: SharedArrayBuffer;
}

/** Numbers that a worker keeps up to date: index of each in its part of the counters. */
export const Counter = {
  done: 0,
  read: 1,
  zero: 2,
  duplicate: 3,
  fresh: 4,
  stored: 5,
  chunks: 6,
  freshChunks: 7,
} as const;
export const COUNTERS = 8;

/** What a scan reads and how. */
export interface ScanPlan {
  readonly range: ByteRange;
  readonly chunkBytes: number;
  readonly packBytes: number;
  /** `collect`: blocks that cannot be read are taken as zeros and listed; `fail`: they end the scan. */
  readonly onReadError: 'fail' | 'collect' | 'skip';
}

export interface ScanPartOptions {
  readonly index: number;
  readonly plan: ScanPlan;
  readonly shared: ScanShared;
  readonly device: ReadDevice;
  readonly ctx: PackContext;
  readonly view: DedupeView;
  readonly clock: Clock;
  readonly random: Random;
  /** Throws when the scan is to stop. Asked once a segment. */
  readonly checkStop: () => void;
  /** Awaited once a segment; lets the caller's event loop run where nothing else does. */
  readonly yieldNow: () => Promise<void>;
}

/** A pack that the scan has written. */
export interface ScannedPack {
  readonly packId: string;
  /** Bytes of the sealed pack, footer and all. */
  readonly sizeBytes: number;
  readonly frames: number;
}

export interface ScanPartResult {
  /** Sealed and durable. */
  readonly packs: readonly ScannedPack[];
  /** With `collect`: what could not be read, in no particular order. */
  readonly unreadable: readonly ByteRange[];
}

interface Slab {
  readonly bytes: Buffer;
  /** A view of each chunk: making one each time costs more than the comparing with zeros. */
  readonly chunks: readonly Buffer[];
}

/** A segment that is being read. */
interface Claim {
  readonly slab: Slab;
  /** Windows of the scan from..end, which the slab holds from its start. */
  readonly from: number;
  readonly end: number;
  readonly offset: number;
  readonly length: number;
  readonly read: Promise<number>;
}

/** One worker's share of a scan. */
class ScanPart {
  private readonly o: ScanPartOptions;
  private readonly windows: number;
  private readonly perSegment: number;
  private readonly segments: number;
  private readonly packOf: Uint32Array;
  private readonly placeOf: Uint32Array;
  private readonly data: Uint8Array;
  private readonly control: Int32Array;
  private readonly counters: Float64Array;
  private readonly zeros: Buffer;
  private readonly slabs: readonly Slab[];
  private nextSlab = 0;
  private writer: PackWriter | undefined;
  private writerNumber = -1;
  private readonly sealing: Promise<void>[] = [];
  private readonly packs: ScannedPack[] = [];
  private readonly unreadable: ByteRange[] = [];

  constructor(options: ScanPartOptions) {
    this.o = options;
    const { plan, shared, index } = options;
    const { chunkBytes } = plan;
    this.windows = Math.ceil(plan.range.length / chunkBytes);
    this.perSegment = SEGMENT_BYTES / chunkBytes;
    this.segments = Math.ceil(this.windows / this.perSegment);
    this.packOf = new Uint32Array(shared.placements.packs);
    this.placeOf = new Uint32Array(shared.placements.places);
    this.data = new Uint8Array(shared.data);
    this.control = new Int32Array(shared.control);
    this.counters = new Float64Array(shared.counters, index * COUNTERS * 8, COUNTERS);
    this.zeros = Buffer.alloc(chunkBytes);
    const memory = alignedMemory(SEGMENT_BYTES * SLABS);
    this.slabs = Array.from({ length: SLABS }, (_, i) => {
      const start = memory.byteOffset + i * SEGMENT_BYTES;
      return {
        bytes: Buffer.from(memory.buffer, start, SEGMENT_BYTES),
        chunks: Array.from({ length: this.perSegment }, (_unused, j) =>
          Buffer.from(memory.buffer, start + j * chunkBytes, chunkBytes),
        ),
      };
    });
  }

  async run(): Promise<ScanPartResult> {
    let ahead: Claim | undefined;
    try {
      ahead = await this.claim();
      while (ahead !== undefined) {
        this.o.checkStop();
        const now: Claim = ahead;
        await this.finishRead(now);
        ahead = await this.claim(); // takes the other slab
        await this.work(now);
        await this.o.yieldNow();
      }
      await this.endPack();
      while (this.sealing.length > 0) await this.sealing.shift();
      return { packs: this.packs, unreadable: this.unreadable };
    } finally {
      // After an error: nothing may go on reading into the memory or writing to the store.
      await ahead?.read.catch(() => undefined);
      await this.abandon();
    }
  }

  private count(counter: number, bytes: number): void {
    this.counters[counter] = (this.counters[counter] ?? 0) + bytes;
  }

  private windowBytes(window: number): number {
    const { range, chunkBytes } = this.o.plan;
    return Math.min(chunkBytes, range.length - window * chunkBytes);
  }

  private setHole(window: number): void {
    const size = this.windowBytes(window);
    this.packOf[window] = WINDOW_HOLE;
    this.count(Counter.zero, size);
    this.count(Counter.done, size);
  }

  /** Takes the next segment with data in it, sets those without it to holes, and starts reading. */
  private async claim(): Promise<Claim | undefined> {
    const { plan, device } = this.o;
    for (;;) {
      const segment = Atomics.add(this.control, 0, 1);
      if (segment >= this.segments) return undefined;
      while (Atomics.load(this.control, 1) <= segment) {
        this.o.checkStop();
        await sleep(HOLE_WAIT_MS);
      }
      let from = segment * this.perSegment;
      let end = Math.min(from + this.perSegment, this.windows);
      while (from < end && this.data[from] === 0) this.setHole(from++);
      while (end > from && this.data[end - 1] === 0) this.setHole(--end);
      if (from === end) {
        this.o.checkStop();
        continue;
      }
      const slab = this.slabs[this.nextSlab];
      if (slab === undefined) throw new Error('a scan without memory');
      this.nextSlab = (this.nextSlab + 1) % this.slabs.length;
      const offset = plan.range.offset + from * plan.chunkBytes;
      const length = this.bytesOf(from, end);
      const read = device.read(slab.bytes.subarray(0, length), offset);
      read.catch(() => undefined); // seen when it is awaited
      return { slab, from, end, offset, length, read };
    }
  }

  private bytesOf(from: number, end: number): number {
    const { range, chunkBytes } = this.o.plan;
    return Math.min(end * chunkBytes, range.length) - Math.min(from * chunkBytes, range.length);
  }

  private async finishRead(claim: Claim): Promise<void> {
    let got: number;
    try {
      got = await claim.read;
    } catch (error) {
      if (this.o.plan.onReadError === 'fail' || !isKind(error, 'io')) throw error;
      await this.readPieces(claim, error);
      return;
    }
    if (got !== claim.length) throw this.endedEarly(claim.offset + got);
    this.count(Counter.read, got);
  }

  private endedEarly(at: number): B2Error {
    const { path, sizeBytes } = this.o.device.facts;
    return new B2Error(
      'io',
      `read ${path}: it ends at byte ${at}, though its size was ${sizeBytes}`,
      {
        hint: 'It has shrunk or is going away. Check the device (dmesg), then run the command again.',
      },
    );
  }

  /** After a failed read: chunk by chunk, in a failed chunk block by block; blocks that cannot be read become zeros. */
  private async readPieces(claim: Claim, error: B2Error): Promise<void> {
    const { device, plan } = this.o;
    // A device that is gone altogether is not one with bad blocks.
    const facts = await device.refresh().catch(() => undefined);
    if (facts === undefined || facts.sizeBytes < claim.offset + claim.length) throw error;
    const bytes = claim.slab.bytes.subarray(0, claim.length);
    const tryRead = async (from: number, end: number): Promise<boolean> => {
      let got: number;
      try {
        got = await device.read(bytes.subarray(from, end), claim.offset + from);
      } catch (again) {
        if (isKind(again, 'io')) return false;
        throw again;
      }
      if (got !== end - from) throw this.endedEarly(claim.offset + from + got);
      this.count(Counter.read, got);
      return true;
    };
    for (let from = 0; from < claim.length; from += plan.chunkBytes) {
      const end = Math.min(from + plan.chunkBytes, claim.length);
      this.o.checkStop();
      if (await tryRead(from, end)) continue;
      if (plan.onReadError === 'skip') {
        bytes.fill(0, from, end);
        this.noteUnreadable(claim.offset + from, end - from);
        continue;
      }
      for (let block = from; block < end; block += BLOCK_BYTES) {
        const blockEnd = Math.min(block + BLOCK_BYTES, end);
        if (await tryRead(block, blockEnd)) continue;
        bytes.fill(0, block, blockEnd);
        this.noteUnreadable(claim.offset + block, blockEnd - block);
      }
    }
  }

  private noteUnreadable(offset: number, length: number): void {
    const last = this.unreadable.at(-1);
    if (last !== undefined && last.offset + last.length === offset) {
      this.unreadable[this.unreadable.length - 1] = {
        offset: last.offset,
        length: last.length + length,
      };
    } else {
      this.unreadable.push({ offset, length });
    }
  }

  private async work(claim: Claim): Promise<void> {
    const { plan, ctx, view } = this.o;
    const { chunkBytes } = plan;
    for (let window = claim.from; window < claim.end; window++) {
      const size = this.windowBytes(window);
      const full = claim.slab.chunks[window - claim.from];
      if (full === undefined) throw new Error('a window outside its segment');
      const chunk = size === chunkBytes ? full : full.subarray(0, size);
      const zeros = size === chunkBytes ? this.zeros : this.zeros.subarray(0, size);
      if (this.data[window] === 0 || chunk.equals(zeros)) {
        this.setHole(window);
        continue;
      }
      const id = ctx.keys.chunkId(chunk);
      let found = this.lookUp(id);
      while (found === Found.needsFooter || (found === Found.miss && this.writer === undefined)) {
        if (found === Found.needsFooter) await view.loadFooter();
        else await this.beginPack();
        found = this.lookUp(id);
      }
      this.count(Counter.chunks, 1);
      this.count(Counter.done, size);
      if (found === Found.hit) {
        this.packOf[window] = view.pack;
        this.placeOf[window] = view.place;
        this.count(Counter.duplicate, size);
        continue;
      }
      const { writer } = this;
      if (writer === undefined) throw new Error('a chunk without a pack');
      // Other threads may know the place already: the chunk goes exactly there, at once.
      this.packOf[window] = this.writerNumber;
      this.placeOf[window] = placeWord(writer.frameCount, 0, false);
      const before = writer.sizeBytes;
      writer.addChunk(chunk, id);
      const after = writer.sizeBytes;
      this.count(Counter.fresh, size);
      this.count(Counter.freshChunks, 1);
      this.count(Counter.stored, after - before);
      if (after >= plan.packBytes || writer.isFull) await this.endPack();
      else if (writer.wantsFlush) await writer.flush();
    }
  }

  /** Looks for the chunk; where a pack is open, enters it as that pack's next if it is not there. */
  private lookUp(id: Uint8Array): Found {
    const { view } = this.o;
    const { writer } = this;
    if (writer === undefined) return view.find(id);
    return view.findOrAdd(
      id,
      this.writerNumber,
      writer.chunkCount,
      placeWord(writer.frameCount, 0, false),
    );
  }

  private async beginPack(): Promise<void> {
    const { ctx, clock, random, view } = this.o;
    const packId = Buffer.from(random(16)).toString('hex');
    try {
      this.writer = await PackWriter.create(ctx, packId, clock.nowNs());
    } catch (error) {
      // It may have been made all the same. Of another's pack under this id nothing must be touched.
      if (!isKind(error, 'exists')) await ctx.store.delete(packName(packId)).catch(() => undefined);
      throw error;
    }
    this.writerNumber = view.beginPack(packId);
  }

  /** Lets the open pack be sealed while the work goes on. */
  private async endPack(): Promise<void> {
    const { writer } = this;
    if (writer === undefined) return;
    this.writer = undefined;
    const sealed = this.seal(writer, this.writerNumber);
    sealed.catch(() => undefined); // seen when it is awaited
    this.sealing.push(sealed);
    while (this.sealing.length > MAX_SEALING) await this.sealing.shift();
  }

  private async seal(writer: PackWriter, number: number): Promise<void> {
    try {
      await writer.seal(Buffer.from(this.o.random(16)));
    } catch (error) {
      await this.removePack(writer.packId, number);
      throw error;
    }
    this.o.view.endPack(number, writer.sizeBytes, writer.chunkCount);
    this.packs.push({
      packId: writer.packId,
      sizeBytes: writer.sizeBytes,
      frames: writer.frameCount,
    });
  }

  /** Nothing refers to a pack of a scan that has failed: what there is of it only takes room. */
  private async removePack(packId: string, number: number): Promise<void> {
    this.o.view.dropPack(number);
    await this.o.ctx.store.delete(packName(packId)).catch(() => undefined);
  }

  private async abandon(): Promise<void> {
    const { writer } = this;
    this.writer = undefined;
    if (writer !== undefined) {
      await writer.abandon();
      await this.removePack(writer.packId, this.writerNumber);
    }
    await Promise.allSettled(this.sealing);
  }
}

/** Runs one worker's share of a scan to its end. After a rejection nothing is under way any more, and no half-written pack is left. */
export async function scanPart(options: ScanPartOptions): Promise<ScanPartResult> {
  return new ScanPart(options).run();
}
