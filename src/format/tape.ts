/** What a tape says of itself and what the repository remembers of it (FORMAT.md section 11). */
import { B2Error } from '../errors.js';
import { damaged } from './bytes.js';
import { newerVersion } from './pack.js';

export const TAPE_VERSION = 1;
/** Bytes of a record unless asked otherwise: what `tar -b 512` reads. */
export const DEFAULT_RECORD_BYTES = 256 * 1024;
/** Records are a multiple of this. */
export const RECORD_STEP_BYTES = 4096;
export const MAX_RECORD_BYTES = 1024 * 1024;
/** Members of the repository stand below this directory in the archives. */
export const TAPE_ROOT = 'b2-repository/';
export const LABEL_MEMBER = 'label.json';
export const README_MEMBER = 'README.txt';

const HEX16 = /^[0-9a-f]{32}$/;
const LABEL = /^[A-Za-z0-9_-]{1,64}$/;

/** True if `text` can be the label of a cartridge: 1 to 64 of `A-Z a-z 0-9 _ -`. */
export function isTapeLabel(text: string): boolean {
  return LABEL.test(text);
}

/** What the first file of a cartridge says: plain JSON, not secret and not authenticated. */
export interface TapeLabel {
  readonly label: string;
  /** 32 random hex digits: what is written anew has another one. */
  readonly cartridgeId: string;
  readonly setName: string;
  readonly setId: string;
  /** 1, 2, … in the set. */
  readonly number: number;
  readonly repositoryId: string;
  readonly host: string;
  /** RFC 3339. */
  readonly created: string;
  readonly recordBytes: number;
  /** Version of b2. */
  readonly program: string;
}

export function encodeTapeLabel(l: TapeLabel): Buffer {
  const o = {
    b2: 'tape',
    version: TAPE_VERSION,
    label: l.label,
    cartridge: l.cartridgeId,
    set: l.setName,
    setId: l.setId,
    number: l.number,
    repository: l.repositoryId,
    host: l.host,
    created: l.created,
    recordBytes: l.recordBytes,
    program: l.program,
  };
  return Buffer.from(`${JSON.stringify(o, undefined, 1)}\n`, 'utf8');
}

/** Kind `damaged` for what is no label, `unsupported` for a newer one. */
export function decodeTapeLabel(b: Buffer, what: string): TapeLabel {
  let o: unknown;
  try {
    o = JSON.parse(b.toString('utf8'));
  } catch {
    throw damaged(what, 0, 'the label is not JSON');
  }
  const f = recordOf(o, what);
  if (f['b2'] !== 'tape') throw damaged(what, 0, 'this is not the label of a b2 tape');
  if (typeof f['version'] === 'number' && f['version'] > TAPE_VERSION)
    throw newerVersion(what, f['version']);
  const label = textOf(f, 'label', what);
  const recordBytes = numberOf(f, 'recordBytes', what);
  if (!LABEL.test(label)) throw damaged(what, 0, 'an impossible label');
  if (recordBytes < RECORD_STEP_BYTES || recordBytes > MAX_RECORD_BYTES)
    throw damaged(what, 0, 'an impossible size of records');
  return {
    label,
    cartridgeId: hexOf(f, 'cartridge', what),
    setName: textOf(f, 'set', what),
    setId: hexOf(f, 'setId', what),
    number: numberOf(f, 'number', what),
    repositoryId: hexOf(f, 'repository', what),
    host: textOf(f, 'host', what),
    created: textOf(f, 'created', what),
    recordBytes,
    program: textOf(f, 'program', what),
  };
}

export type TapeFileKind = 'label' | 'directory' | 'data' | 'contents';
const KINDS: readonly TapeFileKind[] = ['label', 'directory', 'data', 'contents'];

/** Which file of which cartridge an archive is: the comment in its global pax header. */
export interface TapeFileId {
  readonly cartridgeId: string;
  /** 32 hex digits; zeros for the label. */
  readonly sessionId: string;
  /** 0, 1, … on the cartridge. */
  readonly file: number;
  readonly kind: TapeFileKind;
}

export function tapeComment(id: TapeFileId): string {
  return `b2 tape ${TAPE_VERSION} cartridge ${id.cartridgeId} session ${id.sessionId} file ${id.file} ${id.kind}`;
}

/** Undefined for what is no comment of a b2 tape of this version. */
export function parseTapeComment(text: string): TapeFileId | undefined {
  const m =
    /^b2 tape 1 cartridge ([0-9a-f]{32}) session ([0-9a-f]{32}) file (\d{1,9}) ([a-z]+)$/.exec(
      text,
    );
  const kind = KINDS.find((k) => k === m?.[4]);
  if (m === null || kind === undefined) return undefined;
  return { cartridgeId: m[1] ?? '', sessionId: m[2] ?? '', file: Number(m[3]), kind };
}

/** A point on a set. */
export interface TapePoint {
  readonly volumeId: string;
  readonly volumeName: string;
  readonly seq: number;
  /** Hash of the commit, hex. */
  readonly hash: string;
  readonly instantNs: bigint;
  readonly pointClass: string;
  readonly sizeBytes: number;
  /** The pack that holds its commit. */
  readonly packId: string;
  /** Labels of the earlier cartridges that it needs besides those that its own session fills. */
  readonly needs: readonly string[];
}

/** One export, or the part of one that is on this cartridge. */
export interface TapeSession {
  readonly id: string;
  readonly startedNs: bigint;
  readonly finishedNs: bigint;
  /** File of the first directory. */
  readonly firstFile: number;
  /** The file behind its last one. */
  readonly endFile: number;
  /** Bytes of all its records. */
  readonly bytes: number;
  /** False: it goes on on the next cartridge. */
  readonly last: boolean;
  readonly points: readonly TapePoint[];
  readonly packs: number;
  readonly parts: number;
  /** When everything was read back and found right; 0: not yet. */
  readonly verifiedNs: bigint;
  /** Packs that could not be read back. */
  readonly damagedPacks: readonly string[];
}

/** What a cartridge holds: the payload of the object `tapes/LABEL` (kind 6). */
export interface TapeCartridge {
  readonly tape: TapeLabel;
  /** Bar code of the cartridge where a changer told one. */
  readonly barcode: string;
  readonly full: boolean;
  readonly sessions: readonly TapeSession[];
}

export function tapeName(label: string): string {
  return `tapes/${label}`;
}

/** Part `part` of what session `session` (its index on the cartridge) put there. */
export function tapePartName(label: string, session: number, part: number): string {
  return `tapes/${label}.${session}.${part}`;
}

const CARTRIDGE_NAME = /^tapes\/([A-Za-z0-9_-]{1,64})$/;

/** The label in the name of a cartridge's object; undefined for other names. */
export function labelOfName(name: string): string | undefined {
  return CARTRIDGE_NAME.exec(name)?.[1];
}

const text = (n: number | bigint): string => String(n);

export function tapePayload(c: TapeCartridge): Record<string, unknown> {
  return {
    label: JSON.parse(encodeTapeLabel(c.tape).toString('utf8')) as unknown,
    barcode: c.barcode,
    full: c.full,
    sessions: c.sessions.map((s) => ({
      id: s.id,
      started: text(s.startedNs),
      finished: text(s.finishedNs),
      firstFile: s.firstFile,
      endFile: s.endFile,
      bytes: text(s.bytes),
      last: s.last,
      points: s.points.map((p) => ({
        volume: p.volumeId,
        name: p.volumeName,
        seq: text(p.seq),
        hash: p.hash,
        instant: text(p.instantNs),
        class: p.pointClass,
        sizeBytes: text(p.sizeBytes),
        pack: p.packId,
        needs: p.needs,
      })),
      packs: s.packs,
      parts: s.parts,
      verified: text(s.verifiedNs),
      damagedPacks: s.damagedPacks,
    })),
  };
}

export function tapeOfPayload(o: Record<string, unknown>, what: string): TapeCartridge {
  return {
    tape: decodeTapeLabel(Buffer.from(JSON.stringify(o['label'] ?? null), 'utf8'), what),
    barcode: textOf(o, 'barcode', what),
    full: o['full'] === true,
    sessions: listOf(o, 'sessions', what).map((v): TapeSession => {
      const s = recordOf(v, what);
      return {
        id: hexOf(s, 'id', what),
        startedNs: bigintOf(s, 'started', what),
        finishedNs: bigintOf(s, 'finished', what),
        firstFile: numberOf(s, 'firstFile', what),
        endFile: numberOf(s, 'endFile', what),
        bytes: numberOf(s, 'bytes', what),
        last: s['last'] === true,
        points: listOf(s, 'points', what).map((w): TapePoint => {
          const p = recordOf(w, what);
          return {
            volumeId: hexOf(p, 'volume', what),
            volumeName: textOf(p, 'name', what),
            seq: numberOf(p, 'seq', what),
            hash: textOf(p, 'hash', what),
            instantNs: bigintOf(p, 'instant', what),
            pointClass: textOf(p, 'class', what),
            sizeBytes: numberOf(p, 'sizeBytes', what),
            packId: hexOf(p, 'pack', what),
            needs: textsOf(p, 'needs', what),
          };
        }),
        packs: numberOf(s, 'packs', what),
        parts: numberOf(s, 'parts', what),
        verifiedNs: bigintOf(s, 'verified', what),
        damagedPacks: textsOf(s, 'damagedPacks', what),
      };
    }),
  };
}

/** Where a pack stands on a cartridge: its tar header begins in this record of this file. */
export interface PackOnTape {
  readonly packId: string;
  readonly file: number;
  readonly record: number;
}

/**
 * `count` chunks of the repository that are on tape: from chunk `sub` of frame `frame` of the pack `source` on, in `pack` from
 * its `toFrame` and `toSub` on. `bySub`: chunks of one frame one after the other; else the only chunks of frames one after the other.
 */
export interface PlaceOnTape {
  readonly source: string;
  readonly frame: number;
  readonly sub: number;
  readonly count: number;
  readonly bySub: boolean;
  /** Index in the packs of the part. */
  readonly pack: number;
  readonly toFrame: number;
  readonly toSub: number;
}

/** A part of what a session put on a cartridge: the payload of `tapes/LABEL.SESSION.PART` (kind 6). */
export interface TapePart {
  readonly packs: readonly PackOnTape[];
  readonly places: readonly PlaceOnTape[];
}

const PACK_BYTES = 24;
const PLACE_BYTES = 28;

export function partPayload(part: TapePart): Record<string, unknown> {
  const packs = Buffer.alloc(part.packs.length * PACK_BYTES);
  part.packs.forEach((p, i) => {
    packs.write(p.packId, i * PACK_BYTES, 'hex');
    packs.writeUInt32LE(p.file, i * PACK_BYTES + 16);
    packs.writeUInt32LE(p.record, i * PACK_BYTES + 20);
  });
  const sources = [...new Set(part.places.map((p) => p.source))];
  const indexOf = new Map(sources.map((s, i) => [s, i]));
  const places = Buffer.alloc(part.places.length * PLACE_BYTES);
  part.places.forEach((p, i) => {
    const at = i * PLACE_BYTES;
    places.writeUInt32LE(indexOf.get(p.source) ?? 0, at);
    places.writeUInt32LE(p.frame, at + 4);
    places.writeUInt16LE(p.sub, at + 8);
    places.writeUInt16LE(p.bySub ? 1 : 0, at + 10);
    places.writeUInt32LE(p.count, at + 12);
    places.writeUInt32LE(p.pack, at + 16);
    places.writeUInt32LE(p.toFrame, at + 20);
    places.writeUInt32LE(p.toSub, at + 24);
  });
  return { packs: packs.toString('base64'), sources, places: places.toString('base64') };
}

export function partOfPayload(o: Record<string, unknown>, what: string): TapePart {
  const packBytes = Buffer.from(textOf(o, 'packs', what), 'base64');
  const placeBytes = Buffer.from(textOf(o, 'places', what), 'base64');
  const sources = textsOf(o, 'sources', what);
  if (packBytes.length % PACK_BYTES !== 0 || placeBytes.length % PLACE_BYTES !== 0)
    throw damaged(what, 0, 'a cut off list');
  const packs: PackOnTape[] = [];
  for (let at = 0; at < packBytes.length; at += PACK_BYTES)
    packs.push({
      packId: packBytes.toString('hex', at, at + 16),
      file: packBytes.readUInt32LE(at + 16),
      record: packBytes.readUInt32LE(at + 20),
    });
  const places: PlaceOnTape[] = [];
  for (let at = 0; at < placeBytes.length; at += PLACE_BYTES) {
    const source = sources[placeBytes.readUInt32LE(at)];
    const pack = placeBytes.readUInt32LE(at + 16);
    if (source === undefined || pack >= packs.length)
      throw damaged(what, 0, 'a place outside its tables');
    places.push({
      source,
      frame: placeBytes.readUInt32LE(at + 4),
      sub: placeBytes.readUInt16LE(at + 8),
      bySub: placeBytes.readUInt16LE(at + 10) === 1,
      count: placeBytes.readUInt32LE(at + 12),
      pack,
      toFrame: placeBytes.readUInt32LE(at + 20),
      toSub: placeBytes.readUInt32LE(at + 24),
    });
  }
  return { packs, places };
}

function recordOf(v: unknown, what: string): Record<string, unknown> {
  if (typeof v !== 'object' || v === null || Array.isArray(v))
    throw damaged(what, 0, 'not a JSON object');
  return v as Record<string, unknown>;
}

function textOf(o: Record<string, unknown>, key: string, what: string): string {
  const v = o[key];
  if (typeof v !== 'string') throw new B2Error('damaged', `${what}: "${key}" is not a text`);
  return v;
}

function hexOf(o: Record<string, unknown>, key: string, what: string): string {
  const v = textOf(o, key, what);
  if (!HEX16.test(v)) throw new B2Error('damaged', `${what}: "${key}" is not an id`);
  return v;
}

function bigintOf(o: Record<string, unknown>, key: string, what: string): bigint {
  const v = textOf(o, key, what);
  if (!/^\d{1,20}$/.test(v)) throw new B2Error('damaged', `${what}: "${key}" is not a number`);
  return BigInt(v);
}

function numberOf(o: Record<string, unknown>, key: string, what: string): number {
  const v = o[key];
  const n = typeof v === 'string' && /^\d{1,16}$/.test(v) ? Number(v) : v;
  if (typeof n !== 'number' || !Number.isSafeInteger(n) || n < 0)
    throw new B2Error('damaged', `${what}: "${key}" is not a number`);
  return n;
}

function listOf(o: Record<string, unknown>, key: string, what: string): readonly unknown[] {
  const v = o[key];
  if (!Array.isArray(v)) throw new B2Error('damaged', `${what}: "${key}" is not a list`);
  return v as unknown[];
}

function textsOf(o: Record<string, unknown>, key: string, what: string): readonly string[] {
  return listOf(o, key, what).map((v) => {
    if (typeof v !== 'string') throw new B2Error('damaged', `${what}: "${key}" holds no texts`);
    return v;
  });
}
