/**
 * What every {@link ChangeSource} must do (src/devices/change-source.ts), on a real device. The bed makes a device and writes to
 * it as a program would: when `write` resolves the device has acknowledged.
 */
import { afterEach, beforeEach, expect } from 'vitest';
import type {
  ChangeKind,
  ChangeSink,
  ChangeSource,
  Poll,
} from '../../src/devices/change-source.js';
import type { Required } from './requires.js';

export interface SourceBed {
  readonly sizeBytes: number;
  /** A new watch; the suite closes it. */
  open(): Promise<ChangeSource>;
  /** Writes other bytes than are there, acknowledged when it resolves. Offsets and lengths are multiples of `unitBytes`. */
  write(offset: number, bytes: number): Promise<void>;
  /** Writes to the same disk outside the device, where there is such a place. */
  readonly writeOutside?: () => Promise<void>;
  readonly unitBytes: number;
  /** Zeroes or discards a range as the block layer does, where the device can. */
  readonly change?: (kind: 'discard' | 'zeroes', offset: number, bytes: number) => Promise<void>;
  /** True if nothing of a closed watch is left in the system. */
  readonly isClean?: () => boolean;
  remove(): Promise<void>;
}

interface Seen {
  readonly what: 'issued' | 'completed';
  readonly block: number;
  readonly count: number;
  readonly atNs: number;
  readonly kind: ChangeKind;
}

class Recorder implements ChangeSink {
  readonly seen: Seen[] = [];

  issued(block: number, count: number, atNs: number, kind: ChangeKind): void {
    this.seen.push({ what: 'issued', block, count, atNs, kind });
  }

  completed(block: number, count: number, atNs: number, kind: ChangeKind): void {
    this.seen.push({ what: 'completed', block, count, atNs, kind });
  }

  of(what: Seen['what'], block: number): Seen[] {
    return this.seen.filter(
      (s) => s.what === what && s.block <= block && block < s.block + s.count,
    );
  }
}

const BLOCK = 4096;

/** `blockBytes`: what a change is told in, at least (the window of a scan). */
export function changeSourceSuite(
  name: string,
  required: Required,
  make: () => Promise<SourceBed>,
  options: { readonly windowBytes: number; readonly kinds: boolean },
): void {
  required.describe(name, () => {
    const { it } = required;
    let bed: SourceBed;
    let source: ChangeSource;
    const now = (): number => Number(process.hrtime.bigint() - source.originNs);

    beforeEach(async () => {
      bed = await make();
      source = await bed.open();
    });
    afterEach(async () => {
      await source.close();
      await bed.remove();
    });

    /** Polls until everything before `sinceNs` is told. */
    async function drain(sink: ChangeSink, sinceNs = now(), maxEvents?: number): Promise<Poll[]> {
      const polls: Poll[] = [];
      for (let i = 0; i < 2000; i++) {
        const poll = await source.poll(sink, {
          certain: true,
          ...(maxEvents === undefined ? {} : { maxEvents }),
        });
        polls.push(poll);
        if (poll.completeToNs >= sinceNs) return polls;
        if (!poll.more) await new Promise((resolve) => setTimeout(resolve, 5));
      }
      throw new Error('the source does not come to the present');
    }

    it('says that nothing changed where nothing was written, and for which time', async () => {
      const sink = new Recorder();
      const polls = await drain(sink);
      expect(sink.seen).toEqual([]);
      expect(polls.every((p) => p.loss === undefined)).toBe(true);
    });

    it('tells every acknowledged write before it says that time has passed, with times around it', async () => {
      const sink = new Recorder();
      await drain(sink);
      const places = [0, 8 * BLOCK, 8 * BLOCK, bed.sizeBytes - BLOCK, 100 * BLOCK];
      const times: { block: number; before: number; after: number }[] = [];
      for (const offset of places) {
        const before = now();
        await bed.write(offset, BLOCK);
        times.push({ block: offset / BLOCK, before, after: now() });
      }
      const polls = await drain(sink);
      expect(polls.every((p) => p.loss === undefined)).toBe(true);
      for (const t of times) {
        const done = sink.of('completed', t.block);
        expect(done.length).toBeGreaterThan(0);
        // Too cautious is allowed: a completion may be told earlier, an issue later, than it was.
        expect(done.some((s) => s.atNs <= t.after)).toBe(true);
        expect(sink.of('issued', t.block).some((s) => s.atNs >= t.before)).toBe(true);
        if (source.isTimed) {
          expect(done.some((s) => s.atNs >= t.before && s.atNs <= t.after)).toBe(true);
          expect(
            sink.of('issued', t.block).some((s) => s.atNs >= t.before && s.atNs <= t.after),
          ).toBe(true);
        }
      }
      const touched = new Set(
        times.map((t) => Math.floor((t.block * BLOCK) / options.windowBytes)),
      );
      for (const s of sink.seen)
        for (let b = s.block; b < s.block + s.count; b++)
          expect(touched.has(Math.floor((b * BLOCK) / options.windowBytes))).toBe(true);
    });

    it('tells a write once', async () => {
      await bed.write(16 * BLOCK, 4 * BLOCK);
      const first = new Recorder();
      await drain(first);
      for (let b = 16; b < 20; b++) expect(first.of('completed', b).length).toBeGreaterThan(0);
      const second = new Recorder();
      await drain(second);
      expect(second.seen).toEqual([]);
    });

    it('tells the block of a write that is smaller, and all blocks of one that is long', async () => {
      const sink = new Recorder();
      await bed.write(5 * BLOCK + BLOCK - bed.unitBytes, bed.unitBytes);
      await bed.write(64 * BLOCK - bed.unitBytes, 3 * BLOCK + bed.unitBytes);
      await bed.write(1024 * BLOCK, 300 * BLOCK);
      await drain(sink);
      for (const b of [5, 63, 64, 65, 66, ...Array.from({ length: 300 }, (_, i) => 1024 + i)]) {
        expect(sink.of('issued', b).length).toBeGreaterThan(0);
        expect(sink.of('completed', b).length).toBeGreaterThan(0);
      }
    });

    it('loses nothing where polls may do little at a time', async () => {
      const blocks = Array.from({ length: 400 }, (_, i) => i * 17);
      const sink = new Recorder();
      for (const b of blocks) await bed.write(b * BLOCK, BLOCK);
      const polls = await drain(sink, now(), 10);
      if (source.isTimed) expect(polls.some((p) => p.more)).toBe(true);
      for (const b of blocks) expect(sink.of('completed', b).length).toBeGreaterThan(0);
      const times = polls.map((p) => p.completeToNs);
      expect(times).toEqual([...times].sort((a, b) => a - b));
    });

    it('does not tell what lies outside the device', async () => {
      if (bed.writeOutside === undefined) return;
      await bed.writeOutside();
      const sink = new Recorder();
      await drain(sink);
      expect(sink.seen).toEqual([]);
    });

    it('tells discards and write-zeroes, and which they are where it knows', async () => {
      if (bed.change === undefined) return;
      await bed.write(0, 64 * BLOCK);
      await drain(new Recorder());
      for (const kind of ['discard', 'zeroes'] as const) {
        const sink = new Recorder();
        const at = kind === 'discard' ? 0 : 32;
        await bed.change(kind, at * BLOCK, 16 * BLOCK);
        await drain(sink);
        for (let b = at; b < at + 16; b++) {
          const done = sink.of('completed', b);
          expect(done.length).toBeGreaterThan(0);
          if (options.kinds) expect(done.map((s) => s.kind)).toContain(kind);
        }
      }
    });

    it('leaves nothing behind, and closes twice', async () => {
      await source.close();
      await source.close();
      expect(bed.isClean?.() ?? true).toBe(true);
      await expect(source.poll(new Recorder())).rejects.toThrow('closed');
    });
  });
}
