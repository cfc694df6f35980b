/** Points and snapshots as JSON has them and as tables show them. */
import { className, coverageName } from '../../format/commit.js';
import type { CommitRecord } from '../../format/segment.js';
import { BLOCK_BYTES } from '../../units.js';
import { formatBytes, formatTimeLocal, formatTimeNs } from '../../human.js';
import type { Column } from '../../ui/table.js';

/** A recovery point in `--json` output. */
export interface PointRow {
  readonly id: string;
  readonly seq: number;
  readonly time: string;
  readonly class: string;
  /** How the time since the point before is covered. */
  readonly coverage: string;
  readonly sizeBytes: number;
  readonly changedBytes: number;
  readonly storedBytes: number;
  readonly written: string;
  readonly hash: string;
  /** Names of snapshots that pin it. */
  readonly snapshots: readonly string[];
  /** `NAME@TIME` if every volume of its group has a point of that time: restored there, they are one instant. */
  readonly group?: string;
}

export function pointRow(c: CommitRecord, snapshots: readonly string[] = []): PointRow {
  return {
    id: `#${c.seq}`,
    seq: c.seq,
    time: formatTimeNs(c.instantNs),
    class: className(c.pointClass),
    coverage: coverageName(c.coverage),
    sizeBytes: c.sizeBytes,
    changedBytes: c.blocks * BLOCK_BYTES,
    storedBytes: c.storedBytes,
    written: formatTimeNs(c.writtenNs),
    hash: c.hash.toString('hex'),
    snapshots,
  };
}

/** Nanoseconds of an RFC 3339 time as formatTimeNs writes it. */
export function parseTimeNs(rfc3339: string): bigint {
  const m = /^(.*?)(?:\.(\d+))?Z$/.exec(rfc3339);
  const ms = Date.parse(`${m?.[1] ?? ''}Z`);
  return BigInt(ms) * 1_000_000n + BigInt((m?.[2] ?? '').padEnd(9, '0').slice(0, 9));
}

/** The local form of an RFC 3339 time with nanoseconds. */
export function localTime(rfc3339: string): string {
  return formatTimeLocal(parseTimeNs(rfc3339));
}

export const POINT_COLUMNS: readonly Column<PointRow>[] = [
  { title: 'ID', align: 'right', cell: (p) => p.id },
  { title: 'TIME', cell: (p) => localTime(p.time) },
  {
    title: 'CLASS',
    cell: (p) => p.class,
    paint: (text, p, style) => (p.class === 'fuzzy' ? style.yellow(text) : text),
  },
  {
    title: 'COVERAGE',
    cell: (p) => p.coverage,
    paint: (text, p, style) => (p.coverage === 'unknown' ? style.yellow(text) : text),
  },
  { title: 'CHANGED', align: 'right', cell: (p) => formatBytes(p.changedBytes) },
  { title: 'STORED', align: 'right', cell: (p) => formatBytes(p.storedBytes) },
  { title: 'SNAPSHOT', cell: (p) => p.snapshots.join(', ') },
];

/** Where a volume is of a group. */
export const GROUP_COLUMN: Column<PointRow> = { title: 'GROUP', cell: (p) => p.group ?? '-' };
