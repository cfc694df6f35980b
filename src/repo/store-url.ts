/**
 * Repository URLs (cli.md): `/path`, `file:///path`, `ssh://[user@]host[:port]/path`,
 * `s3:https://endpoint/bucket[/prefix]`. A URL never carries a password or key: it is shown, logged and stored.
 */
import path from 'node:path';
import { fileURLToPath } from 'node:url';
import { B2Error } from '../errors.js';
import { openDirectoryStore } from './store-directory.js';
import { checkName, type Store } from './store.js';

export type RepositoryUrl =
  | { readonly scheme: 'directory'; readonly path: string }
  | {
      readonly scheme: 'ssh';
      readonly user: string | undefined;
      readonly host: string;
      readonly port: number | undefined;
      readonly path: string;
    }
  | {
      readonly scheme: 's3';
      /** Origin, without a trailing slash. */
      readonly endpoint: string;
      readonly bucket: string;
      /** Whole segments without slashes at the ends; '' for none. */
      readonly prefix: string;
    };

const FORMS =
  'Repository URLs: /path, file:///path, ssh://[user@]host[:port]/path, s3:https://endpoint/bucket[/prefix]';

function malformed(text: string, why: string): B2Error {
  return new B2Error('usage', `not a repository URL: ${text}: ${why}`, { hint: FORMS });
}

/** The text with anything between `//` and `@` cut out, for error messages: it may hold a password. */
function withoutUserInfo(text: string): string {
  return text.replace(/\/\/[^/]*@/, '//…@');
}

function parseUrl(text: string, shown: string): URL {
  let url: URL;
  try {
    url = new URL(text);
  } catch {
    throw malformed(shown, 'it cannot be parsed');
  }
  if (url.password !== '') {
    throw malformed(shown, 'a password does not belong in it');
  }
  if (url.search !== '' || url.hash !== '') throw malformed(shown, 'it has a query or fragment');
  return url;
}

function decodePath(url: URL, shown: string): string {
  let decoded: string;
  try {
    decoded = decodeURIComponent(url.pathname);
  } catch {
    throw malformed(shown, 'its path has a bad % escape');
  }
  if (decoded.includes('\0')) throw malformed(shown, 'its path has a NUL character');
  return decoded;
}

/**
 * Parses a repository URL. Text without a scheme is a path, relative ones from the current directory. Rejects bad
 * ones with kind `usage`, never repeating a password that was in it.
 */
export function parseRepositoryUrl(text: string): RepositoryUrl {
  if (text === '') throw malformed('""', 'it is empty');
  if (text.includes('\0')) throw malformed(JSON.stringify(text), 'it has a NUL character');
  const scheme = /^([a-z][a-z0-9+.-]*):/i.exec(text)?.[1]?.toLowerCase();
  if (scheme === undefined) return { scheme: 'directory', path: path.resolve(text) };
  const shown = withoutUserInfo(text);
  switch (scheme) {
    case 'file': {
      const url = parseUrl(text, shown);
      // `file:repo` would silently become /repo.
      if (!/^file:\/\//i.test(text)) throw malformed(shown, 'write file:///path');
      if (url.host !== '') throw malformed(shown, 'a file URL names no host: write file:///path');
      try {
        return { scheme: 'directory', path: fileURLToPath(url) };
      } catch {
        throw malformed(shown, 'its path has a bad % escape');
      }
    }
    case 'ssh': {
      const url = parseUrl(text, shown);
      const directory = decodePath(url, shown);
      if (!/^ssh:\/\//i.test(text) || url.hostname === '') throw malformed(shown, 'no host');
      // A host or user that begins with a dash would be an option to ssh(1).
      const user = url.username === '' ? undefined : decodeURIComponent(url.username);
      if (url.hostname.startsWith('-') || user?.startsWith('-') === true) {
        throw malformed(shown, 'user and host cannot begin with a dash');
      }
      if (directory === '' || directory === '/') throw malformed(shown, 'no path');
      return {
        scheme: 'ssh',
        user,
        host: url.hostname.replace(/^\[(.*)\]$/, '$1'),
        port: url.port === '' ? undefined : Number(url.port),
        path: directory,
      };
    }
    case 's3': {
      const inner = text.slice('s3:'.length);
      if (!/^https?:\/\//i.test(inner)) {
        throw malformed(shown, 'an endpoint follows s3:, as in s3:https://endpoint/bucket');
      }
      const url = parseUrl(inner, shown);
      if (url.username !== '') {
        throw malformed(shown, 'keys do not belong in it; set AWS_ACCESS_KEY_ID and its secret');
      }
      const [bucket, ...rest] = decodePath(url, shown)
        .replace(/^\/+|\/+$/g, '')
        .split('/');
      if (bucket === undefined || bucket === '') throw malformed(shown, 'no bucket');
      const prefix = rest.join('/');
      try {
        if (prefix !== '') checkName(prefix);
      } catch {
        throw malformed(
          shown,
          'its prefix may have letters, digits, ".", "_" and "-" between slashes',
        );
      }
      return { scheme: 's3', endpoint: url.origin, bucket, prefix };
    }
    default:
      throw malformed(shown, `unknown scheme ${scheme}:`);
  }
}

/** The URL as a person would write it; `parseRepositoryUrl` reads it back. */
export function formatRepositoryUrl(url: RepositoryUrl): string {
  switch (url.scheme) {
    case 'directory':
      return url.path;
    case 'ssh': {
      const user = url.user === undefined ? '' : `${encodeURIComponent(url.user)}@`;
      const host = url.host.includes(':') ? `[${url.host}]` : url.host;
      const port = url.port === undefined ? '' : `:${url.port}`;
      const directory = url.path.split('/').map(encodeURIComponent).join('/');
      return `ssh://${user}${host}${port}${directory}`;
    }
    case 's3':
      return `s3:${url.endpoint}/${url.bucket}${url.prefix === '' ? '' : `/${url.prefix}`}`;
  }
}

export interface OpenStoreOptions {
  /** Make the place if it is missing (`b2 init`). Otherwise that is kind `no-repository`. */
  readonly create?: boolean;
}

/**
 * Opens the store that a URL names. B2Error: `usage` for a bad URL, `unsupported` for ssh and s3, `no-repository`,
 * `io`.
 */
export async function openStore(
  url: string | RepositoryUrl,
  options: OpenStoreOptions = {},
): Promise<Store> {
  const parsed = typeof url === 'string' ? parseRepositoryUrl(url) : url;
  switch (parsed.scheme) {
    case 'directory':
      return openDirectoryStore(parsed.path, options);
    case 'ssh':
    case 's3':
      throw new B2Error(
        'unsupported',
        `${formatRepositoryUrl(parsed)}: repositories over ${parsed.scheme} are not in this version yet`,
        { hint: 'Use a local or mounted directory, for example one mounted with NFS or sshfs.' },
      );
  }
}
