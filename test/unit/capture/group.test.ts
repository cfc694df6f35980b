/** Several devices, one cut: every point of the group is one instant of all of them, whatever fails in between. */
import { describe, expect, it } from 'vitest';
import { captureGroup, commonInstants, type GroupMember } from '../../../src/capture/group.js';
import {
  LiveCapture,
  type CaptureEvent,
  type CapturedPoint,
} from '../../../src/capture/live-capture.js';
import { systemClock } from '../../../src/clock.js';
import { B2Error } from '../../../src/errors.js';
import { Coverage, PointClass } from '../../../src/format/commit.js';
import { VolumeHistory } from '../../../src/repo/history.js';
import type { Repository } from '../../../src/repo/repository.js';
import { Timeline } from '../../../src/repo/timeline.js';
import { writeVolumeMeta } from '../../../src/repo/volume.js';
import { VolumeWriter } from '../../../src/repo/volume-writer.js';
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
  readonly events: CaptureEvent[] = [];
  readonly points: CapturedPoint[] = [];
  readonly capture: LiveCapture;
  private readonly closing: (() => Promise<void>)[] = [];
  readonly random: () => number;

  private constructor(
    repo: Repository,
    volumes: readonly string[],
    random: () => number,
    seed: number,
  ) {
    this.repo = repo;
    this.volumes = volumes;
    this.random = random;
    this.disks = SIZES.map((size, i) => new LoggedDevice(testImage(seed + i, size)));
    // Sources are opened one after the other, so that their clocks differ.
    const origin = systemClock.monotonicNs();
    this.sources = SIZES.map((_, i) => new FakeSource(origin - BigInt(i * 1_234_567)));
    const members = this.disks.map((disk, i): GroupMember => {
      const sink = repositorySink(repo, volumes[i] ?? '', disk.device);
      this.closing.push(() => sink.close());
      return { device: disk.device, source: this.sources[i] ?? new FakeSource(), sink };
    });
    this.capture = LiveCapture.start({
      ...captureGroup(members),
      clock: systemClock,
      intervalMs: 60_000,
      attemptMs: 60_000,
      pollMs: 1,
      retryMs: 2,
      scanBlocks: 1024,
      stageBytes: 300 * BLOCK,
      onEvent: (e) => {
        this.events.push(e);
        if (e.type === 'point') this.points.push(e.point);
      },
    });
  }

  static async start(seed: number, rule: (call: FaultCall) => Fault | undefined) {
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
    return new Group(repo, volumes, random, seed);
  }

  /** One write to a disk chosen at random: in one thread, so that each is issued after the one before was over. */
  write(): void {
    const i = Math.floor(this.random() * SIZES.length);
    const [disk, source] = [this.disks[i], this.sources[i]];
    if (disk === undefined || source === undefined) throw new Error('no such disk');
    const blocks = Math.ceil(disk.bytes.length / BLOCK);
    const block = this.random() < 0.2 ? blocks - 1 : Math.floor(this.random() * blocks);
    const length = Math.min(BLOCK, disk.bytes.length - block * BLOCK);
    disk.write(source, block, Buffer.alloc(length, `written ${this.random()} `));
  }

  /** Holds every point of the group against all disks. */
  async check(): Promise<void> {
    for (const p of this.points.slice(-8)) {
      expect(p.seqs).toHaveLength(SIZES.length);
      for (const [i, disk] of this.disks.entries()) {
        const image = await imageAt(this.repo, this.volumes[i] ?? '', p.seqs?.[i]);
        const origin = this.sources.reduce(
          (o, s) => (s.originNs < o ? s.originNs : o),
          this.sources[0]?.originNs ?? 0n,
        );
        disk.check(image, Number(origin) + p.instantSourceNs, `disk ${i}, point ${p.seqs?.[i]}`);
      }
    }
  }

  async end(): Promise<void> {
    await this.capture.stop().catch(() => undefined);
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
      const group = await Group.start(seed, () => undefined);
      const { capture, disks, sources } = group;
      let left = 0;
      for (const disk of disks)
        disk.memory.before = () => {
          if (left > 0 && group.random() < 0.4) group.write();
          if (left-- > 0 && group.random() < 0.4) setImmediate(() => group.write());
        };
      for (let i = 0; i < 5; i++) {
        left = 60;
        await capture.point();
        for (let n = 0; n < 20; n++) group.write();
        if (i === 2) {
          const [source] = sources;
          if (source !== undefined) source.loss = { reason: 'overrun', message: 'lost some' };
        }
      }
      for (const disk of disks) disk.memory.before = () => undefined;
      const last = await capture.point();
      for (const [i, disk] of disks.entries())
        expect(
          (await imageAt(group.repo, group.volumes[i] ?? '', last.seqs?.[i])).equals(disk.bytes),
        ).toBe(true);
      await group.check();
      points += group.points.length;
      await group.end();
    }
    expect(points).toBeGreaterThanOrEqual(SEEDS * 6);
  }, 180_000);

  it('stores on each volume what is its own, and an empty commit where nothing has changed', async () => {
    const group = await Group.start(20, () => undefined);
    const { capture, repo, volumes } = group;
    const first = await capture.point();
    expect(first).toMatchObject({ coverage: Coverage.unknown });
    const [disk, source] = [group.disks[1], group.sources[1]];
    if (disk === undefined || source === undefined) throw new Error('no such disk');
    disk.write(source, 1536, Buffer.alloc(512, 'the short last block'));
    const second = await capture.point();
    expect(second).toMatchObject({ blocks: 1, coverage: Coverage.exact });
    expect(second.seqs).toEqual(first.seqs?.map((seq) => seq + 1));
    const instants = await Promise.all(volumes.map((id) => instantsOf(repo, id)));
    expect(commonInstants(instants.map((m) => [...m.keys()]))).toEqual([
      first.instantNs,
      second.instantNs,
    ]);
    await group.check();
    await group.end();
  });

  it('is out as a whole when one volume is, and has no point that the others lack', async () => {
    let failing = '';
    const ids: string[] = [];
    // A pack does not say whose it is; the journal entry before it does.
    const packs = new Map<string, string>();
    const group = await Group.start(30, (call) => {
      const entry = /^volumes\/([0-9a-f]+)\/journal\/([0-9a-f]+)$/.exec(call.name);
      if (entry?.[1] !== undefined && entry[2] !== undefined) packs.set(entry[2], entry[1]);
      const owner = packs.get(call.name.split('/').at(-1) ?? '') ?? entry?.[1];
      const isWrite = call.kind === 'append' || call.kind === 'sync' || call.kind === 'put';
      return isWrite && failing !== '' && owner === failing ? { do: 'no-space' } : undefined;
    });
    const { capture, events, repo, volumes, disks } = group;
    ids.push(...volumes);
    await capture.point();
    failing = ids[1] ?? '';
    for (let i = 0; i < 20; i++) group.write();
    const waiting = capture.point();
    await until(() => events.filter((e) => e.type === 'outage').length >= 3, 'an outage');
    expect(capture.status().outage?.kind).toBe('no-space');
    for (let i = 0; i < 20; i++) group.write();
    failing = '';
    expect(await waiting).toMatchObject({ coverage: Coverage.coalesced });
    group.write();
    const last = await capture.point();
    const instants = await Promise.all(volumes.map((id) => instantsOf(repo, id)));
    const common = commonInstants(instants.map((m) => [...m.keys()]));
    expect(common).toEqual(group.points.map((p) => p.instantNs));
    // What was durable on one volume only is a point of that one and of no other.
    expect(instants.some((m) => m.size > common.length)).toBe(true);
    for (const [i, disk] of disks.entries())
      expect((await imageAt(repo, volumes[i] ?? '', last.seqs?.[i])).equals(disk.bytes)).toBe(true);
    await group.check();
    await group.end();
  });

  it('ends when another writer takes one of its volumes, and when one of its devices fails', async () => {
    const taken = await Group.start(40, () => undefined);
    await taken.capture.point();
    const other = await VolumeWriter.claim(taken.repo, taken.volumes[2] ?? '');
    await other.history.close();
    taken.write();
    const asked = taken.capture.point();
    await expect(taken.capture.done).rejects.toMatchObject({ kind: 'lost-claim' });
    await expect(asked).rejects.toMatchObject({ kind: 'lost-claim' });
    await other.writer.close();
    await taken.end();

    const broken = await Group.start(41, () => undefined);
    const [disk] = broken.disks;
    if (disk !== undefined)
      disk.memory.before = () => {
        throw new B2Error('io', 'the medium is bad');
      };
    await expect(broken.capture.done).rejects.toMatchObject({ kind: 'io' });
    expect(broken.points).toEqual([]);
    await broken.end();
  });

  it('ends, as one device does, when one of them is resized', async () => {
    const group = await Group.start(50, () => undefined);
    await group.capture.point();
    const [first, second] = group.sources;
    if (first === undefined || second === undefined) throw new Error('no source');
    first.loss = { reason: 'overrun', message: 'lost some' };
    second.loss = { reason: 'resized', message: '/dev/b has grown' };
    await expect(group.capture.done).rejects.toThrow('/dev/b has grown');
    await group.end();
  });
});

describe('the group as a device', () => {
  it('reads over the borders of its devices, and zeros between them', async () => {
    const disks = SIZES.map((size, i) => new LoggedDevice(testImage(60 + i, size)));
    const { device } = captureGroup(
      disks.map((d) => ({
        device: d.device,
        source: new FakeSource(),
        sink: { commit: () => Promise.reject(new Error('not asked for')) },
      })),
    );
    const expected = Buffer.alloc(device.facts.sizeBytes);
    // 5 MiB from 0, 6 MiB and a bit from 8, 2 MiB from 16.
    disks.forEach((d, i) => d.bytes.copy(expected, i * 8 * MIB));
    expect(device.facts.sizeBytes).toBe(18 * MIB);
    for (const [offset, length] of [
      [0, 18 * MIB],
      [4 * MIB, 5 * MIB],
      [6 * MIB, MIB],
      [14 * MIB, 4 * MIB],
      [17 * MIB, 2 * MIB],
    ] as const) {
      const into = Buffer.alloc(length, 0xee);
      const got = await device.read(into, offset);
      expect(got).toBe(Math.min(length, 18 * MIB - offset));
      expect(into.subarray(0, got).equals(expected.subarray(offset, offset + got))).toBe(true);
    }
  });
});
