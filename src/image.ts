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
  readonly views: readonly Uint8Array[];
  release(): void;
}

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
   * valid until `release`, which the caller calls once, and soon. Undefined where nothing can be lent: read then. Rejects as {@link read}, or leaves that to it.
   */
  lend?(offset: number, length: number): Promise<Loan | undefined>;
  /**
   * The runs that make up [offset, offset + length), ascending, without gaps, neighbours merged when both are holes or
   * both are data. Reads the manifest only, no data. `limit` bounds the number of runs returned (the last one may then
   * end before the range does).
   */
  extents(offset: number, length: number, limit?: number): Promise<readonly ImageExtent[]>;
  close(): Promise<void>;
}
