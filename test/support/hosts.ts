/** Hosts of a simulation: writers that reuse each other's chunks, and a clock that goes on by itself. */
import type { Clock } from '../../src/clock.js';
import { Coverage, PointClass } from '../../src/format/commit.js';
import { VolumeHistory } from '../../src/repo/history.js';
import { readLease } from '../../src/repo/lease.js';
import { openImage } from '../../src/repo/point.js';
import { Repository, type Environment } from '../../src/repo/repository.js';
import type { Store } from '../../src/repo/store.js';
import { CondemnedError, VolumeWriter, type PlacedExtent } from '../../src/repo/volume-writer.js';
import { currentIdentity } from '../../src/process-identity.js';
import { CHUNK_BYTES, digestOf, randomBytesOf, testMeta, type Expected } from './model-volume.js';

const BLOCK = 4096;
const CHUNK_BLOCKS = CHUNK_BYTES / BLOCK;

/** Each look at it is a microsecond later; who sleeps waits for others to work, not for time. */
export class TickingClock implements Clock {
  #ns = 1_700_000_000_000_000_000n;

  /** `from`: goes on where that one is now. */
  constructor(from?: TickingClock) {
    if (from !== undefined) this.#ns = from.nowNs();
  }

  nowNs(): bigint {
    this.#ns += 1000n;
    return this.#ns;
  }

  monotonicNs(): bigint {
    return this.nowNs();
  }

  async sleep(_ms: number, signal?: AbortSignal): Promise<void> {
    for (let i = 0; i < 40 && signal?.aborted !== true; i++)
      await new Promise<void>((resolve) => setImmediate(resolve));
  }
}

/** `host` tells the processes of a simulation apart. */
export function hostEnvironment(clock: Clock, random: () => number, host = 'host'): Environment {
  return {
    clock,
    random: (n) => randomBytesOf(n, random),
    owner: { ...currentIdentity(), host },
  };
}

const contents = new Map<number, Buffer>();

/** Chunk number `content` of the few that all devices are made of; 0 is zeros. Shared: nobody writes to it. */
export function contentOf(content: number): Buffer {
  const made = contents.get(content);
  if (made !== undefined) return made;
  const bytes = newContent(content);
  contents.set(content, bytes);
  return bytes;
}

function newContent(content: number): Buffer {
  const bytes = Buffer.alloc(CHUNK_BYTES);
  if (content === 0) return bytes;
  for (let i = 0; i < bytes.length; i += 4)
    bytes.writeUInt32LE((Math.imul(i + 1, content * 2_654_435_761) ^ (i << 7)) >>> 0, i);
  return bytes;
}

export interface Place {
  readonly packId: string;
  readonly frame: number;
}

/** What the dedupe indexes of all hosts remember; nobody tells it of what prune deletes. */
export class SharedIndex {
  readonly #places = new Map<number, Place[]>();

  learn(content: number, place: Place): void {
    const list = this.#places.get(content);
    if (list === undefined) this.#places.set(content, [place]);
    else list.push(place);
  }

  clone(): SharedIndex {
    const copy = new SharedIndex();
    for (const [content, list] of this.#places) copy.#places.set(content, [...list]);
    return copy;
  }

  /** One of the places last learned. */
  find(content: number, random: () => number): Place | undefined {
    const list = this.#places.get(content) ?? [];
    const last = list.slice(-3);
    return last[Math.floor(random() * last.length)];
  }
}

export interface HostOptions {
  readonly volumeId: string;
  readonly index: SharedIndex;
  readonly random: () => number;
  readonly chunks: number;
  readonly contents: number;
  /** Other processes write the volume too, so that nothing can be built on what this one knows. */
  readonly everyCommitFull?: boolean;
}

/** One volume and who writes it. */
export class Host {
  readonly options: HostOptions;
  /** Content of each chunk of the device. */
  readonly device: number[];
  readonly acknowledged: Expected[] = [];
  condemned = 0;
  private readonly dirty = new Set<number>();

  constructor(options: HostOptions) {
    this.options = options;
    this.device = Array.from({ length: options.chunks }, () => 0);
  }

  /** The same host in a copy of its repository, with an index and randomness of its own. */
  clone(options: Pick<HostOptions, 'index' | 'random'>): Host {
    const copy = new Host({ ...this.options, ...options });
    copy.device.splice(0, Infinity, ...this.device);
    copy.acknowledged.push(...this.acknowledged);
    for (const at of this.dirty) copy.dirty.add(at);
    return copy;
  }

  get sizeBytes(): number {
    return this.device.length * CHUNK_BYTES;
  }

  /** A session of `commits` commits; some chunks are stored and never used. Rejects as the writer does. */
  async session(repo: Repository, commits: number): Promise<void> {
    const { volumeId, random } = this.options;
    const { writer, history } = await VolumeWriter.claim(repo, volumeId);
    await history.close();
    try {
      for (let i = 0; i < commits; i++) {
        await this.orphans(writer);
        await this.change(writer);
        if (random() < 0.3) await writer.finishPack();
      }
    } finally {
      await writer.close();
    }
  }

  /** Stores chunks that no commit names: in a pack of their own, or among those of the next commits. */
  private async orphans(writer: VolumeWriter): Promise<void> {
    const { random, contents, index } = this.options;
    if (random() < 0.4) return;
    const pack = await writer.openPack();
    const places: [number, Place][] = [];
    for (let n = Math.floor(random() * 6); n >= 0; n--) {
      const content = 1 + Math.floor(random() * contents);
      const bytes = contentOf(content);
      places.push([
        content,
        { packId: pack.packId, frame: pack.addChunk(bytes, writer.repo.keys.chunkId(bytes)) },
      ]);
    }
    if (random() < 0.6) {
      await writer.finishPack();
      for (const [content, place] of places) index.learn(content, place);
    }
  }

  private async change(writer: VolumeWriter): Promise<void> {
    const { random, contents } = this.options;
    for (let n = Math.floor(random() * 4); n >= 0; n--) {
      const at = Math.floor(random() * this.device.length);
      this.device[at] = random() < 0.15 ? 0 : 1 + Math.floor(random() * contents);
      this.dirty.add(at);
    }
    for (let tries = 0; ; tries++) {
      try {
        // Once something was condemned, nothing is reused: the data are stored anew.
        await this.commit(writer, tries === 0);
        return;
      } catch (error) {
        if (!(error instanceof CondemnedError) || tries >= 20) throw error;
        this.condemned++;
        await writer.reclaim();
      }
    }
  }

  private async commit(writer: VolumeWriter, reuse: boolean): Promise<void> {
    const { random, index } = this.options;
    const full = this.acknowledged.length === 0 || this.options.everyCommitFull === true;
    const changed = full ? this.device.map((_, i) => i) : [...this.dirty].sort((a, b) => a - b);
    const data = Buffer.concat(this.device.map(contentOf));
    const pack = await writer.openPack();
    const extents: PlacedExtent[] = [];
    for (const at of changed) {
      const content = this.device[at] ?? 0;
      const base = { block: at * CHUNK_BLOCKS, count: CHUNK_BLOCKS, sub: 0, skip: 0 };
      const known = reuse && random() < 0.85 ? index.find(content, random) : undefined;
      if (content === 0) extents.push({ ...base, packId: undefined, frame: 0 });
      else if (known !== undefined) extents.push({ ...base, ...known });
      else {
        const bytes = contentOf(content);
        extents.push({
          ...base,
          packId: pack.packId,
          frame: pack.addChunk(bytes, writer.repo.keys.chunkId(bytes)),
        });
      }
    }
    const now = writer.repo.env.clock.nowNs();
    const point = await writer.commit({
      pointClass: PointClass.crash,
      coverage: Coverage.exact,
      full,
      instantNs: now,
      startedNs: now,
      sizeBytes: this.sizeBytes,
      extents,
      storedBytes: 0,
      facts: {},
    });
    this.acknowledged.push({ seq: point.seq, sizeBytes: this.sizeBytes, digest: digestOf(data) });
    this.dirty.clear();
  }
}

/** Restores some of the points that were acknowledged when it began; throws if one is not what it was. */
export async function readPoints(
  repo: Repository,
  host: Host,
  which: (all: readonly Expected[]) => readonly Expected[],
): Promise<number> {
  const wanted = which([...host.acknowledged]);
  const history = await VolumeHistory.open(repo, host.options.volumeId);
  try {
    const problem = history.problems[0];
    if (problem !== undefined)
      throw new Error(`problem with ${problem.object}`, { cause: problem.error });
    history.refuseGap();
    for (const e of wanted) {
      if ((history.tip?.seq ?? 0) < e.seq)
        throw new Error(
          `acknowledged point ${e.seq} is gone: the history ends at ${history.tip?.seq}`,
        );
      const image = await openImage(history, testMeta(host.options.volumeId, e.sizeBytes), e.seq);
      const all = Buffer.alloc(e.sizeBytes, 0xee);
      await image.read(all, 0);
      if (digestOf(all) !== e.digest)
        throw new Error(`point ${e.seq} does not restore bit for bit`);
    }
    return wanted.length;
  } finally {
    await history.close();
  }
}

/** What time does to the lease of a process that has died: it lapses. */
export async function lapseLease(store: Store, name: string, host: string): Promise<void> {
  if ((await readLease(store, name))?.owner.host !== host) return;
  for await (const o of store.list(`locks/${name}`)) await store.delete(o.name);
}

export function openHost(store: Store, env: Environment): Promise<Repository> {
  return Repository.open(store, [], env);
}
