#!/usr/bin/env node
// How fast an export writes to a stand-in for a tape, beside `tar -b 512` of the same packs to the same file system.
//
// Both end with their bytes on stable storage, as a file mark does on a real drive: b2 syncs each file of the tape before its mark, tar is
// followed by `sync FILE`. Both begin with the packs in the page cache (`--cache warm`), or both without (`cold`). In turn, after a sync of
// everything that the run before left. Two comparisons:
//   writing   b2 without reading back (--no-verify) beside tar: the rate of the writing alone, and that of the whole commands, b2's with the start of
//             the program, the password (scrypt) and the plan; what of it is fixed is shown beside it (`b2 tape list`).
//   verified  b2 as it comes, which reads everything back and checks every chunk, beside tar and `tar -d`, which reads the archive back and compares. Both
//             read from the disk: b2 has written around the page cache, and tar's archive is taken out of it.
//
//   usage: node bench/tape.mjs [--mib 2048] [--rounds 5] [--cache warm|cold] [--encryption aes256|none] [--partly] [--rate 360M] [--dir DIR] [--json]
//          --partly: a second snapshot has replaced a little of every pack, so that none of them can be written as it is
//          --rate: the stand-in takes no more than that, as a real drive does (LTO-8: 360M); tar is left out, and under-runs are what counts
import { execFileSync } from 'node:child_process';
import {
  closeSync,
  fsyncSync,
  mkdirSync,
  mkdtempSync,
  openSync,
  readdirSync,
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
    mib: { type: 'string', default: '2048' },
    rounds: { type: 'string', default: '5' },
    cache: { type: 'string', default: 'warm' },
    encryption: { type: 'string', default: 'aes256' },
    partly: { type: 'boolean', default: false },
    rate: { type: 'string' },
    dir: { type: 'string', default: tmpdir() },
    json: { type: 'boolean', default: false },
  },
});
const program = fileURLToPath(new URL('../bin/b2', import.meta.url));
const dir = mkdtempSync(join(values.dir, 'b2-bench-tape-'));
const packs = join(dir, 'repo', 'packs');
const env = {
  ...process.env,
  B2_REPOSITORY: join(dir, 'repo'),
  B2_PASSWORD: 'bench',
  B2_CONFIG: '/dev/null',
  B2_CACHE_DIR: join(dir, 'cache'),
  TIMEFORMAT: '%R %U %S',
};
/** Runs a command; its output, and seconds elapsed and of CPU, with those of its children. */
const timed = (...command) => {
  const out = join(dir, 'out');
  const err = join(dir, 'err');
  const times = execFileSync(
    'bash',
    ['-c', `{ time "$@" >${out} 2>${err}; } 2>&1`, 'bash', ...command],
    {
      env,
      encoding: 'utf8',
    },
  );
  const [seconds, user, system] = times.trim().split(' ').map(Number);
  return {
    seconds,
    cpu: user + system,
    out: execFileSync('cat', [out], { encoding: 'utf8', maxBuffer: 1 << 28 }),
  };
};
const b2 = (...args) => {
  const { out, ...times } = timed(program, '--json', ...args);
  return { answer: JSON.parse(out), ...times };
};
const median = (list) => list.toSorted((a, b) => a - b)[Math.floor(list.length / 2)];
const packFiles = () =>
  readdirSync(packs, { recursive: true, withFileTypes: true })
    .filter((f) => f.isFile())
    .map((f) => join(f.parentPath ?? f.path, f.name));
/** Brings the packs into the page cache, or takes them out of it. */
const prepare = () => {
  execFileSync('sync', ['-f', dir]);
  for (const file of packFiles()) {
    const how = values.cache === 'cold' ? ['iflag=nocache', 'count=0'] : ['bs=4M', 'of=/dev/null'];
    execFileSync('dd', [`if=${file}`, ...how, 'status=none']);
  }
};

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
  if (values.partly) {
    const again = openSync(image, 'r+');
    for (let at = 0; at < Number(values.mib); at += 8)
      writeSync(again, randomBytes(4096), 0, 4096, at * 2 ** 20);
    fsyncSync(again);
    closeSync(again);
    b2('snapshot', image, '--volume', 'bench');
  }
  rmSync(image);
  const fixed = median([0, 1, 2].map(() => b2('tape', 'list').seconds));
  const rounds = [];
  for (let round = 0; round < Number(values.rounds); round++) {
    const tape = join(dir, `tape-${round}`);
    const archive = join(dir, `archive-${round}.tar`);
    const runTar = (verify) => {
      prepare();
      rmSync(archive, { force: true });
      const done = timed(
        'bash',
        '-c',
        `tar -b 512 -C "$1" -cf "$2" packs && sync "$2"${
          verify
            ? ' && dd if="$2" iflag=nocache count=0 status=none && tar -b 512 -C "$1" -df "$2"'
            : ''
        }`,
        'bash',
        join(dir, 'repo'),
        archive,
      );
      return { ...done, bytes: statSync(archive).size };
    };
    const runB2 = (...more) => {
      prepare();
      rmSync(tape, { recursive: true, force: true });
      mkdirSync(tape);
      const rate = values.rate === undefined ? '' : `?rate=${values.rate}`;
      return b2('export-tape', `file:${tape}${rate}`, '--label', 'BENCH', ...more);
    };
    const b2First = round % 2 === 0;
    const both = (one, two) => {
      const [a, b] = b2First ? [one(), two()] : [two(), one()];
      return b2First ? [a, b] : [b, a];
    };
    let done;
    let tar;
    let verified;
    let tarVerified;
    if (values.rate !== undefined) done = runB2('--no-verify');
    else {
      [done, tar] = both(
        () => runB2('--no-verify'),
        () => runTar(false),
      );
      [verified, tarVerified] = both(
        () => runB2(),
        () => runTar(true),
      );
    }
    const { answer } = done;
    const result = {
      bytes: answer.bytes,
      copied: answer.copiedBytes / answer.bytes,
      writing: answer.bytes / answer.writeSeconds,
      whole: answer.bytes / done.seconds,
      seconds: done.seconds,
      cpu: done.cpu,
      underRuns: answer.underRuns,
    };
    if (tar !== undefined) {
      result.tarBytes = tar.bytes;
      result.tar = tar.bytes / tar.seconds;
      result.tarSeconds = tar.seconds;
      result.tarCpu = tar.cpu;
      result.ratioWhole = result.whole / result.tar;
      result.ratioWriting = result.writing / result.tar;
      if (!verified.answer.verified) throw new Error('what was written could not be read back');
      result.verifiedSeconds = verified.seconds;
      result.verifiedCpu = verified.cpu;
      result.tarVerifiedSeconds = tarVerified.seconds;
      result.tarVerifiedCpu = tarVerified.cpu;
      result.ratioVerified =
        verified.answer.bytes / verified.seconds / (tarVerified.bytes / tarVerified.seconds);
    }
    rounds.push(result);
    rmSync(tape, { recursive: true });
    rmSync(archive, { force: true });
  }
  if (values.json) {
    console.log(JSON.stringify({ fixedSeconds: fixed, cache: values.cache, rounds }));
  } else {
    const mib = (n) => `${(n / 2 ** 20).toFixed(0)} MiB/s`;
    for (const r of rounds)
      console.log(
        `b2 ${mib(r.whole)} in ${r.seconds.toFixed(2)} s (${r.cpu.toFixed(1)} s CPU), writing ${mib(r.writing)}, under-runs ${r.underRuns}` +
          (r.tar === undefined
            ? ''
            : `; tar ${mib(r.tar)} in ${r.tarSeconds.toFixed(2)} s (${r.tarCpu.toFixed(1)} s CPU); ratio ${r.ratioWhole.toFixed(2)}, of the writing ${r.ratioWriting.toFixed(2)}\n` +
              `    and read back: b2 ${r.verifiedSeconds.toFixed(2)} s (${r.verifiedCpu.toFixed(1)} s CPU), tar -d ${r.tarVerifiedSeconds.toFixed(2)} s (${r.tarVerifiedCpu.toFixed(1)} s CPU); ratio ${r.ratioVerified.toFixed(2)}`),
      );
    if (values.rate === undefined)
      console.log(
        `median ratio: writing ${median(rounds.map((r) => r.ratioWriting)).toFixed(2)} (goal at least 0.9), whole commands ${median(rounds.map((r) => r.ratioWhole)).toFixed(2)}, written and read back ${median(rounds.map((r) => r.ratioVerified)).toFixed(2)}`,
      );
    console.log(
      `${values.cache} page cache, ${(rounds[0].bytes / 2 ** 20).toFixed(0)} MiB on tape, ${(rounds[0].copied * 100).toFixed(0)} % of it packs as they are; fixed costs of b2 about ${fixed.toFixed(2)} s; load ${loadavg()[0].toFixed(1)}`,
    );
  }
} finally {
  rmSync(dir, { recursive: true, force: true });
}
