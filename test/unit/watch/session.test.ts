/** A session's life on a simulated machine: what it captures, what it claims, and what it refuses. */
import { existsSync, readdirSync } from 'node:fs';
import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import type { CapturedPoint } from '../../../src/capture/live-capture.js';
import { B2Error, isKind } from '../../../src/errors.js';
import { Coverage, PointClass } from '../../../src/format/commit.js';
import { VolumeHistory } from '../../../src/repo/history.js';
import { Repository } from '../../../src/repo/repository.js';
import { systemRandom } from '../../../src/clock.js';
import { currentIdentity } from '../../../src/process-identity.js';
import { Timeline } from '../../../src/repo/timeline.js';
import { VolumeWriter } from '../../../src/repo/volume-writer.js';
import { cleanStopFile } from '../../../src/watch/state.js';
import { FaultStore, type CallKind, type Fault } from '../../support/store-fault.js';
import { MemoryStore } from '../../support/store-memory.js';
import { tempDir, type TempDir } from '../../support/tmp.js';
import {
  BLOCK,
  Machine,
  SkewedClock,
  contentOf,
  disk,
  messagesOf,
  newRepo,
  pointsIn,
  statesOf,
  theVolume,
  until,
  watch,
  type Watched,
} from './session-bed.js';

let dir: TempDir;
let clock: SkewedClock;
let store: FaultStore;
let repo: Repository;

beforeEach(async () => {
  dir = tempDir();
  clock = new SkewedClock();
  store = new FaultStore(new MemoryStore({ record: false }), {});
  repo = await newRepo(store, clock);
});

/** Calls of that kind fail from now on. */
function failing(kind: CallKind, fault: Fault = { do: 'io', retryable: true }): void {
  store.setFaults((call) => (call.kind === kind ? fault : undefined));
}

const running = new Set<Watched>();
function start(machine: Machine, more: Parameters<typeof watch>[3] = {}): Watched {
  const w = watch(repo, machine, dir, more);
  running.add(w);
  return w;
}

afterEach(async () => {
  for (const w of running) await w.session.stop(0).catch(() => undefined);
  running.clear();
  await repo.close();
  await dir.remove();
});

/** Points only where they are asked for, and then at once: how late a point is must not depend on this machine. */
const AT_ONCE = { intervalMs: 600_000 };

async function stop(w: Watched): Promise<void> {
  await w.session.stop(2000);
  expect(await w.ended).toBeUndefined();
}

async function recordFile(): Promise<string> {
  return cleanStopFile(dir.join('state'), repo.id, (await theVolume(repo)).id);
}

const crash = (w: Watched): Promise<CapturedPoint> =>
  w.session.point({ pointClass: PointClass.crash });

describe('a session', () => {
  it('reads everything first, then follows what changes, and says so', async () => {
    const machine = new Machine(disk(64, 'A'));
    const w = start(machine, { host: 'alpha', ...AT_ONCE });
    expect(w.session.status()).toMatchObject({ state: 'starting', volume: undefined });
    await w.session.ready;
    const status = w.session.status();
    expect(status).toMatchObject({
      device: '/dev/sim',
      volume: 'alpha/sim',
      state: 'exact',
      sizeBytes: 64 * BLOCK,
      points: 1,
      scan: undefined,
      lagMs: 0,
      losses: 0,
      source: { kind: 'trace', why: 'a simulation', isFallback: false },
    });
    machine.medium?.write(3, 7);
    const point = await crash(w);
    expect(point).toMatchObject({ coverage: Coverage.exact, blocks: 1 });
    const bytes = Buffer.from(machine.medium?.bytes ?? []);
    await stop(w);
    expect(w.session.status().state).toBe('stopped');
    expect(statesOf(w.events)).toEqual(['baseline', 'exact', 'stopped']);
    expect((await contentOf(repo, point.seq)).equals(bytes)).toBe(true);
    const recorded = (await pointsIn(repo)).find((p) => p.seq === point.seq);
    expect(w.session.hashOf(point.seq)).toBe(recorded?.hash.toString('hex'));
    expect(w.session.hashOf(9999)).toBeUndefined();
    // The volume says what it is of.
    expect(await theVolume(repo)).toMatchObject({
      name: 'alpha/sim',
      host: 'alpha',
      device: '/dev/sim',
      facts: { identity: { serial: 'A' }, contents: { contents: [] } },
    });
    await expect(crash(w)).rejects.toThrow('not watched any more');
  });

  it('counts what is written, captured and stored', async () => {
    const machine = new Machine(disk(64, 'A'));
    const w = start(machine);
    await w.session.ready;
    for (let i = 0; i < 20; i++) {
      machine.medium?.write(i, i + 2);
      await crash(w);
    }
    await until(() => w.session.status().changedBytesPerSecond > 0, 'a rate of change');
    const s = w.session.status();
    expect(s.capturedBytesPerSecond).toBeGreaterThan(0);
    expect(s.storedBytesPerSecond).toBeGreaterThan(0);
    expect(s.points).toBe(21);
    expect(s.memoryBytes).toBeGreaterThan(0);
  });

  it('refuses points of a class that it cannot make, and hands the others on', async () => {
    const machine = new Machine(disk(8, 'A'));
    const w = start(machine);
    await expect(crash(w)).rejects.toThrow('only starting');
    await w.session.ready;
    await expect(w.session.point({ pointClass: PointClass.fs })).rejects.toThrow(
      'makes no points of class fs',
    );
    await stop(w);
    const q = start(machine, {
      quiesce: (request, { capture }) => capture.point(request.pointClass, request.signal),
    });
    await q.session.ready;
    expect(await q.session.point({ pointClass: PointClass.fs })).toMatchObject({
      pointClass: PointClass.fs,
    });
  });

  it('compares everything again when it is told to', async () => {
    const machine = new Machine(disk(32, 'A'));
    const w = start(machine);
    await w.session.ready;
    // Behind the source's back, as a write by another host on shared storage is.
    machine.medium?.bytes.fill(9, 5 * BLOCK, 6 * BLOCK);
    w.session.resync();
    expect(w.session.status()).toMatchObject({ state: 'resync', lagMs: undefined });
    const point = await crash(w);
    expect(point.coverage).toBe(Coverage.unknown);
    await stop(w);
    expect((await contentOf(repo, point.seq)).equals(machine.medium?.bytes ?? Buffer.of())).toBe(
      true,
    );
  });

  it('tells of losses and late events, and records the time as unknown', async () => {
    const machine = new Machine(disk(32, 'A'));
    const w = start(machine);
    await w.session.ready;
    machine.medium?.bytes.fill(9, 5 * BLOCK, 6 * BLOCK);
    if (machine.source !== undefined)
      machine.source.loss = { reason: 'overrun', message: '12 block events were lost' };
    await until(() => w.session.status().points === 2, 'the point after the loss');
    expect(w.session.status()).toMatchObject({ losses: 1, state: 'exact' });
    expect(messagesOf(w.events, 'problem')).toEqual([
      expect.stringContaining('12 block events were lost'),
    ]);
    expect(w.session.status().lastProblem?.message).toContain('12 block events');
    await stop(w);
    const last = (await pointsIn(repo)).at(-1);
    expect(last?.coverage).toBe(Coverage.unknown);
    expect(
      (await contentOf(repo, last?.seq ?? 0)).equals(machine.medium?.bytes ?? Buffer.of()),
    ).toBe(true);
  });

  it('scans where the driver keeps the changes to itself', async () => {
    const machine = new Machine(disk(32, 'A'));
    const w = start(machine);
    await w.session.ready;
    if (machine.source !== undefined)
      machine.source.loss = { reason: 'opaque', message: 'the driver does not say' };
    await until(() => machine.choices.length === 2, 'another source');
    expect(machine.choices).toEqual(['auto', 'scan']);
    await until(() => w.session.status().source !== undefined, 'the source');
    expect(w.session.status().source).toMatchObject({
      why: expect.stringContaining('the driver does not say; so') as string,
      isFallback: true,
    });
    await stop(w);
    const forced = start(machine, { source: 'trace' });
    await forced.session.ready;
    if (machine.source !== undefined)
      machine.source.loss = { reason: 'opaque', message: 'the driver does not say' };
    expect(await forced.ended).toMatchObject({
      kind: 'failed',
      message: 'the driver does not say',
    });
    expect(forced.session.status().state).toBe('failed');
  });
});

describe('a clean stop', () => {
  it('lets the next session begin without reading, where nothing was written', async () => {
    const machine = new Machine(disk(64, 'A'));
    const first = start(machine);
    await first.session.ready;
    machine.medium?.write(9, 9);
    await stop(first);
    expect(existsSync(await recordFile())).toBe(true);
    const before = await pointsIn(repo);
    const medium = machine.medium;
    if (medium === undefined) throw new Error('no medium');
    medium.reads = 0;
    const second = start(machine, AT_ONCE);
    await second.session.ready;
    // Gone before anything is captured: a crash leaves none.
    expect(existsSync(await recordFile())).toBe(false);
    // The looks at its contents for the volume's facts, and no more.
    expect(medium.reads).toBeLessThan(10);
    expect(messagesOf(second.events, 'notice')).toContain(
      'nothing was written to /dev/sim since b2 stopped: it need not be read',
    );
    expect(statesOf(second.events)).toEqual(['exact']);
    medium.write(1, 33);
    const point = await crash(second);
    expect(point).toMatchObject({ coverage: Coverage.exact, blocks: 1 });
    await stop(second);
    const after = await pointsIn(repo);
    expect(after.slice(before.length).map((p) => p.coverage)).toEqual([
      Coverage.exact,
      Coverage.exact,
    ]);
    expect((await contentOf(repo, point.seq)).equals(medium.bytes)).toBe(true);
  });

  type Change = [
    name: string,
    change: (machine: Machine) => void | Promise<void>,
    says: string | undefined,
  ];
  const changes: readonly Change[] = [
    ['it was written', (m) => m.medium?.write(4, 44), 'it was written, or attached anew'],
    [
      'it is being written',
      (m) => {
        if (m.medium !== undefined) m.medium.inFlight = 1;
      },
      'it is being written',
    ],
    [
      'the machine was started anew',
      (m) => {
        m.bootId = 'boot-2';
      },
      'the machine was started anew since b2 stopped',
    ],
    [
      'it was attached anew',
      (m) => {
        if (m.medium !== undefined) m.medium.sequence += 1000n;
      },
      'it was written, or attached anew',
    ],
    ['it was resized', (m) => m.medium?.resize(70 * BLOCK), 'the device has another size now'],
    [
      'the kernel stopped counting',
      (m) => {
        if (m.medium !== undefined) m.medium.isCounted = false;
      },
      'the kernel does not count',
    ],
    [
      'somebody else has written to the volume',
      async (m) => {
        const { writer, history } = await VolumeWriter.claim(repo, (await theVolume(repo)).id);
        await history.close();
        await writer.commit({
          pointClass: PointClass.crash,
          coverage: Coverage.exact,
          full: true,
          instantNs: 1n,
          startedNs: 1n,
          sizeBytes: m.medium?.bytes.length ?? 0,
          extents: [],
          storedBytes: 0,
          facts: {},
        });
        await writer.close();
      },
      'the volume has changed in the repository',
    ],
  ];
  for (const [name, change, says] of changes) {
    it(`proves nothing where ${name}`, async () => {
      const machine = new Machine(disk(64, 'A'));
      const first = start(machine);
      await first.session.ready;
      await stop(first);
      expect(existsSync(await recordFile())).toBe(true);
      await change(machine);
      const second = start(machine);
      await second.session.ready;
      if (machine.medium !== undefined) machine.medium.inFlight = 0;
      const point = second.session.status().lastPoint;
      expect(point?.coverage).toBe(Coverage.unknown);
      if (says !== undefined)
        expect(messagesOf(second.events, 'notice').join('\n')).toContain(says);
      expect(statesOf(second.events)[0]).toBe('resync');
      await stop(second);
      expect(
        (await contentOf(repo, point?.seq ?? 0)).equals(machine.medium?.bytes ?? Buffer.of()),
      ).toBe(true);
    });
  }

  it('serves once: a crash after it leaves nothing to believe', async () => {
    const machine = new Machine(disk(64, 'A'));
    const first = start(machine);
    await first.session.ready;
    await stop(first);
    const second = start(machine, AT_ONCE);
    await second.session.ready;
    expect(second.session.status().lastPoint?.coverage).toBe(Coverage.exact);
    // Known to the second session alone, which never comes to commit it.
    machine.medium?.write(7, 70);
    const third = start(machine, AT_ONCE);
    await third.session.ready;
    const point = third.session.status().lastPoint;
    expect(point).toMatchObject({ coverage: Coverage.unknown });
    await stop(third);
    expect(
      (await contentOf(repo, point?.seq ?? 0)).equals(machine.medium?.bytes ?? Buffer.of()),
    ).toBe(true);
    await expect(crash(second)).rejects.toThrow('another b2');
  });

  it('is not recorded where the last write may be missing', async () => {
    const machine = new Machine(disk(64, 'A'));
    const w = start(machine);
    await w.session.ready;
    // After the last point, before the counters are read.
    let fired = 0;
    machine.beforeStamp = () => {
      if (fired++ === 0) machine.medium?.write(2, 22);
    };
    await stop(w);
    expect(fired).toBeGreaterThan(0);
    expect(existsSync(await recordFile())).toBe(false);
    machine.beforeStamp = () => undefined;
    const next = start(machine);
    await next.session.ready;
    await stop(next);
    const last = (await pointsIn(repo)).at(-1);
    expect(last?.coverage).toBe(Coverage.unknown);
    expect(
      (await contentOf(repo, last?.seq ?? 0)).equals(machine.medium?.bytes ?? Buffer.of()),
    ).toBe(true);
  });

  it('is not recorded where a change is known and there was no time to capture it', async () => {
    const machine = new Machine(disk(64, 'A'));
    const w = start(machine, AT_ONCE);
    await w.session.ready;
    machine.medium?.write(2, 22);
    await until(() => w.session.status().pendingBytes > 0, 'the change to be known');
    await w.session.stop(0);
    expect(existsSync(await recordFile())).toBe(false);
    const next = start(machine);
    await next.session.ready;
    const point = next.session.status().lastPoint;
    expect(point?.coverage).toBe(Coverage.unknown);
    expect(
      (await contentOf(repo, point?.seq ?? 0)).equals(machine.medium?.bytes ?? Buffer.of()),
    ).toBe(true);
  });

  it('waits for writes in flight, and is not recorded where they do not end', async () => {
    const machine = new Machine(disk(64, 'A'));
    const w = start(machine);
    await w.session.ready;
    let stamps = 0;
    machine.beforeStamp = () => {
      if (machine.medium !== undefined) machine.medium.inFlight = stamps++ < 3 ? 1 : 0;
    };
    await stop(w);
    expect(stamps).toBe(4);
    expect(existsSync(await recordFile())).toBe(true);
  });

  it('is not recorded before the first point', async () => {
    const machine = new Machine(disk(64, 'A'));
    const w = start(machine);
    if (machine.medium !== undefined)
      machine.medium.beforeRead = () => {
        throw new B2Error('io', 'read error');
      };
    await until(() => messagesOf(w.events, 'problem').length > 0, 'a problem');
    await w.session.stop(10);
    expect(readdirSync(dir.path)).not.toContain('state');
    await expect(w.session.ready).rejects.toThrow();
  });
});

describe('the device', () => {
  for (const [name, blocks] of [
    ['grows', 100],
    ['shrinks', 40],
  ] as const) {
    it(`${name}: capture goes on with the new size`, async () => {
      const machine = new Machine(disk(64, 'A'));
      const w = start(machine);
      await w.session.ready;
      machine.medium?.resize(blocks * BLOCK + 512);
      await until(() => w.session.status().sizeBytes === blocks * BLOCK + 512, 'the new size');
      machine.medium?.write(blocks - 1, 77);
      await until(() => w.session.status().state === 'exact', 'exact again');
      const point = await crash(w);
      expect(w.session.status()).toMatchObject({ losses: 1 });
      await stop(w);
      expect(statesOf(w.events)).toEqual(['baseline', 'exact', 'resync', 'exact', 'stopped']);
      const list = await pointsIn(repo);
      expect(list.map((p) => p.sizeBytes)).toContain(64 * BLOCK);
      expect(list.at(-1)?.sizeBytes).toBe(blocks * BLOCK + 512);
      expect(list.find((p) => p.sizeBytes !== 64 * BLOCK)?.coverage).toBe(Coverage.unknown);
      const restored = await contentOf(repo, point.seq);
      expect(restored.equals(machine.medium?.bytes ?? Buffer.of())).toBe(true);
      expect((await theVolume(repo)).sizeBytes).toBe(blocks * BLOCK + 512);
    });
  }

  it('goes and comes back: it is compared, and captured again', async () => {
    const machine = new Machine(disk(64, 'A'));
    const w = start(machine);
    await w.session.ready;
    const { medium } = machine;
    if (medium === undefined) throw new Error('no medium');
    machine.medium = undefined;
    await until(() => w.session.status().state === 'absent', 'absence');
    expect(w.session.status()).toMatchObject({ lagMs: undefined, source: undefined });
    await expect(crash(w)).rejects.toThrow('the device is not there');
    medium.bytes.fill(5, 20 * BLOCK, 30 * BLOCK);
    medium.sequence = 5000n;
    machine.medium = medium;
    await until(() => w.session.status().state === 'exact', 'exact again');
    const point = await crash(w);
    expect(w.session.status().losses).toBe(1);
    await stop(w);
    expect(statesOf(w.events)).toEqual([
      'baseline',
      'exact',
      'absent',
      'resync',
      'exact',
      'stopped',
    ]);
    const list = await pointsIn(repo);
    expect(list.map((p) => p.coverage).slice(1, 2)).toEqual([Coverage.unknown]);
    expect((await contentOf(repo, point.seq)).equals(medium.bytes)).toBe(true);
  });

  it('goes in the middle of a read', async () => {
    const machine = new Machine(disk(64, 'A'));
    const w = start(machine);
    await w.session.ready;
    const { medium } = machine;
    if (medium === undefined) throw new Error('no medium');
    medium.beforeRead = () => {
      machine.medium = undefined;
    };
    medium.write(1, 1);
    await until(() => w.session.status().state === 'absent', 'absence');
    medium.beforeRead = () => undefined;
    machine.medium = medium;
    await until(() => w.session.status().state === 'exact', 'exact again');
    await stop(w);
  });

  it('is never captured in place of another', async () => {
    const machine = new Machine(disk(64, 'A', 1));
    const w = start(machine);
    await w.session.ready;
    const right = machine.medium;
    machine.medium = undefined;
    await until(() => w.session.status().state === 'absent', 'absence');
    machine.medium = disk(64, 'B', 2);
    await until(
      () => messagesOf(w.events, 'problem').some((m) => m.includes('serial number B, not A')),
      'the refusal',
    );
    machine.medium = disk(64, undefined, 3);
    await until(
      () =>
        messagesOf(w.events, 'problem').some(
          (m) => m.includes('nothing') || m.includes('no serial number'),
        ),
      'the refusal of a disk without a name',
    );
    expect(w.session.status().state).toBe('absent');
    const wrong = machine.medium;
    expect(wrong.reads).toBeLessThan(20);
    machine.medium = right;
    await until(() => w.session.status().state === 'exact', 'exact again');
    await stop(w);
    for (const p of await pointsIn(repo))
      expect((await contentOf(repo, p.seq)).every((byte) => byte === 1)).toBe(true);
  });

  it('is another one than the volume is of: refused, unless it is said to be right', async () => {
    const machine = new Machine(disk(16, 'A'));
    const first = start(machine);
    await first.session.ready;
    await until(() => statesOf(first.events).includes('exact'), 'exact');
    await stop(first);
    const other = new Machine(disk(16, 'B', 2));
    const refused = start(other);
    const error = await refused.ended;
    expect(isKind(error, 'refused')).toBe(true);
    expect(error).toMatchObject({
      message: '/dev/sim is not the device that volume host/sim is of: serial number B, not A',
      hint: expect.stringContaining('--accept-device') as string,
    });
    await expect(refused.session.ready).rejects.toBe(error);
    expect((await pointsIn(repo)).length).toBe(1);
    const accepted = start(other, { acceptDevice: true });
    await accepted.session.ready;
    expect(accepted.session.status().lastPoint?.coverage).toBe(Coverage.unknown);
    await stop(accepted);
    expect(await theVolume(repo)).toMatchObject({ facts: { identity: { serial: 'B' } } });
    const again = start(other);
    await again.session.ready;
  });

  it('fails a read once: it is read again at once, and nothing is lost', async () => {
    const machine = new Machine(disk(64, 'A'));
    const w = start(machine);
    await w.session.ready;
    let failures = 1;
    if (machine.medium !== undefined)
      machine.medium.beforeRead = () => {
        if (failures-- > 0) throw new B2Error('io', 'read /dev/sim: EIO');
      };
    machine.medium?.write(1, 1);
    const point = await crash(w);
    expect(failures).toBeLessThan(1);
    expect(w.session.status()).toMatchObject({ losses: 0, unreadable: { bytes: 0 } });
    await stop(w);
    expect((await contentOf(repo, point.seq)).equals(machine.medium?.bytes ?? Buffer.of())).toBe(
      true,
    );
  });

  it('cannot be read at all: the session ends, and may be started again', async () => {
    const machine = new Machine(disk(64, 'A'));
    const w = start(machine);
    await w.session.ready;
    if (machine.medium !== undefined)
      machine.medium.beforeRead = () => {
        throw new B2Error('io', 'read /dev/sim: EIO');
      };
    machine.medium?.write(1, 1);
    const error = await w.ended;
    expect(isKind(error, 'io')).toBe(true);
    expect(error).toMatchObject({ retryable: true });
    expect(w.session.status().state).toBe('failed');
    expect(w.session.status().lastProblem?.message).toContain('cannot be read');
    expect(w.events.at(-1)).toMatchObject({ type: 'state', state: 'failed' });
  });

  it('holds the repository: refused; beside it: said', async () => {
    const machine = new Machine(disk(8, 'A'));
    machine.place = 'on';
    const refused = start(machine);
    expect(await refused.ended).toMatchObject({
      kind: 'refused',
      message: expect.stringContaining('lies on /dev/sim itself') as string,
      hint: expect.stringContaining('--repo') as string,
    });
    machine.place = 'beside';
    const w = start(machine);
    await w.session.ready;
    expect(messagesOf(w.events, 'notice').join('\n')).toContain('on the same disk');
  });

  it('is not there: the session ends at once', async () => {
    const machine = new Machine(disk(8, 'A'));
    machine.medium = undefined;
    expect(await start(machine).ended).toMatchObject({
      kind: 'not-found',
      code: 1,
      hint: expect.stringContaining('lsblk') as string,
    });
  });

  it('is not there, for a service: the session waits, and captures it when it comes', async () => {
    const machine = new Machine(disk(8, 'A'));
    const { medium } = machine;
    machine.medium = undefined;
    const w = start(machine, { waitForDevice: true });
    await until(() => w.session.status().state === 'absent', 'the absence');
    await expect(crash(w)).rejects.toThrow('not there');
    machine.medium = medium;
    await w.session.ready;
    expect(statesOf(w.events)).toEqual(['absent', 'starting', 'baseline', 'exact']);
    expect(messagesOf(w.events, 'problem')).toHaveLength(1);
    const point = await crash(w);
    await stop(w);
    expect((await contentOf(repo, point.seq)).equals(medium?.bytes ?? Buffer.of())).toBe(true);

    // Another one in its place is not captured to its volume.
    machine.medium = undefined;
    const second = start(machine, { waitForDevice: true });
    await until(() => second.session.status().state === 'absent', 'the second absence');
    machine.medium = disk(8, 'B');
    expect(await second.ended).toMatchObject({ kind: 'refused' });

    machine.medium = undefined;
    const third = start(machine, { waitForDevice: true });
    await until(() => third.session.status().state === 'absent', 'the third absence');
    await stop(third);
  });

  it('is held by another watch: nothing is claimed', async () => {
    const machine = new Machine(disk(8, 'A'));
    const w = start(machine);
    await w.session.ready;
    const asked: unknown[] = [];
    const second = start(machine, {
      refuseHeld: (at) => {
        asked.push(at);
        return Promise.reject(new B2Error('held', 'it is watched already'));
      },
    });
    expect(await second.ended).toMatchObject({ kind: 'held', code: 11 });
    const { id, name } = await theVolume(repo);
    expect(asked).toEqual([{ volumeId: id, volume: name, realPath: '/dev/sim' }]);
    // The first has lost nothing.
    machine.medium?.write(3, 33);
    const point = await crash(w);
    await stop(w);
    expect((await contentOf(repo, point.seq)).equals(machine.medium?.bytes ?? Buffer.of())).toBe(
      true,
    );
  });
});

describe('the repository', () => {
  it('takes nothing for a while: everything is there afterwards, and the outage is said once', async () => {
    const machine = new Machine(disk(64, 'A'));
    const w = start(machine);
    await w.session.ready;
    store.fillUp();
    for (let i = 0; i < 10; i++) machine.medium?.write(i, 100 + i);
    await until(() => w.session.status().state === 'outage', 'the outage');
    const problems = messagesOf(w.events, 'problem').length;
    await until(() => w.session.status().lagMs !== 0, 'lag');
    for (let i = 10; i < 20; i++) machine.medium?.write(i, 100 + i);
    store.makeRoom();
    await until(() => w.session.status().state === 'exact', 'exact again');
    const point = await crash(w);
    expect(messagesOf(w.events, 'problem').length).toBe(problems);
    expect(messagesOf(w.events, 'notice').join('\n')).toContain('takes commits of /dev/sim again');
    await stop(w);
    expect(statesOf(w.events).slice(0, 3)).toEqual(['baseline', 'exact', 'outage']);
    expect((await pointsIn(repo)).some((p) => p.coverage === Coverage.coalesced)).toBe(true);
    expect((await contentOf(repo, point.seq)).equals(machine.medium?.bytes ?? Buffer.of())).toBe(
      true,
    );
  });

  it('is away when the session begins: it waits', async () => {
    const machine = new Machine(disk(16, 'A'));
    failing('list');
    const w = start(machine);
    await until(() => w.session.status().state === 'outage', 'the outage');
    store.setFaults();
    await w.session.ready;
    await stop(w);
    const stuck = start(machine);
    failing('list');
    await until(() => stuck.session.status().state === 'outage', 'the outage');
    await stuck.session.stop(100);
    store.setFaults();
    expect(await stuck.ended).toBeUndefined();
  });

  async function foreignCommit(machine: Machine, by: Repository = repo): Promise<void> {
    const { writer, history } = await VolumeWriter.claim(by, (await theVolume(by)).id);
    await history.close();
    await writer.commit({
      pointClass: PointClass.crash,
      coverage: Coverage.exact,
      full: true,
      instantNs: clock.nowNs(),
      startedNs: clock.nowNs(),
      sizeBytes: machine.medium?.bytes.length ?? 0,
      extents: [],
      storedBytes: 0,
      facts: {},
    });
    await writer.close();
  }

  it('has another writer for the volume: the session ends', async () => {
    const machine = new Machine(disk(64, 'A'));
    const w = start(machine);
    await w.session.ready;
    await foreignCommit(machine);
    machine.medium?.write(1, 1);
    expect(await w.ended).toMatchObject({
      kind: 'lost-claim',
      message: expect.stringContaining('another b2') as string,
    });
  });

  it('was written by another while it was away: the session ends and adds nothing to that', async () => {
    const machine = new Machine(disk(64, 'A'));
    const w = start(machine);
    await w.session.ready;
    failing('sync');
    machine.medium?.write(1, 1);
    await until(() => w.session.status().state === 'outage', 'the outage');
    // A pause between two tries in which the other one comes.
    failing('list');
    const other = await Repository.open(store.inner, [], {
      clock,
      random: systemRandom,
      owner: currentIdentity(),
    });
    await foreignCommit(machine, other);
    const tip = (await pointsIn(other)).at(-1)?.seq;
    await other.close();
    store.setFaults();
    expect(await w.ended).toMatchObject({
      kind: 'lost-claim',
      message: expect.stringContaining('while this one could not') as string,
    });
    expect((await pointsIn(repo)).at(-1)?.seq).toBe(tip);
  });

  it('lost the answer to a commit: the session goes on upon it', async () => {
    const machine = new Machine(disk(64, 'A'));
    const w = start(machine);
    await w.session.ready;
    failing('sync', { do: 'lose-answer' });
    machine.medium?.write(1, 1);
    await until(() => w.session.status().state === 'outage', 'the outage');
    store.setFaults();
    machine.medium?.write(2, 2);
    await until(() => w.session.status().state === 'exact', 'exact again');
    const point = await crash(w);
    await stop(w);
    expect((await contentOf(repo, point.seq)).equals(machine.medium?.bytes ?? Buffer.of())).toBe(
      true,
    );
  });

  it('is told to the catalogue: what was acknowledged last, not every point', async () => {
    const machine = new Machine(disk(16, 'A'));
    const tips: number[] = [];
    const w = start(machine, {
      catalogue: {
        recordTip: (tip) => {
          tips.push(tip.seq);
          return Promise.resolve();
        },
      },
    });
    await w.session.ready;
    for (let i = 0; i < 10; i++) {
      machine.medium?.write(i, i);
      await crash(w);
    }
    await stop(w);
    expect(tips.length).toBeLessThanOrEqual(2);
    expect(tips.at(-1)).toBe((await pointsIn(repo)).at(-1)?.seq);
  });
});

describe('the clock', () => {
  it('is put back: points carry what it showed, and each can be found', async () => {
    const machine = new Machine(disk(64, 'A'));
    const w = start(machine, AT_ONCE);
    await w.session.ready;
    machine.medium?.write(1, 11);
    const before = await crash(w);
    const then = Buffer.from(machine.medium?.bytes ?? []);
    clock.offsetNs = -3_600_000_000_000n;
    await until(
      () => messagesOf(w.events, 'notice').some((m) => m.includes('put back by 1')),
      'the notice',
    );
    machine.medium?.write(1, 12);
    const after = await crash(w);
    expect(after.seq).toBeGreaterThan(before.seq);
    expect(after.instantNs).toBeLessThan(before.instantNs);
    expect(after.coverage).toBe(Coverage.exact);
    clock.offsetNs = 7_200_000_000_000n;
    await until(
      () => messagesOf(w.events, 'notice').some((m) => m.includes('put forward by 3')),
      'the second notice',
    );
    machine.medium?.write(1, 13);
    const last = await crash(w);
    await stop(w);
    const volume = await theVolume(repo);
    const history = await VolumeHistory.open(repo, volume.id);
    const timeline = new Timeline(history.sources);
    expect((await timeline.before(before.instantNs))?.point.seq).toBe(before.seq);
    expect((await timeline.before(before.instantNs))?.later?.seq).toBe(after.seq);
    expect((await timeline.before(after.instantNs))?.point.seq).toBe(after.seq);
    expect((await timeline.latest())?.seq).toBe(last.seq);
    await history.close();
    expect((await contentOf(repo, before.seq)).equals(then)).toBe(true);
    expect((await contentOf(repo, after.seq))[BLOCK]).toBe(12);
    expect((await contentOf(repo, last.seq))[BLOCK]).toBe(13);
  });
});

describe('writers that never pause', () => {
  const fs = PointClass.fs;
  /** With each of two blocks that is read both are written: the cut never holds. */
  function outrun(machine: Machine): { readonly stop: () => void; readonly go: () => void } {
    const { medium } = machine;
    if (medium === undefined) throw new Error('no medium');
    const go = (): void => {
      medium.beforeRead = () => {
        for (const block of [3, 40]) medium.write(block, (medium.written / 8) % 251);
      };
    };
    return { go, stop: () => (medium.beforeRead = () => undefined) };
  }

  it('are held for a moment where that is allowed: there are exact points again', async () => {
    const machine = new Machine(disk(64, 'A'));
    const writers = outrun(machine);
    let asked = 0;
    const w = start(machine, {
      intervalMs: 20,
      freezeAfterMs: () => 50,
      quiesce: async ({ pointClass, signal }, { capture, onFreeze }) => {
        asked++;
        expect(pointClass).toBe(fs);
        writers.stop();
        try {
          return await capture.point(pointClass, signal, () => {
            writers.go();
            onFreeze({ frozenMs: 12 + asked, mountPoints: ['/mnt'] });
            return Promise.resolve(true);
          });
        } finally {
          writers.go();
          for (const block of [3, 40]) machine.medium?.write(block, asked);
        }
      },
    });
    await w.session.ready;
    writers.go();
    for (const block of [3, 40]) machine.medium?.write(block, 1);
    const held = (): CapturedPoint[] =>
      w.events.flatMap((e) => (e.type === 'point' && e.point.pointClass === fs ? [e.point] : []));
    await until(() => held().length >= 3, 'points of class fs');
    const frozen = w.events.filter((e) => e.type === 'frozen');
    expect(frozen[0]).toMatchObject({ unasked: true, frozenMs: 13, mountPoints: ['/mnt'] });
    expect(frozen.length).toBeGreaterThanOrEqual(3);
    expect(w.session.status().freezes).toMatchObject({ count: asked, longestMs: 12 + asked });
    // Said once.
    expect(
      messagesOf(w.events, 'notice').filter((m) => m.includes('frozen for a moment')),
    ).toHaveLength(1);
    writers.stop();
    await stop(w);
  });

  it('are left alone otherwise: nothing is frozen, and nothing is claimed', async () => {
    const machine = new Machine(disk(64, 'A'));
    const writers = outrun(machine);
    let asked = 0;
    const w = start(machine, {
      intervalMs: 20,
      freezeAfterMs: () => undefined,
      quiesce: () => Promise.reject(new Error(`asked ${++asked} times`)),
    });
    await w.session.ready;
    const points = w.session.status().points;
    writers.go();
    for (const block of [3, 40]) machine.medium?.write(block, 1);
    await until(() => w.session.status().state === 'coalescing', 'coalescing');
    await until(() => (w.session.status().lagMs ?? 0) > 400, 'a lag');
    expect(asked).toBe(0);
    expect(w.session.status()).toMatchObject({ points, freezes: { count: 0 } });
    writers.stop();
    await until(() => w.session.status().points > points, 'a point, when they pause');
    await stop(w);
  });

  it('are not held where that does not work: that is said once, and tried less and less often', async () => {
    const machine = new Machine(disk(64, 'A'));
    const writers = outrun(machine);
    const asked: bigint[] = [];
    const w = start(machine, {
      intervalMs: 20,
      freezeAfterMs: () => 20,
      quiesce: () => {
        asked.push(clock.monotonicNs());
        return Promise.reject(
          new B2Error('refused', '/srv is not frozen: it holds the repository', { hint: 'Hm.' }),
        );
      },
    });
    await w.session.ready;
    writers.go();
    for (const block of [3, 40]) machine.medium?.write(block, 1);
    await until(() => asked.length >= 4, 'four tries');
    const gaps = asked.slice(1).map((t, i) => Number(t - (asked[i] ?? 0n)) / 1e6);
    expect(gaps[0]).toBeGreaterThanOrEqual(19);
    expect(gaps[2]).toBeGreaterThanOrEqual(79);
    expect(messagesOf(w.events, 'problem')).toEqual([
      expect.stringContaining('it holds the repository'),
    ]);
    writers.stop();
    await stop(w);
  });
});

describe('a device with blocks that cannot be read', () => {
  const allPoints = (w: Watched): CapturedPoint[] =>
    w.events.flatMap((e) => (e.type === 'point' ? [e.point] : []));

  it('is captured but for those, in points that are not called exact, until they can be read', async () => {
    const machine = new Machine(disk(64, 'A'));
    const { medium } = machine;
    if (medium === undefined) throw new Error('no medium');
    for (const block of [5, 6, 20]) medium.bad.add(block);
    const w = start(machine, { badRetryMs: 30, intervalMs: 20 });
    await until(() => w.session.status().state === 'unreadable', 'the state');
    expect(w.session.status()).toMatchObject({
      lagMs: undefined,
      unreadable: {
        bytes: 3 * BLOCK,
        ranges: [
          { offset: 5 * BLOCK, length: 2 * BLOCK },
          { offset: 20 * BLOCK, length: BLOCK },
        ],
      },
    });
    await until(() => allPoints(w).length > 0, 'a point');
    expect(allPoints(w)[0]).toMatchObject({
      pointClass: PointClass.fuzzy,
      coverage: Coverage.unknown,
    });
    expect(messagesOf(w.events, 'problem')).toEqual([
      expect.stringContaining('12.0 KiB of /dev/sim cannot be read'),
    ]);
    await expect(crash(w)).rejects.toThrow('there can be no exact point of /dev/sim');
    expect(await pointsIn(repo)).toEqual([]);
    // Whoever asks for no better gets one that says what it is.
    medium.write(33, 5);
    const fuzzy = await w.session.point({ pointClass: PointClass.fuzzy });
    expect(fuzzy).toMatchObject({ pointClass: PointClass.fuzzy, coverage: Coverage.unknown });
    expect((await contentOf(repo, fuzzy.seq))[33 * BLOCK]).toBe(5);
    await until(
      () => w.session.status().points > 1 && w.session.status().pendingBytes === 0,
      'it to go on',
    );
    expect((await theVolume(repo)).facts).toMatchObject({ unreadable: { bytes: 3 * BLOCK } });

    // What was written anew is read.
    medium.bad.delete(5);
    medium.write(5, 9);
    await until(() => w.session.status().unreadable.bytes === 2 * BLOCK, 'one that was written');
    await until(() => w.session.status().stagedBytes === 0, 'a point with it');
    const held = await contentOf(repo, allPoints(w).at(-1)?.seq ?? 0);
    for (let block = 0; block < 64; block++) {
      if (block === 6 || block === 20) continue;
      expect(
        held
          .subarray(block * BLOCK, (block + 1) * BLOCK)
          .equals(medium.bytes.subarray(block * BLOCK, (block + 1) * BLOCK)),
      ).toBe(true);
    }
    medium.bad.clear();
    await until(() => w.session.status().state === 'exact', 'the rest, tried again');
    const first = allPoints(w).find((p) => p.pointClass === PointClass.crash);
    expect(first).toMatchObject({ coverage: Coverage.unknown });
    medium.write(30, 4);
    const last = await crash(w);
    expect(last.pointClass).toBe(PointClass.crash);
    expect((await contentOf(repo, last.seq)).equals(medium.bytes)).toBe(true);
    expect(messagesOf(w.events, 'notice')).toContainEqual(
      expect.stringContaining('all of /dev/sim can be read again'),
    );
    await stop(w);
    expect((await theVolume(repo)).facts['unreadable']).toBeUndefined();
  });

  it('goes on elsewhere where very much of it cannot be read, and finds all of it', async () => {
    // 18 MiB in the middle: more than a scan tries block by block.
    const machine = new Machine(disk(32 * 256, 'A'));
    const { medium } = machine;
    if (medium === undefined) throw new Error('no medium');
    const [from, to] = [8 * 256 + 7, 26 * 256 - 9];
    for (let block = from; block < to; block++) medium.bad.add(block);
    const w = start(machine, { intervalMs: 20 });
    await until(() => w.session.status().state === 'unreadable', 'the state');
    expect(w.session.status().unreadable).toEqual({
      bytes: (to - from) * BLOCK,
      ranges: [{ offset: from * BLOCK, length: (to - from) * BLOCK }],
    });
    // A scan of each of 4,600 blocks would have asked for each of them.
    expect(medium.failedReads).toBeLessThan(3500);
    medium.write(3, 8);
    medium.write(30 * 256, 9);
    const point = await w.session.point({ pointClass: PointClass.fuzzy });
    const held = await contentOf(repo, point.seq);
    expect([held[3 * BLOCK], held[30 * 256 * BLOCK]]).toEqual([8, 9]);
    for (const [a, b] of [
      [0, from],
      [to, 32 * 256],
    ] as const)
      expect(
        held.subarray(a * BLOCK, b * BLOCK).equals(medium.bytes.subarray(a * BLOCK, b * BLOCK)),
      ).toBe(true);
    medium.bad.clear();
    medium.write(from, 4, to - from);
    await until(() => w.session.status().state === 'exact', 'all of it, written anew');
    const last = await crash(w);
    expect((await contentOf(repo, last.seq)).equals(medium.bytes)).toBe(true);
    await stop(w);
  });

  it('keeps what it held of them when they went bad later, in a compare and in a read', async () => {
    const machine = new Machine(disk(64, 'A', 7));
    const { medium } = machine;
    if (medium === undefined) throw new Error('no medium');
    const w = start(machine, { intervalMs: 20 });
    await w.session.ready;
    medium.bad.add(9);
    w.session.resync();
    await until(() => w.session.status().state === 'unreadable', 'the bad block');
    medium.write(40, 3);
    medium.bad.add(41);
    medium.write(41, 3);
    await until(() => w.session.status().unreadable.bytes === 2 * BLOCK, 'the other');
    await until(
      () => w.session.status().pendingBytes === 0 && w.session.status().stagedBytes === 0,
      'the rest',
    );
    const { seq } = allPoints(w).at(-1) ?? { seq: 0 };
    const held = await contentOf(repo, seq);
    for (const [block, value] of [
      [9, 7],
      [41, 7],
      [40, 3],
      [10, 7],
    ] as const)
      expect(held[block * BLOCK], `block ${block}`).toBe(value);
    // No clean stop: what cannot be read has to be looked at again.
    await stop(w);
    expect(existsSync(await recordFile())).toBe(false);
  });
});
