/** What the kernel says about block devices (/sys/class/block, /sys/dev/block) and how they lie on each other. */
import { readdir, readFile, readlink, realpath, stat } from 'node:fs/promises';
import path from 'node:path';

import { B2Error, errnoOf, ioError } from '../errors.js';
import { MAX_DEVICE_BYTES, safeNumber } from '../units.js';

/** Where the kernel's file systems are; tests set other places. */
export interface SystemRoots {
  readonly sys: string;
  readonly proc: string;
  readonly dev: string;
}

export const SYSTEM_ROOTS: SystemRoots = { sys: '/sys', proc: '/proc', dev: '/dev' };

/** sysfs counts sizes and partition starts in these, whatever the logical block size is. */
const SYSFS_SECTOR_BYTES = 512;

/** A block device as sysfs shows it. Names are kernel names (`sda1`, `dm-0`). */
export interface BlockInfo {
  readonly name: string;
  /** Node in /dev. It need not exist (containers). */
  readonly path: string;
  /** As a person calls it: `/dev/mapper/NAME` for device mapper, else `path`. */
  readonly displayPath: string;
  readonly devNumber: string;
  readonly sizeBytes: number;
  readonly logicalBlockBytes: number;
  readonly physicalBlockBytes: number;
  readonly readOnly: boolean;
  readonly diskSequence: bigint | undefined;
  readonly partition:
    | { readonly number: number; readonly diskName: string; readonly offsetBytes: number }
    | undefined;
  /** Partitions of this disk, in order of their numbers. */
  readonly partitions: readonly string[];
  /** Devices built on this one: device mapper, MD, bcache. */
  readonly holders: readonly string[];
  /** Devices this one is built on. */
  readonly slaves: readonly string[];
  /** File or device behind a loop device. */
  readonly loopBackingFile: string | undefined;
  readonly identity: Readonly<Record<string, string>>;
}

/** `major:minor` of a `st_rdev` or `st_dev` (glibc's encoding). */
export function devNumberOf(device: bigint): string {
  const major = ((device >> 8n) & 0xfffn) | ((device >> 32n) & 0xfffff000n);
  const minor = (device & 0xffn) | ((device >> 12n) & 0xffffff00n);
  return `${major}:${minor}`;
}

async function text(file: string): Promise<string | undefined> {
  try {
    return (await readFile(file, 'utf8')).trim();
  } catch {
    // Attributes come and go with kernel versions and drivers; reading one of a device that has gone gives ENODEV.
    return undefined;
  }
}

async function names(directory: string): Promise<string[]> {
  try {
    return (await readdir(directory)).toSorted();
  } catch {
    return [];
  }
}

/** Kernel name of the block device `major:minor`, or undefined if there is none. */
export async function blockNameOf(
  devNumber: string,
  roots: SystemRoots = SYSTEM_ROOTS,
): Promise<string | undefined> {
  try {
    return path.basename(await readlink(path.join(roots.sys, 'dev/block', devNumber)));
  } catch {
    return undefined;
  }
}

/** Kernel name of the block device that `file` (a node or a link to one) is; undefined if it is not one. */
export async function blockNameOfPath(
  file: string,
  roots: SystemRoots = SYSTEM_ROOTS,
): Promise<string | undefined> {
  try {
    const facts = await stat(file, { bigint: true });
    return facts.isBlockDevice() ? await blockNameOf(devNumberOf(facts.rdev), roots) : undefined;
  } catch {
    return undefined;
  }
}

/** Kernel names of all block devices. */
export async function blockNames(roots: SystemRoots = SYSTEM_ROOTS): Promise<readonly string[]> {
  return names(path.join(roots.sys, 'class/block'));
}

/** Properties that udev keeps of a device (`/run/udev/data/bM:m`); empty where udev does not run. */
async function udevProperties(devNumber: string): Promise<ReadonlyMap<string, string>> {
  const found = new Map<string, string>();
  for (const line of ((await text(`/run/udev/data/b${devNumber}`)) ?? '').split('\n')) {
    const match = /^E:([A-Z0-9_]+)=(.*)$/.exec(line);
    if (match?.[1] !== undefined && match[2] !== undefined) found.set(match[1], match[2]);
  }
  return found;
}

async function identityOf(
  own: string,
  disk: string,
  devNumber: string,
): Promise<Record<string, string>> {
  const identity: Record<string, string> = {};
  const add = (key: string, value: string | undefined): void => {
    const clean = value?.replaceAll('\0', '').trim();
    if (clean !== undefined && clean !== '' && identity[key] === undefined) identity[key] = clean;
  };
  add('serial', await text(path.join(disk, 'serial')));
  add('serial', await text(path.join(disk, 'device/serial')));
  // SCSI unit serial number page: four bytes of header, then the serial.
  const page80 = await text(path.join(disk, 'device/vpd_pg80'));
  add('serial', page80?.slice(4).replaceAll(/[^\x20-\x7e]/g, ''));
  add('wwn', await text(path.join(disk, 'wwid')));
  add('wwn', await text(path.join(disk, 'device/wwid')));
  add('model', await text(path.join(disk, 'device/model')));
  add('dmUuid', await text(path.join(disk, 'dm/uuid')));
  add('dmName', await text(path.join(disk, 'dm/name')));
  add('mdUuid', await text(path.join(disk, 'md/uuid')));
  add('loopFile', await text(path.join(disk, 'loop/backing_file')));
  add('partitionNumber', await text(path.join(own, 'partition')));
  const uevent = await text(path.join(own, 'uevent'));
  add('partitionUuid', /^PARTUUID=(.+)$/m.exec(uevent ?? '')?.[1]);
  const udev = await udevProperties(devNumber);
  add('serial', udev.get('ID_SERIAL_SHORT') ?? udev.get('ID_SERIAL'));
  add('wwn', udev.get('ID_WWN_WITH_EXTENSION') ?? udev.get('ID_WWN'));
  add('partitionUuid', udev.get('ID_PART_ENTRY_UUID'));
  return identity;
}

function integer(value: string | undefined, fallback: number): number {
  const n = Number(value);
  return value !== undefined && Number.isSafeInteger(n) && n > 0 ? n : fallback;
}

/** Everything sysfs says about the block device of that kernel name. Rejects with `not-found` if it has gone. */
export async function blockInfo(
  name: string,
  roots: SystemRoots = SYSTEM_ROOTS,
): Promise<BlockInfo> {
  let own: string;
  try {
    own = await realpath(path.join(roots.sys, 'class/block', name));
  } catch (error) {
    if (errnoOf(error) === 'ENOENT')
      throw new B2Error(
        'not-found',
        `there is no block device ${name} in ${roots.sys}/class/block`,
      );
    throw ioError('look up', path.join(roots.sys, 'class/block', name), error);
  }
  const need = async (attribute: string): Promise<string> => {
    const value = await text(path.join(own, attribute));
    if (value === undefined)
      throw new B2Error(
        'io',
        `the kernel does not tell ${attribute} of block device ${name}: has it been removed?`,
      );
    return value;
  };
  const partitionNumber = await text(path.join(own, 'partition'));
  const disk = partitionNumber === undefined ? own : path.dirname(own);
  const devNumber = await need('dev');
  const sizeBytes = Number(await need('size')) * SYSFS_SECTOR_BYTES;
  if (!Number.isSafeInteger(sizeBytes) || sizeBytes > MAX_DEVICE_BYTES) {
    throw new B2Error(
      'unsupported',
      `block device ${name} is larger than b2 can address (2^53 bytes)`,
    );
  }
  const logicalBlockBytes = integer(await text(path.join(disk, 'queue/logical_block_size')), 512);
  const sequence = await text(path.join(disk, 'diskseq'));
  const partitions: { readonly name: string; readonly number: number }[] = [];
  if (partitionNumber === undefined) {
    for (const child of await names(own)) {
      const number = await text(path.join(own, child, 'partition'));
      if (number !== undefined) partitions.push({ name: child, number: Number(number) });
    }
  }
  const dmName = await text(path.join(own, 'dm/name'));
  // The kernel writes a slash in a device name as an exclamation mark in sysfs (cciss!c0d0).
  const node = path.join(roots.dev, name.replaceAll('!', '/'));
  return {
    name,
    path: node,
    displayPath: dmName === undefined ? node : path.join(roots.dev, 'mapper', dmName),
    devNumber,
    sizeBytes,
    logicalBlockBytes,
    physicalBlockBytes: integer(
      await text(path.join(disk, 'queue/physical_block_size')),
      logicalBlockBytes,
    ),
    readOnly:
      (await text(path.join(own, 'ro'))) === '1' || (await text(path.join(disk, 'ro'))) === '1',
    diskSequence: sequence === undefined || !/^\d+$/.test(sequence) ? undefined : BigInt(sequence),
    partition:
      partitionNumber === undefined
        ? undefined
        : {
            number: safeNumber(Number(partitionNumber), `partition number of ${name}`),
            diskName: path.basename(disk),
            offsetBytes: safeNumber(
              Number(await need('start')) * SYSFS_SECTOR_BYTES,
              `start of partition ${name}`,
            ),
          },
    partitions: partitions.toSorted((a, b) => a.number - b.number).map((p) => p.name),
    holders: await names(path.join(own, 'holders')),
    slaves: await names(path.join(own, 'slaves')),
    loopBackingFile: await text(path.join(own, 'loop/backing_file')),
    identity: await identityOf(own, disk, devNumber),
  };
}
