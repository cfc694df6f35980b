/** Exit codes, JSON and signals of every command against a real repository. */
import { spawnSync } from 'node:child_process';
import { existsSync, rmSync } from 'node:fs';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { COMMANDS } from '../../src/commands/index.js';
import { B2, PROGRAM, jsonLines } from '../support/b2.js';
import { noise, pokeWithDd, tool } from '../support/disks.js';
import { sparseFile } from '../support/loop.js';
import { cmp } from '../support/source.js';
import { tempDir, type TempDir } from '../support/tmp.js';

const MIB = 1024 * 1024;
let dir: TempDir;
let b2: B2;
let image: string;
/** Large enough that a signal meets it on its way. */
let large: string;

/** Fills `large` with data that no repository knows, so that capturing it takes its time. */
function makeLarge(): void {
  tool('dd', ['if=/dev/urandom', `of=${large}`, 'bs=1M', 'count=384', 'status=none']);
}

beforeAll(async () => {
  dir = tempDir();
  // A key file: a password costs half a second of CPU time at each of a hundred starts.
  b2 = new B2(dir, { B2_KEY_FILE: dir.join('key') });
  await b2.json(['init']);
  image = sparseFile(dir, 'image', 4 * MIB);
  pokeWithDd(image, 0, noise(1, 2 * MIB));
  await b2.json(['snapshot', image, '--volume', 'v', '--name', 'first', '--tag', 'a']);
  large = dir.join('large');
  makeLarge();
});
afterAll(() => dir.remove());

/** Starts b2 with --json and sends `signal` when it has told how far it is. */
async function interrupted(args: readonly string[], signal: NodeJS.Signals) {
  const { child, ended } = b2.start(['--json', ...args]);
  let isSent = false;
  child.stderr?.on('data', (text: string) => {
    if (isSent || !text.includes('"type":"progress"')) return;
    isSent = true;
    child.kill(signal);
  });
  return ended;
}

describe('--json', () => {
  it('is one document on stdout for every command that ends with an answer', async () => {
    const commands: readonly (readonly [readonly string[], readonly string[]])[] = [
      [
        ['snapshot', image, '--name', 'json'],
        ['volume', 'volumeId', 'id', 'name', 'time', 'class', 'hash', 'storedBytes'],
      ],
      [['volumes'], ['volumes']],
      [
        ['points', 'v'],
        ['volume', 'volumeId', 'points'],
      ],
      [['snapshots'], ['snapshots']],
      [
        ['restore', 'v', dir.join('plan.img'), '--plan'],
        ['volume', 'point', 'plan'],
      ],
      [
        ['restore', 'v', dir.join('json.img')],
        ['volume', 'point', 'restored'],
      ],
      [
        ['key', 'list'],
        ['repository', 'keys'],
      ],
      [
        ['key', 'add', '--new-key-file', dir.join('json.key')],
        ['id', 'kind', 'label', 'keyFile'],
      ],
      [['status'], ['volumes']],
      [
        ['verify', '--data', 'all'],
        ['findings', 'volumes', 'damage'],
      ],
      [['prune'], ['freedBytes']],
      [['repair'], ['actions', 'left']],
      [['completion', 'zsh'], ['shell']],
    ];
    for (const [args, keys] of commands) {
      const done = await b2.run('--json', ...args);
      expect([args, done.code]).toEqual([args, 0]);
      expect(done.stdout.trimEnd()).not.toContain('\n');
      const answer = JSON.parse(done.stdout) as Record<string, unknown>;
      expect([args, Object.keys(answer)]).toEqual([args, expect.arrayContaining([...keys])]);
      for (const line of jsonLines(done.stderr)) expect(line).toHaveProperty('type');
      // Times with nanoseconds in UTC.
      for (const [, time] of done.stdout.matchAll(/"time":"([^"]*)"/g))
        expect(time).toMatch(/^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{9}Z$/);
    }
    expect(existsSync(dir.join('plan.img'))).toBe(false);
  });

  it('makes every error a line on stderr with code and message', async () => {
    const none = dir.join('none');
    const cases: readonly (readonly [readonly string[], number])[] = [
      [['nonsense'], 2],
      [['points'], 2],
      [['restore', 'v', none, '--format', 'zip'], 2],
      [['snapshot', image, '--name', '#1'], 2],
      [['init', '--chunk-size', '17K'], 2],
      [['--config', none, 'volumes'], 2],
      [['points', 'nothing'], 4],
      [['restore', 'v', none, '--at', '#99'], 4],
      [['restore', 'v', none, '--at', '1999-01-01'], 4],
      [['snapshot', none], 4],
      [['key', 'remove', 'ffff'], 4],
      [['--repo', none, 'volumes'], 10],
      [['init'], 10],
      [['--key-file', none, 'volumes'], 12],
    ];
    for (const [args, code] of cases) {
      const error = await b2.error(args);
      expect([args, error.code]).toEqual([args, code]);
      expect(error.message.length).toBeGreaterThan(5);
      // One line, and no stack.
      expect(error.message).not.toMatch(/\n|\.[jt]s:\d+/);
    }
    expect(existsSync(none)).toBe(false);
  });

  it('errors for people are on stderr too, with the hint below', async () => {
    const done = await b2.run('points', 'nothing');
    expect([done.code, done.stdout]).toEqual([4, '']);
    expect(done.stderr).toMatch(/^b2: [^\n]+\n( {4}[^\n]+\n)?$/);
  });
});

describe('every command', () => {
  it.each(COMMANDS.map((c) => [c.name, c] as const))(
    '%s has help with its options and refuses others',
    async (name, command) => {
      const words = name.split(' ');
      const help = await b2.run(...words, '--help');
      expect([help.code, help.stderr]).toEqual([0, '']);
      expect(help.stdout).toContain(`Usage: b2 ${name}`);
      for (const option of Object.keys(command.options))
        expect(help.stdout).toContain(`--${option}`);
      expect((await b2.error([...words, '--no-such-option'])).code).toBe(2);
    },
  );
});

describe('output', () => {
  it('has no colours, bars or notes where nobody looks', async () => {
    const done = await b2.run('snapshot', image);
    expect(done.code).toBe(0);
    for (const text of [done.stdout, done.stderr]) expect(text.includes('\u001b')).toBe(false);
    expect(done.stdout).toMatch(/^captured v as "/);
    const quiet = await b2.run('--quiet', 'restore', 'v', dir.join('quiet.img'));
    expect([quiet.code, quiet.stderr]).toEqual([0, '']);
  });

  it('ends with 3 and says nothing when its reader has left', () => {
    const done = spawnSync(
      'sh',
      ['-c', '{ sleep 1; "$0" points v; echo $? >&2; } | true', PROGRAM],
      {
        encoding: 'utf8',
        env: b2.env,
      },
    );
    expect(done.stderr).toBe('3\n');
  });
});

describe('an interrupt', () => {
  it.each(['SIGINT', 'SIGTERM'] as const)(
    'ends a snapshot with 130, and the repository is as good as before (%s)',
    async (signal) => {
      // One that ended before the signal was there tells nothing: the next gets another chance.
      let volume = '';
      let done: Awaited<ReturnType<typeof interrupted>> | undefined;
      for (let tries = 0; tries < 8 && (done === undefined || done.code === 0); tries++) {
        volume = `large-${signal}-${tries}`;
        makeLarge();
        done = await interrupted(['snapshot', large, '--volume', volume], signal);
      }
      if (done === undefined) throw new Error('not tried');
      expect([done.code, done.signal, done.stdout]).toEqual([130, undefined, '']);
      expect(jsonLines(done.stderr).at(-1)).toMatchObject({ type: 'error', code: 130 });
      // What was there is there; the interrupted volume has no point; the next try succeeds.
      await b2.json(['restore', 'v', dir.join(`after-${signal}.img`)]);
      cmp(image, dir.join(`after-${signal}.img`));
      const again = await b2.json<{ id: string; class: string }>([
        'snapshot',
        large,
        '--volume',
        volume,
      ]);
      expect(again).toMatchObject({ id: '#1', class: 'crash' });
      await b2.json(['restore', volume, dir.join('large.out')]);
      cmp(large, dir.join('large.out'));
      rmSync(dir.join('large.out'));
    },
  );

  it('ends a restore with 130, says that the target is incomplete, and it can go on', async () => {
    await b2.json(['snapshot', large, '--volume', 'whole']);
    const out = dir.join('interrupted.img');
    let done = await interrupted(['restore', 'whole', out], 'SIGINT');
    for (let tries = 0; tries < 8 && done.code === 0; tries++) {
      rmSync(out);
      done = await interrupted(['restore', 'whole', out], 'SIGINT');
    }
    expect([done.code, done.stdout]).toEqual([130, '']);
    const error = jsonLines(done.stderr).at(-1);
    expect(error).toMatchObject({ type: 'error', code: 130 });
    if (existsSync(out))
      expect(String(error?.['message'])).toMatch(/interrupted\.img is incomplete now/);
    await b2.json(['restore', 'whole', out, '--force']);
    cmp(large, out);
    rmSync(out);
  });
});
