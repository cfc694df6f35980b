import { render } from 'ink-testing-library';
import { afterEach, describe, expect, it } from 'vitest';
import { Dashboard, type DashboardActions } from '../../../src/ui/dashboard.js';
import {
  ageText,
  fit,
  moodOf,
  shareRows,
  sparkline,
  stateText,
  type DashboardDevice,
  type DashboardView,
} from '../../../src/ui/dashboard-view.js';
import { displayWidth } from '../../../src/ui/table.js';

function device(more: Partial<DashboardDevice> = {}): DashboardDevice {
  return {
    name: 'web1/sda',
    state: 'exact',
    lagMs: 400,
    lagHistory: [undefined, 0, 100, 1000, 8000],
    scan: undefined,
    writtenBytesPerSecond: 2 ** 20,
    capturedBytesPerSecond: 3 * 2 ** 20,
    storedBytesPerSecond: 0,
    points: 5,
    ...more,
  };
}

function view(more: Partial<DashboardView> = {}): DashboardView {
  return {
    host: 'web1',
    time: '18:40:12',
    upSeconds: 7300,
    repository: '/var/lib/b2/repo',
    repositoryBytes: 5 * 2 ** 30,
    freeBytes: 9 * 2 ** 30,
    intervalMs: 1000,
    devices: [device()],
    points: Array.from({ length: 50 }, (_, i) => ({
      time: '18:40:11',
      device: 'web1/sda',
      id: `#${100 - i}`,
      class: 'crash',
      coverage: i === 49 ? 'unknown' : 'exact',
      storedBytes: 4096,
      ageMs: 35,
    })),
    alarms: [{ time: '18:39:00', message: 'the repository is full' }],
    message: 'hello there',
    ...more,
  };
}

interface Recorded extends DashboardActions {
  readonly did: string[];
}

function actions(): Recorded {
  const did: string[] = [];
  return {
    did,
    snapshot: (index) => void did.push(`snapshot ${index}`),
    quit: () => void did.push('quit'),
    interrupt: () => void did.push('interrupt'),
  };
}

type Shown = ReturnType<typeof render>;
const open: Shown[] = [];
afterEach(() => {
  for (const app of open.splice(0)) app.unmount();
});

function show(
  v: DashboardView,
  size = { columns: 80, rows: 24 },
  colour = false,
  does: DashboardActions = actions(),
): Shown {
  const app = render(<Dashboard view={v} actions={does} colour={colour} size={size} />);
  open.push(app);
  return app;
}

/** Writes `key` again and again until `test` holds: a key that comes before the program listens is lost. */
async function press(app: Shown, key: string, test: () => boolean): Promise<void> {
  for (let i = 0; i < 500; i++) {
    if (i % 50 === 0 && !test()) app.stdin.write(key);
    await new Promise((resolve) => setTimeout(resolve, 10));
    if (test()) return;
  }
  throw new Error(`the key ${JSON.stringify(key)} did nothing:\n${app.lastFrame()}`);
}

/** The frame without colours, line by line. */
function lines(app: Shown): string[] {
  return (app.lastFrame() ?? '').replace(/\u001b\[[0-9;]*m/g, '').split('\n');
}

describe('Dashboard', () => {
  it.each([
    [80, 24, 1],
    [80, 24, 12],
    [80, 24, 40],
    [120, 40, 3],
    [60, 16, 2],
  ])('fits a terminal of %d × %d with %d devices', (columns, rows, count) => {
    const devices = Array.from({ length: count }, (_, i) =>
      device({ name: `web1/a-rather-long-name-of-a-device-${i}` }),
    );
    const alarms = Array.from({ length: 30 }, (_, i) => ({
      time: '18:00:00',
      message: `alarm ${i} ${'that goes on and on '.repeat(20)}`,
    }));
    const shown = lines(show(view({ devices, alarms }), { columns, rows }));
    expect(shown.length).toBeLessThan(rows);
    for (const line of shown) expect(displayWidth(line)).toBeLessThanOrEqual(columns);
    expect(shown.join('\n')).toMatch(/LAST POINTS/);
    expect(shown.join('\n')).toMatch(/ALARMS/);
    expect(shown.at(-1)).toMatch(/q quit/);
    if (count === 40) expect(shown.join('\n')).toMatch(/\d+ devices are not shown/);
  });

  it('shows what an operator needs to know', () => {
    const shown = lines(show(view())).join('\n');
    expect(shown).toMatch(/b2 watch {2}web1 .*18:40:12 {2}up 2h 01m/);
    expect(shown).toMatch(/\/var\/lib\/b2\/repo {2}5\.0 GiB, 9\.0 GiB free/);
    expect(shown).toMatch(/> web1\/sda +exact +400 ms +·▁▂▅█ +1\.0 MiB +3\.0 MiB +-/);
    expect(shown).toMatch(/18:40:11 {2}#100 {4} ?web1\/sda +crash +exact +4\.0 KiB, after 35 ms/);
    expect(shown).toMatch(/18:39:00 {2}the repository is full/);
    expect(shown).toMatch(/hello there/);
  });

  it('has colours only where they are wanted', () => {
    expect(show(view()).lastFrame()).not.toContain('\u001b[');
    // Whether ink writes them depends on the terminal of the test run; the text must not.
    expect(lines(show(view(), undefined, true))).toEqual(lines(show(view())));
  });

  it('does what the keys say, for the device that is selected', async () => {
    const did = actions();
    const devices = [device(), device({ name: 'b' })];
    const app = show(view({ devices }), undefined, false, did);
    const does = (key: string, action: string): Promise<void> => {
      const before = did.did.length;
      return press(app, key, () => did.did.slice(before).includes(action));
    };
    const selects = (key: string, line: RegExp): Promise<void> =>
      press(app, key, () => line.test(lines(app).join('\n')));
    await does('s', 'snapshot 0');
    await selects('\u001b[B', /\n> b /);
    await does('s', 'snapshot 1');
    await selects('k', /\n> web1/);
    await does('s', 'snapshot 0');
    await selects('j', /\n> b /);
    await does('q', 'quit');
    await does('\u0003', 'interrupt');
    expect(new Set(did.did)).toEqual(new Set(['snapshot 0', 'snapshot 1', 'quit', 'interrupt']));
  });

  it('helps, and does nothing by accident meanwhile', async () => {
    const did = actions();
    const app = show(view(), undefined, false, did);
    await press(app, '?', () => /absent {6}the device is gone/.test(lines(app).join('\n')));
    const help = lines(app);
    expect(help.length).toBeLessThan(24);
    for (const line of help) expect(line).not.toContain('…');
    await press(app, 'x', () => /LAST POINTS/.test(lines(app).join('\n')));
    expect(did.did).toEqual([]);
  });

  it('has nothing to show at the start', () => {
    const empty = view({ points: [], alarms: [], devices: [], message: undefined });
    const shown = lines(show({ ...empty, repositoryBytes: undefined })).join('\n');
    expect(shown).toMatch(/none yet/);
    expect(shown).toMatch(/ALARMS\n {2}none/);
  });

  it('lets no name of a device play with the terminal', () => {
    const evil = device({ name: '\u001b[2J' });
    expect(lines(show(view({ devices: [evil] }))).join('\n')).toContain('\\x1b[2J');
  });
});

describe('the words of the dashboard', () => {
  it('draws lag as steps that double', () => {
    expect(sparkline([0, 1, 62, 125, 250, 500, 1000, 2000, 4000, 8000, 1e9], 12, 1000)).toBe(
      ' ▁▁▁▂▃▄▅▆▇██',
    );
    expect(sparkline([1, 2, undefined], 2, 1000)).toBe('▁·');
    expect(sparkline([], 3, 1000)).toBe('   ');
  });

  it('knows good from bad', () => {
    expect(moodOf(device(), 1000)).toBe('good');
    expect(moodOf(device({ lagMs: 20_000 }), 1000)).toBe('busy');
    expect(moodOf(device({ state: 'resync' }), 1000)).toBe('busy');
    expect(moodOf(device({ state: 'outage' }), 1000)).toBe('bad');
  });

  it('says how far a scan is', () => {
    const scan = { doneBytes: 1, totalBytes: 3 };
    expect(stateText(device({ state: 'baseline', scan }))).toBe('baseline 33%');
    expect(stateText(device({ scan }))).toBe('exact');
    expect(stateText(device({ state: 'resync', scan: { doneBytes: 0, totalBytes: 0 } }))).toBe(
      'resync',
    );
  });

  it('words ages and fits texts', () => {
    expect(ageText(35.4)).toBe('35 ms');
    expect(ageText(1234)).toBe('1.2s');
    expect(fit('abcdef', 4)).toBe('abc…');
    expect(fit('abcdef', 4, { keepEnd: true })).toBe('…def');
    expect(fit('ab', 4, { align: 'right' })).toBe('  ab');
    expect(fit('日本語', 4)).toBe('日… ');
  });

  it('shares the lines of small terminals so that each part has one', () => {
    for (let rows = 16; rows < 60; rows++) {
      for (const devices of [1, 5, 50]) {
        const share = shareRows(rows, devices, 9);
        expect(Math.min(share.devices, share.points, share.alarms)).toBeGreaterThanOrEqual(1);
        expect(share.devices + share.points + share.alarms).toBeLessThanOrEqual(rows - 1 - 11);
      }
    }
  });
});
