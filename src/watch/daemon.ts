/**
 * Several watched devices in one process over one open repository. Each has a session of its own; one that fails ends no other. What
 * the sessions tell comes out of one place; requests (points by hand, compares) and changes of the settings go in at one.
 *
 * Life of a device here: its session is started; if that fails for a reason that can pass by itself, it is started again after a pause
 * that doubles from 5 s up to 5 minutes; otherwise it stays failed until the configuration is loaded again. The daemon ends when it is stopped, or
 * when every device has failed for good.
 */
import type { CapturedPoint } from '../capture/live-capture.js';
import type { Clock } from '../clock.js';
import { B2Error, ExitCode, isKind, messageOf } from '../errors.js';
import { PointClass } from '../format/commit.js';
import { formatTimeNs } from '../human.js';
import {
  classOf,
  type ControlHandler,
  type MemberPoint,
  type PointAnswer,
  type PointOrder,
} from './control.js';
import { deviceReport, pointReport, type DeviceReport, type WatchReport } from './report.js';
import type { WatchEvent, WatchSession, WatchStatus } from './types.js';

/** A device and how it is to be watched. Two with the same `key` need no new session. */
export interface WatchTarget {
  /** As the user named it; no two of one daemon are the same. */
  readonly device: string;
  /** Says everything that a running session cannot be told: volume, interval, source. */
  readonly key: string;
  /** Hooks quiesce an application: then class `app` is the best there is. */
  readonly hasHooks: boolean;
}

/** Finds what is to be watched, which may take a while: called when its turn comes. */
export type FindTargets<T> = () => Promise<readonly T[]>;

/** A point to be looked up and, with a name, pinned. */
export interface PinOrder {
  readonly volumeId: string;
  readonly volume: string;
  readonly point: CapturedPoint;
  /** Hash of its commit, in hex, where that is known already. */
  readonly hash: string | undefined;
  readonly name: string | undefined;
  readonly tags: readonly string[];
}

/** Names points in the repository. */
export interface Pinner {
  /** Refuses a name that is taken (`exists`) or cannot be one (`usage`), before anything is captured for it. */
  check(volumeId: string, name: string): Promise<void>;
  /** Hash of the point's commit, in hex; pinned under `name` if there is one. */
  pin(order: PinOrder): Promise<string>;
}

export interface DaemonOptions<T extends WatchTarget> {
  readonly startSession: (target: T, onEvent: (event: WatchEvent) => void) => WatchSession;
  readonly pinner: Pinner;
  readonly repository: { readonly url: string; readonly id: string };
  readonly clock: Clock;
  /** Hears of everything, at once; must not throw. */
  readonly onEvent: (event: WatchEvent) => void;
  /** Time for a last exact point when stopping. */
  readonly finalMs: number;
  /** First pause before a device that failed is tried again. Default 5000. */
  readonly retryMs?: number;
}

/** How the daemon ended. */
export interface DaemonEnd {
  /** Why: what {@link WatchDaemon.stop} was told, or that nothing was left to watch. */
  readonly reason: string;
  readonly devices: readonly DeviceReport[];
  /** Devices that had failed at the end. */
  readonly failed: readonly { readonly device: string; readonly error: B2Error }[];
}

const RETRY_MS = 5_000;
const MAX_RETRY_MS = 300_000;
/** As many as a session knows the hashes of. */
const SHARES_KEPT = 256;
/** The devices of a group make a point durable one after the other: so long it is waited for the last. */
const SHARE_MS = 30_000;
const SHARE_STEP_MS = 5;

/** One device, whichever session it has at present. */
interface Entry<T> {
  target: T;
  session: WatchSession;
  /** Why the session has ended by itself. */
  error: B2Error | undefined;
  /** It is started again by itself. */
  isRetrying: boolean;
  /** Ends the pause. */
  readonly removed: AbortController;
  /** Settles when nothing of this device goes on any more. */
  life: Promise<void>;
}

function asB2Error(error: unknown, device: string): B2Error {
  return error instanceof B2Error
    ? error
    : new B2Error('failed', `watching ${device}: ${messageOf(error)}`, { cause: error });
}

/** See {@link WatchDaemon.isReady}. A source that has to read the device before it can tell changes shows that as a scan. */
function isTakenUp(e: Entry<WatchTarget>): boolean {
  if (e.error !== undefined) return true;
  const { state, scan } = e.session.status();
  // Why it has failed is not known yet for a moment.
  if (state === 'failed') return false;
  return state !== 'starting' || scan !== undefined;
}

/** See the file comment. */
export class WatchDaemon<T extends WatchTarget> implements ControlHandler {
  /** Resolves when the daemon has ended; never rejects. */
  readonly done: Promise<DaemonEnd>;
  private readonly o: DaemonOptions<T>;
  private readonly since: string;
  private entries: Entry<T>[] = [];
  /** Totals of sessions that a change of settings or a failure has ended, by device. */
  private readonly earlier = new Map<string, { points: number; losses: number }>();
  /** The last problem that was told of each device. */
  private readonly problems = new Map<string, string>();
  /** The last points that each device of a group has made together with the others. */
  private readonly shares = new Map<string, CapturedPoint[]>();
  private stopReason: string | undefined;
  private finish: (end: DaemonEnd) => void = () => undefined;
  private wasReady = false;
  private changing: Promise<void> = Promise.resolve();

  constructor(options: DaemonOptions<T>) {
    this.o = options;
    this.since = formatTimeNs(options.clock.nowNs());
    this.done = new Promise((resolve) => {
      this.finish = resolve;
    });
  }

  /** Starts the sessions. To be called once, or {@link startFound} instead. */
  start(targets: readonly T[]): void {
    for (const target of targets) this.add(target);
  }

  /**
   * Starts the sessions of what is found. What is asked to be applied meanwhile has its turn after that; stopped meanwhile, none is
   * started. Rejects as `find` does.
   */
  startFound(find: FindTargets<T>): Promise<void> {
    return this.inTurn(async () => {
      const targets = await find();
      if (!this.stopping) this.start(targets);
    });
  }

  /** Changes of what is watched come one after the other, as they were asked for. */
  private inTurn(change: () => Promise<void>): Promise<void> {
    const turn = this.changing.then(change);
    this.changing = turn.catch(() => undefined);
    return turn;
  }

  /**
   * True once every device has been taken up: its changes are captured, even if all of it has yet to be read, or it waits for
   * something that only a person can bring (the device, the repository), or has failed; not all of them failed for good.
   */
  get isReady(): boolean {
    this.wasReady ||= this.entries.length > 0 && this.isAnyLeft && this.entries.every(isTakenUp);
    return this.wasReady;
  }

  private get isAnyLeft(): boolean {
    return this.entries.some((e) => this.holdsOn(e));
  }

  /** Whether the daemon lives for this device: it is watched, or its own failure says that it passes. */
  private holdsOn(e: Entry<T>): boolean {
    return e.error === undefined || (e.isRetrying && e.error.retryable);
  }

  get stopping(): boolean {
    return this.stopReason !== undefined;
  }

  status(): WatchReport {
    return {
      pid: process.pid,
      repository: this.o.repository.url,
      repositoryId: this.o.repository.id,
      since: this.since,
      stopping: this.stopping,
      devices: this.entries.map((e) => this.reportOf(e)),
    };
  }

  /**
   * A durable point of one device now, pinned if it is given a name; see {@link PointOrder}. Of a device of a group: the point of that
   * instant of each other device as well, pinned under the same name.
   */
  async point(order: PointOrder, signal: AbortSignal): Promise<PointAnswer> {
    const entry = this.find(order.volume);
    const members = this.othersOf(entry);
    if (order.name !== undefined)
      for (const e of [entry, ...members]) {
        const { volumeId } = e.session.status();
        if (volumeId !== undefined) await this.o.pinner.check(volumeId, order.name);
      }
    const { point, note } = await this.bestPoint(entry, order, signal);
    const { sizeBytes, unreadable } = entry.session.status();
    const pinned = await this.pin(entry, point, order);
    const group = await this.shared(entry, point, order, signal);
    return {
      ...pinned,
      sizeBytes,
      ...(order.name === undefined ? {} : { name: order.name }),
      ...(note === undefined ? {} : { note }),
      ...(point.pointClass === PointClass.fuzzy ? { unreadable: unreadable.ranges } : {}),
      ...(group === undefined ? {} : { group }),
    };
  }

  private async pin(e: Entry<T>, point: CapturedPoint, order: PointOrder): Promise<MemberPoint> {
    const { volume, volumeId, device, sizeBytes } = e.session.status();
    if (volume === undefined || volumeId === undefined)
      throw new B2Error('failed', `${device} has a point but no volume`);
    const { name, tags } = order;
    const known = e.session.hashOf(point.seq);
    const hash = await this.o.pinner.pin({ volumeId, volume, point, hash: known, name, tags });
    return { volume, volumeId, device, sizeBytes, point: pointReport(point), hash };
  }

  /** The other devices of its group that are watched. */
  private othersOf(entry: Entry<T>): readonly Entry<T>[] {
    const name = entry.session.status().group?.name;
    if (name === undefined) return [];
    return this.entries.filter((e) => e !== entry && e.session.status().group?.name === name);
  }

  /** Looks up, and pins, what the other devices of the group have of the point's instant: each has it durable a moment later. */
  private async shared(
    entry: Entry<T>,
    point: CapturedPoint,
    order: PointOrder,
    signal: AbortSignal,
  ): Promise<PointAnswer['group']> {
    const { group } = entry.session.status();
    if (group === undefined) return undefined;
    const missing = new Set(group.missing);
    const others: MemberPoint[] = [];
    for (const e of this.othersOf(entry)) {
      const theirs =
        point.group === undefined ? undefined : await this.pointOf(e, point.instantNs, signal);
      if (theirs === undefined) missing.add(e.target.device);
      else others.push(await this.pin(e, theirs, order));
    }
    return { name: group.name, missing: [...missing], others };
  }

  /** The point that a device made of an instant that it shares, if it makes it durable in time. */
  private async pointOf(
    e: Entry<T>,
    instantNs: bigint,
    signal: AbortSignal,
  ): Promise<CapturedPoint | undefined> {
    const { device } = e.target;
    const found = (): CapturedPoint | undefined =>
      this.shares.get(device)?.find((p) => p.instantNs === instantNs);
    for (let waitedMs = 0; waitedMs < SHARE_MS; waitedMs += SHARE_STEP_MS) {
      const point = found();
      // It would have been told by now: points of a device come in the order of their instants.
      const newest = this.shares.get(device)?.at(-1);
      if (point !== undefined || (newest !== undefined && newest.instantNs > instantNs))
        return point;
      if (signal.aborted || e.error !== undefined || this.stopping) break;
      await this.o.clock.sleep(SHARE_STEP_MS, signal);
    }
    return found();
  }

  resync(volume: string): { readonly volume: string } {
    const { session } = this.find(volume);
    session.resync();
    const { volume: name, device } = session.status();
    return { volume: name ?? device };
  }

  /**
   * Watches what is found from now on: new devices are started, others stopped with a last point, those with another key stopped and
   * started, failed ones tried again. Resolves with what was done, in words. Where several ask, what was asked for last is looked for
   * last, and counts. Rejects as `find` does; then nothing is changed.
   */
  async apply(find: FindTargets<T>): Promise<readonly string[]> {
    const done: string[] = [];
    await this.inTurn(async () => {
      if (this.stopping) return;
      const targets = await find();
      if (this.stopping) return;
      const wanted = new Map(targets.map((t) => [t.device, t]));
      const gone = this.entries.filter((e) => !wanted.has(e.target.device));
      const changed = this.entries.filter((e) => {
        const target = wanted.get(e.target.device);
        return target !== undefined && (target.key !== e.target.key || e.error !== undefined);
      });
      for (const e of this.entries) e.target = wanted.get(e.target.device) ?? e.target;
      await Promise.all([...gone, ...changed].map((e) => this.remove(e)));
      for (const e of gone) done.push(`${e.target.device} is not watched any more`);
      if (this.stopping) return;
      for (const target of targets) {
        if (this.entries.some((e) => e.target.device === target.device)) continue;
        const isNew = !changed.some((e) => e.target.device === target.device);
        done.push(`${target.device} is ${isNew ? 'watched from now on' : 'started again'}`);
        this.add(target);
      }
      this.check();
    });
    return done;
  }

  /** Tries for a last exact point of every device and ends. Only the first call counts. */
  stop(reason: string): void {
    if (this.stopping) return;
    this.stopReason = reason;
    void this.changing
      .then(() => Promise.all(this.entries.map((e) => this.end(e))))
      .then(() => this.finishNow(reason));
  }

  private find(text: string): Entry<T> {
    if (this.stopping)
      throw new B2Error('interrupted', 'the watch is being stopped', {
        hint: 'Ask again when it runs.',
      });
    const found =
      this.entries.find((e) => {
        const s = e.session.status();
        return s.volumeId === text || s.volume === text || s.device === text;
      }) ?? this.entries.find((e) => e.target.device === text);
    if (found === undefined)
      throw new B2Error('not-found', `this watch has no device or volume "${text}"`, {
        hint: '"b2 status" lists what is watched.',
      });
    if (found.error !== undefined)
      throw new B2Error('failed', `${text} is not captured at present: ${found.error.message}`, {
        cause: found.error,
        ...(found.error.hint === undefined ? {} : { hint: found.error.hint }),
      });
    return found;
  }

  private async bestPoint(
    entry: Entry<T>,
    order: PointOrder,
    signal: AbortSignal,
  ): Promise<{ readonly point: CapturedPoint; readonly note: string | undefined }> {
    const { session } = entry;
    if (order.class !== undefined)
      return {
        point: await session.point({ pointClass: classOf(order.class), signal }),
        note: undefined,
      };
    let note: string | undefined;
    const better = entry.target.hasHooks ? [PointClass.app, PointClass.fs] : [PointClass.fs];
    for (const pointClass of better) {
      try {
        return { point: await session.point({ pointClass, signal }), note };
      } catch (error) {
        if (signal.aborted || isKind(error, 'interrupted')) throw error;
        note ??= messageOf(error);
      }
    }
    try {
      return { point: await session.point({ pointClass: PointClass.crash, signal }), note };
    } catch (error) {
      // Of a device that cannot be read everywhere there is no better one.
      const isUnreadable = session.status().unreadable.bytes > 0;
      if (signal.aborted || isKind(error, 'interrupted') || !isUnreadable) throw error;
      note = messageOf(error);
    }
    return { point: await session.point({ pointClass: PointClass.fuzzy, signal }), note };
  }

  private reportOf(e: Entry<T>): DeviceReport {
    const status: WatchStatus = e.session.status();
    const before = this.earlier.get(e.target.device);
    return deviceReport({
      ...status,
      ...(e.error === undefined ? {} : { state: 'failed' as const, lagMs: undefined }),
      points: status.points + (before?.points ?? 0),
      losses: status.losses + (before?.losses ?? 0),
      lastProblem:
        status.lastProblem ??
        (e.error === undefined
          ? undefined
          : { atNs: this.o.clock.nowNs(), message: e.error.message, hint: e.error.hint }),
    });
  }

  private tell(event: WatchEvent): void {
    if (event.type === 'problem') this.problems.set(event.device, event.problem.message);
    if (event.type === 'point' && event.point.group !== undefined) {
      const shares = this.shares.get(event.device) ?? [];
      shares.push(event.point);
      if (shares.length > SHARES_KEPT) shares.shift();
      this.shares.set(event.device, shares);
    }
    this.o.onEvent(event);
  }

  private add(target: T): void {
    const entry: Entry<T> = {
      target,
      session: this.startSession(target),
      error: undefined,
      isRetrying: false,
      removed: new AbortController(),
      life: Promise.resolve(),
    };
    this.entries.push(entry);
    entry.life = this.live(entry);
  }

  private startSession(target: T): WatchSession {
    return this.o.startSession(target, (event) => this.tell(event));
  }

  /** Follows a device until it is removed or has failed for good. */
  private async live(e: Entry<T>): Promise<void> {
    const { signal } = e.removed;
    let pauseMs = this.o.retryMs ?? RETRY_MS;
    for (;;) {
      const { session } = e;
      session.ready.then(
        () => {
          if (e.session === session) pauseMs = this.o.retryMs ?? RETRY_MS;
        },
        () => undefined, // `done` tells
      );
      try {
        await session.done;
        return;
      } catch (error) {
        e.error = asB2Error(error, e.target.device);
      }
      e.isRetrying = this.isWorthRetrying(e, e.error) && !signal.aborted && !this.stopping;
      const { message, hint } = e.error;
      if (this.problems.get(e.target.device) !== message)
        this.tell({
          type: 'problem',
          device: e.target.device,
          problem: { atNs: this.o.clock.nowNs(), message, hint },
        });
      if (e.isRetrying)
        this.tell({
          type: 'notice',
          device: e.target.device,
          message: `${e.target.device} is tried again in ${Math.round(pauseMs / 1000)} s`,
        });
      if (!e.isRetrying) {
        this.check();
        return;
      }
      this.check();
      await this.o.clock.sleep(pauseMs, signal);
      if (signal.aborted || this.stopping) return;
      pauseMs = Math.min(2 * pauseMs, MAX_RETRY_MS);
      this.remember(e);
      e.error = undefined;
      e.isRetrying = false;
      e.session = this.startSession(e.target);
    }
  }

  /**
   * Whether a device that failed is started again by itself. What a failed read or a full store did to one of several devices
   * may pass, and systemd starts a unit anew only when all of it has ended: so it is tried as long as another is watched. Of
   * one alone, or of all, the process ends and says so.
   */
  private isWorthRetrying(e: Entry<T>, error: B2Error): boolean {
    if (error.retryable) return true;
    return isKind(error, 'io', 'no-space') && this.entries.some((o) => o !== e && this.holdsOn(o));
  }

  private remember(e: Entry<T>): void {
    const { points, losses } = e.session.status();
    const before = this.earlier.get(e.target.device);
    this.earlier.set(e.target.device, {
      points: points + (before?.points ?? 0),
      losses: losses + (before?.losses ?? 0),
    });
  }

  /** Stops what goes on with a device; it stays in the list. */
  private async end(e: Entry<T>): Promise<void> {
    e.removed.abort();
    if (e.error === undefined) {
      try {
        await e.session.stop(this.o.finalMs);
      } catch (error) {
        e.error ??= asB2Error(error, e.target.device);
      }
    }
    await e.life;
  }

  private async remove(e: Entry<T>): Promise<void> {
    await this.end(e);
    this.remember(e);
    this.entries = this.entries.filter((other) => other !== e);
  }

  /** Looks whether anything is left to do. */
  private check(): void {
    if (!this.isAnyLeft && this.entries.length > 0 && !this.stopping) {
      const reason = 'no device is left to watch';
      this.stopReason = reason;
      this.finishNow(reason);
    }
  }

  private finishNow(reason: string): void {
    this.finish({
      reason,
      devices: this.entries.map((e) => this.reportOf(e)),
      failed: this.entries.flatMap((e) =>
        e.error === undefined ? [] : [{ device: e.target.device, error: e.error }],
      ),
    });
  }
}

/**
 * The exit code of an end, and what to throw instead where all failed: one device's own error, or one that names all.
 */
export function outcomeOf(end: DaemonEnd): { readonly code: ExitCode } {
  const { failed, devices } = end;
  const [first] = failed;
  if (first === undefined) return { code: ExitCode.ok };
  if (failed.length < devices.length) return { code: ExitCode.partial };
  if (devices.length === 1) throw first.error;
  throw new B2Error(
    'failed',
    `none of the ${devices.length} devices could be watched: ${failed.map((f) => `${f.device}: ${f.error.message}`).join('; ')}`,
    first.error.hint === undefined ? {} : { hint: first.error.hint },
  );
}
