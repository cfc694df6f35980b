/** From what a person says ("5m ago", a snapshot's name, #12) to a recovery point, and to its image. */
import { B2Error } from '../errors.js';
import { PointClass, className } from '../format/commit.js';
import type { CommitRecord } from '../format/segment.js';
import { formatTimeLocal } from '../human.js';
import { blocksOf } from '../units.js';
import type { When } from '../when.js';
import { BlockMap } from './blockmap.js';
import type { VolumeHistory } from './history.js';
import type { Repository } from './repository.js';
import { RepositoryImage } from './repository-image.js';
import { Timeline } from './timeline.js';
import { findSnapshot, listSnapshots, type Snapshot, type VolumeMeta } from './volume.js';

/** A point that was chosen, and by what name if it was one. */
export interface ChosenPoint {
  readonly commit: CommitRecord;
  readonly snapshot: Snapshot | undefined;
}

/**
 * The point that `when` means: for a time, the newest exact point not after it, unless a snapshot is called just that; for `latest`, the
 * newest exact one; a name or `#id` may also be a point that is not exact. Kind `not-found` where there is none.
 */
export async function choosePoint(
  history: VolumeHistory,
  volume: VolumeMeta,
  when: When,
  warn: (text: string) => void,
): Promise<ChosenPoint> {
  history.refuseGap();
  const timeline = new Timeline(history.sources);
  switch (when.kind) {
    case 'latest': {
      const commit = await timeline.latest(PointClass.crash);
      if (commit === undefined) throw await noExactPoint(timeline, volume);
      return { commit, snapshot: undefined };
    }
    case 'instant': {
      // A snapshot may be called by a date or time (those without a name are), and is what is meant by its very name.
      const named =
        when.text === undefined
          ? undefined
          : await findSnapshot(history.repo, volume.id, when.text);
      if (named !== undefined) return pinned(timeline, volume, named);
      const found = await timeline.before(when.ns, PointClass.crash);
      if (found === undefined) {
        const first = await timeline.first();
        if ((await timeline.latest(PointClass.crash)) === undefined)
          throw await noExactPoint(timeline, volume);
        const since =
          first === undefined ? '' : `; its history begins at ${formatTimeLocal(first.instantNs)}`;
        throw new B2Error(
          'not-found',
          `volume ${volume.name} has no exact point at or before ${formatTimeLocal(when.ns)}${since}`,
          { hint: `"b2 points ${volume.name}" lists the points.` },
        );
      }
      if (found.later !== undefined) {
        warn(
          `the clock of ${volume.host} was put back: point #${found.later.seq} was recorded after the chosen #${found.point.seq} and is also from before that time; name a point by its id to be sure`,
        );
      }
      return { commit: found.point, snapshot: undefined };
    }
    case 'point': {
      const commit = await timeline.bySeq(when.seq);
      if (commit === undefined || commit.pointClass === PointClass.none) {
        throw new B2Error('not-found', `volume ${volume.name} has no point #${when.seq}`, {
          hint: `"b2 points ${volume.name}" lists the points; thinning merges points away.`,
        });
      }
      return { commit, snapshot: undefined };
    }
    case 'name': {
      const snapshot = (await listSnapshots(history.repo, volume.id, warn)).find(
        (s) => s.name === when.name,
      );
      if (snapshot === undefined) {
        throw new B2Error(
          'not-found',
          `"${when.name}" is neither a time nor a snapshot of volume ${volume.name}`,
          {
            hint: 'Times are ISO 8601 (2026-11-22T15:04), "5m ago", "latest" or a point id (#12); "b2 snapshots" lists the names.',
          },
        );
      }
      return pinned(timeline, volume, snapshot);
    }
  }
}

async function pinned(
  timeline: Timeline,
  volume: VolumeMeta,
  snapshot: Snapshot,
): Promise<ChosenPoint> {
  const commit = await timeline.bySeq(snapshot.seq);
  if (commit === undefined || commit.hash.toString('hex') !== snapshot.hash) {
    throw new B2Error(
      'damaged',
      `snapshot "${snapshot.name}" of volume ${volume.name} names point #${snapshot.seq}, which is not in the history`,
      {
        hint: 'Run "b2 verify" and "b2 repair".',
      },
    );
  }
  return { commit, snapshot };
}

async function noExactPoint(timeline: Timeline, volume: VolumeMeta): Promise<B2Error> {
  const fuzzy = await timeline.latest(PointClass.fuzzy);
  if (fuzzy === undefined) {
    return new B2Error('not-found', `volume ${volume.name} has no recovery point yet`, {
      hint: 'A capture must finish first.',
    });
  }
  return new B2Error(
    'not-found',
    `volume ${volume.name} has no exact point, only ${className(fuzzy.pointClass)} ones`,
    {
      hint: `Such a point may be inconsistent. To use it all the same, name it: --at "#${fuzzy.seq}".`,
    },
  );
}

/** The block map of a commit. The history must stay open as long as it is used. */
export function openBlockMap(history: VolumeHistory, seq: number): Promise<BlockMap> {
  return BlockMap.open(
    { deltas: history.sources, fulls: history.fulls },
    seq,
    blocksOf(history.repo.chunkBytes),
  );
}

/**
 * Lets images of `repo` decode in other threads for who reads much (read-ahead.ts), where they can open its store; they start with the first such
 * read and end with the repository. `failed` is told once if they break down, which only makes reading slower.
 */
export function allowReadAhead(
  repo: Repository,
  storeUrl: string | undefined,
  failed?: (error: unknown) => void,
): void {
  if (storeUrl === undefined) return;
  repo.packs.allowReadAhead(async () => {
    const { openReadAhead } = await import('./read-ahead.js');
    return openReadAhead(repo, storeUrl, failed);
  });
}

/** The image of a volume at a commit. Closing it closes nothing else; the history must stay open as long as it is used. */
export async function openImage(
  history: VolumeHistory,
  volume: VolumeMeta,
  seq: number,
): Promise<RepositoryImage> {
  const map = await openBlockMap(history, seq);
  return new RepositoryImage({
    resolver: map,
    packs: history.repo.packs,
    chunkBytes: history.repo.chunkBytes,
    sizeBytes: map.commit.sizeBytes,
    logicalBlockBytes: volume.logicalBlockBytes,
  });
}
