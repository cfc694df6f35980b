/**
 * Points of `b2 watch` under load, restored and looked at: ext4, xfs and btrfs at once, each with a database whose writer logs what was
 * committed, random writes with fsync, and git and tar. Every restored file system must be sound after its journal is replayed, every
 * database sound and with every row acknowledged before the instant and none begun after it; a point made while the file
 * system is frozen must be the device bit for bit.
 *
 * By default a few points of each; `B2_PROOF_POINTS=500` looks at so many (about half an hour).
 */
import { execFileSync } from 'node:child_process';
import {
  closeSync,
  existsSync,
  ftruncateSync,
  openSync,
  readFileSync,
  rmSync,
  writeSync,
} from 'node:fs';
import { hostname } from 'node:os';
import { describe, expect } from 'vitest';
import { systemClock, systemRandom } from '../../../src/clock.js';
import { B2Error } from '../../../src/errors.js';
import { TRACEFS } from '../../../src/devices/trace/instance.js';
import type { RestoreAnswer } from '../../../src/commands/run/restore.js';
import { currentIdentity } from '../../../src/process-identity.js';
import { VolumeHistory } from '../../../src/repo/history.js';
import { openImage } from '../../../src/repo/point.js';
import { Repository } from '../../../src/repo/repository.js';
import { openStore } from '../../../src/repo/store-url.js';
import { Timeline } from '../../../src/repo/timeline.js';
import { listVolumes } from '../../../src/repo/volume.js';
import { B2 } from '../../support/b2.js';
import {
  attachLoop,
  LOOP_NEEDS,
  makeFileSystem,
  makerOf,
  mountDevice,
} from '../../support/loop.js';
import { freezeMount, sparseFile, type Loop, type Mount } from '../../support/loop.js';
import { findTool, requires } from '../../support/requires.js';
import { tempDir } from '../../support/tmp.js';
import {
  WORKLOAD_NEEDS,
  logOf,
  readAcknowledged,
  startWorkload,
  type LoadKind,
} from '../../support/workload.js';
import { CHECK_TOOLS, faultsOf, type CheckedFileSystem } from '../../support/workload-check.js';
import { LateAnswer, Watching, nanoseconds } from '../../support/workload-watch.js';

const MIB = 1024 * 1024;
const ASKED = process.env['B2_PROOF_POINTS'];
const POINTS = Number(ASKED ?? 9);
const SECONDS = ASKED === undefined ? 5 : Math.max(30, POINTS / 3);
const FREEZES = ASKED === undefined ? 1 : Math.ceil(POINTS / 40);
/** Of the frozen ones, every so many-th is followed by a point of class fs. */
const QUIESCE_EVERY = 3;
/** So many points of each disk are restored by the command; the rest through the same image without a process of its own. */
const BY_COMMAND = 3;
const INTERVAL_MS = ASKED === undefined ? 200 : 400;
/** For a machine that is busy with other things: less than 1. */
const SPEED = Number(process.env['B2_PROOF_SPEED'] ?? 1);
/** Mean pauses: a moderate load, so that there is time for points on a small machine. */
const PAUSES_MS: Readonly<Record<'sqlite' | 'fio' | 'files', number>> = {
  sqlite: 15 / SPEED,
  fio: 20 / SPEED,
  files: 60 / SPEED,
};
const SIZES: Readonly<Record<CheckedFileSystem, number>> = { ext4: 96, xfs: 304, btrfs: 160 };
const TYPES = ['ext4', 'xfs', 'btrfs'] as const;

interface Bed {
  readonly type: CheckedFileSystem;
  readonly loop: Loop;
  readonly mount: Mount;
  readonly volume: string;
  /** Points to look at: sequence number, and a copy of the device at that moment where there is one. */
  readonly chosen: Map<number, string | undefined>;
}

function run(name: string, ...args: string[]): void {
  execFileSync(findTool(name) ?? name, args, { stdio: 'pipe' });
}

/** Programs that were killed may still be on their way out. */
async function unmountSoon(mount: Mount): Promise<void> {
  for (let tries = 0; ; tries++) {
    try {
      await mount.unmount();
      return;
    } catch (error) {
      if (tries === 50) throw error;
      // `unmount` is done only once; what failed is tried again by hand.
      await systemClock.sleep(100);
      try {
        run('umount', mount.path);
        return;
      } catch {
        continue;
      }
    }
  }
}

/**
 * The device is off. Unmounting is not enough: a program that took a copy of all mounts (a name space of its own, as mmdebstrap
 * makes) keeps the file system alive in it.
 */
async function releaseSoon(loop: Loop): Promise<void> {
  await loop.detach();
  const backing = `/sys/block/${loop.device.replace('/dev/', '')}/loop/backing_file`;
  const isHeld = (): boolean =>
    existsSync(backing) && readFileSync(backing, 'utf8').startsWith(loop.file);
  for (let waited = 0; isHeld(); waited += 200) {
    if (waited > 120_000)
      throw new Error(
        `${loop.device} is still in use by somebody, two minutes after it was unmounted`,
      );
    await systemClock.sleep(200);
  }
}

/** Freezes the file system, has a point made, and copies the device, all before it is thawed. */
async function frozenPoint(watching: Watching, bed: Bed, copy: string): Promise<number> {
  await freezeMount(bed.mount.path);
  try {
    const made = await watching.point(bed.volume, 'crash');
    run('cp', '--sparse=always', bed.loop.file, copy);
    return made.point.seq;
  } finally {
    run('fsfreeze', '--unfreeze', bed.mount.path);
  }
}

async function restoreByCommand(
  b2: B2,
  volume: string,
  file: string,
  seq: number,
): Promise<bigint> {
  const { point } = await b2.json<RestoreAnswer>([
    'restore',
    volume,
    file,
    '--at',
    `#${seq}`,
    '--no-verify',
  ]);
  return nanoseconds(point.time);
}

/** The repository, read by this process. */
class Images implements AsyncDisposable {
  private readonly repo: Repository;
  private readonly buffer = Buffer.alloc(MIB);

  private constructor(repo: Repository) {
    this.repo = repo;
  }

  static async open(directory: string): Promise<Images> {
    const env = { clock: systemClock, random: systemRandom, owner: currentIdentity() };
    return new Images(await Repository.open(await openStore(directory), [], env));
  }

  /** Writes the volume as it was at a point to a new file; resolves to the point's instant. */
  async restore(name: string, file: string, seq: number): Promise<bigint> {
    const meta = (await listVolumes(this.repo, () => undefined)).find((m) => m.name === name);
    if (meta === undefined) throw new Error(`no volume ${name}`);
    const history = await VolumeHistory.open(this.repo, meta.id);
    const image = await openImage(history, meta, seq);
    const fd = openSync(file, 'wx');
    try {
      const commit = await new Timeline(history.sources).bySeq(seq);
      if (commit === undefined) throw new Error(`no point #${seq}`);
      ftruncateSync(fd, image.sizeBytes);
      for (const run of await image.extents(0, image.sizeBytes)) {
        if (run.hole) continue;
        for (let at = run.offset; at < run.offset + run.length; at += MIB) {
          const part = this.buffer.subarray(0, Math.min(MIB, run.offset + run.length - at));
          await image.read(part, at);
          writeSync(fd, part, 0, part.length, at);
        }
      }
      return commit.instantNs;
    } finally {
      closeSync(fd);
      await image.close();
      await history.close();
    }
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.repo.close();
  }
}

describe('points of b2 watch under load', () => {
  requires({
    ...LOOP_NEEDS,
    tools: [
      ...(LOOP_NEEDS.tools ?? []),
      ...(WORKLOAD_NEEDS.tools ?? []),
      ...CHECK_TOOLS,
      ...TYPES.map(makerOf),
    ],
    paths: [...(LOOP_NEEDS.paths ?? []), TRACEFS],
  }).it(
    'are sound file systems with sound databases and everything acknowledged, and what the device was when frozen',
    async () => {
      await using dir = tempDir();
      const b2 = new B2(dir, { B2_RUNTIME_DIR: dir.join('run') });
      await b2.json(['init', '--encryption', 'none']);
      const beds: Bed[] = [];
      for (const type of TYPES) {
        const loop = await attachLoop(dir, sparseFile(dir, type, SIZES[type] * MIB));
        await makeFileSystem(type, loop.device);
        const mount = await mountDevice(dir, loop.device, `mnt-${type}`);
        const volume = `${hostname()}/${loop.device.replace('/dev/', '')}`;
        beds.push({ type, loop, mount, volume, chosen: new Map() });
      }
      const devices = beds.map((bed) => bed.loop.device);
      const watching = Watching.start(
        dir,
        b2,
        ...devices,
        '--interval',
        `${INTERVAL_MS}ms`,
        // The disks are busy, and may be slow.
        '--freeze-limit',
        '3s',
      );
      await watching.ready(beds.length);
      const loads = beds.flatMap((bed) =>
        (['sqlite', 'fio', 'files'] as const).map((kind) =>
          startWorkload(dir, kind, bed.mount.path, bed.type, PAUSES_MS[kind]),
        ),
      );
      let frozen = 0;
      let quiesced = 0;
      let refused = 0;
      try {
        for (let i = 0; i < FREEZES; i++) {
          await systemClock.sleep((SECONDS * 1000) / (FREEZES + 1));
          for (const bed of beds) {
            const copy = dir.join(`${bed.type}-${i}.frozen`);
            bed.chosen.set(await frozenPoint(watching, bed, copy), copy);
            frozen++;
            if (i % QUIESCE_EVERY !== 0) continue;
            // And one for which b2 freezes by itself. It says no rather than let writers wait longer than the limit.
            try {
              bed.chosen.set((await watching.point(bed.volume, 'fs')).point.seq, undefined);
              quiesced++;
            } catch (error) {
              // Nor does it hurry a disk that is too busy; that it can be had at all is seen in the short run.
              if (ASKED === undefined || !(error instanceof B2Error || error instanceof LateAnswer))
                throw error;
              refused++;
            }
          }
        }
        await systemClock.sleep((SECONDS * 1000) / (FREEZES + 1));
      } finally {
        for (const load of loads) await load.stop();
      }
      await watching.stop();
      // Two devices of one btrfs would be taken for one: the originals go before a copy comes.
      for (const bed of beds) {
        await unmountSoon(bed.mount);
        await releaseSoon(bed.loop);
      }
      expect(watching.troubles).toEqual([]);

      await using images = await Images.open(b2.repository);
      const faults: string[] = [];
      const told: string[] = [];
      let looked = 0;
      for (const bed of beds) {
        const points = watching.points.filter((p) => p.device === bed.loop.device);
        const exact = points.slice(1);
        expect(exact.filter((p) => p.coverage === 'unknown')).toEqual([]);
        const more = Math.max(0, Math.ceil(POINTS / beds.length) - bed.chosen.size);
        for (let k = 0; k < more; k++) {
          const point = exact[Math.floor(((k + 1) * exact.length) / more) - 1];
          if (point !== undefined && !bed.chosen.has(point.seq))
            bed.chosen.set(point.seq, undefined);
        }
        const log = readAcknowledged(logOf(dir, bed.type, 'sqlite' satisfies LoadKind));
        expect(log.length).toBeGreaterThan(20);
        let byCommand = BY_COMMAND;
        for (const [seq, copy] of bed.chosen) {
          const file = dir.join(`${bed.type}-${seq}.img`);
          const instantNs =
            byCommand-- > 0
              ? await restoreByCommand(b2, bed.volume, file, seq)
              : await images.restore(bed.volume, file, seq);
          if (copy !== undefined) {
            try {
              run('cmp', file, copy);
            } catch {
              faults.push(`${bed.type} #${seq}: differs from the device when it was frozen`);
            }
            rmSync(copy);
          }
          for (const fault of await faultsOf(dir, { type: bed.type, file, instantNs, sqlite: log }))
            faults.push(`${bed.type} #${seq}: ${fault}`);
          rmSync(file);
          looked++;
        }
        told.push(`${bed.type} ${points.length} points and ${log.length} transactions`);
      }
      process.stderr.write(
        `exactness: ${told.join(', ')}; ${looked} looked at, ${frozen} of them compared frozen, ${quiesced} of class fs (${refused} refused); ${faults.length} faults\n`,
      );
      expect(faults).toEqual([]);
      expect(looked).toBeGreaterThanOrEqual(Math.min(POINTS, beds.length * 3));
    },
    ASKED === undefined ? 240_000 : 7_200_000,
  );
});
