/**
 * Live capture: a change source, a device to read from and the interval cut, made into a stream of commits.
 *
 * While there are writes a point is tried at every interval, less the time that points have taken lately to become durable, so
 * that a write is in a durable point one interval after it was acknowledged: blocks that changed are read, the cut is asked, blocks in its way
 * are read again, until it holds; then everything read since the last point is committed as one point of class `crash`. While
 * there are none, nothing is done. A point that does not come about within its time is tried again at the next interval with
 * what is staged already (`busy`).
 *
 * **Memory** is bounded: {@link captureBytesAtMost} says by what. **Overload**: when the staged blocks fill their memory before a
 * point is reached (writes faster than the repository), they go out as a commit of class `none`, which is no recovery point and is
 * offered to nobody, and the next point builds on it. The source is never stalled; while the repository does not take commits,
 * changed blocks are only remembered (a bit each, at worst), and the next point says `coalesced`.
 *
 * **Losing track** (and starting) makes every block unknown: the whole device is read while capture goes on; until that is done no
 * point is claimed, and the first one afterwards says that the time before it is `unknown`. A sink that can ({@link
 * CaptureSink.scan}) does that itself, run by run, and stores only what differs from what it holds (baseline.ts). Why the cut holds
 * with what a scan has read, too:
 * - a run is taken out of the unknown blocks before the first byte of it is read, so that whatever completes from then on waits to
 *   be read again, as with any other read; it counts as read when the last byte of it was, which is later than it was and
 *   so only makes LO greater: more cautious;
 * - whether a block was stored or was found to be the same as in the newest commit makes no difference: either way the newest
 *   commit then holds what was read at that time. That is why a scan commits (class `none`) before it counts as read, compares
 *   with the newest commit and no other, and begins only when nothing is staged: a staged block would overwrite it later
 *   with what was read earlier;
 * - track lost once more makes all blocks unknown again, the run being scanned included; the scan goes on behind that run and comes
 *   round to what it had done before, so that losses do not keep it from reaching the end of the device.
 * What a scan has done is durable run by run. After a restart everything is compared again, which costs a read and a hash for what
 * is stored already.
 *
 * One thread, no locks: polls and the making of points take turns at every await.
 */
import type { Clock } from '../clock.js';
import type { ChangeLoss, ChangeSource } from '../devices/change-source.js';
import { READS_AT_ONCE, type ByteRange, type ReadDevice } from '../devices/device.js';
import { B2Error, isKind, messageOf } from '../errors.js';
import { Coverage, PointClass } from '../format/commit.js';
import { alignedMemory } from '../memory.js';
import { BLOCK_BYTES, blocksOf } from '../units.js';
import { tableBytesAtMost } from './block-times.js';
import { BadBlocks, badBytesAtMost, readAround } from './bad-blocks.js';
import type { GroupSeat, PointGroup, Since } from './group.js';
import { IntervalCut, type Decision } from './interval-cut.js';
import { STAGE_STEP_BYTES, Staging, type StagedBlocks } from './staging.js';

/** A commit that is durable. */
export interface CommitDone {
  readonly seq: number;
  readonly storedBytes: number;
}

/** What a sink makes durable as one commit. */
export interface CaptureCommit {
  /** `crash` or better for a point, `none` for a commit that is none. */
  readonly pointClass: PointClass;
  readonly coverage: Coverage;
  /** Wall time of the instant; of a commit that is no point: when it was made. */
  readonly instantNs: bigint;
  /** Wall time at which the first block of it was read. */
  readonly startedNs: bigint;
  readonly sizeBytes: number;
  readonly content: StagedBlocks;
  /** Name of the group (group.ts) whose other volumes have a point of the same instant. */
  readonly group?: string | undefined;
  /** What could not be read of the device, if anything: the first hundred ranges. */
  readonly unreadable?: readonly ByteRange[] | undefined;
}

/** A run of blocks for a sink to read and store. */
export interface ScanRequest {
  readonly block: number;
  readonly count: number;
  /** Of the device. */
  readonly sizeBytes: number;
  /** Aborted when capture ends. */
  readonly signal: AbortSignal;
  /** Hears now and then how much of the run is done. */
  readonly onProgress: (doneBytes: number) => void;
}

/** What came of it. */
export interface ScanOutcome {
  /** Of the commit; undefined: everything was there already, and none was made. */
  readonly seq: number | undefined;
  readonly readBytes: number;
  /** Of blocks that differed. */
  readonly changedBytes: number;
  readonly storedBytes: number;
  /** Blocks that could not be read: of them the newest commit holds what it held. */
  readonly unreadable?: readonly number[];
}

/** The device could not be read, as opposed to a repository that takes nothing: capture ends with it. */
export class DeviceError extends B2Error {}

/**
 * Where commits go. One call at a time. When a call rejects nothing of it counts, and it may be called again later with other
 * blocks: the sink then begins anew by itself.
 */
export interface CaptureSink {
  /** Bytes of memory it takes at present, beyond what it is given. */
  readonly memoryBytes?: number;
  /**
   * Makes ready for a commit: a repository that is away shows here, before anything is read for it. Asked after a call has rejected.
   */
  prepare?(): Promise<void>;
  /**
   * Reads a run of the device, all of it from after the call, and makes durable (class `none`) what differs from the newest commit.
   * When it resolves, the newest commit holds every block of the run as it was at some time during the call. Rejects with
   * {@link DeviceError} if the device is at fault. Not all sinks can: without it everything is read and committed as changed.
   */
  readonly scan?: ((request: ScanRequest) => Promise<ScanOutcome>) | undefined;
  commit(commit: CaptureCommit): Promise<CommitDone>;
}

/** A point that was acknowledged. */
export interface CapturedPoint {
  readonly seq: number;
  /** Wall time. */
  readonly instantNs: bigint;
  /** Time of the source, see {@link ChangeSource.originNs}. */
  readonly instantSourceNs: number;
  /** Name of the group (group.ts) whose other volumes have a point of the same instant. */
  readonly group?: string;
  readonly pointClass: PointClass;
  readonly coverage: Coverage;
  readonly blocks: number;
  readonly storedBytes: number;
  /** How often blocks were read, the first time included. */
  readonly rounds: number;
  /** From the beginning of the attempt until the cut held. */
  readonly cutMs: number;
  /** How old the instant was when the point was durable. */
  readonly ageMs: number;
}

export type CaptureEvent =
  | { readonly type: 'point'; readonly point: CapturedPoint }
  /** A commit that is no point: staged blocks filled their memory. */
  | { readonly type: 'spill'; readonly seq: number; readonly blocks: number }
  /** The cut did not hold in time; the next interval goes on with what is staged. */
  | {
      readonly type: 'busy';
      readonly rounds: number;
      readonly staged: number;
      readonly pending: number;
      readonly shortNs: number;
    }
  /** A first scan or a resync goes on; some times a second. `totalBytes`: the device. */
  | { readonly type: 'scan'; readonly doneBytes: number; readonly totalBytes: number }
  /** A run of a scan is durable; `seq` undefined: nothing of it differed. */
  | {
      readonly type: 'scanned';
      readonly seq: number | undefined;
      readonly readBytes: number;
      readonly changedBytes: number;
      readonly storedBytes: number;
    }
  /** Track was lost: everything is being read again. */
  | { readonly type: 'lost'; readonly loss: ChangeLoss }
  /** Blocks cannot be read, or can be read again: all that cannot be now. Points are `fuzzy` while there are any. */
  | {
      readonly type: 'unreadable';
      readonly bytes: number;
      readonly ranges: readonly ByteRange[];
    }
  /** The repository did not take a commit; it is tried again. */
  | { readonly type: 'outage'; readonly error: B2Error }
  /** The repository takes commits again, after so long. */
  | { readonly type: 'recovered'; readonly outageMs: number }
  /** Completions came later than the kernel should have shown them: the point before may lack them. Later points have them. */
  | { readonly type: 'late'; readonly completions: number; readonly seq: number | undefined };

export interface LiveCaptureOptions {
  readonly source: ChangeSource;
  /** Open for reading; the caller closes it after {@link LiveCapture.stop}. */
  readonly device: ReadDevice;
  readonly sink: CaptureSink;
  readonly clock: Clock;
  readonly onEvent?: (event: CaptureEvent) => void;
  /** Time between points while there are writes. Default 1000. */
  readonly intervalMs?: number;
  /** Time between polls of the source. Default 10. */
  readonly pollMs?: number;
  /** An attempt that has taken this long gives up, and the next begins at once. Default: twice the interval. */
  readonly attemptMs?: number;
  readonly maxRounds?: number;
  /** Memory for blocks that wait for a commit. Default 32 MiB. */
  readonly stageBytes?: number;
  /**
   * Time until a commit that the repository did not take is tried again. Default 1000. Each failure in a row doubles it, up to
   * {@link MAX_RETRY_FACTOR} times as long.
   */
  readonly retryMs?: number;
  /** Bounds the tables of the cut (tests). */
  readonly maxSlots?: number;
  /** Blocks that a sink scans at a time; default 2^20 (4 GiB), of which not more than that is done again after an interruption. */
  readonly scanBlocks?: number;
  /**
   * True: the sink's newest commit, of whatever class, is exactly the device as it was when the source was opened (the caller has
   * proof), so that nothing has to be read first, and no time is unknown. Default false: everything is read.
   */
  readonly isInSync?: boolean;
  /** Time between tries at blocks that cannot be read. Default {@link BAD_RETRY_MS}. */
  readonly badRetryMs?: number;
  /** The group that this device makes points with, and its name there. */
  readonly group?: { readonly of: PointGroup; readonly device: string } | undefined;
}

export interface CaptureStatus {
  /** True while every block has to be read again before a point can be claimed. */
  readonly needsResync: boolean;
  /** How far that is; undefined when it is not under way. */
  readonly scan: { readonly doneBytes: number; readonly totalBytes: number } | undefined;
  /**
   * True if the newest commit is the device as it was up to the last poll, as far as is known: nothing waits to be read or stored. With
   * proof that nothing was written since, the next start needs no scan ({@link LiveCaptureOptions.isInSync}).
   */
  readonly isCaughtUp: boolean;
  readonly lastPoint: CapturedPoint | undefined;
  /** Age of the oldest acknowledged write that no durable point holds; 0 if there is none. */
  readonly lagMs: number;
  readonly pendingBlocks: number;
  readonly stagedBlocks: number;
  readonly events: number;
  readonly readBytes: number;
  /** Time spent reading. */
  readonly readMs: number;
  readonly points: number;
  readonly spills: number;
  readonly busy: number;
  readonly losses: number;
  /** Of tables, staged blocks, buffers and what the sink holds. */
  readonly memoryBytes: number;
  /**
   * Bytes a second at which changed blocks were read lately, the time for the first of them included; 0 until some were. With
   * `pendingBlocks`: how long the next point will take to read.
   */
  readonly readBytesPerSecond: number;
  /** What cannot be read of the device: the first hundred ranges, and how much it is altogether. */
  readonly unreadable: { readonly bytes: number; readonly ranges: readonly ByteRange[] };
  /** Why the repository does not take commits at present. */
  readonly outage: B2Error | undefined;
}

const READ_BYTES = 1024 * 1024;
const READERS = 4;
/** Runs of up to this many blocks are read in batches, if there are so many of them. */
const SHORT_RUN_BLOCKS = 16;
const MIN_BATCH = 3;
const NOTHING: ReadonlySet<number> = new Set();
/** Lists of blocks that are due, at most. */
const WORK_BYTES = 32 * 1024 * 1024;
/** Two blocks with no more than this many between them are read in one go. */
const GAP_BLOCKS = 16;
/** 1 GiB: so many block numbers are in memory at a time. */
const TAKE_BLOCKS = 1 << 18;
/** Points this much later than the interval are not `exact` but `coalesced`. */
const LATE_FACTOR = 2;
/** Points are begun earlier by what the slowest of the last ones took, and this much more. */
const LEAD_FACTOR = 1.2;
/** By so much a slow point is forgotten with each that follows. */
const LEAD_DECAY = 0.93;
/** Rounds get shorter as an attempt goes on; one that is given up begins again with the longest. */
const ATTEMPT_INTERVALS = 2;
/** Of an outage, see {@link LiveCaptureOptions.retryMs}. */
export const MAX_RETRY_FACTOR = 16;
/** 4 GiB are scanned at a time, and are durable then. */
const SCAN_BLOCKS = 1 << 20;
const SCAN_EVENT_MS = 200;
/** With no event for so long, polls are this far apart: each wakes the processor. The kernel's buffers hold far more. */
const IDLE_AFTER_MS = 500;
const IDLE_POLL_MS = 100;
/** With fewer events than this in a poll (25,000 a second), the next comes so many times later than in a storm. */
const CALM_EVENTS = 250;
const CALM_FACTOR = 2.5;
/** Blocks that could not be read are tried again this often. */
export const BAD_RETRY_MS = 600_000;
/** So many at a time. */
const BAD_RETRY_BLOCKS = 256;
const RATE_BYTES = 64 * 1024 * 1024;
/** The wall clock and the monotonic one are compared until they were read this close together, or so many times. */
const CLOCK_GAP_NS = 50_000n;
const CLOCK_TRIES = 20;
/** Between attempts at the first point of a group that has become whole. */
const GROUP_RETRY_MS = 1000;
/** Other devices of a group that do not know what was written to them after so long are taken to have changed. */
const OTHERS_KNOW_MS = 200;
/** While the cut waits for events up to the end of a read. */
const SETTLE_MS = 1;

/**
 * Called once, when everything that belongs to the point has been read and its instant is settled, before it is committed: lets the
 * writers go. True if they were held until then without a gap; false: the point is not of the class that was asked for.
 */
export type LetGo = () => Promise<boolean>;

/**
 * Memory that capture takes at most, for a device of `sizeBytes`, in bytes: the tables of the cut (194 MiB, and 32 MiB for
 * each TiB of the device), 32 MiB for each TiB of it if all of that cannot be read, `stageBytes` and 4 MiB, 4 MiB to read into, 32 MiB for lists. What the sink takes comes on top: for a repository some 16 MiB, and
 * while a scan runs what that takes (see baseline.ts).
 */
export function captureBytesAtMost(
  sizeBytes: number,
  options: Pick<LiveCaptureOptions, 'stageBytes' | 'maxSlots'> = {},
): number {
  return (
    tableBytesAtMost(blocksOf(sizeBytes), options.maxSlots) +
    badBytesAtMost(blocksOf(sizeBytes)) +
    stageBlocksOf(options) * BLOCK_BYTES +
    STAGE_STEP_BYTES +
    READERS * READ_BYTES +
    WORK_BYTES
  );
}

function stageBlocksOf(options: Pick<LiveCaptureOptions, 'stageBytes'>): number {
  return Math.max(
    READ_BYTES / BLOCK_BYTES,
    Math.floor((options.stageBytes ?? 32 * 1024 * 1024) / BLOCK_BYTES),
  );
}

interface Waiter {
  readonly sinceNs: number;
  /** Until then the others of a group are waited for, at most. */
  readonly othersUntilNs: number;
  readonly pointClass: PointClass;
  readonly letGo: LetGo | undefined;
  readonly resolve: (point: CapturedPoint) => void;
  readonly reject: (error: unknown) => void;
}

type Attempt = 'point' | 'busy' | 'lost' | 'outage' | 'nothing';

/** What the other devices of a group have said to a cut that holds: claimed with them, or {@link Decision} anew. */
type Agreement =
  | { readonly kind: 'claimed'; readonly instantNs: number; readonly wallNs: bigint }
  | { readonly kind: 'alone' }
  | Decision;

interface Claimed {
  readonly rounds: number;
  readonly beganNs: number;
  /** As it was before the poll that the claim rests on. */
  readonly resyncs: number;
  readonly instantNs: number;
  /** Wall time of the instant, where the group has settled it. */
  readonly wallNs?: bigint;
}

/** See the file comment. `start` it; `stop` it. */
export class LiveCapture {
  /** Settles when capture has ended: resolves after {@link stop}, rejects when it could not go on. */
  readonly done: Promise<void>;
  private readonly o: LiveCaptureOptions;
  private readonly intervalMs: number;
  private readonly cut: IntervalCut;
  private readonly staging: Staging;
  private readonly slab: Uint8Array;
  /** Its parts, for as many reads. */
  private readonly slabs: readonly Uint8Array[];
  private readonly abort = new AbortController();
  private polling: Promise<void> = Promise.resolve();
  private waiters: Waiter[] = [];
  private unsynced: boolean;
  /** What is staged was not all committed with the point it belongs to, or a commit failed: the next point is coalesced. */
  private coalesced = false;
  private uncoveredNs = Number.POSITIVE_INFINITY;
  private startedNs: bigint | undefined;
  private fatal: B2Error | undefined;
  private lastPoint: CapturedPoint | undefined;
  private outage: B2Error | undefined;
  private completeToNs = 0;
  private lateSeen = 0;
  /** How long the slowest of the last points took from its beginning until it was durable. */
  private peakMs = 0;
  /** Failures of the sink in a row, and when the first of them was. */
  private failures = 0;
  private outageSinceNs = 0;
  /** Where the scan goes on, and what of the run under way is still to be read. */
  private scanBlock = 0;
  private scanLeftBytes = 0;
  private scanToldNs = Number.NEGATIVE_INFINITY;
  private recentBytes = 0;
  private recentNs = 0;
  /** How often track was lost or given up. */
  private resyncs = 0;
  private events = 0;
  private readBytes = 0;
  private readNs = 0;
  private points = 0;
  private spills = 0;
  private busy = 0;
  private losses = 0;
  private readonly seat: GroupSeat | undefined;
  /** Blocks that could not be read when that was tried last. */
  private readonly bad = new BadBlocks();
  private badTriedNs = 0;
  /** Where the next try at them begins. */
  private badBlock = 0;
  private lastEventNs = 0;
  /** Of the last poll. */
  private polledEvents = 0;
  /** Ends the pauses of both loops. */
  private waking = new AbortController();

  private constructor(options: LiveCaptureOptions) {
    this.o = options;
    this.intervalMs = options.intervalMs ?? 1000;
    const { sizeBytes } = options.device.facts;
    this.cut = new IntervalCut(blocksOf(sizeBytes), options.maxSlots);
    this.staging = new Staging(stageBlocksOf(options));
    this.slab = alignedMemory(READERS * READ_BYTES);
    this.slabs = Array.from({ length: READERS }, (_, i) =>
      this.slab.subarray(i * READ_BYTES, (i + 1) * READ_BYTES),
    );
    this.unsynced = options.isInSync !== true;
    if (this.unsynced) this.cut.invalidate(0);
    this.seat = this.takeSeat();
    this.abort.signal.addEventListener('abort', () => this.wake(), { once: true });
    this.done = this.run();
    // Whoever starts a capture learns of its end by awaiting `done`, perhaps much later.
    this.done.catch(() => undefined);
  }

  static start(options: LiveCaptureOptions): LiveCapture {
    return new LiveCapture(options);
  }

  /**
   * The first acknowledged point whose instant is not before now; made at once. Where nothing was written since the last point,
   * that one, if it is of the class asked for. Of a device of a group: nothing to any of its devices; `group` of the point is set only
   * if what each of them has of its instant holds everything that was over before now. `fuzzy`: one that lacks what cannot be read of the device will do. `pointClass` above `crash`: the caller has frozen the file systems (or quiesced the
   * application) and keeps them so until this settles: whoever cannot wait any longer aborts `signal` first (this rejects with
   * `interrupted` then) and lets the writers go after that. With `letGo` they are held only until everything is read, not until it
   * is stored as well; then this also rejects when they were not held so long (`failed`), or when the repository did not take the
   * point, instead of waiting for the next. `othersMs`: how long, at most, the other devices of a group are waited for until the point
   * is one of this device alone; default: as long as any attempt does. Rejects when capture ends first.
   */
  point(
    pointClass: PointClass = PointClass.crash,
    signal?: AbortSignal,
    letGo?: LetGo,
    othersMs = Number.POSITIVE_INFINITY,
  ): Promise<CapturedPoint> {
    if (this.abort.signal.aborted)
      return Promise.reject(
        new B2Error('interrupted', `the capture of ${this.path} is being stopped`),
      );
    if (signal?.aborted === true) return Promise.reject(this.givenUp());
    return new Promise((resolve, reject) => {
      const giveUp = (): void => {
        this.waiters = this.waiters.filter((w) => w !== waiter);
        reject(this.givenUp());
      };
      const settled = (): void => signal?.removeEventListener('abort', giveUp);
      const sinceNs = this.now();
      const waiter: Waiter = {
        sinceNs,
        othersUntilNs: sinceNs + othersMs * 1e6,
        pointClass,
        letGo,
        resolve: (point) => {
          settled();
          resolve(point);
        },
        reject: (error) => {
          settled();
          reject(error);
        },
      };
      signal?.addEventListener('abort', giveUp, { once: true });
      this.waiters.push(waiter);
      this.wake();
    });
  }

  private givenUp(): B2Error {
    return new B2Error('interrupted', `nobody waits any longer for a point of ${this.path}`);
  }

  /** Forgets what is known of the device: everything is read again while capture goes on. */
  resync(): void {
    this.resyncs++;
    this.unsynced = true;
    this.cut.invalidate(this.now());
    this.wake();
  }

  /**
   * Ends capture: tries for a last exact point for at most `finalMs`, lets the commit under way finish, and stops polling. What was
   * not committed is lost with this object; the next start has to find it (`needsResync`, or changes without a point).
   */
  async stop(finalMs = 0): Promise<void> {
    // While everything has to be read there is no point to be had in time, as a rule.
    if (
      finalMs > 0 &&
      this.nextScan() === undefined &&
      !this.abort.signal.aborted &&
      this.fatal === undefined
    ) {
      const timeUp = new AbortController();
      await Promise.race([
        this.point().catch(() => undefined),
        this.o.clock.sleep(finalMs, timeUp.signal),
        this.done.catch(() => undefined),
      ]);
      timeUp.abort();
    }
    this.abort.abort();
    await this.done;
  }

  status(): CaptureStatus {
    const lagNs = Math.max(0, this.now() - this.uncoveredNs);
    return {
      needsResync: this.unsynced,
      scan: this.unsynced ? this.scanned() : undefined,
      isCaughtUp:
        !this.unsynced && !this.cut.hasChanges && this.staging.size === 0 && this.bad.size === 0,
      lastPoint: this.lastPoint,
      lagMs: Number.isFinite(this.uncoveredNs) ? lagNs / 1e6 : 0,
      pendingBlocks: this.cut.pendingBlocks,
      stagedBlocks: this.staging.size,
      events: this.events,
      readBytes: this.readBytes,
      readMs: this.readNs / 1e6,
      points: this.points,
      spills: this.spills,
      busy: this.busy,
      losses: this.losses,
      memoryBytes:
        this.cut.bytes +
        this.staging.bytes +
        this.bad.bytes +
        READERS * READ_BYTES +
        (this.o.sink.memoryBytes ?? 0),
      readBytesPerSecond: this.recentNs > 0 ? (this.recentBytes / this.recentNs) * 1e9 : 0,
      unreadable: this.unreadable(),
      outage: this.outage,
    };
  }

  private unreadable(): { readonly bytes: number; readonly ranges: readonly ByteRange[] } {
    const { sizeBytes } = this.o.device.facts;
    const ranges = this.bad.ranges(sizeBytes);
    const last = Math.floor(sizeBytes / BLOCK_BYTES);
    const missing = this.bad.has(last) ? BLOCK_BYTES - (sizeBytes % BLOCK_BYTES) : 0;
    return { bytes: this.bad.size * BLOCK_BYTES - missing, ranges };
  }

  /** Of blocks that were to be read now, these could not be. */
  private noteBad(read: Iterable<number>, bad: readonly number[]): void {
    const before = this.bad.size;
    let removed = 0;
    if (before > 0) for (const block of read) removed += this.bad.delete(block) ? 1 : 0;
    for (const block of bad) this.bad.add(block);
    if (this.bad.size === before && removed === bad.length) return;
    if (before === 0) this.badTriedNs = this.now();
    const { bytes, ranges } = this.unreadable();
    this.tell({ type: 'unreadable', bytes, ranges });
  }

  /** Once in a while some of what could not be read is tried again, all of it in turn: each failure may take seconds. */
  private retryBad(): void {
    if (this.bad.size === 0) return;
    if (this.now() - this.badTriedNs < (this.o.badRetryMs ?? BAD_RETRY_MS) * 1e6) return;
    this.badTriedNs = this.now();
    const blocks = blocksOf(this.o.device.facts.sizeBytes);
    const from = this.badBlock;
    let left = Math.min(BAD_RETRY_BLOCKS, this.bad.size);
    for (const [begin, end] of [
      [from, blocks],
      [0, from],
    ] as const)
      for (const block of this.bad.within(begin, end)) {
        if (left === 0) return;
        left--;
        this.cut.unread(block, 1);
        this.badBlock = block + 1;
      }
  }

  /** Why nobody can have an exact point at present. */
  private unreadableError(): B2Error {
    const { bytes, ranges } = this.unreadable();
    return new B2Error(
      'failed',
      `there can be no exact point of ${this.path}: ${bytes} bytes of it cannot be read (the first at offset ${ranges[0]?.offset ?? 0})`,
      {
        hint: 'Check the disk (dmesg, smartctl). Points are of class fuzzy until it can be read or is written anew; "b2 points --all" lists them.',
      },
    );
  }

  /** In bytes of the device. */
  private scanned(): { readonly doneBytes: number; readonly totalBytes: number } {
    const totalBytes = this.o.device.facts.sizeBytes;
    const left = this.cut.unknownBlocks * BLOCK_BYTES + this.scanLeftBytes;
    return { doneBytes: Math.max(0, totalBytes - left), totalBytes };
  }

  private tellScan(): void {
    const now = this.now();
    if (now - this.scanToldNs < SCAN_EVENT_MS * 1e6) return;
    this.scanToldNs = now;
    this.tell({ type: 'scan', ...this.scanned() });
  }

  private get path(): string {
    return this.o.device.facts.path;
  }

  private now(): number {
    return Number(this.o.clock.monotonicNs() - this.o.source.originNs);
  }

  /** Both clocks are read as closely together as this process is let: what lies between the readings would move the instant. */
  private wallOf(sourceNs: number): bigint {
    const { clock, source } = this.o;
    let best: { readonly aheadNs: bigint; readonly gapNs: bigint } | undefined;
    for (let tries = 0; tries < CLOCK_TRIES; tries++) {
      const before = clock.monotonicNs();
      const wall = clock.nowNs();
      const gapNs = clock.monotonicNs() - before;
      if (best === undefined || gapNs < best.gapNs)
        best = { aheadNs: wall - (before + gapNs / 2n), gapNs };
      if (best.gapNs <= CLOCK_GAP_NS) break;
    }
    return source.originNs + BigInt(Math.round(sourceNs)) + (best?.aheadNs ?? 0n);
  }

  private tell(event: CaptureEvent): void {
    this.o.onEvent?.(event);
  }

  private async run(): Promise<void> {
    const { signal } = this.abort;
    let failure: unknown;
    const failed = (error: unknown): void => {
      // A scan that was stopped in the middle says so; that is what stopping means.
      if (!(signal.aborted && isKind(error, 'interrupted'))) failure ??= error;
    };
    const pump = this.pump().catch((error: unknown) => {
      failed(error);
      this.abort.abort();
    });
    try {
      await this.makePoints();
    } catch (error) {
      failed(error);
    } finally {
      this.abort.abort();
      this.seat?.leave();
      await pump;
    }
    const end = this.fatal ?? failure;
    for (const w of this.waiters.splice(0))
      w.reject(end ?? new B2Error('interrupted', `the capture of ${this.path} was stopped`));
    if (end !== undefined) throw end instanceof Error ? end : new Error(messageOf(end));
  }

  /** Keeps the source drained. */
  private async pump(): Promise<void> {
    const { signal } = this.abort;
    while (!signal.aborted) {
      const more = await this.poll(false);
      if (more) await new Promise<void>((resolve) => setImmediate(resolve));
      else await this.pause();
    }
  }

  /**
   * Between two polls, and between two looks at what is to be done: each wakes a processor, which costs whoever writes more than
   * what is done then. So it is longer while nothing is written and nobody waits, while little is written, and until `dueNs`, before
   * which nothing is to be done. Who cannot wait for that calls {@link wake}.
   */
  private async pause(dueNs = 0): Promise<void> {
    const { pollMs = 10 } = this.o;
    const idleMs = Math.max(pollMs, Math.min(IDLE_POLL_MS, this.intervalMs / 10));
    const nowNs = this.now();
    let ms = pollMs;
    if (this.waiters.length === 0 && this.seat === undefined && !this.unsynced) {
      const isIdle = !this.cut.hasChanges && nowNs - this.lastEventNs > IDLE_AFTER_MS * 1e6;
      if (isIdle) ms = idleMs;
      else if (dueNs > nowNs) ms = Math.min(idleMs, Math.max(SETTLE_MS, (dueNs - nowNs) / 1e6));
      else if (this.polledEvents < CALM_EVENTS) ms = Math.min(idleMs, CALM_FACTOR * pollMs);
    }
    await this.o.clock.sleep(ms, this.waking.signal);
  }

  private wake(): void {
    this.waking.abort();
    this.waking = new AbortController();
  }

  /** One poll; polls are one after the other. True if there is more to read at once. */
  private async poll(certain: boolean): Promise<boolean> {
    const before = this.polling;
    let release = (): void => undefined;
    this.polling = new Promise((resolve) => {
      release = resolve;
    });
    try {
      await before;
      const { source } = this.o;
      const poll = await source.poll(this.cut, { certain, signal: this.abort.signal });
      this.cut.advance(poll.completeToNs);
      this.completeToNs = Math.max(this.completeToNs, poll.completeToNs);
      this.events += poll.events;
      this.polledEvents = poll.events;
      if (poll.events > 0) this.lastEventNs = this.now();
      if (poll.loss !== undefined) this.lose(poll.loss);
      if (this.cut.lateCompletions > this.lateSeen) {
        const completions = this.cut.lateCompletions - this.lateSeen;
        this.lateSeen = this.cut.lateCompletions;
        this.tell({ type: 'late', completions, seq: this.lastPoint?.seq });
      }
      if (!Number.isFinite(this.uncoveredNs) && this.cut.pendingBlocks > 0)
        this.uncoveredNs = Math.max(0, this.cut.oldestPendingNs);
      return poll.more;
    } finally {
      release();
    }
  }

  private lose(loss: ChangeLoss): void {
    this.losses++;
    this.tell({ type: 'lost', loss });
    this.resync();
    if (loss.reason === 'resized' || loss.reason === 'opaque') {
      this.fatal = new B2Error('failed', loss.message, {
        retryable: loss.reason === 'resized',
        hint:
          loss.reason === 'resized'
            ? 'Capture has to begin anew with the new size.'
            : 'Watch this device with --source scan.',
      });
      this.abort.abort();
    }
  }

  private async makePoints(): Promise<void> {
    const { pollMs = 10 } = this.o;
    const { signal } = this.abort;
    let dueNs = 0;
    let firstDueNs = 0;
    let retryNs = 0;
    while (!signal.aborted) {
      this.retryBad();
      const isIdle = !this.cut.hasChanges && this.staging.size === 0;
      const run = this.nextScan();
      const call = run === undefined ? this.seat?.call : undefined;
      if (run !== undefined) {
        if (this.now() >= retryNs) {
          if (await this.scanRun(run)) continue;
          retryNs = this.now() + this.retryNs();
        }
      } else if (isIdle && !this.wantsEmptyPoint() && call === undefined) this.answerIdle();
      else if (
        this.now() >= dueNs ||
        call === 'now' ||
        (call === 'due' && this.now() >= firstDueNs) ||
        (this.waiters.length > 0 && this.outage === undefined)
      ) {
        const beganNs = this.now();
        const attempt = await this.attemptWithOthers(beganNs);
        firstDueNs = beganNs + GROUP_RETRY_MS * 1e6;
        // A write is in a durable point one interval after it was acknowledged, also if this one takes as long as the slowest.
        const leadMs = Math.min(LEAD_FACTOR * this.peakMs + pollMs, this.intervalMs / 2);
        dueNs =
          attempt === 'outage'
            ? this.now() + this.retryNs()
            : beganNs + (this.intervalMs - leadMs) * 1e6;
        if (attempt === 'point') continue;
      }
      await this.pause(run === undefined ? dueNs : 0);
    }
  }

  /** The run that the sink is to scan next. Nothing else is read before there is none. */
  private nextScan(): { readonly block: number; readonly count: number } | undefined {
    if (this.o.sink.scan === undefined || this.cut.unknownBlocks === 0) return undefined;
    return this.cut.nextRun(this.scanBlock, this.o.scanBlocks ?? SCAN_BLOCKS);
  }

  private retryNs(): number {
    const factor = Math.min(MAX_RETRY_FACTOR, 2 ** Math.max(0, this.failures - 1));
    return (this.o.retryMs ?? 1000) * factor * 1e6;
  }

  /** Notes and tells that the sink does not take what it was given. Throws what is no outage. */
  private out(error: unknown): void {
    this.coalesced = true;
    if (!(error instanceof B2Error) || error.kind === 'lost-claim' || error instanceof DeviceError)
      throw error;
    if (this.failures++ === 0) this.outageSinceNs = this.now();
    this.outage = error;
    this.tell({ type: 'outage', error });
  }

  private recovered(): void {
    if (this.outage === undefined) return;
    this.outage = undefined;
    this.failures = 0;
    this.tell({ type: 'recovered', outageMs: (this.now() - this.outageSinceNs) / 1e6 });
  }

  /** During an outage: whether it is worth reading anything for the sink. */
  private async isSinkReady(): Promise<boolean> {
    if (this.outage === undefined || this.o.sink.prepare === undefined) return true;
    try {
      await this.o.sink.prepare();
      return true;
    } catch (error) {
      this.out(error);
      return false;
    }
  }

  /** Lets the sink read a run of unknown blocks. False: it did not; the run is unknown still. */
  private async scanRun(run: { readonly block: number; readonly count: number }): Promise<boolean> {
    const { signal } = this.abort;
    if (!(await this.isSinkReady())) return false;
    if (this.staging.size > 0 && !(await this.spill())) return false;
    const { block, count } = run;
    const { sizeBytes } = this.o.device.facts;
    const runBytes = Math.min(count * BLOCK_BYTES, sizeBytes - block * BLOCK_BYTES);
    this.cut.takeRun(block, count);
    this.scanLeftBytes = runBytes;
    let isRead = false;
    try {
      const done = await this.o.sink.scan?.({
        block,
        count,
        sizeBytes,
        signal,
        onProgress: (doneBytes) => {
          this.scanLeftBytes = Math.max(0, runBytes - doneBytes);
          this.tellScan();
        },
      });
      if (done === undefined) throw new Error('a sink that cannot scan was asked to');
      isRead = true;
      this.cut.staged(block, count, this.now());
      this.noteBad([...this.bad.within(block, block + count)], done.unreadable ?? []);
      this.readBytes += done.readBytes;
      this.scanBlock = block + count;
      this.recovered();
      this.tell({ type: 'scanned', ...done });
      return true;
    } catch (error) {
      if (signal.aborted && isKind(error, 'interrupted')) return false;
      this.out(error);
      return false;
    } finally {
      if (!isRead) this.cut.unreadRun(block, count);
      this.scanLeftBytes = 0;
      if (isRead) this.tellScan();
    }
  }

  /**
   * Somebody waits for a point, before there was any or of a better class than the last, though nothing was written; or something was
   * to another device of the group, which who asks for a point of this one means as well.
   */
  private wantsEmptyPoint(): boolean {
    const best = this.lastPoint?.pointClass ?? PointClass.none;
    return this.waiters.some(
      (w) =>
        w.sinceNs <= this.completeToNs && (w.pointClass > best || this.others(w) === 'changed'),
    );
  }

  /** What has happened to the group until somebody asked. */
  private others(w: Waiter): Since {
    const { seat } = this;
    if (seat?.isWhole !== true) return 'idle';
    const since = seat.since(w.sinceNs);
    const isOver = this.now() - w.sinceNs > OTHERS_KNOW_MS * 1e6;
    return since === 'unknown' && isOver ? 'changed' : since;
  }

  /** Nothing has changed since the last point: it is as good as a new one, for who asked before the last poll. */
  private answerIdle(): void {
    const { lastPoint, seat } = this;
    this.uncoveredNs = Number.POSITIVE_INFINITY;
    if (lastPoint === undefined) return;
    const { group, ...own } = lastPoint;
    // While others are missing nobody knows what they were given since.
    const point = group !== undefined && seat?.isWhole === true ? lastPoint : own;
    this.answer(point, this.completeToNs, (w) => this.others(w) === 'idle');
  }

  private answer(
    point: CapturedPoint,
    coversNs: number,
    will: (w: Waiter) => boolean = () => true,
  ): void {
    const answered = this.waiters.filter(
      (w) => w.sinceNs <= coversNs && w.pointClass <= point.pointClass && will(w),
    );
    this.waiters = this.waiters.filter((w) => !answered.includes(w));
    for (const w of answered) w.resolve(point);
  }

  /** As the group sees this capture. */
  private takeSeat(): GroupSeat | undefined {
    const { group, source } = this.o;
    return group?.of.join(group.device, {
      originNs: source.originNs,
      isAble: () =>
        !this.unsynced &&
        this.outage === undefined &&
        this.bad.size === 0 &&
        !this.abort.signal.aborted,
      decide: () => {
        if (this.unsynced) return undefined;
        const decision = this.cut.decide();
        // What the last point holds was there at its instant, and perhaps not before.
        return decision.kind === 'wait'
          ? decision
          : { ...decision, loNs: Math.max(decision.loNs, this.cut.lastInstantNs) };
      },
      claim: (instantNs) => void this.cut.claim(instantNs),
      wallOf: (sourceNs) => this.wallOf(sourceNs),
      lastInstantNs: () => this.cut.lastInstantNs,
      unchangedToNs: () =>
        this.cut.hasChanges || this.staging.size > 0 ? undefined : this.completeToNs,
    });
  }

  private async attemptWithOthers(beganNs: number): Promise<Attempt> {
    if (!(await this.isSinkReady())) return 'outage';
    const { seat } = this;
    if (seat?.isWhole === true) seat.begin();
    try {
      return await this.attempt(beganNs);
    } finally {
      seat?.end();
    }
  }

  /** The cut holds, and lost events have just been asked for. Resolves with nothing between that and whatever was decided. */
  private async agree(decision: Decision, endNs: number): Promise<Agreement> {
    const { seat } = this;
    if (seat?.isTrying !== true) return decision;
    // Whoever comes while it waits may have frozen something.
    const untilNs = (): number =>
      this.waiters.reduce((least, w) => Math.min(least, w.othersUntilNs), endNs);
    const meeting = await seat.meet(this.completeToNs, untilNs, this.abort.signal);
    if (meeting.kind === 'claimed') return meeting;
    if (meeting.kind === 'again')
      return { kind: 'again', loNs: meeting.loNs, hiNs: this.cut.oldestPendingNs };
    seat.end();
    return meeting;
  }

  private async attempt(beganNs: number): Promise<Attempt> {
    const { signal } = this.abort;
    const endNs = beganNs + (this.o.attemptMs ?? ATTEMPT_INTERVALS * this.intervalMs) * 1e6;
    const maxRounds = this.o.maxRounds ?? 60;
    // What waits already is not younger than this, so that what comes meanwhile cannot keep the first round going.
    let limitNs = beganNs;
    for (let rounds = 1; ; rounds++) {
      const { resyncs } = this;
      const isTaken = await this.readDue(limitNs);
      if (!isTaken) return signal.aborted ? 'nothing' : 'outage';
      if (this.nextScan() !== undefined) return 'lost';
      if (!this.cut.hasChanges && !this.wantsEmptyPoint() && this.seat?.isTrying !== true)
        return 'nothing';
      let decision = this.cut.decide();
      while (
        decision.kind === 'wait' &&
        !signal.aborted &&
        this.now() < endNs + this.intervalMs * 1e6
      ) {
        await this.o.clock.sleep(SETTLE_MS, signal);
        await this.poll(false);
        decision = this.cut.decide();
      }
      if (decision.kind === 'holds') {
        await this.poll(true);
        if (this.resyncs !== resyncs) return 'lost';
        decision = this.cut.decide();
        if (decision.kind === 'holds') {
          const agreed = await this.agree(decision, endNs);
          if (agreed.kind === 'claimed')
            return this.commitPoint({ rounds, beganNs, resyncs, ...agreed });
          if (agreed.kind === 'alone') {
            // The others were waited for in vain. This one's cut holds still, as a rule.
            await this.poll(true);
            if (this.resyncs !== resyncs) return 'lost';
            if (!this.cut.hasChanges && !this.wantsEmptyPoint()) return 'nothing';
            decision = this.cut.decide();
          } else decision = agreed;
          if (decision.kind === 'holds') {
            const instantNs = this.cut.claim();
            return this.commitPoint({ rounds, beganNs, resyncs, instantNs });
          }
        }
      }
      if (signal.aborted) return 'nothing';
      if (rounds >= maxRounds || this.now() >= endNs || decision.kind === 'wait') {
        this.busy++;
        this.coalesced = true;
        this.tell({
          type: 'busy',
          rounds,
          staged: this.staging.size,
          pending: this.cut.pendingBlocks,
          shortNs: decision.kind === 'again' ? decision.loNs - decision.hiNs : 0,
        });
        return 'busy';
      }
      limitNs = decision.loNs;
    }
  }

  /** Commits what was claimed, with nothing in between. */
  private async commitPoint(claimed: Claimed): Promise<Attempt> {
    const { rounds, beganNs, resyncs, instantNs, wallNs } = claimed;
    const cutMs = (this.now() - beganNs) / 1e6;
    const wasUnsynced = this.unsynced;
    const last = this.lastPoint;
    const gapNs =
      Number.isFinite(this.uncoveredNs) && last !== undefined
        ? instantNs - Math.max(this.uncoveredNs, last.instantSourceNs)
        : 0;
    const isLate = this.coalesced || gapNs > LATE_FACTOR * this.intervalMs * 1e6;
    // What is unknown of the device makes the point one that is not exact, and the time up to the next exact one unknown.
    const isFuzzy = this.bad.size > 0;
    const isUnknown = wasUnsynced || isFuzzy || last?.pointClass === PointClass.fuzzy;
    const coverage = isUnknown ? Coverage.unknown : isLate ? Coverage.coalesced : Coverage.exact;
    const wall = wallNs ?? this.wallOf(instantNs);
    const group = wallNs === undefined ? undefined : this.seat?.name;
    const holders = this.waiters.filter((w) => w.sinceNs <= instantNs);
    const heldClass = await this.letGo(holders);
    const pointClass = isFuzzy ? PointClass.fuzzy : heldClass;
    const done = await this.commit(pointClass, coverage, wall, group);
    if (done === undefined) {
      const error = this.outage ?? new B2Error('io', `the repository did not take the point`);
      for (const w of holders) if (w.letGo !== undefined) this.refuse(w, error);
      return 'outage';
    }
    // What was lost while it was committed came after its instant.
    if (this.resyncs === resyncs) this.unsynced = false;
    this.coalesced = false;
    // Nothing was taken to be read since the claim: what completed after the instant is pending, all of it.
    this.uncoveredNs = Math.max(instantNs, this.cut.oldestPendingNs);
    this.points++;
    const point: CapturedPoint = {
      seq: done.seq,
      instantNs: wall,
      instantSourceNs: instantNs,
      pointClass,
      coverage,
      blocks: done.blocks,
      storedBytes: done.storedBytes,
      rounds,
      cutMs,
      ageMs: (this.now() - instantNs) / 1e6,
      ...(group === undefined ? {} : { group }),
    };
    this.lastPoint = point;
    // The first one after a scan is no measure of those to come.
    if (!wasUnsynced)
      this.peakMs = Math.max((this.now() - beganNs) / 1e6, this.peakMs * LEAD_DECAY);
    this.tell({ type: 'point', point });
    if (isFuzzy)
      for (const w of holders)
        if (w.pointClass > PointClass.fuzzy) this.refuse(w, this.unreadableError());
    this.answer(point, instantNs);
    return 'point';
  }

  /** The class of a point for which these held the writers still, who are let go now (or with the answer). */
  private async letGo(holders: readonly Waiter[]): Promise<PointClass> {
    const held = await Promise.all(
      holders.map(async (w) => {
        if (w.letGo === undefined || (await w.letGo())) return w.pointClass;
        this.refuse(w, new B2Error('failed', `the writers to ${this.path} were not held still`));
        return PointClass.crash;
      }),
    );
    return held.reduce<PointClass>((best, c) => (c > best ? c : best), PointClass.crash);
  }

  private refuse(waiter: Waiter, error: B2Error): void {
    this.waiters = this.waiters.filter((w) => w !== waiter);
    waiter.reject(error);
  }

  /** Commits what is staged and empties the staging; undefined if the repository does not take it: then it is pending again. */
  private async commit(
    pointClass: PointClass,
    coverage: Coverage,
    instantNs: bigint,
    group?: string,
  ): Promise<(CommitDone & { readonly blocks: number }) | undefined> {
    const { sizeBytes } = this.o.device.facts;
    const content = this.staging.all(sizeBytes);
    try {
      const done = await this.o.sink.commit({
        pointClass,
        coverage,
        instantNs,
        startedNs: this.startedNs ?? instantNs,
        sizeBytes,
        content,
        group,
        unreadable: this.bad.size === 0 ? undefined : this.unreadable().ranges,
      });
      this.recovered();
      return { ...done, blocks: content.blocks.length };
    } catch (error) {
      for (const block of content.blocks) this.cut.unread(block, 1);
      this.out(error);
      return undefined;
    } finally {
      this.staging.clear();
      this.startedNs = undefined;
    }
  }

  /** Reads every block that is due at `limitNs` and stages it. False if capture ends or the repository is out. */
  private async readDue(limitNs: number): Promise<boolean> {
    for (;;) {
      if (this.nextScan() !== undefined) return true; // track was lost: what is due is not for us to read
      const blocks = this.cut.take(limitNs, TAKE_BLOCKS);
      if (blocks.length === 0) return true;
      let done = 0;
      try {
        while (done < blocks.length) {
          if (this.abort.signal.aborted) return false;
          const part = blocks.subarray(
            done,
            done + Math.min(this.staging.maxBlocks, READERS * (READ_BYTES / BLOCK_BYTES)),
          );
          if (!this.staging.hasRoomFor(part.length) && !(await this.spill())) return false;
          await this.read(part);
          done += part.length;
          if (this.unsynced) this.tellScan();
        }
      } finally {
        for (const block of blocks.subarray(done)) this.cut.unread(block, 1);
      }
    }
  }

  private async spill(): Promise<boolean> {
    this.coalesced = true;
    const coverage = this.unsynced ? Coverage.unknown : Coverage.coalesced;
    const done = await this.commit(PointClass.none, coverage, this.o.clock.nowNs());
    if (done === undefined) return false;
    this.spills++;
    this.tell({ type: 'spill', seq: done.seq, blocks: done.blocks });
    return true;
  }

  private async read(blocks: Float64Array): Promise<void> {
    this.startedNs ??= this.o.clock.nowNs();
    const runs: Float64Array[] = [];
    for (let i = 0; i < blocks.length;) {
      const first = blocks[i] ?? 0;
      let j = i + 1;
      while (j < blocks.length) {
        const b = blocks[j] ?? 0;
        if (b - (blocks[j - 1] ?? 0) > GAP_BLOCKS + 1 || (b - first + 1) * BLOCK_BYTES > READ_BYTES)
          break;
        j++;
      }
      runs.push(blocks.subarray(i, j));
      i = j;
    }
    const beganNs = this.now();
    const bytesBefore = this.readBytes;
    await this.readRuns(runs).catch((error: unknown) => {
      throw error instanceof B2Error
        ? error
        : new B2Error('io', `reading changed blocks of ${this.path}: ${messageOf(error)}`, {
            cause: error,
          });
    });
    const tookNs = this.now() - beganNs;
    this.readNs += tookNs;
    // What was read last counts most: half of the weight is in the last 64 MiB.
    const keep = 0.5 ** ((this.readBytes - bytesBefore) / RATE_BYTES);
    this.recentBytes = this.recentBytes * keep + (this.readBytes - bytesBefore);
    this.recentNs = this.recentNs * keep + tookNs;
  }

  /** Runs that are short are read many at a time where the device can, the others a few at a time. */
  private async readRuns(runs: readonly Float64Array[]): Promise<void> {
    const canBatch = this.o.device.readMany !== undefined;
    const isShort = (run: Float64Array): boolean => canBatch && spanOf(run) <= SHORT_RUN_BLOCKS;
    const short = runs.filter(isShort);
    if (short.length >= MIN_BATCH) await this.readShort(short);
    const others = short.length >= MIN_BATCH ? runs.filter((run) => !isShort(run)) : runs;
    let next = 0;
    await Promise.all(
      this.slabs.map(async (slab) => {
        for (let run = others[next++]; run !== undefined; run = others[next++])
          await this.readRun(run, slab);
      }),
    );
  }

  private async readShort(runs: readonly Float64Array[]): Promise<void> {
    const { device } = this.o;
    for (let i = 0; i < runs.length; i += READS_AT_ONCE) {
      let at = 0;
      const reads = runs.slice(i, i + READS_AT_ONCE).map((run) => {
        const into = this.slab.subarray(at, at + spanOf(run) * BLOCK_BYTES);
        at += into.byteLength;
        return { run, into, offset: (run[0] ?? 0) * BLOCK_BYTES };
      });
      const done = (await device.readMany?.(reads)) ?? [];
      const endNs = this.now();
      for (const [k, { run, into }] of reads.entries()) {
        if (done[k] === true) this.stageRun(run, into, into.byteLength, NOTHING, endNs);
        else await this.readRun(run, into);
      }
    }
  }

  private async readRun(blocks: Float64Array, slab: Uint8Array): Promise<void> {
    const first = blocks[0] ?? 0;
    const { device } = this.o;
    const offset = first * BLOCK_BYTES;
    const into = slab.subarray(0, spanOf(blocks) * BLOCK_BYTES);
    const length = Math.min(into.byteLength, device.facts.sizeBytes - offset);
    const bad = new Set(await readAround(device, into, offset, length));
    this.stageRun(blocks, into, length, bad, this.now());
  }

  /** A run has been read, `length` bytes to the start of `slab` but for blocks that could not be; that was over by `endNs`. */
  private stageRun(
    blocks: Float64Array,
    slab: Uint8Array,
    length: number,
    all: ReadonlySet<number>,
    endNs: number,
  ): void {
    const first = blocks[0] ?? 0;
    this.readBytes += length;
    // What lies between the blocks that are wanted is nobody's.
    const bad = blocks.filter((block) => all.has(block));
    if (bad.length > 0 || this.bad.size > 0) this.noteBad(blocks, [...bad]);
    for (let i = 0; i < blocks.length;) {
      const from = blocks[i] ?? 0;
      let count = 0;
      while (i < blocks.length && blocks[i] === from + count) {
        const at = (from + count - first) * BLOCK_BYTES;
        if (!all.has(from + count))
          this.staging.put(from + count, slab.subarray(at, Math.min(at + BLOCK_BYTES, length)));
        count++;
        i++;
      }
      this.cut.staged(from, count, endNs);
    }
  }
}

/** Blocks from the first to the last of a run. */
function spanOf(run: Float64Array): number {
  return (run.at(-1) ?? 0) - (run[0] ?? 0) + 1;
}
