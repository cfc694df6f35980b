/**
 * The program that freezes and thaws: a process of its own, so that a file system is thawed whatever becomes of the one that asked.
 *
 * It thaws when it is told to, at the bound that the freeze was asked with, and when its input ends (whoever started it has died);
 * after that it ends. Only this process freezes, so a freeze cannot come after its own thaw. It writes to no file between freeze
 * and thaw, and ignores the signals that end its parent. Its memory is not locked (V8 dies of mlockall: it gives pages back by
 * MADV_DONTNEED); it need not be, because reading code or swap in again waits for no freeze.
 *
 * Started as `node helper.js STALE_DIR`; what is said is in messages.ts.
 */
import { constants as fsConstants, writeSync } from 'node:fs';
import { mkdir, open, readdir, rename, rm, writeFile, type FileHandle } from 'node:fs/promises';
import { constants, setPriority } from 'node:os';
import path from 'node:path';

import { systemClock } from '../../clock.js';
import { mountedNumberOfFd } from '../../devices/in-use.js';
import { errnoOf, messageOf } from '../../errors.js';
import { currentIdentity } from '../../process-identity.js';
import { freezeFs, makeRealTime, syncFs, thawFs } from '../../syscalls.js';
import {
  lineReader,
  type Alive,
  type Answer,
  type FreezeTarget,
  type Request,
} from './messages.js';

/** So much before the bound it thaws, so that the thaw is over by then. */
const MARGIN_MS = 10;
/** Standard output. */
const ANSWERS_FD = 1;
const staleDir = process.argv[2] ?? '';
const staleFile = path.join(staleDir, String(process.pid));

interface Opened {
  readonly target: FreezeTarget;
  readonly file: FileHandle;
  isFrozen: boolean;
}

let opened: Opened[] = [];
let frozenAtNs = 0n;
let thawedAtNs = 0n;
/** Why the file systems were not held until `thaw`; undefined as long as they are. */
let broken: string | undefined;
let isOver = false;
let bound: NodeJS.Timeout | undefined;
/** Thaws are one after the other. */
let thawing: Promise<void> = Promise.resolve();

function answer(text: Answer | Alive): void {
  if (isOver) return;
  try {
    writeSync(ANSWERS_FD, `${JSON.stringify(text)}\n`);
  } catch {
    // The reader has gone; the end of the input says so as well.
  }
}

function failed(target: number, error: unknown): Answer {
  return { type: 'failed', target, errno: errnoOf(error), message: messageOf(error) };
}

async function closeAll(): Promise<void> {
  const files = opened;
  opened = [];
  for (const { file } of files) await file.close().catch(() => undefined);
  await rm(staleFile, { force: true }).catch(() => undefined);
}

async function openAll(targets: readonly FreezeTarget[]): Promise<Answer> {
  await closeAll();
  broken = undefined;
  frozenAtNs = thawedAtNs = 0n;
  for (const [i, target] of targets.entries()) {
    try {
      const file = await open(target.path, fsConstants.O_RDONLY | fsConstants.O_NONBLOCK);
      opened.push({ target, file, isFrozen: false });
      if ((await mountedNumberOfFd(file.fd)) !== target.devNumber)
        throw new Error('another file system is mounted there now');
    } catch (error) {
      await closeAll();
      return failed(i, error);
    }
  }
  try {
    await mkdir(staleDir, { recursive: true, mode: 0o700 });
    // Whole or not there: who starts just now looks into it.
    await writeFile(`${staleFile}~`, JSON.stringify({ owner: currentIdentity(), targets }), {
      mode: 0o600,
    });
    await rename(`${staleFile}~`, staleFile);
  } catch {
    // The note is for the case that both processes are killed at one time; that is no reason not to freeze.
  }
  return { type: 'opened' };
}

/** Thaws what is frozen, the last frozen first. What cannot be thawed is tried again: it must not stay. */
function thawAll(): Promise<void> {
  thawing = thawing.then(async () => {
    clearTimeout(bound);
    for (const one of opened.toReversed()) {
      for (let pauseMs = 10; one.isFrozen; pauseMs = Math.min(1000, 2 * pauseMs)) {
        try {
          await thawFs(one.file.fd);
          one.isFrozen = false;
        } catch (error) {
          if (errnoOf(error) === 'EINVAL') {
            one.isFrozen = false;
            broken ??= `${one.target.path} was thawed by somebody else`;
          } else await systemClock.sleep(pauseMs);
        }
      }
    }
    if (thawedAtNs === 0n) thawedAtNs = systemClock.monotonicNs();
  });
  return thawing;
}

async function freezeAll(boundMs: number): Promise<Answer> {
  frozenAtNs = systemClock.monotonicNs();
  bound = setTimeout(
    () => {
      broken ??= `the bound of ${boundMs} ms was over`;
      void thawAll();
    },
    Math.max(1, boundMs - MARGIN_MS),
  );
  for (const [i, one] of opened.entries()) {
    try {
      if (broken === undefined && !isOver) {
        await freezeFs(one.file.fd);
        one.isFrozen = true;
      }
    } catch (error) {
      await thawAll();
      return failed(i, error);
    }
  }
  // The bound or the end of the parent may have come while the last one froze.
  if (broken !== undefined || isOver) {
    await thawAll();
    return failed(-1, new Error(broken ?? 'the program that asked has ended'));
  }
  return { type: 'frozen' };
}

async function thaw(): Promise<Answer> {
  const isWhole = opened.every((one) => one.isFrozen);
  await thawAll();
  if (!isWhole) broken ??= 'not everything was frozen';
  const frozenMs = Number(thawedAtNs - frozenAtNs) / 1e6;
  await closeAll();
  return { type: 'thawed', held: broken === undefined, frozenMs, why: broken };
}

async function serve(request: Exclude<Request, { op: 'ping' }>): Promise<Answer> {
  switch (request.op) {
    case 'open':
      return openAll(request.targets);
    case 'freeze':
      return freezeAll(request.boundMs);
    case 'thaw':
      return thaw();
  }
}

for (const signal of ['SIGINT', 'SIGTERM', 'SIGHUP'] as const) process.on(signal, () => undefined);
// Each is better where it may be had, and not needed.
try {
  setPriority(constants.priority.PRIORITY_HIGHEST);
} catch {
  // Not root.
}
/** What has to be done before it may be asked to freeze anything. */
async function prepare(): Promise<void> {
  await writeFile('/proc/self/oom_score_adj', '-1000').catch(() => undefined);
  // Loads the system calls and the threads they run on, so that no later call has to.
  {
    const root = await open('/proc/self', fsConstants.O_RDONLY);
    await thawFs(root.fd).catch(() => undefined);
    await syncFs(root.fd).catch(() => undefined);
    await root.close();
  }
  // A thaw that is due must not wait for a processor: on a machine with much to do the bound would be over by then. This
  // process sleeps but for these moments. All threads are there now.
  for (const tid of await readdir('/proc/self/task').catch((): string[] => [])) {
    try {
      makeRealTime(Number(tid));
    } catch {
      // Not root, or a container without real-time.
    }
  }
}

let queue: Promise<void> = Promise.resolve();
const end = (): void => {
  if (isOver) return;
  isOver = true;
  void thawAll();
  queue = queue.then(async () => {
    await thawAll();
    await closeAll();
  });
};
void prepare().then(() => {
  process.stdin.setEncoding('utf8');
  process.stdin.on(
    'data',
    lineReader((line) => {
      const request = JSON.parse(line) as Request;
      if (request.op === 'ping') answer({ type: 'alive' });
      else queue = queue.then(async () => answer(await serve(request)));
    }),
  );
  process.stdin.on('end', end);
  process.stdin.on('error', end);
  answer({ type: 'ready' });
});
