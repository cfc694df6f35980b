import {
  readFileSync,
  statSync,
  writeFileSync,
  existsSync,
  readdirSync,
  truncateSync,
} from 'node:fs';
import { afterEach, describe, expect, it } from 'vitest';

import { systemClock } from '../../../src/clock.js';
import { B2Error } from '../../../src/errors.js';
import { ignoreEvents, type B2Event } from '../../../src/events.js';
import { packName } from '../../../src/format/names.js';
import { openDirectoryStore } from '../../../src/repo/store-directory.js';
import type { Store } from '../../../src/repo/store.js';
import { VM_FORMATS } from '../../../src/restore/convert.js';
import {
  planRestore,
  restore,
  type RestoreOptions,
  type RestoreSource,
} from '../../../src/restore/restore.js';
import { writeImage } from '../../../src/restore/write-image.js';
import { verifyPacks } from '../../../src/verify/data.js';
import { DISK_NEEDS, noise, pokeWithDd, tool } from '../../support/disks.js';
import {
  LOOP_NEEDS,
  attachLoop,
  makeFileSystem,
  mountDevice,
  newLoop,
  runTool,
  sparseFile,
} from '../../support/loop.js';
import { imageOf, makePackImage, storeBytes, type PackImage } from '../../support/pack-image.js';
import { memoryDevice } from '../../support/device-memory.js';
import { requires } from '../../support/requires.js';
import { tempDir, type TempDir } from '../../support/tmp.js';

const MIB = 1024 * 1024;
const SIZE = 48 * MIB;

interface Made extends PackImage {
  readonly dir: TempDir;
  readonly store: Store;
  readonly restoreSource: RestoreSource;
}

const dirs: TempDir[] = [];

afterEach(async () => {
  for (const dir of dirs.splice(0)) await dir.remove();
});

async function make(seed: number, sizeBytes = SIZE, encrypted = true): Promise<Made> {
  const dir = tempDir();
  dirs.push(dir);
  const url = dir.join('repo');
  const store = await openDirectoryStore(url, { create: true });
  dir.onRemove(() => store.close());
  return withSource(
    dir,
    url,
    store,
    await makePackImage({ store, seed, sizeBytes, encrypted, storeUrl: url }),
  );
}

function withSource(dir: TempDir, url: string, store: Store, made: PackImage): Made {
  return {
    ...made,
    dir,
    store,
    restoreSource: {
      ...made.source,
      repositoryPath: url,
      image: () => Promise.resolve(imageOf(made)),
    },
  };
}

/** An image of full chunks with the bytes that `content` makes. */
async function stored(content: (dir: TempDir) => Buffer): Promise<Made> {
  const dir = tempDir();
  dirs.push(dir);
  const url = dir.join('repo');
  const store = await openDirectoryStore(url, { create: true });
  dir.onRemove(() => store.close());
  return withSource(dir, url, store, await storeBytes({ store, storeUrl: url }, content(dir)));
}

function storedNoise(length: number): Promise<Made> {
  return stored(() => Buffer.from(noise(length, length)));
}

function options(target: string, more: Partial<RestoreOptions> = {}): RestoreOptions {
  return {
    target,
    format: 'raw',
    force: false,
    grow: false,
    verify: true,
    full: false,
    skipDamaged: false,
    clock: systemClock,
    events: ignoreEvents,
    ...more,
  };
}

describe('restore to a file', () => {
  it.each([true, false])('makes a new, sparse file (encrypted: %s)', async (encrypted) => {
    const made = await make(1, SIZE - 1536, encrypted);
    const target = made.dir.join('out.img');
    const result = await restore(made.restoreSource, options(target));
    expect(readFileSync(target).equals(made.expected)).toBe(true);
    expect(result).toMatchObject({
      targetKind: 'file',
      verified: true,
      isWhole: true,
      sizeBytes: SIZE - 1536,
    });
    const { blocks, mode } = statSync(target);
    expect(blocks * 512).toBeLessThan(SIZE - 4 * MIB);
    expect(mode & 0o777).toBe(0o600);
  });

  it('refuses a file that is there, and goes over it with force, whatever its length', async () => {
    const made = await make(2);
    const target = made.dir.join('out.img');
    for (const length of [SIZE / 2, SIZE + 5 * MIB]) {
      writeFileSync(target, noise(3, length));
      await expect(restore(made.restoreSource, options(target))).rejects.toMatchObject({
        kind: 'refused',
      });
      expect(readFileSync(target).equals(Buffer.from(noise(3, length)))).toBe(true);
      await restore(made.restoreSource, options(target, { force: true }));
      expect(readFileSync(target).equals(made.expected)).toBe(true);
    }
  });

  it('says that an interrupted target is incomplete, and goes on from it', async () => {
    const made = await make(4);
    const target = made.dir.join('out.img');
    const abort = new AbortController();
    const events = (event: B2Event): void => {
      if (event.type === 'progress' && event.doneBytes > 0) abort.abort('SIGINT');
    };
    const failure: unknown = await restore(
      made.restoreSource,
      options(target, { events, signal: abort.signal, clock: { monotonicNs: ticking() } }),
    ).catch((error: unknown) => error);
    expect(failure).toMatchObject({ kind: 'interrupted', code: 130 });
    if (existsSync(target)) {
      expect(String(failure)).toMatch(/is incomplete now/);
      await restore(made.restoreSource, options(target, { force: true }));
      expect(readFileSync(target).equals(made.expected)).toBe(true);
    }
  });

  it('leaves no file of zeros when the first pack is damaged', async () => {
    const made = await make(5);
    for (const packId of made.packIds)
      await made.store.put(packName(packId), Buffer.alloc(4096, 1));
    const target = made.dir.join('out.img');
    await expect(restore(made.restoreSource, options(target))).rejects.toMatchObject({
      kind: 'damaged',
      code: 5,
    });
    expect(existsSync(target)).toBe(false);
  });

  it('refuses what can be no target', async () => {
    const made = await make(6, MIB);
    await expect(restore(made.restoreSource, options(made.dir.path))).rejects.toMatchObject({
      kind: 'refused',
    });
    await expect(
      restore(made.restoreSource, options(made.dir.join('repo', 'x.img'))),
    ).rejects.toThrow(/lies inside the repository/);
    await expect(
      restore(made.restoreSource, options(made.dir.join('no', 'such.img'))),
    ).rejects.toThrow(/no directory/);
  });

  it.each(['write', 'read', 'sync'] as const)(
    'stops all threads when the target fails (%s)',
    async (what) => {
      const made = await make(8);
      const device = memoryDevice(Buffer.from(noise(9, SIZE)));
      device.before = (now) => {
        if (now === what && device.writes.length > 2) throw new B2Error('io', `${what} failed`);
      };
      await expect(
        writeImage(made.source, device, {
          compare: 'never',
          isBlank: false,
          verify: true,
          onDamage: 'stop',
          clock: systemClock,
          events: ignoreEvents,
        }),
      ).rejects.toThrow(`${what} failed`);
    },
  );

  it('verifies packs in threads', async () => {
    const made = await make(7);
    const list = made.packIds.map((packId) => ({ packId }));
    const [first = ''] = made.packIds;
    const good = await verifyPacks(list, {
      handle: made.handle,
      store: made.store,
      clock: systemClock,
      events: ignoreEvents,
    });
    expect(good).toMatchObject({ findings: [], packs: list.length, next: list.length });
    const bytes = await made.store.get(packName(first));
    bytes[5000] = (bytes[5000] ?? 0) ^ 1;
    await made.store.put(packName(first), bytes);
    const bad = await verifyPacks(list, {
      handle: made.handle,
      store: made.store,
      clock: systemClock,
      events: ignoreEvents,
    });
    expect(bad.findings.map((f) => [f.kind, f.packId])).toEqual([['frame', first]]);
  });
});

function ticking(): () => bigint {
  let now = 0n;
  return () => (now += 1_000_000_000n);
}

requires(LOOP_NEEDS).describe('restore to a block device', () => {
  it.each([512, 4096] as const)(
    'overwrites it with force, holes included, and leaves what lies behind (%i)',
    async (sectorBytes) => {
      const made = await make(11);
      const loop = await newLoop(made.dir, 'disk', SIZE + 8 * MIB, { sectorBytes });
      const old = noise(7, SIZE + 8 * MIB);
      pokeWithDd(loop.device, 0, old);
      await expect(restore(made.restoreSource, options(loop.device))).rejects.toThrow(
        /unknown data|it holds/,
      );
      const notes: string[] = [];
      const result = await restore(
        made.restoreSource,
        options(loop.device, {
          force: true,
          events: (e) => void (e.type === 'note' && notes.push(e.message)),
        }),
      );
      expect(result).toMatchObject({
        targetKind: 'block',
        targetBytes: SIZE + 8 * MIB,
        verified: true,
      });
      await loop.detach();
      const after = readFileSync(loop.file);
      expect(after.subarray(0, SIZE).equals(made.expected)).toBe(true);
      expect(after.subarray(SIZE).equals(Buffer.from(old.subarray(SIZE)))).toBe(true);
      expect(notes.join()).toMatch(/larger than the image/);
    },
  );

  it('rolls back by writing only what differs, as planned', async () => {
    const made = await make(12);
    const file = made.dir.join('disk');
    writeFileSync(file, made.expected);
    const loop = await attachLoop(made.dir, file);
    for (const at of [0, 5 * MIB + 77, 20 * MIB, SIZE - 4096])
      pokeWithDd(loop.device, at, noise(at + 1, 4096));
    const plan = await planRestore(made.restoreSource, options(loop.device));
    expect(plan.compared).toBe(true);
    expect(plan.contents.length).toBeGreaterThan(0);
    expect(plan.differingBytes).toBeGreaterThanOrEqual(4 * 4096);
    expect(plan.differingBytes).toBeLessThanOrEqual(5 * 65536);
    const result = await restore(made.restoreSource, options(loop.device, { force: true }));
    expect((result.written?.writtenBytes ?? 0) + (result.written?.zeroedBytes ?? 0)).toBe(
      plan.differingBytes,
    );
    await loop.detach();
    expect(readFileSync(file).equals(made.expected)).toBe(true);
  });

  it('reads only footers for what is the same', async () => {
    const made = await storedNoise(16 * MIB);
    const file = made.dir.join('disk');
    const changed = Buffer.from(made.expected);
    for (const at of [3 * MIB, 9 * MIB + 100]) changed.set(noise(at, 4096), at);
    writeFileSync(file, changed);
    const loop = await attachLoop(made.dir, file);
    const plan = await planRestore(made.restoreSource, options(loop.device));
    expect(plan).toMatchObject({ compared: true, differingBytes: 2 * 65536, differingExtents: 2 });
    expect(plan.repositoryReadBytes).toBeLessThan(3 * 65536);
    const result = await restore(made.restoreSource, options(loop.device, { force: true }));
    expect(result.written).toMatchObject({
      writtenBytes: 2 * 65536,
      writtenExtents: 2,
      unchangedBytes: 16 * MIB - 2 * 65536,
    });
    await loop.detach();
    expect(readFileSync(file).equals(made.expected)).toBe(true);
  });

  it('refuses a device that is too small, naming both sizes', async () => {
    const made = await make(13, 4 * MIB);
    const loop = await newLoop(made.dir, 'disk', 4 * MIB - 4096);
    await expect(
      restore(made.restoreSource, options(loop.device, { force: true })),
    ).rejects.toThrow(/too small: it has .*\(4190208 bytes\), the image needs .*\(4194304 bytes\)/);
  });

  it('refuses a mounted device, also with force', async () => {
    const made = await make(14, 4 * MIB);
    const loop = await newLoop(made.dir, 'disk', 64 * MIB);
    await makeFileSystem('ext4', loop.device);
    const mount = await mountDevice(made.dir, loop.device, 'mnt');
    await expect(
      restore(made.restoreSource, options(loop.device, { force: true })),
    ).rejects.toThrow(/mounted on/);
    const plan = await planRestore(made.restoreSource, options(loop.device));
    expect(plan.obstacles.join()).toMatch(/mounted on/);
    await mount.unmount();
    await expect(restore(made.restoreSource, options(loop.device))).rejects.toThrow(
      /ext4 file system/,
    );
    await restore(made.restoreSource, options(loop.device, { force: true }));
  });
});

requires(DISK_NEEDS).describe('restore to a larger disk', () => {
  it('moves the backup GPT and grows the last partition and its file system', async () => {
    // An image of a real partitioned disk, put into packs as it is.
    const { dir, restoreSource } = await stored((d) => {
      const source = sparseFile(d, 'source', 96 * MIB);
      tool('sfdisk', ['--quiet', source], 'label: gpt\nstart=2048\n');
      return readFileSync(source);
    });
    const loop = await newLoop(dir, 'disk', 160 * MIB);
    const result = await restore(restoreSource, options(loop.device, { grow: true }));
    expect(result.grown?.done.length).toBeGreaterThan(0);
    expect(tool('sgdisk', ['--verify', loop.device])).toMatch(/No problems found/);
  });
});

requires({ tools: ['qemu-img'] }).describe('VM formats', () => {
  it.each(VM_FORMATS)('writes %s, compared with the image', async (format) => {
    const made = await make(21);
    const target = made.dir.join(`vm.${format}`);
    const result = await restore(made.restoreSource, options(target, { format }));
    expect(result.verified).toBe(true);
    // Clusters of up to 1 MiB, and tables.
    expect(result.allocatedBytes).toBeLessThan(SIZE + 4 * MIB);
    await runTool('qemu-img', 'convert', '-f', format, '-O', 'raw', target, made.dir.join('back'));
    truncateSync(made.dir.join('back'), SIZE);
    expect(readFileSync(made.dir.join('back')).equals(made.expected)).toBe(true);
    await expect(restore(made.restoreSource, options(target, { format }))).rejects.toMatchObject({
      kind: 'refused',
    });
  });

  it('leaves nothing behind when data is damaged', async () => {
    const made = await make(22);
    const [first = ''] = made.packIds;
    await made.store.delete(packName(first));
    const before = readdirSync(made.dir.path);
    await expect(
      restore(made.restoreSource, options(made.dir.join('vm.qcow2'), { format: 'qcow2' })),
    ).rejects.toMatchObject({
      kind: 'damaged',
    });
    expect(readdirSync(made.dir.path)).toEqual(before);
  });
});
