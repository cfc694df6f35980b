/**
 * The record of a clean stop: what lets the next session of a device begin without reading all of it again.
 *
 * It says that commit `seq` of a volume was exactly the device at a moment, and what the kernel's write counters showed then. It is
 * believed only if nothing at all contradicts: the same repository, volume and newest commit, the same device in the same attachment and
 * boot, and counters that prove that nothing was written since; not where the kernel does not count, nor before Linux 5.15 (without
 * `diskseq` a disk that was away looks like one that was idle). A session deletes the record before it captures anything, so that a
 * crash leaves none.
 *
 * What the proof cannot see is what no change source sees either: SCSI and NVMe pass-through, DAX, other hosts on shared storage.
 */
import { mkdir, readFile, readdir, rm, stat } from 'node:fs/promises';
import { createHash } from 'node:crypto';
import { homedir } from 'node:os';
import path from 'node:path';
import type { DeviceFacts } from '../devices/device.js';
import { deviceStamp, type DeviceStamp } from '../devices/stamp.js';
import { SYSTEM_ROOTS, blockNameOfPath, type SystemRoots } from '../devices/sysfs.js';
import { B2Error, errnoOf, ioError } from '../errors.js';
import { fsyncDirectory, writeFileDurable } from '../fs.js';

const FORMAT = 'b2 clean stop 1';

export interface CleanStop {
  readonly repositoryId: string;
  readonly volumeId: string;
  /** The volume's newest commit. */
  readonly seq: number;
  /** Of that commit, hex. */
  readonly hash: string;
  readonly sizeBytes: number;
  /** As {@link DeviceFacts.identity}. */
  readonly identity: Readonly<Record<string, string>>;
  /** {@link fullStamp} when the device was as that commit. */
  readonly counters: string;
}

/** Where the records lie: `/var/lib/b2/watch` of root, `$XDG_STATE_HOME/b2/watch` of others. */
export function defaultStateDir(
  env: Readonly<Record<string, string | undefined>>,
  uid: number | undefined,
): string {
  if (uid === 0 && env['XDG_STATE_HOME'] === undefined) return '/var/lib/b2/watch';
  return path.join(
    env['XDG_STATE_HOME'] ?? path.join(env['HOME'] ?? homedir(), '.local/state'),
    'b2/watch',
  );
}

/** One file for each volume of each repository. */
export function cleanStopFile(dir: string, repositoryId: string, volumeId: string): string {
  return path.join(dir, `${repositoryId}-${volumeId}.json`);
}

/** Saves the record durably, mode 0600; makes the directory (0700) if it is missing. B2Error. */
export async function writeCleanStop(dir: string, record: CleanStop): Promise<void> {
  try {
    await mkdir(dir, { recursive: true, mode: 0o700 });
  } catch (error) {
    throw ioError('make the directory', dir, error);
  }
  const body = JSON.stringify(record);
  const text = JSON.stringify({ format: FORMAT, check: digest(body), record });
  await writeFileDurable(
    cleanStopFile(dir, record.repositoryId, record.volumeId),
    Buffer.from(`${text}\n`),
  );
}

/** The record, or undefined where there is none that can be used. */
export async function readCleanStop(
  dir: string,
  repositoryId: string,
  volumeId: string,
): Promise<CleanStop | undefined> {
  try {
    const text = await readFile(cleanStopFile(dir, repositoryId, volumeId), 'utf8');
    const file = JSON.parse(text) as unknown;
    if (!isRecord(file) || file['format'] !== FORMAT) return undefined;
    const { record } = file;
    if (!isCleanStop(record) || file['check'] !== digest(JSON.stringify(record))) return undefined;
    if (record.repositoryId !== repositoryId || record.volumeId !== volumeId) return undefined;
    return record;
  } catch {
    // Missing, or not readable: then everything is read.
    return undefined;
  }
}

/** Removes the record, durably. B2Error where that fails: a record that stays could be believed later. */
export async function removeCleanStop(
  dir: string,
  repositoryId: string,
  volumeId: string,
): Promise<void> {
  const file = cleanStopFile(dir, repositoryId, volumeId);
  try {
    await rm(file);
  } catch (error) {
    if (errnoOf(error) === 'ENOENT' || errnoOf(error) === 'ENOTDIR') return;
    throw new B2Error('io', ioError('remove', file, error).message, {
      cause: error,
      hint: 'Nothing is captured as long as this record of an earlier stop could be taken for a new one. Remove it by hand.',
    });
  }
  try {
    await fsyncDirectory(dir);
  } catch (error) {
    throw ioError('sync', dir, error);
  }
}

function digest(text: string): string {
  return createHash('sha256').update(text).digest('hex');
}

function isRecord(v: unknown): v is Record<string, unknown> {
  return typeof v === 'object' && v !== null && !Array.isArray(v);
}

function isCleanStop(v: unknown): v is CleanStop {
  return (
    isRecord(v) &&
    typeof v['repositoryId'] === 'string' &&
    typeof v['volumeId'] === 'string' &&
    Number.isSafeInteger(v['seq']) &&
    typeof v['hash'] === 'string' &&
    Number.isSafeInteger(v['sizeBytes']) &&
    isRecord(v['identity']) &&
    Object.values(v['identity']).every((x) => typeof x === 'string') &&
    typeof v['counters'] === 'string'
  );
}

/** Why the record does not prove that commit `tip` is what the device holds; undefined if it does. `now`: after the source was opened. */
export function whyNotInSync(
  record: CleanStop,
  tip: { readonly seq: number; readonly hash: string | undefined },
  facts: DeviceFacts,
  now: DeviceStamp,
): string | undefined {
  if (record.seq !== tip.seq || record.hash !== tip.hash)
    return 'the volume has changed in the repository since b2 stopped';
  if (record.sizeBytes !== facts.sizeBytes) return 'the device has another size now';
  const keys = new Set([...Object.keys(record.identity), ...Object.keys(facts.identity)]);
  for (const key of keys)
    if (record.identity[key] !== facts.identity[key])
      return `the device shows another identity (${key})`;
  if (now.counters === undefined) return 'the kernel does not count the writes to it';
  if (now.writesInFlight > 0) return 'it is being written';
  if (record.counters !== now.counters) {
    const boot = /^disk (\S+)/;
    const [was, is] = [boot.exec(record.counters)?.[1], boot.exec(now.counters)?.[1]];
    return was !== undefined && is !== undefined && was !== is
      ? 'the machine was started anew since b2 stopped'
      : 'it was written, or attached anew, since b2 stopped';
  }
  return undefined;
}

/**
 * The stamp of a device together with those of everything it lies on (the file behind a loop device, the disks below a mapping or an
 * array): writes that go around the device count too, those of its neighbours on the same disks as well. Undefined counters where one of
 * them is not counted, or an attachment cannot be told from another.
 */
export async function fullStamp(
  facts: DeviceFacts,
  roots: SystemRoots = SYSTEM_ROOTS,
): Promise<DeviceStamp> {
  const own = await deviceStamp(facts, roots);
  if (facts.kind === 'file' || own.counters === undefined) return own;
  if (facts.devNumber === undefined || facts.diskSequence === undefined)
    return { ...own, counters: undefined };
  const parts = [own.counters];
  let { writesInFlight } = own;
  const seen = new Set<string>();
  const below = async (dir: string): Promise<boolean> => {
    if (seen.has(dir)) return true;
    seen.add(dir);
    const backing = await attribute(path.join(dir, 'loop/backing_file'));
    if (backing !== undefined) {
      const file = await stat(backing, { bigint: true }).catch(() => undefined);
      // Deleted, out of sight, or a device.
      if (file === undefined || !file.isFile()) return false;
      parts.push(`file ${file.dev} ${file.ino} ${file.size} ${file.mtimeNs} ${file.ctimeNs}`);
    }
    const slaves = await readdir(path.join(dir, 'slaves')).catch((): string[] => []);
    for (const slave of slaves.toSorted()) {
      const stamp = await diskStamp(slave, roots);
      if (stamp === undefined) return false;
      parts.push(stamp.counters);
      writesInFlight += stamp.writesInFlight;
      if (!(await below(path.join(roots.sys, 'class/block', slave)))) return false;
    }
    return true;
  };
  const name = await blockNameOfPath(facts.partitionOf?.diskPath ?? facts.realPath, roots);
  const isKnown = name !== undefined && (await below(path.join(roots.sys, 'class/block', name)));
  return { counters: isKnown ? parts.join(' | ') : undefined, writesInFlight };
}

/** Counters of a disk or partition by its kernel name; undefined where it does not count. */
async function diskStamp(
  name: string,
  roots: SystemRoots,
): Promise<{ readonly counters: string; readonly writesInFlight: number } | undefined> {
  const dir = path.join(roots.sys, 'class/block', name);
  const isPartition = (await attribute(path.join(dir, 'partition'))) !== undefined;
  const disk = isPartition ? `${dir}/..` : dir;
  const [iostats, line, inflight, sequence] = await Promise.all([
    attribute(`${disk}/queue/iostats`),
    attribute(path.join(dir, 'stat')),
    attribute(path.join(dir, 'inflight')),
    attribute(`${disk}/diskseq`),
  ]);
  const f = line?.split(/\s+/) ?? [];
  if (iostats === '0' || f.length < 11 || sequence === undefined) return undefined;
  const flights = Number(inflight?.split(/\s+/)[1] ?? '0');
  return {
    counters: ['disk', name, sequence, f[6], f[13] ?? ''].join(' '),
    writesInFlight: Number.isFinite(flights) ? flights : 1,
  };
}

async function attribute(file: string): Promise<string | undefined> {
  try {
    return (await readFile(file, 'utf8')).trim();
  } catch {
    return undefined; // not every device has every attribute
  }
}
