/**
 * AES-256-GCM (NIST SP 800-38D) with a nonce of 12 bytes and a tag of 16, by the OpenSSL that Node.js itself is linked with:
 * through koffi where its functions can be reached (every usual build exports them), else through node:crypto. The bytes
 * are the same; node:crypto takes two and a half times as long for a frame, because it allocates each result.
 */
import { createCipheriv, createDecipheriv } from 'node:crypto';
import { createRequire } from 'node:module';

const KEY_BYTES = 32;
const NONCE_BYTES = 12;
const TAG_BYTES = 16;

/**
 * Opens one seal after the other under one key, without an object for each: what calling costs is a third of what a frame costs
 * beside the computing itself. Not for use from two call stacks at once.
 */
export interface GcmOpener {
  /** 12 bytes, to be filled in before {@link open}. */
  readonly nonce: Buffer;
  /** As long as was asked for, to be filled in before {@link open}. */
  readonly aad: Buffer;
  /**
   * Writes the plaintext of the ciphertext and tag that are bytes `at` to `end` of `from` to the start of `into`, which must have room
   * (RangeError) and not overlap them. False if the tag is wrong or missing; `into` holds nothing of use then.
   */
  open(from: Buffer, at: number, end: number, into: Buffer): boolean;
}

/**
 * Makes one seal after the other under one key, as {@link GcmOpener} opens them. A (key, nonce) pair must never seal two different
 * plaintexts. Not for use from two call stacks at once.
 */
export interface GcmSealer {
  /** 12 bytes, to be filled in before {@link seal}. */
  readonly nonce: Buffer;
  /** As long as was asked for, to be filled in before {@link seal}. */
  readonly aad: Buffer;
  /**
   * Writes ciphertext and tag (end - from + 16 bytes) of bytes `from` to `end` of `plain` to `out` from `at`. They must not overlap.
   * RangeError if the bytes, or the room for them, are not there.
   */
  seal(plain: Buffer, from: number, end: number, out: Buffer, at: number): void;
}

/** Keeps no state between calls. One instance per thread. Keys are 32 bytes, nonces 12. */
export interface Gcm {
  /** Which way it is called, for benchmarks and tests. */
  readonly implementation: 'openssl' | 'node';
  /**
   * Writes the ciphertext of the concatenated `plain` parts and the tag to `out` from `at` and returns their length (plain + 16).
   * `out` must not overlap `plain`. RangeError if there is no room.
   */
  seal(
    key: Buffer,
    nonce: Buffer,
    aad: Buffer,
    plain: readonly Uint8Array[],
    out: Buffer,
    at: number,
  ): number;
  /**
   * The plaintext of `sealed` (ciphertext and tag), or undefined if the tag is wrong or missing. It is written to the start of `into`
   * where that is given and has room (`into` must not overlap `sealed`, and holds nothing of use after a failure).
   */
  open(key: Buffer, nonce: Buffer, aad: Buffer, sealed: Buffer, into?: Buffer): Buffer | undefined;
  /** For many seals under `key`, which must not change, with `aadBytes` of associated data each. */
  opener(key: Buffer, aadBytes: number): GcmOpener;
  /** The same for making them. */
  sealer(key: Buffer, aadBytes: number): GcmSealer;
}

function check(key: Buffer, nonce: Buffer): void {
  if (key.length !== KEY_BYTES) throw new RangeError('an AES-256 key is 32 bytes');
  if (nonce.length !== NONCE_BYTES) throw new RangeError('a GCM nonce is 12 bytes');
}

/** Native code writes without looking at the end of the buffer. */
function checkRoom(plain: readonly Uint8Array[], out: Buffer, at: number): void {
  let need = TAG_BYTES;
  for (const part of plain) need += part.byteLength;
  if (at < 0 || out.length - at < need) throw new RangeError('no room for what is sealed');
}

/** False if there is not even a tag. RangeError for bytes that are not there, or no room: native code does not look. */
function checkOpen(from: Buffer, at: number, end: number, into: Buffer): boolean {
  if (at < 0 || end > from.length || into.length < end - at - TAG_BYTES)
    throw new RangeError('what is to be opened, or the room for it, is not there');
  return end - at >= TAG_BYTES;
}

/** RangeError for bytes, or room for their seal, that are not there. */
function checkSeal(plain: Buffer, from: number, end: number, out: Buffer, at: number): void {
  if (from < 0 || end < from || end > plain.length || at < 0)
    throw new RangeError('what is to be sealed is not there');
  if (out.length - at < end - from + TAG_BYTES) throw new RangeError('no room for what is sealed');
}

/** The portable implementation, also used to test the other one against. */
export function openNodeGcm(): Gcm {
  return {
    implementation: 'node',
    seal(key, nonce, aad, plain, out, at) {
      check(key, nonce);
      checkRoom(plain, out, at);
      const cipher = createCipheriv('aes-256-gcm', key, nonce);
      cipher.setAAD(aad);
      let pos = at;
      for (const part of plain) pos += cipher.update(part).copy(out, pos);
      cipher.final();
      pos += cipher.getAuthTag().copy(out, pos);
      return pos - at;
    },
    open(key, nonce, aad, sealed) {
      check(key, nonce);
      const end = sealed.length - TAG_BYTES;
      if (end < 0) return undefined;
      const decipher = createDecipheriv('aes-256-gcm', key, nonce, { authTagLength: TAG_BYTES });
      decipher.setAAD(aad);
      decipher.setAuthTag(sealed.subarray(end));
      const plain = decipher.update(sealed.subarray(0, end));
      try {
        decipher.final();
      } catch {
        return undefined; // the tag does not match: the only way that final() fails
      }
      return plain;
    },
    opener(key, aadBytes) {
      const nonce = Buffer.alloc(NONCE_BYTES);
      const aad = Buffer.alloc(aadBytes);
      check(key, nonce);
      return {
        nonce,
        aad,
        open: (from, at, end, into) => {
          if (!checkOpen(from, at, end, into)) return false;
          const plain = this.open(key, nonce, aad, from.subarray(at, end));
          plain?.copy(into);
          return plain !== undefined;
        },
      };
    },
    sealer(key, aadBytes) {
      const nonce = Buffer.alloc(NONCE_BYTES);
      const aad = Buffer.alloc(aadBytes);
      check(key, nonce);
      return {
        nonce,
        aad,
        seal: (plain, from, end, out, at) => {
          checkSeal(plain, from, end, out, at);
          this.seal(key, nonce, aad, [plain.subarray(from, end)], out, at);
        },
      };
    },
  };
}

/** An opaque C pointer. */
type Pointer = unknown;
type Bytes = Uint8Array | null;

// openssl/evp.h
const EVP_CTRL_AEAD_GET_TAG = 0x10;
const EVP_CTRL_AEAD_SET_TAG = 0x11;

function openOpenssl(): Gcm | undefined {
  try {
    const koffi = createRequire(import.meta.url)('koffi') as typeof import('koffi');
    // null is the process itself, and what it is linked with.
    const lib = koffi.load(null);
    const newContext = lib.func('void *EVP_CIPHER_CTX_new()') as () => Pointer;
    const aes256Gcm = lib.func('void *EVP_aes_256_gcm()') as () => Pointer;
    const init = lib.func(
      'int EVP_CipherInit_ex(void *ctx, void *cipher, void *engine, const void *key, const void *iv, int enc)',
    ) as (
      ctx: Pointer,
      cipher: Pointer,
      engine: null,
      key: Bytes,
      iv: Bytes,
      enc: number,
    ) => number;
    const update = lib.func(
      'int EVP_CipherUpdate(void *ctx, void *out, void *outBytes, const void *in, int inBytes)',
    ) as (ctx: Pointer, out: Bytes, outBytes: Buffer, input: Bytes, inBytes: number) => number;
    const final = lib.func('int EVP_CipherFinal_ex(void *ctx, void *out, void *outBytes)') as (
      ctx: Pointer,
      out: Bytes,
      outBytes: Buffer,
    ) => number;
    const control = lib.func(
      'int EVP_CIPHER_CTX_ctrl(void *ctx, int type, int bytes, void *data)',
    ) as (ctx: Pointer, type: number, bytes: number, data: Bytes) => number;
    const clearErrors = lib.func('void ERR_clear_error()') as () => void;
    // The same functions, called with addresses: koffi need not look for what lies behind a Buffer.
    const initAt = lib.func(
      'int EVP_CipherInit_ex(uintptr_t ctx, void *cipher, void *engine, uintptr_t key, uintptr_t iv, int enc)',
    ) as (ctx: number, cipher: null, engine: null, key: number, iv: number, enc: number) => number;
    const updateAt = lib.func(
      'int EVP_CipherUpdate(uintptr_t ctx, uintptr_t out, uintptr_t outBytes, uintptr_t in, int inBytes)',
    ) as (ctx: number, out: number, outBytes: number, input: number, inBytes: number) => number;
    const finalAt = lib.func(
      'int EVP_CipherFinal_ex(uintptr_t ctx, uintptr_t out, uintptr_t outBytes)',
    ) as (ctx: number, out: number, outBytes: number) => number;
    const controlAt = lib.func(
      'int EVP_CIPHER_CTX_ctrl(uintptr_t ctx, int type, int bytes, uintptr_t data)',
    ) as (ctx: number, type: number, bytes: number, data: number) => number;

    // One context of each kind for as long as the thread runs: they belong to nobody who could free them sooner.
    const sealing = newContext();
    const opening = newContext();
    const cipher = aes256Gcm();
    const outBytes = Buffer.alloc(4);
    const tag = Buffer.alloc(TAG_BYTES);
    const must = (result: number): void => {
      if (result === 1) return;
      clearErrors();
      throw new Error('OpenSSL refused to compute AES-256-GCM');
    };
    must(init(sealing, cipher, null, null, null, 1));
    must(init(opening, cipher, null, null, null, 0));
    // Of the openers: a context, which of them it has the key of, and what all of them need.
    const many = newContext();
    must(init(many, cipher, null, null, null, 0));
    const manyAt = Number(koffi.address(many));
    const outBytesAt = Number(koffi.address(outBytes));
    const ignored = Buffer.alloc(TAG_BYTES);
    const ignoredAt = Number(koffi.address(ignored));
    let keyed: GcmOpener | undefined;
    // The same of the sealers.
    const manySeals = newContext();
    must(init(manySeals, cipher, null, null, null, 1));
    const manySealsAt = Number(koffi.address(manySeals));
    let sealKeyed: GcmSealer | undefined;
    const plainAt = addressOfLast(koffi.address);
    const outAt = addressOfLast(koffi.address);
    const fromAt = addressOfLast(koffi.address);
    const intoAt = addressOfLast(koffi.address);

    /** Nonce and associated data of one that is used many times, and where they and its key lie. */
    const placed = (key: Buffer, aadBytes: number) => {
      const nonce = Buffer.alloc(NONCE_BYTES);
      const aad = Buffer.alloc(aadBytes);
      check(key, nonce);
      const at = (buffer: Buffer): number => Number(koffi.address(buffer));
      return { nonce, aad, keyAt: at(key), nonceAt: at(nonce), aadAt: at(aad) };
    };

    return {
      implementation: 'openssl',
      seal(key, nonce, aad, plain, out, at) {
        check(key, nonce);
        checkRoom(plain, out, at);
        must(init(sealing, null, null, key, nonce, 1));
        // No call for nothing: without input an update has another meaning.
        if (aad.length > 0) must(update(sealing, null, outBytes, aad, aad.length));
        let pos = at;
        for (const part of plain) {
          if (part.byteLength === 0) continue;
          must(update(sealing, out.subarray(pos), outBytes, part, part.byteLength));
          pos += part.byteLength;
        }
        must(final(sealing, tag, outBytes));
        must(control(sealing, EVP_CTRL_AEAD_GET_TAG, TAG_BYTES, tag));
        return pos + tag.copy(out, pos) - at;
      },
      open(key, nonce, aad, sealed, into) {
        check(key, nonce);
        const end = sealed.length - TAG_BYTES;
        if (end < 0) return undefined;
        const plain =
          into !== undefined && into.length >= end
            ? into.subarray(0, end)
            : Buffer.allocUnsafe(end);
        sealed.copy(tag, 0, end);
        must(init(opening, null, null, key, nonce, 0));
        must(control(opening, EVP_CTRL_AEAD_SET_TAG, TAG_BYTES, tag));
        if (aad.length > 0) must(update(opening, null, outBytes, aad, aad.length));
        if (end > 0) must(update(opening, plain, outBytes, sealed, end));
        if (final(opening, tag, outBytes) === 1) return plain;
        clearErrors();
        plain.fill(0); // nothing that is not authentic gets out
        return undefined;
      },
      opener(key, aadBytes) {
        const { nonce, aad, keyAt, nonceAt, aadAt } = placed(key, aadBytes);
        const opener: GcmOpener & { readonly key: Buffer } = {
          key, // kept: its address is used
          nonce,
          aad,
          open(from, at, end, into) {
            if (!checkOpen(from, at, end, into)) return false;
            const bytes = end - at - TAG_BYTES;
            const source = fromAt(from) + at;
            // Setting a key costs as much as 2 KiB of data: only where it is another one.
            must(initAt(manyAt, null, null, keyed === opener ? 0 : keyAt, nonceAt, 0));
            keyed = opener;
            must(controlAt(manyAt, EVP_CTRL_AEAD_SET_TAG, TAG_BYTES, source + bytes));
            if (aadBytes > 0) must(updateAt(manyAt, 0, outBytesAt, aadAt, aadBytes));
            if (bytes > 0) must(updateAt(manyAt, intoAt(into), outBytesAt, source, bytes));
            if (finalAt(manyAt, ignoredAt, outBytesAt) === 1) return true;
            clearErrors();
            keyed = undefined;
            into.fill(0, 0, bytes); // nothing that is not authentic gets out
            return false;
          },
        };
        return opener;
      },
      sealer(key, aadBytes) {
        const { nonce, aad, keyAt, nonceAt, aadAt } = placed(key, aadBytes);
        const sealer: GcmSealer & { readonly key: Buffer } = {
          key, // kept: its address is used
          nonce,
          aad,
          seal(plain, from, end, out, at) {
            checkSeal(plain, from, end, out, at);
            const bytes = end - from;
            const target = outAt(out) + at;
            const begun = initAt(
              manySealsAt,
              null,
              null,
              sealKeyed === sealer ? 0 : keyAt,
              nonceAt,
              1,
            );
            // Set again where any of this fails.
            sealKeyed = undefined;
            must(begun);
            if (aadBytes > 0) must(updateAt(manySealsAt, 0, outBytesAt, aadAt, aadBytes));
            if (bytes > 0)
              must(updateAt(manySealsAt, target, outBytesAt, plainAt(plain) + from, bytes));
            must(finalAt(manySealsAt, ignoredAt, outBytesAt));
            must(controlAt(manySealsAt, EVP_CTRL_AEAD_GET_TAG, TAG_BYTES, target + bytes));
            sealKeyed = sealer;
          },
        };
        return sealer;
      },
    };
  } catch {
    return undefined; // koffi's binary is not on this machine, or Node.js hides its OpenSSL: the other way is the answer
  }
}

/**
 * The address of a buffer's first byte, remembered for the buffer that was asked for last. Memory of a Buffer never moves while
 * the Buffer is alive, and it is kept alive here.
 */
function addressOfLast(addressOf: (buffer: Buffer) => bigint): (buffer: Buffer) => number {
  let last: Buffer | undefined;
  let address = 0;
  return (buffer) => {
    if (buffer !== last) {
      address = Number(addressOf(buffer));
      last = buffer;
    }
    return address;
  };
}

/** True if `a` makes and opens what `b` does: a library of another kind must not be trusted with a backup. */
function agree(a: Gcm, b: Gcm): boolean {
  const key = Buffer.alloc(KEY_BYTES, 0x5a);
  const nonce = Buffer.alloc(NONCE_BYTES, 0xc3);
  const aad = Buffer.from('b2 self-test');
  const plain = Buffer.alloc(1000, 0x17);
  const [x, y] = [Buffer.alloc(1016), Buffer.alloc(1016)];
  a.seal(key, nonce, aad, [plain.subarray(0, 333), plain.subarray(333)], x, 0);
  b.seal(key, nonce, aad, [plain], y, 0);
  if (!x.equals(y) || a.open(key, nonce, aad, y)?.equals(plain) !== true) return false;
  const sealer = a.sealer(key, aad.length);
  nonce.copy(sealer.nonce);
  aad.copy(sealer.aad);
  const z = Buffer.alloc(1016);
  for (let i = 0; i < 2; i++) {
    // With its key set now, and before.
    sealer.seal(plain, 0, plain.length, z.fill(0), 0);
    if (!z.equals(y)) return false;
  }
  const opener = a.opener(key, aad.length);
  nonce.copy(opener.nonce);
  aad.copy(opener.aad);
  const opens = (): boolean => {
    const into = Buffer.alloc(1000);
    return opener.open(y, 0, y.length, into) && into.equals(plain);
  };
  // With its key set now, and before.
  if (!opens() || !opens()) return false;
  y.writeUInt8(y.readUInt8(500) ^ 1, 500);
  return a.open(key, nonce, aad, y) === undefined && !opens();
}

let shared: Gcm | undefined;

/** This thread's AES-256-GCM. `B2_GCM=node` forces node:crypto (tests, benchmarks). */
export function gcm(): Gcm {
  if (shared !== undefined) return shared;
  const node = openNodeGcm();
  const openssl = process.env['B2_GCM'] === 'node' ? undefined : openOpenssl();
  shared = openssl !== undefined && agree(openssl, node) ? openssl : node;
  return shared;
}
