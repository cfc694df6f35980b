import { describe, expect, it } from 'vitest';
import { ignoreEvents } from '../../../src/events.js';
import { FrameType } from '../../../src/format/frame.js';
import { packIdOf, packName } from '../../../src/format/names.js';
import { OpenPack } from '../../../src/repo/pack-reader.js';
import type { Repository } from '../../../src/repo/repository.js';
import { VolumeWriter } from '../../../src/repo/volume-writer.js';
import type { Finding } from '../../../src/verify/findings.js';
import { verify, type VerifyOptions, type VerifyReport } from '../../../src/verify/verify.js';
import { ModelVolume, newModel, seeded, checkPoint } from '../../support/model-volume.js';
import { MemoryStore } from '../../support/store-memory.js';

const DEVICE_BYTES = 256 * 1024;

interface Made {
  readonly store: MemoryStore;
  readonly repo: Repository;
  readonly model: ModelVolume;
}

/** Several packs, segments of them, and (unless `closed`) commits that are in the journal only. */
async function make(seed: number, options: { encrypted?: boolean; closed?: boolean; canAppend?: boolean } = {}): Promise<Made> {
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

function run(repo: Repository, more: Partial<VerifyOptions> = {}): Promise<VerifyReport> {
  return verify(repo, { events: ignoreEvents, dataShare: 1, ...more });
}

const damage = (r: VerifyReport): Finding[] => r.findings.filter((f) => f.severity !== 'note');

describe('verify of what is right', () => {
  it.each([
    [true, true, true],
    [false, true, true],
    [false, false, true],
    [false, true, false],
    [false, false, false],
  ])('finds nothing (encrypted: %s, closed: %s, append: %s)', async (encrypted, closed, canAppend) => {
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
  });
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
  return model.acknowledged.map((e) => e.seq).filter((seq) => runs.some((r) => seq >= r.firstSeq && seq <= r.lastSeq));
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
            frames: [{ number: frame.number, offsetBytes: frame.offset, lengthBytes: frame.storedBytes + 32 }],
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
      expect(damage(report).map((f) => [f.kind, f.object])).toEqual([['missing', packName(packId)]]);
      await store.put(packName(packId), before);
    }
  });
});
