/**
 * The file systems inside the points of a mount, as directories. A file system is mounted (by a {@link KernelEnvironment}, in a
 * namespace of its own) when somebody first looks into its directory, and unmounted when nobody has for a while; a process there
 * (files/agent.ts) answers for it, so that this one never waits for its own mount.
 *
 * Logical volumes that only LVM can put together are read by it in a tiny virtual machine (files/vm-volumes.ts), as an image of
 * their own that is mounted in the same way. It is started when somebody looks into a directory that needs it.
 */
import { B2Error, errnoOf, messageOf } from '../errors.js';
import type { Clock } from '../clock.js';
import type { EventSink } from '../events.js';
import { FilesAgent } from '../files/agent-client.js';
import type { AgentAnswers, AgentQuestion, AgentStat } from '../files/agent-protocol.js';
import { kernelLacks, openKernelEnvironment, type KernelEnvironment } from '../files/kernel.js';
import type { FindCompanions } from '../files/companions.js';
import { findPointAreas } from '../files/group-layout.js';
import { elsewhere, isForLvm, whatIsLeft, whyNotShown, type FoundArea } from '../files/layout.js';
import { vmVolumesLack, VM_HINT } from '../files/vm.js';
import { openVmVolumes, type VmVolumes } from '../files/vm-volumes.js';
import { describeMember } from '../files/md.js';
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
/** The same of one with a virtual machine, which takes long to start. */
const VM_IDLE_MS = 300_000;
/** Virtual machines at most, as {@link OPEN_POINTS}. */
const OPEN_VMS = 2;
/** Points whose file systems are mounted at most; the one that is idle the longest goes first. */
const OPEN_POINTS = 8;
/** Until a virtual machine is ended although something is still being read through it. */
const VM_END_MS = 5000;
/** How long it is believed that another volume has no point of an instant. */
const MISSING_MS = 5000;
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
  /** The other volumes of its group at that instant. */
  readonly companions?: FindCompanions;
}

interface Opened {
  readonly environment: KernelEnvironment;
  readonly agent: FilesAgent;
  /** What can be mounted in it: a virtual machine that was started anew may have another order. */
  readonly areas: readonly FoundArea[];
  /** The virtual machine that it reads through. */
  readonly volumes?: VmVolumes;
}

/** What is in a point. */
interface Layout {
  /** All of it. */
  readonly all: readonly FoundArea[];
  /** The image that it lies in: of the point, with those of other volumes where something lies on them, too. */
  readonly openImage: () => Promise<Image>;
  /** What this machine's kernel can mount. */
  readonly shown: readonly FoundArea[];
  /** Names of the volumes that are for the virtual machine; empty where none can be started. */
  readonly forVm: readonly string[];
  /** False where another volume of the group has no point of that instant. */
  readonly isWhole: boolean;
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

/** An area of a point, mounted when it is asked for. With {@link FoundArea.isInVm} one of the virtual machine. */
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
  readonly cacheDir: string;
}

export class FilesView {
  readonly #options: FilesViewOptions;
  readonly #areas = new Map<string, Promise<Layout>>();
  /** File systems that were found in virtual machines. */
  readonly #inVm = new Map<string, readonly FoundArea[]>();
  readonly #points = new Map<string, Shared>();
  readonly #replaced = new Set<Shared>();
  readonly #toldOf = new Set<string>();
  readonly #closing = new Set<Promise<void>>();
  /** Attributes of roots that have been mounted. */
  readonly #roots = new Map<string, AgentStat>();
  /** Ends virtual machines that are being started. */
  readonly #ending = new AbortController();
  #isClosed = false;

  constructor(options: FilesViewOptions) {
    this.#options = options;
  }

  /** Names of the directories of a point: `p1`, or `disk` without a partition table; of logical volumes, their volume groups. */
  async names(source: FilesSource): Promise<readonly string[]> {
    const { shown, forVm } = await this.#areasOf(source);
    const first = [...shown.map((a) => a.name), ...forVm].map((name) => name.split('/')[0] ?? name);
    return [...new Set(first)];
  }

  /** The directory of that name; undefined where there is none. */
  async directory(source: FilesSource, name: string): Promise<TreeDirectory | undefined> {
    const layout = await this.#areasOf(source);
    const area = layout.shown.find((a) => a.name === name);
    return area === undefined ? this.#group(source, name, layout) : this.#root({ source, area });
  }

  #root({ source, area }: Root): TreeDirectory {
    const root: Root = { source, area };
    const key = `${source.key}:${area.name}`;
    return this.#directory(root, Buffer.alloc(0), `root:${key}`, source.mtimeNs, async () => {
      const stat = this.#roots.get(key);
      return stat === undefined ? undefined : attributesOf(stat);
    });
  }

  /** The directory of a volume group, in which its logical volumes are directories. */
  #group(source: FilesSource, name: string, layout: Layout): TreeDirectory | undefined {
    const inside = layout.shown.filter((a) => a.name.startsWith(`${name}/`));
    const forVm = layout.forVm.filter((volume) => volume.startsWith(`${name}/`));
    if (inside.length === 0 && forVm.length === 0) return undefined;
    const last = (volume: string): string => volume.slice(name.length + 1);
    return {
      kind: 'directory',
      key: `group:${source.key}:${name}`,
      mtimeNs: source.mtimeNs,
      lookup: async (volume) => {
        const full = `${name}/${volume}`;
        let area = inside.find((a) => a.name === full);
        // Only for what may be there: programs ask for many names.
        if (area === undefined && forVm.includes(full))
          area = (await this.#vmAreas(source)).find((a) => a.name === full);
        return area === undefined
          ? undefined
          : { node: this.#root({ source, area }), isVolatile: false };
      },
      list: async function* (this: FilesView): AsyncGenerator<TreeListed> {
        for (const area of inside) yield { name: last(area.name), kind: 'directory' };
        for (const volume of await this.#vmNames(source, forVm))
          yield { name: last(volume), kind: 'directory' };
      }.bind(this),
    };
  }

  /** Those of the volumes that hold file systems; all of them where that cannot be told now: who looks into one gets an error. */
  async #vmNames(source: FilesSource, forVm: readonly string[]): Promise<readonly string[]> {
    if (forVm.length === 0) return [];
    try {
      const areas = await this.#vmAreas(source);
      return forVm.filter((volume) => areas.some((a) => a.name === volume));
    } catch (error) {
      this.#options.events({
        type: 'warning',
        message: `${source.name}: what is in ${forVm.join(', ')} cannot be told now: ${messageOf(error)}`,
      });
      return forVm;
    }
  }

  /** The file systems that only the virtual machine can get at; it is started where that is not known. */
  async #vmAreas(source: FilesSource): Promise<readonly FoundArea[]> {
    const known = this.#inVm.get(source.key);
    if (known !== undefined) return known;
    const shared = this.#take(source, true);
    try {
      return (await shared.opened).areas;
    } finally {
      this.#give(vmKey(source, true), shared);
    }
  }

  /** Points whose file systems are mounted now. */
  get openPoints(): number {
    return this.#points.size;
  }

  /**
   * The mount is to end now, in use or not: virtual machines are not started any more, and those that run end soon, so that no
   * request waits for one. {@link close} follows when all requests have been answered.
   */
  hurry(): void {
    this.#isClosed = true;
    this.#ending.abort();
    for (const [key, { opened }] of this.#points) {
      if (!isVmKey(key)) continue;
      const late = setTimeout(() => {
        opened.then(
          ({ volumes }) => volumes?.abandon(endedAnyway()),
          () => undefined,
        );
      }, VM_END_MS);
      late.unref();
    }
  }

  /** Unmounts everything, in use or not. */
  async close(): Promise<void> {
    this.#isClosed = true;
    this.#ending.abort();
    for (const [key, shared] of this.#points) {
      clearTimeout(shared.idle);
      this.#points.delete(key);
      this.#end(shared);
    }
    for (const shared of this.#replaced) this.#end(shared);
    this.#replaced.clear();
    await Promise.all(this.#closing);
  }

  #areasOf(source: FilesSource): Promise<Layout> {
    const known = this.#areas.get(source.key);
    if (known !== undefined) return known;
    const found = this.#readAreas(source);
    this.#areas.set(source.key, found);
    const forget = (): void => {
      if (this.#areas.get(source.key) === found) this.#areas.delete(source.key);
    };
    found.then(
      // The other volumes of a group have their points of an instant a moment later.
      ({ isWhole }) => (isWhole ? undefined : setTimeout(forget, MISSING_MS).unref()),
      // A store that was away may be back.
      forget,
    );
    for (const old of this.#areas.keys()) {
      if (this.#areas.size <= REMEMBERED_POINTS) break;
      this.#areas.delete(old);
      this.#inVm.delete(old);
    }
    return found;
  }

  async #readAreas(source: FilesSource): Promise<Layout> {
    const { areas: all, openImage, missing } = await findPointAreas(source);
    const containers = all.filter(isForLvm);
    const volumes = containers.flatMap((a) =>
      (a.left ?? []).flatMap((l) => (l.isElsewhere === true ? [] : (l.volume ?? []))),
    );
    const lacks = containers.length === 0 ? undefined : await this.#cannotStartVm();
    for (const area of all) {
      const why = leftOut(area, lacks);
      if (why !== undefined) this.#tellOnce(source, `${area.name}: ${why}`);
      for (const reason of elsewhere(area)) this.#tellOnce(source, `left out: ${reason}`);
      if (area.why !== undefined || area.holds === 'none') continue;
      for (const member of area.members ?? [])
        this.#tellOnce(
          source,
          `${area.name}: ${describeMember(member)}`,
          member.caveats.length > 0 ? 'warning' : 'note',
        );
    }
    const shown = all.filter((area) => area.holds === 'files' && whyNotShown(area) === undefined);
    const forVm = lacks === undefined ? volumes : [];
    return { all, openImage, shown, forVm, isWhole: missing.length === 0 };
  }

  /** Once for a volume, not for each of its points. */
  #tellOnce(source: FilesSource, text: string, type: 'note' | 'warning' = 'warning'): void {
    const what = `${source.volume}, ${text}`;
    if (this.#toldOf.has(what)) return;
    this.#toldOf.add(what);
    this.#options.events({ type, message: what });
  }

  async #cannotStartVm(): Promise<string | undefined> {
    const lacks = await vmVolumesLack();
    return lacks === undefined ? undefined : `${lacks}. ${VM_HINT}`;
  }

  /** Runs `fn` with the area mounted at `directory`. The mount stays for as long as this takes, and a while. */
  async #use<T>(root: Root, fn: (opened: Opened, directory: string) => Promise<T>): Promise<T> {
    const isInVm = root.area.isInVm === true;
    const shared = this.#take(root.source, isInVm);
    try {
      const opened = await shared.opened;
      const directory = await this.#mount(root, opened);
      return await withReason(opened, () => fn(opened, directory));
    } finally {
      this.#give(vmKey(root.source, isInVm), shared);
    }
  }

  async #mount(root: Root, opened: Opened): Promise<string> {
    const { source, area } = root;
    const here = opened.areas.find((a) => a.name === area.name);
    const lacks = here === undefined ? 'it is not there any more' : await kernelLacks(here);
    if (here === undefined || lacks !== undefined) {
      throw new B2Error('unsupported', `${source.name}, ${area.name} (${area.type}): ${lacks}`, {
        hint: '"b2 ls", "b2 cat" and "b2 restore --path" can read it with --backend vm.',
      });
    }
    const directory = await withReason(opened, () => opened.environment.mount(here));
    await this.#rememberRoot(root, opened, directory);
    return directory;
  }

  async #rememberRoot(root: Root, { agent }: Opened, directory: string): Promise<void> {
    const key = `${root.source.key}:${root.area.name}`;
    if (this.#roots.has(key)) return;
    this.#roots.set(key, await agent.ask({ op: 'lstat', path: Buffer.from(directory) }));
  }

  /** Counts a user; {@link #give} takes it back. */
  #take(source: FilesSource, isInVm: boolean): Shared {
    if (this.#isClosed) throw new B2Error('failed', 'the mount is being taken down');
    const key = vmKey(source, isInVm);
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
        opened: isInVm ? this.#openVm(source) : this.#open(source),
        users: 0,
        idle: undefined,
        isBroken: () => false,
        isReplaced: false,
      };
      this.#points.set(key, shared);
      const mine = shared;
      mine.opened.then(
        ({ environment, agent, volumes }) => {
          mine.isBroken = () => environment.isBroken || agent.isEnded || volumes?.isGone === true;
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
    shared.idle = setTimeout(() => this.#drop(key, shared), isVmKey(key) ? VM_IDLE_MS : IDLE_MS);
    shared.idle.unref();
  }

  #makeRoom(except: string): void {
    for (const [key, shared] of this.#points) {
      const vms = [...this.#points.keys()].filter(isVmKey).length;
      const isTooMany = this.#points.size > OPEN_POINTS || (isVmKey(key) && vms > OPEN_VMS);
      if (isTooMany && shared.users === 0 && key !== except) this.#drop(key, shared);
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
      .then(async ({ agent, environment, volumes }) => {
        // What waits for a machine that hangs cannot be ended before that is.
        const late = setTimeout(() => volumes?.abandon(endedAnyway()), VM_END_MS);
        try {
          await agent.close();
          await environment.close();
        } finally {
          clearTimeout(late);
        }
      })
      .catch(() => undefined)
      .finally(() => this.#closing.delete(ending));
    this.#closing.add(ending);
  }

  async #open(source: FilesSource): Promise<Opened> {
    const { clock, events } = this.#options;
    const { all, openImage } = await this.#areasOf(source);
    const image = await openImage();
    const environment = await openKernelEnvironment(image, all, clock, events);
    return { environment, agent: new FilesAgent(environment), areas: all };
  }

  async #openVm(source: FilesSource): Promise<Opened> {
    const { clock, events, cacheDir } = this.#options;
    const { all, openImage } = await this.#areasOf(source);
    events({
      type: 'note',
      message: `${source.name}: LVM in a tiny virtual machine puts volumes together, and this machine's kernel mounts them: ${whatIsLeft(all)}`,
    });
    const image = await openImage();
    const volumes: VmVolumes = await openVmVolumes({
      image,
      areas: all,
      clock,
      events,
      cacheDir,
      signal: this.#ending.signal,
    });
    for (const { reason } of volumes.left) this.#tellOnce(source, `left out: ${reason}`);
    for (const area of volumes.areas) {
      const why = whyNotShown(area);
      if (why !== undefined) this.#tellOnce(source, `left out: ${area.name}: ${why}`);
    }
    const areas = volumes.areas.filter((a) => a.holds === 'files' && whyNotShown(a) === undefined);
    const environment = await openKernelEnvironment(volumes, areas, clock, events);
    if (this.#inVm.size >= REMEMBERED_POINTS) this.#inVm.clear();
    this.#inVm.set(source.key, areas);
    // A machine that has ended answers with errors for good: the next look starts another.
    return { environment, agent: new FilesAgent(environment), areas, volumes };
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
    const isInVm = root.area.isInVm === true;
    const shared = this.#take(root.source, isInVm);
    let isClosed = false;
    const release = (): void => {
      if (isClosed) return;
      isClosed = true;
      this.#give(vmKey(root.source, isInVm), shared);
    };
    try {
      const opened = await shared.opened;
      const { agent } = opened;
      const directory = await this.#mount(root, opened);
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

/** What a point's mounts, or those of its virtual machine, are known by. */
function vmKey(source: FilesSource, isInVm: boolean): string {
  return isInVm ? `${source.key}${VM_KEY}` : source.key;
}

function endedAnyway(): B2Error {
  return new B2Error('failed', 'the tiny virtual machine was ended with the mount');
}

const VM_KEY = ' vm';

function isVmKey(key: string): boolean {
  return key.endsWith(VM_KEY);
}

/**
 * Why an area with file systems in it, or a part of it, is no directory, in words; undefined where it is one, or holds none.
 * `noVm`: why no virtual machine can be started here.
 */
function leftOut(area: FoundArea, noVm: string | undefined): string | undefined {
  const { left = [] } = area;
  if (isForLvm(area)) {
    const here = left.filter((l) => l.isElsewhere !== true);
    const unnamed = noVm === undefined ? here.filter((l) => l.volume === undefined) : here;
    if (unnamed.length === 0) return undefined;
    const why = unnamed.map(({ reason }) => reason).join('; ');
    return noVm === undefined
      ? `logical volumes (LVM) in it are not shown here, because b2 cannot tell what there is (${why}); "b2 ls" asks LVM in a tiny virtual machine`
      : `logical volumes (LVM) in it are not shown here, because only LVM itself, in a tiny virtual machine, can put them together (${why}), and none can be started here: ${noVm}`;
  }
  return whyNotShown(area);
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
