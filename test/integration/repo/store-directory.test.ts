/** The directory store on real file systems of several kinds, small enough to fill. */
import { execFileSync } from 'node:child_process';
import { mkdirSync, readdirSync, statSync, truncateSync, writeFileSync } from 'node:fs';
import { afterAll, beforeAll, describe, expect, test } from 'vitest';
import { isKind } from '../../../src/errors.js';
import { alignedMemory } from '../../../src/memory.js';
import { openDirectoryStore } from '../../../src/repo/store-directory.js';
import type { Store } from '../../../src/repo/store.js';
import { requires } from '../../support/requires.js';
import { patterned, storeSuite } from '../../support/store-suite.js';
import { type TempDir, tempDir } from '../../support/tmp.js';

const MIB = 1024 * 1024;

interface FileSystem {
  readonly name: string;
  /** Makes it on an image file; undefined for tmpfs. */
  readonly mkfs: readonly string[] | undefined;
  readonly bytes: number;
}

const FILE_SYSTEMS: readonly FileSystem[] = [
  { name: 'ext4', mkfs: ['mkfs.ext4', '-q', '-F'], bytes: 64 * MIB },
  { name: 'tmpfs', mkfs: undefined, bytes: 32 * MIB },
];

function mountNew({ mkfs, bytes }: FileSystem): { dir: TempDir; mounted: string } {
  const dir = tempDir();
  const mounted = dir.join('mnt');
  mkdirSync(mounted);
  if (mkfs === undefined) {
    execFileSync('mount', ['-t', 'tmpfs', '-o', `size=${bytes}`, 'b2-test', mounted]);
  } else {
    const [program = '', ...options] = mkfs;
    writeFileSync(dir.join('image'), '');
    truncateSync(dir.join('image'), bytes);
    execFileSync(program, [...options, dir.join('image')], { stdio: 'pipe' });
    execFileSync('mount', ['-o', 'loop', dir.join('image'), mounted]);
  }
  return { dir, mounted };
}

for (const fileSystem of FILE_SYSTEMS) {
  const tools = ['mount', ...(fileSystem.mkfs?.slice(0, 1) ?? [])];
  const needs = { root: true, tools, paths: ['/dev/loop-control'] } as const;
  requires(needs).describe(`on ${fileSystem.name}`, () => {
    let dir: TempDir;
    let mounted: string;
    beforeAll(() => {
      ({ dir, mounted } = mountNew(fileSystem));
    });
    afterAll(() => dir.remove());

    let count = 0;
    storeSuite(`DirectoryStore on ${fileSystem.name}`, async () => {
      const root = `${mounted}/repo-${count++}`;
      const store = await openDirectoryStore(root, { create: true });
      return {
        store,
        another: () => openDirectoryStore(root),
        cleanup: async () => {
          await store.close();
          execFileSync('rm', ['-r', root]);
        },
      };
    });

    describe('when it is full', () => {
      async function fill(store: Store): Promise<number> {
        const bytes = patterned(MIB);
        for (let i = 0; ; i++) {
          try {
            await store.put(`fill/${i}`, bytes);
          } catch (error) {
            if (!isKind(error, 'no-space')) throw error;
            return i;
          }
        }
      }

      test('says no-space, keeps what was acknowledged, and works again with room', async () => {
        const root = `${mounted}/full`;
        const store = await openDirectoryStore(root, { create: true });
        const slab = alignedMemory(MIB);
        slab.set(patterned(MIB, 9));
        const appender = await store.openAppend('p', 'create');
        await appender.append(slab);
        await appender.sync();
        const filled = await fill(store);
        expect(filled).toBeGreaterThan(5);
        const outcomes = await Promise.allSettled([
          ...Array.from({ length: 4 }, () => appender.append(slab)),
          appender.sync(),
        ]);
        const refused = outcomes.filter((outcome) => outcome.status === 'rejected');
        expect(refused.length).toBeGreaterThan(0);
        expect(refused.every(({ reason }) => isKind(reason, 'no-space'))).toBe(true);
        await expect(appender.sync()).rejects.toMatchObject({ kind: 'no-space' });
        await appender.close();

        const left = readdirSync(root, { recursive: true }).map(String);
        expect(left.filter((name) => name.includes('~'))).toEqual([]);
        for (let i = 0; i < filled; i++) {
          expect((await store.get(`fill/${i}`)).equals(patterned(MIB))).toBe(true);
        }
        expect((await store.get('p', { offset: 0, length: MIB })).equals(patterned(MIB, 9))).toBe(
          true,
        );
        const space = await store.space();
        expect(space?.freeBytes).toBeLessThan(4 * MIB);
        for (let i = 0; i < 4; i++) await store.delete(`fill/${i}`);
        await store.put('again', slab);
        expect((await store.get('again')).equals(patterned(MIB, 9))).toBe(true);
        await store.close();
        expect(statSync(root).isDirectory()).toBe(true);
        execFileSync('rm', ['-r', root]);
      });
    });
  });
}

requires({ root: true, tools: ['mount', 'umount'] }).describe(
  'a repository that is unmounted',
  () => {
    test('is an error, and nothing is written below the mount point', async () => {
      const { dir, mounted } = mountNew({ name: 'tmpfs', mkfs: undefined, bytes: MIB });
      try {
        const store = await openDirectoryStore(mounted);
        await store.put('packs/a', Buffer.from('x'));
        expect(() => execFileSync('umount', [mounted], { stdio: 'pipe' })).toThrow(/busy/);
        execFileSync('umount', ['-l', mounted]);
        const gone = { kind: 'io', hint: expect.stringContaining('Mount') as string };
        await expect(store.put('packs/b', Buffer.from('x'))).rejects.toMatchObject(gone);
        await expect(store.get('packs/a')).rejects.toMatchObject(gone);
        await expect(store.put('config', Buffer.from('x'))).rejects.toMatchObject(gone);
        expect(readdirSync(mounted)).toEqual([]);
        await store.close();
      } finally {
        await dir.remove();
      }
    });
  },
);
