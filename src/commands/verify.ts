import { ExitCode } from '../errors.js';
import { parseDurationMs, parsePercent } from '../human.js';
import { defineCommand, type ArgumentSpecs, type Input, type OptionSpecs } from './spec.js';

/** Share of the data to read: 0 to 1. */
function parseData(text: string): number {
  if (text === 'all') return 1;
  if (text === 'none') return 0;
  try {
    return parsePercent(text);
  } catch {
    throw new RangeError(`"${text}" is not "all", "none" or a percentage such as 5%`);
  }
}

const args = {
  volume: {
    label: 'VOLUME',
    description: 'name or id of a volume; default all, and what belongs to none',
    optional: true,
    many: true,
  },
} as const satisfies ArgumentSpecs;
const options = {
  data: {
    value: 'all|N%|none',
    description:
      'how much of the stored data to read and compare with its checksums; default none, with --budget all',
    parse: parseData,
  },
  budget: {
    value: 'TIME',
    description: 'stop reading data after this time; the next run goes on',
    parse: parseDurationMs,
  },
  against: {
    value: 'DEVICE',
    description: 'compare the volume as it was at --at with this device or image file',
    complete: 'device',
  },
  fsck: {
    description:
      'check every file system of a point of each volume, after its journal is replayed (root)',
  },
  boot: { description: 'start a virtual machine from a point of each volume' },
  'boot-check': {
    value: 'STRING',
    description: 'what the machine must say on its first serial port',
    default: 'login:',
  },
  'boot-timeout': {
    value: 'TIME',
    description: 'how long that may take',
    default: '5m',
    parse: parseDurationMs,
  },
  at: {
    value: 'T',
    description: 'the point for --against, --fsck and --boot',
    default: 'latest',
  },
  'random-point': { description: 'another point each time for --fsck and --boot, instead of --at' },
  'max-lag': {
    value: 'TIME',
    description:
      'end with code 6 if a volume lags more: by the lag of the running watch that captures it, else by the age of its newest whole exact point',
    parse: parseDurationMs,
  },
  nagios: { description: 'one line and the exit codes of a monitoring plugin' },
} as const satisfies OptionSpecs;
export type VerifyInput = Input<typeof args, typeof options>;

export const verifyCommand = defineCommand({
  name: 'verify',
  summary: 'prove that restores work, and say what is damaged',
  description: [
    'Always checked: the configuration and its copy, every small object, every page of the manifest, the chain of every volume, the footers of all packs, each commit, and that every place which a recovery point uses is there. With --data the stored data are read too: every frame is opened and every chunk compared with its id.',
    'What is found is located: the file, the frames in it and their offsets, the recovery points and the blocks of the volume that need them, and the newest point of each volume that is whole.',
    'With --budget or a percentage, runs go on where the last one stopped: packs never verified come first, the newest before the others, then those verified longest ago. This machine remembers that, and the newest point it has seen of each volume, in a local catalogue: so it also notices a repository that was put back to an older state.',
    '--fsck mounts every file system of a point on a throw-away overlay, which replays its journal, and runs its checker (e2fsck, xfs_repair, btrfs check, fsck.fat, ntfsfix); nothing in the repository or on this machine is changed. Logical volumes that only LVM can put together are read through LVM in a tiny virtual machine, which is slow where QEMU emulates: a file system that is not checked within half an hour counts as unchecked, and so does a member of a RAID that does not hold all of it. What lies on several volumes of a group is checked once for all of them. --boot starts a machine with the point as its disk, without a network, and waits for a text on its console (see b2-boot(1)). What is not sound or does not start counts as damage.',
    '--against reads a device or image file and reports every range in which it differs from the volume. A device that has been written to since the point differs there.',
  ],
  arguments: args,
  options,
  examples: [
    { command: 'b2 verify', text: 'Structure and chain: seconds to minutes.' },
    { command: 'b2 verify --data all', text: 'Everything, read once.' },
    {
      command: 'b2 verify --data all --budget 30m',
      text: 'Every night half an hour; in time all of it, again and again.',
    },
    {
      command: 'b2 verify web1/sda --against /dev/sda --at before-upgrade',
      text: 'What has changed since that snapshot.',
    },
    {
      command: 'b2 verify web1/sda --fsck --boot --random-point',
      text: 'Would any point do? Every night another one.',
    },
    { command: 'b2 verify --max-lag 10m --nagios', text: 'As a monitoring check.' },
  ],
  exitCodes: {
    [ExitCode.partial]: 'something could not be read',
    [ExitCode.notFound]: 'no such volume or point',
    [ExitCode.damage]: 'damage was found, the device differs, or a restore test failed',
    [ExitCode.overLimit]: 'a volume lags more than --max-lag, or has no whole exact point',
  },
  load: () => import('./run/verify.js'),
});
