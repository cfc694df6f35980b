/** Reads that are answered with memory of the image's own ({@link Image.lend}). What is given back is overwritten at once. */
import { execFileSync } from 'node:child_process';
import { connect as connectPlain } from 'node:net';
import { join } from 'node:path';
import { readFileSync } from 'node:fs';
import { connect as connectTls } from 'node:tls';
import { describe, expect, it, onTestFinished } from 'vitest';

import { B2Error } from '../../../src/errors.js';
import type { B2Event } from '../../../src/events.js';
import { zeroViews, type Lending } from '../../../src/image.js';
import { withNbdExport } from '../../../src/nbd/export.js';
import { SocketReader } from '../../../src/nbd/reader.js';
import { serveNbd, type NbdServer } from '../../../src/nbd/server.js';
import { MemoryImage } from '../../support/image-memory.js';
import { NbdTestClient, goBytes, optionBytes, requestBytes } from '../../support/nbd-client.js';
import { tempDir } from '../../support/tmp.js';

const KIB = 1024;
const MIB = 1024 * KIB;

/** Lends views of up to 64 KiB of memory that threads could share. */
class LendingImage extends MemoryImage {
  how: 'at once' | 'later' | 'not' | 'reject' | 'throw' = 'at once';
  lent = 0;
  out = 0;

  lend(offset: number, length: number): Lending {
    if (this.how === 'throw') throw new TypeError('secret internals');
    if (this.how === 'not') return undefined;
    if (this.how === 'reject')
      return Promise.reject(new B2Error('damaged', 'pack 12, frame 3 fails its tag'));
    const memory = Buffer.from(new SharedArrayBuffer(length));
    memory.set(this.content.subarray(offset, offset + length));
    const views: Uint8Array[] = [];
    for (const run of this.runs) {
      const from = Math.max(offset, run.offset);
      const to = Math.min(offset + length, run.offset + run.length);
      if (from < to && run.hole) views.push(...zeroViews(to - from));
      for (let at = from; at < to && !run.hole; at += 64 * KIB)
        views.push(memory.subarray(at - offset, Math.min(to, at + 64 * KIB) - offset));
    }
    this.lent++;
    this.out++;
    const release = (): void => {
      this.out--;
      memory.fill(0xee);
    };
    const loan = { views, release };
    if (this.how === 'at once') return loan;
    return new Promise((resolve) => setImmediate(() => resolve(loan)));
  }
}

interface Bed {
  readonly image: LendingImage;
  readonly path: string;
  readonly server: NbdServer;
  readonly events: B2Event[];
}

async function bed(tls = false): Promise<Bed> {
  const dir = tempDir();
  const path = dir.join('s');
  const events: B2Event[] = [];
  const image = new LendingImage([
    { length: 700 * KIB + 512, hole: false },
    { length: 300 * KIB, hole: true },
    { length: 3 * KIB, hole: false },
    { length: 2 * KIB, hole: true },
    { length: 2 * MIB, hole: false },
  ]);
  const server = await serveNbd({
    exports: [{ name: 'disk', open: () => Promise.resolve(image) }],
    listen: { socketPath: path },
    events: (event) => events.push(event),
    limits: { graceMs: 200 },
    ...(tls ? { tls: certificate(dir.path) } : {}),
  });
  onTestFinished(async () => {
    await server.close();
    await dir.remove();
  });
  return { image, path, server, events };
}

function certificate(dir: string): { cert: Buffer; key: Buffer } {
  const [cert, key] = [join(dir, 'cert.pem'), join(dir, 'key.pem')];
  const args = `req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=localhost`;
  execFileSync('openssl', [...args.split(' '), '-keyout', key, '-out', cert], { stdio: 'ignore' });
  return { cert: readFileSync(cert), key: readFileSync(key) };
}

const RANGES = [
  [0, 256 * KIB],
  [1, 4095],
  [600 * KIB, 500 * KIB],
  [690 * KIB, 1 * MIB],
  [1003 * KIB, 64 * KIB],
  [3 * MIB - 40 * KIB, 16 * KIB],
] as const;

describe('what an image lends', () => {
  it.each(['at once', 'later', 'not'] as const)('is sent as it is (%s)', async (how) => {
    const { image, path } = await bed();
    image.how = how;
    for (const structured of [true, false]) {
      const client = await NbdTestClient.go(path, '', structured);
      for (const [offset, length] of RANGES) {
        const wanted = image.content.subarray(offset, offset + length);
        if (structured) {
          expect((await client.read(offset, length)).equals(wanted)).toBe(true);
          expect((await client.read(offset, length, 4)).equals(wanted)).toBe(true);
          continue;
        }
        client.write(requestBytes({ command: 0, offset, length, cookie: 9n }));
        const head = await client.reader.take(16);
        expect([head.readUInt32BE(0), head.readUInt32BE(4), head.readBigUInt64BE(8)]).toEqual([
          0x67446698,
          0,
          9n,
        ]);
        expect((await client.reader.take(length)).equals(wanted)).toBe(true);
      }
      client.close();
    }
    await expect.poll(() => image.out).toBe(0);
    if (how === 'not') expect(image.reads).toBeGreaterThan(0);
    else expect([image.reads, image.lent]).toEqual([0, RANGES.length * 3]);
  });

  it('is sent with its holes left out, but short ones and where they must not be', async () => {
    const { image, path } = await bed();
    const client = await NbdTestClient.go(path);
    const types = async (offset: number, length: number, flags = 0): Promise<number[]> => {
      client.write(requestBytes({ command: 0, offset, length, flags }));
      return (await client.reply()).map((chunk) => chunk.type);
    };
    expect(await types(600 * KIB, 1 * MIB)).toEqual([1, 2, 1]);
    expect(await types(600 * KIB, 1 * MIB, 4)).toEqual([1]);
    expect(await types(800 * KIB, 100 * KIB)).toEqual([2]);
    expect(await types(800 * KIB, 4 * KIB)).toEqual([1]);
    client.close();
    await expect.poll(() => image.out).toBe(0);
  });

  it('is given back when it is sent, not before, to a client that takes its time', async () => {
    const { image, path } = await bed();
    for (const how of ['at once', 'later'] as const) {
      image.how = how;
      const client = await NbdTestClient.go(path);
      client.socket.pause();
      const requests = 24;
      for (let i = 0; i < requests; i++)
        client.write(requestBytes({ command: 0, flags: 4, offset: i * 1000, length: 1 * MIB }));
      await expect.poll(() => image.out).toBeGreaterThan(0);
      await new Promise((resolve) => setTimeout(resolve, 50));
      expect(image.out).toBeLessThan(8);
      client.socket.resume();
      for (let i = 0; i < requests; i++) {
        const { type, payload } = await client.chunk();
        const offset = Number(payload.readBigUInt64BE(0));
        expect(type).toBe(1);
        expect(payload.subarray(8).equals(image.content.subarray(offset, offset + 1 * MIB))).toBe(
          true,
        );
      }
      await expect.poll(() => image.out).toBe(0);
      client.close();
    }
  });

  it('is given back when a client vanishes that has not taken it, and when the server closes', async () => {
    const { image, path, server, events } = await bed();
    for (let i = 0; i < 12; i++) {
      image.how = i % 2 === 0 ? 'at once' : 'later';
      const client = await NbdTestClient.go(path);
      client.socket.pause();
      for (let j = 0; j < 10; j++)
        client.write(requestBytes({ command: 0, flags: 4, length: 1 * MIB }));
      if (i % 3 > 0) await expect.poll(() => image.out).toBeGreaterThan(0);
      client.close();
    }
    await expect.poll(() => server.connections).toBe(0);
    expect(image.out).toBe(0);
    const client = await NbdTestClient.go(path);
    client.socket.pause();
    for (let j = 0; j < 10; j++)
      client.write(requestBytes({ command: 0, flags: 4, length: 1 * MIB }));
    await expect.poll(() => image.out).toBeGreaterThan(0);
    await server.close();
    expect(image.out).toBe(0);
    client.close();
    expect(events).toEqual([]);
  });

  it('is encrypted where the client wants that', async () => {
    const { image, path } = await bed(true);
    const plain = connectPlain(path);
    await new Promise((resolve) => plain.once('connect', resolve));
    let reader = new SocketReader(plain);
    await reader.take(18);
    plain.write(Buffer.concat([Buffer.from([0, 0, 0, 3]), optionBytes(5)]));
    expect((await reader.take(20)).readUInt32BE(12)).toBe(1);
    reader.detach();
    const socket = connectTls({ socket: plain, rejectUnauthorized: false });
    await new Promise((resolve) => socket.once('secureConnect', resolve));
    reader = new SocketReader(socket);
    socket.write(Buffer.concat([optionBytes(8), optionBytes(7, goBytes('disk'))]));
    await reader.take(20 + 20 + 12 + 20);
    for (let round = 0; round < 8; round++) {
      for (const [offset, length] of RANGES)
        socket.write(requestBytes({ command: 0, flags: 4, offset, length }));
      for (const [offset, length] of RANGES) {
        const head = await reader.take(28);
        expect(Number(head.readBigUInt64BE(20))).toBe(offset);
        const got = await reader.take(length);
        expect(got.equals(image.content.subarray(offset, offset + length))).toBe(true);
      }
    }
    socket.destroy();
    await expect.poll(() => image.out).toBe(0);
  });

  it('may fail: the client gets EIO, the log the reason, and the next read works', async () => {
    const { image, path, events } = await bed();
    const client = await NbdTestClient.go(path);
    image.how = 'reject';
    await expect(client.read(0, 4096)).rejects.toMatchObject({
      errno: 5,
      message: 'pack 12, frame 3 fails its tag',
    });
    image.how = 'throw';
    await expect(client.read(4096, 4096)).rejects.toMatchObject({
      errno: 5,
      message: expect.not.stringContaining('secret'),
    });
    image.how = 'later';
    expect((await client.read(0, 4096)).equals(image.content.subarray(0, 4096))).toBe(true);
    client.close();
    expect(events.map((e) => ('message' in e ? e.message.split('\n')[0] : ''))).toEqual([
      'NBD: export disk, bytes 0+4096: pack 12, frame 3 fails its tag',
      expect.stringContaining('secret internals'),
    ]);
  });

  it('goes through an export of its own, whose failure is what that rejects with', async () => {
    const { image } = await bed();
    const read = async (uri: string): Promise<Buffer> => {
      const path = decodeURI(uri.slice(uri.indexOf('socket=') + 'socket='.length));
      const client = await NbdTestClient.go(path);
      const got = await client.read(0, 1 * MIB).catch(() => Buffer.alloc(0));
      client.close();
      return got;
    };
    const got = await withNbdExport(image, read);
    expect(got.equals(image.content.subarray(0, 1 * MIB))).toBe(true);
    expect([image.lent, image.reads]).toEqual([1, 0]);
    image.how = 'reject';
    await expect(withNbdExport(image, read)).rejects.toMatchObject({ kind: 'damaged' });
  });
});
