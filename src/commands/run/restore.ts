import { B2Error, ExitCode, messageOf } from '../../errors.js';
import { showName } from '../../files/names.js';
import { describeFileSystems } from '../../files/places.js';
import type { RestoredTree } from '../../files/restore-tree.js';
import {
  formatBytes,
  formatCount,
  formatDuration,
  formatRate,
  formatTimeLocal,
} from '../../human.js';
import { VolumeHistory } from '../../repo/history.js';
import { allowReadAhead, choosePoint, openBlockMap, openImage } from '../../repo/point.js';
import { parseRepositoryUrl } from '../../repo/store-url.js';
import {
  planRestore,
  restore,
  type RestoreOptions,
  type RestorePlan,
  type RestoreResult,
  type RestoreSource,
} from '../../restore/restore.js';
import { warmRestore } from '../../restore/pool.js';
import type { Style } from '../../ui/style.js';
import { parseWhen } from '../../when.js';
import type { RestoreInput } from '../restore.js';
import type { CommandContext, Outcome } from '../spec.js';
import { localTime, pointRow, type PointRow } from './rows.js';
import { volumeNamed, withRepository } from './session.js';

/** The answer of `b2 restore`: with `--plan` there is a `plan`, with `--path` a `tree`, else a `restored`. */
export interface RestoreAnswer {
  readonly volume: string;
  readonly volumeId: string;
  readonly point: PointRow;
  readonly plan?: RestorePlan;
  readonly restored?: RestoreResult;
  /** With `--path`. */
  readonly tree?: RestoredTree & { readonly path: string; readonly backend: string };
}

export function run(context: CommandContext, input: RestoreInput): Promise<Outcome<RestoreAnswer>> {
  const { options } = input;
  if (options.path !== undefined) return runPath(context, input, options.path);
  if (options.format === 'raw') warmRestore();
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
        image: () => {
          // qemu-img reads from its start to its end, twice.
          allowReadAhead(repo, repo.store.url, (error) =>
            warn(`reading ahead has ended: ${messageOf(error)}`),
          );
          return openImage(history, volume, commit.seq);
        },
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

async function runPath(
  context: CommandContext,
  { arguments: { volume: name, target }, options }: RestoreInput,
  path: string,
): Promise<Outcome<RestoreAnswer>> {
  const others = ['plan', 'grow', 'no-verify', 'full', 'skip-damaged'] as const;
  const other = options.format === 'raw' ? others.find((option) => options[option]) : 'format';
  if (other !== undefined)
    throw new B2Error('usage', `--${other} is for whole volumes: leave it out with --path`);
  // What reads the file systems inside is a fifth of the program: only who needs it waits for it.
  const { withFiles } = await import('./files-session.js');
  const { restoreTree } = await import('../../files/restore-tree.js');
  return withFiles(
    context,
    name,
    options,
    async ({ access, volume, commit, snapshot, ...rest }) => {
      if (rest.path !== undefined)
        throw new B2Error('usage', `"${name}": give the path with --path only`);
      const place = await access.place(path);
      if (place === undefined) {
        throw new B2Error('usage', `"${path}" names no file system of ${volume.name}`, {
          hint: `It has ${describeFileSystems(access.fileSystems)}: for all of one, --path ${access.fileSystems[0]?.name ?? 'p1'}:/`,
        });
      }
      const { random, events, signal } = context;
      const tree = await restoreTree({
        access,
        place,
        target,
        force: options.force,
        random,
        events,
        signal,
      });
      const isWhole = tree.damaged.length === 0 && tree.notMade.length === 0;
      return {
        data: {
          volume: volume.name,
          volumeId: volume.id,
          point: pointRow(commit, snapshot === undefined ? [] : [snapshot.name]),
          tree: { ...tree, path: place.path, backend: access.used.join(', ') },
        },
        code: isWhole ? ExitCode.ok : ExitCode.partial,
      };
    },
  );
}

/** Ranges listed for people; `--json` has them all. */
const RANGES_SHOWN = 20;

export function text(data: RestoreAnswer, style: Style): string {
  const what = `${data.volume} at ${localTime(data.point.time)} (${data.point.id})`;
  if (data.plan !== undefined) return planText(what, data.plan, style);
  if (data.restored !== undefined) return restoredText(what, data.restored, style);
  if (data.tree !== undefined) return treeText(what, data.tree, style);
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

function treeText(what: string, tree: NonNullable<RestoreAnswer['tree']>, style: Style): string {
  const lines = [
    `${style.green('restored')} ${showName(tree.path)} of ${what} to ${tree.target}: ${formatCount(tree.files)} files (${formatBytes(tree.bytes)}), ${formatCount(tree.directories)} directories, ${formatCount(tree.others)} others`,
  ];
  if (tree.replaced > 0) lines.push(`${formatCount(tree.replaced)} files were replaced`);
  if (!tree.owners)
    lines.push(style.yellow('not root: everything belongs to you, not to its owner'));
  if (tree.damaged.length > 0) {
    lines.push(
      style.red(`${formatCount(tree.damaged.length)} could not be read and are not there:`),
    );
    for (const { path, reason } of tree.damaged.slice(0, RANGES_SHOWN))
      lines.push(`  ${showName(path)}: ${reason}`);
    if (tree.damaged.length > RANGES_SHOWN)
      lines.push(`  and ${tree.damaged.length - RANGES_SHOWN} more`);
  }
  if (tree.notMade.length > 0)
    lines.push(
      style.yellow(
        `${formatCount(tree.notMade.length)} attributes or special files could not be made here`,
      ),
    );
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
