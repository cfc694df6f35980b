/**
 * Commands of the user around a point of class `app`: one that brings an application to rest (a database into backup mode), one
 * that lets it go on.
 */
import { spawn } from 'node:child_process';

import type { Clock } from '../../clock.js';
import { B2Error, messageOf } from '../../errors.js';

/** Shell commands; either may be missing. */
export interface Hooks {
  /** Before: if it fails, there is no point. */
  readonly prePoint?: string | undefined;
  /** After, whenever the first was started, also if it or the point failed. */
  readonly postPoint?: string | undefined;
  /** How long each may take before it is ended. Default 30 000. */
  readonly timeoutMs?: number | undefined;
}

export const DEFAULT_HOOK_MS = 30_000;
/** Between SIGTERM and SIGKILL. */
const TERM_MS = 2000;
/** Of what it says, the end is kept. */
const KEEP_BYTES = 4096;
const KEEP_LINES = 5;
/** What it said last may arrive after its end. */
const DRAIN_MS = 50;

/**
 * Runs `/bin/sh -c command` in a process group of its own, with an empty standard input, and with `environment` added to ours (without
 * the secrets in it). Resolves if it ends with 0. Rejects with `failed` and its last lines if it does not, if it takes longer than
 * `timeoutMs`, or if `signal` aborts (`interrupted`); then its whole group is ended first. Processes that it leaves behind on
 * purpose (a session that stays open until the other hook) are not waited for.
 */
export async function runHook(
  name: 'pre-point' | 'post-point',
  command: string,
  environment: Readonly<Record<string, string>>,
  options: {
    readonly clock: Clock;
    readonly timeoutMs?: number | undefined;
    readonly signal?: AbortSignal | undefined;
  },
): Promise<void> {
  const { clock, signal } = options;
  const timeoutMs = options.timeoutMs ?? DEFAULT_HOOK_MS;
  const interrupted = (): B2Error =>
    new B2Error('interrupted', `the ${name} command was interrupted`);
  if (signal?.aborted === true) throw interrupted();
  const child = spawn('/bin/sh', ['-c', command], {
    stdio: ['ignore', 'pipe', 'pipe'],
    detached: true,
    env: { ...withoutSecrets(process.env), ...environment },
    cwd: '/',
  });
  let said = '';
  for (const stream of [child.stdout, child.stderr]) {
    stream.setEncoding('utf8').on('data', (text: string) => {
      said = (said + text).slice(-KEEP_BYTES);
    });
  }
  const over = new AbortController();
  const exit = new Promise<string | undefined>((resolve, reject) => {
    child.once('error', reject);
    child.once('exit', (code, by) =>
      resolve(
        code === 0
          ? undefined
          : code === null
            ? `was ended by ${by}`
            : `ended with exit code ${code}`,
      ),
    );
  });
  const stop = new Promise<'time' | 'signal'>((resolve) => {
    void clock.sleep(timeoutMs, over.signal).then(() => resolve('time'));
    signal?.addEventListener('abort', () => resolve('signal'), { once: true, signal: over.signal });
  });
  try {
    const first = await Promise.race([exit.then((failure) => ({ failure })), stop]);
    if (typeof first === 'string') {
      await endGroup(child.pid, exit, clock);
      if (first === 'signal') throw interrupted();
      throw failure(name, `took longer than ${timeoutMs / 1000} s and was ended`, said);
    }
    if (first.failure === undefined) return;
    await clock.sleep(DRAIN_MS);
    throw failure(name, first.failure, said);
  } catch (error) {
    if (error instanceof B2Error) throw error;
    throw failure(name, `could not be run: ${messageOf(error)}`, '');
  } finally {
    over.abort();
    // Who was left behind may hold these for long; nobody reads them any more.
    child.stdout.destroy();
    child.stderr.destroy();
    child.unref();
  }
}

function failure(name: string, what: string, said: string): B2Error {
  const lines = said
    .split('\n')
    .map((line) => line.trim())
    .filter((line) => line !== '');
  const words = lines.slice(-KEEP_LINES).join(' / ');
  return new B2Error('failed', `the ${name} command ${what}${words === '' ? '' : `: ${words}`}`, {
    hint: 'Run it by hand, as root, with the variables B2_VOLUME and B2_DEVICE set.',
  });
}

async function endGroup(
  pid: number | undefined,
  exit: Promise<unknown>,
  clock: Clock,
): Promise<void> {
  if (pid === undefined) return;
  const kill = (signal: 'SIGTERM' | 'SIGKILL'): void => {
    try {
      process.kill(-pid, signal);
    } catch {
      // Nobody of the group is left.
    }
  };
  kill('SIGTERM');
  const over = new AbortController();
  await Promise.race([exit, clock.sleep(TERM_MS, over.signal)]);
  over.abort();
  // Also those of the group that the shell did not wait for.
  kill('SIGKILL');
  await exit;
}

/** Passwords of the repository are none of a hook's business. */
function withoutSecrets(environment: NodeJS.ProcessEnv): NodeJS.ProcessEnv {
  return Object.fromEntries(
    Object.entries(environment).filter(
      ([key]) => !/^(B2_PASSWORD|B2_KEY|AWS_|CREDENTIALS_DIRECTORY|NOTIFY_SOCKET)/.test(key),
    ),
  );
}
