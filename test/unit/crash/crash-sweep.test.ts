/**
 * The crash sweep: everything that writes runs once on a store that records each operation. Then, for every prefix of that
 * log, and for three ways in which unsynced bytes may fare, the store that a power cut would have left is opened:
 * every point acknowledged by then must restore bit for bit, every point shown must restore at all, and the repository must go on
 * working: also when the recovery itself is cut short. Where a crash leaves the very bytes that another one left, with the same promises, what
 * was found there holds here too; it is looked at once.
 */
import { describe, expect, it } from 'vitest';
import { isKind } from '../../../src/errors.js';
import { PointClass } from '../../../src/format/commit.js';
import { VolumeHistory } from '../../../src/repo/history.js';
import type { Secret } from '../../../src/repo/keys.js';
import { openImage } from '../../../src/repo/point.js';
import { Repository } from '../../../src/repo/repository.js';
import { Timeline } from '../../../src/repo/timeline.js';
import { listVolumeIds } from '../../../src/repo/volume.js';
import { VolumeWriter } from '../../../src/repo/volume-writer.js';
import { prune } from '../../../src/retention/prune.js';
import {
  ModelVolume,
  checkPoint,
  digestOf,
  newModel,
  seeded,
  testEnvironment,
  testMeta,
  type Expected,
} from '../../support/model-volume.js';
import type { SteppedClock } from '../../support/stepped-clock.js';
import { MemoryStore, type TearMode } from '../../support/store-memory.js';

/** Key files: quick to open, unlike passwords. */
const FIRST: Secret = { kind: 'keyFile', material: Buffer.alloc(32, 1), source: 'the test' };
const OTHER: Secret = { kind: 'keyFile', material: Buffer.alloc(32, 2), source: 'the test' };
const DEVICE_BYTES = 128 * 1024;
const HOUR_MS = 3_600_000;

interface Acknowledged extends Expected {
  /** Length of the log when the writer was told. */
  readonly at: number;
}

interface Scenario {
  readonly store: MemoryStore;
  readonly volumeId: string;
  readonly points: readonly Acknowledged[];
  /** Lengths of the log when each key change was acknowledged. */
  readonly initAt: number;
  readonly keyAddedAt: number;
  readonly keyRemovedAt: number;
}

/** Commits, seals, claims, merges, a key change and both steps of prune, on one recording store. */
async function play(canAppend: boolean, encrypted: boolean, seed: number): Promise<Scenario> {
  const random = seeded(seed);
  const store = new MemoryStore({ canAppend });
  const { repo, model, writer } = await newModel(store, random, {
    sizeBytes: DEVICE_BYTES,
    encrypted,
    secret: FIRST,
  });
  const initAt = store.operations;
  const points: Acknowledged[] = [];
  const capture = async (w: VolumeWriter, m: ModelVolume, full = false): Promise<void> => {
    const blocks = full
      ? Array.from({ length: Math.ceil(m.data.length / 4096) }, (_, i) => i)
      : m.mutate(3);
    await m.capture(w, blocks, full);
    const last = m.acknowledged.at(-1);
    if (last !== undefined) points.push({ ...last, at: store.operations });
  };
  model.mutate(8);
  await capture(writer, model, true);
  await capture(writer, model);
  await writer.finishPack(); // a seal and a segment in the middle of a session
  await capture(writer, model);
  await writer.close();
  // Seventeen short sessions: enough level 0 segments for a merge.
  for (let i = 0; i < 17; i++) {
    const next = await VolumeWriter.claim(repo, model.volumeId);
    await next.history.close();
    if (i === 5) model.resize(DEVICE_BYTES - 20_000);
    if (i === 9) model.resize(DEVICE_BYTES + 512);
    await capture(next.writer, model);
    // One session dies with its pack open; the next one settles it.
    if (i !== 7) await next.writer.close();
  }
  let keyAddedAt = Number.POSITIVE_INFINITY;
  let keyRemovedAt = Number.POSITIVE_INFINITY;
  if (encrypted) {
    await repo.addKey(OTHER, 'second');
    keyAddedAt = store.operations;
    await repo.removeKey(repo.keyId);
    keyRemovedAt = store.operations;
  }
  // Chunks without a commit: a scan that was killed. Prune removes them in two steps.
  const orphan = await VolumeWriter.claim(repo, model.volumeId);
  await orphan.history.close();
  const pack = await orphan.writer.openPack();
  for (let i = 0; i < 8; i++) {
    const bytes = Buffer.from(repo.env.random(16_384));
    pack.addChunk(bytes, repo.keys.chunkId(bytes));
  }
  await capture(orphan.writer, model);
  await orphan.writer.close();
  const clock = testEnvironment(random).clock;
  const env = { ...repo.env, clock };
  const pruner = await Repository.open(store, [FIRST, OTHER], env);
  await clock.advanceMs(48 * HOUR_MS);
  await prune(pruner, { graceMs: 24 * HOUR_MS });
  await clock.advanceMs(48 * HOUR_MS);
  const done = await prune(pruner, { graceMs: 24 * HOUR_MS });
  if (done.freedBytes === 0) throw new Error('the scenario was meant to make prune free something');
  return { store, volumeId: model.volumeId, points, initAt, keyAddedAt, keyRemovedAt };
}

/** Tells apart what was promised at cut `at`. */
function promisesAt(s: Scenario, at: number): string {
  const marks = [s.initAt, s.keyAddedAt, s.keyRemovedAt, ...s.points.map((e) => e.at)];
  return String(marks.filter((mark) => mark <= at).length);
}

/** Opens what a crash left and checks everything that was promised at cut `at`. */
async function check(
  s: Scenario,
  image: MemoryStore,
  at: number,
  seed: number,
  encrypted: boolean,
): Promise<{ repo: Repository; clock: SteppedClock }> {
  const env = testEnvironment(seeded(seed));
  await env.clock.advanceMs(100 * HOUR_MS);
  const secrets = at >= s.keyAddedAt ? [OTHER] : [FIRST];
  const repo = await Repository.open(image, encrypted ? secrets : [], env);
  // Nothing is shown that does not restore: not even a commit that nobody was told of.
  const history = await VolumeHistory.open(repo, s.volumeId);
  try {
    expect(history.problems).toEqual([]);
    expect(history.chain.gap).toBeUndefined();
    const known = new Map(s.points.map((e) => [e.seq, e]));
    const shown = new Set<number>();
    for await (const c of new Timeline(history.sources).list({ minClass: PointClass.none })) {
      const image2 = await openImage(history, testMeta(s.volumeId, c.sizeBytes), c.seq);
      const all = Buffer.alloc(c.sizeBytes);
      await image2.read(all, 0);
      // It is the very commit that was being written, or an older one.
      expect(digestOf(all)).toBe(known.get(c.seq)?.digest);
      shown.add(c.seq);
    }
    for (const e of s.points)
      if (e.at <= at) expect(shown, `point ${e.seq} was acknowledged`).toContain(e.seq);
  } finally {
    await history.close();
  }
  return { repo, clock: env.clock };
}

/** Goes on working: claims the volume, captures twice, and finds both. */
async function goOn(
  repo: Repository,
  volumeId: string,
  seed: number,
  clock: SteppedClock,
): Promise<void> {
  const random = seeded(seed + 1);
  const { writer, history } = await VolumeWriter.claim(repo, volumeId);
  const model = new ModelVolume(volumeId, DEVICE_BYTES, random, clock);
  await history.close();
  const blocks = Array.from({ length: DEVICE_BYTES / 4096 }, (_, i) => i);
  model.mutate(5);
  await model.capture(writer, blocks, true);
  await model.capture(writer, model.mutate(3));
  await writer.close();
  for (const e of model.acknowledged) await checkPoint(repo, volumeId, e);
}

const TEARS: readonly TearMode[] = ['none', 'drop', 'tear'];

describe.each([
  { canAppend: true, encrypted: true, seed: 7 },
  { canAppend: false, encrypted: true, seed: 8 },
  { canAppend: true, encrypted: false, seed: 9 },
])(
  'a crash after every operation (append $canAppend, encrypted $encrypted)',
  ({ canAppend, encrypted, seed }) => {
    it(
      'loses nothing acknowledged and shows nothing that does not restore',
      { timeout: 600_000 },
      async () => {
        const s = await play(canAppend, encrypted, seed);
        const total = s.store.operations;
        let cases = 0;
        let cutRecoveries = 0;
        const looked = new Set<string>();
        for (let at = 0; at <= total; at++) {
          for (const tear of TEARS) {
            const caseSeed = seed * 1_000_000 + at * 10 + TEARS.indexOf(tear);
            const image = s.store.crashAt(at, { tear, random: seeded(caseSeed) });
            cases++;
            try {
              const state = `${promisesAt(s, at)} ${image.digest()}`;
              const isCutAgain = at >= s.initAt && at % 4 === TEARS.indexOf(tear);
              if (looked.has(state) && !isCutAgain) continue;
              looked.add(state);
              if (at < s.initAt) {
                await openedOrNone(image, encrypted, s.volumeId);
                continue;
              }
              const { repo, clock } = await check(s, image, at, caseSeed, encrypted);
              await goOn(repo, s.volumeId, caseSeed, clock);
              // The recovery and what came after it is cut too, at a random place; the promises hold again.
              if (isCutAgain) {
                const cut = Math.floor(seeded(caseSeed)() * (image.operations + 1));
                const again = image.crashAt(cut, { tear, random: seeded(caseSeed + 5) });
                const env2 = testEnvironment(seeded(caseSeed + 6));
                const repo2 = await Repository.open(again, encrypted ? [FIRST, OTHER] : [], env2);
                for (const e of s.points) if (e.at <= at) await checkPoint(repo2, s.volumeId, e);
                await goOn(repo2, s.volumeId, caseSeed + 7, env2.clock);
                cutRecoveries++;
              }
            } catch (error) {
              throw new Error(
                `cut after operation ${at} of ${total}, tear ${tear}, seed ${caseSeed}`,
                { cause: error },
              );
            }
          }
        }
        console.log(
          `crash sweep (append ${canAppend}, encrypted ${encrypted}): ${cases} crashes after each of ${total} operations (${looked.size} different), ${cutRecoveries} of their recoveries cut again, ${s.points.length} points; seed ${seed}`,
        );
        expect(cases).toBe((total + 1) * 3);
      },
    );
  },
);

/** Before init was acknowledged there is a whole repository, or none. */
async function openedOrNone(
  image: MemoryStore,
  encrypted: boolean,
  _volumeId: string,
): Promise<void> {
  try {
    const repo = await Repository.open(image, encrypted ? [FIRST] : [], testEnvironment(seeded(1)));
    await listVolumeIds(repo);
  } catch (error) {
    if (!isKind(error, 'no-repository')) throw error;
  }
}
