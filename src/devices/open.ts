/** Opens whatever a user names: a block device, a partition or an image file. */
import type { BigIntStats } from 'node:fs';
import { lstat, stat } from 'node:fs/promises';

import { B2Error, errnoOf, ioError } from '../errors.js';
import { openBlockForReading, openBlockForWriting } from './block-device.js';
import type { ReadDevice, WriteDevice } from './device.js';
import { openFileForReading, openFileForWriting, symbolicLink } from './file-device.js';
import { SYSTEM_ROOTS, type SystemRoots } from './sysfs.js';

/** What a name is, links followed. Rejects with `not-found`, or `refused` for anything that is neither device nor file. */
export async function kindOfPath(path: string): Promise<'block' | 'file'> {
  let found: BigIntStats;
  try {
    found = await stat(path, { bigint: true });
  } catch (error) {
    if (errnoOf(error) === 'ENOENT' || errnoOf(error) === 'ENOTDIR') {
      throw new B2Error('not-found', `there is no device or file ${path}`, {
        cause: error,
        hint: 'lsblk lists the block devices of this machine.',
      });
    }
    throw ioError('look at', path, error);
  }
  if (found.isBlockDevice()) return 'block';
  if (found.isFile()) return 'file';
  const what = found.isDirectory()
    ? 'a directory'
    : found.isCharacterDevice()
      ? 'a character device'
      : found.isFIFO()
        ? 'a pipe'
        : 'a socket';
  throw new B2Error('refused', `${path} is ${what}, not a block device or an image file`);
}

/** Opens a block device, partition or image file for reading. */
export async function openReadDevice(
  path: string,
  roots: SystemRoots = SYSTEM_ROOTS,
): Promise<ReadDevice> {
  return (await kindOfPath(path)) === 'block'
    ? openBlockForReading(path, roots)
    : openFileForReading(path);
}

/**
 * Opens the target of a restore. Block devices are opened exclusively (`refused` when in use). `file` says what to
 * do about image files: `new` creates one (`exists` if the name is taken, also by a device), `existing` takes the
 * one that is there, `either` creates it unless it is there. Whether a target may be overwritten is for the caller
 * to ask first: see `inUseReasons` and `describeContents`.
 */
export async function openWriteDevice(
  path: string,
  file: 'new' | 'existing' | 'either',
  roots: SystemRoots = SYSTEM_ROOTS,
): Promise<WriteDevice> {
  const kind = await targetKind(path);
  if (kind === 'none') {
    if (file === 'existing') throw new B2Error('not-found', `there is no device or file ${path}`);
    refuseNewNode(path, roots);
    return openFileForWriting(path, 'new');
  }
  if (kind === 'block') {
    if (file === 'new')
      throw new B2Error('exists', `${path} is there already: it is a block device`);
    return openBlockForWriting(path, roots);
  }
  return openFileForWriting(path, file === 'new' ? 'new' : 'existing');
}

/**
 * What is at a target's name now. Rejects with `refused` for a link to a file, a link to nothing, and for what is
 * neither device nor file.
 */
export async function targetKind(path: string): Promise<'block' | 'file' | 'none'> {
  try {
    const found = await lstat(path);
    if (!found.isSymbolicLink()) return await kindOfPath(path);
  } catch (error) {
    if (errnoOf(error) === 'ENOENT') return 'none';
    throw ioError('look at', path, error);
  }
  // /dev/disk/by-id/… are links; to a file they are a surprise.
  try {
    if ((await stat(path)).isBlockDevice()) return 'block';
  } catch (error) {
    if (errnoOf(error) !== 'ENOENT') throw ioError('look at', path, error);
  }
  throw symbolicLink(path);
}

/** A mistyped device name must not become a file in /dev, which is memory. */
function refuseNewNode(path: string, roots: SystemRoots): void {
  if (!path.startsWith(`${roots.dev}/`) || path.startsWith(`${roots.dev}/shm/`)) return;
  throw new B2Error('not-found', `there is no device ${path}`, {
    hint: 'lsblk lists the block devices of this machine.',
  });
}
