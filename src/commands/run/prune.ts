import { formatBytes, formatCount } from '../../human.js';
import { prune, type PruneResult } from '../../retention/prune.js';
import type { Style } from '../../ui/style.js';
import type { PruneInput } from '../prune.js';
import type { CommandContext, Outcome } from '../spec.js';
import { withRepository } from './session.js';

export interface PruneAnswer extends PruneResult {
  readonly dryRun: boolean;
}

export function run(context: CommandContext, input: PruneInput): Promise<Outcome<PruneAnswer>> {
  const dryRun = input.options['dry-run'];
  return withRepository(context, async (repo) => {
    const result = await prune(repo, {
      graceMs: input.options.grace,
      dryRun,
      signal: context.signal,
      events: context.events,
    });
    return { data: { ...result, dryRun } };
  });
}

export function text(a: PruneAnswer, style: Style): string {
  const lines: string[] = [];
  if (!a.dryRun) {
    lines.push(
      `freed ${formatBytes(a.freedBytes)}: ${formatCount(a.packsDeleted)} packs deleted, ${formatCount(a.packsCompacted)} rewritten`,
    );
  }
  lines.push(
    `${a.dryRun ? style.yellow('would condemn') : 'condemned'} ${formatBytes(a.condemnedBytes)} (${formatCount(a.condemnedPacks)} packs, ${formatCount(a.condemnedFrames)} frames)${a.dryRun ? '' : ': a run after the grace time frees it'}`,
    `${formatBytes(a.waitingBytes)} unused, but too young or not worth it yet; ${formatBytes(a.totalBytes)} in packs`,
  );
  return lines.join('\n');
}
