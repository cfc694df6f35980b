/**
 * Worker threads: starting them from the built program, giving each a job, and bringing results, messages, errors and
 * aborts across the border.
 *
 * A worker module calls {@link serveWorker} once; the other side calls {@link runWorkers}. Jobs and results cross by
 * structured clone: plain data, typed arrays, SharedArrayBuffers. What is shared between threads for speed
 * is a SharedArrayBuffer in the job.
 */
import { existsSync } from 'node:fs';
import { sep } from 'node:path';
import { fileURLToPath, pathToFileURL } from 'node:url';
import {
  Worker,
  isMainThread,
  parentPort,
  workerData,
  type MessagePort,
} from 'node:worker_threads';

import { B2Error, type ErrorKind, type ExitCode, errnoOf, messageOf } from './errors.js';

/** An error as plain data. Nested causes are kept. */
export interface PortableError {
  readonly type: 'b2' | 'error';
  readonly name: string;
  readonly message: string;
  readonly stack: string | undefined;
  readonly cause: PortableError | undefined;
  /** Of a B2Error. */
  readonly kind?: ErrorKind;
  readonly code?: ExitCode;
  readonly hint?: string;
  readonly retryable?: boolean;
  /** Of a system error. */
  readonly errno?: string;
}

const MAX_CAUSES = 8;

/** `error` in a form that structured clone and JSON keep whole. */
export function toPortableError(error: unknown, depth = 0): PortableError {
  const isError = error instanceof Error;
  const inner: unknown = isError ? error.cause : undefined;
  const common = {
    name: isError ? error.name : 'Error',
    message: messageOf(error),
    stack: isError ? error.stack : undefined,
    cause:
      inner === undefined || depth >= MAX_CAUSES ? undefined : toPortableError(inner, depth + 1),
  };
  if (error instanceof B2Error) {
    return {
      type: 'b2',
      ...common,
      kind: error.kind,
      code: error.code,
      retryable: error.retryable,
      ...(error.hint === undefined ? {} : { hint: error.hint }),
    };
  }
  const errno = errnoOf(error);
  return { type: 'error', ...common, ...(errno === undefined ? {} : { errno }) };
}

/** The error again: a {@link B2Error} with its kind, code, hint and cause, or an Error with its name, code and stack. */
export function fromPortableError(portable: PortableError): Error {
  const cause = portable.cause === undefined ? undefined : fromPortableError(portable.cause);
  if (portable.type === 'b2') {
    const error = new B2Error(portable.kind ?? 'failed', portable.message, {
      retryable: portable.retryable ?? false,
      ...(portable.code === undefined ? {} : { code: portable.code }),
      ...(portable.hint === undefined ? {} : { hint: portable.hint }),
      ...(cause === undefined ? {} : { cause }),
    });
    if (portable.stack !== undefined) error.stack = portable.stack;
    return error;
  }
  const error = new Error(portable.message, cause === undefined ? undefined : { cause });
  error.name = portable.name;
  if (portable.stack !== undefined) error.stack = portable.stack;
  return portable.errno === undefined ? error : Object.assign(error, { code: portable.errno });
}

/** Why work was given up: the signal's reason if that is a B2Error, else one of kind `interrupted`. */
export function abortError(signal: AbortSignal, what: string): B2Error {
  const reason: unknown = signal.reason;
  if (reason instanceof B2Error) return reason;
  return new B2Error('interrupted', `${what} was interrupted`, { cause: reason });
}

/** What a job can use inside its worker. */
export interface WorkerContext<Message> {
  /** 0, 1, … in the order of the jobs. */
  readonly index: number;
  /** Aborts when the starter's signal does, and when another worker has failed. May be aborted from the start. */
  readonly signal: AbortSignal;
  /** The same question without waiting for the event loop: true as soon as the starter has asked to stop. */
  readonly isAborted: () => boolean;
  /** Sends something to the starter's `onMessage`. */
  readonly post: (message: Message) => void;
}

/** What a thread is started with: its job, or (undefined) the news that this comes as the first message. */
interface WorkerData<Job> {
  readonly b2Worker: true;
  readonly start: WorkerStart<Job> | undefined;
}

interface WorkerStart<Job> {
  readonly index: number;
  readonly job: Job;
  readonly stop: SharedArrayBuffer;
}

type FromWorker<Result, Message> =
  | LoadedMessage
  | { readonly type: 'message'; readonly message: Message }
  | { readonly type: 'result'; readonly result: Result }
  | { readonly type: 'error'; readonly error: PortableError };

/** The first message of a thread that was started ahead of its job. */
export interface LoadedMessage {
  readonly type: 'loaded';
}

const loading = new Set<Promise<void>>();

/**
 * For a thread that is started ahead of its job, and says {@link LoadedMessage} when it has loaded its modules: {@link threadsLoaded}
 * waits for that. It does not keep the process alive otherwise.
 */
export function trackLoading(worker: Worker): void {
  const loaded = new Promise<void>((resolve) => {
    const over = (): void => resolve();
    worker.once('message', over).once('error', over).once('exit', over);
  }).finally(() => loading.delete(loaded));
  loading.add(loaded);
}

/**
 * Resolves when no thread is loading modules. To be awaited before the process ends: Node.js ends the process with SIGABRT where a
 * thread is stopped while it loads a native module ("napi_throw").
 */
export async function threadsLoaded(): Promise<void> {
  // The threads themselves do not keep the process alive.
  const alive = setInterval(() => undefined, 1000);
  while (loading.size > 0) await Promise.all(loading);
  clearInterval(alive);
}

/** True in a thread that {@link runWorkers} has started. */
export function isWorkerThread(): boolean {
  return !isMainThread && isStart(workerData);
}

function isStart(data: unknown): boolean {
  return typeof data === 'object' && data !== null && 'b2Worker' in data && data.b2Worker === true;
}

/**
 * To be called once by a worker module: runs the job it was started with and reports its result or error. In any
 * other thread it does nothing, so that the module can be imported for its types and functions. `prepare` is called in a thread
 * that has no job yet ({@link warmWorkers}).
 */
export function serveWorker<Job, Result, Message = never>(
  run: (job: Job, context: WorkerContext<Message>) => Promise<Result>,
  prepare?: () => void,
): void {
  const port = parentPort;
  if (port === null || !isWorkerThread()) return;
  const { start } = workerData as WorkerData<Job>;
  if (start !== undefined) {
    serveJob(port, start, run);
    return;
  }
  port.once('message', (message: WorkerStart<Job>) => serveJob(port, message, run));
  prepare?.();
  const loaded: LoadedMessage = { type: 'loaded' };
  port.postMessage(loaded);
}

function serveJob<Job, Result, Message>(
  port: MessagePort,
  start: WorkerStart<Job>,
  run: (job: Job, context: WorkerContext<Message>) => Promise<Result>,
): void {
  const stop = new Int32Array(start.stop);
  const abort = new AbortController();
  const send = (message: FromWorker<Result, Message>): void => {
    port.postMessage(message);
  };
  const stopped = (): void => {
    abort.abort(new B2Error('interrupted', 'the work was interrupted'));
  };
  port.on('message', stopped); // the starter says one thing only: stop
  if (Atomics.load(stop, 0) !== 0) stopped();
  const context: WorkerContext<Message> = {
    index: start.index,
    signal: abort.signal,
    isAborted: () => Atomics.load(stop, 0) !== 0,
    post: (message) => {
      send({ type: 'message', message });
    },
  };
  void (async () => {
    try {
      send({ type: 'result', result: await run(start.job, context) });
    } catch (error) {
      send({ type: 'error', error: toPortableError(error) });
    } finally {
      port.close(); // nothing keeps the thread now
    }
  })();
}

export interface RunWorkersOptions<Message> {
  /** For messages: "the scan of /dev/sda". */
  readonly what: string;
  readonly signal?: AbortSignal | undefined;
  readonly onMessage?: (index: number, message: Message) => void;
  /** Message ports in the job with this index, which move to its thread. */
  readonly transfer?: (index: number) => readonly MessagePort[];
  /** JavaScript heap of one worker at most, in MiB; buffers do not count. Default: Node's own limit. */
  readonly heapMiB?: number;
  /** How long a worker may take to stop by itself after an abort, or after its result, before it is ended. Default 10000. */
  readonly graceMs?: number;
}

/**
 * The file to start for a worker module. In the built program that is the module itself; from sources (tests) its
 * built form in dist/, because a worker thread gets no loader for TypeScript.
 */
export function workerFile(moduleUrl: URL): URL {
  const file = fileURLToPath(moduleUrl);
  if (existsSync(file) && file.endsWith('.js')) return moduleUrl;
  const marker = `${sep}src${sep}`;
  const at = file.lastIndexOf(marker);
  if (at >= 0) {
    const rest = file.slice(at + marker.length).replace(/\.ts$/, '.js');
    const built = `${file.slice(0, at)}${sep}dist${sep}${rest}`;
    if (existsSync(built)) return pathToFileURL(built);
  }
  throw new B2Error('failed', `a part of b2 is missing: ${file}`, {
    hint: 'Install b2 again, or in a checkout run "npm run build".',
  });
}

interface Spare {
  readonly worker: Worker;
  readonly forget: () => void;
}

const spares = new Map<string, Spare[]>();

/**
 * Starts up to `count` threads that load the module and wait for the next {@link runWorkers} with it: for a command that will need
 * them and has something else to do first. They do not keep the process alive; one that ends before it is needed is not missed.
 */
export function warmWorkers(moduleUrl: URL, count: number): void {
  let file: URL;
  try {
    file = workerFile(moduleUrl);
  } catch {
    return; // runWorkers says it
  }
  const kept = spares.get(file.href) ?? [];
  spares.set(file.href, kept);
  while (kept.length < count) {
    const data: WorkerData<never> = { b2Worker: true, start: undefined };
    const worker = new Worker(file, { workerData: data });
    const forget = (): void => {
      const at = kept.findIndex((spare) => spare.worker === worker);
      if (at >= 0) kept.splice(at, 1);
    };
    worker.on('error', forget).on('exit', forget).unref();
    trackLoading(worker);
    kept.push({ worker, forget });
  }
}

/** A thread for the job: one that waits, or a new one. */
function startWorker<Job>(
  file: URL,
  start: WorkerStart<Job>,
  transferList: readonly MessagePort[],
  name: string,
  heapMiB: number | undefined,
): Worker {
  const spare = heapMiB === undefined ? spares.get(file.href)?.shift() : undefined;
  if (spare === undefined) {
    const data: WorkerData<Job> = { b2Worker: true, start };
    return new Worker(file, {
      workerData: data,
      transferList: [...transferList],
      name,
      ...(heapMiB === undefined ? {} : { resourceLimits: { maxOldGenerationSizeMb: heapMiB } }),
    });
  }
  const { worker, forget } = spare;
  try {
    worker.postMessage(start, transferList);
  } catch (error) {
    void worker.terminate();
    throw error;
  }
  worker.off('error', forget).off('exit', forget).ref();
  return worker;
}

/**
 * Runs one job in a thread each and resolves to their results, in order. `moduleUrl` names a module that calls
 * {@link serveWorker}: `new URL('./x-worker.js', import.meta.url)`.
 *
 * If a job fails, or a thread dies, the others are told to stop and the first error is thrown. If `signal` aborts, all are
 * told and the result is {@link abortError} (also when a job finished or failed meanwhile). Either way no thread is left when the
 * promise settles.
 */
export async function runWorkers<Job, Result, Message = never>(
  moduleUrl: URL,
  jobs: readonly Job[],
  options: RunWorkersOptions<Message>,
): Promise<Result[]> {
  const { signal, what } = options;
  const throwIfAborted = (): void => {
    if (signal?.aborted === true) throw abortError(signal, what);
  };
  throwIfAborted();
  const file = workerFile(moduleUrl);
  const stop = new SharedArrayBuffer(4);
  const flag = new Int32Array(stop);
  const graceMs = options.graceMs ?? 10_000;
  const running = new Map<Worker, NodeJS.Timeout | undefined>();
  let failure: { readonly error: unknown } | undefined;

  const limit = (worker: Worker): void => {
    if (!running.has(worker) || running.get(worker) !== undefined) return;
    running.set(
      worker,
      setTimeout(() => void worker.terminate(), graceMs),
    );
  };
  const stopAll = (): void => {
    Atomics.store(flag, 0, 1);
    for (const worker of running.keys()) {
      worker.postMessage('stop');
      limit(worker);
    }
  };
  const fail = (error: unknown): void => {
    failure ??= { error };
    stopAll();
  };

  const one = (job: Job, index: number): Promise<{ result: Result } | undefined> =>
    new Promise((resolve) => {
      let result: { result: Result } | undefined;
      let reported = false;
      let worker: Worker;
      try {
        worker = startWorker(
          file,
          { index, job, stop },
          options.transfer?.(index) ?? [],
          `b2 ${what}`.slice(0, 60),
          options.heapMiB,
        );
      } catch (error) {
        fail(error);
        resolve(undefined);
        return;
      }
      running.set(worker, undefined);
      worker.on('message', (message: FromWorker<Result, Message>) => {
        switch (message.type) {
          case 'message':
            try {
              options.onMessage?.(index, message.message);
            } catch (error) {
              fail(error);
            }
            return;
          case 'result':
            reported = true;
            result = { result: message.result };
            limit(worker);
            return;
          case 'loaded':
            return;
          case 'error':
            reported = true;
            fail(fromPortableError(message.error));
            return;
        }
      });
      worker.on('messageerror', fail);
      worker.on('error', (error) => {
        reported = true;
        const memory = errnoOf(error) === 'ERR_WORKER_OUT_OF_MEMORY';
        fail(
          memory
            ? new B2Error('failed', `${what}: a worker thread ran out of memory`, {
                cause: error,
                hint: 'Close other programs, or give b2 more memory (limits: in the configuration).',
              })
            : error,
        );
      });
      worker.on('exit', (code) => {
        clearTimeout(running.get(worker));
        running.delete(worker);
        if (!reported) {
          fail(
            new B2Error('failed', `${what}: a worker thread ended without a result (exit ${code})`),
          );
        }
        resolve(result);
      });
    });

  signal?.addEventListener('abort', stopAll, { once: true });
  try {
    const found = await Promise.all(jobs.map(one));
    throwIfAborted();
    if (failure !== undefined) throw failure.error;
    return found.flatMap((f) => (f === undefined ? [] : [f.result]));
  } finally {
    signal?.removeEventListener('abort', stopAll);
  }
}
