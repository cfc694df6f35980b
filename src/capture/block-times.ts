/**
 * Times of blocks: the two tables of the interval cut. Memory is bounded whatever the device and the load:
 *
 * - one slot (16 bytes) for each block in a hash table of at most {@link MAX_SLOTS} slots: 64 MiB; it starts at 64 KiB,
 *   grows with the blocks that were touched since the last point and shrinks again (while it does, the old and the new one are
 *   there);
 * - beyond that, and for long runs, one time for each region of the device (131,072 regions of at least 4 MiB: 1 MiB), which is
 *   the most cautious of its blocks' times: points are then harder to reach, never wrong;
 * - pending blocks that have no slot are bits: 32 MiB for 1 TiB, made when first needed.
 *
 * Pure: no clock, no I/O.
 */

/** Blocks in the hash table at most, at a load of one half. */
export const MAX_SLOTS = 1 << 22;
const MIN_SLOTS = 1 << 12;
const MAX_REGIONS = 1 << 17;
const MIN_REGION_BLOCKS = 1024;
const FREE = -1;

function slotOf(block: number, mask: number): number {
  // Blocks come in runs and at strides: multiply and take the upper bits, from both halves of the number.
  const low = Math.imul(block | 0, 0x9e37_79b1);
  const high = Math.imul((block / 4_294_967_296) | 0, 0x85eb_ca6b);
  const h = low ^ high;
  return (h ^ (h >>> 15)) & mask;
}

/** A map from block to time in typed arrays: open addressing, linear probing. */
class TimeTable {
  size = 0;
  private keys: Float64Array;
  private times: Float64Array;
  private mask: number;
  private readonly maxSlots: number;

  constructor(maxSlots: number) {
    this.maxSlots = maxSlots;
    const slots = Math.min(MIN_SLOTS, maxSlots);
    this.keys = new Float64Array(slots).fill(FREE);
    this.times = new Float64Array(slots);
    this.mask = slots - 1;
  }

  get bytes(): number {
    return this.keys.byteLength + this.times.byteLength;
  }

  /** The slot of a block, or the free one where it would go. */
  private find(block: number): number {
    const { keys, mask } = this;
    let slot = slotOf(block, mask);
    for (;;) {
      const key = keys[slot];
      if (key === block || key === FREE) return slot;
      slot = (slot + 1) & mask;
    }
  }

  get(block: number): number | undefined {
    const slot = this.find(block);
    return this.keys[slot] === FREE ? undefined : this.times[slot];
  }

  /** Keeps the later (`latest`) or the earlier of the time given and the one known. False: there is no room for the block. */
  merge(block: number, time: number, latest: boolean): boolean {
    const slot = this.find(block);
    if (this.keys[slot] === FREE) {
      if ((this.size + 1) * 2 > this.mask + 1) {
        if (this.mask + 1 >= this.maxSlots) return false;
        this.rebuild((this.mask + 1) * 2, () => true);
        return this.merge(block, time, latest);
      }
      this.keys[slot] = block;
      this.times[slot] = time;
      this.size++;
      return true;
    }
    const old = this.times[slot] ?? time;
    this.times[slot] = latest ? Math.max(old, time) : Math.min(old, time);
    return true;
  }

  /** Drops every entry that `keep` does not want. */
  filter(keep: (block: number, time: number) => boolean): void {
    let kept = 0;
    for (let i = 0; i <= this.mask; i++) {
      const key = this.keys[i] ?? FREE;
      if (key !== FREE && keep(key, this.times[i] ?? 0)) kept++;
    }
    if (kept === this.size) return;
    let slots = MIN_SLOTS;
    while (slots < kept * 4) slots *= 2;
    this.rebuild(Math.min(slots, this.maxSlots), keep);
  }

  /** Blocks of [from, to) are forgotten. */
  dropRange(from: number, to: number): void {
    if (this.size === 0) return;
    this.filter((block) => block < from || block >= to);
  }

  /** The blocks whose time is not after `limit`, ascending. */
  due(limit: number): Float64Array {
    const { keys, times } = this;
    let n = 0;
    for (let i = 0; i < keys.length; i++) if (keys[i] !== FREE && (times[i] ?? 0) <= limit) n++;
    const due = new Float64Array(n);
    n = 0;
    for (let i = 0; i < keys.length; i++)
      if (keys[i] !== FREE && (times[i] ?? 0) <= limit) due[n++] = keys[i] ?? 0;
    return due.sort();
  }

  forEach(use: (block: number, time: number) => void): void {
    for (let i = 0; i <= this.mask; i++) {
      const key = this.keys[i] ?? FREE;
      if (key !== FREE) use(key, this.times[i] ?? 0);
    }
  }

  private rebuild(slots: number, keep: (block: number, time: number) => boolean): void {
    const { keys, times } = this;
    this.keys = new Float64Array(slots).fill(FREE);
    this.times = new Float64Array(slots);
    this.mask = slots - 1;
    this.size = 0;
    for (let i = 0; i < keys.length; i++) {
      const key = keys[i] ?? FREE;
      const time = times[i] ?? 0;
      if (key === FREE || !keep(key, time)) continue;
      const slot = this.find(key);
      this.keys[slot] = key;
      this.times[slot] = time;
      this.size++;
    }
  }
}

/** Tables of `maxSlots` slots and all that goes with them, for a device of `blocks` blocks: bytes at most, both classes below together. */
export function tableBytesAtMost(blocks: number, maxSlots: number = MAX_SLOTS): number {
  const regionBlocks = regionBlocksOf(blocks);
  const regions = Math.ceil(blocks / regionBlocks);
  // Two tables, one of them being rebuilt; the times of regions of both; one bit a block.
  return 3 * maxSlots * 16 + 2 * regions * 8 + Math.ceil((regions * regionBlocks) / 32) * 4;
}

function regionBlocksOf(blocks: number): number {
  let n = MIN_REGION_BLOCKS;
  while (blocks / n > MAX_REGIONS) n *= 2;
  return n;
}

/** The latest time that each block was written to, as far back as it matters. */
export class LatestTimes {
  private readonly table: TimeTable;
  private readonly regionBlocks: number;
  private readonly regions: number;
  private coarse: Float64Array | undefined;

  /** `maxSlots` is a power of two. */
  constructor(blocks: number, maxSlots: number = MAX_SLOTS) {
    this.table = new TimeTable(maxSlots);
    this.regionBlocks = regionBlocksOf(blocks);
    this.regions = Math.ceil(blocks / this.regionBlocks);
  }

  get bytes(): number {
    return this.table.bytes + (this.coarse?.byteLength ?? 0);
  }

  note(block: number, count: number, time: number): void {
    if (count < this.regionBlocks) {
      let b = block;
      const end = block + count;
      while (b < end && this.table.merge(b, time, true)) b++;
      if (b === end) return;
    }
    this.coarse ??= new Float64Array(this.regions).fill(Number.NEGATIVE_INFINITY);
    const last = Math.floor((block + count - 1) / this.regionBlocks);
    for (let r = Math.floor(block / this.regionBlocks); r <= last; r++)
      this.coarse[r] = Math.max(this.coarse[r] ?? time, time);
  }

  /** At least the latest time noted for the block; −∞ if there is none after the last {@link forget}. */
  of(block: number): number {
    const fine = this.table.get(block) ?? Number.NEGATIVE_INFINITY;
    if (this.coarse === undefined) return fine;
    return Math.max(fine, this.coarse[Math.floor(block / this.regionBlocks)] ?? fine);
  }

  /** The greatest of {@link of} over [from, to). */
  ofRange(from: number, to: number): number {
    let latest = Number.NEGATIVE_INFINITY;
    if (to - from <= this.table.size) {
      for (let b = from; b < to; b++) latest = Math.max(latest, this.table.get(b) ?? latest);
    } else {
      this.table.forEach((b, t) => {
        if (b >= from && b < to && t > latest) latest = t;
      });
    }
    if (this.coarse === undefined || from >= to) return latest;
    const last = Math.floor((to - 1) / this.regionBlocks);
    for (let r = Math.floor(from / this.regionBlocks); r <= last; r++)
      latest = Math.max(latest, this.coarse[r] ?? latest);
    return latest;
  }

  /** Drops times up to and including `time`. */
  forget(time: number): void {
    this.table.filter((_block, t) => t > time);
    if (this.coarse === undefined) return;
    let any = false;
    for (let r = 0; r < this.regions; r++) {
      if ((this.coarse[r] ?? 0) > time) any = true;
      else this.coarse[r] = Number.NEGATIVE_INFINITY;
    }
    if (!any) this.coarse = undefined;
  }
}

/** Blocks that must be read, each with the earliest time from which on it must be. */
export class PendingBlocks {
  /** Blocks in the table plus bits set; a block can be counted twice. */
  private bits = 0;
  private readonly table: TimeTable;
  private readonly blocks: number;
  private readonly regionBlocks: number;
  private readonly regions: number;
  private bitmap: Uint32Array | undefined;
  private first: Float64Array | undefined;

  /** `maxSlots` is a power of two. */
  constructor(blocks: number, maxSlots: number = MAX_SLOTS) {
    this.blocks = blocks;
    this.table = new TimeTable(maxSlots);
    this.regionBlocks = regionBlocksOf(blocks);
    this.regions = Math.ceil(blocks / this.regionBlocks);
  }

  get bytes(): number {
    return this.table.bytes + (this.bitmap?.byteLength ?? 0) + (this.first?.byteLength ?? 0);
  }

  /** Blocks waiting; blocks that wait twice over count twice. */
  get size(): number {
    return this.table.size + this.bits;
  }

  add(block: number, count: number, time: number): void {
    const end = block + count;
    let b = block;
    if (count < this.regionBlocks) while (b < end && this.table.merge(b, time, false)) b++;
    if (b < end) this.addBits(b, end, time);
  }

  /** Blocks that must be read whatever their times: they wait in runs of whole regions (see {@link nextRun}). */
  addUnknown(block: number, count: number): void {
    if (count > 0) this.addBits(block, block + count, Number.NEGATIVE_INFINITY);
  }

  /** Blocks with a bit of their own, which after a loss of track are those still to be read. */
  get bitCount(): number {
    return this.bits;
  }

  /**
   * A run of at most `max` blocks, at or after `from` or else from the start of the device, in regions that wait since −∞; undefined
   * if there is none. It begins and ends at borders of regions, or at the end of the device.
   */
  nextRun(from: number, max: number): { block: number; count: number } | undefined {
    const { first, regionBlocks } = this;
    if (first === undefined || this.bits === 0) return undefined;
    const most = Math.max(1, Math.floor(max / regionBlocks));
    const start = Math.floor(from / regionBlocks) % this.regions;
    for (let i = 0; i < this.regions; i++) {
      const r = (start + i) % this.regions;
      if (first[r] !== Number.NEGATIVE_INFINITY) continue;
      let n = 1;
      while (n < most && r + n < this.regions && first[r + n] === Number.NEGATIVE_INFINITY) n++;
      const block = r * regionBlocks;
      return { block, count: Math.min(this.blocks, (r + n) * regionBlocks) - block };
    }
    return undefined;
  }

  /** Takes every block of a run of {@link nextRun}, whatever its time. */
  takeRun(block: number, count: number): void {
    const { bitmap, first, regionBlocks } = this;
    this.table.dropRange(block, block + count);
    if (bitmap === undefined || first === undefined) return;
    const firstRegion = block / regionBlocks;
    const endRegion = Math.ceil((block + count) / regionBlocks);
    for (
      let word = (firstRegion * regionBlocks) / 32;
      word < (endRegion * regionBlocks) / 32;
      word++
    )
      this.bits -= bitsOf(bitmap[word] ?? 0);
    bitmap.fill(0, (firstRegion * regionBlocks) / 32, (endRegion * regionBlocks) / 32);
    first.fill(Number.POSITIVE_INFINITY, firstRegion, endRegion);
    this.dropEmptyBits();
  }

  private dropEmptyBits(): void {
    if (this.bits > 0) return;
    this.bitmap = undefined;
    this.first = undefined;
  }

  private addBits(from: number, end: number, time: number): void {
    this.bitmap ??= new Uint32Array(Math.ceil((this.regions * this.regionBlocks) / 32));
    this.first ??= new Float64Array(this.regions).fill(Number.POSITIVE_INFINITY);
    const { bitmap, first } = this;
    for (let b = from; b < end;) {
      const word = Math.floor(b / 32);
      const bit = b % 32;
      const n = Math.min(32 - bit, end - b);
      const mask = n === 32 ? 0xffff_ffff : ((2 ** n - 1) << bit) >>> 0;
      const old = bitmap[word] ?? 0;
      this.bits += bitsOf(mask & ~old);
      bitmap[word] = old | mask;
      b += n;
    }
    const last = Math.floor((end - 1) / this.regionBlocks);
    for (let r = Math.floor(from / this.regionBlocks); r <= last; r++)
      first[r] = Math.min(first[r] ?? time, time);
  }

  /** The earliest time of any block; +∞ if none waits. */
  earliest(): number {
    let least = Number.POSITIVE_INFINITY;
    this.table.forEach((_block, t) => {
      if (t < least) least = t;
    });
    if (this.bits > 0) for (const t of this.first ?? []) if (t < least) least = t;
    return least;
  }

  /**
   * Takes at most about `max` blocks whose time is not after `limit`, ascending. Some others may come with them; a block that
   * does not come keeps its time.
   */
  take(limit: number, max: number): Float64Array {
    const list: number[] = [];
    if (this.first !== undefined) {
      // The arrays go away with their last bit.
      for (let r = 0; r < this.regions && list.length < max && this.first !== undefined; r++) {
        if ((this.first[r] ?? Number.POSITIVE_INFINITY) <= limit) this.takeRegion(r, max, list);
      }
    }
    if (list.length < max && this.table.size > 0) {
      let due = this.table.due(limit);
      const room = max - list.length;
      if (due.length > room) due = due.subarray(0, room);
      const last = due.at(-1) ?? -1;
      // They are taken in order of their numbers: what is taken is what is due and not behind the last of them.
      if (due.length > 0) this.table.filter((b, t) => t > limit || b > last);
      for (const b of due) list.push(b);
    }
    const all = Float64Array.from(list).sort();
    let n = 0;
    for (let i = 0; i < all.length; i++)
      if (i === 0 || all[i] !== all[i - 1]) all[n++] = all[i] ?? 0;
    return all.subarray(0, n);
  }

  private takeRegion(r: number, max: number, list: number[]): void {
    const { bitmap, first } = this;
    if (bitmap === undefined || first === undefined) return;
    const end = Math.min(this.blocks, (r + 1) * this.regionBlocks);
    for (let word = (r * this.regionBlocks) / 32; word * 32 < end; word++) {
      let w = bitmap[word] ?? 0;
      if (w === 0) continue;
      if (list.length >= max) return; // the rest of the region keeps its time
      while (w !== 0) {
        const bit = 31 - Math.clz32(w & -w);
        w = (w & (w - 1)) >>> 0;
        this.bits--;
        if (word * 32 + bit < this.blocks) list.push(word * 32 + bit);
      }
      bitmap[word] = 0;
    }
    first[r] = Number.POSITIVE_INFINITY;
    this.dropEmptyBits();
  }
}

function bitsOf(word: number): number {
  let n = word - ((word >>> 1) & 0x5555_5555);
  n = (n & 0x3333_3333) + ((n >>> 2) & 0x3333_3333);
  return Math.imul((n + (n >>> 4)) & 0x0f0f_0f0f, 0x0101_0101) >>> 24;
}
