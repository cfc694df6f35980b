import { describe, expect, it } from 'vitest';
import { ignoreEvents } from '../../../src/events.js';
import { Coverage, PointClass } from '../../../src/format/commit.js';
import { FrameType } from '../../../src/format/frame.js';
import { packIdOf, packName } from '../../../src/format/names.js';
import { OpenPack } from '../../../src/repo/pack-reader.js';
import { Repository } from '../../../src/repo/repository.js';
import { VolumeHistory } from '../../../src/repo/history.js';
import { VolumeWriter } from '../../../src/repo/volume-writer.js';
import { readVolumeMeta } from '../../../src/repo/volume.js';
import { repair, type RepairReport } from '../../../src/repair/repair.js';
import { verify, type VerifyReport } from '../../../src/verify/verify.js';
import { prune } from '../../../src/retention/prune.js';
import {
  PASSWORD,
  checkPoint,
  newModel,
  seeded,
  testEnvironment,
  type ModelVolume,
} from '../../support/model-volume.js';
import { MemoryStore } from '../../support/store-memory.js';

const DEVICE_BYTES = 160 * 1024;

interface Made {
  readonly store: MemoryStore;
  readonly repo: Repository;
  readonly model: ModelVolume;
}

async function make(
  seed: number,
  options: { encrypted?: boolean; closed?: boolean; packs?: number } = {},
): Promise<Made> {
  const random = seeded(seed);
  const store = new MemoryStore({ record: false });
  const { repo, model, writer } = await newModel(store, random, {
    sizeBytes: DEVICE_BYTES,
    ...(options.encrypted === undefined ? {} : { encrypted: options.encrypted }),
  });
  model.mutate(12);
  await model.capture(
    writer,
    Array.from({ length: DEVICE_BYTES / 4096 }, (_, i) => i),
    true,
  );
  for (let pack = 0; pack < (options.packs ?? 4); pack++) {
    for (let i = 0; i < 3; i++) await model.capture(writer, model.mutate(2));
    await writer.finishPack();
  }
  await model.capture(writer, model.mutate(2));
  await model.capture(writer, model.mutate(2));
  if (options.closed !== false) await writer.close();
  return { store, repo, model };
}

async function names(store: MemoryStore, prefix: string): Promise<string[]> {
  const list: string[] = [];
  for await (const { name } of store.list(prefix)) list.push(name);
  return list.sort();
}

async function packIds(store: MemoryStore): Promise<string[]> {
  return (await names(store, 'packs')).map((n) => packIdOf(n) ?? '');
}

/** Everything but leases, to see that nothing changed. */
async function state(store: MemoryStore): Promise<Map<string, string>> {
  const all = new Map<string, string>();
  for await (const { name } of store.list('')) {
    if (!name.startsWith('locks/')) all.set(name, (await store.get(name)).toString('base64'));
  }
  return all;
}

async function broken(repo: Repository, model: ModelVolume): Promise<number[]> {
  const list: number[] = [];
  await repo.packs.close();
  for (const e of model.acknowledged)
    await checkPoint(repo, model.volumeId, e).catch(() => list.push(e.seq));
  return list;
}

function check(repo: Repository): Promise<VerifyReport> {
  return verify(repo, { events: ignoreEvents, dataShare: 1 });
}

const damage = (r: VerifyReport): string[] =>
  r.findings.filter((f) => f.severity !== 'note').map((f) => `${f.kind} ${f.object}`);

/** Repairs twice: the dry run before changes nothing, the second run finds nothing to do. */
async function mend({ repo, store }: Made): Promise<RepairReport> {
  await repo.packs.close();
  const before = await state(store);
  await repair(repo, { dryRun: true });
  expect(await state(store)).toEqual(before);
  const report = await repair(repo);
  const after = await state(store);
  const again = await repair(repo);
  expect(again.actions).toEqual([]);
  expect(await state(store)).toEqual(after);
  return report;
}

async function flip(store: MemoryStore, name: string, at: number): Promise<void> {
  const bytes = await store.get(name);
  bytes[at] = (bytes[at] ?? 0) ^ 0x10;
  await store.put(name, bytes);
}

/** A new capture of the whole device, as after a claim by the next run. */
async function captureAgain({ repo, model }: Made): Promise<void> {
  const { writer, history } = await VolumeWriter.claim(repo, model.volumeId);
  await history.close();
  const all = Array.from({ length: DEVICE_BYTES / 4096 }, (_, i) => i);
  await model.capture(writer, all);
  await model.capture(writer, model.mutate(2));
  await writer.close();
}

describe('repair of what is right', () => {
  it.each([true, false])('does nothing (closed: %s)', async (closed) => {
    const made = await make(1, { closed });
    expect(await mend(made)).toMatchObject({ actions: [], left: [] });
  });
});

describe('repair brings back', () => {
  it.each([
    [true, true],
    [true, false],
    [false, true],
    [false, false],
  ])('everything when volumes/ is gone (encrypted: %s, closed: %s)', async (encrypted, closed) => {
    const made = await make(2, { encrypted, closed });
    const { store, repo, model } = made;
    for (const name of await names(store, 'volumes')) await store.delete(name);
    expect(
      damage(await check(repo)).filter((d) => d.startsWith('unlisted')).length,
    ).toBeGreaterThan(3);
    const report = await mend(made);
    expect(report.left).toEqual([]);
    expect(damage(await check(repo))).toEqual([]);
    expect(await broken(repo, model)).toEqual([]);
    expect((await readVolumeMeta(repo, model.volumeId)).name).toBe(`lost-${model.volumeId}`);
    await captureAgain(made);
    expect(await broken(repo, model)).toEqual([]);
    expect(damage(await check(repo))).toEqual([]);
  });

  it('the name of a volume, and of the group that its newest point was made with', async () => {
    const made = await make(4);
    const { store, repo, model } = made;
    const { writer, history } = await VolumeWriter.claim(repo, model.volumeId);
    await history.close();
    const nowNs = repo.env.clock.nowNs();
    await writer.commit({
      pointClass: PointClass.crash,
      coverage: Coverage.exact,
      full: false,
      instantNs: nowNs,
      startedNs: nowNs,
      sizeBytes: DEVICE_BYTES,
      extents: [],
      storedBytes: 0,
      facts: { volume: 'web/sdb', host: 'web', group: 'data' },
    });
    await writer.close();
    await store.delete(`volumes/${model.volumeId}/meta`);
    await mend(made);
    expect(await readVolumeMeta(repo, model.volumeId)).toMatchObject({
      name: 'web/sdb',
      host: 'web',
      facts: { group: 'data' },
    });
  });

  it('every kind of object below volumes/ that is damaged or deleted', async () => {
    const made = await make(3);
    const { store, repo, model } = made;
    let cases = 0;
    for (const name of await names(store, 'volumes')) {
      for (const how of ['flip', 'cut', 'delete'] as const) {
        const before = await store.get(name);
        if (how === 'flip') await flip(store, name, Math.floor(before.length / 2));
        else if (how === 'cut')
          await store.put(name, before.subarray(0, Math.floor(before.length / 3)));
        else await store.delete(name);
        const harmless = how === 'delete' && name.includes('/journal/');
        expect([name, how, damage(await check(repo)).length > 0]).toEqual([name, how, !harmless]);
        const report = await mend(made);
        expect(report.left).toEqual([]);
        expect([name, how, damage(await check(repo))]).toEqual([name, how, []]);
        expect(await broken(repo, model)).toEqual([]);
        cases++;
      }
    }
    expect(cases).toBeGreaterThanOrEqual(9);
    await captureAgain(made);
    expect(await broken(repo, model)).toEqual([]);
  });

  it.each(['config', 'config.copy'])('%s, from the other', async (name) => {
    for (const how of ['flip', 'delete'] as const) {
      const made = await make(4, { encrypted: true, packs: 1 });
      const { store } = made;
      const before = await store.get(name);
      if (how === 'flip') await flip(store, name, 200);
      else await store.delete(name);
      const warnings: string[] = [];
      const repo = await Repository.open(store, [PASSWORD], testEnvironment(seeded(9)), (m) =>
        warnings.push(m),
      );
      expect(warnings.length).toBe(name === 'config' ? 1 : 0);
      expect(damage(await check(repo))).toEqual([`config ${name}`]);
      await mend({ ...made, repo });
      expect(damage(await check(repo))).toEqual([]);
      expect(await store.get(name)).toEqual(before);
    }
  });

  it('headers and footers of packs', async () => {
    const made = await make(5);
    const { store, repo, model } = made;
    for (const packId of await packIds(store)) {
      const name = packName(packId);
      const before = await store.get(name);
      const pack = await OpenPack.open(repo.packContext(), packId);
      const footerAt = pack.validBytes;
      await pack.close();
      const places: [string, number][] = [
        ['header', 20],
        ['time in the header', 50],
        ['footer header', footerAt + 8],
        ['footer body', footerAt + 80],
        ['trailer', before.length - 5],
      ];
      for (const [what, at] of places) {
        await flip(store, name, at);
        expect([what, damage(await check(repo)).length > 0]).toEqual([what, true]);
        const report = await mend(made);
        expect([what, report.left]).toEqual([what, []]);
        expect([what, damage(await check(repo))]).toEqual([what, []]);
        expect(await broken(repo, model)).toEqual([]);
        await store.put(name, before);
      }
      // A pack that has lost its end, but none of its frames.
      await store.put(name, before.subarray(0, footerAt + 3));
      await mend(made);
      expect(damage(await check(repo))).toEqual([]);
      expect(await broken(repo, model)).toEqual([]);
      await store.put(name, before);
    }
  });
});

describe('repair sets aside', () => {
  it('damaged frames of chunks: the points that need them stay damaged, and only those', async () => {
    const made = await make(6);
    const { store, repo, model } = made;
    for (const packId of await packIds(store)) {
      const pack = await OpenPack.open(repo.packContext(), packId);
      const frame = pack.footer.frames.find((f) => f.type === FrameType.chunks);
      await pack.close();
      if (frame === undefined) continue;
      await flip(store, packName(packId), frame.offset + 60);
    }
    const bad = await broken(repo, model);
    expect(bad.length).toBeGreaterThan(0);
    const report = await mend(made);
    expect(report.actions.map((a) => a.kind)).toEqual(
      (await packIds(store)).map(() => 'quarantine'),
    );
    expect(await broken(repo, model)).toEqual(bad);
    const after = await check(repo);
    expect(after.findings.every((f) => f.kind === 'quarantine')).toBe(true);
    expect(after.volumes[0]?.damagedPoints).toBe(bad.length);
    // What the device still has is stored again, and the new points are whole.
    await captureAgain(made);
    expect(await broken(repo, model)).toEqual(bad);
    expect((await check(repo)).volumes[0]?.newestWhole?.seq).toBe(model.acknowledged.length);
  });

  it('and lets go of frames that are whole again', async () => {
    const made = await make(7, { packs: 1 });
    const { store, repo } = made;
    const [packId = ''] = await packIds(store);
    const before = await store.get(packName(packId));
    await flip(store, packName(packId), 120);
    await mend(made);
    expect(await names(store, 'quarantine')).toHaveLength(1);
    await store.put(packName(packId), before);
    await repo.packs.close();
    const report = await mend(made);
    expect(report.actions.map((a) => a.kind)).toEqual(['release']);
    expect((await check(repo)).findings).toEqual([]);
  });

  it('damaged commit frames, which the manifest still has', async () => {
    const made = await make(8);
    const { store, repo, model } = made;
    const [first = ''] = await packIds(store);
    const pack = await OpenPack.open(repo.packContext(), first);
    const commit = pack.footer.frames.find((f) => f.type === FrameType.commit);
    await pack.close();
    await flip(store, packName(first), (commit?.offset ?? 0) + 40);
    await mend(made);
    expect(await broken(repo, model)).toEqual([]);
    await captureAgain(made);
    expect(await broken(repo, model)).toEqual([]);
  });
});

describe('commits that are lost', () => {
  /** Deletes volumes/ and damages one commit frame in the middle: nobody knows that commit any more. */
  async function lose(made: Made, nth: number): Promise<number> {
    const { store, repo } = made;
    for (const name of await names(store, 'volumes')) await store.delete(name);
    await repo.packs.close();
    let seen = 0;
    const order: { packId: string; offset: number; seq: number }[] = [];
    for (const packId of await packIds(store)) {
      const pack = await OpenPack.open(repo.packContext(), packId);
      for (const f of pack.footer.frames) {
        if (f.type !== FrameType.commit) continue;
        const { body } = await pack.readFrame(f.number);
        order.push({ packId, offset: f.offset, seq: Number(body.readBigUInt64LE(24)) });
      }
      await pack.close();
    }
    order.sort((a, b) => a.seq - b.seq);
    for (const o of order) {
      if (++seen !== nth) continue;
      await flip(store, packName(o.packId), o.offset + 50);
      return o.seq;
    }
    throw new Error('no such commit');
  }

  it.each([true, false])(
    'cost what builds on them, and nothing else (encrypted: %s)',
    async (encrypted) => {
      for (const nth of [1, 2, 7, 13]) {
        const made = await make(30 + nth, { encrypted });
        const { repo, model } = made;
        const tip = model.acknowledged.length;
        const seq = await lose(made, nth);
        const report = await mend(made);
        expect(
          report.actions
            .filter((a) => a.kind === 'lost' || a.kind === 'restart')
            .map((a) => a.kind),
        ).toEqual(['lost', 'restart']);
        expect(report.changedVolumes).toEqual([model.volumeId]);
        // The chain up to the gap stays; what is behind it is kept and named, and gives an error, never wrong bytes.
        expect(await broken(repo, model)).toEqual(
          Array.from({ length: tip - seq + 1 }, (_, i) => seq + i),
        );
        const words = report.left.map((l) => l.message).join('; ');
        if (seq < tip) expect(words).toContain(`commits ${seq + 1} to ${tip}`);
        // The volume is captured again, on the same chain.
        await captureAgain(made);
        const history = await VolumeHistory.open(repo, model.volumeId);
        expect(history.tip?.seq).toBe(tip + 3);
        expect(history.chain.gap).toBeUndefined();
        expect(history.lost).toEqual([{ firstSeq: seq, lastSeq: seq }]);
        history.refuseGap();
        await history.close();
        const after = await check(repo);
        expect(after.volumes[0]?.newestWhole?.seq).toBe(tip + 3);
        for (const e of model.acknowledged.slice(tip)) await checkPoint(repo, model.volumeId, e);
        // Prune goes on working, and takes nothing that a readable point needs.
        await prune(repo, { graceMs: 0 });
        await prune(repo, { graceMs: 0 });
        for (const e of [
          ...model.acknowledged.slice(0, seq - 1),
          ...model.acknowledged.slice(tip),
        ]) {
          await checkPoint(repo, model.volumeId, e);
        }
        expect((await repair(repo)).actions).toEqual([]);
      }
    },
    60_000,
  );

  it('are not given up, and nothing is added, while the manifest only is damaged', async () => {
    const made = await make(50);
    const { store, repo, model } = made;
    const segments = await names(store, `volumes/${model.volumeId}/manifest`);
    await store.delete(segments[1] ?? '');
    await repo.packs.close();
    // A writer would fork the chain; prune would delete what the lost segment used.
    await expect(VolumeWriter.claim(repo, model.volumeId)).rejects.toMatchObject({
      kind: 'damaged',
    });
    await expect(prune(repo, { graceMs: 0 })).rejects.toMatchObject({ kind: 'refused' });
    await store.delete(segments.at(-1) ?? '');
    const report = await mend(made);
    expect(report.actions.every((a) => a.kind === 'segment')).toBe(true);
    expect(await broken(repo, model)).toEqual([]);
  });
});
