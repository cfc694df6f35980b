/** `b2 boot` and `b2 verify --boot --fsck` of the built program: a disk with a kernel and busybox, started from a repository. */
import { mkdirSync, readFileSync, readdirSync, rmSync } from 'node:fs';
import { afterAll, beforeAll, expect, it } from 'vitest';
import { isPng } from '../../src/boot/png.js';
import type { BootAnswer } from '../../src/commands/run/boot.js';
import type { VerifyAnswer } from '../../src/commands/run/verify.js';
import { findGuestKernel, findStaticBusybox } from '../../src/files/guest.js';
import { B2 } from '../support/b2.js';
import {
  BOOT_NEEDS,
  FIXTURE_PROMPT,
  FIXTURE_ROOT_BYTES,
  bootableDisk,
} from '../support/boot-fixture.js';
import { tool } from '../support/disks.js';
import { missing, requires } from '../support/requires.js';
import { tempDir, type TempDir } from '../support/tmp.js';

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

/** The root of the disk as `b2 serve nbd` with these options serves it: the file that counts boots, and whether its journal is empty. */
async function rootOf(
  options: readonly string[],
): Promise<{ readonly boots: string; readonly isClean: boolean }> {
  const { child, ended } = b2.start(['--json', 'serve', 'nbd', 'fixture', ...options]);
  const line = await new Promise<string>((resolve) => child.stdout?.once('data', resolve));
  const { uri } = JSON.parse(line) as { readonly uri: string };
  const copy = dir.join('copy.img');
  tool('qemu-img', ['convert', '-O', 'raw', uri, copy]);
  child.kill('SIGTERM');
  expect((await ended).code).toBe(0);
  const root = `${copy}?offset=${FIXTURE_ROOT_BYTES}`;
  const boots = tool('debugfs', ['-R', 'cat /boots', root]);
  const isClean = !tool('dumpe2fs', ['-h', root]).includes('needs_recovery');
  rmSync(copy);
  return { boots, isClean };
}

beforeAll(async () => {
  if (missing(NEEDS) !== undefined) return;
  dir = tempDir();
  mkdirSync(dir.join('tmp'));
  b2 = new B2(dir, { B2_PASSWORD: 'a password of the test', TMPDIR: dir.join('tmp') });
  const disk = await bootableDisk(dir);
  expect(await b2.run('init', '--quiet')).toMatchObject({ code: 0 });
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
    const overlay = dir.join('overlay');
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
      overlay,
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
    expect(answer).toMatchObject({ ok: true, disk: 'virtio', screenshot: screen });
    expect(answer.passed.map((p) => p.check).sort()).toEqual(['command', 'console', 'port']);
    expect(answer.console).toContain('boots: 1');
    expect(answer.writtenBytes).toBeGreaterThan(0);
    expect(isPng(readFileSync(screen))).toBe(true);
    process.stderr.write(`booted in ${answer.seconds.toFixed(1)} s by ${answer.accelerator}\n`);
    await nothingLeft();
    // What it wrote is in the overlay, whole: it was switched off by its power button. And nowhere near the repository.
    const found = await rootOf(['--overlay', overlay]);
    expect(found).toMatchObject({ boots: 'x\n', isClean: true });
    expect(await rootOf([])).toMatchObject({ boots: '' });
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
        message:
          'no machine started from point #1 of volume fixture: after 1 s its console has not said "never said"',
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

/** Firmware alone takes half a minute without KVM: not by default. */
const UEFI = process.env['B2_TEST_BOOT_UEFI'] === '1';

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
