import { describe, expect, it } from 'vitest';

import { ignoreEvents } from '../../../src/events.js';
import { packName } from '../../../src/format/names.js';
import { PACK_HEADER_BYTES, encodeFooter, encodePackHeader } from '../../../src/format/pack.js';
import { contextOf } from '../../../src/repo/handle.js';
import { OpenPack } from '../../../src/repo/pack-reader.js';
import { PackWriter } from '../../../src/repo/pack-writer.js';
import type { ObjectReader } from '../../../src/repo/store.js';
import { writeImage } from '../../../src/restore/write-image.js';
import { verifyPacks } from '../../../src/verify/data.js';
import { memoryDevice } from '../../support/device-memory.js';
import { noise } from '../../support/disks.js';
import { handleFor } from '../../support/pack-image.js';
import { SteppedClock } from '../../support/stepped-clock.js';
import { MemoryStore } from '../../support/store-memory.js';

const CHUNK = 65536;
const ID = 'd'.repeat(32);

/** A store in which the pack is compacted between the reading of its footer and that of its frames, as a bucket lets happen. */
class CompactingStore extends MemoryStore {
  compacted: Buffer = Buffer.alloc(0);
  opens = 0;

  override async open(name: string): Promise<ObjectReader> {
    this.opens++;
    if (this.opens > 1) return super.open(name);
    const old = await super.open(name);
    let reads = 0;
    return {
      sizeBytes: old.sizeBytes,
      close: () => old.close(),
      read: async (into, offset) => {
        reads++;
        if (reads <= 2) return old.read(into, offset); // header, footer
        await this.put(name, this.compacted);
        return this.compacted.copy(into, 0, offset);
      },
    };
  }
}

async function make(): Promise<{ store: CompactingStore; expected: Buffer }> {
  const store = new CompactingStore({ record: false });
  const handle = handleFor({});
  const context = contextOf(handle, store);
  const writer = await PackWriter.create(context, ID, 1n);
  const chunks = [0, 1, 2, 3, 4].map((i) => Buffer.from(noise(i + 1, CHUNK)));
  for (const chunk of chunks) writer.addChunk(chunk, context.keys.chunkId(chunk));
  await writer.seal(Buffer.alloc(16, 2));
  const old = await store.get(packName(ID));
  const pack = await OpenPack.open(context, ID);
  const { footer } = pack;
  await pack.close();
  // Frame 0 is dead: the others move to the front and keep their numbers.
  const parts: Buffer[] = [
    encodePackHeader({
      packId: ID,
      repositoryId: handle.repositoryId,
      encrypted: true,
      generation: 1,
      createdNs: 2n,
    }),
  ];
  let offset = PACK_HEADER_BYTES;
  const frames = footer.frames.slice(1).map((f) => {
    const length = f.storedBytes + 32;
    parts.push(old.subarray(f.offset, f.offset + length));
    const moved = { ...f, offset };
    offset += length;
    return moved;
  });
  const after = { frames, ids: footer.ids.subarray(32), lengths: footer.lengths.subarray(1) };
  parts.push(encodeFooter(after, ID, offset, Buffer.alloc(16, 3), context.keys));
  store.compacted = Buffer.concat(parts);
  store.opens = 0;
  return { store, expected: Buffer.concat(chunks.slice(1)) };
}

describe('a pack that is compacted while it is read', () => {
  it('is restored through its new footer', async () => {
    const { store, expected } = await make();
    const handle = handleFor({});
    const device = memoryDevice(Buffer.alloc(expected.length));
    const extent = { block: 0, count: 64, packId: ID, frame: 1, sub: 0, skip: 0 };
    const result = await writeImage(
      {
        handle,
        store,
        sizeBytes: expected.length,
        async *extents() {
          yield await Promise.resolve([extent]);
        },
      },
      device,
      {
        compare: 'never',
        isBlank: true,
        verify: true,
        onDamage: 'stop',
        clock: new SteppedClock(),
        events: ignoreEvents,
        workers: 0,
      },
    );
    expect(device.bytes.equals(expected)).toBe(true);
    expect(result.damagedFrames).toEqual([]);
    expect(store.opens).toBe(2);
  });

  it('is verified through its new footer', async () => {
    const { store } = await make();
    const result = await verifyPacks([{ packId: ID }], {
      handle: handleFor({}),
      store,
      clock: new SteppedClock(),
      events: ignoreEvents,
      workers: 0,
    });
    expect(result.findings).toEqual([]);
    expect(store.opens).toBeGreaterThan(1);
  });
});
