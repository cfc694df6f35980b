import {
  mkdtempSync,
  openSync,
  closeSync,
  readFileSync,
  readdirSync,
  rmSync,
  statSync,
  truncateSync,
  writeFileSync,
  writeSync,
} from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { crc32 } from 'node:zlib';
import fc from 'fast-check';
import { afterEach, beforeEach, describe, expect, it } from 'vitest';

import { B2Error } from '../../../src/errors.js';
import type { Image } from '../../../src/image.js';
import {
  BLOCKS_PER_PAGE,
  SLOT_BYTES,
  intentSlotOffset,
  mapSlotOffset,
  overlayLayout,
} from '../../../src/nbd/overlay-format.js';
import {
  openOverlay,
  openOverlayOn,
  openTemporaryOverlay,
  type OverlayFile,
  type OverlayIdentity,
} from '../../../src/nbd/overlay.js';
import { RangeLock } from '../../../src/nbd/range-lock.js';
import type { WritableImage } from '../../../src/nbd/writable.js';
import { MemoryImage, patternBytes } from '../../support/image-memory.js';

const BLOCK = 4096;
const SECTOR = 512;
const ID = Buffer.alloc(16, 7);
const IDENTITY: OverlayIdentity = { repository: 'aa', volume: 'bb', seq: 12, hash: 'cc' };

function expectSame(actual: Uint8Array, wanted: Uint8Array): void {
  expect(actual.length).toBe(wanted.length);
  expect(Buffer.compare(actual, wanted)).toBe(0);
}

async function contentOf(image: {
  sizeBytes: number;
  read(into: Uint8Array, offset: number): Promise<void>;
}): Promise<Buffer> {
  const out = Buffer.alloc(image.sizeBytes, 0xee);
  await image.read(out, 0);
  return out;
}

type Change =
  | { readonly kind: 'write'; readonly offset: number; readonly data: Buffer }
  | { readonly kind: 'punch'; readonly offset: number; readonly length: number }
  | { readonly kind: 'sync' };

/** Not zeroed first: these are megabytes, thousands of times. */
function copyOf(bytes: Buffer): Buffer {
  const copy = Buffer.allocUnsafe(bytes.length);
  bytes.copy(copy);
  return copy;
}

/** A file that keeps what is durable apart from what is written, and a log of both. */
class LoggedFile implements OverlayFile {
  readonly name = 'logged';
  readonly log: Change[] = [];
  readonly initial: Buffer;
  bytes: Buffer;
  closed = false;
  fail: ((change: Change) => Error | undefined) | undefined;
  /** Every change waits for this first. */
  gate: Promise<void> = Promise.resolve();

  constructor(initial: Buffer) {
    this.initial = initial;
    this.bytes = copyOf(initial);
  }

  read(into: Uint8Array, offset: number): Promise<void> {
    if (offset + into.length > this.bytes.length)
      return Promise.reject(new B2Error('damaged', 'short'));
    into.set(this.bytes.subarray(offset, offset + into.length));
    return Promise.resolve();
  }
  write(data: Uint8Array, offset: number): Promise<void> {
    return this.#do({ kind: 'write', offset, data: Buffer.from(data) });
  }
  punch(offset: number, length: number): Promise<void> {
    return this.#do({ kind: 'punch', offset, length });
  }
  sync(): Promise<void> {
    return this.#do({ kind: 'sync' });
  }
  close(): Promise<void> {
    this.closed = true;
    return Promise.resolve();
  }

  async #do(change: Change): Promise<void> {
    await this.gate;
    const failure = this.fail?.(change);
    if (failure !== undefined) throw failure;
    apply(this.bytes, change);
    this.log.push(change);
  }
}

/** Does a change, or those pieces of it for which `arrives` says so. */
function apply(bytes: Buffer, change: Change, arrives?: () => boolean): void {
  if (change.kind === 'sync') return;
  const length = change.kind === 'write' ? change.data.length : change.length;
  // A map page of a small image changes in its first sector only, so slots are torn in finer pieces than a disk would.
  const unit = change.offset < overlayLayout(SIZE).dataOffset ? 8 : SECTOR;
  for (let at = 0; at < length;) {
    const step = Math.min(unit - ((change.offset + at) % unit), length - at);
    if (arrives === undefined || arrives()) {
      if (change.kind === 'write') change.data.copy(bytes, change.offset + at, at, at + step);
      else bytes.fill(0, change.offset + at, change.offset + at + step);
    }
    at += step;
  }
}

/** A small deterministic generator: the test prints its seed. */
function random(seed: number): (below: number) => number {
  let x = seed >>> 0 || 1;
  return (below) => {
    x ^= x << 13;
    x >>>= 0;
    x ^= x >>> 17;
    x ^= x << 5;
    x >>>= 0;
    return x % below;
  };
}

/** What the disk is after a cut behind `count` changes: each sector written since the last sync arrived or did not. */
function afterCut(
  initial: Buffer,
  log: readonly Change[],
  count: number,
  pick: (below: number) => number,
): Buffer {
  const bytes = copyOf(initial);
  const lastSync = log.slice(0, count).findLastIndex((change) => change.kind === 'sync');
  log.slice(0, count).forEach((change, i) => {
    if (i <= lastSync) apply(bytes, change);
    else {
      const mode = pick(3);
      if (mode === 1) apply(bytes, change);
      if (mode === 2) apply(bytes, change, () => pick(2) === 0);
    }
  });
  return bytes;
}

const SIZE = 40 * BLOCK + SECTOR;

function baseImage(): MemoryImage {
  return new MemoryImage([
    { length: 10 * BLOCK, hole: false },
    { length: 12 * BLOCK, hole: true },
    { length: SIZE - 22 * BLOCK, hole: false },
  ]);
}

type Operation =
  | {
      readonly kind: 'write';
      readonly offset: number;
      readonly length: number;
      readonly seed: number;
    }
  | {
      readonly kind: 'zero';
      readonly offset: number;
      readonly length: number;
      readonly allocate: boolean;
    }
  | { readonly kind: 'trim'; readonly offset: number; readonly length: number }
  | { readonly kind: 'flush' }
  | { readonly kind: 'reopen' };

const range = fc
  .tuple(fc.nat(SIZE - 1), fc.oneof(fc.nat(SECTOR), fc.nat(6 * BLOCK), fc.nat(SIZE)))
  .map(([offset, length]) => ({
    offset,
    length: Math.min(length, SIZE - offset),
  }));

const operation: fc.Arbitrary<Operation> = fc.oneof(
  {
    weight: 6,
    arbitrary: fc
      .tuple(range, fc.nat())
      .map(([r, seed]) => ({ kind: 'write' as const, ...r, seed })),
  },
  {
    weight: 2,
    arbitrary: fc
      .tuple(range, fc.boolean())
      .map(([r, allocate]) => ({ kind: 'zero' as const, ...r, allocate })),
  },
  { weight: 2, arbitrary: range.map((r) => ({ kind: 'trim' as const, ...r })) },
  { weight: 2, arbitrary: fc.constant({ kind: 'flush' as const }) },
  { weight: 1, arbitrary: fc.constant({ kind: 'reopen' as const }) },
);

async function perform(overlay: WritableImage, model: Buffer, op: Operation): Promise<void> {
  switch (op.kind) {
    case 'write': {
      const data = patternBytes(op.length, op.seed);
      data.copy(model, op.offset);
      return await overlay.write(data, op.offset);
    }
    case 'zero':
      model.fill(0, op.offset, op.offset + op.length);
      return await overlay.zero(op.offset, op.length, op.allocate);
    case 'trim': {
      const from = Math.ceil(op.offset / BLOCK) * BLOCK;
      const end = op.offset + op.length;
      const to = end === SIZE ? SIZE : Math.floor(end / BLOCK) * BLOCK;
      if (op.length > 0 && from < to) model.fill(0, from, to);
      return await overlay.trim(op.offset, op.length);
    }
    case 'flush':
    case 'reopen':
      return await overlay.flush();
  }
}

function emptyFile(sizeBytes = SIZE): LoggedFile {
  return new LoggedFile(Buffer.alloc(overlayLayout(sizeBytes).fileBytes));
}

describe('an overlay against a model', () => {
  it('reads as the base with everything done to it, and its extents never hide data', async () => {
    await fc.assert(
      fc.asyncProperty(
        fc.array(operation, { maxLength: 25 }),
        range,
        fc.integer({ min: 1, max: 4 }),
        async (operations, probe, limit) => {
          const file = emptyFile();
          let overlay = await openOverlayOn(baseImage(), file, ID);
          const model = Buffer.from(baseImage().content);
          for (const op of operations) {
            await perform(overlay, model, op);
            if (op.kind === 'reopen') {
              await overlay.close();
              overlay = await openOverlayOn(baseImage(), file, ID);
            }
          }
          expectSame(await contentOf(overlay), model);
          const part = Buffer.alloc(probe.length);
          await overlay.read(part, probe.offset);
          expectSame(part, model.subarray(probe.offset, probe.offset + probe.length));
          const all = await overlay.extents(probe.offset, probe.length);
          let at = probe.offset;
          for (const [i, extent] of all.entries()) {
            expect(extent.offset).toBe(at);
            expect(extent.length).toBeGreaterThan(0);
            if (i > 0) expect(extent.hole).not.toBe(all[i - 1]?.hole);
            if (extent.hole)
              expect(model.subarray(at, at + extent.length).every((byte) => byte === 0)).toBe(true);
            at += extent.length;
          }
          expect(at).toBe(probe.offset + probe.length);
          expect(await overlay.extents(probe.offset, probe.length, limit)).toEqual(
            all.slice(0, limit),
          );
        },
      ),
      { numRuns: 150 },
    );
  });

  it('works across map pages', async () => {
    const size = (2 * BLOCKS_PER_PAGE + 3) * BLOCK;
    const base = new MemoryImage([{ length: size, hole: true }]);
    const overlay = await openTemporaryOverlay({ base, directory: tmpdir() });
    const at = BLOCKS_PER_PAGE * BLOCK - 3 * BLOCK - 7;
    const data = patternBytes(8 * BLOCK, 3);
    await overlay.write(data, at);
    const back = Buffer.alloc(data.length);
    await overlay.read(back, at);
    expectSame(back, data);
    expect(await overlay.extents(0, size)).toEqual([
      { offset: 0, length: at - (BLOCK - 7), hole: true },
      { offset: at - (BLOCK - 7), length: 9 * BLOCK, hole: false },
      {
        offset: at - (BLOCK - 7) + 9 * BLOCK,
        length: size - at + (BLOCK - 7) - 9 * BLOCK,
        hole: true,
      },
    ]);
    await overlay.zero(0, size, false);
    expect(await overlay.extents(0, size)).toEqual([{ offset: 0, length: size, hole: true }]);
    await overlay.close();
    expect(base.closed).toBe(1);
  });

  it('writes at the same time to one block lose nothing of each other', async () => {
    const base = baseImage();
    const overlay = await openTemporaryOverlay({ base, directory: tmpdir() });
    const model = Buffer.from(base.content);
    const writes: Promise<void>[] = [];
    for (let i = 0; i < SIZE / SECTOR; i++) {
      const data = patternBytes(SECTOR, 100 + i);
      data.copy(model, i * SECTOR);
      writes.push(overlay.write(data, i * SECTOR));
    }
    await Promise.all(writes);
    expectSame(await contentOf(overlay), model);
    await overlay.close();
  });

  it('a write to part of a damaged block fails, one to all of it does not need the base', async () => {
    const base = baseImage();
    base.damaged.push({ offset: 0, length: 1, message: 'pack 3 frame 4' });
    const overlay = await openTemporaryOverlay({ base, directory: tmpdir() });
    await expect(overlay.write(Buffer.alloc(10), 5)).rejects.toMatchObject({ kind: 'damaged' });
    await overlay.write(Buffer.alloc(BLOCK, 5), 0);
    const back = Buffer.alloc(BLOCK);
    await overlay.read(back, 0);
    expectSame(back, Buffer.alloc(BLOCK, 5));
    await overlay.close();
  });

  it('rejects ranges outside the image and use after closing', async () => {
    const overlay = await openTemporaryOverlay({ base: baseImage(), directory: tmpdir() });
    await expect(overlay.read(Buffer.alloc(2), SIZE - 1)).rejects.toThrow(RangeError);
    await expect(overlay.write(Buffer.alloc(2), SIZE - 1)).rejects.toThrow(RangeError);
    await expect(overlay.zero(-1, 2, false)).rejects.toThrow(RangeError);
    await expect(overlay.trim(0, SIZE + 1)).rejects.toThrow(RangeError);
    await overlay.close();
    await expect(overlay.read(Buffer.alloc(2), 0)).rejects.toThrow('after it was closed');
    await expect(overlay.write(Buffer.alloc(2), 0)).rejects.toThrow('after it was closed');
  });
});

describe('crashes', () => {
  it('a cut after every write and sync keeps what was flushed, and never shows anything but old or new', async () => {
    let cases = 0;
    const base = baseImage();
    for (let seed = 1; seed <= 12; seed++) {
      const pick = random(seed * 7919);
      const file = emptyFile();
      const overlay = await openOverlayOn(base, file, ID);
      const model = Buffer.from(base.content);
      // For each sector the values it may have: the flushed one and all after it.
      const versions: {
        readonly at: number;
        readonly flushed: boolean;
        readonly content: Buffer;
      }[] = [{ at: 0, flushed: true, content: Buffer.from(model) }];
      for (let step = 0; step < 14; step++) {
        const offset = pick(SIZE / SECTOR) * SECTOR;
        const length = Math.min(SIZE - offset, (1 + pick(24)) * SECTOR);
        const ops: Operation[] = [
          { kind: 'write', offset, length, seed: seed * 1000 + step },
          { kind: 'write', offset, length, seed: seed * 1000 + step },
          { kind: 'zero', offset, length, allocate: false },
          { kind: 'trim', offset, length },
          { kind: 'flush' },
        ];
        const op = ops[pick(ops.length)] as Operation;
        const at = file.log.length;
        await perform(overlay, model, op);
        if (op.kind === 'flush')
          versions.push({ at: file.log.length, flushed: true, content: Buffer.from(model) });
        else versions.push({ at, flushed: false, content: Buffer.from(model) });
      }
      await overlay.close();
      versions.push({ at: file.log.length, flushed: true, content: Buffer.from(model) });
      for (let cut = 0; cut <= file.log.length; cut++) {
        const from = versions.findLastIndex((version) => version.flushed && version.at <= cut);
        const allowed = versions.filter((version, i) => i >= from && version.at <= cut);
        for (let round = 0; round < 5; round++) {
          cases++;
          const after = new LoggedFile(afterCut(file.initial, file.log, cut, pick));
          const where = `seed ${seed}, cut ${cut} of ${file.log.length}, round ${round}`;
          const first = await openOverlayOn(base, after, ID);
          const seen = await contentOf(first);
          for (let sector = 0; sector < SIZE; sector += SECTOR) {
            const value = seen.subarray(sector, sector + SECTOR);
            const known = allowed.some(({ content }) =>
              value.equals(content.subarray(sector, sector + SECTOR)),
            );
            if (!known) throw new Error(`${where}: the sector at ${sector} is neither old nor new`);
          }
          // It goes on working, and a second crash right after the recovery changes nothing that was flushed.
          await first.write(patternBytes(SECTOR, 5), 0);
          await first.flush();
          patternBytes(SECTOR, 5).copy(seen, 0);
          const again = await openOverlayOn(base, new LoggedFile(after.bytes), ID);
          expectSame(await contentOf(again), seen);
        }
      }
    }
    console.log(`overlay: ${cases} cuts`);
    expect(cases).toBeGreaterThan(1000);
  });

  it('a cut while an earlier crash is being recovered from', async () => {
    const pick = random(4242);
    const base = baseImage();
    const file = emptyFile();
    const overlay = await openOverlayOn(baseImage(), file, ID);
    await overlay.write(patternBytes(3 * BLOCK, 1), BLOCK);
    await overlay.flush();
    const flushed = await contentOf(overlay);
    await overlay.trim(30 * BLOCK, 2 * BLOCK);
    await overlay.flush();
    const later = await contentOf(overlay);
    let repaired = 0;
    for (let round = 0; round < 400; round++) {
      // Before the last sync: the map page is torn.
      const torn = new LoggedFile(afterCut(file.initial, file.log, file.log.length - 1, pick));
      await openOverlayOn(base, torn, ID);
      if (torn.log.length > 0) repaired++;
      for (let cut = 0; cut <= torn.log.length; cut++) {
        const reopened = await openOverlayOn(
          base,
          new LoggedFile(afterCut(torn.initial, torn.log, cut, pick)),
          ID,
        );
        const seen = await contentOf(reopened);
        expect(seen.equals(flushed) || seen.equals(later)).toBe(true);
      }
    }
    expect(repaired).toBeGreaterThan(20);
  });

  it('more pages at once than an intent names', async () => {
    // 1100 pages of the map: 70 GiB. Only the map is looked at, so the file is a sparse stand-in.
    const pages = 1100;
    const sizeBytes = pages * BLOCKS_PER_PAGE * BLOCK;
    const base = {
      sizeBytes,
      logicalBlockBytes: 512,
      read: (into: Uint8Array) => Promise.resolve(void into.fill(0)),
      extents: (offset: number, length: number) =>
        Promise.resolve([{ offset, length, hole: true }]),
      close: () => Promise.resolve(),
    };
    const blocks = new Map<number, Buffer>();
    const file: OverlayFile = {
      name: 'sparse',
      read(into, offset) {
        for (let at = 0; at < into.length; at += SLOT_BYTES) {
          into.set(blocks.get(offset + at) ?? Buffer.alloc(SLOT_BYTES), at);
        }
        return Promise.resolve();
      },
      write(data, offset) {
        for (let at = 0; at < data.length; at += SLOT_BYTES) {
          blocks.set(offset + at, Buffer.from(data.subarray(at, at + SLOT_BYTES)));
        }
        return Promise.resolve();
      },
      punch: () => Promise.resolve(),
      sync: () => Promise.resolve(),
      close: () => Promise.resolve(),
    };
    const overlay = await openOverlayOn(base, file, ID);
    for (let page = 0; page < pages; page++)
      await overlay.write(Buffer.alloc(BLOCK, 1), page * BLOCKS_PER_PAGE * BLOCK);
    await overlay.flush();
    const again = await openOverlayOn(base, file, ID);
    const extents = await again.extents(0, sizeBytes);
    expect(extents.filter((extent) => !extent.hole)).toHaveLength(pages);
  });
});

describe('failures', () => {
  it('a full disk fails a flush, and the next one makes good for it', async () => {
    const file = emptyFile();
    const overlay = await openOverlayOn(baseImage(), file, ID);
    await overlay.write(Buffer.alloc(BLOCK, 1), 0);
    file.fail = (change) =>
      change.kind === 'write' &&
      change.offset >= mapSlotOffset(0, 0) &&
      change.offset < mapSlotOffset(1, 0)
        ? new B2Error('no-space', 'full')
        : undefined;
    await expect(overlay.flush()).rejects.toMatchObject({ kind: 'no-space' });
    file.fail = undefined;
    await overlay.flush();
    const again = await openOverlayOn(baseImage(), new LoggedFile(file.bytes), ID);
    expectSame(await contentOf(again), await contentOf(overlay));
  });

  it('after a failed sync nothing is written or promised any more', async () => {
    const file = emptyFile();
    const overlay = await openOverlayOn(baseImage(), file, ID);
    await overlay.write(Buffer.alloc(BLOCK, 1), 0);
    file.fail = (change) =>
      change.kind === 'sync' ? new B2Error('io', 'the disk failed') : undefined;
    await expect(overlay.flush()).rejects.toMatchObject({ kind: 'io' });
    file.fail = undefined;
    await expect(overlay.flush()).rejects.toMatchObject({ kind: 'io' });
    await expect(overlay.write(Buffer.alloc(BLOCK, 1), 0)).rejects.toMatchObject({ kind: 'io' });
    await expect(overlay.trim(0, BLOCK)).rejects.toMatchObject({ kind: 'io' });
    await expect(overlay.close()).rejects.toMatchObject({ kind: 'io' });
    expect(file.closed).toBe(true);
  });

  it('flushes at the same time share commits, and none returns before its own data is durable', async () => {
    const file = emptyFile();
    const overlay = await openOverlayOn(baseImage(), file, ID);
    await Promise.all(
      Array.from({ length: 40 }, async (_, i) => {
        await overlay.write(Buffer.alloc(BLOCK, i + 1), i * BLOCK);
        await overlay.flush();
        const lastSync = file.log.findLastIndex((change) => change.kind === 'sync');
        const wrote = file.log.findIndex(
          (change) =>
            change.kind === 'write' && change.offset === overlayLayout(SIZE).dataOffset + i * BLOCK,
        );
        expect(wrote).toBeLessThan(lastSync);
      }),
    );
    expect(file.log.filter((change) => change.kind === 'sync').length).toBeLessThan(20);
  });
});

describe('a flush while a write goes on', () => {
  it('does not let a later flush believe that the write is durable', async () => {
    const file = emptyFile();
    const overlay = await openOverlayOn(baseImage(), file, ID);
    await overlay.write(Buffer.alloc(BLOCK, 1), 0);
    await overlay.flush();
    // In place: no map page changes, so only the sync tells.
    let release = (): void => undefined;
    file.gate = new Promise((done) => (release = done));
    const writing = overlay.write(Buffer.alloc(BLOCK, 2), 0);
    await new Promise((done) => setImmediate(done));
    file.gate = Promise.resolve();
    await overlay.flush();
    release();
    await writing;
    expect(file.log.at(-1)?.kind).toBe('write');
    await overlay.flush();
    expect(file.log.at(-1)?.kind).toBe('sync');
    const changes = file.log.length;
    await overlay.flush();
    expect(file.log.length).toBe(changes);
  });
});

describe('an overlay of a large device', () => {
  it('takes no memory for what is only read', async () => {
    const pages = 16_384;
    const base: Image = {
      sizeBytes: pages * BLOCKS_PER_PAGE * BLOCK,
      logicalBlockBytes: 512,
      read: (into) => {
        into.fill(7);
        return Promise.resolve();
      },
      extents: (offset, length) => Promise.resolve([{ offset, length, hole: false }]),
      close: () => Promise.resolve(),
    };
    const overlay = await openTemporaryOverlay({ base });
    const page = BLOCKS_PER_PAGE * BLOCK;
    const into = Buffer.alloc(BLOCK);
    const before = process.memoryUsage().arrayBuffers;
    for (let i = 0; i < pages; i++) await overlay.read(into, i * page);
    // 4 KiB each would be 64 MiB.
    expect(process.memoryUsage().arrayBuffers - before).toBeLessThan(16 * 1024 * 1024);
    // What is written into one of them is in no other.
    await overlay.write(Buffer.alloc(BLOCK, 1), 9 * page);
    for (const [i, byte] of [
      [8, 7],
      [9, 1],
      [10, 7],
    ] as const) {
      await overlay.read(into, i * page);
      expect(into.every((b) => b === byte)).toBe(true);
    }
    await overlay.close();
  });
});

describe('a flush while somebody writes on and on', () => {
  it('ends', async () => {
    const file = emptyFile();
    const overlay = await openOverlayOn(baseImage(), file, ID);
    await overlay.write(Buffer.alloc(BLOCK, 1), 0);
    let isFlushed = false;
    const flushing = overlay.flush().then(() => {
      isFlushed = true;
    });
    // Each of them changes the map.
    let changes = 0;
    for (; !isFlushed && changes < 2000; changes++) {
      if (changes % 2 === 0) await overlay.write(Buffer.alloc(BLOCK, 2), BLOCK);
      else await overlay.trim(BLOCK, BLOCK);
    }
    expect(changes).toBeLessThan(200);
    await flushing;
    await overlay.close();
  });
});

describe('damage', () => {
  async function flushedTwice(): Promise<LoggedFile> {
    const file = emptyFile();
    const overlay = await openOverlayOn(baseImage(), file, ID);
    await overlay.write(Buffer.alloc(BLOCK, 1), 0);
    await overlay.flush();
    await overlay.write(Buffer.alloc(BLOCK, 2), 5 * BLOCK);
    await overlay.flush();
    await overlay.close();
    return file;
  }

  it.each([
    ['the older slot of a page', mapSlotOffset(0, 0) + 70],
    ['the newer slot of a page', mapSlotOffset(0, 1) + 70],
    ['a generation', mapSlotOffset(0, 1) + 16],
  ])('a flipped bit in %s is said', async (_what, at) => {
    const file = await flushedTwice();
    file.bytes[at] = (file.bytes[at] ?? 0) ^ 4;
    const overlay = await openOverlayOn(baseImage(), file, ID);
    await expect(overlay.read(Buffer.alloc(10), 0)).rejects.toMatchObject({ kind: 'damaged' });
    await expect(overlay.write(Buffer.alloc(10), 0)).rejects.toMatchObject({ kind: 'damaged' });
  });

  it('a lost older slot is said', async () => {
    const file = await flushedTwice();
    file.bytes.fill(0, mapSlotOffset(0, 0), mapSlotOffset(0, 0) + SLOT_BYTES);
    const overlay = await openOverlayOn(baseImage(), file, ID);
    await expect(overlay.read(Buffer.alloc(10), 0)).rejects.toMatchObject({ kind: 'damaged' });
  });

  it('two bad intents are said', async () => {
    const file = await flushedTwice();
    for (const slot of [0, 1] as const)
      file.bytes.fill(0xff, intentSlotOffset(slot) + 9, intentSlotOffset(slot) + 12);
    await expect(openOverlayOn(baseImage(), file, ID)).rejects.toMatchObject({ kind: 'damaged' });
  });

  it('pages of another overlay are not taken', async () => {
    const file = await flushedTwice();
    await expect(openOverlayOn(baseImage(), file, Buffer.alloc(16, 8))).rejects.toMatchObject({
      kind: 'damaged',
    });
  });
});

describe('overlay files', () => {
  let directory: string;
  let path: string;
  beforeEach(() => {
    directory = mkdtempSync(join(tmpdir(), 'b2-overlaytest-'));
    path = join(directory, 'o');
  });
  afterEach(() => rmSync(directory, { recursive: true }));

  it('keeps writes from one opening to the next, sparse and private', async () => {
    const first = await openOverlay({ path, base: baseImage(), identity: IDENTITY });
    await first.write(patternBytes(10_000, 4), 3000);
    const wanted = await contentOf(first);
    await first.close();
    expect(readdirSync(directory)).toEqual(['o']);
    const stat = statSync(path);
    expect(stat.mode & 0o777).toBe(0o600);
    expect(stat.blocks * 512).toBeLessThan(200_000);
    const base = baseImage();
    const second = await openOverlay({ path, base, identity: IDENTITY });
    expectSame(await contentOf(second), wanted);
    await second.trim(0, SIZE);
    await second.flush();
    expect(statSync(path).blocks * 512).toBeLessThan(40_000);
    await second.close();
    expect(base.closed).toBe(1);
  });

  it('refuses another point, volume, repository or size, and a second opener', async () => {
    const open = await openOverlay({ path, base: baseImage(), identity: IDENTITY });
    await expect(
      openOverlay({ path, base: baseImage(), identity: IDENTITY }),
    ).rejects.toMatchObject({ kind: 'held' });
    await open.close();
    for (const other of [{ seq: 13 }, { volume: 'b' }, { repository: 'a' }, { hash: 'd' }]) {
      const base = baseImage();
      await expect(
        openOverlay({ path, base, identity: { ...IDENTITY, ...other } }),
      ).rejects.toMatchObject({ kind: 'refused' });
      expect(base.closed).toBe(1);
    }
    const larger = new MemoryImage([{ length: SIZE + BLOCK, hole: true }]);
    await expect(openOverlay({ path, base: larger, identity: IDENTITY })).rejects.toMatchObject({
      kind: 'refused',
    });
  });

  it('leaves files alone that are no overlays', async () => {
    writeFileSync(path, 'precious');
    await expect(
      openOverlay({ path, base: baseImage(), identity: IDENTITY }),
    ).rejects.toMatchObject({ kind: 'refused' });
    expect(readFileSync(path, 'utf8')).toBe('precious');
    await expect(
      openOverlay({ path: directory, base: baseImage(), identity: IDENTITY }),
    ).rejects.toBeInstanceOf(B2Error);
  });

  it('says so when the header is damaged, the file is cut short or the version is newer', async () => {
    await (await openOverlay({ path, base: baseImage(), identity: IDENTITY })).close();
    const original = readFileSync(path);
    const attempt = async (): Promise<unknown> =>
      await openOverlay({ path, base: baseImage(), identity: IDENTITY }).then(
        (overlay) => overlay.close().then(() => 'opened'),
        (error: unknown) => (error instanceof B2Error ? error.kind : error),
      );
    for (let at = 8; at < 120; at++) {
      const fd = openSync(path, 'r+');
      writeSync(fd, Buffer.from([(original[at] ?? 0) ^ 0x10]), 0, 1, at);
      const seen = await attempt();
      writeSync(fd, original, at, 1, at);
      closeSync(fd);
      const spare = at >= 48 + original.readUInt32LE(40);
      expect([at, seen]).toEqual([at, spare ? 'opened' : 'damaged']);
    }
    const newer = Buffer.from(original.subarray(0, BLOCK));
    newer.writeUInt32LE(2, 8);
    newer.writeUInt32LE(
      crc32(newer.subarray(48, 48 + newer.readUInt32LE(40)), crc32(newer.subarray(0, 44))),
      44,
    );
    writeFileSync(path, Buffer.concat([newer, original.subarray(BLOCK)]));
    expect(await attempt()).toBe('unsupported');
    writeFileSync(path, original);
    truncateSync(path, original.length - BLOCK);
    expect(await attempt()).toBe('damaged');
  });

  it('a directory that is not there is said, and nothing is left', async () => {
    const base = baseImage();
    await expect(
      openOverlay({ path: join(directory, 'no', 'o'), base, identity: IDENTITY }),
    ).rejects.toMatchObject({ kind: 'not-found' });
    await expect(
      openTemporaryOverlay({ base, directory: join(directory, 'no') }),
    ).rejects.toMatchObject({ kind: 'not-found' });
    expect(readdirSync(directory)).toEqual([]);
  });
});

describe('RangeLock', () => {
  it('keeps ranges that touch apart, in order, and lets others run', async () => {
    const lock = new RangeLock();
    const order: string[] = [];
    const gates: (() => void)[] = [];
    const run = (name: string, first: number, last: number): Promise<void> =>
      lock.run(first, last, async () => {
        order.push(`+${name}`);
        await new Promise<void>((done) => gates.push(done));
        order.push(`-${name}`);
      });
    const all = [run('a', 0, 4), run('b', 4, 8), run('c', 9, 9), run('d', 8, 9)];
    await expect.poll(() => order).toEqual(['+a', '+c']);
    gates[0]?.();
    await expect.poll(() => order).toEqual(['+a', '+c', '-a', '+b']);
    gates[2]?.();
    gates[1]?.();
    await expect.poll(() => gates.length).toBe(4);
    gates[3]?.();
    await Promise.all(all);
    expect(order.at(-1)).toBe('-d');
    await expect(lock.run(0, 9, () => Promise.reject(new Error('x')))).rejects.toThrow('x');
    await lock.run(0, 9, () => Promise.resolve());
  });
});
