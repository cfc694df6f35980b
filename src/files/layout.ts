/** What is in an image: the areas that hold file systems, and those that hold something with file systems in it. */
import type { DeviceFacts } from '../devices/device.js';
import { inspectDevice } from '../devices/inspect.js';
import type { Signature } from '../devices/signatures.js';
import type { Readable } from '../devices/table.js';
import type { Image } from '../image.js';
import type { FoundFileSystem } from './types.js';

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

/** An area of an image. */
export interface FoundArea extends FoundFileSystem {
  /** `container`: file systems lie in it (LVM); `none`: nothing that holds files (`why` says what it is). */
  readonly holds: 'files' | 'container' | 'none';
  /** Devices that the file system spreads over. */
  readonly devices: number;
}

/** Every partition with something on it, or the whole image where there is no partition table. */
export async function findAreas(image: Image, name: string): Promise<readonly FoundArea[]> {
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
