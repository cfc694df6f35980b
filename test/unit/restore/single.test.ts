import { describe, expect, test } from 'vitest';
import { FRAME_HEADER_BYTES } from '../../../src/format/frame.js';
import { packName } from '../../../src/format/names.js';
import type { FooterFrame } from '../../../src/format/pack.js';
import { OpenPack } from '../../../src/repo/pack-reader.js';
import { ChunkRoom, SingleChunks } from '../../../src/restore/single.js';
import { makePackImage } from '../../support/pack-image.js';
import { MemoryStore } from '../../support/store-memory.js';

interface Bed {
  readonly single: SingleChunks;
  readonly pack: OpenPack;
  readonly bytes: Buffer;
  /** The first frame of one chunk that is compressed, and the first that is not, with the index of its chunk. */
  readonly frames: readonly { readonly frame: FooterFrame; readonly chunk: number }[];
}

async function bed(encrypted: boolean): Promise<Bed> {
  const store = new MemoryStore({ record: false });
  const { context, packIds } = await makePackImage({
    store,
    seed: 11,
    sizeBytes: 16 * 1024 * 1024,
    encrypted,
  });
  const [packId = ''] = packIds;
  const pack = await OpenPack.open(context, packId);
  const room = new ChunkRoom();
  const single = new SingleChunks(context, packId, context.keys.packSealer(packId), room);
  const found = new Map<number, { frame: FooterFrame; chunk: number }>();
  let chunk = 0;
  for (const frame of pack.footer.frames) {
    if (frame.count === 1 && !found.has(frame.compression))
      found.set(frame.compression, { frame, chunk });
    chunk += frame.count;
  }
  expect([...found.keys()].sort((a, b) => a - b)).toEqual([0, 1]);
  return { single, pack, bytes: await store.get(packName(packId)), frames: [...found.values()] };
}

describe.each([true, false])('frames of one chunk (encrypted: %s)', (encrypted) => {
  test('are opened as the long way opens them, in any order', async () => {
    const { single, pack, bytes, frames } = await bed(encrypted);
    for (const { frame, chunk } of [...frames, ...frames.toReversed()]) {
      const { body, entries } = await pack.readChunks(frame.number);
      const into = Buffer.alloc(frame.plainBytes, 0xee);
      expect(single.open(frame, bytes, frame.offset, into)).toBe(true);
      expect(into.equals(body)).toBe(true);
      expect(single.hasId(pack.footer.ids, chunk * 32)).toBe(true);
      expect(single.hasId(pack.footer.ids, (chunk + 1) * 32)).toBe(false);
      const ids = Buffer.alloc(40);
      single.copyId(ids, 5);
      expect(ids.subarray(5, 37).equals(entries[0]?.id ?? Buffer.alloc(0))).toBe(true);
      expect(single.check(frame, bytes, frame.offset)).toBe(true);
      expect(single.hasId(pack.footer.ids, chunk * 32)).toBe(true);
    }
  });

  test('are refused with any byte changed, cut off, elsewhere, or not as the footer says', async () => {
    const { single, bytes, frames } = await bed(encrypted);
    const both = (frame: FooterFrame, from: Buffer, at: number): void => {
      const into = Buffer.alloc(frame.plainBytes);
      expect(single.open(frame, from, at, into)).toBe(false);
      expect(single.check(frame, from, at)).toBe(false);
    };
    for (const { frame } of frames) {
      const end = frame.offset + FRAME_HEADER_BYTES + frame.storedBytes;
      const places = new Set<number>([end - 1, end - 16, end - 17]);
      for (let i = 0; i < FRAME_HEADER_BYTES + 40; i++) places.add(frame.offset + i);
      for (let i = frame.offset; i < end; i += 997) places.add(i);
      for (const at of places) {
        bytes.writeUInt8(bytes.readUInt8(at) ^ 0x41, at);
        both(frame, bytes, frame.offset);
        bytes.writeUInt8(bytes.readUInt8(at) ^ 0x41, at);
      }
      both(frame, bytes.subarray(0, end - 1), frame.offset);
      both(frame, bytes, frame.offset + 1);
      both({ ...frame, number: frame.number + 1 }, bytes, frame.offset);
      both({ ...frame, compression: frame.compression === 0 ? 1 : 0 }, bytes, frame.offset);
      both({ ...frame, plainBytes: frame.plainBytes - 1 }, bytes, frame.offset);
      both({ ...frame, storedBytes: frame.storedBytes - 1 }, bytes, frame.offset);
      both({ ...frame, storedBytes: 20 }, bytes, frame.offset);
      const short = Buffer.alloc(frame.plainBytes - 1);
      expect(single.open(frame, bytes, frame.offset, short)).toBe(false);
      expect(single.check(frame, bytes, frame.offset)).toBe(true);
    }
  });
});
