/**
 * Leases: the right to do destructive work (prune, compaction, repair, key change) on a repository. Capture,
 * restore and verify take none.
 *
 * A lease is built on the Store contract alone. It is a chain of small objects `locks/<name>/<generation>`, each
 * written once, with `ifAbsent`, and never changed. **Who wrote the highest generation holds the lease**; a
 * generation may also say that the lease is free.
 *
 * - Acquiring, renewing, stealing and releasing are the same step: create the generation after the highest one.
 *   Of all that try, exactly one wins; so a steal cannot cross a renewal, and of two thieves one loses.
 * - A holder renews every quarter of the time to live. It counts itself out (`lost`) when it has not managed to for
 *   three quarters, or when it finds its successor. Others may take over when they have watched the highest
 *   generation stay the same for the whole time to live **by their own monotonic clock**: hosts need not agree on
 *   the time. A holder that is provably dead (process-identity.ts) is succeeded at once.
 * - Old generations are deleted in ascending order, never the highest two. So: a claim of generation N is good if
 *   it was created while N−1 existed (if N had ever existed before and been deleted, N−1 would be gone too).
 *   Somebody who slept, and creates a generation that was used and deleted long ago, sees that, and has claimed
 *   nothing. For generation 1 the object `locks/<name>/cleaned`, written before the first deletion, says the same.
 *   A list that runs while two generations pass could miss both, so every claim is also checked against a new list.
 * - A crash between any two steps leaves a chain that still has one highest generation.
 *
 * What no lease can do: stop a holder that is suspended between its last check and the deletion that follows.
 * {@link Lease.assertHeld} before each step keeps that window small; the grace time of deletions covers it.
 */
import { type Clock, type Random } from '../clock.js';
import { B2Error, isKind, messageOf } from '../errors.js';
import {
  isProvablyAlive,
  isProvablyDead,
  type MachineFacts,
  machineFacts,
  type ProcessIdentity,
} from '../process-identity.js';
import { checkName, type Store } from './store.js';

const DEFAULT_TTL_MS = 60_000;
const MIN_TTL_MS = 1_000;
/** What a record may ask observers to wait at most, so that a damaged one cannot lock for ever. */
const MAX_TTL_MS = 3_600_000;
const GENERATION = /^[0-9]{15}$/;
/** How often observers look, as a fraction of the holder's time to live. */
const LOOKS_PER_TTL = 20;
/** Between looks at a holder that lives, at least. */
const MIN_LOOK_MS = 50;

export interface LeaseOptions {
  readonly clock: Clock;
  readonly random: Random;
  /** Who asks; `currentIdentity()` outside tests. */
  readonly owner: ProcessIdentity;
  /** What for, in a word or two, for the message others get: `prune`. */
  readonly purpose?: string;
  /** Without a renewal for this long the lease can be taken over. 1 s to 1 h; default 60 s. */
  readonly ttlMs?: number;
  /**
   * How long to wait for a holder that shows signs of life. Default 0. A holder that may be dead is watched for its
   * whole time to live in any case, because there is no other way to find out.
   */
  readonly waitMs?: number;
  /** Called when waiting begins, and again when the holder changes. */
  readonly onWait?: (holder: LeaseHolder) => void;
  /** Ends the waiting with kind `interrupted`. */
  readonly signal?: AbortSignal;
  /** What this machine knows of its processes; for tests. */
  readonly machine?: MachineFacts;
}

export interface LeaseHolder {
  readonly owner: ProcessIdentity;
  readonly purpose: string;
  /** When the holder took it, by the holder's wall clock. */
  readonly sinceNs: bigint;
}

export interface Lease extends AsyncDisposable {
  readonly name: string;
  /**
   * Aborts when the lease is lost or could not be renewed in time; `reason` is a B2Error. It is renewed in the
   * background, so it need only be watched, but see `assertHeld`.
   */
  readonly lost: AbortSignal;
  /** Renews now. Rejects with `held` if it was lost, else with what the store said. */
  renew(): Promise<void>;
  /** Asks the store whether the lease is still ours; rejects with `held` if not. Call before each destructive step. */
  assertHeld(): Promise<void>;
  /** Gives it up, so that another can have it at once. Safe to call twice, and when it was lost. */
  release(): Promise<void>;
}

/** One generation as it is stored (JSON). */
interface LeaseRecord {
  readonly state: 'held' | 'free';
  /** Random; the same in all generations of one holding. */
  readonly token: string;
  readonly ttlMs: number;
  readonly holder: LeaseHolder;
}

const UNKNOWN_OWNER: ProcessIdentity = {
  host: 'unknown',
  machineId: '',
  bootId: '',
  pid: 0,
  startTicks: '',
  namespaces: '',
};

function encodeRecord(record: LeaseRecord): Buffer {
  const { holder, ...rest } = record;
  const value = {
    b2lease: 1,
    ...rest,
    purpose: holder.purpose,
    sinceNs: String(holder.sinceNs),
    owner: holder.owner,
  };
  return Buffer.from(`${JSON.stringify(value)}\n`);
}

/**
 * Reads a record. One that cannot be understood (of a later version, or damaged) counts as held by somebody
 * unknown: it is waited out, not believed.
 */
function decodeRecord(bytes: Uint8Array): LeaseRecord {
  let value: Record<string, unknown> = {};
  try {
    const parsed: unknown = JSON.parse(Buffer.from(bytes).toString('utf8'));
    if (
      typeof parsed === 'object' &&
      parsed !== null &&
      'b2lease' in parsed &&
      parsed.b2lease === 1
    ) {
      value = { ...parsed };
    }
  } catch {
    // As above: somebody unknown.
  }
  const text = (from: Record<string, unknown>, key: string): string => {
    const found = from[key];
    return typeof found === 'string' ? found : '';
  };
  const owner: Record<string, unknown> =
    typeof value['owner'] === 'object' && value['owner'] !== null ? { ...value['owner'] } : {};
  const ttlMs = Number(value['ttlMs']);
  const since = text(value, 'sinceNs');
  return {
    state: value['state'] === 'free' ? 'free' : 'held',
    token: text(value, 'token'),
    ttlMs: ttlMs >= MIN_TTL_MS && ttlMs <= MAX_TTL_MS ? ttlMs : DEFAULT_TTL_MS,
    holder: {
      purpose: text(value, 'purpose'),
      sinceNs: /^[0-9]{1,20}$/.test(since) ? BigInt(since) : 0n,
      owner: {
        host: text(owner, 'host') || UNKNOWN_OWNER.host,
        machineId: text(owner, 'machineId'),
        bootId: text(owner, 'bootId'),
        pid: Number.isSafeInteger(owner['pid']) ? Number(owner['pid']) : 0,
        startTicks: text(owner, 'startTicks'),
        namespaces: text(owner, 'namespaces'),
      },
    },
  };
}

/** Terminal control characters of a record written by others are not passed on. */
function printable(text: string): string {
  return text.replace(/[^\x20-\x7e]/g, '?').slice(0, 100);
}

function describe(holder: LeaseHolder): string {
  const since = new Date(Number(holder.sinceNs / 1_000_000n));
  const time = Number.isNaN(since.getTime()) ? 'an unknown time' : since.toISOString();
  const purpose = holder.purpose === '' ? '' : ` (${printable(holder.purpose)})`;
  return `host ${printable(holder.owner.host)}, process ${holder.owner.pid}${purpose}, since ${time}`;
}

/** The chain of one lease in one store. */
class Chain {
  readonly name: string;
  readonly #store: Store;
  readonly #prefix: string;

  constructor(store: Store, name: string) {
    checkName(name);
    this.name = name;
    this.#store = store;
    this.#prefix = `locks/${name}`;
  }

  #object(generation: number): string {
    return `${this.#prefix}/${String(generation).padStart(15, '0')}`;
  }

  /** The generations that a list shows, ascending. */
  async generations(): Promise<number[]> {
    const found: number[] = [];
    for await (const { name } of this.#store.list(this.#prefix)) {
      const last = name.slice(this.#prefix.length + 1);
      if (GENERATION.test(last)) found.push(Number(last));
    }
    return found.sort((a, b) => a - b);
  }

  /** Undefined if it has been deleted, or never was. */
  async read(generation: number): Promise<LeaseRecord | undefined> {
    try {
      return decodeRecord(await this.#store.get(this.#object(generation)));
    } catch (error) {
      if (isKind(error, 'not-found')) return undefined;
      throw error;
    }
  }

  /** The highest generation and its record; undefined for a lease that nobody ever took. */
  async head(): Promise<{ generation: number; record: LeaseRecord } | undefined> {
    for (;;) {
      const generation = (await this.generations()).at(-1);
      if (generation === undefined) return undefined;
      const record = await this.read(generation);
      if (record !== undefined) return { generation, record };
      // It has been succeeded twice since the list: look again.
    }
  }

  /**
   * Creates `generation` after having seen the one before it as the highest. True: it is ours, and was the highest
   * when it was made. False: somebody else was first.
   */
  async claim(generation: number, record: LeaseRecord): Promise<boolean> {
    try {
      await this.#store.put(this.#object(generation), encodeRecord(record), { ifAbsent: true });
    } catch (error) {
      if (!isKind(error, 'exists')) throw error;
      // An earlier try of ours may have failed only on its way back.
      const found = await this.read(generation);
      if (found === undefined || found.token !== record.token || found.state !== record.state) {
        return false;
      }
    }
    const before = generation === 1 ? `${this.#prefix}/cleaned` : this.#object(generation - 1);
    const isThere = (await this.#store.stat(before)) !== undefined;
    const neverUsed = generation === 1 ? !isThere : isThere;
    if (!neverUsed) {
      await this.#store.delete(this.#object(generation));
      return false;
    }
    const highest = (await this.generations()).at(-1);
    return highest === undefined || highest <= generation;
  }

  /** True if `generation` exists and has no successor: its writer holds the lease. In this order: see above. */
  async isHead(generation: number): Promise<boolean> {
    if ((await this.#store.stat(this.#object(generation + 1))) !== undefined) return false;
    return (await this.#store.stat(this.#object(generation))) !== undefined;
  }

  /**
   * After a claim that failed: says that the lease is free if the claim has arrived all the same, so that nobody has
   * to wait it out. Never rejects.
   */
  async withdraw(generation: number, record: LeaseRecord): Promise<void> {
    try {
      if ((await this.read(generation))?.token !== record.token) return;
      await this.claim(generation + 1, { ...record, state: 'free' });
    } catch {
      // The store cannot be reached: then the claim, if it is there, lapses by itself.
    }
  }

  /**
   * Deletes what `head`, which is ours, and its predecessor make superfluous. Never rejects: what is left over
   * disturbs nobody and goes the next time.
   */
  async clean(head: number): Promise<void> {
    try {
      const old = (await this.generations()).filter((generation) => generation < head - 1);
      if (old[0] === 1) await this.#store.put(`${this.#prefix}/cleaned`, new Uint8Array(0));
      for (const generation of old) await this.#store.delete(this.#object(generation));
    } catch {
      // See above.
    }
  }
}

function interrupted(name: string): B2Error {
  return new B2Error('interrupted', `interrupted while waiting for the ${name} lease`);
}

/**
 * Takes the lease `name` (one segment: `prune`). Resolves when it is ours. Rejects with kind `held`, naming the
 * holder, as soon as the holder has shown that it lives and `waitMs` is over; `interrupted` after `signal`; else
 * with what the store said.
 */
export async function acquireLease(
  store: Store,
  name: string,
  options: LeaseOptions,
): Promise<Lease> {
  const { clock, signal } = options;
  const ttlMs = options.ttlMs ?? DEFAULT_TTL_MS;
  if (!Number.isInteger(ttlMs) || ttlMs < MIN_TTL_MS || ttlMs > MAX_TTL_MS) {
    throw new RangeError(`ttlMs is out of range: ${ttlMs}`);
  }
  const machine = options.machine ?? machineFacts();
  const chain = new Chain(store, name);
  const token = Buffer.from(options.random(16)).toString('hex');
  const startMs = monotonicMs(clock);
  let watched: { generation: number; token: string; sinceMs: number } | undefined;

  for (;;) {
    if (signal?.aborted === true) throw interrupted(name);
    const head = await chain.head();
    const nowMs = monotonicMs(clock);
    const record = head?.record;
    const generation = head?.generation ?? 0;
    const isNew = watched?.generation !== generation || watched.token !== record?.token;
    // The same holding under a new generation: it was renewed while we watched.
    const renewed = isNew && watched !== undefined && watched.token === record?.token;
    if (record?.state === 'held' && isNew) {
      if (watched?.token !== record.token) options.onWait?.(record.holder);
      watched = { generation, token: record.token, sinceMs: nowMs };
    }
    const silentMs = watched === undefined ? 0 : nowMs - watched.sinceMs;
    const isFree =
      record === undefined ||
      record.state === 'free' ||
      isProvablyDead(record.holder.owner, machine) ||
      silentMs >= record.ttlMs;
    if (isFree) {
      const holder = {
        owner: options.owner,
        purpose: options.purpose ?? '',
        sinceNs: clock.nowNs(),
      };
      const own: LeaseRecord = { state: 'held', token, ttlMs, holder };
      const claimed = elapsedBase(clock);
      try {
        if (await chain.claim(generation + 1, own)) {
          return new HeldLease(chain, own, generation + 1, claimed, clock);
        }
      } catch (error) {
        await chain.withdraw(generation + 1, own);
        throw error;
      }
      continue; // somebody was faster; see who
    }
    const isAlive = renewed || isProvablyAlive(record.holder.owner, machine);
    const leftMs = (options.waitMs ?? 0) - (nowMs - startMs);
    if (isAlive && leftMs <= 0) throw heldBy(name, record.holder);
    const lookMs = record.ttlMs / LOOKS_PER_TTL;
    await clock.sleep(
      isAlive ? Math.min(lookMs, Math.max(MIN_LOOK_MS, leftMs / 4)) : lookMs,
      signal,
    );
  }
}

/** Who holds the lease now, as far as the store says (it may be dead); undefined if it is free. */
export async function readLease(store: Store, name: string): Promise<LeaseHolder | undefined> {
  const head = await new Chain(store, name).head();
  return head?.record.state === 'held' ? head.record.holder : undefined;
}

function heldBy(name: string, holder: LeaseHolder): B2Error {
  return new B2Error(
    'held',
    `the ${name} lease of this repository is held by ${describe(holder)}`,
    {
      hint: 'Wait until that command has ended, then repeat this one. If it is stuck, end that process: its lease then lapses by itself.',
    },
  );
}

function monotonicMs(clock: Clock): number {
  return Number(clock.monotonicNs() / 1_000_000n);
}

interface ElapsedBase {
  readonly monotonicNs: bigint;
  readonly wallNs: bigint;
}

function elapsedBase(clock: Clock): ElapsedBase {
  return { monotonicNs: clock.monotonicNs(), wallNs: clock.nowNs() };
}

/**
 * Milliseconds since `base`, by the clock that says more: the monotonic one stands still while a machine is
 * suspended, and the wall clock may step. Too much only makes us renew early.
 */
function elapsedMs(clock: Clock, base: ElapsedBase): number {
  const mono = clock.monotonicNs() - base.monotonicNs;
  const wall = clock.nowNs() - base.wallNs;
  return Number((mono > wall ? mono : wall) / 1_000_000n);
}

class HeldLease implements Lease {
  readonly name: string;
  readonly #chain: Chain;
  readonly #record: LeaseRecord;
  readonly #clock: Clock;
  readonly #lost = new AbortController();
  readonly #stop = new AbortController();
  readonly #heartbeat: Promise<void>;
  #generation: number;
  /** When the last successful claim was begun. */
  #renewed: ElapsedBase;
  /** Steps that change the chain go one after the other. */
  #queue: Promise<unknown> = Promise.resolve();
  #released: Promise<void> | undefined;
  #lastFailure: unknown;

  constructor(
    chain: Chain,
    record: LeaseRecord,
    generation: number,
    claimed: ElapsedBase,
    clock: Clock,
  ) {
    this.name = chain.name;
    this.#chain = chain;
    this.#record = record;
    this.#generation = generation;
    this.#renewed = claimed;
    this.#clock = clock;
    this.#heartbeat = this.#beat();
    void this.#watch();
  }

  get lost(): AbortSignal {
    return this.#lost.signal;
  }

  renew(): Promise<void> {
    return this.#serial(() => this.#renew());
  }

  assertHeld(): Promise<void> {
    return this.#serial(async () => {
      this.#throwIfOver();
      if (elapsedMs(this.#clock, this.#renewed) >= this.#record.ttlMs / 4) {
        await this.#renew();
      } else if (!(await this.#chain.isHead(this.#generation))) {
        throw await this.#lose();
      }
      // The store may have taken its time to answer.
      if (elapsedMs(this.#clock, this.#renewed) >= (this.#record.ttlMs * 3) / 4)
        await this.#renew();
    });
  }

  release(): Promise<void> {
    this.#released ??= this.#release();
    return this.#released;
  }

  /** As `release`, but a store that fails is not told: the work is done, and the lease lapses by itself. */
  async [Symbol.asyncDispose](): Promise<void> {
    try {
      await this.release();
    } catch (error) {
      if (!(error instanceof B2Error)) throw error;
    }
  }

  #serial<T>(step: () => Promise<T>): Promise<T> {
    const done = this.#queue.then(step);
    this.#queue = done.catch(() => undefined);
    return done;
  }

  #throwIfOver(): void {
    if (this.#lost.signal.aborted) throw this.#lost.signal.reason as B2Error;
    if (this.#stop.signal.aborted)
      throw new Error(`the ${this.name} lease is used after its release`);
  }

  async #renew(): Promise<void> {
    this.#throwIfOver();
    const begun = elapsedBase(this.#clock);
    if (!(await this.#chain.claim(this.#generation + 1, this.#record))) throw await this.#lose();
    this.#generation++;
    this.#renewed = begun;
    this.#lastFailure = undefined;
    await this.#chain.clean(this.#generation);
  }

  /** Marks the lease as lost to whoever has it now; resolves to the error. */
  async #lose(): Promise<B2Error> {
    const head = await this.#chain.head().catch(() => undefined);
    const by =
      head === undefined || head.record.state === 'free'
        ? 'somebody who has released it since'
        : describe(head.record.holder);
    return this.#setLost(
      new B2Error('held', `lost the ${this.name} lease of this repository to ${by}`, {
        hint: 'This process was stopped or cut off from the repository for too long. Repeat the command when the other has ended.',
      }),
    );
  }

  #setLost(reason: B2Error): B2Error {
    if (!this.#lost.signal.aborted) this.#lost.abort(reason);
    this.#stop.abort();
    return reason;
  }

  /** Renews until stopped or lost. Never rejects. */
  async #beat(): Promise<void> {
    const { ttlMs } = this.#record;
    for (;;) {
      const dueMs = ttlMs / 4 - elapsedMs(this.#clock, this.#renewed);
      await this.#clock.sleep(Math.max(dueMs, ttlMs / 20), this.#stop.signal);
      if (this.#stop.signal.aborted) return;
      try {
        // Renewed meanwhile by a call of the user: then nothing is due yet.
        if (elapsedMs(this.#clock, this.#renewed) >= ttlMs / 4) await this.renew();
      } catch (error) {
        if (this.#stop.signal.aborted) return;
        this.#lastFailure = error;
      }
    }
  }

  /** Counts us out when renewals fail, or the store does not even answer, for too long. Never rejects. */
  async #watch(): Promise<void> {
    const limitNs = (BigInt(this.#record.ttlMs) * 3_000_000n) / 4n;
    for (;;) {
      const leftNs = this.#renewed.monotonicNs + limitNs - this.#clock.monotonicNs();
      if (leftNs <= 0n) break;
      await this.#clock.sleep(Math.ceil(Number(leftNs) / 1e6), this.#stop.signal);
      if (this.#stop.signal.aborted) return;
    }
    const why =
      this.#lastFailure === undefined ? 'it does not answer' : messageOf(this.#lastFailure);
    this.#setLost(
      new B2Error(
        'held',
        `could not renew the ${this.name} lease of this repository in time: ${why}`,
        {
          cause: this.#lastFailure,
          hint: 'Repeat the command when the repository can be reached again.',
        },
      ),
    );
  }

  async #release(): Promise<void> {
    this.#stop.abort();
    if (this.#lost.signal.aborted) return; // perhaps because the store hangs: do not wait for it
    await this.#heartbeat;
    await this.#serial(async () => {
      if (this.#lost.signal.aborted) return;
      const free: LeaseRecord = { ...this.#record, state: 'free' };
      let next = this.#generation + 1;
      while (!(await this.#chain.claim(next, free))) {
        // A renewal that failed only on its way back is ours too; anybody else's ends the matter.
        if ((await this.#chain.read(next))?.token !== this.#record.token) return;
        next++;
      }
      await this.#chain.clean(next);
    });
  }
}
