import { mkdirSync, readFileSync, readdirSync, writeFileSync } from 'node:fs';
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

/** An empty file: a blank cartridge. */
function container(): string {
  const dir = tempDir();
  dirs.push(dir);
  writeFileSync(dir.join('c.tape'), '');
  return dir.join('c.tape');
}

describe('a file as a drive', () => {
  tapeDriveSuite(async () => FileDrive.open(`file:${container()}`));

  const one = (n: number): Buffer => Buffer.alloc(8 * KIB, n);

  /** Three files of two records each, the last one without a mark. */
  async function three(): Promise<string> {
    const path = container();
    const d = await drive('', path);
    for (const n of [1, 11, 21]) {
      await d.write([Buffer.concat([one(n), one(n + 1)])]);
      if (n < 21) await d.writeMarks(1);
    }
    await d.close();
    return path;
  }

  /** What each file begins with, record by record. */
  async function all(path: string): Promise<number[][]> {
    const d = await FileDrive.open(`file:${path}`);
    const files: number[][] = [];
    const into = Buffer.alloc(1024 * KIB);
    for (let file: number[] = []; ;) {
      const found = await d.read(into);
      if (found.kind === 'record') {
        file.push(into[0] ?? -1);
        continue;
      }
      if (found.kind === 'mark' || file.length > 0) files.push(file);
      if (found.kind === 'end') break;
      file = [];
    }
    await d.close();
    return files;
  }

  it('is found again as it was, also after a crash before the last mark', async () => {
    const path = await three();
    expect(await all(path)).toEqual([
      [1, 2],
      [11, 12],
      [21, 22],
    ]);
    const d = await FileDrive.open(`file:${path}`);
    await d.toEndOfData();
    await d.write([one(23)]);
    await d.writeMarks(2);
    await d.close();
    expect(await all(path)).toEqual([
      [1, 2],
      [11, 12],
      [21, 22, 23],
    ]);
  });

  it('reads on where a mark or the header is damaged: two files are then one, and nothing else is lost', async () => {
    const path = await three();
    const bytes = readFileSync(path);
    const firstMark = 4 * KIB + 16 * KIB;
    const damagedMark = Buffer.from(bytes);
    damagedMark.fill(0x55, firstMark, firstMark + 600);
    writeFileSync(path, damagedMark);
    // The first mark is read as data; records behind it are no longer in their places.
    const files = await all(path);
    expect(files.length).toBe(2);
    expect(files[1]).toEqual([21, 22]);
    const d = await FileDrive.open(`file:${path}`);
    await d.toEndOfData();
    await d.writeMarks(1);
    await d.close();
    const closed = readFileSync(path);
    bytes.copy(closed, firstMark, firstMark, firstMark + 4 * KIB);
    closed.fill(0x55, 0, 600);
    writeFileSync(path, closed);
    expect(await all(path)).toEqual([
      [1, 2],
      [11, 12],
      [21, 22],
    ]);
  });

  it('does not take marks of another container inside its data for its own', async () => {
    const inner = readFileSync(await three());
    const path = container();
    const d = await drive('', path);
    const padded = Buffer.alloc(Math.ceil(inner.length / (8 * KIB)) * 8 * KIB);
    inner.copy(padded);
    await d.write([padded]);
    await d.writeMarks(1);
    await d.write([padded]);
    await d.close();
    expect((await all(path)).map((file) => file.length)).toEqual([
      padded.length / (8 * KIB),
      padded.length / (8 * KIB),
    ]);
  });

  it('shows something foreign as it is, and overwrites it from the beginning only', async () => {
    const path = container();
    writeFileSync(path, Buffer.alloc(100_000, 0x41));
    const d = await FileDrive.open(`file:${path}`);
    expect(await d.read(Buffer.alloc(1024 * KIB))).toEqual({ kind: 'record', bytes: 100_000 });
    await expect(d.write([Buffer.alloc(256 * KIB)])).rejects.toMatchObject({ kind: 'refused' });
    expect(readFileSync(path).every((b) => b === 0x41)).toBe(true);
    await d.setRecordBytes(8 * KIB, false);
    await d.rewind();
    await d.write([one(7)]);
    await d.writeMarks(1);
    await d.close();
    expect(await all(path)).toEqual([[7]]);
  });
});

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
    expect(() => parseFileDrive('file:')).toThrow(/names no directory or file/);
  });

  it('warns before the end, then takes whole records only, then none', async () => {
    const d = await drive('?size=100K&reserve=40K');
    const one = Buffer.alloc(8 * KIB);
    const seen: string[] = [];
    for (let i = 0; i < 15; i++) {
      const w = await d.write([one]);
      seen.push(w.full ? 'full' : w.earlyWarning ? 'warned' : 'ok');
      expect(w.records).toBe(w.full ? 0 : 1);
    }
    expect(seen.slice(0, 7)).toEqual(Array(7).fill('ok'));
    expect(seen.slice(7, 12)).toEqual(Array(5).fill('warned'));
    expect(seen.slice(12)).toEqual(Array(3).fill('full'));
    const two = await drive('?size=100K&fault=nowarn');
    expect(await two.write([Buffer.alloc(15 * 8 * KIB)])).toEqual({
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
    await expect(guarded.write([Buffer.alloc(8 * KIB)])).rejects.toMatchObject({ kind: 'refused' });
    await guarded.close();
  });

  it('takes no more than its rate', async () => {
    let nowNs = 0n;
    const slept: number[] = [];
    const clock = {
      monotonicNs: () => nowNs,
      sleep: (ms: number) => {
        slept.push(ms);
        nowNs += BigInt(Math.round(ms * 1e6));
        return Promise.resolve();
      },
    };
    const d = await FileDrive.open(`file:${cartridge()}?rate=1M`, clock);
    expect(d.streams).toBe(true);
    await d.setRecordBytes(8 * KIB, false);
    for (let i = 0; i < 3; i++) await d.write([Buffer.alloc(1024 * KIB)]);
    expect(slept.map((ms) => Math.round(ms))).toEqual([800, 1000, 1000]);
    await d.close();
  });

  it('fails as it is told to', async () => {
    const pulled = await drive('?fault=pull@2');
    await pulled.write([Buffer.alloc(8 * KIB)]);
    await expect(pulled.write([Buffer.alloc(8 * KIB)])).rejects.toThrow(/pulled/);
    expect((await pulled.status()).loaded).toBe(false);
    await pulled.close();
    const bad = await drive('?fault=bad@0:1,write@4');
    await bad.write([Buffer.alloc(3 * 8 * KIB)]);
    await expect(bad.write([Buffer.alloc(8 * KIB)])).rejects.toMatchObject({ kind: 'io' });
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
    await d.write([Buffer.alloc(2 * 8 * KIB, 1)]);
    await d.writeMarks(1);
    await d.write([Buffer.alloc(8 * KIB, 2)]);
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

describe.each([
  ['a directory', cartridge],
  ['a file', container],
])('%s that is read ahead', (_, make) => {
  it('gives every record as it is, wherever the reading begins, and what was written since', async () => {
    const path = make();
    const d = await drive('', path);
    // More than is read ahead at once, in two files, with an end that lies in the middle of that.
    const counts = [1700, 50];
    const record = (file: number, n: number): Buffer => {
      const bytes = Buffer.alloc(8 * KIB, n & 0xff);
      bytes.writeUInt32LE(file, 0);
      bytes.writeUInt32LE(n, 4);
      return bytes;
    };
    for (const [file, count] of counts.entries()) {
      await d.write([Buffer.concat(Array.from({ length: count }, (__, n) => record(file, n)))]);
      await d.writeMarks(1);
    }
    const into = Buffer.from(new SharedArrayBuffer(1024 * KIB));
    const expectFrom = async (file: number, from: number): Promise<void> => {
      for (let n = from; n < (counts[file] ?? 0); n++) {
        expect(await d.read(into)).toEqual({ kind: 'record', bytes: 8 * KIB });
        if (!into.subarray(0, 8 * KIB).equals(record(file, n)))
          throw new Error(`record ${n} of file ${file} is another one`);
      }
      expect(await d.read(into)).toEqual({ kind: 'mark' });
    };
    await d.rewind();
    await expectFrom(0, 0);
    await expectFrom(1, 0);
    await d.rewind();
    for (let n = 0; n < 600; n++) await d.read(into);
    await d.backRecords(300);
    await expectFrom(0, 300);
    // Overwritten from the middle on: nothing of what was there before is given out.
    await d.rewind();
    for (let n = 0; n < 20; n++) await d.read(into);
    await d.write([Buffer.concat([record(7, 20), record(7, 21)])]);
    await d.writeMarks(1);
    await d.rewind();
    for (let n = 0; n < 22; n++) {
      await d.read(into);
      expect(into.subarray(0, 8 * KIB).equals(record(n < 20 ? 0 : 7, n))).toBe(true);
    }
    expect(await d.read(into)).toEqual({ kind: 'mark' });
    await d.close();
  });
});
