/** QMP: the JSON lines by which QEMU is asked and told (docs/interop/qmp-spec of QEMU), over a unix socket. */
import { connect, type Socket } from 'node:net';

import type { Clock } from '../clock.js';
import { B2Error, messageOf } from '../errors.js';

/** An answer that says no. */
export class QmpError extends Error {
  override readonly name = 'QmpError';
  /** `GenericError`, `CommandNotFound`, … */
  readonly errorClass: string;

  constructor(errorClass: string, message: string) {
    super(message);
    this.errorClass = errorClass;
  }
}

interface Waiting {
  readonly resolve: (value: unknown) => void;
  readonly reject: (error: Error) => void;
}

/** A line longer than this is not QEMU's. */
const MAX_LINE = 16 * 1024 * 1024;
const RETRY_MS = 20;
const ANSWER_MS = 30_000;

/** One connection, ready for commands. Events are not listened to. */
export class Qmp {
  private readonly socket: Socket;
  private readonly clock: Clock;
  private readonly waiting = new Map<number, Waiting>();
  private rest = '';
  private lastId = 0;
  private end: Error | undefined;

  constructor(socket: Socket, clock: Clock) {
    this.socket = socket;
    this.clock = clock;
    socket.setEncoding('utf8').on('data', (text: string) => this.take(text));
    socket.on('error', (error) => this.stop(error));
    socket.on('close', () => this.stop(new Error('QEMU has closed the connection')));
  }

  /**
   * Connects as soon as QEMU listens there, for at most `withinMs`, and ends the negotiation. Gives up when `signal` aborts. Kind
   * `failed`.
   */
  static async open(
    path: string,
    clock: Clock,
    withinMs: number,
    signal?: AbortSignal,
  ): Promise<Qmp> {
    const untilNs = clock.monotonicNs() + BigInt(withinMs) * 1_000_000n;
    for (;;) {
      let qmp: Qmp | undefined;
      const stop = (): void => qmp?.close();
      signal?.addEventListener('abort', stop, { once: true });
      try {
        qmp = new Qmp(await connected(path), clock);
        if (signal?.aborted === true) stop();
        await qmp.command('qmp_capabilities');
        return qmp;
      } catch (error) {
        stop();
        if (signal?.aborted === true || clock.monotonicNs() > untilNs) {
          throw new B2Error('failed', `QEMU does not answer: ${messageOf(error)}`, {
            cause: error,
          });
        }
        await clock.sleep(RETRY_MS, signal);
      } finally {
        signal?.removeEventListener('abort', stop);
      }
    }
  }

  /**
   * Resolves to what the command returns; rejects with {@link QmpError}, or when the connection ends: as it does when nothing is
   * answered for half a minute.
   */
  async command(execute: string, args: Readonly<Record<string, unknown>> = {}): Promise<unknown> {
    if (this.end !== undefined) throw this.end;
    const id = ++this.lastId;
    const answered = new AbortController();
    void this.clock.sleep(ANSWER_MS, answered.signal).then(() => {
      if (!answered.signal.aborted) this.socket.destroy(new Error(`no answer to ${execute}`));
    });
    try {
      return await new Promise((resolve, reject) => {
        this.waiting.set(id, { resolve, reject });
        this.socket.write(`${JSON.stringify({ execute, arguments: args, id })}\n`);
      });
    } finally {
      answered.abort();
    }
  }

  close(): void {
    this.socket.destroy();
  }

  private take(text: string): void {
    this.rest += text;
    if (this.rest.length > MAX_LINE) this.socket.destroy(new Error('a line without an end'));
    for (let at = this.rest.indexOf('\n'); at >= 0; at = this.rest.indexOf('\n')) {
      const line = this.rest.slice(0, at).trim();
      this.rest = this.rest.slice(at + 1);
      if (line !== '') this.answered(line);
    }
  }

  private answered(line: string): void {
    let message: {
      readonly id?: unknown;
      readonly return?: unknown;
      readonly error?: { readonly class?: unknown; readonly desc?: unknown };
    };
    try {
      message = JSON.parse(line) as typeof message;
    } catch (error) {
      this.socket.destroy(new Error(`not JSON: ${line.slice(0, 100)}`, { cause: error }));
      return;
    }
    // The greeting and events carry no id.
    if (typeof message.id !== 'number') return;
    const waiting = this.waiting.get(message.id);
    this.waiting.delete(message.id);
    const { error } = message;
    if (error === undefined) waiting?.resolve(message.return);
    else waiting?.reject(new QmpError(String(error.class), String(error.desc)));
  }

  private stop(error: Error): void {
    this.end ??= error;
    for (const waiting of this.waiting.values()) waiting.reject(this.end);
    this.waiting.clear();
  }
}

function connected(path: string): Promise<Socket> {
  return new Promise((resolve, reject) => {
    const socket = connect(path);
    socket.once('connect', () => {
      socket.off('error', reject);
      resolve(socket);
    });
    socket.once('error', reject);
  });
}
