/** An image that can be written: what an export with an overlay serves. */
import type { Image } from '../image.js';

/**
 * Writes show at once in every read that begins after they have resolved, and are durable once a later
 * {@link WritableImage.flush} has resolved. Where a write was under way during a crash, each sector of it is old or
 * new. Ranges must lie within the image (RangeError otherwise).
 */
export interface WritableImage extends Image {
  /** `data` must not change before the promise settles. Rejects with kind `no-space` or `io`. */
  write(data: Uint8Array, offset: number): Promise<void>;
  /**
   * The range reads as zeros afterwards. With `allocate` space for it is taken (and a later write there does not fail
   * for want of it); without, space is given back, and it costs much less than writing.
   */
  zero(offset: number, length: number, allocate: boolean): Promise<void>;
  /** A hint that the contents are not needed: whole blocks within the range read as zeros afterwards, edges stay. */
  trim(offset: number, length: number): Promise<void>;
  /** Everything that resolved before the call is durable. */
  flush(): Promise<void>;
}

export function isWritable(image: Image): image is WritableImage {
  return 'write' in image;
}

/** Throws the RangeError that {@link Image} and {@link WritableImage} promise. */
export function checkRange(sizeBytes: number, offset: number, length: number): void {
  const inside =
    Number.isSafeInteger(offset) &&
    Number.isSafeInteger(length) &&
    offset >= 0 &&
    length >= 0 &&
    offset <= sizeBytes - length;
  if (!inside)
    throw new RangeError(`bytes ${offset}+${length} are not within an image of ${sizeBytes}`);
}
