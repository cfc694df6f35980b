/**
 * Writes points of volumes to cartridges: label, directory, data, contents (FORMAT.md section 11), over as many cartridges as it
 * takes, and reads back what was written.
 */
import type { Clock } from '../clock.js';
import type { TapeDrive } from '../devices/tape/drive.js';
import { writeProtected } from '../devices/tape/file-drive.js';
import { B2Error, isKind } from '../errors.js';
import type { EventSink } from '../events.js';
import { className } from '../format/commit.js';
import {
  CONFIG_COPY_NAME,
  CONFIG_NAME,
  epochName,
  journalName,
  packName,
  snapshotName,
  volumeMetaName,
} from '../format/names.js';
import { ObjectKind, encodeObject } from '../format/object.js';
import {
  TAPE_ROOT,
  isTapeLabel,
  partPayload,
  tapeName,
  tapePartName,
  tapePayload,
  type TapeCartridge,
  type TapeLabel,
  type TapePart,
  type TapePoint,
  type TapeSession,
} from '../format/tape.js';
import { encodeConfig } from '../format/config.js';
import { TAR_BLOCK_BYTES, tarPaddedBytes } from '../format/tape-tar.js';
import { DIRECT_ALIGN_BYTES } from '../memory.js';
import { startProgress, type Progress } from '../progress.js';
import type { Repository } from '../repo/repository.js';
import { listSnapshots } from '../repo/volume.js';
import {
  PartCollector,
  SetIndex,
  forgetCartridge,
  listCartridges,
  putCartridge,
  putParts,
} from './catalogue.js';
import {
  reachesFile,
  readFileId,
  readLabel,
  requireCartridge,
  toFile,
  type CartridgeContents,
} from './cartridge.js';
import { labelMembers } from './layout.js';
import { MapStore } from './map-store.js';
import { changeCartridge, type CartridgeSource } from './media.js';
import { ExportPlan, type ExportPoint, type PlannedPack } from './plan.js';
import { PackPool, type ReadyBytes } from './pool.js';
import { readBack } from './read-back.js';
import { readTapeFile } from './reader.js';
import { surveyCartridge, type Survey } from './survey.js';
import { TapeWriter, type MemberPlace } from './writer.js';

export interface ExportOptions {
  readonly repo: Repository;
  /** For the threads; undefined works in this one (a store that only this thread has). */
  readonly storeUrl: string | undefined;
  readonly drive: TapeDrive;
  /** Where further cartridges come from; undefined: one must do. */
  readonly source?: CartridgeSource | undefined;
  /** Their histories stay open meanwhile. */
  readonly points: readonly ExportPoint[];
  /** Name of the set; undefined: that of the cartridge in the drive, or a new one of this name. */
  readonly setName?: string | undefined;
  readonly defaultSetName: string;
  /** Write only what the set does not hold. */
  readonly sinceLast: boolean;
  /** Overwrite what is on the cartridge. */
  readonly force: boolean;
  /** Read back what was written. */
  readonly verify: boolean;
  readonly recordBytes: number;
  readonly fixedBlocks: boolean;
  /** A file mark about every so many bytes. */
  readonly dataFileBytes: number;
  /** Memory for packs that are ready to be written. */
  readonly bufferBytes: number;
  readonly host: string;
  /** Version of b2. */
  readonly program: string;
  readonly workers?: number | undefined;
  /** Size of packs; undefined: 16 MiB, and more for large exports. A pack must fit on a cartridge. */
  readonly packBytes?: number | undefined;
  readonly clock: Clock;
  readonly events: EventSink;
  readonly signal?: AbortSignal | undefined;
}

/** What an export put on one cartridge. */
export interface CartridgeWritten {
  readonly label: string;
  readonly number: number;
  readonly firstFile: number;
  readonly endFile: number;
  readonly bytes: number;
  readonly packs: number;
  readonly full: boolean;
  /** Undefined: not read back. */
  readonly verified: boolean | undefined;
  readonly damagedPacks: readonly string[];
}

export interface ExportResult {
  readonly setName: string;
  readonly setId: string;
  readonly sessionId: string;
  readonly cartridges: readonly CartridgeWritten[];
  readonly points: readonly TapePoint[];
  /** Chunks written; what the set held already is not among them. */
  readonly chunks: number;
  readonly packs: number;
  /** Packs of the repository among them that were written as they are, and their bytes. */
  readonly copiedPacks: number;
  readonly copiedBytes: number;
  /** Bytes of all records. */
  readonly bytes: number;
  readonly records: number;
  /** How often the drive had to wait for data. */
  readonly underRuns: number;
  /** Time of writing, without changing cartridges and reading back. */
  readonly writeSeconds: number;
  readonly elapsedSeconds: number;
  /** Everything that was read back was right. */
  readonly isWhole: boolean;
}

/** Cartridges that may be refused one after the other before the export gives up. */
const MAX_REFUSALS = 20;
/** Larger packs of the repository are not copied as they are. */
const MAX_COPY_BYTES = 256 * 1024 * 1024;
const ZERO_SESSION = '0'.repeat(32);

/** See the file comment. Kinds: `refused`, `no-space`, `io`, `damaged`, `interrupted`. */
export function exportTape(options: ExportOptions): Promise<ExportResult> {
  return PackPool.with(
    {
      handle: options.repo.handle(options.storeUrl),
      store: options.repo.store,
      workers: options.workers,
      signal: options.signal,
      what: `the export to ${options.drive.path}`,
    },
    (pool) => new Export(options, pool).run(),
  );
}

/** The cartridge in the drive, ready to be written from `file` on. */
interface Current {
  readonly before: TapeCartridge | undefined;
  readonly tape: TapeLabel;
  readonly file: number;
  readonly barcode: string;
}

/** A pack that was made; `index` in the plan. */
interface MadePack {
  readonly index: number;
  readonly bytes: ReadyBytes;
}

/** What is written next: a pack that was made, or a piece of one that is copied. */
interface Part {
  readonly index: number;
  /** Of a copy; undefined: the whole pack. */
  readonly piece: number | undefined;
  readonly isLast: boolean;
  readonly bytes: Promise<ReadyBytes>;
  readonly roomBytes: number;
  /** Of a copy: where its data would begin in a file if nothing had come between. */
  readonly guess: number;
  ready: boolean;
}

/** Parts made or read ahead at least, and for a stand-in at most: where nothing has to be kept streaming, memory that stays in the cache is worth more. */
const LEAST_DEPTH = 2;
const SHORT_AHEAD_BYTES = 48 * 1024 * 1024;

/** Bytes of the header that a file of the tape begins with. */
const FILE_HEAD_BYTES = 2 * TAR_BLOCK_BYTES;

/** Packs that are being made or read, in order, as far ahead as memory allows. The parts of a pack follow each other. */
class PartQueue {
  underRuns = 0;
  readonly #plan: ExportPlan;
  readonly #pool: PackPool;
  readonly #repo: Repository;
  readonly #dataFileBytes: number;
  readonly #aheadBytes: number;
  /** Bytes to wait for once there were none. */
  readonly #enoughBytes: number;
  readonly #ahead: Part[] = [];
  /** What was asked for and is of no use any more. */
  readonly #dropped = new Set<Promise<void>>();
  /** Copies that are to be read once more. */
  readonly #again: number[] = [];
  /** The copy that is being read, and its next piece. */
  #open: { readonly index: number; readonly piece: number; readonly guess: number } | undefined;
  /** Where the next pack would begin in a file of the tape if nothing came between, and how far it was from the truth the last time. */
  #guess = FILE_HEAD_BYTES;
  #skew = 0;
  #next = 0;
  #first = true;

  constructor(
    plan: ExportPlan,
    pool: PackPool,
    repo: Repository,
    bufferBytes: number,
    dataFileBytes: number,
    streams: boolean,
  ) {
    this.#dataFileBytes = dataFileBytes;
    this.#plan = plan;
    this.#pool = pool;
    this.#repo = repo;
    this.#aheadBytes = streams ? bufferBytes : Math.min(bufferBytes, SHORT_AHEAD_BYTES);
    this.#enoughBytes = streams ? Math.floor(bufferBytes * 0.75) : 0;
  }

  /** Has the first parts made, for who has something to write before them. */
  begin(): void {
    this.#fill();
  }

  /**
   * The next part. Where the drive has stopped meanwhile, `isIdle`, one that must not stop often waits until most of the buffer is full again.
   */
  async next(isIdle: () => boolean): Promise<(Part & { readonly ready: true }) | undefined> {
    this.#fill();
    const head = this.#ahead[0];
    if (head === undefined) return undefined;
    if (!head.ready) {
      await head.bytes;
      if (isIdle()) {
        if (!this.#first) this.underRuns++;
        let bytes = 0;
        for (const part of this.#ahead) {
          if (bytes >= this.#enoughBytes) break;
          await part.bytes;
          bytes += part.roomBytes;
        }
      }
    }
    this.#first = false;
    this.#ahead.shift();
    this.#fill();
    return { ...head, ready: true };
  }

  /** Says where the data of a copy really begin in their file. */
  learn(part: Part, dataAt: number): void {
    const away = (dataAt - part.guess) % DIRECT_ALIGN_BYTES;
    this.#skew = away < 0 ? away + DIRECT_ALIGN_BYTES : away;
  }

  /** Forgets what is still to come of a copy, the last part of which was given out, and reads all of it again later. */
  again(index: number): void {
    while (this.#ahead[0]?.index === index) {
      const part = this.#ahead.shift();
      if (part === undefined) break;
      const dropped = part.bytes.then(
        (bytes) => {
          bytes.recycle();
          this.#dropped.delete(dropped);
        },
        () => undefined, // it will be read again
      );
      this.#dropped.add(dropped);
    }
    if (this.#open?.index === index) this.#open = undefined;
    this.#again.push(index);
  }

  #fill(): void {
    let bytes = this.#ahead.reduce((sum, p) => sum + p.roomBytes, 0);
    for (;;) {
      const index = this.#open?.index ?? this.#again[0] ?? this.#next;
      const planned = this.#plan.packs[index];
      if (planned === undefined) return;
      const roomBytes = planned.copy?.roomBytes ?? planned.roomBytes;
      if (this.#ahead.length >= LEAST_DEPTH && bytes + roomBytes > this.#aheadBytes) return;
      if (this.#open === undefined && this.#again.shift() === undefined) this.#next++;
      bytes += roomBytes;
      this.#start(index, planned, roomBytes);
    }
  }

  #start(index: number, planned: PlannedPack, roomBytes: number): void {
    const { packId, copy, sources } = planned;
    const piece = copy === undefined ? undefined : (this.#open?.piece ?? 0);
    const isLast = copy === undefined || piece === copy.pieces - 1;
    const guess = this.#open?.guess ?? this.#guess + TAR_BLOCK_BYTES;
    if (piece === undefined || piece === 0) {
      const end = guess + tarPaddedBytes(copy?.sizeBytes ?? roomBytes);
      this.#guess = end < this.#dataFileBytes ? end : FILE_HEAD_BYTES;
    }
    this.#open = piece === undefined || isLast ? undefined : { index, piece: piece + 1, guess };
    const bytes =
      copy === undefined || piece === undefined
        ? this.#pool.build(
            {
              packId,
              createdNs: this.#repo.env.clock.nowNs(),
              salt: this.#repo.newSalt().toString('hex'),
              sources,
            },
            roomBytes,
          )
        : this.#pool.copy({ ...copy, packId, piece, phase: guess + this.#skew });
    const part: Part = { index, piece, isLast, bytes, roomBytes, guess, ready: false };
    bytes.then(
      () => {
        part.ready = true;
      },
      () => undefined, // seen when it is awaited
    );
    this.#ahead.push(part);
  }

  /** True if {@link next} will give another one. */
  get hasMore(): boolean {
    return (
      this.#ahead.length > 0 ||
      this.#open !== undefined ||
      this.#again.length > 0 ||
      this.#next < this.#plan.packs.length
    );
  }

  async settle(): Promise<void> {
    await Promise.allSettled([...this.#ahead.map((a) => a.bytes), ...this.#dropped]);
  }
}

/** The cartridge's own record, with what verification has noted since: the cartridge cannot know that. */
function withDamage(found: TapeCartridge, known: TapeCartridge): TapeCartridge {
  const damaged = new Set(known.sessions.flatMap((s) => s.damagedPacks));
  if (damaged.size === 0) return found;
  return {
    ...found,
    sessions: found.sessions.map((s) => ({
      ...s,
      verifiedNs: 0n,
      damagedPacks: [...new Set([...s.damagedPacks, ...damaged])],
    })),
  };
}

class Export {
  readonly #o: ExportOptions;
  readonly #pool: PackPool;
  readonly #sessionId: string;
  readonly #startedNs: bigint;
  #known: TapeCartridge[] = [];
  #written: CartridgeWritten[] = [];
  #writeNs = 0n;
  #bytes = 0;
  #records = 0;

  constructor(options: ExportOptions, pool: PackPool) {
    this.#o = options;
    this.#pool = pool;
    this.#sessionId = options.repo.newId();
    this.#startedNs = options.clock.nowNs();
  }

  async run(): Promise<ExportResult> {
    const { repo, drive, clock, events } = this.#o;
    const startNs = clock.monotonicNs();
    const warn = (message: string): void => events({ type: 'warning', message });
    this.#known = await listCartridges(repo, warn);
    await requireCartridge(drive);
    let current = await this.#first();
    const ofSet = this.#known.filter((c) => c.tape.setId === current.tape.setId);
    const index = await SetIndex.load(repo, ofSet, this.#o.sinceLast, warn);
    const { packBytes, bufferBytes, sinceLast, signal } = this.#o;
    const plan = await ExportPlan.make(repo, this.#o.points, index, sinceLast, {
      signal,
      packBytes,
      // Whole packs are in memory when they are read back, a few of them at a time; and those of a small cartridge must not be larger than was asked for.
      copyBytes: Math.min(
        MAX_COPY_BYTES,
        packBytes === undefined ? bufferBytes / 3 : packBytes + packBytes / 4,
      ),
    });
    const { directory, points } = await this.#directory(plan, index, ofSet);
    const { dataFileBytes } = this.#o;
    const queue = new PartQueue(plan, this.#pool, repo, bufferBytes, dataFileBytes, drive.streams);
    queue.begin();
    try {
      let waiting: readonly MadePack[] = [];
      for (;;) {
        const done = await this.#cartridge(current, plan, directory, points, queue, waiting);
        if (done.last) break;
        waiting = done.waiting;
        current = await this.#following(current);
      }
    } finally {
      await queue.settle();
    }
    return {
      setName: current.tape.setName,
      setId: current.tape.setId,
      sessionId: this.#sessionId,
      cartridges: this.#written,
      points,
      chunks: plan.chunks,
      packs: plan.packs.length,
      copiedPacks: plan.copies,
      copiedBytes: plan.packs.reduce((sum, p) => sum + (p.copy?.sizeBytes ?? 0), 0),
      bytes: this.#bytes,
      records: this.#records,
      underRuns: queue.underRuns,
      writeSeconds: Number(this.#writeNs) / 1e9,
      elapsedSeconds: Number(clock.monotonicNs() - startNs) / 1e9,
      isWhole: this.#written.every((w) => w.verified !== false),
    };
  }

  /** What to do with the cartridge that is in the drive at the beginning. */
  async #first(): Promise<Current> {
    const { drive, setName, force, events } = this.#o;
    const contents = await readLabel(drive);
    if (contents.kind === 'b2' && !force) {
      const { label } = contents;
      const same = label.repositoryId === this.#o.repo.id;
      if (same && (setName === undefined || setName === label.setName)) {
        const found = await this.#knownOrRead(label);
        if (found === 'unfinished') return this.#anew(contents, label, undefined);
        if (found !== undefined) {
          if (!found.full) return this.#append(found);
          events({ type: 'note', message: `cartridge ${label.label} is full` });
          return this.#following({ before: found, tape: label, file: 0, barcode: '' });
        }
      }
      throw this.#refused(contents);
    }
    if (contents.kind === 'foreign' && !force) throw this.#refused(contents);
    return this.#fresh(contents, setName ?? this.#o.defaultSetName, undefined);
  }

  /**
   * What is on a cartridge of this repository. `unfinished`: nothing but what an export left that ended before its first contents were written.
   * Undefined: that cannot be told.
   */
  async #knownOrRead(label: TapeLabel): Promise<TapeCartridge | 'unfinished' | undefined> {
    const known = this.#known.find((c) => c.tape.cartridgeId === label.cartridgeId);
    if (known !== undefined) return known;
    const found = await surveyCartridge(this.#o.drive, label, this.#o.repo);
    if (found.record === undefined)
      return (await isUnfinished(this.#o.drive, found, label)) ? 'unfinished' : undefined;
    // The repository has forgotten it; the cartridge has not.
    for (const [name, bytes] of found.objects)
      if (name.startsWith('tapes/')) await this.#o.repo.store.put(name, bytes);
    await putCartridge(this.#o.repo, found.record);
    this.#known.push(found.record);
    return found.record;
  }

  /** Labels a cartridge once more that holds only an unfinished session. */
  #anew(
    contents: CartridgeContents,
    label: TapeLabel,
    after: TapeLabel | undefined,
  ): Promise<Current> {
    this.#warnUnfinished(label);
    return this.#fresh(contents, label.setName, after);
  }

  #warnUnfinished(label: TapeLabel): void {
    this.#o.events({
      type: 'warning',
      message: `cartridge ${label.label} holds only what an interrupted export of this repository left: it is written from its beginning`,
    });
  }

  async #append(remembered: TapeCartridge): Promise<Current> {
    const { drive, repo, events } = this.#o;
    if ((await drive.status()).writeProtected) throw writeProtected(drive.path);
    let known = remembered;
    let file = known.sessions.at(-1)?.endFile ?? 1;
    await this.#prepare(known.tape.recordBytes);
    await behindFiles(drive, file);
    const behind = await readFileId(drive, known.tape.recordBytes);
    if (typeof behind === 'object' && behind.cartridgeId === known.tape.cartridgeId) {
      // An unfinished session, or a finished one that this repository (an older copy of it) knows nothing of.
      const { record: found, objects } = await surveyCartridge(drive, known.tape, repo);
      if (found !== undefined && found.sessions.length > known.sessions.length) {
        const record = withDamage(found, known);
        events({
          type: 'warning',
          message: `${known.tape.label} holds ${record.sessions.length} sessions, of which this repository knew ${known.sessions.length}; they are kept`,
        });
        for (const [name, bytes] of objects)
          if (name.startsWith(`${tapeName(known.tape.label)}.`)) await repo.store.put(name, bytes);
        await putCartridge(repo, record);
        this.#known = this.#known.map((c) => (c === remembered ? record : c));
        known = record;
        file = known.sessions.at(-1)?.endFile ?? file;
      }
      if (known.sessions.length === 0) this.#warnUnfinished(known.tape);
      await this.#prepare(known.tape.recordBytes);
    }
    await toFile(drive, file);
    return { before: known, tape: known.tape, file, barcode: known.barcode };
  }

  async #prepare(recordBytes: number): Promise<void> {
    await this.#o.drive.setRecordBytes(recordBytes, this.#o.fixedBlocks);
    await this.#o.drive.setCompression(false);
  }

  #refused(contents: CartridgeContents): B2Error {
    const { drive, repo } = this.#o;
    let what = 'something';
    if (contents.kind === 'foreign') what = contents.what;
    if (contents.kind === 'b2') {
      const { label } = contents;
      const known = this.#known.find((c) => c.tape.cartridgeId === label.cartridgeId);
      const points = known?.sessions.reduce((n, s) => n + s.points.length, 0);
      what = `cartridge ${label.label} of the set "${label.setName}", written by ${label.host} on ${label.created}${
        label.repositoryId === repo.id
          ? points === undefined
            ? ' (this repository does not know what is on it)'
            : points === 0
              ? ' (an export to it was interrupted: nothing on it is needed)'
              : `, with ${points} points that are still needed`
          : `, of another repository (${label.repositoryId})`
      }`;
    }
    return new B2Error('refused', `will not write to ${drive.path}: it holds ${what}`, {
      hint:
        contents.kind === 'b2' && contents.label.repositoryId === repo.id
          ? `Name its set to add to it (--label ${contents.label.setName}), put in another cartridge, or overwrite it with --force.`
          : 'Put in another cartridge, or overwrite this one with --force.',
    });
  }

  /** Labels the cartridge in the drive. */
  async #fresh(
    contents: CartridgeContents,
    setName: string,
    after: TapeLabel | undefined,
  ): Promise<Current> {
    const { repo, drive, source } = this.#o;
    if (!isTapeLabel(setName) || setName.length > 56)
      throw new B2Error('usage', `"${setName}" cannot be the label of a set`, {
        hint: 'Use 1 to 56 letters, digits, "-" and "_".',
      });
    if ((await drive.status()).writeProtected)
      throw new B2Error('refused', `the cartridge in ${drive.path} is write protected`, {
        hint: 'Move its tab, or put in another cartridge.',
      });
    if (contents.kind === 'b2' && contents.label.repositoryId === repo.id) {
      const old = contents.label;
      const known = this.#known.find((c) => c.tape.cartridgeId === old.cartridgeId);
      this.#known = this.#known.filter((c) => c !== known);
      if (known !== undefined) await forgetCartridge(repo, known.tape.label);
    }
    const ofName = this.#known.filter((c) => c.tape.setName === setName);
    const setId = after?.setId ?? ofName.at(-1)?.tape.setId ?? repo.newId();
    const taken = new Set(this.#known.map((c) => c.tape.label));
    let number =
      Math.max(
        after?.number ?? 0,
        0,
        ...this.#known.filter((c) => c.tape.setId === setId).map((c) => c.tape.number),
      ) + 1;
    while (taken.has(labelFor(setName, number))) number++;
    const nowNs = this.#o.clock.nowNs();
    const tape: TapeLabel = {
      label: labelFor(setName, number),
      cartridgeId: repo.newId(),
      setName,
      setId,
      number,
      repositoryId: repo.id,
      host: this.#o.host,
      created: new Date(Number(nowNs / 1_000_000n)).toISOString(),
      recordBytes: this.#o.recordBytes,
      program: this.#o.program,
    };
    const barcode = (await source?.barcode?.()) ?? '';
    await this.#prepare(tape.recordBytes);
    await drive.rewind();
    const writer = this.#writer(tape, 0);
    try {
      await writer.beginFile('label', ZERO_SESSION);
      for (const [name, data] of labelMembers(tape, repo.keys.encrypted))
        await writer.addMember(name, data);
      await writer.endFile();
    } finally {
      await writer.release();
    }
    if (writer.isFull) throw tooSmall(drive);
    // Whoever finds the cartridge after this export was killed knows that nothing on it counts.
    await putCartridge(repo, { tape, barcode, full: false, sessions: [] });
    return { before: undefined, tape, file: 1, barcode };
  }

  /** Gets the next cartridge into the drive. */
  async #following(current: Current): Promise<Current> {
    const { drive, source, force, events } = this.#o;
    const number = current.tape.number + 1;
    for (let tries = 0; source !== undefined && tries < MAX_REFUSALS; tries++) {
      const wish = {
        drive: drive.path,
        setName: current.tape.setName,
        number,
        label: undefined,
        barcode: undefined,
        purpose: 'write' as const,
      };
      if (!(await changeCartridge(drive, source, wish))) break;
      if (!(await drive.status()).loaded) {
        events({ type: 'warning', message: `there is no cartridge in ${drive.path}` });
        continue;
      }
      const contents = await readLabel(drive);
      const ofSet = contents.kind === 'b2' && contents.label.setId === current.tape.setId;
      if (contents.kind === 'blank' || (force && !ofSet))
        return this.#fresh(contents, current.tape.setName, current.tape);
      if (ofSet && contents.label.repositoryId === this.#o.repo.id) {
        const { label } = contents;
        const found = await this.#knownOrRead(label);
        if (found === 'unfinished') return this.#anew(contents, label, current.tape);
        if (found?.sessions.length === 0) return this.#append(found);
      }
      events({ type: 'warning', message: this.#refused(contents).message });
    }
    throw new B2Error(
      'no-space',
      `cartridge ${current.tape.label} is full and there is no other one for the rest`,
      {
        hint: 'Run it again with --since-last and a blank cartridge: what was written counts. --next-cartridge or --changer brings further ones by itself.',
      },
    );
  }

  #writer(tape: TapeLabel, file: number): TapeWriter {
    return new TapeWriter(this.#o.drive, {
      recordBytes: tape.recordBytes,
      cartridgeId: tape.cartridgeId,
      file,
      mtime: Number(this.#o.clock.nowNs() / 1_000_000_000n),
    });
  }

  /** The objects by which the points of this session can be found and read. */
  async #directory(
    plan: ExportPlan,
    index: SetIndex,
    ofSet: readonly TapeCartridge[],
  ): Promise<{ directory: Map<string, Buffer>; points: TapePoint[] }> {
    const { repo, host } = this.#o;
    const store = new MapStore('the directory of the tape');
    const config = encodeConfig(repo.config);
    store.objects.set(CONFIG_COPY_NAME, config);
    store.objects.set(CONFIG_NAME, config);
    const put = (kind: ObjectKind, name: string, payload: unknown): void => {
      store.objects.set(name, encodeObject(kind, name, payload, repo.newSalt(), repo.keys));
    };
    const finished = new Set(
      ofSet.flatMap((c) => c.sessions.filter((s) => s.last).map((s) => s.id)),
    );
    const written = new Set(plan.packs.map((p) => p.packId));
    const points: TapePoint[] = [];
    const sorted = this.#o.points.toSorted(
      (a, b) =>
        (a.volume.id < b.volume.id ? -1 : a.volume.id > b.volume.id ? 1 : 0) ||
        a.commit.seq - b.commit.seq,
    );
    for (const point of sorted) {
      const { volume, commit } = point;
      const own = points.filter((p) => p.volumeId === volume.id).at(-1);
      const earlier = ofSet
        .flatMap((c) => c.sessions)
        .filter((s) => finished.has(s.id))
        .flatMap((s) => s.points)
        .filter((p) => p.volumeId === volume.id && p.seq < commit.seq)
        .reduce<TapePoint | undefined>(
          (a, p) => (a === undefined || p.seq > a.seq ? p : a),
          undefined,
        );
      const before = own ?? earlier;
      const needs = new Set<string>();
      const packId = await plan.putCommit(repo, store, point, before, host, (pack) => {
        // A copy that an earlier cartridge has as well is written now, too.
        const label = written.has(pack) ? undefined : index.packs.get(pack);
        if (label !== undefined) needs.add(label);
      });
      const nowNs = repo.env.clock.nowNs();
      put(ObjectKind.journal, journalName(volume.id, packId), {
        volume: volume.id,
        epoch: commit.epoch,
        pack: packId,
        firstSeq: String((before?.seq ?? 0) + 1),
        prevHash: before?.hash ?? '0'.repeat(64),
        writer: repo.env.owner,
        created: nowNs,
      });
      put(ObjectKind.epoch, epochName(volume.id, commit.epoch), {
        volume: volume.id,
        epoch: commit.epoch,
        writer: repo.env.owner,
        created: nowNs,
      });
      points.push({
        volumeId: volume.id,
        volumeName: volume.name,
        seq: commit.seq,
        hash: commit.hash.toString('hex'),
        instantNs: commit.instantNs,
        pointClass: className(commit.pointClass),
        sizeBytes: commit.sizeBytes,
        packId,
        needs: [...needs].sort(),
      });
    }
    for (const id of new Set(points.map((p) => p.volumeId))) {
      const copy = async (name: string): Promise<void> => {
        store.objects.set(name, await repo.store.get(name));
      };
      if ((await repo.store.stat(volumeMetaName(id))) !== undefined) await copy(volumeMetaName(id));
      const warn = (message: string): void => this.#o.events({ type: 'warning', message });
      for (const s of await listSnapshots(repo, id, warn))
        if (points.some((p) => p.volumeId === id && p.seq === s.seq && p.hash === s.hash))
          await copy(snapshotName(id, repo.keys.nameHash(s.name)));
    }
    for (const c of ofSet)
      if (c.sessions.length > 0) put(ObjectKind.tape, tapeName(c.tape.label), tapePayload(c));
    return { directory: store.objects, points };
  }

  /** Fills one cartridge as far as it goes. */
  async #cartridge(
    current: Current,
    plan: ExportPlan,
    directory: ReadonlyMap<string, Buffer>,
    points: readonly TapePoint[],
    queue: PartQueue,
    first: readonly MadePack[],
  ): Promise<{ last: boolean; waiting: readonly MadePack[] }> {
    const { repo, drive, clock, events, dataFileBytes } = this.#o;
    const { tape } = current;
    const startNs = clock.monotonicNs();
    const writer = this.#writer(tape, current.file);
    const collector = new PartCollector();
    const progress = startProgress({
      phase: `writing ${tape.label} in ${drive.path}`,
      totalBytes: plan.bytesAtMost,
      clock,
      events,
    });
    /** To be written, before those of the queue. */
    const waiting = [...first];
    /** In the open file, and not yet sure to stay there; `bytes`: of one that was made. */
    let unsure: {
      readonly index: number;
      readonly bytes: ReadyBytes | undefined;
      readonly place: MemberPlace;
    }[] = [];
    let last = false;
    const settle = (keptBytes: number, ended: boolean): void => {
      const still: typeof unsure = [];
      for (const u of unsure) {
        const { index, bytes } = u;
        if (u.place.end <= keptBytes) {
          const { file, record } = u.place;
          const planned = plan.packs[index];
          collector.add({ packId: planned?.packId ?? '', file, record }, plan.placesOf(index));
          progress.add(bytes?.length ?? planned?.copy?.sizeBytes ?? 0);
          bytes?.recycle();
        } else if (!ended) still.push(u);
        else if (bytes === undefined) queue.again(index);
        else waiting.push({ index, bytes });
      }
      unsure = still;
    };
    /** Writes a pack that was made. */
    const putMade = async (index: number, bytes: ReadyBytes): Promise<void> => {
      const name = `${TAPE_ROOT}${packName(plan.packs[index]?.packId ?? '')}`;
      const data = bytes.memory.subarray(bytes.at, bytes.at + bytes.length);
      unsure.push({ index, bytes, place: await writer.addMember(name, data) });
    };
    /** Writes a copy, of which `part` is the first piece, as far as the cartridge takes it. */
    const putCopy = async (part: Part): Promise<void> => {
      const { index } = part;
      const planned = plan.packs[index];
      if (planned?.copy === undefined || part.piece !== 0) throw new Error('not the first piece');
      const { packId, copy } = planned;
      const place = await writer.beginMember(`${TAPE_ROOT}${packName(packId)}`, copy.sizeBytes);
      queue.learn(part, place.end - tarPaddedBytes(copy.sizeBytes));
      for (let piece: Part | undefined = part; ;) {
        const { memory, at, length, recycle } = await piece.bytes;
        await writer.addLent(memory, at, length, recycle);
        if (piece.isLast || writer.isFull) break;
        this.#throwIfAborted();
        piece = await queue.next(() => writer.isIdle);
        if (piece?.index !== index) throw new Error('a piece of another pack');
      }
      unsure.push({ index, bytes: undefined, place });
    };
    try {
      const begun = await this.#putDirectory(writer, directory);
      while (begun && !writer.nearEnd) {
        this.#throwIfAborted();
        const made = waiting.shift();
        const part = made === undefined ? await queue.next(() => writer.isIdle) : undefined;
        if (made === undefined && part === undefined) break;
        if (!writer.isOpen) await writer.beginFile('data', this.#sessionId);
        if (made !== undefined) await putMade(made.index, made.bytes);
        else if (part?.piece === undefined && part !== undefined)
          await putMade(part.index, await part.bytes);
        else if (part !== undefined) await putCopy(part);
        await writer.settle();
        settle(writer.safeBytes, false);
        if (writer.fileBytes >= dataFileBytes) settle(await writer.endFile(), true);
      }
      if (writer.isOpen) settle(await writer.endFile(), true);
      last = begun && waiting.length === 0 && !queue.hasMore;
      if (!last && collector.packs === 0 && current.file === 1) throw tooSmall(drive);
      const directoryPacks = points.map((p) => p.packId);
      for (const packId of directoryPacks)
        collector.add({ packId, file: current.file, record: 0 }, []);
      const parts = collector.finish();
      let session: TapeSession = {
        id: this.#sessionId,
        startedNs: this.#startedNs,
        finishedNs: clock.nowNs(),
        firstFile: current.file,
        endFile: writer.file + 1,
        bytes: writer.bytes,
        last,
        points,
        packs: collector.packs,
        parts: parts.length,
        verifiedNs: 0n,
        damagedPacks: [],
      };
      let record: TapeCartridge = {
        tape,
        barcode: current.barcode,
        full: !last || writer.nearEnd,
        sessions: [...(current.before?.sessions ?? []), session],
      };
      if (!(await this.#putContents(writer, directory, record, parts))) {
        session = { ...session, endFile: writer.file };
        record = { ...record, full: true, sessions: [...record.sessions.slice(0, -1), session] };
      }
      this.#writeNs += clock.monotonicNs() - startNs;
      this.#bytes += writer.bytes;
      this.#records += writer.records;
      progress.finish();
      await putParts(repo, tape.label, record.sessions.length - 1, parts);
      await putCartridge(repo, record);
      const packIds = parts.flatMap((p) => p.packs.map((q) => q.packId));
      const damagedPacks = this.#o.verify
        ? await this.#readBack(tape, session, packIds, current.file, writer.file)
        : undefined;
      if (damagedPacks !== undefined) {
        const checked: TapeSession = {
          ...session,
          verifiedNs: damagedPacks.length === 0 ? clock.nowNs() : 0n,
          damagedPacks,
        };
        record = { ...record, sessions: [...record.sessions.slice(0, -1), checked] };
        await putCartridge(repo, record);
      }
      this.#known = [...this.#known.filter((c) => c.tape.cartridgeId !== tape.cartridgeId), record];
      this.#written.push({
        label: tape.label,
        number: tape.number,
        firstFile: session.firstFile,
        endFile: session.endFile,
        bytes: writer.bytes,
        packs: packIds.length,
        full: record.full,
        verified: damagedPacks === undefined ? undefined : damagedPacks.length === 0,
        damagedPacks: damagedPacks ?? [],
      });
      return { last, waiting };
    } finally {
      progress.finish();
      await writer.release();
    }
  }

  async #putDirectory(
    writer: TapeWriter,
    directory: ReadonlyMap<string, Buffer>,
  ): Promise<boolean> {
    await writer.beginFile('directory', this.#sessionId);
    await putMembers(writer, directory);
    const whole = !writer.isFull;
    return (await writer.endFile()) > 0 && whole && !writer.isFull;
  }

  /** The directory again, and what the cartridge holds. False if nothing of it fits: it is in the repository, and on the next cartridge. */
  async #putContents(
    writer: TapeWriter,
    directory: ReadonlyMap<string, Buffer>,
    record: TapeCartridge,
    parts: readonly TapePart[],
  ): Promise<boolean> {
    const { repo } = this.#o;
    const { label } = record.tape;
    const objects = new Map<string, Buffer>();
    const put = (name: string, payload: unknown): void => {
      objects.set(name, encodeObject(ObjectKind.tape, name, payload, repo.newSalt(), repo.keys));
    };
    for (const c of this.#known)
      if (c.tape.setId === record.tape.setId && c.tape.label !== label && c.sessions.length > 0)
        put(tapeName(c.tape.label), tapePayload(c));
    parts.forEach((part, i) => {
      put(tapePartName(label, record.sessions.length - 1, i), partPayload(part));
    });
    put(tapeName(label), tapePayload(record));
    await writer.beginFile('contents', this.#sessionId);
    const all = new Map([
      ...[...directory].filter(([name]) => !name.startsWith('tapes/')),
      ...objects,
    ]);
    // Behind the early warning there is room for this; only the end of the medium itself counts.
    writer.isFull = false;
    await putMembers(writer, all);
    const kept = await writer.endFile(2);
    if (writer.isFull)
      this.#o.events({
        type: 'detail',
        message: `the contents of ${label} did not fit on it; the repository and the next cartridge have them`,
      });
    return kept > 0;
  }

  /** Reads back what the session put on the cartridge; resolves to the packs that are not right there. */
  async #readBack(
    tape: TapeLabel,
    session: TapeSession,
    packIds: readonly string[],
    fromFile: number,
    toFile_: number,
  ): Promise<string[]> {
    const { drive, clock, events, signal } = this.#o;
    await toFile(drive, fromFile);
    let progress: Progress | undefined;
    try {
      progress = startProgress({
        phase: `reading back ${tape.label}`,
        totalBytes: session.bytes,
        clock,
        events,
      });
      const found = await readBack({
        drive,
        recordBytes: tape.recordBytes,
        fromFile,
        toFile: toFile_,
        pool: this.#pool,
        progress,
        signal,
      });
      for (const d of found.damage.slice(0, 10))
        events({
          type: 'warning',
          message: `${tape.label}, file ${d.file}, record ${d.record}: ${d.reason}`,
        });
      const good = new Set(found.packs.filter((p) => p.damaged.length === 0).map((p) => p.packId));
      return packIds.filter((id) => !good.has(id));
    } finally {
      progress?.finish();
    }
  }

  #throwIfAborted(): void {
    if (this.#o.signal?.aborted === true)
      throw new B2Error('interrupted', `the export to ${this.#o.drive.path} was interrupted`, {
        hint: 'The next export to this cartridge overwrites what was left unfinished.',
      });
  }
}

/** Goes to the beginning of file `file`, which is the next one. Where only the mark before it is missing, that is written. */
async function behindFiles(drive: TapeDrive, file: number): Promise<void> {
  if (await reachesFile(drive, file)) return;
  // The contents were the last thing that an export could write before it was killed.
  await toFile(drive, file - 1);
  await drive.toEndOfData();
  await drive.writeMarks(1);
  await toFile(drive, file);
}

/**
 * True for a cartridge that holds, behind its label, nothing or one session that was not finished: every file says of itself that it belongs to that, there is no
 * record of the cartridge, and the last archive breaks off. One that ends as it should may be what a full cartridge ends with.
 */
async function isUnfinished(drive: TapeDrive, survey: Survey, label: TapeLabel): Promise<boolean> {
  const { files, damage, objects } = survey;
  const last = files.at(-1);
  // What some drives give out behind the end of data looks damaged. But no session was ever finished there if no mark follows.
  const behind = last?.file ?? 0;
  if (damage.some((d) => d.file > behind)) {
    try {
      if (await reachesFile(drive, behind + 2)) return false;
    } catch (error) {
      if (!isKind(error, 'io') || !(await drive.status()).loaded) throw error;
      return false; // the drive cannot tell: a person decides
    }
  }
  if (last === undefined) return true;
  const ofOne = files.every(
    (f, i) =>
      f.cartridgeId === label.cartridgeId &&
      f.sessionId === last.sessionId &&
      f.file === i + 1 &&
      (f.kind === 'directory') === (i === 0),
  );
  if (!ofOne || objects.has(tapeName(label.label)) || damage.some((d) => d.file < last.file))
    return false;
  if (last.kind === 'directory') return true;
  await toFile(drive, last.file);
  const items = readTapeFile({
    drive,
    recordBytes: label.recordBytes,
    file: last.file,
    onDamage: () => undefined,
    skip: () => true,
  });
  for (;;) {
    const next = await items.next();
    if (next.done === true) return next.value.breaksOff;
  }
}

async function putMembers(writer: TapeWriter, objects: ReadonlyMap<string, Buffer>): Promise<void> {
  for (const [name, data] of objects)
    if (!writer.isFull) await writer.addMember(`${TAPE_ROOT}${name}`, data);
}

function labelFor(setName: string, number: number): string {
  return `${setName}-${String(number).padStart(3, '0')}`;
}

function tooSmall(drive: TapeDrive): B2Error {
  return new B2Error('no-space', `the cartridge in ${drive.path} is too small to hold a pack`, {
    hint: 'Use larger cartridges, or smaller packs (--pack-size 2M).',
  });
}
