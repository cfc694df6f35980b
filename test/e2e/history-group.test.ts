/** `b2 history`, `b2 diff` and `b2 ls` of files that lie on two volumes: versions are those of the instants that both have. */
import { writeFileSync } from 'node:fs';
import { afterAll, beforeAll, expect, it } from 'vitest';

import { systemClock } from '../../src/clock.js';
import { B2 } from '../support/b2.js';
import { captureGroup } from '../support/group-points.js';
import {
  attachLoop,
  LOOP_NEEDS,
  mountDevice,
  runTool,
  sparseFile,
  type Mount,
} from '../support/loop.js';
import { requires } from '../support/requires.js';
import { tempDir, type TempDir } from '../support/tmp.js';

const needs = {
  ...LOOP_NEEDS,
  tools: [...(LOOP_NEEDS.tools ?? []), 'mkfs.btrfs', 'btrfs', 'unshare', 'nsenter'],
  paths: [...(LOOP_NEEDS.paths ?? []), '/dev/fuse'],
};
const MIB = 1024 * 1024;
const SECOND_NS = 1_000_000_000n;

requires(needs).describe('versions of files on two volumes', () => {
  let dir: TempDir;
  let b2: B2;

  beforeAll(async () => {
    dir = tempDir();
    b2 = new B2(dir);
    await b2.json(['init', '--encryption', 'none']);
    const files = { a: sparseFile(dir, 'a', 128 * MIB), b: sparseFile(dir, 'b', 128 * MIB) };
    const devices: string[] = [];
    for (const file of Object.values(files)) devices.push((await attachLoop(dir, file)).device);
    await runTool('mkfs.btrfs', '-q', '-f', '-m', 'raid1', '-d', 'raid0', ...devices);
    await runTool('btrfs', 'device', 'scan', ...devices);
    const mount: Mount = await mountDevice(dir, devices[0] ?? '', 'original');
    const write = async (name: string, text: string): Promise<void> => {
      writeFileSync(`${mount.path}/${name}`, text.repeat(40_000));
      await runTool('sync', '--file-system', mount.path);
    };
    const first = systemClock.nowNs() - 100n * SECOND_NS;
    const capture = (n: bigint, which: Readonly<Record<string, string>>): Promise<unknown> =>
      captureGroup(b2.repository, which, first + n * SECOND_NS);
    await write('file', 'one ');
    await capture(1n, files); // #1 of both
    await write('other', 'noise ');
    await capture(2n, files); // #2
    await write('file', 'two ');
    await capture(3n, { a: files.a }); // #3 of a alone
    await capture(4n, files); // #4 of a, #3 of b
    await write('other', 'more noise ');
    await capture(5n, { b: files.b }); // #4 of b alone
    await capture(6n, files); // #5 of both
    await mount.unmount();
    await runTool('btrfs', 'device', 'scan', '--forget', ...devices);
  });
  afterAll(() => dir.remove());

  interface History {
    readonly versions: readonly {
      readonly state: string;
      readonly first: { readonly id: string };
      readonly last: { readonly id: string };
      readonly entry?: { readonly sizeBytes: number };
      readonly reason?: string;
    }[];
  }
  const versionsOf = async (place: string): Promise<unknown> => {
    // Points of one volume alone cannot be told: partial.
    const found = await b2.json<History>(['history', place, '--looks', 'all'], 3);
    return found.versions.map((v) => [v.state, v.first.id, v.last.id, v.entry?.sizeBytes]);
  };

  it('are told for the instants that both have, and for no other', async () => {
    const [one, two] = [160_000, 160_000];
    expect(await versionsOf('lab/a:disk:/file')).toEqual([
      ['present', '#4', '#5', two],
      ['unreadable', '#3', '#3', undefined],
      ['present', '#1', '#2', one],
    ]);
    expect(await versionsOf('lab/b:disk:/file')).toEqual([
      ['present', '#5', '#5', two],
      ['unreadable', '#4', '#4', undefined],
      ['present', '#3', '#3', two],
      ['present', '#1', '#2', one],
    ]);
  });

  interface Diff {
    readonly identical: boolean;
    readonly changes: readonly {
      readonly change: string;
      readonly path: string;
      readonly aspects: readonly string[];
    }[];
  }

  it('differ between two of them; where one is not of an instant of both, that is said', async () => {
    const diff = await b2.json<Diff>(['diff', 'lab/a', '--from', '#2', '--to', '#4', '--content']);
    expect(diff.changes.map((c) => [c.change, c.path, c.aspects.includes('content')])).toEqual([
      ['changed', '/file', true],
    ]);
    const refused = await b2.error(['diff', 'lab/a', '--from', '#3', '--to', '#4']);
    expect(refused.message).toMatch(
      /disk: the btrfs .* is not shown: lab\/b has no point of that instant/,
    );
    const ended = await b2.run('cat', 'lab/a:disk:/file', '--at', '#3');
    expect([ended.code, ended.stdout]).toEqual([1, '']);
    expect(ended.stderr).toContain('lab/b has no point of that instant');
  });
});
