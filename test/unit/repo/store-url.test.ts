import { afterEach, beforeEach, describe, expect, test } from 'vitest';
import { messageOf } from '../../../src/errors.js';
import { formatRepositoryUrl, openStore, parseRepositoryUrl } from '../../../src/repo/store-url.js';
import { type TempDir, tempDir } from '../../support/tmp.js';

describe('parseRepositoryUrl', () => {
  const ssh = { scheme: 'ssh', user: undefined, port: undefined };
  test.each([
    ['/var/lib/b2/repo', { scheme: 'directory', path: '/var/lib/b2/repo' }],
    ['/a/../b/', { scheme: 'directory', path: '/b' }],
    ['file:///srv/my%20repo', { scheme: 'directory', path: '/srv/my repo' }],
    ['ssh://backup/srv/b2', { ...ssh, host: 'backup', path: '/srv/b2' }],
    [
      'ssh://me@host.example:2222/b2',
      { scheme: 'ssh', user: 'me', host: 'host.example', port: 2222, path: '/b2' },
    ],
    ['ssh://[fe80::1]:22/b2', { ...ssh, host: 'fe80::1', port: 22, path: '/b2' }],
    [
      's3:https://s3.example.com/bucket',
      { scheme: 's3', endpoint: 'https://s3.example.com', bucket: 'bucket', prefix: '' },
    ],
    [
      's3:http://127.0.0.1:7480/b/hosts/web1/',
      { scheme: 's3', endpoint: 'http://127.0.0.1:7480', bucket: 'b', prefix: 'hosts/web1' },
    ],
  ])('%s', (text, expected) => {
    const parsed = parseRepositoryUrl(text);
    expect(parsed).toEqual(expected);
    expect(parseRepositoryUrl(formatRepositoryUrl(parsed))).toEqual(parsed);
  });

  test('a relative path is from the current directory', () => {
    expect(parseRepositoryUrl('some/repo')).toEqual({
      scheme: 'directory',
      path: `${process.cwd()}/some/repo`,
    });
  });

  test.each([
    '',
    'a\0b',
    'file:repo',
    'file://host/path',
    'ssh:host/path',
    'ssh://host',
    'ssh://host/',
    'ssh:///path',
    'ssh://-oProxyCommand=x/path',
    'ssh://-l@host/path',
    'ssh://host:99999/path',
    's3:bucket',
    's3:https://endpoint',
    's3:https://endpoint/',
    's3:https://endpoint/b/a b',
    's3:https://endpoint/bucket?x=1',
    'b2:bucket',
    'sftp://host/path',
  ])('refuses %j', (text) => {
    expect(() => parseRepositoryUrl(text)).toThrow(
      expect.objectContaining({ name: 'B2Error', kind: 'usage', code: 2 }) as Error,
    );
  });

  test.each([
    'ssh://me:hunter2@host/path',
    's3:https://hunter2@endpoint/bucket',
    's3:https://key:hunter2@endpoint/bucket',
    'ftp://me:hunter2@host/path',
    'ssh://me:hunter2@host:99999/path',
  ])('refuses a secret in a URL without repeating it: %j', (text) => {
    let message = '';
    try {
      parseRepositoryUrl(text);
    } catch (error) {
      message = messageOf(error);
    }
    expect(message).toMatch(/not a repository URL/);
    expect(message).not.toContain('hunter2');
  });
});

describe('openStore', () => {
  let dir: TempDir;
  beforeEach(() => {
    dir = tempDir();
  });
  afterEach(() => dir.remove());

  test('opens a directory, making it if asked', async () => {
    const url = `file://${dir.join('repo')}`;
    await expect(openStore(url)).rejects.toMatchObject({ kind: 'no-repository' });
    const store = await openStore(url, { create: true });
    expect(store.url).toBe(dir.join('repo'));
    await store.put('config', Buffer.from('x'));
    await store.close();
    const again = await openStore(dir.join('repo'));
    expect(String(await again.get('config'))).toBe('x');
    await again.close();
  });

  test.each(['ssh://host/path', 's3:https://endpoint/bucket'])(
    '%s is not supported yet',
    async (url) => {
      await expect(openStore(url, { create: true })).rejects.toMatchObject({
        kind: 'unsupported',
        message: expect.stringContaining('not in this version yet') as string,
        hint: expect.any(String) as string,
      });
    },
  );
});
