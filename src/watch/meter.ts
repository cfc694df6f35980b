/** Counts what passes between the parts of a session, for its rates and for its proofs. */
import type {
  CaptureCommit,
  CaptureSink,
  CommitDone,
  ScanOutcome,
  ScanRequest,
} from '../capture/live-capture.js';
import type {
  ChangeKind,
  ChangeSink,
  ChangeSource,
  Poll,
  PollOptions,
} from '../devices/change-source.js';
import type { ReadDevice } from '../devices/device.js';
import { BLOCK_BYTES } from '../units.js';

/** Of a whole session; they only grow. */
export interface Totals {
  /** Written to the device, in whole blocks. */
  changedBytes: number;
  /** Made safe: in commits, and what scans have read and stored or found to be there. In whole blocks. */
  capturedBytes: number;
  /** That took in the repository. */
  storedBytes: number;
}

/** Passes everything on; counts the changed bytes. */
export class MeteredSource implements ChangeSource {
  readonly kind: 'trace' | 'scan';
  readonly originNs: bigint;
  readonly isTimed: boolean;
  /** A poll ended with an error: what it had found may not have been delivered. */
  hasFailed = false;
  private readonly inner: ChangeSource;
  private readonly totals: Totals;

  constructor(inner: ChangeSource, totals: Totals) {
    this.inner = inner;
    this.totals = totals;
    this.kind = inner.kind;
    this.originNs = inner.originNs;
    this.isTimed = inner.isTimed;
  }

  async poll(sink: ChangeSink, options?: PollOptions): Promise<Poll> {
    const counting: ChangeSink = {
      issued: (block: number, count: number, atNs: number, kind: ChangeKind) =>
        sink.issued(block, count, atNs, kind),
      completed: (block: number, count: number, atNs: number, kind: ChangeKind) => {
        this.totals.changedBytes += count * BLOCK_BYTES;
        sink.completed(block, count, atNs, kind);
      },
    };
    try {
      return await this.inner.poll(counting, options);
    } catch (error) {
      this.hasFailed = true;
      throw error;
    }
  }

  close(): Promise<void> {
    return this.inner.close();
  }
}

/** Passes everything on; counts bytes captured and stored, and tells of every commit that is durable. */
export class MeteredSink implements CaptureSink {
  readonly scan: ((request: ScanRequest) => Promise<ScanOutcome>) | undefined;
  private readonly inner: CaptureSink;
  private readonly totals: Totals;
  private readonly onCommit: (seq: number) => void;

  constructor(inner: CaptureSink, totals: Totals, onCommit: (seq: number) => void) {
    this.inner = inner;
    this.totals = totals;
    this.onCommit = onCommit;
    this.scan =
      inner.scan === undefined
        ? undefined
        : async (request) => {
            let seen = 0;
            const note = (doneBytes: number): void => {
              totals.capturedBytes += Math.max(0, doneBytes - seen);
              seen = Math.max(seen, doneBytes);
            };
            const done = await inner.scan?.({
              ...request,
              onProgress: (doneBytes) => {
                note(doneBytes);
                request.onProgress(doneBytes);
              },
            });
            if (done === undefined) throw new Error('the sink cannot scan any more');
            note(request.count * BLOCK_BYTES);
            totals.storedBytes += done.storedBytes;
            if (done.seq !== undefined) this.onCommit(done.seq);
            return done;
          };
  }

  get memoryBytes(): number {
    return this.inner.memoryBytes ?? 0;
  }

  async prepare(): Promise<void> {
    await this.inner.prepare?.();
  }

  async commit(commit: CaptureCommit): Promise<CommitDone> {
    const done = await this.inner.commit(commit);
    this.totals.capturedBytes += commit.content.blocks.length * BLOCK_BYTES;
    this.totals.storedBytes += done.storedBytes;
    this.onCommit(done.seq);
    return done;
  }
}

/** `device`, with every read told. Closing it closes the device. */
export function meteredDevice(device: ReadDevice, onRead: (bytes: number) => void): ReadDevice {
  return {
    get facts() {
      return device.facts;
    },
    async read(into, offset) {
      const got = await device.read(into, offset);
      onRead(got);
      return got;
    },
    dataRanges: (offset, length) => device.dataRanges(offset, length),
    refresh: () => device.refresh(),
    close: () => device.close(),
  };
}

interface Sample {
  readonly atNs: bigint;
  readonly totals: readonly number[];
}

/** Means over the last seconds of totals that only grow. */
export class Rates {
  private readonly windowNs: bigint;
  private samples: Sample[] = [];

  constructor(windowMs: number) {
    this.windowNs = BigInt(windowMs) * 1_000_000n;
  }

  note(atNs: bigint, totals: readonly number[]): void {
    this.samples.push({ atNs, totals });
    // One sample that is as old as the window is kept.
    while ((this.samples[1]?.atNs ?? atNs) <= atNs - this.windowNs) this.samples.shift();
  }

  /** Of the total at `index`, each second. */
  of(index: number): number {
    const first = this.samples[0];
    const last = this.samples.at(-1);
    if (first === undefined || last === undefined || last.atNs === first.atNs) return 0;
    const grown = (last.totals[index] ?? 0) - (first.totals[index] ?? 0);
    return (Math.max(0, grown) / Number(last.atNs - first.atNs)) * 1e9;
  }
}
