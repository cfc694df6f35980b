/** {@link FileAccess} over the environments: which backend reads which file system, and what its tools say. */

import type { Clock } from '../clock.js';
import { B2Error, isKind, messageOf } from '../errors.js';
import type { EventSink } from '../events.js';
import type { Image } from '../image.js';
import type { Environment } from './environment.js';
import { lastLine } from './environment.js';
import { FIND_FORMAT, FindParser } from './find-output.js';
import { kernelLacks, openKernelEnvironment } from './kernel.js';
import type { FindCompanions } from './companions.js';
import { findPointAreas, type PointLayout } from './group-layout.js';
import {
  elsewhere,
  isForLvm,
  membersBelow,
  whatIsLeft,
  whyNotShown,
  type FoundArea,
} from './layout.js';
import { volumePieces } from './lvm.js';
import { describeAge, describeMember } from './md.js';
import {
  baseName,
  decodeName,
  normalPath,
  parentPath,
  script,
  shellWord,
  showName,
} from './names.js';
import { explicitPlace, findPlace } from './places.js';
import { parseTarMessages, unescapeName } from './tar-messages.js';
import { outputOf } from './tools.js';
import type {
  BackendName,
  FileAccess,
  FileEntry,
  FileExtent,
  FoundFileSystem,
  Place,
  TreeExport,
} from './types.js';
import { openVmEnvironment, vmLacks, VM_HINT } from './vm.js';
import { openVmVolumes } from './vm-volumes.js';

export interface FileAccessOptions {
  /** Opens the image; once for each backend that is used. */
  readonly openImage: () => Promise<Image>;
  /** The other volumes of its group at that instant. */
  readonly companions?: FindCompanions | undefined;
  /** For messages: volume and point. */
  readonly name: string;
  /** `auto`: the kernel of this machine where it can and may, else the tiny VM. */
  readonly backend: BackendName | 'auto';
  readonly clock: Clock;
  readonly events: EventSink;
  /** Where the VM's files are made for a while, and what is remembered of this machine. */
  readonly cacheDir: string;
}

/** As many symbolic links as Linux follows in one path. */
const MAX_LINKS = 40;

/** Looks at what is in the image. Nothing is mounted or started before something is asked for. */
export async function openFileAccess(options: FileAccessOptions): Promise<FileAccess> {
  const layout = await findPointAreas(options);
  if (layout.others.length > 0) {
    const message = `read together with ${layout.others.join(', ')}, at the same instant: what is in it lies there, too`;
    options.events({ type: 'note', message });
  }
  return new Access({ ...options, openImage: layout.openImage }, layout);
}

class Access implements FileAccess {
  readonly #options: FileAccessOptions;
  #areas: readonly FoundArea[];
  readonly #environments = new Map<BackendName, Promise<Environment>>();
  readonly #backends = new Map<string, Promise<BackendName>>();
  /** Where logical volumes are mounted that are read through a tiny virtual machine. */
  #volumes: Environment | undefined;
  #containers: Promise<void> | undefined;
  /** Ends the start of a tiny virtual machine, for which nobody waits any more. */
  readonly #closing = new AbortController();

  readonly notShown: readonly string[];
  readonly elsewhere: readonly string[];
  /** The image is made of several. */
  readonly #isComposed: boolean;

  constructor(options: FileAccessOptions, layout: PointLayout) {
    this.#options = options;
    this.#areas = layout.areas;
    this.notShown = layout.missing;
    this.elsewhere = layout.elsewhere;
    this.#isComposed = layout.others.length > 0;
  }

  get fileSystems(): readonly FoundFileSystem[] {
    return this.#areas.filter((a) => a.holds === 'files').map(publicPart);
  }

  get used(): readonly BackendName[] {
    const kernel: readonly BackendName[] = this.#volumes === undefined ? [] : ['kernel', 'vm'];
    return [...new Set([...this.#environments.keys(), ...kernel])];
  }

  openContainers(): Promise<void> {
    this.#containers ??= this.#openContainers();
    return this.#containers;
  }

  async #openContainers(): Promise<void> {
    this.#tellNotShown(this.#areas);
    for (const reason of this.#areas.flatMap(elsewhere))
      this.#options.events({ type: 'warning', message: `left out: ${reason}` });
    const containers = this.#areas.filter(isForLvm);
    if (containers.length === 0) return;
    const names = containers.map((c) => c.name).join(', ');
    const why = whatIsLeft(containers);
    const { backend, events } = this.#options;
    try {
      events({
        type: 'note',
        message: `${names}: asking LVM in a tiny virtual machine (backend vm): ${why}`,
      });
      const found =
        backend === 'kernel'
          ? await this.#openVolumes()
          : await (await this.#environment('vm')).openContainers();
      const inside = found
        .filter((a) => !this.#areas.some((b) => b.name === a.name))
        .map((a) => ({ ...membersBelow(this.#areas), ...a }));
      this.#tellNotShown(inside);
      this.#tellDegraded(containers, inside);
      this.#areas = [...this.#areas.filter((a) => !isForLvm(a)), ...inside];
    } catch (error) {
      if (!isKind(error, 'unsupported')) throw error;
      this.#options.events({
        type: 'warning',
        message: `the logical volumes in ${names} are left out: ${error.message}${error.hint === undefined ? '' : ` (${error.hint})`}`,
      });
    }
  }

  #tellNotShown(areas: readonly FoundArea[]): void {
    for (const area of areas) {
      const why = whyNotShown(area);
      if (why !== undefined)
        this.#options.events({ type: 'note', message: `${area.name}: ${why}` });
    }
  }

  /** LVM starts mirrors with the sides that are here, and by themselves those do not know whether they had dropped out. */
  #tellDegraded(containers: readonly FoundArea[], inside: readonly FoundArea[]): void {
    const groups = containers.flatMap((c) => c.groups ?? []).filter((g) => g.isPartial);
    for (const { name } of inside) {
      if (!groups.some((g) => name.startsWith(`${g.shown}/`))) continue;
      const message = `${name}: its volume group is not all here; if it is a mirror (RAID), only the sides that are here were read, and whether those were up to date cannot be told`;
      this.#options.events({ type: 'warning', message });
    }
  }

  /** What is to be known of the arrays that it lies in. Their age is another with every point. */
  #tellMembers({ name, members = [] }: FoundArea): void {
    for (const member of members) {
      const type = member.caveats.length > 0 ? 'warning' : 'note';
      this.#options.events({ type, message: `${name}: ${describeMember(member)}` });
      this.#options.events({ type: 'detail', message: `${name}: ${describeAge(member)}` });
    }
  }

  /** For this machine's kernel, with the volumes read through a tiny virtual machine: their file systems. */
  async #openVolumes(): Promise<readonly FoundArea[]> {
    const { openImage, clock, events, cacheDir } = this.#options;
    if (process.geteuid?.() !== 0)
      throw new B2Error('unsupported', 'only root can have this machine mount them', {
        hint: '--backend vm needs no root.',
      });
    const image = await openImage();
    const { signal } = this.#closing;
    const areas = this.#areas;
    const volumes = await openVmVolumes({ image, areas, clock, events, cacheDir, signal });
    for (const { reason } of volumes.left)
      events({ type: 'warning', message: `left out: ${reason}` });
    this.#volumes = await openKernelEnvironment(volumes, volumes.areas, clock, events);
    return volumes.areas;
  }

  async place(text: string): Promise<Place | undefined> {
    const explicit = explicitPlace(this.fileSystems, text);
    if (explicit !== undefined) return explicit;
    await this.openContainers();
    if (this.fileSystems.length === 0) {
      const others = this.#areas.map((a) => `${a.name}: ${a.type}`).join(', ');
      throw new B2Error(
        'not-found',
        `${this.#options.name}: no file system was found${others === '' ? '' : ` (${others})`}`,
        {
          hint: 'The image as a whole can be restored, mounted with "b2 mount", or served over NBD.',
        },
      );
    }
    return findPlace(this.fileSystems, text);
  }

  #area(fileSystem: FoundFileSystem): FoundArea {
    const area = this.#areas.find((a) => a.name === fileSystem.name);
    if (area === undefined) throw new Error(`no file system ${fileSystem.name}`);
    return area;
  }

  #environment(backend: BackendName): Promise<Environment> {
    let environment = this.#environments.get(backend);
    if (environment === undefined) {
      environment = this.#open(backend);
      this.#environments.set(backend, environment);
      environment.catch(() => this.#environments.delete(backend));
    }
    return environment;
  }

  async #open(backend: BackendName): Promise<Environment> {
    const { openImage, clock, events, cacheDir } = this.#options;
    if (backend === 'kernel')
      return openKernelEnvironment(await openImage(), this.#areas, clock, events);
    const lacks = await vmLacks();
    if (lacks !== undefined) throw noVm(lacks);
    // A volume group may lie on all of them, whichever it was that named what is left to LVM.
    const isWanted = this.#areas.some(isForLvm);
    const areas = this.#areas.filter(
      (a) => a.holds === 'files' || (isWanted && a.holds === 'container'),
    );
    const image = await openImage();
    const { signal } = this.#closing;
    return openVmEnvironment({ image, areas, clock, events, cacheDir, purpose: 'files', signal });
  }

  /** The environment with the file system mounted, and its directory there. */
  async #enter(
    fileSystem: FoundFileSystem,
  ): Promise<{ readonly environment: Environment; readonly root: string }> {
    const area = this.#area(fileSystem);
    const why = whyNotShown(area);
    if (why !== undefined) {
      // What is missing at this point may be there at another.
      throw new B2Error(area.lacking === undefined ? 'unsupported' : 'io', `${area.name}: ${why}`, {
        hint: 'Restore every device of it, then mount that.',
      });
    }
    let chosen = this.#backends.get(area.name);
    if (chosen === undefined) {
      chosen = this.#choose(area);
      this.#backends.set(area.name, chosen);
      chosen.catch(() => this.#backends.delete(area.name));
    }
    const backend = await chosen;
    const volumes = area.isInVm === true ? this.#volumes : undefined;
    const environment = volumes ?? (await this.#environment(backend));
    return { environment, root: await environment.mount(area) };
  }

  async #choose(area: FoundArea): Promise<BackendName> {
    const { backend } = this.#options;
    const isInVm = area.isInVm === true;
    const inContainer = area.sizeBytes === 0;
    const kernel =
      backend === 'vm' ? 'not asked for' : inContainer ? 'it lies in LVM' : await kernelLacks(area);
    const note = (message: string): void => this.#options.events({ type: 'note', message });
    if (kernel === undefined) {
      const volume = isInVm ? ', the volume by LVM in a tiny virtual machine' : '';
      note(`${area.name} (${area.type}): read by this machine's kernel (backend kernel)${volume}`);
      this.#tellMembers(area);
      return 'kernel';
    }
    const vm = backend === 'kernel' ? 'not asked for' : await vmLacks();
    if (vm === undefined) {
      const why = backend === 'auto' ? `: ${kernel}` : '';
      note(`${area.name} (${area.type}): read in a tiny virtual machine (backend vm)${why}`);
      this.#tellMembers(area);
      return 'vm';
    }
    throw new B2Error(
      'unsupported',
      `the ${area.type} in ${area.name} cannot be read here. By this machine's kernel: ${kernel}. In a tiny virtual machine: ${vm}`,
      { hint: VM_HINT },
    );
  }

  /** Fails with what reading the image failed with, else with what the tool said. */
  #failure(environment: Environment, what: string, stderr: string): B2Error {
    const [first] = environment.failures;
    if (first instanceof B2Error) return first;
    return new B2Error(
      'io',
      `${what}: ${lastLine(stderr) || 'unknown reason'}`,
      first === undefined ? {} : { cause: first },
    );
  }

  async statMany(
    fileSystem: FoundFileSystem,
    paths: readonly string[],
  ): Promise<readonly (FileEntry | undefined)[]> {
    if (paths.length === 0) return [];
    const { environment, root } = await this.#enter(fileSystem);
    const words = paths.flatMap((path) => [Buffer.from(' '), shellWord(`.${normalPath(path)}`)]);
    const asked = Buffer.concat([
      script`cd ${root} && find `,
      ...words,
      Buffer.from(` -maxdepth 0 -printf '${FIND_FORMAT}'\n`),
    ]);
    const { stdout, stderr, status } = await outputOf(environment.run(asked));
    const parser = new FindParser();
    const entries = new Map(parser.take(stdout).map((e) => [e.path, e]));
    parser.end();
    const others = stderr
      .split('\n')
      .filter(
        (line) => line !== '' && !/: (No such file or directory|Not a directory)$/.test(line),
      );
    if (status > 1 || others.length > 0)
      throw this.#failure(
        environment,
        `look at ${this.#show(fileSystem, paths[0] ?? '/')}`,
        stderr,
      );
    return paths.map((path) => entries.get(normalPath(path)));
  }

  #show(fileSystem: FoundFileSystem, path: string): string {
    const name = this.fileSystems.length > 1 ? `${fileSystem.name}:` : '';
    return `${name}${showName(path)} in ${this.#options.name}`;
  }

  /** The place without symbolic links (but for the last part, unless `follow`), and its entry. */
  async #resolve(place: Place, follow: boolean): Promise<FileEntry> {
    const { fileSystem } = place;
    let path = normalPath(place.path);
    for (let links = 0; links <= MAX_LINKS; links++) {
      const parts = path.split('/').filter((part) => part !== '');
      const prefixes = ['/', ...parts.map((_, i) => `/${parts.slice(0, i + 1).join('/')}`)];
      const entries = await this.statMany(fileSystem, prefixes);
      let next: string | undefined;
      for (const [i, entry] of entries.entries()) {
        if (entry === undefined) {
          throw new B2Error('not-found', `there is no ${this.#show(fileSystem, place.path)}`, {
            hint: `"b2 ls" shows what is there.`,
          });
        }
        const isLast = i === entries.length - 1;
        if (entry.kind !== 'symlink') {
          if (isLast) return entry;
          // What a look behind it would have found lies elsewhere; it is not looked at.
          if (entry.kind !== 'directory')
            throw new B2Error(
              'not-found',
              `there is no ${this.#show(fileSystem, place.path)}: ${showName(entry.path)} is no directory`,
            );
          continue;
        }
        if (isLast && !follow) return entry;
        const target = entry.target ?? '';
        const from = target.startsWith('/') ? '' : `${parentPath(entry.path)}/`;
        next = normalPath(`${from}${target}/${parts.slice(i).join('/')}`);
        break;
      }
      if (next === undefined) throw new Error('a path without an end');
      path = next;
    }
    throw new B2Error(
      'not-found',
      `${this.#show(fileSystem, place.path)}: too many symbolic links, one behind the other`,
    );
  }

  stat(place: Place, follow: boolean): Promise<FileEntry> {
    return this.#resolve(place, follow);
  }

  async *list(place: Place, recursive: boolean): AsyncGenerator<FileEntry> {
    const entry = await this.#resolve(place, false);
    if (entry.kind !== 'directory') {
      yield entry;
      return;
    }
    const { environment, root } = await this.#enter(place.fileSystem);
    const depth = recursive ? '' : '-maxdepth 1 ';
    const running = environment.run(
      Buffer.concat([
        script`cd ${root} && find ${`.${entry.path}`} -mindepth 1 `,
        Buffer.from(`${depth}-printf '${FIND_FORMAT}'\n`),
      ]),
    );
    const parser = new FindParser();
    for await (const piece of running.stdout) yield* parser.take(piece as Buffer);
    const { status, stderr } = await running.ended;
    if (status !== 0)
      throw this.#failure(environment, `list ${this.#show(place.fileSystem, entry.path)}`, stderr);
    parser.end();
  }

  async *read(place: Place): AsyncGenerator<Uint8Array> {
    const entry = await this.#resolve(place, true);
    const shown = this.#show(place.fileSystem, place.path);
    if (entry.kind !== 'file')
      throw new B2Error('failed', `${shown} is no regular file but a ${entry.kind}`);
    const { environment, root } = await this.#enter(place.fileSystem);
    const running = environment.run(script`cd ${root} && cat ${`.${entry.path}`}\n`);
    let bytes = 0;
    for await (const piece of running.stdout) {
      bytes += (piece as Buffer).length;
      yield piece as Buffer;
    }
    const { status, stderr } = await running.ended;
    if (status !== 0) throw this.#failure(environment, `read ${shown}`, stderr);
    if (bytes !== entry.sizeBytes) {
      throw new B2Error('io', `${shown}: ${bytes} bytes came, but it has ${entry.sizeBytes}`);
    }
  }

  async exportTree(place: Place): Promise<TreeExport> {
    const entry = await this.#resolve(place, false);
    const { environment, root } = await this.#enter(place.fileSystem);
    const shown = this.#show(place.fileSystem, entry.path);
    const member = entry.path === '/' ? '.' : `./${baseName(entry.path)}`;
    const running = environment.run(
      script`cd ${`${root}${parentPath(entry.path)}`} && tar --create --file=- --format=posix --pax-option=delete=atime,delete=ctime --xattrs ${'--xattrs-include=*'} --acls --sparse --numeric-owner --quoting-style=escape --blocking-factor=128 -- ${member} </dev/null\n`,
    );
    const done = this.#exported(environment, running.ended, shown, parentPath(entry.path));
    done.catch(() => undefined);
    return { stream: running.stdout, done };
  }

  async #exported(
    environment: Environment,
    ended: Promise<{ readonly status: number; readonly stderr: string }>,
    shown: string,
    above: string,
  ): TreeExport['done'] {
    const { status, stderr } = await ended;
    const { damaged, notes, fatal } = parseTarMessages(stderr);
    if (status > 2 || fatal.length > 0 || (status === 2 && damaged.length === 0))
      throw this.#failure(environment, `read ${shown}`, stderr);
    const [first] = environment.failures;
    const why = first === undefined ? '' : ` (${messageOf(first)})`;
    return {
      damaged: damaged.map(({ name, reason }) => ({
        path: normalPath(`${above}/${decodeName(unescapeName(name))}`),
        reason: `${reason}${why}`,
      })),
      notes,
    };
  }

  async extents(place: Place): Promise<readonly FileExtent[] | undefined> {
    const area = this.#area(place.fileSystem);
    if (!/^(ext[234]|xfs)$/.test(area.type) || area.sizeBytes === 0 || area.isInVm === true)
      return undefined;
    if (this.#isComposed) return undefined;
    const entry = await this.#resolve(place, true);
    if (entry.kind !== 'file') return undefined;
    const { environment, root } = await this.#enter(place.fileSystem);
    const { stdout, status } = await outputOf(
      environment.run(script`cd ${root} && filefrag -v -b512 ${`.${entry.path}`}\n`),
    );
    if (status !== 0) return undefined;
    const text = stdout.toString('latin1');
    const { volume } = area;
    if (volume === undefined) return parseExtents(text, area.offsetBytes);
    return parseExtents(text, area.offsetBytes - volume.offsetBytes).flatMap((extent) => {
      let { offset } = extent;
      return [...volumePieces(volume.volume, extent.imageOffset, extent.length)].map((piece) => {
        const found = { offset, length: piece.length, imageOffset: piece.imageOffset };
        offset += piece.length;
        return found;
      });
    });
  }

  async close(): Promise<void> {
    this.#closing.abort();
    for (const environment of this.#environments.values()) {
      await environment.then(
        (e) => e.close(),
        () => undefined,
      );
    }
    this.#environments.clear();
    await this.#volumes?.close();
    this.#volumes = undefined;
  }
}

/** Lines of `filefrag -v -b512`: ` 0:        0..     255:      34816..     35071:    256:             last,eof`. */
export function parseExtents(text: string, offsetBytes: number): readonly FileExtent[] {
  const extents: FileExtent[] = [];
  const line = /^\s*\d+:\s*(\d+)\.\.\s*\d+:\s*(\d+)\.\.\s*\d+:\s*(\d+):(.*)$/gm;
  for (const [, logical, physical, blocks, flags = ''] of text.matchAll(line)) {
    // Not on the disk as such: inside the inode, not placed yet, or allocated and never written.
    if (/inline|delalloc|unknown|unwritten|encoded|not_aligned/.test(flags)) continue;
    extents.push({
      offset: Number(logical) * 512,
      length: Number(blocks) * 512,
      imageOffset: offsetBytes + Number(physical) * 512,
    });
  }
  return extents;
}

function publicPart(area: FoundArea): FoundFileSystem {
  const { name, type, label, uuid, volume, isInVm, parts } = area;
  const arrays = (area.members ?? []).flatMap(({ array }) => array ?? []);
  const isSpread = volume !== undefined || isInVm === true || parts !== undefined;
  const { offsetBytes, sizeBytes } = isSpread ? { offsetBytes: 0, sizeBytes: 0 } : area;
  return {
    name,
    type,
    ...(label === undefined ? {} : { label }),
    ...(uuid === undefined ? {} : { uuid }),
    offsetBytes,
    sizeBytes,
    ...(arrays.length === 0 ? {} : { arrays }),
  };
}

function noVm(lacks: string): B2Error {
  return new B2Error('unsupported', `no tiny virtual machine can be started here: ${lacks}`, {
    hint: VM_HINT,
  });
}
