/** Runs the system's own tools (blkid, resize2fs, mount, …). */
import { execFile } from 'node:child_process';

import { B2Error, errnoOf, messageOf } from '../errors.js';

export interface ToolResult {
  /** Exit status. */
  readonly status: number;
  readonly stdout: string;
  readonly stderr: string;
}

/**
 * Runs `tool` with `args`, no shell, in the C locale, with an empty standard input. Resolves with whatever status it
 * ended; undefined if there is no such program. Rejects with `failed` if it was killed, by `timeoutMs` too.
 */
export type RunTool = (
  tool: string,
  args: readonly string[],
  timeoutMs: number,
) => Promise<ToolResult | undefined>;

/** sbin is not in every user's search path, and these tools live there. */
const SEARCH_PATH = `${process.env['PATH'] ?? ''}:/usr/local/sbin:/usr/sbin:/sbin:/usr/bin:/bin`;

export const runTool: RunTool = (tool, args, timeoutMs) =>
  new Promise((resolve, reject) => {
    const child = execFile(
      tool,
      [...args],
      {
        timeout: timeoutMs,
        killSignal: 'SIGTERM',
        maxBuffer: 16 * 1024 * 1024,
        env: { ...withoutSecrets(process.env), PATH: SEARCH_PATH, LC_ALL: 'C' },
      },
      (error, stdout, stderr) => {
        if (error === null) return resolve({ status: 0, stdout, stderr });
        if (errnoOf(error) === 'ENOENT') return resolve(undefined);
        if (typeof error.code === 'number') return resolve({ status: error.code, stdout, stderr });
        const why =
          error.signal === undefined || error.signal === null
            ? messageOf(error)
            : `ended by ${error.signal}`;
        return reject(new B2Error('failed', `${tool} ${args.join(' ')}: ${why}`, { cause: error }));
      },
    );
    child.stdin?.end();
  });

/** The tools need none of our passwords, and their environment can be read in /proc. */
function withoutSecrets(environment: NodeJS.ProcessEnv): NodeJS.ProcessEnv {
  return Object.fromEntries(
    Object.entries(environment).filter(([key]) => !/^(B2_|AWS_)/.test(key)),
  );
}

/** The last line that says something, for a message. */
export function lastWords(result: ToolResult): string {
  const lines = `${result.stdout}\n${result.stderr}`
    .split('\n')
    .map((line) => line.trim())
    .filter((line) => line !== '');
  return lines.at(-1) ?? `status ${result.status}`;
}
