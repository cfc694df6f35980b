/** What GNU tar says on stderr while it reads files (LC_ALL=C, --quoting-style=escape). Pure. */

export interface TarMessages {
  /** Members whose content is wrong, cut short or missing: as named in the archive. */
  readonly damaged: readonly { readonly name: string; readonly reason: string }[];
  /** Things that tar leaves out by nature (sockets), or that do not touch contents. */
  readonly notes: readonly string[];
  /** Anything else: the archive is not to be trusted. */
  readonly fatal: readonly string[];
}

const DAMAGED =
  /^(.*): ((?:Read error at byte|Cannot (?:open|savedir|stat|read|readlink|opendir|close)|File shrank by|File removed before)\b.*)$/;
const NOTE = /: (socket ignored|Warning: .*|file changed as we read it)$/;

/** Undoes the quoting: `\n`, `\\`, `\303`. */
export function unescapeName(text: string): Buffer {
  const out: Buffer[] = [];
  const letters: Readonly<Record<string, number>> = {
    a: 7,
    b: 8,
    t: 9,
    n: 10,
    v: 11,
    f: 12,
    r: 13,
  };
  for (const [, octal, letter, plain] of text.matchAll(/\\([0-7]{3})|\\([^])|([^\\]+)/g)) {
    if (octal !== undefined) out.push(Buffer.of(parseInt(octal, 8)));
    else if (letter !== undefined) {
      const code = letters[letter];
      out.push(code === undefined ? Buffer.from(letter) : Buffer.of(code));
    } else out.push(Buffer.from(plain ?? ''));
  }
  return Buffer.concat(out);
}

/** Sorts the lines. Names stay quoted: see {@link unescapeName}. */
export function parseTarMessages(stderr: string): TarMessages {
  const damaged: { name: string; reason: string }[] = [];
  const notes: string[] = [];
  const fatal: string[] = [];
  for (const raw of stderr.split('\n')) {
    const line = raw.replace(/^(?:\S*\/)?tar: /, '').trim();
    if (line === '' || line.startsWith('Exiting with failure status')) continue;
    const found = DAMAGED.exec(line);
    if (NOTE.test(line)) notes.push(line);
    else if (found !== null) damaged.push({ name: found[1] ?? '', reason: found[2] ?? '' });
    else fatal.push(line);
  }
  return { damaged, notes, fatal };
}
