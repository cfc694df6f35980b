import { B2Error, ExitCode } from '../../errors.js';
import { formatBytes, formatCount, formatDuration, formatTimeNs } from '../../human.js';
import type { Catalogue } from '../../repo/catalogue.js';
import { VolumeHistory } from '../../repo/history.js';
import { choosePoint, openBlockMap, openImage } from '../../repo/point.js';
import type { Repository } from '../../repo/repository.js';
import { findVolume } from '../../repo/volume.js';
import type { Style } from '../../ui/style.js';
import type { AgainstResult } from '../../verify/against.js';
import type { Finding } from '../../verify/findings.js';
import { warmVerify } from '../../verify/data.js';
import { verify, type PointRef, type VerifyReport } from '../../verify/verify.js';
import type { DeviceReport } from '../../watch/report.js';
import { parseWhen } from '../../when.js';
import type { VerifyInput } from '../verify.js';
import type { CommandContext, Outcome } from '../spec.js';
import { withCatalogue } from './catalogue.js';
import { nagios, nagiosCode, orUnknown, type NagiosAnswer, type NagiosValue } from '../nagios.js';
import { localTime, pointRow, type PointRow } from './rows.js';
import { runningWatches, watchedVolumes, watchesOf, watchLagSeconds } from './running.js';
import { volumesOf, withRepository } from './session.js';
import type { RestoreTest } from './verify-restore.js';

export interface VerifiedVolume {
  readonly id: string;
  readonly name: string;
  readonly commits: number;
  readonly damagedPoints: number;
  /** The newest exact point. */
  readonly newest?: { readonly id: string; readonly time: string };
  /** The newest exact point in which nothing is wrong. */
  readonly newestWhole?: { readonly id: string; readonly time: string };
  /** See {@link lagFrom}. */
  readonly lagSeconds?: number;
  /**
   * `watch`: of a running watch whose newest point is whole, age of the oldest write that no point holds; 0 if there is none.
   * `point`: age of the newest whole exact point.
   */
  readonly lagFrom?: 'watch' | 'point';
}

export interface VerifyAnswer {
  readonly damage: number;
  readonly unreadable: number;
  readonly findings: readonly Finding[];
  readonly volumes: readonly VerifiedVolume[];
  readonly objects: number;
  readonly packs: number;
  readonly packBytes: number;
  readonly data?: {
    readonly packs: number;
    readonly frames: number;
    readonly chunks: number;
    readonly storedBytes: number;
    /** Packs that are left for the next run. */
    readonly leftPacks: number;
    /** Every pack was verified since then. */
    readonly allSince?: string;
  };
  readonly against?: AgainstResult & {
    readonly device: string;
    readonly volume: string;
    readonly point: PointRow;
  };
  /** With --fsck and --boot. */
  readonly restoreTests?: readonly RestoreTest[];
  /** Volumes with a lag above --max-lag, or without a whole exact point. */
  readonly lagging?: readonly string[];
  readonly elapsedSeconds: number;
  readonly nagios?: NagiosAnswer;
}

const EMPTY = {
  damage: 0,
  unreadable: 0,
  findings: [],
  volumes: [],
  objects: 0,
  packs: 0,
  packBytes: 0,
  elapsedSeconds: 0,
};

/** An option that would have no effect: who gives it believes that something was checked which was not. Kind `usage`. */
function refuseIdle(options: VerifyInput['options']): void {
  const { fsck, boot, against, at, data, budget } = options;
  const idle = (option: string, needs: string): B2Error =>
    new B2Error('usage', `${option} is for ${needs}, and without has no effect`, {
      hint: 'What is checked without them is all points of the volume alike.',
    });
  if (at !== 'latest' && !fsck && !boot && against === undefined)
    throw idle('--at', '--fsck, --boot or --against');
  if (options['random-point'] && !fsck && !boot) throw idle('--random-point', '--fsck or --boot');
  if (data === 0 && budget !== undefined)
    throw new B2Error('usage', '--budget limits the reading of data, and --data none reads none', {
      hint: 'Leave one of the two out: --budget alone reads as much as it has time for.',
    });
}

export function run(context: CommandContext, input: VerifyInput): Promise<Outcome<VerifyAnswer>> {
  const { data, budget, nagios: forNagios } = input.options;
  if ((data ?? 0) > 0 || budget !== undefined) warmVerify();
  return orUnknown(
    forNagios,
    () => {
      refuseIdle(input.options);
      return withRepository(context, (repo) =>
        withCatalogue(context, repo, (catalogue) => check(context, input, repo, catalogue)),
      );
    },
    (answer) => ({ ...EMPTY, nagios: answer }),
  );
}

async function check(
  context: CommandContext,
  input: VerifyInput,
  repo: Repository,
  catalogue: Catalogue | undefined,
): Promise<Outcome<VerifyAnswer>> {
  const { options } = input;
  const startedNs = context.clock.monotonicNs();
  const known = await volumesOf(context, repo);
  const wanted = input.arguments.volume.map((text) => findVolume(known, text));
  const against = options.against === undefined ? undefined : await compare(context, input, repo);
  const report = await verify(repo, {
    volumeIds: wanted.length === 0 ? undefined : wanted.map((v) => v.id),
    dataShare: options.data ?? (options.budget === undefined ? 0 : 1),
    budgetMs: options.budget,
    catalogue,
    storeUrl: repo.store.url,
    signal: context.signal,
    events: context.events,
  });
  const restored =
    options.fsck || options.boot
      ? await (
          await import('./verify-restore.js')
        ).restoreTests(context, input, repo, wanted.length === 0 ? known : wanted, known)
      : undefined;
  const findings = [...report.findings, ...(restored?.findings ?? [])];
  const watched = watchedVolumes(await watchesOf(await runningWatches(context), repo));
  const now = context.clock.nowNs();
  const volumes = report.volumes.map((v): VerifiedVolume => ({
    id: v.volumeId,
    name: v.name,
    commits: v.commits,
    damagedPoints: v.damagedPoints,
    ...(v.newest === undefined ? {} : { newest: pointOf(v.newest) }),
    ...(v.newestWhole === undefined
      ? {}
      : {
          newestWhole: pointOf(v.newestWhole),
          ...lagOf(v.newestWhole, v.newest, watched.get(v.volumeId), now),
        }),
  }));
  const maxLag = options['max-lag'];
  const lagging =
    maxLag === undefined
      ? []
      : volumes.filter((v) => (v.lagSeconds ?? Number.POSITIVE_INFINITY) * 1000 > maxLag);
  const differs =
    against !== undefined &&
    (against.differingBytes > 0 ||
      against.imageBytes > against.deviceBytes ||
      against.unreadable.some((u) => u.damaged));
  const damage = findings.filter((f) => f.severity === 'damage').length + (differs ? 1 : 0);
  const unreadable =
    findings.filter((f) => f.severity === 'unreadable').length +
    (against?.unreadable.filter((u) => !u.damaged).length ?? 0);
  const data: VerifyAnswer = {
    damage,
    unreadable,
    findings,
    volumes,
    objects: report.objects,
    packs: report.packs,
    packBytes: report.packBytes,
    ...dataOf(report),
    ...(against === undefined ? {} : { against }),
    ...(restored === undefined ? {} : { restoreTests: restored.tests }),
    ...(maxLag === undefined ? {} : { lagging: lagging.map((v) => v.name) }),
    elapsedSeconds: Number(context.clock.monotonicNs() - startedNs) / 1e9,
  };
  await catalogue?.recordEvent({
    kind: 'verify',
    content: { damage, unreadable, dataPacks: report.data?.packs ?? 0, volumes: wanted.length },
  });
  if (options.nagios) {
    const answer = nagiosOf(data, maxLag);
    return { data: { ...data, nagios: answer }, code: nagiosCode(answer.state) };
  }
  const code =
    damage > 0
      ? ExitCode.damage
      : unreadable > 0
        ? ExitCode.partial
        : lagging.length > 0
          ? ExitCode.overLimit
          : ExitCode.ok;
  return { data, code };
}

/** A watch whose newest point is damaged is no proof that a restore would lose nothing. */
function lagOf(
  whole: PointRef,
  newest: PointRef | undefined,
  watched: DeviceReport | undefined,
  nowNs: bigint,
): Required<Pick<VerifiedVolume, 'lagSeconds' | 'lagFrom'>> {
  const lagSeconds = newest?.seq === whole.seq ? watchLagSeconds(watched) : undefined;
  return lagSeconds === undefined
    ? { lagSeconds: secondsBetween(whole.instantNs, nowNs), lagFrom: 'point' }
    : { lagSeconds, lagFrom: 'watch' };
}

function pointOf(p: PointRef): { id: string; time: string } {
  return { id: `#${p.seq}`, time: formatTimeNs(p.instantNs) };
}

function secondsBetween(from: bigint, to: bigint): number {
  return Math.max(0, Math.round(Number(to - from) / 1e6) / 1e3);
}

function dataOf(report: VerifyReport): Pick<VerifyAnswer, 'data'> {
  if (report.data === undefined) return {};
  const { oldestNs, ...rest } = report.data;
  return {
    data: { ...rest, ...(oldestNs === undefined ? {} : { allSince: formatTimeNs(oldestNs) }) },
  };
}

async function compare(
  context: CommandContext,
  input: VerifyInput,
  repo: Repository,
): Promise<NonNullable<VerifyAnswer['against']>> {
  const { options } = input;
  const [text, ...more] = input.arguments.volume;
  const volumes = await volumesOf(context, repo);
  if (
    options.against === undefined ||
    more.length > 0 ||
    (text === undefined && volumes.length !== 1)
  ) {
    throw new B2Error('usage', '--against compares one volume with one device', {
      hint: 'Name the volume: b2 verify VOLUME --against DEVICE.',
    });
  }
  const volume = text === undefined ? volumes[0] : findVolume(volumes, text);
  if (volume === undefined) throw new B2Error('not-found', 'the repository holds no volume yet');
  const history = await VolumeHistory.open(repo, volume.id);
  try {
    const { commit, snapshot } = await choosePoint(
      history,
      volume,
      parseWhen(options.at, context.clock.nowNs()),
      (message) => context.events({ type: 'warning', message }),
    );
    const { openReadDevice } = await import('../../devices/open.js');
    const { compareWithDevice } = await import('../../verify/against.js');
    const device = await openReadDevice(options.against);
    try {
      const result = await compareWithDevice({
        repo,
        map: await openBlockMap(history, commit.seq),
        image: await openImage(history, volume, commit.seq),
        device,
        clock: context.clock,
        events: context.events,
        signal: context.signal,
      });
      return {
        ...result,
        device: options.against,
        volume: volume.name,
        point: pointRow(commit, snapshot === undefined ? [] : [snapshot.name]),
      };
    } finally {
      await device.close();
    }
  } finally {
    await history.close();
  }
}

function nagiosOf(a: VerifyAnswer, maxLagMs: number | undefined): NagiosAnswer {
  const crit = maxLagMs === undefined ? {} : { crit: maxLagMs / 1000 };
  const values: NagiosValue[] = [
    { label: 'damage', value: a.damage, crit: 0 },
    { label: 'unreadable', value: a.unreadable, warn: 0 },
    ...a.volumes.flatMap((v) =>
      v.lagSeconds === undefined
        ? []
        : [{ label: `lag_${v.name}`, value: v.lagSeconds, unit: 's' as const, ...crit }],
    ),
    { label: 'read', value: a.data?.storedBytes ?? 0, unit: 'B' },
  ];
  const first =
    a.findings.find((f) => f.severity === 'damage') ??
    a.findings.find((f) => f.severity === 'unreadable');
  if (a.damage > 0)
    return nagios(
      'CRITICAL',
      `${a.damage} damaged: ${first === undefined ? 'the device differs' : `${first.object}: ${first.message}`}`,
      values,
    );
  const lagging = a.lagging ?? [];
  if (lagging.length > 0)
    return nagios('CRITICAL', `no recent whole point of ${lagging.join(', ')}`, values);
  if (a.unreadable > 0)
    return nagios(
      'WARNING',
      `${a.unreadable} not readable: ${first === undefined ? 'the device' : `${first.object}: ${first.message}`}`,
      values,
    );
  const read =
    a.data === undefined
      ? 'structure and chain'
      : `structure, chain and ${formatBytes(a.data.storedBytes)} of data`;
  return nagios(
    'OK',
    `${a.volumes.length} volumes, ${formatCount(a.packs)} packs: ${read} verified`,
    values,
  );
}

function findingLines(f: Finding, style: Style): string[] {
  const mark =
    f.severity === 'damage'
      ? style.red('damaged   ')
      : f.severity === 'unreadable'
        ? style.yellow('unreadable')
        : style.dim('note      ');
  const lines = [`${mark}  ${f.object}: ${f.message}`];
  const frames = (f.frames ?? []).filter((p) => p.offsetBytes !== undefined);
  if (frames.length > 0) {
    const shown = frames
      .slice(0, 5)
      .map(
        (p) =>
          `frame ${p.number} at byte ${p.offsetBytes}${p.lengthBytes === undefined ? '' : ` (${formatBytes(p.lengthBytes)})`}`,
      );
    lines.push(
      `            ${shown.join(', ')}${frames.length > 5 ? ` and ${frames.length - 5} more` : ''}`,
    );
  }
  for (const t of f.touches ?? []) {
    const points =
      t.points === 1
        ? `point #${t.firstSeq}`
        : `${formatCount(t.points)} points from #${t.firstSeq} to #${t.lastSeq}`;
    const shown = t.ranges.slice(0, 4).map((r) => `${r.offset}+${r.length}`);
    const where =
      t.bytes === 0
        ? ''
        : `, ${formatBytes(t.bytes)} of the device at ${shown.join(', ')}${t.ranges.length > 4 ? ', …' : ''}`;
    lines.push(`            ${t.name}: ${points}${where}`);
  }
  if (f.severity !== 'note' && f.touches?.length === 0)
    lines.push('            no recovery point needs it');
  if (f.severity !== 'note' && f.hint !== undefined) lines.push(`            ${style.dim(f.hint)}`);
  return lines;
}

export function text(a: VerifyAnswer, style: Style): string {
  if (a.nagios !== undefined) return a.nagios.line;
  const lines = a.findings.flatMap((f) => findingLines(f, style));
  for (const v of a.volumes) {
    const whole =
      v.newestWhole === undefined
        ? style.red('no whole exact point')
        : `newest whole point ${v.newestWhole.id}, ${localTime(v.newestWhole.time)}`;
    const bad =
      v.damagedPoints === 0 ? '' : style.red(`, ${formatCount(v.damagedPoints)} points damaged`);
    const lag =
      v.lagFrom === 'watch' && v.lagSeconds !== undefined
        ? `, lag ${formatDuration(v.lagSeconds)} by its running watch`
        : '';
    lines.push(`${v.name}: ${formatCount(v.commits)} commits, ${whole}${lag}${bad}`);
  }
  const { against } = a;
  if (against !== undefined) {
    const what = `${against.device} and ${against.volume} at point ${against.point.id}`;
    if (against.imageBytes !== against.deviceBytes) {
      lines.push(
        `${what} differ in size: ${formatBytes(against.deviceBytes)} and ${formatBytes(against.imageBytes)}`,
      );
    }
    for (const r of against.ranges) lines.push(`${style.red('differs')}  ${r.offset}+${r.length}`);
    for (const u of against.unreadable)
      lines.push(`${style.yellow('unreadable')}  ${u.offset}+${u.length}: ${u.reason}`);
    lines.push(
      against.differingBytes === 0
        ? `${what}: nothing differs in ${formatBytes(against.comparedBytes)}`
        : `${what}: ${formatBytes(against.differingBytes)} of ${formatBytes(against.comparedBytes)} differ`,
    );
  }
  lines.push(...restoreLines(a.restoreTests ?? [], style));
  for (const name of a.lagging ?? [])
    lines.push(
      `${style.red('lagging')}  ${name}${lagText(a.volumes.find((v) => v.name === name))}`,
    );
  const read =
    a.data === undefined
      ? 'the data were not read'
      : `${formatCount(a.data.chunks)} chunks in ${formatBytes(a.data.storedBytes)} of data read${a.data.leftPacks > 0 ? `, ${formatCount(a.data.leftPacks)} packs left for the next run` : ''}`;
  const verdict =
    a.damage > 0
      ? style.red('damage found')
      : a.unreadable > 0
        ? style.yellow('not everything could be read')
        : style.green('no damage');
  lines.push(
    `${verdict}: ${formatCount(a.objects)} objects, ${formatCount(a.packs)} packs (${formatBytes(a.packBytes)}), ${read}, in ${formatDuration(a.elapsedSeconds)}`,
  );
  return lines.join('\n');
}

function lagText(v: VerifiedVolume | undefined): string {
  if (v?.lagSeconds === undefined) return ': no whole exact point';
  const age = formatDuration(v.lagSeconds);
  return v.lagFrom === 'watch'
    ? `: its watch is ${age} behind`
    : `: no running watch captures it, and its newest whole point is ${age} old`;
}

function restoreLines(tests: readonly RestoreTest[], style: Style): readonly string[] {
  return tests.flatMap(({ volume, point, fileSystems, boot }) => {
    const of = `${volume} at ${point.id}`;
    const lines = (fileSystems ?? []).map((check) => {
      const state =
        check.state === 'sound'
          ? style.green('sound')
          : check.state === 'faulty'
            ? style.red('faulty')
            : style.yellow('unchecked');
      return `${of}: ${check.name} (${check.type}) ${state}: ${check.how ?? check.message ?? ''}`;
    });
    if (fileSystems?.length === 0) lines.push(`${of}: there is no file system to check`);
    if (boot !== undefined) {
      const others = boot.disks.slice(1).map((d) => ` with ${d.volume} at ${d.point.id}`);
      lines.push(
        boot.ok
          ? `${of}${others.join(',')}: ${style.green('starts')}, ${boot.seconds.toFixed(1)} s (${boot.accelerator})`
          : `${of}${others.join(',')}: ${style.red('does not start')}: ${boot.why ?? ''}`,
      );
    }
    return lines;
  });
}
