import { writeFileSync } from 'node:fs';
import { describe, expect, onTestFinished, test, vi } from 'vitest';

import { takeSnapshot } from '../../../src/capture/snapshot.js';
import { systemClock, systemRandom } from '../../../src/clock.js';
import { B2Error, isKind } from '../../../src/errors.js';
import type { FooterFrame } from '../../../src/format/pack.js';
import { packName } from '../../../src/format/names.js';
import { currentIdentity } from '../../../src/process-identity.js';
import { DecodePool, type FrameDecoder } from '../../../src/repo/decode-pool.js';
import { FrameReader } from '../../../src/repo/decode-worker.js';
import { VolumeHistory } from '../../../src/repo/history.js';
import { PackCache } from '../../../src/repo/pack-reader.js';
import { allowReadAhead, openImage } from '../../../src/repo/point.js';
import { ReadAhead } from '../../../src/repo/read-ahead.js';
import type { RepositoryImage } from '../../../src/repo/repository-image.js';
import { Repository } from '../../../src/repo/repository.js';
import { openDirectoryStore } from '../../../src/repo/store-directory.js';
import { openStore } from '../../../src/repo/store-url.js';
import { listVolumes } from '../../../src/repo/volume.js';
import { prune } from '../../../src/retention/prune.js';
import { dice, noise } from '../../support/disks.js';
import { imageOf, makePackImage, type PackImage } from '../../support/pack-image.js';
import { MemoryStore } from '../../support/store-memory.js';
import { tempDir } from '../../support/tmp.js';

const CHUNK = 65_536;

/** Decodes in this thread, as slowly and as much out of order as the dice want; checks what is done with the slots. */
class TestDecoder implements FrameDecoder {
  readonly slots: readonly Buffer[];
  ready = true;
  /** What `decode` answers instead of working. */
  refuses = false;
  calls = 0;
  mostAtOnce = 0;
  isClosed = false;
  readonly #reader: FrameReader;
  readonly #roll: (n: number) => number;
  readonly #busy = new Set<number>();
  #turn: Promise<unknown> = Promise.resolve();
  #under = 0;

  constructor(made: PackImage, slots: number, seed: number) {
    const slab = new ArrayBuffer(slots * CHUNK);
    this.slots = Array.from({ length: slots }, (_, i) => Buffer.from(slab, i * CHUNK, CHUNK));
    this.#reader = new FrameReader(made.context, slab, CHUNK);
    this.#roll = dice(seed);
  }

  isReady(): boolean {
    return this.ready;
  }

  async decode(
    packId: string,
    frames: readonly FooterFrame[],
    slots: readonly number[],
  ): Promise<readonly boolean[]> {
    this.calls++;
    for (const slot of slots) {
      if (this.#busy.has(slot)) throw new Error(`slot ${slot} is decoded into twice at a time`);
      this.#busy.add(slot);
    }
    this.#under += slots.length;
    this.mostAtOnce = Math.max(this.mostAtOnce, this.#under);
    for (let i = this.#roll(4); i > 0; i--) await new Promise((resolve) => setImmediate(resolve));
    const work = this.#turn.then(() =>
      this.refuses ? frames.map(() => false) : this.#reader.decode(packId, frames, slots),
    );
    this.#turn = work;
    const good = await work;
    for (let i = this.#roll(3); i > 0; i--) await new Promise((resolve) => setImmediate(resolve));
    for (const slot of slots) this.#busy.delete(slot);
    this.#under -= slots.length;
    return good;
  }

  async close(): Promise<void> {
    this.isClosed = true;
    await this.#turn;
    await this.#reader.close();
  }
}

interface Bed {
  readonly made: PackImage;
  readonly store: MemoryStore;
  readonly decoder: TestDecoder;
  readonly ahead: ReadAhead;
  readonly packs: PackCache;
  readonly image: RepositoryImage;
}

async function bed(options: { seed?: number; slots?: number; encrypted?: boolean }): Promise<Bed> {
  const { seed = 1, slots = 64, encrypted = true } = options;
  const store = new MemoryStore({ record: false });
  const made = await makePackImage({ store, seed, sizeBytes: 12 * 1024 * 1024 - 700, encrypted });
  const packs = new PackCache(made.context);
  const decoder = new TestDecoder(made, slots, seed);
  const ahead = new ReadAhead({ packs, decoder });
  packs.allowReadAhead(() => Promise.resolve(ahead));
  packs.readAhead(true);
  await new Promise((resolve) => setImmediate(resolve));
  const image = imageOf(made, packs);
  onTestFinished(() => image.close());
  return { made, store, decoder, ahead, packs, image };
}

async function checkRead(b: Bed, offset: number, length: number): Promise<void> {
  const wanted = Math.min(length, b.made.expected.length - offset);
  const into = Buffer.alloc(wanted, 0xee);
  await b.image.read(into, offset);
  if (!into.equals(b.made.expected.subarray(offset, offset + wanted)))
    throw new Error(`other bytes at ${offset}+${wanted}`);
}

/** Every slot is free, or an entry that can make room. */
function expectNothingHeld(b: Bed): void {
  const { entries, free, waiting, lent } = b.ahead.held;
  expect({ waiting, lent, slots: entries + free }).toEqual({
    waiting: 0,
    lent: 0,
    slots: b.decoder.slots.length,
  });
}

async function quiet(b: Bed): Promise<void> {
  for (let i = 0; i < 50; i++) await new Promise((resolve) => setImmediate(resolve));
  void b;
}

describe('images that are read with threads', () => {
  test.each([
    [1, 64, true],
    [2, 8, true],
    [3, 5, false],
    [4, 16, false],
  ])('are what they are (seed %i, %i slots, encrypted: %s)', async (seed, slots, encrypted) => {
    const b = await bed({ seed, slots, encrypted });
    const size = b.made.expected.length;
    for (const step of [1024 * 1024, 128 * 1024, 300_001])
      for (let at = 0; at < size; at += step) await checkRead(b, at, step);
    const roll = dice(seed);
    // Many at a time, some of them on and on, more than there are slots for.
    await Promise.all(
      Array.from({ length: 24 }, async () => {
        let at = roll(size);
        for (let i = 0; i < 12; i++) {
          const length = 1 + roll(900_000);
          await checkRead(b, at, length);
          at = roll(3) === 0 ? roll(size) : Math.min(size - 1, at + length);
        }
      }),
    );
    await quiet(b);
    expectNothingHeld(b);
    if (slots >= 8) expect(b.decoder.calls).toBeGreaterThan(10);
    expect(b.decoder.mostAtOnce).toBeLessThanOrEqual(slots);
  });

  test('are lent as they are, and nothing changes while it is lent', async () => {
    const b = await bed({ seed: 6, slots: 96 });
    const size = b.made.expected.length;
    let lent = 0;
    for (let round = 0; round < 3; round++) {
      for (let at = 0; at + 512 * 1024 <= size; at += 512 * 1024) {
        const loan = await b.image.lend(at, 512 * 1024);
        await Promise.all([checkRead(b, 0, 1024 * 1024), checkRead(b, at, 700_000)]);
        if (loan === undefined) continue;
        lent++;
        const got = Buffer.concat(loan.views);
        expect(got.equals(b.made.expected.subarray(at, at + 512 * 1024))).toBe(true);
        loan.release();
        loan.release();
      }
    }
    expect(lent).toBeGreaterThan(0);
    await quiet(b);
    expectNothingHeld(b);
  });

  test('are read on while somebody does not give back what was lent', async () => {
    const b = await bed({ seed: 6, slots: 32 });
    const loans = [];
    for (let at = 0; at + 256 * 1024 <= b.made.expected.length; at += 256 * 1024)
      loans.push(await b.image.lend(at, 256 * 1024));
    expect(b.ahead.held.lent).toBeLessThanOrEqual(16);
    for (let at = 0; at < b.made.expected.length; at += 1024 * 1024)
      await checkRead(b, at, 1024 * 1024);
    for (const loan of loans) loan?.release();
    await quiet(b);
    expectNothingHeld(b);
  });

  test('reject where data is damaged, naming it, and nowhere else', async () => {
    const b = await bed({ seed: 8 });
    const pack = await b.packs.use(b.made.packIds[1] ?? '', (p) => Promise.resolve(p.footer));
    const frame = pack.frames.find((f) => f.count === 1 && f.type === 1);
    if (frame === undefined) throw new Error('no frame of one chunk');
    const packId = b.made.packIds[1] ?? '';
    const bytes = Buffer.from(await b.store.get(packName(packId)));
    bytes.writeUInt8(bytes.readUInt8(frame.offset + 200) ^ 4, frame.offset + 200);
    await b.store.put(packName(packId), bytes);
    b.packs.forget(packId);
    const where = b.made.extents.filter((e) => {
      const chunks = Math.max(1, Math.ceil((e.skip + e.count) / 16));
      const isRun = e.skip + e.count > 16;
      return (
        e.packId === packId &&
        e.frame <= frame.number &&
        frame.number < e.frame + (isRun ? chunks : 1)
      );
    });
    expect(where.length).toBeGreaterThan(0);
    let failed = 0;
    for (let at = 0; at < b.made.expected.length; at += 512 * 1024) {
      try {
        await checkRead(b, at, 512 * 1024);
      } catch (error) {
        expect(isKind(error, 'damaged')).toBe(true);
        expect(String(error)).toContain(`pack ${packId}, frame ${frame.number}`);
        expect(
          where.some((e) => e.block * 4096 < at + 512 * 1024 && (e.block + e.count) * 4096 > at),
        ).toBe(true);
        failed++;
      }
    }
    expect(failed).toBeGreaterThan(0);
    await quiet(b);
    expectNothingHeld(b);
  });

  test('are read again when the disk of the repository has come back, with or without threads', async () => {
    const b = await bed({ seed: 12 });
    const [a, c] = [b.store.open.bind(b.store), { isGone: false, opened: 0 }];
    // What was open when it was pulled out fails for ever; what is opened later does not.
    b.store.open = async (name) => {
      if (c.isGone) throw new B2Error('io', 'the disk is gone');
      const mine = ++c.opened;
      const reader = await a(name);
      return {
        sizeBytes: reader.sizeBytes,
        read: (into, offset) =>
          c.isGone || mine <= lost
            ? Promise.reject(new B2Error('io', 'EIO'))
            : reader.read(into, offset),
        close: () => reader.close(),
      };
    };
    let lost = 0;
    for (const step of [1024 * 1024, 16 * 1024]) {
      await checkRead(b, 0, 8 * 1024 * 1024);
      c.isGone = true;
      await expect(checkRead(b, 9 * 1024 * 1024, 2 * 1024 * 1024)).rejects.toThrow(B2Error);
      c.isGone = false;
      lost = c.opened;
      for (let at = 0; at < b.made.expected.length; at += step) await checkRead(b, at, step);
    }
    await quiet(b);
    expectNothingHeld(b);
  });

  test('are read in the ordinary way where threads deliver nothing', async () => {
    const b = await bed({ seed: 9 });
    b.decoder.refuses = true;
    for (let at = 0; at < b.made.expected.length; at += 1024 * 1024)
      await checkRead(b, at, 1024 * 1024);
    expect(await b.image.lend(0, 1024 * 1024)).toBeUndefined();
    expect(b.decoder.calls).toBeGreaterThan(5);
    await quiet(b);
    expectNothingHeld(b);
  });

  test('are read while it is closed', async () => {
    const b = await bed({ seed: 10, slots: 16 });
    const reads = Array.from({ length: 12 }, (_, i) => checkRead(b, i * 700_000, 900_000));
    const loan = Promise.resolve(b.image.lend(0, 512 * 1024)).then((l) => l?.release());
    await Promise.resolve();
    await b.ahead.close();
    await Promise.all([...reads, loan]);
    expect(b.decoder.isClosed).toBe(true);
    const { calls } = b.decoder;
    await checkRead(b, 0, 1024 * 1024);
    expect(b.decoder.calls).toBe(calls);
    await quiet(b);
    expectNothingHeld(b);
  });

  test('are not asked of threads for a small read somewhere', async () => {
    const b = await bed({ seed: 11 });
    const roll = dice(4);
    for (let i = 0; i < 40; i++) await checkRead(b, roll(11) * 1024 * 1024, 4096);
    expect(b.decoder.calls).toBe(0);
  });
});

describe('threads that decode', () => {
  async function inDirectory(seed: number): Promise<PackImage & { readonly url: string }> {
    const dir = tempDir();
    onTestFinished(() => dir.remove());
    const url = dir.path;
    const store = await openStore(url);
    onTestFinished(() => store.close());
    return {
      ...(await makePackImage({ store, seed, sizeBytes: 6 * 1024 * 1024, storeUrl: url })),
      url,
    };
  }

  async function readAll(made: PackImage, packs: PackCache): Promise<void> {
    const image = imageOf(made, packs);
    for (let at = 0; at < made.expected.length; at += 1024 * 1024) {
      const into = Buffer.alloc(Math.min(1024 * 1024, made.expected.length - at));
      await image.read(into, at);
      expect(into.equals(made.expected.subarray(at, at + into.length))).toBe(true);
    }
  }

  test('deliver what is there, and end', async () => {
    const made = await inDirectory(21);
    const packs = new PackCache(made.context);
    const pool = new DecodePool({ handle: made.handle, slabBytes: 32 * CHUNK, threads: 2 });
    const ahead = new ReadAhead({ packs, decoder: pool });
    packs.allowReadAhead(() => Promise.resolve(ahead));
    while (packs.readAhead(true) === undefined)
      await new Promise((resolve) => setTimeout(resolve, 5));
    const packId = made.packIds[0] ?? '';
    const frames = await packs.use(packId, (p) => Promise.resolve(p.footer.frames));
    const index = frames.findIndex((f) => f.count === 1 && f.type === 1);
    const frame = frames[index];
    if (frame === undefined) throw new Error('no frame of one chunk');
    expect(await pool.decode(packId, [frame], [3])).toEqual([true]);
    const { body } = await packs.chunksOf(packId, frame.number);
    expect(pool.slots[3]?.subarray(0, body.length).equals(body)).toBe(true);
    // Not what the footer says, and a pack that is not there.
    expect(await pool.decode(packId, [{ ...frame, number: 77 }, frame], [4, 5])).toEqual([
      false,
      true,
    ]);
    expect(await pool.decode('ab'.repeat(16), [frame], [3])).toEqual([false]);
    await readAll(made, packs);
    const under = pool.decode(packId, [frame], [3]);
    await packs.close();
    expect((await under).length).toBe(1);
    expect(pool.isReady()).toBe(false);
    expect(await pool.decode(packId, [frame], [3])).toEqual([false]);
  });

  test('that die are told of once, and nobody waits for them', async () => {
    const made = await inDirectory(22);
    const packs = new PackCache(made.context);
    const failures: unknown[] = [];
    const pool = new DecodePool({
      handle: { ...made.handle, storeUrl: `${made.url}/not-there` },
      slabBytes: 32 * CHUNK,
      threads: 2,
      failed: (error) => failures.push(error),
    });
    packs.allowReadAhead(() => Promise.resolve(new ReadAhead({ packs, decoder: pool })));
    expect(packs.readAhead(true)).toBeUndefined();
    while (failures.length === 0) await new Promise((resolve) => setTimeout(resolve, 5));
    expect(packs.readAhead(true)).toBeUndefined();
    await readAll(made, packs);
    await packs.close();
    expect(failures).toHaveLength(1);
  });

  function dyingDecoder(how: string): URL {
    vi.stubEnv('B2_TEST_DECODER', how);
    onTestFinished(() => {
      vi.unstubAllEnvs();
    });
    return new URL('../../support/dying-decoder.js', import.meta.url);
  }

  test.each(['exit', 'throw'])(
    'that die with chunks half decoded (%s) are told of once; every read is answered, and right',
    async (how) => {
      const made = await inDirectory(23);
      const packs = new PackCache(made.context);
      const failures: unknown[] = [];
      const pool = new DecodePool({
        handle: made.handle,
        slabBytes: 64 * CHUNK,
        threads: 2,
        module: dyingDecoder(how),
        failed: (error) => failures.push(error),
      });
      const ahead = new ReadAhead({ packs, decoder: pool });
      packs.allowReadAhead(() => Promise.resolve(ahead));
      while (packs.readAhead(true) === undefined)
        await new Promise((resolve) => setTimeout(resolve, 5));
      const image = imageOf(made, packs);
      const size = made.expected.length;
      const step = 256 * 1024;
      const check = (bytes: Buffer, at: number): void => {
        if (!bytes.equals(made.expected.subarray(at, at + bytes.length)))
          throw new Error(`other bytes at ${at}`);
      };
      // More than the threads do before they die, all of it under way when they do.
      await Promise.all(
        Array.from({ length: Math.floor(size / step) }, async (_, i) => {
          const at = i * step;
          const loan = await image.lend(at, step);
          if (loan !== undefined) {
            check(Buffer.concat(loan.views), at);
            loan.release();
          }
          const into = Buffer.alloc(step, 0xee);
          await image.read(into, at);
          check(into, at);
        }),
      );
      while (failures.length === 0) await new Promise((resolve) => setTimeout(resolve, 5));
      expect(failures).toHaveLength(1);
      expect(pool.isReady()).toBe(false);
      await readAll(made, packs);
      await image.close();
      const { entries, free, waiting, lent } = ahead.held;
      expect({ waiting, lent, slots: entries + free }).toEqual({ waiting: 0, lent: 0, slots: 64 });
      await packs.close();
      expect(failures).toHaveLength(1);
    },
  );

  test('are waited for where one is slow, and close meanwhile', async () => {
    const made = await inDirectory(24);
    const packs = new PackCache(made.context);
    const pool = new DecodePool({
      handle: made.handle,
      slabBytes: 64 * CHUNK,
      threads: 2,
      module: dyingDecoder('hang'),
    });
    const ahead = new ReadAhead({ packs, decoder: pool });
    packs.allowReadAhead(() => Promise.resolve(ahead));
    while (packs.readAhead(true) === undefined)
      await new Promise((resolve) => setTimeout(resolve, 5));
    await readAll(made, packs);
    const reading = readAll(made, packs);
    await packs.close();
    await reading;
  });
});

describe('a pack that is compacted, and one that is deleted, while its image is read ahead', () => {
  test('change nothing that is read', { timeout: 60_000 }, async () => {
    await using dir = tempDir();
    const env = { clock: systemClock, random: systemRandom, owner: currentIdentity() };
    const url = dir.join('repo');
    const parameters = { encryption: 'none', chunkBytes: CHUNK, packBytes: 1024 * 1024 } as const;
    const store = await openDirectoryStore(url, { create: true });
    await using repo = await Repository.init(store, parameters, undefined, env);
    const chunks = 224;
    const bytes = noise(31, chunks * CHUNK);
    const snapshot = async (volume: string): Promise<void> => {
      const file = dir.join('image');
      writeFileSync(file, bytes);
      await takeSnapshot(repo, {
        device: file,
        volume,
        tags: [],
        skipUnreadable: false,
        takeOver: false,
        host: volume,
        dedupeCacheFile: dir.join('dedupe'),
        workers: 0,
        storeUrl: undefined,
        signal: new AbortController().signal,
        events: () => undefined,
      });
    };
    await snapshot('host-1/a');
    // Of every two chunks in the packs of the first the second volume uses one; of the last packs none.
    for (let i = 0; i < chunks; i += i < chunks - 64 ? 2 : 1)
      bytes.set(noise(1000 + i, CHUNK), i * CHUNK);
    const expected = Buffer.from(bytes);
    await snapshot('host-2/b');
    const [a, b] = ['host-1/a', 'host-2/b'].map(async (name) => {
      const volumes = await listVolumes(repo, (text) => {
        throw new Error(text);
      });
      const found = volumes.find((v) => v.name === name);
      if (found === undefined) throw new Error(`no volume ${name}`);
      return found;
    });
    const [first, second] = [await a, await b];
    if (first === undefined || second === undefined) throw new Error('two volumes were made');

    await using reader = await Repository.open(await openDirectoryStore(url), [], env);
    const failures: unknown[] = [];
    allowReadAhead(reader, url, (error) => failures.push(error));
    while (reader.packs.readAhead(true) === undefined)
      await new Promise((resolve) => setTimeout(resolve, 5));
    const history = await VolumeHistory.open(reader, second.id);
    const image = await openImage(history, second, 1);
    let lent = 0;
    const readOn = async (step: number): Promise<void> => {
      for (let at = 0; at < expected.length; at += step) {
        const length = Math.min(step, expected.length - at);
        const loan = await image.lend(at, length);
        const got = Buffer.alloc(length, 0xee);
        if (loan === undefined) await image.read(got, at);
        else {
          lent++;
          Buffer.concat(loan.views).copy(got);
          loan.release();
        }
        if (!got.equals(expected.subarray(at, at + length)))
          throw new Error(`other bytes at ${at}`);
      }
    };
    await readOn(1024 * 1024);
    for await (const { name } of store.list(`volumes/${first.id}`)) await store.delete(name);
    const done = { compacted: 0, deleted: 0 };
    let isOver = false;
    const pruning = (async () => {
      for (let i = 0; i < 3; i++) {
        const { packsCompacted, packsDeleted } = await prune(repo, { graceMs: 0 });
        done.compacted += packsCompacted;
        done.deleted += packsDeleted;
      }
    })().finally(() => {
      isOver = true;
    });
    for (const step of [256 * 1024, 1024 * 1024, 300_000]) {
      do await readOn(step);
      while (!isOver);
    }
    await pruning;
    expect(done.compacted).toBeGreaterThan(5);
    expect(done.deleted).toBeGreaterThan(0);
    expect(lent).toBeGreaterThan(50);
    expect(failures).toEqual([]);
    await image.close();
    await history.close();
  });
});
