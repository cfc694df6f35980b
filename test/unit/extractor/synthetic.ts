/**
 * A writer of small repositories for the tests of the extractor, made from src/format/FORMAT.md and, like the extractor, without
 * any code of b2: both together say whether the document is enough. It keeps a model of the device next to
 * what it writes, so that every state can be compared.
 */
import { createCipheriv, hkdfSync, scryptSync } from 'node:crypto';
import { mkdirSync, writeFileSync } from 'node:fs';
import { dirname, join } from 'node:path';
import { crc32 as zlibCrc32 } from 'node:zlib';
import { Blake3Hasher } from '@napi-rs/blake-hash';
import { stringify } from 'yaml';

export const BLOCK = 4096;
export const CHUNK_BYTES = 16384;
export const CHUNK_BLOCKS = CHUNK_BYTES / BLOCK;
export const ZERO_HASH = '0'.repeat(64);
export const KEY_MATERIAL = Buffer.alloc(32, 0x5a);
export const PASSWORD = 'correct h\u00f6rse';
const NONE = 0xffffffff;

/** A seeded generator (mulberry32): numbers from 0 to below 1. */
export function random(seed: number): () => number {
  let a = seed;
  return () => {
    a = (a + 0x6d2b79f5) | 0;
    let t = Math.imul(a ^ (a >>> 15), 1 | a);
    t = (t + Math.imul(t ^ (t >>> 7), 61 | t)) ^ t;
    return ((t ^ (t >>> 14)) >>> 0) / 4294967296;
  };
}

/** BLAKE3 in keyed mode, by the native package. */
export function keyed(key: Buffer, data: Buffer): Buffer {
  return Blake3Hasher.newKeyed(key).update(data).digestBuffer();
}

const u32 = (...values: number[]): Buffer => {
  const out = Buffer.alloc(4 * values.length);
  values.forEach((value, i) => out.writeUInt32LE(value, 4 * i));
  return out;
};
const u16 = (...values: number[]): Buffer => {
  const out = Buffer.alloc(2 * values.length);
  values.forEach((value, i) => out.writeUInt16LE(value, 2 * i));
  return out;
};
const u64 = (...values: (number | bigint)[]): Buffer => {
  const out = Buffer.alloc(8 * values.length);
  values.forEach((value, i) => out.writeBigUInt64LE(BigInt(value), 8 * i));
  return out;
};
const hex = (text: string): Buffer => Buffer.from(text, 'hex');
const withCrc = (bytes: Buffer): Buffer => Buffer.concat([bytes, u32(zlibCrc32(bytes))]);

/** An LZ4 block of literals only; valid, and longer than what it holds. */
export function lz4Literals(plain: Buffer): Buffer {
  if (plain.length < 15) return Buffer.concat([Buffer.of(plain.length << 4), plain]);
  const lengths: number[] = [];
  let rest = plain.length - 15;
  for (; rest >= 255; rest -= 255) lengths.push(255);
  lengths.push(rest);
  return Buffer.concat([Buffer.of(0xf0, ...lengths), plain]);
}

/** One extent record; `pack` null: zeros. `seq` is absolute. */
export interface Extent {
  block: number;
  count: number;
  seq: number;
  pack: string | null;
  frame: number;
  sub: number;
  skip: number;
}

export interface CommitFacts {
  seq: number;
  first?: number;
  prev: string;
  class?: number;
  full?: boolean;
  standsFor?: string;
  size: number;
  epoch?: number;
  extents: Extent[];
  /** How many of the extents go to extents frames of two records each. */
  inFrames?: number;
}

/** A commit as written: what a segment says about it. */
export interface Written extends CommitFacts {
  first: number;
  hash: string;
  pack: string;
  number: number;
  instant: number;
}

export class SyntheticRepo {
  readonly dir: string;
  readonly encrypted: boolean;
  readonly id = '00112233445566778899aabbccddeeff';
  readonly master = Buffer.alloc(32, 0x17);
  readonly next: () => number;
  #salt = 1;

  constructor(dir: string, encrypted: boolean, seed: number) {
    this.dir = dir;
    this.encrypted = encrypted;
    this.next = random(seed);
    this.#config();
  }

  derive(purpose: string, salt: Buffer = Buffer.alloc(0)): Buffer {
    return Buffer.from(hkdfSync('sha256', this.master, salt, purpose, 32));
  }

  put(name: string, bytes: Buffer): void {
    const path = join(this.dir, name);
    mkdirSync(dirname(path), { recursive: true });
    writeFileSync(path, bytes);
  }

  salt(): Buffer {
    const salt = Buffer.alloc(16, 0xa0);
    salt.writeUInt32LE(this.#salt++, 4);
    return salt;
  }

  newId(): string {
    const id = this.salt();
    id[0] = Math.floor(this.next() * 256);
    return id.toString('hex');
  }

  gcm(key: Buffer, nonce: Buffer, aad: Buffer, plain: Buffer): Buffer {
    const cipher = createCipheriv('aes-256-gcm', key, nonce);
    cipher.setAAD(aad);
    return Buffer.concat([cipher.update(plain), cipher.final(), cipher.getAuthTag()]);
  }

  seal(key: Buffer, nonce: Buffer, aad: Buffer, plain: Buffer): Buffer {
    if (this.encrypted) return this.gcm(key, nonce, aad, plain);
    const check = keyed(
      this.derive('b2 checksum v1'),
      Buffer.concat([nonce, u32(aad.length), aad, plain]),
    );
    return Buffer.concat([plain, check.subarray(0, 16)]);
  }

  #config(): void {
    const salt = Buffer.alloc(16, 3);
    const wrap = (keyId: string, key: Buffer): string => {
      const nonce = Buffer.alloc(12, 9);
      const aad = Buffer.concat([Buffer.from('b2 key v1'), hex(this.id), hex(keyId)]);
      return Buffer.concat([nonce, this.gcm(key, nonce, aad, this.master)]).toString('base64');
    };
    const fromPassword = scryptSync(Buffer.from(PASSWORD.normalize('NFC')), salt, 32, {
      N: 16384,
      r: 4,
      p: 1,
    });
    const fromFile = Buffer.from(hkdfSync('sha256', KEY_MATERIAL, salt, 'b2 key file v1', 32));
    const created = '2026-01-02T03:04:05Z';
    const label =
      'key: "of the test", which is long enough to be folded by a writer of YAML at column eighty';
    const salt64 = salt.toString('base64');
    interface Key {
      id: string;
      label: string;
      created: string;
      kind: string;
      salt?: string;
      N?: number;
      r?: number;
      p?: number;
      wrapped?: string;
      master?: string;
    }
    const keys: Key[] = this.encrypted
      ? [
          {
            id: '0000000000000001',
            label,
            created,
            kind: 'scrypt',
            salt: salt64,
            N: 16384,
            r: 4,
            p: 1,
            wrapped: wrap('0000000000000001', fromPassword),
          },
          {
            id: '12345678901e5678',
            label: '',
            created,
            kind: 'file',
            salt: salt64,
            wrapped: wrap('12345678901e5678', fromFile),
          },
        ]
      : [
          {
            id: '00000000000000aa',
            label: '# none',
            created,
            kind: 'none',
            master: this.master.toString('base64'),
          },
        ];
    const encryption = this.encrypted ? 'aes256-gcm' : 'none';
    const list = keys.map((k) => [
      k.id,
      k.label,
      k.created,
      k.kind,
      k.salt ?? '',
      k.N ?? 0,
      k.r ?? 0,
      k.p ?? 0,
      k.wrapped ?? '',
    ]);
    const canonical = JSON.stringify([
      'b2',
      1,
      this.id,
      created,
      encryption,
      CHUNK_BYTES,
      1048576,
      list,
    ]);
    const mac = keyed(this.derive('b2 config v1'), Buffer.from(canonical)).toString('base64');
    const text = stringify({
      b2: 'repository',
      version: 1,
      id: this.id,
      created,
      encryption,
      chunkBytes: CHUNK_BYTES,
      packBytes: 1048576,
      keys,
      mac,
    });
    this.put('config.copy', Buffer.from(text));
    this.put('config', Buffer.from(text));
  }

  object(name: string, kind: number, payload: object): void {
    const salt = this.salt();
    const json = Buffer.from(JSON.stringify(payload));
    const header = withCrc(
      Buffer.concat([
        Buffer.from('B2OBJ\0\0\0'),
        u16(1, this.encrypted ? 1 : 0),
        u32(kind),
        salt,
        u32(json.length, 0, 0),
      ]),
    );
    const aad = Buffer.concat([header, Buffer.from(name)]);
    this.put(
      name,
      Buffer.concat([
        header,
        this.seal(this.derive('b2 object v1', salt), Buffer.alloc(12), aad, json),
      ]),
    );
  }

  snapshot(volume: string, name: string, commit: Written): void {
    const nameHash = keyed(this.derive('b2 name v1'), Buffer.from(name)).toString('hex', 0, 16);
    const payload = {
      name,
      volume,
      seq: String(commit.seq),
      hash: commit.hash,
      instant: '1',
      class: 'crash',
      tags: [],
      created: '1',
    };
    this.object(`volumes/${volume}/snapshots/${nameHash}`, 2, payload);
  }

  /** Puts a segment. `records` and `commits` in any order; `records` carry absolute sequence numbers. */
  segment(
    volume: string,
    level: number | 'full',
    first: number,
    last: number,
    prev: string,
    records: Extent[],
    commits: Written[],
  ): string {
    const full = level === 'full';
    const salt = this.salt();
    const key = this.derive('b2 segment v1', salt);
    const header = withCrc(
      Buffer.concat([
        Buffer.from('B2SEG\0\0\0'),
        u16(1, (this.encrypted ? 1 : 0) | (full ? 2 : 0)),
        u32(full ? 0 : level),
        hex(volume),
        hex(this.id),
        salt,
        u64(first, last, 5),
        u32(0),
      ]),
    );
    const sorted = [...records].sort((a, b) => a.block - b.block || a.seq - b.seq);
    const packs = [
      ...new Set([
        ...sorted.flatMap((r) => (r.pack === null ? [] : [r.pack])),
        ...commits.map((c) => c.pack),
      ]),
    ];
    const parts: Buffer[] = [header];
    let offset = header.length;
    let number = 0;
    const page = (
      type: number,
      body: Buffer,
    ): { offset: number; number: number; stored: number } => {
      const compressed = number % 2 === 1;
      const stored = compressed ? lz4Literals(body) : body;
      const head = Buffer.concat([
        Buffer.of(type, compressed ? 1 : 0, 0, 0),
        u32(number, stored.length + 16, body.length),
      ]);
      const sealed = this.seal(
        key,
        Buffer.concat([u32(number), Buffer.alloc(8)]),
        Buffer.concat([header, head]),
        stored,
      );
      const at = { offset, number, stored: sealed.length };
      parts.push(head, sealed);
      offset += head.length + sealed.length;
      number++;
      return at;
    };
    const slices = <T>(list: T[], size: number): T[][] => {
      const out: T[][] = [];
      for (let i = 0; i < list.length; i += size) out.push(list.slice(i, i + size));
      return out;
    };
    const extentEntries = slices(sorted, 7).map((rows) => {
      const at = page(1, Buffer.concat(rows.map((r) => record(r, full ? r.seq : first, packs))));
      const end = Math.max(...rows.map((r) => r.block + r.count));
      return Buffer.concat([
        u64(at.offset),
        u32(at.number, rows.length),
        u64(rows[0]?.block ?? 0, end),
        u32(at.stored, 0),
      ]);
    });
    const ordered = [...commits].sort((a, b) => a.seq - b.seq);
    const commitEntries = slices(ordered, 3).map((rows) => {
      const at = page(
        2,
        Buffer.concat(
          rows.map((c) =>
            Buffer.concat([
              u64(c.seq, c.first),
              Buffer.of(c.class ?? 2, 0),
              u16(flagsOf(c)),
              u32(c.epoch ?? 1),
              u64(c.instant, c.instant + 1, c.instant + 2, c.size),
              hex(c.hash),
              u32(packs.indexOf(c.pack), c.number),
              u64(
                c.extents.reduce((sum, e) => sum + e.count, 0),
                0,
              ),
            ]),
          ),
        ),
      );
      const instants = rows.map((c) => c.instant);
      const points = rows.filter((c) => (c.class ?? 2) >= 2).length;
      return Buffer.concat([
        u64(at.offset),
        u32(at.number, rows.length),
        u64(rows[0]?.seq ?? 0, Math.min(...instants), Math.max(...instants)),
        u32(at.stored, points),
      ]);
    });
    const packEntries = slices(packs, 4).map((rows) => {
      const at = page(3, Buffer.concat(rows.map(hex)));
      return Buffer.concat([u64(at.offset), u32(at.number, rows.length, at.stored, 0)]);
    });
    const index = page(
      4,
      Buffer.concat([
        u32(extentEntries.length, commitEntries.length, packEntries.length, packs.length),
        u64(sorted.length, commits.length),
        hex(prev),
        hex(ordered.at(-1)?.hash ?? ZERO_HASH),
        u64(ordered.findLast((c) => c.full === true)?.first ?? 0, 0),
        ...extentEntries,
        ...commitEntries,
        ...packEntries,
      ]),
    );
    parts.push(withCrc(Buffer.concat([Buffer.from('B2SE'), u64(index.offset)])));
    const digits = (n: number, width: number): string => n.toString(16).padStart(width, '0');
    const name = `volumes/${volume}/manifest/${full ? 'full' : digits(level, 2)}-${digits(first, 16)}-${digits(last, 16)}`;
    this.put(name, Buffer.concat(parts));
    return name;
  }
}

function flagsOf(c: CommitFacts): number {
  return (c.full === true ? 1 : 0) | (c.standsFor === undefined ? 0 : 2);
}

function record(r: Extent, base: number, packs: string[]): Buffer {
  const pack = r.pack === null ? NONE : packs.indexOf(r.pack);
  return Buffer.concat([
    u64(r.block),
    u32(r.count, r.seq - base, pack, r.frame),
    u16(r.sub, r.skip),
  ]);
}

interface FrameRow {
  number: number;
  offset: number;
  stored: number;
  plain: number;
  type: number;
  compression: number;
  count: number;
}

export class SyntheticPack {
  readonly repo: SyntheticRepo;
  readonly id: string;
  readonly #parts: Buffer[] = [];
  readonly #rows: FrameRow[] = [];
  readonly #entries: Buffer[] = [];
  #size = 0;
  #number = 0;

  constructor(repo: SyntheticRepo, id: string = repo.newId()) {
    this.repo = repo;
    this.id = id;
    const header = withCrc(
      Buffer.concat([
        Buffer.from('B2PACK\0\0'),
        u16(1, repo.encrypted ? 1 : 0),
        u32(0),
        hex(this.id),
        hex(repo.id),
        u64(7),
        u32(0),
      ]),
    );
    this.#add(header);
  }

  get name(): string {
    return `packs/${this.id.slice(0, 2)}/${this.id}`;
  }

  #add(bytes: Buffer): void {
    this.#parts.push(bytes);
    this.#size += bytes.length;
  }

  #frame(type: number, count: number, head: Buffer, body: Buffer): number {
    const compression = this.repo.next() < 0.5 ? 1 : 0;
    const stored = compression === 1 ? lz4Literals(body) : body;
    const number = this.#number;
    this.#number += this.repo.next() < 0.2 && type !== 1 ? 3 : 1;
    const bytes = head.length + stored.length + 16;
    const header = withCrc(
      Buffer.concat([
        Buffer.from('B2FR'),
        Buffer.of(type, compression),
        u16(count),
        u32(number, bytes, body.length, head.length, 0),
      ]),
    );
    const key = this.repo.derive('b2 pack v1', hex(this.id));
    const sealed = this.repo.seal(
      key,
      Buffer.concat([u32(number), Buffer.alloc(8)]),
      Buffer.concat([hex(this.id), header]),
      Buffer.concat([head, stored]),
    );
    this.#rows.push({
      number,
      offset: this.#size,
      stored: bytes,
      plain: body.length,
      type,
      compression,
      count,
    });
    this.#add(header);
    this.#add(sealed);
    return number;
  }

  /** A chunks frame. */
  chunks(list: Buffer[]): number {
    const head = Buffer.concat(
      list.map((c) => Buffer.concat([keyed(this.repo.derive('b2 chunk id v1'), c), u32(c.length)])),
    );
    this.#entries.push(head);
    return this.#frame(1, list.length, head, Buffer.concat(list));
  }

  commit(volume: string, facts: CommitFacts): Written {
    const first = facts.first ?? facts.seq;
    const packs = [
      ...new Set([this.id, ...facts.extents.flatMap((e) => (e.pack === null ? [] : [e.pack]))]),
    ];
    const hashKey = this.repo.derive('b2 commit hash v1');
    const inFrames = facts.inFrames ?? 0;
    const references: Buffer[] = [];
    for (let i = 0; i < inFrames; i += 2) {
      const rows = facts.extents.slice(i, Math.min(i + 2, inFrames));
      const body = Buffer.concat(rows.map((e) => record(e, first, packs)));
      const number = this.#frame(2, 0, Buffer.alloc(0), body);
      references.push(Buffer.concat([u32(0, number, rows.length, 0), keyed(hashKey, body)]));
    }
    const rest = facts.extents.slice(inFrames);
    const json = Buffer.from('{"source":"test"}');
    const instant = 1_000_000 + facts.seq;
    const body = Buffer.concat([
      u16(1),
      Buffer.of(facts.class ?? 2, 0),
      u32(flagsOf(facts)),
      hex(volume),
      u64(facts.seq, first),
      hex(facts.prev),
      hex(facts.standsFor ?? ZERO_HASH),
      u64(instant, instant + 1, instant + 2, facts.size),
      u32(facts.epoch ?? 1, packs.length, references.length, rest.length, json.length, 0),
      ...packs.map(hex),
      ...references,
      ...rest.map((e) => record(e, first, packs)),
      json,
    ]);
    const number = this.#frame(3, 0, Buffer.alloc(0), body);
    return {
      ...facts,
      first,
      hash: facts.standsFor ?? keyed(hashKey, body).toString('hex'),
      pack: this.id,
      number,
      instant,
    };
  }

  /** Bytes that a crash left. */
  junk(bytes: Buffer): void {
    this.#add(bytes);
  }

  /** A footer frame and a trailer behind what is there. */
  footer(): void {
    const chunks = Buffer.concat(this.#entries);
    const rows = this.#rows.map((r) =>
      Buffer.concat([
        u32(r.number, r.offset, r.stored, r.plain),
        Buffer.of(r.type, r.compression),
        u16(r.count),
      ]),
    );
    const body = Buffer.concat([u32(rows.length, chunks.length / 36), ...rows, chunks]);
    const salt = this.repo.salt();
    const header = withCrc(
      Buffer.concat([
        Buffer.from('B2FR'),
        Buffer.of(4, 0),
        u16(0),
        u32(NONE, body.length + 32, body.length, 0, 0),
      ]),
    );
    const aad = Buffer.concat([hex(this.id), header, salt]);
    const frame = Buffer.concat([
      header,
      salt,
      this.repo.seal(this.repo.derive('b2 footer v1', salt), Buffer.alloc(12), aad, body),
    ]);
    const offset = this.#size;
    this.#add(frame);
    this.#add(withCrc(Buffer.concat([Buffer.from('B2PE'), u32(offset, frame.length)])));
  }

  put(): void {
    this.repo.put(this.name, Buffer.concat(this.#parts));
  }
}

/** The device: per block where its bytes are, and what they are. */
export class Model {
  size: number;
  blocks = new Map<number, { bytes: Buffer; source: Extent }>();

  constructor(size: number) {
    this.size = size;
  }

  resize(size: number): void {
    this.size = size;
    for (const block of this.blocks.keys()) if (block * BLOCK >= size) this.blocks.delete(block);
  }

  image(): Buffer {
    const out = Buffer.alloc(Math.ceil(this.size / BLOCK) * BLOCK);
    for (const [block, { bytes }] of this.blocks) bytes.copy(out, block * BLOCK);
    return out.subarray(0, this.size);
  }

  /** The records of a full map at `seq`. */
  map(seq: number): Extent[] {
    return [...this.blocks].map(([block, { source }]) => ({ ...source, block, count: 1, seq }));
  }

  clone(): Model {
    const copy = new Model(this.size);
    copy.blocks = new Map(this.blocks);
    return copy;
  }
}

/** Writes random changes of a volume and keeps the model of every state. */
export class SyntheticVolume {
  readonly repo: SyntheticRepo;
  readonly id: string;
  readonly states = new Map<number, Model>();
  readonly commits: Written[] = [];
  model: Model;
  /** Chunks that later commits may refer to again. */
  readonly #known: { pack: string; frame: number; sub: number; bytes: Buffer }[] = [];

  constructor(repo: SyntheticRepo, name: string, size: number) {
    this.repo = repo;
    this.id = repo.newId();
    this.model = new Model(size);
    const volume = this.id;
    repo.object(`volumes/${volume}/meta`, 1, {
      id: volume,
      name,
      host: 'h',
      created: '1',
      device: '/dev/x',
      sizeBytes: String(size),
      logicalBlockBytes: 512,
      facts: {},
      updated: '1',
      unknown: [1],
    });
    repo.object(`volumes/${volume}/epochs/00000001`, 4, {
      volume,
      epoch: 1,
      writer: {},
      created: '1',
    });
  }

  #bytes(length: number): Buffer {
    const out = Buffer.alloc(length);
    for (let i = 0; i < length; i++) out[i] = Math.floor(this.repo.next() * 256);
    if (length >= 2 * BLOCK && this.repo.next() < 0.3) out.fill(0, BLOCK, 2 * BLOCK);
    return out;
  }

  /** Random, non-overlapping changes; the chunks go to `pack`. */
  changes(
    pack: SyntheticPack,
    seq: number,
    size: number,
  ): { extents: Extent[]; bytes: (Buffer | null)[] } {
    const { next } = this.repo;
    const extents: Extent[] = [];
    const contents: (Buffer | null)[] = [];
    const blocks = Math.ceil(size / BLOCK);
    let block = Math.floor(next() * 6);
    while (block < blocks) {
      let count = Math.min(1 + Math.floor(next() * 3 * CHUNK_BLOCKS), blocks - block);
      const kind = next();
      const known = this.#known[Math.floor(next() * this.#known.length)];
      if (kind < 0.2) {
        extents.push({ block, count, seq, pack: null, frame: 0, sub: 0, skip: 0 });
        contents.push(null);
      } else if (kind < 0.4 && known !== undefined && known.bytes.length % BLOCK === 0) {
        const has = known.bytes.length / BLOCK;
        const skip = Math.floor(next() * has);
        count = Math.min(count, has - skip);
        extents.push({
          block,
          count,
          seq,
          pack: known.pack,
          frame: known.frame,
          sub: known.sub,
          skip,
        });
        contents.push(known.bytes.subarray(skip * BLOCK, (skip + count) * BLOCK));
      } else {
        const length = Math.min(count * BLOCK, size - block * BLOCK);
        const data = this.#bytes(length);
        if (count > CHUNK_BLOCKS) {
          let frame = -1;
          for (let at = 0; at < length; at += CHUNK_BYTES) {
            const chunk = data.subarray(at, Math.min(at + CHUNK_BYTES, length));
            const number = pack.chunks([chunk]);
            if (frame < 0) frame = number;
            this.#known.push({ pack: pack.id, frame: number, sub: 0, bytes: chunk });
          }
          extents.push({ block, count, seq, pack: pack.id, frame, sub: 0, skip: 0 });
        } else {
          const other = this.#bytes(BLOCK);
          const frame = pack.chunks([other, data]);
          this.#known.push(
            { pack: pack.id, frame, sub: 0, bytes: other },
            { pack: pack.id, frame, sub: 1, bytes: data },
          );
          extents.push({ block, count, seq, pack: pack.id, frame, sub: 1, skip: 0 });
        }
        contents.push(data);
      }
      block += count + Math.floor(next() * 12);
    }
    return { extents, bytes: contents };
  }

  /** Writes the next commit into `pack`. */
  commit(
    pack: SyntheticPack,
    options: { size?: number; full?: boolean; epoch?: number; class?: number } = {},
  ): Written {
    const seq = this.commits.length + 1;
    const size = options.size ?? this.model.size;
    // a device that grows names every block from its old end on: here as zeros
    const grown =
      options.full !== true && size > this.model.size ? Math.floor(this.model.size / BLOCK) : null;
    const { extents, bytes } = this.changes(pack, seq, grown === null ? size : grown * BLOCK);
    if (grown !== null) {
      const count = Math.ceil(size / BLOCK) - grown;
      extents.push({ block: grown, count, seq, pack: null, frame: 0, sub: 0, skip: 0 });
      bytes.push(null);
    }
    const facts: CommitFacts = {
      seq,
      prev: this.commits.at(-1)?.hash ?? ZERO_HASH,
      size,
      extents,
      inFrames: Math.min(extents.length, Math.floor(this.repo.next() * 5)),
    };
    if (options.full !== undefined) facts.full = options.full;
    if (options.epoch !== undefined) facts.epoch = options.epoch;
    if (options.class !== undefined) facts.class = options.class;
    const written = pack.commit(this.id, facts);
    this.commits.push(written);
    this.model = this.model.clone();
    if (options.full === true) this.model.blocks.clear();
    this.model.resize(size);
    extents.forEach((e, i) => {
      for (let k = 0; k < e.count; k++) {
        const data = bytes[i];
        if (data === null || data === undefined) {
          this.model.blocks.delete(e.block + k);
          continue;
        }
        const at = e.skip + k;
        const run = e.skip + e.count > CHUNK_BLOCKS;
        const source = {
          ...e,
          frame: e.frame + (run ? Math.floor(at / CHUNK_BLOCKS) : 0),
          skip: run ? at % CHUNK_BLOCKS : at,
        };
        this.model.blocks.set(e.block + k, {
          bytes: Buffer.from(data.subarray(k * BLOCK, (k + 1) * BLOCK)),
          source,
        });
      }
    });
    this.states.set(seq, this.model);
    return written;
  }

  journal(pack: string): void {
    this.repo.object(`volumes/${this.id}/journal/${pack}`, 3, {
      volume: this.id,
      epoch: 1,
      pack,
      firstSeq: '1',
      prevHash: ZERO_HASH,
      writer: {},
      created: '1',
    });
  }

  /** A delta segment over commits first to last. */
  delta(level: number, first: number, last: number, commits: Written[] = this.commits): string {
    const own = commits.filter((c) => c.seq >= first && c.seq <= last);
    const prev = own[0]?.prev ?? ZERO_HASH;
    return this.repo.segment(
      this.id,
      level,
      first,
      last,
      prev,
      own.flatMap((c) => c.extents),
      own,
    );
  }

  /** A full map at `seq`. */
  fullMap(seq: number): string {
    const state = this.states.get(seq);
    const commit = this.commits[seq - 1];
    if (state === undefined || commit === undefined) throw new Error(`no commit ${seq}`);
    return this.repo.segment(this.id, 'full', 1, seq, ZERO_HASH, state.map(seq), [commit]);
  }
}
