/**
 * Members of a RAID of Linux (MD), told from their superblocks alone: no mdadm, no kernel and nothing of this machine takes part.
 * Where one member holds everything that is in the array, in order, its data is a range of the member. Everything else is named with
 * the reason: a wrong answer would be worse than none.
 *
 * The layout on the disk is that of include/uapi/linux/raid/md_p.h; what is accepted, and what it means, is as in drivers/md/md.c
 * (super_90_load and super_1_load, super_90_validate and super_1_validate, super_90_sync and super_1_sync).
 */
import { formatBytes, formatTimeNs } from '../human.js';
import type { Image } from '../image.js';

/** Where in an image a member may lie: a partition, a volume, or all of it. */
export interface MdPlace {
  readonly offsetBytes: number;
  readonly sizeBytes: number;
}

/** What a member's superblock says of its array. JSON-able. */
export interface MdArray {
  readonly version: '0.90' | '1.0' | '1.1' | '1.2';
  /** As mdadm names it: `raid1`, `linear`. */
  readonly level: string;
  /** Members of the whole array. */
  readonly disks: number;
  /** As mdadm shows it. */
  readonly uuid: string;
  /** `HOST:NAME`; version 0.90 has none. */
  readonly name?: string;
  /** The member's place among them, from 0; absent of spares and the like. */
  readonly role?: number;
  /** Places for which the superblock knows of no member that works. */
  readonly missing: number;
  /** Goes up with each change of the superblock: of several members the one with the most is the newest. */
  readonly events: number;
  /** When the superblock was written last, UTC; absent where it says no time that can be. */
  readonly updated?: string;
}

/** An area that has a superblock of MD. */
export interface MdMember {
  /** Byte of the area where the superblock lies. */
  readonly superblockOffset: number;
  /** Absent where the superblock cannot be read. */
  readonly array?: MdArray;
  /** The range of the area that is the array: all of it. Absent where that cannot be told of this member alone. */
  readonly data?: MdPlace;
  /** Why there is no `data`, in words. */
  readonly reason?: string;
  /** What else is to be known of what `data` holds, in words. */
  readonly caveats: readonly string[];
}

const SECTOR = 512;
const SUPERBLOCK_BYTES = 4096;
const MAGIC = 0xa92b_4efc;
/** The superblock of version 0.90 lies in the last whole 64 KiB, as does nothing else of the array. */
const RESERVED_BYTES = 64 * 1024;
/** MaxSector of the kernel: nothing left to bring into step. */
const ALL = 0xffff_ffff_ffff_ffffn;

const FEATURE = {
  bitmap: 0x1,
  recoveryOffset: 0x2,
  reshape: 0x4,
  badBlocks: 0x8,
  replacement: 0x10,
  reshapeBackwards: 0x20,
  newOffset: 0x40,
  recoveryBitmap: 0x80,
  clustered: 0x100,
  journal: 0x200,
  ppl: 0x400,
  multiplePpls: 0x800,
  raid0Layout: 0x1000,
} as const;
/** MD_FEATURE_ALL. */
const KNOWN_FEATURES = 0x1fff;

const ROLE_SPARE = 0xffff;
const ROLE_FAULTY = 0xfffe;
const ROLE_JOURNAL = 0xfffd;
const ROLE_MAX = 0xff00;
/** As many as fit behind the header. */
const MAX_DEVICES = (SUPERBLOCK_BYTES - 256) / 2;
const WRITE_MOSTLY = 1;
/** The kernel takes no more than a page. */
const MAX_BAD_BLOCK_SECTORS = 8;

const DISKS_090 = 27;
const DESCRIPTOR_BYTES = 128;
const BITMAP_MAGIC = 0x6d74_6962;
const BITMAP_HEADER_BYTES = 256;
/** md brings members into step with no less than this, whatever else goes on: bytes a second, by dev.raid.speed_limit_min as it is unless somebody lowers it. */
const LEAST_SYNC_RATE = 1_000_000;

/** What makes a superblock one of which nothing can be used. */
class Unusable extends Error {}

/** Where a superblock of that version lies in an area of that size; undefined where the area is too small. */
export function superblockOffset(
  version: MdArray['version'],
  sizeBytes: number,
): number | undefined {
  const sectors = Math.floor(sizeBytes / SECTOR);
  const at = {
    '0.90': Math.floor(sizeBytes / RESERVED_BYTES) * RESERVED_BYTES - RESERVED_BYTES,
    '1.0': Math.floor((sectors - 16) / 8) * 8 * SECTOR,
    '1.1': 0,
    '1.2': 4096,
  }[version];
  return at < 0 || at + SUPERBLOCK_BYTES > sizeBytes ? undefined : at;
}

const VERSIONS = ['1.1', '1.2', '1.0', '0.90'] as const;

/**
 * Looks for a superblock in all places where one may lie; undefined where there is none that says it belongs there. What of the image cannot
 * be read rejects, as {@link Image.read} does; nothing that is written there does.
 */
export async function readMdMember(image: Image, place: MdPlace): Promise<MdMember | undefined> {
  const read = async (offset: number, length: number): Promise<Buffer | undefined> => {
    const isInside = offset >= 0 && length >= 0 && offset + length <= place.sizeBytes;
    if (!isInside || !Number.isSafeInteger(offset)) return undefined;
    const into = Buffer.alloc(length);
    await image.read(into, place.offsetBytes + offset);
    return into;
  };
  const found: MdMember[] = [];
  for (const version of VERSIONS) {
    const at = superblockOffset(version, place.sizeBytes);
    const bytes = at === undefined ? undefined : await read(at, SUPERBLOCK_BYTES);
    if (at === undefined || bytes === undefined) continue;
    try {
      const member =
        version === '0.90'
          ? await read090(bytes, at, read)
          : await read1(bytes, at, version, place.sizeBytes, read);
      if (member !== undefined) found.push(member);
    } catch (error) {
      if (!(error instanceof Unusable)) throw error;
      found.push({ superblockOffset: at, reason: error.message, caveats: [] });
    }
  }
  const good = found.filter((member) => member.array !== undefined);
  const [first, second] = good.length > 0 ? good : found;
  if (first === undefined || second === undefined || good.length < 2) return first;
  return {
    superblockOffset: first.superblockOffset,
    reason: `it has superblocks of two arrays (${good.map(({ array }) => shownArray(array)).join('; ')}), and which one counts cannot be told`,
    caveats: [],
  };
}

type ReadArea = (offset: number, length: number) => Promise<Buffer | undefined>;

/** What both kinds of superblock say, in the words of version 1. Sectors are of 512 bytes. */
interface Facts {
  readonly array: MdArray;
  readonly level: number;
  readonly layout: number;
  /** 0: none. */
  readonly chunkSectors: number;
  readonly disks: number;
  /** Of each member that the array uses. */
  readonly usedSectors: number;
  /** Of this one that the array could use, and where they begin. */
  readonly dataSectors: number;
  readonly dataOffsetSectors: number;
  /** As super_*_validate reads it: sectors before it are the same on all members. */
  readonly inStepBefore: bigint;
  /** Places of the array for which there is a member. */
  readonly roles: ReadonlySet<number>;
  readonly createdSeconds: number;
  readonly updatedSeconds: number;
  readonly isWriteMostly: boolean;
  /** Why nothing of it counts, whatever its level. */
  readonly reason: string | undefined;
  /** Byte of the area where its bitmap begins; undefined without one. */
  readonly bitmapOffset: number | undefined;
  /** As the bitmap has it. */
  readonly uuidBytes: Buffer;
}

async function read1(
  bytes: Buffer,
  at: number,
  version: '1.0' | '1.1' | '1.2',
  sizeBytes: number,
  read: ReadArea,
): Promise<MdMember | undefined> {
  if (bytes.readUInt32LE(0) !== MAGIC) return undefined;
  const major = bytes.readUInt32LE(4);
  if (major > 1)
    throw new Unusable(`its superblock is of version ${major}, which b2 does not know`);
  // One that lies elsewhere by its own words is of a disk that this is a part of, or that was another size.
  if (major !== 1 || bytes.readBigUInt64LE(144) * BigInt(SECTOR) !== BigInt(at)) return undefined;
  const maxDevices = bytes.readUInt32LE(220);
  if (maxDevices > MAX_DEVICES) throw new Unusable('its superblock has more places than can be');
  const superblockBytes = 256 + maxDevices * 2;
  if (checksum1(bytes, superblockBytes) !== bytes.readUInt32LE(216))
    throw new Unusable(`the checksum of its superblock (version ${version}) is wrong`);

  const level = bytes.readInt32LE(72);
  const disks = bytes.readUInt32LE(92);
  const features = bytes.readUInt32LE(8);
  const devices = Array.from({ length: maxDevices }, (_, i) => bytes.readUInt16LE(256 + 2 * i));
  const own = devices[bytes.readUInt32LE(160)] ?? ROLE_SPARE;
  const roles = new Set(devices.filter((role) => role < disks));
  const seconds = (offset: number): number =>
    Number(bytes.readBigUInt64LE(offset) & 0xff_ffff_ffffn);
  const end = bytes.indexOf(0, 32);
  const name = bytes.toString('utf8', 32, end < 0 || end > 64 ? 64 : end);
  const updated = utc(seconds(192));
  const array: MdArray = {
    version,
    level: levelName(level),
    disks,
    uuid: [16, 20, 24, 28].map((i) => bytes.toString('hex', i, i + 4)).join(':'),
    ...(name === '' ? {} : { name }),
    ...(own < disks ? { role: own } : {}),
    missing: Math.max(0, disks - roles.size),
    events: Number(bytes.readBigUInt64LE(200)),
    ...(updated === undefined ? {} : { updated }),
  };
  const sectors = (offset: number): number => {
    const value = bytes.readBigUInt64LE(offset);
    return value > BigInt(Math.floor(Number.MAX_SAFE_INTEGER / SECTOR)) ? NaN : Number(value);
  };
  const dataOffsetSectors = sectors(128);
  const dataSectors = sectors(136);
  // With version 1.0 the superblock is the end of what can be data; with the others it lies before it.
  const endSectors = version === '1.0' ? at / SECTOR : Math.floor(sizeBytes / SECTOR);
  const isPlaced =
    dataSectors >= 10 &&
    dataOffsetSectors + dataSectors <= endSectors &&
    (version === '1.0' || dataOffsetSectors * SECTOR >= at + superblockBytes);
  const facts: Facts = {
    array,
    level,
    layout: bytes.readUInt32LE(76),
    chunkSectors: bytes.readUInt32LE(88),
    disks,
    usedSectors: sectors(80),
    dataSectors,
    dataOffsetSectors,
    inStepBefore: bytes.readBigUInt64LE(208),
    roles,
    createdSeconds: seconds(64),
    updatedSeconds: seconds(192),
    isWriteMostly: ((bytes[184] ?? 0) & WRITE_MOSTLY) !== 0,
    reason:
      unknownIn1(bytes, features) ??
      roleReason(own, disks) ??
      underWayIn1(bytes, features) ??
      (isPlaced ? undefined : 'its superblock has its data where it cannot be'),
    bitmapOffset:
      (features & FEATURE.bitmap) === 0 ? undefined : at + bytes.readInt32LE(96) * SECTOR,
    uuidBytes: bytes.subarray(16, 32),
  };
  const member = await memberOf(facts, at, read);
  if (member.data === undefined || (features & FEATURE.badBlocks) === 0) return member;
  const bad = await badBlocksReason(bytes, at, read);
  return bad === undefined ? member : { superblockOffset: at, array, reason: bad, caveats: [] };
}

/** The sum of a superblock of version 1 (calc_sb_1_csum), its own place counted as zero. */
function checksum1(bytes: Buffer, length: number): number {
  let sum = 0;
  for (let at = 0; at + 4 <= length; at += 4) if (at !== 216) sum += bytes.readUInt32LE(at);
  if (length % 4 === 2) sum += bytes.readUInt16LE(length - 2);
  return ((sum >>> 0) + Math.floor(sum / 2 ** 32)) >>> 0;
}

/** Fields and features that are newer than this code. */
function unknownIn1(bytes: Buffer, features: number): string | undefined {
  const unknown = (features & ~KNOWN_FEATURES) >>> 0;
  if (unknown !== 0)
    return `its superblock has features that b2 does not know (0x${unknown.toString(16)})`;
  // Since Linux 6.19 the first of what was padding is the size of the array's blocks.
  const block = bytes.readUInt32LE(224);
  const isKnown =
    bytes.readUInt32LE(12) === 0 &&
    (block === 0 || block === 512 || block === 4096) &&
    bytes.subarray(228, 256).every((byte) => byte === 0);
  return isKnown ? undefined : 'its superblock has fields that b2 does not know';
}

function roleReason(role: number, disks: number): string | undefined {
  if (role === ROLE_SPARE) return 'it is a spare: what is on it is not of the array, or old';
  if (role === ROLE_FAULTY)
    return 'the array has given it up as faulty: what is on it is old, or wrong';
  if (role === ROLE_JOURNAL) return 'it is the journal of the array';
  if (role >= ROLE_MAX || role >= disks) return 'its place in the array is none that there is';
  return undefined;
}

/** Something that goes on in the array, or a kind of array, with which this member alone is not the whole. */
function underWayIn1(bytes: Buffer, features: number): string | undefined {
  const has = (...bits: readonly number[]): boolean => bits.some((bit) => (features & bit) !== 0);
  const isReshaped = has(FEATURE.reshape, FEATURE.reshapeBackwards, FEATURE.newOffset);
  if (isReshaped)
    return 'the array was being reshaped: its data was half in one order and half in another';
  if (has(FEATURE.recoveryOffset, FEATURE.recoveryBitmap, FEATURE.replacement)) {
    const done = bytes.readBigUInt64LE(152) * BigInt(SECTOR);
    const all = bytes.readBigUInt64LE(80) * BigInt(SECTOR);
    const far = `${formatBytes(Number(done))} of ${formatBytes(Number(all))} were done`;
    const isHalf = has(FEATURE.recoveryOffset);
    if (!has(FEATURE.replacement)) return `it was still being rebuilt (${far})`;
    return `it was being made the replacement of another member${isHalf ? ` (${far})` : ''}`;
  }
  if (has(FEATURE.clustered))
    return 'the array is one of a cluster, written to by several machines';
  if (has(FEATURE.journal, FEATURE.ppl, FEATURE.multiplePpls))
    return 'the array keeps a journal of its own (write journal or PPL)';
  return undefined;
}

/** Why the bad block log, which its superblock says has entries, forbids to show it; undefined where it is empty after all. */
async function badBlocksReason(
  bytes: Buffer,
  at: number,
  read: ReadArea,
): Promise<string | undefined> {
  const shift = bytes[185] ?? 0;
  const sectors = bytes.readUInt16LE(186);
  const offset = bytes.readInt32LE(188);
  const log =
    offset === 0 || sectors === 0 || sectors > MAX_BAD_BLOCK_SECTORS || shift > 32
      ? undefined
      : await read(at + offset * SECTOR, sectors * SECTOR);
  if (log === undefined) return 'it has bad blocks, and its list of them cannot be read';
  let count = 0;
  let total = 0;
  let first: bigint | undefined;
  for (let i = 0; i + 8 <= log.length; i += 8) {
    const entry = log.readBigUInt64LE(i);
    if (entry === ALL) break;
    const length = Number(entry & 0x3ffn) * 2 ** shift * SECTOR;
    if (length === 0) continue;
    count++;
    total += length;
    first ??= (entry >> 10n) << BigInt(shift);
  }
  if (count === 0) return undefined;
  return `it has bad blocks, where it lacks what other members have (${count} in its list, ${formatBytes(total)}, the first at sector ${first})`;
}

async function read090(bytes: Buffer, at: number, read: ReadArea): Promise<MdMember | undefined> {
  if (bytes.readUInt32BE(0) === MAGIC)
    throw new Unusable('its superblock (version 0.90) was written by a big-endian machine');
  if (bytes.readUInt32LE(0) !== MAGIC) return undefined;
  const word = (index: number): number => bytes.readUInt32LE(index * 4);
  const major = word(1);
  const minor = word(2);
  if (major === 1) return undefined;
  if (major !== 0 || minor < 90 || minor > 91)
    throw new Unusable(`its superblock is of version ${major}.${minor}, which b2 does not know`);
  if (checksum090(bytes) !== fold(word(38)))
    throw new Unusable('the checksum of its superblock (version 0.90) is wrong');

  const level = bytes.readInt32LE(7 * 4);
  const disks = word(10);
  if (disks === 0 || disks > DISKS_090)
    throw new Unusable('its superblock has more places than can be, or none');
  const stateOf = (index: number): DescriptorState => {
    const descriptor = 128 * 4 + index * DESCRIPTOR_BYTES;
    const state = bytes.readUInt32LE(descriptor + 16);
    return {
      role: bytes.readUInt32LE(descriptor + 12),
      isFaulty: (state & 0x1) !== 0,
      isInSync: (state & 0x4) !== 0,
      isWriteMostly: (state & 0x200) !== 0,
    };
  };
  const all = Array.from({ length: DISKS_090 }, (_, i) => stateOf(i));
  // The one that the kernel goes by is the list's, of the number that the member has for itself.
  const own = all[word(992)];
  const isOwn = own !== undefined && own.isInSync && !own.isFaulty && own.role < disks;
  const roles = new Set(
    all.filter((d) => d.isInSync && !d.isFaulty && d.role < disks).map((d) => d.role),
  );
  const uuidWords = [5, 13, 14, 15];
  const updated = utc(word(32));
  const array: MdArray = {
    version: '0.90',
    level: levelName(level),
    disks,
    uuid: uuidWords.map((i) => word(i).toString(16).padStart(8, '0')).join(':'),
    ...(isOwn ? { role: own.role } : {}),
    missing: Math.max(0, disks - roles.size),
    events: word(40) * 2 ** 32 + word(39),
    ...(updated === undefined ? {} : { updated }),
  };
  const dataSectors = at / SECTOR;
  const usedSectors = word(8) * 2;
  const isClean = (word(33) & 0x1) !== 0;
  const isCheckpoint = word(39) === word(41) && word(40) === word(42);
  const reason = ((): string | undefined => {
    if (minor === 91)
      return 'the array was being reshaped: its data was half in one order and half in another';
    if (own?.isFaulty === true) return roleReason(ROLE_FAULTY, disks);
    // One that is being rebuilt counts as a spare here.
    if (!isOwn)
      return 'it is a spare, or was still being rebuilt (version 0.90 does not tell which)';
    // "This cannot possibly happen", says the kernel, and refuses it.
    return level >= 1 && dataSectors < usedSectors
      ? 'its superblock has its data where it cannot be'
      : undefined;
  })();
  return memberOf(
    {
      array,
      level,
      layout: word(64),
      chunkSectors: Math.floor(word(65) / SECTOR),
      disks,
      usedSectors,
      dataSectors,
      dataOffsetSectors: 0,
      inStepBefore: isClean ? ALL : isCheckpoint ? BigInt(word(43)) : 0n,
      roles,
      createdSeconds: word(6),
      updatedSeconds: word(32),
      isWriteMostly: own?.isWriteMostly === true,
      reason,
      bitmapOffset: (word(33) & 0x100) === 0 ? undefined : at + SUPERBLOCK_BYTES,
      uuidBytes: Buffer.concat(uuidWords.map((i) => bytes.subarray(i * 4, i * 4 + 4))),
    },
    at,
    read,
  );
}

interface DescriptorState {
  readonly role: number;
  readonly isFaulty: boolean;
  readonly isInSync: boolean;
  readonly isWriteMostly: boolean;
}

/** md_csum_fold: what of a sum of version 0.90 counts. */
function fold(sum: number): number {
  const once = (sum & 0xffff) + (sum >>> 16);
  return (once & 0xffff) + (once >>> 16);
}

function checksum090(bytes: Buffer): number {
  let sum = 0;
  for (let at = 0; at < SUPERBLOCK_BYTES; at += 4) if (at !== 38 * 4) sum += bytes.readUInt32LE(at);
  return fold(((sum >>> 0) + Math.floor(sum / 2 ** 32)) >>> 0);
}

/** The last second of the year 9999. */
const MAX_SECONDS = 253_402_300_799;

/** Seconds since 1970, as every time in JSON is written. */
function utc(seconds: number): string | undefined {
  return seconds === 0 || seconds > MAX_SECONDS
    ? undefined
    : formatTimeNs(BigInt(seconds) * 1_000_000_000n);
}

/** As mdadm names levels. */
function levelName(level: number): string {
  return level === -1 ? 'linear' : level === -4 ? 'multipath' : `raid${level}`;
}

/**
 * Sectors of the array where this one member is all of it, in order; else why it is not.
 *
 * - RAID 1: every member has all (raid1_size is that of a member; a request goes to the same sector of one, raid1_read_request).
 * - RAID 10 with as many near copies as members and one far copy: of chunk `c` the copies begin with number `c * near` of the row of
 *   all members' chunks, which is chunk `c` of the first, and go on over the others of that row (__raid10_find_phys); raid10_size
 *   counts whole chunks.
 * - RAID 0 and linear with one member: there is one zone, of whole chunks of it (create_strip_zones and map_sector; linear_conf).
 */
function arraySectors(facts: Facts): number | string {
  const { level, layout, chunkSectors, disks, usedSectors, dataSectors } = facts;
  const whole = (sectors: number): number =>
    chunkSectors === 0 ? sectors : Math.floor(sectors / chunkSectors) * chunkSectors;
  const only = `one of the ${disks} members of a ${shownLevel(level)} holds only a part of what is in it`;
  switch (level) {
    case 1:
      return usedSectors;
    case 10:
      if (disks < 2 || disks > 0xff || layout !== (0x100 | disks)) return only;
      return chunkSectors === 0 ? 'its superblock has no chunk size' : whole(usedSectors);
    case 0:
      if (disks !== 1) return only;
      return chunkSectors === 0 ? 'its superblock has no chunk size' : whole(dataSectors);
    case -1:
      return disks === 1 ? whole(dataSectors) : only;
    case 4:
    case 5:
    case 6:
      return only;
    default:
      return `b2 does not know arrays of level ${level}`;
  }
}

async function memberOf(facts: Facts, at: number, read: ReadArea): Promise<MdMember> {
  const { array, dataOffsetSectors, dataSectors, disks } = facts;
  const refused = (reason: string): MdMember => ({
    superblockOffset: at,
    array,
    reason,
    caveats: [],
  });
  if (facts.reason !== undefined) return refused(facts.reason);
  const sectors = arraySectors(facts);
  if (typeof sectors === 'string') return refused(sectors);
  if (!(sectors > 0 && sectors <= dataSectors))
    return refused('its superblock has its data where it cannot be');
  const caveats: string[] = [];
  if (array.missing > 0)
    caveats.push(
      `the array knew ${array.missing} of its ${disks} members to be missing or failed when this one was written`,
    );
  if (facts.isWriteMostly)
    caveats.push('it is a member that writes may reach later than the others (write-mostly)');
  const step = await outOfStep(facts, sectors, read);
  if (step !== undefined) return refused(step);
  return {
    superblockOffset: at,
    array,
    data: { offsetBytes: dataOffsetSectors * SECTOR, sizeBytes: sectors * SECTOR },
    caveats,
  };
}

/**
 * Why it may lack what the array shows: members are brought into step from the first one that works, from which the array reads
 * meanwhile (raid1's choose_first). Afterwards, and after a power cut, members differ only where a write had not been acknowledged.
 * An array that is written to does not say how far it is (super_1_sync): then the bitmap tells, whose last bit is cleared last, or
 * the age of the array, because md has a least speed.
 */
async function outOfStep(
  facts: Facts,
  sectors: number,
  read: ReadArea,
): Promise<string | undefined> {
  const { inStepBefore, roles, array, isWriteMostly } = facts;
  if (inStepBefore >= BigInt(sectors)) return undefined;
  const isFirst = array.role === Math.min(...roles) && !isWriteMostly;
  if (isFirst || roles.size === 1) return undefined;
  if (inStepBefore > 0n)
    return `it was being brought into step with the first member of the array (${formatBytes(Number(inStepBefore) * SECTOR)} of ${formatBytes(sectors * SECTOR)} were done)`;
  if (await isLastBitClear(facts, read)) return undefined;
  const age = facts.updatedSeconds - facts.createdSeconds;
  if (age * LEAST_SYNC_RATE >= sectors * SECTOR) return undefined;
  return 'the array is so new that it may not have been brought into step with the first member, and was written to, so that it does not say (a later point may)';
}

/** True where the bitmap says that the end of the array is in step. */
async function isLastBitClear(
  { bitmapOffset, uuidBytes }: Facts,
  read: ReadArea,
): Promise<boolean> {
  if (bitmapOffset === undefined) return false;
  const header = await read(bitmapOffset, BITMAP_HEADER_BYTES);
  if (header === undefined || header.readUInt32LE(0) !== BITMAP_MAGIC) return false;
  const version = header.readUInt32LE(4);
  const chunkBytes = header.readUInt32LE(52);
  const bytes = header.readBigUInt64LE(40) * BigInt(SECTOR);
  const isSound =
    (version === 3 || version === 4) &&
    header.subarray(8, 24).equals(uuidBytes) &&
    chunkBytes >= SECTOR &&
    bytes > 0n;
  if (!isSound) return false;
  const last = (bytes - 1n) / BigInt(chunkBytes);
  const byte = await read(bitmapOffset + BITMAP_HEADER_BYTES + Number(last / 8n), 1);
  return byte !== undefined && ((byte[0] ?? 0xff) & (1 << Number(last % 8n))) === 0;
}

function shownLevel(level: number): string {
  return level < 0 ? `${levelName(level)} array` : `RAID ${level}`;
}

/** `RAID 1 "web1:boot" of 2 disks, version 1.0, UUID …`; without an array, that it is one. */
export function shownArray(array: MdArray | undefined): string {
  if (array === undefined) return 'array of a RAID of Linux (MD)';
  const level = array.level.replace(/^raid(-?\d+)$/, 'RAID $1');
  const name = array.name === undefined ? '' : ` ${JSON.stringify(array.name)}`;
  return `${level} array${name} (MD ${array.version}, ${array.disks} ${array.disks === 1 ? 'disk' : 'disks'}, UUID ${array.uuid})`;
}

/** What is told of an area that lies in the array, in words. It stays the same while members come and go unnoticed. */
export function describeMember({ array, caveats }: MdMember): string {
  const more = caveats.map((caveat) => `; ${caveat}`).join('');
  const others =
    array?.disks === 1 ? '' : '; whether another member is newer cannot be told from this one';
  return `read from one member of the ${shownArray(array)}${more}${others}`;
}

/** How old the member's superblock is, in words, to compare it with others by. */
export function describeAge({ array }: MdMember): string {
  const updated = array?.updated?.replace(/\.0+Z$/, 'Z') ?? 'at an unknown time';
  return `its superblock was written ${updated}, events ${array?.events ?? 'unknown'}`;
}
