/** A running `b2 --json watch` of the built program: its lines as they come, signals, and its end. */
import { type ChildProcess } from 'node:child_process';
import type { B2, Ended } from './b2.js';

export interface WatchLine {
  readonly type: string;
  readonly [field: string]: unknown;
}

export class Watching {
  readonly lines: WatchLine[] = [];
  readonly ended: Promise<Ended>;
  private readonly child: ChildProcess;
  private rest = '';
  private stderr = '';
  private over: Ended | undefined;

  constructor(
    b2: B2,
    args: readonly string[],
    env: Readonly<Record<string, string | undefined>> = {},
  ) {
    const { child, ended } = b2.start(['--json', 'watch', ...args], env);
    this.child = child;
    child.stdout?.on('data', (data: string | Buffer) => {
      const parts = (this.rest + data.toString()).split('\n');
      this.rest = parts.pop() ?? '';
      for (const part of parts) this.lines.push(JSON.parse(part) as WatchLine);
    });
    child.stderr?.on('data', (data: string | Buffer) => (this.stderr += data.toString()));
    this.ended = ended.then((end) => (this.over = end));
  }

  /** The first line from `from` on for which `test` holds; throws if it has ended, or after two minutes. */
  async until(what: string, test: (line: WatchLine) => boolean, from = 0): Promise<WatchLine> {
    for (let i = 0; i < 6000; i++) {
      const found = this.lines.slice(from).find(test);
      if (found !== undefined) return found;
      if (this.over !== undefined) break;
      await new Promise((resolve) => setTimeout(resolve, 20));
    }
    throw new Error(
      `never: ${what}\n${this.lines.map((l) => JSON.stringify(l)).join('\n')}\n${this.stderr}`,
    );
  }

  state(device: string, state: string, from = 0): Promise<WatchLine> {
    const test = (l: WatchLine): boolean =>
      l.type === 'state' && l['device'] === device && l['state'] === state;
    return this.until(`${device} is ${state}`, test, from);
  }

  kill(signal: 'SIGTERM' | 'SIGINT' | 'SIGHUP' | 'SIGKILL'): void {
    this.child.kill(signal);
  }

  /** For the end of a test, whatever happened. */
  async finish(): Promise<void> {
    if (this.over === undefined) this.child.kill('SIGKILL');
    await this.ended;
  }
}
