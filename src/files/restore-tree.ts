/**
 * A file or tree of an image, put into a directory.
 *
 * GNU tar unpacks it into a new directory of our own inside the target (mode 0700), and from there everything is moved to its
 * place by rename, so that nothing that was there before can lead it elsewhere: no symbolic link is followed, and what shows at a
 * path is either what was there or all of what is restored. Before the first rename it is known that nothing stands in the way.
 */
import { spawn } from 'node:child_process';
import type { BigIntStats, PathLike } from 'node:fs';
import { lstat, mkdir, open, readdir, realpath, rename, rm, rmdir } from 'node:fs/promises';
import { join } from 'node:path';
import type { Readable, Writable } from 'node:stream';

import type { Random } from '../clock.js';
import { B2Error, errnoOf, ioError } from '../errors.js';
import type { EventSink } from '../events.js';
import { syncFs } from '../syscalls.js';
import { lastLine } from './environment.js';
import { baseName, decodeName, encodeName, script, showName } from './names.js';
import { childEnd, collectText, outputOf, runScript, TOOL_ENV } from './tools.js';
import type { FileAccess, Place } from './types.js';

export interface RestoreTreeOptions {
  readonly access: FileAccess;
  readonly place: Place;
  /** Made where it does not exist; its parent must. */
  readonly target: string;
  /** Replace files that are there. */
  readonly force: boolean;
  readonly events: EventSink;
  readonly random: Random;
  readonly signal: AbortSignal;
}

export interface RestoredTree {
  /** Where the file or tree is now. */
  readonly target: string;
  readonly files: number;
  readonly directories: number;
  readonly others: number;
  /** Bytes of the regular files, holes included. */
  readonly bytes: number;
  /** Files that were replaced. */
  readonly replaced: number;
  /** What could not be read, and is not there. */
  readonly damaged: readonly { readonly path: string; readonly reason: string }[];
  /** Attributes, and special files, that could not be made here, in words. */
  readonly notMade: readonly string[];
  /** False where owners could not be given (not root). */
  readonly owners: boolean;
}

/** Conflicts named in a refusal. */
const NAMED = 5;

/**
 * Restores. Kinds: `refused` (something is there and `force` is not set, or it cannot be replaced), `not-found`, `damaged`,
 * `io`, `no-space`. Where it rejects nothing has been put to its place, unless the message says otherwise.
 */
export async function restoreTree(options: RestoreTreeOptions): Promise<RestoredTree> {
  const { access, place, random, events, signal, force } = options;
  // Before anything is made: a path that is not there leaves no trace.
  const entry = await access.stat(place, false);
  const { target, isNew } = await targetDirectory(options.target);
  // Nobody else sees what is not finished; the tree itself may get any mode.
  const stage = join(target, `.b2-restore-${Buffer.from(random(8)).toString('hex')}`);
  const tree = join(stage, 'tree');
  const isRoot = process.geteuid?.() === 0;
  let rootStat: BigIntStats | undefined;
  let result: RestoredTree | undefined;
  try {
    await mkdir(stage, { mode: 0o700 }).catch((error: unknown) => {
      throw ioError('make a directory in', target, error);
    });
    await mkdir(tree);
    const { stream, done } = await access.exportTree({ ...place, path: entry.path });
    const notMade = await unpack(stream, tree, isRoot, options);
    const { damaged, notes } = await done;
    for (const note of [...notes, ...notMade]) events({ type: 'warning', message: showName(note) });
    const above = entry.path.slice(0, entry.path.length - baseName(entry.path).length);
    await removeDamaged(
      tree,
      damaged.map((d) => joined(Buffer.from(tree), encodeName(d.path.slice(above.length)))),
    );
    const mover = new Mover(target, force);
    await mover.plan(Buffer.from(tree), Buffer.from(target));
    mover.refuse(options.target);
    if (entry.path === '/' && (isNew || force)) rootStat = await lstat(tree, { bigint: true });
    await mover.move();
    if (rootStat !== undefined)
      await copyAttributes(Buffer.from(tree), Buffer.from(target), rootStat);
    const placed = entry.path === '/' ? target : join(target, showName(baseName(entry.path)));
    result = { target: placed, ...mover.counts, damaged, notMade, owners: isRoot };
  } catch (error) {
    if (signal.aborted)
      throw new B2Error('interrupted', `interrupted (${String(signal.reason)})`, { cause: error });
    throw error;
  } finally {
    await rm(stage, { recursive: true, force: true }).catch((error: unknown) => {
      const { message } = ioError('remove', stage, error);
      events({ type: 'warning', message: `the working directory stays: ${message}` });
    });
    if (result === undefined && isNew) await rmdir(target).catch(() => undefined);
  }
  // Removing the working directory was a change of it.
  if (rootStat !== undefined) await setTime(Buffer.from(target), rootStat);
  await syncTarget(target);
  return result;
}

/**
 * Part of a file is not the file, under none of its names. A directory that could not be read to its end keeps what was read of
 * it.
 */
async function removeDamaged(tree: string, paths: readonly Buffer[]): Promise<void> {
  const inodes = new Set<bigint>();
  for (const path of paths) {
    const stat = await lstatIfThere(path);
    if (stat === undefined || stat.isDirectory()) continue;
    if (stat.nlink > 1n) inodes.add(stat.ino);
    await rm(path);
  }
  if (inodes.size === 0) return;
  const walk = async (directory: Buffer): Promise<void> => {
    for (const name of await readdir(directory, { encoding: 'buffer' })) {
      const path = joined(directory, name);
      const stat = await lstat(path, { bigint: true });
      if (stat.isDirectory()) await walk(path);
      else if (inodes.has(stat.ino)) await rm(path);
    }
  };
  await walk(Buffer.from(tree));
}

async function targetDirectory(
  path: string,
): Promise<{ readonly target: string; readonly isNew: boolean }> {
  let isNew = false;
  try {
    await mkdir(path);
    isNew = true;
  } catch (error) {
    if (errnoOf(error) !== 'EEXIST') throw ioError('make the directory', path, error);
  }
  try {
    const real = await realpath(path);
    if ((await lstat(real)).isDirectory()) return { target: real, isNew };
  } catch (error) {
    throw ioError('open the directory', path, error);
  }
  throw new B2Error('refused', `${path} is no directory`, {
    hint: 'With --path, TARGET is the directory that the file or tree is put into.',
  });
}

/** When it takes more, or nothing ever again. */
function writable(stream: Writable): Promise<void> {
  return new Promise((resolve) => {
    const done = (): void => {
      stream.off('drain', done);
      stream.off('close', done);
      resolve();
    };
    stream.on('drain', done);
    stream.on('close', done);
    if (stream.destroyed) done();
  });
}

/** Unpacks, and returns what could not be made as it was. */
async function unpack(
  stream: Readable,
  directory: string,
  isRoot: boolean,
  { signal }: RestoreTreeOptions,
): Promise<readonly string[]> {
  const owners = isRoot ? ['--same-owner'] : ['--no-same-owner'];
  const child = spawn(
    'tar',
    [
      '--extract',
      '--file=-',
      `--directory=${directory}`,
      '--numeric-owner',
      ...owners,
      '--preserve-permissions',
      '--xattrs',
      '--xattrs-include=*',
      '--acls',
      '--delay-directory-restore',
      '--quoting-style=escape',
      '--warning=no-timestamp',
    ],
    { stdio: ['pipe', 'ignore', 'pipe'], env: { ...TOOL_ENV }, cwd: '/', detached: true },
  );
  const said = collectText(child.stderr);
  const ended = childEnd(child, 'tar');
  ended.catch(() => undefined);
  let status: number | undefined;
  void ended.then(
    (code) => (status = code),
    () => (status = 1),
  );
  // tar closes its end at the mark for the end of the archive. What fills up the last record still comes, and is taken, so that who
  // writes it ends well.
  let isOpen = true;
  child.stdin.on('error', () => (isOpen = false));
  child.stdin.on('close', () => (isOpen = false));
  const stop = (): void => void child.kill('SIGKILL');
  signal.addEventListener('abort', stop, { once: true });
  try {
    for await (const bytes of stream) {
      if (status !== undefined && status !== 0 && fatalOf(said()).length > 0) break;
      if (isOpen && !child.stdin.write(bytes)) await writable(child.stdin);
    }
  } finally {
    child.stdin.end();
    signal.removeEventListener('abort', stop);
  }
  const code = await ended;
  const problems = problemsOf(said());
  const fatal = fatalOf(said());
  if (fatal.length > 0 || code > 2 || (code !== 0 && problems.length === 0)) {
    const line = lastLine(fatal.join('\n'));
    const isFull = /No space left|quota exceeded/i.test(fatal.join('\n'));
    throw new B2Error(
      isFull ? 'no-space' : 'io',
      `cannot unpack into ${directory}: ${line || `tar ended with status ${code}`}`,
      isFull ? { hint: 'Make room there; nothing has been put to its place yet.' } : {},
    );
  }
  return problems;
}

function problemsOf(stderr: string): readonly string[] {
  return stderr
    .split('\n')
    .map((line) => line.trim())
    .filter((line) => line !== '' && !/Exiting with failure status/.test(line));
}

/** An attribute that the target's file system cannot hold is no reason to withhold the file; anything else is. */
function fatalOf(stderr: string): readonly string[] {
  return problemsOf(stderr).filter((line) => !NOT_MADE.test(line));
}

const NOT_MADE = /: Cannot (?:set|acl_\w+|mknod|mkfifo|change ownership|change mode)\b|: Warning: /;

async function lstatIfThere(path: PathLike): Promise<BigIntStats | undefined> {
  try {
    return await lstat(path, { bigint: true });
  } catch (error) {
    if (errnoOf(error) === 'ENOENT') return undefined;
    throw ioError('look at', shownPath(path), error);
  }
}

function shownPath(path: PathLike): string {
  return showName(Buffer.isBuffer(path) ? decodeName(path) : path.toString());
}

function joined(directory: Buffer, name: Buffer): Buffer {
  return Buffer.concat([directory, Buffer.from('/'), name]);
}

/** One rename, or for a directory that is there on both sides: its own attributes, after what is in it. */
type Step =
  | { readonly type: 'move'; readonly from: Buffer; readonly to: Buffer; readonly over: boolean }
  | {
      readonly type: 'attributes';
      readonly from: Buffer;
      readonly to: Buffer;
      readonly stat: BigIntStats;
    };

/** Moves what lies in one directory into another one, which may hold some of it already. */
class Mover {
  readonly #steps: Step[] = [];
  readonly #conflicts: string[] = [];
  /** What cannot be replaced even when asked to. */
  readonly #obstacles: string[] = [];
  readonly #target: string;
  readonly #force: boolean;
  readonly counts = { files: 0, directories: 0, others: 0, bytes: 0, replaced: 0 };

  constructor(target: string, force: boolean) {
    this.#target = target;
    this.#force = force;
  }

  /** Looks at everything in `from`; changes nothing. */
  async plan(from: Buffer, to: Buffer): Promise<void> {
    const device = (await lstat(from, { bigint: true })).dev;
    for (const name of await readdir(from, { encoding: 'buffer' })) {
      await this.#planEntry(joined(from, name), joined(to, name), device);
    }
  }

  async #planEntry(from: Buffer, to: Buffer, device: bigint): Promise<void> {
    const own = await lstat(from, { bigint: true });
    const there = await lstatIfThere(to);
    const shown = shownPath(to);
    if (there === undefined) {
      this.#steps.push({ type: 'move', from, to, over: false });
      await this.#count(from, own);
      return;
    }
    if (own.isDirectory() && there.isDirectory()) {
      // By rename nothing gets into another file system.
      if (there.dev !== device) {
        this.#obstacles.push(`${shown} is a mount point`);
        return;
      }
      this.counts.directories++;
      await this.plan(from, to);
      if (this.#force) this.#steps.push({ type: 'attributes', from, to, stat: own });
      return;
    }
    if (there.isDirectory()) {
      this.#obstacles.push(`${shown} is a directory`);
      return;
    }
    this.#conflicts.push(shown);
    this.counts.replaced++;
    this.#steps.push({ type: 'move', from, to, over: true });
    await this.#count(from, own);
  }

  async #count(path: Buffer, stat: BigIntStats): Promise<void> {
    if (stat.isFile()) {
      this.counts.files++;
      this.counts.bytes += Number(stat.size);
    } else if (stat.isDirectory()) {
      this.counts.directories++;
      for (const name of await readdir(path, { encoding: 'buffer' })) {
        const below = joined(path, name);
        await this.#count(below, await lstat(below, { bigint: true }));
      }
    } else this.counts.others++;
  }

  /** Throws where something stands in the way. */
  refuse(target: string): void {
    if (this.#obstacles.length > 0) {
      throw new B2Error('refused', `${this.#some(this.#obstacles)}: it is not replaced`, {
        hint: 'Restore to another directory, or move it away first.',
      });
    }
    if (this.#conflicts.length > 0 && !this.#force) {
      throw new B2Error('refused', `already there: ${this.#some(this.#conflicts)}`, {
        hint: `Restore to an empty directory instead of ${target}, or replace them with --force. Nothing was changed.`,
      });
    }
  }

  #some(all: readonly string[]): string {
    const more = all.length - NAMED;
    return `${all.slice(0, NAMED).join(', ')}${more > 0 ? ` and ${more} more` : ''}`;
  }

  async move(): Promise<void> {
    for (const step of this.#steps) {
      try {
        if (step.type === 'move') await this.#moveOne(step);
        else await copyAttributes(step.from, step.to, step.stat);
      } catch (error) {
        const failed = ioError('put to its place', shownPath(step.to), error);
        throw new B2Error(
          failed.kind,
          `${failed.message}; part of it is in ${this.#target} already`,
          {
            cause: error,
          },
        );
      }
    }
  }

  async #moveOne({ from, to, over }: Extract<Step, { type: 'move' }>): Promise<void> {
    // A file that has come since the look at it would be replaced; what is on the way there would be, too, if it were a link.
    const there = await lstatIfThere(to);
    if (there !== undefined && !over)
      throw new B2Error('refused', `${shownPath(to)} has come meanwhile`);
    if (there !== undefined && (await lstat(from)).isDirectory()) await rm(to);
    // Its own time must survive: renaming a directory changes only that of its parents.
    await rename(from, to);
  }
}

/**
 * Owner, mode, times, xattrs and ACLs of a directory, without what is in it: by cp, which knows them all. `stat` is from before
 * things were moved out of it.
 */
async function copyAttributes(from: Buffer, to: Buffer, stat: BigIntStats): Promise<void> {
  await runQuiet(
    script`cp --archive --attributes-only --no-target-directory -- ${decodeName(from)} ${decodeName(to)}`,
  );
  await setTime(to, stat);
}

async function setTime(path: Buffer, { mtimeNs }: BigIntStats): Promise<void> {
  const seconds = mtimeNs / 1_000_000_000n - (mtimeNs % 1_000_000_000n < 0n ? 1n : 0n);
  const fraction = String(mtimeNs - seconds * 1_000_000_000n).padStart(9, '0');
  // Node's own function takes seconds as a double, which loses the last digits.
  await runQuiet(script`touch -c -m -d ${`@${seconds}.${fraction}`} -- ${decodeName(path)}`);
}

/** Runs a script of sh that has nothing to say: names are bytes, and Node's arguments are text. */
async function runQuiet(text: Buffer): Promise<void> {
  const { status, stderr } = await outputOf(runScript('/bin/sh', ['-s'], text));
  if (status !== 0) throw new Error(lastLine(stderr));
}

/** What was restored is durable then. */
async function syncTarget(target: string): Promise<void> {
  const handle = await open(target, 'r');
  try {
    await syncFs(handle.fd);
  } catch (error) {
    throw ioError('sync', target, error);
  } finally {
    await handle.close();
  }
}
