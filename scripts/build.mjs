#!/usr/bin/env node
// Compiles src/ into dist/. The new dist/ appears whole or not at all: a b2 that starts meanwhile must
// never see half of it.
import { spawnSync } from 'node:child_process';
import { existsSync, renameSync, rmSync, readdirSync } from 'node:fs';
import { createRequire } from 'node:module';
import { dirname, join } from 'node:path';
import { fileURLToPath } from 'node:url';

const root = dirname(dirname(fileURLToPath(import.meta.url)));
const fresh = join(root, `dist.new-${process.pid}`);
const old = join(root, `dist.old-${process.pid}`);
const dist = join(root, 'dist');

const isAlive = (pid) => {
  try {
    process.kill(pid, 0);
    return true;
  } catch (error) {
    return error.code === 'EPERM';
  }
};
for (const name of readdirSync(root)) {
  const pid = /^dist\.(?:new|old)-(\d+)$/.exec(name)?.[1];
  if (pid !== undefined && !isAlive(Number(pid)))
    rmSync(join(root, name), { recursive: true, force: true });
}

const require = createRequire(join(root, 'package.json'));
const tsc = join(dirname(require.resolve('typescript/package.json')), 'bin', 'tsc');
const done = spawnSync(process.execPath, [tsc, '-p', root, '--outDir', fresh], {
  stdio: 'inherit',
});
if (done.status !== 0) {
  rmSync(fresh, { recursive: true, force: true });
  process.exit(done.status ?? 1);
}
if (existsSync(dist)) renameSync(dist, old);
renameSync(fresh, dist);
rmSync(old, { recursive: true, force: true });
