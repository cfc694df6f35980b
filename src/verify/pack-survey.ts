/** What every pack says about itself, checked cheaply: header, footer, the layout of its frames, and a few frame headers. */
import { isKind, messageOf } from '../errors.js';
import { FRAME_HEADER_BYTES, FrameType, decodeFrameHeader } from '../format/frame.js';
import { packName } from '../format/names.js';
import { PACK_HEADER_BYTES, type FooterFrame } from '../format/pack.js';
import { OpenPack } from '../repo/pack-reader.js';
import type { Repository } from '../repo/repository.js';
import { BLOCK_BYTES, blocksOf } from '../units.js';
import { problemOf, type Finding, type FramePlace } from './findings.js';

/** Frames and chunks of a pack in few bytes: about 20 a frame and one a chunk. */
export class PackShape {
  readonly packId: string;
  readonly sizeBytes: number;
  readonly sealed: boolean;
  readonly createdNs: bigint;
  readonly generation: number;
  readonly types: Uint8Array;
  private readonly numbers: Uint32Array;
  private readonly offsets: Uint32Array;
  private readonly lengths: Uint32Array;
  private readonly firstChunk: Uint32Array;
  /** Blocks that each chunk has; a short last one counts. */
  private readonly blocks: Uint8Array;
  /** Chunks whose length is no whole number of blocks, or none if undefined. */
  private readonly ragged: ReadonlySet<number>;

  constructor(pack: OpenPack, sizeBytes: number) {
    const { frames, lengths } = pack.footer;
    this.packId = pack.packId;
    this.sizeBytes = sizeBytes;
    this.sealed = pack.sealed;
    this.createdNs = pack.header.createdNs;
    this.generation = pack.header.generation;
    this.types = Uint8Array.from(frames, (f) => f.type);
    this.numbers = Uint32Array.from(frames, (f) => f.number);
    this.offsets = Uint32Array.from(frames, (f) => f.offset);
    this.lengths = Uint32Array.from(frames, (f) => f.storedBytes + FRAME_HEADER_BYTES);
    this.firstChunk = new Uint32Array(frames.length + 1);
    frames.forEach((f, i) => (this.firstChunk[i + 1] = (this.firstChunk[i] ?? 0) + f.count));
    this.blocks = Uint8Array.from(lengths, (n) => blocksOf(n));
    const ragged = new Set<number>();
    lengths.forEach((n, i) => n % BLOCK_BYTES !== 0 && ragged.add(i));
    this.ragged = ragged;
  }

  get frameCount(): number {
    return this.numbers.length;
  }

  numberAt(index: number): number {
    return this.numbers[index] ?? -1;
  }

  /** Index of the frame with that number, or −1. */
  find(number: number): number {
    if (this.numbers[number] === number) return number;
    let lo = 0;
    let hi = this.numbers.length;
    while (lo < hi) {
      const mid = (lo + hi) >>> 1;
      if ((this.numbers[mid] ?? 0) < number) lo = mid + 1;
      else hi = mid;
    }
    return this.numbers[lo] === number ? lo : -1;
  }

  /** Where the frame lies; only its number if it is not there. */
  place(number: number): FramePlace {
    const i = this.find(number);
    return i < 0
      ? { number }
      : { number, offsetBytes: this.offsets[i] ?? 0, lengthBytes: this.lengths[i] ?? 0 };
  }

  /**
   * The first frame of a record's place that is wrong, with the reason; undefined if `count` blocks from block `skip` of chunk `sub` of
   * frame `frame` are all there (FORMAT.md 5.4).
   */
  wrong(
    frame: number,
    sub: number,
    skip: number,
    count: number,
    chunkBlocks: number,
  ): { readonly frame: number; readonly absent: boolean; readonly reason: string } | undefined {
    const end = skip + count;
    const run = end > chunkBlocks;
    const last = run ? frame + Math.floor((end - 1) / chunkBlocks) : frame;
    for (let f = frame; f <= last; f++) {
      const i = this.find(f);
      if (i < 0 || this.types[i] !== FrameType.chunks) {
        return {
          frame: f,
          absent: true,
          reason: i < 0 ? 'the pack has no such frame' : 'it is not a frame of chunks',
        };
      }
      const first = this.firstChunk[i] ?? 0;
      const chunks = (this.firstChunk[i + 1] ?? 0) - first;
      if (run && (sub !== 0 || chunks !== 1))
        return { frame: f, absent: false, reason: 'a run over a frame of several chunks' };
      if (sub >= chunks)
        return {
          frame: f,
          absent: false,
          reason: `it has ${chunks} chunks; number ${sub} is used`,
        };
      const have = this.blocks[first + sub] ?? 0;
      const need = run ? (f < last ? chunkBlocks : ((end - 1) % chunkBlocks) + 1) : end;
      if (have < need || (f < last && this.ragged.has(first))) {
        return {
          frame: f,
          absent: false,
          reason: `its chunk ${sub} has ${have} blocks; ${need} are used`,
        };
      }
    }
    return undefined;
  }
}

/** What one pack is found to be. `shape` is undefined where nothing of it can be used. */
export interface SurveyedPack {
  readonly shape: PackShape | undefined;
  readonly findings: readonly Finding[];
  /** It is gone by now (prune), which is for who needs it to judge. */
  readonly gone: boolean;
}

/** Opens a pack and checks what can be checked without reading its data. Failures of the store become findings. */
export async function surveyPack(
  repo: Repository,
  packId: string,
  sizeBytes: number,
): Promise<SurveyedPack> {
  const object = packName(packId);
  const failed = (
    kind: Finding['kind'],
    severity: Finding['severity'],
    message: string,
  ): SurveyedPack => ({
    shape: undefined,
    findings: [{ severity, kind, object, packId, message }],
    gone: false,
  });
  let pack: OpenPack | undefined;
  try {
    const head = await repo.store.get(object, { offset: 0, length: PACK_HEADER_BYTES });
    if (head.length < PACK_HEADER_BYTES || head.every((b) => b === 0)) {
      return failed(
        'leftover',
        'note',
        'it holds nothing: a crash came before its header was written',
      );
    }
    pack = await OpenPack.open(repo.packContext(), packId);
    const findings: Finding[] = [];
    // It may have grown, and been sealed, since it was listed.
    const size = Math.max(sizeBytes, pack.validBytes);
    for (const problem of await layoutProblems(pack, size)) {
      findings.push({ severity: 'damage', kind: 'frame', object, packId, ...problem });
    }
    return { shape: new PackShape(pack, size), findings, gone: false };
  } catch (error) {
    if (
      isKind(error, 'not-found') ||
      (isKind(error, 'damaged') && isKind(error.cause, 'not-found'))
    ) {
      return { shape: undefined, findings: [], gone: true };
    }
    if (isKind(error, 'damaged'))
      return failed('pack', 'damage', problemOf(error.message, `pack ${packId}`));
    if (isKind(error, 'io', 'unsupported')) return failed('pack', 'unreadable', messageOf(error));
    throw error;
  } finally {
    await pack?.close();
  }
}

/** Of a sealed pack: do the frames lie one after the other within it, and are three of their headers what the footer says? */
async function layoutProblems(
  pack: OpenPack,
  sizeBytes: number,
): Promise<{ readonly message: string; readonly frames: readonly FramePlace[] }[]> {
  if (!pack.sealed) return [];
  const problems: { message: string; frames: FramePlace[] }[] = [];
  const { frames } = pack.footer;
  const placeOf = (f: FooterFrame): FramePlace => ({
    number: f.number,
    offsetBytes: f.offset,
    lengthBytes: f.storedBytes + FRAME_HEADER_BYTES,
  });
  let end = PACK_HEADER_BYTES;
  for (const f of frames) {
    const next = f.offset + FRAME_HEADER_BYTES + f.storedBytes;
    if (f.offset < end || next > Math.min(pack.validBytes, sizeBytes)) {
      problems.push({
        message: `the footer lays frame ${f.number} over another or outside the pack`,
        frames: [placeOf(f)],
      });
    }
    end = next;
  }
  const sample = new Set([frames[0], frames[frames.length >> 1], frames.at(-1)]);
  const bytes = Buffer.alloc(FRAME_HEADER_BYTES);
  for (const f of sample) {
    if (f === undefined) continue;
    const got = await pack.readRaw(bytes, f.offset);
    try {
      const h = decodeFrameHeader(bytes.subarray(0, got), 0, `frame ${f.number}`);
      if (
        h.number !== f.number ||
        h.type !== f.type ||
        h.storedBytes !== f.storedBytes ||
        h.plainBytes !== f.plainBytes ||
        h.compression !== f.compression ||
        h.count !== f.count
      ) {
        problems.push({
          message: `frame ${f.number} is another one than the footer says`,
          frames: [placeOf(f)],
        });
      }
    } catch (error) {
      if (!isKind(error, 'damaged')) throw error;
      problems.push({
        message: problemOf(error.message, `frame ${f.number}`),
        frames: [placeOf(f)],
      });
    }
  }
  return problems;
}
