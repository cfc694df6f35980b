/**
 * The NBD protocol, fixed newstyle, as bytes: constants, parsers of what a client sends and builders of what a
 * server answers. Source: doc/proto.md of NetworkBlockDevice/nbd; all integers are big-endian.
 *
 * Parsers never read beyond what they are given. One that returns undefined says "syntactically wrong, answer with an
 * error"; one that throws {@link ProtocolViolation} says "there is no way to go on, close the connection".
 */

/** The peer broke a rule after which its bytes can no longer be told apart: the connection must be closed. */
export class ProtocolViolation extends Error {
  override readonly name = 'ProtocolViolation';
}

/** Bytes of the headers. */
export const CLIENT_FLAGS_BYTES = 4;
export const OPTION_HEADER_BYTES = 16;
export const REQUEST_HEADER_BYTES = 28;
export const SIMPLE_REPLY_BYTES = 16;
export const CHUNK_HEADER_BYTES = 20;
/** A chunk header and the offset that precedes the data. */
export const DATA_CHUNK_HEADER_BYTES = CHUNK_HEADER_BYTES + 8;
export const HOLE_CHUNK_BYTES = CHUNK_HEADER_BYTES + 12;

/** Longest name, description, query or message ("Strings" in the specification). */
export const MAX_STRING_BYTES = 4096;

const OPTION_MAGIC_HIGH = 0x49484156; // "IHAVEOPT"
const OPTION_MAGIC_LOW = 0x454f5054;
const OPTION_REPLY_MAGIC = 0x3e889045565a9n;
const REQUEST_MAGIC = 0x25609513;
const SIMPLE_REPLY_MAGIC = 0x67446698;
const CHUNK_MAGIC = 0x668e33ef;

/** Handshake flags of the server and client flags: the same two bits. */
export const FLAG_FIXED_NEWSTYLE = 1;
export const FLAG_NO_ZEROES = 2;

export const TransmissionFlag = {
  hasFlags: 1 << 0,
  readOnly: 1 << 1,
  sendFlush: 1 << 2,
  sendFua: 1 << 3,
  sendTrim: 1 << 5,
  sendWriteZeroes: 1 << 6,
  sendDf: 1 << 7,
  canMultiConn: 1 << 8,
  sendCache: 1 << 10,
  sendFastZero: 1 << 11,
} as const;

export const Option = {
  exportName: 1,
  abort: 2,
  list: 3,
  startTls: 5,
  info: 6,
  go: 7,
  structuredReply: 8,
  listMetaContext: 9,
  setMetaContext: 10,
} as const;

export const Reply = {
  ack: 1,
  server: 2,
  info: 3,
  metaContext: 4,
  errUnsupported: 0x8000_0001,
  errPolicy: 0x8000_0002,
  errInvalid: 0x8000_0003,
  errTlsRequired: 0x8000_0005,
  errUnknown: 0x8000_0006,
  errShutdown: 0x8000_0007,
  errTooBig: 0x8000_0009,
} as const;
export type Reply = (typeof Reply)[keyof typeof Reply];

export const Info = { export: 0, name: 1, description: 2, blockSize: 3 } as const;

export const Command = {
  read: 0,
  write: 1,
  disconnect: 2,
  flush: 3,
  trim: 4,
  cache: 5,
  writeZeroes: 6,
  blockStatus: 7,
} as const;

export const CommandFlag = {
  fua: 1 << 0,
  noHole: 1 << 1,
  dontFragment: 1 << 2,
  requireOne: 1 << 3,
  fastZero: 1 << 4,
} as const;

/** The error values a reply may carry. */
export const NbdError = {
  EPERM: 1,
  EIO: 5,
  ENOMEM: 12,
  EINVAL: 22,
  ENOSPC: 28,
  EOVERFLOW: 75,
  ENOTSUP: 95,
  ESHUTDOWN: 108,
} as const;
export type NbdError = (typeof NbdError)[keyof typeof NbdError];

const ChunkType = { none: 0, offsetData: 1, offsetHole: 2, blockStatus: 5, error: 0x8001 } as const;
const CHUNK_DONE = 1;

/** Status of `base:allocation`. */
export const STATE_HOLE = 1;
export const STATE_ZERO = 2;

/** The only metadata context served, and its number on every connection. */
export const ALLOCATION_CONTEXT = 'base:allocation';
export const ALLOCATION_CONTEXT_ID = 1;

const utf8 = new TextDecoder('utf-8', { fatal: true, ignoreBOM: true });

/** A string of the protocol: at most 4096 bytes of UTF-8 without NUL; undefined otherwise. */
export function parseString(bytes: Uint8Array): string | undefined {
  if (bytes.length > MAX_STRING_BYTES || bytes.includes(0)) return undefined;
  try {
    return utf8.decode(bytes);
  } catch {
    return undefined;
  }
}

/** `text` as UTF-8, cut after a whole character so that it has at most `limit` bytes. */
export function clippedUtf8(text: string, limit = MAX_STRING_BYTES): Buffer {
  const bytes = Buffer.from(text.replaceAll('\0', ' '), 'utf8');
  if (bytes.length <= limit) return bytes;
  let end = limit;
  while (end > 0 && ((bytes[end] ?? 0) & 0xc0) === 0x80) end--;
  return bytes.subarray(0, end);
}

// ---- handshake ----------------------------------------------------------------------------------------------

/** What the server says first: fixed newstyle, no zeroes. */
export function buildGreeting(): Buffer {
  const greeting = Buffer.alloc(18);
  greeting.write('NBDMAGICIHAVEOPT', 'latin1');
  greeting.writeUInt16BE(FLAG_FIXED_NEWSTYLE | FLAG_NO_ZEROES, 16);
  return greeting;
}

/** Throws for an unknown flag, as the specification demands. */
export function parseClientFlags(bytes: Buffer): { fixedNewstyle: boolean; noZeroes: boolean } {
  const flags = bytes.readUInt32BE(0);
  if ((flags & ~(FLAG_FIXED_NEWSTYLE | FLAG_NO_ZEROES)) !== 0) {
    throw new ProtocolViolation(`unknown client flags 0x${flags.toString(16)}`);
  }
  return {
    fixedNewstyle: (flags & FLAG_FIXED_NEWSTYLE) !== 0,
    noZeroes: (flags & FLAG_NO_ZEROES) !== 0,
  };
}

/** `length` is what the client claims (up to 2^32 − 1), not what it has sent. */
export function parseOptionHeader(bytes: Buffer): { option: number; length: number } {
  if (bytes.readUInt32BE(0) !== OPTION_MAGIC_HIGH || bytes.readUInt32BE(4) !== OPTION_MAGIC_LOW) {
    throw new ProtocolViolation('an option does not begin with its magic');
  }
  return { option: bytes.readUInt32BE(8), length: bytes.readUInt32BE(12) };
}

const NOTHING = Buffer.alloc(0);

export function buildOptionReply(option: number, type: Reply, data: Uint8Array = NOTHING): Buffer {
  const reply = Buffer.allocUnsafe(20 + data.length);
  reply.writeBigUInt64BE(OPTION_REPLY_MAGIC, 0);
  reply.writeUInt32BE(option, 8);
  reply.writeUInt32BE(type, 12);
  reply.writeUInt32BE(data.length, 16);
  reply.set(data, 20);
  return reply;
}

/** The payload of INFO and GO; undefined where it is malformed. `name` is undefined where it is no valid string. */
export function parseInfoRequest(
  data: Buffer,
): { name: string | undefined; requests: ReadonlySet<number> } | undefined {
  if (data.length < 6) return undefined;
  const nameBytes = data.readUInt32BE(0);
  if (nameBytes > data.length - 6) return undefined;
  const count = data.readUInt16BE(4 + nameBytes);
  if (data.length !== 6 + nameBytes + 2 * count) return undefined;
  const requests = new Set<number>();
  for (let i = 0; i < count; i++) requests.add(data.readUInt16BE(6 + nameBytes + 2 * i));
  return { name: parseString(data.subarray(4, 4 + nameBytes)), requests };
}

/** The payload of LIST_META_CONTEXT and SET_META_CONTEXT; undefined where it is malformed. */
export function parseMetaContextRequest(
  data: Buffer,
): { name: string | undefined; queries: readonly string[] } | undefined {
  if (data.length < 8) return undefined;
  const nameBytes = data.readUInt32BE(0);
  if (nameBytes > data.length - 8) return undefined;
  let at = 4 + nameBytes;
  const count = data.readUInt32BE(at);
  at += 4;
  const queries: string[] = [];
  // Every query takes at least the four bytes of its length, so `count` cannot make this loop run long.
  for (let i = 0; i < count; i++) {
    if (data.length - at < 4) return undefined;
    const bytes = data.readUInt32BE(at);
    at += 4;
    if (bytes > data.length - at) return undefined;
    const query = parseString(data.subarray(at, at + bytes));
    if (query === undefined) return undefined;
    queries.push(query);
    at += bytes;
  }
  if (at !== data.length) return undefined;
  return { name: parseString(data.subarray(4, 4 + nameBytes)), queries };
}

/** The answer to EXPORT_NAME: the only one without a header. */
export function buildExportNameReply(sizeBytes: number, flags: number, noZeroes: boolean): Buffer {
  const reply = Buffer.alloc(noZeroes ? 10 : 134);
  reply.writeBigUInt64BE(BigInt(sizeBytes), 0);
  reply.writeUInt16BE(flags, 8);
  return reply;
}

/** Payload of a reply of type `server` (LIST). */
export function buildListEntry(name: string, description: string): Buffer {
  const nameBytes = clippedUtf8(name);
  const length = Buffer.allocUnsafe(4);
  length.writeUInt32BE(nameBytes.length, 0);
  return Buffer.concat([length, nameBytes, clippedUtf8(description)]);
}

/** Payload of a reply of type `info`: size and transmission flags. */
export function buildInfoExport(sizeBytes: number, flags: number): Buffer {
  const data = Buffer.allocUnsafe(12);
  data.writeUInt16BE(Info.export, 0);
  data.writeBigUInt64BE(BigInt(sizeBytes), 2);
  data.writeUInt16BE(flags, 10);
  return data;
}

/** Payload of a reply of type `info`: name or description. */
export function buildInfoString(
  info: typeof Info.name | typeof Info.description,
  text: string,
): Buffer {
  const type = Buffer.allocUnsafe(2);
  type.writeUInt16BE(info, 0);
  return Buffer.concat([type, clippedUtf8(text)]);
}

/** Payload of a reply of type `info`: size constraints, in bytes. */
export function buildInfoBlockSize(minimum: number, preferred: number, maximum: number): Buffer {
  const data = Buffer.allocUnsafe(14);
  data.writeUInt16BE(Info.blockSize, 0);
  data.writeUInt32BE(minimum, 2);
  data.writeUInt32BE(preferred, 6);
  data.writeUInt32BE(maximum, 10);
  return data;
}

/** Payload of a reply of type `metaContext`. */
export function buildMetaContext(id: number, name: string): Buffer {
  const data = Buffer.allocUnsafe(4);
  data.writeUInt32BE(id, 0);
  return Buffer.concat([data, Buffer.from(name, 'utf8')]);
}

// ---- transmission -------------------------------------------------------------------------------------------

/** A request's header. The cookie is opaque: it is given back as two words. */
export interface Request {
  readonly flags: number;
  readonly command: number;
  readonly cookieHigh: number;
  readonly cookieLow: number;
  /** Infinity where the client's 64 bits are above 2^53 − 1: beyond the end of every export. */
  readonly offset: number;
  readonly length: number;
}

export function parseRequest(bytes: Buffer): Request {
  if (bytes.readUInt32BE(0) !== REQUEST_MAGIC) {
    throw new ProtocolViolation('a request does not begin with its magic');
  }
  const offset = bytes.readUInt32BE(16) * 0x1_0000_0000 + bytes.readUInt32BE(20);
  return {
    flags: bytes.readUInt16BE(4),
    command: bytes.readUInt16BE(6),
    cookieHigh: bytes.readUInt32BE(8),
    cookieLow: bytes.readUInt32BE(12),
    offset: Number.isSafeInteger(offset) ? offset : Infinity,
    length: bytes.readUInt32BE(24),
  };
}

/** Writes a simple reply's header at `at`; with error 0 after a read the data follows it. */
export function putSimpleReply(
  into: Buffer,
  at: number,
  request: Request,
  error: NbdError | 0,
): void {
  into.writeUInt32BE(SIMPLE_REPLY_MAGIC, at);
  into.writeUInt32BE(error, at + 4);
  into.writeUInt32BE(request.cookieHigh, at + 8);
  into.writeUInt32BE(request.cookieLow, at + 12);
}

export function buildSimpleReply(request: Request, error: NbdError | 0): Buffer {
  const reply = Buffer.allocUnsafe(SIMPLE_REPLY_BYTES);
  putSimpleReply(reply, 0, request, error);
  return reply;
}

function putChunkHeader(
  into: Buffer,
  at: number,
  request: Request,
  type: (typeof ChunkType)[keyof typeof ChunkType],
  payloadBytes: number,
  last: boolean,
): void {
  into.writeUInt32BE(CHUNK_MAGIC, at);
  into.writeUInt16BE(last ? CHUNK_DONE : 0, at + 4);
  into.writeUInt16BE(type, at + 6);
  into.writeUInt32BE(request.cookieHigh, at + 8);
  into.writeUInt32BE(request.cookieLow, at + 12);
  into.writeUInt32BE(payloadBytes, at + 16);
}

function putOffset(into: Buffer, at: number, offset: number): void {
  into.writeUInt32BE(Math.floor(offset / 0x1_0000_0000), at);
  into.writeUInt32BE(offset % 0x1_0000_0000, at + 4);
}

/** Success without content, as a structured reply. */
export function buildNoneChunk(request: Request): Buffer {
  const chunk = Buffer.allocUnsafe(CHUNK_HEADER_BYTES);
  putChunkHeader(chunk, 0, request, ChunkType.none, 0, true);
  return chunk;
}

/** Writes the {@link DATA_CHUNK_HEADER_BYTES} that precede `length` (> 0) bytes of content. */
export function putDataChunkHeader(
  into: Buffer,
  at: number,
  request: Request,
  offset: number,
  length: number,
  last: boolean,
): void {
  putChunkHeader(into, at, request, ChunkType.offsetData, 8 + length, last);
  putOffset(into, at + CHUNK_HEADER_BYTES, offset);
}

/** Writes a whole chunk of {@link HOLE_CHUNK_BYTES}; `length` > 0. */
export function putHoleChunk(
  into: Buffer,
  at: number,
  request: Request,
  offset: number,
  length: number,
  last: boolean,
): void {
  putChunkHeader(into, at, request, ChunkType.offsetHole, 12, last);
  putOffset(into, at + CHUNK_HEADER_BYTES, offset);
  into.writeUInt32BE(length, at + CHUNK_HEADER_BYTES + 8);
}

/** The last chunk of a failed request; `message` is for a person and is cut to the protocol's limit. */
export function buildErrorChunk(request: Request, error: NbdError, message: string): Buffer {
  const text = clippedUtf8(message);
  const chunk = Buffer.allocUnsafe(CHUNK_HEADER_BYTES + 6 + text.length);
  putChunkHeader(chunk, 0, request, ChunkType.error, 6 + text.length, true);
  chunk.writeUInt32BE(error, CHUNK_HEADER_BYTES);
  chunk.writeUInt16BE(text.length, CHUNK_HEADER_BYTES + 4);
  chunk.set(text, CHUNK_HEADER_BYTES + 6);
  return chunk;
}

/** The whole reply to a block status request: at least one run, lengths > 0 and below 2^32. */
export function buildBlockStatus(
  request: Request,
  contextId: number,
  runs: readonly { readonly length: number; readonly state: number }[],
): Buffer {
  const chunk = Buffer.allocUnsafe(CHUNK_HEADER_BYTES + 4 + 8 * runs.length);
  putChunkHeader(chunk, 0, request, ChunkType.blockStatus, 4 + 8 * runs.length, true);
  chunk.writeUInt32BE(contextId, CHUNK_HEADER_BYTES);
  let at = CHUNK_HEADER_BYTES + 4;
  for (const run of runs) {
    chunk.writeUInt32BE(run.length, at);
    chunk.writeUInt32BE(run.state, at + 4);
    at += 8;
  }
  return chunk;
}
