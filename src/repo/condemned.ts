/** What prune means to delete (FORMAT.md section 4 kind 5, and 6.7). */
import { B2Error, isKind } from '../errors.js';
import { condemnedName, packName } from '../format/names.js';
import { ObjectKind } from '../format/object.js';
import { blocksOf } from '../units.js';
import type { ReadCommit } from './commits.js';
import type { Repository } from './repository.js';

/** How long a condemned object is kept after it was made: longer than any session may trust what it has read. */
export const CONDEMNED_KEPT_NS = 7n * 24n * 3600n * 1_000_000_000n;

export interface Condemned {
  readonly id: string;
  readonly createdNs: bigint;
  /** Packs that go whole. */
  readonly packs: readonly string[];
  /** Frames that go, by pack. */
  readonly frames: ReadonlyMap<string, readonly number[]>;
}

export async function putCondemned(repo: Repository, c: Condemned): Promise<void> {
  await repo.putObject(ObjectKind.condemned, condemnedName(c.id), {
    id: c.id,
    created: c.createdNs,
    packs: c.packs,
    frames: Object.fromEntries(c.frames),
  });
}

export async function readCondemned(repo: Repository, name: string): Promise<Condemned> {
  const o = await repo.getObject(ObjectKind.condemned, name);
  const { id, created, packs, frames } = o;
  const map = new Map<string, readonly number[]>();
  const isId = (v: unknown): v is string => typeof v === 'string' && /^[0-9a-f]{32}$/.test(v);
  let right =
    isId(id) &&
    typeof created === 'string' &&
    /^\d{1,20}$/.test(created) &&
    Array.isArray(packs) &&
    packs.every(isId) &&
    typeof frames === 'object' &&
    frames !== null;
  if (right) {
    for (const [pack, list] of Object.entries(frames as object)) {
      const value: unknown = list;
      if (!isId(pack) || !Array.isArray(value) || !value.every((n) => Number.isSafeInteger(n)))
        right = false;
      else map.set(pack, value as number[]);
    }
  }
  if (!right)
    throw new B2Error('damaged', `${name}: its payload is not that of a condemned object`);
  return {
    id: id as string,
    createdNs: BigInt(created as string),
    packs: packs as string[],
    frames: map,
  };
}

/**
 * Which places are condemned, kept up to date cheaply: an object is read once. A damaged one counts as condemning everything (what
 * it said is unknown), so that nothing is reused until it is gone.
 */
export class CondemnedPlaces {
  private readonly repo: Repository;
  private readonly known = new Map<string, Condemned | 'damaged'>();

  constructor(repo: Repository) {
    this.repo = repo;
  }

  /** Reads what is new and forgets what is gone. */
  async refresh(): Promise<void> {
    const seen = new Set<string>();
    for await (const { name } of this.repo.store.list('condemned')) {
      seen.add(name);
      if (this.known.has(name)) continue;
      try {
        this.known.set(name, await readCondemned(this.repo, name));
      } catch (error) {
        if (isKind(error, 'not-found')) seen.delete(name);
        else if (isKind(error, 'damaged')) this.known.set(name, 'damaged');
        else throw error;
      }
    }
    for (const name of this.known.keys()) if (!seen.has(name)) this.known.delete(name);
  }

  get isEmpty(): boolean {
    return this.known.size === 0;
  }

  /** True while an object is there that cannot be read: then nobody knows what it condemns. */
  get isUncertain(): boolean {
    for (const c of this.known.values()) if (c === 'damaged') return true;
    return false;
  }

  /** Condemned objects that could be read. */
  *readable(): Iterable<Condemned> {
    for (const c of this.known.values()) if (c !== 'damaged') yield c;
  }

  /** As {@link has}, by what could be read alone: what an object that is damaged condemns is not known. */
  hasSurely(packId: string, frame: number | undefined): boolean {
    for (const c of this.readable()) if (condemns(c, packId, frame)) return true;
    return false;
  }

  /** True if frame `frame` of `packId` (any frame of it if undefined) is to be deleted. */
  has(packId: string, frame: number | undefined): boolean {
    for (const c of this.known.values()) {
      if (c === 'damaged' || condemns(c, packId, frame)) return true;
    }
    return false;
  }
}

function condemns(c: Condemned, packId: string, frame: number | undefined): boolean {
  if (c.packs.includes(packId)) return true;
  const frames = c.frames.get(packId);
  return frames !== undefined && (frame === undefined || frames.includes(frame));
}

/**
 * True if a place that the commit names was condemned, as `isCondemned` says, and is gone: then it was never acknowledged (FORMAT.md 6.4).
 * What is gone without that is damage, and for verify to tell.
 */
export async function lacksCondemnedPlace(
  repo: Repository,
  c: ReadCommit,
  isCondemned: (packId: string, frame: number | undefined) => boolean,
): Promise<boolean> {
  const chunkBlocks = blocksOf(repo.chunkBytes);
  for (const [i, packId] of c.packIds.entries()) {
    if (!isCondemned(packId, undefined)) continue;
    repo.packs.forget(packId);
    const places = c.extents.filter((e) => e.pack === i);
    if ((await repo.store.stat(packName(packId))) === undefined) return true;
    try {
      const isGone = await repo.packs.use(packId, (pack) => {
        for (const e of places) {
          const last = e.frame + Math.floor((e.skip + e.count - 1) / chunkBlocks);
          for (let f = e.frame; f <= last; f++) {
            if (isCondemned(packId, f) && pack.frame(f) === undefined) return Promise.resolve(true);
          }
        }
        return Promise.resolve(false);
      });
      if (isGone) return true;
    } catch (error) {
      if (isKind(error, 'damaged') && isKind(error.cause, 'not-found')) return true; // a moment ago it was there
      throw error;
    }
  }
  return false;
}
