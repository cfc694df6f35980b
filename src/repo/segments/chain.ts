/** Checks of the chain and of the segments themselves, for verify. */
import { B2Error, isKind } from '../../errors.js';
import { CommitFlag, ZERO_HASH } from '../../format/commit.js';
import type { StoredCommit } from '../../format/segment.js';
import type { HistorySources } from './point.js';
import { findCommit, type SegmentSource } from './source.js';

/** Something wrong with the manifest. Commits `firstSeq` to `lastSeq` are touched by it. */
export interface ManifestFinding {
  /** The segment it was found in. */
  readonly object: string;
  readonly problem: string;
  readonly firstSeq: number;
  readonly lastSeq: number;
}

/**
 * Reads every commits page and checks that the commits from 1 on make one chain: no gap, no fork at the borders of segments,
 * epochs that never fall, indexes that say what the pages do, and that segments that overlap (`covered`: those beside the chain, and full
 * maps) agree with it. What a commit's own frame says of its predecessor is for the pack side of verify.
 */
export async function* checkChain(
  history: HistorySources,
  covered: readonly SegmentSource[] = [],
): AsyncGenerator<ManifestFinding> {
  const { deltas } = history;
  let before: SegmentSource | undefined;
  let epoch = 0;
  for (const s of deltas) {
    const expected = before === undefined ? 1 : before.lastSeq + 1;
    if (s.firstSeq > expected) {
      yield finding(
        s,
        `commits ${expected} to ${s.firstSeq - 1} are missing before it`,
        expected,
        s.firstSeq - 1,
      );
    } else if (s.firstSeq === expected) {
      const hash = before?.index.lastHash ?? ZERO_HASH;
      if (!s.index.prevHash.equals(hash)) {
        yield finding(
          s,
          `it does not continue ${before?.name ?? 'an empty volume'}: the hash of commit ${expected - 1} differs`,
        );
      }
    } else if (before !== undefined) {
      yield* checkAgainst(s, [before]);
    }
    for await (const f of checkCommits(s, epoch)) {
      if ('epoch' in f) epoch = f.epoch;
      else yield f;
    }
    before = s;
  }
  for (const s of [...covered, ...history.fulls]) {
    yield* checkAgainst(s, deltas);
    for await (const f of checkCommits(s, 0)) if (!('epoch' in f)) yield f;
  }
}

/**
 * Reads every extents and pack id page of `source`, past the cache. A page that does not open or is not what the index says is a finding; other
 * failures reject.
 */
export async function* checkPages(source: SegmentSource): AsyncGenerator<ManifestFinding> {
  for (let p = 0; p < source.index.extents.length; p++) {
    const problem = await damageOf(source.extentPage(p, false));
    if (problem !== undefined) yield finding(source, problem);
  }
  for (let p = 0, pack = 0; p < source.index.packs.length; p++) {
    const problem = await damageOf(source.packId(pack));
    if (problem !== undefined) yield finding(source, problem);
    pack += source.index.packs.records[p] ?? 0;
  }
}

/** Walks the commits of one segment; at the end says the epoch of its last one. */
async function* checkCommits(
  s: SegmentSource,
  epochBefore: number,
): AsyncGenerator<ManifestFinding | { readonly epoch: number }> {
  const full = s.level === undefined;
  let upto = s.firstSeq - 1;
  let epoch = epochBefore;
  let last: StoredCommit | undefined;
  let lastFullFirstSeq = 0;
  let complete = true;
  for (let p = 0; p < s.index.commits.length; p++) {
    const from = s.index.commits.firstSeq[p] ?? s.firstSeq;
    try {
      const page = await s.commitPage(p, false);
      for (let i = 0; i < page.length; i++) {
        const c = page.record(i);
        if (!full && complete && c.firstSeq !== upto + 1) {
          yield finding(
            s,
            `commits ${upto + 1} to ${c.firstSeq - 1} are missing in it`,
            upto + 1,
            c.firstSeq - 1,
          );
        }
        if (c.epoch < epoch) {
          yield finding(
            s,
            `commit ${c.seq} has epoch ${c.epoch}, the one before it ${epoch}`,
            c.seq,
            c.seq,
          );
        }
        complete = true;
        upto = c.seq;
        epoch = c.epoch;
        last = c;
        if ((c.flags & CommitFlag.full) !== 0) lastFullFirstSeq = c.firstSeq;
      }
    } catch (error) {
      if (!isKind(error, 'damaged')) throw error;
      const to = (s.index.commits.firstSeq[p + 1] ?? s.lastSeq + 1) - 1;
      yield finding(s, error.message, from, to);
      complete = false;
    }
  }
  if (complete && last !== undefined) {
    if (!last.hash.equals(s.index.lastHash)) {
      yield finding(
        s,
        `its index has another hash for commit ${last.seq} than its pages`,
        last.seq,
        last.seq,
      );
    }
    if (last.seq !== s.lastSeq)
      yield finding(s, `it ends with commit ${last.seq}, not ${s.lastSeq}`);
    if (lastFullFirstSeq !== s.index.lastFullFirstSeq) {
      yield finding(
        s,
        `its index names ${s.index.lastFullFirstSeq} as the last full commit; it is ${lastFullFirstSeq}`,
      );
    }
  }
  yield { epoch };
}

/** Compares the commits of `s` with those that `others` have under the same sequence number. */
async function* checkAgainst(
  s: SegmentSource,
  others: readonly SegmentSource[],
): AsyncGenerator<ManifestFinding> {
  for (let p = 0; p < s.index.commits.length; p++) {
    let page;
    try {
      page = await s.commitPage(p, false);
    } catch (error) {
      if (!isKind(error, 'damaged')) throw error;
      continue; // told by checkCommits
    }
    for (let i = 0; i < page.length; i++) {
      const c = page.record(i);
      for (const o of others) {
        if (c.seq < o.firstSeq || c.seq > o.lastSeq) continue;
        try {
          const same = await findCommit(o, c.seq);
          if (same !== undefined && !same.hash.equals(c.hash)) {
            yield finding(s, `its commit ${c.seq} is another than that of ${o.name}`, c.seq, c.seq);
          }
        } catch (error) {
          if (!isKind(error, 'damaged')) throw error; // told by checkCommits of that segment
        }
      }
    }
  }
}

async function damageOf(read: Promise<unknown>): Promise<string | undefined> {
  try {
    await read;
    return undefined;
  } catch (error) {
    if (error instanceof B2Error && error.kind === 'damaged') return error.message;
    throw error;
  }
}

function finding(
  s: SegmentSource,
  problem: string,
  firstSeq = s.firstSeq,
  lastSeq = s.lastSeq,
): ManifestFinding {
  return { object: s.name, problem, firstSeq, lastSeq };
}
