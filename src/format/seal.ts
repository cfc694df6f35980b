/** Keys and sealing (FORMAT.md section 2). Pure: master key in, bytes out. */
import { hkdfSync, timingSafeEqual } from 'node:crypto';
import { gcm, type GcmOpener, type GcmSealer } from '../gcm.js';
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
  /** For many seals with `aadBytes` of associated data each. */
  opener(aadBytes: number, room: OpenRoom): SealOpener;
  /** For making many with `aadBytes` of associated data each. */
  maker(aadBytes: number): SealMaker;
}

/**
 * Makes one seal after the other without an object for each: {@link Sealer.sealInto} of bytes `from` to `end` of `plain`. The nonce and the associated data
 * are filled in before. Not for use from two call stacks at once.
 */
export type SealMaker = GcmSealer;

/** Opens one seal after the other without an object for each. Not for use from two call stacks at once. */
export interface SealOpener {
  /** {@link NONCE_BYTES}, to be filled in before {@link open}. */
  readonly nonce: Buffer;
  /** As long as was asked for, to be filled in before {@link open}. */
  readonly aad: Buffer;
  /** Holds the plaintext from `plainAt`, until the next call, when {@link open} has said true. */
  readonly plain: Buffer;
  readonly plainAt: number;
  /** True if bytes `at` to `end` of `from` are a seal of {@link nonce} and {@link aad}. RangeError if they are not there. */
  open(from: Buffer, at: number, end: number): boolean;
}

/** Room that openers of a thread share: only the plaintext of the one that opened last is there. */
export class OpenRoom {
  private room = Buffer.alloc(0);

  /** At least so many bytes. */
  of(bytes: number): Buffer {
    if (this.room.length < bytes) this.room = Buffer.allocUnsafeSlow(bytes * 2);
    return this.room;
  }
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
    opener: (aadBytes, room) => new GcmSealOpener(aes.opener(key, aadBytes), room),
    maker: (aadBytes) => aes.sealer(key, aadBytes),
  };
}

class GcmSealOpener implements SealOpener {
  readonly nonce: Buffer;
  readonly aad: Buffer;
  readonly plainAt = 0;
  plain: Buffer;
  private readonly inner: GcmOpener;
  private readonly room: OpenRoom;

  constructor(inner: GcmOpener, room: OpenRoom) {
    this.inner = inner;
    this.room = room;
    this.nonce = inner.nonce;
    this.aad = inner.aad;
    this.plain = room.of(0);
  }

  open(from: Buffer, at: number, end: number): boolean {
    this.plain = this.room.of(end - at);
    return this.inner.open(from, at, end, this.plain);
  }
}

class CheckOpener implements SealOpener {
  readonly nonce = Buffer.alloc(NONCE_BYTES);
  readonly aad: Buffer;
  plain: Buffer = Buffer.alloc(0);
  plainAt = 0;
  private readonly sealer: Sealer;

  constructor(sealer: Sealer, aadBytes: number) {
    this.sealer = sealer;
    this.aad = Buffer.alloc(aadBytes);
  }

  open(from: Buffer, at: number, end: number): boolean {
    if (at < 0 || end > from.length) throw new RangeError('what is to be opened is not there');
    this.plain = from; // it lies there as it is
    this.plainAt = at;
    return this.sealer.open(this.nonce, this.aad, from.subarray(at, end)) !== undefined;
  }
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
    opener(aadBytes) {
      return new CheckOpener(this, aadBytes);
    },
    maker(aadBytes) {
      const nonce = Buffer.alloc(NONCE_BYTES);
      const aad = Buffer.alloc(aadBytes);
      return {
        nonce,
        aad,
        seal: (plain, from, end, out, at) => {
          this.sealInto(nonce, aad, [plain.subarray(from, end)], out, at);
        },
      };
    },
  };
}

/** Everything that is derived from a repository's master key. One instance per thread. */
export interface KeyRing {
  readonly encrypted: boolean;
  /** The id of a chunk. */
  chunkId(chunk: Uint8Array): Buffer;
  /** True if `ids` holds the id of `chunk` from `at`. */
  isChunk(chunk: Uint8Array, ids: Buffer, at: number): boolean;
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
    isChunk: (bytes, ids, at) => chunk.matches(bytes, ids, at),
    commitHash: (body) => commit.digest(body),
    nameHash: (text) => name.digest(Buffer.from(text, 'utf8')).toString('hex', 0, 16),
    configMac: (canonical) => config.digest(canonical),
    packSealer: (packId) => sealer('b2 pack v1', Buffer.from(packId, 'hex')),
    footerSealer: (salt) => sealer('b2 footer v1', salt),
    objectSealer: (salt) => sealer('b2 object v1', salt),
    segmentSealer: (salt) => sealer('b2 segment v1', salt),
  };
}
