/** `b2 mount` and `b2 umount` of the built program: in the background, by root and others, and every way to end it. */
import { execFile, spawn } from 'node:child_process';
import { once } from 'node:events';
import {
  chownSync,
  closeSync,
  existsSync,
  mkdirSync,
  openSync,
  readFileSync,
  readdirSync,
  readSync,
  statSync,
  writeFileSync,
} from 'node:fs';
import { join } from 'node:path';
import { createInterface } from 'node:readline';
import { promisify } from 'node:util';
import { afterEach, beforeEach, expect, it } from 'vitest';

import { dataRunsNow } from '../../src/syscalls.js';
import { B2, PROGRAM } from '../support/b2.js';
import { noise, tool } from '../support/disks.js';
import { requires } from '../support/requires.js';
import { mountsBelow, tempDir, type TempDir } from '../support/tmp.js';

const run = promisify(execFile);
const MIB = 1024 * 1024;
const SIZE = 48 * MIB;

interface Answer {
  readonly mountpoint: string;
  readonly pid: number;
  readonly volume?: string;
  readonly points?: readonly { readonly volume: string; readonly seq: number }[];
  readonly logFile: string;
}

let dir: TempDir;
let b2: B2;
let disk: Buffer;

beforeEach(async () => {
  dir = tempDir();
  sources = [];
  b2 = new B2(dir, { B2_KEY_FILE: dir.join('key') });
  mkdirSync(dir.join('m'));
  writeFileSync(dir.join('disk'), '');
  disk = Buffer.alloc(SIZE);
  disk.set(noise(1, 3 * MIB), 2 * MIB);
  disk.set(noise(2, MIB), 30 * MIB);
  writeFileSync(dir.join('disk'), disk);
  tool(
    'sfdisk',
    ['-q', dir.join('disk')],
    'label: gpt\nstart=4096,size=20480\nstart=40960,size=40960\n',
  );
  disk = readFileSync(dir.join('disk'));
  await b2.json(['init']);
  await b2.json(['snapshot', dir.join('disk'), '--volume', 'web/sda', '--name', 'first']);
});
afterEach(() => dir.remove());

const at = (...names: readonly string[]): string => dir.join('m', ...names);

function isAlive(pid: number): boolean {
  try {
    // A zombie has ended; only its parent has not looked yet.
    return !/\) Z /.test(readFileSync(`/proc/${pid}/stat`, 'utf8'));
  } catch {
    return false;
  }
}

async function eventually(what: string, test: () => boolean): Promise<void> {
  for (let i = 0; i < 400; i++) {
    if (test()) return;
    await new Promise((resolve) => setTimeout(resolve, 25));
  }
  throw new Error(`not within ten seconds: ${what}`);
}

/** What the kernel lists as the source of the test's mounts, by which their watchdogs are known. */
let sources: string[];

/** Watchdogs of the test's mounts. */
function watchdogs(): number {
  return readdirSync('/proc').filter((pid) => {
    if (!/^\d+$/.test(pid)) return false;
    try {
      const command = readFileSync(`/proc/${pid}/cmdline`, 'utf8');
      return (
        command.includes('b2-mount-watchdog') && sources.some((source) => command.includes(source))
      );
    } catch {
      return false;
    }
  }).length;
}

async function mount(...options: readonly string[]): Promise<Answer> {
  const answer = await b2.json<Answer>(['mount', at(), ...options]);
  const line = readFileSync('/proc/self/mountinfo', 'utf8')
    .split('\n')
    .find((text) => text.split(' ')[4] === at());
  const source = / - fuse\.b2 (b2-[0-9a-f]+) /.exec(line ?? '')?.[1];
  if (source === undefined) throw new Error(`${at()} is not in the list of mounts`);
  sources.push(source);
  dir.onRemove(() => {
    if (isAlive(answer.pid)) process.kill(answer.pid, 'SIGKILL');
    return eventually('the mount is gone', () => mountsBelow(dir.path).length === 0);
  });
  return answer;
}

async function nothingLeft(answer: Answer): Promise<void> {
  await eventually('no mount', () => mountsBelow(dir.path).length === 0);
  await eventually('no server', () => !isAlive(answer.pid));
  await eventually('no watchdog', () => watchdogs() === 0);
}

requires({ root: true, paths: ['/dev/fuse'], tools: ['sfdisk', 'cmp', 'cp', 'umount'] }).describe(
  'b2 mount',
  () => {
    it('shows disk and partitions as they were, with holes and times, in the background', async () => {
      const answer = await mount();
      expect(isAlive(answer.pid)).toBe(true);
      expect(watchdogs()).toBe(1);
      expect(readdirSync(at('web', 'sda'))).toEqual(['latest', 'points', 'snapshots']);
      const image = at('web', 'sda', 'snapshots', 'first', 'disk.img');
      await run('cmp', [image, dir.join('disk')]);
      for (const [name, from, length] of [
        ['p1.img', 4096, 20_480],
        ['p2.img', 40_960, 40_960],
      ] as const) {
        const part = readFileSync(at('web', 'sda', 'latest', name));
        expect(part.equals(disk.subarray(from * 512, (from + length) * 512))).toBe(true);
      }
      const facts = statSync(image);
      const [point] = (await b2.json<{ points: { time: string }[] }>(['points', 'web/sda'])).points;
      expect(facts.mtime.toISOString().slice(0, 19)).toBe(point?.time.slice(0, 19));
      expect(facts).toMatchObject({ size: SIZE, mode: 0o100400 });

      const fd = openSync(image, 'r');
      const runs = dataRunsNow(fd, 0, 1000);
      closeSync(fd);
      expect(runs.reduce((sum, [start, end]) => sum + end - start, 0)).toBe(facts.blocks * 512);
      expect(facts.blocks * 512).toBeLessThan(6 * MIB);
      let last = 0;
      for (const [start, end] of [...runs, [SIZE, SIZE] as const]) {
        expect(disk.subarray(last, start).every((b) => b === 0)).toBe(true);
        last = end;
      }

      await run('cp', ['--sparse=auto', image, dir.join('copy')]);
      await run('cmp', [dir.join('copy'), dir.join('disk')]);
      expect(statSync(dir.join('copy')).blocks * 512).toBeLessThan(6 * MIB);

      await b2.json(['umount', at()]);
      await nothingLeft(answer);
      expect(readFileSync(answer.logFile, 'utf8')).toBe('');
      expect(statSync(answer.logFile).mode & 0o777).toBe(0o600);
    });

    it('a snapshot made meanwhile is there at once; with --volume and --at only the point', async () => {
      const answer = await mount('--volume', 'web/sda');
      const image = at('latest', 'disk.img');
      await run('cmp', [image, dir.join('disk')]);
      disk.set(noise(3, MIB), 10 * MIB);
      writeFileSync(dir.join('disk'), disk);
      await b2.json(['snapshot', dir.join('disk'), '--volume', 'web/sda', '--name', 'second']);
      await run('cmp', [image, dir.join('disk')]);
      expect(readdirSync(at('snapshots')).sort()).toEqual(['first', 'second']);
      await b2.json(['umount', at()]);
      await nothingLeft(answer);
      const one = await mount('--volume', 'web/sda', '--at', 'second');
      expect(one.points?.map((p) => p.volume)).toEqual(['web/sda']);
      expect(readdirSync(at())).toEqual(['disk.img', 'p1.img', 'p2.img']);
      await run('cmp', [at('disk.img'), dir.join('disk')]);
      process.kill(one.pid, 'SIGTERM');
      await nothingLeft(one);
    });

    it.each(['SIGINT', 'SIGTERM', 'SIGKILL', 'umount', 'SIGTERM twice', 'SIGABRT'])(
      '%s while a file is open leaves nothing',
      async (how) => {
        const answer = await mount();
        const fd = openSync(at('web', 'sda', 'latest', 'disk.img'), 'r');
        readSync(fd, Buffer.alloc(10), 0, 10, 0);
        if (how === 'umount') {
          expect(await b2.error(['umount', at()])).toMatchObject({ code: 1 });
          closeSync(fd);
          await run('umount', [at()]);
        } else {
          const [signal, twice] = how.split(' ');
          process.kill(answer.pid, signal);
          if (twice !== undefined && isAlive(answer.pid)) process.kill(answer.pid, signal);
          await nothingLeft(answer);
          expect(() => readSync(fd, Buffer.alloc(10), 0, 10, SIZE - 10)).toThrow(/ENOTCONN/);
          // Closed it is, but nobody is there to be told.
          expect(() => closeSync(fd)).toThrow(/ENOTCONN/);
        }
        await nothingLeft(answer);
      },
    );

    it('--foreground says that it is live, and ends cleanly by a signal', async () => {
      const child = spawn(PROGRAM, ['--json', 'mount', at(), '--foreground'], {
        env: b2.env,
        stdio: ['ignore', 'pipe', 'inherit'],
      });
      dir.onRemove(() => void child.kill('SIGKILL'));
      const ended = once(child, 'exit') as Promise<[number | null]>;
      const [line] = (await once(createInterface({ input: child.stdout }), 'line')) as [string];
      expect(JSON.parse(line)).toMatchObject({ type: 'mounted', mountpoint: at(), pid: child.pid });
      expect(existsSync(at('web', 'sda', 'latest', 'disk.img'))).toBe(true);
      child.kill('SIGINT');
      expect(await ended).toEqual([0, null]);
      expect(mountsBelow(dir.path)).toEqual([]);
    });

    it('says what is wrong, and leaves no process behind', async () => {
      expect(await b2.error(['mount', dir.join('nothing')])).toMatchObject({ code: 4 });
      expect(await b2.error(['mount', at(), '--volume', 'none'])).toMatchObject({ code: 4 });
      expect(await b2.error(['mount', at(), '--at', '1999-01-01'])).toMatchObject({ code: 4 });
      const wrong = { B2_KEY_FILE: undefined, B2_PASSWORD: 'wrong' };
      expect(await b2.error(['mount', at()], wrong)).toMatchObject({ code: 12 });
      expect(await b2.error(['mount', at()], { B2_REPOSITORY: dir.join('none') })).toMatchObject({
        code: 10,
      });
      expect(await b2.error(['umount', at()])).toMatchObject({ code: 4 });
      expect(await b2.error(['umount', '/proc'])).toMatchObject({ code: 1 });
      expect(mountsBelow(dir.path)).toEqual([]);
    });

    it('damage is EIO and a line of the log that names the pack', async () => {
      const packs = readdirSync(join(b2.repository, 'packs'), {
        recursive: true,
        withFileTypes: true,
      })
        .filter((e) => e.isFile())
        .map((e) => join(e.parentPath, e.name));
      for (const path of packs) {
        const bytes = readFileSync(path);
        for (let i = MIB; i < Math.min(bytes.length, 3 * MIB); i += 4096)
          bytes[i] = (bytes[i] ?? 0) ^ 1;
        await run('chmod', ['u+w', path]);
        writeFileSync(path, bytes);
      }
      const answer = await mount();
      const fd = openSync(at('web', 'sda', 'latest', 'disk.img'), 'r');
      let failed = 0;
      for (let offset = 0; offset < SIZE; offset += 65_536) {
        const buffer = Buffer.alloc(65_536);
        try {
          readSync(fd, buffer, 0, buffer.length, offset);
        } catch {
          failed++;
          continue;
        }
        expect(buffer.equals(disk.subarray(offset, offset + buffer.length))).toBe(true);
      }
      closeSync(fd);
      expect(failed).toBeGreaterThan(10);
      const ids = packs.map((path) => path.split('/').at(-1) ?? '');
      const log = readFileSync(answer.logFile, 'utf8');
      expect(ids.some((id) => log.includes(id))).toBe(true);
      process.kill(answer.pid, 'SIGTERM');
      await nothingLeft(answer);
    });
  },
);

requires({
  root: true,
  paths: ['/dev/fuse'],
  tools: ['fusermount3', 'setpriv', 'unshare', 'mknod', 'sfdisk', 'awk'],
}).describe('b2 mount by an ordinary user', () => {
  it('goes through fusermount3 and leaves nothing, also after kill -9', async () => {
    // A name space of its own, in which everybody may open /dev/fuse, as on an ordinary machine.
    await run('mknod', ['-m', '666', dir.join('fuse'), 'c', '10', '229']);
    await run('chmod', ['755', dir.path]);
    for (const name of ['m', 'repo', 'disk', 'key'])
      await run('chown', ['-R', '65534:65534', dir.join(name)]);
    for (const name of ['cache', 'home']) {
      mkdirSync(dir.join(name), { recursive: true });
      await run('chown', ['-R', '65534:65534', dir.join(name)]);
    }
    chownSync(dir.join('m'), 65_534, 65_534);
    const script = `
        set -e
        gone() { i=0; while grep -q " $PWD/m .* fuse.b2 " /proc/self/mountinfo; do i=$((i+1)); [ $i -lt 200 ]; sleep 0.05; done; }
        pid() { sed 's/.*"pid": *\\([0-9]*\\).*/\\1/;t;d'; }
        cd "$1"
        "$2" --json mount m > home/answer
        cmp m/web/sda/latest/disk.img disk
        grep 'fuse.b2 .*user_id=65534' /proc/self/mountinfo
        "$2" umount m
        gone
        "$2" --json mount m > home/answer
        kill -9 $(pid <home/answer)
        gone
        "$2" --json mount m > home/answer
        kill $(pid <home/answer)
        gone
        echo all well`;
    writeFileSync(dir.join('user.sh'), script);
    // Mounts of tests beside this one are in the new name space, too, where nobody else would take them away.
    const outer = `mount --make-rprivate / && {
        awk '$5 ~ /\\/b2-test-/ { print $5 }' /proc/self/mountinfo | while read -r other; do umount -i -c -l "$other"; done
        umount -i -c -l -a -t fuse.b2
        mount --bind "$1/fuse" /dev/fuse; } && exec setpriv --reuid 65534 --regid 65534 --clear-groups sh "$1/user.sh" "$1" "$2"`;
    const { stdout } = await run('unshare', ['-m', 'sh', '-c', outer, 'sh', dir.path, PROGRAM], {
      env: { ...(b2.env as NodeJS.ProcessEnv), HOME: dir.join('home') },
    });
    expect(stdout).toContain('all well');
  });
});
