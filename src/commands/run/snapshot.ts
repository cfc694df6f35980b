import { existsSync } from 'node:fs';
import { realpath } from 'node:fs/promises';
import { hostname } from 'node:os';
import { warmScan } from '../../capture/scan.js';
import { dedupeCacheFile, freeName, takeSnapshot } from '../../capture/snapshot.js';
import { B2Error, ExitCode, isKind } from '../../errors.js';
import { className } from '../../format/commit.js';
import { formatBytes, formatDuration, formatRate, formatTimeNs } from '../../human.js';
import type { Repository } from '../../repo/repository.js';
import type { ByteRange } from '../../devices/device.js';
import type { Style } from '../../ui/style.js';
import { BLOCK_BYTES } from '../../units.js';
import { askPoint } from '../../watch/control.js';
import type { DeviceReport } from '../../watch/report.js';
import type { SnapshotInput } from '../snapshot.js';
import type { CommandContext, Outcome } from '../spec.js';
import { withCatalogue } from './catalogue.js';
import { localTime, parseTimeNs } from './rows.js';
import { volumeNamed, withRepository } from './session.js';
import { runningWatches, watchesOf } from './running.js';

/** Threads of the scan. */
const WORKERS = 2;

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
  /** Made by the running watch; then the details of a capture of its own are absent. */
  readonly watched: boolean;
  readonly readBytes?: number;
  readonly changedBytes: number;
  readonly zeroBytes?: number;
  readonly duplicateBytes?: number;
  readonly newBytes?: number;
  readonly storedBytes: number;
  readonly elapsedSeconds: number;
  readonly unreadable: readonly ByteRange[];
  /** Why the point is not exact. */
  readonly notExact?: string;
  /** Of a watched device of a group: the points of the same instant of the other volumes, and the devices that have none. */
  readonly group?: {
    readonly name: string;
    readonly missing: readonly string[];
    readonly others: readonly {
      readonly volume: string;
      readonly volumeId: string;
      readonly device: string;
      readonly id: string;
      readonly time: string;
      readonly class: string;
      readonly hash: string;
    }[];
  };
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
  warmScan(WORKERS);
  return withRepository(context, async (repo) => {
    const { options } = input;
    const running = await findRunning(context, repo, input);
    if (running !== undefined) return throughWatch(context, repo, input, running);
    const { device, volume } = await deviceOf(context, repo, input.arguments.device);
    if (options.class === 'fs' || options.class === 'app')
      throw new B2Error(
        'unsupported',
        `no running watch captures ${device}: a point of class ${options.class} cannot be had`,
        { hint: 'Start "b2 watch" for the device, or leave --class out.' },
      );
    const r = await takeSnapshot(repo, {
      device,
      volume: options.volume ?? volume,
      name: options.name,
      tags: options.tag,
      skipUnreadable: options['skip-unreadable'],
      takeOver: options['take-over'],
      host: hostname(),
      dedupeCacheFile: dedupeCacheFile(context.settings.cacheDir, repo.id),
      workers: WORKERS,
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
        watched: false,
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

/** A device that a running watch captures to this repository. */
interface Running {
  readonly path: string;
  readonly device: DeviceReport;
}

/** The running watch that the command means, if any. */
async function findRunning(
  context: CommandContext,
  repo: Repository,
  input: SnapshotInput,
): Promise<Running | undefined> {
  const text = input.arguments.device;
  const { volume } = input.options;
  const real = await realpath(text).catch(() => undefined);
  const watches = await watchesOf(await runningWatches(context), repo);
  for (const { path, report } of watches) {
    for (const device of report.devices) {
      // Nobody captures it any more: then it is captured now, as any other.
      if (device.state === 'failed') continue;
      const isMeant =
        real === undefined
          ? device.volume === text || device.volumeId === text
          : real === (await realpath(device.device).catch(() => device.device));
      // To another volume a device is captured beside the watch.
      const isVolume =
        volume === undefined || volume === device.volume || volume === device.volumeId;
      if (isMeant && isVolume) return { path, device };
    }
  }
  if (real !== undefined) return undefined;
  // The name may be short ("sda" for "web1/sda"): who finds volumes knows.
  const meant = await volumeNamed(context, repo, text).catch(() => undefined);
  for (const { path, report } of watches) {
    const device = report.devices.find(
      (d) => d.state !== 'failed' && d.volumeId !== undefined && d.volumeId === meant?.id,
    );
    if (device !== undefined) return { path, device };
  }
  return undefined;
}

async function throughWatch(
  context: CommandContext,
  repo: Repository,
  input: SnapshotInput,
  { path, device }: Running,
): Promise<Outcome<SnapshotAnswer>> {
  const { options } = input;
  const { clock } = context;
  const began = clock.monotonicNs();
  const volume = device.volume ?? device.device;
  const name =
    device.volumeId === undefined
      ? (options.name ?? formatTimeNs(clock.nowNs()).replace(/\.\d+Z$/, 'Z'))
      : await freeName(repo, { id: device.volumeId, name: volume }, options.name);
  if (device.scan !== undefined)
    context.events({
      type: 'note',
      message: `${device.device} is being read by the running watch (${device.state}, ${formatBytes(device.scan.doneBytes)} of ${formatBytes(device.scan.totalBytes)}): there is no exact point before that is done`,
    });
  const a = await askPoint(
    path,
    {
      type: 'point',
      volume: device.volumeId ?? device.device,
      ...(options.class === undefined ? {} : { class: options.class }),
      name,
      tags: options.tag,
    },
    context.signal,
  );
  const { group } = a;
  await withCatalogue(context, repo, async (catalogue) => {
    for (const one of [a, ...(group?.others ?? [])])
      await catalogue?.recordTip({
        volumeId: one.volumeId,
        name: one.volume,
        seq: one.point.seq,
        hash: one.hash,
        instantNs: parseTimeNs(one.point.time),
      });
  });
  const notExact =
    a.point.class === 'fuzzy' ? (a.note ?? 'the device cannot be read everywhere') : undefined;
  if (notExact !== undefined)
    context.events({
      type: 'warning',
      message: `the point is not exact: ${notExact}`,
      hint: 'What cannot be read is in it as the repository held it before. Check the disk (dmesg, smartctl).',
    });
  else if (a.note !== undefined)
    context.events({ type: 'note', message: `class ${a.point.class}, not better: ${a.note}` });
  if (group !== undefined && group.missing.length > 0)
    context.events({
      type: 'warning',
      message: `group ${group.name}: ${group.missing.join(', ')} ${group.missing.length === 1 ? 'has' : 'have'} no point of this instant`,
      hint: 'The devices carry one file system or volume group: restored alone, this point may be of no use. "b2 status" shows why they take no part.',
    });
  const isPartial = notExact !== undefined || (group?.missing.length ?? 0) > 0;
  return {
    data: {
      volume: a.volume,
      volumeId: a.volumeId,
      isNewVolume: false,
      id: a.point.id,
      name,
      time: a.point.time,
      class: a.point.class,
      hash: a.hash,
      sizeBytes: a.sizeBytes,
      watched: true,
      changedBytes: a.point.blocks * BLOCK_BYTES,
      storedBytes: a.point.storedBytes,
      elapsedSeconds: Number(clock.monotonicNs() - began) / 1e9,
      unreadable: a.unreadable ?? [],
      ...(notExact === undefined ? {} : { notExact }),
      ...(group === undefined
        ? {}
        : {
            group: {
              name: group.name,
              missing: group.missing,
              others: group.others.map((o) => ({
                volume: o.volume,
                volumeId: o.volumeId,
                device: o.device,
                id: o.point.id,
                time: o.point.time,
                class: o.point.class,
                hash: o.hash,
              })),
            },
          }),
    },
    ...(isPartial ? { code: ExitCode.partial } : {}),
  };
}

export function text(a: SnapshotAnswer, style: Style): string {
  const state =
    a.notExact === undefined ? style.green('captured') : style.yellow('captured, not exact');
  const point = `${state} ${a.volume} as "${a.name}": point ${a.id}, class ${a.class}, ${localTime(a.time)}`;
  if (a.watched) {
    return [
      point,
      ...(a.group?.others ?? []).map(
        (o) => `of the same instant and name: ${o.volume}, point ${o.id} (group ${a.group?.name})`,
      ),
      `by the running watch in ${formatDuration(a.elapsedSeconds)}: ${formatBytes(a.changedBytes)} changed since the point before, ${formatBytes(a.storedBytes)} stored`,
    ].join('\n');
  }
  const rate = a.elapsedSeconds > 0 ? `, ${formatRate(a.sizeBytes / a.elapsedSeconds)}` : '';
  return [
    point,
    `${formatBytes(a.sizeBytes)} in ${formatDuration(a.elapsedSeconds)}${rate}: ${formatBytes(a.changedBytes)} changed, ${formatBytes(a.newBytes ?? 0)} new, ${formatBytes(a.storedBytes)} stored`,
  ].join('\n');
}
