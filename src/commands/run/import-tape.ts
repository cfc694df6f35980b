import { B2Error, ExitCode } from '../../errors.js';
import {
  formatBytes,
  formatCount,
  formatDuration,
  formatRate,
  formatTimeLocal,
  formatTimeNs,
} from '../../human.js';
import { className, PointClass } from '../../format/commit.js';
import { VolumeHistory } from '../../repo/history.js';
import { choosePoint, openBlockMap } from '../../repo/point.js';
import { openStore } from '../../repo/store-url.js';
import { Timeline } from '../../repo/timeline.js';
import { findVolume, listVolumes, type VolumeMeta } from '../../repo/volume.js';
import { restoreFromTape, type TapeRestoreResult, type TapeView } from '../../tape/import.js';
import { importRepository } from '../../tape/import-repository.js';
import type { Style } from '../../ui/style.js';
import { parseWhen } from '../../when.js';
import type { ImportTapeInput } from '../import-tape.js';
import type { CommandContext, Outcome } from '../spec.js';
import { localTime, pointRow, type PointRow } from './rows.js';
import { environmentOf } from './session.js';
import { sourceOf, withDrive, withTapeView } from './tape-session.js';

export interface CartridgeLabelRow {
  readonly label: string;
  readonly set: string;
  readonly setId: string;
  readonly number: number;
  readonly host: string;
  readonly created: string;
  readonly repository: string;
}

export interface ImportedPointRow {
  readonly volume: string;
  readonly id: string;
  readonly time: string;
  readonly class: string;
  readonly whole: boolean;
  readonly missingCartridges: readonly string[];
}

/** With `--list` there is `points`, with `--to` a `restored`, else an `imported`. */
export interface ImportTapeAnswer {
  readonly device: string;
  readonly cartridge: CartridgeLabelRow;
  readonly points?: readonly (PointRow & {
    readonly volume: string;
    readonly needs: readonly string[];
  })[];
  readonly volume?: string;
  readonly point?: PointRow;
  readonly restored?: TapeRestoreResult;
  readonly imported?: {
    readonly repository: string;
    readonly url: string;
    readonly cartridges: readonly string[];
    readonly missingCartridges: readonly string[];
    readonly packs: number;
    readonly bytes: number;
    readonly damagedPacks: readonly string[];
    readonly points: readonly ImportedPointRow[];
    readonly elapsedSeconds: number;
  };
}

export function run(
  context: CommandContext,
  input: ImportTapeInput,
): Promise<Outcome<ImportTapeAnswer>> {
  const { options } = input;
  const { device } = input.arguments;
  const only =
    options.volume !== undefined ||
    options.force ||
    options['no-verify'] ||
    options.at !== 'latest';
  if (options.to === undefined && only)
    throw new B2Error('usage', '--volume, --at, --force and --no-verify belong to --to', {
      hint: 'Name the device or file to restore to with --to, or leave them out to bring the repository back.',
    });
  return withDrive(context, device, (drive) =>
    withTapeView(context, drive, async (view, secrets) => {
      const { label } = view;
      const head = {
        device,
        cartridge: {
          label: label.label,
          set: label.setName,
          setId: label.setId,
          number: label.number,
          host: label.host,
          created: label.created,
          repository: label.repositoryId,
        },
      };
      if (options.list) return { data: { ...head, points: await listPoints(context, view) } };
      if (options.to !== undefined) {
        const volumes = await listVolumes(view.repo, quiet);
        const volume = chosenVolume(volumes, options.volume, label.label);
        const history = await VolumeHistory.open(view.repo, volume.id);
        try {
          const warn = (message: string): void => context.events({ type: 'warning', message });
          const when = parseWhen(options.at, context.clock.nowNs());
          const { commit } = await choosePoint(history, volume, when, warn);
          context.events({
            type: 'note',
            message: `point #${commit.seq} of ${volume.name}, ${formatTimeLocal(commit.instantNs)}`,
          });
          const restored = await restoreFromTape({
            drive,
            source: sourceOf(context, options),
            view,
            map: await openBlockMap(history, commit.seq),
            volumeId: volume.id,
            commit,
            needs: needsOf(view, volume.id, commit.seq),
            target: options.to,
            force: options.force,
            verify: !options['no-verify'],
            clock: context.clock,
            events: context.events,
            signal: context.signal,
          });
          return {
            data: { ...head, volume: volume.name, point: pointRow(commit), restored },
            code: restored.isWhole ? ExitCode.ok : ExitCode.partial,
          };
        } finally {
          await history.close();
        }
      }
      const store = await openStore(context.settings.repository.url, { create: true });
      try {
        const done = await importRepository({
          drive,
          source: sourceOf(context, options),
          store,
          secrets,
          env: environmentOf(context),
          view,
          clock: context.clock,
          events: context.events,
          signal: context.signal,
        });
        return {
          data: {
            ...head,
            imported: {
              repository: done.repositoryId,
              url: store.url,
              cartridges: done.cartridges,
              missingCartridges: done.missingCartridges,
              packs: done.packs,
              bytes: done.bytes,
              damagedPacks: done.damagedPacks,
              points: done.points.map((p) => ({
                volume: p.volume,
                id: `#${p.seq}`,
                time: formatTimeNs(p.instantNs),
                class: p.pointClass,
                whole: p.whole,
                missingCartridges: p.missingCartridges,
              })),
              elapsedSeconds: done.elapsedSeconds,
            },
          },
          code: done.isWhole ? ExitCode.ok : ExitCode.partial,
        };
      } finally {
        await store.close();
      }
    }),
  );
}

/** Damage of objects that one cartridge has only one copy of is told when it matters. */
const quiet = (): void => undefined;

function chosenVolume(
  volumes: readonly VolumeMeta[],
  wanted: string | undefined,
  label: string,
): VolumeMeta {
  if (wanted !== undefined) return findVolume(volumes, wanted);
  const [only, ...more] = volumes;
  if (only === undefined)
    throw new B2Error('not-found', `cartridge ${label} holds no volume that can be read`);
  if (more.length > 0)
    throw new B2Error(
      'usage',
      `cartridge ${label} holds ${volumes.length} volumes: ${volumes.map((v) => v.name).join(', ')}`,
      {
        hint: 'Name one with --volume.',
      },
    );
  return only;
}

function needsOf(view: TapeView, volumeId: string, seq: number): readonly string[] {
  const all = view.survey.record?.sessions.flatMap((s) => s.points) ?? [];
  return all.findLast((p) => p.volumeId === volumeId && p.seq === seq)?.needs ?? [];
}

async function listPoints(
  context: CommandContext,
  view: TapeView,
): Promise<NonNullable<ImportTapeAnswer['points']>> {
  const rows: (PointRow & { volume: string; needs: readonly string[] })[] = [];
  const warn = (message: string): void => context.events({ type: 'warning', message });
  for (const volume of await listVolumes(view.repo, warn)) {
    const history = await VolumeHistory.open(view.repo, volume.id);
    try {
      for await (const commit of new Timeline(history.sources).list({ minClass: PointClass.fuzzy }))
        rows.push({
          ...pointRow(commit),
          class: className(commit.pointClass),
          volume: volume.name,
          needs: needsOf(view, volume.id, commit.seq),
        });
    } finally {
      await history.close();
    }
  }
  return rows;
}

/** Ranges listed for people; `--json` has them all. */
const RANGES_SHOWN = 20;

export function text(data: ImportTapeAnswer, style: Style): string {
  const { cartridge } = data;
  const lines = [
    `${style.bold(cartridge.label)}: cartridge ${cartridge.number} of the set "${cartridge.set}", written by ${cartridge.host}, ${cartridge.created}`,
  ];
  for (const p of data.points ?? [])
    lines.push(
      `${p.volume} ${p.id}, ${localTime(p.time)} (${p.class}, ${formatBytes(p.sizeBytes)})${
        p.needs.length === 0 ? '' : `; needs ${p.needs.join(', ')} too`
      }`,
    );
  if (data.restored !== undefined) lines.push(...restoredLines(data, data.restored, style));
  const { imported } = data;
  if (imported !== undefined) {
    lines.push(
      `${style.green('imported')} repository ${imported.repository} to ${imported.url}: ${formatCount(imported.packs)} packs, ${formatBytes(imported.bytes)}, from ${imported.cartridges.join(', ')} in ${formatDuration(imported.elapsedSeconds)}`,
    );
    if (imported.missingCartridges.length > 0)
      lines.push(style.red(`not read: ${imported.missingCartridges.join(', ')}`));
    if (imported.damagedPacks.length > 0)
      lines.push(
        style.red(
          `${formatCount(imported.damagedPacks.length)} packs are damaged; "b2 verify --data all" says what that touches`,
        ),
      );
    for (const p of imported.points)
      lines.push(
        p.whole
          ? `${p.volume} ${p.id}, ${localTime(p.time)} (${p.class}): whole`
          : style.red(
              `${p.volume} ${p.id}, ${localTime(p.time)} (${p.class}): not whole${
                p.missingCartridges.length === 0
                  ? ''
                  : `, it needs ${p.missingCartridges.join(', ')}`
              }`,
            ),
      );
  }
  return lines.join('\n');
}

function restoredLines(data: ImportTapeAnswer, r: TapeRestoreResult, style: Style): string[] {
  const rate = r.elapsedSeconds > 0 ? `, ${formatRate(r.dataBytes / r.elapsedSeconds)}` : '';
  const lines = [
    `${r.isWhole ? style.green('restored') : style.yellow('restored in part')} ${data.volume ?? ''} ${data.point?.id ?? ''} to ${r.target}: ${formatBytes(r.sizeBytes)}, ${formatBytes(r.writtenBytes)} written, in ${formatDuration(r.elapsedSeconds)}${rate}; from ${r.cartridges.join(', ')}`,
    r.verified ? 'read back and compared: the same' : 'not read back (--no-verify)',
  ];
  if (r.isWhole) return lines;
  const bytes = r.missingRanges.reduce((sum, m) => sum + m.length, 0);
  lines.push(style.red(`${formatBytes(bytes)} could not be restored and are zeros now:`));
  for (const m of r.missingRanges.slice(0, RANGES_SHOWN))
    lines.push(`  bytes ${m.offset} to ${m.offset + m.length - 1}`);
  if (r.missingRanges.length > RANGES_SHOWN)
    lines.push(`  and ${r.missingRanges.length - RANGES_SHOWN} more ranges`);
  const labels = new Set(r.missingPacks.map((p) => p.cartridge ?? 'a cartridge that is not known'));
  if (labels.size > 0) lines.push(`missing: ${[...labels].join(', ')}`);
  const others = r.unreadCartridges.filter((label) => !labels.has(label));
  if (labels.size > 0 && others.length > 0)
    lines.push(`of this set, these were not read either: ${others.join(', ')}`);
  if (labels.size > 0)
    lines.push(
      'Put in another cartridge with --next-cartridge or --changer. A point whose export was interrupted may be whole on no cartridge: "b2 import-tape DEVICE --list" of the newest one says which points the set holds.',
    );
  for (const d of r.damaged.slice(0, RANGES_SHOWN)) lines.push(`  ${d.reason}`);
  return lines;
}
