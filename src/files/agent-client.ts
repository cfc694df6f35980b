/** The other end of agent.ts. */
import { spawn, type ChildProcess } from 'node:child_process';
import { fileURLToPath } from 'node:url';

import { B2Error } from '../errors.js';
import { workerFile } from '../workers.js';
import type { AgentAnswers, AgentQuestion, AgentReply, AgentRequest } from './agent-protocol.js';
import type { KernelEnvironment } from './kernel.js';
import { TOOL_ENV } from './tools.js';

/** Asks. Rejects with an Error whose `code` is that of the system call (`ENOENT`, …), or with kind `failed` where the agent has ended. */
export class FilesAgent {
  readonly #child: ChildProcess;
  readonly #ended: Promise<void>;
  readonly #waiting = new Map<
    number,
    { readonly resolve: (value: unknown) => void; readonly reject: (error: Error) => void }
  >();
  #next = 1;
  #isEnded = false;

  /** Starts it in the namespace of `environment`, which must outlive it. */
  constructor(environment: KernelEnvironment) {
    const file = fileURLToPath(workerFile(new URL('./agent.js', import.meta.url)));
    this.#child = spawn('nsenter', [...environment.enter, process.execPath, file], {
      stdio: ['ignore', 'ignore', 'ignore', environment.namespaceFd, 'ipc'],
      serialization: 'advanced',
      env: { ...TOOL_ENV },
      cwd: '/',
      detached: true,
    });
    this.#child.on('message', (reply: AgentReply) => this.#take(reply));
    this.#ended = new Promise((resolve) => {
      const gone = (): void => {
        this.#gone();
        resolve();
      };
      // Not `close`: it does not come where this end has closed the channel.
      this.#child.once('exit', gone);
      this.#child.once('error', gone);
    });
  }

  #take(reply: AgentReply): void {
    const waiting = this.#waiting.get(reply.id);
    this.#waiting.delete(reply.id);
    if ('code' in reply)
      waiting?.reject(Object.assign(new Error(reply.code), { code: reply.code }));
    else waiting?.resolve(reply.value);
  }

  #gone(): void {
    this.#isEnded = true;
    for (const { reject } of this.#waiting.values()) reject(ended());
    this.#waiting.clear();
  }

  /** True when it answers nothing any more. */
  get isEnded(): boolean {
    return this.#isEnded;
  }

  ask<Q extends AgentQuestion>(question: Q): Promise<AgentAnswers[Q['op']]> {
    if (this.#isEnded) return Promise.reject(ended());
    return new Promise((resolve, reject) => {
      const id = this.#next++;
      this.#waiting.set(id, {
        resolve: (value) => resolve(value as AgentAnswers[Q['op']]),
        reject,
      });
      const request: AgentRequest = { id, question };
      this.#child.send(request, (error) => {
        // It has gone, and the news of that is on its way.
        if (error !== null && error !== undefined) this.#gone();
      });
    });
  }

  async close(): Promise<void> {
    if (this.#child.connected) this.#child.disconnect();
    await this.#ended;
  }
}

function ended(): B2Error {
  return new B2Error('failed', 'the process that reads the file systems has ended');
}
