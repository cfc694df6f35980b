/** Rates and what is counted for them. */
import { describe, expect, it } from 'vitest';
import type { CaptureSink, ScanRequest } from '../../../src/capture/live-capture.js';
import { Coverage, PointClass } from '../../../src/format/commit.js';
import { MeteredSink, MeteredSource, Rates, type Totals } from '../../../src/watch/meter.js';

const S = 1_000_000_000n;
const totals = (): Totals => ({ changedBytes: 0, capturedBytes: 0, storedBytes: 0 });

describe('rates', () => {
  it('are means over the window, and 0 before there is anything to compare', () => {
    const rates = new Rates(10_000);
    expect(rates.of(0)).toBe(0);
    rates.note(0n, [0, 5]);
    expect(rates.of(0)).toBe(0);
    rates.note(2n * S, [200, 5]);
    expect(rates.of(0)).toBe(100);
    expect(rates.of(1)).toBe(0);
    for (let t = 3; t <= 30; t++) rates.note(BigInt(t) * S, [200, 5]);
    expect(rates.of(0)).toBe(0);
    rates.note(31n * S, [1200, 5]);
    expect(rates.of(0)).toBe(100);
  });
});

describe('what passes a sink', () => {
  const request: Omit<ScanRequest, 'onProgress'> = {
    block: 0,
    count: 256,
    sizeBytes: 1 << 20,
    signal: new AbortController().signal,
  };

  it('is counted while a scan goes on, once, however it is told', async () => {
    const t = totals();
    const seqs: number[] = [];
    const told: number[] = [];
    const inner: CaptureSink = {
      commit: () => Promise.reject(new Error('not asked for')),
      scan: ({ onProgress }) => {
        onProgress(4096);
        expect(t.capturedBytes).toBe(4096);
        onProgress(40_960);
        onProgress(8192);
        expect(t.capturedBytes).toBe(40_960);
        return Promise.resolve({ seq: 7, readBytes: 1 << 20, changedBytes: 5, storedBytes: 9 });
      },
    };
    const sink = new MeteredSink(inner, t, (seq) => void seqs.push(seq));
    await sink.scan?.({ ...request, onProgress: (n) => void told.push(n) });
    expect(t).toEqual({ changedBytes: 0, capturedBytes: 1 << 20, storedBytes: 9 });
    expect(seqs).toEqual([7]);
    expect(told).toEqual([4096, 40_960, 8192]);
  });

  it('is not told of a scan that found nothing to commit, nor of a commit that failed', async () => {
    const t = totals();
    const seqs: number[] = [];
    let fails = true;
    const sink = new MeteredSink(
      {
        scan: () =>
          Promise.resolve({ seq: undefined, readBytes: 4096, changedBytes: 0, storedBytes: 0 }),
        commit: () =>
          fails ? Promise.reject(new Error('full')) : Promise.resolve({ seq: 8, storedBytes: 3 }),
      },
      t,
      (seq) => void seqs.push(seq),
    );
    await sink.scan?.({ ...request, count: 1, onProgress: () => undefined });
    expect(seqs).toEqual([]);
    const commit = {
      pointClass: PointClass.crash,
      coverage: Coverage.exact,
      instantNs: 1n,
      startedNs: 1n,
      sizeBytes: 1 << 20,
      content: { blocks: Float64Array.of(1, 2), bytesAt: () => Buffer.alloc(4096) },
    };
    await expect(sink.commit(commit)).rejects.toThrow('full');
    expect(t.storedBytes).toBe(0);
    fails = false;
    expect(await sink.commit(commit)).toEqual({ seq: 8, storedBytes: 3 });
    expect(t).toEqual({ changedBytes: 0, capturedBytes: 3 * 4096, storedBytes: 3 });
    expect(seqs).toEqual([8]);
  });

  it('cannot scan where the sink cannot', () => {
    const sink = new MeteredSink(
      { commit: () => Promise.reject(new Error('not asked for')) },
      totals(),
      () => undefined,
    );
    expect(sink.scan).toBeUndefined();
    expect(sink.memoryBytes).toBe(0);
  });
});

describe('what passes a source', () => {
  it('is counted by blocks, and a poll that failed is remembered', async () => {
    const t = totals();
    let fails = false;
    const source = new MeteredSource(
      {
        kind: 'trace',
        originNs: 5n,
        isTimed: true,
        poll: (sink) => {
          if (fails) return Promise.reject(new Error('interrupted'));
          sink.issued(1, 3, 1, 'write');
          sink.completed(1, 3, 2, 'write');
          return Promise.resolve({ completeToNs: 3, events: 2, more: false, loss: undefined });
        },
        close: () => Promise.resolve(),
      },
      t,
    );
    const seen: string[] = [];
    await source.poll({
      issued: (b, n) => void seen.push(`issued ${b} ${n}`),
      completed: (b, n) => void seen.push(`completed ${b} ${n}`),
    });
    expect(seen).toEqual(['issued 1 3', 'completed 1 3']);
    expect(t.changedBytes).toBe(3 * 4096);
    expect(source.hasFailed).toBe(false);
    fails = true;
    const none = { issued: () => undefined, completed: () => undefined };
    await expect(source.poll(none)).rejects.toThrow('interrupted');
    expect(source.hasFailed).toBe(true);
  });
});
