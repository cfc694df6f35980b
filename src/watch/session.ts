/**
 * One watched device, from its opening to a clean stop.
 *
 * A session is a row of **captures**: one lasts as long as the device stays the same. When the device is resized, goes away and comes
 * back, or cannot be read for a moment, the capture ends and the next one begins by comparing the whole device with what the
 * repository holds; the time in between is recorded as `unknown` by its first point. What a session adds to capture:
 *
 * - **Which device is it?** A device that comes back, or a volume that exists already, is captured only if nothing contradicts that they belong
 *   together (identity.ts). At the start the person is asked to say so (`acceptDevice`), later the session waits for the right one.
 * - **Clean stops.** When everything was captured and nothing has been written after that, stop leaves a record by which the next session
 *   begins without reading the device (state.ts). How it is proved: capture has ended and has nothing left to do; then the
 *   write counters are taken, with nothing in flight; then the source is polled until it has delivered everything up to after that,
 *   and delivers nothing. So whatever completed before the counters were read was captured, and whatever completes later changes them.
 *   The next session opens its source first, reads the counters after that, and only then believes them: nothing completed while
 *   nobody watched. The record goes before capture begins.
 * - **A repository on the watched device** is refused. Every commit would be a change to the device that has to be committed too, the bytes
 *   of the last commit again in each that follows, at one a second until the disk is full; a longer interval only makes it slower. The blocks cannot
 *   be left out either: a point is the state of all of them. A repository elsewhere on the same disk works, and is no protection against
 *   its loss: that is said once.
 * - **Clocks.** Points carry what the machine's clock showed, also when it is put back: the timeline (src/repo/timeline.ts) finds each by the time it
 *   was listed with and says where a time was passed twice. Changing instants would make points lie about their time for as long as the clock
 *   had been ahead. The session says that the clock was put back or forward.
 *
 * While the repository takes no commits the capture goes on and remembers what changed; the session says so once, and once more when it is over.
 */
import { defaultVolumeName, volumeFor } from '../capture/snapshot.js';
import {
  BAD_RETRY_MS,
  LiveCapture,
  type CapturedPoint,
  type CaptureEvent,
  type CaptureSink,
  type CaptureStatus,
} from '../capture/live-capture.js';
import type { PointGroup } from '../capture/group.js';
import type { Freeze } from '../capture/freeze/index.js';
import { RunScanner } from '../capture/baseline.js';
import { WriterSink } from '../capture/writer-sink.js';
import type { ChangeSink } from '../devices/change-source.js';
import {
  chooseSource,
  SCAN_COST,
  type ChosenSource,
  type SourceChoice,
} from '../devices/choose-source.js';
import type { ByteRange, DeviceFacts, ReadDevice } from '../devices/device.js';
import { placeOf } from '../devices/in-use.js';
import { inspectDevice, type DeviceContents } from '../devices/inspect.js';
import { openReadDevice } from '../devices/open.js';
import type { DeviceStamp } from '../devices/stamp.js';
import { SYSTEM_ROOTS, type SystemRoots } from '../devices/sysfs.js';
import { B2Error, ExitCode, isKind, messageOf } from '../errors.js';
import { Coverage, PointClass, className } from '../format/commit.js';
import { formatBytes, formatDuration, formatTimeLocal } from '../human.js';
import type { Catalogue } from '../repo/catalogue.js';
import { VolumeHistory } from '../repo/history.js';
import { openImage } from '../repo/point.js';
import type { GroupFacts } from '../repo/point-set.js';
import type { Repository } from '../repo/repository.js';
import { Timeline } from '../repo/timeline.js';
import { writeVolumeMeta, type VolumeMeta } from '../repo/volume.js';
import { VolumeWriter } from '../repo/volume-writer.js';
import { BLOCK_BYTES } from '../units.js';
import {
  compareDevices,
  deviceContents,
  imageContents,
  isReleasing,
  presenceOf,
  type IdentityVerdict,
  type KnownDevice,
  type Presence,
} from './identity.js';
import { lastingName, lastingNameOf } from './by-id.js';
import { MeteredSink, MeteredSource, meteredDevice, Rates, type Totals } from './meter.js';
import {
  defaultStateDir,
  fullStamp,
  readCleanStop,
  removeCleanStop,
  whyNotInSync,
  writeCleanStop,
  type CleanStop,
} from './state.js';
import type {
  PointRequest,
  WatchEvent,
  WatchProblem,
  WatchSession,
  WatchState,
  WatchStatus,
} from './types.js';

/** Makes a point of class `fs` or `app`: freezes (and runs hooks), asks `capture` for a point of that class, and thaws. */
export type Quiesce = (
  request: PointRequest,
  at: {
    readonly device: ReadDevice;
    readonly capture: LiveCapture;
    readonly onFreeze: (freeze: Freeze) => void;
  },
) => Promise<CapturedPoint>;

/** What a session asks of the machine; the real one by default, simulated ones in tests. */
export interface SessionHost {
  open(path: string): Promise<ReadDevice>;
  choose(device: ReadDevice, choice: SourceChoice, signal: AbortSignal): Promise<ChosenSource>;
  presence(facts: DeviceFacts, wasReleasing: boolean): Promise<Presence>;
  stamp(facts: DeviceFacts): Promise<DeviceStamp>;
  /** How the repository lies to the device. */
  placeOfRepository(device: string): Promise<'on' | 'beside' | 'apart'>;
}

export interface SessionOptions {
  /** Path of a device or image file, as the user gave it. */
  readonly device: string;
  /** Name of the volume; default: the one that was captured from this device of this host before, else HOST/DEVICE. */
  readonly volume?: string | undefined;
  /**
   * Open; sessions of one process share it. The caller closes it after every session has ended. Clock and randomness are those of its
   * environment.
   */
  readonly repo: Repository;
  readonly host: string;
  /** Hears of everything, at once; must not throw. */
  readonly onEvent: (event: WatchEvent) => void;
  /** Default `auto`. */
  readonly source?: SourceChoice;
  /** Time between points while there are writes. Default 1000. */
  readonly intervalMs?: number;
  /** See {@link LiveCaptureOptions.stageBytes}. */
  readonly stageBytes?: number;
  /** See {@link LiveCaptureOptions.pollMs}. */
  readonly pollMs?: number;
  /** See {@link LiveCaptureOptions.retryMs}. */
  readonly retryMs?: number;
  /** See {@link LiveCaptureOptions.badRetryMs}. */
  readonly badRetryMs?: number;
  /** Where lasting names of disks are; default /dev/disk/by-id. */
  readonly byIdDir?: string | undefined;
  /** How often to look whether the device is still there, and for a device that has gone. Default 1000. */
  readonly probeMs?: number;
  /** See {@link ScanSourceOptions.scanIntervalMs}. */
  readonly scanIntervalMs?: number;
  /** Write to a volume that another host has written. */
  readonly takeOver?: boolean;
  /** A device that is missing at the start is waited for, as one that has gone is; else the session ends with `not-found`. */
  readonly waitForDevice?: boolean;
  /** Asked before the volume is claimed; rejects (`held`) if another process captures this device or volume to this repository. */
  readonly refuseHeld?: (at: {
    readonly volumeId: string;
    readonly volume: string;
    readonly realPath: string;
  }) => Promise<void>;
  /** At the start: go on with a volume although the device shows another identity than the volume recorded (it was replaced on purpose). */
  readonly acceptDevice?: boolean;
  /** Directory of the records of clean stops; made if it is missing. Default {@link defaultStateDir} of this process. */
  readonly stateDir?: string | undefined;
  /**
   * Threads that read and store in a first scan or a resync; 0: this thread does it all. Default 2 for a repository in a directory, 0 for
   * stores that live in this thread.
   */
  readonly workers?: number;
  /** Where the local copy of the index of chunks is kept; see `dedupeCacheFile` of src/capture/snapshot.ts. */
  readonly dedupeCacheFile?: string | undefined;
  /** Remembers now and then what this machine has seen acknowledged. */
  readonly catalogue?: Pick<Catalogue, 'recordTip'> | undefined;
  /** The group that this device makes its points with; it must know the device by this name. */
  readonly group?: PointGroup | undefined;
  /** Without it only points of class `crash` can be had. */
  readonly quiesce?: Quiesce | undefined;
  /**
   * Asked now and then: the time without an exact point, because writes outrun the reader, after which a point of class `fs` is made
   * unasked; undefined: none ever is.
   */
  readonly freezeAfterMs?: (() => number | undefined) | undefined;
  readonly roots?: SystemRoots;
  /** Parts of the machine to replace. */
  readonly machine?: Partial<SessionHost>;
}

/** Why a capture ended. */
type End =
  | { readonly kind: 'stop' }
  /** Capture itself has ended. */
  | { readonly kind: 'ended'; readonly error: unknown }
  | { readonly kind: 'resized'; readonly sizeBytes: number }
  | { readonly kind: 'gone'; readonly why: string };

interface Tip {
  readonly seq: number;
  readonly hash: string | undefined;
}

const PROBE_MS = 1000;
const RATES_MS = 10_000;
const WORKERS = 2;
/** Failed reads of a device that is still there, without a point in between. */
const MAX_READ_FAILURES = 3;
/** Pause after the first; each further one doubles it. In probes. */
const READ_RETRY_PROBES = 2;
/** A clock moved by more than this against the monotonic one was set. */
const CLOCK_STEP_MS = 2000;
/** The catalogue is a file, perhaps on the watched device: each entry is a write that makes a point. */
const CATALOGUE_MS = 60_000;
const PROOF_MS = 2000;
const PROOF_PAUSE_MS = 5;
const MAX_OUTAGE_PAUSE_MS = 16_000;
const HASHES_KEPT = 256;
const NOTHING_UNREADABLE = { bytes: 0, ranges: [] };
/** After a freeze that was in vain the next one is this many times later each time, at most so much. */
const FREEZE_PAUSE_FACTOR = 2;
const MAX_FREEZE_PAUSE_MS = 300_000;
/** A point that somebody asked for must come about within so long, of a device that is captured and a repository that takes it. */
const POINT_LIMIT_MS = 120_000;

/** Starts to watch a device. Never throws: what goes wrong rejects `done` (and `ready`, if it comes before the first point). */
export function startSession(options: SessionOptions): WatchSession {
  return new Session(options);
}

interface Deferred<T> {
  readonly promise: Promise<T>;
  readonly resolve: (value: T) => void;
  readonly reject: (error: unknown) => void;
}

function deferred<T>(): Deferred<T> {
  let resolve: (value: T) => void = () => undefined;
  let reject: (error: unknown) => void = () => undefined;
  const promise = new Promise<T>((yes, no) => {
    resolve = yes;
    reject = no;
  });
  // Whoever wants it learns of it by awaiting it, perhaps much later.
  promise.catch(() => undefined);
  return { promise, resolve, reject };
}

class Session implements WatchSession {
  readonly done: Promise<void>;
  private readonly o: SessionOptions;
  private readonly machine: SessionHost;
  private readonly stateDir: string;
  private readonly becomeReady = deferred<void>();
  /** Ends waits and whatever can be given up; a capture gets its last point first. */
  private readonly abort = new AbortController();
  private readonly stopCalled = deferred<void>();
  private finalMs = 0;
  private choice: SourceChoice;
  /** Why `choice` is not what was asked for any more. */
  private fellBack: string | undefined;
  private state: WatchState = 'starting';
  private volume: VolumeMeta | undefined;
  /** As the session has last seen the device open. */
  private known: KnownDevice | undefined;
  private facts: DeviceFacts | undefined;
  private source: ChosenSource | undefined;
  private capture: LiveCapture | undefined;
  private device: ReadDevice | undefined;
  /** A claim that the sink has not taken yet. */
  private writer: VolumeWriter | undefined;
  /** The writer that the sink has. */
  private current: VolumeWriter | undefined;
  /** Epochs under which this session has written. */
  private readonly epochs = new Set<number>();
  private tip: Tip | undefined;
  /** The volume had an exact point, before this session or in it. */
  private hasPoint = false;
  private hasCommitted = false;
  private readonly hashes = new Map<number, string>();
  private lastPoint: CapturedPoint | undefined;
  /** Of captures that have ended. */
  private pointsBefore = 0;
  private lossesBefore = 0;
  private readFailures = 0;
  /** What was found at the device's path and is another one. */
  private refused: { readonly medium: string; readonly error: B2Error } | undefined;
  private readonly totals: Totals = { changedBytes: 0, capturedBytes: 0, storedBytes: 0 };
  private readonly rates = new Rates(RATES_MS);
  private lastProblem: WatchProblem | undefined;
  private outageKind: B2Error['kind'] | undefined;
  private isCoalescing = false;
  /** The cut has not held since the last point: what is read changes while it is read. */
  private isOutrun = false;
  private freezes = { count: 0, longestMs: 0 };
  /** A point that is being made unasked, and when the next may be. */
  private relieving: Promise<void> | undefined;
  private relieveFromNs = 0n;
  private relievePauseMs = 0;
  private isRelieved = false;
  private toldUnreadable = 0;
  private unreadableNow: WatchStatus['unreadable'] = NOTHING_UNREADABLE;
  /** Of a source that reads the device before it can watch it. */
  private openedBytes = 0;
  /** What the volume's meta object must say; undefined when it says so. */
  private metaDue: { readonly contents: DeviceContents | undefined } | undefined;
  private metaWrite: Promise<void> | undefined;
  private catalogued: { readonly seq: number; readonly atNs: bigint } | undefined;
  private catalogueWrite: Promise<void> | undefined;
  private clockOffsetNs: bigint | undefined;

  constructor(options: SessionOptions) {
    this.o = options;
    const { repo, roots = SYSTEM_ROOTS } = options;
    this.choice = options.source ?? 'auto';
    this.stateDir = options.stateDir ?? defaultStateDir(process.env, process.geteuid?.());
    this.machine = {
      open: (path) => openReadDevice(path, roots),
      choose: (device, choice, signal) =>
        chooseSource(device, choice, {
          clock: repo.env.clock,
          random: repo.env.random,
          signal,
          ...(options.scanIntervalMs === undefined
            ? {}
            : { scanIntervalMs: options.scanIntervalMs }),
        }),
      presence: (facts, wasReleasing) => presenceOf(facts, wasReleasing, roots),
      stamp: (facts) => fullStamp(facts, roots),
      // A store over a network has no place here.
      placeOfRepository: (device) =>
        isLocal(repo.store.url) ? placeOf(repo.store.url, device, roots) : Promise.resolve('apart'),
      ...options.machine,
    };
    this.done = this.run();
    this.done.catch(() => undefined);
  }

  get ready(): Promise<void> {
    return this.becomeReady.promise;
  }

  private get clock(): Repository['env']['clock'] {
    return this.o.repo.env.clock;
  }

  private get probeMs(): number {
    return this.o.probeMs ?? PROBE_MS;
  }

  private get isStopping(): boolean {
    return this.abort.signal.aborted;
  }

  // What others ask.

  status(): WatchStatus {
    const c = this.capture?.status();
    // What cannot be read may have been written, and is in no point.
    const isKnown = c !== undefined && !c.needsResync && !hasUnreadable(c);
    return {
      device: this.o.device,
      volume: this.volume?.name,
      volumeId: this.volume?.id,
      state: this.state,
      sizeBytes: this.facts?.sizeBytes ?? 0,
      source:
        this.source === undefined
          ? undefined
          : {
              kind: this.source.source.kind,
              why: this.source.why,
              isFallback: this.source.isFallback,
            },
      lagMs: isKnown ? c.lagMs : undefined,
      lastPoint: this.lastPoint,
      points: this.pointsBefore + (c?.points ?? 0),
      scan: this.scanOf(c),
      changedBytesPerSecond: this.rates.of(0),
      capturedBytesPerSecond: this.rates.of(1),
      storedBytesPerSecond: this.rates.of(2),
      pendingBytes: (c?.pendingBlocks ?? 0) * BLOCK_BYTES,
      stagedBytes: (c?.stagedBlocks ?? 0) * BLOCK_BYTES,
      memoryBytes: c?.memoryBytes ?? 0,
      losses: this.lossesBefore + (c?.losses ?? 0),
      lastProblem: this.lastProblem,
      unreadable: this.unreadableNow,
      freezes: this.freezes,
      group: this.o.group?.look(),
    };
  }

  private scanOf(c: CaptureStatus | undefined): WatchStatus['scan'] {
    if (c !== undefined) return c.scan;
    const totalBytes = this.facts?.sizeBytes;
    return this.openedBytes > 0 && totalBytes !== undefined
      ? { doneBytes: Math.min(this.openedBytes, totalBytes), totalBytes }
      : undefined;
  }

  async point(request: PointRequest): Promise<CapturedPoint> {
    const { capture, device } = this;
    const path = this.o.device;
    if (this.isStopping || this.state === 'stopped' || this.state === 'failed')
      throw new B2Error('interrupted', `${path} is not watched any more`);
    if (capture === undefined || device === undefined) {
      throw new B2Error(
        'failed',
        this.state === 'absent'
          ? `there can be no point of ${path} now: the device is not there`
          : `there can be no point of ${path} yet: the watch of it is only starting`,
        { retryable: true, hint: 'Ask again when "b2 status" says that it is captured.' },
      );
    }
    if (request.pointClass <= PointClass.crash)
      return this.crashPoint(capture, request.pointClass, request.signal);
    const scan = capture.status().needsResync ? capture.status().scan : undefined;
    if (scan !== undefined) {
      throw new B2Error(
        'failed',
        `there can be no point of class ${className(request.pointClass)} of ${path} now: ${formatBytes(scan.totalBytes - scan.doneBytes)} of it have to be read first`,
        { retryable: true, hint: '"b2 status" shows how far that is.' },
      );
    }
    if (this.o.quiesce === undefined) {
      throw new B2Error(
        'unsupported',
        `this watch makes no points of class ${className(request.pointClass)} of ${path}`,
        { hint: 'Points of class crash are exact too; the file systems replay their journals.' },
      );
    }
    return this.o.quiesce(request, {
      device,
      capture,
      onFreeze: (freeze) => this.frozen(freeze, false),
    });
  }

  /** As {@link LiveCapture.point}, but not for ever: writers that never pause can keep the cut from holding. */
  private async crashPoint(
    capture: LiveCapture,
    pointClass: PointClass,
    signal?: AbortSignal,
  ): Promise<CapturedPoint> {
    const giveUp = new AbortController();
    const abort = (): void => giveUp.abort();
    if (signal?.aborted === true) abort();
    signal?.addEventListener('abort', abort, { once: true });
    const over = new AbortController();
    const pauseMs = Math.min(1000, this.probeMs);
    let isTimeUp = false;
    const limit = async (): Promise<void> => {
      for (let waitedMs = 0; waitedMs < POINT_LIMIT_MS;) {
        await this.clock.sleep(pauseMs, over.signal);
        if (over.signal.aborted) return;
        const { needsResync, outage } = capture.status();
        // Those have an end of their own, which is shown.
        if (!needsResync && outage === undefined) waitedMs += pauseMs;
      }
      isTimeUp = true;
      abort();
    };
    void limit();
    try {
      return await capture.point(pointClass, giveUp.signal);
    } catch (error) {
      if (!isTimeUp || signal?.aborted === true) throw error;
      const { pendingBlocks } = capture.status();
      throw new B2Error(
        'failed',
        `there is no exact point of ${this.o.device} after ${POINT_LIMIT_MS / 1000} s: ${formatBytes(pendingBlocks * BLOCK_BYTES)} of changes are still to be read, and more come faster than that`,
        {
          retryable: true,
          cause: error,
          hint: 'Ask again when less is written, or let file systems be frozen for a moment (--freeze auto).',
        },
      );
    } finally {
      over.abort();
      signal?.removeEventListener('abort', abort);
    }
  }

  /** Told when it begins, when it has doubled, and when it is over. */
  private unreadable(bytes: number, ranges: readonly ByteRange[]): void {
    this.unreadableNow = { bytes, ranges };
    this.metaDue ??= { contents: undefined };
    if (bytes === 0) {
      if (this.toldUnreadable > 0) this.notice(`all of ${this.o.device} can be read again`);
      this.toldUnreadable = 0;
    } else if (bytes >= 2 * this.toldUnreadable) {
      this.toldUnreadable = bytes;
      this.problem(
        `${formatBytes(bytes)} of ${this.o.device} cannot be read (the first at offset ${ranges[0]?.offset ?? 0}): the repository keeps what it has of that; everything else is captured, in points that are not exact (fuzzy)`,
        `Check the disk (dmesg, smartctl). It is tried again every ${formatDuration(BAD_RETRY_MS / 1000)}; points are exact once it can be read or was written anew.`,
      );
    }
  }

  private frozen({ frozenMs, mountPoints }: Freeze, unasked: boolean): void {
    const { count, longestMs } = this.freezes;
    this.freezes = { count: count + 1, longestMs: Math.max(longestMs, frozenMs) };
    this.tell({ type: 'frozen', device: this.o.device, frozenMs, mountPoints, unasked });
  }

  /** Makes a point of class `fs` unasked where writes outrun the reader, if that is wanted. Never waits. */
  private relieve(capture: LiveCapture, device: ReadDevice): void {
    const { quiesce } = this.o;
    const afterMs = this.o.freezeAfterMs?.();
    const nowNs = this.clock.monotonicNs();
    const { needsResync, outage, lagMs } = capture.status();
    if (quiesce === undefined || afterMs === undefined || this.relieving !== undefined) return;
    if (!this.isOutrun || needsResync || outage !== undefined || lagMs < afterMs) return;
    if (nowNs < this.relieveFromNs) return;
    const isFirst = this.relievePauseMs === 0;
    this.relieving = quiesce(
      { pointClass: PointClass.fs, signal: this.abort.signal },
      { device, capture, onFreeze: (freeze) => this.frozen(freeze, true) },
    )
      .then(
        () => {
          this.relievePauseMs = 0;
          if (this.isRelieved) return;
          this.isRelieved = true;
          this.notice(
            `${this.o.device} is written faster than it can be read at rest: its file systems are frozen for a moment whenever there was no exact point for ${formatDuration(afterMs / 1000)}`,
          );
        },
        (error: unknown) => {
          const pauseMs = Math.max(afterMs, FREEZE_PAUSE_FACTOR * this.relievePauseMs);
          this.relievePauseMs = Math.min(MAX_FREEZE_PAUSE_MS, pauseMs);
          if (this.isStopping || isKind(error, 'interrupted') || !isFirst) return;
          this.problem(
            `there was no exact point of ${this.o.device} for ${formatDuration(afterMs / 1000)}, because it is written faster than it can be read at rest, and its file systems were not frozen for one: ${messageOf(error)}`,
            error instanceof B2Error ? error.hint : undefined,
          );
        },
      )
      .finally(() => {
        this.relieveFromNs =
          this.clock.monotonicNs() + BigInt(Math.round(this.relievePauseMs)) * 1_000_000n;
        this.relieving = undefined;
      });
  }

  hashOf(seq: number): string | undefined {
    return this.hashes.get(seq);
  }

  resync(): void {
    if (this.capture === undefined) return;
    this.capture.resync();
    this.show();
  }

  async stop(finalMs: number): Promise<void> {
    this.finalMs = Math.max(this.finalMs, finalMs);
    this.stopCalled.resolve();
    this.abort.abort();
    await this.done;
  }

  // What it tells.

  private tell(event: WatchEvent): void {
    this.o.onEvent(event);
  }

  private notice(message: string): void {
    this.tell({ type: 'notice', device: this.o.device, message });
  }

  private problem(message: string, hint?: string): void {
    const problem = { atNs: this.clock.nowNs(), message, hint };
    this.lastProblem = problem;
    this.tell({ type: 'problem', device: this.o.device, problem });
  }

  private enter(state: WatchState, message: string): void {
    if (this.state === state) return;
    this.state = state;
    this.tell({ type: 'state', device: this.o.device, state, message });
  }

  /** Brings the state in line with what the capture says. */
  private show(): void {
    const c = this.capture?.status();
    if (c === undefined) return;
    const { device } = this.o;
    if (c.outage !== undefined) {
      this.enter('outage', `the repository takes no commits: ${c.outage.message}`);
    } else if (c.needsResync) {
      this.enterScan();
    } else if (hasUnreadable(c)) {
      this.enter(
        'unreadable',
        `${formatBytes(c.unreadable.bytes)} of ${device} cannot be read; everything else is captured, in points that are not exact (fuzzy)`,
      );
    } else {
      // With nothing left to do there is nothing to be late with.
      if (c.isCaughtUp && c.lagMs === 0) this.isCoalescing = false;
      if (this.isCoalescing) this.enter('coalescing', `${device} is written faster than captured`);
      else this.enter('exact', `every change of ${device} is captured`);
    }
  }

  private enterScan(): void {
    const { device } = this.o;
    if (this.hasPoint) this.enter('resync', `${device} is compared with the repository`);
    else this.enter('baseline', `${device} is read for the first time`);
  }

  // Its life.

  private async run(): Promise<void> {
    let end: unknown;
    try {
      await this.live();
    } catch (error) {
      // What was given up because of a stop is no failure.
      if (!(this.isStopping && isKind(error, 'interrupted'))) end = error ?? new Error('unknown');
    }
    await this.metaWrite;
    await this.catalogueWrite;
    if (end === undefined) {
      this.enter('stopped', `${this.o.device} is not watched any more`);
      this.becomeReady.reject(
        new B2Error('interrupted', `the watch of ${this.o.device} was stopped`),
      );
      return;
    }
    const failure =
      end instanceof B2Error
        ? end
        : new B2Error('failed', `watching ${this.o.device}: ${messageOf(end)}`, { cause: end });
    this.lastProblem = {
      atNs: this.clock.nowNs(),
      message: failure.message,
      hint: failure.hint,
    };
    // Whoever awaits `done` has the hint.
    this.enter('failed', failure.message);
    this.becomeReady.reject(failure);
    throw failure;
  }

  private async live(): Promise<void> {
    let device = await this.begin();
    if (device === undefined) return;
    for (let isFirst = true; ; isFirst = false) {
      let end: End;
      try {
        end = await this.hold(device, isFirst);
      } catch (error) {
        // A device can go again while it is being looked at.
        if (isFirst || !isKind(error, 'io', 'not-found')) throw error;
        end = { kind: 'ended', error };
      } finally {
        await device.close();
      }
      if (end.kind === 'stop') return;
      const next = await this.after(end, device.facts);
      if (next === undefined) return;
      device = next;
    }
  }

  /** Opens the device for the first time and settles which volume it is captured to. */
  private async begin(): Promise<ReadDevice | undefined> {
    const device = await this.openFirst();
    if (device === undefined) return undefined;
    try {
      const { facts } = device;
      if (facts.sizeBytes === 0)
        throw new B2Error('refused', `${facts.path} has no bytes: there is nothing to capture`);
      await this.refuseFeedback(facts);
      await this.withRepository(async () => {
        const { volume, isNew } = await volumeFor(
          this.o.repo,
          {
            volume: this.o.volume,
            host: this.o.host,
            takeOver: this.o.takeOver ?? false,
            events: (e) => {
              if (e.type === 'warning') this.problem(e.message, e.hint);
            },
          },
          facts,
        );
        if (!isNew) await this.checkVolume(volume, device);
        this.volume = volume;
      });
      if (this.volume !== undefined)
        await this.o.refuseHeld?.({
          volumeId: this.volume.id,
          volume: this.volume.name,
          realPath: facts.realPath,
        });
      return device;
    } catch (error) {
      await device.close();
      throw error;
    }
  }

  /** Undefined if the session is stopped while it waits for a device that is not there yet. */
  private async openFirst(): Promise<ReadDevice | undefined> {
    const { device: path, waitForDevice = false } = this.o;
    for (;;) {
      try {
        const device = await this.machine.open(path);
        if (this.state === 'absent') {
          this.notice(`${path} is there now`);
          this.enter('starting', `${path} is opened`);
        }
        return device;
      } catch (error) {
        if (!isKind(error, 'not-found')) throw error;
        if (!waitForDevice) {
          throw new B2Error('not-found', error.message, {
            cause: error,
            code: ExitCode.failed,
            hint:
              error.hint ??
              'lsblk lists the block devices. As a service, b2 waits for a device that is missing.',
          });
        }
        if (this.state !== 'absent') {
          this.problem(
            `${error.message}; it is captured as soon as it is there`,
            'If the name is wrong, stop this watch and name the right device (lsblk lists them).',
          );
          this.enter('absent', `${path} is not there yet`);
        }
      }
      await this.clock.sleep(this.probeMs, this.abort.signal);
      if (this.isStopping) return undefined;
    }
  }

  private async refuseFeedback(facts: DeviceFacts): Promise<void> {
    const place = await this.machine.placeOfRepository(facts.realPath);
    const { url } = this.o.repo.store;
    if (place === 'on') {
      throw new B2Error(
        'refused',
        `the repository ${url} lies on ${facts.path} itself: everything that is written to it would have to be captured and written once more, without end, and a broken disk would take both`,
        {
          hint: 'Name a repository on another disk or host with --repo, or watch only the partitions or logical volumes that do not hold it.',
        },
      );
    }
    if (place === 'beside') {
      this.notice(
        `the repository ${url} is on the same disk as ${facts.path}: it brings back what was deleted or overwritten, but not a broken disk`,
      );
    }
  }

  /** Refuses a volume that is of another device than this one. */
  private async checkVolume(volume: VolumeMeta, device: ReadDevice): Promise<void> {
    const recorded = volume.facts['identity'];
    const contents = volume.facts['contents'];
    const before: KnownDevice = {
      kind: device.facts.kind,
      identity: Object.fromEntries(
        Object.entries(typeof recorded === 'object' && recorded !== null ? recorded : {}).filter(
          (e): e is [string, string] => typeof e[1] === 'string',
        ),
      ),
      contents: isContents(contents) ? contents : undefined,
    };
    const { verdict, because } = await this.compare(before, device, volume);
    if (verdict !== 'other') return;
    if (this.o.acceptDevice === true) {
      this.notice(
        `${device.facts.path} is another device than volume ${volume.name} is of (${because}); it goes on with this one, as asked`,
      );
      return;
    }
    const own = defaultVolumeName(this.o.host, device.facts.realPath);
    const where = await this.whereIs(before.identity, device.facts);
    throw new B2Error(
      'refused',
      `${device.facts.path} is not the device that volume ${volume.name} is of: ${because}`,
      {
        hint: `${where}Give it a volume of its own (--volume ${own}-2), or use --accept-device if it replaces the old one and its history shall go on in this volume.`,
      },
    );
  }

  /** A sentence for a hint: the lasting names of the device that was meant and of the one that is there. */
  private async whereIs(
    meant: Readonly<Record<string, string>>,
    found: DeviceFacts,
  ): Promise<string> {
    const directory = this.o.byIdDir;
    const right = await lastingNameOf(meant, directory);
    const own = await lastingName(found.realPath, directory);
    if (right !== undefined && right.target !== found.realPath)
      return `The right one is ${right.link} (${right.target} now): name it so, that name stays. `;
    return own === undefined ? '' : `This one is ${own}. `;
  }

  /** Contents are looked at only where the hardware does not tell. */
  private async compare(
    before: KnownDevice,
    device: ReadDevice,
    volume: VolumeMeta,
  ): Promise<IdentityVerdict> {
    const { kind, identity } = device.facts;
    const first = compareDevices(
      { ...before, contents: undefined },
      { kind, identity, contents: undefined },
    );
    if (first.verdict === 'same') return first;
    const stored = await this.storedContents(volume, device.facts);
    // A device that cannot be read here is no outage of the repository; what it is will show when it is captured.
    const contents = await deviceContents(device).catch(() => undefined);
    return compareDevices(
      { ...before, contents: stored ?? before.contents },
      { kind, identity, contents },
    );
  }

  /** What lay on the device when it was captured last; undefined if the repository has no point of it. */
  private async storedContents(
    volume: VolumeMeta,
    facts: DeviceFacts,
  ): Promise<DeviceContents | undefined> {
    const history = await VolumeHistory.open(this.o.repo, volume.id);
    try {
      const { tip } = history;
      if (tip === undefined || history.chain.gap !== undefined) return undefined;
      const image = await openImage(history, volume, tip.seq);
      try {
        return await imageContents(image, facts);
      } finally {
        await image.close();
      }
    } catch (error) {
      if (!isKind(error, 'damaged', 'not-found')) throw error;
      return undefined;
    } finally {
      await history.close();
    }
  }

  /** Runs what needs the repository, again and again while that is away; `interrupted` when the session is stopped meanwhile. */
  private async withRepository<T>(work: () => Promise<T>): Promise<T> {
    let pauseMs = this.o.retryMs ?? 1000;
    for (;;) {
      try {
        const result = await work();
        this.outageOver();
        return result;
      } catch (error) {
        if (!isKind(error, 'io', 'no-space')) throw error;
        this.outageBegins(error);
        this.enter('outage', `the repository cannot be used: ${error.message}`);
      }
      await this.clock.sleep(pauseMs, this.abort.signal);
      if (this.isStopping)
        throw new B2Error('interrupted', `the watch of ${this.o.device} was stopped`);
      pauseMs = Math.min(2 * pauseMs, MAX_OUTAGE_PAUSE_MS);
    }
  }

  /** Said once for each outage, and again where it becomes one of another kind. */
  private outageBegins(error: B2Error): void {
    const message = `the repository takes no commits: ${error.message}; changes of ${this.o.device} are remembered and captured when it is back`;
    const isNew = this.outageKind !== error.kind;
    this.outageKind = error.kind;
    if (isNew) this.problem(message, error.hint);
    else this.lastProblem = { atNs: this.clock.nowNs(), message, hint: error.hint };
  }

  private outageOver(): void {
    this.outageKind = undefined;
  }

  /** Captures an open device until something ends that. */
  private async hold(device: ReadDevice, isFirst: boolean): Promise<End> {
    const { facts } = device;
    this.facts = facts;
    this.openedBytes = 0;
    // Everything is compared, and what cannot be read is found again.
    this.unreadableNow = NOTHING_UNREADABLE;
    const wasReleasing = await isReleasing(facts, this.o.roots);
    const chosen = await this.openSource(device);
    const source = new MeteredSource(chosen.source, this.totals);
    try {
      if (this.isStopping) return { kind: 'stop' };
      const { volume } = this;
      if (volume === undefined) throw new Error('there is no volume to capture to');
      await this.withRepository(async () => {
        await this.writer?.close(() => undefined);
        this.writer = undefined;
        this.writer = await this.claim(volume);
      });
      const isInSync = await this.believe(volume, facts, isFirst);
      await removeCleanStop(this.stateDir, this.o.repo.id, volume.id);
      this.known = { kind: facts.kind, identity: facts.identity, contents: undefined };
      this.metaDue = { contents: await this.inspect(device) };
      const sink = this.sinkOf(volume, device, chosen);
      const metered = new MeteredSink(sink, this.totals, (seq) => this.committed(seq));
      const capture = LiveCapture.start({
        source,
        device,
        sink: metered,
        clock: this.clock,
        isInSync,
        group: this.o.group === undefined ? undefined : { of: this.o.group, device: this.o.device },
        onEvent: (event) => this.heard(event),
        ...(this.o.intervalMs === undefined ? {} : { intervalMs: this.o.intervalMs }),
        ...(this.o.stageBytes === undefined ? {} : { stageBytes: this.o.stageBytes }),
        ...(this.o.pollMs === undefined ? {} : { pollMs: this.o.pollMs }),
        ...(this.o.retryMs === undefined ? {} : { retryMs: this.o.retryMs }),
        ...(this.o.badRetryMs === undefined ? {} : { badRetryMs: this.o.badRetryMs }),
      });
      this.capture = capture;
      this.device = device;
      this.source = chosen;
      let record: CleanStop | undefined;
      try {
        this.show();
        // A device on which nothing happens shows that it is captured by a point as well.
        if (isInSync) capture.point().catch(() => undefined);
        const end = await this.follow(capture, device, wasReleasing);
        await this.endCapture(capture, end);
        if (end.kind === 'stop') record = await this.proof(capture, source, device, volume);
        return end;
      } finally {
        const { points, losses } = capture.status();
        this.pointsBefore += points;
        this.lossesBefore += losses;
        this.isOutrun = false;
        // The end of the capture has ended it: nothing stays frozen.
        await this.relieving;
        this.capture = undefined;
        this.device = undefined;
        this.source = undefined;
        await this.closeSink(sink);
        this.writeMeta(facts);
        if (record !== undefined) await this.saveRecord(record);
        await this.recordTip(true);
      }
    } finally {
      await source.close();
      await this.writer?.close(() => undefined);
      this.writer = undefined;
    }
  }

  /** Facts for the volume's meta object. What cannot be read now will end the capture soon enough. */
  private async inspect(device: ReadDevice): Promise<DeviceContents | undefined> {
    try {
      return await inspectDevice(device);
    } catch (error) {
      if (!(error instanceof B2Error)) throw error;
      return undefined;
    }
  }

  private async closeSink(sink: { close(): Promise<void> }): Promise<void> {
    try {
      await sink.close();
    } catch (error) {
      if (!(error instanceof B2Error)) throw error;
      this.untidy(error);
    }
  }

  private untidy(error: B2Error): void {
    this.notice(`what is acknowledged is safe, but tidying up failed: ${error.message}`);
  }

  private async openSource(device: ReadDevice): Promise<ChosenSource> {
    const chosen = await this.machine.choose(
      // A source that compares reads everything first: that is progress to be shown.
      meteredDevice(device, (bytes) => {
        this.openedBytes += bytes;
      }),
      this.choice,
      this.abort.signal,
    );
    const { fellBack } = this;
    const found =
      fellBack === undefined
        ? chosen
        : { source: chosen.source, why: `${fellBack}; so ${SCAN_COST}`, isFallback: true };
    this.notice(found.why);
    return found;
  }

  /** Claims the volume and looks whether its newest commit is the one that this session knows. */
  private async claim(volume: VolumeMeta): Promise<VolumeWriter> {
    const { writer, history } = await VolumeWriter.claim(this.o.repo, volume.id);
    const { tip } = history;
    const { exactPoints } = new Timeline(history.sources).counts;
    await history.close();
    const now: Tip = { seq: tip?.seq ?? 0, hash: tip?.hash.toString('hex') };
    const before = this.tip;
    // A commit of this session whose acknowledgement was lost in an outage is on the chain, and as good as any.
    const isOwn = tip !== undefined && this.epochs.has(tip.epoch);
    // An older copy of the repository in its place, or a disk that had not kept what it said it had: what is on
    // the device is not what the end of this chain and the changes since say. A session that begins compares.
    if (before !== undefined && now.seq < before.seq) {
      await writer.close(() => undefined);
      throw new B2Error(
        'lost-claim',
        `the repository lacks acknowledged commits of volume ${volume.name}: its newest is #${now.seq}, and #${before.seq} was there`,
        {
          retryable: true,
          hint: 'Has an older copy of the repository been put in its place? All of the device is compared with what is there now.',
        },
      );
    }
    if (before !== undefined && !isOwn && (before.seq !== now.seq || before.hash !== now.hash)) {
      await writer.close(() => undefined);
      throw new B2Error(
        'lost-claim',
        `another b2 has written to volume ${volume.name} while this one could not; this one stops`,
        { hint: 'A volume has one writer at a time. Nothing acknowledged is lost.' },
      );
    }
    if (exactPoints > 0) this.hasPoint = true;
    this.tip = now;
    this.epochs.add(writer.claimedEpoch);
    this.writer = writer;
    return writer;
  }

  private sinkOf(
    volume: VolumeMeta,
    device: ReadDevice,
    chosen: ChosenSource,
  ): CaptureSink & { close(): Promise<void> } {
    const { repo } = this.o;
    const { url } = repo.store;
    const workers = this.o.workers ?? (isLocal(url) ? WORKERS : 0);
    const said = {
      source: chosen.source.kind,
      host: this.o.host,
      device: device.facts.realPath,
      volume: volume.name,
      logicalBlockBytes: device.facts.logicalBlockBytes,
    };
    const warn = (error: B2Error): void => this.untidy(error);
    return new WriterSink({
      open: async () => {
        const writer = this.writer ?? (await this.claim(volume));
        this.writer = undefined;
        this.current = writer;
        return writer;
      },
      facts: said,
      warn,
      scanner: new RunScanner({
        repo,
        device,
        workers,
        storeUrl: workers === 0 ? undefined : url,
        dedupeCacheFile: this.o.dedupeCacheFile,
        facts: said,
        warn,
      }),
    });
  }

  private committed(seq: number): void {
    const hash = this.current?.tipHash?.toString('hex');
    if (this.current !== undefined) this.epochs.add(this.current.claimedEpoch);
    this.tip = { seq, hash };
    this.hasCommitted = true;
    if (hash === undefined) return;
    this.hashes.set(seq, hash);
    for (const old of this.hashes.keys()) {
      if (this.hashes.size <= HASHES_KEPT) break;
      this.hashes.delete(old);
    }
  }

  /** True if the record of the last stop proves that the volume's newest commit is what the device holds now. */
  private async believe(
    volume: VolumeMeta,
    facts: DeviceFacts,
    isFirst: boolean,
  ): Promise<boolean> {
    const { tip } = this;
    if (!isFirst || tip === undefined || tip.seq === 0) return false;
    const record = await readCleanStop(this.stateDir, this.o.repo.id, volume.id);
    if (record === undefined) return false;
    const why = whyNotInSync(record, tip, facts, await this.machine.stamp(facts));
    if (why === undefined) {
      this.notice(`nothing was written to ${facts.path} since b2 stopped: it need not be read`);
      return true;
    }
    this.notice(`${facts.path} has to be compared with the repository: ${why}`);
    return false;
  }

  /** What capture tells. */
  private heard(event: CaptureEvent): void {
    switch (event.type) {
      case 'point':
        this.hasPoint = true;
        this.readFailures = 0;
        this.isOutrun = false;
        this.lastPoint = event.point;
        this.isCoalescing = event.point.coverage === Coverage.coalesced;
        this.tell({
          type: 'point',
          device: this.o.device,
          volume: this.volume?.name ?? '',
          point: event.point,
        });
        break;
      case 'spill':
      case 'busy':
        if (event.type === 'busy') this.isOutrun = true;
        this.isCoalescing = true;
        break;
      case 'lost':
        // A new size ends the capture, and is said then.
        if (event.loss.reason !== 'resized')
          this.problem(
            `${event.loss.message}; all of ${this.o.device} is compared with the repository, and the time until then is recorded as unknown`,
          );
        break;
      case 'unreadable':
        this.unreadable(event.bytes, event.ranges);
        break;
      case 'outage':
        this.outageBegins(event.error);
        break;
      case 'recovered':
        this.outageOver();
        this.notice(
          `the repository takes commits of ${this.o.device} again, after ${formatDuration(event.outageMs / 1000)}`,
        );
        break;
      case 'late':
        this.problem(
          `${event.completions} writes to ${this.o.device} became known later than the kernel should show them: point ${event.seq === undefined ? '' : `#${event.seq} `}may lack them; later points have them`,
        );
        break;
      case 'scan':
      case 'scanned':
        return;
    }
    this.show();
    // Whoever hears `ready` asks for the state.
    if (event.type === 'point' && event.point.pointClass >= PointClass.crash)
      this.becomeReady.resolve();
  }

  /** Resolves when the capture, the device or the caller ends it. */
  private async follow(
    capture: LiveCapture,
    device: ReadDevice,
    wasReleasing: boolean,
  ): Promise<End> {
    const ticking = new AbortController();
    const ticks = this.tick(capture, device, wasReleasing, ticking.signal);
    const ended = capture.done.then(
      (): End => ({ kind: 'ended', error: undefined }),
      (error: unknown): End => ({ kind: 'ended', error }),
    );
    const stopped = this.stopCalled.promise.then((): End => ({ kind: 'stop' }));
    try {
      return await Promise.race([stopped, ended, ticks]);
    } finally {
      ticking.abort();
      await ticks;
    }
  }

  /** Once in a while: looks after the device, the clock, the rates, and what is written down off the hot path. */
  private async tick(
    capture: LiveCapture,
    device: ReadDevice,
    wasReleasing: boolean,
    signal: AbortSignal,
  ): Promise<End> {
    for (;;) {
      const presence = await this.machine.presence(device.facts, wasReleasing);
      if (presence.kind !== 'here') return { kind: 'gone', why: presence.why };
      if (presence.sizeBytes !== device.facts.sizeBytes)
        return { kind: 'resized', sizeBytes: presence.sizeBytes };
      this.watchClock();
      this.relieve(capture, device);
      const { changedBytes, capturedBytes, storedBytes } = this.totals;
      this.rates.note(this.clock.monotonicNs(), [changedBytes, capturedBytes, storedBytes]);
      this.show();
      this.writeMeta(device.facts);
      await this.recordTip(false);
      await this.clock.sleep(this.probeMs, signal);
      // The answer is nobody's then.
      if (signal.aborted) return { kind: 'stop' };
    }
  }

  private watchClock(): void {
    const offsetNs = this.clock.nowNs() - this.clock.monotonicNs();
    const before = this.clockOffsetNs;
    this.clockOffsetNs = offsetNs;
    if (before === undefined) return;
    const stepMs = Number(offsetNs - before) / 1e6;
    if (Math.abs(stepMs) < CLOCK_STEP_MS) return;
    const by = formatDuration(Math.abs(stepMs) / 1000);
    this.notice(
      stepMs < 0
        ? `the clock of this machine was put back by ${by}: points carry what it shows, so those before and after overlap in time until ${formatTimeLocal(this.clock.nowNs() - BigInt(Math.round(stepMs * 1e6)))}`
        : `the clock of this machine was put forward by ${by} (or it slept)`,
    );
  }

  /** Writes the volume's meta object, when there is something new to say and the repository is there. */
  private writeMeta(facts: DeviceFacts): void {
    const { volume, metaDue } = this;
    if (volume === undefined || metaDue === undefined || this.metaWrite !== undefined) return;
    if (!this.hasCommitted || this.capture?.status().outage !== undefined) return;
    const unreadable = this.unreadableNow;
    const { group } = this.o;
    const groupFacts: GroupFacts = {
      group: group?.name,
      groupDevice: group === undefined ? undefined : this.o.device,
      groupDevices: group?.devices,
    };
    const next: VolumeMeta = {
      ...volume,
      host: this.o.host,
      device: facts.realPath,
      sizeBytes: facts.sizeBytes,
      logicalBlockBytes: facts.logicalBlockBytes,
      facts: {
        ...volume.facts,
        identity: facts.identity,
        ...(metaDue.contents === undefined ? {} : { contents: metaDue.contents }),
        ...groupFacts,
        unreadable: unreadable.bytes === 0 ? undefined : unreadable,
      },
      updatedNs: this.clock.nowNs(),
    };
    this.metaWrite = writeVolumeMeta(this.o.repo, next)
      .then(
        () => {
          this.volume = next;
          if (this.metaDue === metaDue) this.metaDue = undefined;
        },
        () => undefined, // an outage, which shows in commits as well; the next tick tries again
      )
      .finally(() => {
        this.metaWrite = undefined;
      });
  }

  /** What this machine has seen acknowledged, for `verify`: a cache, so that its failures are not worth a word each. */
  private async recordTip(isLast: boolean): Promise<void> {
    const { catalogue } = this.o;
    const { tip, volume, lastPoint } = this;
    if (catalogue === undefined || tip?.hash === undefined || volume === undefined) return;
    const nowNs = this.clock.monotonicNs();
    const { catalogued } = this;
    if (catalogued?.seq === tip.seq) return;
    const isDue =
      catalogued === undefined || nowNs - catalogued.atNs >= BigInt(CATALOGUE_MS) * 1_000_000n;
    if (!isLast && (!isDue || this.catalogueWrite !== undefined)) return;
    await this.catalogueWrite;
    const { seq, hash } = tip;
    this.catalogued = { seq, atNs: nowNs };
    this.catalogueWrite = catalogue
      .recordTip({
        volumeId: volume.id,
        name: volume.name,
        seq,
        hash,
        instantNs: lastPoint?.instantNs ?? this.clock.nowNs(),
      })
      .catch((error: unknown) =>
        this.notice(`the local catalogue could not be written: ${messageOf(error)}`),
      )
      .finally(() => {
        this.catalogueWrite = undefined;
      });
  }

  /** Ends a capture that has not ended by itself. Its failures matter only where they are the reason. */
  private async endCapture(capture: LiveCapture, end: End): Promise<void> {
    if (end.kind === 'ended') return;
    try {
      await capture.stop(end.kind === 'stop' ? this.finalMs : 0);
    } catch (error) {
      if (isKind(error, 'lost-claim')) throw error;
      if (end.kind === 'stop')
        this.problem(`there is no last point of ${this.o.device}: ${messageOf(error)}`);
    }
  }

  /** See the file comment. Undefined where the clean stop cannot be proved. */
  private async proof(
    capture: LiveCapture,
    source: MeteredSource,
    device: ReadDevice,
    volume: VolumeMeta,
  ): Promise<CleanStop | undefined> {
    const { tip, clock } = this;
    const status = capture.status();
    if (!status.isCaughtUp || status.outage !== undefined || source.hasFailed) return undefined;
    if (tip?.hash === undefined || tip.seq === 0) return undefined;
    let seen = 0;
    const note: ChangeSink = { issued: () => void seen++, completed: () => void seen++ };
    const endNs = clock.monotonicNs() + BigInt(PROOF_MS) * 1_000_000n;
    try {
      const facts = await device.refresh();
      if (facts.sizeBytes !== this.facts?.sizeBytes) return undefined;
      while (clock.monotonicNs() < endNs) {
        const stamp = await this.machine.stamp(facts);
        const { counters } = stamp;
        if (counters === undefined) return undefined;
        const takenNs = Number(clock.monotonicNs() - source.originNs);
        for (;;) {
          const poll = await source.poll(note, { certain: true });
          if (poll.loss !== undefined || seen > 0) return undefined;
          if (poll.completeToNs >= takenNs && !poll.more) break;
          if (clock.monotonicNs() >= endNs) return undefined;
          await clock.sleep(PROOF_PAUSE_MS);
        }
        if (stamp.writesInFlight === 0) {
          return {
            repositoryId: this.o.repo.id,
            volumeId: volume.id,
            seq: tip.seq,
            hash: tip.hash,
            sizeBytes: facts.sizeBytes,
            identity: facts.identity,
            counters,
          };
        }
        await clock.sleep(PROOF_PAUSE_MS);
      }
      return undefined;
    } catch {
      // The device is going: then there is no record, and the next start reads everything.
      return undefined;
    }
  }

  private async saveRecord(record: CleanStop): Promise<void> {
    try {
      await writeCleanStop(this.stateDir, record);
    } catch (error) {
      this.notice(
        `the next start has to read all of ${this.o.device}, because this stop could not be recorded: ${messageOf(error)}`,
      );
    }
  }

  /** What comes after a capture has ended: the device to go on with; undefined if the session was stopped. */
  private async after(
    end: Exclude<End, { kind: 'stop' }>,
    facts: DeviceFacts,
  ): Promise<ReadDevice | undefined> {
    // What a source tells has been counted.
    if (end.kind !== 'ended' || !isKind(end.error, 'failed')) this.lossesBefore++;
    const next = end.kind === 'ended' ? await this.reasonOf(end.error, facts) : end;
    if (this.isStopping) return undefined;
    if (next.kind === 'gone') return this.awaitReturn(next.why);
    if (next.kind === 'resized') {
      this.notice(
        `${facts.path} has ${formatBytes(next.sizeBytes)} now, not ${formatBytes(facts.sizeBytes)}; capture goes on with the new size`,
      );
    }
    try {
      this.enterScan();
      return await this.reopen();
    } catch (error) {
      if (!(error instanceof B2Error)) throw error;
      return this.awaitReturn(error.message);
    }
  }

  /** What a capture that ended by itself means. Throws what the session cannot go on after. */
  private async reasonOf(
    error: unknown,
    facts: DeviceFacts,
  ): Promise<Exclude<End, { kind: 'stop' }>> {
    if (!(error instanceof B2Error))
      throw error instanceof Error ? error : new Error('the capture ended by itself');
    const { kind } = error;
    if (kind === 'lost-claim' || kind === 'interrupted') throw error;
    const presence = await this.machine.presence(facts, true);
    if (presence.kind !== 'here') return { kind: 'gone', why: presence.why };
    if (presence.sizeBytes !== facts.sizeBytes)
      return { kind: 'resized', sizeBytes: presence.sizeBytes };
    if (kind === 'failed' && error.retryable) {
      // Written behind its end, and the size is as before: it was larger for a moment only.
      await this.clock.sleep(this.probeMs, this.abort.signal);
    } else if (kind === 'failed' && this.choice === 'auto') {
      // The source cannot watch this device.
      this.choice = 'scan';
      this.fellBack = error.message;
      this.problem(error.message, 'It is scanned for changes from now on.');
    } else if (kind === 'io') {
      this.enterScan();
      await this.pauseAfter(error);
    } else {
      throw error;
    }
    return { kind: 'ended', error };
  }

  /** After a read that failed, of a device that is there. */
  private async pauseAfter(error: B2Error): Promise<void> {
    this.readFailures++;
    this.problem(error.message, error.hint ?? 'Check the disk (dmesg, smartctl).');
    if (this.readFailures > MAX_READ_FAILURES) {
      throw new B2Error(
        'io',
        `${this.o.device} cannot be read: ${error.message} (tried ${this.readFailures} times)`,
        {
          cause: error,
          retryable: true,
          hint: 'Check the disk (dmesg, smartctl). What can be read of it is saved by "b2 snapshot --skip-unreadable".',
        },
      );
    }
    const pauseMs = this.probeMs * READ_RETRY_PROBES * 2 ** (this.readFailures - 1);
    await this.clock.sleep(pauseMs, this.abort.signal);
  }

  /** Opens the device again and makes sure that it is the same. */
  private async reopen(): Promise<ReadDevice> {
    const device = await this.machine.open(this.o.device);
    try {
      if (device.facts.sizeBytes === 0)
        throw new B2Error('failed', `${this.o.device} has no medium: its size is 0`);
      const medium = mediumOf(device.facts);
      // Looking at it once more, every second, would find the same.
      if (this.refused?.medium === medium) throw this.refused.error;
      const why = await this.whyNotTheSame(device);
      if (why === undefined) {
        await this.refuseFeedback(device.facts);
        return device;
      }
      const error = new B2Error(
        'refused',
        `the device at ${this.o.device} is not the one that was captured: ${why}`,
        {
          hint: `${await this.whereIs(this.known?.identity ?? {}, device.facts)}It is not captured. Attach the right one, or start the watch of this one anew with a volume of its own.`,
        },
      );
      this.refused = { medium, error };
      throw error;
    } catch (error) {
      await device.close();
      throw error;
    }
  }

  private async whyNotTheSame(device: ReadDevice): Promise<string | undefined> {
    const { volume, known, facts } = this;
    if (volume === undefined || known === undefined) return undefined;
    const now = device.facts;
    // The kernel gives each medium that is attached a number of its own, until the next boot.
    if (
      now.diskSequence !== undefined &&
      now.diskSequence === facts?.diskSequence &&
      now.devNumber === facts.devNumber &&
      now.partitionOf?.offsetBytes === facts.partitionOf?.offsetBytes
    )
      return undefined;
    const { verdict, because } = await this.compare(known, device, volume);
    if (verdict === 'same') return undefined;
    // A file has nothing but its name.
    if (verdict === 'unknown' && now.kind === 'file' && known.kind === 'file') return undefined;
    return because;
  }

  /** Waits until the device is back; undefined if the session is stopped meanwhile. */
  private async awaitReturn(why: string): Promise<ReadDevice | undefined> {
    const { device: path } = this.o;
    this.problem(
      `${why}; nothing of it is captured until it is back`,
      'It is compared with the repository and captured again as soon as it is there.',
    );
    this.enter('absent', `${path} is gone`);
    let told = '';
    for (;;) {
      await this.clock.sleep(this.probeMs, this.abort.signal);
      if (this.isStopping) return undefined;
      try {
        const device = await this.reopen();
        this.notice(`${path} is back`);
        this.enterScan();
        return device;
      } catch (error) {
        if (!(error instanceof B2Error)) throw error;
        if (error.kind === 'not-found' || error.message === told) continue;
        told = error.message;
        this.problem(error.message, error.hint);
      }
    }
  }
}

/** True until there is an exact point again, too. */
function hasUnreadable(c: CaptureStatus): boolean {
  return c.unreadable.bytes > 0 || c.lastPoint?.pointClass === PointClass.fuzzy;
}

/** Tells what is attached at present from what was before or comes after, where the kernel does. */
function mediumOf(facts: DeviceFacts): string {
  const { devNumber, diskSequence, partitionOf, identity, sizeBytes } = facts;
  return JSON.stringify([
    devNumber,
    diskSequence?.toString(),
    partitionOf?.offsetBytes,
    sizeBytes,
    identity,
  ]);
}

/** True for the URL of a store that is a directory of this machine. */
function isLocal(url: string): boolean {
  return url.startsWith('/');
}

function isContents(v: unknown): v is DeviceContents {
  return typeof v === 'object' && v !== null && 'contents' in v && Array.isArray(v.contents);
}
