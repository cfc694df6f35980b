import { describe, expect, it } from 'vitest';

import { ignoreEvents } from '../../../src/events.js';
import { packName } from '../../../src/format/names.js';
import { OpenPack } from '../../../src/repo/pack-reader.js';
import { verifyPacks, type VerifyPacksOptions } from '../../../src/verify/data.js';
import { SteppedClock } from '../../support/stepped-clock.js';
import { makePackImage, type PackImage } from '../../support/pack-image.js';
import { MemoryStore } from '../../support/store-memory.js';

const MIB = 1024 * 1024;

async function image(seed: number, encrypted = true): Promise<PackImage & { store: MemoryStore }> {
  const store = new MemoryStore({ record: false });
  return { store, ...(await makePackImage({ store, seed, sizeBytes: 16 * MIB, encrypted })) };
}

function options(
  made: PackImage & { store: MemoryStore },
  more: Partial<VerifyPacksOptions> = {},
): VerifyPacksOptions {
  return {
    handle: made.handle,
    store: made.store,
    clock: new SteppedClock(),
    events: ignoreEvents,
    workers: 0,
    ...more,
  };
}

const all = (made: PackImage): { packId: string }[] => made.packIds.map((packId) => ({ packId }));

async function flip(
  made: PackImage & { store: MemoryStore },
  packId: string,
  at: number,
): Promise<void> {
  const bytes = await made.store.get(packName(packId));
  bytes[at] = (bytes[at] ?? 0) ^ 4;
  await made.store.put(packName(packId), bytes);
}

describe('verifyPacks', () => {
  it.each([true, false])(
    'finds nothing wrong with what is right (encrypted: %s)',
    async (encrypted) => {
      const made = await image(1, encrypted);
      const result = await verifyPacks(all(made), options(made));
      expect(result).toMatchObject({
        findings: [],
        unsealed: [],
        next: made.packIds.length,
        packs: made.packIds.length,
      });
      expect(made.packIds.length).toBeGreaterThan(2);
      let frames = 0;
      for (const packId of made.packIds) {
        const pack = await OpenPack.open(made.context, packId);
        frames += pack.footer.frames.length;
        await pack.close();
      }
      expect(result.frames).toBe(frames);
    },
  );

  it.each([true, false])(
    'names every damaged frame and goes on (encrypted: %s)',
    async (encrypted) => {
      const made = await image(2, encrypted);
      const packId = made.packIds[1] ?? '';
      const pack = await OpenPack.open(made.context, packId);
      const hit = [3, 7, 20].map((i) => pack.footer.frames[i]).filter((f) => f !== undefined);
      await pack.close();
      expect(hit.length).toBe(3);
      // In the header, in the head, and in the last byte of the seal.
      await flip(made, packId, (hit[0]?.offset ?? 0) + 9);
      await flip(made, packId, (hit[1]?.offset ?? 0) + 40);
      await flip(made, packId, (hit[2]?.offset ?? 0) + 31 + (hit[2]?.storedBytes ?? 0));
      const result = await verifyPacks(all(made), options(made));
      expect(result.findings.map((f) => [f.kind, f.packId, f.frame, f.offsetBytes])).toEqual(
        hit.map((f) => ['frame', packId, f.number, f.offset]),
      );
      expect(result.next).toBe(made.packIds.length);
    },
  );

  it('looks only at the frames asked for', async () => {
    const made = await image(3);
    const packId = made.packIds[0] ?? '';
    const pack = await OpenPack.open(made.context, packId);
    const [, second, third] = pack.footer.frames;
    await pack.close();
    await flip(made, packId, (second?.offset ?? 0) + 50);
    const good = await verifyPacks([{ packId, frames: [0, third?.number ?? 0] }], options(made));
    expect(good).toMatchObject({ frames: 2, findings: [] });
    const bad = await verifyPacks([{ packId, frames: [1, 99_999] }], options(made));
    expect(bad.findings.map((f) => [f.kind, f.frame])).toEqual([
      ['frame', 1],
      ['absent', 99_999],
    ]);
  });

  it('reports missing, foreign and cut packs', async () => {
    const made = await image(4);
    const [first = '', second = '', third = ''] = made.packIds;
    await made.store.put(packName(first), await made.store.get(packName(second)));
    await made.store.delete(packName(second));
    const whole = await made.store.get(packName(third));
    await made.store.put(packName(third), whole.subarray(0, Math.floor(whole.length / 2)));
    const result = await verifyPacks(all(made), options(made));
    expect(result.findings.map((f) => [f.kind, f.packId])).toEqual([
      ['pack', first],
      ['missing', second],
    ]);
    expect(result.unsealed.map((u) => u.packId)).toEqual([third]);
    expect(result.unsealed[0]?.validBytes).toBeLessThan(whole.length / 2 + 1);
  });

  it('stops between packs at the budget and says where', async () => {
    const made = await image(5);
    const one = await verifyPacks(all(made), options(made, { budgetBytes: 1 }));
    // One pack is read ahead of the one that is worked on.
    expect(one.next).toBeGreaterThanOrEqual(1);
    expect(one.next).toBeLessThanOrEqual(2);
    expect(one.packs).toBe(one.next);
    const rest = await verifyPacks(all(made).slice(one.next), options(made));
    expect(rest.packs + one.packs).toBe(made.packIds.length);
    const none = await verifyPacks(all(made), options(made, { deadlineNs: 0n }));
    expect(none).toMatchObject({ next: 0, packs: 0, frames: 0 });
  });

  it('stops when it is interrupted', async () => {
    const made = await image(6);
    await expect(
      verifyPacks(all(made), options(made, { signal: AbortSignal.abort('SIGINT') })),
    ).rejects.toMatchObject({
      kind: 'interrupted',
    });
  });
});
