/**
 * The one place that writes to stdout and stderr. Answers go to stdout; progress, notes, warnings and
 * errors to stderr. With `--json` both are JSON: one document (or lines) on stdout, lines on stderr.
 */
import type { Writable } from 'node:stream';
import type { Clock } from '../clock.js';
import { B2Error, ExitCode, errnoOf, messageOf } from '../errors.js';
import type { B2Event, EventSink } from '../events.js';
import { printable } from '../human.js';
import {
  jsonProgress,
  lineProgress,
  noProgress,
  terminalProgress,
  type ProgressView,
} from './progress.js';
import type { Style } from './style.js';

/** A stream to write to that may be a terminal: process.stdout, or any Writable in tests. */
export type OutputStream = Writable & { readonly isTTY?: boolean };

export interface RendererOptions {
  readonly stdout: OutputStream;
  readonly stderr: OutputStream;
  readonly json: boolean;
  readonly quiet: boolean;
  readonly verbose: boolean;
  readonly clock: Pick<Clock, 'monotonicNs'>;
  /** For stderr; stdout's is given to the command's `text`. */
  readonly stderrStyle: Style;
  /** False where a terminal cannot draw (TERM=dumb): progress comes as lines, as in a pipe. */
  readonly canDraw: boolean;
  /** Called once when stdout cannot be written any more; see {@link Renderer.outputFailure}. */
  readonly onOutputFailure?: () => void;
}

/** What is told of an error: see src/cli.ts, the only place that makes one from something thrown. */
export interface ErrorReport {
  readonly code: number;
  readonly message: string;
  readonly hint?: string;
  /** More lines: causes with `--verbose`, the stack of a bug. For people only, never in JSON. */
  readonly details: readonly string[];
}

export interface Renderer {
  readonly events: EventSink;
  /** True where a person reads stdout. */
  readonly interactive: boolean;
  line(record: { readonly type: string }, text: string): void;
  bytes(data: Uint8Array): Promise<void>;
  /** The command's answer; an empty text prints nothing, undefined data prints nothing with `--json`. */
  answer(data: unknown, text: string): void;
  error(report: ErrorReport): void;
  /** Why stdout could not take everything: `closed` is a reader that left (`| head`), else the reason. */
  outputFailure(): 'closed' | { readonly reason: string } | undefined;
  /** Ends progress and resolves when everything written has been handed to the system. */
  close(): Promise<void>;
}

function isTerminal(stream: OutputStream): stream is NodeJS.WriteStream {
  return stream.isTTY === true;
}

function chooseProgress(options: RendererOptions): ProgressView {
  const { stderr, json, quiet, clock } = options;
  if (quiet) return noProgress;
  if (json) return jsonProgress((record) => stderr.write(`${JSON.stringify(record)}\n`), clock);
  if (options.canDraw && isTerminal(stderr)) return terminalProgress(stderr);
  return lineProgress((line) => stderr.write(`${line}\n`), clock);
}

export function createRenderer(options: RendererOptions): Renderer {
  const { stdout, stderr, json, quiet, verbose, stderrStyle: style } = options;
  const progress = chooseProgress(options);
  let failure: 'closed' | { readonly reason: string } | undefined;
  let closed = false;

  const onStdoutError = (error: unknown): void => {
    if (failure !== undefined) return;
    failure = errnoOf(error) === 'EPIPE' ? 'closed' : { reason: messageOf(error) };
    options.onOutputFailure?.();
  };
  stdout.on('error', onStdoutError);
  // Nobody is left to tell when stderr is gone; the exit code still says how it ended.
  stderr.on('error', () => undefined);

  const toStdout = (text: string): void => {
    if (failure === undefined) progress.around(() => stdout.write(text));
  };
  const toStderr = (text: string): void => {
    progress.around(() => stderr.write(text));
  };
  const record = (value: object): void => toStderr(`${JSON.stringify(value)}\n`);
  const indented = (text: string): string => `    ${printable(text)}\n`;

  const showEvent = (event: B2Event): void => {
    switch (event.type) {
      case 'progress':
        progress.show(event);
        return;
      case 'note':
        if (quiet) return;
        if (json) record(event);
        else toStderr(`${printable(event.message)}\n`);
        return;
      case 'detail':
        if (!verbose || quiet) return;
        if (json) record(event);
        else toStderr(`${style.dim(printable(event.message))}\n`);
        return;
      case 'warning':
        if (json) {
          record(event);
          return;
        }
        toStderr(
          `${style.yellow('b2: warning:')} ${printable(event.message)}\n` +
            (event.hint === undefined ? '' : indented(event.hint)),
        );
        return;
    }
  };

  return {
    events(event) {
      if (!closed) showEvent(event);
    },
    interactive: stdout.isTTY === true && !json && !quiet,
    line(value, text) {
      toStdout(json ? `${JSON.stringify(value)}\n` : `${text}\n`);
    },
    bytes(data) {
      return new Promise((resolve, reject) => {
        stdout.write(data, (error) => {
          if (error === null || error === undefined) {
            resolve();
            return;
          }
          onStdoutError(error);
          reject(
            new B2Error('failed', `cannot write to the standard output: ${error.message}`, {
              code: ExitCode.partial,
              cause: error,
            }),
          );
        });
      });
    },
    answer(data, text) {
      if (json) {
        if (data !== undefined) toStdout(`${JSON.stringify(data)}\n`);
      } else if (text !== '') {
        toStdout(`${text}\n`);
      }
    },
    error({ code, message, hint, details }) {
      if (json) {
        record({ type: 'error', code, message, ...(hint === undefined ? {} : { hint }) });
        return;
      }
      toStderr(
        `${style.red('b2:')} ${message.split('\n').map(printable).join('\n    ')}\n` +
          (hint === undefined ? '' : indented(hint)) +
          details.map(indented).join(''),
      );
    },
    outputFailure: () => failure,
    async close() {
      if (closed) return;
      closed = true;
      progress.close();
      const drained = (stream: OutputStream): Promise<void> =>
        new Promise((resolve) => {
          if (stream.destroyed || stream.writableEnded) resolve();
          else stream.write('', () => resolve());
        });
      await Promise.all([drained(stdout), drained(stderr)]);
    },
  };
}
