/**
 * Page-aligned memory. O_DIRECT wants it, and Node's own buffers are not: Buffer, ArrayBuffer and SharedArrayBuffer
 * give EINVAL, the memory of a WebAssembly.Memory always works.
 */
import { createRequire } from 'node:module';
import { B2Error, messageOf } from './errors.js';
import { roundUp } from './units.js';

/** Alignment that direct I/O asks of addresses, offsets and lengths on every device and file system we know. */
export const DIRECT_ALIGN_BYTES = 4096;

const WASM_PAGE_BYTES = 65536;
/** A 32-bit WebAssembly.Memory has at most 65536 pages. */
const MAX_BYTES = WASM_PAGE_BYTES * 65536;

// TypeScript declares WebAssembly only with the DOM library.
declare const WebAssembly: {
  readonly Memory: new (descriptor: {
    readonly initial: number;
    readonly maximum: number;
    readonly shared?: boolean;
  }) => { readonly buffer: ArrayBuffer | SharedArrayBuffer };
};

const alignedBuffers = new WeakSet<ArrayBufferLike>();

/** From this size on memory is asked for in huge pages: it is a buffer for reading and writing, and will be used whole. */
const HUGE_FROM_BYTES = 4 * 1024 * 1024;
/** sys/mman.h */
const MADV_HUGEPAGE = 14;

type Advise = (memory: Uint8Array, bytes: number, advice: number) => number;
let advise: Advise | undefined;

/**
 * Asks the kernel for pages of 2 MiB: fewer faults, and direct I/O has a five-hundredth of the pages to pin. Only advice: where it
 * cannot be given, or is not taken, everything works as well.
 */
function wantHugePages(memory: Uint8Array): void {
  try {
    advise ??= (createRequire(import.meta.url)('koffi') as typeof import('koffi'))
      .load(null)
      .func('int madvise(void *memory, size_t bytes, int advice)') as Advise;
    advise(memory, memory.byteLength, MADV_HUGEPAGE);
  } catch {
    // koffi's binary is not on this machine
  }
}

/**
 * `bytes` of zeroed memory (1 to 4 GiB) that starts on a page boundary. The view's `buffer` may be up to 64 KiB
 * longer. Each call reserves several GiB of address space (not memory) and is freed by the garbage collector only:
 * allocate a few big slabs and keep them, not one a request.
 */
export function alignedMemory(bytes: number): Uint8Array<ArrayBuffer>;
/** The same as a SharedArrayBuffer, to hand to a worker; call {@link adoptAligned} on it there. */
export function alignedMemory(bytes: number, shared: true): Uint8Array<SharedArrayBuffer>;
export function alignedMemory(bytes: number, shared = false): Uint8Array {
  if (!Number.isSafeInteger(bytes) || bytes < 1 || bytes > MAX_BYTES) {
    throw new RangeError(`size of aligned memory is out of range: ${bytes}`);
  }
  const pages = roundUp(bytes, WASM_PAGE_BYTES) / WASM_PAGE_BYTES;
  let buffer: ArrayBuffer | SharedArrayBuffer;
  try {
    ({ buffer } = new WebAssembly.Memory({ initial: pages, maximum: pages, shared }));
  } catch (error) {
    throw new B2Error(
      'failed',
      `cannot get ${bytes} bytes of page-aligned memory: ${messageOf(error)}`,
      {
        cause: error,
        hint: 'Free memory, or lift a limit on address space (ulimit -v, LimitAS= of the unit).',
      },
    );
  }
  alignedBuffers.add(buffer);
  const memory = new Uint8Array(buffer, 0, bytes);
  if (bytes >= HUGE_FROM_BYTES) wantHugePages(memory);
  return memory;
}

/** Tells this thread that `buffer` came from {@link alignedMemory} in another one. */
export function adoptAligned(buffer: SharedArrayBuffer): void {
  alignedBuffers.add(buffer);
}

/** True if direct I/O can use the memory of `view` as it is. Only memory of {@link alignedMemory} counts. */
export function isPageAligned(view: Uint8Array): boolean {
  return view.byteOffset % DIRECT_ALIGN_BYTES === 0 && alignedBuffers.has(view.buffer);
}

/** Bytes of one bounce buffer. */
export const BOUNCE_BYTES = 1024 * 1024;
/** More than libuv's default four threads can use at a time. */
const BOUNCE_SLOTS = 8;

const freeSlots: Uint8Array[] = [];
const waiting: ((slot: Uint8Array) => void)[] = [];
let slotsMade = false;

/**
 * Runs `use` with a page-aligned buffer of {@link BOUNCE_BYTES} from a pool of this thread; waits while all are taken.
 * `use` must not ask for a second one, and must not keep it. The content is whatever was in it.
 */
export async function withBounce<T>(use: (slot: Uint8Array) => Promise<T>): Promise<T> {
  if (!slotsMade) {
    const slab = alignedMemory(BOUNCE_BYTES * BOUNCE_SLOTS);
    for (let i = 0; i < BOUNCE_SLOTS; i++)
      freeSlots.push(slab.subarray(i * BOUNCE_BYTES, (i + 1) * BOUNCE_BYTES));
    slotsMade = true;
  }
  const slot =
    freeSlots.pop() ?? (await new Promise<Uint8Array>((resolve) => waiting.push(resolve)));
  try {
    return await use(slot);
  } finally {
    const next = waiting.shift();
    if (next === undefined) freeSlots.push(slot);
    else next(slot);
  }
}
