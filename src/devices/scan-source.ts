/**
 * The `scan` change source: finds changes of any device or image file by reading it whole and comparing hashes. Needs no
 * privilege but reading. What it costs: every scan reads the whole device (and takes 8 bytes of memory for each 64 KiB:
 * 128 MiB for 1 TiB), and only a device that is not written for as long as scanning takes gives an exact point.
 *
 * Whether anything was written at all is asked first, of the kernel's write counters or the file's times
 * ({@link deviceStamp}); an idle device is not read. A device without counters is read at every poll that is due and never
 * counts as quiet. Writes through a memory map of an image file change its times only when they are written back.
 */
import type { Clock, Random } from '../clock.js';
import { B2Error, isKind } from '../errors.js';
import { keyedHash, type KeyedHash } from '../hash.js';
import { alignedMemory } from '../memory.js';
import { BLOCK_BYTES } from '../units.js';
import type { ChangeSink, ChangeSource, Poll, PollOptions } from './change-source.js';
import type { ReadDevice } from './device.js';
import { deviceStamp, unchangedSince, type DeviceStamp } from './stamp.js';

const WINDOW_BYTES = 64 * 1024;
const READ_BYTES = 4 * 1024 * 1024;
/** In place of the hash of a window that cannot be read. */
const UNREADABLE = Buffer.alloc(8);
/** Files have times as coarse as the kernel's timer tick (10 ms at most): two writes within one look like one. */
const TICK_MS = 20;

export interface ScanSourceOptions {
  readonly clock: Clock;
  readonly random: Random;
  /** Scans begin this far apart at least, while the device is written. Default 0: each poll may scan. */
  readonly scanIntervalMs?: number;
  /** How the device shows that it was written; default {@link deviceStamp}. */
  readonly stamp?: () => Promise<DeviceStamp>;
}

/** See the file comment. Reads through `device`, which the caller keeps open as long and closes. */
export class ScanSource implements ChangeSource {
  readonly kind = 'scan';
  readonly isTimed = false;
  readonly originNs: bigint;
  private readonly device: ReadDevice;
  private readonly options: ScanSourceOptions;
  private readonly hash: KeyedHash;
  private readonly slab: Buffer;
  /** Two words of the hash of each window; grows and shrinks with the device. */
  private hashes: Uint32Array;
  /** Windows whose hash is known. */
  private known = 0;
  private stamp: DeviceStamp | undefined;
  private sizeBytes: number;
  private completeToNs = 0;
  private lastScanNs = Number.NEGATIVE_INFINITY;
  private closed = false;

  private constructor(device: ReadDevice, options: ScanSourceOptions) {
    this.device = device;
    this.options = options;
    this.originNs = options.clock.monotonicNs();
    this.hash = keyedHash(options.random(32));
    const memory = alignedMemory(READ_BYTES);
    this.slab = Buffer.from(memory.buffer, memory.byteOffset, READ_BYTES);
    this.sizeBytes = device.facts.sizeBytes;
    this.hashes = new Uint32Array(Math.ceil(this.sizeBytes / WINDOW_BYTES) * 2);
  }

  /** Starts a watch: reads the whole device once, to know what later scans compare with. */
  static async open(
    device: ReadDevice,
    options: ScanSourceOptions,
    signal?: AbortSignal,
  ): Promise<ScanSource> {
    const source = new ScanSource(device, options);
    const before = await source.takeStamp();
    if (device.facts.kind === 'file') await options.clock.sleep(TICK_MS, signal);
    await source.compare(signal);
    const after = await source.takeStamp();
    if (unchangedSince(before, after)) source.stamp = after;
    return source;
  }

  async poll(sink: ChangeSink, options: PollOptions = {}): Promise<Poll> {
    if (this.closed) throw new Error(`the watch of ${this.device.facts.path} is closed`);
    const { clock } = this.options;
    const startNs = this.now();
    const before = await this.takeStamp();
    if (this.stamp !== undefined && unchangedSince(this.stamp, before)) {
      this.completeToNs = startNs;
      return this.done(0, undefined);
    }
    const interval = (this.options.scanIntervalMs ?? 0) * 1e6;
    if (startNs - this.lastScanNs < interval) return this.done(0, undefined);
    this.lastScanNs = startNs;
    const facts = await this.device.refresh();
    if (facts.sizeBytes !== this.sizeBytes) {
      const was = this.sizeBytes;
      this.sizeBytes = facts.sizeBytes;
      this.hashes = new Uint32Array(Math.ceil(this.sizeBytes / WINDOW_BYTES) * 2);
      this.known = 0;
      this.stamp = undefined;
      return this.done(0, {
        reason: 'resized',
        message: `${facts.path} has ${facts.sizeBytes} bytes now, not ${was}`,
      });
    }
    // A write in the tick of the stamp would not show in a later one: read nothing before that tick is over.
    if (facts.kind === 'file') await clock.sleep(TICK_MS, options.signal);
    const sinceNs = this.completeToNs;
    const changed = await this.compare(options.signal);
    const endNs = this.now();
    // Between the last quiet moment and now: the earliest time for completions, the latest for issues.
    for (const [block, count] of changed) {
      sink.issued(block, count, endNs, 'write');
      sink.completed(block, count, sinceNs, 'write');
    }
    const after = await this.takeStamp();
    if (unchangedSince(before, after)) {
      this.stamp = after;
      this.completeToNs = endNs;
    } else {
      // What was read is of no one moment; the next scan finds what differs from it.
      this.stamp = undefined;
    }
    return this.done(changed.length, undefined);
  }

  async close(): Promise<void> {
    this.closed = true;
  }

  private done(events: number, loss: Poll['loss']): Poll {
    return { completeToNs: this.completeToNs, events, more: false, loss };
  }

  private now(): number {
    return Number(this.options.clock.monotonicNs() - this.originNs);
  }

  private takeStamp(): Promise<DeviceStamp> {
    return this.options.stamp?.() ?? deviceStamp(this.device.facts);
  }

  /** Reads everything; returns the runs of blocks whose windows differ from what was read last. */
  private async compare(
    signal: AbortSignal | undefined,
  ): Promise<[block: number, count: number][]> {
    const changed: [number, number][] = [];
    for (let offset = 0; offset < this.sizeBytes; offset += READ_BYTES) {
      if (signal?.aborted === true)
        throw new B2Error('interrupted', `the scan of ${this.device.facts.path} was stopped`);
      const length = Math.min(READ_BYTES, this.sizeBytes - offset);
      const unreadable = await this.readWindows(offset, length);
      for (let at = 0; at < length; at += WINDOW_BYTES) {
        const bytes = Math.min(WINDOW_BYTES, length - at);
        const digest = unreadable.has(at)
          ? UNREADABLE
          : this.hash.digest(this.slab.subarray(at, at + bytes));
        const [low, high] = [digest.readUInt32LE(0), digest.readUInt32LE(4)];
        const window = (offset + at) / WINDOW_BYTES;
        const isNew = window >= this.known;
        const isSame = this.hashes[window * 2] === low && this.hashes[window * 2 + 1] === high;
        this.hashes[window * 2] = low;
        this.hashes[window * 2 + 1] = high;
        this.known = Math.max(this.known, window + 1);
        if (isNew || isSame) continue;
        const block = (offset + at) / BLOCK_BYTES;
        const count = Math.ceil(bytes / BLOCK_BYTES);
        const last = changed.at(-1);
        if (last !== undefined && last[0] + last[1] === block) last[1] += count;
        else changed.push([block, count]);
      }
    }
    return changed;
  }

  /**
   * Reads into the slab; returns where in it the windows lie that cannot be read. Whether they were written is not known: who captures
   * tries to read them now and then. Rejects if nothing can be read.
   */
  private async readWindows(offset: number, length: number): Promise<ReadonlySet<number>> {
    const unreadable = new Set<number>();
    try {
      await this.device.read(this.slab.subarray(0, length), offset);
      return unreadable;
    } catch (error) {
      if (!isKind(error, 'io')) throw error;
      // Rejects where the device has gone.
      await this.device.refresh();
      for (let at = 0; at < length; at += WINDOW_BYTES) {
        try {
          await this.device.read(
            this.slab.subarray(at, Math.min(at + WINDOW_BYTES, length)),
            offset + at,
          );
        } catch (again) {
          if (!isKind(again, 'io')) throw again;
          unreadable.add(at);
        }
      }
      if (unreadable.size * WINDOW_BYTES >= length && this.sizeBytes <= READ_BYTES) throw error;
      return unreadable;
    }
  }
}
