/**
 * Images as the disks of a virtual machine that runs at once: nothing is copied first.
 *
 *     image → overlay (what the guest writes) → NBD on a private socket → QEMU
 *
 * Each disk has an overlay and an export of its own; one server and one socket serve them all.
 *
 * The repository is only read. QEMU ends with this process however that ends (a parent-death signal); socket, firmware variables
 * and the rest lie in a private directory that is gone afterwards.
 */
import { spawn, type ChildProcess } from 'node:child_process';
import { copyFile, lstat, mkdtemp, readdir, readFile, rm, writeFile } from 'node:fs/promises';
import { createServer, connect, type AddressInfo } from 'node:net';
import { availableParallelism, tmpdir } from 'node:os';
import { join } from 'node:path';
import { TextDecoder } from 'node:util';

import type { Clock } from '../clock.js';
import { readPartitionTable } from '../devices/table.js';
import { B2Error, ioError, messageOf } from '../errors.js';
import type { EventSink } from '../events.js';
import { lastLine } from '../files/environment.js';
import { readableImage } from '../files/layout.js';
import { childEnd, collectText, findProgram, TOOL_ENV } from '../files/tools.js';
import type { Image } from '../image.js';
import {
  openTemporaryOverlay,
  serveNbd,
  type NbdServer,
  type WritableImage,
} from '../nbd/index.js';
import { currentIdentity, isProvablyDead, type ProcessIdentity } from '../process-identity.js';
import { chooseAccelerator, type ChosenAccelerator } from './accelerator.js';
import { findOvmf, firmwareOf, type Firmware } from './firmware.js';
import { isPng, ppmToPng } from './png.js';
import { acceleratorArguments, qemuName } from './qemu.js';
import { Qmp } from './qmp.js';

/** How the disk is attached: virtio for Linux; ide and sata for systems without its driver (Windows, very old kernels). */
export type DiskBus = 'virtio' | 'ide' | 'sata' | 'scsi' | 'nvme';

/** A disk of a machine. */
export interface BootDisk {
  /** For messages: the volume. */
  readonly name: string;
  readonly image: Image;
  /** As the guest sees it: {@link diskSerial}. */
  readonly serial: string;
  /** Puts the writable overlay over the image, which is closed with it. Default: one that is thrown away. */
  readonly overlay?: ((base: Image) => Promise<WritableImage>) | undefined;
}

/** The serial number of a volume's disk in every machine: what `/dev/disk/by-id` of the guest has. The buses take 20 characters. */
export function diskSerial(volumeId: string): string {
  return `b2-${volumeId.slice(0, 16)}`;
}

/** A disk as the guest sees it. */
export interface Drive {
  readonly serial: string;
  /** As the captured device had them: a partition table counts in them. */
  readonly logicalBlockBytes: number;
}

/** What a started machine must show; all of what is given. */
export interface BootChecks {
  /** This text on its first serial port. */
  readonly console?: string | undefined;
  /**
   * A TCP port of the guest that answers: with any byte, to nothing or to a line of HTTP. It is forwarded from a free port of
   * 127.0.0.1.
   */
  readonly port?: number | undefined;
  /** A shell command of this machine that ends with 0; tried again every second. B2_PORT is the forwarded port. */
  readonly command?: string | undefined;
}

export interface BootOptions {
  readonly clock: Clock;
  readonly events: EventSink;
  /** Remembers whether KVM works. */
  readonly cacheDir: string;
  readonly checks?: BootChecks;
  /** False: `checks.port` is only forwarded, and nothing is waited for. Default true. */
  readonly watch?: boolean;
  /** How long the checks may take altogether; without checks: how long it runs. Undefined: until it ends or `signal` aborts. */
  readonly timeoutMs?: number | undefined;
  /** True: QEMU has this process's standard streams: its serial port, and its monitor behind Ctrl-A c. No `checks.console` then. */
  readonly attached?: boolean;
  /** Hears what the serial port says (not when attached). */
  readonly onConsole?: (text: string) => void;
  /** Told once the machine runs. */
  readonly onStart?: (started: BootStart) => void;
  /** Default 1 GiB. */
  readonly memoryBytes?: number | undefined;
  /** Default: this machine's, at most 4; one under TCG. */
  readonly cpus?: number | undefined;
  /** Default virtio. */
  readonly disk?: DiskBus | undefined;
  /** Default: by the partition table. */
  readonly firmware?: Firmware | undefined;
  /** A value of QEMU's `-display`; default none. */
  readonly display?: string | undefined;
  /** False: no network card at all. Default: a private network behind this machine's address (NAT). */
  readonly network?: boolean;
  /** Where the picture of the screen at the end goes. */
  readonly screenshot?: string | undefined;
  /** True: the guest is asked to switch itself off at the end, and has 30 s for it. For overlays that are kept. */
  readonly powerDown?: boolean;
  readonly signal?: AbortSignal | undefined;
}

export interface BootStart {
  readonly accelerator: ChosenAccelerator;
  readonly firmware: Firmware;
  readonly firmwareWhy: string;
  readonly disk: DiskBus;
  /** The disks, in their order. */
  readonly drives: readonly Drive[];
  /** Of 127.0.0.1, forwarded to `checks.port`. */
  readonly hostPort: number | undefined;
}

export type CheckName = 'console' | 'port' | 'command';

export interface BootResult extends BootStart {
  /** True if every check passed; without checks, if the machine ran until it was to end. */
  readonly ok: boolean;
  /** Seconds from the start of QEMU until a check passed. */
  readonly passed: readonly { readonly check: CheckName; readonly seconds: number }[];
  /** Why not `ok`: a clause. */
  readonly why: string | undefined;
  /** From the start of QEMU until the checks had passed or failed, or it ended. */
  readonly seconds: number;
  /** The end of what the serial port said; empty when attached. */
  readonly console: string;
  readonly screenshot: string | undefined;
  /** What the guest has read from and written to its disks. */
  readonly readBytes: number;
  readonly writtenBytes: number;
  /** The same of each disk, in their order. */
  readonly diskBytes: readonly DiskBytes[];
}

/** What went to and from a disk. */
export interface DiskBytes {
  readonly readBytes: number;
  readonly writtenBytes: number;
}

/** Of the console at most this much is kept, and searched at a time. */
const CONSOLE_CHARS = 256 * 1024;
const DEFAULT_MEMORY = 1024 ** 3;
const QMP_MS = 30_000;
const QUIT_MS = 10_000;
const POWERDOWN_MS = 30_000;
const RETRY_MS = 1000;
/** How long a service may keep silent before it is spoken to, and before it counts as silent. */
const GREETING_MS = 2000;
const ANSWER_MS = 5000;
/** Leaves room for the names of sockets, which unix bounds. */
const MAX_DIRECTORY_BYTES = 70;

/**
 * Starts a machine on the disks, the first of which it boots from, and watches it until all checks have passed, `timeoutMs` is over, it
 * ends, or `signal` aborts (then `interrupted`, unless it is attached or has no checks: that is how it ends). Takes the images over. A machine
 * that does not do as it should is a result, not an error; kinds `unsupported`, `failed`, `io`, and what reading an image failed with (`damaged`).
 */
export async function bootMachine(
  disks: readonly BootDisk[],
  options: BootOptions,
): Promise<BootResult> {
  const failures: unknown[] = [];
  const overlays: WritableImage[] = [];
  let directory: string | undefined;
  let server: NbdServer | undefined;
  try {
    const [first] = disks;
    if (first === undefined) throw new Error('a machine without a disk');
    const bus = options.disk ?? 'virtio';
    checkBus(disks, bus);
    const program = qemuProgram();
    const { firmware, why: firmwareWhy } = await wantedFirmware(first, options);
    const ovmf = firmware === 'uefi' ? findOvmf() : undefined;
    const accelerator = await chooseAccelerator(options.cacheDir, options.clock);
    const parent = Buffer.byteLength(tmpdir()) <= MAX_DIRECTORY_BYTES ? tmpdir() : '/tmp';
    directory = await ownDirectory(parent);
    if (ovmf !== undefined) await copyFile(ovmf.vars, join(directory, 'vars'));
    for (const { image, overlay } of disks) {
      const base = watched(image, failures);
      overlays.push(await (overlay?.(base) ?? openTemporaryOverlay({ base })));
    }
    server = await serveNbd({
      exports: overlays.map((overlay, i) => ({
        name: nodeName(i),
        open: () => Promise.resolve(overlay),
      })),
      listen: { socketPath: join(directory, 's') },
      events: options.events,
      clock: options.clock,
    });
    const started: BootStart = {
      accelerator,
      firmware,
      firmwareWhy,
      disk: bus,
      drives: disks.map(({ serial, image }) => ({
        serial,
        logicalBlockBytes: image.logicalBlockBytes,
      })),
      hostPort: options.checks?.port === undefined ? undefined : await freePort(),
    };
    const result = await new Machine(program, directory, ovmf?.code, started, options).run();
    // What a guest makes of a disk that fails says nothing.
    if (!result.ok && failures.length > 0) throw failures[0];
    return result;
  } finally {
    try {
      await server?.close();
    } finally {
      try {
        // The server has closed them, unless QEMU never came.
        await closeAll(disks.map(({ image }, i) => overlays[i] ?? image));
      } finally {
        if (directory !== undefined) await rm(directory, { recursive: true, force: true });
      }
    }
  }
}

/** Closes every one of them; then rejects with what the first failure was. */
async function closeAll(images: readonly Image[]): Promise<void> {
  const closed = await Promise.allSettled(images.map((image) => image.close()));
  const failed = closed.find((one) => one.status === 'rejected');
  if (failed !== undefined) throw failed.reason;
}

const DIRECTORY = 'b2-boot-';
/** Who made the directory, by which one that was killed is told. */
const OWNER = 'owner';

/** A directory of our own for sockets; those of processes that were killed go. */
async function ownDirectory(parent: string): Promise<string> {
  for (const name of await readdir(parent).catch((): string[] => [])) {
    if (!name.startsWith(DIRECTORY)) continue;
    const old = join(parent, name);
    try {
      const { uid } = await lstat(old);
      if (uid !== process.getuid?.()) continue;
      const owner = JSON.parse(await readFile(join(old, OWNER), 'utf8')) as ProcessIdentity;
      if (isProvablyDead(owner)) await rm(old, { recursive: true, force: true });
    } catch {
      // It is being made or removed, or it is not ours: somebody else's business.
    }
  }
  try {
    const directory = await mkdtemp(join(parent, DIRECTORY));
    await writeFile(join(directory, OWNER), JSON.stringify(currentIdentity()), { mode: 0o600 });
    return directory;
  } catch (error) {
    throw ioError('make a directory in', parent, error);
  }
}

/** Failures that are kept: the first ones tell. */
const KEPT = 100;

/** `image`, with what reading it fails with put into `failures`. */
function watched(image: Image, failures: unknown[]): Image {
  const told = (error: unknown): never => {
    if (failures.length < KEPT) failures.push(error);
    throw error;
  };
  return {
    sizeBytes: image.sizeBytes,
    logicalBlockBytes: image.logicalBlockBytes,
    read: (into, offset) => image.read(into, offset).catch(told),
    extents: (offset, length, limit) => image.extents(offset, length, limit).catch(told),
    close: () => image.close(),
  };
}

function qemuProgram(): string {
  const name = qemuName();
  const program = name === undefined ? undefined : findProgram(name);
  if (program !== undefined) return program;
  throw new B2Error(
    'unsupported',
    name === undefined
      ? `b2 does not know how to start a machine of this architecture (${process.arch})`
      : `there is no ${name} on this machine`,
    name === undefined ? {} : { hint: 'Install QEMU: the package qemu-system-x86.' },
  );
}

async function wantedFirmware(
  { image, name }: BootDisk,
  options: BootOptions,
): Promise<{ readonly firmware: Firmware; readonly why: string }> {
  if (options.firmware !== undefined) return { firmware: options.firmware, why: 'as asked' };
  return firmwareOf(await readPartitionTable(readableImage(image, name)));
}

/** A port of 127.0.0.1 that nobody listens on at the moment. */
async function freePort(): Promise<number> {
  const server = createServer();
  await new Promise<void>((resolve, reject) => {
    server.once('error', reject);
    server.listen(0, '127.0.0.1', resolve);
  });
  const { port } = server.address() as AddressInfo;
  await new Promise((resolve) => server.close(resolve));
  return port;
}

/** Of any bus: what finds room beside the other devices of a machine (each virtio and NVMe disk takes a PCI slot). */
const MOST_DISKS = 24;
/** Two channels of two. */
const MOST_IDE = 4;
/** Of one controller. */
const SATA_PORTS = 6;

/** Of IDE and SATA disks in QEMU, as of the real ones of their time. */
const ATA_BLOCK_BYTES = 512;

function checkBus(disks: readonly BootDisk[], bus: DiskBus): void {
  const count = disks.length;
  const large = disks.find((d) => d.image.logicalBlockBytes !== ATA_BLOCK_BYTES);
  if (large !== undefined && (bus === 'ide' || bus === 'sata'))
    throw new B2Error(
      'unsupported',
      `${large.name} has blocks of ${large.image.logicalBlockBytes} bytes, which no ${bus} disk of QEMU can have`,
      { hint: 'Give --disk virtio, scsi or nvme.' },
    );
  const most = bus === 'ide' ? MOST_IDE : MOST_DISKS;
  if (count <= most) return;
  throw new B2Error('unsupported', `a machine takes at most ${most} disks (${bus}), not ${count}`, {
    hint:
      bus === 'ide'
        ? 'Give --disk sata.'
        : 'Give --alone, and --with for each disk that it cannot do without.',
  });
}

/** Of QEMU's block node of disk `i`, and of its export. */
function nodeName(i: number): string {
  return `d${i}`;
}

/** QEMU's arguments for disk `i`. */
function diskArguments(
  bus: DiskBus,
  i: number,
  { serial, logicalBlockBytes }: Drive,
): readonly string[] {
  const drive = `drive=${nodeName(i)}`;
  // The firmware starts the first, whatever is on the others.
  const blocks =
    logicalBlockBytes === ATA_BLOCK_BYTES
      ? ''
      : `,logical_block_size=${logicalBlockBytes},physical_block_size=${logicalBlockBytes}`;
  const rest = `,serial=${serial}${blocks}${i === 0 ? ',bootindex=1' : ''}`;
  switch (bus) {
    case 'virtio':
      return ['-device', `virtio-blk-pci,${drive}${rest}`];
    case 'ide':
      return ['-device', `ide-hd,${drive},bus=ide.${i >> 1},unit=${i & 1}${rest}`];
    case 'sata': {
      const controller = `ahci${Math.floor(i / SATA_PORTS)}`;
      const port = i % SATA_PORTS;
      return [
        ...(port === 0 ? ['-device', `ahci,id=${controller}`] : []),
        '-device',
        `ide-hd,${drive},bus=${controller}.${port}${rest}`,
      ];
    }
    case 'scsi':
      return [
        ...(i === 0 ? ['-device', 'virtio-scsi-pci,id=scsi'] : []),
        '-device',
        `scsi-hd,${drive},bus=scsi.0,scsi-id=${i}${rest}`,
      ];
    case 'nvme':
      return ['-device', `nvme,${drive}${rest}`];
  }
}

/** The block nodes of disk `i`: its export, and what the device sees. */
function blockArguments(directory: string, i: number): readonly string[] {
  const nbd = {
    driver: 'nbd',
    'node-name': `n${i}`,
    server: { type: 'unix', path: join(directory, 's') },
    export: nodeName(i),
    discard: 'unmap',
  };
  const raw = { driver: 'raw', 'node-name': nodeName(i), file: `n${i}`, discard: 'unmap' };
  return ['-blockdev', JSON.stringify(nbd), '-blockdev', JSON.stringify(raw)];
}

/** QEMU's command line. Exported for its test. */
export function qemuArguments(
  directory: string,
  ovmfCode: string | undefined,
  started: BootStart,
  options: Pick<
    BootOptions,
    'attached' | 'checks' | 'cpus' | 'display' | 'memoryBytes' | 'network'
  >,
): readonly string[] {
  const { accelerator } = started.accelerator;
  const cpus = options.cpus ?? (accelerator === 'tcg' ? 1 : Math.min(4, availableParallelism()));
  const forward =
    started.hostPort === undefined
      ? ''
      : `,hostfwd=tcp:127.0.0.1:${started.hostPort}-:${options.checks?.port ?? 0}`;
  const chardev =
    options.attached === true
      ? ['-chardev', 'stdio,id=con,mux=on,signal=off', '-mon', 'chardev=con']
      : ['-chardev', 'stdio,id=con,signal=off'];
  const uefi =
    ovmfCode === undefined
      ? []
      : [
          '-drive',
          `if=pflash,unit=0,format=raw,readonly=on,file=${ovmfCode}`,
          '-drive',
          `if=pflash,unit=1,format=raw,file=${join(directory, 'vars')}`,
        ];
  return [
    ['-nodefaults', '-no-user-config', '-no-reboot', '-name', 'b2,process=b2-boot'],
    acceleratorArguments(accelerator),
    ['-m', String(Math.ceil((options.memoryBytes ?? DEFAULT_MEMORY) / 1024 ** 2))],
    ['-smp', String(cpus), '-vga', 'std', '-display', options.display ?? 'none'],
    ['-qmp', `unix:${join(directory, 'q')},server=on,wait=off`],
    chardev,
    ['-serial', 'chardev:con'],
    uefi,
    ['-nic', options.network === false ? 'none' : `user,model=virtio-net-pci${forward}`],
    ...started.drives.flatMap((drive, i) => [
      blockArguments(directory, i),
      diskArguments(started.disk, i, drive),
    ]),
  ].flat();
}

/** One QEMU, from its start to its end. */
class Machine {
  private readonly program: string;
  private readonly directory: string;
  private readonly started: BootStart;
  private readonly o: BootOptions;
  private readonly ovmfCode: string | undefined;
  private readonly passed: { check: CheckName; seconds: number }[] = [];
  private console = '';
  private startedNs = 0n;

  constructor(
    program: string,
    directory: string,
    ovmfCode: string | undefined,
    started: BootStart,
    options: BootOptions,
  ) {
    this.program = program;
    this.directory = directory;
    this.ovmfCode = ovmfCode;
    this.started = started;
    this.o = options;
  }

  async run(): Promise<BootResult> {
    const { o } = this;
    const { clock, signal } = o;
    if (signal?.aborted === true) throw interrupted();
    this.startedNs = clock.monotonicNs();
    const child = this.spawn();
    const said = child.stderr === null ? () => '' : collectText(child.stderr);
    const over = new AbortController();
    const stop = (): void => over.abort();
    const ended = childEnd(child, this.program).finally(stop);
    ended.catch(() => undefined);
    signal?.addEventListener('abort', stop, { once: true });
    let qmp: Qmp | undefined;
    try {
      qmp = await Qmp.open(join(this.directory, 'q'), clock, QMP_MS, over.signal).catch(
        async (error: unknown) => {
          if (signal?.aborted === true) throw interrupted();
          child.kill('SIGKILL');
          await ended.catch(() => undefined);
          throw new B2Error(
            'failed',
            `QEMU did not start: ${lastLine(said()) || messageOf(error)}`,
            { cause: error },
          );
        },
      );
      o.onStart?.(this.started);
      let why = await this.watch(child, over.signal, ended);
      const isStopped = over.signal.aborted && child.exitCode === null;
      if (isStopped && o.attached !== true && this.wanted().length > 0) throw interrupted();
      // Where it has ended by itself there is nobody to ask.
      const isAlive = child.exitCode === null && child.signalCode === null;
      const seconds = this.seconds();
      const screenshot = isAlive ? await this.screenshot(qmp) : undefined;
      const disks = await this.diskBytes(isAlive ? qmp : undefined);
      if (!isAlive && why !== undefined) {
        const words = lastLine(said());
        if (words !== '') why = `${why}: ${words}`;
      }
      if (isAlive) await this.end(qmp, ended);
      return {
        ...this.started,
        ok: why === undefined,
        passed: this.passed,
        why,
        seconds,
        console: this.console,
        screenshot,
        readBytes: disks.reduce((sum, d) => sum + d.readBytes, 0),
        writtenBytes: disks.reduce((sum, d) => sum + d.writtenBytes, 0),
        diskBytes: disks,
      };
    } finally {
      signal?.removeEventListener('abort', stop);
      over.abort();
      qmp?.close();
      if (child.exitCode === null && child.signalCode === null) child.kill('SIGKILL');
      await ended.catch(() => undefined);
    }
  }

  private spawn(): ChildProcess {
    const args = qemuArguments(this.directory, this.ovmfCode, this.started, this.o);
    // The kernel kills QEMU when we end: also when nobody can clean up.
    const leash = findProgram('setpriv');
    const [program, all] =
      leash === undefined
        ? [this.program, args]
        : [leash, ['--pdeathsig', 'KILL', '--', this.program, ...args]];
    const { attached } = this.o;
    const display: Record<string, string> = {};
    for (const name of ['DISPLAY', 'WAYLAND_DISPLAY', 'XAUTHORITY', 'XDG_RUNTIME_DIR', 'TERM']) {
      const value = process.env[name];
      if (value !== undefined) display[name] = value;
    }
    const child = spawn(program, [...all], {
      stdio: attached === true ? ['inherit', 'inherit', 'inherit'] : ['pipe', 'pipe', 'pipe'],
      env: { ...TOOL_ENV, ...display },
      cwd: '/',
      // Ctrl-C in our terminal is for us, or, attached, for the guest: QEMU has the terminal in raw mode then.
      detached: attached !== true,
    });
    child.stdin?.on('error', () => undefined);
    const decoder = new TextDecoder();
    child.stdout?.on('data', (bytes: Buffer) => {
      const text = decoder.decode(bytes, { stream: true });
      this.console = (this.console + text).slice(-CONSOLE_CHARS);
      this.o.onConsole?.(text);
      this.onText?.();
    });
    return child;
  }

  /** Set while somebody waits for something on the console. */
  private onText: (() => void) | undefined;

  private seconds(): number {
    return Number(this.o.clock.monotonicNs() - this.startedNs) / 1e9;
  }

  private wanted(): readonly CheckName[] {
    const { checks } = this.o;
    if (checks === undefined || this.o.watch === false) return [];
    return (['console', 'port', 'command'] as const).filter((name) => checks[name] !== undefined);
  }

  /** Undefined once everything has passed, or, without checks, at the end; else why not. */
  private async watch(
    child: ChildProcess,
    ended: AbortSignal,
    status: Promise<number>,
  ): Promise<string | undefined> {
    const { clock, timeoutMs } = this.o;
    const wanted = this.wanted();
    const over = new AbortController();
    const stop = (): void => over.abort();
    ended.addEventListener('abort', stop, { once: true });
    if (ended.aborted) stop();
    const clockedOut = { isLate: false };
    const late =
      timeoutMs === undefined
        ? undefined
        : clock.sleep(timeoutMs, over.signal).then(() => {
            clockedOut.isLate = !over.signal.aborted;
            stop();
          });
    try {
      if (wanted.length === 0) {
        if (!over.signal.aborted)
          await new Promise<void>((resolve) => {
            over.signal.addEventListener('abort', () => resolve(), { once: true });
          });
        if (child.exitCode === null && child.signalCode === null) return undefined;
        const code = await status;
        return code === 0 ? undefined : `QEMU ended with ${code}`;
      }
      const results = await Promise.all(
        wanted.map(async (name) => {
          const isPassed = await this.check(name, over);
          if (isPassed) this.passed.push({ check: name, seconds: this.seconds() });
          return isPassed;
        }),
      );
      const failed = wanted.filter((_, i) => results[i] !== true);
      if (failed.length === 0) return undefined;
      const panic = panicOf(this.console);
      if (panic !== undefined) return `the guest said: ${panic}`;
      const what = failed.map((name) => this.describe(name)).join(', and ');
      if (clockedOut.isLate) return `after ${(timeoutMs ?? 0) / 1000} s ${what}`;
      return `the machine ended before: ${what}`;
    } finally {
      stop();
      ended.removeEventListener('abort', stop);
      await late;
    }
  }

  private describe(name: CheckName): string {
    const { checks } = this.o;
    switch (name) {
      case 'console':
        return `its console has not said "${checks?.console}"`;
      case 'port':
        return `nothing has answered on its port ${checks?.port}`;
      case 'command':
        return `the command has not ended with 0`;
    }
  }

  private async check(name: CheckName, over: AbortController): Promise<boolean> {
    switch (name) {
      case 'console':
        return this.consoleSays(this.o.checks?.console ?? '', over);
      case 'port':
        return this.again(over.signal, () => answers(this.started.hostPort ?? 0));
      case 'command':
        return this.again(over.signal, (signal) => this.commandSucceeds(signal));
    }
  }

  private consoleSays(text: string, over: AbortController): Promise<boolean> {
    return new Promise((resolve) => {
      const settle = (isThere: boolean): void => {
        this.onText = undefined;
        resolve(isThere);
      };
      const look = (): void => {
        if (plainText(this.console).includes(text)) settle(true);
        // It does not come back from that.
        else if (panicOf(this.console) !== undefined) over.abort();
      };
      over.signal.addEventListener('abort', () => settle(false), { once: true });
      this.onText = look;
      if (over.signal.aborted) settle(false);
      else look();
    });
  }

  private async again(
    signal: AbortSignal,
    attempt: (signal: AbortSignal) => Promise<boolean>,
  ): Promise<boolean> {
    while (!signal.aborted) {
      if (await attempt(signal)) return true;
      await this.o.clock.sleep(RETRY_MS, signal);
    }
    return false;
  }

  private commandSucceeds(signal: AbortSignal): Promise<boolean> {
    const { hostPort } = this.started;
    return new Promise((resolve) => {
      const child = spawn('/bin/sh', ['-c', this.o.checks?.command ?? 'false'], {
        stdio: 'ignore',
        env: { ...TOOL_ENV, ...(hostPort === undefined ? {} : { B2_PORT: String(hostPort) }) },
        cwd: '/',
        detached: true,
      });
      const kill = (): void => {
        try {
          if (child.pid !== undefined) process.kill(-child.pid, 'SIGKILL');
        } catch {
          // It has ended.
        }
      };
      signal.addEventListener('abort', kill, { once: true });
      const settle = (isGood: boolean): void => {
        signal.removeEventListener('abort', kill);
        resolve(isGood);
      };
      child.once('error', () => settle(false));
      child.once('exit', (code) => settle(code === 0));
    });
  }

  private async screenshot(qmp: Qmp): Promise<string | undefined> {
    const { screenshot } = this.o;
    if (screenshot === undefined) return undefined;
    // QEMU may not be allowed to write where we are.
    const made = join(this.directory, 'screen');
    try {
      await qmp.command('screendump', { filename: made, format: 'png' });
    } catch {
      // Before QEMU 7.1.
      await qmp.command('screendump', { filename: made });
    }
    const bytes = await readFile(made);
    try {
      await writeFile(screenshot, isPng(bytes) ? bytes : ppmToPng(bytes), { mode: 0o600 });
    } catch (error) {
      throw ioError('write', screenshot, error);
    }
    return screenshot;
  }

  /** Of each disk; zeros where nobody can be asked. */
  private async diskBytes(qmp: Qmp | undefined): Promise<readonly DiskBytes[]> {
    // Firmware variables are a disk as well, with another name.
    const answer = ((await qmp?.command('query-blockstats')) ?? []) as readonly {
      readonly 'node-name'?: string;
      readonly stats?: { readonly rd_bytes?: number; readonly wr_bytes?: number };
    }[];
    return this.started.drives.map((_, i) => {
      const mine = answer.filter((one) => one['node-name'] === nodeName(i));
      const most = (key: 'rd_bytes' | 'wr_bytes'): number =>
        mine.reduce((bytes, { stats }) => Math.max(bytes, stats?.[key] ?? 0), 0);
      return { readBytes: most('rd_bytes'), writtenBytes: most('wr_bytes') };
    });
  }

  private async end(qmp: Qmp, ended: Promise<number>): Promise<void> {
    const { clock } = this.o;
    const gone = ended.then(
      () => true,
      () => true,
    );
    const within = async (ms: number): Promise<boolean> => {
      const late = new AbortController();
      const isGone = await Promise.race([gone, clock.sleep(ms, late.signal).then(() => false)]);
      late.abort();
      return isGone;
    };
    if (this.o.powerDown === true) {
      await qmp.command('system_powerdown').catch(() => undefined);
      if (await within(POWERDOWN_MS)) return;
    }
    // It may end before it answers.
    qmp.command('quit').catch(() => undefined);
    await within(QUIT_MS);
  }
}

function interrupted(): B2Error {
  return new B2Error('interrupted', 'the virtual machine was interrupted');
}

/** Without the control sequences of a terminal, which programs put between words. */
function plainText(text: string): string {
  return text.replace(/\x1b\[[0-9;?]*[A-Za-z]|\x1b[()][A-Z0-9]|\r/g, '');
}

function panicOf(text: string): string | undefined {
  return /Kernel panic[^\r\n]*/.exec(text)?.[0];
}

/** True if a service on that port of 127.0.0.1 says something. A connection alone proves nothing: QEMU takes it for the guest. */
function answers(port: number): Promise<boolean> {
  return new Promise((resolve) => {
    const socket = connect(port, '127.0.0.1');
    const settle = (isGood: boolean): void => {
      clearTimeout(greeting);
      clearTimeout(limit);
      socket.destroy();
      resolve(isGood);
    };
    const greeting = setTimeout(() => socket.write('HEAD / HTTP/1.0\r\n\r\n'), GREETING_MS);
    const limit = setTimeout(() => settle(false), ANSWER_MS);
    socket.on('data', () => settle(true));
    socket.on('error', () => settle(false));
    socket.on('close', () => settle(false));
  });
}
