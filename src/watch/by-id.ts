/**
 * Names of disks that stay: `/dev/disk/by-id`, as udev makes them of serial numbers and world-wide names. For messages about a device that
 * is not the one it was.
 */
import { readdir, realpath } from 'node:fs/promises';
import path from 'node:path';

const BY_ID = '/dev/disk/by-id';

/** What tells a disk in its name there. */
const TOLD_BY = ['serial', 'wwn', 'dmName', 'dmUuid', 'mdUuid'] as const;

interface Link {
  readonly link: string;
  readonly target: string;
}

async function links(directory: string): Promise<readonly Link[]> {
  const names = await readdir(directory).catch((): string[] => []);
  const found: Link[] = [];
  for (const name of names.toSorted()) {
    const link = path.join(directory, name);
    const target = await realpath(link).catch(() => undefined);
    if (target !== undefined) found.push({ link, target });
  }
  return found;
}

/** The lasting name of a device node; undefined where there is none. */
export async function lastingName(
  realPath: string,
  directory = BY_ID,
): Promise<string | undefined> {
  return (await links(directory)).find((l) => l.target === realPath)?.link;
}

/**
 * Where a disk with that identity (`DeviceFacts.identity`) is at present; undefined where no name tells.
 */
export async function lastingNameOf(
  identity: Readonly<Record<string, string>>,
  directory = BY_ID,
): Promise<Link | undefined> {
  const all = await links(directory);
  for (const key of TOLD_BY) {
    const id = identity[key]?.trim().replaceAll(/\s+/g, '_');
    if (id === undefined || id.length < 4) continue;
    // The disk itself before its partitions, whose names end in -partN.
    const own = all.filter((l) => l.link.includes(id));
    const found = own.find((l) => !/-part\d+$/.test(l.link)) ?? own[0];
    if (found !== undefined) return found;
  }
  return undefined;
}
