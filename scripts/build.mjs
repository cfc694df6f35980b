#!/usr/bin/env node
// Compiles src/ into dist/ and bundles that into bundle/, which is what bin/b2 runs. Either appears whole or not at all: a b2 that
// starts meanwhile must never see half of it.
//
//   usage: build.mjs [--no-code | --code]    --no-code: without what V8 compiles in advance, for which all packages must be in place;
//                                            --code: only that, for the bundle that is there
import { spawnSync } from 'node:child_process';
import { existsSync, renameSync, rmSync, readdirSync } from 'node:fs';
import nodeModule, { createRequire } from 'node:module';
import { dirname, join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { bundle } from './bundle.mjs';

const root = dirname(dirname(fileURLToPath(import.meta.url)));
const fresh = (name) => join(root, `${name}.new-${process.pid}`);
const old = (name) => join(root, `${name}.old-${process.pid}`);

const isAlive = (pid) => {
  try {
    process.kill(pid, 0);
    return true;
  } catch (error) {
    return error.code === 'EPERM';
  }
};
for (const name of readdirSync(root)) {
  const pid = /^(?:dist|bundle)\.(?:new|old)-(\d+)$/.exec(name)?.[1];
  if (pid !== undefined && !isAlive(Number(pid)))
    rmSync(join(root, name), { recursive: true, force: true });
}

/** Puts the fresh directory in its place. */
function replace(name) {
  const place = join(root, name);
  if (existsSync(place)) renameSync(place, old(name));
  renameSync(fresh(name), place);
  rmSync(old(name), { recursive: true, force: true });
}

function give(code) {
  for (const name of ['dist', 'bundle']) rmSync(fresh(name), { recursive: true, force: true });
  process.exit(code);
}

const require = createRequire(join(root, 'package.json'));
const tsc = join(dirname(require.resolve('typescript/package.json')), 'bin', 'tsc');
const run = (args, timeout) =>
  spawnSync(process.execPath, args, { stdio: 'inherit', timeout }).status ?? 1;
/** Compiling in advance takes two seconds, and nothing is lost without. */
const CODE_CACHE_MS = 120_000;

/** Leaves compiled code beside a bundle. Only for speed, and only for a Node.js that does not do that itself. */
function compileAhead(bundled) {
  if (nodeModule.enableCompileCache !== undefined) return;
  if (run([join(root, 'scripts', 'code-cache.mjs'), bundled], CODE_CACHE_MS) === 0) return;
  console.error('build: the code could not be compiled in advance; b2 will start slower');
  rmSync(join(bundled, 'code'), { recursive: true, force: true });
}

if (process.argv.includes('--code')) {
  compileAhead(join(root, 'bundle'));
  process.exit(0);
}
const compiled = run([tsc, '-p', root, '--outDir', fresh('dist')]);
if (compiled !== 0) give(compiled);
try {
  await bundle(fresh('dist'), fresh('bundle'));
} catch (error) {
  console.error(error.message);
  give(1);
}
if (!process.argv.includes('--no-code')) compileAhead(fresh('bundle'));
replace('dist');
replace('bundle');
