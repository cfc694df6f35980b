/**
 * Settings: what an option, the environment, a configuration file or the embedded default says, in this
 * order. Configuration files are YAML, validated against {@link CONFIG_KEYS}; every message names the
 * file and the key's path. Secrets themselves are never configuration, only the places they come from.
 */
import { readFileSync } from 'node:fs';
import { join } from 'node:path';
import { B2Error, errnoOf, ioError } from './errors.js';
import { parseDurationMs, parseSize, printable } from './human.js';

/** How the text of a value is read. `size` → bytes, `duration` → milliseconds, `devices` → {@link WatchedDevice}. */
export type ConfigKind =
  | 'string'
  | 'path'
  | 'boolean'
  | 'size'
  | 'duration'
  | 'strings'
  | 'source'
  | 'freezing'
  | 'devices';

export interface ConfigKey {
  readonly kind: ConfigKind;
  /** One sentence for b2(1). */
  readonly description: string;
}

/** How changes are found; see src/devices/choose-source.ts. */
export const WATCH_SOURCES = ['auto', 'trace', 'scan'] as const;
export type WatchSource = (typeof WATCH_SOURCES)[number];

/** When file systems may be frozen; see docs/points.md. */
export const WATCH_FREEZING = ['auto', 'on-request', 'never'] as const;
export type WatchFreezing = (typeof WATCH_FREEZING)[number];

/**
 * What can be set for all watched devices (`watch.NAME`) and for one of them; the latter wins. The kinds are those of
 * {@link CONFIG_KEYS}.
 */
const WATCH_SETTINGS = {
  interval: {
    kind: 'duration',
    description: 'Time between points while there are writes (watch); default 1s.',
  },
  source: {
    kind: 'source',
    description: 'How changes are found (watch): auto, trace or scan; default auto.',
  },
  freeze: {
    kind: 'freezing',
    description:
      'When file systems are frozen for a point (watch): auto (for snapshots, and where writes leave no other way to an exact point), on-request (for snapshots) or never; default auto.',
  },
  'freeze-limit': {
    kind: 'duration',
    description:
      'Longest time for which file systems may be frozen for a point (watch); default 100ms, 0s: never.',
  },
  'freeze-after': {
    kind: 'duration',
    description:
      'Time without an exact point, because writes outrun the reader, after which freeze: auto freezes (watch); default 5s.',
  },
  group: {
    kind: 'string',
    description:
      'Name of a group (watch): devices of one group share their points, for file systems, LVM groups and databases that lie on several.',
  },
  'pre-point': {
    kind: 'string',
    description:
      'Shell command that brings an application to rest before a point of class app (watch).',
  },
  'post-point': {
    kind: 'string',
    description: 'Shell command that lets the application go on after such a point (watch).',
  },
  'hook-limit': {
    kind: 'duration',
    description: 'Time that pre-point and post-point may take each (watch); default 30s.',
  },
} as const satisfies Readonly<Record<string, ConfigKey>>;

/** Settings of a watched device as a configuration file has them; absent ones were not given. */
export type WatchSettings = {
  readonly [K in keyof typeof WATCH_SETTINGS]?: KindTypes[(typeof WATCH_SETTINGS)[K]['kind']];
};

/** An entry of `watch.devices`. */
export interface WatchedDevice extends WatchSettings {
  readonly device: string;
  /** Name of the volume. */
  readonly volume?: string;
}

/**
 * Every key of a configuration file by its path ("a.b" is the key b of the mapping a). A new setting is a
 * line here; the type {@link Config}, validation and the man page follow.
 */
export const CONFIG_KEYS = {
  repository: {
    kind: 'string',
    description: 'URL of the repository: /path, file://, ssh:// or s3:.',
  },
  'password-file': {
    kind: 'path',
    description: 'File whose first line is the password of the repository.',
  },
  'password-command': {
    kind: 'string',
    description: 'Shell command that prints the password of the repository.',
  },
  'key-file': { kind: 'path', description: 'Key file that opens the repository.' },
  'cache-dir': {
    kind: 'path',
    description: 'Where the local catalogue is kept; it can be deleted at any time.',
  },
  'watch.devices': {
    kind: 'devices',
    description:
      'Devices that b2 watch captures if it is given none: a list of paths, or of mappings with device, volume and any of the other watch settings for that device alone.',
  },
  'watch.interval': WATCH_SETTINGS.interval,
  'watch.source': WATCH_SETTINGS.source,
  'watch.freeze': WATCH_SETTINGS.freeze,
  'watch.freeze-limit': WATCH_SETTINGS['freeze-limit'],
  'watch.freeze-after': WATCH_SETTINGS['freeze-after'],
  'watch.group': WATCH_SETTINGS.group,
  'watch.pre-point': WATCH_SETTINGS['pre-point'],
  'watch.post-point': WATCH_SETTINGS['post-point'],
  'watch.hook-limit': WATCH_SETTINGS['hook-limit'],
} as const satisfies Readonly<Record<string, ConfigKey>>;

interface KindTypes {
  readonly string: string;
  readonly path: string;
  readonly boolean: boolean;
  readonly size: number;
  readonly duration: number;
  readonly strings: readonly string[];
  readonly source: WatchSource;
  readonly freezing: WatchFreezing;
  readonly devices: readonly WatchedDevice[];
}

/** Validated contents of the configuration files, by key path; absent keys were not given. */
export type Config = {
  readonly [K in keyof typeof CONFIG_KEYS]?: KindTypes[(typeof CONFIG_KEYS)[K]['kind']];
};

type Environment = Readonly<Record<string, string | undefined>>;

function fail(path: string, message: string, hint?: string): B2Error {
  return new B2Error('config', `${path}: ${message}`, hint === undefined ? {} : { hint });
}

function kindName(value: unknown): string {
  if (value === null || value === undefined) return 'nothing';
  if (Array.isArray(value)) return 'a list';
  if (typeof value === 'object') return 'a mapping';
  return `the ${typeof value} ${printable(JSON.stringify(value) ?? '')}`;
}

/** A value of `kind`, or undefined where `value` is of another kind. Parsers throw RangeError. */
function readValue(kind: Exclude<ConfigKind, 'devices'>, value: unknown): unknown {
  switch (kind) {
    case 'source':
      return WATCH_SOURCES.find((source) => source === value);
    case 'freezing':
      return WATCH_FREEZING.find((freezing) => freezing === value);
    case 'string':
    case 'path':
      return typeof value === 'string' && value !== '' ? value : undefined;
    case 'boolean':
      return typeof value === 'boolean' ? value : undefined;
    case 'size':
      return typeof value === 'string' || typeof value === 'number'
        ? parseSize(String(value))
        : undefined;
    case 'duration':
      return typeof value === 'string' ? parseDurationMs(value) : undefined;
    case 'strings':
      return Array.isArray(value) && value.every((item) => typeof item === 'string')
        ? value
        : undefined;
  }
}

const KIND_TEXT: Readonly<Record<ConfigKind, string>> = {
  string: 'a text',
  path: 'a path',
  boolean: 'true or false',
  size: 'a size (64K, 1G)',
  duration: 'a duration (10s, 5m)',
  strings: 'a list of texts',
  source: `one of ${WATCH_SOURCES.join(', ')}`,
  freezing: `one of ${WATCH_FREEZING.join(', ')}`,
  devices: 'a list of devices',
};

/** Edits (insert, delete, replace) between two short words, for "did you mean". */
function distance(a: string, b: string): number {
  let row = Array.from({ length: b.length + 1 }, (_, i) => i);
  for (let i = 1; i <= a.length; i += 1) {
    const next = [i];
    for (let j = 1; j <= b.length; j += 1) {
      const same = a[i - 1] === b[j - 1] ? 0 : 1;
      next.push(Math.min((row[j] ?? 0) + 1, (next[j - 1] ?? 0) + 1, (row[j - 1] ?? 0) + same));
    }
    row = next;
  }
  return row[b.length] ?? 0;
}

function unknownKey(
  path: string,
  keyPath: string,
  keys: readonly string[] = Object.keys(CONFIG_KEYS),
): B2Error {
  const near = keys.find((key) => distance(key, keyPath.replaceAll('_', '-')) <= 2);
  return fail(
    path,
    `unknown key "${printable(keyPath)}"`,
    near === undefined ? `Known keys: ${keys.join(', ')}.` : `Did you mean "${near}"?`,
  );
}

/** As {@link readValue}, but throws a B2Error that names the key. */
function readKey(
  path: string,
  keyPath: string,
  kind: Exclude<ConfigKind, 'devices'>,
  value: unknown,
): unknown {
  let read: unknown;
  try {
    read = readValue(kind, value);
  } catch (error) {
    if (!(error instanceof RangeError)) throw error;
    throw fail(path, `"${keyPath}": ${error.message}`);
  }
  if (read === undefined)
    throw fail(path, `"${keyPath}" must be ${KIND_TEXT[kind]}, not ${kindName(value)}`);
  return read;
}

const DEVICE_KEYS: Readonly<Record<string, Exclude<ConfigKind, 'devices'>>> = {
  device: 'path',
  volume: 'string',
  ...Object.fromEntries(Object.entries(WATCH_SETTINGS).map(([name, { kind }]) => [name, kind])),
};

function readDevices(path: string, keyPath: string, value: unknown): readonly WatchedDevice[] {
  if (!Array.isArray(value))
    throw fail(path, `"${keyPath}" must be ${KIND_TEXT.devices}, not ${kindName(value)}`);
  const devices: WatchedDevice[] = [];
  for (const [i, item] of (value as readonly unknown[]).entries()) {
    const itemPath = `${keyPath}[${i}]`;
    const found: Record<string, unknown> = {};
    if (typeof item === 'object' && item !== null && !Array.isArray(item)) {
      for (const [key, child] of Object.entries(item)) {
        const kind = Object.hasOwn(DEVICE_KEYS, key) ? DEVICE_KEYS[key] : undefined;
        const names = Object.keys(DEVICE_KEYS).map((name) => `${itemPath}.${name}`);
        if (kind === undefined) throw unknownKey(path, `${itemPath}.${key}`, names);
        found[key] = readKey(path, `${itemPath}.${key}`, kind, child);
      }
    } else {
      found['device'] = readKey(path, itemPath, 'path', item);
    }
    const { device } = found;
    if (typeof device !== 'string') throw fail(path, `"${itemPath}" names no device`);
    if (devices.some((d) => d.device === device))
      throw fail(path, `"${itemPath}": ${printable(device)} is in the list twice`);
    devices.push({ ...found, device });
  }
  return devices;
}

/**
 * Parses and validates one file's text. `path` is used in messages only. An empty file is valid.
 * Throws B2Error `config` for malformed YAML, unknown keys and values of the wrong kind.
 */
export async function parseConfig(text: string, path: string): Promise<Config> {
  if (text.trim() === '') return {};
  // Loaded only when there is a file: most starts have none, and the parser costs them 15 ms.
  const { parse: parseYaml, YAMLParseError } = await import('yaml');
  let document: unknown;
  try {
    document = parseYaml(text);
  } catch (error) {
    if (!(error instanceof YAMLParseError)) throw error;
    const line = error.linePos?.[0].line;
    const where = line === undefined ? path : `${path}:${line}`;
    throw fail(where, `not valid YAML: ${error.message.split('\n', 1)[0] ?? ''}`);
  }
  const found: Record<string, unknown> = {};
  const known: Readonly<Record<string, ConfigKey>> = CONFIG_KEYS;
  const visit = (value: unknown, prefix: string): void => {
    if (typeof value !== 'object' || value === null || Array.isArray(value)) {
      throw fail(
        path,
        `${prefix === '' ? 'the file' : `"${prefix}"`} must be a mapping, not ${kindName(value)}`,
      );
    }
    for (const [key, child] of Object.entries(value)) {
      const keyPath = prefix === '' ? key : `${prefix}.${key}`;
      const spec = Object.hasOwn(known, keyPath) ? known[keyPath] : undefined;
      if (spec === undefined) {
        const isGroup = Object.keys(known).some((name) => name.startsWith(`${keyPath}.`));
        if (!isGroup) throw unknownKey(path, keyPath);
        visit(child, keyPath);
        continue;
      }
      found[keyPath] =
        spec.kind === 'devices'
          ? readDevices(path, keyPath, child)
          : readKey(path, keyPath, spec.kind, child);
    }
  };
  if (document !== null && document !== undefined) visit(document, '');
  return found;
}

export interface ConfigSources {
  /** Value of `--config`. */
  readonly option?: string | undefined;
  readonly env: Environment;
  readonly homeDir: string;
  /** Where the machine-wide file lies; `/etc/b2/config.yaml` outside tests. */
  readonly systemFile?: string;
}

const SYSTEM_FILE = '/etc/b2/config.yaml';

/** `$NAME` if it is set to an absolute path (as the XDG specification demands), else `fallback`. */
function xdgDir(env: Environment, name: string, fallback: string): string {
  const value = env[name];
  return value !== undefined && value.startsWith('/') ? value : fallback;
}

/**
 * Reads the configuration: the one file named by `--config` or `B2_CONFIG` (which must exist), else
 * /etc/b2/config.yaml and then $XDG_CONFIG_HOME/b2/config.yaml over it, each only if it exists.
 */
export async function loadConfig(sources: ConfigSources): Promise<Config> {
  const { env, homeDir } = sources;
  const named = sources.option ?? (env['B2_CONFIG'] === '' ? undefined : env['B2_CONFIG']);
  const files =
    named !== undefined
      ? [named]
      : [
          sources.systemFile ?? SYSTEM_FILE,
          join(xdgDir(env, 'XDG_CONFIG_HOME', join(homeDir, '.config')), 'b2', 'config.yaml'),
        ];
  let config: Config = {};
  for (const file of files) {
    let text: string;
    try {
      text = readFileSync(file, 'utf8');
    } catch (error) {
      const errno = errnoOf(error);
      if (named === undefined && (errno === 'ENOENT' || errno === 'ENOTDIR')) continue;
      const cause = ioError('cannot read the configuration file', file, error);
      throw new B2Error('config', cause.message, { cause: error });
    }
    config = { ...config, ...(await parseConfig(text, file)) };
  }
  return config;
}

/** Where a setting's value came from, for messages. */
export type Origin = 'option' | 'environment' | 'config' | 'default';

export interface Credentials {
  readonly origin: Origin;
  readonly passwordFile?: string;
  readonly passwordCommand?: string;
  readonly keyFile?: string;
}

/** What every command shares, resolved. */
export interface Settings {
  readonly repository: { readonly url: string; readonly origin: Origin };
  /** Absolute path of the directory for local caches. */
  readonly cacheDir: string;
  /**
   * Where the password or key comes from: all of the highest-ranking source that names any, never a
   * mixture. `B2_PASSWORD` itself is left in the environment for src/repo/keys.ts; where it is set,
   * `origin` is `environment` and the configuration file's places are not used.
   */
  readonly credentials: Credentials;
}

export interface SettingsInput {
  readonly options: {
    readonly repo?: string | undefined;
    readonly passwordFile?: string | undefined;
    readonly keyFile?: string | undefined;
  };
  readonly env: Environment;
  readonly config: Config;
  readonly homeDir: string;
  readonly isRoot: boolean;
}

function pick(
  origin: Origin,
  passwordFile: string | undefined,
  passwordCommand: string | undefined,
  keyFile: string | undefined,
): Credentials | undefined {
  const given = (text: string | undefined): text is string => text !== undefined && text !== '';
  if (!given(passwordFile) && !given(passwordCommand) && !given(keyFile)) return undefined;
  return {
    origin,
    ...(given(passwordFile) ? { passwordFile } : {}),
    ...(given(passwordCommand) ? { passwordCommand } : {}),
    ...(given(keyFile) ? { keyFile } : {}),
  };
}

/** Applies the precedence option, environment, configuration file, embedded default. Reads nothing. */
export function resolveSettings(input: SettingsInput): Settings {
  const { options, env, config, homeDir, isRoot } = input;
  const fromEnv = (name: string): string | undefined => (env[name] === '' ? undefined : env[name]);
  const candidates: readonly (readonly [Origin, string | undefined])[] = [
    ['option', options.repo],
    ['environment', fromEnv('B2_REPOSITORY')],
    ['config', config.repository],
  ];
  let repository: Settings['repository'] | undefined;
  for (const [origin, url] of candidates) {
    if (url === undefined) continue;
    if (url.trim() === '')
      throw new B2Error('usage', 'the repository URL is empty', { hint: 'See --repo in b2(1).' });
    repository = { url, origin };
    break;
  }
  repository ??= {
    url: isRoot
      ? '/var/lib/b2/repo'
      : join(xdgDir(env, 'XDG_DATA_HOME', join(homeDir, '.local', 'share')), 'b2', 'repo'),
    origin: 'default',
  };
  const credentials = pick('option', options.passwordFile, undefined, options.keyFile) ??
    pick('environment', env['B2_PASSWORD_FILE'], env['B2_PASSWORD_COMMAND'], env['B2_KEY_FILE']) ??
    (fromEnv('B2_PASSWORD') === undefined
      ? pick('config', config['password-file'], config['password-command'], config['key-file'])
      : { origin: 'environment' as const }) ?? { origin: 'default' as const };
  return {
    repository,
    cacheDir:
      fromEnv('B2_CACHE_DIR') ??
      config['cache-dir'] ??
      (isRoot && env['XDG_CACHE_HOME'] === undefined
        ? '/var/cache/b2'
        : join(xdgDir(env, 'XDG_CACHE_HOME', join(homeDir, '.cache')), 'b2')),
    credentials,
  };
}
