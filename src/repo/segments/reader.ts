/** Reads a segment from a store: the index at once, pages on demand through the shared cache. */
import { damaged } from '../../format/bytes.js';
import { parseSegmentName } from '../../format/names.js';
import type { KeyRing, Sealer } from '../../format/seal.js';
import {
  checkPackIdPage,
  column,
  decodeCommitPage,
  decodeExtentPage,
  decodeSegmentHeader,
  decodeSegmentIndex,
  decodeSegmentTrailer,
  openPage,
  PACK_IDS_PER_PAGE,
  PAGE_HEADER_BYTES,
  PageType,
  SEGMENT_HEADER_BYTES,
  SEGMENT_TRAILER_BYTES,
  type CommitPage,
  type ExtentPage,
  type PageTable,
  type SegmentHeader,
  type SegmentIndex,
} from '../../format/segment.js';
import { packIdStrings, type PackIdPage } from './pack-ids.js';
import type { PageCache } from './page-cache.js';
import type { SegmentSource } from './source.js';
import { openLasting } from '../lasting-reader.js';
import type { ObjectReader, Store } from '../store.js';

/** What is read first of a segment; the index of one of a million commits fits, mostly. */
const TAIL_BYTES = 64 * 1024;
/** Bookkeeping of a cached page beside its bytes. */
const PAGE_OVERHEAD_BYTES = 256;

/** What a segment is read with. */
export interface SegmentContext {
  readonly store: Store;
  readonly keys: KeyRing;
  readonly repositoryId: string;
  readonly volumeId: string;
  readonly cache: PageCache;
}

/** Numbers readers apart in the cache: a name may be written again after a repair. */
let serial = 0;

export class SegmentReader implements SegmentSource {
  readonly name: string;
  readonly header: SegmentHeader;
  readonly index: SegmentIndex;
  readonly sizeBytes: number;
  readonly #object: ObjectReader;
  readonly #headerBytes: Buffer;
  readonly #sealer: Sealer;
  readonly #cache: PageCache;
  readonly #key: string;

  private constructor(
    context: SegmentContext,
    name: string,
    object: ObjectReader,
    headerBytes: Buffer,
    header: SegmentHeader,
    sealer: Sealer,
    index: SegmentIndex,
  ) {
    this.name = name;
    this.header = header;
    this.index = index;
    this.sizeBytes = object.sizeBytes;
    this.#object = object;
    this.#headerBytes = headerBytes;
    this.#sealer = sealer;
    this.#cache = context.cache;
    this.#key = `${++serial}:`;
  }

  /** See {@link openSegment}. */
  static async open(context: SegmentContext, name: string): Promise<SegmentReader> {
    const expected = parseSegmentName(name);
    if (expected === undefined) throw new TypeError(`not a segment's name: ${name}`);
    const object = await openLasting(context.store, name);
    try {
      const size = object.sizeBytes;
      const least = SEGMENT_HEADER_BYTES + PAGE_HEADER_BYTES + SEGMENT_TRAILER_BYTES;
      if (size < least) throw damaged(name, size, 'the segment is cut off');
      const tailAt = Math.max(0, size - TAIL_BYTES);
      const [tail, start] = await Promise.all([
        readExactly(object, tailAt, size - tailAt, name),
        tailAt === 0 ? undefined : readExactly(object, 0, SEGMENT_HEADER_BYTES, name),
      ]);
      const headerBytes = Buffer.from((start ?? tail).subarray(0, SEGMENT_HEADER_BYTES));
      const header = decodeSegmentHeader(headerBytes, name);
      checkBelongs(header, expected, context, name);
      const trailer = tail.subarray(tail.length - SEGMENT_TRAILER_BYTES);
      const indexAt = decodeSegmentTrailer(trailer, size, name);
      const indexEnd = size - SEGMENT_TRAILER_BYTES;
      const page =
        indexAt >= tailAt
          ? tail.subarray(indexAt - tailAt, indexEnd - tailAt)
          : await readExactly(object, indexAt, indexEnd - indexAt, name);
      const sealer = context.keys.segmentSealer(header.salt);
      // The index is the last page; its number is the one thing about it that only it says, and the seal vouches for it.
      const number = page.readUInt32LE(4);
      const plain = openPage(sealer, headerBytes, PageType.index, number, page, name, indexAt);
      const index = decodeSegmentIndex(plain, header, indexAt, name);
      const pages = index.extents.length + index.commits.length + index.packs.length;
      if (number !== pages) throw damaged(name, indexAt, `index is page ${number} of ${pages + 1}`);
      return new SegmentReader(context, name, object, headerBytes, header, sealer, index);
    } catch (error) {
      await object.close();
      throw error;
    }
  }

  get level(): number | undefined {
    return this.header.level;
  }
  get firstSeq(): number {
    return this.header.firstSeq;
  }
  get lastSeq(): number {
    return this.header.lastSeq;
  }

  extentPage(i: number, keep = true): Promise<ExtentPage> {
    return this.#cache.get(
      `${this.#key}e${i}`,
      async () => {
        const { plain, what } = await this.#page(PageType.extents, this.index.extents, i);
        const value = decodeExtentPage(plain, i, this.index, this.header, what);
        return { value, bytes: plain.length + PAGE_OVERHEAD_BYTES };
      },
      keep,
    );
  }

  commitPage(i: number, keep = true): Promise<CommitPage> {
    return this.#cache.get(
      `${this.#key}c${i}`,
      async () => {
        const { plain, what } = await this.#page(PageType.commits, this.index.commits, i);
        const value = decodeCommitPage(plain, i, this.index, this.header, what);
        return { value, bytes: plain.length + PAGE_OVERHEAD_BYTES };
      },
      keep,
    );
  }

  async packId(pack: number): Promise<string> {
    const i = Math.floor(pack / PACK_IDS_PER_PAGE);
    const page = await this.#cache.get<PackIdPage>(`${this.#key}p${i}`, async () => {
      const { plain, what } = await this.#page(PageType.packIds, this.index.packs, i);
      return packIdStrings(checkPackIdPage(plain, i, this.index, what));
    });
    const id = page.ids[pack - i * PACK_IDS_PER_PAGE];
    if (id === undefined) throw damaged(this.name, 0, `pack ${pack} of ${this.index.packCount}`);
    return id;
  }

  /** Pages already handed out stay usable. */
  async close(): Promise<void> {
    this.#cache.drop(this.#key);
    await this.#object.close();
  }

  async #page(type: PageType, t: PageTable, i: number): Promise<{ plain: Buffer; what: string }> {
    const at = column(t.offset, i);
    const number = column(t.number, i);
    const length = PAGE_HEADER_BYTES + column(t.stored, i);
    const bytes = await readExactly(this.#object, at, length, this.name);
    const what = `${this.name} (page ${number})`;
    return {
      plain: openPage(this.#sealer, this.#headerBytes, type, number, bytes, this.name, at),
      what,
    };
  }
}

/**
 * Opens the segment with that object name: header, trailer and index are read (one read of a small segment, else two at once, and a third where the index
 * is larger than 64 KiB) and validated; pages later, on demand. Rejects with `damaged` naming the object, or as the store does.
 */
export function openSegment(context: SegmentContext, name: string): Promise<SegmentReader> {
  return SegmentReader.open(context, name);
}

function checkBelongs(
  header: SegmentHeader,
  expected: { level: number | undefined; firstSeq: number; lastSeq: number; volumeId: string },
  context: SegmentContext,
  name: string,
): void {
  if (
    header.volumeId !== expected.volumeId ||
    header.level !== expected.level ||
    header.firstSeq !== expected.firstSeq ||
    header.lastSeq !== expected.lastSeq
  ) {
    throw damaged(name, 0, 'it holds another segment: files were exchanged');
  }
  if (header.volumeId !== context.volumeId) throw damaged(name, 16, 'it belongs to another volume');
  if (header.repositoryId !== context.repositoryId) {
    throw damaged(name, 32, `it belongs to another repository (${header.repositoryId})`);
  }
  if (header.encrypted !== context.keys.encrypted) {
    throw damaged(name, 10, 'it is encrypted and the repository is not, or the other way round');
  }
}

async function readExactly(
  object: ObjectReader,
  offset: number,
  length: number,
  name: string,
): Promise<Buffer> {
  const into = Buffer.allocUnsafeSlow(length);
  const got = await object.read(into, offset);
  if (got !== length)
    throw damaged(name, offset + got, `the object ends ${length - got} bytes early`);
  return into;
}
