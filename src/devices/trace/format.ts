/**
 * The kernel's own description of its trace records: `events/SYSTEM/EVENT/format` and `events/header_page`
 * (Documentation/trace/events.rst). Offsets differ between kernels (the width of `rwbs` between 6.1 and 6.12), so they are
 * read, never assumed. Pure text in, numbers out.
 */
import { B2Error } from '../../errors.js';

/** One field of a record. */
export interface TraceField {
  readonly offset: number;
  readonly sizeBytes: number;
}

/** A record's layout. */
export interface EventFormat {
  readonly name: string;
  /** The number in `common_type` that says a record is one of these. */
  readonly id: number;
  readonly fields: ReadonlyMap<string, TraceField>;
}

const FIELD = /^\s*field:\s*(.+?);\s*offset:\s*(\d+);\s*size:\s*(\d+);/gm;

function fieldsOf(text: string): Map<string, TraceField> {
  const fields = new Map<string, TraceField>();
  for (const [, declaration = '', offset = '', size = ''] of text.matchAll(FIELD)) {
    // `char rwbs[8]`, `sector_t sector`, `__data_loc char[] cmd`: the name is the last word, without its bounds.
    const name = /(\w+)(?:\[\w*\])?$/.exec(declaration.trim())?.[1];
    if (name !== undefined) fields.set(name, { offset: Number(offset), sizeBytes: Number(size) });
  }
  return fields;
}

function strange(what: string, why: string): B2Error {
  return new B2Error('unsupported', `${what}: ${why}`, {
    hint: 'This kernel describes its trace events in a way that b2 does not know; use --source scan and report it.',
  });
}

/** Parses a `format` file; `what` names it in errors (kind `unsupported`). */
export function parseEventFormat(text: string, what: string): EventFormat {
  const name = /^name:\s*(\S+)\s*$/m.exec(text)?.[1];
  const id = /^ID:\s*(\d+)\s*$/m.exec(text)?.[1];
  if (name === undefined || id === undefined || Number(id) > 0xffff)
    throw strange(what, 'it has no name or no usable ID');
  return { name, id: Number(id), fields: fieldsOf(text) };
}

/** Where a block event has what is needed of it. Offsets from the start of the record. */
export interface BlockEventLayout {
  readonly id: number;
  readonly devAt: number;
  readonly sectorAt: number;
  readonly sectorsAt: number;
  readonly rwbsAt: number;
  readonly rwbsBytes: number;
  /** A record is at least this long. */
  readonly minBytes: number;
}

/** The layout of a block event (`block_bio_queue`, `block_rq_complete`, `block_bio_complete`). Kind `unsupported`. */
export function blockEventLayout(format: EventFormat, what: string): BlockEventLayout {
  const need = (name: string, ...sizes: readonly number[]): TraceField => {
    const field = format.fields.get(name);
    if (field === undefined) throw strange(what, `there is no field ${name}`);
    if (sizes.length > 0 && !sizes.includes(field.sizeBytes))
      throw strange(what, `field ${name} has ${field.sizeBytes} bytes`);
    return field;
  };
  const type = need('common_type', 2);
  if (type.offset !== 0) throw strange(what, 'common_type is not at the start');
  const dev = need('dev', 4);
  const sector = need('sector', 8);
  const sectors = need('nr_sector', 4);
  const rwbs = need('rwbs');
  if (rwbs.sizeBytes < 1 || rwbs.sizeBytes > 64)
    throw strange(what, `field rwbs has ${rwbs.sizeBytes} bytes`);
  return {
    id: format.id,
    devAt: dev.offset,
    sectorAt: sector.offset,
    sectorsAt: sectors.offset,
    rwbsAt: rwbs.offset,
    rwbsBytes: rwbs.sizeBytes,
    minBytes: Math.max(
      ...[dev, sector, sectors, rwbs].map((field) => field.offset + field.sizeBytes),
    ),
  };
}

/** Layout of a page of the ring buffer. */
export interface PageLayout {
  /** Of the word with length and flags. */
  readonly commitAt: number;
  /** Of the first record. */
  readonly dataAt: number;
  /** Bytes of a whole page, unless the instance has another size. */
  readonly pageBytes: number;
}

/** Parses `events/header_page`; kind `unsupported` if it is not as b2 knows it. */
export function parseHeaderPage(text: string, what: string): PageLayout {
  const fields = fieldsOf(text);
  const stamp = fields.get('timestamp');
  const commit = fields.get('commit');
  const data = fields.get('data');
  if (stamp?.offset !== 0 || stamp.sizeBytes !== 8)
    throw strange(what, 'the page does not start with a time of 8 bytes');
  if (commit === undefined || data === undefined || commit.offset !== 8)
    throw strange(what, 'there is no field commit or data');
  if (data.offset !== commit.offset + commit.sizeBytes)
    throw strange(what, 'the data do not follow the length');
  return { commitAt: commit.offset, dataAt: data.offset, pageBytes: data.offset + data.sizeBytes };
}
