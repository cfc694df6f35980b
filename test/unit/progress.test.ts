import { expect, it } from 'vitest';
import type { B2Event } from '../../src/events.js';
import { startProgress } from '../../src/progress.js';
import { ManualClock } from '../support/manual-clock.js';

function started(totalBytes?: number) {
  const clock = new ManualClock();
  const events: B2Event[] = [];
  const progress = startProgress({
    phase: 'reading',
    totalBytes,
    clock,
    events: (event) => void events.push(event),
  });
  return { clock, events, progress };
}

it('sends a first event at once, then not more often than asked', () => {
  const { clock, events, progress } = started(1000);
  expect(events).toEqual([
    { type: 'progress', phase: 'reading', doneBytes: 0, totalBytes: 1000, rateBytesPerSecond: 0 },
  ]);
  for (let i = 0; i < 100; i += 1) {
    clock.advanceMs(10);
    progress.add(1);
  }
  expect(events).toHaveLength(6);
});

it('knows rate and rest', () => {
  const { clock, events, progress } = started(1000);
  clock.advanceMs(1000);
  progress.add(250);
  expect(events.at(-1)).toEqual({
    type: 'progress',
    phase: 'reading',
    doneBytes: 250,
    totalBytes: 1000,
    rateBytesPerSecond: 250,
    etaSeconds: 3,
  });
});

it('follows a change of speed within some seconds', () => {
  const { clock, events, progress } = started(1_000_000);
  for (let i = 0; i < 60; i += 1) {
    clock.advanceMs(1000);
    progress.add(1000);
  }
  for (let i = 0; i < 7; i += 1) {
    clock.advanceMs(1000);
    progress.add(10);
  }
  expect(events.at(-1)).toMatchObject({ rateBytesPerSecond: 10 });
});

it('finishes once, with everything done, and no rest', () => {
  const { events, progress } = started(10);
  progress.add(10);
  progress.finish();
  progress.finish();
  expect(events).toHaveLength(2);
  expect(events.at(-1)).toMatchObject({ doneBytes: 10, etaSeconds: 0 });
});

it('has no rest where the end is not known', () => {
  const { clock, events, progress } = started();
  clock.advanceMs(1000);
  progress.add(5);
  expect(events.at(-1)).not.toHaveProperty('etaSeconds');
  expect(events.at(-1)).not.toHaveProperty('totalBytes');
});
