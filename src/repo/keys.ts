/**
 * The master key and its wrapped copies (FORMAT.md section 3): a repository is opened by any one of several passwords or
 * key files, and changing them rewrites nothing but `config`.
 */
import { createCipheriv, createDecipheriv, hkdfSync, timingSafeEqual } from 'node:crypto';
import type { Random } from '../clock.js';
import { B2Error } from '../errors.js';
import {
  canonicalConfig,
  type ConfigKey,
  type FileKey,
  type RepositoryConfig,
  type ScryptKey,
} from '../format/config.js';
import { MASTER_KEY_BYTES, keyRing } from '../format/seal.js';
import { openNodeScrypt, scryptOf, type Scrypt } from '../scrypt.js';
import { loadNative } from './handle.js';

/** What opens a repository. `source` names where it came from, for error texts; never the secret itself. */
export type Secret =
  | { readonly kind: 'password'; readonly password: string; readonly source: string }
  | { readonly kind: 'keyFile'; readonly material: Uint8Array; readonly source: string };

/** scrypt cost. 2^17 · 8 · 128 = 128 MiB and about half a second: what a login can bear and a guesser cannot. */
export interface ScryptCost {
  readonly N: number;
  readonly r: number;
  readonly p: number;
}
export const DEFAULT_SCRYPT: ScryptCost = { N: 131_072, r: 8, p: 1 };
const KEY_FILE_PREFIX = 'b2-key-v1 ';

/** The text of a new key file around 32 random bytes. */
export function keyFileText(material: Uint8Array): string {
  return `${KEY_FILE_PREFIX}${Buffer.from(material).toString('hex')}\n`;
}

/** The key material in the text of a key file; kind `wrong-key` if it is not one. */
export function parseKeyFile(text: string, path: string): Uint8Array {
  const m = /^b2-key-v1 ([0-9a-f]{64})\n?$/.exec(text);
  if (m === null) {
    throw new B2Error('wrong-key', `${path} is not a b2 key file`, {
      hint: 'A key file is one line that starts with "b2-key-v1"; make one with "b2 key add --key-file PATH".',
    });
  }
  return Buffer.from(m[1] ?? '', 'hex');
}

function kekFromPassword(
  password: string,
  parameters: Pick<ScryptKey, 'salt' | 'N' | 'r' | 'p'>,
  by: Scrypt,
): Promise<Buffer> {
  const { N, r, p } = parameters; // decodeConfig has checked the format's limits
  const salt = Buffer.from(parameters.salt, 'base64');
  const derived = by.derive(Buffer.from(password.normalize('NFC'), 'utf8'), { salt, N, r, p });
  loadNative(); // another thread is busy for half a second
  return derived;
}

function kekFromFile(material: Uint8Array, salt: string): Buffer {
  return Buffer.from(
    hkdfSync(
      'sha256',
      material,
      Buffer.from(salt, 'base64'),
      Buffer.from('b2 key file v1', 'ascii'),
      32,
    ),
  );
}

function wrapAad(repositoryId: string, keyId: string): Buffer {
  return Buffer.concat([
    Buffer.from('b2 key v1', 'ascii'),
    Buffer.from(repositoryId, 'hex'),
    Buffer.from(keyId, 'hex'),
  ]);
}

function wrap(
  kek: Buffer,
  master: Uint8Array,
  repositoryId: string,
  keyId: string,
  random: Random,
): string {
  const nonce = Buffer.from(random(12));
  const cipher = createCipheriv('aes-256-gcm', kek, nonce);
  cipher.setAAD(wrapAad(repositoryId, keyId));
  return Buffer.concat([
    nonce,
    cipher.update(master),
    cipher.final(),
    cipher.getAuthTag(),
  ]).toString('base64');
}

function unwrap(
  kek: Buffer,
  wrapped: string,
  repositoryId: string,
  keyId: string,
): Buffer | undefined {
  const b = Buffer.from(wrapped, 'base64');
  if (b.length !== 12 + MASTER_KEY_BYTES + 16) return undefined;
  const decipher = createDecipheriv('aes-256-gcm', kek, b.subarray(0, 12), { authTagLength: 16 });
  decipher.setAAD(wrapAad(repositoryId, keyId));
  decipher.setAuthTag(b.subarray(12 + MASTER_KEY_BYTES));
  const master = decipher.update(b.subarray(12, 12 + MASTER_KEY_BYTES));
  try {
    decipher.final();
    return master;
  } catch {
    return undefined; // another password or key file wrapped this one
  }
}

/** A new wrapped copy of `master` that `secret` opens. */
export async function makeKey(
  master: Uint8Array,
  repositoryId: string,
  secret: Secret,
  about: {
    readonly label: string;
    readonly created: string;
    readonly random: Random;
    readonly cost?: ScryptCost;
  },
): Promise<ConfigKey> {
  const { random } = about;
  const id = Buffer.from(random(8)).toString('hex');
  const salt = Buffer.from(random(32)).toString('base64');
  const common = { id, label: about.label, created: about.created, salt };
  if (secret.kind === 'password') {
    const cost = about.cost ?? DEFAULT_SCRYPT;
    // By what every machine has: a wrong key would be found when it is used first, too late.
    const kek = await kekFromPassword(secret.password, { salt, ...cost }, openNodeScrypt());
    return {
      ...common,
      kind: 'scrypt',
      ...cost,
      wrapped: wrap(kek, master, repositoryId, id, random),
    };
  }
  const kek = kekFromFile(secret.material, salt);
  return {
    ...common,
    kind: 'file',
    wrapped: wrap(kek, master, repositoryId, id, random),
  } satisfies FileKey;
}

/** Which key a secret opened, and what was in it. */
export interface Unlocked {
  readonly master: Uint8Array;
  readonly keyId: string;
}

/**
 * Opens the repository of `config` with the first of `secrets` that fits, and checks the configuration's MAC. Kind
 * `wrong-key` if none fits, `damaged` if the MAC is wrong.
 */
export async function unlock(
  config: RepositoryConfig,
  secrets: readonly Secret[],
): Promise<Unlocked> {
  const found = await findMaster(config, secrets);
  const ring = keyRing(found.master, config.encryption !== 'none');
  const mac = Buffer.from(config.mac, 'base64');
  const right = ring.configMac(canonicalConfig(config));
  if (mac.length !== right.length || !timingSafeEqual(mac, right)) {
    throw new B2Error(
      'damaged',
      'config: its authentication code is wrong: somebody or something has changed it',
      {
        hint: 'Put back "config" from "config.copy", or from a backup of the repository.',
      },
    );
  }
  return found;
}

async function findMaster(config: RepositoryConfig, secrets: readonly Secret[]): Promise<Unlocked> {
  for (const key of config.keys) {
    if (key.kind === 'none') return { master: Buffer.from(key.master, 'base64'), keyId: key.id };
  }
  if (secrets.length === 0) {
    throw new B2Error(
      'wrong-key',
      `repository ${config.id} is encrypted and no password or key file was given`,
      {
        hint: 'Set B2_PASSWORD_FILE, B2_PASSWORD_COMMAND, B2_KEY_FILE or B2_PASSWORD, or run on a terminal to be asked.',
      },
    );
  }
  for (const secret of secrets) {
    for (const key of config.keys) {
      let kek: Buffer | undefined;
      if (secret.kind === 'password' && key.kind === 'scrypt')
        kek = await kekFromPassword(secret.password, key, scryptOf());
      if (secret.kind === 'keyFile' && key.kind === 'file')
        kek = kekFromFile(secret.material, key.salt);
      if (kek === undefined || key.kind === 'none') continue;
      const master = unwrap(kek, key.wrapped, config.id, key.id);
      if (master !== undefined) return { master, keyId: key.id };
    }
  }
  const tried = secrets.map((s) => s.source).join(', ');
  throw new B2Error(
    'wrong-key',
    `no key of repository ${config.id} is opened by what was given (${tried})`,
    {
      hint: 'Check the password or key file; "b2 key list" with a working one shows which keys there are.',
    },
  );
}

/** `config` with a fresh MAC. */
export function withMac(
  config: Omit<RepositoryConfig, 'mac'>,
  master: Uint8Array,
): RepositoryConfig {
  const ring = keyRing(master, config.encryption !== 'none');
  return { ...config, mac: ring.configMac(canonicalConfig(config)).toString('base64') };
}
