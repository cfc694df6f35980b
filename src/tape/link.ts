/**
 * Makes one chain of the points that come from cartridges (FORMAT.md 11.3). Points that were exported in the order of their numbers are one; one that was
 * exported after a newer one, and one that was written twice, are not: the commits that do not fit are written anew with their right predecessors.
 * That is possible because a commit on tape is full (it needs no other), and its hash does not depend on its predecessor.
 */
import { isKind } from '../errors.js';
import { MAX_FRAME_EXTENTS, ZERO_HASH, encodeCommit, type ExtentsRef } from '../format/commit.js';
import { encodeExtents } from '../format/extent.js';
import { journalName, packIdOf, packName } from '../format/names.js';
import { ObjectKind } from '../format/object.js';
import { readCommits, type ReadCommit } from '../repo/commits.js';
import { PackWriter } from '../repo/pack-writer.js';
import type { Repository } from '../repo/repository.js';
import { listVolumes } from '../repo/volume.js';

/** A pack that holds the commit of a point and nothing else. */
interface PointPack {
  readonly commit: ReadCommit;
  readonly packId: string;
  /** When its journal entry was made. */
  readonly createdNs: bigint;
}

/**
 * Links the points of every volume in `repo`, which holds nothing but what was read from cartridges and no segments yet. `lost` says how many of
 * these packs cannot be used: of several copies of a point the one that lacks the fewest counts, and of equal ones the newest. Resolves to the packs
 * that were written, each with the id of the one that it stands for; those, and copies that do not count, are removed from the store.
 */
export async function linkPoints(
  repo: Repository,
  lost: (packIds: readonly string[]) => number,
): Promise<ReadonlyMap<string, string>> {
  const written = new Map<string, string>();
  for (const volume of await listVolumes(repo, () => undefined)) {
    const found = await pointPacks(repo, volume.id);
    if (found === undefined) continue;
    const best = new Map<string, PointPack>();
    for (const p of found) {
      const key = `${p.commit.commit.epoch} ${p.commit.seq} ${p.commit.hash.toString('hex')}`;
      const other = best.get(key);
      if (other === undefined || isBetter(p, other, lost)) best.set(key, p);
    }
    const chain = chainOf([...best.values()]);
    let before: PointPack | undefined;
    for (const p of chain) {
      const firstSeq = before === undefined ? 1 : before.commit.seq + 1;
      const prevHash = before === undefined ? ZERO_HASH : before.commit.hash;
      before = p;
      if (p.commit.firstSeq === firstSeq && p.commit.commit.prevHash.equals(prevHash)) continue;
      written.set(await rewrite(repo, p, firstSeq, prevHash), p.packId);
      await remove(repo, p);
    }
    const kept = new Set(best.values());
    for (const p of found) if (!kept.has(p)) await remove(repo, p);
  }
  return written;
}

function isBetter(
  a: PointPack,
  b: PointPack,
  lost: (packIds: readonly string[]) => number,
): boolean {
  const less = lost(b.commit.packIds) - lost(a.commit.packIds);
  return less === 0 ? a.createdNs > b.createdNs : less > 0;
}

/** From the tip (FORMAT.md 6.5) down, ascending: epochs never fall along a chain. What does not fit in was never part of it. */
function chainOf(points: readonly PointPack[]): PointPack[] {
  const sorted = points.toSorted(
    (a, b) => b.commit.commit.epoch - a.commit.commit.epoch || b.commit.seq - a.commit.seq,
  );
  const chain: PointPack[] = [];
  for (const p of sorted) {
    const last = chain.at(-1);
    if (last === undefined || p.commit.seq < last.commit.seq) chain.push(p);
  }
  return chain.reverse();
}

/** Undefined for a volume that holds anything but points as cartridges have them: that is none of our business. */
async function pointPacks(repo: Repository, volumeId: string): Promise<PointPack[] | undefined> {
  const found: PointPack[] = [];
  for await (const { name } of repo.store.list(`volumes/${volumeId}/journal`)) {
    const packId = name.split('/').at(-1) ?? '';
    if (packIdOf(packName(packId)) === undefined) continue;
    let commits: readonly ReadCommit[];
    let createdNs = 0n;
    try {
      const { created } = await repo.getObject(ObjectKind.journal, name);
      if (typeof created === 'string' && /^\d{1,20}$/.test(created)) createdNs = BigInt(created);
      commits = await readCommits(repo.packs, repo.keys, packId, undefined);
    } catch (error) {
      if (!isKind(error, 'damaged', 'not-found')) throw error;
      continue; // there may be another copy; repair says what is lost
    }
    const [commit] = commits;
    if (commit === undefined) continue;
    const isPoint = commits.length === 1 && commit.full && commit.commit.facts['source'] === 'tape';
    if (!isPoint || commit.packIds[0] !== packId) return undefined;
    found.push({ commit, packId, createdNs });
  }
  return found;
}

/** Writes the commit of a point with another predecessor, to a pack of its own. */
async function rewrite(
  repo: Repository,
  { commit: found }: PointPack,
  firstSeq: number,
  prevHash: Buffer,
): Promise<string> {
  const { commit } = found;
  const packId = repo.newId();
  const nowNs = repo.env.clock.nowNs();
  const writer = await PackWriter.create(repo.packContext(), packId, nowNs);
  try {
    const extents = found.extents.map((e) => ({ ...e, seq: commit.seq - firstSeq }));
    const refs: ExtentsRef[] = [];
    while (extents.length > MAX_FRAME_EXTENTS) {
      const records = extents.splice(0, MAX_FRAME_EXTENTS);
      const plain = encodeExtents(records);
      const frame = writer.addExtents(plain);
      refs.push({ pack: 0, frame, records: records.length, hash: repo.keys.commitHash(plain) });
      if (writer.wantsFlush) await writer.flush();
    }
    writer.addCommit(
      encodeCommit({
        ...commit,
        firstSeq,
        prevHash,
        packIds: [packId, ...commit.packIds.slice(1)],
        extentsRefs: refs,
        extents,
      }),
    );
    await repo.putObject(ObjectKind.journal, journalName(commit.volumeId, packId), {
      volume: commit.volumeId,
      epoch: commit.epoch,
      pack: packId,
      firstSeq: String(firstSeq),
      prevHash: prevHash.toString('hex'),
      writer: repo.env.owner,
      created: nowNs,
    });
    await writer.seal(repo.newSalt());
  } catch (error) {
    await writer.abandon();
    throw error;
  }
  return packId;
}

async function remove(repo: Repository, { packId, commit }: PointPack): Promise<void> {
  await repo.store.delete(journalName(commit.commit.volumeId, packId));
  await repo.store.delete(packName(packId));
  repo.packs.forget(packId);
}
