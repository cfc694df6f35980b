/**
 * Reads pages of the kernel's ring buffer as `trace_pipe_raw` gives them (kernel/trace/ring_buffer.c; the user's view is
 * tools/lib/traceevent of the kernel sources). Little-endian machines only. Pure bytes.
 *
 * | offset        | size | what                                                                                     |
 * | ------------- | ---- | ---------------------------------------------------------------------------------------- |
 * | 0             | 8    | time of the page, ns                                                                     |
 * | commitAt      | 4    | bits 0–19 bytes of data; bit 31: records before this page were lost; bit 30: their number |
 * |               |      | (one word of the machine) follows the data                                               |
 * | dataAt        | …    | records, each led by a word: bits 0–4 type, bits 5–31 time since the record before, ns   |
 *
 * | type  | record                                                                                     |
 * | ----- | ------------------------------------------------------------------------------------------ |
 * | 0     | u32 length (counts itself), data                                                           |
 * | 1–28  | data of 4 × type bytes                                                                     |
 * | 29    | padding: with time 0 the page ends here; else u32 length, that much is skipped               |
 * | 30    | time: u32 holds bits 27–58 of the time since the record before                              |
 * | 31    | absolute time: u32 holds bits 27–58 of it; bits 59–63 are those of the time before it        |
 */
import type { BlockEventLayout, PageLayout } from './format.js';
import type { ChangeKind } from '../change-source.js';

const LENGTH_MASK = 0xf_ffff;
const MISSED = 0x8000_0000;
const MISSED_STORED = 0x4000_0000;
const SHIFT_27 = 134_217_728;
const HIGH_BITS = 0xf800_0000_0000_0000n;

const CHAR_D = 0x44;
const CHAR_F = 0x46;
const CHAR_N = 0x4e;
const CHAR_R = 0x52;
const CHAR_W = 0x57;
const CHAR_Z = 0x5a;

/** A record that is a block event. Reused: copy what you keep. */
export interface BlockEvent {
  /** As enabled: 0 issue, 1 completion of a request, 2 completion of a bio. */
  role: EventRole;
  /** Kernel's device number: major << 20 | minor. */
  dev: number;
  sector: number;
  sectors: number;
  kind: ChangeKind;
  /** The operation starts with a flush (it may be nothing but one, where `sectors` is 0). */
  isFlush: boolean;
  isRead: boolean;
  /** Nanoseconds after the origin. */
  atNs: number;
}

export const EventRole = { issue: 0, requestDone: 1, bioDone: 2 } as const;
export type EventRole = (typeof EventRole)[keyof typeof EventRole];

/** What a page said besides its events. */
export interface PageResult {
  /** Block events handed on. */
  events: number;
  /** Records lost before this page; −1: some, number unknown. */
  missed: number;
  /** Why reading the page stopped early; undefined if it was well formed. */
  damage: string | undefined;
}

/** Parses pages; keeps no state between them but its scratch objects. */
export class PageParser {
  private readonly page: PageLayout;
  private readonly layouts: ReadonlyMap<
    number,
    { readonly role: EventRole; readonly layout: BlockEventLayout }
  >;
  private readonly originNs: bigint;
  private readonly event: BlockEvent = {
    role: EventRole.issue,
    dev: 0,
    sector: 0,
    sectors: 0,
    kind: 'write',
    isFlush: false,
    isRead: false,
    atNs: 0,
  };
  private readonly result: PageResult = { events: 0, missed: 0, damage: undefined };

  /** `originNs`: the time that events count from. */
  constructor(
    page: PageLayout,
    events: readonly { readonly role: EventRole; readonly layout: BlockEventLayout }[],
    originNs: bigint,
  ) {
    this.page = page;
    this.layouts = new Map(events.map((e) => [e.layout.id, e]));
    this.originNs = originNs;
  }

  /**
   * Hands every block event of a page to `emit`, in the order of the page. Never throws and never reads outside `view`,
   * whatever the bytes are; what is not well formed is told in `damage`. The result is reused by the next call.
   */
  parse(view: DataView, emit: (event: BlockEvent) => void): PageResult {
    const { result, event } = this;
    result.events = 0;
    result.missed = 0;
    result.damage = undefined;
    const { commitAt, dataAt } = this.page;
    if (view.byteLength < dataAt) {
      result.damage = `a page of ${view.byteLength} bytes`;
      return result;
    }
    const word = view.getUint32(commitAt, true);
    const length = word & LENGTH_MASK;
    const end = dataAt + length;
    if (end > view.byteLength) {
      result.damage = `${length} bytes of records in a page of ${view.byteLength}`;
      result.missed = -1;
      return result;
    }
    if ((word & MISSED) !== 0) {
      // The number is one word of the kernel, and there only if it fitted.
      const stored = (word & MISSED_STORED) !== 0 && end + 4 <= view.byteLength;
      result.missed = stored ? view.getUint32(end, true) : -1;
      if (result.missed === 0) result.missed = -1;
    }
    let at = dataAt;
    let now = Number(view.getBigUint64(0, true) - this.originNs);
    while (at < end) {
      if (at + 4 > end) return this.bad(`a record at ${at} is cut off`);
      const head = view.getUint32(at, true);
      const type = head & 31;
      const delta = head >>> 5;
      if (type === 29 && delta === 0) break;
      if (type >= 29 || type === 0) {
        if (at + 8 > end) return this.bad(`a record at ${at} is cut off`);
        const more = view.getUint32(at + 4, true);
        if (type === 30) {
          now += delta + more * SHIFT_27;
          at += 8;
          continue;
        }
        if (type === 31) {
          const low = BigInt(delta) + BigInt(more) * BigInt(SHIFT_27);
          now = Number(
            (((BigInt(Math.round(now)) + this.originNs) & HIGH_BITS) | low) - this.originNs,
          );
          at += 8;
          continue;
        }
        if (type === 29) {
          now += delta;
          at += 4 + more;
          if (more < 4 || at > end) return this.bad(`padding of ${more} bytes`);
          continue;
        }
        if (more < 4) return this.bad(`a record of ${more} bytes at ${at}`);
        now += delta;
        const bytes = more - 4;
        const next = at + 4 + Math.ceil(more / 4) * 4;
        if (at + 8 + bytes > end) return this.bad(`a record of ${bytes} bytes at ${at} is cut off`);
        if (!this.record(view, at + 8, bytes, now, event, emit))
          return this.bad(`a short record at ${at}`);
        at = next;
        continue;
      }
      now += delta;
      const bytes = type * 4;
      if (at + 4 + bytes > end) return this.bad(`a record of ${bytes} bytes at ${at} is cut off`);
      if (!this.record(view, at + 4, bytes, now, event, emit))
        return this.bad(`a short record at ${at}`);
      at += 4 + bytes;
    }
    return result;
  }

  private bad(why: string): PageResult {
    this.result.damage = why;
    return this.result;
  }

  /** False if a block event is too short for its fields. Records of other kinds are passed over. */
  private record(
    view: DataView,
    at: number,
    bytes: number,
    now: number,
    event: BlockEvent,
    emit: (event: BlockEvent) => void,
  ): boolean {
    if (bytes < 2) return false;
    const found = this.layouts.get(view.getUint16(at, true));
    if (found === undefined) return true;
    const { layout } = found;
    if (bytes < layout.minBytes) return false;
    event.role = found.role;
    event.dev = view.getUint32(at + layout.devAt, true);
    event.sector =
      view.getUint32(at + layout.sectorAt, true) +
      view.getUint32(at + layout.sectorAt + 4, true) * 4_294_967_296;
    event.sectors = view.getUint32(at + layout.sectorsAt, true);
    // rwbs: an F in front is a flush before the operation; then W write, D discard, N (or WZ) write zeroes, R read;
    // then F FUA, A readahead, S sync, M metadata.
    let rw = at + layout.rwbsAt;
    event.isFlush = view.getUint8(rw) === CHAR_F;
    if (event.isFlush && layout.rwbsBytes > 1) rw++;
    const op = view.getUint8(rw);
    const isZeroes =
      op === CHAR_N || (op === CHAR_W && layout.rwbsBytes > 2 && view.getUint8(rw + 1) === CHAR_Z);
    event.kind = op === CHAR_D ? 'discard' : isZeroes ? 'zeroes' : 'write';
    event.isRead = op === CHAR_R;
    event.atNs = now;
    this.result.events++;
    emit(event);
    return true;
  }
}
