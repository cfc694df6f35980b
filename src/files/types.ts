/**
 * The files inside an image: the contract that `ls`, `cat`, `restore --path`, `mount --files`, `history` and `diff` share.
 *
 * An image is never written: every backend puts a throw-away overlay over it, lets a file system driver of Linux replay the
 * journal there, and reads the result. So what is seen is what a mount after a power cut at that point would have shown.
 *
 * Names: Linux file names are bytes. Here they are strings in which a byte that is no UTF-8 stands as the lone surrogate
 * U+DC80 to U+DCFF (as Python's surrogateescape has it), so that every name survives the way there and back (names.ts).
 */
import type { Readable } from 'node:stream';

import type { MdArray } from './md.js';

/**
 * Who reads the file system: `kernel` is the kernel of this machine (root, in a mount namespace of its own), `vm` the kernel of
 * a tiny virtual machine (any user).
 */
export type BackendName = 'kernel' | 'vm';

/** A file system in an image, or something that holds file systems (an LVM physical volume). JSON-able. */
export interface FoundFileSystem {
  /** How paths name it: `p2` for a partition, `p2p1` for one in an array (MD) in that, `disk` for a device without a partition table, `VG/LV` for a logical volume. */
  readonly name: string;
  /** As blkid names it: `ext4`, `xfs`, `btrfs`, `vfat`, `ntfs`, … */
  readonly type: string;
  readonly label?: string;
  readonly uuid?: string;
  /** Of the partition, device or array (MD) that it lies in; of a logical volume, or over several devices, which lies in many places: 0. */
  readonly offsetBytes: number;
  readonly sizeBytes: number;
  /** The arrays (MD) that it lies in and of which one member is in the image, the outermost first; absent where there is none. */
  readonly arrays?: readonly MdArray[];
}

export type EntryKind =
  'file' | 'directory' | 'symlink' | 'fifo' | 'socket' | 'block' | 'character' | 'unknown';

/** What a file system knows of one name. */
export interface FileEntry {
  /** Absolute within its file system: `/etc/fstab`; `/` is its root. */
  readonly path: string;
  readonly kind: EntryKind;
  /** The low 12 bits of the mode. */
  readonly permissions: number;
  readonly links: number;
  readonly uid: number;
  readonly gid: number;
  readonly sizeBytes: number;
  readonly allocatedBytes: number;
  readonly mtimeNs: bigint;
  readonly ctimeNs: bigint;
  readonly inode: bigint;
  /** Of a symbolic link: where it points. */
  readonly target?: string;
}

/** A place in an image: a file system and a path in it, absolute and without `.` and `..`. */
export interface Place {
  readonly fileSystem: FoundFileSystem;
  readonly path: string;
}

/** A run of a file's data. */
export interface FileExtent {
  /** Byte of the file. */
  readonly offset: number;
  readonly length: number;
  /** Byte of the **image** where it lies. */
  readonly imageOffset: number;
}

/** A tar stream (pax format, GNU sparse files, xattrs and ACLs as GNU tar and star write them). */
export interface TreeExport {
  readonly stream: Readable;
  /**
   * Resolves when the stream has ended, with what could not be read: members that must not be used (their data is wrong or cut
   * short) and messages for people. Rejects where nothing of the stream is to be trusted.
   */
  readonly done: Promise<{
    readonly damaged: readonly { readonly path: string; readonly reason: string }[];
    readonly notes: readonly string[];
  }>;
}

/**
 * Files of one image. Methods reject with kind `not-found` (no such path; the exit code is 4), `damaged` or `io` (data of the
 * image cannot be read; the message names the pack), `unsupported` (no backend here can read that file system; the hint says
 * what to install). Symbolic links are followed within their file system and never out of it. One call at a time.
 */
export interface FileAccess {
  /** What was found, in the order of the device. File systems in LVM appear once {@link FileAccess.openContainers} has run. */
  readonly fileSystems: readonly FoundFileSystem[];
  /** The backends used so far, for people and JSON. */
  readonly used: readonly BackendName[];
  /**
   * What is in the image and not among {@link FileAccess.fileSystems}, because another volume of the group has no point of this
   * instant; with the reason, in words. What is said of a path that is not there is not certain then.
   */
  readonly notShown: readonly string[];
  /**
   * The same of what lies on devices that no volume of the group is of: of a file system that is named and not among
   * {@link FileAccess.fileSystems} nothing is certain, either.
   */
  readonly elsewhere: readonly string[];
  /** Looks into LVM, where there is any, so that {@link FileAccess.fileSystems} has the file systems in it too. */
  openContainers(): Promise<void>;
  /**
   * The place that a person's text means: `/etc/fstab` where the image has one file system, `/p2/etc/fstab` (or without the
   * first slash) where it has several, `p2:/etc/fstab` always, with the name, label or UUID of the file system before the
   * colon. Undefined: the image itself, whose entries are the file systems. `not-found` names what there is.
   */
  place(text: string): Promise<Place | undefined>;
  /** The entry; with `follow` of what a symbolic link points to. Links in the directories before it are always followed. */
  stat(place: Place, follow: boolean): Promise<FileEntry>;
  /** The same for several absolute paths of one file system, links in them not followed at all; undefined for each that is not there. */
  statMany(
    fileSystem: FoundFileSystem,
    paths: readonly string[],
  ): Promise<readonly (FileEntry | undefined)[]>;
  /**
   * What is in a directory (or in the whole tree below it, `.` excluded, links not followed), in no order. A place that is no
   * directory gives itself. Rejects at the end where something could not be read.
   */
  list(place: Place, recursive: boolean): AsyncGenerator<FileEntry>;
  /** The bytes of a regular file (links followed). Rejects, at the latest at the end, where they are not all right. */
  read(place: Place): AsyncGenerator<Uint8Array>;
  /** The file or tree as tar; its members are named from the last part of the path on (`./` for the root). */
  exportTree(place: Place): Promise<TreeExport>;
  /**
   * Where the data of a regular file lies in the image, as far as the file system says so: holes, data in the inode and data
   * not yet placed are not in it. Undefined where it cannot be told (btrfs, NTFS, FAT, LVM, several volumes, no filefrag).
   */
  extents(place: Place): Promise<readonly FileExtent[] | undefined>;
  /** Ends the backends; the image is closed too. */
  close(): Promise<void>;
}
