import { ExitCode } from '../errors.js';
import { parseDurationMs } from '../human.js';
import { defineCommand, type ArgumentSpecs, type Input, type OptionSpecs } from './spec.js';

const args = {
  devices: {
    label: 'DEVICE',
    description:
      'block devices, partitions or image files; without any: those of the configuration (watch.devices)',
    complete: 'device',
    optional: true,
    many: true,
  },
} as const satisfies ArgumentSpecs;
const options = {
  volume: {
    value: 'NAME',
    description: 'name of the volume, of a single device; default: HOST/DEVICE',
  },
  interval: {
    value: 'TIME',
    description: 'time between points while there are writes; default 1s',
    parse: parseDurationMs,
  },
  source: {
    value: 'SOURCE',
    description:
      'how changes are found: trace (block events of the kernel), scan (by comparing) or auto; nbd is not in this version',
    choices: ['auto', 'trace', 'scan', 'nbd'],
  },
  group: {
    value: 'NAME',
    description: 'the devices share their points: each of them is one instant of all',
  },
  'run-for': {
    value: 'TIME',
    description: 'end after this time, with a last point',
    parse: parseDurationMs,
  },
  freeze: {
    value: 'WHEN',
    description:
      'when file systems are frozen: auto (for snapshots, and where writes leave no other way to an exact point; default), on-request (for snapshots) or never',
    choices: ['auto', 'on-request', 'never'],
  },
  'freeze-limit': {
    value: 'TIME',
    description:
      'longest time for which file systems may be frozen for a point; default 100ms, 0s: never',
    parse: parseDurationMs,
  },
  'freeze-after': {
    value: 'TIME',
    description:
      'time without an exact point, because writes outrun the reader, after which --freeze auto freezes; default 5s',
    parse: parseDurationMs,
  },
  'take-over': { description: 'write to volumes that another host has written; that host stops' },
  'accept-device': {
    description: 'go on with a volume although the device is another one than it recorded',
  },
} as const satisfies OptionSpecs;
export type WatchInput = Input<typeof args, typeof options>;

export const watchCommand = defineCommand({
  name: 'watch',
  summary: 'capture devices continuously',
  description: [
    'Watches mounted, busy devices and makes every change recoverable within about a second. Each point is exact (class crash): what a power cut at that instant would have left. The source is never stalled. The first start reads the whole device while capture goes on already; so does every start that cannot prove that it knows all writes since the last.',
    'Without a repository configured it makes the default one (/var/lib/b2/repo for root) with a generated key file, and says where the key is: copy it to another machine.',
    'On a terminal it shows a dashboard: lag (the age of the oldest write that no durable point holds), rates, points and alarms; s takes a snapshot, q quits. Otherwise, or with --quiet, it writes log lines, with --verbose one for each point; with --json every event is a line of JSON with a type.',
    'From any other shell, "b2 snapshot" of a watched volume or device asks the running watch for a point at that very moment, and "b2 status" shows lag, rates and problems.',
    'It ends with a last exact point on SIGTERM (code 0), SIGINT or Ctrl-C (code 130), and after --run-for. SIGHUP loads the configuration again: hooks and limits change at once, devices come and go, a device whose volume, interval or source has changed is started again; a file with a mistake is reported and changes nothing. One device that fails ends no other, and is tried again as long as another is watched if it was a read or a full store that failed.',
    'A file system, LVM group or database that lies on several devices needs points that are one instant of all of them. Devices of one watch that carry parts of one volume group, btrfs or array (MD) share their points by themselves, which is said at the start; for a database or anything else: --group NAME, or "group" of each device in the configuration, which also wins over what would be shared unasked. What devices carry is looked at when the watch starts and at SIGHUP: a device that is missing at the start shares from the next of these on. "b2 points" shows the id of such a point (NAME@TIME), and restoring every volume of the group at that TIME brings back the same instant; b2-ls(1) and the like read files of it from all of them. While a device of the group is missing, the others go on with points of their own.',
    'A device or volume that another running watch captures to the same repository is refused. A device that is missing at the start is an error on a terminal; as a service (NOTIFY_SOCKET) b2 waits for it. A device or a repository that goes away later is waited for, and taken for the same only if it proves to be.',
    'As a service: b2-watch@.service in packaging/systemd. It counts as started (READY) when the changes of every device are captured or it is waited for; the first reading, which can take hours, comes after that and holds up no boot: "systemctl status" and "b2 status" show how far it is.',
  ],
  arguments: args,
  options,
  examples: [
    { command: 'b2 watch /dev/sda', text: 'Captures the disk from now on.' },
    {
      command: 'b2 watch /dev/vg/db --volume db1 --interval 500ms',
      text: 'A logical volume, with a point twice a second, as volume db1.',
    },
    {
      command: 'b2 watch /srv/vm/web.img --source scan --run-for 1h',
      text: 'An image file, for an hour.',
    },
    {
      command: 'b2 watch /dev/sdb /dev/sdc --group data',
      text: 'A database on two disks: every point is one instant of both.',
    },
    { command: 'b2 watch', text: 'The devices of the configuration file.' },
  ],
  exitCodes: {
    [ExitCode.partial]: 'some of the devices had failed at the end',
    [ExitCode.noRepository]: 'the repository that is configured does not exist',
    [ExitCode.leaseHeld]:
      'another process captures the only device already, or has taken over its volume',
  },
  load: () => import('./run/watch.js'),
});
