/**
 * An image with the logical volumes in it behind its end, each in one piece: what offers ranges of the image (a loop device, a disk
 * of a virtual machine) offers them as it does partitions. Nothing is copied; a write to one is a write to where it lies.
 */
import type { ImageExtent } from '../image.js';
import type { WritableImage } from '../nbd/index.js';
import { volumePieces, type LogicalVolume } from './lvm.js';

/** Volumes begin at multiples of it. */
const ALIGNMENT = 1024 * 1024;

/** Where a logical volume begins in such an image. */
export interface PlacedVolume {
  readonly volume: LogicalVolume;
  readonly offsetBytes: number;
}

/** Places the volumes behind an image of that size. */
export function placeVolumes(
  imageBytes: number,
  volumes: readonly LogicalVolume[],
): readonly PlacedVolume[] {
  let next = imageBytes;
  return volumes.map((volume) => {
    // A gap, so that what reads ahead of one volume meets nothing of the next.
    const offsetBytes = (Math.floor(next / ALIGNMENT) + 2) * ALIGNMENT;
    next = offsetBytes + volume.sizeBytes;
    return { volume, offsetBytes };
  });
}

/** A run of such an image: in the image itself, or in a gap, which reads as zeros and takes no writes. */
interface Run {
  readonly offset: number;
  readonly length: number;
  readonly imageOffset: number | undefined;
}

/** `image` with the volumes, which lie where {@link placeVolumes} has put them for its size. Closing it closes `image`. */
export function withVolumes(image: WritableImage, placed: readonly PlacedVolume[]): WritableImage {
  return placed.length === 0 ? image : new VolumesImage(image, placed);
}

class VolumesImage implements WritableImage {
  readonly sizeBytes: number;
  readonly logicalBlockBytes: number;
  readonly #image: WritableImage;
  readonly #placed: readonly PlacedVolume[];

  constructor(image: WritableImage, placed: readonly PlacedVolume[]) {
    this.#image = image;
    this.#placed = placed;
    this.logicalBlockBytes = image.logicalBlockBytes;
    const last = placed.at(-1);
    this.sizeBytes =
      last === undefined ? image.sizeBytes : last.offsetBytes + last.volume.sizeBytes + ALIGNMENT;
  }

  *#runs(offset: number, length: number): Generator<Run> {
    if (offset < 0 || length < 0 || offset > this.sizeBytes - length)
      throw new RangeError(`bytes ${offset}+${length} are not within ${this.sizeBytes}`);
    const end = offset + length;
    let at = offset;
    if (at < this.#image.sizeBytes && at < end) {
      const bytes = Math.min(end, this.#image.sizeBytes) - at;
      yield { offset: at, length: bytes, imageOffset: at };
      at += bytes;
    }
    for (const { volume, offsetBytes } of this.#placed) {
      if (at >= end) return;
      const volumeEnd = offsetBytes + volume.sizeBytes;
      if (volumeEnd <= at) continue;
      if (at < offsetBytes) {
        const gap = Math.min(end, offsetBytes) - at;
        yield { offset: at, length: gap, imageOffset: undefined };
        at += gap;
      }
      const bytes = Math.min(end, volumeEnd) - at;
      if (bytes <= 0) continue;
      for (const piece of volumePieces(volume, at - offsetBytes, bytes)) {
        yield { offset: at, length: piece.length, imageOffset: piece.imageOffset };
        at += piece.length;
      }
    }
    if (at < end) yield { offset: at, length: end - at, imageOffset: undefined };
  }

  async read(into: Uint8Array, offset: number): Promise<void> {
    for (const run of this.#runs(offset, into.length)) {
      const part = into.subarray(run.offset - offset, run.offset - offset + run.length);
      if (run.imageOffset === undefined) part.fill(0);
      else await this.#image.read(part, run.imageOffset);
    }
  }

  async extents(offset: number, length: number, limit = Infinity): Promise<readonly ImageExtent[]> {
    const out: { offset: number; length: number; hole: boolean }[] = [];
    for (const run of this.#runs(offset, length)) {
      const parts: readonly ImageExtent[] =
        run.imageOffset === undefined
          ? [{ offset: 0, length: run.length, hole: true }]
          : await this.#image.extents(run.imageOffset, run.length);
      let at = run.offset;
      for (const part of parts) {
        const last = out.at(-1);
        if (last !== undefined && last.hole === part.hole) last.length += part.length;
        else if (out.length >= limit) return out;
        else out.push({ offset: at, length: part.length, hole: part.hole });
        at += part.length;
      }
    }
    return out;
  }

  /** Runs of a range that is to be changed. */
  *#writable(offset: number, length: number): Generator<Run & { readonly imageOffset: number }> {
    for (const run of this.#runs(offset, length)) {
      const { imageOffset } = run;
      if (imageOffset === undefined)
        throw new RangeError(`bytes ${run.offset}+${run.length} lie in no volume`);
      yield { ...run, imageOffset };
    }
  }

  async write(data: Uint8Array, offset: number): Promise<void> {
    for (const run of this.#writable(offset, data.length)) {
      const from = run.offset - offset;
      await this.#image.write(data.subarray(from, from + run.length), run.imageOffset);
    }
  }

  async zero(offset: number, length: number, allocate: boolean): Promise<void> {
    for (const run of this.#writable(offset, length))
      await this.#image.zero(run.imageOffset, run.length, allocate);
  }

  async trim(offset: number, length: number): Promise<void> {
    for (const run of this.#writable(offset, length))
      await this.#image.trim(run.imageOffset, run.length);
  }

  flush(): Promise<void> {
    return this.#image.flush();
  }

  close(): Promise<void> {
    return this.#image.close();
  }
}
