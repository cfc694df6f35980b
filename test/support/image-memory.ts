/**
 * Images for tests: one in memory, made of runs of holes and data, and one over a file. Both keep the contract of
 * src/image.ts; faults can be set.
 */
import { closeSync, fstatSync, openSync, read } from 'node:fs';

import { B2Error } from '../../src/errors.js';
import type { Image, ImageExtent } from '../../src/image.js';

/** A run as a test writes it: `hole`, or data made from a seed. */
export interface RunSpec {
  readonly length: number;
  readonly hole: boolean;
}

/** Bytes that look random and depend on `seed` alone (xorshift32); never a whole block of zeros. */
export function patternBytes(length: number, seed: number): Buffer {
  const words = new Uint32Array(Math.ceil(length / 4));
  let x = (seed * 0x9e3779b1 + 0x7f4a7c15) >>> 0 || 1;
  for (let i = 0; i < words.length; i++) {
    x ^= x << 13;
    x >>>= 0;
    x ^= x >>> 17;
    x ^= x << 5;
    x >>>= 0;
    words[i] = x;
  }
  return Buffer.from(words.buffer, 0, length);
}

export class MemoryImage implements Image {
  readonly logicalBlockBytes: number = 512;
  readonly sizeBytes: number;
  /** What the image reads as. */
  readonly content: Buffer;
  readonly runs: readonly ImageExtent[];
  /** Ranges that reject with kind `damaged`. */
  readonly damaged: {
    readonly offset: number;
    readonly length: number;
    readonly message: string;
  }[] = [];
  closed = 0;
  reads = 0;
  /** Bytes being read now, and the most there ever were. */
  underWay = 0;
  mostUnderWay = 0;
  /** Reads wait for this. */
  gate: Promise<void> = Promise.resolve();

  constructor(specs: readonly RunSpec[], seed = 1) {
    this.sizeBytes = specs.reduce((sum, run) => sum + run.length, 0);
    this.content = Buffer.alloc(this.sizeBytes);
    const runs: ImageExtent[] = [];
    let offset = 0;
    for (const { length, hole } of specs) {
      if (!hole) patternBytes(length, seed + runs.length).copy(this.content, offset);
      runs.push({ offset, length, hole });
      offset += length;
    }
    this.runs = runs;
  }

  async read(into: Uint8Array, offset: number): Promise<void> {
    this.#check(offset, into.length);
    this.reads++;
    this.underWay += into.length;
    this.mostUnderWay = Math.max(this.mostUnderWay, this.underWay);
    try {
      await this.gate;
      for (const bad of this.damaged) {
        if (bad.offset < offset + into.length && offset < bad.offset + bad.length) {
          throw new B2Error('damaged', bad.message);
        }
      }
      into.set(this.content.subarray(offset, offset + into.length));
    } finally {
      this.underWay -= into.length;
    }
  }

  extents(offset: number, length: number, limit = Infinity): Promise<readonly ImageExtent[]> {
    this.#check(offset, length);
    const out: { offset: number; length: number; hole: boolean }[] = [];
    for (const run of this.runs) {
      const from = Math.max(offset, run.offset);
      const to = Math.min(offset + length, run.offset + run.length);
      if (from >= to) continue;
      const last = out.at(-1);
      if (last !== undefined && last.hole === run.hole) last.length += to - from;
      else out.push({ offset: from, length: to - from, hole: run.hole });
    }
    return Promise.resolve(out.slice(0, limit));
  }

  close(): Promise<void> {
    this.closed++;
    return Promise.resolve();
  }

  #check(offset: number, length: number): void {
    if (offset < 0 || length < 0 || !(offset + length <= this.sizeBytes)) {
      throw new RangeError(`${offset}+${length} is outside the image`);
    }
  }
}

/** A file as an image without holes; its size is the file's when it is opened. */
export class FileImage implements Image {
  readonly logicalBlockBytes: number = 512;
  readonly sizeBytes: number;
  readonly #fd: number;

  constructor(path: string) {
    this.#fd = openSync(path, 'r');
    this.sizeBytes = fstatSync(this.#fd).size;
  }

  read(into: Uint8Array, offset: number): Promise<void> {
    return new Promise((done, reject) => {
      read(this.#fd, into, 0, into.length, offset, (error, got) => {
        if (error !== null) reject(error);
        else if (got !== into.length) reject(new RangeError(`short read at ${offset}`));
        else done();
      });
    });
  }

  extents(offset: number, length: number): Promise<readonly ImageExtent[]> {
    return Promise.resolve(length === 0 ? [] : [{ offset, length, hole: false }]);
  }

  close(): Promise<void> {
    closeSync(this.#fd);
    return Promise.resolve();
  }
}
