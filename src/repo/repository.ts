/**
 * Repository: the facade over a store. Opening and making one, keys, volumes, small sealed objects.
 *
 * Locking (operation × operation; "lease" is the repository-wide lease of that name, see lease.ts):
 *
 * |                    | read, restore | capture, snapshot | verify | prune | repair | key change |
 * | ------------------ | ------------- | ----------------- | ------ | ----- | ------ | ---------- |
 * | read, restore      | free          | free              | free   | free¹ | free²  | free       |
 * | capture, snapshot  | free          | free³             | free   | free⁴ | free²  | free       |
 * | verify             | free          | free              | free   | free¹ | free²  | free       |
 * | prune              | free¹         | free⁴             | free¹  | lease | lease  | free       |
 * | repair             | free²         | free²             | free²  | lease | lease  | free       |
 * | key change         | free          | free              | free   | free  | free   | lease      |
 *
 * ¹ a reader that meets a moved frame reads the footer again; what a listed point needs is never deleted.
 * ² repair only adds segments and journal entries, and replaces damaged ones.
 * ³ of different volumes; a second writer of one volume claims the next epoch and the first one stops (FORMAT.md 6.5).
 * ⁴ what capture reuses while prune wants to delete it is found by the check before the acknowledgement (FORMAT.md 6.4).
 */
import type { Clock, Random } from '../clock.js';
import { B2Error, isKind, messageOf } from '../errors.js';
import {
  decodeConfig,
  encodeConfig,
  type ConfigKey,
  type RepositoryConfig,
} from '../format/config.js';
import { CONFIG_COPY_NAME, CONFIG_NAME } from '../format/names.js';
import { decodeObject, encodeObject, type ObjectKind } from '../format/object.js';
import { MASTER_KEY_BYTES, keyRing, type KeyRing } from '../format/seal.js';
import { lz4 } from '../lz4.js';
import type { RepositoryHandle } from './handle.js';
import { makeKey, unlock, withMac, type ScryptCost, type Secret } from './keys.js';
import { acquireLease } from './lease.js';
import { PackCache } from './pack-reader.js';
import { PageCache } from './segments/page-cache.js';
import type { PackContext } from './pack-writer.js';
import type { ProcessIdentity } from '../process-identity.js';
import { checkName, type Store } from './store.js';

/** What a repository is made with. */
export interface RepositoryParameters {
  readonly encryption: 'aes256-gcm' | 'none';
  /** 16, 32, 64, 128 or 256 KiB. */
  readonly chunkBytes: number;
  /** Size at which a pack is sealed; 1 to 256 MiB. */
  readonly packBytes: number;
}

export const DEFAULT_PARAMETERS: RepositoryParameters = {
  encryption: 'aes256-gcm',
  chunkBytes: 64 * 1024,
  packBytes: 32 * 1024 * 1024,
};

/** Clock, randomness and who we are, injected. */
export interface Environment {
  readonly clock: Clock;
  readonly random: Random;
  readonly owner: ProcessIdentity;
}

/** RFC 3339 with milliseconds, for `config`. */
function rfc3339(ns: bigint): string {
  return new Date(Number(ns / 1_000_000n)).toISOString();
}

/** A repository that is open. `close` it; the store is closed with it. */
export class Repository implements AsyncDisposable {
  readonly store: Store;
  readonly env: Environment;
  readonly keys: KeyRing;
  /** Packs and chunks read lately, shared by every image of this repository. */
  readonly packs: PackCache;
  /** Pages of segments read lately. */
  readonly pages: PageCache = new PageCache();
  /** Id of the key that opened it. */
  readonly keyId: string;
  private currentConfig: RepositoryConfig;
  private readonly master: Uint8Array;

  private constructor(
    store: Store,
    env: Environment,
    config: RepositoryConfig,
    unlocked: { readonly master: Uint8Array; readonly keyId: string },
  ) {
    this.store = store;
    this.env = env;
    this.currentConfig = config;
    this.master = unlocked.master;
    this.keyId = unlocked.keyId;
    this.keys = keyRing(unlocked.master, config.encryption !== 'none');
    this.packs = new PackCache(this.packContext());
  }

  /**
   * Makes a repository in `store`, which must hold none, with one key for `secret` (not needed without encryption). Kind
   * `exists` with code 10 if there is one.
   */
  static async init(
    store: Store,
    parameters: RepositoryParameters,
    secret: Secret | undefined,
    env: Environment,
    cost?: ScryptCost,
  ): Promise<Repository> {
    for (const name of [CONFIG_NAME, CONFIG_COPY_NAME]) {
      if ((await store.stat(name)) !== undefined) throw alreadyThere(store);
    }
    const id = hexOf(env.random(16));
    const created = rfc3339(env.clock.nowNs());
    const master = Buffer.from(env.random(MASTER_KEY_BYTES));
    let key: ConfigKey;
    if (parameters.encryption === 'none') {
      key = {
        id: hexOf(env.random(8)),
        label: 'no encryption',
        created,
        kind: 'none',
        master: master.toString('base64'),
      };
    } else {
      if (secret === undefined) {
        throw new B2Error('wrong-key', 'an encrypted repository needs a password or a key file', {
          hint: 'Set B2_PASSWORD_FILE or B2_KEY_FILE, or use --encryption none.',
        });
      }
      key = await makeKey(master, id, secret, {
        label: secret.kind === 'password' ? 'password' : 'key file',
        created,
        random: env.random,
        ...(cost === undefined ? {} : { cost }),
      });
    }
    const config = withMac({ id, created, ...parameters, keys: [key] }, master);
    const bytes = encodeConfig(config);
    // The create-only put decides between two inits at once; the copy of the loser is never written.
    try {
      await store.put(CONFIG_NAME, bytes, { ifAbsent: true });
    } catch (error) {
      if (isKind(error, 'exists')) throw alreadyThere(store);
      throw error;
    }
    await store.put(CONFIG_COPY_NAME, bytes);
    return new Repository(store, env, config, { master, keyId: key.id });
  }

  /**
   * Opens the repository in `store` with the first of `secrets` that fits. Kinds `no-repository`, `wrong-key`, `damaged`.
   * `warn` hears of a `config` that had to be read from its copy.
   */
  static async open(
    store: Store,
    secrets: readonly Secret[],
    env: Environment,
    warn: (message: string) => void = () => undefined,
  ): Promise<Repository> {
    let failure: B2Error | undefined;
    for (const name of [CONFIG_NAME, CONFIG_COPY_NAME]) {
      try {
        const config = decodeConfig(await store.get(name));
        const unlocked = await unlock(config, secrets);
        if (name === CONFIG_COPY_NAME) {
          warn(
            `${store.url}: "config" cannot be used (${messageOf(failure)}); its copy was. Run "b2 repair".`,
          );
        }
        return new Repository(store, env, config, unlocked);
      } catch (error) {
        if (!isKind(error, 'not-found', 'damaged')) throw error;
        // The first problem is the one to tell, unless it was only that the file is not there.
        if (failure === undefined || failure.kind === 'not-found') failure = error;
      }
    }
    if (failure?.kind === 'damaged') throw failure;
    throw new B2Error('no-repository', `there is no b2 repository at ${store.url}`, {
      cause: failure,
      hint: 'Make one with "b2 init", or name another with --repo or B2_REPOSITORY.',
    });
  }

  get config(): RepositoryConfig {
    return this.currentConfig;
  }

  get id(): string {
    return this.currentConfig.id;
  }

  get chunkBytes(): number {
    return this.currentConfig.chunkBytes;
  }

  /** What writing and reading packs needs, in this thread. */
  packContext(): PackContext {
    return {
      store: this.store,
      keys: this.keys,
      lz4: lz4(),
      repositoryId: this.id,
      chunkBytes: this.chunkBytes,
    };
  }

  /** What a worker thread needs. `storeUrl` is undefined for a store that lives in this thread only. */
  handle(storeUrl: string | undefined): RepositoryHandle {
    return {
      storeUrl,
      master: this.master,
      encrypted: this.keys.encrypted,
      repositoryId: this.id,
      chunkBytes: this.chunkBytes,
      packBytes: this.currentConfig.packBytes,
    };
  }

  /** 16 fresh random bytes, in hex. */
  newId(): string {
    return hexOf(this.env.random(16));
  }

  /** 16 fresh random bytes. */
  newSalt(): Buffer {
    return Buffer.from(this.env.random(16));
  }

  /** Puts a sealed object (FORMAT.md section 4). */
  async putObject(
    kind: ObjectKind,
    name: string,
    payload: unknown,
    options: { readonly ifAbsent?: boolean } = {},
  ): Promise<void> {
    checkName(name);
    const bytes = encodeObject(kind, name, payload, this.newSalt(), this.keys);
    await this.store.put(name, bytes, options);
  }

  /** Reads a sealed object. Kinds `not-found`, `damaged`. */
  async getObject(kind: ObjectKind, name: string): Promise<Record<string, unknown>> {
    return decodeObject(kind, name, await this.store.get(name), this.keys);
  }

  /**
   * Adds a key for `secret` and returns it. Rewrites `config` under the lease `keys`; the copy first, so that a crash
   * between the two leaves a config that some listed key opens in either.
   */
  async addKey(secret: Secret, label: string, cost?: ScryptCost): Promise<ConfigKey> {
    this.refuseUnencrypted();
    const key = await makeKey(this.master, this.id, secret, {
      label,
      created: rfc3339(this.env.clock.nowNs()),
      random: this.env.random,
      ...(cost === undefined ? {} : { cost }),
    });
    await this.changeKeys((keys) => [...keys, key]);
    return key;
  }

  /** Removes the key with this id (a unique prefix will do). Refuses the last one. */
  async removeKey(idPrefix: string): Promise<ConfigKey> {
    this.refuseUnencrypted();
    let removed: ConfigKey | undefined;
    await this.changeKeys((keys) => {
      const found = keys.filter((k) => k.id.startsWith(idPrefix));
      const [key] = found;
      if (key === undefined || idPrefix === '') {
        throw new B2Error('not-found', `repository ${this.id} has no key ${idPrefix}`, {
          hint: '"b2 key list" shows them.',
        });
      }
      if (found.length > 1)
        throw new B2Error('usage', `${found.length} keys start with ${idPrefix}`);
      if (keys.length === 1) {
        throw new B2Error(
          'refused',
          `${key.id} is the only key: without it nothing could be read any more`,
          {
            hint: 'Add another one first ("b2 key add").',
          },
        );
      }
      removed = key;
      return keys.filter((k) => k !== key);
    });
    if (removed === undefined) throw new Error('changeKeys did not run');
    return removed;
  }

  private refuseUnencrypted(): void {
    if (this.currentConfig.encryption === 'none') {
      throw new B2Error('unsupported', `repository ${this.id} is not encrypted: it has no keys`);
    }
  }

  private async changeKeys(
    change: (keys: readonly ConfigKey[]) => readonly ConfigKey[],
  ): Promise<void> {
    await using lease = await acquireLease(this.store, 'keys', {
      ...this.env,
      purpose: 'key change',
    });
    // What is there now, not what was there when we opened: another machine may have changed it.
    const now = decodeConfig(await this.readConfig());
    if (now.id !== this.id)
      throw new B2Error('damaged', `${this.store.url}: config belongs to repository ${now.id}`);
    const { mac: _mac, ...rest } = now;
    const next = withMac({ ...rest, keys: change(now.keys) }, this.master);
    const bytes = encodeConfig(next);
    await lease.assertHeld();
    await this.store.put(CONFIG_COPY_NAME, bytes);
    await this.store.put(CONFIG_NAME, bytes);
    this.currentConfig = next;
  }

  private async readConfig(): Promise<Buffer> {
    try {
      return await this.store.get(CONFIG_NAME);
    } catch (error) {
      if (!isKind(error, 'not-found')) throw error;
      return this.store.get(CONFIG_COPY_NAME);
    }
  }

  /**
   * Writes `config` and its copy again, the same: what one of them says if that is right (another may have changed keys since we opened),
   * else from what is open. For repair, under the lease `keys`.
   */
  async rewriteConfig(): Promise<void> {
    for (const name of [CONFIG_NAME, CONFIG_COPY_NAME]) {
      try {
        const found = decodeConfig(await this.store.get(name));
        const { mac, ...rest } = found;
        if (found.id !== this.id || withMac(rest, this.master).mac !== mac) continue;
        this.currentConfig = found;
        break;
      } catch (error) {
        if (!isKind(error, 'not-found', 'damaged')) throw error;
      }
    }
    const bytes = encodeConfig(this.currentConfig);
    await this.store.put(CONFIG_COPY_NAME, bytes);
    await this.store.put(CONFIG_NAME, bytes);
  }

  async close(): Promise<void> {
    await this.packs.close();
    await this.store.close();
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.close();
  }
}

function alreadyThere(store: Store): B2Error {
  return new B2Error('exists', `there is a repository at ${store.url} already`, {
    code: 10,
    hint: 'Use it as it is, or name another place with --repo.',
  });
}

function hexOf(bytes: Uint8Array): string {
  return Buffer.from(bytes).toString('hex');
}
