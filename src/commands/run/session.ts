/** What commands share: opening the repository of the settings, finding volumes and points. */
import { join } from 'node:path';
import { homedir } from 'node:os';
import { B2Error } from '../../errors.js';
import { currentIdentity } from '../../process-identity.js';
import { Repository, type Environment } from '../../repo/repository.js';
import { parseKeyFile, type Secret } from '../../repo/keys.js';
import { openStore } from '../../repo/store-url.js';
import { findVolume, listVolumes, type VolumeMeta } from '../../repo/volume.js';
import { askPassword, findSecrets, type FoundSecret, type SecretPlaces } from '../../secrets.js';
import type { CommandContext } from '../spec.js';

export function environmentOf(context: CommandContext): Environment {
  return { clock: context.clock, random: context.random, owner: currentIdentity() };
}

/** The key file that belongs to the default repository. */
export function defaultKeyFile(context: CommandContext): string {
  if (process.getuid?.() === 0 && context.env['XDG_CONFIG_HOME'] === undefined)
    return '/etc/b2/repo.key';
  return join(context.env['XDG_CONFIG_HOME'] ?? join(homedir(), '.config'), 'b2', 'repo.key');
}

/** Where the settings say that secrets are. */
export function secretPlaces(context: CommandContext): SecretPlaces {
  const { credentials } = context.settings;
  const { env } = context;
  const fromEnvironment = credentials.origin === 'environment' || credentials.origin === 'default';
  return {
    ...(credentials.passwordFile === undefined ? {} : { passwordFile: credentials.passwordFile }),
    ...(credentials.passwordCommand === undefined
      ? {}
      : { passwordCommand: credentials.passwordCommand }),
    ...(credentials.keyFile === undefined ? {} : { keyFile: credentials.keyFile }),
    ...(fromEnvironment && env['B2_PASSWORD'] !== undefined
      ? { password: env['B2_PASSWORD'] }
      : {}),
    ...(env['CREDENTIALS_DIRECTORY'] === undefined
      ? {}
      : { credentialsDirectory: env['CREDENTIALS_DIRECTORY'] }),
    ...(credentials.origin === 'default' ? { defaultKeyFile: defaultKeyFile(context) } : {}),
  };
}

export function secretOf(found: FoundSecret): Secret {
  return found.kind === 'password'
    ? found
    : { kind: 'keyFile', material: parseKeyFile(found.text, found.path), source: found.source };
}

/** Opens the repository of the settings; asks for a password on a terminal where nothing else was given. */
export async function openRepository(context: CommandContext): Promise<Repository> {
  const store = await openStore(context.settings.repository.url);
  const env = environmentOf(context);
  const warn = (message: string): void => context.events({ type: 'warning', message });
  try {
    const secrets = (await findSecrets(secretPlaces(context))).map(secretOf);
    try {
      return await Repository.open(store, secrets, env, warn);
    } catch (error) {
      if (secrets.length > 0 || !(error instanceof B2Error) || error.kind !== 'wrong-key')
        throw error;
      const password = await askPassword(`Password of ${store.url}: `);
      if (password === undefined) throw error;
      return await Repository.open(
        store,
        [{ kind: 'password', password, source: 'the terminal' }],
        env,
        warn,
      );
    }
  } catch (error) {
    await store.close();
    throw error;
  }
}

/** Runs `fn` with the repository open and closes it whatever happens. */
export async function withRepository<T>(
  context: CommandContext,
  fn: (repo: Repository) => Promise<T>,
): Promise<T> {
  const repo = await openRepository(context);
  try {
    return await fn(repo);
  } finally {
    await repo.close();
  }
}

/** All volumes; damaged meta objects become warnings. */
export function volumesOf(context: CommandContext, repo: Repository): Promise<VolumeMeta[]> {
  return listVolumes(repo, (message) => context.events({ type: 'warning', message }));
}

/** The volume a person means. */
export async function volumeNamed(
  context: CommandContext,
  repo: Repository,
  text: string,
): Promise<VolumeMeta> {
  return findVolume(await volumesOf(context, repo), text);
}
