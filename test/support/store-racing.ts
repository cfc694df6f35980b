/**
 * A Store around another one that makes races happen: each call waits a random number of turns of the event loop before and after it
 * does its work, and a list shows what comes and goes meanwhile as badly as the contract allows: an object made during it is missing, one
 * deleted during it too.
 */
import type {
  Appender,
  GetRange,
  ObjectInfo,
  ObjectReader,
  PutOptions,
  Store,
  StoreSpace,
} from '../../src/repo/store.js';

export class RacingStore implements Store {
  readonly inner: Store;
  readonly #random: () => number;
  readonly #mostTurns: number;

  constructor(inner: Store, random: () => number, mostTurns = 6) {
    this.inner = inner;
    this.#random = random;
    this.#mostTurns = mostTurns;
  }

  get url(): string {
    return this.inner.url;
  }

  get canAppend(): boolean {
    return this.inner.canAppend;
  }

  async #turns(): Promise<void> {
    // Mostly short, now and then long enough for much to happen elsewhere.
    const most = this.#random() < 0.05 ? this.#mostTurns * 20 : this.#mostTurns;
    const turns = Math.floor(this.#random() * (most + 1));
    for (let i = 0; i < turns; i++) await new Promise<void>((resolve) => setImmediate(resolve));
  }

  async #slow<T>(work: () => Promise<T>): Promise<T> {
    await this.#turns();
    try {
      return await work();
    } finally {
      await this.#turns();
    }
  }

  put(name: string, data: Uint8Array, options?: PutOptions): Promise<void> {
    return this.#slow(() => this.inner.put(name, data, options));
  }

  putStream(name: string, parts: AsyncIterable<Uint8Array>): Promise<void> {
    return this.#slow(() => this.inner.putStream(name, parts));
  }

  get(name: string, range?: GetRange): Promise<Buffer> {
    return this.#slow(() => this.inner.get(name, range));
  }

  async open(name: string): Promise<ObjectReader> {
    const reader = await this.#slow(() => this.inner.open(name));
    return {
      get sizeBytes() {
        return reader.sizeBytes;
      },
      read: (into, offset) => this.#slow(() => reader.read(into, offset)),
      close: () => reader.close(),
    };
  }

  stat(name: string): Promise<ObjectInfo | undefined> {
    return this.#slow(() => this.inner.stat(name));
  }

  async *list(prefix: string): AsyncIterable<ObjectInfo> {
    await this.#turns();
    const before: ObjectInfo[] = [];
    for await (const o of this.inner.list(prefix)) before.push(o);
    await this.#turns();
    const after = new Set<string>();
    for await (const { name } of this.inner.list(prefix)) after.add(name);
    for (const o of before) if (after.has(o.name)) yield o;
    await this.#turns();
  }

  delete(name: string): Promise<void> {
    return this.#slow(() => this.inner.delete(name));
  }

  async openAppend(name: string, mode: 'create' | 'existing'): Promise<Appender> {
    const appender = await this.#slow(() => this.inner.openAppend(name, mode));
    return {
      get sizeBytes() {
        return appender.sizeBytes;
      },
      append: async (data) => {
        await appender.append(data);
        await this.#turns();
      },
      sync: () => this.#slow(() => appender.sync()),
      close: () => appender.close(),
    };
  }

  space(): Promise<StoreSpace | undefined> {
    return this.inner.space();
  }

  close(): Promise<void> {
    return this.inner.close();
  }
}
