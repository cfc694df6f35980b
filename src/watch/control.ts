/**
 * The control socket of a watch: how `b2 snapshot` and `b2 status`, from any shell of the same user, reach the process that
 * watches a device.
 *
 * Each process has one unix socket `watch-PID-RANDOM.sock` (mode 0600) in the control directory (mode 0700): `/run/b2` of root,
 * `$XDG_RUNTIME_DIR/b2` of others, or where `B2_RUNTIME_DIR` says. Clients find sockets by listing that directory. A socket appears under its
 * name only when it already listens (it is renamed), so one that refuses connections belongs to a dead process and is removed.
 *
 * On a connection: one request, a line of JSON; one answer, a line of JSON; the server closes. A client that leaves before the answer has
 * given up, and so does what it asked for. `{"type":"status"}`, `{"type":"point","volume":V,"class":C,"name":N,"tags":[…]}`,
 * `{"type":"resync","volume":V}`; the answer is `{"ok":true,"result":…}` or `{"ok":false,"error":…}` (a portable error, workers.ts).
 */
import { chmod, lstat, mkdir, readdir, rename, unlink } from 'node:fs/promises';
import { createConnection, createServer, type Server, type Socket } from 'node:net';
import { tmpdir } from 'node:os';
import path from 'node:path';
import type { Random } from '../clock.js';
import { B2Error, errnoOf, ioError, messageOf } from '../errors.js';
import { PointClass, type PointClassName } from '../format/commit.js';
import { fromPortableError, toPortableError, type PortableError } from '../workers.js';
import type { PointReport, WatchReport } from './report.js';

type Environment = Readonly<Record<string, string | undefined>>;

/** Least classes that can be asked for. */
export type RequestedClass = Extract<PointClassName, 'crash' | 'fs' | 'app'>;
export const REQUESTED_CLASSES: readonly RequestedClass[] = ['crash', 'fs', 'app'];

export function classOf(name: RequestedClass): PointClass {
  return PointClass[name];
}

/** A point now, of the device whose volume (name or id) or path this is; pinned where `name` is given. */
export interface PointOrder {
  readonly type: 'point';
  readonly volume: string;
  /** Absent: the best that can be had. */
  readonly class?: RequestedClass;
  readonly name?: string;
  readonly tags: readonly string[];
}

export type ControlRequest =
  { readonly type: 'status' } | PointOrder | { readonly type: 'resync'; readonly volume: string };

/** A point of one device; of another of its group, that of the same instant, pinned under the same name. */
export interface MemberPoint {
  readonly volume: string;
  readonly volumeId: string;
  readonly device: string;
  readonly sizeBytes: number;
  readonly point: PointReport;
  readonly hash: string;
}

/** A point that was made on request. */
export interface PointAnswer extends MemberPoint {
  /** The snapshot's name, where it was pinned. */
  readonly name?: string;
  /** Why it is not of a better class, where the best was asked for. */
  readonly note?: string;
  /** What could not be read of the device and is not in the point, which is `fuzzy` then: the first hundred ranges. */
  readonly unreadable?: readonly { readonly offset: number; readonly length: number }[];
  /** The group of the device. `missing`: devices of it that have no point of this instant; `others`: those that have. */
  readonly group?: {
    readonly name: string;
    readonly missing: readonly string[];
    readonly others: readonly MemberPoint[];
  };
}

/** Who answers. `signal` aborts when the client has left. */
export interface ControlHandler {
  status(): WatchReport;
  point(order: PointOrder, signal: AbortSignal): Promise<PointAnswer>;
  resync(volume: string): { readonly volume: string };
}

const SOCKET_NAME = /^watch-\d+-[0-9a-f]{8}\.sock$/;
const MAX_REQUEST_BYTES = 64 * 1024;
const MAX_ANSWER_BYTES = 16 * 1024 * 1024;
/** Of `sun_path`, with its zero byte. */
const MAX_PATH_BYTES = 107;

/** Where the sockets of this user lie. */
export function controlDirectory(env: Environment, uid: number): string {
  const own = env['B2_RUNTIME_DIR'];
  if (own !== undefined && own !== '') return path.resolve(own);
  if (uid === 0) return '/run/b2';
  const xdg = env['XDG_RUNTIME_DIR'];
  return xdg?.startsWith('/') === true ? path.join(xdg, 'b2') : path.join(tmpdir(), `b2-${uid}`);
}

/** Undefined if the directory does not exist; refuses one in which others could put sockets of theirs. */
async function checkedDirectory(directory: string, uid: number): Promise<string | undefined> {
  let found: Awaited<ReturnType<typeof lstat>>;
  try {
    found = await lstat(directory);
  } catch (error) {
    if (errnoOf(error) === 'ENOENT') return undefined;
    throw ioError('look at', directory, error);
  }
  if (!found.isDirectory() || found.uid !== uid || (found.mode & 0o077) !== 0) {
    throw new B2Error(
      'refused',
      `${directory} is not a directory of this user alone, so no control socket of b2 is used in it`,
      {
        hint: `Make it one: mode 0700, owned by user ${uid}; or set B2_RUNTIME_DIR to another directory.`,
      },
    );
  }
  return directory;
}

/** Is there a process behind the socket? False only where certainly not. */
async function isLive(file: string): Promise<boolean> {
  try {
    (await connect(file)).destroy();
    return true;
  } catch (error) {
    return !['ECONNREFUSED', 'ENOENT'].includes(errnoOf(error) ?? '');
  }
}

function connect(file: string): Promise<Socket> {
  return new Promise((resolve, reject) => {
    const socket = createConnection({ path: file });
    socket.once('connect', () => {
      socket.removeAllListeners('error');
      resolve(socket);
    });
    socket.once('error', reject);
  });
}

/** Sockets of live processes; those of dead ones are removed. */
export async function findControlSockets(directory: string, uid: number): Promise<string[]> {
  if ((await checkedDirectory(directory, uid)) === undefined) return [];
  const live: string[] = [];
  for (const name of (await readdir(directory)).filter((n) => SOCKET_NAME.test(n)).sort()) {
    const file = path.join(directory, name);
    if (await isLive(file)) live.push(file);
    else await unlink(file).catch(() => undefined);
  }
  return live;
}

/** The first line that comes from `socket`, undefined if the other side ends before. */
function readLine(socket: Socket, maxBytes: number): Promise<string | undefined> {
  return new Promise((resolve, reject) => {
    const parts: Buffer[] = [];
    let bytes = 0;
    socket.on('data', (data: Buffer) => {
      const end = data.indexOf(0x0a);
      parts.push(end < 0 ? data : data.subarray(0, end));
      bytes += data.length;
      if (end >= 0) resolve(Buffer.concat(parts).toString('utf8'));
      else if (bytes > maxBytes) reject(new Error(`more than ${maxBytes} bytes without an end`));
    });
    socket.once('end', () => resolve(undefined));
    socket.once('close', () => resolve(undefined));
    socket.once('error', reject);
  });
}

type Answer =
  | { readonly ok: true; readonly result: unknown }
  | { readonly ok: false; readonly error: PortableError };

/** Checks a request; it comes from a process of the same user, but perhaps of another version. */
export function parseRequest(text: string): ControlRequest {
  const bad = (why: string): B2Error => new B2Error('usage', `control request: ${why}`);
  let value: unknown;
  try {
    value = JSON.parse(text);
  } catch {
    throw bad('not JSON');
  }
  if (typeof value !== 'object' || value === null) throw bad('not an object');
  const fields = new Map<string, unknown>(Object.entries(value));
  const textOf = (key: string): string => {
    const field = fields.get(key);
    if (typeof field !== 'string' || field === '') throw bad(`"${key}" must be a text`);
    return field;
  };
  const type = fields.get('type');
  switch (type) {
    case 'status':
      return { type };
    case 'resync':
      return { type, volume: textOf('volume') };
    case 'point': {
      const tags = fields.get('tags') ?? [];
      if (!Array.isArray(tags) || !tags.every((t): t is string => typeof t === 'string'))
        throw bad('"tags" must be a list of texts');
      const wanted = fields.get('class');
      const cls = REQUESTED_CLASSES.find((c) => c === wanted);
      if (wanted !== undefined && cls === undefined)
        throw bad(`"class" must be one of ${REQUESTED_CLASSES.join(', ')}`);
      return {
        type,
        volume: textOf('volume'),
        ...(cls === undefined ? {} : { class: cls }),
        ...(fields.get('name') === undefined ? {} : { name: textOf('name') }),
        tags,
      };
    }
    default:
      throw bad(`unknown type ${JSON.stringify(type)}`);
  }
}

export interface ControlServer {
  readonly path: string;
  close(): Promise<void>;
}

export interface ServeOptions {
  readonly directory: string;
  readonly uid: number;
  readonly random: Random;
  readonly handler: ControlHandler;
}

/** Makes the socket and answers until it is closed. Kinds `refused`, `io`. */
export async function serveControl(options: ServeOptions): Promise<ControlServer> {
  const { directory, uid, handler } = options;
  try {
    await mkdir(directory, { recursive: true, mode: 0o700 });
  } catch (error) {
    throw ioError('make directory', directory, error);
  }
  await checkedDirectory(directory, uid);
  await findControlSockets(directory, uid);
  const id = Buffer.from(options.random(4)).toString('hex');
  const file = path.join(directory, `watch-${process.pid}-${id}.sock`);
  const early = `${file.slice(0, -'.sock'.length)}.new`;
  if (Buffer.byteLength(file) > MAX_PATH_BYTES) {
    throw new B2Error('refused', `the path of the control socket is too long: ${file}`, {
      hint: 'Set B2_RUNTIME_DIR to a directory with a shorter path.',
    });
  }
  const open = new Set<Socket>();
  const server = createServer({ allowHalfOpen: true }, (socket) => {
    open.add(socket);
    socket.once('close', () => open.delete(socket));
    void serveOne(socket, handler);
  });
  try {
    await listen(server, early);
    await chmod(early, 0o600);
    await rename(early, file);
  } catch (error) {
    server.close();
    await unlink(early).catch(() => undefined);
    throw ioError('make the control socket', file, error);
  }
  return {
    path: file,
    async close() {
      await unlink(file).catch(() => undefined);
      for (const socket of open) socket.destroy();
      await new Promise<void>((resolve) => server.close(() => resolve()));
    },
  };
}

function listen(server: Server, file: string): Promise<void> {
  return new Promise((resolve, reject) => {
    server.once('error', reject);
    server.listen({ path: file }, () => {
      server.removeListener('error', reject);
      // Failing to accept one client (too many files) ends nothing.
      server.on('error', () => undefined);
      resolve();
    });
  });
}

async function serveOne(socket: Socket, handler: ControlHandler): Promise<void> {
  const left = new AbortController();
  const leave = (): void => left.abort();
  socket.on('error', leave);
  socket.once('close', leave);
  socket.once('end', leave);
  let answer: Answer;
  try {
    const line = await readLine(socket, MAX_REQUEST_BYTES);
    if (line === undefined) {
      socket.destroy();
      return;
    }
    answer = { ok: true, result: await handle(parseRequest(line), handler, left.signal) };
  } catch (error) {
    const portable = toPortableError(error);
    answer = { ok: false, error: { ...portable, stack: undefined, cause: undefined } };
  }
  socket.end(`${JSON.stringify(answer)}\n`);
}

function handle(request: ControlRequest, handler: ControlHandler, signal: AbortSignal): unknown {
  switch (request.type) {
    case 'status':
      return handler.status();
    case 'point':
      return handler.point(request, signal);
    case 'resync':
      return handler.resync(request.volume);
  }
}

/** One request and its answer. Aborting `signal` gives up, and the other side with it. Throws what the other side threw. */
async function ask(file: string, request: ControlRequest, signal?: AbortSignal): Promise<unknown> {
  let socket: Socket;
  try {
    socket = await connect(file);
  } catch (error) {
    throw ioError('connect to the running watch at', file, error);
  }
  const giveUp = (): void => void socket.destroy();
  signal?.addEventListener('abort', giveUp, { once: true });
  try {
    if (signal?.aborted === true) giveUp();
    socket.write(`${JSON.stringify(request)}\n`);
    const line = await readLine(socket, MAX_ANSWER_BYTES);
    if (line === undefined) {
      if (signal?.aborted === true) throw new B2Error('interrupted', 'interrupted');
      throw new B2Error('failed', `the running watch at ${file} ended before it answered`, {
        hint: 'Its log says why.',
      });
    }
    const answer = JSON.parse(line) as Answer;
    if (!answer.ok) throw fromPortableError(answer.error);
    return answer.result;
  } catch (error) {
    if (error instanceof B2Error) throw error;
    throw new B2Error('failed', `asking the running watch at ${file}: ${messageOf(error)}`, {
      cause: error,
    });
  } finally {
    signal?.removeEventListener('abort', giveUp);
    socket.destroy();
  }
}

export async function askStatus(file: string, signal?: AbortSignal): Promise<WatchReport> {
  const answer = await ask(file, { type: 'status' }, signal);
  // The other side may be of another version, for as long as it has not been restarted.
  if (typeof answer !== 'object' || answer === null || !('devices' in answer))
    throw new B2Error(
      'failed',
      `the running watch at ${file} answered in a way unknown to this b2`,
      {
        hint: 'Restart it: it may be of another version.',
      },
    );
  return answer as WatchReport;
}

export async function askPoint(
  file: string,
  order: PointOrder,
  signal?: AbortSignal,
): Promise<PointAnswer> {
  return (await ask(file, order, signal)) as PointAnswer;
}

/** A running watch that answered. */
export interface RunningWatch {
  readonly path: string;
  readonly report: WatchReport;
}

/**
 * Every running watch of this user with its state. One that does not answer within `timeoutMs` is told to `warn` and left out, as is a
 * directory that cannot be trusted.
 */
export async function findWatches(options: {
  readonly directory: string;
  readonly uid: number;
  readonly timeoutMs: number;
  readonly warn: (message: string) => void;
}): Promise<RunningWatch[]> {
  const { warn } = options;
  let files: string[];
  try {
    files = await findControlSockets(options.directory, options.uid);
  } catch (error) {
    warn(messageOf(error));
    return [];
  }
  const asked = await Promise.all(
    files.map(async (file): Promise<RunningWatch | undefined> => {
      try {
        return {
          path: file,
          report: await askStatus(file, AbortSignal.timeout(options.timeoutMs)),
        };
      } catch (error) {
        warn(`a running watch does not say how it is: ${messageOf(error)}`);
        return undefined;
      }
    }),
  );
  return asked.filter((w): w is RunningWatch => w !== undefined);
}
