/** Image files, open for reading or as a restore's target. */
import { constants, fstat, ftruncate, type BigIntStats } from 'node:fs';
import { realpath, statfs } from 'node:fs/promises';
import path from 'node:path';

import { B2Error, errnoOf, ioError } from '../errors.js';
import { DIRECT_ALIGN_BYTES, isPageAligned } from '../memory.js';
import {
  dataRunsNow,
  punchHole,
  seekData,
  seekHole,
  syscallsAvailable,
  tryLock,
  zeroRange,
} from '../syscalls.js';
import { MAX_DEVICE_BYTES, safeNumber } from '../units.js';
import type { ByteRange, DeviceFacts, ReadDevice, WriteDevice } from './device.js';
import {
  closeFd,
  EdgeLock,
  openFd,
  readRange,
  syncFd,
  writeRange,
  writeZeros,
  type RawRange,
} from './raw-io.js';

const { O_RDONLY, O_RDWR, O_CREAT, O_EXCL, O_NOFOLLOW, O_DIRECT, O_DIRECTORY } = constants;

/** ext2 to ext4, XFS, btrfs, tmpfs (statfs(2)): a question about a file's layout never waits for a network. */
const LOCAL_FILE_SYSTEMS: ReadonlySet<number> = new Set([
  0xef53, 0x5846_5342, 0x9123_683e, 0x0102_1994,
]);
/** Runs of data that are asked for without leaving the thread: some 0.3 ms. */
const RUNS_AT_A_TIME = 128;

function fstatFd(fd: number): Promise<BigIntStats> {
  return new Promise((resolve, reject) => {
    fstat(fd, { bigint: true }, (error, facts) =>
      error === null ? resolve(facts) : reject(error),
    );
  });
}

function truncateFd(fd: number, sizeBytes: number): Promise<void> {
  return new Promise((resolve, reject) => {
    ftruncate(fd, sizeBytes, (error) => (error === null ? resolve() : reject(error)));
  });
}

async function factsOf(fd: number, named: string, real: string): Promise<DeviceFacts> {
  const found = await fstatFd(fd);
  if (!found.isFile()) throw new B2Error('refused', `${named} is not a regular file`);
  if (found.size > BigInt(MAX_DEVICE_BYTES)) {
    throw new B2Error('unsupported', `${named} is larger than b2 can address (2^53 bytes)`);
  }
  return {
    path: named,
    realPath: real,
    kind: 'file',
    sizeBytes: safeNumber(found.size, `size of ${named}`),
    logicalBlockBytes: 512,
    physicalBlockBytes: DIRECT_ALIGN_BYTES,
    readOnly: (found.mode & 0o222n) === 0n,
    devNumber: undefined,
    partitionOf: undefined,
    identity: { inode: `${found.dev}:${found.ino}` },
    diskSequence: undefined,
  };
}

/** A descriptor with O_DIRECT on the same file, or undefined where its file system has none (tmpfs before 6.6, some FUSE). */
async function openDirect(file: string, flags: number): Promise<number | undefined> {
  try {
    return await openFd(file, flags | O_DIRECT | O_NOFOLLOW);
  } catch {
    return undefined;
  }
}

/** The two ways into one file: around the page cache where that works, and through it. Both see the same bytes. */
class FileHandles {
  private directFd: number | undefined;
  readonly bufferedFd: number;
  readonly path: string;
  private readonly edges = new EdgeLock();
  /** Direct descriptors that turned out not to work; requests may still be under way on them, so `close` closes them. */
  private readonly retiredFds: number[] = [];
  private closed = false;

  constructor(path: string, bufferedFd: number, directFd: number | undefined) {
    this.path = path;
    this.bufferedFd = bufferedFd;
    this.directFd = directFd;
  }

  buffered(): RawRange {
    return { fd: this.bufferedFd, offset: 0, unitBytes: 1, path: this.path };
  }

  async read(into: Uint8Array, offset: number, length: number): Promise<number> {
    // Small or unaligned requests gain nothing from going around the cache.
    if (this.directFd !== undefined && isPageAligned(into) && offset % DIRECT_ALIGN_BYTES === 0) {
      const range = {
        fd: this.directFd,
        offset: 0,
        unitBytes: DIRECT_ALIGN_BYTES,
        path: this.path,
      };
      try {
        const got = await readRange(range, into, offset, length);
        if (got === length) return got;
        // A short direct read is the end of the file, or a failure in the middle of it: the cache's way tells which.
        return (
          got + (await readRange(this.buffered(), into.subarray(got), offset + got, length - got))
        );
      } catch (error) {
        if (errnoOf(error) !== 'EINVAL') throw error;
        this.dropDirect();
      }
    }
    return readRange(this.buffered(), into, offset, length);
  }

  async write(data: Uint8Array, offset: number): Promise<void> {
    const aligned = offset % DIRECT_ALIGN_BYTES === 0 && data.byteLength % DIRECT_ALIGN_BYTES === 0;
    if (this.directFd !== undefined && aligned && isPageAligned(data)) {
      const range = {
        fd: this.directFd,
        offset: 0,
        unitBytes: DIRECT_ALIGN_BYTES,
        path: this.path,
      };
      try {
        await writeRange(range, this.edges, data, offset);
        return;
      } catch (error) {
        if (errnoOf(error) !== 'EINVAL') throw error;
        this.dropDirect();
      }
    }
    await writeRange(this.buffered(), this.edges, data, offset);
  }

  writeZeros(offset: number, length: number): Promise<void> {
    return writeZeros(this.buffered(), this.edges, offset, length);
  }

  async close(): Promise<void> {
    if (this.closed) return;
    this.closed = true;
    for (const fd of [
      ...this.retiredFds,
      this.bufferedFd,
      ...(this.directFd === undefined ? [] : [this.directFd]),
    ]) {
      try {
        await closeFd(fd);
      } catch {
        // Nothing was promised after `sync`; the descriptor is gone in any case.
      }
    }
  }

  private dropDirect(): void {
    if (this.directFd !== undefined) this.retiredFds.push(this.directFd);
    this.directFd = undefined;
  }
}

class FileReadDevice implements ReadDevice {
  private current: DeviceFacts;
  private readonly handles: FileHandles;

  constructor(facts: DeviceFacts, handles: FileHandles) {
    this.current = facts;
    this.handles = handles;
  }

  get facts(): DeviceFacts {
    return this.current;
  }

  async read(into: Uint8Array, offset: number): Promise<number> {
    const length = Math.min(into.byteLength, this.current.sizeBytes - offset);
    return length <= 0 ? 0 : this.handles.read(into, offset, length);
  }

  async dataRanges(offset: number, length: number): Promise<readonly ByteRange[]> {
    const end = Math.min(offset + length, this.current.sizeBytes);
    if (end <= offset) return [];
    const whole = [{ offset, length: end - offset }];
    if (!syscallsAvailable()) return whole;
    const fd = this.handles.bufferedFd;
    const ranges: ByteRange[] = [];
    try {
      // Data that waits in memory without a place on disk is reported as a hole by some file systems (ZFS, older
      // btrfs); after this it has a place.
      await syncFd(fd);
      const isLocal = LOCAL_FILE_SYSTEMS.has((await statfs(this.current.realPath)).type);
      for (let at = offset; at < end;) {
        // Off this thread, so that reading the file system's tables blocks nobody; what follows is in memory then.
        const data = await seekData(fd, at);
        if (data === undefined || data >= end) break;
        const runs = isLocal
          ? dataRunsNow(fd, data, RUNS_AT_A_TIME)
          : [[data, await seekHole(fd, data)] as const];
        if (runs.length === 0) break;
        for (const [start, hole] of runs) {
          // No progress would be a file that shrinks under us: then nothing is known of the rest.
          if (hole <= start) return [...ranges, { offset: at, length: end - at }];
          if (start < end) ranges.push({ offset: start, length: Math.min(hole, end) - start });
          at = hole;
        }
      }
      return ranges;
    } catch {
      // EINVAL where the file system does not know the question; anything else shows when the bytes are read.
      return whole;
    }
  }

  async refresh(): Promise<DeviceFacts> {
    const facts = await factsOf(this.handles.bufferedFd, this.current.path, this.current.realPath);
    this.current = facts;
    return facts;
  }

  close(): Promise<void> {
    return this.handles.close();
  }
}

/** Opens an image file for reading. A symbolic link to one is followed. */
export async function openFileForReading(named: string): Promise<ReadDevice> {
  let real: string;
  let fd: number;
  try {
    real = await realpath(named);
    fd = await openFd(real, O_RDONLY | O_NOFOLLOW);
  } catch (error) {
    throw ioError('open', named, error);
  }
  try {
    const facts = await factsOf(fd, named, real);
    return new FileReadDevice(facts, new FileHandles(named, fd, await openDirect(real, O_RDONLY)));
  } catch (error) {
    await closeFd(fd);
    throw ioError('open', named, error);
  }
}

class FileWriteDevice implements WriteDevice {
  private current: DeviceFacts;
  private readonly handles: FileHandles;
  private nameIsDurable: boolean;
  private canPunch = syscallsAvailable();

  constructor(facts: DeviceFacts, handles: FileHandles, created: boolean) {
    this.current = facts;
    this.handles = handles;
    this.nameIsDurable = !created;
  }

  get facts(): DeviceFacts {
    return this.current;
  }

  async read(into: Uint8Array, offset: number): Promise<number> {
    const length = Math.min(into.byteLength, this.current.sizeBytes - offset);
    return length <= 0 ? 0 : this.handles.read(into, offset, length);
  }

  async write(data: Uint8Array, offset: number): Promise<void> {
    await this.handles.write(data, offset);
    this.atLeast(offset + data.byteLength);
  }

  async zero(offset: number, length: number): Promise<void> {
    const end = offset + length;
    if (end > this.current.sizeBytes) await this.truncate(end);
    if (length === 0) return;
    if (this.canPunch) {
      const { bufferedFd } = this.handles;
      try {
        await punchHole(bufferedFd, offset, length);
        return;
      } catch (error) {
        if (errnoOf(error) === 'ENOSPC')
          throw ioError(`zero ${length} bytes at offset ${offset} of`, this.current.path, error);
      }
      try {
        await zeroRange(bufferedFd, offset, length);
        return;
      } catch (error) {
        if (errnoOf(error) === 'ENOSPC')
          throw ioError(`zero ${length} bytes at offset ${offset} of`, this.current.path, error);
        this.canPunch = false;
      }
    }
    await this.handles.writeZeros(offset, length);
  }

  async truncate(sizeBytes: number): Promise<void> {
    try {
      await truncateFd(this.handles.bufferedFd, sizeBytes);
    } catch (error) {
      throw ioError(`set the length to ${sizeBytes} bytes of`, this.current.path, error);
    }
    this.current = { ...this.current, sizeBytes };
  }

  async sync(): Promise<void> {
    try {
      await syncFd(this.handles.bufferedFd);
      if (!this.nameIsDurable) {
        const directory = await openFd(path.dirname(this.current.realPath), O_RDONLY | O_DIRECTORY);
        try {
          await syncFd(directory);
        } finally {
          await closeFd(directory);
        }
        this.nameIsDurable = true;
      }
    } catch (error) {
      throw ioError('sync', this.current.path, error);
    }
  }

  close(): Promise<void> {
    return this.handles.close();
  }

  private atLeast(sizeBytes: number): void {
    if (sizeBytes > this.current.sizeBytes) this.current = { ...this.current, sizeBytes };
  }
}

/**
 * Opens an image file for writing. `new`: creates it with mode 0600; rejects with `exists` if anything has that name,
 * a symbolic link too. `existing`: what is there, which must be a regular file and not a symbolic link; nothing of it
 * changes before it is written to. Only one opener at a time (flock): rejects with `refused` otherwise.
 */
export async function openFileForWriting(
  named: string,
  mode: 'new' | 'existing',
): Promise<WriteDevice> {
  const parent = path.dirname(path.resolve(named));
  let real: string;
  let fd: number;
  try {
    real = path.join(await realpath(parent), path.basename(named));
    fd = await openFd(real, O_RDWR | O_NOFOLLOW | (mode === 'new' ? O_CREAT | O_EXCL : 0), 0o600);
  } catch (error) {
    if (errnoOf(error) === 'ELOOP') throw symbolicLink(named);
    if (errnoOf(error) === 'EISDIR')
      throw new B2Error('refused', `${named} is a directory; a target is a file or a device`);
    throw ioError(mode === 'new' ? 'create' : 'open for writing', named, error);
  }
  try {
    if (syscallsAvailable() && !tryLock(fd)) {
      throw new B2Error(
        'refused',
        `${named} is being written by another program that has locked it`,
        {
          hint: 'Wait for the other restore to end, or choose another file.',
        },
      );
    }
    const facts = await factsOf(fd, named, real);
    return new FileWriteDevice(
      facts,
      new FileHandles(named, fd, await openDirect(real, O_RDWR)),
      mode === 'new',
    );
  } catch (error) {
    await closeFd(fd);
    throw ioError('open for writing', named, error);
  }
}

/** The refusal of a target that is a symbolic link to a file: the link may have been put there by somebody else. */
export function symbolicLink(named: string): B2Error {
  return new B2Error('refused', `${named} is a symbolic link`, {
    hint: 'Name the file it points to, if that is what you mean.',
  });
}
