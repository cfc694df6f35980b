/**
 * What lies on a device or partition: file systems, swap, LVM, RAID, encryption, by their magic numbers.
 * Offsets are from the on-disk headers of Linux (include/uapi/linux/*, fs/*) and of the formats' documents.
 *
 * b2 looks itself first, because it reads what is on the medium; blkid, which knows more formats, goes through the
 * page cache and is asked about what is unknown here (inspect.ts).
 */
import { readExactly, type Readable } from './table.js';

export type SignatureUsage = 'filesystem' | 'swap' | 'raid' | 'encrypted' | 'other';

/** One thing found. JSON-able; absent fields are unknown. */
export interface Signature {
  /** Names as blkid uses them: `ext4`, `xfs`, `btrfs`, `vfat`, `LVM2_member`, `crypto_LUKS`, … */
  readonly type: string;
  readonly usage: SignatureUsage;
  readonly label?: string;
  readonly uuid?: string;
  /** Bytes that the thing itself says it covers. */
  readonly sizeBytes?: number;
  /** File systems over several devices (btrfs): how many. */
  readonly devices?: number;
}

/** A part of a device: whole device or partition. */
export interface Area {
  readonly offsetBytes: number;
  readonly sizeBytes: number;
}

/** Bytes at the start that hold every magic known here (the last is btrfs's super block at 64 KiB). */
const HEAD_BYTES = 72 * 1024;
const MD_MAGIC = 0xa92b_4efc;

function latin1(bytes: Uint8Array, start: number, length: number): string {
  return Buffer.from(bytes.subarray(start, start + length)).toString('latin1');
}

function labelAt(bytes: Uint8Array, start: number, length: number): string {
  const raw = bytes.subarray(start, start + length);
  const end = raw.indexOf(0);
  return Buffer.from(end === -1 ? raw : raw.subarray(0, end))
    .toString('utf8')
    .trimEnd();
}

function uuidAt(bytes: Uint8Array, start: number): string {
  const hex = Buffer.from(bytes.subarray(start, start + 16)).toString('hex');
  return `${hex.slice(0, 8)}-${hex.slice(8, 12)}-${hex.slice(12, 16)}-${hex.slice(16, 20)}-${hex.slice(20)}`;
}

function make(
  type: string,
  usage: SignatureUsage,
  more: {
    readonly label?: string;
    readonly uuid?: string;
    readonly sizeBytes?: number;
    readonly devices?: number;
  } = {},
): Signature {
  const { label, uuid, ...rest } = more;
  return {
    type,
    usage,
    ...(label === undefined || label === '' ? {} : { label }),
    ...(uuid === undefined || uuid === '' || /^[0-]*$/.test(uuid) ? {} : { uuid }),
    ...rest,
  };
}

function ext(head: Uint8Array, v: DataView): Signature | undefined {
  // The magic has two bytes only: block size, revision and blocks in a group must make sense too.
  if (v.getUint16(0x438, true) !== 0xef53 || v.getUint32(0x418, true) > 6) return undefined;
  if (v.getUint32(0x44c, true) > 1 || v.getUint32(0x420, true) === 0) return undefined;
  const compat = v.getUint32(0x45c, true);
  const incompat = v.getUint32(0x460, true);
  const roCompat = v.getUint32(0x464, true);
  const common = { label: labelAt(head, 0x478, 16), uuid: uuidAt(head, 0x468) };
  if ((incompat & 0x8) !== 0) return make('jbd', 'other', common);
  // What ext3 knows: filetype, recover, meta_bg; sparse_super, large_file, btree_dir. Anything else is ext4.
  const beyondExt3 = (incompat & ~0x16) !== 0 || (roCompat & ~0x7) !== 0;
  const type = beyondExt3 ? 'ext4' : (compat & 0x4) !== 0 ? 'ext3' : 'ext2';
  const high = (incompat & 0x80) !== 0 ? v.getUint32(0x550, true) : 0;
  const blocks = high * 2 ** 32 + v.getUint32(0x404, true);
  return make(type, 'filesystem', {
    ...common,
    sizeBytes: blocks * 1024 * 2 ** v.getUint32(0x418, true),
  });
}

function xfs(head: Uint8Array, v: DataView): Signature | undefined {
  if (latin1(head, 0, 4) !== 'XFSB') return undefined;
  const sizeBytes = v.getUint32(4, false) * Number(v.getBigUint64(8, false));
  return make('xfs', 'filesystem', {
    label: labelAt(head, 108, 12),
    uuid: uuidAt(head, 32),
    sizeBytes,
  });
}

function btrfs(head: Uint8Array, v: DataView): Signature | undefined {
  const at = 0x10000;
  if (latin1(head, at + 0x40, 8) !== '_BHRfS_M') return undefined;
  return make('btrfs', 'filesystem', {
    label: labelAt(head, at + 0x12b, 256),
    uuid: uuidAt(head, at + 0x20),
    // dev_item.total_bytes: of this device, not of the whole file system.
    sizeBytes: Number(v.getBigUint64(at + 0xd1, true)),
    devices: Number(v.getBigUint64(at + 0x88, true)),
  });
}

function fatFamily(head: Uint8Array, v: DataView): Signature | undefined {
  const oem = latin1(head, 3, 8);
  if (oem === 'NTFS    ') {
    const serial = v.getBigUint64(0x48, true).toString(16).toUpperCase().padStart(16, '0');
    return make('ntfs', 'filesystem', {
      uuid: serial,
      sizeBytes: Number(v.getBigUint64(0x28, true)) * v.getUint16(0x0b, true),
    });
  }
  const shortSerial = (at: number): string => {
    const hex = v.getUint32(at, true).toString(16).toUpperCase().padStart(8, '0');
    return `${hex.slice(0, 4)}-${hex.slice(4)}`;
  };
  if (oem === 'EXFAT   ') return make('exfat', 'filesystem', { uuid: shortSerial(0x64) });
  if (oem === '-FVE-FS-') return make('BitLocker', 'encrypted');
  if (head[510] !== 0x55 || head[511] !== 0xaa) return undefined;
  const [kindAt, serialAt, labelStart] =
    latin1(head, 0x52, 8) === 'FAT32   ' ? [0x52, 0x43, 0x47] : [0x36, 0x27, 0x2b];
  if (!/^FAT(12|16|32)? +$/.test(latin1(head, kindAt, 8))) return undefined;
  const label = labelAt(head, labelStart, 11);
  const small = v.getUint16(0x13, true);
  const sectors = small === 0 ? v.getUint32(0x20, true) : small;
  return make('vfat', 'filesystem', {
    uuid: shortSerial(serialAt),
    sizeBytes: sectors * v.getUint16(0x0b, true),
    ...(label === 'NO NAME' ? {} : { label }),
  });
}

function swap(head: Uint8Array): Signature | undefined {
  for (const page of [4096, 8192, 16384, 32768, 65536]) {
    const magic = latin1(head, page - 10, 10);
    if (magic === 'SWAPSPACE2' || magic === 'SWAP-SPACE')
      return make('swap', 'swap', { label: labelAt(head, 0x41c, 16), uuid: uuidAt(head, 0x40c) });
    if (/^(S1SUSPEND|S2SUSPEND|LINHIB0001)/.test(magic)) return make('swsuspend', 'swap');
  }
  return undefined;
}

function lvm(head: Uint8Array): Signature | undefined {
  for (let sector = 0; sector < 4; sector++) {
    const at = sector * 512;
    if (latin1(head, at, 8) !== 'LABELONE' || latin1(head, at + 24, 8) !== 'LVM2 001') continue;
    const id = latin1(head, at + 32, 32);
    const uuid = [6, 4, 4, 4, 4, 4, 6].reduce<{ at: number; parts: string[] }>(
      (state, length) => ({
        at: state.at + length,
        parts: [...state.parts, id.slice(state.at, state.at + length)],
      }),
      { at: 0, parts: [] },
    );
    return make('LVM2_member', 'raid', { uuid: uuid.parts.join('-') });
  }
  return undefined;
}

function luks(head: Uint8Array, v: DataView): Signature | undefined {
  if (latin1(head, 0, 6) !== 'LUKS\xba\xbe') return undefined;
  return make('crypto_LUKS', 'encrypted', {
    uuid: labelAt(head, 168, 40),
    ...(v.getUint16(6, false) === 2 ? { label: labelAt(head, 24, 48) } : {}),
  });
}

/** The last whole 64 KiB are those of a superblock of version 0.90. */
const MD_090_BYTES = 64 * 1024;

/** Version 1 says itself in which sector it lies: what lies elsewhere is of a larger device that this is a part of. */
function md1(bytes: Uint8Array, at: number, sector: number): Signature | undefined {
  if (at + 256 > bytes.byteLength) return undefined;
  const v = new DataView(bytes.buffer, bytes.byteOffset + at, 256);
  if (v.getUint32(0, true) !== MD_MAGIC) return undefined;
  const major = v.getUint32(4, true);
  // Of a version that is not known only this much can be told.
  if (major > 1) return make('linux_raid_member', 'raid');
  if (major !== 1 || v.getBigUint64(144, true) !== BigInt(sector)) return undefined;
  return make('linux_raid_member', 'raid', {
    label: labelAt(bytes, at + 32, 32),
    uuid: uuidAt(bytes, at + 16),
  });
}

/** In the byte order of the machine that wrote it. */
function md090(bytes: Uint8Array): Signature | undefined {
  const v = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  const isLittle = v.getUint32(0, true) === MD_MAGIC;
  if (!isLittle && v.getUint32(0, false) !== MD_MAGIC) return undefined;
  // A superblock of version 1 may lie here, too.
  if (v.getUint32(4, isLittle) === 1) return undefined;
  const words = [5, 13, 14, 15].map((i) => v.getUint32(i * 4, isLittle));
  const [a = '', b = '', c = '', d = ''] = words.map((w) => w.toString(16).padStart(8, '0'));
  const uuid = `${a}-${b.slice(0, 4)}-${b.slice(4)}-${c.slice(0, 4)}-${c.slice(4)}${d}`;
  return make('linux_raid_member', 'raid', { uuid });
}

function others(head: Uint8Array, v: DataView): Signature | undefined {
  if (latin1(head, 0, 4) === 'hsqs') return make('squashfs', 'filesystem');
  if (v.getUint32(1024, true) === 0xe0f5_e1e2) return make('erofs', 'filesystem');
  if (v.getUint32(1024, true) === 0xf2f5_2010) return make('f2fs', 'filesystem');
  if (latin1(head, 0x8001, 5) === 'CD001')
    return make('iso9660', 'filesystem', { label: labelAt(head, 0x8028, 32) });
  if (
    Buffer.from(head.subarray(4096 + 24, 4096 + 40)).toString('hex') ===
    'c68573f64e1a45ca8265f57f48ba6d81'
  ) {
    return make('bcache', 'other');
  }
  return undefined;
}

/**
 * Everything this module recognises in `area` of `device`; empty if nothing. A member of a RAID comes before what lies in the array,
 * which with metadata at the end of the member begins where the member does.
 */
export async function findSignatures(device: Readable, area: Area): Promise<readonly Signature[]> {
  const head = new Uint8Array(HEAD_BYTES);
  const usable = Math.max(
    0,
    Math.min(HEAD_BYTES, area.sizeBytes, device.facts.sizeBytes - area.offsetBytes),
  );
  await device.read(head.subarray(0, usable), area.offsetBytes);
  const v = new DataView(head.buffer);
  const found = [
    md1(head, 0, 0),
    md1(head, 4096, 8),
    await mdAtEnd(device, area),
    await biosRaid(device, area),
    ext(head, v),
    xfs(head, v),
    btrfs(head, v),
    fatFamily(head, v),
    swap(head),
    lvm(head),
    luks(head, v),
    others(head, v),
  ];
  return found.filter((signature) => signature !== undefined);
}

/** MD metadata 1.0 and 0.90 lie at the end of the member. */
async function mdAtEnd(device: Readable, area: Area): Promise<Signature | undefined> {
  const sectors = Math.floor(area.sizeBytes / 512);
  const sector10 = Math.floor((sectors - 16) / 8) * 8;
  const at10 =
    sector10 > 0 ? await readExactly(device, area.offsetBytes + sector10 * 512, 256) : undefined;
  const signature = at10 === undefined ? undefined : md1(at10, 0, sector10);
  if (signature !== undefined) return signature;
  const at090 = Math.floor(area.sizeBytes / MD_090_BYTES) * MD_090_BYTES - MD_090_BYTES;
  const bytes = at090 < 0 ? undefined : await readExactly(device, area.offsetBytes + at090, 64);
  return bytes === undefined ? undefined : md090(bytes);
}

/**
 * Containers that BIOSes and mdadm share, at the end of whole disks: Intel's (its anchor in the last sector but one, mdadm's
 * super-intel.c) where it has volumes, and DDF of SNIA (in the last sector; super-ddf.c).
 */
async function biosRaid(device: Readable, area: Area): Promise<Signature | undefined> {
  if (area.offsetBytes !== 0 || area.sizeBytes !== device.facts.sizeBytes) return undefined;
  const end = Math.floor(area.sizeBytes / 512) * 512;
  const bytes = area.sizeBytes < 1024 ? undefined : await readExactly(device, end - 1024, 1024);
  if (bytes === undefined) return undefined;
  if (latin1(bytes, 0, 24) === 'Intel Raid ISM Cfg Sig. ' && bytes[0x39] !== 0)
    return make('isw_raid_member', 'raid');
  const v = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  return v.getUint32(512, false) === 0xde11_de11 ? make('ddf_raid_member', 'raid') : undefined;
}
