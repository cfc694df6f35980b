/**
 * Boot time: a disk by itself, and a point of it in a repository by `b2 boot`, in turn. The disk is the small one of the tests (this
 * machine's kernel and busybox, by SYSLINUX); both machines are the same, and both times go from the start of the command until the
 * login prompt is on the serial console. b2's has the start of b2 in it, the check of the console, and the end of the machine.
 *
 *   node bench/boot.mjs [--rounds 3] [--dir DIR]
 */
import { execFileSync, spawn } from 'node:child_process';
import { loadavg, tmpdir } from 'node:os';
import { parseArgs } from 'node:util';
import type { BootAnswer } from '../src/commands/run/boot.js';
import { PROGRAM } from '../test/support/b2.js';
import { FIXTURE_PROMPT, bootableDisk } from '../test/support/boot-fixture.js';
import { tempDir } from '../test/support/tmp.js';

const MEMORY_MIB = 256;
const LIMIT_MS = 300_000;
const GOAL = 1.5;

const { values } = parseArgs({
  options: {
    rounds: { type: 'string', default: '3' },
    dir: { type: 'string', default: tmpdir() },
  },
});

const dir = tempDir(values.dir);
const env = {
  ...process.env,
  B2_REPOSITORY: dir.join('repo'),
  B2_PASSWORD: 'bench',
  B2_CONFIG: '/dev/null',
  B2_CACHE_DIR: dir.join('cache'),
};
const median = (list: readonly number[]): number =>
  list.toSorted((a, b) => a - b)[Math.floor(list.length / 2)] ?? 0;

function b2(...args: readonly string[]): string {
  return execFileSync(PROGRAM, args, {
    env,
    encoding: 'utf8',
    stdio: ['ignore', 'pipe', 'inherit'],
  });
}

/** Seconds until the prompt, and how the machine was run. */
function bootPoint(): { readonly seconds: number; readonly answer: BootAnswer } {
  const from = performance.now();
  const said = b2(
    '--json',
    'boot',
    'disk',
    '--check',
    FIXTURE_PROMPT,
    '--no-network',
    '--memory',
    `${MEMORY_MIB}M`,
    '--timeout',
    `${LIMIT_MS / 1000}s`,
  );
  const seconds = (performance.now() - from) / 1000;
  return { seconds, answer: JSON.parse(said.slice(said.indexOf('\n') + 1)) as BootAnswer };
}

/** The same machine on the file itself; what it writes is thrown away, too. */
async function bootPlain(disk: string, accelerator: 'kvm' | 'tcg'): Promise<number> {
  const from = performance.now();
  const child = spawn(
    'qemu-system-x86_64',
    [
      ...'-nodefaults -no-user-config -no-reboot -smp 1 -vga std -display none -serial stdio -nic none'.split(
        ' ',
      ),
      '-accel',
      accelerator,
      '-cpu',
      accelerator === 'kvm' ? 'host' : 'max',
      '-m',
      String(MEMORY_MIB),
      '-drive',
      `file=${disk},format=raw,if=none,id=d0,snapshot=on,discard=unmap`,
      '-device',
      'virtio-blk-pci,drive=d0,bootindex=1',
    ],
    { stdio: ['ignore', 'pipe', 'inherit'] },
  );
  const ended = new Promise((resolve) => child.once('exit', resolve));
  const late = setTimeout(() => child.kill('SIGKILL'), LIMIT_MS);
  try {
    await new Promise<void>((resolve, reject) => {
      let said = '';
      child.stdout.setEncoding('latin1').on('data', (text: string) => {
        said += text;
        if (said.includes(FIXTURE_PROMPT)) resolve();
      });
      child.once('error', reject);
      child.once('exit', () => reject(new Error('QEMU ended before the prompt')));
    });
    return (performance.now() - from) / 1000;
  } finally {
    clearTimeout(late);
    child.kill('SIGKILL');
    await ended;
  }
}

try {
  const disk = await bootableDisk(dir);
  b2('init', '--quiet');
  b2('snapshot', '--quiet', '--volume', 'disk', disk);
  // Whether KVM works is tried once, and remembered.
  const { accelerator } = bootPoint().answer;
  const rounds: { readonly plain: number; readonly point: number }[] = [];
  for (let round = 0; round < Number(values.rounds); round++) {
    const isFirst = round % 2 === 0;
    const early = isFirst ? await bootPlain(disk, accelerator) : undefined;
    const point = bootPoint().seconds;
    const plain = early ?? (await bootPlain(disk, accelerator));
    rounds.push({ plain, point });
    console.log(
      `${accelerator}: plain ${plain.toFixed(1)} s, b2 boot ${point.toFixed(1)} s, ratio ${(point / plain).toFixed(2)}`,
    );
  }
  const ratio = median(rounds.map((r) => r.point / r.plain));
  console.log(
    `median ratio ${ratio.toFixed(2)} (goal below ${GOAL}); load ${(loadavg()[0] ?? 0).toFixed(1)}`,
  );
} finally {
  await dir.remove();
}
