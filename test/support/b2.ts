/** The built program as a user starts it: its streams, exit codes and JSON, with an environment of its own. */
import { execFile, type ChildProcess } from 'node:child_process';
import { fileURLToPath } from 'node:url';
import type { TempDir } from './tmp.js';

/** `B2_TEST_PROGRAM`: another build than the one here (the benchmarks, which are compiled elsewhere). */
export const PROGRAM =
  process.env['B2_TEST_PROGRAM'] ?? fileURLToPath(new URL('../../bin/b2', import.meta.url));

export interface Ended {
  /** Exit code; undefined if a signal ended it. */
  readonly code: number | undefined;
  readonly signal: string | undefined;
  readonly stdout: string;
  readonly stderr: string;
}

export interface Started {
  readonly child: ChildProcess;
  readonly ended: Promise<Ended>;
}

type Variables = Readonly<Record<string, string | undefined>>;

/** What `--json` prints on stderr for an error. */
export interface JsonError {
  readonly type: 'error';
  readonly code: number;
  readonly message: string;
  readonly hint?: string;
}

/** Every line of `text`, parsed; throws where one is no JSON. */
export function jsonLines(text: string): Record<string, unknown>[] {
  return text
    .split('\n')
    .filter((line) => line !== '')
    .map((line) => JSON.parse(line) as Record<string, unknown>);
}

/** b2 with a repository, a cache, its state and a configuration below one directory, and nothing of the user's. */
export class B2 {
  readonly env: Variables;
  readonly repository: string;

  /** `env` adds to the environment; undefined takes away. */
  constructor(dir: TempDir, env: Variables = {}, repository = dir.join('repo')) {
    this.repository = repository;
    this.env = {
      PATH: process.env['PATH'],
      HOME: dir.join('home'),
      LC_ALL: 'C',
      TZ: 'UTC',
      B2_CONFIG: '/dev/null',
      B2_CACHE_DIR: dir.join('cache'),
      // Records of clean stops; root's lie below /var/lib/b2 else.
      XDG_STATE_HOME: dir.join('state'),
      B2_REPOSITORY: repository,
      ...env,
    };
  }

  start(args: readonly string[], env: Variables = {}, cwd?: string): Started {
    let child: ChildProcess | undefined;
    const ended = new Promise<Ended>((resolve, reject) => {
      child = execFile(
        PROGRAM,
        [...args],
        {
          env: { ...this.env, ...env },
          maxBuffer: 64 * 1024 * 1024,
          ...(cwd === undefined ? {} : { cwd }),
        },
        (error, stdout, stderr) => {
          if (error !== null && typeof error.code === 'string') return reject(error);
          return resolve({
            code: error === null ? 0 : typeof error.code === 'number' ? error.code : undefined,
            signal: error?.signal ?? undefined,
            stdout,
            stderr,
          });
        },
      );
      child.stdin?.end();
    });
    if (child === undefined) throw new Error('no child');
    return { child, ended };
  }

  /** Runs to the end, whatever comes out. */
  run(...args: readonly string[]): Promise<Ended> {
    return this.start(args).ended;
  }

  /** Runs with `--json` and returns the document on stdout; throws unless it ends with `code` (default 0). */
  async json<T>(args: readonly string[], code = 0, env: Variables = {}): Promise<T> {
    const done = await this.start(['--json', ...args], env).ended;
    if (done.code !== code) {
      throw new Error(
        `b2 ${args.join(' ')} ended with ${done.code ?? done.signal}, not ${code}:\n${done.stderr}${done.stdout}`,
      );
    }
    return JSON.parse(done.stdout) as T;
  }

  /** Runs with `--json` and returns its error; throws if it ends well or tells no error. */
  async error(args: readonly string[], env: Variables = {}): Promise<JsonError> {
    const done = await this.start(['--json', ...args], env).ended;
    const last = jsonLines(done.stderr).at(-1);
    if (
      done.code === 0 ||
      last?.['type'] !== 'error' ||
      last['code'] !== done.code ||
      done.stdout !== ''
    ) {
      throw new Error(
        `b2 ${args.join(' ')} ended with ${done.code}:\n${done.stderr}${done.stdout}`,
      );
    }
    return last as unknown as JsonError;
  }
}
