/**
 * What an export writes: the chunks that its points need and that the set does not hold yet, in the order of the packs they are
 * read from; which packs go to the tape as they are, and which of the other chunks to which pack made for it; and the commits of the points, which name
 * them there.
 */
import { B2Error } from '../errors.js';
import {
  CommitFlag,
  MAX_FRAME_EXTENTS,
  ZERO_HASH,
  encodeCommit,
  type ExtentsRef,
} from '../format/commit.js';
import { HOLE, STRIPE_BLOCKS, clipExtent, encodeExtents, type Extent } from '../format/extent.js';
import { FRAME_HEADER_BYTES, FrameType, MAX_PACK_FRAMES } from '../format/frame.js';
import { PACK_HEADER_BYTES, type FooterFrame } from '../format/pack.js';
import type { CommitRecord } from '../format/segment.js';
import type { PlaceOnTape } from '../format/tape.js';
import type { BlockMap } from '../repo/blockmap.js';
import type { OpenPack } from '../repo/pack-reader.js';
import { PackWriter } from '../repo/pack-writer.js';
import type { Repository } from '../repo/repository.js';
import type { VolumeMeta } from '../repo/volume.js';
import type { PlacedExtent } from '../repo/volume-writer.js';
import { blocksOf } from '../units.js';
import type { ChunkOnTape, SetIndex } from './catalogue.js';
import type { MapStore } from './map-store.js';
import { planCopy, type CopyPlan } from './pack-copier.js';
import { KEY_STEP, framesOf, type WantedChunks } from './pack-maker.js';
import { PACK_REST_BYTES, frameBytesAtMost } from './pack-work.js';

/** A point to be exported. */
export interface ExportPoint {
  readonly volume: VolumeMeta;
  readonly commit: CommitRecord;
  readonly map: BlockMap;
}

/** A pack of the tape, planned. */
export interface PlannedPack {
  /** Of a copy: that of the repository's pack. */
  readonly packId: string;
  readonly sources: readonly WantedChunks[];
  /** What it takes at most. */
  readonly roomBytes: number;
  /** The only source goes to the tape as it is, in these pieces. Undefined: the pack is made. */
  readonly copy: CopyPlan | undefined;
}

/** What decides how the packs of an export are made. */
export interface PlanOptions {
  readonly signal?: AbortSignal | undefined;
  /** Size of the packs that are made; undefined: 16 MiB, and more for large exports. */
  readonly packBytes?: number | undefined;
  /** Packs of the repository up to this size go to the tape as they are, where nothing speaks against it. Default: none. */
  readonly copyBytes?: number | undefined;
}

/** Packs are made smaller than the repository's, because whole ones are kept in memory; above this many they grow. */
const MAX_PACKS = 32_768;
const LEAST_PACK_BYTES = 16 * 1024 * 1024;
const MOST_PACK_BYTES = 256 * 1024 * 1024;
const MAX_TAPE_FRAMES = Math.min(MAX_PACK_FRAMES, 16_384);

interface Source {
  readonly packId: string;
  keys: Uint32Array<ArrayBuffer>;
  count: number;
  /** Where each key comes to lie: its key in the pack of the tape. */
  places: Uint32Array<ArrayBuffer>;
  /** From key index `from` on the pack of the tape is `pack`; `copy`: as it is. */
  cuts: { readonly from: number; readonly pack: number; readonly copy: boolean }[];
}

/** See the file comment. */
export class ExportPlan {
  readonly packs: readonly PlannedPack[];
  /** Bytes that the packs take at most. */
  readonly bytesAtMost: number;
  /** How many of the packs are copies; those come first. */
  readonly copies: number;
  readonly chunks: number;
  readonly #sources: ReadonlyMap<string, Source>;
  readonly #onSet: SetIndex | undefined;
  readonly #chunkBlocks: number;

  private constructor(
    sources: ReadonlyMap<string, Source>,
    packs: readonly PlannedPack[],
    onSet: SetIndex | undefined,
    chunkBlocks: number,
  ) {
    this.#sources = sources;
    this.packs = packs;
    this.#onSet = onSet;
    this.#chunkBlocks = chunkBlocks;
    this.bytesAtMost = packs.reduce((sum, p) => sum + p.roomBytes, 0);
    this.copies = packs.filter((p) => p.copy !== undefined).length;
    let chunks = 0;
    for (const s of sources.values()) chunks += s.keys.length;
    this.chunks = chunks;
  }

  /**
   * Reads the maps of all points and the footers of the packs they name. `set`: what is on the set; `sinceLast`: that need not be written again. Memory: 12 bytes
   * a chunk.
   */
  static async make(
    repo: Repository,
    points: readonly ExportPoint[],
    set: SetIndex,
    sinceLast: boolean,
    options: PlanOptions = {},
  ): Promise<ExportPlan> {
    const onSet = sinceLast ? set : undefined;
    const chunkBlocks = blocksOf(repo.chunkBytes);
    const sources = new Map<string, Source>();
    for (const { map } of points) {
      for await (const list of map.scan()) {
        throwIfAborted(options.signal);
        for (const e of list) {
          for (const piece of piecesOf(e, chunkBlocks)) {
            if (piece.packId === undefined) continue;
            if (onSet?.find(piece.packId, piece.frame, piece.sub) !== undefined) continue;
            addKey(sources, piece.packId, piece.frame * KEY_STEP + piece.sub);
          }
        }
      }
    }
    let chunks = 0;
    for (const s of sources.values()) {
      s.keys = unique(s.keys.subarray(0, s.count));
      chunks += s.keys.length;
    }
    const wanted = Math.ceil((chunks * repo.chunkBytes) / MAX_PACKS);
    let packBytes = options.packBytes ?? LEAST_PACK_BYTES;
    if (options.packBytes === undefined)
      while (packBytes < wanted && packBytes < MOST_PACK_BYTES) packBytes *= 2;
    const packs = await cutPacks(repo, sources, set, packBytes, options);
    return new ExportPlan(sources, packs, onSet, chunkBlocks);
  }

  /** Where the chunk of a piece of the repository is on the tapes. */
  #placeOf(packId: string, frame: number, sub: number): ChunkOnTape {
    const known = this.#onSet?.find(packId, frame, sub);
    if (known !== undefined) return known;
    const source = this.#sources.get(packId);
    const index = source === undefined ? -1 : indexOfKey(source.keys, frame * KEY_STEP + sub);
    const pack = source === undefined ? undefined : this.packs[packOfIndex(source, index)];
    if (source === undefined || index < 0 || pack === undefined)
      throw new Error(`chunk ${sub} of frame ${frame} of pack ${packId} was not planned`);
    const key = source.places[index] ?? 0;
    return { packId: pack.packId, frame: Math.floor(key / KEY_STEP), sub: key % KEY_STEP };
  }

  /** What pack `index` will hold, for the catalogue. */
  placesOf(index: number): readonly Omit<PlaceOnTape, 'pack'>[] {
    const out: Omit<PlaceOnTape, 'pack'>[] = [];
    for (const { packId, keys } of this.packs[index]?.sources ?? []) {
      const source = this.#sources.get(packId);
      if (source === undefined) continue;
      const first = indexOfKey(source.keys, keys[0] ?? 0);
      for (let i = 0; i < keys.length;) {
        const key = keys[i] ?? 0;
        const to = source.places[first + i] ?? 0;
        const runsBy = (step: number): number => {
          let n = 1;
          while (
            i + n < keys.length &&
            keys[i + n] === key + n * step &&
            source.places[first + i + n] === to + n * step
          )
            n++;
          return n;
        };
        const bySub = runsBy(1);
        const byFrame = bySub > 1 ? 1 : runsBy(KEY_STEP);
        const count = Math.max(bySub, byFrame);
        out.push({
          source: packId,
          frame: Math.floor(key / KEY_STEP),
          sub: key % KEY_STEP,
          count,
          bySub: bySub > 1,
          toFrame: Math.floor(to / KEY_STEP),
          toSub: to % KEY_STEP,
        });
        i += count;
      }
    }
    return out;
  }

  /**
   * Puts a pack with the commit of a point into `store`: full, so that it needs no other commit, and standing for all commits after `before`,
   * the last one of the volume that the set holds already. `uses` hears each pack that its image needs.
   */
  async putCommit(
    repo: Repository,
    store: MapStore,
    point: ExportPoint,
    before: { readonly seq: number; readonly hash: string } | undefined,
    host: string,
    uses: (packId: string) => void,
  ): Promise<string> {
    const packId = repo.newId();
    const nowNs = repo.env.clock.nowNs();
    const writer = await PackWriter.create({ ...repo.packContext(), store }, packId, nowNs);
    const packIds: string[] = [packId];
    const indexOf = new Map<string, number>([[packId, 0]]);
    const refs: ExtentsRef[] = [];
    const { commit } = point;
    const firstSeq = before === undefined ? 1 : before.seq + 1;
    let records: Extent[] = [];
    const add = (e: Extent): void => {
      for (let from = e.block; from < e.block + e.count;) {
        const to = Math.min(
          e.block + e.count,
          (Math.floor(from / STRIPE_BLOCKS) + 1) * STRIPE_BLOCKS,
        );
        records.push(clipExtent(e, from, to, this.#chunkBlocks));
        from = to;
      }
    };
    const flush = async (): Promise<void> => {
      const plain = encodeExtents(records);
      const frame = writer.addExtents(plain);
      refs.push({ pack: 0, frame, records: records.length, hash: repo.keys.commitHash(plain) });
      records = [];
      if (writer.wantsFlush) await writer.flush();
    };
    let open: Extent | undefined;
    let isRun = false;
    for await (const list of point.map.scan()) {
      for (const e of list) {
        const run = e.skip + e.count > this.#chunkBlocks;
        for (const piece of piecesOf(e, this.#chunkBlocks)) {
          if (piece.packId === undefined) continue;
          const place = this.#placeOf(piece.packId, piece.frame, piece.sub);
          let pack = indexOf.get(place.packId);
          if (pack === undefined) {
            pack = packIds.length;
            packIds.push(place.packId);
            indexOf.set(place.packId, pack);
            uses(place.packId);
          }
          const next: Extent = {
            block: piece.block,
            count: piece.count,
            seq: commit.seq - firstSeq,
            pack,
            frame: place.frame,
            sub: place.sub,
            skip: piece.skip,
          };
          // Only pieces of a run are known to be full chunks alone in their frames, which runs must be.
          if (open !== undefined && isRun && run && this.#joins(open, next)) {
            open = { ...open, count: open.count + next.count };
            continue;
          }
          if (open !== undefined) add(open);
          if (records.length >= MAX_FRAME_EXTENTS) {
            const rest = records.splice(MAX_FRAME_EXTENTS);
            await flush();
            records = rest;
          }
          open = next;
          isRun = run;
        }
      }
    }
    if (open !== undefined) add(open);
    while (records.length > MAX_FRAME_EXTENTS) {
      const rest = records.splice(MAX_FRAME_EXTENTS);
      await flush();
      records = rest;
    }
    writer.addCommit(
      encodeCommit({
        pointClass: commit.pointClass,
        coverage: commit.coverage,
        flags: CommitFlag.full | CommitFlag.merged,
        volumeId: point.volume.id,
        seq: commit.seq,
        firstSeq,
        prevHash: before === undefined ? ZERO_HASH : Buffer.from(before.hash, 'hex'),
        mergedHash: commit.hash,
        instantNs: commit.instantNs,
        startedNs: commit.startedNs,
        writtenNs: commit.writtenNs,
        sizeBytes: commit.sizeBytes,
        epoch: commit.epoch,
        packIds,
        extentsRefs: refs,
        extents: records,
        facts: { storedBytes: commit.storedBytes, source: 'tape', host },
      }),
    );
    await writer.seal(repo.newSalt());
    return packId;
  }

  #joins(a: Extent, b: Extent): boolean {
    const end = a.skip + a.count;
    return (
      a.pack === b.pack &&
      a.pack !== HOLE &&
      a.sub === 0 &&
      b.sub === 0 &&
      b.skip === 0 &&
      a.block + a.count === b.block &&
      end % this.#chunkBlocks === 0 &&
      b.frame === a.frame + end / this.#chunkBlocks
    );
  }
}

/** An extent cut at the borders of chunks. */
function* piecesOf(e: PlacedExtent, chunkBlocks: number): Generator<PlacedExtent, void> {
  if (e.packId === undefined || e.skip + e.count <= chunkBlocks) {
    yield e;
    return;
  }
  let { block, frame, skip } = e;
  const end = e.block + e.count;
  while (block < end) {
    const count = Math.min(end - block, chunkBlocks - skip);
    yield { block, count, packId: e.packId, frame, sub: 0, skip };
    block += count;
    frame++;
    skip = 0;
  }
}

function addKey(sources: Map<string, Source>, packId: string, key: number): void {
  let s = sources.get(packId);
  if (s === undefined) {
    s = { packId, keys: new Uint32Array(64), count: 0, places: new Uint32Array(0), cuts: [] };
    sources.set(packId, s);
  }
  // Images are mostly read in the order in which they were stored.
  if (s.count > 0 && s.keys[s.count - 1] === key) return;
  if (s.count === s.keys.length) {
    const keys = unique(s.keys.subarray(0, s.count));
    s.count = keys.length;
    s.keys = new Uint32Array(Math.max(64, keys.length * 2));
    s.keys.set(keys);
  }
  s.keys[s.count++] = key;
}

function unique(keys: Uint32Array): Uint32Array<ArrayBuffer> {
  const sorted = Uint32Array.from(keys).sort();
  let n = 0;
  for (let i = 0; i < sorted.length; i++)
    if (i === 0 || sorted[i] !== sorted[i - 1]) sorted[n++] = sorted[i] ?? 0;
  return sorted.slice(0, n);
}

function indexOfKey(keys: Uint32Array, key: number): number {
  let low = 0;
  let high = keys.length;
  while (low < high) {
    const mid = (low + high) >>> 1;
    if ((keys[mid] ?? 0) < key) low = mid + 1;
    else high = mid;
  }
  return keys[low] === key ? low : -1;
}

function packOfIndex(source: Source, index: number): number {
  let low = 0;
  let high = source.cuts.length;
  while (low < high) {
    const mid = (low + high) >>> 1;
    if ((source.cuts[mid]?.from ?? 0) <= index) low = mid + 1;
    else high = mid;
  }
  return source.cuts[low - 1]?.pack ?? -1;
}

/** A frame of a pack of the repository, and which of the wanted keys lie in it. */
interface FrameWanted {
  readonly frame: FooterFrame;
  readonly from: number;
  readonly to: number;
}

/**
 * How a pack goes to the tape as it is (FORMAT.md 11.3); undefined for one that cannot. Its bytes are nothing but what its footer
 * names, and of that everything is wanted. It was never compacted and has lost no frame, so that any two packs under its id are alike as far as both go: a
 * commit among the frames would be one without its packs.
 */
export function copyOf(
  pack: Pick<OpenPack, 'sealed' | 'header' | 'footer' | 'sizeBytes' | 'validBytes'>,
  keys: Uint32Array,
): CopyPlan | undefined {
  const { footer, sizeBytes, validBytes } = pack;
  const { frames, lengths } = footer;
  if (!pack.sealed || pack.header.generation !== 0 || keys.length !== lengths.length)
    return undefined;
  let end = PACK_HEADER_BYTES;
  let at = 0;
  for (const [i, f] of frames.entries()) {
    if (f.number !== i || f.type !== FrameType.chunks || f.offset !== end) return undefined;
    for (let sub = 0; sub < f.count; sub++) if (keys[at++] !== i * KEY_STEP + sub) return undefined;
    end += FRAME_HEADER_BYTES + f.storedBytes;
  }
  return frames.length > 0 && end === validBytes ? planCopy(frames, sizeBytes) : undefined;
}

/** Deals the chunks out to packs and fills in the places of the sources. */
async function cutPacks(
  repo: Repository,
  sources: ReadonlyMap<string, Source>,
  set: SetIndex,
  packBytes: number,
  options: PlanOptions,
): Promise<PlannedPack[]> {
  const { signal, copyBytes = 0 } = options;
  const copies: PlannedPack[] = [];
  const made: PlannedPack[] = [];
  let list: WantedChunks[] = [];
  const empty = PACK_HEADER_BYTES + PACK_REST_BYTES;
  let stored = empty;
  let plain = 0;
  let frames = 0;
  const cut = (): void => {
    if (frames === 0) return;
    made.push({ packId: repo.newId(), sources: list, roomBytes: stored, copy: undefined });
    list = [];
    stored = empty;
    plain = 0;
    frames = 0;
  };
  for (const source of sources.values()) {
    throwIfAborted(signal);
    const { packId, keys } = source;
    const found = await repo.packs.useAgain(packId, (pack) => {
      const copy =
        pack.sizeBytes <= copyBytes && set.allows(packId, keys.length)
          ? copyOf(pack, keys)
          : undefined;
      return Promise.resolve({ copy, wanted: copy === undefined ? wantedOf(pack, keys) : [] });
    });
    if (found.copy !== undefined) {
      source.places = keys;
      source.cuts.push({ from: 0, copy: true, pack: copies.length });
      copies.push({
        packId,
        sources: [{ packId, keys }],
        roomBytes: found.copy.sizeBytes,
        copy: found.copy,
      });
      continue;
    }
    source.places = new Uint32Array(keys.length);
    let begun = 0;
    source.cuts.push({ from: 0, copy: false, pack: made.length });
    for (const { frame, from, to } of found.wanted) {
      const bytes = frameBytesAtMost(frame, to - from);
      if (
        frames > 0 &&
        (stored + bytes > packBytes ||
          plain + frame.plainBytes > 2 * packBytes ||
          frames >= MAX_TAPE_FRAMES)
      ) {
        if (from > begun) list.push({ packId, keys: keys.subarray(begun, from) });
        cut();
        begun = from;
        if (from === 0) source.cuts.length = 0;
        source.cuts.push({ from, copy: false, pack: made.length });
      }
      for (let i = from; i < to; i++) source.places[i] = frames * KEY_STEP + i - from;
      stored += bytes;
      plain += frame.plainBytes;
      frames++;
    }
    list.push({ packId, keys: keys.subarray(begun) });
  }
  cut();
  // Copies come first: they are the larger ones, and their memory serves those that are made.
  for (const source of sources.values())
    source.cuts = source.cuts.map((c) => (c.copy ? c : { ...c, pack: copies.length + c.pack }));
  return [...copies, ...made];
}

/** The frames that the keys lie in. */
function wantedOf(pack: OpenPack, keys: Uint32Array): FrameWanted[] {
  return Array.from(framesOf(keys), ({ number, from, to }) => {
    const frame = pack.frame(number);
    if (frame === undefined)
      throw new B2Error(
        'damaged',
        `pack ${pack.packId} has no frame ${number}, which a point needs`,
        { hint: 'Run "b2 verify" to see which points need it.' },
      );
    return { frame, from, to };
  });
}

function throwIfAborted(signal: AbortSignal | undefined): void {
  if (signal?.aborted === true) throw new B2Error('interrupted', 'the export was interrupted');
}
