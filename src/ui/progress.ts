/** The three ways to show {@link ProgressEvent}s: a moving line on a terminal, lines in a pipe, JSON lines. */
import type { Ora } from 'ora';
import type { Clock } from '../clock.js';
import type { ProgressEvent } from '../events.js';
import { formatBytes, formatDuration, formatPercent, formatRate, printable } from '../human.js';

/** In a pipe (a log, a mail from cron) a line this often is enough to see that it moves. */
const LINE_EVERY_NS = 30_000_000_000n;
const JSON_EVERY_NS = 1_000_000_000n;

export interface ProgressView {
  show(event: ProgressEvent): void;
  /** Calls `write`, which writes to stdout or stderr, so that it does not mix with the display. */
  around(write: () => void): void;
  /** Ends the display; called once, after the last event. */
  close(): void;
}

/** "reading /dev/sda: 1.2 GiB of 4.0 GiB (30.0%), 312.0 MiB/s, 9s left" */
export function progressText(event: ProgressEvent): string {
  const { phase, doneBytes, totalBytes, rateBytesPerSecond, etaSeconds } = event;
  const parts = [formatBytes(doneBytes)];
  if (totalBytes !== undefined) {
    const ratio = totalBytes === 0 ? 1 : Math.min(1, doneBytes / totalBytes);
    parts[0] = `${formatBytes(doneBytes)} of ${formatBytes(totalBytes)} (${formatPercent(ratio)})`;
  }
  if (rateBytesPerSecond > 0) parts.push(formatRate(rateBytesPerSecond));
  if (etaSeconds !== undefined && etaSeconds > 0) parts.push(`${formatDuration(etaSeconds)} left`);
  return `${printable(phase)}: ${parts.join(', ')}`;
}

/** Shows nothing (`--quiet`). */
export const noProgress: ProgressView = {
  show: () => undefined,
  around: (write) => write(),
  close: () => undefined,
};

/** For a pipe: silent for the first half minute, then one line per half minute. */
export function lineProgress(
  writeLine: (line: string) => void,
  clock: Pick<Clock, 'monotonicNs'>,
): ProgressView {
  let lastNs = clock.monotonicNs();
  return {
    show(event) {
      const nowNs = clock.monotonicNs();
      if (nowNs - lastNs < LINE_EVERY_NS) return;
      lastNs = nowNs;
      writeLine(progressText(event));
    },
    around: (write) => write(),
    close: () => undefined,
  };
}

/** For `--json`: events as they are, at most one a second of a phase, the last of every phase always. */
export function jsonProgress(
  writeRecord: (record: ProgressEvent) => void,
  clock: Pick<Clock, 'monotonicNs'>,
): ProgressView {
  let pending: ProgressEvent | undefined;
  let phase: string | undefined;
  let lastNs = 0n;
  const flush = (): void => {
    if (pending === undefined) return;
    writeRecord(pending);
    pending = undefined;
  };
  return {
    show(event) {
      const nowNs = clock.monotonicNs();
      if (event.phase !== phase) {
        flush();
        phase = event.phase;
        lastNs = nowNs - JSON_EVERY_NS;
      }
      pending = event;
      if (nowNs - lastNs < JSON_EVERY_NS) return;
      lastNs = nowNs;
      flush();
    },
    around(write) {
      flush();
      write();
    },
    close: flush,
  };
}

/** For a terminal: one moving line, drawn by ora, which is loaded when the first event comes. */
export function terminalProgress(stream: NodeJS.WriteStream): ProgressView {
  let spinner: Ora | undefined;
  let latest: ProgressEvent | undefined;
  let loading = false;
  let closed = false;

  const start = async (): Promise<void> => {
    const { default: ora } = await import('ora');
    if (closed || latest === undefined) return;
    // discardStdin would take Ctrl-C away from our own handler; whether to draw is decided here already.
    spinner = ora({
      stream,
      discardStdin: false,
      isEnabled: true,
      text: progressText(latest),
    }).start();
  };
  return {
    show(event) {
      latest = event;
      if (spinner !== undefined) {
        spinner.text = progressText(event);
      } else if (!loading) {
        loading = true;
        // Without ora the work goes on unseen; it must not fail for that.
        start().catch(() => undefined);
      }
    },
    // ora takes its line away for other writes to this stream, stdout and stderr by itself.
    around: (write) => write(),
    close() {
      closed = true;
      spinner?.stop();
      spinner = undefined;
    },
  };
}
