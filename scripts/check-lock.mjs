#!/usr/bin/env node
// Checks package-lock.json: it names no addresses (any registry will do), and it lists every platform's
// optional packages. npm leaves out those that a registry mirror does not serve, and `npm ci` then refuses
// the lock file everywhere else. --fix adds them, from the names that their parents give.
import { readFileSync, writeFileSync } from 'node:fs';
import { dirname, join } from 'node:path';
import { fileURLToPath } from 'node:url';

const path = join(dirname(dirname(fileURLToPath(import.meta.url))), 'package-lock.json');
const lock = JSON.parse(readFileSync(path, 'utf8'));
const SYSTEMS = [
  'aix',
  'android',
  'darwin',
  'freebsd',
  'linux',
  'netbsd',
  'openbsd',
  'openharmony',
  'sunos',
  'win32',
];
const CPUS = [
  'arm',
  'arm64',
  'ia32',
  'loong64',
  'mips64el',
  'ppc64',
  's390x',
  'riscv64',
  'wasm32',
  'x64',
];

const problems = [];
const missing = {};
for (const [at, entry] of Object.entries(lock.packages)) {
  if (entry.resolved !== undefined) problems.push(`${at} has an address: ${entry.resolved}`);
  for (const [name, version] of Object.entries(entry.optionalDependencies ?? {})) {
    const key = `node_modules/${name}`;
    if (lock.packages[key] !== undefined || lock.packages[`${at}/${key}`] !== undefined) continue;
    const words = name.split('/').at(-1).split('-');
    const os = SYSTEMS.find((word) => words.includes(word));
    const cpu = CPUS.find((word) => words.includes(word));
    if (os === undefined || cpu === undefined || !/^\d+\.\d+\.\d+$/.test(version)) {
      problems.push(`${name}@${version} (for ${at}) is missing and not a package of one platform`);
      continue;
    }
    const libc = words.includes('musl') ? ['musl'] : words.includes('gnu') ? ['glibc'] : undefined;
    missing[key] = {
      version,
      cpu: [cpu],
      ...(entry.dev === true ? { dev: true } : {}),
      ...(libc === undefined ? {} : { libc }),
      optional: true,
      os: [os],
    };
  }
}
if (process.argv.includes('--fix')) {
  const packages = Object.entries({ ...lock.packages, ...missing });
  lock.packages = Object.fromEntries(packages.sort(([a], [b]) => (a < b ? -1 : 1)));
  writeFileSync(path, `${JSON.stringify(lock, null, 2)}\n`);
} else {
  for (const key of Object.keys(missing))
    problems.push(`${key} is missing (node scripts/check-lock.mjs --fix)`);
}
for (const problem of problems) console.error(`package-lock.json: ${problem}`);
process.exitCode = problems.length === 0 ? 0 : 1;
