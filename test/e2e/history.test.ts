/** `b2 history` and `b2 diff` of the built program, on real file systems whose journals are dirty. */
import { execFileSync } from 'node:child_process';
import { createHash } from 'node:crypto';
import {
  appendFileSync,
  chmodSync,
  chownSync,
  copyFileSync,
  mkdirSync,
  readFileSync,
  readdirSync,
  renameSync,
  rmSync,
  symlinkSync,
  truncateSync,
  utimesSync,
  writeFileSync,
} from 'node:fs';
import { afterAll, beforeAll, expect, it } from 'vitest';

import { B2 } from '../support/b2.js';
import { tool } from '../support/disks.js';
import { LOOP_NEEDS, makeFileSystem, makerOf, mountDevice, newLoop } from '../support/loop.js';
import { requires } from '../support/requires.js';
import { mountsBelow, tempDir, type TempDir } from '../support/tmp.js';

const MIB = 1024 * 1024;

interface History {
  readonly fileSystem: string;
  readonly backends: readonly string[];
  readonly hasOlder: boolean;
  readonly versions: readonly {
    readonly state: string;
    readonly first: { readonly id: string };
    readonly last: { readonly id: string };
    readonly startIsExact: boolean;
    readonly endIsExact: boolean;
    readonly sha256?: string;
    readonly entry?: { readonly mode: string; readonly sizeBytes: number; readonly uid: number };
  }[];
  readonly points: Readonly<
    Record<'total' | 'looked' | 'proven' | 'inferred' | 'unknown' | 'unreadable', number>
  >;
}
interface Diff {
  readonly identical: boolean;
  readonly fileSystems: readonly { readonly compared: string; readonly notCompared: number }[];
  readonly changes: readonly {
    readonly change: string;
    readonly path: string;
    readonly from?: string;
    readonly aspects: readonly string[];
  }[];
}

const needs = {
  ...LOOP_NEEDS,
  tools: [...(LOOP_NEEDS.tools ?? []), 'unshare', 'nsenter', makerOf('ext4')],
  paths: [...(LOOP_NEEDS.paths ?? []), '/dev/fuse'],
};
const A = 'version A\n';
const B = 'version B!\n';
const SAME_SIZE = 'VERSION B?\n';
const TIME = new Date('2024-05-06T07:08:09Z');
const sha256 = (text: string): string => createHash('sha256').update(text).digest('hex');

requires(needs).describe('the history of a file on ext4', () => {
  let dir: TempDir;
  let b2: B2;

  beforeAll(async () => {
    dir = tempDir();
    b2 = new B2(dir);
    const loop = await newLoop(dir, 'disk', 64 * MIB);
    await makeFileSystem('ext4', loop.device);
    const mount = await mountDevice(dir, loop.device, 'source');
    const file = `${mount.path}/etc/conf`;
    const put = (text: string): void => {
      writeFileSync(file, text);
      utimesSync(file, TIME, TIME);
    };
    await b2.json(['init', '--encryption', 'none']);
    // What a power cut would leave: the last changes are in the journal only.
    const point = async (name: string): Promise<void> => {
      execFileSync('sync', ['-f', mount.path]);
      copyFileSync(loop.file, dir.join('image'));
      await b2.json(['snapshot', dir.join('image'), '--volume', 'host/disk', '--name', name]);
    };
    await point('s1');
    mkdirSync(`${mount.path}/etc/rc.d`, { recursive: true });
    mkdirSync(`${mount.path}/old/sub`, { recursive: true });
    writeFileSync(`${mount.path}/old/sub/one`, 'one');
    writeFileSync(`${mount.path}/etc/gone`, 'gone');
    put(A);
    await point('s2');
    writeFileSync(`${mount.path}/etc/rc.d/other`, 'something else');
    await point('s3');
    put(B);
    await point('s4');
    put(SAME_SIZE); // the same size and time as B
    await point('s5');
    put(A); // all as it was, but for its change time
    await point('s6');
    rmSync(file);
    await point('s7');
    put(A);
    chmodSync(file, 0o600);
    chownSync(file, 12, 34);
    renameSync(`${mount.path}/old`, `${mount.path}/new`);
    appendFileSync(`${mount.path}/new/sub/one`, ' and more');
    rmSync(`${mount.path}/etc/gone`);
    renameSync(`${mount.path}/etc/rc.d/other`, `${mount.path}/etc/moved`);
    symlinkSync('conf', `${mount.path}/etc/link`);
    await mount.unmount();
    copyFileSync(loop.file, dir.join('image'));
    for (const name of ['s8', 's9'])
      await b2.json(['snapshot', dir.join('image'), '--volume', 'host/disk', '--name', name]);
  });
  afterAll(() => dir.remove());

  const history = (...args: readonly string[]): Promise<History> =>
    b2.json<History>(['history', 'host/disk:/etc/conf', ...args]);

  it('shows every version, newest first, and when it was not there', async () => {
    const found = await history();
    expect(
      found.versions.map((v) => [v.state, v.first.id, v.last.id, v.sha256, v.entry?.mode]),
    ).toEqual([
      ['present', '#8', '#9', sha256(A), '0600'],
      ['absent', '#7', '#7', undefined, undefined],
      ['present', '#6', '#6', sha256(A), '0644'],
      ['present', '#5', '#5', sha256(SAME_SIZE), '0644'],
      ['present', '#4', '#4', sha256(B), '0644'],
      ['present', '#2', '#3', sha256(A), '0644'],
      ['absent', '#1', '#1', undefined, undefined],
    ]);
    expect(found.versions.every((v) => v.startIsExact && v.endIsExact)).toBe(true);
    expect(found.versions[0]?.entry).toMatchObject({ sizeBytes: A.length, uid: 12 });
    // The two points after the unmount are the same in every block: one look told both.
    expect(found.points).toEqual({
      total: 9,
      looked: 8,
      proven: 1,
      inferred: 0,
      unknown: 0,
      unreadable: 0,
    });
    expect(found.fileSystem).toBe('disk');
    expect(mountsBelow(dir.path)).toEqual([]);
  });

  it('any version comes back by the id that is shown', async () => {
    const printed = await b2.run('cat', 'host/disk:/etc/conf', '--at', '#4');
    expect(printed.stdout).toBe(B);
  });

  it('shows the newest versions only, or those of a time', async () => {
    const newest = await history('--limit', '2');
    expect(newest.versions.map((v) => [v.state, v.first.id, v.last.id])).toEqual([
      ['present', '#8', '#9'],
      ['absent', '#7', '#7'],
    ]);
    expect(newest.hasOlder).toBe(true);
    const between = await history('--since', 's3', '--until', 's5', '--points', 'snapshots');
    expect(between.versions.map((v) => [v.first.id, v.last.id])).toEqual([
      ['#5', '#5'],
      ['#4', '#4'],
      ['#3', '#3'],
    ]);
    const plain = await b2.run('history', 'host/disk:/etc/conf', '--limit', '1');
    expect(plain.stdout).toContain(sha256(A).slice(0, 12));
    expect(plain.stdout).toContain('There are older versions');
    expect(plain.stdout).toContain("b2 cat 'host/disk:/etc/conf' --at '#9'");
  });

  it('says where there is nothing', async () => {
    const error = await b2.error(['history', 'host/disk:/etc/nothing', '--since', 's8']);
    expect(error).toMatchObject({ code: 4 });
    expect(error.message).toContain('/etc/nothing');
    expect(await b2.error(['history', 'host/disk'])).toMatchObject({ code: 2 });
  });

  const diff = (from: string, to: string, ...args: readonly string[]): Promise<Diff> =>
    b2.json<Diff>(['diff', 'host/disk', '--from', from, '--to', to, ...args]);
  const short = ({ changes }: Diff): unknown[] =>
    changes.map((c) => [c.change, c.from ?? '', c.path, c.aspects.join(' ')]);

  it('tells added, removed, changed and renamed files', async () => {
    const found = await diff('s6', 's8');
    expect(found.identical).toBe(false);
    // A file that was deleted and made anew is the same one by its name.
    expect(short(found)).toEqual(
      [
        ['changed', '', '/etc/conf', 'mode owner'],
        ['removed', '', '/etc/gone', ''],
        ['added', '', '/etc/link', ''],
        ['renamed', '/etc/rc.d/other', '/etc/moved', ''],
        ['renamed', '/old', '/new', ''],
        ['removed', '', '/old/sub/one', ''],
        ['added', '', '/new/sub/one', ''],
      ].sort((a, b) => ((a[2] ?? '') < (b[2] ?? '') ? -1 : 1)),
    );
    const plain = await b2.run('diff', 'host/disk:/etc', '--from', 's6', '--to', 's8');
    expect(plain.stdout).toContain('R /etc/rc.d/other -> /etc/moved');
    expect(plain.stdout).not.toContain('/new');
  });

  it('compares content where size and time are the same', async () => {
    const quick = await diff('s4', 's5');
    expect(short(quick)).toEqual([['changed', '', '/etc/conf', 'ctime']]);
    expect(quick.fileSystems[0]?.notCompared).toBe(1);
    const whole = await diff('s4', 's5', '--content');
    expect(short(whole)).toEqual([['changed', '', '/etc/conf', 'content ctime']]);
    const same = await diff('s3', 's6', '--content');
    expect(short(same)).toEqual([['changed', '', '/etc/conf', 'ctime']]);
  });

  it('looks into nothing where no block changed', async () => {
    const found = await b2.json<Diff & { backends: unknown[] }>([
      'diff',
      'host/disk',
      '--from',
      's8',
    ]);
    expect(found).toMatchObject({ identical: true, changes: [], backends: [] });
    expect(await b2.error(['diff', 'host/disk:/no', '--from', 's6'])).toMatchObject({ code: 4 });
    expect(await b2.error(['diff', 'host/disk'])).toMatchObject({ code: 2 });
  });
});

requires({
  ...needs,
  tools: [...needs.tools, 'sfdisk', 'mke2fs', makerOf('btrfs')],
}).describe('history and diff of a disk with several file systems', () => {
  let dir: TempDir;
  let b2: B2;
  let firstPacks: readonly string[];

  const packs = (): readonly string[] =>
    readdirSync(dir.join('repo/packs'), { recursive: true, withFileTypes: true })
      .filter((e) => e.isFile())
      .map((e) => `${e.parentPath}/${e.name}`);

  beforeAll(async () => {
    dir = tempDir();
    b2 = new B2(dir);
    await b2.json(['init', '--encryption', 'none']);
    const uuid = '11111111-2222-3333-4444-55555555555';
    for (const [name, text] of [
      ['s1', 'one\n'],
      ['s2', 'two, longer\n'],
    ] as const) {
      rmSync(dir.join('tree'), { recursive: true, force: true });
      mkdirSync(dir.join('tree/etc'), { recursive: true });
      writeFileSync(dir.join('tree/etc/conf'), text);
      for (const [file, size] of [
        ['p1', 32],
        ['p2', 128],
        ['disk', 164],
      ] as const) {
        rmSync(dir.join(file), { force: true });
        writeFileSync(dir.join(file), '');
        truncateSync(dir.join(file), size * MIB);
      }
      tool('mke2fs', [
        '-q',
        '-F',
        '-t',
        'ext4',
        '-U',
        `${uuid}5`,
        '-d',
        dir.join('tree'),
        dir.join('p1'),
      ]);
      tool('mkfs.btrfs', [
        '-q',
        '-f',
        '-U',
        `${uuid}6`,
        '--rootdir',
        dir.join('tree'),
        dir.join('p2'),
      ]);
      tool('sfdisk', ['-q', dir.join('disk')], 'label: gpt\nstart=1MiB,size=32MiB\nsize=128MiB\n');
      for (const [file, at] of [
        ['p1', 1],
        ['p2', 33],
      ] as const)
        tool('dd', [
          `if=${dir.join(file)}`,
          `of=${dir.join('disk')}`,
          'bs=1M',
          `seek=${at}`,
          'conv=notrunc,sparse',
          'status=none',
        ]);
      await b2.json(['snapshot', dir.join('disk'), '--volume', 'host/disk', '--name', name]);
      if (name === 's1') firstPacks = packs();
    }
  });
  afterAll(() => dir.remove());

  it('finds the versions in the file system that is named', async () => {
    for (const [place, fileSystem] of [
      ['p1:/etc/conf', 'p1'],
      ['p2/etc/conf', 'p2'],
    ] as const) {
      const found = await b2.json<History>(['history', `host/disk:${place}`]);
      expect(found).toMatchObject({ fileSystem, backends: ['kernel'] });
      expect(found.versions.map((v) => v.sha256)).toEqual([
        sha256('two, longer\n'),
        sha256('one\n'),
      ]);
    }
  });

  it('compares each of them', async () => {
    const diff = await b2.json<Diff>(['diff', 'host/disk', '--from', 's1', '--to', 's2']);
    expect(diff.fileSystems.length).toBe(2);
    expect(diff.changes.map((c) => `${c.change} ${c.path}`)).toHaveLength(2);
    expect(diff.changes.every((c) => c.change === 'changed' && c.path.endsWith('/etc/conf'))).toBe(
      true,
    );
  });

  it('says what cannot be told where packs are damaged, and guesses nothing', async () => {
    for (const pack of firstPacks) {
      const bytes = readFileSync(pack);
      bytes.fill(0xaa, 128, Math.max(128, Math.floor(bytes.length * 0.9)));
      writeFileSync(pack, bytes);
    }
    const found = await b2.json<History>(['history', 'host/disk:p1:/etc/conf'], 3);
    expect(found.versions.map((v) => v.state)).toContain('unreadable');
    expect(found.versions.every((v) => v.state === 'unreadable' || v.sha256 !== undefined)).toBe(
      true,
    );
    expect(await b2.error(['diff', 'host/disk', '--from', 's1', '--to', 's2'])).toMatchObject({
      code: 5,
      message: expect.stringMatching(/pack [0-9a-f]{32}/) as string,
    });
  });
});
