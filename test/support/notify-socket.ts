/** A service manager's end of sd_notify(3): a unix datagram socket, which Node does not have. */
import { createRequire } from 'node:module';
import { closeSync } from 'node:fs';

type Koffi = typeof import('koffi');

const AF_UNIX = 1;
const SOCK_DGRAM = 2;
const SOCK_CLOEXEC = 0o2000000;
const MSG_DONTWAIT = 0x40;

export interface NotifySocket {
  /** Every message so far, oldest first; each is a list of `NAME=value` lines. */
  messages(): readonly (readonly string[])[];
  /** Waits until a line starts with `start` and returns it; throws after two minutes. */
  waitFor(start: string): Promise<string>;
  close(): void;
}

/** Binds a socket to a path, or to an abstract name that starts with `@`. */
export function notifySocket(address: string): NotifySocket {
  const koffi = createRequire(import.meta.url)('koffi') as Koffi;
  const lib = koffi.load(null);
  const socket = lib.func('int socket(int domain, int type, int protocol)') as (
    ...args: number[]
  ) => number;
  const bind = lib.func('int bind(int fd, const void *address, uint32_t length)') as (
    fd: number,
    address: Uint8Array,
    length: number,
  ) => number;
  const recv = lib.func('int64_t recv(int fd, void *into, size_t length, int flags)') as (
    fd: number,
    into: Uint8Array,
    length: number,
    flags: number,
  ) => number;
  const fd = socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC, 0);
  const name = Buffer.from(address);
  if (name[0] === 0x40) name[0] = 0;
  const sockaddr = Buffer.concat([Buffer.from(new Uint16Array([AF_UNIX]).buffer), name]);
  if (bind(fd, sockaddr, sockaddr.length) !== 0) throw new Error(`cannot bind ${address}`);
  const got: string[][] = [];
  const drain = (): void => {
    const into = Buffer.alloc(65536);
    for (;;) {
      const n = Number(recv(fd, into, into.length, MSG_DONTWAIT));
      if (n <= 0) return;
      got.push(into.toString('utf8', 0, n).split('\n'));
    }
  };
  return {
    messages() {
      drain();
      return got;
    },
    async waitFor(start) {
      for (let i = 0; i < 4800; i++) {
        drain();
        const found = got.flat().find((line) => line.startsWith(start));
        if (found !== undefined) return found;
        await new Promise((resolve) => setTimeout(resolve, 25));
      }
      throw new Error(`no ${start} within two minutes; got ${JSON.stringify(got)}`);
    },
    close: () => closeSync(fd),
  };
}
