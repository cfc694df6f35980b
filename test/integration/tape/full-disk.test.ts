/** Cartridges on file systems that are really full, without a size given: the end of the disk is the end of the tape. */
import { execFileSync } from 'node:child_process';
import { mkdirSync, rmSync, symlinkSync, writeFileSync } from 'node:fs';
import { afterEach, expect } from 'vitest';
import { FileDrive } from '../../../src/devices/tape/file-drive.js';
import type { CartridgeSource } from '../../../src/tape/media.js';
import { requires } from '../../support/requires.js';
import { testImage } from '../../support/scan-bed.js';
import { TapeBed } from '../../support/tape-bed.js';
import { restore } from '../../support/tape-restore.js';

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
      const { result, bytes } = await restore(bed, drive, 'latest', { source });
      expect(result.isWhole).toBe(true);
      expect(bytes.equals(image)).toBe(true);
    });

    it(`that fills up suddenly, under a cartridge that is a ${kind}, loses nothing`, async () => {
      const image = testImage(32, 16 * MIB);
      const bed = await newBed(image);
      const { drive, source, first, disks } = await library(bed, kind, 3, 12);
      const ballast = `${disks[0] ?? ''}/ballast`;
      // Somebody else takes the rest of the disk while a record is on its way.
      const write = drive.write.bind(drive);
      let writes = 0;
      drive.write = async (parts) => {
        if (++writes === 6) {
          try {
            writeFileSync(ballast, Buffer.alloc(12 * MIB));
          } catch (error) {
            expect(error).toMatchObject({ code: 'ENOSPC' });
          }
        }
        return write(parts);
      };
      const done = await bed.export(drive, [await bed.point()], { source });
      expect(done.isWhole).toBe(true);
      expect(done.cartridges.length).toBe(2);
      expect(done.cartridges[0]).toMatchObject({ full: true, verified: true });
      await first();
      const { result, bytes } = await restore(bed, drive, 'latest', { source });
      expect(result.isWhole).toBe(true);
      expect(bytes.equals(image)).toBe(true);
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
    const { result, bytes } = await restore(bed, small.drive, 'latest', { source: first });
    expect(result.isWhole).toBe(true);
    expect(bytes.equals(image)).toBe(true);
  });
});
