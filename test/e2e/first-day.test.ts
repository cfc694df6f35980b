/** What somebody meets in the first days: names that are dates, a copy of the repository, options that would do nothing. */
import { cpSync, mkdirSync, readdirSync, rmSync, writeFileSync } from 'node:fs';
import { afterEach, describe, expect, it, vi } from 'vitest';
import type { RestoreAnswer } from '../../src/commands/run/restore.js';
import type { SnapshotAnswer } from '../../src/commands/run/snapshot.js';
import type { StatusAnswer } from '../../src/commands/run/status.js';
import type { TapeListAnswer } from '../../src/commands/run/tape-list.js';
import { B2 } from '../support/b2.js';
import { tempDir, type TempDir } from '../support/tmp.js';

const dirs: TempDir[] = [];
afterEach(async () => {
  for (const dir of dirs.splice(0)) await dir.remove();
});

/** A repository, and an image with something in it. */
async function made(): Promise<{ dir: TempDir; b2: B2; image: string }> {
  const dir = tempDir();
  dirs.push(dir);
  const b2 = new B2(dir, { B2_RUNTIME_DIR: dir.join('run') });
  await b2.json(['init', '--encryption', 'none']);
  const image = dir.join('image');
  writeFileSync(image, Buffer.alloc(64 * 1024, 1));
  return { dir, b2, image };
}

describe('a new repository', () => {
  it('is not made among the files of somebody else, nor over one whose configuration is lost', async () => {
    const { dir, b2, image } = await made();
    const place = dir.join('home of somebody');
    mkdirSync(`${place}/lost+found`, { recursive: true });
    writeFileSync(`${place}/letter`, 'dear');
    const init = ['--repo', place, 'init', '--encryption', 'none'];
    const refusal = (name: string, where: string): unknown => ({
      type: 'error',
      code: 1,
      message: `${where} holds ${name} but no repository configuration: no new repository is made over it`,
      hint: expect.stringContaining('Name a new or empty directory.') as string,
    });
    expect(await b2.error(init)).toEqual(refusal('letter', place));
    expect(readdirSync(place).sort()).toEqual(['letter', 'lost+found']);
    // A file system's own directory is nobody's.
    rmSync(`${place}/letter`);
    await b2.json(init);

    await b2.json(['snapshot', image, '--volume', 'v']);
    for (const name of ['config', 'config.copy']) rmSync(`${b2.repository}/${name}`);
    expect(await b2.error(['init', '--encryption', 'none'])).toMatchObject({
      code: 1,
      message: expect.stringContaining('but no repository configuration') as string,
    });
  });
});

describe('the name of a snapshot', () => {
  it('that is a date or time means that snapshot, and those without a name have one', async () => {
    const { dir, b2, image } = await made();
    const target = dir.join('target');
    const at = async (text: string): Promise<string> =>
      (await b2.json<RestoreAnswer>(['restore', 'v', target, '--plan', '--at', text])).point.id;
    const first = await b2.json<SnapshotAnswer>(['snapshot', image, '--volume', 'v']);
    writeFileSync(image, Buffer.alloc(64 * 1024, 2));
    const dated = await b2.json<SnapshotAnswer>([
      'snapshot',
      image,
      '--volume',
      'v',
      '--name',
      '2020-01-01',
    ]);
    expect(await at(first.name)).toBe(first.id);
    expect(await at('2020-01-01')).toBe(dated.id);
    // Nobody is called this: a time, before the first point.
    expect(await b2.error(['restore', 'v', target, '--plan', '--at', '2020-01-02'])).toMatchObject({
      code: 4,
    });
    expect(await at('latest')).toBe(dated.id);
  });

  it('cannot be a time that is counted from now', async () => {
    const { b2, image } = await made();
    for (const name of ['now', 'latest', '5m ago', '2 weeks ago'])
      expect(await b2.error(['snapshot', image, '--volume', 'v', '--name', name])).toEqual({
        type: 'error',
        code: 2,
        message: `"${name}" cannot be the name of a snapshot: it means a time`,
        hint: `--at "${name}" would always be that time, never the snapshot. A date may be a name.`,
      });
  });

  it('tells which cartridges it needs', async () => {
    const { dir, b2, image } = await made();
    mkdirSync(dir.join('tape'));
    await b2.json(['snapshot', image, '--volume', 'v', '--name', 'old']);
    writeFileSync(image, Buffer.alloc(64 * 1024, 2));
    await b2.json(['snapshot', image, '--volume', 'v', '--name', 'new']);
    await b2.json(['export-tape', `file:${dir.join('tape')}`, '--label', 'l', '--at', 'old']);
    const needs = ['tape', 'list', '--needs', 'v', '--at'];
    const { needed } = await b2.json<TapeListAnswer>([...needs, 'old']);
    expect(needed?.id).toBe('#1');
    expect(await b2.error([...needs, 'new'])).toMatchObject({
      code: 4,
      message: 'no point of v at that time is on tape',
    });
    expect(await b2.error([...needs, 'nobody'])).toMatchObject({
      code: 4,
      message: '"nobody" is neither a time nor a snapshot of volume v',
    });
  });
});

describe('export-tape of all volumes', () => {
  it('leaves out one that has no such point, and fails where one was named or all are left out', async () => {
    const { dir, b2, image } = await made();
    mkdirSync(dir.join('tape'));
    await b2.json(['snapshot', image, '--volume', 'v', '--name', 'one']);
    await b2.json(['snapshot', image, '--volume', 'w']);
    const tape = ['export-tape', `file:${dir.join('tape')}`, '--label', 'l', '--json'];
    const ended = await b2.start([...tape, '--at', 'one']).ended;
    expect(ended.code).toBe(3);
    expect(JSON.parse(ended.stdout)).toMatchObject({ points: [{ volume: 'v' }], leftOut: ['w'] });
    expect(ended.stderr).toContain(
      'left out: \\"one\\" is neither a time nor a snapshot of volume w',
    );
    expect(
      await b2.error([...tape, '--at', 'one', '--volume', 'v', '--volume', 'w']),
    ).toMatchObject({
      code: 4,
    });
    expect(await b2.error([...tape, '--at', 'two'])).toMatchObject({ code: 4 });
  });
});

describe('a copy of the repository', () => {
  it('does not pass for current because the original is watched', async () => {
    const { dir, b2, image } = await made();
    const watch = b2.start(['watch', image, '--volume', 'v', '--source', 'scan', '--json']);
    try {
      await vi.waitFor(
        async () => {
          const { volumes } = await b2.json<StatusAnswer>(['status']);
          expect(volumes[0]?.watched?.state).toBe('exact');
        },
        { timeout: 20_000, interval: 200 },
      );
      cpSync(b2.repository, dir.join('copy'), { recursive: true });
      const copy = new B2(dir, { B2_RUNTIME_DIR: dir.join('run') }, dir.join('copy'));
      const answer = await copy.json<StatusAnswer>(['status']);
      expect(answer.volumes).toHaveLength(1);
      expect(answer.volumes[0]?.watched).toBeUndefined();
      // However the original is spelled.
      const same = new B2(
        dir,
        { B2_RUNTIME_DIR: dir.join('run') },
        `file://${dir.path}/copy/../repo`,
      );
      const { volumes } = await same.json<StatusAnswer>(['status']);
      expect(volumes[0]?.watched?.state).toBe('exact');
      // A snapshot to the copy is made in the copy.
      const taken = await copy.json<SnapshotAnswer>(['snapshot', image, '--volume', 'v']);
      expect(taken.watched).toBe(false);
    } finally {
      watch.child.kill('SIGTERM');
      await watch.ended;
    }
  });
});

describe('an option that would do nothing', () => {
  it('is refused', async () => {
    const { b2, image } = await made();
    await b2.json(['snapshot', image, '--volume', 'v', '--name', 'one']);
    expect(await b2.error(['verify', 'v', '--at', 'one'])).toMatchObject({ code: 2 });
    expect(await b2.error(['verify', 'v', '--random-point'])).toMatchObject({ code: 2 });
    expect(await b2.error(['verify', '--data', 'none', '--budget', '1m'])).toMatchObject({
      code: 2,
    });
    expect(await b2.error(['tape', 'list', '--at', 'one'])).toMatchObject({
      code: 2,
      message: '--at is for --needs, and without has no effect',
    });
    await b2.json(['verify', 'v', '--at', 'one', '--against', image]);
    expect(
      await b2.error(['serve', 'nbd', 'v', '--writable', '--overlay', '/nonexistent/overlay']),
    ).toMatchObject({ code: 2, message: 'give --writable or --overlay, not both' });
  });
});

describe('a plugin of a monitoring system', () => {
  it('is UNKNOWN on stdout where it cannot be begun', async () => {
    const { b2 } = await made();
    for (const [args, message, env] of [
      [['status', '--nagios', '--max-lag', 'long'], '--max-lag: "long" is not a duration', {}],
      [['verify', '--nagios', '--random-point'], '--random-point is for --fsck or --boot', {}],
      [['verify', '--nagios', '--nonsense'], "unknown option '--nonsense'", {}],
      [['status', '--nagios'], 'cannot read the configuration file', { B2_CONFIG: '/nonexistent' }],
    ] as const) {
      const ended = await b2.start(args, env).ended;
      expect(ended.code).toBe(3);
      expect(ended.stdout).toContain(`B2 UNKNOWN - ${message}`);
      expect(ended.stdout.trimEnd().split('\n')).toHaveLength(1);
    }
  });
});
