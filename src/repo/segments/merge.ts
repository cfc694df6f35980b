/** Merging segments into longer ones, and making full maps (FORMAT.md section 7). */
import { damaged } from '../../format/bytes.js';
import { HOLE, STRIPE_BLOCKS } from '../../format/extent.js';
import { ZERO_HASH } from '../../format/commit.js';
import { blocksOf } from '../../units.js';
import { pointSources, type HistorySources } from './point.js';
import {
  placeAt,
  placesJoin,
  RecordCursor,
  RecordHeap,
  visiblePieces,
  type Place,
} from './records.js';
import type { SegmentSource } from './source.js';
import { copyCommits, PackMap, putSegment, type SegmentTarget } from './writer.js';

/** Records between two moments at which finished pages go to the store. */
const YIELD_EVERY = 8192;

/**
 * Puts one delta segment of `level` that holds what `inputs` hold: segments that follow each other without gap or overlap, ascending. Memory: two
 * pages an input, and what the pack tables need. Resolves to the object's name. The inputs may be deleted then, not before.
 */
export async function mergeSegments(
  target: SegmentTarget,
  inputs: readonly SegmentSource[],
  level: number,
): Promise<string> {
  const first = inputs[0];
  const last = inputs.at(-1);
  if (first === undefined || last === undefined) throw new RangeError('nothing to merge');
  inputs.forEach((s, i) => {
    const before = inputs[i - 1];
    if (s.level === undefined || (before !== undefined && s.firstSeq !== before.lastSeq + 1)) {
      throw new RangeError(`${s.name} does not follow ${before?.name ?? 'nothing'}`);
    }
    if (before !== undefined && !s.index.prevHash.equals(before.index.lastHash)) {
      throw damaged(
        s.name,
        0,
        `it does not continue ${before.name}: the hash of commit ${before.lastSeq} differs`,
      );
    }
  });
  const range = { level, firstSeq: first.firstSeq, lastSeq: last.lastSeq };
  return putSegment(target, range, first.index.prevHash, async function* (builder) {
    const maps = new Map(inputs.map((s) => [s, new PackMap(builder, s)]));
    const cursors = inputs.map(
      (source) =>
        new RecordCursor(
          { source, afterSeq: source.firstSeq - 1, uptoSeq: source.lastSeq },
          0,
          Number.MAX_SAFE_INTEGER,
        ),
    );
    const heap = await RecordHeap.open(cursors);
    for (let n = 1; ; n++) {
      const top = heap.top;
      if (top === undefined) break;
      const { page, i, source } = top;
      const map = maps.get(source);
      if (page === undefined || map === undefined)
        throw new RangeError('a cursor without a record');
      const pack = map.known(page.pack(i)) ?? (await map.learn(page.pack(i)));
      builder.addExtent(
        top.block,
        page.count(i),
        top.seq,
        pack,
        page.frame(i),
        page.sub(i),
        page.skip(i),
      );
      if (!heap.step()) await heap.load();
      if (n % YIELD_EVERY === 0) yield;
    }
    yield;
    for (const s of inputs) yield* copyCommits(builder, s, s.firstSeq - 1, s.lastSeq);
  });
}

/**
 * Puts the full map of the state at commit `seq`. Resolves to the object's name. Memory: two pages a source, and what the pack
 * tables need.
 */
export async function putFullMap(
  target: SegmentTarget,
  history: HistorySources,
  seq: number,
): Promise<string> {
  const { windows, commit } = await pointSources(history, seq);
  const blocks = blocksOf(commit.sizeBytes);
  const { chunkBlocks } = target;
  const range = { level: undefined, firstSeq: 1, lastSeq: seq };
  return putSegment(target, range, ZERO_HASH, async function* (builder) {
    const maps = new Map(windows.map((w) => [w.source, new PackMap(builder, w.source)]));
    let block = 0;
    let count = 0;
    let pack = HOLE;
    let place: Place = { frame: 0, sub: 0, skip: 0 };
    const flush = (): void => {
      if (count > 0) builder.addExtent(block, count, seq, pack, place.frame, place.sub, place.skip);
      count = 0;
    };
    for await (const batch of visiblePieces(windows, 0, blocks)) {
      for (const p of batch) {
        const sourcePack = p.page.pack(p.i);
        if (sourcePack === HOLE) continue;
        const map = maps.get(p.source);
        if (map === undefined) throw new RangeError('a piece of another source');
        const index = map.known(sourcePack) ?? (await map.learn(sourcePack));
        const at = placeAt(p.page, p.i, p.from, chunkBlocks);
        if (
          count > 0 &&
          index === pack &&
          p.from === block + count &&
          p.from % STRIPE_BLOCKS !== 0 &&
          placesJoin(place, count, at, p.to - p.from, chunkBlocks)
        ) {
          count += p.to - p.from;
          continue;
        }
        flush();
        block = p.from;
        count = p.to - p.from;
        pack = index;
        place = at;
      }
      yield;
    }
    flush();
    yield;
    builder.addCommit(commit, builder.packIndex(Buffer.from(commit.packId, 'hex')));
  });
}
