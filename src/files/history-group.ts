/**
 * Points of a volume whose looks may have read other volumes of its group, too: a version is proven by the blocks of all that were
 * read. Blocks of the other volumes are numbered behind those of the volume itself, each from a number of its own.
 */
import type { VolumeHistory } from '../repo/history.js';
import { Timeline } from '../repo/timeline.js';
import type { SearchedPoints } from './history.js';
import { HistoryPoints } from './history-points.js';
import type { BlockRange } from './recording.js';

/** Numbers of blocks that a volume has: 4 EiB. */
const VOLUME_BLOCKS = 2 ** 40;

/** Ranges of a volume among those of all: 0 is the volume itself, others are {@link Companion.index} and one. */
export function rangesOf(volume: number, ranges: readonly BlockRange[]): readonly BlockRange[] {
  const first = volume * VOLUME_BLOCKS;
  return ranges.map(({ from, to }) => ({ from: from + first, to: to + first }));
}

/** What {@link rangesOf} has put together, by volume. */
export function rangesByVolume(
  ranges: readonly BlockRange[],
): ReadonlyMap<number, readonly BlockRange[]> {
  const found = new Map<number, BlockRange[]>();
  for (const { from, to } of ranges) {
    const volume = Math.floor(from / VOLUME_BLOCKS);
    const first = volume * VOLUME_BLOCKS;
    const own = found.get(volume) ?? [];
    own.push({ from: from - first, to: to - first });
    found.set(volume, own);
  }
  return found;
}

/** What is used of {@link HistoryPoints}. */
export type PointsOfOne = SearchedPoints & Pick<HistoryPoints, 'instantNs'>;

/** The points of another volume at those instants; points of one instant that are several are left out, as none is used. */
export async function pointsAtInstants(
  history: VolumeHistory,
  instants: ReadonlySet<bigint>,
): Promise<HistoryPoints> {
  const seqs = new Map<bigint, number | undefined>();
  for await (const c of new Timeline(history.sources).list()) {
    if (!instants.has(c.instantNs)) continue;
    seqs.set(c.instantNs, seqs.has(c.instantNs) ? undefined : c.seq);
  }
  const only = new Set([...seqs.values()].filter((seq) => seq !== undefined));
  return HistoryPoints.open(history, { only });
}

/** Another volume's points, and which of them is of the instant of which of the volume's. */
interface Aligned {
  readonly points: PointsOfOne;
  readonly indexes: readonly (number | undefined)[];
}

export class GroupedPoints implements SearchedPoints {
  readonly #own: PointsOfOne;
  readonly #open: (volume: number, instants: ReadonlySet<bigint>) => Promise<PointsOfOne>;
  readonly #others = new Map<number, Promise<Aligned>>();

  /** `open`: the points of another volume of the group at those instants. */
  constructor(
    own: PointsOfOne,
    open: (volume: number, instants: ReadonlySet<bigint>) => Promise<PointsOfOne>,
  ) {
    this.#own = own;
    this.#open = open;
  }

  get count(): number {
    return this.#own.count;
  }

  #aligned(volume: number): Promise<Aligned> {
    let aligned = this.#others.get(volume);
    if (aligned === undefined) {
      aligned = this.#align(volume);
      this.#others.set(volume, aligned);
    }
    return aligned;
  }

  async #align(volume: number): Promise<Aligned> {
    const instants = Array.from({ length: this.count }, (_, i) => this.#own.instantNs(i));
    const points = await this.#open(volume, new Set(instants));
    const byInstant = new Map<bigint, number>();
    for (let j = 0; j < points.count; j++) byInstant.set(points.instantNs(j), j);
    return { points, indexes: instants.map((ns) => byInstant.get(ns)) };
  }

  async sameAround(
    i: number,
    ranges: readonly BlockRange[],
    lo: number,
    hi: number,
  ): Promise<{ readonly from: number; readonly to: number }> {
    const byVolume = rangesByVolume(ranges);
    let { from, to } = await this.#own.sameAround(i, byVolume.get(0) ?? [], lo, hi);
    for (const [volume, own] of byVolume) {
      if (volume === 0) continue;
      const { points, indexes } = await this.#aligned(volume);
      const at = indexes[i];
      if (at === undefined) return { from: i, to: i };
      // Where the other volume has no point, nothing is known of it.
      [from, to] = stretch(i, from, to, (k) => indexes[k] !== undefined);
      const there = indexes.slice(from, to + 1).filter((j) => j !== undefined);
      const [least, most] = there.reduce(([a, b], j) => [Math.min(a, j), Math.max(b, j)], [at, at]);
      const same = await points.sameAround(at, own, least, most);
      [from, to] = stretch(i, from, to, (k) => {
        const j = indexes[k];
        return j !== undefined && j >= same.from && j <= same.to;
      });
    }
    return { from, to };
  }

  async written(ranges: readonly BlockRange[], a: number, b: number): Promise<boolean> {
    const byVolume = rangesByVolume(ranges);
    if (await this.#own.written(byVolume.get(0) ?? [], a, b)) return true;
    for (const [volume, own] of byVolume) {
      if (volume === 0) continue;
      const { points, indexes } = await this.#aligned(volume);
      const [x, y] = [indexes[a], indexes[b]];
      if (x === undefined || y === undefined) return true;
      if (await points.written(own, Math.min(x, y), Math.max(x, y))) return true;
    }
    return false;
  }
}

/** The neighbours of `i` within [from, to] that are like it, one beside the other. */
function stretch(
  i: number,
  from: number,
  to: number,
  isLike: (k: number) => boolean,
): [from: number, to: number] {
  let [first, last] = [i, i];
  while (first > from && isLike(first - 1)) first--;
  while (last < to && isLike(last + 1)) last++;
  return [first, last];
}
