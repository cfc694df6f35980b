/**
 * Whether a device was written between two moments: the write counters of the block layer
 * (Documentation/ABI/stable/sysfs-block, `stat`), or the times of an image file.
 */
import { readFile, stat } from 'node:fs/promises';
import path from 'node:path';
import { ioError } from '../errors.js';
import type { DeviceFacts } from './device.js';
import { SYSTEM_ROOTS, blockNameOfPath, type SystemRoots } from './sysfs.js';

/** What a device showed at one moment. Compare two with {@link unchangedSince}. */
export interface DeviceStamp {
  /** Everything that a write changes, as one text. Undefined: the kernel does not count writes on this device. */
  readonly counters: string | undefined;
  /** Writes that had been issued and not completed. */
  readonly writesInFlight: number;
}

async function attribute(file: string): Promise<string | undefined> {
  try {
    return (await readFile(file, 'utf8')).trim();
  } catch {
    return undefined; // not every kernel and driver has every attribute
  }
}

/**
 * Takes a stamp. For a partition the counters of the whole disk count, because writes through the disk's node do not show in
 * those of the partition.
 */
export async function deviceStamp(
  facts: DeviceFacts,
  roots: SystemRoots = SYSTEM_ROOTS,
): Promise<DeviceStamp> {
  if (facts.kind === 'file') {
    try {
      const s = await stat(facts.realPath, { bigint: true });
      return {
        counters: `file ${s.dev} ${s.ino} ${s.size} ${s.mtimeNs} ${s.ctimeNs}`,
        writesInFlight: 0,
      };
    } catch (error) {
      throw ioError('look at', facts.path, error);
    }
  }
  const disk = facts.partitionOf?.diskPath ?? facts.realPath;
  const name = await blockNameOfPath(disk, roots);
  if (name === undefined) return { counters: undefined, writesInFlight: 0 };
  const dir = path.join(roots.sys, 'class/block', name);
  const [bootId, iostats, line, inflight, sequence] = await Promise.all([
    attribute(path.join(roots.proc, 'sys/kernel/random/boot_id')),
    attribute(path.join(dir, 'queue/iostats')),
    attribute(path.join(dir, 'stat')),
    attribute(path.join(dir, 'inflight')),
    attribute(path.join(dir, 'diskseq')),
  ]);
  const f = line?.split(/\s+/) ?? [];
  // Fields from 0: 6 sectors written, 13 sectors discarded. The numbers of requests (4 and 11) do not count: a flush, which
  // b2 itself issues when it opens a partition, is a request without sectors.
  if (iostats === '0' || f.length < 11 || bootId === undefined)
    return { counters: undefined, writesInFlight: 0 };
  const flights = Number(inflight?.split(/\s+/)[1] ?? '0');
  return {
    counters: ['disk', bootId, sequence ?? '', facts.sizeBytes, f[6], f[13] ?? ''].join(' '),
    writesInFlight: Number.isFinite(flights) ? flights : 1,
  };
}

/** True only if it is certain that nothing was written between the two stamps. */
export function unchangedSince(before: DeviceStamp, after: DeviceStamp): boolean {
  return (
    before.counters !== undefined &&
    before.counters === after.counters &&
    before.writesInFlight === 0 &&
    after.writesInFlight === 0
  );
}
