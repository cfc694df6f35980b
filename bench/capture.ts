/**
 * Live capture: what reading block events costs, what watching costs the writers, how old points are, and whether they are exact.
 *
 *   npx tsc -p bench && sudo node node_modules/.cache/b2/bench/bench/capture.js [--seconds N] [--pause-us N] [--runs N] [--dir DIR]
 *
 * Needs root, gcc and loop devices. Raw writers (test/support/seqw.c) write 4 KiB blocks of a loop device around the page cache, in
 * alternating runs without and with a watch that commits to a repository beside it. Then one longer run whose every point is held
 * against the log of the writers. Ends with 1 if a point is not what its definition says, or an event was lost.
 */
import { execFileSync } from 'node:child_process';
import { closeSync, ftruncateSync, mkdtempSync, openSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import path from 'node:path';
import { fileURLToPath } from 'node:url';
import { parseArgs } from 'node:util';
import { IntervalCut } from '../src/capture/interval-cut.js';
import {
  LiveCapture,
  type CaptureSink,
  type CapturedPoint,
  type CaptureStatus,
} from '../src/capture/live-capture.js';
import { WriterSink } from '../src/capture/writer-sink.js';
import { systemClock, systemRandom } from '../src/clock.js';
import { openReadDevice } from '../src/devices/open.js';
import { blockEventLayout, parseEventFormat } from '../src/devices/trace/format.js';
import { EventRole, PageParser, type BlockEvent } from '../src/devices/trace/page.js';
import { TraceSource } from '../src/devices/trace/source.js';
import { currentIdentity } from '../src/process-identity.js';
import { Repository } from '../src/repo/repository.js';
import { openStore } from '../src/repo/store-url.js';
import { writeVolumeMeta } from '../src/repo/volume.js';
import { VolumeWriter } from '../src/repo/volume-writer.js';
import {
  VersionSink,
  compileWriters,
  judge,
  readWriteLog,
  runWriters,
} from '../test/support/raw-writers.js';

const MIB = 1024 * 1024;
const DEVICE_BYTES = 256 * MIB;
const BLOCKS = 8192;
const THREADS = 4;

function quantile(values: readonly number[], q: number): number {
  const sorted = [...values].sort((a, b) => a - b);
  return sorted[Math.min(sorted.length - 1, Math.floor(sorted.length * q))] ?? 0;
}

const cpuSeconds = (): number => {
  const { user, system } = process.cpuUsage();
  return (user + system) / 1e6;
};

/** Parses made-up pages into a cut: events per CPU second, nothing else of the machine involved. */
function parserRate(): number {
  const field = (name: string, offset: number, size: number): string =>
    `\tfield:${name};\toffset:${offset};\tsize:${size};\tsigned:0;\n`;
  const format = (name: string, id: number): string =>
    `name: ${name}\nID: ${id}\nformat:\n` +
    field('unsigned short common_type', 0, 2) +
    field('dev_t dev', 8, 4) +
    field('sector_t sector', 16, 8) +
    field('unsigned int nr_sector', 24, 4) +
    field('char rwbs[10]', 28, 10);
  const queue = blockEventLayout(parseEventFormat(format('q', 1), 'q'), 'q');
  const done = blockEventLayout(parseEventFormat(format('c', 2), 'c'), 'c');
  const parser = new PageParser(
    { commitAt: 8, dataAt: 16, pageBytes: 4096 },
    [
      { role: EventRole.issue, layout: queue },
      { role: EventRole.requestDone, layout: done },
    ],
    0n,
  );
  const cut = new IntervalCut(1 << 22);
  const record = 44;
  const perPage = Math.floor((4096 - 16) / (record + 4));
  let block = 1;
  const views = Array.from({ length: 2000 }, () => {
    const page = Buffer.alloc(4096);
    page.writeUInt32LE(perPage * (record + 4), 8);
    for (let i = 0; i < perPage; i++) {
      const at = 16 + i * (record + 4);
      if (i % 2 === 0) block = (Math.imul(block, 1_103_515_245) + 12_345) & 0xf_ffff;
      page.writeUInt32LE((1000 << 5) | (record / 4), at);
      page.writeUInt16LE(i % 2 === 0 ? 1 : 2, at + 4);
      page.writeBigUInt64LE(BigInt(block * 8), at + 4 + 16);
      page.writeUInt32LE(8, at + 4 + 24);
      page.write('WS', at + 4 + 28, 'latin1');
    }
    return new DataView(page.buffer, page.byteOffset, page.length);
  });
  const emit = (e: BlockEvent): void => {
    if (e.role === EventRole.issue) cut.issued(e.sector / 8, 1, e.atNs);
    else cut.completed(e.sector / 8, 1, e.atNs);
  };
  const began = cpuSeconds();
  let events = 0;
  for (let n = 0; n < 40_000; n++) {
    const view = views[n % views.length];
    if (view === undefined) break;
    view.setBigUint64(0, BigInt(n) * 100_000n, true);
    events += parser.parse(view, emit).events;
  }
  return events / (cpuSeconds() - began);
}

interface Watched {
  readonly points: readonly CapturedPoint[];
  readonly lags: readonly number[];
  readonly status: CaptureStatus;
  readonly cpu: number;
  readonly losses: number;
  readonly originNs: bigint;
}

async function watched(
  node: string,
  sink: CaptureSink,
  intervalMs: number,
  load: () => Promise<unknown>,
): Promise<Watched> {
  const device = await openReadDevice(node);
  const source = await TraceSource.open(device.facts);
  const points: CapturedPoint[] = [];
  const lags: number[] = [];
  const capture = LiveCapture.start({
    source,
    device,
    sink,
    clock: systemClock,
    intervalMs,
    onEvent: (e) => {
      if (e.type === 'point') points.push(e.point);
      else if (e.type === 'lost' || e.type === 'late') console.error(e);
    },
  });
  try {
    await capture.point();
    points.length = 0;
    const began = cpuSeconds();
    const sampler = setInterval(() => lags.push(capture.status().lagMs), 50);
    try {
      await load();
    } finally {
      clearInterval(sampler);
    }
    const cpu = cpuSeconds() - began;
    await capture.point();
    const status = capture.status();
    return { points, lags, status, cpu, losses: status.losses, originNs: source.originNs };
  } finally {
    await capture.stop();
    await source.close();
    await device.close();
  }
}

async function main(): Promise<void> {
  const { values } = parseArgs({
    options: {
      seconds: { type: 'string', default: '10' },
      'pause-us': { type: 'string', default: '1000' },
      runs: { type: 'string', default: '3' },
      dir: { type: 'string' },
    },
  });
  const seconds = Number(values.seconds);
  const pauseUs = Number(values['pause-us']);
  const dir = mkdtempSync(path.join(values.dir ?? tmpdir(), 'b2-bench-capture-'));
  let node: string | undefined;
  try {
    console.log(`parser and cut: ${(parserRate() / 1e6).toFixed(1)} million events per CPU second`);
    const root = fileURLToPath(new URL('../../../../../', import.meta.url));
    const writers = compileWriters(path.join(dir, 'seqw'), path.join(root, 'test/support/seqw.c'));
    const image = path.join(dir, 'disk.img');
    const fd = openSync(image, 'wx');
    ftruncateSync(fd, DEVICE_BYTES);
    closeSync(fd);
    node = execFileSync('losetup', ['--find', '--show', '--direct-io=on', image], {
      encoding: 'utf8',
    }).trim();
    const disk = node;
    const log = path.join(dir, 'writes.log');
    const load = async (length: number): Promise<number> =>
      readWriteLog(
        await runWriters(
          writers,
          disk,
          { threads: THREADS, blocks: BLOCKS, pauseUs, seconds: length },
          log,
        ),
      ).writes / length;

    const env = { clock: systemClock, random: systemRandom, owner: currentIdentity() };
    const repo = await Repository.init(
      await openStore(path.join(dir, 'repo'), { create: true }),
      { encryption: 'none', chunkBytes: 65_536, packBytes: 32 * MIB },
      undefined,
      env,
    );
    const volumeId = repo.newId();
    await writeVolumeMeta(repo, {
      id: volumeId,
      name: 'bench/disk',
      host: 'bench',
      createdNs: 1n,
      device: disk,
      sizeBytes: DEVICE_BYTES,
      logicalBlockBytes: 512,
      facts: {},
      updatedNs: 1n,
    });
    const sink = new WriterSink({
      open: async () => {
        const { writer, history } = await VolumeWriter.claim(repo, volumeId);
        await history.close();
        return writer;
      },
      facts: { source: 'trace' },
      warn: (error) => console.error(error.message),
    });
    let losses = 0;
    const without: number[] = [];
    const withWatch: number[] = [];
    await load(1);
    for (let run = 0; run < Number(values.runs); run++) {
      without.push(await load(seconds));
      let rate = 0;
      const w = await watched(disk, sink, 1000, async () => {
        rate = await load(seconds);
      });
      withWatch.push(rate);
      losses += w.losses;
      const writes = rate * seconds;
      const rounds = w.points.map((p) => p.rounds);
      console.log(
        `run ${run + 1}: ${without.at(-1)?.toFixed(0)} writes/s without, ${rate.toFixed(0)} with; ` +
          `${((w.cpu / writes) * 1e6).toFixed(1)} µs CPU of b2 for each write; ${w.points.length} points, rounds p50 ${quantile(rounds, 0.5)} max ${Math.max(...rounds)}, ` +
          `cut p50 ${quantile(
            w.points.map((p) => p.cutMs),
            0.5,
          ).toFixed(
            0,
          )} ms; busy ${w.status.busy}; lag p50 ${quantile(w.lags, 0.5).toFixed(0)} p99 ${quantile(w.lags, 0.99).toFixed(0)} max ${Math.max(...w.lags).toFixed(0)} ms`,
      );
    }
    await sink.close();
    await repo.close();
    const loss = 1 - quantile(withWatch, 0.5) / quantile(without, 0.5);
    console.log(
      `writes/s, median: ${quantile(without, 0.5).toFixed(0)} without, ${quantile(withWatch, 0.5).toFixed(0)} with: ${(loss * 100).toFixed(1)} % less`,
    );

    // The versions of the writers start anew with each run.
    execFileSync('blkdiscard', ['-f', '-z', disk], { stdio: 'pipe' });
    const versions = new VersionSink(DEVICE_BYTES, BLOCKS);
    const exact = await watched(disk, versions, 50, () => load(seconds * 2));
    losses += exact.losses;
    const { log: writes } = readWriteLog(log);
    const baseline = versions.points.length - exact.points.length;
    const verdict = judge(
      versions.points.slice(baseline).map((p, i) => ({
        versions: p.versions,
        instantNs: exact.originNs + BigInt(Math.round(exact.points[i]?.instantSourceNs ?? 0)),
      })),
      writes,
    );
    console.log(
      `exactness: ${JSON.stringify(verdict)}, rounds max ${Math.max(...exact.points.map((p) => p.rounds))}, busy ${exact.status.busy}`,
    );
    if (verdict.inconsistent > 0 || verdict.outside > 0 || losses > 0) process.exitCode = 1;
  } finally {
    if (node !== undefined) execFileSync('losetup', ['--detach', node]);
    rmSync(dir, { recursive: true, force: true });
  }
}

await main();
