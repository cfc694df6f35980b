/** Pictures of a screen: QEMU before 7.1 writes PPM only, people want PNG (RFC 2083). */
import { crc32, deflateSync } from 'node:zlib';

const SIGNATURE = Buffer.from([0x89, 0x50, 0x4e, 0x47, 0x0d, 0x0a, 0x1a, 0x0a]);
/** More pixels than any screen of QEMU has. */
const MAX_PIXELS = 1 << 26;

/** True if these are the first bytes of a PNG. */
export function isPng(bytes: Uint8Array): boolean {
  return SIGNATURE.equals(bytes.subarray(0, SIGNATURE.length));
}

/** The picture of a binary PPM (P6, 8 bits a colour) as PNG. Throws RangeError for anything else. */
export function ppmToPng(ppm: Uint8Array): Buffer {
  const { width, height, start } = ppmHeader(ppm);
  const lineBytes = width * 3;
  if (ppm.length - start < lineBytes * height)
    throw new RangeError(`a PPM of ${width}×${height} pixels is cut short`);
  // Before each line a byte says how it is filtered: not at all.
  const lines = Buffer.alloc((lineBytes + 1) * height);
  for (let y = 0; y < height; y++)
    lines.set(
      ppm.subarray(start + y * lineBytes, start + (y + 1) * lineBytes),
      y * (lineBytes + 1) + 1,
    );
  const header = Buffer.alloc(13);
  header.writeUInt32BE(width, 0);
  header.writeUInt32BE(height, 4);
  header[8] = 8; // bits a colour
  header[9] = 2; // red, green, blue
  return Buffer.concat([
    SIGNATURE,
    chunk('IHDR', header),
    chunk('IDAT', deflateSync(lines)),
    chunk('IEND', Buffer.alloc(0)),
  ]);
}

function ppmHeader(ppm: Uint8Array): { width: number; height: number; start: number } {
  const text = Buffer.from(ppm.subarray(0, 512)).toString('latin1');
  // Magic, width, height and greatest value, separated by white space and comments; one white space before the pixels.
  const match =
    /^P6(?:\s+|#[^\n]*\n)+(\d{1,6})(?:\s+|#[^\n]*\n)+(\d{1,6})(?:\s+|#[^\n]*\n)+255\s/.exec(text);
  const width = Number(match?.[1]);
  const height = Number(match?.[2]);
  if (match === null || !(width > 0 && height > 0 && width * height <= MAX_PIXELS))
    throw new RangeError('not a PPM of 8 bits a colour');
  return { width, height, start: match[0].length };
}

function chunk(type: string, data: Buffer): Buffer {
  const body = Buffer.concat([Buffer.from(type, 'latin1'), data]);
  const framed = Buffer.alloc(body.length + 8);
  framed.writeUInt32BE(data.length, 0);
  framed.set(body, 4);
  framed.writeUInt32BE(crc32(body), body.length + 4);
  return framed;
}
