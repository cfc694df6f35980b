/**
 * kill -9 of `b2 watch` at random moments under load: in its start, in its first scan, in a resync, between points, in a freeze. After each
 * the writers must go on (nothing stays frozen), the next start must reach exact points again, and the point it makes while the
 * file system is frozen must restore to the device bit for bit. Ten kills; `B2_PROOF_KILLS=100` kills so often.
 */
import { execFileSync } from 'node:child_process';
import { rmSync } from 'node:fs';
import { describe, expect } from 'vitest';
import { systemClock } from '../../../src/clock.js';
import { TRACEFS } from '../../../src/devices/trace/instance.js';
import { B2 } from '../../support/b2.js';
import { dice } from '../../support/disks.js';
import {
  freezeMount,
  LOOP_NEEDS,
  makeFileSystem,
  mountDevice,
  newLoop,
} from '../../support/loop.js';
import { findTool, requires } from '../../support/requires.js';
import { tempDir } from '../../support/tmp.js';
import { WORKLOAD_NEEDS, logOf, readAcknowledged, startWorkload } from '../../support/workload.js';
import { CHECK_TOOLS } from '../../support/workload-check.js';
import { Watching } from '../../support/workload-watch.js';

const MIB = 1024 * 1024;
const KILLS = Number(process.env['B2_PROOF_KILLS'] ?? 10);
const SEED = Number(process.env['B2_PROOF_SEED'] ?? 20_261_122);
/** Starts take about so long on a machine that is busy. */
const START_MS = 1500;
const VOLUME = 'proof/survival';

function run(name: string, ...args: string[]): void {
  execFileSync(findTool(name) ?? name, args, { stdio: 'pipe' });
}

describe('b2 watch that is killed', () => {
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
    'is exact again after the next start, has lost nothing it had acknowledged, and leaves nothing frozen',
    async () => {
      const die = dice(SEED);
      await using dir = tempDir();
      const b2 = new B2(dir, { B2_RUNTIME_DIR: dir.join('run') });
      await b2.json(['init', '--encryption', 'none']);
      const loop = await newLoop(dir, 'disk', 48 * MIB);
      await makeFileSystem('ext4', loop.device);
      const mount = await mountDevice(dir, loop.device, 'mnt');
      const loads = [
        startWorkload(dir, 'records', mount.path, 'disk', 4),
        startWorkload(dir, 'fio', mount.path, 'disk', 5),
      ];
      const log = logOf(dir, 'disk', 'records');
      const watch = (): Watching =>
        Watching.start(dir, b2, loop.device, '--volume', VOLUME, '--interval', '100ms');
      const counts = { starting: 0, running: 0, freezing: 0 };
      let lastSeq = 0;
      let restores = 0;
      try {
        for (let kills = 0; kills < KILLS; kills++) {
          const watching = watch();
          if (die(10) < 4) {
            await systemClock.sleep(die(START_MS));
            await watching.kill();
            counts.starting++;
          } else {
            await watching.ready(1);
            const copy = dir.join('frozen');
            let seq: number;
            await freezeMount(mount.path);
            try {
              ({ seq } = (await watching.point(VOLUME, 'crash')).point);
              run('cp', '--sparse=always', loop.file, copy);
            } finally {
              run('fsfreeze', '--unfreeze', mount.path);
            }
            expect(seq).toBeGreaterThan(lastSeq);
            lastSeq = seq;
            await systemClock.sleep(die(600));
            const isFreezing = die(2) === 0;
            if (isFreezing) {
              const frozen = watching.point(VOLUME, 'fs').catch(() => undefined);
              await systemClock.sleep(die(60));
              await watching.kill();
              await frozen;
              counts.freezing++;
            } else {
              await watching.kill();
              counts.running++;
            }
            const restored = dir.join('restored');
            await b2.json(['restore', VOLUME, restored, '--at', `#${seq}`, '--no-verify']);
            run('cmp', restored, copy);
            rmSync(restored);
            rmSync(copy);
            restores++;
          }
          // Nothing stays frozen: the writer of records goes on.
          const before = readAcknowledged(log).length;
          for (let waited = 0; readAcknowledged(log).length === before; waited += 20) {
            expect(waited, 'milliseconds without a write after a kill').toBeLessThan(10_000);
            await systemClock.sleep(20);
          }
        }
        // The last start of all ends well, and the whole repository is sound.
        const watching = watch();
        await watching.ready(1);
        await watching.stop();
      } finally {
        for (const load of loads) await load.stop();
      }
      await b2.json(['verify', '--data', 'all']);
      process.stderr.write(
        `survival: killed ${counts.starting} times while starting, ${counts.running} while exact, ${counts.freezing} while freezing; ${restores} bit-exact restores\n`,
      );
      expect(counts.starting + counts.running + counts.freezing).toBe(KILLS);
      expect(restores).toBeGreaterThan(0);
    },
    120_000 + KILLS * 30_000,
  );
});
