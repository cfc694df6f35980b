/**
 * Races that are too rare to wait for, step by step: what prune deletes between a writer's sync and its check, and a list that runs while
 * segments are merged.
 */
import { describe, expect, it } from 'vitest';
import { ignoreEvents } from '../../../src/events.js';
import { Coverage, PointClass } from '../../../src/format/commit.js';
import { segmentName, type SegmentName } from '../../../src/format/names.js';
import { VolumeHistory } from '../../../src/repo/history.js';
import { listSegments } from '../../../src/repo/maintenance.js';
import { Repository } from '../../../src/repo/repository.js';
import {
  CondemnedError,
  VolumeWriter,
  type PlacedExtent,
} from '../../../src/repo/volume-writer.js';
import { prune } from '../../../src/retention/prune.js';
import { verify } from '../../../src/verify/verify.js';
import {
  CHUNK_BYTES,
  checkPoint,
  newModel,
  seeded,
  testEnvironment,
} from '../../support/model-volume.js';
import { FaultStore } from '../../support/store-fault.js';
import { MemoryStore } from '../../support/store-memory.js';

const BLOCKS = 4;

/** A volume with one point, and a sealed pack with a chunk that no commit names. */
async function withOrphan(seed: number) {
  const inner = new MemoryStore();
  const { repo, model, writer } = await newModel(inner, seeded(seed), { sizeBytes: BLOCKS * 4096 });
  await model.capture(writer, model.mutate(2), true);
  await writer.finishPack();
  const orphan = await writer.openPack();
  const bytes = Buffer.from(repo.env.random(CHUNK_BYTES));
  const frame = orphan.addChunk(bytes, repo.keys.chunkId(bytes));
  await writer.finishPack();
  const env = testEnvironment(seeded(seed + 1));
  await env.clock.advanceMs(10_000_000);
  const pruner = await Repository.open(inner, [], env);
  const place: PlacedExtent = {
    block: 0,
    count: BLOCKS,
    packId: orphan.packId,
    frame,
    sub: 0,
    skip: 0,
  };
  const draft = {
    pointClass: PointClass.crash,
    coverage: Coverage.exact,
    full: false,
    instantNs: 5n,
    startedNs: 5n,
    sizeBytes: BLOCKS * 4096,
    extents: [place],
    storedBytes: 0,
    facts: {},
  };
  return {
    inner,
    repo,
    model,
    writer,
    pruner,
    pruneClock: env.clock,
    draft,
    orphanId: orphan.packId,
  };
}

/** Runs one prune whose view of what is used is older than `meanwhile`, and whose deletions come after it. */
async function pruneAround(
  pruner: Repository,
  store: MemoryStore,
  meanwhile: () => Promise<void>,
): Promise<void> {
  // The lease is looked at again after all is known that is in use, and before the first deletion.
  let listed = false;
  let done = false;
  const gate = new FaultStore(store, ({ kind, name }) => {
    if (kind === 'list' && name === 'condemned') listed = true;
    if (done || !listed || kind !== 'stat' || !name.startsWith('locks/')) return undefined;
    done = true;
    return { do: 'wait', until: meanwhile };
  });
  const repo = await Repository.open(gate, [], pruner.env);
  await prune(repo, { graceMs: 0 });
  expect(done).toBe(true);
}

async function alarms(repo: Repository, volumeIds?: readonly string[]): Promise<readonly string[]> {
  const { findings } = await verify(repo, { dataShare: 1, events: ignoreEvents, volumeIds });
  return findings.filter((f) => f.severity !== 'note').map((f) => `${f.object}: ${f.message}`);
}

describe('a commit that reuses what prune deletes', () => {
  it('is not acknowledged, and not taken for part of the chain when its writer died', async () => {
    const t = await withOrphan(11);
    expect((await prune(t.pruner, { graceMs: 0 })).condemnedPacks).toBe(1);
    await t.pruneClock.advanceMs(1000);
    await pruneAround(t.pruner, t.inner, async () => {
      await expect(t.writer.commit(t.draft)).rejects.toBeInstanceOf(CondemnedError);
    });
    expect(await t.inner.stat(`packs/${t.orphanId.slice(0, 2)}/${t.orphanId}`)).toBeUndefined();
    // The writer dies here. Readers leave out what was never acknowledged, and call nothing damaged.
    const reader = await Repository.open(t.inner, [], t.repo.env);
    const seen = await VolumeHistory.open(reader, t.model.volumeId);
    expect(seen.tip?.seq).toBe(1);
    expect(seen.chain.stray.map((c) => c.seq)).toEqual([2]);
    await seen.close();
    expect(await alarms(reader)).toEqual([]);
    await reader.close();
    // Who claims the volume next sees a commit at the tip that was never acknowledged and cannot be restored.
    const fresh = await Repository.open(t.inner, [], t.repo.env);
    const { writer, history } = await VolumeWriter.claim(fresh, t.model.volumeId);
    expect(history.tip?.seq).toBe(1);
    await history.close();
    await t.model.capture(writer, t.model.mutate(2));
    await writer.close();
    for (const e of t.model.acknowledged) await checkPoint(fresh, t.model.volumeId, e);
    const whole = await VolumeHistory.open(fresh, t.model.volumeId);
    expect(whole.problems).toEqual([]);
    expect(whole.tip?.seq).toBe(2);
    await whole.close();
  });

  it('is no alarm for verify in any state that its writer passes through', async () => {
    const t = await withOrphan(17);
    expect((await prune(t.pruner, { graceMs: 0 })).condemnedPacks).toBe(1);
    await t.pruneClock.advanceMs(1000);
    await pruneAround(t.pruner, t.inner, async () => {
      await expect(t.writer.commit(t.draft)).rejects.toBeInstanceOf(CondemnedError);
    });
    const reader = await Repository.open(t.inner, [], t.repo.env);
    expect(await alarms(reader)).toEqual([]);
    await t.writer.reclaim();
    expect(await alarms(reader)).toEqual([]);
    await t.model.capture(t.writer, t.model.mutate(2));
    expect(await alarms(reader)).toEqual([]);
    await t.writer.close();
    expect(await alarms(reader)).toEqual([]);
    await reader.close();
  });

  it('is no alarm either when prune deletes after the history was read', async () => {
    const t = await withOrphan(18);
    expect((await prune(t.pruner, { graceMs: 0 })).condemnedPacks).toBe(1);
    await expect(t.writer.commit(t.draft)).rejects.toBeInstanceOf(CondemnedError);
    const pack = `packs/${t.orphanId.slice(0, 2)}/${t.orphanId}`;
    let looks = 0;
    const gate = new FaultStore(t.inner, ({ kind, name }) => {
      if (kind !== 'stat' || name !== pack || ++looks !== 2) return undefined;
      return { do: 'wait', until: () => t.inner.delete(pack) };
    });
    const reader = await Repository.open(gate, [], t.repo.env);
    expect(await alarms(reader, [t.model.volumeId])).toEqual([]);
    expect(looks).toBeGreaterThan(1);
    await reader.close();
  });

  it('stays when its places were condemned but not deleted: it may have been acknowledged', async () => {
    const t = await withOrphan(12);
    expect((await prune(t.pruner, { graceMs: 0 })).condemnedPacks).toBe(1);
    await expect(t.writer.commit(t.draft)).rejects.toBeInstanceOf(CondemnedError);
    const fresh = await Repository.open(t.inner, [], t.repo.env);
    const { writer, history } = await VolumeWriter.claim(fresh, t.model.volumeId);
    expect(history.tip?.seq).toBe(2);
    await history.close();
    await writer.close();
    await t.pruneClock.advanceMs(1000);
    expect((await prune(t.pruner, { graceMs: 0 })).packsDeleted).toBe(0);
  });
});

describe('a claimant that is overtaken', () => {
  it('puts no segment, which could say something else than the chain of who overtook it', async () => {
    const inner = new MemoryStore({ canAppend: false });
    const { repo, model, writer } = await newModel(inner, seeded(19), {
      sizeBytes: BLOCKS * 4096,
    });
    await model.capture(writer, model.mutate(2), true);
    // Durable, but too late to be acknowledged.
    const late = async (w: VolumeWriter): Promise<void> => {
      const before = Buffer.from(model.data);
      await expect(model.capture(w, model.mutate(2))).rejects.toMatchObject({ kind: 'lost-claim' });
      model.data = before;
    };
    const second = await VolumeWriter.claim(repo, model.volumeId);
    await second.history.close();
    await late(writer);
    let overtaken = false;
    const overtake = async (): Promise<void> => {
      if (overtaken) return;
      overtaken = true;
      // The slow claimant has seen the first writer's commit 2; the next one sees the second writer's, which outranks it.
      await late(second.writer);
      const next = await VolumeWriter.claim(repo, model.volumeId);
      expect(next.history.tip).toMatchObject({ seq: 2, epoch: second.writer.claimedEpoch });
      await next.history.close();
      await model.capture(
        next.writer,
        Array.from({ length: BLOCKS }, (_, i) => i),
        true,
      );
      await next.writer.close();
    };
    const gate = new FaultStore(inner, ({ kind, name }) =>
      kind === 'put' && name.includes('/manifest/') ? { do: 'wait', until: overtake } : undefined,
    );
    const slow = await Repository.open(gate, [], repo.env);
    const claimed = await VolumeWriter.claim(slow, model.volumeId);
    expect(claimed.history.tip).toMatchObject({ seq: 2, epoch: writer.claimedEpoch });
    await claimed.history.close();
    await overtake();
    await late(claimed.writer);
    await claimed.writer.close();
    expect(await alarms(repo)).toEqual([]);
    expect(model.acknowledged.map((e) => e.seq)).toEqual([1, 3]);
    for (const e of model.acknowledged) await checkPoint(repo, model.volumeId, e);
    await slow.close();
    await repo.close();
  });
});

describe('the pack that a writer has open', () => {
  it('can be condemned before its first commit, which then is not acknowledged', async () => {
    const t = await withOrphan(13);
    const open = await t.writer.openPack();
    expect((await prune(t.pruner, { graceMs: 0 })).condemnedPacks).toBe(2);
    await t.pruneClock.advanceMs(1000);
    await pruneAround(t.pruner, t.inner, async () => {
      await expect(t.model.capture(t.writer, t.model.mutate(1))).rejects.toBeInstanceOf(
        CondemnedError,
      );
    });
    expect(await t.inner.stat(`packs/${open.packId.slice(0, 2)}/${open.packId}`)).toBeUndefined();
    await t.writer.reclaim();
    await t.model.capture(t.writer, [0, 1, 2, 3]);
    await t.writer.close();
    const fresh = await Repository.open(t.inner, [], t.repo.env);
    for (const e of t.model.acknowledged) await checkPoint(fresh, t.model.volumeId, e);
  });
});

describe('listing segments while they are merged', () => {
  it('always covers every commit, however a list misses what comes and goes', async () => {
    const store = new MemoryStore();
    const { repo, model } = await newModel(store, seeded(14), { sizeBytes: BLOCKS * 4096 });
    const name = (level: number, firstSeq: number, lastSeq: number): SegmentName => ({
      volumeId: model.volumeId,
      level,
      firstSeq,
      lastSeq,
    });
    const put = (s: SegmentName): Promise<void> => store.put(segmentName(s), Buffer.from('x'));
    for (let seq = 1; seq <= 16; seq++) await put(name(0, seq, seq));
    // The first list sees neither the inputs, deleted during it, nor the merged one, made during it.
    let lists = 0;
    const racing: typeof repo.store = Object.create(store, {
      list: {
        value: async function* (prefix: string) {
          lists++;
          if (lists > 1) return yield* store.list(prefix);
          await put(name(1, 1, 16));
          for (let seq = 1; seq <= 16; seq++) await store.delete(segmentName(name(0, seq, seq)));
        },
      },
    }) as typeof repo.store;
    const seen = await listSegments(
      { ...repo, store: racing } as unknown as Repository,
      model.volumeId,
    );
    expect(seen.map(segmentName)).toEqual([segmentName(name(1, 1, 16))]);
  });
});
