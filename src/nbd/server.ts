/**
 * An NBD server: images as network block devices, on a unix socket or on TCP with TLS. Source of the protocol:
 * doc/proto.md of NetworkBlockDevice/nbd (fixed newstyle, structured replies, `base:allocation`).
 *
 * It serves whatever implements {@link Image}; one that also is a {@link WritableImage} (an overlay) is served
 * writable. All connections to an export share its image, so that what one has written the others read.
 */
import { chmod, link, lstat, mkdtemp, rm, unlink } from 'node:fs/promises';
import { connect, createServer, type AddressInfo, type Server, type Socket } from 'node:net';
import { dirname, join, resolve } from 'node:path';
import type { TlsOptions } from 'node:tls';

import { BufferPool } from '../buffer-pool.js';
import { systemClock, type Clock } from '../clock.js';
import { B2Error, errnoOf, ioError, messageOf } from '../errors.js';
import { ignoreEvents, type EventSink } from '../events.js';
import type { Image } from '../image.js';
import { removeWhenKilled, type Watcher } from '../leftovers.js';
import { Connection, type NbdLimits, type ServedExport } from './connection.js';
import { MAX_STRING_BYTES, parseString } from './protocol.js';
import { loadTls } from './tls.js';
import type { WritableImage } from './writable.js';

export type { NbdLimits } from './connection.js';

export interface NbdExport {
  /** What clients ask for: at most 4096 bytes of UTF-8, without NUL, unique. May be empty. */
  readonly name: string;
  /** For people; may be empty. */
  readonly description?: string;
  /**
   * Called when the first client asks for the export, and again if that failed. The server closes the image when it is
   * closed itself, not before: clients come back.
   */
  open(): Promise<Image | WritableImage>;
}

/** PEM texts. */
export interface NbdTls {
  readonly cert: string | Buffer;
  readonly key: string | Buffer;
  /** Where given, clients must show a certificate that it has signed. */
  readonly clientCa?: string | Buffer;
}

export type NbdListen =
  /**
   * Mode 0600. A socket that nobody listens on any more is replaced; anything else of that name is not. With `watched` it is also
   * removed where this process is killed.
   */
  | { readonly socketPath: string; readonly watched?: boolean }
  /** Port 0: any that is free. */
  | { readonly host: string; readonly port: number };

export interface NbdServerOptions {
  /** At least one. The first is the default export, which clients get for the empty name (unless one is so named). */
  readonly exports: readonly NbdExport[];
  readonly listen: NbdListen;
  /** With it, clients must use TLS unless `allowPlaintext` is set. */
  readonly tls?: NbdTls;
  /** TCP without TLS must be asked for: whoever reaches the port reads the disk. */
  readonly allowPlaintext?: boolean;
  /** Gets a warning for each new failure of an image; damage is named as the image names it. */
  readonly events?: EventSink;
  readonly clock?: Clock;
  readonly limits?: Partial<NbdLimits>;
}

export interface NbdServer {
  /** The address of an export in the form that qemu, libnbd and nbdkit take. Default: the default export. */
  uri(exportName?: string): string;
  /** Clients connected now. */
  readonly connections: number;
  /**
   * Stops listening, lets requests under way finish (up to `graceMs`), refuses others with ESHUTDOWN, closes the
   * connections, then the images; the socket's file is gone. Rejects if an image could not be closed cleanly, which for
   * an overlay means that its last unflushed writes may be lost. May be called twice.
   */
  close(): Promise<void>;
}

const DEFAULT_LIMITS: NbdLimits = {
  connections: 32,
  requestsInFlight: 128,
  bytesInFlight: 4 * 1024 * 1024,
  handshakeMs: 60_000,
  graceMs: 5_000,
};

/** The longest path of a unix socket (sun_path of unix(7), without the closing NUL). */
const MAX_SOCKET_PATH_BYTES = 107;
/** What {@link listenOnPath} appends for a while. */
const STAGING_SUFFIX_BYTES = '/.b2-XXXXXX/s'.length;
/** Memory for replies that is kept. */
const KEPT_BYTES = 32 * 1024 * 1024;
/** After as long without a word over TCP the kernel asks whether the client is still there. */
const QUIET_MS = 60_000;
/** Failures told apart; beyond, memory of what was told starts over. */
const MAX_REPORTED = 1000;

/** Starts a server; it listens when this resolves. Rejects with B2Error. */
export async function serveNbd(options: NbdServerOptions): Promise<NbdServer> {
  const server = new RunningServer(options);
  await server.listen(options.listen);
  return server;
}

class RunningServer implements NbdServer {
  readonly #exports: readonly OpenOnceExport[];
  readonly #byName: ReadonlyMap<string, OpenOnceExport>;
  readonly #limits: NbdLimits;
  readonly #clock: Clock;
  readonly #events: EventSink;
  readonly #tls: TlsOptions | undefined;
  readonly #tlsRequired: boolean;
  readonly #connections = new Map<Connection, Promise<void>>();
  readonly #buffers = new BufferPool(KEPT_BYTES);
  readonly #reported = new Set<string>();
  readonly #server: Server;
  #uriBase:
    { readonly scheme: string; readonly authority: string; readonly query: string } | undefined;
  #socketPath: string | undefined;
  #watch: Watcher | undefined;
  #closed: Promise<void> | undefined;

  constructor(options: NbdServerOptions) {
    this.#limits = { ...DEFAULT_LIMITS, ...options.limits };
    this.#clock = options.clock ?? systemClock;
    this.#events = options.events ?? ignoreEvents;
    this.#exports = options.exports.map((spec) => new OpenOnceExport(spec));
    this.#byName = new Map(this.#exports.map((served) => [served.name, served]));
    checkNames(this.#exports, this.#byName.size);
    const overTcp = 'port' in options.listen;
    if (options.tls === undefined && overTcp && options.allowPlaintext !== true) {
      throw new B2Error(
        'refused',
        'NBD over TCP without TLS lets everyone who reaches the port read the disk',
        {
          hint: 'Give a certificate and key, use a unix socket, or allow plain connections explicitly.',
        },
      );
    }
    this.#tls =
      options.tls === undefined ? undefined : tlsOptions(options.tls, this.#limits.handshakeMs);
    this.#tlsRequired = this.#tls !== undefined && options.allowPlaintext !== true;
    this.#server = createServer(
      {
        allowHalfOpen: true,
        noDelay: true,
        // A client whose machine has lost its power says nothing, and would take its place among the connections for ever.
        keepAlive: true,
        keepAliveInitialDelay: QUIET_MS,
      },
      (socket) => this.#accept(socket),
    );
  }

  async listen(where: NbdListen): Promise<void> {
    const scheme = this.#tls === undefined ? 'nbd' : 'nbds';
    if ('socketPath' in where) {
      const path = resolve(where.socketPath);
      await listenOnPath(this.#server, path);
      this.#socketPath = path;
      if (where.watched === true) this.#watch = await removeWhenKilled(path);
      this.#uriBase = {
        scheme: `${scheme}+unix`,
        authority: '',
        query: `?socket=${encodeURI(path)}`,
      };
    } else {
      await listenOn(this.#server, `${where.host}:${where.port}`, {
        host: where.host,
        port: where.port,
      });
      const { address, port, family } = this.#server.address() as AddressInfo;
      this.#uriBase = {
        scheme,
        authority: `${family === 'IPv6' ? `[${address}]` : address}:${port}`,
        query: '',
      };
    }
    this.#server.on('error', (error) => this.#report('accepting connections', error));
  }

  uri(exportName?: string): string {
    const base = this.#uriBase;
    if (base === undefined) throw new Error('the server does not listen yet');
    return `${base.scheme}://${base.authority}/${encodeURIComponent(exportName ?? '')}${base.query}`;
  }

  get connections(): number {
    return this.#connections.size;
  }

  close(): Promise<void> {
    this.#closed ??= this.#shutDown();
    return this.#closed;
  }

  #accept(socket: Socket): void {
    if (this.#closed !== undefined || this.#connections.size >= this.#limits.connections) {
      socket.on('error', () => undefined);
      socket.destroy();
      return;
    }
    const peer = socket.remoteAddress === undefined ? 'on the unix socket' : socket.remoteAddress;
    const connection = new Connection(
      {
        limits: this.#limits,
        buffers: this.#buffers,
        tls: this.#tls,
        tlsRequired: this.#tlsRequired,
        exportNames: () => this.#exports,
        find: (name) => this.#byName.get(name) ?? (name === '' ? this.#exports[0] : undefined),
        report: (what, error) => this.#report(what, error),
      },
      socket,
      peer,
    );
    const gone = new Promise<void>((done) => socket.once('close', () => done()));
    this.#connections.set(
      connection,
      this.#attend(connection, gone).finally(() => this.#connections.delete(connection)),
    );
  }

  /** Resolves when nothing of the connection is left. */
  async #attend(connection: Connection, gone: Promise<void>): Promise<void> {
    const timers = new AbortController();
    void this.#clock.sleep(this.#limits.handshakeMs, timers.signal).then(() => {
      if (!timers.signal.aborted && !connection.transmitting) connection.destroy();
    });
    await connection.run();
    // A client that does not take its last replies must not keep the connection for ever.
    void this.#clock.sleep(this.#limits.graceMs, timers.signal).then(() => connection.destroy());
    await gone;
    timers.abort();
  }

  async #shutDown(): Promise<void> {
    const stopped = new Promise<void>((done) => this.#server.close(() => done()));
    const late = new AbortController();
    const connections = [...this.#connections];
    void this.#clock.sleep(this.#limits.graceMs, late.signal).then(() => {
      for (const [connection] of connections) connection.destroy();
    });
    for (const [connection] of connections) void connection.shutDown();
    if (this.#socketPath !== undefined) await unlink(this.#socketPath).catch(() => undefined);
    await this.#watch?.stop();
    await Promise.all(connections.map(([, attended]) => attended));
    late.abort();
    await stopped;
    let failure: unknown;
    for (const served of this.#exports) {
      try {
        await served.close();
      } catch (error) {
        failure ??= error;
      }
    }
    if (failure !== undefined) throw ioError('close export', this.#exports[0]?.name ?? '', failure);
  }

  /** A client that reads a bad place again and again is told each time; the log is told once. */
  #report(what: string, error: unknown): void {
    const message = `NBD: ${what}: ${error instanceof B2Error ? error.message : `internal error: ${stackOf(error)}`}`;
    const key = error instanceof B2Error ? error.message : message;
    if (this.#reported.has(key)) return;
    if (this.#reported.size >= MAX_REPORTED) this.#reported.clear();
    this.#reported.add(key);
    const hint = error instanceof B2Error ? error.hint : undefined;
    this.#events({ type: 'warning', message, ...(hint === undefined ? {} : { hint }) });
  }
}

/** An export whose image is opened once and shared. */
class OpenOnceExport implements ServedExport {
  readonly name: string;
  readonly description: string;
  readonly #open: () => Promise<Image | WritableImage>;
  #image: Promise<Image | WritableImage> | undefined;

  constructor(spec: NbdExport) {
    this.name = spec.name;
    this.description = spec.description ?? '';
    this.#open = () => spec.open();
  }

  image(): Promise<Image | WritableImage> {
    if (this.#image === undefined) {
      const opening = this.#open();
      this.#image = opening;
      opening.catch(() => {
        this.#image = undefined;
      });
    }
    return this.#image;
  }

  async close(): Promise<void> {
    const image = await this.#image?.catch(() => undefined);
    await image?.close();
  }
}

function checkNames(exports: readonly ServedExport[], distinct: number): void {
  if (exports.length === 0) throw new B2Error('usage', 'an NBD server needs something to export');
  if (distinct < exports.length) throw new B2Error('usage', 'two NBD exports have the same name');
  for (const { name, description } of exports) {
    for (const text of [name, description]) {
      if (parseString(Buffer.from(text, 'utf8')) === text) continue;
      throw new B2Error('usage', `the NBD export "${text.slice(0, 60)}" is too long or not text`, {
        hint: `Names and descriptions have at most ${MAX_STRING_BYTES} bytes.`,
      });
    }
  }
}

function tlsOptions(tls: NbdTls, handshakeMs: number): TlsOptions {
  const context = {
    cert: tls.cert,
    key: tls.key,
    minVersion: 'TLSv1.2',
    ...(tls.clientCa === undefined ? {} : { ca: tls.clientCa }),
  } as const;
  try {
    loadTls().createSecureContext(context);
  } catch (error) {
    throw new B2Error(
      'config',
      `the certificate or key for TLS cannot be used: ${messageOf(error)}`,
      {
        cause: error,
        hint: 'Give the certificate, its key and the CA as PEM; the key must be the one of the certificate.',
      },
    );
  }
  const checked = tls.clientCa === undefined ? {} : { requestCert: true, rejectUnauthorized: true };
  return { ...context, ...checked, handshakeTimeout: handshakeMs };
}

function stackOf(error: unknown): string {
  return error instanceof Error ? (error.stack ?? error.message) : messageOf(error);
}

async function listenOn(
  server: Server,
  name: string,
  where: { host: string; port: number } | { path: string },
): Promise<void> {
  await new Promise<void>((done, reject) => {
    const fail = (error: Error): void => {
      const taken = errnoOf(error) === 'EADDRINUSE';
      reject(
        taken
          ? new B2Error('exists', `listen on ${name}: the address is in use`, { cause: error })
          : ioError('listen on', name, error),
      );
    };
    server.once('error', fail);
    server.listen(where, () => {
      server.off('error', fail);
      done();
    });
  });
}

/**
 * Makes the socket in a private directory beside its place, sets its mode and links it there: nobody can connect before
 * the mode is right, and nothing of that name is ever overwritten.
 */
async function listenOnPath(server: Server, path: string): Promise<void> {
  const directory = dirname(path);
  const longest = Math.max(
    Buffer.byteLength(path),
    Buffer.byteLength(directory) + STAGING_SUFFIX_BYTES,
  );
  if (longest > MAX_SOCKET_PATH_BYTES) {
    throw new B2Error('usage', `the path of the socket ${path} is too long for a unix socket`, {
      hint: `It has at most ${MAX_SOCKET_PATH_BYTES} bytes, its directory at most ${MAX_SOCKET_PATH_BYTES - STAGING_SUFFIX_BYTES}.`,
    });
  }
  await removeStaleSocket(path);
  let staging: string | undefined;
  try {
    staging = await mkdtemp(join(directory, '.b2-'));
    const staged = join(staging, 's');
    await listenOn(server, path, { path: staged });
    await chmod(staged, 0o600);
    await link(staged, path);
  } catch (error) {
    server.close();
    throw ioError('make socket', path, error);
  } finally {
    if (staging !== undefined) await rm(staging, { recursive: true, force: true });
  }
}

/** Removes a socket that a dead server has left; leaves everything else, which then is in the way. */
async function removeStaleSocket(path: string): Promise<void> {
  try {
    if (!(await lstat(path)).isSocket()) {
      throw new B2Error('exists', `make socket ${path}: a file of that name is there`);
    }
    if (await answers(path)) {
      throw new B2Error('exists', `make socket ${path}: another server is listening on it`);
    }
    await unlink(path);
  } catch (error) {
    const failure = ioError('make socket', path, error);
    if (failure.kind !== 'not-found') throw failure;
  }
}

function answers(path: string): Promise<boolean> {
  return new Promise((done) => {
    const probe = connect(path);
    probe.on('connect', () => {
      probe.destroy();
      done(true);
    });
    // Only a refusal says that nobody is there.
    probe.on('error', (error) => done(errnoOf(error) !== 'ECONNREFUSED'));
  });
}
