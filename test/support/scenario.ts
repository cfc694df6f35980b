/**
 * Everything that writes to a repository, cut into steps that each start from a stored state, so that a test can run one step
 * a thousand times (with a fault at each of its calls, say) without playing what comes before it again.
 */
import { B2Error } from '../../src/errors.js';
import { PointClass } from '../../src/format/commit.js';
import { VolumeHistory } from '../../src/repo/history.js';
import type { Secret } from '../../src/repo/keys.js';
import { openImage } from '../../src/repo/point.js';
import { Repository, type Environment } from '../../src/repo/repository.js';
import type { Store } from '../../src/repo/store.js';
import { Timeline } from '../../src/repo/timeline.js';
import { addSnapshot, writeVolumeMeta } from '../../src/repo/volume.js';
import { VolumeWriter } from '../../src/repo/volume-writer.js';
import { prune } from '../../src/retention/prune.js';
import {
  CHUNK_BYTES,
  ModelVolume,
  digestOf,
  seeded,
  testEnvironment,
  testMeta,
  type Expected,
} from './model-volume.js';
import type { SteppedClock } from './stepped-clock.js';
import { MemoryStore } from './store-memory.js';

const BLOCK = 4096;
export const DEVICE_BYTES = 64 * 1024;
export const VOLUME = 'ab'.repeat(16);
const HOUR_MS = 3_600_000;
/** Key files: quick to open, unlike passwords. */
export const FIRST: Secret = {
  kind: 'keyFile',
  material: Buffer.alloc(32, 1),
  source: 'the first key file',
};
export const SECOND: Secret = {
  kind: 'keyFile',
  material: Buffer.alloc(32, 2),
  source: 'the second key file',
};

/** A state between two steps. */
export interface Checkpoint {
  readonly store: MemoryStore;
  readonly data: Buffer;
  readonly acknowledged: readonly Expected[];
  readonly atMs: number;
}

/** A run of one or more steps on a store. */
export class World {
  readonly store: Store;
  readonly encrypted: boolean;
  readonly random: () => number;
  readonly env: Environment & { readonly clock: SteppedClock };
  readonly model: ModelVolume;
  /** Blocks that changed since the last acknowledged commit. */
  private readonly dirty = new Set<number>();
  private opened: Repository | undefined;

  private constructor(
    store: Store,
    from: Checkpoint | undefined,
    encrypted: boolean,
    seed: number,
  ) {
    this.store = store;
    this.encrypted = encrypted;
    this.random = seeded(seed);
    const env = testEnvironment(this.random);
    // A process that has ended: what it holds when it fails can be taken over at once.
    this.env = { ...env, owner: { ...env.owner, startTicks: '1' } };
    this.model = new ModelVolume(VOLUME, DEVICE_BYTES, this.random, env.clock);
    if (from === undefined) return;
    this.model.data = Buffer.from(from.data);
    this.model.acknowledged.push(...from.acknowledged);
  }

  /** `from` is what `store` holds; undefined: it is empty. */
  static async start(
    store: Store,
    from: Checkpoint | undefined,
    encrypted: boolean,
    seed: number,
  ): Promise<World> {
    const world = new World(store, from, encrypted, seed);
    if (from !== undefined) await world.env.clock.advanceMs(from.atMs);
    return world;
  }

  /** The repository, opened once; made if there is none. */
  async repository(): Promise<Repository> {
    if (this.opened !== undefined) return this.opened;
    this.opened = await Repository.open(
      this.store,
      this.encrypted ? [FIRST, SECOND] : [],
      this.env,
    );
    return this.opened;
  }

  async init(): Promise<void> {
    const parameters = {
      encryption: this.encrypted ? 'aes256-gcm' : 'none',
      chunkBytes: CHUNK_BYTES,
      packBytes: 1024 * 1024,
    } as const;
    this.opened = await Repository.init(
      this.store,
      parameters,
      this.encrypted ? FIRST : undefined,
      this.env,
    );
    await writeVolumeMeta(this.opened, testMeta(VOLUME, DEVICE_BYTES));
  }

  /** Changes the device and captures all that is not acknowledged yet. */
  async capture(writer: VolumeWriter, most = 3): Promise<void> {
    const { model, dirty } = this;
    for (const b of model.mutate(most)) dirty.add(b);
    const blocks = Math.ceil(model.data.length / BLOCK);
    const full = model.acknowledged.length === 0;
    const wanted = full
      ? Array.from({ length: blocks }, (_, i) => i)
      : [...dirty].filter((b) => b < blocks);
    await model.capture(
      writer,
      wanted.sort((a, b) => a - b),
      full,
    );
    dirty.clear();
  }

  /** One session of a writer: claim, captures, close. `die`: it ends without closing. */
  async session(what: (writer: VolumeWriter) => Promise<void>, die = false): Promise<void> {
    const repo = await this.repository();
    const { writer, history } = await VolumeWriter.claim(repo, VOLUME);
    await history.close();
    let well = false;
    try {
      await what(writer);
      well = true;
    } finally {
      if (!(well && die)) await writer.close();
    }
  }

  async prune(): Promise<number> {
    const clock = this.env.clock;
    await clock.advanceMs(48 * HOUR_MS);
    const done = await prune(await this.repository(), { graceMs: 24 * HOUR_MS });
    return done.freedBytes;
  }
}

export interface Step {
  readonly name: string;
  /** Only in an encrypted repository. */
  readonly keys?: boolean;
  run(w: World): Promise<void>;
}

const sessions = (count: number): Step => ({
  name: `${count} short sessions`,
  async run(w) {
    for (let i = 0; i < count; i++) await w.session((writer) => w.capture(writer));
  },
});

/** In order. Every step can also be run again after it has failed half way. */
export const STEPS: readonly Step[] = [
  {
    name: 'init',
    async run(w) {
      try {
        await w.init();
      } catch (error) {
        if (!(error instanceof B2Error) || error.kind !== 'exists') throw error;
        // An earlier try got as far as making it.
        await writeVolumeMeta(await w.repository(), testMeta(VOLUME, DEVICE_BYTES));
      }
    },
  },
  {
    name: 'first session',
    async run(w) {
      await w.session(async (writer) => {
        await w.capture(writer, 8);
        await w.capture(writer);
        await writer.finishPack(); // a seal and a segment in the middle of a session
        await w.capture(writer);
      });
    },
  },
  {
    name: 'session that dies with its pack open',
    run: (w) => w.session((writer) => w.capture(writer), true),
  },
  {
    name: 'session after it, device grown',
    run: (w) =>
      w.session(async (writer) => {
        w.model.resize(DEVICE_BYTES + 512);
        await w.capture(writer);
      }),
  },
  {
    name: 'snapshot',
    run: (w) =>
      w.session(async (writer) => {
        await w.capture(writer);
        const last = w.model.acknowledged.at(-1);
        const history = await VolumeHistory.open(writer.repo, VOLUME);
        try {
          await addSnapshot(writer.repo, {
            name: `after ${last?.seq}`,
            volumeId: VOLUME,
            seq: last?.seq ?? 0,
            hash: history.tip?.hash.toString('hex') ?? '',
            instantNs: 1n,
            pointClass: PointClass.crash,
            tags: [],
            createdNs: 1n,
          });
        } finally {
          await history.close();
        }
      }),
  },
  sessions(9),
  {
    name: 'session with a merge',
    run: (w) => w.session((writer) => w.capture(writer)),
  },
  {
    name: 'key add',
    keys: true,
    async run(w) {
      await (await w.repository()).addKey(SECOND, 'second');
    },
  },
  {
    name: 'key remove',
    keys: true,
    async run(w) {
      const repo = await w.repository();
      const [first, ...others] = repo.config.keys;
      if (first === undefined || others.length === 0) return;
      try {
        await repo.removeKey(first.id);
      } catch (error) {
        // An earlier try got as far as removing it, and its answer was lost.
        if (!(error instanceof B2Error) || error.kind !== 'not-found') throw error;
      }
    },
  },
  {
    name: 'session that wastes space',
    async run(w) {
      await w.session(async (writer) => {
        const pack = await writer.openPack();
        for (let i = 0; i < 6; i++) {
          const bytes = Buffer.from(w.env.random(CHUNK_BYTES));
          pack.addChunk(bytes, writer.repo.keys.chunkId(bytes));
        }
        await w.capture(writer);
      });
      // And a pack that no commit names at all.
      await w.session(async (writer) => {
        const pack = await writer.openPack();
        const bytes = Buffer.from(w.env.random(CHUNK_BYTES));
        pack.addChunk(bytes, writer.repo.keys.chunkId(bytes));
      });
    },
  },
  {
    name: 'prune, first step',
    run: async (w) => void (await w.prune()),
  },
  {
    name: 'prune, second step',
    run: async (w) => void (await w.prune()),
  },
];

/** Plays the steps one after the other without a fault; checkpoint i is the state before step i, the last one the end. */
export async function playSteps(
  options: { readonly canAppend: boolean; readonly encrypted: boolean },
  seed: number,
): Promise<{
  readonly steps: readonly Step[];
  readonly before: readonly (Checkpoint | undefined)[];
}> {
  const steps = STEPS.filter((s) => options.encrypted || s.keys !== true);
  const before: (Checkpoint | undefined)[] = [undefined];
  let atMs = 0;
  for (const [i, step] of steps.entries()) {
    const from = before[i];
    const store =
      from?.store.clone() ?? new MemoryStore({ canAppend: options.canAppend, record: false });
    const world = await World.start(store, from, options.encrypted, seed + i);
    const startNs = world.env.clock.monotonicNs();
    await step.run(world);
    atMs += Number((world.env.clock.monotonicNs() - startNs) / 1_000_000n) + 1000;
    before.push({
      store,
      data: world.model.data,
      acknowledged: [...world.model.acknowledged],
      atMs,
    });
  }
  return { steps, before };
}

/**
 * Opens the repository afresh and checks: the history is whole, every point of `acknowledged` restores bit for bit, and every
 * other point that is shown can be read.
 */
export async function checkAll(
  store: Store,
  acknowledged: readonly Expected[],
  secrets: readonly Secret[] = [],
  volumeId = VOLUME,
): Promise<number> {
  const repo = await Repository.open(store, secrets, testEnvironment(seeded(1)));
  const history = await VolumeHistory.open(repo, volumeId);
  try {
    const problem = history.problems[0];
    if (problem !== undefined)
      throw new Error(`problem with ${problem.object}`, { cause: problem.error });
    history.refuseGap();
    const expected = new Map(acknowledged.map((e) => [e.seq, e]));
    for await (const c of new Timeline(history.sources).list({ minClass: PointClass.none })) {
      const image = await openImage(history, testMeta(volumeId, c.sizeBytes), c.seq);
      const all = Buffer.alloc(c.sizeBytes, 0xee);
      await image.read(all, 0);
      const e = expected.get(c.seq);
      if (e !== undefined && (e.sizeBytes !== c.sizeBytes || e.digest !== digestOf(all))) {
        throw new Error(`point ${c.seq} does not restore bit for bit`);
      }
      expected.delete(c.seq);
    }
    const [lost] = expected.keys();
    if (lost !== undefined)
      throw new Error(`acknowledged point ${lost} is gone (the newest is ${history.tip?.seq})`);
    return acknowledged.length;
  } finally {
    await history.close();
    await repo.packs.close();
  }
}
