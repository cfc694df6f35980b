/** The object `config` (FORMAT.md section 3): parameters and wrapped keys, as YAML. */
import { createRequire } from 'node:module';
import { B2Error } from '../errors.js';
import { newerVersion } from './pack.js';
import { parsePlainYaml } from './plain-yaml.js';

export const CONFIG_VERSION = 1;
const MAX_CONFIG_BYTES = 64 * 1024;
/** Memory that deriving a key may take: a forged config must not exhaust the machine. */
const MAX_SCRYPT_BYTES = 1024 * 1024 * 1024;

/** Loaded when it is needed, which takes longer than most commands have to do. */
function yaml(): typeof import('yaml') {
  return createRequire(import.meta.url)('yaml') as typeof import('yaml');
}

interface KeyCommon {
  /** 16 hex digits. */
  readonly id: string;
  readonly label: string;
  readonly created: string;
}
export interface ScryptKey extends KeyCommon {
  readonly kind: 'scrypt';
  readonly salt: string;
  readonly N: number;
  readonly r: number;
  readonly p: number;
  readonly wrapped: string;
}
export interface FileKey extends KeyCommon {
  readonly kind: 'file';
  readonly salt: string;
  readonly wrapped: string;
}
export interface NoneKey extends KeyCommon {
  readonly kind: 'none';
  readonly master: string;
}
export type ConfigKey = ScryptKey | FileKey | NoneKey;

export interface RepositoryConfig {
  readonly id: string;
  readonly created: string;
  readonly encryption: 'aes256-gcm' | 'none';
  readonly chunkBytes: number;
  readonly packBytes: number;
  readonly keys: readonly ConfigKey[];
  /** Base64. */
  readonly mac: string;
}

/** The bytes that the MAC covers. */
export function canonicalConfig(c: Omit<RepositoryConfig, 'mac'>): Buffer {
  const keys = c.keys.map((k) => [
    k.id,
    k.label,
    k.created,
    k.kind,
    k.kind === 'none' ? '' : k.salt,
    k.kind === 'scrypt' ? k.N : 0,
    k.kind === 'scrypt' ? k.r : 0,
    k.kind === 'scrypt' ? k.p : 0,
    k.kind === 'none' ? '' : k.wrapped,
  ]);
  return Buffer.from(
    JSON.stringify([
      'b2',
      CONFIG_VERSION,
      c.id,
      c.created,
      c.encryption,
      c.chunkBytes,
      c.packBytes,
      keys,
    ]),
    'utf8',
  );
}

/** A key as the mapping that is written: always in the same order. */
function keyMapping(k: ConfigKey): Record<string, unknown> {
  const common = { id: k.id, label: k.label, created: k.created, kind: k.kind };
  switch (k.kind) {
    case 'scrypt':
      return { ...common, salt: k.salt, N: k.N, r: k.r, p: k.p, wrapped: k.wrapped };
    case 'file':
      return { ...common, salt: k.salt, wrapped: k.wrapped };
    case 'none':
      return { ...common, master: k.master };
  }
}

/** The bytes of `config`; the same for the same contents. */
export function encodeConfig(c: RepositoryConfig): Buffer {
  const mapping = {
    b2: 'repository',
    version: CONFIG_VERSION,
    id: c.id,
    created: c.created,
    encryption: c.encryption,
    chunkBytes: c.chunkBytes,
    packBytes: c.packBytes,
    keys: c.keys.map(keyMapping),
    mac: c.mac,
  };
  return Buffer.from(yaml().stringify(mapping, { lineWidth: 0 }), 'utf8');
}

const bad = (path: string, problem: string): B2Error =>
  new B2Error('damaged', `config: ${path === '' ? '' : `${path}: `}${problem}`, {
    hint: 'Put back "config" from "config.copy", or from a backup of the repository.',
  });

function checkKeys(o: Record<string, unknown>, known: readonly string[], path: string): void {
  for (const k of Object.keys(o)) if (!known.includes(k)) throw bad(`${path}${k}`, 'unknown key');
  for (const k of known) if (!(k in o)) throw bad(`${path}${k}`, 'missing');
}

function text(o: Record<string, unknown>, key: string, path: string, pattern: RegExp): string {
  const v = o[key];
  if (typeof v !== 'string' || !pattern.test(v))
    throw bad(`${path}${key}`, 'not of the right form');
  return v;
}

function int(
  o: Record<string, unknown>,
  key: string,
  path: string,
  min: number,
  max: number,
): number {
  const v = o[key];
  if (typeof v !== 'number' || !Number.isInteger(v) || v < min || v > max) {
    throw bad(`${path}${key}`, `not an integer from ${min} to ${max}`);
  }
  return v;
}

function object(v: unknown, path: string): Record<string, unknown> {
  if (typeof v !== 'object' || v === null || Array.isArray(v)) throw bad(path, 'not a mapping');
  return v as Record<string, unknown>;
}

const HEX16 = /^[0-9a-f]{16}$/;
const HEX32 = /^[0-9a-f]{32}$/;
const BASE64 = /^[A-Za-z0-9+/]+={0,2}$/;
const TIME = /^\d{4}-\d{2}-\d{2}T[0-9:.]+Z$/;
export const CHUNK_SIZES: readonly number[] = [16, 32, 64, 128, 256].map((k) => k * 1024);
export const MIN_PACK_BYTES = 1024 * 1024;
export const MAX_CONFIG_PACK_BYTES = 256 * 1024 * 1024;

function decodeKey(v: unknown, path: string): ConfigKey {
  const o = object(v, path);
  const at = `${path}.`;
  const common = ['id', 'label', 'created', 'kind'];
  const kind = o['kind'];
  const base = (): KeyCommon => ({
    id: text(o, 'id', at, HEX16),
    label: text(o, 'label', at, /^[^\0-\x1f]{0,200}$/),
    created: text(o, 'created', at, TIME),
  });
  switch (kind) {
    case 'scrypt': {
      checkKeys(o, [...common, 'salt', 'N', 'r', 'p', 'wrapped'], at);
      const N = int(o, 'N', at, 16_384, 2 ** 24);
      if (2 ** Math.round(Math.log2(N)) !== N) throw bad(`${at}N`, 'not a power of two');
      const r = int(o, 'r', at, 1, 64);
      if (128 * N * r > MAX_SCRYPT_BYTES)
        throw bad(`${at}r`, 'scrypt would need more than 1 GiB of memory');
      return {
        ...base(),
        kind,
        salt: text(o, 'salt', at, BASE64),
        N,
        r,
        p: int(o, 'p', at, 1, 16),
        wrapped: text(o, 'wrapped', at, BASE64),
      };
    }
    case 'file':
      checkKeys(o, [...common, 'salt', 'wrapped'], at);
      return {
        ...base(),
        kind,
        salt: text(o, 'salt', at, BASE64),
        wrapped: text(o, 'wrapped', at, BASE64),
      };
    case 'none':
      checkKeys(o, [...common, 'master'], at);
      return { ...base(), kind, master: text(o, 'master', at, BASE64) };
    default:
      throw bad(`${at}kind`, 'not scrypt, file or none');
  }
}

/** Parses and validates. Kind `damaged`, with the key's path, for anything wrong; the MAC is for the caller to check. */
export function decodeConfig(b: Buffer): RepositoryConfig {
  if (b.length > MAX_CONFIG_BYTES) throw bad('', `it has ${b.length} bytes`);
  const source = b.toString('utf8');
  let parsed: unknown = parsePlainYaml(source);
  try {
    parsed ??= yaml().parse(source, { maxAliasCount: 0 });
  } catch (error) {
    throw bad(
      '',
      `it is not YAML (${error instanceof Error ? (error.message.split('\n')[0] ?? '') : 'unknown'})`,
    );
  }
  const o = object(parsed, '');
  if (o['b2'] !== 'repository') throw bad('b2', 'this is not the configuration of a b2 repository');
  const version = int(o, 'version', '', 0, 65_535);
  if (version !== CONFIG_VERSION) throw newerVersion('the repository', version);
  checkKeys(
    o,
    ['b2', 'version', 'id', 'created', 'encryption', 'chunkBytes', 'packBytes', 'keys', 'mac'],
    '',
  );
  const encryption = o['encryption'];
  if (encryption !== 'aes256-gcm' && encryption !== 'none')
    throw bad('encryption', 'not aes256-gcm or none');
  const chunkBytes = int(o, 'chunkBytes', '', 1, 2 ** 30);
  if (!CHUNK_SIZES.includes(chunkBytes))
    throw bad('chunkBytes', `not one of ${CHUNK_SIZES.join(', ')}`);
  const list = o['keys'];
  if (!Array.isArray(list) || list.length === 0)
    throw bad('keys', 'not a list with at least one key');
  const keys = list.map((k: unknown, i) => decodeKey(k, `keys[${i}]`));
  if (keys.some((k) => (k.kind === 'none') !== (encryption === 'none'))) {
    throw bad('keys', 'a kind of key that does not fit the encryption');
  }
  return {
    id: text(o, 'id', '', HEX32),
    created: text(o, 'created', '', TIME),
    encryption,
    chunkBytes,
    packBytes: int(o, 'packBytes', '', MIN_PACK_BYTES, MAX_CONFIG_PACK_BYTES),
    keys,
    mac: text(o, 'mac', '', BASE64),
  };
}
