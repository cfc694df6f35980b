import { describe, expect, it } from 'vitest';
import { ignoreEvents } from '../../../src/events.js';
import { FrameType } from '../../../src/format/frame.js';
import { packIdOf, packName } from '../../../src/format/names.js';
import { OpenPack } from '../../../src/repo/pack-reader.js';
import { Catalogue } from '../../../src/repo/catalogue.js';
import { Repository } from '../../../src/repo/repository.js';
import { VolumeWriter } from '../../../src/repo/volume-writer.js';
import type { Finding } from '../../../src/verify/findings.js';
import { verify, type VerifyOptions, type VerifyReport } from '../../../src/verify/verify.js';
import {
  CHEAP,
  ModelVolume,
  PASSWORD,
  newModel,
  seeded,
  checkPoint,
} from '../../support/model-volume.js';
import { SteppedClock } from '../../support/stepped-clock.js';
import { tempDir } from '../../support/tmp.js';
import { MemoryStore } from '../../support/store-memory.js';

const DEVICE_BYTES = 256 * 1024;

interface Made {
  readonly store: MemoryStore;
  readonly repo: Repository;
  readonly model: ModelVolume;
}

/** Several packs, segments of them, and (unless `closed`) commits that are in the journal only. */
async function make(
  seed: number,
  options: { encrypted?: boolean; closed?: boolean; canAppend?: boolean } = {},
): Promise<Made> {
  const random = seeded(seed);
  const store = new MemoryStore({ record: false, canAppend: options.canAppend ?? true });
  const { repo, model, writer } = await newModel(store, random, {
    sizeBytes: DEVICE_BYTES,
    ...(options.encrypted === undefined ? {} : { encrypted: options.encrypted }),
  });
  const all = Array.from({ length: DEVICE_BYTES / 4096 }, (_, i) => i);
  model.mutate(20);
  await model.capture(writer, all, true);
  for (let pack = 0; pack < 4; pack++) {
    for (let i = 0; i < 4; i++) await model.capture(writer, model.mutate(2));
    await writer.finishPack();
  }
  for (let i = 0; i < 2; i++) await model.capture(writer, model.mutate(2));
  if (options.closed !== false) await writer.close();
  return { store, repo, model };
}

function clockOf(repo: Repository): SteppedClock {
  if (repo.env.clock instanceof SteppedClock) return repo.env.clock;
  throw new Error('not the clock of a test');
}

function run(repo: Repository, more: Partial<VerifyOptions> = {}): Promise<VerifyReport> {
  return verify(repo, { events: ignoreEvents, dataShare: 1, ...more });
}

const damage = (r: VerifyReport): Finding[] => r.findings.filter((f) => f.severity !== 'note');

describe('verify of what is right', () => {
  it('does not take a pack for what it was when this process opened it', async () => {
    const store = new MemoryStore({ record: false, canAppend: true });
    const { repo, model, writer } = await newModel(store, seeded(7), { sizeBytes: DEVICE_BYTES });
    model.mutate(20);
    await model.capture(
      writer,
      Array.from({ length: DEVICE_BYTES / 4096 }, (_, i) => i),
      true,
    );
    const old = new Map<string, number>();
    const open = await Repository.open(store, [], repo.env);
    for await (const { name } of store.list('packs')) {
      const packId = packIdOf(name);
      if (packId === undefined) throw new Error(name);
      old.set(packId, await open.packs.use(packId, (p) => Promise.resolve(p.footer.frames.length)));
    }
    await model.capture(writer, model.mutate(5));
    await writer.close();
    let grown = 0;
    for (const [packId, frames] of old) {
      repo.packs.forget(packId);
      if ((await repo.packs.use(packId, (p) => Promise.resolve(p.footer.frames.length))) > frames)
        grown++;
    }
    expect(grown).toBeGreaterThan(0);
    expect((await run(open)).findings).toEqual([]);
    await open.close();
    await repo.close();
  });

  it.each([
    [true, true, true],
    [false, true, true],
    [false, false, true],
    [false, true, false],
    [false, false, false],
  ])(
    'finds nothing (encrypted: %s, closed: %s, append: %s)',
    async (encrypted, closed, canAppend) => {
      const { repo, model } = await make(1, { encrypted, closed, canAppend });
      const report = await run(repo);
      expect(report.findings).toEqual([]);
      expect(report.volumes).toHaveLength(1);
      expect(report.volumes[0]).toMatchObject({
        name: 'host/sda',
        commits: model.acknowledged.length,
        newest: { seq: model.acknowledged.length },
        newestWhole: { seq: model.acknowledged.length },
        damagedPoints: 0,
      });
      expect(report.data?.frames).toBeGreaterThan(20);
      expect(report.data?.leftPacks).toBe(0);
    },
  );
});

/** Points that do not restore bit for bit. */
async function broken(repo: Repository, model: ModelVolume): Promise<number[]> {
  const list: number[] = [];
  await repo.packs.close();
  for (const e of model.acknowledged) {
    try {
      await checkPoint(repo, model.volumeId, e);
    } catch {
      list.push(e.seq);
    }
  }
  return list;
}

/** What a report says is touched, as sequence numbers of points. */
function touched(report: VerifyReport, model: ModelVolume): number[] {
  const runs = report.findings.flatMap((f) => f.touches ?? []).flatMap((t) => t.runs);
  return model.acknowledged
    .map((e) => e.seq)
    .filter((seq) => runs.some((r) => seq >= r.firstSeq && seq <= r.lastSeq));
}

async function packIds(store: MemoryStore): Promise<string[]> {
  const ids: string[] = [];
  for await (const { name } of store.list('packs')) {
    const id = packIdOf(name);
    if (id !== undefined) ids.push(id);
  }
  return ids;
}

async function flip(store: MemoryStore, name: string, at: number, bit = 1): Promise<void> {
  const bytes = await store.get(name);
  bytes[at] = (bytes[at] ?? 0) ^ bit;
  await store.put(name, bytes);
}

describe('damage is located', () => {
  it('names exactly the points, the frame and the blocks that a damaged frame touches', async () => {
    let cases = 0;
    let touching = 0;
    for (const seed of [11, 12]) {
      const { store, repo, model } = await make(seed);
      for (const packId of await packIds(store)) {
        const pack = await OpenPack.open(repo.packContext(), packId);
        const frames = pack.footer.frames.filter((f) => f.type === FrameType.chunks);
        await pack.close();
        for (const frame of frames.filter((_, i) => i % 3 === 0)) {
          const before = await store.get(packName(packId));
          await flip(store, packName(packId), frame.offset + 40);
          const report = await run(repo);
          const bad = await broken(repo, model);
          expect(touched(report, model)).toEqual(bad);
          const [finding, ...others] = damage(report);
          expect(others).toEqual([]);
          expect(finding).toMatchObject({
            kind: 'frame',
            severity: 'damage',
            object: packName(packId),
            frames: [
              {
                number: frame.number,
                offsetBytes: frame.offset,
                lengthBytes: frame.storedBytes + 32,
              },
            ],
          });
          const good = model.acknowledged.map((e) => e.seq).filter((seq) => !bad.includes(seq));
          expect(report.volumes[0]?.newestWhole?.seq).toBe(good.at(-1));
          expect(report.volumes[0]?.damagedPoints).toBe(bad.length);
          const bytes = finding?.touches?.[0]?.ranges.reduce((n, r) => n + r.length, 0) ?? 0;
          expect(bytes > 0).toBe(bad.length > 0);
          await store.put(packName(packId), before);
          cases++;
          if (bad.length > 0) touching++;
        }
      }
      expect(damage(await run(repo))).toEqual([]);
    }
    expect(cases).toBeGreaterThan(20);
    expect(touching).toBeGreaterThan(10);
  });

  it('says what a missing pack takes with it', async () => {
    const { store, repo, model } = await make(13);
    for (const packId of await packIds(store)) {
      const before = await store.get(packName(packId));
      await store.delete(packName(packId));
      repo.packs.forget(packId);
      const report = await run(repo, { dataShare: 0 });
      const bad = await broken(repo, model);
      expect(bad.length).toBeGreaterThan(0);
      expect(touched(report, model)).toEqual(bad);
      expect(damage(report).map((f) => [f.kind, f.object])).toEqual([
        ['missing', packName(packId)],
      ]);
      await store.put(packName(packId), before);
    }
  });
});

async function catalogueFor(repo: Repository, dir: string): Promise<Catalogue> {
  return Catalogue.open({
    cacheDir: dir,
    repositoryId: repo.id,
    clock: repo.env.clock,
    warn: (m) => expect.fail(m),
  });
}

describe('a budget', () => {
  it('comes round to everything, the newest first, and then to what was verified longest ago', async () => {
    await using dir = tempDir();
    const { store, repo } = await make(41);
    await using catalogue = await catalogueFor(repo, dir.path);
    const count = (await packIds(store)).length;
    const created = new Map<string, bigint>();
    for (const id of await packIds(store)) {
      const pack = await OpenPack.open(repo.packContext(), id);
      created.set(id, pack.header.createdNs);
      await pack.close();
    }
    const newestFirst = [...created].sort((a, b) => (a[1] > b[1] ? -1 : 1)).map(([id]) => id);
    const order: string[] = [];
    for (let i = 0; i < count; i++) {
      const before = await catalogue.packs();
      const report = await run(repo, { dataShare: 0.01, catalogue });
      expect(report.data?.packs).toBe(1);
      const after = await catalogue.packs();
      order.push(...[...after.keys()].filter((id) => !before.has(id)));
      expect(report.data?.oldestNs === undefined).toBe(i < count - 1);
      await clockOf(repo).advanceMs(1000);
    }
    expect(order).toEqual(newestFirst);
    // The second round begins with the one that was verified longest ago.
    await run(repo, { dataShare: 0.01, catalogue });
    const times = await catalogue.packs();
    const latest = [...times.values()].sort((a, b) =>
      Number((b.verifiedNs ?? 0n) - (a.verifiedNs ?? 0n)),
    )[0];
    expect(latest?.packId).toBe(newestFirst[0]);
    // A budget that is over before it begins reads nothing, and says what is left.
    const none = await run(repo, { budgetMs: 0, catalogue });
    expect(none.data).toMatchObject({ packs: 0, leftPacks: count });
  });

  it('does not forget damage that an earlier run has found', async () => {
    await using dir = tempDir();
    const { store, repo } = await make(42);
    await using catalogue = await catalogueFor(repo, dir.path);
    const [packId = ''] = await packIds(store);
    const before = await store.get(packName(packId));
    await flip(store, packName(packId), 120);
    expect(damage(await run(repo, { catalogue })).map((f) => f.kind)).toEqual(['frame']);
    expect(damage(await run(repo, { dataShare: 0, catalogue })).map((f) => f.object)).toEqual([
      packName(packId),
    ]);
    // It is the first to be looked at again.
    await store.put(packName(packId), before);
    expect(damage(await run(repo, { dataShare: 0.01, catalogue }))).toEqual([]);
    expect(damage(await run(repo, { dataShare: 0, catalogue }))).toEqual([]);
  });
});

async function copyOf(store: MemoryStore): Promise<Map<string, Buffer>> {
  const all = new Map<string, Buffer>();
  for await (const { name } of store.list('')) all.set(name, await store.get(name));
  return all;
}

async function putBack(store: MemoryStore, all: ReadonlyMap<string, Buffer>): Promise<void> {
  for await (const { name } of store.list('')) if (!all.has(name)) await store.delete(name);
  for (const [name, bytes] of all) await store.put(name, bytes);
}

describe('a repository that was put back', () => {
  it('is found by who has seen more', async () => {
    await using dir = tempDir();
    const { store, repo, model } = await make(51);
    await using catalogue = await catalogueFor(repo, dir.path);
    const old = await copyOf(store);
    const { writer, history } = await VolumeWriter.claim(repo, model.volumeId);
    await history.close();
    for (let i = 0; i < 3; i++) await model.capture(writer, model.mutate(2));
    await writer.close();
    expect((await run(repo, { catalogue })).findings).toEqual([]);
    await putBack(store, old);
    await repo.packs.close();
    // Consistent in itself.
    expect((await run(repo)).findings).toEqual([]);
    for (let i = 0; i < 2; i++) {
      expect(damage(await run(repo, { catalogue })).map((f) => f.kind)).toEqual(['rollback']);
    }
    // Also when somebody has gone on from there: the commit is another one then.
    const fork = new ModelVolume(model.volumeId, DEVICE_BYTES, seeded(52), clockOf(repo));
    const next = await VolumeWriter.claim(repo, model.volumeId);
    await next.history.close();
    for (let i = 0; i < 6; i++) await fork.capture(next.writer, fork.mutate(2));
    await next.writer.close();
    expect(damage(await run(repo, { catalogue })).map((f) => f.kind)).toEqual(['rollback']);
    // A volume that is gone altogether.
    for await (const { name } of store.list('volumes')) await store.delete(name);
    expect(damage(await run(repo, { catalogue })).map((f) => f.kind)).toContain('rollback');
  });

  it('is found when only its keys are from before a change', async () => {
    await using dir = tempDir();
    const { store, repo } = await make(53, { encrypted: true });
    await using catalogue = await catalogueFor(repo, dir.path);
    await run(repo, { dataShare: 0, catalogue });
    const old = await store.get('config');
    await repo.addKey({ kind: 'password', password: 'other', source: 'the test' }, 'other', CHEAP);
    expect((await run(repo, { dataShare: 0, catalogue })).findings).toEqual([]);
    await store.put('config', old);
    expect(damage(await run(repo, { dataShare: 0, catalogue })).map((f) => f.kind)).toEqual([
      'config',
    ]);
    await store.put('config.copy', old);
    const reopened = await Repository.open(store, [PASSWORD], repo.env);
    expect(
      damage(await run(reopened, { dataShare: 0, catalogue })).map((f) => [f.kind, f.object]),
    ).toEqual([['rollback', 'config']]);
  });
});

describe('files that are exchanged, cut, deleted or put back one by one', () => {
  it('are all found', async () => {
    const { store, repo } = await make(61, { encrypted: true });
    const all = [...(await copyOf(store))].filter(([name]) => !name.startsWith('locks/'));
    let cases = 0;
    const expectDamage = async (what: string): Promise<void> => {
      cases++;
      await repo.packs.close();
      expect([what, damage(await run(repo, { dataShare: 0 })).length > 0]).toEqual([what, true]);
    };
    const random = seeded(62);
    for (const [name, bytes] of all) {
      await store.delete(name);
      await expectDamage(`${name} deleted`);
      for (const end of new Set([
        0,
        1,
        47,
        63,
        64,
        65,
        bytes.length - 1,
        bytes.length - 16,
        ...Array.from({ length: 4 }, () => Math.floor(random() * bytes.length)),
      ])) {
        if (end < 0 || end >= bytes.length) continue;
        await store.put(name, bytes.subarray(0, end));
        await expectDamage(`${name} cut at ${end}`);
      }
      await store.put(name, Buffer.concat([bytes, Buffer.alloc(7)]));
      // Bytes behind a pack make its footer invisible; behind anything else they are not what was written.
      await expectDamage(`${name} with bytes added`);
      for (const [other, foreign] of all) {
        if (other === name || foreign.equals(bytes) || other.split('/')[0] !== name.split('/')[0])
          continue;
        await store.put(name, foreign);
        await expectDamage(`${other} put in the place of ${name}`);
        break;
      }
      await store.put(name, bytes);
    }
    expect(cases).toBeGreaterThan(100);
    await repo.packs.close();
    expect((await run(repo)).findings).toEqual([]);
  }, 60_000);
});
