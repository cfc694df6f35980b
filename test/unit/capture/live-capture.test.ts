/** Live capture over a device in memory: outage, loss, spilling, memory, and what it says about each. */
import { describe, expect, it } from 'vitest';
import {
  LiveCapture,
  type CaptureCommit,
  type CaptureEvent,
  type CaptureSink,
  type LiveCaptureOptions,
} from '../../../src/capture/live-capture.js';
import { systemClock } from '../../../src/clock.js';
import type {
  ChangeLoss,
  ChangeSink,
  ChangeSource,
  Poll,
} from '../../../src/devices/change-source.js';
import type { ReadDevice } from '../../../src/devices/device.js';
import { B2Error } from '../../../src/errors.js';
import { Coverage, PointClass } from '../../../src/format/commit.js';
import { memoryDevice } from '../../support/device-memory.js';

const BLOCK = 4096;

class FakeSource implements ChangeSource {
  readonly kind = 'trace';
  readonly isTimed = true;
  readonly originNs = systemClock.monotonicNs();
  loss: ChangeLoss | undefined;
  private queue: ((sink: ChangeSink) => void)[] = [];

  now(): number {
    return Number(systemClock.monotonicNs() - this.originNs);
  }

  write(block: number, count: number, data: () => void): void {
    const issued = this.now();
    data();
    const completed = this.now() + 1;
    this.queue.push((sink) => {
      sink.issued(block, count, issued, 'write');
      sink.completed(block, count, completed, 'write');
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

class FakeSink implements CaptureSink {
  readonly image: Buffer;
  readonly commits: {
    readonly pointClass: PointClass;
    readonly coverage: Coverage;
    readonly blocks: number;
    readonly instantNs: bigint;
  }[] = [];
  fail: B2Error | undefined;
  most = 0;

  constructor(bytes: number) {
    this.image = Buffer.alloc(bytes, 0xee);
  }

  async commit(commit: CaptureCommit): Promise<{ seq: number; storedBytes: number }> {
    await new Promise((resolve) => setImmediate(resolve));
    if (this.fail !== undefined) throw this.fail;
    const { blocks } = commit.content;
    expect([...blocks]).toEqual([...new Set(blocks)].sort((a, b) => a - b));
    blocks.forEach((block, i) => commit.content.bytesAt(i).copy(this.image, block * BLOCK));
    this.most = Math.max(this.most, blocks.length);
    this.commits.push({
      pointClass: commit.pointClass,
      coverage: commit.coverage,
      blocks: blocks.length,
      instantNs: commit.instantNs,
    });
    return { seq: this.commits.length, storedBytes: 1 };
  }
}

interface Bed {
  readonly bytes: Buffer;
  readonly source: FakeSource;
  readonly sink: FakeSink;
  readonly events: CaptureEvent[];
  readonly capture: LiveCapture;
  readonly device: ReadDevice;
  write(block: number, value: number, count?: number): void;
}

async function withCapture(
  sizeBytes: number,
  options: Partial<LiveCaptureOptions>,
  use: (bed: Bed) => Promise<void>,
): Promise<Bed> {
  const memory = memoryDevice(Buffer.alloc(sizeBytes, 1));
  const device: ReadDevice = {
    facts: memory.facts,
    read: (into, offset) => memory.read(into, offset),
    dataRanges: (offset, length) => Promise.resolve([{ offset, length }]),
    refresh: () => Promise.resolve(memory.facts),
    close: () => Promise.resolve(),
  };
  const source = new FakeSource();
  const sink = new FakeSink(sizeBytes);
  const events: CaptureEvent[] = [];
  const capture = LiveCapture.start({
    source,
    device,
    sink,
    clock: systemClock,
    // Points come when they are asked for.
    intervalMs: 60_000,
    pollMs: 1,
    retryMs: 5,
    attemptMs: 60_000,
    onEvent: (e) => void events.push(e),
    ...options,
  });
  const bed: Bed = {
    bytes: memory.bytes,
    source,
    sink,
    events,
    capture,
    device,
    write: (block, value, count = 1) =>
      source.write(block, count, () =>
        memory.bytes.fill(value, block * BLOCK, Math.min(sizeBytes, (block + count) * BLOCK)),
      ),
  };
  try {
    await use(bed);
  } finally {
    await capture.stop().catch(() => undefined);
  }
  return bed;
}

const pointsOf = (events: readonly CaptureEvent[]) =>
  events.flatMap((e) => (e.type === 'point' ? [e.point] : []));

describe('live capture', () => {
  it('begins with everything, then follows what changes, and makes no point where nothing does', async () => {
    await withCapture(100 * BLOCK + 512, {}, async ({ capture, sink, bytes, write, events }) => {
      const first = await capture.point();
      expect(first).toMatchObject({ seq: 1, coverage: Coverage.unknown, blocks: 101 });
      expect(sink.image.equals(bytes)).toBe(true);
      expect(capture.status()).toMatchObject({ needsResync: false, pendingBlocks: 0 });
      expect((await capture.point()).seq).toBe(1);
      write(3, 7, 2);
      write(100, 9);
      const second = await capture.point();
      expect(second).toMatchObject({ seq: 2, coverage: Coverage.exact, blocks: 3 });
      expect(sink.image.equals(bytes)).toBe(true);
      expect(second.instantNs).toBeGreaterThan(first.instantNs);
      expect(pointsOf(events).map((p) => p.seq)).toEqual([1, 2]);
    });
  });

  it('believes that it is in sync only where it is told so', async () => {
    await withCapture(100 * BLOCK, { isInSync: true }, async ({ capture, write, sink }) => {
      write(5, 5);
      expect(await capture.point()).toMatchObject({ coverage: Coverage.exact, blocks: 1 });
      expect(sink.commits).toHaveLength(1);
    });
    await withCapture(100 * BLOCK, { isInSync: true }, async ({ capture }) => {
      expect(await capture.point()).toMatchObject({ coverage: Coverage.exact, blocks: 0 });
    });
  });

  it('stays within its memory: more blocks than fit go out in commits that are no points', async () => {
    await withCapture(
      4000 * BLOCK,
      { stageBytes: 512 * BLOCK, maxSlots: 64 },
      async ({ capture, sink, bytes, write, events }) => {
        const first = await capture.point();
        expect(first.coverage).toBe(Coverage.unknown);
        expect(sink.image.equals(bytes)).toBe(true);
        expect(sink.most).toBeLessThanOrEqual(512);
        const classes = sink.commits.map((c) => c.pointClass);
        expect(classes.slice(0, -1).every((c) => c === PointClass.none)).toBe(true);
        expect(classes.at(-1)).toBe(PointClass.crash);
        expect(events.filter((e) => e.type === 'spill').length).toBe(classes.length - 1);
        write(0, 3, 2000);
        const second = await capture.point();
        expect(second.coverage).toBe(Coverage.coalesced);
        expect(sink.image.equals(bytes)).toBe(true);
        expect(capture.status().memoryBytes).toBeLessThan(12 * 1024 * 1024);
      },
    );
  });

  it('goes on when the repository takes commits again, with everything that was written meanwhile', async () => {
    await withCapture(300 * BLOCK, {}, async ({ capture, sink, bytes, write, events }) => {
      await capture.point();
      sink.fail = new B2Error('no-space', 'the disk is full');
      write(1, 2);
      const waiting = capture.point();
      for (let i = 0; events.filter((e) => e.type === 'outage').length < 3; i++) {
        expect(i).toBeLessThan(1000);
        write(10 + (i % 50), 3);
        await systemClock.sleep(2);
      }
      expect(capture.status().outage?.kind).toBe('no-space');
      sink.fail = undefined;
      const after = await waiting;
      expect(after.coverage).toBe(Coverage.coalesced);
      await capture.point();
      expect(sink.image.equals(bytes)).toBe(true);
      expect(capture.status().outage).toBeUndefined();
      write(1, 4);
      await systemClock.sleep(5);
      expect((await capture.point()).coverage).toBe(Coverage.exact);
    });
  });

  it('reads everything again after a loss, claims nothing before, and says that the time is unknown', async () => {
    await withCapture(300 * BLOCK, {}, async ({ capture, sink, source, bytes, write, events }) => {
      await capture.point();
      // Written behind the source's back: its event is what was lost.
      bytes.fill(0x55, 200 * BLOCK, 201 * BLOCK);
      source.loss = { reason: 'overrun', message: 'lost some' };
      write(1, 2);
      const point = await capture.point();
      expect(point).toMatchObject({ coverage: Coverage.unknown, blocks: 300 });
      expect(sink.image.equals(bytes)).toBe(true);
      expect(events.some((e) => e.type === 'lost')).toBe(true);
      write(1, 3);
      expect((await capture.point()).coverage).toBe(Coverage.exact);
      expect(capture.status()).toMatchObject({ losses: 1, needsResync: false });
    });
  });

  it('ends where the source can be of no use any more', async () => {
    await withCapture(10 * BLOCK, {}, async ({ capture, source }) => {
      await capture.point();
      source.loss = { reason: 'resized', message: '/dev/test has grown' };
      await expect(capture.done).rejects.toMatchObject({
        message: '/dev/test has grown',
        retryable: true,
      });
      await expect(capture.point()).rejects.toThrow('being stopped');
    });
  });

  it('ends with the error of a device that cannot be read', async () => {
    const memory = memoryDevice(Buffer.alloc(10 * BLOCK));
    memory.before = () => {
      throw new B2Error('io', 'read of /dev/test failed');
    };
    const device: ReadDevice = {
      facts: memory.facts,
      read: (into, offset) => memory.read(into, offset),
      dataRanges: () => Promise.resolve([]),
      refresh: () => Promise.resolve(memory.facts),
      close: () => Promise.resolve(),
    };
    const capture = LiveCapture.start({
      source: new FakeSource(),
      device,
      sink: new FakeSink(10 * BLOCK),
      clock: systemClock,
    });
    const asked = capture.point();
    await expect(capture.done).rejects.toThrow('read of /dev/test failed');
    await expect(asked).rejects.toThrow('read of /dev/test failed');
  });

  it('gives a point the class that its asker vouches for, with and without changes', async () => {
    await withCapture(10 * BLOCK, {}, async ({ capture, sink, write }) => {
      expect((await capture.point()).pointClass).toBe(PointClass.crash);
      const idle = await capture.point(PointClass.fs);
      expect(idle).toMatchObject({ seq: 2, pointClass: PointClass.fs, blocks: 0 });
      // Good enough for who wants less, too.
      expect((await capture.point()).seq).toBe(2);
      write(1, 1);
      const [fs, app] = await Promise.all([
        capture.point(PointClass.fs),
        capture.point(PointClass.app),
      ]);
      expect(app).toMatchObject({ pointClass: PointClass.app });
      expect(fs.pointClass).toBeGreaterThanOrEqual(PointClass.fs);
      write(2, 2);
      expect((await capture.point()).pointClass).toBe(PointClass.crash);
      expect(sink.commits.map((c) => c.pointClass).slice(0, 2)).toEqual([
        PointClass.crash,
        PointClass.fs,
      ]);
    });
  });

  it('gives no class that its asker does not vouch for any longer', async () => {
    await withCapture(10 * BLOCK, {}, async ({ capture, sink, write }) => {
      await capture.point();
      sink.fail = new B2Error('io', 'the repository is away');
      write(1, 1);
      const patience = new AbortController();
      const frozen = capture.point(PointClass.fs, patience.signal);
      while (capture.status().outage === undefined) await systemClock.sleep(1);
      patience.abort();
      await expect(frozen).rejects.toMatchObject({ kind: 'interrupted' });
      sink.fail = undefined;
      expect((await capture.point()).pointClass).toBe(PointClass.crash);
      await expect(capture.point(PointClass.fs, patience.signal)).rejects.toMatchObject({
        kind: 'interrupted',
      });
      expect(sink.commits.every((c) => c.pointClass === PointClass.crash)).toBe(true);
    });
  });

  it('stops with a last point when there is time for one', async () => {
    const bed = await withCapture(
      10 * BLOCK,
      { intervalMs: 3_600_000 },
      async ({ capture, write }) => {
        await capture.point();
        write(2, 8);
        await capture.stop(60_000);
      },
    );
    expect(bed.sink.image.equals(bed.bytes)).toBe(true);
    expect(bed.sink.commits).toHaveLength(2);
    await bed.capture.stop();
  });

  it('another writer of the volume ends it', async () => {
    await withCapture(10 * BLOCK, { intervalMs: 10 }, async ({ capture, sink, write }) => {
      await capture.point();
      sink.fail = new B2Error('lost-claim', 'another b2 has taken over');
      write(1, 1);
      await expect(capture.done).rejects.toMatchObject({ kind: 'lost-claim' });
    });
  });
});
