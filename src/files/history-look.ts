/** One look at one path at one point: what is there, and by which blocks of the image that is known. */
import { createHash } from 'node:crypto';

import type { Clock } from '../clock.js';
import { B2Error, isKind, messageOf } from '../errors.js';
import type { EventSink } from '../events.js';
import type { Image } from '../image.js';
import { openFileAccess } from './access.js';
import type { Companions, FindCompanions } from './companions.js';
import { rangesOf } from './history-group.js';
import { parentPath } from './names.js';
import { explicitPlace, namesFileSystem } from './places.js';
import { Recorder, type BlockRange } from './recording.js';
import type { BackendName, FileAccess, FileEntry, Place } from './types.js';

/** What is at the path. */
export type Found =
  | {
      readonly state: 'present';
      readonly entry: FileEntry;
      /** Of a regular file: SHA-256 of its bytes, hexadecimal. */
      readonly sha256?: string;
    }
  | {
      readonly state: 'absent';
      /** The deepest directory on the way that is there; undefined where there is no such file system. */
      readonly nearest?: FileEntry;
    }
  /** It cannot be told, because data is damaged or the file system cannot be mounted. */
  | { readonly state: 'unreadable'; readonly reason: string };

export interface Look {
  readonly found: Found;
  /** Name of the file system, where there is one. */
  readonly fileSystem?: string;
  /** The file system keeps for every inode the time of its last change, which programs cannot set. */
  readonly hasChangeTimes: boolean;
  /** Every block of the image that it depends on, the journal included; those of other volumes as {@link rangesOf} numbers them. */
  readonly reads: readonly BlockRange[];
  /** Those that were read after the file system was mounted: directories, inodes and data, as far as they were not in the journal. */
  readonly lookupReads: readonly BlockRange[];
  readonly backends: readonly BackendName[];
}

export interface LookOptions {
  readonly openImage: () => Promise<Image>;
  /** The other volumes of its group at that instant. */
  readonly companions?: FindCompanions | undefined;
  /** For messages: volume and point. */
  readonly name: string;
  /** As FileAccess.place takes it. */
  readonly path: string;
  readonly backend: BackendName | 'auto';
  readonly clock: Clock;
  readonly events: EventSink;
  readonly cacheDir: string;
  readonly signal: AbortSignal;
}

const WITH_CHANGE_TIMES = /^(ext[234]|xfs|btrfs|f2fs)$/;

/**
 * Looks. The last part of the path is not followed if it is a symbolic link. Rejects where the question is wrong (kind `usage`) or nothing
 * here can read that file system (`unsupported`), and with `interrupted`; what is wrong with that point alone is in the answer.
 */
export async function lookAt(options: LookOptions): Promise<Look> {
  const recorder = new Recorder();
  const recorders = new Map([[0, recorder]]);
  const ranges = (of: (r: Recorder) => readonly BlockRange[]): readonly BlockRange[] =>
    [...recorders].flatMap(([volume, r]) => rangesOf(volume, of(r)));
  const { signal } = options;
  let access: FileAccess | undefined;
  const stop = (): void => void access?.close();
  signal.addEventListener('abort', stop, { once: true });
  try {
    signal.throwIfAborted();
    access = await openFileAccess({
      ...options,
      openImage: async () => recorder.wrap(await options.openImage()),
      companions: async (isSpread) => recorded(await options.companions?.(isSpread), recorders),
    });
    signal.throwIfAborted();
    const mark = (): void => recorders.forEach((r) => r.mark());
    const seen = await see(access, options.path, mark);
    const [reads, lookupReads] = [ranges((r) => r.all), ranges((r) => r.sinceMark)];
    return { ...seen, reads, lookupReads, backends: access.used };
  } catch (error) {
    // What the tools said then is only that they were ended.
    if (signal.aborted)
      throw new B2Error('interrupted', `interrupted (${String(signal.reason)})`, { cause: error });
    if (!isKind(error, 'damaged', 'io')) throw error;
    return {
      found: { state: 'unreadable', reason: messageOf(error) },
      hasChangeTimes: false,
      reads: ranges((r) => r.all),
      lookupReads: [],
      backends: access?.used ?? [],
    };
  } finally {
    signal.removeEventListener('abort', stop);
    await access?.close();
  }
}

/** The companions with what is read of each recorded. */
function recorded(
  companions: Companions | undefined,
  recorders: Map<number, Recorder>,
): Companions | undefined {
  if (companions === undefined) return undefined;
  const there = companions.there.map((companion) => {
    const recorder = new Recorder();
    recorders.set(companion.index + 1, recorder);
    return { ...companion, openImage: async () => recorder.wrap(await companion.openImage()) };
  });
  return { ...companions, there };
}

type Seen = Pick<Look, 'found' | 'fileSystem' | 'hasChangeTimes'>;

async function see(access: FileAccess, path: string, mark: () => void): Promise<Seen> {
  const asked = access.place(path);
  const hidden = [...access.notShown, ...(namesFileSystem(path) ? access.elsewhere : [])];
  if (hidden.length > 0) {
    await asked.catch(() => undefined);
    // What is not shown may be what is meant.
    if (explicitPlace(access.fileSystems, path) === undefined)
      return {
        found: { state: 'unreadable', reason: hidden.join('; ') },
        hasChangeTimes: false,
      };
  }
  const place = await orAbsent(asked);
  if (place === undefined) return { found: { state: 'absent' }, hasChangeTimes: false };
  const { fileSystem } = place;
  // Mounts it: replaying the journal is over then.
  await access.statMany(fileSystem, ['/']);
  mark();
  const common = {
    fileSystem: fileSystem.name,
    hasChangeTimes: WITH_CHANGE_TIMES.test(fileSystem.type),
  };
  const entry = await orAbsent(access.stat(place, false));
  if (entry === undefined) {
    return { ...common, found: { state: 'absent', nearest: await nearestTo(access, place) } };
  }
  if (entry.kind !== 'file') return { ...common, found: { state: 'present', entry } };
  const hash = createHash('sha256');
  for await (const bytes of access.read({ fileSystem, path: entry.path })) hash.update(bytes);
  return { ...common, found: { state: 'present', entry, sha256: hash.digest('hex') } };
}

/** The deepest directory above the place that is there. */
async function nearestTo(access: FileAccess, { fileSystem, path }: Place): Promise<FileEntry> {
  for (let at = parentPath(path); ; at = parentPath(at)) {
    const entry = await orAbsent(access.stat({ fileSystem, path: at }, true));
    if (entry !== undefined) return entry;
    if (at === '/') throw new B2Error('io', `${fileSystem.name} has no root directory`);
  }
}

async function orAbsent<T>(answer: Promise<T | undefined>): Promise<T | undefined> {
  try {
    const found = await answer;
    if (found !== undefined) return found;
  } catch (error) {
    if (isKind(error, 'not-found')) return undefined;
    throw error;
  }
  throw new B2Error('usage', 'the volume has several file systems, and none of them was named', {
    hint: '"b2 ls VOLUME" lists them; put one before the path: VOLUME:p2/etc/fstab.',
  });
}
