/** What changed between two lists of the files of one file system. Pure. */
import { parentPath } from './names.js';
import type { FileEntry } from './types.js';

/** What of a file is another. `content` of a file of the same size is told only where it was compared. */
export type Aspect = 'type' | 'content' | 'size' | 'mtime' | 'mode' | 'owner' | 'target' | 'ctime';

export interface Change {
  readonly change: 'added' | 'removed' | 'changed' | 'renamed';
  /** The path at the later point; of what was removed, at the earlier one. */
  readonly path: string;
  /** Of what was renamed: the path at the earlier point. */
  readonly from?: string;
  readonly before?: FileEntry;
  readonly after?: FileEntry;
  /** Of what was changed, and of what was changed besides being renamed. */
  readonly aspects: readonly Aspect[];
}

/** Two regular files of the same size that may have other content. */
export interface Suspect {
  readonly before: FileEntry;
  readonly after: FileEntry;
}

export interface Differences {
  /** By path. */
  readonly changes: readonly Change[];
  /** Files whose content may have changed although their size did not: inode or times are others. */
  readonly suspects: readonly Suspect[];
  /** Entries that are the same at both points. */
  readonly same: number;
}

/**
 * Compares. An entry whose name changed counts as renamed where its inode, kind, size and time of modification are the same (of a directory:
 * its time, or one of its entries): an inode that was freed and used anew differs in these. Below a renamed directory only what else changed is told. Of
 * directories their size, links and times do not count: they change with what is in them. `before` is used up.
 */
export async function compareTrees(
  before: Map<string, FileEntry>,
  after: AsyncIterable<FileEntry> | Iterable<FileEntry>,
): Promise<Differences> {
  const changes: Change[] = [];
  const suspects: Suspect[] = [];
  const added = new Map<string, FileEntry>();
  let same = 0;
  const compare = (x: FileEntry, y: FileEntry, from?: string): void => {
    const aspects = aspectsOf(x, y);
    if (maySuspect(x, y)) suspects.push({ before: x, after: y });
    if (from !== undefined) {
      changes.push({ change: 'renamed', path: y.path, from, before: x, after: y, aspects });
    } else if (aspects.length > 0) {
      changes.push({ change: 'changed', path: y.path, before: x, after: y, aspects });
    } else {
      same++;
    }
  };
  for await (const entry of after) {
    const old = before.get(entry.path);
    if (old === undefined) {
      added.set(entry.path, entry);
    } else {
      before.delete(entry.path);
      compare(old, entry);
    }
  }
  const removed = before;
  const moved = renames(removed, added);
  const newPath = new Map([...moved].map(([x, y]) => [x.path, y.path]));
  for (const [x, y] of moved) {
    removed.delete(x.path);
    added.delete(y.path);
    const parent = newPath.get(parentPath(x.path));
    const isImplied =
      parent !== undefined && parent === parentPath(y.path) && nameOf(x) === nameOf(y);
    compare(x, y, isImplied ? undefined : x.path);
  }
  for (const entry of removed.values())
    changes.push({ change: 'removed', path: entry.path, before: entry, aspects: [] });
  for (const entry of added.values())
    changes.push({ change: 'added', path: entry.path, after: entry, aspects: [] });
  changes.sort((a, b) => (a.path < b.path ? -1 : a.path > b.path ? 1 : 0));
  return { changes, suspects, same };
}

/** What differs, going by what the file system says of both. */
export function aspectsOf(x: FileEntry, y: FileEntry): readonly Aspect[] {
  if (x.kind !== y.kind) return ['type'];
  const aspects: Aspect[] = [];
  if (x.kind !== 'directory') {
    if (x.kind === 'file' && x.sizeBytes !== y.sizeBytes) aspects.push('content', 'size');
    if (x.target !== y.target) aspects.push('target');
    if (x.mtimeNs !== y.mtimeNs) aspects.push('mtime');
  }
  if (x.permissions !== y.permissions) aspects.push('mode');
  if (x.uid !== y.uid || x.gid !== y.gid) aspects.push('owner');
  // Something was done to it that none of these shows: other attributes, other links, or content with its time put back.
  const isPut = x.kind === 'file' && aspects.length === 0 && x.links === y.links;
  if (isPut && x.path === y.path && x.ctimeNs !== y.ctimeNs) aspects.push('ctime');
  return aspects;
}

function maySuspect(x: FileEntry, y: FileEntry): boolean {
  return (
    x.kind === 'file' &&
    y.kind === 'file' &&
    x.sizeBytes === y.sizeBytes &&
    x.sizeBytes > 0 &&
    (x.inode !== y.inode || x.ctimeNs !== y.ctimeNs || x.mtimeNs !== y.mtimeNs)
  );
}

function nameOf(entry: FileEntry): string {
  return entry.path.slice(entry.path.lastIndexOf('/') + 1);
}

/** Pairs of what is gone and what is new that are one thing with another name. */
function renames(
  removed: ReadonlyMap<string, FileEntry>,
  added: ReadonlyMap<string, FileEntry>,
): readonly (readonly [FileEntry, FileEntry])[] {
  const byInode = new Map<bigint, FileEntry[]>();
  for (const entry of added.values()) {
    const list = byInode.get(entry.inode);
    if (list === undefined) byInode.set(entry.inode, [entry]);
    else list.push(entry);
  }
  const children = new Map<string, FileEntry[]>();
  for (const x of removed.values()) {
    const list = children.get(parentPath(x.path));
    if (list === undefined) children.set(parentPath(x.path), [x]);
    else list.push(x);
  }
  /** An inode that was freed and used anew for a directory has neither the time nor the entries of the former one. */
  const isSameDirectory = (x: FileEntry, y: FileEntry): boolean =>
    x.mtimeNs === y.mtimeNs ||
    (children.get(x.path) ?? []).some(
      (c) => added.get(`${y.path}/${nameOf(c)}`)?.inode === c.inode,
    );
  const isSameThing = (x: FileEntry, y: FileEntry): boolean => {
    if (x.kind !== y.kind) return false;
    if (x.kind === 'directory') return isSameDirectory(x, y);
    return x.mtimeNs === y.mtimeNs && x.sizeBytes === y.sizeBytes && x.target === y.target;
  };
  const pairs: (readonly [FileEntry, FileEntry])[] = [];
  for (const x of removed.values()) {
    const list = byInode.get(x.inode) ?? [];
    const at = list.findIndex((y) => isSameThing(x, y));
    const [y] = at < 0 ? [] : list.splice(at, 1);
    if (y !== undefined) pairs.push([x, y]);
  }
  return pairs;
}

/**
 * The changes with what comparing the suspects brought to light: `content` is added where it differs, and a change of times alone is
 * kept. `differs` says it by the path at the later point.
 */
export function withContent(
  { changes, suspects }: Differences,
  differs: ReadonlySet<string>,
): readonly Change[] {
  const byPath = new Map(changes.map((c) => [c.path, c]));
  for (const { before, after } of suspects) {
    if (!differs.has(after.path)) continue;
    const known = byPath.get(after.path);
    byPath.set(after.path, {
      change: known?.change ?? 'changed',
      path: after.path,
      ...(known?.from === undefined ? {} : { from: known.from }),
      before,
      after,
      aspects: ['content', ...(known?.aspects ?? [])],
    });
  }
  return [...byPath.values()].sort((a, b) => (a.path < b.path ? -1 : a.path > b.path ? 1 : 0));
}
