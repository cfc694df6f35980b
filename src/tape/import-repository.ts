/** Brings a repository back from cartridges alone. */
import type { Clock } from '../clock.js';
import type { TapeDrive } from '../devices/tape/drive.js';
import { B2Error, isKind } from '../errors.js';
import type { EventSink } from '../events.js';
import { PointClass, className } from '../format/commit.js';
import { decodeConfig } from '../format/config.js';
import { CONFIG_COPY_NAME, CONFIG_NAME, packName } from '../format/names.js';
import { ObjectKind, decodeObject } from '../format/object.js';
import { labelOfName, tapeOfPayload, type TapeLabel } from '../format/tape.js';
import { startProgress } from '../progress.js';
import { repair } from '../repair/repair.js';
import { readCommits } from '../repo/commits.js';
import { VolumeHistory } from '../repo/history.js';
import type { Secret } from '../repo/keys.js';
import { Repository, type Environment } from '../repo/repository.js';
import type { Store } from '../repo/store.js';
import { Timeline } from '../repo/timeline.js';
import { listVolumes } from '../repo/volume.js';
import { SetKnowledge, openTapeView, surveyOfSet, type TapeView } from './import.js';
import { toFile } from './cartridge.js';
import { linkPoints } from './link.js';
import { changeCartridge, type CartridgeSource } from './media.js';
import { DEFAULT_TAPE_WORKERS, PackPool } from './pool.js';
import { readBack } from './read-back.js';

export interface ImportOptions {
  readonly drive: TapeDrive;
  readonly source?: CartridgeSource | undefined;
  /** Where the repository is to be; it holds none yet, or an unfinished import of the same one. */
  readonly store: Store;
  readonly secrets: readonly Secret[];
  readonly env: Environment;
  /** The cartridge in the drive, if it was opened already; it is not closed. */
  readonly view?: TapeView | undefined;
  readonly workers?: number | undefined;
  readonly clock: Clock;
  readonly events: EventSink;
  readonly signal?: AbortSignal | undefined;
}

/** A point after an import. */
export interface ImportedPoint {
  readonly volume: string;
  readonly volumeId: string;
  readonly seq: number;
  readonly instantNs: bigint;
  readonly pointClass: string;
  /** Every pack that it needs is there. */
  readonly whole: boolean;
  /** Labels of the cartridges that the missing ones are on, as far as that is known. */
  readonly missingCartridges: readonly string[];
  readonly missingPacks: number;
}

export interface ImportResult {
  readonly repositoryId: string;
  readonly setName: string;
  readonly cartridges: readonly string[];
  readonly packs: number;
  readonly bytes: number;
  readonly points: readonly ImportedPoint[];
  /** Packs of which no whole copy was found; what is good in them was kept. */
  readonly damagedPacks: readonly string[];
  /** Cartridges of the set that are known of and were not read. */
  readonly missingCartridges: readonly string[];
  readonly elapsedSeconds: number;
  /** Every point that the cartridges speak of is there and whole. */
  readonly isWhole: boolean;
}

/** See {@link ImportOptions}. Kinds `exists` (another repository is there), `refused`, `wrong-key`, `io`, `no-space`, `interrupted`. */
export async function importRepository(options: ImportOptions): Promise<ImportResult> {
  const { drive, secrets, env, events } = options;
  const warn = (message: string): void => events({ type: 'warning', message });
  const view = options.view ?? (await openTapeView(drive, secrets, env, warn));
  try {
    await refuseOther(options.store, view);
    return await PackPool.with(
      {
        handle: view.repo.handle(undefined),
        store: view.repo.store,
        workers: options.workers ?? DEFAULT_TAPE_WORKERS,
        signal: options.signal,
        what: `the import from ${drive.path}`,
      },
      (pool) => new Import(options, view, pool).run(),
    );
  } finally {
    if (options.view === undefined) await view.repo.close();
  }
}

async function refuseOther(store: Store, view: TapeView): Promise<void> {
  for (const name of [CONFIG_NAME, CONFIG_COPY_NAME]) {
    if ((await store.stat(name)) === undefined) continue;
    let same = false;
    try {
      same = decodeConfig(await store.get(name)).id === view.label.repositoryId;
    } catch (error) {
      if (!isKind(error, 'damaged')) throw error;
    }
    throw new B2Error(
      'exists',
      same
        ? `the repository of this cartridge is at ${store.url} already`
        : `there is another repository at ${store.url}`,
      {
        hint: same
          ? 'To use the tape beside it, import to another place (--repo), or write a volume straight to a device (--to).'
          : 'Name an empty place with --repo.',
        code: 10,
      },
    );
  }
}

class Import {
  readonly #o: ImportOptions;
  readonly #view: TapeView;
  readonly #pool: PackPool;
  readonly #knowledge = new SetKnowledge();
  readonly #read: string[] = [];
  /** Packs that are in the store: true if whole. */
  readonly #packs = new Map<string, boolean>();
  /** The copies of packs that count. */
  readonly #copies = new Map<
    string,
    { readonly whole: boolean; readonly frames: number; readonly length: number }
  >();
  readonly #puts = new Map<string, Promise<void>>();
  /** Packs that points need. */
  readonly #needed = new Set<string>();
  #bytes = 0;

  constructor(options: ImportOptions, view: TapeView, pool: PackPool) {
    this.#o = options;
    this.#view = view;
    this.#pool = pool;
  }

  async run(): Promise<ImportResult> {
    const { clock, store, env, events } = this.#o;
    const startNs = clock.monotonicNs();
    let { label } = this.#view;
    this.#knowledge.learn(this.#view.survey.objects, this.#view.repo);
    for (;;) {
      await this.#cartridge(label);
      const next = await this.#next(label);
      if (next === undefined) break;
      label = next;
    }
    // Last of all: until now nobody takes the place for a repository.
    const config =
      this.#view.survey.objects.get(CONFIG_NAME) ?? this.#view.survey.objects.get(CONFIG_COPY_NAME);
    if (config === undefined) throw new Error('a view without a config');
    await store.put(CONFIG_COPY_NAME, config);
    await store.put(CONFIG_NAME, config);
    const repo = await Repository.open(store, this.#o.secrets, env);
    try {
      const isLost = (id: string): boolean => this.#packs.get(id) !== true;
      const linked = await linkPoints(repo, (ids) => ids.filter(isLost).length);
      for (const [packId, was] of linked) {
        this.#packs.set(packId, this.#packs.get(was) ?? true);
        this.#packs.delete(was);
      }
      // Makes the manifest from the journal, and notes what is lost.
      await repair(repo, { data: false, events, signal: this.#o.signal });
      const points = await this.#points(repo);
      await this.#dropUseless(repo);
      return {
        repositoryId: repo.id,
        setName: label.setName,
        cartridges: this.#read,
        packs: this.#packs.size,
        bytes: this.#bytes,
        points,
        damagedPacks: [...this.#packs].filter(([, whole]) => !whole).map(([id]) => id),
        missingCartridges: this.#missing(),
        elapsedSeconds: Number(clock.monotonicNs() - startNs) / 1e9,
        isWhole: this.#isWhole(points),
      };
    } finally {
      await repo.packs.close();
    }
  }

  /** Labels of cartridges that are known of and were not read. */
  #missing(): string[] {
    const known = [...this.#knowledge.cartridges.values()].filter(
      (c) => c.tape.setId === this.#view.label.setId,
    );
    return known
      .map((c) => c.tape.label)
      .filter((l) => !this.#read.includes(l))
      .sort();
  }

  /** What every cartridge of the set holds is known, and all of them were read. */
  #knowsAll(): boolean {
    const { cartridges } = this.#knowledge;
    return (
      this.#missing().length === 0 && !this.#goesOn() && this.#read.every((l) => cartridges.has(l))
    );
  }

  /** See {@link ImportResult.isWhole}. */
  #isWhole(points: readonly ImportedPoint[]): boolean {
    const there = new Set(points.map((p) => `${p.volumeId} ${p.seq}`));
    for (const c of this.#knowledge.cartridges.values())
      for (const s of c.sessions)
        for (const p of s.points) if (!there.has(`${p.volumeId} ${p.seq}`)) return false;
    if (!points.every((p) => p.whole)) return false;
    // Where nobody knows which points there should be, a damaged pack may hold one.
    return this.#knowsAll() || [...this.#packs.values()].every((whole) => whole);
  }

  /** Removes damaged packs that no point needs: of what was written once more because of the damage. */
  async #dropUseless(repo: Repository): Promise<void> {
    if (!this.#knowsAll()) return;
    for (const [packId, whole] of this.#packs) {
      if (whole || this.#needed.has(packId) || this.#holdsPoint(packId)) continue;
      await repo.store.delete(packName(packId));
      repo.packs.forget(packId);
    }
  }

  /** True for the pack with the commit of a point. */
  #holdsPoint(packId: string): boolean {
    return [...this.#knowledge.cartridges.values()].some((c) =>
      c.sessions.some((s) => s.points.some((p) => p.packId === packId)),
    );
  }

  /** True if the set goes on on a cartridge that nothing is known of. */
  #goesOn(): boolean {
    const open = new Map<string, boolean>();
    for (const c of this.#knowledge.cartridges.values())
      for (const s of c.sessions) open.set(s.id, (open.get(s.id) ?? false) || s.last);
    return [...open.values()].includes(false);
  }

  async #next(before: TapeLabel): Promise<TapeLabel | undefined> {
    const { drive, source, events } = this.#o;
    while (source !== undefined) {
      const [wished] = this.#missing();
      if (wished === undefined && !this.#goesOn()) return undefined;
      const went = await changeCartridge(drive, source, {
        drive: drive.path,
        setName: before.setName,
        number: wished === undefined ? before.number + 1 : undefined,
        label: wished,
        barcode: wished === undefined ? undefined : this.#knowledge.cartridges.get(wished)?.barcode,
        purpose: 'read',
      });
      if (!went) return undefined;
      const found = await surveyOfSet(drive, before.setId, this.#view.repo, events);
      if (found === undefined) continue;
      if (this.#read.includes(found.label.label)) {
        events({ type: 'warning', message: `cartridge ${found.label.label} was read already` });
        continue;
      }
      this.#knowledge.learn(found.survey.objects, this.#view.repo);
      return found.label;
    }
    return undefined;
  }

  async #cartridge(label: TapeLabel): Promise<void> {
    const { drive, clock, events, signal, store } = this.#o;
    this.#read.push(label.label);
    const sessions = this.#knowledge.cartridges.get(label.label)?.sessions;
    const progress = startProgress({
      phase: `reading ${label.label} in ${drive.path}`,
      totalBytes: sessions?.reduce((sum, s) => sum + s.bytes, 0),
      clock,
      events,
    });
    await toFile(drive, 1);
    const found = await readBack({
      drive,
      recordBytes: label.recordBytes,
      fromFile: 1,
      pool: this.#pool,
      progress,
      signal,
      onPack: async (packId, data) => {
        const { length } = data;
        const { buffer, ...checked } = await this.#pool.check(packId, data.buffer, length);
        const whole = checked.damaged.length === 0 && checked.sealed;
        const { frames } = checked;
        // A damaged copy is kept as long as there is no better one: most of it is good. Of whole ones, which are alike, it should make no difference.
        const there = this.#copies.get(packId);
        const isBetter =
          there === undefined ||
          (whole && (!there.whole || (frames > there.frames && there.length !== length)));
        if (isBetter) {
          this.#copies.set(packId, { whole, frames, length });
          await this.#putAfter(packId, () =>
            store.put(packName(packId), Buffer.from(buffer, 0, length)),
          );
          this.#bytes += length - (there?.length ?? 0);
          this.#packs.set(packId, whole);
        }
        this.#pool.recycle(buffer);
        return checked;
      },
    });
    progress.finish();
    for (const d of found.damage)
      events({
        type: 'warning',
        message: `${label.label}, file ${d.file}, record ${d.record}: ${d.reason}`,
      });
    this.#knowledge.learn(found.objects, this.#view.repo);
    for (const [name, bytes] of found.objects) {
      if (name === CONFIG_NAME || name === CONFIG_COPY_NAME) continue;
      if (await this.#isBetter(name, bytes)) await store.put(name, bytes);
    }
  }

  /** Puts one copy of a pack after the other, so that the better one stays. */
  async #putAfter(packId: string, put: () => Promise<void>): Promise<void> {
    const before = this.#puts.get(packId) ?? Promise.resolve();
    const mine = before.then(put, put);
    this.#puts.set(packId, mine);
    try {
      await mine;
    } finally {
      if (this.#puts.get(packId) === mine) this.#puts.delete(packId);
    }
  }

  /** Whether an object from tape is good, and newer than what the store has of that name. */
  async #isBetter(name: string, bytes: Buffer): Promise<boolean> {
    const { keys } = this.#view.repo;
    const kind = kindOf(name);
    if (kind === undefined) return false;
    const decode = (b: Buffer): Record<string, unknown> | undefined => {
      try {
        return decodeObject(kind, name, b, keys);
      } catch (error) {
        if (isKind(error, 'damaged')) return undefined;
        throw error;
      }
    };
    const ours = decode(bytes);
    if (ours === undefined) return false;
    if ((await this.#o.store.stat(name)) === undefined) return true;
    const there = decode(await this.#o.store.get(name));
    if (there === undefined) return true;
    if (kind === ObjectKind.volumeMeta) return updatedOf(ours) > updatedOf(there);
    if (labelOfName(name) !== undefined)
      return (
        tapeOfPayload(ours, name).sessions.length >= tapeOfPayload(there, name).sessions.length
      );
    return false;
  }

  async #points(repo: Repository): Promise<ImportedPoint[]> {
    const warn = (message: string): void => this.#o.events({ type: 'warning', message });
    const points: ImportedPoint[] = [];
    for (const volume of await listVolumes(repo, warn)) {
      const history = await VolumeHistory.open(repo, volume.id);
      try {
        for await (const record of new Timeline(history.sources).list({
          minClass: PointClass.fuzzy,
        })) {
          const commits = await readCommits(repo.packs, repo.keys, record.packId, volume.id);
          const commit = commits.find((c) => c.seq === record.seq);
          // What repair adds over a gap is no point of a tape.
          if (commit === undefined) continue;
          for (const id of commit.packIds) this.#needed.add(id);
          const missing = commit.packIds.filter((id) => !this.#packs.has(id));
          const labels = new Set<string>();
          for (const id of missing) {
            const [at] = this.#knowledge.labelsOf(id);
            if (at !== undefined) labels.add(at);
          }
          // Which packs a cartridge holds only it knows; that the point needs the cartridge, others do.
          if (missing.length > 0 && labels.size === 0)
            for (const label of this.#knowledge.cartridgesOf(volume.id, record.seq))
              if (!this.#read.includes(label)) labels.add(label);
          const damaged = commit.packIds.some((id) => this.#packs.get(id) === false);
          points.push({
            volume: volume.name,
            volumeId: volume.id,
            seq: record.seq,
            instantNs: record.instantNs,
            pointClass: className(record.pointClass),
            whole: missing.length === 0 && !damaged,
            missingCartridges: [...labels].sort(),
            missingPacks: missing.length,
          });
        }
      } finally {
        await history.close();
      }
    }
    return points;
  }
}

/** When a volume's meta object was written. */
function updatedOf(meta: Readonly<Record<string, unknown>>): bigint {
  const { updated } = meta;
  return typeof updated === 'string' && /^\d{1,20}$/.test(updated) ? BigInt(updated) : 0n;
}

function kindOf(name: string): ObjectKind | undefined {
  if (/^tapes\/[^/]+$/.test(name)) return ObjectKind.tape;
  const m = /^volumes\/[0-9a-f]{32}\/(meta|epochs|journal|snapshots)(\/|$)/.exec(name);
  switch (m?.[1]) {
    case 'meta':
      return ObjectKind.volumeMeta;
    case 'epochs':
      return ObjectKind.epoch;
    case 'journal':
      return ObjectKind.journal;
    case 'snapshots':
      return ObjectKind.snapshot;
    default:
      return undefined;
  }
}
