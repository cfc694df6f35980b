/** The segments of one volume: which there are, which of them count, and what a point is made of. */
import { B2Error, isKind } from '../../errors.js';
import { CommitFlag, ZERO_HASH } from '../../format/commit.js';
import { parseSegmentName, type SegmentName } from '../../format/names.js';
import type { CommitRecord } from '../../format/segment.js';
import { memorySegment } from './memory.js';
import { openSegment, type SegmentContext, type SegmentReader } from './reader.js';
import type { SourceWindow } from './records.js';
import {
  commitPageOf,
  commitRecordOf,
  findCommit,
  type JournalCommit,
  type SegmentSource,
} from './source.js';

/** A segment that is in the store. */
export interface ListedSegment extends SegmentName {
  /** The object's name. */
  readonly name: string;
  readonly sizeBytes: number;
}

/** A segment of the chain, and the commits (afterSeq, uptoSeq] that are taken from it. */
export interface ChainLink {
  readonly segment: ListedSegment;
  readonly afterSeq: number;
  readonly uptoSeq: number;
}

/** Which segments count. */
export interface ManifestListing {
  /** Delta segments, ascending, without overlap. A gap between two (or before the first) means missing commits. */
  readonly chain: readonly ChainLink[];
  /** Ascending by the point they hold. */
  readonly fullMaps: readonly ListedSegment[];
  /** Delta segments whose commits longer ones hold (left over by a crash between put and delete). */
  readonly covered: readonly ListedSegment[];
}

/** Sorts out what the segments of a volume are for. Where segments overlap the longer counts (FORMAT.md 6.6). */
export function chooseSegments(segments: readonly ListedSegment[]): ManifestListing {
  const fullMaps = segments
    .filter((s) => s.level === undefined)
    .sort((a, b) => a.lastSeq - b.lastSeq);
  const deltas = segments
    .filter((s) => s.level !== undefined)
    .sort(
      (a, b) =>
        a.firstSeq - b.firstSeq || b.lastSeq - a.lastSeq || (b.level ?? 0) - (a.level ?? 0),
    );
  const chain: ChainLink[] = [];
  const used = new Set<ListedSegment>();
  let upto = 0;
  let next = 0;
  let best: ListedSegment | undefined;
  while (next < deltas.length || best !== undefined) {
    // Of those that hold commit upto + 1, the one that goes on longest.
    for (; next < deltas.length; next++) {
      const s = deltas[next];
      if (s === undefined || s.firstSeq > upto + 1) break;
      if (s.lastSeq > upto && (best === undefined || s.lastSeq > best.lastSeq)) best = s;
    }
    if (best !== undefined && best.lastSeq > upto) {
      chain.push({ segment: best, afterSeq: upto, uptoSeq: best.lastSeq });
      used.add(best);
      upto = best.lastSeq;
    } else if (next < deltas.length) {
      upto = (deltas[next]?.firstSeq ?? 1) - 1;
    }
    best = undefined;
  }
  return { chain, fullMaps, covered: deltas.filter((s) => !used.has(s)) };
}

/** Segments that nobody uses are kept open up to this many, for the next image. */
const IDLE_SEGMENTS = 64;
/** Segments opened at a time. */
const OPEN_AT_ONCE = 8;
/** How often a listing is taken again when a segment vanished between the listing and its opening. */
const LISTINGS = 5;

interface Held {
  readonly reader: Promise<SegmentReader>;
  users: number;
}

/** What the state at a commit is made of. Release it when done. */
export interface PointSources {
  /** Newest first; for every block the first window that has a record of it decides. */
  readonly windows: readonly SourceWindow[];
  readonly commit: CommitRecord;
  /** May be called twice. */
  release(): Promise<void>;
}

/** The whole chain. Release it when done. */
export interface ChainSources {
  /** Ascending, without gaps; the last may be the journal. */
  readonly windows: readonly SourceWindow[];
  release(): Promise<void>;
}

/**
 * Reads the manifest of one volume. Open segments are shared by everything that is opened through one Manifest.
 *
 * `journal`, wherever it is asked for, is what was read of the volume's journal *before* the call: the commits that were in no
 * segment then, ascending. By the order of writing (segment first, then the journal entry goes) nothing is missed that way; what is in
 * both is taken from the segment.
 */
export class Manifest {
  readonly context: SegmentContext;
  readonly #held = new Map<string, Held>();
  #closed = false;
  #memory: { journal: readonly JournalCommit[]; after: number; source: SegmentSource } | undefined;

  constructor(context: SegmentContext) {
    this.context = context;
  }

  async list(): Promise<ManifestListing> {
    const segments: ListedSegment[] = [];
    const prefix = `volumes/${this.context.volumeId}/manifest`;
    for await (const object of this.context.store.list(prefix)) {
      const parsed = parseSegmentName(object.name);
      if (parsed === undefined || parsed.firstSeq < 1) continue;
      segments.push({ ...parsed, name: object.name, sizeBytes: object.sizeBytes });
    }
    return chooseSegments(segments);
  }

  /** Opens a segment, or hands out the one that is open. Every call needs one `release`. */
  async acquire(name: string): Promise<SegmentReader> {
    if (this.#closed) throw new RangeError('the manifest is closed');
    let held = this.#held.get(name);
    if (held === undefined) {
      held = { reader: openSegment(this.context, name), users: 0 };
    } else {
      this.#held.delete(name); // to the end: the most recently used
    }
    this.#held.set(name, held);
    held.users++;
    try {
      return await held.reader;
    } catch (error) {
      if (this.#held.get(name) === held) this.#held.delete(name);
      throw error;
    }
  }

  async release(name: string): Promise<void> {
    const held = this.#held.get(name);
    if (held === undefined) return;
    held.users--;
    await this.#trim(IDLE_SEGMENTS);
  }

  /** Closes the segments nobody uses (after a merge deleted some, so that their space is free). */
  async trim(): Promise<void> {
    await this.#trim(0);
  }

  async close(): Promise<void> {
    this.#closed = true;
    const all = [...this.#held.values()];
    this.#held.clear();
    for (const held of all) await (await held.reader).close();
  }

  /** All commits there are. Rejects with `damaged` where some are missing. */
  async chain(journal: readonly JournalCommit[]): Promise<ChainSources> {
    return this.#listing(async (listing) => {
      const { chain } = listing;
      const tail = this.#journalSource(journal, chain.at(-1)?.uptoSeq ?? 0);
      let upto = 0;
      for (const link of chain) {
        if (link.afterSeq !== upto) throw this.#missing(upto + 1, link.afterSeq);
        upto = link.uptoSeq;
      }
      if (tail !== undefined && tail.firstSeq !== upto + 1) throw this.#missing(upto + 1, tail.firstSeq - 1);
      const { readers, release } = await this.#acquireAll(chain.map((l) => l.segment.name));
      const windows: SourceWindow[] = chain.map((link, i) => ({
        source: at(readers, i),
        afterSeq: link.afterSeq,
        uptoSeq: link.uptoSeq,
      }));
      if (tail !== undefined) {
        windows.push({ source: tail, afterSeq: tail.firstSeq - 1, uptoSeq: tail.lastSeq });
      }
      return { windows, release };
    });
  }

  /**
   * What the state at commit `seq` is made of (FORMAT.md section 8). Kind `not-found` if there is no such commit (any more: it may have been
   * merged into a later one), `damaged` if commits that it needs are missing.
   */
  async pointSources(seq: number, journal: readonly JournalCommit[]): Promise<PointSources> {
    const unreadable = new Set<string>();
    return this.#listing(async (listing) => {
      for (;;) {
        const base = listing.fullMaps.findLast((m) => m.lastSeq <= seq && !unreadable.has(m.name));
        try {
          return await this.#pointSources(seq, journal, listing.chain, base);
        } catch (error) {
          // A full map only saves work: what it holds is in the deltas too.
          if (base === undefined || !isKind(error, 'damaged') || unreadable.has(base.name)) throw error;
          unreadable.add(base.name);
        }
      }
    });
  }

  async #pointSources(
    seq: number,
    journal: readonly JournalCommit[],
    chain: readonly ChainLink[],
    base: ListedSegment | undefined,
  ): Promise<PointSources> {
    const baseSeq = base?.lastSeq ?? 0;
    const last = chain.at(-1)?.uptoSeq ?? 0;
    const tail = seq > last ? this.#journalSource(journal, last) : undefined;
    if (seq < 1 || seq > (tail?.lastSeq ?? last)) throw this.#noSuchPoint(seq);
    let need = seq;
    const windows: SourceWindow[] = [];
    if (tail !== undefined) {
      windows.push({ source: tail, afterSeq: tail.firstSeq - 1, uptoSeq: seq });
      need = tail.firstSeq - 1;
    }
    const links: ChainLink[] = [];
    for (let i = chain.length - 1; i >= 0 && need > baseSeq; i--) {
      const link = at(chain, i);
      if (link.afterSeq >= need) continue;
      if (link.uptoSeq < need) break;
      links.push(link);
      need = link.afterSeq;
    }
    const names = links.map((l) => l.segment.name);
    if (base !== undefined) names.push(base.name);
    const { readers, release } = await this.#acquireAll(names);
    try {
      links.forEach((link, i) => {
        windows.push({
          source: at(readers, i),
          afterSeq: Math.max(link.afterSeq, baseSeq),
          uptoSeq: Math.min(link.uptoSeq, seq),
        });
      });
      const baseReader = base === undefined ? undefined : at(readers, readers.length - 1);
      const holder = baseSeq === seq ? baseReader : windows[0]?.source;
      if (holder === undefined) throw this.#missing(need, seq);
      const stored = await findCommit(holder, seq);
      if (stored === undefined) throw this.#noSuchPoint(seq);
      const commit = await commitRecordOf(holder, stored);
      const used: SourceWindow[] = [];
      let emptied = false;
      for (const w of windows) {
        const after = await lastFullCommitBase(w);
        used.push(after === undefined ? w : { ...w, afterSeq: after });
        if (after !== undefined) {
          emptied = true;
          break;
        }
      }
      if (!emptied) {
        if (need > baseSeq) throw this.#missing(baseSeq + 1, need);
        if (baseReader !== undefined) {
          used.push({ source: baseReader, afterSeq: 0, uptoSeq: baseSeq });
        }
      }
      return { windows: used, commit, release };
    } catch (error) {
      await release();
      throw error;
    }
  }

  /** Runs `use` on a listing, and again on a new one while segments vanish under it (merged by somebody else). */
  async #listing<T>(use: (listing: ManifestListing) => Promise<T>): Promise<T> {
    for (let attempt = 1; ; attempt++) {
      const listing = await this.list();
      const names = [...listing.chain.map((l) => l.segment), ...listing.fullMaps].map((s) => s.name);
      try {
        return await use(listing);
      } catch (error) {
        if (attempt >= LISTINGS || !isKind(error, 'not-found')) throw error;
        const again = await this.list();
        const now = new Set([...again.chain.map((l) => l.segment), ...again.fullMaps].map((s) => s.name));
        if (names.every((n) => now.has(n))) throw error;
      }
    }
  }

  async #acquireAll(
    names: readonly string[],
  ): Promise<{ readers: SegmentReader[]; release: () => Promise<void> }> {
    const readers: SegmentReader[] = [];
    const got: string[] = [];
    let failed: unknown;
    let next = 0;
    const worker = async (): Promise<void> => {
      while (next < names.length && failed === undefined) {
        const i = next++;
        const name = at(names, i);
        try {
          readers[i] = await this.acquire(name);
          got.push(name);
        } catch (error) {
          failed ??= error;
        }
      }
    };
    await Promise.all(Array.from({ length: Math.min(OPEN_AT_ONCE, names.length) }, worker));
    let released = false;
    const release = async (): Promise<void> => {
      if (released) return;
      released = true;
      for (const name of got) await this.release(name);
    };
    if (failed !== undefined) {
      await release();
      throw failed instanceof Error ? failed : new Error(String(failed));
    }
    return { readers, release };
  }

  #journalSource(journal: readonly JournalCommit[], afterSeq: number): SegmentSource | undefined {
    if (this.#memory?.journal === journal && this.#memory.after === afterSeq) return this.#memory.source;
    const rest = journal.filter((c) => c.seq > afterSeq);
    if (rest.length === 0) return undefined;
    const source = memorySegment(rest, ZERO_HASH, `journal of volume ${this.context.volumeId}`);
    this.#memory = { journal, after: afterSeq, source };
    return source;
  }

  async #trim(most: number): Promise<void> {
    if (this.#closed) return;
    let idle = 0;
    for (const held of this.#held.values()) if (held.users === 0) idle++;
    const closing: Held[] = [];
    for (const [name, held] of this.#held) {
      if (idle <= most) break;
      if (held.users > 0) continue;
      this.#held.delete(name);
      closing.push(held);
      idle--;
    }
    for (const held of closing) await (await held.reader).close();
  }

  #missing(first: number, last: number): B2Error {
    return new B2Error(
      'damaged',
      `volume ${this.context.volumeId}: commits ${first} to ${last} are in no segment and in no journal`,
      { hint: 'Run "b2 repair" to rebuild the manifest from the packs.' },
    );
  }

  #noSuchPoint(seq: number): B2Error {
    return new B2Error('not-found', `volume ${this.context.volumeId} has no point #${seq}`, {
      hint: 'Run "b2 points" to see which there are.',
    });
  }
}

function at<T>(list: readonly T[], i: number): T {
  const v = list[i];
  if (v === undefined) throw new RangeError(`no element ${i}`);
  return v;
}

/**
 * If a full commit is among those of the window: the sequence number after which commits count, because the last full one hid
 * what was before.
 */
async function lastFullCommitBase(w: SourceWindow): Promise<number | undefined> {
  const { source, afterSeq, uptoSeq } = w;
  const last = source.index.lastFullSeq;
  if (last <= afterSeq) return undefined;
  if (last <= uptoSeq) return ((await findCommit(source, last))?.firstSeq ?? last) - 1;
  // The last full one is after the point asked for; only the commits pages know of those before it.
  for (let p = commitPageOf(source, uptoSeq); p >= 0; p--) {
    const page = await source.commitPage(p, false);
    for (let i = page.length - 1; i >= 0; i--) {
      const seq = page.seq(i);
      if (seq > uptoSeq) continue;
      if (seq <= afterSeq) return undefined;
      if ((page.flags(i) & CommitFlag.full) !== 0) return page.record(i).firstSeq - 1;
    }
  }
  return undefined;
}
