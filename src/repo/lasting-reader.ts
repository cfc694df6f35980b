/** An open object that outlives an outage of its store. */
import { isKind } from '../errors.js';
import type { ObjectReader, Store } from './store.js';

interface Opened {
  readonly object: ObjectReader;
  users: number;
  isOld: boolean;
}

/**
 * Opens an object to be kept open for long. What is open of a disk or network file system that was away stays unreadable when that
 * is back: so a read that fails with kind `io` is tried once more with the object opened anew. Until then it is what was opened, also
 * when it has been deleted meanwhile. An object of that name may have been written anew since (by a repair): who reads must be able to
 * tell, as the seals of a segment's pages do; one of another size is refused here. Rejects as {@link Store.open}.
 */
export async function openLasting(store: Store, name: string): Promise<ObjectReader> {
  return new LastingReader(store, name, await store.open(name));
}

class LastingReader implements ObjectReader {
  readonly sizeBytes: number;
  readonly #store: Store;
  readonly #name: string;
  #current: Opened;
  #opening: Promise<void> | undefined;
  #isClosed = false;

  constructor(store: Store, name: string, object: ObjectReader) {
    this.#store = store;
    this.#name = name;
    this.sizeBytes = object.sizeBytes;
    this.#current = { object, users: 0, isOld: false };
  }

  async read(into: Uint8Array, offset: number): Promise<number> {
    const used = this.#current;
    try {
      return await this.#readOf(used, into, offset);
    } catch (error) {
      if (!isKind(error, 'io') || this.#isClosed) throw error;
      // Somebody else's read may have opened it anew meanwhile.
      if (this.#current === used) await (this.#opening ??= this.#openAgain(error));
    }
    return this.#readOf(this.#current, into, offset);
  }

  async #readOf(opened: Opened, into: Uint8Array, offset: number): Promise<number> {
    opened.users++;
    try {
      return await opened.object.read(into, offset);
    } finally {
      opened.users--;
      if (opened.isOld && opened.users === 0) await closeQuietly(opened.object);
    }
  }

  async #openAgain(cause: unknown): Promise<void> {
    try {
      const object = await this.#store.open(this.#name);
      const { sizeBytes } = object;
      if (this.#isClosed || sizeBytes !== this.sizeBytes) {
        await closeQuietly(object);
        throw cause;
      }
      const old = this.#current;
      this.#current = { object, users: 0, isOld: false };
      old.isOld = true;
      if (old.users === 0) await closeQuietly(old.object);
    } catch {
      // The first failure says more: the object may be gone because the store is.
      throw cause;
    } finally {
      this.#opening = undefined;
    }
  }

  async close(): Promise<void> {
    this.#isClosed = true;
    await this.#current.object.close();
  }
}

/** What is closed here has failed already; that its end fails as well says nothing new. */
async function closeQuietly(object: ObjectReader): Promise<void> {
  await object.close().catch(() => undefined);
}
