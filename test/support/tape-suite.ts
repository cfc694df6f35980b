/** What every {@link TapeDrive} must do: one suite for the stand-in and, on a machine that has one, for a real drive. */
import { expect, it } from 'vitest';
import type { TapeDrive } from '../../src/devices/tape/drive.js';

const RECORD = 8192;

/** `make` gives a drive with a cartridge that may be overwritten; the suite closes it. */
export function tapeDriveSuite(make: () => Promise<TapeDrive>): void {
  const records = (from: number, count: number): Buffer =>
    Buffer.concat(Array.from({ length: count }, (_, i) => Buffer.alloc(RECORD, from + i)));

  async function blank(): Promise<TapeDrive> {
    const drive = await make();
    await drive.setRecordBytes(RECORD, false);
    await drive.rewind();
    return drive;
  }

  /** The bytes that the records of one file begin with, and how it ended. */
  async function fileAt(drive: TapeDrive): Promise<[number[], string]> {
    const into = Buffer.alloc(1024 * 1024);
    const seen: number[] = [];
    for (;;) {
      const found = await drive.read(into);
      if (found.kind !== 'record') return [seen, found.kind];
      expect(found.bytes).toBe(RECORD);
      expect(into.subarray(0, RECORD).every((b) => b === into[0])).toBe(true);
      seen.push(into[0] ?? -1);
    }
  }

  it('reads what was written: records, marks, and a double mark or the end of data at the end', async () => {
    const drive = await blank();
    expect(await drive.write([records(1, 3)])).toMatchObject({ records: 3, full: false });
    await drive.writeMarks(1);
    await drive.write([records(11, 1)]);
    await drive.writeMarks(2);
    await drive.rewind();
    expect(await fileAt(drive)).toEqual([[1, 2, 3], 'mark']);
    expect(await fileAt(drive)).toEqual([[11], 'mark']);
    const [rest] = await fileAt(drive);
    expect(rest).toEqual([]);
    await drive.close();
  });

  it('goes to files and back over records', async () => {
    const drive = await blank();
    for (const first of [1, 11, 21]) {
      await drive.write([records(first, 3)]);
      await drive.writeMarks(1);
    }
    await drive.rewind();
    await drive.spaceFiles(2);
    const into = Buffer.alloc(1024 * 1024);
    await drive.read(into);
    await drive.read(into);
    await drive.backRecords(1);
    expect(await fileAt(drive)).toEqual([[22, 23], 'mark']);
    await drive.rewind();
    await drive.skipRecord();
    expect(await fileAt(drive)).toEqual([[2, 3], 'mark']);
    await drive.rewind();
    await expect(drive.spaceFiles(9)).rejects.toMatchObject({ kind: 'io' });
    await drive.close();
  });

  it('writing anywhere ends what lay behind', async () => {
    const drive = await blank();
    for (const first of [1, 11, 21]) {
      await drive.write([records(first, 3)]);
      await drive.writeMarks(1);
    }
    await drive.rewind();
    await drive.spaceFiles(1);
    const into = Buffer.alloc(1024 * 1024);
    await drive.read(into);
    await drive.write([records(99, 1)]);
    await drive.writeMarks(1);
    await drive.rewind();
    expect(await fileAt(drive)).toEqual([[1, 2, 3], 'mark']);
    expect(await fileAt(drive)).toEqual([[11, 99], 'mark']);
    expect((await fileAt(drive))[0]).toEqual([]);
    await drive.close();
  });

  it('adds behind the end of data', async () => {
    const drive = await blank();
    await drive.write([records(1, 2)]);
    await drive.writeMarks(1);
    await drive.toEndOfData();
    await drive.write([records(5, 1)]);
    await drive.writeMarks(1);
    await drive.rewind();
    expect(await fileAt(drive)).toEqual([[1, 2], 'mark']);
    expect(await fileAt(drive)).toEqual([[5], 'mark']);
    expect(await drive.status()).toMatchObject({ loaded: true, writeProtected: false });
    await drive.close();
  });

  it('goes back in a file that is being written, and writes it anew from there', async () => {
    const drive = await blank();
    await drive.write([records(1, 1)]);
    await drive.writeMarks(1);
    await drive.write([records(10, 5)]);
    await drive.backRecords(3);
    await drive.write([records(50, 1)]);
    await drive.writeMarks(1);
    await drive.rewind();
    await drive.spaceFiles(1);
    expect(await fileAt(drive)).toEqual([[10, 11, 50], 'mark']);
    await drive.close();
  });
}
