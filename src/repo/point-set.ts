/**
 * Points of several volumes that are to be used together: those of a group, which are of one instant (src/capture/group.ts), and others
 * beside them. What belongs together is told by what is in the repository. Points of volumes of one host that have the very same instant, to the
 * nanosecond, were claimed together, whatever else is known of the volumes by now. Who else should have one, and is missed, is told by the
 * volumes: those of a host that were captured in a group of one name last.
 */
import { B2Error, isKind } from '../errors.js';
import type { CommitRecord } from '../format/segment.js';
import { formatDuration, formatTimeLocal, formatTimeNs } from '../human.js';
import type { When } from '../when.js';
import { VolumeHistory } from './history.js';
import { choosePoint, type ChosenPoint } from './point.js';
import type { Repository } from './repository.js';
import { Timeline } from './timeline.js';
import type { VolumeMeta } from './volume.js';

/**
 * How much older than the point that a time means the one may be that is taken because more of the group have it. Points of a group are
 * made durable one volume after the other: what a crash, or a look in between, leaves of a point is a matter of seconds.
 */
export const REACH_NS = 60_000_000_000n;
/** Points looked at, of all volumes together, for the newest instant that all have. */
const MOST_LOOKS = 200_000;

/** A group, as one of its volumes sees it. */
export interface VolumeGroup {
  readonly name: string;
  /** In the order of their devices. */
  readonly others: readonly VolumeMeta[];
  /** Volumes that were taken out of it, and are captured no more or elsewhere: they share older points, and are missed in none. */
  readonly former: readonly VolumeMeta[];
}

/** What a volume's meta object says of the group that its device is captured in. */
export interface GroupFacts {
  readonly group: string | undefined;
  /** Its device, by the name that the watch has for it. */
  readonly groupDevice: string | undefined;
  /** All devices of the group, by such names. */
  readonly groupDevices: readonly string[] | undefined;
}

/** As they were recorded; all undefined where it is of no group. */
export function groupFactsOf({ facts }: Pick<VolumeMeta, 'facts'>): GroupFacts {
  const { group, groupDevice, groupDevices } = facts;
  const isGrouped = typeof group === 'string' && group !== '';
  return {
    group: isGrouped ? group : undefined,
    groupDevice: isGrouped && typeof groupDevice === 'string' ? groupDevice : undefined,
    groupDevices:
      isGrouped && Array.isArray(groupDevices)
        ? groupDevices.filter((d) => typeof d === 'string')
        : undefined,
  };
}

/** The group that `volume` was captured in last, of the volumes of a repository; undefined: in none. */
export function groupOf(
  volume: VolumeMeta,
  volumes: readonly VolumeMeta[],
): VolumeGroup | undefined {
  const { group, groupDevices } = groupFactsOf(volume);
  if (group === undefined) return undefined;
  // Where it is not known what the group consists of, everything that says so is of it.
  const isFormer = (v: VolumeMeta): boolean => {
    const { groupDevice } = groupFactsOf(v);
    return (
      groupDevices !== undefined && groupDevice !== undefined && !groupDevices.includes(groupDevice)
    );
  };
  const all = volumes
    .filter((v) => v.id !== volume.id && v.host === volume.host && groupFactsOf(v).group === group)
    .sort(byDevice);
  return { name: group, others: all.filter((v) => !isFormer(v)), former: all.filter(isFormer) };
}

/** sda, sdb, …, sdz, sdaa: as the kernel names them. */
function byDevice(a: VolumeMeta, b: VolumeMeta): number {
  const byText = (x: string, y: string): number => (x < y ? -1 : x > y ? 1 : 0);
  return (
    a.device.length - b.device.length ||
    byText(a.device, b.device) ||
    byText(a.name, b.name) ||
    byText(a.id, b.id)
  );
}

/** Why a point is in a set: it was asked for; it is the same instant in another volume of its group; its volume was asked for beside. */
export type SetReason = 'asked' | 'group' | 'with';

export interface SetMember extends ChosenPoint {
  readonly volume: VolumeMeta;
  /** Open as long as the set is. */
  readonly history: VolumeHistory;
  readonly reason: SetReason;
}

/** A volume of the group that has no part in the set. */
export interface LeftOut {
  readonly volume: VolumeMeta;
  /** A clause. */
  readonly why: string;
}

export interface PointSetOptions {
  /** True: of its group nothing. */
  readonly alone?: boolean;
  /** Volumes that are wanted beside, whatever the instant of their newest point not after the chosen one. */
  readonly beside?: readonly VolumeMeta[];
  /** True: the newest instant not after the chosen point that the whole group has, however old, or else the newest of all. For who does not mean a certain time. */
  readonly whole?: boolean;
  readonly warn: (message: string, hint?: string) => void;
  readonly note: (message: string) => void;
}

/** See {@link choosePointSet}. */
export class PointSet {
  /** The volume that was asked for first, then the others of its group by device, then those beside as they were named. */
  readonly members: readonly SetMember[];
  /** The group's name; undefined: the volume is of none, or it was to be alone. */
  readonly group: string | undefined;
  readonly left: readonly LeftOut[];
  /** A newer point of the first volume that was passed over, because fewer of the group have it. */
  readonly passedOver: CommitRecord | undefined;
  private readonly opened: readonly VolumeHistory[];

  constructor(
    parts: Pick<PointSet, 'members' | 'group' | 'left' | 'passedOver'>,
    opened: readonly VolumeHistory[],
  ) {
    this.members = parts.members;
    this.group = parts.group;
    this.left = parts.left;
    this.passedOver = parts.passedOver;
    this.opened = opened;
  }

  get first(): SetMember {
    const [first] = this.members;
    if (first === undefined) throw new Error('a set without a point');
    return first;
  }

  /** True if every volume of the group is there. */
  get isWhole(): boolean {
    return this.left.length === 0;
  }

  /** Nanoseconds that a member's instant is before that of the first. */
  ageNs(member: SetMember): bigint {
    return this.first.commit.instantNs - member.commit.instantNs;
  }

  async close(): Promise<void> {
    await Promise.all(this.opened.map((h) => h.close()));
  }
}

/**
 * The point of `volume` that `when` means, and beside it that of the very same instant of each other volume of its host that has one: those of
 * its group.
 *
 * Where `when` means a time, not a point (`latest`, `now`, `10m ago`), the newest point may be one that the others have not, or not yet: a
 * crash or a look in between. So of the points up to {@link REACH_NS} older the newest one is taken that most of the group have, and
 * that is noted. A point that is named (its id, a snapshot, its very instant) is never exchanged. Volumes of the group that have no
 * point of the instant are left out, with a warning each that says what can be had instead; nothing of another instant comes in but what
 * `beside` names.
 *
 * Kinds as {@link choosePoint}, also for what `beside` names; `usage` if that is `volume` itself.
 */
export async function choosePointSet(
  repo: Repository,
  volumes: readonly VolumeMeta[],
  volume: VolumeMeta,
  when: When,
  options: PointSetOptions,
): Promise<PointSet> {
  const opened: VolumeHistory[] = [];
  const open = async (v: VolumeMeta): Promise<VolumeHistory> => {
    const history = await VolumeHistory.open(repo, v.id);
    opened.push(history);
    return history;
  };
  try {
    return await new Choice(volumes, volume, when, options, open).make(opened);
  } catch (error) {
    await Promise.all(opened.map((h) => h.close()));
    throw error;
  }
}

/** Another volume of the group, and its points around the chosen one. */
interface Candidate {
  readonly volume: VolumeMeta;
  readonly history: VolumeHistory;
  readonly points: ReadonlyMap<bigint, CommitRecord>;
}

class Choice {
  private readonly volume: VolumeMeta;
  private readonly when: When;
  private readonly o: PointSetOptions;
  private readonly group: VolumeGroup | undefined;
  /** Volumes of the host that are not of the group, or not any more. */
  private readonly kin: readonly VolumeMeta[];
  private readonly openNew: (v: VolumeMeta) => Promise<VolumeHistory>;
  private readonly histories = new Map<string, VolumeHistory>();
  private readonly left: LeftOut[] = [];

  constructor(
    volumes: readonly VolumeMeta[],
    volume: VolumeMeta,
    when: When,
    options: PointSetOptions,
    open: (v: VolumeMeta) => Promise<VolumeHistory>,
  ) {
    this.volume = volume;
    this.when = when;
    this.o = options;
    this.openNew = open;
    const group = options.alone === true ? undefined : groupOf(volume, volumes);
    this.group = group;
    // A volume whose meta object is lost has no host.
    const isNear = (v: VolumeMeta): boolean =>
      v.host === volume.host || v.host === '' || volume.host === '';
    this.kin =
      options.alone === true
        ? []
        : volumes.filter(
            (v) => v.id !== volume.id && isNear(v) && group?.others.includes(v) !== true,
          );
  }

  async make(opened: readonly VolumeHistory[]): Promise<PointSet> {
    const { volume, group, o } = this;
    const beside = [...new Map((o.beside ?? []).map((v) => [v.id, v])).values()];
    if (beside.some((v) => v.id === volume.id))
      throw new B2Error('usage', `${volume.name} is there already: nothing to put it beside`);
    const history = await this.open(volume);
    const own = await choosePoint(history, volume, this.when, o.warn);
    const others = group === undefined ? [] : await this.candidates(group, own.commit);
    const chosen = await this.best(history, own, others);
    const members: SetMember[] = [{ ...chosen, volume, history, reason: 'asked' }];
    const { instantNs } = chosen.commit;
    const lacking: Candidate[] = [];
    const shared: SetMember[] = await this.sharing(instantNs);
    for (const c of others) {
      const commit = await pointOf(c, instantNs);
      if (commit === undefined) lacking.push(c);
      else shared.push({ ...c, commit, snapshot: undefined, reason: 'group' });
    }
    members.push(...shared.sort((a, b) => byDevice(a.volume, b.volume)));
    for (const v of beside) {
      if (members.some((m) => m.volume.id === v.id)) continue;
      const h = await this.open(v);
      const point = await choosePoint(h, v, { kind: 'instant', ns: instantNs }, o.warn);
      members.push({ ...point, volume: v, history: h, reason: 'with' });
    }
    const isIn = (v: VolumeMeta): boolean => members.some((m) => m.volume.id === v.id);
    const left = this.left.filter((l) => !isIn(l.volume));
    for (const { volume: v, why } of left)
      o.warn(`${v.name} of group ${group?.name} is left out: ${why}`);
    left.push(
      ...(await this.lackingOnes(
        lacking.filter((c) => !isIn(c.volume)),
        chosen.commit,
        history,
        others,
      )),
    );
    if (group !== undefined && group.others.length === 0)
      o.warn(
        `${volume.name} was captured in group ${group.name}, but this repository has no other volume of it`,
      );
    const passedOver =
      o.whole === true || chosen.commit.seq === own.commit.seq ? undefined : own.commit;
    if (passedOver !== undefined) this.tellPassedOver(passedOver, members);
    return new PointSet({ members, group: group?.name, left, passedOver }, opened);
  }

  /** Each is opened once. */
  private async open(v: VolumeMeta): Promise<VolumeHistory> {
    const history = this.histories.get(v.id) ?? (await this.openNew(v));
    this.histories.set(v.id, history);
    return history;
  }

  /** Opens the other volumes of the group; those that cannot be used are left out. */
  private async candidates(group: VolumeGroup, own: CommitRecord): Promise<Candidate[]> {
    const found: Candidate[] = [];
    for (const volume of group.others) {
      try {
        const history = await this.open(volume);
        history.refuseGap();
        const points = new Map<bigint, CommitRecord>();
        const range = { sinceNs: own.instantNs - REACH_NS, untilNs: own.instantNs };
        for await (const c of new Timeline(history.sources).list(range)) points.set(c.instantNs, c);
        found.push({ volume, history, points });
      } catch (error) {
        if (!isKind(error, 'damaged')) throw error;
        this.left.push({ volume, why: error.message });
      }
    }
    return found;
  }

  /** What was claimed together with the chosen point by volumes that are of the group no more, as far as they say. */
  private async sharing(instantNs: bigint): Promise<SetMember[]> {
    const find = async (volume: VolumeMeta): Promise<SetMember[]> => {
      try {
        const history = await this.open(volume);
        history.refuseGap();
        const commit = await pointOf({ volume, history, points: new Map() }, instantNs);
        if (commit === undefined) return [];
        return [{ volume, history, commit, snapshot: undefined, reason: 'group' }];
      } catch (error) {
        // Nothing says that it should have a point of the instant.
        if (!isKind(error, 'damaged')) throw error;
        return [];
      }
    };
    // All at once: there may be many, far away. None is still opened when this settles.
    const found: SetMember[] = [];
    for (const one of await Promise.allSettled(this.kin.map(find))) {
      if (one.status === 'rejected') throw one.reason;
      found.push(...one.value);
    }
    return found;
  }

  private async best(
    history: VolumeHistory,
    own: ChosenPoint,
    others: readonly Candidate[],
  ): Promise<ChosenPoint> {
    const { when } = this;
    if (others.length === 0) return own;
    const timeline = new Timeline(history.sources);
    const { commit } = own;
    if (this.o.whole === true) {
      const instantNs =
        (await newestShared(history, others, commit.instantNs)) ??
        (await newestShared(history, others));
      const shared =
        instantNs === undefined ? undefined : (await timeline.before(instantNs))?.point;
      if (shared !== undefined) return { commit: shared, snapshot: undefined };
    }
    const isNamed =
      when.kind === 'point' ||
      own.snapshot !== undefined ||
      (when.kind === 'instant' && when.ns === commit.instantNs);
    if (isNamed) return own;
    const haveIt = (c: CommitRecord): number =>
      others.filter(({ points }) => points.has(c.instantNs)).length;
    let best = commit;
    let most = haveIt(commit);
    const range = {
      sinceNs: commit.instantNs - REACH_NS,
      untilNs: commit.instantNs,
      newestFirst: true,
    };
    for await (const c of timeline.list(range)) {
      if (most === others.length) break;
      if (c.seq >= commit.seq || haveIt(c) <= most) continue;
      best = c;
      most = haveIt(c);
    }
    return best === commit ? own : { commit: best, snapshot: undefined };
  }

  private async lackingOnes(
    lacking: readonly Candidate[],
    chosen: CommitRecord,
    history: VolumeHistory,
    others: readonly Candidate[],
  ): Promise<LeftOut[]> {
    if (lacking.length === 0) return [];
    const { volume, group, o } = this;
    const sharedNs = await newestShared(history, others, chosen.instantNs);
    const instead =
      sharedNs === undefined
        ? `No older instant was found that all of group ${group?.name} have.`
        : `The newest that all of group ${group?.name} have is ${distance(chosen.instantNs - sharedNs)} older: --at ${formatTimeNs(sharedNs)}.`;
    const left: LeftOut[] = [];
    for (const c of lacking) {
      const before = await new Timeline(c.history.sources).before(chosen.instantNs);
      const nearest =
        before === undefined
          ? 'and none before'
          : `its newest before that is #${before.point.seq}, ${distance(chosen.instantNs - before.point.instantNs)} older`;
      const [problem] = c.history.problems;
      const unread =
        problem === undefined
          ? ''
          : `; parts of its history cannot be read: ${problem.error.message}`;
      const why = `it has no point of the instant of ${volume.name} #${chosen.seq}, ${formatTimeLocal(chosen.instantNs)} (${nearest})${unread}`;
      left.push({ volume: c.volume, why });
      o.warn(
        `${c.volume.name} of group ${group?.name} is left out: ${why}`,
        before === undefined
          ? instead
          : `${instead} Or, of another instant: --with ${c.volume.name}.`,
      );
    }
    return left;
  }

  private tellPassedOver(newer: CommitRecord, members: readonly SetMember[]): void {
    const { volume, group, o } = this;
    const commit = members[0]?.commit ?? newer;
    const shared = members.filter((m) => m.reason === 'group').map((m) => m.volume.name);
    o.note(
      `${volume.name} has a newer point, #${newer.seq}, ${distance(newer.instantNs - commit.instantNs)} later, which not all of group ${group?.name} have; #${commit.seq} is one instant with ${shared.join(', ')}`,
    );
  }
}

/** The point of a candidate that has this very instant. */
async function pointOf(c: Candidate, instantNs: bigint): Promise<CommitRecord | undefined> {
  const near = c.points.get(instantNs);
  if (near !== undefined) return near;
  const before = await new Timeline(c.history.sources).before(instantNs);
  return before?.point.instantNs === instantNs ? before.point : undefined;
}

/** A time as long as that, for people. */
function distance(ns: bigint): string {
  return formatDuration(Number(ns) / 1e9);
}

/**
 * The newest instant, if given not after `untilNs`, of which all have a point, going back side by side; undefined if there is none, or too far back. Where
 * a clock was set some may be missed.
 */
async function newestShared(
  history: VolumeHistory,
  others: readonly Candidate[],
  untilNs?: bigint,
): Promise<bigint | undefined> {
  const streams = [history, ...others.map((c) => c.history)].map((h) =>
    new Timeline(h.sources).list({ untilNs, newestFirst: true }),
  );
  let looks = 0;
  const next = async (stream: AsyncGenerator<CommitRecord>): Promise<bigint | undefined> => {
    if (++looks > MOST_LOOKS) return undefined;
    const step = await stream.next();
    return step.done === true ? undefined : step.value.instantNs;
  };
  try {
    const heads = await Promise.all(streams.map(next));
    for (;;) {
      let leastNs: bigint | undefined;
      for (const head of heads) {
        if (head === undefined) return undefined;
        if (leastNs === undefined || head < leastNs) leastNs = head;
      }
      if (leastNs === undefined || heads.every((head) => head === leastNs)) return leastNs;
      for (const [i, stream] of streams.entries())
        if (heads[i] !== leastNs) heads[i] = await next(stream);
    }
  } finally {
    await Promise.all(streams.map((stream) => stream.return(undefined)));
  }
}
