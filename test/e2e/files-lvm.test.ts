/**
 * `b2 mount --files` on volumes that LVM keeps in structures of its own: a disk that Debian's LVM and kernel have made
 * (test/fixtures/lvm), every file of it compared with what that machine said of it.
 */
import { createHash } from 'node:crypto';
import { execFile } from 'node:child_process';
import { closeSync, existsSync, openSync, readdirSync, readFileSync, readSync } from 'node:fs';
import { mkdir, readdir, readFile } from 'node:fs/promises';
import { fileURLToPath } from 'node:url';
import { afterAll, beforeAll, expect, it } from 'vitest';

import { findGuestKernel } from '../../src/files/guest.js';
import { B2 } from '../support/b2.js';
import { tool } from '../support/disks.js';
import { LOOP_NEEDS } from '../support/loop.js';
import { requires } from '../support/requires.js';
import { mountsBelow, tempDir, type TempDir } from '../support/tmp.js';

const FIXTURE = fileURLToPath(new URL('../fixtures/lvm/', import.meta.url));
const hasKernel = (await findGuestKernel()) !== undefined;
const needs = {
  ...LOOP_NEEDS,
  tools: [
    ...(LOOP_NEEDS.tools ?? []),
    'unshare',
    'nsenter',
    'tar',
    'gzip',
    'qemu-system-x86_64',
    'busybox',
    'lvm',
    'perl',
  ],
  paths: [...(LOOP_NEEDS.paths ?? []), '/dev/fuse'],
  also: () => (hasKernel ? undefined : 'a kernel in /boot with modules'),
};

/** Processes that `pid` has started and that are of that program. */
function childrenOf(pid: number, program: string): readonly number[] {
  return readdirSync('/proc')
    .filter((name) => {
      if (!/^\d+$/.test(name)) return false;
      try {
        return (
          readFileSync(`/proc/${name}/comm`, 'utf8').startsWith(program) &&
          new RegExp(`^PPid:\\s${pid}$`, 'm').test(readFileSync(`/proc/${name}/status`, 'utf8'))
        );
      } catch {
        return false;
      }
    })
    .map(Number);
}

async function eventually(what: string, test: () => boolean): Promise<void> {
  for (let i = 0; i < 1200; i++) {
    if (test()) return;
    await new Promise((resolve) => setTimeout(resolve, 25));
  }
  throw new Error(`not within thirty seconds: ${what}`);
}

requires(needs).describe('b2 mount --files and LVM', () => {
  let dir: TempDir;
  let b2: B2;
  let loopsBefore: readonly string[];
  const looped = (): readonly string[] =>
    readdirSync('/sys/block').filter((name) => {
      const file = `/sys/block/${name}/loop/backing_file`;
      try {
        return readFileSync(file, 'utf8').startsWith('/mnt/disk');
      } catch {
        // None, or one that goes this moment.
        return false;
      }
    });

  beforeAll(async () => {
    dir = tempDir();
    b2 = new B2(dir);
    loopsBefore = looped();
    tool('tar', ['-C', dir.path, '-xSzf', `${FIXTURE}volumes.tar.gz`]);
    await mkdir(dir.join('m'));
    await b2.json(['init', '--encryption', 'none']);
    await b2.json(['snapshot', dir.join('disk'), '--volume', 'lab/sda']);
  });
  afterAll(() => dir.remove());

  it('shows thin, RAID, mirror, snapshot and cached volumes, and ends with all that it has started', async () => {
    const log = dir.join('log');
    const { pid } = await b2.json<{ readonly pid: number }>([
      'mount',
      dir.join('m'),
      '--volume',
      'lab/sda',
      '--files',
      '--log',
      log,
    ]);
    const top = dir.join('m/latest');
    expect(await readdir(top)).toContain('labvg');
    // What was looked at needs no machine, and names that are not there start none.
    expect(existsSync(`${top}/labvg/nothing`)).toBe(false);
    expect(await readFile(`${top}/labvg/root/late`, 'utf8')).toBe('fsynced\n');
    expect(childrenOf(pid, 'qemu')).toEqual([]);
    expect((await readdir(`${top}/labvg`)).sort()).toEqual(
      'cached mirror raid0 raid1 raid10 raid5 raid6 root snap thin thinsnap'.split(' '),
    );
    const [machine, another] = childrenOf(pid, 'qemu');
    expect(another).toBeUndefined();
    const kept = 'raid6/random';
    const sums = readFileSync(`${FIXTURE}sums`, 'utf8').trim().split('\n');
    const wanted = sums.map((line) => line.split('  ')).filter(([, path]) => path !== kept);
    expect(wanted.length).toBeGreaterThan(40);
    const found: (readonly string[])[] = [];
    for (const [, path = ''] of wanted) {
      // The RAID 1 of MD is on p6 and p7.
      const inPoint = path.startsWith('md/') ? path.replace(/^md/, 'p6') : `labvg/${path}`;
      const bytes = await readFile(`${top}/${inPoint}`);
      found.push([createHash('sha256').update(bytes).digest('hex'), path]);
    }
    expect(found).toEqual(wanted);
    const said = readFileSync(log, 'utf8');
    expect(said).toContain(
      "LVM in a tiny virtual machine puts volumes together, and this machine's",
    );
    expect(said).toContain('left out: labvg/full: LVM has started it, but nothing of it can be');
    expect(said).toMatch(/p6: read from one member of the RAID 1 array \\?"lab:data/);
    expect(said).toMatch(/p7: it is another member of the RAID 1 array .* of which p6 is one/);

    // A machine that dies is an error, never zeros.
    const fd = openSync(`${top}/labvg/${kept}`, 'r');
    process.kill(machine ?? 0, 'SIGKILL');
    await eventually('the machine is gone', () => childrenOf(pid, 'qemu').length === 0);
    try {
      expect(() => readSync(fd, Buffer.alloc(3000), 0, 3000, 0)).toThrow(/EIO/);
    } finally {
      closeSync(fd);
    }
    expect(readFileSync(log, 'utf8')).toContain('the tiny virtual machine has ended unexpectedly');

    // The next look starts another; killed meanwhile, nothing stays.
    const reader = execFile('cat', [`${top}/labvg/${kept}`], () => undefined);
    await eventually('another machine', () => childrenOf(pid, 'qemu').length === 1);
    const [second = 0] = childrenOf(pid, 'qemu');
    process.kill(pid, 'SIGKILL');
    await eventually(
      'everything is gone',
      () =>
        !existsSync(`/proc/${second}`) &&
        mountsBelow(dir.path).length === 0 &&
        looped().every((name) => loopsBefore.includes(name)),
    );
    reader.kill();
  });
});
