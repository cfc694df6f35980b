import { formatTimeNs } from '../../human.js';
import { findVolume, listSnapshots } from '../../repo/volume.js';
import { table } from '../../ui/table.js';
import type { Style } from '../../ui/style.js';
import type { SnapshotsInput } from '../snapshots.js';
import type { CommandContext, Outcome } from '../spec.js';
import { localTime } from './rows.js';
import { volumesOf, withRepository } from './session.js';

export interface SnapshotRow {
  readonly name: string;
  readonly volume: string;
  readonly volumeId: string;
  readonly id: string;
  readonly time: string;
  readonly class: string;
  readonly tags: readonly string[];
  readonly created: string;
}

export interface SnapshotsResult {
  readonly snapshots: readonly SnapshotRow[];
}

export function run(
  context: CommandContext,
  input: SnapshotsInput,
): Promise<Outcome<SnapshotsResult>> {
  return withRepository(context, async (repo) => {
    const all = await volumesOf(context, repo);
    const { volume, tag } = input.options;
    const wanted = volume === undefined ? all : [findVolume(all, volume)];
    const snapshots: SnapshotRow[] = [];
    for (const v of wanted) {
      const list = await listSnapshots(repo, v.id, (message) =>
        context.events({ type: 'warning', message }),
      );
      for (const s of list) {
        if (!tag.every((t) => s.tags.includes(t))) continue;
        snapshots.push({
          name: s.name,
          volume: v.name,
          volumeId: v.id,
          id: `#${s.seq}`,
          time: formatTimeNs(s.instantNs),
          class: s.pointClass,
          tags: s.tags,
          created: formatTimeNs(s.createdNs),
        });
      }
    }
    return { data: { snapshots } };
  });
}

export function text(data: SnapshotsResult, style: Style): string {
  return table<SnapshotRow>(
    [
      { title: 'SNAPSHOT', cell: (s) => s.name },
      { title: 'VOLUME', cell: (s) => s.volume },
      { title: 'POINT', align: 'right', cell: (s) => s.id },
      { title: 'TIME', cell: (s) => localTime(s.time) },
      { title: 'CLASS', cell: (s) => s.class },
      { title: 'TAGS', cell: (s) => s.tags.join(', ') },
    ],
    data.snapshots,
    style,
    'no snapshots',
  );
}
