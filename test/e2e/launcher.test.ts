/**
 * bin/b2 in fresh clones. The clones are small stand-ins (their npm and build are scripts of the test), so
 * that every way to fail can be tried in seconds; the real npm ci and build are what `npm test` itself ran.
 */
import { spawn, spawnSync, type ChildProcess } from 'node:child_process';
import {
  chmodSync,
  cpSync,
  existsSync,
  mkdirSync,
  readFileSync,
  symlinkSync,
  writeFileSync,
} from 'node:fs';
import { once } from 'node:events';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { afterEach, beforeEach, describe, expect, it, vi } from 'vitest';
import { findTool, requires } from '../support/requires.js';
import { tempDir, type TempDir } from '../support/tmp.js';

const root = fileURLToPath(new URL('../../', import.meta.url));

let dir: TempDir;
let clone: string;
let fakePath: string;

/** A shell script in the directory that is $PATH for the launcher. */
function tool(name: string, script: string): void {
  writeFileSync(join(fakePath, name), `#!/bin/sh\n${script}\n`, { mode: 0o755 });
}

function logged(): readonly string[] {
  const log = dir.join('log');
  return existsSync(log) ? readFileSync(log, 'utf8').trim().split('\n') : [];
}

const GOOD_NPM = `echo "npm $*" >> "$LOG"; sleep 0.3; mkdir -p node_modules; echo {} > node_modules/.package-lock.json`;

beforeEach(() => {
  dir = tempDir();
  chmodSync(dir.path, 0o755);
  clone = dir.join('clone');
  fakePath = dir.join('path');
  mkdirSync(join(clone, 'scripts'), { recursive: true });
  mkdirSync(fakePath);
  cpSync(join(root, 'bin'), join(clone, 'bin'), { recursive: true });
  writeFileSync(join(clone, 'package.json'), '{"type":"module"}');
  writeFileSync(join(clone, 'package-lock.json'), '{}');
  writeFileSync(
    join(clone, 'scripts/build.mjs'),
    `import { appendFileSync, mkdirSync, writeFileSync } from 'node:fs';
appendFileSync(process.env.LOG, 'build\\n');
if (process.env.BUILD_FAILS) { console.error('src/x.ts: error TS1'); process.exit(2); }
mkdirSync('dist');
writeFileSync('dist/cli.js', 'export function runProcess() { console.log("ran", ...process.argv.slice(2)); }');`,
  );
  for (const name of ['flock', 'sh', 'sleep', 'mkdir'])
    symlinkSync(findTool(name) ?? '', join(fakePath, name));
  symlinkSync(process.execPath, join(fakePath, 'node'));
  tool('npm', GOOD_NPM);
});
afterEach(() => dir.remove());

function environment(more: Readonly<Record<string, string>> = {}) {
  return { PATH: fakePath, LOG: dir.join('log'), ...more };
}

function start(
  args: readonly string[] = ['x'],
  more?: Readonly<Record<string, string>>,
  program = join(clone, 'bin/b2'),
) {
  const done = spawnSync(program, args, {
    env: environment(more),
    encoding: 'utf8',
    timeout: 60_000,
  });
  return { code: done.status, stdout: done.stdout, stderr: done.stderr };
}

function startInBackground(): ChildProcess {
  return spawn(join(clone, 'bin/b2'), ['x'], {
    env: environment(),
    stdio: 'ignore',
    detached: true,
  });
}

describe('a fresh clone', () => {
  it('sets itself up once, with one line saying so', () => {
    const first = start(['a', '--b']);
    expect(first).toMatchObject({ code: 0, stdout: 'ran a --b\n' });
    expect(first.stderr).toMatch(
      /^b2: first start in .*clone: installing packages and building \(once, .*\n$/,
    );
    expect(logged()).toEqual([expect.stringMatching(/^npm ci /), 'build']);
    expect(start()).toEqual({ code: 0, stdout: 'ran x\n', stderr: '' });
    expect(logged()).toHaveLength(2);
  });

  it('works through a symbolic link', () => {
    symlinkSync('clone/bin/b2', dir.join('b2'));
    expect(start(['x'], {}, dir.join('b2'))).toMatchObject({ code: 0, stdout: 'ran x\n' });
  });

  it('is set up once by several starts at the same moment', async () => {
    const children = [1, 2, 3, 4].map(() => startInBackground());
    const codes = await Promise.all(
      children.map(async (child) => (await once(child, 'exit'))[0] as unknown),
    );
    expect(codes).toEqual([0, 0, 0, 0]);
    expect(logged()).toHaveLength(2);
  });

  it('goes on where a killed start left off', async () => {
    tool('npm', `echo npm >> "$LOG"; mkdir -p node_modules; exec sleep 60`);
    const child = startInBackground();
    await vi.waitFor(() => expect(logged()).toEqual(['npm']), { timeout: 20_000 });
    // The whole process group: start, flock, setup and npm.
    process.kill(-(child.pid ?? 0), 'SIGKILL');
    await once(child, 'exit');
    tool('npm', GOOD_NPM);
    expect(start()).toMatchObject({ code: 0, stdout: 'ran x\n' });
  });

  it('builds again when only dist is gone, and installs again when only node_modules is', () => {
    start();
    spawnSync('rm', ['-r', join(clone, 'dist')]);
    expect(start()).toMatchObject({ code: 0 });
    expect(logged().slice(2)).toEqual(['build']);
    spawnSync('rm', ['-r', join(clone, 'node_modules')]);
    expect(start()).toMatchObject({ code: 0 });
    expect(logged().slice(3)).toEqual([expect.stringMatching(/^npm ci/)]);
  });
});

describe('what goes wrong is said', () => {
  it('npm is missing', () => {
    spawnSync('rm', [join(fakePath, 'npm')]);
    expect(start()).toEqual({
      code: 1,
      stdout: '',
      stderr: expect.stringMatching(/^b2: npm is missing; .*\n {4}Install it: .*\n$/),
    });
  });

  it('no network; the next start tries again', () => {
    tool(
      'npm',
      'echo "npm error code ENOTFOUND" >&2; echo "npm error network request to x failed" >&2; exit 1',
    );
    const failed = start();
    expect(failed.code).toBe(1);
    expect(failed.stderr).toContain('b2: npm ci failed in');
    expect(failed.stderr).toContain('network request to x failed');
    expect(failed.stderr).toContain('registry cannot be reached');
    tool('npm', GOOD_NPM);
    expect(start()).toMatchObject({ code: 0, stdout: 'ran x\n' });
  });

  it('the build fails', () => {
    const failed = start(['x'], { BUILD_FAILS: '1' });
    expect(failed).toMatchObject({ code: 1, stdout: '' });
    expect(failed.stderr).toContain('src/x.ts: error TS1');
    expect(failed.stderr).toContain('npm run build');
  });

  it('Node.js is too old', () => {
    writeFileSync(
      dir.join('old.cjs'),
      `Object.defineProperty(process, 'versions', { value: { node: '18.19.0' } });`,
    );
    expect(start(['x'], { NODE_OPTIONS: `--require ${dir.join('old.cjs')}` })).toEqual({
      code: 1,
      stdout: '',
      stderr: expect.stringMatching(
        /^b2: Node.js 18\.19\.0 is too old; b2 needs 20\.19 or newer\n/,
      ),
    });
  });

  it('the program cannot be loaded', () => {
    start();
    writeFileSync(join(clone, 'dist/cli.js'), "import 'no-such-package';");
    const failed = start();
    expect(failed).toMatchObject({ code: 1, stdout: '' });
    expect(failed.stderr).toMatch(
      /^b2: the program cannot be loaded: .*no-such-package.*\n {4}Set it up again: /,
    );
  });

  requires({ root: true }).it('the directory may not be written', () => {
    const done = spawnSync(join(clone, 'bin/b2'), ['x'], {
      env: environment(),
      encoding: 'utf8',
      uid: 65_534,
      gid: 65_534,
    });
    expect(done.status).toBe(1);
    expect(done.stderr).toMatch(
      /^b2: b2 in .* is not set up yet, and this user may not write there \(EACCES\)\n/,
    );
    expect(logged()).toEqual([]);
  });
});

describe('npm install -g .', () => {
  requires({ tools: ['npm'] }).it('links a command that works', () => {
    const prefix = dir.join('prefix');
    const env = { ...process.env, npm_config_cache: dir.join('cache') };
    const npm = spawnSync(
      'npm',
      ['install', '-g', '--prefix', prefix, '--no-audit', '--no-fund', '.'],
      {
        cwd: root,
        encoding: 'utf8',
        env,
      },
    );
    expect(npm.status, npm.stderr).toBe(0);
    const b2 = spawnSync(join(prefix, 'bin/b2'), ['--version'], { encoding: 'utf8', env });
    expect(b2).toMatchObject({ status: 0, stderr: '' });
    expect(b2.stdout).toMatch(/^\d+\.\d+\.\d+\n$/);
  });
});
