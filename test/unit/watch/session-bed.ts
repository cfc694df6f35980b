/** A session over a simulated machine: a disk in memory that can be written, resized, pulled out and replaced. */
import { expect } from 'vitest';
import { systemClock, systemRandom, type Clock } from '../../../src/clock.js';
import type {
  ChangeLoss,
  ChangeSink,
  ChangeSource,
  Poll,
} from '../../../src/devices/change-source.js';
import type { DeviceFacts, ReadDevice } from '../../../src/devices/device.js';
import type { DeviceStamp } from '../../../src/devices/stamp.js';
import { B2Error } from '../../../src/errors.js';
import { PointClass } from '../../../src/format/commit.js';
import type { CommitRecord } from '../../../src/format/segment.js';
import { currentIdentity } from '../../../src/process-identity.js';
import { VolumeHistory } from '../../../src/repo/history.js';
import { openImage } from '../../../src/repo/point.js';
import { Repository } from '../../../src/repo/repository.js';
import type { Store } from '../../../src/repo/store.js';
import { Timeline } from '../../../src/repo/timeline.js';
import { listVolumes, type VolumeMeta } from '../../../src/repo/volume.js';
import { startSession, type SessionHost, type SessionOptions } from '../../../src/watch/session.js';
import type { WatchEvent, WatchSession } from '../../../src/watch/types.js';
import type { TempDir } from '../../support/tmp.js';

export const BLOCK = 4096;
const PATH = '/dev/sim';

/** The system's clock, set wrong by `offsetNs`. */
export class SkewedClock implements Clock {
  offsetNs = 0n;
  nowNs(): bigint {
    return systemClock.nowNs() + this.offsetNs;
  }
  monotonicNs(): bigint {
    return systemClock.monotonicNs();
  }
  sleep(ms: number, signal?: AbortSignal): Promise<void> {
    return systemClock.sleep(ms, signal);
  }
}

/** What spins behind a device's node. */
export class Medium {
  bytes: Buffer;
  identity: Record<string, string>;
  sequence: bigint;
  /** Sectors written, as the kernel counts them. */
  written = 0;
  inFlight = 0;
  isCounted = true;
  isAttached = true;
  /** Called before each read; throws to make it fail. */
  beforeRead: (offset: number) => void = () => undefined;
  reads = 0;
  /** Blocks that cannot be read. */
  readonly bad = new Set<number>();
  failedReads = 0;
  readonly sources = new Set<SimSource>();
  static nextSequence = 1n;

  constructor(bytes: Buffer, identity: Record<string, string>) {
    this.bytes = bytes;
    this.identity = identity;
    this.sequence = Medium.nextSequence++;
  }

  get facts(): DeviceFacts {
    return {
      path: PATH,
      realPath: PATH,
      kind: 'block',
      sizeBytes: this.bytes.length,
      logicalBlockBytes: 512,
      physicalBlockBytes: 512,
      readOnly: false,
      devNumber: '7:7',
      partitionOf: undefined,
      identity: this.identity,
      diskSequence: this.sequence,
    };
  }

  write(block: number, value: number, count = 1): void {
    const issuedNs = systemClock.monotonicNs();
    this.bytes.fill(value, block * BLOCK, Math.min(this.bytes.length, (block + count) * BLOCK));
    this.written += count * 8;
    for (const source of this.sources) source.report(block, count, issuedNs);
  }

  resize(sizeBytes: number): void {
    const next = Buffer.alloc(sizeBytes, 0x5a);
    this.bytes.copy(next);
    this.bytes = next;
  }
}

export class SimSource implements ChangeSource {
  readonly kind = 'trace';
  readonly isTimed = true;
  readonly originNs = systemClock.monotonicNs();
  loss: ChangeLoss | undefined;
  /** Delivered by the next poll that is not held. */
  private queue: ((sink: ChangeSink) => void)[] = [];
  private readonly medium: Medium;

  constructor(medium: Medium) {
    this.medium = medium;
    medium.sources.add(this);
  }

  report(block: number, count: number, issuedNs: bigint): void {
    const issued = Number(issuedNs - this.originNs);
    const completed = Number(systemClock.monotonicNs() - this.originNs) + 1;
    this.queue.push((sink) => {
      sink.issued(block, count, issued, 'write');
      sink.completed(block, count, completed, 'write');
    });
  }

  poll(sink: ChangeSink): Promise<Poll> {
    const completeToNs = Number(systemClock.monotonicNs() - this.originNs);
    const { loss, queue } = this;
    this.loss = undefined;
    this.queue = [];
    for (const deliver of queue) deliver(sink);
    return Promise.resolve({ completeToNs, events: queue.length, more: false, loss });
  }

  close(): Promise<void> {
    this.medium.sources.delete(this);
    return Promise.resolve();
  }
}

/** A machine with one slot for a disk. */
export class Machine implements SessionHost {
  medium: Medium | undefined;
  bootId = 'boot-1';
  place: 'on' | 'beside' | 'apart' = 'apart';
  /** Called with each stamp that is taken, before it is. */
  beforeStamp: () => void = () => undefined;
  source: SimSource | undefined;
  choices: string[] = [];

  constructor(medium: Medium) {
    this.medium = medium;
  }

  open: SessionHost['open'] = (): Promise<ReadDevice> => {
    const { medium } = this;
    if (medium === undefined)
      return Promise.reject(new B2Error('not-found', `there is no device or file ${PATH}`));
    let { facts } = medium;
    return Promise.resolve({
      get facts() {
        return facts;
      },
      read: async (into, offset) => {
        await Promise.resolve();
        medium.reads++;
        medium.beforeRead(offset);
        for (let at = offset; at < offset + into.byteLength; at += BLOCK)
          if (medium.bad.has(Math.floor(at / BLOCK)) && ++medium.failedReads > 0)
            throw new B2Error('io', `read ${PATH}: input/output error`);
        if (this.medium !== medium) throw new B2Error('io', `read ${PATH}: no such device`);
        return medium.bytes.copy(
          into,
          0,
          offset,
          Math.min(medium.bytes.length, offset + into.byteLength),
        );
      },
      dataRanges: (offset, length) => Promise.resolve([{ offset, length }]),
      refresh: () => {
        if (this.medium !== medium)
          return Promise.reject(new B2Error('io', `${PATH} is now another device`));
        ({ facts } = medium);
        return Promise.resolve(facts);
      },
      close: () => Promise.resolve(),
    });
  };

  choose: SessionHost['choose'] = (_device, choice) => {
    this.choices.push(choice);
    if (this.medium === undefined)
      return Promise.reject(new B2Error('not-found', `block device ${PATH} has gone`));
    this.source = new SimSource(this.medium);
    return Promise.resolve({ source: this.source, why: 'a simulation', isFallback: false });
  };

  presence: SessionHost['presence'] = (facts) => {
    const { medium } = this;
    if (medium === undefined)
      return Promise.resolve({ kind: 'gone', why: `${PATH} has been removed` });
    if (medium.sequence !== facts.diskSequence)
      return Promise.resolve({ kind: 'gone', why: `another medium is behind ${PATH} now` });
    return Promise.resolve({ kind: 'here', sizeBytes: medium.bytes.length });
  };

  stamp: SessionHost['stamp'] = (): Promise<DeviceStamp> => {
    this.beforeStamp();
    const { medium } = this;
    if (medium === undefined || !medium.isCounted)
      return Promise.resolve({ counters: undefined, writesInFlight: 0 });
    return Promise.resolve({
      counters: `disk ${this.bootId} ${medium.sequence} ${medium.bytes.length} ${medium.written} 0`,
      writesInFlight: medium.inFlight,
    });
  };

  placeOfRepository: SessionHost['placeOfRepository'] = () => Promise.resolve(this.place);
}

/** A disk with contents that nothing recognises; `value` fills it. */
export function disk(blocks: number, serial: string | undefined, value = 1): Medium {
  return new Medium(Buffer.alloc(blocks * BLOCK, value), serial === undefined ? {} : { serial });
}

export async function newRepo(store: Store, clock: Clock): Promise<Repository> {
  return Repository.init(
    store,
    { encryption: 'none', chunkBytes: 16_384, packBytes: 1024 * 1024 },
    undefined,
    { clock, random: systemRandom, owner: currentIdentity() },
  );
}

export interface Watched {
  readonly session: WatchSession;
  readonly events: WatchEvent[];
  /** What `done` settled with, once it has. */
  readonly ended: Promise<unknown>;
}

export function watch(
  repo: Repository,
  machine: Machine,
  dir: TempDir,
  more: Partial<SessionOptions> = {},
): Watched {
  const events: WatchEvent[] = [];
  const session = startSession({
    device: PATH,
    repo,
    host: 'host',
    stateDir: dir.join('state'),
    intervalMs: 300,
    pollMs: 1,
    retryMs: 5,
    probeMs: 5,
    machine,
    ...more,
    onEvent: (e) => {
      events.push(e);
      more.onEvent?.(e);
    },
  });
  const ended = session.done.then(
    () => undefined,
    (error: unknown) => error,
  );
  return { session, events, ended };
}

/** Waits until `is` holds. */
export async function until(is: () => boolean, what: string): Promise<void> {
  for (let i = 0; !is(); i++) {
    if (i > 5000) throw new Error(`waited in vain for ${what}`);
    await systemClock.sleep(2);
  }
}

export const messagesOf = (events: readonly WatchEvent[], type: 'notice' | 'problem'): string[] =>
  events.flatMap((e) =>
    e.type === 'notice' && type === 'notice'
      ? [e.message]
      : e.type === 'problem' && type === 'problem'
        ? [e.problem.message]
        : [],
  );

export const statesOf = (events: readonly WatchEvent[]): string[] =>
  events.flatMap((e) => (e.type === 'state' ? [e.state] : []));

export async function theVolume(repo: Repository): Promise<VolumeMeta> {
  const [volume, ...others] = await listVolumes(repo, () => undefined);
  expect(others).toEqual([]);
  if (volume === undefined) throw new Error('there is no volume');
  return volume;
}

/** Every exact point, oldest first. */
export async function pointsIn(repo: Repository): Promise<CommitRecord[]> {
  const history = await VolumeHistory.open(repo, (await theVolume(repo)).id);
  try {
    expect(history.chain.gap).toBeUndefined();
    const list: CommitRecord[] = [];
    for await (const c of new Timeline(history.sources).list({ minClass: PointClass.crash }))
      list.push(c);
    return list;
  } finally {
    await history.close();
  }
}

/** What a point restores to. */
export async function contentOf(repo: Repository, seq: number): Promise<Buffer> {
  const volume = await theVolume(repo);
  const history = await VolumeHistory.open(repo, volume.id);
  try {
    const image = await openImage(history, volume, seq);
    const bytes = Buffer.alloc(image.sizeBytes);
    await image.read(bytes, 0);
    await image.close();
    return bytes;
  } finally {
    await history.close();
  }
}
