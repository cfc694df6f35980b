/**
 * Live capture over a device in memory into a repository in memory: a change source whose writes happen at one moment each, so that
 * every point must be the state after some number of them, and is held against that.
 */
import { expect } from 'vitest';
import { RunScanner } from '../../src/capture/baseline.js';
import {
  LiveCapture,
  type CaptureEvent,
  type CaptureSink,
  type CapturedPoint,
  type LiveCaptureOptions,
} from '../../src/capture/live-capture.js';
import { WriterSink } from '../../src/capture/writer-sink.js';
import { systemClock } from '../../src/clock.js';
import type {
  ChangeLoss,
  ChangeSink,
  ChangeSource,
  Poll,
} from '../../src/devices/change-source.js';
import type { ReadDevice } from '../../src/devices/device.js';
import { VolumeHistory } from '../../src/repo/history.js';
import { openImage } from '../../src/repo/point.js';
import type { Repository } from '../../src/repo/repository.js';
import { VolumeWriter } from '../../src/repo/volume-writer.js';
import { memoryDevice, type MemoryDevice } from './device-memory.js';
import { testMeta } from './model-volume.js';

export const BLOCK = 4096;

/** A source that is told of every write as it is made. */
export class FakeSource implements ChangeSource {
  readonly kind = 'trace';
  readonly isTimed = true;
  readonly originNs: bigint;
  loss: ChangeLoss | undefined;
  private queue: ((sink: ChangeSink) => void)[] = [];

  constructor(originNs = systemClock.monotonicNs()) {
    this.originNs = originNs;
  }

  now(): number {
    return Number(systemClock.monotonicNs() - this.originNs);
  }

  /** Runs `data` as a write of these blocks; `silent`: its events are lost. Returns issue and completion. */
  write(block: number, count: number, data: () => void, silent = false): [number, number] {
    const issued = this.now();
    data();
    const completed = this.now() + 1;
    if (!silent)
      this.queue.push((sink) => {
        sink.issued(block, count, issued, 'write');
        sink.completed(block, count, completed, 'write');
      });
    return [issued, completed];
  }

  /** Single blocks written all at once; nobody looks at the data. */
  burst(blocks: Float64Array): void {
    const at = this.now();
    this.queue.push((sink) => {
      for (const block of blocks) {
        sink.issued(block, 1, at, 'write');
        sink.completed(block, 1, at + 1, 'write');
      }
    });
  }

  poll(sink: ChangeSink): Promise<Poll> {
    const completeToNs = this.now();
    const { loss, queue } = this;
    this.loss = undefined;
    this.queue = [];
    for (const deliver of queue) deliver(sink);
    return Promise.resolve({ completeToNs, events: queue.length, more: false, loss });
  }

  close(): Promise<void> {
    return Promise.resolve();
  }
}

/** A device in memory that is only read, as block devices are: all of it may hold data. */
export function readOnly(memory: MemoryDevice): ReadDevice {
  return {
    facts: memory.facts,
    read: (into, offset) => memory.read(into, offset),
    dataRanges: (offset, length) => Promise.resolve([{ offset, length }]),
    refresh: () => Promise.resolve(memory.facts),
    close: () => Promise.resolve(),
  };
}

interface LoggedWrite {
  readonly block: number;
  readonly content: Buffer;
  readonly issuedNs: number;
  readonly completedNs: number;
}

/** A device with a log of what was written to it. */
export class LoggedDevice {
  readonly memory: MemoryDevice;
  readonly device: ReadDevice;
  private readonly start: Buffer;
  private readonly writes: LoggedWrite[] = [];

  constructor(bytes: Buffer) {
    this.memory = memoryDevice(bytes);
    this.device = readOnly(this.memory);
    this.start = Buffer.from(bytes);
  }

  get bytes(): Buffer {
    return this.memory.bytes;
  }

  write(source: FakeSource, block: number, content: Buffer, silent = false): void {
    const [issued, completed] = source.write(
      block,
      Math.ceil(content.length / BLOCK),
      () => content.copy(this.bytes, block * BLOCK),
      silent,
    );
    this.writes.push({
      block,
      content,
      issuedNs: issued + Number(source.originNs),
      completedNs: completed + Number(source.originNs),
    });
  }

  /**
   * Throws unless `image` is the device at the instant (monotonic): every write that was over is in it, none that came later, and
   * of those under way then any of their blocks.
   */
  check(image: Buffer, monotonicNs: number, what: string): void {
    const expected = Buffer.from(this.start);
    let n = 0;
    for (const w of this.writes) {
      if (w.issuedNs > monotonicNs) break;
      n++;
      for (let at = 0; at < w.content.length; at += BLOCK) {
        const part = w.content.subarray(at, at + BLOCK);
        const from = w.block * BLOCK + at;
        // The instant of a point may be that of the completion.
        const isIn =
          w.completedNs < monotonicNs || image.subarray(from, from + part.length).equals(part);
        if (isIn) part.copy(expected, from);
      }
    }
    if (expected.equals(image)) return;
    let at = 0;
    while (at < image.length && image[at] === expected[at]) at++;
    throw new Error(
      `${what} is not the device after ${n} writes: block ${Math.floor(at / BLOCK)} differs`,
    );
  }
}

/** The whole image of a volume at a commit. */
export async function imageAt(repo: Repository, volumeId: string, seq?: number): Promise<Buffer> {
  const history = await VolumeHistory.open(repo, volumeId);
  try {
    history.refuseGap();
    const image = await openImage(history, testMeta(volumeId, 0), seq ?? history.tip?.seq ?? 0);
    const all = Buffer.alloc(image.sizeBytes, 0xee);
    await image.read(all, 0);
    return all;
  } finally {
    await history.close();
  }
}

/** A sink for a volume that scans in this thread. */
export function repositorySink(repo: Repository, volumeId: string, device: ReadDevice): WriterSink {
  const warn = (): void => undefined;
  return new WriterSink({
    open: async () => {
      const { writer, history } = await VolumeWriter.claim(repo, volumeId);
      await history.close();
      return writer;
    },
    facts: { source: 'trace' },
    warn,
    scanner: new RunScanner({
      repo,
      device,
      workers: 0,
      storeUrl: undefined,
      dedupeCacheFile: undefined,
      facts: { source: 'trace' },
      warn,
    }),
  });
}

export interface LiveBed {
  readonly source: FakeSource;
  readonly sink: CaptureSink;
  readonly capture: LiveCapture;
  readonly events: CaptureEvent[];
  readonly points: CapturedPoint[];
}

/** Runs `use` with a capture of `logged` into `sink`, and stops it. Points come only when they are asked for, as a rule. */
export async function withLive(
  logged: { readonly device: ReadDevice },
  sink: CaptureSink,
  options: Partial<LiveCaptureOptions>,
  use: (bed: LiveBed) => Promise<void>,
): Promise<LiveBed> {
  const source = new FakeSource();
  const events: CaptureEvent[] = [];
  const points: CapturedPoint[] = [];
  const capture = LiveCapture.start({
    source,
    device: logged.device,
    sink,
    clock: systemClock,
    intervalMs: 60_000,
    attemptMs: 60_000,
    pollMs: 1,
    retryMs: 2,
    scanBlocks: 1024,
    onEvent: (e) => {
      events.push(e);
      if (e.type === 'point') points.push(e.point);
    },
    ...options,
  });
  const bed = { source, sink, capture, events, points };
  try {
    await use(bed);
  } finally {
    await capture.stop().catch(() => undefined);
  }
  return bed;
}

export function sum(
  events: readonly CaptureEvent[],
  of: 'changedBytes' | 'storedBytes' | 'readBytes',
): number {
  return events.reduce((n, e) => (e.type === 'scanned' ? n + e[of] : n), 0);
}

export function scanned(events: readonly CaptureEvent[]): number {
  return events.filter((e) => e.type === 'scanned').length;
}

/** Waits until `is`; fails after a time that is long for anything here. */
export async function until(is: () => boolean, what: string): Promise<void> {
  for (let i = 0; !is(); i++) {
    expect(i, what).toBeLessThan(20_000);
    await systemClock.sleep(1);
  }
}
