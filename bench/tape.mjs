#!/usr/bin/env node
// How fast an export writes to a stand-in for a tape, beside `tar -b 512` of the same packs to the same file system. In turn, both to
// durable files; medians of the ratios of the rounds. Read back is off: tar does not read back either.
//
//   usage: node bench/tape.mjs [--mib 1024] [--rounds 3] [--encryption aes256|none] [--dir DIR]
import { execFileSync } from 'node:child_process';
import {
  closeSync,
  fsyncSync,
  mkdirSync,
  mkdtempSync,
  openSync,
  rmSync,
  statSync,
  writeSync,
} from 'node:fs';
import { loadavg, tmpdir } from 'node:os';
import { join } from 'node:path';
import { randomBytes } from 'node:crypto';
import { fileURLToPath } from 'node:url';
import { parseArgs } from 'node:util';

const { values } = parseArgs({
  options: {
    mib: { type: 'string', default: '1024' },
    rounds: { type: 'string', default: '3' },
    encryption: { type: 'string', default: 'aes256' },
    dir: { type: 'string', default: tmpdir() },
  },
});
const program = fileURLToPath(new URL('../bin/b2', import.meta.url));
const dir = mkdtempSync(join(values.dir, 'b2-bench-tape-'));
const env = {
  ...process.env,
  B2_REPOSITORY: join(dir, 'repo'),
  B2_PASSWORD: 'bench',
  B2_CONFIG: '/dev/null',
  B2_CACHE_DIR: join(dir, 'cache'),
};
const b2 = (...args) =>
  JSON.parse(
    execFileSync(program, ['--json', ...args], {
      env,
      stdio: ['ignore', 'pipe', 'pipe'],
      maxBuffer: 1 << 28,
    }),
  );
const seconds = (work) => {
  const from = process.hrtime.bigint();
  work();
  return Number(process.hrtime.bigint() - from) / 1e9;
};
const median = (list) => list.toSorted((a, b) => a - b)[Math.floor(list.length / 2)];

try {
  b2('init', '--encryption', values.encryption);
  // Half of it random, half of it compressible: what packs hold is random either way.
  const image = join(dir, 'image');
  const fd = openSync(image, 'w');
  for (let i = 0; i < Number(values.mib); i++) {
    const block = randomBytes(1 << 20);
    if (i % 2 === 1) for (let at = 0; at < block.length; at += 64) block.fill(i, at, at + 40);
    writeSync(fd, block);
  }
  fsyncSync(fd);
  closeSync(fd);
  b2('snapshot', image, '--volume', 'bench');
  const rounds = [];
  for (let round = 0; round < Number(values.rounds); round++) {
    const tape = join(dir, `tape-${round}`);
    const archive = join(dir, `archive-${round}.tar`);
    mkdirSync(tape);
    let answer;
    const runTar = () =>
      seconds(() => {
        execFileSync('tar', ['-b', '512', '-C', join(dir, 'repo'), '-cf', archive, 'packs']);
        execFileSync('sync', [archive]);
      });
    const runB2 = () =>
      seconds(() => {
        answer = b2('export-tape', `file:${tape}`, '--label', 'BENCH', '--no-verify');
      });
    const order = round % 2 === 0;
    const first = order ? runB2() : runTar();
    const second = order ? runTar() : runB2();
    const [whole, tar] = order ? [first, second] : [second, first];
    const tarRate = statSync(archive).size / tar;
    const rate = answer.bytes / answer.writeSeconds;
    rounds.push({
      rate,
      whole: answer.bytes / whole,
      tarRate,
      ratio: rate / tarRate,
      underRuns: answer.underRuns,
    });
    rmSync(tape, { recursive: true });
    rmSync(archive);
  }
  const mib = (n) => `${(n / 2 ** 20).toFixed(0)} MiB/s`;
  for (const r of rounds)
    console.log(
      `writing ${mib(r.rate)} (the whole command ${mib(r.whole)}), tar ${mib(r.tarRate)}, ratio ${r.ratio.toFixed(2)}, under-runs ${r.underRuns}`,
    );
  console.log(
    `median ratio ${median(rounds.map((r) => r.ratio)).toFixed(2)} (goal at least 0.9); load ${loadavg()[0].toFixed(1)}`,
  );
} finally {
  rmSync(dir, { recursive: true });
}
