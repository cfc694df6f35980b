/** An image as an NBD export for the time that a program of ours reads it (qemu-img for VM formats). */
import { mkdtemp, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';

import { ioError } from '../errors.js';
import type { EventSink } from '../events.js';
import type { Image } from '../image.js';
import { removeWhenKilled, type Watcher } from '../leftovers.js';
import { serveNbd } from './server.js';

export interface WithNbdExportOptions {
  readonly events?: EventSink;
  /** Where the private directory of the socket is made. Default: that for temporary files, else /tmp. */
  readonly directory?: string;
}

/** Leaves room for `/b2-nbd-XXXXXX/s` and its staging name in the path of a unix socket. */
const MAX_DIRECTORY_BYTES = 70;

/**
 * Serves `image` read-only on a unix socket that only this user can reach while `use` runs; `uri` is for qemu-img,
 * nbdcopy and the like. Socket and directory are gone when this settles, and also where this process is killed. The image stays open: it is the caller's.
 *
 * If any read of the image failed this rejects with that error, which names the damaged pack, rather than with what
 * the client made of it, and also where `use` resolved: what a client wrote after an error is not the image.
 */
export async function withNbdExport<T>(
  image: Image,
  use: (uri: string) => Promise<T>,
  options: WithNbdExportOptions = {},
): Promise<T> {
  const failures: unknown[] = [];
  const watched = watch(image, (error) => failures.push(error));
  const parent =
    options.directory ?? (Buffer.byteLength(tmpdir()) <= MAX_DIRECTORY_BYTES ? tmpdir() : '/tmp');
  let directory: string;
  try {
    directory = await mkdtemp(join(parent, 'b2-nbd-'));
  } catch (error) {
    throw ioError('make a directory in', parent, error);
  }
  let leftovers: Watcher | undefined;
  try {
    leftovers = await removeWhenKilled(directory);
    const server = await serveNbd({
      exports: [{ name: '', open: () => Promise.resolve(watched) }],
      listen: { socketPath: join(directory, 's') },
      ...(options.events === undefined ? {} : { events: options.events }),
    });
    try {
      const result = await use(server.uri());
      if (failures.length > 0) throw failures[0];
      return result;
    } catch (error) {
      throw failures[0] ?? error;
    } finally {
      await server.close();
    }
  } finally {
    await rm(directory, { recursive: true, force: true });
    await leftovers?.stop();
  }
}

/** `image` with its failures told to `failed`; it cannot be closed through this. */
function watch(image: Image, failed: (error: unknown) => void): Image {
  const told = (error: unknown): never => {
    failed(error);
    throw error;
  };
  return {
    sizeBytes: image.sizeBytes,
    logicalBlockBytes: image.logicalBlockBytes,
    read: (into, offset) => image.read(into, offset).catch(told),
    lend: (offset, length) => {
      try {
        const lending = image.lend?.(offset, length);
        return lending instanceof Promise ? lending.catch(told) : lending;
      } catch (error) {
        return told(error);
      }
    },
    extents: (offset, length, limit) => image.extents(offset, length, limit).catch(told),
    close: () => Promise.resolve(),
  };
}
