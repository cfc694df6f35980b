import { ExitCode } from '../../errors.js';
import {
  formatBytes,
  formatCount,
  formatDuration,
  formatRate,
  formatTimeLocal,
} from '../../human.js';
import { VolumeHistory } from '../../repo/history.js';
import { choosePoint, openBlockMap, openImage } from '../../repo/point.js';
import { parseRepositoryUrl } from '../../repo/store-url.js';
import {
  planRestore,
  restore,
  type RestoreOptions,
  type RestorePlan,
  type RestoreResult,
  type RestoreSource,
} from '../../restore/restore.js';
import type { Style } from '../../ui/style.js';
import { parseWhen } from '../../when.js';
import type { RestoreInput } from '../restore.js';
import type { CommandContext, Outcome } from '../spec.js';
import { localTime, pointRow, type PointRow } from './rows.js';
import { volumeNamed, withRepository } from './session.js';

/** The answer of `b2 restore`: with `--plan` there is a `plan`, else a `restored`. */
export interface RestoreAnswer {
  readonly volume: string;
  readonly volumeId: string;
  readonly point: PointRow;
  readonly plan?: RestorePlan;
  readonly restored?: RestoreResult;
}

export function run(context: CommandContext, input: RestoreInput): Promise<Outcome<RestoreAnswer>> {
  const { options } = input;
  return withRepository(context, async (repo) => {
    const warn = (message: string): void => context.events({ type: 'warning', message });
    const volume = await volumeNamed(context, repo, input.arguments.volume);
    const history = await VolumeHistory.open(repo, volume.id);
    try {
      const when = parseWhen(options.at, context.clock.nowNs());
      const { commit, snapshot } = await choosePoint(history, volume, when, warn);
      const at = formatTimeLocal(commit.instantNs);
      context.events({
        type: 'note',
        message: `point #${commit.seq} of ${volume.name}, ${at}${snapshot === undefined ? '' : ` (snapshot ${snapshot.name})`}`,
      });
      const map = await openBlockMap(history, commit.seq);
      const url = parseRepositoryUrl(context.settings.repository.url);
      const source: RestoreSource = {
        handle: repo.handle(repo.store.url),
        store: repo.store,
        sizeBytes: commit.sizeBytes,
        extents: () => map.scan(),
        repositoryPath: url.scheme === 'directory' ? url.path : undefined,
        image: () => openImage(history, volume, commit.seq),
      };
      const restoreOptions: RestoreOptions = {
        target: input.arguments.target,
        format: options.format,
        force: options.force,
        grow: options.grow,
        verify: !options['no-verify'],
        full: options.full,
        skipDamaged: options['skip-damaged'],
        clock: context.clock,
        events: context.events,
        signal: context.signal,
      };
      const answer = {
        volume: volume.name,
        volumeId: volume.id,
        point: pointRow(commit, snapshot === undefined ? [] : [snapshot.name]),
      };
      if (options.plan)
        return { data: { ...answer, plan: await planRestore(source, restoreOptions) } };
      const restored = await restore(source, restoreOptions);
      return {
        data: { ...answer, restored },
        code: restored.isWhole ? ExitCode.ok : ExitCode.partial,
      };
    } finally {
      await history.close();
    }
  });
}

/** Ranges listed for people; `--json` has them all. */
const RANGES_SHOWN = 20;

export function text(data: RestoreAnswer, style: Style): string {
  const what = `${data.volume} at ${localTime(data.point.time)} (${data.point.id})`;
  if (data.plan !== undefined) return planText(what, data.plan, style);
  if (data.restored !== undefined) return restoredText(what, data.restored, style);
  return '';
}

function planText(what: string, plan: RestorePlan, style: Style): string {
  const lines = [
    `${style.bold('plan')}: ${what} → ${plan.target}`,
    plan.compared
      ? `${formatBytes(plan.differingBytes)} of ${formatBytes(plan.sizeBytes)} differ, in ${formatCount(plan.differingExtents)} places; ${formatBytes(plan.unchangedBytes)} are there already`
      : `${formatBytes(plan.differingBytes)} would be written, in ${formatCount(plan.differingExtents)} places`,
    `${formatBytes(plan.repositoryReadBytes)} would be read from the repository; about ${formatDuration(plan.estimateSeconds)}`,
  ];
  for (const reason of plan.obstacles) lines.push(style.red(`would be refused: ${reason}`));
  if (plan.contents.length > 0) {
    lines.push(style.yellow(`needs --force: ${plan.target} holds ${plan.contents.join(', ')}`));
  }
  lines.push('nothing was changed');
  return lines.join('\n');
}

function restoredText(what: string, result: RestoreResult, style: Style): string {
  const seconds = result.elapsedSeconds;
  const rate = seconds > 0 ? `, ${formatRate(result.sizeBytes / seconds)}` : '';
  const lines = [
    `${style.green('restored')} ${what} to ${result.target}: ${formatBytes(result.sizeBytes)} in ${formatDuration(seconds)}${rate}`,
  ];
  const { written } = result;
  if (written?.compared === true) {
    lines.push(
      `${formatBytes(written.writtenBytes + written.zeroedBytes)} differed and were written; ${formatBytes(written.unchangedBytes)} were there already`,
    );
  }
  if (result.allocatedBytes !== undefined) {
    lines.push(`the ${result.format} image takes ${formatBytes(result.allocatedBytes)}`);
  }
  lines.push(result.verified ? 'read back and compared: the same' : 'not read back (--no-verify)');
  for (const done of result.grown?.done ?? []) lines.push(done);
  for (const not of result.grown?.notDone ?? []) lines.push(style.yellow(not));
  const ranges = written?.damagedRanges ?? [];
  if (ranges.length > 0) {
    const bytes = ranges.reduce((sum, r) => sum + r.length, 0);
    lines.push(style.red(`${formatBytes(bytes)} could not be restored and are zeros now:`));
    for (const r of ranges.slice(0, RANGES_SHOWN)) {
      lines.push(`  bytes ${r.offset} to ${r.offset + r.length - 1}`);
    }
    if (ranges.length > RANGES_SHOWN)
      lines.push(`  and ${ranges.length - RANGES_SHOWN} more ranges`);
    for (const f of written?.damagedFrames.slice(0, RANGES_SHOWN) ?? [])
      lines.push(`  ${f.reason}`);
  }
  return lines.join('\n');
}
