/**
 * The logical volumes of LVM2 whose bytes lie in the image one after the other or striped, told from the metadata alone: no device
 * mapper, no LVM and nothing of this machine takes part, so a volume group of the same name or UUID that is active here is not
 * touched. What LVM keeps in structures of its own (thin volumes, snapshots, RAID, mirrors, caches, …) is named with the reason;
 * LVM itself, in the tiny virtual machine, puts that together.
 *
 * The layout on the disk is that of LVM2's lib/format_text (layout.h, format-text.c, import_vsn1.c): a label in one of the first
 * four sectors, a header with the places of metadata areas, in each of which the text of the volume group lies in a ring.
 */
import { crc32 } from 'node:zlib';

import { B2Error } from '../errors.js';
import type { Image } from '../image.js';

/** Where an LVM physical volume lies in the image. */
export interface PhysicalVolumePlace {
  readonly name: string;
  readonly offsetBytes: number;
  readonly sizeBytes: number;
}

/** A part of a logical volume. */
export interface VolumeSegment {
  /** Byte of the logical volume. */
  readonly offset: number;
  readonly length: number;
  /** Bytes on one stripe before the next one's turn; equal to `length` with one stripe. */
  readonly stripeBytes: number;
  /** Byte of the image where each stripe begins. */
  readonly stripes: readonly number[];
}

export interface LogicalVolume {
  /** `VG/LV`: both are names that LVM allows, harmless in a shell and as a path. */
  readonly name: string;
  readonly sizeBytes: number;
  /** Ascending, without gaps. */
  readonly segments: readonly VolumeSegment[];
}

/** Something that only LVM itself can read. */
export interface LeftVolume {
  /** The name of a physical volume that it lies in, or that says so. */
  readonly place: string;
  /** In words. */
  readonly reason: string;
  /** `VG/LV` as {@link LogicalVolume.name}; absent where it is no single volume. */
  readonly volume?: string;
  /** A part of it lies on a physical volume that is not in this image: LVM cannot read it either. */
  readonly isElsewhere?: true;
}

/** A volume group: its UUID, and what its volumes' names begin with here, which is not its name where that names something else, too. */
export interface VolumeGroupName {
  readonly id: string;
  readonly shown: string;
  /** The physical volume whose metadata counts. */
  readonly place: string;
  /** Names of its physical volumes in the image. */
  readonly places: readonly string[];
  /** True where volumes of it, as they are or inside, lie on physical volumes that are not in the image. */
  readonly isPartial: boolean;
}

export interface FoundVolumes {
  readonly volumes: readonly LogicalVolume[];
  readonly left: readonly LeftVolume[];
  readonly groups: readonly VolumeGroupName[];
  /** Names of physical volumes that no group in the image knows. */
  readonly strays: readonly string[];
  /** Physical volumes with the UUID of another one before them, which counts. */
  readonly copies: readonly { readonly place: string; readonly of: string }[];
}

const SECTOR = 512;
const LABEL_SECTORS = 4;
const LABEL_BYTES = LABEL_SECTORS * SECTOR;
const AREA_MAGIC = ' LVM2 x[5A%r0N*>';
const AREA_HEADER_BYTES = 512;
/** Initial value of LVM's checksums, which are CRC-32 without the inversions. */
const CRC_START = 0xf597a6cf;
/** LVM's default is 1 MiB, and it warns from a fraction of that. */
const MAX_TEXT_BYTES = 32 * 1024 * 1024;
const MAX_DEPTH = 16;
const MAX_SEGMENTS = 65_536;
/** Of a group; nobody has a hundredth of it. */
const MAX_LOGICAL_VOLUMES = 65_536;
/** LV and VG names: lvm(8), VALID NAMES. */
const NAME = /^(?!-)(?!\.{1,2}$)[A-Za-z0-9+_.-]{1,127}$/;

/** The checksum of LVM's headers and texts. */
export function lvmChecksum(bytes: Uint8Array): number {
  return ~crc32(bytes, ~CRC_START >>> 0) >>> 0;
}

/** A value of a text: a section is a Map. */
type Value = string | number | readonly (string | number)[] | Section;
type Section = ReadonlyMap<string, Value>;

class BadMetadata extends Error {}
/** A volume that lies on something that is not here. */
class Elsewhere extends BadMetadata {}

/** Parses LVM's configuration text. Throws where it is none. */
export function parseLvmText(text: string): Section {
  interface Token {
    readonly kind: 'mark' | 'string' | 'word' | 'end';
    readonly text: string;
  }
  // Each matches in one step however much that is: a choice within a repetition takes memory for every turn of it.
  const between = /\s+|#[^\n]*/y;
  const word = /[A-Za-z0-9+_./@-]+/y;
  const plain = /[^"\\]*/y;
  let at = 0;
  const skip = (pattern: RegExp): boolean => {
    pattern.lastIndex = at;
    if (!pattern.test(text)) return false;
    at = pattern.lastIndex;
    return true;
  };
  const quoted = (): Token => {
    const begin = ++at;
    while (skip(plain) && text[at] === '\\') at += 2;
    if (text[at] !== '"') throw new BadMetadata('it is no LVM text');
    return { kind: 'string', text: text.slice(begin, at++).replace(/\\(.)/gsu, '$1') };
  };
  const next = (): Token => {
    while (skip(between)) continue;
    const begin = at;
    const first = text[at];
    if (first === undefined) return { kind: 'end', text: '' };
    if (first === '"') return quoted();
    if ('{}=[],'.includes(first)) return { kind: 'mark', text: text.slice(at, ++at) };
    if (!skip(word)) throw new BadMetadata('it is no LVM text');
    return { kind: 'word', text: text.slice(begin, at) };
  };
  const scalar = (t: Token): string | number => {
    if (t.kind === 'string') return t.text;
    if (t.kind !== 'word') throw new BadMetadata(`"${t.text}" where a value should be`);
    const number = Number(t.text);
    return Number.isFinite(number) ? number : t.text;
  };
  const list = (): readonly (string | number)[] => {
    const all: (string | number)[] = [];
    for (let t = next(); ; t = next()) {
      if (t.kind === 'mark' && t.text === ']') return all;
      if (t.kind === 'mark' && t.text === ',') continue;
      all.push(scalar(t));
    }
  };
  const section = (depth: number): Section => {
    if (depth > MAX_DEPTH) throw new BadMetadata('sections lie too deep in each other');
    const found = new Map<string, Value>();
    for (;;) {
      const key = next();
      const isEnd = depth === 0 ? key.kind === 'end' : key.kind === 'mark' && key.text === '}';
      if (isEnd) return found;
      if (key.kind !== 'word' && key.kind !== 'string')
        throw new BadMetadata(`"${key.text}" where a name should be`);
      const mark = next();
      if (mark.kind !== 'mark') throw new BadMetadata(`nothing behind "${key.text}"`);
      if (mark.text === '{') found.set(key.text, section(depth + 1));
      else if (mark.text === '=') {
        const value = next();
        found.set(key.text, value.kind === 'mark' && value.text === '[' ? list() : scalar(value));
      } else throw new BadMetadata(`"${mark.text}" behind "${key.text}"`);
    }
  };
  return section(0);
}

function sectionOf(from: Section, key: string): Section {
  const value = from.get(key);
  if (!(value instanceof Map)) throw new BadMetadata(`there is no section ${key}`);
  return value as Section;
}

function numberOf(from: Section, key: string, least: number): number {
  const value = from.get(key);
  if (typeof value !== 'number' || !Number.isSafeInteger(value) || value < least)
    throw new BadMetadata(`${key} is no number that makes sense`);
  return value;
}

function textOf(from: Section, key: string): string {
  const value = from.get(key);
  if (typeof value !== 'string') throw new BadMetadata(`${key} is no text`);
  return value;
}

function listOf(from: Section, key: string): readonly (string | number)[] {
  const value = from.get(key);
  return Array.isArray(value) ? (value as readonly (string | number)[]) : [];
}

function sectionsIn(from: Section): readonly (readonly [string, Section])[] {
  return [...from].flatMap(([key, value]) =>
    value instanceof Map ? [[key, value as Section] as const] : [],
  );
}

/** What one physical volume says. */
interface PhysicalVolume {
  readonly place: PhysicalVolumePlace;
  /** Without the dashes. */
  readonly uuid: string;
  /** The text of its volume group; undefined where it keeps none. */
  readonly text: string | undefined;
}

async function readPhysicalVolume(
  image: Image,
  place: PhysicalVolumePlace,
): Promise<PhysicalVolume> {
  const read = async (offset: number, length: number): Promise<Buffer> => {
    if (offset < 0 || length < 0 || offset + length > place.sizeBytes)
      throw new BadMetadata('its metadata lies outside of it');
    const into = Buffer.alloc(length);
    await image.read(into, place.offsetBytes + offset);
    return into;
  };
  const head = await read(0, Math.min(LABEL_BYTES, place.sizeBytes));
  let label: Buffer | undefined;
  for (let at = 0; at + SECTOR <= head.length && label === undefined; at += SECTOR) {
    const sector = head.subarray(at, at + SECTOR);
    const isLabel =
      sector.toString('latin1', 0, 8) === 'LABELONE' &&
      sector.toString('latin1', 24, 32) === 'LVM2 001' &&
      sector.readUInt32LE(16) === lvmChecksum(sector.subarray(20));
    if (isLabel) label = sector;
  }
  if (label === undefined) throw new BadMetadata('its label is damaged');
  const header = label.readUInt32LE(20);
  if (header + 40 > SECTOR) throw new BadMetadata('its label is damaged');
  const uuid = label.toString('latin1', header, header + 32);
  let at = header + 40;
  const places = (): { readonly offset: number; readonly size: number }[] => {
    const all: { offset: number; size: number }[] = [];
    for (; at + 16 <= SECTOR; at += 16) {
      const [offset, size] = [label.readBigUInt64LE(at), label.readBigUInt64LE(at + 8)];
      if (offset === 0n) break;
      all.push({ offset: Number(offset), size: Number(size) });
    }
    at += 16;
    return all;
  };
  places(); // of data: the text says where that begins
  let why = '';
  let sawText = false;
  for (const area of places()) {
    const h = await read(area.offset, AREA_HEADER_BYTES);
    const isHeader =
      h.toString('latin1', 4, 20) === AREA_MAGIC &&
      h.readUInt32LE(0) === lvmChecksum(h.subarray(4));
    if (!isHeader) {
      why = 'the header of its metadata is damaged';
      continue;
    }
    // The first of the places of texts is the one that counts; an area may be set aside (flag 1) or empty.
    const offset = Number(h.readBigUInt64LE(40));
    const length = Number(h.readBigUInt64LE(48));
    const isIgnored = (h.readUInt32LE(60) & 1) !== 0;
    if (offset === 0 || length === 0 || isIgnored) continue;
    sawText = true;
    if (length > MAX_TEXT_BYTES || length > area.size - AREA_HEADER_BYTES || offset > area.size) {
      why = 'its metadata is too long';
      continue;
    }
    const first = Math.min(length, area.size - offset);
    const text = Buffer.concat([
      await read(area.offset + offset, first),
      await read(area.offset + AREA_HEADER_BYTES, length - first),
    ]);
    if (lvmChecksum(text) === h.readUInt32LE(56)) {
      let end = text.length;
      while (end > 0 && text[end - 1] === 0) end--;
      return { place, uuid, text: text.toString('utf8', 0, end) };
    }
    why = 'its metadata is damaged';
  }
  if (why !== '' || sawText) throw new BadMetadata(why);
  return { place, uuid, text: undefined };
}

interface Group {
  readonly name: string;
  readonly seqno: number;
  readonly section: Section;
  /** The place that it was read from. */
  readonly place: string;
}

function groupOf(text: string, place: string): { readonly id: string; readonly group: Group } {
  const [found, more] = sectionsIn(parseLvmText(text));
  if (found === undefined || more !== undefined)
    throw new BadMetadata('it holds no volume group, or several');
  const [name, section] = found;
  if (!NAME.test(name)) throw new BadMetadata('the name of its volume group is none');
  const seqno = numberOf(section, 'seqno', 0);
  return { id: textOf(section, 'id'), group: { name, seqno, section, place } };
}

/** LV names whose bytes mean something only to LVM, with the reason. */
function specialVolumes(volumes: readonly (readonly [string, Section])[]): Map<string, string> {
  const special = new Map<string, string>();
  for (const [, lv] of volumes) {
    for (const [, segment] of sectionsIn(lv)) {
      if (segment.get('type') !== 'snapshot') continue;
      const store = segment.get('cow_store');
      if (typeof store === 'string') special.set(store, 'it is a snapshot');
      const merging = segment.get('merging_store');
      const origin = segment.get('origin');
      if (typeof merging === 'string') special.set(merging, 'it is a snapshot');
      if (typeof merging === 'string' && typeof origin === 'string')
        special.set(origin, 'a snapshot is being merged into it');
    }
  }
  return special;
}

/** Start and end in the image of the data of a physical volume. */
interface DataArea {
  readonly start: number;
  readonly end: number;
}

function segmentsOf(
  lv: Section,
  extentBytes: number,
  data: ReadonlyMap<string, DataArea | undefined>,
): readonly VolumeSegment[] {
  const count = numberOf(lv, 'segment_count', 1);
  if (count > MAX_SEGMENTS) throw new BadMetadata('it has too many segments');
  const segments: VolumeSegment[] = [];
  let offset = 0;
  for (let n = 1; n <= count; n++) {
    const segment = sectionOf(lv, `segment${n}`);
    const type = textOf(segment, 'type').split('+')[0] ?? '';
    if (type !== 'striped' && type !== 'linear') throw new BadMetadata(`it is of type ${type}`);
    const length = numberOf(segment, 'extent_count', 1) * extentBytes;
    if (numberOf(segment, 'start_extent', 0) * extentBytes !== offset)
      throw new BadMetadata('its segments do not follow each other');
    const stripeCount = numberOf(segment, 'stripe_count', 1);
    const stripeBytes = stripeCount === 1 ? length : numberOf(segment, 'stripe_size', 1) * SECTOR;
    const each = length / stripeCount;
    const list = listOf(segment, 'stripes');
    if (list.length !== 2 * stripeCount || each % stripeBytes !== 0 || !Number.isSafeInteger(each))
      throw new BadMetadata('its stripes make no sense');
    const stripes: number[] = [];
    for (let i = 0; i < list.length; i += 2) {
      const [volume, extent] = [list[i], list[i + 1]];
      if (typeof volume !== 'string' || typeof extent !== 'number' || !data.has(volume))
        throw new BadMetadata('it is being moved, or lies on another logical volume');
      const area = data.get(volume);
      if (area === undefined)
        throw new Elsewhere('a part of it lies on a physical volume that is not in this image');
      const at = area.start + extent * extentBytes;
      if (!Number.isSafeInteger(at) || extent < 0 || at + each > area.end)
        throw new BadMetadata('it lies outside of its physical volume');
      stripes.push(at);
    }
    segments.push({ offset, length, stripeBytes, stripes });
    offset += length;
  }
  if (!Number.isSafeInteger(offset)) throw new BadMetadata('it is too large');
  return segments;
}

/** What the metadata says of the LVs, or names why one is not among them. */
function volumesOf(
  { name: group, section, place }: Group,
  shown: string,
  byUuid: ReadonlyMap<string, PhysicalVolumePlace>,
): Pick<FoundVolumes, 'volumes' | 'left'> & Pick<VolumeGroupName, 'places' | 'isPartial'> {
  const extentBytes = numberOf(section, 'extent_size', 1) * SECTOR;
  const data = new Map<string, DataArea | undefined>();
  const places: string[] = [];
  for (const [name, pv] of sectionsIn(sectionOf(section, 'physical_volumes'))) {
    const found = byUuid.get(textOf(pv, 'id').replaceAll('-', ''));
    const start = (found?.offsetBytes ?? 0) + numberOf(pv, 'pe_start', 0) * SECTOR;
    const end = (found?.offsetBytes ?? 0) + (found?.sizeBytes ?? 0);
    data.set(name, found === undefined ? undefined : { start, end });
    if (found !== undefined) places.push(found.name);
  }
  const listed = section.get('logical_volumes');
  const all = listed instanceof Map ? sectionsIn(listed as Section) : [];
  if (all.length > MAX_LOGICAL_VOLUMES) throw new BadMetadata(`${group} has too many volumes`);
  const special = specialVolumes(all);
  const volumes: LogicalVolume[] = [];
  const left: LeftVolume[] = [];
  for (const [name, lv] of all) {
    const status = listOf(lv, 'status');
    const types = sectionsIn(lv).map(([, segment]) => segment.get('type'));
    // A pool holds nothing by itself; what joins an origin with its snapshot is counted as a volume, too, and stands for that.
    if (!status.includes('VISIBLE') && !special.has(name)) continue;
    if (types.some((t) => INTERNAL.has(t))) continue;
    try {
      if (!NAME.test(name)) throw new BadMetadata('its name is none');
      const why = special.get(name);
      if (why !== undefined) throw new BadMetadata(why);
      const odd = status.find((s) => s === 'MERGING' || s === 'PVMOVE' || s === 'CONVERTING');
      if (odd !== undefined) throw new BadMetadata('LVM is at work on it');
      const segments = segmentsOf(lv, extentBytes, data);
      const sizeBytes = segments.reduce((sum, s) => sum + s.length, 0);
      volumes.push({ name: `${shown}/${name}`, sizeBytes, segments });
    } catch (error) {
      if (!(error instanceof BadMetadata)) throw error;
      const isName = NAME.test(name);
      left.push({
        place,
        reason: `${group}/${isName ? name : '?'}: ${error.message}`,
        ...(isName ? { volume: `${shown}/${name}` } : {}),
        ...(error instanceof Elsewhere ? { isElsewhere: true as const } : {}),
      });
    }
  }
  // Also of what lies inside of others: the data of a pool, the sides of a mirror.
  const isPartial = all.some(([, lv]) =>
    sectionsIn(lv).some(([, segment]) =>
      [...segment.values()].some(
        (value) =>
          Array.isArray(value) &&
          value.some((v) => typeof v === 'string' && data.has(v) && data.get(v) === undefined),
      ),
    ),
  );
  return { volumes, left, places, isPartial };
}

const INTERNAL: ReadonlySet<unknown> = new Set(['snapshot', 'thin-pool', 'cache-pool', 'vdo-pool']);

/** Names of file systems and of files beside them that a volume group's name could be taken for. */
const TAKEN = /^((p[1-9]\d*)+|disk)(\.img)?$/;

/**
 * Reads the metadata of every physical volume of an image. What cannot be made sense of is in `left`; what of the image cannot be
 * read rejects, as {@link Image.read} does.
 */
export async function findLogicalVolumes(
  image: Image,
  places: readonly PhysicalVolumePlace[],
): Promise<FoundVolumes> {
  const byUuid = new Map<string, PhysicalVolumePlace>();
  const groups = new Map<string, Group>();
  const left: LeftVolume[] = [];
  const copies: { readonly place: string; readonly of: string }[] = [];
  const sense = <T>(place: PhysicalVolumePlace, error: unknown, fallback: T): T => {
    if (!(error instanceof BadMetadata)) throw error;
    left.push({ place: place.name, reason: error.message });
    return fallback;
  };
  for (const place of places) {
    const pv = await readPhysicalVolume(image, place).catch((e: unknown) =>
      sense(place, e, undefined),
    );
    if (pv === undefined) continue;
    const same = byUuid.get(pv.uuid);
    if (same !== undefined) {
      copies.push({ place: place.name, of: same.name });
      left.push({ place: place.name, reason: 'it is a copy of another one in this image' });
      continue;
    }
    byUuid.set(pv.uuid, place);
    if (pv.text === undefined) continue;
    try {
      const { id, group } = groupOf(pv.text, place.name);
      const known = groups.get(id);
      // One that was away while the others were changed has old metadata.
      if (known === undefined || known.seqno < group.seqno) groups.set(id, group);
    } catch (error) {
      sense(place, error, undefined);
    }
  }
  const volumes: LogicalVolume[] = [];
  const names: VolumeGroupName[] = [];
  for (const [id, group] of groups) {
    const isAmbiguous =
      TAKEN.test(group.name) ||
      [...groups.values()].some((g) => g !== group && g.name === group.name);
    const unique = isAmbiguous ? `${group.name}-${id.slice(0, 6)}` : group.name;
    const shown = NAME.test(unique) ? unique : group.name;
    const place = places.find((p) => p.name === group.place);
    if (place === undefined) continue;
    let found: ReturnType<typeof volumesOf> | undefined;
    try {
      found = volumesOf(group, shown, byUuid);
      // One by one: a call takes no more than some ten thousands at a time.
      for (const volume of found.volumes) volumes.push(volume);
      for (const one of found.left) left.push(one);
    } catch (error) {
      sense(place, error, undefined);
    }
    const { places: own = [place.name], isPartial = false } = found ?? {};
    names.push({ id, shown, place: place.name, places: own, isPartial });
  }
  const known = new Set(names.flatMap((g) => g.places));
  const strays = [...byUuid.values()].map((p) => p.name).filter((name) => !known.has(name));
  return { volumes, left, groups: names, strays, copies };
}

/** A piece of a logical volume that lies in the image in one. */
export interface VolumePiece {
  readonly imageOffset: number;
  readonly length: number;
}

/** Where [offset, offset + length) of a logical volume lies, piece by piece, ascending. RangeError where it is not within it. */
export function* volumePieces(
  { name, sizeBytes, segments }: LogicalVolume,
  offset: number,
  length: number,
): Generator<VolumePiece> {
  if (offset < 0 || length < 0 || offset > sizeBytes - length)
    throw new RangeError(`bytes ${offset}+${length} are not within ${name} of ${sizeBytes}`);
  let lo = 0;
  let hi = segments.length - 1;
  while (lo < hi) {
    const mid = (lo + hi + 1) >>> 1;
    if ((segments[mid]?.offset ?? Infinity) <= offset) lo = mid;
    else hi = mid - 1;
  }
  let at = offset;
  const end = offset + length;
  for (let n = lo; at < end; n++) {
    const segment = segments[n];
    if (segment === undefined) throw new B2Error('failed', `${name} ends before its size`);
    const { stripeBytes, stripes } = segment;
    while (at < end && at < segment.offset + segment.length) {
      const inside = at - segment.offset;
      const turn = Math.floor(inside / stripeBytes);
      const within = inside % stripeBytes;
      const stripe = stripes[turn % stripes.length];
      if (stripe === undefined) throw new B2Error('failed', `${name} has no stripes`);
      const piece = Math.min(end - at, stripeBytes - within);
      const imageOffset = stripe + Math.floor(turn / stripes.length) * stripeBytes + within;
      yield { imageOffset, length: piece };
      at += piece;
    }
  }
}
