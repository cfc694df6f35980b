import { describe, expect, it } from 'vitest';
import type { Notifier } from '../../../src/watch/notify.js';
import { deviceReport, type DeviceReport, type WatchReport } from '../../../src/watch/report.js';
import { Pulse, statusLine, supervise } from '../../../src/watch/service.js';
import type { WatchStatus } from '../../../src/watch/types.js';
import { FakeSession, capturedPoint } from '../../support/fake-session.js';
import { ManualClock } from '../../support/manual-clock.js';

function device(more: Partial<WatchStatus>): DeviceReport {
  const session = new FakeSession('/a', () => undefined);
  session.current = more;
  return deviceReport(session.status());
}

function report(...devices: readonly DeviceReport[]): WatchReport {
  return { pid: 1, repository: '/r', repositoryId: 'x', since: '', stopping: false, devices };
}

describe('Pulse', () => {
  const LIMIT = 1000;

  it.each([
    ['a scan that stands still', { state: 'baseline', scan: { doneBytes: 5, totalBytes: 9 } }],
    ['a lag that grows while nothing is captured', { state: 'exact', lagMs: 100_000 }],
    ['a lag that is not known', { state: 'coalescing', lagMs: undefined }],
    ['a start that takes for ever', { state: 'starting' }],
  ] satisfies [string, Partial<WatchStatus>][])('stops for %s', (_, status) => {
    const pulse = new Pulse();
    expect(pulse.beats([device(status)], 0, LIMIT)).toBe(true);
    expect(pulse.beats([device(status)], LIMIT, LIMIT)).toBe(true);
    expect(pulse.beats([device(status)], LIMIT + 1, LIMIT)).toBe(false);
    // One healthy device does not speak for another.
    const healthy = { ...device({ state: 'exact' }), device: '/b' };
    expect(pulse.beats([healthy, device(status)], LIMIT + 2, LIMIT)).toBe(false);
  });

  it.each([
    ['nothing to do', { state: 'exact', lagMs: 0 }],
    ['a repository that is out', { state: 'outage', lagMs: 1e9 }],
    ['a device that is gone', { state: 'absent', lagMs: undefined }],
    ['a failed device', { state: 'failed', lagMs: undefined }],
    ['reading', { state: 'resync', capturedBytesPerSecond: 5 }],
  ] satisfies [string, Partial<WatchStatus>][])('goes on with %s', (_, status) => {
    const pulse = new Pulse();
    for (const at of [0, 10 * LIMIT, 20 * LIMIT])
      expect(pulse.beats([device(status)], at, LIMIT)).toBe(true);
  });

  it('goes on while a scan or the points do', () => {
    const pulse = new Pulse();
    for (let i = 0; i < 5; i++) {
      const scan = { doneBytes: i, totalBytes: 9 };
      expect(pulse.beats([device({ state: 'baseline', scan })], i * 2 * LIMIT, LIMIT)).toBe(true);
    }
    for (let i = 5; i < 9; i++) {
      const status = { state: 'coalescing', lagMs: 1e6, points: i } as const;
      expect(pulse.beats([device(status)], i * 2 * LIMIT, LIMIT)).toBe(true);
    }
  });
});

it('words the status line', () => {
  const scan = { doneBytes: 1, totalBytes: 4 };
  const line = statusLine(
    report(
      device({ state: 'exact', lagMs: 400, storedBytesPerSecond: 2048 }),
      device({ state: 'baseline', scan, volume: undefined }),
    ),
  );
  expect(line).toBe('host/a exact, lag 0.4s; /a baseline 25.0%; storing 2.0 KiB/s');
});

class Recorder implements Notifier {
  readonly said: string[] = [];
  readonly watchdogMs: number | undefined = 4000;
  ready(status: string): void {
    this.said.push(`ready ${status}`);
  }
  status(text: string): void {
    this.said.push(`status ${text}`);
  }
  watchdog(): void {
    this.said.push('watchdog');
  }
  extendTimeout(ms: number): void {
    this.said.push(`extend ${ms}`);
  }
  reloading(): void {
    this.said.push('reloading');
  }
  stopping(): void {
    this.said.push('stopping');
  }
  close(): Promise<void> {
    return Promise.resolve();
  }
}

describe('supervise', () => {
  /** Runs for `seconds` of a clock that goes on by itself; `at` is called before each second. */
  async function watchFor(
    seconds: number,
    at: (second: number) => { status: WatchReport; ready?: boolean },
  ): Promise<{ said: string[]; perSecond: string[][] }> {
    const notifier = new Recorder();
    const end = new AbortController();
    let isReady = false;
    const perSecond: string[][] = [];
    let second = 0;
    let now = at(0);
    class Clock extends ManualClock {
      override async sleep(ms: number): Promise<void> {
        this.advanceMs(ms);
        perSecond.push(notifier.said.splice(0));
        second++;
        if (second >= seconds) return end.abort();
        now = at(second);
        isReady ||= now.ready === true;
        await new Promise((resolve) => setImmediate(resolve));
      }
    }
    await supervise({
      notifier,
      status: () => now.status,
      isReady: () => isReady,
      clock: new Clock(),
      signal: end.signal,
    });
    return { said: perSecond.flat(), perSecond };
  }

  it('asks for more time while the first reading gets on, then says that it is ready', async () => {
    const { said } = await watchFor(40, (s) => ({
      status: report(
        s < 25
          ? device({ state: 'baseline', scan: { doneBytes: s, totalBytes: 100 } })
          : device({ state: 'exact', lastPoint: capturedPoint(1) }),
      ),
      ready: s === 25,
    }));
    expect(said.filter((m) => m.startsWith('extend'))).toEqual([
      'extend 120000',
      'extend 120000',
      'extend 120000',
    ]);
    expect(said.filter((m) => m.startsWith('ready'))).toEqual([
      'ready host/a exact, lag 0s; storing 0 B/s',
    ]);
    expect(said.indexOf('status host/a baseline 0.0%, lag 0s; storing 0 B/s')).toBe(-1);
    expect(said).toContain('status host/a baseline 0.0%; storing 0 B/s');
    // Every two seconds of four.
    expect(said.filter((m) => m === 'watchdog')).toHaveLength(20);
  });

  it('asks for no time and pings no more once nothing moves', async () => {
    const stuck = report(device({ state: 'baseline', scan: { doneBytes: 5, totalBytes: 9 } }));
    const { perSecond } = await watchFor(340, () => ({ status: stuck }));
    const late = perSecond.slice(302).flat();
    expect(late).toEqual([]);
    expect(
      perSecond
        .slice(0, 300)
        .flat()
        .filter((m) => m.startsWith('extend')),
    ).toHaveLength(30);
  });

  it('stops pinging when a running capture stands still for the time of the watchdog', async () => {
    const { perSecond } = await watchFor(40, (s) => ({
      status: report(
        device(s < 10 ? { state: 'exact', lagMs: 5 } : { state: 'exact', lagMs: 90_000 }),
      ),
      ready: s === 1,
    }));
    expect(perSecond.slice(0, 10).flat()).toContain('watchdog');
    expect(perSecond.slice(16).flat()).not.toContain('watchdog');
  });
});
