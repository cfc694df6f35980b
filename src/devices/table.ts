/** Reads the partition table of a device or image, and applies a change to it. */
import { B2Error, messageOf } from '../errors.js';
import type { ReadDevice, WriteDevice } from './device.js';
import {
  gptEntriesBytes,
  guidAt,
  isExtended,
  looksLikeGptHeader,
  mbrEntries,
  parseGptEntries,
  parseGptHeader,
  parseMbr,
  type Gpt,
  type GptMove,
  type MbrEntry,
} from './gpt.js';

/** What the functions here need of a device. */
export type Readable = Pick<ReadDevice, 'facts' | 'read'>;

/** A chain of more logical partitions than this is a loop or damage. */
const MAX_LOGICAL = 128;

/** One partition. JSON-able. */
export interface PartitionFacts {
  /** As the kernel numbers it: GPT slot, MBR 1 to 4, logical from 5. */
  readonly number: number;
  readonly offsetBytes: number;
  readonly sizeBytes: number;
  /** GPT: type GUID. MBR: `0x83`. */
  readonly type: string;
  readonly kind: 'gpt' | 'primary' | 'extended' | 'logical';
  /** GPT: the partition's own GUID. MBR: disk signature and number, as Linux makes its PARTUUID. */
  readonly uuid: string;
  readonly name?: string;
}

/** A partition table. JSON-able. */
export interface TableFacts {
  readonly type: 'gpt' | 'mbr';
  /** Disk GUID or MBR signature. */
  readonly id: string;
  /** The sector size that the table counts in: not always the device's (an image of another disk). */
  readonly sectorBytes: number;
  readonly partitions: readonly PartitionFacts[];
  /** What is wrong with it, in words; it was readable all the same. */
  readonly problems: readonly string[];
}

/** A table with the bytes that a change starts from. */
export interface PartitionTable {
  readonly facts: TableFacts;
  /** The disk's first sector, of `facts.sectorBytes`. */
  readonly sector0: Uint8Array;
  /** The sound primary GPT; undefined for an MBR, or if only the backup is sound. */
  readonly primaryGpt: Gpt | undefined;
}

/** Exactly `length` bytes at `offset`, or undefined where the device ends before. */
export async function readExactly(
  device: Readable,
  offset: number,
  length: number,
): Promise<Uint8Array | undefined> {
  if (offset < 0 || length < 0 || offset + length > device.facts.sizeBytes) return undefined;
  const bytes = new Uint8Array(length);
  return (await device.read(bytes, offset)) === length ? bytes : undefined;
}

async function readGpt(device: Readable, sectorBytes: number, lba: number): Promise<Gpt> {
  const headerSector = await readExactly(device, lba * sectorBytes, sectorBytes);
  if (headerSector === undefined)
    throw new B2Error('damaged', `GPT header in sector ${lba}: the disk ends before it`);
  const header = parseGptHeader(headerSector, lba);
  const entries = await readExactly(
    device,
    header.entriesLba * sectorBytes,
    gptEntriesBytes(header),
  );
  if (entries === undefined)
    throw new B2Error(
      'damaged',
      `GPT entries in sector ${header.entriesLba}: the disk ends before their end`,
    );
  return {
    sectorBytes,
    header,
    headerSector,
    entries,
    partitions: parseGptEntries(header, entries),
  };
}

async function attempt<T>(task: () => Promise<T>): Promise<T | string> {
  try {
    return await task();
  } catch (error) {
    if (error instanceof B2Error && (error.kind === 'damaged' || error.kind === 'unsupported'))
      return error.message;
    throw error;
  }
}

async function readGptTable(
  device: Readable,
  sectorBytes: number,
): Promise<PartitionTable | undefined> {
  const sectors = Math.floor(device.facts.sizeBytes / sectorBytes);
  const problems: string[] = [];
  const first = await readExactly(device, sectorBytes, sectorBytes);
  const final = await readExactly(device, (sectors - 1) * sectorBytes, sectorBytes);
  const looksPrimary = first !== undefined && looksLikeGptHeader(first);
  if (!looksPrimary && !(final !== undefined && looksLikeGptHeader(final))) return undefined;

  const primary = looksPrimary
    ? await attempt(() => readGpt(device, sectorBytes, 1))
    : 'the primary GPT is missing';
  if (typeof primary === 'string') problems.push(primary);
  const backupLba = typeof primary === 'string' ? sectors - 1 : primary.header.alternateLba;
  const backup = await attempt(() => readGpt(device, sectorBytes, backupLba));
  if (typeof backup === 'string') problems.push(`backup: ${backup}`);
  if (typeof primary !== 'string') {
    if (backupLba !== sectors - 1)
      problems.push(
        `the backup is in sector ${backupLba}, not at the end of the disk (${sectors - 1})`,
      );
    if (typeof backup !== 'string' && backup.header.entriesCrc32 !== primary.header.entriesCrc32) {
      problems.push('the backup lists other partitions than the primary table');
    }
  }
  const sound =
    typeof primary !== 'string' ? primary : typeof backup !== 'string' ? backup : undefined;
  const sector0 = await readExactly(device, 0, sectorBytes);
  if (sector0 === undefined) return undefined;
  return {
    sector0,
    primaryGpt: typeof primary === 'string' ? undefined : primary,
    facts: {
      type: 'gpt',
      id: sound?.header.diskGuid ?? (first === undefined ? '' : guidAt(first, 56)),
      sectorBytes,
      partitions: (sound?.partitions ?? []).map((p) => ({
        number: p.number,
        offsetBytes: p.firstLba * sectorBytes,
        sizeBytes: (p.lastLba - p.firstLba + 1) * sectorBytes,
        type: p.typeGuid,
        kind: 'gpt',
        uuid: p.guid,
        ...(p.name === '' ? {} : { name: p.name }),
      })),
      problems,
    },
  };
}

async function readMbrTable(
  device: Readable,
  sectorBytes: number,
): Promise<PartitionTable | undefined> {
  const sectors = Math.floor(device.facts.sizeBytes / sectorBytes);
  const sector0 = await readExactly(device, 0, sectorBytes);
  if (sector0 === undefined) return undefined;
  const mbr = parseMbr(sector0, sectors);
  if (mbr === undefined) return undefined;
  const problems: string[] = [];
  const partitions: PartitionFacts[] = [];
  const add = (
    entry: MbrEntry,
    firstLba: number,
    number: number,
    kind: PartitionFacts['kind'],
  ): void => {
    if (firstLba + entry.sectors > sectors)
      problems.push(`partition ${number} ends after the end of the disk`);
    partitions.push({
      number,
      offsetBytes: firstLba * sectorBytes,
      sizeBytes: entry.sectors * sectorBytes,
      type: `0x${entry.type.toString(16).padStart(2, '0')}`,
      kind,
      uuid: `${mbr.id}-${number.toString(16).padStart(2, '0')}`,
    });
  };
  for (const entry of mbr.entries)
    add(entry, entry.firstLba, entry.slot, isExtended(entry.type) ? 'extended' : 'primary');

  const extended = mbr.entries.find((entry) => isExtended(entry.type));
  let ebrLba = extended?.firstLba;
  for (let number = 5; extended !== undefined && ebrLba !== undefined; number++) {
    if (number >= 5 + MAX_LOGICAL) {
      problems.push('the chain of logical partitions does not end');
      break;
    }
    const sector = await readExactly(device, ebrLba * sectorBytes, sectorBytes);
    const entries = sector === undefined ? undefined : mbrEntries(sector);
    if (entries === undefined) {
      problems.push(`the chain of logical partitions is broken in sector ${ebrLba}`);
      break;
    }
    const logical = entries.find((entry) => !isExtended(entry.type));
    // An extended partition without logical ones begins with an empty sector of the chain.
    if (logical !== undefined) add(logical, ebrLba + logical.firstLba, number, 'logical');
    const link = entries.find((entry) => isExtended(entry.type));
    ebrLba = link === undefined ? undefined : extended.firstLba + link.firstLba;
  }
  return {
    sector0,
    primaryGpt: undefined,
    facts: { type: 'mbr', id: mbr.id, sectorBytes, partitions, problems },
  };
}

/**
 * The partition table on `device`, or undefined if there is none. A table that counts in another sector size than the
 * device (an image of a 4096-byte disk in a file) is found too; on a block device that is a problem it names.
 */
export async function readPartitionTable(device: Readable): Promise<PartitionTable | undefined> {
  const own = device.facts.logicalBlockBytes;
  for (const sectorBytes of [own, ...[512, 4096].filter((other) => other !== own)]) {
    const table = await readGptTable(device, sectorBytes);
    if (table === undefined) continue;
    if (sectorBytes === own || device.facts.kind === 'file') return table;
    const problem = `the table counts in sectors of ${sectorBytes} bytes, the device has ${own}: the kernel does not see it`;
    return { ...table, facts: { ...table.facts, problems: [...table.facts.problems, problem] } };
  }
  return readMbrTable(device, own);
}

/** Does what a {@link GptMove} says, synced step by step. */
export async function applyTableChange(device: WriteDevice, change: GptMove): Promise<void> {
  for (const [i, step] of change.steps.entries()) {
    try {
      for (const write of step) await device.write(write.data, write.offset);
      await device.sync();
    } catch (error) {
      throw new B2Error(
        'io',
        `partition table of ${device.facts.path}, step ${i + 1} of ${change.steps.length}: ${messageOf(error)}`,
        {
          cause: error,
          hint: 'One of the two copies of the table is whole; sgdisk --verify shows which.',
        },
      );
    }
  }
}
