import { ExitCode } from '../errors.js';
import { defineCommand, type ArgumentSpecs, type Input, type OptionSpecs } from './spec.js';

const args = {
  mountpoint: { label: 'MOUNTPOINT', description: 'existing directory', complete: 'directory' },
} as const satisfies ArgumentSpecs;
const options = {
  volume: { value: 'V', description: 'only this volume, whose points are at the top then' },
  at: {
    value: 'T',
    description: 'only the newest exact point not after this time, a snapshot, or a point (#12)',
  },
  files: {
    description: 'also the file systems inside, as directories: p1/etc/fstab (root only)',
  },
  foreground: { description: 'stay; SIGINT or SIGTERM unmounts' },
  log: {
    value: 'FILE',
    description:
      'where a mount in the background tells of damage; default: mount.log in the cache directory',
    complete: 'file',
  },
} as const satisfies OptionSpecs;
export type MountInput = Input<typeof args, typeof options>;

export const mountCommand = defineCommand({
  name: 'mount',
  summary: 'show points as files: disk images and partitions',
  description: [
    'Mounts the repository, read-only: a directory for each volume (HOST/DEVICE) with latest, snapshots/NAME and points/DAY/HOUR/TIME-#ID, times in UTC, and in each of them disk.img and a file for each partition (p1.img). Nothing is copied first; holes, sizes and times are those of the disk at that point.',
    'A new point appears under latest when it is there; a file that is open stays what it was. Data that is damaged reads as an I/O error, never as zeros, and a line of the log names the pack.',
    'With --files every file system inside a point is a directory beside disk.img: p1, p2, … for partitions, disk where there is no partition table, with owners, modes, times, links, xattrs and ACLs. It is mounted when somebody first looks into it, by this machine\'s kernel on a throw-away overlay, where its journal is replayed, and in a mount namespace of its own, so that nothing of it is left behind however the mount ends. Logical volumes are directories of their volume group, VG/LV, without LVM of this machine taking part. What lies on several volumes of a group (b2-watch(1)) is shown in the points that all of them have. Volumes that only LVM can put together (thin, snapshots, RAID, caches) are read through LVM in a tiny virtual machine, which is started when somebody looks into such a volume or lists its group (ten seconds and more where QEMU emulates) and ended when nobody has for five minutes; it needs QEMU, a static busybox, a Debian kernel, lvm2 and perl, and where they are missing these volumes are not shown, which the log says. What this kernel cannot read gives an error; "b2 ls" and "b2 restore --path" may read that with --backend vm. A member of a RAID 1 of Linux (MD) is shown as what is in the array, p2p1 for a partition in the array of p2; of other members nothing is shown, and the log says why.',
    'Goes into the background when the mount is live. "b2 umount" or umount ends it, and so does the end of the process, whatever the reason. Only the user who mounted can look into it. Users other than root need fusermount3.',
  ],
  arguments: args,
  options,
  examples: [
    { command: 'b2 mount /mnt', text: 'Everything.' },
    {
      command: 'b2 mount /mnt --volume web1/sda --at "5m ago"',
      text: 'One point: /mnt/disk.img and /mnt/p1.img, for losetup or mount -o loop,ro.',
    },
  ],
  exitCodes: {
    [ExitCode.notFound]: 'no such volume, point or directory',
    [ExitCode.damage]: 'the history is damaged',
    [ExitCode.noRepository]: 'no repository there',
    [ExitCode.wrongKey]: 'wrong password or key',
  },
  load: () => import('./run/mount.js'),
});
