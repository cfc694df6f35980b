/** `b2 ls`, `cat` and `restore --path` of the built program, on real file systems whose journals are dirty. */
import {
  chmodSync,
  copyFileSync,
  existsSync,
  lstatSync,
  mkdirSync,
  readFileSync,
  readdirSync,
  statSync,
  symlinkSync,
  writeFileSync,
} from 'node:fs';
import { execFileSync } from 'node:child_process';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';

import { B2 } from '../support/b2.js';
import { changeTree, differences, growTree, TREE_NEEDS } from '../support/file-tree.js';
import {
  LOOP_NEEDS,
  makeFileSystem,
  makerOf,
  mountDevice,
  newLoop,
  type FileSystem,
} from '../support/loop.js';
import { requires } from '../support/requires.js';
import { loopsBelow, mountsBelow, tempDir, type TempDir } from '../support/tmp.js';

const MIB = 1024 * 1024;

interface Listed {
  readonly fileSystem?: string;
  readonly fileSystems: readonly { readonly name: string; readonly type: string }[];
  readonly backends: readonly string[];
  readonly entries?: readonly {
    readonly path: string;
    readonly kind: string;
    readonly mode: string;
    readonly uid: number;
    readonly sizeBytes: number;
    readonly target?: string;
  }[];
}
interface Restored {
  readonly tree: {
    readonly target: string;
    readonly files: number;
    readonly backend: string;
    readonly damaged: readonly { readonly path: string }[];
    readonly owners: boolean;
  };
}

const needs = {
  ...LOOP_NEEDS,
  tools: [
    ...(LOOP_NEEDS.tools ?? []),
    ...(TREE_NEEDS.tools ?? []),
    'unshare',
    'nsenter',
    makerOf('xfs'),
    makerOf('btrfs'),
  ],
  paths: [...(LOOP_NEEDS.paths ?? []), '/dev/fuse'],
};

/** Processes that a b2 of this id has started for its mounts. */
function remains(pid: number | undefined): readonly string[] {
  const found: string[] = [];
  for (const name of readdirSync('/proc').filter((n) => /^\d+$/.test(n))) {
    try {
      const line = readFileSync(`/proc/${name}/cmdline`, 'latin1').replaceAll('\0', ' ');
      if (line.includes(` b2-files /mnt ${pid} `)) found.push(line);
    } catch {
      continue;
    }
  }
  return found;
}

/** Loop devices on the file of a kernel backend: those of this machine, whosever they are. */
function looped(): readonly string[] {
  return readdirSync('/sys/block').filter((name) => {
    const file = `/sys/block/${name}/loop/backing_file`;
    return existsSync(file) && readFileSync(file, 'utf8').startsWith('/mnt/disk');
  });
}

const KINDS: readonly FileSystem[] = ['ext4', 'xfs', 'btrfs'];

requires(needs).describe('with the kernel of this machine', () => {
  for (const type of KINDS) {
    describe(type, () => {
      let dir: TempDir;
      let b2: B2;
      let source: string;

      beforeAll(async () => {
        dir = tempDir();
        b2 = new B2(dir);
        const loop = await newLoop(dir, 'disk', 320 * MIB);
        await makeFileSystem(type, loop.device);
        const mount = await mountDevice(dir, loop.device, 'source');
        source = mount.path;
        growTree(source, true);
        execFileSync('sync', ['-f', source]);
        changeTree(source);
        // What a power cut would leave: the file system is mounted, its last changes are in the log only.
        copyFileSync(loop.file, dir.join('image'));
        await b2.json(['init', '--encryption', 'none']);
        await b2.json(['snapshot', dir.join('image'), '--volume', 'host/disk']);
        // A copy of a btrfs is not mounted beside its original: the tests look at it when that is gone.
        if (type === 'btrfs') {
          execFileSync('cp', ['-a', source, dir.join('kept')]);
          await mount.unmount();
          await loop.detach();
          source = dir.join('kept');
        }
      });
      afterAll(() => dir.remove());

      it('restores a whole tree as it was, with what only the journal had', async () => {
        const { tree } = await b2.json<Restored>(
          ['restore', 'host/disk', dir.join('out'), '--path', '/'],
          0,
        );
        expect(tree.backend).toBe('kernel');
        expect(tree.damaged).toEqual([]);
        expect(readFileSync(dir.join('out/late/file'), 'utf8')).toBe('only in the journal\n');
        expect(differences(source, dir.join('out'))).toBe('');
        const sparse = statSync(dir.join('out/var/sparse'));
        expect(sparse.size).toBe(300 * MIB);
        expect(sparse.blocks * 512).toBeLessThan(4 * MIB);
        expect(statSync(dir.join('out/etc/hosts')).ino).toBe(
          statSync(dir.join('out/etc/deep/hosts-too')).ino,
        );
      });

      it('lists and prints', async () => {
        const top = await b2.json<Listed>(['ls', 'host/disk']);
        expect(top.fileSystem).toBe('disk');
        expect(top.backends).toEqual(['kernel']);
        const etc = await b2.json<Listed>(['ls', 'host/disk:/etc', '-R']);
        const names = etc.entries?.map((e) => e.path);
        expect(names).toEqual([
          '/etc/deep',
          '/etc/deep/er',
          '/etc/deep/er/random',
          '/etc/deep/hosts-too',
          '/etc/empty',
          '/etc/hosts',
        ]);
        const deep = etc.entries?.[0];
        expect(deep).toMatchObject({ kind: 'directory', mode: '2775' });
        expect(etc.entries?.at(-1)).toMatchObject({ kind: 'file', uid: 1234 });
        const printed = await b2.run('cat', 'host/disk:late/moved');
        expect(printed.code).toBe(0);
        expect(printed.stdout).toBe(readFileSync(`${source}/late/moved`, 'utf8'));
        // A link inside is followed inside, never into this machine.
        expect((await b2.run('cat', 'host/disk:/var/absolute')).stdout).toContain('changed');
        expect(await b2.error(['cat', 'host/disk:/var/escape'])).toMatchObject({ code: 4 });
        expect(await b2.error(['cat', 'host/disk:/var/dangling'])).toMatchObject({ code: 4 });
        expect(await b2.error(['cat', 'host/disk:/etc'])).toMatchObject({ code: 1 });
      });
    });
  }

  describe('refusals and merging', () => {
    let dir: TempDir;
    let b2: B2;

    beforeAll(async () => {
      dir = tempDir();
      b2 = new B2(dir);
      const loop = await newLoop(dir, 'disk', 64 * MIB);
      await makeFileSystem('ext4', loop.device);
      const mount = await mountDevice(dir, loop.device, 'source');
      growTree(mount.path, false);
      chmodSync(`${mount.path}/etc/hosts`, 0o640);
      await mount.unmount();
      await b2.json(['init', '--encryption', 'none']);
      await b2.json(['snapshot', loop.device, '--volume', 'host/disk']);
    });
    afterAll(() => dir.remove());

    const restore = (path: string, target: string, ...more: readonly string[]): string[] => [
      'restore',
      'host/disk',
      target,
      '--path',
      path,
      ...more,
    ];

    it('a path that is not there ends with code 4 and makes nothing', async () => {
      const error = await b2.error(restore('/etc/nothing', dir.join('none')));
      expect(error.code).toBe(4);
      expect(error.message).toContain('/etc/nothing');
      expect(existsSync(dir.join('none'))).toBe(false);
    });

    it('one file goes into the directory under its own name', async () => {
      mkdirSync(dir.join('one'));
      const { tree } = await b2.json<Restored>(restore('etc/hosts', dir.join('one')));
      expect(tree).toMatchObject({ files: 1, target: dir.join('one/hosts') });
      expect(readdirSync(dir.join('one'))).toEqual(['hosts']);
      expect(statSync(dir.join('one/hosts')).mode & 0o7777).toBe(0o640);
    });

    it('does not touch what is there without --force, and replaces files with it', async () => {
      mkdirSync(dir.join('full/etc/deep'), { recursive: true });
      writeFileSync(dir.join('full/etc/hosts'), 'mine');
      writeFileSync(dir.join('full/etc/kept'), 'mine too');
      const error = await b2.error(restore('/etc', dir.join('full')));
      expect(error.code).toBe(1);
      expect(error.message).toContain('full/etc/hosts');
      expect(readFileSync(dir.join('full/etc/hosts'), 'utf8')).toBe('mine');
      expect(readdirSync(dir.join('full/etc')).sort()).toEqual(['deep', 'hosts', 'kept']);
      await b2.json(restore('/etc', dir.join('full'), '--force'));
      expect(readFileSync(dir.join('full/etc/hosts'), 'utf8')).toContain('localhost');
      expect(readFileSync(dir.join('full/etc/kept'), 'utf8')).toBe('mine too');
      expect(statSync(dir.join('full/etc/deep/er/random')).size).toBe(3_000_000);
      expect(readdirSync(dir.join('full'))).toEqual(['etc']);
    });

    it('no symbolic link in the target leads out of it', async () => {
      mkdirSync(dir.join('trap'));
      mkdirSync(dir.join('outside'));
      symlinkSync(dir.join('outside'), dir.join('trap/etc'));
      const error = await b2.error(restore('/etc', dir.join('trap')));
      expect(error.message).toContain('trap/etc');
      expect(readdirSync(dir.join('outside'))).toEqual([]);
      // With --force the link itself is replaced.
      await b2.json(restore('/etc', dir.join('trap'), '--force'));
      expect(readdirSync(dir.join('outside'))).toEqual([]);
      expect(lstatSync(dir.join('trap/etc')).isDirectory()).toBe(true);
    });

    it('a directory is not replaced by a file, even with --force', async () => {
      mkdirSync(dir.join('block/hosts'), { recursive: true });
      const error = await b2.error(restore('/etc/hosts', dir.join('block'), '--force'));
      expect(error.message).toContain('is a directory');
      expect(readdirSync(dir.join('block'))).toEqual(['hosts']);
    });

    it('options for whole volumes are wrong usage', async () => {
      expect(await b2.error(restore('/etc', dir.join('x'), '--grow'))).toMatchObject({ code: 2 });
      expect(await b2.error(restore('/etc', dir.join('x'), '--format', 'qcow2'))).toMatchObject({
        code: 2,
      });
    });

    it('a damaged file is an error that names the pack, and is left out of a tree', async () => {
      const packs = dir.join('repo/packs');
      const files = readdirSync(packs, { recursive: true, encoding: 'utf8' })
        .map((name) => `${packs}/${name}`)
        .filter((path) => statSync(path).isFile())
        .sort((a, b) => statSync(b).size - statSync(a).size);
      // Most of what is stored are the three megabytes of one file that does not compress.
      const pack = files[0] ?? '';
      const bytes = readFileSync(pack);
      const copy = Buffer.from(bytes);
      const middle = Math.floor(copy.length / 2);
      copy.fill(0xa5, middle, middle + 64);
      chmodSync(pack, 0o600);
      writeFileSync(pack, copy);
      try {
        const printed = await b2.run('cat', 'host/disk:/etc/deep/er/random');
        expect(printed.code).toBe(5);
        expect(printed.stderr).toContain(pack.slice(-32));
        const restored = await b2.json<Restored>(restore('/etc', dir.join('part')), 3);
        expect(restored.tree.damaged.map((d) => d.path)).toEqual(['/etc/deep/er/random']);
        expect(existsSync(dir.join('part/etc/deep/er/random'))).toBe(false);
        expect(readFileSync(dir.join('part/etc/hosts'), 'utf8')).toContain('localhost');
      } finally {
        writeFileSync(pack, bytes);
      }
    });

    it('leaves no mount, loop device or process, also when it is killed', async () => {
      const before = looped();
      for (const signal of ['SIGTERM', 'SIGINT', 'SIGKILL'] as const) {
        const { child, ended } = b2.start(['cat', 'host/disk:/etc/deep/er/random']);
        // It has chosen who reads: the mount is being made, or there.
        await new Promise<void>((resolve) => {
          void ended.then(() => resolve());
          child.stderr?.on('data', (text: string) => {
            if (text.includes('backend kernel')) resolve();
          });
        });
        child.kill(signal);
        const { code } = await ended;
        if (signal !== 'SIGKILL') expect([0, 130]).toContain(code);
        for (let i = 0; i < 200 && remains(child.pid).length > 0; i++)
          await new Promise((resolve) => setTimeout(resolve, 50));
        expect(remains(child.pid)).toEqual([]);
      }
      const own = (): readonly string[] => looped().filter((name) => !before.includes(name));
      for (let i = 0; i < 100 && own().length > 0; i++)
        await new Promise((resolve) => setTimeout(resolve, 50));
      expect(own()).toEqual([]);
      expect(mountsBelow(dir.path)).toEqual([]);
      expect(loopsBelow(dir.path).length).toBe(1);
    });
  });
});
