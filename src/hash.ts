/** Keyed BLAKE3 (the BLAKE3 paper, section 2.3) through the package @napi-rs/blake-hash. */
import { createRequire } from 'node:module';

const require = createRequire(import.meta.url);

/** Bytes of a full hash. */
export const HASH_BYTES = 32;

/** Hashes one message after the other under one key. Not for use from two call stacks at once. */
export interface KeyedHash {
  /** The 32-byte keyed BLAKE3 of the parts, one after the other. */
  digest(...parts: readonly Uint8Array[]): Buffer;
  /** True if `hashes` holds the hash of `message` from `at`. Cheaper than to get and compare it. */
  matches(message: Uint8Array, hashes: Buffer, at: number): boolean;
}

/** `key` is 32 bytes. */
export function keyedHash(key: Uint8Array): KeyedHash {
  if (key.byteLength !== 32) throw new RangeError('a BLAKE3 key is 32 bytes');
  const { Blake3Hasher } = require('@napi-rs/blake-hash') as typeof import('@napi-rs/blake-hash');
  const hasher = Blake3Hasher.newKeyed(Buffer.from(key));
  return {
    digest(...parts) {
      hasher.reset(); // keeps the key; a new hasher for each message costs as much again as the hashing
      for (const part of parts) hasher.update(part);
      return hasher.digestBuffer();
    },
    matches(message, hashes, at) {
      hasher.reset();
      hasher.update(message);
      // A string is made sooner than a Buffer around foreign memory, and needs no finalizer.
      return hasher.digest('hex') === hashes.toString('hex', at, at + HASH_BYTES);
    },
  };
}
