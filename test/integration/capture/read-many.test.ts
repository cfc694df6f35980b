/** Many reads at a time of a real block device: what they give is what one read gives, and what they cannot give they do not claim. */
import { writeFileSync } from 'node:fs';
import { expect } from 'vitest';
import { openReadDevice } from '../../../src/devices/open.js';
import { READS_AT_ONCE } from '../../../src/devices/device.js';
import { alignedMemory } from '../../../src/memory.js';
import { ReadBatch } from '../../../src/read-batch.js';
import { attachLoop, LOOP_NEEDS } from '../../support/loop.js';
import { requires } from '../../support/requires.js';
import { tempDir } from '../../support/tmp.js';

const BLOCK = 4096;
const BLOCKS = 512;

requires(LOOP_NEEDS).describe('many reads at a time', () => {
  for (const sectorBytes of [512, 4096] as const) {
    requires(LOOP_NEEDS).it(
      `are as good as one each, of a device with sectors of ${sectorBytes} bytes`,
      async () => {
        await using dir = tempDir();
        const content = Buffer.alloc(BLOCKS * BLOCK);
        for (let i = 0; i < content.length; i += 4) content.writeUInt32LE(i ^ 0x5bd1_e995, i);
        const file = dir.join('disk.img');
        writeFileSync(file, content);
        const { device: path } = await attachLoop(dir, file, { sectorBytes });
        const device = await openReadDevice(path);
        try {
          const slab = alignedMemory(READS_AT_ONCE * 4 * BLOCK);
          for (let round = 0; round < 20; round++) {
            const reads = Array.from({ length: 1 + (round % READS_AT_ONCE) }, (_, i) => {
              const count = 1 + ((round + i) % 4);
              return {
                into: slab.subarray(i * 4 * BLOCK, (i * 4 + count) * BLOCK),
                offset: ((round * 37 + i * 61) % (BLOCKS - 4)) * BLOCK,
              };
            });
            slab.fill(0);
            expect(await device.readMany?.(reads)).toEqual(reads.map(() => true));
            for (const { into, offset } of reads)
              expect(content.subarray(offset, offset + into.length).equals(into)).toBe(true);
          }
          // Behind the end, between sectors, into memory that is not aligned.
          const odd = await device.readMany?.([
            { into: slab.subarray(0, BLOCK), offset: 0 },
            { into: slab.subarray(BLOCK, 3 * BLOCK), offset: (BLOCKS - 1) * BLOCK },
            { into: slab.subarray(3 * BLOCK, 4 * BLOCK), offset: 100 },
            { into: slab.subarray(4 * BLOCK, 5 * BLOCK), offset: 3 * BLOCK },
          ]);
          expect(odd).toEqual([true, false, false, true]);
          expect(
            content.subarray(3 * BLOCK, 4 * BLOCK).equals(slab.subarray(4 * BLOCK, 5 * BLOCK)),
          ).toBe(true);
          expect(await device.readMany?.([{ into: Buffer.alloc(BLOCK), offset: 0 }])).toEqual([
            false,
          ]);
          // One batch at a time; the other is told so.
          const [first, second] = await Promise.all([
            device.readMany?.([{ into: slab.subarray(0, BLOCK), offset: 0 }]),
            device.readMany?.([{ into: slab.subarray(BLOCK, 2 * BLOCK), offset: BLOCK }]),
          ]);
          expect([first, second]).toEqual([[true], [false]]);
        } finally {
          await device.close();
        }
        const slab = alignedMemory(BLOCK);
        expect(await device.readMany?.([{ into: slab, offset: 0 }])).toEqual([false]);
      },
    );
  }

  requires(LOOP_NEEDS).it('say no where the kernel refuses the read', async () => {
    const batch = ReadBatch.open(4);
    if (batch === undefined) throw new Error('this machine has no asynchronous reads');
    const slab = alignedMemory(2 * BLOCK);
    const reads = [
      { into: slab.subarray(0, BLOCK), position: 0 },
      { into: slab.subarray(BLOCK), position: BLOCK },
    ];
    try {
      // No such descriptor.
      expect(await batch.read(1_000_000, reads)).toEqual([false, false]);
      await expect(batch.read(0, [...reads, ...reads, ...reads])).rejects.toThrow(RangeError);
    } finally {
      await batch.close();
    }
    await batch.close();
    expect(await batch.read(0, reads)).toEqual([false, false]);
  });
});
