/**
 * The file systems inside the points of a mount, as directories. A file system is mounted (by a {@link KernelEnvironment}, in a
 * namespace of its own) when somebody first looks into its directory, and unmounted when nobody has for a while; a process there
 * (files/agent.ts) answers for it, so that this one never waits for its own mount.
 */
import { B2Error, errnoOf } from '../errors.js';
import type { Clock } from '../clock.js';
import type { EventSink } from '../events.js';
import { FilesAgent } from '../files/agent-client.js';
import type { AgentAnswers, AgentQuestion, AgentStat } from '../files/agent-protocol.js';
import { kernelLacks, openKernelEnvironment, type KernelEnvironment } from '../files/kernel.js';
import { findAreas, type FoundArea } from '../files/layout.js';
import { decodeName, encodeName } from '../files/names.js';
import type { Image } from '../image.js';
import type { NodeKind } from './protocol.js';
import type {
  OpenFile,
  TreeAttributes,
  TreeDirectory,
  TreeEntry,
  TreeListed,
  TreeNode,
  TreeXattrs,
} from './tree.js';

/** How long a mounted file system that nobody looks at stays. */
const IDLE_MS = 60_000;
/** Points whose file systems are mounted at most; the one that is idle the longest goes first. */
const OPEN_POINTS = 8;
/** Points whose areas are remembered. */
const REMEMBERED_POINTS = 256;

/** A point of a volume. */
export interface FilesSource {
  /** Tells points apart. */
  readonly key: string;
  /** The volume, and the point of it: for messages. */
  readonly volume: string;
  readonly name: string;
  readonly mtimeNs: bigint;
  readonly openImage: () => Promise<Image>;
}

interface Opened {
  readonly environment: KernelEnvironment;
  readonly agent: FilesAgent;
}

interface Shared {
  readonly opened: Promise<Opened>;
  users: number;
  idle: NodeJS.Timeout | undefined;
  /** True when nothing can be read through it any more: the next look opens another. */
  isBroken: () => boolean;
  /** Another has taken its place: it ends with its last user. */
  isReplaced: boolean;
}

/** An area of a point, mounted when it is asked for. */
interface Root {
  readonly source: FilesSource;
  readonly area: FoundArea;
}

const KIND_OF_TYPE: Readonly<Record<number, NodeKind>> = {
  0o010000: 'fifo',
  0o020000: 'character',
  0o040000: 'directory',
  0o060000: 'block',
  0o100000: 'file',
  0o120000: 'symlink',
  0o140000: 'socket',
};
const TYPE_BITS = 0o170000;

export interface FilesViewOptions {
  readonly clock: Clock;
  readonly events: EventSink;
}

export class FilesView {
  readonly #options: FilesViewOptions;
  readonly #areas = new Map<string, Promise<readonly FoundArea[]>>();
  readonly #points = new Map<string, Shared>();
  readonly #replaced = new Set<Shared>();
  readonly #toldOf = new Set<string>();
  readonly #closing = new Set<Promise<void>>();
  /** Attributes of roots that have been mounted. */
  readonly #roots = new Map<string, AgentStat>();
  #isClosed = false;

  constructor(options: FilesViewOptions) {
    this.#options = options;
  }

  /** Names of the directories of a point: `p1`, or `disk` without a partition table; of logical volumes, their volume groups. */
  async names(source: FilesSource): Promise<readonly string[]> {
    const first = (await this.#areasOf(source)).map(({ name }) => name.split('/')[0] ?? name);
    return [...new Set(first)];
  }

  /** The directory of that name; undefined where there is none. */
  async directory(source: FilesSource, name: string): Promise<TreeDirectory | undefined> {
    const areas = await this.#areasOf(source);
    const area = areas.find((a) => a.name === name);
    if (area === undefined) return this.#group(source, name, areas);
    const root: Root = { source, area };
    const key = `${source.key}:${area.name}`;
    return this.#directory(root, Buffer.alloc(0), `root:${key}`, source.mtimeNs, async () => {
      const stat = this.#roots.get(key);
      return stat === undefined ? undefined : attributesOf(stat);
    });
  }

  /** The directory of a volume group, in which its logical volumes are directories. */
  #group(
    source: FilesSource,
    name: string,
    areas: readonly FoundArea[],
  ): TreeDirectory | undefined {
    const inside = areas.flatMap((a) =>
      a.name.startsWith(`${name}/`) ? [a.name.slice(name.length + 1)] : [],
    );
    if (inside.length === 0) return undefined;
    return {
      kind: 'directory',
      key: `group:${source.key}:${name}`,
      mtimeNs: source.mtimeNs,
      lookup: async (volume) => {
        const node = inside.includes(volume)
          ? await this.directory(source, `${name}/${volume}`)
          : undefined;
        return node === undefined ? undefined : { node, isVolatile: false };
      },
      list: async function* () {
        for (const volume of inside) yield { name: volume, kind: 'directory' } as const;
        return Promise.resolve();
      },
    };
  }

  /** Points whose file systems are mounted now. */
  get openPoints(): number {
    return this.#points.size;
  }

  /** Unmounts everything, in use or not. */
  async close(): Promise<void> {
    this.#isClosed = true;
    for (const [key, shared] of this.#points) {
      clearTimeout(shared.idle);
      this.#points.delete(key);
      this.#end(shared);
    }
    for (const shared of this.#replaced) this.#end(shared);
    this.#replaced.clear();
    await Promise.all(this.#closing);
  }

  #areasOf(source: FilesSource): Promise<readonly FoundArea[]> {
    const known = this.#areas.get(source.key);
    if (known !== undefined) return known;
    const found = this.#readAreas(source);
    this.#areas.set(source.key, found);
    // A store that was away may be back.
    found.catch(() => this.#areas.delete(source.key));
    for (const old of this.#areas.keys()) {
      if (this.#areas.size <= REMEMBERED_POINTS) break;
      this.#areas.delete(old);
    }
    return found;
  }

  async #readAreas(source: FilesSource): Promise<readonly FoundArea[]> {
    const image = await source.openImage();
    try {
      const areas = await findAreas(image, source.name);
      for (const area of areas) {
        const why = leftOut(area);
        if (why === undefined) continue;
        // Once for a volume, not for each of its points.
        const what = `${source.volume}, ${area.name}: ${why}`;
        if (this.#toldOf.has(what)) continue;
        this.#toldOf.add(what);
        this.#options.events({ type: 'warning', message: what });
      }
      return areas.filter((area) => area.holds === 'files' && area.devices === 1);
    } finally {
      await image.close();
    }
  }

  /** Runs `fn` with the area mounted at `directory`. The mount stays for as long as this takes, and a while. */
  async #use<T>(root: Root, fn: (opened: Opened, directory: string) => Promise<T>): Promise<T> {
    const shared = this.#take(root);
    try {
      const opened = await shared.opened;
      const directory = await opened.environment.mount(root.area);
      await this.#rememberRoot(root, opened, directory);
      return await withReason(opened, () => fn(opened, directory));
    } finally {
      this.#give(root.source.key, shared);
    }
  }

  async #rememberRoot(root: Root, { agent }: Opened, directory: string): Promise<void> {
    const key = `${root.source.key}:${root.area.name}`;
    if (this.#roots.has(key)) return;
    this.#roots.set(key, await agent.ask({ op: 'lstat', path: Buffer.from(directory) }));
  }

  /** Counts a user; {@link #give} takes it back. */
  #take(root: Root): Shared {
    if (this.#isClosed) throw new B2Error('failed', 'the mount is being taken down');
    const { key } = root.source;
    let shared = this.#points.get(key);
    if (shared?.isBroken() === true) {
      clearTimeout(shared.idle);
      shared.isReplaced = true;
      if (shared.users === 0) this.#end(shared);
      else this.#replaced.add(shared);
      shared = undefined;
    }
    if (shared === undefined) {
      shared = {
        opened: this.#open(root),
        users: 0,
        idle: undefined,
        isBroken: () => false,
        isReplaced: false,
      };
      this.#points.set(key, shared);
      const mine = shared;
      mine.opened.then(
        ({ environment, agent }) => {
          mine.isBroken = () => environment.isBroken || agent.isEnded;
        },
        () => {
          if (this.#points.get(key) === mine) this.#points.delete(key);
        },
      );
      this.#makeRoom(key);
    }
    clearTimeout(shared.idle);
    shared.users++;
    // The one used last is the last of the map.
    this.#points.delete(key);
    this.#points.set(key, shared);
    return shared;
  }

  #give(key: string, shared: Shared): void {
    shared.users--;
    if (shared.users > 0) return;
    if (shared.isReplaced && this.#replaced.delete(shared)) this.#end(shared);
    if (this.#points.get(key) !== shared) return;
    clearTimeout(shared.idle);
    shared.idle = setTimeout(() => this.#drop(key, shared), IDLE_MS);
    shared.idle.unref();
  }

  #makeRoom(except: string): void {
    for (const [key, shared] of this.#points) {
      if (this.#points.size <= OPEN_POINTS) return;
      if (shared.users === 0 && key !== except) this.#drop(key, shared);
    }
  }

  #drop(key: string, shared: Shared): void {
    if (shared.users > 0 || this.#points.get(key) !== shared) return;
    clearTimeout(shared.idle);
    this.#points.delete(key);
    this.#end(shared);
  }

  #end(shared: Shared): void {
    const ending = shared.opened
      .then(async ({ agent, environment }) => {
        await agent.close();
        await environment.close();
      })
      .catch(() => undefined)
      .finally(() => this.#closing.delete(ending));
    this.#closing.add(ending);
  }

  async #open({ source, area }: Root): Promise<Opened> {
    const lacks = await kernelLacks(area);
    if (lacks !== undefined) {
      throw new B2Error('unsupported', `${source.name}, ${area.name} (${area.type}): ${lacks}`, {
        hint: '"b2 ls", "b2 cat" and "b2 restore --path" can read it with --backend vm.',
      });
    }
    const { clock, events } = this.#options;
    const areas = await this.#areasOf(source);
    const image = await source.openImage();
    const environment = await openKernelEnvironment(image, areas, clock, events);
    return { environment, agent: new FilesAgent(environment) };
  }

  /** `relative` is empty for the root, else begins with a slash. */
  #directory(
    root: Root,
    relative: Buffer,
    key: string,
    mtimeNs: bigint,
    attributes: () => Promise<TreeAttributes | undefined>,
  ): TreeDirectory {
    const at = (name: string): Buffer =>
      Buffer.concat([relative, Buffer.from('/'), encodeName(name)]);
    return {
      kind: 'directory',
      key,
      mtimeNs,
      attributes,
      xattrs: this.#xattrs(root, relative),
      lookup: async (name): Promise<TreeEntry | undefined> => {
        try {
          const stat = await this.#pathAsk(root, at(name), (path) => ({ op: 'lstat', path }));
          return { node: this.#node(root, at(name), stat), isVolatile: false };
        } catch (error) {
          if (errnoOf(error) === 'ENOENT') return undefined;
          throw error;
        }
      },
      list: async function* (this: FilesView): AsyncGenerator<TreeListed> {
        const all = await this.#pathAsk(root, relative, (path) => ({ op: 'readdir', path }));
        for (const { name, type } of all) {
          yield { name: decodeName(name), kind: KIND_OF_TYPE[type & TYPE_BITS] ?? 'file' };
        }
      }.bind(this),
    };
  }

  #pathAsk<Q extends AgentQuestion>(
    root: Root,
    relative: Buffer,
    question: (path: Buffer) => Q,
  ): Promise<AgentAnswers[Q['op']]> {
    return this.#use(root, ({ agent }, directory) =>
      agent.ask(question(Buffer.concat([Buffer.from(directory), relative]))),
    );
  }

  #node(root: Root, relative: Buffer, stat: AgentStat): TreeNode {
    const { source, area } = root;
    // Subvolumes of btrfs count their inodes each for itself; a file with several names is one.
    const key = `inode:${source.key}:${area.name}:${stat.device}:${stat.inode}`;
    const attributes = (): Promise<TreeAttributes> => Promise.resolve(attributesOf(stat));
    const kind = KIND_OF_TYPE[stat.mode & TYPE_BITS] ?? 'file';
    const { mtimeNs, sizeBytes } = stat;
    if (kind === 'directory') return this.#directory(root, relative, key, mtimeNs, attributes);
    const common = { key, mtimeNs, attributes, xattrs: this.#xattrs(root, relative) };
    if (kind === 'file') {
      return {
        ...common,
        kind,
        sizeBytes,
        allocatedBytes: () => Promise.resolve(stat.blocks * 512),
        open: () => this.#openFile(root, relative, sizeBytes),
      };
    }
    if (kind !== 'symlink') return { ...common, kind };
    return {
      ...common,
      kind,
      readlink: () => this.#pathAsk(root, relative, (path) => ({ op: 'readlink', path })),
    };
  }

  #xattrs(root: Root, relative: Buffer): TreeXattrs {
    return {
      get: (name) => this.#pathAsk(root, relative, (path) => ({ op: 'getxattr', path, name })),
      list: () => this.#pathAsk(root, relative, (path) => ({ op: 'listxattr', path })),
    };
  }

  async #openFile(root: Root, relative: Buffer, sizeBytes: number): Promise<OpenFile> {
    // An open file keeps its file system mounted, and its handle means something to this agent only.
    const shared = this.#take(root);
    let isClosed = false;
    const release = (): void => {
      if (isClosed) return;
      isClosed = true;
      this.#give(root.source.key, shared);
    };
    try {
      const opened = await shared.opened;
      const { agent, environment } = opened;
      const directory = await environment.mount(root.area);
      await this.#rememberRoot(root, opened, directory);
      const ask = <Q extends AgentQuestion>(question: Q): Promise<AgentAnswers[Q['op']]> =>
        withReason(opened, () => agent.ask(question));
      const path = Buffer.concat([Buffer.from(directory), relative]);
      const handle = await ask({ op: 'open', path });
      return {
        sizeBytes,
        read: async (into, offset) => {
          const { length } = into;
          const bytes = await ask({ op: 'read', handle, offset, length });
          if (bytes.length !== length)
            throw new B2Error('io', `a file of ${root.source.name} ended too early`);
          into.set(bytes);
        },
        seek: (offset, what) => ask({ op: 'seek', handle, offset, what }),
        close: async () => {
          if (isClosed) return;
          await agent.ask({ op: 'close', handle }).catch(() => undefined);
          release();
        },
      };
    } catch (error) {
      release();
      throw error;
    }
  }
}

/** Why an area with file systems in it is no directory, in words; undefined where it is one, or holds none. */
function leftOut({ holds, devices, type, left = [] }: FoundArea): string | undefined {
  if (holds === 'container' && left.length > 0)
    return `logical volumes (LVM) in it are not shown here, because only LVM itself can put them together, and here they would mix with those of this machine (${left.join('; ')}); "b2 ls", "b2 cat" and "b2 restore --path" read them in a tiny virtual machine`;
  if (holds === 'files' && devices > 1)
    return `the ${type} in it lies on ${devices} devices and is not shown: one of them alone cannot be read`;
  return undefined;
}

/** What `fn` gives. What reading the image has failed with says more than the EIO that came of it. */
async function withReason<T>({ environment }: Opened, fn: () => Promise<T>): Promise<T> {
  try {
    return await fn();
  } catch (error) {
    const [first] = errnoOf(error) === 'EIO' ? environment.failures : [];
    throw first ?? error;
  }
}

function attributesOf(stat: AgentStat): TreeAttributes {
  return {
    sizeBytes: stat.sizeBytes,
    blocks: stat.blocks,
    mtimeNs: stat.mtimeNs,
    atimeNs: stat.atimeNs,
    ctimeNs: stat.ctimeNs,
    permissions: stat.mode & 0o7777,
    links: stat.links,
    uid: stat.uid,
    gid: stat.gid,
    // st_rdev as glibc packs it is what the kernel wants for the small numbers that devices have.
    rdev: Number(stat.rdev & 0xffff_ffffn),
  };
}
