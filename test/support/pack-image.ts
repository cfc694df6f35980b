/** Images made by hand: packs in a store, extents that use them in every way the format allows, and the bytes expected. */
import type { RepositoryHandle } from '../../src/repo/handle.js';
import { contextOf } from '../../src/repo/handle.js';
import { PackWriter, type PackContext } from '../../src/repo/pack-writer.js';
import { PackCache } from '../../src/repo/pack-reader.js';
import { RepositoryImage } from '../../src/repo/repository-image.js';
import type { Store } from '../../src/repo/store.js';
import type { SourceExtent } from '../../src/restore/batch.js';
import type { ImageSource } from '../../src/restore/write-image.js';
import { BLOCK_BYTES, blocksOf } from '../../src/units.js';
import { dice, noise } from './disks.js';

export interface PackImageOptions {
  readonly store: Store;
  readonly seed: number;
  readonly sizeBytes: number;
  readonly encrypted?: boolean;
  /** Default 65536. */
  readonly chunkBytes?: number;
  /** The URL for worker threads, for a store that other threads can open. */
  readonly storeUrl?: string;
  /** Leave the last pack without a footer. */
  readonly unsealed?: boolean;
}

export interface PackImage {
  readonly source: ImageSource;
  readonly handle: RepositoryHandle;
  readonly context: PackContext;
  readonly extents: readonly SourceExtent[];
  readonly expected: Buffer;
  readonly packIds: readonly string[];
}

interface StoredChunk {
  readonly packId: string;
  readonly frame: number;
  readonly sub: number;
  readonly bytes: Buffer;
}

export function handleFor(options: {
  readonly encrypted?: boolean;
  readonly chunkBytes?: number;
  readonly storeUrl?: string | undefined;
}): RepositoryHandle {
  return {
    storeUrl: options.storeUrl,
    master: Buffer.alloc(32, 7),
    encrypted: options.encrypted ?? true,
    repositoryId: 'ab'.repeat(16),
    chunkBytes: options.chunkBytes ?? 65536,
    packBytes: 1024 * 1024,
  };
}

/** See the file comment. The same for the same seed. */
export async function makePackImage(options: PackImageOptions): Promise<PackImage> {
  const { store, sizeBytes } = options;
  const handle = handleFor(options);
  const context = contextOf(handle, store);
  const chunkBlocks = handle.chunkBytes / BLOCK_BYTES;
  const roll = dice(options.seed);
  const blocks = blocksOf(sizeBytes);
  const expected = Buffer.alloc(sizeBytes);
  const extents: SourceExtent[] = [];
  const stored: StoredChunk[] = [];
  const packIds: string[] = [];
  let noiseSeed = options.seed * 1000;

  let writer: PackWriter | undefined;
  const pack = async (): Promise<PackWriter> => {
    if (writer !== undefined && writer.frameCount >= 40 + roll(60)) {
      await writer.seal(Buffer.from(noise(++noiseSeed, 16)));
      writer = undefined;
    }
    if (writer === undefined) {
      const id = Buffer.from(noise(++noiseSeed, 16)).toString('hex');
      packIds.push(id);
      writer = await PackWriter.create(context, id, 1n);
    }
    if (writer.wantsFlush) await writer.flush();
    return writer;
  };
  const content = (length: number): Buffer => {
    const bytes = Buffer.from(noise(++noiseSeed, length));
    if (roll(2) === 0) bytes.fill(roll(256), Math.floor(length / 3)); // compressible
    return bytes;
  };
  const place = (block: number, count: number, chunk: StoredChunk, skip: number): void => {
    extents.push({ block, count, packId: chunk.packId, frame: chunk.frame, sub: chunk.sub, skip });
    chunk.bytes
      .subarray(skip * BLOCK_BYTES, (skip + count) * BLOCK_BYTES)
      .copy(expected, block * BLOCK_BYTES);
  };
  const single = async (length: number): Promise<StoredChunk> => {
    const w = await pack();
    const bytes = content(length);
    const chunk = {
      packId: w.packId,
      frame: w.addChunk(bytes, context.keys.chunkId(bytes)),
      sub: 0,
      bytes,
    };
    stored.push(chunk);
    return chunk;
  };
  const lengthAt = (block: number, count: number): number =>
    Math.min(count * BLOCK_BYTES, sizeBytes - block * BLOCK_BYTES);

  let block = 0;
  while (block < blocks) {
    const left = blocks - block;
    switch (roll(6)) {
      case 0: {
        const count = Math.min(left, 1 + roll(3 * chunkBlocks));
        if (roll(2) === 0)
          extents.push({ block, count, packId: undefined, frame: 0, sub: 0, skip: 0 });
        block += count;
        break;
      }
      case 1: {
        // A run: full chunks in frames one after the other, used from the middle of the first to anywhere in the last.
        const chunks = 2 + roll(6);
        const w = await pack();
        const list: StoredChunk[] = [];
        for (let i = 0; i < chunks; i++) {
          const bytes = content(handle.chunkBytes);
          list.push({
            packId: w.packId,
            frame: w.addChunk(bytes, context.keys.chunkId(bytes)),
            sub: 0,
            bytes,
          });
        }
        stored.push(...list);
        const skip = roll(chunkBlocks);
        const count = Math.min(left, chunks * chunkBlocks - skip - roll(chunkBlocks));
        const first = list[0];
        if (first === undefined) throw new Error('a run of nothing');
        extents.push({ block, count, packId: first.packId, frame: first.frame, sub: 0, skip });
        Buffer.concat(list.map((c) => c.bytes))
          .subarray(skip * BLOCK_BYTES, (skip + count) * BLOCK_BYTES)
          .copy(expected, block * BLOCK_BYTES);
        block += count;
        break;
      }
      case 2: {
        // Several small chunks in one frame.
        const w = await pack();
        const parts: Buffer[] = [];
        let at = block;
        for (let i = 0; i < 2 + roll(14) && at < blocks; i++) {
          const count = Math.min(1 + roll(2), blocks - at);
          parts.push(content(lengthAt(at, count)));
          at += count;
        }
        const frame = w.addChunks(
          parts.map((bytes) => ({ bytes, id: context.keys.chunkId(bytes) })),
        );
        parts.forEach((bytes, sub) => {
          const chunk = { packId: w.packId, frame, sub, bytes };
          stored.push(chunk);
          place(block, blocksOf(bytes.length), chunk, 0);
          block += blocksOf(bytes.length);
        });
        break;
      }
      case 3: {
        // What was stored before, whole or in part.
        const chunk = stored[roll(Math.max(1, stored.length))];
        if (chunk === undefined || chunk.bytes.length % BLOCK_BYTES !== 0) break;
        const all = chunk.bytes.length / BLOCK_BYTES;
        const skip = roll(3) === 0 ? roll(all) : 0;
        const count = Math.min(left, roll(3) === 0 ? 1 + roll(all - skip) : all - skip);
        place(block, count, chunk, skip);
        block += count;
        break;
      }
      default: {
        const count = Math.min(left, roll(2) === 0 ? chunkBlocks : 1 + roll(chunkBlocks));
        place(block, count, await single(lengthAt(block, count)), 0);
        block += count;
      }
    }
  }
  if (writer !== undefined) {
    const last: PackWriter = writer;
    if (options.unsealed === true) {
      await last.sync();
      await last.abandon();
    } else {
      await last.seal(Buffer.from(noise(++noiseSeed, 16)));
    }
  }
  return {
    handle,
    context,
    extents,
    expected,
    packIds,
    source: {
      handle,
      store,
      sizeBytes,
      async *extents() {
        for (let i = 0; i < extents.length; i += 10)
          yield await Promise.resolve(extents.slice(i, i + 10));
      },
    },
  };
}

/** `bytes` as an image: full chunks, one a frame, zeros left out. */
export async function storeBytes(
  options: { readonly store: Store; readonly storeUrl?: string },
  bytes: Buffer,
): Promise<PackImage> {
  const handle = handleFor(options);
  const context = contextOf(handle, options.store);
  const packId = 'c'.repeat(32);
  const writer = await PackWriter.create(context, packId, 1n);
  const extents: SourceExtent[] = [];
  for (let at = 0; at < bytes.length; at += handle.chunkBytes) {
    const chunk = bytes.subarray(at, at + handle.chunkBytes);
    if (chunk.every((b) => b === 0)) continue;
    if (writer.wantsFlush) await writer.flush();
    const frame = writer.addChunk(chunk, context.keys.chunkId(chunk));
    extents.push({
      block: at / BLOCK_BYTES,
      count: blocksOf(chunk.length),
      packId,
      frame,
      sub: 0,
      skip: 0,
    });
  }
  await writer.seal(Buffer.alloc(16, 1));
  return {
    handle,
    context,
    extents,
    expected: bytes,
    packIds: [packId],
    source: {
      handle,
      store: options.store,
      sizeBytes: bytes.length,
      async *extents() {
        yield await Promise.resolve(extents);
      },
    },
  };
}

/** The same image for random reads; it closes `packs`. */
export function imageOf(
  made: PackImage,
  packs: PackCache = new PackCache(made.context),
): RepositoryImage {
  const chunkBlocks = made.handle.chunkBytes / BLOCK_BYTES;
  const hole = (block: number, count: number): SourceExtent => ({
    block,
    count,
    packId: undefined,
    frame: 0,
    sub: 0,
    skip: 0,
  });
  return new RepositoryImage({
    packs,
    chunkBytes: made.handle.chunkBytes,
    sizeBytes: made.source.sizeBytes,
    logicalBlockBytes: 512,
    onClose: () => packs.close(),
    resolver: {
      resolve(from, to) {
        const out: SourceExtent[] = [];
        let at = from;
        for (const e of made.extents) {
          const start = Math.max(e.block, from);
          const end = Math.min(e.block + e.count, to);
          if (start >= end) continue;
          if (start > at) out.push(hole(at, start - at));
          at = end;
          const skip = e.skip + start - e.block;
          const isRun = e.skip + e.count > chunkBlocks;
          if (e.packId === undefined) out.push(hole(start, end - start));
          else if (!isRun) out.push({ ...e, block: start, count: end - start, skip });
          else {
            out.push({
              ...e,
              block: start,
              count: end - start,
              frame: e.frame + Math.floor(skip / chunkBlocks),
              skip: skip % chunkBlocks,
            });
          }
        }
        if (at < to) out.push(hole(at, to - at));
        return Promise.resolve(out);
      },
    },
  });
}
