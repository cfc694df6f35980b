/** Names of a repository's objects (FORMAT.md section 1). */

export const CONFIG_NAME = 'config';
export const CONFIG_COPY_NAME = 'config.copy';

const hex = (n: number, digits: number): string => n.toString(16).padStart(digits, '0');

export function packName(packId: string): string {
  return `packs/${packId.slice(0, 2)}/${packId}`;
}

const PACK = /^packs\/([0-9a-f]{2})\/([0-9a-f]{32})$/;

/** The id in a pack's name, or undefined if it is not one. */
export function packIdOf(name: string): string | undefined {
  const m = PACK.exec(name);
  return m !== null && m[2]?.startsWith(m[1] ?? '?') === true ? m[2] : undefined;
}

export function volumeMetaName(volumeId: string): string {
  return `volumes/${volumeId}/meta`;
}

export function epochName(volumeId: string, epoch: number): string {
  return `volumes/${volumeId}/epochs/${hex(epoch, 8)}`;
}

export function journalName(volumeId: string, packId: string): string {
  return `volumes/${volumeId}/journal/${packId}`;
}

export function snapshotName(volumeId: string, nameHash: string): string {
  return `volumes/${volumeId}/snapshots/${nameHash}`;
}

export function condemnedName(id: string): string {
  return `condemned/${id}`;
}

export function quarantineName(id: string): string {
  return `quarantine/${id}`;
}

/** Commits of a volume that repair found to be lost. */
export function lostName(volumeId: string, firstSeq: number, lastSeq: number): string {
  return `volumes/${volumeId}/lost/${hex(firstSeq, 16)}-${hex(lastSeq, 16)}`;
}

const LOST = /^volumes\/([0-9a-f]{32})\/lost\/([0-9a-f]{16})-([0-9a-f]{16})$/;

/** Undefined if `name` is not that of such an object. */
export function parseLostName(
  name: string,
): { readonly volumeId: string; readonly firstSeq: number; readonly lastSeq: number } | undefined {
  const m = LOST.exec(name);
  if (m === null) return undefined;
  const firstSeq = Number.parseInt(m[2] ?? '', 16);
  const lastSeq = Number.parseInt(m[3] ?? '', 16);
  if (!Number.isSafeInteger(firstSeq) || !Number.isSafeInteger(lastSeq) || firstSeq > lastSeq)
    return undefined;
  return { volumeId: m[1] ?? '', firstSeq, lastSeq };
}

/** What a segment's name says. `level` is undefined for a full map. */
export interface SegmentName {
  readonly volumeId: string;
  readonly level: number | undefined;
  readonly firstSeq: number;
  readonly lastSeq: number;
}

export function segmentName(s: SegmentName): string {
  const level = s.level === undefined ? 'full' : hex(s.level, 2);
  return `volumes/${s.volumeId}/manifest/${level}-${hex(s.firstSeq, 16)}-${hex(s.lastSeq, 16)}`;
}

const SEGMENT =
  /^volumes\/([0-9a-f]{32})\/manifest\/(full|[0-9a-f]{2})-([0-9a-f]{16})-([0-9a-f]{16})$/;

/** Undefined if `name` is not a segment's. */
export function parseSegmentName(name: string): SegmentName | undefined {
  const m = SEGMENT.exec(name);
  if (m === null) return undefined;
  const firstSeq = Number.parseInt(m[3] ?? '', 16);
  const lastSeq = Number.parseInt(m[4] ?? '', 16);
  if (!Number.isSafeInteger(firstSeq) || !Number.isSafeInteger(lastSeq) || firstSeq > lastSeq)
    return undefined;
  return {
    volumeId: m[1] ?? '',
    level: m[2] === 'full' ? undefined : Number.parseInt(m[2] ?? '', 16),
    firstSeq,
    lastSeq,
  };
}
