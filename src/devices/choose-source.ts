/** Which change source watches a device, and why. */
import type { Clock, Random } from '../clock.js';
import { B2Error } from '../errors.js';
import type { ChangeSource } from './change-source.js';
import type { ReadDevice } from './device.js';
import { ScanSource } from './scan-source.js';
import { traceHost, traceObstacle, type TraceHost } from './trace/instance.js';
import { TraceSource } from './trace/source.js';

export type SourceChoice = 'auto' | 'trace' | 'scan';

export interface ChooseOptions {
  readonly clock: Clock;
  readonly random: Random;
  /** See {@link ScanSourceOptions.scanIntervalMs}. */
  readonly scanIntervalMs?: number;
  readonly host?: TraceHost;
  readonly uid?: number | undefined;
  readonly signal?: AbortSignal;
}

export interface ChosenSource {
  readonly source: ChangeSource;
  /** One sentence for the log: what was chosen and why. */
  readonly why: string;
  /** True if `auto` had to take a source that gives fewer exact points: worth a warning. */
  readonly isFallback: boolean;
}

/** What scanning instead of tracing costs, for messages. */
export const SCAN_COST =
  'changes are found by reading the whole device each time it was written, and a point is exact only when nothing is written while that lasts';

/**
 * Opens the change source that was asked for; `auto` takes `trace` for block devices where it can be had, else `scan`. Rejects
 * with `unsupported` where the source that was named cannot be had.
 */
export async function chooseSource(
  device: ReadDevice,
  choice: SourceChoice,
  options: ChooseOptions,
): Promise<ChosenSource> {
  const { facts } = device;
  const { clock } = options;
  const scan = async (why: string, isFallback: boolean): Promise<ChosenSource> => ({
    source: await ScanSource.open(device, options, options.signal),
    why,
    isFallback,
  });
  if (choice === 'scan') return scan(`${facts.path} is scanned for changes, as asked`, false);
  const host = options.host ?? traceHost();
  if (facts.kind === 'file') {
    if (choice === 'trace') {
      throw new B2Error(
        'unsupported',
        `${facts.path} is an image file: only block devices have block events`,
        {
          hint: 'Use --source scan, or watch the loop device it is attached to.',
        },
      );
    }
    return scan(`${facts.path} is an image file, which has no block events: ${SCAN_COST}`, false);
  }
  const obstacle = await traceObstacle(host, 'uid' in options ? options.uid : process.geteuid?.());
  if (obstacle === undefined) {
    try {
      return {
        source: await TraceSource.open(facts, { clock, host }),
        why: `${facts.path} is watched by the kernel's block events`,
        isFallback: false,
      };
    } catch (error) {
      if (choice === 'trace' || !(error instanceof B2Error) || error.kind !== 'unsupported')
        throw error;
      return scan(`${error.message}; so ${SCAN_COST}`, true);
    }
  }
  if (choice === 'trace') {
    throw new B2Error(
      'unsupported',
      `cannot watch ${facts.path} by block events: ${obstacle.message}`,
      {
        hint:
          obstacle.reason === 'privilege'
            ? 'Run b2 as root, outside containers that withhold tracing.'
            : 'Use --source scan, which needs neither root nor kernel support but reads the whole device to find changes.',
      },
    );
  }
  return scan(
    `${facts.path} cannot be watched by block events (${obstacle.message}); so ${SCAN_COST}`,
    true,
  );
}
