/** Is a restored image what a power cut at an instant would have left? The file system and what is in it are looked at. */
import { spawnSync } from 'node:child_process';
import { readFileSync, writeFileSync } from 'node:fs';
import { findTool } from './requires.js';
import { attachLoop, mountDevice } from './loop.js';
import type { TempDir } from './tmp.js';
import { SQLITE_CHECK_PROGRAM, bounds, type Acknowledged } from './workload.js';

export type CheckedFileSystem = 'ext4' | 'xfs' | 'btrfs';
export const CHECK_TOOLS = ['e2fsck', 'xfs_repair', 'btrfs', 'python3', 'fsfreeze', 'cmp', 'sync'];

interface Said {
  readonly status: number;
  readonly text: string;
}

function say(name: string, args: readonly string[]): Said {
  const done = spawnSync(findTool(name) ?? name, [...args], {
    encoding: 'utf8',
    env: { ...process.env, LC_ALL: 'C' },
  });
  return { status: done.status ?? -1, text: `${done.stdout ?? ''}${done.stderr ?? ''}`.trim() };
}

function fsck(type: CheckedFileSystem, device: string): string | undefined {
  const [name, ...args] = {
    ext4: ['e2fsck', '-f', '-n'] as const,
    xfs: ['xfs_repair', '-n'] as const,
    btrfs: ['btrfs', 'check', '--readonly'] as const,
  }[type];
  const done = say(name, [...args, device]);
  return done.status === 0 ? undefined : `${name} (${done.status}): ${done.text.slice(-600)}`;
}

export interface CheckOrder {
  readonly type: CheckedFileSystem;
  /** An image of its own for this check: its journal is replayed. */
  readonly file: string;
  readonly instantNs: bigint;
  /** What the database's writer and the writer of records had acknowledged. */
  readonly sqlite?: readonly Acknowledged[];
  readonly records?: readonly Acknowledged[];
}

/**
 * Mounts the image, which replays its journal, looks at what is in it, unmounts it, and has it checked. Returns what is wrong with
 * it, nothing if nothing is. The original must be off (two devices of one btrfs would be taken for one).
 */
export async function faultsOf(dir: TempDir, order: CheckOrder): Promise<string[]> {
  const { type, file, instantNs } = order;
  const faults: string[] = [];
  const loop = await attachLoop(dir, file);
  try {
    if (type === 'btrfs') {
      const said = fsck(type, loop.device);
      if (said !== undefined) faults.push(`before replay: ${said}`);
    }
    let mount: Awaited<ReturnType<typeof mountDevice>>;
    try {
      mount = await mountDevice(dir, loop.device, 'checked', type === 'xfs' ? 'nouuid' : undefined);
    } catch (error) {
      return [...faults, `cannot be mounted: ${String(error)}`];
    }
    try {
      if (order.sqlite !== undefined)
        faults.push(...databaseFaults(dir, mount.path, order.sqlite, instantNs));
      if (order.records !== undefined)
        faults.push(...recordFaults(mount.path, bounds(order.records, instantNs)));
    } finally {
      await mount.unmount();
    }
    const said = fsck(type, loop.device);
    if (said !== undefined) faults.push(said);
    if (type === 'btrfs') say('btrfs', ['device', 'scan', '--forget', loop.device]);
  } finally {
    await loop.detach();
  }
  return faults;
}

function databaseFaults(
  dir: TempDir,
  mount: string,
  log: readonly Acknowledged[],
  instantNs: bigint,
): string[] {
  const script = dir.join('check-sqlite.py');
  writeFileSync(script, SQLITE_CHECK_PROGRAM);
  const { text } = say('python3', [script, mount]);
  const rows = /^rows (\d+)$/m.exec(text)?.[1];
  if (rows === undefined) return [`database: ${text}`];
  const { least, most } = bounds(log, instantNs);
  if (Number(rows) < least)
    return [`database: row ${rows} is the newest, ${least} was acknowledged`];
  if (Number(rows) > most) return [`database: row ${rows} is there, ${most} was the last begun`];
  return [];
}

/** The numbers of the records in a mounted file system: 1 to the one returned, without a gap, or what is wrong. */
export function newestRecord(mount: string): number | string {
  let text: string;
  try {
    text = readFileSync(`${mount}/records`, 'latin1');
  } catch (error) {
    if (error instanceof Error && 'code' in error && error.code === 'ENOENT') return 0;
    throw error;
  }
  let n = 0;
  // A record that was not acknowledged may be there in part, or its place alone.
  for (let at = 0; at + 64 <= text.length; at += 64) {
    const found = /^(\d+) (\d+) *\n$/.exec(text.slice(at, at + 64));
    if (found === null) {
      const rest = text.slice(at).replaceAll('\0', '').trim();
      return rest === '' ? n : `record ${n + 1} is ${JSON.stringify(text.slice(at, at + 64))}`;
    }
    if (Number(found[1]) !== n + 1) return `after record ${n} comes ${found[1]}`;
    n++;
  }
  return n;
}

export function recordFaults(
  mount: string,
  limits: { readonly least: number; readonly most: number },
): string[] {
  const newest = newestRecord(mount);
  if (typeof newest === 'string') return [`records: ${newest}`];
  if (newest < limits.least)
    return [`records: ${newest} is the newest, ${limits.least} was acknowledged`];
  if (newest > limits.most)
    return [`records: ${newest} is there, ${limits.most} was the last that had been written`];
  return [];
}
