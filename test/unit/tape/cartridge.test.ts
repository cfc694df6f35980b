import { writeFileSync } from 'node:fs';
import { afterEach, describe, expect, it } from 'vitest';
import { FileDrive } from '../../../src/devices/tape/file-drive.js';
import { readLabel } from '../../../src/tape/cartridge.js';
import { noise } from '../../support/disks.js';
import { FixedBlockDrive } from '../../support/fixed-block-drive.js';
import { TapeBed } from '../../support/tape-bed.js';
import { restore } from '../../support/tape-restore.js';
import { tapeDriveSuite } from '../../support/tape-suite.js';
import { tempDir } from '../../support/tmp.js';

const KIB = 1024;
const cleanUp: (() => Promise<void>)[] = [];
afterEach(async () => {
  for (const done of cleanUp.splice(0)) await done();
});

describe('a drive that has only fixed blocks', () => {
  const open = async (path: string, blockBytes: number, most?: number): Promise<FixedBlockDrive> =>
    new FixedBlockDrive(await FileDrive.open(`file:${path}`), blockBytes, most);

  tapeDriveSuite(async () => {
    const dir = tempDir();
    cleanUp.push(() => dir.remove());
    writeFileSync(dir.join('c.tape'), '');
    return open(dir.join('c.tape'), 512);
  });

  it('reads cartridges whatever block length it and they have', async () => {
    const bed = await TapeBed.make();
    cleanUp.push(() => bed.remove());
    const image = Buffer.from(noise(60, 600 * KIB).buffer);
    await bed.capture(image);
    for (const recordBytes of [4 * KIB, 64 * KIB, 256 * KIB, 1024 * KIB]) {
      const path = bed.cartridge(`c${recordBytes}`);
      const blank = await open(path, 512);
      expect(await readLabel(blank)).toMatchObject({ kind: 'blank' });
      const setName = `S${recordBytes}`;
      const done = await bed.export(blank, [await bed.point()], { recordBytes, setName });
      expect(done.isWhole).toBe(true);
      await blank.close();
      for (const found of [0, 512, recordBytes, 80 * KIB]) {
        const drive = await open(path, found, Math.max(recordBytes, 256 * KIB));
        expect(await readLabel(drive)).toMatchObject({ kind: 'b2', label: { recordBytes } });
        expect((await drive.status()).blockBytes).toBe(recordBytes);
        const { result, bytes } = await restore(bed, drive);
        expect(result.isWhole).toBe(true);
        expect(bytes.equals(image)).toBe(true);
        await drive.close();
      }
    }
  });

  it('is not taken for blank with something else in it', async () => {
    const dir = tempDir();
    cleanUp.push(() => dir.remove());
    for (const [name, blockBytes] of [
      ['known', 64 * KIB],
      ['odd', 96 * KIB],
    ] as const) {
      const path = dir.join(name);
      writeFileSync(path, '');
      const writer = await FileDrive.open(`file:${path}`);
      await writer.setRecordBytes(blockBytes, true);
      await writer.write([Buffer.alloc(blockBytes, 0x55)]);
      await writer.writeMarks(1);
      await writer.close();
      const drive = await open(path, 512);
      expect(await readLabel(drive)).toMatchObject({ kind: 'foreign' });
      await drive.close();
    }
  });
});
