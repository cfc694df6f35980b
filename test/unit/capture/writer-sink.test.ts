/** What live capture stages must be what the repository gives back, through failures of the store too. */
import { describe, expect, it } from 'vitest';
import { Staging } from '../../../src/capture/staging.js';
import { piecesOf } from '../../../src/capture/pieces.js';
import { WriterSink } from '../../../src/capture/writer-sink.js';
import { Coverage, PointClass } from '../../../src/format/commit.js';
import { VolumeWriter } from '../../../src/repo/volume-writer.js';
import { CHUNK_BYTES, checkPoint, digestOf, newModel, seeded } from '../../support/model-volume.js';
import { FaultStore } from '../../support/store-fault.js';
import { MemoryStore } from '../../support/store-memory.js';

const BLOCK = 4096;

function stagingOf(blocks: readonly number[], data: Buffer, max = 4096): Staging {
  const staging = new Staging(max);
  for (const b of blocks) staging.put(b, data.subarray(b * BLOCK, (b + 1) * BLOCK));
  return staging;
}

describe('staging', () => {
  it('keeps the newest content of each block, ascending, the last one short', () => {
    const staging = new Staging(4);
    staging.put(9, Buffer.alloc(BLOCK, 1));
    staging.put(2, Buffer.alloc(BLOCK, 2));
    staging.put(9, Buffer.alloc(512, 3));
    expect(staging.size).toBe(2);
    const all = staging.all(9 * BLOCK + 512);
    expect([...all.blocks]).toEqual([2, 9]);
    expect(all.bytesAt(0).equals(Buffer.alloc(BLOCK, 2))).toBe(true);
    expect(all.bytesAt(1).equals(Buffer.alloc(512, 3))).toBe(true);
    staging.put(3, Buffer.alloc(BLOCK));
    staging.put(4, Buffer.alloc(BLOCK));
    expect(staging.hasRoomFor(1)).toBe(false);
    expect(() => staging.put(5, Buffer.alloc(BLOCK))).toThrow('full');
    staging.clear();
    expect(staging.hasRoomFor(4)).toBe(true);
  });
});

describe('pieces', () => {
  it('do not cross windows; zeros are holes, but not inside a whole window of other data', () => {
    const data = Buffer.alloc(16 * BLOCK);
    for (const b of [0, 1, 2, 6, 7, 9]) data.fill(b + 1, b * BLOCK, (b + 1) * BLOCK);
    const staged = stagingOf([0, 1, 2, 3, 5, 6, 7, 8, 9, 12, 13, 14, 15], data).all(data.length);
    expect(piecesOf(staged, 4, 16)).toEqual([
      { index: 0, count: 4, isHole: false, isWhole: true },
      { index: 4, count: 1, isHole: true, isWhole: false },
      { index: 5, count: 2, isHole: false, isWhole: false },
      { index: 7, count: 1, isHole: true, isWhole: false },
      { index: 8, count: 1, isHole: false, isWhole: false },
      { index: 9, count: 4, isHole: true, isWhole: false },
    ]);
  });
});

describe('writer sink', () => {
  it('gives back every point bit for bit, over two claims of the volume', async () => {
    const random = seeded(11);
    const sizeBytes = 300 * BLOCK + 1024;
    const { repo, model, writer } = await newModel(new MemoryStore(), random, { sizeBytes });
    await writer.close();
    let opened = 0;
    const warnings: string[] = [];
    const sink = new WriterSink({
      open: async () => {
        opened++;
        const { writer: w, history } = await VolumeWriter.claim(repo, model.volumeId);
        await history.close();
        return w;
      },
      facts: { source: 'trace' },
      warn: (error) => void warnings.push(error.message),
    });
    const expected: { seq: number; sizeBytes: number; digest: string }[] = [];
    for (let round = 0; round < 25; round++) {
      const blocks = model.mutate(12);
      const commit = {
        pointClass: round % 5 === 3 ? PointClass.none : PointClass.crash,
        coverage: Coverage.exact,
        instantNs: BigInt(round + 1),
        startedNs: BigInt(round + 1),
        sizeBytes,
        content: stagingOf(blocks, model.data).all(sizeBytes),
      };
      if (round === 10) {
        // The claim is lost between two commits and taken again: as after a store that was away.
        await sink.close();
      }
      const done = await sink.commit(commit);
      expect(done.seq).toBe(round + 1);
      expected.push({ seq: done.seq, sizeBytes, digest: digestOf(model.data) });
    }
    await sink.close();
    expect(opened).toBe(2);
    expect(warnings).toEqual([]);
    for (const e of expected) await checkPoint(repo, model.volumeId, e);
    expect(CHUNK_BYTES).toBe(16_384);
    await repo.close();
  });

  it('claims the volume anew after a commit that failed, but not from another writer', async () => {
    const random = seeded(12);
    let failing = false;
    const store = new FaultStore(new MemoryStore(), (call) =>
      failing && (call.kind === 'sync' || call.kind === 'append') ? { do: 'no-space' } : undefined,
    );
    const { repo, model, writer } = await newModel(store, random, { sizeBytes: 64 * BLOCK });
    await writer.close();
    let opened = 0;
    const sink = new WriterSink({
      open: async () => {
        opened++;
        const { writer: w, history } = await VolumeWriter.claim(repo, model.volumeId);
        await history.close();
        return w;
      },
      facts: {},
      warn: () => undefined,
    });
    const commitOf = (instantNs: bigint) => ({
      pointClass: PointClass.crash,
      coverage: Coverage.exact,
      instantNs,
      startedNs: instantNs,
      sizeBytes: 64 * BLOCK,
      content: stagingOf(model.mutate(5), model.data).all(64 * BLOCK),
    });
    const expected = [];
    expected.push({
      seq: (await sink.commit(commitOf(1n))).seq,
      sizeBytes: 64 * BLOCK,
      digest: digestOf(model.data),
    });
    failing = true;
    const failed = commitOf(2n);
    await expect(sink.commit(failed)).rejects.toMatchObject({ kind: 'no-space' });
    failing = false;
    expected.push({
      seq: (await sink.commit({ ...failed, instantNs: 3n })).seq,
      sizeBytes: 64 * BLOCK,
      digest: digestOf(model.data),
    });
    expect(opened).toBe(2);
    const other = await VolumeWriter.claim(repo, model.volumeId);
    await other.history.close();
    await expect(sink.commit(commitOf(4n))).rejects.toMatchObject({ kind: 'lost-claim' });
    await expect(sink.commit(commitOf(5n))).rejects.toMatchObject({ kind: 'lost-claim' });
    expect(opened).toBe(2);
    for (const e of expected) await checkPoint(repo, model.volumeId, e);
    await other.writer.close();
    await sink.close();
    await repo.close();
  });
});
