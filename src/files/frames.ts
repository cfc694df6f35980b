/** The frames that the tiny VM sends (guest.ts has their layout). Pure. */
import { B2Error } from '../errors.js';

export type Frame =
  | { readonly type: 'ready' }
  | { readonly type: 'data'; readonly bytes: Buffer }
  | { readonly type: 'end'; readonly status: number; readonly stderr: string };

const MAX_HEADER_BYTES = 64;

/** Takes the stream in pieces. Data is handed on as it comes, a frame of it maybe in several parts. Throws `failed` on nonsense. */
export class FrameParser {
  #rest = Buffer.alloc(0);
  /** What follows: bytes of data, or of a script's stderr. */
  #dataLeft = 0;
  #end: { readonly status: number; readonly length: number } | undefined;

  take(piece: Buffer): Frame[] {
    const frames: Frame[] = [];
    let bytes = this.#rest.length === 0 ? piece : Buffer.concat([this.#rest, piece]);
    while (bytes.length > 0) {
      if (this.#dataLeft > 0) {
        const part = bytes.subarray(0, this.#dataLeft);
        frames.push({ type: 'data', bytes: part });
        this.#dataLeft -= part.length;
        bytes = bytes.subarray(part.length);
        continue;
      }
      if (this.#end !== undefined) {
        const { status, length } = this.#end;
        if (bytes.length < length) break;
        frames.push({ type: 'end', status, stderr: bytes.toString('utf8', 0, length) });
        this.#end = undefined;
        bytes = bytes.subarray(length);
        continue;
      }
      const newline = bytes.indexOf(10);
      if (newline < 0) {
        if (bytes.length > MAX_HEADER_BYTES) throw nonsense(bytes);
        break;
      }
      const frame = this.#header(bytes, newline);
      bytes = bytes.subarray(newline + 1);
      if (frame !== undefined) frames.push(frame);
    }
    this.#rest = Buffer.from(bytes);
    return frames;
  }

  #header(bytes: Buffer, newline: number): Frame | undefined {
    const match = /^(?:(R)|D(\d{1,7})|X(\d{1,3}) (\d{1,7}))$/.exec(
      bytes.toString('latin1', 0, newline),
    );
    if (match === null) throw nonsense(bytes);
    if (match[1] !== undefined) return { type: 'ready' };
    if (match[2] !== undefined) {
      this.#dataLeft = Number(match[2]);
      return undefined;
    }
    const status = Number(match[3]);
    const length = Number(match[4]);
    if (length === 0) return { type: 'end', status, stderr: '' };
    this.#end = { status, length };
    return undefined;
  }
}

function nonsense(bytes: Buffer): B2Error {
  const start = JSON.stringify(bytes.toString('latin1', 0, MAX_HEADER_BYTES));
  return new B2Error('failed', `the tiny virtual machine sent something senseless: ${start}`);
}
