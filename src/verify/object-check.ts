/** Every object that is no pack and no segment: is its name one of ours, does its seal open, does it say what its name says? */
import { B2Error, isKind, messageOf } from '../errors.js';
import { canonicalConfig, decodeConfig } from '../format/config.js';
import {
  CONFIG_COPY_NAME,
  CONFIG_NAME,
  packIdOf,
  parseLostName,
  parseSegmentName,
  snapshotName,
} from '../format/names.js';
import { ObjectKind } from '../format/object.js';
import { readCondemned } from '../repo/condemned.js';
import { readLost } from '../repo/lost.js';
import { readQuarantine, type Quarantine } from '../repo/quarantine.js';
import type { Repository } from '../repo/repository.js';
import { readVolumeMeta, type VolumeMeta } from '../repo/volume.js';
import { problemOf, type Finding } from './findings.js';

/** What a snapshot object says, for the check against its volume's history. */
export interface SnapshotFacts {
  readonly object: string;
  readonly name: string;
  readonly volumeId: string;
  readonly seq: number;
  readonly hash: string;
}

/** What the objects of a repository say. */
export interface ObjectsFound {
  readonly findings: Finding[];
  readonly packs: { readonly packId: string; readonly sizeBytes: number }[];
  readonly metas: Map<string, VolumeMeta>;
  /** All volumes that any object names. */
  readonly volumeIds: Set<string>;
  /** Highest claim of each volume. */
  readonly epochs: Map<string, number>;
  readonly snapshots: SnapshotFacts[];
  readonly quarantine: Quarantine[];
  /** Objects read, packs and segments left out. */
  objects: number;
}

/** Checks the objects of the repository, or (with `only`) what concerns these volumes. */
export async function checkObjects(
  repo: Repository,
  only: ReadonlySet<string> | undefined,
  signal?: AbortSignal,
): Promise<ObjectsFound> {
  const found: ObjectsFound = {
    findings: [],
    packs: [],
    metas: new Map(),
    volumeIds: new Set(),
    epochs: new Map(),
    snapshots: [],
    quarantine: [],
    objects: 0,
  };
  let configs = await lookAtConfigs(repo);
  found.objects += 2;
  const names: string[] = [];
  for await (const { name, sizeBytes } of repo.store.list('')) {
    const packId = packIdOf(name);
    if (packId !== undefined) found.packs.push({ packId, sizeBytes });
    else names.push(name);
  }
  for (const name of names.sort()) {
    signal?.throwIfAborted();
    await checkObject(repo, name, only, found);
  }
  // A key change writes the copy first: who looks between the two sees them differ, and nothing is wrong.
  for (let looks = 0; configs.differ && looks < CONFIG_LOOKS; looks++)
    configs = await lookAtConfigs(repo);
  found.findings.push(...configs.findings);
  for (const id of found.volumeIds) {
    if (found.metas.has(id) || (only !== undefined && !only.has(id))) continue;
    if (found.findings.some((f) => f.object === `volumes/${id}/meta`)) continue;
    found.findings.push({
      severity: 'damage',
      kind: 'object',
      object: `volumes/${id}/meta`,
      message: 'it is missing: the name of the volume is lost',
      hint: 'Run "b2 repair": it makes a new one from what the commits say.',
    });
  }
  return found;
}

/** Once more, after everything else was read, and again: the second of two writes may be under way. */
const CONFIG_LOOKS = 3;

/** What one look at "config" and its copy finds. */
interface ConfigsLook {
  readonly findings: readonly Finding[];
  /** Each is right by itself, and they are not the same. */
  readonly differ: boolean;
}

async function lookAtConfigs(repo: Repository): Promise<ConfigsLook> {
  const findings: Finding[] = [];
  const bytes: (Buffer | undefined)[] = [];
  for (const name of [CONFIG_NAME, CONFIG_COPY_NAME]) {
    const tell = (severity: Finding['severity'], message: string): void => {
      findings.push({
        severity,
        kind: 'config',
        object: name,
        message,
        hint: 'Run "b2 repair": it writes both anew.',
      });
    };
    try {
      const b = await repo.store.get(name);
      const config = decodeConfig(b);
      if (config.id !== repo.id) tell('damage', `it belongs to repository ${config.id}`);
      else if (
        !repo.keys.configMac(canonicalConfig(config)).equals(Buffer.from(config.mac, 'base64'))
      ) {
        tell('damage', 'its authentication code is wrong: somebody or something changed it');
      } else bytes.push(b);
    } catch (error) {
      if (isKind(error, 'not-found')) tell('damage', 'it is missing');
      else if (isKind(error, 'damaged', 'unsupported'))
        tell('damage', problemOf(error.message, name));
      else if (isKind(error, 'io')) tell('unreadable', error.message);
      else throw error;
    }
  }
  const [config, copy] = bytes;
  const differ = config !== undefined && copy !== undefined && !config.equals(copy);
  if (differ) {
    findings.push({
      severity: 'damage',
      kind: 'config',
      object: CONFIG_COPY_NAME,
      message:
        'it is not the copy of "config": a key change was cut short, or an older version was put back',
      hint: 'Run "b2 repair" with a key that is to stay.',
    });
  }
  return { findings, differ };
}

const VOLUME = /^volumes\/([0-9a-f]{32})\/(.+)$/;

async function checkObject(
  repo: Repository,
  name: string,
  only: ReadonlySet<string> | undefined,
  found: ObjectsFound,
): Promise<void> {
  if (name === CONFIG_NAME || name === CONFIG_COPY_NAME || name.startsWith('locks/')) return;
  const m = VOLUME.exec(name);
  const volumeId = m?.[1];
  const inVolume = m?.[2] ?? '';
  if (volumeId !== undefined) {
    found.volumeIds.add(volumeId);
    const epoch = /^epochs\/([0-9a-f]{8})$/.exec(inVolume)?.[1];
    if (epoch !== undefined) {
      found.epochs.set(
        volumeId,
        Math.max(found.epochs.get(volumeId) ?? 0, Number.parseInt(epoch, 16)),
      );
    }
    if (only !== undefined && !only.has(volumeId)) return;
  }
  try {
    const known = await openObject(repo, name, volumeId, inVolume, found);
    if (known) found.objects++;
    else {
      found.findings.push({
        severity: 'note',
        kind: 'name',
        object: name,
        message: 'no b2 of this version wrote this; it is ignored',
      });
    }
  } catch (error) {
    if (isKind(error, 'not-found')) return; // deleted since it was listed
    if (isKind(error, 'io')) {
      found.findings.push({
        severity: 'unreadable',
        kind: 'object',
        object: name,
        message: messageOf(error),
      });
    } else if (isKind(error, 'damaged', 'unsupported')) {
      found.findings.push({
        severity: 'damage',
        kind: 'object',
        object: name,
        message: problemOf(error.message, name),
        ...(error.hint === undefined ? {} : { hint: hintFor(name) }),
      });
    } else throw error;
  }
}

function hintFor(name: string): string {
  if (name.includes('/snapshots/'))
    return 'The point itself is not touched; name it again with "b2 snapshot".';
  if (name.startsWith('condemned/'))
    return 'Until it is gone nothing is reused; "b2 repair" removes it.';
  return 'Run "b2 repair".';
}

/** False for a name that is none of ours. Throws what is wrong. */
async function openObject(
  repo: Repository,
  name: string,
  volumeId: string | undefined,
  inVolume: string,
  found: ObjectsFound,
): Promise<boolean> {
  const wrong = (problem: string): B2Error =>
    new B2Error('damaged', `${name}: ${problem}`, { hint: '-' });
  if (volumeId === undefined) {
    if (/^condemned\/[0-9a-f]{32}$/.test(name)) {
      const c = await readCondemned(repo, name);
      if (name !== `condemned/${c.id}`) throw wrong('it says that it is another object');
      return true;
    }
    if (/^quarantine\/[0-9a-f]{32}$/.test(name)) {
      found.quarantine.push(await readQuarantine(repo, name));
      return true;
    }
    if (name.startsWith('tapes/')) {
      await repo.getObject(ObjectKind.tape, name);
      return true;
    }
    return false;
  }
  if (inVolume === 'meta') {
    found.metas.set(volumeId, await readVolumeMeta(repo, volumeId));
    return true;
  }
  const epoch = /^epochs\/([0-9a-f]{8})$/.exec(inVolume)?.[1];
  if (epoch !== undefined) {
    const o = await repo.getObject(ObjectKind.epoch, name);
    if (o['volume'] !== volumeId || o['epoch'] !== Number.parseInt(epoch, 16))
      throw wrong('it says that it is another claim');
    return true;
  }
  const pack = /^journal\/([0-9a-f]{32})$/.exec(inVolume)?.[1];
  if (pack !== undefined) {
    const o = await repo.getObject(ObjectKind.journal, name);
    if (o['volume'] !== volumeId || o['pack'] !== pack)
      throw wrong('it says that it is another entry');
    return true;
  }
  if (/^snapshots\/[0-9a-f]{32}$/.test(inVolume)) {
    const o = await repo.getObject(ObjectKind.snapshot, name);
    const { name: text, volume, seq, hash } = o;
    if (
      typeof text !== 'string' ||
      volume !== volumeId ||
      typeof seq !== 'string' ||
      typeof hash !== 'string'
    ) {
      throw wrong('its payload is not that of a snapshot');
    }
    if (snapshotName(volumeId, repo.keys.nameHash(text)) !== name)
      throw wrong('its name is not the hash of the snapshot name');
    found.snapshots.push({ object: name, name: text, volumeId, seq: Number(seq), hash });
    return true;
  }
  if (parseLostName(name) !== undefined) {
    await readLost(repo, name);
    return true;
  }
  return parseSegmentName(name) !== undefined;
}
