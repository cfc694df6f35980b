/** Block devices and partitions of them, open for reading or as a restore's target. */
import { constants } from 'node:fs';
import { realpath, stat } from 'node:fs/promises';

import { B2Error, errnoOf, ioError } from '../errors.js';
import { ReadBatch } from '../read-batch.js';
import { blkZeroOut, punchHole, syscallsAvailable } from '../syscalls.js';
import { roundDown, roundUp } from '../units.js';
import {
  READS_AT_ONCE,
  type ByteRange,
  type DeviceFacts,
  type RangeRead,
  type ReadDevice,
  type WriteDevice,
} from './device.js';
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
import {
  blockInfo,
  blockNameOf,
  devNumberOf,
  SYSTEM_ROOTS,
  type BlockInfo,
  type SystemRoots,
} from './sysfs.js';

const { O_RDONLY, O_RDWR, O_DIRECT, O_EXCL } = constants;

/** One zeroing call covers at most this, so that a call never holds a thread for minutes on a slow disk. */
const ZERO_STEP_BYTES = 128 * 1024 * 1024;

/** Facts of the block device at `path`, and what sysfs says of it. */
async function describe(
  path: string,
  roots: SystemRoots,
): Promise<{ facts: DeviceFacts; info: BlockInfo }> {
  let real: string;
  let devNumber: string;
  try {
    real = await realpath(path);
    devNumber = devNumberOf((await stat(real, { bigint: true })).rdev);
  } catch (error) {
    throw ioError('look at', path, error);
  }
  const name = await blockNameOf(devNumber, roots);
  if (name === undefined) {
    throw new B2Error(
      'not-found',
      `${path} is a node for block device ${devNumber}, but the kernel has no such device`,
      {
        hint: 'Check that the disk is attached (lsblk).',
      },
    );
  }
  const info = await blockInfo(name, roots);
  const disk =
    info.partition === undefined ? undefined : await blockInfo(info.partition.diskName, roots);
  return {
    info,
    facts: {
      path,
      realPath: real,
      kind: 'block',
      sizeBytes: info.sizeBytes,
      logicalBlockBytes: info.logicalBlockBytes,
      physicalBlockBytes: info.physicalBlockBytes,
      readOnly: info.readOnly,
      devNumber,
      partitionOf:
        info.partition === undefined || disk === undefined
          ? undefined
          : { diskPath: disk.path, offsetBytes: info.partition.offsetBytes },
      identity: info.identity,
      diskSequence: info.diskSequence,
    },
  };
}

function refuseEmpty(facts: DeviceFacts): void {
  if (facts.sizeBytes > 0) return;
  throw new B2Error('failed', `${facts.path} has no medium: its size is 0`, {
    hint: 'Attach or insert what it should hold, then try again.',
  });
}

/** EINVAL of a direct read or write is our own mistake or a strange driver; it reaches here unwrapped. */
async function wrapped<T>(operation: string, path: string, task: Promise<T>): Promise<T> {
  try {
    return await task;
  } catch (error) {
    throw ioError(operation, path, error);
  }
}

async function readWhole(
  range: RawRange,
  facts: DeviceFacts,
  into: Uint8Array,
  offset: number,
  length: number,
): Promise<number> {
  const got = await wrapped(
    `read ${length} bytes at offset ${offset} of`,
    facts.path,
    readRange(range, into, offset, length),
  );
  if (got === length) return got;
  throw new B2Error(
    'io',
    `read ${length} bytes at offset ${offset} of ${facts.path}: it ends at ${offset + got}, though its size was ${facts.sizeBytes}`,
    { hint: 'The device has shrunk or is going away; check the kernel log (dmesg).' },
  );
}

async function closeTolerant(fds: readonly number[]): Promise<void> {
  for (const fd of fds) {
    try {
      await closeFd(fd);
    } catch {
      // Nothing was promised after `sync`; the descriptor is gone in any case.
    }
  }
}

class BlockReadDevice implements ReadDevice {
  private current: DeviceFacts;
  private closed = false;
  private readonly range: RawRange;
  private readonly roots: SystemRoots;
  /** Made when it is first wanted; null: it cannot be had. */
  private batch: ReadBatch | null | undefined;

  constructor(facts: DeviceFacts, range: RawRange, roots: SystemRoots) {
    this.current = facts;
    this.range = range;
    this.roots = roots;
  }

  get facts(): DeviceFacts {
    return this.current;
  }

  async read(into: Uint8Array, offset: number): Promise<number> {
    const length = Math.min(into.byteLength, this.current.sizeBytes - offset);
    if (length <= 0) return 0;
    return readWhole(this.range, this.current, into, offset, length);
  }

  async readMany(reads: readonly RangeRead[]): Promise<readonly boolean[]> {
    if (this.closed) return reads.map(() => false);
    this.batch ??= ReadBatch.open(READS_AT_ONCE) ?? null;
    const { batch } = this;
    if (batch === null) return reads.map(() => false);
    const { fd, offset: start, unitBytes } = this.range;
    const { sizeBytes } = this.current;
    const fits = reads.map(
      ({ into, offset }) =>
        offset % unitBytes === 0 &&
        into.byteLength % unitBytes === 0 &&
        offset + into.byteLength <= sizeBytes,
    );
    const done = await batch.read(
      fd,
      reads.flatMap(({ into, offset }, i) =>
        fits[i] === true ? [{ into, position: start + offset }] : [],
      ),
    );
    let next = 0;
    return fits.map((fit) => fit && done[next++] === true);
  }

  async dataRanges(offset: number, length: number): Promise<readonly ByteRange[]> {
    // There is no way to ask a block device which ranges it holds; what was discarded reads as zeros or as it likes.
    const end = Math.min(offset + length, this.current.sizeBytes);
    return end > offset ? [{ offset, length: end - offset }] : [];
  }

  async refresh(): Promise<DeviceFacts> {
    const { facts } = await describe(this.current.path, this.roots);
    if (facts.devNumber !== this.current.devNumber) {
      throw new B2Error(
        'io',
        `${this.current.path} is now another device (${facts.devNumber}, was ${this.current.devNumber})`,
      );
    }
    if (facts.partitionOf?.offsetBytes !== this.current.partitionOf?.offsetBytes) {
      throw new B2Error(
        'io',
        `partition ${this.current.path} has moved on its disk while it was being read`,
        {
          hint: 'Take a new snapshot once the partition table is settled.',
        },
      );
    }
    this.current = facts;
    return facts;
  }

  async close(): Promise<void> {
    if (this.closed) return;
    this.closed = true;
    await this.batch?.close();
    await closeTolerant([this.range.fd]);
  }
}

/**
 * Opens a block device for reading. A partition is read through its whole disk at its offset where that node can be
 * opened (direct reads of a mounted node make ext4 flush), else through its own node. What a page cache still held
 * of the node itself is written out first.
 */
export async function openBlockForReading(
  path: string,
  roots: SystemRoots = SYSTEM_ROOTS,
): Promise<ReadDevice> {
  const { facts } = await describe(path, roots);
  refuseEmpty(facts);
  const own = await wrapped('open', path, openFd(facts.realPath, O_RDONLY | O_DIRECT));
  if (facts.partitionOf === undefined) {
    return new BlockReadDevice(
      facts,
      { fd: own, offset: 0, unitBytes: facts.logicalBlockBytes, path },
      roots,
    );
  }
  try {
    // The disk's node does not see dirty pages of the partition's; a process may have written to it and kept it open.
    // A disk that fails writes can still be worth reading.
    await syncFd(own).catch(() => undefined);
    const disk = await openSameDisk(facts, roots);
    if (disk !== undefined) {
      await closeTolerant([own]);
      return new BlockReadDevice(
        facts,
        {
          fd: disk,
          offset: facts.partitionOf.offsetBytes,
          unitBytes: facts.logicalBlockBytes,
          path,
        },
        roots,
      );
    }
  } catch (error) {
    await closeTolerant([own]);
    throw error;
  }
  return new BlockReadDevice(
    facts,
    { fd: own, offset: 0, unitBytes: facts.logicalBlockBytes, path },
    roots,
  );
}

/** The whole disk of a partition, if /dev has its node and that node is really this disk. */
async function openSameDisk(facts: DeviceFacts, roots: SystemRoots): Promise<number | undefined> {
  if (facts.partitionOf === undefined || facts.devNumber === undefined) return undefined;
  const { diskPath } = facts.partitionOf;
  try {
    const own = await blockNameOf(facts.devNumber, roots);
    const node = await stat(diskPath, { bigint: true });
    const disk = await blockNameOf(devNumberOf(node.rdev), roots);
    if (own === undefined || disk === undefined || !node.isBlockDevice()) return undefined;
    if ((await blockInfo(own, roots)).partition?.diskName !== disk) return undefined;
    return await openFd(diskPath, O_RDONLY | O_DIRECT);
  } catch (error) {
    // A container may have been given the partition alone.
    if (['ENOENT', 'EACCES', 'EPERM', 'ENXIO'].includes(errnoOf(error) ?? '')) return undefined;
    throw ioError('open', diskPath, error);
  }
}

type ZeroMethod = 'punch' | 'zero-out' | 'write';

class BlockWriteDevice implements WriteDevice {
  readonly facts: DeviceFacts;
  private readonly range: RawRange;
  private readonly edges = new EdgeLock();
  private zeroMethod: ZeroMethod;
  private closed = false;

  constructor(facts: DeviceFacts, range: RawRange) {
    this.facts = facts;
    this.range = range;
    this.zeroMethod = syscallsAvailable() ? 'punch' : 'write';
  }

  async read(into: Uint8Array, offset: number): Promise<number> {
    const length = Math.min(into.byteLength, this.facts.sizeBytes - offset);
    if (length <= 0) return 0;
    return readWhole(this.range, this.facts, into, offset, length);
  }

  async write(data: Uint8Array, offset: number): Promise<void> {
    this.checkInside('write', offset, data.byteLength);
    await wrapped(
      `write ${data.byteLength} bytes at offset ${offset} of`,
      this.facts.path,
      writeRange(this.range, this.edges, data, offset),
    );
  }

  async zero(offset: number, length: number): Promise<void> {
    this.checkInside('zero', offset, length);
    const end = offset + length;
    const first = Math.min(end, roundUp(offset, this.range.unitBytes));
    const last = Math.max(first, roundDown(end, this.range.unitBytes));
    await this.writeZeros(offset, first - offset);
    for (let at = first; at < last; at += ZERO_STEP_BYTES)
      await this.zeroAligned(at, Math.min(ZERO_STEP_BYTES, last - at));
    await this.writeZeros(last, end - last);
  }

  async truncate(sizeBytes: number): Promise<void> {
    if (sizeBytes === this.facts.sizeBytes) return;
    throw new B2Error(
      'refused',
      `${this.facts.path} has ${this.facts.sizeBytes} bytes and cannot become ${sizeBytes} bytes long`,
    );
  }

  async sync(): Promise<void> {
    await wrapped('sync', this.facts.path, syncFd(this.range.fd));
  }

  async close(): Promise<void> {
    if (this.closed) return;
    this.closed = true;
    await closeTolerant([this.range.fd]);
  }

  private async zeroAligned(offset: number, length: number): Promise<void> {
    // Both calls guarantee zeros when they succeed. A device may announce one and fail it: then the next is tried,
    // and the last one, plain writes, reports what is really wrong.
    if (this.zeroMethod === 'punch') {
      try {
        await punchHole(this.range.fd, offset, length);
        return;
      } catch {
        this.zeroMethod = 'zero-out';
      }
    }
    if (this.zeroMethod === 'zero-out') {
      try {
        await blkZeroOut(this.range.fd, offset, length);
        return;
      } catch {
        this.zeroMethod = 'write';
      }
    }
    await this.writeZeros(offset, length);
  }

  private async writeZeros(offset: number, length: number): Promise<void> {
    if (length === 0) return;
    await wrapped(
      `write ${length} zero bytes at offset ${offset} of`,
      this.facts.path,
      writeZeros(this.range, this.edges, offset, length),
    );
  }

  private checkInside(what: string, offset: number, length: number): void {
    if (offset >= 0 && offset + length <= this.facts.sizeBytes) return;
    throw new B2Error(
      'no-space',
      `cannot ${what} ${length} bytes at offset ${offset} of ${this.facts.path}: it ends at ${this.facts.sizeBytes}`,
    );
  }
}

/**
 * Opens a block device for writing, exclusively: rejects with `refused` if it is mounted, swap, or part of another
 * device. While it is open nobody can mount it. All I/O is direct.
 */
export async function openBlockForWriting(
  path: string,
  roots: SystemRoots = SYSTEM_ROOTS,
): Promise<WriteDevice> {
  const { facts } = await describe(path, roots);
  refuseEmpty(facts);
  if (facts.readOnly) {
    throw new B2Error('refused', `${path} is read-only`, {
      hint: 'Check the write protection (blockdev --getro).',
    });
  }
  try {
    const fd = await openFd(facts.realPath, O_RDWR | O_EXCL | O_DIRECT);
    return new BlockWriteDevice(facts, { fd, offset: 0, unitBytes: facts.logicalBlockBytes, path });
  } catch (error) {
    if (errnoOf(error) === 'EBUSY') {
      throw new B2Error(
        'refused',
        `${path} is in use: the kernel does not grant exclusive access to it`,
        {
          cause: error,
          hint: 'Unmount its file systems, turn off swap on it, stop LVM or RAID on it (lsblk shows what uses it).',
        },
      );
    }
    throw ioError('open for writing', path, error);
  }
}
