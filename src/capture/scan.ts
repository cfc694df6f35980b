/**
 * Scanning a device: reads all of it (or a range), stores every chunk that the repository does not hold, and says for each chunk
 * window where its data lie. With workers the pipeline runs in threads of its own; without, here.
 */
import type { Clock, Random } from '../clock.js';
import type { ByteRange, DeviceFacts, ReadDevice } from '../devices/device.js';
import { openReadDevice } from '../devices/open.js';
import type { DedupeIndex } from '../repo/dedupe/index.js';
import { contextOf, type RepositoryHandle } from '../repo/handle.js';
import { MAX_PACK_FRAMES } from '../format/frame.js';
import type { Store } from '../repo/store.js';
import { abortError, runWorkers, warmWorkers } from '../workers.js';
import { Placements, WINDOW_HOLE, WINDOW_UNKNOWN } from './placements.js';
import {
  COUNTERS,
  Counter,
  SEGMENT_BYTES,
  scanPart,
  type ScanPartResult,
  type ScanPlan,
  type ScanShared,
  type ScannedPack,
} from './scan-part.js';
import type { ScanJob } from './scan-worker.js';

/** How far a scan is. All in bytes of the device but `storedBytes`. */
export interface ScanStats {
  /** Of the range, whatever they turned out to be. */
  readonly doneBytes: number;
  /** Read from the device. */
  readonly readBytes: number;
  /** Zeros, holes not read included. */
  readonly zeroBytes: number;
  /** In chunks that the repository held already. */
  readonly duplicateBytes: number;
  /** In chunks that were stored. */
  readonly newBytes: number;
  /** What those take in the packs, footers not included. */
  readonly storedBytes: number;
  /** Chunks that are not all zeros. */
  readonly chunks: number;
  readonly newChunks: number;
}

export interface ScanOptions {
  /** A device that is open (it stays open), or the path of one. Threads open the path for themselves. */
  readonly device: ReadDevice | string;
  readonly handle: RepositoryHandle;
  /** The repository's store, open in this thread. */
  readonly store: Store;
  /** Open, up to date, without a session under way. */
  readonly index: DedupeIndex;
  /**
   * Threads. 0: in this thread, with `store` itself. More than 0 needs a handle with a `storeUrl`; without one the scan runs in this thread.
   */
  readonly workers: number;
  /** Part of the device, from a multiple of the chunk size, to another one or to the end. Default: all of it. */
  readonly range?: ByteRange | undefined;
  /** False: chunks that were in the repository before are stored again. Default true. */
  readonly reuse?: boolean | undefined;
  /**
   * Default `fail`: the error names device and offset. `collect`: unreadable blocks become zeros and are listed. `skip`: so does the
   * whole window (a chunk's worth) of one, for a caller who goes through those himself.
   */
  readonly onReadError?: 'fail' | 'collect' | 'skip' | undefined;
  readonly signal?: AbortSignal | undefined;
  readonly clock: Clock;
  readonly random: Random;
  /** Called a few times a second, and once at the end. */
  readonly onProgress?: ((stats: ScanStats, totalBytes: number) => void) | undefined;
}

export interface ScanResult {
  readonly facts: DeviceFacts;
  readonly placements: Placements;
  /** Written by this scan; sealed and durable. */
  readonly packs: readonly ScannedPack[];
  /** Packs that placements refer to and that this scan did not write (FORMAT.md 6.4 b). */
  readonly foreignPacks: readonly string[];
  /** With `collect`: ascending; blocks of these ranges that could not be read count as zeros. */
  readonly unreadable: readonly ByteRange[];
  /** Packs whose footer could not be read when a chunk of theirs was to be reused, so that it was stored again. */
  readonly unreadablePacks: readonly string[];
  readonly stats: ScanStats;
}

const SCAN_WORKER = new URL('./scan-worker.js', import.meta.url);
const PROGRESS_MS = 200;
/** Holes are asked for this much at a time. */
const HOLES_STEP_BYTES = 256 * SEGMENT_BYTES;

/** Starts the threads of a scan that is to come, while the repository is being opened. */
export function warmScan(workers: number): void {
  warmWorkers(SCAN_WORKER, workers);
}

/**
 * Scans. When it resolves, everything that the placements name is durable, the packs of the scan are sealed, and the index knows
 * them. When it rejects (B2Error: `io` of the device or store, `no-space`, `interrupted` or the signal's reason, …) nothing
 * is under way any more; packs that were finished stay, unreferenced, and are found by the next `refresh` of the index.
 */
export async function scanDevice(options: ScanOptions): Promise<ScanResult> {
  const { device } = options;
  if (typeof device !== 'string') return scanOpen(options, device);
  const opened = await openReadDevice(device);
  try {
    return await scanOpen(options, opened);
  } finally {
    await opened.close();
  }
}

async function scanOpen(options: ScanOptions, device: ReadDevice): Promise<ScanResult> {
  const { handle, index, signal } = options;
  const { facts } = device;
  const { chunkBytes, packBytes } = handle;
  const what = `the scan of ${facts.path}`;
  const range = options.range ?? { offset: 0, length: facts.sizeBytes };
  checkRange(range, chunkBytes, facts);
  const checkStop = (): void => {
    if (signal?.aborted === true) throw abortError(signal, what);
  };
  checkStop();

  const windows = Math.ceil(range.length / chunkBytes);
  const segments = Math.ceil(range.length / SEGMENT_BYTES);
  const threads =
    handle.storeUrl === undefined ? 0 : Math.min(options.workers, Math.max(1, segments));
  const parts = Math.max(1, threads);
  const plan: ScanPlan = {
    range,
    chunkBytes,
    packBytes,
    onReadError: options.onReadError ?? 'fail',
  };
  const shared: ScanShared = {
    placements: {
      packs: new SharedArrayBuffer(windows * 4),
      places: new SharedArrayBuffer(windows * 4),
    },
    data: new SharedArrayBuffer(windows),
    control: new SharedArrayBuffer(8),
    counters: new SharedArrayBuffer(parts * COUNTERS * 8),
  };
  new Uint32Array(shared.placements.packs).fill(WINDOW_UNKNOWN);

  // An incompressible chunk takes its own size and a little; every pack but the last of each worker is full.
  const mostPacks =
    Math.ceil((range.length * 1.02 + windows * 128) / packBytes) +
    Math.ceil(windows / (MAX_PACK_FRAMES - 8)) +
    parts;
  index.startSession(windows, mostPacks);
  let kept = false;
  const report = (): void => options.onProgress?.(statsOf(shared), range.length);
  const timer = options.onProgress === undefined ? undefined : setInterval(report, PROGRESS_MS);
  try {
    // Threads and the search for holes end together: one that fails stops the other.
    const stop = new AbortController();
    const stopOther = (): void => {
      if (signal !== undefined) stop.abort(abortError(signal, what));
    };
    signal?.addEventListener('abort', stopOther, { once: true });
    let results: ScanPartResult[];
    try {
      const checkBoth = (): void => {
        checkStop();
        if (stop.signal.aborted) throw abortError(stop.signal, what);
      };
      const holes = findHoles(device, plan, shared, checkBoth);
      const work =
        threads === 0
          ? scanHere(options, device, plan, shared, checkBoth).then((r) => [r])
          : scanInThreads(options, facts, plan, shared, threads, what, stop.signal);
      const failing = [work, holes].map(async (task) => {
        try {
          await task;
        } catch (error) {
          stop.abort(error); // only the first one counts
          throw error;
        }
      });
      const ended = await Promise.allSettled(failing);
      checkStop();
      if (ended.some((e) => e.status === 'rejected')) throw stop.signal.reason;
      results = await work;
    } finally {
      signal?.removeEventListener('abort', stopOther);
    }
    report();
    const result = finish(index, facts, plan, shared, results);
    kept = true;
    return result;
  } finally {
    clearInterval(timer);
    index.endSession(kept);
  }
}

function checkRange(range: ByteRange, chunkBytes: number, facts: DeviceFacts): void {
  const end = range.offset + range.length;
  const whole = (n: number): boolean => Number.isSafeInteger(n) && n >= 0 && n % chunkBytes === 0;
  if (
    !whole(range.offset) ||
    end > facts.sizeBytes ||
    (end !== facts.sizeBytes && !whole(end)) ||
    range.length < 0
  ) {
    throw new RangeError(
      `cannot scan bytes ${range.offset} to ${end} of ${facts.path}: not whole chunks of the device`,
    );
  }
}

async function scanHere(
  options: ScanOptions,
  device: ReadDevice,
  plan: ScanPlan,
  shared: ScanShared,
  checkStop: () => void,
): Promise<ScanPartResult> {
  const ctx = contextOf(options.handle, options.store);
  return scanPart({
    index: 0,
    plan,
    shared,
    device,
    ctx,
    view: options.index.view(options.reuse ?? true),
    clock: options.clock,
    random: options.random,
    checkStop,
    yieldNow: () => new Promise((resolve) => setImmediate(resolve)),
  });
}

async function scanInThreads(
  options: ScanOptions,
  facts: DeviceFacts,
  plan: ScanPlan,
  shared: ScanShared,
  threads: number,
  what: string,
  signal: AbortSignal,
): Promise<ScanPartResult[]> {
  const { handle, index } = options;
  const job: ScanJob = {
    devicePath: facts.path,
    sizeBytes: facts.sizeBytes,
    devNumber: facts.devNumber,
    inode: facts.identity['inode'],
    storeUrl: handle.storeUrl ?? '',
    handle,
    plan,
    shared,
    dedupe: index.share(options.reuse ?? true),
  };
  return runWorkers<ScanJob, ScanPartResult>(
    SCAN_WORKER,
    Array.from({ length: threads }, () => job),
    { what, signal },
  );
}

/** Marks the windows that may hold data, ahead of the workers, which wait for it. */
async function findHoles(
  device: ReadDevice,
  plan: ScanPlan,
  shared: ScanShared,
  checkStop: () => void,
): Promise<void> {
  const { range, chunkBytes } = plan;
  const data = new Uint8Array(shared.data);
  const control = new Int32Array(shared.control);
  const end = range.offset + range.length;
  for (let from = range.offset; from < end; from += HOLES_STEP_BYTES) {
    checkStop();
    const length = Math.min(HOLES_STEP_BYTES, end - from);
    for (const found of await device.dataRanges(from, length)) {
      const first = Math.floor((found.offset - range.offset) / chunkBytes);
      const last = Math.ceil((found.offset + found.length - range.offset) / chunkBytes);
      data.fill(1, first, last);
    }
    Atomics.store(control, 1, Math.ceil((from + length - range.offset) / SEGMENT_BYTES));
  }
}

function statsOf(shared: ScanShared): ScanStats {
  const counters = new Float64Array(shared.counters);
  const sum = (counter: number): number => {
    let total = 0;
    for (let at = counter; at < counters.length; at += COUNTERS) total += counters[at] ?? 0;
    return total;
  };
  return {
    doneBytes: sum(Counter.done),
    readBytes: sum(Counter.read),
    zeroBytes: sum(Counter.zero),
    duplicateBytes: sum(Counter.duplicate),
    newBytes: sum(Counter.fresh),
    storedBytes: sum(Counter.stored),
    chunks: sum(Counter.chunks),
    newChunks: sum(Counter.freshChunks),
  };
}

/** Turns numbers of packs into indices of a table of their ids, and checks that no window was left out. */
function finish(
  index: DedupeIndex,
  facts: DeviceFacts,
  plan: ScanPlan,
  shared: ScanShared,
  results: readonly ScanPartResult[],
): ScanResult {
  const packOf = new Uint32Array(shared.placements.packs);
  const packIds: string[] = [];
  const foreignPacks: string[] = [];
  const indexOf = new Map<number, number>();
  let lastNumber = -1;
  let lastIndex = 0;
  for (let window = 0; window < packOf.length; window++) {
    const number = packOf[window] ?? WINDOW_UNKNOWN;
    if (number === WINDOW_HOLE) continue;
    if (number === WINDOW_UNKNOWN) {
      throw new Error(
        `the scan of ${facts.path} has left out byte ${plan.range.offset + window * plan.chunkBytes}`,
      );
    }
    if (number !== lastNumber) {
      let at = indexOf.get(number);
      if (at === undefined) {
        at = packIds.push(index.packIdOf(number)) - 1;
        indexOf.set(number, at);
        if (!index.isOwn(number)) foreignPacks.push(index.packIdOf(number));
      }
      lastNumber = number;
      lastIndex = at;
    }
    packOf[window] = lastIndex;
  }
  return {
    facts,
    placements: new Placements(plan.range, plan.chunkBytes, packIds, shared.placements),
    packs: results.flatMap((r) => r.packs),
    foreignPacks,
    unreadable: joined(results.flatMap((r) => r.unreadable)),
    unreadablePacks: index.unreadablePacks(),
    stats: statsOf(shared),
  };
}

/** Ascending, neighbours made one. */
function joined(ranges: readonly ByteRange[]): ByteRange[] {
  const out: ByteRange[] = [];
  for (const range of ranges.toSorted((a, b) => a.offset - b.offset)) {
    const last = out.at(-1);
    if (last !== undefined && last.offset + last.length === range.offset) {
      out[out.length - 1] = { offset: last.offset, length: last.length + range.length };
    } else out.push(range);
  }
  return out;
}
