/** `b2 mount --files`: the file systems inside points as directories, and what is left when it ends. */
import { execFileSync } from 'node:child_process';
import { createHash } from 'node:crypto';
import {
  closeSync,
  copyFileSync,
  existsSync,
  mkdirSync,
  openSync,
  readFileSync,
  readdirSync,
  readlinkSync,
  readSync,
  statSync,
} from 'node:fs';
import { connect } from 'node:net';
import { afterAll, beforeAll, expect, it } from 'vitest';

import { B2, PROGRAM } from '../support/b2.js';
import { tool } from '../support/disks.js';
import { changeTree, differences, growTree, TREE_NEEDS } from '../support/file-tree.js';
import { LOOP_NEEDS, makeFileSystem, mountDevice, newLoop } from '../support/loop.js';
import { requires } from '../support/requires.js';
import { mountsBelow, tempDir, type TempDir } from '../support/tmp.js';

const MIB = 1024 * 1024;
/** 1,000 and more with the environment variable; in any case every way to end is among them. */
const CYCLES = Number(process.env['B2_TEST_MOUNT_CYCLES'] ?? 20);

interface Mounted {
  readonly mountpoint: string;
  readonly pid: number;
}

const needs = {
  ...LOOP_NEEDS,
  tools: [
    ...(LOOP_NEEDS.tools ?? []),
    ...(TREE_NEEDS.tools ?? []),
    'unshare',
    'nsenter',
    'setpriv',
  ],
  paths: [...(LOOP_NEEDS.paths ?? []), '/dev/fuse'],
};

/** Processes that serve mounts of that b2 (its holder and its agent), by what their command lines say. */
function helpersOf(pid: number): readonly string[] {
  return readdirSync('/proc').filter((name) => {
    if (!/^\d+$/.test(name)) return false;
    try {
      const line = readFileSync(`/proc/${name}/cmdline`, 'latin1');
      if (line.includes(`\0b2-files\0/mnt\0${pid}\0`)) return true;
      if (!line.includes('/files/agent.js')) return false;
      return new RegExp(`^PPid:\\s${pid}$`, 'm').test(readFileSync(`/proc/${name}/status`, 'utf8'));
    } catch {
      return false;
    }
  });
}

/** Namespaces of mounts in which these servers have mounted a file, seen from the processes that hold them; tests beside this one have theirs. */
function namespaces(servers: ReadonlySet<number>): ReadonlySet<string> {
  const found = new Set<string>();
  for (const name of readdirSync('/proc').filter((n) => /^\d+$/.test(n))) {
    try {
      // Its holder is told for whom it is (src/files/kernel.ts).
      const held = /\0b2-files\0[^\0]+\0(\d+)\0/.exec(
        readFileSync(`/proc/${name}/cmdline`, 'latin1'),
      );
      if (!servers.has(Number(held?.[1]))) continue;
      const mounts = readFileSync(`/proc/${name}/mounts`, 'latin1');
      if (/ fuse\.b2 /.test(mounts) && mounts.includes(' /mnt/disk '))
        found.add(readlinkSync(`/proc/${name}/ns/mnt`));
    } catch {
      continue;
    }
  }
  return found;
}

function looped(): readonly string[] {
  return readdirSync('/sys/block').filter((name) => {
    const file = `/sys/block/${name}/loop/backing_file`;
    try {
      return readFileSync(file, 'utf8').startsWith('/mnt/disk');
    } catch {
      // None, or one that goes this moment.
      return false;
    }
  });
}

async function eventually(what: string, test: () => boolean): Promise<void> {
  for (let i = 0; i < 1200; i++) {
    if (test()) return;
    await new Promise((resolve) => setTimeout(resolve, 25));
  }
  throw new Error(`not within thirty seconds: ${what}`);
}

function isAlive(pid: number): boolean {
  try {
    return !/\) Z /.test(readFileSync(`/proc/${pid}/stat`, 'utf8'));
  } catch {
    return false;
  }
}

requires(needs).describe('b2 mount --files', () => {
  let dir: TempDir;
  let b2: B2;
  let source: string;
  let before: readonly string[];

  beforeAll(async () => {
    dir = tempDir();
    b2 = new B2(dir);
    before = looped();
    const loop = await newLoop(dir, 'part', 64 * MIB);
    await makeFileSystem('ext4', loop.device);
    source = (await mountDevice(dir, loop.device, 'source')).path;
    growTree(source, true);
    execFileSync('sync', ['-f', source]);
    changeTree(source);
    // A disk with two partitions; the second one is dirty, the first one swap space.
    execFileSync('truncate', ['-s', '80M', dir.join('disk')]);
    tool('sfdisk', ['-q', dir.join('disk')], 'label: gpt\nstart=2048,size=8192\nstart=16384\n');
    copyFileSync(loop.file, dir.join('dirty'));
    tool('dd', [
      `if=${dir.join('dirty')}`,
      `of=${dir.join('disk')}`,
      'bs=1M',
      'seek=8',
      'conv=notrunc,sparse',
      'status=none',
    ]);
    mkdirSync(dir.join('m'));
    await b2.json(['init', '--encryption', 'none']);
    await b2.json(['snapshot', dir.join('disk'), '--volume', 'web/sda', '--name', 'first']);
  });
  afterAll(() => dir.remove());

  const mount = (): Promise<Mounted> =>
    b2.json<Mounted>(['mount', dir.join('m'), '--volume', 'web/sda', '--files']);

  const mountImages = (): Promise<Mounted> =>
    b2.json<Mounted>(['mount', dir.join('m'), '--volume', 'web/sda']);

  /** Whoever watches over something of this test: its socket. */
  const watchers = (): readonly string[] =>
    readdirSync('/proc').filter((name) => {
      if (!/^\d+$/.test(name)) return false;
      try {
        const line = readFileSync(`/proc/${name}/cmdline`, 'utf8');
        return line.includes(`\0b2-leftovers\0${dir.path}/`);
      } catch {
        return false;
      }
    });

  /** Serves NBD on a socket to one client, and ends. */
  const serveAndEnd = async (signal: NodeJS.Signals): Promise<void> => {
    const { child, ended } = b2.start(['serve', 'nbd', 'web/sda', '--socket', dir.join('s')]);
    await new Promise((resolve) => child.stdout?.once('data', resolve));
    const client = connect(dir.join('s'));
    const greeting = await new Promise<Buffer>((resolve, reject) => {
      client.once('data', resolve);
      client.once('error', reject);
    });
    expect(greeting.toString('latin1', 0, 16)).toBe('NBDMAGICIHAVEOPT');
    child.kill(signal);
    const end = await ended;
    client.destroy();
    expect(signal === 'SIGKILL' ? end.signal : end.code).toBe(signal === 'SIGKILL' ? signal : 0);
    // What was shot could not remove it: who watched over it does.
    await eventually(
      `nbd, ${signal}: everything gone`,
      () => !existsSync(dir.join('s')) && watchers().length === 0,
    );
    expect(readdirSync(dir.path).filter((name) => name.startsWith('.b2-'))).toEqual([]);
  };

  const isGone = (pid: number): boolean =>
    !isAlive(pid) &&
    helpersOf(pid).length === 0 &&
    !mountsBelow(dir.path).includes(dir.join('m')) &&
    looped().every((name) => before.includes(name));

  it('shows them with everything that they know, from the journal too', async () => {
    const { pid } = await mount();
    const point = dir.join('m/snapshots/first');
    expect(readdirSync(point).sort()).toEqual(['disk.img', 'p1.img', 'p2', 'p2.img']);
    // Not before somebody looks into it.
    expect(statSync(`${point}/p2`).isDirectory()).toBe(true);
    expect(helpersOf(pid)).toEqual([]);
    expect(readFileSync(`${point}/p2/late/file`, 'utf8')).toBe('only in the journal\n');
    expect(helpersOf(pid).length).toBeGreaterThan(0);
    expect(differences(source, `${point}/p2`)).toBe('');
    expect(mountsBelow(dir.join('m'))).toEqual([dir.join('m')]);
    expect(() => execFileSync('touch', [`${point}/p2/new`], { stdio: 'pipe' })).toThrow(
      /Read-only/,
    );
    const digest = (path: string): string =>
      createHash('sha256').update(readFileSync(path)).digest('hex');
    expect(digest(`${point}/p2/etc/deep/er/random`)).toBe(digest(`${source}/etc/deep/er/random`));
    expect((await b2.run('umount', dir.join('m'))).code).toBe(0);
    await eventually('everything gone', () => isGone(pid));
  });

  it('of a repository nothing changes by the replay', async () => {
    expect((await b2.run('verify', '--data', 'all')).code).toBe(0);
    await b2.json(['restore', 'web/sda', dir.join('again')]);
    execFileSync('cmp', [dir.join('disk'), dir.join('again')]);
  });

  it(
    `leaves no mount, loop device, socket or process behind, ${CYCLES} times`,
    async () => {
      const ways = ['umount', 'SIGKILL', 'SIGTERM', 'SIGINT', 'agent', 'busy'] as const;
      const servers = new Set<number>();
      for (let i = 0; i < CYCLES; i++) {
        // In turn: file systems inside, images, NBD.
        const what = (['files', 'images', 'nbd'] as const)[i % 3] ?? 'files';
        const way = ways[Math.floor(i / 3) % ways.length] ?? 'umount';
        if (what === 'nbd') {
          await serveAndEnd(way === 'SIGKILL' || way === 'SIGINT' ? way : 'SIGTERM');
          continue;
        }
        const { pid } = await (what === 'files' ? mount() : mountImages());
        servers.add(pid);
        const inside = dir.join(what === 'files' ? 'm/latest/p2/late/file' : 'm/latest/p2.img');
        const fd = openSync(inside, 'r');
        const head = Buffer.alloc(20);
        readSync(fd, head, 0, head.length, what === 'files' ? 0 : 1024);
        if (way !== 'busy') closeSync(fd);
        if (what === 'files') expect(namespaces(servers).size).toBe(1);
        if (what === 'files') expect(head.toString()).toBe('only in the journal\n');
        else expect(head.some((byte) => byte !== 0)).toBe(true);
        if (way === 'umount') {
          expect((await b2.run('umount', dir.join('m'))).code).toBe(0);
        } else if (way === 'agent') {
          // Its helpers are shot: reading fails, and the mount still ends in order.
          for (const helper of helpersOf(pid)) process.kill(Number(helper), 'SIGKILL');
          expect((await b2.run('umount', dir.join('m'))).code).toBe(0);
        } else if (way === 'busy') {
          // A file is open in it, which then cannot be read any more.
          try {
            expect((await b2.run('umount', '--lazy', dir.join('m'))).code).toBe(0);
            process.kill(pid, 'SIGTERM');
            await eventually('the server has ended', () => !isAlive(pid));
          } finally {
            closeSync(fd);
          }
        } else {
          process.kill(pid, way);
        }
        await eventually(`${what}, ${way}: everything gone`, () => isGone(pid));
        if (i % 100 === 99) process.stderr.write(`${i + 1} cycles\n`);
      }
      expect(namespaces(servers).size).toBe(0);
    },
    120_000 + CYCLES * 3000,
  );

  it('is for root only, and says what others can do', () => {
    let said = '';
    try {
      execFileSync(
        'setpriv',
        [
          '--reuid=65534',
          '--regid=65534',
          '--clear-groups',
          process.execPath,
          PROGRAM,
          'mount',
          '/tmp',
          '--files',
          '--foreground',
        ],
        { stdio: 'pipe', env: { PATH: process.env['PATH'], B2_CONFIG: '/dev/null', HOME: '/' } },
      );
    } catch (error) {
      said = String((error as { readonly stderr: Buffer }).stderr);
    }
    expect(said).toContain('--files mounts file systems, which only root may do');
  });
});
