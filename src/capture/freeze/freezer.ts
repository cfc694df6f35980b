/**
 * Freezing with a net: the file systems are frozen and thawed by a helper process (helper.ts), which thaws them when it is told to,
 * at the bound, and when this process dies. Should the helper die or be stopped, this process thaws. What is left when both are
 * killed at one moment is noted in {@link STALE_DIR}, and {@link thawStale} thaws it with the next start.
 *
 * | who is gone | who thaws | when |
 * | --- | --- | --- |
 * | this process, killed | helper | at once (its input ends) |
 * | this process hangs, is stopped, is debugged | helper | at the bound |
 * | helper, killed | this process | at once |
 * | helper, stopped | this process | at most 2 × {@link GRACE_MS} after the bound |
 * | both, killed together | the next start | `thawStale` |
 */
import { spawn, type ChildProcess } from 'node:child_process';
import { constants } from 'node:fs';
import { open, readdir, readFile, rm, type FileHandle } from 'node:fs/promises';
import path from 'node:path';
import { fileURLToPath } from 'node:url';

import type { Clock } from '../../clock.js';
import { mountedNumberOfFd } from '../../devices/in-use.js';
import { B2Error, errnoOf, ioError, messageOf } from '../../errors.js';
import { isProvablyDead, machineFacts, type ProcessIdentity } from '../../process-identity.js';
import { thawFs } from '../../syscalls.js';
import { workerFile } from '../../workers.js';
import {
  lineReader,
  STALE_DIR,
  type Alive,
  type Answer,
  type FreezeTarget,
  type Request,
} from './messages.js';
import type { WatchedMount } from './mounts.js';

/** The helper must say that it is ready within this time. */
const START_MS = 20_000;
const SAID_CHARS = 2000;
/** How much later than promised the helper may be before it counts as stopped. */
const GRACE_MS = 1000;
/** Opening and closing go through the file system's own tables, which may wait for a busy disk. */
const OPEN_MS = 10_000;
/** So long a helper that lives is waited for: the kernel syncs a file system as part of the freeze, and cannot be called off. */
const PATIENCE_MS = 60_000;

export interface FreezerOptions {
  readonly clock: Clock;
  /** Default {@link STALE_DIR}. */
  readonly staleDir?: string;
}

/** How a freeze ended. */
export interface Thawed {
  /** True if every file system was frozen from the end of {@link Freezer.freeze} until {@link Frozen.thaw}. */
  readonly held: boolean;
  readonly frozenMs: number;
  /** Why not `held`: a clause. */
  readonly why: string | undefined;
}

/** File systems that are frozen. */
export interface Frozen {
  /** Monotonic time at which the freeze began. */
  readonly sinceNs: bigint;
  /** Thaws all of them. Never rejects; further calls give the first answer. */
  thaw(): Promise<Thawed>;
}

/** See the file comment. One freeze at a time. */
export class Freezer {
  private readonly clock: Clock;
  private readonly staleDir: string;
  private readonly child: ChildProcess;
  private waiting: ((answer: Answer | undefined) => void)[] = [];
  /** Those who have asked whether it lives. */
  private asking: (() => void)[] = [];
  /** What the helper said on standard error: only a broken installation makes it. */
  private said = '';
  private hasEnded = false;
  private readonly ended: Promise<void>;

  private constructor(options: FreezerOptions) {
    this.clock = options.clock;
    this.staleDir = options.staleDir ?? STALE_DIR;
    const helper = fileURLToPath(workerFile(new URL('./helper.js', import.meta.url)));
    this.child = spawn(process.execPath, [helper, this.staleDir], {
      stdio: ['pipe', 'pipe', 'pipe'],
      // A session of its own: Ctrl-C is not for it. Nothing of the environment, which may hold secrets.
      detached: true,
      env: {},
      cwd: '/',
    });
    this.child.stdin?.on('error', () => undefined);
    this.child.stdout?.setEncoding('utf8').on(
      'data',
      lineReader((line) => {
        const answer = JSON.parse(line) as Answer | Alive;
        if (answer.type !== 'alive') this.waiting.shift()?.(answer);
        else for (const hear of this.asking.splice(0)) hear();
      }),
    );
    this.child.stderr?.setEncoding('utf8').on('data', (text: string) => {
      this.said = (this.said + text).slice(-SAID_CHARS);
    });
    this.ended = new Promise((resolve) => {
      const end = (): void => {
        this.hasEnded = true;
        for (const answer of this.waiting.splice(0)) answer(undefined);
        resolve();
      };
      this.child.once('exit', end);
      this.child.once('error', end);
    });
  }

  /** Starts the helper process and waits until it is ready, which takes 0.1 to 1 s. Kind `unsupported` if it cannot be had. */
  static async start(options: FreezerOptions): Promise<Freezer> {
    const freezer = new Freezer(options);
    const answer = await freezer.answerWithin(START_MS);
    if (answer?.type === 'ready') return freezer;
    await freezer.kill();
    const why = /^\w*Error.*$/m.exec(freezer.said)?.[0];
    throw new B2Error(
      'unsupported',
      `the process that freezes file systems did not start${why === undefined ? '' : `: ${why}`}`,
      {
        hint: 'Is there memory for another Node.js process? Points of class crash need none.',
      },
    );
  }

  /** Process id of the helper. */
  get pid(): number | undefined {
    return this.child.pid;
  }

  /** False once the helper has died or did not answer: start another. */
  get isUsable(): boolean {
    return !this.hasEnded;
  }

  /**
   * Freezes the file systems, in this order, for at most `boundMs`, which counts from the first freeze on. Rejects, with nothing
   * frozen, if one of them cannot be frozen or if the bound was over before all were.
   */
  async freeze(mounts: readonly WatchedMount[], boundMs: number): Promise<Frozen> {
    const files: FileHandle[] = [];
    const close = async (): Promise<void> => {
      for (const file of files.splice(0)) await file.close().catch(() => undefined);
    };
    try {
      for (const mount of mounts) {
        try {
          files.push(await open(mount.openPath, constants.O_RDONLY | constants.O_NONBLOCK));
        } catch (error) {
          throw ioError('open', mount.mountPoint, error);
        }
      }
      const targets: readonly FreezeTarget[] = mounts.map((m) => ({
        path: m.openPath,
        devNumber: m.devNumber,
      }));
      this.expect(await this.askPatiently({ op: 'open', targets }, OPEN_MS), 'opened', mounts);
      const sinceNs = this.clock.monotonicNs();
      // A freeze that the kernel is in cannot be called off: a disk may take long to sync, and is thawed right after it.
      const answer = await this.askPatiently({ op: 'freeze', boundMs }, boundMs + GRACE_MS);
      if (answer?.type !== 'frozen') {
        if (answer === undefined) await this.rescue(files);
        else await this.ask({ op: 'thaw' }, OPEN_MS);
        this.expect(answer, 'frozen', mounts);
      }
      let result: Promise<Thawed> | undefined;
      const isThawed = new AbortController();
      const end = (made: () => Promise<Thawed>): Promise<Thawed> => {
        isThawed.abort();
        const closing = async (): Promise<Thawed> => {
          try {
            return await made();
          } finally {
            await close();
          }
        };
        result ??= closing();
        return result;
      };
      // The other half of the net: the helper dies, or is stopped and so does not thaw at the bound.
      const helperIsLate = this.clock.sleep(boundMs + GRACE_MS, isThawed.signal).then(async () => {
        // At the bound it thaws by itself, and then it answers; it is asked so that it shows whether it lives.
        if (!isThawed.signal.aborted) await end(() => this.thaw(files, sinceNs, boundMs));
      });
      void Promise.race([this.ended, helperIsLate]).then(async () => {
        if (!isThawed.signal.aborted) await end(() => this.thawHere(files, sinceNs));
      });
      return { sinceNs, thaw: () => end(() => this.thaw(files, sinceNs, boundMs)) };
    } catch (error) {
      await close();
      throw error;
    }
  }

  private async thaw(
    files: readonly FileHandle[],
    sinceNs: bigint,
    boundMs: number,
  ): Promise<Thawed> {
    const sofarMs = Number(this.clock.monotonicNs() - sinceNs) / 1e6;
    const answer = await this.ask({ op: 'thaw' }, Math.max(0, boundMs - sofarMs) + GRACE_MS);
    if (answer?.type === 'thawed')
      return { held: answer.held, frozenMs: answer.frozenMs, why: answer.why };
    return this.thawHere(files, sinceNs);
  }

  private async thawHere(files: readonly FileHandle[], sinceNs: bigint): Promise<Thawed> {
    await this.rescue(files);
    return {
      held: false,
      frozenMs: Number(this.clock.monotonicNs() - sinceNs) / 1e6,
      why: 'the process that freezes died, or did not answer and was ended',
    };
  }

  /** The helper is dead or stopped: it must not freeze any more, and what it froze is thawed from here. */
  private async rescue(files: readonly FileHandle[]): Promise<void> {
    await this.kill();
    for (const file of files.toReversed()) {
      for (let pauseMs = 10; ; pauseMs = Math.min(1000, 2 * pauseMs)) {
        try {
          await thawFs(file.fd);
          break;
        } catch (error) {
          if (errnoOf(error) === 'EINVAL' || pauseMs >= 1000) break;
          await this.clock.sleep(pauseMs);
        }
      }
    }
    if (this.pid !== undefined)
      await rm(path.join(this.staleDir, String(this.pid)), { force: true }).catch(() => undefined);
  }

  /** Ends the helper; nothing may be frozen. */
  async close(): Promise<void> {
    if (this.hasEnded) return;
    this.child.stdin?.end();
    const timer = new AbortController();
    await Promise.race([this.ended, this.clock.sleep(GRACE_MS, timer.signal)]);
    timer.abort();
    await this.kill();
  }

  private async kill(): Promise<void> {
    if (!this.hasEnded) this.child.kill('SIGKILL');
    await this.ended;
  }

  private async ask(request: Request, withinMs: number): Promise<Answer | undefined> {
    if (this.hasEnded) return undefined;
    this.child.stdin?.write(`${JSON.stringify(request)}\n`);
    return this.answerWithin(withinMs);
  }

  /**
   * As {@link ask}, but a helper that shows that it lives is given more time: what it waits for is the kernel. Undefined: it is dead,
   * or was stopped, or the kernel has not come back in {@link PATIENCE_MS}.
   */
  private async askPatiently(request: Request, withinMs: number): Promise<Answer | undefined> {
    if (this.hasEnded) return undefined;
    this.child.stdin?.write(`${JSON.stringify(request)}\n`);
    const answer = this.nextAnswer();
    const endNs = this.clock.monotonicNs() + BigInt(PATIENCE_MS) * 1_000_000n;
    for (let waitMs = withinMs; ; waitMs = GRACE_MS) {
      const first = await this.within(answer, waitMs);
      if (first !== undefined || this.hasEnded) return first;
      if (this.clock.monotonicNs() >= endNs || !(await this.isAlive())) return undefined;
    }
  }

  private async isAlive(): Promise<boolean> {
    const heard = new Promise<true>((resolve) => this.asking.push(() => resolve(true)));
    this.child.stdin?.write(`${JSON.stringify({ op: 'ping' } satisfies Request)}\n`);
    return (await this.within(heard, GRACE_MS)) === true;
  }

  private nextAnswer(): Promise<Answer | undefined> {
    return new Promise((resolve) => this.waiting.push(resolve));
  }

  /** The next answer; undefined if the helper has ended, or does not answer in time. */
  private async answerWithin(ms: number): Promise<Answer | undefined> {
    if (this.hasEnded) return undefined;
    return this.within(this.nextAnswer(), ms);
  }

  private async within<T>(answer: Promise<T>, ms: number): Promise<T | undefined> {
    const timer = new AbortController();
    const late = this.clock.sleep(ms, timer.signal).then(() => undefined);
    try {
      return await Promise.race([answer, late]);
    } finally {
      timer.abort();
    }
  }

  private expect(
    answer: Answer | undefined,
    type: Answer['type'],
    mounts: readonly WatchedMount[],
  ): void {
    if (answer?.type === type) return;
    if (answer?.type !== 'failed') {
      throw new B2Error(
        'failed',
        'the process that freezes file systems has died, or did not answer and was ended',
        { retryable: true, hint: 'Nothing is frozen. Another one is started for the next point.' },
      );
    }
    const mount = mounts[answer.target];
    if (mount === undefined) {
      throw new B2Error('failed', `freezing took too long: ${answer.message}`, {
        retryable: true,
        hint: 'The disk is too busy to be synced in that time. Points of class crash are exact as well.',
      });
    }
    const hint =
      answer.errno === 'EBUSY'
        ? `Somebody else has frozen it (a snapshot under way?); "fsfreeze -u ${mount.mountPoint}" thaws it.`
        : answer.errno === 'EPERM'
          ? 'Only root may freeze file systems.'
          : undefined;
    throw new B2Error(
      answer.errno === 'EOPNOTSUPP' ? 'unsupported' : 'io',
      `cannot freeze ${mount.fsType} on ${mount.mountPoint}: ${answer.message}`,
      { retryable: answer.errno === 'EBUSY', ...(hint === undefined ? {} : { hint }) },
    );
  }
}

/**
 * Thaws what a helper that is certainly dead has left frozen in this boot, and returns the mount points. To be called before
 * anything else is frozen or written, at every start of a program that freezes. Several may do this at once. Kind `io` if one
 * cannot be thawed: the others are, and its note stays, so that the next start tries again.
 */
export async function thawStale(staleDir = STALE_DIR): Promise<readonly string[]> {
  const thawed: string[] = [];
  let failure: B2Error | undefined;
  for (const name of await readdir(staleDir).catch((): string[] => [])) {
    const named = /^(\d+)(~?)$/.exec(name);
    if (named === null) continue;
    const file = path.join(staleDir, name);
    const note = named[2] === '' ? await noteIn(file) : undefined;
    if (note === undefined) {
      // Being written, or cut short. Its helper, whose process id is its name, freezes nothing before it is whole.
      if (machineFacts().process(Number(named[1])) === 'gone') await rm(file, { force: true });
      continue;
    }
    if (!isProvablyDead(note.owner)) continue;
    let isDone = true;
    for (const target of note.targets.toReversed()) {
      try {
        if (await thawNoted(target)) thawed.push(target.path);
      } catch (error) {
        isDone = false;
        failure ??= new B2Error('io', `cannot thaw ${target.path}: ${messageOf(error)}`, {
          cause: error,
          hint: `Try "fsfreeze -u ${target.path}"; its writers wait until then.`,
        });
      }
    }
    if (isDone) await rm(file, { force: true });
  }
  if (failure !== undefined) throw failure;
  return thawed;
}

interface Note {
  readonly owner: ProcessIdentity;
  readonly targets: readonly FreezeTarget[];
}

/** A helper's note; undefined if it has gone or is not whole. */
async function noteIn(file: string): Promise<Note | undefined> {
  try {
    return JSON.parse(await readFile(file, 'utf8')) as Note;
  } catch {
    return undefined;
  }
}

/** Thaws a file system that a note names; false if it is not frozen, or not there any more. */
async function thawNoted(target: FreezeTarget): Promise<boolean> {
  let mount;
  try {
    mount = await open(target.path, constants.O_RDONLY | constants.O_NONBLOCK);
  } catch {
    return false; // unmounted, or something that cannot be looked into is mounted over it
  }
  try {
    if ((await mountedNumberOfFd(mount.fd)) !== target.devNumber) return false;
    await thawFs(mount.fd);
    return true;
  } catch (error) {
    if (errnoOf(error) === 'EINVAL') return false; // not frozen
    throw error;
  } finally {
    await mount.close();
  }
}
