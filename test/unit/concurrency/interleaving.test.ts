/**
 * Many hosts on one repository, their steps interleaved at random: two write two volumes and reuse each other's chunks, a third restores,
 * and prunes without any grace time, so that what a writer reuses is condemned and deleted all the time; writers die at random calls.
 * Each round has a seed of its own, which a failure names.
 */
import { describe, expect, it } from 'vitest';
import { B2Error, isKind } from '../../../src/errors.js';
import { Repository } from '../../../src/repo/repository.js';
import { writeVolumeMeta } from '../../../src/repo/volume.js';
import { prune } from '../../../src/retention/prune.js';
import {
  Host,
  SharedIndex,
  TickingClock,
  hostEnvironment,
  lapseLease,
  openHost,
  readPoints,
} from '../../support/hosts.js';
import { CHUNK_BYTES, seeded, testMeta, type Expected } from '../../support/model-volume.js';
import { FaultStore } from '../../support/store-fault.js';
import { MemoryStore } from '../../support/store-memory.js';
import { RacingStore } from '../../support/store-racing.js';

interface Tally {
  sessions: number;
  commits: number;
  condemned: number;
  deaths: number;
  lost: number;
  prunes: number;
  deleted: number;
  compacted: number;
  reads: number;
  held: number;
}

const emptyTally = (): Tally => ({
  sessions: 0,
  commits: 0,
  condemned: 0,
  deaths: 0,
  lost: 0,
  prunes: 0,
  deleted: 0,
  compacted: 0,
  reads: 0,
  held: 0,
});

async function newRepository(
  store: MemoryStore,
  clock: TickingClock,
  random: () => number,
  volumes: readonly string[],
): Promise<void> {
  const parameters = {
    encryption: 'none',
    chunkBytes: CHUNK_BYTES,
    packBytes: 1024 * 1024,
  } as const;
  const repo = await Repository.init(store, parameters, undefined, hostEnvironment(clock, random));
  for (const [i, id] of volumes.entries())
    await writeVolumeMeta(repo, testMeta(id, CHUNK_BYTES * 6, `host${i}/sda`));
}

/** Reads what was acknowledged, all of it now and then, and prunes, until `over`. */
async function readAndPrune(
  store: MemoryStore,
  clock: TickingClock,
  seed: number,
  hosts: readonly Host[],
  over: () => boolean,
  tally: Tally,
): Promise<void> {
  const random = seeded(seed);
  const repo = await openHost(new RacingStore(store, random), hostEnvironment(clock, random));
  const some = (all: readonly Expected[]): Expected[] =>
    all.filter((_, i) => i === all.length - 1 || random() < 0.2);
  while (!over()) {
    if (random() < 0.6) {
      // A claimant that must know what is deleted holds the lease for a moment (or died with it).
      const done = await prune(repo, { graceMs: 0 }).catch((error: unknown) => {
        if (!isKind(error, 'held')) throw error;
        tally.held++;
        return undefined;
      });
      if (done === undefined) continue;
      tally.prunes++;
      tally.deleted += done.packsDeleted;
      tally.compacted += done.packsCompacted;
    } else {
      for (const host of hosts) tally.reads += await readPoints(repo, host, some);
    }
  }
  await repo.close();
}

/** One process after another that writes this volume; some die at a random call. */
async function write(
  store: MemoryStore,
  clock: TickingClock,
  seed: number,
  host: Host,
  sessions: number,
  tally: Tally,
  pauseTurns = 0,
): Promise<void> {
  const random = seeded(seed);
  for (let s = 0; s < sessions; s++) {
    for (let turns = Math.floor(random() * pauseTurns); turns > 0; turns--)
      await new Promise<void>((resolve) => setImmediate(resolve));
    const dies = random() < 0.4;
    const last = dies ? Math.floor(random() * 150) : Infinity;
    const faults = new FaultStore(new RacingStore(store, random), ({ total }) =>
      total >= last ? { do: 'io', retryable: false } : undefined,
    );
    const before = host.acknowledged.length;
    try {
      const repo = await openHost(faults, hostEnvironment(clock, random, `${seed}-${s}`));
      await host.session(repo, 1 + Math.floor(random() * 3));
    } catch (error) {
      if (isKind(error, 'lost-claim')) tally.lost++;
      else if (dies && isKind(error, 'io')) tally.deaths++;
      else throw error;
      await lapseLease(store, 'prune', `${seed}-${s}`);
    }
    tally.sessions++;
    tally.commits += host.acknowledged.length - before;
  }
}

async function allRestore(
  store: MemoryStore,
  clock: TickingClock,
  hosts: readonly Host[],
): Promise<void> {
  const repo = await openHost(store, hostEnvironment(clock, seeded(9)));
  for (const host of hosts) await readPoints(repo, host, (all) => all);
  // And after everything unused is gone.
  for (let i = 0; i < 3; i++) await prune(repo, { graceMs: 0 });
  repo.packs.close().catch(() => undefined);
  const again = await openHost(store, hostEnvironment(clock, seeded(10)));
  for (const host of hosts) await readPoints(again, host, (all) => all);
}

async function twoHosts(seed: number, canAppend: boolean, tally: Tally): Promise<void> {
  const random = seeded(seed);
  const store = new MemoryStore({ canAppend, record: false });
  const clock = new TickingClock();
  const ids = ['a1'.repeat(16), 'b2'.repeat(16)];
  await newRepository(store, clock, random, ids);
  const index = new SharedIndex();
  const hosts = ids.map(
    (volumeId, i) =>
      new Host({ volumeId, index, random: seeded(seed * 7 + i), chunks: 6, contents: 9 }),
  );
  let over = false;
  const reader = readAndPrune(store, clock, seed * 7 + 3, hosts, () => over, tally);
  const writers = hosts.map((host, i) => write(store, clock, seed * 7 + 4 + i, host, 12, tally));
  try {
    await Promise.race([reader, Promise.all(writers)]);
    await Promise.all(writers);
  } finally {
    over = true;
    await Promise.allSettled([...writers, reader]);
  }
  await reader;
  for (const host of hosts) tally.condemned += host.condemned;
  await allRestore(store, clock, hosts);
}

const ROUNDS = Number(process.env['B2_TEST_ROUNDS'] ?? 15);

async function rounds(
  name: string,
  count: number,
  round: (seed: number, tally: Tally) => Promise<void>,
): Promise<Tally> {
  const tally = emptyTally();
  const failures: string[] = [];
  for (let seed = 1; seed <= count; seed++) {
    try {
      await round(seed, tally);
    } catch (error) {
      const parts: string[] = [];
      for (let e = error; e instanceof Error; e = e.cause) parts.push(`${e.message}`);
      const line = `seed ${seed}: ${parts.join(' <- ')} ${error instanceof B2Error ? error.kind : error instanceof Error ? error.stack : ''}`;
      failures.push(line);
      console.log(line);
    }
  }
  console.log(`${name}: ${count} rounds; ${JSON.stringify(tally)}`);
  expect(failures.slice(0, 10), `${failures.length} of ${count} rounds failed`).toEqual([]);
  return tally;
}

describe.each([{ canAppend: true }, { canAppend: false }])(
  'two hosts write, a third reads and prunes (append $canAppend)',
  ({ canAppend }) => {
    it('keeps every acknowledged point', { timeout: 600_000 }, async () => {
      const tally = await rounds(`two hosts (append ${canAppend})`, ROUNDS, (seed, t) =>
        twoHosts(seed, canAppend, t),
      );
      // The races that this is about did happen.
      expect(tally.condemned).toBeGreaterThan(0);
      expect(tally.deleted).toBeGreaterThan(0);
      expect(tally.compacted).toBeGreaterThan(0);
      expect(tally.deaths).toBeGreaterThan(0);
    });
  },
);

/** Three processes write one volume, each taking it over from the others; what a commit found is not known to be lost until it says so. */
async function oneVolume(seed: number, canAppend: boolean, tally: Tally): Promise<void> {
  const store = new MemoryStore({ canAppend, record: false });
  const clock = new TickingClock();
  const volumeId = 'c3'.repeat(16);
  await newRepository(store, clock, seeded(seed), [volumeId]);
  const index = new SharedIndex();
  const hosts = [0, 1, 2].map(
    (i) =>
      new Host({
        volumeId,
        index,
        random: seeded(seed * 7 + i),
        chunks: 6,
        contents: 9,
        everyCommitFull: true,
      }),
  );
  let over = false;
  const reader = readAndPrune(store, clock, seed * 7 + 3, hosts, () => over, tally);
  const writers = hosts.map((host, i) =>
    write(store, clock, seed * 7 + 4 + i, host, 8, tally, 3000),
  );
  try {
    await Promise.race([reader, Promise.all(writers)]);
    await Promise.all(writers);
  } finally {
    over = true;
    await Promise.allSettled([...writers, reader]);
  }
  await reader;
  for (const host of hosts) tally.condemned += host.condemned;
  const seqs = hosts.flatMap((h) => h.acknowledged.map((e) => e.seq));
  if (new Set(seqs).size !== seqs.length)
    throw new Error('two processes were told of the same sequence number');
  await allRestore(store, clock, hosts);
}

describe.each([{ canAppend: true }, { canAppend: false }])(
  'three processes write one volume (append $canAppend)',
  ({ canAppend }) => {
    it(
      'fences off all but the last, and keeps what was acknowledged',
      { timeout: 600_000 },
      async () => {
        const tally = await rounds(`one volume (append ${canAppend})`, ROUNDS, (seed, t) =>
          oneVolume(seed, canAppend, t),
        );
        expect(tally.lost).toBeGreaterThan(0);
        expect(tally.commits).toBeGreaterThan(ROUNDS);
      },
    );
  },
);
