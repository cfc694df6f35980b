/** Reading back what {@link TapeBed} has exported: one point, or all of the repository. */
import { mkdirSync, readFileSync, readdirSync } from 'node:fs';
import { expect } from 'vitest';
import { systemClock } from '../../src/clock.js';
import type { TapeDrive } from '../../src/devices/tape/drive.js';
import { ignoreEvents } from '../../src/events.js';
import { VolumeHistory } from '../../src/repo/history.js';
import { choosePoint, openBlockMap, openImage } from '../../src/repo/point.js';
import { Repository } from '../../src/repo/repository.js';
import { openDirectoryStore } from '../../src/repo/store-directory.js';
import { listVolumes } from '../../src/repo/volume.js';
import {
  openTapeView,
  restoreFromTape,
  type TapeRestoreOptions,
  type TapeRestoreResult,
} from '../../src/tape/import.js';
import { importRepository, type ImportResult } from '../../src/tape/import-repository.js';
import type { CartridgeSource } from '../../src/tape/media.js';
import { verify } from '../../src/verify/verify.js';
import { parseWhen } from '../../src/when.js';
import { BED_ENVIRONMENT, PASSWORD, type TapeBed } from './tape-bed.js';

/** A point of the only volume, straight from the cartridge in the drive and those that `source` brings. */
export async function restore(
  bed: TapeBed,
  drive: TapeDrive,
  at = 'latest',
  more: Partial<TapeRestoreOptions> = {},
): Promise<{ result: TapeRestoreResult; bytes: Buffer }> {
  const events: unknown[] = [];
  const view = await openTapeView(drive, [PASSWORD], BED_ENVIRONMENT, (text) => events.push(text));
  try {
    const [volume] = await listVolumes(view.repo, () => undefined);
    if (volume === undefined) throw new Error('no volume');
    const history = await VolumeHistory.open(view.repo, volume.id);
    const { commit } = await choosePoint(
      history,
      volume,
      parseWhen(at, systemClock.nowNs()),
      () => undefined,
    );
    const target = bed.dir.join(
      `restored-${Math.trunc(performance.timeOrigin + performance.now())}`,
    );
    const result = await restoreFromTape({
      drive,
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
      events: (e) => bed.events.push(e),
      ...more,
    });
    await history.close();
    return { result, bytes: readFileSync(target) };
  } finally {
    await view.repo.close();
  }
}

/** Brings the repository back into a new place, and checks every whole point of it bit for bit. */
export async function bringBack(
  bed: TapeBed,
  drive: TapeDrive,
  source: CartridgeSource | undefined,
  images: ReadonlyMap<number, Buffer>,
): Promise<ImportResult> {
  const place = bed.dir.join(`back-${images.size}-${readdirSync(bed.dir.join('.')).length}`);
  mkdirSync(place);
  const result = await importRepository({
    drive,
    source,
    store: await openDirectoryStore(place),
    secrets: [PASSWORD],
    env: BED_ENVIRONMENT,
    workers: 0,
    clock: systemClock,
    events: (e) => bed.events.push(e),
  });
  const repo = await Repository.open(await openDirectoryStore(place), [PASSWORD], BED_ENVIRONMENT);
  const [volume] = await listVolumes(repo, () => undefined);
  if (volume === undefined) throw new Error('no volume');
  const history = await VolumeHistory.open(repo, volume.id);
  for (const point of result.points) {
    const image = await openImage(history, volume, point.seq);
    const bytes = Buffer.alloc(image.sizeBytes);
    const read = image.read(bytes, 0);
    if (!point.whole) {
      await expect(read).rejects.toMatchObject({ kind: 'damaged' });
      continue;
    }
    await read;
    const expected = images.get(point.seq);
    if (expected === undefined) throw new Error(`no image of point ${point.seq}`);
    expect(bytes.equals(expected)).toBe(true);
  }
  if (result.isWhole) {
    const report = await verify(repo, {
      dataShare: 1,
      storeUrl: undefined,
      workers: 0,
      events: ignoreEvents,
    });
    expect(report.findings.filter((f) => f.severity !== 'note')).toEqual([]);
  }
  await history.close();
  await repo.close();
  return result;
}
