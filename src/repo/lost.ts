/** Commits that repair has found to be lost for good (FORMAT.md section 4 kind 8, and 6.9). */
import { B2Error, isKind } from '../errors.js';
import { lostName, parseLostName } from '../format/names.js';
import { ObjectKind } from '../format/object.js';
import type { SeqRange, VolumeHistory } from './history.js';
import type { Repository } from './repository.js';

export interface LostCommits extends SeqRange {
  readonly notedNs: bigint;
}

/** Says that the commits of `range` are in no pack that can be read. */
export async function putLost(repo: Repository, volumeId: string, range: SeqRange): Promise<void> {
  await repo.putObject(ObjectKind.lost, lostName(volumeId, range.firstSeq, range.lastSeq), {
    volume: volumeId,
    firstSeq: String(range.firstSeq),
    lastSeq: String(range.lastSeq),
    noted: repo.env.clock.nowNs(),
  });
}

/** Kinds `not-found`, `damaged`. */
export async function readLost(repo: Repository, name: string): Promise<LostCommits> {
  const range = parseLostName(name);
  const o = await repo.getObject(ObjectKind.lost, name);
  const noted = o['noted'];
  if (
    range === undefined ||
    o['volume'] !== range.volumeId ||
    o['firstSeq'] !== String(range.firstSeq) ||
    o['lastSeq'] !== String(range.lastSeq) ||
    typeof noted !== 'string' ||
    !/^\d{1,20}$/.test(noted)
  ) {
    throw new B2Error('damaged', `${name}: its payload is not what its name says`);
  }
  return { firstSeq: range.firstSeq, lastSeq: range.lastSeq, notedNs: BigInt(noted) };
}

/** What repair has noted as lost of a volume, ascending. Damaged objects say nothing. */
export async function listLost(repo: Repository, volumeId: string): Promise<LostCommits[]> {
  const list: LostCommits[] = [];
  for await (const { name } of repo.store.list(`volumes/${volumeId}/lost`)) {
    try {
      list.push(await readLost(repo, name));
    } catch (error) {
      if (!isKind(error, 'not-found', 'damaged')) throw error;
    }
  }
  return list.sort((a, b) => a.firstSeq - b.firstSeq);
}

/** The lost commits of a history that repair has not noted: of those nobody knows whether a pack still holds them. */
export async function unnotedLoss(history: VolumeHistory): Promise<SeqRange[]> {
  if (history.lost.length === 0) return [];
  const noted = await listLost(history.repo, history.volumeId);
  return history.lost.filter(
    (l) => !noted.some((n) => n.firstSeq <= l.firstSeq && n.lastSeq >= l.lastSeq),
  );
}
