/** The tree over real repositories in memory, looked at as the kernel does. */
import { afterEach, describe, expect, it } from 'vitest';
import type { B2Event } from '../../../src/events.js';
import { PointClass } from '../../../src/format/commit.js';
import { Errno } from '../../../src/mount/protocol.js';
import { openMountTree, type MountTree, type MountTreeOptions } from '../../../src/mount/tree.js';
import { VolumeHistory } from '../../../src/repo/history.js';
import { Repository } from '../../../src/repo/repository.js';
import { Timeline } from '../../../src/repo/timeline.js';
import { addSnapshot, listVolumes } from '../../../src/repo/volume.js';
import type { VolumeWriter } from '../../../src/repo/volume-writer.js';
import { parseWhen } from '../../../src/when.js';
import {
  CHUNK_BYTES,
  digestOf,
  newModel,
  seeded,
  type ModelVolume,
} from '../../support/model-volume.js';
import { SteppedClock } from '../../support/stepped-clock.js';
import { MemoryStore } from '../../support/store-memory.js';
import { TestKernel } from './kernel.js';

const SIZE = 512 * 1024;
const DATA = 3;
const HOLE = 4;

interface Made {
  readonly store: MemoryStore;
  readonly repo: Repository;
  readonly model: ModelVolume;
  readonly writer: VolumeWriter;
}

let trees: { tree: MountTree; kernel: TestKernel }[] = [];
let warnings: string[] = [];

afterEach(async () => {
  for (const { tree, kernel } of trees) {
    await kernel.session.close();
    await tree.close();
    expect(tree.openImages).toBe(0);
  }
  trees = [];
  warnings = [];
});

/** An MBR with one primary partition and an extended one with two logical ones; the rest is noise and holes. */
async function make(seed = 1, points = 3): Promise<Made> {
  const store = new MemoryStore({ record: false });
  const random = seeded(seed);
  const { repo, model, writer } = await newModel(store, random, { sizeBytes: SIZE });
  const entry = (at: number, type: number, first: number, count: number): void => {
    model.data[at + 4] = type;
    model.data.writeUInt32LE(first, at + 8);
    model.data.writeUInt32LE(count, at + 12);
  };
  for (const sector of [0, 256, 512]) {
    model.data[sector * 512 + 510] = 0x55;
    model.data[sector * 512 + 511] = 0xaa;
  }
  entry(446, 0x83, 64, 128);
  entry(462, 0x05, 256, 700);
  entry(256 * 512 + 446, 0x83, 8, 100);
  entry(256 * 512 + 462, 0x05, 256, 300);
  entry(512 * 512 + 446, 0x83, 8, 5000); // longer than the disk
  for (let i = 64 * 512; i < 100 * 512; i++) model.data[i] = Math.floor(random() * 256);
  for (let i = 600 * 512; i < 620 * 512; i++) model.data[i] = Math.floor(random() * 256);
  await model.capture(
    writer,
    Array.from({ length: SIZE / 4096 }, (_, i) => i),
    true,
  );
  for (let p = 1; p < points; p++) {
    model.data[300 * 512 + p] = p;
    await model.capture(writer, [Math.floor((300 * 512) / 4096)]);
  }
  return { store, repo, model, writer };
}

async function mount(
  repo: Repository,
  options: Partial<MountTreeOptions> = {},
): Promise<{ kernel: TestKernel; tree: MountTree }> {
  const warn = (message: string): void => void warnings.push(message);
  const tree = await openMountTree({ repo, clock: repo.env.clock, warn, ...options });
  const events = (event: B2Event): void => {
    if (event.type === 'warning') warnings.push(event.message);
  };
  const kernel = new TestKernel(tree.root(), events);
  trees.push({ tree, kernel });
  return { kernel, tree };
}

async function readAll(kernel: TestKernel, ...path: readonly string[]): Promise<Buffer> {
  const { node, sizeBytes } = await kernel.walk(...path);
  const handle = await kernel.open(node);
  const parts: Buffer[] = [];
  for (let at = 0; at < sizeBytes; at += 100_000) {
    const reply = await kernel.read(handle, at, 100_000);
    if (reply.errno !== 0) throw new Error(`errno ${reply.errno}`);
    parts.push(reply.payload);
  }
  await kernel.release(handle);
  return Buffer.concat(parts);
}

describe('what a mount shows', () => {
  it('has the disk and its partitions at every point, byte for byte', async () => {
    const { repo, model } = await make();
    const { kernel } = await mount(repo);
    const top = ['host', 'sda'];
    expect(await kernel.names(1)).toEqual(['host']);
    expect(await kernel.names((await kernel.walk(...top)).node)).toEqual([
      'latest',
      'snapshots',
      'points',
    ]);
    const latest = await kernel.walk(...top, 'latest');
    expect(await kernel.names(latest.node)).toEqual(['disk.img', 'p1.img', 'p5.img', 'p6.img']);
    expect((await readAll(kernel, ...top, 'latest', 'disk.img')).equals(model.data)).toBe(true);
    const part = (from: number, to: number): Buffer => model.data.subarray(from * 512, to * 512);
    expect((await readAll(kernel, ...top, 'latest', 'p1.img')).equals(part(64, 192))).toBe(true);
    expect((await readAll(kernel, ...top, 'latest', 'p5.img')).equals(part(264, 364))).toBe(true);
    expect((await readAll(kernel, ...top, 'latest', 'p6.img')).equals(part(520, 1024))).toBe(true);
    const days = await kernel.names((await kernel.walk(...top, 'points')).node);
    expect(days).toEqual(['2023-11-14']);
    const hours = await kernel.names((await kernel.walk(...top, 'points', '2023-11-14')).node);
    expect(hours).toEqual(['22']);
    const hour = [...top, 'points', '2023-11-14', '22'];
    const names = await kernel.names((await kernel.walk(...hour)).node);
    expect(names.map((n) => n.split('#')[1])).toEqual(model.acknowledged.map((a) => `${a.seq}`));
    for (const [i, name] of names.entries()) {
      expect(name).not.toContain(':');
      expect(digestOf(await readAll(kernel, ...hour, name, 'disk.img'))).toBe(
        model.acknowledged[i]?.digest,
      );
    }
    expect(warnings).toEqual([]);
  });

  it('has sizes, allocated blocks, times and modes of the point', async () => {
    const { repo, model } = await make();
    const { kernel } = await mount(repo);
    const file = await kernel.walk('host', 'sda', 'latest', 'disk.img');
    expect(file).toMatchObject({ sizeBytes: SIZE, mode: 0o100400 });
    expect(file.mtimeNs).toBe(repo.env.clock.nowNs() - 1_000_000_000n);
    expect((await kernel.walk('host', 'sda', 'latest')).mode).toBe(0o040500);
    const handle = await kernel.open(file.node);
    // The map of SEEK_DATA and SEEK_HOLE: what it calls a hole is zeros, what it calls data adds up to the allocated blocks.
    let data = 0;
    for (let at = 0; ;) {
      const start = await kernel.seek(handle, at, DATA);
      expect(model.data.subarray(at, start ?? SIZE).every((b) => b === 0)).toBe(true);
      if (start === undefined) break;
      const end = await kernel.seek(handle, start, HOLE);
      data += (end ?? 0) - start;
      at = end ?? SIZE;
      if (at >= SIZE) break;
    }
    expect(data).toBe(file.blocks * 512);
    expect(data).toBeGreaterThan(30_000);
    expect(data).toBeLessThan(200_000);
    expect(await kernel.seek(handle, SIZE, DATA)).toBeUndefined();
    expect(await kernel.seek(handle, SIZE + 5, HOLE)).toBeUndefined();
    const part = await kernel.open((await kernel.walk('host', 'sda', 'latest', 'p1.img')).node);
    expect(await kernel.seek(part, 0, DATA)).toBe(0);
    // Whole chunks are stored: 36 sectors of noise end in the second one.
    expect(await kernel.seek(part, 0, HOLE)).toBe(2 * CHUNK_BYTES);
    expect(await kernel.seek(part, 2 * CHUNK_BYTES, DATA)).toBeUndefined();
  });

  it.each(['x', 'p2.img', 'p9.img', 'p01.img', '..', 'disk.img '])(
    'has no %j in a point',
    async (name) => {
      const { repo } = await make();
      const { kernel } = await mount(repo);
      const { node } = await kernel.walk('host', 'sda', 'latest');
      expect((await kernel.lookup(node, name)).errno).toBe(Errno.ENOENT);
    },
  );

  it('has no days, hours and points but those that are there', async () => {
    const { repo } = await make();
    const { kernel } = await mount(repo);
    const points = (await kernel.walk('host', 'sda', 'points')).node;
    for (const name of ['2023-11-15', '2023-11-31', 'x']) {
      expect((await kernel.lookup(points, name)).errno).toBe(Errno.ENOENT);
    }
    const hour = (await kernel.walk('host', 'sda', 'points', '2023-11-14', '22')).node;
    const [first] = await kernel.names(hour);
    expect((await kernel.lookup(hour, first ?? '')).errno).toBe(0);
    for (const name of [first?.replace('#1', '#2') ?? '', first?.replace('#1', '#77') ?? '', 'x']) {
      expect((await kernel.lookup(hour, name)).errno).toBe(Errno.ENOENT);
    }
    expect(
      (await kernel.lookup((await kernel.walk('host', 'sda', 'points', '2023-11-14')).node, '21'))
        .errno,
    ).toBe(Errno.ENOENT);
  });

  it('has snapshots by name', async () => {
    const { repo, model } = await make();
    const history = await VolumeHistory.open(repo, model.volumeId);
    const commit = await new Timeline(history.sources).bySeq(2);
    await history.close();
    if (commit === undefined) throw new Error('no point 2');
    await addSnapshot(repo, {
      name: 'before: upgrade',
      volumeId: model.volumeId,
      seq: 2,
      hash: commit.hash.toString('hex'),
      instantNs: commit.instantNs,
      pointClass: PointClass.crash,
      tags: [],
      createdNs: 1n,
    });
    const { kernel } = await mount(repo);
    expect(await kernel.names((await kernel.walk('host', 'sda', 'snapshots')).node)).toEqual([
      'before%3A upgrade',
    ]);
    for (const name of ['before%3A upgrade', 'before: upgrade']) {
      const all = await readAll(kernel, 'host', 'sda', 'snapshots', name, 'disk.img');
      expect(digestOf(all)).toBe(model.acknowledged[1]?.digest);
    }
  });
});

describe('while time goes on', () => {
  it('latest is the newest point at every look, and a file that is open stays what it was', async () => {
    const { repo, model, writer } = await make();
    const { kernel, tree } = await mount(repo);
    const before = Buffer.from(model.data);
    const old = await kernel.walk('host', 'sda', 'latest', 'disk.img');
    const handle = await kernel.open(old.node);
    for (let round = 0; round < 12; round++) {
      await model.capture(writer, model.mutate(3));
      if (round === 6) await writer.finishPack();
      expect(digestOf(await readAll(kernel, 'host', 'sda', 'latest', 'disk.img'))).toBe(
        digestOf(model.data),
      );
    }
    expect((await kernel.read(handle, 0, SIZE)).payload.equals(before)).toBe(true);
    await kernel.release(handle);
    // 13 points were open; those that nobody uses are bounded.
    expect(tree.openImages).toBeLessThanOrEqual(8);
  });

  it('two at once look at what was there when they asked', async () => {
    const { repo, model, writer } = await make();
    const { kernel } = await mount(repo);
    for (let round = 0; round < 5; round++) {
      const running = kernel.walk('host', 'sda', 'latest', 'disk.img');
      await model.capture(writer, model.mutate(3));
      const [, now] = await Promise.all([
        running,
        readAll(kernel, 'host', 'sda', 'latest', 'disk.img'),
      ]);
      expect(digestOf(now)).toBe(digestOf(model.data));
    }
  });

  it('days and hours are those in which there are points', async () => {
    const { repo, model, writer } = await make(3, 2);
    const { clock } = repo.env;
    if (!(clock instanceof SteppedClock)) throw new Error('not the clock of the model');
    for (const hours of [1, 5, 30, 700]) {
      await clock.advanceMs(hours * 3_600_000);
      await model.capture(writer, model.mutate(1));
    }
    const { kernel } = await mount(repo);
    const points = (await kernel.walk('host', 'sda', 'points')).node;
    const days = await kernel.names(points);
    expect([...days].sort()).toEqual(['2023-11-14', '2023-11-15', '2023-11-16', '2023-12-15']);
    let found = 0;
    for (const day of days) {
      const { node } = await kernel.walk('host', 'sda', 'points', day);
      for (const hour of await kernel.names(node)) {
        const names = await kernel.list(
          (await kernel.walk('host', 'sda', 'points', day, hour)).node,
          4096,
          true,
        );
        expect(names.every((n) => n.node !== 0 && n.name.startsWith(hour))).toBe(true);
        found += names.length;
      }
    }
    expect(found).toBe(model.acknowledged.length);
  });
});

describe('with --volume and --at', () => {
  it('the point is at the top', async () => {
    const { repo, model } = await make();
    const [volume] = await listVolumes(repo, () => undefined);
    const at = parseWhen('#2', 0n);
    const { kernel, tree } = await mount(repo, { volume, at });
    expect(tree.chosen?.map((c) => c.commit.seq)).toEqual([2]);
    expect(await kernel.names(1)).toEqual(['disk.img', 'p1.img', 'p5.img', 'p6.img']);
    expect(digestOf(await readAll(kernel, 'disk.img'))).toBe(model.acknowledged[1]?.digest);
    const all = await mount(repo, { at });
    expect(await all.kernel.names(1)).toEqual(['host']);
    expect(digestOf(await readAll(all.kernel, 'host', 'sda', 'disk.img'))).toBe(
      model.acknowledged[1]?.digest,
    );
    expect(await (await mount(repo, { volume })).kernel.names(1)).toEqual([
      'latest',
      'snapshots',
      'points',
    ]);
  });

  it('says that there is no such point', async () => {
    const { repo } = await make();
    const [volume] = await listVolumes(repo, () => undefined);
    const long = parseWhen('1999-01-01', 0n);
    for (const options of [{ volume, at: long }, { at: long }]) {
      await expect(mount(repo, options)).rejects.toMatchObject({ kind: 'not-found' });
    }
  });
});

describe('damage', () => {
  it('is an I/O error with a warning that names the pack, never zeros', async () => {
    const { store, repo, model, writer } = await make(5);
    await writer.close();
    const packs: string[] = [];
    for await (const { name } of store.list('packs')) packs.push(name);
    for (const name of packs) {
      const bytes = await store.get(name);
      // Behind the header; what is small and compressed lies there too.
      for (let at = 4096; at < bytes.length / 2; at += 997) bytes[at] = (bytes[at] ?? 0) ^ 0x10;
      await store.put(name, bytes);
    }
    const fresh = await Repository.open(store, [], repo.env);
    const { kernel } = await mount(fresh);
    const { node } = await kernel.walk('host', 'sda', 'latest', 'disk.img');
    const handle = await kernel.open(node);
    let failed = 0;
    for (let at = 0; at < SIZE; at += 4096) {
      const reply = await kernel.read(handle, at, 4096);
      if (reply.errno === 0)
        expect(reply.payload.equals(model.data.subarray(at, at + 4096))).toBe(true);
      else expect(reply.errno).toBe(Errno.EIO);
      if (reply.errno !== 0) failed++;
    }
    expect(failed).toBeGreaterThan(0);
    const ids = packs.map((name) => name.split('/').at(-1) ?? name);
    expect(warnings.some((w) => w.includes('I/O error') && ids.some((id) => w.includes(id)))).toBe(
      true,
    );
    await kernel.release(handle);
  });
});
