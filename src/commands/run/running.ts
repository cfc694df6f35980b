/** The watches that run now, for commands that ask them. */
import { controlDirectory, findWatches, type RunningWatch } from '../../watch/control.js';
import type { DeviceReport } from '../../watch/report.js';
import type { CommandContext } from '../spec.js';

/** An answer that needs no disk comes at once; a watch that is stopped or hangs must not hold up who asks. */
const ANSWER_MS = 5_000;

/** Every running watch of this user. What does not answer becomes a warning. */
export function runningWatches(context: CommandContext): Promise<readonly RunningWatch[]> {
  const uid = process.geteuid?.() ?? 0;
  return findWatches({
    directory: controlDirectory(context.env, uid),
    uid,
    timeoutMs: ANSWER_MS,
    warn: (message) => context.events({ type: 'warning', message }),
  });
}

/** The watched devices of a repository among `watches`, by the id of their volume. */
export function watchedVolumes(
  watches: readonly RunningWatch[],
  repositoryId: string,
): ReadonlyMap<string, DeviceReport> {
  return new Map(
    watches
      .filter((w) => w.report.repositoryId === repositoryId)
      .flatMap((w) =>
        w.report.devices.flatMap((d) => (d.volumeId === undefined ? [] : [[d.volumeId, d]])),
      ),
  );
}

/**
 * Age of the oldest write that no point holds, 0 if there is none, as the watch knows it; undefined where it does not, or does not
 * capture at present. A volume that nobody writes to has no new points, and lags nevertheless not at all: only its watch can tell.
 */
export function watchLagSeconds(watched: DeviceReport | undefined): number | undefined {
  const isCurrent = watched?.state === 'exact' || watched?.state === 'coalescing';
  return isCurrent && watched.lagMs !== undefined ? watched.lagMs / 1000 : undefined;
}
