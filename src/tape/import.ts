/**
 * From tape alone: a cartridge seen as a repository (its directories are one, without the data), a point of it written straight to a device
 * in one pass over the data, and a repository brought back.
 */
import type { Clock } from '../clock.js';
import type { ByteRange } from '../devices/device.js';
import type { TapeDrive } from '../devices/tape/drive.js';
import { B2Error, isKind } from '../errors.js';
import type { EventSink } from '../events.js';
import { clipExtent } from '../format/extent.js';
import { packIdOf } from '../format/names.js';
import type { CommitRecord } from '../format/segment.js';
import { ObjectKind, decodeObject } from '../format/object.js';
import {
  labelOfName,
  partOfPayload,
  tapeOfPayload,
  type TapeCartridge,
  type TapeLabel,
} from '../format/tape.js';
import { alignedMemory } from '../memory.js';
import { startProgress } from '../progress.js';
import type { BlockMap } from '../repo/blockmap.js';
import { readCommits, type ReadCommit } from '../repo/commits.js';
import type { Secret } from '../repo/keys.js';
import { PackCache } from '../repo/pack-reader.js';
import { Repository, type Environment } from '../repo/repository.js';
import { examineTarget, openTarget, refuseTarget, type OpenTarget } from '../restore/target.js';
import { BLOCK_BYTES, blocksOf, roundUp } from '../units.js';
import { crc32 } from 'node:zlib';
import { readLabel, requireCartridge, toFile } from './cartridge.js';
import { MapStore } from './map-store.js';
import { linkPoints } from './link.js';
import { changeCartridge, type CartridgeSource } from './media.js';
import { KEY_STEP } from './pack-maker.js';
import { DEFAULT_TAPE_WORKERS, PackPool } from './pool.js';
import { readBack } from './read-back.js';
import { surveyCartridge, type Survey } from './survey.js';

/** A cartridge as the repository that its directories are. Close `repo`. */
export interface TapeView {
  readonly label: TapeLabel;
  readonly survey: Survey;
  /** Holds the commits of the points; the packs with their data are not in it. */
  readonly repo: Repository;
  /** Packs with commits that are in `repo` in the place of one that is on the cartridge. */
  readonly linked: ReadonlyMap<string, string>;
}

/** The label of the cartridge in the drive. Kind `refused` for one that is blank or not of b2. */
export async function requireLabel(drive: TapeDrive): Promise<TapeLabel> {
  await requireCartridge(drive);
  const contents = await readLabel(drive);
  if (contents.kind === 'b2') return contents.label;
  throw new B2Error(
    'refused',
    contents.kind === 'blank'
      ? `the cartridge in ${drive.path} is blank`
      : `the cartridge in ${drive.path} holds ${contents.what}`,
    { hint: 'Put in a cartridge that "b2 export-tape" has written.' },
  );
}

/**
 * Reads the directories of the cartridge in the drive. `askSecrets` is called once the tape is known to be encrypted and no secret
 * fits. Kinds `refused`, `wrong-key`, `damaged`.
 */
export async function openTapeView(
  drive: TapeDrive,
  secrets: readonly Secret[],
  env: Environment,
  warn: (text: string) => void,
): Promise<TapeView> {
  const label = await requireLabel(drive);
  const first = await surveyCartridge(drive, label, undefined);
  const repo = await openSurvey(first, label, secrets, env, warn);
  const survey = withRecord(first, label, repo);
  const linked = await linkPoints(repo, () => 0);
  return { label, survey, repo, linked };
}

async function openSurvey(
  survey: Survey,
  label: TapeLabel,
  secrets: readonly Secret[],
  env: Environment,
  warn: (text: string) => void,
): Promise<Repository> {
  const objects = new Map([...survey.objects, ...survey.packs]);
  try {
    return await Repository.open(
      new MapStore(`cartridge ${label.label}`, objects),
      secrets,
      env,
      warn,
    );
  } catch (error) {
    if (!isKind(error, 'no-repository')) throw error;
    throw new B2Error('damaged', `cartridge ${label.label}: no directory on it can be read`, {
      cause: error,
      hint: 'Try another cartridge of the set first: each has a directory of its own.',
    });
  }
}

function withRecord(survey: Survey, label: TapeLabel, repo: Repository): Survey {
  const name = `tapes/${label.label}`;
  const bytes = survey.objects.get(name);
  if (bytes === undefined) return survey;
  try {
    const record = tapeOfPayload(decodeObject(ObjectKind.tape, name, bytes, repo.keys), name);
    return record.tape.cartridgeId === label.cartridgeId ? { ...survey, record } : survey;
  } catch (error) {
    if (!isKind(error, 'damaged')) throw error;
    return survey;
  }
}

/** Where a pack is. */
export interface PackPlace {
  readonly label: string;
  readonly file: number;
}

/** What is known of the cartridges of a set, gathered from the contents of those that were read. */
export class SetKnowledge {
  readonly cartridges = new Map<string, TapeCartridge>();
  /** Pack → where it is: label of the cartridge and file on it. A pack of the repository that was written as it is may be in several places. */
  readonly packs = new Map<string, PackPlace[]>();

  /** Labels of the cartridges that a point needs, as far as that is known: those of its session, and those it names. */
  cartridgesOf(volumeId: string, seq: number): readonly string[] {
    const labels = new Set<string>();
    for (const c of this.cartridges.values())
      for (const s of c.sessions)
        for (const p of s.points) {
          if (p.volumeId !== volumeId || p.seq !== seq) continue;
          labels.add(c.tape.label);
          for (const label of p.needs) labels.add(label);
        }
    return [...labels].sort();
  }

  /** Labels of the cartridges that hold a pack, as far as that is known. */
  labelsOf(packId: string): readonly string[] {
    return [...new Set(this.packs.get(packId)?.map((at) => at.label))];
  }

  #learnPlace(packId: string, place: PackPlace): void {
    const known = this.packs.get(packId);
    if (known === undefined) this.packs.set(packId, [place]);
    else if (!known.some((k) => k.label === place.label && k.file === place.file))
      known.push(place);
  }

  /** Learns from objects of a directory or contents; what cannot be read is passed over. */
  learn(objects: ReadonlyMap<string, Buffer>, repo: Pick<Repository, 'keys'>): void {
    for (const [name, bytes] of objects) {
      const part = /^tapes\/([A-Za-z0-9_-]+)\.\d+\.\d+$/.exec(name);
      const label = labelOfName(name);
      if (part === null && label === undefined) continue;
      try {
        const payload = decodeObject(ObjectKind.tape, name, bytes, repo.keys);
        if (label !== undefined) {
          const found = tapeOfPayload(payload, name);
          const before = this.cartridges.get(label);
          if (before === undefined || before.sessions.length <= found.sessions.length)
            this.cartridges.set(label, found);
        } else {
          for (const p of partOfPayload(payload, name).packs)
            this.#learnPlace(p.packId, { label: part?.[1] ?? '', file: p.file });
        }
      } catch (error) {
        if (!isKind(error, 'damaged')) throw error;
      }
    }
  }
}

/** Extents of one pack that the target needs. */
interface WantedPack {
  /** Block, count, frame, sub, skip: five numbers each, ascending by block. */
  readonly extents: number[];
}

/** A pack of which a copy was damaged. */
interface BrokenPack {
  readonly wanted: WantedPack;
  readonly damaged: readonly { readonly frame: number; readonly reason: string }[];
}

/** What a copy of a pack had. */
interface PackTakenSoFar {
  readonly frames: number;
  readonly chunks: number;
  readonly damaged: readonly { readonly frame: number; readonly reason: string }[];
}

export interface TapeRestoreOptions {
  readonly drive: TapeDrive;
  readonly source?: CartridgeSource | undefined;
  readonly view: TapeView;
  readonly map: BlockMap;
  readonly volumeId: string;
  readonly commit: CommitRecord;
  /** Labels of the cartridges that the point is known to need. */
  readonly needs: readonly string[];
  readonly target: string;
  readonly force: boolean;
  readonly verify: boolean;
  readonly workers?: number | undefined;
  readonly clock: Clock;
  readonly events: EventSink;
  readonly signal?: AbortSignal | undefined;
}

export interface TapeRestoreResult {
  readonly target: string;
  readonly sizeBytes: number;
  readonly dataBytes: number;
  readonly writtenBytes: number;
  /** Labels of the cartridges that were read. */
  readonly cartridges: readonly string[];
  readonly verified: boolean;
  /** Ranges of the target that are zeros because their data was not there or damaged. */
  readonly missingRanges: readonly ByteRange[];
  /** Why: packs that were on no cartridge, with the cartridge they should be on where that is known. */
  readonly missingPacks: readonly { readonly packId: string; readonly cartridge?: string }[];
  /** Labels of cartridges of the set that are known and were not read. */
  readonly unreadCartridges: readonly string[];
  readonly damaged: readonly {
    readonly packId: string;
    readonly frame: number;
    readonly reason: string;
  }[];
  readonly elapsedSeconds: number;
  readonly isWhole: boolean;
}

const STAGING_BYTES = 4 * 1024 * 1024;

/** Writes a point to a device or file, straight from tape. Kinds: those of the target, `io` of the drive, `interrupted`. */
export async function restoreFromTape(options: TapeRestoreOptions): Promise<TapeRestoreResult> {
  const { view, commit, target } = options;
  const facts = await examineTarget({
    target,
    sizeBytes: commit.sizeBytes,
    repositoryPath: undefined,
  });
  refuseTarget(facts, options.force);
  return PackPool.with(
    {
      handle: view.repo.handle(undefined),
      store: view.repo.store,
      workers: options.workers ?? DEFAULT_TAPE_WORKERS,
      signal: options.signal,
      what: `the restore to ${target}`,
    },
    async (pool) => {
      const open = await openTarget(facts, commit.sizeBytes);
      try {
        return await new TapeRestore(options, pool, open).run();
      } finally {
        await open.close();
      }
    },
  );
}

class TapeRestore {
  readonly #o: TapeRestoreOptions;
  readonly #pool: PackPool;
  readonly #target: OpenTarget;
  readonly #chunkBlocks: number;
  #wanted = new Map<string, WantedPack>();
  readonly #knowledge = new SetKnowledge();
  readonly #missing: { offset: number; length: number }[] = [];
  readonly #damaged: { packId: string; frame: number; reason: string }[] = [];
  /** Packs of which a copy was damaged: what is still wanted of them, of another copy. */
  readonly #broken = new Map<string, BrokenPack>();
  /** Packs that are being taken. */
  readonly #taking = new Map<string, Promise<unknown>>();
  /** Labels of the cartridges that were read. */
  readonly #read: string[] = [];
  /** Those of them that hold nothing more that is wanted. */
  readonly #done = new Set<string>();
  /** Packs that are not where they should be, each with the label of that cartridge. */
  readonly #lost = new Set<string>();
  readonly #staging: Buffer[] = [];
  /** Offset, length and crc32 of what was written, three numbers each. */
  readonly #checks: number[] = [];
  #dataBytes = 0;
  #written = 0;

  constructor(options: TapeRestoreOptions, pool: PackPool, target: OpenTarget) {
    this.#o = options;
    this.#pool = pool;
    this.#target = target;
    this.#chunkBlocks = blocksOf(options.view.repo.chunkBytes);
  }

  async run(): Promise<TapeRestoreResult> {
    const { clock, view, commit, target, drive } = this.#o;
    const startNs = clock.monotonicNs();
    await this.#plan();
    const progress = startProgress({
      phase: `restoring ${target} from ${drive.path}`,
      totalBytes: this.#dataBytes,
      clock,
      events: this.#o.events,
    });
    this.#progress = (bytes) => {
      progress.add(bytes);
    };
    let { label, survey } = view;
    this.#knowledge.learn(survey.objects, view.repo);
    for (;;) {
      await this.#otherCopies(survey);
      await this.#cartridge(label, survey);
      if (this.#isDone()) break;
      const next = await this.#nextCartridge(label);
      if (next === undefined) break;
      ({ label, survey } = next);
    }
    progress.finish();
    const missingPacks = [...this.#wanted.keys()].map((packId) => {
      const labels = this.#knowledge.labelsOf(packId);
      const cartridge = labels.find((label) => !this.#read.includes(label)) ?? labels[0];
      return cartridge === undefined ? { packId } : { packId, cartridge };
    });
    for (const wanted of this.#wanted.values()) this.#miss(wanted);
    for (const [packId, { wanted, damaged }] of this.#broken) {
      this.#miss(wanted);
      for (const d of damaged) this.#damaged.push({ packId, ...d });
    }
    const missingRanges = joined(this.#missing);
    if (!this.#target.isBlank)
      for (const r of missingRanges) await this.#target.device.zero(r.offset, r.length);
    await this.#target.device.sync();
    if (this.#o.verify) await this.#readBack();
    return {
      target,
      sizeBytes: commit.sizeBytes,
      dataBytes: this.#dataBytes,
      writtenBytes: this.#written,
      cartridges: this.#read,
      verified: this.#o.verify,
      missingRanges,
      missingPacks,
      unreadCartridges: [...this.#knowledge.cartridges.values()]
        .filter((c) => c.tape.setId === view.label.setId)
        .map((c) => c.tape.label)
        .filter((l) => !this.#read.includes(l))
        .sort(),
      damaged: this.#damaged,
      elapsedSeconds: Number(clock.monotonicNs() - startNs) / 1e9,
      isWhole: missingRanges.length === 0,
    };
  }

  #progress: (bytes: number) => void = () => undefined;

  /** What is needed of which pack; holes become zeros at once. */
  async #plan(): Promise<void> {
    const { map, commit } = this.#o;
    for await (const list of map.scan()) {
      for (const e of list) {
        const offset = e.block * BLOCK_BYTES;
        const length = Math.min(e.count * BLOCK_BYTES, commit.sizeBytes - offset);
        if (e.packId === undefined) {
          if (!this.#target.isBlank) await this.#target.device.zero(offset, length);
          continue;
        }
        this.#dataBytes += length;
        let wanted = this.#wanted.get(e.packId);
        if (wanted === undefined) this.#wanted.set(e.packId, (wanted = { extents: [] }));
        wanted.extents.push(e.block, e.count, e.frame, e.sub, e.skip);
      }
    }
  }

  /** Takes everything wanted that is on the cartridge in the drive. */
  async #cartridge(label: TapeLabel, survey: Survey): Promise<void> {
    const { drive, signal, view } = this.#o;
    if (!this.#read.includes(label.label)) this.#read.push(label.label);
    this.#done.add(label.label);
    // The directories hold packs too, but no data.
    const last = survey.files.at(-1)?.file ?? 0;
    const known = new Set<number>();
    let complete = true;
    for (const packId of [...this.#wanted.keys(), ...this.#broken.keys()]) {
      const places = this.#knowledge.packs.get(packId);
      if (places === undefined) complete = false;
      for (const at of places ?? []) if (at.label === label.label) known.add(at.file);
    }
    const files = complete
      ? [...known].sort((a, b) => a - b)
      : survey.files.filter((f) => f.kind === 'data').map((f) => f.file);
    for (let i = 0; i < files.length;) {
      const from = files[i] ?? 0;
      let to = i + 1;
      while (to < files.length && files[to] === (files[to - 1] ?? 0) + 1) to++;
      const after = (files[to - 1] ?? 0) + 1;
      await toFile(drive, from);
      const found = await readBack({
        drive,
        recordBytes: label.recordBytes,
        fromFile: from,
        toFile: after > last ? undefined : after,
        pool: this.#pool,
        signal,
        isDone: () => this.#wanted.size === 0 && this.#broken.size === 0,
        onPack: (packId, data) => this.#take(packId, data),
      });
      for (const d of found.damage)
        this.#o.events({
          type: 'warning',
          message: `${label.label}, file ${d.file}, record ${d.record}: ${d.reason}`,
        });
      this.#knowledge.learn(found.objects, view.repo);
      i = to;
    }
    for (const packId of this.#wanted.keys())
      if (this.#knowledge.labelsOf(packId).includes(label.label))
        this.#lost.add(lostAt(packId, label.label));
  }

  /** Nothing is wanted any more that a cartridge might have. */
  #isDone(): boolean {
    return this.#wanted.size === 0 && !this.#isMendable();
  }

  /** Another copy of a pack of which one was damaged is, or may be, on a cartridge that was not read: one that holds the point as well. */
  #isMendable(): boolean {
    const { volumeId, commit } = this.#o;
    if (this.#broken.size === 0) return false;
    return (
      [...this.#broken.keys()].some((id) => this.#unreadLabel(id) !== undefined) ||
      this.#knowledge.cartridgesOf(volumeId, commit.seq).some((label) => !this.#done.has(label))
    );
  }

  /** Label of a cartridge with a pack on it that was not read yet. */
  #unreadLabel(packId: string): string | undefined {
    return this.#knowledge.labelsOf(packId).find((label) => !this.#done.has(label));
  }

  /** True for a pack that is on no cartridge, as far as is known. */
  #isLost(packId: string): boolean {
    return this.#knowledge.labelsOf(packId).every((label) => this.#lost.has(lostAt(packId, label)));
  }

  /**
   * The cartridge in the drive may hold the commit of the point with other packs: its export was interrupted and went on in another session. Where fewer
   * of the bytes that are still wanted lie in packs that are nowhere, that copy is used from now on.
   */
  async #otherCopies(survey: Survey): Promise<void> {
    if (this.#lostBlocks(this.#wanted) === 0) return;
    const { view, commit, volumeId } = this.#o;
    const { repo } = view;
    const store = new MapStore('the cartridge', new Map(survey.packs));
    const packs = new PackCache({ ...repo.packContext(), store });
    try {
      for (const name of survey.packs.keys()) {
        const packId = packIdOf(name);
        if (packId === undefined) continue;
        let found: readonly ReadCommit[];
        try {
          found = await readCommits(packs, repo.keys, packId, volumeId, () => undefined);
        } catch (error) {
          if (!isKind(error, 'damaged')) throw error;
          continue;
        }
        for (const c of found) {
          const isSame =
            c.full &&
            c.seq === commit.seq &&
            c.commit.epoch === commit.epoch &&
            c.hash.equals(commit.hash);
          const other = isSame ? this.#wantedOf(c) : undefined;
          if (other === undefined || this.#lostBlocks(other) >= this.#lostBlocks(this.#wanted))
            continue;
          this.#wanted = other;
          // What was of no use before may be now.
          for (const id of other.keys()) {
            for (const label of this.#knowledge.labelsOf(id))
              if (!this.#lost.has(lostAt(id, label))) this.#done.delete(label);
          }
        }
      }
    } finally {
      await packs.close();
    }
  }

  /** What is still wanted, as another copy of the commit names it. Undefined where that does not name all of it. */
  #wantedOf(copy: ReadCommit): Map<string, WantedPack> | undefined {
    const ranges = joined(
      [...this.#wanted.values()].flatMap(({ extents }) => {
        const list: ByteRange[] = [];
        for (let i = 0; i < extents.length; i += 5)
          list.push({ offset: extents[i] ?? 0, length: extents[i + 1] ?? 0 });
        return list;
      }),
    );
    let missing = ranges.reduce((sum, r) => sum + r.length, 0);
    const wanted = new Map<string, WantedPack>();
    const extents = copy.extents.toSorted((a, b) => a.block - b.block);
    let at = 0;
    for (const e of extents) {
      while (at < ranges.length && endOf(ranges[at]) <= e.block) at++;
      for (let i = at; i < ranges.length && (ranges[i]?.offset ?? 0) < e.block + e.count; i++) {
        const packId = copy.packIds[e.pack];
        if (packId === undefined) return undefined; // data here, and nothing there
        const part = clipExtent(e, ranges[i]?.offset ?? 0, endOf(ranges[i]), this.#chunkBlocks);
        missing -= part.count;
        let list = wanted.get(packId);
        if (list === undefined) wanted.set(packId, (list = { extents: [] }));
        list.extents.push(part.block, part.count, part.frame, part.sub, part.skip);
      }
    }
    return missing === 0 ? wanted : undefined;
  }

  /** Blocks in packs that are on no cartridge, as far as is known. */
  #lostBlocks(wanted: ReadonlyMap<string, WantedPack>): number {
    let blocks = 0;
    for (const [packId, { extents }] of wanted) {
      if (!this.#isLost(packId)) continue;
      for (let i = 1; i < extents.length; i += 5) blocks += extents[i] ?? 0;
    }
    return blocks;
  }

  async #nextCartridge(
    before: TapeLabel,
  ): Promise<{ label: TapeLabel; survey: Survey } | undefined> {
    const { drive, source, view, needs, events } = this.#o;
    const wishes = new Set<string>();
    for (const packId of [...this.#wanted.keys(), ...this.#broken.keys()]) {
      const at = this.#unreadLabel(packId);
      if (at !== undefined) wishes.add(at);
    }
    const known = [...needs, ...this.#knowledge.cartridgesOf(this.#o.volumeId, this.#o.commit.seq)];
    for (const label of known) if (!this.#done.has(label)) wishes.add(label);
    const [wished] = [...wishes].sort();
    while (source !== undefined) {
      const went = await changeCartridge(drive, source, {
        drive: drive.path,
        setName: before.setName,
        number: wished === undefined ? before.number + 1 : undefined,
        label: wished,
        barcode: wished === undefined ? undefined : this.#knowledge.cartridges.get(wished)?.barcode,
        purpose: 'read',
      });
      if (!went) return undefined;
      const found = await surveyOfSet(drive, before.setId, view.repo, events);
      if (found === undefined || this.#done.has(found.label.label)) {
        if (found !== undefined)
          events({ type: 'warning', message: `cartridge ${found.label.label} was read already` });
        continue;
      }
      this.#knowledge.learn(found.survey.objects, view.repo);
      return found;
    }
    return undefined;
  }

  /** Takes what is wanted of a copy of a pack. */
  async #take(packId: string, data: Buffer<SharedArrayBuffer>): Promise<PackTakenSoFar> {
    // Of two copies one behind the other the second has what was damaged in the first.
    await this.#taking.get(packId);
    const taken = this.#takeCopy(packId, data);
    this.#taking.set(packId, taken);
    try {
      return await taken;
    } finally {
      if (this.#taking.get(packId) === taken) this.#taking.delete(packId);
    }
  }

  async #takeCopy(packId: string, data: Buffer<SharedArrayBuffer>): Promise<PackTakenSoFar> {
    const wanted = this.#wanted.get(packId) ?? this.#broken.get(packId)?.wanted;
    if (wanted === undefined) {
      this.#pool.recycle(data.buffer);
      return { frames: 0, chunks: 0, damaged: [] };
    }
    this.#wanted.delete(packId);
    this.#broken.delete(packId);
    const pieces = [...this.#pieces(wanted)];
    const keys = Uint32Array.from(new Set(pieces.map((p) => p.key))).sort();
    const got = await this.#pool.take(packId, data.buffer, data.length, keys);
    const places = new Map(got.taken.map((t) => [t.key, t]));
    const rest: number[] = [];
    const staging =
      this.#staging.pop() ?? Buffer.from(alignedMemory(STAGING_BYTES).buffer, 0, STAGING_BYTES);
    let start = -1;
    let fill = 0;
    const flush = async (): Promise<void> => {
      if (fill === 0) return;
      const part = staging.subarray(0, fill);
      if (this.#o.verify) this.#checks.push(start, fill, crc32(part));
      await this.#target.device.write(part, start);
      this.#written += fill;
      this.#progress(fill);
      fill = 0;
    };
    for (const piece of pieces) {
      const place = places.get(piece.key);
      if (place === undefined) {
        rest.push(
          piece.offset / BLOCK_BYTES,
          Math.ceil(piece.length / BLOCK_BYTES),
          Math.floor(piece.key / KEY_STEP),
          piece.key % KEY_STEP,
          piece.skipBytes / BLOCK_BYTES,
        );
        continue;
      }
      if (fill > 0 && (start + fill !== piece.offset || fill + piece.length > STAGING_BYTES))
        await flush();
      if (fill === 0) start = piece.offset;
      const from = place.offset + piece.skipBytes;
      const have = Math.max(0, Math.min(piece.length, place.length - piece.skipBytes));
      got.bytes.copy(staging, fill, from, from + have);
      staging.fill(0, fill + have, fill + piece.length);
      fill += piece.length;
    }
    await flush();
    this.#staging.push(staging);
    if (rest.length > 0)
      this.#broken.set(packId, { wanted: { extents: rest }, damaged: got.damaged });
    return { frames: keys.length, chunks: keys.length, damaged: got.damaged };
  }

  *#pieces(wanted: WantedPack): Generator<
    {
      readonly key: number;
      readonly offset: number;
      readonly length: number;
      readonly skipBytes: number;
    },
    void
  > {
    const { extents } = wanted;
    for (let i = 0; i < extents.length; i += 5) {
      let block = extents[i] ?? 0;
      const end = block + (extents[i + 1] ?? 0);
      let frame = extents[i + 2] ?? 0;
      const sub = extents[i + 3] ?? 0;
      let skip = extents[i + 4] ?? 0;
      const isRun = skip + end - block > this.#chunkBlocks;
      while (block < end) {
        const count = isRun ? Math.min(end - block, this.#chunkBlocks - skip) : end - block;
        const offset = block * BLOCK_BYTES;
        yield {
          key: frame * KEY_STEP + sub,
          offset,
          length: Math.min(count * BLOCK_BYTES, this.#o.commit.sizeBytes - offset),
          skipBytes: skip * BLOCK_BYTES,
        };
        block += count;
        frame++;
        skip = 0;
      }
    }
  }

  #miss(wanted: WantedPack): void {
    for (const p of this.#pieces(wanted))
      this.#missing.push({ offset: p.offset, length: p.length });
  }

  /** Compares what the target holds with what was written to it. */
  async #readBack(): Promise<void> {
    const progress = startProgress({
      phase: `reading back ${this.#o.target}`,
      totalBytes: this.#written,
      clock: this.#o.clock,
      events: this.#o.events,
    });
    const memory = alignedMemory(STAGING_BYTES);
    for (let i = 0; i < this.#checks.length; i += 3) {
      if (this.#o.signal?.aborted === true)
        throw new B2Error('interrupted', `reading back ${this.#o.target} was interrupted`);
      const [offset = 0, length = 0, crc = 0] = this.#checks.slice(i, i + 3);
      const part = Buffer.from(memory.buffer, 0, roundUp(length, BLOCK_BYTES));
      const got = await this.#target.device.read(part, offset);
      if (got < length || crc32(part.subarray(0, length)) !== crc)
        throw new B2Error(
          'failed',
          `${this.#o.target} does not hold what was written: ${length} bytes from ${offset} on differ when read back`,
          { hint: 'The disk is failing, or something else writes to it. Do not use this target.' },
        );
      progress.add(length);
    }
    progress.finish();
  }
}

/** Stands for a pack that is not on a cartridge on which it should be. */
function lostAt(packId: string, label: string): string {
  return `${packId} ${label}`;
}

function endOf(range: ByteRange | undefined): number {
  return range === undefined ? 0 : range.offset + range.length;
}

/** Label and directories of a cartridge that should be of a set; undefined, with a warning, for another one. */
export async function surveyOfSet(
  drive: TapeDrive,
  setId: string,
  repo: Repository,
  events: EventSink,
): Promise<{ label: TapeLabel; survey: Survey } | undefined> {
  const wrong = (message: string): undefined => {
    events({ type: 'warning', message });
    return undefined;
  };
  if (!(await drive.status()).loaded) return wrong(`there is no cartridge in ${drive.path}`);
  const contents = await readLabel(drive);
  if (contents.kind !== 'b2')
    return wrong(
      `the cartridge in ${drive.path} is ${contents.kind === 'blank' ? 'blank' : 'not of b2'}`,
    );
  const { label } = contents;
  if (label.setId !== setId)
    return wrong(`cartridge ${label.label} belongs to another set ("${label.setName}")`);
  const survey = await surveyCartridge(drive, label, repo);
  return { label, survey };
}

/** Ranges in ascending order, those that touch as one. */
export function joined(ranges: readonly ByteRange[]): ByteRange[] {
  const out: { offset: number; length: number }[] = [];
  for (const r of ranges.toSorted((a, b) => a.offset - b.offset)) {
    const last = out.at(-1);
    if (last !== undefined && last.offset + last.length >= r.offset)
      last.length = Math.max(last.length, r.offset + r.length - last.offset);
    else out.push({ ...r });
  }
  return out;
}
