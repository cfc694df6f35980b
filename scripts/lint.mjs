#!/usr/bin/env node
// All static checks; each is one line of the summary of `npm test` as well. Needs the built program for
// the man pages. Shell scripts are checked where shellcheck is installed.
//
// usage: lint.mjs [name…]     (types types-test oxlint layers format lock man shell)
import { spawnSync } from 'node:child_process';
import { existsSync } from 'node:fs';
import { dirname, join } from 'node:path';
import { fileURLToPath } from 'node:url';

const root = dirname(dirname(fileURLToPath(import.meta.url)));
const bin = (name) => join(root, 'node_modules', '.bin', name);
const node = (script, ...args) => [process.execPath, join(root, 'scripts', script), ...args];

const SHELL_SCRIPTS = [
  'scripts/setup-system.sh',
  '.ci/run',
  ...['build-image.sh', 'run-in-vm.sh', 'watch-systemd.sh', 'watch-systemd.guest.sh'].map(
    (name) => `test/lab/${name}`,
  ),
  ...['customize.sh', 'initrd-init', 'lab-job', 'lab-reboot'].map((n) => `test/lab/guest/${n}`),
];

const CHECKS = {
  types: [bin('tsc'), '-p', root, '--noEmit'],
  'types-test': [bin('tsc'), '-p', join(root, 'test')],
  oxlint: [bin('oxlint'), '--deny-warnings'],
  layers: node('check-layers.mjs'),
  format: [bin('prettier'), '--check', '--log-level', 'warn', '.'],
  lock: node('check-lock.mjs'),
  man: node('gen-man.mjs', '--check'),
  shell: ['shellcheck', ...SHELL_SCRIPTS],
};

/** Runs the named checks (all without a name), showing what the failing ones say. */
export function lint(names = Object.keys(CHECKS)) {
  const result = { passed: 0, failed: 0, skipped: 0 };
  for (const name of names) {
    const [command, ...args] = CHECKS[name] ?? [];
    if (command === undefined) throw new Error(`no such check: ${name}`);
    if (name === 'man' && !existsSync(join(root, 'dist', 'cli.js'))) {
      console.error('man: build first (npm run build)');
      result.failed += 1;
      continue;
    }
    const done = spawnSync(command, args, { cwd: root, encoding: 'utf8', maxBuffer: 2 ** 26 });
    if (done.error?.code === 'ENOENT' && name === 'shell') {
      console.error('SKIPPED shell: shellcheck is not installed');
      result.skipped += 1;
    } else if (done.status === 0) {
      console.error(`ok ${name}`);
      result.passed += 1;
    } else {
      console.error(
        `${done.stdout ?? ''}${done.stderr ?? ''}${done.error?.message ?? ''}`.trimEnd(),
      );
      console.error(`FAILED ${name}`);
      result.failed += 1;
    }
  }
  return result;
}

if (process.argv[1] === fileURLToPath(import.meta.url)) {
  const names = process.argv.slice(2);
  const { failed } = lint(names.length === 0 ? undefined : names);
  process.exitCode = failed === 0 ? 0 : 1;
}
