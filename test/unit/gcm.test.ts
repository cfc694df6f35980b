import { createCipheriv, randomBytes } from 'node:crypto';
import fc from 'fast-check';
import { describe, expect, test } from 'vitest';
import { gcm, openNodeGcm, type Gcm } from '../../src/gcm.js';

const implementations: readonly [string, Gcm][] = [
  ['this thread’s', gcm()],
  ['node:crypto', openNodeGcm()],
];

function sealed(g: Gcm, key: Buffer, nonce: Buffer, aad: Buffer, parts: readonly Buffer[]): Buffer {
  const out = Buffer.alloc(parts.reduce((n, p) => n + p.length, 16) + 7, 0xee);
  const length = g.seal(key, nonce, aad, parts, out, 3);
  expect(out.subarray(0, 3)).toEqual(Buffer.alloc(3, 0xee));
  expect(out.subarray(3 + length)).toEqual(Buffer.alloc(4, 0xee));
  return out.subarray(3, 3 + length);
}

test('OpenSSL is reached through koffi here', () => {
  expect(gcm().implementation).toBe(process.env['B2_GCM'] === 'node' ? 'node' : 'openssl');
});

describe.each(implementations)('%s AES-256-GCM', (_, g) => {
  test('computes test case 16 of the GCM specification', () => {
    const key = Buffer.from(
      'feffe9928665731c6d6a8f9467308308feffe9928665731c6d6a8f9467308308',
      'hex',
    );
    const nonce = Buffer.from('cafebabefacedbaddecaf888', 'hex');
    const aad = Buffer.from('feedfacedeadbeeffeedfacedeadbeefabaddad2', 'hex');
    const plain = Buffer.from(
      'd9313225f88406e5a55909c5aff5269a86a7a9531534f7da2e4c303d8a318a721c3c0c95956809532fcf0e2449a6b525b16aedf5aa0de657ba637b39',
      'hex',
    );
    expect(sealed(g, key, nonce, aad, [plain]).toString('hex')).toBe(
      '522dc1f099567d07f47f37a32a84427d643a8cdcbfe5c0c97598a2bd2555d1aa8cb08e48590dbb3da7b08b1056828838c5f61e6393ba7a0abcc9f662' +
        '76fc6ece0f4e1768cddf8853bb2d551b',
    );
  });

  test('makes what node:crypto makes and opens it again, in any parts', () => {
    fc.assert(
      fc.property(
        fc.uint8Array({ minLength: 44, maxLength: 44 }),
        fc.uint8Array({ maxLength: 80 }),
        fc.array(fc.uint8Array({ maxLength: 5000 }), { maxLength: 4 }),
        (secret, aadBytes, list) => {
          const key = Buffer.from(secret.subarray(0, 32));
          const nonce = Buffer.from(secret.subarray(32));
          const aad = Buffer.from(aadBytes);
          const parts = list.map((part) => Buffer.from(part));
          const plain = Buffer.concat(parts);
          const cipher = createCipheriv('aes-256-gcm', key, nonce).setAAD(aad);
          const expected = Buffer.concat([
            cipher.update(plain),
            cipher.final(),
            cipher.getAuthTag(),
          ]);
          expect(sealed(g, key, nonce, aad, parts).equals(expected)).toBe(true);
          expect(g.open(key, nonce, aad, expected)?.equals(plain)).toBe(true);
          const into = Buffer.alloc(plain.length + 5, 0xee);
          expect(g.open(key, nonce, aad, expected, into)?.equals(plain)).toBe(true);
          expect(into.subarray(plain.length)).toEqual(Buffer.alloc(5, 0xee));
        },
      ),
      { numRuns: 100 },
    );
  });

  test('opens nothing of which a bit is not as it was, and goes on working', () => {
    const [key, nonce, aad, plain] = [
      randomBytes(32),
      randomBytes(12),
      randomBytes(20),
      randomBytes(100),
    ];
    const good = sealed(g, key, nonce, aad, [plain]);
    for (const target of [key, nonce, aad, good]) {
      for (let bit = 0; bit < target.length * 8; bit += 7) {
        const at = bit >> 3;
        target.writeUInt8(target.readUInt8(at) ^ (1 << (bit & 7)), at);
        expect(g.open(key, nonce, aad, good)).toBeUndefined();
        target.writeUInt8(target.readUInt8(at) ^ (1 << (bit & 7)), at);
      }
    }
    expect(g.open(key, nonce, aad, good.subarray(0, 15))).toBeUndefined();
    expect(g.open(key, nonce, aad, good.subarray(0, 60))).toBeUndefined();
    expect(g.open(key, nonce, aad, good)?.equals(plain)).toBe(true);
  });

  test('a sealer makes the same seals, wherever they go, and nothing beside them', () => {
    const keys = [randomBytes(32), randomBytes(32)];
    const sealers = keys.map((key) => g.sealer(key, 20));
    const slots = [randomBytes(6000), randomBytes(6000)];
    const rooms = [Buffer.alloc(9000), Buffer.from(new SharedArrayBuffer(9000))];
    for (let i = 0; i < 60; i++) {
      const [key, sealer] = [keys[i & 1], sealers[i & 1]];
      const [slot, out] = [slots[(i >> 1) & 1], rooms[(i >> 2) & 1]];
      if (key === undefined || sealer === undefined) throw new Error('no key');
      if (slot === undefined || out === undefined) throw new Error('no room');
      const [nonce, aad] = [randomBytes(12), randomBytes(20)];
      const [from, at] = [(i * 17) % 900, (i * 61) % 3900];
      const end = from + ((i * 83) % 5000);
      nonce.copy(sealer.nonce);
      aad.copy(sealer.aad);
      out.fill(0xee);
      sealer.seal(slot, from, end, out, at);
      const expected = sealed(g, key, nonce, aad, [slot.subarray(from, end)]);
      const there = out.subarray(at, at + expected.length);
      expect(there.equals(expected)).toBe(true);
      expect(out.subarray(0, at).every((b) => b === 0xee)).toBe(true);
      expect(out.subarray(at + expected.length).every((b) => b === 0xee)).toBe(true);
      // What makes single seals is not disturbed, nor disturbs.
      expect(g.open(key, nonce, aad, expected)?.equals(slot.subarray(from, end))).toBe(true);
    }
  });

  test('a sealer writes nothing where there is no room', () => {
    const sealer = g.sealer(Buffer.alloc(32), 0);
    const out = Buffer.alloc(100);
    expect(() => sealer.seal(Buffer.alloc(90), 0, 90, out, 0)).toThrow(RangeError);
    expect(() => sealer.seal(Buffer.alloc(10), 0, 10, out, 80)).toThrow(RangeError);
    expect(() => sealer.seal(Buffer.alloc(10), 0, 11, out, 0)).toThrow(RangeError);
    expect(() => sealer.seal(Buffer.alloc(10), -1, 5, out, 0)).toThrow(RangeError);
    expect(() => sealer.seal(Buffer.alloc(10), 0, 5, out, -1)).toThrow(RangeError);
    expect(out.every((b) => b === 0)).toBe(true);
    expect(() => g.sealer(Buffer.alloc(31), 0)).toThrow(RangeError);
  });

  test('an opener opens what is sealed under its key, wherever it lies, and nothing else', () => {
    const keys = [randomBytes(32), randomBytes(32)];
    const openers = keys.map((key) => g.opener(key, 20));
    const slots = [Buffer.alloc(9000), Buffer.alloc(9000)];
    const rooms = [Buffer.alloc(5000), Buffer.alloc(5000)];
    for (let i = 0; i < 60; i++) {
      // Both keys, slots and rooms in every order, so that nothing remembered of one is used for another.
      const [key, opener] = [keys[i & 1], openers[i & 1]];
      const [slot, into] = [slots[(i >> 1) & 1], rooms[(i >> 2) & 1]];
      if (key === undefined || opener === undefined) throw new Error('no key');
      if (slot === undefined || into === undefined) throw new Error('no room');
      const [nonce, aad, plain] = [randomBytes(12), randomBytes(20), randomBytes((i * 83) % 5000)];
      const good = sealed(g, key, nonce, aad, [plain]);
      const at = (i * 61) % 3900;
      good.copy(slot, at);
      nonce.copy(opener.nonce);
      aad.copy(opener.aad);
      const end = at + good.length;
      into.fill(0xee);
      expect(opener.open(slot, at, end, into)).toBe(true);
      expect(into.subarray(0, plain.length).equals(plain)).toBe(true);
      expect(into.subarray(plain.length).every((b) => b === 0xee)).toBe(true);
      for (const flip of [at, end - 1, (at + end) >> 1]) {
        slot.writeUInt8(slot.readUInt8(flip) ^ 0x20, flip);
        expect(opener.open(slot, at, end, into)).toBe(false);
        slot.writeUInt8(slot.readUInt8(flip) ^ 0x20, flip);
      }
      opener.aad.writeUInt8(opener.aad.readUInt8(19) ^ 1, 19);
      expect(opener.open(slot, at, end, into)).toBe(false);
      aad.copy(opener.aad);
      opener.nonce.writeUInt8(opener.nonce.readUInt8(11) ^ 1, 11);
      expect(opener.open(slot, at, end, into)).toBe(false);
      nonce.copy(opener.nonce);
      expect(opener.open(slot, at, end, into)).toBe(true);
      expect(opener.open(slot, at, at + 15, into)).toBe(false);
    }
  });

  test('an opener refuses what is not there and what does not fit', () => {
    const opener = g.opener(Buffer.alloc(32), 0);
    const from = Buffer.alloc(100);
    expect(() => opener.open(from, 0, 101, Buffer.alloc(100))).toThrow(RangeError);
    expect(() => opener.open(from, -1, 50, Buffer.alloc(100))).toThrow(RangeError);
    const into = Buffer.alloc(83);
    expect(() => opener.open(from, 0, 100, into)).toThrow(RangeError);
    expect(into).toEqual(Buffer.alloc(83));
    expect(() => g.opener(Buffer.alloc(31), 0)).toThrow(RangeError);
  });

  test('refuses what does not fit before anything is written', () => {
    const out = Buffer.alloc(40);
    const key = Buffer.alloc(32);
    const nonce = Buffer.alloc(12);
    const none = Buffer.alloc(0);
    expect(() => g.seal(key, nonce, none, [Buffer.alloc(25)], out, 0)).toThrow(RangeError);
    expect(() => g.seal(key, nonce, none, [Buffer.alloc(20)], out, 5)).toThrow(RangeError);
    expect(() => g.seal(key.subarray(1), nonce, none, [], out, 0)).toThrow(RangeError);
    expect(() => g.seal(key, nonce.subarray(1), none, [], out, 0)).toThrow(RangeError);
    expect(() => g.open(key, nonce.subarray(1), none, out)).toThrow(RangeError);
    expect(out).toEqual(Buffer.alloc(40));
  });
});
