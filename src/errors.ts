/**
 * The one error type of the program and the exit codes of the command line (cli.md, "code").
 *
 * A {@link B2Error} is for a person at 3 a.m.: `message` says what failed, on which device or file and
 * why; `hint` says what to do next. Anything else that is thrown is a bug and is reported as one.
 */

/** Exit codes. They are an interface: documented in b2(1), tested, never renumbered. */
export const ExitCode = {
  ok: 0,
  failed: 1,
  usage: 2,
  partial: 3,
  notFound: 4,
  damage: 5,
  overLimit: 6,
  noRepository: 10,
  leaseHeld: 11,
  wrongKey: 12,
  interrupted: 130,
} as const;
export type ExitCode = (typeof ExitCode)[keyof typeof ExitCode];

/**
 * What kind of failure it is, for code that must react:
 * - `not-found`: the named thing does not exist;
 * - `exists`: an exclusive creation found it there already;
 * - `no-space`: the store or target is full (permanent until somebody makes room; never retried blindly);
 * - `io`: a device or store failed a read or write (`retryable` says whether trying again can help);
 * - `damaged`: bytes are not what their checksum, tag or chain says;
 * - `wrong-key`: password or key file does not open the repository;
 * - `refused`: b2 declines because going on could cost data;
 * - `lost-claim`: another writer has taken over this volume;
 * - `usage`, `config`: bad input; `unsupported`: cannot be done here; `held`: another's lease;
 * - `no-repository`; `interrupted`; `failed`: everything else.
 */
export type ErrorKind =
  | 'not-found'
  | 'exists'
  | 'no-space'
  | 'io'
  | 'damaged'
  | 'wrong-key'
  | 'refused'
  | 'lost-claim'
  | 'usage'
  | 'config'
  | 'unsupported'
  | 'held'
  | 'no-repository'
  | 'interrupted'
  | 'failed';

const CODE_OF_KIND: Record<ErrorKind, ExitCode> = {
  'not-found': ExitCode.notFound,
  exists: ExitCode.failed,
  'no-space': ExitCode.failed,
  io: ExitCode.failed,
  damaged: ExitCode.damage,
  'wrong-key': ExitCode.wrongKey,
  refused: ExitCode.failed,
  'lost-claim': ExitCode.leaseHeld,
  usage: ExitCode.usage,
  config: ExitCode.usage,
  unsupported: ExitCode.failed,
  held: ExitCode.leaseHeld,
  'no-repository': ExitCode.noRepository,
  interrupted: ExitCode.interrupted,
  failed: ExitCode.failed,
};

export interface B2ErrorOptions {
  /** What to do next, one sentence, shown under the message. */
  readonly hint?: string;
  readonly cause?: unknown;
  /** True where the same call may succeed later without anybody doing something. Default false. */
  readonly retryable?: boolean;
  /** Overrides the exit code that follows from `kind`. */
  readonly code?: ExitCode;
}

/** See the file comment. `message` must never contain a secret. */
export class B2Error extends Error {
  override readonly name = 'B2Error';
  readonly kind: ErrorKind;
  readonly code: ExitCode;
  readonly hint: string | undefined;
  readonly retryable: boolean;

  constructor(kind: ErrorKind, message: string, options: B2ErrorOptions = {}) {
    super(message, options.cause === undefined ? undefined : { cause: options.cause });
    this.kind = kind;
    this.code = options.code ?? CODE_OF_KIND[kind];
    this.hint = options.hint;
    this.retryable = options.retryable ?? false;
  }
}

/** The `code` of a Node system error (`ENOENT`, …), or undefined for anything else. */
export function errnoOf(error: unknown): string | undefined {
  if (typeof error !== 'object' || error === null || !('code' in error)) return undefined;
  return typeof error.code === 'string' ? error.code : undefined;
}

/** True for a {@link B2Error} of one of `kinds`. */
export function isKind(error: unknown, ...kinds: readonly ErrorKind[]): error is B2Error {
  return error instanceof B2Error && kinds.includes(error.kind);
}

/** The message of anything thrown, for use inside another message. */
export function messageOf(error: unknown): string {
  return error instanceof Error ? error.message : String(error);
}

/**
 * Wraps a system error as a {@link B2Error} that names the operation and the file or device; a B2Error is
 * returned as it is. ENOENT → `not-found`, EEXIST → `exists`, ENOSPC/EDQUOT → `no-space`, the rest → `io`.
 */
export function ioError(operation: string, path: string, error: unknown): B2Error {
  if (error instanceof B2Error) return error;
  const errno = errnoOf(error);
  const text = `${operation} ${path}: ${messageOf(error)}`;
  switch (errno) {
    case 'ENOENT':
      return new B2Error('not-found', text, { cause: error });
    case 'EEXIST':
      return new B2Error('exists', text, { cause: error });
    case 'ENOSPC':
    case 'EDQUOT':
      return new B2Error('no-space', text, {
        cause: error,
        hint: 'Make room on that file system; nothing that was acknowledged is lost.',
      });
    case 'EACCES':
    case 'EPERM':
      return new B2Error('io', text, {
        cause: error,
        hint:
          process.geteuid?.() === 0
            ? 'Root is refused, too: check its permissions (lsattr, read-only, NFS with root_squash), and what this container or unit may (DeviceAllow, ProtectSystem).'
            : 'Run as root, or check the permissions.',
      });
    default:
      return new B2Error('io', text, {
        cause: error,
        retryable: errno === 'EIO' || errno === 'EAGAIN' || errno === 'ETIMEDOUT',
      });
  }
}
