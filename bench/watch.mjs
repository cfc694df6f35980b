#!/usr/bin/env node
// b2 watch, the built program, measured: see watch.ts. Compiles it, and runs it with the program of this checkout.
//
// usage: sudo node bench/watch.mjs all|lag|cost|events|soak [--seconds N] [--rounds N] [--minutes N] [--dir DIR] [--json FILE]
import { spawnSync } from 'node:child_process';
import { existsSync } from 'node:fs';
import { dirname, join } from 'node:path';
import { fileURLToPath } from 'node:url';

const root = dirname(dirname(fileURLToPath(import.meta.url)));
const compiled = join(root, 'node_modules/.cache/b2/bench/bench/watch.js');
const done = spawnSync(
  process.execPath,
  [join(root, 'node_modules/typescript/bin/tsc'), '-p', join(root, 'bench')],
  { stdio: 'inherit' },
);
// Other benchmarks are compiled with it: a mistake in one of them stops no other.
if (done.status !== 0 && !existsSync(compiled)) process.exit(1);
process.env.B2_TEST_PROGRAM ??= join(root, 'bin/b2');
await import(compiled);
