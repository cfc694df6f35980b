/**
 * Saves what can be saved of one pack: finds every frame whose seal opens, also behind damage, and writes a header or footer that is
 * damaged anew. The bytes of frames are never touched, and stay where they are.
 */
import { isKind } from '../errors.js';
import {
  FRAME_HEADER_BYTES,
  FRAME_MAGIC,
  FrameType,
  decodeChunkEntries,
  decodeFrameHeader,
  type FrameHeader,
} from '../format/frame.js';
import { packName } from '../format/names.js';
import {
  PACK_HEADER_BYTES,
  PACK_TRAILER_BYTES,
  decodePackHeader,
  decodeTrailer,
  encodeFooter,
  encodePackHeader,
  type FooterFrame,
  type PackFooter,
} from '../format/pack.js';
import { openFrameBytes, verifiedChunks } from '../repo/pack-reader.js';
import type { Repository } from '../repo/repository.js';

/** A frame whose header is there and whose seal does not open. */
export interface DamagedFrame {
  readonly number: number;
  readonly offset: number;
  readonly reason: string;
}

export interface Salvage {
  /** Everything that opens, in order. */
  readonly footer: PackFooter;
  readonly damaged: readonly DamagedFrame[];
  /** There is a footer, or what is left of one. */
  readonly wasSealed: boolean;
  readonly headerGood: boolean;
}

const MAGIC = Buffer.alloc(4);
MAGIC.writeUInt32LE(FRAME_MAGIC, 0);
const TRAILER_MAGIC = Buffer.from('B2PE', 'latin1');

/** Looks for frames in the bytes of a pack. Pure. */
export function salvagePack(
  repo: Pick<Repository, 'packContext' | 'id'>,
  packId: string,
  bytes: Buffer,
): Salvage {
  const ctx = repo.packContext();
  const sealer = ctx.keys.packSealer(packId);
  const frames: FooterFrame[] = [];
  const ids: Buffer[] = [];
  const lengths: number[] = [];
  const damaged: DamagedFrame[] = [];
  let wasSealed =
    bytes.length >= PACK_TRAILER_BYTES &&
    decodeTrailer(bytes.subarray(bytes.length - PACK_TRAILER_BYTES), bytes.length) !== undefined;
  let last = -1;
  const headerAt = (at: number): FrameHeader | undefined => {
    try {
      const h = decodeFrameHeader(bytes, at, 'frame');
      if (at + FRAME_HEADER_BYTES + h.storedBytes > bytes.length) return undefined;
      return h.type === FrameType.footer || h.number > last ? h : undefined;
    } catch (error) {
      if (!isKind(error, 'damaged')) throw error;
      return undefined;
    }
  };
  for (let at = PACK_HEADER_BYTES; at + FRAME_HEADER_BYTES <= bytes.length;) {
    const h = headerAt(at);
    if (h === undefined) {
      const next = bytes.indexOf(MAGIC, at + 1);
      if (next < 0) break;
      at = next;
      continue;
    }
    const end = at + FRAME_HEADER_BYTES + h.storedBytes;
    if (h.type === FrameType.footer) {
      wasSealed = true;
      at = bytes.subarray(end, end + 4).equals(TRAILER_MAGIC) ? end + PACK_TRAILER_BYTES : end;
      continue;
    }
    try {
      const open = openFrameBytes(ctx, sealer, packId, bytes.subarray(at, end));
      if (h.type === FrameType.chunks) {
        verifiedChunks(open, packId, ctx.keys);
        for (const e of decodeChunkEntries(open.head, h, 'frame')) {
          ids.push(Buffer.from(e.id));
          lengths.push(e.lengthBytes);
        }
      }
      last = h.number;
      frames.push({
        number: h.number,
        offset: at,
        storedBytes: h.storedBytes,
        plainBytes: h.plainBytes,
        type: h.type,
        compression: h.compression,
        count: h.count,
      });
      at = end;
    } catch (error) {
      if (!isKind(error, 'damaged')) throw error;
      damaged.push({ number: h.number, offset: at, reason: error.message });
      // Its header is right, so the next frame is where it says; unless the header is a copy of one inside other bytes.
      at = headerAt(end) !== undefined || end === bytes.length ? end : at + 1;
    }
  }
  let headerGood = true;
  try {
    decodePackHeader(bytes, { packId, repositoryId: repo.id });
  } catch (error) {
    if (!isKind(error, 'damaged')) throw error;
    headerGood = false;
  }
  return {
    footer: { frames, ids: Buffer.concat(ids), lengths: Uint32Array.from(lengths) },
    damaged,
    wasSealed,
    headerGood,
  };
}

/**
 * Writes the pack again: the header (anew if it is damaged), all bytes as they are, and a footer that names every frame that opens. In one
 * atomic put. A header can be made anew because a frame that opens under the id in the object's name proves which pack it is.
 */
export async function rewritePack(
  repo: Repository,
  packId: string,
  bytes: Buffer,
  s: Salvage,
): Promise<void> {
  let header: Buffer = bytes.subarray(0, PACK_HEADER_BYTES);
  if (!s.headerGood) {
    // Which of its fields is wrong nobody knows. A generation that is too low and a time that is too late do no harm.
    const now = repo.env.clock.nowNs();
    const generation = bytes.readUInt32LE(12);
    const created = bytes.readBigUInt64LE(48);
    header = encodePackHeader({
      packId,
      repositoryId: repo.id,
      encrypted: repo.keys.encrypted,
      generation: generation < 65_536 ? generation : 0,
      createdNs: created > 0n && created <= now ? created : now,
    });
  }
  const footer = encodeFooter(s.footer, packId, bytes.length, repo.newSalt(), repo.keys);
  await repo.store.put(
    packName(packId),
    Buffer.concat([header, bytes.subarray(PACK_HEADER_BYTES), footer]),
  );
  repo.packs.forget(packId);
}
