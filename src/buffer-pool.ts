/**
 * Buffers that are used again. A fresh large one costs the kernel a page fault for every 4 KiB and the garbage collector a round every few
 * dozens of them: for a server that copies as fast as memory can, as much as everything else it does.
 */

/** The smallest class of sizes; larger ones are four to a doubling, so that no more than a fifth of a buffer lies idle. */
const SMALLEST_BYTES = 4096;
/** What is larger is not kept. */
const LARGEST_BYTES = 4 * 1024 * 1024;

export class BufferPool {
  readonly #maxBytes: number;
  readonly #own = new WeakSet<ArrayBufferLike>();
  readonly #free = new Map<number, ArrayBuffer[]>();
  #keptBytes = 0;

  /** Keeps at most `maxBytes` that nobody uses. */
  constructor(maxBytes: number) {
    this.#maxBytes = maxBytes;
  }

  /** Bytes kept. */
  get keptBytes(): number {
    return this.#keptBytes;
  }

  /** A buffer of that length, with anything in it. */
  take(bytes: number): Buffer {
    const size = classOf(bytes);
    if (size === undefined) return Buffer.allocUnsafeSlow(bytes);
    const memory = this.#free.get(size)?.pop();
    if (memory === undefined) {
      const fresh = new ArrayBuffer(size);
      this.#own.add(fresh);
      return Buffer.from(fresh, 0, bytes);
    }
    this.#keptBytes -= size;
    return Buffer.from(memory, 0, bytes);
  }

  /** Gives back what {@link take} gave: nobody may use it, or a part of it, any more. Whoever does not give back only leaves it to be collected. */
  give(buffer: Buffer): void {
    const memory = buffer.buffer;
    const size = memory.byteLength;
    // Not what is larger than is kept, and never the memory that small Buffers share.
    if (!(memory instanceof ArrayBuffer) || !this.#own.has(memory)) return;
    // The class used last is the last: what nobody asks for any more makes room first.
    const list = this.#free.get(size) ?? [];
    this.#free.delete(size);
    this.#free.set(size, list);
    list.push(memory);
    this.#keptBytes += size;
    for (const [other, buffers] of this.#free) {
      while (this.#keptBytes > this.#maxBytes && buffers.pop() !== undefined)
        this.#keptBytes -= other;
      if (this.#keptBytes <= this.#maxBytes) return;
      this.#free.delete(other);
    }
  }
}

/** The class for so many bytes; undefined beyond the largest. */
function classOf(bytes: number): number | undefined {
  if (bytes > LARGEST_BYTES) return undefined;
  if (bytes <= SMALLEST_BYTES) return SMALLEST_BYTES;
  const step = 2 ** Math.ceil(Math.log2(bytes)) / 8;
  return Math.ceil(bytes / step) * step;
}
