/**
 * What uses a restore's target now. A target with any reason is refused: writing under a mounted file system, a
 * running swap or an assembled array destroys both what is restored and what runs.
 */
import { constants, type BigIntStats } from 'node:fs';
import { readdir, readFile, readlink, realpath, stat } from 'node:fs/promises';
import path from 'node:path';

import { systemClock, type Clock } from '../clock.js';
import { B2Error, errnoOf, ioError } from '../errors.js';
import type { DeviceFacts } from './device.js';
import { listMounts, listSwaps, type Mount } from './mounts.js';
import { targetKind } from './open.js';
import { closeFd, openFd } from './raw-io.js';
import {
  blockInfo,
  blockNameOf,
  blockNameOfPath,
  blockNames,
  devNumberOf,
  SYSTEM_ROOTS,
  type BlockInfo,
  type SystemRoots,
} from './sysfs.js';

/**
 * - `mounted`, `swap`, `holder` (device mapper, MD, bcache built on it), `loop` (a loop device shows it);
 * - `open`: a process has it open for writing, a virtual machine perhaps;
 * - `busy`: somebody holds it exclusively, who is not visible from here (another mount namespace);
 * - `repository`: the repository itself lies on or in it.
 */
export type InUseKind = 'mounted' | 'swap' | 'holder' | 'loop' | 'open' | 'busy' | 'repository';

export interface InUseReason {
  readonly kind: InUseKind;
  /** A clause for a person: "/dev/sdb1 is mounted on /srv". */
  readonly text: string;
}

export interface InUseOptions {
  /** Directory of the repository that is restored from, where it is a local one. */
  readonly repositoryPath?: string;
  readonly roots?: SystemRoots;
  readonly clock?: Clock;
}

/**
 * Who holds a device for no longer than this only passes by: udev's probes, and `losetup --find` that lost a free loop device to
 * another, which sleeps 250 ms with it open for writing (util-linux 2.38, `loopcxt_setup_device`).
 */
const PASSING_MS = 2000;
const LOOK_AGAIN_MS = 100;

/** A device that stands on the target, and how: `trail` is "" or ", which lies on /dev/sdb2". */
interface Above {
  readonly info: BlockInfo;
  readonly trail: string;
}

interface World {
  readonly roots: SystemRoots;
  readonly mounts: readonly Mount[];
  readonly swaps: readonly string[];
  /** Loop devices in use, with the inode or device behind each. */
  readonly loops: readonly {
    readonly name: string;
    readonly backing: string;
    readonly key: string | undefined;
  }[];
}

/** Tells block devices and files apart from each other, whatever name they have. */
function keyOf(facts: BigIntStats): string {
  return facts.isBlockDevice()
    ? `block ${devNumberOf(facts.rdev)}`
    : `file ${facts.dev}:${facts.ino}`;
}

async function keyOfPath(file: string): Promise<string | undefined> {
  try {
    return keyOf(await stat(file, { bigint: true }));
  } catch {
    return undefined;
  }
}

async function observe(roots: SystemRoots): Promise<World> {
  const loops: { name: string; backing: string; key: string | undefined }[] = [];
  for (const name of await blockNames(roots)) {
    if (!/^loop\d+$/.test(name)) continue;
    try {
      const backing = (
        await readFile(path.join(roots.sys, 'class/block', name, 'loop/backing_file'), 'utf8')
      ).replace(/\n$/, '');
      loops.push({ name, backing, key: await keyOfPath(backing) });
    } catch {
      // Not attached.
    }
  }
  return { roots, mounts: await listMounts(roots), swaps: await listSwaps(roots), loops };
}

/**
 * Why `target` must not be written to; empty if nothing uses it, or if it does not exist yet. Where nothing but a process that has
 * it open is in the way, that is looked at for two seconds before it is one. Rejects for a target that can never be one (a
 * directory, a symbolic link to a file).
 */
export async function inUseReasons(
  target: string,
  options: InUseOptions = {},
): Promise<readonly InUseReason[]> {
  const clock = options.clock ?? systemClock;
  const until = clock.monotonicNs() + BigInt(PASSING_MS) * 1_000_000n;
  for (;;) {
    const reasons = await reasonsNow(target, options);
    const mayPass = reasons.every((reason) => reason.kind === 'open' || reason.kind === 'busy');
    if (reasons.length === 0 || !mayPass || clock.monotonicNs() >= until) return reasons;
    await clock.sleep(LOOK_AGAIN_MS);
  }
}

async function reasonsNow(target: string, options: InUseOptions): Promise<readonly InUseReason[]> {
  const roots = options.roots ?? SYSTEM_ROOTS;
  const kind = await targetKind(target);
  const reasons: InUseReason[] = [];
  if (kind === 'none') {
    await addRepositoryFile(reasons, target, options.repositoryPath);
    return reasons;
  }
  const world = await observe(roots);
  let real: string;
  let own: BigIntStats;
  try {
    real = await realpath(target);
    own = await stat(real, { bigint: true });
  } catch (error) {
    throw ioError('look at', target, error);
  }
  if (kind === 'block') {
    const name = await blockNameOf(devNumberOf(own.rdev), roots);
    if (name !== undefined) {
      const info = await blockInfo(name, roots);
      for (const above of await standingOn(info, world)) await addUses(reasons, above, world);
      if (options.repositoryPath !== undefined)
        await addRepositoryDevice(reasons, target, keyOf(own), options.repositoryPath, world);
    }
    if (reasons.length === 0) await addExclusive(reasons, target, real);
  } else {
    for (const swap of world.swaps) {
      if ((await keyOfPath(swap)) === keyOf(own))
        reasons.push({ kind: 'swap', text: `${target} is in use as swap` });
    }
    for (const loop of world.loops) {
      if (loop.key !== keyOf(own)) continue;
      const device = path.join(roots.dev, loop.name);
      reasons.push({ kind: 'loop', text: `${target} is attached as loop device ${device}` });
      for (const above of await standingOn(await blockInfo(loop.name, roots), world)) {
        await addUses(
          reasons,
          { ...above, trail: `${above.trail}, which lies in ${target}` },
          world,
        );
      }
    }
    await addRepositoryFile(reasons, target, options.repositoryPath);
    if (options.repositoryPath !== undefined)
      await addRepositoryDevice(reasons, target, keyOf(own), options.repositoryPath, world);
  }
  await addOpeners(reasons, target, real, roots);
  return unique(reasons);
}

/**
 * Which of `mounts` are file systems on the device or image file, on its partitions or on anything built on them, each with the
 * device that it lies on. Kind `not-found` if the device has gone.
 */
export async function mountsStandingOn<M extends Mount>(
  target: Pick<DeviceFacts, 'kind' | 'realPath' | 'devNumber'>,
  mounts: readonly M[],
  roots: SystemRoots = SYSTEM_ROOTS,
): Promise<readonly { readonly mount: M; readonly info: BlockInfo }[]> {
  const world = await observe(roots);
  const bases: string[] = [];
  if (target.kind === 'block') {
    const name = await blockNameOf(target.devNumber ?? '', roots);
    if (name === undefined)
      throw new B2Error('not-found', `there is no block device ${target.realPath}`);
    bases.push(name);
  } else {
    const key = await keyOfPath(target.realPath);
    for (const loop of world.loops)
      if (key !== undefined && loop.key === key) bases.push(loop.name);
  }
  const found: { mount: M; info: BlockInfo }[] = [];
  for (const base of bases) {
    for (const { info } of await standingOn(await blockInfo(base, roots), world)) {
      for (const mount of mounts)
        if (await isMountOf(mount, info, world)) found.push({ mount, info });
    }
  }
  return found;
}

/**
 * Names (`block MAJOR:MINOR`, `file DEVICE:INODE`) of every device and file that the file system of `file` lies on, at any depth:
 * its device, the disk of that, the devices below a mapping, the file behind a loop device and what that lies on.
 */
export async function carriersOfFile(
  file: string,
  roots: SystemRoots = SYSTEM_ROOTS,
): Promise<ReadonlySet<string>> {
  return carriersOf(file, await observe(roots));
}

function unique(reasons: readonly InUseReason[]): readonly InUseReason[] {
  return reasons.filter(
    (reason, i) => reasons.findIndex((other) => other.text === reason.text) === i,
  );
}

/** The device, its partitions, and every device built on one of them, at any height. */
async function standingOn(first: BlockInfo, world: World): Promise<readonly Above[]> {
  const found: Above[] = [];
  const seen = new Set<string>();
  const visit = async (info: BlockInfo, trail: string): Promise<void> => {
    if (seen.has(info.name)) return;
    seen.add(info.name);
    found.push({ info, trail });
    for (const partition of info.partitions)
      await visit(await blockInfo(partition, world.roots), trail);
    const on = `, which lies on ${info.displayPath}`;
    for (const holder of info.holders) await visit(await blockInfo(holder, world.roots), on);
    for (const loop of world.loops) {
      if (loop.key === `block ${info.devNumber}`)
        await visit(await blockInfo(loop.name, world.roots), on);
    }
  };
  await visit(first, '');
  return found;
}

async function addUses(reasons: InUseReason[], above: Above, world: World): Promise<void> {
  const { info } = above;
  const subject = above.trail === '' ? info.displayPath : `${info.displayPath}${above.trail},`;
  const key = `block ${info.devNumber}`;
  for (const mount of world.mounts) {
    if (!(await isMountOf(mount, info, world))) continue;
    const also =
      mount.fsType === 'btrfs' && (await keyOfPath(mount.source)) !== key
        ? ' (as one device of a btrfs file system)'
        : '';
    reasons.push({ kind: 'mounted', text: `${subject} is mounted on ${mount.mountPoint}${also}` });
  }
  for (const swap of world.swaps) {
    if ((await keyOfPath(swap)) === key)
      reasons.push({ kind: 'swap', text: `${subject} is in use as swap` });
  }
  for (const holder of info.holders) {
    const upper = await blockInfo(holder, world.roots);
    reasons.push({ kind: 'holder', text: `${subject} is part of ${upper.displayPath}` });
  }
  for (const loop of world.loops) {
    if (loop.key === key) {
      reasons.push({
        kind: 'loop',
        text: `${subject} is attached as loop device ${path.join(world.roots.dev, loop.name)}`,
      });
    }
  }
}

async function isMountOf(mount: Mount, info: BlockInfo, world: World): Promise<boolean> {
  if (mount.devNumber === info.devNumber) return true;
  // File systems over several devices have an anonymous number; their source is one of the devices.
  if (!mount.devNumber.startsWith('0:')) return false;
  const source = await blockNameOfPath(mount.source, world.roots);
  if (source === undefined) return false;
  if (source === info.name) return true;
  return mount.fsType === 'btrfs' && (await btrfsMembers(source, world.roots)).includes(info.name);
}

/** Kernel names of the devices of the mounted btrfs file system that `member` belongs to. */
async function btrfsMembers(member: string, roots: SystemRoots): Promise<readonly string[]> {
  const base = path.join(roots.sys, 'fs/btrfs');
  try {
    for (const uuid of await readdir(base)) {
      const members = await readdir(path.join(base, uuid, 'devices')).catch((): string[] => []);
      if (members.includes(member)) return members;
    }
  } catch {
    // No btrfs in this kernel.
  }
  return [];
}

/** The kernel's own word: it grants exclusive access to one holder, over all mount namespaces. */
async function addExclusive(reasons: InUseReason[], target: string, real: string): Promise<void> {
  try {
    await closeFd(await openFd(real, constants.O_RDONLY | constants.O_EXCL));
  } catch (error) {
    if (errnoOf(error) !== 'EBUSY') throw ioError('open', target, error);
    reasons.push({
      kind: 'busy',
      text: `${target} is held exclusively by something that is not visible from here (a container's mount, a RAID, another restore)`,
    });
  }
}

/** Processes that have the target open for writing. Without root only one's own are seen. */
async function addOpeners(
  reasons: InUseReason[],
  target: string,
  real: string,
  roots: SystemRoots,
): Promise<void> {
  for (const pid of await readdir(roots.proc).catch((): string[] => [])) {
    if (!/^\d+$/.test(pid) || pid === String(process.pid)) continue;
    const fds = path.join(roots.proc, pid, 'fd');
    for (const fd of await readdir(fds).catch((): string[] => [])) {
      try {
        if ((await readlink(path.join(fds, fd))) !== real) continue;
        const flags = /^flags:\s+([0-7]+)$/m.exec(
          await readFile(path.join(roots.proc, pid, 'fdinfo', fd), 'utf8'),
        )?.[1];
        // The lowest two bits are the access mode; 0 is reading only.
        if (flags === undefined || (Number.parseInt(flags, 8) & 3) === 0) continue;
        const program = (await readFile(path.join(roots.proc, pid, 'comm'), 'utf8')).trim();
        reasons.push({
          kind: 'open',
          text: `${target} is open for writing in ${program} (process ${pid})`,
        });
        break;
      } catch {
        // The process or the descriptor has gone meanwhile.
      }
    }
  }
}

async function addRepositoryFile(
  reasons: InUseReason[],
  target: string,
  repositoryPath: string | undefined,
): Promise<void> {
  if (repositoryPath === undefined) return;
  try {
    const inside = path.join(
      await realpath(path.dirname(path.resolve(target))),
      path.basename(target),
    );
    const relative = path.relative(await realpath(repositoryPath), inside);
    if (relative !== '..' && !relative.startsWith('../') && !path.isAbsolute(relative)) {
      reasons.push({
        kind: 'repository',
        text: `${target} lies inside the repository ${repositoryPath}`,
      });
    }
  } catch (error) {
    if (errnoOf(error) === 'ENOENT') return;
    throw ioError('look at', target, error);
  }
}

async function addRepositoryDevice(
  reasons: InUseReason[],
  target: string,
  targetKey: string,
  repositoryPath: string,
  world: World,
): Promise<void> {
  if ((await carriersOf(repositoryPath, world)).has(targetKey)) {
    reasons.push({ kind: 'repository', text: `${target} holds the repository ${repositoryPath}` });
  }
}

/** Device number, as the list of mounts has it, of the mount through which `file` is reached. */
async function mountedNumberOf(file: string): Promise<string | undefined> {
  let fd: number | undefined;
  try {
    fd = await openFd(file, constants.O_RDONLY | constants.O_NONBLOCK);
    return await mountedNumberOfFd(fd);
  } catch {
    return undefined;
  } finally {
    if (fd !== undefined) await closeFd(fd);
  }
}

/** As the list of mounts has it: the device number of the file system that `fd` of this process lies on. */
export async function mountedNumberOfFd(fd: number): Promise<string | undefined> {
  const id = /^mnt_id:\s+(\d+)$/m.exec(await readFile(`/proc/self/fdinfo/${fd}`, 'utf8'))?.[1];
  for (const line of (await readFile('/proc/self/mountinfo', 'utf8')).split('\n')) {
    const [mountId, , devNumber] = line.split(' ');
    if (mountId === id) return devNumber;
  }
  return undefined;
}

/** Keys of every device and file that the file system of a file, or a device, lies on, at any depth. */
async function carriersOf(
  start: string | { readonly device: string },
  world: World,
): Promise<ReadonlySet<string>> {
  const found = new Set<string>();
  const visitFile = async (at: string): Promise<void> => {
    let device: string;
    try {
      device = devNumberOf((await stat(at, { bigint: true })).dev);
    } catch {
      return;
    }
    const name = await blockNameOf(device, world.roots);
    if (name !== undefined) return visitDevice(name);
    // The files of a btrfs subvolume have a device number of their own: the list of mounts knows another.
    const mounted = (await mountedNumberOf(at)) ?? device;
    for (const mount of world.mounts) {
      if (mount.devNumber !== device && mount.devNumber !== mounted) continue;
      const source = await blockNameOfPath(mount.source, world.roots);
      if (source === undefined) continue;
      await visitDevice(source);
      if (mount.fsType === 'btrfs')
        for (const member of await btrfsMembers(source, world.roots)) await visitDevice(member);
    }
  };
  const visitDevice = async (name: string): Promise<void> => {
    const info = await blockInfo(name, world.roots);
    const key = `block ${info.devNumber}`;
    if (found.has(key)) return;
    found.add(key);
    if (info.partition !== undefined) await visitDevice(info.partition.diskName);
    for (const slave of info.slaves) await visitDevice(slave);
    const loop = world.loops.find((l) => l.name === name);
    if (loop?.key === undefined || found.has(loop.key)) return;
    found.add(loop.key);
    const behind = await blockNameOfPath(loop.backing, world.roots);
    if (behind === undefined) await visitFile(loop.backing);
    else await visitDevice(behind);
  };
  if (typeof start === 'string') await visitFile(start);
  else await visitDevice(start.device);
  return found;
}

/**
 * How a file or directory lies to a device or image file: `on` it, at any depth, so that writing the file writes the device; apart from it
 * but on the same disk (`beside`: what breaks the disk takes both); or `apart`.
 */
export async function placeOf(
  file: string,
  device: string,
  roots: SystemRoots = SYSTEM_ROOTS,
): Promise<'on' | 'beside' | 'apart'> {
  const key = await keyOfPath(device);
  if (key === undefined) return 'apart';
  const world = await observe(roots);
  const below = await carriersOf(file, world);
  if (below.has(key)) return 'on';
  const name = await blockNameOfPath(device, roots);
  const own = await carriersOf(name === undefined ? device : { device: name }, world);
  for (const carrier of own) if (below.has(carrier)) return 'beside';
  return 'apart';
}
