/**
 * Live capture: a change source, a device to read from and the interval cut, made into a stream of commits.
 *
 * While there are writes a point is tried at every interval, less the time that points have taken lately to become durable, so
 * that a write is in a durable point one interval after it was acknowledged: blocks that changed are read, the cut is asked, blocks in its way
 * are read again, until it holds; then everything read since the last point is committed as one point of class `crash`. While
 * there are none, nothing is done. A point that does not come about within its time is tried again at the next interval with
 * what is staged already (`busy`).
 *
 * **Memory** is bounded: the tables of the cut (block-times.ts), `stageBytes` of blocks, 4 MiB to read into. **Overload**: when
 * the staged blocks fill their memory before a point is reached (a first scan, a resync, writes faster than the repository), they
 * go out as a commit of class `none`, which is no recovery point and is offered to nobody, and the next point builds on it. The
 * source is never stalled; while the repository does not take commits, changed blocks are only remembered.
 *
 * **Losing track** (and starting) makes every block pending: they are all read again while capture goes on; until that is done no
 * point is claimed, and the first one afterwards says that the time before it is `unknown`.
 *
 * One thread, no locks: polls and the making of points take turns at every await.
 */
import type { Clock } from '../clock.js';
import type { ChangeLoss, ChangeSource } from '../devices/change-source.js';
import type { ReadDevice } from '../devices/device.js';
import { B2Error, isKind, messageOf } from '../errors.js';
import { Coverage, PointClass } from '../format/commit.js';
import { alignedMemory } from '../memory.js';
import { BLOCK_BYTES, blocksOf } from '../units.js';
import { IntervalCut } from './interval-cut.js';
import { Staging, type StagedBlocks } from './staging.js';

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
}

/**
 * Where commits go. One call at a time. When `commit` rejects nothing of it counts, and it may be called again later with other
 * blocks: the sink then begins anew by itself.
 */
export interface CaptureSink {
  commit(commit: CaptureCommit): Promise<{ readonly seq: number; readonly storedBytes: number }>;
}

/** A point that was acknowledged. */
export interface CapturedPoint {
  readonly seq: number;
  /** Wall time. */
  readonly instantNs: bigint;
  /** Time of the source, see {@link ChangeSource.originNs}. */
  readonly instantSourceNs: number;
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
  /** Track was lost: everything is being read again. */
  | { readonly type: 'lost'; readonly loss: ChangeLoss }
  /** The repository did not take a commit; it is tried again. */
  | { readonly type: 'outage'; readonly error: B2Error }
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
  /** An attempt that has taken this long gives up until the next interval. Default: the interval. */
  readonly attemptMs?: number;
  readonly maxRounds?: number;
  /** Memory for blocks that wait for a commit. Default 32 MiB. */
  readonly stageBytes?: number;
  /** Time until a commit that the repository did not take is tried again. Default 1000. */
  readonly retryMs?: number;
  /** Bounds the tables of the cut (tests). */
  readonly maxSlots?: number;
  /**
   * True: the sink's newest commit is exactly the device as it was when the source was opened (the caller has proof), so that
   * nothing has to be read first. Default false: everything is read.
   */
  readonly isInSync?: boolean;
}

export interface CaptureStatus {
  /** True while every block has to be read again before a point can be claimed. */
  readonly needsResync: boolean;
  readonly lastPoint: CapturedPoint | undefined;
  /** Age of the oldest acknowledged write that no durable point holds; 0 if there is none. */
  readonly lagMs: number;
  readonly pendingBlocks: number;
  readonly stagedBlocks: number;
  readonly events: number;
  readonly readBytes: number;
  readonly points: number;
  readonly spills: number;
  readonly busy: number;
  readonly losses: number;
  readonly memoryBytes: number;
  /** Why the repository does not take commits at present. */
  readonly outage: B2Error | undefined;
}

const READ_BYTES = 1024 * 1024;
const READERS = 4;
/** Two blocks with no more than this many between them are read in one go. */
const GAP_BLOCKS = 16;
/** 1 GiB: so many block numbers are in memory at a time. */
const TAKE_BLOCKS = 1 << 18;
/** Points this much later than the interval are not `exact` but `coalesced`. */
const LATE_FACTOR = 2;
/** Points are begun this much earlier than they usually need. */
const LEAD_FACTOR = 1.5;
/** While the cut waits for events up to the end of a read. */
const SETTLE_MS = 1;

interface Waiter {
  readonly sinceNs: number;
  readonly pointClass: PointClass;
  readonly resolve: (point: CapturedPoint) => void;
  readonly reject: (error: unknown) => void;
}

type Attempt = 'point' | 'busy' | 'lost' | 'outage' | 'nothing';

/** See the file comment. `start` it; `stop` it. */
export class LiveCapture {
  /** Settles when capture has ended: resolves after {@link stop}, rejects when it could not go on. */
  readonly done: Promise<void>;
  private readonly o: LiveCaptureOptions;
  private readonly intervalMs: number;
  private readonly cut: IntervalCut;
  private readonly staging: Staging;
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
  /** How old points were lately when they were durable. */
  private usualAgeMs = 0;
  /** How often track was lost or given up. */
  private resyncs = 0;
  private events = 0;
  private readBytes = 0;
  private points = 0;
  private spills = 0;
  private busy = 0;
  private losses = 0;

  private constructor(options: LiveCaptureOptions) {
    this.o = options;
    this.intervalMs = options.intervalMs ?? 1000;
    const { sizeBytes } = options.device.facts;
    this.cut = new IntervalCut(blocksOf(sizeBytes), options.maxSlots);
    this.staging = new Staging(
      Math.max(
        READ_BYTES / BLOCK_BYTES,
        Math.floor((options.stageBytes ?? 32 * 1024 * 1024) / BLOCK_BYTES),
      ),
    );
    const slab = alignedMemory(READERS * READ_BYTES);
    this.slabs = Array.from({ length: READERS }, (_, i) =>
      slab.subarray(i * READ_BYTES, (i + 1) * READ_BYTES),
    );
    this.unsynced = options.isInSync !== true;
    if (this.unsynced) this.cut.invalidate(0);
    this.done = this.run();
    // Whoever starts a capture learns of its end by awaiting `done`, perhaps much later.
    this.done.catch(() => undefined);
  }

  static start(options: LiveCaptureOptions): LiveCapture {
    return new LiveCapture(options);
  }

  /**
   * The first acknowledged point whose instant is not before now; made at once. Where nothing was written since the last point,
   * that one, if it is of the class asked for. `pointClass` above `crash`: the caller has frozen the file systems (or quiesced the
   * application) and keeps them so until this settles: whoever cannot wait any longer aborts `signal` first (this rejects with
   * `interrupted` then) and lets the writers go after that. Rejects when capture ends first.
   */
  point(pointClass: PointClass = PointClass.crash, signal?: AbortSignal): Promise<CapturedPoint> {
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
      const waiter: Waiter = {
        sinceNs: this.now(),
        pointClass,
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
  }

  /**
   * Ends capture: tries for a last exact point for at most `finalMs`, lets the commit under way finish, and stops polling. What was
   * not committed is lost with this object; the next start has to find it (`needsResync`, or changes without a point).
   */
  async stop(finalMs = 0): Promise<void> {
    if (finalMs > 0 && !this.abort.signal.aborted && this.fatal === undefined) {
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
      lastPoint: this.lastPoint,
      lagMs: Number.isFinite(this.uncoveredNs) ? lagNs / 1e6 : 0,
      pendingBlocks: this.cut.pendingBlocks,
      stagedBlocks: this.staging.size,
      events: this.events,
      readBytes: this.readBytes,
      points: this.points,
      spills: this.spills,
      busy: this.busy,
      losses: this.losses,
      memoryBytes: this.cut.bytes + this.staging.bytes + READERS * READ_BYTES,
      outage: this.outage,
    };
  }

  private get path(): string {
    return this.o.device.facts.path;
  }

  private now(): number {
    return Number(this.o.clock.monotonicNs() - this.o.source.originNs);
  }

  private wallOf(sourceNs: number): bigint {
    const { clock, source } = this.o;
    return clock.nowNs() - (clock.monotonicNs() - (source.originNs + BigInt(Math.round(sourceNs))));
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
      else await this.o.clock.sleep(this.o.pollMs ?? 10, signal);
    }
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
    const { clock, pollMs = 10, retryMs = 1000 } = this.o;
    const { signal } = this.abort;
    let dueNs = 0;
    while (!signal.aborted) {
      const isIdle = !this.cut.hasChanges && this.staging.size === 0;
      if (isIdle && !this.wantsEmptyPoint()) this.answerIdle();
      else if (this.now() >= dueNs || (this.waiters.length > 0 && this.outage === undefined)) {
        const beganNs = this.now();
        const attempt = await this.attempt(beganNs);
        const periodMs =
          this.intervalMs - Math.min(LEAD_FACTOR * this.usualAgeMs, this.intervalMs / 2);
        dueNs = attempt === 'outage' ? this.now() + retryMs * 1e6 : beganNs + periodMs * 1e6;
        if (attempt === 'point') continue;
      }
      await clock.sleep(pollMs, signal);
    }
  }

  /** Somebody waits for a point, before there was any or of a better class than the last, though nothing was written. */
  private wantsEmptyPoint(): boolean {
    const best = this.lastPoint?.pointClass ?? PointClass.none;
    return this.waiters.some((w) => w.pointClass > best && w.sinceNs <= this.completeToNs);
  }

  /** Nothing has changed since the last point: it is as good as a new one, for who asked before the last poll. */
  private answerIdle(): void {
    const { lastPoint } = this;
    this.uncoveredNs = Number.POSITIVE_INFINITY;
    if (lastPoint !== undefined) this.answer(lastPoint, this.completeToNs);
  }

  private answer(point: CapturedPoint, coversNs: number): void {
    const isAnswered = (w: Waiter): boolean =>
      w.sinceNs <= coversNs && w.pointClass <= point.pointClass;
    const answered = this.waiters.filter(isAnswered);
    this.waiters = this.waiters.filter((w) => !isAnswered(w));
    for (const w of answered) w.resolve(point);
  }

  private async attempt(beganNs: number): Promise<Attempt> {
    const { signal } = this.abort;
    const endNs = beganNs + (this.o.attemptMs ?? this.intervalMs) * 1e6;
    const maxRounds = this.o.maxRounds ?? 60;
    // What waits already is not younger than this, so that what comes meanwhile cannot keep the first round going.
    let limitNs = beganNs;
    for (let rounds = 1; ; rounds++) {
      const { resyncs } = this;
      const isTaken = await this.readDue(limitNs);
      if (!isTaken) return signal.aborted ? 'nothing' : 'outage';
      if (!this.cut.hasChanges && !this.wantsEmptyPoint()) return 'nothing';
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
        if (decision.kind === 'holds') return this.commitPoint(rounds, beganNs);
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

  /** Claims and commits. Called with nothing between it and a decision that holds. */
  private async commitPoint(rounds: number, beganNs: number): Promise<Attempt> {
    const instantNs = this.cut.claim();
    const cutMs = (this.now() - beganNs) / 1e6;
    const uncoveredNs = this.cut.oldestPendingNs;
    const wasUnsynced = this.unsynced;
    const last = this.lastPoint;
    const gapNs =
      Number.isFinite(this.uncoveredNs) && last !== undefined
        ? instantNs - Math.max(this.uncoveredNs, last.instantSourceNs)
        : 0;
    const isLate = this.coalesced || gapNs > LATE_FACTOR * this.intervalMs * 1e6;
    const coverage = wasUnsynced ? Coverage.unknown : isLate ? Coverage.coalesced : Coverage.exact;
    const wall = this.wallOf(instantNs);
    const { resyncs } = this;
    // Who asked for a class holds the writers still from then on until the answer.
    const pointClass = this.waiters
      .filter((w) => w.sinceNs <= instantNs)
      .reduce<PointClass>((c, w) => (w.pointClass > c ? w.pointClass : c), PointClass.crash);
    const done = await this.commit(pointClass, coverage, wall);
    if (done === undefined) return 'outage';
    // What was lost while it was committed came after its instant.
    if (this.resyncs === resyncs) this.unsynced = false;
    this.coalesced = false;
    this.uncoveredNs = uncoveredNs;
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
    };
    this.lastPoint = point;
    this.usualAgeMs += (point.ageMs - this.usualAgeMs) / 4;
    this.tell({ type: 'point', point });
    this.answer(point, instantNs);
    return 'point';
  }

  /** Commits what is staged and empties the staging; undefined if the repository does not take it: then it is pending again. */
  private async commit(
    pointClass: PointClass,
    coverage: Coverage,
    instantNs: bigint,
  ): Promise<
    { readonly seq: number; readonly storedBytes: number; readonly blocks: number } | undefined
  > {
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
      });
      this.outage = undefined;
      return { ...done, blocks: content.blocks.length };
    } catch (error) {
      for (const block of content.blocks) this.cut.unread(block, 1);
      this.coalesced = true;
      if (!(error instanceof B2Error) || error.kind === 'lost-claim') throw error;
      this.outage = error;
      this.tell({ type: 'outage', error });
      return undefined;
    } finally {
      this.staging.clear();
      this.startedNs = undefined;
    }
  }

  /** Reads every block that is due at `limitNs` and stages it. False if capture ends or the repository is out. */
  private async readDue(limitNs: number): Promise<boolean> {
    for (;;) {
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
    let next = 0;
    await Promise.all(
      this.slabs.map(async (slab) => {
        for (let run = runs[next++]; run !== undefined; run = runs[next++])
          await this.readRun(run, slab);
      }),
    ).catch((error: unknown) => {
      throw error instanceof B2Error
        ? error
        : new B2Error('io', `reading changed blocks of ${this.path}: ${messageOf(error)}`, {
            cause: error,
          });
    });
  }

  private async readRun(blocks: Float64Array, slab: Uint8Array): Promise<void> {
    const first = blocks[0] ?? 0;
    const last = blocks.at(-1) ?? first;
    const { device } = this.o;
    const offset = first * BLOCK_BYTES;
    const length = Math.min((last - first + 1) * BLOCK_BYTES, device.facts.sizeBytes - offset);
    const got = await device.read(slab.subarray(0, (last - first + 1) * BLOCK_BYTES), offset);
    const endNs = this.now();
    if (got !== length)
      throw new B2Error(
        'io',
        `read ${length} bytes at offset ${offset} of ${this.path}: got ${got}`,
        {
          hint: 'The device has shrunk or is going away; check the kernel log (dmesg).',
        },
      );
    this.readBytes += got;
    for (let i = 0; i < blocks.length;) {
      const from = blocks[i] ?? 0;
      let count = 0;
      while (i < blocks.length && blocks[i] === from + count) {
        const at = (from + count - first) * BLOCK_BYTES;
        this.staging.put(from + count, slab.subarray(at, Math.min(at + BLOCK_BYTES, length)));
        count++;
        i++;
      }
      this.cut.staged(from, count, endNs);
    }
  }
}
