/**
 * The other volumes of the group that a volume is of, at the instant of one of its points: their points of exactly that instant are
 * what lay on the other devices at that moment. Points of any other instant are never taken.
 */
import { B2Error, messageOf } from '../errors.js';
import { PointClass } from '../format/commit.js';
import type { CommitRecord } from '../format/segment.js';
import type { Image } from '../image.js';
import { VolumeHistory } from '../repo/history.js';
import { openImage } from '../repo/point.js';
import { groupOf, REACH_NS, type VolumeGroup } from '../repo/point-set.js';
import type { Repository } from '../repo/repository.js';
import { Timeline } from '../repo/timeline.js';
import { listVolumes, type VolumeMeta } from '../repo/volume.js';

/** Another volume of the group, at the instant. */
export interface Companion {
  /** Its name. */
  readonly volume: string;
  /** Its place among the other volumes of the group, the same at every instant. */
  readonly index: number;
  readonly openImage: () => Promise<Image>;
}

/** Another volume of the group that has no such point, with the reason in words. */
export interface MissingCompanion {
  readonly volume: string;
  readonly reason: string;
}

export interface Companions {
  /** Name of the group. */
  readonly group: string;
  readonly there: readonly Companion[];
  readonly missing: readonly MissingCompanion[];
}

/**
 * Finds them; undefined where the volume is of no group, or alone in it. `isSpread`: something lies on them, too; else they only tell
 * whether a member of an array was up to date.
 */
export type FindCompanions = (isSpread: boolean) => Promise<Companions | undefined>;

/** What of a point says which instant it is of. */
export type InstantOf = Pick<CommitRecord, 'seq' | 'instantNs' | 'pointClass'>;

/** Name of the group that a volume makes its points with; undefined without one. */
export function groupNameOf(volume: VolumeMeta): string | undefined {
  return groupOf(volume, [])?.name;
}

/** A volume whose points are looked through. Methods reject where it cannot be read. */
export interface OtherVolume {
  /** Sequence numbers of the exact points of an instant. */
  readonly pointsAt: (instantNs: bigint) => Promise<readonly number[]>;
  readonly openImage: (seq: number) => Promise<Image>;
}

/** The companions of a point: of every other volume the one exact point of that instant; of former ones where they have it. */
export async function companionsAt(
  { name: group, others, former }: VolumeGroup,
  point: InstantOf,
  open: (meta: VolumeMeta) => OtherVolume,
): Promise<Companions | undefined> {
  const all = [...others, ...former];
  if (all.length === 0) return undefined;
  const there: Companion[] = [];
  const missing: MissingCompanion[] = [];
  for (const [i, meta] of all.entries()) {
    const volume = meta.name;
    const isFormer = i >= others.length;
    if (point.pointClass < PointClass.crash) {
      if (isFormer) continue;
      missing.push({
        volume,
        reason: `point #${point.seq} is not exact, so that it has no counterpart in ${volume}`,
      });
      continue;
    }
    try {
      const other = open(meta);
      const seqs = await other.pointsAt(point.instantNs);
      const [seq] = seqs;
      if (seq === undefined) {
        if (!isFormer) missing.push({ volume, reason: `${volume} has no point of that instant` });
      } else if (seqs.length > 1)
        missing.push({
          volume,
          reason: `${volume} has ${seqs.length} points of that instant, and which one counts cannot be told`,
        });
      else there.push({ volume, index: i, openImage: () => other.openImage(seq) });
    } catch (error) {
      if (!(error instanceof B2Error)) throw error;
      missing.push({ volume, reason: `${volume} cannot be read: ${messageOf(error)}` });
    }
  }
  return { group, there, missing };
}

/** For {@link OtherVolume.pointsAt}. */
export async function pointsAt(timeline: Timeline, instantNs: bigint): Promise<readonly number[]> {
  const seqs: number[] = [];
  for await (const c of timeline.list({ sinceNs: instantNs, untilNs: instantNs })) seqs.push(c.seq);
  return seqs;
}

/** The group of a volume for a command that looks at some points of it: histories are opened when they are asked for. Close it. */
export class GroupVolumes {
  readonly #repo: Repository;
  readonly #volume: VolumeMeta;
  readonly #warn: (text: string) => void;
  readonly #opened = new Map<string, Promise<VolumeHistory>>();
  #group: Promise<VolumeGroup | undefined> | undefined;

  constructor(repo: Repository, volume: VolumeMeta, warn: (text: string) => void) {
    this.#repo = repo;
    this.#volume = volume;
    this.#warn = warn;
  }

  async #found(): Promise<VolumeGroup | undefined> {
    if (groupNameOf(this.#volume) === undefined) return undefined;
    this.#group ??= listVolumes(this.#repo, this.#warn).then((all) => groupOf(this.#volume, all));
    return this.#group;
  }

  /** The other volumes, in the order of {@link Companion.index}. */
  async others(): Promise<readonly VolumeMeta[]> {
    const { others = [], former = [] } = (await this.#found()) ?? {};
    return [...others, ...former];
  }

  /** The history of one of them. Rejects where it cannot be opened, or has a gap. */
  history(meta: VolumeMeta): Promise<VolumeHistory> {
    let history = this.#opened.get(meta.id);
    if (history === undefined) {
      history = VolumeHistory.open(this.#repo, meta.id);
      this.#opened.set(meta.id, history);
    }
    return history.then((h) => {
      h.refuseGap();
      return h;
    });
  }

  /** For {@link FindCompanions}. */
  async at(point: InstantOf): Promise<Companions | undefined> {
    const group = await this.#found();
    if (group === undefined) return undefined;
    return companionsAt(group, point, (meta) => ({
      pointsAt: async (instantNs) =>
        pointsAt(new Timeline((await this.history(meta)).sources), instantNs),
      openImage: async (seq) => openImage(await this.history(meta), meta, seq),
    }));
  }

  /**
   * Of the points of the volume that are older than `point`, by no more than {@link REACH_NS}, the newest one whose instant most of the others
   * have: points of a group become durable one volume after the other, and a look or a crash can fall in between. Undefined where none
   * has more of them than `point`. A volume that was taken out of the group has none of either.
   */
  async sharedBefore(history: VolumeHistory, point: InstantOf): Promise<CommitRecord | undefined> {
    const range = { sinceNs: point.instantNs - REACH_NS, untilNs: point.instantNs };
    const instants: Set<bigint>[] = [];
    for (const meta of await this.others()) {
      try {
        const known = new Set<bigint>();
        const timeline = new Timeline((await this.history(meta)).sources);
        for await (const c of timeline.list(range)) known.add(c.instantNs);
        instants.push(known);
      } catch (error) {
        // It has none that could be read.
        if (!(error instanceof B2Error)) throw error;
      }
    }
    const haveIt = (ns: bigint): number => instants.filter((known) => known.has(ns)).length;
    let most = haveIt(point.instantNs);
    let best: CommitRecord | undefined;
    for await (const c of new Timeline(history.sources).list({ ...range, newestFirst: true })) {
      if (most === instants.length) break;
      if (c.seq >= point.seq || haveIt(c.instantNs) <= most) continue;
      best = c;
      most = haveIt(c.instantNs);
    }
    return best;
  }

  async close(): Promise<void> {
    for (const history of this.#opened.values()) {
      await history.then(
        (h) => h.close(),
        () => undefined,
      );
    }
    this.#opened.clear();
  }
}
