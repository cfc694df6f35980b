import { ExitCode } from '../errors.js';
import { parseDurationMs, parseSize, parseWhole } from '../human.js';
import { defineCommand, type ArgumentSpecs, type Input, type OptionSpecs } from './spec.js';

function parsePort(text: string): number {
  const port = parseWhole(text);
  if (port < 1 || port > 65_535) throw new RangeError(`"${text}" is no TCP port`);
  return port;
}

const args = {
  volume: { label: 'VOLUME', description: 'name or id of the volume' },
} as const satisfies ArgumentSpecs;
const options = {
  at: {
    value: 'T',
    description: 'the newest exact point not after this time, a snapshot, or a point (#12)',
    default: 'latest',
  },
  alone: {
    description: 'without the other volumes of its group',
  },
  with: {
    value: 'VOLUME',
    many: true,
    description:
      'attach this volume as well, at its newest exact point not after that of the first, whatever its instant',
  },
  check: {
    value: 'STRING',
    description: 'headless: wait for this text on the first serial port',
  },
  port: {
    value: 'N',
    description:
      'headless: wait until this TCP port of the machine answers; attached: forward it from 127.0.0.1',
    parse: parsePort,
  },
  command: {
    value: 'CMD',
    description:
      'headless: wait until this shell command ends with 0; $B2_PORT is the forwarded port',
    complete: 'command',
  },
  timeout: {
    value: 'TIME',
    description: 'how long the checks may take; without one: stop the machine after this time',
    parse: parseDurationMs,
  },
  headless: { description: 'no console: run until the checks have passed, --timeout or a signal' },
  memory: {
    value: 'SIZE',
    description: 'memory of the machine',
    default: '1G',
    parse: parseSize,
  },
  cpus: {
    value: 'N',
    description: 'default: as here, at most 4; 1 without KVM',
    parse: parseWhole,
  },
  disk: {
    value: 'BUS',
    description: 'how the disks are attached: sata or ide for systems without virtio drivers',
    choices: ['virtio', 'ide', 'sata', 'scsi', 'nvme'],
    default: 'virtio',
  },
  firmware: {
    value: 'KIND',
    description: 'what starts the disk; auto looks at its partition table',
    choices: ['auto', 'bios', 'uefi'],
    default: 'auto',
  },
  display: {
    value: 'KIND',
    description: 'a display of QEMU (gtk, sdl, curses, vnc=127.0.0.1:1)',
    default: 'none',
  },
  'no-network': { description: 'no network card; default: one behind this machine (NAT)' },
  screenshot: {
    value: 'FILE.png',
    description: 'picture of the screen at the end',
    complete: 'file',
  },
  overlay: {
    value: 'FILE',
    description:
      'keep what the machine writes in this file (with several disks: a directory), and go on with it the next time',
    complete: 'file',
  },
} as const satisfies OptionSpecs;
export type BootInput = Input<typeof args, typeof options>;

export const bootCommand = defineCommand({
  name: 'boot',
  summary: 'start a virtual machine from a point of a volume, at once',
  description: [
    'Starts QEMU with the volume as it was at a point as its disk. Nothing is copied first, and nothing in the repository changes: what the machine writes goes to an overlay, which is thrown away at the end or kept with --overlay.',
    'A volume that was captured in a group (b2 watch --group) comes with the others of the group: as the first disk, which the machine boots from, and after it the others in the order of their devices, each at the point of the very same instant. A volume of the group that has none of that instant is left out, with a warning that says what can be had instead: an older --at that all of them have, or --with VOLUME, which is of another instant and so no good for a file system or volume group that lies on both. Where --at is a time ("latest" is one), and the newest point not after it is one that others lack, as a crash or a look at the wrong moment leaves it, the newest one that more of them have is taken if it is at most a minute older, and that is said. A point that is named by its id, its snapshot or its exact time is never exchanged. Nothing of another instant is attached but what --with names; --alone leaves the group out.',
    'The guest tells disks apart by their serial numbers, which the output names: "b2-" and the first 16 digits of the volume\'s id, as in /dev/disk/by-id/virtio-b2-....',
    'With --overlay what is written to several disks is kept in a directory with a file for each. They belong together: b2 goes on with all of them, with the same points, or not at all.',
    'On a terminal its first serial port is shown (Ctrl-A x ends it, Ctrl-A c is the monitor of QEMU); a system that shows nothing there needs --display. Without a terminal, with --headless or with a check it runs unseen: the checks that were given must all pass within --timeout (5 minutes), then it is stopped. "login:" is a good --check for a Linux whose kernel has console=ttyS0.',
    'KVM is used where it really runs a kernel, which is tried once after each boot of this machine; else QEMU translates, which takes about ten times as long. A disk with an EFI system partition and nothing for a BIOS is started by UEFI (package ovmf).',
    'A copy of a server meets the network as that server: it may answer mail, run jobs, or reach for its database. --no-network keeps it alone.',
  ],
  arguments: args,
  options,
  examples: [
    { command: 'b2 boot web1/sda', text: 'The newest point, on this terminal.' },
    {
      command: 'b2 boot web1/sda --at "10m ago" --overlay /var/tmp/web1.overlay --port 22',
      text: 'A stand-in for a dead server; what it writes is kept.',
    },
    {
      command: 'b2 boot web1/sda --with web1/sdc',
      text: 'With a disk that is not of its group; which point it has, and how much older that is, is said.',
    },
    {
      command: 'b2 boot web1/sda --check login: --screenshot web1.png --no-network',
      text: 'Does the backup start? With a picture as proof.',
    },
  ],
  exitCodes: {
    [ExitCode.failed]: 'a check did not pass, or the machine did not start',
    [ExitCode.notFound]: 'no such volume or point',
    [ExitCode.damage]: 'the history is damaged, or data that the machine needed',
    [ExitCode.noRepository]: 'no repository there',
    [ExitCode.leaseHeld]: 'another process has the overlay open',
  },
  load: () => import('./run/boot.js'),
});
