/**
 * Is an image what a device holds? Compared by content: the device is read, and of the repository only the ids of the chunks, unless they
 * differ. Holes are compared with what the device says about itself and, where it has data, with zeros.
 */
import type { Clock } from '../clock.js';
import { isKind, messageOf } from '../errors.js';
import type { EventSink } from '../events.js';
import type { ReadDevice } from '../devices/device.js';
import type { Image } from '../image.js';
import { alignedMemory } from '../memory.js';
import { startProgress } from '../progress.js';
import type { BlockMap, ResolvedExtent } from '../repo/blockmap.js';
import type { PackFooter } from '../format/pack.js';
import type { Repository } from '../repo/repository.js';
import { BLOCK_BYTES, blocksOf } from '../units.js';
import { MAX_RANGES, type VolumeRange } from './findings.js';

/** Bytes of the device read at once. */
const READ_BYTES = 1024 * 1024;
/** Footers remembered with the places of their chunks. */
const MAX_FOOTERS = 64;

export interface AgainstOptions {
  readonly repo: Repository;
  readonly map: BlockMap;
  /** The same point, for what differs or is only a part of a chunk. */
  readonly image: Image;
  readonly device: ReadDevice;
  readonly clock: Pick<Clock, 'monotonicNs'>;
  readonly events: EventSink;
  readonly signal?: AbortSignal | undefined;
}

export interface AgainstResult {
  readonly imageBytes: number;
  readonly deviceBytes: number;
  readonly comparedBytes: number;
  /** Blocks that differ, as ranges; at most {@link MAX_RANGES}, all of them in `differingBytes`. */
  readonly ranges: readonly VolumeRange[];
  readonly differingBytes: number;
  /** Ranges that the device, or the repository, could not give, with the reason. */
  readonly unreadable: readonly (VolumeRange & {
    readonly reason: string;
    readonly damaged: boolean;
  })[];
}

/** Damage and read errors are results. Rejects with `interrupted`, and when the manifest cannot be read. */
export async function compareWithDevice(o: AgainstOptions): Promise<AgainstResult> {
  const c = new Comparison(o);
  const imageBytes = o.map.commit.sizeBytes;
  const end = Math.min(imageBytes, o.device.facts.sizeBytes);
  const progress = startProgress({
    phase: `comparing with ${o.device.facts.path}`,
    totalBytes: end,
    clock: o.clock,
    events: o.events,
  });
  for await (const batch of o.map.scan(0, blocksOf(end))) {
    for (const e of batch) {
      o.signal?.throwIfAborted();
      await c.extent(e, end, (bytes) => progress.add(bytes));
    }
  }
  progress.finish();
  return {
    imageBytes,
    deviceBytes: o.device.facts.sizeBytes,
    comparedBytes: end,
    ranges: c.ranges,
    differingBytes: c.differingBytes,
    unreadable: c.unreadable,
  };
}

class Comparison {
  readonly ranges: { offset: number; length: number }[] = [];
  readonly unreadable: (VolumeRange & { readonly reason: string; readonly damaged: boolean })[] =
    [];
  differingBytes = 0;
  private readonly o: AgainstOptions;
  private readonly chunkBlocks: number;
  private readonly slab: Uint8Array = alignedMemory(READ_BYTES);
  private readonly zeros = Buffer.alloc(READ_BYTES);
  private readonly footers = new Map<
    string,
    { readonly footer: PackFooter; readonly first: ReadonlyMap<number, number> }
  >();

  constructor(o: AgainstOptions) {
    this.o = o;
    this.chunkBlocks = blocksOf(o.repo.chunkBytes);
  }

  async extent(e: ResolvedExtent, end: number, done: (bytes: number) => void): Promise<void> {
    const from = e.block * BLOCK_BYTES;
    const to = Math.min(end, (e.block + e.count) * BLOCK_BYTES);
    if (e.packId === undefined) return this.hole(from, to, done);
    // Pieces of whole chunks, as many as fit one read.
    const perRead =
      Math.max(1, Math.floor(READ_BYTES / BLOCK_BYTES / this.chunkBlocks)) * this.chunkBlocks;
    const run = e.skip + e.count > this.chunkBlocks;
    for (let block = 0; block < e.count;) {
      const lead = (e.skip + block) % this.chunkBlocks;
      const count = run ? Math.min(e.count - block, perRead - lead) : e.count;
      const at = from + block * BLOCK_BYTES;
      const length = Math.min(to - at, count * BLOCK_BYTES);
      if (length <= 0) return;
      const data = await this.read(at, length);
      if (data !== undefined) await this.chunks(e, e.packId, block, at, data);
      done(length);
      block += count;
    }
  }

  private async read(at: number, length: number): Promise<Buffer | undefined> {
    const into = this.slab.subarray(0, length);
    try {
      const got = await this.o.device.read(into, at);
      if (got === length) return Buffer.from(into.buffer, into.byteOffset, length);
      this.unreadable.push({
        offset: at,
        length,
        reason: `the device ended after ${got} bytes`,
        damaged: false,
      });
    } catch (error) {
      if (!isKind(error, 'io')) throw error;
      this.unreadable.push({ offset: at, length, reason: messageOf(error), damaged: false });
    }
    return undefined;
  }

  private async hole(from: number, to: number, done: (bytes: number) => void): Promise<void> {
    let at = from;
    while (at < to) {
      const step = Math.min(to - at, 256 * READ_BYTES);
      for (const r of await this.o.device.dataRanges(at, step)) {
        for (let p = r.offset; p < r.offset + r.length; p += READ_BYTES) {
          this.o.signal?.throwIfAborted();
          const length = Math.min(READ_BYTES, r.offset + r.length - p);
          const data = await this.read(p, length);
          if (data !== undefined && !data.equals(this.zeros.subarray(0, length)))
            this.blocks(p, data, this.zeros.subarray(0, length));
        }
      }
      at += step;
      done(step);
    }
  }

  /** Compares `data`, which starts `block` blocks into the extent, chunk by chunk. */
  private async chunks(
    e: ResolvedExtent,
    packId: string,
    block: number,
    at: number,
    data: Buffer,
  ): Promise<void> {
    const run = e.skip + e.count > this.chunkBlocks;
    for (let pos = 0; pos < data.length;) {
      const inRun = e.skip + block + pos / BLOCK_BYTES;
      const frame = run ? e.frame + Math.floor(inRun / this.chunkBlocks) : e.frame;
      const skip = run ? inRun % this.chunkBlocks : inRun;
      const length = run
        ? Math.min(data.length - pos, (this.chunkBlocks - skip) * BLOCK_BYTES)
        : data.length - pos;
      const part = data.subarray(pos, pos + length);
      const known = skip === 0 ? await this.chunkOf(packId, frame, e.sub) : undefined;
      const whole =
        known !== undefined && (known.lengthBytes === length || known.lengthBytes <= length);
      const same =
        whole &&
        known.id.equals(this.o.repo.keys.chunkId(part.subarray(0, known.lengthBytes))) &&
        part.subarray(known.lengthBytes).every((b) => b === 0);
      if (!same) await this.bytes(at + pos, part);
      pos += length;
    }
  }

  /** Id and length of a chunk, from the footer; undefined where that cannot be read (then the bytes themselves are tried). */
  private async chunkOf(
    packId: string,
    frame: number,
    sub: number,
  ): Promise<{ id: Buffer; lengthBytes: number } | undefined> {
    let known = this.footers.get(packId);
    if (known === undefined) {
      try {
        const footer = await this.o.repo.packs.use(packId, (pack) => Promise.resolve(pack.footer));
        const first = new Map<number, number>();
        let chunk = 0;
        for (const f of footer.frames) {
          if (f.count > 0) first.set(f.number, chunk);
          chunk += f.count;
        }
        known = { footer, first };
      } catch (error) {
        if (!isKind(error, 'damaged', 'io', 'not-found')) throw error;
        return undefined;
      }
      const [oldest] = this.footers.keys();
      if (this.footers.size >= MAX_FOOTERS && oldest !== undefined) this.footers.delete(oldest);
      this.footers.set(packId, known);
    }
    const first = known.first.get(frame);
    if (first === undefined) return undefined;
    const i = first + sub;
    const lengthBytes = known.footer.lengths[i];
    return lengthBytes === undefined
      ? undefined
      : { id: known.footer.ids.subarray(i * 32, i * 32 + 32), lengthBytes };
  }

  private async bytes(at: number, part: Buffer): Promise<void> {
    const stored = Buffer.allocUnsafe(part.length);
    try {
      await this.o.image.read(stored, at);
    } catch (error) {
      if (!isKind(error, 'damaged', 'io', 'not-found')) throw error;
      this.unreadable.push({
        offset: at,
        length: part.length,
        reason: messageOf(error),
        damaged: error.kind === 'damaged',
      });
      return;
    }
    if (!stored.equals(part)) this.blocks(at, part, stored);
  }

  /** Notes the blocks in which `a` and `b` differ. */
  private blocks(at: number, a: Buffer, b: Buffer): void {
    for (let pos = 0; pos < a.length; pos += BLOCK_BYTES) {
      const end = Math.min(a.length, pos + BLOCK_BYTES);
      if (a.compare(b, pos, end, pos, end) === 0) continue;
      this.differingBytes += end - pos;
      const last = this.ranges.at(-1);
      if (last !== undefined && last.offset + last.length === at + pos) last.length += end - pos;
      else if (this.ranges.length < MAX_RANGES)
        this.ranges.push({ offset: at + pos, length: end - pos });
    }
  }
}
