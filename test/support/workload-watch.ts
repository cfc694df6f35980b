/** `b2 watch` as a program that runs beside the test: its JSON lines, its control socket, its end. */
import type { ChildProcess } from 'node:child_process';
import { statSync } from 'node:fs';
import { systemClock } from '../../src/clock.js';
import {
  askPoint,
  askStatus,
  findControlSockets,
  type PointAnswer,
} from '../../src/watch/control.js';
import type { PointReport, WatchReport } from '../../src/watch/report.js';
import type { B2, Ended } from './b2.js';
import type { TempDir } from './tmp.js';

/** Nanoseconds since 1970 of an RFC 3339 time with up to nine digits of a second, in UTC. */
export function nanoseconds(time: string): bigint {
  const found = /^([^.]+?)(?:\.(\d{1,9}))?Z$/.exec(time);
  if (found === null) throw new Error(`not a UTC time: ${time}`);
  return BigInt(Date.parse(`${found[1]}Z`)) * 1_000_000n + BigInt((found[2] ?? '').padEnd(9, '0'));
}

/** A time as `--at` takes it. */
export function timeOf(ns: bigint): string {
  const date = new Date(Number(ns / 1_000_000_000n) * 1000).toISOString().slice(0, 19);
  return `${date}.${String(ns % 1_000_000_000n).padStart(9, '0')}Z`;
}

export interface WatchedPoint extends PointReport {
  readonly device: string;
  readonly volume: string;
  readonly instantNs: bigint;
}

interface Line {
  readonly type: string;
  readonly [field: string]: unknown;
}

const POLL_MS = 20;
const SOCKET = 'the control socket';

/** A device is behind by so much at a moment, as its watch says. */
export interface LagSample {
  readonly atNs: bigint;
  readonly lagMs: number;
}

/** A test that runs out of time never gets to the removal of its directory. */
const running = new Set<ChildProcess>();
process.once('exit', () => {
  for (const child of running) child.kill('SIGKILL');
});

/** A request on the control socket was not answered in time. */
export class LateAnswer extends Error {}

export class Watching {
  readonly points: WatchedPoint[] = [];
  /** Lines of the types `problem` and `state`. */
  readonly troubles: Line[] = [];
  readonly states: Line[] = [];
  readonly ended: Promise<Ended>;
  readonly child: ChildProcess;
  private readonly directory: string;
  private over: Ended | undefined;
  private socket: string | undefined;
  private rest = '';

  private constructor(b2: B2, directory: string, args: readonly string[]) {
    this.directory = directory;
    const { child, ended } = b2.start(['--json', 'watch', ...args], {
      B2_RUNTIME_DIR: directory,
    });
    this.child = child;
    this.ended = ended.then((end) => (this.over = end));
    child.stdout?.on('data', (data: Buffer | string) => this.take(data.toString()));
  }

  /** Starts a watch; it may be told to end by {@link stop} or {@link kill}, and does at the latest with `dir`. */
  static start(dir: TempDir, b2: B2, ...args: readonly string[]): Watching {
    const watching = new Watching(b2, dir.join('run'), args);
    running.add(watching.child);
    void watching.ended.then(() => running.delete(watching.child));
    dir.onRemove(async () => {
      watching.child.kill('SIGKILL');
      await watching.ended;
    });
    return watching;
  }

  get pid(): number {
    if (this.child.pid === undefined) throw new Error('the watch was not started');
    return this.child.pid;
  }

  private take(text: string): void {
    const lines = (this.rest + text).split('\n');
    this.rest = lines.pop() ?? '';
    for (const text of lines) {
      const line = JSON.parse(text) as Line;
      if (line.type === 'problem') this.troubles.push(line);
      else if (line.type === 'state') this.states.push(line);
      else if (line.type === 'point') {
        const point = line as unknown as Omit<WatchedPoint, 'instantNs'>;
        this.points.push({ ...point, instantNs: nanoseconds(point.time) });
      }
    }
  }

  /** Polls until `probe` answers; throws with what the watch said if it ends first or that takes too long. */
  async until<T>(
    what: string,
    probe: () => T | undefined | Promise<T | undefined>,
    limitMs = 180_000,
  ): Promise<T> {
    const endNs = systemClock.monotonicNs() + BigInt(limitMs) * 1_000_000n;
    for (;;) {
      const found = await probe();
      if (found !== undefined) return found;
      if (this.over !== undefined)
        throw new Error(
          `waited for ${what} of the watch, which ended with ${this.over.code ?? this.over.signal}: ${this.over.stderr}; ${this.told()}`,
        );
      if (systemClock.monotonicNs() > endNs)
        throw new Error(
          `waited ${limitMs} ms for ${what} of the watch: ${this.told()}, ${JSON.stringify(what === SOCKET ? 'no socket' : await this.status())}`,
        );
      await systemClock.sleep(POLL_MS);
    }
  }

  private told(): string {
    return JSON.stringify([
      ...this.points.slice(-5).map(({ instantNs: _, ...rest }) => rest),
      ...this.states.slice(-5),
      ...this.troubles,
    ]);
  }

  /** Every device has had an exact point since the start. */
  async ready(devices: number, limitMs?: number): Promise<void> {
    await this.until(
      `${devices} devices to be exact`,
      () => (new Set(this.points.map((p) => p.device)).size === devices ? true : undefined),
      limitMs,
    );
  }

  /** The control socket of this very process. */
  private async control(): Promise<string> {
    this.socket ??= await this.until(SOCKET, async () => {
      try {
        statSync(this.directory);
      } catch {
        return undefined;
      }
      const found = await findControlSockets(this.directory, process.getuid?.() ?? 0);
      return found.find((file) => file.includes(`watch-${this.pid}-`));
    });
    return this.socket;
  }

  async status(): Promise<WatchReport> {
    return askStatus(await this.control(), AbortSignal.timeout(30_000));
  }

  /** A point now. */
  async point(volume: string, pointClass: 'crash' | 'fs', limitMs = 120_000): Promise<PointAnswer> {
    const late = AbortSignal.timeout(limitMs);
    try {
      return await askPoint(
        await this.control(),
        { type: 'point', volume, class: pointClass, tags: [] },
        late,
      );
    } catch (error) {
      if (!late.aborted) throw error;
      throw new LateAnswer(
        `no point of ${volume} of class ${pointClass} within ${limitMs} ms: ${this.told()}, ${JSON.stringify(await this.status())}`,
        { cause: error },
      );
    }
  }

  /** Asks for the lag of the only device every `everyMs` until `signal` aborts. */
  async sampleLag(everyMs: number, signal: AbortSignal): Promise<LagSample[]> {
    const samples: LagSample[] = [];
    while (!signal.aborted) {
      const report = await this.status();
      const lagMs = report.devices[0]?.lagMs;
      // Taken after the answer: the lag may have grown since, it was not more at that moment.
      if (lagMs !== undefined) samples.push({ atNs: systemClock.nowNs(), lagMs });
      await systemClock.sleep(everyMs, signal);
    }
    return samples;
  }

  /** SIGTERM; rejects unless it ends with 0. */
  async stop(): Promise<Ended> {
    this.child.kill('SIGTERM');
    const end = await this.ended;
    if (end.code !== 0)
      throw new Error(`b2 watch ended with ${end.code ?? end.signal}: ${end.stderr}`);
    return end;
  }

  /** SIGKILL. */
  async kill(): Promise<void> {
    this.child.kill('SIGKILL');
    await this.ended;
  }
}
