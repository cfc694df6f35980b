/**
 * Which mounted file systems have to be held still for a point of a device, and which of them must not be.
 *
 * A file system is never frozen when something that this process writes lies on it: the repository, its own caches, logs and
 * temporary files ({@link MountsOptions.writes}), and every regular file that it has open for writing. A write there would wait for
 * the thaw while the thaw waits for the write. (The helper process would end that at the bound; the point would be lost
 * nevertheless.) What lies *below* counts as well: a repository on a loop device whose file is on the file system.
 *
 * What needs no refusal: swap areas (they are no file systems, and the kernel writes a swap file straight to the disk, past a
 * freeze); the file system with this program's own code (reading is never held up); the journal of systemd: writing to it goes
 * through a pipe, nothing is written between freeze and thaw, and the helper process writes nothing at all.
 */
import { readdir, readFile, readlink, stat } from 'node:fs/promises';
import path from 'node:path';

import { carriersOfFile, mountsStandingOn } from '../../devices/in-use.js';
import type { DeviceFacts } from '../../devices/device.js';
import { parseMountInfo, type Mount } from '../../devices/mounts.js';
import { SYSTEM_ROOTS, type SystemRoots } from '../../devices/sysfs.js';
import { ioError } from '../../errors.js';

/**
 * How a file system is held still:
 * - `freeze`: by FIFREEZE;
 * - `watch`: it cannot be frozen (FAT). It is synced, and the point is given up if anything reached its device after that;
 * - `never`: it must not be frozen, or nothing can be said about it; `why` says the reason.
 */
export type Holding = 'freeze' | 'watch' | 'never';

/** A mounted file system on the device: one for each, however often it is mounted. */
export interface WatchedMount {
  /** As a person knows it. */
  readonly mountPoint: string;
  /** Where this process reaches it; differs from `mountPoint` where only another mount name space has it. */
  readonly openPath: string;
  readonly fsType: string;
  /** Path of the device it lies on, and its kernel name. */
  readonly device: string;
  readonly blockName: string;
  /** Of the file system, as the list of mounts has it. */
  readonly devNumber: string;
  readonly holding: Holding;
  /** Only of `never`: a clause, "it holds the repository /srv/b2". */
  readonly why: string | undefined;
}

export interface MountsOptions {
  /** Directory of the repository, where it is a local one. */
  readonly repositoryPath?: string | undefined;
  /** Directories and files that this process writes: caches, state, logs. Those that do not exist are left out. */
  readonly writes?: readonly string[];
  readonly roots?: SystemRoots;
}

const FREEZABLE = new Set([
  'bcachefs',
  'btrfs',
  'ext2',
  'ext3',
  'ext4',
  'f2fs',
  'gfs2',
  'jfs',
  'nilfs2',
  'ocfs2',
  'reiserfs',
  'xfs',
]);
/** In the kernel, with nothing to hold them but that all they have written is seen in the counters of their device. */
const WATCHABLE = new Set(['exfat', 'hfs', 'hfsplus', 'minix', 'msdos', 'ntfs3', 'udf', 'vfat']);
/** Nothing is ever written to them. */
const READ_ONLY = new Set(['cramfs', 'erofs', 'iso9660', 'squashfs']);

interface ReachedMount extends Mount {
  readonly openPath: string;
}

/**
 * The mounted file systems on `device`, its partitions and whatever is built on them (LVM, crypt, MD, loop), in the order in which
 * they are to be frozen: the last mounted first, so that one whose image lies in another comes before that. Other mount name
 * spaces (containers) are looked at as far as this user may. Kind `not-found` if the device has gone.
 */
export async function mountsOf(
  device: Pick<DeviceFacts, 'kind' | 'realPath' | 'devNumber'>,
  options: MountsOptions = {},
): Promise<readonly WatchedMount[]> {
  const roots = options.roots ?? SYSTEM_ROOTS;
  const all = await allMounts(roots);
  const standing = await mountsStandingOn(device, all, roots);
  const byNumber = new Map<string, (typeof standing)[number]>();
  // Of several mounts of one file system the first of this name space is the one to name.
  const order = new Map(all.map((mount, i) => [mount, i]));
  const place = (entry: (typeof standing)[number]): number => order.get(entry.mount) ?? 0;
  for (const entry of standing) {
    const known = byNumber.get(entry.mount.devNumber);
    if (known === undefined || place(entry) < place(known))
      byNumber.set(entry.mount.devNumber, entry);
  }
  const writers = byNumber.size === 0 ? [] : await whatWeWrite(options, roots);
  return [...byNumber.values()]
    .toSorted((a, b) => place(b) - place(a))
    .filter(({ mount }) => !READ_ONLY.has(mount.fsType))
    .map(({ mount, info }) => {
      const why = reasonAgainst(mount, `block ${info.devNumber}`, writers);
      return {
        mountPoint: mount.mountPoint,
        openPath: mount.openPath,
        fsType: mount.fsType,
        device: info.displayPath,
        blockName: info.name,
        devNumber: mount.devNumber,
        holding: why === undefined ? holdingOf(mount.fsType) : 'never',
        why,
      };
    });
}

/** How a file system of that type is held still; `never` if that is not known. */
export function holdingOf(fsType: string): Holding {
  if (FREEZABLE.has(fsType)) return 'freeze';
  return WATCHABLE.has(fsType) ? 'watch' : 'never';
}

function reasonAgainst(
  mount: Mount,
  deviceKey: string,
  writers: readonly Writer[],
): string | undefined {
  const writer = writers.find((w) => w.carriers.has(deviceKey) || w.carriers.has(mount.devNumber));
  if (writer !== undefined) return `${writer.what}, which b2 writes while it works`;
  if (holdingOf(mount.fsType) !== 'never') return undefined;
  return `nothing is known of how to hold a file system of type ${mount.fsType} still`;
}

/** Own mounts first, then those that only other mount name spaces have. */
async function allMounts(roots: SystemRoots): Promise<readonly ReachedMount[]> {
  const file = path.join(roots.proc, 'self/mountinfo');
  let own: readonly Mount[];
  try {
    own = parseMountInfo(await readFile(file, 'utf8'));
  } catch (error) {
    throw ioError('read', file, error);
  }
  const found: ReachedMount[] = own.map((m) => ({ ...m, openPath: m.mountPoint }));
  const numbers = new Set(own.map((m) => m.devNumber));
  const spaces = new Set([await nameSpace(roots, 'self')]);
  for (const pid of await readdir(roots.proc).catch((): string[] => [])) {
    if (!/^\d+$/.test(pid)) continue;
    const space = await nameSpace(roots, pid);
    if (space === undefined || spaces.has(space)) continue;
    spaces.add(space);
    const text = await readFile(path.join(roots.proc, pid, 'mountinfo'), 'utf8').catch(() => '');
    for (const mount of parseMountInfo(text)) {
      if (numbers.has(mount.devNumber)) continue;
      found.push({
        ...mount,
        openPath: path.join(roots.proc, pid, 'root', mount.mountPoint),
      });
    }
  }
  return found;
}

async function nameSpace(roots: SystemRoots, pid: string): Promise<string | undefined> {
  return readlink(path.join(roots.proc, pid, 'ns/mnt')).catch(() => undefined);
}

interface Writer {
  /** "it holds the repository /srv/b2" */
  readonly what: string;
  /** See {@link carriersOfFile}; also the device number of the file system itself. */
  readonly carriers: ReadonlySet<string>;
}

async function whatWeWrite(options: MountsOptions, roots: SystemRoots): Promise<readonly Writer[]> {
  const places = new Map<string, string>();
  if (options.repositoryPath !== undefined)
    places.set(options.repositoryPath, `it holds the repository ${options.repositoryPath}`);
  for (const place of options.writes ?? [])
    if (!places.has(place)) places.set(place, `it holds ${place}`);
  for (const [place, name] of await openFiles()) places.set(place, `it holds ${name}`);
  const writers: Writer[] = [];
  for (const [place, what] of places) {
    const carriers = await carriersOfFile(place, roots);
    if (carriers.size > 0) writers.push({ what, carriers });
  }
  return writers;
}

/** Regular files that this process has open for writing: one for each file system, with its name. */
async function openFiles(): Promise<ReadonlyMap<string, string>> {
  const found = new Map<string, string>();
  const devices = new Set<bigint>();
  for (const fd of await readdir('/proc/self/fd').catch((): string[] => [])) {
    const place = `/proc/self/fd/${fd}`;
    try {
      const facts = await stat(place, { bigint: true });
      if (!facts.isFile() || devices.has(facts.dev)) continue;
      const flags = /^flags:\s+([0-7]+)$/m.exec(
        await readFile(`/proc/self/fdinfo/${fd}`, 'utf8'),
      )?.[1];
      // The lowest two bits are the access mode; 0 is reading only.
      if (flags === undefined || (Number.parseInt(flags, 8) & 3) === 0) continue;
      devices.add(facts.dev);
      found.set(place, await readlink(place));
    } catch {
      // It was closed meanwhile.
    }
  }
  return found;
}
