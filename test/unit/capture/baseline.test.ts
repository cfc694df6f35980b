/** First scans and resyncs: only what differs is stored, points are exact whatever is written meanwhile, and nothing is lost by failures. */
import { describe, expect, it } from 'vitest';
import { Coverage, PointClass } from '../../../src/format/commit.js';
import { systemClock } from '../../../src/clock.js';
import { B2Error } from '../../../src/errors.js';
import { putCondemned } from '../../../src/repo/condemned.js';
import { VolumeHistory } from '../../../src/repo/history.js';
import type { Repository } from '../../../src/repo/repository.js';
import { writeVolumeMeta } from '../../../src/repo/volume.js';
import { VolumeWriter } from '../../../src/repo/volume-writer.js';
import { newModel, seeded, testMeta } from '../../support/model-volume.js';
import { testImage } from '../../support/scan-bed.js';
import { FaultStore } from '../../support/store-fault.js';
import { MemoryStore } from '../../support/store-memory.js';
import {
  BLOCK,
  LoggedDevice,
  imageAt,
  repositorySink,
  scanned,
  sum,
  until,
  withLive,
} from '../../support/live-bed.js';

const MIB = 1024 * 1024;
/** Histories of the random tests; more where somebody asks for them. */
const SEEDS = Number(process.env['B2_TEST_SEEDS'] ?? 3);
const SIZE = 10 * MIB + 3 * BLOCK + 512;

async function repository(seed: number, store: MemoryStore | FaultStore = new MemoryStore()) {
  const { repo, model, writer } = await newModel(store, seeded(seed), { sizeBytes: SIZE });
  await writer.close();
  const volume = async (name: string): Promise<string> => {
    const id = repo.newId();
    await writeVolumeMeta(repo, testMeta(id, SIZE, name));
    return id;
  };
  return { repo, volumeId: model.volumeId, volume, store };
}

function noise(random: () => number, bytes: number): Buffer {
  return Buffer.from(Uint8Array.from({ length: bytes }, () => Math.floor(random() * 256)));
}

/** Random writes of 1 to 6 blocks, some of them of what is there already. */
function scribble(logged: LoggedDevice, random: () => number) {
  const blocks = Math.ceil(logged.bytes.length / BLOCK);
  return (source: Parameters<LoggedDevice['write']>[0], silent = false): void => {
    const block = Math.floor(random() * blocks);
    const count = Math.min(blocks - block, 1 + Math.floor(random() * 6));
    const end = Math.min(logged.bytes.length, (block + count) * BLOCK);
    const length = end - block * BLOCK;
    const kind = random();
    const content =
      kind < 0.2
        ? Buffer.alloc(length)
        : kind < 0.4
          ? Buffer.from(logged.bytes.subarray(block * BLOCK, end))
          : Buffer.alloc(length, `written ${random()} `);
    logged.write(source, block, content, silent);
  };
}

async function storedIn(repo: Repository): Promise<number> {
  let bytes = 0;
  for await (const { sizeBytes } of repo.store.list('packs')) bytes += sizeBytes;
  return bytes;
}

describe('a first scan', () => {
  it('goes on in runs, each durable as no point, and ends in an exact point of an unknown past', async () => {
    const { repo, volumeId } = await repository(1);
    const logged = new LoggedDevice(testImage(1, SIZE));
    const sink = repositorySink(repo, volumeId, logged.device);
    await withLive(logged, sink, {}, async ({ capture, events, points }) => {
      expect(capture.status()).toMatchObject({ needsResync: true, isCaughtUp: false });
      const point = await capture.point();
      expect(point).toMatchObject({ pointClass: PointClass.crash, coverage: Coverage.unknown });
      expect(scanned(events)).toBe(3);
      expect(points).toHaveLength(1);
      expect(sum(events, 'readBytes')).toBeLessThanOrEqual(SIZE);
      expect((await imageAt(repo, volumeId, point.seq)).equals(logged.bytes)).toBe(true);
      const told = events.flatMap((e) => (e.type === 'scan' ? [e.doneBytes] : []));
      expect(told).toEqual(told.toSorted((a, b) => a - b));
      expect(capture.status()).toMatchObject({
        needsResync: false,
        isCaughtUp: true,
        scan: undefined,
      });
    });
    const history = await VolumeHistory.open(repo, volumeId);
    expect(history.tip?.seq).toBeGreaterThanOrEqual(2);
    await history.close();
    await sink.close();
    await repo.close();
  });

  it('stores nothing that another volume holds, and names no zeros', async () => {
    const { repo, volumeId, volume } = await repository(2);
    const bytes = testImage(2, SIZE);
    const first = new LoggedDevice(Buffer.from(bytes));
    const sink = repositorySink(repo, volumeId, first.device);
    await withLive(first, sink, {}, async ({ capture }) => void (await capture.point()));
    await sink.close();
    const before = await storedIn(repo);
    const twin = await volume('host/sdb');
    const second = new LoggedDevice(Buffer.from(bytes));
    const twinSink = repositorySink(repo, twin, second.device);
    await withLive(second, twinSink, {}, async ({ capture, events }) => {
      await capture.point();
      expect(sum(events, 'storedBytes')).toBe(0);
    });
    await twinSink.close();
    expect(await storedIn(repo)).toBeLessThan(before + 64 * 1024);
    expect((await imageAt(repo, twin)).equals(bytes)).toBe(true);
    await repo.close();
  });

  it('of zeros costs one empty commit', async () => {
    const { repo, volumeId } = await repository(3);
    const logged = new LoggedDevice(Buffer.alloc(SIZE));
    const sink = repositorySink(repo, volumeId, logged.device);
    await withLive(logged, sink, {}, async ({ capture }) => {
      expect(await capture.point()).toMatchObject({ seq: 1, blocks: 0 });
    });
    await sink.close();
    expect((await imageAt(repo, volumeId)).equals(logged.bytes)).toBe(true);
    await repo.close();
  });

  it('makes exact points however it is interleaved with writes, losses and spills', async () => {
    let points = 0;
    let rounds = 0;
    for (let seed = 1; seed <= SEEDS; seed++) {
      const random = seeded(seed);
      const { repo, volumeId } = await repository(seed + 100);
      const logged = new LoggedDevice(testImage(seed, SIZE));
      const write = scribble(logged, random);
      const sink = repositorySink(repo, volumeId, logged.device);
      await withLive(
        logged,
        sink,
        { stageBytes: 256 * BLOCK },
        async ({ capture, source, points: made }) => {
          // Reads meet writes before, between and behind them, until a point was long enough in the making.
          let left = 0;
          logged.memory.before = () => {
            if (left > 0 && random() < 0.4) write(source);
            if (left-- > 0 && random() < 0.4) setImmediate(() => write(source));
          };
          let lossesLeft = 2;
          for (let i = 0; i < 6; i++) {
            left = 60;
            await capture.point();
            for (let n = random() * 30; n > 0; n--) write(source);
            if (lossesLeft > 0 && random() < 0.4) {
              lossesLeft--;
              write(source, true);
              source.loss = { reason: 'overrun', message: 'lost some' };
            }
          }
          logged.memory.before = () => undefined;
          const last = await capture.point();
          expect((await imageAt(repo, volumeId, last.seq)).equals(logged.bytes)).toBe(true);
          const origin = Number(source.originNs);
          for (const p of made) {
            logged.check(
              await imageAt(repo, volumeId, p.seq),
              origin + p.instantSourceNs,
              `seed ${seed}, point ${p.seq}`,
            );
            rounds = Math.max(rounds, p.rounds);
          }
          points += made.length;
        },
      );
      await sink.close();
      await repo.close();
    }
    expect(points).toBeGreaterThanOrEqual(SEEDS * 7);
    expect(rounds).toBeGreaterThan(1);
  }, 180_000);
});

describe('a resync', () => {
  it('stores nothing of what is the same, whether it was captured whole or block by block', async () => {
    const { repo, volumeId } = await repository(20);
    const random = seeded(20);
    const logged = new LoggedDevice(testImage(20, SIZE));
    const sink = repositorySink(repo, volumeId, logged.device);
    const write = scribble(logged, random);
    await withLive(logged, sink, {}, async ({ capture, source, events, points }) => {
      await capture.point();
      for (let i = 0; i < 40; i++) {
        write(source);
        if (i % 4 === 0) await capture.point();
      }
      await capture.point();
      events.length = 0;
      source.loss = { reason: 'overrun', message: 'lost some' };
      await until(() => capture.status().losses === 1, 'the loss is seen');
      const after = await capture.point();
      expect(after).toMatchObject({ coverage: Coverage.unknown, blocks: 0 });
      expect(scanned(events)).toBe(3);
      expect(sum(events, 'changedBytes')).toBe(0);
      expect(sum(events, 'storedBytes')).toBe(0);
      expect(sum(events, 'readBytes')).toBeGreaterThan(SIZE / 2);

      // Three blocks changed unseen, in windows of either kind: they and no more are stored.
      events.length = 0;
      for (const block of [5, 900, 2100]) logged.write(source, block, noise(random, BLOCK), true);
      source.loss = { reason: 'overrun', message: 'lost some' };
      await until(() => capture.status().losses === 2, 'the loss is seen');
      const mended = await capture.point();
      expect(sum(events, 'storedBytes')).toBeLessThan(3 * 16_384 + 2048);
      expect(sum(events, 'storedBytes')).toBeGreaterThan(3 * BLOCK);
      expect((await imageAt(repo, volumeId, mended.seq)).equals(logged.bytes)).toBe(true);
      expect(points.at(-1)?.seq).toBe(mended.seq);
    });
    await sink.close();
    await repo.close();
  });

  it('goes on behind what an interrupted one has done', async () => {
    const { repo, volumeId } = await repository(21);
    const logged = new LoggedDevice(noise(seeded(21), SIZE));
    const sink = repositorySink(repo, volumeId, logged.device);
    const first = await withLive(logged, sink, {}, async ({ events }) => {
      await until(() => scanned(events) >= 1, 'a run is done');
    });
    await sink.close();
    const done = sum(first.events, 'storedBytes');
    expect(done).toBeGreaterThan(4 * MIB - 1);
    const again = repositorySink(repo, volumeId, logged.device);
    await withLive(logged, again, {}, async ({ capture, events }) => {
      const point = await capture.point();
      // What was stored of a run that was not finished may be found, too.
      expect(sum(events, 'storedBytes') + done).toBeLessThan(SIZE * 1.03);
      expect((await imageAt(repo, volumeId, point.seq)).equals(logged.bytes)).toBe(true);
    });
    await again.close();
    await repo.close();
  });

  it('comes round to what it had read before track was lost, without starting over', async () => {
    const { repo, volumeId } = await repository(22);
    const random = seeded(22);
    const logged = new LoggedDevice(testImage(22, SIZE));
    const sink = repositorySink(repo, volumeId, logged.device);
    await withLive(logged, sink, {}, async ({ capture, source, events }) => {
      await until(() => scanned(events) >= 1, 'a run is done');
      logged.write(source, 3, noise(random, BLOCK), true);
      source.loss = { reason: 'overrun', message: 'lost some' };
      const point = await capture.point();
      expect(scanned(events)).toBeGreaterThan(3);
      expect(scanned(events)).toBeLessThanOrEqual(5);
      expect((await imageAt(repo, volumeId, point.seq)).equals(logged.bytes)).toBe(true);
    });
    await sink.close();
    await repo.close();
  });

  it('is not undone by what was read before it and not stored yet', async () => {
    const { repo, volumeId } = await repository(24);
    const random = seeded(24);
    const logged = new LoggedDevice(testImage(24, SIZE));
    const sink = repositorySink(repo, volumeId, logged.device);
    await withLive(logged, sink, {}, async ({ capture, source, events }) => {
      await capture.point();
      const count = (type: string): number => events.filter((e) => e.type === type).length;
      // Now and then the loss shows before the block is staged: then there is nothing to store first.
      for (let tries = 1; tries <= 50 && count('spill') === 0; tries++) {
        // Read for a point, then written unseen; that track was lost shows before the point is made.
        logged.memory.before = () => {
          logged.memory.before = () => undefined;
          setImmediate(() => {
            logged.write(source, 700, noise(random, BLOCK), true);
            source.loss = { reason: 'overrun', message: 'lost some' };
          });
        };
        logged.write(source, 700, noise(random, BLOCK));
        const point = await capture.point();
        expect(count('lost')).toBe(tries);
        // Where the point was made before the loss, it is what the device was before the write that nobody saw.
        const image = await imageAt(repo, volumeId, point.seq);
        logged.check(image, point.instantSourceNs + Number(source.originNs), `point ${point.seq}`);
        const after = await capture.point();
        expect((await imageAt(repo, volumeId, after.seq)).equals(logged.bytes)).toBe(true);
      }
      expect(count('spill')).toBeGreaterThan(0);
    });
    await sink.close();
    await repo.close();
  });

  it('follows a device that has another size now', async () => {
    const { repo, volumeId } = await repository(23);
    const random = seeded(23);
    let bytes = testImage(23, SIZE);
    for (const size of [SIZE, SIZE + 6 * MIB + 700, 5 * MIB + 100, 5 * MIB + 300, SIZE]) {
      const next = Buffer.alloc(size);
      bytes.copy(next, 0, 0, Math.min(size, bytes.length));
      if (size > bytes.length) noise(random, 9000).copy(next, size - 9000);
      bytes = next;
      const logged = new LoggedDevice(bytes);
      const write = scribble(logged, random);
      const sink = repositorySink(repo, volumeId, logged.device);
      await withLive(logged, sink, {}, async ({ capture, source }) => {
        for (let i = 0; i < 5; i++) write(source);
        await capture.point();
        for (let i = 0; i < 20; i++) write(source);
        const point = await capture.point();
        expect((await imageAt(repo, volumeId, point.seq)).equals(logged.bytes)).toBe(true);
      });
      await sink.close();
    }
    await repo.close();
  });
});

describe('a scan', () => {
  it('that the repository does not take is tried again, and ends right', async () => {
    let out = false;
    const store = new FaultStore(new MemoryStore(), () =>
      out ? { do: 'io', retryable: true } : undefined,
    );
    const { repo, volumeId } = await repository(30, store);
    const random = seeded(30);
    const logged = new LoggedDevice(testImage(30, SIZE));
    const write = scribble(logged, random);
    const sink = repositorySink(repo, volumeId, logged.device);
    await withLive(logged, sink, {}, async ({ capture, source, events }) => {
      await until(() => scanned(events) >= 1, 'a run is done');
      out = true;
      const outages = (): number => events.filter((e) => e.type === 'outage').length;
      await until(() => outages() >= 3, 'three outages');
      write(source);
      out = false;
      const point = await capture.point();
      expect(events.some((e) => e.type === 'recovered')).toBe(true);
      expect(point.coverage).toBe(Coverage.unknown);
      expect((await imageAt(repo, volumeId, point.seq)).equals(logged.bytes)).toBe(true);
    });
    await sink.close();
    await repo.close();
  });

  it('of a device that cannot be read ends capture, and is no outage', async () => {
    const { repo, volumeId } = await repository(31);
    const logged = new LoggedDevice(testImage(31, SIZE));
    const sink = repositorySink(repo, volumeId, logged.device);
    let isDead = false;
    logged.memory.before = (_what, offset) => {
      isDead ||= offset >= 5 * MIB;
      if (isDead) throw new B2Error('io', 'the medium is bad', { retryable: true });
    };
    await withLive(logged, sink, {}, async ({ capture, events }) => {
      await expect(capture.done).rejects.toThrow('read of /dev/test: the medium is bad');
      expect(events.some((e) => e.type === 'outage')).toBe(false);
    });
    await sink.close();
    await repo.close();
  });

  it('stores anew what prune is about to delete', async () => {
    const { repo, volumeId, volume } = await repository(32);
    const bytes = noise(seeded(32), SIZE);
    const first = new LoggedDevice(Buffer.from(bytes));
    const sink = repositorySink(repo, volumeId, first.device);
    await withLive(first, sink, {}, async ({ capture }) => void (await capture.point()));
    await sink.close();
    const packs: string[] = [];
    for await (const { name } of repo.store.list('packs')) packs.push(name.split('/').at(-1) ?? '');
    const twin = await volume('host/sdb');
    const second = new LoggedDevice(Buffer.from(bytes));
    let condemned: Promise<void> | undefined;
    // Prune comes while the scan is reading.
    second.memory.before = () => {
      condemned ??= putCondemned(repo, {
        id: repo.newId(),
        createdNs: systemClock.nowNs(),
        packs,
        frames: new Map(),
      });
    };
    const twinSink = repositorySink(repo, twin, second.device);
    await withLive(second, twinSink, {}, async ({ capture, events }) => {
      const point = await capture.point();
      await condemned;
      expect(events.some((e) => e.type === 'outage')).toBe(false);
      expect(sum(events, 'storedBytes')).toBeGreaterThan(SIZE);
      for (const pack of packs) await repo.store.delete(`packs/${pack.slice(0, 2)}/${pack}`);
      expect((await imageAt(repo, twin, point.seq)).equals(bytes)).toBe(true);
    });
    await twinSink.close();
    await repo.close();
  }, 180_000);

  it('ends with capture when another writer takes the volume', async () => {
    const { repo, volumeId } = await repository(33);
    const logged = new LoggedDevice(testImage(33, SIZE));
    const sink = repositorySink(repo, volumeId, logged.device);
    await withLive(logged, sink, {}, async ({ capture, events }) => {
      await until(() => scanned(events) >= 1, 'a run is done');
      const other = await VolumeWriter.claim(repo, volumeId);
      await other.history.close();
      await expect(capture.done).rejects.toMatchObject({ kind: 'lost-claim' });
      await other.writer.close();
    });
    await sink.close();
    await repo.close();
  });
});
