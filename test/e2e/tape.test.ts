/**
 * The tape commands of the built program on a stand-in: what tar takes out of a cartridge is a repository that the independent extractor
 * restores from, a disk comes straight from tape, and a repository from tapes alone.
 */
import { execFileSync } from 'node:child_process';
import {
  existsSync,
  mkdirSync,
  readdirSync,
  readFileSync,
  statSync,
  symlinkSync,
  truncateSync,
  writeFileSync,
} from 'node:fs';
import { setTimeout as delay } from 'node:timers/promises';
import { afterEach, describe, expect, it } from 'vitest';
import type { ExportTapeAnswer } from '../../src/commands/run/export-tape.js';
import type { ImportTapeAnswer } from '../../src/commands/run/import-tape.js';
import type { TapeListAnswer } from '../../src/commands/run/tape-list.js';
import type { TapeVerifyAnswer } from '../../src/commands/run/tape-verify.js';
import { Repository as ForeignRepository, extract, list } from '../extractor/extract.mjs';
import { B2 } from '../support/b2.js';
import { noise, pokeWithDd } from '../support/disks.js';
import { sparseFile } from '../support/loop.js';
import { cmp, copySparse } from '../support/source.js';
import { tempDir, type TempDir } from '../support/tmp.js';

const MIB = 1024 * 1024;
const PASSWORD = 'tape and disk';

const dirs: TempDir[] = [];
afterEach(async () => {
  for (const dir of dirs.splice(0)) await dir.remove();
});

interface Bed {
  readonly dir: TempDir;
  readonly b2: B2;
  readonly image: string;
}

async function newBed(): Promise<Bed> {
  const dir = tempDir();
  dirs.push(dir);
  const b2 = new B2(dir, { B2_PASSWORD: PASSWORD });
  await b2.json(['init']);
  const image = sparseFile(dir, 'disk.img', 40 * MIB);
  pokeWithDd(image, 5 * MIB, noise(3, 24 * MIB));
  await b2.json(['snapshot', image, '--volume', 'web1/sda', '--name', 'first']);
  return { dir, b2, image };
}

/** Cartridges as directories behind one link; `next` is a command that puts the following one in. */
function magazine(dir: TempDir): {
  device: string;
  first: () => void;
  next: string;
  path: (n: number) => string;
} {
  const link = dir.join('drive');
  const path = (n: number): string => dir.join(`cartridge-${n}`);
  for (let n = 1; n <= 6; n++) mkdirSync(path(n));
  const first = (): void => {
    execFileSync('ln', ['-sfn', path(1), link]);
  };
  if (!existsSync(link)) symlinkSync(path(1), link);
  const next = `n=$(readlink ${link} | sed 's/.*-//'); [ $n -lt 6 ] && ln -sfn ${dir.join('cartridge-')}$((n + 1)) ${link}`;
  return { device: `file:${link}`, first, next, path };
}

describe('tape', () => {
  it('what tar takes out of all files is a repository that the independent extractor restores from', async () => {
    const { dir, b2, image } = await newBed();
    const { device, next, path, first } = magazine(dir);
    const small = `${device}?size=14M&reserve=3M`;
    const done = await b2.json<ExportTapeAnswer>([
      'export-tape',
      small,
      '--label=OFF',
      `--next-cartridge=${next}`,
      '--file-size=4M',
      '--buffer=32M',
      '--pack-size=2M',
    ]);
    expect(done.verified).toBe(true);
    expect(done.cartridges.map((c) => c.label)).toEqual(
      ['OFF-001', 'OFF-002', 'OFF-003'].slice(0, done.cartridges.length),
    );
    expect(done.cartridges.length).toBeGreaterThan(1);
    expect(done.copiedPacks).toBe(0);
    const out = dir.join('out');
    mkdirSync(out);
    for (const [i] of done.cartridges.entries())
      for (const file of readdirSync(path(i + 1)).filter((f) => f.endsWith('.tar')))
        execFileSync('tar', ['-b', '512', '-C', out, '-xf', `${path(i + 1)}/${file}`]);
    expect(readFileSync(`${out}/b2-tape-OFF-001/README.txt`, 'utf8')).toContain('b2 import-tape');
    for (const packsOnly of [false, true]) {
      const foreign = new ForeignRepository(`${out}/b2-repository`, { password: PASSWORD });
      const found = list(foreign, packsOnly).volumes[0];
      expect(found?.points).toMatchObject([{ seq: 1, merged: true }]);
      if (!packsOnly) expect(found?.snapshots.map((s) => s.name)).toEqual(['first']);
      extract(
        foreign,
        packsOnly,
        packsOnly ? (found?.id ?? '') : 'web1/sda',
        '1',
        `${out}/image-${packsOnly}`,
        null,
      );
      foreign.close();
      cmp(image, `${out}/image-${packsOnly}`);
    }
    first();
    const target = dir.join('restored.img');
    const restored = await b2.json<ImportTapeAnswer>(
      ['import-tape', device, '--to', target, '--next-cartridge', next],
      0,
      { B2_REPOSITORY: dir.join('nowhere') },
    );
    expect(restored.restored).toMatchObject({ isWhole: true, verified: true });
    cmp(image, target);
  });

  it('incremental sets: list, needs, verify, a damaged disk, and the repository from tape alone', async () => {
    const { dir, b2, image } = await newBed();
    mkdirSync(dir.join('usb'));
    const device = `file:${dir.join('usb')}`;
    const before = dir.join('before.img');
    copySparse(image, before);
    const once = await b2.json<ExportTapeAnswer>(['export-tape', device, '--label', 'USB']);
    expect(once.copiedPacks).toBeGreaterThan(0);
    expect(once.copiedPacks).toBe(once.packs);
    pokeWithDd(image, 9 * MIB, noise(8, MIB));
    await b2.json(['snapshot', image, '--volume', 'web1/sda']);
    const second = await b2.json<ExportTapeAnswer>(['export-tape', device, '--since-last']);
    expect(second.chunks).toBeLessThan(20);
    const listed = await b2.json<TapeListAnswer>(['tape', 'list']);
    expect(listed.cartridges).toMatchObject([{ label: 'USB-001', sessions: 2, damagedPacks: 0 }]);
    const needs = await b2.json<TapeListAnswer>(['tape', 'list', '--needs', 'sda']);
    expect(needs.needed?.id).toBe('#2');
    expect(needs.cartridges.map((c) => c.label)).toEqual(['USB-001']);
    expect((await b2.error(['tape', 'list', '--needs', 'sda', '--at', '#7'])).code).toBe(4);
    expect(await b2.json<TapeVerifyAnswer>(['tape', 'verify', device])).toMatchObject({
      damage: 0,
      points: 2,
      complete: true,
      recorded: true,
    });
    const contents = await b2.json<ImportTapeAnswer>(['import-tape', device, '--list']);
    expect(contents.points?.map((p) => p.id)).toEqual(['#1', '#2']);

    const back = new B2(
      dir,
      { B2_PASSWORD: PASSWORD, B2_CACHE_DIR: dir.join('cache2') },
      dir.join('back'),
    );
    const imported = await back.json<ImportTapeAnswer>(['import-tape', device]);
    expect(imported.imported?.points.map((p) => [p.id, p.whole])).toEqual([
      ['#1', true],
      ['#2', true],
    ]);
    await back.json(['verify', '--data', 'all']);
    const target = dir.join('target.img');
    await back.json(['restore', 'sda', target, '--at', 'first']);
    cmp(before, target);
    await back.json(['restore', 'sda', target, '--force']);
    cmp(image, target);
    // The repository goes on: capture, and an incremental export to the same set.
    pokeWithDd(image, 30 * MIB, noise(9, MIB));
    await back.json(['snapshot', image, '--volume', 'web1/sda']);
    const third = await back.json<ExportTapeAnswer>(['export-tape', device, '--since-last']);
    expect(third.chunks).toBeLessThan(20);
    expect((await back.error(['import-tape', device])).code).toBe(10);

    const file = dir.join('usb/000002.tar');
    const bytes = readFileSync(file);
    bytes.writeUInt8((bytes[3 * MIB] ?? 0) ^ 1, 3 * MIB);
    writeFileSync(file, bytes);
    const verified = await b2.json<TapeVerifyAnswer>(['tape', 'verify', device], 5);
    expect(verified.findings).toMatchObject([{ kind: 'pack', file: 2 }]);
    expect(verified.findings[0]?.points).toContain('web1/sda #1');
    const part = dir.join('part.img');
    const restored = await b2.json<ImportTapeAnswer>(
      ['import-tape', device, '--to', part, '--at', '#1'],
      3,
    );
    expect(restored.restored?.missingRanges.length).toBe(1);
    // What is damaged there is written again.
    const repaired = await b2.json<ExportTapeAnswer>([
      'export-tape',
      device,
      '--since-last',
      '--at',
      '#1',
    ]);
    expect(repaired.chunks).toBeGreaterThan(0);
    truncateSync(part, 0);
    await b2.json(['import-tape', device, '--to', part, '--at', '#1', '--force']);
    cmp(before, part);
  }, 600_000);

  it('one file is a cartridge too, which tar reads at once, also after the export was killed', async () => {
    const { dir, b2, image } = await newBed();
    const cartridge = dir.join('offsite.tape');
    writeFileSync(cartridge, '');
    const device = `file:${cartridge}`;
    // Slow enough to be killed in the middle of the data.
    const killed = b2.start([
      'export-tape',
      `${device}?rate=8M`,
      '--label',
      'ONE',
      '--buffer',
      '8M',
    ]);
    while (statSync(cartridge).size < 6 * MIB) await delay(20);
    killed.child.kill('SIGKILL');
    expect((await killed.ended).signal).toBe('SIGKILL');
    const done = await b2.json<ExportTapeAnswer>(['export-tape', device, '--label', 'ONE']);
    expect(done).toMatchObject({
      verified: true,
      cartridges: [{ label: 'ONE-001', firstFile: 1 }],
    });
    pokeWithDd(image, 9 * MIB, noise(8, MIB));
    await b2.json(['snapshot', image, '--volume', 'web1/sda']);
    const second = await b2.json<ExportTapeAnswer>(['export-tape', device, '--since-last']);
    expect(second.chunks).toBeLessThan(20);
    expect(await b2.json<TapeVerifyAnswer>(['tape', 'verify', device])).toMatchObject({
      damage: 0,
      points: 2,
      complete: true,
    });
    const target = dir.join('target.img');
    await b2.json(['import-tape', device, '--to', target]);
    cmp(image, target);
    const out = dir.join('out');
    mkdirSync(out);
    execFileSync('tar', ['--ignore-zeros', '-C', out, '-xf', cartridge]);
    const foreign = new ForeignRepository(`${out}/b2-repository`, { password: PASSWORD });
    extract(foreign, false, 'web1/sda', '2', `${out}/image`, null);
    foreign.close();
    cmp(image, `${out}/image`);
  });

  it('refuses what is not its own, and says what is on it', async () => {
    const { dir, b2 } = await newBed();
    mkdirSync(dir.join('foreign'));
    execFileSync('tar', [
      '-b',
      '512',
      '-cf',
      dir.join('foreign/000000.tar'),
      '-C',
      '/etc',
      'hostname',
    ]);
    const device = `file:${dir.join('foreign')}`;
    const refused = await b2.error(['export-tape', device]);
    expect(refused.code).toBe(1);
    expect(refused.message).toContain('hostname');
    expect((await b2.error(['import-tape', device, '--list'])).code).toBe(1);
    expect((await b2.error(['export-tape', `file:${dir.join('none')}`])).code).toBe(4);
    await b2.json(['export-tape', device, '--force']);
    expect((await b2.error(['import-tape', device], { B2_PASSWORD: 'wrong' })).code).toBe(12);
    expect((await b2.error(['tape', 'forget', 'nothing'])).code).toBe(4);
    const text = await b2.run('tape', 'list');
    expect(text.stdout).toContain('web1/sda #1');
  });
});
