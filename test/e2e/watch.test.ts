/**
 * `b2 watch` of the built program: on a mounted loop device under writes, with other shells that ask it for snapshots, status and
 * restores; signals; configuration; the default repository; a service manager.
 */
import { execFileSync } from 'node:child_process';
import { createHash } from 'node:crypto';
import {
  chownSync,
  existsSync,
  mkdirSync,
  readFileSync,
  readdirSync,
  renameSync,
  statSync,
  truncateSync,
  writeFileSync,
} from 'node:fs';
import { open } from 'node:fs/promises';
import { fileURLToPath } from 'node:url';
import { afterEach, beforeEach, describe, expect, it } from 'vitest';

import { systemClock } from '../../src/clock.js';
import { B2, jsonLines, PROGRAM, type JsonError } from '../support/b2.js';
import { noise, pokeWithDd, tool } from '../support/disks.js';
import { attachLoop, LOOP_NEEDS, makeFileSystem, mountDevice, newLoop } from '../support/loop.js';
import { notifySocket } from '../support/notify-socket.js';
import { requires } from '../support/requires.js';
import { tempDir, type TempDir } from '../support/tmp.js';
import { Watching, type WatchLine } from '../support/watching.js';

const MIB = 1024 * 1024;
const fixture = (path: string): string =>
  fileURLToPath(new URL(`../fixtures/${path}`, import.meta.url));

interface Snapshot {
  readonly id: string;
  readonly name: string;
  readonly time: string;
  readonly class: string;
  readonly watched: boolean;
  readonly hash: string;
  readonly volume: string;
}
interface Device {
  readonly device: string;
  readonly volume: string;
  readonly state: string;
  readonly lagMs?: number;
  readonly points: number;
  readonly lastPoint?: { readonly seq: number };
}
interface Status {
  readonly volumes: readonly {
    readonly name: string;
    readonly lagSeconds?: number;
    readonly watched?: Device;
  }[];
  readonly watches: readonly {
    readonly pid: number;
    readonly repository: string;
    readonly devices: readonly Device[];
  }[];
}

interface Verified {
  readonly volumes: readonly { readonly name: string; readonly lagFrom?: string }[];
  readonly lagging?: readonly string[];
}

let dir: TempDir;
let b2: B2;
const running: Watching[] = [];

beforeEach(() => {
  dir = tempDir();
  mkdirSync(dir.join('home'));
  b2 = new B2(dir, {
    B2_PASSWORD: 'a password of the test',
    B2_RUNTIME_DIR: dir.join('run'),
  });
});
afterEach(async () => {
  for (const recorder of recorders.splice(0)) await recorder.stop();
  for (const watching of running.splice(0)) await watching.finish();
  await dir.remove();
});

function watch(
  args: readonly string[],
  env: Readonly<Record<string, string | undefined>> = {},
  program = b2,
): Watching {
  const watching = new Watching(program, args, env);
  running.push(watching);
  return watching;
}

/** A repository whose key costs no time to derive, for tests that are about something else. */
async function initPlain(): Promise<void> {
  await b2.json(['init', '--encryption', 'none']);
}

/** The error with which a watch ends that cannot begin. */
async function watchError(device: string): Promise<JsonError> {
  const { stderr } = await b2.start(['--json', 'watch', device, '--run-for', '1s']).ended;
  return jsonLines(stderr).at(-1) as unknown as JsonError;
}

function timeNs(rfc3339: unknown): bigint {
  const [seconds = '', fraction = ''] = String(rfc3339).replace(/Z$/, '').split('.');
  return BigInt(Date.parse(`${seconds}Z`)) * 1_000_000n + BigInt(fraction.padEnd(9, '0'));
}

/** Appends numbered records to a file, each made durable before the next, and remembers when. */
class Recorder {
  readonly records: { readonly issuedNs: bigint; readonly ackedNs: bigint }[] = [];
  private isStopped = false;
  private readonly done: Promise<void>;

  constructor(file: string) {
    this.done = this.write(file);
  }

  private async write(file: string): Promise<void> {
    const handle = await open(file, 'a');
    try {
      while (!this.isStopped) {
        const issuedNs = systemClock.nowNs();
        await handle.write(`${String(this.records.length).padStart(99, '0')}\n`);
        await handle.datasync();
        this.records.push({ issuedNs, ackedNs: systemClock.nowNs() });
        await new Promise((resolve) => setTimeout(resolve, 10));
      }
    } finally {
      await handle.close();
    }
  }

  async stop(): Promise<void> {
    this.isStopped = true;
    await this.done;
  }
}

const recorders: Recorder[] = [];

function record(file: string): Recorder {
  const recorder = new Recorder(file);
  recorders.push(recorder);
  return recorder;
}

/** How many records a restored image holds; they must be whole and in order. */
async function recordsIn(image: string, name: string): Promise<number> {
  const loop = await attachLoop(dir, image);
  const mounted = await mountDevice(dir, loop.device, name);
  const text = readFileSync(`${mounted.path}/records`, 'latin1');
  await mounted.unmount();
  await loop.detach();
  const lines = text.split('\n');
  expect(lines.pop()).toBe('');
  lines.forEach((line, i) => expect(line).toBe(String(i).padStart(99, '0')));
  return lines.length;
}

requires({ ...LOOP_NEEDS, tools: [...(LOOP_NEEDS.tools ?? []), 'mkfs.ext4'] }).describe(
  'b2 watch on a mounted device',
  () => {
    it('captures what is written, and answers other shells meanwhile', async () => {
      const { device } = await newLoop(dir, 'disk', 64 * MIB);
      await makeFileSystem('ext4', device);
      const mounted = await mountDevice(dir, device, 'mounted');
      await initPlain();
      const watching = watch([device, '--volume', 'web/data', '--interval', '250ms']);
      const recorder = record(`${mounted.path}/records`);
      await watching.state(device, 'exact');
      const isPoint = (l: WatchLine): boolean => l.type === 'point';
      await watching.until('a point', isPoint, watching.lines.length);

      // A named point from another shell: not before it was asked for, and better than crash if the freeze fits.
      const askedNs = systemClock.nowNs();
      const snapshot = await b2.json<Snapshot>(['snapshot', 'data', '--name', 'mid', '--tag', 't']);
      expect(snapshot).toMatchObject({ watched: true, name: 'mid', volume: 'web/data' });
      expect(timeNs(snapshot.time) >= askedNs).toBe(true);
      expect(['fs', 'crash']).toContain(snapshot.class);
      const crash = await b2.json<Snapshot>(['snapshot', device, '--class', 'crash']);
      expect(crash).toMatchObject({ watched: true, class: 'crash' });
      const app = await b2.error(['snapshot', 'web/data', '--class', 'app']);
      expect(app.message).toMatch(/app/);

      const status = await b2.json<Status>(['status']);
      expect(status.watches).toHaveLength(1);
      expect(status.watches[0]).toMatchObject({ repository: b2.repository });
      expect(status.watches[0]?.devices).toMatchObject([
        { device, volume: 'web/data', state: expect.stringMatching(/exact|coalescing/) },
      ]);
      expect(status.volumes[0]?.watched?.device).toBe(device);
      const people = await b2.run('status');
      expect(people.stdout).toMatch(/WATCHED .*\n.*web\/data +(exact|coalescing)/);

      // What was captured a moment ago can be restored while the watch runs.
      const first = watching.lines.filter(isPoint)[2];
      await watching.until('time goes by', (l) => isPoint(l) && l['seq'] !== first?.['seq']);
      interface Restored {
        readonly point: { readonly seq: number; readonly time: string };
      }
      const early = dir.join('early.img');
      const past = await b2.json<Restored>(['restore', 'web/data', early, '--at', '1s ago']);
      const instantNs = timeNs(past.point.time);
      const held = await recordsIn(early, 'early');
      const { records } = recorder;
      expect(held).toBeGreaterThanOrEqual(records.filter((r) => r.ackedNs <= instantNs).length);
      expect(held).toBeLessThanOrEqual(records.filter((r) => r.issuedNs <= instantNs).length);

      const named = dir.join('named.img');
      await b2.json(['restore', 'web/data', named, '--at', 'mid']);
      const midNs = timeNs(snapshot.time);
      const mid = await recordsIn(named, 'named');
      expect(mid).toBeGreaterThanOrEqual(records.filter((r) => r.ackedNs <= midNs).length);
      expect(mid).toBeLessThanOrEqual(records.filter((r) => r.issuedNs <= midNs).length);

      // The end: everything acknowledged until the signal is in the last point.
      await recorder.stop();
      watching.kill('SIGTERM');
      const end = await watching.ended;
      expect(end.code, end.stderr).toBe(0);
      const answer = watching.lines.at(-1);
      expect(answer).toMatchObject({ type: 'ended', reason: 'SIGTERM', failed: [] });
      expect(readdirSync(dir.join('run')).filter((name) => name.endsWith('.sock'))).toEqual([]);
      const last = dir.join('last.img');
      await b2.json(['restore', 'web/data', last]);
      expect(await recordsIn(last, 'last')).toBe(records.length);

      // The next start goes on with the same volume.
      const more = record(`${mounted.path}/more`);
      const next = watch([device, '--volume', 'web/data', '--run-for', '3s']);
      const resumed = await next.ended;
      await more.stop();
      expect(resumed.code, resumed.stderr).toBe(0);
      const [ended] = next.lines.filter((l) => l.type === 'ended');
      expect(ended).toMatchObject({ reason: 'the time is up' });
      const seqs = (lines: readonly WatchLine[]): number[] =>
        lines.filter(isPoint).map((l) => Number(l['seq']));
      expect(Math.min(...seqs(next.lines))).toBeGreaterThan(Math.max(...seqs(watching.lines)));
      expect((await b2.run('verify')).code).toBe(0);
    });

    it('tells a service manager when it is ready, alive and at its end', async () => {
      const { device } = await newLoop(dir, 'disk', 16 * MIB);
      await initPlain();
      const socket = notifySocket(dir.join('notify'));
      try {
        const config = dir.join('config.yaml');
        writeFileSync(config, 'watch: {interval: 500ms}\n');
        const watching = watch([device], {
          NOTIFY_SOCKET: dir.join('notify'),
          WATCHDOG_USEC: '2000000',
          B2_CONFIG: config,
        });
        expect(await socket.waitFor('READY=1')).toBe('READY=1');
        expect(watching.lines.some((l) => l.type === 'state')).toBe(true);
        await socket.waitFor('WATCHDOG=1');
        await socket.waitFor('STATUS=');
        await watching.until('a point', (l) => l.type === 'point');

        // Somebody starts a second one: the first loses nothing.
        const held = await watchError(device);
        expect(held).toMatchObject({ code: 11 });
        expect(held.message).toMatch(/is watched already, by process \d+/);

        // Nobody writes, so there is no new point, and no lag either as long as the watch runs.
        await new Promise((resolve) => setTimeout(resolve, 1100));
        const checked = await b2.json<Verified>(['verify', '--max-lag', '1s']);
        expect(checked).toMatchObject({ lagging: [], volumes: [{ lagFrom: 'watch' }] });
        watching.kill('SIGHUP');
        await socket.waitFor('RELOADING=1');
        await watching.until('reloaded', (l) => /loaded again/.test(String(l['message'])));
        watching.kill('SIGTERM');
        await socket.waitFor('STOPPING=1');
        expect((await watching.ended).code).toBe(0);
        const said = socket.messages().map((lines) => lines[0]);
        const order = ['READY=1', 'RELOADING=1', 'READY=1', 'STOPPING=1'];
        expect(said.filter((line) => order.includes(line ?? ''))).toEqual(order);
        const late = await b2.json<Verified>(['verify', '--max-lag', '1ms'], 6);
        expect(late.volumes).toMatchObject([{ lagFrom: 'point' }]);
        expect(late.lagging).toEqual(late.volumes.map((v) => v.name));
      } finally {
        socket.close();
      }
    });
  },
);

/** An image file of `bytes` with something in it. */
function image(name: string, bytes = 4 * MIB): string {
  const file = dir.join(name);
  writeFileSync(file, noise(bytes, MIB));
  truncateSync(file, bytes);
  return file;
}

describe('b2 watch of a group', () => {
  it('makes points of one instant, and goes on with own ones while a device is missing', async () => {
    await initPlain();
    const [a, b] = [image('a.img', MIB), image('b.img', MIB)];
    const change = (file: string, byte: number): void => {
      const bytes = readFileSync(file);
      bytes.fill(byte, 8192, 12_288);
      writeFileSync(file, bytes, { flag: 'r+' });
    };
    const watching = watch([a, b, '--group', 'pair', '--source', 'scan', '--interval', '100ms']);
    const said = (text: string, from = 0): Promise<WatchLine> =>
      watching.until(text, (l) => String(l['message']).includes(text), from);
    await said('points are one instant of');
    const isShared = (device: string, l: WatchLine): boolean =>
      l.type === 'point' && l['device'] === device && l['group'] === 'pair';
    await watching.until('a point of both', (l) => isShared(a, l));
    change(b, 7);
    const line = await watching.until(
      'a point with the change',
      (l) => isShared(b, l) && Number(l['blocks']) > 0,
    );
    const other = await watching.until(
      'the same point of the other',
      (l) => isShared(a, l) && l['time'] === line['time'],
    );
    expect(other['blocks']).toBe(0);
    interface Points {
      readonly group?: { readonly name: string; readonly volumes: readonly string[] };
      readonly points: readonly { readonly seq: number; readonly group?: string }[];
    }
    const shownOf = async (file: string, seq: unknown): Promise<string | undefined> => {
      const points = (): Promise<Points> => b2.json<Points>(['points', file.replace(/^.*\//, '')]);
      let list = await points();
      // What a volume is of is written a moment after its first points.
      for (let tries = 0; list.group === undefined && tries < 100; tries++) list = await points();
      expect(list.group?.name).toBe('pair');
      return list.points.find((p) => p.seq === seq)?.group;
    };
    const id = `pair@${String(line['time'])}`;
    expect(await shownOf(b, line['seq'])).toBe(id);
    expect(await shownOf(a, other['seq'])).toBe(id);
    expect((await b2.run('points', 'a.img')).stdout).toMatch(/GROUP/);
    expect((await b2.run('status')).stdout).toContain('group pair: points are one instant of');

    // A snapshot of one of them names the point of both.
    interface Made {
      readonly id: string;
      readonly time: string;
      readonly group: {
        readonly name: string;
        readonly missing: readonly string[];
        readonly others: readonly { readonly id: string; readonly volume: string }[];
      };
    }
    change(a, 5);
    const made = await b2.json<Made>(['snapshot', a, '--name', 'both', '--class', 'crash']);
    expect(made.group).toMatchObject({
      name: 'pair',
      missing: [],
      others: [{ device: b, time: made.time, class: 'crash' }],
    });
    expect(made.group.others[0]?.volume).toMatch(/b\.img$/);
    const pinned = await b2.json<{
      snapshots: readonly { readonly name: string; readonly id: string; readonly time: string }[];
    }>(['snapshots']);
    expect(pinned.snapshots.map((s) => [s.name, s.id, s.time]).sort()).toEqual(
      [
        ['both', made.id, made.time],
        ['both', made.group.others[0]?.id, made.time],
      ].sort(),
    );
    const shown = await b2.run('snapshot', b, '--name', 'again', '--class', 'crash');
    expect([shown.code, shown.stdout]).toEqual([
      0,
      expect.stringMatching(/of the same instant and name: .*a\.img, point #\d+ \(group pair\)/),
    ]);

    const from = watching.lines.length;
    renameSync(b, `${b}.away`);
    await said('takes no part at present', from);
    change(a, 9);
    const own = await watching.until(
      'a point of its own',
      (l) => l.type === 'point' && l['device'] === a && Number(l['blocks']) > 0,
      from,
    );
    expect(own['group']).toBeUndefined();
    expect(await shownOf(a, own['seq'])).toBeUndefined();
    expect((await b2.run('status')).stdout).toMatch(/group pair: apart, because .*b\.img takes/);
    const alone = await b2.run('--json', 'snapshot', a, '--name', 'alone', '--class', 'crash');
    expect(alone.code).toBe(3);
    expect(JSON.parse(alone.stdout)).toMatchObject({ group: { missing: [b], others: [] } });
    expect(alone.stderr).toContain('has no point of this instant');
    const later = watching.lines.length;
    renameSync(`${b}.away`, b);
    await said('points are one instant of', later);
    await watching.until('a point of both again', (l) => isShared(b, l), later);
    watching.kill('SIGTERM');
    expect((await watching.ended).code).toBe(0);
  }, 60_000);

  requires(LOOP_NEEDS).it(
    'takes into a snapshot of an idle device what was just written to the other',
    async () => {
      await initPlain();
      const [a, b] = [await newLoop(dir, 'a.img', 8 * MIB), await newLoop(dir, 'b.img', 8 * MIB)];
      const watching = watch([a.device, b.device, '--group', 'pair', '--interval', '10s']);
      for (const { device } of [a, b])
        await watching.until(
          'a point of both',
          (l) => l['group'] === 'pair' && l['device'] === device,
        );
      for (const [i, bestClass] of [[], [], ['--class', 'crash'], ['--class', 'crash']].entries()) {
        pokeWithDd(b.device, 8192, noise(i, 4096));
        const made = await b2.json<{
          readonly group: { readonly others: readonly { readonly volume: string }[] };
        }>(['snapshot', a.device, '--name', `s${i}`, ...bestClass]);
        const [other] = made.group.others;
        const out = dir.join(`out${i}`);
        await b2.json(['restore', other?.volume ?? '', out, '--at', `s${i}`]);
        tool('cmp', [out, b.device]);
      }
      watching.kill('SIGTERM');
      expect((await watching.ended).code).toBe(0);
    },
    60_000,
  );

  it('forgets a device that was taken out: points of those that stayed are of the whole group', async () => {
    await initPlain();
    const files = [image('a.img', MIB), image('b.img', MIB), image('c.img', MIB)];
    interface Points {
      readonly group: { readonly name: string; readonly volumes: readonly string[] };
      readonly points: readonly { readonly seq: number; readonly group?: string }[];
    }
    const shared = async (devices: readonly string[]): Promise<Points> => {
      const options = ['--group', 'pair', '--source', 'scan', '--interval', '100ms'];
      const watching = watch([...devices, ...options]);
      const seen = (d: string, l: WatchLine): boolean => l['group'] === 'pair' && l['device'] === d;
      for (const d of devices) await watching.until(`a point of ${d}`, (l) => seen(d, l));
      // Each says what it is of a moment after its first points.
      const last = devices.at(-1) ?? '';
      let list = await b2.json<Partial<Points>>(['points', 'a.img']);
      for (let tries = 0; tries < 100; tries++) {
        list = await b2.json<Partial<Points>>(['points', 'a.img']);
        if (list.group?.volumes.length === devices.length - 1) break;
      }
      writeFileSync(last, noise(8192, MIB), { flag: 'r+' });
      await watching.until('the change', (l) => seen(last, l) && Number(l['blocks']) > 0);
      watching.kill('SIGTERM');
      expect((await watching.ended).code).toBe(0);
      return b2.json<Points>(['points', 'a.img']);
    };
    const before = await shared(files);
    expect(before.group.volumes).toHaveLength(2);
    const after = await shared(files.slice(0, 2));
    expect(after.group.volumes).toEqual([expect.stringMatching(/b\.img$/)]);
    const [newest] = after.points.slice(-1);
    expect(newest?.seq).toBeGreaterThan(before.points.at(-1)?.seq ?? Infinity);
    expect(newest?.group).toMatch(/^pair@/);
  }, 60_000);

  requires({ tools: ['tar', 'gzip'] }).it(
    'makes a group of disks that carry one volume group, unasked',
    async () => {
      await initPlain();
      tool('tar', ['-C', dir.path, '-xSzf', fixture('lvm-two-disks/disks.tar.gz')]);
      const [a, b, c] = [dir.join('a'), dir.join('b'), image('c.img', MIB)];
      const watching = watch([a, b, c, '--source', 'scan', '--interval', '200ms']);
      await watching.until('the notice', (l) =>
        String(l['message']).includes(
          `volume group twovg: on ${a}, ${b}, which share their points`,
        ),
      );
      const point = await watching.until('a point', (l) => l['group'] === 'twovg');
      const ofC = await watching.until(
        'a point of the third',
        (l) => l.type === 'point' && l['device'] === c,
      );
      expect(ofC['group']).toBeUndefined();
      await watching.until(
        'the point of the other disk',
        (l) =>
          l['group'] === 'twovg' && l['time'] === point['time'] && l['device'] !== point['device'],
      );
      expect((await b2.run('status')).stdout).toContain('group twovg: points are one instant of');
      watching.kill('SIGTERM');
      expect((await watching.ended).code).toBe(0);

      // A file of a striped volume, of which neither disk has more than half.
      const sums = readFileSync(fixture('lvm-two-disks/sums'), 'utf8');
      const [, wanted] = /^([0-9a-f]{64}) {2}striped\/late$/m.exec(sums) ?? [];
      const ended = await b2.run('cat', 'b:twovg/striped:/late');
      expect(createHash('sha256').update(ended.stdout).digest('hex')).toBe(wanted);
    },
    60_000,
  );
});

describe('b2 watch of image files', () => {
  it('takes devices, hooks and intervals from the configuration, and again at SIGHUP', async () => {
    const one = image('one.img');
    const two = image('two.img');
    const config = dir.join('config.yaml');
    const say = (text: string): void => writeFileSync(config, text);
    say(`watch:\n  source: scan\n  devices:\n    - {device: ${one}, volume: v/one}\n`);
    await initPlain();
    const env = { B2_CONFIG: config };
    const watching = watch([], env);
    await watching.state(one, 'exact');

    say(`watch: {devices: [${one}, {device: ${two}, volum: x}]}\n`);
    watching.kill('SIGHUP');
    const refused = await watching.until('a bad file', (l) =>
      /not loaded/.test(String(l['message'])),
    );
    expect(refused).toMatchObject({ type: 'log', priority: 'warning' });
    expect(refused['message']).toMatch(/unknown key "watch\.devices\[1\]\.volum"/);

    const from = watching.lines.length;
    say(
      `watch:\n  source: scan\n  pre-point: echo "$B2_VOLUME" >> ${dir.join('hook')}\n  devices:\n    - {device: ${one}, volume: v/one}\n    - {device: ${two}, volume: v/two}\n`,
    );
    watching.kill('SIGHUP');
    await watching.state(two, 'exact', from);
    expect(
      watching.lines.slice(from).filter((l) => l.type === 'state' && l['device'] === one),
    ).toEqual([]);
    const made = await b2.json<Snapshot>(['snapshot', two], 0, env);
    expect(made).toMatchObject({ watched: true, class: 'app', volume: 'v/two' });
    expect(readFileSync(dir.join('hook'), 'utf8')).toBe('v/two\n');

    say(`watch:\n  source: scan\n  devices: [{device: ${two}, volume: v/two}]\n`);
    watching.kill('SIGHUP');
    await watching.state(one, 'stopped', from);
    const status = await b2.json<Status>(['status'], 0, env);
    expect(status.watches[0]?.devices.map((d) => d.volume)).toEqual(['v/two']);
    watching.kill('SIGINT');
    expect((await watching.ended).code).toBe(130);
    expect(watching.lines.at(-1)).toMatchObject({ type: 'ended', reason: 'SIGINT' });
  });

  it('goes on when one device fails, and says so in its exit code', async () => {
    const good = image('good.img');
    mkdirSync(dir.join('no-device'));
    await initPlain();
    const watching = watch([good, dir.join('no-device'), '--source', 'scan']);
    await watching.state(good, 'exact');
    await watching.until('the failure', (l) => l.type === 'problem');
    watching.kill('SIGTERM');
    expect((await watching.ended).code).toBe(3);
    const alone = await b2.start(['--json', 'watch', dir.join('no-device')]).ended;
    expect(alone.code).toBe(1);
    expect(jsonLines(alone.stderr).at(-1)).toMatchObject({
      type: 'error',
      code: 1,
      message: expect.stringMatching(/no-device is a directory/),
    });
  });

  it('waits as a service for a device that is missing, and fails at once for a person', async () => {
    const late = dir.join('late.img');
    await initPlain();
    const error = await watchError(late);
    expect(error).toMatchObject({ code: 1 });
    expect(error.message).toContain(late);
    const socket = notifySocket(dir.join('notify'));
    try {
      const watching = watch([late, '--source', 'scan'], { NOTIFY_SOCKET: dir.join('notify') });
      await watching.state(late, 'absent');
      // The boot goes on without it.
      await socket.waitFor('READY=1');
      image('late.img');
      await watching.state(late, 'exact');
      watching.kill('SIGTERM');
      expect((await watching.ended).code).toBe(0);
    } finally {
      socket.close();
    }
  });

  it('refuses what cannot be meant', async () => {
    const errors: readonly [readonly string[], number, RegExp][] = [
      [['watch'], 2, /no device to watch/],
      [['watch', '/dev/a', '--source', 'dtrace'], 2, /none of auto/],
      [['watch', '/dev/a', '/dev/b', '--volume', 'x'], 2, /--volume/],
      [['watch', '/dev/a', '--interval', '1'], 2, /--interval/],
      [['watch', image('a.img')], 10, /no repository/],
    ];
    for (const [args, code, message] of errors) {
      const error: JsonError = await b2.error(args);
      expect(error.code, args.join(' ')).toBe(code);
      expect(error.message).toMatch(message);
    }
    await initPlain();
    const app = await b2.error(['snapshot', image('b.img'), '--class', 'app']);
    expect(app.message).toMatch(/no running watch captures/);
  });

  it('makes the default repository with a key once, and says where the key is', async () => {
    const file = image('disk.img');
    // Root's default places belong to the machine: as somebody else where the test is root.
    const isRoot = process.geteuid?.() === 0;
    const home = dir.join('home');
    const user = isRoot ? 65534 : undefined;
    if (user !== undefined) {
      for (const path of [dir.path, home, file]) chownSync(path, user, user);
    }
    const env = {
      PATH: process.env['PATH'],
      HOME: home,
      XDG_RUNTIME_DIR: dir.path,
      B2_CONFIG: '/dev/null',
    };
    const start = (
      ...args: readonly string[]
    ): { code: number; stdout: string; stderr: string } => {
      const out = { code: 0, stdout: '', stderr: '' };
      try {
        out.stdout = execFileSync(
          '/bin/sh',
          ['-c', 'exec "$@" 2> "$HOME/stderr"', 'sh', PROGRAM, ...args],
          { env, encoding: 'utf8', ...(user === undefined ? {} : { uid: user, gid: user }) },
        );
      } catch (error) {
        out.code = (error as { status: number }).status;
      }
      out.stderr = readFileSync(`${home}/stderr`, 'utf8');
      return out;
    };
    const args = ['watch', file, '--source', 'scan', '--run-for', '1s'];
    const first = start(...args);
    expect(first.code, first.stderr).toBe(0);
    const key = `${home}/.config/b2/repo.key`;
    expect(statSync(key).mode & 0o777).toBe(0o600);
    expect(first.stderr).toContain(key);
    expect(first.stderr).toMatch(/Copy .* to another machine now/);
    expect(first.stderr).not.toContain(readFileSync(key, 'utf8').trim().split('\n').at(-1));
    const content = readFileSync(key, 'utf8');
    const second = start(...args);
    expect(second.code, second.stderr).toBe(0);
    expect(second.stderr).not.toMatch(/Copy/);
    expect(readFileSync(key, 'utf8')).toBe(content);
    const points = start('--json', 'points', 'disk.img');
    expect(points.code, points.stderr).toBe(0);
    expect(existsSync(`${home}/.local/share/b2/repo/config`)).toBe(true);
  });
});
