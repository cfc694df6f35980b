/**
 * Every object of a small repository, damaged byte by byte: verify must say so, or the byte must be one that provably changes nothing that
 * anybody reads.
 */
import { describe, expect, it } from 'vitest';
import { ignoreEvents } from '../../../src/events.js';
import type { Repository } from '../../../src/repo/repository.js';
import { addSnapshot } from '../../../src/repo/volume.js';
import { VolumeHistory } from '../../../src/repo/history.js';
import { PointClass } from '../../../src/format/commit.js';
import { prune } from '../../../src/retention/prune.js';
import { Catalogue } from '../../../src/repo/catalogue.js';
import { verify, type VerifyReport } from '../../../src/verify/verify.js';
import {
  CHEAP,
  checkPoint,
  newModel,
  seeded,
  type ModelVolume,
} from '../../support/model-volume.js';
import { tempDir } from '../../support/tmp.js';
import { MemoryStore } from '../../support/store-memory.js';

const DEVICE_BYTES = 96 * 1024;

interface Made {
  readonly store: MemoryStore;
  readonly repo: Repository;
  readonly model: ModelVolume;
}

/** Packs with and without a footer, segments, a journal, claims, a snapshot, a second key, a condemned object. */
async function make(seed: number, encrypted: boolean): Promise<Made> {
  const random = seeded(seed);
  const store = new MemoryStore({ record: false });
  const { repo, model, writer } = await newModel(store, random, {
    sizeBytes: DEVICE_BYTES,
    encrypted,
  });
  model.mutate(8);
  await model.capture(
    writer,
    Array.from({ length: DEVICE_BYTES / 4096 }, (_, i) => i),
    true,
  );
  for (let pack = 0; pack < 2; pack++) {
    for (let i = 0; i < 2; i++) await model.capture(writer, model.mutate(1));
    await writer.finishPack();
  }
  if (encrypted)
    await repo.addKey(
      { kind: 'password', password: 'another', source: 'the test' },
      'second',
      CHEAP,
    );
  const history = await VolumeHistory.open(repo, model.volumeId);
  await addSnapshot(repo, {
    name: 'before',
    volumeId: model.volumeId,
    seq: history.tip?.seq ?? 0,
    hash: history.tip?.hash.toString('hex') ?? '',
    instantNs: 1n,
    pointClass: PointClass.crash,
    tags: [],
    createdNs: 2n,
  });
  await history.close();
  await prune(repo, { graceMs: 0 });
  // What follows is in the journal only, in a pack without a footer.
  await model.capture(writer, model.mutate(1));
  await model.capture(writer, model.mutate(1));
  return { store, repo, model };
}

async function contents(store: MemoryStore): Promise<Map<string, Buffer>> {
  const all = new Map<string, Buffer>();
  for await (const { name } of store.list('')) {
    if (!name.startsWith('locks/')) all.set(name, await store.get(name));
  }
  return all;
}

async function run(repo: Repository, dataShare = 1, catalogue?: Catalogue): Promise<VerifyReport> {
  await repo.packs.close();
  return verify(repo, { events: ignoreEvents, dataShare, catalogue });
}

const isDamage = (r: VerifyReport): boolean => r.findings.some((f) => f.severity === 'damage');

/** Offsets: of the first object of a kind every `step`th of the first 64 and the last 48 bytes (headers, trailers); and a sample of every object. */
function offsets(length: number, first: boolean, step: number, random: () => number): number[] {
  const list = new Set<number>();
  for (let i = 0; first && i < Math.min(length, 64); i += step) list.add(i);
  for (let i = Math.max(0, length - 48); first && i < length; i += step) list.add(i);
  for (let i = 0; i < 6 && length > 0; i++) list.add(Math.floor(random() * length));
  return [...list];
}

/** The acknowledged points that do not restore. */
async function lost(repo: Repository, model: ModelVolume): Promise<number[]> {
  const list: number[] = [];
  await repo.packs.close();
  for (const e of model.acknowledged)
    await checkPoint(repo, model.volumeId, e).catch(() => list.push(e.seq));
  return list;
}

describe('bit flips', () => {
  it.each([true, false])(
    'are found, or harmless (encrypted: %s)',
    async (encrypted) => {
      const { store, repo, model } = await make(encrypted ? 21 : 22, encrypted);
      expect((await run(repo)).findings).toEqual([]);
      await using dir = tempDir();
      await using catalogue = await Catalogue.open({
        cacheDir: dir.path,
        repositoryId: repo.id,
        clock: repo.env.clock,
        warn: (message) => expect.fail(message),
      });
      const objects = await contents(store);
      const random = seeded(23);
      const kinds = new Map<string, { flips: number; harmless: number; torn: number }>();
      for (const [name, bytes] of objects) {
        const isOpen =
          name.startsWith('packs/') && bytes.readUInt32LE(bytes.length - 16) !== 0x4550_3242;
        const kind = isOpen
          ? 'the open pack'
          : name
              .replace(/[0-9a-f]{16,}/g, 'ID')
              .replace(/packs\/../, 'packs/XX')
              .replace(/[0-9a-f]{8}$/, 'N');
        const first = !kinds.has(kind);
        const count = kinds.get(kind) ?? { flips: 0, harmless: 0, torn: 0 };
        kinds.set(kind, count);
        for (const at of offsets(bytes.length, first, encrypted ? 1 : 3, random)) {
          const changed = Buffer.from(bytes);
          changed[at] = (changed[at] ?? 0) ^ (1 << Math.floor(random() * 8));
          await store.put(name, changed);
          count.flips++;
          const report = await run(repo, name.startsWith('packs/') ? 1 : 0);
          if (isDamage(report)) continue;
          // Not found: it must do no harm, or be what only memory can find.
          const gone = await lost(repo, model);
          if (gone.length === 0) {
            count.harmless++; // proven: every acknowledged point restores bit for bit
            continue;
          }
          // FORMAT.md section 10: behind the last segment it looks like the torn end of a crash, and only who has seen more can tell.
          expect(`${kind} ${at}`).toMatch(/^the open pack/);
          count.torn++;
          const tip = model.acknowledged.length;
          expect(gone.every((seq) => seq > tip - 2)).toBe(true);
          if (count.torn % 10 !== 1) continue;
          await catalogue.recordTip({
            volumeId: model.volumeId,
            name: 'v',
            seq: tip,
            hash: 'any',
            instantNs: 1n,
          });
          expect((await run(repo, 0, catalogue)).findings.map((f) => f.kind)).toContain('rollback');
          await catalogue.forgetTip(model.volumeId);
        }
        await store.put(name, bytes);
      }
      const table = [...kinds].map(
        ([k, c]) => `${k}: ${c.flips} flips, ${c.harmless} harmless, ${c.torn} like a crash`,
      );
      console.info(table.join('\n'));
      // What is harmless: bytes that no reader looks at, which only a pack without a footer has.
      for (const [kind, c] of kinds)
        if (kind !== 'the open pack') expect([kind, c.harmless]).toEqual([kind, 0]);
      expect((await run(repo)).findings).toEqual([]);
    },
    120_000,
  );
});
