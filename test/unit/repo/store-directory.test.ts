import { spawn } from 'node:child_process';
import fs from 'node:fs';
import {
  cp,
  lstat,
  mkdir,
  mkdtemp,
  readdir,
  rename,
  rm,
  stat,
  symlink,
  utimes,
  writeFile,
} from 'node:fs/promises';
import { tmpdir } from 'node:os';
import path from 'node:path';
import { afterEach, beforeEach, describe, expect, test } from 'vitest';
import { B2Error } from '../../../src/errors.js';
import { encodeConfig } from '../../../src/format/config.js';
import { type FileCalls, systemFileCalls, temporaryName } from '../../../src/fs.js';
import { alignedMemory } from '../../../src/memory.js';
import { currentIdentity } from '../../../src/process-identity.js';
import { openDirectoryStore } from '../../../src/repo/store-directory.js';
import type { ObjectInfo, Store } from '../../../src/repo/store.js';
import { compileForChild } from '../../support/compile.js';
import { FaultStore } from '../../support/store-fault.js';
import { patterned, type StoreFixture, storeSuite } from '../../support/store-suite.js';
import { memoryDir } from '../../support/tmp.js';

/** Shows a store as one that cannot append. */
function hidingAppend(store: Store): Store {
  return {
    url: store.url,
    canAppend: false,
    put: (name, data, options) => store.put(name, data, options),
    putStream: (name, parts) => store.putStream(name, parts),
    get: (name, range) => store.get(name, range),
    open: (name) => store.open(name),
    stat: (name) => store.stat(name),
    list: (prefix) => store.list(prefix),
    delete: (name) => store.delete(name),
    openAppend: () => Promise.reject(new B2Error('unsupported', 'this store cannot append')),
    space: () => store.space(),
    close: () => store.close(),
  };
}

function directorySuite(
  title: string,
  parent: string,
  wrap: (store: Store) => Store,
  append = true,
): void {
  const make = async (): Promise<StoreFixture> => {
    const directory = await mkdtemp(path.join(parent, 'b2-store-'));
    const root = path.join(directory, 'repo');
    const store = wrap(await openDirectoryStore(root, { create: true }));
    return {
      store,
      another: async () => wrap(await openDirectoryStore(root)),
      cleanup: async () => {
        await store.close();
        await rm(directory, { recursive: true });
      },
    };
  };
  storeSuite(title, make, { append });
}

directorySuite('DirectoryStore', tmpdir(), (store) => store);
if (fs.existsSync('/dev/shm')) directorySuite('DirectoryStore on tmpfs', '/dev/shm', (s) => s);
// What is around a store, and the calls of one, are the same on every file system: in memory they are quick.
directorySuite('DirectoryStore that hides append', memoryDir(), hidingAppend, false);
directorySuite('FaultStore around a DirectoryStore', memoryDir(), (store) => new FaultStore(store));

let parent: string;
let root: string;
let stores: Store[];

beforeEach(async () => {
  parent = await mkdtemp(path.join(memoryDir(), 'b2-store-'));
  root = path.join(parent, 'repo');
  stores = [];
});
afterEach(async () => {
  for (const store of stores) await store.close();
  await rm(parent, { recursive: true });
});

async function openHere(calls?: Partial<FileCalls>): Promise<Store> {
  const store = await openDirectoryStore(root, {
    create: true,
    calls: { ...systemFileCalls, ...calls },
  });
  stores.push(store);
  return store;
}

async function listed(store: Store, prefix = ''): Promise<ObjectInfo[]> {
  const found: ObjectInfo[] = [];
  for await (const info of store.list(prefix)) found.push(info);
  return found;
}

function systemError(code: string): Error {
  return Object.assign(new Error(`${code}: injected`), { code });
}

/** All files below the root, temporary ones included. */
async function filesBelow(): Promise<string[]> {
  const found: string[] = [];
  for (const entry of await readdir(root, { recursive: true, withFileTypes: true })) {
    if (!entry.isDirectory()) found.push(entry.name);
  }
  return found.sort();
}

describe('files and directories', () => {
  test('have modes 0600 and 0700 and are named like the objects', async () => {
    const store = await openHere();
    await store.put('packs/ab/one', Buffer.from('x'));
    const appender = await store.openAppend('packs/ab/two', 'create');
    await appender.close();
    await store.putStream('packs/ab/three', (async function* () {})());
    for (const [name, mode] of [
      ['', 0o700],
      ['packs', 0o700],
      ['packs/ab', 0o700],
      ['packs/ab/one', 0o600],
      ['packs/ab/two', 0o600],
      ['packs/ab/three', 0o600],
    ] as const) {
      expect((await stat(path.join(root, name))).mode & 0o777).toBe(mode);
    }
    expect(await filesBelow()).toEqual(['one', 'three', 'two']);
  });

  test('a missing repository is no-repository unless it is to be made', async () => {
    await expect(openDirectoryStore(root)).rejects.toMatchObject({
      kind: 'no-repository',
      code: 10,
    });
    await writeFile(path.join(parent, 'file'), 'x');
    await expect(openDirectoryStore(path.join(parent, 'file'))).rejects.toMatchObject({
      kind: 'no-repository',
    });
    root = path.join(parent, 'deep/er/repo');
    const store = await openHere();
    expect(store.url).toBe(root);
    expect(await listed(store)).toEqual([]);
  });

  test('foreign names below the root are not objects', async () => {
    const store = await openHere();
    await store.put('packs/a', Buffer.from('x'));
    await mkdir(path.join(root, 'lost+found'));
    await writeFile(path.join(root, 'lost+found/object'), 'x');
    await writeFile(path.join(root, 'packs', temporaryName()), 'half');
    expect((await listed(store)).map(({ name }) => name)).toEqual(['packs/a']);
  });

  test('an object in the place of a directory, and the other way round, is an error', async () => {
    const store = await openHere();
    await store.put('a', Buffer.from('x'));
    await store.put('d/e', Buffer.from('x'));
    await expect(store.put('a/b', Buffer.from('x'))).rejects.toMatchObject({ kind: 'io' });
    await expect(store.put('d', Buffer.from('x'))).rejects.toMatchObject({ kind: 'io' });
    expect((await listed(store)).map(({ name }) => name).sort()).toEqual(['a', 'd/e']);
    expect(await filesBelow()).toEqual(['a', 'e']);
  });
});

describe('symbolic links', () => {
  test('in the place of an object or directory are refused, not followed', async () => {
    const outside = path.join(parent, 'outside');
    await mkdir(outside);
    await writeFile(path.join(outside, 'secret'), 'secret');
    const store = await openHere();
    await store.put('packs/a', Buffer.from('x'));
    await symlink(outside, path.join(root, 'volumes'));
    await symlink(path.join(outside, 'secret'), path.join(root, 'packs/link'));
    for (const name of ['volumes/secret', 'packs/link']) {
      const refused = { kind: 'io', message: expect.stringContaining('symbolic link') as string };
      await expect(store.get(name)).rejects.toMatchObject(refused);
      await expect(store.open(name)).rejects.toMatchObject(refused);
      await expect(store.stat(name)).rejects.toMatchObject(refused);
      await expect(store.put(name, Buffer.from('y'))).rejects.toMatchObject(refused);
      await expect(store.openAppend(name, 'existing')).rejects.toMatchObject(refused);
    }
    await expect(store.delete('volumes/secret')).rejects.toMatchObject({ kind: 'io' });
    await expect(listed(store)).rejects.toMatchObject({ kind: 'io' });
    await expect(listed(store, 'volumes')).rejects.toMatchObject({ kind: 'io' });
    expect(fs.readFileSync(path.join(outside, 'secret'), 'utf8')).toBe('secret');
    expect(await readdir(outside)).toEqual(['secret']);
  });

  test('as the root itself are the way to it', async () => {
    const store = await openHere();
    await store.put('a', Buffer.from('x'));
    await symlink(root, path.join(parent, 'link'));
    const linked = await openDirectoryStore(path.join(parent, 'link'));
    stores.push(linked);
    expect(String(await linked.get('a'))).toBe('x');
  });
});

describe('a file system that went away', () => {
  test('is an error, not an empty repository', async () => {
    const store = await openHere();
    await store.put('packs/a', Buffer.from('x'));
    await rename(root, `${root}-moved`);
    await mkdir(root);
    const gone = {
      kind: 'io',
      message: expect.stringContaining('not the one that was opened') as string,
    };
    await expect(listed(store)).rejects.toMatchObject(gone);
    await expect(store.get('packs/a')).rejects.toMatchObject(gone);
    await expect(store.stat('packs/a')).rejects.toMatchObject(gone);
    await expect(store.put('packs/b', Buffer.from('x'))).rejects.toMatchObject(gone);
    await expect(store.put('config', Buffer.from('x'))).rejects.toMatchObject(gone);
    await expect(store.openAppend('packs/c', 'create')).rejects.toMatchObject(gone);
    await expect(store.delete('packs/a')).rejects.toMatchObject(gone);
    expect(await readdir(root)).toEqual([]);
  });

  /** A `config` of a repository with that id. */
  const config = (id: string, label = 'first'): Buffer =>
    encodeConfig({
      id: id.repeat(32),
      created: '2026-01-01T00:00:00Z',
      encryption: 'none',
      chunkBytes: 65_536,
      packBytes: 16 * 1024 * 1024,
      keys: [
        {
          kind: 'none',
          id: '0123456789abcdef',
          label,
          created: '2026-01-01T00:00:00Z',
          master: Buffer.alloc(32).toString('base64'),
        },
      ],
      mac: Buffer.alloc(32).toString('base64'),
    });
  const gone = {
    kind: 'io',
    message: expect.stringContaining('not the one that was opened') as string,
  };

  test('and comes back as another directory is gone on with, if it is the same repository', async () => {
    const store = await openHere();
    await store.put('config', config('a'));
    await store.put('packs/a', Buffer.from('x'));
    const before = await store.openAppend('packs/open', 'create');
    await before.append(Buffer.from('1'));
    await before.sync();

    await rename(root, `${root}-moved`);
    await mkdir(root);
    await expect(store.put('packs/b', Buffer.from('y'))).rejects.toMatchObject(gone);
    // Of another repository, or of one whose config cannot be read: not this one.
    await mkdir(path.join(root, 'packs'));
    for (const bytes of [config('b'), Buffer.from('config'), Buffer.of()]) {
      await writeFile(path.join(root, 'config'), bytes);
      await expect(store.put('packs/b', Buffer.from('y'))).rejects.toMatchObject(gone);
      await expect(listed(store)).rejects.toMatchObject(gone);
    }
    await rm(path.join(root, 'config'));
    await symlink(path.join(`${root}-moved`, 'config'), path.join(root, 'config'));
    await expect(store.put('packs/b', Buffer.from('y'))).rejects.toMatchObject(gone);
    expect(await readdir(path.join(root, 'packs'))).toEqual([]);

    await rm(root, { recursive: true });
    await cp(`${root}-moved`, root, { recursive: true });
    await Promise.all(['b', 'c', 'd'].map((n) => store.put(`packs/${n}`, Buffer.from(n))));
    await store.put('new/deep/e', Buffer.from('e'));
    expect((await listed(store)).map(({ name }) => name).toSorted()).toEqual([
      'config',
      'new/deep/e',
      'packs/a',
      'packs/b',
      'packs/c',
      'packs/d',
      'packs/open',
    ]);
    expect(fs.existsSync(path.join(root, 'packs/b'))).toBe(true);
    expect(fs.existsSync(path.join(`${root}-moved`, 'packs/b'))).toBe(false);
    // What was open stays with the old one, so nothing of it may be acknowledged.
    await before.append(Buffer.from('2')).catch(() => undefined);
    await expect(before.sync()).rejects.toMatchObject({ kind: 'io' });
    await before.close();
    const after = await store.openAppend('packs/open', 'existing');
    expect(after.sizeBytes).toBe(1);
    await after.append(Buffer.from('3'));
    await after.sync();
    await after.close();
    expect(String(await store.get('packs/open'))).toBe('13');
  });

  test('and comes back with another key added to its config is the same repository', async () => {
    await mkdir(root);
    await writeFile(path.join(root, 'config'), config('a'));
    const store = await openHere();
    await rename(root, `${root}-moved`);
    await mkdir(root);
    await expect(listed(store)).rejects.toMatchObject(gone);
    await writeFile(path.join(root, 'config'), config('a', 'second'));
    expect((await listed(store)).map(({ name }) => name)).toEqual(['config']);
    // And again, as one that it knows by those bytes.
    await rename(root, `${root}-again`);
    await cp(`${root}-again`, root, { recursive: true });
    await store.put('x', Buffer.from('x'));
    expect(await readdir(root)).toContain('x');
  });

  test('a write into a directory that is known already does not reach another repository', async () => {
    const store = await openHere();
    await store.put('config', config('a'));
    await store.put('packs/a', Buffer.from('x'));
    await rename(root, `${root}-moved`);
    await mkdir(path.join(root, 'packs'), { recursive: true });
    await expect(store.put('packs/b', Buffer.from('y'))).rejects.toMatchObject(gone);
    await expect(store.openAppend('packs/c', 'create')).rejects.toMatchObject(gone);
    expect(await readdir(path.join(root, 'packs'))).toEqual([]);
  });

  test('directories removed behind its back are made again', async () => {
    const store = await openHere();
    await store.put('packs/ab/a', Buffer.from('x'));
    await rm(path.join(root, 'packs'), { recursive: true });
    await store.put('packs/ab/b', Buffer.from('y'));
    expect((await listed(store)).map(({ name }) => name)).toEqual(['packs/ab/b']);
  });
});

describe('temporary files', () => {
  test('of dead processes and of yesterday are swept, others left', async () => {
    await mkdir(path.join(root, 'packs'), { recursive: true });
    const own = temporaryName();
    const { pid, startTicks } = currentIdentity();
    expect(own).toContain(`-${pid}-${startTicks}-`);
    // The same process id with another start: a process that is no more.
    const dead = own.replace(`-${pid}-${startTicks}-`, `-${pid}-1${startTicks}-`);
    const elsewhere = own.replace(/^~b2-.{12}-/, '~b2-0123456789ab-');
    const old = elsewhere.replace('-0123456789ab-', '-ba9876543210-');
    for (const name of [own, dead, elsewhere, old])
      await writeFile(path.join(root, 'packs', name), 'x');
    await utimes(path.join(root, 'packs', old), 1_000_000, 1_000_000);
    const store = await openHere();
    await store.put('packs/a', Buffer.from('x'));
    expect(await filesBelow()).toEqual([own, elsewhere, 'a'].sort());
  });

  test('of failed puts do not stay', async () => {
    let isBroken = false;
    const store = await openHere({
      fsync: (fd) => (isBroken ? Promise.reject(systemError('EIO')) : systemFileCalls.fsync(fd)),
    });
    isBroken = true;
    await expect(store.put('a', Buffer.from('x'))).rejects.toMatchObject({
      kind: 'io',
      retryable: true,
    });
    expect(await filesBelow()).toEqual([]);
  });
});

describe('durability: what is synced before a call resolves', () => {
  /** Names what is done to which path (temporary names as `*`). */
  function tracing(): { trace: string[]; calls: Partial<FileCalls> } {
    const trace: string[] = [];
    const paths = new Map<number, string>();
    const short = (name: string): string =>
      name
        .replace(parent, '')
        .replace(/~b2-[^/]*~/, '*')
        .replace(/^\/repo\/?/, '') || '/';
    const calls: Partial<FileCalls> = {
      async open(name, flags, mode) {
        const fd = await systemFileCalls.open(name, flags, mode);
        paths.set(fd, short(name));
        return fd;
      },
      async write(fd, data, position) {
        trace.push(`write ${paths.get(fd)}`);
        return systemFileCalls.write(fd, data, position);
      },
      async fsync(fd) {
        trace.push(`fsync ${paths.get(fd)}`);
        await systemFileCalls.fsync(fd);
      },
      async fdatasync(fd) {
        trace.push(`fdatasync ${paths.get(fd)}`);
        await systemFileCalls.fdatasync(fd);
      },
      async rename(from, to) {
        trace.push(`rename ${short(from)} ${short(to)}`);
        await systemFileCalls.rename(from, to);
      },
      async link(from, to) {
        trace.push(`link ${short(from)} ${short(to)}`);
        await systemFileCalls.link(from, to);
      },
      async unlink(name) {
        trace.push(`unlink ${short(name)}`);
        await systemFileCalls.unlink(name);
      },
      async mkdir(name, mode) {
        trace.push(`mkdir ${short(name)}`);
        await systemFileCalls.mkdir(name, mode);
      },
    };
    return { trace, calls };
  }

  test('put: the file, then its name; new directories in their parents', async () => {
    const { trace, calls } = tracing();
    const store = await openHere(calls);
    trace.length = 0;
    await store.put('d/e/f', Buffer.from('x'));
    const file = ['write d/e/*', 'fsync d/e/*', 'rename d/e/* d/e/f', 'fsync d/e'];
    expect(trace).toEqual(['mkdir d', 'fsync /', 'mkdir d/e', 'fsync d', ...file]);
    trace.length = 0;
    await store.put('d/e/f', Buffer.from('y'));
    expect(trace).toEqual(file);
    trace.length = 0;
    await store.put('d/e/g', Buffer.from('y'), { ifAbsent: true });
    expect(trace).toEqual([
      'write d/e/*',
      'fsync d/e/*',
      'link d/e/* d/e/g',
      'unlink d/e/*',
      'fsync d/e',
    ]);
    trace.length = 0;
    await store.delete('d/e/g');
    expect(trace).toEqual(['unlink d/e/g', 'fsync d/e']);
  });

  test('directories that another process has just made are synced too', async () => {
    const { trace, calls } = tracing();
    const store = await openHere(calls);
    await mkdir(path.join(root, 'd'));
    trace.length = 0;
    await store.put('d/f', Buffer.from('x'));
    expect(trace.slice(0, 2)).toEqual(['mkdir d', 'fsync /']);
  });

  test('a new repository is made durable in its parents', async () => {
    const { trace, calls } = tracing();
    root = path.join(parent, 'x/y');
    await openHere(calls);
    expect(trace.filter((line) => line.startsWith('fsync'))).toHaveLength(2);
  });

  test('append: the bytes with every sync, the name with the first', async () => {
    const { trace, calls } = tracing();
    const store = await openHere(calls);
    const appender = await store.openAppend('p', 'create');
    await appender.append(Buffer.from('x'));
    await appender.sync();
    await appender.append(Buffer.from('y'));
    await appender.sync();
    await appender.close();
    expect(
      trace.filter((line) => !line.startsWith('mkdir') && !line.includes('fsync /b2')).slice(-5),
    ).toEqual(['write p', 'fdatasync p', 'fsync /', 'write p', 'fdatasync p']);
  });

  test('many puts into one directory at once share directory syncs', async () => {
    const { trace, calls } = tracing();
    const store = await openHere(calls);
    await store.put('d/first', Buffer.from('x'));
    trace.length = 0;
    await Promise.all(Array.from({ length: 50 }, (_, i) => store.put(`d/${i}`, Buffer.from('x'))));
    const shared = trace.filter((line) => line === 'fsync d').length;
    expect(shared).toBeGreaterThan(0);
    expect(shared).toBeLessThan(50);
    // The last name given is followed by a sync.
    expect(trace.lastIndexOf('fsync d')).toBeGreaterThan(
      trace.findLastIndex((line) => line.startsWith('rename')),
    );
  });
});

describe('failures', () => {
  test('short reads and writes are carried on', async () => {
    const few = (data: Uint8Array): Uint8Array => data.subarray(0, Math.ceil(data.length / 3));
    const store = await openHere({
      read: (fd, into, position) => systemFileCalls.read(fd, few(into), position),
      write: (fd, data, position) => systemFileCalls.write(fd, few(data), position),
    });
    const bytes = patterned(600_000);
    const aligned = alignedMemory(262_144);
    aligned.set(bytes.subarray(0, 262_144));
    await store.put('a', bytes);
    const appender = await store.openAppend('p', 'create');
    await appender.append(aligned);
    await appender.append(bytes.subarray(262_144));
    await appender.sync();
    await appender.close();
    for (const name of ['a', 'p']) {
      expect((await store.get(name)).equals(bytes)).toBe(true);
      const reader = await store.open(name);
      const into = alignedMemory(524_288);
      expect(await reader.read(into, 0)).toBe(524_288);
      expect(Buffer.compare(into, bytes.subarray(0, 524_288))).toBe(0);
      await reader.close();
    }
  });

  test.each([
    ['ENOSPC', 'no-space'],
    ['EDQUOT', 'no-space'],
    ['EIO', 'io'],
  ])('%s in any step of a put leaves the old object or the new one', async (code, kind) => {
    const steps = ['open', 'write', 'fsync', 'rename'] as const;
    for (const step of steps) {
      let isBroken = false;
      const store = await openHere({
        [step]: (...args: never[]) =>
          isBroken
            ? Promise.reject(systemError(code))
            : (systemFileCalls[step] as (...args: never[]) => Promise<unknown>)(...args),
      });
      await store.put('a', Buffer.from('old'));
      isBroken = true;
      await expect(store.put('a', Buffer.from('new'))).rejects.toMatchObject({
        name: 'B2Error',
        kind,
      });
      isBroken = false;
      expect(['old', 'new']).toContain(String(await store.get('a')));
      await store.put('a', Buffer.from('again'));
      expect(String(await store.get('a'))).toBe('again');
    }
    expect(await filesBelow()).toEqual(['a']);
  });

  test('a file system that writes nothing and says nothing is an error, not a loop', async () => {
    const store = await openHere({ write: () => Promise.resolve(0) });
    await expect(store.put('a', Buffer.from('x'))).rejects.toMatchObject({ kind: 'io' });
  });

  test('after a failed fsync an appender is dead, though the next fsync would succeed', async () => {
    let failures = 1;
    const store = await openHere({
      fdatasync: (fd) =>
        failures-- > 0 ? Promise.reject(systemError('EIO')) : systemFileCalls.fdatasync(fd),
    });
    const appender = await store.openAppend('p', 'create');
    await appender.append(Buffer.from('x'));
    await expect(appender.sync()).rejects.toMatchObject({ kind: 'io', retryable: false });
    const dead = {
      kind: 'io',
      retryable: false,
      message: expect.stringContaining('unknown') as string,
    };
    await expect(appender.sync()).rejects.toMatchObject(dead);
    await expect(appender.append(Buffer.from('y'))).rejects.toMatchObject(dead);
    await appender.close();
  });

  test('a failed append stops those behind it and the sync', async () => {
    let writes = 0;
    const store = await openHere({
      write: (fd, data, position) =>
        writes++ === 1
          ? Promise.reject(systemError('ENOSPC'))
          : systemFileCalls.write(fd, data, position),
    });
    const appender = await store.openAppend('p', 'create');
    const outcomes = await Promise.allSettled([
      appender.append(Buffer.from('one')),
      appender.append(Buffer.from('two')),
      appender.append(Buffer.from('three')),
      appender.sync(),
    ]);
    expect(outcomes.map(({ status }) => status)).toEqual([
      'fulfilled',
      'rejected',
      'rejected',
      'rejected',
    ]);
    for (const outcome of outcomes.slice(1)) {
      expect(outcome).toMatchObject({ reason: { kind: 'no-space' } });
    }
    await appender.close();
    expect(String(await store.get('p'))).toBe('one');
  });

  test('no permission is said with a hint', async () => {
    const store = await openHere({ link: () => Promise.reject(systemError('EACCES')) });
    await expect(store.put('a', Buffer.from('x'), { ifAbsent: true })).rejects.toMatchObject({
      kind: 'io',
      hint: expect.stringContaining('permissions') as string,
    });
  });

  test('without hard links put ifAbsent is still exact', async () => {
    const store = await openHere({ link: () => Promise.reject(systemError('EPERM')) });
    await store.put('a', Buffer.from('first'), { ifAbsent: true });
    await expect(store.put('a', Buffer.from('second'), { ifAbsent: true })).rejects.toMatchObject({
      kind: 'exists',
    });
    expect(String(await store.get('a'))).toBe('first');
    expect(await filesBelow()).toEqual(['a']);
  });

  test('a link whose answer was lost and that is tried again has succeeded', async () => {
    const store = await openHere({
      async link(from, to) {
        await systemFileCalls.link(from, to);
        await systemFileCalls.link(from, to); // EEXIST, as an NFS client reports it
      },
    });
    await store.put('a', Buffer.from('first'), { ifAbsent: true });
    expect(await filesBelow()).toEqual(['a']);
    await expect(store.put('a', Buffer.from('second'), { ifAbsent: true })).rejects.toMatchObject({
      kind: 'exists',
    });
    expect(String(await store.get('a'))).toBe('first');
  });
});

describe('direct I/O', () => {
  /** Counts reads and writes through descriptors with O_DIRECT. */
  function counting(refuse = false): {
    direct: { opened: number; used: number };
    calls: Partial<FileCalls>;
  } {
    const direct = { opened: 0, used: 0 };
    const fds = new Set<number>();
    const calls: Partial<FileCalls> = {
      async open(name, flags, mode) {
        const fd = await systemFileCalls.open(
          name,
          flags & ~(refuse ? fs.constants.O_DIRECT : 0),
          mode,
        );
        if ((flags & fs.constants.O_DIRECT) !== 0) {
          direct.opened++;
          fds.add(fd);
        }
        return fd;
      },
      async close(fd) {
        fds.delete(fd);
        await systemFileCalls.close(fd);
      },
      async read(fd, into, position) {
        if (fds.has(fd)) direct.used++;
        if (fds.has(fd) && refuse) throw systemError('EINVAL');
        return systemFileCalls.read(fd, into, position);
      },
      async write(fd, data, position) {
        if (fds.has(fd)) direct.used++;
        if (fds.has(fd) && refuse) throw systemError('EINVAL');
        return systemFileCalls.write(fd, data, position);
      },
    };
    return { direct, calls };
  }

  test('is used for large aligned pieces and for nothing else', async () => {
    const { direct, calls } = counting();
    const store = await openHere(calls);
    const slab = alignedMemory(1024 * 1024);
    slab.set(patterned(slab.length));
    const appender = await store.openAppend('p', 'create');
    await appender.append(slab);
    const atFirst = direct.used;
    expect(atFirst).toBeLessThanOrEqual(1);
    await appender.append(slab.subarray(0, 65_536));
    await appender.append(Buffer.from(slab));
    await appender.append(slab.subarray(4096 + 16, 4096 + 16 + 262_144));
    await appender.append(slab.subarray(0, 262_145));
    await appender.append(slab);
    expect(direct.used).toBe(atFirst);
    await appender.sync();
    await appender.close();
    const all = Buffer.concat([
      slab,
      slab.subarray(0, 65_536),
      slab,
      slab.subarray(4096 + 16, 4096 + 16 + 262_144),
      slab.subarray(0, 262_145),
      slab,
    ]);
    expect((await store.get('p')).equals(all)).toBe(true);
  });

  test('that the file system refuses is given up for good', async () => {
    const { direct, calls } = counting(true);
    const store = await openHere(calls);
    const slab = alignedMemory(1024 * 1024);
    slab.set(patterned(slab.length));
    const appender = await store.openAppend('p', 'create');
    for (let i = 0; i < 3; i++) await appender.append(slab);
    await appender.sync();
    await appender.close();
    const reader = await store.open('p');
    expect(await reader.read(slab, 0)).toBe(slab.length);
    await reader.close();
    expect(direct).toEqual({ opened: 1, used: 1 });
    expect((await store.get('p')).equals(Buffer.concat([slab, slab, slab]))).toBe(true);
  });

  test('goes to the file that was opened, not to what has its name now', async () => {
    const store = await openHere();
    const slab = alignedMemory(262_144);
    const appender = await store.openAppend('p', 'create');
    await store.put('p', Buffer.from('another'));
    slab.fill(7);
    await appender.append(slab);
    await appender.sync();
    await appender.close();
    expect(String(await store.get('p'))).toBe('another');
  });
});

describe('several processes', () => {
  test('racing put ifAbsent: for every name exactly one wins, and the object is whole', async () => {
    await openHere();
    const directory = compileForChild('repo/store-directory.ts');
    const file = path.join(directory, 'repo/store-directory.js');
    try {
      const script = `
        const { openDirectoryStore } = await import(process.argv[1]);
        const store = await openDirectoryStore(process.argv[2]);
        const me = process.argv[3];
        process.stdout.write('ready\\n');
        await new Promise((resolve) => process.stdin.once('data', resolve));
        const won = [];
        for (let i = 0; i < 200; i++) {
          const data = Buffer.alloc(20000, me);
          await store.put('race/' + (i % 9) + '/' + i, data, { ifAbsent: true }).then(
            () => won.push(i),
            (error) => { if (error.kind !== 'exists') throw error; },
          );
        }
        process.stdout.write(JSON.stringify(won) + '\\n');
        await store.close();
        process.exit(0);
      `;
      const children = ['A', 'B'].map((me) => {
        const child = spawn(
          process.execPath,
          ['--input-type=module', '-e', script, file, root, me],
          { stdio: ['pipe', 'pipe', 'inherit'] },
        );
        let output = '';
        const ready = new Promise<void>((resolve) => {
          child.stdout.on('data', (text: Buffer) => {
            output += String(text);
            if (output.includes('ready')) resolve();
          });
        });
        const ended = new Promise<number | null>((resolve) => child.once('close', resolve));
        return {
          child,
          ready,
          ended,
          won: () => JSON.parse(output.split('\n')[1] ?? '') as number[],
        };
      });
      await Promise.all(children.map(({ ready }) => ready));
      for (const { child } of children) child.stdin.write('go\n');
      for (const { ended } of children) expect(await ended).toBe(0);
      const [a, b] = children.map(({ won }) => won());
      if (a === undefined || b === undefined) throw new Error('no results');
      expect([...a, ...b].sort((x, y) => x - y)).toEqual(Array.from({ length: 200 }, (_, i) => i));
      const store = await openHere();
      for (const [me, won] of [
        ['A', a],
        ['B', b],
      ] as const) {
        for (const i of won) {
          expect((await store.get(`race/${i % 9}/${i}`)).equals(Buffer.alloc(20_000, me))).toBe(
            true,
          );
        }
      }
      expect((await filesBelow()).filter((name) => name.startsWith('~'))).toEqual([]);
    } finally {
      await rm(directory, { recursive: true });
    }
  }, 60_000);
});

test('descriptors are all closed in the end', async () => {
  const countOpen = async (): Promise<number> => (await readdir('/proc/self/fd')).length;
  const store = await openHere();
  await store.put('warm/up', patterned(300_000));
  const before = await countOpen();
  const slab = alignedMemory(262_144);
  for (let i = 0; i < 20; i++) {
    const appender = await store.openAppend(`p/${i}`, 'create');
    await appender.append(slab);
    await appender.sync();
    const reader = await store.open(`p/${i}`);
    const reading = reader.read(slab, 0);
    await reader.close();
    expect(await reading).toBe(slab.length);
    await appender.close();
    await store.get(`p/${i}`);
    await store.get('none').catch(() => undefined);
    await expect(store.openAppend(`p/${i}`, 'create')).rejects.toMatchObject({ kind: 'exists' });
  }
  expect((await lstat(path.join(root, 'p/0'))).size).toBe(262_144);
  // Other tests of this process may open and close files of their own.
  expect(await countOpen()).toBeLessThan(before + 10);
});
