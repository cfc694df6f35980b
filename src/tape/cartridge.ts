/** What is in the drive: nothing, a blank cartridge, one of ours, or somebody else's. */
import type { TapeDrive } from '../devices/tape/drive.js';
import { B2Error, isKind } from '../errors.js';
import {
  LABEL_MEMBER,
  MAX_RECORD_BYTES,
  decodeTapeLabel,
  type TapeFileId,
  type TapeLabel,
} from '../format/tape.js';
import { decodeTarHeader } from '../format/tape-tar.js';
import { printable } from '../human.js';
import { readTapeFile, type TapeDamage } from './reader.js';

export type CartridgeContents =
  | { readonly kind: 'blank' }
  | { readonly kind: 'b2'; readonly label: TapeLabel }
  /** `what`: a clause for a person. */
  | { readonly kind: 'foreign'; readonly what: string };

/** The drive must hold a cartridge. Kind `not-found` otherwise. */
export async function requireCartridge(drive: TapeDrive): Promise<void> {
  if ((await drive.status()).loaded) return;
  await drive.load();
  if ((await drive.status()).loaded) return;
  throw new B2Error('not-found', `there is no cartridge in ${drive.path}`, {
    hint: drive.path.startsWith('file:')
      ? 'Mount the disk that it is on; for a new one make a directory, or an empty file (touch), of that name.'
      : 'Put one in and wait until the drive is ready.',
  });
}

/** Lengths of blocks that drives without a variable mode are tried with, the likely ones first: those that b2 may have written, and what else is usual. */
const USUAL_BLOCK_BYTES: readonly number[] = [256, 64, 512, 1024, 128, 32, 16, 8, 4, 0.5, 1, 2].map(
  (kib) => kib * 1024,
);

/** Rewinds and reads the first file. The head is anywhere afterwards; a drive without a variable block mode has the block length with which it could read. */
export async function readLabel(drive: TapeDrive): Promise<CartridgeContents> {
  const { blockBytes: found } = await drive.status();
  if (await hasVariableBlocks(drive)) return readFirstFile(drive);
  // Blocks of another length than they were written with cannot be read.
  const lengths = new Set([...(found > 0 ? [found] : []), ...USUAL_BLOCK_BYTES]);
  let first: CartridgeContents | undefined;
  for (const blockBytes of lengths) {
    try {
      await drive.setRecordBytes(blockBytes, true);
    } catch (error) {
      if (!isKind(error, 'io') || !(await drive.status()).loaded) throw error;
      continue; // not one that this drive can do
    }
    const contents = await readFirstFile(drive);
    if (contents.kind !== 'foreign') return contents;
    if (!contents.isUnreadable) first ??= contents;
  }
  return first ?? { kind: 'foreign', what: 'something whose first record cannot be read' };
}

/** Puts the drive in the variable block mode; false if it has none. */
async function hasVariableBlocks(drive: TapeDrive): Promise<boolean> {
  try {
    await drive.setRecordBytes(MAX_RECORD_BYTES, false);
  } catch (error) {
    if (!isKind(error, 'io') || !(await drive.status()).loaded) throw error;
    return false; // nor blocks of that length
  }
  return (await drive.status()).blockBytes === 0;
}

async function readFirstFile(
  drive: TapeDrive,
): Promise<CartridgeContents & { readonly isUnreadable?: boolean }> {
  await drive.rewind();
  const first = Buffer.alloc(MAX_RECORD_BYTES);
  let bytes: number;
  try {
    const found = await drive.read(first);
    if (found.kind !== 'record') return { kind: 'blank' };
    bytes = found.bytes;
  } catch (error) {
    if (!isKind(error, 'io') || !(await drive.status()).loaded) throw error;
    return {
      kind: 'foreign',
      what: `something whose first record cannot be read (${error.message})`,
      isUnreadable: true,
    };
  }
  const header = decodeTarHeader(first, 0);
  if (header === undefined && bytes === MAX_RECORD_BYTES && (await holdsNoFile(drive)))
    return { kind: 'blank' };
  if (header === undefined) return { kind: 'foreign', what: 'data that is not of b2' };
  if (header.type !== 'global')
    return { kind: 'foreign', what: `a tar archive that begins with "${printable(header.name)}"` };
  await drive.rewind();
  const damage: TapeDamage[] = [];
  for await (const item of readTapeFile({
    drive,
    recordBytes: bytes,
    file: 0,
    onDamage: (d) => damage.push(d),
  })) {
    if (item.kind !== 'member' || !item.name.endsWith(`/${LABEL_MEMBER}`)) continue;
    try {
      return { kind: 'b2', label: decodeTapeLabel(item.data, `the label in ${drive.path}`) };
    } catch (error) {
      if (!isKind(error, 'damaged')) throw error;
      return { kind: 'foreign', what: `a b2 tape whose label is damaged (${error.message})` };
    }
  }
  const why = damage[0] === undefined ? '' : ` (${damage[0].reason})`;
  return {
    kind: 'foreign',
    what: `a tar archive, perhaps of b2, without a label that can be read${why}`,
  };
}

/**
 * Some drives answer the first read of a blank cartridge with a buffer of nothing, as long as was asked for. Then there is no file
 * mark on it either, which no program that wrote anything leaves out.
 */
async function holdsNoFile(drive: TapeDrive): Promise<boolean> {
  await drive.rewind();
  try {
    await drive.spaceFiles(1);
    return false;
  } catch (error) {
    if (!isKind(error, 'io') || !(await drive.status()).loaded) throw error;
    return true;
  }
}

/** What the file at the head says it is; undefined for one that says nothing. The head is within the file afterwards. */
export async function readFileId(
  drive: TapeDrive,
  recordBytes: number,
): Promise<TapeFileId | 'end' | undefined> {
  const ignore = (): void => undefined;
  for await (const item of readTapeFile({ drive, recordBytes, file: -1, onDamage: ignore })) {
    return item.kind === 'file' ? item.id : undefined;
  }
  return 'end';
}

/** Goes to the beginning of file `file`. */
export async function toFile(drive: TapeDrive, file: number): Promise<void> {
  await drive.rewind();
  if (file > 0) await drive.spaceFiles(file);
}

/**
 * Goes behind the first `marks` file marks; false if the cartridge has fewer, which only its end of data says: where a drive fails that is thrown. The
 * head is then at the end of data.
 */
export async function reachesFile(drive: TapeDrive, marks: number): Promise<boolean> {
  try {
    await toFile(drive, marks);
    return true;
  } catch (error) {
    if (!isKind(error, 'io')) throw error;
    if ((await drive.status()).atEnd) return false;
    // Not every drive says why it went no further; that it finds the end of data, and in which file, says it as well.
    await drive.toEndOfData();
    const { file } = await drive.status();
    if (file === undefined || file >= marks) throw error;
    return false;
  }
}
