import { readFileSync, readdirSync, writeFileSync } from 'node:fs';
import { afterEach, describe, expect, it } from 'vitest';

import { FRAME_HEADER_BYTES, FrameType } from '../../../src/format/frame.js';
import type { PackFooter } from '../../../src/format/pack.js';
import { OpenPack } from '../../../src/repo/pack-reader.js';
import { PackWriter } from '../../../src/repo/pack-writer.js';
import { MapStore } from '../../../src/tape/map-store.js';
import { KEY_STEP, type WantedChunks } from '../../../src/tape/pack-maker.js';
import { PackWork } from '../../../src/tape/pack-work.js';
import { testImage } from '../../support/scan-bed.js';
import { TapeBed } from '../../support/tape-bed.js';

const MIB = 1024 * 1024;
let bed: TapeBed | undefined;
let work: PackWork | undefined;
afterEach(async () => {
  await work?.close();
  await bed?.remove();
  bed = undefined;
  work = undefined;
});

interface Source {
  readonly packId: string;
  readonly file: string;
  readonly footer: PackFooter;
}

/** A repository with data in it, and its packs. */
async function newRepo(
  encryption: 'aes256-gcm' | 'none',
): Promise<{ repo: TapeBed['repo']; work: PackWork; sources: readonly Source[] }> {
  bed = await TapeBed.make({ encryption });
  const { repo } = bed;
  await bed.capture(testImage(7, 3 * MIB));
  // Frames of several chunks, which the capture of a test image has none of.
  const small = testImage(8, 200_000);
  const writer = await PackWriter.create(repo.packContext(), repo.newId(), 1n);
  for (let at = 0; at < 5; at++) {
    const list = Array.from({ length: 7 }, (_, i) =>
      small.subarray((at * 7 + i) * 4000).subarray(0, 4000 + i),
    );
    writer.addChunks(list.map((bytes) => ({ bytes, id: repo.keys.chunkId(bytes) })));
  }
  await writer.seal(repo.newSalt());
  const sources: Source[] = [];
  const packs = bed.dir.join('repo/packs');
  for (const name of readdirSync(packs, { recursive: true, encoding: 'utf8' })) {
    const packId = name.split('/').at(-1) ?? '';
    if (packId.length !== 32) continue;
    const pack = await OpenPack.open(repo.packContext(), packId);
    const { footer } = pack;
    await pack.close();
    if (footer.frames.some((f) => f.type === FrameType.chunks))
      sources.push({ packId, file: `${packs}/${name}`, footer });
  }
  work = new PackWork(repo.packContext());
  return { repo, work, sources };
}

/** All chunks of a pack, or those with `take`. */
function wanted({ packId, footer }: Source, take = (_: number): boolean => true): WantedChunks {
  const keys: number[] = [];
  let chunk = 0;
  for (const f of footer.frames)
    for (let sub = 0; sub < f.count; sub++) if (take(chunk++)) keys.push(f.number * KEY_STEP + sub);
  return { packId, keys: Uint32Array.from(keys) };
}

/** Ids of the chunks that are wanted, in order. */
function idsOf(sources: readonly Source[], list: readonly WantedChunks[]): string[] {
  return list.flatMap(({ packId, keys }) => {
    const footer = sources.find((s) => s.packId === packId)?.footer;
    const found = new Map<number, string>();
    let chunk = 0;
    for (const f of footer?.frames ?? [])
      for (let sub = 0; sub < f.count; sub++, chunk++)
        found.set(
          f.number * KEY_STEP + sub,
          footer?.ids.toString('hex', chunk * 32, chunk * 32 + 32) ?? '',
        );
    return Array.from(keys, (key) => found.get(key) ?? 'not there');
  });
}

const PACK_ID = '0123456789abcdef0123456789abcdef';
const job = (sources: readonly WantedChunks[]): Parameters<PackWork['build']>[0] => ({
  packId: PACK_ID,
  createdNs: 5n,
  salt: '00112233445566778899aabbccddeeff',
  sources,
});

describe.each(['aes256-gcm', 'none'] as const)('a pack for a tape, %s', (encryption) => {
  it('holds what was asked for, of whole frames and of parts of them', async () => {
    const { repo, work: made, sources } = await newRepo(encryption);
    const counts = sources.flatMap((s) => s.footer.frames.map((f) => f.count));
    expect(new Set(counts)).toEqual(new Set([1, 7]));
    const lists = [
      sources.map((s) => wanted(s)),
      sources.map((s) => wanted(s, (chunk) => chunk % 3 !== 1)),
    ];
    for (const list of lists) {
      const out = Buffer.from(new SharedArrayBuffer(16 * MIB));
      const length = await made.build(job(list), out);
      const ids = idsOf(sources, list);
      const checked = await made.check(PACK_ID, out.subarray(0, length));
      expect(checked).toMatchObject({ chunks: ids.length, sealed: true, damaged: [] });
      const name = `packs/${PACK_ID.slice(0, 2)}/${PACK_ID}`;
      const store = new MapStore('memory', new Map([[name, out.subarray(0, length)]]));
      const pack = await OpenPack.open({ ...repo.packContext(), store }, PACK_ID);
      const there: string[] = [];
      for (const f of pack.footer.frames)
        for (const e of (await pack.readChunks(f.number)).entries) there.push(e.id.toString('hex'));
      expect(there).toEqual(ids);
      expect(pack.footer.ids.toString('hex')).toBe(ids.join(''));
      expect(pack.header).toMatchObject({ createdNs: 5n, generation: 0 });
      await pack.close();
    }
  });

  it('is not made where a frame of the repository is not what it was, and is where the frame is right again', async () => {
    const { work: made, sources } = await newRepo(encryption);
    const [source] = sources;
    if (source === undefined) throw new Error('no pack');
    const good = readFileSync(source.file);
    const frame = source.footer.frames.find((f) => f.type === FrameType.chunks);
    if (frame === undefined) throw new Error('no frame');
    const out = Buffer.alloc(16 * MIB);
    const places = [4, 9, 25, 40, FRAME_HEADER_BYTES + frame.storedBytes - 1];
    for (const place of places) {
      const bad = Buffer.from(good);
      bad.writeUInt8(bad.readUInt8(frame.offset + place) ^ 1, frame.offset + place);
      writeFileSync(source.file, bad);
      await expect(made.build(job([wanted(source)]), out)).rejects.toMatchObject({
        kind: 'damaged',
        message: expect.stringContaining(source.packId) as string,
      });
    }
    writeFileSync(source.file, good);
    const length = await made.build(job([wanted(source)]), out);
    expect((await made.check(PACK_ID, out.subarray(0, length))).damaged).toEqual([]);
  });

  it('that does not fit is an error, and nothing is written behind the room', async () => {
    const { work: made, sources } = await newRepo(encryption);
    const whole = Buffer.alloc(16 * MIB, 0xee);
    await expect(
      made.build(job(sources.map((s) => wanted(s))), whole.subarray(0, 300_000)),
    ).rejects.toThrow('larger than was planned');
    expect(whole.subarray(300_000).every((b) => b === 0xee)).toBe(true);
  });
});
