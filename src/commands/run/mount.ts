import { spawn } from 'node:child_process';
import { closeSync, mkdirSync, openSync } from 'node:fs';
import { dirname, join } from 'node:path';

import { B2Error, ioError, messageOf } from '../../errors.js';
import type { B2Event, EventSink } from '../../events.js';
import { formatTimeLocal } from '../../human.js';
import { openMountTree } from '../../mount/tree.js';
import { serveMount } from '../../mount/server.js';
import { allowReadAhead } from '../../repo/point.js';
import { askPassword, findSecrets } from '../../secrets.js';
import type { Style } from '../../ui/style.js';
import { parseWhen } from '../../when.js';
import { fromPortableError, toPortableError, type PortableError } from '../../workers.js';
import type { MountInput } from '../mount.js';
import type { CommandContext, Outcome } from '../spec.js';
import { localTime, pointRow, type PointRow } from './rows.js';
import { secretPlaces, volumeNamed, withRepository } from './session.js';

/** The answer; with `--foreground` also a line of `type` `mounted` when the mount is live. */
export interface MountAnswer {
  readonly mountpoint: string;
  /** The process that serves it. */
  readonly pid: number;
  /** With `--volume`. */
  readonly volume?: string;
  /** With `--at`: what was chosen. */
  readonly points?: readonly (PointRow & { readonly volume: string })[];
  /** Of a mount in the background. */
  readonly logFile?: string;
}

/** What the process in the background tells the one that started it. */
type Report =
  | { readonly type: 'mounted'; readonly answer: MountAnswer }
  | { readonly type: 'failed'; readonly error: PortableError };

/** What the starter tells it first. */
interface Order {
  readonly password: string | undefined;
}

/** Set for the process in the background, which gets the same command line. */
const BACKGROUND = 'B2_MOUNT_BACKGROUND';

export async function run(
  context: CommandContext,
  input: MountInput,
): Promise<Outcome<MountAnswer | undefined>> {
  if (context.env[BACKGROUND] === '1' && process.send !== undefined)
    return serveInBackground(context, input);
  if (!input.options.foreground) return { data: await startInBackground(context, input) };
  const answer = await serve(context, input, context.events, (mounted) => {
    const chosen = (mounted.points ?? [])
      .map((p) => `, ${p.volume} at ${localTime(p.time)} (#${p.seq})`)
      .join('');
    context.output.line(
      { type: 'mounted', ...mounted },
      `mounted at ${mounted.mountpoint}${chosen}`,
    );
  });
  return { data: answer };
}

/** Serves until it is unmounted, by whomever, or a signal comes. */
function serve(
  context: CommandContext,
  input: MountInput,
  events: EventSink,
  onMounted: (answer: MountAnswer) => void,
): Promise<MountAnswer> {
  const { options } = input;
  const { clock, signal } = context;
  if (options.files && process.geteuid?.() !== 0) {
    throw new B2Error('unsupported', '--files mounts file systems, which only root may do', {
      hint: '"b2 ls", "b2 cat" and "b2 restore --path" need no root: they use a tiny virtual machine.',
    });
  }
  const at = options.at === undefined ? undefined : parseWhen(options.at, clock.nowNs());
  return withRepository(context, async (repo) => {
    const warn = (message: string): void => events({ type: 'warning', message });
    allowReadAhead(repo, repo.store.url, (error) =>
      warn(`reading ahead has ended: ${messageOf(error)}`),
    );
    const volume =
      options.volume === undefined ? undefined : await volumeNamed(context, repo, options.volume);
    // Much code that only --files needs: it is not loaded without.
    const inside = options.files ? await import('../../mount/files-view.js') : undefined;
    const { cacheDir } = context.settings;
    const files =
      inside === undefined ? undefined : new inside.FilesView({ clock, events, cacheDir });
    const tree = await openMountTree({ repo, clock, volume, at, warn, files });
    try {
      tree.prepare();
      const mounted = await serveMount({
        tree,
        mountpoint: input.arguments.mountpoint,
        events,
        clock,
      });
      const stop = (): void => {
        files?.hurry();
        mounted.close().catch(() => undefined); // `ended` tells
      };
      try {
        const answer: MountAnswer = {
          mountpoint: mounted.mountpoint,
          pid: process.pid,
          ...(volume === undefined ? {} : { volume: volume.name }),
          ...(tree.chosen === undefined
            ? {}
            : {
                points: tree.chosen.map((c) => ({ volume: c.volume.name, ...pointRow(c.commit) })),
              }),
        };
        onMounted(answer);
        if (signal.aborted) stop();
        else signal.addEventListener('abort', stop, { once: true });
        await mounted.ended;
        return answer;
      } finally {
        signal.removeEventListener('abort', stop);
        await mounted.close();
      }
    } finally {
      await tree.close();
    }
  });
}

/** Nobody reads stdout; stderr is the log file. */
async function serveInBackground(
  context: CommandContext,
  input: MountInput,
): Promise<Outcome<undefined>> {
  const tell = (report: Report): Promise<void> =>
    new Promise((resolve) => {
      // Where the starter has been killed meanwhile nobody listens; the mount stays.
      if (process.send === undefined || !process.connected) return resolve();
      process.send(report, undefined, undefined, () => {
        if (process.connected) process.disconnect();
        resolve();
      });
    });
  const events: EventSink = (event: B2Event) => {
    if (event.type === 'progress') return;
    const message = `${formatTimeLocal(context.clock.nowNs())} ${input.arguments.mountpoint}: ${event.message}`;
    context.events({ ...event, message });
  };
  try {
    const { password } = await firstOrder();
    const secret = password === undefined ? {} : { B2_PASSWORD: password };
    const own: CommandContext = { ...context, env: { ...context.env, ...secret } };
    await serve(own, input, events, (answer) => void tell({ type: 'mounted', answer }));
  } catch (error) {
    await tell({ type: 'failed', error: toPortableError(error) });
    throw error;
  }
  return { data: undefined };
}

/** The order that starts the work. A typed password comes in it: neither arguments nor environment may hold one that was not there. */
function firstOrder(): Promise<Order> {
  return new Promise((resolve, reject) => {
    process.once('message', (order: Order) => resolve(order));
    process.once('disconnect', () =>
      reject(new B2Error('interrupted', 'the command that started the mount has ended')),
    );
  });
}

async function startInBackground(context: CommandContext, input: MountInput): Promise<MountAnswer> {
  const logFile = input.options.log ?? join(context.settings.cacheDir, 'mount.log');
  let password: string | undefined;
  for (;;) {
    try {
      return { ...(await launch(context, logFile, password)), logFile };
    } catch (error) {
      const isUnasked =
        password === undefined && error instanceof B2Error && error.kind === 'wrong-key';
      // The background has no terminal: what has to be typed is asked here.
      if (!isUnasked || (await findSecrets(secretPlaces(context))).length > 0) throw error;
      password = await askPassword(`Password of ${context.settings.repository.url}: `);
      if (password === undefined) throw error;
    }
  }
}

async function launch(
  context: CommandContext,
  logFile: string,
  password: string | undefined,
): Promise<MountAnswer> {
  const { signal } = context;
  let logFd: number;
  try {
    mkdirSync(dirname(logFile), { recursive: true, mode: 0o700 });
    logFd = openSync(logFile, 'a', 0o600);
  } catch (error) {
    throw ioError('open', logFile, error);
  }
  try {
    const child = spawn(process.execPath, [...process.execArgv, ...process.argv.slice(1)], {
      detached: true,
      stdio: ['ignore', 'ignore', logFd, 'ipc'],
      env: { ...process.env, [BACKGROUND]: '1' },
    });
    const order: Order = { password };
    child.send(order, () => undefined); // a child that is gone tells so by its end
    const stop = (): void => void child.kill('SIGTERM');
    signal.addEventListener('abort', stop, { once: true });
    if (signal.aborted) stop();
    try {
      return await new Promise<MountAnswer>((resolve, reject) => {
        child.on('message', (report: Report) => {
          if (report.type === 'mounted') resolve(report.answer);
          else reject(fromPortableError(report.error));
        });
        child.on('error', reject);
        child.on('exit', (code, name) => {
          const how = name ?? `exit ${code}`;
          reject(
            signal.aborted
              ? new B2Error('interrupted', `interrupted (${String(signal.reason)})`)
              : new B2Error('failed', `the process that should serve the mount ended (${how})`, {
                  hint: `Its messages are in ${logFile}; --foreground shows them.`,
                }),
          );
        });
      });
    } finally {
      signal.removeEventListener('abort', stop);
      child.removeAllListeners('exit');
      if (child.connected) child.disconnect();
      child.unref();
    }
  } finally {
    closeSync(logFd);
  }
}

export function text(data: MountAnswer | undefined, _style: Style): string {
  // In the foreground the line while it served has said it all.
  if (data?.logFile === undefined) return '';
  const chosen = (data.points ?? [])
    .map((p) => `\n${p.volume} at ${localTime(p.time)} (#${p.seq})`)
    .join('');
  return `mounted at ${data.mountpoint} (process ${data.pid})${chosen}`;
}
