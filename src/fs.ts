/**
 * Files that must survive a power cut. Everything in the program that saves state on a local file system goes
 * through {@link writeFileDurable}.
 *
 * The protocol: write a temporary file in the same directory, fsync it, rename it over the name (or link it, if
 * the name must be new), fsync the directory. A crash at any moment leaves the old file or the new one, and
 * perhaps a temporary file, which {@link sweepTemporaryFiles} removes later.
 */
import { createHash } from 'node:crypto';
import fs from 'node:fs';
import { lstat, readFile, readdir, stat } from 'node:fs/promises';
import { constants } from 'node:os';
import path from 'node:path';
import { systemRandom } from './clock.js';
import { B2Error, errnoOf, ioError } from './errors.js';
import { currentIdentity, isProvablyDead } from './process-identity.js';

/**
 * The system calls that change or read files, as promises through libuv's thread pool. They reject with Node's
 * system errors. Tests hand in their own to make calls fail or fall short.
 */
export interface FileCalls {
  open(path: string, flags: number, mode?: number): Promise<number>;
  close(fd: number): Promise<void>;
  /** One pread; resolves to the bytes read, which may be fewer than asked for. */
  read(fd: number, into: Uint8Array, position: number): Promise<number>;
  /** One pwrite; resolves to the bytes written, which may be fewer than asked for. */
  write(fd: number, data: Uint8Array, position: number): Promise<number>;
  fsync(fd: number): Promise<void>;
  fdatasync(fd: number): Promise<void>;
  fstat(fd: number): Promise<fs.Stats>;
  rename(from: string, to: string): Promise<void>;
  link(from: string, to: string): Promise<void>;
  unlink(path: string): Promise<void>;
  mkdir(path: string, mode: number): Promise<void>;
}

type Callback = (error: NodeJS.ErrnoException | null) => void;

function call(run: (done: Callback) => void): Promise<void> {
  return new Promise((resolve, reject) => {
    run((error) => (error === null ? resolve() : reject(error)));
  });
}

function callFor<T>(
  run: (done: (error: NodeJS.ErrnoException | null, value: T) => void) => void,
): Promise<T> {
  return new Promise((resolve, reject) => {
    run((error, value) => (error === null ? resolve(value) : reject(error)));
  });
}

/** The real calls. */
export const systemFileCalls: FileCalls = {
  open: (name, flags, mode) => callFor((done) => fs.open(name, flags, mode, done)),
  close: (fd) => call((done) => fs.close(fd, done)),
  read: (fd, into, position) =>
    callFor((done) => fs.read(fd, into, 0, into.length, position, done)),
  write: (fd, data, position) =>
    callFor((done) => fs.write(fd, data, 0, data.length, position, done)),
  fsync: (fd) => call((done) => fs.fsync(fd, done)),
  fdatasync: (fd) => call((done) => fs.fdatasync(fd, done)),
  fstat: (fd) => callFor((done) => fs.fstat(fd, done)),
  rename: (from, to) => call((done) => fs.rename(from, to, done)),
  link: (from, to) => call((done) => fs.link(from, to, done)),
  unlink: (name) => call((done) => fs.unlink(name, done)),
  mkdir: (name, mode) => call((done) => fs.mkdir(name, { mode }, done)),
};

/** One system call moves at most this much; the kernel's own limit is a little under 2 GiB. */
const MAX_CALL_BYTES = 1 << 30;

/** Reads at `position` until `into` is full or the file ends; resolves to the bytes read. System errors. */
export async function readFully(
  calls: FileCalls,
  fd: number,
  into: Uint8Array,
  position: number,
): Promise<number> {
  let done = 0;
  while (done < into.length) {
    const part = into.subarray(done, Math.min(into.length, done + MAX_CALL_BYTES));
    const n = await calls.read(fd, part, position + done);
    if (n === 0) break;
    done += n;
  }
  return done;
}

/** Writes all of `data` at `position`, however many calls it takes. System errors. */
export async function writeFully(
  calls: FileCalls,
  fd: number,
  data: Uint8Array,
  position: number,
): Promise<void> {
  let done = 0;
  while (done < data.length) {
    const part = data.subarray(done, Math.min(data.length, done + MAX_CALL_BYTES));
    const n = await calls.write(fd, part, position + done);
    if (n === 0) throw new Error('the file system wrote nothing and gave no reason');
    done += n;
  }
}

/** Makes the entries of a directory durable (names made, replaced and removed before the call). System errors. */
export async function fsyncDirectory(
  directory: string,
  calls: FileCalls = systemFileCalls,
): Promise<void> {
  const fd = await calls.open(directory, fs.constants.O_RDONLY | fs.constants.O_DIRECTORY);
  try {
    await calls.fsync(fd);
  } catch (error) {
    // Some network and FUSE file systems cannot sync a directory and say so; there is nothing more to do there.
    if (errnoOf(error) !== 'EINVAL' && errnoOf(error) !== 'ENOTSUP') throw error;
  } finally {
    await calls.close(fd);
  }
}

/**
 * Makes a directory and its missing parents, each one durable in its parent before the next is made.
 * Existing directories are left alone. Rejects with B2Error.
 */
export async function mkdirDurable(
  directory: string,
  mode = 0o700,
  calls: FileCalls = systemFileCalls,
): Promise<void> {
  await makeDirectory(path.resolve(directory), mode, calls, false);
}

/** `hasParent`: its parent was just made or found. If that does not help (below /proc), nothing will. */
async function makeDirectory(
  absolute: string,
  mode: number,
  calls: FileCalls,
  hasParent: boolean,
): Promise<void> {
  try {
    await calls.mkdir(absolute, mode);
  } catch (error) {
    const errno = errnoOf(error);
    const parent = path.dirname(absolute);
    if (errno === 'ENOENT' && parent !== absolute && !hasParent) {
      await makeDirectory(parent, mode, calls, false);
      return await makeDirectory(absolute, mode, calls, true);
    }
    if (errno !== 'EEXIST' && errno !== 'EISDIR') throw ioError('make directory', absolute, error);
    const found = await lstatIfExists(absolute);
    if (found?.isDirectory() === true) return;
    if (found?.isSymbolicLink() === true) {
      if (await leadsSomewhere(absolute)) return;
      throw new B2Error('io', `${absolute} is a symbolic link to what is not there`, {
        cause: error,
        hint: 'Is the disk mounted that it leads to?',
      });
    }
    throw new B2Error('io', `make directory ${absolute}: something else of that name is there`, {
      cause: error,
    });
  }
  try {
    await fsyncDirectory(path.dirname(absolute), calls);
  } catch (error) {
    throw ioError('make directory', absolute, error);
  }
}

async function leadsSomewhere(link: string): Promise<boolean> {
  try {
    await stat(link);
    return true;
  } catch (error) {
    if (errnoOf(error) === 'ENOENT') return false;
    throw ioError('look at', link, error);
  }
}

async function lstatIfExists(file: string): Promise<fs.Stats | undefined> {
  try {
    return await lstat(file);
  } catch (error) {
    const errno = errnoOf(error);
    if (errno === 'ENOENT' || errno === 'ENOTDIR') return undefined;
    throw ioError('look at', file, error);
  }
}

/** The bytes of a file, or undefined if there is none. Rejects with B2Error. */
export async function readIfExists(file: string): Promise<Buffer | undefined> {
  try {
    return await readFile(file);
  } catch (error) {
    const errno = errnoOf(error);
    if (errno === 'ENOENT' || errno === 'ENOTDIR') return undefined;
    throw ioError('read', file, error);
  }
}

/**
 * Directory fsyncs that share one call: a caller is served by an fsync that began after it asked. Many files
 * saved into one directory at the same time then cost one or two fsyncs of it, not one each.
 */
export class DirectorySyncs {
  readonly #calls: FileCalls;
  readonly #running = new Map<string, Promise<void>>();
  readonly #next = new Map<string, Promise<void>>();

  constructor(calls: FileCalls = systemFileCalls) {
    this.#calls = calls;
  }

  /** As {@link fsyncDirectory}. */
  sync(directory: string): Promise<void> {
    const waiting = this.#next.get(directory);
    if (waiting !== undefined) return waiting;
    const running = this.#running.get(directory);
    if (running === undefined) return this.#start(directory);
    const next = running
      .catch(() => undefined)
      .then(() => {
        this.#next.delete(directory);
        return this.#start(directory);
      });
    this.#next.set(directory, next);
    return next;
  }

  #start(directory: string): Promise<void> {
    const running = fsyncDirectory(directory, this.#calls).finally(() => {
      if (this.#running.get(directory) === running) this.#running.delete(directory);
    });
    this.#running.set(directory, running);
    return running;
  }
}

// A temporary file's name: `~b2-` process table, pid, start, random `~`. The tilde keeps it apart from every
// object name of a store. The process table is a digest of boot and namespaces, so that a file of another host
// on a shared file system is never taken for one of a dead process here.
const TEMPORARY = /^~b2-([0-9a-f]{12})-(\d+)-(\d*)-[0-9a-f]{16}~$/;

function tableDigest(): string {
  const { bootId, namespaces } = currentIdentity();
  return createHash('sha256').update(`${bootId} ${namespaces}`).digest('hex').slice(0, 12);
}

/** A new name for a temporary file of this process. */
export function temporaryName(): string {
  const { pid, startTicks } = currentIdentity();
  const unique = Buffer.from(systemRandom(8)).toString('hex');
  return `~b2-${tableDigest()}-${pid}-${startTicks}-${unique}~`;
}

/** True for the name of a temporary file made by {@link writeFileDurable}, of whatever process. */
export function isTemporaryName(name: string): boolean {
  return TEMPORARY.test(name);
}

/** Temporary files of processes that we cannot judge are left alone for this long. */
const TEMPORARY_MAX_AGE_MS = 24 * 3600 * 1000;

/**
 * Removes temporary files directly in `directory` that no process can still need: those of processes of this
 * machine that are provably dead, and any older than a day at wall time `nowNs`. Removing one too early (a
 * wrong clock) makes its writer's save fail with an error; it harms no data. Resolves to how many were
 * removed. What cannot be read or removed is left: it is garbage, not a failure.
 */
export async function sweepTemporaryFiles(
  directory: string,
  nowNs: bigint,
  calls: FileCalls = systemFileCalls,
): Promise<number> {
  let names: string[];
  try {
    names = await readdir(directory);
  } catch {
    return 0;
  }
  const table = tableDigest();
  let removed = 0;
  for (const name of names) {
    const match = TEMPORARY.exec(name);
    if (match === null) continue;
    const file = path.join(directory, name);
    const dead =
      match[1] === table &&
      isProvablyDead({ ...currentIdentity(), pid: Number(match[2]), startTicks: match[3] ?? '' });
    try {
      const ageMs = Number(nowNs / 1_000_000n) - (await lstat(file)).mtimeMs;
      if (!dead && ageMs < TEMPORARY_MAX_AGE_MS) continue;
      await calls.unlink(file);
      removed++;
    } catch {
      // Swept by somebody else, or not ours to remove.
    }
  }
  return removed;
}

export interface WriteDurableOptions {
  /** Permissions of the new file. Default 0600. */
  readonly mode?: number;
  /** Fail with kind `exists` if the name is taken; exact also between processes and hosts. */
  readonly ifAbsent?: boolean;
  readonly calls?: FileCalls;
  /** Shares directory fsyncs with others. */
  readonly syncs?: DirectorySyncs;
}

/**
 * A file in the making: parts go to a temporary file, and `commit` gives it its name. All methods reject with
 * B2Error. Call `abandon` in a `finally`: it removes what was not committed.
 */
export class DurableFile {
  readonly #file: string;
  readonly #temporary: string;
  readonly #fd: number;
  readonly #calls: FileCalls;
  readonly #options: WriteDurableOptions;
  #sizeBytes = 0;
  #open = true;
  #left = true;

  private constructor(file: string, temporary: string, fd: number, options: WriteDurableOptions) {
    this.#file = file;
    this.#temporary = temporary;
    this.#fd = fd;
    this.#calls = options.calls ?? systemFileCalls;
    this.#options = options;
  }

  /** Makes the temporary file. The directory must exist (else `not-found`). */
  static async begin(file: string, options: WriteDurableOptions = {}): Promise<DurableFile> {
    const temporary = path.join(path.dirname(file), temporaryName());
    const { O_WRONLY, O_CREAT, O_EXCL, O_NOFOLLOW } = fs.constants;
    const flags = O_WRONLY | O_CREAT | O_EXCL | O_NOFOLLOW;
    try {
      const calls = options.calls ?? systemFileCalls;
      const fd = await calls.open(temporary, flags, options.mode ?? 0o600);
      return new DurableFile(file, temporary, fd, options);
    } catch (error) {
      throw ioError('write', file, error);
    }
  }

  /** Adds bytes at the end. One call at a time. */
  async write(data: Uint8Array): Promise<void> {
    try {
      await writeFully(this.#calls, this.#fd, data, this.#sizeBytes);
      this.#sizeBytes += data.length;
    } catch (error) {
      throw ioError('write', this.#file, error);
    }
  }

  /** Makes the bytes durable, gives them their name, and makes that durable. */
  async commit(): Promise<void> {
    const directory = path.dirname(this.#file);
    try {
      await this.#calls.fsync(this.#fd);
      // Closed before it has its name: some network file systems report a failed write only here.
      await this.#close();
      if (this.#options.ifAbsent === true) {
        this.#left = await placeNew(this.#calls, this.#temporary, this.#file);
        if (this.#left) await this.#calls.unlink(this.#temporary);
      } else {
        await this.#calls.rename(this.#temporary, this.#file);
      }
      this.#left = false;
      await (this.#options.syncs?.sync(directory) ?? fsyncDirectory(directory, this.#calls));
    } catch (error) {
      throw ioError('write', this.#file, error);
    }
  }

  /** Removes the temporary file unless it was committed. Never rejects: what it cannot remove, the sweep will. */
  async abandon(): Promise<void> {
    try {
      await this.#close();
    } catch {
      // The error that matters is the one that led here.
    }
    if (!this.#left) return;
    this.#left = false;
    await this.#calls.unlink(this.#temporary).catch(() => undefined);
  }

  async #close(): Promise<void> {
    if (!this.#open) return;
    this.#open = false;
    await this.#calls.close(this.#fd);
  }
}

/**
 * Saves `data` as `file`, atomically and durably (see the file comment). The directory must exist. Rejects with
 * B2Error (`exists`, `no-space`, `not-found` if the directory is missing, `io`); then the old file or the new
 * one is there, and the call may be repeated.
 */
export async function writeFileDurable(
  file: string,
  data: Uint8Array,
  options: WriteDurableOptions = {},
): Promise<void> {
  const temporary = await DurableFile.begin(file, options);
  try {
    await temporary.write(data);
    await temporary.commit();
  } finally {
    await temporary.abandon();
  }
}

/**
 * Gives a finished temporary file its name unless that name is taken (EEXIST). Resolves to true if the temporary
 * name is still there. System errors.
 */
async function placeNew(calls: FileCalls, temporary: string, file: string): Promise<boolean> {
  try {
    await calls.link(temporary, file);
    return true;
  } catch (error) {
    switch (errnoOf(error)) {
      case 'EEXIST': {
        // A network file system may repeat a request whose answer was lost: then the name is our own file.
        const [ours, there] = await Promise.all([lstatIfExists(temporary), lstatIfExists(file)]);
        if (ours !== undefined && ours.ino === there?.ino && ours.dev === there.dev) return true;
        throw error;
      }
      case 'EPERM':
      case 'ENOTSUP':
      case 'EOPNOTSUPP':
      case 'ENOSYS':
      case 'EMLINK':
        // A file system without hard links (FAT, exFAT, some FUSE and SMB).
        await renameNoReplace(temporary, file);
        return false;
      default:
        throw error;
    }
  }
}

interface Libc {
  renameat2(fromDir: number, from: string, toDir: number, to: string, flags: number): number;
  errno(): number;
}
let libc: Libc | undefined;

/** AT_FDCWD and RENAME_NOREPLACE of linux/fcntl.h and linux/fs.h. */
const AT_FDCWD = -100;
const RENAME_NOREPLACE = 1;

/**
 * renameat2(2) with RENAME_NOREPLACE: EEXIST if `to` is taken. Rejects with a system error; with a B2Error
 * `unsupported` where the file system cannot do it either. The call itself blocks, because errno is only
 * certain on the calling thread; it is one change of a directory in memory.
 */
export async function renameNoReplace(from: string, to: string): Promise<void> {
  if (libc === undefined) {
    const { default: koffi } = await import('koffi');
    const renameat2 = koffi
      .load(null)
      .func('int renameat2(int, const char *, int, const char *, unsigned int)');
    libc = {
      renameat2: (...args) => Number(renameat2(...args)),
      errno: () => koffi.errno(),
    };
  }
  if (libc.renameat2(AT_FDCWD, from, AT_FDCWD, to, RENAME_NOREPLACE) === 0) return;
  const errno = libc.errno();
  const { EINVAL, ENOSYS, EOPNOTSUPP } = constants.errno;
  if (errno === EINVAL || errno === ENOSYS || errno === EOPNOTSUPP) {
    throw new B2Error(
      'unsupported',
      `write ${to}: this file system can neither link files nor rename without replacing`,
      { hint: 'Keep the repository on a Linux file system such as ext4, XFS or btrfs.' },
    );
  }
  const name = Object.entries(constants.errno).find(([, value]) => value === errno)?.[0];
  throw Object.assign(new Error(`renameat2 failed: ${name ?? errno}`), {
    code: name,
    errno: -errno,
  });
}
