/** Several devices, one cut: every point of the group is one instant of all of them, whatever fails in between. */
import { describe, expect, it } from 'vitest';
import {
  commonInstants,
  PointGroup,
  type GroupCut,
  type GroupState,
} from '../../../src/capture/group.js';
import { IntervalCut } from '../../../src/capture/interval-cut.js';
import {
  LiveCapture,
  type CaptureEvent,
  type CapturedPoint,
} from '../../../src/capture/live-capture.js';
import { systemClock } from '../../../src/clock.js';
import { Coverage, PointClass } from '../../../src/format/commit.js';
import { VolumeHistory } from '../../../src/repo/history.js';
import type { Repository } from '../../../src/repo/repository.js';
import { Timeline } from '../../../src/repo/timeline.js';
import { writeVolumeMeta } from '../../../src/repo/volume.js';
import {
  BLOCK,
  FakeSource,
  LoggedDevice,
  imageAt,
  repositorySink,
  until,
} from '../../support/live-bed.js';
import { newModel, seeded, testMeta } from '../../support/model-volume.js';
import { testImage } from '../../support/scan-bed.js';
import { FaultStore, type FaultCall, type Fault } from '../../support/store-fault.js';
import { MemoryStore } from '../../support/store-memory.js';

const MIB = 1024 * 1024;
/** Histories of the random test; more where somebody asks for them. */
const SEEDS = Number(process.env['B2_TEST_SEEDS'] ?? 2);
/** The second ends in the middle of a block. */
const SIZES = [5 * MIB, 6 * MIB + 512, 2 * MIB];

class Group {
  readonly repo: Repository;
  readonly volumes: readonly string[];
  readonly disks: readonly LoggedDevice[];
  readonly sources: readonly FakeSource[];
  readonly events: CaptureEvent[][] = SIZES.map(() => []);
  readonly points: CapturedPoint[][] = SIZES.map(() => []);
  readonly captures: readonly LiveCapture[];
  readonly group: PointGroup;
  readonly changes: GroupState[] = [];
  private readonly closing: (() => Promise<void>)[] = [];
  readonly random: () => number;
  private readonly intervalMs: number;

  private constructor(
    repo: Repository,
    volumes: readonly string[],
    random: () => number,
    seed: number,
    intervalMs: number,
  ) {
    this.repo = repo;
    this.volumes = volumes;
    this.random = random;
    this.intervalMs = intervalMs;
    this.disks = SIZES.map((size, i) => new LoggedDevice(testImage(seed + i, size)));
    // Sources are opened one after the other, so that their clocks differ.
    const origin = systemClock.monotonicNs();
    this.sources = SIZES.map((_, i) => new FakeSource(origin - BigInt(i * 1_234_567)));
    this.group = new PointGroup({
      name: 'db',
      devices: SIZES.map((_, i) => `disk${i}`),
      clock: systemClock,
      onChange: (state) => this.changes.push(state),
    });
    this.captures = SIZES.map((_, i) => this.capture(i));
  }

  /** Starts the capture of one device, again if need be. */
  capture(i: number, isInSync = false): LiveCapture {
    const disk = this.disk(i);
    const sink = repositorySink(this.repo, this.volumes[i] ?? '', disk.device);
    this.closing.push(() => sink.close());
    return LiveCapture.start({
      source: this.source(i),
      device: disk.device,
      sink,
      clock: systemClock,
      intervalMs: this.intervalMs,
      attemptMs: 10_000,
      pollMs: 1,
      retryMs: 2,
      scanBlocks: 1024,
      stageBytes: 300 * BLOCK,
      isInSync,
      group: { of: this.group, device: `disk${i}` },
      onEvent: (e) => {
        this.events[i]?.push(e);
        if (e.type === 'point') this.points[i]?.push(e.point);
      },
    });
  }

  static async start(
    seed: number,
    rule: (call: FaultCall) => Fault | undefined = () => undefined,
    intervalMs = 600_000,
  ): Promise<Group> {
    const random = seeded(seed);
    const store = new FaultStore(new MemoryStore(), rule);
    const { repo, model, writer } = await newModel(store, random, { sizeBytes: SIZES[0] ?? 0 });
    await writer.close();
    const volumes = [model.volumeId];
    for (const [i, size] of SIZES.entries()) {
      if (i === 0) continue;
      const id = repo.newId();
      await writeVolumeMeta(repo, testMeta(id, size, `host/sd${i}`));
      volumes.push(id);
    }
    return new Group(repo, volumes, random, seed, intervalMs);
  }

  disk(i: number): LoggedDevice {
    const disk = this.disks[i];
    if (disk === undefined) throw new Error('no such disk');
    return disk;
  }

  source(i: number): FakeSource {
    const source = this.sources[i];
    if (source === undefined) throw new Error('no such source');
    return source;
  }

  live(i: number): LiveCapture {
    const capture = this.captures[i];
    if (capture === undefined) throw new Error('no such capture');
    return capture;
  }

  /** One write to a disk chosen at random: in one thread, so that each is issued after the one before was over. */
  write(i = Math.floor(this.random() * SIZES.length)): void {
    const disk = this.disk(i);
    const blocks = Math.ceil(disk.bytes.length / BLOCK);
    const block = this.random() < 0.2 ? blocks - 1 : Math.floor(this.random() * blocks);
    const length = Math.min(BLOCK, disk.bytes.length - block * BLOCK);
    disk.write(this.source(i), block, Buffer.alloc(length, `written ${this.random()} `));
  }

  /** Waits until every device has been read and the group is whole. */
  async whole(): Promise<void> {
    await until(() => this.group.look().isWhole, 'the group to be whole');
  }

  /** A point of all, asked for of one of them. */
  async point(i = 0): Promise<CapturedPoint> {
    const point = await this.live(i).point();
    await until(
      () => this.points.every((list) => list.some((p) => p.instantNs === point.instantNs)),
      'the points of the others',
    );
    return point;
  }

  /** Holds every point against its disk, and those of the group against all. */
  async check(): Promise<void> {
    for (const [i, list] of this.points.entries()) {
      const origin = Number(this.source(i).originNs);
      for (const p of list.slice(-8)) {
        const image = await imageAt(this.repo, this.volumes[i] ?? '', p.seq);
        this.disk(i).check(image, origin + p.instantSourceNs, `disk ${i}, point ${p.seq}`);
        if (p.group === undefined) continue;
        for (const [j, other] of this.points.entries()) {
          const same = other.find((q) => q.instantNs === p.instantNs);
          if (same === undefined) continue;
          // One instant by the monotonic clock as well, which is what the writes are held against.
          expect(Number(this.source(j).originNs) + same.instantSourceNs).toBeCloseTo(
            origin + p.instantSourceNs,
            -2,
          );
        }
      }
    }
  }

  get shared(): bigint[] {
    return commonInstants(this.points.map((list) => list.map((p) => p.instantNs)));
  }

  async end(): Promise<void> {
    for (const capture of this.captures) await capture.stop().catch(() => undefined);
    for (const close of this.closing) await close();
    await this.repo.close();
  }
}

async function instantsOf(repo: Repository, volumeId: string): Promise<Map<bigint, number>> {
  const history = await VolumeHistory.open(repo, volumeId);
  try {
    const timeline = new Timeline(history.sources);
    const found = new Map<bigint, number>();
    for (let seq = 1; seq <= (history.tip?.seq ?? 0); seq++) {
      const commit = await timeline.bySeq(seq);
      if (commit !== undefined && commit.pointClass !== PointClass.none)
        found.set(commit.instantNs, seq);
    }
    return found;
  } finally {
    await history.close();
  }
}

describe('a group of devices', () => {
  it('has points that are one instant of all of them', async () => {
    let points = 0;
    for (let seed = 1; seed <= SEEDS; seed++) {
      const group = await Group.start(seed);
      await group.whole();
      let left = 0;
      for (const disk of group.disks)
        disk.memory.before = () => {
          if (left > 0 && group.random() < 0.4) group.write();
          if (left-- > 0 && group.random() < 0.4) setImmediate(() => group.write());
        };
      for (let i = 0; i < 6; i++) {
        left = 60;
        await group.point(i % SIZES.length);
        for (let n = 0; n < 20; n++) group.write();
        if (i === 2) {
          group.source(0).loss = { reason: 'overrun', message: 'lost some' };
          await group.live(0).point();
          await group.whole();
        }
      }
      for (const disk of group.disks) disk.memory.before = () => undefined;
      // What was put off until now is written before the last point is asked for.
      await systemClock.sleep(20);
      const last = await group.point();
      expect(last.group).toBe('db');
      for (const [i, disk] of group.disks.entries()) {
        const seq = group.points[i]?.find((p) => p.instantNs === last.instantNs)?.seq;
        expect((await imageAt(group.repo, group.volumes[i] ?? '', seq)).equals(disk.bytes)).toBe(
          true,
        );
      }
      await group.check();
      points += group.shared.length;
      await group.end();
    }
    expect(points).toBeGreaterThanOrEqual(SEEDS * 7);
  }, 180_000);

  it('never splits a pair of writes that one program made one after the other', async () => {
    const group = await Group.start(10, undefined, 5);
    await group.whole();
    // The second is issued when the first is over: no point of the group may have the second alone.
    let pairs = 0;
    // However long that takes on a machine with much else to do.
    for (let n = 1; group.shared.length < 6 || n <= 300; n++) {
      expect(n).toBeLessThan(20_000);
      pairs = n;
      for (const i of [0, 1])
        group.disk(i).write(group.source(i), 7, Buffer.alloc(BLOCK, `${n} `.repeat(8)));
      if (n % 3 === 0) await systemClock.sleep(n % 8);
    }
    await group.point();
    const numberIn = async (i: number, seq: number): Promise<number> => {
      const image = await imageAt(group.repo, group.volumes[i] ?? '', seq);
      return Number.parseInt(image.toString('latin1', 7 * BLOCK, 7 * BLOCK + 8), 10) || 0;
    };
    const instants = group.shared;
    let different = 0;
    for (const instant of instants) {
      const seqs = [0, 1].map(
        (i) => group.points[i]?.find((p) => p.instantNs === instant)?.seq ?? 0,
      );
      const [first, second] = await Promise.all(seqs.map((seq, i) => numberIn(i, seq)));
      expect(second).toBeLessThanOrEqual(first ?? 0);
      expect((first ?? 0) - (second ?? 0)).toBeLessThanOrEqual(1);
      different = Math.max(different, first ?? 0);
    }
    expect(different).toBe(pairs);
    expect(instants.length).toBeGreaterThan(3);
    await group.end();
  }, 60_000);

  it('stores on each volume what is its own, and an empty commit where nothing has changed', async () => {
    const group = await Group.start(20);
    const { repo, volumes } = group;
    await group.whole();
    // Without any write: what was read first becomes a point of all.
    await until(() => group.shared.length === 1, 'a first point of the group');
    group.disk(1).write(group.source(1), 1536, Buffer.alloc(512, 'the short last block'));
    const second = await group.point(1);
    expect(second).toMatchObject({ blocks: 1, coverage: Coverage.exact, group: 'db' });
    expect(group.points[0]?.at(-1)).toMatchObject({ blocks: 0, coverage: Coverage.exact });
    const instants = await Promise.all(volumes.map((id) => instantsOf(repo, id)));
    expect(commonInstants(instants.map((m) => [...m.keys()]))).toEqual(group.shared);
    expect(group.shared).toHaveLength(2);
    await group.check();
    await group.end();
  });

  it('goes on apart while one takes no part, each with points of its own, and together again', async () => {
    let failing = '';
    // A pack does not say whose it is; the journal entry before it does.
    const packs = new Map<string, string>();
    const group = await Group.start(30, (call) => {
      const entry = /^volumes\/([0-9a-f]+)\/journal\/([0-9a-f]+)$/.exec(call.name);
      if (entry?.[1] !== undefined && entry[2] !== undefined) packs.set(entry[2], entry[1]);
      const owner = packs.get(call.name.split('/').at(-1) ?? '') ?? entry?.[1];
      const isWrite = call.kind === 'append' || call.kind === 'sync' || call.kind === 'put';
      return isWrite && failing !== '' && owner === failing ? { do: 'no-space' } : undefined;
    });
    const { repo, volumes, disks } = group;
    await group.whole();
    await group.point();
    failing = volumes[1] ?? '';
    for (let i = 0; i < SIZES.length; i++) group.write(i);
    const waiting = group.live(1).point();
    await until(() => group.live(1).status().outage?.kind === 'no-space', 'an outage');
    expect(group.group.look()).toMatchObject({ isWhole: false, missing: ['disk1'] });
    group.write(0);
    const own = await group.live(0).point();
    expect(own.group).toBeUndefined();
    failing = '';
    expect(await waiting).toMatchObject({ coverage: Coverage.coalesced });
    await group.whole();
    expect(group.changes.map((c) => c.isWhole)).toEqual([true, false, true]);
    const last = await group.point(2);
    const instants = await Promise.all(volumes.map((id) => instantsOf(repo, id)));
    const common = commonInstants(instants.map((m) => [...m.keys()]));
    expect(common).toContain(last.instantNs);
    expect(common).not.toContain(own.instantNs);
    for (const [i, disk] of disks.entries()) {
      const seq = instants[i]?.get(last.instantNs);
      expect((await imageAt(repo, volumes[i] ?? '', seq)).equals(disk.bytes)).toBe(true);
    }
    await group.check();
    await group.end();
  });

  it('is not held up by a device that has gone, and takes it in again', async () => {
    const group = await Group.start(40);
    await group.whole();
    await group.point();
    await group.live(2).stop();
    group.write(0);
    const own = await group.live(0).point();
    expect(own.coverage).toBe(Coverage.exact);
    expect(own.group).toBeUndefined();
    expect(group.group.look().missing).toEqual(['disk2']);
    const back = group.capture(2);
    await group.whole();
    expect((await group.point()).group).toBe('db');
    expect(group.changes.map((c) => c.isWhole)).toEqual([true, false, true]);
    await back.stop();
    await group.end();
  });

  it('holds no writers for the others longer than is good for a frozen device', async () => {
    const group = await Group.start(50);
    await group.whole();
    await group.point();
    // Whenever something is read of the second device two other blocks change: its cut never holds.
    let n = 0;
    group.disk(1).memory.before = () => {
      for (const block of [3, 9])
        group.disk(1).write(group.source(1), block, Buffer.alloc(BLOCK, `${++n} `));
    };
    const frozen = async (): Promise<CapturedPoint> => {
      group.write(0);
      let isLetGo = false;
      const letGo = (): Promise<boolean> => {
        isLetGo = true;
        return Promise.resolve(true);
      };
      const over = AbortSignal.timeout(5_000);
      const point = await group.live(0).point(PointClass.fs, over, letGo, 50);
      expect(isLetGo).toBe(true);
      return point;
    };
    group.write(1);
    expect(await frozen()).toMatchObject({ pointClass: PointClass.fs });
    // An attempt that waits for the others already must not keep it waiting, either.
    group.write(0);
    const usual = group.live(0).point();
    await systemClock.sleep(20);
    const own = await frozen();
    expect(own.pointClass).toBe(PointClass.fs);
    expect(own.group).toBeUndefined();
    await usual;
    group.disk(1).memory.before = () => undefined;
    expect((await group.point()).group).toBe('db');
    expect((await frozen()).group).toBe('db');
    await group.check();
    await group.end();
  });

  it('answers who asks one that is idle with what the others have been given until then', async () => {
    const group = await Group.start(60);
    await group.whole();
    let last = await group.point();
    const holdsAll = async (point: CapturedPoint): Promise<void> => {
      for (const [i, disk] of group.disks.entries()) {
        const at = (p: CapturedPoint): boolean => p.instantNs === point.instantNs;
        await until(() => group.points[i]?.some(at) === true, 'the point of each');
        const seq = group.points[i]?.find(at)?.seq;
        const image = await imageAt(group.repo, group.volumes[i] ?? '', seq);
        expect(image.equals(disk.bytes), `disk ${i}`).toBe(true);
      }
    };
    // Nothing was written anywhere: the last one will do, unless this process was kept from learning that for long.
    for (let tries = 1; ; tries++) {
      const again = await group.point();
      if (again.seq === last.seq) break;
      expect(tries).toBeLessThan(20);
      last = again;
    }
    // The other does not know of a write to it yet.
    const other = group.source(1);
    let open = (): void => undefined;
    const gate = new Promise<void>((resolve) => (open = resolve));
    const poll = other.poll.bind(other);
    other.poll = async (sink) => {
      await gate;
      return poll(sink);
    };
    await systemClock.sleep(5);
    group.write(1);
    let isAnswered = false;
    const asked = group.live(0).point();
    void asked.then(() => (isAnswered = true));
    await systemClock.sleep(40);
    expect(isAnswered).toBe(false);
    open();
    const second = await asked;
    expect(second).toMatchObject({ group: 'db', blocks: 0 });
    await holdsAll(second);
    await group.check();
    await group.end();
  });

  it('answers who asks one that is idle with a point of it alone while others are missing', async () => {
    const group = await Group.start(61);
    await group.whole();
    const first = await group.point();
    expect(first.group).toBe('db');
    await group.live(1).stop();
    group.write(1);
    const own = await group.live(0).point();
    // As good as a new one for this device, and for no other.
    expect(own.seq).toBe(first.seq);
    expect(own.group).toBeUndefined();
    await group.end();
  });

  it('makes one that is idle a point of its own where another keeps the group from one', async () => {
    const group = await Group.start(62);
    await group.whole();
    await group.point();
    let n = 0;
    group.disk(1).memory.before = () => {
      for (const block of [3, 9])
        group.disk(1).write(group.source(1), block, Buffer.alloc(BLOCK, `${++n} `));
    };
    group.write(1);
    // What is written while this one is made keeps the next from being made.
    const first = await group.point();
    const own = await group.live(0).point(PointClass.crash, undefined, undefined, 50);
    expect(own.seq).toBeGreaterThan(first.seq);
    expect(own.group).toBeUndefined();
    group.disk(1).memory.before = () => undefined;
    expect((await group.point()).group).toBe('db');
    await group.check();
    await group.end();
  });

  it('agrees to the nanosecond with a source that was opened years ago', async () => {
    const day = 86_400_000_000_000n;
    for (let n = 0; n < 20; n++) {
      const nowNs = systemClock.monotonicNs();
      const origins = [nowNs - 400n * day - BigInt(n), nowNs - 1_000_000_003n, nowNs - 900n * day];
      const group = new PointGroup({ name: 'g', devices: ['0', '1', '2'], clock: systemClock });
      const claimed: number[] = [];
      const cuts = origins.map(() => new IntervalCut(10));
      const seats = origins.map((originNs, i) => {
        const cut = cuts[i] ?? new IntervalCut(10);
        const now = Number(nowNs - originNs);
        cut.staged(1, 1, now - 9000);
        // What is not read yet bounds the instant: in each to another nanosecond.
        cut.completed(5, 1, now - 500 - 3 * n - i);
        cut.advance(now - 100);
        return group.join(String(i), {
          originNs,
          isAble: () => true,
          decide: () => cut.decide(),
          claim: (atNs) => claimed.push(cut.claim(atNs)),
          wallOf: () => 7n,
          lastInstantNs: () => cut.lastInstantNs,
          unchangedToNs: () => undefined,
        });
      });
      const meetings = await Promise.all(
        seats.map((seat, i) => {
          const now = Number(nowNs - (origins[i] ?? 0n));
          return seat.meet(now - 100, () => now + 10e9, new AbortController().signal);
        }),
      );
      expect(meetings.map((m) => m.kind)).toEqual(['claimed', 'claimed', 'claimed']);
      // The times of the old sources are even numbers only.
      for (const [i, atNs] of claimed.entries())
        expect(
          Math.abs(Number(BigInt(atNs) + (origins[i] ?? 0n) - nowNs) + 502 + 3 * n),
        ).toBeLessThan(16);
    }
  });

  it('does not wait longer than an attempt for one that does not come', async () => {
    const seat = (isAble: boolean): GroupCut => ({
      originNs: 0n,
      isAble: () => isAble,
      decide: () => ({ kind: 'holds', loNs: 1, hiNs: 3, instantNs: 2 }),
      claim: () => undefined,
      wallOf: () => 0n,
      lastInstantNs: () => 0,
      unchangedToNs: () => undefined,
    });
    const group = new PointGroup({ name: 'g', devices: ['a', 'b'], clock: systemClock });
    const a = group.join('a', seat(true));
    group.join('b', seat(true));
    const nowNs = Number(systemClock.monotonicNs());
    expect(await a.meet(2, () => nowNs + 20e6, new AbortController().signal)).toEqual({
      kind: 'alone',
    });
    expect(() => group.join('a', seat(true))).toThrow('already');
    expect(() => group.join('c', seat(true))).toThrow('not of the group');
  });
});
