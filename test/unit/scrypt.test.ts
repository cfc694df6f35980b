import { scryptSync } from 'node:crypto';
import { describe, expect, test } from 'vitest';
import { openNodeScrypt, openSodiumScrypt, scryptOf, type Scrypt } from '../../src/scrypt.js';
import { requires } from '../support/requires.js';

const implementations: readonly [string, Scrypt][] = [
  ['node:crypto', openNodeScrypt()],
  ['this thread’s', scryptOf()],
];

describe.each(implementations)('scrypt by %s', (_, s) => {
  test('computes the vectors of RFC 7914', async () => {
    const derive = (password: string, salt: string, N: number, r: number, p: number) =>
      s.derive(Buffer.from(password), { salt: Buffer.from(salt), N, r, p });
    expect((await derive('', '', 16, 1, 1)).toString('hex')).toBe(
      '77d6576238657b203b19ca42c18a0497f16b4844e3074ae8dfdffa3fede21442',
    );
    expect((await derive('pleaseletmein', 'SodiumChloride', 16384, 8, 1)).toString('hex')).toBe(
      '7023bdcb3afd7348461c06cd81fd38ebfda8fbba904f8e3ea9b543f6545da1f2',
    );
  });

  test('derives several keys at once, each from its own password', async () => {
    const salt = Buffer.alloc(32, 7);
    const passwords = ['a', 'b', 'ä€', ''].map((text) => Buffer.from(text));
    const keys = await Promise.all(passwords.map((p) => s.derive(p, { salt, N: 256, r: 8, p: 2 })));
    expect(keys).toEqual(passwords.map((p) => scryptSync(p, salt, 32, { N: 256, r: 8, p: 2 })));
  });

  test('rejects what cannot be computed', async () => {
    await expect(
      s.derive(Buffer.from('x'), { salt: Buffer.alloc(8), N: 1000, r: 8, p: 1 }),
    ).rejects.toThrow();
  });
});

requires({
  also: () => (openSodiumScrypt() === undefined ? 'libsodium (libsodium23)' : undefined),
}).it('libsodium is used where it is, unless it is forbidden', () => {
  expect(scryptOf().implementation).toBe(
    process.env['B2_SCRYPT'] === 'node' ? 'node' : 'libsodium',
  );
});
