/**
 * What is in a point of a volume, with file systems and volume groups that lie on other devices, too: where something spans, the
 * other volumes of its group are opened at the same instant (companions.ts), and all of them are read as one image
 * (composed-image.ts), of which LVM's metadata names parts by UUID wherever they lie. Nothing of the others is shown for itself.
 *
 * Of an array (MD) of which the volume is a member the others tell whether it was up to date: one that had dropped out of it holds what was
 * there then, and does not know. A volume in which nothing spans is looked at alone.
 */
import { B2Error, messageOf } from '../errors.js';
import type { Image, ImageExtent } from '../image.js';
import { readBtrfs } from './btrfs.js';
import type { Companion, Companions, FindCompanions } from './companions.js';
import { composeImages, openComposed, placeImages } from './composed-image.js';
import { areasOn, findAreas, newestOnly, volumeImage, type FoundArea } from './layout.js';
import { findLogicalVolumes } from './lvm.js';
import { shownArray, type MdArray, type MdMember } from './md.js';

/** A point whose areas are wanted. */
export interface PointSource {
  readonly openImage: () => Promise<Image>;
  /** For messages. */
  readonly name: string;
  /** The other volumes of its group at that instant; called only where something spans, or is in an array. */
  readonly companions?: FindCompanions | undefined;
}

export interface PointLayout {
  /** Of the image that `openImage` opens. */
  readonly areas: readonly FoundArea[];
  /** The volume's image; where something in it lies on others as well, all of them as one. */
  readonly openImage: () => Promise<Image>;
  /** The other volumes that are part of it. */
  readonly others: readonly string[];
  /** True where something lies on other devices, here or not. */
  readonly isSpread: boolean;
  /** Names of file systems and volumes that are there and cannot be shown, because a volume of the group is missing; with reasons. */
  readonly missing: readonly string[];
  /** The same of what lies on devices of which no group is known that they are of. */
  readonly elsewhere: readonly string[];
}

/** Looks. Rejects as {@link findAreas}; where only another volume cannot be read, it counts as missing. */
export async function findPointAreas(source: PointSource): Promise<PointLayout> {
  const { openImage, name, companions } = source;
  const image = await openImage();
  try {
    const own = await areasOn(image, name);
    const alone = await gatherBtrfs(image, await findAreas(image, name, own), []);
    const isSpread = alone.some(lacksOthers);
    const isAsked = isSpread || own.some(isMirrored);
    const found = isAsked ? await companions?.(isSpread) : undefined;
    if (found === undefined) {
      const elsewhere = isSpread ? alone.flatMap(lackingIn) : [];
      return { areas: alone, openImage, others: [], isSpread, missing: [], elsewhere };
    }
    return { ...(await withCompanions(source, image, own, found)), isSpread };
  } finally {
    await image.close();
  }
}

/** Whether something in the area lies on a device that is not in its image. */
function lacksOthers(area: FoundArea): boolean {
  return (
    (area.holds === 'files' && area.devices > 1 && area.parts === undefined) ||
    area.isStray === true ||
    (area.groups ?? []).some((g) => g.isPartial)
  );
}

/** Whether it is read from one of several members of an array. */
function isMirrored({ members = [] }: FoundArea): boolean {
  return members.some(({ data, array }) => data !== undefined && (array?.disks ?? 0) > 1);
}

/** An image for something that closes it, while it is still needed. */
function kept(image: Image): Image {
  return {
    sizeBytes: image.sizeBytes,
    logicalBlockBytes: image.logicalBlockBytes,
    read: (into, offset) => image.read(into, offset),
    extents: (offset, length, limit): Promise<readonly ImageExtent[]> =>
      image.extents(offset, length, limit),
    close: () => Promise.resolve(),
  };
}

/** Another volume that was looked at: what in it may be a part of something in the first. */
interface Looked {
  readonly companion: Companion;
  readonly image: Image;
  /** As they lie in its own image. */
  readonly areas: readonly FoundArea[];
  /** Of arrays. */
  readonly members: readonly MdMember[];
}

async function withCompanions(
  source: PointSource,
  image: Image,
  found: readonly FoundArea[],
  companions: Companions,
): Promise<Omit<PointLayout, 'isSpread'>> {
  const looked: Looked[] = [];
  const missing = [...companions.missing];
  try {
    for (const companion of companions.there) {
      const { volume } = companion;
      let opened: Image | undefined;
      try {
        opened = await companion.openImage();
        looked.push({ companion, image: opened, ...(await partsIn(opened, volume)) });
      } catch (error) {
        await opened?.close();
        if (!(error instanceof B2Error)) throw error;
        missing.push({ volume, reason: `${volume} cannot be read: ${messageOf(error)}` });
      }
    }
    const why = [
      ...missing.map((m) => m.reason),
      ...(missing.length === 0
        ? [`no other volume of the group "${companions.group}" has the rest at that instant`]
        : []),
    ].join('; ');
    const useful = looked.filter((l) => l.areas.length > 0);
    const own = found.map((area) => withoutOutdated(area, looked));
    const outdated = own.flatMap((area, i) =>
      area === found[i] ? [] : [`${area.name}: ${area.why ?? ''}`],
    );
    const layout = await composed(source, image, own, useful, why, missing.length > 0).catch(
      (error: unknown) => {
        if (!(error instanceof B2Error)) throw error;
        // The volume alone could be read: what cannot lies on another.
        return composed(source, image, own, [], messageOf(error), true);
      },
    );
    return { ...layout, missing: [...outdated, ...layout.missing] };
  } finally {
    for (const one of looked) await one.image.close();
  }
}

/** The area; without what is in it if another volume has a newer member of an array that it is read from. */
function withoutOutdated(area: FoundArea, looked: readonly Looked[]): FoundArea {
  for (const { array } of area.members ?? []) {
    if (array === undefined || !isMirrored(area)) continue;
    const newer = looked.find((l) =>
      l.members.some((m) => m.array !== undefined && isNewer(m.array, array)),
    );
    if (newer === undefined) continue;
    const { name, offsetBytes, sizeBytes, type, members } = area;
    const why = `it is an outdated member of the ${shownArray(array)} and is not shown: ${newer.companion.volume} has a newer one at that instant`;
    return {
      name,
      offsetBytes,
      sizeBytes,
      type,
      devices: 1,
      holds: 'none',
      why,
      ...(members === undefined ? {} : { members }),
    };
  }
  return area;
}

/**
 * Whether the first of two members of an array shows that the second had dropped out of it. Superblocks are written one after the other:
 * as in super_1_validate of the kernel, one step is no difference, but for a first one that has missed somebody since.
 */
function isNewer(first: MdArray, second: MdArray): boolean {
  if (first.uuid !== second.uuid) return false;
  return (
    first.events > second.events + 1 ||
    (first.events > second.events && first.missing > second.missing)
  );
}

/**
 * Physical volumes and members of btrfs, and members of arrays. Of a physical volume the metadata is read, so that what cannot be read is
 * known now.
 */
async function partsIn(image: Image, name: string): Promise<Pick<Looked, 'areas' | 'members'>> {
  const areas = await areasOn(image, name);
  const containers = areas.filter((a) => a.holds === 'container');
  if (containers.length > 0) await findLogicalVolumes(image, containers);
  return {
    areas: areas
      .filter((a) => a.holds === 'container' || (a.type === 'btrfs' && a.devices > 1))
      .map((a) => ({ ...a, name: `${name}:${a.name}` })),
    members: areas.flatMap((a) => a.members ?? []),
  };
}

async function composed(
  source: PointSource,
  image: Image,
  own: readonly FoundArea[],
  looked: readonly Looked[],
  why: string,
  isMissing: boolean,
): Promise<Omit<PointLayout, 'isSpread'>> {
  const { name } = source;
  const images = [image, ...looked.map((l) => l.image)];
  const offsets = placeImages(images.map((i) => i.sizeBytes));
  const all = composeImages(images.map(kept));
  const theirs = looked.flatMap(({ areas }, i) =>
    areas.map((a) => ({ ...a, offsetBytes: a.offsetBytes + (offsets[i + 1] ?? 0) })),
  );
  // Of one array (MD) with members in several volumes one is enough.
  const both = newestOnly([...own, ...theirs]).filter((a) => a.holds === 'container');
  const names = new Set(own.map((a) => a.name));
  const { containers, doubts } = await ofOwnGroups(
    all,
    both.filter((a) => names.has(a.name)),
    both.filter((a) => !names.has(a.name)),
  );
  const found = await findAreas(all, name, [...own, ...containers]);
  const reason = [...doubts, why].join('; ');
  const others = theirs.filter((a) => a.holds === 'files');
  const areas = (await gatherBtrfs(all, found, others)).map((area) => because(area, reason));
  const parts = [...containers, ...areas.flatMap((a) => a.parts ?? [])].map((a) => a.name);
  const used = looked.filter((l) => l.areas.some((a) => parts.includes(a.name)));
  // What has no part in it need not be opened again.
  if (used.length < looked.length) return composed(source, image, own, used, reason, isMissing);
  return {
    areas,
    openImage: () => openComposed([source.openImage, ...looked.map((l) => l.companion.openImage)]),
    others: looked.map((l) => l.companion.volume),
    missing: isMissing ? areas.flatMap(lackingIn) : [],
    elsewhere: isMissing ? [] : areas.flatMap(lackingIn),
  };
}

/** What of an area is not shown because it is not all here, each with the reason. */
function lackingIn(area: FoundArea): readonly string[] {
  const { name, type, left = [], lacking, groups = [] } = area;
  if (lacking !== undefined) return [`the ${type} in ${name}: ${lacking}`];
  if (area.isStray === true) return [`${name}: the volume group that it is of is not known`];
  const isPartial = groups.some((g) => g.isPartial);
  return left.filter((l) => l.isElsewhere === true || isPartial).map(({ reason }) => reason);
}

/** Says why something is not all here. */
function because(area: FoundArea, why: string): FoundArea {
  const { left } = area;
  if (left !== undefined) {
    const told = left.map((l) =>
      l.isElsewhere === true ? { ...l, reason: `${l.reason}: ${why}` } : l,
    );
    return { ...area, left: told };
  }
  return area.holds === 'files' && area.devices > 1 && area.parts === undefined
    ? { ...area, lacking: why }
    : area;
}

/**
 * Those of `theirs` that belong to groups of which one of `own` is a physical volume. One that has the UUID of one of ours is a copy of
 * it, and ours counts; of copies among theirs none does, because which one was meant cannot be told.
 */
async function ofOwnGroups(
  image: Image,
  own: readonly FoundArea[],
  theirs: readonly FoundArea[],
): Promise<{ readonly containers: readonly FoundArea[]; readonly doubts: readonly string[] }> {
  if (own.length === 0) return { containers: [], doubts: [] };
  const { groups, copies } = await findLogicalVolumes(image, [...own, ...theirs]);
  const names = new Set(own.map((a) => a.name));
  const wanted = new Set(
    groups.filter((g) => g.places.some((p) => names.has(p))).flatMap((g) => g.places),
  );
  const doubtful = copies.filter((c) => !names.has(c.of) && wanted.has(c.of));
  const out = new Set(doubtful.flatMap((c) => [c.place, c.of]));
  return {
    containers: theirs.filter((a) => wanted.has(a.name) && !out.has(a.name)),
    doubts: doubtful.map((c) => `${c.place} and ${c.of} are copies of one physical volume`),
  };
}

/**
 * The areas, with every btrfs over several devices that are all here, in `areas` or `others`, as one: the first of its devices in
 * `areas` stands for it, and the others in `areas` for nothing.
 */
async function gatherBtrfs(
  image: Image,
  areas: readonly FoundArea[],
  others: readonly FoundArea[],
): Promise<readonly FoundArea[]> {
  const isOne = (a: FoundArea): boolean =>
    a.holds === 'files' && a.type === 'btrfs' && a.devices > 1;
  if (!areas.some(isOne)) return areas;
  const byFsid = new Map<string, { readonly area: FoundArea; readonly device: bigint }[]>();
  for (const area of [...areas, ...others].filter(isOne)) {
    const { volume, offsetBytes } = area;
    const device =
      volume === undefined
        ? await readBtrfs(image, offsetBytes)
        : await readBtrfs(volumeImage(image, volume.volume), offsetBytes - volume.offsetBytes);
    if (device === undefined || device.devices !== area.devices) continue;
    byFsid.set(device.fsid, [...(byFsid.get(device.fsid) ?? []), { area, device: device.device }]);
  }
  const whole = new Map<FoundArea, FoundArea>();
  for (const parts of byFsid.values()) {
    const [first, ...rest] = parts.map((p) => p.area);
    // Two that say they are the same device: one is a copy of the other.
    const count = new Set(parts.map((p) => p.device)).size;
    if (first === undefined || count !== parts.length || count !== first.devices) continue;
    if (!areas.includes(first)) continue;
    whole.set(first, { ...first, parts: rest });
    for (const area of rest) whole.set(area, { ...area, holds: 'none' });
  }
  return areas.map((area) => whole.get(area) ?? area);
}
