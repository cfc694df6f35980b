/** `b2 serve nbd` of the built program on a real repository, with qemu as the client. */
import { execFile, spawn, type ChildProcess } from 'node:child_process';
import { once } from 'node:events';
import { existsSync, readFileSync, readdirSync, writeFileSync } from 'node:fs';
import { createInterface } from 'node:readline';
import { fileURLToPath } from 'node:url';
import { promisify } from 'node:util';
import { afterEach, beforeEach, expect, it } from 'vitest';

import { MemoryImage, patternBytes } from '../support/image-memory.js';
import { requires } from '../support/requires.js';
import { tempDir, type TempDir } from '../support/tmp.js';

const run = promisify(execFile);
const program = fileURLToPath(new URL('../../bin/b2', import.meta.url));
const MIB = 1024 * 1024;

let directory: TempDir;
let image: MemoryImage;
beforeEach(() => {
  directory = tempDir();
  image = new MemoryImage([
    { length: 3 * MIB, hole: false },
    { length: 30 * MIB, hole: true },
    { length: MIB + 512, hole: false },
  ]);
  writeFileSync(directory.join('disk'), image.content);
});
afterEach(() => directory.remove());

function environment(): NodeJS.ProcessEnv {
  return {
    PATH: process.env['PATH'],
    HOME: directory.path,
    XDG_RUNTIME_DIR: directory.path,
    B2_CONFIG: '/dev/null',
    B2_REPOSITORY: directory.join('repo'),
    B2_KEY_FILE: directory.join('key'),
  };
}

async function b2(...args: readonly string[]): Promise<string> {
  return (await run(program, args, { env: environment() })).stdout;
}

/** Starts serving and resolves to what it says of it. */
async function serve(...args: readonly string[]): Promise<{
  child: ChildProcess;
  line: { uri: string; writable: boolean; sizeBytes: number };
  stop(signal?: NodeJS.Signals): Promise<number | null>;
}> {
  const child = spawn(program, ['serve', 'nbd', ...args, '--json'], {
    env: environment(),
    stdio: ['ignore', 'pipe', 'inherit'],
  });
  directory.onRemove(() => void child.kill('SIGKILL'));
  const ended = once(child, 'exit') as Promise<[number | null]>;
  const line = await Promise.race([
    once(createInterface({ input: child.stdout }), 'line') as Promise<[string]>,
    ended.then(([code]) => Promise.reject(new Error(`b2 ended with ${code}`))),
  ]);
  return {
    child,
    line: JSON.parse(line[0]) as { uri: string; writable: boolean; sizeBytes: number },
    async stop(signal = 'SIGTERM') {
      child.kill(signal);
      return (await ended)[0];
    },
  };
}

requires({ tools: ['qemu-img', 'qemu-io'] }).describe('b2 serve nbd', () => {
  it('serves what was captured, keeps writes in an overlay, and leaves nothing behind', async () => {
    await b2('init');
    await b2('snapshot', directory.join('disk'), '--volume', 'web', '--name', 'first');
    const readOnly = await serve('web');
    expect(readOnly.line).toMatchObject({ sizeBytes: image.sizeBytes, writable: false });
    await run('qemu-img', [
      'compare',
      '-f',
      'raw',
      '-F',
      'raw',
      directory.join('disk'),
      readOnly.line.uri,
    ]);
    expect(await readOnly.stop('SIGINT')).toBe(0);
    expect(readdirSync(directory.path).filter((name) => name.includes('sock'))).toEqual([]);

    // The disk goes on; the overlay stays with its point.
    const changed = Buffer.from(image.content);
    patternBytes(MIB, 77).copy(changed, 5 * MIB);
    writeFileSync(directory.join('disk'), changed);
    await b2('snapshot', directory.join('disk'), '--volume', 'web');
    const overlay = [
      'web',
      '--at',
      'first',
      '--socket',
      directory.join('s'),
      '--overlay',
      directory.join('o'),
    ];
    const first = await serve(...overlay);
    await run('qemu-io', ['-f', 'raw', '-c', 'write -P 7 1M 1M', '-c', 'flush', first.line.uri]);
    await first.stop('SIGKILL');
    const second = await serve(...overlay);
    await run('qemu-img', [
      'convert',
      '-f',
      'raw',
      '-O',
      'raw',
      second.line.uri,
      directory.join('back'),
    ]);
    expect(await second.stop()).toBe(0);
    expect(existsSync(directory.join('s'))).toBe(false);
    const wanted = Buffer.from(image.content);
    wanted.fill(7, MIB, 2 * MIB);
    expect(Buffer.compare(readFileSync(directory.join('back')), wanted)).toBe(0);

    const refused = await run(program, ['serve', 'nbd', 'web', '--overlay', directory.join('o')], {
      env: environment(),
    }).then(
      () => undefined,
      (error: unknown) => error as { code: number; stderr: string },
    );
    expect(refused).toMatchObject({
      code: 1,
      stderr: expect.stringMatching(/lies on another point: on #1 .* not on #2 /u),
    });
  });
});
