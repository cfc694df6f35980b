import { readdirSync } from 'node:fs';
import { hostname } from 'node:os';
import { Quiescer, thawStale } from '../../capture/freeze/index.js';
import { PointGroup, type GroupState } from '../../capture/group.js';
import { dedupeCacheFile } from '../../capture/snapshot.js';
import { B2Error, ExitCode, messageOf } from '../../errors.js';
import type { B2Event } from '../../events.js';
import { PointClass } from '../../format/commit.js';
import { formatCount, formatTimeNs } from '../../human.js';
import type { Catalogue } from '../../repo/catalogue.js';
import type { Repository } from '../../repo/repository.js';
import { parseRepositoryUrl } from '../../repo/store-url.js';
import { makeBatch } from '../../syscalls.js';
import type { Style } from '../../ui/style.js';
import { wantsColour } from '../../ui/style.js';
import { controlDirectory, serveControl, type ControlServer } from '../../watch/control.js';
import { outcomeOf, WatchDaemon, type DaemonEnd } from '../../watch/daemon.js';
import { refuseHeld, type Wanted } from '../../watch/held.js';
import { openNotifier, type Notifier } from '../../watch/notify.js';
import { repositoryPinner } from '../../watch/pin.js';
import type { DeviceReport } from '../../watch/report.js';
import { statusLine, supervise } from '../../watch/service.js';
import { startSession, type Quiesce } from '../../watch/session.js';
import type { WatchEvent, WatchSession } from '../../watch/types.js';
import type { WatchInput } from '../watch.js';
import type { CommandContext, Outcome } from '../spec.js';
import { withCatalogue } from './catalogue.js';
import { openOrMakeRepository } from './default-repository.js';
import { runningWatches } from './running.js';
import { DashboardState, repositorySize } from './watch-dashboard.js';
import { isJournal, openLog, SUMMARY_MS, type WatchLog } from './watch-log.js';
import { SharedDevices } from './watch-shared.js';
import { targetsOf, type Target } from './watch-targets.js';

/** The last line with `--json`; the lines before are of the types `state`, `point`, `problem`, `notice`, `status` and `log`. */
export interface WatchAnswer {
  readonly type: 'ended';
  readonly reason: string;
  readonly devices: readonly DeviceReport[];
  readonly failed: readonly {
    readonly device: string;
    readonly message: string;
    readonly hint?: string;
  }[];
}

/** Time for a last exact point when stopping; the unit gives a minute. */
const FINAL_MS = 20_000;
const DRAW_MS = 1_000;
const SIZE_MS = 60_000;

/** Warnings of what lies below go to the log, or to the dashboard while it is shown. */
interface Messages {
  sink: ((event: B2Event) => void) | undefined;
}

export async function run(
  context: CommandContext,
  input: WatchInput,
): Promise<Outcome<WatchAnswer>> {
  const targets = targetsOf(input, context.config);
  const messages: Messages = { sink: undefined };
  const own: CommandContext = {
    ...context,
    events: (event) => (messages.sink ?? context.events)(event),
  };
  if (isJournal(context.env) && !context.flags.json) {
    const log = openLog(context);
    messages.sink = (event) => {
      if (event.type === 'warning') log.say('warning', event.message, event.hint);
      else if (event.type === 'note') log.say('notice', event.message);
    };
  }
  // Before anything is written: the repository itself may lie on what an earlier process has left frozen.
  if (process.geteuid?.() === 0) {
    for (const place of await thawStale())
      own.events({ type: 'warning', message: `${place} was still frozen; it has been thawed` });
  }
  giveWay();
  const repo = await openOrMakeRepository(own);
  try {
    return await withCatalogue(own, repo, (catalogue) =>
      new WatchCommand(own, input, repo, catalogue, messages).run(targets),
    );
  } finally {
    await repo.close();
  }
}

/**
 * Whoever writes to a watched device does not lose a processor to this program each time it wakes: its threads wait for the end of
 * the other's turn, a few milliseconds. Threads that come later inherit that.
 */
function giveWay(): void {
  try {
    for (const tid of readdirSync('/proc/self/task')) makeBatch(Number(tid));
  } catch {
    // Not to be had here; it is a courtesy.
  }
}

/** Started by a service manager that wants to hear of it. */
function isService(env: CommandContext['env']): boolean {
  const { NOTIFY_SOCKET } = env;
  return NOTIFY_SOCKET !== undefined && NOTIFY_SOCKET !== '';
}

/** Directory of the repository, where it is a local one. */
function localPath(context: CommandContext): string | undefined {
  const url = parseRepositoryUrl(context.settings.repository.url);
  return url.scheme === 'directory' ? url.path : undefined;
}

/** The parts of one run, and how they hang together. */
class WatchCommand {
  private readonly context: CommandContext;
  private readonly input: WatchInput;
  private readonly repo: Repository;
  private readonly catalogue: Catalogue | undefined;
  private readonly messages: Messages;
  private readonly log: WatchLog;
  private readonly dashboard: DashboardState | undefined;
  private readonly quiescers = new Map<string, { key: string; quiescer: Quiescer }>();
  private readonly groups = new Map<string, PointGroup>();
  private readonly shared: SharedDevices;
  private current: readonly Target[] = [];
  /** Devices that this process has captured: if one is missing when its session is started again, it is waited for. */
  private readonly captured = new Set<string>();
  private readonly over = new AbortController();

  constructor(
    context: CommandContext,
    input: WatchInput,
    repo: Repository,
    catalogue: Catalogue | undefined,
    messages: Messages,
  ) {
    this.context = context;
    this.input = input;
    this.repo = repo;
    this.catalogue = catalogue;
    this.messages = messages;
    this.log = openLog(context);
    const { output, env, clock, signal } = context;
    this.shared = new SharedDevices({ clock, signal, say: this.say.bind(this) });
    this.dashboard =
      output.interactive && env['TERM'] !== 'dumb'
        ? new DashboardState(clock.monotonicNs())
        : undefined;
  }

  async run(targets: readonly Target[]): Promise<Outcome<WatchAnswer>> {
    const { clock, signal, env, settings } = this.context;
    const daemon: WatchDaemon<Target> = new WatchDaemon<Target>({
      startSession: (target, onEvent) => this.startSession(target, onEvent, daemon),
      pinner: repositoryPinner(this.repo),
      repository: { url: settings.repository.url, id: this.repo.id },
      clock,
      finalMs: FINAL_MS,
      onEvent: (event) => this.tell(event),
    });
    const notifier = openNotifier(env, clock, (message) => this.say('warning', message));
    const stop = (reason: string): void => {
      if (daemon.stopping) return;
      notifier?.stopping('making a last point');
      notifier?.extendTimeout(FINAL_MS + 10_000);
      for (const group of this.groups.values()) group.close();
      daemon.stop(reason);
    };
    const onSignal = (): void => stop(String(signal.reason));
    const onHangup = (): void => {
      // The end of the terminal that shows the dashboard; elsewhere the usual request to look at the configuration again.
      if (this.dashboard !== undefined) stop('the terminal was closed');
      else void this.reload(daemon, notifier);
    };
    let control: ControlServer | undefined;
    let view: Promise<void> = Promise.resolve();
    let supervision: Promise<void> = Promise.resolve();
    process.on('SIGHUP', onHangup);
    signal.addEventListener('abort', onSignal, { once: true });
    try {
      // What is asked for meanwhile comes after it.
      await daemon.startFound(() => this.find(targets));
      if (signal.aborted) onSignal();
      const runForMs = this.input.options['run-for'];
      if (runForMs !== undefined) void this.after(runForMs, () => stop('the time is up'));
      view = this.dashboard === undefined ? this.summarize(daemon) : this.draw(daemon, stop);
      control = await this.openControl(daemon);
      if (notifier !== undefined)
        supervision = supervise({
          notifier,
          status: () => daemon.status(),
          isReady: () => daemon.isReady,
          clock,
          signal: this.over.signal,
        });
      const end = await daemon.done;
      return this.answer(end);
    } finally {
      this.over.abort();
      process.off('SIGHUP', onHangup);
      signal.removeEventListener('abort', onSignal);
      await control?.close();
      await Promise.all([view, supervision]);
      for (const { quiescer } of this.quiescers.values()) await quiescer.close();
      await notifier?.close();
    }
  }

  /** Calls `then` after `ms`, however many those are, unless the watch is over by then. */
  private async after(ms: number, then: () => void): Promise<void> {
    const { clock } = this.context;
    const { signal } = this.over;
    const endNs = clock.monotonicNs() + BigInt(ms) * 1_000_000n;
    for (;;) {
      const leftMs = Number(endNs - clock.monotonicNs()) / 1e6;
      if (signal.aborted) return;
      if (leftMs <= 0) return then();
      // Timers take at most 24 days.
      await clock.sleep(Math.min(leftMs, 86_400_000), signal);
    }
  }

  private answer(end: DaemonEnd): Outcome<WatchAnswer> {
    const { code } = outcomeOf(end);
    const data: WatchAnswer = {
      type: 'ended',
      reason: end.reason,
      devices: end.devices,
      failed: end.failed.map(({ device, error }) => ({
        device,
        message: error.message,
        ...(error.hint === undefined ? {} : { hint: error.hint }),
      })),
    };
    const isInterrupt = code === ExitCode.ok && end.reason === 'SIGINT';
    return { data, code: isInterrupt ? ExitCode.interrupted : code };
  }

  private tell(event: WatchEvent): void {
    if (event.type === 'point') this.captured.add(event.device);
    if (this.dashboard === undefined) this.log.event(event);
    else this.dashboard.event(event, this.context.clock.nowNs());
  }

  private say(priority: 'warning' | 'notice' | 'info', message: string, hint?: string): void {
    if (this.dashboard === undefined) this.log.say(priority, message, hint);
    else if (priority === 'warning')
      this.dashboard.alarm(
        hint === undefined ? message : `${message} (${hint})`,
        this.context.clock.nowNs(),
      );
    else this.dashboard.message = message;
  }

  private startSession(
    target: Target,
    onEvent: (event: WatchEvent) => void,
    daemon: WatchDaemon<Target>,
  ): WatchSession {
    const { options } = this.input;
    return startSession({
      device: target.device,
      volume: target.volume,
      repo: this.repo,
      host: hostname(),
      onEvent,
      source: target.source,
      intervalMs: target.intervalMs,
      // A person who has mistyped a name wants to know at once; a service is to outlast a disk that comes late.
      waitForDevice: isService(this.context.env) || this.captured.has(target.device),
      refuseHeld: (at) => this.refuseHeld(at, daemon),
      takeOver: options['take-over'],
      acceptDevice: options['accept-device'],
      catalogue: this.catalogue,
      dedupeCacheFile: dedupeCacheFile(this.context.settings.cacheDir, this.repo.id),
      quiesce: this.quiesceOf(target.device, daemon),
      freezeAfterMs: () => this.current.find((t) => t.device === target.device)?.freezeAfterMs,
      group: this.groupOf(target),
    });
  }

  /** One for all devices of a group, as long as those are the same. */
  private groupOf(target: Target): PointGroup | undefined {
    if (target.group === undefined) return undefined;
    const { name, devices } = target.group;
    const key = JSON.stringify(target.group);
    const known = this.groups.get(key);
    if (known !== undefined) return known;
    const group = new PointGroup({
      name,
      devices,
      clock: this.context.clock,
      onChange: (state) => this.tellGroup(state, devices),
    });
    this.groups.set(key, group);
    return group;
  }

  private tellGroup({ name, isWhole, missing }: GroupState, devices: readonly string[]): void {
    if (isWhole)
      this.say('notice', `group ${name}: points are one instant of ${devices.join(', ')}`);
    else
      this.say(
        'warning',
        `group ${name}: ${missing.join(', ')} ${missing.length === 1 ? 'takes' : 'take'} no part at present; every device goes on with points of its own`,
        'They share points again, by themselves, once all are captured.',
      );
  }

  private async refuseHeld(
    at: Pick<Wanted, 'volumeId' | 'volume' | 'realPath'>,
    daemon: WatchDaemon<Target>,
  ): Promise<void> {
    const watches = (await runningWatches(this.context)).map((w) => w.report);
    await refuseHeld(watches, { ...at, repositoryId: this.repo.id, self: daemon.status() });
  }

  /** Freezes and runs hooks by the settings of the moment it is asked. */
  private quiesceOf(device: string, daemon: WatchDaemon<Target>): Quiesce {
    return async ({ pointClass, signal }, at) => {
      const target = this.current.find((t) => t.device === device);
      const wanted = pointClass === PointClass.app ? PointClass.app : PointClass.fs;
      if (target === undefined)
        throw new B2Error('interrupted', `${device} is not watched any more`);
      if (target.freezeMs === 0 && wanted === PointClass.fs)
        throw new B2Error('unsupported', `freezing is switched off for ${device}`, {
          hint: '--freeze and --freeze-limit, or watch.freeze and watch.freeze-limit, allow it.',
        });
      const quiescer = await this.quiescerOf(target);
      const status = daemon.status().devices.find((d) => d.device === device);
      const { point } = await quiescer.point(
        { pointClass: wanted, signal },
        { ...at, volume: status?.volume ?? device },
      );
      return point;
    };
  }

  private async quiescerOf(target: Target): Promise<Quiescer> {
    const { device, prePoint, postPoint, hookMs, freezeMs } = target;
    const key = JSON.stringify([prePoint, postPoint, hookMs, freezeMs]);
    const known = this.quiescers.get(device);
    if (known?.key === key) return known.quiescer;
    const { clock, settings } = this.context;
    const quiescer = new Quiescer({
      clock,
      repositoryPath: localPath(this.context),
      writes: [settings.cacheDir],
      hooks: { prePoint, postPoint, timeoutMs: hookMs },
      boundMs: freezeMs,
      warn: (error) =>
        this.tell({
          type: 'problem',
          device,
          problem: { atNs: clock.nowNs(), message: error.message, hint: error.hint },
        }),
    });
    this.quiescers.set(device, { key, quiescer });
    await known?.quiescer.close();
    return quiescer;
  }

  private async openControl(daemon: WatchDaemon<Target>): Promise<ControlServer | undefined> {
    const uid = process.geteuid?.() ?? 0;
    const { env, random } = this.context;
    try {
      return await serveControl({
        directory: controlDirectory(env, uid),
        uid,
        random,
        handler: daemon,
      });
    } catch (error) {
      // Capture matters more than being asked about it.
      this.say(
        'warning',
        `"b2 snapshot" and "b2 status" cannot reach this watch: ${messageOf(error)}`,
        error instanceof B2Error ? error.hint : undefined,
      );
      return undefined;
    }
  }

  /** The targets, each with the group that it belongs to; they count from now on. */
  private async find(targets: readonly Target[]): Promise<readonly Target[]> {
    this.current = await this.shared.group(targets);
    return this.current;
  }

  /** SIGHUP. */
  private async reload(daemon: WatchDaemon<Target>, notifier: Notifier | undefined): Promise<void> {
    const isReady = daemon.isReady;
    if (isReady) notifier?.reloading();
    try {
      const done = await daemon.apply(async () => {
        const config = await this.context.reloadConfig();
        const targets = await this.find(targetsOf(this.input, config));
        const { repository } = this.context.settings;
        if (repository.origin === 'config' && config.repository !== repository.url)
          this.say('warning', 'the configuration names another repository; that needs a restart');
        return targets;
      });
      this.say('notice', ['the configuration was loaded again', ...done].join('; '));
    } catch (error) {
      this.say(
        'warning',
        `the configuration was not loaded, the old one stays in force: ${messageOf(error)}`,
        error instanceof B2Error ? error.hint : undefined,
      );
    } finally {
      if (isReady) notifier?.ready(statusLine(daemon.status()));
    }
  }

  private async summarize(daemon: WatchDaemon<Target>): Promise<void> {
    const { clock } = this.context;
    const { signal } = this.over;
    for (;;) {
      await clock.sleep(SUMMARY_MS, signal);
      if (signal.aborted) return;
      this.log.summary(daemon.status().devices);
    }
  }

  private async draw(daemon: WatchDaemon<Target>, stop: (reason: string) => void): Promise<void> {
    const { dashboard: state } = this;
    if (state === undefined) return;
    const { clock, env } = this.context;
    const { signal } = this.over;
    const { showDashboard } = await import('../../ui/dashboard.js');
    const view = (): ReturnType<DashboardState['view']> =>
      state.view(daemon.status(), {
        wallNs: clock.nowNs(),
        monotonicNs: clock.monotonicNs(),
        intervalMs: Math.max(...this.current.map((t) => t.intervalMs)),
      });
    const shown = showDashboard({
      view: view(),
      colour: wantsColour({ isTty: true, json: false, env }),
      actions: {
        snapshot: (index) => void this.snapshotByHand(daemon, state, index),
        quit: () => stop('asked to at the dashboard'),
        // As the terminal would have done it: the second time is the hard way out.
        interrupt: () => void process.kill(process.pid, 'SIGINT'),
      },
    });
    this.messages.sink = (event) => {
      if (event.type === 'warning') state.alarm(event.message, clock.nowNs());
      else if (event.type === 'note') state.message = event.message;
    };
    void this.measure(state);
    try {
      while (!signal.aborted) {
        state.sample(daemon.status());
        shown.update(view());
        await clock.sleep(DRAW_MS, signal);
      }
    } finally {
      this.messages.sink = undefined;
      shown.close();
    }
  }

  private async measure(state: DashboardState): Promise<void> {
    const { signal } = this.over;
    while (!signal.aborted) {
      try {
        state.setSize(await repositorySize(this.repo, signal));
      } catch {
        // An outage shows elsewhere; the last size stays.
      }
      await this.context.clock.sleep(SIZE_MS, signal);
    }
  }

  private async snapshotByHand(
    daemon: WatchDaemon<Target>,
    state: DashboardState,
    index: number,
  ): Promise<void> {
    const device = daemon.status().devices[index];
    if (device === undefined) return;
    const name = formatTimeNs(this.context.clock.nowNs()).replace(/\.\d+Z$/, 'Z');
    state.message = `snapshot of ${device.volume ?? device.device} …`;
    try {
      const made = await daemon.point(
        { type: 'point', volume: device.device, name, tags: ['dashboard'] },
        this.over.signal,
      );
      state.message = `snapshot ${name} of ${made.volume}: point ${made.point.id}, class ${made.point.class}`;
    } catch (error) {
      state.message = undefined;
      state.alarm(`no snapshot: ${messageOf(error)}`, this.context.clock.nowNs());
    }
  }
}

export function text(a: WatchAnswer, style: Style): string {
  const lines = a.devices.map((d) => {
    const failed = a.failed.find((f) => f.device === d.device);
    const last = d.lastPoint === undefined ? 'no point' : `last point ${d.lastPoint.id}`;
    const state = failed === undefined ? style.green('watched') : style.red('failed');
    return `${state} ${d.device}${d.volume === undefined ? '' : ` as ${d.volume}`}: ${formatCount(d.points)} points, ${last}${failed === undefined ? '' : `: ${failed.message}`}`;
  });
  return [`ended: ${a.reason}`, ...lines].join('\n');
}
