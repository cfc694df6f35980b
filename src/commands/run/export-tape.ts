import { hostname } from 'node:os';

import { B2Error, ExitCode, isKind } from '../../errors.js';
import { MAX_RECORD_BYTES, RECORD_STEP_BYTES, isTapeLabel } from '../../format/tape.js';
import {
  formatBytes,
  formatCount,
  formatDuration,
  formatRate,
  formatTimeLocal,
  formatTimeNs,
} from '../../human.js';
import { VolumeHistory } from '../../repo/history.js';
import { choosePoint, openBlockMap } from '../../repo/point.js';
import type { Repository } from '../../repo/repository.js';
import { findVolume, listSnapshots } from '../../repo/volume.js';
import { exportTape, type CartridgeWritten } from '../../tape/export.js';
import type { ExportPoint } from '../../tape/plan.js';
import { warmPackPool } from '../../tape/pool.js';
import type { Style } from '../../ui/style.js';
import { programVersion } from '../../version.js';
import { parseWhen } from '../../when.js';
import type { ExportTapeInput } from '../export-tape.js';
import type { CommandContext, Outcome } from '../spec.js';
import { localTime } from './rows.js';
import { volumesOf, withRepository } from './session.js';
import { sourceOf, withDrive } from './tape-session.js';

const MIB = 1024 * 1024;

export interface TapePointRow {
  readonly volume: string;
  readonly id: string;
  readonly time: string;
  readonly class: string;
  readonly sizeBytes: number;
  /** Earlier cartridges that it needs besides those written now. */
  readonly needs: readonly string[];
}

export interface ExportTapeAnswer {
  readonly device: string;
  readonly set: string;
  readonly setId: string;
  readonly session: string;
  readonly points: readonly TapePointRow[];
  /** Volumes that nobody named and of which there is no such point. */
  readonly leftOut: readonly string[];
  readonly cartridges: readonly CartridgeWritten[];
  readonly chunks: number;
  readonly packs: number;
  /** Packs of the repository among them that were written as they are, and their bytes. */
  readonly copiedPacks: number;
  readonly copiedBytes: number;
  readonly bytes: number;
  readonly records: number;
  readonly recordsPerSecond: number;
  readonly underRuns: number;
  readonly writeSeconds: number;
  readonly elapsedSeconds: number;
  readonly verified: boolean;
}

export async function run(
  context: CommandContext,
  input: ExportTapeInput,
): Promise<Outcome<ExportTapeAnswer>> {
  const { options } = input;
  const { device } = input.arguments;
  const recordBytes = options['record-size'];
  if (
    recordBytes % RECORD_STEP_BYTES !== 0 ||
    recordBytes < RECORD_STEP_BYTES ||
    recordBytes > MAX_RECORD_BYTES
  )
    throw new B2Error('usage', '--record-size is a multiple of 4K, from 4K to 1M');
  const packBytes = options['pack-size'];
  if (packBytes !== undefined && (packBytes < MIB || packBytes > 256 * MIB))
    throw new B2Error('usage', '--pack-size is 1M to 256M');
  if (options.label !== undefined && !isTapeLabel(options.label))
    throw new B2Error('usage', `"${options.label}" cannot be the label of a set`, {
      hint: 'Use 1 to 56 letters, digits, "-" and "_".',
    });
  warmPackPool();
  return withRepository(context, (repo) =>
    withDrive(context, device, async (drive) => {
      const histories: VolumeHistory[] = [];
      try {
        const { points, leftOut } = await pointsOf(context, input, repo, histories);
        const done = await exportTape({
          repo,
          storeUrl: repo.store.url,
          drive,
          source: sourceOf(context, options),
          points,
          setName: options.label,
          defaultSetName: `b2-${formatTimeNs(context.clock.nowNs()).slice(0, 10)}`,
          sinceLast: options['since-last'],
          force: options.force,
          verify: !options['no-verify'],
          recordBytes,
          fixedBlocks: options['fixed-blocks'],
          dataFileBytes: options['file-size'],
          bufferBytes: options.buffer,
          packBytes,
          host: hostname(),
          program: programVersion(),
          clock: context.clock,
          events: context.events,
          signal: context.signal,
        });
        if (options.eject) await drive.eject();
        return {
          data: {
            device,
            set: done.setName,
            setId: done.setId,
            session: done.sessionId,
            points: done.points.map((p) => ({
              volume: p.volumeName,
              id: `#${p.seq}`,
              time: formatTimeNs(p.instantNs),
              class: p.pointClass,
              sizeBytes: p.sizeBytes,
              needs: p.needs,
            })),
            leftOut,
            cartridges: done.cartridges,
            chunks: done.chunks,
            packs: done.packs,
            copiedPacks: done.copiedPacks,
            copiedBytes: done.copiedBytes,
            bytes: done.bytes,
            records: done.records,
            recordsPerSecond:
              done.writeSeconds > 0 ? Math.round(done.records / done.writeSeconds) : 0,
            underRuns: done.underRuns,
            writeSeconds: done.writeSeconds,
            elapsedSeconds: done.elapsedSeconds,
            verified: !options['no-verify'] && done.isWhole,
          },
          code: !done.isWhole
            ? ExitCode.damage
            : leftOut.length > 0
              ? ExitCode.partial
              : ExitCode.ok,
        };
      } finally {
        await Promise.all(histories.map((h) => h.close()));
      }
    }),
  );
}

/**
 * The points to write. A volume that nobody named and that has no such point (a first capture that was interrupted, or only points that are
 * not exact) keeps no other from the tape: it is left out, and said. Kind `not-found` where nothing is left, or one was named.
 */
async function pointsOf(
  context: CommandContext,
  input: ExportTapeInput,
  repo: Repository,
  histories: VolumeHistory[],
): Promise<{ points: ExportPoint[]; leftOut: string[] }> {
  const { options } = input;
  const warn = (message: string): void => context.events({ type: 'warning', message });
  const known = await volumesOf(context, repo);
  const volumes =
    options.volume.length === 0 ? known : options.volume.map((text) => findVolume(known, text));
  if (volumes.length === 0)
    throw new B2Error('not-found', 'the repository holds no volume yet', {
      hint: 'Capture one first: "b2 snapshot DEVICE".',
    });
  const whens = options.at.length === 0 ? ['latest'] : options.at;
  const points: ExportPoint[] = [];
  const missing: { volume: string; error: B2Error }[] = [];
  for (const volume of volumes) {
    const history = await VolumeHistory.open(repo, volume.id);
    histories.push(history);
    const seqs = new Set<number>();
    const add = async (when: string): Promise<void> => {
      const parsed = parseWhen(when, context.clock.nowNs());
      const { commit, snapshot } = await choosePoint(history, volume, parsed, warn);
      if (seqs.has(commit.seq)) return;
      seqs.add(commit.seq);
      points.push({ volume, commit, map: await openBlockMap(history, commit.seq) });
      context.events({
        type: 'note',
        message: `point #${commit.seq} of ${volume.name}, ${formatTimeLocal(commit.instantNs)}${snapshot === undefined ? '' : ` (snapshot ${snapshot.name})`}`,
      });
    };
    for (const when of whens) {
      try {
        await add(when);
      } catch (error) {
        if (options.volume.length > 0 || !isKind(error, 'not-found')) throw error;
        missing.push({ volume: volume.name, error });
      }
    }
    if (options.snapshots)
      for (const s of await listSnapshots(repo, volume.id, warn)) await add(`#${s.seq}`);
  }
  const [first] = missing;
  if (points.length === 0 && first !== undefined) throw first.error;
  for (const { volume, error } of missing)
    context.events({
      type: 'warning',
      message: `left out: ${error.message}`,
      hint: error.hint ?? `"b2 points ${volume}" lists the points.`,
    });
  return { points, leftOut: [...new Set(missing.map((m) => m.volume))] };
}

export function text(data: ExportTapeAnswer, style: Style): string {
  const lines = data.points.map(
    (p) =>
      `${style.green('exported')} ${p.volume} ${p.id}, ${localTime(p.time)} (${p.class}, ${formatBytes(p.sizeBytes)})${
        p.needs.length === 0 ? '' : `; it also needs ${p.needs.join(', ')}`
      }`,
  );
  for (const c of data.cartridges) {
    const checked =
      c.verified === undefined
        ? 'not read back (--no-verify)'
        : c.verified
          ? 'read back and right'
          : style.red(`${formatCount(c.damagedPacks.length)} packs could not be read back`);
    lines.push(
      `${style.bold(c.label)}: files ${c.firstFile} to ${c.endFile - 1}, ${formatBytes(c.bytes)}${c.full ? ', full' : ''}; ${checked}`,
    );
  }
  const rate = data.writeSeconds > 0 ? `, ${formatRate(data.bytes / data.writeSeconds)}` : '';
  lines.push(
    `${formatCount(data.chunks)} chunks in ${formatCount(data.packs)} packs, ${formatBytes(data.bytes)} on tape in ${formatDuration(data.writeSeconds)}${rate}; ${formatCount(data.records)} records, ${formatCount(data.underRuns)} under-runs`,
  );
  return lines.join('\n');
}
