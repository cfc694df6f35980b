/** scripts/setup-system.sh with stand-ins for dpkg-query, apt-get and id: what it installs, says and survives. */
import { spawnSync } from 'node:child_process';
import { existsSync, mkdirSync, readFileSync, rmSync, symlinkSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { afterEach, beforeEach, expect, it } from 'vitest';
import { findTool } from '../support/requires.js';
import { tempDir, type TempDir } from '../support/tmp.js';

const script = fileURLToPath(new URL('../../scripts/setup-system.sh', import.meta.url));

let dir: TempDir;
let bin: string;

function tool(name: string, body: string): void {
  writeFileSync(join(bin, name), `#!/bin/sh\n${body}\n`, { mode: 0o755 });
}

beforeEach(() => {
  dir = tempDir();
  bin = dir.join('bin');
  mkdirSync(bin);
  for (const name of ['sh', 'grep', 'sed', 'tail', 'mktemp', 'rm', 'cat']) {
    symlinkSync(findTool(name) ?? '', join(bin, name));
  }
  tool('id', 'echo 0');
  // Everything but zsh, which is only configured away, and fish, which dpkg has never heard of.
  tool(
    'dpkg-query',
    `shift 3
for p in "$@"; do
  case $p in
    zsh) echo "zsh config-files" ;;
    fish) failed=1 ;;
    *) echo "$p installed" ;;
  esac
done
exit \${failed:-0}`,
  );
});
afterEach(() => dir.remove());

function run(...args: readonly string[]) {
  const done = spawnSync('/bin/sh', [script, ...args], {
    encoding: 'utf8',
    env: { PATH: bin, LOG: dir.join('log') },
  });
  const log = dir.join('log');
  return {
    code: done.status,
    stderr: done.stderr,
    log: existsSync(log) ? readFileSync(log, 'utf8').trim().split('\n') : [],
  };
}

it('is silent and calls nothing when everything is there', () => {
  tool('dpkg-query', 'shift 3; for p in "$@"; do echo "$p installed"; done');
  expect(run()).toEqual({ code: 0, stderr: '', log: [] });
});

it('installs only what is missing, and says so', () => {
  tool('apt-get', 'echo "$*" >> "$LOG"');
  const { code, stderr, log } = run();
  expect(code).toBe(0);
  expect(stderr).toBe('setup-system: installing for the tests: zsh fish\n');
  expect(log).toEqual([expect.stringMatching(/^install -y .* zsh fish$/)]);
});

it('updates the package lists once when the first try fails', () => {
  tool(
    'apt-get',
    'echo "$1" >> "$LOG"; [ "$1" = update ] && touch=1 && : > "$LOG.updated"; [ -e "$LOG.updated" ]',
  );
  expect(run()).toMatchObject({ code: 0, log: ['install', 'update', 'install'] });
});

it('fails with what apt-get said', () => {
  tool('apt-get', 'echo "$1" >> "$LOG"; echo "E: no such package"; exit 100');
  const { code, stderr, log } = run();
  expect(code).toBe(1);
  expect(stderr).toContain('E: no such package');
  expect(log).toEqual(['install', 'update', 'install']);
});

it('names what is missing and goes on without root', () => {
  tool('id', 'echo 1000');
  const { code, stderr, log } = run();
  expect({ code, log }).toEqual({ code: 0, log: [] });
  expect(stderr).toContain('setup-system: missing for the tests: zsh fish');
  expect(stderr).toContain('sudo apt-get install');
});

it('goes on where there is no dpkg', () => {
  rmSync(join(bin, 'dpkg-query'));
  const { code, stderr } = run();
  expect(code).toBe(0);
  expect(stderr).toContain('not a Debian system');
});

it('has a mode for benchmarks, and refuses other words', () => {
  tool('dpkg-query', 'shift 3; for p in "$@"; do [ "$p" = restic ] || echo "$p installed"; done');
  tool('apt-get', 'echo "$*" >> "$LOG"');
  expect(run('--bench').log).toEqual([expect.stringMatching(/ restic$/)]);
  expect(run('--x').code).toBe(2);
});
