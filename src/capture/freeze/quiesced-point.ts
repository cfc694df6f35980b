/**
 * Points of class `fs` and `app` of a device under live capture.
 *
 * **fs**: every mounted file system on the device is frozen (a frozen file system is synced, its journal is empty, and writers
 * wait) while the last blocks are read. So that they wait no longer than the bound, two ordinary points and a sync come first, the
 * rest is estimated, and nothing is frozen if it would not fit. They wait only until everything is read; storing the point comes
 * after the thaw. The point is called `fs` only if the thaw itself proves that nobody else (the helper at the bound, an
 * administrator) had thawed before.
 *
 * **app**: between a command that brings the application to rest and one that lets it go on; the file systems are frozen as for
 * `fs`, if there are any.
 *
 * A file system that cannot be frozen (FAT, as of /boot/efi) is synced, and the point is refused if anything was written to its
 * device between that and the thaw.
 */
import { constants } from 'node:fs';
import { open, readFile } from 'node:fs/promises';
import path from 'node:path';

import type { Clock } from '../../clock.js';
import type { DeviceFacts } from '../../devices/device.js';
import { SYSTEM_ROOTS } from '../../devices/sysfs.js';
import { B2Error, errnoOf, ioError, isKind, messageOf } from '../../errors.js';
import { className, PointClass } from '../../format/commit.js';
import { formatBytes } from '../../human.js';
import { syncFs } from '../../syscalls.js';
import { BLOCK_BYTES } from '../../units.js';
import type { CapturedPoint, CaptureStatus, LiveCapture } from '../live-capture.js';
import { Freezer, type Frozen, type Thawed } from './freezer.js';
import { runHook, type Hooks } from './hooks.js';
import type { WatchedMount } from './mounts.js';

/** What writers may be made to wait. */
export const DEFAULT_FREEZE_MS = 100;
/** What a freeze and thaw of an idle file system and the reading of its last blocks take at least. */
const FLOOR_MS = 15;
/** The point is given up this much before the bound, so that the thaw is over by then. */
const THAW_MS = 15;
/** Of what is left of the bound, other devices of a group get this part; then the point is one of this device alone. */
const OTHERS_PART = 2 / 3;
/** What is assumed where nothing was measured. */
const USUAL_BYTES_PER_MS = 50_000;
const MIN_SAMPLE_BYTES = 1024 * 1024;
const ROUNDS = 2;
/** A writer that never pauses lets no ordinary point through: then it has to do that for so long everything due was read. */
const ROUND_MS = 1000;
/** Of all that comes before a freeze; then the answer is that the disk or the machine is too busy. */
const DEFAULT_LIMIT_MS = 60_000;
/** Rounds and freezes that are tried before the answer is no. */
const MAX_ATTEMPTS = 3;
/** After a freeze that was in vain the writers get this many times its bound for themselves, but not more than that time. */
const REST_FACTOR = 5;
const REST_MS = 1000;

/** What is needed of a {@link LiveCapture}. */
export interface PointMaker {
  readonly point: LiveCapture['point'];
  status(): Pick<CaptureStatus, 'pendingBlocks' | 'readBytes' | 'readMs'>;
}

/** What is needed of a {@link Freezer}. */
export type FreezesFor = Pick<Freezer, 'freeze' | 'isUsable'>;

export interface QuiesceOptions {
  readonly clock: Clock;
  readonly device: Pick<DeviceFacts, 'path'>;
  /** Name of the volume, for the hooks. */
  readonly volume: string;
  readonly pointClass: typeof PointClass.fs | typeof PointClass.app;
  /** Of class `app`. */
  readonly hooks?: Hooks | undefined;
  /** How long writers may be held, in milliseconds. Default {@link DEFAULT_FREEZE_MS}. */
  readonly boundMs?: number | undefined;
  /** A helper that runs already and is used again; without one a helper is started for this call. */
  readonly freezer?: FreezesFor | undefined;
  /** Aborting gives up (`interrupted`); nothing stays frozen. */
  readonly signal?: AbortSignal | undefined;
  /** What comes before each freeze (reading, syncing) may take so long before the point is given up. Default 60 000. */
  readonly limitMs?: number | undefined;
  /** Hears of every freeze that is over, also of those that were in vain. */
  readonly onFreeze?: ((freeze: Freeze) => void) | undefined;
  /** See {@link Freezer.start}. */
  readonly staleDir?: string | undefined;
  /** A post-point command that failed after the point was made: the point stands. */
  readonly warn?: ((error: B2Error) => void) | undefined;
}

/** A freeze that is over. */
export interface Freeze {
  /** For how long writers were held. */
  readonly frozenMs: number;
  readonly mountPoints: readonly string[];
}

export interface QuiescedPoint {
  readonly point: CapturedPoint;
  /** For how long writers were held, in milliseconds; 0 if nothing had to be frozen. The longest, if several attempts were needed. */
  readonly frozenMs: number;
  /** Mount points that were frozen. */
  readonly frozen: readonly string[];
  /** Mount points that cannot be frozen, and at whose devices nothing arrived meanwhile. */
  readonly stayedQuiet: readonly string[];
}

/**
 * Makes a point of class `fs` or `app`; see the file comment. `mounts` come from `mountsOf`, just now. Rejects with `refused` (a file
 * system that must not be frozen), `unsupported` (nothing is mounted there: a point of class crash is as good), `failed` (the bound
 * would not be, or was not, kept; a hook), `interrupted`. Whatever happens, nothing is frozen when it settles.
 */
export async function quiescedPoint(
  capture: PointMaker,
  mounts: readonly WatchedMount[],
  options: QuiesceOptions,
): Promise<QuiescedPoint> {
  const isApp = options.pointClass === PointClass.app;
  const bad = mounts.find((m) => m.holding === 'never');
  if (bad !== undefined) {
    throw new B2Error(
      'refused',
      `${bad.mountPoint} (${bad.device}) is not frozen for a point of ${options.device.path}: ${bad.why}`,
      {
        hint: 'Points of class crash are exact without freezing anything; or move what lies there.',
      },
    );
  }
  if (mounts.length === 0 && !isApp) {
    throw new B2Error(
      'unsupported',
      `there is no file system on ${options.device.path} to freeze: nothing on it is mounted here`,
      { hint: 'A point of class crash is as good then.' },
    );
  }
  const hooks = isApp ? options.hooks : undefined;
  if (isApp && hooks?.prePoint === undefined) {
    throw new B2Error('usage', `a point of class app needs a pre-point command`, {
      hint: 'It brings the application to rest; without one, ask for class fs.',
    });
  }
  // What is large is read before the application has to rest.
  await catchUp(capture, options);
  const needsOwn = options.freezer === undefined && mounts.some((m) => m.holding === 'freeze');
  const own = needsOwn
    ? await Freezer.start({
        clock: options.clock,
        ...(options.staleDir === undefined ? {} : { staleDir: options.staleDir }),
      })
    : undefined;
  const freezer = own ?? options.freezer;
  try {
    if (hooks?.prePoint === undefined) return await withFrozen(capture, mounts, freezer, options);
    return await betweenHooks(hooks, hooks.prePoint, options, () =>
      withFrozen(capture, mounts, freezer, options),
    );
  } finally {
    await own?.close();
  }
}

async function betweenHooks(
  hooks: Hooks,
  prePoint: string,
  options: QuiesceOptions,
  make: () => Promise<QuiescedPoint>,
): Promise<QuiescedPoint> {
  const { clock, signal } = options;
  const environment = {
    B2_VOLUME: options.volume,
    B2_DEVICE: options.device.path,
    B2_POINT_CLASS: className(options.pointClass),
  };
  const after = async (result: 'ok' | 'failed', seq: string): Promise<void> => {
    if (hooks.postPoint === undefined) return;
    // Not ended by the caller's signal: the application must be let go.
    await runHook(
      'post-point',
      hooks.postPoint,
      { ...environment, B2_RESULT: result, B2_POINT: seq },
      { clock, timeoutMs: hooks.timeoutMs },
    );
  };
  let made: QuiescedPoint;
  try {
    await runHook('pre-point', prePoint, environment, {
      clock,
      timeoutMs: hooks.timeoutMs,
      signal,
    });
    made = await make();
  } catch (error) {
    try {
      await after('failed', '');
    } catch (second) {
      const first = error instanceof B2Error ? error : undefined;
      throw new B2Error(
        first?.kind ?? 'failed',
        `${messageOf(error)}; and then ${messageOf(second)}`,
        { cause: error, hint: 'Make sure that the application is not at rest still.' },
      );
    }
    throw error;
  }
  try {
    await after('ok', String(made.point.seq));
  } catch (error) {
    // The point is good; the application may hang.
    options.warn?.(
      error instanceof B2Error ? error : new B2Error('failed', messageOf(error), { cause: error }),
    );
  }
  return made;
}

async function withFrozen(
  capture: PointMaker,
  mounts: readonly WatchedMount[],
  freezer: FreezesFor | undefined,
  options: QuiesceOptions,
): Promise<QuiescedPoint> {
  const { clock, signal } = options;
  const boundMs = options.boundMs ?? DEFAULT_FREEZE_MS;
  const toFreeze = mounts.filter((m) => m.holding === 'freeze');
  const toWatch = mounts.filter((m) => m.holding === 'watch');
  let longestMs = 0;
  let last: B2Error | undefined;
  for (let attempt = 1; attempt <= MAX_ATTEMPTS; attempt++) {
    const limit = new Limit(options);
    if (last !== undefined) await clock.sleep(Math.min(REST_MS, boundMs * REST_FACTOR), signal);
    const speed = new ReadSpeed(capture);
    for (let round = 0; round < ROUNDS; round++) {
      await limit.within(syncAll(mounts), 'syncing its file systems');
      await readRound(capture, options);
    }
    const beganNs = clock.monotonicNs();
    await limit.within(syncAll(mounts), 'syncing its file systems');
    const flushMs = Number(clock.monotonicNs() - beganNs) / 1e6;
    const pendingBytes = capture.status().pendingBlocks * BLOCK_BYTES;
    const needMs = FLOOR_MS + flushMs + pendingBytes / speed.bytesPerMs();
    if (toFreeze.length > 0 && needMs > boundMs) {
      last = new B2Error(
        'failed',
        `no point of class ${className(options.pointClass)} of ${options.device.path}: writers would have to wait about ${Math.ceil(needMs)} ms for it, ${Math.ceil(needMs - boundMs)} ms longer than the bound of ${boundMs} ms`,
        {
          retryable: true,
          hint: 'Ask again when less is written, or with a longer bound; points of class crash need no wait.',
        },
      );
      continue;
    }
    const quiet = new QuietWatch(toWatch);
    await quiet.begin();
    const frozen =
      toFreeze.length === 0 ? undefined : await tryFreeze(freezer, toFreeze, boundMs, options);
    if (frozen instanceof B2Error) {
      last = frozen;
      continue;
    }
    const mountPoints = toFreeze.map((m) => m.mountPoint);
    const result = await holdPoint(capture, { frozen, quiet, mountPoints }, boundMs, options);
    longestMs = Math.max(longestMs, result.frozenMs);
    if (!(result.point instanceof B2Error)) {
      return {
        point: result.point,
        frozenMs: longestMs,
        frozen: mountPoints,
        stayedQuiet: toWatch.map((m) => m.mountPoint),
      };
    }
    last = result.point;
  }
  throw last ?? new B2Error('failed', `no point of ${options.device.path} could be made`);
}

/**
 * Waits for a point, or until everything that was due has been read for {@link ROUND_MS}: then what is left is what is written all
 * the time. True if there was a point.
 */
async function readRound(capture: PointMaker, options: QuiesceOptions): Promise<boolean> {
  const { clock, signal } = options;
  const over = new AbortController();
  const abort = (): void => over.abort();
  if (signal?.aborted === true) abort();
  signal?.addEventListener('abort', abort, { once: true });
  const timer = new AbortController();
  void clock.sleep(ROUND_MS, timer.signal).then(() => {
    if (!timer.signal.aborted) abort();
  });
  try {
    await capture.point(PointClass.crash, over.signal);
    return true;
  } catch (error) {
    if (!over.signal.aborted || signal?.aborted === true || !isKind(error, 'interrupted'))
      throw error;
    return false;
  } finally {
    timer.abort();
    signal?.removeEventListener('abort', abort);
  }
}

/** Reads until there is a point, or what is left would fit into the bound. */
async function catchUp(capture: PointMaker, options: QuiesceOptions): Promise<void> {
  const { clock, limitMs = DEFAULT_LIMIT_MS, boundMs = DEFAULT_FREEZE_MS } = options;
  const speed = new ReadSpeed(capture);
  const endNs = clock.monotonicNs() + BigInt(limitMs) * 1_000_000n;
  for (;;) {
    if (await readRound(capture, options)) return;
    const pendingBytes = capture.status().pendingBlocks * BLOCK_BYTES;
    if (pendingBytes / speed.bytesPerMs() <= boundMs) return;
    if (clock.monotonicNs() < endNs) continue;
    throw tooBusy(
      options,
      `after ${limitMs / 1000} s there are still ${formatBytes(pendingBytes)} of changes to be read, and more come`,
    );
  }
}

function tooBusy(options: QuiesceOptions, why: string): B2Error {
  return new B2Error(
    'failed',
    `no point of class ${className(options.pointClass)} of ${options.device.path}: ${why}`,
    {
      retryable: true,
      hint: 'The disk or this machine is too busy. Ask again when less is written.',
    },
  );
}

/** The end of what may come before a freeze. */
class Limit {
  private readonly o: QuiesceOptions;
  private readonly limitMs: number;
  private readonly endNs: bigint;

  constructor(options: QuiesceOptions) {
    this.o = options;
    this.limitMs = options.limitMs ?? DEFAULT_LIMIT_MS;
    this.endNs = options.clock.monotonicNs() + BigInt(this.limitMs) * 1_000_000n;
  }

  /** What is waited for in vain goes on by itself: a sync cannot be called off. */
  async within(work: Promise<void>, doing: string): Promise<void> {
    const { clock, signal } = this.o;
    const timer = new AbortController();
    const abort = (): void => timer.abort();
    signal?.addEventListener('abort', abort, { once: true });
    const leftMs = Math.max(0, Number(this.endNs - clock.monotonicNs()) / 1e6);
    const late = clock.sleep(leftMs, timer.signal).then(() => {
      throw signal?.aborted === true
        ? new B2Error('interrupted', `the point of ${this.o.device.path} was given up`)
        : tooBusy(this.o, `${doing} takes longer than ${this.limitMs / 1000} s`);
    });
    late.catch(() => undefined);
    work.catch(() => undefined); // seen by whoever waits, if somebody does
    try {
      await Promise.race([work, late]);
    } finally {
      timer.abort();
      signal?.removeEventListener('abort', abort);
    }
  }
}

/**
 * An error that another attempt may not meet is returned. A freeze that was slow has held writers as well: the kernel stops them before
 * it syncs, and cannot be told to give up. How long is known from outside only, so what is told is never less.
 */
async function tryFreeze(
  freezer: FreezesFor | undefined,
  mounts: readonly WatchedMount[],
  boundMs: number,
  { clock, onFreeze }: QuiesceOptions,
): Promise<Frozen | B2Error> {
  if (freezer === undefined) throw new Error('file systems to freeze and nothing to freeze them');
  const beganNs = clock.monotonicNs();
  try {
    return await freezer.freeze(mounts, boundMs);
  } catch (error) {
    const frozenMs = Number(clock.monotonicNs() - beganNs) / 1e6;
    if (frozenMs > boundMs) onFreeze?.({ frozenMs, mountPoints: mounts.map((m) => m.mountPoint) });
    if (error instanceof B2Error && error.retryable && freezer.isUsable) return error;
    throw error;
  }
}

/** Asks for the point while everything is held, and lets go as soon as it is read, at the bound, or when `signal` aborts. */
async function holdPoint(
  capture: PointMaker,
  held: {
    readonly frozen: Frozen | undefined;
    readonly quiet: QuietWatch;
    readonly mountPoints: readonly string[];
  },
  boundMs: number,
  options: QuiesceOptions,
): Promise<{ readonly point: CapturedPoint | B2Error; readonly frozenMs: number }> {
  const { clock, signal } = options;
  const { frozen, quiet, mountPoints } = held;
  const giveUp = new AbortController();
  const abort = (): void => giveUp.abort();
  signal?.addEventListener('abort', abort, { once: true });
  if (signal?.aborted === true) abort();
  const isOver = new AbortController();
  let isTimeUp = false;
  let othersMs: number | undefined;
  if (frozen !== undefined) {
    const leftMs = boundMs - THAW_MS - Number(clock.monotonicNs() - frozen.sinceNs) / 1e6;
    othersMs = Math.max(0, leftMs * OTHERS_PART);
    void clock.sleep(Math.max(0, leftMs), isOver.signal).then(() => {
      if (isOver.signal.aborted) return;
      isTimeUp = true;
      abort();
    });
  }
  let written: string | undefined;
  let thawed: Thawed | undefined;
  const letGo = async (): Promise<boolean> => {
    isOver.abort();
    // Before the thaw: what is written after it belongs to no point.
    written = await quiet.disturbed();
    thawed = await frozen?.thaw();
    return written === undefined && thawed?.held !== false;
  };
  let point: CapturedPoint | undefined;
  let failure: B2Error | undefined;
  try {
    point = await capture.point(options.pointClass, giveUp.signal, letGo, othersMs);
  } catch (error) {
    if (!(error instanceof B2Error)) throw error;
    failure = error;
  } finally {
    isOver.abort();
    signal?.removeEventListener('abort', abort);
    thawed = await frozen?.thaw();
  }
  const frozenMs = thawed?.frozenMs ?? 0;
  if (thawed !== undefined) options.onFreeze?.({ frozenMs, mountPoints });
  if (point !== undefined) return { point, frozenMs };
  if (failure === undefined) throw new Error('neither a point nor a reason');
  if (signal?.aborted === true) throw failure;
  const name = className(options.pointClass);
  const of = `no point of class ${name} of ${options.device.path}`;
  const again = { retryable: true, cause: failure };
  if (isTimeUp) {
    failure = new B2Error(
      'failed',
      `${of}: what was left to read took longer than the bound of ${boundMs} ms`,
      {
        ...again,
        hint: 'Ask again when less is written, or with a longer bound; points of class crash need no wait.',
      },
    );
  } else if (written !== undefined) {
    failure = new B2Error(
      'failed',
      `${of}: ${written} was written to, and cannot be frozen`,
      again,
    );
  } else if (thawed?.held === false) {
    failure = new B2Error(
      'failed',
      `${of}: the file systems did not stay frozen: ${thawed.why}`,
      again,
    );
  } else if (failure.kind !== 'interrupted') throw failure;
  return { point: failure, frozenMs };
}

/** Bytes a millisecond that changed blocks were read with since this was made, or, where that is too little, altogether. */
class ReadSpeed {
  private readonly capture: PointMaker;
  private readonly bytes: number;
  private readonly ms: number;

  constructor(capture: PointMaker) {
    this.capture = capture;
    ({ readBytes: this.bytes, readMs: this.ms } = capture.status());
  }

  bytesPerMs(): number {
    const now = this.capture.status();
    const bytes = now.readBytes - this.bytes;
    if (bytes >= MIN_SAMPLE_BYTES) return bytes / Math.max(0.1, now.readMs - this.ms);
    if (now.readBytes >= MIN_SAMPLE_BYTES) return now.readBytes / Math.max(0.1, now.readMs);
    return USUAL_BYTES_PER_MS;
  }
}

async function syncAll(mounts: readonly WatchedMount[]): Promise<void> {
  for (const mount of mounts) {
    let file;
    try {
      file = await open(mount.openPath, constants.O_RDONLY | constants.O_NONBLOCK);
    } catch (error) {
      throw ioError('open', mount.mountPoint, error);
    }
    try {
      await syncFs(file.fd);
    } catch (error) {
      // A file system that was mounted read-only because of an error says EROFS: there is nothing to sync.
      if (errnoOf(error) !== 'EROFS') throw ioError('sync', mount.mountPoint, error);
    } finally {
      await file.close();
    }
  }
}

/** Tells whether anything reached the devices of file systems that cannot be frozen. */
class QuietWatch {
  private readonly mounts: readonly WatchedMount[];
  private before: readonly string[] = [];

  constructor(mounts: readonly WatchedMount[]) {
    this.mounts = mounts;
  }

  async begin(): Promise<void> {
    this.before = await this.counters();
  }

  /** The first mount point that was written to. */
  async disturbed(): Promise<string | undefined> {
    const now = await this.counters();
    return this.mounts.find((_, i) => now[i] !== this.before[i] || now[i]?.endsWith(' 0') !== true)
      ?.mountPoint;
  }

  /** Writes, discards, flushes and what is in flight, of each device. */
  private async counters(): Promise<readonly string[]> {
    return Promise.all(
      this.mounts.map(async ({ blockName }) => {
        const file = path.join(SYSTEM_ROOTS.sys, 'class/block', blockName, 'stat');
        try {
          const f = (await readFile(file, 'utf8')).trim().split(/\s+/);
          // Fields 5 and 7: writes and sectors; 12 and 14: discards; 9: in flight (Documentation/block/stat.rst).
          return [f[4], f[6], f[11] ?? '', f[13] ?? '', f[8]].join(' ');
        } catch (error) {
          throw ioError('read', file, error);
        }
      }),
    );
  }
}
