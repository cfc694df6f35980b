/**
 * Points on real devices under real writers. Raw writers log when each write was issued and when it completed, so that every
 * point can be held against the definition; a naive capture of the same load is the control that must fail. Then ext4 under
 * SQLite, captured into a repository and restored from it.
 */
import { spawn } from 'node:child_process';
import { closeSync, openSync, readFileSync, writeFileSync, writeSync } from 'node:fs';
import path from 'node:path';
import { describe, expect } from 'vitest';
import {
  LiveCapture,
  type CaptureEvent,
  type CapturedPoint,
} from '../../src/capture/live-capture.js';
import { WriterSink } from '../../src/capture/writer-sink.js';
import { systemClock, systemRandom } from '../../src/clock.js';
import type { ChangeSink } from '../../src/devices/change-source.js';
import type { ReadDevice } from '../../src/devices/device.js';
import { openReadDevice } from '../../src/devices/open.js';
import { TRACEFS } from '../../src/devices/trace/instance.js';
import { TraceSource } from '../../src/devices/trace/source.js';
import { Coverage } from '../../src/format/commit.js';
import { alignedMemory } from '../../src/memory.js';
import { currentIdentity } from '../../src/process-identity.js';
import { VolumeHistory } from '../../src/repo/history.js';
import { openImage } from '../../src/repo/point.js';
import { Repository } from '../../src/repo/repository.js';
import { openStore } from '../../src/repo/store-url.js';
import { writeVolumeMeta } from '../../src/repo/volume.js';
import { VolumeWriter } from '../../src/repo/volume-writer.js';
import { DISK_NEEDS, addPartitions, tool } from '../support/disks.js';
import { attachLoop, makeFileSystem, mountDevice, newLoop } from '../support/loop.js';
import { testMeta } from '../support/model-volume.js';
import {
  VersionSink,
  compileWriters,
  judge,
  readWriteLog,
  runWriters,
  versionIn,
  type VersionsAt,
} from '../support/raw-writers.js';
import { requires, type Needs } from '../support/requires.js';
import { tempDir } from '../support/tmp.js';

const NEEDS: Needs = {
  ...DISK_NEEDS,
  root: true,
  tools: [...(DISK_NEEDS.tools ?? []), 'gcc'],
  paths: [TRACEFS, '/dev/loop-control'],
};
const BLOCK = 4096;
const SIZE = 32 * 1024 * 1024;
const WRITER_BLOCKS = 2048;

async function readAll(device: ReadDevice, bytes: number): Promise<Buffer> {
  const memory = alignedMemory(bytes);
  await device.read(memory, 0);
  return Buffer.from(memory);
}

/** Reads what has changed since the last time, once, and calls that a point. */
async function naiveCapture(device: ReadDevice, until: Promise<unknown>): Promise<VersionsAt[]> {
  const source = await TraceSource.open(device.facts);
  const points: VersionsAt[] = [];
  const versions = new Int32Array(WRITER_BLOCKS);
  let dirty = new Set<number>();
  const sink: ChangeSink = {
    issued: () => undefined,
    completed: (block, count) => {
      for (let b = block; b < block + count; b++) dirty.add(b);
    },
  };
  const buffer = alignedMemory(BLOCK);
  let over = false;
  void until.then(() => (over = true));
  try {
    while (!over) {
      await systemClock.sleep(30);
      await source.poll(sink);
      const now = dirty;
      dirty = new Set();
      for (const b of now) {
        await device.read(buffer, b * BLOCK);
        if (b < WRITER_BLOCKS) versions[b] = versionIn(buffer);
      }
      points.push({ instantNs: undefined, versions: versions.slice() });
    }
  } finally {
    await source.close();
  }
  return points;
}

describe('points of live capture', () => {
  for (const bed of [
    { name: 'a loop device', sectorBytes: 512, partition: false, pauseUs: 1500, least: 20 },
    {
      name: 'a loop device of 4096-byte sectors, writers without a pause',
      sectorBytes: 4096,
      partition: false,
      pauseUs: 0,
      least: 2,
    },
    { name: 'a partition', sectorBytes: 512, partition: true, pauseUs: 600, least: 10 },
  ] as const) {
    requires(NEEDS).it(
      `are what their definition says, on ${bed.name}`,
      async () => {
        await using dir = tempDir();
        const writers = compileWriters(dir.join('seqw'));
        const loop = await newLoop(dir, 'disk.img', SIZE, { sectorBytes: bed.sectorBytes });
        let node = loop.device;
        if (bed.partition) {
          tool('sfdisk', ['-q', loop.device], 'label: gpt\nstart=2056, size=40960\n');
          [node = ''] = addPartitions(dir, loop.device, 1);
        }
        const device = await openReadDevice(node);
        try {
          const source = await TraceSource.open(device.facts);
          const { originNs } = source;
          const sink = new VersionSink(device.facts.sizeBytes, WRITER_BLOCKS);
          const events: CaptureEvent[] = [];
          const captured: CapturedPoint[] = [];
          const capture = LiveCapture.start({
            source,
            device,
            sink,
            clock: systemClock,
            intervalMs: 40,
            attemptMs: 500,
            pollMs: 5,
            onEvent: (e) => {
              events.push(e);
              if (e.type === 'point') captured.push(e.point);
            },
          });
          let log = '';
          try {
            const first = await capture.point();
            expect(first.coverage).toBe(Coverage.unknown);
            const load = { threads: 4, blocks: WRITER_BLOCKS, pauseUs: bed.pauseUs, seconds: 4 };
            log = await runWriters(writers, node, load, dir.join('writes.log'));
            const last = await capture.point();
            expect(last.seq).toBe(captured.at(-1)?.seq);
          } finally {
            await capture.stop();
            await source.close();
          }
          const { log: writes, writes: count } = readWriteLog(log);
          expect(count).toBeGreaterThan(500);
          const points = sink.points.map((p, i): VersionsAt => ({
            versions: p.versions,
            instantNs: originNs + BigInt(Math.round(captured[i]?.instantSourceNs ?? 0)),
          }));
          expect(captured.map((p) => p.seq)).toEqual(sink.points.map((p) => p.seq));
          const verdict = judge(points, writes);
          const rounds = captured.map((p) => p.rounds);
          process.stderr.write(
            `${bed.name}: ${count} writes, ${JSON.stringify(verdict)}, rounds ${Math.min(...rounds)} to ${Math.max(...rounds)}, busy ${capture.status().busy}, cut ms ${captured.map((p) => Math.round(p.cutMs)).sort((a, b) => a - b)[Math.floor(captured.length / 2)]}\n`,
          );
          expect(verdict).toMatchObject({ inconsistent: 0, outside: 0 });
          // Writers without a pause outrun the reader: then there are few points, and what there is holds.
          expect(verdict.points).toBeGreaterThanOrEqual(bed.least);
          expect(
            events.filter((e) => e.type === 'lost' || e.type === 'late' || e.type === 'outage'),
          ).toEqual([]);
          // The last point is the device as it is now.
          expect(sink.image.equals(await readAll(device, device.facts.sizeBytes))).toBe(true);
        } finally {
          await device.close();
        }
      },
      60_000,
    );
  }

  requires(NEEDS).it(
    'would not be, had the blocks been read but once: the control',
    async () => {
      await using dir = tempDir();
      const writers = compileWriters(dir.join('seqw'));
      const loop = await newLoop(dir, 'disk.img', SIZE);
      const device = await openReadDevice(loop.device);
      try {
        const load = { threads: 4, blocks: WRITER_BLOCKS, pauseUs: 200, seconds: 3 };
        const running = runWriters(writers, loop.device, load, dir.join('writes.log'));
        const points = await naiveCapture(device, running);
        const { log } = readWriteLog(await running);
        const verdict = judge(points, log);
        process.stderr.write(`naive: ${JSON.stringify(verdict)}\n`);
        expect(verdict.inconsistent).toBeGreaterThan(0);
      } finally {
        await device.close();
      }
    },
    60_000,
  );
});

/** Commits transactions to a database in WAL mode and logs each acknowledged one outside the device. */
const SQLITE_WRITER = `
import sqlite3,sys,time,os,random
m,sec,logname=sys.argv[1],float(sys.argv[2]),sys.argv[3]
db=sqlite3.connect(m+'/t.db',isolation_level=None)
db.execute('pragma journal_mode='+sys.argv[4]); db.execute('pragma synchronous=full')
db.execute('create table if not exists t(id integer primary key autoincrement, a, b)'); db.execute('create index if not exists i on t(b)')
log=open(logname,'w'); end=time.time()+sec
while time.time()<end:
    db.execute('begin')
    for _ in range(random.randint(1,20)): db.execute('insert into t(a,b) values(?,?)',(os.urandom(random.randint(10,2000)),random.random()))
    mx=db.execute('select max(id) from t').fetchone()[0]; db.execute('delete from t where id<?',(mx-500,))
    db.execute('commit'); log.write('%d %d\\n'%(time.clock_gettime_ns(time.CLOCK_MONOTONIC),mx)); log.flush()
`;

describe('points in a repository', () => {
  requires({
    ...NEEDS,
    tools: [...(NEEDS.tools ?? []), 'mkfs.ext4', 'e2fsck', 'sqlite3', 'python3'],
  }).it(
    'hold a sound ext4 and a sound database with everything acknowledged before, restored through the image',
    async () => {
      await using dir = tempDir();
      const loop = await newLoop(dir, 'disk.img', 64 * 1024 * 1024);
      await makeFileSystem('ext4', loop.device);
      const mount = await mountDevice(dir, loop.device, 'mnt');
      const store = await openStore(dir.join('repo'), { create: true });
      const env = { clock: systemClock, random: systemRandom, owner: currentIdentity() };
      const repo = await Repository.init(
        store,
        { encryption: 'none', chunkBytes: 65_536, packBytes: 8 * 1024 * 1024 },
        undefined,
        env,
      );
      const volumeId = repo.newId();
      const device = await openReadDevice(loop.device);
      const meta = testMeta(volumeId, device.facts.sizeBytes);
      await writeVolumeMeta(repo, meta);
      const points: CapturedPoint[] = [];
      const troubles: CaptureEvent[] = [];
      let originNs = 0n;
      const logFile = dir.join('sqlite.log');
      await using sink = new WriterSink({
        open: async () => {
          const { writer, history } = await VolumeWriter.claim(repo, volumeId);
          await history.close();
          return writer;
        },
        facts: { source: 'trace' },
        warn: (error) => {
          throw error;
        },
      });
      try {
        const source = await TraceSource.open(device.facts);
        ({ originNs } = source);
        const capture = LiveCapture.start({
          source,
          device,
          sink,
          clock: systemClock,
          intervalMs: 200,
          stageBytes: 4 * 1024 * 1024,
          onEvent: (e) => {
            if (e.type === 'point') points.push(e.point);
            else if (e.type === 'lost' || e.type === 'late' || e.type === 'outage')
              troubles.push(e);
          },
        });
        try {
          await capture.point();
          writeFileSync(dir.join('writer.py'), SQLITE_WRITER);
          const writer = spawn(
            'python3',
            [dir.join('writer.py'), mount.path, '5', logFile, 'wal'],
            { stdio: ['ignore', 'ignore', 'inherit'] },
          );
          const code = await new Promise((resolve, reject) => {
            writer.on('error', reject);
            writer.on('exit', resolve);
          });
          expect(code).toBe(0);
          await capture.point();
        } finally {
          await capture.stop();
          await source.close();
        }
      } finally {
        await device.close();
      }
      await sink.close();
      await mount.unmount();
      expect(troubles).toEqual([]);
      expect(points.length).toBeGreaterThan(5);
      const acknowledged = readFileSync(logFile, 'utf8')
        .trim()
        .split('\n')
        .map((line) => {
          const [at = '', id = ''] = line.split(' ');
          return { at: BigInt(at), id: Number(id) };
        });
      // Every fourth point, and the last.
      const chosen = points.filter((_, i) => i % 4 === 1 || i === points.length - 1);
      for (const point of chosen) {
        const instant = originNs + BigInt(Math.round(point.instantSourceNs));
        const file = await restore(repo, meta, point.seq, dir.join(`point-${point.seq}.img`));
        const fsck = spawnSyncStatus('e2fsck', ['-fy', '-E', 'journal_only', file]);
        expect(fsck).toBeLessThanOrEqual(1);
        expect(spawnSyncStatus('e2fsck', ['-fn', file])).toBe(0);
        const needed = acknowledged.filter((a) => a.at < instant).at(-1)?.id ?? 0;
        const later = acknowledged.find((a) => a.at > instant)?.id ?? Number.POSITIVE_INFINITY;
        const copy = await attachLoop(dir, file);
        const mounted = await mountDevice(dir, copy.device, `point-${point.seq}`);
        try {
          if (needed > 0) {
            const said = tool('sqlite3', [
              path.join(mounted.path, 't.db'),
              'pragma integrity_check; select max(id) from t;',
            ]);
            const [integrity, newest] = said.trim().split('\n');
            expect(integrity).toBe('ok');
            expect(Number(newest)).toBeGreaterThanOrEqual(needed);
            expect(Number(newest)).toBeLessThanOrEqual(later);
          }
        } finally {
          await mounted.unmount();
          await copy.detach();
        }
      }
      process.stderr.write(
        `sqlite on ext4: ${points.length} points, ${chosen.length} checked, ${acknowledged.length} transactions\n`,
      );
      await repo.close();
    },
    120_000,
  );
});

function spawnSyncStatus(name: string, args: readonly string[]): number {
  try {
    tool(name, args);
    return 0;
  } catch (error) {
    return typeof error === 'object' &&
      error !== null &&
      'status' in error &&
      typeof error.status === 'number'
      ? error.status
      : -1;
  }
}

async function restore(
  repo: Repository,
  meta: ReturnType<typeof testMeta>,
  seq: number,
  file: string,
): Promise<string> {
  const history = await VolumeHistory.open(repo, meta.id);
  const fd = openSync(file, 'wx');
  try {
    history.refuseGap();
    const image = await openImage(history, meta, seq);
    const buffer = Buffer.alloc(1024 * 1024);
    for (let at = 0; at < image.sizeBytes; at += buffer.length) {
      const part = buffer.subarray(0, Math.min(buffer.length, image.sizeBytes - at));
      await image.read(part, at);
      writeSync(fd, part, 0, part.length, at);
    }
    await image.close();
  } finally {
    closeSync(fd);
    await history.close();
  }
  return file;
}
