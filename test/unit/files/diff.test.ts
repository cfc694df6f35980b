/** What changed between two trees. */
import { expect, it } from 'vitest';

import { compareTrees, withContent } from '../../../src/files/diff.js';
import type { FileEntry } from '../../../src/files/types.js';

const file = (path: string, inode: number, more: Partial<FileEntry> = {}): FileEntry => ({
  path,
  kind: 'file',
  permissions: 0o644,
  links: 1,
  uid: 0,
  gid: 0,
  sizeBytes: 10,
  allocatedBytes: 4096,
  mtimeNs: 1n,
  ctimeNs: 1n,
  inode: BigInt(inode),
  ...more,
});
const dir = (path: string, inode: number, more: Partial<FileEntry> = {}): FileEntry =>
  file(path, inode, { kind: 'directory', permissions: 0o755, ...more });

async function short(before: readonly FileEntry[], after: readonly FileEntry[]): Promise<string[]> {
  const { changes } = await compareTrees(new Map(before.map((e) => [e.path, e])), after);
  return changes.map((c) =>
    [c.change, ...(c.from === undefined ? [] : [c.from]), c.path, ...c.aspects].join(' '),
  );
}

it('tells what of a file changed', async () => {
  const before = [
    file('/a', 1),
    file('/b', 2),
    file('/c', 3),
    file('/d', 4),
    file('/e', 5),
    file('/l', 6, { kind: 'symlink', target: 'a' }),
    dir('/x', 7),
    file('/same', 8),
    file('/linked', 9),
  ];
  const after = [
    file('/a', 1, { sizeBytes: 11, mtimeNs: 2n, ctimeNs: 2n }),
    file('/b', 2, { permissions: 0o600, ctimeNs: 2n }),
    file('/c', 3, { uid: 5, ctimeNs: 2n }),
    dir('/d', 4),
    file('/e', 5, { ctimeNs: 2n }),
    file('/l', 10, { kind: 'symlink', target: 'b' }),
    dir('/x', 7, { mtimeNs: 9n, sizeBytes: 99, links: 5 }),
    file('/same', 8),
    file('/linked', 9, { links: 2, ctimeNs: 2n }),
  ];
  expect(await short(before, after)).toEqual([
    'changed /a content size mtime',
    'changed /b mode',
    'changed /c owner',
    'changed /d type',
    'changed /e ctime',
    'changed /l target',
  ]);
});

it('knows what was renamed, and what only has the number of a former inode', async () => {
  expect(await short([file('/a', 1)], [file('/b', 1, { ctimeNs: 2n })])).toEqual(['renamed /a /b']);
  expect(await short([file('/a', 1)], [file('/b', 1, { mtimeNs: 2n })])).toEqual([
    'removed /a',
    'added /b',
  ]);
  expect(await short([file('/a', 1)], [file('/b', 1, { permissions: 0o600 })])).toEqual([
    'renamed /a /b mode',
  ]);
  expect(await short([dir('/a', 1)], [dir('/b', 1, { mtimeNs: 2n })])).toEqual([
    'removed /a',
    'added /b',
  ]);
});

it('below a renamed directory tells only what else changed', async () => {
  const before = [dir('/old', 1), dir('/old/sub', 2), file('/old/sub/a', 3), file('/old/b', 4)];
  const after = [
    dir('/new', 1, { mtimeNs: 5n }),
    dir('/new/sub', 2),
    file('/new/sub/a', 3, { permissions: 0o600 }),
    file('/new/c', 4),
    file('/new/d', 5),
  ];
  expect(await short(before, after)).toEqual([
    'renamed /old /new',
    'renamed /old/b /new/c',
    'added /new/d',
    'changed /new/sub/a mode',
  ]);
});

it('names the files whose content may have changed, and takes the answer in', async () => {
  const before = [
    file('/same', 1),
    file('/new-inode', 2),
    file('/touched', 3),
    file('/empty', 4, { sizeBytes: 0 }),
  ];
  const after = [
    file('/same', 1),
    file('/new-inode', 9),
    file('/touched', 3, { mtimeNs: 2n, ctimeNs: 2n }),
    file('/empty', 4, { sizeBytes: 0, ctimeNs: 2n }),
  ];
  const found = await compareTrees(new Map(before.map((e) => [e.path, e])), after);
  expect(found.suspects.map((s) => s.after.path)).toEqual(['/new-inode', '/touched']);
  expect(found.same).toBe(2);
  const changes = withContent(found, new Set(['/new-inode', '/touched']));
  expect(changes.map((c) => [c.path, c.aspects])).toEqual([
    ['/empty', ['ctime']],
    ['/new-inode', ['content']],
    ['/touched', ['content', 'mtime']],
  ]);
  expect(withContent(found, new Set()).map((c) => c.path)).toEqual(['/empty', '/touched']);
});
