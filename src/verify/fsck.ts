/**
 * Restore test without a restore: every file system of an image is mounted, its journal replayed, unmounted and checked by its own
 * checker, on a throw-away overlay. Nothing in the repository changes, and nothing of this machine is touched (a mount namespace of
 * its own; see files/kernel.ts). Root only: a checker needs a block device. Logical volumes that only LVM can put together are read
 * through a tiny virtual machine (files/vm-volumes.ts), which is slow where that is emulated, so it is given a time limit.
 */
import type { Clock } from '../clock.js';
import { B2Error, isKind, messageOf } from '../errors.js';
import type { EventSink } from '../events.js';
import type { FindCompanions } from '../files/companions.js';
import { findPointAreas } from '../files/group-layout.js';
import {
  attachText,
  btrfsTwin,
  kernelLacks,
  NO_LOOP_STATUS,
  openKernelEnvironment,
  type KernelEnvironment,
} from '../files/kernel.js';
import { elsewhere, isForLvm, whatIsLeft, whyNotShown, type FoundArea } from '../files/layout.js';
import { describeAge, describeMember } from '../files/md.js';
import { findProgram, outputOf } from '../files/tools.js';
import { openVmVolumes, VolumeReadError, type VmVolumes } from '../files/vm-volumes.js';
import type { Image } from '../image.js';

/**
 * - `sound`: the checker found nothing; `how` says what was done;
 * - `faulty`: it did, or the file system cannot be mounted; `message` has its words;
 * - `unchecked`: nothing can be said here; `message` says why.
 */
export type FileSystemState = 'sound' | 'faulty' | 'unchecked';

/** One file system of an image. JSON-able. */
export interface FileSystemCheck {
  /** `p2` for a partition, `disk` for a device without a partition table. */
  readonly name: string;
  readonly type: string;
  readonly state: FileSystemState;
  /** "mounted, journal replayed, e2fsck -fn". */
  readonly how?: string;
  readonly message?: string;
}

/** Checks of what lies on several volumes, so that each is made once: by what was checked. */
export type SharedChecks = Map<string, readonly FileSystemCheck[]>;

export interface FsckOptions {
  /** For messages: the volume. */
  readonly name: string;
  readonly clock: Clock;
  readonly events: EventSink;
  /** What is remembered of this machine. */
  readonly cacheDir: string;
  /** Ends the start of a virtual machine. */
  readonly signal?: AbortSignal | undefined;
  /** The other volumes of its group at that instant. */
  readonly companions?: FindCompanions | undefined;
  /** Of what lies on several volumes: what came of it with another one of them at this instant. What is checked now is added. */
  readonly checked?: SharedChecks | undefined;
}

interface Checker {
  readonly tool: string;
  readonly shown: string;
  /** Shell text with `$dev`; its status decides. */
  readonly script: string;
  /** Before it, where the kernel could not mount: replays a journal, if the checker's package can. */
  readonly replay?: string;
  /** False: without a mount before, a journal would be taken for damage. */
  readonly worksUnmounted: boolean;
  readonly isFaulty: (status: number) => boolean;
}

const anyFault = (status: number): boolean => status !== 0;
const E2FSCK: Checker = {
  tool: 'e2fsck',
  shown: 'e2fsck -fn',
  script: 'e2fsck -fn "$dev"',
  replay: 'e2fsck -fy -E journal_only "$dev"',
  worksUnmounted: true,
  // 4: errors left; 8 and more: it could not work. 1 and 2 are of the super block's counters.
  isFaulty: (status) => status >= 4,
};
/** A FAT that is mounted says so in its boot sector (at 37, or 65 where the table's size at 22 is 0: FAT32): that alone is no fault. */
const FAT = `said=$(fsck.fat -n "$dev"); status=$?
case $said in *'Dirty bit is set'*)
  at=37
  [ "$(od -An -tu2 -j22 -N2 "$dev" | tr -d ' ')" != 0 ] || at=65
  printf '\\0' | dd of="$dev" bs=1 seek=$at conv=notrunc status=none
  said=$(fsck.fat -n "$dev"); status=$?
esac
printf '%s\\n' "$said"
(exit $status)`;

const CHECKERS: Readonly<Record<string, Checker>> = {
  ext2: E2FSCK,
  ext3: E2FSCK,
  ext4: E2FSCK,
  xfs: {
    tool: 'xfs_repair',
    shown: 'xfs_repair -n',
    script: 'xfs_repair -n "$dev"',
    worksUnmounted: false,
    isFaulty: anyFault,
  },
  btrfs: {
    tool: 'btrfs',
    shown: 'btrfs check --readonly',
    script: 'btrfs check --readonly "$dev"',
    worksUnmounted: false,
    isFaulty: anyFault,
  },
  vfat: {
    tool: 'fsck.fat',
    shown: 'fsck.fat -n',
    script: FAT,
    worksUnmounted: true,
    isFaulty: anyFault,
  },
  ntfs: {
    tool: 'ntfsfix',
    shown: 'ntfsfix -n',
    script: 'ntfsfix -n "$dev"',
    worksUnmounted: true,
    isFaulty: anyFault,
  },
};

const KEEP_LINES = 4;

/**
 * Checks every file system of the image (swap and the like are left out). Takes `image` over. Rejects with what reading the image
 * failed with (`damaged`, `io`): then a checker's words mean nothing; and with `unsupported` without root.
 */
export async function checkFileSystems(
  image: Image,
  options: FsckOptions,
): Promise<readonly FileSystemCheck[]> {
  try {
    if (process.geteuid?.() !== 0)
      throw new B2Error('unsupported', 'only root can have the file systems of an image checked', {
        hint: '"b2 verify --boot" needs no privilege.',
      });
    const { clock, events, name, companions, checked = new Map() } = options;
    const openImage = (): Promise<Image> => Promise.resolve(kept(image));
    const layout = await findPointAreas({ openImage, name, companions });
    const { areas } = layout;
    const isShared = layout.others.length > 0;
    const environment = await openKernelEnvironment(await layout.openImage(), areas, clock, events);
    const checks: FileSystemCheck[] = [];
    try {
      for (const area of areas) {
        const why = whyNotShown(area);
        const reasons = [...(why === undefined ? [] : [why]), ...elsewhere(area)];
        for (const message of reasons)
          checks.push({ name: area.name, type: area.type, state: 'unchecked', message });
        if (why !== undefined || area.holds !== 'files') continue;
        const key = isShared ? sharedKey(area) : undefined;
        const known = key === undefined ? undefined : checked.get(key);
        checks.push(...(known ?? []).map(onceForAll));
        if (known !== undefined) continue;
        const check = await checkOne(environment, area);
        if (check.state !== 'sound' && environment.failures.length > 0)
          throw environment.failures[0];
        const made = { name: area.name, type: area.type, ...withMembers(area, check) };
        checks.push(made);
        if (key !== undefined) checked.set(key, [made]);
      }
    } finally {
      await environment.close();
    }
    const forVm = areas.filter(isForLvm).flatMap(({ left = [] }) => left.map((l) => l.reason));
    if (forVm.length === 0) return checks;
    const key = forVm.sort().join('\n');
    const known = isShared ? checked.get(key) : undefined;
    const made = known ?? (await checkVmVolumes(await layout.openImage(), areas, options));
    if (isShared) checked.set(key, made);
    return [...checks, ...(known === undefined ? made : made.map(onceForAll))];
  } finally {
    await image.close();
  }
}

/** What a file system on several volumes is known by among them; undefined of one that has a place of its own. */
function sharedKey({ name, uuid, volume, parts }: FoundArea): string | undefined {
  if (parts !== undefined) return `file system ${uuid}`;
  return volume === undefined ? undefined : `volume ${name}`;
}

function onceForAll(check: FileSystemCheck): FileSystemCheck {
  if (check.how === undefined) return check;
  return { ...check, how: `${check.how}; once for all volumes that it lies on` };
}

/** The image for something that closes it, while it is still needed. */
function kept(image: Image): Image {
  return {
    sizeBytes: image.sizeBytes,
    logicalBlockBytes: image.logicalBlockBytes,
    read: (into, offset) => image.read(into, offset),
    extents: (offset, length, limit) => image.extents(offset, length, limit),
    close: () => Promise.resolve(),
  };
}

/** For one file system in a volume that is read through the virtual machine. */
const VM_CHECK_MS = 30 * 60_000;
const BY_VM = 'the volume read by LVM in a tiny virtual machine';

/** Checks what lies in volumes that only LVM can put together. Takes `image` over. */
async function checkVmVolumes(
  image: Image,
  areas: readonly FoundArea[],
  options: FsckOptions,
): Promise<readonly FileSystemCheck[]> {
  const { clock, events } = options;
  const containers = areas.filter(isForLvm);
  let volumes: VmVolumes;
  try {
    volumes = await openVmVolumes({ ...options, image, areas });
  } catch (error) {
    // What the image cannot be read for is for the caller; here is what this machine cannot do.
    if (!isKind(error, 'unsupported', 'failed')) throw error;
    return containers.map((area) => ({
      name: area.name,
      type: area.type,
      state: 'unchecked',
      message: `${whatIsLeft([area])}: ${messageOf(error)}`,
    }));
  }
  const checks = volumes.left.map(({ volume, reason }): FileSystemCheck => ({
    name: volume ?? containers[0]?.name ?? '',
    type: 'LVM2_member',
    state: 'unchecked',
    message: reason,
  }));
  const environment = await openKernelEnvironment(volumes, volumes.areas, clock, events);
  try {
    for (const area of volumes.areas) {
      const why = whyNotShown(area);
      if (why !== undefined) {
        checks.push({ name: area.name, type: area.type, state: 'unchecked', message: why });
        continue;
      }
      if (area.holds !== 'files') continue;
      const done = new AbortController();
      const limit = clock.sleep(VM_CHECK_MS, done.signal).then(() => {
        if (done.signal.aborted) return;
        const text = `${area.name} was not checked within ${VM_CHECK_MS / 60_000} minutes, ${BY_VM}`;
        volumes.abandon(new B2Error('failed', text));
      });
      let check = await checkOne(environment, area);
      done.abort();
      await limit;
      const [failure] = environment.failures;
      if (check.state !== 'sound' && failure !== undefined) {
        // Of the machine between, not of the image.
        const isOfImage = failure instanceof B2Error && failure.kind !== 'failed';
        if (isOfImage && !(failure instanceof VolumeReadError)) throw failure;
        check = { state: 'unchecked', message: messageOf(failure) };
      }
      const how = check.how === undefined ? {} : { how: `${check.how}; ${BY_VM}` };
      const all = withMembers(area, { ...check, ...how });
      checks.push({ name: area.name, type: area.type, ...all });
    }
    return checks;
  } finally {
    await environment.close();
  }
}

type Check = Omit<FileSystemCheck, 'name' | 'type'>;

/** Says of what lies in an array that it is of one member of it. */
function withMembers({ members = [] }: FoundArea, check: Check): Check {
  if (check.how === undefined || members.length === 0) return check;
  const said = members.map((m) => `${describeMember(m)} (${describeAge(m)})`);
  return { ...check, how: [check.how, ...said].join('; ') };
}

async function checkOne(environment: KernelEnvironment, area: FoundArea): Promise<Check> {
  const checker = CHECKERS[area.type];
  const lack = await kernelLacks(area);
  if (checker === undefined && lack !== undefined) return { state: 'unchecked', message: lack };
  let mounted: string | undefined;
  if (lack === undefined) {
    try {
      mounted = await environment.mount(area);
    } catch (error) {
      return { state: 'faulty', message: messageOf(error) };
    }
  }
  const replayed = mounted === undefined ? '' : 'mounted, journal replayed';
  if (checker === undefined) return { state: 'sound', how: replayed };
  if (findProgram(checker.tool) === undefined) {
    const message = `there is no ${checker.tool} here`;
    return mounted === undefined
      ? { state: 'unchecked', message }
      : { state: 'sound', how: `${replayed}; ${message}` };
  }
  if (mounted === undefined && !checker.worksUnmounted)
    return { state: 'unchecked', message: lack ?? 'it cannot be mounted here' };
  // It takes the identity that a btrfs had before for that of a device to read besides, and looks for it by itself.
  const twin = area.parts === undefined ? undefined : await btrfsTwin(area);
  if (twin !== undefined)
    return { state: 'sound', how: `${replayed}; not ${checker.shown}: ${twin}` };
  return runChecker(environment, area, checker, mounted);
}

async function runChecker(
  environment: KernelEnvironment,
  area: FoundArea,
  checker: Checker,
  mounted: string | undefined,
): Promise<Check> {
  // Written once and unmounted, a file system has no journal left to replay.
  const before =
    mounted === undefined
      ? ''
      : `mount -o remount,rw ${mounted} 2>/dev/null; umount ${mounted} || exit ${NO_LOOP_STATUS}\n`;
  const replay = mounted === undefined ? (checker.replay ?? ':') : ':';
  const script = `trap '' HUP INT TERM
${before}${attachText(area, environment.disk)}
${replay} >/dev/null 2>&1
( ${checker.script}
) 2>&1
status=$?
losetup --detach $devs
exit $status
`;
  const { status, stdout, stderr } = await outputOf(environment.run(Buffer.from(script)));
  if (status === NO_LOOP_STATUS)
    return { state: 'unchecked', message: `no loop device: ${stderr.trim()}` };
  const how = mounted === undefined ? checker.shown : `mounted, journal replayed, ${checker.shown}`;
  if (!checker.isFaulty(status)) return { state: 'sound', how };
  return {
    state: 'faulty',
    how,
    message: `${checker.shown} ended with ${status}: ${lastLines(stdout.toString('utf8'))}`,
  };
}

function lastLines(text: string): string {
  return text
    .split('\n')
    .map((line) => line.trim())
    .filter((line) => line !== '')
    .slice(-KEEP_LINES)
    .join(' / ');
}
