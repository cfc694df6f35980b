/**
 * What a machine writes, kept (`b2 boot --overlay PATH`): of one disk a file (src/nbd/overlay.ts), of several a directory with a file each
 * and {@link LIST}, which says whose they are.
 *
 * The disks of a machine are one state: a file system or volume group may lie on all of them. Going on with what was written to one and a
 * fresh copy of another would be garbage that looks like a disk. So they come into being together (the directory is renamed into place
 * with all of them in it), each says in its header which set it is of, and they are opened only for the very disks and points that they were made
 * for, none more and none less.
 */
import { mkdir, readFile, rm, stat } from 'node:fs/promises';
import { dirname, join, resolve } from 'node:path';

import { systemRandom, type Random } from '../clock.js';
import { B2Error, errnoOf, ioError } from '../errors.js';
import { fsyncDirectory, renameNoReplace, writeFileDurable } from '../fs.js';
import type { Image } from '../image.js';
import {
  makeOverlay,
  openOverlay,
  type OverlayIdentity,
  type WritableImage,
} from '../nbd/index.js';

/** The file in the directory that lists the overlays. */
export const LIST = 'disks.json';
const VERSION = 1;

/** A disk whose writes are kept. */
export interface KeptDisk {
  /** For messages: the volume. */
  readonly name: string;
  readonly sizeBytes: number;
  /** Of the point that the overlay lies on; without `set`. */
  readonly identity: OverlayIdentity;
}

/** Puts the writable overlay of a disk over its image, which is closed with it, and also when this rejects. */
export type OpenDiskOverlay = (base: Image) => Promise<WritableImage>;

interface Listed {
  readonly file: string;
  readonly name: string;
  readonly repository: string;
  readonly volume: string;
  readonly seq: number;
  readonly hash: string;
}

interface List {
  /** 32 hexadecimal digits, as in the header of each overlay. */
  readonly set: string;
  readonly disks: readonly Listed[];
}

/**
 * Finds or makes what keeps the writes of these disks, in their order. Kinds: `refused` if what is at `path` was made for others, or is
 * something else; `damaged` if a part of it is missing; those of {@link openOverlay} come when a disk is opened.
 */
export async function keepWrites(
  path: string,
  disks: readonly KeptDisk[],
  random: Random = systemRandom,
): Promise<readonly OpenDiskOverlay[]> {
  const place = resolve(path);
  const kind = await kindOf(place);
  const [only] = disks;
  if (disks.length === 1 && only !== undefined) {
    if (kind === 'directory') throw otherDisks(place, await readList(place), disks);
    return [(base) => openOverlay({ path: place, base, identity: only.identity })];
  }
  if (kind === 'file')
    throw new B2Error(
      'refused',
      `${place} is a file: it keeps the writes of one disk at most, and this machine has ${disks.length} (${disks.map((d) => d.name).join(', ')})`,
      {
        hint: 'If it was made for the first disk by itself, --alone goes on with it; else name a directory that is not there yet.',
      },
    );
  if (kind === undefined) await make(place, disks, random);
  const list = await readList(place);
  const files = disks.map((disk) =>
    list.disks.find((l) => identityKey(l) === identityKey(disk.identity)),
  );
  if (list.disks.length !== disks.length || files.includes(undefined))
    throw otherDisks(place, list, disks);
  // All of them are there before the first one is written to.
  for (const { file, name } of list.disks) {
    if ((await kindOf(join(place, file))) === 'file') continue;
    throw new B2Error(
      'damaged',
      `${join(place, file)}, which keeps the writes to ${name}, is not there`,
      {
        hint: 'Without it the others are of no use: put it back, or start over with a new name.',
      },
    );
  }
  return disks.map(({ identity }, i): OpenDiskOverlay => {
    const file = join(place, files[i]?.file ?? '');
    return (base) =>
      openOverlay({
        path: file,
        base,
        identity: { ...identity, set: list.set },
        mustExist: true,
      });
  });
}

function identityKey({ repository, volume, seq, hash }: OverlayIdentity): string {
  return JSON.stringify([repository, volume, seq, hash]);
}

async function kindOf(path: string): Promise<'file' | 'directory' | undefined> {
  try {
    return (await stat(path)).isDirectory() ? 'directory' : 'file';
  } catch (error) {
    if (errnoOf(error) === 'ENOENT') return undefined;
    throw ioError('look at', path, error);
  }
}

/** The directory appears under its name with everything in it, durably. */
async function make(place: string, disks: readonly KeptDisk[], random: Random): Promise<void> {
  const hex = (bytes: number): string => Buffer.from(random(bytes)).toString('hex');
  const set = hex(16);
  const staging = `${place}.${hex(6)}.new`;
  try {
    await mkdir(staging, { mode: 0o700 });
    const listed: Listed[] = [];
    for (const [i, { name, sizeBytes, identity }] of disks.entries()) {
      const { repository, volume, seq, hash } = identity;
      const file = `disk${i}`;
      await makeOverlay(join(staging, file), sizeBytes, { ...identity, set }, random);
      listed.push({ file, name, repository, volume, seq, hash });
    }
    const text = JSON.stringify({ version: VERSION, set, disks: listed }, undefined, 2);
    await writeFileDurable(join(staging, LIST), Buffer.from(`${text}\n`), { mode: 0o600 });
    await renameNoReplace(staging, place);
    await fsyncDirectory(dirname(place));
  } catch (error) {
    await rm(staging, { recursive: true, force: true });
    throw ioError('make overlays in', place, error);
  }
}

async function readList(place: string): Promise<List> {
  const path = join(place, LIST);
  let text: string;
  try {
    text = await readFile(path, 'utf8');
  } catch (error) {
    if (errnoOf(error) !== 'ENOENT') throw ioError('read', path, error);
    throw new B2Error(
      'refused',
      `${place} is a directory, and not one in which b2 keeps what a machine writes; it is left as it is`,
      { hint: 'Name something that is not there yet.' },
    );
  }
  const list = parseList(text);
  if (list === undefined) {
    throw new B2Error('damaged', `${path} does not say which disks the overlays beside it are of`, {
      hint: 'Start over with a new name, or put the list back.',
    });
  }
  return list;
}

function parseList(text: string): List | undefined {
  let found: unknown;
  try {
    found = JSON.parse(text);
  } catch {
    return undefined;
  }
  const { version, set, disks } = Object(found) as Record<string, unknown>;
  if (version !== VERSION || typeof set !== 'string' || !Array.isArray(disks)) return undefined;
  const isListed = (d: unknown): d is Listed => {
    const { file, name, repository, volume, seq, hash } = Object(d) as Record<string, unknown>;
    return (
      // Nothing but a name: it is joined to the directory.
      typeof file === 'string' &&
      /^disk\d{1,3}$/.test(file) &&
      [name, repository, volume, hash].every((x) => typeof x === 'string') &&
      Number.isSafeInteger(seq)
    );
  };
  return disks.every(isListed) ? { set, disks } : undefined;
}

function otherDisks(place: string, list: List, disks: readonly KeptDisk[]): B2Error {
  const those = list.disks.map((d) => `${d.name} #${d.seq}`).join(', ');
  const these = disks.map((d) => `${d.name} #${d.identity.seq}`).join(', ');
  const [first] = disks;
  const same = list.disks.find((d) => d.volume === first?.identity.volume);
  return new B2Error(
    'refused',
    `${place} keeps what a machine wrote to ${those}; this one would have ${these}`,
    {
      hint:
        same === undefined || same.seq === first?.identity.seq
          ? 'Start it with the same disks and points, or name something that is not there yet.'
          : `To go on with it: --at "#${same.seq}"; or name something that is not there yet.`,
    },
  );
}
