/** The backend `vm` of `b2 ls`, `cat` and `restore --path`: for a user without privileges, and for what the kernel here may not read. */
import { execFileSync } from 'node:child_process';
import {
  chmodSync,
  chownSync,
  existsSync,
  mkdirSync,
  readFileSync,
  readdirSync,
  statSync,
  writeFileSync,
} from 'node:fs';
import { afterAll, beforeAll, expect, it } from 'vitest';

import { findGuestKernel } from '../../src/files/guest.js';
import { B2, PROGRAM } from '../support/b2.js';
import { tool } from '../support/disks.js';
import { changeTree, differences, growTree, TREE_NEEDS } from '../support/file-tree.js';
import { LOOP_NEEDS, mountDevice, newLoop } from '../support/loop.js';
import { requires } from '../support/requires.js';
import { tempDir, type TempDir } from '../support/tmp.js';

const MIB = 1024 * 1024;
const hasKernel = (await findGuestKernel()) !== undefined;

const needs = {
  ...LOOP_NEEDS,
  tools: [
    ...(LOOP_NEEDS.tools ?? []),
    ...(TREE_NEEDS.tools ?? []),
    'qemu-system-x86_64',
    'busybox',
    'lvm',
    'mkfs.vfat',
    'mkfs.ntfs',
    'ntfscp',
    'mcopy',
    'mkfs.xfs',
    'setpriv',
  ],
  also: () => (hasKernel ? undefined : 'a kernel in /boot with modules'),
};

interface Listed {
  readonly fileSystems: readonly { readonly name: string; readonly type: string }[];
  readonly backends: readonly string[];
  readonly entries?: readonly { readonly path: string }[];
}

/**
 * An LVM physical volume with a logical volume `home` in it, an ext4 of `lv`, and `old`, a snapshot of that; made without the
 * kernel's device mapper, so the snapshot comes into the metadata as a text.
 */
function makeVolumeGroup(device: string, lv: string, scratch: string): void {
  const config = `devices{use_devicesfile=0 filter=["a|^${device}$|","r|.*|"] obtain_device_list_from_udev=0 external_device_info_source="none"} backup{backup=0 archive=0} global{activation=0}`;
  const lvm = (command: string, ...args: readonly string[]): string =>
    tool('lvm', [command, '--config', config, ...args]);
  lvm('pvcreate', '-qq', '-ff', '-y', device);
  lvm('vgcreate', '-qq', 'b2test', device);
  lvm('lvcreate', '-qq', '-an', '-Zn', '-Wn', '-y', '-n', 'home', '-L', '24M', 'b2test');
  lvm('lvcreate', '-qq', '-an', '-Zn', '-Wn', '-y', '-n', 'old', '-L', '8M', 'b2test');
  lvm('vgcfgbackup', '-qq', '-f', scratch, 'b2test');
  const joined = `\tlogical_volumes {
snapshot0 {
id = "aaaaaa-aaaa-aaaa-aaaa-aaaa-aaaa-aaaaaa"
status = ["READ", "WRITE", "VISIBLE"]
segment_count = 1
segment1 {
start_extent = 0
extent_count = 6
type = "snapshot"
chunk_size = 8
origin = "home"
cow_store = "old"
}
}
`;
  const text = readFileSync(scratch, 'utf8');
  writeFileSync(scratch, text.replace(/^\s*logical_volumes \{\n/m, joined));
  lvm('vgcfgrestore', '-qq', '-f', scratch, 'b2test');
  const start = lvm(
    'pvs',
    '-qq',
    '-o',
    'pe_start',
    '--units',
    'b',
    '--nosuffix',
    '--noheadings',
    device,
  );
  tool('dd', [
    `if=${lv}`,
    `of=${device}`,
    'bs=1M',
    `seek=${Number(start)}`,
    'oflag=seek_bytes',
    'conv=notrunc,fsync',
    'status=none',
  ]);
}

requires(needs).describe('in a tiny virtual machine', () => {
  let dir: TempDir;
  let b2: B2;
  let source: string;

  beforeAll(async () => {
    dir = tempDir();
    // Users other than root must get at it.
    chmodSync(dir.path, 0o755);
    b2 = new B2(dir);
    const disk = await newLoop(dir, 'disk', 520 * MIB);
    tool('sfdisk', ['-q', disk.file], 'label: gpt\nsize=32M\nsize=32M\nsize=48M\nsize=340M\n');
    const put = (file: string, at: number): void =>
      void tool('dd', [
        `if=${file}`,
        `of=${disk.file}`,
        'bs=1M',
        `seek=${at}`,
        'conv=notrunc,sparse',
        'status=none',
      ]);
    const fat = await newLoop(dir, 'fat', 32 * MIB);
    tool('mkfs.vfat', ['-n', 'EFI', fat.file]);
    execFileSync('sh', ['-c', `echo loader | mcopy -i '${fat.file}' - '::Grub ä.cfg'`]);
    put(fat.file, 1);
    const ntfs = await newLoop(dir, 'ntfs', 32 * MIB);
    tool('mkfs.ntfs', ['--quiet', '--fast', '--force', ntfs.file]);
    execFileSync('sh', ['-c', `seq 50000 >'${dir.join('numbers')}'`]);
    tool('ntfscp', ['-q', ntfs.file, dir.join('numbers'), 'numbers.txt']);
    put(ntfs.file, 33);
    const group = await newLoop(dir, 'group', 48 * MIB);
    const lv = await newLoop(dir, 'lv', 24 * MIB);
    tool('mkfs.ext4', ['-q', '-L', 'home', '-d', '/etc/alternatives', lv.device]);
    makeVolumeGroup(group.device, lv.file, dir.join('group.txt'));
    put(group.file, 65);
    const xfs = await newLoop(dir, 'xfs', 340 * MIB);
    tool('mkfs.xfs', ['-q', xfs.device]);
    source = (await mountDevice(dir, xfs.device, 'source')).path;
    growTree(source, true);
    execFileSync('sync', ['-f', source]);
    changeTree(source);
    put(xfs.file, 113);
    await b2.json(['init', '--encryption', 'none']);
    await b2.json(['snapshot', disk.file, '--volume', 'web/sda']);
  });
  afterAll(() => dir.remove());

  it('lists the file systems, those in LVM too, and reads what only LVM can', async () => {
    const { fileSystems, backends, entries } = await b2.json<Listed>(['ls', 'web/sda:b2test/old']);
    expect(fileSystems.map((f) => `${f.name} ${f.type}`)).toEqual([
      'p1 vfat',
      'p2 ntfs',
      'p4 xfs',
      'b2test/home ext4',
      'b2test/old ext4',
    ]);
    expect(backends).toEqual(['vm']);
    expect(entries?.map((e) => e.path)).toEqual(
      ['lost+found', ...readdirSync('/etc/alternatives')].sort().map((name) => `/${name}`),
    );
  });

  it('leaves a linear logical volume to the kernel of this machine', async () => {
    const { backends, entries } = await b2.json<Listed>(['ls', 'web/sda:b2test/home:/']);
    expect(backends).toEqual(['kernel']);
    expect(entries?.length).toBe(readdirSync('/etc/alternatives').length + 1);
  });

  it('is checked by verify --fsck with all the others, and what only LVM can read through it', async () => {
    const { code, stdout } = await b2.run('--json', 'verify', 'web/sda', '--fsck');
    const { restoreTests } = JSON.parse(stdout) as {
      readonly restoreTests: readonly {
        readonly fileSystems: readonly Record<'name' | 'state' | 'message', string>[];
      }[];
    };
    const checks = restoreTests[0]?.fileSystems.map((f) => [f.name, f.state, f.message]);
    expect(code).toBe(0);
    expect(checks).toEqual([
      ['p1', 'sound', undefined],
      ['p2', 'sound', undefined],
      ['p4', 'sound', undefined],
      ['b2test/home', 'sound', undefined],
      ['b2test/old', 'sound', undefined],
    ]);
  });

  it('says what QEMU said where that ends at once, also when it takes its time for it', async () => {
    mkdirSync(dir.join('bin'));
    // Its output has ended a while before it has: b2 must not shoot it and take its own shot for the reason.
    const fake = '#!/bin/sh\nexec >&-\nsleep 0.3\necho "no such machine" >&2\nexit 3\n';
    writeFileSync(dir.join('bin/qemu-system-x86_64'), fake, { mode: 0o755 });
    const PATH = `${dir.join('bin')}:${process.env['PATH']}`;
    const error = await new B2(dir, { PATH }).error(['ls', 'web/sda:p4:/', '--backend', 'vm']);
    expect(error).toMatchObject({
      code: 1,
      message: 'QEMU ended while the tiny virtual machine started: no such machine',
    });
  });

  it.each(['SIGTERM', 'SIGINT'] as const)(
    'ends at once on %s while the machine starts, and with it the machine',
    async (signal) => {
      const said = dir.join(`pid.${signal}`);
      mkdirSync(dir.join(signal));
      // It never comes to life.
      const fake = `#!/bin/sh\necho $$ >'${said}.part'\nmv '${said}.part' '${said}'\nexec sleep 600\n`;
      writeFileSync(dir.join(signal, 'qemu-system-x86_64'), fake, { mode: 0o755 });
      const PATH = `${dir.join(signal)}:${process.env['PATH']}`;
      const started = b2.start(['ls', 'web/sda:p4:/', '--backend', 'vm'], { PATH });
      await expect.poll(() => existsSync(said), { timeout: 60_000 }).toBe(true);
      started.child.kill(signal);
      const { code, stdout, stderr } = await started.ended;
      expect({ code, stdout }).toEqual({ code: 130, stdout: '' });
      expect(stderr).toContain(`interrupted (${signal})`);
      expect(() => process.kill(Number(readFileSync(said, 'utf8')), 0)).toThrow('ESRCH');
    },
  );

  it('reads FAT, with the whole names', async () => {
    const printed = await b2.run('cat', 'web/sda:EFI:/Grub ä.cfg', '--backend', 'vm');
    expect(printed).toMatchObject({ code: 0, stdout: 'loader\n' });
  });

  it('restores a tree as it was, with what only the journal had', async () => {
    await b2.json(['restore', 'web/sda', dir.join('out'), '--path', 'p4:/', '--backend', 'vm']);
    expect(differences(source, dir.join('out'))).toBe('');
  });

  it('serves a user without privileges, here from NTFS', () => {
    mkdirSync(dir.join('mine'));
    chownSync(dir.join('mine'), 65_534, 65_534);
    // A repository that this user may read.
    execFileSync('chmod', ['-R', 'a+rX', b2.repository]);
    const said = execFileSync(
      'setpriv',
      [
        '--reuid=65534',
        '--regid=65534',
        '--clear-groups',
        process.execPath,
        PROGRAM,
        'restore',
        'web/sda',
        dir.join('mine/out'),
        '--path',
        'p2:/numbers.txt',
      ],
      {
        encoding: 'utf8',
        stdio: 'pipe',
        env: { ...b2.env, B2_CACHE_DIR: dir.join('mine/cache'), HOME: dir.join('mine') },
      },
    );
    expect(said).toContain('not root');
    const restored = dir.join('mine/out/numbers.txt');
    expect(readFileSync(restored, 'utf8')).toBe(readFileSync(dir.join('numbers'), 'utf8'));
    expect(statSync(restored).uid).toBe(65_534);
  });

  it('tells the versions of a file, and restores one over another only when told to', async () => {
    execFileSync('sh', ['-c', `echo newer | mcopy -o -i '${dir.join('fat')}' - '::Grub ä.cfg'`]);
    tool('dd', [
      `if=${dir.join('fat')}`,
      `of=${dir.join('disk')}`,
      'bs=1M',
      'seek=1',
      'conv=notrunc',
      'status=none',
    ]);
    await b2.json(['snapshot', dir.join('disk')]);
    const found = await b2.json<{
      readonly backends: readonly string[];
      readonly versions: readonly { readonly entry?: { readonly sizeBytes: number } }[];
    }>(['history', 'web/sda:p1:/Grub ä.cfg', '--backend', 'vm']);
    expect(found.backends).toEqual(['vm']);
    expect(found.versions.map((v) => v.entry?.sizeBytes).sort()).toEqual([6, 7]);
    mkdirSync(dir.join('here'));
    const file = dir.join('here/Grub ä.cfg');
    const restore = [
      'restore',
      'web/sda',
      dir.join('here'),
      '--path',
      'p1:/Grub ä.cfg',
      '--backend',
      'vm',
    ];
    writeFileSync(file, 'mine\n');
    expect(await b2.error(restore)).toMatchObject({ code: 1 });
    expect(readFileSync(file, 'utf8')).toBe('mine\n');
    expect(await b2.json([...restore, '--force'])).toMatchObject({
      tree: { backend: 'vm', replaced: 1 },
    });
    expect(readFileSync(file, 'utf8')).toBe('newer\n');
  });
});
