/**
 * A small Debian-like disk that really boots, by BIOS (MBR, SYSLINUX) or by UEFI (GPT, the firmware's shell starts the kernel): a FAT
 * with this machine's kernel and an initrd, and an ext4 root with busybox, which counts its boots, writes to its disk, serves its
 * count of boots by HTTP on port 80, goes off at its power button, and shows a login prompt on the serial port. Made without root and mounts.
 * Where it finds two more disks it mounts the btrfs on both (module `btrfs`), says the hash of `file` in it, and writes there.
 */
import { execFileSync } from 'node:child_process';
import { cpSync, mkdirSync, readFileSync, symlinkSync, truncateSync, writeFileSync } from 'node:fs';
import { basename, join } from 'node:path';
import { gzipSync } from 'node:zlib';
import { cpioArchive, type CpioEntry } from '../../src/files/cpio.js';
import { findGuestKernel, findStaticBusybox, ModuleTree } from '../../src/files/guest.js';
import { tool } from './disks.js';
import type { Needs } from './requires.js';
import type { TempDir } from './tmp.js';

const MBR_CODE = '/usr/lib/syslinux/mbr/mbr.bin';
const SECTOR = 512;
const FAT_START = 2048;
const FAT_SECTORS = 65_536;
const ROOT_START = FAT_START + FAT_SECTORS;
const ROOT_SECTORS = 65_536;
/** Where its ext4 begins. */
export const FIXTURE_ROOT_BYTES = ROOT_START * SECTOR;
/** What it says when it is up. */
export const FIXTURE_PROMPT = 'fixture login:';

export const BOOT_NEEDS: Needs = {
  tools: ['qemu-system-x86_64', 'busybox', 'sfdisk', 'mkfs.fat', 'mcopy', 'syslinux', 'mke2fs'],
  paths: [MBR_CODE],
};

const INIT = `#!/bin/busybox sh
/bin/busybox mount -t devtmpfs d /dev
/bin/busybox mount -t proc p /proc
/bin/busybox mount -t sysfs s /sys
while read -r module; do /bin/busybox insmod "/m/$module"; done </m/list
i=0
while ! [ -b /dev/vda2 ] && [ $i -lt 200 ]; do /bin/busybox usleep 20000; i=$((i+1)); done
/bin/busybox mount -t ext4 /dev/vda2 /new || exec /bin/busybox sh
exec /bin/busybox switch_root /new /sbin/init
`;
const INITTAB = `::sysinit:/bin/sh /etc/rc
ttyS0::respawn:/bin/busybox getty -L 115200 ttyS0 vt100
tty1::respawn:/bin/busybox getty 38400 tty1
::ctrlaltdel:/bin/busybox reboot
::shutdown:/bin/mount -o remount,ro /
`;
const RC = `mount -t devtmpfs d /dev; mount -t proc p /proc; mount -t sysfs s /sys
hostname fixture
echo x >>/boots; sync
ip link set lo up; ip addr add 10.0.2.15/24 dev eth0 && ip link set eth0 up
mkdir -p /www; echo "boots: $(wc -l </boots)" >/www/index.html
httpd -h /www
acpid -l /dev/null
for d in /sys/block/vd?; do echo "disk \${d##*/} $(cat $d/serial)"; done
if [ -b /dev/vdc ] && mkdir -p /srv && mount -t btrfs -o device=/dev/vdb,device=/dev/vdc /dev/vdb /srv; then
  echo "srv: $(sha256sum </srv/file)"; echo x >>/srv/boots; echo "srv boots: $(wc -l </srv/boots)"; sync
fi
cat /www/index.html
`;
const APPLETS =
  'sh mount umount ls cat echo getty login init poweroff reboot sync md5sum hostname wc ip mkdir httpd acpid run-parts sha256sum';

/** What the kernel is started with. */
const COMMAND_LINE =
  'console=tty0 console=ttyS0,115200 panic=-1 net.ifnames=0 mitigations=off nokaslr loglevel=3';

/** Makes the disk; returns its path. `modules`: more modules of the kernel that it loads. */
export async function bootableDisk(
  dir: TempDir,
  firmware: 'bios' | 'uefi' = 'bios',
  modules: readonly string[] = [],
): Promise<string> {
  const kernel = await findGuestKernel();
  const busybox = findStaticBusybox();
  if (kernel === undefined || busybox === undefined)
    throw new Error('no kernel in /boot or no static busybox');
  const work = dir.join(`fixture-${firmware}`);
  mkdirSync(work);
  const disk = join(work, 'disk.img');
  writeFileSync(disk, '');
  truncateSync(disk, (ROOT_START + ROOT_SECTORS + 2048) * SECTOR);
  tool(
    'sfdisk',
    ['-q', disk],
    firmware === 'bios'
      ? `label: dos\nstart=${FAT_START},size=${FAT_SECTORS},type=6,bootable\nstart=${ROOT_START},size=${ROOT_SECTORS},type=83\n`
      : `label: gpt\nstart=${FAT_START},size=${FAT_SECTORS},type=U\nstart=${ROOT_START},size=${ROOT_SECTORS},type=L\n`,
  );
  // The FAT.
  const initrd = join(work, 'initrd.gz');
  writeFileSync(initrd, await initialArchive(kernel.modules, busybox, modules));
  const config = join(work, firmware === 'bios' ? 'syslinux.cfg' : 'startup.nsh');
  writeFileSync(
    config,
    firmware === 'bios'
      ? `DEFAULT l\nPROMPT 0\nTIMEOUT 0\nLABEL l\n KERNEL vmlinuz\n APPEND initrd=initrd.gz ${COMMAND_LINE}\n`
      : `fs0:\r\nvmlinuz.efi initrd=\\initrd.gz ${COMMAND_LINE}\r\n`,
  );
  const fat = join(work, 'fat');
  writeFileSync(fat, '');
  truncateSync(fat, FAT_SECTORS * SECTOR);
  tool('mkfs.fat', ['-F', '16', '-i', 'CAFE0001', '-h', String(FAT_START), fat]);
  for (const [from, to] of [
    [kernel.image, firmware === 'bios' ? 'vmlinuz' : 'vmlinuz.efi'],
    [initrd, 'initrd.gz'],
    [config, basename(config)],
  ] as const)
    tool('mcopy', ['-i', fat, from, `::${to}`]);
  if (firmware === 'bios') tool('syslinux', ['--install', fat]);
  tool('dd', [
    `if=${fat}`,
    `of=${disk}`,
    `seek=${FAT_START}`,
    'conv=notrunc,sparse',
    'status=none',
  ]);
  if (firmware === 'bios')
    tool('dd', [
      `if=${MBR_CODE}`,
      `of=${disk}`,
      'bs=440',
      'count=1',
      'conv=notrunc',
      'status=none',
    ]);
  // The root.
  const root = join(work, 'root');
  for (const name of ['bin', 'sbin', 'etc', 'dev', 'proc', 'sys', 'tmp', 'root', 'home'])
    mkdirSync(join(root, name), { recursive: true });
  cpSync(busybox, join(root, 'bin/busybox'));
  for (const applet of APPLETS.split(' ')) symlinkSync('busybox', join(root, 'bin', applet));
  symlinkSync('../bin/busybox', join(root, 'sbin/init'));
  writeFileSync(join(root, 'etc/inittab'), INITTAB);
  writeFileSync(join(root, 'etc/rc'), RC);
  writeFileSync(join(root, 'etc/passwd'), 'root::0:0:root:/root:/bin/sh\n');
  writeFileSync(join(root, 'etc/group'), 'root:x:0:\n');
  // The power button.
  mkdirSync(join(root, 'etc/acpi/PWRF'), { recursive: true });
  writeFileSync(join(root, 'etc/acpi/PWRF/00000080'), '#!/bin/sh\npoweroff\n', { mode: 0o755 });
  writeFileSync(join(root, 'etc/issue'), 'b2 test fixture\n');
  writeFileSync(join(root, 'home/hello.txt'), 'hello from the backup\n');
  const place = `offset=${FIXTURE_ROOT_BYTES},root_owner=0:0`;
  const size = `${(ROOT_SECTORS * SECTOR) / 1024}k`;
  tool('mke2fs', ['-q', '-t', 'ext4', '-d', root, '-L', 'root', '-E', place, disk, size]);
  return disk;
}

async function initialArchive(
  modules: string,
  busybox: string,
  more: readonly string[],
): Promise<Buffer> {
  const tree = await ModuleTree.read(modules);
  const files = tree.order([
    'virtio_pci',
    'virtio_blk',
    'virtio_net',
    'crc32c_generic',
    'ext4',
    'button',
    'evdev',
    ...more,
  ]);
  const directory = (path: string): CpioEntry => ({
    path,
    mode: 0o040755,
    data: new Uint8Array(0),
  });
  const file = (path: string, mode: number, data: Uint8Array): CpioEntry => ({
    path,
    mode: 0o100000 | mode,
    data,
  });
  const names = files.map((path) => path.replace(/^.*\//, '').replace(/\.xz$|\.zst$|\.gz$/, ''));
  return gzipSync(
    cpioArchive([
      ...['bin', 'dev', 'proc', 'sys', 'new', 'm'].map(directory),
      file('bin/busybox', 0o755, readFileSync(busybox)),
      file('init', 0o755, Buffer.from(INIT)),
      file('m/list', 0o644, Buffer.from(names.map((name) => `${name}\n`).join(''))),
      ...files.map((path, i) => file(`m/${names[i]}`, 0o644, moduleBytes(path))),
    ]),
    { level: 1 },
  );
}

function moduleBytes(path: string): Buffer {
  const unpack = path.endsWith('.xz')
    ? 'xz'
    : path.endsWith('.zst')
      ? 'zstd'
      : path.endsWith('.gz')
        ? 'gzip'
        : undefined;
  if (unpack === undefined) return readFileSync(path);
  return execFileSync(unpack, ['-dc', path], { maxBuffer: 2 ** 26 });
}
