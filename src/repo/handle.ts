/**
 * What a worker thread needs to use a repository: plain data that crosses the thread border, and how it becomes a
 * context on the other side. The master key is in it: hand it to our own threads only, never to a log or a file.
 */
import { keyRing } from '../format/seal.js';
import { gcm } from '../gcm.js';
import { keyedHash } from '../hash.js';
import { lz4 } from '../lz4.js';
import type { PackContext } from './pack-writer.js';
import type { Store } from './store.js';

export interface RepositoryHandle {
  /** The URL to open the store with; undefined for a store that exists in one thread only (tests). */
  readonly storeUrl: string | undefined;
  readonly master: Uint8Array;
  readonly encrypted: boolean;
  readonly repositoryId: string;
  readonly chunkBytes: number;
  /** Size at which a pack is sealed. */
  readonly packBytes: number;
}

/** Loads the native libraries that every context uses, for who has nothing better to do than to wait. */
export function loadNative(): void {
  lz4();
  gcm();
  keyedHash(Buffer.alloc(32));
}

/** The context of this thread for `store`, which the caller has opened from the handle's URL and will close. */
export function contextOf(handle: RepositoryHandle, store: Store): PackContext {
  return {
    store,
    keys: keyRing(handle.master, handle.encrypted),
    lz4: lz4(),
    repositoryId: handle.repositoryId,
    chunkBytes: handle.chunkBytes,
  };
}
