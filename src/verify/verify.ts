/**
 * Verify: is everything there that the recovery points need, and is it what was written?
 *
 * Always checked (structure and chain): `config` and its copy, every object's seal and name, every page of every segment, footers and
 * the layout of packs, each commit frame against the manifest, every place that any commit names, what this machine has seen before.
 * On request the data: every frame is opened and every chunk compared with its id.
 *
 * Safe beside everything else. Packs are looked at before histories are opened, so that a commit that is found in a pack must be
 * known to a history; what seems wrong is looked at once more, because capture and prune go on meanwhile.
 */
import { isKind, messageOf } from '../errors.js';
import type { EventSink } from '../events.js';
import { PointClass } from '../format/commit.js';
import { FrameType } from '../format/frame.js';
import { canonicalConfig } from '../format/config.js';
import { epochName, packName } from '../format/names.js';
import { formatTimeLocal } from '../human.js';
import type { Catalogue, PackVerified } from '../repo/catalogue.js';
import { readCommit, type ReadCommit } from '../repo/commits.js';
import { CondemnedPlaces, lacksCondemnedPlace } from '../repo/condemned.js';
import { VolumeHistory } from '../repo/history.js';
import type { Quarantine } from '../repo/quarantine.js';
import type { Repository } from '../repo/repository.js';
import { Timeline } from '../repo/timeline.js';
import { FrameSet, markSource } from '../retention/liveness.js';
import { blocksOf } from '../units.js';
import { BadPlaces } from './bad-places.js';
import { verifyPacks, type PackToVerify, type VerifyPacksResult } from './data.js';
import type { DataFinding } from './data-pass.js';
import { problemOf, type Finding, type FramePlace, type TouchedVolume } from './findings.js';
import { VolumePoints, locate, touchedSeqs } from './locate.js';
import { checkObjects, type ObjectsFound } from './object-check.js';
import type { PackShape } from './pack-survey.js';
import { SurveyedPacks } from './packs.js';
import { checkVolume, type SeqFinding } from './volume-check.js';

export interface VerifyOptions {
  /** Ids; default every volume, and then also packs that no volume needs. */
  readonly volumeIds?: readonly string[] | undefined;
  /** Share of the data to read, by bytes, up to 1; undefined or 0: none. */
  readonly dataShare?: number | undefined;
  /** No pack is begun after this time. */
  readonly budgetMs?: number | undefined;
  /** What this machine remembers of the repository; undefined: nothing, and nothing is remembered. */
  readonly catalogue?: Catalogue | undefined;
  /** The URL for worker threads; undefined: the store lives in this one. */
  readonly storeUrl?: string | undefined;
  readonly workers?: number | undefined;
  readonly signal?: AbortSignal | undefined;
  readonly events: EventSink;
}

/** A point, for reports. */
export interface PointRef {
  readonly seq: number;
  readonly instantNs: bigint;
}

export interface VolumeReport {
  readonly volumeId: string;
  readonly name: string;
  readonly commits: number;
  /** The newest exact point there is. */
  readonly newest: PointRef | undefined;
  /** The newest exact point in which nothing was found wrong, as far as this run looked. */
  readonly newestWhole: PointRef | undefined;
  /** Points that need something that is damaged or lost. */
  readonly damagedPoints: number;
}

export interface DataReport {
  readonly packs: number;
  readonly frames: number;
  readonly chunks: number;
  readonly storedBytes: number;
  /** Of all that was to be verified by this run's order, what was left for the next. */
  readonly leftPacks: number;
  /** When the pack that was verified longest ago was; undefined if one never was, or nothing is remembered. */
  readonly oldestNs: bigint | undefined;
}

export interface VerifyReport {
  /** Worst first. */
  readonly findings: readonly Finding[];
  readonly volumes: readonly VolumeReport[];
  readonly objects: number;
  readonly packs: number;
  readonly packBytes: number;
  readonly data: DataReport | undefined;
}

interface OpenVolume {
  readonly history: VolumeHistory;
  readonly name: string;
  readonly commits: number;
  readonly findings: readonly SeqFinding[];
}

/** A data pass that other threads have begun. */
interface DataPass extends AsyncDisposable {
  readonly list: readonly PackToVerify[];
  /** Lets this thread take part, and resolves when all is read. */
  finish(): Promise<VerifyPacksResult>;
}

const MAX_RETRIES = 3;
const ORDER = { damage: 0, unreadable: 1, note: 2 } as const;

/** Damage is reported, not thrown. Rejects with `interrupted`, and where the repository cannot even be listed. */
export async function verify(repo: Repository, options: VerifyOptions): Promise<VerifyReport> {
  const run = new Run(repo, options);
  try {
    return await run.go();
  } finally {
    await run.close();
  }
}

class Run {
  private readonly repo: Repository;
  private readonly o: VerifyOptions;
  private readonly packs: SurveyedPacks;
  private readonly condemned: CondemnedPlaces;
  private readonly findings: Finding[] = [];
  private readonly volumes = new Map<string, OpenVolume>();
  private readonly commitFrames = new FrameSet();
  private readonly needed = new Set<string>();
  private readonly journal = new Set<string>();
  private readonly only: ReadonlySet<string> | undefined;
  /** Volumes of which not everything could be read. */
  private readonly unread = new Set<string>();

  constructor(repo: Repository, options: VerifyOptions) {
    this.repo = repo;
    this.o = options;
    this.packs = new SurveyedPacks(repo);
    this.condemned = new CondemnedPlaces(repo);
    this.only = options.volumeIds === undefined ? undefined : new Set(options.volumeIds);
  }

  async close(): Promise<void> {
    for (const v of this.volumes.values()) await v.history.close();
  }

  async go(): Promise<VerifyReport> {
    const { repo, o } = this;
    const objects = await checkObjects(repo, this.only, o.signal);
    this.findings.push(...objects.findings);
    await using pass = this.beginData(objects);
    if (this.only === undefined) await this.packs.survey(objects.packs, o.signal);
    await this.checkVolumes(objects);
    if (this.only === undefined) await this.unlistedCommits();
    this.findings.push(...(await this.packs.judgeUnsealed(this.needed, this.journal)));
    await this.checkSnapshots(objects);
    await this.rollbacks(objects);
    const data = await this.data(objects, pass);
    this.findings.push(...this.packs.findings);
    const reports = await this.locateAll(objects.quarantine);
    const findings = withoutRepeats(this.findings).sort(
      (a, b) =>
        ORDER[a.severity] - ORDER[b.severity] ||
        (a.object < b.object ? -1 : a.object > b.object ? 1 : 0),
    );
    await this.remember(findings);
    return {
      findings,
      volumes: reports,
      objects: objects.objects,
      packs: objects.packs.length,
      packBytes: objects.packs.reduce((n, p) => n + p.sizeBytes, 0),
      data,
    };
  }

  private async checkVolumes(objects: ObjectsFound): Promise<void> {
    const ids = [...objects.volumeIds]
      .filter((id) => this.only === undefined || this.only.has(id))
      .sort();
    for (const volumeId of ids) {
      const name = objects.metas.get(volumeId)?.name ?? `lost-${volumeId}`;
      this.packs.stale();
      for (let tries = 1; ; tries++) {
        try {
          const { history, findings, commitCount } = await checkVolume({
            repo: this.repo,
            volumeId,
            name,
            packs: this.packs,
            commits: this.commitFrames,
            neededPacks: this.needed,
            journalPacks: this.journal,
            deep: true,
            signal: this.o.signal,
          });
          this.volumes.set(volumeId, { history, name, commits: commitCount, findings });
          break;
        } catch (error) {
          // Segments were merged while they were read.
          if (isKind(error, 'not-found') && tries < MAX_RETRIES) continue;
          if (!isKind(error, 'io', 'not-found', 'damaged', 'unsupported')) throw error;
          this.unread.add(volumeId);
          this.findings.push({
            severity: error.kind === 'damaged' ? 'damage' : 'unreadable',
            kind: 'chain',
            object: `volumes/${volumeId}`,
            message: `the history of volume ${name} cannot be read: ${messageOf(error)}`,
          });
          break;
        }
      }
      const claimed = objects.epochs.get(volumeId) ?? 0;
      const used = this.volumes.get(volumeId)?.history.tip?.epoch ?? 0;
      // The claims were listed before the history was opened: one made since is looked for by its name.
      if (claimed < used && (await this.repo.store.stat(epochName(volumeId, used))) === undefined) {
        this.findings.push({
          severity: 'damage',
          kind: 'epoch',
          object: `volumes/${volumeId}/epochs`,
          message: `the claim under which the newest commit of volume ${name} was written (${used}) is missing; the next capture is refused`,
          hint: 'Run "b2 repair".',
        });
      }
    }
  }

  /** Commit frames in packs that no history knows: left over, or proof that the manifest has lost something. */
  private async unlistedCommits(): Promise<void> {
    const { repo } = this;
    const shapes = Array.from(this.packs.usable());
    for (const shape of shapes) {
      let strays = 0;
      for (let i = 0; i < shape.frameCount; i++) {
        const frame = shape.numberAt(i);
        if (shape.types[i] !== FrameType.commit || this.commitFrames.has(shape.packId, frame))
          continue;
        this.o.signal?.throwIfAborted();
        const object = packName(shape.packId);
        try {
          const found = await repo.packs.useAgain(shape.packId, (pack) =>
            readCommit(repo.packs, repo.keys, pack, frame, undefined),
          );
          if (found === undefined || this.unread.has(found.commit.volumeId)) continue;
          const { volumeId, epoch, instantNs } = found.commit;
          if (
            !(await this.outranks(volumeId, epoch, found.seq)) ||
            (await this.wasRefused(found))
          ) {
            strays++;
            continue;
          }
          const volume = this.volumes.get(volumeId)?.name;
          const whose =
            volume === undefined
              ? `volume ${volumeId}, which is not listed`
              : `volume ${volume}, which its manifest does not know`;
          this.findings.push({
            severity: 'damage',
            kind: 'unlisted',
            object,
            packId: shape.packId,
            message: `frame ${frame} holds commit ${found.seq} (${formatTimeLocal(instantNs)}) of ${whose}`,
            hint: 'The data are there; the manifest is not. Run "b2 repair".',
          });
        } catch (error) {
          if (isKind(error, 'not-found')) continue;
          if (!isKind(error, 'damaged', 'io')) throw error;
          this.findings.push({
            severity: error.kind === 'io' ? 'unreadable' : 'damage',
            kind: 'frame',
            object,
            packId: shape.packId,
            frames: [shape.place(frame)],
            message: `a commit that no manifest knows cannot be read: ${messageOf(error)}`,
            hint: 'If it was the newest of its volume, that point is lost; the ones before it are not touched.',
          });
        }
      }
      if (strays > 0) {
        this.findings.push({
          severity: 'note',
          kind: 'stray',
          object: packName(shape.packId),
          packId: shape.packId,
          message: `${strays} ${strays === 1 ? 'commit' : 'commits'} that are no part of a history (never acknowledged, or merged away)`,
        });
      }
    }
  }

  /**
   * True if a commit that no history has names what prune condemned, and its writer has found that out (it has claimed another
   * epoch), or cannot but find it out (a place is gone): it was not acknowledged (FORMAT.md 6.4), and its successor is not written yet.
   */
  private async wasRefused(c: ReadCommit): Promise<boolean> {
    await this.condemned.refresh();
    const isCondemned = (packId: string, frame: number | undefined): boolean =>
      this.condemned.hasSurely(packId, frame);
    if (!c.packIds.some((id) => isCondemned(id, undefined))) return false;
    const { volumeId, epoch } = c.commit;
    if ((await this.repo.store.stat(epochName(volumeId, epoch + 1))) !== undefined) return true;
    return lacksCondemnedPlace(this.repo, c, isCondemned);
  }

  /** True if a commit ranks above the tip of its volume, now. */
  private async outranks(volumeId: string, epoch: number, seq: number): Promise<boolean> {
    const above = (tip: { seq: number; epoch: number } | undefined): boolean =>
      tip === undefined || epoch > tip.epoch || (epoch === tip.epoch && seq > tip.seq);
    const known = this.volumes.get(volumeId);
    if (known !== undefined && !above(known.history.tip)) return false;
    // A pack that was looked at again may hold commits that came after the history was opened.
    const now = await VolumeHistory.open(this.repo, volumeId);
    try {
      return above(now.tip);
    } finally {
      await now.close();
    }
  }

  private async checkSnapshots(objects: ObjectsFound): Promise<void> {
    for (const s of objects.snapshots) {
      const volume = this.volumes.get(s.volumeId);
      if (volume === undefined) continue;
      let problem: string | undefined;
      try {
        let commit = await new Timeline(volume.history.sources).bySeq(s.seq);
        if (commit?.hash.toString('hex') !== s.hash) {
          // Made since the history was opened?
          const now = await VolumeHistory.open(this.repo, s.volumeId);
          try {
            commit = await new Timeline(now.sources).bySeq(s.seq);
          } finally {
            await now.close();
          }
        }
        if (commit === undefined) problem = `point #${s.seq}, which is not in the history`;
        else if (commit.hash.toString('hex') !== s.hash)
          problem = `point #${s.seq}, but another one than there is`;
        else if (volume.history.unreadable.some((u) => s.seq >= u.firstSeq && s.seq <= u.lastSeq)) {
          problem = `point #${s.seq}, whose image cannot be made because commits are lost`;
        }
      } catch (error) {
        if (!isKind(error, 'damaged')) throw error;
        continue; // the page that knows it is a finding already
      }
      if (problem === undefined) continue;
      this.findings.push({
        severity: 'damage',
        kind: 'snapshot',
        object: s.object,
        message: `snapshot "${s.name}" of volume ${volume.name} names ${problem}`,
      });
    }
  }

  /** Is anything older than what this machine has seen? Consistent in itself, and wrong all the same. */
  private async rollbacks(objects: ObjectsFound): Promise<void> {
    const { catalogue } = this.o;
    if (catalogue === undefined) return;
    const tell = (object: string, message: string): void => {
      this.findings.push({
        severity: 'damage',
        kind: 'rollback',
        object,
        message: `${message}: the repository is older than what this machine has seen`,
        hint: 'Was it put back from a copy? What came after that is missing. If that is meant, delete the catalogue (see "b2 status").',
      });
    };
    for (const [volumeId, seen] of await catalogue.seenTips()) {
      if (this.only !== undefined && !this.only.has(volumeId)) continue;
      const object = `volumes/${volumeId}`;
      const volume = this.volumes.get(volumeId);
      if (volume === undefined) {
        if (!this.unread.has(volumeId))
          tell(object, `volume ${seen.name} is gone; it had ${seen.seq} commits`);
        continue;
      }
      const tip = volume.history.tip?.seq ?? 0;
      if (tip < seen.seq) {
        tell(
          object,
          `volume ${volume.name} ends with commit ${tip}; on ${formatTimeLocal(seen.seenNs)} it had ${seen.seq}`,
        );
        continue;
      }
      try {
        const now = await new Timeline(volume.history.sources).bySeq(seen.seq);
        if (now !== undefined && now.hash.toString('hex') !== seen.hash) {
          tell(
            object,
            `commit ${seen.seq} of volume ${volume.name} is another one than on ${formatTimeLocal(seen.seenNs)}`,
          );
        }
      } catch (error) {
        if (!isKind(error, 'damaged')) throw error; // a finding of its own
      }
      const meta = objects.metas.get(volumeId);
      if (meta !== undefined && meta.updatedNs < seen.metaUpdatedNs) {
        tell(
          `volumes/${volumeId}/meta`,
          `what is recorded of volume ${volume.name} is from ${formatTimeLocal(meta.updatedNs)}, not ${formatTimeLocal(seen.metaUpdatedNs)}`,
        );
      }
    }
    const mac = this.configMac();
    const macs = await catalogue.configs();
    if (macs.length > 1 && macs.at(-1) !== mac && macs.includes(mac))
      tell('config', 'its keys are those from before a change');
    for (const [packId, seen] of await catalogue.packs()) {
      const shape = await this.knownShape(packId);
      if (shape === undefined) continue;
      if (shape.generation < seen.generation)
        tell(packName(packId), `it is as it was before compaction ${seen.generation}`);
    }
  }

  private async knownShape(packId: string): Promise<PackShape | undefined> {
    return this.only === undefined && !this.packs.isGone(packId)
      ? this.packs.shape(packId)
      : undefined;
  }

  private configMac(): string {
    return this.repo.keys.configMac(canonicalConfig(this.repo.config)).toString('hex');
  }

  /**
   * Where all packs are to be read whatever is found, other threads begin with it while this one looks at the structure. Disposing
   * of it ends what is not finished.
   */
  private beginData(objects: ObjectsFound): DataPass | undefined {
    const { repo, o } = this;
    if ((o.dataShare ?? 0) < 1 || o.budgetMs !== undefined || this.only !== undefined)
      return undefined;
    const list = objects.packs.map(({ packId }) => ({ packId }));
    const stop = new AbortController();
    let free = (): void => undefined;
    const result = verifyPacks(list, {
      handle: repo.handle(o.storeUrl),
      store: repo.store,
      clock: repo.env.clock,
      events: o.events,
      signal: o.signal === undefined ? stop.signal : AbortSignal.any([o.signal, stop.signal]),
      workers: o.workers,
      busy: new Promise((resolve) => {
        free = resolve;
      }),
      totalBytes: objects.packs.reduce((n, p) => n + p.sizeBytes, 0),
    });
    result.catch(() => undefined); // seen when it is awaited
    return {
      list,
      finish: () => {
        free();
        return result;
      },
      [Symbol.asyncDispose]: async () => {
        stop.abort();
        free();
        await result.catch(() => undefined);
      },
    };
  }

  /** Reads the data that is due, or what is left of a pass that has begun. */
  private async data(
    objects: ObjectsFound,
    begun: DataPass | undefined,
  ): Promise<DataReport | undefined> {
    const { repo, o } = this;
    const share = Math.min(1, o.dataShare ?? 0);
    if (share <= 0) {
      await this.remembered();
      return undefined;
    }
    const deadlineNs =
      o.budgetMs === undefined
        ? undefined
        : repo.env.clock.monotonicNs() + BigInt(Math.round(o.budgetMs * 1e6));
    const before = (await o.catalogue?.packs()) ?? new Map<string, PackVerified>();
    const { list, result } =
      begun === undefined
        ? await this.readDue(await this.dataList(objects, share, before), deadlineNs)
        : { list: begun.list, result: await begun.finish() };
    const bad = new Set<string>();
    await this.takeDataFindings(result.findings, bad);
    const done = list.slice(0, result.next);
    const now = repo.env.clock.nowNs();
    if (o.catalogue !== undefined && this.only === undefined) {
      const verified: PackVerified[] = [];
      for (const { packId } of done) {
        const read = result.opened.get(packId);
        // Not what it is now: somebody may write to it, or compact it.
        if (read === undefined || (await this.packs.shape(packId)) === undefined) continue;
        const { generation, sizeBytes } = read;
        verified.push({
          packId,
          generation,
          sizeBytes,
          verifiedNs: now,
          damaged: bad.has(packId),
        });
      }
      await o.catalogue.recordPacks(verified);
      await o.catalogue.forgetPacks([...before.keys()].filter((id) => this.packs.isGone(id)));
    }
    let oldestNs: bigint | undefined;
    if (o.catalogue !== undefined && this.only === undefined) {
      const after = await o.catalogue.packs();
      oldestNs = now;
      for (const { packId } of objects.packs) {
        if (this.packs.isGone(packId)) continue;
        const at = after.get(packId)?.verifiedNs;
        oldestNs =
          at === undefined || oldestNs === undefined ? undefined : at < oldestNs ? at : oldestNs;
      }
    }
    return {
      packs: result.packs,
      frames: result.frames,
      chunks: result.chunks,
      storedBytes: result.storedBytes,
      leftPacks: list.length - result.next,
      oldestNs,
    };
  }

  private async readDue(
    due: { readonly list: PackToVerify[]; readonly totalBytes: number; readonly bytes: number },
    deadlineNs: bigint | undefined,
  ): Promise<{ list: PackToVerify[]; result: VerifyPacksResult }> {
    const { repo, o } = this;
    const { list, totalBytes, bytes } = due;
    const result = await verifyPacks(list, {
      handle: repo.handle(o.storeUrl),
      store: repo.store,
      clock: repo.env.clock,
      events: o.events,
      signal: o.signal,
      workers: o.workers,
      deadlineNs,
      totalBytes: Math.min(bytes, totalBytes),
    });
    return { list, result };
  }

  /**
   * What to read, in order: packs found damaged before; packs never verified, newest first; then those verified longest ago. So whatever
   * the budget of a run, runs together come round to everything.
   */
  private async dataList(
    objects: ObjectsFound,
    share: number,
    before: ReadonlyMap<string, PackVerified>,
  ): Promise<{ list: PackToVerify[]; totalBytes: number; bytes: number }> {
    if (this.only !== undefined) return this.dataListOfVolumes(share);
    const facts: {
      packId: string;
      sizeBytes: number;
      createdNs: bigint;
      rank: number;
      atNs: bigint;
    }[] = [];
    for (const { packId, sizeBytes } of objects.packs) {
      const shape = await this.packs.shape(packId);
      if (shape === undefined) continue;
      const seen = before.get(packId);
      const known =
        seen !== undefined &&
        seen.generation === shape.generation &&
        seen.sizeBytes === shape.sizeBytes;
      facts.push({
        packId,
        sizeBytes,
        createdNs: shape.createdNs,
        rank: seen?.damaged === true ? 0 : known ? 2 : 1,
        atNs: seen?.verifiedNs ?? 0n,
      });
    }
    facts.sort(
      (a, b) =>
        a.rank - b.rank ||
        (a.rank === 2 ? compare(a.atNs, b.atNs) : 0) ||
        compare(b.createdNs, a.createdNs) ||
        (a.packId < b.packId ? -1 : 1),
    );
    return chosen(facts, share);
  }

  private async dataListOfVolumes(
    share: number,
  ): Promise<{ list: PackToVerify[]; totalBytes: number; bytes: number }> {
    const live = { chunks: new FrameSet(), commits: new FrameSet() };
    for (const { history } of this.volumes.values()) {
      for (const source of [...history.sources, ...history.fulls]) {
        try {
          await markSource(source, live, blocksOf(this.repo.chunkBytes));
        } catch (error) {
          if (!isKind(error, 'damaged')) throw error; // a finding already
        }
      }
    }
    const facts: { packId: string; sizeBytes: number; frames: number[] }[] = [];
    for (const packId of new Set([...live.chunks.packIds(), ...live.commits.packIds()])) {
      const shape = await this.packs.shape(packId);
      if (shape === undefined) continue;
      const frames = [
        ...new Set([...live.chunks.framesOf(packId), ...live.commits.framesOf(packId)]),
      ].sort((a, b) => a - b);
      const bytes = frames.reduce((n, f) => n + (shape.place(f).lengthBytes ?? 0), 0);
      facts.push({ packId, sizeBytes: bytes, frames: frames.filter((f) => shape.find(f) >= 0) });
    }
    return chosen(facts, share);
  }

  private async takeDataFindings(list: readonly DataFinding[], bad: Set<string>): Promise<void> {
    const frames = new Map<
      string,
      { kind: 'frame' | 'unreadable'; places: FramePlace[]; reason: string }
    >();
    for (const f of list) {
      const object = packName(f.packId);
      switch (f.kind) {
        case 'missing':
        case 'pack': {
          this.packs.stale();
          const shape = await this.packs.shape(f.packId, true);
          if (shape === undefined) {
            bad.add(f.packId);
            break; // gone (prune), or a finding of the survey
          }
          if (f.kind === 'pack') {
            this.findings.push({
              severity: 'unreadable',
              kind: 'pack',
              object,
              packId: f.packId,
              message: f.reason,
            });
          }
          break;
        }
        case 'footer':
          bad.add(f.packId);
          this.findings.push({
            severity: 'damage',
            kind: 'footer',
            object,
            packId: f.packId,
            message: `frame ${f.frame ?? 0}: ${f.reason}; the frame itself is right`,
            hint: 'Run "b2 repair": it writes a new footer.',
          });
          break;
        case 'absent':
          break; // the structure check has told
        case 'frame':
        case 'unreadable': {
          bad.add(f.packId);
          const key = `${f.kind} ${f.packId}`;
          const place: FramePlace = {
            number: f.frame ?? 0,
            ...(f.offsetBytes === undefined ? {} : { offsetBytes: f.offsetBytes }),
            ...(f.lengthBytes === undefined ? {} : { lengthBytes: f.lengthBytes }),
          };
          const known = frames.get(key);
          if (known === undefined)
            frames.set(key, { kind: f.kind, places: [place], reason: f.reason });
          else known.places.push(place);
        }
      }
    }
    for (const [key, { kind, places, reason }] of frames) {
      const packId = key.split(' ')[1] ?? '';
      this.findings.push({
        severity: kind === 'frame' ? 'damage' : 'unreadable',
        kind: 'frame',
        object: packName(packId),
        packId,
        frames: places,
        message: `${places.length === 1 ? `frame ${places[0]?.number ?? 0} is` : `${places.length} frames are`} ${kind === 'frame' ? 'damaged' : 'unreadable'}: ${problemOf(reason, `pack ${packId}, frame ${places[0]?.number ?? 0}`)}`,
        hint:
          kind === 'frame'
            ? 'If a copy of the file exists, put it back; else "b2 repair" sets the frames aside, and the next capture stores anew what the device still has.'
            : 'Check the disk or the connection that the repository is on.',
      });
    }
  }

  /** Without a data pass: what earlier ones found is still so. */
  private async remembered(): Promise<void> {
    if (this.o.catalogue === undefined || this.only !== undefined) return;
    for (const [packId, seen] of await this.o.catalogue.packs()) {
      if (!seen.damaged || seen.verifiedNs === undefined || this.packs.isGone(packId)) continue;
      const shape = await this.packs.shape(packId);
      if (
        shape === undefined ||
        shape.generation !== seen.generation ||
        shape.sizeBytes !== seen.sizeBytes
      )
        continue;
      this.findings.push({
        severity: 'damage',
        kind: 'frame',
        object: packName(packId),
        packId,
        frames: [],
        message: `frames of it were found damaged on ${formatTimeLocal(seen.verifiedNs)}; this run did not read the data`,
        hint: 'Run "b2 verify --data all" to see which, and what needs them.',
      });
    }
  }

  /** Turns bad places into points and ranges. */
  private async locateAll(quarantine: readonly Quarantine[]): Promise<VolumeReport[]> {
    const { signal } = this.o;
    for (const v of this.volumes.values()) {
      for (const { seqs, ...f } of v.findings) if (seqs === undefined) this.findings.push(f);
    }
    const bad = new BadPlaces();
    for (const f of this.findings) bad.addFinding(f);
    const aside = new Map<string, FramePlace[]>();
    for (const q of quarantine) {
      const list = aside.get(q.packId) ?? [];
      for (const f of q.frames) {
        if (list.some((p) => p.number === f.number)) continue;
        list.push({ number: f.number, ...(f.offset > 0 ? { offsetBytes: f.offset } : {}) });
      }
      aside.set(q.packId, list);
      for (const place of list) bad.addFrame(q.packId, place);
    }
    const reports: VolumeReport[] = [];
    const touches = new Map<string, TouchedVolume[]>();
    const seqFindings: Finding[] = [];
    for (const [volumeId, v] of this.volumes) {
      if (bad.isEmpty && v.findings.every((f) => f.seqs === undefined)) {
        const newest = await pointRef(v.history);
        reports.push({
          volumeId,
          name: v.name,
          commits: v.commits,
          newest,
          newestWhole: newest,
          damagedPoints: 0,
        });
        continue;
      }
      const points = await VolumePoints.read(v.history);
      const located = await locate(v.history, v.name, points, bad, signal);
      for (const [packId, touched] of located.byPack)
        touches.set(packId, [...(touches.get(packId) ?? []), touched]);
      for (const { seqs, ...f } of v.findings) {
        if (seqs === undefined) continue;
        const ranges =
          f.severity === 'damage' && f.kind === 'segment' ? untilFull(seqs, points) : seqs;
        const touched = touchedSeqs(ranges, volumeId, v.name, points, located.affected);
        seqFindings.push({ ...f, touches: touched === undefined ? [] : [touched] });
      }
      reports.push({
        volumeId,
        name: v.name,
        commits: v.commits,
        ...newestOf(points, located.affected),
      });
    }
    const all = [...this.findings, ...seqFindings].map((f) =>
      f.packId !== undefined &&
      bad.hasPack(f.packId) &&
      f.severity !== 'note' &&
      f.kind !== 'footer' &&
      f.kind !== 'unlisted'
        ? { ...f, touches: touches.get(f.packId) ?? [] }
        : f,
    );
    this.findings.length = 0;
    for (const f of all) {
      const places = aside.get(f.packId ?? '');
      // Frames that repair has set aside are told once, below.
      const isAside =
        f.kind === 'frame' &&
        f.frames !== undefined &&
        places !== undefined &&
        f.frames.every((p) => places.some((q) => q.number === p.number));
      if (!isAside) this.findings.push(f);
    }
    for (const [packId, places] of aside) {
      const touched = touches.get(packId) ?? [];
      this.findings.push({
        severity: touched.length > 0 ? 'damage' : 'note',
        kind: 'quarantine',
        object: packName(packId),
        packId,
        frames: places,
        touches: touched,
        message: `${places.length} damaged ${places.length === 1 ? 'frame was' : 'frames were'} set aside by repair${touched.length > 0 ? '' : '; no point needs them any more'}`,
      });
    }
    return reports;
  }

  private async remember(findings: readonly Finding[]): Promise<void> {
    const { catalogue } = this.o;
    if (catalogue === undefined) return;
    const isBack = (object: string): boolean =>
      findings.some((f) => f.kind === 'rollback' && f.object.startsWith(object));
    // Seen is seen, also where it could not be read whole; but never what is older than what was seen before.
    if (!isBack('volumes/')) await catalogue.rebuild(this.repo);
    if (!isBack('config') && !findings.some((f) => f.kind === 'config'))
      await catalogue.recordConfig(this.configMac());
  }
}

function chosen<
  T extends {
    readonly packId: string;
    readonly sizeBytes: number;
    readonly frames?: readonly number[];
  },
>(facts: readonly T[], share: number): { list: PackToVerify[]; totalBytes: number; bytes: number } {
  const totalBytes = facts.reduce((n, f) => n + f.sizeBytes, 0);
  const list: PackToVerify[] = [];
  let bytes = 0;
  for (const f of facts) {
    if (list.length > 0 && bytes >= share * totalBytes) break;
    list.push({ packId: f.packId, ...(f.frames === undefined ? {} : { frames: f.frames }) });
    bytes += f.sizeBytes;
  }
  return { list, totalBytes, bytes };
}

function compare(a: bigint, b: bigint): number {
  return a < b ? -1 : a > b ? 1 : 0;
}

async function pointRef(history: VolumeHistory): Promise<PointRef | undefined> {
  if (history.chain.gap !== undefined) return undefined;
  const c = await new Timeline(history.sources).latest(PointClass.crash);
  return c === undefined ? undefined : { seq: c.seq, instantNs: c.instantNs };
}

/** Damage of a segment's records reaches every later point, up to the next full commit. */
function untilFull(
  seqs: readonly { readonly firstSeq: number; readonly lastSeq: number }[],
  points: VolumePoints,
): { firstSeq: number; lastSeq: number }[] {
  return seqs.map((s) => ({
    firstSeq: s.firstSeq,
    lastSeq: Math.min(s.lastSeq, points.nextFull(s.firstSeq) - 1),
  }));
}

function newestOf(
  points: VolumePoints,
  affected: Uint8Array,
): { newest: PointRef | undefined; newestWhole: PointRef | undefined; damagedPoints: number } {
  let newest: PointRef | undefined;
  let newestWhole: PointRef | undefined;
  points.seqs.forEach((seq, i) => {
    if (points.exact[i] !== true) return;
    const point = { seq, instantNs: points.instants[i] ?? 0n };
    newest = point;
    if (affected[i] === 0) newestWhole = point;
  });
  return { newest, newestWhole, damagedPoints: affected.reduce((n, a) => n + a, 0) };
}

/** The same thing found twice (by the survey and by the data pass) is one finding. */
function withoutRepeats(findings: readonly Finding[]): Finding[] {
  const seen = new Set<string>();
  const whole = new Set(
    findings.filter((f) => f.kind === 'pack' || f.kind === 'missing').map((f) => f.packId),
  );
  return findings.filter((f) => {
    if (f.kind === 'absent' && whole.has(f.packId)) return false;
    const frames = f.frames?.map((p) => p.number).join(',') ?? '';
    // A commit frame of a pack that is missing says no more than that it is missing.
    const key =
      f.kind === 'missing'
        ? `missing ${f.object}`
        : `${f.kind} ${f.object} ${frames} ${frames === '' ? f.message : ''}`;
    if (seen.has(key)) return false;
    seen.add(key);
    return true;
  });
}
