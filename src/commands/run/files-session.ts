/** What the commands for files inside an image share. */
import { B2Error } from '../../errors.js';
import type { EventSink } from '../../events.js';
import { openFileAccess } from '../../files/access.js';
import { GroupVolumes } from '../../files/companions.js';
import type { MdArray } from '../../files/md.js';
import type { BackendName, FileAccess, FileEntry, FoundFileSystem } from '../../files/types.js';
import { formatTimeLocal, formatTimeNs } from '../../human.js';
import type { CommitRecord } from '../../format/segment.js';
import { choosePoint, openImage } from '../../repo/point.js';
import type { Snapshot, VolumeMeta } from '../../repo/volume.js';
import { parseWhen } from '../../when.js';
import type { CommandContext } from '../spec.js';
import { withVolumePath, type VolumePath } from './volume-path.js';

export interface FilesOptions {
  readonly at: string;
  readonly backend: BackendName | 'auto';
}

/** A point whose files can be looked at. */
export interface OpenedFiles {
  readonly access: FileAccess;
  readonly volume: VolumeMeta;
  readonly commit: CommitRecord;
  readonly snapshot: Snapshot | undefined;
  /** What stood behind the volume's name. */
  readonly path: string | undefined;
}

export interface FilesOfOptions {
  readonly backend: FilesOptions['backend'];
  readonly events: EventSink;
  /** True: where something lies on other volumes of the group that lack the point, {@link OlderPoint} is thrown if there is one that all have. */
  readonly mayGoBack?: boolean;
}

/** A slightly older point shows more than the one that was asked for. Thrown before `fn` is called. */
class OlderPoint extends Error {
  readonly commit: CommitRecord;

  constructor(commit: CommitRecord) {
    super(`point #${commit.seq}`);
    this.commit = commit;
  }
}

/** Opens the files of a point, and closes them when `fn` has ended. The first signal ends what is under way: kind `interrupted`. */
export async function withFilesOf<T>(
  context: CommandContext,
  { volume, history }: Pick<VolumePath, 'volume' | 'history'>,
  commit: CommitRecord,
  options: FilesOfOptions,
  fn: (access: FileAccess) => Promise<T>,
): Promise<T> {
  const { clock, settings, signal } = context;
  const group = new GroupVolumes(history.repo, volume, (message) =>
    options.events({ type: 'warning', message }),
  );
  const access = await openFileAccess({
    openImage: () => openImage(history, volume, commit.seq),
    companions: async (isSpread) => {
      const found = await group.at(commit);
      const isLacking = isSpread && found !== undefined && found.missing.length > 0;
      const older =
        isLacking && options.mayGoBack === true
          ? await group.sharedBefore(history, commit)
          : undefined;
      if (older !== undefined) throw new OlderPoint(older);
      return found;
    },
    name: `${volume.name} at #${commit.seq}, ${formatTimeLocal(commit.instantNs)}`,
    backend: options.backend,
    clock,
    events: options.events,
    cacheDir: settings.cacheDir,
  }).catch(async (error: unknown) => {
    await group.close();
    throw error;
  });
  const stop = (): void => void access.close();
  signal.addEventListener('abort', stop, { once: true });
  try {
    if (signal.aborted) stop();
    return await fn(access);
  } catch (error) {
    // What the tools said then is only that they were ended.
    if (signal.aborted)
      throw new B2Error('interrupted', `interrupted (${String(signal.reason)})`, { cause: error });
    throw error;
  } finally {
    signal.removeEventListener('abort', stop);
    await access.close();
    await group.close();
  }
}

/** Opens the files of `VOLUME[:PATH]` at a point, and says which; everything is closed when `fn` has ended. */
export function withFiles<T>(
  context: CommandContext,
  text: string,
  options: FilesOptions,
  fn: (files: OpenedFiles) => Promise<T>,
): Promise<T> {
  return withVolumePath(context, text, async (opened) => {
    const { volume, history, path } = opened;
    const { events } = context;
    const warn = (message: string): void => events({ type: 'warning', message });
    const when = parseWhen(options.at, context.clock.nowNs());
    const { commit, snapshot } = await choosePoint(history, volume, when, warn);
    events({
      type: 'note',
      message: `point #${commit.seq} of ${volume.name}, ${formatTimeLocal(commit.instantNs)}${snapshot === undefined ? '' : ` (snapshot ${snapshot.name})`}`,
    });
    // A point that is named is never exchanged.
    const mayGoBack =
      when.kind === 'latest' || (when.kind === 'instant' && when.ns !== commit.instantNs);
    const common = { backend: options.backend, events };
    try {
      return await withFilesOf(context, opened, commit, { ...common, mayGoBack }, (access) =>
        fn({ access, volume, commit, snapshot, path }),
      );
    } catch (error) {
      if (!(error instanceof OlderPoint)) throw error;
      const older = error.commit;
      events({
        type: 'note',
        message: `what lies on several disks is read from point #${older.seq}, ${formatTimeLocal(older.instantNs)}: not all volumes of the group have #${commit.seq}`,
      });
      return await withFilesOf(context, opened, older, common, (access) =>
        fn({ access, volume, commit: older, snapshot: undefined, path }),
      );
    }
  });
}

/** A name in `--json` output. */
export interface EntryRow {
  readonly path: string;
  readonly kind: string;
  /** Four octal digits. */
  readonly mode: string;
  readonly links: number;
  readonly uid: number;
  readonly gid: number;
  readonly sizeBytes: number;
  readonly allocatedBytes: number;
  readonly mtime: string;
  readonly ctime: string;
  readonly inode: string;
  readonly target?: string;
}

export function entryRow(e: FileEntry): EntryRow {
  return {
    path: e.path,
    kind: e.kind,
    mode: e.permissions.toString(8).padStart(4, '0'),
    links: e.links,
    uid: e.uid,
    gid: e.gid,
    sizeBytes: e.sizeBytes,
    allocatedBytes: e.allocatedBytes,
    mtime: formatTimeNs(e.mtimeNs),
    ctime: formatTimeNs(e.ctimeNs),
    inode: String(e.inode),
    ...(e.target === undefined ? {} : { target: e.target }),
  };
}

/** A file system in `--json` output. */
export interface FileSystemRow {
  readonly name: string;
  readonly type: string;
  readonly label?: string;
  readonly uuid?: string;
  /** Not of a logical volume. */
  readonly sizeBytes?: number;
  /** The arrays (MD) that it lies in and of which one member was read, the outermost first. */
  readonly arrays?: readonly MdArray[];
}

export function fileSystemRow(f: FoundFileSystem): FileSystemRow {
  return {
    name: f.name,
    type: f.type,
    ...(f.label === undefined ? {} : { label: f.label }),
    ...(f.uuid === undefined ? {} : { uuid: f.uuid }),
    ...(f.sizeBytes === 0 ? {} : { sizeBytes: f.sizeBytes }),
    ...(f.arrays === undefined ? {} : { arrays: f.arrays }),
  };
}
