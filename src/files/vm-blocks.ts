/** Asks the tiny VM for what its block devices hold (guest.ts has the protocol): several requests may be under way. */
import type { Clock } from '../clock.js';
import { B2Error } from '../errors.js';

export interface BlockClientOptions {
  /** Sends a line to the guest. */
  readonly send: (line: string) => void;
  readonly clock: Clock;
  /** Changes from call to call while something goes on below the guest: reads of the image that it asked for. */
  readonly progress: () => number;
  /** Told once when the guest has not answered for {@link STALL_MS}; must see to it that {@link BlockClient.fail} is called. */
  readonly stalled: (error: B2Error) => void;
}

/** A guest that has something to answer and for so long neither does nor reads the image hangs. */
export const STALL_MS = 120_000;
const STALL_CHECKS = 8;
/** Longer requests are several. */
export const MAX_REQUEST_BYTES = 1024 * 1024;
const MAX_HEADER_BYTES = 64;

interface Request {
  readonly into: Uint8Array;
  readonly resolve: () => void;
  readonly reject: (error: Error) => void;
}

/** What a read of a device in the guest failed with. */
export class GuestReadError extends Error {
  readonly errno: number;

  constructor(device: string, offset: number, errno: number) {
    super(`${device}, byte ${offset}: error ${errno}`);
    this.errno = errno;
  }
}

export class BlockClient {
  readonly #options: BlockClientOptions;
  readonly #requests = new Map<
    number,
    Request & { readonly device: string; readonly at: number }
  >();
  #next = 1;
  #header = '';
  /** Bytes that follow, of this request. */
  #current: { readonly request: Request; done: number } | undefined;
  #answers = 0;
  #isWatching = false;
  readonly #ended = new AbortController();
  #failed: Error | undefined;

  constructor(options: BlockClientOptions) {
    this.#options = options;
  }

  /** Fills `into`. Rejects with {@link GuestReadError}, or with what {@link fail} was given. */
  async read(device: string, into: Uint8Array, offset: number): Promise<void> {
    const parts: Promise<void>[] = [];
    for (let at = 0; at < into.length; at += MAX_REQUEST_BYTES)
      parts.push(this.#ask(device, into.subarray(at, at + MAX_REQUEST_BYTES), offset + at));
    await Promise.all(parts);
  }

  #ask(device: string, into: Uint8Array, offset: number): Promise<void> {
    if (this.#failed !== undefined) return Promise.reject(this.#failed);
    return new Promise((resolve, reject) => {
      const id = this.#next++;
      this.#requests.set(id, { into, resolve, reject, device, at: offset });
      this.#options.send(`${id} ${device} ${offset} ${into.length}\n`);
      void this.#watch();
    });
  }

  /** Takes what came from the guest. Throws `failed` on nonsense; then {@link fail} must follow. */
  take(piece: Buffer): void {
    let rest = piece;
    while (rest.length > 0 && this.#failed === undefined) {
      if (this.#current !== undefined) {
        const { request } = this.#current;
        const part = rest.subarray(0, request.into.length - this.#current.done);
        request.into.set(part, this.#current.done);
        this.#current.done += part.length;
        rest = rest.subarray(part.length);
        this.#answers++;
        if (this.#current.done < request.into.length) return;
        this.#current = undefined;
        request.resolve();
        continue;
      }
      const newline = rest.indexOf(10);
      this.#header += rest.toString('latin1', 0, newline < 0 ? rest.length : newline);
      if (this.#header.length > MAX_HEADER_BYTES) throw this.#nonsense();
      if (newline < 0) return;
      rest = rest.subarray(newline + 1);
      this.#begin();
      this.#header = '';
    }
  }

  #begin(): void {
    const match = /^B(\d{1,15}) (\d{1,5}) (\d{1,7})$/.exec(this.#header);
    const [id, errno, length] = (match ?? []).slice(1).map(Number);
    const request = id === undefined ? undefined : this.#requests.get(id);
    if (id === undefined || errno === undefined || request === undefined) throw this.#nonsense();
    this.#answers++;
    if (errno !== 0 && length === 0) {
      this.#requests.delete(id);
      request.reject(new GuestReadError(request.device, request.at, errno));
      return;
    }
    if (errno !== 0 || length !== request.into.length) throw this.#nonsense();
    this.#requests.delete(id);
    if (length > 0) this.#current = { request, done: 0 };
    else request.resolve();
  }

  #nonsense(): B2Error {
    const start = JSON.stringify(this.#header.slice(0, MAX_HEADER_BYTES));
    return new B2Error('failed', `the tiny virtual machine sent something senseless: ${start}`);
  }

  /** Ends every request, also those that come, with this error. */
  fail(error: Error): void {
    this.#failed ??= error;
    this.#ended.abort();
    const current = this.#current?.request;
    this.#current = undefined;
    current?.reject(this.#failed);
    for (const { reject } of this.#requests.values()) reject(this.#failed);
    this.#requests.clear();
  }

  get #isWaiting(): boolean {
    return this.#requests.size > 0 || this.#current !== undefined;
  }

  async #watch(): Promise<void> {
    if (this.#isWatching) return;
    this.#isWatching = true;
    const { clock, progress, stalled } = this.#options;
    const state = (): string => `${this.#answers} ${progress()}`;
    let last = state();
    let checks = 0;
    while (this.#isWaiting && checks < STALL_CHECKS) {
      await clock.sleep(STALL_MS / STALL_CHECKS, this.#ended.signal);
      const now = state();
      checks = now === last ? checks + 1 : 0;
      last = now;
    }
    this.#isWatching = false;
    if (!this.#isWaiting) return;
    stalled(
      new B2Error(
        'failed',
        `the tiny virtual machine has not answered for ${STALL_MS / 1000} seconds`,
      ),
    );
  }
}
