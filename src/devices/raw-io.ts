/**
 * Positioned reads and writes on a file descriptor, with or without O_DIRECT. The one place that knows what O_DIRECT
 * demands: addresses, offsets and lengths in whole units.
 */
import { close, fsync, open, read, write } from 'node:fs';

import { errnoOf, ioError } from '../errors.js';
import { BOUNCE_BYTES, isPageAligned, withBounce } from '../memory.js';
import { roundDown, roundUp } from '../units.js';

export function openFd(path: string, flags: number, mode = 0o600): Promise<number> {
  return new Promise((resolve, reject) => {
    open(path, flags, mode, (error, fd) => (error === null ? resolve(fd) : reject(error)));
  });
}

export function closeFd(fd: number): Promise<void> {
  return new Promise((resolve, reject) => {
    close(fd, (error) => (error === null || error === undefined ? resolve() : reject(error)));
  });
}

export function syncFd(fd: number): Promise<void> {
  return new Promise((resolve, reject) => {
    fsync(fd, (error) => (error === null ? resolve() : reject(error)));
  });
}

function readOnce(fd: number, into: Uint8Array, length: number, position: number): Promise<number> {
  return new Promise((resolve, reject) => {
    read(fd, into, 0, length, position, (error, bytes) =>
      error === null ? resolve(bytes) : reject(error),
    );
  });
}

function writeOnce(fd: number, data: Uint8Array, position: number): Promise<number> {
  return new Promise((resolve, reject) => {
    write(fd, data, 0, data.byteLength, position, (error, bytes) =>
      error === null ? resolve(bytes) : reject(error),
    );
  });
}

/** Reads until `length` bytes are there or the end comes. With direct I/O, `unit` keeps continued reads aligned. */
async function readLoop(
  fd: number,
  into: Uint8Array,
  length: number,
  position: number,
  unit: number,
): Promise<number> {
  let done = 0;
  for (;;) {
    const got = await readOnce(fd, into.subarray(done), length - done, position + done);
    if (done + got >= length || got === 0) return done + got;
    // A short direct read that ends inside a unit is the end of the file.
    if (got % unit !== 0) return done + got;
    done += got;
  }
}

async function writeLoop(fd: number, data: Uint8Array, position: number): Promise<void> {
  let done = 0;
  while (done < data.byteLength) {
    const put = await writeOnce(fd, data.subarray(done), position + done);
    if (put === 0)
      throw Object.assign(new Error('the device accepts no more bytes'), { code: 'EIO' });
    done += put;
  }
}

/** Where the bytes of a device are: `offset` bytes into what `fd` is. `unitBytes` is 1 without O_DIRECT. */
export interface RawRange {
  readonly fd: number;
  readonly offset: number;
  readonly unitBytes: number;
  /** For messages. */
  readonly path: string;
}

/**
 * Reads [offset, offset + length) of `range` into the start of `into` (at least `length` long); resolves to the bytes
 * read, less only where the file or device ends. An unaligned request goes through a bounce buffer.
 * Rejects with a B2Error that names path, offset and length.
 */
export async function readRange(
  range: RawRange,
  into: Uint8Array,
  offset: number,
  length: number,
): Promise<number> {
  const { fd, unitBytes } = range;
  try {
    if (unitBytes === 1) return await readLoop(fd, into, length, range.offset + offset, 1);
    const whole = roundUp(length, unitBytes);
    if (offset % unitBytes === 0 && whole <= into.byteLength && isPageAligned(into)) {
      return Math.min(length, await readLoop(fd, into, whole, range.offset + offset, unitBytes));
    }
    return await withBounce(async (slot) => {
      let done = 0;
      while (done < length) {
        const position = offset + done;
        const from = roundDown(position, unitBytes);
        const skip = position - from;
        const span = Math.min(BOUNCE_BYTES, roundUp(skip + length - done, unitBytes));
        const got = await readLoop(fd, slot, span, range.offset + from, unitBytes);
        const usable = Math.min(got - skip, length - done);
        if (usable <= 0) break;
        into.set(slot.subarray(skip, skip + usable), done);
        done += usable;
        if (got < span) break;
      }
      return done;
    });
  } catch (error) {
    if (errnoOf(error) === 'EINVAL' && unitBytes > 1) throw error;
    throw ioError(`read ${length} bytes at offset ${offset} of`, range.path, error);
  }
}

/** Serialises read-modify-write of single units, so that two writes that share a unit lose nothing. */
export class EdgeLock {
  private tail: Promise<void> = Promise.resolve();

  run(task: () => Promise<void>): Promise<void> {
    const result = this.tail.then(task);
    this.tail = result.catch(() => undefined);
    return result;
  }
}

async function patchUnit(range: RawRange, data: Uint8Array, offset: number): Promise<void> {
  const from = roundDown(offset, range.unitBytes);
  await withBounce(async (slot) => {
    const unit = slot.subarray(0, range.unitBytes);
    const got = await readLoop(
      range.fd,
      unit,
      range.unitBytes,
      range.offset + from,
      range.unitBytes,
    );
    unit.fill(0, got);
    unit.set(data, offset - from);
    await writeLoop(range.fd, unit, range.offset + from);
  });
}

/**
 * Writes all of `data` at `offset` of `range`. Unaligned edges are read, patched and written under `edges`.
 * Rejects with a B2Error that names path, offset and length.
 */
export async function writeRange(
  range: RawRange,
  edges: EdgeLock,
  data: Uint8Array,
  offset: number,
): Promise<void> {
  const { fd, unitBytes } = range;
  const end = offset + data.byteLength;
  try {
    if (unitBytes === 1) {
      await writeLoop(fd, data, range.offset + offset);
      return;
    }
    const first = Math.min(end, roundUp(offset, unitBytes));
    const last = Math.max(first, roundDown(end, unitBytes));
    if (first > offset) {
      const edge = data.subarray(0, first - offset);
      await edges.run(() => patchUnit(range, edge, offset));
    }
    const middle = data.subarray(first - offset, last - offset);
    if (middle.byteLength > 0 && isPageAligned(middle)) {
      await writeLoop(fd, middle, range.offset + first);
    } else if (middle.byteLength > 0) {
      await withBounce(async (slot) => {
        for (let done = 0; done < middle.byteLength; done += BOUNCE_BYTES) {
          const part = middle.subarray(done, done + BOUNCE_BYTES);
          slot.set(part);
          await writeLoop(fd, slot.subarray(0, part.byteLength), range.offset + first + done);
        }
      });
    }
    if (end > last) {
      const edge = data.subarray(last - offset);
      await edges.run(() => patchUnit(range, edge, last));
    }
  } catch (error) {
    if (errnoOf(error) === 'EINVAL' && unitBytes > 1) throw error;
    throw ioError(`write ${data.byteLength} bytes at offset ${offset} of`, range.path, error);
  }
}

/** Writes zeros over the range: what is left when no cheaper way exists. */
export async function writeZeros(
  range: RawRange,
  edges: EdgeLock,
  offset: number,
  length: number,
): Promise<void> {
  const zeros = zeroSlab();
  for (let done = 0; done < length;) {
    // The first piece ends on a boundary, so that the others are aligned.
    const position = offset + done;
    const span = Math.min(
      length - done,
      roundDown(position, BOUNCE_BYTES) + BOUNCE_BYTES - position,
    );
    await writeRange(range, edges, zeros.subarray(0, span), position);
    done += span;
  }
}

let zerosShared: Uint8Array | undefined;

function zeroSlab(): Uint8Array {
  zerosShared ??= new Uint8Array(BOUNCE_BYTES);
  return zerosShared;
}
