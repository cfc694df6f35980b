/**
 * Groups: several devices that carry one file system, LVM group or database between them share one cut, so that a point of all of
 * them is one instant. Built of what captures one device:
 *
 * - the devices lie one behind the other in one space of blocks, each from a multiple of 4 MiB on, so that no chunk is of
 *   two and runs of a scan can be split between them; what lies between them reads as zeros, and is stored nowhere;
 * - the source delivers the events of all in that space, on one clock; what it says is complete is what is complete of every one, and
 *   what one of them loses is lost to all;
 * - the sink splits each commit: every volume gets one with the same instant, an empty one if nothing of it has changed. The point is
 *   acknowledged when it is durable on all of them. If one fails, the point does not count, and the group is out until
 *   all take commits again.
 *
 * **Restoring**: what belongs together has the same instant. A crash or an outage in the middle of a commit leaves some volumes with
 * a point of an instant that others lack: exact for that volume alone, but no point of the group. Restore all volumes at an
 * instant of {@link commonInstants}.
 */
import { B2Error, isKind } from '../errors.js';
import type {
  ChangeLoss,
  ChangeSink,
  ChangeSource,
  Poll,
  PollOptions,
} from '../devices/change-source.js';
import type { ByteRange, DeviceFacts, ReadDevice } from '../devices/device.js';
import { BLOCK_BYTES, blocksOf, roundUp } from '../units.js';
import {
  DeviceError,
  type CaptureCommit,
  type CaptureSink,
  type CommitDone,
  type ScanOutcome,
  type ScanRequest,
} from './live-capture.js';
import type { StagedBlocks } from './staging.js';

/** One device of a group. The caller opens and closes device and sink; the group's source closes the sources. */
export interface GroupMember {
  readonly device: ReadDevice;
  readonly source: ChangeSource;
  readonly sink: CaptureSink;
}

/** What {@link LiveCapture} takes for a group. */
export interface CaptureGroup {
  readonly device: ReadDevice;
  readonly source: ChangeSource;
  readonly sink: CaptureSink;
}

/** A multiple of every chunk's size, and what borders of runs of a scan are multiples of (IntervalCut.nextRun). */
const ALIGN_BLOCKS = 1024;

interface Placed {
  readonly member: GroupMember;
  /** In the group's space. */
  readonly firstBlock: number;
  readonly blocks: number;
  readonly sizeBytes: number;
}

/** Makes one device, source and sink of several, in the order given (which is that of `CapturedPoint.seqs`). At least one. */
export function captureGroup(members: readonly GroupMember[]): CaptureGroup {
  if (members.length === 0) throw new RangeError('a group without devices');
  const placed: Placed[] = [];
  let firstBlock = 0;
  for (const member of members) {
    const { sizeBytes } = member.device.facts;
    const blocks = blocksOf(sizeBytes);
    placed.push({ member, firstBlock, blocks, sizeBytes });
    firstBlock = roundUp(firstBlock + Math.max(1, blocks), ALIGN_BLOCKS);
  }
  return {
    device: new GroupDevice(placed),
    source: new GroupSource(placed),
    sink: new GroupSink(placed),
  };
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

class GroupDevice implements ReadDevice {
  readonly facts: DeviceFacts;
  private readonly placed: readonly Placed[];

  constructor(placed: readonly Placed[]) {
    this.placed = placed;
    const last = placed.at(-1);
    const names = (of: (f: DeviceFacts) => string): string =>
      placed.map((p) => of(p.member.device.facts)).join(' + ');
    this.facts = {
      path: names((f) => f.path),
      realPath: names((f) => f.realPath),
      kind: 'block',
      sizeBytes: last === undefined ? 0 : last.firstBlock * BLOCK_BYTES + last.sizeBytes,
      logicalBlockBytes: Math.max(...placed.map((p) => p.member.device.facts.logicalBlockBytes)),
      physicalBlockBytes: Math.max(...placed.map((p) => p.member.device.facts.physicalBlockBytes)),
      readOnly: placed.every((p) => p.member.device.facts.readOnly),
      devNumber: undefined,
      partitionOf: undefined,
      identity: {},
      diskSequence: undefined,
    };
  }

  async read(into: Uint8Array, offset: number): Promise<number> {
    const end = Math.min(offset + into.byteLength, this.facts.sizeBytes);
    let filled = offset;
    for (const { member, firstBlock, blocks, sizeBytes } of this.placed) {
      const start = firstBlock * BLOCK_BYTES;
      const from = Math.max(offset, start);
      const to = Math.min(offset + into.byteLength, start + blocks * BLOCK_BYTES);
      if (from >= to) continue;
      into.fill(0, filled - offset, from - offset);
      const part = into.subarray(from - offset, to - offset);
      const got = await member.device.read(part, from - start);
      if (got !== Math.min(to - start, sizeBytes) - (from - start))
        throw new B2Error('io', `${member.device.facts.path} ends at byte ${from - start + got}`, {
          hint: 'It has shrunk or is going away; check the kernel log (dmesg).',
        });
      part.fill(0, got);
      filled = to;
    }
    if (filled < end) into.fill(0, filled - offset, end - offset);
    return Math.max(0, end - offset);
  }

  dataRanges(offset: number, length: number): Promise<readonly ByteRange[]> {
    return Promise.resolve(length === 0 ? [] : [{ offset, length }]);
  }

  async refresh(): Promise<DeviceFacts> {
    for (const { member, sizeBytes } of this.placed) {
      const now = await member.device.refresh();
      if (now.sizeBytes !== sizeBytes)
        throw new B2Error('io', `${now.path} has ${now.sizeBytes} bytes now, not ${sizeBytes}`);
    }
    return this.facts;
  }

  close(): Promise<void> {
    return Promise.resolve();
  }
}

class GroupSource implements ChangeSource {
  readonly kind: 'trace' | 'scan';
  readonly isTimed: boolean;
  readonly originNs: bigint;
  private readonly parts: readonly {
    readonly source: ChangeSource;
    readonly sink: ShiftedSink;
    readonly deltaNs: number;
  }[];

  constructor(placed: readonly Placed[]) {
    const sources = placed.map((p) => p.member.source);
    this.kind = sources.every((s) => s.kind === 'trace') ? 'trace' : 'scan';
    this.isTimed = sources.every((s) => s.isTimed);
    this.originNs = sources.reduce(
      (o, s) => (s.originNs < o ? s.originNs : o),
      sources[0]?.originNs ?? 0n,
    );
    this.parts = placed.map(({ member: { source }, firstBlock }) => {
      const deltaNs = Number(source.originNs - this.originNs);
      return { source, deltaNs, sink: new ShiftedSink(firstBlock, deltaNs) };
    });
  }

  async poll(sink: ChangeSink, options: PollOptions = {}): Promise<Poll> {
    let completeToNs = Number.POSITIVE_INFINITY;
    let events = 0;
    let more = false;
    let loss: ChangeLoss | undefined;
    for (const part of this.parts) {
      part.sink.to = sink;
      const poll = await part.source.poll(part.sink, options);
      completeToNs = Math.min(completeToNs, poll.completeToNs + part.deltaNs);
      events += poll.events;
      more ||= poll.more;
      // One that ends capture is the one to tell.
      if (loss === undefined || poll.loss?.reason === 'resized' || poll.loss?.reason === 'opaque')
        loss = poll.loss ?? loss;
    }
    return { completeToNs, events, more, loss };
  }

  async close(): Promise<void> {
    const ended = await Promise.allSettled(this.parts.map((p) => p.source.close()));
    for (const end of ended) if (end.status === 'rejected') throw end.reason;
  }
}

class ShiftedSink implements ChangeSink {
  to: ChangeSink | undefined;
  private readonly firstBlock: number;
  private readonly deltaNs: number;

  constructor(firstBlock: number, deltaNs: number) {
    this.firstBlock = firstBlock;
    this.deltaNs = deltaNs;
  }

  issued(block: number, count: number, atNs: number, kind: 'write' | 'discard' | 'zeroes'): void {
    this.to?.issued(block + this.firstBlock, count, atNs + this.deltaNs, kind);
  }

  completed(
    block: number,
    count: number,
    atNs: number,
    kind: 'write' | 'discard' | 'zeroes',
  ): void {
    this.to?.completed(block + this.firstBlock, count, atNs + this.deltaNs, kind);
  }
}

class GroupSink implements CaptureSink {
  readonly scan: ((request: ScanRequest) => Promise<ScanOutcome>) | undefined;
  private readonly placed: readonly Placed[];

  constructor(placed: readonly Placed[]) {
    this.placed = placed;
    this.scan = placed.every((p) => p.member.sink.scan !== undefined)
      ? (request) => this.scanAll(request)
      : undefined;
  }

  get memoryBytes(): number {
    return this.placed.reduce((n, p) => n + (p.member.sink.memoryBytes ?? 0), 0);
  }

  async prepare(): Promise<void> {
    for (const { member } of this.placed) await member.sink.prepare?.();
  }

  async commit(commit: CaptureCommit): Promise<CommitDone> {
    const parts = this.placed.map((p) => ({ ...commit, ...partOf(commit.content, p) }));
    const ended = await Promise.allSettled(
      this.placed.map((p, i) => {
        const part = parts[i];
        if (part === undefined) throw new Error('a device of the group without its part');
        return p.member.sink.commit(part);
      }),
    );
    const failures = ended.flatMap((e): unknown[] => (e.status === 'rejected' ? [e.reason] : []));
    if (failures.length > 0) throw worstOf(failures);
    const done = ended.flatMap((e) => (e.status === 'fulfilled' ? [e.value] : []));
    return {
      seq: done[0]?.seq ?? 0,
      storedBytes: done.reduce((n, d) => n + d.storedBytes, 0),
      seqs: done.map((d) => d.seq),
    };
  }

  private async scanAll(request: ScanRequest): Promise<ScanOutcome> {
    let seq: number | undefined;
    let [readBytes, changedBytes, storedBytes, doneBytes] = [0, 0, 0, 0];
    for (const { member, firstBlock, blocks, sizeBytes } of this.placed) {
      const from = Math.max(request.block, firstBlock);
      const to = Math.min(request.block + request.count, firstBlock + blocks);
      if (from >= to) continue;
      const before = doneBytes;
      const done = await member.sink.scan?.({
        block: from - firstBlock,
        count: to - from,
        sizeBytes,
        signal: request.signal,
        onProgress: (bytes) => request.onProgress(before + bytes),
      });
      if (done === undefined) throw new Error('a device of the group that cannot be scanned');
      doneBytes += (to - from) * BLOCK_BYTES;
      seq = done.seq ?? seq;
      readBytes += done.readBytes;
      changedBytes += done.changedBytes;
      storedBytes += done.storedBytes;
    }
    return { seq, readBytes, changedBytes, storedBytes };
  }
}

/** The failure that decides: one that ends capture before one that passes. */
function worstOf(failures: readonly unknown[]): unknown {
  return (
    failures.find((e) => !(e instanceof B2Error)) ??
    failures.find((e) => isKind(e, 'lost-claim') || e instanceof DeviceError) ??
    failures[0]
  );
}

/** What of the blocks lies on one device, in its own numbers. */
function partOf(
  content: StagedBlocks,
  { firstBlock, blocks, sizeBytes }: Placed,
): { content: StagedBlocks; sizeBytes: number } {
  const from = lowerBound(content.blocks, firstBlock);
  const to = lowerBound(content.blocks, firstBlock + blocks);
  const own = content.blocks.slice(from, to).map((b) => b - firstBlock);
  return {
    sizeBytes,
    content: {
      blocks: own,
      bytesAt: (index) => {
        const block = own[index] ?? 0;
        const length = Math.min(BLOCK_BYTES, sizeBytes - block * BLOCK_BYTES);
        return content.bytesAt(from + index).subarray(0, length);
      },
    },
  };
}

/** The first index whose block is not before `block`. */
function lowerBound(blocks: Float64Array, block: number): number {
  let [low, high] = [0, blocks.length];
  while (low < high) {
    const mid = (low + high) >>> 1;
    if ((blocks[mid] ?? 0) < block) low = mid + 1;
    else high = mid;
  }
  return low;
}
