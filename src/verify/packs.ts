/** The packs of a repository as verify sees them: surveyed once, and again where something seems wrong. */
import { OpenPack } from '../repo/pack-reader.js';
import { FRAME_HEADER_BYTES, FrameType, decodeFrameHeader } from '../format/frame.js';
import { decodeFooter, decodeTrailer, PACK_TRAILER_BYTES } from '../format/pack.js';
import { isKind } from '../errors.js';
import { packName } from '../format/names.js';
import type { Repository } from '../repo/repository.js';
import type { Finding } from './findings.js';
import { surveyPack, type PackShape } from './pack-survey.js';
import type { PackLookup } from './volume-check.js';

const PARALLEL = 4;

export class SurveyedPacks implements PackLookup {
  readonly findings: Finding[] = [];
  private readonly repo: Repository;
  private readonly shapes = new Map<string, PackShape | undefined>();
  private readonly gone = new Set<string>();
  private readonly fresh = new Set<string>();

  constructor(repo: Repository) {
    this.repo = repo;
  }

  /** Looks at all of `packs`. */
  async survey(
    packs: readonly { readonly packId: string; readonly sizeBytes: number }[],
    signal?: AbortSignal,
  ): Promise<void> {
    let next = 0;
    const worker = async (): Promise<void> => {
      for (let p = packs[next++]; p !== undefined; p = packs[next++]) {
        signal?.throwIfAborted();
        await this.look(p.packId, p.sizeBytes);
      }
    };
    // All of them end before this does: nothing may read from the store afterwards.
    const ended = await Promise.allSettled(Array.from({ length: PARALLEL }, worker));
    for (const e of ended) if (e.status === 'rejected') throw e.reason;
  }

  /** From now on a pack may have changed again since it was looked at. */
  stale(): void {
    this.fresh.clear();
  }

  async shape(packId: string, fresh = false): Promise<PackShape | undefined> {
    if (this.shapes.has(packId) && (!fresh || this.fresh.has(packId)))
      return this.shapes.get(packId);
    const info = await this.repo.store.stat(packName(packId));
    if (info === undefined) {
      this.gone.add(packId);
      this.shapes.set(packId, undefined);
      this.fresh.add(packId);
      return undefined;
    }
    return this.look(packId, info.sizeBytes);
  }

  isGone(packId: string): boolean {
    return (
      this.gone.has(packId) ||
      this.findings.some((f) => f.packId === packId && f.kind === 'leftover')
    );
  }

  /** Packs that can be opened. */
  *usable(): IterableIterator<PackShape> {
    for (const shape of this.shapes.values()) if (shape !== undefined) yield shape;
  }

  private async look(packId: string, sizeBytes: number): Promise<PackShape | undefined> {
    // Whoever asks for a frame that the shape has must not meet the pack as it was before.
    this.repo.packs.forget(packId);
    const s = await surveyPack(this.repo, packId, sizeBytes);
    this.fresh.add(packId);
    if (s.gone) this.gone.add(packId);
    this.shapes.set(packId, s.shape);
    for (let i = this.findings.length - 1; i >= 0; i--)
      if (this.findings[i]?.packId === packId) this.findings.splice(i, 1);
    this.findings.push(...s.findings);
    return s.shape;
  }

  /**
   * Judges the packs without a sound footer, when it is known which of them are needed and which a journal names. What somebody is
   * writing, or left when he died, is in the journal, or needed by nobody.
   */
  async judgeUnsealed(
    needed: ReadonlySet<string>,
    journal: ReadonlySet<string>,
  ): Promise<Finding[]> {
    const findings: Finding[] = [];
    const shapes = Array.from(this.usable());
    for (const known of shapes) {
      if (known.sealed) continue;
      this.fresh.delete(known.packId);
      const shape = await this.shape(known.packId, true); // it may have been sealed meanwhile
      if (shape === undefined || shape.sealed) continue;
      const { packId } = shape;
      const object = packName(packId);
      const state = await footerState(this.repo, packId, shape);
      if (journal.has(packId) && state === 'none' && this.repo.store.canAppend) continue;
      const wasSealed = needed.has(packId) && !journal.has(packId);
      // Without append a pack is put whole. With it, a crash while it was being sealed may leave any part of the footer.
      if (wasSealed || !this.repo.store.canAppend) {
        findings.push({
          severity: 'damage',
          kind: 'footer',
          object,
          packId,
          message: `its footer is damaged or cut off; ${shape.frameCount} frames can still be read without it`,
          hint: 'Run "b2 repair": it writes a new footer for what can be read.',
        });
      } else {
        findings.push({
          severity: 'note',
          kind: 'leftover',
          object,
          packId,
          message: `it was never finished (${shape.frameCount} frames); ${journal.has(packId) ? 'the next capture finishes it' : 'nothing needs it, prune removes it'}`,
        });
      }
    }
    return findings;
  }
}

/**
 * What there is of a footer in a pack that counts as unsealed: `sound` if it is there and only the trailer, or only the place, is
 * wrong; `broken` if there is a trace of one; `none`.
 */
async function footerState(
  repo: Repository,
  packId: string,
  shape: PackShape,
): Promise<'sound' | 'broken' | 'none'> {
  let pack: OpenPack;
  try {
    pack = await OpenPack.open(repo.packContext(), packId);
  } catch (error) {
    if (isKind(error, 'damaged', 'io', 'not-found', 'unsupported')) return 'none';
    throw error;
  }
  try {
    const { sizeBytes } = shape;
    const tail = Buffer.alloc(Math.min(PACK_TRAILER_BYTES, sizeBytes));
    await pack.readRaw(tail, sizeBytes - tail.length);
    if (decodeTrailer(tail, sizeBytes) !== undefined) return 'broken';
    const last = pack.footer.frames.at(-1);
    const at = last === undefined ? 64 : last.offset + FRAME_HEADER_BYTES + last.storedBytes;
    const head = Buffer.alloc(FRAME_HEADER_BYTES);
    if ((await pack.readRaw(head, at)) < head.length) return 'none';
    try {
      const header = decodeFrameHeader(head, 0, 'footer');
      if (header.type !== FrameType.footer) return 'none';
      const bytes = Buffer.alloc(FRAME_HEADER_BYTES + header.storedBytes);
      if ((await pack.readRaw(bytes, at)) < bytes.length) return 'broken';
      decodeFooter(bytes, packId, repo.keys);
      return 'sound';
    } catch (error) {
      if (isKind(error, 'damaged')) return 'none';
      throw error;
    }
  } finally {
    await pack.close();
  }
}
