/** Frames and packs that are known to be bad, by pack. */
import type { Finding, FramePlace } from './findings.js';

export class BadPlaces {
  private readonly whole = new Set<string>();
  private readonly frames = new Map<string, Map<number, FramePlace>>();

  /** Nothing of the pack can be read. */
  addPack(packId: string): void {
    this.whole.add(packId);
  }

  addFrame(packId: string, place: FramePlace): void {
    let list = this.frames.get(packId);
    if (list === undefined) this.frames.set(packId, (list = new Map()));
    const known = list.get(place.number);
    if (known?.offsetBytes === undefined) list.set(place.number, place);
  }

  /** Takes over what a finding names. */
  addFinding(f: Finding): void {
    if (f.packId === undefined || f.severity === 'note') return;
    if (f.frames !== undefined) for (const place of f.frames) this.addFrame(f.packId, place);
    else if (f.kind === 'pack' || f.kind === 'missing') this.addPack(f.packId);
  }

  get isEmpty(): boolean {
    return this.whole.size === 0 && this.frames.size === 0;
  }

  hasPack(packId: string): boolean {
    return this.whole.has(packId) || this.frames.has(packId);
  }

  has(packId: string, frame: number): boolean {
    return this.whole.has(packId) || this.frames.get(packId)?.has(frame) === true;
  }

  /** The bad frames of a pack that are known one by one, ascending. */
  framesOf(packId: string): FramePlace[] {
    return [...(this.frames.get(packId)?.values() ?? [])].sort((a, b) => a.number - b.number);
  }
}
