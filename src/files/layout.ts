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
  /** Of a file system in a logical volume that needs no LVM: `offsetBytes` and `sizeBytes` are those that {@link placeVolumes} gave it. */
  readonly volume?: LogicalVolume;
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
}: FoundArea): string | undefined {
  if (type === 'linux_raid_member')
    return 'it is a member of a RAID of Linux (MD), which is not put together here; what is on it is not shown';
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
  const placed = [...areas, ...areas.flatMap((a) => a.parts ?? [])].flatMap(
    ({ volume, offsetBytes }) => (volume === undefined ? [] : [{ volume, offsetBytes }]),
  );
  return [...new Map(placed.map((p) => [p.offsetBytes, p])).values()].sort(
    (a, b) => a.offsetBytes - b.offsetBytes,
  );
}

/** More would be a strange machine, and each is looked at. */
const MAX_VOLUMES = 256;

/**
 * Every partition with something on it, or the whole image where there is no partition table; then the file systems in logical
 * volumes that need no LVM to be read. `known`: what {@link areasOn} has found already, in an image that is made of several.
 */
export async function findAreas(
  image: Image,
  name: string,
  known?: readonly FoundArea[],
): Promise<readonly FoundArea[]> {
  const areas = known ?? (await areasOn(image, name));
  const containers = areas.filter((a) => a.holds === 'container');
  if (containers.length === 0) return areas;
  const { volumes, left, groups, strays } = await logicalVolumes(image, containers);
  const inside: FoundArea[] = [];
  for (const { volume, offsetBytes } of placeVolumes(image.sizeBytes, volumes)) {
    const { sizeBytes } = volume;
    const area = await wholeFileSystem(volumeImage(image, volume), name);
    if (area !== undefined)
      inside.push({ ...area, name: volume.name, offsetBytes, sizeBytes, volume });
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

/** A logical volume as an image, to look at what is on it. */
export function volumeImage(image: Image, volume: LogicalVolume): Image {
  return {
    sizeBytes: volume.sizeBytes,
    logicalBlockBytes: image.logicalBlockBytes,
    read: async (into, offset) => {
      let at = 0;
      for (const { imageOffset, length } of volumePieces(volume, offset, into.length)) {
        await image.read(into.subarray(at, at + length), imageOffset);
        at += length;
      }
    },
    extents: (offset, length) => Promise.resolve([{ offset, length, hole: false }]),
    close: () => Promise.resolve(),
  };
}

/** The file system that a volume as a whole is, if it is one. A partition table in it is the disk of a virtual machine: another image. */
export async function wholeFileSystem(image: Image, name: string): Promise<FoundArea | undefined> {
  return (await areasOn(image, name)).find((a) => a.name === 'disk' && a.holds === 'files');
}

/** Every partition with something on it, or the whole image where there is no partition table. */
export async function areasOn(image: Image, name: string): Promise<readonly FoundArea[]> {
  // blkid would look at a device of this machine, not at the image.
  const { table, contents } = await inspectDevice(readableImage(image, name), () =>
    Promise.resolve(undefined),
  );
  const areas: FoundArea[] = [];
  for (const partition of table?.partitions ?? []) {
    const sizeBytes = Math.min(partition.sizeBytes, image.sizeBytes - partition.offsetBytes);
    const [signature] = partition.contents;
    if (signature === undefined || sizeBytes <= 0) continue;
    areas.push(areaOf(`p${partition.number}`, partition.offsetBytes, sizeBytes, signature));
  }
  const [whole] = contents;
  // A boot sector of FAT or NTFS can look like an empty partition table, and a hybrid ISO is both.
  if (whole !== undefined && areas.length === 0)
    areas.push(areaOf('disk', 0, image.sizeBytes, whole));
  return areas;
}

function areaOf(
  name: string,
  offsetBytes: number,
  sizeBytes: number,
  { type, usage, label, uuid, devices }: Signature,
): FoundArea {
  return {
    name,
    type,
    offsetBytes,
    sizeBytes,
    ...(label === undefined ? {} : { label }),
    ...(uuid === undefined ? {} : { uuid }),
    holds: usage === 'filesystem' ? 'files' : type === 'LVM2_member' ? 'container' : 'none',
    devices: devices ?? 1,
  };
}
