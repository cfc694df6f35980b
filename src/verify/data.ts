/** Data verification: every byte of packs is read, every frame opened, every chunk compared with its id. */
import type { Clock } from '../clock.js';
import type { EventSink } from '../events.js';
import { startProgress } from '../progress.js';
import { contextOf, type RepositoryHandle } from '../repo/handle.js';
import type { Store } from '../repo/store.js';
import { abortError, runWorkers, warmWorkers } from '../workers.js';
import {
  claimPack,
  verifyPass,
  type DataFinding,
  type DataTotals,
  type PackToVerify,
  type ReadPack,
  type UnsealedPack,
} from './data-pass.js';
import type { DataJob, DataMessage } from './data-worker.js';

export type {
  DataFinding,
  DataFindingKind,
  DataTotals,
  PackToVerify,
  ReadPack,
  UnsealedPack,
} from './data-pass.js';

const DEFAULT_WORKERS = 2;
const DATA_WORKER = new URL('./data-worker.js', import.meta.url);

/** Starts the threads of a {@link verifyPacks} that is to come, while the repository is being opened. */
export function warmVerify(workers = DEFAULT_WORKERS): void {
  warmWorkers(DATA_WORKER, workers - 1);
}

export interface VerifyPacksOptions {
  readonly handle: RepositoryHandle;
  /** This thread's store. */
  readonly store: Store;
  readonly clock: Pick<Clock, 'monotonicNs'>;
  readonly events: EventSink;
  readonly signal?: AbortSignal | undefined;
  /**
   * Threads that work, this one among them, which takes its turn piece by piece; default 2. With 0 or 1, and where the store exists in
   * this thread only, there is no other.
   */
  readonly workers?: number | undefined;
  /** This thread takes no pack before this settles, because it has something else to do; the others begin at once. */
  readonly busy?: Promise<void> | undefined;
  /** No pack is begun after this monotonic time. */
  readonly deadlineNs?: bigint | undefined;
  /** No pack is begun when this many bytes of packs have been read. */
  readonly budgetBytes?: number | undefined;
  /** What all of `packs` holds, for the progress. */
  readonly totalBytes?: number | undefined;
}

export interface VerifyPacksResult extends Readonly<DataTotals> {
  /** In the order of the list, then of frames. */
  readonly findings: readonly DataFinding[];
  /** Every pack that could be opened, as it was then, by id. */
  readonly opened: ReadonlyMap<string, ReadPack>;
  readonly unsealed: readonly UnsealedPack[];
  /** Index in the list of the first pack that was not verified; its length if all were. */
  readonly next: number;
}

/**
 * Verifies the data of `packs`, in their order, and goes on after damage. Ends early, between packs, at the deadline or
 * budget: `next` says where to go on. Findings are collected; memory grows with damage only.
 *
 * Rejects with `interrupted`, and with what is no damage of a pack (out of memory, a bug).
 */
export async function verifyPacks(
  packs: readonly PackToVerify[],
  options: VerifyPacksOptions,
): Promise<VerifyPacksResult> {
  const { handle, store, clock, signal, deadlineNs, budgetBytes } = options;
  const others =
    handle.storeUrl === undefined ? 0 : Math.max(1, options.workers ?? DEFAULT_WORKERS) - 1;
  const control = new Int32Array(new SharedArrayBuffer(8));
  const findings: DataFinding[] = [];
  const opened = new Map<string, ReadPack>();
  const unsealed: UnsealedPack[] = [];
  const progress = startProgress({
    phase: `verifying ${store.url}`,
    totalBytes: options.totalBytes,
    clock,
    events: options.events,
  });
  let readBytes = 0;
  const enough = (): boolean =>
    (deadlineNs !== undefined && clock.monotonicNs() >= deadlineNs) ||
    (budgetBytes !== undefined && readBytes >= budgetBytes);
  const advance = (bytes: number): void => {
    readBytes += bytes;
    progress.add(bytes);
    if (enough()) Atomics.store(control, 1, 1);
  };
  advance(0);

  let failure: { readonly error: unknown } | undefined;
  const stop = new AbortController();
  const stopped = signal === undefined ? stop.signal : AbortSignal.any([signal, stop.signal]);
  /** The first error ends the others too, and is the one that is thrown when all have come to rest. */
  const part = async (work: () => Promise<DataTotals[]>): Promise<DataTotals[]> => {
    try {
      return await work();
    } catch (error) {
      failure ??= { error };
      stop.abort(error);
      return [];
    }
  };
  const own = async (): Promise<DataTotals[]> => {
    await options.busy;
    const totals = await verifyPass(contextOf(handle, store), packs, {
      claim: () => claimPack(control, packs.length),
      isAborted: () => stopped.aborted,
      progress: advance,
      finding: (finding) => void findings.push(finding),
      opened: (pack) => void opened.set(pack.packId, pack),
      unsealed: (pack) => void unsealed.push(pack),
    });
    if (stopped.aborted) throw abortError(stopped, `verifying ${store.url}`);
    return [totals];
  };
  const job: DataJob = { handle, list: packs, control };
  const theirs = (): Promise<DataTotals[]> =>
    runWorkers<DataJob, DataTotals, DataMessage>(
      DATA_WORKER,
      Array.from({ length: others }, () => job),
      {
        what: `verifying ${store.url}`,
        signal: stopped,
        onMessage: (_index, message) => {
          switch (message.type) {
            case 'progress':
              advance(message.storedBytes);
              return;
            case 'finding':
              findings.push(message.finding);
              return;
            case 'opened':
              opened.set(message.pack.packId, message.pack);
              return;
            case 'unsealed':
              unsealed.push(message.pack);
              return;
          }
        },
      },
    );
  const results = (
    await Promise.all(others === 0 ? [part(own)] : [part(theirs), part(own)])
  ).flat();
  if (failure !== undefined) throw failure.error;
  progress.finish();
  const place = new Map(packs.map((p, i) => [p.packId, i]));
  const order = (a: DataFinding, b: DataFinding): number =>
    (place.get(a.packId) ?? 0) - (place.get(b.packId) ?? 0) || (a.frame ?? -1) - (b.frame ?? -1);
  const totals: DataTotals = { packs: 0, frames: 0, chunks: 0, storedBytes: 0, plainBytes: 0 };
  for (const result of results) {
    totals.packs += result.packs;
    totals.frames += result.frames;
    totals.chunks += result.chunks;
    totals.storedBytes += result.storedBytes;
    totals.plainBytes += result.plainBytes;
  }
  return {
    ...totals,
    findings: findings.sort(order),
    opened,
    unsealed,
    // Packs are taken in order, and what was taken was finished.
    next: Math.min(Atomics.load(control, 0), packs.length),
  };
}
