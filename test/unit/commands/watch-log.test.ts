import { closeSync, fstatSync, openSync } from 'node:fs';
import { describe, expect, it } from 'vitest';
import { isJournal, openLog } from '../../../src/commands/run/watch-log.js';
import { deviceReport } from '../../../src/watch/report.js';
import type { WatchEvent } from '../../../src/watch/types.js';
import { capturedPoint, FakeSession } from '../../support/fake-session.js';
import { ManualClock } from '../../support/manual-clock.js';

const POINT: WatchEvent = { type: 'point', device: '/d', volume: 'v', point: capturedPoint(7) };
const EVENTS: readonly WatchEvent[] = [
  { type: 'state', device: '/d', state: 'outage', message: 'the repository takes nothing' },
  { type: 'state', device: '/d', state: 'exact', message: 'every change of /d is captured' },
  POINT,
  {
    type: 'problem',
    device: '/d',
    problem: { atNs: 1_700_000_000_000_000_000n, message: 'it\nhurts', hint: 'Rest.' },
  },
  { type: 'notice', device: '/d', message: 'by the way' },
];

function lines(
  flags: { json?: boolean; quiet?: boolean; verbose?: boolean },
  journal: boolean,
  events: readonly WatchEvent[] = EVENTS,
): { texts: string[]; records: object[] } {
  const texts: string[] = [];
  const records: object[] = [];
  const log = openLog(
    {
      output: {
        interactive: false,
        line: (record, text) => {
          records.push(record);
          texts.push(text);
        },
        bytes: () => Promise.resolve(),
      },
      flags: { json: false, quiet: false, verbose: false, ...flags },
      clock: new ManualClock(),
      env: {},
    },
    journal,
  );
  for (const event of events) log.event(event);
  log.summary([deviceReport(new FakeSession('/d', () => undefined).status())]);
  return { texts, records };
}

describe('the log of watch', () => {
  it('has priorities for the journal, and no time of its own', () => {
    expect(lines({ verbose: true }, true).texts).toEqual([
      '<3>outage: /d: the repository takes nothing',
      '<5>exact: every change of /d is captured',
      '<7>/d: point #7, crash, exact, 12.0 KiB changed, 1000 B stored, durable after 12 ms',
      '<4>/d: it\\x0ahurts (Rest.)',
      '<6>/d: by the way',
      '<6>/d: starting, lag 0s, 0 points, writes 0 B/s, stores 0 B/s',
    ]);
  });

  it('has times elsewhere; points only with --verbose, with --quiet only what is wrong', () => {
    const { texts } = lines({}, false);
    expect(texts).toHaveLength(5);
    for (const text of texts) expect(text).toMatch(/^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{3} /);
    expect(texts.join('\n')).not.toMatch(/#7/);
    expect(lines({ quiet: true }, true).texts.map((t) => t.slice(0, 3))).toEqual(['<3>', '<4>']);
  });

  it('has every event as JSON, whatever the other options', () => {
    const { records } = lines({ json: true, quiet: true }, false);
    expect(records.map((r) => 'type' in r && r.type)).toEqual([
      'state',
      'state',
      'point',
      'problem',
      'notice',
      'status',
    ]);
    expect(JSON.parse(JSON.stringify(records[2]))).toEqual({
      type: 'point',
      device: '/d',
      volume: 'v',
      id: '#7',
      seq: 7,
      time: '2023-11-14T22:13:27.000000000Z',
      class: 'crash',
      coverage: 'exact',
      blocks: 3,
      storedBytes: 1000,
      ageMs: 12.346,
    });
    expect(records[3]).toMatchObject({ message: 'it\nhurts', hint: 'Rest.' });
  });

  it('knows the journal by the file behind the descriptor', () => {
    const fd = openSync('/dev/null', 'r');
    try {
      const { dev, ino } = fstatSync(fd, { bigint: true });
      expect(isJournal({ JOURNAL_STREAM: `${dev}:${ino}` }, fd)).toBe(true);
      expect(isJournal({ JOURNAL_STREAM: `${dev}:${ino + 1n}` }, fd)).toBe(false);
      expect(isJournal({ JOURNAL_STREAM: 'x' }, fd)).toBe(false);
      expect(isJournal({}, fd)).toBe(false);
    } finally {
      closeSync(fd);
    }
  });
});
