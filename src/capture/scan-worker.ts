/** The thread of a scan: opens device and store for itself and runs the pipeline of scan-part.ts. */
import { systemClock, systemRandom } from '../clock.js';
import { openReadDevice } from '../devices/open.js';
import { B2Error } from '../errors.js';
import { DedupeView, type DedupeShared } from '../repo/dedupe/view.js';
import { contextOf, loadNative, type RepositoryHandle } from '../repo/handle.js';
import { openStore } from '../repo/store-url.js';
import { abortError, serveWorker } from '../workers.js';
import { scanPart, type ScanPartResult, type ScanPlan, type ScanShared } from './scan-part.js';

/** What a scan thread is given. Holds the master key, as {@link RepositoryHandle} does. */
export interface ScanJob {
  readonly devicePath: string;
  /** The size that the scan was planned for, and what else must be as it was. */
  readonly sizeBytes: number;
  readonly devNumber: string | undefined;
  /** Of a file. */
  readonly inode: string | undefined;
  readonly storeUrl: string;
  readonly handle: RepositoryHandle;
  readonly plan: ScanPlan;
  readonly shared: ScanShared;
  readonly dedupe: DedupeShared;
}

serveWorker<ScanJob, ScanPartResult>(async (job, { index, signal, isAborted }) => {
  const device = await openReadDevice(job.devicePath);
  try {
    const { sizeBytes, devNumber, identity } = device.facts;
    if (
      sizeBytes < job.sizeBytes ||
      devNumber !== job.devNumber ||
      identity['inode'] !== job.inode
    ) {
      throw new B2Error(
        'io',
        `${job.devicePath} is not what it was when the scan began: another size or another device`,
        {
          hint: 'Run the command again once the device is settled.',
        },
      );
    }
    const store = await openStore(job.storeUrl);
    try {
      const ctx = contextOf(job.handle, store);
      return await scanPart({
        index,
        plan: job.plan,
        shared: job.shared,
        device,
        ctx,
        view: new DedupeView(job.dedupe, ctx),
        clock: systemClock,
        random: systemRandom,
        checkStop: () => {
          if (isAborted()) throw abortError(signal, `the scan of ${job.devicePath}`);
        },
        yieldNow: async () => undefined,
      });
    } finally {
      await store.close();
    }
  } finally {
    await device.close();
  }
}, loadNative);
