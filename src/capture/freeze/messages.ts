/** What a {@link Freezer} and its helper process say to each other: a line of JSON each, over pipes. */

/** A file system to freeze. */
export interface FreezeTarget {
  readonly path: string;
  /** As the list of mounts has it; the helper refuses a path that leads elsewhere. */
  readonly devNumber: string;
}

export type Request =
  /** Opens the file systems, and notes them where {@link thawStale} finds them. */
  | { readonly op: 'open'; readonly targets: readonly FreezeTarget[] }
  /** Freezes what is open, in that order, for at most that long. */
  | { readonly op: 'freeze'; readonly boundMs: number }
  /** Thaws, and closes. */
  | { readonly op: 'thaw' }
  /** Answered with `alive` at once, whatever is under way. */
  | { readonly op: 'ping' };

/** What is said between the answers. */
export interface Alive {
  readonly type: 'alive';
}

/** One to each request but `ping`, in order; one `ready` first. */
export type Answer =
  | { readonly type: 'ready' }
  | { readonly type: 'opened' }
  | { readonly type: 'frozen' }
  | {
      readonly type: 'thawed';
      /** True if every file system was frozen from the answer `frozen` until this request, and was thawed by it. */
      readonly held: boolean;
      /** From the first freeze until the last thaw. */
      readonly frozenMs: number;
      /** Why not `held`. */
      readonly why: string | undefined;
    }
  | {
      readonly type: 'failed';
      /** Index of the file system. */
      readonly target: number;
      readonly errno: string | undefined;
      readonly message: string;
    };

/** Splits a stream of text into lines; the returned function takes what arrives. */
export function lineReader(onLine: (line: string) => void): (text: string) => void {
  let rest = '';
  return (text) => {
    rest += text;
    for (let end = rest.indexOf('\n'); end >= 0; end = rest.indexOf('\n')) {
      const line = rest.slice(0, end);
      rest = rest.slice(end + 1);
      onLine(line);
    }
  };
}

/** Where file systems that are frozen at the moment are noted: `PID` each, in memory, gone with the next boot. */
export const STALE_DIR = '/run/b2/frozen';
