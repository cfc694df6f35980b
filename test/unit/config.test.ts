import { chmodSync, mkdirSync, writeFileSync } from 'node:fs';
import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import { loadConfig, parseConfig, resolveSettings, type SettingsInput } from '../../src/config.js';
import { B2Error } from '../../src/errors.js';
import { tempDir, type TempDir } from '../support/tmp.js';

describe('parseConfig', () => {
  it('reads every kind of key', async () => {
    const text = 'repository: /srv/b2\npassword-file: /etc/b2/password\ncache-dir: /var/cache/x\n';
    expect(await parseConfig(text, 'c.yaml')).toEqual({
      repository: '/srv/b2',
      'password-file': '/etc/b2/password',
      'cache-dir': '/var/cache/x',
    });
    expect(await parseConfig('', 'c.yaml')).toEqual({});
    expect(await parseConfig('# nothing\n', 'c.yaml')).toEqual({});
  });

  it.each([
    ['repo: /x', /c\.yaml: unknown key "repo"/],
    ['password_file: /x', /unknown key "password_file"/],
    ['password: secret', /unknown key "password"/],
    ['repository: {url: /x}', /"repository" must be a text, not a mapping/],
    ['repository: [a]', /"repository" must be a text, not a list/],
    ['repository: 5', /"repository" must be a text, not the number 5/],
    ['repository: ""', /"repository" must be a text/],
    ['repository:', /"repository" must be a text, not nothing/],
    ['- a', /the file must be a mapping, not a list/],
    ['just words', /the file must be a mapping/],
    ['repository: /x\nrepository: /y', /c\.yaml:2: not valid YAML/],
    ['a: [', /not valid YAML/],
    ['__proto__: {x: 1}', /unknown key "__proto__"/],
    ['constructor: 1', /unknown key "constructor"/],
  ])('refuses %j', async (text, message) => {
    const error: unknown = await parseConfig(text, 'c.yaml').catch((e: unknown) => e);
    expect(error).toBeInstanceOf(B2Error);
    expect(error).toMatchObject({
      kind: 'config',
      code: 2,
      message: expect.stringMatching(message),
    });
  });

  it('reads the settings of watch', async () => {
    const text = `
watch:
  interval: 500ms
  source: trace
  freeze-limit: 0s
  devices:
    - /dev/sda
    - {device: /dev/sdb, volume: web/data, interval: 5s, pre-point: 'psql -c x', hook-limit: 1m}
`;
    expect(await parseConfig(text, 'c.yaml')).toEqual({
      'watch.interval': 500,
      'watch.source': 'trace',
      'watch.freeze-limit': 0,
      'watch.devices': [
        { device: '/dev/sda' },
        {
          device: '/dev/sdb',
          volume: 'web/data',
          interval: 5000,
          'pre-point': 'psql -c x',
          'hook-limit': 60_000,
        },
      ],
    });
  });

  it.each([
    ['watch: 5', /"watch" must be a mapping, not the number 5/],
    ['watch: {intervall: 1s}', /unknown key "watch.intervall"/],
    ['watch: {interval: 5}', /"watch.interval" must be a duration/],
    ['watch: {interval: fast}', /"watch.interval": "fast" is not a duration/],
    ['watch: {source: nbd}', /"watch.source" must be one of auto, trace, scan, not the string/],
    ['watch: {devices: /dev/sda}', /"watch.devices" must be a list of devices, not the string/],
    ['watch: {devices: [5]}', /"watch.devices\[0\]" must be a path, not the number 5/],
    ['watch: {devices: [{volume: v}]}', /"watch.devices\[0\]" names no device/],
    ['watch: {devices: [/a, {device: /a}]}', /"watch.devices\[1\]": \/a is in the list twice/],
    ['watch: {devices: [{device: /a, hook: x}]}', /unknown key "watch.devices\[0\].hook"/],
    ['watch: {devices: [{device: /a, interval: 1}]}', /"watch.devices\[0\].interval" must be/],
    [
      'watch: {devices: [{device: /a, __proto__: {}}]}',
      /unknown key "watch.devices\[0\].__proto__"/,
    ],
  ])('refuses %j', async (text, message) => {
    const error: unknown = await parseConfig(text, 'c.yaml').catch((e: unknown) => e);
    expect(error).toMatchObject({ kind: 'config', message: expect.stringMatching(message) });
  });

  it('suggests the key that was meant', async () => {
    await expect(parseConfig('password_file: /x', 'c')).rejects.toMatchObject({
      hint: 'Did you mean "password-file"?',
    });
  });

  it('does not show a secret that stands under a wrong key', async () => {
    const error: unknown = await parseConfig('password: hunter2', 'c').catch((e: unknown) => e);
    expect(JSON.stringify(error) + String(error)).not.toContain('hunter2');
  });
});

describe('loadConfig', () => {
  let dir: TempDir;
  beforeEach(() => {
    dir = tempDir();
    mkdirSync(dir.join('home/.config/b2'), { recursive: true });
  });
  afterEach(() => dir.remove());

  const load = (env: Record<string, string> = {}, option?: string) =>
    loadConfig({ option, env, homeDir: dir.join('home'), systemFile: dir.join('system.yaml') });

  it('is empty without files', async () => {
    expect(await load()).toEqual({});
  });

  it("takes the user's keys over the machine's", async () => {
    writeFileSync(dir.join('system.yaml'), 'repository: /a\nkey-file: /k\n');
    writeFileSync(dir.join('home/.config/b2/config.yaml'), 'repository: /b\n');
    expect(await load()).toEqual({ repository: '/b', 'key-file': '/k' });
  });

  it('reads only the file that was named, by option before environment', async () => {
    writeFileSync(dir.join('system.yaml'), 'key-file: /k\n');
    writeFileSync(dir.join('one.yaml'), 'repository: /one\n');
    writeFileSync(dir.join('two.yaml'), 'repository: /two\n');
    expect(await load({ B2_CONFIG: dir.join('one.yaml') })).toEqual({ repository: '/one' });
    expect(await load({ B2_CONFIG: dir.join('one.yaml') }, dir.join('two.yaml'))).toEqual({
      repository: '/two',
    });
  });

  it('fails when the named file is not there or is no file', async () => {
    await expect(load({}, dir.join('none.yaml'))).rejects.toMatchObject({
      kind: 'config',
      message: expect.stringContaining(dir.join('none.yaml')),
    });
    chmodSync(dir.path, 0o700);
    await expect(load({}, dir.path)).rejects.toMatchObject({ kind: 'config' });
  });
});

describe('resolveSettings', () => {
  const base: SettingsInput = {
    options: {},
    env: {},
    config: {},
    homeDir: '/home/u',
    isRoot: false,
  };

  it('goes by option, environment, file, default', () => {
    const config = { repository: '/from-file' };
    const env = { B2_REPOSITORY: '/from-env' };
    const get = (input: Partial<SettingsInput>) =>
      resolveSettings({ ...base, ...input }).repository;
    expect(get({ options: { repo: '/o' }, env, config })).toEqual({ url: '/o', origin: 'option' });
    expect(get({ env, config })).toEqual({ url: '/from-env', origin: 'environment' });
    expect(get({ env: { B2_REPOSITORY: '' }, config })).toEqual({
      url: '/from-file',
      origin: 'config',
    });
    expect(get({})).toEqual({ url: '/home/u/.local/share/b2/repo', origin: 'default' });
    expect(get({ env: { XDG_DATA_HOME: '/d' } }).url).toBe('/d/b2/repo');
    expect(get({ env: { XDG_DATA_HOME: 'relative' } }).url).toBe('/home/u/.local/share/b2/repo');
    expect(get({ isRoot: true }).url).toBe('/var/lib/b2/repo');
    expect(() => get({ options: { repo: ' ' } })).toThrow(B2Error);
  });

  it('never mixes credentials of two sources', () => {
    const config = { 'key-file': '/file/key', 'password-command': 'pass b2' };
    const get = (input: Partial<SettingsInput>) =>
      resolveSettings({ ...base, config, ...input }).credentials;
    expect(get({ options: { keyFile: '/k' }, env: { B2_PASSWORD_FILE: '/p' } })).toEqual({
      origin: 'option',
      keyFile: '/k',
    });
    expect(get({ env: { B2_PASSWORD_FILE: '/p' } })).toEqual({
      origin: 'environment',
      passwordFile: '/p',
    });
    expect(get({ env: { B2_PASSWORD: 'x' } })).toEqual({ origin: 'environment' });
    expect(get({})).toEqual({ origin: 'config', keyFile: '/file/key', passwordCommand: 'pass b2' });
    expect(get({ config: {} })).toEqual({ origin: 'default' });
  });

  it('keeps the cache where the user or the machine keeps caches', () => {
    const get = (input: Partial<SettingsInput>) => resolveSettings({ ...base, ...input }).cacheDir;
    expect(get({})).toBe('/home/u/.cache/b2');
    expect(get({ isRoot: true })).toBe('/var/cache/b2');
    expect(get({ env: { XDG_CACHE_HOME: '/c' } })).toBe('/c/b2');
    expect(get({ config: { 'cache-dir': '/x' } })).toBe('/x');
    expect(get({ env: { B2_CACHE_DIR: '/e' }, config: { 'cache-dir': '/x' } })).toBe('/e');
  });
});
