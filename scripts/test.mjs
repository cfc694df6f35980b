#!/usr/bin/env node
// `npm test`, from a fresh clone too: system packages, npm ci, build, then the static checks and the three
// test projects. Ends with one line "N passed, N failed, N skipped"; a check counts as a test. With CI=true
// a skipped test is a failure of the run: on that machine everything can be tested.
//
// usage: npm test [-- STEP…]     STEP: lint unit integration e2e (default: all)
import { spawnSync } from 'node:child_process';
import { existsSync, mkdtempSync, readFileSync, rmSync, statSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { dirname, join } from 'node:path';
import { fileURLToPath } from 'node:url';

const root = dirname(dirname(fileURLToPath(import.meta.url)));
const STEPS = ['lint', 'unit', 'integration', 'e2e'];
const isCi = process.env['CI'] === 'true' || process.env['CI'] === '1';

const asked = process.argv.slice(2);
const unknown = asked.find((step) => !STEPS.includes(step));
if (unknown !== undefined) {
  console.error(`npm test: no such step: ${unknown} (there are ${STEPS.join(', ')})`);
  process.exit(2);
}
const steps = asked.length === 0 ? STEPS : STEPS.filter((step) => asked.includes(step));

const total = { passed: 0, failed: 0, skipped: 0 };

/** The closing line, alone on the last line of stdout; the exit code agrees with it. */
function finish() {
  const isBad = total.failed > 0 || (isCi && total.skipped > 0) || total.passed === 0;
  if (isCi && total.skipped > 0) console.error('CI: a skipped test is a failure');
  console.log(`${total.passed} passed, ${total.failed} failed, ${total.skipped} skipped`);
  process.exit(isBad ? 1 : 0);
}

/** A step that everything after it needs. */
function must(what, command, args) {
  const done = spawnSync(command, args, { cwd: root, stdio: ['ignore', 2, 2] });
  if (done.status === 0) return;
  console.error(`FAILED ${what}${done.error === undefined ? '' : `: ${done.error.message}`}`);
  total.failed += 1;
  finish();
}

function modifiedMs(path) {
  return existsSync(path) ? statSync(path).mtimeMs : undefined;
}

/** npm writes its hidden lock file last: newer than ours means installed from ours. */
function needsInstall() {
  const installed = modifiedMs(join(root, 'node_modules', '.package-lock.json'));
  const wanted = modifiedMs(join(root, 'package-lock.json'));
  if (installed === undefined) return true;
  if (wanted === undefined || installed >= wanted) return false;
  // A later checkout of the same file is no reason to compile sqlite3 again.
  const versions = (path) =>
    Object.entries(JSON.parse(readFileSync(path, 'utf8')).packages)
      .filter(([name, entry]) => name !== '' && entry.optional !== true)
      .map(([name, entry]) => `${name}@${entry.version}`);
  const there = new Set(versions(join(root, 'node_modules', '.package-lock.json')));
  return versions(join(root, 'package-lock.json')).some((entry) => !there.has(entry));
}

function runProject(project) {
  const dir = mkdtempSync(join(tmpdir(), 'b2-test-report-'));
  const report = join(dir, 'report.json');
  const vitest = join(root, 'node_modules', 'vitest', 'vitest.mjs');
  console.error(`--- ${project}`);
  const done = spawnSync(
    process.execPath,
    [
      vitest,
      'run',
      '--project',
      project,
      '--passWithNoTests',
      '--reporter=default',
      '--reporter=json',
      `--outputFile.json=${report}`,
    ],
    {
      cwd: root,
      stdio: ['ignore', 2, 2],
      env: { ...process.env, FORCE_COLOR: process.stderr.isTTY ? '1' : '0' },
    },
  );
  let counts = { passed: 0, failed: 0, skipped: 0 };
  if (existsSync(report)) {
    const parsed = JSON.parse(readFileSync(report, 'utf8'));
    // A file that could not be loaded has no tests, only a failed suite.
    const brokenFiles = parsed.testResults.filter(
      (file) =>
        file.status === 'failed' && file.assertionResults.every((test) => test.status !== 'failed'),
    ).length;
    counts = {
      passed: parsed.numPassedTests,
      failed: parsed.numFailedTests + brokenFiles,
      skipped: parsed.numPendingTests + (parsed.numTodoTests ?? 0),
    };
  }
  // An error outside any test (an unhandled rejection) fails the run too.
  if (done.status !== 0 && counts.failed === 0) counts.failed = 1;
  rmSync(dir, { recursive: true, force: true });
  return counts;
}

function add(counts) {
  for (const key of Object.keys(total)) total[key] += counts[key];
}

must('installing system packages', 'sh', [join(root, 'scripts', 'setup-system.sh')]);
if (needsInstall()) {
  console.error('npm test: installing packages (npm ci)');
  must('npm ci', 'npm', ['ci', '--include=dev', '--no-audit', '--no-fund']);
}
must('building', process.execPath, [join(root, 'scripts', 'build.mjs')]);
for (const step of steps) {
  if (step === 'lint') {
    const { lint } = await import('./lint.mjs');
    add(lint());
  } else {
    add(runProject(step));
  }
}
finish();
