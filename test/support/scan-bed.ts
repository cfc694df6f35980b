/** A repository to scan into, and the check that what a scan says restores bit for bit. */
import { expect } from 'vitest';
import { scanDevice, type ScanOptions, type ScanResult } from '../../src/capture/scan.js';
import type { ReadDevice } from '../../src/devices/device.js';
import { STRIPE_BLOCKS } from '../../src/format/extent.js';
import { packIdOf } from '../../src/format/names.js';
import { DedupeIndex } from '../../src/repo/dedupe/index.js';
import { contextOf, type RepositoryHandle } from '../../src/repo/handle.js';
import { OpenPack, PackCache } from '../../src/repo/pack-reader.js';
import type { Store } from '../../src/repo/store.js';
import { seeded, testEnvironment } from './model-volume.js';

const MiB = 1024 * 1024;

export function handleOf(patch: Partial<RepositoryHandle> = {}): RepositoryHandle {
  return {
    storeUrl: undefined,
    master: Buffer.alloc(32, 3),
    encrypted: true,
    repositoryId: '12'.repeat(16),
    chunkBytes: 16_384,
    packBytes: 1 * MiB,
    ...patch,
  };
}

/** Random, repeated, compressible and zero chunks; the last one short. */
export function testImage(seed: number, sizeBytes: number, chunkBytes = 16_384): Buffer {
  const random = seeded(seed);
  const image = Buffer.alloc(sizeBytes);
  for (let at = 0; at < sizeBytes; at += chunkBytes) {
    const chunk = image.subarray(at, Math.min(at + chunkBytes, sizeBytes));
    const kind = random();
    if (kind < 0.3) continue;
    if (kind < 0.45) chunk.fill(`one of five: ${Math.floor(random() * 5)}`);
    else if (kind < 0.7) chunk.fill(`text ${at} and ${random()}`);
    else
      for (let i = 0; i + 4 <= chunk.length; i += 4)
        chunk.writeUInt32LE(Math.floor(random() * 0x1_0000_0000), i);
  }
  return image;
}

/** Chunks that are not all zeros, and different ones among them. */
export function uniqueChunks(
  image: Buffer,
  chunkBytes: number,
): { chunks: number; unique: number } {
  const unique = new Set<string>();
  let chunks = 0;
  for (let at = 0; at < image.length; at += chunkBytes) {
    const chunk = image.subarray(at, at + chunkBytes);
    if (chunk.every((b) => b === 0)) continue;
    chunks++;
    unique.add(chunk.toString('latin1'));
  }
  return { chunks, unique: unique.size };
}

export interface Bed {
  readonly store: Store;
  readonly handle: RepositoryHandle;
  readonly index: DedupeIndex;
  scan(device: ReadDevice | string, more?: Partial<ScanOptions>): Promise<ScanResult>;
}

export async function bedOn(store: Store, handle = handleOf(), seed = 1): Promise<Bed> {
  const index = await DedupeIndex.open({ ctx: contextOf(handle, store), cacheFile: undefined });
  const { clock, random } = testEnvironment(seeded(seed));
  return {
    store,
    handle,
    index,
    scan: (device, more = {}) =>
      scanDevice({ device, handle, store, index, workers: 0, clock, random, ...more }),
  };
}

/** The bytes that the result's extents stand for, read from the packs. Checks the rules for extents on the way. */
export async function restored(bed: Bed, result: ScanResult): Promise<Buffer> {
  const ctx = contextOf(bed.handle, bed.store);
  const cache = new PackCache(ctx);
  const { range } = result.placements;
  const { chunkBytes } = bed.handle;
  const chunkBlocks = chunkBytes / 4096;
  const image = Buffer.alloc(range.length);
  let next = range.offset / 4096;
  for (const e of result.placements.extents()) {
    expect(e.block).toBe(next);
    expect(Math.floor(e.block / STRIPE_BLOCKS)).toBe(
      Math.floor((e.block + e.count - 1) / STRIPE_BLOCKS),
    );
    next += e.count;
    if (e.packId === undefined) continue;
    expect(e.skip).toBe(0);
    const isRun = e.count > chunkBlocks;
    for (let i = 0; i * chunkBlocks < e.count; i++) {
      const chunks = await cache.chunksOf(e.packId, e.frame + i);
      if (isRun) expect([e.sub, chunks.entries.length]).toEqual([0, 1]);
      const bytes = chunks.body.subarray(chunks.starts[e.sub], chunks.starts[e.sub + 1]);
      if (isRun && (i + 1) * chunkBlocks < e.count) expect(bytes.length).toBe(chunkBytes);
      bytes.copy(image, (e.block + i * chunkBlocks) * 4096 - range.offset);
    }
  }
  expect(next).toBe((range.offset + Math.ceil(range.length / 4096) * 4096) / 4096);
  await cache.close();
  return image;
}

export async function packsIn(bed: Bed): Promise<{ sealed: string[]; open: string[] }> {
  const sealed: string[] = [];
  const open: string[] = [];
  for await (const { name } of bed.store.list('packs')) {
    const id = packIdOf(name) ?? name;
    const pack = await OpenPack.open(contextOf(bed.handle, bed.store), id).catch(() => undefined);
    (pack?.sealed === true ? sealed : open).push(id);
    await pack?.close();
  }
  return { sealed: sealed.toSorted(), open };
}

export async function caught(promise: Promise<unknown>): Promise<unknown> {
  return promise.then(
    () => {
      throw new Error('it did not fail');
    },
    (error: unknown) => error,
  );
}
