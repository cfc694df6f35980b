/**
 * Hostile clients: whatever comes, the server does not crash, allocates no more than its limits, stays within the image,
 * and goes on serving others.
 */
import { mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import fc from 'fast-check';
import { afterAll, afterEach, beforeAll, describe, expect, it } from 'vitest';

import type { B2Event } from '../../../src/events.js';
import { openTemporaryOverlay } from '../../../src/nbd/overlay.js';
import * as p from '../../../src/nbd/protocol.js';
import { serveNbd, type NbdServer } from '../../../src/nbd/server.js';
import { MemoryImage } from '../../support/image-memory.js';
import {
  NbdTestClient,
  goBytes,
  metaBytes,
  optionBytes,
  requestBytes,
} from '../../support/nbd-client.js';

const KIB = 1024;
const SIZE = 300 * KIB + 512;

let directory: string;
let path: string;
let image: MemoryImage;
let server: NbdServer;
const events: B2Event[] = [];

beforeAll(async () => {
  directory = mkdtempSync(join(tmpdir(), 'b2-nbdfuzz-'));
  path = join(directory, 's');
  image = new MemoryImage([
    { length: 100 * KIB, hole: false },
    { length: 150 * KIB, hole: true },
    { length: SIZE - 250 * KIB, hole: false },
  ]);
  server = await serveNbd({
    exports: [
      { name: 'ro', open: () => Promise.resolve(image) },
      { name: 'rw', open: () => openTemporaryOverlay({ base: image, directory: tmpdir() }) },
    ],
    listen: { socketPath: path },
    limits: { bytesInFlight: 1024 * KIB, connections: 64, graceMs: 200 },
    events: (event) => events.push(event),
  });
});

afterEach(async () => {
  // Still there, still right, and nothing was a bug.
  const client = await NbdTestClient.go(path, 'ro');
  expect(Buffer.compare(await client.read(0, SIZE), image.content)).toBe(0);
  client.close();
  await expect.poll(() => server.connections).toBe(0);
  expect(image.underWay).toBe(0);
  expect(events).toEqual([]);
});

afterAll(async () => {
  await server.close();
  rmSync(directory, { recursive: true });
});

/** Sends `bytes` cut into pieces as told, then closes its side; resolves when the server has closed too. */
async function throwAt(client: NbdTestClient, bytes: Buffer, pieces: number): Promise<void> {
  client.reader.detach();
  client.socket.on('data', () => undefined);
  client.socket.resume();
  const step = Math.max(1, Math.ceil(bytes.length / pieces));
  for (let at = 0; at < bytes.length && !client.socket.destroyed; at += step) {
    client.write(bytes.subarray(at, at + step));
    if (pieces > 1) await new Promise((done) => setImmediate(done));
  }
  client.socket.end();
  await client.gone;
}

const u32 = fc.oneof(
  fc.nat(100),
  fc.integer({ min: 0, max: 0xffff_ffff }),
  fc.constantFrom(0, 0x7fff_ffff, 0x8000_0000, 0xffff_ffff),
);
const u64 = fc.oneof(
  fc.nat(SIZE + 1000).map(BigInt),
  fc.bigInt({ min: 0n, max: (1n << 64n) - 1n }),
  fc.constantFrom((1n << 64n) - 1n, 1n << 63n, BigInt(SIZE), 1n << 53n),
);
const anyBytes = (most: number): fc.Arbitrary<Buffer> =>
  fc.uint8Array({ maxLength: most }).map((bytes) => Buffer.from(bytes));

const optionData = fc.oneof(
  anyBytes(60),
  fc.constantFrom(
    goBytes('ro'),
    goBytes('rw', [0, 1, 2, 3]),
    goBytes('x'),
    metaBytes('ro', ['base:allocation', 'base:']),
  ),
  fc
    .tuple(
      fc.constantFrom(goBytes('ro', [1, 3]), metaBytes('rw', ['base:', 'q'])),
      fc.nat(40),
      fc.nat(255),
    )
    .map(([bytes, at, value]) => {
      const broken = Buffer.from(bytes);
      if (at < broken.length) broken[at] = value;
      return broken;
    }),
);

const option = fc
  .tuple(fc.oneof(fc.nat(12), u32), optionData, fc.option(u32, { freq: 8 }))
  .map(([number, data, length]) => optionBytes(number, data, length ?? data.length));

const request = fc
  .record({
    command: fc.oneof(fc.nat(9), fc.nat(0xffff)),
    flags: fc.oneof(fc.constant(0), fc.nat(0x1f), fc.nat(0xffff)),
    cookie: u64,
    offset: u64,
    length: fc.oneof(fc.nat(SIZE + 100), u32),
    magic: fc.oneof(
      { weight: 40, arbitrary: fc.constant(0x25609513) },
      { weight: 1, arbitrary: u32 },
    ),
  })
  .map((fields) =>
    fields.command === 1 && fields.length < SIZE + 100
      ? Buffer.concat([requestBytes(fields), Buffer.alloc(fields.length, 0x11)])
      : requestBytes(fields),
  );

describe('parsers', () => {
  it('take any bytes without reading beyond them', () => {
    fc.assert(
      fc.property(anyBytes(200), (bytes) => {
        for (const parse of [p.parseInfoRequest, p.parseMetaContextRequest]) {
          const parsed = parse(bytes);
          if (parsed?.name !== undefined)
            expect(Buffer.byteLength(parsed.name)).toBeLessThanOrEqual(bytes.length);
        }
      }),
      { numRuns: 2000 },
    );
  });

  it('read back what is built, and refuse every truncation of it', () => {
    const text = fc.string({ maxLength: 50, unit: 'binary' }).filter((s) => !s.includes('\0'));
    fc.assert(
      fc.property(
        text,
        fc.array(text, { maxLength: 5 }),
        fc.uniqueArray(fc.nat(0xffff), { maxLength: 5 }),
        (name, queries, infos) => {
          const meta = metaBytes(name, queries);
          expect(p.parseMetaContextRequest(meta)).toEqual({ name, queries });
          const go = goBytes(name, infos);
          expect(p.parseInfoRequest(go)).toEqual({ name, requests: new Set(infos) });
          for (let cut = 0; cut < meta.length; cut++)
            expect(p.parseMetaContextRequest(meta.subarray(0, cut))).toBeUndefined();
          for (let cut = 0; cut < go.length; cut++)
            expect(p.parseInfoRequest(go.subarray(0, cut))).toBeUndefined();
        },
      ),
    );
  });

  it('strings: no NUL, no broken UTF-8, at most 4096 bytes; messages are cut at a character', () => {
    expect(p.parseString(Buffer.from('a\0b'))).toBeUndefined();
    expect(p.parseString(Buffer.from([0xc3]))).toBeUndefined();
    expect(p.parseString(Buffer.alloc(4097, 97))).toBeUndefined();
    expect(p.parseString(Buffer.alloc(4096, 97))).toHaveLength(4096);
    expect(p.clippedUtf8('ä'.repeat(3000)).length).toBe(4096);
    expect(p.clippedUtf8(`a${'€'.repeat(3000)}`).toString()).toBe(`a${'€'.repeat(1365)}`);
  });
});

describe('a server', () => {
  it('survives anything instead of a handshake', async () => {
    await fc.assert(
      fc.asyncProperty(anyBytes(300), fc.integer({ min: 1, max: 5 }), async (bytes, pieces) => {
        await throwAt(await NbdTestClient.connect(path), bytes, pieces);
      }),
      { numRuns: 150 },
    );
  });

  it('survives any options', async () => {
    await fc.assert(
      fc.asyncProperty(
        fc.nat(3),
        fc.array(option, { maxLength: 12 }),
        fc.nat(60),
        fc.integer({ min: 1, max: 7 }),
        async (flags, options, cut, pieces) => {
          const bytes = Buffer.concat(options);
          await throwAt(
            await NbdTestClient.greet(path, flags),
            bytes.subarray(0, Math.max(0, bytes.length - cut)),
            pieces,
          );
        },
      ),
      { numRuns: 300 },
    );
  });

  it.each(['ro', 'rw'])('survives any requests (%s)', async (name) => {
    await fc.assert(
      fc.asyncProperty(
        fc.array(request, { maxLength: 30 }),
        fc.boolean(),
        fc.nat(60),
        fc.integer({ min: 1, max: 7 }),
        async (requests, structured, cut, pieces) => {
          const bytes = Buffer.concat(requests);
          const client = await NbdTestClient.go(path, name, structured);
          await throwAt(client, bytes.subarray(0, Math.max(0, bytes.length - cut)), pieces);
        },
      ),
      { numRuns: 150 },
    );
    expect(image.mostUnderWay).toBeLessThanOrEqual(1024 * KIB);
  });

  it('answers every request that is well-formed, whatever it asks, exactly once', async () => {
    const wellFormed = fc.record({
      command: fc.constantFrom(0, 1, 3, 4, 5, 6, 7, 8, 99),
      flags: fc.oneof(fc.constant(0), fc.nat(0x3f)),
      offset: u64,
      length: fc.oneof(fc.nat(SIZE), fc.nat(1000)),
    });
    await fc.assert(
      fc.asyncProperty(
        fc.constantFrom('ro', 'rw'),
        fc.array(wellFormed, { maxLength: 40 }),
        async (name, requests) => {
          const client = await NbdTestClient.go(path, name);
          requests.forEach((fields, i) => {
            client.write(requestBytes({ ...fields, cookie: BigInt(i) }));
            if (fields.command === 1) client.write(Buffer.alloc(fields.length, i));
          });
          const open = new Set(requests.keys());
          while (open.size > 0) {
            const { cookie, done } = await client.chunk();
            expect(open.has(Number(cookie))).toBe(true);
            if (done) open.delete(Number(cookie));
          }
          client.close();
        },
      ),
      { numRuns: 100 },
    );
  });
});
