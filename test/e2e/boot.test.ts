/**
 * `b2 boot` and `b2 verify --boot --fsck` of the built program: a disk with a kernel and busybox, started from a repository. Where loop devices
 * can be had it is of a group with two more, which carry one btrfs.
 */
import { createHash } from 'node:crypto';
import {
  closeSync,
  fsyncSync,
  mkdirSync,
  openSync,
  readFileSync,
  readdirSync,
  rmSync,
  writeFileSync,
  writeSync,
} from 'node:fs';
import { afterAll, beforeAll, expect, it } from 'vitest';
import { isPng } from '../../src/boot/png.js';
import type { BootAnswer } from '../../src/commands/run/boot.js';
import type { VerifyAnswer } from '../../src/commands/run/verify.js';
import { findGuestKernel, findStaticBusybox } from '../../src/files/guest.js';
import { B2, jsonLines } from '../support/b2.js';
import {
  BOOT_NEEDS,
  FIXTURE_PROMPT,
  FIXTURE_ROOT_BYTES,
  bootableDisk,
} from '../support/boot-fixture.js';
import { systemClock, systemRandom } from '../../src/clock.js';
import { openDisks } from '../../src/commands/run/boot-disks.js';
import { currentIdentity } from '../../src/process-identity.js';
import { choosePointSet } from '../../src/repo/point-set.js';
import { Repository } from '../../src/repo/repository.js';
import { openStore } from '../../src/repo/store-url.js';
import { findVolume, listVolumes } from '../../src/repo/volume.js';
import { noise, tool } from '../support/disks.js';
import { LOOP_NEEDS, mountDevice, newLoop, runTool } from '../support/loop.js';
import { missing, requires, type Needs } from '../support/requires.js';
import { tempDir, type TempDir } from '../support/tmp.js';
import { Watching } from '../support/watching.js';

const kernel = await findGuestKernel();
const NEEDS = {
  ...BOOT_NEEDS,
  tools: [...(BOOT_NEEDS.tools ?? []), 'qemu-img', 'debugfs', 'dumpe2fs'],
  also: () =>
    kernel === undefined
      ? 'a kernel in /boot'
      : findStaticBusybox() === undefined
        ? 'a static busybox'
        : undefined,
};
const GROUP_NEEDS: Needs = {
  ...NEEDS,
  ...LOOP_NEEDS,
  tools: [...NEEDS.tools, ...(LOOP_NEEDS.tools ?? []), 'mkfs.btrfs'],
};
const hasGroup = missing(GROUP_NEEDS) === undefined;
const MIB = 1024 * 1024;
const PASSWORD = 'a password of the test';
/** A machine without KVM that has other things to do takes its time. */
const PATIENCE = ['--timeout', '240s', '--memory', '256M'];

let dir: TempDir;
let b2: B2;

/** Processes that have the test's directory in their command line: QEMU names its sockets in it. */
function leftOver(): readonly string[] {
  return readdirSync('/proc')
    .filter((pid) => /^\d+$/.test(pid))
    .flatMap((pid) => {
      try {
        const text = readFileSync(`/proc/${pid}/cmdline`, 'latin1').replaceAll('\0', ' ');
        return text.includes(dir.join('tmp')) ? [text] : [];
      } catch {
        return [];
      }
    });
}

async function nothingLeft(): Promise<void> {
  while (leftOver().length > 0) await new Promise((resolve) => setTimeout(resolve, 50));
  expect(readdirSync(dir.join('tmp'))).toEqual([]);
}

/** Copies the first disk of `fixture` as a machine would have it: with what was kept in `overlay`. */
async function copyOf(copy: string, overlay?: string): Promise<void> {
  const store = await openStore(b2.repository);
  const env = { clock: systemClock, random: systemRandom, owner: currentIdentity() };
  const secret = { kind: 'password', password: PASSWORD, source: 'the test' } as const;
  const repo = await Repository.open(store, [secret], env, () => undefined);
  try {
    const volumes = await listVolumes(repo, () => undefined);
    const tell = { warn: () => undefined, note: () => undefined };
    const when = { kind: 'latest' } as const;
    const set = await choosePointSet(repo, volumes, findVolume(volumes, 'fixture'), when, tell);
    const [disk, ...others] = await openDisks(repo, set, overlay);
    if (disk === undefined) throw new Error('no disk');
    const image = (await disk.overlay?.(disk.image)) ?? disk.image;
    const fd = openSync(copy, 'w');
    for (let at = 0; at < image.sizeBytes; at += MIB) {
      const bytes = Buffer.alloc(Math.min(MIB, image.sizeBytes - at));
      await image.read(bytes, at);
      writeSync(fd, bytes);
    }
    closeSync(fd);
    await image.close();
    for (const other of others) await other.image.close();
    await set.close();
  } finally {
    await repo.close();
  }
}

/** Of the root of the disk: the file that counts boots, and whether its journal is empty. */
async function rootOf(
  overlay?: string,
): Promise<{ readonly boots: string; readonly isClean: boolean }> {
  const copy = dir.join('copy.img');
  await copyOf(copy, overlay);
  const root = `${copy}?offset=${FIXTURE_ROOT_BYTES}`;
  const boots = tool('debugfs', ['-R', 'cat /boots', root]);
  const isClean = !tool('dumpe2fs', ['-h', root]).includes('needs_recovery');
  rmSync(copy);
  return { boots, isClean };
}

interface Made {
  readonly time: string;
  readonly id: string;
  readonly group: { readonly others: readonly { readonly volume: string; readonly id: string }[] };
}
/** The point of all three, the second of three states of the file on data1 and data2; each of those has a later point, too. */
let together: Made;
const hashes = [1, 2, 3].map((seed) => hashOf(noise(seed, 8 * MIB)));
let booted: BootAnswer | undefined;
const overlay = (): string => dir.join('overlay');

function hashOf(bytes: Uint8Array): string {
  return createHash('sha256').update(bytes).digest('hex');
}

function put(file: string, seed: number): void {
  const fd = openSync(file, 'w');
  writeSync(fd, noise(seed, 8 * MIB));
  fsyncSync(fd);
  closeSync(fd);
  tool('sync', ['-f', file]);
}

/** One btrfs on two disks, captured together with the one that boots; then each once more by itself. */
async function captureGroup(disk: string): Promise<void> {
  const loops = [
    await newLoop(dir, 'data1.img', 128 * MIB),
    await newLoop(dir, 'data2.img', 128 * MIB),
  ];
  const [one = '', two = ''] = loops.map((l) => l.device);
  await runTool('mkfs.btrfs', '-q', '-d', 'raid0', '-m', 'raid0', one, two);
  const mount = await mountDevice(dir, one, 'srv', `device=${one},device=${two}`);
  const file = `${mount.path}/file`;
  put(file, 1);
  const config = dir.join('config.yaml');
  const device = (path: string, volume: string): string =>
    `    - device: ${path}\n      volume: ${volume}\n`;
  const devices = `${device(disk, 'fixture')}${device(one, 'data1')}${device(two, 'data2')}`;
  writeFileSync(config, `watch:\n  interval: 200ms\n  group: server\n  devices:\n${devices}`);
  const watching = new Watching(b2, [], { B2_CONFIG: config });
  try {
    await watching.until('a point of all', (l) => l.type === 'point' && l['group'] === 'server');
    put(file, 2);
    together = await b2.json<Made>(['snapshot', 'data1', '--name', 'both', '--class', 'crash']);
    watching.kill('SIGTERM');
    expect((await watching.ended).code).toBe(0);
  } finally {
    await watching.finish();
  }
  put(file, 3);
  await mount.unmount();
  for (const [path, volume] of [
    [one, 'data1'],
    [two, 'data2'],
  ] as const)
    await b2.json(['snapshot', '--volume', volume, '--name', 'later', path]);
}

beforeAll(async () => {
  if (missing(NEEDS) !== undefined) return;
  dir = tempDir();
  mkdirSync(dir.join('tmp'));
  b2 = new B2(dir, { B2_PASSWORD: PASSWORD, TMPDIR: dir.join('tmp') });
  const disk = await bootableDisk(dir, 'bios', hasGroup ? ['btrfs'] : []);
  expect(await b2.run('init', '--quiet')).toMatchObject({ code: 0 });
  if (hasGroup) return captureGroup(disk);
  expect(await b2.run('snapshot', '--quiet', '--volume', 'fixture', disk)).toMatchObject({
    code: 0,
  });
});
afterAll(async () => {
  if (missing(NEEDS) === undefined) await dir.remove();
});

requires(NEEDS).describe('b2 boot', () => {
  it('starts a disk from the repository, checks it in every way, shows its screen and keeps what it wrote', async () => {
    const screen = dir.join('screen.png');
    const done = await b2.run(
      '--json',
      'boot',
      'fixture',
      '--check',
      FIXTURE_PROMPT,
      '--port',
      '80',
      '--command',
      // What the guest's web server says comes from its disk.
      'test "$(busybox wget -qO- http://127.0.0.1:$B2_PORT/)" = "boots: 1"',
      '--overlay',
      overlay(),
      '--screenshot',
      screen,
      ...PATIENCE,
    );
    const [start = '', ...rest] = done.stdout.split('\n');
    expect(JSON.parse(start)).toMatchObject({
      type: 'booting',
      volume: 'fixture',
      firmware: 'bios',
      hostPort: expect.any(Number) as number,
    });
    const answer = JSON.parse(rest.join('\n')) as BootAnswer;
    expect(answer.why).toBe(undefined);
    expect(done.code).toBe(0);
    booted = answer;
    expect(answer).toMatchObject({ ok: true, disk: 'virtio', screenshot: screen });
    expect(answer.passed.map((p) => p.check).sort()).toEqual(['command', 'console', 'port']);
    expect(answer.console).toContain('boots: 1');
    expect(answer.writtenBytes).toBeGreaterThan(0);
    expect(isPng(readFileSync(screen))).toBe(true);
    process.stderr.write(`booted in ${answer.seconds.toFixed(1)} s by ${answer.accelerator}\n`);
    await nothingLeft();
    // What it wrote is in the overlay, whole: it was switched off by its power button. And nowhere near the repository.
    const found = await rootOf(overlay());
    expect(found).toMatchObject({ boots: 'x\n', isClean: true });
    expect(await rootOf()).toMatchObject({ boots: '' });
    expect(await b2.run('verify', '--data', 'all')).toMatchObject({ code: 0 });
  });

  it('that does not do what it should is told so, and leaves nothing', async () => {
    const done = await b2.run('boot', 'fixture', '--check', 'never said', '--timeout', '1s');
    expect(done.code).toBe(1);
    expect(done.stdout).toMatch(/failed {2}after 1 s its console has not said "never said"/);
    await nothingLeft();
  });

  it('ends with its signal, and with kill -9, without a trace', async () => {
    for (const signal of ['SIGTERM', 'SIGKILL'] as const) {
      const { child, ended } = b2.start(['--json', 'boot', 'fixture', '--headless']);
      await new Promise((resolve) => child.stdout?.once('data', resolve));
      expect(leftOver().length).toBeGreaterThan(0);
      child.kill(signal);
      const end = await ended;
      if (signal === 'SIGTERM') {
        expect(end.code).toBe(0);
        await nothingLeft();
      } else {
        expect(end.signal).toBe('SIGKILL');
        while (leftOver().length > 0) await new Promise((resolve) => setTimeout(resolve, 50));
      }
    }
  });

  it('is a restore test of verify: what does not start in time is damage', async () => {
    const answer = await b2.json<VerifyAnswer>(
      [
        'verify',
        'fixture',
        '--boot',
        '--boot-check',
        'never said',
        '--boot-timeout',
        '1s',
        '--random-point',
      ],
      5,
    );
    expect(answer.findings).toMatchObject([
      {
        severity: 'damage',
        kind: 'boot',
        message: expect.stringMatching(
          /^no machine started from point #\d+ of volume fixture: after 1 s its console has not said "never said"$/,
        ) as string,
      },
    ]);
    expect(answer.restoreTests).toMatchObject([{ volume: 'fixture', boot: { ok: false } }]);
    await nothingLeft();
  });

  it('needs a console or something to wait for', async () => {
    expect(await b2.error(['boot', 'fixture'])).toMatchObject({ code: 2 });
    expect(
      await b2.error(['boot', 'fixture', '--port', '80', '--no-network', '--headless']),
    ).toMatchObject({ code: 2, message: '--port needs a network, and --no-network takes it away' });
  });
});

/** Firmware alone takes half a minute without KVM, and every boot its time: not by default. */
const UEFI = process.env['B2_TEST_BOOT_UEFI'] === '1';

requires(GROUP_NEEDS).describe('b2 boot of a group', () => {
  it('has all disks of the one instant, and the file system that lies on two of them', () => {
    // By the boot above.
    if (booted === undefined) throw new Error('no machine was booted');
    const { disks } = booted;
    expect(booted.group).toBe('server');
    expect(booted.leftOut).toBe(undefined);
    expect(disks.map((d) => [d.volume, d.reason])).toEqual([
      ['fixture', 'asked'],
      ['data1', 'group'],
      ['data2', 'group'],
    ]);
    for (const { point, secondsBefore } of disks)
      expect([point.time, point.group, secondsBefore]).toEqual([
        together.time,
        `server@${together.time}`,
        0,
      ]);
    // The guest tells them apart by their serial numbers.
    for (const [i, { serial, volumeId }] of disks.entries()) {
      expect(serial).toBe(`b2-${volumeId.slice(0, 16)}`);
      expect(booted.console).toContain(`disk vd${'abc'[i]} ${serial}`);
    }
    expect(booted.console).toContain('srv boots: 1');
    // Its file is that of the instant: neither of the points before nor of those after.
    expect(booted.console).toContain(`srv: ${hashes[1]}`);
    for (const disk of disks) expect(disk.writtenBytes).toBeGreaterThan(0);
    expect(disks.reduce((sum, d) => sum + (d.readBytes ?? 0), 0)).toBe(booted.readBytes);
  });

  if (UEFI)
    it('goes on with what was written to all of them', async () => {
      const again = ['--overlay', overlay(), '--check', FIXTURE_PROMPT, ...PATIENCE];
      const done = await b2.run('--json', 'boot', 'fixture', ...again);
      const answer = JSON.parse(done.stdout.split('\n').slice(1).join('\n')) as BootAnswer;
      expect(answer.why).toBe(undefined);
      for (const text of ['boots: 2', 'srv boots: 2', `srv: ${hashes[1]}`])
        expect(answer.console).toContain(text);
      await nothingLeft();
    });

  it('keeps what was written to all of them together, and goes on with nothing less', async () => {
    expect(readdirSync(overlay()).sort()).toEqual(['disk0', 'disk1', 'disk2', 'disks.json']);
    const start = ['boot', 'fixture', '--headless', '--timeout', '1s', '--overlay'];
    expect(await b2.error([...start, overlay(), '--alone'])).toMatchObject({
      code: 1,
      message: expect.stringMatching(
        /keeps what a machine wrote to fixture #\d+, data1 #\d+, data2 #\d+; this one would have fixture #\d+$/,
      ) as string,
    });
    const kept = dir.join('overlay', 'disk1');
    expect(
      await b2.error(['serve', 'nbd', 'data1', '--at', together.time, '--overlay', kept]),
    ).toMatchObject({
      message: expect.stringContaining('is one of several disks of a machine') as string,
    });
    rmSync(kept);
    expect(await b2.error([...start, overlay()])).toMatchObject({ code: 5 });
    await nothingLeft();
  });

  it('without a point of the instant is left out, and said to be; --with takes another one', async () => {
    const done = await b2.run(
      '--json',
      'boot',
      'data2',
      '--at',
      'later',
      '--with',
      'fixture',
      '--headless',
      '--timeout',
      '1s',
    );
    expect(done.code).toBe(0);
    const [start = '', ...rest] = done.stdout.split('\n');
    expect(JSON.parse(start)).toMatchObject({ type: 'booting', volume: 'data2', group: 'server' });
    const answer = JSON.parse(rest.join('\n')) as BootAnswer;
    expect(answer.disks.map((d) => [d.volume, d.reason])).toEqual([
      ['data2', 'asked'],
      ['fixture', 'with'],
    ]);
    expect(answer.disks[1]?.secondsBefore).toBeGreaterThan(0);
    expect(answer.leftOut).toMatchObject([{ volume: 'data1' }]);
    const warning = jsonLines(done.stderr).find((l) => l['type'] === 'warning');
    expect(warning?.['message']).toMatch(
      /^data1 of group server is left out: it has no point of the instant of data2 #\d+/,
    );
    expect(warning?.['hint']).toContain(`--at ${together.time}`);
    expect(warning?.['hint']).toContain('--with data1');
    await nothingLeft();
    // To verify it is neither good nor damaged.
    const test = ['--boot', '--boot-check', 'never said', '--boot-timeout', '1s', '--at', 'later'];
    const proved = await b2.json<VerifyAnswer>(['verify', 'data2', ...test], 3);
    expect(proved.findings).toMatchObject([
      {
        severity: 'unreadable',
        kind: 'boot',
        message: expect.stringContaining(
          'of volume data2 without data1, fixture of its group, which have no point of that instant',
        ) as string,
      },
    ]);
    await nothingLeft();
  });
});

if (UEFI) {
  requires({ ...NEEDS, paths: ['/usr/share/OVMF'] }).describe('b2 boot by UEFI', () => {
    it('starts a disk with an EFI system partition, and goes on with its overlay', async () => {
      const disk = await bootableDisk(dir, 'uefi');
      await b2.json(['snapshot', '--volume', 'efi', disk]);
      for (const boots of [1, 2]) {
        const done = await b2.run(
          '--json',
          'boot',
          'efi',
          '--check',
          FIXTURE_PROMPT,
          '--overlay',
          dir.join('efi-overlay'),
          ...PATIENCE,
        );
        const [start = '', ...rest] = done.stdout.split('\n');
        expect(JSON.parse(start)).toMatchObject({ volume: 'efi', firmware: 'uefi' });
        const answer = JSON.parse(rest.join('\n')) as BootAnswer;
        expect(answer).toMatchObject({ ok: true });
        expect(answer.console).toContain(`boots: ${boots}`);
        await nothingLeft();
      }
    });
  });
}

requires({
  ...NEEDS,
  root: true,
  tools: [...(NEEDS.tools ?? []), 'e2fsck', 'fsck.fat', 'unshare', 'losetup'],
}).describe('b2 verify --fsck', () => {
  it('checks the file systems of a point', async () => {
    const answer = await b2.json<VerifyAnswer>(['verify', 'fixture', '--fsck']);
    expect(answer.restoreTests?.[0]?.fileSystems).toMatchObject([
      { name: 'p1', type: 'vfat', state: 'sound' },
      { name: 'p2', type: 'ext4', state: 'sound', how: 'mounted, journal replayed, e2fsck -fn' },
    ]);
    await nothingLeft();
  });
});
