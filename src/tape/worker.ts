/** The thread side of {@link PackPool}: does what src/tape/pool.ts asks of it. */
import type { MessagePort } from 'node:worker_threads';

import { adoptAligned } from '../memory.js';
import { contextOf, loadNative, type RepositoryHandle } from '../repo/handle.js';
import { openStore } from '../repo/store-url.js';
import { serveWorker, toPortableError, type PortableError } from '../workers.js';
import { MapStore } from './map-store.js';
import type { CopiedPiece, CopyJob } from './pack-copier.js';
import type { BuildJob } from './pack-maker.js';
import { PackWork, type PackChecked, type TakenChunk } from './pack-work.js';

export interface TapeJob {
  readonly handle: RepositoryHandle;
  readonly port: MessagePort;
}

/** Packs are in memory that both sides see; who has the message works on it. */
export type ToWork =
  | {
      readonly type: 'build';
      readonly id: number;
      readonly job: BuildJob;
      readonly buffer: SharedArrayBuffer;
    }
  | {
      readonly type: 'copy';
      readonly id: number;
      readonly job: CopyJob;
      readonly buffer: SharedArrayBuffer;
      /** Where the memory for the piece begins in it. */
      readonly offset: number;
      /** It is page-aligned memory. */
      readonly aligned: boolean;
    }
  | {
      readonly type: 'check';
      readonly id: number;
      readonly packId: string;
      readonly buffer: SharedArrayBuffer;
      readonly length: number;
    }
  | {
      readonly type: 'take';
      readonly id: number;
      readonly packId: string;
      readonly buffer: SharedArrayBuffer;
      readonly length: number;
      readonly keys: Uint32Array;
    }
  | { readonly type: 'end' };

export type WorkAnswer =
  | { readonly type: 'built'; readonly length: number }
  | { readonly type: 'copied'; readonly piece: CopiedPiece }
  | { readonly type: 'checked'; readonly result: PackChecked }
  | {
      readonly type: 'taken';
      readonly taken: readonly TakenChunk[];
      readonly bytes: ArrayBuffer;
      readonly damaged: PackChecked['damaged'];
    };

export type FromWork = { readonly id: number } & (
  | { readonly answer: WorkAnswer; readonly error?: undefined }
  | { readonly answer?: undefined; readonly error: PortableError }
);

/** Does one thing. Shared with the pool, which does it in its own thread where there are no others. */
export async function doWork(
  work: PackWork,
  message: Exclude<ToWork, { readonly type: 'end' }>,
): Promise<WorkAnswer> {
  switch (message.type) {
    case 'build':
      return { type: 'built', length: await work.build(message.job, Buffer.from(message.buffer)) };
    case 'copy': {
      const { job, buffer, offset } = message;
      if (message.aligned) adoptAligned(buffer);
      const piece = await work.copy(job, Buffer.from(buffer, offset, job.roomBytes));
      return { type: 'copied', piece };
    }
    case 'check': {
      const bytes = Buffer.from(message.buffer, 0, message.length);
      return { type: 'checked', result: await work.check(message.packId, bytes) };
    }
    case 'take': {
      const bytes = Buffer.from(message.buffer, 0, message.length);
      const { taken, bytes: out, damaged } = await work.take(message.packId, bytes, message.keys);
      return { type: 'taken', taken, bytes: out.buffer, damaged };
    }
  }
}

serveWorker<TapeJob, undefined>(async ({ handle, port }, context) => {
  const store =
    handle.storeUrl === undefined ? new MapStore('the tape') : await openStore(handle.storeUrl);
  const work = new PackWork(contextOf(handle, store));
  try {
    await new Promise<void>((resolve) => {
      let last: Promise<void> = Promise.resolve();
      const end = (): void => {
        void last.then(() => {
          port.close();
          resolve();
        });
      };
      context.signal.addEventListener('abort', end, { once: true });
      port.on('message', (message: ToWork) => {
        if (message.type === 'end') {
          end();
          return;
        }
        const { id } = message;
        last = last.then(async () => {
          try {
            const answer = await doWork(work, message);
            const moved = answer.type === 'taken' ? [answer.bytes] : [];
            port.postMessage({ id, answer } satisfies FromWork, moved);
          } catch (error) {
            port.postMessage({ id, error: toPortableError(error) } satisfies FromWork);
          }
        });
      });
      if (context.isAborted()) end();
    });
  } finally {
    await work.close();
    await store.close();
  }
  return undefined;
}, loadNative);
