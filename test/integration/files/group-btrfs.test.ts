/**
 * Btrfs over several devices, each of which is a volume: made and written by this machine's kernel, taken while it is mounted, and read
 * while the original stays mounted, written to and unharmed.
 */
import { execFileSync } from 'node:child_process';
import { copyFileSync, readFileSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { afterAll, beforeAll, expect, it } from 'vitest';

import { systemClock } from '../../../src/clock.js';
import { messageOf } from '../../../src/errors.js';
import type { B2Event } from '../../../src/events.js';
import { openFileAccess } from '../../../src/files/access.js';
import type { Companions } from '../../../src/files/companions.js';
import type { BackendName, FileAccess, FoundFileSystem } from '../../../src/files/types.js';
import { checkFileSystems, type FileSystemCheck } from '../../../src/verify/fsck.js';
import { FileImage } from '../../support/image-memory.js';
import {
  LOOP_NEEDS,
  attachLoop,
  mountDevice,
  runTool,
  sparseFile,
  type Loop,
} from '../../support/loop.js';
import { requires } from '../../support/requires.js';
import { tempDir, type TempDir } from '../../support/tmp.js';

const MIB = 1024 * 1024;
const needs = {
  ...LOOP_NEEDS,
  tools: [...(LOOP_NEEDS.tools ?? []), 'mkfs.btrfs', 'btrfs', 'python3', 'unshare', 'nsenter'],
  paths: [...(LOOP_NEEDS.paths ?? []), '/dev/fuse'],
};
/** More profiles, each from every device, and in the tiny virtual machine, too: some minutes. */
const FULL = process.env['B2_TEST_GROUP_FULL'] === '1';
const BACKENDS: readonly BackendName[] = FULL ? ['kernel', 'vm'] : ['kernel'];
const PROFILES = [
  ['raid0', 2, '-m', 'raid1', '-d', 'raid0'],
  ['raid1', 2, '-m', 'raid1', '-d', 'raid1', '--csum', 'sha256'],
  ['single', 3, '-m', 'single', '-d', 'single'],
] as const;

requires(needs).describe('btrfs over several volumes of a group', () => {
  let dir: TempDir;
  const events: B2Event[] = [];

  beforeAll(() => {
    dir = tempDir();
  });
  afterAll(() => dir.remove());

  /** Copies of its devices, taken while it was mounted and nothing wrote; it is written to after that, and stays mounted. */
  async function make(name: string, count: number, ...options: readonly string[]): Promise<Made> {
    const loops: Loop[] = [];
    for (let i = 0; i < count; i++)
      loops.push(await attachLoop(dir, sparseFile(dir, `${name}${i}`, 128 * MIB)));
    const devices = loops.map((l) => l.device);
    await runTool('mkfs.btrfs', '-q', '-f', ...options, ...devices);
    await runTool('btrfs', 'device', 'scan', ...devices);
    const mount = await mountDevice(dir, devices[0] ?? '', `${name}-mounted`);
    const files: Record<string, Buffer> = {};
    for (let i = 0; i < 20; i++) {
      const bytes = Buffer.alloc(MIB + i * 4097, `${name} ${i} `);
      files[`/file${i}`] = bytes;
      writeFileSync(join(mount.path, `file${i}`), bytes);
    }
    await runTool('sync', '--file-system', mount.path);
    // Only its log has this one.
    const late =
      "import os, sys; f = os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT); os.write(f, b'fsynced'); os.fsync(f)";
    execFileSync('python3', ['-c', late, join(mount.path, 'late')]);
    files['/late'] = Buffer.from('fsynced');
    const copies = loops.map((l) => l.file.replace(/$/, '.copy'));
    loops.forEach((l, i) => copyFileSync(l.file, copies[i] ?? ''));
    for (const path of Object.keys(files)) writeFileSync(join(mount.path, path), 'new');
    await runTool('sync', '--file-system', mount.path);
    return {
      copies,
      files,
      end: async () => {
        for (const path of Object.keys(files))
          expect(readFileSync(join(mount.path, path), 'utf8')).toBe('new');
        await runTool('btrfs', 'scrub', 'start', '-B', mount.path);
        await mount.unmount();
        // The kernel has remembered none of the copies for it.
        await runTool('btrfs', 'device', 'scan', ...devices);
        const again = await mountDevice(dir, devices[0] ?? '', `${name}-again`);
        expect(readFileSync(join(again.path, 'late'), 'utf8')).toBe('new');
        await again.unmount();
        await runTool('btrfs', 'device', 'scan', '--forget', ...devices);
        for (const l of loops) await l.detach();
      },
    };
  }
  interface Made {
    readonly copies: readonly string[];
    readonly files: Readonly<Record<string, Buffer>>;
    readonly end: () => Promise<void>;
  }

  const companionsOf = (files: readonly string[], missing = false): Companions => ({
    group: 'data',
    there: files.map((file, index) => ({
      volume: `lab/${index}`,
      index,
      openImage: () => Promise.resolve(new FileImage(file)),
    })),
    missing: missing
      ? [{ volume: 'lab/gone', reason: 'lab/gone has no point of that instant' }]
      : [],
  });
  const open = (first: string, companions: Companions, backend: BackendName): Promise<FileAccess> =>
    openFileAccess({
      openImage: () => Promise.resolve(new FileImage(first)),
      companions: () => Promise.resolve(companions),
      name: 'lab/first at #1',
      backend,
      clock: systemClock,
      events: (event) => events.push(event),
      cacheDir: dir.path,
    });

  function check({ copies: [first = '', ...others] }: Made): Promise<readonly FileSystemCheck[]> {
    return checkFileSystems(new FileImage(first), {
      name: 'lab/first',
      clock: systemClock,
      events: () => undefined,
      cacheDir: dir.path,
      companions: () => Promise.resolve(companionsOf(others)),
    });
  }

  async function contents(access: FileAccess, made: Made): Promise<void> {
    const fileSystem = access.fileSystems.find((f) => f.type === 'btrfs');
    const found: Record<string, Buffer> = {};
    for (const path of Object.keys(made.files)) {
      const parts: Uint8Array[] = [];
      for await (const part of access.read({ fileSystem: fileSystem as FoundFileSystem, path }))
        parts.push(part);
      found[path] = Buffer.concat(parts);
    }
    for (const [path, bytes] of Object.entries(made.files))
      expect(found[path]?.equals(bytes), path).toBe(true);
  }

  for (const [name, count, ...options] of PROFILES.slice(0, FULL ? undefined : 1)) {
    it(`${name}: from any of them, while the original is mounted`, async () => {
      const made = await make(name, count, ...options);
      try {
        for (const [i, first] of made.copies.slice(0, FULL ? undefined : 1).entries()) {
          const others = made.copies.filter((_, n) => n !== i);
          for (const backend of BACKENDS) {
            const access = await open(first, companionsOf(others), backend);
            try {
              await contents(access, made);
            } finally {
              await access.close();
            }
          }
          const lacks = await open(first, companionsOf(others.slice(1), true), 'kernel');
          try {
            expect(lacks.notShown.join()).toContain('lab/gone has no point of that instant');
            const [fileSystem] = lacks.fileSystems;
            await expect(
              lacks.stat({ fileSystem: fileSystem as FoundFileSystem, path: '/late' }, false),
            ).rejects.toThrow(/lies on . devices and is not shown: lab\/gone has no point/);
          } finally {
            await lacks.close();
          }
        }
        expect(await check(made)).toEqual([
          {
            name: 'disk',
            type: 'btrfs',
            state: 'sound',
            how: expect.stringMatching(
              /^mounted, journal replayed; not btrfs check .* has, or may/,
            ),
          },
        ]);
      } catch (error) {
        throw new Error(messageOf(error), { cause: error });
      } finally {
        await made.end();
      }
      expect(await check(made)).toEqual([
        {
          name: 'disk',
          type: 'btrfs',
          state: 'sound',
          how: 'mounted, journal replayed, btrfs check --readonly',
        },
      ]);
    });
  }
});
