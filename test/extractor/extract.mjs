#!/usr/bin/env node
/**
 * A stand-alone reader of b2 repositories, written from src/format/FORMAT.md alone (section numbers below are
 * that document's). One file, Node's standard library only, no code shared with b2: what it can restore can be
 * restored without b2, and what it disagrees about is a fault of b2 or of the document.
 *
 *   node extract.mjs REPO_DIR list [--packs-only]
 *   node extract.mjs REPO_DIR extract VOLUME_NAME_OR_ID SEQ|latest OUT_FILE [--packs-only] [--snapshot NAME]
 *
 * REPO_DIR is a repository in a directory. The passphrase comes from B2_PASSWORD, the path of a key file from
 * B2_KEY_FILE. `latest` is the newest recovery point; SEQ may name any commit of the chain. OUT_FILE must not exist;
 * it appears, sparse, only when every byte of it has been checked.
 *
 * The default way reads segments and the packs of the journal (section 8, second half). `--packs-only` never looks
 * into manifest/ or journal/: it reads every pack and walks the chain of commits (section 8, first half).
 *
 * Anything wrong ends the program with status 1 and a message that names the object and the offset. What is
 * suspicious but allowed by the format (a torn end of an unsealed pack) is a warning on standard error.
 */
import { createDecipheriv, hkdfSync, scryptSync, timingSafeEqual } from 'node:crypto';
import {
  closeSync,
  existsSync,
  fstatSync,
  fsyncSync,
  ftruncateSync,
  linkSync,
  openSync,
  readFileSync,
  readdirSync,
  readSync,
  realpathSync,
  statSync,
  unlinkSync,
  writeSync,
} from 'node:fs';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import * as zlib from 'node:zlib';

const BLOCK = 4096;
const REGION_BLOCKS = 262_144;
const MAX_BODY = 16 * 1024 * 1024;
const MAX_PACK = 1024 * 1024 * 1024;
const MAX_FRAMES = 65_536;
const MAX_CHUNKS = 262_144;
const NONE = 0xffffffff;
const SEAL = 16;
const FRAME_CHUNKS = 1;
const FRAME_EXTENTS = 2;
const FRAME_COMMIT = 3;
const FRAME_FOOTER = 4;
const PAGE_EXTENTS = 1;
const PAGE_COMMITS = 2;
const PAGE_PACKS = 3;
const PAGE_INDEX = 4;
const CLASSES = ['none', 'fuzzy', 'crash', 'fs', 'app'];
const COVERAGES = ['exact', 'coalesced', 'unknown'];
const ZERO_BLOCK = Buffer.alloc(BLOCK);
const ZERO_HASH = '0'.repeat(64);
const NONCE_ZERO = Buffer.alloc(12);
const EMPTY = Buffer.alloc(0);
/** Bytes of plain frames kept in memory. */
const FRAME_CACHE_BYTES = 64 * 1024 * 1024;
/** Packs kept open with their index. */
const OPEN_PACKS = 24;

/** Something in the repository is not as the format says, or the request cannot be met. */
export class ExtractError extends Error {}

/**
 * @param {string} object name of the object, or what else is at fault
 * @param {number | null} offset in bytes, null where none makes sense
 * @param {string} what what is wrong
 * @returns {never}
 */
function fail(object, offset, what) {
  throw new ExtractError(
    offset === null ? `${object}: ${what}` : `${object}, offset ${offset}: ${what}`,
  );
}

function warn(text) {
  process.stderr.write(`extract: warning: ${text}\n`);
}

// ---------------------------------------------------------------------------------------------------------------
// Primitives (section 2)
// ---------------------------------------------------------------------------------------------------------------

const CRC_TABLE = Uint32Array.from({ length: 256 }, (_, n) => {
  let c = n;
  for (let k = 0; k < 8; k++) c = c & 1 ? 0xedb88320 ^ (c >>> 1) : c >>> 1;
  return c >>> 0;
});

function crc32Slow(bytes) {
  let c = 0xffffffff;
  for (let i = 0; i < bytes.length; i++) c = CRC_TABLE[(c ^ bytes[i]) & 255] ^ (c >>> 8);
  return ~c >>> 0;
}

/** CRC-32 of IEEE 802.3; zlib's where Node has it (from 20.15 and 22.2 on). */
export const crc32 =
  typeof zlib.crc32 === 'function' ? (bytes) => zlib.crc32(bytes) >>> 0 : crc32Slow;

const BLAKE3_IV = Uint32Array.of(
  0x6a09e667,
  0xbb67ae85,
  0x3c6ef372,
  0xa54ff53a,
  0x510e527f,
  0x9b05688c,
  0x1f83d9ab,
  0x5be0cd19,
);
const CHUNK_START = 1;
const CHUNK_END = 2;
const PARENT = 4;
const ROOT = 8;
const KEYED_HASH = 16;

/**
 * BLAKE3's compression function; the first 8 words of the result go to `out` at `at` (which may be `cv` itself).
 * The input block is the 16 words of `m` from `mi`.
 */
// prettier-ignore
function blake3Compress(cv, ci, m, mi, counter, blockLength, flags, out, at) {
  let m0 = m[mi], m1 = m[mi + 1], m2 = m[mi + 2], m3 = m[mi + 3];
  let m4 = m[mi + 4], m5 = m[mi + 5], m6 = m[mi + 6], m7 = m[mi + 7];
  let m8 = m[mi + 8], m9 = m[mi + 9], m10 = m[mi + 10], m11 = m[mi + 11];
  let m12 = m[mi + 12], m13 = m[mi + 13], m14 = m[mi + 14], m15 = m[mi + 15];
  let a0 = cv[ci] | 0, a1 = cv[ci + 1] | 0, a2 = cv[ci + 2] | 0, a3 = cv[ci + 3] | 0;
  let b0 = cv[ci + 4] | 0, b1 = cv[ci + 5] | 0, b2 = cv[ci + 6] | 0, b3 = cv[ci + 7] | 0;
  let c0 = BLAKE3_IV[0] | 0, c1 = BLAKE3_IV[1] | 0, c2 = BLAKE3_IV[2] | 0, c3 = BLAKE3_IV[3] | 0;
  let d0 = counter | 0, d1 = (counter / 4294967296) | 0, d2 = blockLength | 0, d3 = flags | 0;
  for (let round = 0; ; round++) {
    // columns
    a0 = (a0 + b0 + m0) | 0; d0 ^= a0; d0 = (d0 >>> 16) | (d0 << 16); c0 = (c0 + d0) | 0; b0 ^= c0; b0 = (b0 >>> 12) | (b0 << 20);
    a0 = (a0 + b0 + m1) | 0; d0 ^= a0; d0 = (d0 >>> 8) | (d0 << 24); c0 = (c0 + d0) | 0; b0 ^= c0; b0 = (b0 >>> 7) | (b0 << 25);
    a1 = (a1 + b1 + m2) | 0; d1 ^= a1; d1 = (d1 >>> 16) | (d1 << 16); c1 = (c1 + d1) | 0; b1 ^= c1; b1 = (b1 >>> 12) | (b1 << 20);
    a1 = (a1 + b1 + m3) | 0; d1 ^= a1; d1 = (d1 >>> 8) | (d1 << 24); c1 = (c1 + d1) | 0; b1 ^= c1; b1 = (b1 >>> 7) | (b1 << 25);
    a2 = (a2 + b2 + m4) | 0; d2 ^= a2; d2 = (d2 >>> 16) | (d2 << 16); c2 = (c2 + d2) | 0; b2 ^= c2; b2 = (b2 >>> 12) | (b2 << 20);
    a2 = (a2 + b2 + m5) | 0; d2 ^= a2; d2 = (d2 >>> 8) | (d2 << 24); c2 = (c2 + d2) | 0; b2 ^= c2; b2 = (b2 >>> 7) | (b2 << 25);
    a3 = (a3 + b3 + m6) | 0; d3 ^= a3; d3 = (d3 >>> 16) | (d3 << 16); c3 = (c3 + d3) | 0; b3 ^= c3; b3 = (b3 >>> 12) | (b3 << 20);
    a3 = (a3 + b3 + m7) | 0; d3 ^= a3; d3 = (d3 >>> 8) | (d3 << 24); c3 = (c3 + d3) | 0; b3 ^= c3; b3 = (b3 >>> 7) | (b3 << 25);
    // diagonals
    a0 = (a0 + b1 + m8) | 0; d3 ^= a0; d3 = (d3 >>> 16) | (d3 << 16); c2 = (c2 + d3) | 0; b1 ^= c2; b1 = (b1 >>> 12) | (b1 << 20);
    a0 = (a0 + b1 + m9) | 0; d3 ^= a0; d3 = (d3 >>> 8) | (d3 << 24); c2 = (c2 + d3) | 0; b1 ^= c2; b1 = (b1 >>> 7) | (b1 << 25);
    a1 = (a1 + b2 + m10) | 0; d0 ^= a1; d0 = (d0 >>> 16) | (d0 << 16); c3 = (c3 + d0) | 0; b2 ^= c3; b2 = (b2 >>> 12) | (b2 << 20);
    a1 = (a1 + b2 + m11) | 0; d0 ^= a1; d0 = (d0 >>> 8) | (d0 << 24); c3 = (c3 + d0) | 0; b2 ^= c3; b2 = (b2 >>> 7) | (b2 << 25);
    a2 = (a2 + b3 + m12) | 0; d1 ^= a2; d1 = (d1 >>> 16) | (d1 << 16); c0 = (c0 + d1) | 0; b3 ^= c0; b3 = (b3 >>> 12) | (b3 << 20);
    a2 = (a2 + b3 + m13) | 0; d1 ^= a2; d1 = (d1 >>> 8) | (d1 << 24); c0 = (c0 + d1) | 0; b3 ^= c0; b3 = (b3 >>> 7) | (b3 << 25);
    a3 = (a3 + b0 + m14) | 0; d2 ^= a3; d2 = (d2 >>> 16) | (d2 << 16); c1 = (c1 + d2) | 0; b0 ^= c1; b0 = (b0 >>> 12) | (b0 << 20);
    a3 = (a3 + b0 + m15) | 0; d2 ^= a3; d2 = (d2 >>> 8) | (d2 << 24); c1 = (c1 + d2) | 0; b0 ^= c1; b0 = (b0 >>> 7) | (b0 << 25);
    if (round === 6) break;
    // the words permuted: 2 6 3 10 7 0 4 13 1 11 12 5 9 14 15 8
    const t0 = m0, t1 = m1, t5 = m5, t8 = m8, t9 = m9, t4 = m4;
    m0 = m2; m1 = m6; m2 = m3; m3 = m10; m4 = m7; m5 = t0; m6 = t4; m7 = m13;
    m8 = t1; m9 = m11; m10 = m12; m11 = t5; m12 = t9; m13 = m14; m14 = m15; m15 = t8;
  }
  out[at] = a0 ^ c0; out[at + 1] = a1 ^ c1; out[at + 2] = a2 ^ c2; out[at + 3] = a3 ^ c3;
  out[at + 4] = b0 ^ d0; out[at + 5] = b1 ^ d1; out[at + 6] = b2 ^ d2; out[at + 7] = b3 ^ d3;
}

function loadWords(data, from, bytes, words) {
  if (bytes === 64) {
    for (let i = 0, o = from; i < 16; i++, o += 4) {
      words[i] = data[o] | (data[o + 1] << 8) | (data[o + 2] << 16) | (data[o + 3] << 24);
    }
    return;
  }
  words.fill(0);
  for (let i = 0; i < bytes; i++) words[i >> 2] |= data[from + i] << ((i & 3) * 8);
}

/**
 * BLAKE3 in keyed mode (the BLAKE3 paper, section 2.3).
 * @param {Uint8Array} key 32 bytes
 * @param {Uint8Array} data
 * @returns {Buffer} 32 bytes
 */
export function blake3Keyed(key, data) {
  if (key.length !== 32) throw new RangeError('a BLAKE3 key has 32 bytes');
  const keyWords = new Int32Array(8);
  for (let i = 0; i < 8; i++) {
    keyWords[i] =
      key[4 * i] | (key[4 * i + 1] << 8) | (key[4 * i + 2] << 16) | (key[4 * i + 3] << 24);
  }
  const words = new Int32Array(16);
  const stack = new Int32Array(8 * 56);
  let depth = 0;
  const cv = new Int32Array(8);
  const chunks = Math.max(1, Math.ceil(data.length / 1024));
  for (let chunk = 0; chunk < chunks; chunk++) {
    const start = chunk * 1024;
    const length = Math.min(1024, data.length - start);
    const blocks = Math.max(1, Math.ceil(length / 64));
    for (let block = 0; block < blocks; block++) {
      const bytes = Math.min(64, length - block * 64);
      loadWords(data, start + block * 64, bytes, words);
      let flags = KEYED_HASH;
      if (block === 0) flags |= CHUNK_START;
      if (block === blocks - 1) {
        flags |= CHUNK_END;
        if (chunks === 1) flags |= ROOT;
      }
      blake3Compress(block === 0 ? keyWords : cv, 0, words, 0, chunk, bytes, flags, cv, 0);
    }
    if (chunk === chunks - 1) break;
    stack.set(cv, depth * 8);
    depth++;
    for (let total = chunk + 1; total % 2 === 0; total /= 2) {
      depth--;
      blake3Compress(
        keyWords,
        0,
        stack,
        (depth - 1) * 8,
        0,
        64,
        KEYED_HASH | PARENT,
        stack,
        (depth - 1) * 8,
      );
    }
  }
  while (depth > 0) {
    depth--;
    stack.set(cv, (depth + 1) * 8);
    const flags = KEYED_HASH | PARENT | (depth === 0 ? ROOT : 0);
    blake3Compress(keyWords, 0, stack, depth * 8, 0, 64, flags, cv, 0);
  }
  const out = Buffer.alloc(32);
  for (let i = 0; i < 8; i++) out.writeInt32LE(cv[i], i * 4);
  return out;
}

/**
 * Decodes one LZ4 block (lz4_Block_format.md).
 * @param {Uint8Array} input the whole block
 * @param {number} plainLength the exact length of what it holds
 * @returns {Buffer}
 * @throws {RangeError} when the block is malformed or holds another number of bytes
 */
export function lz4Decode(input, plainLength) {
  const out = Buffer.allocUnsafe(plainLength);
  let i = 0;
  let o = 0;
  const more = (length) => {
    let byte;
    do {
      if (i >= input.length) throw new RangeError('LZ4: a length runs past the end');
      byte = input[i++];
      length += byte;
    } while (byte === 255);
    return length;
  };
  for (;;) {
    if (i >= input.length) throw new RangeError('LZ4: the block ends without a last sequence');
    const token = input[i++];
    let literals = token >> 4;
    if (literals === 15) literals = more(literals);
    if (i + literals > input.length)
      throw new RangeError('LZ4: literals run past the end of the block');
    if (o + literals > plainLength) throw new RangeError('LZ4: more bytes than announced');
    out.set(input.subarray(i, i + literals), o);
    i += literals;
    o += literals;
    if (i === input.length) {
      if ((token & 15) !== 0) throw new RangeError('LZ4: the last sequence has a match');
      if (o !== plainLength) throw new RangeError('LZ4: fewer bytes than announced');
      return out;
    }
    if (i + 2 > input.length) throw new RangeError('LZ4: an offset runs past the end');
    const distance = input[i] | (input[i + 1] << 8);
    i += 2;
    if (distance === 0 || distance > o)
      throw new RangeError('LZ4: an offset points before the start');
    let match = token & 15;
    if (match === 15) match = more(match);
    match += 4;
    if (o + match > plainLength) throw new RangeError('LZ4: more bytes than announced');
    if (distance >= match) {
      out.copyWithin(o, o - distance, o - distance + match);
      o += match;
    } else {
      for (const end = o + match; o < end; o++) out[o] = out[o - distance];
    }
  }
}

// ---------------------------------------------------------------------------------------------------------------
// YAML, as far as `config` uses it (section 3)
// ---------------------------------------------------------------------------------------------------------------

/**
 * Parses one YAML document of block and flow mappings and sequences, plain, quoted and block scalars, and comments.
 * Anchors, aliases, tags, directives, explicit keys and keys given twice are refused. Plain scalars are resolved
 * by the core schema of YAML 1.2.
 * @param {string} source
 * @returns {unknown} null, boolean, number, string, array, or object without prototype
 * @throws {SyntaxError} naming the line
 */
export function parseYaml(source) {
  return new Yaml(source.replace(/\r\n?/g, '\n')).document();
}

class Yaml {
  constructor(source) {
    this.s = source;
    this.p = 0;
  }

  bad(what) {
    const line = this.s.slice(0, this.p).split('\n').length;
    throw new SyntaxError(`YAML, line ${line}: ${what}`);
  }

  /** Column of the place that is being read. */
  col() {
    return this.p - (this.s.lastIndexOf('\n', this.p - 1) + 1);
  }

  white(c) {
    return c === ' ' || c === '\t';
  }

  /** True when `at` is at the end of a line or of the text. */
  eol(at) {
    return at >= this.s.length || this.s[at] === '\n';
  }

  spaces() {
    while (this.white(this.s[this.p])) this.p++;
  }

  /** Passes over white space, line ends and comments up to the next token. */
  gap() {
    for (;;) {
      const lineStart = this.p === 0 || this.s[this.p - 1] === '\n';
      const from = this.p;
      while (this.s[this.p] === ' ') this.p++;
      if (this.s[this.p] === '\t') {
        this.spaces();
        if (lineStart && !this.eol(this.p) && this.s[this.p] !== '#')
          this.bad('a tab in the indentation');
      }
      const c = this.s[this.p];
      if (c === '#' && (lineStart || this.p > from)) {
        while (!this.eol(this.p)) this.p++;
      }
      if (this.s[this.p] !== '\n') return;
      this.p++;
    }
  }

  /** After a node: nothing but white space or a comment may follow on the line. */
  endOfLine() {
    const from = this.p;
    this.spaces();
    if (this.s[this.p] === '#' && this.p > from) while (!this.eol(this.p)) this.p++;
    if (!this.eol(this.p)) this.bad('unexpected text behind a value');
  }

  /** `---` or `...` alone at the start of a line. */
  marker(at) {
    const three = this.s.slice(at, at + 3);
    return (three === '---' || three === '...') && (this.eol(at + 3) || this.white(this.s[at + 3]));
  }

  document() {
    this.gap();
    if (this.s[this.p] === '%') this.bad('directives are not allowed');
    if (this.col() === 0 && this.marker(this.p)) {
      if (this.s[this.p] === '.') this.bad('an empty document');
      this.p += 3;
      this.endOfLine();
    }
    const value = this.node(-1, false);
    this.gap();
    if (this.col() === 0 && this.s.slice(this.p, this.p + 3) === '...' && this.marker(this.p)) {
      this.p += 3;
      this.gap();
    }
    if (this.p < this.s.length) this.bad('unexpected text');
    return value;
  }

  /** True when a block sequence entry starts here. */
  dash(at) {
    return this.s[at] === '-' && (this.eol(at + 1) || this.white(this.s[at + 1]));
  }

  /** True when what starts here is a key of a block mapping. */
  isKey() {
    const from = this.p;
    const c = this.s[from];
    let at;
    if (c === '"' || c === "'") {
      at = from + 1;
      for (; ; at++) {
        if (this.eol(at)) return false;
        if (c === '"' && this.s[at] === '\\') at++;
        else if (this.s[at] === c) {
          if (c === "'" && this.s[at + 1] === "'") at++;
          else break;
        }
      }
      at++;
      while (this.white(this.s[at])) at++;
      return this.s[at] === ':' && (this.eol(at + 1) || this.white(this.s[at + 1]));
    }
    if (c === '[' || c === '{') return false;
    for (at = from; !this.eol(at); at++) {
      if (this.s[at] === ':' && (this.eol(at + 1) || this.white(this.s[at + 1]))) return true;
      if (this.s[at] === '#' && at > from && this.white(this.s[at - 1])) return false;
    }
    return false;
  }

  /**
   * The node behind an indicator (or at the start), on this line or a later one, whose parent is indented by
   * `parent`. With `inMap` it is the value of a key: on the same line it is no block collection, below it
   * a sequence may stand in the column of the key.
   */
  node(parent, inMap) {
    this.spaces();
    if (this.eol(this.p) || this.s[this.p] === '#') {
      this.gap();
      if (this.p >= this.s.length) return null;
      const column = this.col();
      if (column === 0 && this.marker(this.p)) return null;
      if (inMap && column === parent && this.dash(this.p)) return this.sequence(column);
      if (column <= parent) return null;
      if (this.dash(this.p)) return this.sequence(column);
      if (this.isKey()) return this.mapping(column);
    } else if (!inMap) {
      // the compact forms `- - a` and `- key: value`
      if (this.dash(this.p)) return this.sequence(this.col());
      if (this.isKey()) return this.mapping(this.col());
    }
    return this.scalarOrFlow(parent);
  }

  scalarOrFlow(parent) {
    const c = this.s[this.p];
    let value;
    if (c === '|' || c === '>') return this.blockScalar(parent);
    if (c === '[' || c === '{') value = this.flow(parent);
    else if (c === '"') value = this.doubleQuoted(parent, true);
    else if (c === "'") value = this.singleQuoted(parent, true);
    else return this.plain(parent);
    this.endOfLine();
    return value;
  }

  sequence(column) {
    const list = [];
    for (;;) {
      if (this.p >= this.s.length || this.col() !== column || !this.dash(this.p)) break;
      this.p++;
      list.push(this.node(column, false));
      this.gap();
      if (this.p < this.s.length && this.col() > column) this.bad('wrong indentation');
    }
    return list;
  }

  put(map, key, value) {
    if (typeof key !== 'string') this.bad('a key that is not a string');
    if (Object.hasOwn(map, key)) this.bad(`the key ${JSON.stringify(key)} stands twice`);
    map[key] = value;
  }

  mapping(column) {
    const map = Object.create(null);
    for (;;) {
      if (this.p >= this.s.length || this.col() !== column) break;
      if (column === 0 && this.marker(this.p)) break;
      if (this.dash(this.p)) break;
      if (!this.isKey()) this.bad('expected `key: value`');
      let key;
      if (this.s[this.p] === '"') key = this.doubleQuoted(column, false);
      else if (this.s[this.p] === "'") key = this.singleQuoted(column, false);
      else {
        const from = this.p;
        this.plainStart(false);
        while (!(
          this.s[this.p] === ':' &&
          (this.eol(this.p + 1) || this.white(this.s[this.p + 1]))
        ))
          this.p++;
        key = trimWhite(this.s.slice(from, this.p));
      }
      this.spaces();
      this.p++;
      const value = this.node(column, true);
      this.put(map, key, value);
      this.gap();
      if (this.p < this.s.length && this.col() > column) this.bad('wrong indentation');
    }
    return map;
  }

  /** Refuses characters with which a plain scalar cannot start. */
  plainStart(inFlow) {
    const c = this.s[this.p];
    const next = this.s[this.p + 1];
    if ('&*!'.includes(c)) this.bad('anchors, aliases and tags are not allowed');
    if (',[]{}#|>@`"\'%'.includes(c)) this.bad(`a plain scalar cannot start with ${c}`);
    if (
      '-?:'.includes(c) &&
      (next === undefined || /[ \t\n]/.test(next) || (inFlow && ',[]{}'.includes(next)))
    ) {
      this.bad(`unexpected ${c}`);
    }
  }

  /** The rest of a line of a plain scalar, without white space around. */
  plainLine(inFlow) {
    const from = this.p;
    for (; !this.eol(this.p); this.p++) {
      const c = this.s[this.p];
      if (c === '#' && this.p > from && this.white(this.s[this.p - 1])) break;
      if (inFlow && ',[]{}'.includes(c)) break;
      if (c === ':') {
        const next = this.s[this.p + 1];
        if (this.eol(this.p + 1) || this.white(next) || (inFlow && ',[]{}'.includes(next))) break;
      }
    }
    return trimWhite(this.s.slice(from, this.p));
  }

  plain(parent) {
    this.plainStart(false);
    let text = this.plainLine(false);
    while (this.eol(this.p) && this.p < this.s.length) {
      // a following line belongs to it if it is indented deeper than the parent and is no comment
      let at = this.p;
      let breaks = 0;
      let start = at;
      while (this.s[at] === '\n') {
        breaks++;
        at++;
        start = at;
        while (this.white(this.s[at])) at++;
      }
      if (at >= this.s.length || at - start <= parent || this.s[at] === '#') break;
      if (at === start && this.marker(at)) break;
      this.p = at;
      text += (breaks === 1 ? ' ' : '\n'.repeat(breaks - 1)) + this.plainLine(false);
    }
    if (this.s[this.p] === ':') this.bad('a mapping within a plain scalar');
    while (this.p > 0 && this.white(this.s[this.p - 1])) this.p--;
    this.endOfLine();
    return resolvePlain(text);
  }

  /** Line ends within a quoted scalar: folds them, returns what they stand for. */
  foldQuoted(parent) {
    let breaks = 0;
    while (this.s[this.p] === '\n') {
      breaks++;
      this.p++;
      const start = this.p;
      this.spaces();
      if (this.s[this.p] !== '\n') {
        if (this.p - start <= parent) this.bad('a line of a quoted scalar is not indented');
        if (this.p === start && this.marker(this.p))
          this.bad('a document marker within a quoted scalar');
      }
    }
    return breaks === 1 ? ' ' : '\n'.repeat(breaks - 1);
  }

  doubleQuoted(parent, multiline) {
    this.p++;
    let text = '';
    /** Length of `text` up to which white space is meant, however a line ends. */
    let kept = 0;
    for (;;) {
      const c = this.s[this.p];
      if (c === undefined) this.bad('a quoted scalar does not end');
      if (c === '"') {
        this.p++;
        return text;
      }
      if (c === '\n') {
        if (!multiline) this.bad('a key on several lines');
        let end = text.length;
        while (end > kept && this.white(text[end - 1])) end--;
        text = text.slice(0, end) + this.foldQuoted(parent);
        kept = text.length;
      } else if (c === '\\') {
        this.p++;
        text += this.escape(parent, multiline);
        kept = text.length;
      } else {
        text += c;
        this.p++;
      }
    }
  }

  escape(parent, multiline) {
    const c = this.s[this.p];
    if (c === '\n') {
      if (!multiline) this.bad('a key on several lines');
      const fold = this.foldQuoted(parent);
      return fold === ' ' ? '' : fold;
    }
    const simple = {
      0: '\0',
      a: '\x07',
      b: '\b',
      t: '\t',
      '\t': '\t',
      n: '\n',
      v: '\v',
      f: '\f',
      r: '\r',
      e: '\x1b',
      ' ': ' ',
      '"': '"',
      '/': '/',
      '\\': '\\',
      N: '\x85',
      _: '\xa0',
      L: '\u2028',
      P: '\u2029',
    };
    if (c !== undefined && Object.hasOwn(simple, c)) {
      this.p++;
      return simple[c];
    }
    const digits = { x: 2, u: 4, U: 8 }[c];
    const hex = digits === undefined ? '' : this.s.slice(this.p + 1, this.p + 1 + digits);
    if (digits === undefined || hex.length !== digits || !/^[0-9a-fA-F]+$/.test(hex))
      this.bad('a wrong escape');
    const code = parseInt(hex, 16);
    if (code > 0x10ffff) this.bad('a wrong escape');
    this.p += 1 + digits;
    return digits === 8 ? String.fromCodePoint(code) : String.fromCharCode(code);
  }

  singleQuoted(parent, multiline) {
    this.p++;
    let text = '';
    for (;;) {
      const c = this.s[this.p];
      if (c === undefined) this.bad('a quoted scalar does not end');
      if (c === "'") {
        this.p++;
        if (this.s[this.p] !== "'") return text;
        text += "'";
        this.p++;
      } else if (c === '\n') {
        if (!multiline) this.bad('a key on several lines');
        text = text.replace(/[ \t]+$/, '') + this.foldQuoted(parent);
      } else {
        text += c;
        this.p++;
      }
    }
  }

  blockScalar(parent) {
    const folded = this.s[this.p] === '>';
    this.p++;
    let chomp = '';
    let explicit = 0;
    for (; ; this.p++) {
      const c = this.s[this.p];
      if ((c === '-' || c === '+') && chomp === '') chomp = c;
      else if (c >= '1' && c <= '9' && explicit === 0) explicit = Number(c);
      else break;
    }
    this.endOfLine();
    this.p++;
    let indent = explicit > 0 ? Math.max(parent, 0) + explicit : -1;
    const lines = [];
    while (this.p < this.s.length) {
      let end = this.s.indexOf('\n', this.p);
      if (end < 0) end = this.s.length;
      const line = this.s.slice(this.p, end);
      const depth = /^ */.exec(line)[0].length;
      const blank = depth === line.length;
      if (indent < 0 && !blank) {
        if (depth <= parent) break;
        indent = depth;
      }
      if (blank && (indent < 0 || depth <= indent)) lines.push('');
      else if (depth < indent) break;
      else {
        if (depth === 0 && this.marker(this.p)) break;
        lines.push(line.slice(indent));
      }
      this.p = Math.min(end + 1, this.s.length);
      if (end === this.s.length) break;
    }
    let trailing = 0;
    while (lines.length > 0 && lines[lines.length - 1] === '') {
      lines.pop();
      trailing++;
    }
    let text = '';
    if (!folded) text = lines.join('\n');
    else {
      let pending = 0;
      let previous = null;
      for (const line of lines) {
        if (line === '') {
          pending++;
          continue;
        }
        if (previous === null) text += '\n'.repeat(pending) + line;
        else {
          const keep = this.white(previous[0]) || this.white(line[0]);
          if (keep) text += '\n'.repeat(pending + 1);
          else text += pending === 0 ? ' ' : '\n'.repeat(pending);
          text += line;
        }
        pending = 0;
        previous = line;
      }
    }
    if (chomp === '+') return text + '\n'.repeat(lines.length > 0 ? trailing + 1 : trailing);
    return chomp === '-' || lines.length === 0 ? text : `${text}\n`;
  }

  flowGap(parent) {
    this.gap();
    if (this.p >= this.s.length) this.bad('a flow collection does not end');
    const lineStart = this.s.lastIndexOf('\n', this.p - 1) + 1;
    if (
      lineStart > this.flowStart &&
      this.p - lineStart <= parent &&
      !']}'.includes(this.s[this.p])
    ) {
      this.bad('a line of a flow collection is not indented');
    }
  }

  flow(parent) {
    this.flowStart = this.p;
    return this.flowNode(parent);
  }

  flowNode(parent) {
    const c = this.s[this.p];
    if (c === '"') return this.doubleQuoted(parent, true);
    if (c === "'") return this.singleQuoted(parent, true);
    if (c === '[') {
      this.p++;
      const list = [];
      for (;;) {
        this.flowGap(parent);
        if (this.s[this.p] === ']') break;
        list.push(this.flowNode(parent));
        this.flowGap(parent);
        if (this.s[this.p] === ',') this.p++;
        else if (this.s[this.p] !== ']') this.bad('expected , or ]');
      }
      this.p++;
      return list;
    }
    if (c === '{') {
      this.p++;
      const map = Object.create(null);
      for (;;) {
        this.flowGap(parent);
        if (this.s[this.p] === '}') break;
        const quoted = '"\''.includes(this.s[this.p]);
        if (!quoted && '[{'.includes(this.s[this.p])) this.bad('a key that is not a string');
        const key = quoted ? this.flowNode(parent) : this.flowPlain(parent);
        this.flowGap(parent);
        let value = null;
        if (this.s[this.p] === ':') {
          this.p++;
          this.flowGap(parent);
          if (!',}'.includes(this.s[this.p])) value = this.flowNode(parent);
        }
        this.put(map, key, value);
        this.flowGap(parent);
        if (this.s[this.p] === ',') this.p++;
        else if (this.s[this.p] !== '}') this.bad('expected , or }');
      }
      this.p++;
      return map;
    }
    return resolvePlain(this.flowPlain(parent));
  }

  flowPlain(parent) {
    this.plainStart(true);
    let text = this.plainLine(true);
    while (this.s[this.p] === '\n') {
      let at = this.p;
      let breaks = 0;
      let start = at;
      while (this.s[at] === '\n') {
        breaks++;
        at++;
        start = at;
        while (this.white(this.s[at])) at++;
      }
      if (at >= this.s.length || '#,[]{}'.includes(this.s[at])) break;
      if (this.s[at] === ':' && (this.eol(at + 1) || ' \t,[]{}'.includes(this.s[at + 1]))) break;
      if (at - start <= parent) this.bad('a line of a flow collection is not indented');
      this.p = at;
      text += (breaks === 1 ? ' ' : '\n'.repeat(breaks - 1)) + this.plainLine(true);
    }
    return text;
  }
}

/** YAML's white space is space and tab; JavaScript's trim() takes away more. */
function trimWhite(text) {
  return text.replace(/^[ \t]+|[ \t]+$/g, '');
}

/** The core schema of YAML 1.2 (section 10.3.2 of its specification). */
function resolvePlain(text) {
  if (/^(?:null|Null|NULL|~|)$/.test(text)) return null;
  if (/^(?:true|True|TRUE)$/.test(text)) return true;
  if (/^(?:false|False|FALSE)$/.test(text)) return false;
  if (/^[-+]?[0-9]+$/.test(text)) return Number(text);
  if (/^0o[0-7]+$/.test(text)) return parseInt(text.slice(2), 8);
  if (/^0x[0-9a-fA-F]+$/.test(text)) return parseInt(text.slice(2), 16);
  if (/^[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?$/.test(text)) return Number(text);
  if (/^[-+]?\.(?:inf|Inf|INF)$/.test(text)) return text.startsWith('-') ? -Infinity : Infinity;
  if (/^\.(?:nan|NaN|NAN)$/.test(text)) return NaN;
  return text;
}

// ---------------------------------------------------------------------------------------------------------------
// The store: a directory
// ---------------------------------------------------------------------------------------------------------------

class StoredObject {
  constructor(root, name) {
    this.name = name;
    this.fd = openSync(join(root, name), 'r');
    const facts = fstatSync(this.fd);
    if (!facts.isFile()) {
      closeSync(this.fd);
      fail(name, null, 'is not a regular file');
    }
    this.size = facts.size;
  }

  /** Exactly `length` bytes from `offset`. */
  read(offset, length) {
    if (offset + length > this.size)
      fail(this.name, offset, `${length} bytes expected, the object ends at ${this.size}`);
    const out = Buffer.allocUnsafe(length);
    let done = 0;
    while (done < length) {
      const n = readSync(this.fd, out, done, length - done, offset + done);
      if (n === 0) fail(this.name, offset + done, 'the object became shorter while it was read');
      done += n;
    }
    return out;
  }

  close() {
    closeSync(this.fd);
  }
}

class DirectoryStore {
  constructor(root) {
    this.root = root;
    if (!existsSync(root) || !statSync(root).isDirectory()) fail(root, null, 'is not a directory');
  }

  has(name) {
    return existsSync(join(this.root, name));
  }

  open(name) {
    return new StoredObject(this.root, name);
  }

  readAll(name, limit) {
    const object = this.open(name);
    try {
      if (object.size > limit)
        fail(name, null, `${object.size} bytes, at most ${limit} are allowed`);
      return object.read(0, object.size);
    } finally {
      object.close();
    }
  }

  /** Names of the entries of a folder that match, in order; none if there is no such folder. */
  entries(folder, pattern) {
    const path = join(this.root, folder);
    if (!existsSync(path)) return [];
    return readdirSync(path)
      .filter((entry) => pattern.test(entry))
      .sort();
  }
}

// ---------------------------------------------------------------------------------------------------------------
// Configuration and keys (section 3)
// ---------------------------------------------------------------------------------------------------------------

function base64(object, text, what) {
  if (
    typeof text !== 'string' ||
    !/^(?:[A-Za-z0-9+/]{4})*(?:[A-Za-z0-9+/]{2}==|[A-Za-z0-9+/]{3}=)?$/.test(text)
  ) {
    fail(object, null, `${what} is not base64`);
  }
  return Buffer.from(text, 'base64');
}

function onlyKeys(object, map, allowed, where) {
  if (map === null || typeof map !== 'object' || Array.isArray(map))
    fail(object, null, `${where} is not a mapping`);
  for (const key of Object.keys(map)) {
    if (!allowed.includes(key))
      fail(object, null, `${where} has the unknown key ${JSON.stringify(key)}`);
  }
}

/** Reads and checks what can be checked without a key. */
function readConfig(store, name) {
  const bytes = store.readAll(name, 64 * 1024);
  let text;
  let config;
  try {
    text = new TextDecoder('utf-8', { fatal: true, ignoreBOM: true }).decode(bytes);
    config = parseYaml(text);
  } catch (error) {
    fail(name, null, error instanceof SyntaxError ? error.message : 'is not UTF-8');
  }
  onlyKeys(
    name,
    config,
    ['b2', 'version', 'id', 'created', 'encryption', 'chunkBytes', 'packBytes', 'keys', 'mac'],
    'the configuration',
  );
  const want = (ok, what) => {
    if (!ok) fail(name, null, what);
  };
  want(config.b2 === 'repository', '`b2` is not `repository`');
  want(Number.isInteger(config.version) && config.version >= 1, '`version` is not a number');
  want(
    config.version === 1,
    `version ${config.version} of the format; this program knows version 1`,
  );
  want(
    typeof config.id === 'string' && /^[0-9a-f]{32}$/.test(config.id),
    '`id` is not 32 hex digits',
  );
  want(typeof config.created === 'string', '`created` is not a time');
  want(
    config.encryption === 'aes256-gcm' || config.encryption === 'none',
    '`encryption` is unknown',
  );
  want(
    [16384, 32768, 65536, 131072, 262144].includes(config.chunkBytes),
    '`chunkBytes` is not allowed',
  );
  want(
    Number.isInteger(config.packBytes) &&
      config.packBytes >= 1048576 &&
      config.packBytes <= 268435456,
    '`packBytes` is not allowed',
  );
  want(Array.isArray(config.keys) && config.keys.length > 0, '`keys` is not a list with entries');
  for (const key of config.keys) {
    const fields = {
      scrypt: ['salt', 'N', 'r', 'p', 'wrapped'],
      file: ['salt', 'wrapped'],
      none: ['master'],
    };
    want(
      key !== null && typeof key === 'object' && Object.hasOwn(fields, key.kind),
      'a key of unknown kind',
    );
    const allowed = ['id', 'label', 'created', 'kind', ...fields[key.kind]];
    onlyKeys(name, key, allowed, 'a key');
    for (const field of allowed) want(Object.hasOwn(key, field), `a key has no \`${field}\``);
    want(
      typeof key.id === 'string' && /^[0-9a-f]{16}$/.test(key.id),
      'the `id` of a key is not 16 hex digits',
    );
    want(
      typeof key.label === 'string' && typeof key.created === 'string',
      'a key without label or time',
    );
    want(
      (key.kind === 'none') === (config.encryption === 'none'),
      'a key of a kind that the encryption excludes',
    );
    if (key.kind === 'none')
      want(base64(name, key.master, '`master`').length === 32, '`master` is not 32 bytes');
    else {
      base64(name, key.salt, '`salt`');
      want(base64(name, key.wrapped, '`wrapped`').length === 60, '`wrapped` is not 60 bytes');
    }
    if (key.kind === 'scrypt') {
      want(
        Number.isInteger(key.N) && key.N >= 16384 && Number.isInteger(Math.log2(key.N)),
        '`N` is not allowed',
      );
      want(
        Number.isInteger(key.r) && key.r >= 1 && Number.isInteger(key.p) && key.p >= 1,
        '`r` or `p` is not allowed',
      );
      want(
        128 * key.N * key.r <= 2 ** 30 && key.p <= 16,
        'the parameters of scrypt ask for too much',
      );
    }
  }
  want(
    config.encryption !== 'none' || config.keys.length === 1,
    'exactly one key is allowed without encryption',
  );
  want(base64(name, config.mac, '`mac`').length === 32, '`mac` is not 32 bytes');
  return config;
}

function readKeyFile(path) {
  let text;
  try {
    text = readFileSync(path, 'latin1');
  } catch (error) {
    fail(path, null, `the key file cannot be read (${error.code})`);
  }
  const match = /^b2-key-v1 ([0-9a-f]{64})\n$/.exec(text);
  if (match === null) fail(path, null, 'is not a key file of b2');
  return Buffer.from(match[1], 'hex');
}

function hkdf(material, salt, info) {
  return Buffer.from(hkdfSync('sha256', material, salt, Buffer.from(info, 'utf8'), 32));
}

/** AES-256-GCM: the plaintext, or null if the tag is wrong. */
function gcmOpen(key, nonce, aad, sealed) {
  if (sealed.length < SEAL) return null;
  const decipher = createDecipheriv('aes-256-gcm', key, nonce, { authTagLength: SEAL });
  decipher.setAAD(aad);
  decipher.setAuthTag(sealed.subarray(sealed.length - SEAL));
  const plain = decipher.update(sealed.subarray(0, sealed.length - SEAL));
  try {
    decipher.final();
  } catch {
    return null;
  }
  return plain;
}

function unwrapMaster(name, config, secrets) {
  const aadFor = (key) =>
    Buffer.concat([
      Buffer.from('b2 key v1'),
      Buffer.from(config.id, 'hex'),
      Buffer.from(key.id, 'hex'),
    ]);
  let tried = 0;
  for (const key of config.keys) {
    if (key.kind === 'none') return Buffer.from(key.master, 'base64');
    const salt = Buffer.from(key.salt, 'base64');
    let wrapping;
    if (key.kind === 'scrypt' && secrets.password !== undefined) {
      wrapping = scryptSync(Buffer.from(secrets.password.normalize('NFC'), 'utf8'), salt, 32, {
        N: key.N,
        r: key.r,
        p: key.p,
        maxmem: 128 * key.r * (key.N + key.p + 2) + 1048576,
      });
    } else if (key.kind === 'file' && secrets.keyMaterial !== undefined) {
      wrapping = hkdf(secrets.keyMaterial, salt, 'b2 key file v1');
    } else continue;
    tried++;
    const wrapped = Buffer.from(key.wrapped, 'base64');
    const master = gcmOpen(wrapping, wrapped.subarray(0, 12), aadFor(key), wrapped.subarray(12));
    if (master !== null) return master;
  }
  if (tried === 0)
    fail(
      name,
      null,
      'no key of the repository fits what was given: set B2_PASSWORD or B2_KEY_FILE',
    );
  return fail(name, null, 'the passphrase or key file opens none of the keys');
}

function openConfig(store, name, secrets) {
  const config = readConfig(store, name);
  const master = unwrapMaster(name, config, secrets);
  const canonical = JSON.stringify([
    'b2',
    config.version,
    config.id,
    config.created,
    config.encryption,
    config.chunkBytes,
    config.packBytes,
    config.keys.map((k) => [
      k.id,
      k.label,
      k.created,
      k.kind,
      k.salt ?? '',
      k.N ?? 0,
      k.r ?? 0,
      k.p ?? 0,
      k.wrapped ?? '',
    ]),
  ]);
  const mac = blake3Keyed(hkdf(master, EMPTY, 'b2 config v1'), Buffer.from(canonical, 'utf8'));
  if (!timingSafeEqual(mac, Buffer.from(config.mac, 'base64')))
    fail(name, null, 'the MAC is wrong: the configuration is damaged');
  return { config, master };
}

// ---------------------------------------------------------------------------------------------------------------
// Small readers
// ---------------------------------------------------------------------------------------------------------------

/** A u64 that has to be exact as a number: sequence numbers, sizes, blocks, offsets. */
function u64(bytes, at, object, base, what) {
  const value = bytes.readBigUInt64LE(at);
  if (value > BigInt(Number.MAX_SAFE_INTEGER))
    fail(object, base + at, `${what} is impossibly large (${value})`);
  return Number(value);
}

function hexAt(bytes, at, length) {
  return bytes.toString('hex', at, at + length);
}

function checkVersion(bytes, object, at) {
  const version = bytes.readUInt16LE(at);
  if (version > 1)
    fail(object, at, `version ${version} of the format; this program knows version 1`);
  if (version !== 1) fail(object, at, `version ${version} does not exist`);
}

function jsonObject(bytes, object, offset) {
  let value;
  try {
    value = JSON.parse(new TextDecoder('utf-8', { fatal: true, ignoreBOM: true }).decode(bytes));
  } catch {
    fail(object, offset, 'is not JSON in UTF-8');
  }
  if (value === null || typeof value !== 'object' || Array.isArray(value))
    fail(object, offset, 'is not a JSON object');
  return value;
}

/** A sequence number, size or time from JSON: a decimal string (section 4). */
function jsonDecimal(value, object, what) {
  if (typeof value !== 'string' || !/^(?:0|[1-9][0-9]{0,15})$/.test(value))
    fail(object, 48, `\`${what}\` is not a number in a string`);
  return Number(value);
}

// ---------------------------------------------------------------------------------------------------------------
// The repository
// ---------------------------------------------------------------------------------------------------------------

export class Repository {
  /**
   * @param {string} root directory of the repository
   * @param {{password?: string, keyMaterial?: Buffer}} secrets
   */
  constructor(root, secrets) {
    this.store = new DirectoryStore(root);
    const { config, master } = this.#open(secrets);
    this.config = config;
    this.master = master;
    this.id = config.id;
    this.encrypted = config.encryption !== 'none';
    this.chunkBytes = config.chunkBytes;
    this.chunkBlocks = config.chunkBytes / BLOCK;
    this.chunkIdKey = this.derive('b2 chunk id v1', EMPTY);
    this.commitHashKey = this.derive('b2 commit hash v1', EMPTY);
    this.checksumKey = this.derive('b2 checksum v1', EMPTY);
    this.nameKey = this.derive('b2 name v1', EMPTY);
    /** Open packs, least recently used first. */
    this.packs = new Map();
    /** Indexes of packs that had to be read forward: finding them again would mean reading all again. */
    this.forward = new Map();
    /** Plain chunks frames, least recently used first. */
    this.frames = new Map();
    this.frameBytes = 0;
  }

  #open(secrets) {
    const failures = [];
    for (const name of ['config', 'config.copy']) {
      if (!this.store.has(name)) {
        failures.push(new ExtractError(`${name}: is missing`));
        continue;
      }
      try {
        const opened = openConfig(this.store, name, secrets);
        if (failures.length > 0) warn(`${failures[0].message}; config.copy was used`);
        return opened;
      } catch (error) {
        if (!(error instanceof ExtractError)) throw error;
        failures.push(error);
      }
    }
    throw new ExtractError(failures.map((failure) => failure.message).join('; '));
  }

  derive(purpose, salt) {
    return hkdf(this.master, salt, purpose);
  }

  /** Opens a seal: the plaintext, or null. */
  unseal(key, nonce, aad, sealed) {
    if (this.encrypted) return gcmOpen(key, nonce, aad, sealed);
    if (sealed.length < SEAL) return null;
    const plain = sealed.subarray(0, sealed.length - SEAL);
    const length = Buffer.alloc(4);
    length.writeUInt32LE(aad.length);
    const check = blake3Keyed(this.checksumKey, Buffer.concat([nonce, length, aad, plain]));
    return check.compare(sealed, sealed.length - SEAL, sealed.length, 0, SEAL) === 0 ? plain : null;
  }

  /** Flags of a header: bit 0 as the configuration says, no others than `allowed`. */
  checkFlags(flags, allowed, object, at) {
    if ((flags & ~(1 | allowed)) !== 0) fail(object, at, `unknown flags (${flags})`);
    if (((flags & 1) === 1) !== this.encrypted)
      fail(object, at, 'the flag for encryption contradicts the configuration');
  }

  /** Opens a sealed object (section 4) and gives its payload. */
  sealedObject(name, kind) {
    const bytes = this.store.readAll(name, 48 + MAX_BODY + SEAL);
    if (bytes.length < 48 + SEAL) fail(name, bytes.length, 'the object is too short');
    if (bytes.toString('latin1', 0, 8) !== 'B2OBJ\0\0\0')
      fail(name, 0, 'no sealed object (wrong magic)');
    if (crc32(bytes.subarray(0, 44)) !== bytes.readUInt32LE(44))
      fail(name, 44, 'the crc of the header is wrong');
    checkVersion(bytes, name, 8);
    this.checkFlags(bytes.readUInt16LE(10), 0, name, 10);
    if (bytes.readUInt32LE(12) !== kind)
      fail(name, 12, `kind ${bytes.readUInt32LE(12)}, expected ${kind}`);
    const length = bytes.readUInt32LE(32);
    if (length > MAX_BODY || bytes.length !== 48 + length + SEAL)
      fail(name, 32, 'the length of the payload is wrong');
    if (bytes.readUInt32LE(36) !== 0 || bytes.readUInt32LE(40) !== 0)
      fail(name, 36, 'a field that must be zero is not');
    const key = this.derive('b2 object v1', bytes.subarray(16, 32));
    const aad = Buffer.concat([bytes.subarray(0, 48), Buffer.from(name, 'utf8')]);
    const payload = this.unseal(key, NONCE_ZERO, aad, bytes.subarray(48));
    if (payload === null)
      fail(name, 48, 'the seal does not open: damaged, or not the object of this name');
    return jsonObject(payload, name, 48);
  }

  commitHash(body) {
    return blake3Keyed(this.commitHashKey, body).toString('hex');
  }

  /** An open pack with its index; null if the object does not exist. */
  pack(id) {
    let pack = this.packs.get(id);
    if (pack === undefined) {
      if (!this.store.has(`packs/${id.slice(0, 2)}/${id}`)) return null;
      pack = new Pack(this, id);
      if (this.packs.size >= OPEN_PACKS) {
        const [oldest, old] = this.packs.entries().next().value;
        this.packs.delete(oldest);
        old.object.close();
      }
    } else this.packs.delete(id);
    this.packs.set(id, pack);
    return pack;
  }

  /** Closes the packs that are open. */
  close() {
    for (const pack of this.packs.values()) pack.object.close();
    this.packs.clear();
  }

  /** A pack that something names and that therefore must be there. */
  neededPack(id, namedBy) {
    const pack = this.pack(id);
    if (pack === null)
      fail(`packs/${id.slice(0, 2)}/${id}`, null, `the pack is missing; ${namedBy} needs it`);
    return pack;
  }

  /** A frame by its number, of the wanted type: `{offset, head, body}`. */
  frame(packId, number, type, namedBy) {
    const pack = this.neededPack(packId, namedBy);
    const at = pack.find(number);
    if (at < 0) fail(pack.name, null, `there is no frame ${number}; ${namedBy} needs it`);
    if (pack.types[at] !== type) {
      fail(
        pack.name,
        pack.offsets[at],
        `frame ${number} has type ${pack.types[at]}; ${namedBy} needs type ${type}`,
      );
    }
    return pack.readFrame(at);
  }

  /** The bytes of one chunk, its id checked. With `alone` its frame must hold no other. */
  chunk(packId, number, sub, alone, namedBy) {
    const key = `${packId}:${number}`;
    let entry = this.frames.get(key);
    if (entry === undefined) {
      const { offset, head, body } = this.frame(packId, number, FRAME_CHUNKS, namedBy);
      const count = head.length / 36;
      const starts = new Float64Array(count + 1);
      for (let i = 0; i < count; i++) starts[i + 1] = starts[i] + head.readUInt32LE(i * 36 + 32);
      entry = { offset, head, body, starts, count, checked: new Uint8Array(count) };
      while (this.frames.size > 0 && this.frameBytes + body.length > FRAME_CACHE_BYTES) {
        const [oldest, old] = this.frames.entries().next().value;
        this.frames.delete(oldest);
        this.frameBytes -= old.body.length;
      }
      this.frameBytes += body.length;
    } else this.frames.delete(key);
    this.frames.set(key, entry);
    const where = `packs/${packId.slice(0, 2)}/${packId}`;
    if (sub >= entry.count)
      fail(where, entry.offset, `frame ${number} has no chunk ${sub}; ${namedBy} needs it`);
    if (alone && entry.count !== 1)
      fail(where, entry.offset, `frame ${number}, part of a run, holds ${entry.count} chunks`);
    const bytes = entry.body.subarray(entry.starts[sub], entry.starts[sub + 1]);
    if (entry.checked[sub] === 0) {
      const id = blake3Keyed(this.chunkIdKey, bytes);
      if (id.compare(entry.head, sub * 36, sub * 36 + 32) !== 0) {
        fail(
          where,
          entry.offset,
          `chunk ${sub} of frame ${number} does not have the id it is stored under`,
        );
      }
      entry.checked[sub] = 1;
    }
    return bytes;
  }

  /** Every pack of the store. */
  *allPacks() {
    for (const folder of this.store.entries('packs', /^[0-9a-f]{2}$/)) {
      for (const id of this.store.entries(`packs/${folder}`, /^[0-9a-f]{32}$/)) {
        if (!id.startsWith(folder))
          fail(`packs/${folder}/${id}`, null, 'the pack lies in the wrong folder');
        yield id;
      }
    }
  }
}

// ---------------------------------------------------------------------------------------------------------------
// Packs (section 5)
// ---------------------------------------------------------------------------------------------------------------

/** Checks and takes apart a frame header; a string says why it is none. */
function parseFrameHeader(bytes) {
  if (bytes.toString('latin1', 0, 4) !== 'B2FR') return 'no frame (wrong magic)';
  if (crc32(bytes.subarray(0, 28)) !== bytes.readUInt32LE(28))
    return 'the crc of the frame header is wrong';
  return {
    type: bytes[4],
    compression: bytes[5],
    count: bytes.readUInt16LE(6),
    number: bytes.readUInt32LE(8),
    stored: bytes.readUInt32LE(12),
    plain: bytes.readUInt32LE(16),
    head: bytes.readUInt32LE(20),
    zero: bytes.readUInt32LE(24),
  };
}

/** What is wrong with a frame header whose crc is right, or null. */
function frameHeaderFault(h) {
  if (h.type < FRAME_CHUNKS || h.type > FRAME_FOOTER) return `unknown type of frame ${h.type}`;
  if (h.compression > 1) return `unknown compression ${h.compression}`;
  if (h.zero !== 0) return 'a field that must be zero is not';
  if (h.plain > MAX_BODY) return `a body of ${h.plain} bytes`;
  if (
    h.type === FRAME_CHUNKS
      ? h.count < 1 || h.count > 4096 || h.head !== 36 * h.count
      : h.count !== 0 || h.head !== 0
  ) {
    return 'count and head of the frame contradict its type';
  }
  if (h.type === FRAME_FOOTER ? h.number !== NONE || h.compression !== 0 : h.number === NONE)
    return 'the number of the frame is wrong';
  const least = h.type === FRAME_FOOTER ? 2 * SEAL + h.plain : SEAL + h.head;
  if (h.stored < least) return 'the frame is too short';
  if (h.compression === 0 && h.stored !== least + (h.type === FRAME_FOOTER ? 0 : h.plain))
    return 'the length of the frame is wrong';
  return null;
}

function expand(body, compression, plain, object, offset) {
  if (compression === 0) {
    if (body.length !== plain)
      fail(object, offset, `${body.length} bytes where ${plain} are announced`);
    return body;
  }
  try {
    return lz4Decode(body, plain);
  } catch (error) {
    if (!(error instanceof RangeError)) throw error;
    return fail(object, offset, error.message);
  }
}

class Pack {
  constructor(repo, id) {
    this.repo = repo;
    this.id = id;
    this.idBytes = Buffer.from(id, 'hex');
    this.name = `packs/${id.slice(0, 2)}/${id}`;
    this.object = repo.store.open(this.name);
    this.key = repo.derive('b2 pack v1', this.idBytes);
    this.created = 0n;
    try {
      const known = repo.forward.get(id);
      if (this.#header()) {
        if (known !== undefined) this.#take(known);
        else {
          const footer = this.#footer();
          if (typeof footer === 'string') {
            const index = this.#scan(footer);
            repo.forward.set(id, index);
            this.#take(index);
          } else this.#take(footer);
        }
      } else this.#take({ sealed: false, rows: [], chunkTable: null });
    } catch (error) {
      this.object.close();
      throw error;
    }
  }

  /** Checks the header (5.1); false if the pack was given up before it had one. */
  #header() {
    const { object, name, repo } = this;
    const bytes = object.read(0, Math.min(64, object.size));
    if (bytes.length < 64 || bytes.every((byte) => byte === 0)) {
      warn(
        `${name}: ${object.size} bytes without a header, given up by its writer; it counts as empty`,
      );
      return false;
    }
    if (object.size > MAX_PACK)
      fail(name, null, `${object.size} bytes are more than a pack may have`);
    if (bytes.toString('latin1', 0, 8) !== 'B2PACK\0\0') fail(name, 0, 'no pack (wrong magic)');
    if (crc32(bytes.subarray(0, 60)) !== bytes.readUInt32LE(60))
      fail(name, 60, 'the crc of the header is wrong');
    checkVersion(bytes, name, 8);
    repo.checkFlags(bytes.readUInt16LE(10), 0, name, 10);
    if (hexAt(bytes, 16, 16) !== this.id) fail(name, 16, `is the pack ${hexAt(bytes, 16, 16)}`);
    if (hexAt(bytes, 32, 16) !== repo.id) fail(name, 32, 'is a pack of another repository');
    this.created = bytes.readBigUInt64LE(48);
    if (bytes.readUInt32LE(56) !== 0) fail(name, 56, 'a field that must be zero is not');
    return true;
  }

  #take({ sealed, rows, chunkTable }) {
    const n = rows.length;
    this.sealed = sealed;
    this.count = n;
    this.numbers = Uint32Array.from(rows, (row) => row.number);
    this.offsets = Uint32Array.from(rows, (row) => row.offset);
    this.types = Uint8Array.from(rows, (row) => row.type);
    this.rows = rows;
    /** The footer's list of chunks, null when there is no footer. */
    this.chunkTable = chunkTable;
  }

  /** Index from footer and trailer (5.5), or why there is none. */
  #footer() {
    const { object, repo } = this;
    if (object.size < 64 + 32 + 2 * SEAL + 8 + 16) return 'it has no trailer';
    const trailer = object.read(object.size - 16, 16);
    if (trailer.toString('latin1', 0, 4) !== 'B2PE') return 'it has no trailer';
    if (crc32(trailer.subarray(0, 12)) !== trailer.readUInt32LE(12))
      return 'the crc of the trailer is wrong';
    const offset = trailer.readUInt32LE(4);
    const length = trailer.readUInt32LE(8);
    if (offset < 64 || offset + length + 16 !== object.size)
      return 'the trailer contradicts the size of the object';
    if (length < 32 + 2 * SEAL + 8 || length > 32 + 2 * SEAL + MAX_BODY)
      return 'the length of the footer is wrong';
    const frame = object.read(offset, length);
    const header = parseFrameHeader(frame);
    if (typeof header === 'string') return `footer: ${header}`;
    const fault = frameHeaderFault(header);
    if (fault !== null) return `footer: ${fault}`;
    if (header.type !== FRAME_FOOTER || header.stored !== length - 32)
      return 'the trailer does not lead to a footer';
    const salt = frame.subarray(32, 48);
    const aad = Buffer.concat([this.idBytes, frame.subarray(0, 32), salt]);
    const body = repo.unseal(
      repo.derive('b2 footer v1', salt),
      NONCE_ZERO,
      aad,
      frame.subarray(48),
    );
    if (body === null) return 'the seal of the footer does not open';
    const n = body.readUInt32LE(0);
    const m = body.readUInt32LE(4);
    if (n > MAX_FRAMES || m > MAX_CHUNKS || body.length !== 8 + 20 * n + 36 * m)
      return 'the footer contradicts its length';
    const rows = [];
    let end = 64;
    let chunks = 0;
    let before = -1;
    for (let i = 0; i < n; i++) {
      const at = 8 + 20 * i;
      const row = {
        number: body.readUInt32LE(at),
        offset: body.readUInt32LE(at + 4),
        stored: body.readUInt32LE(at + 8),
        plain: body.readUInt32LE(at + 12),
        type: body[at + 16],
        compression: body[at + 17],
        count: body.readUInt16LE(at + 18),
        firstChunk: chunks,
      };
      const ok =
        row.number > before &&
        row.number !== NONE &&
        row.offset === end &&
        row.offset + 32 + row.stored <= offset &&
        row.type >= FRAME_CHUNKS &&
        row.type <= FRAME_COMMIT;
      if (!ok) return `the footer's entry ${i} is impossible`;
      before = row.number;
      end = row.offset + 32 + row.stored;
      chunks += row.count;
      rows.push(row);
    }
    if (chunks !== m) return 'the footer contradicts itself about the number of chunks';
    return { sealed: true, rows, chunkTable: Buffer.from(body.subarray(8 + 20 * n)) };
  }

  /** Index by reading forward (5.6). */
  #scan(reason) {
    const { object, name } = this;
    const rows = [];
    let offset = 64;
    let before = -1;
    let stop = '';
    while (offset < object.size) {
      if (offset + 32 > object.size) {
        stop = 'a frame header is cut off';
        break;
      }
      const bytes = object.read(offset, 32);
      const header = parseFrameHeader(bytes);
      if (typeof header === 'string') {
        stop = header;
        break;
      }
      const end = offset + 32 + header.stored;
      if (end > object.size) {
        stop = 'the frame is cut off';
        break;
      }
      const fault = frameHeaderFault(header);
      if (fault !== null) fail(name, offset, fault);
      if (header.type === FRAME_FOOTER) {
        const frame = object.read(offset, 32 + header.stored);
        const salt = frame.subarray(32, 48);
        const aad = Buffer.concat([this.idBytes, frame.subarray(0, 32), salt]);
        if (
          this.repo.unseal(
            this.repo.derive('b2 footer v1', salt),
            NONCE_ZERO,
            aad,
            frame.subarray(48),
          ) === null
        ) {
          stop = 'the seal of a footer does not open';
          break;
        }
        offset = end;
        if (offset + 16 <= object.size && object.read(offset, 4).toString('latin1') === 'B2PE')
          offset += 16;
        continue;
      }
      if (header.number <= before) {
        stop = `frame ${header.number} follows frame ${before}`;
        break;
      }
      if (this.#unsealFrame(bytes, header, object.read(offset + 32, header.stored)) === null) {
        stop = 'the seal of the frame does not open';
        break;
      }
      rows.push({ ...header, offset, firstChunk: 0 });
      before = header.number;
      offset = end;
      if (rows.length > MAX_FRAMES) fail(name, offset, 'more frames than a pack may have');
    }
    const torn =
      stop === ''
        ? ''
        : `; reading ended at offset ${offset} (${stop}), ${object.size - offset} bytes behind it do not count`;
    if (torn !== '' || !reason.startsWith('it has no'))
      warn(`${name}: read forward because ${reason}${torn}`);
    return { sealed: false, rows, chunkTable: null };
  }

  #unsealFrame(headerBytes, header, sealed) {
    const nonce = Buffer.alloc(12);
    nonce.writeUInt32LE(header.number);
    return this.repo.unseal(this.key, nonce, Buffer.concat([this.idBytes, headerBytes]), sealed);
  }

  /** Position in the index of the frame with this number, or -1. */
  find(number) {
    let low = 0;
    let high = this.count - 1;
    while (low <= high) {
      const middle = (low + high) >> 1;
      if (this.numbers[middle] === number) return middle;
      if (this.numbers[middle] < number) low = middle + 1;
      else high = middle - 1;
    }
    return -1;
  }

  /** Reads, checks and expands the frame at a position of the index. */
  readFrame(at) {
    const row = this.rows[at];
    const { name, object } = this;
    const { offset } = row;
    const bytes = object.read(offset, 32 + row.stored);
    const headerBytes = bytes.subarray(0, 32);
    const header = parseFrameHeader(headerBytes);
    if (typeof header === 'string') fail(name, offset, header);
    const fault = frameHeaderFault(header);
    if (fault !== null) fail(name, offset, fault);
    for (const field of ['number', 'type', 'compression', 'count', 'stored', 'plain']) {
      if (header[field] !== row[field]) {
        fail(
          name,
          offset,
          `${field} of the frame is ${header[field]}, the footer says ${row[field]}`,
        );
      }
    }
    const plain = this.#unsealFrame(headerBytes, header, bytes.subarray(32));
    if (plain === null) fail(name, offset, `the seal of frame ${header.number} does not open`);
    const head = plain.subarray(0, header.head);
    const body = expand(
      plain.subarray(header.head),
      header.compression,
      header.plain,
      name,
      offset,
    );
    if (header.type === FRAME_CHUNKS) this.#checkHead(row, head, body.length);
    return { offset, head, body };
  }

  #checkHead(row, head, bodyLength) {
    let sum = 0;
    for (let i = 0; i < row.count; i++) {
      const length = head.readUInt32LE(i * 36 + 32);
      if (length < 1 || length > this.repo.chunkBytes)
        fail(this.name, row.offset, `chunk ${i} of frame ${row.number} has ${length} bytes`);
      sum += length;
    }
    if (sum !== bodyLength)
      fail(
        this.name,
        row.offset,
        `the chunks of frame ${row.number} have ${sum} bytes, its body ${bodyLength}`,
      );
    if (this.chunkTable !== null) {
      const from = row.firstChunk * 36;
      if (head.compare(this.chunkTable, from, from + head.length) !== 0) {
        fail(
          this.name,
          row.offset,
          `the chunks of frame ${row.number} are not those that the footer names`,
        );
      }
    }
  }
}

/** Takes apart and checks the plain body of a commit frame (5.3). */
function parseCommit(repo, body, object, offset) {
  const bad = (at, what) => fail(object, offset, `commit, byte ${at}: ${what}`);
  if (body.length < 160) bad(body.length, 'the commit is too short');
  checkVersion(body, `${object}, frame at ${offset}`, 0);
  const klass = body[2];
  const coverage = body[3];
  const flags = body.readUInt32LE(4);
  const big = (at, what) => {
    const value = body.readBigUInt64LE(at);
    if (value > BigInt(Number.MAX_SAFE_INTEGER)) bad(at, `${what} is impossibly large`);
    return Number(value);
  };
  if (klass >= CLASSES.length) bad(2, `unknown class ${klass}`);
  if (coverage >= COVERAGES.length) bad(3, `unknown coverage ${coverage}`);
  if ((flags & ~3) !== 0) bad(4, `unknown flags ${flags}`);
  const seq = big(24, 'the sequence number');
  const first = big(32, 'the first sequence number');
  const merged = (flags & 2) !== 0;
  const prev = hexAt(body, 40, 32);
  const standsFor = hexAt(body, 72, 32);
  if (first < 1 || first > seq || (!merged && first !== seq))
    bad(32, `stands for ${first} to ${seq}`);
  if (merged === (standsFor === ZERO_HASH))
    bad(72, 'the hash it stands for contradicts the flag `merged`');
  if ((first === 1) !== (prev === ZERO_HASH))
    bad(40, 'the hash before it contradicts its sequence number');
  const p = body.readUInt32LE(140);
  const x = body.readUInt32LE(144);
  const e = body.readUInt32LE(148);
  const f = body.readUInt32LE(152);
  if (body.readUInt32LE(156) !== 0) bad(156, 'a field that must be zero is not');
  if (body.length !== 160 + 16 * p + 48 * x + 28 * e + f)
    bad(140, 'the lengths contradict the size of the commit');
  const packs = [];
  for (let i = 0; i < p; i++) packs.push(hexAt(body, 160 + 16 * i, 16));
  const references = [];
  for (let i = 0; i < x; i++) {
    const at = 160 + 16 * p + 48 * i;
    const pack = body.readUInt32LE(at);
    if (pack >= p) bad(at, `pack ${pack} is not in the table`);
    if (body.readUInt32LE(at + 12) !== 0) bad(at + 12, 'a field that must be zero is not');
    references.push({
      pack: packs[pack],
      number: body.readUInt32LE(at + 4),
      records: body.readUInt32LE(at + 8),
      hash: hexAt(body, at + 16, 32),
    });
  }
  const extentsAt = 160 + 16 * p + 48 * x;
  const factsAt = extentsAt + 28 * e;
  const facts = jsonObject(body.subarray(factsAt), object, offset);
  const hash = repo.commitHash(body);
  return {
    class: klass,
    coverage,
    full: (flags & 1) !== 0,
    merged,
    volume: hexAt(body, 8, 16),
    seq,
    first,
    prev,
    hash: merged ? standsFor : hash,
    instant: body.readBigUInt64LE(104),
    started: body.readBigUInt64LE(112),
    written: body.readBigUInt64LE(120),
    size: big(128, 'the size of the device'),
    epoch: body.readUInt32LE(136),
    tape: facts.source === 'tape',
    packs,
    references,
    extents: body.subarray(extentsAt, factsAt),
  };
}

/** What the walk of the chain needs of a commit, and where to read the rest again. */
function commitEntry(commit, packId, number) {
  const {
    class: klass,
    coverage,
    full,
    merged,
    seq,
    first,
    prev,
    hash,
    instant,
    started,
    written,
    size,
    epoch,
    tape,
    packs,
  } = commit;
  return {
    class: klass,
    coverage,
    full,
    merged,
    seq,
    first,
    prev,
    hash,
    instant,
    started,
    written,
    size,
    epoch,
    packId,
    number,
    // of a point from tape, all that it needs
    packs: full && tape ? packs : null,
  };
}

function readCommit(repo, packId, number, namedBy) {
  const { offset, body } = repo.frame(packId, number, FRAME_COMMIT, namedBy);
  const commit = parseCommit(repo, body, `packs/${packId.slice(0, 2)}/${packId}`, offset);
  return { commit, offset };
}

/** Reads an extent record and checks what can be checked of it alone (5.4). */
function parseRecord(repo, bytes, at, packs, object, offset) {
  const bad = (what) => fail(object, offset, `extent record: ${what}`);
  const wide = bytes.readBigUInt64LE(at);
  if (wide > BigInt(Math.floor(Number.MAX_SAFE_INTEGER / BLOCK)))
    bad(`block ${wide} is impossibly large`);
  const block = Number(wide);
  const count = bytes.readUInt32LE(at + 8);
  const seq = bytes.readUInt32LE(at + 12);
  const pack = bytes.readUInt32LE(at + 16);
  const frame = bytes.readUInt32LE(at + 20);
  const sub = bytes.readUInt16LE(at + 24);
  const skip = bytes.readUInt16LE(at + 26);
  if (count < 1) bad(`no blocks at block ${block}`);
  if (Math.floor(block / REGION_BLOCKS) !== Math.floor((block + count - 1) / REGION_BLOCKS)) {
    bad(`blocks ${block} to ${block + count - 1} cross a multiple of 1 GiB`);
  }
  if (pack === NONE) {
    if (frame !== 0 || sub !== 0 || skip !== 0) bad(`block ${block}: zeros with a place`);
    return { block, count, seq, pack: null, frame: 0, sub: 0, skip: 0, run: false };
  }
  if (pack >= packs.length) bad(`block ${block}: pack ${pack} is not in the table`);
  if (skip >= repo.chunkBlocks) bad(`block ${block}: ${skip} blocks to pass over`);
  const run = skip + count > repo.chunkBlocks;
  if (run && sub !== 0) bad(`block ${block}: a run with sub ${sub}`);
  return { block, count, seq, pack: packs[pack], frame, sub, skip, run };
}

/** Every extent record of a commit, checked for order and overlap. */
function* commitRecords(repo, commit, object, offset) {
  let end = 0;
  const take = function* take(bytes, where, at) {
    for (let i = 0; i < bytes.length; i += 28) {
      const record = parseRecord(repo, bytes, i, commit.packs, where, at);
      if (record.block < end)
        fail(where, at, `the extent records are out of order at block ${record.block}`);
      if (record.seq > (commit.merged ? commit.seq - commit.first : 0))
        fail(where, at, `the seq of the record for block ${record.block} is wrong`);
      end = record.block + record.count;
      yield record;
    }
  };
  for (const reference of commit.references) {
    const frame = repo.frame(
      reference.pack,
      reference.number,
      FRAME_EXTENTS,
      `commit ${commit.seq} in ${object}`,
    );
    const where = `packs/${reference.pack.slice(0, 2)}/${reference.pack}`;
    if (repo.commitHash(frame.body) !== reference.hash) {
      fail(
        where,
        frame.offset,
        `the extents frame is not the one that commit ${commit.seq} in ${object} names`,
      );
    }
    if (frame.body.length !== reference.records * 28)
      fail(where, frame.offset, 'the number of extent records is wrong');
    yield* take(frame.body, where, frame.offset);
  }
  yield* take(commit.extents, object, offset);
}

// ---------------------------------------------------------------------------------------------------------------
// The chain of commits (sections 5.3 and 6.5)
// ---------------------------------------------------------------------------------------------------------------

/** Adds the commits of the pack to `out`, a map from volume to a list; of all volumes, or of `only`. */
function collectCommits(repo, packId, only, out) {
  const pack = repo.pack(packId);
  if (pack === null) return false;
  for (let i = 0; i < pack.count; i++) {
    if (pack.types[i] !== FRAME_COMMIT) continue;
    const { offset, body } = pack.readFrame(i);
    const commit = parseCommit(repo, body, pack.name, offset);
    if (only !== null && commit.volume !== only) continue;
    let list = out.get(commit.volume);
    if (list === undefined) out.set(commit.volume, (list = []));
    list.push(commitEntry(commit, packId, pack.numbers[i]));
  }
  return true;
}

const describeCommit = (c) =>
  `commit ${c.seq} (epoch ${c.epoch}, frame ${c.number} of pack ${c.packId})`;

/** Of two commits: which one the tip is chosen from first. */
function laterTip(a, b) {
  if (a.epoch !== b.epoch) return b.epoch - a.epoch;
  if (a.seq !== b.seq) return b.seq - a.seq;
  if (a.first !== b.first) return a.first - b.first;
  return a.written === b.written ? 0 : a.written < b.written ? 1 : -1;
}

/**
 * The part of the chain that is behind `known`, oldest first, and how many of `known` stay before it. `known` are the
 * commits that are already known to be of the chain, oldest first (none: from the beginning). The tip is the commit of the
 * highest epoch, of these the last one; of commits that stand for the same, the one that stands for the most.
 * @returns {{commits: object[], keep: number}} `keep` is less than all of `known` where a merged commit reaches back into it
 */
export function chainOf(commits, known = []) {
  const byHash = new Map();
  const byPlace = new Map();
  for (const commit of commits) {
    const same = byHash.get(commit.hash);
    if (same === undefined) byHash.set(commit.hash, [commit]);
    else same.push(commit);
    const place = `${commit.epoch}:${commit.seq}`;
    const other = byPlace.get(place);
    if (other !== undefined && other.hash !== commit.hash) {
      throw new ExtractError(
        `two different commits of one epoch have one number: ${describeCommit(other)} and ${describeCommit(commit)}`,
      );
    }
    byPlace.set(place, commit);
  }
  const base = known.at(-1) ?? { seq: 0, epoch: 0 };
  let tip = null;
  for (const commit of commits) if (tip === null || laterTip(tip, commit) > 0) tip = commit;
  const chain = [];
  if (tip === null || tip.epoch < base.epoch || (tip.epoch === base.epoch && tip.seq <= base.seq))
    return { commits: chain, keep: known.length };
  for (let commit = tip; ;) {
    chain.push(commit);
    if (commit.seq <= base.seq)
      throw new ExtractError(
        `${describeCommit(commit)} contradicts the segments, which lead to commit ${base.seq} ${base.hash}`,
      );
    const want = commit.first - 1;
    let before = null;
    if (want <= base.seq) {
      // a merged commit may reach back behind the last one known
      const keep = want === 0 ? 0 : positionOf(known, want) + 1;
      before = keep === 0 ? { seq: 0, hash: ZERO_HASH, epoch: 0 } : known[keep - 1];
      if (before === undefined || before.seq !== want || before.hash !== commit.prev) {
        throw new ExtractError(
          `${describeCommit(commit)} follows commit ${want} ${commit.prev}, which the segments do not have`,
        );
      }
      if (before.epoch > commit.epoch)
        throw new ExtractError(
          `${describeCommit(commit)} has a lower epoch than the commit before it`,
        );
      return { commits: chain.reverse(), keep };
    }
    for (const candidate of byHash.get(commit.prev) ?? []) {
      if (candidate.seq === want && (before === null || laterTip(before, candidate) > 0))
        before = candidate;
    }
    if (before === null) {
      throw new ExtractError(
        `the chain is broken: ${describeCommit(commit)} follows commit ${want} ${commit.prev}, which is nowhere`,
      );
    }
    if (before.epoch > commit.epoch)
      throw new ExtractError(
        `${describeCommit(commit)} has a lower epoch than the commit before it`,
      );
    commit = before;
  }
}

// ---------------------------------------------------------------------------------------------------------------
// Segments (section 7)
// ---------------------------------------------------------------------------------------------------------------

class Segment {
  constructor(repo, volume, entry) {
    this.repo = repo;
    this.name = `volumes/${volume}/manifest/${entry}`;
    const [level, first, last] = entry.split('-');
    this.full = level === 'full';
    this.first = Number(BigInt(`0x${first}`));
    this.last = Number(BigInt(`0x${last}`));
    this.withObject((object) => {
      this.#header(object, volume, level);
      this.#index(object);
    });
  }

  /** Runs `work` with the object open. */
  withObject(work) {
    const object = this.repo.store.open(this.name);
    try {
      return work(object);
    } finally {
      object.close();
    }
  }

  #header(object, volume, level) {
    const { name, repo } = this;
    if (object.size < 96 + 16 + SEAL + 112 + 16)
      fail(name, object.size, 'the segment is too short');
    const bytes = object.read(0, 96);
    if (bytes.toString('latin1', 0, 8) !== 'B2SEG\0\0\0') fail(name, 0, 'no segment (wrong magic)');
    if (crc32(bytes.subarray(0, 92)) !== bytes.readUInt32LE(92))
      fail(name, 92, 'the crc of the header is wrong');
    checkVersion(bytes, name, 8);
    repo.checkFlags(bytes.readUInt16LE(10), 2, name, 10);
    if (((bytes.readUInt16LE(10) & 2) !== 0) !== this.full)
      fail(name, 10, 'the flag for a full map contradicts the name');
    if (bytes.readUInt32LE(12) !== (this.full ? 0 : parseInt(level, 16)))
      fail(name, 12, 'the level contradicts the name');
    if (hexAt(bytes, 16, 16) !== volume) fail(name, 16, 'is a segment of another volume');
    if (hexAt(bytes, 32, 16) !== repo.id) fail(name, 32, 'is a segment of another repository');
    if (
      u64(bytes, 64, name, 0, 'first') !== this.first ||
      u64(bytes, 72, name, 0, 'last') !== this.last
    ) {
      fail(name, 64, 'the range of sequence numbers contradicts the name');
    }
    if (this.first < 1 || this.first > this.last || (this.full && this.first !== 1))
      fail(name, 64, 'the range of sequence numbers is impossible');
    if (bytes.readUInt32LE(88) !== 0) fail(name, 88, 'a field that must be zero is not');
    this.header = bytes;
    this.key = repo.derive('b2 segment v1', bytes.subarray(48, 64));
  }

  /** Reads, checks and expands a page. */
  page(object, offset, type, number, stored) {
    const { name, repo } = this;
    const bytes = object.read(offset, 16);
    if (bytes[0] !== type) fail(name, offset, `page of type ${bytes[0]}, expected ${type}`);
    if (bytes[1] > 1 || bytes.readUInt16LE(2) !== 0) fail(name, offset, 'the page header is wrong');
    if (number !== null && bytes.readUInt32LE(4) !== number)
      fail(name, offset, `page number ${bytes.readUInt32LE(4)}, expected ${number}`);
    if (bytes.readUInt32LE(8) !== stored)
      fail(name, offset, `page of ${bytes.readUInt32LE(8)} bytes, expected ${stored}`);
    const plainLength = bytes.readUInt32LE(12);
    const nonce = Buffer.alloc(12);
    nonce.writeUInt32LE(bytes.readUInt32LE(4));
    const plain = repo.unseal(
      this.key,
      nonce,
      Buffer.concat([this.header, bytes]),
      object.read(offset + 16, stored),
    );
    if (plain === null) fail(name, offset, 'the seal of the page does not open');
    if (plainLength > 2 ** 30) fail(name, offset, `a page of ${plainLength} bytes`);
    return {
      body: expand(plain, bytes[1], plainLength, name, offset),
      number: bytes.readUInt32LE(4),
    };
  }

  #index(object) {
    const { name } = this;
    const trailer = object.read(object.size - 16, 16);
    if (trailer.toString('latin1', 0, 4) !== 'B2SE')
      fail(name, object.size - 16, 'the segment has no trailer');
    if (crc32(trailer.subarray(0, 12)) !== trailer.readUInt32LE(12))
      fail(name, object.size - 4, 'the crc of the trailer is wrong');
    const offset = u64(trailer, 4, name, object.size - 16, 'the offset of the index');
    if (offset < 96 || offset + 32 > object.size - 16)
      fail(name, object.size - 16, 'the offset of the index is impossible');
    const { body, number } = this.page(
      object,
      offset,
      PAGE_INDEX,
      null,
      object.size - 16 - 16 - offset,
    );
    const bad = (at, what) => fail(name, offset, `index, byte ${at}: ${what}`);
    if (body.length < 112) bad(0, 'too short');
    const a = body.readUInt32LE(0);
    const b = body.readUInt32LE(4);
    const d = body.readUInt32LE(8);
    if (body.length !== 112 + 40 * a + 48 * b + 24 * d)
      bad(0, 'the numbers of pages contradict its size');
    if (body.readBigUInt64LE(104) !== 0n) bad(104, 'a field that must be zero is not');
    const wide = (at) => u64(body, at, name, offset, 'a field of the index');
    this.packCount = body.readUInt32LE(12);
    this.recordCount = wide(16);
    this.commitCount = wide(24);
    this.prev = hexAt(body, 32, 32);
    this.hash = hexAt(body, 64, 32);
    this.lastFull = wide(96);
    this.extentPages = [];
    this.commitPages = [];
    this.packPages = [];
    for (let i = 0, at = 112; i < a; i++, at += 40) {
      if (body.readUInt32LE(at + 36) !== 0) bad(at + 36, 'a field that must be zero is not');
      this.extentPages.push({
        offset: wide(at),
        number: body.readUInt32LE(at + 8),
        records: body.readUInt32LE(at + 12),
        first: wide(at + 16),
        end: wide(at + 24),
        stored: body.readUInt32LE(at + 32),
      });
    }
    for (let i = 0, at = 112 + 40 * a; i < b; i++, at += 48) {
      this.commitPages.push({
        offset: wide(at),
        number: body.readUInt32LE(at + 8),
        records: body.readUInt32LE(at + 12),
        first: wide(at + 16),
        least: body.readBigUInt64LE(at + 24),
        greatest: body.readBigUInt64LE(at + 32),
        stored: body.readUInt32LE(at + 40),
        points: body.readUInt32LE(at + 44),
      });
    }
    for (let i = 0, at = 112 + 40 * a + 48 * b; i < d; i++, at += 24) {
      if (body.readUInt32LE(at + 20) !== 0) bad(at + 20, 'a field that must be zero is not');
      this.packPages.push({
        offset: wide(at),
        number: body.readUInt32LE(at + 8),
        ids: body.readUInt32LE(at + 12),
        stored: body.readUInt32LE(at + 16),
      });
    }
    // in this order, and nothing may lie between the pages
    const pages = [...this.extentPages, ...this.commitPages, ...this.packPages];
    let end = 96;
    pages.forEach((page, i) => {
      if (page.offset !== end || page.number !== i)
        bad(112, `page ${page.number} at ${page.offset}, expected page ${i} at ${end}`);
      end += 16 + page.stored;
    });
    if (end !== offset || number !== pages.length)
      bad(0, 'the index does not follow the last page');
    const tooFull =
      this.extentPages.some((page) => page.records > 4096) ||
      this.commitPages.some((page) => page.records > 1024) ||
      this.packPages.some((page) => page.ids > 4096);
    if (tooFull) bad(112, 'a page holds more than it may');
    const sum = (list, field) => list.reduce((total, page) => total + page[field], 0);
    if (sum(this.extentPages, 'records') !== this.recordCount)
      bad(16, 'the number of extent records is wrong');
    if (sum(this.commitPages, 'records') !== this.commitCount)
      bad(24, 'the number of commit records is wrong');
    if (sum(this.packPages, 'ids') !== this.packCount) bad(12, 'the number of packs is wrong');
    if (this.commitCount < 1 || (this.full && this.commitCount !== 1))
      bad(24, `${this.commitCount} commit records`);
    if ((this.first === 1) !== (this.prev === ZERO_HASH))
      bad(32, 'the hash before it contradicts its range');
  }

  /** The pack table. */
  packs() {
    return this.withObject((object) => {
      const ids = [];
      for (const page of this.packPages) {
        const { body } = this.page(object, page.offset, PAGE_PACKS, page.number, page.stored);
        if (body.length !== page.ids * 16)
          fail(this.name, page.offset, 'the number of packs is wrong');
        for (let at = 0; at < body.length; at += 16) ids.push(hexAt(body, at, 16));
      }
      return ids;
    });
  }

  /** The commit records, checked against the index, as entries like those of `commitEntry` (without `prev`). */
  commits() {
    const packs = this.packs();
    const list = this.withObject((object) => {
      const out = [];
      for (const page of this.commitPages) {
        const { body } = this.page(object, page.offset, PAGE_COMMITS, page.number, page.stored);
        if (body.length !== page.records * 112 || page.records < 1)
          fail(this.name, page.offset, 'the number of commit records is wrong');
        for (let at = 0; at < body.length; at += 112)
          out.push(this.#commitRecord(body, at, page, packs));
        const own = out.slice(-page.records);
        const instants = own.map((commit) => commit.instant);
        const least = instants.reduce((x, y) => (y < x ? y : x));
        const greatest = instants.reduce((x, y) => (y > x ? y : x));
        const points = own.filter((commit) => commit.class >= 2).length;
        if (
          own[0].seq !== page.first ||
          least !== page.least ||
          greatest !== page.greatest ||
          points !== page.points
        ) {
          fail(
            this.name,
            page.offset,
            'the commits of the page are not those that the index describes',
          );
        }
      }
      return out;
    });
    let next = this.full ? list[0].first : this.first;
    let full = 0;
    for (const commit of list) {
      if (commit.first !== next)
        fail(
          this.name,
          null,
          `commit ${commit.seq} stands for ${commit.first} on, expected ${next} on`,
        );
      next = commit.seq + 1;
      if (commit.full) full = commit.first;
    }
    const last = list[list.length - 1];
    if (last.seq !== this.last || last.hash !== this.hash)
      fail(this.name, null, 'the last commit record is not the one the index names');
    if (!this.full && full !== this.lastFull)
      fail(
        this.name,
        null,
        `the index names ${this.lastFull} as the first number of the last full commit, it is ${full}`,
      );
    return list;
  }

  #commitRecord(body, at, page, packs) {
    const { name } = this;
    const bad = (what) => fail(name, page.offset, `commit record at byte ${at}: ${what}`);
    const wide = (field) => u64(body, at + field, name, page.offset, 'a field of a commit record');
    const flags = body.readUInt16LE(at + 18);
    const pack = body.readUInt32LE(at + 88);
    const commit = {
      seq: wide(0),
      first: wide(8),
      class: body[at + 16],
      coverage: body[at + 17],
      full: (flags & 1) !== 0,
      merged: (flags & 2) !== 0,
      epoch: body.readUInt32LE(at + 20),
      instant: body.readBigUInt64LE(at + 24),
      started: body.readBigUInt64LE(at + 32),
      written: body.readBigUInt64LE(at + 40),
      size: wide(48),
      hash: hexAt(body, at + 56, 32),
      packId: packs[pack],
      number: body.readUInt32LE(at + 92),
      replaced: wide(96),
    };
    if (commit.class >= CLASSES.length || commit.coverage >= COVERAGES.length || (flags & ~3) !== 0)
      bad('class, coverage or flags are wrong');
    if (
      commit.first < 1 ||
      commit.first > commit.seq ||
      (!commit.merged && commit.first !== commit.seq)
    )
      bad(`stands for ${commit.first} to ${commit.seq}`);
    if (pack >= packs.length) bad(`pack ${pack} is not in the table`);
    return commit;
  }

  /** Every extent record in the order of the file; seq as the file has it (relative to the first). */
  *records() {
    const packs = this.packs();
    const object = this.repo.store.open(this.name);
    try {
      let block = -1;
      let seq = -1;
      let end = 0;
      for (const page of this.extentPages) {
        const { body } = this.page(object, page.offset, PAGE_EXTENTS, page.number, page.stored);
        if (body.length !== page.records * 28 || page.records < 1)
          fail(this.name, page.offset, 'the number of extent records is wrong');
        let pageEnd = 0;
        for (let at = 0; at < body.length; at += 28) {
          const record = parseRecord(this.repo, body, at, packs, this.name, page.offset);
          const order = record.block > block || (record.block === block && record.seq > seq);
          if (!order)
            fail(
              this.name,
              page.offset,
              `the extent records are out of order at block ${record.block}`,
            );
          if (at === 0 && record.block !== page.first)
            fail(this.name, page.offset, 'the first block is not the one the index names');
          if (this.full) {
            if (record.block < end || record.pack === null || record.seq !== 0) {
              fail(
                this.name,
                page.offset,
                `block ${record.block}: not allowed in a full map (overlap, zeros or seq)`,
              );
            }
          } else if (record.seq > this.last - this.first)
            fail(
              this.name,
              page.offset,
              `the seq of the record for block ${record.block} is wrong`,
            );
          ({ block, seq } = record);
          end = Math.max(end, block + record.count);
          pageEnd = Math.max(pageEnd, block + record.count);
          yield record;
        }
        if (pageEnd !== page.end)
          fail(
            this.name,
            page.offset,
            `the page ends at block ${pageEnd}, the index says ${page.end}`,
          );
      }
    } finally {
      object.close();
    }
  }
}

// ---------------------------------------------------------------------------------------------------------------
// Painting: newest first, every block once
// ---------------------------------------------------------------------------------------------------------------

/** Writes the state of a volume into a file; what is painted first stays. */
class Painter {
  constructor(repo, fd, size) {
    this.repo = repo;
    this.fd = fd;
    this.size = size;
    /** Per GiB: one bit for each block that is decided. */
    this.regions = new Map();
    ftruncateSync(fd, size);
  }

  /** Paints a record: its blocks that are not decided yet, up to the end of the device. */
  paint(record, namedBy) {
    const end = Math.min(record.block + record.count, Math.ceil(this.size / BLOCK));
    if (end <= record.block) return;
    const region = Math.floor(record.block / REGION_BLOCKS);
    let bits = this.regions.get(region);
    if (bits === undefined) this.regions.set(region, (bits = new Uint8Array(REGION_BLOCKS / 8)));
    const base = region * REGION_BLOCKS;
    let start = -1;
    for (let block = record.block; block < end; block++) {
      const at = block - base;
      const free = (bits[at >> 3] & (1 << (at & 7))) === 0;
      if (free) {
        bits[at >> 3] |= 1 << (at & 7);
        if (start < 0) start = block;
      } else if (start >= 0) {
        this.#copy(record, start, block, namedBy);
        start = -1;
      }
    }
    if (start >= 0) this.#copy(record, start, end, namedBy);
  }

  #copy(record, from, to, namedBy) {
    if (record.pack === null) return;
    const per = this.repo.chunkBlocks;
    for (let block = from; block < to;) {
      const place = record.skip + (block - record.block);
      const index = record.run ? Math.floor(place / per) : 0;
      const within = record.run ? place % per : place;
      const count = Math.min(to - block, per - within);
      const chunk = this.repo.chunk(
        record.pack,
        record.frame + index,
        record.run ? 0 : record.sub,
        record.run,
        namedBy,
      );
      const lastIndex = record.run ? Math.floor((record.skip + record.count - 1) / per) : 0;
      if (index < lastIndex && chunk.length !== this.repo.chunkBytes) {
        fail(
          `packs/${record.pack.slice(0, 2)}/${record.pack}`,
          null,
          `the chunk in frame ${record.frame + index} is short but not the last of a run (${namedBy})`,
        );
      }
      if (Math.ceil(chunk.length / BLOCK) < within + count) {
        const pack = `packs/${record.pack.slice(0, 2)}/${record.pack}`;
        fail(
          pack,
          null,
          `the chunk in frame ${record.frame + index} ends before the blocks that ${namedBy} names`,
        );
      }
      this.#write(block, chunk.subarray(within * BLOCK, (within + count) * BLOCK));
      block += count;
    }
  }

  /** Writes bytes from a block on; blocks of zeros stay holes. */
  #write(block, bytes) {
    const at = block * BLOCK;
    const length = Math.min(bytes.length, this.size - at);
    for (let from = 0; from < length;) {
      const isZero = (o) => {
        const n = Math.min(BLOCK, length - o);
        return bytes.compare(ZERO_BLOCK, 0, n, o, o + n) === 0;
      };
      if (isZero(from)) {
        from += BLOCK;
        continue;
      }
      let to = from + BLOCK;
      while (to < length && !isZero(to)) to += BLOCK;
      to = Math.min(to, length);
      for (let done = from; done < to;)
        done += writeSync(this.fd, bytes, done, to - done, at + done);
      from = to;
    }
  }
}

/**
 * Checks that a commit of a device that has grown names every block from the end before on (section 8): else something of
 * before an earlier shrinking would show again.
 */
class GrowthCheck {
  /** @param {object | undefined} before the commit before `commit` in the chain, undefined if not known */
  constructor(before, commit) {
    const grown = before !== undefined && !commit.full && commit.size > before.size;
    this.from = grown ? Math.floor(before.size / BLOCK) : 0;
    this.to = grown ? Math.ceil(commit.size / BLOCK) : 0;
    this.missing = this.to - this.from;
  }

  add(record) {
    const named =
      Math.min(this.to, record.block + record.count) - Math.max(this.from, record.block);
    if (named > 0) this.missing -= named;
  }

  finish(commit, object, offset) {
    if (this.missing !== 0) {
      fail(
        object,
        offset,
        `commit ${commit.seq} grew the device but leaves out ${this.missing} of the blocks ${this.from} to ${this.to - 1}`,
      );
    }
  }
}

/** Position in the chain of the first commit with a sequence number of at least `seq`. */
function positionOf(chain, seq) {
  let low = 0;
  let high = chain.length;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (chain[middle].seq < seq) low = middle + 1;
    else high = middle;
  }
  return low;
}

/** Paints the commits of `chain[from..to]`, newest first, out of their packs. True when a full commit ended it. */
function paintCommits(repo, painter, chain, from, to) {
  for (let i = to; i >= from; i--) {
    const entry = chain[i];
    const name = `packs/${entry.packId.slice(0, 2)}/${entry.packId}`;
    const { commit, offset } = readCommit(repo, entry.packId, entry.number, `commit ${entry.seq}`);
    if (commit.hash !== entry.hash || commit.seq !== entry.seq)
      fail(name, offset, `is no longer commit ${entry.seq}`);
    const growth = new GrowthCheck(chain[i - 1], commit);
    for (const record of commitRecords(repo, commit, name, offset)) {
      growth.add(record);
      painter.paint(record, `commit ${commit.seq} in ${name}`);
    }
    growth.finish(commit, name, offset);
    if (commit.full) return true;
  }
  return false;
}

// ---------------------------------------------------------------------------------------------------------------
// Way A: packs only
// ---------------------------------------------------------------------------------------------------------------
/**
 * The chain of points that came from cartridges (11.3): each is whole in itself, so that it is made of what is there, also where one was exported
 * after a newer one. Null for commits that are anything else. `createdOf` tells copies of a point apart of which equally many packs are missing.
 */
function tapeChain(repo, commits, createdOf) {
  const packs = new Set(commits.map((c) => c.packId));
  const isPoint = (c) => c.full && c.merged && c.packs !== null && c.packs[0] === c.packId;
  if (packs.size !== commits.length || !commits.every(isPoint)) return null;
  const missing = (c) =>
    c.packs.filter((id) => !repo.store.has(`packs/${id.slice(0, 2)}/${id}`)).length;
  const copies = new Map();
  for (const commit of commits) {
    const copy = { commit, missing: missing(commit), created: createdOf(commit) };
    const key = `${commit.epoch}:${commit.seq}:${commit.hash}`;
    const other = copies.get(key);
    const better =
      other === undefined ||
      copy.missing < other.missing ||
      (copy.missing === other.missing && copy.created > other.created);
    if (better) copies.set(key, copy);
  }
  const chain = [];
  const down = [...copies.values()]
    .map(({ commit }) => commit)
    .sort((a, b) => b.epoch - a.epoch || b.seq - a.seq);
  for (const commit of down)
    if (chain.length === 0 || commit.seq < chain.at(-1).seq) chain.push(commit);
  chain.reverse();
  return chain.map((commit, i) => {
    const before = chain[i - 1] ?? { seq: 0, hash: ZERO_HASH };
    return { ...commit, first: before.seq + 1, prev: before.hash };
  });
}

class PacksOnly {
  constructor(repo) {
    this.repo = repo;
  }

  /** The chain of every volume, or of one: a map from volume id. */
  chains(only) {
    const commits = new Map();
    for (const id of this.repo.allPacks()) collectCommits(this.repo, id, only, commits);
    const chains = new Map();
    for (const [volume, list] of commits) {
      const points = tapeChain(this.repo, list, (c) => this.repo.pack(c.packId).created);
      chains.set(volume, { commits: points ?? chainOf(list).commits });
    }
    return chains;
  }

  paint(painter, volume, { commits }, target) {
    const to = positionOf(commits, target);
    paintCommits(this.repo, painter, commits, 0, to);
  }
}

// ---------------------------------------------------------------------------------------------------------------
// Way B: segments and journal
// ---------------------------------------------------------------------------------------------------------------

class Manifest {
  constructor(repo) {
    this.repo = repo;
  }

  chains(only) {
    const chains = new Map();
    for (const volume of this.repo.store.entries('volumes', /^[0-9a-f]{32}$/)) {
      if (only === null || only === volume) chains.set(volume, this.#chain(volume));
    }
    return chains;
  }

  #chain(volume) {
    const pattern = /^(?:[0-9a-f]{2}|full)-[0-9a-f]{16}-[0-9a-f]{16}$/;
    const segments = this.repo.store
      .entries(`volumes/${volume}/manifest`, pattern)
      .map((entry) => new Segment(this.repo, volume, entry));
    const commits = [];
    for (;;) {
      const reached = commits.at(-1)?.seq ?? 0;
      const next =
        bestCover(
          segments.filter((s) => !s.full),
          reached + 1,
        ) ?? earliestMap(segments, reached + 1);
      if (next === null) break;
      this.#append(commits, next);
    }
    const reached = commits.at(-1)?.seq ?? 0;
    const beyond = segments.find((s) => s.last > reached);
    if (beyond !== undefined)
      fail(
        beyond.name,
        null,
        `no segment covers commit ${reached + 1}, but this one begins at ${beyond.first}`,
      );
    for (const map of segments.filter((s) => s.full)) this.#checkMap(map, commits);
    const created = new Map();
    const inJournal = this.#journal(volume, commits.at(-1), created);
    if (segments.length === 0) {
      const points = tapeChain(this.repo, inJournal, (c) => created.get(c.packId));
      if (points !== null) return { commits: points, covered: 0, segments };
    }
    const later = chainOf(inJournal, commits);
    commits.length = later.keep;
    for (const commit of later.commits) commits.push(commit);
    return { commits, covered: later.keep, segments };
  }

  /** Adds the commits of a segment that lead on from those known so far. */
  #append(commits, segment) {
    const list = segment.commits();
    const last = commits.at(-1);
    const reached = last?.seq ?? 0;
    let previous = { seq: segment.first - 1, hash: segment.prev };
    for (const commit of list) {
      if (last !== undefined && commit.seq === reached && commit.hash !== last.hash) {
        fail(
          segment.name,
          null,
          `says that commit ${reached} is ${commit.hash}, others say ${last.hash}`,
        );
      }
      if (commit.seq > reached) {
        // a merged commit takes the place of those it stands for
        while (commits.length > 0 && commits.at(-1).seq >= commit.first) commits.pop();
        const before = commits.at(-1);
        const leads = segment.full
          ? before === undefined
          : before === undefined
            ? commit.first === 1
            : before.seq === commit.first - 1 &&
              (previous.seq !== before.seq || previous.hash === before.hash);
        if (!leads)
          fail(
            segment.name,
            null,
            `commit ${commit.seq} does not follow commit ${before?.seq ?? 0} ${before?.hash ?? ''}`,
          );
        if (before !== undefined && commit.epoch < before.epoch)
          fail(segment.name, null, `commit ${commit.seq} has a lower epoch than the one before it`);
        commits.push({ ...commit, segment });
      }
      previous = commit;
    }
  }

  /** A full map must be of a commit of the chain. */
  #checkMap(map, commits) {
    const [record] = map.commits();
    const at = positionOf(commits, map.last);
    const commit = commits[at];
    if (commit === undefined || commit.first > map.last)
      fail(map.name, null, `is the map of commit ${map.last}, which no segment names`);
    if (commit.seq === map.last && commit.hash !== record.hash) {
      fail(
        map.name,
        null,
        `is the map of commit ${map.last} ${record.hash}, but that commit is ${commit.hash}`,
      );
    }
  }

  /** The commits of the volume in the packs that the journal names; `created` takes the times of the entries. */
  #journal(volume, last, created) {
    const { repo } = this;
    const found = new Map();
    for (const pack of repo.store.entries(`volumes/${volume}/journal`, /^[0-9a-f]{32}$/)) {
      const name = `volumes/${volume}/journal/${pack}`;
      const entry = repo.sealedObject(name, 3);
      if (entry.volume !== volume || entry.pack !== pack)
        fail(name, 48, 'the entry is of another volume or pack');
      if (typeof entry.created !== 'string' || !/^\d{1,20}$/.test(entry.created))
        fail(name, 48, '`created` is no time');
      created.set(pack, BigInt(entry.created));
      if (!collectCommits(repo, pack, volume, found))
        warn(
          `${name}: the pack does not exist; either its writer was stopped before it put it, or it is lost`,
        );
    }
    const commits = found.get(volume) ?? [];
    for (const commit of commits) {
      if (last !== undefined && commit.seq <= last.seq && commit.epoch > last.epoch) {
        throw new ExtractError(
          `${describeCommit(commit)} has a higher epoch than the segments, which reach to commit ${last.seq}`,
        );
      }
    }
    return commits;
  }

  paint(painter, volume, { commits, covered, segments }, target) {
    const { repo } = this;
    const chain = commits.slice(0, positionOf(commits, target) + 1);
    const inSegments = Math.min(covered, chain.length);
    if (paintCommits(repo, painter, chain, inSegments, chain.length - 1)) return;
    if (inSegments === 0) return;
    // from here on: the newest full map not after the target, and the segments behind it
    const reach = chain[inSegments - 1].seq;
    let map = null;
    for (const s of segments)
      if (s.full && s.last <= reach && (map === null || s.last > map.last)) map = s;
    let start = map === null ? 0 : positionOf(chain, map.last + 1);
    let useMap = map !== null;
    for (let i = inSegments - 1; i >= start; i--) {
      if (chain[i].full) {
        start = i;
        useMap = false;
        break;
      }
    }
    this.#verifyCommits(chain, volume, start, inSegments - 1);
    const from = start < inSegments ? chain[start].first : reach + 1;
    const deltas = [];
    for (let next = start < inSegments ? chain[start].seq : reach + 1; next <= reach;) {
      const segment = bestCover(
        segments.filter((s) => !s.full),
        next,
      );
      if (segment === null)
        fail(`volumes/${volume}/manifest`, null, `no segment covers commit ${next}`);
      deltas.push(segment);
      next = segment.last + 1;
    }
    for (const segment of deltas.reverse())
      this.#paintDelta(
        painter,
        segment,
        from,
        reach,
        chain.slice(Math.max(start - 1, 0), inSegments),
      );
    if (!useMap) return;
    const at = positionOf(chain, map.last);
    if (chain[at].seq === map.last) this.#verifyMapCommit(map, volume);
    for (const record of map.records()) painter.paint(record, map.name);
  }

  /** Reads the commit frames that the records stand for and checks them, hash by hash. */
  #verifyCommits(chain, volume, from, to) {
    for (let i = from; i <= to; i++) {
      const entry = chain[i];
      const { commit, offset } = readCommit(
        this.repo,
        entry.packId,
        entry.number,
        entry.segment.name,
      );
      const name = `packs/${entry.packId.slice(0, 2)}/${entry.packId}`;
      const before = i > 0 ? chain[i - 1] : null;
      this.#compare(entry, commit, volume, name, offset);
      if (before !== null && before.seq === commit.first - 1 && commit.prev !== before.hash) {
        fail(
          name,
          offset,
          `commit ${commit.seq} follows ${commit.prev}, but commit ${before.seq} is ${before.hash}`,
        );
      }
    }
  }

  #verifyMapCommit(map, volume) {
    const [entry] = map.commits();
    const { commit, offset } = readCommit(this.repo, entry.packId, entry.number, map.name);
    this.#compare(
      { ...entry, segment: map },
      commit,
      volume,
      `packs/${entry.packId.slice(0, 2)}/${entry.packId}`,
      offset,
    );
  }

  #compare(entry, commit, volume, name, offset) {
    if (commit.volume !== volume) fail(name, offset, 'is a commit of another volume');
    for (const field of [
      'seq',
      'first',
      'class',
      'coverage',
      'full',
      'merged',
      'epoch',
      'instant',
      'started',
      'written',
      'size',
      'hash',
    ]) {
      if (commit[field] !== entry[field]) {
        fail(
          name,
          offset,
          `${field} of commit ${entry.seq} is ${commit[field]}, ${entry.segment.name} says ${entry[field]}`,
        );
      }
    }
  }

  /**
   * Paints the records with a sequence number of `from` to `to`, per GiB newest first. `chain`: the commits that are
   * painted and the one before them.
   */
  #paintDelta(painter, segment, from, to, chain) {
    const own = segment.commits();
    const replaced = new Float64Array(own.length);
    /** One for each commit of the segment that is painted and whose predecessor is known. */
    const growth = own.map((commit) => {
      const at = positionOf(chain, commit.seq);
      return chain[at]?.seq === commit.seq ? new GrowthCheck(chain[at - 1], commit) : null;
    });
    let region = -1;
    let batch = [];
    const flush = () => {
      batch.sort((x, y) => y.seq - x.seq);
      for (const record of batch) {
        painter.paint(record, segment.name);
      }
      batch = [];
    };
    for (const record of segment.records()) {
      record.seq += segment.first;
      const commit = positionOf(own, record.seq);
      replaced[commit] += record.count;
      growth[commit]?.add(record);
      if (record.seq < from || record.seq > to) continue;
      const here = Math.floor(record.block / REGION_BLOCKS);
      if (here !== region) {
        flush();
        region = here;
      }
      batch.push(record);
    }
    flush();
    own.forEach((commit, i) => {
      growth[i]?.finish(commit, segment.name, null);
      if (replaced[i] !== commit.replaced) {
        fail(
          segment.name,
          null,
          `has ${replaced[i]} blocks for commit ${commit.seq}, whose record says ${commit.replaced}`,
        );
      }
    });
  }
}

/** Of the delta segments that hold commit `seq`, the one that reaches furthest, of these the longest. */
function bestCover(segments, seq) {
  let best = null;
  for (const s of segments) {
    if (s.first > seq || s.last < seq) continue;
    if (best === null || s.last > best.last || (s.last === best.last && s.first < best.first))
      best = s;
  }
  return best;
}

/** The full map with the least LAST of at least `seq`. */
function earliestMap(segments, seq) {
  let best = null;
  for (const s of segments)
    if (s.full && s.last >= seq && (best === null || s.last < best.last)) best = s;
  return best;
}

// ---------------------------------------------------------------------------------------------------------------
// Commands
// ---------------------------------------------------------------------------------------------------------------

function readMeta(repo, volume) {
  const name = `volumes/${volume}/meta`;
  if (!repo.store.has(name)) return null;
  const meta = repo.sealedObject(name, 1);
  if (meta.id !== volume) fail(name, 48, 'is the object of another volume');
  return meta;
}

function readSnapshot(repo, volume, entry) {
  const name = `volumes/${volume}/snapshots/${entry}`;
  const snapshot = repo.sealedObject(name, 2);
  if (snapshot.volume !== volume) fail(name, 48, 'is a snapshot of another volume');
  if (typeof snapshot.name !== 'string' || nameHash(repo, snapshot.name) !== entry)
    fail(name, 48, 'does not belong to this name');
  return { ...snapshot, seq: jsonDecimal(snapshot.seq, name, 'seq'), object: name };
}

function nameHash(repo, name) {
  return blake3Keyed(repo.nameKey, Buffer.from(name, 'utf8')).toString('hex', 0, 16);
}

/** Checks the epoch objects of a volume. */
function checkEpochs(repo, volume) {
  for (const entry of repo.store.entries(`volumes/${volume}/epochs`, /^[0-9a-f]{8}$/)) {
    const name = `volumes/${volume}/epochs/${entry}`;
    const payload = repo.sealedObject(name, 4);
    if (payload.volume !== volume || payload.epoch !== parseInt(entry, 16)) {
      fail(name, 48, 'is the claim of another volume or epoch');
    }
  }
}

function findVolume(repo, wanted) {
  if (/^[0-9a-f]{32}$/.test(wanted)) return wanted;
  const matches = repo.store
    .entries('volumes', /^[0-9a-f]{32}$/)
    .filter((volume) => readMeta(repo, volume)?.name === wanted);
  if (matches.length === 0) fail(wanted, null, 'there is no volume of this name');
  if (matches.length > 1)
    fail(wanted, null, `several volumes have this name: ${matches.join(', ')}; use an id`);
  return matches[0];
}

const pointOf = (commit) => ({
  seq: commit.seq,
  first: commit.first,
  class: CLASSES[commit.class],
  coverage: COVERAGES[commit.coverage],
  full: commit.full,
  merged: commit.merged,
  instant: String(commit.instant),
  written: String(commit.written),
  sizeBytes: commit.size,
  epoch: commit.epoch,
  hash: commit.hash,
});

/** What `list` prints. */
export function list(repo, packsOnly) {
  const way = packsOnly ? new PacksOnly(repo) : new Manifest(repo);
  const chains = way.chains(null);
  const ids = new Set([...chains.keys(), ...repo.store.entries('volumes', /^[0-9a-f]{32}$/)]);
  return {
    repository: {
      id: repo.id,
      encryption: repo.config.encryption,
      chunkBytes: repo.chunkBytes,
      created: repo.config.created,
    },
    volumes: [...ids].sort().map((id) => {
      const meta = readMeta(repo, id);
      checkEpochs(repo, id);
      const commits = chains.get(id)?.commits ?? [];
      const snapshots = repo.store
        .entries(`volumes/${id}/snapshots`, /^[0-9a-f]{32}$/)
        .map((entry) => readSnapshot(repo, id, entry));
      for (const snapshot of snapshots) checkSnapshot(snapshot, commits);
      return {
        id,
        name: meta?.name ?? null,
        host: meta?.host ?? null,
        device: meta?.device ?? null,
        commits: commits.length,
        tip: commits.length === 0 ? null : pointOf(commits[commits.length - 1]),
        points: commits.filter((commit) => commit.class > 0).map(pointOf),
        snapshots: snapshots.map((s) => ({ name: s.name, seq: s.seq, hash: s.hash })),
      };
    }),
  };
}

function checkSnapshot(snapshot, commits) {
  const commit = commits[positionOf(commits, snapshot.seq)];
  if (commit === undefined || commit.seq !== snapshot.seq)
    fail(snapshot.object, 48, `commit ${snapshot.seq} is not in the chain`);
  if (commit.hash !== snapshot.hash)
    fail(snapshot.object, 48, `names commit ${snapshot.hash}, the chain has ${commit.hash}`);
}

/**
 * Writes the state of a volume at a commit to a new file.
 * @returns what was written
 */
export function extract(repo, packsOnly, wantedVolume, wantedSeq, outFile, snapshotName) {
  const volume = findVolume(repo, wantedVolume);
  readMeta(repo, volume);
  checkEpochs(repo, volume);
  const way = packsOnly ? new PacksOnly(repo) : new Manifest(repo);
  const chain = way.chains(volume).get(volume);
  if (chain === undefined || chain.commits.length === 0)
    fail(wantedVolume, null, 'the volume has no commits');
  const { commits } = chain;
  let seq;
  if (snapshotName !== null) {
    const entry = nameHash(repo, snapshotName);
    if (!repo.store.has(`volumes/${volume}/snapshots/${entry}`))
      fail(snapshotName, null, 'there is no snapshot of this name');
    const snapshot = readSnapshot(repo, volume, entry);
    checkSnapshot(snapshot, commits);
    ({ seq } = snapshot);
    if (wantedSeq !== 'latest' && wantedSeq !== String(seq))
      fail(snapshotName, null, `the snapshot is of commit ${seq}, not ${wantedSeq}`);
  } else if (wantedSeq === 'latest') {
    seq = commits.findLast((commit) => commit.class > 0)?.seq;
    if (seq === undefined) fail(wantedVolume, null, 'the volume has no recovery point');
  } else seq = Number(wantedSeq);
  const target = commits[positionOf(commits, seq)];
  if (target === undefined)
    fail(
      wantedVolume,
      null,
      `there is no commit ${seq}; the last is ${commits[commits.length - 1].seq}`,
    );
  if (target.seq !== seq)
    fail(wantedVolume, null, `commit ${seq} is merged into commit ${target.seq}`);

  if (existsSync(outFile)) fail(outFile, null, 'exists already');
  const partial = `${outFile}.partial-${process.pid}`;
  const fd = openSync(partial, 'wx', 0o600);
  try {
    const painter = new Painter(repo, fd, target.size);
    way.paint(painter, volume, chain, seq);
    fsyncSync(fd);
    linkSync(partial, outFile);
  } finally {
    closeSync(fd);
    unlinkSync(partial);
  }
  return { volume, ...pointOf(target) };
}

const USAGE = `usage: extract.mjs REPO_DIR list [--packs-only]
       extract.mjs REPO_DIR extract VOLUME_NAME_OR_ID SEQ|latest OUT_FILE [--packs-only] [--snapshot NAME]`;

function main(args, env) {
  const plain = [];
  let packsOnly = false;
  let snapshot = null;
  for (let i = 0; i < args.length; i++) {
    if (args[i] === '--packs-only') packsOnly = true;
    else if (args[i] === '--snapshot' && i + 1 < args.length) snapshot = args[++i];
    else if (args[i].startsWith('--'))
      throw new ExtractError(`${args[i]}: unknown option\n${USAGE}`);
    else plain.push(args[i]);
  }
  const [root, command, volume, seq, outFile] = plain;
  const listing = command === 'list' && plain.length === 2 && snapshot === null;
  const extracting =
    command === 'extract' && plain.length === 5 && /^(?:latest|[1-9][0-9]{0,15})$/.test(seq);
  if (!listing && !extracting) throw new ExtractError(USAGE);
  const secrets = {
    password: env.B2_PASSWORD,
    keyMaterial: env.B2_KEY_FILE === undefined ? undefined : readKeyFile(env.B2_KEY_FILE),
  };
  const repo = new Repository(root, secrets);
  const result = listing
    ? list(repo, packsOnly)
    : extract(repo, packsOnly, volume, seq, outFile, snapshot);
  process.stdout.write(`${JSON.stringify(result, null, 2)}\n`);
}

if (
  process.argv[1] !== undefined &&
  realpathSync(process.argv[1]) === fileURLToPath(import.meta.url)
) {
  try {
    main(process.argv.slice(2), process.env);
  } catch (error) {
    const known = error instanceof ExtractError || (error instanceof Error && 'code' in error);
    process.stderr.write(
      `extract: ${known ? error.message : error instanceof Error ? error.stack : String(error)}\n`,
    );
    process.exitCode = 1;
  }
}
