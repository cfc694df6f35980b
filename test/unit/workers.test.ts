import { spawnSync } from 'node:child_process';
import { describe, expect, test } from 'vitest';
import { B2Error } from '../../src/errors.js';
import {
  fromPortableError,
  isWorkerThread,
  runWorkers,
  serveWorker,
  toPortableError,
  threadsLoaded,
  warmWorkers,
  workerFile,
} from '../../src/workers.js';

const FIXTURE = new URL('../support/worker-fixture.js', import.meta.url);
const what = 'the test';

interface Job {
  readonly do: string;
  readonly value?: unknown;
  readonly shared?: SharedArrayBuffer;
}

async function caught(promise: Promise<unknown>): Promise<unknown> {
  return promise.then(
    (value) => {
      throw new Error(`did not fail, but gave ${JSON.stringify(value)}`);
    },
    (error: unknown) => error,
  );
}

describe('portable errors', () => {
  test('a B2Error keeps everything, its causes too', () => {
    const system = Object.assign(new Error('EIO: i/o error, read'), { code: 'EIO' });
    const middle = new B2Error('damaged', 'pack x: bad', { cause: system, hint: 'verify' });
    const outer = new B2Error('io', 'read y', { cause: middle, retryable: true, code: 5 });
    const back = fromPortableError(JSON.parse(JSON.stringify(toPortableError(outer))));
    expect(back).toBeInstanceOf(B2Error);
    expect(back).toMatchObject({
      kind: 'io',
      message: 'read y',
      code: 5,
      retryable: true,
      hint: undefined,
    });
    expect(back.stack).toBe(outer.stack);
    expect(back.cause).toBeInstanceOf(B2Error);
    expect(back.cause).toMatchObject({ kind: 'damaged', hint: 'verify', code: 5 });
    expect((back.cause as Error).cause).toMatchObject({
      code: 'EIO',
      message: 'EIO: i/o error, read',
    });
  });

  test('what is no error becomes one, and a ring of causes ends', () => {
    expect(fromPortableError(toPortableError('just text'))).toMatchObject({ message: 'just text' });
    const a = new Error('a');
    a.cause = a;
    expect(fromPortableError(toPortableError(a)).message).toBe('a');
  });
});

describe('runWorkers', () => {
  test('gives results in order, messages, and shared memory', async () => {
    const messages: string[] = [];
    const jobs: Job[] = [
      { do: 'echo', value: { a: [1n, new Uint8Array([1, 2])] } },
      { do: 'echo', value: 2 },
    ];
    const results = await runWorkers<Job, unknown, string>(FIXTURE, jobs, {
      what,
      onMessage: (index, message) => messages.push(`${index}: ${message}`),
    });
    expect(results).toEqual([
      { got: { a: [1n, new Uint8Array([1, 2])] }, index: 0 },
      { got: 2, index: 1 },
    ]);
    expect(messages.sort()).toEqual(['0: hello from 0', '1: hello from 1']);
    const shared = new SharedArrayBuffer(4);
    await runWorkers(
      FIXTURE,
      [3, 4].map((value) => ({ do: 'add', value, shared })),
      { what },
    );
    expect(new Int32Array(shared)[0]).toBe(7);
  });

  test('threads that wait already take the jobs, and their errors and aborts come through', async () => {
    warmWorkers(FIXTURE, 1);
    const messages: string[] = [];
    const results = await runWorkers<Job, unknown, string>(
      FIXTURE,
      [
        { do: 'echo', value: 1 },
        { do: 'echo', value: 2 },
      ],
      { what, onMessage: (index, message) => messages.push(`${index}: ${message}`) },
    );
    expect(results).toEqual([
      { got: 1, index: 0 },
      { got: 2, index: 1 },
    ]);
    expect(messages.sort()).toEqual(['0: hello from 0', '1: hello from 1']);

    warmWorkers(FIXTURE, 2);
    const shared = new SharedArrayBuffer(4);
    const failed = runWorkers<Job, unknown>(FIXTURE, [{ do: 'wait', shared }, { do: 'fail' }], {
      what,
    });
    expect(await caught(failed)).toMatchObject({ kind: 'no-space' });
    expect(new Int32Array(shared)[0]).toBe(1);

    warmWorkers(FIXTURE, 1);
    const died = runWorkers<Job, unknown>(FIXTURE, [{ do: 'exit' }], { what });
    expect(await caught(died)).toMatchObject({ kind: 'failed' });

    warmWorkers(FIXTURE, 1);
    const stop = new AbortController();
    const spinning = runWorkers<Job, unknown>(FIXTURE, [{ do: 'spin' }], {
      what,
      signal: stop.signal,
      onMessage: () => stop.abort(),
    });
    expect(await caught(spinning)).toMatchObject({ kind: 'interrupted' });
  });

  test('a job that cannot be sent to a thread that waits leaves no thread', async () => {
    warmWorkers(FIXTURE, 1);
    const job = { do: 'echo', value: () => 1 };
    const error = await caught(runWorkers<Job, unknown>(FIXTURE, [job], { what }));
    expect(error).toMatchObject({ name: 'DataCloneError' });
  });

  test('threads that were started in vain do not keep the process', () => {
    const module = new URL('../../dist/workers.js', import.meta.url);
    const script = `import { warmWorkers } from ${JSON.stringify(module.href)};
      warmWorkers(new URL(${JSON.stringify(FIXTURE.href)}), 2);`;
    const done = spawnSync(process.execPath, ['--input-type=module', '-e', script], {
      timeout: 30_000,
    });
    expect(done.signal).toBeNull();
    expect(done.status).toBe(0);
  });

  test('the end of the process can wait for threads that load, which a native module does not survive', async () => {
    warmWorkers(FIXTURE, 1);
    let isOver = false;
    const over = threadsLoaded().then(() => (isOver = true));
    await new Promise((resolve) => setImmediate(resolve));
    expect(isOver).toBe(false);
    await over;
    const module = new URL('../../dist/workers.js', import.meta.url);
    const scan = new URL('../../dist/capture/scan-worker.js', import.meta.url);
    const script = `import { threadsLoaded, warmWorkers } from ${JSON.stringify(module.href)};
      warmWorkers(new URL(${JSON.stringify(scan.href)}), 2);
      await threadsLoaded();
      process.exit(5);`;
    const done = spawnSync(process.execPath, ['--input-type=module', '-e', script], {
      timeout: 30_000,
    });
    expect([done.signal, done.status]).toEqual([null, 5]);
  });

  test('a B2Error of a worker arrives whole, and the others are told to stop', async () => {
    const shared = new SharedArrayBuffer(4);
    const error = await caught(
      runWorkers<Job, unknown>(FIXTURE, [{ do: 'wait', shared }, { do: 'fail' }], { what }),
    );
    expect(error).toBeInstanceOf(B2Error);
    expect(error).toMatchObject({
      kind: 'no-space',
      message: 'write /repo/packs/ab: full',
      hint: 'Make room.',
      retryable: true,
      code: 6,
      cause: { code: 'ENOSPC' },
    });
    expect(new Int32Array(shared)[0]).toBe(1);
  });

  test('a bug of a worker arrives as the error it was', async () => {
    const error = await caught(runWorkers<Job, unknown>(FIXTURE, [{ do: 'bug' }], { what }));
    expect(error).not.toBeInstanceOf(B2Error);
    expect(error).toMatchObject({ name: 'TypeError', message: 'undefined is not a function' });
  });

  test('a thread that dies is an error, not silence', async () => {
    const error = await caught(runWorkers<Job, unknown>(FIXTURE, [{ do: 'exit' }], { what }));
    expect(error).toMatchObject({
      kind: 'failed',
      message: 'the test: a worker thread ended without a result (exit 7)',
    });
  });

  test('an abort reaches waiting, spinning and deaf workers', async () => {
    const abort = new AbortController();
    let ready = 0;
    const error = await caught(
      runWorkers<Job, unknown, string>(
        FIXTURE,
        [{ do: 'spin' }, { do: 'hang' }, { do: 'wait-finish' }],
        {
          what,
          signal: abort.signal,
          graceMs: 50,
          onMessage: () => {
            if (++ready === 2) abort.abort();
          },
        },
      ),
    );
    expect(error).toMatchObject({
      kind: 'interrupted',
      message: 'the test was interrupted',
      code: 130,
    });
  });

  test('an abort before the start starts nothing, and its reason is the error', async () => {
    const reason = new B2Error('lost-claim', 'another writer has taken over');
    const missing = new URL('./there-is-no-such-worker.js', import.meta.url);
    const run = runWorkers<Job, unknown>(missing, [{ do: 'echo' }], {
      what,
      signal: AbortSignal.abort(reason),
    });
    expect(await caught(run)).toBe(reason);
  });

  test('a worker that leaves something open is ended after its result', async () => {
    expect(
      await runWorkers<Job, unknown>(FIXTURE, [{ do: 'leak' }], { what, graceMs: 20 }),
    ).toEqual(['done']);
  });

  test('a failing message handler stops the work', async () => {
    const error = await caught(
      runWorkers<Job, unknown, string>(FIXTURE, [{ do: 'spin' }], {
        what,
        onMessage: () => {
          throw new Error('handler');
        },
      }),
    );
    expect(error).toMatchObject({ message: 'handler' });
  });
});

describe('workerFile', () => {
  test('from sources it is the built module', () => {
    const file = workerFile(new URL('../../src/workers.js', import.meta.url));
    expect(file.pathname).toMatch(/\/dist\/workers\.js$/);
  });

  test('a missing module is said', () => {
    expect(() => workerFile(new URL('../../src/no-such-worker.js', import.meta.url))).toThrow(
      /part of b2 is missing/,
    );
  });
});

test('serveWorker does nothing in a thread that runWorkers has not started', () => {
  expect(isWorkerThread()).toBe(false); // vitest runs tests in worker threads of its own
  serveWorker(async () => {
    throw new Error('must not run');
  });
});
