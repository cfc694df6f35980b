import { describe, expect, it } from 'vitest';
import type { Clock } from '../../../src/clock.js';
import { B2Error } from '../../../src/errors.js';
import { PointClass } from '../../../src/format/commit.js';
import {
  outcomeOf,
  WatchDaemon,
  type PinOrder,
  type WatchTarget,
} from '../../../src/watch/daemon.js';
import type { WatchEvent } from '../../../src/watch/types.js';
import { capturedPoint, FakeSession } from '../../support/fake-session.js';
import { ManualClock } from '../../support/manual-clock.js';

/** Sleeps until it is told to wake everybody up. */
class SleepyClock extends ManualClock implements Clock {
  readonly pauses: number[] = [];
  private wakers: (() => void)[] = [];

  override sleep(ms: number, signal?: AbortSignal): Promise<void> {
    this.pauses.push(ms);
    return new Promise((resolve) => {
      this.wakers.push(resolve);
      signal?.addEventListener('abort', () => resolve(), { once: true });
    });
  }
  wake(): void {
    for (const wake of this.wakers.splice(0)) wake();
  }
}

const settled = (): Promise<void> => new Promise((resolve) => setImmediate(resolve));

function target(device: string, key = 'k', hasHooks = false): WatchTarget {
  return { device, key, hasHooks };
}

function setUp(devices: readonly WatchTarget[]) {
  const sessions: { target: WatchTarget; session: FakeSession }[] = [];
  const events: WatchEvent[] = [];
  const pinned: PinOrder[] = [];
  const clock = new SleepyClock();
  const daemon = new WatchDaemon<WatchTarget>({
    startSession: (t, onEvent) => {
      const session = new FakeSession(t.device, onEvent);
      sessions.push({ target: t, session });
      return session;
    },
    pinner: {
      check: (_, name) =>
        name === 'taken'
          ? Promise.reject(new B2Error('exists', 'there is one already'))
          : Promise.resolve(),
      pin: (order) => {
        pinned.push(order);
        return Promise.resolve(order.hash ?? 'looked up');
      },
    },
    repository: { url: '/repo', id: 'r1' },
    clock,
    onEvent: (event) => events.push(event),
    finalMs: 777,
  });
  daemon.start(devices);
  const session = (i: number): FakeSession => {
    const found = sessions[i]?.session;
    if (found === undefined) throw new Error(`no session ${i}`);
    return found;
  };
  const isDone = async (): Promise<boolean> => {
    await settled();
    return Promise.race([daemon.done.then(() => true), settled().then(() => false)]);
  };
  return { daemon, sessions, session, events, pinned, clock, isDone };
}

const never = new AbortController().signal;

describe('WatchDaemon', () => {
  it('stops with a last point of each device', async () => {
    const { daemon, session, isDone } = setUp([target('/a'), target('/b')]);
    session(0).becomeReady();
    session(1).becomeReady();
    expect(await isDone()).toBe(false);
    daemon.stop('SIGTERM');
    daemon.stop('SIGINT');
    const end = await daemon.done;
    expect(end).toMatchObject({ reason: 'SIGTERM', failed: [] });
    expect([session(0).stops, session(1).stops]).toEqual([[777], [777]]);
    expect(outcomeOf(end)).toEqual({ code: 0 });
  });

  it.each(['baseline', 'resync', 'exact', 'coalescing', 'outage', 'absent'] as const)(
    'is ready when every device is taken up, if only %s, and stays so',
    (state) => {
      const { daemon, session } = setUp([target('/a'), target('/b')]);
      expect(daemon.isReady).toBe(false);
      session(0).set(state);
      expect(daemon.isReady).toBe(false);
      session(1).set('baseline');
      expect(daemon.isReady).toBe(true);
      session(1).set('starting');
      expect(daemon.isReady).toBe(true);
    },
  );

  it('is ready while a source reads the device before it can follow it', () => {
    const { daemon, session } = setUp([target('/a')]);
    expect(daemon.isReady).toBe(false);
    session(0).current = { scan: { doneBytes: 1, totalBytes: 9 } };
    expect(daemon.isReady).toBe(true);
  });

  it('holds up no boot with a device that is tried again, and is not ready with none', async () => {
    const retried = setUp([target('/a')]);
    retried.session(0).fail('for a moment', true);
    expect(retried.daemon.isReady).toBe(false);
    await settled();
    expect(retried.daemon.isReady).toBe(true);

    const lost = setUp([target('/a')]);
    lost.session(0).fail('for good');
    await lost.daemon.done;
    expect(lost.daemon.isReady).toBe(false);
  });

  it('goes on with the others when one fails, and says so at the end', async () => {
    const { daemon, session, events, isDone } = setUp([target('/a'), target('/b')]);
    session(1).becomeReady();
    session(0).fail('the disk broke');
    await settled();
    // Nothing can be waited for with a device that has failed.
    expect(daemon.isReady).toBe(true);
    expect(events.at(-2)).toMatchObject({
      type: 'problem',
      device: '/a',
      problem: { message: 'the disk broke', hint: 'Look at it.' },
    });
    expect(daemon.status().devices.map((d) => d.state)).toEqual(['failed', 'exact']);
    expect(daemon.status().devices[0]?.lastProblem?.message).toBe('the disk broke');
    expect(await isDone()).toBe(false);
    daemon.stop('SIGTERM');
    const end = await daemon.done;
    expect(end.failed.map((f) => f.device)).toEqual(['/a']);
    expect(session(0).stops).toEqual([]);
    expect(outcomeOf(end)).toEqual({ code: 3 });
  });

  it('ends when all have failed: with the error of the only one, or one that names all', async () => {
    const one = setUp([target('/a')]);
    one.session(0).fail('gone');
    const end = await one.daemon.done;
    expect(end.reason).toMatch(/no device/);
    expect(() => outcomeOf(end)).toThrow(
      expect.objectContaining({ kind: 'io', message: 'gone', hint: 'Look at it.' }),
    );

    const two = setUp([target('/a'), target('/b')]);
    two.session(0).fail('gone');
    two.session(1).fail('broken');
    const both = await two.daemon.done;
    expect(() => outcomeOf(both)).toThrow(
      expect.objectContaining({
        code: 1,
        message: expect.stringMatching(/\/a: gone; \/b: broken/),
      }),
    );
  });

  it('tries one of several again whatever a read did to it, as long as another is watched', async () => {
    const { daemon, sessions, session, clock, isDone } = setUp([target('/a'), target('/b')]);
    session(1).becomeReady();
    session(0).fail('no such device');
    await settled();
    clock.wake();
    await settled();
    expect(sessions.map((s) => s.target.device)).toEqual(['/a', '/b', '/a']);
    session(2).becomeReady();
    await settled();
    expect(daemon.status().devices.map((d) => d.state)).toEqual(['exact', 'exact']);

    session(2).fail('no such device');
    await settled();
    session(1).fail('nor this');
    const end = await daemon.done;
    expect(await isDone()).toBe(true);
    expect(end.failed.map((f) => f.device)).toEqual(['/a', '/b']);
    clock.wake();
    await settled();
    expect(sessions).toHaveLength(3);
  });

  it('gives a device up at once when what failed is a decision, not a read', async () => {
    const { session, sessions, clock } = setUp([target('/a'), target('/b')]);
    session(1).becomeReady();
    session(0).fail('it is another disk', false, 'refused');
    await settled();
    clock.wake();
    await settled();
    expect(sessions).toHaveLength(2);
  });

  it('tries a device again after pauses that double, from the start once it was ready', async () => {
    const { daemon, sessions, session, events, clock, isDone } = setUp([target('/a')]);
    session(0).seq = 4;
    for (const n of [0, 1, 2]) {
      session(n).fail('for a moment', true);
      await settled();
      expect(await isDone()).toBe(false);
      clock.wake();
      await settled();
    }
    expect(clock.pauses).toEqual([5000, 10_000, 20_000]);
    // What it failed with is told once as long as it stays the same.
    expect(events.filter((e) => e.type === 'problem')).toHaveLength(1);
    expect(events.flatMap((e) => (e.type === 'notice' ? [e.message] : []))).toEqual([
      '/a is tried again in 5 s',
      '/a is tried again in 10 s',
      '/a is tried again in 20 s',
    ]);
    expect(sessions).toHaveLength(4);
    session(3).becomeReady();
    session(3).seq = 5;
    await settled();
    // Points of the sessions before count.
    expect(daemon.status().devices[0]).toMatchObject({ state: 'exact', points: 9 });
    session(3).fail('again', true);
    await settled();
    expect(clock.pauses.at(-1)).toBe(5000);
    daemon.stop('SIGTERM');
    const end = await daemon.done;
    expect(end.failed).toHaveLength(1);
  });

  it('makes the best point there is and names it', async () => {
    const { daemon, session, pinned } = setUp([target('/a', 'k', true)]);
    session(0).becomeReady();
    const order = { type: 'point', volume: 'host/a', name: 'one', tags: ['t'] } as const;
    expect(await daemon.point(order, never)).toMatchObject({
      volume: 'host/a',
      volumeId: 'id-of-/a',
      device: '/a',
      point: { id: '#1', class: 'app', ageMs: 12.346 },
      hash: 'hash-1',
      name: 'one',
    });
    expect(pinned).toMatchObject([{ volumeId: 'id-of-/a', name: 'one', tags: ['t'] }]);
    session(0).refused = [PointClass.app, PointClass.fs];
    const made = await daemon.point({ ...order, name: 'two' }, never);
    expect(made.point.class).toBe('crash');
    expect(made.note).toBe('no class 4 here');
    expect(session(0).asked.map((r) => r.pointClass)).toEqual([4, 4, 3, 2]);
  });

  it('names the points that the other devices of a group have of the same instant', async () => {
    const { daemon, session, pinned, clock } = setUp([target('/a'), target('/b'), target('/c')]);
    const group = { name: 'g', isWhole: true, missing: [] };
    for (const i of [0, 1]) session(i).current = { group, state: 'exact' };
    for (const i of [0, 1, 2]) session(i).refused = [PointClass.fs];
    const order = { type: 'point', volume: 'host/a', name: 'one', tags: ['t'] } as const;
    const at = 1_700_000_005_000_000_000n;
    session(0).point = () => {
      const point = capturedPoint(5, { group: 'g', instantNs: at });
      session(0).announce(point);
      return Promise.resolve(point);
    };
    session(1).announce(capturedPoint(70, { group: 'g', instantNs: at - 5n }));
    const asked = daemon.point({ ...order, class: 'crash' }, never);
    await settled();
    // The other one is durable a moment later.
    session(1).announce(capturedPoint(71, { group: 'g', instantNs: at }));
    clock.wake();
    const made = await asked;
    expect(made).toMatchObject({
      volume: 'host/a',
      point: { id: '#5' },
      name: 'one',
      group: {
        name: 'g',
        missing: [],
        others: [{ volume: 'host/b', device: '/b', point: { id: '#71' }, hash: 'hash-71' }],
      },
    });
    expect(pinned.map((p) => [p.volume, p.point.seq, p.name, p.tags])).toEqual([
      ['host/a', 5, 'one', ['t']],
      ['host/b', 71, 'one', ['t']],
    ]);

    // One that has gone on without it has none.
    session(1).announce(capturedPoint(72, { group: 'g', instantNs: at + 9n }));
    session(0).point = () => Promise.resolve(capturedPoint(6, { group: 'g', instantNs: at + 3n }));
    const alone = await daemon.point({ ...order, name: 'two' }, never);
    expect(alone.group).toEqual({ name: 'g', missing: ['/b'], others: [] });

    // Apart, it is not waited for.
    const apart = { name: 'g', isWhole: false, missing: ['/b'] };
    session(0).current = { group: apart, state: 'exact' };
    session(0).point = () => Promise.resolve(capturedPoint(7));
    const third = await daemon.point({ ...order, name: 'three' }, never);
    expect(third.group).toEqual({ name: 'g', missing: ['/b'], others: [] });
    expect(pinned.slice(2).map((p) => p.volume)).toEqual(['host/a', 'host/a']);
    expect((await daemon.point({ ...order, volume: 'host/c' }, never)).group).toBeUndefined();
  });

  it('makes a point that is not exact where there can be no other, and says so', async () => {
    const { daemon, session } = setUp([target('/a')]);
    session(0).refused = [PointClass.fs, PointClass.crash];
    const order = { type: 'point', volume: 'host/a', tags: [] } as const;
    await expect(daemon.point(order, never)).rejects.toThrow('no class 2 here');
    const ranges = [{ offset: 4096, length: 8192 }];
    session(0).current = { unreadable: { bytes: 8192, ranges } };
    expect(await daemon.point(order, never)).toMatchObject({
      point: { class: 'fuzzy' },
      note: 'no class 2 here',
      unreadable: ranges,
    });
    // Who asks for a class gets it or nothing.
    await expect(daemon.point({ ...order, class: 'crash' }, never)).rejects.toThrow('no class 2');
  });

  it('makes no lesser point than was asked for, and none for a name that is taken', async () => {
    const { daemon, session } = setUp([target('/a')]);
    session(0).becomeReady();
    session(0).refused = [PointClass.fs];
    const order = { type: 'point', volume: 'id-of-/a', tags: [] } as const;
    await expect(daemon.point({ ...order, class: 'fs' }, never)).rejects.toMatchObject({
      kind: 'unsupported',
    });
    await expect(daemon.point({ ...order, name: 'taken' }, never)).rejects.toMatchObject({
      kind: 'exists',
    });
    expect(session(0).asked).toHaveLength(1);
  });

  it('finds devices by path, volume and id, and says why one cannot answer', async () => {
    const { daemon, session } = setUp([target('/a'), target('/b')]);
    expect(daemon.resync('/b')).toEqual({ volume: 'host/b' });
    expect(daemon.resync('host/b')).toEqual({ volume: 'host/b' });
    expect(session(1).resyncs).toBe(2);
    expect(() => daemon.resync('/c')).toThrow(expect.objectContaining({ kind: 'not-found' }));
    session(0).fail('the disk broke');
    await settled();
    await expect(
      daemon.point({ type: 'point', volume: '/a', tags: [] }, never),
    ).rejects.toMatchObject({ message: expect.stringMatching(/not captured.*the disk broke/) });
    daemon.stop('x');
    expect(() => daemon.resync('/b')).toThrow(expect.objectContaining({ kind: 'interrupted' }));
  });

  it('takes new settings: starts, stops and restarts what has changed, and nothing else', async () => {
    const { daemon, sessions, session } = setUp([target('/a'), target('/b'), target('/c')]);
    session(0).seq = 2;
    session(2).fail('broken');
    await settled();
    const done = await daemon.apply(() =>
      Promise.resolve([target('/a', 'other'), target('/c'), target('/d')]),
    );
    expect(done).toEqual([
      '/b is not watched any more',
      '/a is started again',
      '/c is started again',
      '/d is watched from now on',
    ]);
    expect(session(0).stops).toEqual([777]);
    expect(session(1).stops).toEqual([777]);
    expect(sessions.map((s) => s.target.device)).toEqual(['/a', '/b', '/c', '/a', '/c', '/d']);
    expect(daemon.status().devices.map((d) => [d.device, d.points])).toEqual([
      ['/a', 2],
      ['/c', 0],
      ['/d', 0],
    ]);
    expect(
      await daemon.apply(() =>
        Promise.resolve([target('/a', 'other'), target('/c'), target('/d')]),
      ),
    ).toEqual([]);
    expect(sessions).toHaveLength(6);
    daemon.stop('SIGTERM');
    expect((await daemon.done).devices).toHaveLength(3);
    expect(session(5).stops).toEqual([777]);
  });

  it('takes what is asked for one after the other, however long each takes to be found', async () => {
    const { daemon, sessions, isDone } = setUp([]);
    const finds: ((devices: readonly string[]) => void)[] = [];
    const find = (): Promise<readonly WatchTarget[]> =>
      new Promise((resolve) => {
        finds.push((devices) => resolve(devices.map((d) => target(d))));
      });
    const watched = (): readonly string[] => daemon.status().devices.map((d) => d.device);
    // A reload that comes before the watch has found what it starts with.
    const started = daemon.startFound(find);
    const applied = [daemon.apply(find), daemon.apply(find)];
    await settled();
    expect(finds).toHaveLength(1);
    finds[0]?.(['/a', '/b']);
    await started;
    expect(watched()).toEqual(['/a', '/b']);
    await settled();
    expect(finds).toHaveLength(2);
    finds[1]?.(['/a']);
    expect(await applied[0]).toEqual(['/b is not watched any more']);
    await settled();
    finds[2]?.(['/a', '/c']);
    expect(await applied[1]).toEqual(['/c is watched from now on']);
    expect(watched()).toEqual(['/a', '/c']);
    expect(sessions.map((s) => s.target.device)).toEqual(['/a', '/b', '/c']);
    expect(await isDone()).toBe(false);
    await expect(daemon.apply(() => Promise.reject(new Error('no configuration')))).rejects.toThrow(
      'no configuration',
    );
    expect(watched()).toEqual(['/a', '/c']);
  });

  it('starts nothing that is found when it has been stopped', async () => {
    const { daemon, sessions } = setUp([]);
    let found: (targets: readonly WatchTarget[]) => void = () => undefined;
    const started = daemon.startFound(() => new Promise((resolve) => (found = resolve)));
    await settled();
    daemon.stop('SIGTERM');
    found([target('/a')]);
    await started;
    expect(await daemon.done).toMatchObject({ reason: 'SIGTERM', devices: [], failed: [] });
    expect(sessions).toEqual([]);
  });

  it('changes nothing once it is being stopped', async () => {
    const { daemon, sessions } = setUp([target('/a')]);
    daemon.stop('SIGTERM');
    expect(await daemon.apply(() => Promise.resolve([target('/b')]))).toEqual([]);
    await daemon.done;
    expect(sessions).toHaveLength(1);
  });
});
