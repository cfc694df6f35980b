import { describe, expect, it } from 'vitest';

import { isKind } from '../../../src/errors.js';
import { ignoreEvents } from '../../../src/events.js';
import { packName } from '../../../src/format/names.js';
import { planImage, writeImage, type WriteImageOptions } from '../../../src/restore/write-image.js';
import { memoryDevice } from '../../support/device-memory.js';
import { dice, noise } from '../../support/disks.js';
import { SteppedClock } from '../../support/stepped-clock.js';
import { makePackImage, type PackImage } from '../../support/pack-image.js';
import { MemoryStore } from '../../support/store-memory.js';

const MIB = 1024 * 1024;

function options(more: Partial<WriteImageOptions> = {}): WriteImageOptions {
  return {
    compare: 'auto',
    isBlank: false,
    verify: true,
    onDamage: 'stop',
    clock: new SteppedClock(),
    events: ignoreEvents,
    workers: 0,
    ...more,
  };
}

async function image(
  seed: number,
  more: { encrypted?: boolean; sizeBytes?: number; unsealed?: boolean } = {},
): Promise<PackImage & { store: MemoryStore }> {
  const store = new MemoryStore({ record: false });
  return { store, ...(await makePackImage({ store, seed, sizeBytes: 6 * MIB, ...more })) };
}

/** Flips a bit in the middle of the frame that holds the piece at `extent`. */
async function damage(made: PackImage & { store: MemoryStore }, packId: string): Promise<void> {
  const bytes = await made.store.get(packName(packId));
  bytes[Math.floor(bytes.length / 2)] = (bytes[Math.floor(bytes.length / 2)] ?? 0) ^ 1;
  await made.store.put(packName(packId), bytes);
}

const differing = (a: Buffer, b: Buffer): number => {
  let n = 0;
  for (let at = 0; at < a.length; at += 4096)
    if (!a.subarray(at, at + 4096).equals(b.subarray(at, at + 4096))) n++;
  return n;
};

describe('writeImage', () => {
  it.each([1, 2, 3, 4, 5, 6, 7, 8])(
    'writes every kind of extent over old data (seed %i)',
    async (seed) => {
      const sizeBytes = 6 * MIB - (seed % 3 === 0 ? 4096 - 512 * seed : 0);
      const made = await image(seed, {
        encrypted: seed % 2 === 0,
        sizeBytes,
        unsealed: seed === 5,
      });
      const device = memoryDevice(Buffer.from(noise(99, sizeBytes + 8192)));
      const after = Buffer.from(device.bytes.subarray(sizeBytes));
      const result = await writeImage(
        made.source,
        device,
        options({ batchPieces: seed > 4 ? 9 : 100_000 }),
      );
      expect(device.bytes.subarray(0, sizeBytes).equals(made.expected)).toBe(true);
      expect(device.bytes.subarray(sizeBytes).equals(after)).toBe(true);
      expect(result).toMatchObject({
        compared: false,
        verified: true,
        damagedRanges: [],
        sizeBytes,
      });
      expect(result.writtenBytes).toBe(result.dataBytes);
      expect(result.writtenBytes + result.zeroedBytes).toBe(sizeBytes);
      expect(device.syncs).toBeGreaterThan(0);
    },
  );

  it('leaves holes alone on a blank target', async () => {
    const made = await image(11);
    const device = memoryDevice(Buffer.alloc(6 * MIB));
    const result = await writeImage(made.source, device, options({ isBlank: true }));
    expect(device.bytes.equals(made.expected)).toBe(true);
    expect(device.zeros).toEqual([]);
    expect(result.zeroedBytes).toBe(0);
  });

  it('joins neighbours into large writes', async () => {
    const made = await image(12);
    const device = memoryDevice(Buffer.alloc(6 * MIB));
    await writeImage(made.source, device, options({ isBlank: true }));
    expect(device.writes.length).toBeLessThan(made.extents.length / 2);
  });

  it.each([21, 22, 23, 24])('writes only what differs (seed %i)', async (seed) => {
    const made = await image(seed, { encrypted: seed % 2 === 0 });
    const device = memoryDevice(Buffer.from(made.expected));
    const roll = dice(seed);
    for (let i = 0; i < 12; i++) device.bytes.set(noise(seed + i, 100), roll(6 * MIB - 100));
    const plan = await planImage(made.source, device, options());
    const changed = Buffer.from(device.bytes);
    const blocks = differing(changed, made.expected);
    expect(device.writes).toEqual([]);
    expect(plan.compared).toBe(true);
    expect(plan.differingBytes).toBeGreaterThanOrEqual(blocks * 4096);
    expect(plan.differingBytes).toBeLessThanOrEqual(blocks * 65536);

    const result = await writeImage(made.source, device, options());
    expect(device.bytes.equals(made.expected)).toBe(true);
    expect(result.compared).toBe(true);
    expect(result.writtenBytes + result.zeroedBytes).toBe(plan.differingBytes);
    expect(result.unchangedBytes).toBe(6 * MIB - plan.differingBytes);
    const again = await writeImage(made.source, device, options());
    expect(again).toMatchObject({ writtenBytes: 0, zeroedBytes: 0, unchangedBytes: 6 * MIB });
  });

  it('compares or not as it is told', async () => {
    const made = await image(31);
    const same = memoryDevice(Buffer.from(made.expected));
    expect(await writeImage(made.source, same, options({ compare: 'never' }))).toMatchObject({
      compared: false,
    });
    const other = memoryDevice(Buffer.from(noise(1, 6 * MIB)));
    expect(await writeImage(made.source, other, options({ compare: 'always' }))).toMatchObject({
      compared: true,
    });
    expect(other.bytes.equals(made.expected)).toBe(true);
  });

  it('plans a restore to a blank target', async () => {
    const made = await image(32);
    const device = memoryDevice(Buffer.alloc(6 * MIB));
    let nowNs = 0n;
    const clock = { monotonicNs: () => (nowNs += 3_000_000_000n) };
    const plan = await planImage(made.source, device, options({ isBlank: true, clock }));
    const result = await writeImage(made.source, device, options({ isBlank: true }));
    expect(plan).toMatchObject({
      compared: false,
      differingBytes: result.dataBytes,
      dataBytes: result.dataBytes,
    });
    expect(plan.estimateSeconds).toBeGreaterThan(0);
  });

  it('stops at damaged data, naming pack, frame and bytes', async () => {
    const made = await image(41);
    const packId = made.packIds[0] ?? '';
    await damage(made, packId);
    const device = memoryDevice(Buffer.alloc(6 * MIB));
    const failure = writeImage(made.source, device, options({ isBlank: true }));
    await expect(failure).rejects.toMatchObject({ kind: 'damaged' });
    await expect(failure).rejects.toThrow(
      new RegExp(`pack ${packId}, frame \\d+.*bytes \\d+ to \\d+ of the image`),
    );
  });

  it.each(['flip', 'missing'] as const)(
    'writes zeros for damaged data where that is asked for, and says where (%s)',
    async (how) => {
      const made = await image(42);
      const packId = made.packIds[1] ?? '';
      if (how === 'flip') await damage(made, packId);
      else await made.store.delete(packName(packId));
      const device = memoryDevice(Buffer.from(noise(5, 6 * MIB)));
      const result = await writeImage(made.source, device, options({ onDamage: 'skip' }));
      expect(result.damagedRanges.length).toBeGreaterThan(0);
      expect(result.damagedFrames.every((f) => f.packId === packId)).toBe(true);
      if (how === 'flip') expect(result.damagedFrames.length).toBe(1);
      const expected = Buffer.from(made.expected);
      for (const { offset, length } of result.damagedRanges) {
        expect(expected.subarray(offset, offset + length).some((b) => b !== 0)).toBe(true);
        expected.fill(0, offset, offset + length);
      }
      expect(device.bytes.equals(expected)).toBe(true);
    },
  );

  it('finds a target that does not keep what was written', async () => {
    const made = await image(51);
    const device = memoryDevice(Buffer.alloc(6 * MIB));
    const first = made.extents.find((e) => e.packId !== undefined);
    const at = (first?.block ?? 0) * 4096 + 17;
    device.corrupt = (bytes, offset) => {
      if (offset <= at && at < offset + 4 * MIB) bytes[at] = (bytes[at] ?? 0) ^ 0x10;
    };
    const failure = writeImage(made.source, device, options({ isBlank: true }));
    await expect(failure).rejects.toMatchObject({ kind: 'failed', code: 1 });
    await expect(failure).rejects.toThrow(/\/dev\/test does not hold what was written/);
  });

  it('finds old data in what should be a hole', async () => {
    const made = await image(52);
    const device = memoryDevice(Buffer.from(noise(3, 6 * MIB)));
    const zero = device.zero.bind(device);
    let skipped = 0;
    device.zero = async (offset, length) => {
      if (skipped++ > 0) await zero(offset, length);
    };
    await expect(writeImage(made.source, device, options())).rejects.toThrow(
      /does not hold what was written/,
    );
  });

  it.each(['write', 'zero', 'sync'] as const)(
    'hands on the error of a failing %s',
    async (what) => {
      const made = await image(53);
      const device = memoryDevice(Buffer.from(noise(4, 6 * MIB)));
      device.before = (now) => {
        if (now === what) throw new Error(`${what} failed`);
      };
      await expect(writeImage(made.source, device, options())).rejects.toThrow(`${what} failed`);
    },
  );

  it('stops when it is interrupted, and goes on from there the next time', async () => {
    const made = await image(54);
    const device = memoryDevice(Buffer.alloc(6 * MIB));
    const abort = new AbortController();
    device.before = (what) => {
      if (what === 'write' && device.writes.length === 5) abort.abort('SIGINT');
    };
    const failure = await writeImage(
      made.source,
      device,
      options({ isBlank: true, batchPieces: 10, signal: abort.signal }),
    ).catch((e: unknown) => e);
    expect(isKind(failure, 'interrupted')).toBe(true);
    device.before = () => undefined;
    const result = await writeImage(made.source, device, options({ compare: 'always' }));
    expect(result.writtenBytes).toBeLessThan(result.dataBytes);
    expect(device.bytes.equals(made.expected)).toBe(true);
  });

  it('tells its progress up to the end', async () => {
    const made = await image(55);
    const seen: number[] = [];
    let total = 0;
    await writeImage(
      made.source,
      memoryDevice(Buffer.alloc(6 * MIB)),
      options({
        isBlank: true,
        events: (event) => {
          if (event.type !== 'progress') return;
          seen.push(event.doneBytes);
          total = event.totalBytes ?? 0;
        },
      }),
    );
    expect(total).toBe(12 * MIB);
    expect(seen.at(-1)).toBe(total);
  });
});
