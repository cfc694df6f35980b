/** Notifications on a real socket, by path and in the abstract name space. */
import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import { systemClock } from '../../src/clock.js';
import { openNotifier, type Notifier } from '../../src/watch/notify.js';
import { notifySocket, type NotifySocket } from '../support/notify-socket.js';
import { tempDir, type TempDir } from '../support/tmp.js';

let dir: TempDir;
let socket: NotifySocket | undefined;
let notifier: Notifier | undefined;
const complaints: string[] = [];

beforeEach(() => {
  dir = tempDir();
  complaints.length = 0;
});
afterEach(async () => {
  await notifier?.close();
  socket?.close();
  socket = undefined;
  notifier = undefined;
  await dir.remove();
});

function open(env: Record<string, string>): Notifier | undefined {
  notifier = openNotifier(env, systemClock, (message) => complaints.push(message));
  return notifier;
}

describe('openNotifier', () => {
  it.each([['path'], ['abstract']])('sends what systemd expects to a socket (%s)', async (kind) => {
    const address = kind === 'path' ? dir.join('n.sock') : `@b2-test-${dir.path}`;
    socket = notifySocket(address);
    const n = open({ NOTIFY_SOCKET: address, WATCHDOG_USEC: '3000000' });
    expect(n?.watchdogMs).toBe(3000);
    const before = process.hrtime.bigint() / 1000n;
    n?.extendTimeout(120_000);
    n?.status('two\nlines');
    n?.ready('all is well');
    n?.watchdog();
    n?.reloading();
    n?.stopping('at the end');
    await n?.close();
    const after = process.hrtime.bigint() / 1000n;
    const messages = socket.messages();
    expect(messages).toHaveLength(6);
    expect(messages[0]).toEqual(['EXTEND_TIMEOUT_USEC=120000000']);
    expect(messages[1]).toEqual(['STATUS=two lines']);
    expect(messages[2]).toEqual(['READY=1', 'STATUS=all is well']);
    expect(messages[3]).toEqual(['WATCHDOG=1']);
    expect(messages[4]?.[0]).toBe('RELOADING=1');
    const at = BigInt((messages[4]?.[1] ?? '').replace('MONOTONIC_USEC=', ''));
    expect(at >= before && at <= after).toBe(true);
    expect(messages[5]).toEqual(['STOPPING=1', 'STATUS=at the end']);
    expect(complaints).toEqual([]);
  });

  it('complains once and goes on where nobody listens', async () => {
    const n = open({ NOTIFY_SOCKET: dir.join('nobody') });
    n?.ready('a');
    n?.status('b');
    await n?.close();
    expect(complaints).toEqual([expect.stringMatching(/cannot notify .*nobody: ENOENT/)]);
  });

  it('is not there without a socket, and refuses addresses it cannot send to', () => {
    expect(open({})).toBeUndefined();
    expect(open({ NOTIFY_SOCKET: '' })).toBeUndefined();
    expect(complaints).toEqual([]);
    expect(open({ NOTIFY_SOCKET: 'vsock:2:1234' })).toBeUndefined();
    expect(complaints).toHaveLength(1);
  });

  it('pings only where the watchdog is meant for this process', () => {
    const env = { NOTIFY_SOCKET: dir.join('x'), WATCHDOG_USEC: '1000000' };
    expect(open({ ...env, WATCHDOG_PID: '1' })?.watchdogMs).toBeUndefined();
    expect(open({ ...env, WATCHDOG_PID: String(process.pid) })?.watchdogMs).toBe(1000);
    expect(open({ ...env, WATCHDOG_USEC: '0' })?.watchdogMs).toBeUndefined();
    expect(open({ ...env, WATCHDOG_USEC: 'x' })?.watchdogMs).toBeUndefined();
  });
});
