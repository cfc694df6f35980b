/**
 * Reads many frames of packs in big, page-aligned, sequential pieces, one piece ahead of whoever works on them.
 * Neighbouring frames come in one piece, and gaps too small to be worth a second request are read through.
 */
import type { FooterFrame } from '../format/pack.js';
import { FRAME_HEADER_BYTES } from '../format/frame.js';
import { DIRECT_ALIGN_BYTES, alignedMemory } from '../memory.js';
import type { OpenPack } from '../repo/pack-reader.js';
import { roundDown, roundUp } from '../units.js';

/** Bytes of one read. */
export const READ_BYTES = 4 * 1024 * 1024;
/** Gaps of at most this are read through: at 500 MB/s that takes as long as a request more on an SSD, and much less than a seek. */
export const GAP_BYTES = 128 * 1024;

/** A frame wanted, with what its consumer needs to know. */
export interface WantedFrame<T> {
  readonly frame: FooterFrame;
  readonly tag: T;
}

/** One pack and the frames wanted of it, in order of number. */
export interface PackFrames<T> {
  readonly pack: OpenPack;
  readonly frames: readonly WantedFrame<T>[];
}

/** A piece that was read. Valid until the next one is asked for. */
export interface LoadedPiece<T> {
  readonly pack: OpenPack;
  readonly frames: readonly WantedFrame<T>[];
  /** Why the read failed, if it did; then no bytes are valid. */
  readonly failure: unknown;
  /** Bytes of the file that were read for this piece. */
  readonly readBytes: number;
  /** What was read. */
  readonly bytes: Buffer;
  /** Where in `bytes` one of its frames starts, with its header, or −1 if the pack ended before its end. */
  offsetOf(frame: FooterFrame): number;
  /** The bytes of one of its frames, header included, or undefined if the pack ended before. */
  bytesOf(frame: FooterFrame): Buffer | undefined;
}

interface Piece<T> {
  readonly pack: OpenPack;
  readonly frames: readonly WantedFrame<T>[];
  readonly offset: number;
  readonly length: number;
}

const endOf = (f: FooterFrame): number => f.offset + FRAME_HEADER_BYTES + f.storedBytes;

/** How the frames of one pack are read: a list of pieces. */
export function piecesOf<T>(
  frames: readonly WantedFrame<T>[],
): { from: number; to: number; offset: number; length: number }[] {
  const pieces: { from: number; to: number; offset: number; length: number }[] = [];
  let from = 0;
  while (from < frames.length) {
    const first = frames[from];
    if (first === undefined) break;
    const offset = roundDown(first.frame.offset, DIRECT_ALIGN_BYTES);
    let end = endOf(first.frame);
    let to = from + 1;
    for (; to < frames.length; to++) {
      const next = frames[to];
      if (next === undefined) break;
      const nextEnd = endOf(next.frame);
      if (next.frame.offset < end || next.frame.offset - end > GAP_BYTES) break;
      if (roundUp(nextEnd, DIRECT_ALIGN_BYTES) - offset > READ_BYTES) break;
      end = nextEnd;
    }
    pieces.push({ from, to, offset, length: roundUp(end, DIRECT_ALIGN_BYTES) - offset });
    from = to;
  }
  return pieces;
}

/** Two buffers of {@link READ_BYTES}, to be kept and used again: their memory is freed late. */
export function readSlots(): readonly [Buffer, Buffer] {
  const slab = alignedMemory(READ_BYTES * 2);
  return [
    Buffer.from(slab.buffer, 0, READ_BYTES),
    Buffer.from(slab.buffer, READ_BYTES, READ_BYTES),
  ];
}

/**
 * Reads what `source` names. Every pack that `source` yields is closed when its last piece is done, also when the
 * consumer stops early. Errors of `source` are thrown; errors of reading are handed on in the piece.
 */
export async function* bulkRead<T>(
  source: AsyncIterable<PackFrames<T>>,
  slots: readonly [Buffer, Buffer],
): AsyncGenerator<LoadedPiece<T>, void> {
  const open = new Set<OpenPack>();
  const pieces = (async function* (): AsyncGenerator<Piece<T>, void> {
    for await (const { pack, frames } of source) {
      open.add(pack);
      for (const p of piecesOf(frames)) {
        yield { pack, frames: frames.slice(p.from, p.to), offset: p.offset, length: p.length };
      }
    }
  })();
  let turn = 0;
  const begin = async (): Promise<LoadedPiece<T> | undefined> => {
    const next = await pieces.next();
    if (next.done === true) return undefined;
    const { pack, frames, offset, length } = next.value;
    turn ^= 1;
    // A single frame larger than a slot (up to 16 MiB) is rare: it gets memory of its own.
    const into =
      length <= READ_BYTES
        ? slots[turn === 0 ? 0 : 1].subarray(0, length)
        : Buffer.allocUnsafeSlow(length);
    let got = 0;
    let failure: unknown;
    try {
      got = await pack.readRaw(into, offset);
    } catch (error) {
      failure = error;
    }
    return {
      pack,
      frames,
      failure,
      readBytes: got,
      bytes: into,
      offsetOf: (frame) => (endOf(frame) - offset <= got ? frame.offset - offset : -1),
      bytesOf(frame) {
        const from = frame.offset - offset;
        const end = endOf(frame) - offset;
        return end <= got ? into.subarray(from, end) : undefined;
      },
    };
  };
  let ahead = begin();
  ahead.catch(() => undefined);
  let before: OpenPack | undefined;
  try {
    for (;;) {
      const loaded = await ahead;
      if (before !== undefined && loaded?.pack !== before) {
        open.delete(before);
        await before.close();
      }
      if (loaded === undefined) return;
      before = loaded.pack;
      ahead = begin();
      ahead.catch(() => undefined); // seen when it is awaited
      yield loaded;
    }
  } finally {
    await ahead.catch(() => undefined);
    await pieces.return();
    for (const pack of open) await pack.close();
  }
}
