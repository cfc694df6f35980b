/**
 * Store: where the files of a repository live. A flat name space of objects.
 *
 * Contract for every implementation (test/support/store-suite.ts checks it):
 *
 * - A **name** is one or more segments joined by `/`; a segment is 1 to 200 characters of `[A-Za-z0-9._-]`,
 *   not `.` or `..`. Other names are a programming error: TypeError.
 * - `put` is **atomic and durable**: when it resolves, the whole object survives a power cut; until then a
 *   reader, or a crash, sees the old object or none, never a part of the new one. Repeating it is harmless.
 * - After `put`, `append`+`sync`, or `delete` has resolved, every later `get`, `stat` and `list`, by any client of
 *   the store, sees it (strong consistency).
 * - Errors are {@link B2Error}: `not-found`, `exists` (only `put` with `ifAbsent`), `no-space`, `io` (with
 *   `retryable`). A call that failed may be repeated; a failed `put` has left the old object or the new one.
 * - All methods may be called concurrently. Buffers handed in must not change until the call resolves.
 * - Leftovers of crashed writers (temporary files) are invisible to `list` and harmless.
 *
 * What a store need not do: append (then `canAppend` is false and `openAppend` rejects with `unsupported`),
 * rename, lock, notify, or keep time in step with us.
 */

export interface ObjectInfo {
  readonly name: string;
  readonly sizeBytes: number;
  /** Last change, by the store's clock, milliseconds since 1970. Informative; never decides about data. */
  readonly modifiedMs: number;
}

export interface PutOptions {
  /** Create only: rejects with kind `exists` if an object of that name is there. Exact also between clients. */
  readonly ifAbsent?: boolean;
}

export interface GetRange {
  readonly offset: number;
  /** At most this many bytes are returned; fewer only at the end of the object. */
  readonly length: number;
}

/** An object open for many reads. It may go on showing the version that was there at `open`. */
export interface ObjectReader {
  /** Size when it was opened. An object still being appended to may be longer by now. */
  readonly sizeBytes: number;
  /**
   * Reads into `into` from `offset` until it is full or the object ends; resolves to the bytes read. May read
   * past `sizeBytes` if the object has grown. Fastest where `into` starts at a page-aligned address, and `offset`
   * and its length are multiples of 4096 (a directory store then reads around the page cache).
   */
  read(into: Uint8Array, offset: number): Promise<number>;
  close(): Promise<void>;
}

/**
 * An object being written at its end. Bytes are visible to readers at the latest after `sync`, and durable
 * only after `sync`; a crash before may leave any part of the unsynced bytes, in any order, or none.
 * One appender at a time per object is the caller's duty.
 */
export interface Appender {
  /** Bytes in the object, those appended so far included. The next `append` goes there. */
  readonly sizeBytes: number;
  /**
   * Adds bytes at the end. Calls are ordered; several may be under way. Page-aligned memory with a length that is
   * a multiple of 4096, at such an offset, may be written around the page cache.
   * After a rejected `append` or `sync` the object's tail is unknown: close it and start another object.
   */
  append(data: Uint8Array): Promise<void>;
  /** Everything appended so far, and the object's name, is durable when this resolves (fdatasync). */
  sync(): Promise<void>;
  /** Releases resources. Does not sync. Safe to call twice. */
  close(): Promise<void>;
}

export interface StoreSpace {
  readonly freeBytes: number;
  readonly totalBytes: number;
}

export interface Store {
  /** The URL as a person would write it, without secrets. */
  readonly url: string;
  /** True if `openAppend` works. */
  readonly canAppend: boolean;

  put(name: string, data: Uint8Array, options?: PutOptions): Promise<void>;
  /**
   * As `put`, for an object too large to hold in memory: takes the parts in order and asks for the next one only when
   * it has room. If `parts` throws, or the process dies, no object appears (nor is an old one changed).
   */
  putStream(name: string, parts: AsyncIterable<Uint8Array>): Promise<void>;
  /** The object's bytes, or those of `range`. A range that starts at or past the end gives an empty buffer. */
  get(name: string, range?: GetRange): Promise<Buffer>;
  open(name: string): Promise<ObjectReader>;
  /** Undefined if there is no such object. */
  stat(name: string): Promise<ObjectInfo | undefined>;
  /**
   * Every object whose name is below `prefix` (a whole number of segments, without a trailing slash; '' is all),
   * at any depth, in no particular order. An object created or deleted meanwhile may be in it or not.
   */
  list(prefix: string): AsyncIterable<ObjectInfo>;
  /** Removes the object, durably. Removing what is not there succeeds. */
  delete(name: string): Promise<void>;
  /**
   * `create`: a new, empty object (kind `exists` if the name is taken). `existing`: an existing one, positioned at
   * its end. The name is durable with the first `sync`.
   */
  openAppend(name: string, mode: 'create' | 'existing'): Promise<Appender>;
  /** Free space where the store can tell, else undefined. */
  space(): Promise<StoreSpace | undefined>;
  close(): Promise<void>;
}

const SEGMENT = /^[A-Za-z0-9._-]{1,200}$/;

/** Throws TypeError unless `name` obeys the contract above. */
export function checkName(name: string): void {
  for (const segment of name.split('/')) {
    if (!SEGMENT.test(segment) || segment === '.' || segment === '..') {
      throw new TypeError(`not a valid object name: ${JSON.stringify(name)}`);
    }
  }
}
