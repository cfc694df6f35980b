/**
 * What `b2 watch` does to a machine, and how far it is behind: the built program beside fio and mixed loads on loop devices. Run by
 * watch.mjs (its usage is there). Ratios are what counts: absolute times are those of the machine.
 *
 * - `lag`: how old the newest durable point is, every 10 ms of a mixed load (database, random writes with fsync, git and tar on
 *   ext4), from the points themselves and as the watch reports it. Goal: p99 at most one second at the default interval.
 * - `cost`: IOPS and latency (median, mean, p99) of fio without the watch, with the kernel's tracing alone that nobody reads, and
 *   with the watch, in alternating runs, at a moderate rate and without a limit, and the CPU time of the watch. Ratios are those of a
 *   round, the median of all rounds: what is said of a loop device is worth little without its neighbour in time. A watch runs for
 *   months: like the device it is warm before it is measured. Goal: at most 5 % at the moderate rate.
 * - `events`: writers that go as fast as they can, more and more of them; ends where track is lost.
 * - `soak`: a heavy load for long: memory and file descriptors must be flat.
 */
import { execFile, execFileSync } from 'node:child_process';
import { readdirSync, readFileSync, writeFileSync } from 'node:fs';
import { cpus, tmpdir } from 'node:os';
import { parseArgs, promisify } from 'node:util';
import { systemClock } from '../src/clock.js';
import { openReadDevice } from '../src/devices/open.js';
import { TraceInstance } from '../src/devices/trace/instance.js';
import { watchedRange } from '../src/devices/trace/source.js';
import { B2 } from '../test/support/b2.js';
import {
  attachLoop,
  makeFileSystem,
  mountDevice,
  sparseFile,
  type Loop,
} from '../test/support/loop.js';
import { tempDir, type TempDir } from '../test/support/tmp.js';
import { startWorkload, type Load } from '../test/support/workload.js';
import { Watching, type LagSample } from '../test/support/workload-watch.js';

const MIB = 1024 * 1024;
const VOLUME = 'bench/disk';
const execute = promisify(execFile);

type Figures = Readonly<Record<string, number>>;

function quantile(values: readonly number[], q: number): number {
  const sorted = [...values].sort((a, b) => a - b);
  return sorted[Math.min(sorted.length - 1, Math.floor(sorted.length * q))] ?? Number.NaN;
}
const median = (values: readonly number[]): number => quantile(values, 0.5);
const fixed = (n: number, digits = 0): string => n.toFixed(digits);

/** User and system time of a process, in seconds; 100 ticks a second on every Linux there is. */
function cpuSeconds(pid: number): number {
  const stat = readFileSync(`/proc/${pid}/stat`, 'utf8');
  const fields = stat.slice(stat.lastIndexOf(')') + 2).split(' ');
  return (Number(fields[11]) + Number(fields[12])) / 100;
}

const residentMiB = (pid: number): number =>
  Number(/^VmRSS:\s+(\d+) kB$/m.exec(readFileSync(`/proc/${pid}/status`, 'utf8'))?.[1] ?? 0) / 1024;
const openFiles = (pid: number): number => readdirSync(`/proc/${pid}/fd`).length;

async function newRepository(dir: TempDir): Promise<B2> {
  const b2 = new B2(dir, { B2_PASSWORD: 'bench' });
  await b2.json(['init']);
  return b2;
}

async function watch(dir: TempDir, b2: B2, device: string, ...more: string[]): Promise<Watching> {
  const watching = Watching.start(dir, b2, device, '--volume', VOLUME, ...more);
  await watching.ready(1, 300_000);
  return watching;
}

interface Bed {
  readonly loop: Loop;
  readonly mount: string;
}

async function mountedDisk(dir: TempDir, mib: number): Promise<Bed> {
  const loop = await attachLoop(dir, sparseFile(dir, 'disk.img', mib * MIB));
  await makeFileSystem('ext4', loop.device);
  const mount = await mountDevice(dir, loop.device, 'mnt');
  return { loop, mount: mount.path };
}

function mixedLoad(dir: TempDir, mount: string, speed: number): Load[] {
  return [
    startWorkload(dir, 'sqlite', mount, 'bench', 10 / speed),
    startWorkload(dir, 'fio', mount, 'bench', 5 / speed),
    startWorkload(dir, 'files', mount, 'bench', 50 / speed),
  ];
}

async function stopAll(loads: readonly Load[]): Promise<void> {
  for (const load of loads) await load.stop();
}

/** At every 10 ms between the first and the last point: how old the instant of the newest point was that was durable then. */
function lagOfPoints(watching: Watching, fromNs: bigint, toNs: bigint): number[] {
  const durable = watching.points
    .map((p) => ({ instantNs: p.instantNs, atNs: p.instantNs + BigInt(Math.round(p.ageMs * 1e6)) }))
    .sort((a, b) => (a.atNs < b.atNs ? -1 : 1));
  const lags: number[] = [];
  let i = 0;
  for (let ns = fromNs; ns < toNs; ns += 10_000_000n) {
    while (i + 1 < durable.length && (durable[i + 1]?.atNs ?? ns) <= ns) i++;
    const newest = durable[i];
    if (newest !== undefined && newest.atNs <= ns) lags.push(Number(ns - newest.instantNs) / 1e6);
  }
  return lags;
}

async function lag(dir: TempDir, seconds: number): Promise<Figures> {
  const bed = await mountedDisk(dir, 512);
  const b2 = await newRepository(dir);
  const watching = await watch(dir, b2, bed.loop.device);
  const loads = mixedLoad(dir, bed.mount, 1);
  const over = new AbortController();
  let samples: LagSample[] = [];
  let lags: number[] = [];
  let cpu = 0;
  try {
    await systemClock.sleep(3000);
    const sampling = watching.sampleLag(100, over.signal);
    const fromNs = systemClock.nowNs();
    const cpuBefore = cpuSeconds(watching.pid);
    await systemClock.sleep(seconds * 1000);
    cpu = cpuSeconds(watching.pid) - cpuBefore;
    const toNs = systemClock.nowNs();
    over.abort();
    samples = await sampling;
    lags = lagOfPoints(watching, fromNs, toNs);
  } finally {
    over.abort();
    await stopAll(loads);
  }
  await watching.point(VOLUME, 'crash');
  await watching.stop();
  const said = samples.map((s) => s.lagMs);
  const captured = watching.points.reduce((n, p) => n + p.blocks * 4096, 0);
  return {
    points: watching.points.length,
    coalesced: watching.points.filter((p) => p.coverage !== 'exact').length,
    'lag p50 ms': quantile(lags, 0.5),
    'lag p99 ms': quantile(lags, 0.99),
    'lag max ms': Math.max(...lags),
    'reported p50 ms': quantile(said, 0.5),
    'reported p99 ms': quantile(said, 0.99),
    'reported max ms': Math.max(...said),
    'captured MiB/s': captured / MIB / seconds,
    'CPU %': (cpu / seconds) * 100,
    problems: watching.troubles.length,
  };
}

interface FioRun {
  readonly iops: number;
  readonly meanUs: number;
  readonly p50Us: number;
  readonly p99Us: number;
  readonly writes: number;
}

/** 4 KiB random writes around the page cache on the device itself. */
async function fio(
  device: string,
  seconds: number,
  rate: number,
  jobs: number,
  depth: number,
): Promise<FioRun> {
  const { stdout } = await execute(
    'fio',
    [
      '--name=x',
      '--thread=1',
      `--filename=${device}`,
      '--rw=randwrite',
      '--bs=4k',
      '--ioengine=libaio',
      `--iodepth=${depth}`,
      `--numjobs=${jobs}`,
      '--group_reporting=1',
      '--direct=1',
      '--norandommap=1',
      '--randrepeat=0',
      '--time_based',
      `--runtime=${seconds}`,
      ...(rate === 0 ? [] : [`--rate_iops=${Math.round(rate / jobs)}`]),
      '--output-format=json',
    ],
    { maxBuffer: 2 ** 26 },
  );
  const parsed = JSON.parse(stdout.slice(stdout.indexOf('{'))) as {
    jobs: readonly {
      write: {
        iops: number;
        total_ios: number;
        clat_ns: { mean: number; percentile?: Record<string, number> };
      };
    }[];
  };
  const write = parsed.jobs[0]?.write;
  if (write === undefined) throw new Error('fio told nothing');
  return {
    iops: write.iops,
    meanUs: write.clat_ns.mean / 1000,
    p50Us: (write.clat_ns.percentile?.['50.000000'] ?? 0) / 1000,
    p99Us: (write.clat_ns.percentile?.['99.000000'] ?? 0) / 1000,
    writes: write.total_ios,
  };
}

/** The events that a watch has recorded, recorded with nobody to read them. `end` it. */
async function traceOnly(device: string): Promise<{ end(): Promise<void> }> {
  const facts = await openReadDevice(device).then(async (d) => {
    await d.close();
    return d.facts;
  });
  const { kernelDevice } = await watchedRange(facts);
  const instance = await TraceInstance.create({
    kernelDevice,
    originNs: systemClock.monotonicNs(),
  });
  return { end: () => instance.remove() };
}

const WARM_SECONDS = 6;
const MODES = ['without', 'traced', 'with'] as const;
type Mode = (typeof MODES)[number];

async function cost(dir: TempDir, seconds: number, rounds: number, rate: number): Promise<Figures> {
  const loop = await attachLoop(dir, sparseFile(dir, 'disk.img', 256 * MIB));
  const { device } = loop;
  const b2 = await newRepository(dir);
  await fio(device, 4, 0, 1, 4);
  const runs: Readonly<Record<Mode, FioRun[]>> = { without: [], traced: [], with: [] };
  let cpu = 0;
  let captured = 0;
  const measure = async (mode: Mode): Promise<void> => {
    runs[mode].push(await fio(device, seconds, rate, 1, 4));
  };
  const once: Readonly<Record<Mode, () => Promise<void>>> = {
    without: async () => {
      await fio(device, 1, rate, 1, 4);
      await measure('without');
    },
    traced: async () => {
      const trace = await traceOnly(device);
      try {
        await fio(device, 1, rate, 1, 4);
        await measure('traced');
      } finally {
        await trace.end();
      }
    },
    with: async () => {
      const watching = await watch(dir, b2, device);
      await fio(device, WARM_SECONDS, rate === 0 ? 1000 : rate, 1, 4);
      await watching.point(VOLUME, 'crash');
      const before = watching.points.length;
      const cpuBefore = cpuSeconds(watching.pid);
      await measure('with');
      // What is left to capture costs as well.
      await watching.point(VOLUME, 'crash');
      cpu += cpuSeconds(watching.pid) - cpuBefore;
      captured += watching.points.slice(before).reduce((n, p) => n + p.blocks * 4096, 0);
      const { devices } = await watching.status();
      if ((devices[0]?.losses ?? 0) > 0) throw new Error('track was lost');
      await watching.stop();
    },
  };
  for (let round = 0; round < rounds; round++)
    // None is always the first.
    for (let k = 0; k < MODES.length; k++) await once[MODES[(round + k) % 3] ?? 'without']();
  const writes = runs.with.reduce((n, r) => n + r.writes, 0);
  const ratio = (mode: Mode, of: (run: FioRun) => number): number =>
    median(
      runs[mode].map((run, i) => {
        const beside = runs.without[i];
        return beside === undefined ? Number.NaN : of(run) / of(beside);
      }),
    );
  const micros = (name: string, of: (run: FioRun) => number): Record<string, number> => ({
    [`${name} µs without`]: median(runs.without.map(of)),
    [`${name} µs traced`]: median(runs.traced.map(of)),
    [`${name} µs with`]: median(runs.with.map(of)),
    [`${name} ratio traced`]: ratio('traced', of),
    [`${name} ratio`]: ratio('with', of),
  });
  return {
    'IOPS without': median(runs.without.map((r) => r.iops)),
    'IOPS with': median(runs.with.map((r) => r.iops)),
    'IOPS ratio': ratio('with', (r) => r.iops),
    ...micros('p50', (r) => r.p50Us),
    ...micros('latency', (r) => r.meanUs),
    ...micros('p99', (r) => r.p99Us),
    'CPU s per GiB captured': cpu / (captured / 1024 ** 3),
    // A write is an issue and a completion.
    'CPU s per million events': cpu / ((writes * 2) / 1e6),
  };
}

async function events(dir: TempDir, seconds: number): Promise<Figures> {
  // Memory: nothing is to slow the writers down.
  await using memory = tempDir('/dev/shm');
  const loop = await attachLoop(memory, sparseFile(memory, 'disk.img', 256 * MIB));
  const b2 = await newRepository(dir);
  const watching = await watch(dir, b2, loop.device);
  let best = 0;
  let lossAt = 0;
  for (const [jobs, depth] of [
    [1, 1],
    [1, 32],
    [2, 32],
    [4, 64],
    [8, 128],
  ] as const) {
    const run = await fio(loop.device, seconds, 0, jobs, depth);
    const { devices } = await watching.status();
    const losses = devices[0]?.losses ?? 0;
    console.log(`  ${jobs} × ${depth}: ${fixed(run.iops)} writes/s, ${losses} losses`);
    if (losses > 0) {
      lossAt = run.iops * 2;
      break;
    }
    best = Math.max(best, run.iops * 2);
  }
  await watching.stop();
  return { 'events/s without loss': best, 'events/s with loss': lossAt };
}

async function soak(dir: TempDir, minutes: number): Promise<Figures> {
  const bed = await mountedDisk(dir, 512);
  const b2 = await newRepository(dir);
  const watching = await watch(
    dir,
    b2,
    bed.loop.device,
    '--interval',
    '200ms',
    '--freeze-limit',
    '1s',
  );
  const loads = mixedLoad(dir, bed.mount, 2);
  const memory: number[] = [];
  const files: number[] = [];
  const lags: number[] = [];
  let snapshots = 0;
  let refused = 0;
  try {
    const endNs = systemClock.monotonicNs() + BigInt(Math.round(minutes * 60)) * 1_000_000_000n;
    for (let n = 0; systemClock.monotonicNs() < endNs; n++) {
      await systemClock.sleep(2000);
      memory.push(residentMiB(watching.pid));
      files.push(openFiles(watching.pid));
      lags.push((await watching.status()).devices[0]?.lagMs ?? 0);
      if (n % 15 === 14) {
        // The helper that freezes comes and goes; a limit that is not kept is a refusal, not a fault.
        await watching.point(VOLUME, 'fs').then(
          () => snapshots++,
          () => refused++,
        );
      }
    }
  } finally {
    await stopAll(loads);
  }
  // Let the helper that freezes go: it is kept for a minute.
  await watching.stop();
  const quarter = (values: readonly number[], k: number): readonly number[] =>
    values.slice(Math.floor((values.length * (k - 1)) / 4), Math.floor((values.length * k) / 4));
  return {
    minutes,
    points: watching.points.length,
    'frozen snapshots': snapshots,
    'refused snapshots': refused,
    problems: watching.troubles.length,
    'memory MiB, 2nd quarter': median(quarter(memory, 2)),
    'memory MiB, last quarter': median(quarter(memory, 4)),
    'memory MiB max': Math.max(...memory),
    'open files, 2nd quarter': median(quarter(files, 2)),
    'open files, last quarter': median(quarter(files, 4)),
    'open files max': Math.max(...files),
    'lag p99 ms': quantile(lags, 0.99),
  };
}

/** What is not as it should be; empty where there is no goal. */
function missed(name: string, f: Figures): string[] {
  const goals: Readonly<Record<string, readonly (readonly [string, boolean])[]>> = {
    lag: [
      ['p99 of the lag at most 1000 ms', (f['lag p99 ms'] ?? Infinity) <= 1000],
      ['no problems', f['problems'] === 0],
    ],
    'cost, moderate': [
      ['at least 95 % of the IOPS', (f['IOPS ratio'] ?? 0) >= 0.95],
      ['at most 105 % of the median latency', (f['p50 ratio'] ?? Infinity) <= 1.05],
      ['at most 105 % of the mean latency', (f['latency ratio'] ?? Infinity) <= 1.05],
    ],
    soak: [
      [
        'memory in the last quarter at most 10 % more than in the second',
        (f['memory MiB, last quarter'] ?? Infinity) <= (f['memory MiB, 2nd quarter'] ?? 0) * 1.1,
      ],
      [
        'no more open files in the last quarter than in the second',
        (f['open files, last quarter'] ?? Infinity) <= (f['open files, 2nd quarter'] ?? 0),
      ],
      ['no problems', f['problems'] === 0],
    ],
  };
  return (goals[name] ?? []).filter(([, isMet]) => !isMet).map(([goal]) => goal);
}

async function main(): Promise<void> {
  const { values, positionals } = parseArgs({
    allowPositionals: true,
    options: {
      seconds: { type: 'string' },
      rounds: { type: 'string', default: '5' },
      minutes: { type: 'string', default: '20' },
      rate: { type: 'string', default: '1000' },
      dir: { type: 'string' },
      json: { type: 'string' },
    },
  });
  const known = ['lag', 'cost', 'events', 'soak'];
  const [what = 'all'] = positionals;
  const wanted = what === 'all' ? known : [what];
  if (!known.includes(wanted[0] ?? '')) throw new Error(`one of: all, ${known.join(', ')}`);
  const seconds = values.seconds === undefined ? undefined : Number(values.seconds);
  const rounds = Number(values.rounds);
  const runs: [string, (dir: TempDir) => Promise<Figures>][] = [];
  if (wanted.includes('lag')) runs.push(['lag', (dir) => lag(dir, seconds ?? 600)]);
  if (wanted.includes('cost')) {
    const rate = Number(values.rate);
    runs.push(['cost, moderate', (dir) => cost(dir, seconds ?? 20, rounds, rate)]);
    runs.push(['cost, no limit', (dir) => cost(dir, seconds ?? 20, rounds, 0)]);
  }
  if (wanted.includes('events')) runs.push(['events', (dir) => events(dir, seconds ?? 10)]);
  if (wanted.includes('soak')) runs.push(['soak', (dir) => soak(dir, Number(values.minutes))]);
  console.log(
    `${cpus().length} × ${cpus()[0]?.model ?? 'CPU'}, Linux ${execFileSync('uname', ['-r'], { encoding: 'utf8' }).trim()}, node ${process.version}`,
  );
  const all: Record<string, Figures> = {};
  for (const [name, run] of runs) {
    console.log(`\n${name}`);
    await using dir = tempDir(values.dir ?? tmpdir());
    const figures = await run(dir);
    all[name] = figures;
    for (const [label, value] of Object.entries(figures))
      console.log(`  ${label.padEnd(28)}${fixed(value, Math.abs(value) < 10 ? 3 : 0)}`);
    for (const goal of missed(name, figures)) {
      console.log(`  GOAL MISSED: ${goal}`);
      process.exitCode = 1;
    }
  }
  if (values.json !== undefined) writeFileSync(values.json, `${JSON.stringify(all, null, 2)}\n`);
}

await main();
