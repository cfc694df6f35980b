/**
 * Writes commits of one volume (FORMAT.md section 6). The crash protocol lives here: journal entry, chunks, commit, sync, check,
 * acknowledgement; later seal, segment, end of the journal entry.
 */
import { B2Error, isKind } from '../errors.js';
import {
  CommitFlag,
  MAX_FRAME_EXTENTS,
  ZERO_HASH,
  encodeCommit,
  type Commit,
  type Coverage,
  type ExtentsRef,
  type PointClass,
} from '../format/commit.js';
import { HOLE, STRIPE_BLOCKS, encodeExtents, type Extent } from '../format/extent.js';
import { epochName, journalName, packName } from '../format/names.js';
import { ObjectKind } from '../format/object.js';
import { BLOCK_BYTES, blocksOf } from '../units.js';
import { recordOf, type ReadCommit } from './commits.js';
import { CONDEMNED_KEPT_NS, CondemnedPlaces, lacksCondemnedPlace } from './condemned.js';
import { VolumeHistory } from './history.js';
import { acquireLease } from './lease.js';
import { maintainVolume } from './maintenance.js';
import { PackWriter } from './pack-writer.js';
import type { Repository } from './repository.js';

/** A run of blocks and where its data lie, with the pack by id; undefined: the blocks are zeros. */
export interface PlacedExtent {
  readonly block: number;
  readonly count: number;
  readonly packId: string | undefined;
  readonly frame: number;
  readonly sub: number;
  readonly skip: number;
}

/** What a commit says; the writer adds chain, epoch and times of writing. */
export interface CommitDraft {
  readonly pointClass: PointClass;
  readonly coverage: Coverage;
  /** Blocks not named are zeros, whatever came before. */
  readonly full: boolean;
  readonly instantNs: bigint;
  readonly startedNs: bigint;
  readonly sizeBytes: number;
  /** Ascending, without overlap, within the device. Every pack but the writer's own is sealed. */
  readonly extents: readonly PlacedExtent[];
  /** Bytes of the chunks stored for this commit. */
  readonly storedBytes: number;
  readonly facts: Readonly<Record<string, unknown>>;
}

/** An acknowledged commit: it survives anything from here on. */
export interface Acknowledged {
  readonly seq: number;
  readonly hash: Buffer;
  readonly instantNs: bigint;
}

/**
 * Thrown by `commit` when prune wants to delete something that the commit reuses (FORMAT.md 6.4 b). Nothing was acknowledged. Call
 * `reclaim`, store the data anew without reusing the condemned places, and commit again.
 */
export class CondemnedError extends B2Error {
  constructor(packId: string, frame: number) {
    super(
      'failed',
      `prune is about to delete frame ${frame} of pack ${packId}, which this commit wanted to reuse`,
      {
        retryable: true,
        hint: 'Run the command again; it will store that data anew.',
      },
    );
  }
}

const MAX_EPOCH = 0xffff_ffff;
/** How long a claim that must know what prune deletes waits for it. */
const PRUNE_WAIT_MS = 3_600_000;
const MAX_CLAIM_TRIES = 100;
/** Commits in packs of their own (a store without append) that wait for a segment. */
const MAX_UNSEGMENTED = 64;

/** The writer of one volume. One call at a time. After a rejection of `commit` (other than CondemnedError), `reclaim` or `finishPack` only `close` is allowed. */
export class VolumeWriter implements AsyncDisposable {
  readonly repo: Repository;
  readonly volumeId: string;
  private readonly condemned: CondemnedPlaces;
  /** Packs that this session wrote. */
  private readonly ownPacks = new Set<string>();
  private epoch: number;
  private tip: { readonly seq: number; readonly hash: Buffer } | undefined;
  private lastSizeBytes: number | undefined;
  private pack: PackWriter | undefined;
  /** Acknowledged commits that are in no segment yet: those of the open pack, or of packs of their own. */
  private packCommits: ReadCommit[] = [];
  /** Hash of the commit before the first of them. */
  private packPrevHash: Buffer = ZERO_HASH;
  /** When the condemned objects were looked at last, or the session began. */
  private lookedNs: bigint;
  private dead = false;
  /** What was found at the claim, until it has been settled: not before a commit of this writer is acknowledged. */
  private unsettled: VolumeHistory | undefined;

  private constructor(
    repo: Repository,
    volumeId: string,
    epoch: number,
    tip: { readonly seq: number; readonly hash: Buffer } | undefined,
    lastSizeBytes: number | undefined,
    claimed: VolumeHistory,
  ) {
    this.repo = repo;
    this.volumeId = volumeId;
    this.epoch = epoch;
    this.tip = tip;
    this.lastSizeBytes = lastSizeBytes;
    this.unsettled = claimed;
    this.condemned = new CondemnedPlaces(repo);
    this.lookedNs = repo.env.clock.monotonicNs();
  }

  /**
   * Claims the volume: from here on every other writer of it stops at its next commit. Then reads the chain. Kind `damaged` if the
   * chain has a gap: b2 does not add to a history that cannot be read. `overGap` is for repair alone, whose next commit must be full
   * (FORMAT.md 6.9).
   */
  static async claim(
    repo: Repository,
    volumeId: string,
    options: { readonly overGap?: boolean } = {},
  ): Promise<{ writer: VolumeWriter; history: VolumeHistory }> {
    const epoch = await claimEpoch(repo, volumeId);
    const history = await openClaimed(repo, volumeId, epoch);
    try {
      // A commit under an epoch that is not above those of the chain would fall off it.
      if ((history.tip?.epoch ?? 0) >= epoch) {
        throw new B2Error(
          'damaged',
          `the claims of volume ${volumeId} are lost: its last commit is of epoch ${history.tip?.epoch}, this claim got ${epoch}`,
          {
            hint: 'Run "b2 repair".',
          },
        );
      }
      if (options.overGap !== true) history.refuseGap();
      const last = history.lastCommit;
      const writer = new VolumeWriter(
        repo,
        volumeId,
        epoch,
        history.tip === undefined ? undefined : { seq: history.tip.seq, hash: history.tip.hash },
        last?.sizeBytes,
        history,
      );
      return { writer, history };
    } catch (error) {
      await history.close();
      throw error;
    }
  }

  /** The last commit of the chain, acknowledged or found at the claim. */
  get tipSeq(): number {
    return this.tip?.seq ?? 0;
  }

  /** Commits of this writer carry it, and nobody else's do. */
  get claimedEpoch(): number {
    return this.epoch;
  }

  /** Hash of that commit; undefined if there is none. */
  get tipHash(): Buffer | undefined {
    return this.tip?.hash;
  }

  /** Size of the device at that commit; undefined before the first. */
  get tipSizeBytes(): number | undefined {
    return this.lastSizeBytes;
  }

  /** The pack that commits go to, for adding the chunks of the next commit to it; opened when needed. */
  async openPack(): Promise<PackWriter> {
    this.checkAlive();
    if (this.pack !== undefined) return this.pack;
    const { repo, volumeId } = this;
    const packId = repo.newId();
    await repo.putObject(ObjectKind.journal, journalName(volumeId, packId), {
      volume: volumeId,
      epoch: this.epoch,
      pack: packId,
      firstSeq: String(this.tipSeq + 1),
      prevHash: (this.tip?.hash ?? ZERO_HASH).toString('hex'),
      writer: repo.env.owner,
      created: repo.env.clock.nowNs(),
    });
    this.pack = await PackWriter.create(repo.packContext(), packId, repo.env.clock.nowNs());
    if (this.packCommits.length === 0) this.packPrevHash = this.tip?.hash ?? ZERO_HASH;
    this.ownPacks.add(packId);
    return this.pack;
  }

  /** Tells the writer of packs that were written for its commits by others of this process (scan workers). */
  addOwnPacks(packIds: Iterable<string>): void {
    for (const id of packIds) this.ownPacks.add(id);
  }

  private checkAlive(): void {
    if (this.dead) throw new Error(`the writer of volume ${this.volumeId} has failed or is closed`);
  }

  private async settle(): Promise<void> {
    const { unsettled } = this;
    if (unsettled === undefined || this.packCommits.length === 0) return;
    await unsettled.settle();
    this.unsettled = undefined;
  }

  /** Writes a commit and makes it durable. When it resolves the point is acknowledged. */
  async commit(draft: CommitDraft): Promise<Acknowledged> {
    checkDraft(draft, this.lastSizeBytes);
    const pack = await this.openPack();
    this.dead = true; // until it has gone well
    await this.settle();
    const { repo } = this;
    const grownFrom =
      draft.full || this.lastSizeBytes === undefined || draft.sizeBytes <= this.lastSizeBytes
        ? undefined
        : blocksOf(this.lastSizeBytes);
    const { packIds, extents } = tabled(
      grownFrom === undefined
        ? draft.extents
        : withHoles(draft.extents, grownFrom, blocksOf(draft.sizeBytes)),
      pack.packId,
    );
    const refs: ExtentsRef[] = [];
    let inline = extents;
    if (extents.length > MAX_FRAME_EXTENTS) {
      inline = [];
      for (let at = 0; at < extents.length; at += MAX_FRAME_EXTENTS) {
        const part = extents.slice(at, at + MAX_FRAME_EXTENTS);
        const body = encodeExtents(part);
        await pack.flush();
        const frame = pack.addExtents(body);
        refs.push({
          pack: packIds.indexOf(pack.packId),
          frame,
          records: part.length,
          hash: repo.keys.commitHash(body),
        });
      }
    }
    const commit: Commit = {
      pointClass: draft.pointClass,
      coverage: draft.coverage,
      flags: draft.full ? CommitFlag.full : 0,
      volumeId: this.volumeId,
      seq: this.tipSeq + 1,
      firstSeq: this.tipSeq + 1,
      prevHash: this.tip?.hash ?? ZERO_HASH,
      mergedHash: ZERO_HASH,
      instantNs: draft.instantNs,
      startedNs: draft.startedNs,
      writtenNs: repo.env.clock.nowNs(),
      sizeBytes: draft.sizeBytes,
      epoch: this.epoch,
      packIds,
      extentsRefs: refs,
      extents: inline,
      facts: { ...draft.facts, storedBytes: draft.storedBytes },
    };
    const body = encodeCommit(commit);
    const hash = repo.keys.commitHash(body);
    await pack.flush();
    const frame = pack.addCommit(body);
    if (pack.canSync) {
      await pack.sync();
    } else {
      await pack.seal(repo.newSalt());
      this.pack = undefined;
    }
    await refuseLost(repo, this.volumeId, this.epoch);
    await this.checkCondemned(draft.extents, pack.packId);

    this.packCommits.push({
      commit,
      hash,
      packId: pack.packId,
      frame,
      seq: commit.seq,
      firstSeq: commit.firstSeq,
      full: draft.full,
      packIds,
      extents,
      record: recordOf(commit, hash, pack.packId, frame, {
        blocks: extents.reduce((n, e) => n + e.count, 0),
        storedBytes: draft.storedBytes,
      }),
    });
    this.tip = { seq: commit.seq, hash };
    this.lastSizeBytes = draft.sizeBytes;
    this.dead = false;
    return { seq: commit.seq, hash, instantNs: commit.instantNs };
  }

  private async checkCondemned(extents: readonly PlacedExtent[], ownPackId: string): Promise<void> {
    const others = new Map<string, PlacedExtent[]>();
    // Until its first commit is acknowledged the own pack is unused in the eyes of prune; afterwards no prune can miss it.
    if (!this.packCommits.some((c) => c.packId === ownPackId)) others.set(ownPackId, []);
    for (const e of extents) {
      if (e.packId === undefined || e.packId === ownPackId) continue;
      const list = others.get(e.packId);
      if (list === undefined) others.set(e.packId, [e]);
      else list.push(e);
    }
    if (others.size === 0) return;
    // A condemned object lives for 7 days: who looked longer ago may have missed one, and its deletion.
    const now = this.repo.env.clock.monotonicNs();
    const tooLong = now - this.lookedNs > CONDEMNED_KEPT_NS;
    await this.condemned.refresh();
    this.lookedNs = now;
    const chunkBlocks = blocksOf(this.repo.chunkBytes);
    for (const [packId, list] of others) {
      const [first] = list;
      const isOwn = this.ownPacks.has(packId);
      if (tooLong && !isOwn) this.fail(packId, first?.frame ?? 0);
      if (this.condemned.has(packId, undefined)) {
        if (packId === ownPackId) this.fail(packId, 0);
        for (const e of list) {
          const last = e.frame + Math.floor((e.skip + e.count - 1) / chunkBlocks);
          for (let f = e.frame; f <= last; f++)
            if (this.condemned.has(packId, f)) this.fail(packId, f);
        }
      }
      // Deleted by hand, or by something that is not b2.
      if (!isOwn && (await this.repo.store.stat(packName(packId))) === undefined)
        this.fail(packId, first?.frame ?? 0);
    }
  }

  private fail(packId: string, frame: number): never {
    throw new CondemnedError(packId, frame);
  }

  /**
   * After a {@link CondemnedError}: claims the next epoch, so that the commit that failed falls off the chain, and lets the
   * writer go on from the commit before it.
   */
  async reclaim(): Promise<void> {
    const epoch = await claimEpoch(this.repo, this.volumeId);
    if (epoch !== this.epoch + 1) {
      throw new B2Error(
        'lost-claim',
        `another b2 process has taken over volume ${this.volumeId}; this one stops`,
      );
    }
    this.epoch = epoch;
    // The pack with the commit that fell off holds acknowledged ones before it, perhaps: seal it, start another.
    this.dead = false;
    await this.finishPack();
  }

  /**
   * Seals the open pack and moves its commits to the manifest. Called when the pack has grown to `packBytes`, and by `close`. Capture
   * goes on in a new pack afterwards.
   */
  async finishPack(): Promise<void> {
    const { pack, repo } = this;
    this.checkAlive();
    this.dead = true; // until it has gone well: behind commits that are in no segment there must be none that are
    this.pack = undefined;
    if (pack !== undefined) await pack.seal(repo.newSalt());
    const commits = this.packCommits;
    if (commits.length === 0) {
      this.dead = false;
      return;
    }
    await this.settle();
    this.packCommits = [];
    const prevHash = this.packPrevHash;
    this.packPrevHash = this.tip?.hash ?? ZERO_HASH;
    await VolumeHistory.putCommits(repo, this.volumeId, commits, prevHash);
    this.dead = false;
    await maintainVolume(repo, this.volumeId);
  }

  /** True when the open pack should be finished because of its size. */
  get wantsFinish(): boolean {
    const { pack } = this;
    if (pack === undefined) return this.packCommits.length >= MAX_UNSEGMENTED;
    return pack.isFull || pack.sizeBytes >= this.repo.config.packBytes;
  }

  /**
   * Seals what is open and moves it to the manifest. Nothing acknowledged depends on that: where the store fails, the packs are read
   * forward next time, and the failure is told to `warn`.
   */
  async close(warn: (error: B2Error) => void = () => undefined): Promise<void> {
    if (this.dead) {
      await this.pack?.abandon();
      this.pack = undefined;
      return;
    }
    try {
      await this.finishPack();
    } catch (error) {
      if (!isKind(error, 'io', 'no-space')) throw error;
      warn(error);
    } finally {
      this.dead = true;
    }
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.close();
  }
}

/** Throws `lost-claim` if the volume was claimed again after `epoch`. */
async function refuseLost(repo: Repository, volumeId: string, epoch: number): Promise<void> {
  if (epoch >= MAX_EPOCH) return;
  if ((await repo.store.stat(epochName(volumeId, epoch + 1))) === undefined) return;
  throw new B2Error(
    'lost-claim',
    `another b2 process has taken over volume ${volumeId}; this one stops`,
    {
      hint: 'See who it is with "b2 status"; a volume has one writer at a time. Nothing acknowledged is lost.',
    },
  );
}

/**
 * The history as a claimant must see it. Its last commit is in doubt: its writer may have died between the sync and the check (FORMAT.md
 * 6.4), and prune may delete what it reuses. Where that has happened the commit is left out: it was never acknowledged.
 */
async function openClaimed(
  repo: Repository,
  volumeId: string,
  epoch: number,
): Promise<VolumeHistory> {
  let history = await VolumeHistory.open(repo, volumeId);
  try {
    const doubtful =
      history.chain.withdrawn === undefined ? history.chain.commits.at(-1) : undefined;
    const condemned = new CondemnedPlaces(repo);
    await condemned.refresh();
    if (
      doubtful?.packIds.some((id) => condemned.has(id, undefined)) === true &&
      history.chain.gap === undefined
    ) {
      // Under the lease nothing is deleted, and every later prune sees the commit: what is there now stays.
      await using lease = await acquireLease(repo.store, 'prune', {
        ...repo.env,
        purpose: 'claim of a volume',
        waitMs: PRUNE_WAIT_MS,
      });
      await condemned.refresh();
      const deleted = await lacksCondemnedPlace(repo, doubtful, (id, frame) =>
        condemned.has(id, frame),
      );
      await lease.assertHeld();
      if (deleted) {
        await history.close();
        history = await VolumeHistory.open(repo, volumeId, doubtful.hash);
      }
    }
    // After all that was read: who claims from here on sees at least as much, so that what is settled now is on that chain too.
    await refuseLost(repo, volumeId, epoch);
    return history;
  } catch (error) {
    await history.close();
    throw error;
  }
}

async function claimEpoch(repo: Repository, volumeId: string): Promise<number> {
  for (let i = 0; i < MAX_CLAIM_TRIES; i++) {
    let highest = 0;
    for await (const { name } of repo.store.list(`volumes/${volumeId}/epochs`)) {
      const n = Number.parseInt(name.split('/').at(-1) ?? '', 16);
      if (n > highest) highest = n;
    }
    const epoch = highest + 1;
    if (epoch > MAX_EPOCH)
      throw new B2Error('unsupported', `volume ${volumeId} was claimed 2^32 times`);
    try {
      await repo.putObject(
        ObjectKind.epoch,
        epochName(volumeId, epoch),
        { volume: volumeId, epoch, writer: repo.env.owner, created: repo.env.clock.nowNs() },
        { ifAbsent: true },
      );
      return epoch;
    } catch (error) {
      if (!isKind(error, 'exists')) throw error;
    }
  }
  throw new B2Error('held', `volume ${volumeId} is being claimed by other processes all the time`, {
    hint: 'Find out what starts so many writers of one volume; it has one at a time.',
  });
}

/** `list` with the gaps of [from, to) named as zeros: what a commit that grows the device must do (FORMAT.md section 8). */
function withHoles(list: readonly PlacedExtent[], from: number, to: number): PlacedExtent[] {
  const out: PlacedExtent[] = [];
  let next = from;
  const fill = (end: number): void => {
    while (next < end) {
      const count = Math.min(end - next, STRIPE_BLOCKS - (next % STRIPE_BLOCKS));
      out.push({ block: next, count, packId: undefined, frame: 0, sub: 0, skip: 0 });
      next += count;
    }
  };
  for (const e of list) {
    fill(Math.min(e.block, to));
    out.push(e);
    next = Math.max(next, e.block + e.count);
  }
  fill(to);
  return out;
}

/** Checks that no extent crosses a stripe and gives the extents a pack table. */
function tabled(
  list: readonly PlacedExtent[],
  ownPackId: string,
): { packIds: string[]; extents: Extent[] } {
  const packIds: string[] = [];
  const index = new Map<string, number>();
  const indexOf = (id: string): number => {
    let i = index.get(id);
    if (i === undefined) {
      i = packIds.length;
      packIds.push(id);
      index.set(id, i);
    }
    return i;
  };
  const extents: Extent[] = [];
  for (const e of list) {
    const pack = e.packId === undefined ? HOLE : indexOf(e.packId);
    const hole = pack === HOLE;
    if ((e.block % STRIPE_BLOCKS) + e.count > STRIPE_BLOCKS) {
      throw new RangeError(`extent at block ${e.block} crosses a stripe`);
    }
    extents.push({
      block: e.block,
      count: e.count,
      seq: 0,
      pack,
      frame: hole ? 0 : e.frame,
      sub: hole ? 0 : e.sub,
      skip: hole ? 0 : e.skip,
    });
  }
  if (extents.length > MAX_FRAME_EXTENTS) indexOf(ownPackId); // its extents frames lie there
  return { packIds, extents };
}

/** Checked before anything is written: a wrong commit must not get into the chain. */
function checkDraft(draft: CommitDraft, lastSizeBytes: number | undefined): void {
  let end = 0;
  for (const e of draft.extents) {
    if (e.block < end || e.count < 1)
      throw new RangeError(`extents not in order at block ${e.block}`);
    end = e.block + e.count;
  }
  if (end > blocksOf(draft.sizeBytes))
    throw new RangeError(`extents end at block ${end}, past the device`);
  if (lastSizeBytes === undefined && !draft.full)
    throw new RangeError('the first commit must be full');
  // What lay behind an earlier end, in the block of that end, must not show again (FORMAT.md section 8).
  if (
    lastSizeBytes !== undefined &&
    !draft.full &&
    draft.sizeBytes > lastSizeBytes &&
    lastSizeBytes % BLOCK_BYTES !== 0
  ) {
    const block = Math.floor(lastSizeBytes / BLOCK_BYTES);
    if (!draft.extents.some((e) => e.block <= block && block < e.block + e.count)) {
      throw new RangeError(
        `a commit that grows the device must name block ${block}, in which the old end lies`,
      );
    }
  }
}
