/** The `trace` change source: block events of one disk, clipped to the device that is watched. */
import { readFile } from 'node:fs/promises';
import path from 'node:path';

import { systemClock, type Clock } from '../../clock.js';
import { B2Error } from '../../errors.js';
import { BLOCK_BYTES, blocksOf } from '../../units.js';
import {
  POLL_EVENTS,
  type ChangeLoss,
  type ChangeSink,
  type ChangeSource,
  type Poll,
  type PollOptions,
} from '../change-source.js';
import type { DeviceFacts } from '../device.js';
import { blockInfo, blockNameOf, SYSTEM_ROOTS, type SystemRoots } from '../sysfs.js';
import {
  removeStaleInstances,
  traceHost,
  traceObstacle,
  TraceInstance,
  type BufferCounters,
  type TraceHost,
} from './instance.js';
import { EventRole, type BlockEvent } from './page.js';

/** Block events count sectors of this size, whatever the logical block size is. */
const SECTOR_BYTES = 512;
const SECTORS_PER_BLOCK = BLOCK_BYTES / SECTOR_BYTES;
/** A record that an interrupt nested in another becomes readable when that one is done. Far longer than that takes. */
const GUARD_NS = 1_000_000;
const NO_COUNTERS: BufferCounters = { overrun: 0, dropped: 0 };

/** The disk that block events name, and where the watched device lies on it. In sectors of 512 bytes. */
export interface WatchedRange {
  /** major << 20 | minor of the whole disk. */
  readonly kernelDevice: number;
  readonly firstSector: number;
  readonly sectors: number;
  /** True if the device is the whole disk, so that a write behind its end means that it has grown. */
  readonly isWholeDisk: boolean;
}

function kernelDeviceOf(devNumber: string): number {
  const [major = 0, minor = 0] = devNumber.split(':').map(Number);
  return major * 0x10_0000 + minor;
}

/** Where a block device or partition lies. Kind `unsupported` for anything else and for zoned disks. */
export async function watchedRange(
  facts: DeviceFacts,
  roots: SystemRoots = SYSTEM_ROOTS,
): Promise<WatchedRange> {
  if (facts.kind !== 'block' || facts.devNumber === undefined)
    throw new B2Error(
      'unsupported',
      `${facts.path} is no block device, and only those have block events`,
    );
  const name = await blockNameOf(facts.devNumber, roots);
  if (name === undefined) throw new B2Error('not-found', `block device ${facts.path} has gone`);
  const info = await blockInfo(name, roots);
  const disk =
    info.partition === undefined ? info : await blockInfo(info.partition.diskName, roots);
  const zoned = await readFile(
    path.join(roots.sys, 'class/block', disk.name, 'queue/zoned'),
    'utf8',
  ).catch(() => 'none');
  if (zoned.trim() !== 'none')
    throw new B2Error(
      'unsupported',
      `${facts.path} is a zoned disk: where an appended write lands is not in the block events`,
    );
  return {
    kernelDevice: kernelDeviceOf(disk.devNumber),
    firstSector: (info.partition?.offsetBytes ?? 0) / SECTOR_BYTES,
    sectors: facts.sizeBytes / SECTOR_BYTES,
    isWholeDisk: info.partition === undefined,
  };
}

export interface TraceSourceOptions {
  readonly clock?: Clock;
  readonly host?: TraceHost;
  readonly roots?: SystemRoots;
  /** See {@link InstanceOptions.cpuBufferBytes}. */
  readonly cpuBufferBytes?: number;
}

/**
 * Watches a block device or partition through block events in a trace instance of its own. Needs root.
 *
 * Memory: the kernel's buffers (16 MiB a CPU, see instance.ts) and one page. Cost: 1 to 2 µs for each write in the kernel,
 * some 0.1 µs for each event here.
 */
export class TraceSource implements ChangeSource {
  readonly kind = 'trace';
  readonly isTimed = true;
  readonly originNs: bigint;
  private readonly instance: TraceInstance;
  private readonly clock: Clock;
  private readonly range: WatchedRange;
  private readonly path: string;
  private readonly lastBlock: number;
  private readonly page: Uint8Array<ArrayBuffer>;
  private readonly view: DataView;
  private completeToNs = 0;
  /** The buffer to read next, and when the round over all buffers began. A round may need several polls. */
  private cpu = 0;
  private roundStartNs = 0;
  private known = NO_COUNTERS;
  private loss: ChangeLoss | undefined;
  private sink: ChangeSink | undefined;
  private closed = false;

  private constructor(
    instance: TraceInstance,
    clock: Clock,
    originNs: bigint,
    range: WatchedRange,
    facts: DeviceFacts,
  ) {
    this.instance = instance;
    this.clock = clock;
    this.originNs = originNs;
    this.range = range;
    this.path = facts.path;
    this.lastBlock = blocksOf(facts.sizeBytes) - 1;
    this.page = new Uint8Array(instance.pageBytes);
    this.view = new DataView(this.page.buffer);
  }

  /**
   * Starts watching; removes what dead processes left first. Rejects with `unsupported` and the reason where it cannot be
   * done (see {@link traceObstacle}), or for a zoned disk.
   */
  static async open(facts: DeviceFacts, options: TraceSourceOptions = {}): Promise<TraceSource> {
    const host = options.host ?? traceHost();
    const clock = options.clock ?? systemClock;
    const obstacle = await traceObstacle(host);
    if (obstacle !== undefined) {
      throw new B2Error(
        'unsupported',
        `cannot watch ${facts.path} by block events: ${obstacle.message}`,
        {
          hint: 'Use --source scan, which needs no privilege but reads the whole device to find changes.',
        },
      );
    }
    await removeStaleInstances(host);
    const range = await watchedRange(facts, options.roots);
    const originNs = clock.monotonicNs();
    const instance = await TraceInstance.create(
      { kernelDevice: range.kernelDevice, cpuBufferBytes: options.cpuBufferBytes, originNs },
      host,
    );
    return new TraceSource(instance, clock, originNs, range, facts);
  }

  /** The directory of the instance in tracefs, for tests and messages. */
  get directory(): string {
    return this.instance.directory;
  }

  async poll(sink: ChangeSink, options: PollOptions = {}): Promise<Poll> {
    if (this.closed) throw new Error(`the watch of ${this.path} is closed`);
    const budget = options.maxEvents ?? POLL_EVENTS;
    const { buffers, parser } = this.instance;
    this.sink = sink;
    let events = 0;
    let rounds = 0;
    try {
      // A round that an earlier poll left in the middle is ended first; it says less than one that begins now.
      const wanted = this.cpu === 0 ? 1 : 2;
      while (rounds < wanted && events < budget) {
        if (this.cpu === 0) this.roundStartNs = this.now();
        while (this.cpu < buffers.length && events < budget) {
          const buffer = buffers[this.cpu];
          if (buffer === undefined) break;
          if (!this.instance.readPage(buffer, this.page)) {
            this.cpu++;
            continue;
          }
          const result = parser.parse(this.view, this.onEvent);
          events += result.events;
          if (result.missed !== 0) this.lose('overrun', result.missed);
          if (result.damage !== undefined) this.lose('unreadable', 0, result.damage);
          // A writer as fast as this loop must not hold it in one buffer for ever: the budget ends the poll.
        }
        if (this.cpu < buffers.length) break;
        this.cpu = 0;
        rounds++;
        this.completeToNs = Math.max(this.completeToNs, this.roundStartNs - GUARD_NS);
      }
    } finally {
      this.sink = undefined;
    }
    if (options.certain === true) await this.checkCounters();
    const { loss } = this;
    this.loss = undefined;
    return { completeToNs: this.completeToNs, events, more: events >= budget, loss };
  }

  async close(): Promise<void> {
    if (this.closed) return;
    this.closed = true;
    await this.instance.remove();
  }

  private now(): number {
    return Number(this.clock.monotonicNs() - this.originNs);
  }

  private async checkCounters(): Promise<void> {
    const c = await this.instance.counters();
    if (c.overrun > this.known.overrun) this.lose('overrun', c.overrun - this.known.overrun);
    if (c.dropped > this.known.dropped) this.lose('dropped', c.dropped - this.known.dropped);
    this.known = c;
  }

  private lose(reason: ChangeLoss['reason'], count: number, why = ''): void {
    const number = count > 0 ? String(count) : 'some';
    const text = {
      overrun: `${number} block events of ${this.path} came faster than they were read`,
      dropped: `the kernel could not record ${number} block events of ${this.path}`,
      unreadable: `a page of block events of ${this.path} is not readable: ${why}`,
      resized: `${this.path} was written behind its end (${why}): it has grown`,
      opaque: `the driver of ${this.path} does not say which sectors it has written`,
    };
    // The first reason is the one to report; `opaque` tells that the source is of no use and wins.
    if (this.loss === undefined || reason === 'opaque')
      this.loss = { reason, message: text[reason] };
  }

  private readonly onEvent = (event: BlockEvent): void => {
    const { sink, range } = this;
    if (sink === undefined || event.isRead || event.dev !== range.kernelDevice) return;
    if (event.sectors === 0) {
      // A bio that ended with nothing left in it, and was no mere flush: the driver has moved its start along.
      if (event.role === EventRole.bioDone && !event.isFlush) this.lose('opaque', 0);
      return;
    }
    const first = event.sector - range.firstSector;
    const last = first + event.sectors - 1;
    if (last < 0) return;
    if (last >= range.sectors) {
      if (range.isWholeDisk) this.lose('resized', 0, `sector ${event.sector + event.sectors - 1}`);
      if (first >= range.sectors) return;
    }
    const from = Math.floor(Math.max(first, 0) / SECTORS_PER_BLOCK);
    const to = Math.min(Math.floor(last / SECTORS_PER_BLOCK), this.lastBlock);
    if (event.role === EventRole.issue) sink.issued(from, to - from + 1, event.atNs, event.kind);
    else sink.completed(from, to - from + 1, event.atNs, event.kind);
  };
}
