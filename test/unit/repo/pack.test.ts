import { randomBytes } from 'node:crypto';
import { describe, expect, it } from 'vitest';
import { keyRing } from '../../../src/format/seal.js';
import { packName } from '../../../src/format/names.js';
import { lz4 } from '../../../src/lz4.js';
import { OpenPack } from '../../../src/repo/pack-reader.js';
import { PackWriter, type PackContext } from '../../../src/repo/pack-writer.js';
import { MemoryStore } from '../../support/store-memory.js';

const REPOSITORY = 'ab'.repeat(16);
const PACK = 'cd'.repeat(16);

function context(encrypted: boolean, canAppend: boolean): PackContext {
  return {
    store: new MemoryStore({ canAppend }),
    keys: keyRing(Buffer.alloc(32, 5), encrypted),
    lz4: lz4(),
    repositoryId: REPOSITORY,
    chunkBytes: 65_536,
  };
}

function someChunk(i: number): Buffer {
  if (i % 3 === 0) return randomBytes(65_536);
  const b = Buffer.alloc(65_536, `text ${i} `);
  b.writeUInt32LE(i, 100);
  return b;
}

describe.each([
  { encrypted: true, canAppend: true },
  { encrypted: true, canAppend: false },
  { encrypted: false, canAppend: true },
])('a pack (encrypted $encrypted, append $canAppend)', ({ encrypted, canAppend }) => {
  it('gives back every chunk, through its footer and read forward', async () => {
    const ctx = context(encrypted, canAppend);
    const w = await PackWriter.create(ctx, PACK, 7n);
    const chunks: Buffer[] = [];
    for (let i = 0; i < 150; i++) {
      const c = someChunk(i);
      chunks.push(c);
      expect(w.addChunk(c, ctx.keys.chunkId(c))).toBe(i);
      if (w.wantsFlush) await w.flush();
      // Syncs at odd places make the writes unaligned.
      if (canAppend && i % 40 === 17) await w.sync();
    }
    const small = [1, 2, 3].map((n) => Buffer.alloc(4096 * n, `small ${n}`));
    const shared = w.addChunks(small.map((bytes) => ({ bytes, id: ctx.keys.chunkId(bytes) })));
    if (canAppend) {
      await w.sync();
      const open = await OpenPack.open(ctx, PACK);
      expect(open.sealed).toBe(false);
      expect(open.footer.frames).toHaveLength(151);
      expect((await open.readChunks(149)).body.equals(chunks[149] ?? Buffer.alloc(0))).toBe(true);
      await open.close();
    }
    await w.seal(Buffer.alloc(16, 9));
    const pack = await OpenPack.open(ctx, PACK);
    expect(pack.sealed).toBe(true);
    for (let i = 0; i < 150; i++) {
      const got = await pack.readChunks(i);
      expect(got.body.equals(chunks[i] ?? Buffer.alloc(0))).toBe(true);
    }
    const got = await pack.readChunks(shared);
    expect(got.entries.map((e) => e.lengthBytes)).toEqual([4096, 8192, 12_288]);
    expect(got.body.equals(Buffer.concat(small))).toBe(true);
    await pack.close();
  });

  it('finds every flipped bit', async () => {
    const ctx = context(encrypted, canAppend);
    const w = await PackWriter.create(ctx, PACK, 7n);
    for (let i = 0; i < 3; i++) {
      const c = Buffer.alloc(4096 * (i + 1), i + 1);
      c.write('something');
      w.addChunk(c, ctx.keys.chunkId(c));
    }
    await w.seal(Buffer.alloc(16, 9));
    const whole = await ctx.store.get(packName(PACK));
    const right = await snapshotOf(ctx);
    let tried = 0;
    for (let at = 0; at < whole.length; at += 1) {
      const bad = Buffer.from(whole);
      bad[at] = (bad[at] ?? 0) ^ (1 << (at % 8));
      await ctx.store.put(packName(PACK), bad);
      let now: string[];
      try {
        now = await snapshotOf(ctx);
      } catch (error) {
        expect(error).toMatchObject({ name: 'B2Error' });
        tried++;
        continue;
      }
      // Without the footer's help everything that can still be read is right, and never anything else.
      expect(right.slice(0, now.length)).toEqual(now);
      tried++;
    }
    expect(tried).toBe(whole.length);
  });
});

async function snapshotOf(ctx: PackContext): Promise<string[]> {
  const pack = await OpenPack.open(ctx, PACK);
  try {
    const list: string[] = [];
    for (const f of pack.footer.frames) {
      list.push((await pack.readChunks(f.number)).body.toString('hex'));
    }
    return list;
  } finally {
    await pack.close();
  }
}
