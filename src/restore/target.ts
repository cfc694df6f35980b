/** Whether something may be the target of a restore, and opening it. */
import type { ReadDevice, WriteDevice } from '../devices/device.js';
import { inUseReasons } from '../devices/in-use.js';
import { describeContents } from '../devices/inspect.js';
import { openReadDevice, openWriteDevice, targetKind } from '../devices/open.js';
import { B2Error } from '../errors.js';
import { formatBytes } from '../human.js';
import { stat } from 'node:fs/promises';
import path from 'node:path';

/** What is known of a target before anything is changed. */
export interface TargetFacts {
  readonly path: string;
  readonly kind: 'block' | 'file' | 'none';
  /** Undefined for `none`. */
  readonly sizeBytes: number | undefined;
  /** Why it cannot be the target, whatever is asked: clauses for a person. */
  readonly obstacles: readonly string[];
  /** What a restore would destroy: needs `--force`. */
  readonly contents: readonly string[];
}

export interface TargetQuestion {
  readonly target: string;
  /** Of the image. */
  readonly sizeBytes: number;
  /** The repository's directory, where it is a local one. */
  readonly repositoryPath: string | undefined;
}

const exactly = (bytes: number): string => `${formatBytes(bytes)} (${bytes} bytes)`;

/**
 * Looks at a target; changes nothing. Rejects for what can never be one: a directory, a link to a file, a device
 * name that does not exist.
 */
export async function examineTarget({
  target,
  sizeBytes,
  repositoryPath,
}: TargetQuestion): Promise<TargetFacts> {
  const kind = await targetKind(target);
  const obstacles = (
    await inUseReasons(target, repositoryPath === undefined ? {} : { repositoryPath })
  ).map((r) => r.text);
  if (kind === 'none') {
    const absolute = path.resolve(target);
    if (absolute.startsWith('/dev/') && !absolute.startsWith('/dev/shm/')) {
      throw new B2Error('not-found', `there is no device ${target}`, {
        hint: 'lsblk lists the block devices of this machine.',
      });
    }
    const parent = path.dirname(absolute);
    const found = await stat(parent).catch(() => undefined);
    if (found === undefined) {
      throw new B2Error(
        'not-found',
        `there is no directory ${parent} for the image file ${path.basename(target)}`,
        {
          hint: 'Make the directory, or check the name.',
          code: 1,
        },
      );
    }
    return { path: target, kind, sizeBytes: undefined, obstacles, contents: [] };
  }
  const device = await openReadDevice(target);
  try {
    const size = device.facts.sizeBytes;
    if (kind === 'block' && size < sizeBytes) {
      obstacles.push(
        `${target} is too small: it has ${exactly(size)}, the image needs ${exactly(sizeBytes)}, ${exactly(sizeBytes - size)} more`,
      );
    }
    if (kind === 'block' && device.facts.readOnly) obstacles.push(`${target} is read-only`);
    const contents = [...(await describeContents(device))];
    if (kind === 'file' && size > 0) contents.unshift(`a file of ${exactly(size)}`);
    return { path: target, kind, sizeBytes: size, obstacles, contents };
  } finally {
    await device.close();
  }
}

/** Throws `refused` if the target may not be overwritten. */
export function refuseTarget(facts: TargetFacts, force: boolean): void {
  if (facts.obstacles.length > 0) {
    throw new B2Error(
      'refused',
      `will not restore to ${facts.path}: ${facts.obstacles.join('; ')}`,
      {
        hint: 'Unmount or stop what uses it, or choose another target. --force does not override this.',
      },
    );
  }
  if (!force && facts.contents.length > 0) {
    throw new B2Error(
      'refused',
      `will not restore to ${facts.path}: it holds ${facts.contents.join(', ')}`,
      {
        hint: 'If that may be overwritten, repeat the command with --force ("--plan" shows what would change).',
      },
    );
  }
}

/** A target open for writing. */
export interface OpenTarget {
  readonly device: WriteDevice;
  /** Image files: the same file for questions about its holes. */
  readonly reader: ReadDevice | undefined;
  /** True if it reads as zeros everywhere: a file just made. */
  readonly isBlank: boolean;
  close(): Promise<void>;
}

/** Opens the target (which {@link refuseTarget} let pass) and, for a file, gives it the image's length. */
export async function openTarget(facts: TargetFacts, sizeBytes: number): Promise<OpenTarget> {
  const device = await openWriteDevice(facts.path, facts.kind === 'none' ? 'new' : 'existing');
  try {
    if (device.facts.kind === 'block') {
      return { device, reader: undefined, isBlank: false, close: () => device.close() };
    }
    const isBlank = device.facts.sizeBytes === 0;
    await device.truncate(sizeBytes);
    const reader = await openReadDevice(facts.path);
    return {
      device,
      reader,
      isBlank,
      async close() {
        await reader.close();
        await device.close();
      },
    };
  } catch (error) {
    await device.close();
    throw error;
  }
}
