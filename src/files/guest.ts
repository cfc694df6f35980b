/**
 * What runs in the tiny VM: a kernel of this machine's packages with the modules that are needed, busybox, and GNU find and tar of
 * this machine (busybox's know neither xattrs and ACLs nor sparse files).
 */
import { execFile } from 'node:child_process';
import { readFileSync, realpathSync } from 'node:fs';
import { access, constants, readFile, readdir } from 'node:fs/promises';
import { release } from 'node:os';
import { basename, dirname, join } from 'node:path';
import { promisify } from 'node:util';
import { gunzipSync } from 'node:zlib';

import { B2Error, ioError, messageOf } from '../errors.js';
import { cpioArchive, type CpioEntry } from './cpio.js';
import { findProgram, TOOL_ENV } from './tools.js';

const run = promisify(execFile);

/** A kernel that can be started, and where its modules are. */
export interface GuestKernel {
  readonly image: string;
  readonly modules: string;
}

/** The kernel that runs here if its files are there, else the newest that has both; undefined without any that we can read. */
export async function findGuestKernel(
  boot = '/boot',
  modules = '/lib/modules',
): Promise<GuestKernel | undefined> {
  const found: string[] = [];
  for (const name of await readdir(boot).catch(() => [])) {
    const version = /^vmlinuz-(.+)$/.exec(name)?.[1];
    if (version === undefined) continue;
    try {
      await access(join(boot, name), constants.R_OK);
      await access(join(modules, version, 'modules.dep'), constants.R_OK);
      found.push(version);
    } catch {
      continue;
    }
  }
  const newest = found.sort((a, b) => a.localeCompare(b, 'en', { numeric: true })).at(-1);
  const version = found.includes(release()) ? release() : newest;
  if (version === undefined) return undefined;
  return { image: join(boot, `vmlinuz-${version}`), modules: join(modules, version) };
}

/** For the disks and the line to us. */
const BASE_MODULES = ['virtio_pci', 'virtio_blk', 'virtio_console'];

/** By driver. What is not there as a module is in the kernel or not needed. */
const DRIVER_MODULES: Readonly<Record<string, readonly string[]>> = {
  ext4: ['crc32c_generic', 'ext4'],
  xfs: ['crc32c_generic', 'xfs'],
  btrfs: ['crc32c_generic', 'xxhash_generic', 'sha256_generic', 'blake2b_generic', 'btrfs'],
  vfat: ['nls_cp437', 'nls_ascii', 'nls_iso8859_1', 'nls_utf8', 'vfat'],
  exfat: ['nls_utf8', 'exfat'],
  ntfs3: ['nls_utf8', 'ntfs3'],
  fuse: ['fuse'],
  f2fs: ['crc32_generic', 'crc32_cryptoapi', 'lz4_compress', 'f2fs'],
  squashfs: ['squashfs'],
  erofs: ['erofs'],
  iso9660: ['nls_utf8', 'isofs'],
  // Pools and RAID begin with a checksum, and nobody in the guest loads what a target asks for.
  lvm: [
    'crc32c_generic',
    'dm_mod',
    'dm_snapshot',
    'dm_mirror',
    'dm_thin_pool',
    'dm_cache',
    'dm_cache_smq',
    'dm_writecache',
    'raid0',
    'raid1',
    'raid10',
    'dm_raid',
  ],
};

/** The module that says whether the kernel has a driver: it is the last one of its list. */
function mainModule(driver: string): string {
  return DRIVER_MODULES[driver]?.at(-1) ?? driver;
}

/** Modules of a kernel and what they need. */
export class ModuleTree {
  readonly #directory: string;
  readonly #paths = new Map<string, string>();
  readonly #needs = new Map<string, readonly string[]>();
  readonly #builtin: ReadonlySet<string>;

  /** Texts of `modules.dep` and `modules.builtin`. */
  constructor(directory: string, dep: string, builtin: string) {
    this.#directory = directory;
    for (const line of dep.split('\n')) {
      const [path, needs] = line.split(':');
      if (path === undefined || path === '') continue;
      this.#paths.set(moduleName(path), path);
      this.#needs.set(path, needs?.split(' ').filter((need) => need !== '') ?? []);
    }
    this.#builtin = new Set(builtin.split('\n').map(moduleName));
  }

  static async read(directory: string): Promise<ModuleTree> {
    const dep = join(directory, 'modules.dep');
    try {
      const builtin = await readFile(join(directory, 'modules.builtin'), 'utf8').catch(() => '');
      return new ModuleTree(directory, await readFile(dep, 'utf8'), builtin);
    } catch (error) {
      throw ioError('read', dep, error);
    }
  }

  /** True if the kernel has the driver, in itself or as a module. */
  has(driver: string): boolean {
    const name = mainModule(driver);
    return this.#paths.has(name) || this.#builtin.has(name);
  }

  /** Files to load, in this order, for modules by name; those that are not there are left out. */
  order(names: readonly string[]): readonly string[] {
    const files: string[] = [];
    for (const name of names) {
      const path = this.#paths.get(name);
      if (path === undefined) continue;
      // What a module needs is listed with the last to load first.
      for (const file of [...(this.#needs.get(path) ?? []).toReversed(), path])
        if (!files.includes(file)) files.push(file);
    }
    return files.map((file) => join(this.#directory, file));
  }

  /** For a driver of {@link mountText}, `fuse` or `lvm`. */
  ofDriver(driver: string): readonly string[] {
    return this.order(DRIVER_MODULES[driver] ?? [driver]);
  }
}

function moduleName(path: string): string {
  return basename(path)
    .replace(/\.ko(\.\w+)?$/, '')
    .replaceAll('-', '_');
}

/** A module as insmod takes it. */
async function moduleBytes(file: string): Promise<Buffer> {
  try {
    const bytes = await readFile(file);
    if (file.endsWith('.gz')) return gunzipSync(bytes);
    const tool = file.endsWith('.xz') ? 'xz' : file.endsWith('.zst') ? 'zstd' : undefined;
    if (tool === undefined) return bytes;
    const { stdout } = await run(findProgram(tool) ?? tool, ['-dc', '--', file], {
      encoding: 'buffer',
      maxBuffer: 256 * 1024 * 1024,
      env: { ...TOOL_ENV },
    });
    return stdout;
  } catch (error) {
    throw ioError('read', file, error);
  }
}

/** Shared libraries that a program needs, as `ldd` lists them; none for a static one. */
export function parseLdd(text: string): readonly string[] {
  return text.split('\n').flatMap((line) => {
    const path = /^\s*(?:\S+ => )?(\/\S+) \(0x[0-9a-f]+\)$/.exec(line)?.[1];
    return path === undefined ? [] : [path];
  });
}

async function librariesOf(program: string): Promise<readonly string[]> {
  try {
    const { stdout } = await run('ldd', [program], { env: { ...TOOL_ENV } });
    return parseLdd(stdout);
  } catch (error) {
    if (/not a dynamic executable/.test(messageOf(error))) return [];
    throw new B2Error('unsupported', `cannot find out what ${program} needs: ${messageOf(error)}`, {
      cause: error,
    });
  }
}

export interface GuestOptions {
  readonly kernel: GuestKernel;
  /** Drivers that may be wanted, `lvm` and `fuse` among them. */
  readonly drivers: readonly string[];
  /** Absolute paths of this machine's programs that are wanted besides find and tar. */
  readonly programs: readonly string[];
}

/** The archive that the kernel starts from. Modules of a driver are loaded by `/m/DRIVER`, a list of files. */
export async function buildGuest(options: GuestOptions): Promise<Buffer> {
  const busybox = findStaticBusybox();
  if (busybox === undefined) throw new Error('vmLacks was not asked');
  const tree = await ModuleTree.read(options.kernel.modules);
  const files = new Map<string, { readonly mode: number; readonly data: Buffer }>();
  const put = (path: string, mode: number, data: Buffer): void => {
    files.set(path.replace(/^\/+/, ''), { mode: 0o100000 | mode, data });
  };
  put('/bin/busybox', 0o755, await readFile(busybox));
  put('/init', 0o755, Buffer.from(INIT));
  put('/t/.functions', 0o644, Buffer.from(FUNCTIONS));
  put('/t/.blocks', 0o644, Buffer.from(BLOCKS));
  const lists = new Map<string, readonly string[]>([['base', tree.order(BASE_MODULES)]]);
  for (const driver of options.drivers) lists.set(driver, tree.ofDriver(driver));
  for (const [name, modules] of lists) {
    put(`/m/${name}`, 0o644, Buffer.from(modules.map((m) => `/m/${moduleName(m)}.ko\n`).join('')));
    for (const module of modules) {
      const path = `/m/${moduleName(module)}.ko`;
      if (!files.has(path.slice(1))) put(path, 0o644, await moduleBytes(module));
    }
  }
  const programs = ['find', 'tar'].flatMap((name) => findProgram(name) ?? []);
  for (const program of [...programs, ...options.programs]) {
    put(`/t/${basename(program)}`, 0o755, await readFile(realpathSync(program)));
    for (const library of await librariesOf(program)) put(library, 0o755, await readFile(library));
  }
  const entries: CpioEntry[] = [];
  const directories = new Set<string>();
  const makeDirectory = (path: string): void => {
    if (path === '.' || path === '/' || directories.has(path)) return;
    makeDirectory(dirname(path));
    directories.add(path);
    entries.push({ path, mode: 0o040755, data: new Uint8Array(0) });
  };
  for (const [path, { mode, data }] of files) {
    makeDirectory(dirname(path));
    entries.push({ path, mode, data });
  }
  return cpioArchive(entries);
}

/** A busybox that needs no libraries; undefined where there is none. */
export function findStaticBusybox(): string | undefined {
  for (const name of ['busybox', 'busybox-static', 'busybox.static']) {
    const path = findProgram(name);
    // A program for the dynamic loader names it in a segment of type PT_INTERP, which begins with this path.
    if (path !== undefined && !readFileSync(path).subarray(0, 4096).includes('/ld-')) return path;
  }
  return undefined;
}

/** Before every script: busybox's shell would take its own find and tar, wherever others are. */
const FUNCTIONS = ['find', 'tar'].map((name) => `${name}() { /t/${name} "$@"; }\n`).join('');

/**
 * Process 1 of the VM. A line on the port is a script in base64. Its output goes back as frames: `D` length, newline, bytes; at
 * its end `X` status, blank, length, newline and so many bytes of what it said on stderr. `R` says that it is ready. The line
 * `blocks` hands the port over to {@link BLOCKS}. When nobody listens any more the machine switches itself off.
 */
const INIT = `#!/bin/busybox sh
export PATH=/t:/bin LC_ALL=C
/bin/busybox mkdir -p /proc /sys /dev /tmp /fs /run /etc
/bin/busybox --install -s /bin
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
mount -t tmpfs tmp /tmp
mount -t tmpfs run /run
while read -r module; do insmod "$module"; done </m/base
tries=0
# The node is there before the port can be opened, and where exec cannot open it, that is the end of a shell.
until (exec 3<>/dev/vport0p1) 2>/tmp/said; do
  tries=$((tries + 1))
  if [ $tries -gt 600 ]; then cat /tmp/said; poweroff -f; fi
  sleep 0.1
done
exec 3<>/dev/vport0p1
printf 'R\\n' >&3
while read -r line <&3; do
  if [ "$line" = blocks ]; then
    perl /t/.blocks <&3 >&3
    break
  fi
  { cat /t/.functions; printf '%s' "$line" | base64 -d; } >/tmp/script
  { sh /tmp/script </dev/null 2>/tmp/said 3>&-; echo $? >/tmp/status; } | {
    while :; do
      dd bs=1M count=1 iflag=fullblock of=/tmp/piece 2>/dev/null
      length=$(stat -c %s /tmp/piece)
      [ "$length" -gt 0 ] || break
      printf 'D%s\\n' "$length" >&3
      cat /tmp/piece >&3
    done
  }
  if [ "$(stat -c %s /tmp/said)" -gt 131072 ]; then
    { head -c 65536 /tmp/said; echo; tail -c 65536 /tmp/said; } >/tmp/short
    mv /tmp/short /tmp/said
  fi
  printf 'X%s %s\\n' "$(cat /tmp/status)" "$(stat -c %s /tmp/said)" >&3
  cat /tmp/said >&3
done
poweroff -f
`;

/**
 * Reads block devices for who is at the other end of the port. A request is a line: number, name in /dev, offset, length. The answer
 * is `B` number, blank, error number of Linux (0: none), blank, length, newline and so many bytes: as many as were asked for, or none.
 * In Perl because a process for each request costs more than the request; every Debian has it.
 */
const BLOCKS = `
sub put {
  my $at = 0;
  while ($at < length $_[0]) {
    my $done = syswrite(STDOUT, $_[0], length($_[0]) - $at, $at);
    exit 1 unless defined $done;
    $at += $done;
  }
}
sub get {
  my ($device, $offset, $length) = @_;
  if (!$open{$device}) {
    sysopen(my $handle, "/dev/$device", 0) or return;
    $open{$device} = $handle;
  }
  sysseek($open{$device}, $offset, 0) or return;
  my $bytes = '';
  while (length $bytes < $length) {
    my $got = sysread($open{$device}, $bytes, $length - length($bytes), length($bytes));
    return unless defined $got;
    if ($got == 0) { $! = 5; return }
  }
  return $bytes;
}
my $rest = '';
while (sysread(STDIN, $rest, 65536, length($rest))) {
  while ($rest =~ s/^(\\d+) (\\S+) (\\d+) (\\d+)\\n//) {
    my ($id, $bytes) = ($1, get($2, $3, $4));
    if (defined $bytes) { put("B$id 0 " . length($bytes) . "\\n"); put($bytes) }
    else { put("B$id " . (0 + $!) . " 0\\n") }
  }
}
`;
