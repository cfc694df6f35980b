/** The history of the volume of a `VOLUME[:PATH]`, for commands that look at files at several points. */
import { splitVolumePath } from '../../files/places.js';
import { VolumeHistory } from '../../repo/history.js';
import { findVolume, type VolumeMeta } from '../../repo/volume.js';
import type { EventSink } from '../../events.js';
import type { CommandContext } from '../spec.js';
import { volumesOf, withRepository } from './session.js';

export interface VolumePath {
  readonly volume: VolumeMeta;
  readonly history: VolumeHistory;
  /** What stood behind the volume's name. */
  readonly path: string | undefined;
}

/** Opens them; everything is closed when `fn` has ended. */
export function withVolumePath<T>(
  context: CommandContext,
  text: string,
  fn: (opened: VolumePath) => Promise<T>,
): Promise<T> {
  return withRepository(context, async (repo) => {
    const volumes = await volumesOf(context, repo);
    const split = splitVolumePath(
      text,
      volumes.map((v) => v.name),
    );
    const volume = findVolume(volumes, split.volume);
    const history = await VolumeHistory.open(repo, volume.id);
    try {
      return await fn({ volume, history, path: split.path });
    } finally {
      await history.close();
    }
  });
}

/** `events` without what was told before: each point that is opened says the same. */
export function toldOnce(events: EventSink): EventSink {
  const told = new Set<string>();
  return (event) => {
    if (event.type === 'note' || event.type === 'warning') {
      const key = `${event.type} ${event.message}`;
      if (told.has(key)) return;
      told.add(key);
    }
    events(event);
  };
}
