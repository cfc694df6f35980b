/**
 * Does KVM really run a guest here? /dev/kvm can be opened on machines (virtual ones, above all) on which a stock kernel then hangs
 * or dies. So one is started: this machine's own kernel, without a root file system, must come to the end of its start.
 */
import { spawn } from 'node:child_process';
import { mkdir, readFile, writeFile } from 'node:fs/promises';
import { dirname, join } from 'node:path';

import type { Clock } from '../clock.js';
import { findGuestKernel } from '../files/guest.js';
import { findProgram, TOOL_ENV } from '../files/tools.js';
import { machineFacts } from '../process-identity.js';
import {
  acceleratorArguments,
  acceleratorsToTry,
  KVM_PATIENCE_MS,
  qemuName,
  rememberKvmFails,
  type Accelerator,
} from './qemu.js';

export interface ChosenAccelerator {
  readonly accelerator: Accelerator;
  /** A clause for a person. */
  readonly why: string;
}

/** What the kernel says last, without a root file system. */
const CAME_TO_THE_END = /Kernel panic - not syncing: (VFS|No working init)|Unable to mount root fs/;

/** KVM if it runs a kernel here, else TCG. The answer is remembered in `cacheDir` until the next boot of this machine. */
export async function chooseAccelerator(
  cacheDir: string,
  clock: Clock,
): Promise<ChosenAccelerator> {
  const [first] = await acceleratorsToTry(cacheDir);
  if (first !== 'kvm')
    return {
      accelerator: 'tcg',
      why: '/dev/kvm cannot be used, or did not run a guest before',
    };
  const memo = join(cacheDir, 'kvm-works');
  const { bootId } = machineFacts();
  const known = (await readFile(memo, 'utf8').catch(() => '')).trim();
  if (known === bootId && bootId !== '')
    return { accelerator: 'kvm', why: 'it ran a guest before' };
  const outcome = await probe(clock);
  if (outcome === 'unknown')
    return { accelerator: 'tcg', why: 'there is no kernel in /boot to try KVM with' };
  if (outcome === 'fails') {
    await rememberKvmFails(cacheDir);
    return {
      accelerator: 'tcg',
      why: `KVM did not run a kernel to its end within ${KVM_PATIENCE_MS / 1000} s`,
    };
  }
  try {
    await mkdir(dirname(memo), { recursive: true, mode: 0o700 });
    await writeFile(memo, `${bootId}\n`, { mode: 0o600 });
  } catch {
    // It is tried again the next time, then.
  }
  return { accelerator: 'kvm', why: 'it has just run a guest' };
}

async function probe(clock: Clock): Promise<'works' | 'fails' | 'unknown'> {
  const qemu = findProgram(qemuName() ?? '');
  const kernel = await findGuestKernel();
  if (qemu === undefined || kernel === undefined) return 'unknown';
  const child = spawn(
    qemu,
    [
      '-nodefaults -no-user-config -display none -nic none -no-reboot -m 256 -smp 1 -serial stdio'.split(
        ' ',
      ),
      acceleratorArguments('kvm'),
      ['-kernel', kernel.image, '-append', 'console=ttyS0 panic=-1 nokaslr'],
    ].flat(),
    { stdio: ['ignore', 'pipe', 'ignore'], env: { ...TOOL_ENV }, cwd: '/', detached: true },
  );
  const over = new AbortController();
  const came = new Promise<'works' | 'fails'>((resolve) => {
    let said = '';
    child.stdout.setEncoding('latin1').on('data', (text: string) => {
      said = (said + text).slice(-8192);
      if (CAME_TO_THE_END.test(said)) resolve('works');
    });
    child.once('error', () => resolve('fails'));
    child.once('close', () => resolve('fails'));
  });
  const ended = new Promise<void>((resolve) => {
    child.once('close', () => resolve());
    child.once('error', () => resolve());
  });
  const outcome = await Promise.race([
    came,
    clock.sleep(KVM_PATIENCE_MS, over.signal).then(() => 'fails' as const),
  ]);
  over.abort();
  child.kill('SIGKILL');
  await ended;
  return outcome;
}
