/** Names in the mounted tree: of volumes, snapshots, days, hours and points. Pure. */
import { MAX_NAME_BYTES } from './protocol.js';

const DAY_NS = 86_400_000_000_000n;
const HOUR_NS = 3_600_000_000_000n;
const SECOND_NS = 1_000_000_000n;

/** Nanoseconds [fromNs, toNs] that a directory stands for. */
export interface Span {
  readonly fromNs: bigint;
  readonly toNs: bigint;
}

/** `2026-11-22`, in UTC. */
export function dayName(ns: bigint): string {
  return new Date(Number(ns / 1_000_000n)).toISOString().split('T')[0] ?? '';
}

/** The day of a name, or undefined where it is none. */
export function daySpan(name: string): Span | undefined {
  if (!/^\d{4,6}-\d\d-\d\d$/.test(name)) return undefined;
  const ms = Date.parse(`${name}T00:00:00Z`);
  if (Number.isNaN(ms) || ms < 0) return undefined;
  const fromNs = BigInt(ms) * 1_000_000n;
  // "2026-02-31" parses in some engines; only the name that we would give counts.
  return dayName(fromNs) === name ? { fromNs, toNs: fromNs + DAY_NS - 1n } : undefined;
}

/** The day that `ns` lies in. */
export function dayOf(ns: bigint): Span {
  const fromNs = ns - (ns % DAY_NS);
  return { fromNs, toNs: fromNs + DAY_NS - 1n };
}

/** Hour `00` to `23` of a day. */
export function hourSpan(day: Span, name: string): Span | undefined {
  if (!/^([01]\d|2[0-3])$/.test(name)) return undefined;
  const fromNs = day.fromNs + BigInt(name) * HOUR_NS;
  return { fromNs, toNs: fromNs + HOUR_NS - 1n };
}

/** `15-04-05.123456789Z-#12`: the time of day in UTC without colons, which break tools, and the id of the point. */
export function pointName(instantNs: bigint, seq: number): string {
  const inDay = instantNs % DAY_NS;
  const two = (n: bigint): string => String(n).padStart(2, '0');
  const hours = two(inDay / HOUR_NS);
  const minutes = two((inDay % HOUR_NS) / (60n * SECOND_NS));
  const seconds = two((inDay / SECOND_NS) % 60n);
  const fraction = String(inDay % SECOND_NS).padStart(9, '0');
  return `${hours}-${minutes}-${seconds}.${fraction}Z-#${seq}`;
}

/** The point id at the end of a point's name; undefined where the text is no such name. */
export function seqOfPointName(name: string): number | undefined {
  const m = /^\d\d-\d\d-\d\d\.\d{9}Z-#([1-9]\d{0,15})$/.exec(name);
  const seq = Number(m?.[1]);
  return Number.isSafeInteger(seq) ? seq : undefined;
}

/**
 * A name as one file name: `:`, `%`, `/` and control characters as %XX, nothing that is `.` or `..`, at most 255 bytes (a longer
 * one is cut and ends with `~` and `tag`, which makes it unique).
 */
export function fileName(name: string, tag: string): string {
  const escaped = name
    .replace(
      /[\u0000-\u001f\u007f%:/]/g,
      (c) => `%${c.charCodeAt(0).toString(16).toUpperCase().padStart(2, '0')}`,
    )
    .replace(/^\.{1,2}$/, (dots) => dots.replaceAll('.', '%2E'));
  if (escaped !== '' && Buffer.byteLength(escaped) <= MAX_NAME_BYTES) return escaped;
  const ending = `~${tag}`;
  let cut = escaped;
  while (Buffer.byteLength(cut) + Buffer.byteLength(ending) > MAX_NAME_BYTES)
    cut = [...cut].slice(0, -1).join('');
  return cut + ending;
}

/** What a volume's own directory holds: no part of a longer volume name may take it. */
const RESERVED: ReadonlySet<string> = new Set(['latest', 'snapshots', 'points']);

/** Path of each volume in the tree, parts from the top: `host/sda` is two. Volumes that would share one get `~ID` behind it. */
export function volumePaths(
  volumes: readonly { readonly id: string; readonly name: string }[],
): readonly (readonly string[])[] {
  const taken = new Set<string>();
  return volumes.map(({ id, name }) => {
    const tag = id.slice(0, 8);
    const parts = name
      .split('/')
      .filter((part) => part !== '')
      .map((part, i) => (i > 0 && RESERVED.has(part) ? `${part}~` : fileName(part, tag)));
    if (parts.length === 0) parts.push(`~${tag}`);
    const last = parts.pop() ?? '';
    for (const ending of ['', `~${tag}`, `~${id}`]) {
      const path = [...parts, last + ending];
      const key = path.join('/');
      if (taken.has(key)) continue;
      taken.add(key);
      return path;
    }
    return [...parts, id];
  });
}
