/**
 * The kernel's buffer for what a unix socket sends. By default it holds less than one reply of 256 KiB: every reply then takes two system calls
 * and two turns of the event loop, for a tenth of all the processor time that reading on and on costs.
 */
import type { Socket } from 'node:net';
import { createRequire } from 'node:module';

/** The kernel gives no more than net.core.wmem_max. */
const SEND_BUFFER_BYTES = 1024 * 1024;
// sys/socket.h
const SOL_SOCKET = 1;
const SO_SNDBUF = 7;

type SetOption = (
  fd: number,
  level: number,
  name: number,
  value: Uint8Array,
  bytes: number,
) => number;
let setOption: SetOption | undefined;

/** Enlarges it for a unix socket (those of TCP grow by themselves). Where that cannot be done everything works as well. */
export function enlargeSendBuffer(socket: Socket): void {
  // Node.js tells the descriptor of a socket in no other way.
  const { _handle: handle } = socket as { readonly _handle?: { readonly fd?: unknown } | null };
  if (socket.remoteFamily !== undefined || typeof handle?.fd !== 'number' || handle.fd < 0) return;
  try {
    setOption ??= (createRequire(import.meta.url)('koffi') as typeof import('koffi'))
      .load(null)
      .func(
        'int setsockopt(int fd, int level, int name, const void *value, uint32_t bytes)',
      ) as SetOption;
  } catch {
    return; // koffi's binary is not on this machine
  }
  const value = new Int32Array([SEND_BUFFER_BYTES]);
  setOption(handle.fd, SOL_SOCKET, SO_SNDBUF, new Uint8Array(value.buffer), value.byteLength);
}
