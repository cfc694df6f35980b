/**
 * The interval cut: when is a batch of blocks, read while writes go on, the state of a device at one instant?
 *
 * A recovery point at `t` holds every write that completed before `t`, and none issued after it; a write under way at `t` may be
 * in it or not, or be torn, as after a power cut. With the blocks read since the last point:
 *
 * - **HI** is the oldest completion that no later read covers: up to HI nothing that completed is missing;
 * - **LO** is the greatest, over those blocks, of the last issue to the block, but not later than the end of the read: after
 *   LO nothing was issued that is in what was read.
 *
 * If LO < HI, what was read is a point at every instant between them. If not, the blocks whose completion is not after LO are
 * read again, and so on. Neither a freeze nor a quiet moment is needed.
 *
 * How to use it: feed events (it is a {@link ChangeSink}); {@link advance} after each poll; {@link take} blocks, then read them,
 * then {@link staged}; poll; {@link decide}. A block is out of the pending set from `take` on, so that a completion while it is
 * read puts it back: `take` always comes before the read begins.
 *
 * Pure: no clock, no I/O. Times are those of the source. Memory: see block-times.ts, and 24 bytes for each run read whose events
 * were not all delivered when it was last looked at.
 */
import type { ChangeSink } from '../devices/change-source.js';
import { LatestTimes, MAX_SLOTS, PendingBlocks } from './block-times.js';

/**
 * - `wait`: the events up to the end of the last read have not all been delivered: poll, then ask again;
 * - `again`: take and read the blocks that are due at `loNs`, then ask again;
 * - `holds`: what was read is a point at `instantNs`.
 */
export type Decision =
  | { readonly kind: 'wait' }
  | { readonly kind: 'again'; readonly loNs: number; readonly hiNs: number }
  | {
      readonly kind: 'holds';
      readonly loNs: number;
      readonly hiNs: number;
      readonly instantNs: number;
    };

/** Reads remembered until they are brought into LO, unless their events are still to come. */
const FOLD_READS = 10_000;

/** Runs of a scan: asked for as a whole. */
const LONG_RUN = 1024;

export class IntervalCut implements ChangeSink {
  /** Completions that came later than the source had promised, and lay before an instant already claimed. */
  lateCompletions = 0;
  readonly blocks: number;
  private readonly lastIssue: LatestTimes;
  private readonly pending: PendingBlocks;
  /** Everything before this has been delivered. */
  private completeToNs = Number.NEGATIVE_INFINITY;
  /** LO of what has been folded; never falls until a point is claimed. */
  private loNs = Number.NEGATIVE_INFINITY;
  /** Reads that `decide` has not looked at: block, count, end of the read. */
  private reads: number[] = [];
  private readEndNs = Number.NEGATIVE_INFINITY;
  private hasReads = false;
  private claimedNs = Number.NEGATIVE_INFINITY;

  /** `blocks` of the device; `maxSlots` (a power of two) bounds each of the two tables. */
  constructor(blocks: number, maxSlots: number = MAX_SLOTS) {
    this.blocks = blocks;
    this.lastIssue = new LatestTimes(blocks, maxSlots);
    this.pending = new PendingBlocks(blocks, maxSlots);
  }

  /** Bytes of the tables now. */
  get bytes(): number {
    return this.lastIssue.bytes + this.pending.bytes;
  }

  /** Blocks that wait to be read (an upper bound). */
  get pendingBlocks(): number {
    return this.pending.size;
  }

  /** True if anything changed since the last point. */
  get hasChanges(): boolean {
    return this.hasReads || this.pending.size > 0;
  }

  /** Time of the oldest completion that no read covers; +∞ if there is none. */
  get oldestPendingNs(): number {
    return this.pending.earliest();
  }

  /** The instant of the last point claimed; −∞ before the first. */
  get lastInstantNs(): number {
    return this.claimedNs;
  }

  issued(block: number, count: number, atNs: number): void {
    this.lastIssue.note(block, count, atNs);
  }

  completed(block: number, count: number, atNs: number): void {
    if (atNs < this.claimedNs) this.lateCompletions++;
    this.pending.add(block, count, atNs);
  }

  /** Everything before `completeToNs` has been delivered. */
  advance(completeToNs: number): void {
    if (completeToNs > this.completeToNs) this.completeToNs = completeToNs;
    if (this.reads.length >= FOLD_READS * 3) this.fold();
  }

  /**
   * Track was lost (or never kept) up to `nowNs`: every block may have changed, by writes issued until then. No point is
   * claimed until all have been read anew.
   */
  invalidate(nowNs: number): void {
    this.loNs = Math.max(this.loNs, nowNs);
    this.pending.addUnknown(0, this.blocks);
  }

  /** Blocks of the device that are still to be read since track was lost (an upper bound). */
  get unknownBlocks(): number {
    return this.pending.bitCount;
  }

  /**
   * A run of at most about `max` of those blocks, at or after `from` or else from the start of the device: `takeRun` it, then read it
   * whole, then `staged`, with the end of its last read. Its borders are multiples of 4 MiB or the end of the device.
   */
  nextRun(
    from: number,
    max: number,
  ): { readonly block: number; readonly count: number } | undefined {
    return this.pending.nextRun(from, max);
  }

  /** Takes a run of {@link nextRun}. */
  takeRun(block: number, count: number): void {
    this.pending.takeRun(block, count);
  }

  /** A run that was taken was not read, or not all of it. */
  unreadRun(block: number, count: number): void {
    this.pending.addUnknown(block, count);
  }

  /** The blocks were read, but what was read is lost (the repository did not take it): they must be read again. */
  unread(block: number, count: number): void {
    this.pending.add(block, count, Number.NEGATIVE_INFINITY);
  }

  /** Takes up to about `max` blocks, ascending, whose completion is not after `limitNs`: read them now. */
  take(limitNs: number, max: number): Float64Array {
    return this.pending.take(limitNs, max);
  }

  /** Blocks that were taken have been read; the read was over at `endNs`. Runs of any length, in any order. */
  staged(block: number, count: number, endNs: number): void {
    this.reads.push(block, count, endNs);
    this.readEndNs = Math.max(this.readEndNs, endNs);
    this.hasReads = true;
  }

  decide(): Decision {
    if (this.completeToNs < this.readEndNs) return { kind: 'wait' };
    this.fold();
    const hiNs = this.pending.earliest();
    const { loNs } = this;
    // Equal times decide nothing: the order of two events of one nanosecond is not known.
    if (!(loNs < hiNs)) return { kind: 'again', loNs, hiNs };
    // Also after an invalidation, whose LO is no read's end.
    if (this.completeToNs < loNs) return { kind: 'wait' };
    return { kind: 'holds', loNs, hiNs, instantNs: Math.min(hiNs, this.completeToNs) };
  }

  /** Brings the reads whose events are all known into LO; the others stay. */
  private fold(): void {
    const { reads, lastIssue } = this;
    const rest: number[] = [];
    for (let i = 0; i < reads.length; i += 3) {
      const block = reads[i] ?? 0;
      const count = reads[i + 1] ?? 0;
      const endNs = reads[i + 2] ?? 0;
      if (endNs > this.completeToNs) {
        rest.push(block, count, endNs);
        continue;
      }
      if (endNs <= this.loNs) continue;
      if (count >= LONG_RUN) {
        this.loNs = Math.max(this.loNs, Math.min(lastIssue.ofRange(block, block + count), endNs));
        continue;
      }
      for (let b = block; b < block + count; b++) {
        const t = Math.min(lastIssue.of(b), endNs);
        if (t > this.loNs) this.loNs = t;
      }
    }
    this.reads = rest;
  }

  /**
   * Makes the point that `decide` has just found (nothing may have been fed in between); returns its instant, which is `atNs` where
   * that is given: one from LO on that is not later than the instant found.
   */
  claim(atNs?: number): number {
    const decision = this.decide();
    if (decision.kind !== 'holds')
      throw new Error('a point was claimed although the cut does not hold');
    const instantNs = atNs ?? decision.instantNs;
    if (instantNs < decision.loNs || instantNs > decision.instantNs || instantNs < this.claimedNs)
      throw new Error('a point was claimed at an instant of which nothing is known');
    this.forgetReads(instantNs);
    return instantNs;
  }

  private forgetReads(instantNs: number): void {
    this.claimedNs = instantNs;
    this.loNs = Number.NEGATIVE_INFINITY;
    this.readEndNs = Number.NEGATIVE_INFINITY;
    this.hasReads = false;
    // An issue up to the instant cannot stand in the way of a later point: its LO would lie before every later HI.
    this.lastIssue.forget(instantNs);
  }
}
