/**
 * A mount served by this process, over the real /dev/fuse. What looks into it are other processes or libuv's threads: this thread
 * serves, and would wait for itself.
 */
import { execFile } from 'node:child_process';
import { mkdirSync, readFileSync, readdirSync } from 'node:fs';
import { open, readFile, stat } from 'node:fs/promises';
import { promisify } from 'node:util';
import { afterEach, beforeEach, expect, it } from 'vitest';

import { systemClock } from '../../../src/clock.js';
import type { B2Event } from '../../../src/events.js';
import { serveMount, type Mounted } from '../../../src/mount/server.js';
import { openMountTree } from '../../../src/mount/tree.js';
import { Repository } from '../../../src/repo/repository.js';
import { newModel, seeded, type ModelVolume } from '../../support/model-volume.js';
import { requires } from '../../support/requires.js';
import { MemoryStore } from '../../support/store-memory.js';
import { mountsBelow, tempDir, type TempDir } from '../../support/tmp.js';
import type { VolumeWriter } from '../../../src/repo/volume-writer.js';

const run = promisify(execFile);
const SIZE = 4 * 1024 * 1024;

let dir: TempDir;
let store: MemoryStore;
let repo: Repository;
let model: ModelVolume;
let writer: VolumeWriter;
let events: B2Event[];

beforeEach(async () => {
  dir = tempDir();
  mkdirSync(dir.join('m'));
  store = new MemoryStore({ record: false });
  ({ repo, model, writer } = await newModel(store, seeded(4), { sizeBytes: SIZE }));
  const all = Array.from({ length: SIZE / 4096 }, (_, i) => i);
  for (let i = 0; i < 12; i++) model.mutate(9);
  await model.capture(writer, all, true);
  for (let i = 0; i < 5; i++) await model.capture(writer, model.mutate(5));
  events = [];
});
afterEach(() => dir.remove());

async function mount(repository = repo): Promise<Mounted> {
  const tree = await openMountTree({
    repo: repository,
    clock: systemClock,
    warn: (message) => void events.push({ type: 'warning', message }),
  });
  const mounted = await serveMount({
    tree,
    mountpoint: dir.join('m'),
    events: (event) => void events.push(event),
    clock: systemClock,
  });
  dir.onRemove(async () => {
    await mounted.close();
    await tree.close();
  });
  return mounted;
}

const LATEST = ['m', 'host', 'sda', 'latest', 'disk.img'];

function openDescriptors(): number {
  return readdirSync('/proc/self/fd').length;
}

/** Children of this process that still run. */
function children(): readonly string[] {
  return readFileSync(`/proc/self/task/${process.pid}/children`, 'utf8')
    .trim()
    .split(' ')
    .filter(Boolean);
}

const needs = requires({ root: true, paths: ['/dev/fuse'] });

needs.describe('a mount', () => {
  it('reads as the disk was, at random places and many at once', async () => {
    await mount();
    const path = dir.join(...LATEST);
    expect((await readFile(path)).equals(model.data)).toBe(true);
    const file = await open(path);
    const random = seeded(9);
    try {
      for (let round = 0; round < 20; round++) {
        await Promise.all(
          Array.from({ length: 32 }, async () => {
            const offset = Math.floor(random() * SIZE);
            const length = Math.floor(random() * Math.min(300_000, SIZE - offset));
            const { buffer, bytesRead } = await file.read(Buffer.alloc(length), 0, length, offset);
            expect(bytesRead).toBe(length);
            expect(buffer.equals(model.data.subarray(offset, offset + length))).toBe(true);
          }),
        );
      }
    } finally {
      await file.close();
    }
    expect(events).toEqual([]);
  });

  it('cannot be written to', async () => {
    await mount();
    await expect(open(dir.join(...LATEST), 'r+')).rejects.toMatchObject({ code: 'EROFS' });
    await expect(open(dir.join('m', 'new'), 'w')).rejects.toMatchObject({ code: 'EROFS' });
  });

  it('shows a new point under latest at once, and an open file stays', async () => {
    await mount();
    const path = dir.join(...LATEST);
    const before = Buffer.from(model.data);
    const file = await open(path);
    try {
      for (let i = 0; i < 4; i++) {
        await model.capture(writer, model.mutate(3));
        expect((await readFile(path)).equals(model.data)).toBe(true);
      }
      const { buffer } = await file.read(Buffer.alloc(SIZE), 0, SIZE, 0);
      expect(buffer.equals(before)).toBe(true);
    } finally {
      await file.close();
    }
    // Another process: Node's recursive readdir calls stat in this thread, which must answer it.
    const { stdout } = await run('find', [
      dir.join('m', 'host', 'sda', 'points'),
      '-mindepth',
      '3',
      '-maxdepth',
      '3',
    ]);
    expect(stdout.trim().split('\n')).toHaveLength(model.acknowledged.length);
  });

  it('damage is EIO and a warning, what is sound stays readable', async () => {
    await writer.close();
    const packs: string[] = [];
    for await (const { name } of store.list('packs')) packs.push(name);
    for (const name of packs) {
      const bytes = await store.get(name);
      for (let at = 4096; at < bytes.length / 2; at += 5003) bytes[at] = (bytes[at] ?? 0) ^ 1;
      await store.put(name, bytes);
    }
    const damaged = await Repository.open(store, [], repo.env);
    await mount(damaged);
    const file = await open(dir.join(...LATEST));
    let failed = 0;
    try {
      for (let at = 0; at < SIZE; at += 4096) {
        try {
          const { buffer } = await file.read(Buffer.alloc(4096), 0, 4096, at);
          expect(buffer.equals(model.data.subarray(at, at + 4096))).toBe(true);
        } catch (error) {
          expect(error).toMatchObject({ code: 'EIO' });
          failed++;
        }
      }
    } finally {
      await file.close();
    }
    expect(failed).toBeGreaterThan(0);
    expect(failed).toBeLessThan(SIZE / 4096);
    const ids = packs.map((name) => name.split('/').at(-1) ?? name);
    expect(
      events.some((e) => e.type === 'warning' && ids.some((id) => e.message.includes(id))),
    ).toBe(true);
  });

  it('ends by umount of somebody, and by close although it is in use', async () => {
    const first = await mount();
    await stat(dir.join('m', 'host'));
    await run('umount', [dir.join('m')]);
    await first.ended;
    const second = await mount();
    const file = await open(dir.join(...LATEST));
    try {
      await second.close();
      expect(mountsBelow(dir.path)).toEqual([]);
      await expect(file.read(Buffer.alloc(10), 0, 10, SIZE - 10)).rejects.toMatchObject({
        code: 'ENOTCONN',
      });
    } finally {
      // Closed it is, but nobody is there to be told.
      await expect(file.close()).rejects.toMatchObject({ code: 'ENOTCONN' });
    }
  });

  it('refuses a second mount at the same place, a file, and nothing', async () => {
    await mount();
    await expect(mount()).rejects.toMatchObject({ kind: 'refused' });
    const tree = await openMountTree({ repo, clock: systemClock, warn: () => undefined });
    const at = (mountpoint: string): Promise<Mounted> =>
      serveMount({ tree, mountpoint, events: () => undefined, clock: systemClock });
    await expect(at(dir.join('nothing'))).rejects.toMatchObject({ kind: 'not-found' });
    await expect(at('/etc/passwd')).rejects.toMatchObject({ kind: 'refused' });
    await tree.close();
  });

  it('leaves nothing: 50 times no mount, descriptor, thread or process', async () => {
    const cycle = async (byUmount: boolean): Promise<void> => {
      const tree = await openMountTree({ repo, clock: systemClock, warn: () => undefined });
      const mounted = await serveMount({
        tree,
        mountpoint: dir.join('m'),
        events: () => undefined,
        clock: systemClock,
      });
      await stat(dir.join(...LATEST));
      if (byUmount) await run('umount', [dir.join('m')]);
      else await mounted.close();
      await mounted.ended;
      await tree.close();
    };
    await cycle(true);
    await cycle(false);
    const before = openDescriptors();
    const threads = readdirSync('/proc/self/task').length;
    const running = children();
    for (let i = 0; i < 50; i++) await cycle(i % 2 === 0);
    expect(openDescriptors()).toBeLessThanOrEqual(before);
    expect(readdirSync('/proc/self/task').length).toBeLessThanOrEqual(threads + 1);
    expect(children()).toEqual(running);
    expect(mountsBelow(dir.path)).toEqual([]);
  });
});
