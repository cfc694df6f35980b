/** Which points of other volumes belong to a point: those of its instant, in volumes of its group, and no others. */
import { expect, it } from 'vitest';

import { B2Error } from '../../../src/errors.js';
import { companionsAt, type OtherVolume } from '../../../src/files/companions.js';
import { PointClass } from '../../../src/format/commit.js';
import type { VolumeMeta } from '../../../src/repo/volume.js';
import { MemoryImage } from '../../support/image-memory.js';
import { testMeta } from '../../support/model-volume.js';

const volume = (id: string, name: string, group?: string): VolumeMeta => ({
  ...testMeta(id.repeat(32), 4096, name),
  facts: group === undefined ? {} : { group },
});

const [b, c] = [volume('b', 'web/sdb', 'data'), volume('c', 'web/sdc', 'data')];

it('only the one exact point of exactly that instant is taken; what is missing is named with the reason', async () => {
  const points: Readonly<Record<string, readonly (readonly [bigint, number])[]>> = {
    'web/sdb': [
      [999n, 3],
      [1000n, 4],
      [1001n, 5],
    ],
    'web/sdc': [
      [999n, 7],
      [1001n, 8],
    ],
  };
  const opened: (readonly [string, number])[] = [];
  const open = (meta: VolumeMeta): OtherVolume => ({
    pointsAt: (ns) => {
      const found = points[meta.name];
      if (found === undefined)
        return Promise.reject(new B2Error('damaged', 'its manifest is gone'));
      return Promise.resolve(found.filter(([at]) => at === ns).map(([, seq]) => seq));
    },
    openImage: (seq) => {
      opened.push([meta.name, seq]);
      return Promise.resolve(new MemoryImage([{ length: 1, hole: true }]));
    },
  });
  const point = { seq: 9, instantNs: 1000n, pointClass: PointClass.crash };
  const found = await companionsAt('data', [b, c, volume('d', 'web/sdd', 'data')], point, open);
  expect(found?.group).toBe('data');
  expect(found?.there.map((t) => [t.volume, t.index])).toEqual([['web/sdb', 0]]);
  await found?.there[0]?.openImage();
  expect(opened).toEqual([['web/sdb', 4]]);
  expect(found?.missing).toEqual([
    { volume: 'web/sdc', reason: 'web/sdc has no point of that instant' },
    { volume: 'web/sdd', reason: 'web/sdd cannot be read: its manifest is gone' },
  ]);

  const fuzzy = { ...point, pointClass: PointClass.fuzzy };
  const none = await companionsAt('data', [b], fuzzy, open);
  expect(none?.there).toEqual([]);
  expect(none?.missing[0]?.reason).toContain('point #9 is not exact');
  expect(await companionsAt('data', [], point, open)).toBeUndefined();
});

it('two points of one instant are none', async () => {
  const open = (): OtherVolume => ({
    pointsAt: () => Promise.resolve([3, 8]),
    openImage: () => Promise.reject(new Error('not asked for')),
  });
  const point = { seq: 9, instantNs: 5n, pointClass: PointClass.crash };
  const found = await companionsAt('data', [b], point, open);
  expect(found?.there).toEqual([]);
  expect(found?.missing[0]?.reason).toMatch(/web\/sdb has 2 points of that instant/);
});
