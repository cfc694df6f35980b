/**
 * Change sources: what tells that blocks of a device were written. One source watches one device for one capture.
 *
 * Contract for every implementation (test/support/change-source-suite.ts checks it):
 *
 * - **Times** are nanoseconds of the monotonic clock after {@link ChangeSource.originNs}, as exact numbers: a difference
 *   stays below 2^53 for 104 days, and beyond that rounding keeps the order.
 * - **Nothing is missed.** Every write, discard or write-zeroes whose completion was seen by a program before `t` is
 *   delivered to the sink before a poll says `completeToNs ≥ t`; so is the issue of every write whose data could be read
 *   before `t`. What was in flight when the source was opened counts: its completion is delivered (its issue is not; it
 *   lies before the opening).
 * - **Times may be too cautious, never too bold.** An issue is never reported earlier, a completion never later than it
 *   was. A block may be reported that was not written.
 * - **Losing track is never silent**: a poll that lost events says so once in `loss`; from the sink's point of view any
 *   block may then have changed at any time before that poll.
 * - A poll does a bounded amount of work and never waits for a change. Polls do not overlap.
 * - Blocks are those of the watched device (`BLOCK_BYTES`), a partition's own where it is a partition; writes to other
 *   parts of the disk are not reported. The last block may be short.
 *
 * What no source sees: writes that bypass the block layer (DAX, SCSI or NVMe pass-through), and writes by another host to
 * shared storage.
 */

/** What was done to blocks. Everything but `write` is a hint only: the blocks are read back in any case. */
export type ChangeKind = 'write' | 'discard' | 'zeroes';

/** Takes what a source reports; `count` ≥ 1. Must not throw. */
export interface ChangeSink {
  /** Somebody handed a change of these blocks to the device at `atNs`; it may show from then on. */
  issued(block: number, count: number, atNs: number, kind: ChangeKind): void;
  /** The device finished a change of these blocks at `atNs`; it shows from then on (or it failed: anything may show). */
  completed(block: number, count: number, atNs: number, kind: ChangeKind): void;
}

/**
 * Why a source lost track:
 * - `overrun`: events came faster than they were read (`count` of them, where the kernel knows);
 * - `dropped`: the kernel could not record some;
 * - `unreadable`: a page of the buffer was not understood;
 * - `resized`: the device was written behind its known end;
 * - `opaque`: the driver does not say which sectors it completed, so that this source cannot watch it at all.
 */
export interface ChangeLoss {
  readonly reason: 'overrun' | 'dropped' | 'unreadable' | 'resized' | 'opaque';
  /** For the log: what happened, in words. */
  readonly message: string;
}

export interface Poll {
  /** Everything before this time has been delivered. Never goes back. */
  readonly completeToNs: number;
  /** Events (trace) or differing windows (scan) that this poll delivered. */
  readonly events: number;
  /** The budget ended the poll: there is more to read now. */
  readonly more: boolean;
  readonly loss: ChangeLoss | undefined;
}

export interface PollOptions {
  /** About as many events at most; default {@link POLL_EVENTS}. */
  readonly maxEvents?: number;
  /** Also ask the kernel's counters of lost events, which costs two small reads a CPU: for polls that a point rests on. */
  readonly certain?: boolean;
  readonly signal?: AbortSignal;
}

/** Some 20 ms of work. */
export const POLL_EVENTS = 100_000;

export interface ChangeSource {
  readonly kind: 'trace' | 'scan';
  /** Monotonic time (`Clock.monotonicNs`) that all times count from. */
  readonly originNs: bigint;
  /**
   * True if issues and completions carry their own times, so that exact points can be made while the device is written.
   * False: times are those of whole scans, and an exact point needs a moment without writes as long as a scan takes.
   */
  readonly isTimed: boolean;
  poll(sink: ChangeSink, options?: PollOptions): Promise<Poll>;
  /** Ends the watch and removes what it set up in the kernel. Calling it again does nothing. */
  close(): Promise<void>;
}
