// A worker for test/unit/workers.test.ts. Runs as built, because a thread gets no loader for TypeScript.
import { setTimeout as sleep } from 'node:timers/promises';
import { B2Error } from '../../dist/errors.js';
import { serveWorker } from '../../dist/workers.js';

async function aborted(signal) {
  if (signal.aborted) return;
  await new Promise((resolve) => {
    signal.addEventListener('abort', resolve, { once: true });
  });
}

serveWorker(async (job, context) => {
  switch (job.do) {
    case 'echo':
      context.post(`hello from ${context.index}`);
      return { got: job.value, index: context.index };
    case 'add':
      Atomics.add(new Int32Array(job.shared), 0, job.value);
      return null;
    case 'fail':
      throw new B2Error('no-space', 'write /repo/packs/ab: full', {
        hint: 'Make room.',
        retryable: true,
        code: 6,
        cause: Object.assign(new Error('ENOSPC: no space left'), { code: 'ENOSPC' }),
      });
    case 'bug':
      throw new TypeError('undefined is not a function');
    case 'wait':
      await aborted(context.signal);
      if (job.shared !== undefined) Atomics.add(new Int32Array(job.shared), 0, 1);
      throw context.signal.reason;
    case 'wait-finish':
      await aborted(context.signal);
      return 'finished';
    case 'spin':
      context.post('spinning');
      while (!context.isAborted());
      return 'stopped';
    case 'hang':
      context.post('hanging');
      for (;;) await sleep(1000);
    case 'exit':
      process.exit(7);
    case 'leak':
      setInterval(() => undefined, 1000);
      return 'done';
    default:
      throw new Error(`no such job: ${job.do}`);
  }
});
