import { symlinkSync, writeFileSync } from 'node:fs';
import { describe, expect, it } from 'vitest';
import { targetsOf } from '../../../src/commands/run/watch-targets.js';
import type { WatchInput } from '../../../src/commands/watch.js';
import { parseConfig, type Config } from '../../../src/config.js';
import { tempDir } from '../../support/tmp.js';

function input(
  devices: readonly string[],
  options: Partial<WatchInput['options']> = {},
): WatchInput {
  return {
    arguments: { devices },
    options: {
      volume: undefined,
      interval: undefined,
      source: undefined,
      'run-for': undefined,
      'freeze-limit': undefined,
      'take-over': false,
      'accept-device': false,
      group: undefined,
      freeze: undefined,
      'freeze-after': undefined,
      ...options,
    },
  };
}

const CONFIG = `
watch:
  interval: 2s
  freeze-limit: 50ms
  pre-point: /etc/b2/pre
  devices:
    - /dev/a
    - device: /dev/b
      volume: web/b
      interval: 500ms
      source: scan
      post-point: echo b
      hook-limit: 5s
`;

describe('targetsOf', () => {
  it('has defaults', () => {
    expect(targetsOf(input(['/dev/x']), {})).toMatchObject([
      {
        device: '/dev/x',
        volume: undefined,
        source: 'auto',
        intervalMs: 1000,
        freezeMs: 100,
        hookMs: 30_000,
        hasHooks: false,
      },
    ]);
  });

  it('says when file systems may be frozen', () => {
    const of = (options: Partial<WatchInput['options']>, config: Config = {}): unknown => {
      const [target] = targetsOf(input(['/dev/x'], options), config);
      return [target?.freezeMs, target?.freezeAfterMs];
    };
    expect(of({})).toEqual([100, 5000]);
    expect(of({ freeze: 'on-request' })).toEqual([100, undefined]);
    expect(of({ freeze: 'never' })).toEqual([0, undefined]);
    expect(of({ 'freeze-limit': 0 })).toEqual([0, undefined]);
    expect(of({ freeze: 'auto', 'freeze-after': 9000 }, { 'watch.freeze': 'never' })).toEqual([
      100, 9000,
    ]);
    expect(of({}, { 'watch.freeze': 'on-request', 'watch.freeze-limit': 20 })).toEqual([
      20,
      undefined,
    ]);
    expect(() => of({ 'freeze-after': 1 })).toThrow('freeze-after');
  });

  it('puts devices into groups, and none into a group of one', () => {
    const pair = { name: 'data', devices: ['/dev/x', '/dev/y'] };
    const named = targetsOf(input(['/dev/x', '/dev/y'], { group: 'data' }), {});
    expect(named.map((t) => t.group)).toEqual([pair, pair]);
    expect(() => targetsOf(input(['/dev/x'], { group: 'data' }), {})).toThrow('one device only');
    const config: Config = {
      'watch.devices': [
        { device: '/dev/x', group: 'data' },
        { device: '/dev/y', group: 'data' },
        { device: '/dev/z' },
      ],
    };
    const all = targetsOf(input([]), config);
    expect(all.map((t) => t.group)).toEqual([pair, pair, undefined]);
    // A device that is named alone is watched alone.
    expect(targetsOf(input(['/dev/x']), config)[0]?.group).toBeUndefined();
    // Another member makes it another group, and the session another one.
    const three = targetsOf(input(['/dev/x', '/dev/y', '/dev/z'], { group: 'data' }), {});
    expect(three[0]?.key).not.toBe(named[0]?.key);
    expect(() =>
      targetsOf(input([]), { 'watch.devices': [{ device: '/dev/x', group: 'data' }] }),
    ).toThrow('one device only');
  });

  it('names devices for everybody', () => {
    expect(targetsOf(input(['disk.img']), {})[0]?.device).toBe(`${process.cwd()}/disk.img`);
  });

  it("lets options win over the device's settings and these over those for all", async () => {
    const config: Config = await parseConfig(CONFIG, 'c.yaml');
    expect(targetsOf(input([]), config)).toMatchObject([
      { device: '/dev/a', intervalMs: 2000, freezeMs: 50, source: 'auto', prePoint: '/etc/b2/pre' },
      {
        device: '/dev/b',
        volume: 'web/b',
        intervalMs: 500,
        source: 'scan',
        prePoint: '/etc/b2/pre',
        postPoint: 'echo b',
        hookMs: 5000,
        hasHooks: true,
      },
    ]);
    expect(targetsOf(input([], { interval: 250, source: 'trace' }), config)).toMatchObject([
      { intervalMs: 250, source: 'trace' },
      { intervalMs: 250, source: 'trace', volume: 'web/b' },
    ]);
    // A device that is named on the command line keeps what is configured for it.
    const [named, ...others] = targetsOf(input(['/dev/b'], { volume: 'other' }), config);
    expect(named).toMatchObject({ device: '/dev/b', volume: 'other', intervalMs: 500 });
    expect(others).toEqual([]);
  });

  it('starts a session anew only for what a session cannot be told', async () => {
    const of = async (text: string): Promise<string | undefined> =>
      targetsOf(input(['/dev/a']), await parseConfig(text, 'c'))[0]?.key;
    const first = await of('watch: {interval: 1s}');
    expect(await of('watch: {pre-point: x, freeze-limit: 1s, hook-limit: 1s}')).toBe(first);
    expect(await of('watch: {interval: 2s}')).not.toBe(first);
    expect(await of('watch: {source: scan}')).not.toBe(first);
  });

  it('refuses what does not go together', async () => {
    await using dir = tempDir();
    writeFileSync(dir.join('disk'), '');
    symlinkSync(dir.join('disk'), dir.join('by-id'));
    const refused = (devices: readonly string[], options: Partial<WatchInput['options']>) => () =>
      targetsOf(input(devices, options), {});
    expect(refused([], {})).toThrow(expect.objectContaining({ kind: 'usage', code: 2 }));
    expect(refused(['/dev/a', '/dev/b'], { volume: 'x' })).toThrow(/--volume names/);
    expect(refused([dir.join('disk'), dir.join('by-id')], {})).toThrow(/are the same device/);
    expect(refused(['/dev/a'], { interval: 10 })).toThrow(/interval of \/dev\/a: 10 ms/);
    expect(refused(['/dev/a'], { 'freeze-limit': 3_600_000 })).toThrow(/freeze limit/);
    expect(refused(['/dev/a'], { source: 'nbd' })).toThrow(
      expect.objectContaining({ kind: 'unsupported', hint: expect.stringMatching(/trace/) }),
    );
  });
});
