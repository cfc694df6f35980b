/**
 * Image: a volume at one recovery point, the read-only view that restore, mount, NBD, verify, export and file access
 * share. It stays the same for as long as it is open, whatever capture, thinning and prune do meanwhile.
 */

/** A run of bytes of an image. `hole` runs read as zeros and are stored nowhere. */
export interface ImageExtent {
  readonly offset: number;
  readonly length: number;
  readonly hole: boolean;
}

/** Memory lent to a reader, not to be changed. */
export interface Loan {
  /** One after the other they make up the range. Those of {@link zeroViews} stand for holes. */
  readonly views: readonly Uint8Array[];
  release(): void;
}

/** Zeros that can be had as one view: few enough to stay in a processor's own cache however often they are copied. */
const ZERO_BYTES = 64 * 1024;
let zeros: Uint8Array | undefined;

/** Views of `bytes` zeros, not to be changed. */
export function zeroViews(bytes: number): readonly Uint8Array[] {
  const all = (zeros ??= new Uint8Array(ZERO_BYTES));
  const views: Uint8Array[] = [];
  for (let left = bytes; left > 0; left -= ZERO_BYTES)
    views.push(left >= ZERO_BYTES ? all : all.subarray(0, left));
  return views;
}

/** True for what {@link zeroViews} gave. */
export function isZeroView(view: Uint8Array): boolean {
  return zeros !== undefined && view.buffer === zeros.buffer;
}

/** What {@link Image.lend} gives. */
export type Lending = Loan | undefined | Promise<Loan | undefined>;

export interface Image {
  readonly sizeBytes: number;
  /** 512 or 4096: what the device had. */
  readonly logicalBlockBytes: number;
  /**
   * Fills `into` with the bytes from `offset`. The range must lie within the image (RangeError otherwise). Any offset
   * and length will do. Rejects with kind `damaged` where stored data is not what it was (never zeros instead), naming
   * pack and frame, and with kind `io` or `not-found` where it cannot be read.
   */
  read(into: Uint8Array, offset: number): Promise<void>;
  /**
   * The same as {@link read} without a copy, where the bytes lie in memory that can be lent: views that one after the other make up the range,
   * valid until `release`, which the caller calls once, and soon. At once (not a promise) where all of it is there already. Undefined where nothing can be
   * lent: read then. Rejects as {@link read}, or leaves that to it.
   */
  lend?(offset: number, length: number): Lending;
  /**
   * The runs that make up [offset, offset + length), ascending, without gaps, neighbours merged when both are holes or
   * both are data. Reads the manifest only, no data. `limit` bounds the number of runs returned (the last one may then
   * end before the range does).
   */
  extents(offset: number, length: number, limit?: number): Promise<readonly ImageExtent[]>;
  close(): Promise<void>;
}
