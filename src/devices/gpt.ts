/**
 * GPT and MBR partition tables as bytes: reading, checking, and moving a GPT to the end of a larger disk.
 * Sources: UEFI specification 2.10 chapter 5; for MBR the same, 5.2. All numbers little-endian.
 *
 * Pure: no I/O. `GptMove` and the MBR functions say what is to be written where.
 */
import { crc32 } from 'node:zlib';

import { B2Error } from '../errors.js';
import { roundDown, safeNumber } from '../units.js';

const SIGNATURE = 'EFI PART';
const REVISION_1_0 = 0x0001_0000;
const MIN_HEADER_BYTES = 92;
const MIN_ENTRY_BYTES = 128;
/** Tables in the wild have 128 entries of 128 bytes; more than this is damage, not a table. */
const MAX_TABLE_BYTES = 4 * 1024 * 1024;
/** Ends of grown partitions fall on this, as fdisk and parted place them. */
const ALIGN_BYTES = 1024 * 1024;
const ZERO_GUID = '00000000-0000-0000-0000-000000000000';

export interface GptHeader {
  /** Where this header says it lies. */
  readonly myLba: number;
  /** Where it says the other one lies. */
  readonly alternateLba: number;
  readonly firstUsableLba: number;
  readonly lastUsableLba: number;
  readonly diskGuid: string;
  readonly entriesLba: number;
  readonly entryCount: number;
  readonly entryBytes: number;
  readonly entriesCrc32: number;
  readonly headerBytes: number;
}

export interface GptPartition {
  /** From 1, the position in the table. */
  readonly number: number;
  readonly typeGuid: string;
  readonly guid: string;
  readonly firstLba: number;
  /** Inclusive. */
  readonly lastLba: number;
  readonly attributes: bigint;
  readonly name: string;
}

/** A whole, checked GPT: one header with its entries. */
export interface Gpt {
  readonly sectorBytes: number;
  readonly header: GptHeader;
  /** The header's sector as it was read. */
  readonly headerSector: Uint8Array;
  /** `entryCount * entryBytes` bytes. */
  readonly entries: Uint8Array;
  readonly partitions: readonly GptPartition[];
}

function view(bytes: Uint8Array): DataView {
  return new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
}

/** The GUID at `offset`, in the mixed-endian order of UEFI, as lower-case text. */
export function guidAt(bytes: Uint8Array, offset: number): string {
  const v = view(bytes);
  const hex = (n: number, digits: number): string => n.toString(16).padStart(digits, '0');
  const tail = Buffer.from(bytes.subarray(offset + 8, offset + 16)).toString('hex');
  return `${hex(v.getUint32(offset, true), 8)}-${hex(v.getUint16(offset + 4, true), 4)}-${hex(v.getUint16(offset + 6, true), 4)}-${tail.slice(0, 4)}-${tail.slice(4)}`;
}

/** True if the sector begins with a GPT header's signature, sound or not. */
export function looksLikeGptHeader(sector: Uint8Array): boolean {
  return Buffer.from(sector.subarray(0, 8)).toString('latin1') === SIGNATURE;
}

/** Parses and checks a header that was read from LBA `lba` of a disk with `sectorBytes` = `sector.byteLength`. */
export function parseGptHeader(sector: Uint8Array, lba: number): GptHeader {
  const damaged = (why: string): B2Error =>
    new B2Error('damaged', `GPT header in sector ${lba}: ${why}`);
  if (sector.byteLength < 512 || !looksLikeGptHeader(sector)) throw damaged('no signature');
  const v = view(sector);
  const revision = v.getUint32(8, true);
  if (revision !== REVISION_1_0) {
    throw new B2Error(
      'unsupported',
      `GPT header in sector ${lba}: revision 0x${revision.toString(16)} is not known`,
    );
  }
  const headerBytes = v.getUint32(12, true);
  if (headerBytes < MIN_HEADER_BYTES || headerBytes > sector.byteLength)
    throw damaged(`header size ${headerBytes}`);
  if (headerCrc(sector, headerBytes) !== v.getUint32(16, true)) throw damaged('wrong checksum');
  const lbaAt = (offset: number, what: string): number => {
    const value = v.getBigUint64(offset, true);
    if (value > BigInt(Number.MAX_SAFE_INTEGER))
      throw damaged(`${what} ${value} is beyond any disk`);
    return safeNumber(value, what);
  };
  const header: GptHeader = {
    headerBytes,
    myLba: lbaAt(24, 'own sector'),
    alternateLba: lbaAt(32, 'alternate sector'),
    firstUsableLba: lbaAt(40, 'first usable sector'),
    lastUsableLba: lbaAt(48, 'last usable sector'),
    diskGuid: guidAt(sector, 56),
    entriesLba: lbaAt(72, 'sector of the entries'),
    entryCount: v.getUint32(80, true),
    entryBytes: v.getUint32(84, true),
    entriesCrc32: v.getUint32(88, true),
  };
  if (header.myLba !== lba) throw damaged(`it says that it lies in sector ${header.myLba}`);
  if (header.entryBytes < MIN_ENTRY_BYTES || (header.entryBytes & (header.entryBytes - 1)) !== 0) {
    throw damaged(`entry size ${header.entryBytes}`);
  }
  if (header.entryCount < 1 || header.entryCount * header.entryBytes > MAX_TABLE_BYTES) {
    throw damaged(`${header.entryCount} entries of ${header.entryBytes} bytes`);
  }
  if (header.firstUsableLba > header.lastUsableLba) throw damaged('no usable sectors');
  return header;
}

function headerCrc(sector: Uint8Array, headerBytes: number): number {
  const copy = Uint8Array.from(sector.subarray(0, headerBytes));
  copy.fill(0, 16, 20);
  return crc32(copy);
}

/** Bytes of the entries that belong to `header`. */
export function gptEntriesBytes(header: GptHeader): number {
  return header.entryCount * header.entryBytes;
}

/** Checks `entries` (exactly {@link gptEntriesBytes} of them) against the header's checksum and for sense. */
export function parseGptEntries(header: GptHeader, entries: Uint8Array): readonly GptPartition[] {
  const damaged = (why: string): B2Error =>
    new B2Error('damaged', `GPT entries in sector ${header.entriesLba}: ${why}`);
  if (entries.byteLength !== gptEntriesBytes(header)) throw damaged('cut short');
  if (crc32(entries) !== header.entriesCrc32) throw damaged('wrong checksum');
  const v = view(entries);
  const found: GptPartition[] = [];
  for (let i = 0; i < header.entryCount; i++) {
    const at = i * header.entryBytes;
    const typeGuid = guidAt(entries, at);
    if (typeGuid === ZERO_GUID) continue;
    const first = v.getBigUint64(at + 32, true);
    const last = v.getBigUint64(at + 40, true);
    if (
      first < BigInt(header.firstUsableLba) ||
      last > BigInt(header.lastUsableLba) ||
      first > last
    ) {
      throw damaged(
        `partition ${i + 1} covers sectors ${first} to ${last}, outside of ${header.firstUsableLba} to ${header.lastUsableLba}`,
      );
    }
    found.push({
      number: i + 1,
      typeGuid,
      guid: guidAt(entries, at + 16),
      firstLba: Number(first),
      lastLba: Number(last),
      attributes: v.getBigUint64(at + 48, true),
      name: nameAt(entries, at + 56),
    });
  }
  const byPlace = found.toSorted((a, b) => a.firstLba - b.firstLba);
  for (const [i, partition] of byPlace.entries()) {
    const next = byPlace[i + 1];
    if (next !== undefined && next.firstLba <= partition.lastLba) {
      throw damaged(`partitions ${partition.number} and ${next.number} overlap`);
    }
  }
  return found;
}

/** 36 UTF-16LE characters, up to the first NUL. */
function nameAt(bytes: Uint8Array, offset: number): string {
  const raw = Buffer.from(bytes.subarray(offset, offset + 72)).toString('utf16le');
  const end = raw.indexOf('\0');
  return end === -1 ? raw : raw.slice(0, end);
}

/** One write of a plan. */
export interface TableWrite {
  /** Bytes from the start of the disk. */
  readonly offset: number;
  readonly data: Uint8Array;
}

export interface GrownPartition {
  readonly number: number;
  readonly offsetBytes: number;
  readonly oldBytes: number;
  readonly newBytes: number;
}

export interface GptMove {
  /**
   * Groups of writes. The disk is synced after each: a power cut between two leaves at least one valid table.
   * Empty if there is nothing to do.
   */
  readonly steps: readonly (readonly TableWrite[])[];
  /** The last partition, if it was to be grown and there was room. */
  readonly grown: GrownPartition | undefined;
}

/**
 * How to move a GPT to the end of a disk of `diskBytes`: backup header and entries into its last sectors, usable
 * range, alternate sector and protective MBR to match; with `growLast` the partition that lies last on the disk
 * reaches to the end (down to a whole MiB). `sector0` is the disk's first sector, `gpt` its sound primary table.
 *
 * Refuses (`refused`, `unsupported`) what it does not understand: a smaller disk, a hybrid MBR, a table whose parts
 * lie in unusual places.
 */
export function moveGpt(
  gpt: Gpt,
  sector0: Uint8Array,
  diskBytes: number,
  options: { readonly growLast: boolean },
): GptMove {
  const { header, sectorBytes } = gpt;
  const sectors = Math.floor(diskBytes / sectorBytes);
  const lastLba = sectors - 1;
  if (header.myLba !== 1)
    throw new B2Error(
      'unsupported',
      `the GPT to move is the one in sector ${header.myLba}, not the primary one`,
    );
  const entriesSectors = Math.ceil(gptEntriesBytes(header) / sectorBytes);
  if (header.entriesLba < 2 || header.entriesLba + entriesSectors > header.firstUsableLba) {
    throw new B2Error(
      'unsupported',
      `the GPT keeps its entries in an unusual place (sector ${header.entriesLba})`,
    );
  }
  if (header.alternateLba <= header.lastUsableLba) {
    throw new B2Error(
      'unsupported',
      `the GPT's backup lies among the partitions (sector ${header.alternateLba})`,
    );
  }
  const last = lastPartition(gpt.partitions);
  const backupEntriesLba = lastLba - entriesSectors;
  const lastUsableLba = backupEntriesLba - 1;
  if (
    lastLba < header.alternateLba ||
    (last !== undefined && last.lastLba > lastUsableLba) ||
    lastUsableLba <= header.firstUsableLba
  ) {
    throw new B2Error(
      'refused',
      `the disk ends at sector ${lastLba}, before the end of its partition table (sector ${header.alternateLba})`,
      { hint: 'Restore to a disk at least as large as the original.' },
    );
  }
  const mbr = protectiveMbr(sector0, sectors, sectorBytes);

  const entries = Uint8Array.from(gpt.entries);
  let grown: GrownPartition | undefined;
  if (options.growLast && last !== undefined) {
    const end = Math.max(
      last.lastLba,
      roundDown((lastUsableLba + 1) * sectorBytes, ALIGN_BYTES) / sectorBytes - 1,
    );
    if (end > last.lastLba) {
      view(entries).setBigUint64((last.number - 1) * header.entryBytes + 40, BigInt(end), true);
      grown = {
        number: last.number,
        offsetBytes: last.firstLba * sectorBytes,
        oldBytes: (last.lastLba - last.firstLba + 1) * sectorBytes,
        newBytes: (end - last.firstLba + 1) * sectorBytes,
      };
    }
  }
  const moved = lastLba !== header.alternateLba || lastUsableLba !== header.lastUsableLba;
  if (!moved && grown === undefined) return { steps: [], grown: undefined };

  const entriesCrc32 = crc32(entries);
  const primary = gptHeaderSector(gpt, {
    myLba: 1,
    alternateLba: lastLba,
    entriesLba: header.entriesLba,
    lastUsableLba,
    entriesCrc32,
  });
  const backup = gptHeaderSector(gpt, {
    myLba: lastLba,
    alternateLba: 1,
    entriesLba: backupEntriesLba,
    lastUsableLba,
    entriesCrc32,
  });
  const paddedEntries = new Uint8Array(entriesSectors * sectorBytes);
  paddedEntries.set(entries);

  const steps: TableWrite[][] = [
    [
      { offset: backupEntriesLba * sectorBytes, data: paddedEntries },
      { offset: lastLba * sectorBytes, data: backup },
    ],
    [
      { offset: header.entriesLba * sectorBytes, data: paddedEntries },
      { offset: sectorBytes, data: primary },
      { offset: 0, data: mbr },
    ],
  ];
  // A stale backup in the middle of the disk would be taken for a table by a tool that searches for one.
  if (header.alternateLba < backupEntriesLba) {
    steps.push([{ offset: header.alternateLba * sectorBytes, data: new Uint8Array(sectorBytes) }]);
  }
  checkMove(steps, sectorBytes, lastLba);
  return { steps, grown };
}

/** Reads back what was built, before it goes anywhere. */
function checkMove(
  steps: readonly (readonly TableWrite[])[],
  sectorBytes: number,
  lastLba: number,
): void {
  const at = (lba: number): Uint8Array => {
    const found = steps.flat().find((write) => write.offset === lba * sectorBytes);
    if (found === undefined) throw new Error(`no write for sector ${lba}`);
    return found.data;
  };
  for (const lba of [1, lastLba]) {
    const header = parseGptHeader(at(lba), lba);
    parseGptEntries(header, at(header.entriesLba).subarray(0, gptEntriesBytes(header)));
  }
}

function gptHeaderSector(
  gpt: Gpt,
  fields: {
    readonly myLba: number;
    readonly alternateLba: number;
    readonly entriesLba: number;
    readonly lastUsableLba: number;
    readonly entriesCrc32: number;
  },
): Uint8Array {
  const sector = Uint8Array.from(gpt.headerSector);
  const v = view(sector);
  v.setBigUint64(24, BigInt(fields.myLba), true);
  v.setBigUint64(32, BigInt(fields.alternateLba), true);
  v.setBigUint64(48, BigInt(fields.lastUsableLba), true);
  v.setBigUint64(72, BigInt(fields.entriesLba), true);
  v.setUint32(88, fields.entriesCrc32, true);
  v.setUint32(16, headerCrc(sector, gpt.header.headerBytes), true);
  return sector;
}

/** The partition that lies last on the disk, whatever its number. */
export function lastPartition<P extends { readonly lastLba: number }>(
  partitions: readonly P[],
): P | undefined {
  return partitions.reduce<P | undefined>(
    (last, p) => (last === undefined || p.lastLba > last.lastLba ? p : last),
    undefined,
  );
}

// ---- MBR ----

const MBR_TABLE = 446;
const MBR_ENTRY_BYTES = 16;
const MBR_PROTECTIVE = 0xee;
const MBR_EXTENDED: readonly number[] = [0x05, 0x0f, 0x85];
const MAX_U32 = 0xffff_ffff;

export interface MbrEntry {
  /** 1 to 4: the place in its sector. */
  readonly slot: number;
  readonly active: boolean;
  readonly type: number;
  readonly firstLba: number;
  readonly sectors: number;
}

export interface Mbr {
  /** Disk signature, as Linux shows it (eight hex digits). */
  readonly id: string;
  /** Slots in use. */
  readonly entries: readonly MbrEntry[];
  /** True if it only protects a GPT: one entry, of type 0xEE. */
  readonly protective: boolean;
}

/** True for the partition type of an extended partition. */
export function isExtended(type: number): boolean {
  return MBR_EXTENDED.includes(type);
}

/**
 * The partition table in a disk's first sector, or undefined if it holds none: no 55AA, a boot record of FAT or NTFS,
 * or entries that make no sense on a disk of `diskSectors`. An empty table counts as one if it has a disk signature.
 */
export function parseMbr(sector: Uint8Array, diskSectors: number): Mbr | undefined {
  const entries = mbrEntries(sector);
  if (entries === undefined) return undefined;
  const oem = Buffer.from(sector.subarray(3, 11)).toString('latin1');
  const fat =
    Buffer.from(sector.subarray(0x36, 0x3e)).toString('latin1') +
    Buffer.from(sector.subarray(0x52, 0x5a)).toString('latin1');
  if (/^(NTFS|EXFAT|-FVE-FS-)/.test(oem) || /FAT(12|16|32)? {3}/.test(fat)) return undefined;
  const id = view(sector).getUint32(440, true);
  if (entries.length === 0 && id === 0) return undefined;
  if (entries.some((e) => e.firstLba === 0 || e.firstLba >= diskSectors)) return undefined;
  return {
    id: id.toString(16).padStart(8, '0'),
    entries,
    protective: entries.length === 1 && entries[0]?.type === MBR_PROTECTIVE,
  };
}

/** The entries of an MBR or EBR sector; undefined if the sector is none. */
export function mbrEntries(sector: Uint8Array): readonly MbrEntry[] | undefined {
  if (sector.byteLength < 512 || sector[510] !== 0x55 || sector[511] !== 0xaa) return undefined;
  const v = view(sector);
  const found: MbrEntry[] = [];
  for (let slot = 1; slot <= 4; slot++) {
    const at = MBR_TABLE + (slot - 1) * MBR_ENTRY_BYTES;
    const status = v.getUint8(at);
    if (status !== 0 && status !== 0x80) return undefined;
    const type = v.getUint8(at + 4);
    const sectors = v.getUint32(at + 12, true);
    if (type === 0 || sectors === 0) continue;
    found.push({
      slot,
      active: status === 0x80,
      type,
      firstLba: v.getUint32(at + 8, true),
      sectors,
    });
  }
  return found;
}

function setMbrEntrySectors(sector: Uint8Array, slot: number, sectors: number): void {
  const at = MBR_TABLE + (slot - 1) * MBR_ENTRY_BYTES;
  view(sector).setUint32(at + 12, sectors, true);
  // Cylinder, head and sector cannot name the new end; all ones mean "look at the sector numbers".
  sector.set([0xfe, 0xff, 0xff], at + 5);
}

function protectiveMbr(sector0: Uint8Array, sectors: number, sectorBytes: number): Uint8Array {
  const copy = Uint8Array.from(sector0.subarray(0, sectorBytes));
  const entries = mbrEntries(copy);
  const [only] = entries ?? [];
  if (entries === undefined || only === undefined) {
    throw new B2Error('unsupported', 'the disk has a GPT without the MBR that protects it', {
      hint: 'Repair the partition table first (sgdisk --verify, gdisk).',
    });
  }
  if (entries.length !== 1 || only.type !== MBR_PROTECTIVE || only.firstLba !== 1) {
    throw new B2Error(
      'unsupported',
      'the disk has a hybrid MBR beside its GPT; b2 does not change such tables',
      {
        hint: 'Move the backup table with gdisk (x, e, w) after the restore.',
      },
    );
  }
  setMbrEntrySectors(copy, only.slot, Math.min(sectors - 1, MAX_U32));
  return copy;
}

/**
 * How to let the last primary partition of an MBR disk reach to the end of `diskBytes` (down to a whole MiB, and at
 * most 2^32 sectors). Undefined `grown` with no steps if it does so already. Rejects with `unsupported` if the
 * partition is extended, so that logical ones would have to move along.
 */
export function growMbrLast(sector0: Uint8Array, sectorBytes: number, diskBytes: number): GptMove {
  const mbr = parseMbr(sector0, Math.floor(diskBytes / sectorBytes));
  const last = lastPartition(
    (mbr?.entries ?? []).map((e) => ({ ...e, lastLba: e.firstLba + e.sectors - 1 })),
  );
  if (mbr === undefined || last === undefined)
    throw new B2Error('unsupported', 'there is no partition in the MBR');
  if (mbr.protective) throw new B2Error('unsupported', 'the MBR only protects a GPT');
  if (isExtended(last.type)) {
    throw new B2Error(
      'unsupported',
      `partition ${last.slot} lies last and is an extended one; b2 does not grow logical partitions`,
      {
        hint: 'Grow it with parted or fdisk after the restore.',
      },
    );
  }
  const endLba = Math.min(
    roundDown(diskBytes, ALIGN_BYTES) / sectorBytes,
    last.firstLba + MAX_U32,
    MAX_U32,
  );
  const sectors = endLba - last.firstLba;
  if (sectors <= last.sectors) return { steps: [], grown: undefined };
  const data = Uint8Array.from(sector0.subarray(0, sectorBytes));
  setMbrEntrySectors(data, last.slot, sectors);
  return {
    steps: [[{ offset: 0, data }]],
    grown: {
      number: last.slot,
      offsetBytes: last.firstLba * sectorBytes,
      oldBytes: last.sectors * sectorBytes,
      newBytes: sectors * sectorBytes,
    },
  };
}
