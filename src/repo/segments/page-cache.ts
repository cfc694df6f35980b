/** A cache of decoded segment pages, shared by all images of a process, bounded in bytes. */

/** Room for some 280 pages of extents: the hot part of many images. */
export const DEFAULT_PAGE_CACHE_BYTES = 32 * 1024 * 1024;

interface Entry {
  readonly value: object;
  readonly bytes: number;
}

/**
 * Least recently used entries go first. Concurrent loads of one page become one. A load that fails is not remembered.
 * Values are shared: nobody may change them.
 */
export class PageCache {
  readonly #maxBytes: number;
  readonly #entries = new Map<string, Entry>();
  readonly #loading = new Map<string, Promise<object>>();
  #bytes = 0;

  constructor(maxBytes: number = DEFAULT_PAGE_CACHE_BYTES) {
    this.#maxBytes = maxBytes;
  }

  /** Bytes held, as the loaders stated them. At most `maxBytes`. */
  get bytes(): number {
    return this.#bytes;
  }

  /**
   * The page `key`, loaded with `load` if it is not here. `keep` false: a page that had to be loaded is not kept (for passes over
   * everything, which would only push out what others use). One key must always be of one type T.
   */
  async get<T extends object>(
    key: string,
    load: () => Promise<{ value: T; bytes: number }>,
    keep = true,
  ): Promise<T> {
    const hit = this.#entries.get(key);
    if (hit !== undefined) {
      this.#entries.delete(key);
      this.#entries.set(key, hit);
      return hit.value as T;
    }
    const under = this.#loading.get(key);
    if (under !== undefined) return under as Promise<T>;
    const promise = load().then(({ value, bytes }) => {
      if (keep) this.#add(key, { value, bytes });
      return value;
    });
    this.#loading.set(key, promise);
    try {
      return await promise;
    } finally {
      this.#loading.delete(key);
    }
  }

  /** Forgets every entry whose key starts with `prefix`. */
  drop(prefix: string): void {
    for (const [key, entry] of this.#entries) {
      if (key.startsWith(prefix)) {
        this.#entries.delete(key);
        this.#bytes -= entry.bytes;
      }
    }
  }

  #add(key: string, entry: Entry): void {
    if (entry.bytes > this.#maxBytes) return;
    this.#entries.set(key, entry);
    this.#bytes += entry.bytes;
    for (const [oldest, old] of this.#entries) {
      if (this.#bytes <= this.#maxBytes) break;
      this.#entries.delete(oldest);
      this.#bytes -= old.bytes;
    }
  }
}
