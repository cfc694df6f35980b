/**
 * What a mount shows, as directories and files that know nothing of FUSE:
 *
 *     HOST/DEVICE/latest/disk.img, p1.img, …
 *     HOST/DEVICE/snapshots/NAME/…
 *     HOST/DEVICE/points/2026-11-22/15/15-04-05.123456789Z-#12/…
 *     …/p1/etc/fstab   with `files`: the file systems inside
 *
 * Times in names are UTC. Points are read from the timeline while a directory is listed, never all at once. A file is the image of a
 * point and does not change; `latest` is looked up anew every time.
 */
import type { Clock } from '../clock.js';
import { readPartitionTable } from '../devices/table.js';
import { B2Error, isKind, messageOf } from '../errors.js';
import { PointClass } from '../format/commit.js';
import type { CommitRecord } from '../format/segment.js';
import { companionsAt, pointsAt, type Companions } from '../files/companions.js';
import { readableImage } from '../files/layout.js';
import type { Image, Lending } from '../image.js';
import { choosePoint } from '../repo/point.js';
import type { Repository } from '../repo/repository.js';
import { groupOf } from '../repo/point-set.js';
import { listVolumes, type VolumeMeta } from '../repo/volume.js';
import type { When } from '../when.js';
import type { FilesSource, FilesView } from './files-view.js';
import {
  dayName,
  dayOf,
  daySpan,
  fileName,
  hourSpan,
  pointName,
  seqOfPointName,
  volumePaths,
  type Span,
} from './names.js';
import type { Attributes, NodeKind } from './protocol.js';
import { VolumeView, type HistoryUse } from './volume-view.js';

/** Attributes of what lies in a file system inside. */
export type TreeAttributes = Omit<Attributes, 'node' | 'kind'>;

/** Extended attributes. Names are bytes. */
export interface TreeXattrs {
  /** Undefined where there is none of that name. */
  get(name: Buffer): Promise<Uint8Array | undefined>;
  /** Names, each with a NUL behind it. */
  list(): Promise<Uint8Array>;
}

interface TreeCommon {
  /** Undefined (or absent): those that fit what the tree itself shows. */
  readonly attributes?: () => Promise<TreeAttributes | undefined>;
  readonly xattrs?: TreeXattrs;
}

/** A directory. `key` tells apart what the same path shows at different times. */
export interface TreeDirectory extends TreeCommon {
  readonly kind: 'directory';
  readonly key: string;
  readonly mtimeNs: bigint;
  lookup(name: string): Promise<TreeEntry | undefined>;
  /** In an order that stays as it is until the listing ends. End it early by leaving the loop. */
  list(): AsyncGenerator<TreeListed>;
}

/** A file that never changes. Equal `key`, equal bytes. */
export interface TreeFile extends TreeCommon {
  readonly kind: 'file';
  readonly key: string;
  readonly mtimeNs: bigint;
  readonly sizeBytes: number;
  /** Bytes that are allocated; undefined where counting takes longer than a caller should wait (ask again later). */
  allocatedBytes(): Promise<number | undefined>;
  open(): Promise<OpenFile>;
}

/** What else lies in file systems. */
export interface TreeSpecial extends TreeCommon {
  readonly kind: Exclude<NodeKind, 'directory' | 'file'>;
  readonly key: string;
  readonly mtimeNs: bigint;
  /** Of a symbolic link. */
  readonly readlink?: () => Promise<Uint8Array>;
}

export type TreeNode = TreeDirectory | TreeFile | TreeSpecial;

export interface TreeEntry {
  readonly node: TreeNode;
  /** True where the name may stand for something else at any time. */
  readonly isVolatile: boolean;
}

export interface TreeListed {
  readonly name: string;
  readonly kind: TreeNode['kind'];
  /** Given where it is known without further reading. */
  readonly entry?: TreeEntry;
}

export interface OpenFile {
  readonly sizeBytes: number;
  /** Fills `into`; the range lies within the file. Errors as {@link Image.read}. */
  read(into: Uint8Array, offset: number): Promise<void>;
  /** As {@link Image.lend}. */
  lend?(offset: number, length: number): Lending;
  /** The first data (or hole) at or after `offset`, which lies within the file; the end counts as a hole. */
  seek(offset: number, what: 'data' | 'hole'): Promise<number | undefined>;
  close(): Promise<void>;
}

export interface MountTreeOptions {
  readonly repo: Repository;
  readonly clock: Clock;
  /** Only this volume, which is the top then. */
  readonly volume?: VolumeMeta | undefined;
  /** Only the point that it means, of every volume that has one. */
  readonly at?: When | undefined;
  readonly warn: (message: string) => void;
  /** Shows the file systems inside as directories. Closed with the tree. */
  readonly files?: FilesView | undefined;
  /** How long {@link TreeFile.allocatedBytes} may take, in ms. Default: 100, and 0 of a device that takes long in any case. */
  readonly patienceMs?: number;
}

/** What was chosen for `at`. */
export interface MountedPoint {
  readonly volume: VolumeMeta;
  readonly commit: CommitRecord;
}

/** How long the list of volumes is good for. */
const VOLUMES_VALID_NS = 1_000_000_000n;
const PATIENCE_MS = 100;
/** Of larger devices nobody waits for the count of allocated bytes: who wants to read them would wait for nothing. */
const COUNTED_AT_ONCE_BYTES = 64 * 1024 ** 3;
/** And it begins this much later: who looks at a file mostly goes on to read it. */
const COUNT_LATER_MS = 100;
/** Points whose partitions and allocated bytes are remembered. */
const REMEMBERED_POINTS = 256;
/** Counts of allocated bytes that may wait for their turn. */
const WAITING_COUNTS = 64;
/** Bytes of an image whose extents are asked for at once: a read waits no longer than for that. */
const COUNT_STEP_BYTES = 64 * 1024 * 1024;
/** A count steps aside for those who read, and this long after. */
const READING_NS = 100_000_000n;
const STEP_ASIDE_MS = 20;

/** A part of a disk that is shown as a file. */
interface Part {
  readonly name: string;
  readonly offset: number;
  readonly sizeBytes: number;
}

/** The part of a commit that the tree needs. */
interface Point {
  readonly seq: number;
  readonly instantNs: bigint;
  readonly sizeBytes: number;
}

interface Remembered {
  partitions: Promise<readonly Part[]> | undefined;
  readonly allocated: Map<string, number>;
  readonly counting: Map<string, Promise<number | undefined>>;
}

/** Opens the tree: with `at`, chooses the points (kind `not-found` if no volume has one). Close it. */
export async function openMountTree(options: MountTreeOptions): Promise<MountTree> {
  const tree = new MountTree(options);
  try {
    await tree.choose();
    return tree;
  } catch (error) {
    await tree.close();
    throw error;
  }
}

export class MountTree {
  readonly #options: MountTreeOptions;
  readonly #views = new Map<string, VolumeView>();
  readonly #remembered = new Map<string, Remembered>();
  readonly #mountedNs: bigint;
  #volumes: { readonly list: readonly VolumeMeta[]; readonly atNs: bigint } | undefined;
  #chosen: readonly MountedPoint[] | undefined;
  #counts: Promise<unknown> = Promise.resolve();
  #waitingCounts = 0;
  #lastReadNs = -READING_NS;
  readonly #closing = new AbortController();
  #isClosed = false;

  constructor(options: MountTreeOptions) {
    this.#options = options;
    this.#mountedNs = options.clock.nowNs();
  }

  /** The points that `at` means; undefined without `at`. */
  get chosen(): readonly MountedPoint[] | undefined {
    return this.#chosen;
  }

  /** Part of {@link openMountTree}. */
  async choose(): Promise<void> {
    const { at, volume, warn } = this.#options;
    if (at === undefined) return;
    const chosen: MountedPoint[] = [];
    let failure: B2Error | undefined;
    for (const meta of volume === undefined ? await this.volumes() : [volume]) {
      const view = this.#view(meta);
      try {
        const use = await view.history();
        try {
          chosen.push({
            volume: meta,
            commit: (await choosePoint(use.history, meta, at, warn)).commit,
          });
        } finally {
          await use.release();
        }
      } catch (error) {
        if (!isKind(error, 'not-found', 'damaged') || volume !== undefined) throw error;
        warn(`volume ${meta.name} is left out: ${error.message}`);
        failure ??= error;
      }
    }
    if (chosen.length === 0)
      throw failure ?? new B2Error('not-found', 'the repository holds no volume yet');
    this.#chosen = chosen;
  }

  /**
   * Begins to open the history of the only volume, while others still prepare the mount: whoever looks into it will want that. What
   * fails then is told to who looks.
   */
  prepare(): void {
    const { volume } = this.#options;
    if (volume === undefined || this.#chosen !== undefined) return;
    void this.#view(volume)
      .history()
      .then((use) => use.release())
      .catch(() => undefined);
  }

  /** Every volume that the tree shows. */
  async volumes(): Promise<readonly VolumeMeta[]> {
    const { volume } = this.#options;
    if (this.#chosen !== undefined) return this.#chosen.map((c) => c.volume);
    if (volume !== undefined) return [volume];
    return this.#allVolumes();
  }

  /** Every volume of the repository, shown or not. */
  async #allVolumes(): Promise<readonly VolumeMeta[]> {
    const { repo, clock, warn } = this.#options;
    const now = clock.monotonicNs();
    if (this.#volumes === undefined || now - this.#volumes.atNs > VOLUMES_VALID_NS) {
      this.#volumes = { list: await listVolumes(repo, warn), atNs: now };
    }
    return this.#volumes.list;
  }

  root(): TreeDirectory {
    const { volume } = this.#options;
    if (volume !== undefined) return this.#top(volume);
    return this.#volumesDirectory([]);
  }

  /** True if the file systems inside are shown. */
  get hasFiles(): boolean {
    return this.#options.files !== undefined;
  }

  /** Images open now. */
  get openImages(): number {
    return [...this.#views.values()].reduce((n, v) => n + v.openImages, 0);
  }

  async close(): Promise<void> {
    this.#isClosed = true;
    this.#closing.abort();
    await this.#counts;
    await this.#options.files?.close();
    for (const view of this.#views.values()) await view.close();
  }

  #view(meta: VolumeMeta): VolumeView {
    let view = this.#views.get(meta.id);
    if (view === undefined) {
      view = new VolumeView(this.#options.repo, meta, this.#options.warn);
      this.#views.set(meta.id, view);
    }
    return view;
  }

  /** What stands for one volume. */
  #top(meta: VolumeMeta): TreeDirectory {
    const view = this.#view(meta);
    const chosen = this.#chosen?.find((c) => c.volume.id === meta.id);
    return chosen === undefined
      ? this.#volumeDirectory(view)
      : this.#pointDirectory(view, chosen.commit);
  }

  /** Volumes whose path starts with `prefix`; a volume that ends there and others below it share the directory. */
  #volumesDirectory(prefix: readonly string[]): TreeDirectory {
    const below = async (): Promise<
      Map<string, { own: VolumeMeta | undefined; hasMore: boolean }>
    > => {
      const volumes = await this.volumes();
      const paths = volumePaths(volumes);
      const found = new Map<string, { own: VolumeMeta | undefined; hasMore: boolean }>();
      for (const [i, meta] of volumes.entries()) {
        const path = paths[i] ?? [];
        if (path.length <= prefix.length || prefix.some((part, n) => path[n] !== part)) continue;
        const name = path[prefix.length] ?? '';
        const known = found.get(name) ?? { own: undefined, hasMore: false };
        if (path.length === prefix.length + 1) known.own = meta;
        else known.hasMore = true;
        found.set(name, known);
      }
      return found;
    };
    const entry = (name: string, own: VolumeMeta | undefined, hasMore: boolean): TreeEntry => {
      const more = hasMore ? this.#volumesDirectory([...prefix, name]) : undefined;
      const top = own === undefined ? undefined : this.#top(own);
      const node = top === undefined ? more : more === undefined ? top : joined(top, more);
      if (node === undefined) throw new Error('a name without a volume');
      return { node, isVolatile: true };
    };
    return {
      kind: 'directory',
      key: `volumes:${prefix.join('/')}`,
      mtimeNs: this.#mountedNs,
      lookup: async (name) => {
        const found = (await below()).get(name);
        return found === undefined ? undefined : entry(name, found.own, found.hasMore);
      },
      list: async function* () {
        for (const [name, { own, hasMore }] of await below()) {
          yield { name, kind: 'directory', entry: entry(name, own, hasMore) };
        }
      },
    };
  }

  #volumeDirectory(view: VolumeView): TreeDirectory {
    const { meta } = view;
    const fixed = [this.#snapshotsDirectory(view), this.#pointsDirectory(view)];
    const [snapshots, points] = fixed;
    const lookup = async (name: string): Promise<TreeEntry | undefined> => {
      if (name === 'latest') {
        const commit = await view.latest();
        return commit === undefined
          ? undefined
          : { node: this.#pointDirectory(view, commit), isVolatile: true };
      }
      const node = name === 'snapshots' ? snapshots : name === 'points' ? points : undefined;
      return node === undefined ? undefined : { node, isVolatile: false };
    };
    return {
      kind: 'directory',
      key: `volume:${meta.id}`,
      mtimeNs: meta.updatedNs,
      lookup,
      list: async function* () {
        if ((await view.latest()) !== undefined) yield { name: 'latest', kind: 'directory' };
        yield { name: 'snapshots', kind: 'directory' };
        yield { name: 'points', kind: 'directory' };
      },
    };
  }

  #snapshotsDirectory(view: VolumeView): TreeDirectory {
    return {
      kind: 'directory',
      key: `snapshots:${view.meta.id}`,
      mtimeNs: view.meta.updatedNs,
      lookup: async (name) => {
        const all = await view.snapshots();
        const snapshot =
          all.find((s) => fileName(s.name, `${s.seq}`) === name) ??
          all.find((s) => s.name === name);
        if (snapshot === undefined) return undefined;
        const use = await view.history();
        try {
          const when: When = { kind: 'name', name: snapshot.name };
          const { commit } = await choosePoint(use.history, view.meta, when, this.#options.warn);
          // A snapshot can be removed and its name given to another one.
          return { node: this.#pointDirectory(view, commit), isVolatile: true };
        } finally {
          await use.release();
        }
      },
      list: async function* () {
        for (const s of await view.snapshots())
          yield { name: fileName(s.name, `${s.seq}`), kind: 'directory' };
      },
    };
  }

  #pointsDirectory(view: VolumeView): TreeDirectory {
    const entry = (span: Span): TreeEntry => ({
      node: this.#dayDirectory(view, span),
      isVolatile: false,
    });
    return {
      kind: 'directory',
      key: `points:${view.meta.id}`,
      mtimeNs: view.meta.updatedNs,
      lookup: async (name) => {
        const span = daySpan(name);
        return span !== undefined && (await hasPoint(view, span)) ? entry(span) : undefined;
      },
      list: async function* () {
        const use = await view.history();
        try {
          let before = (1n << 63n) - 1n;
          for (;;) {
            // The newest point first, then the newest one before its day, and so on: a step for each day that has any.
            const found = await use.timeline.before(before);
            if (found === undefined) return;
            const span = dayOf(found.point.instantNs);
            yield { name: dayName(span.fromNs), kind: 'directory', entry: entry(span) };
            if (span.fromNs === 0n) return;
            before = span.fromNs - 1n;
          }
        } finally {
          await use.release();
        }
      },
    };
  }

  #dayDirectory(view: VolumeView, day: Span): TreeDirectory {
    const entry = (span: Span): TreeEntry => ({
      node: this.#hourDirectory(view, span),
      isVolatile: false,
    });
    return {
      kind: 'directory',
      key: `day:${view.meta.id}:${day.fromNs}`,
      mtimeNs: day.fromNs,
      lookup: async (name) => {
        const span = hourSpan(day, name);
        return span !== undefined && (await hasPoint(view, span)) ? entry(span) : undefined;
      },
      list: async function* () {
        const use = await view.history();
        try {
          for (let hour = 0; hour < 24; hour++) {
            const name = `${hour}`.padStart(2, '0');
            const span = hourSpan(day, name);
            if (span === undefined || !(await hasPointIn(use, span))) continue;
            yield { name, kind: 'directory', entry: entry(span) };
          }
        } finally {
          await use.release();
        }
      },
    };
  }

  #hourDirectory(view: VolumeView, hour: Span): TreeDirectory {
    const entry = (point: Point): TreeEntry => ({
      node: this.#pointDirectory(view, point),
      isVolatile: false,
    });
    return {
      kind: 'directory',
      key: `hour:${view.meta.id}:${hour.fromNs}`,
      mtimeNs: hour.fromNs,
      lookup: async (name) => {
        const seq = seqOfPointName(name);
        const commit = seq === undefined ? undefined : await view.point(seq);
        if (commit === undefined || commit.pointClass < PointClass.crash) return undefined;
        const isHere = commit.instantNs >= hour.fromNs && commit.instantNs <= hour.toNs;
        return isHere && pointName(commit.instantNs, commit.seq) === name
          ? entry(commit)
          : undefined;
      },
      list: async function* () {
        const use = await view.history();
        try {
          for await (const c of use.timeline.list({ sinceNs: hour.fromNs, untilNs: hour.toNs })) {
            const { seq, instantNs, sizeBytes } = c;
            const point = { seq, instantNs, sizeBytes };
            yield { name: pointName(instantNs, seq), kind: 'directory', entry: entry(point) };
          }
        } finally {
          await use.release();
        }
      },
    };
  }

  #pointDirectory(view: VolumeView, commit: Point): TreeDirectory {
    const point: Point = {
      seq: commit.seq,
      instantNs: commit.instantNs,
      sizeBytes: commit.sizeBytes,
    };
    const disk: Part = { name: 'disk.img', offset: 0, sizeBytes: point.sizeBytes };
    const entry = (part: Part): TreeEntry => ({
      node: this.#file(view, point, part),
      isVolatile: false,
    });
    return {
      kind: 'directory',
      key: `point:${view.meta.id}:${point.seq}`,
      mtimeNs: point.instantNs,
      lookup: async (name) => {
        if (name === disk.name) return entry(disk);
        if (!/^p[1-9]\d*\.img$/.test(name)) {
          const { files } = this.#options;
          const node = await files?.directory(this.#source(view, point), name);
          return node === undefined ? undefined : { node, isVolatile: false };
        }
        const part = (await this.#partitions(view, point)).find((p) => p.name === name);
        return part === undefined ? undefined : entry(part);
      },
      list: async function* (this: MountTree) {
        yield { name: disk.name, kind: 'file' } as const;
        for (const part of await this.#partitions(view, point))
          yield { name: part.name, kind: 'file' } as const;
        const { files } = this.#options;
        for (const name of (await files?.names(this.#source(view, point))) ?? [])
          yield { name, kind: 'directory' } as const;
      }.bind(this),
    };
  }

  #source(view: VolumeView, point: Point): FilesSource {
    return {
      key: `${view.meta.id}:${point.seq}`,
      volume: view.meta.name,
      name: `${view.meta.name} #${point.seq}`,
      mtimeNs: point.instantNs,
      openImage: () => imageOf(view, point.seq),
      companions: () => this.#companions(view, point.seq),
    };
  }

  /** The other volumes of the group that a point's volume is of, at its instant. */
  async #companions(view: VolumeView, seq: number): Promise<Companions | undefined> {
    const group = groupOf(view.meta, await this.#allVolumes());
    const commit = group === undefined ? undefined : await view.point(seq);
    if (group === undefined || commit === undefined) return undefined;
    return companionsAt(group, commit, (meta) => {
      const other = this.#view(meta);
      return {
        pointsAt: async (instantNs) => {
          const use = await other.history();
          try {
            use.history.refuseGap();
            return await pointsAt(use.timeline, instantNs);
          } finally {
            await use.release();
          }
        },
        openImage: (at) => imageOf(other, at),
      };
    });
  }

  #remember(view: VolumeView, point: Point): Remembered {
    const key = `${view.meta.id}:${point.seq}`;
    const known = this.#remembered.get(key) ?? {
      partitions: undefined,
      allocated: new Map<string, number>(),
      counting: new Map<string, Promise<number | undefined>>(),
    };
    this.#remembered.delete(key);
    this.#remembered.set(key, known);
    for (const old of this.#remembered.keys()) {
      if (this.#remembered.size <= REMEMBERED_POINTS) break;
      this.#remembered.delete(old);
    }
    return known;
  }

  #partitions(view: VolumeView, point: Point): Promise<readonly Part[]> {
    const remembered = this.#remember(view, point);
    remembered.partitions ??= this.#readPartitions(view, point).catch((error: unknown) => {
      remembered.partitions = undefined; // a store that was away may be back
      this.#options.warn(
        `volume ${view.meta.name}, point #${point.seq}: its partition table cannot be read: ${messageOf(error)}`,
      );
      return [];
    });
    return remembered.partitions;
  }

  async #readPartitions(view: VolumeView, point: Point): Promise<readonly Part[]> {
    const use = await view.open(point.seq);
    try {
      const { image } = use;
      const table = await readPartitionTable(
        readableImage(image, `${view.meta.name} #${point.seq}`),
      );
      return (table?.facts.partitions ?? [])
        .filter((p) => p.kind !== 'extended' && p.offsetBytes < image.sizeBytes && p.sizeBytes > 0)
        .map((p) => ({
          name: `p${p.number}.img`,
          offset: p.offsetBytes,
          sizeBytes: Math.min(p.sizeBytes, image.sizeBytes - p.offsetBytes),
        }));
    } finally {
      await use.close();
    }
  }

  #file(view: VolumeView, point: Point, part: Part): TreeFile {
    return {
      kind: 'file',
      key: `file:${view.meta.id}:${point.seq}:${part.name}`,
      mtimeNs: point.instantNs,
      sizeBytes: part.sizeBytes,
      allocatedBytes: () => this.#allocated(view, point, part),
      open: async () => {
        const use = await view.open(point.seq);
        const { image } = use;
        return {
          sizeBytes: part.sizeBytes,
          read: (into, offset) => {
            this.#lastReadNs = this.#options.clock.monotonicNs();
            return image.read(into, part.offset + offset);
          },
          lend: (offset, length) => {
            this.#lastReadNs = this.#options.clock.monotonicNs();
            return image.lend?.(part.offset + offset, length);
          },
          seek: (offset, what) => seekIn(image, part, offset, what),
          close: () => use.close(),
        };
      },
    };
  }

  async #allocated(view: VolumeView, point: Point, part: Part): Promise<number | undefined> {
    const remembered = this.#remember(view, point);
    const known = remembered.allocated.get(part.name);
    if (known !== undefined) return known;
    let counting = remembered.counting.get(part.name);
    if (counting === undefined) {
      if (this.#waitingCounts >= WAITING_COUNTS) return undefined;
      this.#waitingCounts++;
      // One at a time: a listing of a thousand points must not read a thousand manifests at once.
      counting = this.#counts
        .then(() => this.#count(view, point, part))
        .then((bytes) => {
          if (bytes !== undefined) remembered.allocated.set(part.name, bytes);
          return bytes;
        })
        .catch((error: unknown) => {
          this.#options.warn(
            `volume ${view.meta.name}, point #${point.seq}: allocated blocks cannot be counted: ${messageOf(error)}`,
          );
          return undefined;
        })
        .finally(() => {
          remembered.counting.delete(part.name);
          this.#waitingCounts--;
        });
      this.#counts = counting;
      remembered.counting.set(part.name, counting);
    }
    const patienceMs = this.#options.patienceMs ?? (isLarge(part) ? 0 : PATIENCE_MS);
    if (patienceMs === 0) return undefined;
    const stop = new AbortController();
    try {
      const late = this.#options.clock.sleep(patienceMs, stop.signal).then(() => undefined);
      return await Promise.race([counting, late]);
    } finally {
      stop.abort();
    }
  }

  /** Lets others have their turn: between two steps of a count. */
  async #stepAside(): Promise<void> {
    const { clock } = this.#options;
    if (clock.monotonicNs() - this.#lastReadNs < READING_NS) await clock.sleep(STEP_ASIDE_MS);
    else await new Promise((resolve) => setImmediate(resolve));
  }

  async #count(view: VolumeView, point: Point, part: Part): Promise<number | undefined> {
    const use = await view.open(point.seq);
    try {
      let bytes = 0;
      const end = part.offset + part.sizeBytes;
      if (isLarge(part)) await this.#options.clock.sleep(COUNT_LATER_MS, this.#closing.signal);
      for (let at = part.offset; at < end; at += COUNT_STEP_BYTES) {
        if (this.#isClosed) return undefined;
        const runs = await use.image.extents(at, Math.min(COUNT_STEP_BYTES, end - at));
        for (const run of runs) if (!run.hole) bytes += run.length;
        if (at + COUNT_STEP_BYTES < end) await this.#stepAside();
      }
      return bytes;
    } finally {
      await use.close();
    }
  }
}

function isLarge(part: Part): boolean {
  return part.sizeBytes > COUNTED_AT_ONCE_BYTES;
}

/** A volume's directory in which other volumes lie too. */
function joined(own: TreeDirectory, more: TreeDirectory): TreeDirectory {
  return {
    ...own,
    key: `${own.key}+${more.key}`,
    lookup: async (name) => (await own.lookup(name)) ?? (await more.lookup(name)),
    list: async function* () {
      yield* own.list();
      yield* more.list();
    },
  };
}

async function hasPoint(view: VolumeView, span: Span): Promise<boolean> {
  const use = await view.history();
  try {
    return await hasPointIn(use, span);
  } finally {
    await use.release();
  }
}

async function hasPointIn(use: HistoryUse, span: Span): Promise<boolean> {
  for await (const _ of use.timeline.list({ sinceNs: span.fromNs, untilNs: span.toNs }))
    return true;
  return false;
}

async function seekIn(
  image: Image,
  part: Part,
  offset: number,
  what: 'data' | 'hole',
): Promise<number | undefined> {
  const end = part.offset + part.sizeBytes;
  for (let at = part.offset + offset; at < end;) {
    const [run] = await image.extents(at, end - at, 1);
    if (run === undefined) break;
    if (run.hole === (what === 'hole')) return at - part.offset;
    at = run.offset + run.length;
  }
  return what === 'hole' ? part.sizeBytes : undefined;
}

/** The image of a point, as long as it is open. */
async function imageOf(view: VolumeView, seq: number): Promise<Image> {
  const use = await view.open(seq);
  const { image } = use;
  return {
    sizeBytes: image.sizeBytes,
    logicalBlockBytes: image.logicalBlockBytes,
    read: (into, offset) => image.read(into, offset),
    extents: (offset, length, limit) => image.extents(offset, length, limit),
    close: () => use.close(),
  };
}
