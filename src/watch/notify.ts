/**
 * What a service tells systemd (sd_notify(3)): datagrams to `$NOTIFY_SOCKET`, sent without a library or another process. A message
 * that cannot be sent is dropped after the first complaint: a service manager that does not listen must not stop the capture.
 */
import { closeSync } from 'node:fs';
import type { Clock } from '../clock.js';
import { messageOf } from '../errors.js';
import { sendUnixDatagram, unixDatagramSocket } from '../syscalls.js';

type Environment = Readonly<Record<string, string | undefined>>;

export interface Notifier {
  /** How often systemd wants to hear `WATCHDOG=1` at least; undefined where it does not. */
  readonly watchdogMs: number | undefined;
  /** Start-up, or a reload, is finished. */
  ready(status: string): void;
  /** One line for `systemctl status`. */
  status(text: string): void;
  watchdog(): void;
  /** Starting, reloading or stopping may take this much longer from now on. */
  extendTimeout(ms: number): void;
  reloading(): void;
  stopping(status: string): void;
  /** Resolves when what was said has been handed over. */
  close(): Promise<void>;
}

/** Messages that may wait for a service manager that is busy; only the newest status is worth keeping. */
const MAX_WAITING = 32;

/** `text` as one line of a notification. */
function oneLine(text: string): string {
  return text.replace(/\s+/g, ' ').trim();
}

/** The interval that systemd demands of this process (sd_watchdog_enabled(3)). */
function watchdogOf(env: Environment, pid: number): number | undefined {
  const text = env['WATCHDOG_USEC'];
  if (text === undefined || !/^\d{1,16}$/.test(text) || Number(text) === 0) return undefined;
  const forPid = env['WATCHDOG_PID'];
  if (forPid !== undefined && forPid !== String(pid)) return undefined;
  return Number(text) / 1000;
}

/**
 * The notifier of this process; undefined where no service manager asked for notifications. `complain` hears, once, why a message
 * could not be sent.
 */
export function openNotifier(
  env: Environment,
  clock: Pick<Clock, 'monotonicNs'>,
  complain: (message: string) => void,
  pid = process.pid,
): Notifier | undefined {
  const address = env['NOTIFY_SOCKET'];
  if (address === undefined || address === '') return undefined;
  let complained = false;
  const fail = (error: unknown): void => {
    if (complained) return;
    complained = true;
    complain(`cannot notify the service manager at ${address}: ${messageOf(error)}`);
  };
  if (!address.startsWith('/') && !address.startsWith('@')) {
    fail(new Error('only paths and abstract addresses (@…) are supported'));
    return undefined;
  }
  let fd: number | undefined;
  let waiting = 0;
  let closed = false;
  let chain: Promise<void> = Promise.resolve();
  const send = (text: string): void => {
    if (closed || waiting >= MAX_WAITING) return;
    waiting++;
    chain = chain
      .then(async () => {
        fd ??= unixDatagramSocket();
        await sendUnixDatagram(fd, address, Buffer.from(text, 'utf8'));
      })
      .catch(fail)
      .finally(() => {
        waiting--;
      });
  };
  return {
    watchdogMs: watchdogOf(env, pid),
    ready: (status) => send(`READY=1\nSTATUS=${oneLine(status)}`),
    status: (text) => send(`STATUS=${oneLine(text)}`),
    watchdog: () => send('WATCHDOG=1'),
    extendTimeout: (ms) => send(`EXTEND_TIMEOUT_USEC=${Math.round(ms * 1000)}`),
    reloading: () => send(`RELOADING=1\nMONOTONIC_USEC=${clock.monotonicNs() / 1000n}`),
    stopping: (status) => send(`STOPPING=1\nSTATUS=${oneLine(status)}`),
    async close() {
      await chain;
      closed = true;
      if (fd !== undefined) closeSync(fd);
      fd = undefined;
    },
  };
}
