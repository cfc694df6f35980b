/** The kernel's lists of mounted file systems and swap areas. */
import { readFile } from 'node:fs/promises';
import path from 'node:path';

import { ioError } from '../errors.js';
import { SYSTEM_ROOTS, type SystemRoots } from './sysfs.js';

/** One mount that this process sees. Those of other mount namespaces are not in the list. */
export interface Mount {
  /** `st_dev` of its files. Anonymous (`0:N`) for btrfs and other file systems without one device. */
  readonly devNumber: string;
  readonly mountPoint: string;
  readonly fsType: string;
  /** What was mounted: a device's path for most. */
  readonly source: string;
}

/** Undoes the octal escapes of spaces, tabs, newlines, backslashes (and `#`). */
function unescapeOctal(field: string): string {
  if (!field.includes('\\')) return field;
  const bytes: number[] = [];
  const raw = Buffer.from(field, 'utf8');
  for (let i = 0; i < raw.length; i++) {
    const digits = raw.subarray(i + 1, i + 4).toString('latin1');
    if (raw[i] === 0x5c && /^[0-7]{3}$/.test(digits)) {
      bytes.push(Number.parseInt(digits, 8));
      i += 3;
    } else bytes.push(raw[i] ?? 0);
  }
  return Buffer.from(bytes).toString('utf8');
}

/** Parses /proc/self/mountinfo (proc(5)). Lines that do not fit are skipped. */
export function parseMountInfo(text: string): readonly Mount[] {
  const mounts: Mount[] = [];
  for (const line of text.split('\n')) {
    const [left, right] = line.split(' - ', 2);
    const [, , devNumber, , mountPoint] = left?.split(' ') ?? [];
    const [fsType, source] = right?.split(' ') ?? [];
    if (
      devNumber === undefined ||
      mountPoint === undefined ||
      fsType === undefined ||
      source === undefined
    )
      continue;
    mounts.push({
      devNumber,
      mountPoint: unescapeOctal(mountPoint),
      fsType,
      source: unescapeOctal(source),
    });
  }
  return mounts;
}

/** Parses /proc/swaps: the paths of the areas. */
export function parseSwaps(text: string): readonly string[] {
  return text
    .split('\n')
    .slice(1)
    .map((line) => line.split(/\s/, 1)[0] ?? '')
    .filter((area) => area !== '')
    .map(unescapeOctal);
}

/** All mounts of this process's name space. */
export async function listMounts(roots: SystemRoots = SYSTEM_ROOTS): Promise<readonly Mount[]> {
  const file = path.join(roots.proc, 'self/mountinfo');
  try {
    return parseMountInfo(await readFile(file, 'utf8'));
  } catch (error) {
    throw ioError('read', file, error);
  }
}

/** All swap areas in use: devices and files. */
export async function listSwaps(roots: SystemRoots = SYSTEM_ROOTS): Promise<readonly string[]> {
  try {
    return parseSwaps(await readFile(path.join(roots.proc, 'swaps'), 'utf8'));
  } catch {
    // A kernel without swap has no such file.
    return [];
  }
}
