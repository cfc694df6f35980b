import { ExitCode, isKind } from '../../errors.js';
import { formatBytes, formatCount, formatDuration } from '../../human.js';
import { listCartridges, putCartridge } from '../../tape/catalogue.js';
import { warmPackPool } from '../../tape/pool.js';
import { verifyTape, type TapeFinding, type TapeVerifyResult } from '../../tape/verify.js';
import type { Style } from '../../ui/style.js';
import type { CommandContext, Outcome } from '../spec.js';
import type { TapeVerifyInput } from '../tape-verify.js';
import { openRepository } from './session.js';
import { withDrive, withTapeView } from './tape-session.js';

export interface TapeVerifyAnswer {
  readonly device: string;
  readonly label: string;
  readonly set: string;
  readonly repository: string;
  readonly damage: number;
  readonly findings: readonly TapeFinding[];
  readonly files: number;
  readonly packs: number;
  readonly chunks: number;
  readonly points: number;
  readonly bytes: number;
  /** True: it is known what should be on the cartridge, and all of it was looked for. */
  readonly complete: boolean;
  /** The repository remembers the result. */
  readonly recorded: boolean;
  readonly elapsedSeconds: number;
}

export function run(
  context: CommandContext,
  input: TapeVerifyInput,
): Promise<Outcome<TapeVerifyAnswer>> {
  const { device } = input.arguments;
  warmPackPool();
  return withDrive(context, device, (drive) =>
    withTapeView(context, drive, async (view) => {
      const done = await verifyTape({
        drive,
        view,
        clock: context.clock,
        events: context.events,
        signal: context.signal,
      });
      const recorded = await remember(context, done);
      const data: TapeVerifyAnswer = {
        device,
        label: done.label.label,
        set: done.label.setName,
        repository: done.label.repositoryId,
        damage: done.findings.length,
        findings: done.findings,
        files: done.files,
        packs: done.packs,
        chunks: done.chunks,
        points: done.points,
        bytes: done.bytes,
        complete: done.complete,
        recorded,
        elapsedSeconds: done.elapsedSeconds,
      };
      return { data, code: done.findings.length > 0 ? ExitCode.damage : ExitCode.ok };
    }),
  );
}

/** Notes the result with the cartridge in the repository of the settings, if that is the one. */
async function remember(context: CommandContext, done: TapeVerifyResult): Promise<boolean> {
  let repo: Awaited<ReturnType<typeof openRepository>>;
  try {
    repo = await openRepository(context);
  } catch (error) {
    if (isKind(error, 'no-repository', 'wrong-key', 'not-found', 'io')) return false;
    throw error;
  }
  try {
    if (repo.id !== done.label.repositoryId) return false;
    const warn = (message: string): void => context.events({ type: 'warning', message });
    const known = (await listCartridges(repo, warn)).find(
      (c) => c.tape.cartridgeId === done.label.cartridgeId,
    );
    if (known === undefined) return false;
    const damagedPacks = done.damagedPacks;
    const verifiedNs = damagedPacks.length === 0 ? context.clock.nowNs() : 0n;
    await putCartridge(repo, {
      ...known,
      // Damage is noted with every session: which of them a pack belongs to makes no difference.
      sessions: known.sessions.map((s) => ({ ...s, verifiedNs, damagedPacks })),
    });
    return true;
  } finally {
    await repo.close();
  }
}

export function text(a: TapeVerifyAnswer, style: Style): string {
  const lines = a.findings.flatMap((f) => {
    const where = [
      ...(f.file === undefined ? [] : [`file ${f.file}`]),
      ...(f.record === undefined ? [] : [`record ${f.record}`]),
    ].join(', ');
    const mark =
      f.kind === 'missing'
        ? style.red('missing')
        : f.kind === 'pack'
          ? style.red('damaged')
          : style.yellow('record ');
    return [
      `${mark}  ${where}: ${f.message}`,
      ...(f.points.length === 0 ? [] : [`         needed by ${f.points.join(', ')}`]),
    ];
  });
  const verdict = a.damage === 0 ? style.green('no damage') : style.red('damage found');
  lines.push(
    `${verdict} on ${a.label}: ${formatCount(a.files)} files, ${formatCount(a.packs)} whole packs, ${formatCount(a.chunks)} chunks, ${formatBytes(a.bytes)} read in ${formatDuration(a.elapsedSeconds)}`,
  );
  if (!a.complete)
    lines.push(
      style.yellow('its contents could not be read: whether something is missing is not known'),
    );
  return lines.join('\n');
}
