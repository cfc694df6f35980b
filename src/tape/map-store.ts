/** A store in memory: what was read from a tape, or is about to be written to one, seen as a small repository. */
import { B2Error } from '../errors.js';
import type { GetRange, ObjectInfo, ObjectReader, PutOptions, Store } from '../repo/store.js';

/** Keeps whole objects; buffers are not copied. It cannot append, so that packs are put whole. */
export class MapStore implements Store {
  readonly url: string;
  readonly canAppend = false;
  readonly objects: Map<string, Buffer>;

  /** `url` is for messages: where the objects come from. */
  constructor(url: string, objects = new Map<string, Buffer>()) {
    this.url = url;
    this.objects = objects;
  }

  put(name: string, data: Uint8Array, options: PutOptions = {}): Promise<void> {
    if (options.ifAbsent === true && this.objects.has(name))
      return Promise.reject(new B2Error('exists', `${this.url}: ${name} is there already`));
    this.objects.set(name, Buffer.from(data));
    return Promise.resolve();
  }

  async putStream(name: string, parts: AsyncIterable<Uint8Array>): Promise<void> {
    const list: Uint8Array[] = [];
    for await (const part of parts) list.push(Buffer.from(part));
    this.objects.set(name, Buffer.concat(list));
  }

  async get(name: string, range?: GetRange): Promise<Buffer> {
    const bytes = await this.#bytes(name);
    return Buffer.from(
      range === undefined ? bytes : bytes.subarray(range.offset, range.offset + range.length),
    );
  }

  async open(name: string): Promise<ObjectReader> {
    const bytes = await this.#bytes(name);
    return {
      sizeBytes: bytes.length,
      read: (into, offset) => {
        const part = bytes.subarray(offset, offset + into.byteLength);
        into.set(part);
        return Promise.resolve(part.length);
      },
      close: () => Promise.resolve(),
    };
  }

  stat(name: string): Promise<ObjectInfo | undefined> {
    const bytes = this.objects.get(name);
    return Promise.resolve(
      bytes === undefined ? undefined : { name, sizeBytes: bytes.length, modifiedMs: 0 },
    );
  }

  async *list(prefix: string): AsyncGenerator<ObjectInfo> {
    for (const [name, bytes] of this.objects) {
      if (prefix === '' || name.startsWith(`${prefix}/`))
        yield await Promise.resolve({ name, sizeBytes: bytes.length, modifiedMs: 0 });
    }
  }

  delete(name: string): Promise<void> {
    this.objects.delete(name);
    return Promise.resolve();
  }

  openAppend(): Promise<never> {
    return Promise.reject(new B2Error('unsupported', `${this.url} cannot append`));
  }

  space(): Promise<undefined> {
    return Promise.resolve(undefined);
  }

  close(): Promise<void> {
    return Promise.resolve();
  }

  #bytes(name: string): Promise<Buffer> {
    const bytes = this.objects.get(name);
    return bytes === undefined
      ? Promise.reject(new B2Error('not-found', `${this.url} holds no ${name}`))
      : Promise.resolve(bytes);
  }
}
