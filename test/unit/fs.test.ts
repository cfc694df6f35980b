import { mkdir, readFile, readdir, stat, symlink, writeFile } from 'node:fs/promises';
import { afterEach, beforeEach, expect, test } from 'vitest';
import {
  DirectorySyncs,
  DurableFile,
  isTemporaryName,
  mkdirDurable,
  readIfExists,
  renameNoReplace,
  systemFileCalls,
  temporaryName,
  writeFileDurable,
} from '../../src/fs.js';
import { checkName } from '../../src/repo/store.js';
import { type TempDir, tempDir } from '../support/tmp.js';

let dir: TempDir;
beforeEach(() => {
  dir = tempDir();
});
afterEach(() => dir.remove());

test('writeFileDurable makes and replaces a private file, and leaves nothing else', async () => {
  const file = dir.join('state');
  await writeFileDurable(file, Buffer.from('one'));
  await writeFileDurable(file, Buffer.from('two'));
  expect(await readFile(file, 'utf8')).toBe('two');
  expect((await stat(file)).mode & 0o777).toBe(0o600);
  await writeFileDurable(dir.join('public'), Buffer.from('x'), { mode: 0o644 });
  expect((await stat(dir.join('public'))).mode & 0o777).toBe(0o644);
  expect((await readdir(dir.path)).sort()).toEqual(['public', 'state']);
});

test('writeFileDurable replaces a symbolic link, not what it points to', async () => {
  await writeFile(dir.join('target'), 'target');
  await symlink(dir.join('target'), dir.join('link'));
  await writeFileDurable(dir.join('link'), Buffer.from('new'));
  expect(await readFile(dir.join('target'), 'utf8')).toBe('target');
  expect(await readFile(dir.join('link'), 'utf8')).toBe('new');
});

test('writeFileDurable names the file in its errors', async () => {
  const file = dir.join('no/such/file');
  await expect(writeFileDurable(file, Buffer.from('x'))).rejects.toMatchObject({
    name: 'B2Error',
    kind: 'not-found',
    message: expect.stringContaining(file) as string,
  });
  await writeFileDurable(dir.join('there'), Buffer.from('x'));
  await expect(
    writeFileDurable(dir.join('there'), Buffer.from('y'), { ifAbsent: true }),
  ).rejects.toMatchObject({ kind: 'exists' });
  expect(await readdir(dir.path)).toEqual(['there']);
});

test('a DurableFile that is abandoned leaves nothing; a committed one stays', async () => {
  const given = await DurableFile.begin(dir.join('a'));
  await given.write(Buffer.from('x'));
  expect((await readdir(dir.path)).every(isTemporaryName)).toBe(true);
  await given.abandon();
  await given.abandon();
  expect(await readdir(dir.path)).toEqual([]);
  const kept = await DurableFile.begin(dir.join('b'));
  await kept.write(Buffer.from('x'));
  await kept.write(Buffer.from('y'));
  await kept.commit();
  await kept.abandon();
  expect(await readFile(dir.join('b'), 'utf8')).toBe('xy');
});

test('mkdirDurable makes parents, and accepts what is there', async () => {
  await mkdirDurable(dir.join('a/b/c'));
  await mkdirDurable(dir.join('a/b/c'));
  expect((await stat(dir.join('a/b'))).mode & 0o777).toBe(0o700);
  await writeFile(dir.join('file'), 'x');
  await expect(mkdirDurable(dir.join('file'))).rejects.toMatchObject({ kind: 'io' });
  await expect(mkdirDurable(dir.join('file/below'))).rejects.toMatchObject({ name: 'B2Error' });
});

test('mkdirDurable ends where making the parent does not help: behind a link to nothing, below /proc', async () => {
  await symlink(dir.join('unmounted'), dir.join('link'));
  for (const name of ['link', 'link/a', 'link/a/b'])
    await expect(mkdirDurable(dir.join(name))).rejects.toMatchObject({
      kind: 'io',
      message: `${dir.join('link')} is a symbolic link to what is not there`,
      hint: 'Is the disk mounted that it leads to?',
    });
  await mkdir(dir.join('unmounted'));
  await mkdirDurable(dir.join('link/a/b'));
  expect((await stat(dir.join('unmounted/a/b'))).isDirectory()).toBe(true);
  await expect(mkdirDurable('/proc/nobody/nothing')).rejects.toMatchObject({ name: 'B2Error' });
});

test('readIfExists tells missing from unreadable', async () => {
  await writeFile(dir.join('file'), 'x');
  expect(String(await readIfExists(dir.join('file')))).toBe('x');
  expect(await readIfExists(dir.join('none'))).toBeUndefined();
  expect(await readIfExists(dir.join('file/below'))).toBeUndefined();
  await mkdir(dir.join('dir'));
  await expect(readIfExists(dir.join('dir'))).rejects.toMatchObject({ kind: 'io' });
});

test('renameNoReplace renames, and refuses a name that is taken', async () => {
  await writeFile(dir.join('a'), 'a');
  await writeFile(dir.join('b'), 'b');
  await expect(renameNoReplace(dir.join('a'), dir.join('b'))).rejects.toMatchObject({
    code: 'EEXIST',
  });
  await expect(renameNoReplace(dir.join('none'), dir.join('c'))).rejects.toMatchObject({
    code: 'ENOENT',
  });
  await renameNoReplace(dir.join('a'), dir.join('c'));
  expect((await readdir(dir.path)).sort()).toEqual(['b', 'c']);
});

test('DirectorySyncs serves a caller with a sync that began after it asked', async () => {
  let begun = 0;
  const waiting: (() => void)[] = [];
  const syncs = new DirectorySyncs({
    ...systemFileCalls,
    async fsync() {
      begun++;
      await new Promise<void>((resolve) => waiting.push(resolve));
    },
  });
  const turn = (): Promise<void> => new Promise((resolve) => setTimeout(resolve, 20));
  const first = syncs.sync(dir.path);
  await turn();
  const second = syncs.sync(dir.path);
  const third = syncs.sync(dir.path);
  await turn();
  expect(begun).toBe(1);
  waiting.shift()?.();
  await first;
  await turn();
  expect(begun).toBe(2);
  waiting.shift()?.();
  await Promise.all([second, third]);
  expect(begun).toBe(2);
});

test('temporary names differ, and are never names of objects', () => {
  const names = new Set(Array.from({ length: 100 }, () => temporaryName()));
  expect(names.size).toBe(100);
  for (const name of names) {
    expect(isTemporaryName(name)).toBe(true);
    expect(() => checkName(name)).toThrow(TypeError);
  }
  expect(isTemporaryName('config')).toBe(false);
});
