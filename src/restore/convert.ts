/**
 * Images for virtual machines, made by qemu-img from an NBD export of ours. Written under a temporary name beside the
 * target and renamed when whole and compared, so that an incomplete image never has the target's name.
 */
import { spawn } from 'node:child_process';
import { open, rename, unlink } from 'node:fs/promises';
import path from 'node:path';

import type { Clock } from '../clock.js';
import { B2Error, errnoOf, ioError } from '../errors.js';
import type { EventSink } from '../events.js';
import { fsyncDirectory, temporaryName } from '../fs.js';
import type { Image } from '../image.js';
import { withNbdExport } from '../nbd/export.js';
import { startProgress } from '../progress.js';

/** Formats of qemu-img that are offered; all are sparse files. */
export const VM_FORMATS = ['qcow2', 'vmdk', 'vdi', 'vhdx'] as const;
export type VmFormat = (typeof VM_FORMATS)[number];

export interface ConvertOptions {
  readonly target: string;
  readonly format: VmFormat;
  /** Compare the result with the image afterwards. */
  readonly verify: boolean;
  readonly clock: Pick<Clock, 'monotonicNs'>;
  readonly events: EventSink;
  readonly signal?: AbortSignal | undefined;
}

export interface ConvertResult {
  /** Bytes that the file takes on its file system. */
  readonly allocatedBytes: number;
  readonly verified: boolean;
}

/** Requests that qemu-img has under way; 16 is its limit. */
const PARALLEL = '8';
const SEARCH_PATH = `${process.env['PATH'] ?? ''}:/usr/local/bin:/usr/bin:/bin`;
const KEPT_OUTPUT = 4096;

interface Ran {
  readonly status: number;
  readonly words: string;
}

/** Runs qemu-img without a shell; `onPercent` hears of its progress. */
function qemuImg(
  args: readonly string[],
  signal: AbortSignal | undefined,
  onPercent: (percent: number) => void,
): Promise<Ran> {
  return new Promise((resolve, reject) => {
    // Nothing of our environment: it may hold passwords, and qemu-img needs none of it.
    const child = spawn('qemu-img', [...args], {
      stdio: ['ignore', 'pipe', 'pipe'],
      env: { PATH: SEARCH_PATH, LC_ALL: 'C' },
    });
    let words = '';
    const stop = (): void => void child.kill('SIGTERM');
    signal?.addEventListener('abort', stop, { once: true });
    if (signal?.aborted === true) stop();
    child.stdout.setEncoding('latin1').on('data', (text: string) => {
      for (const match of text.matchAll(/\((\d+(?:\.\d+)?)\/100%\)/g)) onPercent(Number(match[1]));
      words = (words + text.replace(/\s*\(\d+(\.\d+)?\/100%\)\s*/g, '')).slice(-KEPT_OUTPUT);
    });
    child.stderr.setEncoding('utf8').on('data', (text: string) => {
      words = (words + text).slice(-KEPT_OUTPUT);
    });
    child.on('error', (error) => {
      signal?.removeEventListener('abort', stop);
      reject(errnoOf(error) === 'ENOENT' ? missing(error) : ioError('run', 'qemu-img', error));
    });
    child.on('close', (status, endedBy) => {
      signal?.removeEventListener('abort', stop);
      const last = words
        .split('\n')
        .map((line) => line.trim())
        .filter((line) => line !== '')
        .at(-1);
      resolve({
        status: status ?? 255,
        words: last ?? (endedBy === null ? `status ${status}` : `ended by ${endedBy}`),
      });
    });
  });
}

function missing(cause: unknown): B2Error {
  return new B2Error(
    'unsupported',
    'images for virtual machines are made by qemu-img, which is not installed',
    {
      cause,
      hint: 'Install it (Debian: apt install qemu-utils), or restore with --format raw.',
    },
  );
}

/** Rejects with `unsupported` if qemu-img is not installed. */
export async function requireQemuImg(): Promise<void> {
  const { status, words } = await qemuImg(['--version'], undefined, () => undefined);
  if (status !== 0) throw new B2Error('failed', `qemu-img --version: ${words}`);
}

/**
 * Writes `image` as a VM image named `target`, replacing what has that name. Kinds: `damaged` for data that cannot be read,
 * `failed` for what qemu-img says, `interrupted`. After any of them the target is what it was before.
 */
export async function convertImage(image: Image, options: ConvertOptions): Promise<ConvertResult> {
  const { target, format, signal } = options;
  const absolute = path.resolve(target);
  const directory = path.dirname(absolute);
  const temporary = path.join(directory, temporaryName());
  const progress = startProgress({
    phase: `writing ${target}`,
    totalBytes: image.sizeBytes * (options.verify ? 2 : 1),
    clock: options.clock,
    events: options.events,
  });
  const follow = (): ((percent: number) => void) => {
    let done = 0;
    return (percent) => {
      const now = Math.floor((image.sizeBytes * Math.min(100, percent)) / 100);
      if (now > done) progress.add(now - done);
      done = Math.max(done, now);
    };
  };
  const run = async (args: readonly string[], percent: (percent: number) => void): Promise<Ran> => {
    const ran = await qemuImg(args, signal, percent);
    if (signal?.aborted === true) {
      throw new B2Error('interrupted', `writing ${target} was interrupted; nothing was left of it`);
    }
    return ran;
  };
  let isWhole = false;
  try {
    await withNbdExport(
      image,
      async (uri) => {
        const written = await run(
          ['convert', '-p', '-m', PARALLEL, '-W', '-f', 'raw', '-O', format, uri, temporary],
          follow(),
        );
        if (written.status !== 0) {
          throw new B2Error('failed', `qemu-img could not write ${target}: ${written.words}`, {
            hint: 'Is there room on that file system?',
          });
        }
        if (!options.verify) return;
        const compared = await run(
          ['compare', '-p', '-f', 'raw', '-F', format, uri, temporary],
          follow(),
        );
        if (compared.status === 0) return;
        throw new B2Error(
          'failed',
          compared.status === 1
            ? `${target} does not hold what was written: ${compared.words}`
            : `qemu-img could not compare ${target}: ${compared.words}`,
          { hint: 'The disk that holds it may be failing (dmesg, smartctl -a).' },
        );
      },
      { events: options.events },
    );
    const allocatedBytes = await syncFile(temporary);
    await rename(temporary, absolute).catch((error: unknown) => {
      throw ioError('write', target, error);
    });
    isWhole = true;
    await fsyncDirectory(directory).catch((error: unknown) => {
      throw ioError('write', target, error);
    });
    progress.finish();
    return { allocatedBytes, verified: options.verify };
  } finally {
    if (!isWhole) await unlink(temporary).catch(() => undefined);
  }
}

/** qemu-img itself does not wait for the disk. Resolves to the bytes allocated. */
async function syncFile(file: string): Promise<number> {
  try {
    const handle = await open(file, 'r+');
    try {
      await handle.chmod(0o600);
      await handle.sync();
      return (await handle.stat()).blocks * 512;
    } finally {
      await handle.close();
    }
  } catch (error) {
    throw ioError('sync', file, error);
  }
}
