/** Contents for end-to-end tests: file systems with real files, and comparisons by the system's own tools. */
import { lstatSync, mkdirSync, readdirSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { noise, tool } from './disks.js';
import type { TempDir } from './tmp.js';

const MIB = 1024 * 1024;

/** Regular files of this machine's /usr in order of their names, `bytes` in all or a little less. */
function usrFiles(bytes: number): { readonly names: string[]; readonly bytes: number } {
  const names: string[] = [];
  let total = 0;
  const visit = (dir: string): void => {
    for (const entry of readdirSync(dir, { withFileTypes: true }).sort((a, b) =>
      a.name < b.name ? -1 : 1,
    )) {
      const path = join(dir, entry.name);
      if (entry.isDirectory()) visit(path);
      if (!entry.isFile()) continue;
      const { size } = lstatSync(path);
      if (size > 16 * MIB || total + size > bytes) continue;
      total += size;
      names.push(path);
    }
  };
  // Programs, documents, sources of headers, data: what a server's disk holds.
  for (const dir of ['/usr/bin', '/usr/share', '/usr/lib', '/usr/include']) visit(dir);
  return { names, bytes: total };
}

/**
 * Fills the directory `to` with about `bytes` bytes of realistic files: this machine's programs and documents in `usr/`,
 * and where these do not suffice, or a tenth in any case, files that do not compress in `photos/`.
 */
export function fillWithFiles(dir: TempDir, to: string, bytes: number): void {
  const usr = usrFiles(Math.floor(bytes * 0.9));
  const list = dir.join(`files-${usr.names.length}`);
  writeFileSync(list, usr.names.join('\n'));
  tool('sh', ['-c', `tar -C / -cf - -T "$0" 2>/dev/null | tar -C "$1" -xf -`, list, to]);
  mkdirSync(join(to, 'photos'), { recursive: true });
  let left = bytes - usr.bytes;
  for (let i = 0; left > 0; i++) {
    const length = Math.min(left, 3 * MIB + ((i * 977) % 4096));
    writeFileSync(join(to, 'photos', `${String(i).padStart(4, '0')}.jpg`), noise(i + 1, length));
    left -= length;
  }
}

/** Runs cmp on the first `bytes` bytes (default: all, and then the lengths must be the same); throws where they differ. */
export function cmp(a: string, b: string, bytes?: number): void {
  const range = bytes === undefined ? [] : ['-n', String(bytes)];
  try {
    // Without the place of a difference to tell it is several times faster.
    tool('cmp', ['--silent', ...range, a, b]);
  } catch {
    tool('cmp', [...range, a, b]);
    throw new Error(`cmp could not compare ${a} and ${b}`);
  }
}

/** Compares two raw images as {@link cmp} does, but passes over what is a hole in both: for images mostly of holes. */
export function cmpSparse(a: string, b: string): void {
  const [lengthA, lengthB] = [lstatSync(a).size, lstatSync(b).size];
  if (lengthA !== lengthB) throw new Error(`${a} has ${lengthA} bytes, ${b} ${lengthB}`);
  tool('qemu-img', ['compare', '-f', 'raw', '-F', 'raw', a, b]);
}

/** A sparse copy, sharing the blocks where the file system can. */
export function copySparse(from: string, to: string): void {
  tool('cp', ['--sparse=always', '--reflink=auto', from, to]);
}
