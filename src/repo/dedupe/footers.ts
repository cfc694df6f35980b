/** Footers of packs as the dedupe index needs them: full chunk ids and places, in little memory. */
import { B2Error } from '../../errors.js';
import { FrameType } from '../../format/frame.js';
import { packName } from '../../format/names.js';
import type { PackFooter } from '../../format/pack.js';
import { readFooter, type PackReadContext } from '../pack-reader.js';
import { placeWord, type PlaceWord } from './table.js';

/** The chunks of one sealed pack, in the order of its footer. */
export interface PackChunks {
  /** Eight words a chunk: its id. */
  readonly ids: Uint32Array;
  readonly places: Uint32Array;
}

const HIGHEST_FRAME = 0xffff;
const HIGHEST_SUB = 0x7fff;

/** What a footer says of chunks. Undefined if its numbers are beyond the format's limits. */
export function chunksOfFooter(footer: PackFooter): PackChunks | undefined {
  const count = footer.lengths.length;
  const ids = new Uint32Array(count * 8);
  Buffer.from(ids.buffer).set(footer.ids);
  const places = new Uint32Array(count);
  let at = 0;
  for (const frame of footer.frames) {
    if (frame.type !== FrameType.chunks) continue;
    if (frame.number > HIGHEST_FRAME || frame.count > HIGHEST_SUB) return undefined;
    for (let sub = 0; sub < frame.count; sub++)
      places[at++] = placeWord(frame.number, sub, frame.count > 1);
  }
  return { ids, places };
}

/**
 * Reads the footer of a pack and nothing else. Undefined if the pack is missing, has no (good) footer or cannot be read: then
 * nothing in it is reused. `sizeBytes` is the pack's size at that moment.
 */
export async function readPackChunks(
  ctx: PackReadContext,
  packId: string,
): Promise<(PackChunks & { readonly sizeBytes: number }) | undefined> {
  try {
    const reader = await ctx.store.open(packName(packId));
    try {
      const found = await readFooter(ctx, reader, packId);
      const chunks = found === undefined ? undefined : chunksOfFooter(found.footer);
      return chunks === undefined ? undefined : { ...chunks, sizeBytes: reader.sizeBytes };
    } finally {
      await reader.close();
    }
  } catch (error) {
    if (error instanceof B2Error) return undefined;
    throw error;
  }
}

/** Footers read lately, at most `maxBytes` of them; the least recently used goes first. */
export class FooterCache {
  private readonly maxBytes: number;
  private readonly known = new Map<number, PackChunks>();
  private bytes = 0;
  /** The one asked for last: most questions are about the same pack again. */
  private lastPack = -1;
  private last: PackChunks | undefined;

  constructor(maxBytes: number) {
    this.maxBytes = maxBytes;
  }

  get(pack: number): PackChunks | undefined {
    if (pack === this.lastPack) return this.last;
    const found = this.known.get(pack);
    if (found === undefined) return undefined;
    this.known.delete(pack);
    this.known.set(pack, found);
    this.lastPack = pack;
    this.last = found;
    return found;
  }

  set(pack: number, chunks: PackChunks): void {
    this.forget(pack);
    this.known.set(pack, chunks);
    this.bytes += sizeOf(chunks);
    for (const old of this.known.keys()) {
      if (this.bytes <= this.maxBytes || old === pack) break;
      this.forget(old);
    }
  }

  forget(pack: number): void {
    const found = this.known.get(pack);
    if (found === undefined) return;
    this.known.delete(pack);
    this.bytes -= sizeOf(found);
    if (pack === this.lastPack) this.lastPack = -1;
  }
}

function sizeOf(chunks: PackChunks): number {
  return chunks.ids.byteLength + chunks.places.byteLength + 256;
}

/** True if chunk `chunk` of `chunks` has the id `id` (eight words). */
export function idAtEquals(chunks: PackChunks, chunk: number, id: Uint32Array): boolean {
  const { ids } = chunks;
  const at = chunk * 8;
  for (let i = 0; i < 8; i++) if (ids[at + i] !== id[i]) return false;
  return true;
}

export function placeAt(chunks: PackChunks, chunk: number): PlaceWord {
  const place = chunks.places[chunk];
  if (place === undefined) throw new RangeError(`a pack without chunk ${chunk}`);
  return place;
}
