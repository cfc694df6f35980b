import { describe, expect, it } from 'vitest';
import { BadBlocks, badBytesAtMost, readAround } from '../../../src/capture/bad-blocks.js';
import type { ReadDevice } from '../../../src/devices/device.js';
import { B2Error } from '../../../src/errors.js';
import { BLOCK_BYTES } from '../../../src/units.js';
import { memoryDevice } from '../../support/device-memory.js';

describe('the set of bad blocks', () => {
  it('is a set, with its members in order', () => {
    const bad = new BadBlocks();
    const wanted = new Set<number>();
    let seed = 1;
    for (let i = 0; i < 20_000; i++) {
      seed = (seed * 16_807) % 2_147_483_647;
      const block = (seed % 300) * 1009 + (i % 3);
      if (i % 3 === 0) expect(bad.delete(block)).toBe(wanted.delete(block));
      else {
        expect(bad.add(block)).toBe(!wanted.has(block));
        wanted.add(block);
      }
      expect(bad.size).toBe(wanted.size);
    }
    const sorted = [...wanted].sort((a, b) => a - b);
    expect([...bad.within(0, 1_000_000)]).toEqual(sorted);
    expect([...bad.within(70_000, 170_001)]).toEqual(
      sorted.filter((b) => b >= 70_000 && b < 170_001),
    );
    for (const block of sorted) expect(bad.has(block)).toBe(true);
    for (const block of sorted) expect(bad.delete(block)).toBe(true);
    expect([bad.size, bad.bytes, [...bad.within(0, 1_000_000)]]).toEqual([0, 0, []]);
  });

  it('tells its ranges, the first hundred, up to the end of the device', () => {
    const bad = new BadBlocks();
    expect(bad.ranges(1_000_000)).toEqual([]);
    for (const block of [9, 3, 4, 32_767, 32_768]) bad.add(block);
    const sizeBytes = 32_768 * BLOCK_BYTES + 512;
    expect(bad.ranges(sizeBytes)).toEqual([
      { offset: 3 * BLOCK_BYTES, length: 2 * BLOCK_BYTES },
      { offset: 9 * BLOCK_BYTES, length: BLOCK_BYTES },
      { offset: 32_767 * BLOCK_BYTES, length: BLOCK_BYTES + 512 },
    ]);
    bad.delete(9);
    expect(bad.ranges(sizeBytes)).toHaveLength(2);
    for (let i = 0; i < 300; i++) bad.add(100 + 2 * i);
    expect(bad.ranges(sizeBytes)).toHaveLength(100);
  });

  it('takes 32 MiB for a TiB of which nothing can be read', () => {
    const blocks = 2 ** 40 / BLOCK_BYTES;
    expect(badBytesAtMost(blocks)).toBe(32 * 2 ** 20);
    const bad = new BadBlocks();
    for (let block = 0; block < blocks; block += 32_768) bad.add(block);
    expect(bad.bytes).toBe(32 * 2 ** 20);
  });
});

/** Blocks that fail, and how often a read did. */
function failing(bad: ReadonlySet<number>): { readonly device: ReadDevice; failures: number } {
  const memory = memoryDevice(Buffer.alloc(1024 * BLOCK_BYTES, 7));
  const made = {
    failures: 0,
    device: {
      facts: memory.facts,
      read: (into: Uint8Array, offset: number) => {
        for (let at = offset; at < offset + into.byteLength; at += BLOCK_BYTES)
          if (bad.has(at / BLOCK_BYTES)) {
            made.failures++;
            return Promise.reject(new B2Error('io', 'a bad sector'));
          }
        return memory.read(into, offset);
      },
      dataRanges: () => Promise.resolve([]),
      refresh: () => Promise.resolve(memory.facts),
      close: () => Promise.resolve(),
    } satisfies ReadDevice,
  };
  return made;
}

const run = (from: number, to: number): number[] =>
  Array.from({ length: to - from }, (_, i) => from + i);

describe('a read around bad blocks', () => {
  const read = async (
    bad: readonly number[],
    hasty: boolean,
  ): Promise<{ readonly found: readonly number[]; readonly failures: number }> => {
    const made = failing(new Set(bad));
    const into = Buffer.alloc(256 * BLOCK_BYTES);
    const found = await readAround(made.device, into, 512 * BLOCK_BYTES, into.length, hasty);
    for (let block = 512; block < 768; block++)
      if (!found.includes(block)) expect(into[(block - 512) * BLOCK_BYTES]).toBe(7);
    return { found, failures: made.failures };
  };

  it('tries every block of its own', async () => {
    const bad = [...run(520, 530), 600, 767];
    expect(await read(bad, false)).toEqual({ found: bad, failures: bad.length + 1 });
    expect((await read(run(512, 768), false)).failures).toBe(257);
  });

  it('in haste passes over what it has reason to think cannot be read, and nothing else', async () => {
    const all = run(512, 768);
    const { found, failures } = await read(all, true);
    expect(found).toEqual(all);
    expect(failures).toBeLessThan(10);
    for (const bad of [run(512, 700), [...run(520, 530), 600], run(600, 767), run(512, 516)])
      expect((await read(bad, true)).found).toEqual(bad);
  });

  it('rejects where nothing of the device can be read', async () => {
    await expect(
      readAround(failing(new Set(run(0, 1024))).device, Buffer.alloc(4 * BLOCK_BYTES), 0, 16_384),
    ).rejects.toThrow('a bad sector');
  });
});
