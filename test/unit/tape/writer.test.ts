import { mkdirSync, readFileSync } from 'node:fs';
import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import { FileDrive } from '../../../src/devices/tape/file-drive.js';
import type { TapeWritten } from '../../../src/devices/tape/drive.js';
import { alignedMemory } from '../../../src/memory.js';
import { TapeWriter } from '../../../src/tape/writer.js';
import { tempDir, type TempDir } from '../../support/tmp.js';

const KIB = 1024;
const RECORD_BYTES = 64 * KIB;
const PIECE_BYTES = 5 * RECORD_BYTES + 1000;
/** Room in front of a piece: of a record at least. */
const HEAD_BYTES = RECORD_BYTES;
const PIECES = 12;

let dir: TempDir;
beforeEach(() => {
  dir = tempDir();
  mkdirSync(dir.join('tape'));
});
afterEach(() => dir.remove());

/** A drive that does nothing until it is told, and remembers how many parts each call had. */
async function slowDrive(query = ''): Promise<{
  drive: FileDrive;
  calls: number[];
  fail: (error: Error) => void;
}> {
  const drive = await FileDrive.open(`file:${dir.join('tape')}${query}`);
  await drive.setRecordBytes(RECORD_BYTES, true);
  const calls: number[] = [];
  let failure: Error | undefined;
  const write = drive.write.bind(drive);
  drive.write = async (parts): Promise<TapeWritten> => {
    calls.push(parts.length);
    for (let i = 0; i < 20; i++) await new Promise((resolve) => setImmediate(resolve));
    if (failure !== undefined && calls.length > 1) throw failure;
    return write(parts);
  };
  return { drive, calls, fail: (error) => (failure = error) };
}

interface Lent {
  readonly bytes: Buffer;
  /** How often each piece was given back. */
  readonly released: number[];
}

/** Writes a member of {@link PIECES} pieces of lent memory, each of which lies so that the drive can take it from there. */
async function writeLent(writer: TapeWriter): Promise<Lent> {
  const released = Array.from({ length: PIECES }, () => 0);
  const bytes = Buffer.alloc(PIECES * PIECE_BYTES);
  for (let i = 0; i < bytes.length; i++) bytes[i] = (i * 7 + (i >> 9)) & 0xff;
  await writer.beginMember('member', bytes.length);
  for (let i = 0; i < PIECES && !writer.isFull; i++) {
    const memory = Buffer.from(alignedMemory(HEAD_BYTES + RECORD_BYTES + PIECE_BYTES).buffer);
    const at = HEAD_BYTES + (writer.fileBytes % RECORD_BYTES);
    bytes.copy(memory, at, i * PIECE_BYTES, (i + 1) * PIECE_BYTES);
    await writer.addLent(memory, at, PIECE_BYTES, () => {
      released[i] = (released[i] ?? 0) + 1;
      memory.fill(0xee);
    });
  }
  return { bytes, released };
}

const newWriter = (drive: FileDrive): TapeWriter =>
  new TapeWriter(drive, { recordBytes: RECORD_BYTES, cartridgeId: '01', file: 0, mtime: 0 });

describe('lent memory', () => {
  it('goes to a busy drive several pieces at once, in order, and is given back once', async () => {
    const { drive, calls } = await slowDrive();
    const writer = newWriter(drive);
    await writer.beginFile('data', '02');
    const { bytes, released } = await writeLent(writer);
    await writer.endFile();
    await writer.release();
    await drive.close();
    expect(Math.max(...calls)).toBeGreaterThan(1);
    expect(released).toEqual(released.map(() => 1));
    const file = readFileSync(dir.join('tape/000000.tar'));
    expect(file.indexOf(bytes)).toBeGreaterThan(0);
    expect(file.length).toBe(writer.bytes);
  });

  it('is given back where the cartridge ends among the pieces, and the file ends before the member', async () => {
    const { drive, calls } = await slowDrive(`?size=${20 * 64}K&reserve=0`);
    const writer = newWriter(drive);
    await writer.beginFile('data', '02');
    await writer.addMember('first', Buffer.alloc(3 * RECORD_BYTES, 1));
    const border = writer.fileBytes;
    const { released } = await writeLent(writer);
    const kept = await writer.endFile();
    await writer.release();
    await drive.close();
    expect(Math.max(...calls)).toBeGreaterThan(1);
    expect(writer.isFull).toBe(true);
    expect(kept).toBe(border);
    expect(released.every((times) => times <= 1)).toBe(true);
    expect(released.filter((times) => times === 1).length).toBeGreaterThan(3);
    const file = readFileSync(dir.join('tape/000000.tar'));
    expect(file.subarray(border).equals(Buffer.alloc(file.length - border))).toBe(true);
  });

  it('is given back where the drive fails, which is told once', async () => {
    const { drive, fail } = await slowDrive();
    const writer = newWriter(drive);
    await writer.beginFile('data', '02');
    fail(new Error('no more'));
    const lent = writeLent(writer).then(() => writer.endFile());
    await expect(lent).rejects.toThrow('no more');
    await writer.release();
    await drive.close();
  });
});
