/** Keeps the manifest of a volume small: merges segments and writes full maps as the policy says. */
import { isKind } from '../errors.js';
import { parseSegmentName, type SegmentName } from '../format/names.js';
import { blocksOf } from '../units.js';
import type { Repository } from './repository.js';
import { maintainManifest, type MaintenanceDone } from './segments/maintain.js';
import type { SegmentContext } from './segments/reader.js';
import type { SegmentTarget } from './segments/writer.js';

export function segmentContext(repo: Repository, volumeId: string): SegmentContext {
  return { store: repo.store, keys: repo.keys, repositoryId: repo.id, volumeId, cache: repo.pages };
}

/** What the next segment of a volume is written with: a fresh salt and the time. */
export function segmentTarget(repo: Repository, volumeId: string): SegmentTarget {
  return {
    store: repo.store,
    keys: repo.keys,
    repositoryId: repo.id,
    volumeId,
    chunkBlocks: blocksOf(repo.chunkBytes),
    salt: repo.newSalt(),
    createdNs: repo.env.clock.nowNs(),
  };
}

/**
 * The segments of a volume; perhaps some that have been deleted meanwhile, but never fewer than cover its commits. A list may miss a
 * segment that was merged away while it ran and the one it was merged into as well. So it is taken again, once more than there are
 * levels: what moves up one level during each list has nowhere left to go.
 */
export async function listSegments(repo: Repository, volumeId: string): Promise<SegmentName[]> {
  const names = new Map<string, SegmentName>();
  let highest = 0;
  for (let pass = 0; pass <= highest + 1; pass++) {
    for await (const { name } of repo.store.list(`volumes/${volumeId}/manifest`)) {
      const parsed = parseSegmentName(name);
      if (parsed === undefined) continue;
      names.set(name, parsed);
      highest = Math.max(highest, parsed.level ?? 0);
    }
  }
  return [...names.values()];
}

/**
 * Merges what is due. Safe beside readers and beside itself; a crash at any point leaves a manifest that reads the same. With a damaged
 * segment nothing more is merged: that is for verify to tell and for repair to mend, and no reason to fail a capture.
 */
export async function maintainVolume(
  repo: Repository,
  volumeId: string,
  signal?: AbortSignal,
): Promise<MaintenanceDone> {
  try {
    return await maintainManifest(
      segmentContext(repo, volumeId),
      () => segmentTarget(repo, volumeId),
      () => listSegments(repo, volumeId),
      { signal },
    );
  } catch (error) {
    if (!isKind(error, 'damaged')) throw error;
    return { merged: 0, fullMaps: 0, deleted: 0 };
  }
}
