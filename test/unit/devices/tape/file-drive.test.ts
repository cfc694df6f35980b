import { mkdirSync, readdirSync, writeFileSync } from 'node:fs';
import { afterEach, describe, expect, it } from 'vitest';
import { FileDrive, parseFileDrive } from '../../../../src/devices/tape/file-drive.js';
import { tapeDriveSuite } from '../../../support/tape-suite.js';
import { tempDir, type TempDir } from '../../../support/tmp.js';

const KIB = 1024;
const dirs: TempDir[] = [];
afterEach(async () => {
  for (const dir of dirs.splice(0)) await dir.remove();
});

function cartridge(): string {
  const dir = tempDir();
  dirs.push(dir);
  mkdirSync(dir.join('c'));
  return dir.join('c');
}

async function drive(options = '', path = cartridge()): Promise<FileDrive> {
  const opened = await FileDrive.open(`file:${path}${options}`);
  if ((await opened.status()).loaded) {
    await opened.setRecordBytes(8 * KIB, false);
    await opened.rewind();
  }
  return opened;
}

describe('a directory as a drive', () => {
  tapeDriveSuite(async () => FileDrive.open(`file:${cartridge()}`));

  it('takes its options apart and names what it does not know', () => {
    expect(parseFileDrive('file:/media/a?size=1M&fault=pull@3,bad@1:2,nowarn')).toEqual({
      path: '/media/a',
      options: {
        sizeBytes: 1024 * KIB,
        faults: { pullAt: 3, bad: new Set(['1:2']), noWarning: true },
      },
    });
    expect(parseFileDrive('file:///media/a').path).toBe('/media/a');
    expect(() => parseFileDrive('file:/a?colour=red')).toThrow(/no such option/);
    expect(() => parseFileDrive('file:/a?fault=fire@1')).toThrow(/no such fault/);
    expect(() => parseFileDrive('file:')).toThrow(/names no directory/);
  });

  it('warns before the end, then takes whole records only, then none', async () => {
    const d = await drive('?size=100K&reserve=40K');
    const one = Buffer.alloc(8 * KIB);
    const seen: string[] = [];
    for (let i = 0; i < 15; i++) {
      const w = await d.write(one);
      seen.push(w.full ? 'full' : w.earlyWarning ? 'warned' : 'ok');
      expect(w.records).toBe(w.full ? 0 : 1);
    }
    expect(seen.slice(0, 7)).toEqual(Array(7).fill('ok'));
    expect(seen.slice(7, 12)).toEqual(Array(5).fill('warned'));
    expect(seen.slice(12)).toEqual(Array(3).fill('full'));
    const two = await drive('?size=100K&fault=nowarn');
    expect(await two.write(Buffer.alloc(15 * 8 * KIB))).toEqual({
      records: 12,
      earlyWarning: true,
      full: true,
    });
    await d.close();
    await two.close();
  });

  it('is without a cartridge where there is no directory, and protected where it says so', async () => {
    const none = await drive('', `${cartridge()}/none`);
    expect((await none.status()).loaded).toBe(false);
    await expect(none.rewind()).rejects.toMatchObject({ kind: 'not-found' });
    const path = cartridge();
    writeFileSync(`${path}/write-protected`, '');
    const guarded = await drive('', path);
    expect((await guarded.status()).writeProtected).toBe(true);
    await expect(guarded.write(Buffer.alloc(8 * KIB))).rejects.toMatchObject({ kind: 'refused' });
    await guarded.close();
  });

  it('fails as it is told to', async () => {
    const pulled = await drive('?fault=pull@2');
    await pulled.write(Buffer.alloc(8 * KIB));
    await expect(pulled.write(Buffer.alloc(8 * KIB))).rejects.toThrow(/pulled/);
    expect((await pulled.status()).loaded).toBe(false);
    await pulled.close();
    const bad = await drive('?fault=bad@0:1,write@4');
    await bad.write(Buffer.alloc(3 * 8 * KIB));
    await expect(bad.write(Buffer.alloc(8 * KIB))).rejects.toMatchObject({ kind: 'io' });
    await bad.writeMarks(1);
    await bad.rewind();
    const into = Buffer.alloc(8 * KIB);
    expect(await bad.read(into)).toMatchObject({ kind: 'record' });
    await expect(bad.read(into)).rejects.toThrow(/file 0, record 1/);
    await bad.skipRecord();
    expect(await bad.read(into)).toMatchObject({ kind: 'record' });
    expect(await bad.read(into)).toEqual({ kind: 'mark' });
    await bad.close();
  });

  it('keeps the size of records with the cartridge, and shows a file without a mark as a part', async () => {
    const path = cartridge();
    const d = await drive('', path);
    await d.write(Buffer.alloc(2 * 8 * KIB, 1));
    await d.writeMarks(1);
    await d.write(Buffer.alloc(8 * KIB, 2));
    await d.close();
    expect(readdirSync(path).toSorted()).toEqual([
      '000000.tar',
      '000001.tar.part',
      'cartridge.json',
    ]);
    const again = await FileDrive.open(`file:${path}`);
    const into = Buffer.alloc(64 * KIB);
    expect(await again.read(into)).toEqual({ kind: 'record', bytes: 8 * KIB });
    await again.close();
  });
});
