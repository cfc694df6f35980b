#!/usr/bin/env node
// Boot time beside the plain image: see boot.ts. Compiles it, and runs it with the program of this checkout.
//
// usage: node bench/boot.mjs [--rounds 3] [--dir DIR]
import { spawnSync } from 'node:child_process';
import { existsSync } from 'node:fs';
import { dirname, join } from 'node:path';
import { fileURLToPath } from 'node:url';

const root = dirname(dirname(fileURLToPath(import.meta.url)));
const compiled = join(root, 'node_modules/.cache/b2/bench/bench/boot.js');
const done = spawnSync(
  process.execPath,
  [join(root, 'node_modules/typescript/bin/tsc'), '-p', join(root, 'bench')],
  { stdio: 'inherit' },
);
// Other benchmarks are compiled with it: a mistake in one of them stops no other.
if (done.status !== 0 && !existsSync(compiled)) process.exit(1);
process.env.B2_TEST_PROGRAM ??= join(root, 'bin/b2');
await import(compiled);
