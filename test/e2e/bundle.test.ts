/**
 * The bundle that bin/b2 runs (scripts/bundle.mjs), and the compiled code beside it (scripts/code-cache.mjs, bin/load.js): in a copy,
 * so that it can be damaged.
 */
import { spawnSync } from 'node:child_process';
import {
  cpSync,
  existsSync,
  mkdirSync,
  readFileSync,
  readdirSync,
  rmSync,
  statSync,
  symlinkSync,
  truncateSync,
  utimesSync,
  writeFileSync,
} from 'node:fs';
import { createRequire } from 'node:module';
import { basename, join, relative } from 'node:path';
import { fileURLToPath } from 'node:url';
import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import { tempDir, type TempDir } from '../support/tmp.js';

const root = fileURLToPath(new URL('../../', import.meta.url));
const { codeCacheOf } = createRequire(import.meta.url)('../../bin/load.js') as {
  codeCacheOf: (bundle: string) => string;
};
/** This Node.js keeps compiled code itself. */
const hasOwnCache = 'enableCompileCache' in createRequire(import.meta.url)('node:module');

let dir: TempDir;
let copy: string;

beforeEach(() => {
  dir = tempDir();
  copy = dir.join('b2');
  mkdirSync(copy);
  for (const name of ['bin', 'bundle', 'package.json'])
    cpSync(join(root, name), join(copy, name), { recursive: true, preserveTimestamps: true });
  symlinkSync(join(root, 'node_modules'), join(copy, 'node_modules'));
});
afterEach(() => dir.remove());

function run(args: readonly string[], nodeOptions: readonly string[] = []): string {
  const done = spawnSync(process.execPath, [...nodeOptions, join(copy, 'bin/b2'), ...args], {
    encoding: 'utf8',
    env: { PATH: process.env['PATH'], HOME: dir.path },
  });
  return `${done.signal ?? done.status} ${done.stdout}${done.stderr}`;
}

/** A command that loads much of the program, and what it says. */
const ARGS = ['--repo', '/nonexistent', 'serve', 'nbd', 'x', '--socket', '/nonexistent/s'];
const SAID = /^10 b2: there is no repository at \/nonexistent/;

function codeFiles(): string[] {
  const cache = codeCacheOf(join(copy, 'bundle'));
  return (existsSync(cache) ? readdirSync(cache) : []).map((name) => join(cache, name));
}

function modulesBelow(at: string): string[] {
  return readdirSync(at, { recursive: true, encoding: 'utf8' })
    .filter((name) => /\.tsx?$/.test(name))
    .map((name) => join(at, name));
}

describe('the bundle', () => {
  it('has a file for everything that the sources start as one', async () => {
    const { STARTED } = (await import(join(root, 'scripts/bundle.mjs'))) as {
      STARTED: readonly string[];
    };
    const src = join(root, 'src');
    const started = modulesBelow(src).flatMap((file) =>
      [...readFileSync(file, 'utf8').matchAll(/new URL\('(\.\/[^']+)\.js', import\.meta\.url\)/g)]
        .filter(([match]) => !match.includes('x-worker'))
        .map(([, name]) => relative(src, join(file, '..', name ?? ''))),
    );
    expect(started.length).toBeGreaterThan(5);
    expect([...STARTED].sort()).toEqual([...new Set(started)].sort());
    for (const name of STARTED) expect(existsSync(join(copy, 'bundle', `${name}.js`))).toBe(true);
  });

  it('is strict as the modules are, and imports only through bin/load.js', () => {
    const chunks = readdirSync(join(copy, 'bundle/chunks'));
    expect(chunks.length).toBeGreaterThan(30);
    for (const name of chunks) {
      const text = readFileSync(join(copy, 'bundle/chunks', name), 'utf8');
      expect(text.startsWith("'use strict';\n")).toBe(true);
      expect(text).not.toMatch(/\bimport\.meta\b|^\s*[^*/\s].*\bimport\(/m);
    }
  });

  it('runs, and gives way to modules that were compiled after it', () => {
    const version = (
      JSON.parse(readFileSync(join(root, 'package.json'), 'utf8')) as { version: string }
    ).version;
    expect(run(['--version'])).toBe(`0 ${version}\n`);
    mkdirSync(join(copy, 'dist'));
    const compiled = join(copy, 'dist/cli.js');
    writeFileSync(compiled, 'export function runProcess() { console.log("compiled"); }');
    expect(run(['--version'])).toBe('0 compiled\n');
    const { mtimeMs } = statSync(join(copy, 'bundle/cli.js'));
    utimesSync(compiled, mtimeMs / 1000 - 1, mtimeMs / 1000 - 1);
    expect(run(['--version'])).toBe(`0 ${version}\n`);
  });

  it('says what cannot be loaded', () => {
    const broken = readdirSync(join(copy, 'bundle/chunks')).find((name) => name.startsWith('cli-'));
    const file = join(copy, 'bundle/chunks', broken ?? '');
    rmSync(codeCacheOf(join(copy, 'bundle')), { recursive: true, force: true });
    mkdirSync(codeCacheOf(join(copy, 'bundle')), { recursive: true });
    const text = readFileSync(file, 'utf8');
    writeFileSync(file, text.replace('function helpTail(', 'null.x;\nfunction helpTail('));
    expect(run(['--version'])).toMatch(
      /^1 b2: the program cannot be loaded: Cannot read properties/,
    );
  });
});

describe('compiled code', () => {
  it('is there for this Node.js, and taken, unless that keeps its own', () => {
    if (hasOwnCache) {
      expect(codeFiles()).toEqual([]);
      return;
    }
    expect(codeFiles().length).toBeGreaterThan(10);
    const chunks = readdirSync(join(copy, 'bundle/chunks'));
    for (const file of codeFiles()) expect(chunks).toContain(basename(file, '.bin'));
    writeFileSync(
      dir.join('taken.cjs'),
      `const { scripts } = require(${JSON.stringify(join(copy, 'bin/load.js'))});
       require(${JSON.stringify(join(copy, 'bundle/cli.js'))});
       console.log(JSON.stringify([...scripts].map(([, script]) => script.cachedDataRejected)));`,
    );
    const done = spawnSync(process.execPath, [dir.join('taken.cjs')], { encoding: 'utf8' });
    const rejected = JSON.parse(done.stdout) as readonly (boolean | undefined)[];
    expect(rejected.length).toBeGreaterThan(1);
    expect(new Set(rejected)).toEqual(new Set([false]));
  });

  it('is not needed, and not believed where it is not whole or does not fit', () => {
    expect(run(ARGS)).toMatch(SAID);
    expect(run(ARGS, ['--stack-size=1000'])).toMatch(SAID);
    for (const file of codeFiles()) {
      const code = readFileSync(file);
      for (let at = 16; at < code.length; at += 512) code[at] = (code[at] ?? 0) ^ 0x55;
      writeFileSync(file, code);
    }
    expect(run(ARGS)).toMatch(SAID);
    for (const file of codeFiles()) truncateSync(file, 1000);
    expect(run(ARGS)).toMatch(SAID);
    for (const file of codeFiles()) truncateSync(file, 0);
    expect(run(ARGS)).toMatch(SAID);
    for (const file of codeFiles()) rmSync(file);
    expect(run(ARGS)).toMatch(SAID);
    rmSync(join(copy, 'bundle/code'), { recursive: true, force: true });
    expect(run(ARGS)).toMatch(SAID);
  });
});
