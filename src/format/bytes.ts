/**
 * Checked access to little-endian fields for the codecs. Every failure is a B2Error of kind `damaged` that names the
 * object and the offset in it.
 */
import { B2Error } from '../errors.js';

/** Throws `damaged` for object `what` at byte `offset`. */
export function damaged(what: string, offset: number, problem: string): B2Error {
  return new B2Error('damaged', `${what}: at byte ${offset}: ${problem}`, {
    hint: 'Run "b2 verify" to see what it touches and "b2 repair" to set it aside.',
  });
}

/** A u64 as a number; throws `damaged` above 2^53 − 1. */
export function readU64(buf: Buffer, offset: number, what: string): number {
  const n = buf.readUInt32LE(offset) + buf.readUInt32LE(offset + 4) * 0x1_0000_0000;
  if (!Number.isSafeInteger(n)) throw damaged(what, offset, 'a number above 2^53');
  return n;
}

/** Writes a number in [0, 2^53) as a u64. */
export function writeU64(buf: Buffer, value: number, offset: number): void {
  if (!Number.isSafeInteger(value) || value < 0) throw new RangeError(`not a u64: ${value}`);
  buf.writeUInt32LE(value % 0x1_0000_0000, offset);
  buf.writeUInt32LE(Math.floor(value / 0x1_0000_0000), offset + 4);
}

/** Throws `damaged` unless bytes [from, to) are zero. */
export function checkZero(buf: Buffer, from: number, to: number, what: string): void {
  for (let i = from; i < to; i++) {
    if (buf[i] !== 0) throw damaged(what, i, 'a reserved byte is not zero');
  }
}

/** A Buffer over the same memory as `bytes`. */
export function asBuffer(bytes: Uint8Array): Buffer {
  return Buffer.isBuffer(bytes)
    ? bytes
    : Buffer.from(bytes.buffer, bytes.byteOffset, bytes.byteLength);
}
