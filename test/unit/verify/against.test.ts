import { describe, expect, it } from 'vitest';
import type { ReadDevice } from '../../../src/devices/device.js';
import { B2Error } from '../../../src/errors.js';
import { ignoreEvents } from '../../../src/events.js';
import { packName } from '../../../src/format/names.js';
import { VolumeHistory } from '../../../src/repo/history.js';
import { openBlockMap, openImage } from '../../../src/repo/point.js';
import { compareWithDevice, type AgainstResult } from '../../../src/verify/against.js';
import { memoryDevice } from '../../support/device-memory.js';
import { newModel, seeded, testMeta, type ModelVolume } from '../../support/model-volume.js';
import { MemoryStore } from '../../support/store-memory.js';
import type { Repository } from '../../../src/repo/repository.js';

const SIZE = 300 * 1024 + 512; // ends within a block

interface Made {
  readonly store: MemoryStore;
  readonly repo: Repository;
  readonly model: ModelVolume;
}

async function make(seed: number): Promise<Made> {
  const store = new MemoryStore({ record: false });
  const { repo, model, writer } = await newModel(store, seeded(seed), { sizeBytes: SIZE });
  model.mutate(20);
  await model.capture(
    writer,
    Array.from({ length: Math.ceil(SIZE / 4096) }, (_, i) => i),
    true,
  );
  for (let i = 0; i < 6; i++) await model.capture(writer, model.mutate(3));
  await writer.close();
  return { store, repo, model };
}

function deviceOf(bytes: Buffer, read?: ReadDevice['read']): ReadDevice {
  const d = memoryDevice(bytes);
  return {
    facts: d.facts,
    read: read ?? ((into, offset) => d.read(into, offset)),
    dataRanges: (offset, length) =>
      Promise.resolve([{ offset, length: Math.min(length, bytes.length - offset) }]),
    refresh: () => Promise.resolve(d.facts),
    close: () => Promise.resolve(),
  };
}

async function compare({ repo, model }: Made, device: ReadDevice): Promise<AgainstResult> {
  const history = await VolumeHistory.open(repo, model.volumeId);
  try {
    const seq = history.tip?.seq ?? 0;
    return await compareWithDevice({
      repo,
      map: await openBlockMap(history, seq),
      image: await openImage(history, testMeta(model.volumeId, SIZE), seq),
      device,
      clock: repo.env.clock,
      events: ignoreEvents,
    });
  } finally {
    await history.close();
  }
}

describe('compareWithDevice', () => {
  it('finds no difference where there is none', async () => {
    for (const seed of [1, 2, 3]) {
      const made = await make(seed);
      const result = await compare(made, deviceOf(Buffer.from(made.model.data)));
      expect(result).toEqual({
        imageBytes: SIZE,
        deviceBytes: SIZE,
        comparedBytes: SIZE,
        ranges: [],
        differingBytes: 0,
        unreadable: [],
      });
    }
  });

  it('names exactly the blocks in which one byte differs', async () => {
    const made = await make(4);
    const random = seeded(5);
    for (let n = 0; n < 60; n++) {
      const bytes = Buffer.from(made.model.data);
      const at = n === 0 ? SIZE - 1 : Math.floor(random() * SIZE);
      bytes[at] = (bytes[at] ?? 0) ^ 1;
      const block = at - (at % 4096);
      const result = await compare(made, deviceOf(bytes));
      expect(result.ranges).toEqual([{ offset: block, length: Math.min(4096, SIZE - block) }]);
      expect(result.differingBytes).toBe(Math.min(4096, SIZE - block));
    }
  });

  it('compares what both have when sizes differ', async () => {
    const made = await make(6);
    const longer = Buffer.concat([made.model.data, Buffer.alloc(8192, 1)]);
    expect(await compare(made, deviceOf(longer))).toMatchObject({
      deviceBytes: SIZE + 8192,
      comparedBytes: SIZE,
      ranges: [],
    });
    expect(
      await compare(made, deviceOf(Buffer.from(made.model.data.subarray(0, 100_000)))),
    ).toMatchObject({
      deviceBytes: 100_000,
      comparedBytes: 100_000,
      ranges: [],
    });
  });

  it('goes on after what cannot be read, on either side', async () => {
    const made = await make(7);
    const data = Buffer.from(made.model.data);
    const plain = memoryDevice(data);
    const failing = await compare(
      made,
      deviceOf(data, (into, offset) =>
        offset <= 65_536 && offset + into.byteLength > 65_536
          ? Promise.reject(new B2Error('io', 'read /dev/test at 65536: EIO'))
          : plain.read(into, offset),
      ),
    );
    expect(failing.unreadable.length).toBe(1);
    expect(failing.unreadable[0]).toMatchObject({ damaged: false });
    expect(failing.ranges).toEqual([]);
    // Damage in the repository matters only where the ids differ.
    for await (const { name } of made.store.list('packs')) {
      const bytes = await made.store.get(name);
      bytes.fill(0x11, 64 + 60, 64 + 120);
      await made.store.put(name, bytes);
      expect(packName(name.slice(-32))).toBe(name);
    }
    await made.repo.packs.close();
    const other = Buffer.alloc(SIZE, 7);
    const both = await compare(made, deviceOf(other));
    expect(both.unreadable.some((u) => u.damaged)).toBe(true);
    expect(both.differingBytes).toBeGreaterThan(0);
  });
});
