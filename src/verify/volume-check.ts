/** The history of one volume: manifest, chain, commit frames, and every place that its records name. */
import { B2Error, isKind, messageOf } from '../errors.js';
import { CommitFlag, ZERO_HASH } from '../format/commit.js';
import { HOLE } from '../format/extent.js';
import { FrameType } from '../format/frame.js';
import { journalName, packName, segmentName } from '../format/names.js';
import { formatTimeLocal } from '../human.js';
import { readCommit } from '../repo/commits.js';
import { VolumeHistory, type SeqRange } from '../repo/history.js';
import { unnotedLoss } from '../repo/lost.js';
import { segmentContext } from '../repo/maintenance.js';
import type { Repository } from '../repo/repository.js';
import { checkChain, checkPages } from '../repo/segments/chain.js';
import { chainWindows } from '../repo/segments/point.js';
import { openSegment, type SegmentReader } from '../repo/segments/reader.js';
import type { SegmentSource } from '../repo/segments/source.js';
import { Timeline } from '../repo/timeline.js';
import { blocksOf } from '../units.js';
import { problemOf, type Finding } from './findings.js';
import type { FrameSet } from '../retention/liveness.js';
import type { PackShape } from './pack-survey.js';

/** What the check of a volume needs of the packs. */
export interface PackLookup {
  /**
   * The shape of a pack, from the survey or, if `fresh` or not known yet, read now. Undefined: it cannot be used; the reason has been
   * made a finding, or it is `gone`.
   */
  shape(packId: string, fresh?: boolean): Promise<PackShape | undefined>;
  /** True if there is no such pack, or it holds nothing at all. */
  isGone(packId: string): boolean;
}

export interface VolumeCheckOptions {
  readonly repo: Repository;
  readonly volumeId: string;
  /** As people call it. */
  readonly name: string;
  readonly packs: PackLookup;
  /** Filled: commit frames that some history knows. */
  readonly commits: FrameSet;
  /** Filled: packs that segments, or commits of other packs, name. */
  readonly neededPacks: Set<string>;
  /** Filled: packs that journals name. */
  readonly journalPacks: Set<string>;
  /** Read each commit frame and compare it with the manifest; costs one read a commit. */
  readonly deep: boolean;
  readonly signal?: AbortSignal | undefined;
}

/** A finding that touches commits by their number, to be turned into points later. */
export interface SeqFinding extends Finding {
  readonly seqs?: readonly SeqRange[];
}

export interface VolumeCheck {
  readonly history: VolumeHistory;
  readonly findings: readonly SeqFinding[];
  readonly commitCount: number;
}

/** Checks a volume. The history stays open for the caller, who closes it. Kind `not-found` if segments keep on vanishing, or the last commit was withdrawn: then call again. */
export async function checkVolume(options: VolumeCheckOptions): Promise<VolumeCheck> {
  const history = await VolumeHistory.open(options.repo, options.volumeId);
  const extra: SegmentReader[] = [];
  try {
    const check = new Check(options, history);
    await check.manifest(extra);
    await check.journal();
    const commitCount = await check.commits();
    if (await check.places(extra)) {
      // Has prune deleted meanwhile what the last commit names? Then it was not acknowledged, and the history ends before it.
      const last = history.chain.commits.at(-1);
      if (last !== undefined && !(await isOnChain(options, last)))
        throw new B2Error(
          'not-found',
          `commit ${last.seq} of volume ${options.name} was withdrawn`,
        );
    }
    return { history, findings: check.findings, commitCount };
  } catch (error) {
    await history.close();
    throw error;
  } finally {
    await Promise.all(extra.map((s) => s.close()));
  }
}

/** Findings about places are gathered by pack: one pack that is missing is one finding. */
interface PlaceTrouble {
  readonly absent: boolean;
  readonly reason: string;
}

class Check {
  readonly findings: SeqFinding[] = [];
  private readonly o: VolumeCheckOptions;
  private readonly history: VolumeHistory;

  constructor(options: VolumeCheckOptions, history: VolumeHistory) {
    this.o = options;
    this.history = history;
  }

  private get what(): string {
    return `volume ${this.o.name}`;
  }

  /** Segments: header, index, every page, and what they say of each other. */
  async manifest(extra: SegmentReader[]): Promise<void> {
    const { history, o } = this;
    for (const p of history.problems) {
      const isSegment = p.object.includes('/manifest/');
      const named = history.names.find((n) => segmentName(n) === p.object);
      const touched = named === undefined ? undefined : overlapOf(named, history.unreadable);
      this.findings.push({
        severity: 'damage',
        kind: isSegment ? 'segment' : 'pack',
        object: p.object,
        message: problemOf(p.error.message, p.object),
        ...(isSegment
          ? { hint: 'Run "b2 repair": it makes the manifest anew from the packs.' }
          : {}),
        ...(touched === undefined ? {} : { seqs: touched }),
      });
    }
    await this.losses();
    const opened = new Set([...history.deltas, ...history.fulls].map((s) => s.name));
    const broken = new Set(history.problems.map((p) => p.object));
    for (const n of history.names) {
      const name = segmentName(n);
      if (opened.has(name) || broken.has(name)) continue;
      try {
        extra.push(await openSegment(segmentContext(o.repo, o.volumeId), name));
      } catch (error) {
        if (isKind(error, 'not-found')) continue; // merged and deleted meanwhile
        if (isKind(error, 'io')) this.unreadable(name, error.message);
        else if (isKind(error, 'damaged')) {
          this.findings.push({
            severity: 'damage',
            kind: 'segment',
            object: name,
            message: `${problemOf(error.message, name)} (longer segments hold its commits)`,
            hint: 'Run "b2 repair".',
            seqs: [],
          });
        } else throw error;
      }
    }
    const lost = (f: SeqRange): boolean =>
      history.lost.some((l) => l.firstSeq === f.firstSeq && l.lastSeq === f.lastSeq);
    for await (const f of checkChain({ deltas: history.deltas, fulls: history.fulls }, extra)) {
      if (lost(f)) continue;
      this.findings.push({
        severity: 'damage',
        kind: f.object.includes('/manifest/') ? 'segment' : 'chain',
        object: f.object,
        message: problemOf(f.problem, f.object),
        hint: 'Run "b2 repair".',
        seqs: [{ firstSeq: f.firstSeq, lastSeq: f.lastSeq }],
      });
    }
    for (const s of [...history.deltas, ...history.fulls, ...extra]) {
      for await (const f of checkPages(s)) {
        this.o.signal?.throwIfAborted();
        const beside = extra.some((e) => e === s);
        const end = this.history.tip?.seq ?? f.lastSeq;
        this.findings.push({
          severity: 'damage',
          kind: 'segment',
          object: f.object,
          message: problemOf(f.problem, f.object),
          hint: 'Run "b2 repair".',
          // What a page of extents says is part of every later image, until a full commit or map.
          seqs: beside
            ? []
            : [{ firstSeq: s.level === undefined ? s.lastSeq : s.firstSeq, lastSeq: end }],
        });
      }
    }
  }

  private async losses(): Promise<void> {
    const { history } = this;
    const unnoted = await unnotedLoss(history);
    for (const l of history.lost) {
      const noted = !unnoted.includes(l);
      const behind = history.unreadable.find(
        (u) => u.firstSeq <= l.firstSeq && u.lastSeq >= l.lastSeq,
      );
      const tail = behind !== undefined && behind.lastSeq > l.lastSeq;
      const after = tail
        ? `, and so have no image ${await this.described(l.lastSeq + 1, behind.lastSeq)}`
        : '';
      this.findings.push({
        severity: noted ? 'note' : 'damage',
        kind: 'lost',
        object: `volumes/${this.o.volumeId}`,
        message: `commits ${l.firstSeq} to ${l.lastSeq} of ${this.what} are missing${after}${noted ? '; repair has noted that no pack holds them' : ''}`,
        ...(noted
          ? {}
          : { hint: 'Run "b2 repair": if the packs still hold them, it brings them back.' }),
        ...(behind === undefined ? {} : { seqs: [behind] }),
      });
    }
    if (history.chain.gap !== undefined && history.lost.length === 0) {
      this.findings.push({
        severity: 'damage',
        kind: 'chain',
        object: `volumes/${this.o.volumeId}`,
        message: `the newest commits of ${this.what} continue another commit ${history.chain.gap.seq} than the manifest has`,
        hint: 'Keep a copy of the repository, then run "b2 repair".',
        seqs: [
          { firstSeq: history.chain.gap.seq, lastSeq: history.tip?.seq ?? history.chain.gap.seq },
        ],
      });
    }
  }

  /** "#17 (12:03) to #20 (12:10)". */
  private async described(firstSeq: number, lastSeq: number): Promise<string> {
    const at = async (seq: number): Promise<string> => {
      for (const w of chainWindows(this.history.sources)) {
        if (seq <= w.afterSeq || seq > w.uptoSeq) continue;
        for (let p = 0; p < w.source.index.commits.length; p++) {
          try {
            const page = await w.source.commitPage(p, false);
            const i = page.lowerBound(seq);
            if (i < page.length) return `#${page.seq(i)} (${formatTimeLocal(page.instantNs(i))})`;
          } catch (error) {
            if (!isKind(error, 'damaged')) throw error;
          }
        }
      }
      return `#${seq}`;
    };
    return `${await at(firstSeq)} to ${await at(lastSeq)}`;
  }

  private unreadable(object: string, message: string): void {
    this.findings.push({ severity: 'unreadable', kind: 'object', object, message });
  }

  /** Journal entries, and commits that are not on the chain. */
  async journal(): Promise<void> {
    const { history, o } = this;
    for (const j of history.journal) {
      o.journalPacks.add(j.packId);
      if (j.missing) {
        this.findings.push({
          severity: 'note',
          kind: 'journal',
          object: journalName(o.volumeId, j.packId),
          message: `it names pack ${j.packId}, which does not exist: a crash came before the pack was written`,
        });
      }
      for (const c of j.commits) o.commits.add(j.packId, c.frame);
    }
    for (const c of history.chain.stray) {
      this.findings.push({
        severity: 'note',
        kind: 'stray',
        object: packName(c.packId),
        packId: c.packId,
        message: `commit ${c.seq} of ${this.what} (epoch ${c.commit.epoch}, frame ${c.frame}) was never acknowledged and is no part of its history`,
      });
    }
    for (const c of history.chain.commits) {
      for (const id of c.packIds) if (id !== c.packId) o.neededPacks.add(id);
    }
  }

  /** Each commit record against the frame in its pack. Returns how many there are. */
  async commits(): Promise<number> {
    const { history, o } = this;
    let count = 0;
    const deep = o.deep;
    for (const s of history.deltas) {
      let before: { seq: number; hash: Buffer } | undefined =
        s.firstSeq === 1
          ? { seq: 0, hash: ZERO_HASH }
          : { seq: s.firstSeq - 1, hash: s.index.prevHash };
      for (let p = 0; p < s.index.commits.length; p++) {
        let page;
        try {
          page = await s.commitPage(p, false);
        } catch (error) {
          if (!isKind(error, 'damaged')) throw error;
          before = undefined;
          continue; // checkChain has told
        }
        for (let i = 0; i < page.length; i++) {
          o.signal?.throwIfAborted();
          const c = page.record(i);
          count++;
          const packId = await this.packIdOf(s, c.pack);
          if (packId !== undefined) {
            o.neededPacks.add(packId);
            o.commits.add(packId, c.frame);
            if (deep) {
              await this.commitFrame(s, packId, c.frame, {
                seq: c.seq,
                firstSeq: c.firstSeq,
                hash: c.hash,
                epoch: c.epoch,
                blocks: c.blocks,
                full: (c.flags & CommitFlag.full) !== 0,
                prevHash: before?.seq === c.firstSeq - 1 ? before.hash : undefined,
              });
            }
          }
          before = { seq: c.seq, hash: Buffer.from(c.hash) };
        }
      }
    }
    return count + history.chain.commits.length;
  }

  private async packIdOf(s: SegmentSource, pack: number): Promise<string | undefined> {
    try {
      return await s.packId(pack);
    } catch (error) {
      if (!isKind(error, 'damaged')) throw error;
      return undefined; // checkPages has told
    }
  }

  private async commitFrame(
    s: SegmentSource,
    packId: string,
    frame: number,
    expected: {
      seq: number;
      firstSeq: number;
      hash: Buffer;
      epoch: number;
      blocks: number;
      full: boolean;
      prevHash: Buffer | undefined;
    },
  ): Promise<void> {
    const { o } = this;
    const object = packName(packId);
    const tell = (
      message: string,
      kind: 'frame' | 'chain' | 'absent' | 'missing' = 'frame',
      place = { number: frame },
    ): void => {
      this.findings.push({
        severity: 'damage',
        kind,
        object,
        packId,
        ...(kind === 'missing' ? {} : { frames: [place] }),
        message,
        hint: 'The manifest still has this commit; without it, it could not be rebuilt.',
      });
    };
    let shape = await o.packs.shape(packId);
    if (shape !== undefined && shape.types[shape.find(frame)] !== FrameType.commit)
      shape = await o.packs.shape(packId, true);
    if (shape === undefined) {
      if (o.packs.isGone(packId))
        tell(
          `the pack does not exist, or holds nothing; commit ${expected.seq} of ${this.what} was in it`,
          'missing',
        );
      return;
    }
    const place = { ...shape.place(frame) };
    if (shape.types[shape.find(frame)] !== FrameType.commit) {
      tell(
        `commit ${expected.seq} of ${this.what} should be in frame ${frame}, which is not there`,
        'absent',
        place,
      );
      return;
    }
    try {
      const found = await o.repo.packs.useAgain(packId, (pack) =>
        readCommit(o.repo.packs, o.repo.keys, pack, frame, undefined),
      );
      const c = found?.commit;
      if (
        found === undefined ||
        c === undefined ||
        c.volumeId !== o.volumeId ||
        c.seq !== expected.seq ||
        !found.hash.equals(expected.hash)
      ) {
        tell(
          `frame ${frame} is not commit ${expected.seq} of ${this.what}, as ${s.name} says`,
          'chain',
          place,
        );
      } else if (
        c.firstSeq !== expected.firstSeq ||
        c.epoch !== expected.epoch ||
        found.full !== expected.full ||
        found.record.blocks !== expected.blocks
      ) {
        tell(
          `commit ${expected.seq} of ${this.what} in frame ${frame} says something else than ${s.name}`,
          'chain',
          place,
        );
      } else if (expected.prevHash !== undefined && !c.prevHash.equals(expected.prevHash)) {
        tell(
          `commit ${expected.seq} of ${this.what} does not continue commit ${expected.firstSeq - 1} of ${s.name}`,
          'chain',
          place,
        );
      }
    } catch (error) {
      if (isKind(error, 'damaged'))
        tell(`commit ${expected.seq} of ${this.what}: ${messageOf(error)}`, 'frame', place);
      else if (isKind(error, 'io', 'not-found')) this.unreadable(object, messageOf(error));
      else throw error;
    }
  }

  /** Every place that a record names, of segments (also those beside the chain) and of the journal's commits. True if one is wrong. */
  async places(extra: readonly SegmentReader[]): Promise<boolean> {
    const { history, o } = this;
    const chunkBlocks = blocksOf(o.repo.chunkBytes);
    const trouble = new Map<string, Map<number, PlaceTrouble>>();
    const unusable = new Set<string>();
    for (const s of [...history.sources, ...history.fulls, ...extra]) {
      const ids: (string | undefined)[] = [];
      const shapes: (PackShape | undefined)[] = [];
      for (let p = 0; p < s.index.packCount; p++) {
        const id = await this.packIdOf(s, p);
        ids.push(id);
        if (id !== undefined && s !== history.tail) o.neededPacks.add(id);
        shapes.push(id === undefined ? undefined : await o.packs.shape(id));
      }
      for (let e = 0; e < s.index.extents.length; e++) {
        o.signal?.throwIfAborted();
        let page;
        try {
          page = await s.extentPage(e, false);
        } catch (error) {
          if (!isKind(error, 'damaged')) throw error;
          continue; // checkPages has told
        }
        for (let r = 0; r < page.length; r++) {
          const pack = page.pack(r);
          if (pack === HOLE) continue;
          const id = ids[pack];
          if (id === undefined) continue;
          const [frame, sub, skip, count] = [
            page.frame(r),
            page.sub(r),
            page.skip(r),
            page.count(r),
          ];
          let wrong = shapes[pack]?.wrong(frame, sub, skip, count, chunkBlocks);
          if (shapes[pack] !== undefined && wrong === undefined) continue;
          if (shapes[pack] === undefined && unusable.has(id)) continue;
          // Compacted, or grown, since it was surveyed?
          shapes[pack] = await o.packs.shape(id, true);
          wrong = shapes[pack]?.wrong(frame, sub, skip, count, chunkBlocks);
          if (shapes[pack] === undefined) {
            unusable.add(id);
            continue;
          }
          if (wrong === undefined) continue;
          let list = trouble.get(id);
          if (list === undefined) trouble.set(id, (list = new Map()));
          list.set(wrong.frame, { absent: wrong.absent, reason: wrong.reason });
        }
      }
    }
    for (const id of unusable) {
      if (!o.packs.isGone(id)) continue; // it is there, and why it cannot be used has been told
      this.findings.push({
        severity: 'damage',
        kind: 'missing',
        object: packName(id),
        packId: id,
        message: 'the pack does not exist, or holds nothing, and points need it',
        hint: 'If a copy of the file exists, put it back; otherwise what was in it is lost.',
      });
    }
    for (const [id, list] of trouble) {
      const shape = await o.packs.shape(id);
      for (const absent of [true, false]) {
        const frames = [...list].filter(([, t]) => t.absent === absent);
        const [first] = frames;
        if (first === undefined) continue;
        this.findings.push({
          severity: 'damage',
          kind: absent ? 'absent' : 'place',
          object: packName(id),
          packId: id,
          frames: frames.map(([n]) => shape?.place(n) ?? { number: n }),
          message: absent
            ? `${frames.length === 1 ? `frame ${first[0]} is` : `${frames.length} frames are`} used and not there (${first[1].reason})`
            : `frame ${first[0]}: ${first[1].reason}`,
          hint:
            absent && shape?.sealed === false
              ? 'The pack has lost its end; a copy of the file would bring it back.'
              : 'Run "b2 repair".',
        });
      }
    }
    return unusable.size > 0 || trouble.size > 0;
  }
}

/** True if the volume has the commit, by what there is now. */
async function isOnChain(
  { repo, volumeId }: VolumeCheckOptions,
  commit: { readonly seq: number; readonly hash: Buffer },
): Promise<boolean> {
  const now = await VolumeHistory.open(repo, volumeId);
  try {
    const there = await new Timeline(now.sources).bySeq(commit.seq);
    return there?.hash.equals(commit.hash) === true;
  } catch (error) {
    if (!isKind(error, 'damaged')) throw error;
    return true; // nobody can tell: what was found stands
  } finally {
    await now.close();
  }
}

/** The parts of `ranges` that meet `s`. */
function overlapOf(s: SeqRange, ranges: readonly SeqRange[]): SeqRange[] {
  return ranges.filter((r) => r.lastSeq >= s.firstSeq && r.firstSeq <= s.lastSeq);
}
