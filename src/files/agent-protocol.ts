/** What a mount asks the process that stands in the mount namespace of a {@link KernelEnvironment}, over Node's own channel. */

/** Attributes of a name, as lstat(2) has them. */
export interface AgentStat {
  readonly device: bigint;
  readonly inode: bigint;
  readonly mode: number;
  readonly links: number;
  readonly uid: number;
  readonly gid: number;
  /** Device number of a device node. */
  readonly rdev: bigint;
  readonly sizeBytes: number;
  /** Allocated, in units of 512 bytes. */
  readonly blocks: number;
  readonly atimeNs: bigint;
  readonly mtimeNs: bigint;
  readonly ctimeNs: bigint;
}

/** Paths are bytes. Their directories are no symbolic links: what asks has looked at each of them. */
export type AgentQuestion =
  | { readonly op: 'lstat' | 'readlink' | 'open' | 'listxattr'; readonly path: Uint8Array }
  | { readonly op: 'readdir'; readonly path: Uint8Array }
  | { readonly op: 'getxattr'; readonly path: Uint8Array; readonly name: Uint8Array }
  | {
      readonly op: 'read';
      readonly handle: number;
      readonly offset: number;
      readonly length: number;
    }
  | {
      readonly op: 'seek';
      readonly handle: number;
      readonly offset: number;
      readonly what: 'data' | 'hole';
    }
  | { readonly op: 'close'; readonly handle: number };

/** The values that answers carry, by operation. */
export interface AgentAnswers {
  readonly lstat: AgentStat;
  readonly readlink: Uint8Array;
  /** Names and their type bits of the mode (0 where unknown). */
  readonly readdir: readonly { readonly name: Uint8Array; readonly type: number }[];
  /** A handle. */
  readonly open: number;
  /** Less than asked for only at the end of the file. */
  readonly read: Uint8Array;
  readonly seek: number | undefined;
  readonly close: undefined;
  readonly getxattr: Uint8Array;
  /** Names, each with a NUL behind it. */
  readonly listxattr: Uint8Array;
}

export interface AgentRequest {
  readonly id: number;
  readonly question: AgentQuestion;
}

export type AgentReply =
  | { readonly id: number; readonly value: unknown }
  /** `code`: `ENOENT` and the like. */
  | { readonly id: number; readonly code: string };
