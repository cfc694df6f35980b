import { existsSync } from 'node:fs';
import { hostname } from 'node:os';
import { dedupeCacheFile, takeSnapshot } from '../../capture/snapshot.js';
import { B2Error, ExitCode, isKind } from '../../errors.js';
import { className } from '../../format/commit.js';
import { formatBytes, formatDuration, formatRate, formatTimeNs } from '../../human.js';
import type { Repository } from '../../repo/repository.js';
import type { ByteRange } from '../../devices/device.js';
import type { Style } from '../../ui/style.js';
import type { SnapshotInput } from '../snapshot.js';
import type { CommandContext, Outcome } from '../spec.js';
import { withCatalogue } from './catalogue.js';
import { localTime } from './rows.js';
import { volumeNamed, withRepository } from './session.js';

export interface SnapshotAnswer {
  readonly volume: string;
  readonly volumeId: string;
  readonly isNewVolume: boolean;
  readonly id: string;
  readonly name: string;
  readonly time: string;
  readonly class: string;
  readonly hash: string;
  readonly sizeBytes: number;
  readonly readBytes: number;
  readonly changedBytes: number;
  readonly zeroBytes: number;
  readonly duplicateBytes: number;
  readonly newBytes: number;
  readonly storedBytes: number;
  readonly elapsedSeconds: number;
  readonly unreadable: readonly ByteRange[];
  /** Why the point is not exact. */
  readonly notExact?: string;
}

/** The device that the argument means, and the volume if it was named by that. */
async function deviceOf(
  context: CommandContext,
  repo: Repository,
  text: string,
): Promise<{ device: string; volume?: string }> {
  if (existsSync(text)) return { device: text };
  try {
    const volume = await volumeNamed(context, repo, text);
    if (volume.host !== hostname()) {
      throw new B2Error(
        'refused',
        `volume ${volume.name} is captured by host ${volume.host}, not by this one`,
        {
          hint: `Run the command there, or name the device.`,
        },
      );
    }
    return { device: volume.device, volume: volume.name };
  } catch (error) {
    if (!isKind(error, 'not-found')) throw error;
    throw new B2Error(
      'not-found',
      `there is no device or file ${text}, and no volume of that name`,
      {
        hint: 'lsblk lists the block devices of this machine, "b2 volumes" the volumes.',
      },
    );
  }
}

export function run(
  context: CommandContext,
  input: SnapshotInput,
): Promise<Outcome<SnapshotAnswer>> {
  return withRepository(context, async (repo) => {
    const { options } = input;
    const { device, volume } = await deviceOf(context, repo, input.arguments.device);
    const r = await takeSnapshot(repo, {
      device,
      volume: options.volume ?? volume,
      name: options.name,
      tags: options.tag,
      skipUnreadable: options['skip-unreadable'],
      takeOver: options['take-over'],
      host: hostname(),
      dedupeCacheFile: dedupeCacheFile(context.settings.cacheDir, repo.id),
      workers: 2,
      storeUrl: repo.store.url,
      signal: context.signal,
      events: context.events,
    });
    // What this machine has seen acknowledged: by this verify notices a repository that was put back to an earlier state.
    await withCatalogue(context, repo, async (catalogue) => {
      await catalogue?.recordTip({
        volumeId: r.volume.id,
        name: r.volume.name,
        seq: r.point.seq,
        hash: r.point.hash.toString('hex'),
        instantNs: r.point.instantNs,
      });
    });
    if (r.notExact !== undefined) {
      context.events({
        type: 'warning',
        message: `the point is not exact: ${r.notExact}`,
        hint: 'Capture it while nothing writes to it, or capture an LVM snapshot of it.',
      });
    }
    return {
      data: {
        volume: r.volume.name,
        volumeId: r.volume.id,
        isNewVolume: r.isNewVolume,
        id: `#${r.point.seq}`,
        name: r.name,
        time: formatTimeNs(r.point.instantNs),
        class: className(r.pointClass),
        hash: r.point.hash.toString('hex'),
        sizeBytes: r.sizeBytes,
        readBytes: r.readBytes,
        changedBytes: r.changedBytes,
        zeroBytes: r.zeroBytes,
        duplicateBytes: r.duplicateBytes,
        newBytes: r.newBytes,
        storedBytes: r.storedBytes,
        elapsedSeconds: r.elapsedSeconds,
        unreadable: r.unreadable,
        ...(r.notExact === undefined ? {} : { notExact: r.notExact }),
      },
      ...(r.notExact === undefined ? {} : { code: ExitCode.partial }),
    };
  });
}

export function text(a: SnapshotAnswer, style: Style): string {
  const rate = a.elapsedSeconds > 0 ? `, ${formatRate(a.sizeBytes / a.elapsedSeconds)}` : '';
  const state =
    a.notExact === undefined ? style.green('captured') : style.yellow('captured, not exact');
  return [
    `${state} ${a.volume} as "${a.name}": point ${a.id}, class ${a.class}, ${localTime(a.time)}`,
    `${formatBytes(a.sizeBytes)} in ${formatDuration(a.elapsedSeconds)}${rate}: ${formatBytes(a.changedBytes)} changed, ${formatBytes(a.newBytes)} new, ${formatBytes(a.storedBytes)} stored`,
  ].join('\n');
}
