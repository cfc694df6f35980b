import { createHash } from 'node:crypto';
import { describe, expect, it } from 'vitest';
import { PackTable } from '../../../../src/repo/segments/pack-table.js';

describe('PackTable', () => {
  it('gives each id one index, in order of appearance, however many there are', () => {
    const table = new PackTable();
    const ids = Array.from({ length: 5000 }, (_, i) =>
      createHash('md5').update(String(i)).digest(),
    );
    // The first four bytes choose the slot; these all collide.
    for (let i = 0; i < 300; i++) {
      const id = Buffer.alloc(16);
      id.writeUInt32LE(i, 12);
      ids.push(id);
    }
    ids.forEach((id, i) =>
      expect(table.indexOf(Buffer.concat([Buffer.from('xx'), id]), 2)).toBe(i),
    );
    ids.forEach((id, i) => expect(table.indexOf(id, 0)).toBe(i));
    expect(table.count).toBe(ids.length);
    expect(table.bytes.equals(Buffer.concat(ids))).toBe(true);
  });
});
