import { symlinkSync, writeFileSync } from 'node:fs';
import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import { refuseHeld, type Wanted } from '../../../src/watch/held.js';
import { deviceReport, type WatchReport } from '../../../src/watch/report.js';
import type { WatchStatus } from '../../../src/watch/types.js';
import { FakeSession } from '../../support/fake-session.js';
import { tempDir, type TempDir } from '../../support/tmp.js';

let dir: TempDir;
beforeEach(() => {
  dir = tempDir();
});
afterEach(() => dir.remove());

const SINCE = '2026-11-22T10:00:00.000000000Z';
const LATER = '2026-11-22T10:00:00.000000001Z';

function other(more: Partial<WatchReport>, ...devices: Partial<WatchStatus>[]): WatchReport {
  const session = new FakeSession('/dev/a', () => undefined);
  return {
    pid: 500,
    repository: '/r',
    repositoryId: 'r1',
    since: SINCE,
    stopping: false,
    devices: devices.map((d) => deviceReport({ ...session.status(), state: 'exact', ...d })),
    ...more,
  };
}

const wanted: Wanted = {
  repositoryId: 'r1',
  volumeId: 'v1',
  volume: 'web/a',
  realPath: '/dev/a',
  self: { pid: 700, since: LATER },
};
const apart = { volumeId: 'v2', device: '/dev/b' };

describe('refuseHeld', () => {
  it('lets a device and volume pass that nobody captures to this repository', async () => {
    await refuseHeld([], wanted);
    await refuseHeld([other({}, apart)], wanted);
    await refuseHeld([other({ repositoryId: 'r2' }, { volumeId: 'v1' })], wanted);
    await refuseHeld([other({}, { state: 'failed' }, { state: 'stopped' })], wanted);
    await refuseHeld([other({ pid: 700 }, { volumeId: 'v1' })], wanted);
  });

  it.each([
    ['the volume', { ...apart, volumeId: 'v1' }],
    ['the device', { ...apart, device: '/dev/a' }],
    ['the device, of a volume not known yet', { volumeId: undefined, volume: undefined }],
    ['a device that is gone and waited for', { state: 'absent', volumeId: 'v1' }],
  ] satisfies [string, Partial<WatchStatus>][])('refuses %s', async (_, device) => {
    await expect(refuseHeld([other({}, apart), other({}, device)], wanted)).rejects.toMatchObject({
      kind: 'held',
      code: 11,
      message: `/dev/a (volume web/a) is watched already, by process 500 since ${SINCE}`,
      hint: expect.stringContaining('kill 500') as string,
    });
  });

  it('knows a device by another name', async () => {
    const file = dir.join('disk');
    writeFileSync(file, '');
    symlinkSync(file, dir.join('link'));
    const watch = other({}, { ...apart, device: dir.join('link') });
    await expect(refuseHeld([watch], { ...wanted, realPath: file })).rejects.toThrow('already');
  });

  it('lets one of two go on that start at the same time', async () => {
    const starting = { state: 'starting', volumeId: undefined } as const;
    const younger = { pid: 700, since: LATER };
    const older = { pid: 500, since: SINCE };
    const passes = (self: Wanted['self'], watch: WatchReport): Promise<boolean> =>
      refuseHeld([watch], { ...wanted, self }).then(
        () => true,
        () => false,
      );
    expect(await passes(older, other(younger, starting))).toBe(true);
    expect(await passes(younger, other(older, starting))).toBe(false);
    // By the same clock tick.
    expect(await passes({ pid: 1, since: SINCE }, other(older, starting))).toBe(true);
    expect(await passes({ pid: 900, since: SINCE }, other(older, starting))).toBe(false);
    // A device that was added later to an older watch comes after one that is captured.
    expect(await passes(older, other(younger, {}))).toBe(false);
  });

  it('says of one that is ending that it is', async () => {
    await expect(refuseHeld([other({ stopping: true }, {})], wanted)).rejects.toMatchObject({
      hint: 'Start this one when that one has ended.',
    });
  });
});
