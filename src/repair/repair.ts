/**
 * Repair: makes anew what can be derived (manifest, journal, claims, volume meta, `config`, headers and footers of packs), sets damaged
 * frames aside, and notes what is lost. It never invents data and never deletes any: the only objects it removes are segments
 * whose commits other segments hold by then, and quarantine objects whose frames have become whole again.
 *
 * Under the leases `repair` and `prune`. Readers and writers go on: what it adds says the same as what was there. Only where
 * commits are lost for good it claims the volume, which stops the writer, and adds a full commit without a point (FORMAT.md 6.9), from
 * which capture goes on. Every step may be repeated; a second run finds nothing to do.
 */
import { B2Error, isKind, messageOf } from '../errors.js';
import { ignoreEvents, type EventSink } from '../events.js';
import { CommitFlag, Coverage, PointClass, ZERO_HASH } from '../format/commit.js';
import { FrameType } from '../format/frame.js';
import {
  CONFIG_NAME,
  condemnedName,
  epochName,
  journalName,
  packName,
  segmentName,
  volumeMetaName,
  type SegmentName,
} from '../format/names.js';
import { ObjectKind } from '../format/object.js';
import { PACK_HEADER_BYTES } from '../format/pack.js';
import { readCommit, type ReadCommit } from '../repo/commits.js';
import { putCondemned } from '../repo/condemned.js';
import { VolumeHistory, type SeqRange } from '../repo/history.js';
import { acquireLease, type Lease } from '../repo/lease.js';
import { listLost, putLost } from '../repo/lost.js';
import {
  listSegments,
  maintainVolume,
  segmentContext,
  segmentTarget,
} from '../repo/maintenance.js';
import { OpenPack } from '../repo/pack-reader.js';
import { putQuarantine, listQuarantine, type QuarantinedFrame } from '../repo/quarantine.js';
import type { Repository } from '../repo/repository.js';
import { checkPages } from '../repo/segments/chain.js';
import { memorySegment } from '../repo/segments/memory.js';
import { openSegment } from '../repo/segments/reader.js';
import { putMemorySegment } from '../repo/segments/writer.js';
import { readVolumeMeta, writeVolumeMeta } from '../repo/volume.js';
import { VolumeWriter } from '../repo/volume-writer.js';
import { verifyPacks } from '../verify/data.js';
import { checkObjects, type ObjectsFound } from '../verify/object-check.js';
import { provenChain, type ChainNode } from './chain-nodes.js';
import { rewritePack, salvagePack } from './salvage.js';

export interface RepairOptions {
  /** Ids; default every volume. Packs, `config` and quarantine are always looked at. */
  readonly volumeIds?: readonly string[] | undefined;
  /** Say what would be done, as far as it can be known without doing it; change nothing, take no lease. */
  readonly dryRun?: boolean | undefined;
  /** Read all data to find damaged frames. Default true. */
  readonly data?: boolean | undefined;
  readonly storeUrl?: string | undefined;
  readonly workers?: number | undefined;
  readonly signal?: AbortSignal | undefined;
  readonly events?: EventSink | undefined;
}

/** Something that repair did, or would do. */
export interface RepairAction {
  readonly kind:
    | 'config'
    | 'condemned'
    | 'pack'
    | 'quarantine'
    | 'release'
    | 'meta'
    | 'epoch'
    | 'journal'
    | 'segment'
    | 'removed'
    | 'lost'
    | 'restart';
  readonly object: string;
  readonly message: string;
}

/** Something that is wrong and that repair cannot mend. */
export interface RepairRest {
  readonly object: string;
  readonly message: string;
}

export interface RepairReport {
  readonly actions: readonly RepairAction[];
  readonly left: readonly RepairRest[];
  /** Volumes whose newest commits are other than before: what was remembered of them does not hold. */
  readonly changedVolumes: readonly string[];
}

/** Extent records, and commits, of a segment that repair writes at once. */
const BATCH_EXTENTS = 262_144;
const BATCH_COMMITS = 4096;

/** Kinds `held` (another repair or prune runs), `io`, `no-space`, `interrupted`. */
export async function repair(repo: Repository, options: RepairOptions = {}): Promise<RepairReport> {
  if (options.dryRun === true) return new Repair(repo, options, []).go();
  const ask = {
    ...repo.env,
    purpose: 'repair',
    ...(options.signal === undefined ? {} : { signal: options.signal }),
  };
  await using first = await acquireLease(repo.store, 'repair', ask);
  await using second = await acquireLease(repo.store, 'prune', ask);
  return await new Repair(repo, options, [first, second]).go();
}

/** A commit found in a pack, and what a new meta object can be made of. */
interface FoundVolume {
  readonly nodes: ChainNode[];
  newest:
    | {
        readonly epoch: number;
        readonly seq: number;
        readonly sizeBytes: number;
        readonly facts: Readonly<Record<string, unknown>>;
        readonly instantNs: bigint;
      }
    | undefined;
  firstNs: bigint | undefined;
}

interface KnownPack {
  readonly sealed: boolean;
}

class Repair {
  private readonly repo: Repository;
  private readonly o: RepairOptions;
  private readonly leases: readonly Lease[];
  private readonly actions: RepairAction[] = [];
  private readonly left: RepairRest[] = [];
  private readonly changed: string[] = [];
  private readonly packs = new Map<string, KnownPack>();
  private readonly found = new Map<string, FoundVolume>();
  private readonly damagedFrames = new Map<string, Map<number, QuarantinedFrame>>();
  /** Some pack could not be read for reasons that may pass: nothing may be called lost. */
  private unread = false;

  constructor(repo: Repository, options: RepairOptions, leases: readonly Lease[]) {
    this.repo = repo;
    this.o = options;
    this.leases = leases;
  }

  async go(): Promise<RepairReport> {
    const { repo, o } = this;
    const objects = await checkObjects(repo, undefined, o.signal);
    await this.config(objects);
    await this.condemned(objects);
    const neededElsewhere = await this.packsNeeded(objects);
    for (const { packId } of objects.packs) await this.pack(packId, neededElsewhere);
    if (o.data !== false) await this.dataPass(objects);
    await this.collectCommits(objects);
    const only = o.volumeIds === undefined ? undefined : new Set(o.volumeIds);
    for (const id of [...new Set([...objects.volumeIds, ...this.found.keys()])].sort()) {
      if (only === undefined || only.has(id)) await this.volume(id, objects);
    }
    await this.quarantine();
    for (const f of objects.findings) {
      if (f.severity === 'note' || this.actions.some((a) => a.object === f.object)) continue;
      if (f.kind === 'object' || f.kind === 'config')
        this.left.push({ object: f.object, message: f.message });
    }
    return { actions: this.actions, left: this.left, changedVolumes: this.changed };
  }

  /** Notes an action and, unless this is a dry run, does it, with the leases still held. */
  private async act(action: RepairAction, fn: () => Promise<unknown>): Promise<void> {
    this.o.signal?.throwIfAborted();
    this.actions.push(action);
    if (this.o.dryRun === true) return;
    for (const lease of this.leases) await lease.assertHeld();
    await fn();
  }

  private async config(objects: ObjectsFound): Promise<void> {
    const wrong = objects.findings.filter((f) => f.kind === 'config' && f.severity === 'damage');
    const [first] = wrong;
    if (first === undefined) return;
    await this.act(
      {
        kind: 'config',
        object: first.object,
        message: `"config" and its copy are written anew (${wrong.map((f) => `${f.object}: ${f.message}`).join('; ')})`,
      },
      async () => {
        const { repo } = this;
        await using lease = await acquireLease(repo.store, 'keys', {
          ...repo.env,
          purpose: 'repair',
        });
        await lease.assertHeld();
        await repo.rewriteConfig();
      },
    );
    if (objects.findings.some((f) => f.kind === 'config' && f.severity === 'unreadable')) {
      this.left.push({
        object: CONFIG_NAME,
        message: 'one of "config" and its copy cannot be read',
      });
    }
  }

  /**
   * A condemned object that cannot be read says that everything is condemned, and would for ever. One that says so in words ends
   * after its time, as every other.
   */
  private async condemned(objects: ObjectsFound): Promise<void> {
    for (const f of objects.findings) {
      const id = /^condemned\/([0-9a-f]{32})$/.exec(f.object)?.[1];
      if (id === undefined || f.severity !== 'damage') continue;
      await this.act(
        {
          kind: 'condemned',
          object: condemnedName(id),
          message:
            'written anew: it now names every pack there is, so that nothing is reused until it has expired',
        },
        () =>
          putCondemned(this.repo, {
            id,
            createdNs: this.repo.env.clock.nowNs(),
            packs: objects.packs.map((p) => p.packId),
            frames: new Map(),
          }),
      );
    }
  }

  /** Packs that were sealed once, because segments or commits of other packs name them; and not those that a journal names. */
  private async packsNeeded(objects: ObjectsFound): Promise<ReadonlySet<string>> {
    const needed = new Set<string>();
    for (const volumeId of objects.volumeIds) {
      for (const n of await listSegments(this.repo, volumeId)) {
        try {
          const s = await openSegment(segmentContext(this.repo, volumeId), segmentName(n));
          try {
            for (let p = 0; p < s.index.packCount; p++) needed.add(await s.packId(p));
          } finally {
            await s.close();
          }
        } catch (error) {
          if (!isKind(error, 'damaged', 'not-found')) throw error;
        }
      }
    }
    return needed;
  }

  private async journalPacks(volumeId: string): Promise<Set<string>> {
    const ids = new Set<string>();
    for await (const { name } of this.repo.store.list(`volumes/${volumeId}/journal`)) {
      const id = name.split('/').at(-1) ?? '';
      if (/^[0-9a-f]{32}$/.test(id)) ids.add(id);
    }
    return ids;
  }

  /** Opens one pack; writes its header or footer anew where that is damaged. */
  private async pack(packId: string, needed: ReadonlySet<string>): Promise<void> {
    const { repo } = this;
    const object = packName(packId);
    let pack: OpenPack | undefined;
    try {
      pack = await OpenPack.open(repo.packContext(), packId);
      if (pack.sealed) {
        this.packs.set(packId, { sealed: true });
        return;
      }
    } catch (error) {
      if (isKind(error, 'damaged') && isKind(error.cause, 'not-found')) return; // pruned meanwhile
      if (isKind(error, 'io', 'unsupported')) {
        this.unread = true;
        this.left.push({ object, message: messageOf(error) });
        return;
      }
      if (!isKind(error, 'damaged')) throw error;
    } finally {
      await pack?.close();
    }
    const bytes = await repo.store.get(object);
    if (
      bytes.length < PACK_HEADER_BYTES ||
      bytes.subarray(0, PACK_HEADER_BYTES).every((b) => b === 0)
    )
      return; // a crash came first
    const s = salvagePack(repo, packId, bytes);
    for (const d of s.damaged) this.noteDamaged(packId, d);
    const usable = s.footer.frames.length > 0;
    if (!s.headerGood && !usable) {
      this.left.push({
        object,
        message: 'its header is not that of this pack, and no frame of it opens: it cannot be used',
      });
      return;
    }
    // A pack that somebody may still be writing is left as it is: readers find its frames without a footer.
    if (s.headerGood && !s.wasSealed && !needed.has(packId) && repo.store.canAppend) {
      this.packs.set(packId, { sealed: false });
      return;
    }
    this.packs.set(packId, { sealed: true });
    const what = s.headerGood ? 'its footer is' : 'its header and footer are';
    await this.act(
      {
        kind: 'pack',
        object,
        message: `${what} written anew: ${s.footer.frames.length} frames open, ${s.damaged.length} do not`,
      },
      () => rewritePack(repo, packId, bytes, s),
    );
  }

  /** Seals a pack whose writer is gone: the volume has commits that came later. */
  private async seal(packId: string): Promise<void> {
    const bytes = await this.repo.store.get(packName(packId));
    const s = salvagePack(this.repo, packId, bytes);
    await this.act(
      {
        kind: 'pack',
        object: packName(packId),
        message: `its footer is written: ${s.footer.frames.length} frames`,
      },
      () => rewritePack(this.repo, packId, bytes, s),
    );
    this.packs.set(packId, { sealed: true });
  }

  private noteDamaged(packId: string, frame: QuarantinedFrame): void {
    let list = this.damagedFrames.get(packId);
    if (list === undefined) this.damagedFrames.set(packId, (list = new Map()));
    list.set(frame.number, frame);
  }

  /** Reads every frame of every pack. */
  private async dataPass(objects: ObjectsFound): Promise<void> {
    const { repo, o } = this;
    const result = await verifyPacks(
      objects.packs.filter((p) => this.packs.has(p.packId)).map((p) => ({ packId: p.packId })),
      {
        handle: repo.handle(o.storeUrl),
        store: repo.store,
        clock: repo.env.clock,
        events: o.events ?? ignoreEvents,
        signal: o.signal,
        workers: o.workers,
        totalBytes: objects.packs.reduce((n, p) => n + p.sizeBytes, 0),
      },
    );
    for (const f of result.findings) {
      switch (f.kind) {
        case 'frame':
          this.noteDamaged(f.packId, {
            number: f.frame ?? 0,
            offset: f.offsetBytes ?? 0,
            reason: f.reason,
          });
          break;
        case 'footer': {
          if (this.actions.some((a) => a.kind === 'pack' && a.object === packName(f.packId))) break;
          const bytes = await repo.store.get(packName(f.packId));
          const s = salvagePack(repo, f.packId, bytes);
          await this.act(
            {
              kind: 'pack',
              object: packName(f.packId),
              message: 'its footer is written anew: it named other chunks than the frames hold',
            },
            () => rewritePack(repo, f.packId, bytes, s),
          );
          break;
        }
        case 'missing':
        case 'absent':
          break; // nothing of it is left to mend
        case 'pack':
        case 'unreadable':
          this.unread = true;
          this.left.push({ object: packName(f.packId), message: f.reason });
      }
    }
  }

  /** Every commit of every pack. */
  private async collectCommits(objects: ObjectsFound): Promise<void> {
    const { repo } = this;
    for (const { packId } of objects.packs) {
      if (!this.packs.has(packId)) continue;
      this.o.signal?.throwIfAborted();
      let pack: OpenPack;
      try {
        pack = await OpenPack.open(repo.packContext(), packId);
      } catch (error) {
        if (this.o.dryRun === true && isKind(error, 'damaged')) continue; // it would have been written anew by now
        throw error;
      }
      try {
        for (const frame of pack.footer.frames) {
          if (frame.type !== FrameType.commit) continue;
          try {
            const c = await readCommit(repo.packs, repo.keys, pack, frame.number, undefined);
            if (c !== undefined) this.noteCommit(c);
          } catch (error) {
            if (isKind(error, 'io')) this.unread = true;
            if (!isKind(error, 'damaged', 'io')) throw error;
            this.left.push({
              object: packName(packId),
              message: `the commit in frame ${frame.number} cannot be read: ${messageOf(error)}`,
            });
            if (isKind(error, 'damaged'))
              this.noteDamaged(packId, {
                number: frame.number,
                offset: frame.offset,
                reason: error.message,
              });
          }
        }
      } finally {
        await pack.close();
      }
    }
  }

  private noteCommit(c: ReadCommit): void {
    const { commit } = c;
    let v = this.found.get(commit.volumeId);
    if (v === undefined)
      this.found.set(commit.volumeId, (v = { nodes: [], newest: undefined, firstNs: undefined }));
    v.nodes.push({
      seq: c.seq,
      firstSeq: c.firstSeq,
      hash: c.hash.toString('hex'),
      prev: commit.prevHash.toString('hex'),
      epoch: commit.epoch,
      full: c.full,
      place: { packId: c.packId, frame: c.frame },
    });
    if (v.firstNs === undefined || commit.instantNs < v.firstNs) v.firstNs = commit.instantNs;
    const n = v.newest;
    // What names the volume may be in older commits only: the bridge that repair writes knows nothing.
    const named =
      typeof commit.facts['volume'] === 'string' || typeof n?.facts['volume'] !== 'string';
    if (
      n === undefined ||
      (named && (commit.epoch > n.epoch || (commit.epoch === n.epoch && c.seq > n.seq)))
    ) {
      v.newest = {
        epoch: commit.epoch,
        seq: c.seq,
        sizeBytes: commit.sizeBytes,
        facts: commit.facts,
        instantNs: commit.instantNs,
      };
    }
  }

  private async volume(volumeId: string, objects: ObjectsFound): Promise<void> {
    const { repo, o } = this;
    const found = this.found.get(volumeId) ?? { nodes: [], newest: undefined, firstNs: undefined };
    const manifest = await this.goodSegments(volumeId);
    const chain = provenChain([...found.nodes, ...manifest.good.flatMap((g) => g.nodes)]);
    await this.meta(volumeId, found, objects);
    await this.epochs(volumeId, chain.runs.flat(), objects);
    await this.journalObjects(volumeId, objects);

    // What good segments say of the chain is kept; the rest is written from the packs.
    const onChain = new Map<number, ChainNode>();
    for (const n of chain.runs.flat()) onChain.set(n.seq, n);
    const kept: SeqRange[] = [];
    for (const g of manifest.good) {
      if (g.nodes.every((n) => onChain.get(n.seq)?.hash === n.hash))
        kept.push({ firstSeq: g.name.firstSeq, lastSeq: g.name.lastSeq });
      else manifest.bad.push(g.name);
    }
    const covers = (n: ChainNode): boolean =>
      kept.some((k) => k.firstSeq <= n.firstSeq && k.lastSeq >= n.seq);
    const written: SeqRange[] = [];
    for (const [r, run] of chain.runs.entries()) {
      const isLast = r === chain.runs.length - 1;
      // The journal begins at the first pack that may still be open: only the newest run can have one.
      const open = (n: ChainNode): boolean =>
        n.place !== undefined && !covers(n) && this.packs.get(n.place.packId)?.sealed === false;
      let end = run.length;
      if (isLast) {
        const first = run.findIndex(open);
        if (first >= 0) end = first;
        await this.journal(volumeId, run.slice(end));
      } else {
        for (const packId of new Set(run.filter(open).map((n) => n.place?.packId ?? '')))
          await this.seal(packId);
      }
      let batch: ChainNode[] = [];
      for (const n of run.slice(0, end)) {
        if (covers(n) || n.place === undefined) {
          written.push(...(await this.segments(volumeId, batch)));
          batch = [];
        } else {
          batch.push(n);
        }
      }
      written.push(...(await this.segments(volumeId, batch)));
    }
    for (const name of manifest.bad) {
      const range = { firstSeq: name.firstSeq, lastSeq: name.lastSeq };
      const object = segmentName(name);
      if (this.actions.some((a) => a.kind === 'segment' && a.object === object)) continue; // written over
      if (isCovered(range, [...kept, ...written])) {
        await this.act(
          { kind: 'removed', object, message: 'damaged; other segments hold its commits now' },
          () => repo.store.delete(object),
        );
      } else if (name.level === undefined) {
        await this.act(
          {
            kind: 'removed',
            object,
            message: 'a damaged full map; it is made anew when it is worth it',
          },
          () => repo.store.delete(object),
        );
      } else {
        this.left.push({
          object,
          message: `damaged, and the packs do not hold all of commits ${name.firstSeq} to ${name.lastSeq}`,
        });
      }
    }
    await this.losses(volumeId, chain.lost);
    if (o.dryRun !== true) await maintainVolume(repo, volumeId, o.signal);
  }

  /** Segments that open and of which every page does, with their commits; and those that do not. */
  private async goodSegments(
    volumeId: string,
  ): Promise<{ good: { name: SegmentName; nodes: ChainNode[] }[]; bad: SegmentName[] }> {
    const good: { name: SegmentName; nodes: ChainNode[] }[] = [];
    const bad: SegmentName[] = [];
    for (const name of await listSegments(this.repo, volumeId)) {
      try {
        const s = await openSegment(segmentContext(this.repo, volumeId), segmentName(name));
        try {
          let sound = true;
          for await (const _ of checkPages(s)) sound = false;
          const nodes: ChainNode[] = [];
          let prev = s.index.prevHash.toString('hex');
          for (let p = 0; p < s.index.commits.length; p++) {
            const page = await s.commitPage(p, false);
            for (let i = 0; i < page.length; i++) {
              const c = page.record(i);
              const hash = c.hash.toString('hex');
              nodes.push({
                seq: c.seq,
                firstSeq: c.firstSeq,
                hash,
                prev,
                epoch: c.epoch,
                full: (c.flags & CommitFlag.full) !== 0,
                place: undefined,
              });
              prev = hash;
            }
          }
          if (!sound) bad.push(name);
          else if (name.level !== undefined) good.push({ name, nodes });
        } finally {
          await s.close();
        }
      } catch (error) {
        if (isKind(error, 'not-found')) continue;
        if (!isKind(error, 'damaged')) throw error;
        bad.push(name);
      }
    }
    return { good, bad };
  }

  /** Writes commits that continue each other as segments of level 0. Returns the ranges. */
  private async segments(volumeId: string, nodes: readonly ChainNode[]): Promise<SeqRange[]> {
    const { repo } = this;
    const done: SeqRange[] = [];
    let batch: ReadCommit[] = [];
    let extents = 0;
    const flush = async (): Promise<void> => {
      const [first] = batch;
      const last = batch.at(-1);
      if (first === undefined || last === undefined) return;
      const range = { firstSeq: first.firstSeq, lastSeq: last.seq };
      const object = segmentName({ volumeId, level: 0, ...range });
      const commits = batch;
      await this.act(
        {
          kind: 'segment',
          object,
          message: `commits ${range.firstSeq} to ${range.lastSeq} brought back from their packs`,
        },
        () =>
          putMemorySegment(
            segmentTarget(repo, volumeId),
            memorySegment(commits, first.commit.prevHash),
          ),
      );
      done.push(range);
      batch = [];
      extents = 0;
    };
    for (const n of nodes) {
      const { place } = n;
      if (place === undefined) throw new Error('a commit without a place');
      const c = await repo.packs.useAgain(place.packId, (pack) =>
        readCommit(repo.packs, repo.keys, pack, place.frame, volumeId),
      );
      if (c === undefined)
        throw new B2Error(
          'damaged',
          `pack ${place.packId}, frame ${place.frame}: it has changed meanwhile`,
        );
      batch.push(c);
      extents += c.extents.length;
      if (extents >= BATCH_EXTENTS || batch.length >= BATCH_COMMITS) await flush();
    }
    await flush();
    return done;
  }

  /** Journal entries for commits whose pack is open. */
  private async journal(volumeId: string, nodes: readonly ChainNode[]): Promise<void> {
    const known = await this.journalPacks(volumeId);
    for (const n of nodes) {
      const packId = n.place?.packId;
      if (packId === undefined || known.has(packId)) continue;
      known.add(packId);
      await this.putJournal(
        volumeId,
        packId,
        n,
        'the pack is open and holds commits that no segment holds',
      );
    }
  }

  private putJournal(
    volumeId: string,
    packId: string,
    n: ChainNode | undefined,
    why: string,
  ): Promise<void> {
    const object = journalName(volumeId, packId);
    return this.act({ kind: 'journal', object, message: `written anew: ${why}` }, () =>
      this.repo.putObject(ObjectKind.journal, object, {
        volume: volumeId,
        epoch: n?.epoch ?? 0,
        pack: packId,
        firstSeq: String(n?.firstSeq ?? 0),
        prevHash: n?.prev ?? ZERO_HASH.toString('hex'),
        writer: this.repo.env.owner,
        created: this.repo.env.clock.nowNs(),
      }),
    );
  }

  /** Damaged journal entries: their name says all that readers need. */
  private async journalObjects(volumeId: string, objects: ObjectsFound): Promise<void> {
    for (const f of objects.findings) {
      const packId = f.object.startsWith(`volumes/${volumeId}/journal/`)
        ? f.object.split('/').at(-1)
        : undefined;
      if (packId === undefined || f.severity !== 'damage') continue;
      const node = this.found.get(volumeId)?.nodes.find((n) => n.place?.packId === packId);
      await this.putJournal(volumeId, packId, node, 'it was damaged');
    }
  }

  private async meta(volumeId: string, found: FoundVolume, objects: ObjectsFound): Promise<void> {
    const object = volumeMetaName(volumeId);
    const wrong = objects.findings.find((f) => f.object === object && f.severity === 'damage');
    if (wrong === undefined && objects.volumeIds.has(volumeId)) return;
    const { newest } = found;
    if (newest === undefined) {
      this.left.push({
        object,
        message: 'no commit of the volume can be read: nothing is known of it',
      });
      return;
    }
    try {
      await readVolumeMeta(this.repo, volumeId);
      return; // written since
    } catch (error) {
      if (!isKind(error, 'not-found', 'damaged')) throw error;
    }
    const text = (key: string): string => {
      const v = newest.facts[key];
      return typeof v === 'string' ? v : '';
    };
    const bytes = newest.facts['logicalBlockBytes'];
    const name = text('volume') === '' ? `lost-${volumeId}` : text('volume');
    await this.act(
      {
        kind: 'meta',
        object,
        message: `written anew from what the newest commit says: volume ${name}`,
      },
      () =>
        writeVolumeMeta(this.repo, {
          id: volumeId,
          name,
          host: text('host'),
          createdNs: found.firstNs ?? newest.instantNs,
          device: text('device'),
          sizeBytes: newest.sizeBytes,
          logicalBlockBytes: bytes === 4096 ? 4096 : 512,
          facts: text('group') === '' ? {} : { group: text('group') },
          updatedNs: this.repo.env.clock.nowNs(),
        }),
    );
  }

  /** Claims: the highest decides, and must not be below that of any commit (a new claim would be ranked under it). */
  private async epochs(
    volumeId: string,
    chain: readonly ChainNode[],
    objects: ObjectsFound,
  ): Promise<void> {
    const used = [...chain, ...(this.found.get(volumeId)?.nodes ?? [])].reduce(
      (n, c) => Math.max(n, c.epoch),
      0,
    );
    const broken = objects.findings
      .filter((f) => f.severity === 'damage' && f.object.startsWith(`volumes/${volumeId}/epochs/`))
      .map((f) => Number.parseInt(f.object.split('/').at(-1) ?? '', 16));
    const missing = (objects.epochs.get(volumeId) ?? 0) < used ? [used] : [];
    for (const epoch of new Set([...broken, ...missing])) {
      const object = epochName(volumeId, epoch);
      await this.act(
        {
          kind: 'epoch',
          object,
          message:
            'the claim is written anew, so that the next one ranks above the commits that are there',
        },
        () =>
          this.repo.putObject(ObjectKind.epoch, object, {
            volume: volumeId,
            epoch,
            writer: this.repo.env.owner,
            created: this.repo.env.clock.nowNs(),
          }),
      );
    }
  }

  /** Notes lost commits, and makes the volume ready for capture again where its newest commits cannot be used. */
  private async losses(volumeId: string, lost: readonly SeqRange[]): Promise<void> {
    const { repo } = this;
    if (lost.length === 0) return;
    const object = `volumes/${volumeId}`;
    const words = lost
      .map((l) =>
        l.firstSeq === l.lastSeq ? `commit ${l.firstSeq}` : `commits ${l.firstSeq} to ${l.lastSeq}`,
      )
      .join(', ');
    if (this.unread) {
      this.left.push({
        object,
        message: `${words} are not found, but not everything could be read: nothing is called lost yet`,
      });
      return;
    }
    const noted = await listLost(repo, volumeId);
    for (const l of lost) {
      if (noted.some((n) => n.firstSeq <= l.firstSeq && n.lastSeq >= l.lastSeq)) continue;
      const many =
        l.firstSeq === l.lastSeq
          ? `commit ${l.firstSeq} is`
          : `commits ${l.firstSeq} to ${l.lastSeq} are`;
      await this.act(
        { kind: 'lost', object, message: `${many} in no pack that can be read: noted as lost` },
        () => putLost(repo, volumeId, l),
      );
      this.changed.push(volumeId);
    }
    const history = await VolumeHistory.open(repo, volumeId);
    const behind = history.unreadable.filter((u) =>
      lost.some((l) => u.firstSeq <= l.firstSeq && u.lastSeq > l.lastSeq),
    );
    const { gap } = history.chain;
    const size = history.lastCommit?.sizeBytes;
    const tip = history.tip;
    await history.close();
    for (const b of behind) {
      const from = lost.find((l) => b.firstSeq <= l.firstSeq)?.lastSeq ?? b.firstSeq;
      this.left.push({
        object,
        message: `commits ${from + 1} to ${b.lastSeq} are there but build on what is lost; they cannot be restored and are kept`,
      });
    }
    if (tip === undefined || size === undefined || gap === undefined) return;
    await this.act(
      {
        kind: 'restart',
        object,
        message: `a full commit without a point is added behind commit ${tip.seq}, so that the next capture stores the whole device again`,
      },
      async () => {
        const { writer, history: claimed } = await VolumeWriter.claim(repo, volumeId, {
          overGap: true,
        });
        try {
          const now = repo.env.clock.nowNs();
          await writer.commit({
            pointClass: PointClass.none,
            coverage: Coverage.unknown,
            full: true,
            instantNs: now,
            startedNs: now,
            sizeBytes: size,
            extents: [],
            storedBytes: 0,
            facts: {
              repair: {
                lost: lost.map((l) => ({
                  firstSeq: String(l.firstSeq),
                  lastSeq: String(l.lastSeq),
                })),
              },
            },
          });
        } finally {
          await writer.close();
          await claimed.close();
        }
      },
    );
  }

  /** Sets damaged frames aside that are not yet, and lets go of those that are whole again. */
  private async quarantine(): Promise<void> {
    const { repo } = this;
    const known = await listQuarantine(repo, (message) =>
      this.left.push({ object: 'quarantine', message }),
    );
    for (const [packId, frames] of this.damagedFrames) {
      const fresh = [...frames.values()]
        .filter(
          (f) =>
            !known.some((q) => q.packId === packId && q.frames.some((k) => k.number === f.number)),
        )
        .sort((a, b) => a.number - b.number);
      if (fresh.length === 0) continue;
      await this.act(
        {
          kind: 'quarantine',
          object: packName(packId),
          message: `${fresh.length === 1 ? `frame ${fresh[0]?.number ?? 0} is` : `frames ${fresh.map((f) => f.number).join(', ')} are`} damaged and set aside: nothing new will use them`,
        },
        () => putQuarantine(repo, packId, fresh),
      );
    }
    if (this.o.data === false) return;
    for (const q of known) {
      const bad = this.damagedFrames.get(q.packId);
      if (q.frames.some((f) => bad?.has(f.number) === true)) continue;
      if (
        !(await this.areWhole(
          q.packId,
          q.frames.map((f) => f.number),
        ))
      )
        continue;
      await this.act(
        {
          kind: 'release',
          object: q.name,
          message: `its frames of pack ${q.packId} are whole again`,
        },
        () => repo.store.delete(q.name),
      );
    }
  }

  private async areWhole(packId: string, frames: readonly number[]): Promise<boolean> {
    const { repo } = this;
    try {
      const pack = await OpenPack.open(repo.packContext(), packId);
      try {
        for (const n of frames) {
          const open = await pack.readFrame(n);
          if (open.header.type === FrameType.chunks) await pack.readChunks(n);
        }
        return true;
      } finally {
        await pack.close();
      }
    } catch (error) {
      if (!isKind(error, 'damaged', 'io', 'not-found')) throw error;
      return false;
    }
  }
}

/** True if the ranges together hold every number of `range`. */
function isCovered(range: SeqRange, ranges: readonly SeqRange[]): boolean {
  let next = range.firstSeq;
  for (const r of [...ranges].sort((a, b) => a.firstSeq - b.firstSeq)) {
    if (r.firstSeq <= next && r.lastSeq >= next) next = r.lastSeq + 1;
  }
  return next > range.lastSeq;
}
