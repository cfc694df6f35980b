/** `b2 demo`, the README's first command: it shows the main job, touches nothing else and leaves nothing behind. */
import { existsSync, mkdirSync, readdirSync, statSync } from 'node:fs';
import { afterEach, describe, expect, it } from 'vitest';
import { systemClock, systemRandom } from '../../src/clock.js';
import { runDemo, type DemoEvent } from '../../src/demo/demo.js';
import { TRACEFS } from '../../src/devices/trace/instance.js';
import { B2, PROGRAM, jsonLines } from '../support/b2.js';
import { LOOP_NEEDS } from '../support/loop.js';
import { requires } from '../support/requires.js';
import { loopsBelow, tempDir, type TempDir } from '../support/tmp.js';

const COMMANDS = [
  'init',
  'snapshot',
  'snapshot',
  'snapshot',
  'points',
  'restore',
  'restore',
  'watch',
  'snapshot',
  'points',
  'restore',
  'verify',
];

/** A loop device is gone when its last user lets go: another test that looks into all of them, for a moment. */
const GONE = { timeout: 10_000 };

const dirs: TempDir[] = [];
afterEach(async () => {
  for (const dir of dirs.splice(0)) await dir.remove();
});

/** A directory for temporary files, and a b2 that would fail loudly if it used the settings of its user. */
function made(): { readonly dir: TempDir; readonly b2: B2; readonly scratch: string } {
  const dir = tempDir();
  dirs.push(dir);
  const scratch = dir.join('tmp');
  mkdirSync(scratch);
  return {
    dir,
    scratch,
    b2: new B2(dir, { TMPDIR: scratch, B2_PASSWORD: 'not for the demo', B2_CONFIG: undefined }),
  };
}

function b2Commands(events: readonly Record<string, unknown>[]): string[] {
  return events
    .filter((e) => e['type'] === 'command' && String(e['command']).startsWith('b2 '))
    .map((e) => String(e['command']).split(' ')[1] ?? '');
}

requires({ ...LOOP_NEEDS, tools: [...(LOOP_NEEDS.tools ?? []), 'mkfs.ext4'] }).describe(
  'b2 demo',
  () => {
    it('shows snapshot, accident and rollback on a loop device, and removes it all', async () => {
      const { b2, dir, scratch } = made();
      const done = await b2.run('demo');
      expect([done.code, done.stderr]).toEqual([0, '']);
      expect(done.stdout).toMatch(
        /^\nThe disk is \/dev\/loop\d+: a loop device of 96 MiB with ext4 and 25 files\./,
      );
      expect(done.stdout).toMatch(
        /\$ b2 snapshot \/dev\/loop\d+ --volume demo\/disk --name monday\ncaptured demo\/disk as "monday"/,
      );
      expect(done.stdout).toMatch(
        /\$ b2 restore demo\/disk \/dev\/loop\d+ --at tuesday --force\nrestored demo\/disk/,
      );
      expect(done.stdout).toMatch(
        /\d MiB differed and were written; 8\d\.\d MiB were there already/,
      );
      expect(done.stdout).toMatch(/24\nTuesday: all bills are paid/);
      expect(done.stdout).toMatch(/disk, key and repository of the demo are removed\n$/);
      expect(readdirSync(scratch)).toEqual([]);
      await expect.poll(() => loopsBelow(dir.path), GONE).toEqual([]);
      // Neither the repository of the settings nor its cache.
      expect(readdirSync(dir.path)).toEqual(['tmp']);
    });

    it('answers as JSON lines, and leaves all behind with --keep', async () => {
      const { b2, dir } = made();
      const keep = dir.join('kept');
      const done = await b2.run('--json', 'demo', '--keep', keep);
      expect([done.code, done.stderr]).toEqual([0, '']);
      const events = jsonLines(done.stdout);
      expect(b2Commands(events)).toEqual(COMMANDS);
      expect(events.at(-1)).toMatchObject({
        type: 'done',
        dir: keep,
        kept: true,
        diskKind: 'device',
        same: true,
        // Where there are loop devices and block events, they are used.
        watch: { source: existsSync(`${TRACEFS}/instances`) ? 'trace' : 'scan' },
      });
      expect(readdirSync(keep).sort()).toEqual([
        'cache',
        'disk.img',
        'mnt',
        'repo',
        'repo.key',
        'thursday.img',
      ]);
      expect(statSync(keep).mode & 0o777).toBe(0o700);
      await expect.poll(() => loopsBelow(dir.path), GONE).toEqual([]);
      const kept = new B2(dir, { B2_KEY_FILE: `${keep}/repo.key` }, `${keep}/repo`);
      expect((await kept.run('points', 'demo/disk')).stdout).toMatch(
        /monday[^]*tuesday[^]*wednesday/,
      );
      expect(await b2.error(['demo', '--keep', keep])).toMatchObject({
        code: 1,
        message: `will not use ${keep}: it is not empty`,
      });
    });

    it('removes everything when it is interrupted', async () => {
      for (const after of [
        '"command":"b2 init"',
        '--name tuesday',
        '"command":"b2 restore demo/disk /dev/loop',
        '"command":"b2 watch',
        '--name thursday',
      ]) {
        const { b2, dir, scratch } = made();
        const { child, ended } = b2.start(['--json', 'demo']);
        let seen = '';
        child.stdout?.on('data', (text: string) => {
          const was = seen.includes(after);
          seen += text;
          if (!was && seen.includes(after)) child.kill('SIGINT');
        });
        const done = await ended;
        expect([after, done.code]).toEqual([after, 130]);
        expect(jsonLines(done.stderr).at(-1)).toMatchObject({ type: 'error', code: 130 });
        expect(readdirSync(scratch)).toEqual([]);
        await expect.poll(() => loopsBelow(dir.path), GONE).toEqual([]);
      }
    });
  },
);

describe('the demo without a loop device', () => {
  it.each([
    ['ext4', /an image file of 96 MiB with ext4/],
    ['plain', /an image file of 96 MiB\./],
  ] as const)('works on an image: %s', async (kind, what) => {
    const { dir } = made();
    const events: DemoEvent[] = [];
    const keep = dir.join('kept');
    const result = await runDemo({
      program: PROGRAM,
      env: { PATH: process.env['PATH'], HOME: dir.path },
      keep,
      disks: [kind],
      clock: systemClock,
      random: systemRandom,
      signal: new AbortController().signal,
      show: (event) => void events.push(event),
    });
    expect(result).toMatchObject({ diskKind: 'image', disk: 'disk.img', same: true });
    expect(events.map((e) => (e.type === 'chapter' ? e.text : '')).join('\n')).toMatch(what);
    const outputs = events.flatMap((e) => (e.type === 'output' ? [e.text] : []));
    expect(outputs.filter((text) => text.includes('Tuesday: all bills are paid'))).toHaveLength(1);
  });

  it('stops before it begins when it was interrupted, and detaches the disk', async () => {
    const { dir } = made();
    const running = runDemo({
      program: PROGRAM,
      env: { PATH: process.env['PATH'] },
      keep: dir.join('kept'),
      disks: ['loop', 'ext4', 'plain'],
      clock: systemClock,
      random: systemRandom,
      signal: AbortSignal.abort('SIGINT'),
      show: () => undefined,
    });
    await expect(running).rejects.toMatchObject({ code: 130 });
    await expect.poll(() => loopsBelow(dir.path), GONE).toEqual([]);
  });
});
