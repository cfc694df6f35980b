/** What the commands for files inside an image share. */
import { B2Error } from '../../errors.js';
import { openFileAccess } from '../../files/access.js';
import { splitVolumePath } from '../../files/places.js';
import type { BackendName, FileAccess, FileEntry, FoundFileSystem } from '../../files/types.js';
import { formatTimeLocal, formatTimeNs } from '../../human.js';
import type { CommitRecord } from '../../format/segment.js';
import { VolumeHistory } from '../../repo/history.js';
import { choosePoint, openImage } from '../../repo/point.js';
import { findVolume, type Snapshot, type VolumeMeta } from '../../repo/volume.js';
import { parseWhen } from '../../when.js';
import type { CommandContext } from '../spec.js';
import { volumesOf, withRepository } from './session.js';

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

/** Opens the files of `VOLUME[:PATH]`; everything is closed when `fn` has ended. The first signal ends what is under way. */
export function withFiles<T>(
  context: CommandContext,
  text: string,
  options: FilesOptions,
  fn: (files: OpenedFiles) => Promise<T>,
): Promise<T> {
  return withRepository(context, async (repo) => {
    const { clock, events, settings, signal } = context;
    const volumes = await volumesOf(context, repo);
    const split = splitVolumePath(
      text,
      volumes.map((v) => v.name),
    );
    const volume = findVolume(volumes, split.volume);
    const history = await VolumeHistory.open(repo, volume.id);
    try {
      const warn = (message: string): void => events({ type: 'warning', message });
      const when = parseWhen(options.at, clock.nowNs());
      const { commit, snapshot } = await choosePoint(history, volume, when, warn);
      const at = formatTimeLocal(commit.instantNs);
      events({
        type: 'note',
        message: `point #${commit.seq} of ${volume.name}, ${at}${snapshot === undefined ? '' : ` (snapshot ${snapshot.name})`}`,
      });
      const access = await openFileAccess({
        openImage: () => openImage(history, volume, commit.seq),
        name: `${volume.name} at ${at}`,
        backend: options.backend,
        clock,
        events,
        cacheDir: settings.cacheDir,
      });
      const stop = (): void => void access.close();
      signal.addEventListener('abort', stop, { once: true });
      try {
        if (signal.aborted) stop();
        return await fn({ access, volume, commit, snapshot, path: split.path });
      } catch (error) {
        // What the tools said then is only that they were ended.
        if (signal.aborted)
          throw new B2Error('interrupted', `interrupted (${String(signal.reason)})`, {
            cause: error,
          });
        throw error;
      } finally {
        signal.removeEventListener('abort', stop);
        await access.close();
      }
    } finally {
      await history.close();
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
}

export function fileSystemRow(f: FoundFileSystem): FileSystemRow {
  return {
    name: f.name,
    type: f.type,
    ...(f.label === undefined ? {} : { label: f.label }),
    ...(f.uuid === undefined ? {} : { uuid: f.uuid }),
    ...(f.sizeBytes === 0 ? {} : { sizeBytes: f.sizeBytes }),
  };
}
