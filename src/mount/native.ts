/** The system calls of mounting that Node does not offer, through koffi, which is loaded with the first call. */
import { createRequire } from 'node:module';

import { B2Error, messageOf } from '../errors.js';
import { systemError } from '../syscalls.js';

type Koffi = typeof import('koffi');

interface Libc {
  readonly errno: () => number;
  readonly poll: (fds: Uint8Array, count: number, timeoutMs: number) => number;
  readonly read: (fd: number, into: Uint8Array, length: number) => number;
  readonly pipe2: (fds: Uint8Array, flags: number) => number;
  readonly socketpair: (domain: number, type: number, protocol: number, fds: Uint8Array) => number;
  readonly recvmsg: (fd: number, message: object, flags: number) => number;
  readonly fcntl: (fd: number, command: number, type: 'int', argument: number) => number;
  readonly mount: Asynchronous<
    [source: string, target: string, type: string, flags: number, data: string]
  >;
  readonly umount2: Asynchronous<[target: string, flags: number]>;
}

interface Asynchronous<Args extends readonly unknown[]> {
  async(...args: [...Args, (error: unknown, result: number) => void]): void;
}

let loaded: Libc | undefined;

/** Loads koffi, for who has nothing better to do than to wait. What fails then is told by the first call. */
export function loadNative(): void {
  try {
    libc();
  } catch {
    return;
  }
}

function libc(): Libc {
  if (loaded !== undefined) return loaded;
  try {
    const koffi = createRequire(import.meta.url)('koffi') as Koffi;
    const lib = koffi.load(null);
    const iovec = koffi.struct({ base: 'void *', length: 'size_t' });
    const msghdr = koffi.struct({
      name: 'void *',
      nameLength: 'uint32_t',
      iov: koffi.pointer(iovec),
      iovCount: 'size_t',
      control: 'void *',
      controlLength: 'size_t',
      flags: 'int',
    });
    loaded = {
      errno: () => koffi.errno(),
      poll: lib.func('int poll(void *fds, unsigned long count, int timeout)') as Libc['poll'],
      read: lib.func('int64_t read(int fd, void *into, size_t length)') as Libc['read'],
      pipe2: lib.func('int pipe2(void *fds, int flags)') as Libc['pipe2'],
      socketpair: lib.func(
        'int socketpair(int domain, int type, int protocol, void *fds)',
      ) as Libc['socketpair'],
      recvmsg: lib.func('recvmsg', 'int64_t', [
        'int',
        koffi.inout(koffi.pointer(msghdr)),
        'int',
      ]) as Libc['recvmsg'],
      fcntl: lib.func('int fcntl(int fd, int command, ...)') as Libc['fcntl'],
      mount: lib.func(
        'int mount(const char *source, const char *target, const char *type, unsigned long flags, const char *data)',
      ) as unknown as Libc['mount'],
      umount2: lib.func('int umount2(const char *target, int flags)') as unknown as Libc['umount2'],
    };
    return loaded;
  } catch (error) {
    throw new B2Error(
      'unsupported',
      `cannot load the system call library koffi: ${messageOf(error)}`,
      {
        cause: error,
        hint: 'Reinstall b2 with its dependencies (npm ci); koffi has builds for all usual Linux machines.',
      },
    );
  }
}

function call<Args extends readonly unknown[]>(
  name: string,
  native: Asynchronous<Args>,
  ...args: Args
): Promise<void> {
  return new Promise((resolve, reject) => {
    native.async(...args, (error, result) => {
      if (error !== null && error !== undefined)
        reject(error instanceof Error ? error : new Error(messageOf(error)));
      else if (result < 0) reject(systemError(name, libc().errno()));
      else resolve();
    });
  });
}

function checked(name: string, result: number): number {
  if (result < 0) throw systemError(name, libc().errno());
  return result;
}

const MS_RDONLY = 1;
const MS_NOSUID = 2;
const MS_NODEV = 4;
const MS_NOATIME = 1024;
const MNT_DETACH = 2;
const UMOUNT_NOFOLLOW = 8;
const O_NONBLOCK = 0o4000;
const O_CLOEXEC = 0o2000000;
const F_GETFL = 3;
const F_SETFL = 4;
const AF_UNIX = 1;
const SOCK_STREAM = 1;
const SOL_SOCKET = 1;
const SCM_RIGHTS = 1;
const MSG_DONTWAIT = 0x40;
const MSG_CMSG_CLOEXEC = 0x4000_0000;
const POLLIN = 1;

/** mount(2), read-only, nosuid, nodev, noatime. */
export function mountReadOnly(
  source: string,
  target: string,
  type: string,
  data: string,
): Promise<void> {
  const flags = MS_RDONLY | MS_NOSUID | MS_NODEV | MS_NOATIME;
  return call('mount', libc().mount, source, target, type, flags, data);
}

/** umount2(2) of exactly this path. `detach`: also while it is in use; it goes away when the last user has left. EBUSY otherwise. */
export function unmountPath(target: string, detach: boolean): Promise<void> {
  return call('umount', libc().umount2, target, UMOUNT_NOFOLLOW | (detach ? MNT_DETACH : 0));
}

/** A pipe whose ends no child inherits; reading and writing never wait. */
export function wakePipe(): { readonly readFd: number; readonly writeFd: number } {
  const fds = new Int32Array(2);
  checked('pipe2', libc().pipe2(new Uint8Array(fds.buffer), O_CLOEXEC | O_NONBLOCK));
  return { readFd: fds[0] ?? -1, writeFd: fds[1] ?? -1 };
}

/** A pair of connected sockets that no child inherits unless it is handed one. */
export function socketPair(): readonly [number, number] {
  const fds = new Int32Array(2);
  checked(
    'socketpair',
    libc().socketpair(AF_UNIX, SOCK_STREAM | O_CLOEXEC, 0, new Uint8Array(fds.buffer)),
  );
  return [fds[0] ?? -1, fds[1] ?? -1];
}

/** Takes the descriptor that was sent over a socket, without waiting; undefined if none has come. No child inherits it. */
export function receiveDescriptor(socketFd: number): number | undefined {
  const data = new Uint8Array(64);
  const control = new Uint8Array(64);
  const message = {
    name: null,
    nameLength: 0,
    iov: [{ base: data, length: data.byteLength }],
    iovCount: 1,
    control,
    controlLength: control.byteLength,
    flags: 0,
  };
  const got = libc().recvmsg(socketFd, message, MSG_DONTWAIT | MSG_CMSG_CLOEXEC);
  if (got <= 0) return undefined;
  // struct cmsghdr: size_t length, int level, int type; then the descriptor.
  const view = new DataView(control.buffer);
  const isRights =
    view.getBigUint64(0, true) >= 20n &&
    view.getInt32(8, true) === SOL_SOCKET &&
    view.getInt32(12, true) === SCM_RIGHTS;
  return isRights ? view.getInt32(16, true) : undefined;
}

/** Makes reads of `fd` return at once where there is nothing to read. */
export function setNonBlocking(fd: number): void {
  const flags = checked('fcntl', libc().fcntl(fd, F_GETFL, 'int', 0));
  checked('fcntl', libc().fcntl(fd, F_SETFL, 'int', flags | O_NONBLOCK));
}

/** Waits until one of `fds` can be read or has ended; true for each that has. Blocks the thread. */
export function waitReadable(fds: readonly number[]): readonly boolean[] {
  const list = new DataView(new ArrayBuffer(fds.length * 8));
  fds.forEach((fd, i) => {
    list.setInt32(i * 8, fd, true);
    list.setInt16(i * 8 + 4, POLLIN, true);
  });
  const got = libc().poll(new Uint8Array(list.buffer), fds.length, -1);
  if (got < 0) {
    const failure = systemError('poll', libc().errno());
    if ('code' in failure && failure.code === 'EINTR') return fds.map(() => false);
    throw failure;
  }
  return fds.map((_, i) => list.getInt16(i * 8 + 6, true) !== 0);
}

const EINTR = 4;
const ENOENT = 2;
const EAGAIN = 11;
const ENODEV = 19;

/**
 * Reads one request of the kernel from a /dev/fuse that does not block: its length, 0 if there is none now, or undefined when
 * the file system is unmounted.
 */
export function readRequest(fd: number, into: Uint8Array): number | undefined {
  for (;;) {
    const got = libc().read(fd, into, into.byteLength);
    if (got > 0) return got;
    if (got === 0) return undefined;
    const errno = libc().errno();
    if (errno === EAGAIN) return 0;
    // ENOENT: who asked has gone meanwhile.
    if (errno === EINTR || errno === ENOENT) continue;
    if (errno === ENODEV) return undefined;
    throw systemError('read', errno);
  }
}
