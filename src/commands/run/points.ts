import { groupPointId } from '../../capture/group.js';
import { B2Error } from '../../errors.js';
import { PointClass } from '../../format/commit.js';
import { formatBytes, formatTimeNs } from '../../human.js';
import { choosePoint } from '../../repo/point.js';
import { groupOf } from '../../repo/point-set.js';
import { VolumeHistory } from '../../repo/history.js';
import type { Repository } from '../../repo/repository.js';
import { Timeline } from '../../repo/timeline.js';
import { listSnapshots, type VolumeMeta } from '../../repo/volume.js';
import { parseWhen } from '../../when.js';
import { table } from '../../ui/table.js';
import type { Style } from '../../ui/style.js';
import type { PointsInput } from '../points.js';
import type { CommandContext, Outcome } from '../spec.js';
import { GROUP_COLUMN, parseTimeNs, POINT_COLUMNS, pointRow, type PointRow } from './rows.js';
import { volumeNamed, volumesOf, withRepository } from './session.js';

export interface PointsResult {
  readonly volume: string;
  readonly volumeId: string;
  /** The group that it makes points with, and the other volumes of it. */
  readonly group?: { readonly name: string; readonly volumes: readonly string[] };
  readonly points: readonly PointRow[];
  /** What of the device could not be read when it was captured last: points since then are `fuzzy`. */
  readonly unreadableBytes?: number;
}

/** Bytes of a volume's device that cannot be read, as its watch has left word. */
export function unreadableBytesOf(volume: VolumeMeta): number {
  const said = volume.facts['unreadable'];
  if (typeof said !== 'object' || said === null || !('bytes' in said)) return 0;
  return typeof said.bytes === 'number' ? said.bytes : 0;
}

interface Other {
  readonly name: string;
  /** Of its points, as {@link PointRow.time}. */
  readonly times: ReadonlySet<string>;
}

/** The other volumes of the group that `volume` is of, with their points in the time of `points`; undefined if it is of none. */
async function sharedWith(
  context: CommandContext,
  repo: Repository,
  volume: VolumeMeta,
  points: readonly PointRow[],
): Promise<{ readonly name: string; readonly others: readonly Other[] } | undefined> {
  const group = groupOf(volume, await volumesOf(context, repo));
  if (group === undefined) return undefined;
  const instants = points.map((p) => parseTimeNs(p.time));
  const sinceNs = instants.reduce((a, b) => (a < b ? a : b), instants[0] ?? 0n);
  const untilNs = instants.reduce((a, b) => (a > b ? a : b), instants[0] ?? 0n);
  const others: Other[] = [];
  for (const other of group.others) {
    const times = new Set<string>();
    const history = await VolumeHistory.open(repo, other.id);
    try {
      if (history.chain.gap === undefined)
        for await (const c of new Timeline(history.sources).list({ sinceNs, untilNs }))
          times.add(formatTimeNs(c.instantNs));
    } finally {
      await history.close();
    }
    others.push({ name: other.name, times });
  }
  return others.length === 0 ? undefined : { name: group.name, others };
}

/** The instant that a bound (`--since`, `--until`) means: a time, or that of a named point. */
export async function boundOf(
  context: CommandContext,
  history: VolumeHistory,
  volume: VolumeMeta,
  text: string | undefined,
): Promise<bigint | undefined> {
  if (text === undefined) return undefined;
  const when = parseWhen(text, context.clock.nowNs());
  if (when.kind === 'instant') return when.ns;
  const { commit } = await choosePoint(history, volume, when, (message) =>
    context.events({ type: 'warning', message }),
  );
  return commit.instantNs;
}

export function run(context: CommandContext, input: PointsInput): Promise<Outcome<PointsResult>> {
  return withRepository(context, async (repo) => {
    const volume = await volumeNamed(context, repo, input.arguments.volume);
    const history = await VolumeHistory.open(repo, volume.id);
    try {
      history.refuseGap();
      const { options } = input;
      const names = new Map<number, string[]>();
      const warn = (message: string): void => context.events({ type: 'warning', message });
      for (const s of await listSnapshots(repo, volume.id, warn)) {
        names.set(s.seq, [...(names.get(s.seq) ?? []), s.name]);
      }
      const sinceNs = await boundOf(context, history, volume, options.since);
      const untilNs = await boundOf(context, history, volume, options.until);
      if (sinceNs !== undefined && untilNs !== undefined && sinceNs > untilNs) {
        throw new B2Error('usage', '--since is after --until');
      }
      const points: PointRow[] = [];
      const newestFirst = options.last !== undefined;
      const timeline = new Timeline(history.sources);
      const minClass = options.all ? PointClass.none : PointClass.crash;
      for await (const c of timeline.list({ sinceNs, untilNs, minClass, newestFirst })) {
        points.push(pointRow(c, names.get(c.seq)));
        if (options.last !== undefined && points.length >= options.last) break;
      }
      if (newestFirst) points.reverse();
      const bytes = unreadableBytesOf(volume);
      const unreadable = bytes === 0 ? {} : { unreadableBytes: bytes };
      const group = await sharedWith(context, repo, volume, points);
      if (group !== undefined) {
        const { name, others } = group;
        return {
          data: {
            volume: volume.name,
            volumeId: volume.id,
            ...unreadable,
            group: { name, volumes: others.map((o) => o.name) },
            points: points.map((p) =>
              others.every((o) => o.times.has(p.time))
                ? { ...p, group: groupPointId(name, p.time) }
                : p,
            ),
          },
        };
      }
      return { data: { volume: volume.name, volumeId: volume.id, ...unreadable, points } };
    } finally {
      await history.close();
    }
  });
}

export function text(data: PointsResult, style: Style): string {
  const shown = table<PointRow>(
    data.group === undefined ? POINT_COLUMNS : [...POINT_COLUMNS, GROUP_COLUMN],
    data.points,
    style,
    `no point of ${data.volume} that is exact and in that time; --all shows those that are not exact, too`,
  );
  if (data.unreadableBytes === undefined) return shown;
  return `${shown}\n${style.yellow(`${formatBytes(data.unreadableBytes)} of the device could not be read when it was captured last: points since then are fuzzy ("b2 points --all" lists them)`)}`;
}
