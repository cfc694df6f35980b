/** Points of several image files that are of one instant, as `b2 watch --group` makes them, without a watch. */
import { systemClock, systemRandom } from '../../src/clock.js';
import { takeSnapshot } from '../../src/capture/snapshot.js';
import { currentIdentity } from '../../src/process-identity.js';
import { Repository } from '../../src/repo/repository.js';
import { openStore } from '../../src/repo/store-url.js';
import { writeVolumeMeta } from '../../src/repo/volume.js';

export const GROUP = 'data';
const HOST = 'lab';

/** Volume `lab/NAME` of each file, and the sequence number of its point. */
export type GroupPoint = Readonly<Record<string, number>>;

/**
 * Captures files (by the last part of their volumes' names) to a repository without encryption, as they are now: one instant of all,
 * `instantNs`, named `snapshot`. Nothing may write to them meanwhile.
 */
export async function captureGroup(
  repository: string,
  files: Readonly<Record<string, string>>,
  instantNs: bigint,
  snapshot?: string,
): Promise<GroupPoint> {
  const clock = { ...systemClock, nowNs: () => instantNs };
  const store = await openStore(repository);
  const repo = await Repository.open(store, [], {
    clock,
    random: systemRandom,
    owner: currentIdentity(),
  });
  try {
    const points: Record<string, number> = {};
    for (const [name, device] of Object.entries(files)) {
      const { volume, point, notExact } = await takeSnapshot(repo, {
        device,
        volume: `${HOST}/${name}`,
        ...(snapshot === undefined ? {} : { name: snapshot }),
        tags: [],
        skipUnreadable: false,
        takeOver: false,
        host: HOST,
        dedupeCacheFile: undefined,
        workers: 0,
        storeUrl: undefined,
        signal: new AbortController().signal,
        events: () => undefined,
      });
      if (notExact !== undefined) throw new Error(`${device}: ${notExact}`);
      await writeVolumeMeta(repo, { ...volume, facts: { ...volume.facts, group: GROUP } });
      points[name] = point.seq;
    }
    return points;
  } finally {
    await repo.close();
  }
}
