/**
 * scrypt (RFC 7914): by libsodium through koffi where it is on the machine, else by node:crypto. The bytes are the same; libsodium
 * computes with SSE2 and needs two thirds of the time, which every command that opens an encrypted repository waits for.
 */
import { scrypt, scryptSync } from 'node:crypto';
import { createRequire } from 'node:module';

/** What a derivation costs and is salted with. */
export interface ScryptParameters {
  readonly salt: Uint8Array;
  /** A power of 2. */
  readonly N: number;
  readonly r: number;
  readonly p: number;
}

/** Derives keys in another thread of the process, several at a time if asked to. */
export interface Scrypt {
  /** Which library does the work, for benchmarks and tests. */
  readonly implementation: 'libsodium' | 'node';
  /** The 32-byte key of `password`. Takes 128 · N · r bytes of memory meanwhile; rejects where they cannot be had. */
  derive(password: Uint8Array, parameters: ScryptParameters): Promise<Buffer>;
}

const KEY_BYTES = 32;
/** Above what the algorithm itself takes. */
const SLACK_BYTES = 32 * 1024 * 1024;

/** The portable implementation. */
export function openNodeScrypt(): Scrypt {
  return {
    implementation: 'node',
    derive: (password, { salt, N, r, p }) =>
      new Promise((resolve, reject) => {
        const maxmem = 128 * N * r + SLACK_BYTES;
        scrypt(password, salt, KEY_BYTES, { N, r, p, maxmem }, (error, key) => {
          if (error === null) resolve(key);
          else reject(error);
        });
      }),
  };
}

/** sodium/crypto_pwhash_scryptsalsa208sha256.h: 0, or −1 with errno. */
type Derive = (
  password: Uint8Array,
  passwordBytes: number,
  salt: Uint8Array,
  saltBytes: number,
  N: number,
  r: number,
  p: number,
  out: Buffer,
  outBytes: number,
) => number;

/** libsodium's, or undefined where there is none, or none that computes what node:crypto does. */
export function openSodiumScrypt(): Scrypt | undefined {
  for (const name of ['libsodium.so.23', 'libsodium.so.26']) {
    try {
      const koffi = createRequire(import.meta.url)('koffi') as typeof import('koffi');
      const lib = koffi.load(name);
      // It looks for SSE2 then; a second call does nothing.
      if ((lib.func('int sodium_init()') as () => number)() < 0) continue;
      const derive = lib.func(
        'int crypto_pwhash_scryptsalsa208sha256_ll(const void *password, size_t passwordBytes, const void *salt, size_t saltBytes, uint64_t N, uint32_t r, uint32_t p, void *out, size_t outBytes)',
      );
      if (!isRight(derive)) continue;
      const node = openNodeScrypt();
      return {
        implementation: 'libsodium',
        derive: (password, parameters) =>
          new Promise((resolve, reject) => {
            const { salt, N, r, p } = parameters;
            const out = Buffer.alloc(KEY_BYTES);
            derive.async(
              password,
              password.byteLength,
              salt,
              salt.byteLength,
              N,
              r,
              p,
              out,
              KEY_BYTES,
              (error: unknown, result: unknown) => {
                if (error === null && result === 0) resolve(out);
                // It says no more than no: node:crypto has the words, or the memory.
                else node.derive(password, parameters).then(resolve, reject);
              },
            );
          }),
      };
    } catch {
      // not on this machine, nor koffi's binary perhaps
    }
  }
  return undefined;
}

/** A library of another kind must not lock anybody out: it has to compute what node:crypto does. */
function isRight(derive: Derive): boolean {
  const password = Buffer.from('b2 self-test');
  const salt = Buffer.alloc(KEY_BYTES, 0x5a);
  return [
    { N: 16, r: 8, p: 1 },
    { N: 2, r: 1, p: 3 },
  ].every(({ N, r, p }) => {
    const out = Buffer.alloc(KEY_BYTES);
    const done = derive(password, password.length, salt, salt.length, N, r, p, out, out.length);
    return done === 0 && out.equals(scryptSync(password, salt, KEY_BYTES, { N, r, p }));
  });
}

let shared: Scrypt | undefined;

/** The better of the two. `B2_SCRYPT=node` forces node:crypto (tests, benchmarks). */
export function scryptOf(): Scrypt {
  shared ??=
    (process.env['B2_SCRYPT'] === 'node' ? undefined : openSodiumScrypt()) ?? openNodeScrypt();
  return shared;
}
