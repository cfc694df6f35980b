/** The first file of a cartridge: what a person finds who has the tape, and neither b2 nor the repository. */
import { encodeTapeLabel, LABEL_MEMBER, README_MEMBER, type TapeLabel } from '../format/tape.js';

/** The text of the label. */
export function readmeText(l: TapeLabel, encrypted: boolean): string {
  const blocks = l.recordBytes / 512;
  return `This is cartridge ${l.number} (${l.label}) of the set "${l.setName}", written by b2 ${l.program}
on ${l.host} on ${l.created}. It holds backups of block devices (disks).

repository  ${l.repositoryId}
set         ${l.setId}
cartridge   ${l.cartridgeId}
records     ${l.recordBytes} bytes (tar -b ${blocks}), variable block mode
contents    ${encrypted ? 'encrypted (AES-256-GCM): the password or a key file of the repository is needed' : 'not encrypted'}

With b2: put the cartridge in a drive, here /dev/nst0.

    b2 import-tape /dev/nst0 --list                       what is on it
    b2 import-tape /dev/nst0 --volume NAME --to /dev/sdX  a disk as it was
    b2 import-tape /dev/nst0 --repo /srv/b2               the repository

Without b2: every file of this tape is a tar archive, with file marks between them. Taken
out of the tape one after the other, all of them into the same directory, they are a b2
repository: the directory b2-repository.

    mt -f /dev/nst0 rewind
    mt -f /dev/nst0 setblk 0
    mkdir out && cd out
    while tar -b ${blocks} -xf /dev/nst0; do :; done     (until there are no more files)

If tar stops at a file mark, "mt -f /dev/nst0 fsf 1" goes on to the next file. Do the same with the
other cartridges of the set. The format is described in FORMAT.md of b2 (sections 1 to 8, and 11
about tapes), well enough to write a program that reads it: test/extractor/extract.mjs in
the sources of b2 is one, and needs nothing but Node.js. Points that were written to the set after
a newer one of the same disk are found by that program and by "b2 import-tape", but not by other
commands of b2 in the directory that tar has made.
`;
}

/** The members of the label's archive, with their names. */
export function labelMembers(
  l: TapeLabel,
  encrypted: boolean,
): readonly (readonly [string, Buffer])[] {
  const root = `b2-tape-${l.label}/`;
  return [
    [`${root}${README_MEMBER}`, Buffer.from(readmeText(l, encrypted), 'utf8')],
    [`${root}${LABEL_MEMBER}`, encodeTapeLabel(l)],
  ];
}
