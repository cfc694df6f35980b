import { readFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';

import { B2Error, ioError, messageOf } from '../../errors.js';
import { formatBytes, formatTimeLocal } from '../../human.js';
import type { Image } from '../../image.js';
import type { NbdListen, NbdTls, WritableImage } from '../../nbd/index.js';
import { serveNbd } from '../../nbd/server.js';
import { VolumeHistory } from '../../repo/history.js';
import { allowReadAhead, choosePoint, openImage, type ChosenPoint } from '../../repo/point.js';
import type { Repository } from '../../repo/repository.js';
import type { VolumeMeta } from '../../repo/volume.js';
import type { Style } from '../../ui/style.js';
import { parseWhen } from '../../when.js';
import type { ServeNbdInput } from '../serve-nbd.js';
import type { CommandContext, Outcome } from '../spec.js';
import { pointRow, type PointRow } from './rows.js';
import { volumeNamed, withRepository } from './session.js';

/** The answer when serving has ended; the line while it goes on has the same fields and `type` `serving`. */
export interface ServeNbdAnswer {
  readonly volume: string;
  readonly volumeId: string;
  readonly point: PointRow;
  readonly sizeBytes: number;
  readonly uri: string;
  readonly writable: boolean;
}

type Options = ServeNbdInput['options'];

export function run(
  context: CommandContext,
  input: ServeNbdInput,
): Promise<Outcome<ServeNbdAnswer>> {
  const { options } = input;
  if (options.writable && options.overlay !== undefined)
    throw new B2Error('usage', 'give --writable or --overlay, not both', {
      hint: '--writable throws writes away at the end; --overlay keeps them in its file, and needs no --writable.',
    });
  const listen = listenOf(context, options);
  return withRepository(context, async (repo) => {
    const tls = await tlsOf(options);
    const warn = (message: string): void => context.events({ type: 'warning', message });
    allowReadAhead(repo, repo.store.url, (error) =>
      warn(`reading ahead has ended: ${messageOf(error)}`),
    );
    const volume = await volumeNamed(context, repo, input.arguments.volume);
    const history = await VolumeHistory.open(repo, volume.id);
    try {
      const when = parseWhen(options.at, context.clock.nowNs());
      const chosen = await choosePoint(history, volume, when, warn);
      const { commit, snapshot } = chosen;
      // Before it listens: a client should not be the first to hear that it does not open.
      const image = await open(options, repo, history, volume, chosen);
      const server = await serveNbd({
        exports: [
          {
            name: volume.name,
            description: `${volume.name} at ${formatTimeLocal(commit.instantNs)}`,
            open: () => Promise.resolve(image),
          },
        ],
        listen,
        allowPlaintext: options.plaintext,
        events: context.events,
        clock: context.clock,
        ...(tls === undefined ? {} : { tls }),
      }).catch(async (error: unknown) => {
        await image.close();
        throw error;
      });
      try {
        const answer: ServeNbdAnswer = {
          volume: volume.name,
          volumeId: volume.id,
          point: pointRow(commit, snapshot === undefined ? [] : [snapshot.name]),
          sizeBytes: commit.sizeBytes,
          uri: server.uri(),
          writable: options.writable || options.overlay !== undefined,
        };
        const access = answer.writable ? 'writable' : 'read-only';
        context.output.line(
          { type: 'serving', ...answer },
          `serving ${volume.name} at ${formatTimeLocal(commit.instantNs)} (#${commit.seq}, ${formatBytes(commit.sizeBytes)}, ${access}): ${answer.uri}`,
        );
        await aborted(context.signal);
        return { data: answer };
      } finally {
        await server.close();
        // The server has closed it, unless no client ever came.
        await image.close();
      }
    } finally {
      await history.close();
    }
  });
}

/** The line while it served has said it all. */
export function text(_data: ServeNbdAnswer, _style: Style): string {
  return '';
}

function listenOf(context: CommandContext, options: Options): NbdListen {
  if (options.listen === undefined) {
    const directory = context.env['XDG_RUNTIME_DIR'] ?? tmpdir();
    const socketPath = options.socket ?? join(directory, `b2-nbd-${process.pid}.sock`);
    return { socketPath, watched: true };
  }
  if (options.socket !== undefined)
    throw new B2Error('usage', 'give --socket or --listen, not both');
  const match = /^(?:\[([^\]]+)\]|([^:[\]]+)):(\d{1,5})$/u.exec(options.listen);
  const host = match?.[1] ?? match?.[2];
  const port = Number(match?.[3]);
  if (host === undefined || port > 65_535) {
    throw new B2Error('usage', `--listen ${options.listen}: not HOST:PORT`, {
      hint: 'For example 127.0.0.1:10809 or [::1]:10809.',
    });
  }
  return { host, port };
}

async function tlsOf(options: Options): Promise<NbdTls | undefined> {
  const { 'tls-cert': cert, 'tls-key': key, 'tls-client-ca': clientCa } = options;
  if (cert === undefined && key === undefined && clientCa === undefined) return undefined;
  if (cert === undefined || key === undefined) {
    throw new B2Error('usage', 'TLS needs both --tls-cert and --tls-key');
  }
  return {
    cert: await pem(cert),
    key: await pem(key),
    ...(clientCa === undefined ? {} : { clientCa: await pem(clientCa) }),
  };
}

async function pem(file: string): Promise<Buffer> {
  try {
    return await readFile(file);
  } catch (error) {
    throw ioError('read', file, error);
  }
}

async function open(
  options: Options,
  repo: Repository,
  history: VolumeHistory,
  volume: VolumeMeta,
  { commit }: ChosenPoint,
): Promise<Image | WritableImage> {
  const base = await openImage(history, volume, commit.seq);
  if (options.overlay === undefined && !options.writable) return base;
  const { openOverlay, openTemporaryOverlay } = await import('../../nbd/overlay.js');
  if (options.overlay !== undefined) {
    const identity = {
      repository: repo.config.id,
      volume: volume.id,
      seq: commit.seq,
      hash: commit.hash.toString('hex'),
    };
    return await openOverlay({ path: options.overlay, base, identity });
  }
  return await openTemporaryOverlay({ base });
}

function aborted(signal: AbortSignal): Promise<void> {
  return new Promise((done) => {
    if (signal.aborted) done();
    else signal.addEventListener('abort', () => done(), { once: true });
  });
}
