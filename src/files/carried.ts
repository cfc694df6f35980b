/** What a device carries that may lie on other devices as well, by the identities that all of these have. */
import type { Image } from '../image.js';
import { readBtrfs } from './btrfs.js';
import { areasOn, type FoundArea } from './layout.js';
import { findLogicalVolumes } from './lvm.js';

/** A part of something that spreads over devices. */
export interface CarriedPart {
  /** Of all its devices one has it, and whatever is the same device or a copy of it. */
  readonly id: string;
  /** Of a part in an array (MD): the array. All members of it may have the part. */
  readonly within?: string;
}

/** A volume group, array (MD) or file system that may spread over devices. */
export interface Carried {
  /** The same on every device of it, and on no other. */
  readonly key: string;
  /** For people: `volume group vg0`. */
  readonly what: string;
  /** A short name for it, of letters, digits and `+_.-`. */
  readonly name: string;
  /** What of it the device has; spares and the like have no part. */
  readonly parts: readonly CarriedPart[];
}

/** Names and labels can be anything. */
function shortName(...choices: readonly (string | undefined)[]): string {
  const found = choices.find((text) => text !== undefined && text !== '') ?? '';
  return found.replaceAll(/[^\w+.-]/g, '_').slice(0, 64);
}

const bare = (uuid: string): string => uuid.toLowerCase().replaceAll(/[^0-9a-z]/g, '');

/**
 * Looks at signatures and metadata only. `name` is for messages. Rejects where the image cannot be read; metadata of which nothing can be
 * made carries nothing.
 */
export async function carriedBy(image: Image, name: string): Promise<readonly Carried[]> {
  const areas = await areasOn(image, name);
  const found = [...(await volumeGroups(image, areas)), ...areas.flatMap(arraysIn)];
  for (const area of areas) found.push(...(await btrfsIn(image, area)));
  const byKey = new Map<string, Carried>();
  for (const one of found) {
    const { parts = [] } = byKey.get(one.key) ?? {};
    byKey.set(one.key, { ...one, parts: [...parts, ...one.parts] });
  }
  return [...byKey.values()];
}

/** A part that lies in that area. */
function partIn({ members = [] }: FoundArea, id: string): CarriedPart {
  const array = members.find((m) => (m.array?.disks ?? 0) > 1)?.array;
  return { id, ...(array === undefined ? {} : { within: array.uuid }) };
}

async function volumeGroups(
  image: Image,
  areas: readonly FoundArea[],
): Promise<readonly Carried[]> {
  const containers = areas.filter((a) => a.holds === 'container');
  if (containers.length === 0) return [];
  const { groups } = await findLogicalVolumes(image, containers);
  return groups.map(({ id, shown, places }) => ({
    key: `lvm ${bare(id)}`,
    what: `volume group ${shown}`,
    name: shortName(shown),
    parts: containers
      .filter((c) => places.includes(c.name))
      .map((c) => partIn(c, bare(c.uuid ?? ''))),
  }));
}

function arraysIn({ type, uuid, label, members = [] }: FoundArea): readonly Carried[] {
  const arrays = members.flatMap(({ array }) =>
    array === undefined || array.disks < 2
      ? []
      : [{ uuid: array.uuid, label: array.name, role: array.role }],
  );
  if (type === 'linux_raid_member' && uuid !== undefined)
    arrays.push({ uuid, label, role: undefined });
  return arrays.map((array) => ({
    key: `md ${bare(array.uuid)}`,
    what: `array ${array.label ?? array.uuid}`,
    // By default arrays are called by their number, `host:0`.
    name: shortName(array.label?.replace(/^.*:/, ''), array.uuid).replace(/^(?=\d)/, 'md'),
    parts: array.role === undefined ? [] : [{ id: String(array.role) }],
  }));
}

async function btrfsIn(image: Image, area: FoundArea): Promise<readonly Carried[]> {
  const { type, uuid, label, devices, offsetBytes } = area;
  if (type !== 'btrfs' || devices < 2 || uuid === undefined) return [];
  const device = await readBtrfs(image, offsetBytes);
  return [
    {
      key: `btrfs ${bare(uuid)}`,
      what: `btrfs ${label ?? uuid}`,
      name: shortName(label, uuid),
      parts: device === undefined ? [] : [partIn(area, String(device.device))],
    },
  ];
}
