/** Sealed objects (FORMAT.md section 4): small objects with a JSON payload. */
import { crc32 } from 'node:zlib';
import { checkZero, damaged } from './bytes.js';
import { newerVersion } from './pack.js';
import { SEAL_BYTES, ZERO_NONCE, seal, type KeyRing } from './seal.js';

const MAGIC = Buffer.from('B2OBJ\0\0\0', 'latin1'); // do not change
const HEADER_BYTES = 48;
const VERSION = 1;
/** Bytes of a payload at most. */
export const MAX_OBJECT_BYTES = 16 * 1024 * 1024;

export const ObjectKind = {
  volumeMeta: 1,
  snapshot: 2,
  journal: 3,
  epoch: 4,
  condemned: 5,
  tape: 6,
  quarantine: 7,
  lost: 8,
} as const;
export type ObjectKind = (typeof ObjectKind)[keyof typeof ObjectKind];

/** The bytes of object `name`. `salt` is 16 fresh random bytes; bigints in `payload` become decimal strings. */
export function encodeObject(
  kind: ObjectKind,
  name: string,
  payload: unknown,
  salt: Uint8Array,
  keys: KeyRing,
): Buffer {
  const json = Buffer.from(
    JSON.stringify(payload, (_key, value: unknown) =>
      typeof value === 'bigint' ? String(value) : value,
    ),
    'utf8',
  );
  if (json.length > MAX_OBJECT_BYTES)
    throw new RangeError(`${name}: payload of ${json.length} bytes`);
  const header = Buffer.alloc(HEADER_BYTES);
  MAGIC.copy(header, 0);
  header.writeUInt16LE(VERSION, 8);
  header.writeUInt16LE(keys.encrypted ? 1 : 0, 10);
  header.writeUInt32LE(kind, 12);
  header.set(salt, 16);
  header.writeUInt32LE(json.length, 32);
  header.writeUInt32LE(crc32(header.subarray(0, 44)), 44);
  const aad = Buffer.concat([header, Buffer.from(name, 'utf8')]);
  return Buffer.concat([
    header,
    seal(keys.objectSealer(Buffer.from(salt)), ZERO_NONCE, aad, [json]),
  ]);
}

/** The payload of object `name`; kind `damaged` if anything about it is wrong or it stands under another name. */
export function decodeObject(
  kind: ObjectKind,
  name: string,
  b: Buffer,
  keys: KeyRing,
): Record<string, unknown> {
  if (b.length < HEADER_BYTES + SEAL_BYTES) throw damaged(name, 0, 'the object is cut off');
  if (!b.subarray(0, 8).equals(MAGIC)) throw damaged(name, 0, 'this is not an object of b2');
  if (b.readUInt32LE(44) !== crc32(b.subarray(0, 44)))
    throw damaged(name, 0, 'the checksum of the header is wrong');
  const version = b.readUInt16LE(8);
  if (version !== VERSION) throw newerVersion(name, version);
  checkZero(b, 36, 44, name);
  if (b.readUInt32LE(12) !== kind)
    throw damaged(name, 12, `an object of kind ${b.readUInt32LE(12)}, not ${kind}`);
  if (b.readUInt32LE(32) !== b.length - HEADER_BYTES - SEAL_BYTES)
    throw damaged(name, 32, 'the length is wrong');
  const aad = Buffer.concat([b.subarray(0, HEADER_BYTES), Buffer.from(name, 'utf8')]);
  const json = keys
    .objectSealer(Buffer.from(b.subarray(16, 32)))
    .open(ZERO_NONCE, aad, b.subarray(HEADER_BYTES));
  if (json === undefined)
    throw damaged(name, HEADER_BYTES, 'the seal does not open (damaged, or moved here)');
  let value: unknown;
  try {
    value = JSON.parse(json.toString('utf8'));
  } catch {
    throw damaged(name, HEADER_BYTES, 'the payload is not JSON');
  }
  if (typeof value !== 'object' || value === null || Array.isArray(value)) {
    throw damaged(name, HEADER_BYTES, 'the payload is not a JSON object');
  }
  return value as Record<string, unknown>;
}
