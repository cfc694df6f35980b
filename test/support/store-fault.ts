/**
 * A Store around another one whose calls fail as a test says. Faults are declared either as maps, one character a
 * call, per kind of call,
 *
 *     new FaultStore(store, { put: '..E', sync: '.R*' })   // the third put; every sync but the first
 *
 * or as rules. Characters:
 *
 * | char | the call |
 * | --- | --- |
 * | `.` | goes through |
 * | `E` | fails with `io`, nothing done |
 * | `R` | fails with `io`, retryable, nothing done |
 * | `N` | fails with `no-space`, nothing done |
 * | `A` | is done, but reports `io`, retryable: its answer was lost |
 * | `P` | put, append: half of the bytes of an append get in, then `no-space` (a put is atomic: nothing) |
 * | `S` | get, read: returns half of the bytes, as if the object were cut off |
 * | `F` | get, read: one bit of the bytes is flipped; others: go through |
 * | `H` | hangs until `releaseHung()`, then goes through |
 * | `*` | (at the end) the character before it for all later calls |
 */
import { B2Error } from '../../src/errors.js';
import type {
  Appender,
  GetRange,
  ObjectInfo,
  ObjectReader,
  PutOptions,
  Store,
  StoreSpace,
} from '../../src/repo/store.js';

export const CALL_KINDS = [
  'put',
  'get',
  'open',
  'read',
  'openAppend',
  'append',
  'sync',
  'delete',
  'list',
  'stat',
] as const;
/** `put` covers putStream, which counts once, before the first part is taken. */
export type CallKind = (typeof CALL_KINDS)[number];

export type Fault =
  | { readonly do: 'io'; readonly retryable: boolean }
  | { readonly do: 'no-space' }
  | { readonly do: 'lose-answer' }
  | { readonly do: 'partial' }
  | { readonly do: 'short' }
  | { readonly do: 'flip'; readonly bit?: number }
  | { readonly do: 'hang' }
  /** Waits for the promise, then goes through. */
  | { readonly do: 'wait'; readonly until: () => Promise<void> };

export type FaultMaps = Partial<Record<CallKind, string>>;

export interface FaultCall {
  readonly kind: CallKind;
  readonly name: string;
  /** Of this kind, counted from 0. */
  readonly index: number;
  /** Of all calls, counted from 0. */
  readonly total: number;
}

/** The fault for a call, or undefined. The first rule that answers decides. */
export type FaultRule = (call: FaultCall) => Fault | undefined;

const FAULT_OF_CHAR: Record<string, Fault | undefined> = {
  '.': undefined,
  E: { do: 'io', retryable: false },
  R: { do: 'io', retryable: true },
  N: { do: 'no-space' },
  A: { do: 'lose-answer' },
  P: { do: 'partial' },
  S: { do: 'short' },
  F: { do: 'flip' },
  H: { do: 'hang' },
};

/** A rule from fault maps; throws on a character that means nothing. */
export function faultMaps(maps: FaultMaps): FaultRule {
  for (const map of Object.values(maps)) {
    for (const char of map.replace(/(?<=.)\*$/, '')) {
      if (!(char in FAULT_OF_CHAR)) throw new TypeError(`no fault is called ${char} (in "${map}")`);
    }
  }
  return ({ kind, index }) => {
    const map = maps[kind] ?? '';
    const repeats = map.endsWith('*');
    const chars = repeats ? map.slice(0, -1) : map;
    const at = repeats ? Math.min(index, chars.length - 1) : index;
    return FAULT_OF_CHAR[chars[at] ?? '.'];
  };
}

/** The rule that fails call number `n` (from 0) of all calls of these kinds together, and no other. */
export function failNth(
  n: number,
  fault: Fault,
  kinds: readonly CallKind[] = CALL_KINDS,
): FaultRule {
  let seen = 0;
  return ({ kind }) => (kinds.includes(kind) && seen++ === n ? fault : undefined);
}

const WRITES: readonly CallKind[] = ['put', 'openAppend', 'append', 'sync'];

/** See the file comment. */
export class FaultStore implements Store {
  readonly inner: Store;
  /** Calls so far, failed ones included. */
  readonly calls: Record<CallKind, number>;
  /** Faults that were injected. */
  injected = 0;
  #rules: FaultRule[];
  #total = 0;
  #full = false;
  #hung: (() => void)[] = [];

  constructor(inner: Store, ...faults: readonly (FaultMaps | FaultRule)[]) {
    this.inner = inner;
    this.calls = Object.fromEntries(CALL_KINDS.map((kind) => [kind, 0])) as Record<
      CallKind,
      number
    >;
    this.#rules = faults.map((fault) => (typeof fault === 'function' ? fault : faultMaps(fault)));
  }

  get url(): string {
    return this.inner.url;
  }

  get canAppend(): boolean {
    return this.inner.canAppend;
  }

  /** Calls of all kinds so far. */
  get totalCalls(): number {
    return this.#total;
  }

  /** Replaces the rules; the counters go on. */
  setFaults(...faults: readonly (FaultMaps | FaultRule)[]): void {
    this.#rules = faults.map((fault) => (typeof fault === 'function' ? fault : faultMaps(fault)));
  }

  /** From now on everything that writes (deletes aside) fails with `no-space`, until `makeRoom`. */
  fillUp(): void {
    this.#full = true;
  }

  makeRoom(): void {
    this.#full = false;
  }

  /** Lets all calls that hang go through. */
  releaseHung(): void {
    const hung = this.#hung;
    this.#hung = [];
    for (const release of hung) release();
  }

  /** Calls that hang now. */
  get hanging(): number {
    return this.#hung.length;
  }

  put(name: string, data: Uint8Array, options?: PutOptions): Promise<void> {
    return this.#change('put', name, () => this.inner.put(name, data, options));
  }

  putStream(name: string, parts: AsyncIterable<Uint8Array>): Promise<void> {
    return this.#change('put', name, () => this.inner.putStream(name, parts));
  }

  async get(name: string, range?: GetRange): Promise<Buffer> {
    const fault = await this.#before('get', name);
    const bytes = await this.inner.get(name, range);
    if (fault?.do === 'lose-answer') throw lostAnswer('get', name);
    if (fault?.do === 'short') return bytes.subarray(0, bytes.length >> 1);
    if (fault?.do === 'flip') flip(bytes, bytes.length, fault.bit);
    return bytes;
  }

  async open(name: string): Promise<ObjectReader> {
    const reader = await this.#around('open', name, () => this.inner.open(name));
    return {
      get sizeBytes() {
        return reader.sizeBytes;
      },
      read: async (into, offset) => {
        const fault = await this.#before('read', name);
        if (fault?.do === 'short') return reader.read(into.subarray(0, into.length >> 1), offset);
        const n = await reader.read(into, offset);
        if (fault?.do === 'lose-answer') throw lostAnswer('read', name);
        if (fault?.do === 'flip') flip(into, n, fault.bit);
        return n;
      },
      close: () => reader.close(),
    };
  }

  stat(name: string): Promise<ObjectInfo | undefined> {
    return this.#around('stat', name, () => this.inner.stat(name));
  }

  async *list(prefix: string): AsyncIterable<ObjectInfo> {
    const fault = await this.#before('list', prefix);
    yield* this.inner.list(prefix);
    if (fault?.do === 'lose-answer') throw lostAnswer('list', prefix);
  }

  delete(name: string): Promise<void> {
    return this.#change('delete', name, () => this.inner.delete(name));
  }

  async openAppend(name: string, mode: 'create' | 'existing'): Promise<Appender> {
    const appender = await this.#around('openAppend', name, () =>
      this.inner.openAppend(name, mode),
    );
    // As the contract says of a real one: after a failure the tail is unknown, and nothing more goes in.
    let failure: B2Error | undefined;
    let sizeBytes = appender.sizeBytes;
    let last: Promise<void> = Promise.resolve();
    const inOrder = (work: () => Promise<void>): Promise<void> => {
      const done = last.then(async () => {
        if (failure !== undefined) throw failure;
        try {
          await work();
        } catch (error) {
          if (error instanceof B2Error) failure = error;
          throw error;
        }
      });
      last = done.catch(() => undefined);
      return done;
    };
    return {
      get sizeBytes() {
        return sizeBytes;
      },
      append: (data) => {
        sizeBytes += data.length;
        return inOrder(async () => {
          const fault = await this.#before('append', name);
          if (fault?.do === 'partial') {
            await appender.append(data.subarray(0, data.length >> 1));
            throw noSpace('append to', name);
          }
          await appender.append(data);
          if (fault?.do === 'lose-answer') throw lostAnswer('append', name);
        });
      },
      sync: () => inOrder(() => this.#change('sync', name, () => appender.sync())),
      close: async () => {
        await last;
        await appender.close();
      },
    };
  }

  space(): Promise<StoreSpace | undefined> {
    return this.inner.space();
  }

  close(): Promise<void> {
    return this.inner.close();
  }

  /** Counts the call and injects what comes before it; resolves to the fault if it comes later. */
  async #before(kind: CallKind, name: string): Promise<Fault | undefined> {
    const call: FaultCall = { kind, name, index: this.calls[kind]++, total: this.#total++ };
    let fault: Fault | undefined;
    for (const rule of this.#rules) {
      fault = rule(call);
      if (fault !== undefined) break;
    }
    if (fault === undefined) {
      if (this.#full && WRITES.includes(kind)) throw noSpace(kind, name);
      return undefined;
    }
    this.injected++;
    switch (fault.do) {
      case 'io':
        throw new B2Error('io', `${kind} ${name}: injected I/O error (call ${call.index})`, {
          retryable: fault.retryable,
        });
      case 'no-space':
        throw noSpace(kind, name);
      case 'hang':
        await new Promise<void>((resolve) => this.#hung.push(resolve));
        return undefined;
      case 'wait':
        await fault.until();
        return undefined;
      case 'lose-answer':
      case 'partial':
      case 'short':
      case 'flip':
        return fault;
    }
  }

  async #around<T>(kind: CallKind, name: string, work: () => Promise<T>): Promise<T> {
    const fault = await this.#before(kind, name);
    const result = await work();
    if (fault?.do === 'lose-answer') throw lostAnswer(kind, name);
    return result;
  }

  async #change(kind: CallKind, name: string, work: () => Promise<void>): Promise<void> {
    const fault = await this.#before(kind, name);
    if (fault?.do === 'partial') throw noSpace(kind, name);
    await work();
    if (fault?.do === 'lose-answer') throw lostAnswer(kind, name);
  }
}

function noSpace(operation: string, name: string): B2Error {
  return new B2Error('no-space', `${operation} ${name}: injected: no space left`);
}

function lostAnswer(operation: string, name: string): B2Error {
  return new B2Error('io', `${operation} ${name}: injected: done, but the answer was lost`, {
    retryable: true,
  });
}

/** Flips one bit of the first `length` bytes: number `bit`, or one in the middle. */
function flip(bytes: Uint8Array, length: number, bit = length * 4): void {
  const at = (bit >> 3) % Math.max(1, length);
  const old = bytes[at];
  if (length > 0 && old !== undefined) bytes[at] = old ^ (1 << (bit & 7));
}
