/** What a device carries that may lie on other devices as well, by the identities that all of these have. */
import type { Image } from '../image.js';
import { areasOn, type FoundArea } from './layout.js';
import { findLogicalVolumes } from './lvm.js';

/** A volume group, array (MD) or file system that may spread over devices. */
export interface Carried {
  /** The same on every device of it, and on no other. */
  readonly key: string;
  /** For people: `volume group vg0`. */
  readonly what: string;
  /** A short name for it, of letters, digits and `+_.-`. */
  readonly name: string;
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
  const found = [...(await volumeGroups(image, areas)), ...areas.flatMap(carriedIn)];
  return [...new Map(found.map((one) => [one.key, one])).values()];
}

async function volumeGroups(
  image: Image,
  areas: readonly FoundArea[],
): Promise<readonly Carried[]> {
  const containers = areas.filter((a) => a.holds === 'container');
  if (containers.length === 0) return [];
  const { groups } = await findLogicalVolumes(image, containers);
  return groups.map(({ id, shown }) => ({
    key: `lvm ${bare(id)}`,
    what: `volume group ${shown}`,
    name: shortName(shown),
  }));
}

function carriedIn({ type, uuid, label, devices, members = [] }: FoundArea): readonly Carried[] {
  const arrays = members.flatMap(({ array }) =>
    array === undefined || array.disks < 2 ? [] : [{ uuid: array.uuid, label: array.name }],
  );
  if (type === 'linux_raid_member' && uuid !== undefined) arrays.push({ uuid, label });
  const found = arrays.map((array) => ({
    key: `md ${bare(array.uuid)}`,
    what: `array ${array.label ?? array.uuid}`,
    // By default arrays are called by their number, `host:0`.
    name: shortName(array.label?.replace(/^.*:/, ''), array.uuid).replace(/^(?=\d)/, 'md'),
  }));
  if (type !== 'btrfs' || devices < 2 || uuid === undefined) return found;
  const btrfs = { key: `btrfs ${bare(uuid)}`, what: `btrfs ${label ?? uuid}` };
  return [...found, { ...btrfs, name: shortName(label, uuid) }];
}
