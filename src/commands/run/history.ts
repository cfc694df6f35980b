import { B2Error, ExitCode } from '../../errors.js';
import { GroupVolumes, type Companions } from '../../files/companions.js';
import { GroupedPoints, pointsAtInstants } from '../../files/history-group.js';
import { lookAt, type Look } from '../../files/history-look.js';
import { HistoryPoints } from '../../files/history-points.js';
import { findVersions, type Version, type VersionsFound } from '../../files/history.js';
import { showName } from '../../files/names.js';
import { formatBytes, formatCount, formatTimeLocal, formatTimeNs } from '../../human.js';
import { openImage } from '../../repo/point.js';
import { Timeline } from '../../repo/timeline.js';
import { listSnapshots } from '../../repo/volume.js';
import type { Style } from '../../ui/style.js';
import { table, type Column } from '../../ui/table.js';
import type { HistoryInput } from '../history.js';
import type { CommandContext, Outcome } from '../spec.js';
import { entryRow, type EntryRow } from './files-session.js';
import { modeText } from './ls.js';
import { boundOf } from './points.js';
import { localTime } from './rows.js';
import { toldOnce, withVolumePath, type VolumePath } from './volume-path.js';

/** A point, as `--at` takes it. */
export interface PointName {
  readonly id: string;
  readonly seq: number;
  readonly time: string;
}

/** A version in `--json` output. */
export interface VersionRow {
  readonly state: 'present' | 'absent' | 'unreadable';
  readonly first: PointName;
  readonly last: PointName;
  /** Points from the first to the last. */
  readonly points: number;
  /** The point before `first` is known to have another version, or there is none; for `last` likewise. */
  readonly startIsExact: boolean;
  readonly endIsExact: boolean;
  /** Of what is present. */
  readonly entry?: EntryRow;
  /** Of a regular file's content, hexadecimal. */
  readonly sha256?: string;
  /** Why it cannot be told. */
  readonly reason?: string;
}

export interface HistoryAnswer {
  readonly volume: string;
  readonly volumeId: string;
  readonly path: string;
  readonly fileSystem?: string;
  readonly backends: readonly string[];
  /** Newest first. */
  readonly versions: readonly VersionRow[];
  readonly hasOlder: boolean;
  /** Points from the oldest version on, by how they are known; `unreadable` counts those that commits are lost of. */
  readonly points: {
    readonly total: number;
    readonly looked: number;
    readonly proven: number;
    readonly inferred: number;
    readonly unknown: number;
    readonly unreadable: number;
  };
}

async function pointsOf(
  context: CommandContext,
  { history, volume }: VolumePath,
  options: HistoryInput['options'],
): Promise<HistoryPoints> {
  const sinceNs = await boundOf(context, history, volume, options.since);
  const untilNs = await boundOf(context, history, volume, options.until);
  if (sinceNs !== undefined && untilNs !== undefined && sinceNs > untilNs)
    throw new B2Error('usage', '--since is after --until');
  let only: Set<number> | undefined;
  if (options.points === 'snapshots') {
    const warn = (message: string): void => context.events({ type: 'warning', message });
    only = new Set((await listSnapshots(history.repo, volume.id, warn)).map((s) => s.seq));
  }
  const points = await HistoryPoints.open(history, { sinceNs, untilNs, only });
  if (points.unreadable > 0) {
    context.events({
      type: 'warning',
      message: `${formatCount(points.unreadable)} points of ${volume.name} cannot be read, because commits are lost; they are left out`,
      hint: 'Run "b2 repair"; "b2 verify" names what is lost.',
    });
  }
  if (points.count === 0) {
    const what = options.points === 'snapshots' ? 'snapshot' : 'exact point';
    throw new B2Error('not-found', `volume ${volume.name} has no ${what} in that time`, {
      hint: `"b2 points ${volume.name}" lists the points.`,
    });
  }
  return points;
}

/** Looks after which a person hears that it goes on. */
const TOLD_EVERY = 25;

export function run(context: CommandContext, input: HistoryInput): Promise<Outcome<HistoryAnswer>> {
  const text = input.arguments.place;
  return withVolumePath(context, text, async (opened) => {
    const { volume, history, path } = opened;
    const { options } = input;
    const { clock, settings, signal } = context;
    if (path === undefined || path === '') {
      throw new B2Error('usage', `"${text}" names no file`, {
        hint: 'b2 history VOLUME:PATH; "b2 ls VOLUME" lists the file systems.',
      });
    }
    const points = await pointsOf(context, opened, options);
    const events = toldOnce(context.events);
    const backends = new Set<string>();
    const group = new GroupVolumes(history.repo, volume, (message) =>
      events({ type: 'warning', message }),
    );
    const companionsAt = async (seq: number): Promise<Companions | undefined> => {
      const commit = await new Timeline(history.sources).bySeq(seq);
      return commit === undefined ? undefined : group.at(commit);
    };
    let looks = 0;
    const look = async (i: number): Promise<Look> => {
      const seq = points.seq(i);
      const at = `#${seq}, ${formatTimeLocal(points.instantNs(i))}`;
      events({ type: 'detail', message: `looking at point ${at}` });
      if (++looks % TOLD_EVERY === 0)
        events({ type: 'note', message: `${formatCount(looks)} points looked at so far` });
      const seen = await lookAt({
        openImage: () => openImage(history, volume, seq),
        companions: () => companionsAt(seq),
        name: `${volume.name} at ${at}`,
        path,
        backend: options.backend,
        clock,
        events,
        cacheDir: settings.cacheDir,
        signal,
      });
      for (const backend of seen.backends) backends.add(backend);
      return seen;
    };
    const grouped = new GroupedPoints(points, async (other, instants) => {
      const meta = (await group.others())[other - 1];
      if (meta === undefined) throw new RangeError(`no volume ${other} of the group`);
      return pointsAtInstants(await group.history(meta), instants);
    });
    const { limit, looks: extraLooks } = options;
    let found: VersionsFound;
    try {
      found = await findVersions({ points: grouped, look, limit, extraLooks });
    } finally {
      await group.close();
    }
    const fileSystem = found.versions.find((v) => v.look.fileSystem !== undefined)?.look.fileSystem;
    if (found.versions.every((v) => v.look.found.state === 'absent')) {
      const where = `the ${formatCount(points.count)} points of ${volume.name}`;
      throw new B2Error(
        'not-found',
        `${showName(path)} was found at none of ${where} (${formatCount(found.looked)} looked at)`,
        { hint: '"b2 ls" shows what is there; --looks all looks at every point.' },
      );
    }
    const versions = found.versions.map((v) => versionRow(points, v));
    return {
      data: {
        volume: volume.name,
        volumeId: volume.id,
        path,
        ...(fileSystem === undefined ? {} : { fileSystem }),
        backends: [...backends],
        versions,
        hasOlder: found.hasOlder,
        points: countsOf(points, found),
      },
      ...(versions.some((v) => v.state === 'unreadable') || points.unreadable > 0
        ? { code: ExitCode.partial }
        : {}),
    };
  });
}

function countsOf(points: HistoryPoints, found: VersionsFound): HistoryAnswer['points'] {
  const { looked, proven, inferred, unknown } = found;
  return { total: points.count, looked, proven, inferred, unknown, unreadable: points.unreadable };
}

function versionRow(points: HistoryPoints, v: Version): VersionRow {
  const name = (i: number): PointName => ({
    id: `#${points.seq(i)}`,
    seq: points.seq(i),
    time: formatTimeNs(points.instantNs(i)),
  });
  const { found } = v.look;
  return {
    state: found.state,
    first: name(v.first),
    last: name(v.last),
    points: v.points,
    startIsExact: v.startIsExact,
    endIsExact: v.endIsExact,
    ...(found.state === 'present' ? { entry: entryRow(found.entry) } : {}),
    ...(found.state === 'present' && found.sha256 !== undefined ? { sha256: found.sha256 } : {}),
    ...(found.state === 'unreadable' ? { reason: found.reason } : {}),
  };
}

/** Digits of the hash that tell versions apart on a screen. */
const SHOWN_DIGITS = 12;

const COLUMNS: readonly Column<VersionRow>[] = [
  { title: 'FROM', cell: (v) => `${v.startIsExact ? '' : '<='}${localTime(v.first.time)}` },
  { title: 'TO', cell: (v) => `${v.endIsExact ? '' : '>='}${localTime(v.last.time)}` },
  { title: 'ID', align: 'right', cell: (v) => v.last.id },
  { title: 'POINTS', align: 'right', cell: (v) => String(v.points) },
  { title: 'SIZE', align: 'right', cell: (v) => String(v.entry?.sizeBytes ?? '') },
  { title: 'MODIFIED', cell: (v) => (v.entry === undefined ? '' : localTime(v.entry.mtime)) },
  { title: 'OWNER', cell: (v) => (v.entry === undefined ? '' : `${v.entry.uid}:${v.entry.gid}`) },
  {
    title: 'MODE',
    cell: (v) => (v.entry === undefined ? '' : modeText(v.entry.kind, v.entry.mode)),
  },
  {
    title: 'CONTENT',
    cell: (v) =>
      v.state === 'absent'
        ? 'not there'
        : v.state === 'unreadable'
          ? `cannot be told: ${v.reason ?? ''}`
          : v.entry?.target !== undefined
            ? `-> ${showName(v.entry.target)}`
            : (v.sha256?.slice(0, SHOWN_DIGITS) ?? ''),
    paint: (text, v, style) => (v.state === 'present' ? text : style.yellow(text)),
  },
];

export function text(data: HistoryAnswer, style: Style): string {
  const { points, versions } = data;
  const counted: readonly (readonly [number, string])[] = [
    [points.looked, 'looked at'],
    [points.proven, 'proven the same by their blocks'],
    [points.inferred, 'inferred from inode and change time'],
    [points.unknown, 'not known'],
    [points.total - points.looked - points.proven - points.inferred - points.unknown, 'older'],
  ];
  const parts = counted.filter(([n]) => n > 0).map(([n, what]) => `${formatCount(n)} ${what}`);
  const lines = [
    table(COLUMNS, versions, style, ''),
    `${formatCount(points.total)} points: ${parts.join(', ')}.`,
  ];
  if (data.hasOlder) lines.push('There are older versions: --limit all.');
  const newest = versions.find((v) => v.state === 'present');
  if (newest !== undefined) {
    const size = newest.entry?.kind === 'file' ? ` (${formatBytes(newest.entry.sizeBytes)})` : '';
    lines.push(`b2 cat '${data.volume}:${showName(data.path)}' --at '${newest.last.id}'${size}`);
  }
  return lines.join('\n');
}
