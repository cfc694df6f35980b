/** Volumes of a repository: their meta objects, and finding one by what a person calls it. */
import { B2Error, isKind } from '../errors.js';
import { snapshotName, volumeMetaName } from '../format/names.js';
import { ObjectKind } from '../format/object.js';
import { className, type PointClass, type PointClassName } from '../format/commit.js';
import { isRelativeTime } from '../when.js';
import type { Repository } from './repository.js';

/** The recorded facts of a volume (FORMAT.md section 4, kind 1). */
export interface VolumeMeta {
  readonly id: string;
  readonly name: string;
  readonly host: string;
  readonly createdNs: bigint;
  /** Path of the device when it was captured last. */
  readonly device: string;
  readonly sizeBytes: number;
  readonly logicalBlockBytes: number;
  readonly facts: Readonly<Record<string, unknown>>;
  readonly updatedNs: bigint;
}

const META = /^volumes\/([0-9a-f]{32})\/meta$/;

function textOf(o: Record<string, unknown>, key: string, name: string): string {
  const v = o[key];
  if (typeof v !== 'string') throw new B2Error('damaged', `${name}: "${key}" is not a text`);
  return v;
}

function bigintOf(o: Record<string, unknown>, key: string, name: string): bigint {
  const v = textOf(o, key, name);
  if (!/^\d{1,20}$/.test(v)) throw new B2Error('damaged', `${name}: "${key}" is not a number`);
  return BigInt(v);
}

function numberOf(o: Record<string, unknown>, key: string, name: string): number {
  const v = o[key];
  const n = typeof v === 'string' && /^\d{1,16}$/.test(v) ? Number(v) : v;
  if (typeof n !== 'number' || !Number.isSafeInteger(n) || n < 0) {
    throw new B2Error('damaged', `${name}: "${key}" is not a number`);
  }
  return n;
}

function recordOf(v: unknown): Record<string, unknown> {
  return typeof v === 'object' && v !== null && !Array.isArray(v)
    ? (v as Record<string, unknown>)
    : {};
}

export async function readVolumeMeta(repo: Repository, id: string): Promise<VolumeMeta> {
  const name = volumeMetaName(id);
  const o = await repo.getObject(ObjectKind.volumeMeta, name);
  if (textOf(o, 'id', name) !== id)
    throw new B2Error('damaged', `${name} belongs to another volume`);
  return {
    id,
    name: textOf(o, 'name', name),
    host: textOf(o, 'host', name),
    createdNs: bigintOf(o, 'created', name),
    device: textOf(o, 'device', name),
    sizeBytes: numberOf(o, 'sizeBytes', name),
    logicalBlockBytes: numberOf(o, 'logicalBlockBytes', name),
    facts: recordOf(o['facts']),
    updatedNs: bigintOf(o, 'updated', name),
  };
}

export async function writeVolumeMeta(repo: Repository, meta: VolumeMeta): Promise<void> {
  await repo.putObject(ObjectKind.volumeMeta, volumeMetaName(meta.id), {
    id: meta.id,
    name: meta.name,
    host: meta.host,
    created: meta.createdNs,
    device: meta.device,
    sizeBytes: String(meta.sizeBytes),
    logicalBlockBytes: meta.logicalBlockBytes,
    facts: meta.facts,
    updated: meta.updatedNs,
  });
}

/** Ids of all volumes, also of those whose meta object is lost (their commits name them). */
export async function listVolumeIds(repo: Repository): Promise<{ id: string; hasMeta: boolean }[]> {
  const found = new Map<string, boolean>();
  for await (const { name } of repo.store.list('volumes')) {
    const id = name.split('/')[1] ?? '';
    if (!/^[0-9a-f]{32}$/.test(id)) continue;
    found.set(id, (found.get(id) ?? false) || META.test(name));
  }
  return [...found]
    .map(([id, hasMeta]) => ({ id, hasMeta }))
    .sort((a, b) => (a.id < b.id ? -1 : 1));
}

/**
 * Every volume, by name. A volume whose meta object is missing or damaged is listed as `lost-ID`, so that its points can still
 * be reached; `warn` hears why.
 */
export async function listVolumes(
  repo: Repository,
  warn: (text: string) => void,
): Promise<VolumeMeta[]> {
  const metas: VolumeMeta[] = [];
  for (const { id } of await listVolumeIds(repo)) {
    try {
      metas.push(await readVolumeMeta(repo, id));
    } catch (error) {
      if (!isKind(error, 'not-found', 'damaged')) throw error;
      warn(
        `volume ${id}: its meta object cannot be used (${error.message}); "b2 repair" makes a new one`,
      );
      metas.push({
        id,
        name: `lost-${id}`,
        host: '',
        createdNs: 0n,
        device: '',
        sizeBytes: 0,
        logicalBlockBytes: 512,
        facts: {},
        updatedNs: 0n,
      });
    }
  }
  return metas.sort((a, b) => (a.name < b.name ? -1 : a.name > b.name ? 1 : a.id < b.id ? -1 : 1));
}

/**
 * The volume that `text` means: its exact name, its id or a prefix of the id of at least 6 digits, or the last part of the name
 * (`sda` for `host/sda`) or its device path where only one has it. Kind `not-found`, or `usage` where several fit.
 */
export function findVolume(volumes: readonly VolumeMeta[], text: string): VolumeMeta {
  const tests: ((v: VolumeMeta) => boolean)[] = [
    (v) => v.name === text,
    (v) => v.id === text,
    (v) => /^[0-9a-f]{6,}$/.test(text) && v.id.startsWith(text),
    (v) => v.device === text,
    (v) => v.name.endsWith(`/${text}`),
  ];
  for (const test of tests) {
    const found = volumes.filter(test);
    if (found.length === 1 && found[0] !== undefined) return found[0];
    if (found.length > 1) {
      throw new B2Error(
        'usage',
        `"${text}" can mean ${found.length} volumes: ${found.map((v) => `${v.name} (${v.id.slice(0, 8)})`).join(', ')}`,
        { hint: 'Use the full name, or the id.' },
      );
    }
  }
  throw new B2Error('not-found', `there is no volume "${text}" in this repository`, {
    hint: volumes.length === 0 ? 'It holds no volume yet.' : '"b2 volumes" lists them.',
  });
}

/** A named, pinned point (FORMAT.md section 4, kind 2). */
export interface Snapshot {
  readonly name: string;
  readonly volumeId: string;
  readonly seq: number;
  readonly hash: string;
  readonly instantNs: bigint;
  readonly pointClass: PointClassName;
  readonly tags: readonly string[];
  readonly createdNs: bigint;
}

/**
 * What a snapshot's name may be: 1 to 200 printable characters, no slash, not starting with `#`, no surrounding space, and no time that
 * is counted from now. Kind `usage` otherwise.
 */
export function checkSnapshotName(name: string): void {
  if (!/^[^\p{C}/#\s][^\p{C}/]{0,199}$/u.test(name) || name.trim() !== name) {
    throw new B2Error('usage', `"${name}" cannot be the name of a snapshot`, {
      hint: 'Use 1 to 200 printable characters without "/", not starting with "#".',
    });
  }
  if (isRelativeTime(name)) {
    throw new B2Error('usage', `"${name}" cannot be the name of a snapshot: it means a time`, {
      hint: `--at "${name}" would always be that time, never the snapshot. A date may be a name.`,
    });
  }
}

/** Pins commit `seq` of a volume under a name. Kind `exists` if the volume has a snapshot of that name. */
export async function addSnapshot(
  repo: Repository,
  s: Omit<Snapshot, 'pointClass'> & { readonly pointClass: PointClass },
): Promise<void> {
  checkSnapshotName(s.name);
  try {
    await repo.putObject(
      ObjectKind.snapshot,
      snapshotName(s.volumeId, repo.keys.nameHash(s.name)),
      {
        name: s.name,
        volume: s.volumeId,
        seq: String(s.seq),
        hash: s.hash,
        instant: s.instantNs,
        class: className(s.pointClass),
        tags: s.tags,
        created: s.createdNs,
      },
      { ifAbsent: true },
    );
  } catch (error) {
    if (!isKind(error, 'exists')) throw error;
    throw new B2Error('exists', `the volume has a snapshot named "${s.name}" already`, {
      cause: error,
      hint: 'Choose another name; "b2 snapshots" lists them.',
    });
  }
}

const CLASSES: readonly PointClassName[] = ['none', 'fuzzy', 'crash', 'fs', 'app'];

async function readSnapshot(repo: Repository, object: string): Promise<Snapshot> {
  const o = await repo.getObject(ObjectKind.snapshot, object);
  const cls = CLASSES.find((c) => c === o['class']);
  if (cls === undefined) throw new B2Error('damaged', `${object}: unknown class`);
  const tags = o['tags'];
  return {
    name: textOf(o, 'name', object),
    volumeId: textOf(o, 'volume', object),
    seq: numberOf(o, 'seq', object),
    hash: textOf(o, 'hash', object),
    instantNs: bigintOf(o, 'instant', object),
    pointClass: cls,
    tags: Array.isArray(tags) ? tags.filter((t): t is string => typeof t === 'string') : [],
    createdNs: bigintOf(o, 'created', object),
  };
}

/** The snapshot of exactly that name, found without reading the others; undefined if there is none. Kind `damaged` if it cannot be read. */
export async function findSnapshot(
  repo: Repository,
  volumeId: string,
  name: string,
): Promise<Snapshot | undefined> {
  try {
    return await readSnapshot(repo, snapshotName(volumeId, repo.keys.nameHash(name)));
  } catch (error) {
    if (isKind(error, 'not-found')) return undefined;
    throw error;
  }
}

/** Snapshots of one volume, oldest first; damaged ones are told to `warn` and left out. */
export async function listSnapshots(
  repo: Repository,
  volumeId: string,
  warn: (text: string) => void,
): Promise<Snapshot[]> {
  const list: Snapshot[] = [];
  for await (const { name } of repo.store.list(`volumes/${volumeId}/snapshots`)) {
    try {
      list.push(await readSnapshot(repo, name));
    } catch (error) {
      if (!isKind(error, 'not-found', 'damaged')) throw error;
      warn(`a snapshot of volume ${volumeId} cannot be read: ${error.message}`);
    }
  }
  return list.sort((a, b) => a.seq - b.seq || (a.name < b.name ? -1 : 1));
}
