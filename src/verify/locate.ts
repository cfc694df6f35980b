/**
 * Which points and which blocks of a volume need bad frames. A record of commit s is part of every image from s until a later
 * commit has replaced its blocks, or a full commit everything.
 */
import { HOLE } from '../format/extent.js';
import { CommitFlag, PointClass } from '../format/commit.js';
import type { SeqRange, VolumeHistory } from '../repo/history.js';
import { isKind } from '../errors.js';
import { chainWindows } from '../repo/segments/point.js';
import type { SourceWindow } from '../repo/segments/records.js';
import { BLOCK_BYTES, blocksOf } from '../units.js';
import type { BadPlaces } from './bad-places.js';
import { MAX_RANGES, type TouchedVolume, type VolumeRange } from './findings.js';

/** Blocks [from, to) lie in a bad frame of `packId` from commit `seq` on, up to and with `until`. */
interface Piece {
  readonly packId: string;
  readonly from: number;
  readonly to: number;
  readonly seq: number;
  readonly until: number;
}

/** Records are found by the 4 MiB that they touch. */
const BUCKET_BLOCKS = 1024;

/** The commits of a volume that are recovery points, and those that are full; in order. */
export class VolumePoints {
  readonly seqs: number[] = [];
  readonly sizes: number[] = [];
  readonly exact: boolean[] = [];
  readonly instants: bigint[] = [];
  /** First sequence numbers of full commits, ascending. */
  readonly fulls: number[] = [];

  /** Points whose image cannot be made, because commits that it needs are lost. */
  readonly unreadable: boolean[] = [];

  /** Reads every commits page that can be read. */
  static async read(history: VolumeHistory): Promise<VolumePoints> {
    const points = new VolumePoints();
    for (const w of chainWindows(history.sources)) {
      for (let p = 0; p < w.source.index.commits.length; p++) {
        let page;
        try {
          page = await w.source.commitPage(p, false);
        } catch (error) {
          if (!isKind(error, 'damaged')) throw error;
          continue;
        }
        for (let i = 0; i < page.length; i++) {
          const c = page.record(i);
          if (c.seq <= w.afterSeq || c.seq > w.uptoSeq) continue;
          if ((c.flags & CommitFlag.full) !== 0) points.fulls.push(c.firstSeq);
          if (c.pointClass === PointClass.none) continue;
          points.unreadable.push(
            history.unreadable.some((r) => c.seq >= r.firstSeq && c.seq <= r.lastSeq),
          );
          points.seqs.push(c.seq);
          points.sizes.push(c.sizeBytes);
          points.exact.push(c.pointClass >= PointClass.crash);
          points.instants.push(c.instantNs);
        }
      }
    }
    return points;
  }

  /** The first full commit behind `seq`, or Infinity. */
  nextFull(seq: number): number {
    let lo = 0;
    let hi = this.fulls.length;
    while (lo < hi) {
      const mid = (lo + hi) >>> 1;
      if ((this.fulls[mid] ?? 0) <= seq) lo = mid + 1;
      else hi = mid;
    }
    return this.fulls[lo] ?? Number.POSITIVE_INFINITY;
  }
}

/** What of one volume touches what. */
export interface Located {
  /** By pack. */
  readonly byPack: ReadonlyMap<string, TouchedVolume>;
  /** For each point of {@link VolumePoints}: 1 if its image cannot be made or needs a bad place. */
  readonly affected: Uint8Array;
}

/** Walks the volume's records twice: for what lies in bad places, and for what replaced that. */
export async function locate(
  history: VolumeHistory,
  name: string,
  points: VolumePoints,
  bad: BadPlaces,
  signal?: AbortSignal,
): Promise<Located> {
  const affected = Uint8Array.from(points.unreadable, Number);
  const byPack = new Map<string, TouchedVolume>();
  const chunkBlocks = blocksOf(history.repo.chunkBytes);
  const windows = chainWindows(history.sources);
  // Where commits are lost, a full map carries on what they wrote.
  if (history.lost.length > 0) {
    for (const m of history.fulls) windows.push({ source: m, afterSeq: 0, uptoSeq: m.lastSeq });
  }
  const pieces: Piece[] = [];
  for (const w of windows) {
    const ids: string[] = [];
    for await (const r of records(w)) {
      signal?.throwIfAborted();
      if (r.pack === HOLE) continue;
      const packId = (ids[r.pack] ??= await idOrNone(w, r.pack));
      if (packId === '' || !bad.hasPack(packId)) continue;
      const until = points.nextFull(r.seq) - 1;
      const last = r.frame + Math.floor((r.skip + r.count - 1) / chunkBlocks);
      for (let f = r.frame; f <= last; f++) {
        if (!bad.has(packId, f)) continue;
        const k = f - r.frame;
        const run = last > r.frame;
        const from = r.block + (run ? Math.max(0, k * chunkBlocks - r.skip) : 0);
        const to = r.block + (run ? Math.min(r.count, (k + 1) * chunkBlocks - r.skip) : r.count);
        pieces.push({ packId, from, to, seq: r.seq, until });
      }
    }
  }
  if (pieces.length === 0) return { byPack, affected };
  const cut = await superseded(pieces, windows, signal);
  const perPack = new Map<string, Piece[]>();
  for (const p of cut) {
    const list = perPack.get(p.packId);
    if (list === undefined) perPack.set(p.packId, [p]);
    else list.push(p);
  }
  for (const [packId, list] of perPack) {
    const touched = touchedBy(list, history.volumeId, name, points, affected);
    if (touched !== undefined) byPack.set(packId, touched);
  }
  return { byPack, affected };
}

/** The id of a pack of the table; '' where the page with it is damaged, which is a finding of its own. */
async function idOrNone(w: SourceWindow, pack: number): Promise<string> {
  try {
    return await w.source.packId(pack);
  } catch (error) {
    if (!isKind(error, 'damaged')) throw error;
    return '';
  }
}

interface Record {
  readonly block: number;
  readonly count: number;
  readonly seq: number;
  readonly pack: number;
  readonly frame: number;
  readonly skip: number;
}

/** The records of a window. Pages that are damaged are passed over: they are findings of their own. */
async function* records(w: SourceWindow): AsyncGenerator<Record> {
  const full = w.source.level === undefined;
  for (let p = 0; p < w.source.index.extents.length; p++) {
    let page;
    try {
      page = await w.source.extentPage(p, false);
    } catch (error) {
      if (!isKind(error, 'damaged')) throw error;
      continue;
    }
    for (let i = 0; i < page.length; i++) {
      const seq = full ? w.source.lastSeq : w.source.firstSeq + page.seq(i);
      if (seq <= w.afterSeq || seq > w.uptoSeq) continue;
      yield {
        block: page.block(i),
        count: page.count(i),
        seq,
        pack: page.pack(i),
        frame: page.frame(i),
        skip: page.skip(i),
      };
    }
  }
}

/** The pieces, split where later records replace parts of them. */
async function superseded(
  pieces: readonly Piece[],
  windows: readonly SourceWindow[],
  signal?: AbortSignal,
): Promise<Piece[]> {
  const parts: Piece[][] = pieces.map((p) => [p]);
  const buckets = new Map<number, number[]>();
  pieces.forEach((p, n) => {
    for (let b = Math.floor(p.from / BUCKET_BLOCKS); b * BUCKET_BLOCKS < p.to; b++) {
      const list = buckets.get(b);
      if (list === undefined) buckets.set(b, [n]);
      else list.push(n);
    }
  });
  for (const w of windows) {
    for await (const r of records(w)) {
      signal?.throwIfAborted();
      const end = r.block + r.count;
      for (let b = Math.floor(r.block / BUCKET_BLOCKS); b * BUCKET_BLOCKS < end; b++) {
        for (const n of buckets.get(b) ?? []) {
          const list = parts[n];
          if (list === undefined || (pieces[n]?.seq ?? 0) >= r.seq) continue;
          if ((pieces[n]?.from ?? 0) >= end || (pieces[n]?.to ?? 0) <= r.block) continue;
          parts[n] = list.flatMap((p) => {
            if (p.from >= end || p.to <= r.block || p.until < r.seq) return [p];
            const from = Math.max(p.from, r.block);
            const to = Math.min(p.to, end);
            const split: Piece[] = [{ ...p, from, to, until: r.seq - 1 }];
            if (p.from < from) split.push({ ...p, to: from });
            if (p.to > to) split.push({ ...p, from: to });
            return split;
          });
        }
      }
    }
  }
  return parts.flat();
}

/** A heap of pieces by their first block. */
class ByBlock {
  private readonly heap: Piece[] = [];

  get top(): Piece | undefined {
    return this.heap[0];
  }

  push(p: Piece): void {
    const { heap } = this;
    let i = heap.push(p) - 1;
    while (i > 0) {
      const up = (i - 1) >> 1;
      const parent = heap[up];
      if (parent === undefined || parent.from <= p.from) break;
      heap[i] = parent;
      i = up;
    }
    heap[i] = p;
  }

  pop(): void {
    const { heap } = this;
    const last = heap.pop();
    if (last === undefined || heap.length === 0) return;
    let i = 0;
    for (;;) {
      let child = 2 * i + 1;
      const left = heap[child];
      if (left === undefined) break;
      const right = heap[child + 1];
      if (right !== undefined && right.from < left.from) child++;
      const least = heap[child];
      if (least === undefined || least.from >= last.from) break;
      heap[i] = least;
      i = child;
    }
    heap[i] = last;
  }
}

/** Which points see a piece; marks them in `affected`. Undefined if none does. */
function touchedBy(
  pieces: readonly Piece[],
  volumeId: string,
  name: string,
  points: VolumePoints,
  affected: Uint8Array,
): TouchedVolume | undefined {
  const bySeq = pieces.filter((p) => p.until >= p.seq).sort((a, b) => a.seq - b.seq);
  const active = new ByBlock();
  const runs: { firstSeq: number; lastSeq: number }[] = [];
  let count = 0;
  let next = 0;
  let open = false;
  points.seqs.forEach((seq, i) => {
    for (let p = bySeq[next]; p !== undefined && p.seq <= seq; p = bySeq[++next]) active.push(p);
    while (active.top !== undefined && active.top.until < seq) active.pop();
    const hit = active.top !== undefined && active.top.from < blocksOf(points.sizes[i] ?? 0);
    if (hit) {
      affected[i] = 1;
      count++;
      const run = runs.at(-1);
      if (open && run !== undefined) run.lastSeq = seq;
      else runs.push({ firstSeq: seq, lastSeq: seq });
    }
    open = hit;
  });
  const [first] = runs;
  const last = runs.at(-1);
  if (first === undefined || last === undefined) return undefined;
  const { ranges, bytes } = rangesOf(bySeq);
  return {
    volumeId,
    name,
    points: count,
    firstSeq: first.firstSeq,
    lastSeq: last.lastSeq,
    runs: runs.slice(0, MAX_RANGES),
    ranges,
    bytes,
  };
}

function rangesOf(pieces: readonly Piece[]): { ranges: VolumeRange[]; bytes: number } {
  const ranges: { offset: number; length: number }[] = [];
  let bytes = 0;
  let end = -1;
  for (const p of [...pieces].sort((a, b) => a.from - b.from)) {
    const from = Math.max(p.from, end);
    if (p.to <= end) continue;
    const last = ranges.at(-1);
    const length = (p.to - from) * BLOCK_BYTES;
    bytes += length;
    if (last !== undefined && last.offset + last.length === from * BLOCK_BYTES)
      last.length += length;
    else if (ranges.length < MAX_RANGES) ranges.push({ offset: from * BLOCK_BYTES, length });
    end = p.to;
  }
  return { ranges, bytes };
}

/** The points in `ranges`, as what is touched; marks them. */
export function touchedSeqs(
  ranges: readonly SeqRange[],
  volumeId: string,
  name: string,
  points: VolumePoints,
  affected: Uint8Array,
  device: readonly VolumeRange[] = [],
): TouchedVolume | undefined {
  let count = 0;
  let first = 0;
  let last = 0;
  points.seqs.forEach((seq, i) => {
    if (!ranges.some((r) => seq >= r.firstSeq && seq <= r.lastSeq)) return;
    affected[i] = 1;
    if (count++ === 0) first = seq;
    last = seq;
  });
  if (count === 0) return undefined;
  return {
    volumeId,
    name,
    points: count,
    firstSeq: first,
    lastSeq: last,
    runs: ranges.slice(0, MAX_RANGES),
    ranges: device.slice(0, MAX_RANGES),
    bytes: device.reduce((n, r) => n + r.length, 0),
  };
}
