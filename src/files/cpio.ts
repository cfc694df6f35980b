/** Archives in cpio's "newc" format, as the kernel unpacks them into its first root (Documentation/driver-api/early-userspace/buffer-format). Pure. */

/** A regular file, a directory or a symbolic link (`data` is its target then). */
export interface CpioEntry {
  /** Without a slash in front. */
  readonly path: string;
  readonly mode: number;
  readonly data: Uint8Array;
}

const HEADER_BYTES = 110;

function padded(length: number): number {
  return Math.ceil(length / 4) * 4;
}

function header(inode: number, mode: number, size: number, nameBytes: number): Buffer {
  // magic; inode, mode, uid, gid, links, mtime, size, device (2), rdev (2), bytes of the name with its NUL, checksum
  const fields = [inode, mode, 0, 0, 1, 0, size, 0, 0, 0, 0, nameBytes, 0];
  return Buffer.from(
    `070701${fields.map((n) => n.toString(16).padStart(8, '0')).join('')}`,
    'latin1',
  );
}

/** The archive. Directories must come before what is in them. */
export function cpioArchive(entries: readonly CpioEntry[]): Buffer {
  const parts: Buffer[] = [];
  const all = [...entries, { path: 'TRAILER!!!', mode: 0, data: new Uint8Array(0) }];
  for (const [i, { path, mode, data }] of all.entries()) {
    const name = Buffer.from(`${path}\0`);
    const head = Buffer.alloc(padded(HEADER_BYTES + name.length));
    header(i + 1, mode, data.length, name.length).copy(head);
    name.copy(head, HEADER_BYTES);
    parts.push(head, Buffer.from(data.buffer, data.byteOffset, data.byteLength));
    parts.push(Buffer.alloc(padded(data.length) - data.length));
  }
  return Buffer.concat(parts);
}
