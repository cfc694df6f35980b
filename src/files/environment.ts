/** Where a file system of an image is mounted and tools can look at it: one interface, two backends. */
import type { Readable } from 'node:stream';

import { B2Error } from '../errors.js';
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

/** Status of a script that mounts an NTFS: what Windows has committed in its log cannot be carried out, and without that all may be wrong. */
export const NTFS_LOG_STATUS = 91;

const NTFS_MARKED =
  'b2-note: this NTFS is marked for a check by Windows (chkdsk): some of what is shown may not fit together';

/** Says it where Windows sleeps in the NTFS at `$dir`, by the first bytes of its memory's image. */
const NTFS_SLEEPS = `for sleeps in "$dir"/[hH][iI][bB][eE][rR][fF][iI][lL].[sS][yY][sS]; do
  case $(head -c 4 "$sleeps" 2>/dev/null | tr -d '\\000') in [hH][iI][bB][rR]) echo "b2-note: Windows was hibernated in this NTFS: what it had in memory only is not shown" >&2 ;; esac
done`;

/**
 * Shell text that mounts `$dev` at `$dir` and ends with mount's status; `$more` has options for other devices of a file system, each
 * behind a comma. The names in it are ours and need no quoting. ntfs3 replays
 * its log only for a mount that writes, and shows what is not replayed without a word in any other: where it refuses to write, also
 * when it need not mind that Windows wants a check, nothing is shown ({@link NTFS_LOG_STATUS}).
 */
export function mountText(driver: string): string {
  const options = `${COMMON}${OPTIONS[driver] ?? ''}`;
  if (driver !== 'ntfs3') return `mount -t ${driver} -o "ro,${options}$more" "$dev" "$dir"`;
  return `if mount -t ntfs3 -o rw,noatime,${options} "$dev" "$dir" 2>/dev/null; then :
elif mount -t ntfs3 -o rw,force,noatime,${options} "$dev" "$dir" 2>/dev/null; then echo "${NTFS_MARKED}" >&2
elif mount -t ntfs3 -o ro,${options} "$dev" "$dir"; then umount "$dir"; echo "ntfs3 cannot replay it" >&2; (exit ${NTFS_LOG_STATUS})
else false; fi && mount -o remount,ro "$dir" && {
${NTFS_SLEEPS}
}`;
}

/** Programs of ntfs-3g that {@link ntfs3gText} uses. */
export const NTFS_PROGRAMS = ['ntfs-3g', 'ntfs-3g.probe', 'ntfsrecover', 'ntfsinfo'] as const;

/**
 * The same with the programs of ntfs-3g, which reads past a log without a word when it only reads. The probe tells (as for a mount
 * that writes): 0 clean, or the log is wiped as every driver of Linux leaves it; 14 Windows sleeps there, or the log is of version 2.0; 15 it was in use.
 * ntfsrecover then carries out what Windows has committed. A log of version 2.0, which every running Windows since 8 has, it does
 * only when told that no sleeping Windows will come back to it; here none will. In the end the probe must be content.
 */
export function ntfs3gText(): string {
  return `ntfs-3g.probe --readwrite "$dev" >/tmp/probe 2>&1; probe=$?
case $probe in
0) ;;
14 | 15)
  if ntfsrecover --kill-fast-restart "$dev" >/tmp/recover 2>&1 || grep -q 'has been wiped out' /tmp/recover; then
    ntfs-3g.probe --readwrite "$dev" >/tmp/probe 2>&1; probe=$?
    [ $probe = 0 ] || { [ $probe = 14 ] && grep -qi hibernated /tmp/probe; } || {
      echo "after ntfsrecover it is in use as before" >&2; exit ${NTFS_LOG_STATUS}
    }
  else
    { echo "ntfsrecover cannot carry it out"; grep -v '^$' /tmp/recover; } | tail -n 1 >&2; exit ${NTFS_LOG_STATUS}
  fi ;;
*) grep -v '^$' /tmp/probe | head -n 1 >&2; exit 1 ;;
esac
ntfs-3g -o ro "$dev" "$dir" && {
case $(ntfsinfo --force --mft "$dev" 2>/dev/null | grep 'Volume Flags:') in
*0x[0-9a-fA-F][0-9a-fA-F][0-9a-fA-F][13579bdfBDF]*) echo "${NTFS_MARKED}" >&2 ;;
esac
${NTFS_SLEEPS}
}`;
}

/** The error of a script that ended with {@link NTFS_LOG_STATUS}. */
export function ntfsLogError(area: string, stderr: string): B2Error {
  return new B2Error(
    'io',
    `${area}: Windows had this NTFS in use, and what its log has to add cannot be added here (${lastLine(stderr) || 'no reason given'}): what would be shown might be old or wrong, so nothing is`,
    {
      hint: 'Windows can do it: restore the volume and attach the copy to a Windows, or start it with "b2 boot". A point at which Windows had unmounted it, or was shut down, has no such log.',
    },
  );
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
