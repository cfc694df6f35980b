/**
 * One volume as a mount sees it: its history, opened anew when something has come, and images of points, shared by all who have
 * them open. Both are kept for a while after their last use, and there is a bound on how many.
 */
import { B2Error, messageOf } from '../errors.js';
import { PointClass } from '../format/commit.js';
import { packName } from '../format/names.js';
import type { CommitRecord } from '../format/segment.js';
import type { Image } from '../image.js';
import { VolumeHistory } from '../repo/history.js';
import { openImage } from '../repo/point.js';
import type { Repository } from '../repo/repository.js';
import { Timeline } from '../repo/timeline.js';
import { listSnapshots, type Snapshot, type VolumeMeta } from '../repo/volume.js';

/** Images that nobody uses and that are kept open all the same. */
const IDLE_IMAGES = 8;
/** How long an image that nobody uses stays open. */
const IDLE_MS = 30_000;

/** A history in use. It stays open until every user has released it. */
export interface HistoryUse {
  readonly history: VolumeHistory;
  readonly timeline: Timeline;
  release(): Promise<void>;
}

class SharedHistory {
  readonly history: VolumeHistory;
  readonly timeline: Timeline;
  readonly mark: string;
  #users = 0;
  #isRetired = false;

  readonly #onUnused: () => void;

  constructor(history: VolumeHistory, mark: string, onUnused: () => void) {
    this.#onUnused = onUnused;
    this.history = history;
    this.timeline = new Timeline(history.sources);
    this.mark = mark;
  }

  use(): HistoryUse {
    this.#users++;
    let isReleased = false;
    return {
      history: this.history,
      timeline: this.timeline,
      release: async () => {
        if (isReleased) return;
        isReleased = true;
        this.#users--;
        if (this.#users === 0 && !this.#isRetired) this.#onUnused();
        await this.#closeIfUnused();
      },
    };
  }

  get isUsed(): boolean {
    return this.#users > 0;
  }

  /** Closes it now, or with its last user. */
  async retire(): Promise<void> {
    this.#isRetired = true;
    await this.#closeIfUnused();
  }

  async #closeIfUnused(): Promise<void> {
    if (this.#isRetired && this.#users === 0) await this.history.close();
  }
}

interface OpenedImage {
  readonly image: Image;
  readonly history: HistoryUse;
}

interface SharedImage {
  readonly opened: Promise<OpenedImage>;
  users: number;
  idle: NodeJS.Timeout | undefined;
}

/** An image in use; `close` gives it back. */
export interface ImageUse {
  readonly image: Image;
  close(): Promise<void>;
}

export class VolumeView {
  readonly repo: Repository;
  readonly meta: VolumeMeta;
  readonly #warn: (message: string) => void;
  readonly #images = new Map<number, SharedImage>();
  #current: SharedHistory | undefined;
  #running: Promise<SharedHistory> | undefined;
  #queued: Promise<SharedHistory> | undefined;
  #idleHistory: NodeJS.Timeout | undefined;
  #isClosed = false;

  constructor(repo: Repository, meta: VolumeMeta, warn: (message: string) => void) {
    this.repo = repo;
    this.meta = meta;
    this.#warn = warn;
  }

  /** The history as it is now: every commit acknowledged before the call is in it. Release it. */
  async history(): Promise<HistoryUse> {
    for (;;) {
      const shared = await this.#refreshed();
      // Another call may have replaced it meanwhile.
      if (shared !== this.#current) continue;
      clearTimeout(this.#idleHistory);
      return shared.use();
    }
  }

  /** The result of a look that began after this call: one that is under way may have looked too early. */
  #refreshed(): Promise<SharedHistory> {
    if (this.#running === undefined) return this.#start();
    return (this.#queued ??= this.#running
      .catch(() => undefined)
      .then(() => {
        this.#queued = undefined;
        return this.#running ?? this.#start();
      }));
  }

  #start(): Promise<SharedHistory> {
    const running = this.#refresh().finally(() => {
      this.#running = undefined;
    });
    this.#running = running;
    return running;
  }

  /** Closes the history a while after its last use. */
  #historyUnused(): void {
    clearTimeout(this.#idleHistory);
    this.#idleHistory = setTimeout(() => {
      const current = this.#current;
      if (current === undefined || current.isUsed || this.#running !== undefined) return;
      this.#current = undefined;
      current.retire().catch((error: unknown) => this.#warn(messageOf(error)));
    }, IDLE_MS);
    this.#idleHistory.unref();
  }

  async #refresh(): Promise<SharedHistory> {
    if (this.#isClosed)
      throw new B2Error('failed', `the mount of volume ${this.meta.name} is being taken down`);
    // Taken before the history is read: what comes in between makes the next call read it again.
    const mark = await this.#mark();
    const before = this.#current;
    if (before?.mark === mark) return before;
    const history = await VolumeHistory.open(this.repo, this.meta.id);
    for (const { object, error } of history.problems) this.#warn(`${object}: ${error.message}`);
    const fresh = new SharedHistory(history, mark, () => this.#historyUnused());
    this.#current = fresh;
    await before?.retire();
    return fresh;
  }

  /** Changes with every commit, and whenever segments or journal entries come or go. */
  async #mark(): Promise<string> {
    const { repo, meta } = this;
    const parts: string[] = [];
    for await (const { name } of repo.store.list(`volumes/${meta.id}/journal`)) {
      const pack = name.split('/').at(-1) ?? '';
      const size = /^[0-9a-f]{32}$/.test(pack)
        ? (await repo.store.stat(packName(pack)))?.sizeBytes
        : undefined;
      parts.push(`${name}=${size ?? ''}`);
    }
    for await (const { name } of repo.store.list(`volumes/${meta.id}/manifest`)) parts.push(name);
    return parts.sort().join('\n');
  }

  /** The newest exact point; undefined where there is none. */
  async latest(): Promise<CommitRecord | undefined> {
    const use = await this.history();
    try {
      use.history.refuseGap();
      return await use.timeline.latest(PointClass.crash);
    } finally {
      await use.release();
    }
  }

  /** The point with that id, also one that is not exact. */
  async point(seq: number): Promise<CommitRecord | undefined> {
    const use = await this.history();
    try {
      const found = await use.timeline.bySeq(seq);
      return found === undefined || found.pointClass === PointClass.none ? undefined : found;
    } finally {
      await use.release();
    }
  }

  snapshots(): Promise<Snapshot[]> {
    return listSnapshots(this.repo, this.meta.id, this.#warn);
  }

  /** Opens the image of a point, or joins those who have it open. */
  async open(seq: number): Promise<ImageUse> {
    let shared = this.#images.get(seq);
    if (shared === undefined) {
      const fresh: SharedImage = { opened: this.#openImage(seq), users: 0, idle: undefined };
      this.#images.set(seq, fresh);
      shared = fresh;
    } else {
      // The one used last is the last of the map.
      this.#images.delete(seq);
      this.#images.set(seq, shared);
    }
    const mine = shared;
    clearTimeout(mine.idle);
    mine.idle = undefined;
    mine.users++;
    let isClosed = false;
    try {
      const { image } = await mine.opened;
      return {
        image,
        close: async () => {
          if (isClosed) return;
          isClosed = true;
          mine.users--;
          await this.#settle(seq, mine);
        },
      };
    } catch (error) {
      mine.users--;
      if (this.#images.get(seq) === mine) this.#images.delete(seq);
      throw error;
    }
  }

  async #openImage(seq: number): Promise<OpenedImage> {
    const history = await this.history();
    try {
      return { image: await openImage(history.history, this.meta, seq), history };
    } catch (error) {
      await history.release();
      throw error;
    }
  }

  async #settle(seq: number, shared: SharedImage): Promise<void> {
    if (shared.users > 0) return;
    if (this.#isClosed) return this.#drop(seq, shared);
    shared.idle = setTimeout(() => {
      this.#drop(seq, shared).catch((error: unknown) => this.#warn(messageOf(error)));
    }, IDLE_MS);
    shared.idle.unref();
    const idle = [...this.#images].filter(([, s]) => s.users === 0);
    for (const [oldSeq, old] of idle.slice(0, Math.max(0, idle.length - IDLE_IMAGES))) {
      await this.#drop(oldSeq, old);
    }
  }

  async #drop(seq: number, shared: SharedImage): Promise<void> {
    clearTimeout(shared.idle);
    if (shared.users > 0 || this.#images.get(seq) !== shared) return;
    this.#images.delete(seq);
    const { image, history } = await shared.opened;
    await image.close();
    await history.release();
  }

  /** Images open now, used or not. */
  get openImages(): number {
    return this.#images.size;
  }

  /** Closes what nobody uses; the rest closes with its last user. */
  async close(): Promise<void> {
    this.#isClosed = true;
    clearTimeout(this.#idleHistory);
    await (this.#queued ?? this.#running)?.catch(() => undefined);
    for (const [seq, shared] of this.#images) await this.#drop(seq, shared);
    const current = this.#current;
    this.#current = undefined;
    await current?.retire();
  }
}
