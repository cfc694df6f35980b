/** Packs of the repository that go to a tape as they are: which do, and that everything that reads cartridges copes with them. */
import { execFileSync } from 'node:child_process';
import { mkdirSync, readFileSync, readdirSync, writeFileSync } from 'node:fs';
import { afterEach, describe, expect, it } from 'vitest';
import { FileDrive } from '../../../src/devices/tape/file-drive.js';
import { FRAME_HEADER_BYTES, FrameType } from '../../../src/format/frame.js';
import { packName } from '../../../src/format/names.js';
import {
  PACK_HEADER_BYTES,
  encodeFooter,
  encodePackHeader,
  type FooterFrame,
} from '../../../src/format/pack.js';
import type { TapePart } from '../../../src/format/tape.js';
import { OpenPack } from '../../../src/repo/pack-reader.js';
import { Repository } from '../../../src/repo/repository.js';
import { openDirectoryStore } from '../../../src/repo/store-directory.js';
import { SetIndex, listCartridges, putCartridge, putParts } from '../../../src/tape/catalogue.js';
import { openTapeView } from '../../../src/tape/import.js';
import { copyPiece, planCopy } from '../../../src/tape/pack-copier.js';
import { KEY_STEP } from '../../../src/tape/pack-maker.js';
import { ExportPlan, copyOf } from '../../../src/tape/plan.js';
import { verifyTape } from '../../../src/tape/verify.js';
import { Repository as ForeignRepository, extract, list } from '../../extractor/extract.mjs';
import { systemClock } from '../../../src/clock.js';
import { noise } from '../../support/disks.js';
import { testImage } from '../../support/scan-bed.js';
import { BED_ENVIRONMENT, PASSWORD, TapeBed, tapeFiles } from '../../support/tape-bed.js';
import { bringBack, restore } from '../../support/tape-restore.js';

const MIB = 1024 * 1024;
const beds: TapeBed[] = [];
afterEach(async () => {
  for (const bed of beds.splice(0)) await bed.remove();
});

/** Bytes that do not compress, no two chunks of which are equal. */
function random(seed: number, bytes: number): Buffer {
  return Buffer.from(noise(seed, bytes).buffer, 0, bytes);
}

async function newBed(...args: Parameters<typeof TapeBed.make>): Promise<TapeBed> {
  const bed = await TapeBed.make(...args);
  beds.push(bed);
  return bed;
}

/** The packs of the repository that hold chunks, by id. */
async function chunkPacks(bed: TapeBed): Promise<Map<string, { file: string; pack: OpenPack }>> {
  const root = bed.dir.join('repo/packs');
  const found = new Map<string, { file: string; pack: OpenPack }>();
  for (const name of readdirSync(root, { recursive: true, encoding: 'utf8' }).toSorted()) {
    const packId = name.split('/').at(-1) ?? '';
    if (packId.length !== 32) continue;
    const pack = await OpenPack.open(bed.repo.packContext(), packId);
    await pack.close();
    if (pack.footer.frames.some((f) => f.type === FrameType.chunks))
      found.set(packId, { file: `${root}/${name}`, pack });
  }
  return found;
}

/** The key of every chunk. */
function keysOf(frames: readonly FooterFrame[]): Uint32Array {
  return Uint32Array.from(
    frames.flatMap((f) => Array.from({ length: f.count }, (_, sub) => f.number * KEY_STEP + sub)),
  );
}

/** Does to a pack what compaction does: drops the frames named. */
function compact(bed: TapeBed, file: string, pack: OpenPack, dead: ReadonlySet<number>): void {
  const old = readFileSync(file);
  const { packId, footer, header } = pack;
  const parts: Buffer[] = [encodePackHeader({ ...header, generation: header.generation + 1 })];
  const frames: FooterFrame[] = [];
  const ids: Buffer[] = [];
  const lengths: number[] = [];
  let at = PACK_HEADER_BYTES;
  let chunk = 0;
  for (const f of footer.frames) {
    const first = chunk;
    chunk += f.count;
    if (dead.has(f.number)) continue;
    const bytes = old.subarray(f.offset, f.offset + FRAME_HEADER_BYTES + f.storedBytes);
    parts.push(bytes);
    frames.push({ ...f, offset: at });
    ids.push(footer.ids.subarray(first * 32, chunk * 32));
    lengths.push(...footer.lengths.subarray(first, chunk));
    at += bytes.length;
  }
  const rest = { frames, ids: Buffer.concat(ids), lengths: Uint32Array.from(lengths) };
  parts.push(encodeFooter(rest, packId, at, bed.repo.newSalt(), bed.repo.keys));
  writeFileSync(file, Buffer.concat(parts));
  bed.repo.packs.forget(packId);
}

/** What tar takes out of cartridges, one after the other. */
function untar(bed: TapeBed, paths: readonly string[]): string {
  const out = bed.dir.join(`out-${readdirSync(bed.dir.join('.')).length}`);
  mkdirSync(out);
  for (const path of paths)
    for (const file of tapeFiles(path))
      execFileSync('tar', ['-b', '128', '-C', out, '-xf', `${path}/${file}`]);
  return `${out}/b2-repository`;
}

/** Compares every point of what tar took out with its image, as the independent extractor reads it. */
function expectForeign(root: string, images: ReadonlyMap<number, Buffer>): void {
  for (const packsOnly of [false, true]) {
    const foreign = new ForeignRepository(root, { password: PASSWORD.password });
    const [volume] = list(foreign, packsOnly).volumes;
    for (const [seq, image] of images) {
      const to = `${root}/image-${packsOnly}-${seq}`;
      extract(foreign, packsOnly, packsOnly ? (volume?.id ?? '') : 'v', String(seq), to, null);
      expect(readFileSync(to).equals(image)).toBe(true);
    }
    foreign.close();
  }
}

describe('which packs are written as they are', () => {
  const chunk = (number: number, more: Partial<FooterFrame> = {}): FooterFrame => ({
    number,
    offset: PACK_HEADER_BYTES + number * 1032,
    storedBytes: 1000,
    plainBytes: 4096,
    type: FrameType.chunks,
    compression: 0,
    count: 2,
    ...more,
  });
  const frames = [chunk(0), chunk(1), chunk(2)];
  const header = {
    packId: 'a'.repeat(32),
    repositoryId: 'b'.repeat(32),
    encrypted: true,
    generation: 0,
    createdNs: 1n,
  };
  type Pack = Parameters<typeof copyOf>[0];
  const packOf = (list: readonly FooterFrame[], more: Partial<Pack> = {}): Pack => {
    const chunks = list.reduce((n, f) => n + f.count, 0);
    const end = PACK_HEADER_BYTES + list.length * 1032;
    return {
      sealed: true,
      header,
      sizeBytes: end + 500,
      validBytes: end,
      footer: { frames: list, ids: Buffer.alloc(32 * chunks), lengths: new Uint32Array(chunks) },
      ...more,
    };
  };

  it('one that was never compacted and holds nothing but chunks, all of which are wanted', () => {
    const all = keysOf(frames);
    expect(copyOf(packOf(frames), all)).toMatchObject({
      frames: 3,
      sizeBytes: 64 + 3 * 1032 + 500,
    });
    const not: readonly (readonly [string, Pack, Uint32Array])[] = [
      ['a chunk is not wanted', packOf(frames), all.subarray(1)],
      ['the last chunk is not wanted', packOf(frames), all.subarray(0, 5)],
      ['another chunk is wanted', packOf(frames), Uint32Array.from([...all.subarray(0, 5), 9e6])],
      ['it is not sealed', packOf(frames, { sealed: false }), all],
      ['it was compacted', packOf(frames, { header: { ...header, generation: 1 } }), all],
      ['something lies before its footer', packOf(frames, { validBytes: 64 + 3 * 1032 + 9 }), all],
      ['it holds nothing', packOf([]), new Uint32Array(0)],
    ];
    for (const [why, pack, keys] of not)
      expect([why, copyOf(pack, keys)]).toEqual([why, undefined]);
    const spoiled: readonly (readonly [string, FooterFrame[]])[] = [
      ['a frame is lost', [chunk(0), chunk(2, { offset: 64 + 1032 }), chunk(3)]],
      ['a gap between frames', [chunk(0), chunk(1, { offset: 64 + 1033 }), chunk(2)]],
      ['a commit', [chunk(0), chunk(1), chunk(2, { type: FrameType.commit, count: 0 })]],
      ['extents', [chunk(0, { type: FrameType.extents, count: 0 }), chunk(1), chunk(2)]],
    ];
    for (const [why, list] of spoiled)
      expect([why, copyOf(packOf(list), keysOf(list))]).toEqual([why, undefined]);
  });

  it('pieces are whole frames, and together the pack', () => {
    for (const [count, storedBytes] of [
      [1, 100],
      [3, 6 * MIB],
      [500, 65_600],
      [4000, 700],
    ] as const) {
      const total = FRAME_HEADER_BYTES + storedBytes;
      const many = Array.from({ length: count }, (_, i) =>
        chunk(i, { offset: PACK_HEADER_BYTES + i * total, storedBytes }),
      );
      const sizeBytes = PACK_HEADER_BYTES + count * total + 333;
      const plan = planCopy(many, sizeBytes);
      expect(plan).toMatchObject({ frames: count, sizeBytes });
      expect(plan.pieces).toBeGreaterThanOrEqual(Math.ceil(sizeBytes / (plan.roomBytes + total)));
      expect(plan.roomBytes % 4096).toBe(0);
      expect(plan.roomBytes).toBeLessThan(4 * MIB + total + 8192);
    }
  });

  it('none that the set holds otherwise, damaged, or in a way that is not known', async () => {
    const bed = await newBed();
    await bed.capture(random(40, 3 * MIB));
    const points = [await bed.point()];
    const drive = await FileDrive.open(`file:${bed.cartridge('c1')}`);
    const done = await bed.export(drive, points);
    await drive.close();
    expect(done.copiedPacks).toBeGreaterThan(1);
    expect(done.copiedPacks).toBe(done.packs);
    const [cartridge] = await listCartridges(bed.repo, () => undefined);
    if (cartridge === undefined) throw new Error('no cartridge');
    const [first] = await chunkPacks(bed);
    if (first === undefined) throw new Error('no pack');
    const [packId, { pack }] = first;
    const plan = async (sinceLast: boolean): Promise<ExportPlan> => {
      const all = await listCartridges(bed.repo, () => undefined);
      const index = await SetIndex.load(bed.repo, all, sinceLast, () => undefined);
      return ExportPlan.make(bed.repo, points, index, sinceLast, { copyBytes: 2 * MIB });
    };
    expect((await plan(false)).copies).toBe(done.packs);
    expect((await plan(true)).packs).toEqual([]);
    // One chunk less on the set than the pack has now.
    const chunks = pack.footer.lengths.length;
    const part = (count: number): TapePart => ({
      packs: [{ packId, file: 2, record: 0 }],
      places: [
        { source: packId, frame: 0, sub: 0, count, bySub: false, pack: 0, toFrame: 0, toSub: 0 },
      ],
    });
    const [session] = cartridge.sessions;
    if (session === undefined) throw new Error('no session');
    const put = async (count: number, damaged: readonly string[]): Promise<void> => {
      const other = { ...session, parts: 1, damagedPacks: damaged };
      await putParts(bed.repo, cartridge.tape.label, 1, [part(count)]);
      await putCartridge(bed.repo, { ...cartridge, sessions: [session, other] });
    };
    await put(chunks, []);
    expect((await plan(false)).copies).toBe(done.packs);
    await put(chunks - 1, []);
    const made = (await plan(false)).packs.filter((p) => p.copy === undefined);
    expect(made.map((p) => p.sources.map((s) => s.packId))).toEqual([[packId]]);
    expect(made[0]?.packId).not.toBe(packId);
    await put(chunks, [packId]);
    expect((await plan(false)).copies).toBe(done.packs - 1);
    await bed.repo.store.delete(`tapes/${cartridge.tape.label}.1.0`);
    expect((await plan(false)).copies).toBe(0);
    // Of a copy the set holds what its places say, whatever the repository's pack holds now.
    await putParts(bed.repo, cartridge.tape.label, 0, [part(chunks - 1)]);
    await putCartridge(bed.repo, { ...cartridge, sessions: [{ ...session, parts: 1 }] });
    const grown = await plan(true);
    const wanted = grown.packs.flatMap((p) => p.sources).find((s) => s.packId === packId);
    expect(Array.from(wanted?.keys ?? [])).toEqual([(chunks - 1) * KEY_STEP]);
  });
});

describe.each(['aes256-gcm', 'none'] as const)('copies of packs, %s', (encryption) => {
  it('are the bytes of the repository, beside packs that are made', async () => {
    const bed = await newBed({ encryption });
    const first = testImage(41, 6 * MIB + 512);
    await bed.capture(first);
    const second = Buffer.from(first);
    testImage(42, 400_000).copy(second, MIB);
    await bed.capture(second);
    const path = bed.cartridge('c1');
    const drive = await FileDrive.open(`file:${path}`);
    const done = await bed.export(drive, [await bed.point()]);
    expect(done.copiedPacks).toBeGreaterThan(1);
    expect(done.copiedPacks).toBeLessThan(done.packs);
    const root = untar(bed, [path]);
    let copied = 0;
    for (const [packId, { file }] of await chunkPacks(bed)) {
      const there = `${root}/${packName(packId)}`;
      const isCopied = tarHas(there);
      if (!isCopied) continue;
      copied += readFileSync(there).length;
      expect(readFileSync(there).equals(readFileSync(file))).toBe(true);
    }
    expect(copied).toBe(done.copiedBytes);
    expectForeign(root, new Map([[2, second]]));
    const { result, bytes } = await restore(bed, drive);
    expect(result.isWhole).toBe(true);
    expect(bytes.equals(second)).toBe(true);
    await drive.close();
  });

  it('are not written where a frame, a header or a footer is not what it was', async () => {
    const bed = await newBed({ encryption, packBytes: 5 * MIB });
    await bed.capture(random(43, 12 * MIB));
    const points = [await bed.point()];
    const [first] = [...(await chunkPacks(bed))].toSorted(
      ([, x], [, y]) => y.pack.sizeBytes - x.pack.sizeBytes,
    );
    if (first === undefined) throw new Error('no pack');
    const [packId, { file, pack }] = first;
    const good = readFileSync(file);
    const frame = pack.footer.frames.at(-1);
    if (frame === undefined) throw new Error('no frame');
    for (const [i, at] of [
      frame.offset + 9,
      frame.offset + 90,
      frame.offset + FRAME_HEADER_BYTES + frame.storedBytes - 1,
      100,
    ].entries()) {
      const bad = Buffer.from(good);
      bad.writeUInt8(bad.readUInt8(at) ^ 1, at);
      writeFileSync(file, bad);
      const drive = await FileDrive.open(`file:${bed.cartridge(`c${i}`)}`);
      await expect(
        bed.export(drive, points, { packBytes: 6 * MIB, setName: `S${i}` }),
      ).rejects.toMatchObject({
        kind: 'damaged',
        message: expect.stringContaining(packId) as string,
      });
      await drive.close();
    }
    for (const c of await listCartridges(bed.repo, () => undefined)) expect(c.sessions).toEqual([]);
    // What lies outside the frames is checked in the very bytes that are written.
    const job = { ...planCopy(pack.footer.frames, good.length), packId, phase: 0 };
    expect(job.pieces).toBeGreaterThan(1);
    for (const at of [20, good.length - 5, good.length - 40]) {
      writeFileSync(file, good);
      const work = await open(bed, packId);
      const bad = Buffer.from(good);
      bad.writeUInt8(bad.readUInt8(at) ^ 1, at);
      writeFileSync(file, bad);
      const piece = at < PACK_HEADER_BYTES ? 0 : job.pieces - 1;
      for (const isCached of [true, false])
        await expect(work.copy({ ...job, piece }, isCached)).rejects.toMatchObject({
          kind: 'damaged',
        });
      await work.pack.close();
    }
    writeFileSync(file, good);
    const work = await open(bed, packId);
    for (const [isCached, phase] of [
      [true, 0],
      [true, 1536],
      [true, 4095],
      [false, 512],
    ] as const) {
      const parts: Buffer[] = [];
      for (let piece = 0; piece < job.pieces; piece++)
        parts.push(await work.copy({ ...job, piece, phase }, isCached));
      expect(Buffer.concat(parts).equals(good)).toBe(true);
    }
    await expect(
      work.copy({ ...job, piece: 0, sizeBytes: good.length - 1 }, true),
    ).rejects.toMatchObject({ kind: 'failed', retryable: true });
    await work.pack.close();
    const drive = await FileDrive.open(`file:${bed.cartridge('good')}`);
    const done = await bed.export(drive, points, { packBytes: 6 * MIB, setName: 'S9' });
    expect(done).toMatchObject({ isWhole: true, copiedPacks: done.packs });
    await drive.close();
  });
});

function tarHas(file: string): boolean {
  try {
    readFileSync(file);
    return true;
  } catch {
    return false;
  }
}

async function open(
  bed: TapeBed,
  packId: string,
): Promise<{
  pack: OpenPack;
  copy: (job: Parameters<typeof copyPiece>[3], isCached: boolean) => Promise<Buffer>;
}> {
  const { SourcePack } = await import('../../../src/tape/pack-maker.js');
  const { OpenRoom } = await import('../../../src/format/seal.js');
  const ctx = bed.repo.packContext();
  const pack = await OpenPack.open(ctx, packId);
  const source = new SourcePack(ctx, packId, new OpenRoom());
  return {
    pack,
    copy: async (job, isCached) => {
      const out = Buffer.alloc(job.roomBytes);
      const { at, length } = await copyPiece(ctx, pack, source, job, out, isCached);
      return out.subarray(at, at + length);
    },
  };
}

describe('several cartridges', () => {
  it('a copy that does not fit any more is written again on the next one', async () => {
    const bed = await newBed({ packBytes: 9 * MIB });
    const image = random(44, 25 * MIB);
    await bed.capture(image);
    for (const [name, options] of [
      ['warned', '?size=13M&reserve=2M'],
      ['unwarned', '?size=13M&fault=nowarn'],
    ] as const) {
      const { drive, source, path } = await bed.library(name, options);
      const done = await bed.export(drive, [await bed.point()], {
        source,
        packBytes: 9 * MIB,
        dataFileBytes: 64 * MIB,
        setName: name,
      });
      await drive.close();
      expect(done.isWhole).toBe(true);
      expect(done.copiedPacks).toBe(done.packs);
      expect(done.cartridges.length).toBeGreaterThan(1);
      // Each pack is on one of them.
      const packs = done.cartridges.reduce((n, c) => n + c.packs - 1, 0);
      expect(packs).toBe(done.packs);
      const paths = done.cartridges.map((_, i) => path(i + 1));
      expectForeign(untar(bed, paths), new Map([[1, image]]));
      const again = await bed.library(name);
      const { result, bytes } = await restore(bed, again.drive, 'latest', { source: again.source });
      expect(result).toMatchObject({ isWhole: true, missingPacks: [] });
      expect(bytes.equals(image)).toBe(true);
      await again.drive.close();
    }
  });

  it('a pack that is damaged on one is taken from another', async () => {
    const bed = await newBed();
    const image = testImage(45, 5 * MIB);
    await bed.capture(image);
    const { drive, source, path } = await bed.library('lib');
    const one = await bed.export(drive, [await bed.point()], { setName: 'TWO' });
    const [packId] = [...(await chunkPacks(bed)).keys()];
    if (packId === undefined) throw new Error('no pack');
    await source.next({
      drive: '',
      setName: '',
      number: 2,
      label: undefined,
      barcode: undefined,
      purpose: 'write',
    });
    await drive.load();
    const two = await bed.export(drive, [await bed.point()], { setName: 'TWO' });
    await drive.close();
    expect(two).toMatchObject({ setId: one.setId, copiedPacks: one.packs });
    expect(two.cartridges.map((c) => c.label)).toEqual(['TWO-002']);
    expect(two.points[0]?.needs).toEqual([]);
    flip(path(2), packName(packId));
    const view = async (n: number): Promise<string[]> => {
      const lib = await bed.library('lib', '', [n]);
      const found = await openTapeView(lib.drive, [PASSWORD], BED_ENVIRONMENT, () => undefined);
      const report = await verifyTape({
        drive: lib.drive,
        view: found,
        workers: 0,
        clock: systemClock,
        events: () => undefined,
      });
      await found.repo.close();
      await lib.drive.close();
      return [...report.damagedPacks];
    };
    expect(await view(1)).toEqual([]);
    expect(await view(2)).toEqual([packId]);
    for (const order of [
      [1, 2],
      [2, 1],
    ]) {
      const lib = await bed.library('lib', '', order);
      const { result, bytes } = await restore(bed, lib.drive, 'latest', { source: lib.source });
      expect(result).toMatchObject({ isWhole: true, damaged: [], missingPacks: [] });
      expect(bytes.equals(image)).toBe(true);
      await lib.drive.close();
      const all = await bed.library('lib', '', order);
      const back = await bringBack(bed, all.drive, all.source, new Map([[1, image]]));
      expect(back).toMatchObject({ isWhole: true, damagedPacks: [] });
      await all.drive.close();
    }
    // Alone, the damaged one costs what is damaged.
    const alone = await bed.library('lib', '', [2]);
    const part = await restore(bed, alone.drive, 'latest', { source: alone.source });
    expect(part.result.isWhole).toBe(false);
    expect(part.result.damaged.map((d) => d.packId)).toEqual([packId]);
    expect(part.result.missingPacks).toEqual([]);
    await alone.drive.close();
  });
});

/** Damages a frame of a member of the cartridge's archives. */
function flip(path: string, name: string): void {
  for (const file of tapeFiles(path)) {
    const bytes = readFileSync(`${path}/${file}`);
    const at = bytes.indexOf(`b2-repository/${name}\0`);
    if (at < 0) continue;
    bytes.writeUInt8(bytes.readUInt8(at + 512 + 500) ^ 1, at + 512 + 500);
    writeFileSync(`${path}/${file}`, bytes);
    return;
  }
  throw new Error(`${name} is not there`);
}

describe('a set that goes on', () => {
  it('after a compaction holds both, and restores the points of before and after', async () => {
    const bed = await newBed();
    const images = new Map<number, Buffer>();
    const first = testImage(46, 5 * MIB);
    images.set(1, first);
    await bed.capture(first);
    const path = bed.cartridge('c1');
    const drive = await FileDrive.open(`file:${path}`);
    const one = await bed.export(drive, [await bed.point()]);
    expect(one.copiedPacks).toBe(one.packs);
    const second = Buffer.from(first);
    testImage(47, 3 * 65_536).copy(second, 0);
    images.set(2, second);
    await bed.capture(second);
    // What only the first point needs goes, as if that had been thinned out.
    const packs = await chunkPacks(bed);
    const index = await SetIndex.load(bed.repo, [], false, () => undefined);
    const needed = await ExportPlan.make(bed.repo, [await bed.point()], index, false);
    const live = new Map(
      needed.packs.flatMap((p) => p.sources).map((s) => [s.packId, new Set(s.keys)]),
    );
    let compacted = 0;
    for (const [packId, { file, pack }] of packs) {
      const keys = live.get(packId) ?? new Set<number>();
      const dead = pack.footer.frames.map((f) => f.number).filter((n) => !keys.has(n * KEY_STEP));
      if (dead.length === 0 || dead.length === pack.footer.frames.length) continue;
      compact(bed, file, pack, new Set(dead));
      compacted++;
    }
    expect(compacted).toBeGreaterThan(0);
    for (const sinceLast of [false, true]) {
      const two = await bed.export(drive, [await bed.point()], { sinceLast });
      expect(two.isWhole).toBe(true);
      if (sinceLast) expect(two.packs).toBe(0);
      else {
        expect(two.copiedPacks).toBeGreaterThan(0);
        expect(two.copiedPacks).toBeLessThan(two.packs);
      }
    }
    for (const [seq, image] of images) {
      const { result, bytes } = await restore(bed, drive, `#${seq}`);
      expect(result.isWhole).toBe(true);
      expect(bytes.equals(image)).toBe(true);
    }
    const back = await bringBack(bed, drive, undefined, images);
    expect(back).toMatchObject({ isWhole: true });
    expect(back.points.map((p) => p.seq)).toEqual([1, 2]);
    expectForeign(untar(bed, [path]), images);
    await drive.close();
  });

  it('goes on from a repository that was brought back from it', async () => {
    const bed = await newBed();
    const first = testImage(48, 4 * MIB);
    await bed.capture(first);
    const second = Buffer.from(first);
    testImage(49, 300_000).copy(second, MIB);
    await bed.capture(second);
    const path = bed.cartridge('c1');
    const drive = await FileDrive.open(`file:${path}`);
    const done = await bed.export(drive, [await bed.point()]);
    expect(done.copiedPacks).toBeGreaterThan(0);
    expect(done.copiedPacks).toBeLessThan(done.packs);
    const images = new Map([[2, second]]);
    await bringBack(bed, drive, undefined, images);
    const place = readdirSync(bed.dir.join('.')).find((name) => name.startsWith('back-'));
    const repo = await Repository.open(
      await openDirectoryStore(bed.dir.join(place ?? '')),
      [PASSWORD],
      BED_ENVIRONMENT,
    );
    const point = await bed.point('v', 'latest', repo);
    const none = await bed.export(drive, [point], { repo, sinceLast: true });
    expect(none.packs).toBe(0);
    const all = await bed.export(drive, [point], { repo });
    expect(all.copiedPacks).toBe(all.packs);
    expect(all.points[0]?.needs).toEqual([]);
    await repo.close();
    const { result, bytes } = await restore(bed, drive);
    expect(result.isWhole).toBe(true);
    expect(bytes.equals(second)).toBe(true);
    expectForeign(untar(bed, [path]), images);
    await drive.close();
  });
});
