/** The thread side of a {@link RestoreCore}: answers the calls of src/restore/pool.ts. */
import type { MessagePort } from 'node:worker_threads';

import { B2Error } from '../errors.js';
import { adoptAligned } from '../memory.js';
import { contextOf, loadNative, type RepositoryHandle } from '../repo/handle.js';
import { openStore } from '../repo/store-url.js';
import { serveWorker, toPortableError, type PortableError } from '../workers.js';
import type { Batch } from './batch.js';
import {
  RestoreCore,
  slotsOf,
  type CheckResult,
  type CheckWindow,
  type PassOptions,
  type PassResult,
  type RunList,
} from './core.js';

export interface RestoreJob {
  readonly handle: RepositoryHandle;
  readonly slab: SharedArrayBuffer;
  /** Both directions of the conversation; the thread closes it when it is told `end`, or stopped. */
  readonly port: MessagePort;
}

export type ToCore =
  | { readonly type: 'batch'; readonly batch: Batch }
  | { readonly type: 'pass'; readonly id: number; readonly options: PassOptions }
  | { readonly type: 'check'; readonly id: number; readonly window: CheckWindow }
  | { readonly type: 'written'; readonly slot: number }
  | { readonly type: 'end' };

export type FromCore =
  | { readonly type: 'write'; readonly slot: number; readonly runs: RunList }
  | { readonly type: 'passed'; readonly id: number; readonly result: PassResult }
  | { readonly type: 'checked'; readonly id: number; readonly result: CheckResult }
  | { readonly type: 'failed'; readonly id: number; readonly error: PortableError };

serveWorker<RestoreJob, undefined>(async ({ handle, slab, port }, context) => {
  if (handle.storeUrl === undefined)
    throw new Error('this store cannot be opened in another thread');
  adoptAligned(slab);
  const store = await openStore(handle.storeUrl);
  try {
    await new Promise<void>((resolve) => {
      let ended = false;
      const stopped = (): B2Error => new B2Error('interrupted', 'the restore was interrupted');
      const waiting = new Map<number, { resolve: () => void; reject: (error: unknown) => void }>();
      const post = (message: FromCore): void => {
        port.postMessage(message);
      };
      const core = new RestoreCore(contextOf(handle, store), slotsOf(slab), {
        isAborted: context.isAborted,
        write: (slot, runs) =>
          new Promise((done, failed) => {
            if (ended) {
              failed(stopped());
              return;
            }
            waiting.set(slot, { resolve: done, reject: failed });
            post({ type: 'write', slot, runs });
          }),
      });
      let batch: Batch | undefined;
      let passing: Promise<void> | undefined;
      const current = (): Batch => {
        if (batch === undefined) throw new Error('no batch yet');
        return batch;
      };
      const pass = async (id: number, options: PassOptions): Promise<void> => {
        try {
          post({ type: 'passed', id, result: await core.pass(current(), options) });
        } catch (error) {
          post({ type: 'failed', id, error: toPortableError(error) });
        }
      };
      const finish = (): void => {
        ended = true;
        for (const { reject } of waiting.values()) reject(stopped());
        waiting.clear();
        // The store stays open until the pass has let go of its packs.
        void (passing ?? Promise.resolve()).then(() => {
          port.close();
          resolve();
        });
      };
      context.signal.addEventListener('abort', finish, { once: true });
      port.on('message', (message: ToCore) => {
        switch (message.type) {
          case 'batch':
            batch = message.batch;
            return;
          case 'pass':
            passing = pass(message.id, message.options);
            return;
          case 'check':
            try {
              post({
                type: 'checked',
                id: message.id,
                result: core.check(current(), message.window),
              });
            } catch (error) {
              post({ type: 'failed', id: message.id, error: toPortableError(error) });
            }
            return;
          case 'written':
            waiting.get(message.slot)?.resolve();
            waiting.delete(message.slot);
            return;
          case 'end':
            finish();
            return;
        }
      });
      if (context.isAborted()) finish();
    });
  } finally {
    await store.close();
  }
  return undefined;
}, loadNative);
