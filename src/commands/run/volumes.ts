import { PointClass } from '../../format/commit.js';
import { isKind, messageOf } from '../../errors.js';
import { formatBytes, formatCount, formatTimeNs } from '../../human.js';
import { VolumeHistory } from '../../repo/history.js';
import { Timeline } from '../../repo/timeline.js';
import type { VolumeMeta } from '../../repo/volume.js';
import type { Repository } from '../../repo/repository.js';
import { table } from '../../ui/table.js';
import type { Style } from '../../ui/style.js';
import type { VolumesInput } from '../volumes.js';
import type { CommandContext, Outcome } from '../spec.js';
import { localTime } from './rows.js';
import { volumesOf, withRepository } from './session.js';

export interface VolumeRow {
  readonly id: string;
  readonly name: string;
  readonly host: string;
  readonly device: string;
  readonly sizeBytes: number;
  readonly created: string;
  readonly commits: number;
  readonly exactPoints: number;
  readonly oldest?: string;
  /** The newest exact point. */
  readonly newest?: string;
  readonly newestId?: string;
  /** Set where the history cannot be read. */
  readonly problem?: string;
}

export interface VolumesResult {
  readonly volumes: readonly VolumeRow[];
}

export async function volumeRow(repo: Repository, v: VolumeMeta): Promise<VolumeRow> {
  const row = {
    id: v.id,
    name: v.name,
    host: v.host,
    device: v.device,
    sizeBytes: v.sizeBytes,
    created: formatTimeNs(v.createdNs),
  };
  let history: VolumeHistory | undefined;
  try {
    history = await VolumeHistory.open(repo, v.id);
    history.refuseGap();
    const timeline = new Timeline(history.sources);
    const { commits, exactPoints } = timeline.counts;
    const first = await timeline.first();
    const last = await timeline.latest(PointClass.crash);
    return {
      ...row,
      commits,
      exactPoints,
      ...(first === undefined ? {} : { oldest: formatTimeNs(first.instantNs) }),
      ...(last === undefined
        ? {}
        : { newest: formatTimeNs(last.instantNs), newestId: `#${last.seq}` }),
    };
  } catch (error) {
    if (!isKind(error, 'damaged')) throw error;
    return { ...row, commits: 0, exactPoints: 0, problem: messageOf(error) };
  } finally {
    await history?.close();
  }
}

export function run(
  context: CommandContext,
  _input: VolumesInput,
): Promise<Outcome<VolumesResult>> {
  return withRepository(context, async (repo) => {
    const volumes: VolumeRow[] = [];
    for (const v of await volumesOf(context, repo)) {
      const row = await volumeRow(repo, v);
      if (row.problem !== undefined) {
        context.events({
          type: 'warning',
          message: `volume ${v.name}: ${row.problem}`,
          hint: 'Run "b2 verify".',
        });
      }
      volumes.push(row);
    }
    return { data: { volumes } };
  });
}

export function text(data: VolumesResult, style: Style): string {
  return table<VolumeRow>(
    [
      { title: 'VOLUME', cell: (v) => v.name },
      { title: 'ID', cell: (v) => v.id.slice(0, 8) },
      { title: 'SIZE', align: 'right', cell: (v) => formatBytes(v.sizeBytes) },
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
      { title: 'DEVICE', cell: (v) => v.device },
    ],
    data.volumes,
    style,
    'no volumes yet; "b2 snapshot DEVICE" makes the first',
  );
}
