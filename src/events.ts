/**
 * What engines tell while they work. Engines never print: they hand typed events to an {@link EventSink};
 * the renderers of src/ui show them on a terminal, as lines in a pipe, or as JSON lines on stderr.
 * Fields are added, never renamed: `--json` passes events through as they are.
 */

/** How far a long piece of work is. Sent at most a few times a second (see src/progress.ts). */
export interface ProgressEvent {
  readonly type: 'progress';
  /** What is being done, a few words in the present tense: "reading /dev/sda", "writing disk.img". */
  readonly phase: string;
  readonly doneBytes: number;
  /** Absent where the end is not known. */
  readonly totalBytes?: number;
  /** Smoothed over the last seconds; 0 until it is known. */
  readonly rateBytesPerSecond: number;
  /** Absent where the end or the rate is not known. */
  readonly etaSeconds?: number;
}

/** Something worth a line, but nothing to act on: which point was chosen, where a key was put. */
export interface NoteEvent {
  readonly type: 'note';
  readonly message: string;
}

/** As {@link NoteEvent}, shown with `--verbose` only. */
export interface DetailEvent {
  readonly type: 'detail';
  readonly message: string;
}

/** Something the user should act on although the command goes on. Shown with `--quiet` too. */
export interface WarningEvent {
  readonly type: 'warning';
  readonly message: string;
  /** What to do about it, one sentence. */
  readonly hint?: string;
}

export type B2Event = ProgressEvent | NoteEvent | DetailEvent | WarningEvent;

/** Takes an event at once and never throws; the caller does not wait for it to be shown. */
export type EventSink = (event: B2Event) => void;

/** For callers that want no events. */
export const ignoreEvents: EventSink = () => undefined;
