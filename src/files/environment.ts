/** Where a file system of an image is mounted and tools can look at it: one interface, two backends. */
import type { Readable } from 'node:stream';

import type { EventSink } from '../events.js';
import type { FoundArea } from './layout.js';
import type { BackendName } from './types.js';

/** A script that runs. */
export interface Running {
  /** Must be read to its end (or destroyed), or the script waits for ever. */
  readonly stdout: Readable;
  /** When it has ended and its output is whole. Rejects where the backend broke down. */
  readonly ended: Promise<{ readonly status: number; readonly stderr: string }>;
}

/**
 * A place with the tools sh, find, tar and cat, in which file systems of one image can be mounted. The image below is never
 * changed.
 */
export interface Environment {
  readonly backend: BackendName;
  /** Runs a script of sh; its standard input is empty. One at a time. */
  run(script: Buffer): Running;
  /** Mounts the file system read-only, its journal replayed, and returns its directory. Again: the same directory. */
  mount(area: FoundArea): Promise<string>;
  /** Starts the logical volumes in the containers of the image, and says which file systems are in them. Only `vm` can. */
  openContainers(): Promise<readonly FoundArea[]>;
  /** What reading the image has failed with so far: what tools say after that is only its consequence. */
  readonly failures: readonly unknown[];
  /** Unmounts and ends. Never rejects. */
  close(): Promise<void>;
}

/** The driver of Linux for a type of file system as blkid names it; undefined where b2 uses none. */
export function driverOf(type: string): string | undefined {
  return DRIVERS[type];
}

const DRIVERS: Readonly<Record<string, string>> = {
  ext2: 'ext4',
  ext3: 'ext4',
  ext4: 'ext4',
  xfs: 'xfs',
  btrfs: 'btrfs',
  vfat: 'vfat',
  exfat: 'exfat',
  ntfs: 'ntfs3',
  f2fs: 'f2fs',
  squashfs: 'squashfs',
  erofs: 'erofs',
  iso9660: 'iso9660',
};

/** Of every mount: nothing in an image is run, and its device nodes are none of this machine. */
const COMMON = 'noexec,nosuid,nodev';
/**
 * xfs: the original may be mounted here too. btrfs: the top of it, from which every subvolume can be reached. FAT and NTFS keep
 * names in UTF-16. `ro` on a device that can be written replays a journal.
 */
const OPTIONS: Readonly<Record<string, string>> = {
  xfs: ',nouuid',
  btrfs: ',subvolid=5',
  vfat: ',utf8',
  exfat: ',iocharset=utf8',
  ntfs3: ',iocharset=utf8',
};

/**
 * Shell text that mounts `$dev` at `$dir` and ends with mount's status. The names in it are ours and need no quoting. ntfs3 replays
 * its log only for a mount that writes; where it refuses that, what is there is shown as it is, and `b2-note:` says so.
 */
export function mountText(driver: string): string {
  const options = `${COMMON}${OPTIONS[driver] ?? ''}`;
  if (driver !== 'ntfs3') return `mount -t ${driver} -o ro,${options} "$dev" "$dir"`;
  return `if mount -t ntfs3 -o rw,noatime,${options} "$dev" "$dir" 2>/dev/null; then mount -o remount,ro "$dir"; else
mount -t ntfs3 -o ro,${options} "$dev" "$dir" && echo "b2-note: Windows had this NTFS in use, and its log could not be replayed: what was changed last may be missing" >&2; fi`;
}

/** Passes on what a script of {@link mountText} said in lines with `b2-note:`. */
export function tellNotes(stderr: string, area: string, events: EventSink): void {
  for (const line of stderr.split('\n')) {
    const [, note] = /^b2-note: (.*)$/.exec(line) ?? [];
    if (note !== undefined) events({ type: 'warning', message: `${area}: ${note}` });
  }
}

/** The last line of what a tool said that says something. */
export function lastLine(text: string): string {
  const lines = text
    .split('\n')
    .map((line) => line.trim())
    .filter((line) => line !== '' && !line.startsWith('dmesg(1)'));
  return lines.at(-1) ?? '';
}
