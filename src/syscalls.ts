/**
 * System calls that Node does not offer, through koffi. koffi is loaded with the first call, not with this module,
 * because it costs some 10 ms of start-up.
 *
 * Calls that can wait for a disk run on libuv's threads and return promises. A failing call throws an Error with
 * `code` (`EIO`, …), `errno` and `syscall`, as Node's own file functions do: wrap it with `ioError`.
 */
import { createRequire } from 'node:module';
import { endianness } from 'node:os';
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
  readonly sched_setscheduler: Native<[tid: number, policy: number, parameters: Uint8Array]>;
  readonly socket: Native<[domain: number, type: number, protocol: number]>;
  readonly sendto: Native<
    [
      fd: number,
      data: Uint8Array,
      length: number,
      flags: number,
      address: Uint8Array,
      addressLength: number,
    ]
  >;
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
      sched_setscheduler: lib.func(
        'int sched_setscheduler(int tid, int policy, const void *parameters)',
      ) as Libc['sched_setscheduler'],
      socket: lib.func('int socket(int domain, int type, int protocol)') as Libc['socket'],
      sendto: lib.func(
        'int64_t sendto(int fd, const void *data, size_t length, int flags, const void *address, uint32_t addressLength)',
      ) as Libc['sendto'],
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
const FIFREEZE = 0xc004_5877;
const FITHAW = 0xc004_5878;

const SEEK_DATA = 3;
const SEEK_HOLE = 4;

// linux/falloc.h
const FALLOC_FL_KEEP_SIZE = 0x01;
const FALLOC_FL_PUNCH_HOLE = 0x02;
const FALLOC_FL_ZERO_RANGE = 0x10;

// linux/sched.h
const SCHED_FIFO = 1;
const SCHED_BATCH = 3;

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

/**
 * Freezes the file system that `fd` lies on: it is synced, and whoever writes to it waits until it is thawed. Can wait long for a
 * busy disk. EBUSY: frozen already; EOPNOTSUPP: it cannot be frozen; EPERM.
 */
export async function freezeFs(fd: number): Promise<void> {
  await call('FIFREEZE', libc().ioctl, fd, FIFREEZE, null);
}

/** Thaws the file system that `fd` lies on. EINVAL: it is not frozen. */
export async function thawFs(fd: number): Promise<void> {
  await call('FITHAW', libc().ioctl, fd, FITHAW, null);
}

/**
 * Puts a thread before all others that are not real-time themselves (SCHED_FIFO, the least priority of it). For threads that are idle
 * as a rule. Throws EPERM for a user who may not.
 */
export function makeRealTime(tid: number): void {
  setScheduler(tid, SCHED_FIFO, 1);
}

/**
 * Has a thread take no processor away from another that runs (SCHED_BATCH): it gets its fair share, a little later. Throws EPERM where
 * that is not allowed.
 */
export function makeBatch(tid: number): void {
  setScheduler(tid, SCHED_BATCH, 0);
}

function setScheduler(tid: number, policy: number, priority: number): void {
  const parameters = Buffer.alloc(4);
  parameters.writeInt32LE(priority);
  if (libc().sched_setscheduler(tid, policy, parameters) !== 0)
    throw systemError('sched_setscheduler', libc().errno());
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

// linux/socket.h; the same on every machine but alpha, hppa, mips and sparc (SOCK_DGRAM).
const AF_UNIX = 1;
const SOCK_DGRAM = process.arch === 'mips' || process.arch === 'mipsel' ? 1 : 2;
const SOCK_CLOEXEC = 0o2000000;
const MSG_NOSIGNAL = 0x4000;
/** Of `sun_path`. */
const UNIX_PATH_BYTES = 108;

/** A unix datagram socket that is bound to nothing and not inherited; close it with `fs.close`. */
export function unixDatagramSocket(): number {
  const native = libc();
  const fd = native.socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC, 0);
  if (fd < 0) throw systemError('socket', native.errno());
  return fd;
}

/** Sends one datagram to a unix socket: a path, or a name that starts with `@` (abstract). Waits while its queue is full. */
export async function sendUnixDatagram(fd: number, to: string, data: Uint8Array): Promise<void> {
  const name = Buffer.from(to, 'utf8');
  if (name.length === 0 || name.length > UNIX_PATH_BYTES)
    throw new RangeError(`"${to}" cannot be the address of a unix socket`);
  if (name[0] === 0x40) name[0] = 0;
  const address = Buffer.alloc(2 + name.length);
  new Uint16Array(address.buffer, address.byteOffset, 1)[0] = AF_UNIX;
  address.set(name, 2);
  await call('sendto', libc().sendto, fd, data, data.length, MSG_NOSIGNAL, address, address.length);
}

// linux/mtio.h
const IOC_WRITE = OTHER_LAYOUT ? 0x8000_0000 : 0x4000_0000;
/** Bytes of `struct mtget`: five longs, then file and block as ints; the struct is padded to a whole number of longs. */
const MTGET_BYTES = ['x64', 'arm64', 'ppc64', 's390x', 'riscv64', 'loong64'].includes(process.arch)
  ? 48
  : 28;
const MTIOCTOP = IOC_WRITE + 0x0008_6d01;
const MTIOCGET = IOC_READ + MTGET_BYTES * 0x1_0000 + 0x6d02;

/** One operation of a tape drive (MTIOCTOP): `operation` is MTFSF, MTREW, … of linux/mtio.h. System errors. */
export async function tapeOperation(fd: number, operation: number, count: number): Promise<void> {
  const top = new DataView(new ArrayBuffer(8));
  const little = endianness() === 'LE';
  top.setInt16(0, operation, little);
  top.setInt32(4, count, little);
  await call('MTIOCTOP', libc().ioctl, fd, MTIOCTOP, new Uint8Array(top.buffer));
}

/** What a tape drive says of itself (MTIOCGET): the status bits of `mt_gstat`, and where the head is; -1 where it does not know. */
export interface TapeDriveStatus {
  readonly flags: number;
  readonly file: number;
  readonly block: number;
  /** Length of blocks in the fixed block mode, else 0. */
  readonly blockBytes: number;
}

/** See {@link TapeDriveStatus}. System errors. */
export async function tapeDriveStatus(fd: number): Promise<TapeDriveStatus> {
  const bytes = new Uint8Array(MTGET_BYTES);
  await call('MTIOCGET', libc().ioctl, fd, MTIOCGET, bytes);
  const view = new DataView(bytes.buffer);
  const little = endianness() === 'LE';
  const long = MTGET_BYTES === 48 ? 8 : 4;
  const flags =
    long === 8 ? Number(view.getBigUint64(24, little) & 0xffff_ffffn) : view.getUint32(12, little);
  return {
    flags,
    file: view.getInt32(5 * long, little),
    block: view.getInt32(5 * long + 4, little),
    // mt_dsreg: density in the highest byte, MT_ST_BLKSIZE_MASK below.
    blockBytes: Number(
      (long === 8 ? view.getBigUint64(16, little) : BigInt(view.getUint32(8, little))) & 0xff_ffffn,
    ),
  };
}
