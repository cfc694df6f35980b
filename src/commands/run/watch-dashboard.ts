/** From what a watch reports to what the dashboard shows: histories, local times, the size of the repository. */
import { hostname } from 'node:os';
import { className, coverageName } from '../../format/commit.js';
import { formatTimeLocal } from '../../human.js';
import type { Repository } from '../../repo/repository.js';
import type { DashboardAlarm, DashboardPoint, DashboardView } from '../../ui/dashboard-view.js';
import type { WatchReport } from '../../watch/report.js';
import type { WatchEvent } from '../../watch/types.js';
import { about } from './watch-log.js';

const HISTORY = 120;
const KEPT = 100;

/** Local, `18:40:11`. */
export function clockTime(ns: bigint): string {
  return formatTimeLocal(ns).slice(11, 19);
}

/** Bytes of all files of a repository, and what is free where it lies. */
export async function repositorySize(
  repo: Repository,
  signal: AbortSignal,
): Promise<{ readonly bytes: number; readonly freeBytes: number | undefined }> {
  let bytes = 0;
  for await (const { sizeBytes } of repo.store.list('')) {
    if (signal.aborted) break;
    bytes += sizeBytes;
  }
  return { bytes, freeBytes: (await repo.store.space())?.freeBytes };
}

/** Collects what comes and makes the view of the moment. */
export class DashboardState {
  private readonly startNs: bigint;
  private readonly lags = new Map<string, (number | undefined)[]>();
  private readonly points: DashboardPoint[] = [];
  private readonly alarms: DashboardAlarm[] = [];
  private size: { readonly bytes: number; readonly freeBytes: number | undefined } | undefined;
  private storedSince = 0;
  message: string | undefined;

  /** `startNs` of the monotonic clock. */
  constructor(startNs: bigint) {
    this.startNs = startNs;
  }

  event(event: WatchEvent, nowNs: bigint): void {
    switch (event.type) {
      case 'point': {
        const { point, volume } = event;
        this.storedSince += point.storedBytes;
        this.points.unshift({
          time: clockTime(point.instantNs),
          device: volume,
          id: `#${point.seq}`,
          class: className(point.pointClass),
          coverage: coverageName(point.coverage),
          storedBytes: point.storedBytes,
          ageMs: point.ageMs,
        });
        this.points.splice(KEPT);
        return;
      }
      case 'problem':
        this.alarm(about(event.device, event.problem.message), event.problem.atNs);
        return;
      case 'state':
        if (event.state === 'failed' || event.state === 'outage' || event.state === 'absent')
          this.alarm(`${event.state}: ${about(event.device, event.message)}`, nowNs);
        return;
      case 'frozen':
      case 'notice':
        this.message =
          event.type === 'notice'
            ? about(event.device, event.message)
            : `${event.mountPoints.join(', ')} frozen for ${Math.round(event.frozenMs)} ms`;
        return;
    }
  }

  alarm(message: string, nowNs: bigint): void {
    if (this.alarms[0]?.message === message) return;
    this.alarms.unshift({ time: clockTime(nowNs), message });
    this.alarms.splice(KEPT);
  }

  setSize(size: { readonly bytes: number; readonly freeBytes: number | undefined }): void {
    this.size = size;
    this.storedSince = 0;
  }

  /** Called once a second: adds to the histories. */
  sample(report: WatchReport): void {
    for (const d of report.devices) {
      const history = this.lags.get(d.device) ?? [];
      history.push(d.lagMs);
      if (history.length > HISTORY) history.shift();
      this.lags.set(d.device, history);
    }
  }

  view(
    report: WatchReport,
    now: { readonly wallNs: bigint; readonly monotonicNs: bigint; readonly intervalMs: number },
  ): DashboardView {
    return {
      host: hostname(),
      time: clockTime(now.wallNs),
      upSeconds: Number(now.monotonicNs - this.startNs) / 1e9,
      repository: report.repository,
      repositoryBytes: this.size === undefined ? undefined : this.size.bytes + this.storedSince,
      freeBytes: this.size?.freeBytes,
      intervalMs: now.intervalMs,
      devices: report.devices.map((d) => ({
        name: d.volume ?? d.device,
        state: d.state,
        lagMs: d.lagMs,
        lagHistory: this.lags.get(d.device) ?? [],
        scan: d.scan,
        writtenBytesPerSecond: d.changedBytesPerSecond,
        capturedBytesPerSecond: d.capturedBytesPerSecond,
        storedBytesPerSecond: d.storedBytesPerSecond,
        points: d.points,
      })),
      points: this.points,
      alarms: this.alarms,
      message: report.stopping ? 'making a last point; Ctrl-C again ends at once' : this.message,
    };
  }
}
