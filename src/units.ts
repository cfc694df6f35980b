/** Sizes that the format and the engines share, and checked arithmetic on offsets. */

/** Bytes of a block, the granularity of change. Fixed by the format. */
export const BLOCK_BYTES = 4096;

/** Bytes of a device are at most this (2^53 − 4096): every byte offset is an exact JavaScript number. */
export const MAX_DEVICE_BYTES = Number.MAX_SAFE_INTEGER - 4095;

/** Blocks that `bytes` bytes occupy (the last may be short). */
export function blocksOf(bytes: number): number {
  return Math.ceil(bytes / BLOCK_BYTES);
}

/** `value` as a number; throws RangeError unless it is an integer in [0, 2^53). `what` names it in the message. */
export function safeNumber(value: bigint | number, what: string): number {
  const n = Number(value);
  if (!Number.isSafeInteger(n) || n < 0) throw new RangeError(`${what} is out of range: ${value}`);
  return n;
}

/** `n` rounded up to a multiple of `step` (`step` > 0). */
export function roundUp(n: number, step: number): number {
  return Math.ceil(n / step) * step;
}

/** `n` rounded down to a multiple of `step` (`step` > 0). */
export function roundDown(n: number, step: number): number {
  return Math.floor(n / step) * step;
}
