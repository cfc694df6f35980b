/**
 * First scans, resyncs and groups on real devices: scanned in threads while raw writers go on, and held against the writers' log;
 * two devices under a writer that orders its writes across both.
 */
import { spawn } from 'node:child_process';
import { writeFileSync } from 'node:fs';
import { describe, expect } from 'vitest';
import { RunScanner } from '../../../src/capture/baseline.js';
import { commonInstants, PointGroup } from '../../../src/capture/group.js';
import {
  LiveCapture,
  type CaptureEvent,
  type CapturedPoint,
} from '../../../src/capture/live-capture.js';
import { WriterSink } from '../../../src/capture/writer-sink.js';
import { systemClock, systemRandom } from '../../../src/clock.js';
import type { ReadDevice } from '../../../src/devices/device.js';
import { openReadDevice } from '../../../src/devices/open.js';
import { TRACEFS } from '../../../src/devices/trace/instance.js';
import { TraceSource } from '../../../src/devices/trace/source.js';
import { alignedMemory } from '../../../src/memory.js';
import { currentIdentity } from '../../../src/process-identity.js';
import { VolumeHistory } from '../../../src/repo/history.js';
import { openImage } from '../../../src/repo/point.js';
import { Repository } from '../../../src/repo/repository.js';
import { openStore } from '../../../src/repo/store-url.js';
import { writeVolumeMeta } from '../../../src/repo/volume.js';
import { VolumeWriter } from '../../../src/repo/volume-writer.js';
import { DISK_NEEDS } from '../../support/disks.js';
import { scanned, sum, until } from '../../support/live-bed.js';
import { newLoop } from '../../support/loop.js';
import { testMeta } from '../../support/model-volume.js';
import {
  compileWriters,
  judge,
  readWriteLog,
  runWriters,
  versionIn,
} from '../../support/raw-writers.js';
import { requires, type Needs } from '../../support/requires.js';
import { tempDir, type TempDir } from '../../support/tmp.js';

const NEEDS: Needs = {
  ...DISK_NEEDS,
  root: true,
  tools: [...(DISK_NEEDS.tools ?? []), 'gcc', 'python3'],
  paths: [TRACEFS, '/dev/loop-control'],
};
const MIB = 1024 * 1024;
const BLOCK = 4096;
const WRITER_BLOCKS = 2048;

async function repositoryIn(dir: TempDir): Promise<{ repo: Repository; url: string }> {
  const url = dir.join('repo');
  const env = { clock: systemClock, random: systemRandom, owner: currentIdentity() };
  const repo = await Repository.init(
    await openStore(url, { create: true }),
    { encryption: 'none', chunkBytes: 65_536, packBytes: 8 * MIB },
    undefined,
    env,
  );
  return { repo, url };
}

async function volumeFor(repo: Repository, device: ReadDevice): Promise<string> {
  const id = repo.newId();
  await writeVolumeMeta(repo, testMeta(id, device.facts.sizeBytes, `host/${id.slice(0, 6)}`));
  return id;
}

function sinkFor(repo: Repository, url: string, volumeId: string, device: ReadDevice): WriterSink {
  const warn = (error: Error): void => {
    throw error;
  };
  return new WriterSink({
    open: async () => {
      const { writer, history } = await VolumeWriter.claim(repo, volumeId);
      await history.close();
      return writer;
    },
    facts: { source: 'trace' },
    warn,
    scanner: new RunScanner({
      repo,
      device,
      workers: 2,
      storeUrl: url,
      dedupeCacheFile: undefined,
      facts: { source: 'trace' },
      warn,
    }),
  });
}

/** The first `bytes` bytes of a volume at a commit. */
async function restored(
  repo: Repository,
  volumeId: string,
  seq: number,
  bytes: number,
): Promise<Buffer> {
  const history = await VolumeHistory.open(repo, volumeId);
  try {
    history.refuseGap();
    const image = await openImage(history, testMeta(volumeId, 0), seq);
    const all = Buffer.alloc(Math.min(bytes, image.sizeBytes));
    await image.read(all, 0);
    return all;
  } finally {
    await history.close();
  }
}

async function deviceBytes(device: ReadDevice): Promise<Buffer> {
  const memory = alignedMemory(device.facts.sizeBytes);
  await device.read(memory, 0);
  return Buffer.from(memory);
}

/** Fills a file with bytes of which half are alike. */
function fill(path: string, bytes: number): void {
  const data = Buffer.alloc(bytes);
  for (let at = 0; at < bytes; at += 65_536) {
    if ((at / 65_536) % 2 === 0) Buffer.from(systemRandom(65_536)).copy(data, at);
    else data.fill(`window ${at} `, at, Math.min(bytes, at + 65_536));
  }
  writeFileSync(path, data);
}

describe('a first scan and a resync of a busy device', () => {
  requires(NEEDS).it(
    'end in points that are what their definition says, and store only what differs',
    async () => {
      await using dir = tempDir();
      const writers = compileWriters(dir.join('seqw'));
      const size = 96 * MIB;
      const loop = await newLoop(dir, 'disk.img', size);
      // Behind the blocks of the writers.
      fill(dir.join('fill'), size - WRITER_BLOCKS * BLOCK);
      const filling = spawn('dd', [
        `if=${dir.join('fill')}`,
        `of=${loop.device}`,
        'bs=1M',
        `seek=${(WRITER_BLOCKS * BLOCK) / MIB}`,
        'oflag=direct',
        'status=none',
      ]);
      expect(await new Promise((resolve) => filling.on('exit', resolve))).toBe(0);
      const { repo, url } = await repositoryIn(dir);
      const device = await openReadDevice(loop.device);
      const volumeId = await volumeFor(repo, device);
      const events: CaptureEvent[] = [];
      const points: CapturedPoint[] = [];
      const start = async (): Promise<{
        capture: LiveCapture;
        stop: () => Promise<void>;
        originNs: bigint;
      }> => {
        const source = await TraceSource.open(device.facts);
        const sink = sinkFor(repo, url, volumeId, device);
        const capture = LiveCapture.start({
          source,
          device,
          sink,
          clock: systemClock,
          intervalMs: 150,
          attemptMs: 2000,
          pollMs: 5,
          scanBlocks: 8192,
          onEvent: (e) => {
            events.push(e);
            if (e.type === 'point') points.push(e.point);
          },
        });
        const stop = async (): Promise<void> => {
          await capture.stop();
          await sink.close();
          await source.close();
        };
        return { capture, stop, originNs: source.originNs };
      };
      const load = { threads: 3, blocks: WRITER_BLOCKS, pauseUs: 3000, seconds: 8 };
      const running = runWriters(writers, loop.device, load, dir.join('writes.log'));
      let isOver = false;
      void running.then(() => (isOver = true));
      const at: { seq: number; instantNs: bigint }[] = [];
      const take = (originNs: bigint): void => {
        for (const p of points.splice(0))
          at.push({ seq: p.seq, instantNs: originNs + BigInt(Math.round(p.instantSourceNs)) });
      };

      const first = await start();
      await first.capture.point();
      expect(scanned(events)).toBe(3);
      const baselineBytes = sum(events, 'storedBytes');
      expect(baselineBytes).toBeGreaterThan(30 * MIB);
      // On a machine that has much else to do the writers may have ended by now.
      await until(() => points.length >= 4 || isOver, 'points');
      // Track is lost, and then b2 itself.
      events.length = 0;
      first.capture.resync();
      await first.capture.point();
      expect(scanned(events)).toBe(3);
      // No more than the writers' blocks can differ.
      expect(sum(events, 'storedBytes')).toBeLessThan(1.1 * WRITER_BLOCKS * BLOCK);
      await first.stop();
      take(first.originNs);
      events.length = 0;

      const second = await start();
      await second.capture.point();
      expect(sum(events, 'storedBytes')).toBeLessThan(1.1 * WRITER_BLOCKS * BLOCK);
      expect(sum(events, 'readBytes')).toBeGreaterThan(size * 0.9);
      await running;
      const last = await second.capture.point();
      await second.stop();
      take(second.originNs);

      expect(
        events.filter((e) => e.type === 'lost' || e.type === 'late' || e.type === 'outage'),
      ).toEqual([]);
      const { log, writes } = readWriteLog(dir.join('writes.log'));
      const judged = [];
      for (const { seq, instantNs } of at) {
        const bytes = await restored(repo, volumeId, seq, WRITER_BLOCKS * BLOCK);
        const versions = Int32Array.from({ length: WRITER_BLOCKS }, (_, b) =>
          versionIn(bytes.subarray(b * BLOCK, (b + 1) * BLOCK)),
        );
        judged.push({ instantNs, versions });
      }
      const verdict = judge(judged, log);
      process.stderr.write(`scan of a busy device: ${writes} writes, ${JSON.stringify(verdict)}\n`);
      expect(verdict).toMatchObject({ inconsistent: 0, outside: 0 });
      expect(verdict.points).toBeGreaterThanOrEqual(3);
      const image = await restored(repo, volumeId, last.seq, size);
      expect(image.equals(await deviceBytes(device))).toBe(true);
      await device.close();
      await repo.close();
    },
    120_000,
  );
});

/** Writes record n to the first device, and when that is acknowledged to the second; 512 blocks of each in turn, until its input ends. */
const ORDERED_WRITER = `
import os,sys,mmap,select,struct
fds=[os.open(p,os.O_RDWR|os.O_DIRECT|os.O_DSYNC) for p in sys.argv[1:3]]
buf=mmap.mmap(-1,4096); n=0
while not select.select([0],[],[],0.0005)[0]:
    n+=1
    buf[:]=struct.pack('<Q',n)*512
    for fd in fds: os.pwritev(fd,[buf],(n%512)*4096)
print(n)
`;

/** Blocks in which a point is not what its device holds, each with the record in it. */
function differences(image: Buffer, device: Buffer): readonly string[] {
  const found = image.length === device.length ? [] : [`${image.length} of ${device.length} bytes`];
  for (let at = 0; at < image.length; at += BLOCK) {
    if (image.subarray(at, at + BLOCK).equals(device.subarray(at, at + BLOCK))) continue;
    found.push(
      `block ${at / BLOCK}: ${image.readBigUInt64LE(at)}, on the device ${device.readBigUInt64LE(at)}`,
    );
  }
  return found;
}

describe('a group of two devices', () => {
  requires(NEEDS).it(
    'never shows the second ahead of the first, where each record went to the first before',
    async () => {
      await using dir = tempDir();
      const { repo, url } = await repositoryIn(dir);
      const [a, b] = [await newLoop(dir, 'a.img', 24 * MIB), await newLoop(dir, 'b.img', 20 * MIB)];
      const devices = [await openReadDevice(a.device), await openReadDevice(b.device)];
      const volumes: string[] = [];
      const sinks: WriterSink[] = [];
      const sources: TraceSource[] = [];
      const captures: LiveCapture[] = [];
      const points: CapturedPoint[][] = [[], []];
      const troubles: CaptureEvent[] = [];
      const group = new PointGroup({
        name: 'pair',
        devices: devices.map((d) => d.facts.path),
        clock: systemClock,
      });
      for (const [i, device] of devices.entries()) {
        const volumeId = await volumeFor(repo, device);
        const sink = sinkFor(repo, url, volumeId, device);
        const source = await TraceSource.open(device.facts);
        volumes.push(volumeId);
        sinks.push(sink);
        sources.push(source);
        captures.push(
          LiveCapture.start({
            device,
            sink,
            source,
            clock: systemClock,
            intervalMs: 60,
            attemptMs: 2000,
            pollMs: 5,
            group: { of: group, device: device.facts.path },
            onEvent: (e) => {
              if (e.type === 'point') points[i]?.push(e.point);
              else if (e.type === 'lost' || e.type === 'late' || e.type === 'outage')
                troubles.push(e);
            },
          }),
        );
      }
      /** Sequence numbers on both, of each instant that both have. */
      const shared = (): (readonly [number, number])[] =>
        commonInstants(points.map((list) => list.map((p) => p.instantNs))).map((instant) => {
          const [onA, onB] = points.map((list) => list.find((p) => p.instantNs === instant)?.seq);
          return [onA ?? 0, onB ?? 0];
        });
      await until(() => group.look().isWhole, 'both to be read');
      writeFileSync(dir.join('writer.py'), ORDERED_WRITER);
      const writer = spawn('python3', [dir.join('writer.py'), a.device, b.device], {
        stdio: ['pipe', 'pipe', 'inherit'],
      });
      let said = '';
      writer.stdout.on('data', (text: Buffer) => (said += text.toString()));
      const exit = new Promise((resolve) => writer.on('exit', resolve));
      // However long that takes on a machine with much else to do.
      await until(() => shared().length >= 16 || writer.exitCode !== null, 'points under writes');
      writer.stdin.end();
      expect(await exit).toBe(0);
      const records = Number(said);
      const [last] = await Promise.all(captures.map((capture) => capture.point()));
      await until(() => shared().some(([seq]) => seq === last?.seq), 'the point of the other');
      await Promise.all(captures.map((capture) => capture.stop()));
      for (const source of sources) await source.close();
      for (const sink of sinks) await sink.close();
      expect(troubles).toEqual([]);
      expect(last?.group).toBe('pair');
      expect(shared().length).toBeGreaterThan(8);

      /** The newest record of a restored device, whose blocks must hold every record up to it. */
      const newest = (bytes: Buffer): number => {
        const held = Array.from({ length: 512 }, (_, i) =>
          Number(bytes.readBigUInt64LE(i * BLOCK)),
        );
        const max = Math.max(...held);
        for (let n = Math.max(1, max - 510); n <= max; n++) expect(held[n % 512]).toBe(n);
        return max;
      };
      let seen = 0;
      for (const seqs of shared()) {
        const [onA = 0, onB = 0] = await Promise.all(
          volumes.map(async (id, i) => newest(await restored(repo, id, seqs[i] ?? 0, 512 * BLOCK))),
        );
        expect(onB, `point ${seqs[0]}: ${onA} and ${onB}`).toBeLessThanOrEqual(onA);
        expect(onA - onB, `point ${seqs[0]}: ${onA} and ${onB}`).toBeLessThanOrEqual(1);
        if (onA > 0 && onA < records) seen++;
      }
      process.stderr.write(
        `group: ${records} records on both, ${shared().length} points, ${seen} in the middle\n`,
      );
      expect(seen).toBeGreaterThan(5);
      for (const [i, device] of devices.entries()) {
        const seq = shared().find(([seq]) => seq === last?.seq)?.[i] ?? 0;
        const image = await restored(repo, volumes[i] ?? '', seq, device.facts.sizeBytes);
        const now = await deviceBytes(device);
        await device.close();
        expect(differences(image, now), `device ${i}, point ${seq}, ${records} records`).toEqual(
          [],
        );
      }
      await repo.close();
    },
    120_000,
  );
});
