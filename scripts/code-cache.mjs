// Leaves the compiled code of the bundle in the directory $1 beside it (bin/load.js says what for). V8 gives out what it has compiled,
// and it compiles a function when it is first called: so this does in small what commands do that somebody waits for.
//
// Run by scripts/build.mjs, in a process of its own. Needs no privileges and leaves nothing else behind.
import {
  closeSync,
  fsyncSync,
  mkdirSync,
  mkdtempSync,
  openSync,
  rmSync,
  truncateSync,
  writeFileSync,
} from 'node:fs';
import { createRequire } from 'node:module';
import { connect } from 'node:net';
import { once } from 'node:events';
import { randomBytes } from 'node:crypto';
import { Writable } from 'node:stream';
import { tmpdir } from 'node:os';
import { join } from 'node:path';

const bundle = process.argv[2];
const require = createRequire(import.meta.url);
const { codeCacheOf, codeFileOf, scripts, sealedCode } = require('../bin/load.js');

/** Loaded only: threads of the commands that somebody waits for. */
const PREPARED = ['mount/reader-worker.js', 'repo/decode-worker.js'];

const ANSWER_MS = 30_000;

const cache = codeCacheOf(bundle);
mkdirSync(cache, { recursive: true });
const { main, processWorld } = require(join(bundle, 'cli.js'));

const scratch = mkdtempSync(join(tmpdir(), 'b2-build-'));
const socket = join(scratch, 's');
const image = join(scratch, 'image');

/** Runs a command line, which must end with `code`; `heard` is called when it first says something, and may end it. */
async function b2(args, { code = 0, heard = () => undefined } = {}) {
  const abort = new AbortController();
  let errors = '';
  let isSilent = true;
  const stdout = new Writable({
    write(_chunk, _encoding, done) {
      if (isSilent) heard(abort);
      isSilent = false;
      done();
    },
  });
  const stderr = new Writable({
    write(chunk, _encoding, done) {
      errors += chunk;
      done();
    },
  });
  const env = {
    B2_CONFIG: '/dev/null',
    B2_CACHE_DIR: join(scratch, 'cache'),
    B2_REPOSITORY: join(scratch, 'repo'),
    B2_KEY_FILE: join(scratch, 'key'),
  };
  const world = { ...processWorld(abort), stdout, stderr, env, homeDir: scratch, isRoot: false };
  const got = await main(args, world);
  if (got !== code) throw new Error(`b2 ${args.join(' ')} ended with ${got}: ${errors}`);
}

/** A client's first read. */
async function readByNbd() {
  const client = connect(socket);
  client.setTimeout(ANSWER_MS, () => client.destroy(new Error('the server does not answer')));
  await once(client, 'connect');
  const hello = Buffer.alloc(20);
  hello.writeUInt32BE(3, 0);
  hello.write('IHAVEOPT', 4);
  hello.writeUInt32BE(1, 12);
  const request = Buffer.alloc(28);
  request.writeUInt32BE(0x25609513, 0);
  request.writeUInt32BE(4096, 24);
  client.write(hello);
  client.write(request);
  let got = 0;
  for await (const data of client) {
    got += data.length;
    if (got >= 18 + 10 + 16 + 4096) break;
  }
  client.destroy();
}

try {
  writeFileSync(image, randomBytes(1 << 20));
  truncateSync(image, 8 << 20);
  await b2(['init']);
  await b2(['snapshot', '--volume', 'build/image', image]);
  await b2(['volumes']);
  await b2(['points', 'build/image']);
  let read;
  await b2(['serve', 'nbd', 'build/image', '--socket', socket], {
    heard: (abort) => {
      read = readByNbd();
      const end = () => abort.abort('SIGTERM');
      read.then(end, end);
    },
  });
  await read;
  // As far as it gets without mounting.
  await b2(['mount', join(scratch, 'none'), '--volume', 'build/image', '--foreground'], {
    code: 4,
  });
  for (const name of PREPARED) require(join(bundle, name));
  for (const [file, script] of scripts) {
    const to = openSync(codeFileOf(file, cache), 'w');
    writeFileSync(to, sealedCode(script.createCachedData()));
    fsyncSync(to);
    closeSync(to);
  }
} finally {
  rmSync(scratch, { recursive: true, force: true });
}
process.exit(0);
