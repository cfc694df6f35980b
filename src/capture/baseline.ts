/**
 * The scan of a first capture or a resync: reads a run of the device, compares it with the volume's newest commit, and commits
 * (class `none`) what differs. Why that goes together with the interval cut is said in live-capture.ts.
 *
 * A window (a chunk's worth of the device) that the newest commit holds as zeros or as one chunk of its own, or not at all, goes the
 * way of a snapshot (scan.ts): read in threads, hashed, found by its id in the index of all chunks of the repository, stored if
 * it is not there; then the places are compared with those of the newest commit. So an unchanged window costs a read and a hash, and
 * a window that another volume holds is not stored either.
 *
 * Of a window that live capture has changed in part, no whole chunk is known, and its id would not be found. Such windows are read
 * here and compared block by block with the newest commit's own data; only blocks that differ are stored. So are windows with blocks that
 * cannot be read: what can be read of them is compared, the rest is told and left as the newest commit has it.
 *
 * **Memory** while a scan goes on: the index of chunks (at most 16 bytes for each chunk of the repository), some 32 MiB a thread, 10
 * bytes for each window of the run, 3 MiB to compare. Between scans: nothing.
 */
import { Coverage, PointClass } from '../format/commit.js';
import { B2Error, isKind } from '../errors.js';
import { alignedMemory } from '../memory.js';
import type { ByteRange, DeviceFacts, ReadDevice } from '../devices/device.js';
import type { BlockMap } from '../repo/blockmap.js';
import { CondemnedPlaces } from '../repo/condemned.js';
import { DedupeIndex } from '../repo/dedupe/index.js';
import { VolumeHistory } from '../repo/history.js';
import { openBlockMap } from '../repo/point.js';
import type { Repository } from '../repo/repository.js';
import { RepositoryImage } from '../repo/repository-image.js';
import { CondemnedError, type PlacedExtent, type VolumeWriter } from '../repo/volume-writer.js';
import { BLOCK_BYTES, blocksOf } from '../units.js';
import { abortError } from '../workers.js';
import { readAround } from './bad-blocks.js';
import { changedExtents, clipPlaced } from './changes.js';
import { DeviceError, type ScanOutcome, type ScanRequest } from './live-capture.js';
import { namingOldEnd, storeBlocks } from './pieces.js';
import type { ScannedExtent } from './placements.js';
import { scanDevice, type ScanResult } from './scan.js';
import { excludedPlaces } from './snapshot.js';
import { Staging } from './staging.js';

export interface RunScannerOptions {
  readonly repo: Repository;
  /** Open; threads open its path for themselves. */
  readonly device: ReadDevice;
  /** Threads; 0: none (stores that live in this thread). */
  readonly workers: number;
  /** URL for the threads' own stores; undefined: scan in this thread. */
  readonly storeUrl: string | undefined;
  /** Where the local copy of the index of chunks is kept. */
  readonly dedupeCacheFile: string | undefined;
  /** Said in every commit: source, host, device. */
  readonly facts: Readonly<Record<string, unknown>>;
  /** Hears of failures that cost nothing. */
  readonly warn: (error: B2Error) => void;
}

/** How often a run that met prune is scanned anew at once. */
const MAX_TRIES = 4;
const COMPARE_BYTES = 1024 * 1024;
/** Blocks that differ are stored this many at a time. */
const STAGE_BLOCKS = 1024;
const WORKER_BYTES = 32 * 1024 * 1024;
/** With so much unreadable in one run (4 MiB) a scan that tried every block might never end. What it passes over is tried later. */
const HASTY_FROM_BLOCKS = 1024;

/** What the newest commit says of the run. */
interface Tip {
  readonly history: VolumeHistory;
  readonly map: BlockMap;
  /** Blocks from here on count as changed: they were behind the end of the device then. */
  readonly endBlock: number;
}

/** Scans runs of one device for one volume. One call at a time. */
export class RunScanner {
  private readonly o: RunScannerOptions;
  private index: DedupeIndex | undefined;
  private scanBytes = 0;
  /** Made when first needed: of the device, of the newest commit. */
  private slabs: readonly [Uint8Array, Uint8Array] | undefined;

  constructor(options: RunScannerOptions) {
    this.o = options;
  }

  /** Bytes it takes now. */
  get memoryBytes(): number {
    return this.scanBytes + (this.index?.memoryBytes ?? 0);
  }

  /** Forgets the index of chunks, and keeps its local copy. Called when scanning is over; the next scan reads what it needs. */
  async release(): Promise<void> {
    const { index } = this;
    this.index = undefined;
    this.slabs = undefined;
    try {
      await index?.save();
    } catch (error) {
      if (!(error instanceof B2Error)) throw error;
      this.o.warn(error);
    }
  }

  /**
   * See {@link CaptureSink.scan}. `writer` commits to the volume; after a rejection it can only be closed. The run begins at a multiple of
   * the chunk size and ends at one, or at the end of the device.
   */
  async scan(writer: VolumeWriter, request: ScanRequest): Promise<ScanOutcome> {
    const { repo } = this.o;
    const condemned = new CondemnedPlaces(repo);
    await condemned.refresh();
    // All of the newest commit is in sealed packs and in the manifest then, and the index knows its chunks.
    await writer.finishPack();
    for (let tries = 1; ; tries++) {
      this.index ??= await DedupeIndex.open({
        ctx: repo.packContext(),
        cacheFile: this.o.dedupeCacheFile,
        signal: request.signal,
      });
      this.index.setExcluded(await excludedPlaces(repo, condemned));
      try {
        return await this.scanOnce(writer, request, this.index, !condemned.isUncertain);
      } catch (error) {
        if (!(error instanceof CondemnedError) || tries >= MAX_TRIES) throw error;
        await writer.reclaim();
        await condemned.refresh();
        await this.index.refresh({ signal: request.signal });
      } finally {
        this.scanBytes = 0;
      }
    }
  }

  private async scanOnce(
    writer: VolumeWriter,
    request: ScanRequest,
    index: DedupeIndex,
    reuse: boolean,
  ): Promise<ScanOutcome> {
    const { repo } = this.o;
    const { sizeBytes, block } = request;
    const chunkBlocks = blocksOf(repo.chunkBytes);
    const endBlock = block + request.count;
    const startedNs = repo.env.clock.nowNs();
    const work = new RunWork(writer, this.o, sizeBytes, startedNs);
    const tip = await this.openTip(writer, sizeBytes);
    try {
      const mixed =
        tip === undefined
          ? new Uint8Array(Math.ceil(request.count / chunkBlocks))
          : await mixedWindows(tip, block, endBlock, chunkBlocks);
      let mixedBytes = 0;
      for (const m of mixed) mixedBytes += m * repo.chunkBytes;
      this.scanBytes =
        mixed.length * 10 + 3 * COMPARE_BYTES + WORKER_BYTES * Math.max(1, this.o.workers);
      const scan = await this.scanWindows(request, mixed, mixedBytes, index, reuse);
      // What the scan has made of them holds zeros in the place of what it could not read.
      for (const { offset, length } of scan.unreadable) {
        const at = offset - block * BLOCK_BYTES;
        const last = Math.floor((at + length - 1) / repo.chunkBytes);
        for (let w = Math.floor(at / repo.chunkBytes); w <= last; w++) {
          mixedBytes += mixed[w] === 0 ? repo.chunkBytes : 0;
          mixed[w] = 1;
        }
      }
      const extents: PlacedExtent[] = [];
      const found = clearOf(mixed, scan.placements.extents(), block, chunkBlocks);
      if (tip === undefined) {
        for (const e of found) if (e.packId !== undefined) extents.push(e);
      } else {
        const before = Math.min(endBlock, tip.endBlock);
        const old = block < before ? tip.map.scan(block, before) : undefined;
        for await (const e of changedExtents(found, old, before, chunkBlocks)) extents.push(e);
      }
      writer.addOwnPacks(scan.packs.map((p) => p.packId));
      const unreadable =
        mixedBytes > 0 ? await this.compareMixed(work, tip, request, mixed, mixedBytes) : [];
      await work.commit(extents, scan.stats.storedBytes);
      const { newBytes, readBytes } = scan.stats;
      return {
        seq: work.seq,
        readBytes: readBytes + Math.min(mixedBytes, request.count * BLOCK_BYTES),
        changedBytes: newBytes + work.changedBlocks * BLOCK_BYTES,
        storedBytes: work.storedBytes,
        unreadable,
      };
    } finally {
      await tip?.history.close();
    }
  }

  private async openTip(writer: VolumeWriter, sizeBytes: number): Promise<Tip | undefined> {
    if (writer.tipSeq === 0) return undefined;
    const history = await VolumeHistory.open(this.o.repo, writer.volumeId);
    try {
      if (history.tip?.seq !== writer.tipSeq) {
        throw new B2Error(
          'failed',
          `the newest commit of volume ${writer.volumeId} is #${history.tip?.seq ?? 0}, not #${writer.tipSeq} as it was a moment ago`,
          { retryable: true, hint: 'If it stays so, run "b2 verify".' },
        );
      }
      const map = await openBlockMap(history, writer.tipSeq);
      const oldBytes = map.commit.sizeBytes;
      const endBlock =
        sizeBytes > oldBytes ? Math.floor(oldBytes / BLOCK_BYTES) : blocksOf(sizeBytes);
      return { history, map, endBlock };
    } catch (error) {
      await history.close();
      throw error;
    }
  }

  /** Reads and stores all windows but the mixed ones. */
  private async scanWindows(
    request: ScanRequest,
    mixed: Uint8Array,
    mixedBytes: number,
    index: DedupeIndex,
    reuse: boolean,
  ): Promise<ScanResult> {
    const { repo, device, workers, storeUrl } = this.o;
    const { chunkBytes } = repo;
    const offset = request.block * BLOCK_BYTES;
    const length = Math.min(request.count * BLOCK_BYTES, request.sizeBytes - offset);
    const facts: DeviceFacts = { ...device.facts, sizeBytes: request.sizeBytes };
    let result: ScanResult;
    try {
      result = await scanDevice({
        device: {
          ...bound(device),
          facts,
          dataRanges: withoutMixed(device, mixed, offset, chunkBytes),
        },
        handle: repo.handle(storeUrl),
        store: repo.store,
        index,
        workers,
        range: { offset, length },
        reuse,
        // Windows with such blocks are gone through in compareMixed.
        onReadError: 'skip',
        signal: request.signal,
        clock: repo.env.clock,
        random: repo.env.random,
        onProgress: (stats) => request.onProgress(Math.max(0, stats.doneBytes - mixedBytes)),
      });
    } catch (error) {
      if (isKind(error, 'io', 'not-found')) await this.checkDevice(request, error);
      throw error;
    }
    return result;
  }

  /** Throws {@link DeviceError} if the device is gone or another, so that `error` is its fault and not the repository's. */
  private async checkDevice(request: ScanRequest, error: B2Error): Promise<void> {
    const { device } = this.o;
    const was = device.facts;
    try {
      const now = await device.refresh();
      if (now.sizeBytes >= request.sizeBytes && now.devNumber === was.devNumber) {
        await device.read(this.memory()[0].subarray(0, BLOCK_BYTES), 0);
        return;
      }
    } catch (gone) {
      throw new DeviceError('io', `${was.path} cannot be read any more: ${error.message}`, {
        cause: gone,
        hint: 'The device has gone; check the kernel log (dmesg).',
      });
    }
    throw new DeviceError('io', `${was.path} is not the device it was: ${error.message}`, {
      cause: error,
      retryable: true,
    });
  }

  private memory(): readonly [Uint8Array, Uint8Array] {
    this.slabs ??= [alignedMemory(COMPARE_BYTES), Buffer.allocUnsafeSlow(COMPARE_BYTES)];
    return this.slabs;
  }

  /** Compares the mixed windows block by block with what the newest commit holds; returns the blocks that cannot be read. */
  private async compareMixed(
    work: RunWork,
    tip: Tip | undefined,
    request: ScanRequest,
    mixed: Uint8Array,
    mixedBytes: number,
  ): Promise<readonly number[]> {
    const unreadable: number[] = [];
    const zeros = Buffer.alloc(BLOCK_BYTES);
    const { repo, device } = this.o;
    const { chunkBytes } = repo;
    const [now, then] = this.memory();
    const image =
      tip === undefined
        ? undefined
        : new RepositoryImage({
            resolver: tip.map,
            packs: repo.packs,
            chunkBytes,
            sizeBytes: tip.map.commit.sizeBytes,
            logicalBlockBytes: device.facts.logicalBlockBytes,
          });
    const scanned = Math.max(0, request.count * BLOCK_BYTES - mixedBytes);
    let done = 0;
    for (let w = 0; w < mixed.length;) {
      if (mixed[w] === 0) {
        w++;
        continue;
      }
      let end = w + 1;
      while (end < mixed.length && mixed[end] === 1 && (end - w) * chunkBytes < COMPARE_BYTES)
        end++;
      if (request.signal.aborted)
        throw abortError(request.signal, `the scan of ${device.facts.path}`);
      const offset = request.block * BLOCK_BYTES + w * chunkBytes;
      const length = Math.min((end - w) * chunkBytes, request.sizeBytes - offset);
      // Behind the old end nothing is known, and every block has to be named (FORMAT.md section 8).
      const knownBytes = tip === undefined ? 0 : tip.endBlock * BLOCK_BYTES;
      const oldLength = Math.max(0, Math.min(length, knownBytes - offset));
      const [bad, isKnown] = await Promise.all([
        readAround(
          device,
          now.subarray(0, blocksOf(length) * BLOCK_BYTES),
          offset,
          length,
          unreadable.length >= HASTY_FROM_BLOCKS,
        ).catch((error: unknown) => deviceError(device, error)),
        image === undefined || oldLength === 0
          ? false
          : readOld(image, then.subarray(0, oldLength), offset),
      ]);
      const cannotBeRead = new Set(bad);
      for (const block of bad) unreadable.push(block);
      for (let at = 0; at < length; at += BLOCK_BYTES) {
        const stop = Math.min(at + BLOCK_BYTES, length);
        const block = (offset + at) / BLOCK_BYTES;
        if (cannotBeRead.has(block)) {
          if (tip !== undefined && block >= tip.endBlock)
            await work.put(block, zeros.subarray(0, stop - at));
        } else if (
          !isKnown ||
          stop > oldLength ||
          Buffer.compare(now.subarray(at, stop), then.subarray(at, stop)) !== 0
        )
          await work.put(block, now.subarray(at, stop));
      }
      done += length;
      request.onProgress(scanned + done);
      w = end;
    }
    return unreadable;
  }
}

function deviceError(device: ReadDevice, error: unknown): never {
  const why = error instanceof Error ? error.message : String(error);
  throw new DeviceError('io', `read of ${device.facts.path}: ${why}`, {
    cause: error,
    hint: 'The device is damaged or going away; check the kernel log (dmesg).',
  });
}

/** False if what the commit held cannot be read any more: then everything there counts as changed, which mends it. */
async function readOld(image: RepositoryImage, into: Uint8Array, offset: number): Promise<boolean> {
  try {
    await image.read(into, offset);
    return true;
  } catch (error) {
    if (isKind(error, 'damaged', 'not-found')) return false;
    throw error;
  }
}

/** The methods of a device, for an object that stands for it. */
function bound(device: ReadDevice): ReadDevice {
  return {
    facts: device.facts,
    read: (into, offset) => device.read(into, offset),
    dataRanges: (offset, length) => device.dataRanges(offset, length),
    refresh: () => device.refresh(),
    close: () => device.close(),
  };
}

/** What the comparing finds, and the commits of one run: more than one only where what differs fills packs. */
class RunWork {
  seq: number | undefined;
  changedBlocks = 0;
  storedBytes = 0;
  private readonly writer: VolumeWriter;
  private readonly options: RunScannerOptions;
  private readonly sizeBytes: number;
  private readonly startedNs: bigint;
  private readonly staging = new Staging(STAGE_BLOCKS);
  private extents: PlacedExtent[] = [];
  private newBytes = 0;

  constructor(
    writer: VolumeWriter,
    options: RunScannerOptions,
    sizeBytes: number,
    startedNs: bigint,
  ) {
    this.writer = writer;
    this.options = options;
    this.sizeBytes = sizeBytes;
    this.startedNs = startedNs;
  }

  /** Blocks come in ascending order. */
  async put(block: number, bytes: Uint8Array): Promise<void> {
    if (!this.staging.hasRoomFor(1)) await this.store();
    this.staging.put(block, bytes);
    this.changedBlocks++;
  }

  private async store(): Promise<void> {
    if (this.staging.size === 0) return;
    const pack = await this.writer.openPack();
    const before = pack.sizeBytes;
    for (const e of await storeBlocks(
      this.writer,
      this.staging.all(this.sizeBytes),
      this.sizeBytes,
    ))
      this.extents.push(e);
    this.newBytes += pack.sizeBytes - before;
    this.staging.clear();
    if (this.writer.wantsFinish) await this.commit([], 0);
  }

  /** Makes durable what was put, and `more`, which is stored already (`moreBytes` for it). No commit if there is nothing. */
  async commit(more: readonly PlacedExtent[], moreBytes: number): Promise<void> {
    const { writer } = this;
    await this.store();
    const extents = [...this.extents, ...more].sort((a, b) => a.block - b.block);
    this.extents = [];
    const storedBytes = this.newBytes + moreBytes;
    this.newBytes = 0;
    if (extents.length === 0) return;
    const { seq } = await writer.commit({
      pointClass: PointClass.none,
      coverage: Coverage.unknown,
      full: writer.tipSeq === 0,
      instantNs: this.options.repo.env.clock.nowNs(),
      startedNs: this.startedNs,
      sizeBytes: this.sizeBytes,
      extents: namingOldEnd(extents, writer.tipSizeBytes, this.sizeBytes),
      storedBytes,
      facts: this.options.facts,
    });
    this.seq = seq;
    this.storedBytes += storedBytes;
    if (writer.wantsFinish) await writer.finishPack();
  }
}

/**
 * For each window of blocks [from, to): 1 if the newest commit holds it neither as zeros nor as one chunk of its own, so that it
 * can only be compared with its data. Windows that reach behind what the commit can tell are 0.
 */
async function mixedWindows(
  tip: Tip,
  from: number,
  to: number,
  chunkBlocks: number,
): Promise<Uint8Array> {
  const mixed = new Uint8Array(Math.ceil((to - from) / chunkBlocks));
  const end = Math.min(to, tip.endBlock);
  if (from >= end) return mixed;
  for await (const batch of tip.map.scan(from, end)) {
    for (const e of batch) {
      const stop = e.block + e.count;
      // Windows that the extent does not hold from their first block to their last are mixed; so are those inside a longer chunk.
      for (let w = Math.floor((e.block - from) / chunkBlocks); from + w * chunkBlocks < stop; w++) {
        const first = from + w * chunkBlocks;
        const last = Math.min(first + chunkBlocks, to);
        if (last > end) continue;
        const isWhole =
          e.block <= first &&
          stop >= last &&
          (e.packId === undefined || (e.skip + first - e.block) % chunkBlocks === 0);
        if (!isWhole) mixed[w] = 1;
        else if (e.skip + e.count > chunkBlocks) {
          // All the whole windows of a run, and of a hole, are alike.
          const whole = Math.floor((stop - first) / chunkBlocks);
          if (whole > 1) w += whole - 1;
        }
      }
    }
  }
  return mixed;
}

/** The data ranges of a device but for mixed windows of the run at `offset`. */
function withoutMixed(
  device: ReadDevice,
  mixed: Uint8Array,
  runOffset: number,
  chunkBytes: number,
): ReadDevice['dataRanges'] {
  return async (offset, length) => {
    const out: ByteRange[] = [];
    for (const range of await device.dataRanges(offset, length)) {
      const end = range.offset + range.length;
      for (let at = range.offset; at < end;) {
        const isMixed = mixed[Math.floor((at - runOffset) / chunkBytes)] === 1;
        let stop = at;
        do stop = runOffset + (Math.floor((stop - runOffset) / chunkBytes) + 1) * chunkBytes;
        while (stop < end && (mixed[(stop - runOffset) / chunkBytes] === 1) === isMixed);
        stop = Math.min(stop, end);
        if (!isMixed) out.push({ offset: at, length: stop - at });
        at = stop;
      }
    }
    return out;
  };
}

/** Extents of a run from block `from` on, without the mixed windows, of which the scan knows nothing. */
function* clearOf(
  mixed: Uint8Array,
  extents: Iterable<ScannedExtent>,
  from: number,
  chunkBlocks: number,
): Generator<PlacedExtent> {
  for (const e of extents) {
    const end = e.block + e.count;
    for (let at = e.block; at < end;) {
      const w = (at - from) / chunkBlocks;
      const isMixed = mixed[w] === 1;
      let next = w + 1;
      while (from + next * chunkBlocks < end && (mixed[next] === 1) === isMixed) next++;
      const stop = Math.min(end, from + next * chunkBlocks);
      if (!isMixed) yield clipPlaced(e, at, stop, chunkBlocks);
      at = stop;
    }
  }
}
