/** What the repository remembers of its cartridges (FORMAT.md section 11): the objects below `tapes/`. */
import { isKind } from '../errors.js';
import { ObjectKind } from '../format/object.js';
import {
  labelOfName,
  partOfPayload,
  partPayload,
  tapeName,
  tapeOfPayload,
  tapePartName,
  tapePayload,
  type PackOnTape,
  type PlaceOnTape,
  type TapeCartridge,
  type TapePart,
} from '../format/tape.js';
import type { Repository } from '../repo/repository.js';
import { KEY_STEP } from './pack-maker.js';

/** Every cartridge, by set and number; what is damaged is told to `warn` and left out. */
export async function listCartridges(
  repo: Repository,
  warn: (text: string) => void,
): Promise<TapeCartridge[]> {
  const list: TapeCartridge[] = [];
  for await (const { name } of repo.store.list('tapes')) {
    if (labelOfName(name) === undefined) continue;
    try {
      list.push(tapeOfPayload(await repo.getObject(ObjectKind.tape, name), name));
    } catch (error) {
      if (!isKind(error, 'not-found', 'damaged')) throw error;
      warn(`${name} cannot be read: ${error.message}`);
    }
  }
  return list.sort(
    (a, b) =>
      compare(a.tape.setName, b.tape.setName) ||
      compare(a.tape.setId, b.tape.setId) ||
      a.tape.number - b.tape.number,
  );
}

function compare(a: string, b: string): number {
  return a < b ? -1 : a > b ? 1 : 0;
}

export async function putCartridge(repo: Repository, cartridge: TapeCartridge): Promise<void> {
  await repo.putObject(ObjectKind.tape, tapeName(cartridge.tape.label), tapePayload(cartridge));
}

/** Everything a cartridge's session put there, in parts of bounded size. */
export async function putParts(
  repo: Repository,
  label: string,
  session: number,
  parts: readonly TapePart[],
): Promise<void> {
  for (const [i, part] of parts.entries())
    await repo.putObject(ObjectKind.tape, tapePartName(label, session, i), partPayload(part));
}

/** The parts of one session on a cartridge. */
export async function readParts(
  repo: Repository,
  cartridge: TapeCartridge,
  session: number,
): Promise<TapePart[]> {
  const { label } = cartridge.tape;
  const parts: TapePart[] = [];
  for (let i = 0; i < (cartridge.sessions[session]?.parts ?? 0); i++) {
    const name = tapePartName(label, session, i);
    parts.push(partOfPayload(await repo.getObject(ObjectKind.tape, name), name));
  }
  return parts;
}

/** Forgets a cartridge: what it held is not counted on any more. */
export async function forgetCartridge(repo: Repository, label: string): Promise<void> {
  const names: string[] = [];
  for await (const { name } of repo.store.list('tapes'))
    if (name === tapeName(label) || name.startsWith(`${tapeName(label)}.`)) names.push(name);
  for (const name of names) await repo.store.delete(name);
}

/** Entries of a part at most: its object stays below 10 MiB. */
const PART_ENTRIES = 100_000;

/** Collects what a session puts on one cartridge. */
export class PartCollector {
  readonly parts: TapePart[] = [];
  packs = 0;
  #packs: PackOnTape[] = [];
  #places: PlaceOnTape[] = [];

  add(pack: PackOnTape, places: readonly Omit<PlaceOnTape, 'pack'>[]): void {
    if (this.#packs.length + this.#places.length + places.length > PART_ENTRIES) this.#cut();
    const index = this.#packs.length;
    this.#packs.push(pack);
    for (const p of places) this.#places.push({ ...p, pack: index });
    this.packs++;
  }

  finish(): readonly TapePart[] {
    this.#cut();
    return this.parts;
  }

  #cut(): void {
    if (this.#packs.length === 0) return;
    this.parts.push({ packs: this.#packs, places: this.#places });
    this.#packs = [];
    this.#places = [];
  }
}

/** A chunk on a set. */
export interface ChunkOnTape {
  readonly packId: string;
  readonly frame: number;
  readonly sub: number;
}

interface Run {
  readonly key: number;
  readonly count: number;
  readonly bySub: boolean;
  readonly packId: string;
  readonly toKey: number;
}

/** Which chunks of the repository are on a set, and where. */
export class SetIndex {
  readonly #runs = new Map<string, Run[]>();
  /** Pack on tape → label of its cartridge. */
  readonly packs = new Map<string, string>();
  /** Every pack that is on the set, damaged ones too → how many chunks all its copies hold; −1: copies differ, or one is damaged. */
  readonly #chunks = new Map<string, number>();
  /** Packs that hold chunks of the repository's pack of the same id: copies of it, whose chunks are known by their places alone. */
  readonly #copies = new Set<string>();
  /** What every cartridge holds is known. */
  #isComplete = true;
  #sorted = false;

  /** Reads what the cartridges hold; packs that could not be read back do not count as places of chunks. */
  static async load(
    repo: Repository,
    cartridges: readonly TapeCartridge[],
    withPlaces: boolean,
    warn: (text: string) => void,
  ): Promise<SetIndex> {
    const index = new SetIndex();
    for (const cartridge of cartridges) {
      for (const [i, session] of cartridge.sessions.entries()) {
        const damaged = new Set(session.damagedPacks);
        try {
          for (const part of await readParts(repo, cartridge, i)) {
            const counts = new Uint32Array(part.packs.length);
            for (const p of part.places) {
              counts[p.pack] = (counts[p.pack] ?? 0) + p.count;
              const packId = part.packs[p.pack]?.packId ?? '';
              if (damaged.has(packId)) continue;
              if (p.source === packId) index.#copies.add(packId);
              if (withPlaces) index.#add(packId, p);
            }
            part.packs.forEach(({ packId }, at) => {
              if (!damaged.has(packId)) index.packs.set(packId, cartridge.tape.label);
              const chunks = damaged.has(packId) ? -1 : (counts[at] ?? 0);
              const before = index.#chunks.get(packId) ?? chunks;
              index.#chunks.set(packId, before === chunks ? chunks : -1);
            });
          }
        } catch (error) {
          if (!isKind(error, 'not-found', 'damaged')) throw error;
          index.#isComplete = false;
          warn(`what cartridge ${cartridge.tape.label} holds is not known: ${error.message}`);
        }
      }
    }
    return index;
  }

  #add(packId: string, p: PlaceOnTape): void {
    let runs = this.#runs.get(p.source);
    if (runs === undefined) this.#runs.set(p.source, (runs = []));
    runs.push({
      key: p.frame * KEY_STEP + p.sub,
      count: p.count,
      bySub: p.bySub,
      packId,
      toKey: p.toFrame * KEY_STEP + p.toSub,
    });
    this.#sorted = false;
  }

  /**
   * True if a pack may be written to the set under the id `packId` with `chunks` chunks of frames numbered from 0 without a gap: no copy of it there is damaged or
   * holds another number of chunks, so that all copies of a pack in a set are alike and it does not matter which of them a reader has.
   */
  allows(packId: string, chunks: number): boolean {
    const there = this.#chunks.get(packId) ?? chunks;
    return this.#isComplete && there === chunks;
  }

  /** Where chunk `sub` of frame `frame` of pack `source` of the repository is on the set. */
  find(source: string, frame: number, sub: number): ChunkOnTape | undefined {
    // A repository that was brought back from the set is made of its packs. Of a copy only what it is known to hold: the pack may have grown since.
    if (this.packs.has(source) && !this.#copies.has(source)) return { packId: source, frame, sub };
    const runs = this.#runs.get(source);
    if (runs === undefined) return undefined;
    if (!this.#sorted) {
      for (const r of this.#runs.values()) r.sort((a, b) => a.key - b.key);
      this.#sorted = true;
    }
    const key = frame * KEY_STEP + sub;
    let low = 0;
    let high = runs.length;
    while (low < high) {
      const mid = (low + high) >>> 1;
      if ((runs[mid]?.key ?? 0) <= key) low = mid + 1;
      else high = mid;
    }
    // Runs of several sessions may overlap: the nearest one before need not be the one that reaches.
    for (let i = low - 1; i >= 0 && i >= low - 8; i--) {
      const run = runs[i];
      if (run === undefined) break;
      const step = run.bySub ? 1 : KEY_STEP;
      const away = key - run.key;
      if (away % step !== 0 || away / step >= run.count) continue;
      const to = run.toKey + away;
      return { packId: run.packId, frame: Math.floor(to / KEY_STEP), sub: to % KEY_STEP };
    }
    return undefined;
  }
}
