/**
 * `--grow`: makes use of a target that is larger than what was restored to it. Moves a GPT's backup to the new end,
 * lets the last partition reach there, and grows the file system in it with its own tools.
 *
 * Whatever cannot be done is said, never half done: each step leaves a device that works.
 */
import { constants } from 'node:fs';
import { mkdtemp, readdir, rmdir } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import path from 'node:path';

import { B2Error, ioError, messageOf } from '../errors.js';
import { BLOCK_BYTES } from '../units.js';
import { rereadPartitions } from '../syscalls.js';
import type { WriteDevice } from './device.js';
import { growMbrLast, moveGpt, type GptMove, type GrownPartition } from './gpt.js';
import { describeSignature } from './inspect.js';
import { openReadDevice, openWriteDevice } from './open.js';
import { closeFd, openFd, syncFd } from './raw-io.js';
import { lastWords, runTool, type RunTool } from './run.js';
import { findSignatures, type Area, type Signature } from './signatures.js';
import { SYSTEM_ROOTS, type SystemRoots } from './sysfs.js';
import { applyTableChange, readPartitionTable, type PartitionTable } from './table.js';

/** Checking or growing a file system of many TiB takes its time. */
const TOOL_TIMEOUT_MS = 6 * 60 * 60 * 1000;
const SHORT_TIMEOUT_MS = 60_000;
/** A file system that ends this close to the end of its place has no use for the rest: less than any of them allocates. */
const NEGLIGIBLE_BYTES = 1024 * 1024;

/** What growing did and did not do, in sentences for a person. JSON-able. */
export interface GrowReport {
  readonly done: readonly string[];
  readonly notDone: readonly string[];
}

export interface GrowOptions {
  readonly run?: RunTool;
  readonly roots?: SystemRoots;
}

interface Context {
  readonly target: string;
  readonly run: RunTool;
  readonly roots: SystemRoots;
  readonly done: string[];
  readonly notDone: string[];
}

/**
 * Grows what is on `target` (a block device or image file that nobody uses and no {@link WriteDevice} is open on).
 * Rejects only if the target cannot be read or written; everything else is in the report.
 */
export async function growTarget(target: string, options: GrowOptions = {}): Promise<GrowReport> {
  const context: Context = {
    target,
    run: options.run ?? runTool,
    roots: options.roots ?? SYSTEM_ROOTS,
    done: [],
    notDone: [],
  };
  const area = await growTable(context);
  if (area !== undefined) await growContents(context, area);
  await syncTarget(target);
  return { done: context.done, notDone: context.notDone };
}

/**
 * Moves the backup GPT to the end of `device` and nothing else: what a restore to a larger disk needs so that the
 * table is sound. Resolves to true if there was something to move, false if there is no GPT or it is in place.
 */
export async function settleGpt(device: WriteDevice): Promise<boolean> {
  const table = await readPartitionTable(device);
  if (table?.primaryGpt === undefined) return false;
  const change = moveGpt(table.primaryGpt, table.sector0, device.facts.sizeBytes, {
    growLast: false,
  });
  await applyTableChange(device, change);
  return change.steps.length > 0;
}

/** Grows table and last partition; resolves to the place whose contents may grow, or undefined if there is none. */
async function growTable(context: Context): Promise<Area | undefined> {
  const device = await openWriteDevice(context.target, 'existing', context.roots);
  let change: GptMove | undefined;
  let table: PartitionTable | undefined;
  try {
    table = await readPartitionTable(device);
    if (table === undefined) return { offsetBytes: 0, sizeBytes: device.facts.sizeBytes };
    change = planTable(context, table, device);
    if (change !== undefined) await applyTableChange(device, change);
  } finally {
    await device.close();
  }
  if (change === undefined) return undefined;
  if (table.facts.type === 'gpt' && change.steps.length > 0)
    context.done.push('moved the backup partition table to the end of the disk');
  if (change.steps.length > 0) await tellKernel(context);
  const { grown } = change;
  if (grown !== undefined) {
    context.done.push(
      `grew partition ${grown.number} from ${inMiB(grown.oldBytes)} to ${inMiB(grown.newBytes)}`,
    );
  }
  return placeOfLast(table, grown);
}

function planTable(
  context: Context,
  table: PartitionTable,
  device: WriteDevice,
): GptMove | undefined {
  const { sizeBytes } = device.facts;
  try {
    if (table.facts.type === 'mbr')
      return growMbrLast(table.sector0, table.facts.sectorBytes, sizeBytes);
    if (table.primaryGpt === undefined) {
      context.notDone.push(
        `the partition table was left as it is: ${table.facts.problems.join('; ')}`,
      );
      return undefined;
    }
    if (
      device.facts.kind === 'block' &&
      table.facts.sectorBytes !== device.facts.logicalBlockBytes
    ) {
      context.notDone.push(
        `the partition table was left as it is: ${table.facts.problems.join('; ')}`,
      );
      return undefined;
    }
    return moveGpt(table.primaryGpt, table.sector0, sizeBytes, { growLast: true });
  } catch (error) {
    if (!(error instanceof B2Error)) throw error;
    context.notDone.push(
      `the partition table was left as it is: ${error.message}${error.hint === undefined ? '' : `. ${error.hint}`}`,
    );
    return undefined;
  }
}

function placeOfLast(table: PartitionTable, grown: GrownPartition | undefined): Area | undefined {
  if (grown !== undefined) return { offsetBytes: grown.offsetBytes, sizeBytes: grown.newBytes };
  const candidates = table.facts.partitions.filter((p) => p.kind !== 'extended');
  const last = candidates.toSorted((a, b) => a.offsetBytes - b.offsetBytes).at(-1);
  return last === undefined
    ? undefined
    : { offsetBytes: last.offsetBytes, sizeBytes: last.sizeBytes };
}

/** The tools wrote through the page cache of the target. */
async function syncTarget(target: string): Promise<void> {
  try {
    const fd = await openFd(target, constants.O_RDONLY);
    try {
      await syncFd(fd);
    } finally {
      await closeFd(fd);
    }
  } catch (error) {
    throw ioError('sync', target, error);
  }
}

/** Has the kernel look at the new table. Loop devices and files have no partitions to look at. */
async function tellKernel(context: Context): Promise<void> {
  const device = await openReadDevice(context.target, context.roots);
  const { kind, realPath } = device.facts;
  await device.close();
  if (kind === 'file') return;
  const fd = await openFd(realPath, constants.O_RDONLY);
  try {
    await rereadPartitions(fd);
  } catch (error) {
    // EINVAL: partitions are off for this device, so there is nothing that could be out of date.
    if (!messageOf(error).startsWith('EINVAL')) {
      context.notDone.push(
        `the kernel has not read the new partition table (${messageOf(error)}): run "partprobe ${context.target}" or reboot`,
      );
    }
  } finally {
    await closeFd(fd);
  }
}

async function growContents(context: Context, area: Area): Promise<void> {
  const device = await openReadDevice(context.target, context.roots);
  let found: readonly Signature[];
  try {
    found = await findSignatures(device, area);
  } finally {
    await device.close();
  }
  const [signature, second] = found;
  if (signature === undefined) return;
  if (second !== undefined) {
    context.notDone.push(
      `nothing was grown inside: there is ${describeSignature(signature)} and also ${describeSignature(second)}`,
    );
    return;
  }
  const free = signature.sizeBytes === undefined ? undefined : area.sizeBytes - signature.sizeBytes;
  if (free !== undefined && free < NEGLIGIBLE_BYTES) return;
  const what = describeSignature(signature);
  try {
    switch (signature.type) {
      case 'ext2':
      case 'ext3':
      case 'ext4':
        await growExt(context, area);
        break;
      case 'xfs':
        await growMounted(context, area, 'xfs', 'nouuid', 'xfs_growfs "$2"');
        break;
      case 'btrfs':
        await growBtrfs(context, area, signature);
        break;
      default:
        context.notDone.push(`${what} was left at its size: ${adviceFor(signature)}`);
        return;
    }
    context.done.push(`grew ${what} to ${inMiB(area.sizeBytes)}`);
  } catch (error) {
    if (!(error instanceof B2Error)) throw error;
    context.notDone.push(
      `${what} was left at its size: ${error.message}${error.hint === undefined ? '' : `. ${error.hint}`}`,
    );
  }
}

function adviceFor(signature: Signature): string {
  switch (signature.type) {
    case 'LVM2_member':
      return 'run pvresize on it, then lvextend --resizefs';
    case 'crypto_LUKS':
      return 'open it (cryptsetup resize makes it use the whole partition), then grow what is inside';
    case 'ntfs':
      return 'run ntfsresize on it, or let Windows extend the volume';
    case 'swap':
      return 'run mkswap on it with its label and UUID to use the space';
    case 'linux_raid_member':
      return 'run mdadm --grow --size=max on the assembled array';
    default:
      return `b2 cannot grow ${signature.type}`;
  }
}

/** Runs a tool that must succeed; `good` are the statuses that count as success. */
async function must(
  context: Context,
  tool: string,
  args: readonly string[],
  good: readonly number[] = [0],
): Promise<string> {
  const result = await context.run(tool, args, TOOL_TIMEOUT_MS);
  if (result === undefined)
    throw new B2Error('unsupported', `${tool} is not installed`, {
      hint: `Install the package that has ${tool}.`,
    });
  if (!good.includes(result.status)) throw new B2Error('failed', `${tool}: ${lastWords(result)}`);
  return result.stdout;
}

/**
 * Runs `use` with a loop device over `area` of the target. The loop device goes away with this process's last
 * descriptor on it, also if the process is killed.
 */
async function withLoop<T>(
  context: Context,
  area: Area,
  use: (loop: string) => Promise<T>,
): Promise<T> {
  const place = ['--offset', String(area.offsetBytes), '--sizelimit', String(area.sizeBytes)];
  const loop = (
    await must(context, 'losetup', ['--find', '--show', ...place, '--', context.target])
  ).trim();
  const fd = await openFd(loop, constants.O_RDONLY).catch(async (error: unknown) => {
    await context.run('losetup', ['--detach', loop], SHORT_TIMEOUT_MS);
    throw new B2Error('failed', `cannot open ${loop}: ${messageOf(error)}`, { cause: error });
  });
  try {
    // With a descriptor open the kernel only notes the wish, and detaches when the last one is closed.
    await must(context, 'losetup', ['--detach', loop]);
    return await use(loop);
  } finally {
    await closeFd(fd);
  }
}

async function growExt(context: Context, area: Area): Promise<void> {
  await withLoop(context, area, async (loop) => {
    // 1: errors corrected (the journal of a file system that was in use is replayed); 2: the same, for a root device.
    try {
      await must(context, 'e2fsck', ['-f', '-p', loop], [0, 1, 2, 3]);
    } catch (error) {
      throw new B2Error(
        'failed',
        `its check failed, so it was not touched further (${messageOf(error)})`,
        {
          cause: error,
          hint: 'Run e2fsck -f by hand, then resize2fs.',
        },
      );
    }
    await must(context, 'resize2fs', [loop]);
  });
}

/** Grows one that only grows mounted: in a mount name space of its own, so that nobody sees it and it cannot stay. */
async function growMounted(
  context: Context,
  area: Area,
  type: string,
  mountOptions: string,
  command: string,
  afterwards = 'true',
): Promise<void> {
  await withLoop(context, area, async (loop) => {
    const directory = await mkdtemp(path.join(tmpdir(), 'b2-grow-'));
    try {
      const script = `mount -t ${type} -o ${mountOptions} "$1" "$2" || exit; ${command}; status=$?; umount "$2" || exit; ${afterwards}; exit $status`;
      await must(context, 'unshare', [
        '--mount',
        '--propagation',
        'slave', // what this machine unmounts meanwhile is not held here
        '--',
        'sh',
        '-c',
        script,
        'sh',
        loop,
        directory,
      ]);
    } finally {
      await rmdir(directory);
    }
  });
}

async function growBtrfs(context: Context, area: Area, signature: Signature): Promise<void> {
  if ((signature.devices ?? 1) !== 1) {
    throw new B2Error('unsupported', `it spans ${signature.devices} devices`, {
      hint: 'Mount it with all of them and run btrfs filesystem resize DEVID:max.',
    });
  }
  // btrfs tells devices apart by UUID only: with the original mounted, a mount of the copy reaches the original.
  const online = await readdir(path.join(context.roots.sys, 'fs/btrfs')).catch((): string[] => []);
  if (signature.uuid === undefined || online.includes(signature.uuid)) {
    throw new B2Error(
      'refused',
      'a btrfs file system with the same UUID is mounted on this machine',
      {
        hint: 'Unmount the original, or give the copy a UUID of its own (btrfstune -u), then run btrfs filesystem resize max.',
      },
    );
  }
  // The last word before it is changed: the file system that was mounted is the one on our loop device.
  const mine = `test -e /sys/fs/btrfs/${signature.uuid}/devices/"$(basename "$1")"`;
  const resize = `${mine} && btrfs filesystem resize max "$2"`;
  // The kernel remembers devices it has seen; a remembered copy would be in the way of the original.
  await growMounted(context, area, 'btrfs', 'noatime', resize, 'btrfs device scan --forget "$1"');
}

function inMiB(bytes: number): string {
  return `${Math.floor(bytes / (256 * BLOCK_BYTES))} MiB`;
}
