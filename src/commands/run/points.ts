import { B2Error } from '../../errors.js';
import { PointClass } from '../../format/commit.js';
import { choosePoint } from '../../repo/point.js';
import { VolumeHistory } from '../../repo/history.js';
import { Timeline } from '../../repo/timeline.js';
import { listSnapshots, type VolumeMeta } from '../../repo/volume.js';
import { parseWhen } from '../../when.js';
import { table } from '../../ui/table.js';
import type { Style } from '../../ui/style.js';
import type { PointsInput } from '../points.js';
import type { CommandContext, Outcome } from '../spec.js';
import { POINT_COLUMNS, pointRow, type PointRow } from './rows.js';
import { volumeNamed, withRepository } from './session.js';

export interface PointsResult {
  readonly volume: string;
  readonly volumeId: string;
  readonly points: readonly PointRow[];
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
      return { data: { volume: volume.name, volumeId: volume.id, points } };
    } finally {
      await history.close();
    }
  });
}

export function text(data: PointsResult, style: Style): string {
  return table<PointRow>(
    POINT_COLUMNS,
    data.points,
    style,
    `no points of ${data.volume} in that time`,
  );
}
