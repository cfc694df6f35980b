/**
 * Images of several volumes as one, one behind the other, so that what lies on several of them has one place for each of its
 * bytes, and what offers ranges of an image (a loop device, a disk of a virtual machine) offers ranges of all.
 */
import type { Image, ImageExtent } from '../image.js';
import { checkRange } from '../nbd/writable.js';

/** Images begin at multiples of it. */
const ALIGNMENT = 1024 * 1024;

/** Where images of those sizes begin in one that is made of them: the first at 0, with a gap before each other one. */
export function placeImages(sizes: readonly number[]): readonly number[] {
  let next = 0;
  return sizes.map((sizeBytes) => {
    const offset = next;
    // A gap, so that what reads ahead in one image meets nothing of the next.
    next = (Math.ceil((offset + sizeBytes) / ALIGNMENT) + 1) * ALIGNMENT;
    return offset;
  });
}

/** The images as one, each where {@link placeImages} puts it; gaps are holes. Closing it closes all of them. */
export function composeImages(images: readonly Image[]): Image {
  const [only] = images;
  return only !== undefined && images.length === 1 ? only : new ComposedImage(images);
}

/** A run within one image, or in a gap. */
interface Run {
  readonly offset: number;
  readonly length: number;
  readonly image: Image | undefined;
  /** Byte of the image. */
  readonly at: number;
}

class ComposedImage implements Image {
  readonly sizeBytes: number;
  readonly logicalBlockBytes: number;
  readonly #images: readonly Image[];
  readonly #offsets: readonly number[];

  constructor(images: readonly Image[]) {
    this.#images = images;
    this.#offsets = placeImages(images.map((i) => i.sizeBytes));
    this.sizeBytes = (this.#offsets.at(-1) ?? 0) + (images.at(-1)?.sizeBytes ?? 0);
    // What one of them has at an odd sector must be reached.
    this.logicalBlockBytes = Math.min(...images.map((i) => i.logicalBlockBytes));
  }

  *#runs(offset: number, length: number): Generator<Run> {
    checkRange(this.sizeBytes, offset, length);
    const end = offset + length;
    let at = offset;
    for (const [i, image] of this.#images.entries()) {
      const start = this.#offsets[i] ?? 0;
      if (at >= end) return;
      if (start + image.sizeBytes <= at) continue;
      if (at < start) {
        const gap = Math.min(end, start) - at;
        yield { offset: at, length: gap, image: undefined, at: 0 };
        at += gap;
      }
      const bytes = Math.min(end, start + image.sizeBytes) - at;
      if (bytes <= 0) continue;
      yield { offset: at, length: bytes, image, at: at - start };
      at += bytes;
    }
  }

  async read(into: Uint8Array, offset: number): Promise<void> {
    for (const run of this.#runs(offset, into.length)) {
      const part = into.subarray(run.offset - offset, run.offset - offset + run.length);
      if (run.image === undefined) part.fill(0);
      else await run.image.read(part, run.at);
    }
  }

  async extents(offset: number, length: number, limit = Infinity): Promise<readonly ImageExtent[]> {
    const out: { offset: number; length: number; hole: boolean }[] = [];
    for (const run of this.#runs(offset, length)) {
      const left = Number.isFinite(limit) ? limit - out.length + 1 : undefined;
      const parts: readonly ImageExtent[] =
        run.image === undefined
          ? [{ offset: 0, length: run.length, hole: true }]
          : await run.image.extents(run.at, run.length, left);
      let done = 0;
      for (const part of parts) {
        const last = out.at(-1);
        if (last !== undefined && last.hole === part.hole) last.length += part.length;
        else if (out.length >= limit) return out;
        else out.push({ offset: run.offset + done, length: part.length, hole: part.hole });
        done += part.length;
      }
      // It gave no more than it was asked for.
      if (done < run.length) return out;
    }
    return out;
  }

  async close(): Promise<void> {
    const ended = await Promise.allSettled(this.#images.map((image) => image.close()));
    const failed = ended.find((e) => e.status === 'rejected');
    if (failed !== undefined) throw failed.reason;
  }
}

/** Opens images one after the other, and composes them; those that are open are closed where one cannot be opened. */
export async function openComposed(open: readonly (() => Promise<Image>)[]): Promise<Image> {
  const images: Image[] = [];
  try {
    for (const one of open) images.push(await one());
    return composeImages(images);
  } catch (error) {
    await Promise.allSettled(images.map((image) => image.close()));
    throw error;
  }
}
