/** Restore: an image to a device or file, from the checks of the target to the growing of what was restored. */
import { constants } from 'node:fs';
import { unlink } from 'node:fs/promises';

import type { Clock } from '../clock.js';
import type { GrowReport } from '../devices/grow.js';
import { openReadDevice } from '../devices/open.js';
import { closeFd, openFd } from '../devices/raw-io.js';
import { readPartitionTable } from '../devices/table.js';
import { B2Error, errnoOf, messageOf } from '../errors.js';
import type { EventSink } from '../events.js';
import { formatBytes } from '../human.js';
import type { Image } from '../image.js';
import { rereadPartitions } from '../syscalls.js';
import type { VmFormat } from './convert.js';
import {
  examineTarget,
  openTarget,
  refuseTarget,
  type OpenTarget,
  type TargetFacts,
} from './target.js';
import {
  planImage,
  writeImage,
  type ImageSource,
  type WriteImageOptions,
  type WriteImageResult,
  type WritePlan,
} from './write-image.js';

export type RestoreFormat = 'raw' | VmFormat;

/** What is restored. */
export interface RestoreSource extends ImageSource {
  /** The repository's directory, where it is a local one. */
  readonly repositoryPath: string | undefined;
  /** Opens the same image for random reads; the caller closes it. Used for VM formats. */
  image(): Promise<Image>;
}

export interface RestoreOptions {
  readonly target: string;
  readonly format: RestoreFormat;
  /** Overwrite what is on the target. Never overrides that it is in use or too small. */
  readonly force: boolean;
  /** Make use of a larger target: backup GPT to its end, last partition and its file system grown. */
  readonly grow: boolean;
  readonly verify: boolean;
  /** Write everything, also what is on the target already. */
  readonly full: boolean;
  /** Write zeros for data that is damaged, instead of stopping. */
  readonly skipDamaged: boolean;
  readonly clock: Pick<Clock, 'monotonicNs'>;
  readonly events: EventSink;
  readonly signal?: AbortSignal | undefined;
  /** Threads; default 2. */
  readonly workers?: number | undefined;
}

export interface RestoreResult {
  readonly target: string;
  readonly targetKind: 'block' | 'file';
  readonly format: RestoreFormat;
  readonly sizeBytes: number;
  /** Size of the device or file afterwards, as a guest would see it. */
  readonly targetBytes: number;
  readonly elapsedSeconds: number;
  readonly verified: boolean;
  /** Absent for VM formats, which qemu-img writes. */
  readonly written?: WriteImageResult;
  /** Bytes that a VM image takes on its file system. */
  readonly allocatedBytes?: number;
  readonly grown?: GrowReport;
  /** False if damaged data was replaced by zeros: `written.damagedRanges`. */
  readonly isWhole: boolean;
}

/** What a restore would do, and what stands against it. */
export interface RestorePlan extends WritePlan {
  readonly target: string;
  readonly targetKind: 'block' | 'file' | 'none';
  readonly targetBytes: number | undefined;
  readonly format: RestoreFormat;
  /** Why it would be refused in any case. */
  readonly obstacles: readonly string[];
  /** What it would destroy; not empty: needs `--force`. */
  readonly contents: readonly string[];
}

/** Restores `source` to `options.target`; see {@link RestoreOptions}. Kinds: `refused`, and those of {@link writeImage}. */
export async function restore(
  source: RestoreSource,
  options: RestoreOptions,
): Promise<RestoreResult> {
  const { target, format, events } = options;
  const startNs = options.clock.monotonicNs();
  const elapsed = (): number => Number(options.clock.monotonicNs() - startNs) / 1e9;
  const facts = await examine(source, options);
  refuseTarget(facts, options.force);
  if (format !== 'raw') {
    // The NBD server behind it is only loaded for who needs it.
    const { convertImage, requireQemuImg } = await import('./convert.js');
    await requireQemuImg();
    const image = await source.image();
    try {
      const made = await convertImage(image, { ...options, format });
      return {
        target,
        targetKind: 'file',
        format,
        sizeBytes: source.sizeBytes,
        targetBytes: source.sizeBytes,
        elapsedSeconds: elapsed(),
        verified: made.verified,
        allocatedBytes: made.allocatedBytes,
        isWhole: true,
      };
    } finally {
      await image.close();
    }
  }
  const written = await writeRaw(source, facts, options);
  if (facts.kind === 'block') await showPartitions(target, events);
  const targetBytes =
    facts.kind === 'block' ? (facts.sizeBytes ?? source.sizeBytes) : source.sizeBytes;
  let grown: GrowReport | undefined;
  if (targetBytes > source.sizeBytes) {
    if (options.grow) {
      const { growTarget } = await import('../devices/grow.js');
      grown = await growTarget(target);
    } else {
      await hintAtGrowing(target, targetBytes - source.sizeBytes, events);
    }
  }
  return {
    target,
    targetKind: facts.kind === 'block' ? 'block' : 'file',
    format,
    sizeBytes: source.sizeBytes,
    targetBytes,
    elapsedSeconds: elapsed(),
    verified: written.verified,
    written,
    ...(grown === undefined ? {} : { grown }),
    isWhole: written.damagedRanges.length === 0,
  };
}

/** What {@link restore} would do with these options. Changes nothing; a target in use is read nevertheless. */
export async function planRestore(
  source: RestoreSource,
  options: RestoreOptions,
): Promise<RestorePlan> {
  const { target, format } = options;
  const facts = await examine(source, options);
  const isBlank = facts.kind === 'none' || facts.sizeBytes === 0 || format !== 'raw';
  const reader = isBlank ? undefined : await openReadDevice(target);
  try {
    const device = reader ?? blankDevice(target, source.sizeBytes);
    const plan = await planImage(source, device, writeOptions(options, isBlank, undefined));
    return {
      ...plan,
      target,
      targetKind: facts.kind,
      targetBytes: facts.sizeBytes,
      format,
      obstacles: facts.obstacles,
      contents: facts.contents,
    };
  } finally {
    await reader?.close();
  }
}

async function examine(
  source: RestoreSource,
  { target, format }: RestoreOptions,
): Promise<TargetFacts> {
  const facts = await examineTarget({
    target,
    // A VM image is a file that is as large as it needs to be.
    sizeBytes: source.sizeBytes,
    repositoryPath: source.repositoryPath,
  });
  if (format !== 'raw' && facts.kind === 'block') {
    throw new B2Error('usage', `${target} is a block device; a ${format} image is a file`, {
      hint: 'Leave out --format to restore to the device itself.',
    });
  }
  return facts;
}

function writeOptions(
  options: RestoreOptions,
  isBlank: boolean,
  dataRanges: WriteImageOptions['dataRanges'],
): WriteImageOptions {
  return {
    compare: options.full ? 'never' : 'auto',
    isBlank,
    verify: options.verify,
    onDamage: options.skipDamaged ? 'skip' : 'stop',
    clock: options.clock,
    events: options.events,
    signal: options.signal,
    workers: options.workers,
    dataRanges,
  };
}

/** Stands for a file that does not exist yet. */
function blankDevice(target: string, sizeBytes: number): Parameters<typeof planImage>[1] {
  return {
    facts: {
      path: target,
      realPath: target,
      kind: 'file',
      sizeBytes,
      logicalBlockBytes: 512,
      physicalBlockBytes: 4096,
      readOnly: false,
      devNumber: undefined,
      partitionOf: undefined,
      identity: {},
      diskSequence: undefined,
    },
    read: (into) => {
      into.fill(0);
      return Promise.resolve(into.byteLength);
    },
  };
}

async function writeRaw(
  source: RestoreSource,
  facts: TargetFacts,
  options: RestoreOptions,
): Promise<WriteImageResult> {
  const { target } = options;
  const open = await openTarget(facts, source.sizeBytes);
  let touched = false;
  const { device, reader } = open;
  const watched = {
    facts: device.facts,
    read: device.read.bind(device),
    write: (data: Uint8Array, offset: number) => {
      touched = true;
      return device.write(data, offset);
    },
    zero: (offset: number, length: number) => {
      touched = true;
      return device.zero(offset, length);
    },
    sync: device.sync.bind(device),
  };
  try {
    const ranges = reader === undefined ? undefined : reader.dataRanges.bind(reader);
    return await writeImage(source, watched, writeOptions(options, open.isBlank, ranges));
  } catch (error) {
    throw await afterFailure(error, target, facts, touched, open);
  } finally {
    await open.close();
  }
}

/** The error, with what has become of the target. */
async function afterFailure(
  error: unknown,
  target: string,
  facts: TargetFacts,
  touched: boolean,
  open: OpenTarget,
): Promise<unknown> {
  if (!touched && facts.kind === 'none') {
    // A file of zeros must not be taken for an image.
    await open.close();
    await unlink(target).catch(() => undefined);
  }
  if (!(error instanceof B2Error) || !touched) return error;
  const goOn = error.kind === 'interrupted' || error.kind === 'no-space';
  const hint = goOn ? 'The same command with --force goes on from what is there.' : error.hint;
  return new B2Error(error.kind, `${error.message}; ${target} is incomplete now`, {
    cause: error,
    code: error.code,
    retryable: error.retryable,
    ...(hint === undefined ? {} : { hint }),
  });
}

/**
 * The kernel still knows the partitions that were on a whole disk before. Failing to tell it costs no data: said, not thrown.
 */
async function showPartitions(target: string, events: EventSink): Promise<void> {
  const device = await openReadDevice(target);
  const { partitionOf } = device.facts;
  const hasTable = (await readPartitionTable(device)) !== undefined;
  await device.close();
  if (partitionOf !== undefined || !hasTable) return;
  const fd = await openFd(target, constants.O_RDONLY);
  try {
    await rereadPartitions(fd);
  } catch (error) {
    // EINVAL: a device that is not divided by the kernel (a loop device without partitions).
    if (errnoOf(error) === 'EINVAL') return;
    events({
      type: 'warning',
      message: `the kernel did not read the new partition table of ${target}: ${messageOf(error)}`,
      hint: `Run "partprobe ${target}" or start the machine anew before using its partitions.`,
    });
  } finally {
    await closeFd(fd);
  }
}

async function hintAtGrowing(target: string, moreBytes: number, events: EventSink): Promise<void> {
  let isGpt = false;
  const device = await openReadDevice(target);
  try {
    isGpt = (await readPartitionTable(device))?.primaryGpt !== undefined;
  } finally {
    await device.close();
  }
  events({
    type: 'note',
    message: `${target} is ${formatBytes(moreBytes)} larger than the image${
      isGpt ? '; the backup of its partition table (GPT) is not at its end' : ''
    }. --grow makes use of the rest.`,
  });
}
