/** Trees of files with everything that a backup of files can lose, and comparisons with rsync. */
import { execFileSync } from 'node:child_process';

import { findTool, type Needs } from './requires.js';

/** What {@link growTree} and {@link differences} need. */
export const TREE_NEEDS: Needs = {
  root: true,
  tools: ['rsync', 'setfacl', 'setfattr', 'getfattr', 'mknod', 'mkfifo', 'setcap'],
};

const COMMON = `
set -e
cd "$1"
mkdir -p etc/deep/er var 'name with  blanks' "$(printf 'line\\nbreak')" "$(printf 'bytes\\377\\376')"
echo 127.0.0.1 localhost >etc/hosts
seq 100000 >var/numbers
head -c 3000000 /dev/urandom >etc/deep/er/random
: >etc/empty
echo one >'name with  blanks/a b'
echo two >"$(printf 'line\\nbreak')/$(printf 'new\\nline')"
echo three >"$(printf 'bytes\\377\\376')/$(printf '\\200')"
`;

const UNIX = `
ln etc/hosts etc/deep/hosts-too
ln -s ../etc/hosts var/link
ln -s /etc/hosts var/absolute
ln -s nowhere var/dangling
ln -s ../../../../../../etc/passwd var/escape
mkfifo var/fifo
mknod var/null c 1 3
chown 1234:4321 etc/hosts
chown -h 77:88 var/link
chmod 4751 var/numbers
chmod 2775 etc/deep
chmod 1777 var
truncate -s 300M var/sparse
printf middle | dd of=var/sparse bs=1 seek=200000000 conv=notrunc status=none
setfacl -m u:33:rw,g:44:r etc/deep/er/random
setfacl -d -m u:33:rwx etc/deep
setfattr -n user.note -v "$(printf 'with\\nlines and \\001 bytes')" etc/hosts
setfattr -n trusted.b2 -v secret etc/deep
setcap cap_net_raw+ep etc/empty
touch -d '1969-12-31 23:59:58.5 UTC' etc/empty
touch -d '2038-01-19 03:14:08.123456789 UTC' etc/deep/er/random
`;

function sh(script: string, ...args: readonly string[]): void {
  execFileSync('/bin/sh', ['-c', script, 'sh', ...args], { stdio: 'pipe' });
}

/** Fills a mounted file system; `unix`: with owners, modes, links, xattrs, ACLs, holes and device nodes too. */
export function growTree(directory: string, unix: boolean): void {
  sh(
    unix ? COMMON + UNIX : COMMON.replace(/ "\$\(printf .*$/m, '').replace(/^echo t.*$/gm, ''),
    directory,
  );
}

/** Changes that are fsynced and then only in the journal, as long as nothing else writes it back. */
export function changeTree(directory: string): void {
  sh(
    `set -e
cd "$1"
echo changed >>etc/hosts
mkdir -p late
echo "only in the journal" >late/file
mv var/numbers late/moved
sync etc/hosts late/file late/moved
sync late var etc`,
    directory,
  );
}

/** What rsync would do to make `copy` like `original`, contents, owners, links, xattrs and ACLs compared; empty: the same. */
export function differences(original: string, copy: string, flags = '-nacHAXi'): string {
  return execFileSync(
    findTool('rsync') ?? 'rsync',
    [
      flags,
      '--delete',
      '--devices',
      '--specials',
      '--exclude=/lost+found',
      `${original}/`,
      `${copy}/`,
    ],
    { encoding: 'utf8', stdio: 'pipe' },
  );
}
