import { describe, expect, it } from 'vitest';

import { B2Error } from '../../../src/errors.js';
import { ignoreEvents } from '../../../src/events.js';
import { packName } from '../../../src/format/names.js';
import { OpenPack } from '../../../src/repo/pack-reader.js';
import { openStore } from '../../../src/repo/store-url.js';
import type { Store } from '../../../src/repo/store.js';
import { verifyPacks, type VerifyPacksOptions } from '../../../src/verify/data.js';
import { SteppedClock } from '../../support/stepped-clock.js';
import { makePackImage, type PackImage } from '../../support/pack-image.js';
import { MemoryStore } from '../../support/store-memory.js';
import { tempDir } from '../../support/tmp.js';

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

  it('tells what every pack was that it read', async () => {
    const made = await image(7);
    const [first = '', second = ''] = made.packIds;
    await made.store.delete(packName(second));
    const { opened } = await verifyPacks(all(made), options(made));
    expect(new Set(opened.keys())).toEqual(new Set(made.packIds.filter((id) => id !== second)));
    expect(opened.get(first)).toEqual({
      packId: first,
      generation: 0,
      sizeBytes: (await made.store.get(packName(first))).length,
    });
  });
});

describe('verifyPacks with another thread', () => {
  async function inDirectory(path: string): Promise<{
    made: PackImage;
    options: VerifyPacksOptions;
    opens: () => number;
    store: Store;
  }> {
    const store = await openStore(path, { create: true });
    const made = await makePackImage({ store, seed: 8, sizeBytes: 16 * MIB, storeUrl: store.url });
    let opens = 0;
    // Counts what this thread opens; the other one has a store of its own.
    const counting = new Proxy(store, {
      get(target, name) {
        if (name === 'open') opens++;
        const value: unknown = Reflect.get(target, name, target);
        return typeof value === 'function' ? (value.bind(target) as unknown) : value;
      },
    });
    return {
      made,
      opens: () => opens,
      store,
      options: {
        handle: made.handle,
        store: counting,
        clock: new SteppedClock(),
        events: ignoreEvents,
        workers: 2,
      },
    };
  }

  it('finds the same, and leaves this thread alone while it is busy', async () => {
    await using dir = tempDir();
    const bed = await inDirectory(dir.join('repo'));
    await using _store = { [Symbol.asyncDispose]: () => bed.store.close() };
    const { made, opens } = bed;
    const [, hit = '', gone = ''] = made.packIds;
    const bytes = await bed.store.get(packName(hit));
    bytes[4000] = (bytes[4000] ?? 0) ^ 1;
    await bed.store.put(packName(hit), bytes);
    await bed.store.delete(packName(gone));
    const alone = await verifyPacks(all(made), { ...bed.options, workers: 1 });
    expect(opens()).toBeGreaterThan(0);

    const before = opens();
    let free = (): void => undefined;
    const busy = new Promise<void>((resolve) => {
      free = resolve;
    });
    const running = verifyPacks(all(made), { ...bed.options, busy });
    await new Promise((resolve) => setTimeout(resolve, 20));
    expect(opens()).toBe(before);
    free();
    const both = await running;
    expect(both).toEqual({ ...alone, opened: both.opened });
    expect(new Map([...both.opened].sort())).toEqual(new Map([...alone.opened].sort()));
    expect(both.findings.map((f) => [f.kind, f.packId])).toEqual([
      ['frame', hit],
      ['missing', gone],
    ]);
  });

  it('fails when the other one does, and stops when it is interrupted', async () => {
    await using dir = tempDir();
    const bed = await inDirectory(dir.join('repo'));
    await using _store = { [Symbol.asyncDispose]: () => bed.store.close() };
    const handle = { ...bed.made.handle, storeUrl: dir.join('elsewhere') };
    const error: unknown = await verifyPacks(all(bed.made), { ...bed.options, handle }).catch(
      (e: unknown) => e,
    );
    expect(error).toBeInstanceOf(B2Error);
    expect((error as B2Error).message).toContain('elsewhere');

    const abort = new AbortController();
    const running = verifyPacks(all(bed.made), {
      ...bed.options,
      signal: abort.signal,
      busy: new Promise((resolve) => {
        abort.signal.addEventListener('abort', () => resolve());
      }),
    });
    abort.abort('SIGINT');
    await expect(running).rejects.toMatchObject({ kind: 'interrupted' });
  });
});
