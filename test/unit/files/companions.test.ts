/** Which points of other volumes belong to a point: those of its instant, in volumes of its group, and no others. */
import { writeFileSync } from 'node:fs';
import { expect, it } from 'vitest';

import { B2Error } from '../../../src/errors.js';
import { companionsAt, GroupVolumes, type OtherVolume } from '../../../src/files/companions.js';
import { PointClass } from '../../../src/format/commit.js';
import { systemClock, systemRandom } from '../../../src/clock.js';
import { currentIdentity } from '../../../src/process-identity.js';
import { VolumeHistory } from '../../../src/repo/history.js';
import type { VolumeGroup } from '../../../src/repo/point-set.js';
import { Repository } from '../../../src/repo/repository.js';
import { openStore } from '../../../src/repo/store-url.js';
import { Timeline } from '../../../src/repo/timeline.js';
import { listVolumes, type VolumeMeta } from '../../../src/repo/volume.js';
import { captureGroup } from '../../support/group-points.js';
import { MemoryImage } from '../../support/image-memory.js';
import { testMeta } from '../../support/model-volume.js';
import { tempDir } from '../../support/tmp.js';

const volume = (id: string, name: string, group?: string): VolumeMeta => ({
  ...testMeta(id.repeat(32), 4096, name),
  facts: group === undefined ? {} : { group },
});

const [b, c] = [volume('b', 'web/sdb', 'data'), volume('c', 'web/sdc', 'data')];
const group = (others: readonly VolumeMeta[], former: readonly VolumeMeta[] = []): VolumeGroup => ({
  name: 'data',
  others,
  former,
});

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
  const found = await companionsAt(group([b, c, volume('d', 'web/sdd', 'data')]), point, open);
  expect(found?.group).toBe('data');
  expect(found?.there.map((t) => [t.volume, t.index])).toEqual([['web/sdb', 0]]);
  await found?.there[0]?.openImage();
  expect(opened).toEqual([['web/sdb', 4]]);
  expect(found?.missing).toEqual([
    { volume: 'web/sdc', reason: 'web/sdc has no point of that instant' },
    { volume: 'web/sdd', reason: 'web/sdd cannot be read: its manifest is gone' },
  ]);

  const fuzzy = { ...point, pointClass: PointClass.fuzzy };
  const none = await companionsAt(group([b], [c]), fuzzy, open);
  expect(none?.there).toEqual([]);
  expect(none?.missing[0]?.reason).toContain('point #9 is not exact');
  expect(none?.missing).toHaveLength(1);
  expect(await companionsAt(group([]), point, open)).toBeUndefined();
});

it('a volume that was taken out of the group is there where it has the instant, and missed nowhere', async () => {
  const open = (meta: VolumeMeta): OtherVolume => ({
    pointsAt: (ns) => Promise.resolve(meta.name === 'web/sdb' || ns === 5n ? [3] : []),
    openImage: () => Promise.reject(new Error('not asked for')),
  });
  const at = (instantNs: bigint): ReturnType<typeof companionsAt> =>
    companionsAt(group([b], [c]), { seq: 9, instantNs, pointClass: PointClass.crash }, open);
  const before = await at(5n);
  expect(before?.there.map((t) => [t.volume, t.index])).toEqual([
    ['web/sdb', 0],
    ['web/sdc', 1],
  ]);
  const since = await at(6n);
  expect(since?.there.map((t) => t.volume)).toEqual(['web/sdb']);
  expect([before?.missing, since?.missing]).toEqual([[], []]);
});

it('two points of one instant are none', async () => {
  const open = (): OtherVolume => ({
    pointsAt: () => Promise.resolve([3, 8]),
    openImage: () => Promise.reject(new Error('not asked for')),
  });
  const point = { seq: 9, instantNs: 5n, pointClass: PointClass.crash };
  const found = await companionsAt(group([b]), point, open);
  expect(found?.there).toEqual([]);
  expect(found?.missing[0]?.reason).toMatch(/web\/sdb has 2 points of that instant/);
});

it('the newest point that most of the group have is found, though a volume of it is in no use any more', async () => {
  const dir = tempDir();
  const env = { clock: systemClock, random: systemRandom, owner: currentIdentity() };
  try {
    const made = await Repository.init(
      await openStore(dir.join('repo'), { create: true }),
      { encryption: 'none', chunkBytes: 65_536, packBytes: 4 * 1024 * 1024 },
      undefined,
      env,
    );
    await made.close();
    const files: Record<string, string> = {};
    for (const name of ['a', 'b', 'old']) {
      files[name] = dir.join(name);
      writeFileSync(dir.join(name), Buffer.alloc(65_536, name));
    }
    const { a = '', b: other = '', old = '' } = files;
    const second = 1_000_000_000n;
    const at = (n: bigint): bigint => 1_700_000_000n * second + n * second;
    const capture = (n: bigint, which: Record<string, string>): Promise<unknown> =>
      captureGroup(dir.join('repo'), which, at(n));
    await capture(0n, { a, b: other, old }); // a #1
    await capture(100n, { a, b: other }); // a #2
    await capture(101n, { a }); // a #3
    await capture(102n, { a, b: other }); // a #4
    await capture(103n, { a }); // a #5
    await capture(300n, { a }); // a #6
    const repo = await Repository.open(await openStore(dir.join('repo')), [], env);
    const volumes = await listVolumes(repo, () => undefined);
    const meta = volumes.find((v) => v.name === 'lab/a');
    if (meta === undefined) throw new Error('no volume a');
    const history = await VolumeHistory.open(repo, meta.id);
    const group = new GroupVolumes(repo, meta, () => undefined);
    const before = async (seq: number): Promise<number | undefined> => {
      const point = await new Timeline(history.sources).bySeq(seq);
      if (point === undefined) throw new Error(`no point #${seq}`);
      return (await group.sharedBefore(history, point))?.seq;
    };
    // #2 and #4 have no more than one of the two others; of that which is minutes older nothing is taken.
    const found: (number | undefined)[] = [];
    for (const seq of [1, 2, 3, 4, 5, 6]) found.push(await before(seq));
    expect(found).toEqual([undefined, undefined, 2, undefined, 4, undefined]);
    await group.close();
    await history.close();
    await repo.close();
  } finally {
    await dir.remove();
  }
});
