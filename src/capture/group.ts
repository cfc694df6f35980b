/**
 * Groups: several devices that carry one file system, LVM group or database between them make points of one instant.
 *
 * Every device has a capture of its own (live-capture.ts), with its own cut, its own resync and its own volume. What they share is the
 * moment of the claim. A capture whose cut holds does not claim at once: it waits here until the cuts of all others hold as well. Then
 * the condition is the one of a single device (interval-cut.ts), over the blocks of all:
 *
 * - LO = the greatest LO of the members, HI = the least HI, on one clock;
 * - if LO < HI, and the events of every member are known up to LO, all claim the same instant, in one step without an await;
 * - if not, the members whose HI lies before LO read again what completed until then, while the others wait; if that does not do,
 *   all of them read again, at one time.
 *
 * So a file system's writes to two devices are in the points of both or, where they were not over, in none or in part, as after a
 * power cut that hits both at once. Members without changes take part with an empty point.
 *
 * **Nobody is held up by another**: a capture waits no longer than an attempt of its own may take, and much shorter while file systems
 * are frozen for its point. While a member is missing (its device
 * is gone, its changes have to be compared first, its repository is out) the group is *apart*: nobody waits, and everybody goes on with
 * points of its own. It is whole again by itself.
 *
 * **Restoring**: points of one instant belong together. They are made durable one volume after the other, so that a crash in
 * between, or a volume that takes no commits, leaves a point of an instant that other volumes lack: exact for that volume, and
 * none of the group. The instants of the group are those that all of its volumes have ({@link commonInstants}).
 *
 * One thread, no locks.
 */
import type { Clock } from '../clock.js';
import type { Decision } from './interval-cut.js';

/** What the group asks of a capture. Times are those of its own source. */
export interface GroupCut {
  /** Monotonic time that the times count from. */
  readonly originNs: bigint;
  /** False while it cannot say what changed, or its repository takes nothing. */
  isAble(): boolean;
  /** As `IntervalCut.decide`; undefined: it has lost track since it came to wait. Nothing may happen between this and `claim`. */
  decide(): Decision | undefined;
  /** Makes the point at an instant within what it has decided. */
  claim(instantNs: number): void;
  /** Wall time of an instant. */
  wallOf(sourceNs: number): bigint;
  /** The instant of the point that it has claimed last; −∞ before the first. */
  lastInstantNs(): number;
  /** Up to when it is known that nothing has changed since that instant; undefined: something has. */
  unchangedToNs(): number | undefined;
}

/**
 * What has happened since the last point that all devices have, until some time: nothing (`idle`), or something, of which the next
 * point is (`changed`); `unknown`: some do not know up to then yet.
 */
export type Since = 'idle' | 'unknown' | 'changed';

/**
 * What came of waiting for the others:
 * - `alone`: they do not come; claim for yourself, if the cut still holds;
 * - `again`: read what is due at `loNs`, and come again;
 * - `claimed`: it was claimed, for all.
 */
export type Meeting =
  | { readonly kind: 'alone' }
  | { readonly kind: 'again'; readonly loNs: number }
  | { readonly kind: 'claimed'; readonly instantNs: number; readonly wallNs: bigint };

export interface GroupState {
  readonly name: string;
  /** True if points are of one instant at present. */
  readonly isWhole: boolean;
  /** Devices that take no part. */
  readonly missing: readonly string[];
}

export interface PointGroupOptions {
  readonly name: string;
  /** Every device that belongs to it. */
  readonly devices: readonly string[];
  readonly clock: Clock;
  /** Hears when the group becomes whole, and when it falls apart after that. */
  readonly onChange?: (state: GroupState) => void;
}

/** How often somebody who waits for the others looks whether they are still to come. */
const WAIT_MS = 2;

interface Waiting {
  /** The events are known to be complete up to here: of a poll that has asked for lost ones. */
  readonly certainToNs: number;
  readonly over: AbortController;
  meeting: Meeting | undefined;
}

/** A capture in its group. `leave` it when the capture ends. */
export class GroupSeat {
  readonly cut: GroupCut;
  /** It makes a point and has not claimed it yet. */
  isTrying = false;
  waiting: Waiting | undefined;
  /** The instant of the last point that it has claimed together with all others. */
  sharedNs: number | undefined;
  private readonly group: PointGroup;

  constructor(group: PointGroup, cut: GroupCut) {
    this.group = group;
    this.cut = cut;
  }

  get name(): string {
    return this.group.name;
  }

  /** True while all are there: a point of this one is to be made together with the others. */
  get isWhole(): boolean {
    return this.group.look().isWhole;
  }

  /** `now`: another member waits for this one; `due`: the group has had no point since it became whole. */
  get call(): 'now' | 'due' | undefined {
    return this.group.callOf(this);
  }

  /** On all devices, until `atNs` of this one's source. Only while the group is whole. */
  since(atNs: number): Since {
    return this.group.since(this.cut.originNs + BigInt(Math.ceil(atNs)));
  }

  /** A point is begun: the others are called. */
  begin(): void {
    this.isTrying = true;
  }

  /** It was made, or given up. */
  end(): void {
    this.isTrying = false;
  }

  /**
   * To be called when the cut holds, right after a poll that has asked for lost events. Waits for the others until `endNs` of the
   * own source, asked for now and then, or `signal`.
   */
  meet(certainToNs: number, endNs: () => number, signal: AbortSignal): Promise<Meeting> {
    return this.group.meet(this, certainToNs, endNs, signal);
  }

  leave(): void {
    this.group.leave(this);
  }
}

/** See the file comment. */
export class PointGroup {
  readonly name: string;
  private readonly o: PointGroupOptions;
  private readonly seats = new Map<string, GroupSeat>();
  private wasWhole = false;
  private hasPoint = false;
  /** How often all have waited in vain since the last point. */
  private disagreed = 0;
  private isOver = false;

  constructor(options: PointGroupOptions) {
    this.name = options.name;
    this.o = options;
  }

  /** Every device that belongs to it. */
  get devices(): readonly string[] {
    return this.o.devices;
  }

  /** One capture a device: the one before must have left. */
  join(device: string, cut: GroupCut): GroupSeat {
    if (!this.o.devices.includes(device)) throw new RangeError(`${device} is not of the group`);
    if (this.seats.has(device)) throw new RangeError(`${device} is in the group already`);
    const seat = new GroupSeat(this, cut);
    this.seats.set(device, seat);
    return seat;
  }

  leave(seat: GroupSeat): void {
    for (const [device, s] of this.seats) if (s === seat) this.seats.delete(device);
  }

  /** The watch ends: that members leave is said no more. */
  close(): void {
    this.isOver = true;
  }

  /** As it is now; tells of what has changed since it was looked at last. */
  look(): GroupState {
    const missing = this.o.devices.filter((d) => this.seats.get(d)?.cut.isAble() !== true);
    const state = { name: this.name, isWhole: missing.length === 0, missing };
    if (state.isWhole !== this.wasWhole) {
      this.wasWhole = state.isWhole;
      this.hasPoint = false;
      if (!this.isOver) this.o.onChange?.(state);
    }
    return state;
  }

  callOf(seat: GroupSeat): 'now' | 'due' | undefined {
    if (!this.look().isWhole) return undefined;
    for (const s of this.seats.values()) if (s !== seat && s.isTrying) return 'now';
    return this.hasPoint ? undefined : 'due';
  }

  /** See {@link GroupSeat.since}; monotonic time. */
  since(monotonicNs: bigint): Since {
    let isKnown = true;
    for (const { cut, sharedNs } of this.seats.values()) {
      const toNs = cut.unchangedToNs();
      // Who has made a point alone since holds what the last one of all lacks.
      if (toNs === undefined || sharedNs === undefined || cut.lastInstantNs() !== sharedNs)
        return 'changed';
      if (cut.originNs + BigInt(Math.floor(toNs)) < monotonicNs) isKnown = false;
    }
    return isKnown ? 'idle' : 'unknown';
  }

  async meet(
    seat: GroupSeat,
    certainToNs: number,
    endNs: () => number,
    signal: AbortSignal,
  ): Promise<Meeting> {
    const { clock } = this.o;
    const over = new AbortController();
    const waiting: Waiting = { certainToNs, over, meeting: undefined };
    seat.waiting = waiting;
    const abort = (): void => over.abort();
    signal.addEventListener('abort', abort, { once: true });
    try {
      for (;;) {
        this.settle();
        if (waiting.meeting !== undefined) return waiting.meeting;
        const nowNs = Number(clock.monotonicNs() - seat.cut.originNs);
        if (signal.aborted || nowNs >= endNs() || !this.look().isWhole) return { kind: 'alone' };
        await clock.sleep(WAIT_MS, over.signal);
        if (waiting.meeting !== undefined) return waiting.meeting;
      }
    } finally {
      signal.removeEventListener('abort', abort);
      seat.waiting = undefined;
    }
  }

  /** Decides for all, if all wait. */
  private settle(): void {
    const all = [...this.seats.values()];
    const [first] = all;
    if (first === undefined || !this.look().isWhole) return;
    const parts = all.flatMap((seat) => {
      const { waiting, cut } = seat;
      if (waiting === undefined || waiting.meeting !== undefined) return [];
      return [{ seat, waiting, cut, decision: cut.decide() }];
    });
    if (parts.length !== all.length) return;
    // On one clock, in whole nanoseconds: numbers lose some of them after 104 days.
    let loNs: bigint | undefined;
    for (const { decision, cut } of parts) {
      if (decision === undefined || decision.kind === 'wait') continue;
      if (decision.loNs === Number.NEGATIVE_INFINITY) continue;
      const ownNs = cut.originNs + BigInt(Math.ceil(decision.loNs));
      if (loNs === undefined || ownNs > loNs) loNs = ownNs;
    }
    let instantNs: bigint | undefined;
    const inTheWay = parts.filter(({ waiting, decision, cut }) => {
      if (decision?.kind !== 'holds') return true;
      const certainNs = cut.originNs + BigInt(Math.floor(waiting.certainToNs));
      const hiNs =
        decision.hiNs === Number.POSITIVE_INFINITY
          ? undefined
          : cut.originNs + BigInt(Math.floor(decision.hiNs));
      if (loNs !== undefined && ((hiNs !== undefined && loNs >= hiNs) || certainNs < loNs))
        return true;
      for (const endNs of [certainNs, hiNs ?? certainNs])
        if (instantNs === undefined || endNs < instantNs) instantNs = endNs;
      return false;
    });
    if (inTheWay.length > 0 || instantNs === undefined) {
      // Blocks that are written all the time on several devices have to be read at one time: no use in reading them in turns.
      const isTogether = this.disagreed++ > 0;
      const limitNs = isTogether ? this.o.clock.monotonicNs() : loNs;
      for (const { waiting, decision, cut } of isTogether ? parts : inTheWay) {
        const ownNs =
          limitNs === undefined ? Number.NEGATIVE_INFINITY : Number(limitNs - cut.originNs);
        tell(waiting, decision === undefined ? { kind: 'alone' } : { kind: 'again', loNs: ownNs });
      }
      return;
    }
    const wallNs = first.cut.wallOf(Number(instantNs - first.cut.originNs));
    for (const { seat, waiting, cut } of parts) {
      // What an own time is rounded to lies between LO and HI as well, because those are such times.
      const ownNs = Number(instantNs - cut.originNs);
      cut.claim(ownNs);
      seat.isTrying = false;
      seat.sharedNs = cut.lastInstantNs();
      tell(waiting, { kind: 'claimed', instantNs: ownNs, wallNs });
    }
    this.hasPoint = true;
    this.disagreed = 0;
  }
}

function tell(waiting: Waiting, meeting: Meeting): void {
  waiting.meeting = meeting;
  waiting.over.abort();
}

/** What a person finds the points of a group by that belong together: `NAME@INSTANT`, in every volume of it. */
export function groupPointId(name: string, time: string): string {
  return `${name}@${time}`;
}

/**
 * The instants at which every volume of a group has a point, ascending, from the instants of the points of each (in any order).
 */
export function commonInstants(volumes: readonly (readonly bigint[])[]): bigint[] {
  const [first = [], ...others] = volumes;
  const sets = others.map((instants) => new Set(instants));
  return [...new Set(first)]
    .filter((instant) => sets.every((set) => set.has(instant)))
    .sort((a, b) => (a < b ? -1 : 1));
}
