/** One look at one path at one point: what is there, and by which blocks of the image that is known. */
import { createHash } from 'node:crypto';

import type { Clock } from '../clock.js';
import { B2Error, isKind, messageOf } from '../errors.js';
import type { EventSink } from '../events.js';
import type { Image } from '../image.js';
import { openFileAccess } from './access.js';
import { parentPath } from './names.js';
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
  /** Every block of the image that it depends on, the journal included. */
  readonly reads: readonly BlockRange[];
  /** Those that were read after the file system was mounted: directories, inodes and data, as far as they were not in the journal. */
  readonly lookupReads: readonly BlockRange[];
  readonly backends: readonly BackendName[];
}

export interface LookOptions {
  readonly openImage: () => Promise<Image>;
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
  const { signal } = options;
  let access: FileAccess | undefined;
  const stop = (): void => void access?.close();
  signal.addEventListener('abort', stop, { once: true });
  try {
    signal.throwIfAborted();
    access = await openFileAccess({
      ...options,
      openImage: async () => recorder.wrap(await options.openImage()),
    });
    signal.throwIfAborted();
    const seen = await see(access, options.path, recorder);
    return { ...seen, reads: recorder.all, lookupReads: recorder.sinceMark, backends: access.used };
  } catch (error) {
    // What the tools said then is only that they were ended.
    if (signal.aborted)
      throw new B2Error('interrupted', `interrupted (${String(signal.reason)})`, { cause: error });
    if (!isKind(error, 'damaged', 'io')) throw error;
    return {
      found: { state: 'unreadable', reason: messageOf(error) },
      hasChangeTimes: false,
      reads: recorder.all,
      lookupReads: [],
      backends: access?.used ?? [],
    };
  } finally {
    signal.removeEventListener('abort', stop);
    await access?.close();
  }
}

type Seen = Pick<Look, 'found' | 'fileSystem' | 'hasChangeTimes'>;

async function see(access: FileAccess, path: string, recorder: Recorder): Promise<Seen> {
  const place = await orAbsent(access.place(path));
  if (place === undefined) return { found: { state: 'absent' }, hasChangeTimes: false };
  const { fileSystem } = place;
  // Mounts it: replaying the journal is over then.
  await access.statMany(fileSystem, ['/']);
  recorder.mark();
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
