/** What a program that watches devices keeps for points of class `fs` and `app`: settings, and the helper process while it is used. */
import type { Clock } from '../../clock.js';
import type { ReadDevice } from '../../devices/device.js';
import { B2Error } from '../../errors.js';
import type { PointClass } from '../../format/commit.js';
import { Freezer } from './freezer.js';
import type { Hooks } from './hooks.js';
import { mountsOf } from './mounts.js';
import {
  quiescedPoint,
  type Freeze,
  type PointMaker,
  type QuiescedPoint,
} from './quiesced-point.js';

export interface QuiescerOptions {
  readonly clock: Clock;
  /** See {@link mountsOf}. */
  readonly repositoryPath?: string | undefined;
  readonly writes?: readonly string[];
  readonly hooks?: Hooks | undefined;
  /** How long writers may be held. Default 100. */
  readonly boundMs?: number | undefined;
  /** See {@link quiescedPoint}. */
  readonly warn?: ((error: B2Error) => void) | undefined;
  /** How long the helper process is kept after it was needed. Default 60 000. */
  readonly keepMs?: number;
  readonly staleDir?: string;
}

/** One for a process, whatever the number of devices: points are made one after the other. */
export class Quiescer {
  private readonly o: QuiescerOptions;
  private freezer: Freezer | undefined;
  private tail: Promise<unknown> = Promise.resolve();
  private idle = new AbortController();

  constructor(options: QuiescerOptions) {
    this.o = options;
  }

  /** See {@link quiescedPoint}. */
  point(
    request: {
      readonly pointClass: typeof PointClass.fs | typeof PointClass.app;
      readonly signal?: AbortSignal | undefined;
    },
    at: {
      readonly device: ReadDevice;
      readonly capture: PointMaker;
      readonly volume: string;
      readonly onFreeze?: ((freeze: Freeze) => void) | undefined;
    },
  ): Promise<QuiescedPoint> {
    const made = this.tail.then(() => this.make(request, at));
    this.tail = made.catch(() => undefined);
    return made;
  }

  private async make(
    request: Parameters<Quiescer['point']>[0],
    at: Parameters<Quiescer['point']>[1],
  ): Promise<QuiescedPoint> {
    this.idle.abort();
    const { clock, hooks, boundMs, warn } = this.o;
    const { facts } = at.device;
    try {
      for (let tries = 1; ; tries++) {
        const mounts = await mountsOf(facts, this.o);
        if (this.freezer?.isUsable === false) this.freezer = undefined;
        if (mounts.length > 0 && mounts.every((m) => m.holding !== 'never'))
          this.freezer ??= await Freezer.start(this.o);
        const { freezer } = this;
        try {
          return await quiescedPoint(at.capture, mounts, {
            clock,
            device: facts,
            volume: at.volume,
            ...request,
            hooks,
            boundMs,
            warn,
            freezer,
            staleDir: this.o.staleDir,
            onFreeze: at.onFreeze,
          });
        } catch (error) {
          // The helper has died: that is no reason why there should be no point, with another one.
          const isHelpers = freezer?.isUsable === false && error instanceof B2Error;
          if (!isHelpers || !error.retryable || tries > 1 || request.signal?.aborted === true)
            throw error;
        }
      }
    } finally {
      this.idle = new AbortController();
      const { signal } = this.idle;
      void clock.sleep(this.o.keepMs ?? 60_000, signal).then(() => {
        if (!signal.aborted) void this.dismiss();
      });
    }
  }

  /** Waits for the point under way and ends the helper process. */
  async close(): Promise<void> {
    await this.tail;
    this.idle.abort();
    await this.dismiss();
  }

  private async dismiss(): Promise<void> {
    const { freezer } = this;
    this.freezer = undefined;
    await freezer?.close();
  }
}
