/** Cartridges on file systems that are really full, without a size given: the end of the disk is the end of the tape. */
import { execFileSync } from 'node:child_process';
import { mkdirSync, readFileSync, rmSync, symlinkSync, writeFileSync } from 'node:fs';
import { afterEach, expect } from 'vitest';
import { systemClock } from '../../../src/clock.js';
import { FileDrive } from '../../../src/devices/tape/file-drive.js';
import type { TapeDrive } from '../../../src/devices/tape/drive.js';
import { VolumeHistory } from '../../../src/repo/history.js';
import { choosePoint, openBlockMap } from '../../../src/repo/point.js';
import { listVolumes } from '../../../src/repo/volume.js';
import { openTapeView, restoreFromTape } from '../../../src/tape/import.js';
import type { CartridgeSource } from '../../../src/tape/media.js';
import { parseWhen } from '../../../src/when.js';
import { requires } from '../../support/requires.js';
import { testImage } from '../../support/scan-bed.js';
import { BED_ENVIRONMENT, PASSWORD, TapeBed } from '../../support/tape-bed.js';

const MIB = 1024 * 1024;
const { describe, it } = requires({ root: true, tools: ['mount', 'umount'] });

const undo: (() => Promise<void>)[] = [];
afterEach(async () => {
  for (const one of undo.splice(0).toReversed()) await one();
});

async function newBed(image: Buffer): Promise<TapeBed> {
  const bed = await TapeBed.make();
  undo.push(() => bed.remove());
  await bed.capture(image);
  return bed;
}

/** A tmpfs of `mib` MiB. */
function disk(bed: TapeBed, name: string, mib: number): string {
  const path = bed.dir.join(name);
  mkdirSync(path);
  execFileSync('mount', ['-t', 'tmpfs', '-o', `size=${mib}m`, 'b2-test', path]);
  undo.push(async () => {
    await Promise.resolve(execFileSync('umount', ['-l', path]));
  });
  return path;
}

/** Cartridges 1, 2, … of `mib` MiB each, as directories or as files. */
async function library(
  bed: TapeBed,
  kind: 'directory' | 'file',
  count: number,
  mib: number,
): Promise<{
  drive: FileDrive;
  source: CartridgeSource;
  first: () => Promise<void>;
  disks: readonly string[];
}> {
  const link = bed.dir.join('drive');
  const disks = Array.from({ length: count }, (_, i) => disk(bed, `disk-${i}`, mib));
  const put = (i: number): void => {
    rmSync(link, { force: true });
    symlinkSync(`${disks[i] ?? ''}/cartridge`, link);
  };
  for (const path of disks) {
    if (kind === 'directory') mkdirSync(`${path}/cartridge`);
    else writeFileSync(`${path}/cartridge`, '');
  }
  let at = 0;
  put(0);
  const drive = await FileDrive.open(`file:${link}`);
  undo.push(() => drive.close());
  return {
    drive,
    disks,
    source: {
      next: () => {
        if (++at >= count) return Promise.resolve(false);
        put(at);
        return Promise.resolve(true);
      },
    },
    first: () => {
      at = 0;
      put(0);
      return drive.load();
    },
  };
}

async function restored(bed: TapeBed, drive: TapeDrive, source: CartridgeSource): Promise<Buffer> {
  const view = await openTapeView(drive, [PASSWORD], BED_ENVIRONMENT, () => undefined);
  const [volume] = await listVolumes(view.repo, () => undefined);
  if (volume === undefined) throw new Error('no volume');
  const history = await VolumeHistory.open(view.repo, volume.id);
  const when = parseWhen('latest', systemClock.nowNs());
  const { commit } = await choosePoint(history, volume, when, () => undefined);
  const target = bed.dir.join('restored');
  const result = await restoreFromTape({
    drive,
    source,
    view,
    map: await openBlockMap(history, commit.seq),
    volumeId: volume.id,
    commit,
    needs: [],
    target,
    force: true,
    verify: true,
    workers: 0,
    clock: systemClock,
    events: () => undefined,
  });
  await history.close();
  await view.repo.close();
  expect(result.isWhole).toBe(true);
  return readFileSync(target);
}

describe('a disk that is full', () => {
  for (const kind of ['directory', 'file'] as const) {
    it(`is the end of a cartridge that is a ${kind}, and the set goes on on the next one`, async () => {
      const image = testImage(31, 24 * MIB);
      const bed = await newBed(image);
      const { drive, source, first } = await library(bed, kind, 8, 4);
      const done = await bed.export(drive, [await bed.point()], { source });
      expect(done.isWhole).toBe(true);
      expect(done.cartridges.length).toBeGreaterThan(2);
      expect(done.cartridges.slice(0, -1).every((c) => c.full)).toBe(true);
      await first();
      expect((await restored(bed, drive, source)).equals(image)).toBe(true);
    });

    it(`that fills up suddenly, under a cartridge that is a ${kind}, loses nothing`, async () => {
      const image = testImage(32, 16 * MIB);
      const bed = await newBed(image);
      const { drive, source, first, disks } = await library(bed, kind, 3, 12);
      const ballast = `${disks[0] ?? ''}/ballast`;
      // Somebody else takes the rest of the disk while a record is on its way.
      const write = drive.write.bind(drive);
      let writes = 0;
      drive.write = async (data) => {
        if (++writes === 6) {
          try {
            writeFileSync(ballast, Buffer.alloc(12 * MIB));
          } catch (error) {
            expect(error).toMatchObject({ code: 'ENOSPC' });
          }
        }
        return write(data);
      };
      const done = await bed.export(drive, [await bed.point()], { source });
      expect(done.isWhole).toBe(true);
      expect(done.cartridges.length).toBe(2);
      expect(done.cartridges[0]).toMatchObject({ full: true, verified: true });
      await first();
      expect((await restored(bed, drive, source)).equals(image)).toBe(true);
    });
  }

  it('without another cartridge says so, and what was written counts', async () => {
    const image = testImage(33, 12 * MIB);
    const bed = await newBed(image);
    const small = await library(bed, 'directory', 2, 3);
    await expect(bed.export(small.drive, [await bed.point()])).rejects.toMatchObject({
      kind: 'no-space',
      message: expect.stringContaining('SET-001 is full') as string,
    });
    const more = await bed.export(small.drive, [await bed.point()], {
      source: small.source,
      sinceLast: true,
    });
    expect(more.cartridges).toMatchObject([{ label: 'SET-002', verified: true }]);
    expect(more.points[0]?.needs).toEqual(['SET-001']);
    // The second cartridge names what is on the first; the first cannot know of the second.
    const first: CartridgeSource = { next: () => small.first().then(() => true) };
    await small.drive.load();
    expect((await restored(bed, small.drive, first)).equals(image)).toBe(true);
  });
});
