/**
 * Is this the device that the volume is of? Asked when a session begins with a volume that is there already, and when a device has
 * come back after it was gone. What is captured into the wrong volume would be listed, restored and verified as another disk's state.
 */
import { readFile, realpath, stat } from 'node:fs/promises';
import path from 'node:path';
import type { DeviceFacts } from '../devices/device.js';
import { inspectDevice, type DeviceContents } from '../devices/inspect.js';
import { SYSTEM_ROOTS, type SystemRoots } from '../devices/sysfs.js';
import type { Readable } from '../devices/table.js';
import type { Image } from '../image.js';

/** What is known of a device at one time. */
export interface KnownDevice {
  readonly kind: 'block' | 'file';
  /** As {@link DeviceFacts.identity}. */
  readonly identity: Readonly<Record<string, string>>;
  /** Undefined if nobody has looked. */
  readonly contents: DeviceContents | undefined;
}

/**
 * - `same`: something that only one device has is the same, and nothing contradicts;
 * - `other`: something contradicts;
 * - `unknown`: there is nothing to tell by.
 */
export interface IdentityVerdict {
  readonly verdict: 'same' | 'other' | 'unknown';
  /** What decided, for a message: `serial number X, not Y`. */
  readonly because: string;
}

/** What a piece of hardware, a mapping or a partition has for life. */
const LASTING = [
  ['wwn', 'world-wide name'],
  ['serial', 'serial number'],
  ['dmUuid', 'device mapper UUID'],
  ['mdUuid', 'array UUID'],
  ['partitionUuid', 'partition UUID'],
] as const;

/** What says something where nothing else does. */
const WEAK = [
  ['loopFile', 'backing file'],
  ['dmName', 'device mapper name'],
] as const;

/** Compares what was known with what is there now. What the hardware says decides before what the contents say. */
export function compareDevices(before: KnownDevice, now: KnownDevice): IdentityVerdict {
  let same: string | undefined;
  for (const [key, words] of LASTING) {
    const [was, is] = [before.identity[key], now.identity[key]];
    if (was === undefined || is === undefined) continue;
    if (was !== is) return { verdict: 'other', because: `${words} ${is}, not ${was}` };
    same ??= `${words} ${is}`;
  }
  if (same !== undefined) return { verdict: 'same', because: same };
  const { inode: wasInode } = before.identity;
  const { inode } = now.identity;
  if (inode !== undefined && inode === wasInode)
    return { verdict: 'same', because: 'the same file' };
  const weak = WEAK.map(([key, words]) => ({
    words,
    was: before.identity[key],
    is: now.identity[key],
  })).find((w) => w.was !== undefined && w.is !== undefined);
  // The file behind a loop device and the name of a mapping outlive what is in them (mkfs), but can also be used again.
  if (weak !== undefined && weak.was === weak.is)
    return { verdict: 'same', because: `${weak.words} ${weak.is}` };
  const [was, is] = [contentsId(before.contents), contentsId(now.contents)];
  if (was !== undefined && is !== undefined && was.kind === is.kind) {
    if (was.id === is.id) return { verdict: 'same', because: `${is.kind} ${is.id}` };
    return { verdict: 'other', because: `${is.kind} ${is.id}, not ${was.id}` };
  }
  if (weak !== undefined)
    return { verdict: 'other', because: `${weak.words} ${weak.is}, not ${weak.was}` };
  return {
    verdict: 'unknown',
    because: 'it has no serial number, partition table or file system to tell it by',
  };
}

/** What tells contents apart from any others: the partition table's id, else the UUIDs of what lies on the whole device. */
function contentsId(
  contents: DeviceContents | undefined,
): { readonly kind: string; readonly id: string } | undefined {
  if (contents === undefined) return undefined;
  if (contents.table !== undefined) {
    const { type, id } = contents.table;
    // An MBR without a signature has 0.
    return /^[0x-]*$/i.test(id) ? undefined : { kind: `${type.toUpperCase()} disk id`, id };
  }
  const uuids = contents.contents.flatMap((c) => (c.uuid === undefined ? [] : [c.uuid]));
  return uuids.length === 0 ? undefined : { kind: 'file system UUID', id: uuids.join(' ') };
}

/** Looks at what lies on a device, without other programs, so that it compares with {@link imageContents}. */
export function deviceContents(device: Readable): Promise<DeviceContents> {
  return inspectDevice(device, () => Promise.resolve(undefined));
}

/** The same of what a repository holds: the newest that is known of the contents. */
export function imageContents(image: Image, facts: DeviceFacts): Promise<DeviceContents> {
  return deviceContents({
    facts: { ...facts, sizeBytes: image.sizeBytes, logicalBlockBytes: image.logicalBlockBytes },
    async read(into, offset) {
      const length = Math.max(0, Math.min(into.byteLength, image.sizeBytes - offset));
      if (length > 0) await image.read(into.subarray(0, length), offset);
      return length;
    },
  });
}

/**
 * Whether the device that is open is still there, as cheaply as can be asked every second:
 * - `here`: with this size;
 * - `gone`: the kernel has it no more, or shows another medium or file in its place; `why` says which;
 * - `released`: a loop device that somebody has detached: it goes as soon as we let go of it.
 */
export type Presence =
  | { readonly kind: 'here'; readonly sizeBytes: number }
  | { readonly kind: 'gone' | 'released'; readonly why: string };

/** `wasReleasing`: {@link isReleasing} when the device was opened. */
export async function presenceOf(
  facts: DeviceFacts,
  wasReleasing: boolean,
  roots: SystemRoots = SYSTEM_ROOTS,
): Promise<Presence> {
  if (facts.kind === 'file') {
    try {
      const now = await stat(facts.realPath, { bigint: true });
      if (`${now.dev}:${now.ino}` !== facts.identity['inode'])
        return { kind: 'gone', why: `there is another file at ${facts.realPath} now` };
      return { kind: 'here', sizeBytes: Number(now.size) };
    } catch {
      return { kind: 'gone', why: `file ${facts.realPath} is not there any more` };
    }
  }
  // The real directory: a partition's lies in that of its disk.
  const dir = await directoryOf(facts, roots);
  const size = dir === undefined ? undefined : await attribute(path.join(dir, 'size'));
  if (dir === undefined || size === undefined)
    return { kind: 'gone', why: `${facts.path} has been removed` };
  const disk = facts.partitionOf === undefined ? dir : path.dirname(dir);
  const sequence = await attribute(path.join(disk, 'diskseq'));
  if (
    sequence !== undefined &&
    facts.diskSequence !== undefined &&
    BigInt(sequence) !== facts.diskSequence
  ) {
    return { kind: 'gone', why: `another medium is behind ${facts.path} now` };
  }
  const sizeBytes = Number(size) * 512;
  if (sizeBytes === 0) return { kind: 'gone', why: `${facts.path} has no medium any more` };
  if (!wasReleasing && (await isReleasing(facts, roots)))
    return { kind: 'released', why: `${facts.path} has been detached` };
  return { kind: 'here', sizeBytes };
}

/** True for a loop device that the kernel detaches when its last user lets go of it. */
export async function isReleasing(
  facts: DeviceFacts,
  roots: SystemRoots = SYSTEM_ROOTS,
): Promise<boolean> {
  const dir = await directoryOf(facts, roots);
  if (dir === undefined) return false;
  const disk = facts.partitionOf === undefined ? dir : path.dirname(dir);
  return (await attribute(path.join(disk, 'loop/autoclear'))) === '1';
}

async function directoryOf(facts: DeviceFacts, roots: SystemRoots): Promise<string | undefined> {
  if (facts.devNumber === undefined) return undefined;
  return realpath(path.join(roots.sys, 'dev/block', facts.devNumber)).catch(() => undefined);
}

async function attribute(file: string): Promise<string | undefined> {
  try {
    return (await readFile(file, 'utf8')).trim();
  } catch {
    return undefined; // not every device has every attribute, and one that has gone has none
  }
}
