/**
 * Several positioned reads of one descriptor in two system calls, through the kernel's own asynchronous I/O (io_submit(2)). Node's reads
 * cost a thread's hand-over each, which is several times what the kernel needs for a block: with blocks that lie apart that is
 * most of what a capture does to the processors, and so to whoever else wants them.
 *
 * Truly asynchronous with O_DIRECT only. An extra: where it is not to be had (other machines, a seccomp filter, all contexts of
 * the machine in use), or a read of a batch fails, the answer is "no", and the caller reads in the usual way, which has the error.
 */
import { createRequire } from 'node:module';

import { isPageAligned } from './memory.js';

/** One read: fills `into`, of memory that {@link isPageAligned} is true for. */
export interface BatchedRead {
  readonly into: Uint8Array;
  /** In what the descriptor is. */
  readonly position: number;
}

interface Native<Args extends readonly unknown[]> {
  (...args: Args): number | bigint;
  async(...args: [...Args, (error: unknown, result: number | bigint) => void]): void;
}

interface Calls {
  readonly setup: Native<[number: number, count: number, context: Uint8Array]>;
  readonly destroy: Native<[number: number, context: bigint]>;
  readonly submit: Native<[number: number, context: bigint, count: number, list: Uint8Array]>;
  readonly events: Native<
    [number: number, context: bigint, least: number, most: number, into: Uint8Array, timeout: null]
  >;
  readonly addressOf: (view: Uint8Array, same: Uint8Array, bytes: 0) => number | bigint;
}

/** asm-generic/unistd.h, and the table of x86-64. All little-endian with pointers of 64 bits. */
const GENERIC = { setup: 0, destroy: 1, submit: 2, events: 4 } as const;
const NUMBERS: Readonly<
  Record<string, { readonly [call in keyof typeof GENERIC]: number } | undefined>
> = {
  x64: { setup: 206, destroy: 207, submit: 209, events: 208 },
  arm64: GENERIC,
  riscv64: GENERIC,
  loong64: GENERIC,
};

// linux/aio_abi.h: struct iocb and struct io_event.
const IOCB_BYTES = 64;
const IOCB_DATA_AT = 0;
const IOCB_OPCODE_AT = 16;
const IOCB_FD_AT = 20;
const IOCB_BUF_AT = 24;
const IOCB_BYTES_AT = 32;
const IOCB_OFFSET_AT = 40;
const IOCB_CMD_PREAD = 0;
const EVENT_BYTES = 32;
const EVENT_DATA_AT = 0;
const EVENT_RESULT_AT = 16;
const POINTER_BYTES = 8;
/** Whether a view of fewer bytes has memory of its own, or a place in V8's heap that moves, is V8's to decide. */
const MIN_MEMORY_BYTES = 4096;
/** Of waiting for one batch. */
const MAX_FAILURES = 100;

let loaded: Calls | 'missing' | undefined;

function calls(): Calls | undefined {
  if (loaded === undefined) {
    try {
      const lib = (createRequire(import.meta.url)('koffi') as typeof import('koffi')).load(null);
      loaded = {
        setup: lib.func(
          'int64_t syscall(int64_t number, int64_t count, void *context)',
        ) as Calls['setup'],
        destroy: lib.func('int64_t syscall(int64_t number, uint64_t context)') as Calls['destroy'],
        submit: lib.func(
          'int64_t syscall(int64_t number, uint64_t context, int64_t count, void *list)',
        ) as Calls['submit'],
        events: lib.func(
          'int64_t syscall(int64_t number, uint64_t context, int64_t least, int64_t most, void *into, void *timeout)',
        ) as Calls['events'],
        // Copies nothing and returns where it would have.
        addressOf: lib.func(
          'uint64_t memcpy(void *to, const void *from, size_t bytes)',
        ) as Calls['addressOf'],
      };
    } catch {
      loaded = 'missing'; // koffi's binary is not on this machine
    }
  }
  return loaded === 'missing' ? undefined : loaded;
}

function inBackground<Args extends readonly unknown[]>(
  native: Native<Args>,
  ...args: Args
): Promise<number> {
  return new Promise((resolve, reject) => {
    native.async(...args, (error, result) => {
      if (error === null || error === undefined) resolve(Number(result));
      else reject(error instanceof Error ? error : new Error('a system call could not be made'));
    });
  });
}

/** A context of the kernel for batches of reads. `close` it. */
export class ReadBatch {
  readonly maxReads: number;
  private readonly calls: Calls;
  private readonly numbers: (typeof NUMBERS)[string] & object;
  private readonly context: bigint;
  /** Requests, then pointers to them, then their results. */
  private readonly memory: Buffer;
  private readonly memoryAt: bigint;
  private readonly pointers: Buffer;
  private readonly results: Buffer;
  private busy: Promise<unknown> | undefined;
  private closed = false;
  /** Where buffers lie: they are few, and stay. */
  private readonly addresses = new WeakMap<ArrayBufferLike, bigint>();

  private constructor(
    maxReads: number,
    native: Calls,
    numbers: (typeof NUMBERS)[string] & object,
    context: bigint,
  ) {
    this.maxReads = maxReads;
    this.calls = native;
    this.numbers = numbers;
    this.context = context;
    const pointersAt = maxReads * IOCB_BYTES;
    const resultsAt = pointersAt + maxReads * POINTER_BYTES;
    this.memory = Buffer.allocUnsafeSlow(
      Math.max(MIN_MEMORY_BYTES, resultsAt + maxReads * EVENT_BYTES),
    ).fill(0);
    this.pointers = this.memory.subarray(pointersAt, resultsAt);
    this.results = this.memory.subarray(resultsAt);
    this.memoryAt = this.addressOf(this.memory);
    for (let i = 0; i < maxReads; i++) {
      this.memory.writeBigUInt64LE(BigInt(i), i * IOCB_BYTES + IOCB_DATA_AT);
      this.memory.writeUInt16LE(IOCB_CMD_PREAD, i * IOCB_BYTES + IOCB_OPCODE_AT);
      this.pointers.writeBigUInt64LE(this.memoryAt + BigInt(i * IOCB_BYTES), i * POINTER_BYTES);
    }
  }

  /** For up to `maxReads` at a time; undefined where the machine does not offer it. */
  static open(maxReads: number): ReadBatch | undefined {
    const numbers = process.platform === 'linux' ? NUMBERS[process.arch] : undefined;
    const native = numbers === undefined ? undefined : calls();
    if (numbers === undefined || native === undefined) return undefined;
    const context = Buffer.allocUnsafeSlow(MIN_MEMORY_BYTES).fill(0);
    if (Number(native.setup(numbers.setup, maxReads, context)) !== 0) return undefined;
    return new ReadBatch(maxReads, native, numbers, context.readBigUInt64LE(0));
  }

  /**
   * Makes up to `maxReads` reads of `fd` and resolves, when all are over, to whether each has filled its buffer. Every answer is
   * false while another batch is under way, or after `close`. Rejects only if the reads cannot be waited for.
   */
  async read(fd: number, reads: readonly BatchedRead[]): Promise<readonly boolean[]> {
    if (reads.length > this.maxReads)
      throw new RangeError(`a batch of ${reads.length} reads, of ${this.maxReads} at most`);
    if (this.closed || this.busy !== undefined || !reads.every((r) => isPageAligned(r.into)))
      return reads.map(() => false);
    const batch = this.make(fd, reads);
    this.busy = batch.catch(() => undefined);
    try {
      return await batch;
    } finally {
      this.busy = undefined;
    }
  }

  private async make(fd: number, reads: readonly BatchedRead[]): Promise<readonly boolean[]> {
    const done = reads.map(() => false);
    reads.forEach(({ into, position }, i) => {
      const at = i * IOCB_BYTES;
      this.memory.writeInt32LE(fd, at + IOCB_FD_AT);
      this.memory.writeBigUInt64LE(this.addressOf(into), at + IOCB_BUF_AT);
      this.memory.writeBigUInt64LE(BigInt(into.byteLength), at + IOCB_BYTES_AT);
      this.memory.writeBigInt64LE(BigInt(position), at + IOCB_OFFSET_AT);
    });
    const { calls: native, numbers, context, pointers, results } = this;
    // Waits where the device's queue is full: not this thread.
    const count = await inBackground(
      native.submit,
      numbers.submit,
      context,
      reads.length,
      pointers,
    );
    let failures = 0;
    for (let left = Math.max(0, count); left > 0;) {
      const got = await inBackground(
        native.events,
        numbers.events,
        context,
        left,
        left,
        results,
        null,
      );
      if (got <= 0) {
        // A signal, as a rule: that says nothing of the reads, and they go on.
        if (++failures < MAX_FAILURES) continue;
        // Waits for all of them: what they fill may be used again then.
        this.closed = true;
        await inBackground(native.destroy, numbers.destroy, context);
        return reads.map(() => false);
      }
      for (let k = 0; k < got; k++) {
        const i = Number(results.readBigUInt64LE(k * EVENT_BYTES + EVENT_DATA_AT));
        const bytes = results.readBigInt64LE(k * EVENT_BYTES + EVENT_RESULT_AT);
        done[i] = bytes === BigInt(reads[i]?.into.byteLength ?? -1);
      }
      left -= got;
    }
    return done;
  }

  private addressOf(view: Uint8Array): bigint {
    let base = this.addresses.get(view.buffer);
    if (base === undefined) {
      const whole = new Uint8Array(view.buffer);
      base = BigInt(this.calls.addressOf(whole, whole, 0));
      this.addresses.set(view.buffer, base);
    }
    return base + BigInt(view.byteOffset);
  }

  /** Waits for what is under way. Calling it again does nothing. */
  async close(): Promise<void> {
    if (this.closed) return;
    this.closed = true;
    await this.busy;
    this.calls.destroy(this.numbers.destroy, this.context);
  }
}
