import { chmodSync, existsSync, mkdirSync, readdirSync, statSync, symlinkSync } from 'node:fs';
import { createConnection, createServer } from 'node:net';
import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import { systemRandom } from '../../../src/clock.js';
import { B2Error } from '../../../src/errors.js';
import {
  askPoint,
  askStatus,
  controlDirectory,
  findControlSockets,
  findWatches,
  parseRequest,
  serveControl,
  type ControlHandler,
  type ControlServer,
  type PointAnswer,
  type PointOrder,
} from '../../../src/watch/control.js';
import type { WatchReport } from '../../../src/watch/report.js';
import { tempDir, type TempDir } from '../../support/tmp.js';

const UID = process.geteuid?.() ?? 0;
const REPORT: WatchReport = {
  pid: 1,
  repository: '/repo',
  repositoryId: 'r',
  since: '2026-01-01T00:00:00.000000000Z',
  stopping: false,
  devices: [],
};
const ANSWER: PointAnswer = {
  volume: 'v',
  volumeId: 'i',
  device: '/d',
  sizeBytes: 5,
  point: {
    id: '#7',
    seq: 7,
    time: '2026-01-01T00:00:00.000000000Z',
    class: 'fs',
    coverage: 'exact',
    blocks: 1,
    storedBytes: 2,
    ageMs: 3,
  },
  hash: 'ab',
};

class Handler implements ControlHandler {
  readonly orders: PointOrder[] = [];
  readonly signals: AbortSignal[] = [];
  answer: () => Promise<PointAnswer> = () => Promise.resolve(ANSWER);

  status(): WatchReport {
    return REPORT;
  }
  point(order: PointOrder, signal: AbortSignal): Promise<PointAnswer> {
    this.orders.push(order);
    this.signals.push(signal);
    return this.answer();
  }
  resync(volume: string): { volume: string } {
    return { volume };
  }
}

let dir: TempDir;
let handler: Handler;
const servers: ControlServer[] = [];

beforeEach(() => {
  dir = tempDir();
  handler = new Handler();
});
afterEach(async () => {
  for (const server of servers.splice(0)) await server.close();
  await dir.remove();
});

async function serve(directory = dir.join('run')): Promise<ControlServer> {
  const server = await serveControl({ directory, uid: UID, random: systemRandom, handler });
  servers.push(server);
  return server;
}

async function eventually(what: string, test: () => boolean): Promise<void> {
  for (let i = 0; i < 400; i++) {
    if (test()) return;
    await new Promise((resolve) => setTimeout(resolve, 10));
  }
  throw new Error(`never: ${what}`);
}

describe('the control socket', () => {
  it('is for its user alone, and is found and gone again', async () => {
    const one = await serve();
    const two = await serve();
    expect(statSync(dir.join('run')).mode & 0o777).toBe(0o700);
    expect(statSync(one.path).mode & 0o777).toBe(0o600);
    expect(await findControlSockets(dir.join('run'), UID)).toEqual([one.path, two.path].sort());
    await one.close();
    expect(await findControlSockets(dir.join('run'), UID)).toEqual([two.path]);
    expect(readdirSync(dir.join('run'))).toHaveLength(1);
  });

  it('answers status and points, and hands errors over with kind and hint', async () => {
    const { path } = await serve();
    expect(await askStatus(path)).toEqual(REPORT);
    const order: PointOrder = { type: 'point', volume: 'v', class: 'fs', name: 'n', tags: ['a'] };
    expect(await askPoint(path, order)).toEqual(ANSWER);
    expect(handler.orders).toEqual([order]);
    handler.answer = () =>
      Promise.reject(new B2Error('unsupported', 'not here', { hint: 'There.', retryable: true }));
    await expect(askPoint(path, order)).rejects.toMatchObject({
      kind: 'unsupported',
      message: 'not here',
      hint: 'There.',
      retryable: true,
    });
  });

  it('gives up a point when who asked for it leaves', async () => {
    const { path } = await serve();
    handler.answer = () => new Promise(() => undefined);
    const left = new AbortController();
    const asked = askPoint(path, { type: 'point', volume: 'v', tags: [] }, left.signal);
    await eventually('the order arrives', () => handler.signals.length === 1);
    expect(handler.signals[0]?.aborted).toBe(false);
    left.abort();
    await expect(asked).rejects.toMatchObject({ kind: 'interrupted' });
    await eventually('the handler hears of it', () => handler.signals[0]?.aborted === true);
  });

  it('answers what is no request with an error, and survives it', async () => {
    const { path } = await serve();
    const say = (text: string): Promise<string> =>
      new Promise((resolve, reject) => {
        const socket = createConnection({ path });
        let said = '';
        socket.on('data', (data) => (said += data.toString()));
        socket.on('close', () => resolve(said));
        socket.on('error', reject);
        socket.write(text);
      });
    expect(JSON.parse(await say('nonsense\n'))).toMatchObject({ ok: false });
    expect(JSON.parse(await say(`${'x'.repeat(70_000)}`))).toMatchObject({ ok: false });
    expect(await askStatus(path)).toEqual(REPORT);
  });

  it('removes sockets of dead processes and leaves live ones and other files alone', async () => {
    const live = await serve();
    const dead = dir.join('run', 'watch-99999-00000000.sock');
    const server = createServer();
    await new Promise<void>((resolve) => server.listen({ path: `${dead}.x` }, resolve));
    // As kill -9 leaves it: the file without a listener.
    const { linkSync } = await import('node:fs');
    linkSync(`${dead}.x`, dead);
    await new Promise((resolve) => server.close(resolve));
    mkdirSync(dir.join('run', 'frozen'));
    expect(existsSync(dead)).toBe(true);
    expect(await findControlSockets(dir.join('run'), UID)).toEqual([live.path]);
    expect(existsSync(dead)).toBe(false);
    expect(existsSync(dir.join('run', 'frozen'))).toBe(true);
  });

  it('trusts no directory that others can write to', async () => {
    mkdirSync(dir.join('open'));
    chmodSync(dir.join('open'), 0o755);
    await expect(serve(dir.join('open'))).rejects.toMatchObject({ kind: 'refused' });
    mkdirSync(dir.join('own'), { mode: 0o700 });
    symlinkSync(dir.join('own'), dir.join('link'));
    await expect(serve(dir.join('link'))).rejects.toMatchObject({ kind: 'refused' });
    const warnings: string[] = [];
    const found = await findWatches({
      directory: dir.join('open'),
      uid: UID,
      timeoutMs: 1000,
      warn: (message) => warnings.push(message),
    });
    expect(found).toEqual([]);
    expect(warnings).toEqual([expect.stringMatching(/not a directory of this user alone/)]);
  });

  it('refuses a path that no socket can have', async () => {
    await expect(serve(dir.join('x'.repeat(100)))).rejects.toMatchObject({
      kind: 'refused',
      hint: expect.stringMatching(/B2_RUNTIME_DIR/),
    });
  });

  it('reports every watch, and warns of one that does not answer', async () => {
    await serve();
    const silent = createServer(() => undefined);
    await new Promise<void>((resolve) =>
      silent.listen({ path: dir.join('run', 'watch-1-00000000.sock') }, resolve),
    );
    const warnings: string[] = [];
    const found = await findWatches({
      directory: dir.join('run'),
      uid: UID,
      timeoutMs: 50,
      warn: (message) => warnings.push(message),
    });
    expect(found.map((w) => w.report)).toEqual([REPORT]);
    expect(warnings).toHaveLength(1);
    silent.close();
  });

  it('says where sockets are', () => {
    expect(controlDirectory({}, 0)).toBe('/run/b2');
    expect(controlDirectory({ XDG_RUNTIME_DIR: '/run/user/0' }, 0)).toBe('/run/b2');
    expect(controlDirectory({ XDG_RUNTIME_DIR: '/run/user/7' }, 7)).toBe('/run/user/7/b2');
    expect(controlDirectory({ XDG_RUNTIME_DIR: 'relative' }, 7)).toMatch(/\/b2-7$/);
    expect(controlDirectory({ B2_RUNTIME_DIR: '/x' }, 0)).toBe('/x');
  });
});

describe('parseRequest', () => {
  it.each([
    ['{', /not JSON/],
    ['1', /not an object/],
    ['{}', /unknown type/],
    ['{"type":"point"}', /"volume" must be a text/],
    ['{"type":"point","volume":"v","class":"fuzzy"}', /"class" must be one of/],
    ['{"type":"point","volume":"v","tags":[1]}', /"tags" must be a list/],
    ['{"type":"point","volume":"v","name":""}', /"name" must be a text/],
    ['{"type":"resync"}', /"volume"/],
  ])('refuses %s', (text, message) => {
    expect(() => parseRequest(text)).toThrow(message);
  });

  it('takes what it knows and nothing else', () => {
    expect(parseRequest('{"type":"point","volume":"v","more":1}')).toEqual({
      type: 'point',
      volume: 'v',
      tags: [],
    });
    expect(parseRequest('{"type":"resync","volume":"v"}')).toEqual({ type: 'resync', volume: 'v' });
  });
});
