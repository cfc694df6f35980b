/**
 * A repository that is slow, full, away or fails now and then: the source is drained all the time, memory stays within its bound,
 * every point is exact, what is not exact is said, and once the repository is back nothing is missing.
 */
import { describe, expect, it } from 'vitest';
import {
  MAX_RETRY_FACTOR,
  captureBytesAtMost,
  type CaptureSink,
} from '../../../src/capture/live-capture.js';
import type { ReadDevice } from '../../../src/devices/device.js';
import { B2Error } from '../../../src/errors.js';
import { Coverage } from '../../../src/format/commit.js';
import {
  BLOCK,
  LoggedDevice,
  imageAt,
  repositorySink,
  until,
  withLive,
  type FakeSource,
} from '../../support/live-bed.js';
import { newModel, seeded } from '../../support/model-volume.js';
import { memoryDevice } from '../../support/device-memory.js';
import { testImage } from '../../support/scan-bed.js';
import { FaultStore, type Fault, type FaultCall } from '../../support/store-fault.js';
import { MemoryStore } from '../../support/store-memory.js';

const MIB = 1024 * 1024;
const SIZE = 6 * MIB + 700;

type Rule = (call: FaultCall) => Fault | undefined;

/** Runs `use` with a capture whose repository fails as the current rule says; at the end the repository works, and all must be right. */
async function withFaults(
  seed: number,
  options: Parameters<typeof withLive>[2],
  use: (bed: {
    set(rule: Rule | undefined): void;
    write(n?: number): void;
    readonly live: Parameters<Parameters<typeof withLive>[3]>[0];
  }) => Promise<void>,
): Promise<void> {
  let rule: Rule | undefined;
  const random = seeded(seed);
  const store = new FaultStore(new MemoryStore(), (call) => rule?.(call));
  const { repo, model, writer } = await newModel(store, random, { sizeBytes: SIZE });
  await writer.close();
  const { volumeId } = model;
  const logged = new LoggedDevice(testImage(seed, SIZE));
  const sink = repositorySink(repo, volumeId, logged.device);
  const blocks = Math.ceil(SIZE / BLOCK);
  await withLive(logged, sink, options, async (live) => {
    const source: FakeSource = live.source;
    const write = (n = 1): void => {
      for (let i = 0; i < n; i++) {
        const block = Math.floor(random() * blocks);
        const length = Math.min(BLOCK, SIZE - block * BLOCK);
        logged.write(source, block, Buffer.alloc(length, `written ${random()} `));
      }
    };
    await live.capture.point();
    await use({
      set: (r) => {
        rule = r;
      },
      write,
      live,
    });
    rule = undefined;
    const last = await live.capture.point();
    expect((await imageAt(repo, volumeId, last.seq)).equals(logged.bytes)).toBe(true);
    const origin = Number(source.originNs);
    for (const p of live.points.slice(-6))
      logged.check(
        await imageAt(repo, volumeId, p.seq),
        origin + p.instantSourceNs,
        `seed ${seed}, point ${p.seq}`,
      );
    expect(live.capture.status()).toMatchObject({ outage: undefined, losses: 0 });
    if (options.intervalMs !== undefined) return;
    write();
    expect((await live.capture.point()).coverage).toBe(Coverage.exact);
  });
  await sink.close();
  await repo.close();
}

const outages = (bed: { readonly events: readonly { readonly type: string }[] }): number =>
  bed.events.filter((e) => e.type === 'outage').length;

describe('a repository', () => {
  for (const [what, rule] of [
    [
      'that is full',
      ({ kind }) => (kind === 'append' || kind === 'put' ? { do: 'no-space' } : undefined),
    ],
    ['that is away', () => ({ do: 'io', retryable: false })],
    ['that loses its answers', ({ kind }) => (kind === 'sync' ? { do: 'lose-answer' } : undefined)],
    [
      'whose packs cannot be synced',
      ({ kind }) => (kind === 'sync' ? { do: 'io', retryable: true } : undefined),
    ],
  ] satisfies readonly (readonly [string, Rule])[])
    it(`${what} for a while costs exactness and nothing else`, async () => {
      await withFaults(
        1,
        { stageBytes: 300 * BLOCK, maxSlots: 4096 },
        async ({ set, write, live }) => {
          for (let round = 0; round < 2; round++) {
            const before = outages(live);
            set(rule);
            write(200);
            const asked = live.capture.point();
            for (let i = 0; outages(live) < before + 3; i++) {
              expect(i).toBeLessThan(10_000);
              write(20);
              const { events } = live.capture.status();
              await until(() => live.capture.status().events > events, 'events are read on');
            }
            expect(live.capture.status().outage).toBeDefined();
            expect(live.capture.status().isCaughtUp).toBe(false);
            set(undefined);
            expect((await asked).coverage).toBe(Coverage.coalesced);
            expect(live.events.at(-1)?.type).toBe('point');
          }
          expect(live.events.filter((e) => e.type === 'recovered')).toHaveLength(2);
        },
      );
    });

  it('that hangs in the middle of a commit does not keep events from being read', async () => {
    await withFaults(2, { stageBytes: 300 * BLOCK }, async ({ set, write, live }) => {
      let release = (): void => undefined;
      const hung = new Promise<void>((resolve) => {
        release = resolve;
      });
      set(({ kind }) => (kind === 'sync' ? { do: 'wait', until: () => hung } : undefined));
      write(20);
      const asked = live.capture.point();
      for (let i = 0; i < 50; i++) {
        write(20);
        const { events } = live.capture.status();
        await until(() => live.capture.status().events > events, 'events are read on');
      }
      expect(live.points).toHaveLength(1);
      expect(live.capture.status().lagMs).toBeGreaterThan(0);
      set(undefined);
      release();
      await asked;
      expect(outages(live)).toBe(0);
    });
  });

  it('slower than the writes gets fewer points, all of them exact in what they hold', async () => {
    await withFaults(
      3,
      { intervalMs: 2, stageBytes: 300 * BLOCK },
      async ({ set, write, live }) => {
        let waits = 0;
        set(({ kind }) =>
          kind === 'sync'
            ? {
                do: 'wait',
                until: async () => {
                  waits++;
                  // Far longer than the interval, in which far more is written.
                  for (let i = 0; i < 20; i++) {
                    write(2);
                    await new Promise((resolve) => setTimeout(resolve, 1));
                  }
                },
              }
            : undefined,
        );
        write(10);
        await until(() => live.points.length >= 12, 'points');
        expect(waits).toBeGreaterThan(10);
        const late = live.points.slice(2).filter((p) => p.coverage === Coverage.coalesced);
        expect(late.length).toBeGreaterThan(0);
      },
    );
  });

  it('that fails now and then, at any call, in the end holds everything', async () => {
    for (let seed = 10; seed < 13; seed++) {
      const dice = seeded(seed * 7);
      await withFaults(
        seed,
        { intervalMs: 3, stageBytes: 300 * BLOCK },
        async ({ set, write, live }) => {
          set(() => {
            if (dice() > 0.04) return undefined;
            const kinds: Fault[] = [
              { do: 'io', retryable: true },
              { do: 'no-space' },
              { do: 'lose-answer' },
              { do: 'partial' },
            ];
            return kinds[Math.floor(dice() * kinds.length)];
          });
          const target = live.points.length + 12;
          for (let i = 0; live.points.length < target; i++) {
            expect(i).toBeLessThan(20_000);
            write(5);
            await new Promise((resolve) => setTimeout(resolve, 1));
          }
          expect(outages(live)).toBeGreaterThan(0);
        },
      );
    }
  }, 180_000);

  it('that stays away is asked less and less often', async () => {
    let asked = 0;
    const memory = memoryDevice(Buffer.alloc(10 * BLOCK));
    const sink: CaptureSink = {
      prepare: () => {
        asked++;
        return Promise.reject(new B2Error('io', 'it is away'));
      },
      commit: () => Promise.reject(new B2Error('io', 'it is away')),
    };
    const device = {
      device: {
        ...memory,
        dataRanges: () => Promise.resolve([]),
        refresh: () => Promise.resolve(memory.facts),
      },
    };
    await withLive(device, sink, { retryMs: 1 }, async ({ capture, events }) => {
      await until(() => outages({ events }) >= 7, 'outages');
      expect(asked).toBe(outages({ events }) - 1);
      expect(memory.reads).toBeLessThan(5);
      expect(MAX_RETRY_FACTOR).toBeLessThanOrEqual(16);
      expect(capture.status().outage?.message).toBe('it is away');
    });
  });
});

describe('memory', () => {
  it('stays within its stated bound when more blocks change than it could remember one by one', async () => {
    const TIB = 1024 ** 4;
    const facts = { ...memoryDevice(Buffer.alloc(0)).facts, sizeBytes: TIB };
    let reads = 0;
    const device: ReadDevice = {
      facts,
      read: (into) => {
        reads++;
        return Promise.resolve(into.byteLength);
      },
      dataRanges: () => Promise.resolve([]),
      refresh: () => Promise.resolve(facts),
      close: () => Promise.resolve(),
    };
    const away = new B2Error('no-space', 'the repository is full');
    const sink: CaptureSink = {
      prepare: () => Promise.reject(away),
      commit: () => Promise.reject(away),
    };
    // 32 MiB of it only where all of the device cannot be read.
    expect(captureBytesAtMost(TIB)).toBeLessThan(332 * MIB);
    const maxSlots = 1 << 20;
    const bound = captureBytesAtMost(TIB, { maxSlots });
    const before = process.memoryUsage().arrayBuffers;
    await withLive({ device }, sink, { isInSync: true, maxSlots }, async ({ capture, source }) => {
      const random = seeded(5);
      let most = 0;
      for (let i = 0; i < 80; i++) {
        const blocks = Float64Array.from({ length: 10_000 }, () =>
          Math.floor(random() * (TIB / BLOCK)),
        );
        source.burst(blocks);
        const { events } = capture.status();
        await until(() => capture.status().events > events, 'events are read');
        most = Math.max(most, capture.status().memoryBytes);
        expect(process.memoryUsage().arrayBuffers - before).toBeLessThan(2 * bound);
      }
      const status = capture.status();
      expect(status.pendingBlocks).toBeGreaterThan(780_000);
      expect(most).toBeLessThanOrEqual(bound);
      expect(most).toBeGreaterThan(60 * MIB);
      expect(status.outage?.kind).toBe('no-space');
      // Nothing is read for a repository that takes nothing.
      expect(reads).toBeLessThan(10_000);
    });
  }, 180_000);
});
