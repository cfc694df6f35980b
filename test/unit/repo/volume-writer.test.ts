import { describe, expect, it } from 'vitest';
import { VolumeHistory } from '../../../src/repo/history.js';
import { Repository } from '../../../src/repo/repository.js';
import { VolumeWriter } from '../../../src/repo/volume-writer.js';
import { MemoryStore } from '../../support/store-memory.js';
import { PASSWORD, checkPoint, newModel, seeded } from '../../support/model-volume.js';

describe.each([
  { canAppend: true, encrypted: true },
  { canAppend: false, encrypted: false },
])(
  'the writer of a volume (append $canAppend, encrypted $encrypted)',
  ({ canAppend, encrypted }) => {
    it('makes points that restore bit for bit, across packs, writers, resizes and merges', async () => {
      const random = seeded(41);
      const store = new MemoryStore({ canAppend, record: false });
      const { repo, model, writer } = await newModel(store, random, {
        sizeBytes: 2 * 1024 * 1024 + 1536,
        encrypted,
      });
      let w = writer;
      const everything = Array.from({ length: Math.ceil(model.data.length / 4096) }, (_, i) => i);
      model.mutate(30);
      await model.capture(w, everything, true);
      for (let i = 0; i < 120; i++) {
        if (i % 37 === 20) model.resize(1024 * 1024 + 512 * Math.floor(random() * 4096));
        await model.capture(w, model.mutate(4));
        if (w.wantsFinish) await w.finishPack();
        if (i % 23 === 22) {
          await w.close();
          const claimed = await VolumeWriter.claim(repo, model.volumeId);
          await claimed.history.close();
          w = claimed.writer;
        }
      }
      await w.close();
      expect(model.acknowledged).toHaveLength(121);
      const again = await Repository.open(store, [PASSWORD], repo.env);
      for (const e of model.acknowledged) await checkPoint(again, model.volumeId, e);
      const history = await VolumeHistory.open(again, model.volumeId);
      expect(history.coveredSeq).toBe(121);
      expect(history.journal).toEqual([]);
      expect(history.problems).toEqual([]);
      await history.close();
    });

    it('stops when another writer has claimed the volume, and the chain holds what was acknowledged', async () => {
      const random = seeded(42);
      const store = new MemoryStore({ canAppend, record: false });
      const { repo, model, writer } = await newModel(store, random, {
        sizeBytes: 1024 * 1024,
        encrypted,
      });
      await model.capture(writer, model.mutate(5), true);
      await model.capture(writer, model.mutate(5));
      const second = await VolumeWriter.claim(repo, model.volumeId);
      await second.history.close();
      const before = Buffer.from(model.data);
      const lost = model.mutate(5);
      await expect(model.capture(writer, lost)).rejects.toMatchObject({
        kind: 'lost-claim',
        code: 11,
      });
      await writer.close();
      // The loser's commit is in a pack; the winner's, made on what was acknowledged, displaces it.
      model.data = before;
      await model.capture(second.writer, model.mutate(3));
      await second.writer.close();
      expect(model.acknowledged.map((e) => e.seq)).toEqual([1, 2, 3]);
      for (const e of model.acknowledged) await checkPoint(repo, model.volumeId, e);
    });
  },
);
