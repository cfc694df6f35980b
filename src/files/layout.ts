/** What is in an image: the areas that hold file systems, and those that hold something with file systems in it. */
import type { DeviceFacts } from '../devices/device.js';
import { inspectDevice } from '../devices/inspect.js';
import type { Signature } from '../devices/signatures.js';
import type { Readable } from '../devices/table.js';
import { B2Error, messageOf } from '../errors.js';
import type { Image } from '../image.js';
import {
  findLogicalVolumes,
  volumePieces,
  type FoundVolumes,
  type LeftVolume,
  type LogicalVolume,
  type VolumeGroupName,
} from './lvm.js';
import { readMdMember, shownArray, type MdMember } from './md.js';
import type { FoundFileSystem } from './types.js';
import { placeVolumes, type PlacedVolume } from './volumes-image.js';

/** An image as the readers of partition tables want a device. */
export function readableImage(image: Image, name: string): Readable {
  const facts: DeviceFacts = {
    path: name,
    realPath: name,
    // Finds a table that counts in other sectors than the device, which Linux would show through a loop device with that sector size.
    kind: 'file',
    sizeBytes: image.sizeBytes,
    logicalBlockBytes: image.logicalBlockBytes,
    physicalBlockBytes: image.logicalBlockBytes,
    readOnly: true,
    devNumber: undefined,
    partitionOf: undefined,
    identity: {},
    diskSequence: undefined,
  };
  return {
    facts,
    read: async (into, offset) => {
      const length = Math.max(0, Math.min(into.byteLength, image.sizeBytes - offset));
      await image.read(into.subarray(0, length), offset);
      return length;
    },
  };
}

/** What of these areas only LVM itself can read, in words. */
export function whatIsLeft(areas: readonly FoundArea[]): string {
  return areas
    .flatMap(({ left }) => (left ?? []).filter((l) => l.isElsewhere !== true))
    .map(({ reason }) => reason)
    .join('; ');
}

/** An area of an image. */
export interface FoundArea extends FoundFileSystem {
  /** `container`: file systems lie in it (LVM); `none`: nothing that holds files (`why` says what it is). */
  readonly holds: 'files' | 'container' | 'none';
  /** Devices that the file system spreads over. */
  readonly devices: number;
  /** Of one that spreads over several, all of which are here (group-layout.ts): the others, each at its place. */
  readonly parts?: readonly FoundArea[];
  /** Why not all of them are here, where more is known than that they are not. */
  readonly lacking?: string;
  /** Why nothing of it can be shown although there are, or may be, files in it; `holds` is `none` then. */
  readonly why?: string;
  /**
   * The members of arrays (MD) that it was read from, and lies in: of a file system, the outermost first; of one in a logical
   * volume, those of the volume group, too.
   */
  readonly members?: readonly MdMember[];
  /**
   * Of a file system in a logical volume that needs no LVM: `offsetBytes` and `sizeBytes` are of the image with the volume where
   * {@link placeVolumes} has put it.
   */
  readonly volume?: PlacedVolume;
  /**
   * Of a file system in a volume that a tiny virtual machine puts together (vm-volumes.ts): `offsetBytes` is of the image that
   * this makes, not of the one that it lies in.
   */
  readonly isInVm?: true;
  /** Of a container: what of it only LVM itself can read, with the reason; empty where there is nothing. */
  readonly left?: readonly LeftVolume[];
  /** Of a container: the volume groups whose metadata it is that counts. */
  readonly groups?: readonly VolumeGroupName[];
  /** Of a container: no metadata in the image names it. */
  readonly isStray?: true;
}

/** Why nothing of an area can be shown although there are, or may be, files in it; undefined otherwise. LVM is another matter: {@link isForLvm}. */
export function whyNotShown({
  holds,
  type,
  devices,
  parts,
  lacking,
  why,
}: FoundArea): string | undefined {
  if (why !== undefined) return why;
  if (holds === 'files' && devices > 1 && parts === undefined)
    return `the ${type} in it lies on ${devices} devices and is not shown: ${lacking ?? 'one of them alone cannot be read'}`;
  return undefined;
}

/** True for containers of which a part is not among the areas, because only LVM itself can read it. */
export function isForLvm({ holds, left }: FoundArea): boolean {
  return holds === 'container' && (left ?? []).some((l) => l.isElsewhere !== true);
}

/** What of a container nothing here can read, in words. */
export function elsewhere({ left }: FoundArea): readonly string[] {
  return (left ?? []).filter((l) => l.isElsewhere === true).map(({ reason }) => reason);
}

/** The volumes among the areas, as {@link withVolumes} wants them. */
export function volumesIn(areas: readonly FoundArea[]): readonly PlacedVolume[] {
  const placed = [...areas, ...areas.flatMap((a) => a.parts ?? [])].flatMap((a) => a.volume ?? []);
  return [...new Map(placed.map((p) => [p.offsetBytes, p])).values()].sort(
    (a, b) => a.offsetBytes - b.offsetBytes,
  );
}

/** The members of arrays that volume groups of the image lie on, for a volume of which more is not known. */
export function membersBelow(areas: readonly FoundArea[]): Pick<FoundArea, 'members'> {
  const members = areas.flatMap((a) => (a.holds === 'container' ? (a.members ?? []) : []));
  return members.length === 0 ? {} : { members };
}

/** More would be a strange machine, and each is looked at. */
const MAX_VOLUMES = 256;
/** Arrays in partitions of arrays in …: nobody makes even three. */
const MAX_DEPTH = 4;

/**
 * Every partition with something on it, or the whole image where there is no partition table; of members of arrays that hold all of
 * it, what is in the array. Then the file systems in logical volumes that need no LVM to be read.
 `known`: what {@link areasOn} has found
 * already, in an image that is made of several.
 */
export async function findAreas(
  image: Image,
  name: string,
  known?: readonly FoundArea[],
): Promise<readonly FoundArea[]> {
  const areas = newestOnly(known ?? (await areasOn(image, name)));
  const containers = areas.filter((a) => a.holds === 'container');
  if (containers.length === 0) return areas;
  const { volumes, left, groups, strays } = await logicalVolumes(image, containers);
  const inside: FoundArea[] = [];
  for (const placed of placeVolumes(image.sizeBytes, volumes)) {
    const { volume, offsetBytes } = placed;
    const area = await wholeFileSystem(volumeImage(image, volume), name);
    if (area === undefined) continue;
    const members = [...membersOf(volume, containers), ...(area.members ?? [])];
    inside.push({
      ...area,
      name: volume.name,
      offsetBytes: offsetBytes + area.offsetBytes,
      ...(members.length === 0 ? {} : { members }),
      volume: placed,
    });
  }
  const told = areas.map((area) =>
    area.holds === 'container'
      ? {
          ...area,
          left: left.filter((l) => l.place === area.name),
          groups: groups.filter((g) => g.place === area.name),
          ...(strays.includes(area.name) ? { isStray: true as const } : {}),
        }
      : area,
  );
  return [...told, ...inside];
}

/** Of several members of one array in the image, what is in the newest; the kernel goes by that, too, and it is all there once. */
export function newestOnly(areas: readonly FoundArea[]): readonly FoundArea[] {
  const newest = new Map<string, { readonly name: string; readonly member: MdMember }>();
  for (const { name, members = [] } of areas) {
    for (const member of members) {
      const { data, array } = member;
      if (data === undefined || array === undefined) continue;
      const known = newest.get(array.uuid)?.member.array?.events ?? -1;
      if (array.events > known) newest.set(array.uuid, { name, member });
    }
  }
  return areas.map((area) => {
    for (const member of area.members ?? []) {
      const better = newest.get(member.array?.uuid ?? '');
      if (member.data === undefined || better === undefined || better.member === member) continue;
      const isOlder = (better.member.array?.events ?? 0) > (member.array?.events ?? 0);
      const why = `it is ${isOlder ? 'an older' : 'another'} member of the ${shownArray(member.array)} of which ${better.name} is one, and is not shown`;
      return { ...notShown(area, MD, why), members: [member] };
    }
    return area;
  });
}

/** Members of arrays that the volume's data lies on. */
function membersOf(volume: LogicalVolume, containers: readonly FoundArea[]): readonly MdMember[] {
  const stripes = volume.segments.flatMap((s) => s.stripes);
  return containers
    .filter((c) => stripes.some((at) => at >= c.offsetBytes && at < c.offsetBytes + c.sizeBytes))
    .flatMap((c) => c.members ?? []);
}

async function logicalVolumes(
  image: Image,
  containers: readonly FoundArea[],
): Promise<FoundVolumes> {
  try {
    const found = await findLogicalVolumes(image, containers);
    const { volumes, left } = found;
    if (volumes.length <= MAX_VOLUMES) return found;
    const place = containers[0]?.name ?? '';
    const reason = `only the first ${MAX_VOLUMES} of ${volumes.length} logical volumes are looked at`;
    return {
      ...found,
      volumes: volumes.slice(0, MAX_VOLUMES),
      left: [...left, { place, reason }],
    };
  } catch (error) {
    if (!(error instanceof B2Error)) throw error;
    // Damage there is none of the file systems beside it.
    return {
      volumes: [],
      left: containers.map(({ name }) => ({ place: name, reason: messageOf(error) })),
      groups: [],
      strays: [],
      copies: [],
    };
  }
}

/** A part of an image, to look at what is on it. */
function viewOf(
  { logicalBlockBytes }: Image,
  sizeBytes: number,
  read: (into: Uint8Array, offset: number) => Promise<void>,
): Image {
  return {
    sizeBytes,
    logicalBlockBytes,
    read: (into, offset) => {
      if (offset < 0 || offset > sizeBytes - into.length)
        throw new RangeError(`bytes ${offset}+${into.length} are not within ${sizeBytes}`);
      return read(into, offset);
    },
    extents: (offset, length) => Promise.resolve([{ offset, length, hole: false }]),
    close: () => Promise.resolve(),
  };
}

/** A logical volume as an image. */
export function volumeImage(image: Image, volume: LogicalVolume): Image {
  return viewOf(image, volume.sizeBytes, async (into, offset) => {
    let at = 0;
    for (const { imageOffset, length } of volumePieces(volume, offset, into.length)) {
      await image.read(into.subarray(at, at + length), imageOffset);
      at += length;
    }
  });
}

/**
 * The file system that a volume as a whole is, if it is one, or that the array is of which it is a member; also a member of which
 * nothing can be shown (`why`). A partition table in it is the disk of a virtual machine: another image.
 */
export async function wholeFileSystem(image: Image, name: string): Promise<FoundArea | undefined> {
  return (await areasOn(image, name, 0)).find(
    (a) => a.name === 'disk' && (a.holds === 'files' || a.why !== undefined),
  );
}

/** Every partition with something on it, or the whole image where there is no partition table; of members of arrays what is in them. */
export async function areasOn(
  image: Image,
  name: string,
  depth = 0,
): Promise<readonly FoundArea[]> {
  // blkid would look at a device of this machine, not at the image.
  const { table, contents } = await inspectDevice(readableImage(image, name), () =>
    Promise.resolve(undefined),
  );
  const partitions = table?.partitions ?? [];
  const inArray = await wholeMember(image, name, depth, contents, partitions);
  if (inArray !== undefined) return inArray;
  const areas: FoundArea[] = [];
  for (const { number, offsetBytes, ...partition } of partitions) {
    const sizeBytes = Math.min(partition.sizeBytes, image.sizeBytes - offsetBytes);
    if (sizeBytes <= 0) continue;
    const range = { name: `p${number}`, offsetBytes, sizeBytes };
    areas.push(...(await areasIn(image, name, depth, range, partition.contents)));
  }
  // A boot sector of FAT or NTFS can look like an empty partition table, and a hybrid ISO is both.
  if (areas.length > 0) return areas;
  return areasIn(
    image,
    name,
    depth,
    { name: 'disk', offsetBytes: 0, sizeBytes: image.sizeBytes },
    contents,
  );
}

/** A part of an image, and what it is called. */
interface Range {
  readonly name: string;
  readonly offsetBytes: number;
  readonly sizeBytes: number;
}

/**
 * What there is where all of an image is a member of a RAID; undefined where it is none. A superblock at the end of it that lies in a
 * partition is the partition's, as libblkid has it: partitions in an array end before its superblock. One at the beginning that is
 * damaged is left over where there are partitions.
 */
async function wholeMember(
  image: Image,
  name: string,
  depth: number,
  contents: readonly Signature[],
  partitions: readonly { readonly offsetBytes: number; readonly sizeBytes: number }[],
): Promise<readonly FoundArea[] | undefined> {
  const isCovered = (at: number): boolean =>
    partitions.some((p) => at >= p.offsetBytes && at < p.offsetBytes + p.sizeBytes);
  const disk = { name: 'disk', offsetBytes: 0, sizeBytes: image.sizeBytes };
  const bios = contents.find(({ type }) => BIOS_RAID[type] !== undefined);
  if (bios !== undefined && !isCovered(Math.floor(image.sizeBytes / 512 - 2) * 512))
    return [
      notShown(
        disk,
        bios.type,
        `it is a disk of a BIOS RAID in ${BIOS_RAID[bios.type]}, whose volumes are not put together here`,
      ),
    ];
  if (partitions.length === 0 || !contents.some(isMdMember)) return undefined;
  const member = await readMdMember(image, disk);
  if (member === undefined || isCovered(member.superblockOffset)) return undefined;
  return member.array === undefined &&
    member.reason !== undefined &&
    member.superblockOffset <= 4096
    ? undefined
    : inArray(image, name, depth, disk, member);
}

/** RAID that BIOSes begin, and mdadm with metadata of its own. */
const BIOS_RAID: Readonly<Record<string, string>> = {
  isw_raid_member: 'the format of Intel (IMSM)',
  ddf_raid_member: 'the format of SNIA (DDF)',
};

function isMdMember({ type }: Signature): boolean {
  return type === 'linux_raid_member';
}

/** What is in a partition, or in all of an image. */
async function areasIn(
  image: Image,
  name: string,
  depth: number,
  range: Range,
  contents: readonly Signature[],
): Promise<readonly FoundArea[]> {
  if (contents.some(isMdMember)) {
    const member = await readMdMember(image, range);
    if (member !== undefined) return inArray(image, name, depth, range, member);
  }
  const signature = contents.find((c) => !isMdMember(c) && BIOS_RAID[c.type] === undefined);
  if (signature === undefined) return [];
  const { type, sizeBytes = 0 } = signature;
  // Not made in this array, then: its superblock was left behind by another one, or the file system by what was there before.
  return depth > 0 && sizeBytes > range.sizeBytes
    ? [notShown(range, type, `the ${type} in it is larger than the array that it lies in`)]
    : [areaOf(range, signature)];
}

/** What is in the array that the range is a member of, each at its place in the image: the array is a part of it. */
async function inArray(
  image: Image,
  name: string,
  depth: number,
  range: Range,
  member: MdMember,
): Promise<readonly FoundArea[]> {
  const { data, array, reason } = member;
  const itself = `it is a member of a ${shownArray(array)}`;
  const itsOwn = { members: [member] };
  if (data === undefined || depth >= MAX_DEPTH) {
    const why = reason ?? 'arrays lie too deep in each other';
    return [{ ...notShown(range, MD, `${itself} and is not shown: ${why}`), ...itsOwn }];
  }
  const start = range.offsetBytes + data.offsetBytes;
  const view = viewOf(image, data.sizeBytes, (into, offset) => image.read(into, start + offset));
  const inside = await areasOn(view, name, depth + 1);
  if (inside.length === 0) return [{ ...areaOf(range, { type: MD, usage: 'raid' }), ...itsOwn }];
  return inside.map((area) => ({
    ...area,
    // As Linux names them (md0p1); where all of the disk is the array, its partitions are those that people know.
    name:
      area.name === 'disk'
        ? range.name
        : range.name === 'disk'
          ? area.name
          : `${range.name}${area.name}`,
    offsetBytes: start + area.offsetBytes,
    members: [member, ...(area.members ?? [])],
  }));
}

const MD = 'linux_raid_member';

/** Something of which nothing can be shown. */
function notShown({ name, offsetBytes, sizeBytes }: Range, type: string, why: string): FoundArea {
  return { name, offsetBytes, sizeBytes, type, holds: 'none', devices: 1, why };
}

function areaOf(range: Range, { type, usage, label, uuid, devices }: Signature): FoundArea {
  return {
    ...range,
    type,
    ...(label === undefined ? {} : { label }),
    ...(uuid === undefined ? {} : { uuid }),
    holds: usage === 'filesystem' ? 'files' : type === 'LVM2_member' ? 'container' : 'none',
    devices: devices ?? 1,
  };
}
