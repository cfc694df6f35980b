/**
 * A repository in a directory of a local (or mounted) file system. See store.ts for the contract.
 *
 * An object's name is its path below the root. Files have mode 0600, directories 0700. Anything below the root
 * whose name is not an object's name (temporary files, lost+found) is not seen; a symbolic link in the place of
 * an object or a directory is an error, because what it leads to is not known to be this repository's.
 *
 * Reads and appends of large pieces go around the page cache (O_DIRECT) where the memory allows it. The kernel
 * keeps both ways coherent on one file: a direct read first writes back, and a direct write drops, what the
 * cache holds of that range.
 *
 * The directory may go away and come back while the store is open: a disk that is plugged in again, a network file
 * system that is mounted anew. It is then another directory to the kernel (st_dev, inode). It is taken for the same
 * repository if its object `config` is that repository's; until then every write fails (`io`), above all into the
 * empty mount point. Files that were open for appending stay with what has gone: their appends fail from then on.
 */
import fs from 'node:fs';
import { lstat, open, readdir, realpath, stat, statfs } from 'node:fs/promises';
import path from 'node:path';
import { readCached } from '../cached-read.js';
import { type Clock, systemClock } from '../clock.js';
import { B2Error, errnoOf, ioError, isKind, messageOf } from '../errors.js';
import { decodeConfig } from '../format/config.js';
import { CONFIG_NAME } from '../format/names.js';
import {
  DirectorySyncs,
  DurableFile,
  type FileCalls,
  mkdirDurable,
  readFully,
  sweepTemporaryFiles,
  systemFileCalls,
  writeFileDurable,
  writeFully,
} from '../fs.js';
import { DIRECT_ALIGN_BYTES, isPageAligned } from '../memory.js';
import {
  type Appender,
  checkName,
  type GetRange,
  type ObjectInfo,
  type ObjectReader,
  type PutOptions,
  type Store,
  type StoreSpace,
} from './store.js';

const { O_RDONLY, O_WRONLY, O_CREAT, O_EXCL, O_NOFOLLOW, O_DIRECT, O_DIRECTORY, O_NONBLOCK } =
  fs.constants;

/** Below this the page cache is the faster way. */
const DIRECT_MIN_BYTES = 128 * 1024;
/** One call cannot move more than 2 GiB. */
const DIRECT_MAX_BYTES = 1 << 30;
/** How many files `list` looks at at a time; more than libuv's threads gains nothing. */
const LIST_BATCH = 32;
/** More than any `config` has. */
const MAX_CONFIG_BYTES = 1024 * 1024;

export interface DirectoryStoreOptions {
  /** Make the directory (and its parents) if it is missing. Otherwise that is kind `no-repository`. */
  readonly create?: boolean;
  readonly calls?: FileCalls;
  readonly clock?: Clock;
  /** False: always through the page cache. Default true. */
  readonly directIo?: boolean;
}

/** What the open files of a store share: whether direct I/O works on its file system. */
class DirectIo {
  readonly #calls: FileCalls;
  #works: boolean;

  constructor(calls: FileCalls, enabled: boolean) {
    this.#calls = calls;
    this.#works = enabled;
  }

  /** True if this piece may be tried directly. */
  suits(data: Uint8Array, position: number): boolean {
    return (
      this.#works &&
      data.length >= DIRECT_MIN_BYTES &&
      data.length <= DIRECT_MAX_BYTES &&
      data.length % DIRECT_ALIGN_BYTES === 0 &&
      position % DIRECT_ALIGN_BYTES === 0 &&
      isPageAligned(data)
    );
  }

  /** A second descriptor of the same open file (not of whatever has its name now) for direct I/O. */
  async reopen(fd: number, access: number): Promise<number | undefined> {
    try {
      return await this.#calls.open(`/proc/self/fd/${fd}`, access | O_DIRECT);
    } catch {
      this.giveUp();
      return undefined;
    }
  }

  /** The file system cannot do it (tmpfs, some FUSE): do not try again. */
  giveUp(): void {
    this.#works = false;
  }
}

/** See {@link openDirectoryStore}. */
class DirectoryStore implements Store {
  readonly url: string;
  readonly canAppend = true;
  readonly #root: string;
  #rootFd: number;
  #rootStat: fs.Stats;
  /** The object `config` as this store last saw it; undefined where there is none yet. */
  #config: Buffer | undefined;
  /** Counts the directories that the root's path has led to. */
  #generation = 0;
  #returning: Promise<boolean> | undefined;
  readonly #calls: FileCalls;
  readonly #clock: Clock;
  #syncs: DirectorySyncs;
  readonly #direct: DirectIo;
  /** Directories (relative, '' is the root) known to be real ones, and those also made durable. */
  readonly #plain = new Map<string, Promise<void>>();
  readonly #prepared = new Map<string, Promise<void>>();
  #closed = false;

  constructor(
    url: string,
    root: string,
    rootFd: number,
    rootStat: fs.Stats,
    config: Buffer | undefined,
    options: DirectoryStoreOptions,
  ) {
    this.url = url;
    this.#root = root;
    this.#rootFd = rootFd;
    this.#rootStat = rootStat;
    this.#config = config;
    this.#calls = options.calls ?? systemFileCalls;
    this.#clock = options.clock ?? systemClock;
    this.#syncs = new DirectorySyncs(this.#calls);
    this.#direct = new DirectIo(this.#calls, options.directIo ?? true);
  }

  async put(name: string, data: Uint8Array, options: PutOptions = {}): Promise<void> {
    const file = this.#path(name);
    await this.#writing(name, 'write', async () => {
      await this.#refuseDirectory(file);
      await writeFileDurable(file, data, {
        ifAbsent: options.ifAbsent === true,
        calls: this.#calls,
        syncs: this.#syncs,
      });
    });
    if (name === CONFIG_NAME) this.#config = Buffer.from(data);
  }

  async putStream(name: string, parts: AsyncIterable<Uint8Array>): Promise<void> {
    const file = this.#path(name);
    // The parts can be taken once, so nothing may fail for want of a directory after that: begin with one.
    const temporary = await this.#writing(name, 'write', async () => {
      await this.#refuseDirectory(file);
      return DurableFile.begin(file, { calls: this.#calls, syncs: this.#syncs });
    });
    try {
      for await (const part of parts) await temporary.write(part);
      await temporary.commit();
    } finally {
      await temporary.abandon();
    }
  }

  async get(name: string, range?: GetRange): Promise<Buffer> {
    const { fd, info } = await this.#openExisting(name, O_RDONLY);
    try {
      const from = range?.offset ?? 0;
      const length = Math.max(0, Math.min(range?.length ?? info.size, info.size - from));
      const into = Buffer.allocUnsafeSlow(length);
      const n = await readFully(this.#calls, fd, into, from);
      return n === length ? into : into.subarray(0, n);
    } catch (error) {
      throw ioError('read', this.#path(name), error);
    } finally {
      await this.#calls.close(fd);
    }
  }

  async open(name: string): Promise<ObjectReader> {
    const { fd, info } = await this.#openExisting(name, O_RDONLY);
    return new FileReader(this.#path(name), fd, info.size, this.#calls, this.#direct);
  }

  async stat(name: string): Promise<ObjectInfo | undefined> {
    const file = this.#path(name);
    try {
      await this.#requirePlain(parentOf(name));
      return objectInfo(name, file, await lstat(file));
    } catch (error) {
      if (!isMissing(error)) throw ioError('look at', file, error);
      await this.#checkRoot();
      return undefined;
    }
  }

  async *list(prefix: string): AsyncIterable<ObjectInfo> {
    if (prefix !== '') checkName(prefix);
    await this.#checkRoot();
    const directories = [prefix];
    for (;;) {
      const directory = directories.pop();
      if (directory === undefined) return;
      const absolute = path.join(this.#root, directory);
      let entries: fs.Dirent[];
      try {
        await this.#requirePlain(directory);
        entries = await readdir(absolute, { withFileTypes: true });
      } catch (error) {
        if (isMissing(error)) continue;
        throw ioError('list', absolute, error);
      }
      const files: string[] = [];
      for (const entry of entries) {
        const name = directory === '' ? entry.name : `${directory}/${entry.name}`;
        if (!isObjectName(entry.name)) continue;
        if (entry.isDirectory()) directories.push(name);
        else files.push(name);
      }
      for (let i = 0; i < files.length; i += LIST_BATCH) {
        const batch = files.slice(i, i + LIST_BATCH).map(async (name) => this.#statForList(name));
        for (const info of await Promise.all(batch)) if (info !== undefined) yield info;
      }
    }
  }

  async delete(name: string): Promise<void> {
    const file = this.#path(name);
    const directory = parentOf(name);
    try {
      await this.#requirePlain(directory);
      try {
        await this.#calls.unlink(file);
      } catch (error) {
        // A directory of that name is not an object. A name that is gone may have gone without an fsync yet.
        const isDirectory = errnoOf(error) === 'EISDIR' || errnoOf(error) === 'EPERM';
        if (isDirectory && !(await lstat(file)).isDirectory()) throw error;
        if (!isDirectory && errnoOf(error) !== 'ENOENT') throw error;
      }
      await this.#syncs.sync(path.dirname(file));
    } catch (error) {
      if (!isMissing(error)) throw ioError('delete', file, error);
      await this.#checkRoot();
    }
  }

  async openAppend(name: string, mode: 'create' | 'existing'): Promise<Appender> {
    const file = this.#path(name);
    const generation = this.#generation;
    const opened = (fd: number, sizeBytes: number): Appender =>
      new FileAppender(file, fd, sizeBytes, this.#calls, this.#direct, {
        syncName: () => this.#syncs.sync(path.dirname(file)),
        isThere: () => this.#generation === generation,
      });
    if (mode === 'existing') {
      const { fd, info } = await this.#openExisting(name, O_WRONLY);
      try {
        // The one who made it may have crashed before the directories were durable.
        await this.#prepare(parentOf(name));
      } catch (error) {
        await this.#calls.close(fd);
        throw ioError('open', file, error);
      }
      return opened(fd, info.size);
    }
    return this.#writing(name, 'create', async () => {
      const fd = await this.#calls.open(file, O_WRONLY | O_CREAT | O_EXCL | O_NOFOLLOW, 0o600);
      return opened(fd, 0);
    });
  }

  async space(): Promise<StoreSpace | undefined> {
    try {
      const { bavail, blocks, bsize } = await statfs(this.#root);
      return { freeBytes: bavail * bsize, totalBytes: blocks * bsize };
    } catch (error) {
      throw ioError('measure', this.#root, error);
    }
  }

  async close(): Promise<void> {
    if (this.#closed) return;
    this.#closed = true;
    await this.#calls.close(this.#rootFd);
  }

  #path(name: string): string {
    checkName(name);
    return path.join(this.#root, name);
  }

  async #statForList(name: string): Promise<ObjectInfo | undefined> {
    const file = path.join(this.#root, name);
    try {
      return objectInfo(name, file, await lstat(file));
    } catch (error) {
      if (errnoOf(error) === 'ENOENT') return undefined; // deleted meanwhile
      throw ioError('list', file, error);
    }
  }

  async #openExisting(name: string, access: number): Promise<{ fd: number; info: fs.Stats }> {
    const file = this.#path(name);
    let fd: number | undefined;
    try {
      await this.#requirePlain(parentOf(name));
      // O_NONBLOCK: opening a FIFO that somebody put here must not wait for ever.
      fd = await this.#calls.open(file, access | O_NOFOLLOW | O_NONBLOCK);
      const info = await this.#calls.fstat(fd);
      if (info.isFile()) return { fd, info };
      if (!info.isDirectory()) throw foreign(file, 'not a regular file');
      throw Object.assign(new Error('no such object'), { code: 'ENOENT' });
    } catch (error) {
      if (fd !== undefined) await this.#calls.close(fd);
      if (errnoOf(error) === 'ELOOP') throw foreign(file, 'a symbolic link');
      if (isMissing(error) || errnoOf(error) === 'EISDIR') {
        await this.#checkRoot();
        throw new B2Error('not-found', `${file} does not exist`, { cause: error });
      }
      throw ioError('open', file, error);
    }
  }

  /** Runs `work`, which makes a name, in prepared directories; once more if somebody removed them meanwhile. */
  async #writing<T>(name: string, operation: string, work: () => Promise<T>): Promise<T> {
    const file = path.join(this.#root, name);
    const directory = parentOf(name);
    try {
      await this.#checkRoot();
      await this.#prepare(directory);
      try {
        return await work();
      } catch (error) {
        if (errnoOf(error) !== 'ENOENT' && !isKind(error, 'not-found')) throw error;
        this.#plain.clear();
        this.#prepared.clear();
        await this.#prepare(directory);
        return await work();
      }
    } catch (error) {
      throw ioError(operation, file, error);
    }
  }

  /** Rename would replace a directory only if empty, with a puzzling message otherwise. */
  async #refuseDirectory(file: string): Promise<void> {
    const found = await lstat(file).catch((error: unknown) => {
      if (errnoOf(error) === 'ENOENT') return undefined;
      throw error;
    });
    if (found?.isDirectory() === true) throw foreign(file, 'a directory');
    if (found !== undefined) requireFile(file, found);
  }

  /**
   * Rejects (`io`) if the root's path does not lead to the directory that was opened: its file system has been
   * unmounted, or another mounted over it, and that is not this repository again. Otherwise an empty mount point
   * would look like an empty repository, and backups would go to the wrong disk.
   */
  async #checkRoot(): Promise<void> {
    if (this.#isRoot(await stat(this.#root).catch(() => undefined))) return;
    this.#returning ??= this.#takeBack().finally(() => (this.#returning = undefined));
    if (await this.#returning) return;
    throw new B2Error(
      'io',
      `the repository's directory ${this.#root} is not the one that was opened: unmounted, moved or replaced`,
      { hint: 'Mount its file system again; a command that has ended must be repeated.' },
    );
  }

  #isRoot(found: fs.Stats | undefined): boolean {
    return found?.ino === this.#rootStat.ino && found.dev === this.#rootStat.dev;
  }

  /** Goes on with the directory that the root's path leads to now. False, and nothing has changed, if it is not this repository. */
  async #takeBack(): Promise<boolean> {
    let fd: number | undefined;
    try {
      fd = await this.#calls.open(this.#root, O_RDONLY | O_DIRECTORY);
      const found = await this.#calls.fstat(fd);
      if (!this.#isRoot(found)) {
        const config = await readConfig(fd);
        if (this.#closed || !isSameRepository(this.#config, config)) return false;
        const gone = this.#rootFd;
        this.#rootFd = fd;
        this.#rootStat = found;
        this.#config = config;
        this.#generation++;
        this.#plain.clear();
        this.#prepared.clear();
        this.#syncs = new DirectorySyncs(this.#calls);
        fd = gone;
      }
      return true;
    } catch {
      return false; // missing, or a file system that is going
    } finally {
      // What has gone may say so once more.
      if (fd !== undefined) await this.#calls.close(fd).catch(() => undefined);
    }
  }

  /** Checks once that every directory down to `directory` is a real one, not a link out of the repository. */
  #requirePlain(directory: string): Promise<void> {
    return remember(this.#plain, directory, async () => {
      if (directory === '') return;
      await this.#requirePlain(parentOf(directory));
      const absolute = path.join(this.#root, directory);
      const found = await lstat(absolute);
      if (found.isSymbolicLink()) throw foreign(absolute, 'a symbolic link');
      if (!found.isDirectory()) {
        throw Object.assign(new Error(`${absolute} is not a directory`), { code: 'ENOTDIR' });
      }
    });
  }

  /**
   * Once per directory: makes it if missing, makes its name durable (also when another process has just made it
   * and has not come so far), and sweeps what crashed writers left in it.
   */
  #prepare(directory: string): Promise<void> {
    return remember(this.#prepared, directory, async () => {
      const absolute = path.join(this.#root, directory);
      if (directory !== '') {
        await this.#prepare(parentOf(directory));
        await this.#checkRoot();
        await this.#calls.mkdir(absolute, 0o700).catch((error: unknown) => {
          if (errnoOf(error) !== 'EEXIST') throw error;
        });
        await this.#requirePlain(directory);
        await this.#syncs.sync(path.dirname(absolute));
      }
      await sweepTemporaryFiles(absolute, this.#clock.nowNs(), this.#calls);
    });
  }
}

/** The promise kept for `key`, or that of `work`, which is forgotten if it fails. */
function remember(
  kept: Map<string, Promise<void>>,
  key: string,
  work: () => Promise<void>,
): Promise<void> {
  const found = kept.get(key);
  if (found !== undefined) return found;
  const made = work();
  kept.set(key, made);
  made.catch(() => {
    if (kept.get(key) === made) kept.delete(key);
  });
  return made;
}

/** The object `config` below an open root; undefined where it is missing or cannot be one. */
async function readConfig(rootFd: number): Promise<Buffer | undefined> {
  try {
    const file = await open(
      `/proc/self/fd/${rootFd}/${CONFIG_NAME}`,
      O_RDONLY | O_NOFOLLOW | O_NONBLOCK,
    );
    try {
      const info = await file.stat();
      return info.isFile() && info.size <= MAX_CONFIG_BYTES ? await file.readFile() : undefined;
    } finally {
      await file.close();
    }
  } catch {
    return undefined;
  }
}

/** The same bytes; or, as keys may have been added meanwhile by others, the same repository id. */
function isSameRepository(known: Buffer | undefined, found: Buffer | undefined): boolean {
  if (known === undefined || found === undefined) return false;
  if (known.equals(found)) return true;
  try {
    return decodeConfig(known).id === decodeConfig(found).id;
  } catch {
    return false;
  }
}

function parentOf(name: string): string {
  return name.slice(0, Math.max(0, name.lastIndexOf('/')));
}

function isObjectName(segment: string): boolean {
  try {
    checkName(segment);
    return true;
  } catch {
    return false;
  }
}

function isMissing(error: unknown): boolean {
  const errno = errnoOf(error);
  return errno === 'ENOENT' || errno === 'ENOTDIR';
}

function foreign(file: string, what: string): B2Error {
  return new B2Error('io', `${file} is ${what}, which does not belong in a repository`, {
    hint: 'Find out who put it there; to keep a repository elsewhere, move it whole and change its URL.',
  });
}

function requireFile(file: string, found: fs.Stats): void {
  if (found.isSymbolicLink()) throw foreign(file, 'a symbolic link');
  if (!found.isFile()) throw foreign(file, 'not a regular file');
}

/** Undefined for a directory: it is not an object. */
function objectInfo(name: string, file: string, found: fs.Stats): ObjectInfo | undefined {
  if (found.isDirectory()) return undefined;
  requireFile(file, found);
  return { name, sizeBytes: found.size, modifiedMs: found.mtimeMs };
}

/** One or two descriptors of one file, closed only when no call uses them any more. */
class OpenFile {
  readonly fd: number;
  readonly file: string;
  readonly #calls: FileCalls;
  readonly #direct: DirectIo;
  readonly #access: number;
  #directFd: Promise<number | undefined> | undefined;
  #users = 0;
  #idle: (() => void) | undefined;
  #closing: Promise<void> | undefined;

  constructor(file: string, fd: number, access: number, calls: FileCalls, direct: DirectIo) {
    this.file = file;
    this.fd = fd;
    this.#access = access;
    this.#calls = calls;
    this.#direct = direct;
  }

  /** Runs `work` unless closed; `close` waits for it. */
  async use<T>(work: () => Promise<T>): Promise<T> {
    if (this.#closing !== undefined) throw new Error(`${this.file} is used after it was closed`);
    this.#users++;
    try {
      return await work();
    } finally {
      this.#users--;
      if (this.#users === 0) this.#idle?.();
    }
  }

  /**
   * Does `transfer` with a direct descriptor where that suits, and resolves to its result; undefined means: go
   * through the page cache.
   */
  async direct(
    data: Uint8Array,
    position: number,
    transfer: (fd: number) => Promise<number>,
  ): Promise<number | undefined> {
    if (!this.#direct.suits(data, position)) return undefined;
    this.#directFd ??= this.#direct.reopen(this.fd, this.#access);
    const fd = await this.#directFd;
    if (fd === undefined) return undefined;
    try {
      return await transfer(fd);
    } catch (error) {
      if (errnoOf(error) !== 'EINVAL') throw error;
      this.#direct.giveUp();
      return undefined;
    }
  }

  close(): Promise<void> {
    this.#closing ??= this.#close();
    return this.#closing;
  }

  async #close(): Promise<void> {
    if (this.#users > 0) await new Promise<void>((resolve) => (this.#idle = resolve));
    const directFd = await this.#directFd;
    if (directFd !== undefined) await this.#calls.close(directFd);
    await this.#calls.close(this.fd);
  }
}

/** Frames, pages and footers: what is longer is read past the page cache, or by the threads. */
const MAX_CACHED_BYTES = 128 * 1024;

class FileReader implements ObjectReader {
  readonly sizeBytes: number;
  readonly #calls: FileCalls;
  readonly #open: OpenFile;

  constructor(file: string, fd: number, sizeBytes: number, calls: FileCalls, direct: DirectIo) {
    this.sizeBytes = sizeBytes;
    this.#calls = calls;
    this.#open = new OpenFile(file, fd, O_RDONLY, calls, direct);
  }

  read(into: Uint8Array, offset: number): Promise<number> {
    return this.#open.use(async () => {
      try {
        const known =
          into.length <= MAX_CACHED_BYTES && this.#calls === systemFileCalls
            ? readCached(this.#open.fd, into, offset)
            : undefined;
        const first =
          known ??
          (await this.#open.direct(into, offset, (fd) => this.#calls.read(fd, into, offset)));
        // A short direct read ends at the end of the file, or somewhere unaligned: the cache reads on from there.
        const done = first ?? 0;
        if (done === into.length) return done;
        const rest = into.subarray(done);
        return done + (await readFully(this.#calls, this.#open.fd, rest, offset + done));
      } catch (error) {
        throw ioError('read', this.#open.file, error);
      }
    });
  }

  close(): Promise<void> {
    return this.#open.close();
  }
}

interface AppenderPlace {
  /** Makes the file's name durable. */
  readonly syncName: () => Promise<void>;
  /** False once the root's path leads to another directory than that in which the file was opened. */
  readonly isThere: () => boolean;
}

class FileAppender implements Appender {
  readonly #calls: FileCalls;
  readonly #open: OpenFile;
  readonly #place: AppenderPlace;
  #sizeBytes: number;
  /** The last append, and the last sync, that were asked for; neither ever rejects. */
  #appends: Promise<void> = Promise.resolve();
  #syncs: Promise<void> = Promise.resolve();
  #nameDurable = false;
  #failure: B2Error | undefined;

  constructor(
    file: string,
    fd: number,
    sizeBytes: number,
    calls: FileCalls,
    direct: DirectIo,
    place: AppenderPlace,
  ) {
    this.#calls = calls;
    this.#sizeBytes = sizeBytes;
    this.#place = place;
    this.#open = new OpenFile(file, fd, O_WRONLY, calls, direct);
  }

  get sizeBytes(): number {
    return this.#sizeBytes;
  }

  append(data: Uint8Array): Promise<void> {
    const position = this.#sizeBytes;
    this.#sizeBytes += data.length;
    const before = this.#appends;
    const done = this.#open.use(() =>
      before.then(() => this.#guard('append to', () => this.#write(data, position))),
    );
    this.#appends = done.catch(() => undefined);
    return done;
  }

  sync(): Promise<void> {
    const appends = this.#appends;
    const before = this.#syncs;
    // One at a time: the kernel reports a failed write-back once, and the second of two would miss it.
    const done = this.#open.use(async () => {
      await before;
      await appends;
      await this.#guard('sync', async () => {
        await this.#calls.fdatasync(this.#open.fd);
        if (!this.#nameDurable) await this.#place.syncName();
        this.#nameDurable = true;
      });
    });
    this.#syncs = done.catch(() => undefined);
    return done;
  }

  close(): Promise<void> {
    return this.#open.close();
  }

  async #write(data: Uint8Array, position: number): Promise<void> {
    const first = await this.#open.direct(data, position, (fd) =>
      this.#calls.write(fd, data, position),
    );
    const done = first ?? 0;
    if (done < data.length) {
      await writeFully(this.#calls, this.#open.fd, data.subarray(done), position + done);
    }
  }

  /**
   * Runs one step. After a failure nothing more is tried: the kernel may have dropped the pages it could not
   * write, and would call the next fsync a success.
   */
  async #guard(operation: string, step: () => Promise<void>): Promise<void> {
    if (this.#failure === undefined) {
      try {
        await step();
        if (!this.#place.isThere()) {
          throw new B2Error(
            'io',
            `${operation} ${this.#open.file}: the repository's directory was mounted anew after this file was opened`,
          );
        }
        // A write that failed while this sync ran leaves its promise unclear too: better to say so.
        if (this.#failure === undefined) return;
      } catch (error) {
        const found = ioError(operation, this.#open.file, error);
        this.#failure = new B2Error(found.kind, found.message, {
          cause: error,
          ...(found.hint === undefined ? {} : { hint: found.hint }),
        });
        throw this.#failure;
      }
    }
    throw new B2Error(
      this.#failure.kind,
      `${operation} ${this.#open.file}: its end is unknown since an earlier failure (${messageOf(this.#failure)})`,
      { cause: this.#failure },
    );
  }
}

/**
 * Opens the repository directory `root`. Holds a descriptor of it, so that its file system cannot be unmounted
 * by accident, until `close`. Rejects with B2Error: `no-repository` if it is missing (and not `create`), `io`.
 */
export async function openDirectoryStore(
  root: string,
  options: DirectoryStoreOptions = {},
): Promise<Store> {
  const calls = options.calls ?? systemFileCalls;
  const url = path.resolve(root);
  if (options.create === true) await mkdirDurable(url, 0o700, calls);
  try {
    const real = await realpath(url);
    const fd = await calls.open(real, O_RDONLY | O_DIRECTORY);
    try {
      const info = await calls.fstat(fd);
      return new DirectoryStore(url, real, fd, info, await readConfig(fd), options);
    } catch (error) {
      await calls.close(fd);
      throw error;
    }
  } catch (error) {
    if (errnoOf(error) === 'ENOENT') {
      throw new B2Error('no-repository', `there is no repository at ${url}: no such directory`, {
        cause: error,
        hint: `Make one with: b2 --repo ${url} init`,
      });
    }
    if (errnoOf(error) === 'ENOTDIR') {
      throw new B2Error('no-repository', `there is no repository at ${url}: not a directory`, {
        cause: error,
      });
    }
    throw ioError('open', url, error);
  }
}
