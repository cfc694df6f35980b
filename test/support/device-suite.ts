/** The contract of src/devices/device.ts as tests: every kind of device passes them. */
import { afterEach, describe, expect, it } from 'vitest';

import type { ReadDevice, WriteDevice } from '../../src/devices/device.js';
import { isKind } from '../../src/errors.js';
import { alignedMemory } from '../../src/memory.js';
import { dice, noise } from './disks.js';
import { tempDir, type TempDir } from './tmp.js';

/** A device made for one test, in a directory of its own. */
export interface MadeDevice {
  readonly path: string;
  /** What it holds. */
  readonly content: Uint8Array;
  readonly logicalBlockBytes: number;
  /** Open for reading; call it as often as needed. */
  open(): Promise<ReadDevice>;
  /** Changes bytes on the medium behind the back of whoever has it open. */
  poke(offset: number, data: Uint8Array): void;
}

async function readAll(device: Pick<ReadDevice, 'read' | 'facts'>): Promise<Uint8Array> {
  const bytes = new Uint8Array(device.facts.sizeBytes);
  expect(await device.read(bytes, 0)).toBe(bytes.byteLength);
  return bytes;
}

function sameBytes(actual: Uint8Array, expected: Uint8Array): void {
  // Buffer.equals reports nothing useful; the first difference does.
  const at =
    Buffer.compare(actual, expected) === 0
      ? -1
      : actual.findIndex((byte, i) => byte !== expected[i]);
  expect({ firstDifferenceAt: at, length: actual.byteLength }).toEqual({
    firstDifferenceAt: -1,
    length: expected.byteLength,
  });
}

export function readDeviceSuite(name: string, make: (dir: TempDir) => Promise<MadeDevice>): void {
  describe(`reads: ${name}`, () => {
    let dir: TempDir | undefined;
    const open: ReadDevice[] = [];
    const fresh = async (): Promise<{ made: MadeDevice; device: ReadDevice }> => {
      dir = tempDir();
      const made = await make(dir);
      const device = await made.open();
      open.push(device);
      return { made, device };
    };
    afterEach(async () => {
      for (const device of open.splice(0)) await device.close();
      await dir?.remove();
      dir = undefined;
    });

    it('knows its size and block size', async () => {
      const { made, device } = await fresh();
      expect(device.facts).toMatchObject({
        path: made.path,
        sizeBytes: made.content.byteLength,
        logicalBlockBytes: made.logicalBlockBytes,
      });
    });

    it('reads everything, into page-aligned and into ordinary memory', async () => {
      const { made, device } = await fresh();
      sameBytes(await readAll(device), made.content);
      const slab = alignedMemory(Math.ceil(made.content.byteLength / 4096) * 4096);
      slab.fill(0xa5);
      expect(await device.read(slab, 0)).toBe(made.content.byteLength);
      sameBytes(slab.subarray(0, made.content.byteLength), made.content);
    });

    it('reads any range, many at a time', async () => {
      const { made, device } = await fresh();
      const size = made.content.byteLength;
      const slab = alignedMemory(64 * 65536);
      const roll = dice(7);
      await Promise.all(
        Array.from({ length: 64 }, async (_, i) => {
          const isAligned = i % 3 === 0;
          const offset = isAligned ? roll(Math.ceil(size / 4096)) * 4096 : roll(size);
          const length = isAligned ? (1 + roll(16)) * 4096 : 1 + roll(65536);
          const into =
            i % 2 === 0 ? slab.subarray(i * 65536, i * 65536 + length) : new Uint8Array(length);
          const expected = made.content.subarray(offset, offset + length);
          expect(await device.read(into, offset)).toBe(expected.byteLength);
          sameBytes(into.subarray(0, expected.byteLength), expected);
        }),
      );
    });

    it('is short at the end only, and leaves the rest of the buffer alone', async () => {
      const { made, device } = await fresh();
      const size = made.content.byteLength;
      const into = new Uint8Array(5000).fill(0x77);
      expect(await device.read(into, size - 100)).toBe(100);
      sameBytes(into.subarray(0, 100), made.content.subarray(size - 100));
      expect(into.subarray(100).every((byte) => byte === 0x77)).toBe(true);
      expect(await device.read(into, size)).toBe(0);
      expect(await device.read(into, size + 1_000_000)).toBe(0);
    });

    it('reads what is on the medium now, not what was read before', async () => {
      const { made, device } = await fresh();
      await readAll(device);
      const change = noise(99, 4096);
      made.poke(8192, change);
      const into = new Uint8Array(4096);
      await device.read(into, 8192);
      sameBytes(into, change);
    });

    it('names data ranges in order, and none of its data is outside of them', async () => {
      const { made, device } = await fresh();
      const size = made.content.byteLength;
      for (const [offset, length] of [
        [0, size],
        [1, size - 2],
        [300_000, 5000],
        [size - 10, 4096],
        [size, 4096],
      ] as const) {
        const ranges = await device.dataRanges(offset, length);
        const outside = made.content.slice(offset, offset + length);
        let last = offset;
        for (const range of ranges) {
          expect(range.offset).toBeGreaterThanOrEqual(last);
          expect(range.length).toBeGreaterThan(0);
          last = range.offset + range.length;
          outside.fill(0, range.offset - offset, last - offset);
        }
        expect(last).toBeLessThanOrEqual(Math.max(offset, Math.min(size, offset + length)));
        expect(outside.every((byte) => byte === 0)).toBe(true);
      }
    });

    it('refreshes its facts, and closes twice', async () => {
      const { device } = await fresh();
      const before = device.facts;
      expect(await device.refresh()).toEqual(before);
      await device.close();
      await device.close();
    });
  });
}

/** A target made for one test. */
export interface MadeTarget {
  readonly path: string;
  readonly sizeBytes: number;
  /** True for block devices: their size is what it is. */
  readonly isFixed: boolean;
  open(): Promise<WriteDevice>;
  /** Reads it all by other means than ours. */
  peek(): Uint8Array;
}

export function writeDeviceSuite(name: string, make: (dir: TempDir) => Promise<MadeTarget>): void {
  describe(`writes: ${name}`, () => {
    let dir: TempDir | undefined;
    let device: WriteDevice | undefined;
    const fresh = async (): Promise<{ made: MadeTarget; target: WriteDevice }> => {
      dir = tempDir();
      const made = await make(dir);
      device = await made.open();
      await device.truncate(made.sizeBytes);
      return { made, target: device };
    };
    afterEach(async () => {
      await device?.close();
      device = undefined;
      await dir?.remove();
      dir = undefined;
    });

    it('holds what a model holds after many writes and zeroings, read back by us and by others', async () => {
      const { made, target } = await fresh();
      const model = noise(3, made.sizeBytes);
      const start = alignedMemory(Math.floor(made.sizeBytes / 4096) * 4096);
      start.set(model.subarray(0, start.byteLength));
      await target.write(start, 0);
      await target.write(model.subarray(start.byteLength), start.byteLength);
      const roll = dice(11);
      for (let i = 0; i < 120; i++) {
        const isAligned = roll(3) === 0;
        const offset = isAligned
          ? roll(Math.floor(made.sizeBytes / 4096)) * 4096
          : roll(made.sizeBytes);
        const length = Math.min(
          isAligned ? 4096 * (1 + roll(8)) : 1 + roll(40_000),
          made.sizeBytes - offset,
        );
        if (roll(3) === 0) {
          await target.zero(offset, length);
          model.fill(0, offset, offset + length);
        } else {
          const data = noise(1000 + i, length);
          await target.write(data, offset);
          model.set(data, offset);
        }
      }
      sameBytes(await readAll(target), model);
      await target.sync();
      await target.close();
      sameBytes(made.peek(), model);
    });

    it('takes many writes at a time, also neighbours that share a block', async () => {
      const { made, target } = await fresh();
      const model = noise(21, made.sizeBytes);
      const roll = dice(5);
      const cuts = [
        0,
        ...Array.from({ length: 80 }, () => roll(made.sizeBytes)).toSorted((a, b) => a - b),
        made.sizeBytes,
      ];
      await Promise.all(
        cuts.slice(1).map((end, i) => target.write(model.subarray(cuts[i], end), cuts[i] ?? 0)),
      );
      sameBytes(await readAll(target), model);
      await target.sync();
      await target.close();
      sameBytes(made.peek(), model);
    });

    it('zeroes all of itself, odd ends included', async () => {
      const { made, target } = await fresh();
      await target.write(noise(4, made.sizeBytes), 0);
      await target.sync();
      await target.zero(0, made.sizeBytes);
      await target.sync();
      await target.close();
      expect(made.peek().every((byte) => byte === 0)).toBe(true);
      expect(made.peek().byteLength).toBe(made.sizeBytes);
    });

    it('keeps to its end if that is fixed, and moves it if not', async () => {
      const { made, target } = await fresh();
      if (made.isFixed) {
        for (const attempt of [
          () => target.write(new Uint8Array(512), made.sizeBytes - 100),
          () => target.zero(made.sizeBytes, 512),
          () => target.truncate(made.sizeBytes - 512),
        ]) {
          await expect(attempt()).rejects.toSatisfy(
            (error) => isKind(error, 'no-space', 'refused') && error.message.includes(made.path),
          );
        }
      } else {
        await target.truncate(5000);
        expect(target.facts.sizeBytes).toBe(5000);
        await target.zero(4000, 3000);
        expect(target.facts.sizeBytes).toBe(7000);
        await target.sync();
        expect(made.peek().byteLength).toBe(7000);
      }
    });

    it('closes twice', async () => {
      const { target } = await fresh();
      await target.close();
      await target.close();
    });
  });
}
