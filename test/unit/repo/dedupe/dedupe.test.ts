import { createHash } from 'node:crypto';
import { readFileSync, statSync, writeFileSync } from 'node:fs';
import { describe, expect, it } from 'vitest';
import { packName } from '../../../../src/format/names.js';
import { keyRing } from '../../../../src/format/seal.js';
import { lz4 } from '../../../../src/lz4.js';
import { loadDedupeCache } from '../../../../src/repo/dedupe/cache-file.js';
import { DedupeIndex } from '../../../../src/repo/dedupe/index.js';
import { PackFlag, PackTable } from '../../../../src/repo/dedupe/packs.js';
import {
  ChunkTable,
  frameOfPlace,
  placeWord,
  sharesFrame,
  subOfPlace,
} from '../../../../src/repo/dedupe/table.js';
import { DedupeView, Found } from '../../../../src/repo/dedupe/view.js';
import { PackWriter, type PackContext } from '../../../../src/repo/pack-writer.js';
import type { Store } from '../../../../src/repo/store.js';
import { FaultStore } from '../../../support/store-fault.js';
import { MemoryStore } from '../../../support/store-memory.js';
import { tempDir } from '../../../support/tmp.js';

const REPOSITORY = 'ab'.repeat(16);
const CHUNK = 16_384;

function context(store: Store): PackContext {
  return {
    store,
    keys: keyRing(Buffer.alloc(32, 5), true),
    lz4: lz4(),
    repositoryId: REPOSITORY,
    chunkBytes: CHUNK,
  };
}

function idOf(n: number): Buffer {
  return createHash('sha256').update(`chunk ${n}`).digest();
}

/** An id with the same first `same` bytes as chunk `n`'s: what the table keeps of both is equal. */
function twinOf(n: number, same = 31): Buffer {
  const id = Buffer.from(idOf(n));
  for (let i = same; i < 32; i++) id[i] = (id[i] ?? 0) ^ 0xff;
  return id;
}

function packIdOf(n: number): string {
  return createHash('sha256').update(`pack ${n}`).digest('hex').slice(0, 32);
}

/** A sealed pack of tiny chunks with the ids given: first `alone` of them in frames of their own, the others in one. */
async function writePack(
  ctx: PackContext,
  n: number,
  ids: readonly Buffer[],
  alone: number,
): Promise<string> {
  const writer = await PackWriter.create(ctx, packIdOf(n), 1n);
  const bytes = Buffer.alloc(4096);
  for (const id of ids.slice(0, alone)) writer.addChunk(bytes, id);
  const rest = ids.slice(alone);
  for (let i = 0; i < rest.length; i += 1000) {
    writer.addChunks(rest.slice(i, i + 1000).map((id) => ({ bytes: bytes.subarray(0, 1), id })));
    if (writer.wantsFlush) await writer.flush();
  }
  await writer.seal(Buffer.alloc(16, n));
  return writer.packId;
}

async function found(
  view: DedupeView,
  id: Buffer,
): Promise<{ pack: string; frame: number; sub: number } | undefined> {
  for (;;) {
    switch (view.find(id)) {
      case Found.needsFooter:
        await view.loadFooter();
        break;
      case Found.hit:
        return {
          pack: view.packs.idOf(view.pack),
          frame: frameOfPlace(view.place),
          sub: subOfPlace(view.place),
        };
      default:
        return undefined;
    }
  }
}

const range = (from: number, end: number): number[] =>
  Array.from({ length: end - from }, (_, i) => from + i);

describe('places', () => {
  it('keep the greatest frame and chunk of the format', () => {
    for (const [frame, sub, shared] of [
      [0, 0, false],
      [65_535, 4095, true],
      [65_535, 0, false],
    ] as const) {
      const place = placeWord(frame, sub, shared);
      expect([frameOfPlace(place), subOfPlace(place), sharesFrame(place)]).toEqual([
        frame,
        sub,
        shared,
      ]);
    }
  });
});

describe('the dedupe index', () => {
  it('finds every chunk of every sealed pack where it is, and no other', async () => {
    const ctx = context(new MemoryStore({ record: false }));
    const packs = [range(0, 150), range(150, 151), range(151, 400)];
    for (const [n, list] of packs.entries()) await writePack(ctx, n, list.map(idOf), 70);
    const open = await PackWriter.create(ctx, packIdOf(9), 1n);
    open.addChunk(Buffer.alloc(4096), idOf(1000));
    await open.sync();
    const index = await DedupeIndex.open({ ctx, cacheFile: undefined });
    expect(index.opening).toEqual({ cachedPacks: 0, readPacks: 3, skippedPacks: 1 });
    expect([index.chunkCount, index.packCount]).toEqual([400, 3]);
    const view = index.view();
    for (const [n, list] of packs.entries()) {
      for (const [i, chunk] of list.entries()) {
        const place = i < 70 ? { frame: i, sub: 0 } : { frame: 70, sub: i - 70 };
        expect(await found(view, idOf(chunk))).toEqual({ pack: packIdOf(n), ...place });
        expect(sharesFrame(view.place)).toBe(i >= 70 && list.length > 71);
      }
    }
    for (const chunk of range(400, 900)) expect(await found(view, idOf(chunk))).toBeUndefined();
    expect(await found(view, idOf(1000))).toBeUndefined(); // its pack has no footer to verify it with
    await open.abandon();
  });

  it('never believes a fingerprint: chunks whose ids differ in one byte only are kept apart', async () => {
    const ctx = context(new MemoryStore());
    await writePack(ctx, 0, [idOf(1)], 1);
    const index = await DedupeIndex.open({ ctx, cacheFile: undefined });
    index.startSession(10, 1);
    const view = index.view();
    expect(await found(view, twinOf(1))).toBeUndefined();
    const pack = view.beginPack(packIdOf(1));
    expect(view.findOrAdd(twinOf(1), pack, 0, placeWord(0, 0, false))).toBe(Found.added);
    expect(view.findOrAdd(twinOf(1, 8), pack, 1, placeWord(1, 0, false))).toBe(Found.added);
    expect(await found(view, idOf(1))).toEqual({ pack: packIdOf(0), frame: 0, sub: 0 });
    expect(await found(view, twinOf(1))).toEqual({ pack: packIdOf(1), frame: 0, sub: 0 });
    expect(await found(view, twinOf(1, 8))).toEqual({ pack: packIdOf(1), frame: 1, sub: 0 });
  });

  it('offers what a session has stored before its pack has a footer, also to another thread', async () => {
    const ctx = context(new MemoryStore());
    const index = await DedupeIndex.open({ ctx, cacheFile: undefined });
    index.startSession(1000, 2);
    const one = index.view();
    const two = index.view();
    const pack = one.beginPack(packIdOf(0));
    const other = two.beginPack(packIdOf(1));
    for (const i of range(0, 300))
      expect(one.findOrAdd(idOf(i), pack, i, placeWord(i, 0, false))).toBe(Found.added);
    for (const i of range(0, 300)) {
      expect(two.findOrAdd(idOf(i), other, 0, placeWord(0, 0, false))).toBe(Found.hit);
      expect([two.pack, two.place]).toEqual([pack, placeWord(i, 0, false)]);
    }
    expect(two.findOrAdd(idOf(300), other, 0, placeWord(0, 0, false))).toBe(Found.added);
    expect(one.find(idOf(300))).toBe(Found.hit);
    expect(index.isOwn(pack)).toBe(true);
    index.endSession(true);
    expect(index.isOwn(pack)).toBe(false);
  });

  it('verifies by the footer what is no longer among the recent ids, and misses it while there is none', async () => {
    const ctx = context(new MemoryStore());
    const ids = range(0, 500).map(idOf);
    const session = ChunkTable.create(600, 12, 100);
    const packs = PackTable.create(4);
    const view = new DedupeView(
      { packs: packs.memory, base: undefined, session: session.memory, excludedFrames: new Map() },
      ctx,
    );
    const pack = view.beginPack(packIdOf(0));
    for (const [i, id] of ids.entries()) {
      expect(view.findOrAdd(id, pack, i, placeWord(i, 0, false))).toBe(Found.added);
    }
    expect(await found(view, idOf(499))).toEqual({ pack: packIdOf(0), frame: 499, sub: 0 });
    expect(await found(view, idOf(3))).toBeUndefined();
    await writePack(ctx, 0, ids, 500);
    view.endPack(pack, 1, 500);
    for (const i of range(0, 500))
      expect(await found(view, idOf(i))).toEqual({ pack: packIdOf(0), frame: i, sub: 0 });
  });

  it('takes a full table as a reason to store, never to wait or to fail', () => {
    const session = ChunkTable.create(48, 2, 100);
    const view = new DedupeView(
      {
        packs: PackTable.create(1).memory,
        base: undefined,
        session: session.memory,
        excludedFrames: new Map(),
      },
      context(new MemoryStore()),
    );
    const pack = view.beginPack(packIdOf(0));
    let added = 0;
    for (const i of range(0, 300)) {
      const result = view.findOrAdd(idOf(i), pack, i, placeWord(i, 0, false));
      if (result === Found.added) added++;
      else expect(result).toBe(Found.miss);
    }
    expect(added).toBeGreaterThanOrEqual(48);
    expect(added).toBeLessThanOrEqual(128);
    expect(view.find(idOf(0))).toBe(Found.hit);
    expect(view.find(idOf(299))).toBe(Found.miss);
  });

  it('does not offer excluded packs and frames, and offers them again when they are no longer excluded', async () => {
    const ctx = context(new MemoryStore());
    await writePack(ctx, 0, range(0, 10).map(idOf), 5);
    await writePack(ctx, 1, range(10, 20).map(idOf), 5);
    const index = await DedupeIndex.open({ ctx, cacheFile: undefined });
    index.setExcluded({ packs: [packIdOf(0), 'ff'.repeat(16)], frames: [[packIdOf(1), [2, 5]]] });
    const view = index.view();
    const hits = async (v: DedupeView): Promise<number[]> => {
      const list: number[] = [];
      for (const i of range(0, 20)) if ((await found(v, idOf(i))) !== undefined) list.push(i);
      return list;
    };
    expect(await hits(view)).toEqual([10, 11, 13, 14]);
    index.setExcluded({ packs: [], frames: [] });
    expect(await hits(index.view())).toEqual(range(0, 20));
    expect(await hits(index.view(false))).toEqual([]);
  });

  it('an excluded pack that is found later is not offered either', async () => {
    const ctx = context(new MemoryStore());
    const index = await DedupeIndex.open({ ctx, cacheFile: undefined });
    index.setExcluded({ packs: [packIdOf(0)], frames: [] });
    await writePack(ctx, 0, [idOf(0)], 1);
    await index.refresh();
    expect(await found(index.view(), idOf(0))).toBeUndefined();
  });

  it('a pack that is gone, damaged or unreadable at the moment of a hit is a miss, said, and looked at again later', async () => {
    const store = new MemoryStore();
    const faulty = new FaultStore(store);
    const ctx = context(faulty);
    for (const n of [0, 1, 2]) await writePack(ctx, n, [idOf(n)], 1);
    const index = await DedupeIndex.open({ ctx, cacheFile: undefined });
    const good = await store.get(packName(packIdOf(1)));
    const bad = Buffer.from(good);
    bad[bad.length - 60] = (bad[bad.length - 60] ?? 0) ^ 1;
    await store.delete(packName(packIdOf(0)));
    await store.put(packName(packIdOf(1)), bad);
    const view = index.view();
    expect(await found(view, idOf(0))).toBeUndefined();
    expect(await found(view, idOf(1))).toBeUndefined();
    faulty.setFaults(({ kind }) => (kind === 'read' ? { do: 'io', retryable: true } : undefined));
    expect(await found(view, idOf(2))).toBeUndefined();
    faulty.setFaults();
    expect(index.unreadablePacks().toSorted()).toEqual([0, 1, 2].map(packIdOf).toSorted());
    expect(await found(index.view(), idOf(2))).toBeUndefined();
    await store.put(packName(packIdOf(1)), good);
    await index.refresh();
    expect(await found(index.view(), idOf(0))).toBeUndefined();
    expect(await found(index.view(), idOf(1))).toBeDefined();
    expect(await found(index.view(), idOf(2))).toBeDefined();
    expect(index.unreadablePacks()).not.toContain(packIdOf(2));
  });

  it('keeps what a session stored in sealed packs, and forgets a session that failed', async () => {
    const ctx = context(new MemoryStore());
    const index = await DedupeIndex.open({ ctx, cacheFile: undefined });
    for (const keep of [false, true]) {
      const first = keep ? 1000 : 0;
      index.startSession(200, 2);
      const view = index.view();
      const pack = view.beginPack(packIdOf(first));
      const unsealed = view.beginPack(packIdOf(first + 1));
      for (const i of range(0, 100))
        view.findOrAdd(idOf(first + i), pack, i, placeWord(i, 0, false));
      view.findOrAdd(idOf(first + 100), unsealed, 0, placeWord(0, 0, false));
      await writePack(ctx, first, range(first, first + 100).map(idOf), 100);
      view.endPack(pack, 1, 100);
      index.endSession(keep);
    }
    const view = index.view();
    expect(await found(view, idOf(5))).toBeUndefined();
    expect(await found(view, idOf(1005))).toEqual({ pack: packIdOf(1000), frame: 5, sub: 0 });
    expect(await found(view, idOf(1100))).toBeUndefined();
    await index.refresh();
    expect(await found(index.view(), idOf(5))).toEqual({ pack: packIdOf(0), frame: 5, sub: 0 });
  });

  it('grows with the repository and stays below 16 bytes a chunk', async () => {
    const ctx = context(new MemoryStore({ record: false }));
    const index = await DedupeIndex.open({ ctx, cacheFile: undefined });
    const perPack = 20_000;
    for (const n of range(0, 6)) {
      await writePack(ctx, n, range(n * perPack, (n + 1) * perPack).map(idOf), 0);
      await index.refresh();
    }
    expect(index.chunkCount).toBe(6 * perPack);
    expect(index.memoryBytes / index.chunkCount).toBeLessThan(16);
    const view = index.view();
    for (let i = 0; i < 6 * perPack; i += 7) expect(await found(view, idOf(i))).toBeDefined();
    // Opened at once it is the same.
    const again = await DedupeIndex.open({ ctx, cacheFile: undefined });
    expect(again.chunkCount).toBe(6 * perPack);
    expect(again.memoryBytes / again.chunkCount).toBeLessThan(16);
  });

  it('refuses a second session and changes during one', async () => {
    const index = await DedupeIndex.open({ ctx: context(new MemoryStore()), cacheFile: undefined });
    index.startSession(10, 1);
    expect(() => {
      index.startSession(10, 1);
    }).toThrow(/session/);
    await expect(index.refresh()).rejects.toThrow(/session/);
    await expect(index.save()).rejects.toThrow(/session/);
    index.endSession(true);
    await index.refresh();
  });

  it('says which packs are its own', async () => {
    const packs = PackTable.create(2);
    expect(packs.add(packIdOf(1), PackFlag.own)).toBe(0);
    const grown = packs.grown(5);
    expect([grown.idOf(0), grown.flagsOf(0), grown.count, grown.capacity]).toEqual([
      packIdOf(1),
      PackFlag.own,
      1,
      5,
    ]);
    expect(() => grown.idOf(1)).toThrow(RangeError);
    packs.add(packIdOf(2), 0);
    expect(() => packs.add(packIdOf(3), 0)).toThrow(/full/);
  });
});

describe('the local copy of the index', () => {
  it('is read instead of the footers, and holds the same', async () => {
    await using dir = tempDir();
    const cacheFile = dir.join('cache', 'index');
    const store = new FaultStore(new MemoryStore());
    const ctx = context(store);
    for (const n of range(0, 5))
      await writePack(ctx, n, range(n * 200, n * 200 + 200).map(idOf), 100);
    const first = await DedupeIndex.open({ ctx, cacheFile });
    await first.save();
    expect(statSync(cacheFile).mode & 0o777).toBe(0o600);
    const opens = store.calls.open;
    const index = await DedupeIndex.open({ ctx, cacheFile });
    expect(store.calls.open).toBe(opens);
    expect(index.opening).toEqual({ cachedPacks: 5, readPacks: 0, skippedPacks: 0 });
    const view = index.view();
    for (const i of range(0, 1000)) {
      const n = Math.floor(i / 200);
      const at = i % 200;
      expect(await found(view, idOf(i))).toEqual({
        pack: packIdOf(n),
        frame: Math.min(at, 100),
        sub: Math.max(0, at - 100),
      });
    }
    // Nothing changed: nothing is written.
    writeFileSync(cacheFile, 'x');
    await index.save();
    expect(readFileSync(cacheFile, 'latin1')).toBe('x');
  });

  it('learns of packs that came, went and shrank since', async () => {
    await using dir = tempDir();
    const cacheFile = dir.join('index');
    const store = new MemoryStore();
    const ctx = context(store);
    for (const n of range(0, 6)) await writePack(ctx, n, range(n * 10, n * 10 + 10).map(idOf), 10);
    await (await DedupeIndex.open({ ctx, cacheFile })).save();
    await store.delete(packName(packIdOf(0)));
    await store.delete(packName(packIdOf(1)));
    await writePack(ctx, 1, range(12, 18).map(idOf), 6); // as if compacted
    await writePack(ctx, 7, range(70, 80).map(idOf), 10);
    for (const round of [1, 2, 3]) {
      const index = await DedupeIndex.open({ ctx, cacheFile });
      expect(index.opening.readPacks).toBe(round === 1 ? 2 : 0);
      expect(index.packCount).toBe(6);
      const view = index.view();
      for (const i of range(0, 80)) {
        const there = (i >= 12 && i < 18) || (i >= 20 && i < 60) || i >= 70;
        expect((await found(view, idOf(i))) !== undefined, `chunk ${i} in round ${round}`).toBe(
          there,
        );
      }
      await index.save();
    }
  });

  it('survives sessions, the loss of most packs, and again', async () => {
    await using dir = tempDir();
    const cacheFile = dir.join('index');
    const store = new MemoryStore();
    const ctx = context(store);
    for (const round of range(0, 6)) {
      const index = await DedupeIndex.open({ ctx, cacheFile });
      expect(index.opening.readPacks).toBe(0);
      expect(index.packCount).toBe(round === 0 ? 0 : 2);
      index.startSession(1000, 4);
      const view = index.view();
      for (const n of range(round * 3, round * 3 + 3)) {
        const pack = view.beginPack(packIdOf(n));
        for (const i of range(0, 90))
          view.findOrAdd(idOf(n * 100 + i), pack, i, placeWord(i, 0, false));
        await writePack(ctx, n, range(n * 100, n * 100 + 90).map(idOf), 90);
        view.endPack(pack, (await store.stat(packName(packIdOf(n))))?.sizeBytes ?? 0, 90);
      }
      index.endSession(true);
      const check = index.view();
      for (const n of range(round * 3, round * 3 + 3)) {
        for (const i of range(0, 90))
          expect(await found(check, idOf(n * 100 + i))).toEqual({
            pack: packIdOf(n),
            frame: i,
            sub: 0,
          });
      }
      await index.save();
      // Prune takes all but two.
      for (const n of range(0, round * 3 + 1)) await store.delete(packName(packIdOf(n)));
    }
    const index = await DedupeIndex.open({ ctx, cacheFile });
    expect(index.chunkCount).toBe(180);
  });

  it('is not believed when one bit of it is wrong, it is cut off, of another repository or not there', async () => {
    await using dir = tempDir();
    const cacheFile = dir.join('index');
    const ctx = context(new MemoryStore());
    await writePack(ctx, 0, range(0, 30).map(idOf), 30);
    await (await DedupeIndex.open({ ctx, cacheFile })).save();
    const good = readFileSync(cacheFile);
    expect(await loadDedupeCache(cacheFile, REPOSITORY)).toBeDefined();
    expect(await loadDedupeCache(cacheFile, 'cd'.repeat(16))).toBeUndefined();
    expect(await loadDedupeCache(dir.join('none'), REPOSITORY)).toBeUndefined();
    expect(await loadDedupeCache(dir.path, REPOSITORY)).toBeUndefined();
    let tried = 0;
    for (let at = 0; at < good.length; at += at < 200 ? 1 : 97) {
      const bad = Buffer.from(good);
      bad[at] = (bad[at] ?? 0) ^ (1 << (at % 8));
      writeFileSync(cacheFile, bad);
      expect(await loadDedupeCache(cacheFile, REPOSITORY), `byte ${at}`).toBeUndefined();
      writeFileSync(cacheFile, good.subarray(0, at));
      expect(await loadDedupeCache(cacheFile, REPOSITORY), `cut at ${at}`).toBeUndefined();
      tried++;
    }
    expect(tried).toBeGreaterThan(200);
    const index = await DedupeIndex.open({ ctx, cacheFile });
    expect(index.opening).toEqual({ cachedPacks: 0, readPacks: 1, skippedPacks: 0 });
    await index.save();
    expect(await loadDedupeCache(cacheFile, REPOSITORY)).toBeDefined();
  });
});
