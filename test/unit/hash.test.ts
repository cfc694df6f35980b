import { expect, test } from 'vitest';
import { HASH_BYTES, keyedHash } from '../../src/hash.js';

/** The first test vector of BLAKE3 (test_vectors.json): its key, and inputs of 0, 1, 2 … 250 again and again. */
const KEY = Buffer.from('whats the Elvish word for friend', 'ascii');
const input = (bytes: number): Buffer =>
  Buffer.from(Array.from({ length: bytes }, (_, i) => i % 251));
const EMPTY = '92b2b75604ed3c761f9d6f62392c8a9227ad0ea3f09573e783f1498a4ed60d26';

test('computes the keyed hash of the specification, of any parts', () => {
  const hash = keyedHash(KEY);
  expect(hash.digest().toString('hex')).toBe(EMPTY);
  const whole = hash.digest(input(5000));
  expect(hash.digest(input(5000).subarray(0, 77), input(5000).subarray(77)).equals(whole)).toBe(
    true,
  );
});

test('says whether a message has the hash that lies somewhere', () => {
  const hash = keyedHash(KEY);
  const messages = [0, 1, 64, 1024, 1025, 65_536].map(input);
  const hashes = Buffer.concat(messages.map((m) => hash.digest(m)));
  messages.forEach((message, i) => {
    messages.forEach((_, k) => {
      expect(hash.matches(message, hashes, k * HASH_BYTES)).toBe(i === k);
    });
  });
  // Every bit counts, and a hash that is cut off is none.
  const [message] = messages.slice(3);
  if (message === undefined) throw new Error('no message');
  const own = Buffer.from(hash.digest(message));
  for (let bit = 0; bit < own.length * 8; bit++) {
    own.writeUInt8(own.readUInt8(bit >> 3) ^ (1 << (bit & 7)), bit >> 3);
    expect(hash.matches(message, own, 0)).toBe(false);
    own.writeUInt8(own.readUInt8(bit >> 3) ^ (1 << (bit & 7)), bit >> 3);
  }
  expect(hash.matches(message, own, 0)).toBe(true);
  expect(hash.matches(message, own.subarray(0, 31), 0)).toBe(false);
  expect(hash.matches(message, own, 32)).toBe(false);
});
