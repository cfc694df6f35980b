/** The watches that run now, for commands that ask them. */
import type { BigIntStats } from 'node:fs';
import { stat } from 'node:fs/promises';
import { parseRepositoryUrl } from '../../repo/store-url.js';
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

/**
 * The watches among `watches` that capture to this very repository. A copy of it (from tape, or made by rsync) has the same id, and gets
 * nothing from a watch of the original. Where it cannot be told whether both are one place, they are taken for one.
 */
export async function watchesOf(
  watches: readonly RunningWatch[],
  repo: { readonly id: string; readonly store: { readonly url: string } },
): Promise<readonly RunningWatch[]> {
  const own: RunningWatch[] = [];
  for (const watch of watches) {
    const { repositoryId, repository } = watch.report;
    if (repositoryId === repo.id && !(await areApart(repository, repo.store.url))) own.push(watch);
  }
  return own;
}

/** Both are directories that can be seen from here, and not the same one, however they are spelled. */
async function areApart(a: string, b: string): Promise<boolean> {
  const [one, other] = await Promise.all([directoryOf(a), directoryOf(b)]);
  return (
    one !== undefined && other !== undefined && !(one.dev === other.dev && one.ino === other.ino)
  );
}

/** A relative path in the report of a watch is relative to its own directory: it says nothing here. */
async function directoryOf(url: string): Promise<BigIntStats | undefined> {
  if (!url.startsWith('/') && !url.toLowerCase().startsWith('file:')) return undefined;
  try {
    const place = parseRepositoryUrl(url);
    return place.scheme === 'directory' ? await stat(place.path, { bigint: true }) : undefined;
  } catch {
    return undefined;
  }
}

/** The devices of these watches by the id of their volume. */
export function watchedVolumes(
  watches: readonly RunningWatch[],
): ReadonlyMap<string, DeviceReport> {
  return new Map(
    watches.flatMap((w) =>
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
