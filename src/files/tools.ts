/** Starting the programs that the backends use. */
import { spawn, type ChildProcess } from 'node:child_process';
import { accessSync, constants } from 'node:fs';
import { join } from 'node:path';
import type { Readable } from 'node:stream';

import { B2Error, messageOf } from '../errors.js';
import type { Running } from './environment.js';

/** sbin is not in every user's search path, and these tools live there. */
export const SEARCH_PATH = `${process.env['PATH'] ?? ''}:/usr/local/sbin:/usr/sbin:/sbin:/usr/bin:/bin`;

/** All that tools get of our environment: it may hold passwords, and theirs can be read in /proc. */
export const TOOL_ENV: Readonly<Record<string, string>> = { PATH: SEARCH_PATH, LC_ALL: 'C' };

/** Absolute path of a program; undefined where it is not installed. */
export function findProgram(name: string): string | undefined {
  for (const directory of SEARCH_PATH.split(':')) {
    if (directory === '') continue;
    const path = join(directory, name);
    try {
      accessSync(path, constants.X_OK);
      return path;
    } catch {
      continue;
    }
  }
  return undefined;
}

/** Of what a tool says on stderr at most this much is kept, from both ends. */
const KEPT_STDERR = 64 * 1024;

/** Collects what comes, without keeping more than a part of it. */
export function collectText(stream: Readable): () => string {
  let head = '';
  let tail = '';
  stream.setEncoding('utf8').on('data', (text: string) => {
    if (head.length < KEPT_STDERR) head += text;
    else tail = (tail + text).slice(-KEPT_STDERR);
  });
  return () => head + tail;
}

/** Status of a child that has ended; rejects where it could not start. A signal counts as 128 and more, as in a shell. */
export function childEnd(child: ChildProcess, name: string): Promise<number> {
  return new Promise((resolve, reject) => {
    child.once('error', (error) => {
      reject(new B2Error('failed', `cannot run ${name}: ${messageOf(error)}`, { cause: error }));
    });
    child.once('close', (code, signal) => resolve(code ?? (signal === 'SIGKILL' ? 137 : 143)));
  });
}

/** Runs `program` with a script of sh as its standard input. */
export function runScript(
  program: string,
  args: readonly string[],
  script: Buffer,
  fd?: number,
): Running {
  const child = spawn(program, [...args], {
    stdio: ['pipe', 'pipe', 'pipe', ...(fd === undefined ? [] : [fd])],
    env: TOOL_ENV,
    cwd: '/',
    // Ctrl-C in our terminal is for us: we end it in order.
    detached: true,
  });
  const { stdin, stdout, stderr } = child;
  if (stdin === null || stdout === null || stderr === null) throw new Error('no pipes');
  const said = collectText(stderr);
  const ended = childEnd(child, program).then((status) => ({ status, stderr: said() }));
  ended.catch(() => undefined);
  // Where it ends before it has read everything, its status tells.
  stdin.on('error', () => undefined);
  stdin.end(script);
  return { stdout, ended };
}

/** Reads a running script's output to the end. */
export async function outputOf(
  running: Running,
): Promise<{ readonly status: number; readonly stdout: Buffer; readonly stderr: string }> {
  const parts: Buffer[] = [];
  for await (const part of running.stdout) parts.push(part as Buffer);
  return { ...(await running.ended), stdout: Buffer.concat(parts) };
}
