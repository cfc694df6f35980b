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
  type ReadPack,
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
  | { readonly type: 'opened'; readonly pack: ReadPack }
  | { readonly type: 'unsealed'; readonly pack: UnsealedPack };

/** Every message wakes a thread that may be at work itself. */
const PROGRESS_BYTES = 16 * 1024 * 1024;

serveWorker<DataJob, DataTotals, DataMessage>(async ({ handle, list, control }, context) => {
  if (handle.storeUrl === undefined)
    throw new Error('this store cannot be opened in another thread');
  const store = await openStore(handle.storeUrl);
  let unsaid = 0;
  const progress = (storedBytes: number, atLeast: number): void => {
    unsaid += storedBytes;
    if (unsaid < atLeast) return;
    context.post({ type: 'progress', storedBytes: unsaid });
    unsaid = 0;
  };
  try {
    const totals = await verifyPass(contextOf(handle, store), list, {
      claim: () => claimPack(control, list.length),
      isAborted: context.isAborted,
      progress: (storedBytes) => progress(storedBytes, PROGRESS_BYTES),
      finding: (finding) => context.post({ type: 'finding', finding }),
      opened: (pack) => context.post({ type: 'opened', pack }),
      unsealed: (pack) => context.post({ type: 'unsealed', pack }),
    });
    progress(0, 1);
    return totals;
  } finally {
    await store.close();
  }
}, loadNative);
