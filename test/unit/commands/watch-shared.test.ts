/** Which devices share their points without being told to. */
import { describe, expect, it } from 'vitest';

import type { Clock } from '../../../src/clock.js';
import { SharedDevices, type ReadCarried } from '../../../src/commands/run/watch-shared.js';
import { keyOf, type Target } from '../../../src/commands/run/watch-targets.js';
import type { Carried } from '../../../src/files/carried.js';
import { ManualClock } from '../../support/manual-clock.js';

const vg = (name: string, id = name, parts: Carried['parts'] = []): Carried => ({
  key: `lvm ${id}`,
  what: `volume group ${name}`,
  name,
  parts,
});

function target(device: string, group?: Target['group']): Target {
  const own = { volume: undefined, source: 'auto' as const, intervalMs: 1000 };
  return {
    ...own,
    device,
    key: keyOf(own, group),
    hasHooks: false,
    group,
    freezeMs: 100,
    freezeAfterMs: undefined,
    prePoint: undefined,
    postPoint: undefined,
    hookMs: 1,
  };
}

/** What is carried, by device; a device that is not listed cannot be read. */
function shared(
  carried: Record<string, readonly Carried[]> | ReadCarried,
  options: { readonly clock?: Clock; readonly signal?: AbortSignal } = {},
): { readonly said: string[]; readonly devices: SharedDevices } {
  const said: string[] = [];
  const clock = new ManualClock();
  // Nothing is late unless a test says so.
  clock.sleep = () => new Promise<void>(() => undefined);
  const read: ReadCarried =
    typeof carried === 'function'
      ? carried
      : (device) => {
          const found = carried[device];
          return found === undefined ? Promise.reject(new Error('gone')) : Promise.resolve(found);
        };
  const devices = new SharedDevices({
    clock,
    signal: new AbortController().signal,
    read,
    say: (priority, message, hint) => said.push([priority, message, hint ?? ''].join(': ')),
    ...options,
  });
  return { said, devices };
}

const groupsOf = (targets: readonly Target[]): unknown => targets.map((t) => t.group?.name);

describe('SharedDevices', () => {
  it('makes a group of devices that carry the same, and leaves the others alone', async () => {
    const { said, devices } = shared({
      '/a': [vg('vg0')],
      '/b': [],
      '/c': [vg('other')],
      '/d': [vg('vg0')],
    });
    const before = ['/a', '/b', '/c', '/d'].map((d) => target(d));
    const after = await devices.group(before);
    const group = { name: 'vg0', devices: ['/a', '/d'] };
    expect(after.map((t) => t.group)).toEqual([group, undefined, undefined, group]);
    // A session that runs without the group cannot take it over.
    expect(after.map((t, i) => t.key === before[i]?.key)).toEqual([false, true, true, false]);
    expect(after[0]?.key).toBe(target('/a', group).key);
    expect(said).toEqual([
      'notice: volume group vg0: on /a, /d, which share their points (group vg0): ',
    ]);
  });

  it('joins what hangs together through a third device', async () => {
    const { said, devices } = shared({
      '/a': [vg('x')],
      '/b': [vg('y')],
      '/c': [vg('x'), vg('y')],
    });
    const after = await devices.group([target('/a'), target('/b'), target('/c')]);
    expect(after.map((t) => t.group?.devices)).toEqual(Array(3).fill(['/a', '/b', '/c']));
    expect(said).toHaveLength(1);
    expect(said[0]).toContain('volume group x, volume group y: on /a, /b, /c');
  });

  it('goes by identity, not by name, and gives no name twice', async () => {
    const { devices } = shared({
      '/a': [vg('data', '1')],
      '/b': [vg('data', '2')],
      '/c': [vg('data', '1')],
      '/d': [vg('data', '2')],
    });
    const all = ['/a', '/b', '/c', '/d'].map((d) => target(d));
    expect(groupsOf(await devices.group(all))).toEqual(['data', 'data-2', 'data', 'data-2']);
    const taken = { name: 'data', devices: ['/x', '/y'] };
    const { devices: others } = shared({
      '/x': [],
      '/y': [],
      '/a': [vg('data')],
      '/b': [vg('data')],
    });
    const mixed = [target('/x', taken), target('/y', taken), target('/a'), target('/b')];
    expect(groupsOf(await others.group(mixed))).toEqual(['data', 'data', 'data-2', 'data-2']);
  });

  it('leaves groups that were given as they are, and says where they part what belongs together', async () => {
    const carried = { '/a': [vg('vg0')], '/b': [vg('vg0')], '/c': [] };
    const whole = { name: 'mine', devices: ['/a', '/b', '/c'] };
    const { said, devices } = shared(carried);
    const given = ['/a', '/b', '/c'].map((d) => target(d, whole));
    expect(await devices.group(given)).toEqual(given);
    expect(said).toEqual([]);
    const part = { name: 'mine', devices: ['/a', '/c'] };
    const parted = [target('/a', part), target('/b'), target('/c', part)];
    expect(await devices.group(parted)).toEqual(parted);
    expect(said).toHaveLength(1);
    expect(said[0]).toMatch(/^warning: volume group vg0: on \/a, \/b, which are not of one group/);
  });

  it('makes no group of what is there twice, and says so', async () => {
    const disk = (...parts: Carried['parts']): readonly Carried[] => [vg('vg0', 'vg0', parts)];
    const groupsFor = async (
      carried: Record<string, readonly Carried[]>,
      group?: Target['group'],
    ): Promise<readonly [unknown, string]> => {
      const { said, devices } = shared(carried);
      const after = await devices.group(Object.keys(carried).map((d) => target(d, group)));
      return [groupsOf(after), said.join('\n')];
    };
    const both = { '/a': disk({ id: '1' }), '/b': disk({ id: '2' }) };
    expect((await groupsFor(both))[0]).toEqual(['vg0', 'vg0']);
    // A partition of /a, another path to it, or a disk that it was copied to.
    const copied = { ...both, '/copy': disk({ id: '1' }) };
    const [groups, said] = await groupsFor(copied);
    expect(groups).toEqual([undefined, undefined, undefined]);
    expect(said).toMatch(
      /^warning: volume group vg0: on \/a, \/b, \/copy, of which \/a and \/copy are/,
    );
    const given = { name: 'mine', devices: Object.keys(copied) };
    expect(await groupsFor(copied, given)).toEqual([['mine', 'mine', 'mine'], '']);
    // Each member of an array has what is in it; the array itself has that once more.
    const [one, two] = [disk({ id: '1', within: 'md' }), disk({ id: '1', within: 'md' })];
    expect((await groupsFor({ '/m1': one, '/m2': two }))[0]).toEqual(['vg0', 'vg0']);
    const withArray = { '/m1': one, '/m2': two, '/md0': disk({ id: '1' }) };
    expect((await groupsFor(withArray))[0]).toEqual([undefined, undefined, undefined]);
    // Two parts on one device are no copies.
    const twice = { '/a': disk({ id: '1' }, { id: '3' }), '/b': disk({ id: '2' }) };
    expect((await groupsFor(twice))[0]).toEqual(['vg0', 'vg0']);
  });

  it('reads nothing for one device', async () => {
    const { devices } = shared(() => Promise.reject(new Error('read')));
    const one = [target('/a')];
    expect(await devices.group(one)).toBe(one);
  });

  it('keeps a device in its group that is away when it looks again', async () => {
    const carried: Record<string, readonly Carried[]> = { '/a': [vg('vg0')], '/b': [vg('vg0')] };
    const { devices } = shared(carried);
    const all = [target('/a'), target('/b')];
    const first = await devices.group(all);
    delete carried['/b'];
    expect(await devices.group(all)).toEqual(first);
    // What is there and carries it no more is no member any more.
    carried['/b'] = [];
    expect(await devices.group(all)).toEqual(all);
  });

  it('waits for no device that does not answer, and says so', async () => {
    let answer: ((carried: readonly Carried[]) => void) | undefined;
    const read: ReadCarried = (device) =>
      device === '/b' ? new Promise((resolve) => (answer = resolve)) : Promise.resolve([vg('vg0')]);
    const clock = new ManualClock();
    clock.sleep = () => new Promise<void>((resolve) => void setImmediate(resolve));
    const { said, devices } = shared(read, { clock });
    const all = [target('/a'), target('/b'), target('/c')];
    expect(groupsOf(await devices.group(all))).toEqual(['vg0', undefined, 'vg0']);
    expect(said.filter((s) => s.startsWith('warning: /b did not answer within 5 s'))).toHaveLength(
      1,
    );
    // What it said after all counts from then on.
    answer?.([vg('vg0')]);
    await Promise.resolve();
    expect(groupsOf(await devices.group(all))).toEqual(['vg0', 'vg0', 'vg0']);
  });

  it('says nothing of late devices to who has asked it to stop', async () => {
    const read: ReadCarried = () => new Promise(() => undefined);
    const clock = new ManualClock();
    const { said, devices } = shared(read, { clock, signal: AbortSignal.abort() });
    expect(groupsOf(await devices.group([target('/a'), target('/b')]))).toEqual([
      undefined,
      undefined,
    ]);
    expect(said).toEqual([]);
  });

  it('reads a device that hangs once, however often it is asked for', async () => {
    let reads = 0;
    let answer: (carried: readonly Carried[]) => void = () => undefined;
    const clock = new ManualClock();
    const { said, devices } = shared(
      (device) => {
        if (device === '/a') return Promise.resolve([vg('vg0')]);
        reads++;
        return new Promise((resolve) => (answer = resolve));
      },
      { clock },
    );
    clock.sleep = () => Promise.resolve();
    const targets = ['/a', '/hangs'].map((d) => target(d));
    for (let i = 0; i < 5; i++) expect((await devices.group(targets))[1]?.group).toBeUndefined();
    expect(reads).toBe(1);
    expect(said.at(-1)).toContain('/hangs did not answer within 5 s');
    clock.sleep = () => new Promise<void>(() => undefined);
    const grouped = devices.group(targets);
    answer([vg('vg0')]);
    expect(groupsOf(await grouped)).toEqual(['vg0', 'vg0']);
    // What it carries is looked at anew from then on.
    const again = devices.group(targets);
    expect(reads).toBe(2);
    answer([]);
    expect(groupsOf(await again)).toEqual([undefined, undefined]);
  });
});
