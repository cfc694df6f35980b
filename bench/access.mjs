#!/usr/bin/env node
/**
 * Measures reading from a repository without restoring: `b2 mount` and `b2 serve nbd` beside `restic mount` and `borg mount` of the
 * same image, and beside `nbdkit file` of the image itself.
 *
 *   sudo node bench/access.mjs [--size MIB] [--seconds N] [--dir DIR] [--only REGEX] [--no-points] [--json]
 *
 * 1. Random reads of 4 KiB for --seconds each by fio, past the kernel's page cache (O_DIRECT), one at a time and eight at a time: cold
 *    (the page cache dropped, the server just started) and warm (the same places again).
 * 2. The whole image from its start to its end: files by dd, NBD by nbdcopy, which reads holes too; cold and warm (the server has read
 *    it before, the page cache has the repository, that of the mount is dropped).
 * 3. From the start of the command to the first byte, for that volume and (unless --no-points) for one of 1 TiB with a million points
 *    (made once by bench/manifest.ts and kept in DIR), less the time that `node -e 0` takes: warm that of a warm start, cold that of one
 *    after the page cache was dropped, too.
 *
 * The image and the repository of a million points are kept in DIR (/var/tmp/b2-bench), everything else is removed. Needs root (page
 * cache, mounts) and restic, borgbackup, python3-pyfuse3, nbdkit, libnbd-bin, fio, fuse3; what is missing is left out. Exit status 1: b2
 * failed, or gave other bytes than the image has; times never matter for it.
 */
import { execFileSync, spawn, spawnSync } from 'node:child_process';
import {
  closeSync,
  existsSync,
  mkdirSync,
  mkdtempSync,
  openSync,
  readSync,
  renameSync,
  rmSync,
  writeFileSync,
} from 'node:fs';
import { connect } from 'node:net';
import os from 'node:os';
import path from 'node:path';
import { fileURLToPath } from 'node:url';
import { parseArgs } from 'node:util';
import { prepareImage } from './image.mjs';
import { onExit } from './measure.mjs';

const ROOT = path.dirname(path.dirname(fileURLToPath(import.meta.url)));
const B2 = process.env.B2_TEST_PROGRAM ?? path.join(ROOT, 'bin', 'b2');
const MIB = 2 ** 20;
/** Where the volume of a million points has data, and what (bench/manifest.ts). */
const POINTS_OFFSET = 2 ** 39;
/** Until the first byte, at most. */
const START_MS = 60_000;

const { values } = parseArgs({
  options: {
    size: { type: 'string', default: '1024' },
    seconds: { type: 'string', default: '3' },
    dir: { type: 'string', default: '/var/tmp/b2-bench' },
    only: { type: 'string', default: '' },
    'no-points': { type: 'boolean', default: false },
    json: { type: 'boolean', default: false },
  },
});
const sizeMiB = Number(values.size);
const seconds = Number(values.seconds);
const only = new RegExp(values.only);

const say = (text) => process.stderr.write(`${text}\n`);
const now = () => Number(process.hrtime.bigint()) / 1e6;
const median = (list) => list.toSorted((a, b) => a - b)[Math.floor(list.length / 2)];
const sleep = (ms) => new Promise((resolve) => setTimeout(resolve, ms));
const has = (program) => spawnSync('sh', ['-c', `command -v ${program}`]).status === 0;
const dropCaches = () => {
  spawnSync('sync');
  writeFileSync('/proc/sys/vm/drop_caches', '3');
};
const isMounted = (dir) => spawnSync('mountpoint', ['-q', dir]).status === 0;

mkdirSync(values.dir, { recursive: true });
const scratch = mkdtempSync(path.join(values.dir, 'access-'));
const mountpoint = path.join(scratch, 'm');
const socket = path.join(scratch, 's');
mkdirSync(mountpoint);
const running = new Set();
const release = onExit(() => {
  for (const child of running) child.kill('SIGKILL');
  spawnSync('umount', ['-l', mountpoint], { stdio: 'ignore' });
  rmSync(scratch, { recursive: true, force: true });
});
for (const [name, code] of [
  ['SIGINT', 130],
  ['SIGTERM', 143],
]) {
  process.once(name, () => {
    release();
    process.exit(code);
  });
}

const b2Env = (repository, more) => ({
  ...process.env,
  B2_REPOSITORY: repository,
  B2_CONFIG: '/dev/null',
  B2_CACHE_DIR: path.join(scratch, 'cache'),
  ...more,
});
const image = prepareImage(values.dir, sizeMiB, say);
const key = path.join(scratch, 'key');
const env = {
  b2: b2Env(path.join(scratch, 'b2'), { B2_KEY_FILE: key }),
  restic: {
    ...process.env,
    RESTIC_REPOSITORY: path.join(scratch, 'restic'),
    RESTIC_PASSWORD: 'bench',
    RESTIC_CACHE_DIR: path.join(scratch, 'cache-restic'),
  },
};
const run = (command, args, options = {}) =>
  execFileSync(command, args, { stdio: ['ignore', 'ignore', 'inherit'], ...options });

/** borg with a repository of its own for that way to cut chunks. */
function borg(name, how) {
  const base = path.join(scratch, name.replaceAll(' ', '-'));
  const environment = {
    ...process.env,
    BORG_REPO: `${base}-repo`,
    BORG_PASSPHRASE: 'bench',
    BORG_BASE_DIR: base,
  };
  return {
    name,
    program: 'borg',
    command: ['borg', 'mount', '-f', '::first', mountpoint],
    env: environment,
    file: path.join(mountpoint, 'stdin'),
    fill: () => {
      run('borg', ['init', '-e', 'repokey-blake2'], { env: environment, stdio: 'ignore' });
      const args = ['create', '--files-cache', 'disabled', '--sparse', ...how, '-C', 'lz4'];
      fromStdin('borg', [...args, '::first', '-'], environment);
    },
  };
}

/** Everything that serves, by name: how to fill it, how it is started, and where the image is then. */
const SERVERS = [
  {
    name: 'b2 mount',
    program: B2,
    command: [B2, 'mount', mountpoint, '--volume', 'bench/image', '--foreground', '--quiet'],
    env: env.b2,
    file: path.join(mountpoint, 'latest/disk.img'),
  },
  {
    name: 'restic mount',
    program: 'restic',
    command: ['restic', 'mount', '-q', mountpoint],
    env: env.restic,
    file: path.join(mountpoint, 'snapshots/latest/image'),
    fill: () => {
      run('restic', ['init', '-q'], { env: env.restic });
      fromStdin('restic', ['backup', '-q', '--stdin', '--stdin-filename', 'image'], env.restic);
    },
  },
  borg('borg mount', []),
  // Chunks of the size that b2 has, which whoever backs disks up would choose.
  borg('borg mount 64K', ['--chunker-params', 'fixed,65536']),
  {
    name: 'b2 serve nbd',
    program: B2,
    command: [B2, 'serve', 'nbd', 'bench/image', '--socket', socket, '--quiet'],
    env: env.b2,
  },
  {
    name: 'nbdkit file',
    program: 'nbdkit',
    command: ['nbdkit', '-f', '-r', '-U', socket, 'file', image],
    env: process.env,
  },
].filter(({ name, program }) => {
  if (!only.test(name)) return false;
  if (!has(program)) say(`${name}: ${program} is not here, left out`);
  return has(program);
});

function fromStdin(command, args, environment) {
  const fd = openSync(image, 'r');
  try {
    run(command, args, { env: environment, stdio: [fd, 'ignore', 'inherit'] });
  } finally {
    closeSync(fd);
  }
}

const read = (socketOf, bytes) =>
  new Promise((resolve, reject) => {
    const give = () => {
      const got = socketOf.read(bytes);
      if (got === null) return;
      socketOf.off('readable', give);
      resolve(got);
    };
    socketOf.on('readable', give);
    socketOf.once('close', () => reject(new Error('closed')));
    give();
  });

/** 4 KiB of the default export, by the oldest handshake there is. */
async function nbdRead(offset) {
  const to = connect(socket);
  try {
    await new Promise((resolve, reject) => {
      to.once('connect', resolve);
      to.once('error', reject);
    });
    await read(to, 18);
    const hello = Buffer.alloc(20);
    hello.writeUInt32BE(3, 0);
    hello.write('IHAVEOPT', 4);
    hello.writeUInt32BE(1, 12);
    to.write(hello);
    await read(to, 10);
    const request = Buffer.alloc(28);
    request.writeUInt32BE(0x25609513, 0);
    request.writeBigUInt64BE(BigInt(offset), 16);
    request.writeUInt32BE(4096, 24);
    to.write(request);
    return (await read(to, 16 + 4096)).subarray(16);
  } finally {
    to.destroy();
  }
}

function fileRead(file, offset) {
  const fd = openSync(file, 'r');
  try {
    const into = Buffer.alloc(4096);
    readSync(fd, into, 0, into.length, offset);
    return into;
  } finally {
    closeSync(fd);
  }
}

/** Tries until it works; `child` must live meanwhile. */
async function untilIt(works, child, name) {
  const end = now() + START_MS;
  for (;;) {
    try {
      return await works();
    } catch {
      if (child.exitCode !== null) throw new Error(`${name} ended with ${child.exitCode}`);
      if (now() > end) throw new Error(`${name} serves nothing`);
      await sleep(2);
    }
  }
}

/** Starts a server; resolves with the first byte. */
async function start(server, offset = 0) {
  const [command, ...args] = server.command;
  const from = now();
  const stderr = server.program === 'restic' ? 'ignore' : 'inherit'; // it unmounts what is unmounted
  const child = spawn(command, args, { env: server.env, stdio: ['ignore', 'ignore', stderr] });
  running.add(child);
  const ended = new Promise((resolve) => child.once('exit', resolve));
  const first =
    server.file === undefined
      ? await untilIt(() => nbdRead(offset), child, server.name)
      : await untilIt(() => fileRead(server.file, offset), child, server.name);
  const firstMs = now() - from;
  return {
    first,
    firstMs,
    async stop() {
      if (server.file !== undefined) {
        for (let i = 0; isMounted(mountpoint) && i < 50; i++) {
          spawnSync('umount', [mountpoint], { stdio: 'ignore' });
          if (isMounted(mountpoint)) await sleep(100);
        }
      } else child.kill('SIGTERM');
      const late = setTimeout(() => child.kill('SIGKILL'), 10_000);
      await ended;
      clearTimeout(late);
      running.delete(child);
      rmSync(socket, { force: true });
    },
  };
}

/** Reads a second of 4 KiB, at random places that are the same each time. */
function random(server, depth) {
  const engine =
    server.file === undefined
      ? ['--ioengine=nbd', `--uri=nbd+unix:///?socket=${socket}`, `--iodepth=${depth}`]
      : [
          '--ioengine=psync',
          `--filename=${server.file}`,
          `--numjobs=${depth}`,
          '--direct=1',
          '--group_reporting',
        ];
  const text = execFileSync(
    'fio',
    [
      '--name=r',
      '--rw=randread',
      '--bs=4k',
      `--size=${sizeMiB}m`,
      '--readonly',
      '--thread',
      '--randrepeat=1',
      '--norandommap',
      `--runtime=${seconds}`,
      '--time_based',
      '--output-format=json',
      ...engine,
    ],
    { encoding: 'utf8', cwd: scratch, stdio: ['ignore', 'pipe', 'inherit'] },
  );
  return JSON.parse(text.slice(text.indexOf('{'))).jobs[0].read.iops;
}

/** MB/s over the whole image. */
function sequential(server) {
  const from = now();
  if (server.file === undefined)
    run('nbdcopy', ['--no-extents', `nbd+unix:///?socket=${socket}`, 'null:']);
  else run('dd', [`if=${server.file}`, 'of=/dev/null', 'bs=1M', 'status=none']);
  return (sizeMiB * MIB) / 1000 / (now() - from);
}

async function measureServer(server) {
  const result = { name: server.name };
  for (const [depth, label] of [
    [1, 'random1'],
    [8, 'random8'],
  ]) {
    dropCaches();
    const live = await start(server);
    try {
      result[`${label}Cold`] = random(server, depth);
      result[`${label}Warm`] = random(server, depth);
    } finally {
      await live.stop();
    }
  }
  dropCaches();
  const live = await start(server);
  try {
    result.sequentialCold = sequential(server);
    // Of the mount's own file the kernel keeps nothing then.
    if (server.file !== undefined)
      spawnSync('dd', [`if=${server.file}`, 'iflag=nocache', 'count=0', 'status=none']);
    result.sequentialWarm = sequential(server);
  } finally {
    await live.stop();
  }
  result.firstMs = median(await firstBytes(server, 3));
  say(
    `  ${server.name}: random ${Math.round(result.random1Cold)} / ${Math.round(result.random1Warm)}, eight ${Math.round(result.random8Cold)} / ${Math.round(result.random8Warm)}, sequential ${Math.round(result.sequentialCold)} / ${Math.round(result.sequentialWarm)} MB/s, first byte ${Math.round(result.firstMs)} ms`,
  );
  return result;
}

async function firstBytes(server, rounds, offset = 0, expected) {
  const all = [];
  for (let i = 0; i < rounds; i++) {
    const live = await start(server, offset);
    await live.stop();
    all.push(live.firstMs);
    if (expected !== undefined && !live.first.equals(expected))
      throw new Error(`${server.name}: other bytes than were written`);
  }
  return all;
}

/** The bytes that b2 serves are those of the image. */
async function compareWithImage(server) {
  const live = await start(server);
  try {
    if (server.file !== undefined) run('cmp', [image, server.file]);
    else
      run('qemu-img', [
        'compare',
        '-q',
        '-f',
        'raw',
        '-F',
        'raw',
        image,
        `nbd+unix:///?socket=${socket}`,
      ]);
  } finally {
    await live.stop();
  }
}

/** The repository of a million points; made once, in about a minute. */
function pointsRepository() {
  const dir = path.join(values.dir, 'points-1m');
  if (existsSync(dir)) return dir;
  say(`making a volume of 1 TiB with a million points in ${dir} (once; it is kept)`);
  const fresh = `${dir}.tmp`;
  rmSync(fresh, { recursive: true, force: true });
  spawnSync(
    process.execPath,
    [path.join(ROOT, 'node_modules/typescript/bin/tsc'), '-p', path.join(ROOT, 'bench')],
    { stdio: 'inherit' },
  );
  run(process.execPath, [
    path.join(ROOT, 'node_modules/.cache/b2/bench/bench/manifest.js'),
    '--repository',
    fresh,
  ]);
  renameSync(fresh, dir);
  return dir;
}

async function firstOfPoints() {
  const repository = pointsRepository();
  const environment = b2Env(repository, { B2_KEY_FILE: path.join(repository, 'key') });
  const expected = Buffer.alloc(4096, 'b2 ');
  const result = {};
  const servers = [
    {
      name: 'b2 mount',
      command: [B2, 'mount', mountpoint, '--volume', 'bench/1t', '--foreground', '--quiet'],
      env: environment,
      file: path.join(mountpoint, 'latest/disk.img'),
    },
    {
      name: 'b2 serve nbd',
      command: [B2, 'serve', 'nbd', 'bench/1t', '--socket', socket, '--quiet'],
      env: environment,
    },
  ];
  for (const server of servers) {
    const { name } = server;
    const colds = [];
    for (let i = 0; i < 3; i++) {
      dropCaches();
      colds.push(...(await firstBytes(server, 1, POINTS_OFFSET, expected)));
    }
    const cold = median(colds);
    const warm = median(await firstBytes(server, 3, POINTS_OFFSET, expected));
    result[name] = { cold, warm };
    say(
      `  ${name}, 1 TiB, a million points: first byte ${Math.round(cold)} / ${Math.round(warm)} ms`,
    );
  }
  return result;
}

function nodeStart(isCold) {
  const all = [];
  for (let i = 0; i < 7; i++) {
    if (isCold) dropCaches();
    const from = now();
    spawnSync(process.execPath, ['-e', '0']);
    all.push(now() - from);
  }
  return median(all);
}

function report(data) {
  const byName = Object.fromEntries(data.servers.map((s) => [s.name, s]));
  const pad = (x) => String(Math.round(x)).padStart(8);
  console.log(
    `${sizeMiB} MiB image; random 4 KiB reads a second past the page cache, MB/s, ms to the first byte (cold / warm); load ${os.loadavg()[0].toFixed(1)}`,
  );
  console.log(
    `${''.padEnd(15)}      one at a time     eight at a time          MB/s          first byte`,
  );
  for (const s of data.servers)
    console.log(
      `${s.name.padEnd(15)} ${pad(s.random1Cold)} ${pad(s.random1Warm)}   ${pad(s.random8Cold)} ${pad(s.random8Warm)}   ${pad(s.sequentialCold)} ${pad(s.sequentialWarm)}   ${pad(s.firstMs)}`,
    );
  const mount = byName['b2 mount'];
  const serve = byName['b2 serve nbd'];
  const kit = byName['nbdkit file'];
  const ratio = (a, b) => (a / b).toFixed(2);
  for (const peer of ['restic mount', 'borg mount', 'borg mount 64K']) {
    const p = byName[peer];
    if (p === undefined || mount === undefined) continue;
    console.log(
      `b2 mount / ${peer}: random ${ratio(mount.random1Cold, p.random1Cold)} cold, ${ratio(mount.random1Warm, p.random1Warm)} warm; eight ${ratio(mount.random8Cold, p.random8Cold)} cold, ${ratio(mount.random8Warm, p.random8Warm)} warm (goal at least 5); sequential ${ratio(mount.sequentialCold, p.sequentialCold)} cold, ${ratio(mount.sequentialWarm, p.sequentialWarm)} warm`,
    );
  }
  if (kit !== undefined)
    for (const s of [serve, mount])
      if (s !== undefined)
        console.log(
          `nbdkit file / ${s.name}: sequential ${ratio(kit.sequentialCold, s.sequentialCold)} cold, ${ratio(kit.sequentialWarm, s.sequentialWarm)} warm (goal at most 2); random ${ratio(kit.random1Cold, s.random1Cold)} cold, ${ratio(kit.random1Warm, s.random1Warm)} warm`,
        );
  const own = data.nodeMs;
  const less = [];
  if (mount !== undefined) less.push(`b2 mount ${Math.round(mount.firstMs - own)}`);
  if (serve !== undefined) less.push(`b2 serve nbd ${Math.round(serve.firstMs - own)}`);
  for (const [name, { cold, warm }] of Object.entries(data.points ?? {}))
    less.push(
      `${name} of 1 TiB ${Math.round(cold - data.nodeColdMs)} cold, ${Math.round(warm - own)} warm`,
    );
  console.log(
    `first byte less the ${Math.round(own)} ms (cold ${Math.round(data.nodeColdMs)}) of node -e 0: ${less.join('; ')} (goal below 300 ms)`,
  );
}

try {
  if (process.geteuid?.() !== 0) throw new Error('the page cache and the mounts need root');
  say(`filling the repositories (load ${os.loadavg()[0].toFixed(1)})`);
  run(B2, ['init', '--quiet'], { env: env.b2 });
  run(B2, ['snapshot', '--quiet', '--volume', 'bench/image', image], { env: env.b2 });
  for (const { fill } of SERVERS) fill?.();
  const data = {
    sizeMiB,
    load: os.loadavg()[0],
    nodeMs: nodeStart(false),
    nodeColdMs: nodeStart(true),
    servers: [],
  };
  for (const server of SERVERS) data.servers.push(await measureServer(server));
  if (!values['no-points']) data.points = await firstOfPoints();
  for (const server of SERVERS.filter(({ name }) => name.startsWith('b2 ')))
    await compareWithImage(server);
  if (values.json) console.log(JSON.stringify(data, null, 2));
  else report(data);
} catch (error) {
  say(`bench: ${error.message}`);
  process.exitCode = 1;
} finally {
  release();
}
