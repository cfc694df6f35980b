import { ExitCode } from '../errors.js';
import { BACKEND_TEXT, FILES_OPTIONS, PATH_TEXT } from './files-options.js';
import { defineCommand, type ArgumentSpecs, type Input, type OptionSpecs } from './spec.js';

const args = {
  volume: { label: 'VOLUME', description: 'name or id of the volume' },
  target: {
    label: 'TARGET',
    description: 'block device or image file to restore to; with --path a directory',
    complete: 'device',
  },
} as const satisfies ArgumentSpecs;
const options = {
  ...FILES_OPTIONS,
  path: {
    value: 'P',
    description: 'only this file or tree of a file system on the volume, into the directory TARGET',
  },
  format: {
    value: 'FORMAT',
    description: 'raw, or an image for virtual machines (a file, made by qemu-img)',
    choices: ['raw', 'qcow2', 'vmdk', 'vdi', 'vhdx'],
    default: 'raw',
  },
  plan: {
    description: 'only say what would be written, read and how long it takes; change nothing',
  },
  force: { description: 'overwrite what is on the target (never what is mounted or in use)' },
  grow: {
    description:
      'make use of a larger target: backup GPT to its end, last partition and its file system grown',
  },
  'no-verify': { description: 'do not read the target back after writing' },
  full: { description: 'write everything, also what is on the target already' },
  'skip-damaged': {
    description: 'write zeros where stored data is damaged, list the ranges, and end with code 3',
  },
} as const satisfies OptionSpecs;
export type RestoreInput = Input<typeof args, typeof options>;

export const restoreCommand = defineCommand({
  name: 'restore',
  summary: 'write a volume as it was to a device or image file, or files of it',
  description: [
    'Writes the whole volume as it was at a point in time. A new image file is sparse. A target that holds most of it already (a rollback, or a restore that was interrupted) is read first, and only what differs is written. Afterwards the target is read back and compared, unless --no-verify is given.',
    'A target that is mounted or used in another way, or too small, is refused. One that holds anything (a file, a file system, a partition table, data) is refused without --force. On a used target nothing of the old data remains in ranges that are zeros in the volume; what lies behind the end of the volume on a larger device is left alone, and a file gets the length of the volume.',
    'If data in the repository is damaged the restore stops and says which; --skip-damaged restores everything else.',
    'With --path one file, or a directory with all that is below it, is put into the directory TARGET (which is made if it is not there) under its own name: --path /etc into /tmp/x makes /tmp/x/etc. Owners (as numbers, and only for root), modes, times, hard links, symbolic links, xattrs, ACLs and holes are kept. What is there already is not touched: if a file is in the way nothing is restored without --force, which replaces files, but no directory by a file. No symbolic link below TARGET is followed. A file whose data is damaged is left out, named, and the command ends with code 3.',
    `With --path: ${PATH_TEXT}`,
    BACKEND_TEXT,
  ],
  arguments: args,
  options,
  examples: [
    { command: 'b2 restore web1/sda disk.img', text: 'The newest point, to a new image file.' },
    {
      command: 'b2 restore web1/sda /dev/sdb --at "2h ago" --force --grow',
      text: 'As it was two hours ago, to a larger disk that may be overwritten.',
    },
    {
      command: 'b2 restore web1/data /dev/vg0/data --at before-upgrade --plan',
      text: 'How much a rollback to a snapshot would change, and how long it would take.',
    },
    {
      command: 'b2 restore web1/sda vm.qcow2 --format qcow2',
      text: 'An image for QEMU/KVM.',
    },
    {
      command: 'b2 restore web1/sda /tmp/back --path p2:/etc --at "1d ago"',
      text: 'A directory as it was yesterday, as /tmp/back/etc.',
    },
  ],
  exitCodes: {
    [ExitCode.partial]:
      'restored, but for what is damaged (--skip-damaged, --path) or cannot be made here (--path)',
    [ExitCode.notFound]: 'no such volume, point, target device or path',
    [ExitCode.damage]: 'stopped: data in the repository is damaged',
  },
  load: () => import('./run/restore.js'),
});
