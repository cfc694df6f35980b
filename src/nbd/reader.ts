/**
 * Exact byte counts out of a socket. At most {@link READ_AHEAD_BYTES} (and what Node hands over in one piece) wait
 * here; beyond that the socket is paused, so that a peer that sends faster than it is served is held back by TCP.
 */
import type { Socket } from 'node:net';

/** The peer is gone or has closed its side: there will not be as many bytes as were asked for. */
export class EndOfStream extends Error {
  override readonly name = 'EndOfStream';
}

const READ_AHEAD_BYTES = 256 * 1024;

interface Waiter {
  /** Where the bytes go; undefined: they are thrown away. */
  readonly into: Buffer | undefined;
  readonly wanted: number;
  got: number;
  readonly resolve: () => void;
  readonly reject: (error: Error) => void;
}

/** One reader a socket; one call of {@link SocketReader.take} or {@link SocketReader.skip} at a time. */
export class SocketReader {
  readonly #socket: Socket;
  #chunks: Buffer[] = [];
  #buffered = 0;
  #waiter: Waiter | undefined;
  #ended = false;
  readonly #onData = (chunk: Buffer): void => this.#feed(chunk);
  readonly #onEnd = (): void => this.#end();

  constructor(socket: Socket) {
    this.#socket = socket;
    socket.on('data', this.#onData);
    socket.on('end', this.#onEnd);
    socket.on('close', this.#onEnd);
  }

  /** Stops listening and returns how many bytes had come that nobody took. */
  detach(): number {
    this.#socket.off('data', this.#onData);
    this.#socket.off('end', this.#onEnd);
    this.#socket.off('close', this.#onEnd);
    return this.#buffered;
  }

  /** `count` (> 0) bytes if they are here already. The memory is the caller's. */
  tryTake(count: number): Buffer | undefined {
    if (this.#buffered < count) return undefined;
    const first = this.#chunks[0];
    if (first !== undefined && first.length > count) {
      this.#chunks[0] = first.subarray(count);
      this.#buffered -= count;
      return first.subarray(0, count);
    }
    if (first !== undefined && first.length === count) {
      this.#chunks.shift();
      this.#buffered -= count;
      return first;
    }
    const out = Buffer.allocUnsafe(count);
    this.#drainInto(out, count);
    return out;
  }

  /** `count` (≥ 0) bytes as soon as they have come; rejects with {@link EndOfStream}. */
  async take(count: number): Promise<Buffer> {
    if (count === 0) return Buffer.alloc(0);
    const here = this.tryTake(count);
    if (here !== undefined) return here;
    const out = Buffer.allocUnsafe(count);
    await this.#wait(out, count);
    return out;
  }

  /** Throws away `count` bytes without keeping them. */
  async skip(count: number): Promise<void> {
    if (count > 0) await this.#wait(undefined, count);
  }

  /** Moves up to `count` buffered bytes; returns how many. */
  #drainInto(out: Buffer | undefined, count: number): number {
    let at = 0;
    while (at < count) {
      const chunk = this.#chunks[0];
      if (chunk === undefined) break;
      const part = Math.min(chunk.length, count - at);
      if (out !== undefined) chunk.copy(out, at, 0, part);
      if (part === chunk.length) this.#chunks.shift();
      else this.#chunks[0] = chunk.subarray(part);
      at += part;
    }
    this.#buffered -= at;
    return at;
  }

  #wait(into: Buffer | undefined, wanted: number): Promise<void> {
    const got = this.#drainInto(into, wanted);
    if (got === wanted) return Promise.resolve();
    if (this.#ended) return Promise.reject(new EndOfStream('the connection ended'));
    return new Promise((resolve, reject) => {
      this.#waiter = { into, wanted, got, resolve, reject };
      if (this.#socket.isPaused()) this.#socket.resume();
    });
  }

  #feed(chunk: Buffer): void {
    let rest = chunk;
    const waiter = this.#waiter;
    if (waiter !== undefined) {
      const part = Math.min(chunk.length, waiter.wanted - waiter.got);
      if (waiter.into !== undefined) chunk.copy(waiter.into, waiter.got, 0, part);
      waiter.got += part;
      rest = chunk.subarray(part);
      if (waiter.got === waiter.wanted) {
        this.#waiter = undefined;
        waiter.resolve();
      }
    }
    if (rest.length === 0) return;
    this.#chunks.push(rest);
    this.#buffered += rest.length;
    if (this.#buffered >= READ_AHEAD_BYTES) this.#socket.pause();
  }

  #end(): void {
    this.#ended = true;
    const waiter = this.#waiter;
    this.#waiter = undefined;
    waiter?.reject(new EndOfStream('the connection ended'));
  }
}
