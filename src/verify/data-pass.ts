/** Verifying the data of packs, the part that one thread does. */
import { isKind, messageOf } from '../errors.js';
import { FrameType, type ChunkEntry } from '../format/frame.js';
import type { FooterFrame } from '../format/pack.js';
import type { Sealer } from '../format/seal.js';
import { HASH_BYTES } from '../hash.js';
import {
  OpenPack,
  openFrameBytes,
  verifiedChunks,
  type PackReadContext,
} from '../repo/pack-reader.js';
import { bulkRead, readSlots, type LoadedPiece, type PackFrames } from '../restore/bulk-read.js';
import { ChunkRoom, SingleChunks } from '../restore/single.js';
import { roundUp } from '../units.js';

/** A pack whose data is to be verified. */
export interface PackToVerify {
  readonly packId: string;
  /** Only these frames; default all. */
  readonly frames?: readonly number[];
}

/**
 * What is wrong:
 * - `missing`: there is no such pack;
 * - `pack`: it cannot be opened (header, or an error of the store);
 * - `frame`: the frame's bytes are not what they were; `unreadable`: the store cannot read them;
 * - `footer`: the footer says other chunk ids than the frame;
 * - `absent`: the pack has no frame of that number.
 */
export type DataFindingKind = 'missing' | 'pack' | 'frame' | 'unreadable' | 'footer' | 'absent';

/** One damaged thing. JSON-able. */
export interface DataFinding {
  readonly kind: DataFindingKind;
  readonly packId: string;
  /** Absent for `missing` and `pack`. */
  readonly frame?: number;
  /** Where the frame starts in the pack. */
  readonly offsetBytes?: number;
  /** Its length there, header included. */
  readonly lengthBytes?: number;
  readonly reason: string;
}

/** What a pack was when its data were read. JSON-able. */
export interface ReadPack {
  readonly packId: string;
  readonly generation: number;
  readonly sizeBytes: number;
}

/** A pack without a (sound) footer: being written, left by a crash, or damaged at its end. JSON-able. */
export interface UnsealedPack {
  readonly packId: string;
  /** Bytes up to which frames are valid; the structure check judges what lies behind. */
  readonly validBytes: number;
}

export interface DataTotals {
  packs: number;
  frames: number;
  chunks: number;
  /** Bytes of packs that were read. */
  storedBytes: number;
  /** Bytes of chunks that were verified. */
  plainBytes: number;
}

export interface DataPassHost {
  /** Index of the next pack to work on, or undefined to stop. */
  claim(): number | undefined;
  isAborted(): boolean;
  /** Called for every piece read. */
  progress(storedBytes: number): void;
  finding(finding: DataFinding): void;
  opened(pack: ReadPack): void;
  unsealed(pack: UnsealedPack): void;
}

/** Takes the next of `count` packs, or none if enough has been done. `control` as in the job of data-worker.ts. */
export function claimPack(control: Int32Array, count: number): number | undefined {
  if (Atomics.load(control, 1) !== 0) return undefined;
  const index = Atomics.add(control, 0, 1);
  return index < count ? index : undefined;
}

const PACK_FAILURES = ['damaged', 'io', 'not-found', 'unsupported'] as const;

/** Verifies packs until none is left to claim. Damage is reported, not thrown. */
export async function verifyPass(
  ctx: PackReadContext,
  list: readonly PackToVerify[],
  host: DataPassHost,
): Promise<DataTotals> {
  const totals: DataTotals = { packs: 0, frames: 0, chunks: 0, storedBytes: 0, plainBytes: 0 };
  const sealers = new Map<OpenPack, { readonly sealer: Sealer; readonly single: SingleChunks }>();
  const room = new ChunkRoom();
  let scratch = Buffer.alloc(0);

  async function* packs(): AsyncGenerator<PackFrames<number>, void> {
    for (;;) {
      const index = host.isAborted() ? undefined : host.claim();
      const wanted = index === undefined ? undefined : list[index];
      if (wanted === undefined) return;
      const { packId } = wanted;
      totals.packs++;
      let pack: OpenPack;
      try {
        pack = await OpenPack.open(ctx, packId);
      } catch (error) {
        if (!isKind(error, ...PACK_FAILURES)) throw error;
        const kind =
          error.cause !== undefined && isKind(error.cause, 'not-found') ? 'missing' : 'pack';
        host.finding({ kind, packId, reason: messageOf(error) });
        continue;
      }
      host.opened({ packId, generation: pack.header.generation, sizeBytes: pack.sizeBytes });
      if (!pack.sealed) host.unsealed({ packId, validBytes: pack.validBytes });
      const only = wanted.frames === undefined ? undefined : new Set(wanted.frames);
      const frames: { frame: FooterFrame; tag: number }[] = [];
      let chunk = 0;
      for (const frame of pack.footer.frames) {
        if (only === undefined || only.delete(frame.number)) frames.push({ frame, tag: chunk });
        chunk += frame.count;
      }
      for (const number of only ?? []) {
        host.finding({
          kind: 'absent',
          packId,
          frame: number,
          reason: 'the pack has no such frame',
        });
      }
      if (frames.length === 0) {
        await pack.close();
        continue;
      }
      const sealer = ctx.keys.packSealer(packId);
      sealers.set(pack, { sealer, single: new SingleChunks(ctx, packId, sealer, room) });
      yield { pack, frames };
    }
  }

  /** Throws `damaged` unless the frame is right; says if only the footer is wrong about it. */
  const verify = (
    pack: OpenPack,
    sealer: Sealer,
    frame: FooterFrame,
    chunk: number,
    bytes: Buffer,
  ): string | undefined => {
    if (scratch.length < frame.plainBytes)
      scratch = Buffer.allocUnsafeSlow(roundUp(frame.plainBytes, 65536));
    const open = openFrameBytes(
      ctx,
      sealer,
      pack.packId,
      bytes,
      scratch.subarray(0, frame.plainBytes),
    );
    const { header } = open;
    if (
      header.number !== frame.number ||
      header.type !== frame.type ||
      header.count !== frame.count
    ) {
      return 'another frame lies where the footer says this one is';
    }
    if (header.type !== FrameType.chunks) return undefined;
    const { entries } = verifiedChunks(open, pack.packId, ctx.keys);
    totals.chunks += entries.length;
    totals.plainBytes += header.plainBytes;
    return entries.some((entry, i) => !footerAgrees(pack, chunk + i, entry))
      ? 'the footer says another id or length of a chunk'
      : undefined;
  };

  /** True if the frame is right and holds one chunk. */
  const quick = (
    single: SingleChunks,
    pack: OpenPack,
    frame: FooterFrame,
    chunk: number,
    bytes: Buffer,
    at: number,
  ): boolean => {
    if (frame.type !== FrameType.chunks || frame.count !== 1) return false;
    const { ids, lengths } = pack.footer;
    if (!single.check(frame, bytes, at) || !single.hasId(ids, chunk * HASH_BYTES)) return false;
    if (lengths[chunk] !== frame.plainBytes) return false;
    totals.chunks++;
    totals.plainBytes += frame.plainBytes;
    return true;
  };

  /** Goes through the frames from `at` on as long as they are right and hold one chunk; returns the index of the first that does not. */
  const quickFrames = (piece: LoadedPiece<number>, at: number): number => {
    const { pack, frames, failure } = piece;
    const single = sealers.get(pack)?.single;
    if (failure !== undefined || single === undefined) return at;
    for (let i = at; i < frames.length; i++) {
      const wanted = frames[i];
      const start = wanted === undefined ? -1 : piece.offsetOf(wanted.frame);
      if (wanted === undefined || start < 0) return i;
      if (!quick(single, pack, wanted.frame, wanted.tag, piece.bytes, start)) return i;
      totals.frames++;
    }
    return frames.length;
  };

  const check = async (
    pack: OpenPack,
    frame: FooterFrame,
    chunk: number,
    bytes: Buffer | undefined,
  ): Promise<void> => {
    const opener = sealers.get(pack);
    if (opener === undefined) throw new Error('a pack without a sealer');
    const { sealer } = opener;
    totals.frames++;
    const at = {
      packId: pack.packId,
      frame: frame.number,
      offsetBytes: frame.offset,
      lengthBytes: frame.storedBytes + 32,
    };
    let problem: string | undefined;
    if (bytes !== undefined) {
      try {
        problem = verify(pack, sealer, frame, chunk, bytes);
        if (problem === undefined) return;
      } catch (error) {
        if (!isKind(error, 'damaged')) throw error;
      }
    }
    // Once more, by itself and through a footer read now: a read of many frames may have failed because of another one,
    // and compaction may have moved this one.
    try {
      const fresh = await OpenPack.open(ctx, pack.packId);
      try {
        const now = fresh.frame(frame.number);
        if (now === undefined) return; // dropped by compaction: nothing uses it
        const again = Buffer.allocUnsafe(now.storedBytes + 32);
        const got = await fresh.readRaw(again, now.offset);
        if (got < again.length) {
          host.finding({ kind: 'frame', ...at, reason: 'the pack ends within the frame' });
          return;
        }
        let first = 0;
        for (const f of fresh.footer.frames) {
          if (f.number === frame.number) break;
          first += f.count;
        }
        problem = verify(fresh, sealer, now, first, again);
        if (problem !== undefined) host.finding({ kind: 'footer', ...at, reason: problem });
      } finally {
        await fresh.close();
      }
    } catch (error) {
      if (!isKind(error, ...PACK_FAILURES)) throw error;
      host.finding({
        kind: error.kind === 'damaged' ? 'frame' : 'unreadable',
        ...at,
        reason: messageOf(error),
      });
    }
  };

  let before: OpenPack | undefined;
  for await (const piece of bulkRead(packs(), readSlots())) {
    if (host.isAborted()) break;
    if (before !== piece.pack) {
      if (before !== undefined) sealers.delete(before);
      before = piece.pack;
    }
    totals.storedBytes += piece.readBytes;
    for (let at = 0; ; at++) {
      at = quickFrames(piece, at);
      const wanted = piece.frames[at];
      if (wanted === undefined) break;
      const bytes = piece.failure === undefined ? piece.bytesOf(wanted.frame) : undefined;
      await check(piece.pack, wanted.frame, wanted.tag, bytes);
    }
    host.progress(piece.readBytes);
  }
  return totals;
}

function footerAgrees(pack: OpenPack, chunk: number, entry: ChunkEntry): boolean {
  const { ids, lengths } = pack.footer;
  return (
    lengths[chunk] === entry.lengthBytes &&
    entry.id.compare(ids, chunk * HASH_BYTES, (chunk + 1) * HASH_BYTES) === 0
  );
}
