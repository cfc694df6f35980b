/**
 * System calls that Node does not offer, through koffi. koffi is loaded with the first call, not with this module,
 * because it costs some 10 ms of start-up.
 *
 * Calls that can wait for a disk run on libuv's threads and return promises. A failing call throws an Error with
 * `code` (`EIO`, …), `errno` and `syscall`, as Node's own file functions do: wrap it with `ioError`.
 */
import { createRequire } from 'node:module';
import { getSystemErrorMap } from 'node:util';

import { B2Error, errnoOf, messageOf } from './errors.js';

type Koffi = typeof import('koffi');

interface Native<Args extends readonly unknown[]> {
  (...args: Args): number;
  async(...args: [...Args, (error: unknown, result: number) => void]): void;
}

interface Libc {
  readonly errno: () => number;
  readonly ioctl: Native<[fd: number, request: number, argument: Uint8Array | null]>;
  readonly lseek: Native<[fd: number, offset: number, whence: number]>;
  readonly fallocate: Native<[fd: number, mode: number, offset: number, length: number]>;
  readonly syncfs: Native<[fd: number]>;
  readonly flock: Native<[fd: number, operation: number]>;
  readonly read: Native<[fd: number, into: Uint8Array, length: number]>;
}

let loaded: Libc | undefined;

function libc(): Libc {
  if (loaded !== undefined) return loaded;
  try {
    const koffi = createRequire(import.meta.url)('koffi') as Koffi;
    // null is the process itself: glibc or musl, whichever Node was linked with.
    const lib = koffi.load(null);
    loaded = {
      errno: () => koffi.errno(),
      ioctl: lib.func('int ioctl(int fd, unsigned long request, void *argument)') as Libc['ioctl'],
      lseek: lib.func('int64_t lseek64(int fd, int64_t offset, int whence)') as Libc['lseek'],
      fallocate: lib.func(
        'int fallocate64(int fd, int mode, int64_t offset, int64_t length)',
      ) as Libc['fallocate'],
      syncfs: lib.func('int syncfs(int fd)') as Libc['syncfs'],
      flock: lib.func('int flock(int fd, int operation)') as Libc['flock'],
      read: lib.func('int64_t read(int fd, void *into, size_t length)') as Libc['read'],
    };
    return loaded;
  } catch (error) {
    throw new B2Error(
      'unsupported',
      `cannot load the system call library koffi: ${messageOf(error)}`,
      {
        cause: error,
        hint: 'Reinstall b2 with its dependencies (npm ci); koffi has builds for all usual Linux machines.',
      },
    );
  }
}

/** True if the system calls of this module can be made (koffi loads). */
export function syscallsAvailable(): boolean {
  try {
    libc();
    return true;
  } catch {
    return false;
  }
}

/** The error that Node itself would make of `errno` (positive) of a system call: `code`, `errno`, `syscall`. */
export function systemError(syscall: string, errno: number): Error {
  const [code, text] = getSystemErrorMap().get(-errno) ?? [`ERRNO_${errno}`, 'unknown error'];
  return Object.assign(new Error(`${code}: ${text}, ${syscall}`), { code, errno: -errno, syscall });
}

function call<Args extends readonly unknown[]>(
  name: string,
  native: Native<Args>,
  ...args: Args
): Promise<number> {
  return new Promise((resolve, reject) => {
    native.async(...args, (error, result) => {
      if (error !== null && error !== undefined)
        reject(error instanceof Error ? error : new Error(messageOf(error)));
      else if (result < 0) reject(systemError(name, libc().errno()));
      else resolve(result);
    });
  });
}

// asm-generic/ioctl.h, and the other layout of the machines that have one.
const OTHER_LAYOUT = ['mips', 'mipsel', 'ppc', 'ppc64'].includes(process.arch);
const IOC_NONE = OTHER_LAYOUT ? 0x2000_0000 : 0;
const IOC_READ = OTHER_LAYOUT ? 0x4000_0000 : 0x8000_0000;

// linux/fs.h
const BLKRRPART = IOC_NONE + 0x125f;
const BLKFLSBUF = IOC_NONE + 0x1261;
const BLKGETSIZE64 = IOC_READ + 0x0008_1272;
const BLKDISCARD = IOC_NONE + 0x1277;
const BLKZEROOUT = IOC_NONE + 0x127f;

const SEEK_DATA = 3;
const SEEK_HOLE = 4;

// linux/falloc.h
const FALLOC_FL_KEEP_SIZE = 0x01;
const FALLOC_FL_PUNCH_HOLE = 0x02;
const FALLOC_FL_ZERO_RANGE = 0x10;

const LOCK_EX = 2;
const LOCK_NB = 4;

function byteRange(offset: number, length: number): Uint8Array {
  return new Uint8Array(new BigUint64Array([BigInt(offset), BigInt(length)]).buffer);
}

/** Bytes of the block device open as `fd` (BLKGETSIZE64). */
export async function blockDeviceBytes(fd: number): Promise<number> {
  const size = new BigUint64Array(1);
  await call('BLKGETSIZE64', libc().ioctl, fd, BLKGETSIZE64, new Uint8Array(size.buffer));
  return Number(size[0]);
}

/**
 * Makes bytes of a block device read as zeros (BLKZEROOUT): by the device's own command, else the kernel writes
 * zeros. `offset` and `length` are multiples of the logical block size; `fd` is open for writing.
 */
export async function blkZeroOut(fd: number, offset: number, length: number): Promise<void> {
  await call('BLKZEROOUT', libc().ioctl, fd, BLKZEROOUT, byteRange(offset, length));
}

/** Tells a block device that the bytes are not needed (BLKDISCARD). What they read as afterwards is undefined. */
export async function blkDiscard(fd: number, offset: number, length: number): Promise<void> {
  await call('BLKDISCARD', libc().ioctl, fd, BLKDISCARD, byteRange(offset, length));
}

/** Has the kernel read the partition table again (BLKRRPART). EBUSY while a partition is in use; EINVAL where partitions are off. */
export async function rereadPartitions(fd: number): Promise<void> {
  await call('BLKRRPART', libc().ioctl, fd, BLKRRPART, null);
}

/** Writes out and drops what the page cache holds of a block device (BLKFLSBUF). */
export async function flushBlockCache(fd: number): Promise<void> {
  await call('BLKFLSBUF', libc().ioctl, fd, BLKFLSBUF, null);
}

/** First byte at or after `offset` that holds data; undefined if there is none up to the end. EINVAL: the file system cannot tell. */
export async function seekData(fd: number, offset: number): Promise<number | undefined> {
  try {
    return await call('lseek', libc().lseek, fd, offset, SEEK_DATA);
  } catch (error) {
    if (errnoOf(error) === 'ENXIO') return undefined;
    throw error;
  }
}

/** First byte at or after `offset` (which is inside the file) that is in a hole; the file's end counts as one. */
export async function seekHole(fd: number, offset: number): Promise<number> {
  return call('lseek', libc().lseek, fd, offset, SEEK_HOLE);
}

/**
 * Up to `limit` runs of data from `offset` on, as [start, end) pairs, without leaving this thread: 20 times as fast as
 * {@link seekData} and {@link seekHole}, but the caller blocks while the file system reads its own tables. For file
 * systems on local disks only. Ends early at the end of the file.
 */
export function dataRunsNow(
  fd: number,
  offset: number,
  limit: number,
): readonly (readonly [number, number])[] {
  const native = libc();
  const runs: (readonly [number, number])[] = [];
  for (let at = offset; runs.length < limit;) {
    const start = native.lseek(fd, at, SEEK_DATA);
    if (start < 0) {
      const failure = systemError('lseek', native.errno());
      if (errnoOf(failure) === 'ENXIO') break;
      throw failure;
    }
    const end = native.lseek(fd, start, SEEK_HOLE);
    if (end < 0) throw systemError('lseek', native.errno());
    runs.push([start, end]);
    if (end <= start) break;
    at = end;
  }
  return runs;
}

/**
 * Makes the range a hole that reads as zeros; the size stays. ENOTSUP where it cannot be done. On a block device
 * this deallocates, with the guarantee that it reads as zeros (aligned to logical blocks).
 */
export async function punchHole(fd: number, offset: number, length: number): Promise<void> {
  await call(
    'fallocate',
    libc().fallocate,
    fd,
    FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE,
    offset,
    length,
  );
}

/** Makes the range of a file read as zeros, allocated; the size stays. ENOTSUP where it cannot be done. */
export async function zeroRange(fd: number, offset: number, length: number): Promise<void> {
  await call(
    'fallocate',
    libc().fallocate,
    fd,
    FALLOC_FL_ZERO_RANGE | FALLOC_FL_KEEP_SIZE,
    offset,
    length,
  );
}

/** Writes out everything of the file system that `fd` lies on. */
export async function syncFs(fd: number): Promise<void> {
  await call('syncfs', libc().syncfs, fd);
}

/** Takes an exclusive flock on `fd` until it is closed; false if another open file holds one. */
export function tryLock(fd: number): boolean {
  const native = libc();
  if (native.flock(fd, LOCK_EX | LOCK_NB) === 0) return true;
  const failure = systemError('flock', native.errno());
  if (errnoOf(failure) === 'EAGAIN') return false;
  throw failure;
}

/**
 * Reads from a descriptor that is open with O_NONBLOCK: the bytes read (0 at the end), or −1 if there is nothing now. Unlike
 * `fs.readSync` it makes no error object for "nothing now", which is the usual answer to somebody who asks often.
 */
export function readNow(fd: number, into: Uint8Array): number {
  const native = libc();
  const got = native.read(fd, into, into.byteLength);
  if (got >= 0) return got;
  const failure = systemError('read', native.errno());
  const code = errnoOf(failure);
  if (code === 'EAGAIN' || code === 'EINTR') return -1;
  throw failure;
}
