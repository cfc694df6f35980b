/**
 * What everybody who starts QEMU shares: the program, and whether KVM is worth trying. /dev/kvm can be opened on machines on which
 * it then does not run a stock guest, so it is believed only as long as it has not failed during this boot of the machine.
 *
 * Starting a guest: for each of {@link acceleratorsToTry} in turn, start QEMU with {@link acceleratorArguments} and wait for a sign
 * of life of the guest, for at most {@link KVM_PATIENCE_MS} under KVM; where it does not come, {@link rememberKvmFails} and go on
 * with the next.
 */
import { accessSync, constants } from 'node:fs';
import { mkdir, readFile, writeFile } from 'node:fs/promises';
import { dirname, join } from 'node:path';

import { machineFacts } from '../process-identity.js';

export type Accelerator = 'kvm' | 'tcg';

/** A guest that runs under KVM has said something long before. */
export const KVM_PATIENCE_MS = 10_000;

/** QEMU's program for this machine's architecture; undefined where b2 knows none. */
export function qemuName(): string | undefined {
  return process.arch === 'x64' ? 'qemu-system-x86_64' : undefined;
}

function memoOf(cacheDir: string): string {
  return join(cacheDir, 'kvm-fails');
}

/** KVM first, where it may be used and has not failed during this boot; TCG, which always works, last. */
export async function acceleratorsToTry(cacheDir: string): Promise<readonly Accelerator[]> {
  try {
    accessSync('/dev/kvm', constants.R_OK | constants.W_OK);
  } catch {
    return ['tcg'];
  }
  const failed = await readFile(memoOf(cacheDir), 'utf8').catch(() => '');
  return failed.trim() === machineFacts().bootId ? ['tcg'] : ['kvm', 'tcg'];
}

/** A guest did not run under KVM: nobody needs to try again before the next boot. Never rejects: it is only a cache. */
export async function rememberKvmFails(cacheDir: string): Promise<void> {
  try {
    const memo = memoOf(cacheDir);
    await mkdir(dirname(memo), { recursive: true, mode: 0o700 });
    await writeFile(memo, `${machineFacts().bootId}\n`, { mode: 0o600 });
  } catch {
    return; // the next one tries KVM again, which costs some seconds
  }
}

/** For QEMU's command line. */
export function acceleratorArguments(accelerator: Accelerator): readonly string[] {
  return accelerator === 'kvm'
    ? ['-accel', 'kvm', '-cpu', 'host']
    : ['-accel', 'tcg', '-cpu', 'max'];
}
