/**
 * The super block of btrfs (its first copy), as far as a file system over several devices needs it: which device of it one is, and
 * how a copy gets another identity.
 *
 * The kernel tells btrfs apart by the UUID in the super block alone, remembers every device that it has seen with it, and would mix
 * a copy with its original, or refuse to mount one of them because the other is newer. With METADATA_UUID (Linux 5.0) the identity
 * can be another one than what the trees carry: so a copy that is to be mounted, on its throw-away overlay, gets an identity that no
 * other file system has, and the kernel (device_list_add of fs/btrfs/volumes.c) never puts the two together. The layout is that of fs/btrfs/ctree.h (struct btrfs_super_block) and of Linux's documentation of it.
 */
import { createHash } from 'node:crypto';

import { B2Error } from '../errors.js';
import type { Image } from '../image.js';

const AT = 64 * 1024;
const BYTES = 4096;
const CHECKSUM_BYTES = 32;
const UUID_BYTES = 16;
const FIELD = {
  fsid: 0x20,
  magic: 0x40,
  devices: 0x88,
  flags: 0x38,
  incompat: 0xbc,
  checksumType: 0xc4,
  device: 0xc9,
  metadataUuid: 0x23b,
} as const;
const METADATA_UUID = 1n << 10n;
/** Its identity is being changed: then the kernel also goes by the other one. */
const CHANGING = (1n << 35n) | (1n << 36n);

/** What a device of a btrfs says. */
export interface BtrfsDevice {
  readonly fsid: string;
  readonly devices: number;
  /** Its number in the file system. */
  readonly device: bigint;
}

async function readSuper(image: Image, offsetBytes: number): Promise<Buffer | undefined> {
  if (image.sizeBytes < offsetBytes + AT + BYTES) return undefined;
  const bytes = Buffer.alloc(BYTES);
  await image.read(bytes, offsetBytes + AT);
  return bytes.toString('latin1', FIELD.magic, FIELD.magic + 8) === '_BHRfS_M' ? bytes : undefined;
}

/** Undefined where there is no btrfs at that byte of the image. Rejects as {@link Image.read}. */
export async function readBtrfs(image: Image, offsetBytes = 0): Promise<BtrfsDevice | undefined> {
  const bytes = await readSuper(image, offsetBytes);
  if (bytes === undefined) return undefined;
  return {
    fsid: bytes.toString('hex', FIELD.fsid, FIELD.fsid + UUID_BYTES),
    devices: Number(bytes.readBigUInt64LE(FIELD.devices)),
    device: bytes.readBigUInt64LE(FIELD.device),
  };
}

const CRC32C = new Uint32Array(256).map((_, byte) => {
  let crc = byte;
  for (let i = 0; i < 8; i++) crc = (crc & 1) !== 0 ? (crc >>> 1) ^ 0x82f63b78 : crc >>> 1;
  return crc;
});

/** CRC-32C (Castagnoli), as iSCSI and btrfs have it. */
export function crc32c(bytes: Uint8Array): number {
  let crc = 0xffffffff;
  for (const byte of bytes) crc = (crc >>> 8) ^ (CRC32C[(crc ^ byte) & 0xff] ?? 0);
  return ~crc >>> 0;
}

/** The checksum of a super block by its type; undefined for types that are not made here. */
function checksum(type: number, bytes: Uint8Array): Buffer | undefined {
  const sum = Buffer.alloc(CHECKSUM_BYTES);
  if (type === 0) sum.writeUInt32LE(crc32c(bytes));
  else if (type === 2) createHash('sha256').update(bytes).digest().copy(sum);
  else return undefined;
  return sum;
}

/** An image that takes writes. */
interface Writable extends Image {
  write(data: Uint8Array, offset: number): Promise<void>;
}

/**
 * Gives the file system whose devices begin at these bytes the identity `fsid` (16 bytes); what is in it stays as it is. Kind `unsupported` where its
 * checksums are of a kind that b2 does not make (xxhash, BLAKE2), `damaged` where a super block is not what it should be.
 */
export async function giveIdentity(
  image: Writable,
  offsets: readonly number[],
  fsid: Uint8Array,
): Promise<void> {
  for (const offset of offsets) {
    const bytes = await readSuper(image, offset);
    const type = bytes?.readUInt16LE(FIELD.checksumType) ?? 0;
    const old = bytes?.subarray(0, CHECKSUM_BYTES);
    const sum = bytes === undefined ? undefined : checksum(type, bytes.subarray(CHECKSUM_BYTES));
    if (bytes !== undefined && sum === undefined)
      throw new B2Error('unsupported', 'its checksums are of a kind that b2 cannot make');
    const length = type === 0 ? 4 : CHECKSUM_BYTES;
    if (
      bytes === undefined ||
      sum?.subarray(0, length).equals(old?.subarray(0, length) ?? sum) !== true
    )
      throw new B2Error('damaged', 'the super block of a device of a btrfs is damaged');
    if ((bytes.readBigUInt64LE(FIELD.flags) & CHANGING) !== 0n)
      throw new B2Error('unsupported', 'its UUID was being changed (btrfstune)');
    const flags = bytes.readBigUInt64LE(FIELD.incompat);
    if ((flags & METADATA_UUID) === 0n) {
      bytes.copy(bytes, FIELD.metadataUuid, FIELD.fsid, FIELD.fsid + UUID_BYTES);
      bytes.writeBigUInt64LE(flags | METADATA_UUID, FIELD.incompat);
    }
    bytes.set(fsid.subarray(0, UUID_BYTES), FIELD.fsid);
    checksum(type, bytes.subarray(CHECKSUM_BYTES))?.copy(bytes);
    await image.write(bytes, offset + AT);
  }
}
