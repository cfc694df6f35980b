/** What `find -printf` says, as entries. Pure. */
import { B2Error } from '../errors.js';
import { decodeName, normalPath } from './names.js';
import type { EntryKind, FileEntry } from './types.js';

/** The format of GNU find, as it stands in a script between single quotes. */
export const FIND_FORMAT = '%y %m %n %U %G %s %b %T@ %C@ %i %p\\0%l\\0';

const KINDS: Readonly<Record<string, EntryKind>> = {
  f: 'file',
  d: 'directory',
  l: 'symlink',
  p: 'fifo',
  s: 'socket',
  b: 'block',
  c: 'character',
};

/** `1700000000.1234567890` or `-1.5` (which is before −1 s). */
function timeNs(text: string): bigint {
  const match = /^(-?)(\d+)(?:\.(\d*))?$/.exec(text);
  if (match === null) return 0n;
  const fraction = BigInt((match[3] ?? '').padEnd(9, '0').slice(0, 9));
  const ns = BigInt(match[2] ?? '0') * 1_000_000_000n;
  // find prints seconds and nanoseconds as they are stored: the fraction always counts forward.
  return (match[1] === '-' ? -ns : ns) + fraction;
}

function entryOf(head: string, target: string): FileEntry {
  const match = /^(\S) (\d+) (\d+) (\d+) (\d+) (\d+) (\d+) (\S+) (\S+) (\d+) ([^]*)$/.exec(head);
  if (match === null)
    throw new B2Error('failed', `find said something unexpected: ${JSON.stringify(head)}`);
  const [
    ,
    kind = '',
    mode = '',
    links,
    uid,
    gid,
    size,
    blocks,
    mtime = '',
    ctime = '',
    inode,
    path,
  ] = match;
  return {
    path: normalPath(path ?? ''),
    kind: KINDS[kind] ?? 'unknown',
    permissions: parseInt(mode, 8),
    links: Number(links),
    uid: Number(uid),
    gid: Number(gid),
    sizeBytes: Number(size),
    allocatedBytes: Number(blocks) * 512,
    mtimeNs: timeNs(mtime),
    ctimeNs: timeNs(ctime),
    inode: BigInt(inode ?? 0),
    ...(kind === 'l' ? { target } : {}),
  };
}

/** Takes the output in pieces. A record that is cut off at the end is an error of kind `failed`. */
export class FindParser {
  #rest = Buffer.alloc(0);
  #head: string | undefined;

  /** The entries that are complete now. */
  take(piece: Uint8Array): FileEntry[] {
    const bytes = this.#rest.length === 0 ? Buffer.from(piece) : Buffer.concat([this.#rest, piece]);
    const entries: FileEntry[] = [];
    let at = 0;
    for (let end = bytes.indexOf(0); end >= 0; end = bytes.indexOf(0, at)) {
      const text = decodeName(bytes.subarray(at, end));
      at = end + 1;
      if (this.#head === undefined) {
        this.#head = text;
      } else {
        entries.push(entryOf(this.#head, text));
        this.#head = undefined;
      }
    }
    this.#rest = bytes.subarray(at);
    return entries;
  }

  end(): void {
    if (this.#rest.length > 0 || this.#head !== undefined)
      throw new B2Error('failed', 'the list of files broke off');
  }
}
