/**
 * The backend `vm`: the kernel of a tiny virtual machine mounts the file systems. No privilege is needed, nothing of this machine
 * is touched by what is in the image, and logical volumes and copies of mounted btrfs meet no originals.
 *
 *     image → overlay (this process) → NBD → QEMU, one disk for each file system → mount in the guest
 *
 * QEMU's standard streams are the line to the guest. QEMU is killed when this process ends, however it does; files are there only
 * while the guest starts.
 */
import { spawn, type ChildProcess } from 'node:child_process';
import { mkdtemp, readFile, rm, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { Readable } from 'node:stream';

import {
  acceleratorArguments,
  acceleratorsToTry,
  KVM_PATIENCE_MS,
  qemuName,
  rememberKvmFails,
  type Accelerator,
} from '../boot/qemu.js';
import type { Clock } from '../clock.js';
import { B2Error, ioError } from '../errors.js';
import type { EventSink } from '../events.js';
import type { Image } from '../image.js';
import { removeWhenKilled, type Watcher } from '../leftovers.js';
import { serveNbd, type NbdServer } from '../nbd/index.js';
import {
  driverOf,
  lastLine,
  mountText,
  ntfs3gText,
  ntfsLogError,
  NTFS_LOG_STATUS,
  NTFS_PROGRAMS,
  tellNotes,
  type Environment,
  type Running,
} from './environment.js';
import { FrameParser } from './frames.js';
import { BlockClient } from './vm-blocks.js';
import { buildGuest, findGuestKernel, findStaticBusybox, ModuleTree } from './guest.js';
import { volumesIn, whyNotShown, wholeFileSystem, type FoundArea } from './layout.js';
import type { LeftVolume } from './lvm.js';
import { script } from './names.js';
import { throwAwayOverlay } from './overlay.js';
import { childEnd, collectText, findProgram, outputOf, TOOL_ENV } from './tools.js';

export interface VmOptions {
  /** Taken over, also when opening rejects. */
  readonly image: Image;
  /** What gets a disk in the guest: everything that holds files or volumes. */
  readonly areas: readonly FoundArea[];
  readonly clock: Clock;
  readonly events: EventSink;
  readonly cacheDir: string;
  /** `files`: it mounts file systems; `blocks`: it only reads volumes for {@link VmEnvironment.serveBlocks}. */
  readonly purpose: 'files' | 'blocks';
  /** Ends the guest while it is started. */
  readonly signal?: AbortSignal | undefined;
}

/** Without KVM a loaded machine takes long; a guest that hangs takes for ever. */
const TCG_PATIENCE_MS = 240_000;
/** Between QEMU's end of output and its own. */
const ENDING_MS = 10_000;
/** Slots of the guest's bus. */
const MAX_DISKS = 24;
/** For the log of a large xfs or btrfs; where nothing is mounted, for what the kernel keeps of volumes. */
const MEMORY = { files: '768M', blocks: '384M' } as const;
/** Leaves room for the names of sockets, which unix bounds. */
const MAX_DIRECTORY_BYTES = 70;
/** Bytes that wait for a slow reader. */
const WAITING_BYTES = 4 * 1024 * 1024;

/** Why no tiny VM can be started here, in words; undefined where one can. */
export async function vmLacks(): Promise<string | undefined> {
  const qemu = qemuName();
  if (qemu === undefined) return `b2 knows none for ${process.arch}`;
  const missing: string[] = [];
  if (findProgram(qemu) === undefined) missing.push(qemu);
  if (findStaticBusybox() === undefined) missing.push('a static busybox');
  for (const tool of ['find', 'tar']) if (findProgram(tool) === undefined) missing.push(tool);
  if ((await findGuestKernel()) === undefined)
    missing.push('a kernel in /boot that may be read, with its modules in /lib/modules');
  return missing.length === 0 ? undefined : `missing: ${missing.join(', ')}`;
}

/** What to do where {@link vmLacks}. */
export const VM_HINT =
  'The tiny virtual machine needs QEMU, a static busybox and a Debian kernel: apt-get install qemu-system-x86 busybox-static linux-image-amd64.';

/** Why no tiny VM can read volumes of LVM for others here, in words; undefined where one can. */
export async function vmVolumesLack(): Promise<string | undefined> {
  const lacks = await vmLacks();
  const missing = ['lvm', 'perl'].filter((name) => findProgram(name) === undefined);
  if (lacks === undefined && missing.length > 0) return `missing: ${missing.join(', ')}`;
  return lacks;
}

/** Starts the guest. Kinds `unsupported`, `io`, `failed`. */
export async function openVmEnvironment(options: VmOptions): Promise<VmEnvironment> {
  const { image, failures } = await throwAwayOverlay(options.image, volumesIn(options.areas));
  let directory: string | undefined;
  let leftovers: Watcher | undefined;
  let server: NbdServer | undefined;
  try {
    const parent = Buffer.byteLength(tmpdir()) <= MAX_DIRECTORY_BYTES ? tmpdir() : '/tmp';
    directory = await mkdtemp(join(parent, 'b2-vm-')).catch((error: unknown) => {
      throw ioError('make a directory in', parent, error);
    });
    leftovers = await removeWhenKilled(directory);
    server = await serveNbd({
      exports: [{ name: '', open: () => Promise.resolve(image) }],
      listen: { socketPath: join(directory, 's') },
    });
    const guest = await prepare(options);
    const line = await start(options, guest, directory);
    return new VmEnvironment(line, server, guest, failures, options);
  } catch (error) {
    await server?.close().catch(() => undefined);
    await image.close().catch(() => undefined);
    throw error;
  } finally {
    if (directory !== undefined) await rm(directory, { recursive: true, force: true });
    await leftovers?.stop();
  }
}

interface Guest {
  readonly kernel: string;
  readonly archive: Buffer;
  readonly disks: readonly FoundArea[];
  readonly tree: ModuleTree;
}

async function prepare({ areas, purpose }: VmOptions): Promise<Guest> {
  const kernel = await findGuestKernel();
  if (kernel === undefined) throw new Error('vmLacks was not asked');
  const tree = await ModuleTree.read(kernel.modules);
  const disks = areas.flatMap((a) => [a, ...(a.parts ?? [])]).slice(0, MAX_DISKS);
  const hasContainer = disks.some((d) => d.holds === 'container');
  const lvm = hasContainer ? findProgram('lvm') : undefined;
  const wanted = new Set(disks.flatMap((d) => driverOf(d.type) ?? []));
  // What may be in a logical volume is not known yet.
  if (lvm !== undefined)
    for (const driver of purpose === 'blocks' ? ['lvm'] : ['lvm', 'ext4', 'xfs', 'btrfs', 'vfat'])
      wanted.add(driver);
  const helper = findProgram(purpose === 'blocks' ? 'perl' : 'filefrag');
  const programs = [lvm, helper].filter((p) => p !== undefined);
  if (wanted.has('ntfs3') && !tree.has('ntfs3')) {
    wanted.add('fuse');
    for (const name of NTFS_PROGRAMS) {
      const program = findProgram(name);
      if (program !== undefined) programs.push(program);
    }
  }
  const archive = await buildGuest({ kernel, drivers: [...wanted], programs });
  return { kernel: kernel.image, archive, disks, tree };
}

/** One QEMU: the line to its guest. */
interface Line {
  readonly child: ChildProcess;
  readonly ended: Promise<number>;
  readonly parser: FrameParser;
}

async function start(options: VmOptions, guest: Guest, directory: string): Promise<Line> {
  const { cacheDir } = options;
  await writeFile(join(directory, 'initrd'), guest.archive, { mode: 0o600 });
  const accelerators = await acceleratorsToTry(cacheDir);
  for (const accelerator of accelerators) {
    const line = await startWith(options, guest, directory, accelerator);
    if (line !== undefined) return line;
    // Killed by us: that says nothing of the accelerator.
    if (options.signal?.aborted === true)
      throw new B2Error('interrupted', 'the tiny virtual machine was ended while it started');
    if (accelerator === 'kvm') await rememberKvmFails(cacheDir);
  }
  const log = await readFile(join(directory, 'console'), 'latin1').catch(() => '');
  const lines = log.replace(/[^\n\x20-\x7e]/g, '').split('\n');
  // The reason of a panic stands before its trace.
  const said = lines.find((line) => line.includes('Kernel panic')) ?? lastLine(lines.join('\n'));
  throw new B2Error(
    'failed',
    `the tiny virtual machine did not come to life${said === '' ? '' : `: ${said}`}`,
    {
      hint: `It is started from ${guest.kernel}; a machine that is very busy may need another try.`,
    },
  );
}

function blockDevice(name: string, value: object): readonly string[] {
  return ['-blockdev', JSON.stringify({ 'node-name': name, ...value })];
}

/** How the guest tells its disks apart; a name of ours can be longer than this may. */
function serialOf(disk: number): string {
  return `b2-disk-${disk}`;
}

function diskArguments(guest: Guest, socket: string): readonly string[] {
  return guest.disks.flatMap((disk, i) => [
    ...blockDevice(`n${i}`, { driver: 'nbd', server: { type: 'unix', path: socket }, export: '' }),
    ...blockDevice(`d${i}`, {
      driver: 'raw',
      offset: disk.offsetBytes,
      size: Math.floor(disk.sizeBytes / 512) * 512,
      file: `n${i}`,
    }),
    '-device',
    `virtio-blk-pci,drive=d${i},serial=${serialOf(i)}`,
  ]);
}

/** Undefined where the guest did not come to life; an error where QEMU itself cannot be started. */
async function startWith(
  { clock, purpose, signal }: VmOptions,
  guest: Guest,
  directory: string,
  accelerator: Accelerator,
): Promise<Line | undefined> {
  const qemu = findProgram(qemuName() ?? '');
  if (qemu === undefined) throw new Error('vmLacks was not asked');
  const args = [
    '-nodefaults',
    '-no-user-config',
    '-display',
    'none',
    '-nic',
    'none',
    '-no-reboot',
    '-m',
    MEMORY[purpose],
    '-smp',
    '1',
    ...acceleratorArguments(accelerator),
    '-kernel',
    guest.kernel,
    '-initrd',
    join(directory, 'initrd'),
    '-append',
    'console=ttyS0 loglevel=4 panic=-1 mitigations=off nokaslr',
    '-chardev',
    `file,id=console,path=${join(directory, 'console')}`,
    '-serial',
    'chardev:console',
    '-chardev',
    'stdio,id=line,signal=off',
    '-device',
    'virtio-serial-pci,max_ports=2',
    '-device',
    'virtserialport,chardev=line,nr=1,name=b2',
    ...diskArguments(guest, join(directory, 's')),
  ];
  // The kernel kills QEMU when we end: also when nobody can clean up.
  const leash = findProgram('setpriv');
  const [program, all] =
    leash === undefined ? [qemu, args] : [leash, ['--pdeathsig', 'KILL', '--', qemu, ...args]];
  const child = spawn(program, all, {
    stdio: ['pipe', 'pipe', 'pipe'],
    env: { ...TOOL_ENV },
    cwd: '/',
    detached: true,
  });
  const ended = childEnd(child, qemu);
  ended.catch(() => undefined);
  child.stdin.on('error', () => undefined);
  const said = collectText(child.stderr);
  const parser = new FrameParser();
  const late = new AbortController();
  const end = (): void => void child.kill('SIGKILL');
  if (signal?.aborted === true) end();
  signal?.addEventListener('abort', end, { once: true });
  const patience = accelerator === 'kvm' ? KVM_PATIENCE_MS : TCG_PATIENCE_MS;
  const state = await Promise.race([
    firstFrame(child.stdout, parser),
    ended.then(() => 'ended' as const),
    clock.sleep(patience, late.signal).then(() => 'late' as const),
  ]);
  signal?.removeEventListener('abort', end);
  if (state === 'ready') {
    late.abort();
    return { child, ended, parser };
  }
  // One that is about to end is let: killed, it would say nothing of why it does.
  const isEnding =
    state === 'ended' &&
    (await Promise.race([
      ended.then(() => true),
      clock.sleep(ENDING_MS, late.signal).then(() => false),
    ]));
  late.abort();
  if (!isEnding) child.kill('SIGKILL');
  const status = await ended;
  if (isEnding && status !== 0 && accelerator === 'tcg' && signal?.aborted !== true) {
    const killed = status > 128 ? ' (it was killed: for lack of memory, perhaps)' : '';
    throw new B2Error(
      'failed',
      `QEMU ended while the tiny virtual machine started: ${lastLine(said()) || `status ${status}${killed}`}`,
    );
  }
  return undefined;
}

function firstFrame(stdout: Readable, parser: FrameParser): Promise<'ready' | 'ended'> {
  return new Promise((resolve, reject) => {
    const onData = (piece: Buffer): void => {
      try {
        if (!parser.take(piece).some((frame) => frame.type === 'ready')) return;
        stdout.off('data', onData);
        stdout.pause();
        resolve('ready');
      } catch (error) {
        reject(error instanceof Error ? error : new Error(String(error)));
      }
    };
    stdout.on('data', onData);
    stdout.once('end', () => resolve('ended'));
  });
}

/** The script that runs now. */
interface Current {
  readonly stdout: Readable;
  readonly resolve: (end: { readonly status: number; readonly stderr: string }) => void;
  readonly reject: (error: Error) => void;
}

/** A logical volume that runs in the guest. */
export interface StartedVolume {
  /** `VG/LV`, as {@link FoundArea.name} has it. */
  readonly name: string;
  /** Below /dev in the guest. */
  readonly device: string;
  readonly sizeBytes: number;
}

/** The volumes of LVM in the guest. */
export interface StartedVolumes {
  readonly volumes: readonly StartedVolume[];
  /** Those that LVM has not started, with the reason in words. */
  readonly left: readonly LeftVolume[];
}

export class VmEnvironment implements Environment {
  readonly backend = 'vm';
  readonly failures: readonly unknown[];
  readonly #line: Line;
  readonly #server: NbdServer;
  readonly #guest: Guest;
  readonly #options: VmOptions;
  readonly #mounted = new Map<string, Promise<string>>();
  /** Of logical volumes: their nodes in the guest. */
  readonly #devices = new Map<string, string>();
  /** Once the line is theirs. */
  #blocks: BlockClient | undefined;
  #current: Current | undefined;
  /** Ends with the script that was given last. */
  #turn: Promise<unknown> = Promise.resolve();
  #broken: Error | undefined;
  #closing: Promise<void> | undefined;

  constructor(
    line: Line,
    server: NbdServer,
    guest: Guest,
    failures: readonly unknown[],
    options: VmOptions,
  ) {
    this.#line = line;
    this.#server = server;
    this.#guest = guest;
    this.#options = options;
    this.failures = failures;
    const { child, ended } = line;
    child.stdout?.on('data', (piece: Buffer) => this.#take(piece));
    child.stdout?.pause();
    const gone = (): void =>
      this.#break(new B2Error('failed', 'the tiny virtual machine has ended unexpectedly'));
    ended.then(gone, gone);
  }

  #break(error: Error): void {
    this.#broken ??= error;
    this.#blocks?.fail(this.#broken);
    const current = this.#current;
    this.#current = undefined;
    if (current === undefined) return;
    current.stdout.destroy(error);
    current.reject(error);
  }

  #take(piece: Buffer): void {
    try {
      if (this.#blocks !== undefined) return this.#blocks.take(piece);
      for (const frame of this.#line.parser.take(piece)) {
        const current = this.#current;
        if (current === undefined) continue;
        if (frame.type === 'data') {
          // Nobody may want it any more: then it is only taken off the line.
          if (current.stdout.destroyed) continue;
          if (!current.stdout.push(frame.bytes)) this.#line.child.stdout?.pause();
        } else if (frame.type === 'end') {
          this.#current = undefined;
          if (!current.stdout.destroyed) current.stdout.push(null);
          current.resolve({ status: frame.status, stderr: frame.stderr });
        }
      }
    } catch (error) {
      this.abandon(error instanceof Error ? error : new Error(String(error)));
    }
  }

  /** Ends the guest at once: everything asked of it rejects with `error`. {@link close} must still follow. */
  abandon(error: Error): void {
    this.#break(error);
    this.#line.child.kill('SIGKILL');
  }

  /** True when nothing can be asked any more. */
  get isBroken(): boolean {
    return this.#broken !== undefined;
  }

  /** From now on the guest reads block devices, and runs no scripts any more. A guest that hangs is abandoned. */
  async serveBlocks(progress: () => number): Promise<BlockClient> {
    await this.#turn;
    if (this.#broken !== undefined) throw this.#broken;
    const { child } = this.#line;
    const blocks = new BlockClient({
      clock: this.#options.clock,
      progress,
      send: (text) => void child.stdin?.write(text),
      stalled: (error) => this.abandon(error),
    });
    this.#blocks = blocks;
    child.stdin?.write('blocks\n');
    child.stdout?.resume();
    return blocks;
  }

  run(text: Buffer): Running {
    const resume = (): void => void this.#line.child.stdout?.resume();
    const stdout = new Readable({
      highWaterMark: WAITING_BYTES,
      read: resume,
      destroy: (error, done) => {
        resume();
        done(error);
      },
    });
    const ended = this.#turn.then(
      () =>
        new Promise<{ readonly status: number; readonly stderr: string }>((resolve, reject) => {
          if (this.#broken !== undefined) {
            stdout.destroy(this.#broken);
            return reject(this.#broken);
          }
          this.#current = { stdout, resolve, reject };
          this.#line.child.stdin?.write(`${text.toString('base64')}\n`);
          resume();
        }),
    );
    this.#turn = ended.catch(() => undefined);
    return { stdout, ended };
  }

  mount(area: FoundArea): Promise<string> {
    let mounted = this.#mounted.get(area.name);
    if (mounted === undefined) {
      mounted = this.#mount(area);
      this.#mounted.set(area.name, mounted);
      mounted.catch(() => this.#mounted.delete(area.name));
    }
    return mounted;
  }

  async #mount(area: FoundArea): Promise<string> {
    const known = driverOf(area.type);
    const isNtfs = known === 'ntfs3' && !this.#guest.tree.has('ntfs3');
    const driver = isNtfs ? 'fuse' : known;
    if (driver === undefined || !this.#guest.tree.has(driver) || (isNtfs && !hasNtfs())) {
      throw new B2Error(
        'unsupported',
        `the ${area.type} in ${area.name} cannot be read here: ${this.#guest.kernel} has no driver for it`,
        isNtfs ? { hint: 'apt-get install ntfs-3g' } : {},
      );
    }
    const diskOf = ({ name }: FoundArea): number =>
      this.#guest.disks.findIndex((d) => d.name === name);
    const parts = area.parts ?? [];
    if (area.sizeBytes > 0 && [area, ...parts].some((a) => diskOf(a) < 0)) {
      throw new B2Error(
        'unsupported',
        `the ${area.type} in ${area.name} is not among the ${MAX_DISKS} that the tiny virtual machine can have`,
      );
    }
    const dir = `/fs/${area.name}`;
    const device =
      area.sizeBytes === 0
        ? Buffer.from(`dev=/dev/${this.#devices.get(area.name) ?? area.name}\n`)
        : deviceText(diskOf(area), 'dev=$one');
    const asked = Buffer.concat([
      device,
      ...parts.map((part) => deviceText(diskOf(part), 'more=$more,device=$one')),
      Buffer.from(`dir=${dir}; mkdir -p "$dir"
while read -r module; do insmod "$module" 2>/dev/null; done </m/${driver}
(
${isNtfs ? ntfs3gText() : mountText(driver)}
)
status=$?
[ $status = 0 ] || [ ${isNtfs ? 1 : 0} = 1 ] || dmesg | grep -v '^$' | tail -n 1 >&2
exit $status
`),
    ]);
    const { status, stderr } = await outputOf(this.run(asked));
    if (status === 0) {
      tellNotes(stderr, area.name, this.#options.events);
      return dir;
    }
    const [first] = this.failures;
    if (first instanceof B2Error) throw first;
    if (status === NTFS_LOG_STATUS) throw ntfsLogError(area.name, stderr);
    throw new B2Error(
      'io',
      `the ${area.type} in ${area.name} cannot be mounted in the tiny virtual machine: ${lastLine(stderr)}`,
      { hint: '"b2 restore" of the whole volume and fsck of the copy may help.' },
    );
  }

  async openContainers(): Promise<readonly FoundArea[]> {
    const { volumes, left } = await this.startVolumes();
    const areas: FoundArea[] = [];
    const tell = (reason: string): void =>
      this.#options.events({ type: 'warning', message: `left out: ${reason}` });
    for (const { reason } of left) tell(reason);
    const known = new Set(this.#options.areas.map((a) => a.name));
    for (const { name, device, sizeBytes } of volumes) {
      // Read without LVM already.
      if (known.has(name)) continue;
      const edge = Math.min(SIGNATURE_BYTES, sizeBytes);
      const from = `if=/dev/${device}`;
      const skip = `skip=${Math.floor((sizeBytes - edge) / SECTOR_BYTES)}`;
      const edges = await outputOf(
        this.run(
          script`dd ${from} bs=${`${edge}`} count=1 && dd ${from} bs=${`${SECTOR_BYTES}`} ${skip}\n`,
        ),
      );
      if (edges.status !== 0) {
        const [first] = this.failures;
        if (first instanceof B2Error) throw first;
        tell(unreadableVolume(name));
        continue;
      }
      const area = await wholeFileSystem(imageOfEdges(edges.stdout, edge, sizeBytes), name);
      if (area === undefined) continue;
      const why = whyNotShown(area);
      if (why !== undefined) tell(`${name}: ${why}`);
      // The guest has the volume, not the array in it.
      else if (area.members !== undefined)
        tell(
          `${name}: it is a member of an array (MD), which is not looked into in volumes that only LVM can put together; --backend kernel does`,
        );
      else areas.push({ ...area, name, sizeBytes: 0 });
    }
    return areas;
  }

  /** Has LVM start every logical volume. Kinds `unsupported`, `io`, `damaged`. */
  async startVolumes(): Promise<StartedVolumes> {
    if (findProgram('lvm') === undefined) {
      throw new B2Error('unsupported', 'looking into LVM needs its tools', {
        hint: 'apt-get install lvm2',
      });
    }
    const { status, stdout, stderr } = await outputOf(this.run(Buffer.from(LVM_TEXT)));
    const listed = parseVolumes(stdout.toString(), stderr, this.#options.areas);
    // LVM also ends with an error where it has something to say about one of several groups.
    if (status !== 0 && listed.volumes.length === 0) {
      const [first] = this.failures;
      if (first instanceof B2Error) throw first;
      throw new B2Error('io', `the logical volumes cannot be started: ${lastLine(stderr)}`);
    }
    for (const { name, device } of listed.volumes) this.#devices.set(name, device);
    return listed;
  }

  close(): Promise<void> {
    this.#closing ??= this.#close();
    return this.#closing;
  }

  async #close(): Promise<void> {
    // The guest's disks are thrown away: it needs no time to say goodbye.
    this.#line.child.kill('SIGKILL');
    await this.#line.ended.catch(() => undefined);
    await this.#server.close().catch(() => undefined);
  }
}

/** Shell text that looks for a disk of the guest, `$one`, and what then follows. */
function deviceText(disk: number, then: string): Buffer {
  const look = script`for b in /sys/block/vd*; do [ "$(cat $b/serial)" = ${serialOf(disk)} ] && one=/dev/\${b##*/}; done\n`;
  return Buffer.concat([look, Buffer.from(`${then}\n`)]);
}

function hasNtfs(): boolean {
  return NTFS_PROGRAMS.every((name) => findProgram(name) !== undefined);
}

/**
 * Starts every logical volume, also those that are to be left alone (as LVM marks snapshots of thin volumes), and says of each
 * `UUID of VG/VG/LV/MINOR/LAYOUT`, and of each device `/NAME/SECTORS`: for LVM the size of a snapshot is that of what it has changed. What it said meanwhile goes to stderr. RAID arrays that are out of step are not brought
 * into step here: that would read and write all of them for nothing; reading chooses the sides that count.
 */
const LVM_TEXT = `while read -r module; do insmod "$module" 2>/dev/null; done </m/lvm
for limit in min max; do echo 1 >/proc/sys/dev/raid/speed_limit_$limit; done 2>/dev/null
mkdir -p /etc/lvm
config='global{thin_check_executable="" cache_check_executable=""} activation{udev_sync=0 udev_rules=0 verify_udev_operations=1} devices{obtain_device_list_from_udev=0 external_device_info_source="none" use_devicesfile=0} backup{backup=0 archive=0}'
lvm vgchange --config "$config" --activate y --ignoreactivationskip --sysinit >/tmp/lvm 2>&1
lvm vgmknodes --config "$config" >>/tmp/lvm 2>&1
cat /tmp/lvm >&2
lvm lvs --config "$config" --noheadings --nosuffix --units b --separator / -o vg_uuid,vg_name,lv_name,lv_kernel_minor,lv_layout
status=$?
for device in /sys/block/dm-*; do echo "/\${device##*/}/$(cat $device/size)"; done
exit $status
`;

/** What {@link LVM_TEXT} printed. Pools hold nothing by themselves. */
export function parseVolumes(
  stdout: string,
  stderr: string,
  areas: readonly FoundArea[],
): StartedVolumes {
  const shown = new Map(areas.flatMap((a) => a.groups ?? []).map((g) => [g.id, g.shown]));
  const volumes: StartedVolume[] = [];
  const left: LeftVolume[] = [];
  const sizes = new Map(
    [...stdout.matchAll(/^\/(dm-\d+)\/(\d+)$/gm)].map(([, name, n]) => [name, Number(n) * 512]),
  );
  const line = /^\s*([^/\s]+)\/([^/\s]+)\/([^/\s]+)\/(-?\d+)\/(\S*)\s*$/;
  for (const text of stdout.split('\n')) {
    const [, id, group, volume, minor, layout] = line.exec(text) ?? [];
    if (id === undefined || layout === undefined || layout.split(',').includes('pool')) continue;
    const name = `${shown.get(id) ?? group}/${volume}`;
    const device = `dm-${minor}`;
    const sizeBytes = sizes.get(device);
    if (sizeBytes !== undefined && sizeBytes > 0) {
      volumes.push({ name, device, sizeBytes });
      continue;
    }
    const said = stderr.split('\n').findLast((l) => l.includes(`${group}/${volume}`));
    const why = said?.trim() ?? lastLine(stderr);
    left.push({
      place: '',
      volume: name,
      reason: `${name}: LVM cannot start it${why === '' ? '' : ` (${why})`}`,
    });
  }
  return { volumes, left };
}

/** Of a volume that runs and whose beginning cannot be read although all of the image can. */
export function unreadableVolume(name: string): string {
  return `${name}: LVM has started it, but nothing of it can be read (a snapshot whose space was used up is lost, for one)`;
}

/** As much of a volume's beginning, and of its end, as signatures lie in. */
const SIGNATURE_BYTES = 1024 * 1024;
const SECTOR_BYTES = 512;

/** An image of which only the first and the last `edge` bytes are known: one behind the other in `known`. */
export function imageOfEdges(known: Buffer, edge: number, sizeBytes: number): Image {
  return {
    sizeBytes,
    logicalBlockBytes: SECTOR_BYTES,
    read: (into, offset) => {
      into.fill(0);
      known.copy(into, 0, Math.min(offset, edge), edge);
      const tail = sizeBytes - edge;
      const at = Math.max(0, tail - offset);
      if (at < into.length) known.copy(into, at, edge + Math.max(0, offset - tail));
      return Promise.resolve();
    },
    extents: (offset, length) => Promise.resolve([{ offset, length, hole: false }]),
    close: () => Promise.resolve(),
  };
}
