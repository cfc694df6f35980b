/** Passwords and keys: where they may come from, what happens when they are wrong, and where they must never appear. */
import {
  chmodSync,
  existsSync,
  mkdirSync,
  readFileSync,
  readdirSync,
  statSync,
  writeFileSync,
} from 'node:fs';
import { join } from 'node:path';
import { afterEach, describe, expect, it } from 'vitest';
import { systemClock, systemRandom } from '../../src/clock.js';
import type { InitResult } from '../../src/commands/run/init.js';
import type { KeyAddResult } from '../../src/commands/run/key-add.js';
import type { KeyListResult } from '../../src/commands/run/key-list.js';
import { currentIdentity } from '../../src/process-identity.js';
import { parseKeyFile, type Secret } from '../../src/repo/keys.js';
import { Repository } from '../../src/repo/repository.js';
import { openDirectoryStore } from '../../src/repo/store-directory.js';
import { B2, type Ended } from '../support/b2.js';
import { noise, pokeWithDd } from '../support/disks.js';
import { sparseFile } from '../support/loop.js';
import { requires } from '../support/requires.js';
import { tempDir, type TempDir } from '../support/tmp.js';

const MIB = 1024 * 1024;
const PASSWORD = 'xyzzy-Passwort-4711';
const dirs: TempDir[] = [];
afterEach(async () => {
  for (const dir of dirs.splice(0)) await dir.remove();
});

function newDir(): TempDir {
  const dir = tempDir();
  dirs.push(dir);
  return dir;
}

function image(dir: TempDir, name = 'image', bytes = 4 * MIB): string {
  const file = sparseFile(dir, name, bytes);
  pokeWithDd(file, 0, noise(1, bytes / 2));
  return file;
}

/** A file that only its owner may read. */
function privateFile(dir: TempDir, name: string, text: string): string {
  const path = dir.join(name);
  writeFileSync(path, text, { mode: 0o600 });
  return path;
}

/** Everything below `dir`. */
function treeOf(dir: string): string[] {
  return readdirSync(dir, { recursive: true, encoding: 'utf8' }).map((name) => join(dir, name));
}

/** Every form in which a secret could stand in a text or file. */
function formsOf(secret: Uint8Array): readonly Buffer[] {
  const bytes = Buffer.from(secret);
  const hex = bytes.toString('hex');
  return [
    bytes,
    Buffer.from(hex),
    Buffer.from(hex.toUpperCase()),
    Buffer.from(bytes.toString('base64').replace(/=+$/, '')),
    Buffer.from(bytes.toString('base64url')),
  ];
}

async function masterOf(repository: string, secret: Secret): Promise<Uint8Array> {
  const store = await openDirectoryStore(repository);
  const env = { clock: systemClock, random: systemRandom, owner: currentIdentity() };
  await using repo = await Repository.open(store, [secret], env);
  return repo.handle(undefined).master;
}

/** True for b2 itself, before and after its launcher's `env` has found node. */
function startsAs(commandLine: string, own: string): boolean {
  return commandLine === '' || commandLine === own || commandLine.includes('bin/b2');
}

/** Command lines and environments of all descendants of `pid`, looked at until it has ended. */
async function watchDescendants(
  pid: number,
  ended: Promise<Ended>,
): Promise<ReadonlyMap<string, string>> {
  const seen = new Map<string, string>();
  const own = readFileSync(`/proc/${pid}/cmdline`, 'latin1');
  let isOver = false;
  void ended.finally(() => (isOver = true));
  while (!isOver) {
    const parents = new Map<string, string>();
    for (const id of readdirSync('/proc').filter((name) => /^\d+$/.test(name))) {
      try {
        const stat = readFileSync(`/proc/${id}/stat`, 'utf8');
        parents.set(id, stat.slice(stat.lastIndexOf(')') + 2).split(' ')[1] ?? '');
      } catch {
        continue; // it has ended meanwhile
      }
    }
    for (const id of parents.keys()) {
      let at: string | undefined = id;
      while (at !== undefined && at !== String(pid)) at = parents.get(at);
      if (at === undefined) continue;
      try {
        // A child that has not started its program yet shares the memory, environment included, of b2 itself.
        const environ = id === String(pid) ? '' : readFileSync(`/proc/${id}/environ`, 'latin1');
        const commandLine = readFileSync(`/proc/${id}/cmdline`, 'latin1');
        const environment = startsAs(commandLine, own) ? '' : environ;
        seen.set(`${id} ${commandLine}`, `${commandLine}\0${environment}`);
      } catch {
        continue;
      }
    }
    await new Promise((resolve) => setTimeout(resolve, 2));
  }
  return seen;
}

requires({ tools: ['qemu-img'] }).describe('secrets', () => {
  it('appear in no command line, environment of a child, output, or file but their own', async () => {
    const dir = newDir();
    const keyFile = dir.join('repo.key');
    const passwordFile = privateFile(dir, 'password', `${PASSWORD}\n`);
    const b2 = new B2(dir, { B2_KEY_FILE: keyFile });
    const source = image(dir);
    let output = '';
    let commandLines = '';
    const run = async (
      args: readonly string[],
      code: number,
      env: Record<string, string | undefined> = {},
    ): Promise<void> => {
      const { child, ended } = b2.start(args, env);
      const seen = await watchDescendants(child.pid ?? 0, ended);
      const done = await ended;
      expect([args.join(' '), done.code, done.stderr]).toEqual([args.join(' '), code, done.stderr]);
      output += done.stdout + done.stderr;
      commandLines += [...seen.values()].join('\n');
    };
    const byPassword = { B2_KEY_FILE: undefined, B2_PASSWORD: PASSWORD };
    await run(['--verbose', 'init'], 0);
    await run(['--verbose', 'key', 'add', '--new-password-file', passwordFile], 0);
    await run(['--verbose', 'snapshot', source, '--volume', 'v'], 0, byPassword);
    for (const form of [[], ['--json']]) {
      for (const command of [['points', 'v'], ['volumes'], ['snapshots'], ['key', 'list']])
        await run([...form, '--verbose', ...command], 0);
    }
    await run(
      ['--verbose', 'restore', 'v', dir.join('out.qcow2'), '--format', 'qcow2'],
      0,
      byPassword,
    );
    expect(commandLines).toContain('qemu-img');
    await run(['--verbose', 'restore', 'v', dir.join('out.img')], 0, {
      B2_KEY_FILE: undefined,
      B2_PASSWORD_FILE: passwordFile,
    });
    await run(['--verbose', '--json', 'points', 'nothing'], 4, byPassword);
    await run(['--verbose', 'points', 'v'], 12, {
      B2_KEY_FILE: undefined,
      B2_PASSWORD: `${PASSWORD}!`,
    });
    await run(['--verbose', 'points', 'v'], 12, {
      B2_KEY_FILE: undefined,
      B2_PASSWORD_COMMAND: `echo ${'secret-of-the-command'}; exit 3`,
    });

    const material = parseKeyFile(readFileSync(keyFile, 'ascii'), keyFile);
    const master = await masterOf(b2.repository, { kind: 'keyFile', material, source: keyFile });
    const forms = [...formsOf(material), ...formsOf(master), Buffer.from(PASSWORD)];
    for (const form of forms) {
      expect(Buffer.from(output).includes(form)).toBe(false);
      const at = commandLines.indexOf(form.toString('latin1'));
      expect(at < 0 ? '' : commandLines.slice(Math.max(0, at - 300), at)).toBe('');
    }
    expect(output).not.toContain('secret-of-the-command');
    for (const path of treeOf(dir.path)) {
      if (path === keyFile || path === passwordFile || !statSync(path).isFile()) continue;
      const bytes = readFileSync(path);
      for (const form of forms) expect([path, bytes.includes(form)]).toEqual([path, false]);
    }
  });
});

describe('what b2 makes', () => {
  it('can be read by its owner only', async () => {
    const dir = newDir();
    const b2 = new B2(dir, {
      B2_KEY_FILE: dir.join('keys', 'repo.key'),
      B2_REPOSITORY: dir.join('deep', 'repo'),
    });
    // With a mask that would let everybody in.
    const before = process.umask(0);
    try {
      const made = await b2.json<InitResult>(['init']);
      expect(made.keyFile).toBe(dir.join('keys', 'repo.key'));
      await b2.json(['snapshot', image(dir), '--volume', 'v']);
      await b2.json(['restore', 'v', dir.join('restored.img')]);
    } finally {
      process.umask(before);
    }
    const mode = (path: string): number => statSync(path).mode & 0o777;
    expect(mode(dir.join('restored.img'))).toBe(0o600);
    let files = 0;
    for (const root of ['keys', 'deep', 'cache'].map((name) => dir.join(name))) {
      for (const path of [root, ...treeOf(root)]) {
        const isFile = statSync(path).isFile();
        expect([path, mode(path).toString(8)]).toEqual([path, isFile ? '600' : '700']);
        if (isFile) files++;
      }
    }
    expect(files).toBeGreaterThan(5);
  });
});

describe('opening a repository', () => {
  it('fails with 12 for a wrong password or key, or none, and says which was tried', async () => {
    const dir = newDir();
    const b2 = new B2(dir, { B2_PASSWORD: PASSWORD });
    const { id } = await b2.json<InitResult>(['init']);
    const none = { B2_PASSWORD: undefined };
    expect(await b2.error(['volumes'], { B2_PASSWORD: 'wrong' })).toEqual({
      type: 'error',
      code: 12,
      message: `no key of repository ${id} is opened by what was given (B2_PASSWORD)`,
      hint: 'Check the password or key file; "b2 key list" with a working one shows which keys there are.',
    });
    const nothing = await b2.error(['volumes'], none);
    expect(nothing).toMatchObject({ code: 12, hint: expect.stringContaining('B2_PASSWORD_FILE') });

    const missing = dir.join('no-such.key');
    const error = await b2.error(['volumes'], { ...none, B2_KEY_FILE: missing });
    expect(error.code).toBe(12);
    expect(error.message).toContain(missing);
    expect((await b2.error(['--password-file', missing, 'volumes'], none)).message).toContain(
      missing,
    );

    const otherKey = privateFile(dir, 'other.key', `b2-key-v1 ${'ab'.repeat(32)}\n`);
    expect((await b2.error(['volumes'], { ...none, B2_KEY_FILE: otherKey })).message).toContain(
      otherKey,
    );
    const noKey = privateFile(dir, 'text', 'this is no key\n');
    const bad = await b2.error(['--key-file', noKey, 'volumes'], none);
    expect(bad.message).toContain(noKey);
    expect(bad.message).not.toContain('this is no key');
    chmodSync(otherKey, 0o640);
    expect(await b2.error(['volumes'], { ...none, B2_KEY_FILE: otherKey })).toEqual({
      type: 'error',
      code: 12,
      message: `the key file ${otherKey} can be read by others (mode 640)`,
      hint: `Make it private: chmod 600 ${otherKey}`,
    });
  });

  it('takes the password from file, command, systemd credential, and several keys', async () => {
    const dir = newDir();
    const b2 = new B2(dir, { B2_PASSWORD: PASSWORD });
    await b2.json(['init']);
    const file = privateFile(dir, 'password', `${PASSWORD}\n`);
    mkdirSync(dir.join('credentials'));
    privateFile(dir, 'credentials/b2-password', PASSWORD);
    const config = privateFile(dir, 'config.yaml', `password-file: ${file}\n`);
    const none = { B2_PASSWORD: undefined };
    const ways: readonly Record<string, string | undefined>[] = [
      { ...none, B2_PASSWORD_FILE: file },
      { ...none, B2_PASSWORD_COMMAND: `cat ${file}` },
      { ...none, CREDENTIALS_DIRECTORY: dir.join('credentials') },
      { ...none, B2_CONFIG: config },
    ];
    for (const way of ways) await b2.json(['volumes'], 0, way);
    await b2.json(['--password-file', file, 'volumes'], 0, none);

    // Changing the password: add the new one, remove the old one. Nothing is rewritten but "config".
    const packs = treeOf(b2.repository).filter((path) => path.includes('/packs/'));
    const next = privateFile(dir, 'next', 'the next one\n');
    const added = await b2.json<KeyAddResult>([
      'key',
      'add',
      '--new-password-file',
      next,
      '--label',
      '2027',
    ]);
    expect(added).toMatchObject({ kind: 'password', label: '2027' });
    const keyFile = dir.join('escrow.key');
    await b2.json(['key', 'add', '--new-key-file', keyFile]);
    const { keys } = await b2.json<KeyListResult>(['key', 'list']);
    expect(keys.map((k) => [k.kind, k.inUse])).toEqual([
      ['password', true],
      ['password', false],
      ['key file', false],
    ]);
    for (const way of [{ B2_PASSWORD: 'the next one' }, { ...none, B2_KEY_FILE: keyFile }])
      await b2.json(['volumes'], 0, way);
    await b2.json(['key', 'remove', keys[0]?.id ?? ''], 0, { B2_PASSWORD: 'the next one' });
    expect((await b2.error(['volumes'])).code).toBe(12);
    await b2.json(['volumes'], 0, { B2_PASSWORD: 'the next one' });
    await b2.json(['key', 'remove', keys[1]?.id ?? ''], 0, { ...none, B2_KEY_FILE: keyFile });
    const last = await b2.error(['key', 'remove', keys[2]?.id ?? ''], {
      ...none,
      B2_KEY_FILE: keyFile,
    });
    expect(last).toMatchObject({ code: 1, message: expect.stringContaining('is the only key') });
    expect(
      (await b2.error(['key', 'remove', 'ffffffff'], { ...none, B2_KEY_FILE: keyFile })).code,
    ).toBe(4);
    expect(treeOf(b2.repository).filter((path) => path.includes('/packs/'))).toEqual(packs);
  });

  it('fails with 10 where there is none, and init where there is one', async () => {
    const dir = newDir();
    const b2 = new B2(dir, { B2_PASSWORD: PASSWORD });
    const missing = await b2.error(['volumes']);
    expect(missing).toMatchObject({ code: 10, hint: expect.stringMatching(/b2 .*init/) });
    expect(missing.message).toContain(b2.repository);
    expect(existsSync(b2.repository)).toBe(false);
    await b2.json(['init']);
    const config = readFileSync(join(b2.repository, 'config'));
    const again = await b2.error(['init']);
    expect(again.code).toBe(10);
    expect(again.message).toContain(b2.repository);
    expect((await b2.error(['init', '--encryption', 'none'])).code).toBe(10);
    expect(readFileSync(join(b2.repository, 'config')).equals(config)).toBe(true);
    // Without a password, a key file or a terminal nothing is made.
    const other = new B2(dir, {}, dir.join('other'));
    expect((await other.error(['init'])).code).toBe(12);
    expect((await other.error(['volumes'])).code).toBe(10);
  });
});
