/**
 * LZ4 block format (lz4_Block_format.md of the LZ4 project): liblz4.so.1 through koffi where it loads, else the
 * `lz4-napi` package (a third of the speed, the same format).
 */
import { createRequire } from 'node:module';

/** Works on buffers only; keeps no state between calls. One instance per thread. */
export interface Lz4 {
  /** Which library does the work, for `b2 --version --verbose` and benchmarks. */
  readonly implementation: 'liblz4' | 'lz4-napi';
  /**
   * Compresses `src` into `dst` and returns the compressed length, or 0 if it does not fit (so that the caller sets the
   * gain it wants by the length of `dst`).
   */
  compress(src: Uint8Array, dst: Uint8Array): number;
  /** Decompresses `src` into `dst`. Returns false unless the result fills `dst` exactly and `src` is well formed. */
  decompress(src: Uint8Array, dst: Uint8Array): boolean;
  /** The same of `bytes` bytes of `src` from `at`. RangeError if they are not there. Cheaper: no object for each. */
  decompressPart(src: Buffer, at: number, bytes: number, dst: Uint8Array): boolean;
}

function checkPart(src: Buffer, at: number, bytes: number): void {
  if (at < 0 || bytes < 0 || at + bytes > src.length)
    throw new RangeError('what is to be decompressed is not there');
}

const require = createRequire(import.meta.url);
/** Bytes of LZ4_stream_t: LZ4_sizeofState() of every liblz4 1.x is at most this. */
const STATE_BYTES = 32_768;

function openLibrary(): Lz4 | undefined {
  try {
    const koffi = require('koffi') as typeof import('koffi');
    const lib = koffi.load('liblz4.so.1');
    const sizeofState = lib.func('int LZ4_sizeofState()') as () => number;
    if (sizeofState() > STATE_BYTES) return undefined;
    const state = Buffer.alloc(STATE_BYTES);
    const compress = lib.func(
      'int LZ4_compress_fast_extState(void*, const void*, void*, int, int, int)',
    ) as (
      s: Buffer,
      src: Uint8Array,
      dst: Uint8Array,
      n: number,
      cap: number,
      acc: number,
    ) => number;
    const decompress = lib.func('int LZ4_decompress_safe(const void*, void*, int, int)') as (
      src: Uint8Array,
      dst: Uint8Array,
      n: number,
      cap: number,
    ) => number;
    // Called with an address: koffi need not look for what lies behind a Buffer.
    const decompressAt = lib.func('int LZ4_decompress_safe(uintptr_t, void*, int, int)') as (
      src: number,
      dst: Uint8Array,
      n: number,
      cap: number,
    ) => number;
    // Memory of a Buffer never moves while the Buffer is alive.
    let last: Buffer | undefined;
    let address = 0;
    return {
      implementation: 'liblz4',
      compress: (src, dst) => {
        if (src.byteLength === 0 || dst.byteLength === 0) return 0;
        return compress(state, src, dst, src.byteLength, dst.byteLength, 1);
      },
      decompress: (src, dst) =>
        src.byteLength > 0 &&
        decompress(src, dst, src.byteLength, dst.byteLength) === dst.byteLength,
      decompressPart: (src, at, bytes, dst) => {
        checkPart(src, at, bytes);
        if (src !== last) {
          address = Number(koffi.address(src));
          last = src;
        }
        return (
          bytes > 0 && decompressAt(address + at, dst, bytes, dst.byteLength) === dst.byteLength
        );
      },
    };
  } catch {
    return undefined; // the library or koffi's binary is not on this machine: the fallback is the answer
  }
}

/** The portable implementation, also used to test the other one against. */
export function openLz4Napi(): Lz4 {
  const napi = require('lz4-napi') as typeof import('lz4-napi');
  return {
    implementation: 'lz4-napi',
    decompressPart(src, at, bytes, dst) {
      checkPart(src, at, bytes);
      return this.decompress(src.subarray(at, at + bytes), dst);
    },
    compress: (src, dst) => {
      if (src.byteLength === 0) return 0;
      // The package puts the plain length (u32) before the block.
      const out = napi.compressSync(Buffer.from(src.buffer, src.byteOffset, src.byteLength));
      const length = out.byteLength - 4;
      if (length > dst.byteLength) return 0;
      dst.set(out.subarray(4));
      return length;
    },
    decompress: (src, dst) => {
      const framed = Buffer.allocUnsafe(src.byteLength + 4);
      framed.writeUInt32LE(dst.byteLength, 0);
      framed.set(src, 4);
      try {
        const out = napi.uncompressSync(framed);
        if (out.byteLength !== dst.byteLength) return false;
        dst.set(out);
        return true;
      } catch {
        return false; // not a well-formed block
      }
    },
  };
}

let shared: Lz4 | undefined;

/** This thread's LZ4. `B2_LZ4=napi` forces the fallback (tests, benchmarks). */
export function lz4(): Lz4 {
  shared ??= (process.env['B2_LZ4'] === 'napi' ? undefined : openLibrary()) ?? openLz4Napi();
  return shared;
}
