import { spawn } from 'node:child_process';
import { rmSync } from 'node:fs';
import { describe, expect, test } from 'vitest';
import { systemClock, systemRandom } from '../../../src/clock.js';
import { B2Error, isKind } from '../../../src/errors.js';
import {
  currentIdentity,
  type MachineFacts,
  type ProcessIdentity,
} from '../../../src/process-identity.js';
import {
  acquireLease,
  type Lease,
  type LeaseHolder,
  type LeaseOptions,
  readLease,
} from '../../../src/repo/lease.js';
import { openDirectoryStore } from '../../../src/repo/store-directory.js';
import type { Store } from '../../../src/repo/store.js';
import { compileForChild } from '../../support/compile.js';
import { FaultStore } from '../../support/store-fault.js';
import { MemoryStore } from '../../support/store-memory.js';
import { settle, SteppedClock } from '../../support/stepped-clock.js';
import { tempDir } from '../../support/tmp.js';

const TTL_MS = 60_000;

/** A simulated host: its own clock and process table. */
class Host {
  readonly clock: SteppedClock;
  readonly machine: MachineFacts;
  readonly running = new Map<number, string>();
  #nextPid = 100;

  constructor(host: string, bootId = `${host}-boot-1`, wallNs?: bigint) {
    this.clock = new SteppedClock(wallNs);
    this.machine = {
      host,
      machineId: `${host}-machine`,
      bootId,
      namespaces: 'pid:[1] time:[2]',
      process: (pid) => {
        const startTicks = this.running.get(pid);
        return startTicks === undefined ? 'gone' : { startTicks };
      },
    };
  }

  start(): ProcessIdentity {
    const pid = this.#nextPid++;
    const startTicks = String(pid * 1000);
    this.running.set(pid, startTicks);
    const { host, machineId, bootId, namespaces } = this.machine;
    return { host, machineId, bootId, pid, startTicks, namespaces };
  }

  kill({ pid }: ProcessIdentity): void {
    this.running.delete(pid);
  }

  options(more: Partial<LeaseOptions> = {}): LeaseOptions {
    return {
      clock: this.clock,
      random: systemRandom,
      owner: this.start(),
      machine: this.machine,
      ttlMs: TTL_MS,
      purpose: 'prune',
      ...more,
    };
  }
}

/** Time passes on all of them, in small steps. */
async function pass(ms: number, ...hosts: readonly Host[]): Promise<void> {
  const stepMs = 500;
  for (let done = 0; done < ms; done += stepMs) {
    for (const host of hosts) await host.clock.advanceMs(stepMs);
  }
}

async function generations(store: Store): Promise<string[]> {
  const names: string[] = [];
  for await (const { name } of store.list('locks')) names.push(name);
  return names.sort();
}

/** The outcome of a promise as far as it is known now. */
function watch<T>(promise: Promise<T>): { value?: T; error?: unknown; state: string } {
  const seen: { value?: T; error?: unknown; state: string } = { state: 'pending' };
  promise.then(
    (value) => Object.assign(seen, { state: 'done', value }),
    (error: unknown) => Object.assign(seen, { state: 'failed', error }),
  );
  return seen;
}

describe('a lease', () => {
  test('is taken, known, given up and taken again', async () => {
    const store = new MemoryStore();
    const host = new Host('web1');
    expect(await readLease(store, 'prune')).toBeUndefined();
    for (let i = 0; i < 6; i++) {
      const options = host.options();
      const lease = await acquireLease(store, 'prune', options);
      expect(await readLease(store, 'prune')).toMatchObject({
        owner: options.owner,
        purpose: 'prune',
        sinceNs: host.clock.nowNs(),
      });
      await lease.assertHeld();
      await lease.renew();
      await lease.assertHeld();
      expect(lease.lost.aborted).toBe(false);
      await lease.release();
      await lease.release();
      expect(await readLease(store, 'prune')).toBeUndefined();
      await expect(lease.assertHeld()).rejects.toThrow(/after its release/);
    }
    // The two highest generations and the mark that earlier ones existed.
    expect(await generations(store)).toEqual([
      'locks/prune/000000000000017',
      'locks/prune/000000000000018',
      'locks/prune/cleaned',
    ]);
    expect(host.clock.sleeping).toBe(0);
  });

  test('held by a living process here is refused at once, saying by whom', async () => {
    const store = new MemoryStore();
    const host = new Host('web1');
    const first = host.options({ purpose: 'repair' });
    const lease = await acquireLease(store, 'prune', first);
    await expect(acquireLease(store, 'prune', host.options())).rejects.toMatchObject({
      name: 'B2Error',
      kind: 'held',
      code: 11,
      message: `the prune lease of this repository is held by host web1, process ${first.owner.pid} (repair), since 2023-11-14T22:13:20.000Z`,
      hint: expect.stringContaining('Wait') as string,
    });
    const another = await acquireLease(store, 'keys', host.options());
    await another.release();
    await lease.release();
  });

  test('of a killed process, or of an earlier boot, is taken over at once', async () => {
    const store = new MemoryStore();
    const host = new Host('web1');
    const killed = host.options();
    await acquireLease(store, 'prune', killed);
    host.kill(killed.owner);
    await acquireLease(store, 'prune', host.options());
    const rebooted = new Host('web1', 'web1-boot-2');
    const lease = await acquireLease(store, 'prune', rebooted.options());
    await lease.assertHeld();
    expect(await readLease(store, 'prune')).toMatchObject({ owner: { bootId: 'web1-boot-2' } });
    await lease.release();
  });

  test('of a process with the same id but another start is taken over at once', async () => {
    const store = new MemoryStore();
    const host = new Host('web1');
    const first = host.options();
    await acquireLease(store, 'prune', first);
    host.running.set(first.owner.pid, 'later');
    const second = host.options();
    const lease = await acquireLease(store, 'prune', second);
    expect(await readLease(store, 'prune')).toMatchObject({ owner: second.owner });
    await lease.release();
  });

  test('on another host that lives is refused once a renewal was seen', async () => {
    const store = new MemoryStore();
    // Clocks a year apart: nothing may depend on them.
    const [a, b] = [new Host('a'), new Host('b', 'b-boot', 1_730_000_000_000_000_000n)];
    const lease = await acquireLease(store, 'prune', a.options());
    const waits: LeaseHolder[] = [];
    const trying = watch(
      acquireLease(store, 'prune', b.options({ onWait: (holder) => waits.push(holder) })),
    );
    await pass(10_000, a, b);
    expect(trying.state).toBe('pending');
    await pass(10_000, a, b);
    expect(trying).toMatchObject({ state: 'failed', error: { kind: 'held' } });
    expect(waits.map(({ owner }) => owner.host)).toEqual(['a']);
    expect(lease.lost.aborted).toBe(false);
    await lease.release();
  });

  test('on another host that is silent is taken over after its time to live, not before', async () => {
    const store = new MemoryStore();
    const [a, b] = [new Host('a'), new Host('b')];
    await acquireLease(store, 'prune', a.options());
    const trying = watch(acquireLease(store, 'prune', b.options()));
    await pass(TTL_MS - 1_000, b);
    expect(trying.state).toBe('pending');
    await pass(6_000, b);
    expect(trying.state).toBe('done');
    await trying.value?.assertHeld();
    await trying.value?.release();
  });

  test('is waited for if asked, also while it is renewed', async () => {
    const store = new MemoryStore();
    const [a, b] = [new Host('a'), new Host('b')];
    const lease = await acquireLease(store, 'prune', a.options());
    const trying = watch(acquireLease(store, 'prune', b.options({ waitMs: 10 * TTL_MS })));
    await pass(5 * TTL_MS, a, b);
    expect(trying.state).toBe('pending');
    await lease.assertHeld();
    await lease.release();
    await pass(4_000, a, b);
    expect(trying.state).toBe('done');
    await trying.value?.release();

    const again = await acquireLease(store, 'prune', a.options());
    const giving = watch(acquireLease(store, 'prune', b.options({ waitMs: 3 * TTL_MS })));
    await pass(3 * TTL_MS + 5_000, a, b);
    expect(giving).toMatchObject({ state: 'failed', error: { kind: 'held' } });
    await again.release();
  });

  test('waiting for it can be interrupted', async () => {
    const store = new MemoryStore();
    const [a, b] = [new Host('a'), new Host('b')];
    const lease = await acquireLease(store, 'prune', a.options());
    const stop = new AbortController();
    const trying = acquireLease(store, 'prune', b.options({ waitMs: TTL_MS, signal: stop.signal }));
    await settle();
    stop.abort();
    await expect(trying).rejects.toMatchObject({ kind: 'interrupted', code: 130 });
    await lease.release();
  });

  test('renews itself in the background for as long as it is held', async () => {
    const store = new MemoryStore();
    const host = new Host('a');
    const lease = await acquireLease(store, 'prune', host.options());
    await pass(20 * TTL_MS, host);
    await lease.assertHeld();
    expect((await generations(store)).length).toBe(3);
    expect(Number((await generations(store))[1]?.slice(-15))).toBeGreaterThan(70);
    await lease.release();
  });
});

describe('a holder that slept', () => {
  /** Host a takes the lease and stops; host b takes it over. */
  async function stolen(store: Store): Promise<{ a: Host; b: Host; old: Lease; thief: Lease }> {
    const [a, b] = [new Host('a'), new Host('b')];
    const old = await acquireLease(store, 'prune', a.options());
    const trying = watch(acquireLease(store, 'prune', b.options()));
    await pass(TTL_MS + 5_000, b);
    const thief = trying.value;
    if (thief === undefined) throw new Error('not taken over');
    return { a, b, old, thief };
  }

  test('notices before its next destructive step', async () => {
    const { old, thief } = await stolen(new MemoryStore());
    const lost = {
      kind: 'held',
      message: expect.stringContaining('lost the prune lease') as string,
    };
    await expect(old.assertHeld()).rejects.toMatchObject(lost);
    expect(old.lost.aborted).toBe(true);
    expect(old.lost.reason).toMatchObject({
      kind: 'held',
      message: expect.stringContaining('host b') as string,
    });
    await expect(old.renew()).rejects.toMatchObject(lost);
    await old.release();
    await thief.assertHeld();
    await thief.release();
  });

  test('notices by itself when its clock goes on, and does not disturb the thief', async () => {
    const { a, b, old, thief } = await stolen(new MemoryStore());
    await pass(TTL_MS / 3, a, b);
    expect(old.lost.aborted).toBe(true);
    await thief.assertHeld();
    await thief.release();
  });

  test('claims nothing though its next generation was used and deleted long ago', async () => {
    const store = new MemoryStore();
    const { b, old, thief } = await stolen(store);
    await pass(10 * TTL_MS, b);
    expect(await store.stat('locks/prune/000000000000002')).toBeUndefined();
    await expect(old.renew()).rejects.toMatchObject({ kind: 'held' });
    expect(await store.stat('locks/prune/000000000000002')).toBeUndefined();
    await thief.assertHeld();
    await thief.release();
  });

  test('claims nothing though the lease is free again', async () => {
    const { old, thief } = await stolen(new MemoryStore());
    await thief.release();
    await expect(old.assertHeld()).rejects.toMatchObject({ kind: 'held' });
    await expect(old.renew()).rejects.toMatchObject({ kind: 'held' });
  });

  test('goes on if nobody took it over, also after a suspend that its monotonic clock missed', async () => {
    const host = new Host('a');
    const store = new MemoryStore();
    const lease = await acquireLease(store, 'prune', host.options());
    const before = await generations(store);
    host.clock.suspendMs(100 * TTL_MS);
    await lease.assertHeld();
    expect(await generations(store)).not.toEqual(before);
    expect(lease.lost.aborted).toBe(false);
    await lease.release();
  });

  test('before it has verified a claim of generation 1 claims nothing', async () => {
    // Two begin with an empty store; one sleeps between its list and its put, the lease is used meanwhile.
    const inner = new MemoryStore();
    let open = (): void => undefined;
    const gate = new Promise<void>((resolve) => (open = resolve));
    const slow = new FaultStore(inner, ({ kind }) =>
      kind === 'put' ? { do: 'wait', until: () => gate } : undefined,
    );
    const [a, b] = [new Host('a'), new Host('b')];
    const sleeper = watch(acquireLease(slow, 'prune', a.options()));
    await settle();
    const lease = await acquireLease(inner, 'prune', b.options());
    await lease.renew();
    await lease.renew();
    expect(await inner.stat('locks/prune/000000000000001')).toBeUndefined();
    open();
    await settle();
    expect(sleeper.state).toBe('pending');
    await lease.assertHeld();
    expect(await inner.stat('locks/prune/000000000000001')).toBeUndefined();
    await pass(TTL_MS / 2, b, a);
    expect(sleeper).toMatchObject({ state: 'failed', error: { kind: 'held' } });
    await lease.release();
  });
});

describe('races', () => {
  test('of many that find a free, dead or silent lease exactly one wins', async () => {
    for (const kind of ['new', 'free', 'dead', 'silent'] as const) {
      const store = new MemoryStore();
      const host = new Host('a');
      const hosts = Array.from({ length: 8 }, (_, i) =>
        kind === 'dead' ? host : new Host(`h${i}`),
      );
      if (kind !== 'new') {
        const options = host.options();
        const lease = await acquireLease(store, 'prune', options);
        if (kind === 'free') await lease.release();
        if (kind === 'dead') host.kill(options.owner);
      }
      const tries = hosts.map((one) => watch(acquireLease(store, 'prune', one.options())));
      const clocks = [...new Set(hosts)];
      await pass(TTL_MS + 40_000, ...clocks);
      const winners = tries.filter(({ state }) => state === 'done');
      expect(winners).toHaveLength(1);
      const others = tries.filter(({ state }) => state !== 'done');
      expect(others.every(({ error }) => isKind(error, 'held'))).toBe(true);
      await winners[0]?.value?.assertHeld();
      await winners[0]?.value?.release();
    }
  });

  test('once a later holder has it, an earlier one never passes assertHeld again', async () => {
    let state = 12_345;
    const random = (below: number): number => {
      state = (Math.imul(state, 1664525) + 1013904223) >>> 0;
      return Math.floor((state / 2 ** 32) * below);
    };
    let [taken, refused, lost] = [0, 0, 0];
    for (let round = 0; round < 25; round++) {
      const store = new MemoryStore();
      const hosts = Array.from({ length: 4 }, (_, i) => new Host(`h${i}`));
      /** Every lease ever acquired, in order of the first moment at which it was known to be held. */
      let newest = -1;
      let count = 0;
      let isOver = false;
      const violations: string[] = [];
      const actors = hosts.map(async (host) => {
        while (!isOver) {
          let lease: Lease;
          try {
            lease = await acquireLease(store, 'prune', host.options());
          } catch {
            refused++;
            await host.clock.sleep(1_000);
            continue;
          }
          const mine = count++;
          newest = mine;
          taken++;
          for (let i = 0; i < 5 && !isOver; i++) {
            await host.clock.sleep(random(TTL_MS / 2));
            const before = newest;
            try {
              await lease.assertHeld();
              if (before !== mine) violations.push(`lease ${mine} held after ${before} was taken`);
            } catch {
              lost++;
              break;
            }
          }
          await lease.release();
        }
      });
      // Each host's time goes on in leaps of its own, and now and then stands still for long.
      const pausedUntil = hosts.map(() => 0);
      for (let step = 0; step < 100; step++) {
        const going = hosts.filter((_, i) => {
          if (random(25) === 0) pausedUntil[i] = step + 10 + random(20);
          return (pausedUntil[i] ?? 0) <= step;
        });
        await Promise.all(going.map((host) => host.clock.advanceMs(random(14_000))));
      }
      isOver = true;
      for (let i = 0; i < 40; i++) for (const host of hosts) await host.clock.advanceMs(TTL_MS / 4);
      expect(violations).toEqual([]);
      void actors;
    }
    expect(Math.min(taken, refused, lost)).toBeGreaterThan(10);
  }, 60_000);
});

describe('faults and crashes', () => {
  test('after a crash between any two steps the lease can be had, by one only', async () => {
    const store = new MemoryStore();
    const host = new Host('a');
    for (let i = 0; i < 2; i++) {
      const lease = await acquireLease(store, 'prune', host.options());
      await lease.renew();
      await lease.renew();
      await lease.release();
    }
    await acquireLease(store, 'prune', host.options());
    expect(store.operations).toBeGreaterThan(12);
    for (let cut = 0; cut <= store.operations; cut++) {
      const image = store.crashAt(cut, { tear: 'drop' });
      const rebooted = new Host('a', 'a-boot-2');
      const other = new Host('b');
      const lease = await acquireLease(image, 'prune', rebooted.options());
      const trying = watch(acquireLease(image, 'prune', other.options()));
      await lease.assertHeld();
      await pass(TTL_MS / 2, rebooted, other);
      expect(trying).toMatchObject({ state: 'failed', error: { kind: 'held' } });
      await lease.assertHeld();
      await lease.release();

      const alone = store.crashAt(cut, { tear: 'drop' });
      const elsewhere = watch(acquireLease(alone, 'prune', other.options()));
      await pass(TTL_MS + 5_000, other);
      expect(elsewhere.state).toBe('done');
      await elsewhere.value?.release();
    }
  });

  test('an error at any call of acquire, renew and release does no lasting harm', async () => {
    let cases = 0;
    for (const fault of ['E', 'A'] as const) {
      for (const kind of ['put', 'get', 'list', 'stat', 'delete'] as const) {
        for (let n = 0; n < 12; n++) {
          const inner = new MemoryStore();
          const store = new FaultStore(inner, { [kind]: `${'.'.repeat(n)}${fault}` });
          const host = new Host('a');
          const attempt = async (work: () => Promise<unknown>): Promise<void> => {
            try {
              await work();
            } catch (error) {
              if (!(error instanceof B2Error)) throw error;
            }
          };
          let lease: Lease | undefined;
          await attempt(async () => (lease = await acquireLease(store, 'prune', host.options())));
          for (let i = 0; i < 4; i++) await attempt(async () => lease?.renew());
          await attempt(async () => lease?.assertHeld());
          await attempt(async () => lease?.release());
          if (store.injected === 0) break;
          cases++;
          // Whatever failed, another host gets it, at the latest when the old one has lapsed.
          const other = new Host('b');
          const trying = watch(acquireLease(inner, 'prune', other.options()));
          await pass(TTL_MS + 5_000, other);
          expect(trying.state).toBe('done');
          await trying.value?.assertHeld();
          await trying.value?.release();
        }
      }
    }
    expect(cases).toBeGreaterThan(40);
  }, 60_000);

  test('a renewal whose answer was lost is still ours', async () => {
    const store = new FaultStore(new MemoryStore(), { put: '.A' });
    const host = new Host('a');
    const lease = await acquireLease(store, 'prune', host.options());
    await expect(lease.renew()).rejects.toMatchObject({ kind: 'io' });
    await lease.renew();
    await lease.assertHeld();
    await lease.release();
    expect(await readLease(store, 'prune')).toBeUndefined();
  });

  test('an acquisition whose answer was lost holds nobody up', async () => {
    const store = new FaultStore(new MemoryStore(), { put: 'A' });
    const host = new Host('a');
    await expect(acquireLease(store, 'prune', host.options())).rejects.toMatchObject({
      kind: 'io',
    });
    const lease = await acquireLease(store, 'prune', host.options());
    await lease.release();
  });

  test.each([
    ['fails', 'R*'],
    ['hangs', 'H*'],
  ])('a store that %s ends the lease before others may take it', async (_, faults) => {
    const store = new FaultStore(new MemoryStore());
    const host = new Host('a');
    const lease = await acquireLease(store, 'prune', host.options());
    store.setFaults({ put: faults });
    await pass((TTL_MS * 3) / 4 - 1_000, host);
    expect(lease.lost.aborted).toBe(false);
    await pass(2_000, host);
    expect(lease.lost.aborted).toBe(true);
    expect(lease.lost.reason).toMatchObject({
      kind: 'held',
      message: expect.stringContaining('could not renew') as string,
    });
    await lease.release();
    store.releaseHung();
  });

  test('a short failure of the store does not end it', async () => {
    const store = new FaultStore(new MemoryStore());
    const host = new Host('a');
    const lease = await acquireLease(store, 'prune', host.options());
    store.setFaults({ put: 'R*' });
    await pass(TTL_MS / 2, host);
    store.setFaults();
    await pass(3 * TTL_MS, host);
    await lease.assertHeld();
    expect(lease.lost.aborted).toBe(false);
    await lease.release();
  });

  test.each([
    '',
    'garbage',
    '[]',
    '{"b2lease":2,"state":"free"}',
    '{"b2lease":1,"ttlMs":1e99,"owner":7}',
  ])('a record that says %j is waited out', async (text) => {
    const store = new MemoryStore();
    await store.put('locks/prune/000000000000001', Buffer.from(text));
    const host = new Host('a');
    const trying = watch(acquireLease(store, 'prune', host.options()));
    await pass(50_000, host);
    expect(trying.state).toBe('pending');
    await pass(15_000, host);
    expect(trying.state).toBe('done');
    await trying.value?.release();
  });

  test('a record with control characters does not reach the terminal as such', async () => {
    const store = new MemoryStore();
    const host = new Host('a');
    const options = host.options();
    const owner = { ...options.owner, host: 'evil\u001b[2J' };
    const lease = await acquireLease(store, 'prune', { ...options, owner });
    await expect(acquireLease(store, 'prune', host.options())).rejects.toMatchObject({
      message: expect.stringContaining('host evil?[2J,') as string,
    });
    await lease.release();
  });
});

describe('on a real directory, between real processes', () => {
  test('a living holder keeps it, a killed one is succeeded at once', async () => {
    await using dir = tempDir();
    const compiled = compileForChild(
      'repo/lease.ts',
      'repo/store-directory.ts',
      'clock.ts',
      'process-identity.ts',
    );
    dir.onRemove(() => rmSync(compiled, { recursive: true }));
    const script = `
      const from = (name) => import(process.argv[1] + '/' + name);
      const { acquireLease } = await from('repo/lease.js');
      const { openDirectoryStore } = await from('repo/store-directory.js');
      const { systemClock, systemRandom } = await from('clock.js');
      const { currentIdentity } = await from('process-identity.js');
      const store = await openDirectoryStore(process.argv[2], { create: true });
      await acquireLease(store, 'prune', {
        clock: systemClock, random: systemRandom, owner: currentIdentity(),
      });
      process.stdout.write('held');
    `;
    const args = ['--input-type=module', '-e', script, compiled, dir.join('repo')];
    const child = spawn(process.execPath, args, { stdio: ['ignore', 'pipe', 'inherit'] });
    const ended = new Promise((resolve) => child.once('exit', resolve));
    try {
      await new Promise((resolve) => child.stdout.once('data', resolve));
      const store = await openDirectoryStore(dir.join('repo'));
      const options = { clock: systemClock, random: systemRandom, owner: currentIdentity() };
      await expect(acquireLease(store, 'prune', options)).rejects.toMatchObject({
        kind: 'held',
        message: expect.stringContaining(`process ${child.pid}`) as string,
      });
      child.kill('SIGKILL');
      await ended;
      const lease = await acquireLease(store, 'prune', options);
      await lease.assertHeld();
      await lease.release();
      await store.close();
    } finally {
      child.kill('SIGKILL');
      await ended;
    }
  }, 60_000);
});
