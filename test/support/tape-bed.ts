/** A repository on disk with a few points, and a directory for cartridges: what tests of tapes start from. */
import { mkdirSync, readdirSync, rmSync, symlinkSync, writeFileSync } from 'node:fs';
import { systemClock, systemRandom } from '../../src/clock.js';
import { takeSnapshot } from '../../src/capture/snapshot.js';
import type { TapeDrive } from '../../src/devices/tape/drive.js';
import { FileDrive } from '../../src/devices/tape/file-drive.js';
import { ignoreEvents, type B2Event } from '../../src/events.js';
import { currentIdentity } from '../../src/process-identity.js';
import { VolumeHistory } from '../../src/repo/history.js';
import { choosePoint, openBlockMap } from '../../src/repo/point.js';
import { Repository } from '../../src/repo/repository.js';
import { openDirectoryStore } from '../../src/repo/store-directory.js';
import { findVolume, listVolumes } from '../../src/repo/volume.js';
import { exportTape, type ExportOptions, type ExportResult } from '../../src/tape/export.js';
import type { CartridgeSource } from '../../src/tape/media.js';
import type { ExportPoint } from '../../src/tape/plan.js';
import { parseWhen } from '../../src/when.js';
import { tempDir, type TempDir } from './tmp.js';

const MIB = 1024 * 1024;
export const BED_ENVIRONMENT = {
  clock: systemClock,
  random: systemRandom,
  owner: currentIdentity(),
};
export const PASSWORD = { kind: 'password', password: 'correct horse', source: 'test' } as const;
const CHEAP = { N: 16_384, r: 8, p: 1 };

export interface BedOptions {
  readonly encryption?: 'aes256-gcm' | 'none';
  /** Size of the repository's packs. */
  readonly packBytes?: number;
}

/** See the file comment. `remove` it. */
export class TapeBed {
  readonly dir: TempDir;
  readonly repo: Repository;
  readonly events: B2Event[] = [];
  readonly #histories: VolumeHistory[] = [];

  private constructor(dir: TempDir, repo: Repository) {
    this.dir = dir;
    this.repo = repo;
  }

  static async make(options: BedOptions = {}): Promise<TapeBed> {
    const dir = tempDir();
    mkdirSync(dir.join('repo'));
    const repo = await Repository.init(
      await openDirectoryStore(dir.join('repo')),
      {
        encryption: options.encryption ?? 'aes256-gcm',
        chunkBytes: 65_536,
        packBytes: options.packBytes ?? MIB,
      },
      PASSWORD,
      BED_ENVIRONMENT,
      CHEAP,
    );
    return new TapeBed(dir, repo);
  }

  /** Captures `image` as a point of volume `volume`, pinned under `name`. */
  async capture(image: Buffer, volume = 'v', name?: string): Promise<void> {
    const file = this.dir.join(`${volume.replaceAll('/', '-')}.img`);
    writeFileSync(file, image);
    await takeSnapshot(this.repo, {
      device: file,
      volume,
      name,
      tags: [],
      skipUnreadable: false,
      takeOver: false,
      host: 'host',
      dedupeCacheFile: undefined,
      workers: 0,
      storeUrl: undefined,
      signal: new AbortController().signal,
      events: ignoreEvents,
    });
  }

  async point(volume = 'v', at = 'latest', repo = this.repo): Promise<ExportPoint> {
    const warn = (text: string): void => {
      throw new Error(text);
    };
    const meta = findVolume(await listVolumes(repo, warn), volume);
    const history = await VolumeHistory.open(repo, meta.id);
    this.#histories.push(history);
    const { commit } = await choosePoint(history, meta, parseWhen(at, systemClock.nowNs()), warn);
    return { volume: meta, commit, map: await openBlockMap(history, commit.seq) };
  }

  /** A directory for one cartridge. */
  cartridge(name: string): string {
    const path = this.dir.join(name);
    mkdirSync(path, { recursive: true });
    return path;
  }

  /**
   * A drive whose cartridges are directories below `name`, changed by the source that comes with it. `options` as in `file:PATH?options`.
   * `order`: the cartridges one after the other; default 1, 2, 3, …
   */
  async library(
    name: string,
    options = '',
    order: readonly number[] = Array.from({ length: 50 }, (_, i) => i + 1),
  ): Promise<{ drive: FileDrive; source: CartridgeSource; path: (n: number) => string }> {
    const link = this.dir.join(`${name}-drive`);
    const path = (n: number): string => this.dir.join(`${name}-${n}`);
    const put = (n: number): void => {
      mkdirSync(path(n), { recursive: true });
      rmSync(link, { force: true });
      symlinkSync(path(n), link);
    };
    let at = 0;
    put(order[0] ?? 1);
    const source: CartridgeSource = {
      next: () => {
        const n = order[++at];
        if (n === undefined) return Promise.resolve(false);
        put(n);
        return Promise.resolve(true);
      },
    };
    return { drive: await FileDrive.open(`file:${link}${options}`), source, path };
  }

  async export(
    drive: TapeDrive,
    points: readonly ExportPoint[],
    more: Partial<ExportOptions> = {},
  ): Promise<ExportResult> {
    return exportTape({
      repo: this.repo,
      storeUrl: undefined,
      drive,
      points,
      defaultSetName: 'SET',
      sinceLast: false,
      force: false,
      verify: true,
      recordBytes: 65_536,
      fixedBlocks: false,
      dataFileBytes: 2 * MIB,
      bufferBytes: 4 * MIB,
      packBytes: MIB,
      host: 'host',
      program: 'test',
      workers: 0,
      clock: systemClock,
      events: (e) => this.events.push(e),
      ...more,
    });
  }

  async remove(): Promise<void> {
    await Promise.all(this.#histories.map((h) => h.close()));
    await this.repo.close();
    await this.dir.remove();
  }
}

/** Names of the files of a cartridge. */
export function tapeFiles(path: string): readonly string[] {
  return readdirSync(path)
    .filter((name) => /\.tar(\.part)?$/.test(name))
    .toSorted();
}
