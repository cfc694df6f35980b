/** Finds out who reads on and on, and how far to read ahead of them. */

/** Reads in a row that make a stream. */
const STREAM_BYTES = 256 * 1024;
/** The first window, and the largest one: each is twice the one before. */
const FIRST_WINDOW_BYTES = 512 * 1024;
export const MAX_WINDOW_BYTES = 8 * 1024 * 1024;
/** Requests of one stream come out of order by no more than this. */
const SLACK_BYTES = 1024 * 1024;
/** Streams that are followed at a time. */
const STREAMS = 8;

export interface Range {
  readonly from: number;
  readonly to: number;
}

interface Stream {
  /** End of what was read. */
  next: number;
  /** Bytes read since it began. */
  run: number;
  window: number;
  /** End of what has been asked for ahead. */
  ahead: number;
}

/** Of one image. */
export class Streams {
  readonly #sizeBytes: number;
  /** The one used last is the last. */
  #streams: Stream[] = [];

  constructor(sizeBytes: number) {
    this.#sizeBytes = sizeBytes;
  }

  /** True if the read noted last belongs to a stream. */
  get isStream(): boolean {
    return (this.#streams.at(-1)?.run ?? 0) >= STREAM_BYTES;
  }

  /** A read; what should be read ahead because of it, which is always beyond everything that was read ahead of that stream before. */
  note(offset: number, length: number): Range | undefined {
    const end = offset + length;
    const found = this.#streams.findIndex(
      (s) => offset >= s.next - SLACK_BYTES && offset <= s.next + SLACK_BYTES,
    );
    const stream = this.#streams[found];
    if (stream === undefined) {
      this.#streams.push({ next: end, run: length, window: 0, ahead: end });
      if (this.#streams.length > STREAMS) this.#streams.shift();
      return undefined;
    }
    this.#streams.splice(found, 1);
    this.#streams.push(stream);
    stream.next = Math.max(stream.next, end);
    stream.ahead = Math.max(stream.ahead, stream.next);
    stream.run += length;
    if (stream.run < STREAM_BYTES) return undefined;
    if (stream.window > 0 && stream.ahead - stream.next > stream.window / 2) return undefined;
    stream.window = Math.min(MAX_WINDOW_BYTES, Math.max(FIRST_WINDOW_BYTES, stream.window * 2));
    const from = stream.ahead;
    const to = Math.min(this.#sizeBytes, stream.next + stream.window);
    if (from >= to) return undefined;
    stream.ahead = to;
    return { from, to };
  }
}
