/**
 * The story of `b2 demo`: Monday's snapshot, a day's work, Tuesday's snapshot, an accident that is captured too, the way
 * back by writing only what differs, a watch of the disk while it is written to, and a verification. The b2 commands run as a user's
 * would: as processes.
 */
import { execFile, spawn } from 'node:child_process';
import { mkdir, mkdtemp, readdir, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join, resolve } from 'node:path';
import type { Clock, Random } from '../clock.js';
import { runTool } from '../devices/run.js';
import { B2Error, ioError, messageOf } from '../errors.js';
import { digestOf, makeScratchDisk, type DiskKind, type ScratchDisk } from './scratch-disk.js';

/** For the watch to read a small disk; machines can be busy. */
const WATCH_LIMIT_NS = 120_000_000_000n;
const WATCH_LOOK_MS = 20;

/** What is shown, in order. */
export type DemoEvent =
  | { readonly type: 'chapter'; readonly text: string }
  | { readonly type: 'command'; readonly command: string }
  | {
      readonly type: 'output';
      readonly command: string;
      readonly code: number;
      readonly text: string;
    };

export interface DemoOptions {
  /** The launcher, bin/b2. */
  readonly program: string;
  readonly env: Readonly<Record<string, string | undefined>>;
  /** A new or empty directory that is left behind; undefined: a temporary one that is removed. */
  readonly keep: string | undefined;
  /** Kinds of disk to try, the best first. */
  readonly disks: readonly DiskKind[];
  readonly clock: Pick<Clock, 'monotonicNs' | 'sleep'>;
  readonly random: Random;
  readonly signal: AbortSignal;
  readonly show: (event: DemoEvent) => void;
}

export interface DemoResult {
  /** Where everything was made. */
  readonly dir: string;
  readonly kept: boolean;
  readonly disk: string;
  readonly diskKind: 'device' | 'image';
  /** True if every byte of the disk was as on Tuesday after the rollback; the demo fails otherwise. */
  readonly same: true;
  /** How the watch learned of changes: by the kernel's block events, or by comparing. What it captured is the disk, byte for byte. */
  readonly watch: { readonly source: 'trace' | 'scan' };
  readonly elapsedSeconds: number;
}

/** A value as it must be typed in a shell. */
function quoted(word: string): string {
  return /^[\w@%+=:,./-]+$/.test(word) ? word : `'${word.replaceAll("'", `'\\''`)}'`;
}

async function makeDir(keep: string | undefined): Promise<string> {
  if (keep === undefined) return mkdtemp(join(tmpdir(), 'b2-demo-'));
  const dir = resolve(keep);
  try {
    await mkdir(dir, { recursive: true, mode: 0o700 });
    if ((await readdir(dir)).length > 0) {
      throw new B2Error('refused', `will not use ${dir}: it is not empty`, {
        hint: 'Name a directory that does not exist yet.',
      });
    }
  } catch (error) {
    throw ioError('make the directory', dir, error);
  }
  return dir;
}

/** The environment of the b2 commands: nothing of the user's b2, and the scratch repository. */
export function demoEnvironment(
  env: Readonly<Record<string, string | undefined>>,
  dir: string,
): { readonly shown: Readonly<Record<string, string>>; readonly all: NodeJS.ProcessEnv } {
  const shown = {
    B2_REPOSITORY: join(dir, 'repo'),
    B2_KEY_FILE: join(dir, 'repo.key'),
    B2_CACHE_DIR: join(dir, 'cache'),
  };
  const others = Object.entries(env).filter(
    ([name]) => !/^(B2_|AWS_|CREDENTIALS_DIRECTORY$)/.test(name),
  );
  const own = { B2_CONFIG: '/dev/null', XDG_STATE_HOME: join(dir, 'cache') };
  return { shown, all: { ...Object.fromEntries(others), ...shown, ...own } };
}

class Story {
  private readonly options: DemoOptions;
  private readonly dir: string;
  private readonly env: NodeJS.ProcessEnv;
  private watch: WatchBeside | undefined;

  constructor(options: DemoOptions, dir: string, env: NodeJS.ProcessEnv) {
    this.options = options;
    this.dir = dir;
    this.env = env;
  }

  private stopIfAsked(): void {
    if (this.options.signal.aborted) throw new B2Error('interrupted', 'interrupted');
  }

  chapter(text: string): void {
    this.stopIfAsked();
    this.options.show({ type: 'chapter', text });
  }

  private report(command: string, code: number, text: string): void {
    this.options.show({ type: 'output', command, code, text: text.trimEnd() });
    this.stopIfAsked();
    if (code !== 0) {
      const last = text.trimEnd().split('\n').at(-1) ?? '';
      throw new B2Error('failed', `"${command}" ended with code ${code}: ${last}`);
    }
  }

  /** A line of shell, shown and run. */
  async shell(script: string): Promise<void> {
    this.stopIfAsked();
    this.options.show({ type: 'command', command: script });
    const done = await runTool('sh', ['-c', `cd ${quoted(this.dir)} && ${script}`], 60_000);
    if (done === undefined) throw new B2Error('unsupported', 'there is no program sh');
    this.report(script, done.status, done.stdout + done.stderr);
  }

  /** A b2 command, shown and run. On an interrupt it is told to stop, and waited for. */
  async b2(...args: readonly string[]): Promise<void> {
    this.stopIfAsked();
    const { program, signal } = this.options;
    const command = ['b2', ...args].map(quoted).join(' ');
    this.options.show({ type: 'command', command });
    const { code, text } = await new Promise<{ code: number; text: string }>((done, fail) => {
      const child = execFile(
        process.execPath,
        [program, '--quiet', ...args],
        { cwd: this.dir, env: this.env, maxBuffer: 1024 * 1024 },
        (error, stdout, stderr) => {
          signal.removeEventListener('abort', stop);
          if (error !== null && typeof error.code !== 'number' && !signal.aborted) {
            fail(
              new B2Error('failed', `cannot run ${program}: ${messageOf(error)}`, { cause: error }),
            );
            return;
          }
          done({ code: typeof error?.code === 'number' ? error.code : 0, text: stdout + stderr });
        },
      );
      const stop = (): void => void child.kill('SIGTERM');
      signal.addEventListener('abort', stop, { once: true });
      child.stdin?.end();
    });
    this.report(command, code, text);
  }

  startWatch(disk: string): WatchBeside {
    this.stopIfAsked();
    const watch = new WatchBeside(this.options, this.dir, this.env, disk);
    this.watch = watch;
    this.options.show({ type: 'command', command: `${watch.command} &` });
    return watch;
  }

  /** Ends the watch; its output is shown, and it must have ended well. */
  async stopWatch(): Promise<void> {
    const { watch } = this;
    if (watch === undefined) return;
    this.options.show({ type: 'command', command: 'kill %1' });
    const { code, text } = await watch.stop();
    this.watch = undefined;
    this.report(watch.command, code, text);
  }

  /** Whatever has happened, no watch is left. */
  async close(): Promise<void> {
    await this.watch?.stop();
    this.watch = undefined;
  }

  digest(file: string): Promise<string> {
    return digestOf(join(this.dir, file));
  }
}

/** A `b2 watch` that runs beside the story. */
class WatchBeside {
  readonly command: string;
  private readonly options: DemoOptions;
  private readonly child: ReturnType<typeof spawn>;
  private readonly ended: Promise<number>;
  private text = '';
  private hasEnded = false;

  constructor(options: DemoOptions, dir: string, env: NodeJS.ProcessEnv, disk: string) {
    const args = ['watch', disk, '--volume', 'demo/disk'];
    this.command = ['b2', ...args].map(quoted).join(' ');
    this.options = options;
    this.child = spawn(process.execPath, [options.program, ...args], {
      cwd: dir,
      env,
      stdio: ['ignore', 'pipe', 'pipe'],
    });
    for (const stream of [this.child.stdout, this.child.stderr])
      stream?.setEncoding('utf8').on('data', (text: string) => {
        this.text += text;
      });
    this.ended = new Promise((resolve) => {
      this.child.once('error', (error) => {
        this.text += messageOf(error);
        resolve(1);
      });
      this.child.once('close', (code) => resolve(code ?? 1));
    });
    void this.ended.then(() => {
      this.hasEnded = true;
    });
  }

  /** Every change of the disk is captured from now on. Kind `failed` if that does not come about. */
  async ready(): Promise<void> {
    const { clock, signal } = this.options;
    const endNs = clock.monotonicNs() + WATCH_LIMIT_NS;
    while (!/^.*exact: every change of .* is captured$/m.test(this.text)) {
      if (signal.aborted) throw new B2Error('interrupted', 'interrupted');
      if (this.hasEnded || clock.monotonicNs() > endNs)
        throw new B2Error('failed', `"${this.command}" did not come to capture: ${this.text}`);
      await clock.sleep(WATCH_LOOK_MS, signal);
    }
  }

  get source(): 'trace' | 'scan' {
    return this.text.includes("is watched by the kernel's block events") ? 'trace' : 'scan';
  }

  /** Asks for the end, waits for it, and returns what was said. */
  async stop(): Promise<{ readonly code: number; readonly text: string }> {
    this.child.kill('SIGTERM');
    return { code: await this.ended, text: this.text };
  }
}

async function watched(story: Story, disk: ScratchDisk): Promise<DemoResult['watch']> {
  story.chapter(
    'Thursday: b2 watch takes care of it. It captures every change within a second, at points that are exact although programs write.',
  );
  const watch = story.startWatch(disk.path);
  await watch.ready();
  await story.shell(disk.busy);
  await story.b2('snapshot', disk.path, '--name', 'thursday');
  if (disk.rest !== undefined) await story.shell(disk.rest);
  await story.stopWatch();
  await story.b2('points', 'demo/disk');
  await story.b2('restore', 'demo/disk', 'thursday.img', '--at', 'latest', '--no-verify');
  if ((await story.digest('thursday.img')) !== (await disk.digest())) {
    throw new B2Error('failed', `what the watch captured is not what is on ${disk.path}`, {
      hint: 'This is a fault of b2: please report it.',
    });
  }
  return { source: watch.source };
}

async function tell(story: Story, disk: ScratchDisk): Promise<DemoResult['watch']> {
  story.chapter(
    'Monday: a repository, and the first snapshot. It is encrypted; the key is in a file.',
  );
  await story.b2('init');
  await story.b2('snapshot', disk.path, '--volume', 'demo/disk', '--name', 'monday');

  story.chapter('Tuesday: a day of work. Only what has changed is stored.');
  await story.shell(disk.work);
  await story.b2('snapshot', disk.path, '--name', 'tuesday');
  const before = await disk.digest();

  story.chapter('Wednesday: an accident, and nobody notices before the next snapshot.');
  await story.shell(disk.accident);
  await story.b2('snapshot', disk.path, '--name', 'wednesday');

  story.chapter('What there is to go back to, and what going back would change:');
  await story.b2('points', 'demo/disk');
  await story.b2('restore', 'demo/disk', disk.path, '--at', 'tuesday', '--plan');

  story.chapter('Back to Tuesday. Only what differs is written, then everything is read back.');
  await story.b2('restore', 'demo/disk', disk.path, '--at', 'tuesday', '--force');
  if ((await disk.digest()) !== before) {
    throw new B2Error('failed', `the disk ${disk.path} is not as it was on Tuesday`, {
      hint: 'This is a fault of b2: please report it.',
    });
  }
  await story.shell(disk.look);

  const watch = await watched(story, disk);

  story.chapter('Is the repository sound? Every byte of it is read and checked.');
  await story.b2('verify', '--data', 'all');
  return watch;
}

/**
 * Runs the demo. Whatever happens the disk is detached, and without `keep` everything is removed; kind `interrupted` on a
 * signal, `failed` if a command does not end well.
 */
export async function runDemo(options: DemoOptions): Promise<DemoResult> {
  const { show, keep, clock } = options;
  const startNs = clock.monotonicNs();
  const dir = await makeDir(keep);
  let disk: ScratchDisk | undefined;
  let story: Story | undefined;
  let watch: DemoResult['watch'] | undefined;
  let failure: Error | undefined;
  // The path of a socket must be short, and the one of `keep` may be long.
  const runtime = await mkdtemp(join(tmpdir(), 'b2-demo-run-'));
  try {
    const { shown, all } = demoEnvironment(options.env, dir);
    disk = await makeScratchDisk(dir, {
      kinds: options.disks,
      random: options.random,
      note: (text) => show({ type: 'chapter', text }),
    });
    story = new Story(options, dir, { ...all, B2_RUNTIME_DIR: runtime });
    story.chapter(`The disk is ${disk.path}: ${disk.what}.`);
    const exports = Object.entries(shown).map(([name, value]) => `${name}=${quoted(value)}`);
    show({ type: 'command', command: `cd ${quoted(dir)}` });
    show({ type: 'command', command: `export ${exports.join(' ')}` });
    watch = await tell(story, disk);
  } catch (error) {
    failure = error instanceof Error ? error : new Error(messageOf(error));
  }
  // The watch and the disk come first: a file that a loop device shows cannot be given up.
  try {
    await story?.close();
    await disk?.close();
    await rm(runtime, { recursive: true, force: true });
    if (keep === undefined) await rm(dir, { recursive: true, force: true });
  } catch (error) {
    failure ??= new B2Error('failed', `cannot remove ${dir}: ${messageOf(error)}`, {
      cause: error,
      hint: `Look with "losetup" and "mount" for what uses it, then remove it by hand.`,
    });
  }
  if (failure !== undefined) throw failure;
  if (disk === undefined || watch === undefined) throw new Error('the demo ended without a disk');
  return {
    dir,
    kept: keep !== undefined,
    disk: disk.path,
    diskKind: disk.kind,
    same: true,
    watch,
    elapsedSeconds: Number(clock.monotonicNs() - startNs) / 1e9,
  };
}
