/** Names points that a running watch has made; see {@link Pinner}. */
import { B2Error } from '../errors.js';
import { VolumeHistory } from '../repo/history.js';
import type { Repository } from '../repo/repository.js';
import { Timeline } from '../repo/timeline.js';
import { addSnapshot, checkSnapshotName, listSnapshots } from '../repo/volume.js';
import type { Pinner } from './daemon.js';

/** Pins points of any volume of `repo`. */
export function repositoryPinner(repo: Repository): Pinner {
  return {
    async check(volumeId, name) {
      checkSnapshotName(name);
      const taken = await listSnapshots(repo, volumeId, () => undefined);
      if (taken.some((s) => s.name === name))
        throw new B2Error('exists', `the volume has a snapshot named "${name}" already`, {
          hint: 'Choose another name; "b2 snapshots" lists them.',
        });
    },
    async pin({ volumeId, volume, point, hash: known, name, tags }) {
      const hash = known ?? (await hashOf(repo, volumeId, volume, point.seq));
      if (name !== undefined) {
        await addSnapshot(repo, {
          name,
          volumeId,
          seq: point.seq,
          hash,
          instantNs: point.instantNs,
          pointClass: point.pointClass,
          tags,
          createdNs: repo.env.clock.nowNs(),
        });
      }
      return hash;
    },
  };
}

async function hashOf(
  repo: Repository,
  volumeId: string,
  volume: string,
  seq: number,
): Promise<string> {
  const history = await VolumeHistory.open(repo, volumeId);
  try {
    const commit = await new Timeline(history.sources).bySeq(seq);
    if (commit === undefined)
      throw new B2Error(
        'not-found',
        `point #${seq} of volume ${volume} has been merged away before it could be named`,
        { hint: 'Ask for another one.' },
      );
    return commit.hash.toString('hex');
  } finally {
    await history.close();
  }
}
