import { execFileSync } from 'node:child_process';
import { copyFileSync, readFileSync, renameSync, rmSync, statSync, writeFileSync } from 'node:fs';
import { afterEach, describe, expect, it } from 'vitest';
import { systemClock } from '../../../src/clock.js';
import { FileDrive } from '../../../src/devices/tape/file-drive.js';
import { openTapeView } from '../../../src/tape/import.js';
import { decodeTarHeader } from '../../../src/format/tape-tar.js';
import { listCartridges, putCartridge } from '../../../src/tape/catalogue.js';
import { verifyTape } from '../../../src/tape/verify.js';
import { Repository as ForeignRepository, extract, list } from '../../extractor/extract.mjs';
import { testImage } from '../../support/scan-bed.js';
import { BED_ENVIRONMENT, PASSWORD, TapeBed, tapeFiles } from '../../support/tape-bed.js';
import { bringBack, restore } from '../../support/tape-restore.js';

const MIB = 1024 * 1024;
const beds: TapeBed[] = [];
afterEach(async () => {
  for (const bed of beds.splice(0)) await bed.remove();
});

async function newBed(...args: Parameters<typeof TapeBed.make>): Promise<TapeBed> {
  const bed = await TapeBed.make(...args);
  beds.push(bed);
  return bed;
}

describe('one cartridge', () => {
  it('holds a point that restores from it alone, and every file is a tar archive', async () => {
    const bed = await newBed();
    const image = testImage(1, 14 * MIB + 1000);
    await bed.capture(image);
    const path = bed.cartridge('c1');
    const drive = await FileDrive.open(`file:${path}`);
    const done = await bed.export(drive, [await bed.point()]);
    expect(done.isWhole).toBe(true);
    expect(done.cartridges).toMatchObject([{ label: 'SET-001', verified: true, firstFile: 1 }]);
    const files = tapeFiles(path);
    expect(files.length).toBeGreaterThan(4);
    for (const file of files) execFileSync('tar', ['-b', '128', '-tf', `${path}/${file}`]);
    const { result, bytes } = await restore(bed, drive);
    expect(result).toMatchObject({ isWhole: true, missingRanges: [], damaged: [] });
    expect(bytes.equals(image)).toBe(true);
    await drive.close();
  });
});

describe('several cartridges', () => {
  it('a set goes on over as many as it takes, and any copy of a directory will do', async () => {
    const bed = await newBed();
    const image = testImage(2, 30 * MIB);
    await bed.capture(image);
    const { drive, source, path } = await bed.library('lib', '?size=5M&reserve=1500K');
    const done = await bed.export(drive, [await bed.point()], { source });
    expect(done.cartridges.length).toBeGreaterThan(2);
    expect(done.cartridges.map((c) => c.full).slice(0, -1)).not.toContain(false);
    for (const [i] of done.cartridges.entries())
      for (const file of tapeFiles(path(i + 1)))
        execFileSync('tar', ['-b', '128', '-tf', `${path(i + 1)}/${file}`]);
    await drive.close();
    const again = await bed.library('lib');
    const { result, bytes } = await restore(bed, again.drive, 'latest', { source: again.source });
    expect(result).toMatchObject({
      isWhole: true,
      cartridges: done.cartridges.map((c) => c.label),
    });
    expect(bytes.equals(image)).toBe(true);
    await again.drive.close();
  });

  it('without an early warning the archives are whole all the same', async () => {
    const bed = await newBed({ encryption: 'none' });
    const image = testImage(3, 30 * MIB);
    await bed.capture(image);
    const { drive, source, path } = await bed.library('lib', '?size=4M&fault=nowarn');
    const done = await bed.export(drive, [await bed.point()], { source });
    expect(done.cartridges.length).toBeGreaterThan(2);
    for (const [i] of done.cartridges.entries())
      for (const file of tapeFiles(path(i + 1)))
        execFileSync('tar', ['-b', '128', '-tf', `${path(i + 1)}/${file}`]);
    await drive.close();
    const again = await bed.library('lib');
    const { result, bytes } = await restore(bed, again.drive, 'latest', { source: again.source });
    expect(result).toMatchObject({ isWhole: true, missingPacks: [] });
    expect(bytes.equals(image)).toBe(true);
    await again.drive.close();
  });
});

describe('incremental sets', () => {
  it('restore with the cartridges in any order, also where the first export was interrupted', async () => {
    const bed = await newBed();
    const image = testImage(30, 10 * MIB);
    await bed.capture(image);
    const size = '?size=3M&reserve=1M';
    const first = await bed.library('lib', size, [1]);
    await expect(
      bed.export(first.drive, [await bed.point()], { source: first.source }),
    ).rejects.toMatchObject({ kind: 'no-space' });
    await first.drive.close();
    const rest = await bed.library('lib', size, [2, 3]);
    const done = await bed.export(rest.drive, [await bed.point()], {
      sinceLast: true,
      source: rest.source,
    });
    await rest.drive.close();
    expect(done.points[0]?.needs).toEqual(['SET-001']);
    const numbers = [1, ...done.cartridges.map((c) => c.number)];
    for (const order of [numbers, numbers.toReversed()]) {
      const { drive, source } = await bed.library('lib', size, order);
      const { result, bytes } = await restore(bed, drive, 'latest', { source });
      expect(result).toMatchObject({ isWhole: true, missingPacks: [], damaged: [] });
      expect(result.cartridges.toSorted()).toEqual(numbers.map((n) => `SET-00${n}`));
      expect(bytes.equals(image)).toBe(true);
      await drive.close();
    }
    // With the last alone, it is said which others there are.
    const last = await bed.library('lib', size, numbers.slice(-1));
    const { result } = await restore(bed, last.drive, 'latest', { source: last.source });
    expect(result).toMatchObject({
      isWhole: false,
      unreadCartridges: numbers.slice(0, -1).map((n) => `SET-00${n}`),
    });
    await last.drive.close();
  });

  it('write only what the set does not hold; every point of the set restores', async () => {
    const bed = await newBed();
    const first = testImage(4, 10 * MIB);
    await bed.capture(first);
    const { drive, source } = await bed.library('lib');
    const one = await bed.export(drive, [await bed.point()]);
    const second = Buffer.from(first);
    testImage(5, 300_000).copy(second, 3 * MIB + 4096);
    await bed.capture(second);
    const two = await bed.export(drive, [await bed.point()], { sinceLast: true });
    expect(two.setId).toBe(one.setId);
    expect(two.chunks).toBeLessThan(12);
    expect(two.cartridges).toMatchObject([
      { label: 'SET-001', firstFile: one.cartridges[0]?.endFile },
    ]);
    expect(two.points[0]?.needs).toEqual(['SET-001']);
    const none = await bed.export(drive, [await bed.point()], { sinceLast: true });
    expect(none.chunks).toBe(0);
    for (const [at, image] of [
      ['latest', second],
      ['#1', first],
    ] as const) {
      const { result, bytes } = await restore(bed, drive, at, { source });
      expect(result.isWhole).toBe(true);
      expect(bytes.equals(image)).toBe(true);
    }
    await drive.close();
  });
});

describe('a repository from tapes alone', () => {
  it('has every point of the set again; with a cartridge missing, those that do not need it', async () => {
    const bed = await newBed();
    const images = new Map<number, Buffer>();
    const first = testImage(6, 14 * MIB + 512);
    images.set(1, first);
    await bed.capture(first, 'v', 'first');
    const { drive, source, path } = await bed.library('lib', '?size=4M&reserve=1200K');
    const one = await bed.export(drive, [await bed.point()], { source });
    expect(one.cartridges.length).toBeGreaterThan(1);
    const second = Buffer.from(first);
    testImage(7, 2 * MIB).copy(second, 5 * MIB);
    images.set(2, second);
    await bed.capture(second);
    await bed.export(drive, [await bed.point()], { source, sinceLast: true });
    // A third point that shares nothing with the others.
    const third = testImage(8, 14 * MIB + 512);
    images.set(3, third);
    await bed.capture(third);
    const three = await bed.export(drive, [await bed.point()], { source, sinceLast: true });
    await drive.close();

    const all = await bed.library('lib');
    const whole = await bringBack(bed, all.drive, all.source, images);
    expect(whole.points.map((p) => [p.seq, p.whole])).toEqual([
      [1, true],
      [2, true],
      [3, true],
    ]);
    expect(whole).toMatchObject({ isWhole: true, missingCartridges: [], damagedPacks: [] });
    await all.drive.close();

    // Without the second cartridge, which the first two points need.
    const last = three.cartridges.at(-1)?.number ?? 0;
    const rest = Array.from({ length: last }, (_, i) => last - i).filter((n) => n !== 2);
    const some = await bed.library('lib', '', rest);
    const part = await bringBack(bed, some.drive, some.source, images);
    expect(part.missingCartridges).toEqual(['SET-002']);
    const wholeNow = new Map(part.points.map((p) => [p.seq, p.whole]));
    expect(wholeNow.get(1)).toBe(false);
    const needs =
      three.points[0]?.needs.includes('SET-002') === true ||
      three.cartridges.some((c) => c.label === 'SET-002');
    expect(wholeNow.get(3)).toBe(!needs);
    expect(part.points.find((p) => p.seq === 1)?.missingCartridges).toEqual(['SET-002']);
    await some.drive.close();
    expect(tapeFiles(path(1)).length).toBeGreaterThan(2);
  });
});

describe('points that were not written in order', () => {
  it('an older point exported after a newer one is in the repository that is brought back', async () => {
    const bed = await newBed();
    const images = new Map<number, Buffer>();
    for (const seq of [1, 2, 3, 4]) {
      const image = Buffer.from(images.get(seq - 1) ?? testImage(16, 3 * MIB));
      testImage(20 + seq, 200_000).copy(image, seq * 400_000);
      images.set(seq, image);
      await bed.capture(image, 'v', `p${seq}`);
    }
    const drive = await FileDrive.open(`file:${bed.cartridge('c1')}`);
    for (const at of ['#3', '#1', '#4', '#2'])
      await bed.export(drive, [await bed.point('v', at)], { sinceLast: true });
    for (const [seq, image] of images) {
      const { bytes } = await restore(bed, drive, `#${seq}`);
      expect(bytes.equals(image)).toBe(true);
    }
    const back = await bringBack(bed, drive, undefined, images);
    expect(back.points.map((p) => [p.seq, p.whole])).toEqual([
      [1, true],
      [2, true],
      [3, true],
      [4, true],
    ]);
    expect(back.isWhole).toBe(true);
    await drive.close();
    const out = bed.cartridge('out');
    for (const file of tapeFiles(bed.cartridge('c1')))
      execFileSync('tar', ['-b', '128', '-C', out, '-xf', `${bed.cartridge('c1')}/${file}`]);
    for (const packsOnly of [false, true]) {
      const foreign = new ForeignRepository(`${out}/b2-repository`, PASSWORD);
      const [volume] = list(foreign, packsOnly).volumes;
      expect(volume?.points.map((p) => [p.seq, p.first])).toEqual([1, 2, 3, 4].map((n) => [n, n]));
      for (const [seq, image] of images) {
        const file = `${out}/image-${packsOnly}-${seq}`;
        extract(foreign, packsOnly, volume?.id ?? '', String(seq), file, null);
        expect(readFileSync(file).equals(image)).toBe(true);
      }
      foreign.close();
    }
  });

  it('of a point that was written twice because of damage the whole copy counts', async () => {
    const bed = await newBed();
    const first = testImage(17, 4 * MIB);
    await bed.capture(first);
    const second = Buffer.from(first);
    testImage(18, 300_000).copy(second, 3 * MIB);
    await bed.capture(second);
    const path = bed.cartridge('c1');
    const drive = await FileDrive.open(`file:${path}`);
    await bed.export(drive, [await bed.point('v', '#1')]);
    await bed.export(drive, [await bed.point('v', '#2')], { sinceLast: true });
    const file = `${path}/000002.tar`;
    const bytes = readFileSync(file);
    bytes.writeUInt8((bytes[MIB] ?? 0) ^ 1, MIB);
    writeFileSync(file, bytes);
    const view = await openTapeView(drive, [PASSWORD], BED_ENVIRONMENT, () => undefined);
    const found = await verifyTape({
      drive,
      view,
      workers: 0,
      clock: systemClock,
      events: (e) => bed.events.push(e),
    });
    await view.repo.close();
    expect(found.damagedPacks.length).toBe(1);
    const record = (await listCartridges(bed.repo, () => undefined))[0];
    if (record === undefined) throw new Error('no cartridge');
    await putCartridge(bed.repo, {
      ...record,
      sessions: record.sessions.map((s) => ({ ...s, damagedPacks: found.damagedPacks })),
    });
    const again = await bed.export(
      drive,
      [await bed.point('v', '#1'), await bed.point('v', '#2')],
      { sinceLast: true },
    );
    expect(again.chunks).toBeGreaterThan(0);
    const images = new Map([
      [1, first],
      [2, second],
    ]);
    const back = await bringBack(bed, drive, undefined, images);
    expect(back.points.map((p) => [p.seq, p.whole])).toEqual([
      [1, true],
      [2, true],
    ]);
    expect(back).toMatchObject({ isWhole: true, damagedPacks: found.damagedPacks });
    await drive.close();
  });
});

describe('damage on a cartridge', () => {
  async function oneCartridge(): Promise<{
    bed: TapeBed;
    drive: FileDrive;
    path: string;
    image: Buffer;
  }> {
    const bed = await newBed();
    const image = testImage(9, 14 * MIB);
    await bed.capture(image);
    const path = bed.cartridge('c1');
    const drive = await FileDrive.open(`file:${path}`);
    await bed.export(drive, [await bed.point()], { dataFileBytes: MIB });
    await drive.close();
    return { bed, drive: await FileDrive.open(`file:${path}`), path, image };
  }

  async function expectRest(
    bed: TapeBed,
    drive: FileDrive,
    image: Buffer,
    mostBytes: number,
  ): Promise<void> {
    const { result, bytes } = await restore(bed, drive);
    expect(result.isWhole).toBe(false);
    const missing = result.missingRanges.reduce((sum, r) => sum + r.length, 0);
    expect(missing).toBeGreaterThan(0);
    expect(missing).toBeLessThanOrEqual(mostBytes);
    const expected = Buffer.from(image);
    for (const r of result.missingRanges) expected.fill(0, r.offset, r.offset + r.length);
    expect(bytes.equals(expected)).toBe(true);
  }

  async function check(bed: TapeBed, drive: FileDrive): ReturnType<typeof verifyTape> {
    const view = await openTapeView(drive, [PASSWORD], BED_ENVIRONMENT, () => undefined);
    try {
      return await verifyTape({
        drive,
        view,
        workers: 0,
        clock: systemClock,
        events: (e) => bed.events.push(e),
      });
    } finally {
      await view.repo.close();
    }
  }

  it('a flipped bit is found and named, and costs one frame', async () => {
    const { bed, drive, path, image } = await oneCartridge();
    expect((await check(bed, drive)).findings).toEqual([]);
    const file = `${path}/000003.tar`;
    const bytes = readFileSync(file);
    bytes.writeUInt8((bytes[200_000] ?? 0) ^ 4, 200_000);
    writeFileSync(file, bytes);
    const found = await check(bed, drive);
    expect(found.findings).toMatchObject([{ kind: 'pack', file: 3, record: 0, points: ['v #1'] }]);
    expect(found.findings[0]?.frames?.length).toBe(1);
    await expectRest(bed, drive, image, 5 * 65_536);
    await drive.close();
  });

  it('a pack whose footer is damaged is named, and costs nothing but the frames that are', async () => {
    const { bed, drive, path, image } = await oneCartridge();
    const file = `${path}/000003.tar`;
    const bytes = readFileSync(file);
    const header = decodeTarHeader(bytes, 1024);
    if (header === undefined) throw new Error('no pack where one should be');
    const end = 1536 + header.sizeBytes;
    bytes.writeUInt8((bytes[end - 60] ?? 0) ^ 4, end - 60);
    writeFileSync(file, bytes);
    const found = await check(bed, drive);
    expect(found.findings).toMatchObject([{ kind: 'pack', file: 3, frames: [], points: ['v #1'] }]);
    expect(found.findings[0]?.message).toContain('footer');
    expect((await restore(bed, drive)).bytes.equals(image)).toBe(true);
    // A frame in the middle as well: those behind it are found all the same.
    bytes.writeUInt8((bytes[200_000] ?? 0) ^ 4, 200_000);
    writeFileSync(file, bytes);
    const more = await check(bed, drive);
    expect(more.findings).toMatchObject([{ kind: 'pack', file: 3 }]);
    expect(more.findings[0]?.frames?.length).toBe(1);
    await expectRest(bed, drive, image, 5 * 65_536);
    const back = await bringBack(bed, drive, undefined, new Map());
    expect(back).toMatchObject({ isWhole: false, damagedPacks: [more.findings[0]?.packId] });
    await drive.close();
  });

  it('a torn record and one that cannot be read cost what lay in them', async () => {
    const { bed, path, image } = await oneCartridge();
    const bad = await FileDrive.open(`file:${path}?fault=bad@3:4`);
    const found = await check(bed, bad);
    expect(found.findings.map((f) => f.kind).toSorted()).toEqual(['pack', 'record']);
    expect(found.findings.find((f) => f.kind === 'record')).toMatchObject({ file: 3, record: 4 });
    await expectRest(bed, bad, image, 30 * 65_536);
    await bad.close();
    const file = `${path}/000003.tar`;
    writeFileSync(file, readFileSync(file).subarray(0, statSync(file).size - 70_000));
    const torn = await FileDrive.open(`file:${path}`);
    const again = await check(bed, torn);
    expect(again.findings.length).toBeGreaterThan(0);
    expect(again.findings.every((f) => f.file === 3)).toBe(true);
    await torn.close();
  });

  it('a lost file mark is found, and costs nothing', async () => {
    const { bed, path, image } = await oneCartridge();
    const two = Buffer.concat([
      readFileSync(`${path}/000002.tar`),
      readFileSync(`${path}/000003.tar`),
    ]);
    writeFileSync(`${path}/000002.tar`, two);
    rmSync(`${path}/000003.tar`);
    const count = tapeFiles(path).length;
    for (let n = 4; n <= count; n++)
      renameSync(
        `${path}/${String(n).padStart(6, '0')}.tar`,
        `${path}/${String(n - 1).padStart(6, '0')}.tar`,
      );
    const drive = await FileDrive.open(`file:${path}`);
    const found = await check(bed, drive);
    expect(found.findings.filter((f) => f.kind !== 'record')).toEqual([]);
    expect(found.findings[0]?.message).toContain('a file mark is lost');
    const { result, bytes } = await restore(bed, drive);
    expect(result.isWhole).toBe(true);
    expect(bytes.equals(image)).toBe(true);
    await drive.close();
  });

  it('a directory and contents that are destroyed cost nothing while one copy is left', async () => {
    const { bed, drive, path, image } = await oneCartridge();
    const file = `${path}/000001.tar`;
    writeFileSync(file, Buffer.alloc(statSync(file).size, 0x55));
    const { result, bytes } = await restore(bed, drive);
    expect(result.isWhole).toBe(true);
    expect(bytes.equals(image)).toBe(true);
    await drive.close();
  });
});

describe('what is refused, and what goes on', () => {
  it('a cartridge pulled in the middle fails the export; the next one overwrites what was left and is whole', async () => {
    const bed = await newBed();
    const image = testImage(10, 10 * MIB);
    await bed.capture(image);
    const path = bed.cartridge('c1');
    const pulled = await FileDrive.open(`file:${path}?fault=pull@40`);
    await expect(bed.export(pulled, [await bed.point()])).rejects.toMatchObject({ kind: 'io' });
    await pulled.close();
    const drive = await FileDrive.open(`file:${path}`);
    const done = await bed.export(drive, [await bed.point()]);
    expect(done.isWhole).toBe(true);
    expect(done.cartridges).toMatchObject([{ label: 'SET-001', firstFile: 1 }]);
    expect(bed.events).toContainEqual(
      expect.objectContaining({
        type: 'warning',
        message: expect.stringContaining('interrupted export') as string,
      }),
    );
    const { bytes } = await restore(bed, drive);
    expect(bytes.equals(image)).toBe(true);
    await drive.close();
  });

  it('what an interrupted first export left is begun anew wherever it broke off, but nothing that may have been finished', async () => {
    const bed = await newBed();
    await bed.capture(testImage(15, 5 * MIB));
    const points = [await bed.point()];
    const whole = bed.cartridge('whole');
    const first = await FileDrive.open(`file:${whole}`);
    await bed.export(first, points, { setName: 'ANEW', verify: false });
    await first.close();
    const files = tapeFiles(whole);
    await bed.repo.store.delete('tapes/ANEW-001');
    /** The cartridge as it was before the last bytes were written; the repository knows nothing of it. */
    const cut = (name: string, keep: number, lastBytes: number | undefined): string => {
      const path = bed.cartridge(name);
      copyFileSync(`${whole}/cartridge.json`, `${path}/cartridge.json`);
      for (const [i, file] of files.slice(0, keep).entries()) {
        const bytes = readFileSync(`${whole}/${file}`);
        const open = i === keep - 1 && lastBytes !== undefined;
        writeFileSync(
          `${path}/${file}${open ? '.part' : ''}`,
          open ? bytes.subarray(0, lastBytes) : bytes,
        );
      }
      return path;
    };
    const label = statSync(`${whole}/${files[0] ?? ''}`).size;
    for (const [name, keep, lastBytes] of [
      ['label-without-mark', 1, label],
      ['label-only', 1, undefined],
      ['within-the-directory', 2, 0],
      ['directory-only', 2, undefined],
      ['within-the-data', 3, 10 * 65_536],
    ] as const) {
      const drive = await FileDrive.open(`file:${cut(name, keep, lastBytes)}`);
      const done = await bed.export(drive, points, { verify: false });
      expect([name, done.cartridges[0]?.firstFile, done.setName]).toEqual([name, 1, 'ANEW']);
      await bed.repo.store.delete('tapes/ANEW-001');
      await drive.close();
    }
    // Behind the end of data some drives give out anything; a whole file of it may have been the contents.
    const junk = cut('junk-behind', 3, 10 * 65_536);
    renameSync(`${junk}/${files[2] ?? ''}.part`, `${junk}/${files[2] ?? ''}`);
    writeFileSync(`${junk}/000003.tar`, Buffer.alloc(65_536, 0x55));
    const closed = await FileDrive.open(`file:${junk}`);
    await expect(bed.export(closed, points)).rejects.toMatchObject({ kind: 'refused' });
    await closed.close();
    renameSync(`${junk}/000003.tar`, `${junk}/000003.tar.part`);
    const open = await FileDrive.open(`file:${junk}`);
    const anew = await bed.export(open, points, { verify: false });
    expect(anew.cartridges[0]?.firstFile).toBe(1);
    await open.close();
    await bed.repo.store.delete('tapes/ANEW-001');
    // Nothing but the last mark is missing: it was finished, and is added to.
    const behind = await FileDrive.open(
      `file:${cut('contents-without-mark', files.length, label)}`,
    );
    const more = await bed.export(behind, points, { verify: false });
    expect(more.cartridges).toMatchObject([{ label: 'ANEW-001', firstFile: files.length }]);
    await behind.close();
    await bed.repo.store.delete('tapes/ANEW-001');
    // Data that ends as it should, without contents: what a full cartridge may look like.
    const drive = await FileDrive.open(`file:${cut('perhaps-full', files.length - 1, undefined)}`);
    await expect(bed.export(drive, points)).rejects.toMatchObject({ kind: 'refused' });
    await drive.close();
  });

  it('a cartridge that was labelled and of which nothing is recorded is written from its beginning, unless a session is whole', async () => {
    const bed = await newBed();
    const image = testImage(17, 3 * MIB);
    await bed.capture(image);
    const points = [await bed.point()];
    const path = bed.cartridge('c1');
    const drive = await FileDrive.open(`file:${path}`);
    await bed.export(drive, points, { verify: false });
    const [record] = await listCartridges(bed.repo, () => undefined);
    if (record === undefined) throw new Error('no cartridge');
    // Killed before it was recorded: what is whole on the cartridge counts.
    await putCartridge(bed.repo, { ...record, sessions: [] });
    const kept = await bed.export(drive, points, { sinceLast: true });
    expect(kept).toMatchObject({ packs: 0, isWhole: true });
    expect(kept.cartridges[0]?.firstFile).toBe(record.sessions[0]?.endFile);
    await drive.close();
    // Killed between two files, where every archive on it ends as it should.
    const [first, second] = tapeFiles(path);
    for (const file of tapeFiles(path))
      if (file !== first && file !== second) rmSync(`${path}/${file}`);
    await putCartridge(bed.repo, { ...record, sessions: [] });
    const again = await FileDrive.open(`file:${path}`);
    const other = bed.export(again, points, { setName: 'OTHER' });
    await expect(other).rejects.toMatchObject({
      kind: 'refused',
      message: expect.stringContaining('nothing on it is needed') as string,
    });
    const done = await bed.export(again, points);
    expect(done.cartridges).toMatchObject([{ label: 'SET-001', firstFile: 1, verified: true }]);
    const { bytes } = await restore(bed, again);
    expect(bytes.equals(image)).toBe(true);
    await again.close();
  });

  it('a half-written session behind a whole one is overwritten by the next', async () => {
    const bed = await newBed();
    const image = testImage(11, 6 * MIB);
    await bed.capture(image);
    const path = bed.cartridge('c1');
    const drive = await FileDrive.open(`file:${path}`);
    await bed.export(drive, [await bed.point()]);
    const files = tapeFiles(path).length;
    await drive.close();
    const pulled = await FileDrive.open(`file:${path}?fault=pull@20`);
    await expect(bed.export(pulled, [await bed.point()], { verify: false })).rejects.toMatchObject({
      kind: 'io',
    });
    await pulled.close();
    const again = await FileDrive.open(`file:${path}`);
    const done = await bed.export(again, [await bed.point()], { sinceLast: true });
    expect(done.cartridges[0]).toMatchObject({ firstFile: files, verified: true });
    const back = await bringBack(bed, again, undefined, new Map([[1, image]]));
    expect(back.isWhole).toBe(true);
    await again.close();
  });

  it('a session that the repository has forgotten is kept, not overwritten', async () => {
    const bed = await newBed();
    const image = testImage(13, 4 * MIB);
    await bed.capture(image);
    const drive = await FileDrive.open(`file:${bed.cartridge('c1')}`);
    await bed.export(drive, [await bed.point()]);
    const remembered = await bed.repo.store.get('tapes/SET-001');
    const second = Buffer.from(image);
    testImage(14, 300_000).copy(second, MIB);
    await bed.capture(second);
    const two = await bed.export(drive, [await bed.point()], { sinceLast: true });
    await bed.repo.store.put('tapes/SET-001', remembered);
    const three = await bed.export(drive, [await bed.point('v', '#1')], { sinceLast: true });
    expect(three.chunks).toBe(0);
    expect(three.cartridges[0]?.firstFile).toBe(two.cartridges[0]?.endFile);
    expect(bed.events).toContainEqual(
      expect.objectContaining({
        type: 'warning',
        message: expect.stringContaining('they are kept') as string,
      }),
    );
    const { bytes } = await restore(bed, drive, '#2');
    expect(bytes.equals(second)).toBe(true);
    await drive.close();
  });

  it('write protected, foreign and still needed cartridges', async () => {
    const bed = await newBed();
    await bed.capture(testImage(12, 2 * MIB));
    const points = [await bed.point()];
    const foreign = bed.cartridge('foreign');
    writeFileSync(`${foreign}/000000.tar`, Buffer.alloc(65_536, 7));
    const one = await FileDrive.open(`file:${foreign}`);
    await expect(bed.export(one, points)).rejects.toMatchObject({ kind: 'refused' });
    await one.close();
    const guarded = bed.cartridge('guarded');
    writeFileSync(`${guarded}/write-protected`, '');
    const two = await FileDrive.open(`file:${guarded}`);
    await expect(bed.export(two, points)).rejects.toMatchObject({ kind: 'refused' });
    await two.close();
    const ours = await FileDrive.open(`file:${bed.cartridge('ours')}`);
    await bed.export(ours, points, { setName: 'A' });
    await expect(bed.export(ours, points, { setName: 'B' })).rejects.toThrow(/still needed/);
    const forced = await bed.export(ours, points, { setName: 'B', force: true });
    expect(forced.cartridges[0]?.label).toBe('B-001');
    await ours.close();
    const none = await FileDrive.open(`file:${bed.dir.join('nothing')}`);
    await expect(bed.export(none, points)).rejects.toMatchObject({ kind: 'not-found' });
  });
});
