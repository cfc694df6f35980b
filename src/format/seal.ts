/** Keys and sealing (FORMAT.md section 2). Pure: master key in, bytes out. */
import { hkdfSync, timingSafeEqual } from 'node:crypto';
import { gcm } from '../gcm.js';
import { keyedHash, type KeyedHash } from '../hash.js';

/** Bytes that a seal is longer than what it seals. */
export const SEAL_BYTES = 16;
export const NONCE_BYTES = 12;
export const MASTER_KEY_BYTES = 32;
/** For things sealed under a key of their own (fresh salt). */
export const ZERO_NONCE: Buffer = Buffer.alloc(NONCE_BYTES);

/** The nonce of frame, or page, `number`. */
export function numberNonce(number: number): Buffer {
  const nonce = Buffer.alloc(NONCE_BYTES);
  nonce.writeUInt32LE(number, 0);
  return nonce;
}

/** Seals and opens under one derived key. */
export interface Sealer {
  /**
   * Writes the seal of the concatenated `plain` parts to `out` from `at` and returns its length (plain + 16). `out` must
   * have room and must not overlap `plain`. A (sealer, nonce) pair must never seal two different plaintexts.
   */
  sealInto(
    nonce: Buffer,
    aad: Buffer,
    plain: readonly Uint8Array[],
    out: Buffer,
    at: number,
  ): number;
  /**
   * The plaintext (which may share memory with `sealed` or `into`), or undefined if the tag or check is wrong. `into` is room
   * for it that may be used, which saves an allocation; it must not overlap `sealed`.
   */
  open(nonce: Buffer, aad: Buffer, sealed: Buffer, into?: Buffer): Buffer | undefined;
}

/** {@link Sealer.sealInto} into a buffer of its own. */
export function seal(
  sealer: Sealer,
  nonce: Buffer,
  aad: Buffer,
  plain: readonly Uint8Array[],
): Buffer {
  const out = Buffer.allocUnsafe(plain.reduce((n, p) => n + p.byteLength, SEAL_BYTES));
  sealer.sealInto(nonce, aad, plain, out, 0);
  return out;
}

function gcmSealer(key: Buffer): Sealer {
  const aes = gcm();
  return {
    sealInto: (nonce, aad, plain, out, at) => aes.seal(key, nonce, aad, plain, out, at),
    open: (nonce, aad, sealed, into) => aes.open(key, nonce, aad, sealed, into),
  };
}

function checkSealer(hash: KeyedHash): Sealer {
  const lengthOf = (aad: Buffer): Buffer => {
    const b = Buffer.allocUnsafe(4);
    b.writeUInt32LE(aad.length, 0);
    return b;
  };
  return {
    sealInto(nonce, aad, plain, out, at) {
      let pos = at;
      for (const part of plain) {
        out.set(part, pos);
        pos += part.byteLength;
      }
      const check = hash.digest(nonce, lengthOf(aad), aad, out.subarray(at, pos));
      pos += check.copy(out, pos, 0, SEAL_BYTES);
      return pos - at;
    },
    open(nonce, aad, sealed) {
      const end = sealed.length - SEAL_BYTES;
      if (end < 0) return undefined;
      const plain = sealed.subarray(0, end);
      const check = hash.digest(nonce, lengthOf(aad), aad, plain).subarray(0, SEAL_BYTES);
      return timingSafeEqual(check, sealed.subarray(end)) ? plain : undefined;
    },
  };
}

/** Everything that is derived from a repository's master key. One instance per thread. */
export interface KeyRing {
  readonly encrypted: boolean;
  /** The id of a chunk. */
  chunkId(chunk: Uint8Array): Buffer;
  /** The hash of a commit's or extents frame's plain body. */
  commitHash(body: Uint8Array): Buffer;
  /** The object-name form of a person's name for something. */
  nameHash(name: string): string;
  /** The MAC of `config`. */
  configMac(canonical: Uint8Array): Buffer;
  packSealer(packId: string): Sealer;
  footerSealer(salt: Buffer): Sealer;
  objectSealer(salt: Buffer): Sealer;
  segmentSealer(salt: Buffer): Sealer;
}

/** `derive(purpose, salt)` of FORMAT.md section 2. */
export function deriveKey(master: Uint8Array, purpose: string, salt: Uint8Array): Buffer {
  return Buffer.from(hkdfSync('sha256', master, salt, Buffer.from(purpose, 'ascii'), 32));
}

/** `master` is 32 bytes; `encrypted` says how the repository seals. */
export function keyRing(master: Uint8Array, encrypted: boolean): KeyRing {
  if (master.byteLength !== MASTER_KEY_BYTES) throw new RangeError('a master key is 32 bytes');
  const none = Buffer.alloc(0);
  const hashFor = (purpose: string): KeyedHash => keyedHash(deriveKey(master, purpose, none));
  const chunk = hashFor('b2 chunk id v1');
  const commit = hashFor('b2 commit hash v1');
  const name = hashFor('b2 name v1');
  const config = hashFor('b2 config v1');
  const check = encrypted ? undefined : checkSealer(hashFor('b2 checksum v1'));
  const sealer = (purpose: string, salt: Buffer): Sealer =>
    check ?? gcmSealer(deriveKey(master, purpose, salt));
  return {
    encrypted,
    chunkId: (bytes) => chunk.digest(bytes),
    commitHash: (body) => commit.digest(body),
    nameHash: (text) => name.digest(Buffer.from(text, 'utf8')).toString('hex', 0, 16),
    configMac: (canonical) => config.digest(canonical),
    packSealer: (packId) => sealer('b2 pack v1', Buffer.from(packId, 'hex')),
    footerSealer: (salt) => sealer('b2 footer v1', salt),
    objectSealer: (salt) => sealer('b2 object v1', salt),
    segmentSealer: (salt) => sealer('b2 segment v1', salt),
  };
}
