/**
 * Nothing acknowledged is lost: a program appends numbered records, each with fsync, and logs outside the disk when each was
 * acknowledged. A restore of any time T, while the watch goes on or later, has every record acknowledged before T less the lag that
 * the watch said at T, and none issued after T. And after a kill -9 the newest point has all up to its instant.
 */
import { rmSync } from 'node:fs';
import { describe, expect } from 'vitest';
import { systemClock } from '../../../src/clock.js';
import { TRACEFS } from '../../../src/devices/trace/instance.js';
import type { RestoreAnswer } from '../../../src/commands/run/restore.js';
import { B2 } from '../../support/b2.js';
import {
  LOOP_NEEDS,
  attachLoop,
  makeFileSystem,
  mountDevice,
  newLoop,
} from '../../support/loop.js';
import { requires } from '../../support/requires.js';
import { tempDir } from '../../support/tmp.js';
import {
  WORKLOAD_NEEDS,
  bounds,
  logOf,
  readAcknowledged,
  startWorkload,
} from '../../support/workload.js';
import { CHECK_TOOLS, newestRecord } from '../../support/workload-check.js';
import { Watching, nanoseconds, timeOf, type LagSample } from '../../support/workload-watch.js';

const MIB = 1024 * 1024;
const SECONDS = Number(process.env['B2_PROOF_SECONDS'] ?? 5);
const SAMPLES = process.env['B2_PROOF_SECONDS'] === undefined ? 5 : SECONDS;
const VOLUME = 'proof/records';
/** What the kernel has not told yet is not in the lag: the time between two polls of the source, on a busy machine. */
const POLL_SLACK_MS = 100;

describe('what a program was told is on the disk', () => {
  requires({
    ...LOOP_NEEDS,
    tools: [
      ...(LOOP_NEEDS.tools ?? []),
      ...(WORKLOAD_NEEDS.tools ?? []),
      ...CHECK_TOOLS,
      'mkfs.ext4',
    ],
    paths: [...(LOOP_NEEDS.paths ?? []), TRACEFS],
  }).it(
    'is in the restore of every later time, but for the lag that was reported then',
    async () => {
      await using dir = tempDir();
      const b2 = new B2(dir, { B2_RUNTIME_DIR: dir.join('run') });
      await b2.json(['init', '--encryption', 'none']);
      const loop = await newLoop(dir, 'disk', 48 * MIB);
      await makeFileSystem('ext4', loop.device);
      const mount = await mountDevice(dir, loop.device, 'mnt');
      const log = logOf(dir, 'disk', 'records');
      const watching = Watching.start(
        dir,
        b2,
        loop.device,
        '--volume',
        VOLUME,
        '--interval',
        '250ms',
      );
      await watching.ready(1);
      const faults: string[] = [];
      let looked = 0;
      /** Restores time `atNs` and holds it against the log; `lagNs` was reported then. */
      const look = async (atNs: bigint, lagNs: bigint): Promise<bigint> => {
        const file = dir.join(`at-${looked++}.img`);
        const { point } = await b2.json<RestoreAnswer>([
          'restore',
          VOLUME,
          file,
          '--at',
          timeOf(atNs),
          '--no-verify',
        ]);
        const instantNs = nanoseconds(point.time);
        const copy = await attachLoop(dir, file);
        const copyMount = await mountDevice(dir, copy.device, 'copy');
        const newest = newestRecord(copyMount.path);
        await copyMount.unmount();
        await copy.detach();
        rmSync(file);
        const acknowledged = readAcknowledged(log);
        const slackNs = BigInt(POLL_SLACK_MS) * 1_000_000n;
        const { least } = bounds(acknowledged, atNs - lagNs - slackNs);
        const { most } = bounds(acknowledged, atNs);
        const ofPoint = bounds(acknowledged, instantNs);
        const says = `point of ${point.time} for ${timeOf(atNs)} with a lag of ${lagNs / 1_000_000n} ms:`;
        if (instantNs > atNs) faults.push(`${says} it is later`);
        if (typeof newest === 'string') faults.push(`${says} ${newest}`);
        else {
          if (newest < least) faults.push(`${says} ${newest}, acknowledged ${least}`);
          if (newest > most) faults.push(`${says} ${newest}, written ${most}`);
          if (newest < ofPoint.least || newest > ofPoint.most)
            faults.push(
              `${says} ${newest}, of the instant ${ofPoint.least} to ${ofPoint.most}; ${JSON.stringify(acknowledged.filter((a) => Math.abs(a.number - newest) < 3).map((a) => [a.number, Number(a.issuedNs - instantNs) / 1e6, Number(a.ackedNs - instantNs) / 1e6]))}`,
            );
        }
        return instantNs;
      };

      const loads = [
        startWorkload(dir, 'records', mount.path, 'disk', 3),
        startWorkload(dir, 'fio', mount.path, 'disk', 10),
      ];
      const over = new AbortController();
      const sampling = watching.sampleLag(25, over.signal);
      let samples: LagSample[] = [];
      let whileWatchedNs = 0n;
      let restoredAtNs = 0n;
      try {
        await systemClock.sleep((SECONDS * 1000) / 2);
        // While the watch goes on: what was written a second ago.
        restoredAtNs = systemClock.nowNs() - 1_000_000_000n;
        whileWatchedNs = await look(restoredAtNs, 1_000_000_000n);
        await systemClock.sleep((SECONDS * 1000) / 2);
      } finally {
        over.abort();
        samples = await sampling;
        // A cut of everything at once: first the watch, then the writers.
        await watching.kill();
        for (const load of loads) await load.stop();
      }
      await mount.unmount();
      expect(restoredAtNs - whileWatchedNs).toBeLessThan(1_500_000_000n);
      expect(samples.length).toBeGreaterThan(SAMPLES);
      for (let k = 0; k < SAMPLES; k++) {
        const sample = samples[Math.floor(((k + 0.5) * samples.length) / SAMPLES)];
        if (sample !== undefined) await look(sample.atNs, BigInt(Math.round(sample.lagMs * 1e6)));
      }
      // The newest point after the kill: everything up to its instant, nothing later.
      const last = await look(systemClock.nowNs(), 1n << 62n);
      const acknowledged = readAcknowledged(log);
      const lags = samples.map((s) => s.lagMs).sort((a, b) => a - b);
      process.stderr.write(
        `acknowledged: ${acknowledged.length} records, ${looked} times restored, lag p50 ${lags[Math.floor(lags.length / 2)]?.toFixed(0)} max ${lags.at(-1)?.toFixed(0)} ms, last point ${Number((acknowledged.at(-1)?.ackedNs ?? last) - last) / 1e6} ms before the last record\n`,
      );
      expect(faults).toEqual([]);
      expect(acknowledged.length).toBeGreaterThan(50);
    },
    120_000 + SECONDS * 10_000,
  );
});
