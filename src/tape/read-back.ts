/** Reads files of a cartridge from end to end and checks everything in them. */
import type { TapeDrive } from '../devices/tape/drive.js';
import { B2Error } from '../errors.js';
import { CONFIG_COPY_NAME, CONFIG_NAME, packIdOf } from '../format/names.js';
import type { TapeFileKind } from '../format/tape.js';
import type { Progress } from '../progress.js';
import type { PackPool } from './pool.js';
import { MAX_SILENT_FILES } from './survey.js';
import { objectOfMember, readTapeFile, type TapeDamage, type TapeFileEnd } from './reader.js';

/** A copy of a pack that was met. */
export interface PackMet {
  readonly packId: string;
  readonly file: number;
  readonly record: number;
  readonly frames: number;
  readonly chunks: number;
  /** Frames that cannot be used; empty: the copy is whole. */
  readonly damaged: readonly { readonly frame: number; readonly reason: string }[];
}

export interface ReadBack {
  /** Kind of each file, as it says itself. */
  readonly files: readonly { readonly file: number; readonly kind: TapeFileKind | undefined }[];
  readonly packs: readonly PackMet[];
  /** The other objects, the last copy that lay in good records. */
  readonly objects: ReadonlyMap<string, Buffer>;
  readonly damage: readonly TapeDamage[];
  /** The end of data was met. */
  readonly atEnd: boolean;
  readonly bytes: number;
}

export interface ReadBackOptions {
  readonly drive: TapeDrive;
  readonly recordBytes: number;
  /** The head must be at the beginning of this file. */
  readonly fromFile: number;
  /** Read up to the beginning of this file; undefined: to the end of data. */
  readonly toFile?: number | undefined;
  readonly pool: PackPool;
  readonly progress?: Progress | undefined;
  readonly signal?: AbortSignal | undefined;
  /** Asked after each file: true ends the reading. */
  readonly isDone?: (() => boolean) | undefined;
  /**
   * Takes a pack instead of having it checked, as soon as it was read. What it returns stands for the check. `data` is the caller's
   * to keep; its buffer may be given to the pool.
   */
  readonly onPack?:
    | ((
        packId: string,
        data: Buffer<SharedArrayBuffer>,
      ) => Promise<Pick<PackMet, 'frames' | 'chunks' | 'damaged'>>)
    | undefined;
}

/** Packs at work at a time, and bytes of them: while a large one is read another two are being checked. */
const AT_ONCE = 6;
const AT_ONCE_BYTES = 96 * 1024 * 1024;

/** See the file comment. Rejects where the drive does; damage is told, not thrown. */
export async function readBack(options: ReadBackOptions): Promise<ReadBack> {
  const { drive, pool, progress } = options;
  const files: { file: number; kind: TapeFileKind | undefined }[] = [];
  const packs: PackMet[] = [];
  const objects = new Map<string, Buffer>();
  const damage: TapeDamage[] = [];
  const running = new Set<Promise<void>>();
  const failures: unknown[] = [];
  let bytes = 0;
  let atWork = 0;
  let atEnd = false;
  const check: NonNullable<ReadBackOptions['onPack']> = async (packId, data) => {
    const { buffer, ...found } = await pool.check(packId, data.buffer, data.length);
    pool.recycle(buffer);
    return found;
  };
  const start = (
    packId: string,
    at: { file: number; record: number },
    data: Buffer<SharedArrayBuffer>,
  ): void => {
    const { length } = data;
    atWork += length;
    const work = (async () => {
      const found = await (options.onPack ?? check)(packId, data);
      packs.push({
        packId,
        ...at,
        frames: found.frames,
        chunks: found.chunks,
        damaged: found.damaged,
      });
    })()
      .catch((error: unknown) => {
        failures.push(error);
      })
      .finally(() => {
        atWork -= length;
        running.delete(work);
      });
    running.add(work);
  };
  try {
    let silent = 0;
    for (let file = options.fromFile; file !== options.toFile; file++) {
      if (silent === MAX_SILENT_FILES) {
        atEnd = true;
        break;
      }
      silent++;
      const entry: { file: number; kind: TapeFileKind | undefined } = { file, kind: undefined };
      const items = readTapeFile({
        drive,
        recordBytes: options.recordBytes,
        file,
        onDamage: (d) => damage.push(d),
        buffer: (n) => pool.buffer(n),
        onRecord: (n) => {
          bytes += n;
          progress?.add(n);
        },
      });
      let end: TapeFileEnd;
      for (;;) {
        const next = await items.next();
        if (failures.length > 0) throw failures[0];
        if (options.signal?.aborted === true)
          throw new B2Error('interrupted', `reading ${drive.path} was interrupted`);
        if (next.done === true) {
          end = next.value;
          break;
        }
        const item = next.value;
        silent = 0;
        if (item.kind === 'file') {
          entry.kind = item.id.kind;
          continue;
        }
        const name = objectOfMember(item.name);
        const packId = name === undefined ? undefined : packIdOf(name);
        if (packId !== undefined) {
          while (
            running.size >= AT_ONCE ||
            (running.size > 0 && atWork + item.data.length > AT_ONCE_BYTES)
          )
            await Promise.race(running);
          start(packId, { file, record: item.record }, item.data);
        } else {
          if (name !== undefined && item.whole && isObject(name))
            objects.set(name, Buffer.from(item.data));
          pool.recycle(item.data.buffer);
        }
      }
      if (!end.empty) files.push(entry);
      if (end.ended === 'end' || end.empty) {
        atEnd = true;
        break;
      }
      if (options.isDone !== undefined) {
        await Promise.all(running);
        if (options.isDone()) break;
      }
    }
    await Promise.all(running);
  } finally {
    await Promise.allSettled(running);
  }
  if (failures.length > 0) throw failures[0];
  return { files, packs, objects, damage, atEnd, bytes };
}

/** The kinds of objects that cartridges carry besides packs. */
function isObject(name: string): boolean {
  return (
    name === CONFIG_NAME ||
    name === CONFIG_COPY_NAME ||
    /^(volumes|tapes)\/[A-Za-z0-9._/-]+$/.test(name)
  );
}
