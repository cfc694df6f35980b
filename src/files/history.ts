/**
 * Every version of a file over the points of a volume, with as few looks as possible.
 *
 * A look at a point tells what is at the path, and by which blocks of the image. Every point around it at which these blocks are the same
 * has the same version: that is **proven**, by the manifest alone. Between two stretches that are known points are halved until
 * the place where one version ends and the next begins is found.
 *
 * A version may come, go and come back (A → B → A), so that two equal looks say nothing about the points between them by themselves. Where the
 * file system keeps change times (ctime, which no program can set), an equal inode with an equal change time says that nobody changed
 * the file between, unless the device itself was written behind the file system's back (a restore in place). Then blocks that the look
 * read were written; so the manifest is asked about these: if none was written, points between are **inferred** to have the version.
 * If some was (a neighbour in the same block is enough), the longest such stretches are searched with a bounded number of further looks, and
 * what is left is inferred.
 *
 * Why not by the manifest alone: the journal of a mounted file system changes with every write, and is read by every mount.
 */
import type { Found, Look } from './history-look.js';
import type { BlockRange } from './recording.js';

/** What the search needs of the points; HistoryPoints has it. */
export interface SearchedPoints {
  readonly count: number;
  sameAround(
    i: number,
    ranges: readonly BlockRange[],
    lo: number,
    hi: number,
  ): Promise<{ readonly from: number; readonly to: number }>;
  written(ranges: readonly BlockRange[], a: number, b: number): Promise<boolean>;
}

export interface SearchOptions {
  readonly points: SearchedPoints;
  readonly look: (i: number) => Promise<Look>;
  /** The newest versions that are wanted; Infinity: all. */
  readonly limit: number;
  /** Looks for versions between two that are the same; Infinity: at every point that is not proven. */
  readonly extraLooks: number;
}

/** Neighbouring points with the same version. Indexes are those of the points. */
export interface Version {
  readonly first: number;
  readonly last: number;
  readonly look: Look;
  /** Points from first to last. */
  readonly points: number;
  /** The point before `first` was told to have another version (or there is none). */
  readonly startIsExact: boolean;
  /** The point after `last` was told to have another version (or there is none). */
  readonly endIsExact: boolean;
}

export interface VersionsFound {
  /** Newest first. */
  readonly versions: readonly Version[];
  /** Of the points from the oldest version on: how each is known. */
  readonly looked: number;
  readonly proven: number;
  readonly inferred: number;
  /** Nothing is known of them: between two versions, or between two times at which the file was not there. */
  readonly unknown: number;
  /** There are older versions than `limit` wanted. */
  readonly hasOlder: boolean;
}

/** Points [from, to], of which one was looked at and the others are proven. */
interface Stretch {
  readonly from: number;
  readonly to: number;
  readonly look: Look;
}

/**
 * Whether two looks show the same version: what is told of one, but for inode, change time, links and allocation. Two looks that could not
 * tell count as one.
 */
export function sameVersion(a: Found, b: Found): boolean {
  if (a.state !== b.state) return false;
  if (a.state !== 'present' || b.state !== 'present') return true;
  const [x, y] = [a.entry, b.entry];
  return (
    x.kind === y.kind &&
    x.permissions === y.permissions &&
    x.uid === y.uid &&
    x.gid === y.gid &&
    x.mtimeNs === y.mtimeNs &&
    x.target === y.target &&
    a.sha256 === b.sha256 &&
    // The size of a directory is that of its table of names.
    (x.kind === 'directory' || x.sizeBytes === y.sizeBytes)
  );
}

/** Whether change times say that nothing happened to the path between two looks with the same version. */
function isUntouched(a: Look, b: Look): boolean {
  if (!a.hasChangeTimes || !b.hasChangeTimes || a.fileSystem !== b.fileSystem) return false;
  const [x, y] = [witness(a.found), witness(b.found)];
  return (
    x !== undefined &&
    y !== undefined &&
    x.path === y.path &&
    x.inode === y.inode &&
    x.ctimeNs === y.ctimeNs
  );
}

/** The inode that would have changed: a file's own, or the directory in which it would have been. */
function witness(found: Found): { path: string; inode: bigint; ctimeNs: bigint } | undefined {
  if (found.state === 'present') return found.entry;
  return found.state === 'absent' ? found.nearest : undefined;
}

/**
 * - `change`: something happened between (another version, or another change time);
 * - `open`: nothing says that something happened, nor that nothing did;
 * - `search`: nothing happened by the change time, but blocks that the looks read were written;
 * - `quiet`: nothing happened by either.
 */
type GapKind = 'change' | 'open' | 'search' | 'quiet';

interface Gap {
  readonly older: Stretch;
  readonly newer: Stretch;
}

class Search {
  readonly #options: SearchOptions;
  /** Ascending, without overlap. */
  readonly #stretches: Stretch[] = [];
  readonly #kinds = new WeakMap<Stretch, { readonly newer: Stretch; readonly kind: GapKind }>();

  constructor(options: SearchOptions) {
    this.#options = options;
  }

  async run(): Promise<VersionsFound> {
    const { points } = this.#options;
    await this.#lookAt(points.count - 1, 0, points.count - 1);
    const [first] = this.#stretches;
    if (first !== undefined && first.from > 0) await this.#lookAt(0, 0, first.from - 1);
    let extra = this.#options.extraLooks;
    for (;;) {
      const gap = await this.#next(extra > 0);
      if (gap === undefined) break;
      if (gap.kind !== 'change') extra--;
      const lo = gap.older.to + 1;
      const hi = gap.newer.from - 1;
      await this.#lookAt(Math.floor((lo + hi) / 2), lo, hi);
    }
    return this.#result();
  }

  async #lookAt(i: number, lo: number, hi: number): Promise<void> {
    const look = await this.#options.look(i);
    const isTold = look.found.state !== 'unreadable';
    const { from, to } = isTold
      ? await this.#options.points.sameAround(i, look.reads, lo, hi)
      : { from: i, to: i };
    const at = this.#stretches.findIndex((s) => s.from > i);
    this.#stretches.splice(at < 0 ? this.#stretches.length : at, 0, { from, to, look });
  }

  /** Index of the oldest stretch that belongs to the versions that are wanted. */
  #oldestWanted(): number {
    let versions = 1;
    for (let n = this.#stretches.length - 1; n > 0; n--) {
      const [older, newer] = [this.#stretches[n - 1], this.#stretches[n]];
      if (older === undefined || newer === undefined) break;
      if (!sameVersion(older.look.found, newer.look.found) && ++versions > this.#options.limit) {
        return n;
      }
    }
    return 0;
  }

  /** What is left between two stretches, and of which kind it is. Undefined: nothing is left. */
  async #gapBefore(n: number): Promise<(Gap & { readonly kind: GapKind }) | undefined> {
    const [older, newer] = [this.#stretches[n - 1], this.#stretches[n]];
    if (older === undefined || newer === undefined || older.to + 1 >= newer.from) return undefined;
    const known = this.#kinds.get(older);
    if (known?.newer === newer) return { older, newer, kind: known.kind };
    const kind = await this.#kindOf({ older, newer });
    this.#kinds.set(older, { newer, kind });
    return { older, newer, kind };
  }

  async #kindOf({ older, newer }: Gap): Promise<GapKind> {
    const [a, b] = [older.look, newer.look];
    if (!sameVersion(a.found, b.found)) return 'change';
    if (!isUntouched(a, b)) {
      const isChange =
        a.hasChangeTimes &&
        b.hasChangeTimes &&
        a.found.state === 'present' &&
        a.fileSystem === b.fileSystem;
      return isChange ? 'change' : 'open';
    }
    const { points } = this.#options;
    // Where all came out of the journal, no block can tell.
    const isBlind = a.lookupReads.length === 0 || b.lookupReads.length === 0;
    const isWritten =
      isBlind ||
      (await points.written(a.lookupReads, older.to, newer.from)) ||
      (await points.written(b.lookupReads, older.to, newer.from));
    return isWritten ? 'search' : 'quiet';
  }

  /** Where to look next: at changes, the newest first; then in the longest gap that may hide something. */
  async #next(mayDoMore: boolean): Promise<(Gap & { readonly kind: GapKind }) | undefined> {
    let best: (Gap & { readonly kind: GapKind }) | undefined;
    let most = 0;
    // The gap before the oldest wanted stretch too: it is where that version begins.
    for (let n = this.#stretches.length - 1; n >= Math.max(1, this.#oldestWanted()); n--) {
      const gap = await this.#gapBefore(n);
      if (gap === undefined) continue;
      if (gap.kind === 'change') return gap;
      if (!mayDoMore) continue;
      if (gap.kind === 'quiet' && this.#options.extraLooks !== Infinity) continue;
      const points = gap.newer.from - gap.older.to - 1;
      if (points > most) {
        most = points;
        best = gap;
      }
    }
    return best;
  }

  async #result(): Promise<VersionsFound> {
    const oldest = this.#oldestWanted();
    const versions: Version[] = [];
    let [inferred, unknown, looked, known] = [0, 0, 0, 0];
    let open: { first: number; last: number; look: Look; end: boolean } | undefined;
    const close = (startIsExact: boolean): void => {
      if (open === undefined) return;
      const { first, last, look, end } = open;
      versions.push({ first, last, look, points: last - first + 1, startIsExact, endIsExact: end });
      open = undefined;
    };
    for (let n = this.#stretches.length - 1; n >= oldest; n--) {
      const at = this.#stretches[n];
      if (at === undefined) break;
      looked++;
      known += at.to - at.from + 1;
      open ??= { first: at.from, last: at.to, look: at.look, end: versions.length === 0 };
      open.first = at.from;
      const older = this.#stretches[n - 1];
      if (older === undefined) {
        close(true);
        break;
      }
      const gap = await this.#gapBefore(n);
      const between = at.from - older.to - 1;
      const isSame = sameVersion(older.look.found, at.look.found);
      if (n === oldest) {
        close(between === 0);
        break;
      }
      if (gap?.kind === 'quiet' || gap?.kind === 'search') inferred += between;
      else unknown += between;
      if (!isSame) {
        close(between === 0);
        open = { first: older.from, last: older.to, look: older.look, end: between === 0 };
      }
    }
    return {
      versions,
      looked,
      proven: known - looked,
      inferred,
      unknown,
      hasOlder: oldest > 0,
    };
  }
}

/** Searches. There must be at least one point. */
export function findVersions(options: SearchOptions): Promise<VersionsFound> {
  if (options.points.count < 1) throw new RangeError('no points');
  return new Search(options).run();
}
