/** The thread of `verifyPacks`. */
import { contextOf, loadNative, type RepositoryHandle } from '../repo/handle.js';
import { openStore } from '../repo/store-url.js';
import { serveWorker } from '../workers.js';
import {
  claimPack,
  verifyPass,
  type DataFinding,
  type DataTotals,
  type PackToVerify,
  type UnsealedPack,
} from './data-pass.js';

export interface DataJob {
  readonly handle: RepositoryHandle;
  readonly list: readonly PackToVerify[];
  /** [0]: index of the next pack that no thread has taken; [1]: not zero when no more are to be taken. */
  readonly control: Int32Array;
}

export type DataMessage =
  | { readonly type: 'progress'; readonly storedBytes: number }
  | { readonly type: 'finding'; readonly finding: DataFinding }
  | { readonly type: 'unsealed'; readonly pack: UnsealedPack };

serveWorker<DataJob, DataTotals, DataMessage>(async ({ handle, list, control }, context) => {
  if (handle.storeUrl === undefined)
    throw new Error('this store cannot be opened in another thread');
  const store = await openStore(handle.storeUrl);
  try {
    return await verifyPass(contextOf(handle, store), list, {
      claim: () => claimPack(control, list.length),
      isAborted: context.isAborted,
      progress: (storedBytes) => context.post({ type: 'progress', storedBytes }),
      finding: (finding) => context.post({ type: 'finding', finding }),
      unsealed: (pack) => context.post({ type: 'unsealed', pack }),
    });
  } finally {
    await store.close();
  }
}, loadNative);
