import { ExitCode, isKind, messageOf } from '../../errors.js';
import { PointClass, coverageName } from '../../format/commit.js';
import { packName } from '../../format/names.js';
import {
  formatBytes,
  formatCount,
  formatDuration,
  formatPercent,
  formatRate,
  formatTimeNs,
  printable,
} from '../../human.js';
import { cataloguePath, type Catalogue } from '../../repo/catalogue.js';
import { CondemnedPlaces } from '../../repo/condemned.js';
import { VolumeHistory } from '../../repo/history.js';
import { OpenPack } from '../../repo/pack-reader.js';
import type { Repository } from '../../repo/repository.js';
import { Timeline } from '../../repo/timeline.js';
import type { VolumeMeta } from '../../repo/volume.js';
import { fields, table, type Column } from '../../ui/table.js';
import type { Style } from '../../ui/style.js';
import type { DeviceReport, WatchReport } from '../../watch/report.js';
import type { StatusInput } from '../status.js';
import type { CommandContext, Outcome } from '../spec.js';
import { withCatalogue } from './catalogue.js';
import { nagios, nagiosCode, orUnknown, type NagiosAnswer, type NagiosValue } from '../nagios.js';
import { unreadableBytesOf } from './points.js';
import { localTime } from './rows.js';
import { runningWatches, watchedVolumes, watchesOf, watchLagSeconds } from './running.js';
import { volumesOf, withRepository } from './session.js';

const DAY_NS = 86_400_000_000_000n;

/** Seconds of the last 24 hours. What is after the newest point is in none of them. */
export interface CoverageSeconds {
  readonly exact: number;
  readonly coalesced: number;
  readonly unknown: number;
}

export interface StatusRow {
  readonly id: string;
  readonly name: string;
  readonly device: string;
  readonly sizeBytes: number;
  readonly exactPoints: number;
  readonly newest?: string;
  readonly newestId?: string;
  /**
   * Age of the newest exact point; where a running watch captures the volume and knows it: age of the oldest write that no point
   * holds, 0 if there is none.
   */
  readonly lagSeconds?: number;
  /** What the running watch says of it. */
  readonly watched?: DeviceReport;
  readonly coverage: CoverageSeconds;
  /** What of the device could not be read when it was captured last: points since then are `fuzzy`. */
  readonly unreadableBytes?: number;
  /** Set where the history cannot be read. */
  readonly problem?: string;
}

export interface StatusAnswer {
  readonly repository: string;
  readonly repositoryId: string;
  readonly encryption: string;
  readonly volumes: readonly StatusRow[];
  readonly repositoryBytes: number;
  readonly packs: number;
  readonly freeBytes?: number;
  readonly totalBytes?: number;
  /** Condemned by prune and not deleted yet. */
  readonly condemnedBytes: number;
  readonly lastVerify?: {
    readonly time: string;
    readonly damage: number;
    readonly unreadable: number;
  };
  /** Every pack's data was verified by this machine since then; absent if some never was. */
  readonly dataVerifiedSince?: string;
  readonly catalogue: string;
  readonly lagging?: readonly string[];
  /** Every running watch of this user, of whatever repository. */
  readonly watches: readonly WatchReport[];
  readonly nagios?: NagiosAnswer;
}

export function run(context: CommandContext, input: StatusInput): Promise<Outcome<StatusAnswer>> {
  return orUnknown(
    input.options.nagios,
    () =>
      withRepository(context, (repo) =>
        withCatalogue(context, repo, (catalogue) => look(context, input, repo, catalogue)),
      ),
    (answer) => ({
      repository: context.settings.repository.url,
      repositoryId: '',
      encryption: '',
      volumes: [],
      repositoryBytes: 0,
      packs: 0,
      condemnedBytes: 0,
      catalogue: '',
      watches: [],
      nagios: answer,
    }),
  );
}

async function look(
  context: CommandContext,
  input: StatusInput,
  repo: Repository,
  catalogue: Catalogue | undefined,
): Promise<Outcome<StatusAnswer>> {
  const now = context.clock.nowNs();
  const running = await runningWatches(context);
  const watches = running.map((w) => w.report);
  const watched = watchedVolumes(await watchesOf(running, repo));
  const volumes: StatusRow[] = [];
  for (const v of await volumesOf(context, repo))
    volumes.push(withWatch(await statusRow(repo, v, now), watched.get(v.id)));
  const packBytes = new Map<string, number>();
  let repositoryBytes = 0;
  for await (const { name, sizeBytes } of repo.store.list('')) {
    repositoryBytes += sizeBytes;
    if (name.startsWith('packs/')) packBytes.set(name, sizeBytes);
  }
  const space = await repo.store.space();
  const last = await catalogue?.lastEvent('verify');
  const verified = await catalogue?.packs();
  const times = [...packBytes.keys()].map((name) => verified?.get(name.slice(-32))?.verifiedNs);
  const oldest = times.reduce(
    (a, b) => (a === undefined || b === undefined ? undefined : a < b ? a : b),
    times[0],
  );
  const count = (key: string): number => {
    const n = last?.content[key];
    return typeof n === 'number' ? n : 0;
  };
  const maxLag = input.options['max-lag'];
  const lagging =
    maxLag === undefined
      ? []
      : volumes.filter((v) => (v.lagSeconds ?? Number.POSITIVE_INFINITY) * 1000 > maxLag);
  const data: StatusAnswer = {
    repository: repo.store.url,
    repositoryId: repo.id,
    encryption: repo.config.encryption,
    volumes,
    repositoryBytes,
    packs: packBytes.size,
    ...(space === undefined ? {} : { freeBytes: space.freeBytes, totalBytes: space.totalBytes }),
    condemnedBytes: await condemnedBytes(repo, packBytes),
    ...(last === undefined
      ? {}
      : {
          lastVerify: {
            time: formatTimeNs(last.atNs),
            damage: count('damage'),
            unreadable: count('unreadable'),
          },
        }),
    ...(oldest === undefined ? {} : { dataVerifiedSince: formatTimeNs(oldest) }),
    catalogue: catalogue?.path ?? cataloguePath(context.settings.cacheDir, repo.id),
    ...(maxLag === undefined ? {} : { lagging: lagging.map((v) => v.name) }),
    watches,
  };
  const broken = volumes.some((v) => v.problem !== undefined);
  if (input.options.nagios) {
    const answer = nagiosOf(data, maxLag);
    return { data: { ...data, nagios: answer }, code: nagiosCode(answer.state) };
  }
  return {
    data,
    code: broken ? ExitCode.damage : lagging.length > 0 ? ExitCode.overLimit : ExitCode.ok,
  };
}

function withWatch(row: StatusRow, watched: DeviceReport | undefined): StatusRow {
  if (watched === undefined) return row;
  const lagSeconds = row.newest === undefined ? undefined : watchLagSeconds(watched);
  return { ...row, ...(lagSeconds === undefined ? {} : { lagSeconds }), watched };
}

async function statusRow(repo: Repository, v: VolumeMeta, now: bigint): Promise<StatusRow> {
  const unreadableBytes = unreadableBytesOf(v);
  const row = {
    id: v.id,
    name: v.name,
    device: v.device,
    sizeBytes: v.sizeBytes,
    ...(unreadableBytes === 0 ? {} : { unreadableBytes }),
  };
  const coverage = { exact: 0, coalesced: 0, unknown: 0 };
  let history: VolumeHistory | undefined;
  try {
    history = await VolumeHistory.open(repo, v.id);
    history.refuseGap();
    const timeline = new Timeline(history.sources);
    const newest = await timeline.latest(PointClass.crash);
    for await (const i of timeline.coverage({ sinceNs: now - DAY_NS, untilNs: now })) {
      coverage[coverageName(i.coverage)] += Number(i.toNs - i.fromNs) / 1e9;
    }
    return {
      ...row,
      exactPoints: timeline.counts.exactPoints,
      ...(newest === undefined
        ? {}
        : {
            newest: formatTimeNs(newest.instantNs),
            newestId: `#${newest.seq}`,
            lagSeconds: Math.max(0, Math.round(Number(now - newest.instantNs) / 1e6) / 1e3),
          }),
      coverage,
    };
  } catch (error) {
    if (!isKind(error, 'damaged')) throw error;
    return { ...row, exactPoints: 0, coverage, problem: messageOf(error) };
  } finally {
    await history?.close();
  }
}

async function condemnedBytes(
  repo: Repository,
  packBytes: ReadonlyMap<string, number>,
): Promise<number> {
  const places = new CondemnedPlaces(repo);
  await places.refresh();
  const whole = new Set<string>();
  const frames = new Map<string, Set<number>>();
  for (const c of places.readable()) {
    for (const id of c.packs) whole.add(id);
    for (const [id, list] of c.frames)
      frames.set(id, new Set([...(frames.get(id) ?? []), ...list]));
  }
  let bytes = 0;
  for (const id of whole) bytes += packBytes.get(packName(id)) ?? 0;
  for (const [id, numbers] of frames) {
    if (whole.has(id) || !packBytes.has(packName(id))) continue;
    try {
      const pack = await OpenPack.open(repo.packContext(), id);
      try {
        for (const n of numbers) bytes += pack.frame(n)?.storedBytes ?? 0;
      } finally {
        await pack.close();
      }
    } catch (error) {
      if (!isKind(error, 'damaged', 'not-found')) throw error; // for verify to tell
    }
  }
  return bytes;
}

function nagiosOf(a: StatusAnswer, maxLagMs: number | undefined): NagiosAnswer {
  const crit = maxLagMs === undefined ? {} : { crit: maxLagMs / 1000 };
  const values: NagiosValue[] = a.volumes.flatMap((v) =>
    v.lagSeconds === undefined
      ? []
      : [{ label: `lag_${v.name}`, value: v.lagSeconds, unit: 's' as const, ...crit }],
  );
  values.push({ label: 'size', value: a.repositoryBytes, unit: 'B' });
  if (a.freeBytes !== undefined) values.push({ label: 'free', value: a.freeBytes, unit: 'B' });
  const broken = a.volumes.filter((v) => v.problem !== undefined);
  if (broken.length > 0)
    return nagios('CRITICAL', `damaged: ${broken.map((v) => v.name).join(', ')}`, values);
  if ((a.lastVerify?.damage ?? 0) > 0)
    return nagios('CRITICAL', `the last verify found ${a.lastVerify?.damage ?? 0} damaged`, values);
  const lagging = a.lagging ?? [];
  if (lagging.length > 0)
    return nagios('CRITICAL', `no recent exact point of ${lagging.join(', ')}`, values);
  if (a.volumes.length === 0) return nagios('WARNING', 'the repository holds no volume', values);
  const most = a.volumes.reduce((n, v) => Math.max(n, v.lagSeconds ?? 0), 0);
  return nagios('OK', `${a.volumes.length} volumes, lag at most ${formatDuration(most)}`, values);
}

function coverageText(c: CoverageSeconds): string {
  const day = Number(DAY_NS) / 1e9;
  const parts = (['exact', 'coalesced', 'unknown'] as const)
    .filter((k) => c[k] > 0)
    // A first point makes a share that no digit shows: 0.0% would say that there is nothing.
    .map((k) => `${c[k] / day < 0.0005 ? '<0.1%' : formatPercent(c[k] / day)} ${k}`);
  return parts.length === 0 ? 'none' : parts.join(', ');
}

const WATCH_COLUMNS: readonly Column<DeviceReport>[] = [
  { title: 'WATCHED', cell: (d) => d.device },
  { title: 'VOLUME', cell: (d) => d.volume ?? '-' },
  {
    title: 'STATE',
    cell: (d) =>
      (d.state !== 'baseline' && d.state !== 'resync') ||
      d.scan === undefined ||
      d.scan.totalBytes === 0
        ? d.state
        : `${d.state} ${formatPercent(d.scan.doneBytes / d.scan.totalBytes)}`,
    paint: (t, d, s) =>
      d.state === 'exact'
        ? s.green(t)
        : ['failed', 'outage', 'absent'].includes(d.state)
          ? s.red(t)
          : s.yellow(t),
  },
  {
    title: 'LAG',
    align: 'right',
    cell: (d) => (d.lagMs === undefined ? '?' : formatDuration(d.lagMs / 1000)),
  },
  { title: 'WRITES', align: 'right', cell: (d) => formatRate(d.changedBytesPerSecond) },
  { title: 'STORES', align: 'right', cell: (d) => formatRate(d.storedBytesPerSecond) },
  { title: 'POINTS', align: 'right', cell: (d) => formatCount(d.points) },
  { title: 'LAST', align: 'right', cell: (d) => d.lastPoint?.id ?? '-' },
];

/** For each group: whether its devices share their points at present. */
function groupLines(w: WatchReport): readonly string[] {
  const groups = new Map(
    w.devices.flatMap((d) => (d.group === undefined ? [] : [[d.group.name, d.group]])),
  );
  return [...groups.values()].map(({ name, missing }) => {
    const devices = w.devices.filter((d) => d.group?.name === name).map((d) => d.device);
    return missing.length === 0
      ? `group ${printable(name)}: points are one instant of ${printable(devices.join(', '))}`
      : `group ${printable(name)}: apart, because ${printable(missing.join(', '))} ${missing.length === 1 ? 'takes' : 'take'} no part at present`;
  });
}

function watchText(a: StatusAnswer, style: Style): string {
  const parts: string[] = [];
  for (const w of a.watches) {
    parts.push(table(WATCH_COLUMNS, w.devices, style, 'no device'));
    const elsewhere = w.repository === a.repository ? '' : `, to ${w.repository}`;
    parts.push(
      style.dim(
        `by process ${w.pid} since ${localTime(w.since)}${elsewhere}${w.stopping ? ', stopping' : ''}`,
      ),
    );
    for (const line of groupLines(w)) parts.push(line);
    for (const d of w.devices) {
      if (d.freezes !== undefined)
        parts.push(
          `file systems of ${printable(d.device)} were frozen ${formatCount(d.freezes.count)} times, for at most ${d.freezes.longestMs.toFixed(1)} ms`,
        );
      for (const r of (d.unreadable?.ranges ?? []).slice(0, 5))
        parts.push(
          style.red(
            `${printable(d.device)} cannot be read at offset ${r.offset} (${formatBytes(r.length)}): no point is exact meanwhile`,
          ),
        );
    }
    for (const d of w.devices)
      if (d.lastProblem !== undefined)
        parts.push(
          `last problem of ${printable(d.device)}, ${localTime(d.lastProblem.time)}: ${printable(d.lastProblem.message)}`,
        );
    parts.push('');
  }
  return parts.join('\n');
}

export function text(a: StatusAnswer, style: Style): string {
  if (a.nagios !== undefined) return a.nagios.line;
  const lagging = new Set(a.lagging ?? []);
  const volumes = table<StatusRow>(
    [
      { title: 'VOLUME', cell: (v) => v.name },
      {
        title: 'POINTS',
        align: 'right',
        cell: (v) => (v.problem === undefined ? formatCount(v.exactPoints) : '?'),
      },
      {
        title: 'NEWEST',
        cell: (v) =>
          v.problem !== undefined ? 'DAMAGED' : v.newest === undefined ? '-' : localTime(v.newest),
        paint: (t, v, s) => (v.problem === undefined ? t : s.red(t)),
      },
      {
        title: 'LAG',
        align: 'right',
        cell: (v) => (v.lagSeconds === undefined ? '-' : formatDuration(v.lagSeconds)),
        paint: (t, v, s) => (lagging.has(v.name) ? s.red(t) : t),
      },
      { title: 'LAST 24 H', cell: (v) => coverageText(v.coverage) },
    ],
    a.volumes,
    style,
    'no volumes yet; "b2 snapshot DEVICE" makes the first',
  );
  const verify =
    a.lastVerify === undefined
      ? 'never by this machine'
      : `${localTime(a.lastVerify.time)}: ${a.lastVerify.damage > 0 ? `${a.lastVerify.damage} damaged` : a.lastVerify.unreadable > 0 ? `${a.lastVerify.unreadable} not readable` : 'no damage'}`;
  const rest = fields(
    [
      ['repository', `${a.repository} (${a.repositoryId.slice(0, 8)}, encryption ${a.encryption})`],
      [
        'size',
        `${formatBytes(a.repositoryBytes)} in ${formatCount(a.packs)} packs${a.freeBytes === undefined ? '' : `, ${formatBytes(a.freeBytes)} free`}`,
      ],
      ['condemned', formatBytes(a.condemnedBytes)],
      ['last verify', verify],
      [
        'all data read',
        a.dataVerifiedSince === undefined ? 'not yet' : `since ${localTime(a.dataVerifiedSince)}`,
      ],
      ['catalogue', a.catalogue],
    ],
    style,
  );
  const watches = watchText(a, style);
  const unread = a.volumes
    .filter((v) => v.unreadableBytes !== undefined)
    .map(
      (v) =>
        `\n${style.red(`${formatBytes(v.unreadableBytes ?? 0)} of the device of ${printable(v.name)} could not be read when it was captured last: points since then are fuzzy`)}`,
    )
    .join('');
  return `${volumes}${unread}\n\n${watches === '' ? '' : `${watches}\n`}${rest}`;
}
