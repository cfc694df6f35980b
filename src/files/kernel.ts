/**
 * The backend `kernel`: this machine's kernel mounts the file systems, for root.
 *
 *     image → overlay (this process) → FUSE: one file → loop device → mount
 *
 * All mounts lie in a mount namespace of their own, which lives as long as a holder process in it; the holder ends when its
 * standard input does. So nothing can be seen or left behind outside, whoever of us is killed: with the holder go the mounts, with
 * them the loop devices (they clear themselves), and with this process the FUSE connection.
 *
 * This process never touches what is mounted, because it would wait for itself: tools that it starts do.
 */
import { spawn, type ChildProcess } from 'node:child_process';
import { createHash } from 'node:crypto';
import { closeSync, existsSync, openSync, readFileSync } from 'node:fs';
import { fileURLToPath } from 'node:url';

import type { Clock } from '../clock.js';
import { B2Error } from '../errors.js';
import type { EventSink } from '../events.js';
import type { Image } from '../image.js';
import { BlockFile, openFuse } from '../mount/block-file.js';
import type { WritableImage } from '../nbd/index.js';
import { giveIdentity } from './btrfs.js';
import {
  driverOf,
  lastLine,
  mountText,
  ntfsLogError,
  NTFS_LOG_STATUS,
  tellNotes,
  type Environment,
  type Running,
} from './environment.js';
import { volumesIn, type FoundArea } from './layout.js';
import { throwAwayOverlay } from './overlay.js';
import { childEnd, collectText, findProgram, outputOf, runScript, TOOL_ENV } from './tools.js';

/** How long the kernel may take to let go of the file after everything is unmounted. */
const UNMOUNT_MS = 10_000;

/** Directories that are there everywhere and of which the namespace needs nothing: one is covered in it. */
const PLACES = ['/mnt', '/media', '/srv', '/opt'];

/**
 * Why this machine cannot use the backend for that area, in words; undefined where it can. Loads the driver's module where that
 * is needed.
 */
export async function kernelLacks(area: FoundArea): Promise<string | undefined> {
  if (process.geteuid?.() !== 0) return 'only root can have this machine mount it';
  if (area.holds === 'container')
    return 'logical volumes would mix with those of this machine here';
  for (const tool of ['unshare', 'nsenter', 'losetup', 'mount', 'find', 'tar']) {
    if (findProgram(tool) === undefined) return `there is no ${tool} here`;
  }
  for (const device of ['/dev/fuse', '/dev/loop-control']) {
    if (!existsSync(device)) return `there is no ${device} here`;
  }
  const driver = driverOf(area.type);
  if (driver === undefined) return `b2 knows no driver for ${area.type}`;
  if (!isKnown(driver)) {
    await outputOf(runScript('/bin/sh', ['-s'], Buffer.from(`modprobe -q ${driver}`)));
    if (!isKnown(driver)) return `this kernel cannot read ${area.type}`;
  }
  // btrfs tells file systems apart by their UUID alone: mounted beside its original, the copy would damage it. One over several
  // devices, which the kernel remembers for longer than they are mounted, gets an identity of its own.
  if (driver === 'btrfs' && area.parts === undefined) return btrfsTwin(area);
  return undefined;
}

function isKnown(driver: string): boolean {
  return readFileSync('/proc/filesystems', 'utf8')
    .split('\n')
    .some((line) => line.split('\t')[1] === driver);
}

/** Why it is not certain that no device of this machine has the same btrfs, in words; undefined where that is certain. */
export async function btrfsTwin(area: FoundArea): Promise<string | undefined> {
  const { uuid } = area;
  const twin = 'this machine has, or may have, the btrfs that it is a copy of';
  if (uuid === undefined || !/^[0-9a-f-]+$/.test(uuid)) return twin;
  if (existsSync(`/sys/fs/btrfs/${uuid}`)) return twin;
  // Status 2: no device has it. Without the cache, so that every device is looked at.
  const asked = Buffer.from(`timeout 10 blkid -c /dev/null -t UUID=${uuid} -o device`);
  const { status } = await outputOf(runScript('/bin/sh', ['-s'], asked));
  return status === 2 ? undefined : twin;
}

/** Status of a script with {@link attachText} where there is no loop device. */
export const NO_LOOP_STATUS = 90;

/**
 * Shell text that attaches the area of the file `disk`, and the other devices of a file system over several: `$dev` is the first, `$devs`
 * are all, `$more` the options that mount wants for the others. Ends the shell with {@link NO_LOOP_STATUS} where that is not possible.
 */
export function attachText(area: FoundArea, disk: string): string {
  const all = [area, ...(area.parts ?? [])].map(
    ({ offsetBytes, sizeBytes }, i) =>
      `attach ${offsetBytes} ${sizeBytes}; ${i === 0 ? 'dev=$one' : 'more=$more,device=$one'}\n`,
  );
  return `devs= more=
attach() {
  for again in 1 2 3 4 5; do
    one=$(losetup --find --show --offset $1 --sizelimit $2 --direct-io=on ${disk} 2>/dev/null) ||
      one=$(losetup --find --show --offset $1 --sizelimit $2 ${disk}) || one=
    [ -z "$one" ] || break
    sleep 0.2
  done
  if [ -z "$one" ]; then [ -z "$devs" ] || losetup --detach $devs; exit ${NO_LOOP_STATUS}; fi
  devs="$devs $one"
}
${all.join('')}`;
}

/** Takes `base` over, also when it rejects. `areas` are what may be mounted of it. */
export async function openKernelEnvironment(
  base: Image,
  areas: readonly FoundArea[],
  clock: Clock,
  events: EventSink,
): Promise<KernelEnvironment> {
  const { image, failures, failed } = await throwAwayOverlay(base, volumesIn(areas));
  try {
    const fuseFd = openFuse();
    let holder: Holder;
    try {
      holder = await startHolder(fuseFd);
    } catch (error) {
      closeSync(fuseFd);
      throw error;
    }
    // Not before it is mounted: reading the descriptor fails until then.
    const file = new BlockFile({ fuseFd, image, events, failed });
    return new KernelEnvironment(holder, file, image, failures, clock, events);
  } catch (error) {
    await image.close();
    throw error;
  }
}

interface Holder {
  readonly child: ChildProcess;
  readonly ended: Promise<number>;
  /** The namespace, which the number of a process that has ended might not name any more. */
  readonly namespaceFd: number;
  /** The directory that is ours in it. */
  readonly place: string;
}

/**
 * $1 the directory, $2 whose it is (for people who look at processes), then what programs in it need. Descriptor 3 is /dev/fuse.
 * The namespace begins as a copy of ours, and a mount that is copied stays mounted when it is unmounted outside: everything that
 * nobody needs in here goes first, our own FUSE mounts among it.
 */
const HOLD = `
trap '' HUP INT TERM
place=$1
shift 2
while read -r _ _ _ _ point _; do printf '%s\\n' "$point"; done </proc/self/mountinfo | sort -r | while read -r point; do
  case $point in / | /proc | /proc/* | /sys | /sys/* | /dev | /dev/* | /usr | /usr/*) continue ;; esac
  for need in "$@"; do
    case $need/ in "$point"/*) continue 2 ;; esac
  done
  umount -l -- "$(printf %b "$point")" 2>/dev/null </dev/null
done
mount -t tmpfs -o mode=700,size=16m b2-files "$place" && : >"$place/disk" || exit 1
mount -i -t fuse.b2 -o fd=3,rootmode=100000,user_id=0,group_id=0 b2 "$place/disk" || exit 1
exec 3<&-
echo ready
while read -r _; do :; done
`;

/** Node, and this program with its libraries. */
const NEEDED = [
  process.execPath,
  fileURLToPath(new URL('../..', import.meta.url)),
  '/bin',
  '/sbin',
  '/lib',
  '/lib64',
  '/etc',
];

async function startHolder(fuseFd: number): Promise<Holder> {
  const isFree = (path: string): boolean =>
    existsSync(path) && !NEEDED.some((need) => `${need}/`.startsWith(`${path}/`));
  const place = PLACES.find(isFree) ?? '/tmp';
  const args = ['--mount', '--propagation', 'slave', '--', '/bin/sh', '-c', HOLD];
  const child = spawn('unshare', [...args, 'b2-files', place, `${process.pid}`, ...NEEDED], {
    stdio: ['pipe', 'pipe', 'pipe', fuseFd],
    env: TOOL_ENV,
    cwd: '/',
    detached: true,
  });
  const ended = childEnd(child, 'unshare');
  ended.catch(() => undefined);
  const said = child.stderr === null ? () => '' : collectText(child.stderr);
  child.stdin?.on('error', () => undefined);
  const isReady = await Promise.race([
    new Promise<boolean>((resolve) => child.stdout?.once('data', () => resolve(true))),
    ended.then(() => false),
  ]);
  if (!isReady || child.pid === undefined) {
    throw new B2Error(
      'unsupported',
      `cannot make a place to mount in: ${lastLine(said()) || 'unshare failed'}`,
      { hint: 'A container needs the right to mount (CAP_SYS_ADMIN); --backend vm needs none.' },
    );
  }
  try {
    return { child, ended, place, namespaceFd: openSync(`/proc/${child.pid}/ns/mnt`, 'r') };
  } catch (error) {
    child.stdin?.end();
    await ended;
    throw error;
  }
}

export class KernelEnvironment implements Environment {
  readonly backend = 'kernel';
  readonly failures: readonly unknown[];
  readonly #holder: Holder;
  readonly #file: BlockFile;
  readonly #image: WritableImage;
  readonly #clock: Clock;
  readonly #events: EventSink;
  readonly #mounted = new Map<string, Promise<string>>();
  /** Names of areas that have an identity of their own. */
  readonly #identified = new Set<string>();
  #closing: Promise<void> | undefined;

  constructor(
    holder: Holder,
    file: BlockFile,
    image: WritableImage,
    failures: readonly unknown[],
    clock: Clock,
    events: EventSink,
  ) {
    this.#holder = holder;
    this.#file = file;
    this.#image = image;
    this.failures = failures;
    this.#clock = clock;
    this.#events = events;
  }

  run(script: Buffer): Running {
    return runScript('nsenter', [...this.enter, '/bin/sh', '-s'], script, this.namespaceFd);
  }

  /** Arguments of nsenter for a program that shall see the mounts; {@link namespaceFd} must be its descriptor 3. */
  get enter(): readonly string[] {
    return ['--mount=/proc/self/fd/3', '--'];
  }

  /** The image as one file that can be written, for what runs here. */
  get disk(): string {
    return `${this.#holder.place}/disk`;
  }

  get namespaceFd(): number {
    return this.#holder.namespaceFd;
  }

  /** True when the image cannot be read any more, whatever is mounted from it: open another environment. */
  get isBroken(): boolean {
    return this.#file.isEnded;
  }

  mount(area: FoundArea): Promise<string> {
    let mounted = this.#mounted.get(area.name);
    if (mounted === undefined) {
      mounted = this.#mount(area);
      this.#mounted.set(area.name, mounted);
      // It may be possible later: a loop device gets free.
      mounted.catch(() => this.#mounted.delete(area.name));
    }
    return mounted;
  }

  async #mount(area: FoundArea): Promise<string> {
    // Not reached any more, it would be a long row of errors of tools.
    if (this.isBroken && this.failures.length > 0) throw this.failures.at(-1);
    const { place } = this.#holder;
    const dir = `${place}/fs/${area.name}`;
    const driver = driverOf(area.type) ?? area.type;
    if (area.parts !== undefined && !this.#identified.has(area.name)) {
      await this.#giveIdentity([area, ...area.parts]);
      // Once: what was read of it before is remembered below the loop device.
      this.#identified.add(area.name);
    }
    // Detached at once, a loop device that is in use clears itself with its last user. No signal ends this in between.
    const script = `trap '' HUP INT TERM
mkdir -p ${dir}; dir=${dir}
${attachText(area, this.disk)}
${mountText(driver)}
status=$?
losetup --detach $devs
exit $status
`;
    const { status, stderr } = await outputOf(this.run(Buffer.from(script)));
    if (status === 0) {
      tellNotes(stderr, area.name, this.#events);
      return dir;
    }
    if (this.failures.length > 0) throw this.failures[0];
    if (status === NTFS_LOG_STATUS) throw ntfsLogError(area.name, stderr);
    throw new B2Error(
      'io',
      status === NO_LOOP_STATUS
        ? `no loop device for ${area.name}: ${lastLine(stderr)}`
        : `the ${area.type} in ${area.name} cannot be mounted: ${lastLine(stderr)}`,
      {
        hint: 'The kernel says more in dmesg. --backend vm tries it with another kernel; "b2 restore" and fsck of the copy may help.',
      },
    );
  }

  /** So that the kernel takes it for no other one that it knows: on the overlay only, and another in every environment. */
  async #giveIdentity(parts: readonly FoundArea[]): Promise<void> {
    const seed = `${process.pid} ${this.#clock.monotonicNs()} ${parts[0]?.name ?? ''}`;
    const fsid = createHash('sha256').update(seed).digest().subarray(0, 16);
    const offsets = parts.map((p) => p.offsetBytes);
    await giveIdentity(this.#image, offsets, fsid);
  }

  openContainers(): Promise<readonly FoundArea[]> {
    return Promise.reject(new Error('containers are for the backend vm'));
  }

  close(): Promise<void> {
    this.#closing ??= this.#close();
    return this.#closing;
  }

  async #close(): Promise<void> {
    const { child, ended, namespaceFd, place } = this.#holder;
    try {
      const dirs = [...this.#mounted.keys()].map((name) => `${place}/fs/${name}`).reverse();
      const all = [...dirs, `${place}/disk`].map((dir) => `umount -l ${dir}`).join('\n');
      await outputOf(this.run(Buffer.from(`${all}\n`)));
    } catch {
      // The namespace ends below in any case, and with it every mount.
    }
    closeSync(namespaceFd);
    child.stdin?.end();
    await ended.catch(() => undefined);
    // The last writes of an unmount still need answers.
    const late = new AbortController();
    await Promise.race([
      this.#file.ended.catch(() => undefined),
      this.#clock.sleep(UNMOUNT_MS, late.signal),
    ]);
    late.abort();
    await this.#file.close();
    await this.#image.close().catch(() => undefined);
  }
}
