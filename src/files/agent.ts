/**
 * A process of its own, in the mount namespace of a kernel environment: looks at mounted files for a process that must not touch
 * them itself. It ends with the channel to that process.
 */
import { constants } from 'node:fs';
import { lstat, open, readdir, readlink, type FileHandle } from 'node:fs/promises';
import { createRequire } from 'node:module';

import { errnoOf } from '../errors.js';
import { readFully, systemFileCalls } from '../fs.js';
import { seekData, seekHole, systemError } from '../syscalls.js';
import type { AgentReply, AgentRequest, AgentQuestion, AgentStat } from './agent-protocol.js';

type Koffi = typeof import('koffi');

interface Xattrs {
  readonly errno: () => number;
  readonly get: (path: Uint8Array, name: Uint8Array, into: Uint8Array, size: number) => number;
  readonly list: (path: Uint8Array, into: Uint8Array, size: number) => number;
}

let loaded: Xattrs | undefined;

function xattrs(): Xattrs {
  if (loaded !== undefined) return loaded;
  const koffi = createRequire(import.meta.url)('koffi') as Koffi;
  const lib = koffi.load(null);
  loaded = {
    errno: () => koffi.errno(),
    get: lib.func(
      'int64_t lgetxattr(void *path, void *name, void *value, size_t size)',
    ) as Xattrs['get'],
    list: lib.func('int64_t llistxattr(void *path, void *list, size_t size)') as Xattrs['list'],
  };
  return loaded;
}

/** XATTR_SIZE_MAX and XATTR_LIST_MAX of linux/limits.h. */
const XATTR_BYTES = 65_536;

function withNul(bytes: Uint8Array): Uint8Array {
  return Buffer.concat([bytes, Buffer.of(0)]);
}

function xattrBytes(name: string, call: (into: Uint8Array) => number): Uint8Array {
  const into = Buffer.alloc(XATTR_BYTES);
  const got = Number(call(into));
  if (got < 0) throw systemError(name, xattrs().errno());
  return into.subarray(0, got);
}

async function statOf(path: Buffer): Promise<AgentStat> {
  const s = await lstat(path, { bigint: true });
  return {
    device: s.dev,
    inode: s.ino,
    mode: Number(s.mode),
    links: Number(s.nlink),
    uid: Number(s.uid),
    gid: Number(s.gid),
    rdev: s.rdev,
    sizeBytes: Number(s.size),
    blocks: Number(s.blocks),
    atimeNs: s.atimeNs,
    mtimeNs: s.mtimeNs,
    ctimeNs: s.ctimeNs,
  };
}

const { S_IFDIR, S_IFREG, S_IFLNK, S_IFIFO, S_IFSOCK, S_IFBLK, S_IFCHR, O_NOFOLLOW, O_NONBLOCK } =
  constants;

const handles = new Map<number, FileHandle>();
let nextHandle = 1;

function handleOf(handle: number): FileHandle {
  const found = handles.get(handle);
  if (found === undefined) throw Object.assign(new Error('no such handle'), { code: 'EBADF' });
  return found;
}

async function answer(question: AgentQuestion): Promise<unknown> {
  switch (question.op) {
    case 'lstat':
      return statOf(Buffer.from(question.path));
    case 'readlink':
      return readlink(Buffer.from(question.path), { encoding: 'buffer' });
    case 'readdir': {
      const found = await readdir(Buffer.from(question.path), {
        encoding: 'buffer',
        withFileTypes: true,
      });
      return found.map((e) => ({
        name: e.name,
        type: e.isDirectory()
          ? S_IFDIR
          : e.isFile()
            ? S_IFREG
            : e.isSymbolicLink()
              ? S_IFLNK
              : e.isFIFO()
                ? S_IFIFO
                : e.isSocket()
                  ? S_IFSOCK
                  : e.isBlockDevice()
                    ? S_IFBLK
                    : e.isCharacterDevice()
                      ? S_IFCHR
                      : 0,
      }));
    }
    case 'open': {
      const handle = nextHandle++;
      handles.set(handle, await open(Buffer.from(question.path), O_NOFOLLOW | O_NONBLOCK));
      return handle;
    }
    case 'read': {
      const into = Buffer.allocUnsafe(question.length);
      const { fd } = handleOf(question.handle);
      return into.subarray(0, await readFully(systemFileCalls, fd, into, question.offset));
    }
    case 'seek': {
      const { fd } = handleOf(question.handle);
      return question.what === 'data'
        ? seekData(fd, question.offset)
        : seekHole(fd, question.offset);
    }
    case 'close': {
      const handle = handleOf(question.handle);
      handles.delete(question.handle);
      await handle.close();
      return undefined;
    }
    case 'getxattr': {
      const { get } = xattrs();
      return xattrBytes('lgetxattr', (into) =>
        get(withNul(question.path), withNul(question.name), into, into.length),
      );
    }
    case 'listxattr': {
      const { list } = xattrs();
      return xattrBytes('llistxattr', (into) => list(withNul(question.path), into, into.length));
    }
  }
}

function reply(message: AgentReply): void {
  // Who asked may have ended meanwhile.
  if (process.connected) process.send?.(message, undefined, undefined, () => undefined);
}

// Ctrl-C in the terminal is for who asks; the end of the channel ends this.
for (const signal of ['SIGINT', 'SIGTERM', 'SIGHUP'] as const) process.on(signal, () => undefined);
process.on('message', ({ id, question }: AgentRequest) => {
  answer(question).then(
    (value) => reply({ id, value }),
    (error: unknown) => reply({ id, code: errnoOf(error) ?? 'EIO' }),
  );
});
