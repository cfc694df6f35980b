/** Reading commits out of packs, and the chain they make (FORMAT.md 5.3, 6.5). */
import { B2Error } from '../errors.js';
import { damaged } from '../format/bytes.js';
import {
  CommitFlag,
  chainHash,
  decodeCommit,
  decodeExtentList,
  type Commit,
} from '../format/commit.js';
import type { Extent } from '../format/extent.js';
import { FrameType } from '../format/frame.js';
import type { CommitRecord } from '../format/segment.js';
import { frameWhat, type OpenPack, type PackCache } from './pack-reader.js';
import type { KeyRing } from '../format/seal.js';

/** A commit read from its pack, with all its extents in one list. */
export interface ReadCommit {
  readonly commit: Commit;
  /** By which the next one names it. */
  readonly hash: Buffer;
  readonly packId: string;
  readonly frame: number;
  readonly seq: number;
  readonly firstSeq: number;
  readonly full: boolean;
  readonly packIds: readonly string[];
  readonly extents: readonly Extent[];
  readonly record: CommitRecord;
}

/** What a segment records of a commit. */
export function recordOf(
  commit: Commit,
  hash: Buffer,
  packId: string,
  frame: number,
  sums: { readonly blocks: number; readonly storedBytes: number },
): CommitRecord {
  return {
    seq: commit.seq,
    firstSeq: commit.firstSeq,
    pointClass: commit.pointClass,
    coverage: commit.coverage,
    flags: commit.flags,
    epoch: commit.epoch,
    instantNs: commit.instantNs,
    startedNs: commit.startedNs,
    writtenNs: commit.writtenNs,
    sizeBytes: commit.sizeBytes,
    hash,
    packId,
    frame,
    blocks: sums.blocks,
    storedBytes: sums.storedBytes,
  };
}

/**
 * The commits in a pack that belong to `volumeId` (all volumes if undefined), in order of their frames. Kind `damaged` if one of
 * them, or an extents frame it names, is. `onDamage` hears of it instead where given, and the commit is left out.
 */
export async function readCommits(
  cache: PackCache,
  keys: KeyRing,
  packId: string,
  volumeId: string | undefined,
  onDamage?: (error: B2Error, frame: number) => void,
): Promise<ReadCommit[]> {
  return cache.use(packId, async (pack) => {
    const list: ReadCommit[] = [];
    for (const frame of pack.footer.frames) {
      if (frame.type !== FrameType.commit) continue;
      try {
        const one = await readCommit(cache, keys, pack, frame.number, volumeId);
        if (one !== undefined) list.push(one);
      } catch (error) {
        if (onDamage === undefined || !(error instanceof B2Error) || error.kind !== 'damaged')
          throw error;
        onDamage(error, frame.number);
      }
    }
    return list;
  });
}

/** The commit in frame `frame` of an open pack; undefined if it is another volume's. */
export async function readCommit(
  cache: PackCache,
  keys: KeyRing,
  pack: OpenPack,
  frame: number,
  volumeId: string | undefined,
): Promise<ReadCommit | undefined> {
  const what = frameWhat(pack.packId, frame);
  const { body } = await pack.readFrame(frame);
  const commit = decodeCommit(body, what);
  if (volumeId !== undefined && commit.volumeId !== volumeId) return undefined;
  const hash = chainHash(commit, body, (b) => keys.commitHash(b));
  const extents: Extent[] = [];
  for (const ref of commit.extentsRefs) {
    const from = commit.packIds[ref.pack];
    if (from === undefined) throw damaged(what, 0, 'a reference outside the pack table');
    const open =
      from === pack.packId
        ? await pack.readFrame(ref.frame)
        : await cache.useAgain(from, (p) => p.readFrame(ref.frame));
    const part = frameWhat(from, ref.frame);
    if (open.header.type !== FrameType.extents) throw damaged(part, 0, 'not a frame of extents');
    if (!keys.commitHash(open.body).equals(ref.hash)) {
      throw damaged(part, 0, `its extents are not those that the commit in ${what} names`);
    }
    const records = decodeExtentList(open.body, commit.packIds.length, part);
    if (records.length !== ref.records)
      throw damaged(part, 0, 'another number of extents than the commit says');
    for (const e of records) extents.push(e);
  }
  for (const e of commit.extents) extents.push(e);
  let blocks = 0;
  let end = 0;
  for (const e of extents) {
    if (e.block < end) throw damaged(what, 0, 'its extents overlap or are not in order');
    end = e.block + e.count;
    blocks += e.count;
  }
  const storedBytes = Number(commit.facts['storedBytes'] ?? 0);
  return {
    commit,
    hash,
    packId: pack.packId,
    frame,
    seq: commit.seq,
    firstSeq: commit.firstSeq,
    full: (commit.flags & CommitFlag.full) !== 0,
    packIds: commit.packIds,
    extents,
    record: recordOf(commit, hash, pack.packId, frame, {
      blocks,
      storedBytes: Number.isSafeInteger(storedBytes) && storedBytes >= 0 ? storedBytes : 0,
    }),
  };
}

/** What the chain is built from: commits found in packs, and where the segments end. */
export interface ChainEnd {
  readonly seq: number;
  readonly hash: Buffer;
  readonly epoch: number;
}

/** The chain's part behind `base`, and what does not belong to it. */
export interface Chain {
  /** Ascending; the first one's predecessor is `base` (or nothing). */
  readonly commits: readonly ReadCommit[];
  readonly tip: ChainEnd | undefined;
  /** Commits that are no ancestors of the tip: never acknowledged (FORMAT.md 6.5). */
  readonly stray: readonly ReadCommit[];
  /** Set where an ancestor of the tip is not there: the sequence number and hash that are missing. */
  readonly gap: { readonly seq: number; readonly hash: string } | undefined;
  /** The commit that would be the tip, had it not been refused. */
  readonly withdrawn: ReadCommit | undefined;
}

/**
 * Finds the tip among `found` and `base` (the last commit that segments hold; undefined without segments), and walks from it back to
 * `base`. With a gap, `commits` holds what lies behind it, which no image can be made of. `refused`: the hash of a commit that was never
 * acknowledged; if it would be the tip, its predecessor is (FORMAT.md 6.5), not what ranks next.
 */
export function buildChain(
  found: readonly ReadCommit[],
  base: ChainEnd | undefined,
  refused?: Buffer,
): Chain {
  let tip: ChainEnd | undefined = base;
  let tipCommit: ReadCommit | undefined;
  const byHash = new Map<string, ReadCommit>();
  for (const c of found) {
    const key = c.hash.toString('hex');
    const known = byHash.get(key);
    // A merged commit carries the hash of the last one it stands for; the one that stands for the most counts.
    if (known === undefined || c.firstSeq < known.firstSeq) byHash.set(key, c);
    if (base !== undefined && c.seq === base.seq && c.hash.equals(base.hash)) continue;
    const end: ChainEnd = { seq: c.seq, hash: c.hash, epoch: c.commit.epoch };
    if (
      tip !== undefined &&
      end.epoch === tip.epoch &&
      end.seq === tip.seq &&
      !end.hash.equals(tip.hash)
    ) {
      throw new B2Error(
        'damaged',
        `two different commits ${c.seq} of epoch ${end.epoch} exist (one in pack ${c.packId})`,
        {
          hint: 'Two writers shared one epoch, which cannot happen by itself. Keep a copy of the repository and report it.',
        },
      );
    }
    if (
      tip === undefined ||
      end.epoch > tip.epoch ||
      (end.epoch === tip.epoch && end.seq > tip.seq)
    ) {
      tip = end;
      tipCommit = c;
    }
  }
  const commits: ReadCommit[] = [];
  let gap: Chain['gap'];
  let at = tipCommit === undefined ? undefined : byHash.get(tipCommit.hash.toString('hex'));
  const withdrawn = at !== undefined && refused?.equals(at.hash) === true ? at : undefined;
  if (withdrawn !== undefined) {
    const { prevHash } = withdrawn.commit;
    const prevSeq = withdrawn.firstSeq - 1;
    at = byHash.get(prevHash.toString('hex'));
    tip = at === undefined ? base : { seq: at.seq, hash: at.hash, epoch: at.commit.epoch };
    if (prevSeq > 0 && (tip === undefined || !tip.hash.equals(prevHash)))
      gap = { seq: prevSeq, hash: prevHash.toString('hex') };
  }
  while (at !== undefined) {
    if (base !== undefined && at.seq <= base.seq) break; // the segments know it from here on
    commits.push(at);
    if (at.firstSeq === 1) break;
    const prev = at.commit.prevHash;
    if (base !== undefined && base.seq === at.firstSeq - 1) {
      if (!base.hash.equals(prev)) gap = { seq: at.firstSeq - 1, hash: prev.toString('hex') };
      break;
    }
    const before: ReadCommit | undefined = byHash.get(prev.toString('hex'));
    if (before === undefined || before.seq !== at.firstSeq - 1) {
      gap = { seq: at.firstSeq - 1, hash: prev.toString('hex') };
      break;
    }
    at = before;
  }
  commits.reverse();
  const onChain = new Set(commits);
  const stray = found.filter(
    (c) =>
      !onChain.has(c) &&
      byHash.get(c.hash.toString('hex')) === c &&
      !(base !== undefined && c.seq <= base.seq),
  );
  return { commits, tip, stray, gap, withdrawn };
}
