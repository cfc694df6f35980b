/**
 * Writes an image to a target: only what differs where the target holds most of it already, everything otherwise, and
 * reads it back.
 *
 * What a batch of the plan goes through: what the target must hold (from footers), what it holds (read and hashed),
 * the packs in order for what differs, sync, and the comparison once more.
 */
import type { Clock } from '../clock.js';
import type { ByteRange, WriteDevice } from '../devices/device.js';
import { B2Error, isKind } from '../errors.js';
import type { EventSink } from '../events.js';
import { HASH_BYTES } from '../hash.js';
import { alignedMemory } from '../memory.js';
import { startProgress, type Progress } from '../progress.js';
import { contextOf, type RepositoryHandle } from '../repo/handle.js';
import type { Store } from '../repo/store.js';
import { BLOCK_BYTES, roundUp } from '../units.js';
import {
  PieceState,
  pieceLength,
  pieceOffset,
  planBatches,
  type Batch,
  type SourceExtent,
} from './batch.js';
import {
  SLOTS,
  SLOT_BYTES,
  type DamagedFrame,
  type PassMode,
  type PassResult,
  type RunList,
} from './core.js';
import { DEFAULT_WORKERS, withCores, type Core } from './pool.js';

/** An image as a restore sees it. */
export interface ImageSource {
  readonly handle: RepositoryHandle;
  /** This thread's store. */
  readonly store: Store;
  readonly sizeBytes: number;
  /** All of it, ascending, without overlap; what is not named is zeros. May be asked for more than once. */
  extents(): AsyncIterable<readonly SourceExtent[]>;
}

export interface WriteImageOptions {
  /**
   * `auto` looks at a sample of the target and compares first if a quarter of it is there already; `always`, `never`.
   * A comparison reads the whole target and needs no data of packs for what is the same.
   */
  readonly compare: 'auto' | 'always' | 'never';
  /** True if the target is known to read as zeros everywhere (a file just made): holes stay holes, and no comparison. */
  readonly isBlank: boolean;
  /** Read the target back after writing. */
  readonly verify: boolean;
  /** `skip` writes zeros where data is damaged, and lists the ranges. */
  readonly onDamage: 'stop' | 'skip';
  readonly clock: Pick<Clock, 'monotonicNs'>;
  readonly events: EventSink;
  readonly signal?: AbortSignal | undefined;
  /** Threads, default {@link DEFAULT_WORKERS}; 0 works in this one. */
  readonly workers?: number | undefined;
  /** Pieces of a batch; for tests. */
  readonly batchPieces?: number | undefined;
  /**
   * The parts of a range of the target that hold data, where that can be known without reading (see
   * `ReadDevice.dataRanges`): reading back then passes over the rest.
   */
  readonly dataRanges?:
    ((offset: number, length: number) => Promise<readonly ByteRange[]>) | undefined;
}

export interface WriteImageResult {
  readonly sizeBytes: number;
  /** Bytes of the image that are stored; the rest is zeros. */
  readonly dataBytes: number;
  /** True if the target was compared first and only differences were written. */
  readonly compared: boolean;
  readonly writtenBytes: number;
  /** Runs of the target that were written. */
  readonly writtenExtents: number;
  /** Bytes that were made zeros (holes of the image on a target that was in use). */
  readonly zeroedBytes: number;
  readonly unchangedBytes: number;
  readonly repositoryReadBytes: number;
  readonly verified: boolean;
  /** Empty unless `onDamage` is `skip`. At most 1000 a batch are described. */
  readonly damagedFrames: readonly DamagedFrame[];
  /** Ranges of the target that hold zeros because their data is damaged. */
  readonly damagedRanges: readonly ByteRange[];
}

/** What a restore would do. */
export interface WritePlan {
  readonly sizeBytes: number;
  readonly dataBytes: number;
  readonly compared: boolean;
  /** Bytes that would be written, zeros included. */
  readonly differingBytes: number;
  readonly differingExtents: number;
  readonly zeroedBytes: number;
  readonly unchangedBytes: number;
  readonly repositoryReadBytes: number;
  /** From rates measured while planning. */
  readonly estimateSeconds: number;
}

const SAMPLE_PIECES = 64;
/** Of the sample, the part that must be there for a comparison to pay: reading costs less than writing and reading back. */
const SAMPLE_SHARE = 0.25;
/** Requests to the target under way for one slot of scattered runs. */
const WRITES_AT_ONCE = 4;
/** Zero calls under way. */
const ZEROS_AT_ONCE = 4;
/** Windows being read for one core. */
const WINDOWS_AT_ONCE = Math.min(3, SLOTS);
/** A hole is asked about (not read) in steps of this. */
const HOLE_STEP_BYTES = 1024 * 1024 * 1024;

/** Collects ranges that arrive in ascending order, joining neighbours. */
class Ranges {
  readonly list: { offset: number; length: number }[] = [];
  bytes = 0;

  add(offset: number, length: number): void {
    const last = this.list.at(-1);
    this.bytes += length;
    if (last !== undefined && last.offset + last.length === offset) last.length += length;
    else this.list.push({ offset, length });
  }
}

/** Counts ranges that arrive in ascending order as {@link Ranges} would join them, without keeping them. */
class RangeCount {
  bytes = 0;
  count = 0;
  private end = -1;

  add(offset: number, length: number): void {
    this.bytes += length;
    if (offset !== this.end) this.count++;
    this.end = offset + length;
  }
}

interface Totals {
  dataBytes: number;
  compared: boolean;
  writtenBytes: number;
  writtenExtents: number;
  zeroedBytes: number;
  repositoryReadBytes: number;
  readonly damagedFrames: DamagedFrame[];
  readonly damaged: Ranges;
  readonly wrong: Ranges;
}

/** The work on one target; `plan` changes nothing. */
class ImageWriter {
  private readonly source: ImageSource;
  private readonly device: Pick<WriteDevice, 'facts' | 'read' | 'write' | 'zero' | 'sync'>;
  private readonly options: WriteImageOptions;
  private readonly cores: readonly Core[];
  /** Undecided until the first batch with data has been looked at. */
  private compare: boolean | undefined;
  private progress: Progress | undefined;
  readonly totals: Totals = {
    dataBytes: 0,
    compared: false,
    writtenBytes: 0,
    writtenExtents: 0,
    zeroedBytes: 0,
    repositoryReadBytes: 0,
    damagedFrames: [],
    damaged: new Ranges(),
    wrong: new Ranges(),
  };

  constructor(
    source: ImageSource,
    device: Pick<WriteDevice, 'facts' | 'read' | 'write' | 'zero' | 'sync'>,
    options: WriteImageOptions,
    cores: readonly Core[],
  ) {
    this.source = source;
    this.device = device;
    this.options = options;
    this.cores = cores;
    if (options.isBlank || options.compare === 'never') this.compare = false;
    if (options.compare === 'always' && !options.isBlank) this.compare = true;
  }

  /** Bytes that a write of the current pass has put on the target. */
  wrote(bytes: number): void {
    this.progress?.add(bytes);
    this.advanced += bytes;
  }

  private advanced = 0;

  async write(): Promise<void> {
    const { verify, isBlank } = this.options;
    await this.eachBatch(async (batch) => {
      await this.decide(batch);
      if (this.progress === undefined) {
        const passes = 1 + (verify ? 1 : 0) + (this.compare === true ? 1 : 0);
        this.progress = startProgress({
          phase: `restoring ${this.device.facts.path}`,
          totalBytes: this.source.sizeBytes * passes,
          clock: this.options.clock,
          events: this.options.events,
        });
      }
      const holes = await this.choose(batch, !isBlank);
      this.countWanted(batch, holes);
      await this.phase(batch, async () => {
        await this.zero(holes);
        await this.pass(batch, 'write');
      });
      await this.device.sync();
      if (verify) await this.phase(batch, () => this.readBack(batch));
      this.noteDamage(batch);
    });
    this.progress?.finish();
  }

  /** The bytes that {@link write} would write. Marks nothing on the target. */
  async plan(): Promise<{ differing: RangeCount; seconds: number }> {
    const differing = new RangeCount();
    let seconds = 0;
    await this.eachBatch(async (batch) => {
      await this.decide(batch);
      if (this.compare === true) {
        this.progress ??= startProgress({
          phase: `comparing ${this.device.facts.path}`,
          totalBytes: this.source.sizeBytes,
          clock: this.options.clock,
          events: this.options.events,
        });
      }
      const startNs = this.options.clock.monotonicNs();
      const holes = await this.choose(batch, !this.options.isBlank);
      const compareSeconds = Number(this.options.clock.monotonicNs() - startNs) / 1e9;
      const wanted = this.countWanted(batch, holes);
      for (const range of merged(wanted.list, holes)) differing.add(range.offset, range.length);
      await this.pass(batch, 'cost');
      const rate =
        this.compare === true && compareSeconds > 0
          ? (batch.endBytes - batch.startBytes) / compareSeconds
          : await this.decodingRate(batch);
      const readBack = this.options.verify
        ? this.compare === true
          ? batch.endBytes - batch.startBytes
          : wanted.bytes
        : 0;
      if (rate > 0)
        seconds += (wanted.bytes + readBack) / rate + (this.compare === true ? compareSeconds : 0);
    });
    this.progress?.finish();
    return { differing, seconds };
  }

  private async eachBatch(work: (batch: Batch) => Promise<void>): Promise<void> {
    const batches = planBatches(this.source.extents(), {
      imageBytes: this.source.sizeBytes,
      chunkBytes: this.source.handle.chunkBytes,
      ...(this.options.batchPieces === undefined ? {} : { pieces: this.options.batchPieces }),
    });
    // The next batch is planned while this one is worked on; the one before is dead by then.
    let ahead = batches.next();
    try {
      for (;;) {
        const next = await ahead;
        if (next.done === true) return;
        ahead = batches.next();
        ahead.catch(() => undefined); // seen when it is awaited
        for (const core of this.cores) core.use(next.value);
        await work(next.value);
      }
    } finally {
      await ahead.catch(() => undefined);
    }
  }

  /** Runs a part of the work that covers the batch once, and tells the progress of what had no bytes to move. */
  private async phase<T>(batch: Batch, work: () => Promise<T>): Promise<T> {
    this.advanced = 0;
    const result = await work();
    this.progress?.add(Math.max(0, batch.endBytes - batch.startBytes - this.advanced));
    return result;
  }

  private async pass(batch: Batch, mode: PassMode, cores = this.cores): Promise<void> {
    Atomics.store(batch.control, 0, 0);
    const results: PassResult[] = await Promise.all(
      cores.map((core) => core.pass({ mode, onDamage: this.options.onDamage })),
    );
    for (const result of results) {
      if (mode !== 'ids') this.totals.repositoryReadBytes += result.readBytes;
      if (mode === 'write' || mode === 'parts') this.totals.damagedFrames.push(...result.damaged);
    }
  }

  /** Learns what the target must hold, and whether a comparison pays. */
  private async decide(batch: Batch): Promise<void> {
    if (this.compare === false || batch.count === 0) return;
    await this.pass(batch, 'ids');
    this.compare ??= await this.sampleMatches(batch);
  }

  private async sampleMatches(batch: Batch): Promise<boolean> {
    const { keys } = contextOf(this.source.handle, this.source.store);
    const hashes = Buffer.from(batch.hash.buffer, batch.hash.byteOffset, batch.hash.byteLength);
    const step = Math.max(1, Math.floor(batch.count / SAMPLE_PIECES));
    const into = Buffer.from(
      alignedMemory(roundUp(this.source.handle.chunkBytes, BLOCK_BYTES)).buffer,
    );
    let looked = 0;
    let same = 0;
    for (let piece = 0; piece < batch.count; piece += step) {
      const bytes = batch.bytes[piece] ?? 0;
      if (((batch.state[piece] ?? 0) & PieceState.known) === 0 || bytes === 0) continue;
      looked++;
      const part = into.subarray(0, roundUp(bytes, BLOCK_BYTES));
      const got = await this.readTolerant(part, pieceOffset(batch, piece));
      if (got === undefined || got < bytes) continue;
      const id = keys.chunkId(part.subarray(0, bytes));
      if (id.compare(hashes, piece * HASH_BYTES, (piece + 1) * HASH_BYTES) === 0) same++;
    }
    return looked > 0 && same >= looked * SAMPLE_SHARE;
  }

  /** Undefined where the target cannot be read: that is no reason not to write to it. */
  private async readTolerant(into: Buffer, offset: number): Promise<number | undefined> {
    try {
      return await this.device.read(into, offset);
    } catch (error) {
      if (isKind(error, 'io')) return undefined;
      throw error;
    }
  }

  /** Marks the pieces to be written; resolves to the ranges that must become zeros. */
  private async choose(batch: Batch, needsZeros: boolean): Promise<readonly ByteRange[]> {
    if (this.compare !== true) {
      for (let i = 0; i < batch.count; i++)
        batch.state[i] = (batch.state[i] ?? 0) | PieceState.wanted;
      return needsZeros ? holesOf(batch) : [];
    }
    this.totals.compared = true;
    await this.pass(batch, 'parts');
    const { notZero } = await this.phase(batch, () => this.check(batch, true));
    for (let i = 0; i < batch.count; i++) {
      const state = batch.state[i] ?? 0;
      if ((state & PieceState.differs) !== 0) batch.state[i] = state | PieceState.wanted;
    }
    return notZero;
  }

  private countWanted(batch: Batch, holes: readonly ByteRange[]): Ranges {
    const wanted = new Ranges();
    for (let i = 0; i < batch.count; i++) {
      const length = pieceLength(batch, i);
      this.totals.dataBytes += length;
      if (((batch.state[i] ?? 0) & PieceState.wanted) !== 0)
        wanted.add(pieceOffset(batch, i), length);
    }
    this.totals.writtenBytes += wanted.bytes;
    this.totals.writtenExtents += wanted.list.length;
    for (const hole of holes) this.totals.zeroedBytes += hole.length;
    return wanted;
  }

  private async zero(ranges: readonly ByteRange[]): Promise<void> {
    let next = 0;
    await lanes(
      times(ZEROS_AT_ONCE, async () => {
        const range = ranges[next++];
        if (range === undefined) return false;
        this.throwIfAborted();
        await this.device.zero(range.offset, range.length);
        this.wrote(range.length);
        return true;
      }),
    );
  }

  private async readBack(batch: Batch): Promise<void> {
    const { notZero } = await this.check(batch, false);
    const pieces = new Ranges();
    for (let i = 0; i < batch.count; i++) {
      if (((batch.state[i] ?? 0) & PieceState.differs) !== 0)
        pieces.add(pieceOffset(batch, i), pieceLength(batch, i));
    }
    for (const range of merged(pieces.list, notZero))
      this.totals.wrong.add(range.offset, range.length);
  }

  private noteDamage(batch: Batch): void {
    for (let i = 0; i < batch.count; i++) {
      const state = batch.state[i] ?? 0;
      if ((state & PieceState.damaged) !== 0 && (state & PieceState.wanted) !== 0) {
        this.totals.damaged.add(pieceOffset(batch, i), pieceLength(batch, i));
      }
    }
  }

  /**
   * Reads the whole batch from the target and marks the pieces that differ. `tolerant`: what cannot be read, or lies
   * past the target's end, counts as different; otherwise an unreadable target is an error.
   */
  private async check(batch: Batch, tolerant: boolean): Promise<{ notZero: readonly ByteRange[] }> {
    const windows = windowsOf(batch, this.options.dataRanges !== undefined);
    const notZero: ByteRange[] = [];
    const note = (flat: readonly number[]): void => {
      for (let i = 0; i + 1 < flat.length; i += 2)
        notZero.push({ offset: flat[i] ?? 0, length: flat[i + 1] ?? 0 });
    };
    const one = async (core: Core, slot: number, w: Window): Promise<void> => {
      const memory = core.slots[slot];
      if (memory === undefined) throw new Error(`no slot ${slot}`);
      const view = memory.subarray(0, roundUp(w.length, BLOCK_BYTES));
      const got = tolerant
        ? await this.readTolerant(view, w.offset)
        : await this.device.read(view, w.offset);
      if (got === undefined) {
        for (let piece = w.from; piece < w.to; piece++) {
          batch.state[piece] = (batch.state[piece] ?? 0) | PieceState.differs;
        }
        note(holesWithin(batch, w));
      } else {
        if (got < w.length && !tolerant) {
          throw new B2Error(
            'io',
            `${this.device.facts.path} ends at ${w.offset + got}, before the end of what was written`,
          );
        }
        view.fill(0, got);
        note(
          (await core.check({ slot, offset: w.offset, length: w.length, from: w.from, to: w.to }))
            .notZero,
        );
      }
      this.wrote(w.length);
    };
    await lanes(
      this.cores.flatMap((core) =>
        Array.from({ length: WINDOWS_AT_ONCE }, (_, slot) => async () => {
          const next = windows.next();
          if (next.done === true) return false;
          this.throwIfAborted();
          const w = next.value;
          if (w.length <= SLOT_BYTES && (w.from < w.to || this.options.dataRanges === undefined)) {
            await one(core, slot, w);
            return true;
          }
          // A hole: only the parts of it that hold something are read.
          const before = this.advanced;
          for (const range of (await this.options.dataRanges?.(w.offset, w.length)) ?? []) {
            for (let at = range.offset; at < range.offset + range.length; at += SLOT_BYTES) {
              const length = Math.min(SLOT_BYTES, range.offset + range.length - at);
              await one(core, slot, { offset: at, length, from: w.from, to: w.from });
            }
          }
          if (this.advanced === before) this.wrote(w.length);
          return true;
        }),
      ),
    );
    notZero.sort((a, b) => a.offset - b.offset);
    return { notZero };
  }

  /** Plain bytes per second at which the data of the batch's first pack can be read, opened and verified; 0 if unknown. */
  private async decodingRate(batch: Batch): Promise<number> {
    const core = this.cores[0];
    if (core === undefined || batch.count === 0) return 0;
    const first = { ...batch, packIds: batch.packIds.slice(0, 1) };
    Atomics.store(batch.control, 0, 0);
    core.use(first);
    const startNs = this.options.clock.monotonicNs();
    await core.pass({ mode: 'parts', onDamage: 'skip' });
    const seconds = Number(this.options.clock.monotonicNs() - startNs) / 1e9;
    core.use(batch);
    let bytes = 0;
    for (let i = batch.packStart[0] ?? 0; i < (batch.packStart[1] ?? 0); i++) {
      bytes += pieceLength(batch, batch.order[i] ?? 0);
    }
    return seconds > 0 ? (bytes / seconds) * this.cores.length : 0;
  }

  private throwIfAborted(): void {
    if (this.options.signal?.aborted !== true) return;
    throw new B2Error('interrupted', `the restore to ${this.device.facts.path} was interrupted`);
  }
}

/** Runs each step again and again until it says false; the first error is thrown, when all have come to rest. */
async function lanes(steps: readonly (() => Promise<boolean>)[]): Promise<void> {
  let failed = false;
  const settled = await Promise.allSettled(
    steps.map(async (step) => {
      try {
        while (!failed && (await step()));
      } catch (error) {
        failed = true;
        throw error;
      }
    }),
  );
  for (const result of settled) if (result.status === 'rejected') throw result.reason;
}

/** `step` as so many lanes. */
function times(count: number, step: () => Promise<boolean>): (() => Promise<boolean>)[] {
  return Array.from({ length: count }, () => step);
}

/** The parts of a batch that no piece covers. */
export function holesOf(batch: Batch): readonly ByteRange[] {
  const holes: ByteRange[] = [];
  let at = batch.startBytes;
  for (let i = 0; i < batch.count; i++) {
    const from = pieceOffset(batch, i);
    if (from > at) holes.push({ offset: at, length: from - at });
    at = from + pieceLength(batch, i);
  }
  if (batch.endBytes > at) holes.push({ offset: at, length: batch.endBytes - at });
  return holes;
}

interface Window {
  readonly offset: number;
  readonly length: number;
  readonly from: number;
  readonly to: number;
}

function holesWithin(batch: Batch, w: Window): number[] {
  const flat: number[] = [];
  let at = w.offset;
  for (let i = w.from; i < w.to; i++) {
    const from = pieceOffset(batch, i);
    if (from > at) flat.push(at, from - at);
    at = from + pieceLength(batch, i);
  }
  if (w.offset + w.length > at) flat.push(at, w.offset + w.length - at);
  return flat;
}

/**
 * Windows of at most a slot that together cover the batch; none cuts a piece. With `bigHoles`, windows without a piece
 * are up to {@link HOLE_STEP_BYTES}.
 */
export function* windowsOf(batch: Batch, bigHoles: boolean): Generator<Window, void> {
  let piece = 0;
  for (let offset = batch.startBytes; offset < batch.endBytes;) {
    const nextPiece = piece < batch.count ? pieceOffset(batch, piece) : batch.endBytes;
    if (bigHoles && nextPiece - offset >= SLOT_BYTES) {
      const length = Math.min(HOLE_STEP_BYTES, nextPiece - offset);
      yield { offset, length, from: piece, to: piece };
      offset += length;
      continue;
    }
    const limit = Math.min(offset + SLOT_BYTES, batch.endBytes);
    const from = piece;
    let end = offset;
    while (piece < batch.count) {
      const start = pieceOffset(batch, piece);
      const pieceEnd = start + pieceLength(batch, piece);
      if (pieceEnd > limit || (bigHoles && start - end >= SLOT_BYTES)) break;
      end = pieceEnd;
      piece++;
    }
    const next = piece < batch.count ? pieceOffset(batch, piece) : batch.endBytes;
    if (!(bigHoles && next - end >= SLOT_BYTES)) end = Math.min(next, limit);
    yield { offset, length: end - offset, from, to: piece };
    offset = end;
  }
}

/** Two ascending lists without overlap as one. */
function* merged(a: readonly ByteRange[], b: readonly ByteRange[]): Generator<ByteRange, void> {
  let i = 0;
  let j = 0;
  for (;;) {
    const x = a[i];
    const y = b[j];
    if (x !== undefined && (y === undefined || x.offset < y.offset)) {
      yield x;
      i++;
    } else if (y !== undefined) {
      yield y;
      j++;
    } else {
      return;
    }
  }
}

/** Ranges as a person reads them, at most `limit` of them. */
export function describeRanges(ranges: readonly ByteRange[], limit = 5): string {
  const shown = ranges.slice(0, limit).map((r) => `${r.offset} to ${r.offset + r.length - 1}`);
  const more = ranges.length > limit ? ` and ${ranges.length - limit} more ranges` : '';
  return `${shown.join(', ')}${more}`;
}

async function withWriter<T>(
  source: ImageSource,
  device: Pick<WriteDevice, 'facts' | 'read' | 'write' | 'zero' | 'sync'>,
  options: WriteImageOptions,
  work: (writer: ImageWriter) => Promise<T>,
): Promise<T> {
  let writer: ImageWriter | undefined;
  const write = async (slot: Buffer, runs: RunList): Promise<void> => {
    let next = 0;
    await lanes(
      times(Math.min(WRITES_AT_ONCE, runs.length / 3), async () => {
        const at = next;
        next += 3;
        const [target, from, length] = [runs[at], runs[at + 1], runs[at + 2]];
        if (target === undefined || from === undefined || length === undefined) return false;
        await device.write(slot.subarray(from, from + length), target);
        writer?.wrote(length);
        return true;
      }),
    );
  };
  return withCores(
    {
      handle: source.handle,
      store: source.store,
      workers: options.workers ?? DEFAULT_WORKERS,
      signal: options.signal,
      write,
      what: `the restore to ${device.facts.path}`,
    },
    async (cores) => {
      writer = new ImageWriter(source, device, options, cores);
      return work(writer);
    },
  );
}

/**
 * Writes `source` to `device`, which must be at least as large (a file: exactly as large). Memory: two batches of the
 * plan (58 MiB at most), 24 MiB a core, the footers of two open packs a core, and a batch's list of ranges that were zeroed or differ.
 *
 * Kinds: `damaged` or `io` for data that cannot be read (with `stop`), `io` and `no-space` of the target, `failed` if the
 * target does not hold what was written, `interrupted`. After any of them the target is incomplete; writing again
 * with `compare` goes on from what is there.
 */
export async function writeImage(
  source: ImageSource,
  device: Pick<WriteDevice, 'facts' | 'read' | 'write' | 'zero' | 'sync'>,
  options: WriteImageOptions,
): Promise<WriteImageResult> {
  const totals = await withWriter(source, device, options, async (writer) => {
    await writer.write();
    return writer.totals;
  });
  const wrong = totals.wrong;
  if (wrong.bytes > 0) {
    throw new B2Error(
      'failed',
      `${device.facts.path} does not hold what was written: ${wrong.bytes} bytes differ when read back (bytes ${describeRanges(wrong.list)})`,
      {
        hint: 'The disk or its cable or controller is failing (dmesg, smartctl -a), or something else writes to it. Do not use this target.',
      },
    );
  }
  return {
    sizeBytes: source.sizeBytes,
    dataBytes: totals.dataBytes,
    compared: totals.compared,
    writtenBytes: totals.writtenBytes,
    writtenExtents: totals.writtenExtents,
    zeroedBytes: totals.zeroedBytes,
    unchangedBytes: totals.compared
      ? source.sizeBytes - totals.writtenBytes - totals.zeroedBytes
      : 0,
    repositoryReadBytes: totals.repositoryReadBytes,
    verified: options.verify,
    damagedFrames: totals.damagedFrames,
    damagedRanges: totals.damaged.list,
  };
}

/** What {@link writeImage} would do. Reads the target if a comparison pays, and changes nothing. */
export async function planImage(
  source: ImageSource,
  device: Pick<WriteDevice, 'facts' | 'read'>,
  options: WriteImageOptions,
): Promise<WritePlan> {
  const refuse = (): Promise<never> => Promise.reject(new Error('a plan must not write'));
  const readOnly = {
    facts: device.facts,
    read: device.read.bind(device),
    write: refuse,
    zero: refuse,
    sync: refuse,
  };
  return withWriter(source, readOnly, options, async (writer) => {
    const { differing, seconds } = await writer.plan();
    const { totals } = writer;
    return {
      sizeBytes: source.sizeBytes,
      dataBytes: totals.dataBytes,
      compared: totals.compared,
      differingBytes: differing.bytes,
      differingExtents: differing.count,
      zeroedBytes: totals.zeroedBytes,
      unchangedBytes: totals.compared ? source.sizeBytes - differing.bytes : 0,
      repositoryReadBytes: totals.repositoryReadBytes,
      estimateSeconds: Math.ceil(seconds),
    };
  });
}
