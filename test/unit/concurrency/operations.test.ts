/**
 * The table of operations at the top of src/repo/repository.ts: each pair of them at the same time, interleaved at random, and what the table
 * says of the outcome. "free": both go well. "lease": one at a time; who comes second is told that it is held, or comes later.
 */
import { describe, expect, it } from 'vitest';
import { isKind } from '../../../src/errors.js';
import type { Secret } from '../../../src/repo/keys.js';
import { Repository } from '../../../src/repo/repository.js';
import { writeVolumeMeta } from '../../../src/repo/volume.js';
import { repair } from '../../../src/repair/repair.js';
import { prune } from '../../../src/retention/prune.js';
import { verify } from '../../../src/verify/verify.js';
import {
  Host,
  SharedIndex,
  TickingClock,
  hostEnvironment,
  readPoints,
} from '../../support/hosts.js';
import { CHUNK_BYTES, seeded, testMeta } from '../../support/model-volume.js';
import { MemoryStore } from '../../support/store-memory.js';
import { RacingStore } from '../../support/store-racing.js';

const ROUNDS = Number(process.env['B2_TEST_ROUNDS'] ?? 6);
const KEY: Secret = { kind: 'keyFile', material: Buffer.alloc(32, 7), source: 'the test' };
const keyNumber = (n: number): Secret => ({
  kind: 'keyFile',
  material: Buffer.alloc(32, 100 + n),
  source: `key ${n}`,
});

/** One repository with a history; what runs in it at once. */
interface Scene {
  readonly store: MemoryStore;
  /** Two volumes; side 0 and 1 of a pair write different ones. */
  readonly hosts: readonly [Host, Host];
  readonly promisedKeys: Secret[];
  readonly random: () => number;
  open(): Promise<Repository>;
}

const IDS = ['a1'.repeat(16), 'b2'.repeat(16)] as const;
const FIRST_SIDE = 0;
const SECOND_SIDE = 1;

/** A repository with two volumes of eighteen commits each, before anything happens at once. */
interface Stage {
  readonly store: MemoryStore;
  readonly index: SharedIndex;
  readonly hosts: readonly [Host, Host];
  readonly clock: TickingClock;
}

async function newStage(round: number): Promise<Stage> {
  const seed = round * 1000;
  const random = seeded(seed);
  const clock = new TickingClock();
  const store = new MemoryStore({ canAppend: round % 2 === 0, record: false });
  const made = await Repository.init(
    store,
    { encryption: 'aes256-gcm', chunkBytes: CHUNK_BYTES, packBytes: 1024 * 1024 },
    KEY,
    hostEnvironment(clock, random),
  );
  for (const [i, id] of IDS.entries())
    await writeVolumeMeta(made, testMeta(id, CHUNK_BYTES * 6, `host${i}/sda`));
  const index = new SharedIndex();
  const host = (side: 0 | 1): Host =>
    new Host({
      volumeId: IDS[side],
      index,
      random: seeded(seed * 7 + side),
      chunks: 6,
      contents: 9,
    });
  const hosts = [host(FIRST_SIDE), host(SECOND_SIDE)] as const;
  for (const h of hosts) for (let i = 0; i < 9; i++) await h.session(made, 2);
  // So that there is something to delete, and something to merge.
  await prune(made, { graceMs: 0 });
  return { store, index, hosts, clock };
}

/** Made once for each round; every pair begins with a copy. */
const stages = new Map<number, Promise<Stage>>();

async function newScene(round: number, seed: number): Promise<Scene> {
  let staged = stages.get(round);
  if (staged === undefined) {
    staged = newStage(round);
    stages.set(round, staged);
  }
  const stage = await staged;
  const random = seeded(seed);
  const clock = new TickingClock(stage.clock);
  const store = stage.store.clone();
  const index = stage.index.clone();
  const host = (side: 0 | 1): Host =>
    stage.hosts[side].clone({ index, random: seeded(seed * 7 + side) });
  return {
    store,
    hosts: [host(FIRST_SIDE), host(SECOND_SIDE)],
    promisedKeys: [KEY],
    random,
    open: () =>
      Repository.open(new RacingStore(store, random), [KEY], hostEnvironment(clock, random)),
  };
}

type Operation = (scene: Scene, repo: Repository, side: 0 | 1, round: number) => Promise<void>;

const OPERATIONS: Record<string, Operation> = {
  async read(scene, repo) {
    for (const host of scene.hosts)
      await readPoints(repo, host, (all) =>
        all.filter((_, i) => i === all.length - 1 || scene.random() < 0.3),
      );
  },
  async capture(scene, repo, side) {
    await scene.hosts[side].session(repo, 3);
  },
  async verify(_scene, repo) {
    const report = await verify(repo, { dataShare: 1, events: () => undefined });
    const damage = report.findings.filter((f) => f.severity !== 'note');
    if (damage.length > 0)
      throw new Error(
        `verify: ${JSON.stringify(damage, (_, v: unknown) => (typeof v === 'bigint' ? String(v) : v))}`,
      );
  },
  async prune(_scene, repo) {
    await prune(repo, { graceMs: 0 });
  },
  async repair(_scene, repo) {
    const report = await repair(repo);
    if (report.left.length > 0) throw new Error(`repair left ${JSON.stringify(report.left)}`);
  },
  async keys(scene, repo, side, round) {
    const key = keyNumber(round * 2 + side);
    await repo.addKey(key, 'another');
    scene.promisedKeys.push(key);
  },
};

const NAMES = Object.keys(OPERATIONS);
const LEASES: Record<string, readonly string[]> = {
  prune: ['prune'],
  repair: ['repair', 'prune'],
  keys: ['keys'],
};
const PAIRS = NAMES.flatMap((a, i) =>
  NAMES.slice(i).map((b) => ({
    a,
    b,
    lease: (LEASES[a] ?? []).some((l) => LEASES[b]?.includes(l)),
  })),
);

describe.each(PAIRS)('$a and $b at once', ({ a, b, lease }) => {
  it(lease ? 'take turns' : 'do not disturb each other', { timeout: 120_000 }, async () => {
    for (let round = 1; round <= ROUNDS; round++) {
      const seed = round * 1000 + PAIRS.findIndex((p) => p.a === a && p.b === b);
      const scene = await newScene(round, seed);
      const run = async (name: string, side: 0 | 1): Promise<void> => {
        const operation = OPERATIONS[name];
        if (operation === undefined) throw new Error(name);
        await operation(scene, await scene.open(), side, round);
      };
      const done = await Promise.allSettled([run(a, 0), run(b, 1)]);
      const failures = done.flatMap((d) => (d.status === 'rejected' ? [d.reason as unknown] : []));
      try {
        // A claimant that must know what prune deletes holds its lease for a moment: capture may cost prune a try, as the table's note says.
        const mayBeHeld = lease || (a === 'capture' && (b === 'prune' || b === 'repair'));
        for (const f of failures) if (!mayBeHeld || !isKind(f, 'held')) throw f;
        expect(failures.length).toBeLessThan(2);
        for (const key of scene.promisedKeys) {
          const repo = await Repository.open(
            scene.store,
            [key],
            hostEnvironment(new TickingClock(), seeded(1)),
          );
          for (const host of scene.hosts) await readPoints(repo, host, (all) => all);
        }
      } catch (error) {
        throw new Error(`seed ${seed}`, { cause: error });
      }
    }
  });
});
