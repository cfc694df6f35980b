/** Options of the commands that look at the files inside an image. */
import type { OptionSpecs } from './spec.js';

export const FILES_OPTIONS = {
  at: {
    value: 'T',
    description: 'the newest exact point not after this time, a snapshot, or a point (#12)',
    default: 'latest',
  },
  backend: {
    value: 'B',
    description:
      "who reads the file system: this machine's kernel (root), a tiny virtual machine, or the first of them that can",
    choices: ['auto', 'kernel', 'vm'],
    default: 'auto',
  },
} as const satisfies OptionSpecs;

/** How the description of each of them says it. */
export const PATH_TEXT =
  'PATH is a path in the file system, if the volume has one. If it has several, the first part of PATH names it: p2/etc/fstab, or VG/LV/etc/fstab for a logical volume; "b2 ls VOLUME" lists them. p2:/etc/fstab works always, and so do a label or UUID before the colon (root:/etc/fstab). Of btrfs the whole is shown, every subvolume a directory. A logical volume or btrfs that lies on several disks, captured as one group (b2-watch(1)), is listed with each of them and read from all at the same instant; at a point at which one of the others has none of that instant it is not shown.';
export const BACKEND_TEXT =
  "Nothing is copied first and nothing in the repository changes: the file system is mounted on a throw-away overlay, where its journal is replayed, so that what is seen is what a mount after a power cut at that point would have shown. Root uses this machine's kernel, in a mount namespace of its own. Everybody else, and root for what this kernel cannot read (and for what only LVM can put together, as thin volumes and snapshots, and for a btrfs whose original is here), uses a tiny virtual machine, which takes some seconds to start; it needs QEMU, a static busybox and a Debian kernel. An NTFS that Windows had in use and whose log cannot be replayed is refused, because what it would show might be old.";
