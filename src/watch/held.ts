/**
 * Two processes must not watch one device to the same repository: each claim of the volume ends the other's. The control sockets
 * tell who watches what; a watch that does not answer holds nothing, so that a hung one can be replaced.
 */
import { realpath } from 'node:fs/promises';
import { B2Error } from '../errors.js';
import type { DeviceReport, WatchReport } from './report.js';

/** What is about to be captured, and by whom. */
export interface Wanted {
  readonly repositoryId: string;
  readonly volumeId: string;
  readonly volume: string;
  /** Of the device, links resolved. */
  readonly realPath: string;
  /** The asking watch, as it reports itself. */
  readonly self: Pick<WatchReport, 'pid' | 'since'>;
}

/**
 * Kind `held` if another of `watches` captures that volume or device to the same repository. Of two that start at the same time
 * the older goes on.
 */
export async function refuseHeld(watches: readonly WatchReport[], wanted: Wanted): Promise<void> {
  const { self, volume, realPath } = wanted;
  for (const watch of watches) {
    if (watch.pid === self.pid || watch.repositoryId !== wanted.repositoryId) continue;
    for (const device of watch.devices) {
      if (device.state === 'stopped' || device.state === 'failed') continue;
      const isSame =
        device.volumeId === wanted.volumeId ||
        device.device === realPath ||
        (await realpath(device.device).catch(() => undefined)) === realPath;
      if (!isSame || (isUnclaimed(device) && isOlder(self, watch))) continue;
      throw new B2Error(
        'held',
        `${realPath} (volume ${volume}) is watched already, by process ${watch.pid} since ${watch.since}${watch.stopping ? ', which is being stopped' : ''}`,
        {
          hint: watch.stopping
            ? 'Start this one when that one has ended.'
            : `"b2 status" shows it. Stop it first (kill ${watch.pid}, or systemctl stop of its unit); "b2 snapshot ${volume}" asks it for a point.`,
        },
      );
    }
  }
}

/** It may find out about us as we do about it. */
function isUnclaimed(device: DeviceReport): boolean {
  return device.state === 'starting' || device.state === 'absent';
}

function isOlder(a: Wanted['self'], b: Wanted['self']): boolean {
  return a.since < b.since || (a.since === b.since && a.pid < b.pid);
}
