import { existsSync, lstatSync, readFileSync, readdirSync, writeFileSync } from 'node:fs';
import { mkdtemp, rm } from 'node:fs/promises';
import { createServer, type Server } from 'node:net';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterEach, beforeEach, describe, expect, it } from 'vitest';

import { systemClock, type Clock } from '../../../src/clock.js';
import { B2Error } from '../../../src/errors.js';
import type { B2Event } from '../../../src/events.js';
import { withNbdExport } from '../../../src/nbd/export.js';
import { openTemporaryOverlay } from '../../../src/nbd/overlay.js';
import { serveNbd, type NbdServer, type NbdServerOptions } from '../../../src/nbd/server.js';
import { MemoryImage, patternBytes } from '../../support/image-memory.js';
import {
  NbdTestClient,
  goBytes,
  metaBytes,
  optionBytes,
  requestBytes,
} from '../../support/nbd-client.js';

const KIB = 1024;
const MIB = 1024 * KIB;
const RUNS = [
  { length: 256 * KIB, hole: false },
  { length: 128 * KIB, hole: true },
  { length: 64 * KIB, hole: false },
  { length: 576 * KIB + 512, hole: true },
];

let directory: string;
let path: string;
let image: MemoryImage;
let servers: NbdServer[];
let events: B2Event[];

beforeEach(async () => {
  directory = await mkdtemp(join(tmpdir(), 'b2-nbdtest-'));
  path = join(directory, 'sock');
  image = new MemoryImage(RUNS);
  servers = [];
  events = [];
});

afterEach(async () => {
  for (const server of servers) await server.close();
  expect(readdirSync(directory).filter((name) => name !== 'keep')).toEqual([]);
  await rm(directory, { recursive: true });
});

async function start(options: Partial<NbdServerOptions> = {}): Promise<NbdServer> {
  const server = await serveNbd({
    exports: [
      { name: 'disk', description: 'a disk', open: () => Promise.resolve(image) },
      { name: 'broken', open: () => Promise.reject(new B2Error('damaged', 'pack 12 is broken')) },
    ],
    listen: { socketPath: path },
    events: (event) => events.push(event),
    ...options,
  });
  servers.push(server);
  return server;
}

async function startWritable(options: Partial<NbdServerOptions> = {}): Promise<NbdServer> {
  return await start({
    exports: [
      { name: 'disk', open: () => openTemporaryOverlay({ base: image, directory: tmpdir() }) },
    ],
    ...options,
  });
}

/** As `toEqual`, which takes seconds for a megabyte. */
function expectSame(actual: Buffer, wanted: Buffer): void {
  expect(actual.length).toBe(wanted.length);
  expect(Buffer.compare(actual, wanted)).toBe(0);
}

/** A clock whose sleepers wake when the test says so. */
class HeldClock implements Clock {
  readonly #sleepers = new Set<{ left: number; wake: () => void }>();
  readonly nowNs = systemClock.nowNs;
  readonly monotonicNs = systemClock.monotonicNs;

  sleep(ms: number, signal?: AbortSignal): Promise<void> {
    return new Promise((done) => {
      const sleeper = { left: ms, wake: done };
      this.#sleepers.add(sleeper);
      signal?.addEventListener('abort', () => this.#sleepers.delete(sleeper) && done());
    });
  }

  advance(ms: number): void {
    for (const sleeper of this.#sleepers) {
      sleeper.left -= ms;
      if (sleeper.left <= 0 && this.#sleepers.delete(sleeper)) sleeper.wake();
    }
  }
}

describe('handshake', () => {
  it('lists exports, tells about them and refuses unknown ones', async () => {
    await start();
    const client = await NbdTestClient.greet(path);
    const list = await client.option(3);
    expect(list.map((reply) => reply.type)).toEqual([2, 2, 1]);
    expect(list[0]?.data.toString('utf8', 4)).toBe('diska disk');
    const info = await client.option(6, goBytes('disk', [1, 2, 3, 99]));
    expect(info.map((reply) => reply.type)).toEqual([3, 3, 3, 3, 1]);
    expect(info[0]?.data.readBigUInt64BE(2)).toBe(BigInt(image.sizeBytes));
    // has flags, read-only, flush, multi-conn, cache; no DF before structured replies
    expect(info[0]?.data.readUInt16BE(10)).toBe(1 | 2 | 4 | 256 | 1024);
    expect(info[3]?.data.readUInt32BE(10)).toBe(32 * MIB);
    expect((await client.option(6, goBytes('nope'))).map((reply) => reply.type)).toEqual([
      0x8000_0006,
    ]);
    expect((await client.option(6, goBytes('broken'))).map((reply) => reply.type)).toEqual([
      0x8000_0006,
    ]);
    expect(events).toHaveLength(1);
    expect(events[0]).toMatchObject({
      type: 'warning',
      message: 'NBD: export broken: pack 12 is broken',
    });
    const abort = await client.option(2, Buffer.from('ignored'));
    expect(abort.map((reply) => reply.type)).toEqual([1]);
    await client.gone;
  });

  it('answers malformed options with an error and goes on', async () => {
    await start();
    const client = await NbdTestClient.greet(path);
    const bad: [number, Buffer][] = [
      [3, Buffer.from('x')],
      [5, Buffer.from('x')],
      [8, Buffer.from('x')],
      [6, Buffer.alloc(0)],
      [6, Buffer.from([0, 0, 0, 9, 0, 0])],
      [7, Buffer.from([0xff, 0xff, 0xff, 0xff, 0, 0])],
      [7, Buffer.concat([goBytes('disk'), Buffer.from('x')])],
      [7, Buffer.from([0, 0, 0, 0, 0, 9])],
      [9, metaBytes('disk', [])], // before structured replies
      [10, metaBytes('disk', ['base:allocation'])],
    ];
    for (const [option, data] of bad) {
      const replies = await client.option(option, data);
      expect(replies.map((reply) => [reply.option, reply.type])).toEqual([[option, 0x8000_0003]]);
    }
    expect((await client.option(5))[0]?.type).toBe(0x8000_0002);
    expect((await client.option(11))[0]?.type).toBe(0x8000_0001);
    expect((await client.option(4, Buffer.alloc(70_000)))[0]?.type).toBe(0x8000_0009);
    await client.option(8);
    for (const data of [
      Buffer.alloc(3),
      Buffer.concat([metaBytes('disk', ['base:']), Buffer.from('x')]),
      Buffer.from([0, 0, 0, 0, 0xff, 0xff, 0xff, 0xff]),
      Buffer.from([0, 0, 0, 0, 0, 0, 0, 1, 0xff, 0xff, 0xff, 0xff]),
    ]) {
      expect((await client.option(10, data))[0]?.type).toBe(0x8000_0003);
    }
    expect((await client.option(7, goBytes('disk'))).at(-1)?.type).toBe(1);
    expectSame(await client.read(0, 1000), image.content.subarray(0, 1000));
    client.close();
  });

  it.each([
    ['an unknown client flag', 4, Buffer.alloc(0)],
    ['an option without its magic', 3, Buffer.alloc(16, 7)],
    ['an option other than EXPORT_NAME without fixed newstyle', 0, optionBytes(3)],
    ['an option of 4 GiB', 3, optionBytes(9, Buffer.alloc(0), 0xffff_ffff)],
    ['EXPORT_NAME of an unknown export', 3, optionBytes(1, Buffer.from('nope'))],
    ['EXPORT_NAME that is no UTF-8', 3, optionBytes(1, Buffer.from([0xff, 0xfe]))],
    ['EXPORT_NAME of an export that does not open', 3, optionBytes(1, Buffer.from('broken'))],
  ])('closes the connection after %s', async (_what, flags, bytes) => {
    await start();
    const client = await NbdTestClient.greet(path, flags);
    client.write(bytes);
    await client.gone;
  });

  it.each([
    [3, 10],
    [1, 134],
    [0, 134],
  ])(
    'EXPORT_NAME with client flags %i answers %i bytes, then simple replies',
    async (flags, bytes) => {
      await start();
      const client = await NbdTestClient.greet(path, flags);
      client.write(optionBytes(1, Buffer.from('disk')));
      const reply = await client.reader.take(bytes);
      expect(reply.readBigUInt64BE(0)).toBe(BigInt(image.sizeBytes));
      expect(reply.subarray(10).every((byte) => byte === 0)).toBe(true);
      client.write(
        requestBytes({ command: 0, offset: 1, length: 100_000, cookie: 0xfedc_ba98_7654_3210n }),
      );
      const head = await client.reader.take(16);
      expect(head.toString('hex')).toBe('6744669800000000fedcba9876543210');
      expectSame(await client.reader.take(100_000), image.content.subarray(1, 100_001));
      client.write(requestBytes({ command: 0, offset: image.sizeBytes, length: 1, cookie: 5n }));
      expect((await client.reader.take(16)).toString('hex')).toBe(
        '67446698000000160000000000000005',
      );
      client.write(requestBytes({ command: 0, length: 0 }));
      expect((await client.reader.take(16)).readUInt32BE(4)).toBe(0);
      client.write(requestBytes({ command: 2 }));
      await client.gone;
    },
  );

  it('ends a handshake that takes too long, but no quiet transmission', async () => {
    const clock = new HeldClock();
    await start({ clock, limits: { handshakeMs: 1000 } });
    const slow = await NbdTestClient.greet(path);
    const served = await NbdTestClient.go(path);
    clock.advance(1001);
    await slow.gone;
    expectSame(await served.read(0, 10), image.content.subarray(0, 10));
    served.close();
  });

  it('refuses connections beyond the limit and takes new ones when others go', async () => {
    const server = await start({ limits: { connections: 2 } });
    const a = await NbdTestClient.go(path);
    const b = await NbdTestClient.go(path);
    const c = await NbdTestClient.connect(path);
    await c.gone;
    a.close();
    await expect.poll(() => server.connections).toBe(1);
    const d = await NbdTestClient.go(path);
    b.close();
    d.close();
  });
});

describe('metadata contexts', () => {
  it('lists by wildcard, selects by name, forgets with each request', async () => {
    await start();
    const client = await NbdTestClient.greet(path);
    await client.option(8);
    const types = async (option: number, queries: string[]): Promise<number[]> =>
      (await client.option(option, metaBytes('disk', queries))).map((reply) => reply.type);
    expect(await types(9, [])).toEqual([4, 1]);
    expect(await types(9, ['base:'])).toEqual([4, 1]);
    expect(await types(9, ['qemu:'])).toEqual([1]);
    expect(await types(10, [])).toEqual([1]);
    expect(await types(10, ['base:'])).toEqual([1]);
    expect(await types(10, ['x-y:z', 'base:allocation', 'base:allocation'])).toEqual([4, 1]);
    expect(await types(10, ['base:nothing'])).toEqual([1]);
    await client.option(7, goBytes('disk'));
    expect(await client.outcome({ command: 7, length: 512 })).toBe(22);
    client.close();
  });

  it('reports runs of holes and data, one of them on request', async () => {
    await start();
    const client = await NbdTestClient.go(path, 'disk');
    client.write(requestBytes({ command: 7, offset: 1000, length: image.sizeBytes - 1000 }));
    const [chunk] = await client.reply();
    const words = chunk?.payload;
    expect(chunk?.type).toBe(5);
    expect(words?.readUInt32BE(0)).toBe(1);
    const runs: number[][] = [];
    for (let at = 4; at < (words?.length ?? 0); at += 8)
      runs.push([words?.readUInt32BE(at) ?? 0, words?.readUInt32BE(at + 4) ?? 0]);
    expect(runs).toEqual([
      [256 * KIB - 1000, 0],
      [128 * KIB, 3],
      [64 * KIB, 0],
      [576 * KIB + 512, 3],
    ]);
    client.write(requestBytes({ command: 7, flags: 8, offset: 256 * KIB, length: 200 * KIB }));
    const one = await client.reply();
    expect(one[0]?.payload.toString('hex')).toBe('000000010002000000000003');
    client.close();
  });
});

describe('reading', () => {
  it('sends holes as holes and honours the don’t-fragment flag', async () => {
    await start();
    const client = await NbdTestClient.go(path);
    expectSame(await client.read(0, image.sizeBytes), image.content);
    expectSame(await client.read(1, image.sizeBytes - 2), image.content.subarray(1, -1));
    client.write(requestBytes({ command: 0, offset: 0, length: image.sizeBytes }));
    expect((await client.reply()).map((chunk) => chunk.type)).toEqual([1, 2, 1, 2]);
    client.write(requestBytes({ command: 0, offset: 0, length: image.sizeBytes, flags: 4 }));
    expect((await client.reply()).map((chunk) => chunk.type)).toEqual([1]);
    client.close();
  });

  it('answers a read of nothing without a content chunk', async () => {
    await start();
    const client = await NbdTestClient.go(path);
    client.write(requestBytes({ command: 0, length: 0 }));
    expect((await client.reply()).map((chunk) => chunk.type)).toEqual([0]);
    client.write(requestBytes({ command: 0, offset: image.sizeBytes, length: 0 }));
    expect((await client.reply()).map((chunk) => chunk.type)).toEqual([0]);
    client.close();
  });

  it('serves an image of no bytes', async () => {
    image = new MemoryImage([]);
    await start();
    const client = await NbdTestClient.go(path);
    expect(await client.outcome({ command: 0, length: 0 })).toBe(0);
    expect(await client.outcome({ command: 0, length: 1 })).toBe(22);
    client.close();
  });

  it('gives EIO with the reason for damaged data, tells the log once, and goes on', async () => {
    image.damaged.push({
      offset: 5000,
      length: 1,
      message: 'pack packs/ab/abcd: frame 7 fails its tag',
    });
    await start();
    const client = await NbdTestClient.go(path, 'disk');
    for (const length of [4096, 300 * KIB]) {
      await expect(client.read(4096, length)).rejects.toMatchObject({
        errno: 5,
        message: 'pack packs/ab/abcd: frame 7 fails its tag',
      });
    }
    expect(await client.outcome({ command: 5, offset: 0, length: 64 * KIB })).toBe(5);
    expectSame(await client.read(0, 4096), image.content.subarray(0, 4096));
    expect(events.map((event) => ('message' in event ? event.message : ''))).toEqual([
      'NBD: export disk, bytes 4096+4096: pack packs/ab/abcd: frame 7 fails its tag',
    ]);
    client.close();
  });

  it('does not tell a client what a bug says', async () => {
    image.read = () => Promise.reject(new TypeError('secret internals'));
    await start();
    const client = await NbdTestClient.go(path);
    await expect(client.read(0, 10)).rejects.toMatchObject({
      errno: 5,
      message: expect.not.stringContaining('secret'),
    });
    expect(JSON.stringify(events)).toContain('secret internals');
    client.close();
  });

  it('answers out of order', async () => {
    let open = (): void => undefined;
    image.gate = new Promise((done) => (open = done));
    await start();
    const client = await NbdTestClient.go(path);
    client.write(requestBytes({ command: 0, length: 512, cookie: 1n }));
    client.write(requestBytes({ command: 7, length: 512, cookie: 2n }));
    expect((await client.chunk()).cookie).toBe(2n);
    open();
    expect((await client.chunk()).cookie).toBe(1n);
    client.close();
  });
});

describe('errors of requests', () => {
  const size = 1 * MIB + 512;
  it.each([
    ['read beyond the end', { command: 0, offset: size - 1, length: 2 }, 22],
    ['read at 2^63', { command: 0, offset: 1n << 63n, length: 2 }, 22],
    ['read at 2^64 − 1', { command: 0, offset: (1n << 64n) - 1n, length: 1 }, 22],
    ['read with an unknown flag', { command: 0, flags: 0x40, length: 1 }, 22],
    ['read with NO_HOLE', { command: 0, flags: 2, length: 1 }, 22],
    ['trim on read-only', { command: 4, length: 512 }, 1],
    ['zeroes on read-only', { command: 6, length: 512 }, 1],
    ['cache beyond the end', { command: 5, offset: size, length: 1 }, 22],
    ['cache', { command: 5, length: 1000 }, 0],
    ['flush', { command: 3 }, 0],
    ['flush with a length', { command: 3, length: 1 }, 22],
    ['block status of nothing', { command: 7, length: 0 }, 22],
    ['block status beyond the end', { command: 7, offset: 1, length: size }, 22],
    ['resize', { command: 8 }, 22],
    ['command 0xffff', { command: 0xffff, length: 0xffff_ffff }, 22],
  ])('%s', async (_what, request, error) => {
    await start();
    const client = await NbdTestClient.go(path);
    expect(await client.outcome({ cookie: 77n, ...request })).toBe(error);
    expectSame(await client.read(3, 5), image.content.subarray(3, 8));
    client.close();
  });

  it('a write on read-only is EPERM and its data is not taken for requests', async () => {
    await start();
    const client = await NbdTestClient.go(path);
    expect(
      await client.outcome({ command: 1, length: 64 * KIB }, Buffer.alloc(64 * KIB, 0x25)),
    ).toBe(1);
    expect(
      await client.outcome({ command: 1, length: 33 * MIB }, Buffer.alloc(33 * MIB, 0x25)),
    ).toBe(1);
    expectSame(await client.read(0, 16), image.content.subarray(0, 16));
    client.close();
  });

  it.each([
    ['write beyond the end', { command: 1, offset: size - 1, length: 2 }, 28],
    ['zeroes beyond the end', { command: 6, offset: size, length: 1 }, 28],
    ['trim beyond the end', { command: 4, offset: size, length: 1 }, 22],
    ['write with FAST_ZERO', { command: 1, flags: 16, length: 1 }, 22],
    ['write of nothing', { command: 1, length: 0 }, 0],
    ['zeroes of nothing', { command: 6, length: 0 }, 0],
    ['fast zeroes', { command: 6, flags: 16, length: 8192 }, 0],
    ['fast zeroes that take space', { command: 6, flags: 16 | 2, length: 8192 }, 95],
    ['zeroes that take space', { command: 6, flags: 2, offset: 300 * KIB, length: 8192 }, 0],
    ['trim with FUA', { command: 4, flags: 1, length: 8192 }, 0],
    ['read with FUA', { command: 0, flags: 1, length: 1 }, 0],
  ])('writable: %s', async (_what, request, error) => {
    await startWritable();
    const client = await NbdTestClient.go(path);
    const payload = request.command === 1 ? Buffer.alloc(request.length) : undefined;
    expect(await client.outcome(request, payload)).toBe(error);
    client.close();
  });

  it('too long reads are EOVERFLOW, too long writes EINVAL', async () => {
    image = new MemoryImage([{ length: 40 * MIB, hole: true }]);
    await startWritable();
    const client = await NbdTestClient.go(path);
    expect(await client.outcome({ command: 0, length: 33 * MIB })).toBe(75);
    expect(await client.outcome({ command: 5, length: 33 * MIB })).toBe(75);
    expect(await client.outcome({ command: 1, length: 33 * MIB }, Buffer.alloc(33 * MIB))).toBe(22);
    expect(await client.outcome({ command: 1, length: 32 * MIB }, Buffer.alloc(32 * MIB, 1))).toBe(
      0,
    );
    expect(await client.outcome({ command: 6, length: 40 * MIB })).toBe(0);
    client.close();
  });

  it('maps a full disk to ENOSPC and a failing one to EIO', async () => {
    const failing = Object.assign(new MemoryImage(RUNS), {
      write: (data: Uint8Array) =>
        Promise.reject(new B2Error(data.length === 1 ? 'no-space' : 'io', 'no')),
      zero: () => Promise.reject(new B2Error('no-space', 'no')),
      trim: () => Promise.resolve(),
      flush: () => Promise.reject(new B2Error('io', 'no')),
    });
    await start({ exports: [{ name: '', open: () => Promise.resolve(failing) }] });
    const client = await NbdTestClient.go(path);
    expect(await client.outcome({ command: 1, length: 1 }, Buffer.alloc(1))).toBe(28);
    expect(await client.outcome({ command: 1, length: 2 }, Buffer.alloc(2))).toBe(5);
    expect(await client.outcome({ command: 6, length: 2 })).toBe(28);
    expect(await client.outcome({ command: 3 })).toBe(5);
    expect(await client.outcome({ command: 4, flags: 0, length: 1 })).toBe(0);
    expect(await client.outcome({ command: 4, flags: 1, length: 1 })).toBe(5); // FUA
    client.close();
  });

  it('closes the connection after a request without its magic', async () => {
    await start();
    const client = await NbdTestClient.go(path);
    client.write(requestBytes({ command: 0, length: 1, magic: 0x25609514 }));
    await client.gone;
  });
});

describe('writing', () => {
  it('what one connection has written the others read, and the base stays', async () => {
    const before = Buffer.from(image.content);
    await startWritable();
    const a = await NbdTestClient.go(path);
    const b = await NbdTestClient.go(path);
    const data = patternBytes(100_001, 9);
    expect(
      await a.outcome({ command: 1, flags: 1, offset: 12_345, length: data.length }, data),
    ).toBe(0);
    expectSame(await b.read(12_345, data.length), data);
    expect(await b.outcome({ command: 6, offset: 20_000, length: 30_000 })).toBe(0);
    const wanted = Buffer.from(before);
    data.copy(wanted, 12_345);
    wanted.fill(0, 20_000, 50_000);
    expectSame(await a.read(0, before.length), wanted);
    expectSame(image.content, before);
    a.close();
    const c = await NbdTestClient.go(path);
    expectSame(await c.read(0, before.length), wanted);
    b.close();
    c.close();
  });
});

describe('bounds', () => {
  it('takes no more from a client than the limits allow, and serves all in the end', async () => {
    image = new MemoryImage([{ length: 4 * MIB, hole: false }]);
    let open = (): void => undefined;
    image.gate = new Promise((done) => (open = done));
    await start({ limits: { bytesInFlight: 2 * MIB, requestsInFlight: 16 } });
    const client = await NbdTestClient.go(path);
    const requests = 200;
    for (let i = 0; i < requests; i++) {
      client.write(
        requestBytes({
          command: 0,
          flags: 4,
          offset: (i % 8) * 512 * KIB,
          length: 512 * KIB,
          cookie: BigInt(i),
        }),
      );
    }
    await expect.poll(() => image.underWay).toBe(2 * MIB);
    open();
    const seen = new Set<bigint>();
    for (let i = 0; i < requests; i++) {
      const { cookie, payload } = await client.chunk();
      const from = (Number(cookie) % 8) * 512 * KIB;
      expect(payload.subarray(8).equals(image.content.subarray(from, from + 512 * KIB))).toBe(true);
      seen.add(cookie);
    }
    expect(seen.size).toBe(requests);
    expect(image.mostUnderWay).toBeLessThanOrEqual(2 * MIB);
    client.close();
  });

  it('stops reading for a client that does not take its replies', async () => {
    image = new MemoryImage([{ length: 1 * MIB, hole: false }]);
    const server = await start({ limits: { bytesInFlight: 4 * MIB, graceMs: 50 } });
    const client = await NbdTestClient.go(path);
    client.socket.pause();
    for (let i = 0; i < 500; i++)
      client.write(requestBytes({ command: 0, flags: 4, length: 1 * MIB }));
    let before = -1;
    await expect
      .poll(
        () => {
          const steady = image.reads === before && before > 0;
          before = image.reads;
          return steady;
        },
        { interval: 200 },
      )
      .toBe(true);
    // 4 MiB of replies, what the kernel's socket buffers took, and one more.
    expect(image.reads).toBeLessThan(12);
    // A client that hangs does not keep the server from closing.
    await server.close();
    client.close();
  });
});

describe('closing', () => {
  it('finishes what is under way, refuses later requests with ESHUTDOWN, closes the image once', async () => {
    let open = (): void => undefined;
    image.gate = new Promise((done) => (open = done));
    const server = await start();
    const client = await NbdTestClient.go(path);
    client.write(requestBytes({ command: 0, length: 512, cookie: 1n }));
    await expect.poll(() => image.underWay).toBe(512);
    const closing = server.close();
    client.write(requestBytes({ command: 0, length: 512, cookie: 2n }));
    const refused = await client.chunk();
    expect([refused.cookie, refused.payload.readUInt32BE(0)]).toEqual([2n, 108]);
    expect(image.closed).toBe(0);
    open();
    expect((await client.chunk()).cookie).toBe(1n);
    await client.gone;
    await closing;
    await server.close();
    expect(image.closed).toBe(1);
    expect(existsSync(path)).toBe(false);
  });

  it.each(['unix', 'TCP'])(
    'sends what is under way to the end, also to a client that goes on asking and takes its time (%s)',
    async (how) => {
      const COUNT = 24;
      const server = await start({
        limits: { graceMs: 60_000, bytesInFlight: 64 * MIB },
        ...(how === 'unix' ? {} : { listen: { host: '127.0.0.1', port: 0 }, allowPlaintext: true }),
      });
      // A number is a port.
      const client = await NbdTestClient.go(how === 'unix' ? path : new URL(server.uri()).port);
      client.socket.pause();
      for (let i = 0n; i < COUNT; i++)
        client.write(requestBytes({ command: 0, length: MIB, cookie: i, flags: 4 }));
      // All of them are answered, which the kernel's buffers have no room for.
      await expect.poll(() => image.reads).toBe(COUNT);
      await expect.poll(() => image.underWay).toBe(0);
      const closing = server.close();
      for (let i = 0; i < 3; i++) {
        client.write(requestBytes({ command: 0, length: 512, cookie: 99n }));
        await new Promise((resolve) => setTimeout(resolve, 20));
      }
      client.socket.resume();
      const got = new Set<bigint>();
      while (got.size < COUNT) {
        const { cookie } = await client.chunk();
        if (cookie !== 99n) got.add(cookie);
        // It goes on.
        client.write(requestBytes({ command: 0, length: 512, cookie: 99n }));
      }
      await client.gone;
      await closing;
    },
  );

  it('DISC lets requests under way finish', async () => {
    let open = (): void => undefined;
    image.gate = new Promise((done) => (open = done));
    await start();
    const client = await NbdTestClient.go(path);
    client.write(requestBytes({ command: 0, length: 512, cookie: 1n }));
    client.write(requestBytes({ command: 2 }));
    await expect.poll(() => image.underWay).toBe(512);
    open();
    expect((await client.chunk()).cookie).toBe(1n);
    await client.gone;
  });

  it('a client that vanishes in the middle leaves nothing behind', async () => {
    const server = await start();
    for (let i = 0; i < 20; i++) {
      const client = await NbdTestClient.go(path);
      for (let j = 0; j < 10; j++) client.write(requestBytes({ command: 0, length: 100_000 }));
      if (i % 2 === 0) client.write(requestBytes({ command: 1, length: 100_000 }));
      client.close();
    }
    await expect.poll(() => server.connections).toBe(0);
    expect(image.underWay).toBe(0);
    expect(events).toEqual([]);
  });
});

describe('the socket', () => {
  let other: Server | undefined;
  afterEach(() => {
    other?.close();
    other = undefined;
  });

  it('has mode 0600', async () => {
    await start();
    expect(lstatSync(path).mode & 0o777).toBe(0o600);
  });

  it('replaces one that a dead server has left', async () => {
    // The staging directory is where a socket stays when nobody unlinks it.
    const dead = createServer();
    await new Promise<void>((done) => dead.listen(join(directory, 'old'), done));
    const { linkSync } = await import('node:fs');
    linkSync(join(directory, 'old'), path);
    await new Promise((done) => dead.close(done));
    expect(lstatSync(path).isSocket()).toBe(true);
    await start();
    (await NbdTestClient.go(path)).close();
  });

  it('leaves alone one that is listened on, and files', async () => {
    const keep = join(directory, 'keep');
    writeFileSync(keep, 'text');
    await expect(start({ listen: { socketPath: keep } })).rejects.toMatchObject({ kind: 'exists' });
    other = createServer();
    await new Promise<void>((done) => other?.listen(path, done));
    await expect(start()).rejects.toMatchObject({ kind: 'exists' });
    expect(lstatSync(keep).isFile()).toBe(true);
  });

  it('rejects a path that is too long and a directory that is not there', async () => {
    const long = join(directory, 'x'.repeat(100));
    await expect(start({ listen: { socketPath: long } })).rejects.toMatchObject({ kind: 'usage' });
    const nowhere = join(directory, 'no', 'sock');
    await expect(start({ listen: { socketPath: nowhere } })).rejects.toMatchObject({
      kind: 'not-found',
    });
  });
});

describe('options', () => {
  it('wants TLS on TCP unless told otherwise', async () => {
    await expect(start({ listen: { host: '127.0.0.1', port: 0 } })).rejects.toMatchObject({
      kind: 'refused',
    });
    const server = await start({ listen: { host: '127.0.0.1', port: 0 }, allowPlaintext: true });
    expect(server.uri('a b')).toMatch(/^nbd:\/\/127\.0\.0\.1:\d+\/a%20b$/u);
  });

  it('asks TCP clients that say nothing whether they are still there', async () => {
    const server = await start({ listen: { host: '127.0.0.1', port: 0 }, allowPlaintext: true });
    const { port } = new URL(server.uri());
    // A number is a port.
    const client = await NbdTestClient.go(port);
    expect(await client.read(0, 512)).toEqual(image.content.subarray(0, 512));
    const hex = Number(port).toString(16).toUpperCase().padStart(4, '0');
    // Established (01), the keepalive timer (02) running.
    const running = new RegExp(`: 0100007F:${hex} \\S+ 01 \\S+ 02:`);
    await expect.poll(() => readFileSync('/proc/net/tcp', 'utf8')).toMatch(running);
    client.close();
  });

  it('rejects bad names and bad certificates', async () => {
    const open = (): Promise<MemoryImage> => Promise.resolve(image);
    await expect(start({ exports: [] })).rejects.toMatchObject({ kind: 'usage' });
    await expect(
      start({
        exports: [
          { name: 'a', open },
          { name: 'a', open },
        ],
      }),
    ).rejects.toMatchObject({ kind: 'usage' });
    await expect(start({ exports: [{ name: 'ä'.repeat(2049), open }] })).rejects.toMatchObject({
      kind: 'usage',
    });
    await expect(start({ exports: [{ name: 'a\0', open }] })).rejects.toMatchObject({
      kind: 'usage',
    });
    await expect(start({ tls: { cert: 'no', key: 'no' } })).rejects.toMatchObject({
      kind: 'config',
    });
  });
});

describe('withNbdExport', () => {
  const sockets = (): string[] =>
    readdirSync(directory).filter((name) => name.startsWith('b2-nbd-'));

  it('serves the image while the function runs and cleans up', async () => {
    const result = await withNbdExport(
      image,
      async (uri) => {
        const socket = decodeURI(uri.replace('nbd+unix:///?socket=', ''));
        expect(lstatSync(join(socket, '..')).mode & 0o777).toBe(0o700);
        const client = await NbdTestClient.go(socket);
        const bytes = await client.read(0, image.sizeBytes);
        return bytes.equals(image.content);
      },
      { directory },
    );
    expect(result).toBe(true);
    expect(sockets()).toEqual([]);
    expect(image.closed).toBe(0);
  });

  it('cleans up when the function rejects', async () => {
    const failure = new Error('qemu-img failed');
    await expect(withNbdExport(image, () => Promise.reject(failure), { directory })).rejects.toBe(
      failure,
    );
    expect(sockets()).toEqual([]);
  });

  it.each([true, false])(
    'rejects with the damage, whatever the function says (rejects: %s)',
    async (rejects) => {
      image.damaged.push({ offset: 0, length: 1, message: 'pack 1: frame 2' });
      const run = withNbdExport(
        image,
        async (uri) => {
          const client = await NbdTestClient.go(uri.replace('nbd+unix:///?socket=', ''));
          await client.read(0, 512).catch(() => undefined);
          if (rejects) throw new Error('input/output error');
        },
        { directory },
      );
      await expect(run).rejects.toMatchObject({ kind: 'damaged', message: 'pack 1: frame 2' });
      expect(sockets()).toEqual([]);
    },
  );
});
