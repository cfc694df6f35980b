import { readdirSync, writeFileSync } from 'node:fs';
import { describe, expect, it } from 'vitest';
import type { ByteRange, ReadDevice } from '../../../src/devices/device.js';
import { openReadDevice } from '../../../src/devices/open.js';
import { B2Error } from '../../../src/errors.js';
import { STRIPE_BLOCKS } from '../../../src/format/extent.js';
import { contextOf } from '../../../src/repo/handle.js';
import { PackWriter } from '../../../src/repo/pack-writer.js';
import { openDirectoryStore } from '../../../src/repo/store-directory.js';
import { Placements } from '../../../src/capture/placements.js';
import { placeWord } from '../../../src/repo/dedupe/table.js';
import {
  CALL_KINDS,
  FaultStore,
  failNth,
  type CallKind,
  type Fault,
} from '../../support/store-fault.js';
import {
  bedOn,
  caught,
  handleOf,
  packsIn,
  restored,
  testImage,
  uniqueChunks,
  type Bed,
} from '../../support/scan-bed.js';
import { MemoryStore } from '../../support/store-memory.js';
import { tempDir } from '../../support/tmp.js';

const MiB = 1024 * 1024;

interface TestDevice extends ReadDevice {
  readonly reads: ByteRange[];
  /** Called before each read. */
  before: (offset: number, length: number) => void;
  /** Undefined: cannot tell. */
  data: readonly ByteRange[] | undefined;
}

function testDevice(bytes: Buffer): TestDevice {
  const device: TestDevice = {
    facts: {
      path: '/dev/test',
      realPath: '/dev/test',
      kind: 'block',
      sizeBytes: bytes.length,
      logicalBlockBytes: 512,
      physicalBlockBytes: 4096,
      readOnly: false,
      devNumber: undefined,
      partitionOf: undefined,
      identity: {},
      diskSequence: undefined,
    },
    reads: [],
    before: () => undefined,
    data: undefined,
    async read(into, offset) {
      await Promise.resolve();
      device.before(offset, into.byteLength);
      device.reads.push({ offset, length: into.byteLength });
      return bytes.copy(into, 0, offset, Math.min(bytes.length, offset + into.byteLength));
    },
    async dataRanges(offset, length) {
      const end = Math.min(offset + length, bytes.length);
      return (device.data ?? [{ offset: 0, length: bytes.length }])
        .map((r) => ({ from: Math.max(r.offset, offset), to: Math.min(r.offset + r.length, end) }))
        .filter((r) => r.to > r.from)
        .map((r) => ({ offset: r.from, length: r.to - r.from }));
    },
    refresh: () => Promise.resolve(device.facts),
    close: () => Promise.resolve(),
  };
  return device;
}

describe('scanDevice in this thread', () => {
  it.each([
    { canAppend: true, encrypted: true, chunkBytes: 16_384 },
    { canAppend: false, encrypted: true, chunkBytes: 65_536 },
    { canAppend: true, encrypted: false, chunkBytes: 262_144 },
  ])('stores every byte once (append $canAppend, encrypted $encrypted, $chunkBytes)', async (c) => {
    for (const sizeBytes of [9 * MiB + 512 * 7, 4 * MiB, c.chunkBytes, 4096, 512]) {
      const image = testImage(sizeBytes, sizeBytes, c.chunkBytes);
      image.write('never all zeros', image.length - 20);
      const bed = await bedOn(
        new MemoryStore({ canAppend: c.canAppend, record: false }),
        handleOf({ encrypted: c.encrypted, chunkBytes: c.chunkBytes }),
      );
      const result = await bed.scan(testDevice(image));
      expect((await restored(bed, result)).equals(image)).toBe(true);
      const { stats } = result;
      expect(stats.doneBytes).toBe(sizeBytes);
      expect(stats.readBytes).toBe(sizeBytes);
      expect(stats.zeroBytes + stats.duplicateBytes + stats.newBytes).toBe(sizeBytes);
      const { chunks, unique } = uniqueChunks(image, c.chunkBytes);
      expect([stats.chunks, stats.newChunks]).toEqual([chunks, unique]);
      expect(await packsIn(bed)).toEqual({
        sealed: result.packs.map((p) => p.packId).toSorted(),
        open: [],
      });
      for (const pack of result.packs) {
        const info = await bed.store.stat(`packs/${pack.packId.slice(0, 2)}/${pack.packId}`);
        expect(info?.sizeBytes).toBe(pack.sizeBytes);
      }
      expect(result.foreignPacks).toEqual([]);
      expect(result.unreadable).toEqual([]);
    }
  });

  it('stores nothing the second time, and says which packs of others it relies on', async () => {
    const image = testImage(5, 6 * MiB);
    const store = new MemoryStore({ record: false });
    const bed = await bedOn(store);
    const first = await bed.scan(testDevice(image));
    expect(first.packs.length).toBeGreaterThan(1);
    const again = await bed.scan(testDevice(image));
    expect([again.stats.newChunks, again.packs]).toEqual([0, []]);
    expect(again.foreignPacks.toSorted()).toEqual(first.packs.map((p) => p.packId).toSorted());
    expect((await restored(bed, again)).equals(image)).toBe(true);
    // Another process knows the packs from the store only.
    const other = await bedOn(store, handleOf(), 2);
    image.fill('changed', 3 * MiB, 3 * MiB + 100_000);
    const later = await other.scan(testDevice(image));
    expect(later.stats.newChunks).toBe(7);
    expect((await restored(other, later)).equals(image)).toBe(true);
    expect(later.foreignPacks.toSorted()).toEqual(first.packs.map((p) => p.packId).toSorted());
    const alone = await other.scan(testDevice(image), { reuse: false });
    expect(alone.foreignPacks).toEqual([]);
    expect(alone.stats.newChunks).toBe(uniqueChunks(image, 16_384).unique);
    expect((await restored(other, alone)).equals(image)).toBe(true);
  });

  it('reuses chunks that share a frame, never as part of a run', async () => {
    const image = testImage(6, 2 * MiB);
    for (let at = 0; at < image.length; at += 4096) image.writeUInt32LE(at + 1, at);
    const bed = await bedOn(new MemoryStore());
    const ctx = contextOf(bed.handle, bed.store);
    const writer = await PackWriter.create(ctx, 'cd'.repeat(16), 1n);
    const chunks = Array.from({ length: 20 }, (_, i) =>
      image.subarray((i + 3) * 16_384, (i + 4) * 16_384),
    );
    for (const chunk of chunks) {
      writer.addChunks([
        { bytes: chunk, id: ctx.keys.chunkId(chunk) },
        { bytes: Buffer.alloc(4096, 1), id: ctx.keys.chunkId(Buffer.alloc(4096, 1)) },
      ]);
    }
    await writer.seal(Buffer.alloc(16, 1));
    await bed.index.refresh();
    const result = await bed.scan(testDevice(image));
    expect(result.foreignPacks).toEqual(['cd'.repeat(16)]);
    expect((await restored(bed, result)).equals(image)).toBe(true);
    const shared = [...result.placements.extents()].filter((e) => e.packId === 'cd'.repeat(16));
    expect(shared.map((e) => e.count)).toEqual(Array.from({ length: 20 }, () => 4));
  });

  it('does not read what is known to be zeros', async () => {
    const image = Buffer.alloc(24 * MiB);
    image.write('a', 5 * MiB + 3);
    image.write('b', 20 * MiB - 1);
    const device = testDevice(image);
    device.data = [
      { offset: 5 * MiB, length: 4096 },
      { offset: 20 * MiB - 8192, length: 8192 },
    ];
    const bed = await bedOn(new MemoryStore());
    const result = await bed.scan(device);
    expect((await restored(bed, result)).equals(image)).toBe(true);
    expect(result.stats.readBytes).toBe(2 * 16_384);
    expect(device.reads).toHaveLength(2);
    expect(result.stats.doneBytes).toBe(24 * MiB);
    expect([...result.placements.extents()]).toHaveLength(5);
  });

  it('scans a part of the device', async () => {
    const image = testImage(7, 10 * MiB + 1000);
    const bed = await bedOn(new MemoryStore());
    for (const range of [
      { offset: 0, length: 16_384 },
      { offset: 3 * MiB + 16_384, length: 5 * MiB },
      { offset: 10 * MiB, length: 1000 },
      { offset: 0, length: 0 },
    ]) {
      const result = await bed.scan(testDevice(image), { range });
      expect(
        (await restored(bed, result)).equals(
          image.subarray(range.offset, range.offset + range.length),
        ),
      ).toBe(true);
    }
    for (const range of [
      { offset: 4096, length: 16_384 },
      { offset: 0, length: 5000 },
      { offset: 0, length: 10 * MiB + 16_384 },
    ]) {
      expect(await caught(bed.scan(testDevice(image), { range }))).toBeInstanceOf(RangeError);
    }
  });

  it('reports progress up to the end', async () => {
    const bed = await bedOn(new MemoryStore());
    const seen: number[] = [];
    await bed.scan(testDevice(testImage(8, 9 * MiB)), {
      onProgress: (stats, total) => {
        expect(total).toBe(9 * MiB);
        seen.push(stats.doneBytes);
      },
    });
    expect(seen.at(-1)).toBe(9 * MiB);
  });
});

describe('a scan that cannot read', () => {
  const image = testImage(11, 9 * MiB + 5000);
  const badBlocks = [
    { offset: 4 * MiB, length: 4096 },
    { offset: 4 * MiB + 4096, length: 4096 },
    { offset: 6 * MiB + 20_480, length: 4096 },
    { offset: 9 * MiB + 4096, length: 904 },
  ];
  const badDevice = (): TestDevice => {
    const device = testDevice(image);
    device.before = (offset, length) => {
      const bad = badBlocks.find((b) => b.offset < offset + length && offset < b.offset + b.length);
      if (bad === undefined) return;
      throw new B2Error('io', `read ${length} bytes at offset ${offset} of /dev/test: EIO`, {
        retryable: true,
      });
    };
    return device;
  };

  it('fails with device and offset, and leaves nothing half-written', async () => {
    const bed = await bedOn(new MemoryStore());
    const error = await caught(bed.scan(badDevice()));
    expect(error).toMatchObject({
      kind: 'io',
      message: 'read 4194304 bytes at offset 4194304 of /dev/test: EIO',
    });
    expect((await packsIn(bed)).open).toEqual([]);
    const result = await bed.scan(testDevice(image));
    expect((await restored(bed, result)).equals(image)).toBe(true);
  });

  it('collects what is unreadable to the block, and stores the rest', async () => {
    const bed = await bedOn(new MemoryStore());
    const result = await bed.scan(badDevice(), { onReadError: 'collect' });
    expect(result.unreadable).toEqual([
      { offset: 4 * MiB, length: 8192 },
      { offset: 6 * MiB + 20_480, length: 4096 },
      { offset: 9 * MiB + 4096, length: 904 },
    ]);
    const expected = Buffer.from(image);
    for (const bad of badBlocks) expected.fill(0, bad.offset, bad.offset + bad.length);
    expect((await restored(bed, result)).equals(expected)).toBe(true);
    expect(result.stats.readBytes).toBe(image.length - 4096 * 3 - 904);
  });

  it('a device that goes away is not a device with bad blocks', async () => {
    const bed = await bedOn(new MemoryStore());
    const device = badDevice();
    device.refresh = () => Promise.reject(new B2Error('io', 'it is gone'));
    expect(await caught(bed.scan(device, { onReadError: 'collect' }))).toMatchObject({
      kind: 'io',
      message: /offset 4194304/,
    });
  });

  it('a device that ends early is an error that says where', async () => {
    const bed = await bedOn(new MemoryStore());
    const device = testDevice(image.subarray(0, 5 * MiB));
    const longer: ReadDevice = { ...device, facts: { ...device.facts, sizeBytes: 9 * MiB } };
    const error = await caught(
      bed.scan({ ...longer, dataRanges: async (offset, length) => [{ offset, length }] }),
    );
    expect(error).toMatchObject({
      kind: 'io',
      message: 'read /dev/test: it ends at byte 5242880, though its size was 9437184',
    });
  });
});

describe('a scan whose store fails', () => {
  const image = testImage(21, 6 * MiB);
  const writes: readonly CallKind[] = ['put', 'openAppend', 'append', 'sync'];
  const faults: readonly Fault[] = [
    { do: 'no-space' },
    { do: 'io', retryable: false },
    { do: 'partial' },
    { do: 'lose-answer' },
  ];

  it.each([{ canAppend: true }, { canAppend: false }])(
    'at any call (append $canAppend) says so, cleans up and works again',
    async ({ canAppend }) => {
      let cases = 0;
      for (const fault of faults) {
        for (let n = 0; ; n++) {
          const store = new FaultStore(new MemoryStore({ canAppend, record: false }));
          const bed = await bedOn(store);
          store.setFaults(failNth(n, fault, writes));
          const ended = await bed.scan(testDevice(image)).catch((error: unknown) => error);
          store.setFaults();
          if (store.injected === 0) {
            expect(ended).not.toBeInstanceOf(Error);
            break;
          }
          cases++;
          const kind = fault.do === 'no-space' || fault.do === 'partial' ? 'no-space' : 'io';
          if (fault.do === 'partial' && !(ended instanceof Error)) continue; // openAppend cannot be done by half
          expect(ended).toMatchObject({ kind });
          expect((await packsIn(bed)).open).toEqual([]);
          const again = await bed.scan(testDevice(image));
          expect((await restored(bed, again)).equals(image)).toBe(true);
        }
      }
      expect(cases).toBeGreaterThanOrEqual(canAppend ? 30 : 8);
    },
  );

  it('in a full repository ends with no-space, also when nothing can be deleted', async () => {
    const store = new FaultStore(new MemoryStore({ record: false }), ({ kind }) =>
      kind === 'delete' ? { do: 'io', retryable: true } : undefined,
    );
    const bed = await bedOn(store);
    store.fillUp();
    expect(await caught(bed.scan(testDevice(image)))).toMatchObject({ kind: 'no-space' });
    store.makeRoom();
    expect((await restored(bed, await bed.scan(testDevice(image)))).equals(image)).toBe(true);
  });

  it('does not fail because footers cannot be read: it stores the chunks again', async () => {
    const inner = new MemoryStore({ record: false });
    const first = await (await bedOn(inner)).scan(testDevice(image));
    const store = new FaultStore(inner);
    const bed = await bedOn(store, handleOf(), 2);
    store.setFaults(({ kind }) =>
      CALL_KINDS.includes(kind) && kind === 'read' ? { do: 'io', retryable: false } : undefined,
    );
    const result = await bed.scan(testDevice(image));
    store.setFaults();
    expect(result.stats.newChunks).toBe(first.stats.newChunks);
    expect(result.foreignPacks).toEqual([]);
    expect(result.unreadablePacks.length).toBe(first.packs.length);
    expect((await restored(bed, result)).equals(image)).toBe(true);
  });
});

describe('a scan that is told to stop', () => {
  it('before it begins or in the middle, rejects and leaves nothing open', async () => {
    const image = testImage(31, 20 * MiB);
    const bed = await bedOn(new MemoryStore({ record: false }));
    expect(
      await caught(bed.scan(testDevice(image), { signal: AbortSignal.abort() })),
    ).toMatchObject({
      kind: 'interrupted',
      message: 'the scan of /dev/test was interrupted',
    });
    const abort = new AbortController();
    const device = testDevice(image);
    device.before = (offset) => {
      if (offset >= 8 * MiB) abort.abort(new B2Error('lost-claim', 'another writer'));
    };
    expect(await caught(bed.scan(device, { signal: abort.signal }))).toMatchObject({
      kind: 'lost-claim',
    });
    const left = await packsIn(bed);
    expect(left.open).toEqual([]);
    expect(left.sealed.length).toBeGreaterThan(0);
    // What was finished is not lost.
    await bed.index.refresh();
    const result = await bed.scan(testDevice(image));
    expect(result.foreignPacks.toSorted()).toEqual(left.sealed);
    expect((await restored(bed, result)).equals(image)).toBe(true);
  });
});

describe('scanDevice in threads', () => {
  const openFiles = (): number => readdirSync('/proc/self/fd').length;

  async function directoryBed(
    dir: { join(...names: string[]): string },
    name = 'repo',
  ): Promise<Bed> {
    const storeUrl = dir.join(name);
    return bedOn(
      await openDirectoryStore(storeUrl, { create: true }),
      handleOf({ storeUrl, packBytes: 2 * MiB }),
    );
  }

  it('stores the same as one thread does, each chunk once although two may meet it at the same time', async () => {
    await using dir = tempDir();
    // Pairs of equal segments: whoever reads one half meets the other's chunks at about the same moment.
    const half = testImage(41, 4 * MiB);
    const image = Buffer.concat([
      half,
      half,
      testImage(42, 4 * MiB),
      half,
      testImage(42, 4 * MiB),
      half.subarray(0, 70_000),
    ]);
    writeFileSync(dir.join('image'), image);
    const bed = await directoryBed(dir);
    const before = openFiles();
    const result = await bed.scan(dir.join('image'), { workers: 2 });
    expect(openFiles()).toBe(before);
    expect((await restored(bed, result)).equals(image)).toBe(true);
    const memory = await bedOn(new MemoryStore({ record: false }));
    const one = await memory.scan(testDevice(image));
    expect(result.stats.newChunks).toBe(one.stats.newChunks);
    expect(result.stats.newBytes).toBe(one.stats.newBytes);
    const again = await bed.scan(dir.join('image'), { workers: 2 });
    expect(again.stats.newChunks).toBe(0);
    expect((await restored(bed, again)).equals(image)).toBe(true);
    await bed.store.close();
  });

  it('a missing device and an abort are errors as in one thread, and no file stays open', async () => {
    await using dir = tempDir();
    const bed = await directoryBed(dir);
    expect(await caught(bed.scan(dir.join('none'), { workers: 2 }))).toMatchObject({
      kind: 'not-found',
    });
    writeFileSync(dir.join('image'), testImage(43, 40 * MiB));
    const device = await openReadDevice(dir.join('image'));
    const before = openFiles();
    const abort = new AbortController();
    let asked = 0;
    const running = bed.scan(
      // The search for holes runs beside the threads: the abort comes while they work or start.
      {
        ...device,
        facts: device.facts,
        dataRanges: (o, l) => (asked++ === 0 && abort.abort(), device.dataRanges(o, l)),
      },
      { workers: 2, signal: abort.signal },
    );
    expect(await caught(running)).toMatchObject({ kind: 'interrupted' });
    expect(asked).toBeGreaterThan(0);
    expect(openFiles()).toBe(before);
    expect((await packsIn(bed)).open).toEqual([]);
    await device.close();
    await bed.store.close();
  });

  it('an error of one thread ends the scan with that error', async () => {
    await using dir = tempDir();
    writeFileSync(dir.join('image'), testImage(44, 20 * MiB));
    const bed = await directoryBed(dir);
    const device = await openReadDevice(dir.join('image'));
    const larger = { ...device.facts, sizeBytes: 40 * MiB };
    const before = openFiles();
    const error = await caught(
      bed.scan(
        { ...device, facts: larger, dataRanges: async (offset, length) => [{ offset, length }] },
        { workers: 2 },
      ),
    );
    expect(error).toBeInstanceOf(B2Error);
    expect(error).toMatchObject({ kind: 'io', message: /not what it was when the scan began/ });
    expect(openFiles()).toBe(before);
    await device.close();
    await bed.store.close();
  });
});

describe('placements', () => {
  it('split runs at stripes, gaps, other packs and shared frames', () => {
    const chunkBytes = 65_536;
    const perStripe = (STRIPE_BLOCKS * 4096) / chunkBytes;
    const windows = perStripe + 8;
    const packs = new SharedArrayBuffer(windows * 4);
    const places = new SharedArrayBuffer(windows * 4);
    const p = new Uint32Array(packs).fill(0xffff_ffff);
    const w = new Uint32Array(places);
    const set = (at: number, pack: number, frame: number, sub = 0, shared = false): void => {
      p[at] = pack;
      w[at] = placeWord(frame, sub, shared);
    };
    set(perStripe - 2, 0, 65_533);
    set(perStripe - 1, 0, 65_534);
    set(perStripe, 0, 65_535); // next stripe
    set(perStripe + 1, 0, 0); // the frame number does not wrap around
    set(perStripe + 2, 1, 1);
    set(perStripe + 3, 1, 2, 0, true);
    set(perStripe + 4, 1, 3);
    set(perStripe + 5, 1, 4, 1, true);
    set(perStripe + 7, 1, 5);
    const length = windows * chunkBytes - 65_000;
    const list = [
      ...new Placements({ offset: 0, length }, chunkBytes, ['a', 'b'], { packs, places }).extents(),
    ];
    const s = STRIPE_BLOCKS;
    expect(list.map((e) => [e.block, e.count, e.packId, e.frame, e.sub])).toEqual([
      [0, s - 32, undefined, 0, 0],
      [s - 32, 32, 'a', 65_533, 0],
      [s, 16, 'a', 65_535, 0],
      [s + 16, 16, 'a', 0, 0],
      [s + 32, 16, 'b', 1, 0],
      [s + 48, 16, 'b', 2, 0],
      [s + 64, 16, 'b', 3, 0],
      [s + 80, 16, 'b', 4, 1],
      [s + 96, 16, undefined, 0, 0],
      [s + 112, 1, 'b', 5, 0],
    ]);
  });
});
