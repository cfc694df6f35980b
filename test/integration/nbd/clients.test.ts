/** Real clients against the server: libnbd's tools and bindings, qemu, fio, with nbdkit as the yardstick. */
import { execFile } from 'node:child_process';
import { readFileSync, statSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { promisify } from 'node:util';
import { afterEach, beforeEach, expect, it } from 'vitest';

import type { B2Event } from '../../../src/events.js';
import {
  openTemporaryOverlay,
  serveNbd,
  withNbdExport,
  type NbdServer,
  type NbdServerOptions,
} from '../../../src/nbd/index.js';
import { MemoryImage } from '../../support/image-memory.js';
import { requires } from '../../support/requires.js';
import { tempDir, type TempDir } from '../../support/tmp.js';

const run = promisify(execFile);
const KIB = 1024;
const MIB = 1024 * KIB;
/** Debian's binding belongs to Debian's Python. */
const PYTHON = '/usr/bin/python3';
const SCRIPT = join(import.meta.dirname, 'conformance.py');

const RUNS = [
  { length: 3 * MIB, hole: false },
  { length: 5 * MIB, hole: true },
  { length: 64 * KIB, hole: false },
  { length: 192 * KIB, hole: true },
  { length: 7 * MIB + 512 * KIB, hole: false },
  { length: 32 * MIB, hole: true },
  { length: 256 * KIB, hole: false },
];

let directory: TempDir;
let path: string;
let image: MemoryImage;
let servers: NbdServer[];
let events: B2Event[];

beforeEach(() => {
  directory = tempDir();
  path = directory.join('sock');
  image = new MemoryImage(RUNS);
  servers = [];
  events = [];
});

afterEach(async () => {
  for (const server of servers) await server.close();
  await directory.remove();
});

async function start(options: Partial<NbdServerOptions> = {}): Promise<NbdServer> {
  const server = await serveNbd({
    exports: [{ name: 'disk', description: 'Datenträger', open: () => Promise.resolve(image) }],
    listen: { socketPath: path },
    events: (event) => events.push(event),
    ...options,
  });
  servers.push(server);
  return server;
}

async function startWritable(base = image): Promise<NbdServer> {
  return await start({
    exports: [
      { name: 'disk', open: () => openTemporaryOverlay({ base, directory: directory.path }) },
    ],
  });
}

async function json<T>(program: string, ...args: readonly string[]): Promise<T> {
  const { stdout } = await run(program, args, { maxBuffer: 64 * MIB });
  return JSON.parse(stdout) as T;
}

function expectSame(actual: Buffer, wanted: Buffer): void {
  expect(actual.length).toBe(wanted.length);
  expect(Buffer.compare(actual, wanted)).toBe(0);
}

interface MapEntry {
  readonly offset: number;
  readonly length: number;
  readonly type: number;
}

requires({ tools: ['nbdinfo', 'nbdcopy'] }).describe('libnbd', () => {
  it('nbdinfo shows the export and its allocation map', async () => {
    const server = await start();
    const info = await json<{ exports: Record<string, unknown>[] }>(
      'nbdinfo',
      '--json',
      server.uri('disk'),
    );
    expect(info.exports[0]).toMatchObject({
      'export-name': 'disk',
      description: 'Datenträger',
      'export-size': image.sizeBytes,
      is_read_only: true,
      can_multi_conn: true,
      can_df: true,
      contexts: ['base:allocation'],
      block_size_maximum: 32 * MIB,
    });
    const map = await json<MapEntry[]>('nbdinfo', '--json', '--map', server.uri());
    expect(map.map(({ offset, length, type }) => ({ offset, length, hole: type === 3 }))).toEqual(
      image.runs,
    );
  });

  it('nbdcopy copies out exactly, with any number of connections, and into an overlay', async () => {
    const server = await start();
    for (const args of [
      [],
      ['--connections=1', '--requests=1'],
      ['--request-size=33554432', '--sparse=0'],
      ['--synchronous'],
    ]) {
      const file = directory.join('copy');
      await run('nbdcopy', [...args, server.uri(), file]);
      expectSame(readFileSync(file), image.content);
    }
    await server.close();
    const blank = new MemoryImage([{ length: image.sizeBytes, hole: false }], 9);
    const writable = await startWritable(blank);
    writeFileSync(directory.join('in'), image.content);
    await run('nbdcopy', ['--flush', directory.join('in'), writable.uri()]);
    await run('nbdcopy', [writable.uri(), directory.join('back')]);
    expectSame(readFileSync(directory.join('back')), image.content);
  });
});

requires({ tools: ['nbdkit'], paths: [PYTHON, '/usr/lib/python3/dist-packages/nbd.py'] }).describe(
  'conformance',
  () => {
    it('does as nbdkit does', async () => {
      const base = new MemoryImage([
        { length: 1 * MIB, hole: false },
        { length: 31 * MIB, hole: true },
      ]);
      const server = await startWritable(base);
      const ours = await json<Record<string, unknown>>(PYTHON, SCRIPT, server.uri());
      const { stdout } = await run('nbdkit', [
        '-U',
        '-',
        'memory',
        '32M',
        '--run',
        `${PYTHON} ${SCRIPT} "$uri"`,
      ]);
      const theirs = JSON.parse(stdout) as Record<string, unknown>;
      // Where the specification leaves it open: requests of no length succeed here; block sizes are announced here.
      const open = [
        'zero length write',
        'zero length trim',
        'zero length zero',
        'minimum block',
        'maximum block >= 32 MiB',
      ];
      for (const name of open) theirs[name] = ours[name];
      expect(ours).toEqual(theirs);
      expect(ours).toMatchObject({
        'read past end': 'EINVAL',
        'write past end': 'ENOSPC',
        'zero past end': 'ENOSPC',
        'trim past end': 'EINVAL',
        'read flag 64': 'EINVAL',
        'unaligned read back': true,
        'other connection sees it': true,
        '200 in flight': true,
        'zero length write': 'ok',
        'minimum block': 1,
        'maximum block >= 32 MiB': true,
      });
    });
  },
);

requires({ tools: ['qemu-img', 'qemu-io'] }).describe('qemu', () => {
  it.each(['raw', 'qcow2', 'vmdk', 'vdi', 'vhdx'])(
    'qemu-img converts to %s and finds it identical',
    async (format) => {
      const file = directory.join(`out.${format}`);
      writeFileSync(directory.join('wanted'), image.content);
      await withNbdExport(
        image,
        async (uri) => {
          await run('qemu-img', ['convert', '-f', 'raw', '-O', format, uri, file]);
          await run('qemu-img', ['compare', '-f', 'raw', '-F', format, uri, file]);
        },
        { directory: directory.path },
      );
      await run('qemu-img', ['compare', '-f', 'raw', '-F', format, directory.join('wanted'), file]);
      // Holes were not written out. Data is 11 MiB; vhdx allocates in pieces of megabytes.
      expect(statSync(file).blocks * 512).toBeLessThan(20 * MIB);
      expect(image.closed).toBe(0);
    },
  );

  it('qemu-img map shows holes as holes', async () => {
    const server = await start();
    interface Entry {
      readonly start: number;
      readonly length: number;
      readonly zero: boolean;
      readonly data: boolean;
    }
    const map = await json<Entry[]>('qemu-img', 'map', '--output=json', '-f', 'raw', server.uri());
    expect(
      map.map(({ start: offset, length, zero, data }) => ({ offset, length, hole: zero && !data })),
    ).toEqual(image.runs);
  });

  it('damaged data fails the conversion and is named', async () => {
    image.damaged.push({ offset: 9 * MIB, length: 512, message: 'pack packs/ab/cd: frame 3' });
    const converting = withNbdExport(
      image,
      (uri) => run('qemu-img', ['convert', '-f', 'raw', '-O', 'raw', uri, directory.join('out')]),
      { directory: directory.path, events: (event) => events.push(event) },
    );
    await expect(converting).rejects.toMatchObject({
      kind: 'damaged',
      message: 'pack packs/ab/cd: frame 3',
    });
    expect(events).toHaveLength(1);
  });

  it('qemu-io writes, discards and reads an overlay; the base stays as it is', async () => {
    const before = Buffer.from(image.content);
    const server = await startWritable();
    const io = async (...commands: readonly string[]): Promise<void> => {
      const { stdout } = await run('qemu-io', [
        '-f',
        'raw',
        '-d',
        'unmap',
        ...commands.flatMap((c) => ['-c', c]),
        server.uri(),
      ]);
      expect(stdout).not.toMatch(/failed|error/iu);
    };
    await io(
      'write -P 17 1000448 70144',
      'write -z 4M 100k',
      'write -z -u 1M 64k',
      'discard 2M 1M',
      'write -f -P 3 47M 4k',
      'flush',
    );
    await io(
      'read -P 17 1000448 48128',
      'read -P 0 1M 64k',
      'read -P 0 2M 1M',
      'read -P 3 47M 4k',
      'read -P 0 4M 100k',
    );
    expectSame(image.content, before);
  });
});

requires({ tools: ['fio'] }).describe('fio', () => {
  it('writes and verifies at random with 32 requests under way', async () => {
    const server = await startWritable(new MemoryImage([{ length: 64 * MIB, hole: false }]));
    const { stdout, stderr } = await run(
      'fio',
      [
        '--name=verify',
        '--ioengine=nbd',
        `--uri=${server.uri()}`,
        '--rw=randwrite',
        '--bsrange=512-64k',
        '--bs_unaligned',
        '--iodepth=32',
        '--size=64m',
        '--io_size=64m',
        '--verify=crc32c',
        '--do_verify=1',
        '--verify_fatal=1',
        '--randseed=7',
        '--fsync=64',
      ],
      { cwd: directory.path },
    );
    expect(stdout).toContain('err= 0');
    expect(stderr).not.toContain('verify');
  });
});

requires({ tools: ['openssl', 'nbdinfo', 'nbdcopy'] }).describe('TLS', () => {
  /** A CA and certificates for the server and a client, as libnbd wants them in a directory. */
  async function certificates(name: string): Promise<string> {
    await run('mkdir', [directory.join(name)]);
    const at = (file: string): string => join(directory.join(name), file);
    const key = ['-newkey', 'ec', '-pkeyopt', 'ec_paramgen_curve:prime256v1', '-nodes'];
    await run('openssl', [
      'req',
      '-x509',
      ...key,
      '-keyout',
      at('ca-key.pem'),
      '-out',
      at('ca-cert.pem'),
      '-subj',
      '/CN=test CA',
      '-days',
      '2',
    ]);
    for (const who of ['server', 'client']) {
      const extension = ['-addext', 'subjectAltName=DNS:localhost,IP:127.0.0.1'];
      await run('openssl', [
        'req',
        '-x509',
        ...key,
        '-CA',
        at('ca-cert.pem'),
        '-CAkey',
        at('ca-key.pem'),
        '-keyout',
        at(`${who}-key.pem`),
        '-out',
        at(`${who}-cert.pem`),
        '-subj',
        `/CN=${who}`,
        '-days',
        '2',
        '-addext',
        'basicConstraints=critical,CA:FALSE',
        ...extension,
      ]);
    }
    return directory.join(name);
  }

  const overTcp = (dir: string, clients: boolean): Partial<NbdServerOptions> => ({
    listen: { host: '127.0.0.1', port: 0 },
    tls: {
      cert: readFileSync(join(dir, 'server-cert.pem')),
      key: readFileSync(join(dir, 'server-key.pem')),
      ...(clients ? { clientCa: readFileSync(join(dir, 'ca-cert.pem')) } : {}),
    },
  });

  it('serves over TLS, refuses to without, and checks the certificates of clients', async () => {
    const dir = await certificates('pki');
    const stranger = await certificates('stranger');
    const open = await start(overTcp(dir, false));
    const uri = (server: NbdServer, certs: string): string =>
      `${server.uri('disk').replace('127.0.0.1', 'localhost')}?tls-certificates=${certs}`;
    await run('nbdcopy', [uri(open, dir), directory.join('copy')]);
    expectSame(readFileSync(directory.join('copy')), image.content);
    await expect(run('nbdinfo', [open.uri('disk').replace('nbds:', 'nbd:')])).rejects.toThrow(
      'opt_go',
    );
    await expect(run('nbdinfo', ['--list', open.uri().replace('nbds:', 'nbd:')])).rejects.toThrow();
    // The client does not trust this server.
    await expect(run('nbdinfo', [uri(open, stranger)])).rejects.toThrow();

    const strict = await start(overTcp(dir, true));
    const { stdout } = await run('nbdinfo', [uri(strict, dir)]);
    expect(stdout).toContain('with TLS');
    // Trusts the server, but shows a certificate of another CA.
    await run('cp', [join(dir, 'ca-cert.pem'), stranger]);
    await expect(run('nbdinfo', [uri(strict, stranger)])).rejects.toThrow();
    await run('nbdcopy', [uri(strict, dir), directory.join('copy')]);
    expectSame(readFileSync(directory.join('copy')), image.content);
    expect(events).toEqual([]);
  });

  it('is there for those who want it where plain connections are allowed', async () => {
    const dir = await certificates('pki');
    const server = await start({ ...overTcp(dir, false), allowPlaintext: true });
    const plain = server.uri('disk').replace('nbds:', 'nbd:');
    expect((await run('nbdinfo', [plain])).stdout).toContain('without TLS');
    const secure = `${server.uri('disk').replace('127.0.0.1', 'localhost')}?tls-certificates=${dir}`;
    expect((await run('nbdinfo', [secure])).stdout).toContain('with TLS');
  });
});
