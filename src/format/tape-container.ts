/**
 * A cartridge in one file (FORMAT.md 11.6): a header, then for each file of the tape its records and a mark. Header and marks are blocks of
 * 4096 bytes that `tar` takes for global pax headers, so that `tar --ignore-zeros` reads the whole.
 */
import {
  decodeTarComment,
  decodeTarHeader,
  encodeTarComment,
  TAR_BLOCK_BYTES,
} from './tape-tar.js';
import { MAX_RECORD_BYTES, RECORD_STEP_BYTES } from './tape.js';

/** Bytes of the header, and of a mark. */
export const CONTAINER_BLOCK_BYTES = 4096;

export interface ContainerHeader {
  /** 32 hex digits, new whenever the cartridge is written from its beginning. */
  readonly id: string;
  readonly recordBytes: number;
}

/** What a mark says of the container, and of the file before it. */
export interface ContainerMark extends ContainerHeader {
  /** Number of that file, from 0. */
  readonly file: number;
  /** Where it begins. */
  readonly from: number;
}

function block(comment: string): Buffer {
  const out = Buffer.alloc(CONTAINER_BLOCK_BYTES);
  encodeTarComment(comment, 0).copy(out);
  return out;
}

function commentOf(b: Buffer): string | undefined {
  const header = decodeTarHeader(b, 0);
  if (header?.type !== 'global' || header.sizeBytes > CONTAINER_BLOCK_BYTES - TAR_BLOCK_BYTES)
    return undefined;
  return decodeTarComment(b.subarray(TAR_BLOCK_BYTES, TAR_BLOCK_BYTES + header.sizeBytes));
}

export function encodeContainerHeader(h: ContainerHeader): Buffer {
  return block(`b2 tape file 1 id ${h.id} records ${h.recordBytes}`);
}

/** Undefined for what is no header of this version. */
export function decodeContainerHeader(b: Buffer): ContainerHeader | undefined {
  const m = /^b2 tape file 1 id ([0-9a-f]{32}) records (\d{1,7})$/.exec(commentOf(b) ?? '');
  const recordBytes = Number(m?.[2] ?? 0);
  return m === null || !isRecordSize(recordBytes) ? undefined : { id: m[1] ?? '', recordBytes };
}

/** The mark that stands at `at`, right behind its file. */
export function encodeContainerMark(m: ContainerMark, at: number): Buffer {
  return block(
    `b2 tape mark ${m.id} records ${m.recordBytes} file ${m.file} from ${m.from} to ${at}`,
  );
}

/** The mark in the block that stands at `at`; undefined unless it belongs there. */
export function decodeContainerMark(b: Buffer, at: number): ContainerMark | undefined {
  const m =
    /^b2 tape mark ([0-9a-f]{32}) records (\d{1,7}) file (\d{1,9}) from (\d{1,16}) to (\d{1,16})$/.exec(
      commentOf(b) ?? '',
    );
  const recordBytes = Number(m?.[2] ?? 0);
  const from = Number(m?.[4] ?? 0);
  if (
    m === null ||
    !isRecordSize(recordBytes) ||
    Number(m[5]) !== at ||
    from > at ||
    from < CONTAINER_BLOCK_BYTES
  )
    return undefined;
  return { id: m[1] ?? '', recordBytes, file: Number(m[3]), from };
}

function isRecordSize(bytes: number): boolean {
  return bytes % RECORD_STEP_BYTES === 0 && bytes >= RECORD_STEP_BYTES && bytes <= MAX_RECORD_BYTES;
}
