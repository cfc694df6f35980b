/** What to merge, to make and to delete so that a volume's manifest stays quick to read: pure policy, and its execution. */
import { isKind } from '../../errors.js';
import { segmentName, type SegmentName } from '../../format/names.js';
import { MAX_SEGMENT_LEVEL, MAX_SEGMENT_SPAN } from '../../format/segment.js';
import { chooseSegments } from './choose.js';
import { mergeSegments, putFullMap } from './merge.js';
import { openSegment, type SegmentContext, type SegmentReader } from './reader.js';
import type { SegmentTarget } from './writer.js';

/** What the policy knows of a segment. */
export interface SegmentFacts extends SegmentName {
  readonly extentCount: number;
  readonly lastFullFirstSeq: number;
}

export type MaintenanceStep =
  | { readonly kind: 'delete'; readonly segment: SegmentName }
  | { readonly kind: 'merge'; readonly inputs: readonly SegmentName[]; readonly level: number }
  | { readonly kind: 'full'; readonly seq: number };

export interface MaintenancePolicy {
  /** Segments of a level that make one of the next. */
  readonly fanOut: number;
  /** A full map is worth it from this many records on. */
  readonly minFullRecords: number;
}

/** Each record is rewritten once a level (16^4 packs make 4 levels); a point is made of at most 15 segments a level. */
export const DEFAULT_POLICY: MaintenancePolicy = { fanOut: 16, minFullRecords: 65_536 };

/**
 * The next thing to do, or undefined if all is well. Do it and ask again. Any step may be repeated or left undone (a crash) without
 * harm:
 * 1. delete a delta whose commits longer deltas hold;
 * 2. merge the oldest `fanOut` neighbours of one level into one of the next (smaller ones that lie between them go along);
 * 3. make a full map at the end of the chain when the deltas since the last one (or since a full commit that is a
 *    segment of its own) have more records than that, and at least `minFullRecords`. So all full maps together are no
 *    larger than all deltas. They stay: each serves the points up to the next.
 */
export function nextStep(
  segments: readonly SegmentFacts[],
  policy: MaintenancePolicy = DEFAULT_POLICY,
): MaintenanceStep | undefined {
  const { chain, fullMaps, covered } = chooseSegments(segments);
  const [useless] = covered;
  if (useless !== undefined) return { kind: 'delete', segment: useless };
  const facts = new Map(segments.map((s) => [segmentName(s), s]));
  // Nothing is merged over a gap. A full map behind one needs a full commit or map there (FORMAT.md 6.9).
  const runs: SegmentFacts[][] = [[]];
  let upto = 0;
  for (const link of chain) {
    const s = facts.get(segmentName(link.segment));
    if (s === undefined || s.firstSeq <= upto) break;
    if (s.firstSeq > upto + 1) runs.push([]);
    runs.at(-1)?.push(s);
    upto = s.lastSeq;
  }
  for (const run of runs) {
    const merge = nextMerge(run, policy);
    if (merge !== undefined) return merge;
  }
  const last = runs.at(-1) ?? [];
  const from = last[0]?.firstSeq ?? 1;
  const whole =
    runs.length === 1 ||
    last.some((s) => s.lastFullFirstSeq >= from) ||
    fullMaps.some((m) => m.lastSeq >= from);
  return whole ? nextFull(last, fullMaps, facts, policy) : undefined;
}

function nextMerge(
  chain: readonly SegmentFacts[],
  policy: MaintenancePolicy,
): MaintenanceStep | undefined {
  const levels = [...new Set(chain.map((s) => s.level ?? 0))].sort((a, b) => a - b);
  for (const level of levels) {
    if (level >= MAX_SEGMENT_LEVEL) continue;
    let group: SegmentFacts[] = [];
    for (const s of chain) {
      const own = s.level ?? 0;
      if (own > level) {
        group = [];
        continue;
      }
      if (group.length === 0 && own < level) continue;
      group.push(s);
      const first = group[0];
      if (first === undefined || s.lastSeq - first.firstSeq > MAX_SEGMENT_SPAN) {
        group = [s];
        continue;
      }
      const count = group.reduce((n, g) => n + (g.level === level ? 1 : 0), 0);
      if (count >= policy.fanOut) return { kind: 'merge', inputs: group, level: level + 1 };
    }
  }
  return undefined;
}

function nextFull(
  chain: readonly SegmentFacts[],
  fullMaps: readonly SegmentName[],
  facts: ReadonlyMap<string, SegmentFacts>,
  policy: MaintenancePolicy,
): MaintenanceStep | undefined {
  const end = chain.at(-1)?.lastSeq ?? 0;
  let baseSeq = 0;
  let baseRecords = 0;
  const better = (s: SegmentFacts): void => {
    if (s.lastSeq <= baseSeq || s.lastSeq > end) return;
    baseSeq = s.lastSeq;
    baseRecords = s.extentCount;
  };
  for (const m of fullMaps) {
    const s = facts.get(segmentName(m));
    if (s !== undefined) better(s);
  }
  // A segment that is one full commit and nothing else is as good as a map.
  for (const s of chain)
    if (s.lastFullFirstSeq === s.firstSeq && s.firstSeq === s.lastSeq) better(s);
  let since = 0;
  for (const s of chain) {
    if (s.lastSeq <= baseSeq) continue;
    // Of a segment that reaches before the base, by proportion.
    const share = (s.lastSeq - Math.max(s.firstSeq - 1, baseSeq)) / (s.lastSeq - s.firstSeq + 1);
    since += s.extentCount * share;
  }
  const enough = Math.max(policy.minFullRecords, baseRecords);
  return since >= enough && end > baseSeq ? { kind: 'full', seq: end } : undefined;
}

/** Times that segments may vanish under {@link maintainManifest} before it gives way. */
const MAX_TOO_LATE = 5;

/** What {@link maintainManifest} did. */
export interface MaintenanceDone {
  readonly merged: number;
  readonly fullMaps: number;
  readonly deleted: number;
}

/**
 * Carries out the policy until nothing is left to do, or `signal` aborts (between steps). Puts before it deletes; safe to run beside
 * readers, and harmless beside another run of itself. `target` gives what a new segment is written with: a fresh salt and the time.
 */
export async function maintainManifest(
  context: SegmentContext,
  target: () => SegmentTarget,
  list: () => Promise<readonly SegmentName[]>,
  options: { readonly policy?: MaintenancePolicy; readonly signal?: AbortSignal | undefined } = {},
): Promise<MaintenanceDone> {
  const open = new Map<string, SegmentReader>();
  let merged = 0;
  let fullMaps = 0;
  let deleted = 0;
  let tooLate = 0;
  const ready = async (s: SegmentName): Promise<SegmentReader> => {
    const name = segmentName(s);
    const reader = open.get(name) ?? (await openSegment(context, name));
    open.set(name, reader);
    return reader;
  };
  const remove = async (s: SegmentName): Promise<void> => {
    const name = segmentName(s);
    await open.get(name)?.close();
    open.delete(name);
    await context.store.delete(name);
    deleted++;
  };
  try {
    while (options.signal?.aborted !== true) {
      const names = await list();
      const { chain, fullMaps: maps, covered } = chooseSegments(names);
      const deltas: SegmentReader[] = [];
      const fulls: SegmentReader[] = [];
      try {
        for (const link of chain) deltas.push(await ready(link.segment));
        for (const m of maps) fulls.push(await ready(m));
      } catch (error) {
        // Another run merged it away after the list: look again. Who is always too late leaves it to the other.
        if (!isKind(error, 'not-found')) throw error;
        if (++tooLate > MAX_TOO_LATE) break;
        continue;
      }
      const facts: SegmentFacts[] = [...deltas, ...fulls].map((r) => ({
        ...r.header,
        extentCount: r.index.extentCount,
        lastFullFirstSeq: r.index.lastFullFirstSeq,
      }));
      for (const c of covered) facts.push({ ...c, extentCount: 0, lastFullFirstSeq: 0 });
      const step = nextStep(facts, options.policy);
      if (step === undefined) break;
      switch (step.kind) {
        case 'delete':
          await remove(step.segment);
          break;
        case 'merge':
          await mergeSegments(
            target(),
            step.inputs.map((n) => at(open, n)),
            step.level,
          );
          merged++;
          for (const n of step.inputs) await remove(n);
          break;
        case 'full':
          await putFullMap(target(), { deltas, fulls }, step.seq);
          fullMaps++;
          break;
      }
    }
    return { merged, fullMaps, deleted };
  } finally {
    for (const r of open.values()) await r.close();
  }
}

function at(open: ReadonlyMap<string, SegmentReader>, n: SegmentName): SegmentReader {
  const reader = open.get(segmentName(n));
  if (reader === undefined) throw new RangeError(`${segmentName(n)} is not open`);
  return reader;
}
