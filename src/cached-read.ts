/**
 * Reading what the page cache holds, at once. A read on libuv's threads costs three times the CPU time and a change of threads both
 * ways; for the 64 KiB of a frame that is more than what is done with them then.
 */
import { createRequire } from 'node:module';

type Koffi = typeof import('koffi');
type Preadv2 = (
  fd: number,
  vector: { readonly base: Uint8Array; readonly length: number },
  count: number,
  offset: number,
  flags: number,
) => number;

/** linux/fs.h */
const RWF_NOWAIT = 8;
/**
 * Bytes that may be read so in one turn of the event loop: who reads on and on must not keep timers and signals waiting for more
 * than some milliseconds.
 */
const TURN_BYTES = 2 * 1024 * 1024;

let native: Preadv2 | null | undefined;
let left = TURN_BYTES;
let isCounting = false;

function load(): Preadv2 | null {
  try {
    const koffi = createRequire(import.meta.url)('koffi') as Koffi;
    const iovec = koffi.struct({ base: 'void *', length: 'size_t' });
    const types = ['int', koffi.pointer(iovec), 'int', 'int64_t', 'int'];
    return koffi.load(null).func('preadv2', 'int64_t', types);
  } catch {
    return null; // an old libc: everything goes through the threads
  }
}

/**
 * The bytes at the beginning of the range that are in memory, without ever waiting for a disk; fewer than asked for also at the end
 * of the file. Undefined where there are none, where this cannot be done here, and where enough has been read in this turn of the event
 * loop: read them in the ordinary way then, which also tells of errors.
 */
export function readCached(fd: number, into: Uint8Array, position: number): number | undefined {
  if (into.length > left) return undefined;
  native ??= load();
  if (native === null) return undefined;
  const got = Number(native(fd, { base: into, length: into.length }, 1, position, RWF_NOWAIT));
  if (got <= 0) return undefined;
  left -= got;
  if (!isCounting) {
    isCounting = true;
    setImmediate(() => {
      isCounting = false;
      left = TURN_BYTES;
    }).unref();
  }
  return got;
}
