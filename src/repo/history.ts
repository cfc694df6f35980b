/**
 * The history of one volume as a reader sees it: segments of the manifest, the commits in journal packs behind them, and the
 * chain they make. Immutable once open; open it again to see what has come since.
 */
import { B2Error, isKind } from '../errors.js';
import { CommitFlag, ZERO_HASH } from '../format/commit.js';
import { journalName, packName, segmentName, type SegmentName } from '../format/names.js';
import { encodeFooter } from '../format/pack.js';
import type { CommitRecord } from '../format/segment.js';
import { buildChain, readCommits, type Chain, type ChainEnd, type ReadCommit } from './commits.js';
import { CondemnedPlaces, lacksCondemnedPlace } from './condemned.js';
import { listSegments, segmentContext, segmentTarget } from './maintenance.js';
import type { Repository } from './repository.js';
import { memorySegment } from './segments/memory.js';
import { openSegment, type SegmentReader } from './segments/reader.js';
import { commitRecordOf, type SegmentSource } from './segments/source.js';
import { putMemorySegment } from './segments/writer.js';

/** A journal entry: a pack that may hold commits which no segment holds. */
export interface JournalPack {
  readonly packId: string;
  readonly missing: boolean;
  readonly sealed: boolean;
  readonly commits: readonly ReadCommit[];
}

/** What could not be read, told by {@link VolumeHistory.problems}. */
export interface HistoryProblem {
  readonly object: string;
  readonly error: B2Error;
}

/** Commits from `firstSeq` to `lastSeq`. */
export interface SeqRange {
  readonly firstSeq: number;
  readonly lastSeq: number;
}

const MAX_REOPENS = 5;

const condemnedPlaces = new WeakMap<Repository, CondemnedPlaces>();

/** What is condemned, remembered for as long as the repository is open. */
function condemnedOf(repo: Repository): CondemnedPlaces {
  let places = condemnedPlaces.get(repo);
  if (places === undefined) condemnedPlaces.set(repo, (places = new CondemnedPlaces(repo)));
  return places;
}

export class VolumeHistory {
  readonly repo: Repository;
  readonly volumeId: string;
  /** Delta segments that cover the commits up to `coveredSeq`, but for `lost`, ascending. */
  readonly deltas: readonly SegmentReader[];
  /** Full maps, ascending. */
  readonly fulls: readonly SegmentReader[];
  /** All segment names of the volume, also those not opened. */
  readonly names: readonly SegmentName[];
  readonly journal: readonly JournalPack[];
  readonly chain: Chain;
  readonly problems: readonly HistoryProblem[];
  /** Commits of the chain that are nowhere to be found (or only in what cannot be read), ascending. */
  readonly lost: readonly SeqRange[];
  /** Commits whose image cannot be made: those lost, and those behind them up to the next full commit or full map. */
  readonly unreadable: readonly SeqRange[];
  /** The journal's commits on the chain, as a segment; undefined if there are none. */
  readonly tail: SegmentSource | undefined;
  private readonly lastRecord: CommitRecord | undefined;

  private constructor(
    repo: Repository,
    volumeId: string,
    parts: {
      deltas: readonly SegmentReader[];
      fulls: readonly SegmentReader[];
      names: readonly SegmentName[];
      journal: readonly JournalPack[];
      chain: Chain;
      problems: readonly HistoryProblem[];
      lost: readonly SeqRange[];
      unreadable: readonly SeqRange[];
      lastRecord: CommitRecord | undefined;
    },
  ) {
    this.repo = repo;
    this.volumeId = volumeId;
    this.deltas = parts.deltas;
    this.fulls = parts.fulls;
    this.names = parts.names;
    this.journal = parts.journal;
    this.chain = parts.chain;
    this.problems = parts.problems;
    this.lost = parts.lost;
    this.unreadable = parts.unreadable;
    this.lastRecord = parts.lastRecord;
    const { commits, gap } = parts.chain;
    this.tail =
      commits.length === 0 || gap !== undefined
        ? undefined
        : memorySegment(commits, commits[0]?.commit.prevHash ?? ZERO_HASH);
  }

  /**
   * Opens the history. What is damaged or missing is in `problems` and `lost`; `chain.gap` is set if because of that the newest commit
   * has no image. A loss before the last full commit (or full map) leaves what comes after it whole (FORMAT.md 6.9). `without`: the
   * hash of a commit in the journal that counts as not there (a claimant found that it was never acknowledged). Without it, a last
   * commit whose places prune has condemned and deleted is left out, and is `stray`: its writer is about to find that out, or died before.
   */
  static async open(repo: Repository, volumeId: string, without?: Buffer): Promise<VolumeHistory> {
    let refused = without;
    for (let tries = 1; ; tries++) {
      const opened: SegmentReader[] = [];
      try {
        const history = await VolumeHistory.openOnce(repo, volumeId, opened, refused);
        if (without !== undefined || history.chain.withdrawn !== undefined) return history;
        const hash = await history.neverAcknowledged();
        if (hash === undefined) return history;
        refused = hash;
        await history.close();
      } catch (error) {
        await Promise.all(opened.map((s) => s.close()));
        // A segment or journal entry went away between the list and the read: merged, or moved to the manifest.
        if (isKind(error, 'not-found') && tries < MAX_REOPENS) continue;
        throw error;
      }
    }
  }

  private static async openOnce(
    repo: Repository,
    volumeId: string,
    opened: SegmentReader[],
    without: Buffer | undefined,
  ): Promise<VolumeHistory> {
    const problems: HistoryProblem[] = [];
    // The journal first: an entry that goes away after this list has its commits in a segment that the next list shows.
    const packIds: string[] = [];
    for await (const { name } of repo.store.list(`volumes/${volumeId}/journal`)) {
      const id = name.split('/').at(-1) ?? '';
      if (/^[0-9a-f]{32}$/.test(id)) packIds.push(id);
    }
    const names = await listSegments(repo, volumeId);
    const context = segmentContext(repo, volumeId);
    const open = async (name: SegmentName): Promise<SegmentReader | undefined> => {
      const text = segmentName(name);
      try {
        const reader = await openSegment(context, text);
        opened.push(reader);
        return reader;
      } catch (error) {
        if (!isKind(error, 'damaged')) throw error;
        problems.push({ object: text, error });
        return undefined;
      }
    };
    let usable = names.filter((n) => n.level !== undefined);
    let deltas: SegmentReader[] = [];
    let lastRecord: CommitRecord | undefined;
    for (;;) {
      const chosen = coverFrom(usable);
      const readers = await Promise.all(
        chosen.map((n) => deltas.find((d) => d.name === segmentName(n)) ?? open(n)),
      );
      deltas = readers.filter((r): r is SegmentReader => r !== undefined);
      if (deltas.length === chosen.length) {
        const last = deltas.at(-1);
        if (last === undefined) break;
        try {
          lastRecord = await lastRecordOf(last);
          break;
        } catch (error) {
          if (!isKind(error, 'damaged')) throw error;
          problems.push({ object: last.name, error });
        }
      }
      usable = usable.filter((n) => !problems.some((p) => p.object === segmentName(n)));
    }
    const fulls = (
      await Promise.all(
        names
          .filter((n) => n.level === undefined)
          .sort((a, b) => a.lastSeq - b.lastSeq)
          .map(open),
      )
    ).filter((r): r is SegmentReader => r !== undefined);

    const journal = await Promise.all(
      packIds.map((id) => readJournalPack(repo, volumeId, id, problems)),
    );
    const base: ChainEnd | undefined =
      lastRecord === undefined
        ? undefined
        : { seq: lastRecord.seq, hash: lastRecord.hash, epoch: lastRecord.epoch };
    const found = journal.flatMap((j) => j.commits);
    const chain = buildChain(found, base, without);
    const newest = chain.commits.at(-1);
    const lost = lostCommits(deltas, names, chain);
    const unreadable: SeqRange[] = [];
    let gap = chain.gap;
    // Another predecessor than the segments' last commit: not a loss but a fork, which no full commit mends.
    const forked = gap !== undefined && base !== undefined && gap.seq <= base.seq;
    if (!forked) gap = undefined;
    const end = chain.tip?.seq ?? 0;
    for (const range of lost) {
      const restart = await nextWhole(range.lastSeq, deltas, fulls, chain.commits);
      unreadable.push({
        firstSeq: range.firstSeq,
        lastSeq: (restart ?? Math.max(end, range.lastSeq) + 1) - 1,
      });
      if (restart === undefined) gap ??= chain.gap ?? { seq: range.lastSeq, hash: '' };
    }
    return new VolumeHistory(repo, volumeId, {
      deltas,
      fulls,
      names,
      journal,
      chain: { ...chain, gap },
      problems,
      lost,
      unreadable: joined(unreadable),
      lastRecord: newest?.record ?? lastRecord,
    });
  }

  /** The newest commit, or undefined for a volume without one. */
  get tip(): ChainEnd | undefined {
    return this.chain.tip;
  }

  get lastCommit(): CommitRecord | undefined {
    return this.lastRecord;
  }

  /** Sequence number up to which segments cover the chain. */
  get coveredSeq(): number {
    return this.deltas.at(-1)?.lastSeq ?? 0;
  }

  /** The hash of the last commit if it lacks what prune has deleted. Commits before it were acknowledged, or it would not be there. */
  private async neverAcknowledged(): Promise<Buffer | undefined> {
    const last = this.chain.commits.at(-1);
    if (last === undefined || this.chain.gap !== undefined) return undefined;
    if (last.packIds.every((id) => id === last.packId)) return undefined;
    const condemned = condemnedOf(this.repo);
    try {
      await condemned.refresh();
      const lacking = await lacksCondemnedPlace(this.repo, last, (id, frame) =>
        condemned.hasSurely(id, frame),
      );
      return lacking ? last.hash : undefined;
    } catch (error) {
      // What cannot be read says nothing against the commit; whoever needs it will hear of it.
      if (!isKind(error, 'damaged', 'io', 'not-found')) throw error;
      return undefined;
    }
  }

  /** Throws `damaged` if commits between the first and the newest are missing. */
  refuseGap(): void {
    const { gap } = this.chain;
    if (gap === undefined) return;
    const why = this.problems.map((p) => p.error.message).join('; ');
    throw new B2Error(
      'damaged',
      `commit ${gap.seq} of volume ${this.volumeId} is missing${why === '' ? '' : ` (${why})`}`,
      {
        hint: 'Run "b2 repair": it rebuilds the manifest from the packs; "b2 verify" names what is lost.',
      },
    );
  }

  /** The sources of the state at `seq` and of all commits up to it: deltas and the journal's tail, ascending. */
  get sources(): readonly SegmentSource[] {
    return this.tail === undefined ? this.deltas : [...this.deltas, this.tail];
  }

  /**
   * Brings what dead writers left in order: seals their packs, moves the chain's commits to a segment, removes journal entries
   * that say nothing any more. Only for who has claimed the volume when it read this, and has since acknowledged a commit on top of it: every
   * later claimant sees that commit, and so the same chain below it (FORMAT.md 5.6, 6.6).
   */
  async settle(): Promise<void> {
    const { repo, volumeId, chain } = this;
    const needed = new Set(chain.commits.flatMap((c) => [c.packId, ...c.packIds]));
    for (const j of this.journal) {
      if (!j.missing && !j.sealed && needed.has(j.packId)) await sealAbandoned(repo, j.packId);
    }
    if (chain.commits.length > 0) {
      await VolumeHistory.putCommits(
        repo,
        volumeId,
        chain.commits,
        chain.commits[0]?.commit.prevHash ?? ZERO_HASH,
      );
    }
    // A damaged pack keeps its entry: what it held is for repair and verify to say.
    const damagedPacks = new Set(this.problems.map((p) => p.object));
    for (const j of this.journal) {
      if (!damagedPacks.has(packName(j.packId)))
        await repo.store.delete(journalName(volumeId, j.packId));
    }
  }

  /**
   * Puts the level 0 segment of commits whose packs are all sealed, then removes the journal entries of those packs. `prevHash`
   * is the hash of the commit before the first.
   */
  static async putCommits(
    repo: Repository,
    volumeId: string,
    commits: readonly ReadCommit[],
    prevHash: Buffer,
  ): Promise<void> {
    await putMemorySegment(segmentTarget(repo, volumeId), memorySegment(commits, prevHash));
    for (const packId of new Set(commits.map((c) => c.packId))) {
      await repo.store.delete(journalName(volumeId, packId));
    }
  }

  async close(): Promise<void> {
    await Promise.all([...this.deltas, ...this.fulls].map((s) => s.close()));
  }
}

async function lastRecordOf(segment: SegmentReader): Promise<CommitRecord> {
  const page = await segment.commitPage(segment.index.commits.length - 1);
  return commitRecordOf(segment, page.record(page.length - 1));
}

async function readJournalPack(
  repo: Repository,
  volumeId: string,
  packId: string,
  problems: HistoryProblem[],
): Promise<JournalPack> {
  // What does not read right is read once more: a commit taken for damaged would fall off the chain.
  for (let tries = 1; ; tries++) {
    const found: HistoryProblem[] = [];
    const pack = await readJournalPackOnce(repo, volumeId, packId, found);
    if (found.length > 0 && tries === 1) continue;
    problems.push(...found);
    return pack;
  }
}

async function readJournalPackOnce(
  repo: Repository,
  volumeId: string,
  packId: string,
  problems: HistoryProblem[],
): Promise<JournalPack> {
  // An open pack grows: what was remembered of it is old.
  repo.packs.forget(packId);
  if ((await repo.store.stat(packName(packId))) === undefined) {
    return { packId, missing: true, sealed: false, commits: [] };
  }
  try {
    const commits = await readCommits(repo.packs, repo.keys, packId, volumeId, (error) => {
      problems.push({ object: packName(packId), error });
    });
    const sealed = await repo.packs.use(packId, (p) => Promise.resolve(p.sealed));
    return { packId, missing: false, sealed, commits };
  } catch (error) {
    if (!isKind(error, 'damaged')) throw error;
    problems.push({ object: packName(packId), error });
    return { packId, missing: false, sealed: false, commits: [] };
  }
}

/** Appends a footer and a trailer to a pack that its writer left open. */
export async function sealAbandoned(repo: Repository, packId: string): Promise<void> {
  const name = packName(packId);
  repo.packs.forget(packId);
  const footer = await repo.packs.use(packId, (p) =>
    Promise.resolve(p.sealed ? undefined : p.footer),
  );
  if (footer === undefined) return;
  const appender = await repo.store.openAppend(name, 'existing');
  try {
    await appender.append(
      encodeFooter(footer, packId, appender.sizeBytes, repo.newSalt(), repo.keys),
    );
    await appender.sync();
  } finally {
    await appender.close();
  }
  repo.packs.forget(packId);
}

/** Segments that cover as many commits as possible, the longest first; ascending. Where none continues, the next one there is. */
export function coverFrom(names: readonly SegmentName[]): SegmentName[] {
  const chosen: SegmentName[] = [];
  let next = 1;
  for (;;) {
    let best: SegmentName | undefined;
    let later: SegmentName | undefined;
    for (const n of names) {
      if (n.lastSeq < next) continue;
      if (n.firstSeq <= next) {
        if (best === undefined || n.lastSeq > best.lastSeq) best = n;
      } else if (later === undefined || n.firstSeq < later.firstSeq) {
        later = n;
      }
    }
    if (best !== undefined) {
      chosen.push(best);
      next = best.lastSeq + 1;
    } else if (later !== undefined) {
      next = later.firstSeq;
    } else {
      return chosen;
    }
  }
}

/** Commits that segments or the journal skip, and those that only the name of a segment speaks of. */
function lostCommits(
  deltas: readonly SegmentReader[],
  names: readonly SegmentName[],
  chain: Chain,
): SeqRange[] {
  const lost: SeqRange[] = [];
  let next = 1;
  for (const d of deltas) {
    if (d.firstSeq > next) lost.push({ firstSeq: next, lastSeq: d.firstSeq - 1 });
    next = Math.max(next, d.lastSeq + 1);
  }
  const first = chain.commits[0]?.firstSeq ?? next;
  if (first > next) lost.push({ firstSeq: next, lastSeq: first - 1 });
  const end = Math.max(next - 1, chain.commits.at(-1)?.seq ?? 0);
  const named = names.reduce((n, s) => Math.max(n, s.lastSeq), 0);
  if (named > end) lost.push({ firstSeq: end + 1, lastSeq: named });
  return lost;
}

/** The first commit behind `seq` whose image needs nothing before it: a full commit, or where a full map stands. */
async function nextWhole(
  seq: number,
  deltas: readonly SegmentReader[],
  fulls: readonly SegmentReader[],
  commits: readonly ReadCommit[],
): Promise<number | undefined> {
  let found: number | undefined;
  const offer = (at: number): void => {
    if (found === undefined || at < found) found = at;
  };
  for (const m of fulls) if (m.lastSeq > seq) offer(m.lastSeq);
  for (const c of commits) if (c.full && c.firstSeq > seq) offer(c.seq);
  for (const d of deltas) {
    if (d.index.lastFullFirstSeq <= seq || (found !== undefined && d.firstSeq >= found)) continue;
    for (let p = 0; p < d.index.commits.length; p++) {
      const page = await d.commitPage(p, false);
      for (let i = 0; i < page.length; i++) {
        if ((page.flags(i) & CommitFlag.full) === 0) continue;
        const c = page.record(i);
        if (c.firstSeq > seq) offer(c.seq);
      }
    }
  }
  return found;
}

/** Ranges that overlap or touch as one; ascending. */
function joined(ranges: readonly SeqRange[]): SeqRange[] {
  const out: SeqRange[] = [];
  for (const r of [...ranges].sort((a, b) => a.firstSeq - b.firstSeq)) {
    const last = out.at(-1);
    if (last !== undefined && r.firstSeq <= last.lastSeq + 1) {
      out[out.length - 1] = { firstSeq: last.firstSeq, lastSeq: Math.max(last.lastSeq, r.lastSeq) };
    } else {
      out.push(r);
    }
  }
  return out;
}
