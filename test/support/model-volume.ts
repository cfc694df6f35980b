/**
 * A volume with a model beside it: random changes are captured through the real writer, and the model knows, for every
 * acknowledged point, each byte that it must restore.
 */
import { createHash } from 'node:crypto';
import { Coverage, PointClass } from '../../src/format/commit.js';
import { VolumeHistory } from '../../src/repo/history.js';
import type { Secret } from '../../src/repo/keys.js';
import type { ChunkPlace } from '../../src/repo/pack-writer.js';
import { openImage } from '../../src/repo/point.js';
import { Repository, type Environment } from '../../src/repo/repository.js';
import type { Store } from '../../src/repo/store.js';
import { writeVolumeMeta, type VolumeMeta } from '../../src/repo/volume.js';
import { VolumeWriter, type PlacedExtent } from '../../src/repo/volume-writer.js';
import { currentIdentity } from '../../src/process-identity.js';
import { SteppedClock } from './stepped-clock.js';

export const CHUNK_BYTES = 16_384;
const BLOCK = 4096;

/** A seeded generator (mulberry32): uniform in [0, 1). */
export function seeded(seed: number): () => number {
  let a = seed >>> 0;
  return () => {
    a = (a + 0x6d2b79f5) >>> 0;
    let t = a;
    t = Math.imul(t ^ (t >>> 15), t | 1);
    t ^= t + Math.imul(t ^ (t >>> 7), t | 61);
    return ((t ^ (t >>> 14)) >>> 0) / 4_294_967_296;
  };
}

/** `length` bytes of a seeded generator. */
export function randomBytesOf(length: number, random: () => number): Uint8Array {
  const bytes = new Uint8Array(length);
  for (let i = 0; i < length; i++) bytes[i] = Math.floor(random() * 256);
  return bytes;
}

/** An environment whose clock and randomness are the test's. */
export function testEnvironment(
  random: () => number,
): Environment & { readonly clock: SteppedClock } {
  return {
    clock: new SteppedClock(),
    random: (n) => randomBytesOf(n, random),
    owner: currentIdentity(),
  };
}

export function testMeta(id: string, sizeBytes: number, name = 'host/sda'): VolumeMeta {
  return {
    id,
    name,
    host: name.split('/')[0] ?? '',
    createdNs: 1n,
    device: '/dev/sda',
    sizeBytes,
    logicalBlockBytes: 512,
    facts: {},
    updatedNs: 1n,
  };
}

/** A point that the writer acknowledged, and what it must restore to. */
export interface Expected {
  readonly seq: number;
  readonly sizeBytes: number;
  readonly digest: string;
}

export function digestOf(data: Uint8Array): string {
  return createHash('sha256').update(data).digest('hex');
}

export class ModelVolume {
  readonly volumeId: string;
  data: Buffer;
  readonly acknowledged: Expected[] = [];
  /** The block in which the end lay before the device grew: the next commit must name it. */
  private oldEnd: number | undefined;
  private readonly random: () => number;
  private readonly clock: SteppedClock;

  constructor(volumeId: string, sizeBytes: number, random: () => number, clock: SteppedClock) {
    this.volumeId = volumeId;
    this.data = Buffer.alloc(sizeBytes);
    this.random = random;
    this.clock = clock;
  }

  /** Changes random blocks; returns them, ascending. Some become zeros, some are compressible, some copies of others. */
  mutate(most: number): number[] {
    const blocks = Math.ceil(this.data.length / BLOCK);
    const changed = new Set<number>();
    const runs = 1 + Math.floor(this.random() * most);
    for (let r = 0; r < runs; r++) {
      const from = Math.floor(this.random() * blocks);
      const count = Math.min(blocks - from, 1 + Math.floor(this.random() * 9));
      const kind = this.random();
      for (let b = from; b < from + count; b++) {
        const part = this.data.subarray(b * BLOCK, Math.min(this.data.length, (b + 1) * BLOCK));
        if (kind < 0.2) part.fill(0);
        else if (kind < 0.5) part.fill(`block ${b} ${Math.floor(this.random() * 5)} `);
        else for (let i = 0; i < part.length; i++) part[i] = Math.floor(this.random() * 256);
        changed.add(b);
      }
    }
    if (this.oldEnd !== undefined) changed.add(this.oldEnd);
    this.oldEnd = undefined;
    return [...changed].sort((a, b) => a - b);
  }

  /** Grows or shrinks the device; what is gained reads as zeros. */
  resize(sizeBytes: number): void {
    if (sizeBytes > this.data.length && this.data.length % BLOCK !== 0)
      this.oldEnd = Math.floor(this.data.length / BLOCK);
    const next = Buffer.alloc(sizeBytes);
    this.data.copy(next, 0, 0, Math.min(sizeBytes, this.data.length));
    this.data = next;
  }

  /**
   * Captures blocks as one commit: small extents share a frame with others, longer ones are chunks of their own. When it
   * resolves, the point is in `acknowledged`.
   */
  async capture(writer: VolumeWriter, blocks: readonly number[], full = false): Promise<void> {
    const pack = await writer.openPack();
    const extents: PlacedExtent[] = [];
    const shared: { bytes: Buffer; id: Buffer; block: number; count: number }[] = [];
    const zero = Buffer.alloc(CHUNK_BYTES);
    const perChunk = CHUNK_BYTES / BLOCK;
    for (let i = 0; i < blocks.length;) {
      const block = blocks[i] ?? 0;
      let count = 1;
      while (
        count < perChunk &&
        blocks[i + count] === block + count &&
        (block + count) % perChunk !== 0
      )
        count++;
      i += count;
      const bytes = this.data.subarray(
        block * BLOCK,
        Math.min(this.data.length, (block + count) * BLOCK),
      );
      if (bytes.equals(zero.subarray(0, bytes.length))) {
        extents.push({ block, count, packId: undefined, frame: 0, sub: 0, skip: 0 });
        continue;
      }
      const id = writer.repo.keys.chunkId(bytes);
      if (count === perChunk) {
        await pack.flush();
        const place: ChunkPlace = { frame: pack.addChunk(bytes, id), sub: 0 };
        extents.push({ block, count, packId: pack.packId, ...place, skip: 0 });
      } else {
        shared.push({ bytes, id, block, count });
      }
    }
    if (shared.length > 0) {
      await pack.flush();
      const frame = pack.addChunks(shared);
      shared.forEach((s, sub) => {
        extents.push({ block: s.block, count: s.count, packId: pack.packId, frame, sub, skip: 0 });
      });
    }
    extents.sort((a, b) => a.block - b.block);
    const now = writer.repo.env.clock.nowNs();
    const point = await writer.commit({
      pointClass: PointClass.crash,
      coverage: Coverage.exact,
      full,
      instantNs: now,
      startedNs: now,
      sizeBytes: this.data.length,
      extents,
      storedBytes: 0,
      facts: {},
    });
    this.acknowledged.push({
      seq: point.seq,
      sizeBytes: this.data.length,
      digest: digestOf(this.data),
    });
    await this.clock.advanceMs(1000);
  }
}

/** A new repository with one volume in it and its writer; encrypted with {@link PASSWORD} unless `secret` says otherwise. */
export async function newModel(
  store: Store,
  random: () => number,
  options: { readonly sizeBytes: number; readonly encrypted?: boolean; readonly secret?: Secret },
): Promise<{ repo: Repository; model: ModelVolume; writer: VolumeWriter }> {
  const env = testEnvironment(random);
  const repo = await Repository.init(
    store,
    {
      encryption: options.encrypted === true ? 'aes256-gcm' : 'none',
      chunkBytes: CHUNK_BYTES,
      packBytes: 1024 * 1024,
    },
    options.encrypted === true ? (options.secret ?? PASSWORD) : undefined,
    env,
    CHEAP,
  );
  const volumeId = repo.newId();
  await writeVolumeMeta(repo, testMeta(volumeId, options.sizeBytes));
  const { writer, history } = await VolumeWriter.claim(repo, volumeId);
  await history.close();
  return { repo, model: new ModelVolume(volumeId, options.sizeBytes, random, env.clock), writer };
}

export const PASSWORD = {
  kind: 'password',
  password: 'correct horse',
  source: 'the test',
} as const;
/** The least that the format allows: tests open repositories hundreds of times. */
export const CHEAP = { N: 16_384, r: 1, p: 1 } as const;

/** Restores a point through the image and compares. Throws with the seq where it differs. */
export async function checkPoint(repo: Repository, volumeId: string, e: Expected): Promise<void> {
  const history = await VolumeHistory.open(repo, volumeId);
  try {
    history.refuseGap();
    const image = await openImage(history, testMeta(volumeId, e.sizeBytes), e.seq);
    if (image.sizeBytes !== e.sizeBytes)
      throw new Error(`point ${e.seq}: size ${image.sizeBytes}, not ${e.sizeBytes}`);
    const all = Buffer.alloc(e.sizeBytes, 0xee);
    await image.read(all, 0);
    if (digestOf(all) !== e.digest) throw new Error(`point ${e.seq} does not restore bit for bit`);
  } finally {
    await history.close();
  }
}
