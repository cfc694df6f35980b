/** File names between bytes and strings, and in shell scripts. Pure. */

const LOW = 0xdc00;

/** The bytes as text; a byte that is no UTF-8 becomes U+DC80 to U+DCFF. */
export function decodeName(bytes: Uint8Array): string {
  const buffer = Buffer.from(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  const text = buffer.toString('utf8');
  if (!text.includes('\ufffd') || Buffer.from(text).equals(buffer)) return text;
  let out = '';
  for (let at = 0; at < buffer.length;) {
    const length = sequenceLength(buffer, at);
    if (length === 0) out += String.fromCharCode(LOW + (buffer[at] ?? 0));
    else out += buffer.toString('utf8', at, at + length);
    at += Math.max(1, length);
  }
  return out;
}

/** Bytes of the valid UTF-8 character at `at`; 0 where there is none. */
function sequenceLength(bytes: Buffer, at: number): number {
  const first = bytes[at] ?? 0;
  const length = first < 0x80 ? 1 : first < 0xc2 ? 0 : first < 0xe0 ? 2 : first < 0xf0 ? 3 : 4;
  if (length === 0 || at + length > bytes.length) return 0;
  const piece = bytes.subarray(at, at + length);
  return Buffer.from(piece.toString('utf8')).equals(piece) ? length : 0;
}

/** The bytes that {@link decodeName} made the text of. */
export function encodeName(name: string): Buffer {
  if (!/[\udc80-\udcff]/u.test(name)) return Buffer.from(name);
  const parts: Buffer[] = [];
  for (const character of name) {
    const code = character.charCodeAt(0);
    const isRaw = character.length === 1 && code >= LOW + 0x80 && code <= LOW + 0xff;
    parts.push(isRaw ? Buffer.of(code - LOW) : Buffer.from(character));
  }
  return Buffer.concat(parts);
}

/** For people: bytes that are no UTF-8 as `\xNN`, line breaks and other controls too, so that a name stays on its line. */
export function showName(name: string): string {
  return name.replace(/[\u0000-\u001f\u007f-\u009f\udc80-\udcff]/gu, (c) => {
    const code = c.charCodeAt(0);
    return `\\x${(code >= LOW ? code - LOW : code).toString(16).padStart(2, '0')}`;
  });
}

/** The name as one word of a shell script. */
export function shellWord(name: string): Buffer {
  return encodeName(`'${name.replaceAll("'", `'\\''`)}'`);
}

/** A script made of text and of names that become words of it: `` script`cat -- ${path}` ``. */
export function script(text: TemplateStringsArray, ...names: readonly string[]): Buffer {
  return Buffer.concat(
    text.flatMap((part, i) => {
      const name = names[i];
      return name === undefined ? [Buffer.from(part)] : [Buffer.from(part), shellWord(name)];
    }),
  );
}

/** Absolute, without empty parts, `.` and `..` (which does not lead above the root). */
export function normalPath(path: string): string {
  const parts: string[] = [];
  for (const part of path.split('/')) {
    if (part === '' || part === '.') continue;
    if (part === '..') parts.pop();
    else parts.push(part);
  }
  return `/${parts.join('/')}`;
}

/** The last part of an absolute path; '' for the root. */
export function baseName(path: string): string {
  return path.slice(path.lastIndexOf('/') + 1);
}

/** The directory of an absolute path; the root's is the root. */
export function parentPath(path: string): string {
  return path.slice(0, path.lastIndexOf('/')) || '/';
}
