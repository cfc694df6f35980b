#!/usr/bin/env node
// `npm test`, from a fresh clone too: system packages, npm ci, build, then the static checks and the three
// test projects. Ends with one line "N passed, N failed, N skipped"; a check counts as a test. With CI=true
// a skipped test is a failure of the run: on that machine everything can be tested.
//
// What does not need each other runs side by side: the static checks while sqlite3 is compiled (one core,
// a minute), the files of all projects in one pool of workers (test/support/sequencer.ts has the order).
//
// usage: npm test [-- STEP…]     STEP: lint unit integration e2e (default: all)
import { spawn } from 'node:child_process';
import {
  closeSync,
  existsSync,
  mkdtempSync,
  openSync,
  readFileSync,
  renameSync,
  rmSync,
  statSync,
  utimesSync,
} from 'node:fs';
import { tmpdir } from 'node:os';
import { dirname, join } from 'node:path';
import { fileURLToPath } from 'node:url';

const root = dirname(dirname(fileURLToPath(import.meta.url)));
const PROJECTS = ['unit', 'integration', 'e2e'];
const STEPS = ['lint', ...PROJECTS];
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

const startedMs = performance.now();

/** A line on stderr, with the seconds since the start. */
function say(text) {
  console.error(`--- ${text} (${Math.round((performance.now() - startedMs) / 1000)} s)`);
}

/** Runs a command to its end; resolves to its exit code, -1 where there is none. */
function run(command, args, { stdio = ['ignore', 2, 2], env = process.env } = {}) {
  return new Promise((resolve) => {
    const child = spawn(command, args, { cwd: root, stdio, env });
    child.once('error', (error) => {
      console.error(error.message);
      resolve(-1);
    });
    child.once('close', (code) => resolve(code ?? -1));
  });
}

/** A step that everything after it needs. `quiet`: what it says is shown only if it fails. */
async function must(what, command, args, { quiet = false, env = process.env } = {}) {
  const dir = mkdtempSync(join(tmpdir(), 'b2-test-log-'));
  const log = join(dir, 'log');
  const fd = quiet ? openSync(log, 'w') : 2;
  const code = await run(command, args, { stdio: ['ignore', fd, fd], env });
  if (quiet) closeSync(fd);
  if (quiet && code !== 0) console.error(readFileSync(log, 'utf8'));
  rmSync(dir, { recursive: true, force: true });
  if (code === 0) return;
  console.error(`FAILED ${what}`);
  total.failed += 1;
  finish();
}

function modifiedMs(path) {
  return existsSync(path) ? statSync(path).mtimeMs : undefined;
}

/** npm's hidden lock file. bin/b2 takes it for the sign that the packages are installed. */
const INSTALLED = join(root, 'node_modules', '.package-lock.json');
const UNBUILT = `${INSTALLED}.unbuilt`;

/** npm writes its hidden lock file last: newer than ours means installed from ours. */
function needsInstall() {
  const installed = modifiedMs(INSTALLED);
  const wanted = modifiedMs(join(root, 'package-lock.json'));
  if (installed === undefined) return true;
  if (wanted === undefined || installed >= wanted) return false;
  // A later checkout of the same file is no reason to compile sqlite3 again.
  const versions = (path) =>
    Object.entries(JSON.parse(readFileSync(path, 'utf8')).packages)
      .filter(([name, entry]) => name !== '' && entry.optional !== true)
      .map(([name, entry]) => `${name}@${entry.version}`);
  const there = new Set(versions(INSTALLED));
  return versions(join(root, 'package-lock.json')).some((entry) => !there.has(entry));
}

/** The packages without their install scripts: what compiles runs beside the build and the static checks. */
async function unpack() {
  const args = ['ci', '--include=dev', '--ignore-scripts', '--no-audit', '--no-fund'];
  await must('npm ci', 'npm', args);
  // Half of an installation must not look like a whole one, to the next run or to b2.
  renameSync(INSTALLED, UNBUILT);
}

/** The install scripts: sqlite3 is compiled where its prebuilt cannot be fetched. */
async function compile() {
  const env = { ...process.env };
  // A machine that is thrown away afterwards measures nothing: half the time to compile, the same code.
  if (isCi) Object.assign(env, { CFLAGS: '-O1', CXXFLAGS: '-O1' });
  await must('npm rebuild', 'npm', ['rebuild'], { quiet: true, env });
  const now = new Date();
  utimesSync(UNBUILT, now, now);
  renameSync(UNBUILT, INSTALLED);
}

/** Which project a test file belongs to. */
function projectOf(file) {
  return PROJECTS.find((project) => file.startsWith(join(root, 'test', project, '/')));
}

/** Runs projects, all their files in one pool; a line for each of them says how it went. */
async function runProjects(projects) {
  const dir = mkdtempSync(join(tmpdir(), 'b2-test-report-'));
  const report = join(dir, 'report.json');
  const vitest = join(root, 'node_modules', 'vitest', 'vitest.mjs');
  say(projects.join(', '));
  const code = await run(
    process.execPath,
    [
      vitest,
      'run',
      ...projects.flatMap((project) => ['--project', project]),
      '--passWithNoTests',
      '--reporter=default',
      '--reporter=json',
      `--outputFile.json=${report}`,
    ],
    { env: { ...process.env, FORCE_COLOR: process.stderr.isTTY ? '1' : '0' } },
  );
  const results = existsSync(report) ? JSON.parse(readFileSync(report, 'utf8')).testResults : [];
  rmSync(dir, { recursive: true, force: true });
  let failed = 0;
  for (const project of projects) {
    const files = results.filter((file) => projectOf(file.name) === project);
    const tests = files.flatMap((file) => file.assertionResults);
    // A file that could not be loaded has no tests, only a failed suite.
    const brokenFiles = files.filter(
      (file) =>
        file.status === 'failed' && file.assertionResults.every((test) => test.status !== 'failed'),
    ).length;
    const counts = {
      passed: tests.filter((test) => test.status === 'passed').length,
      failed: tests.filter((test) => test.status === 'failed').length + brokenFiles,
      skipped: tests.filter((test) => test.status !== 'passed' && test.status !== 'failed').length,
    };
    say(
      `${project}: ${files.length} files, ${counts.passed} passed, ${counts.failed} failed, ${counts.skipped} skipped`,
    );
    if (files.length === 0) console.error(`FAILED ${project}: no test ran`);
    failed += counts.failed;
    add(counts);
    if (files.length === 0) total.failed += 1;
  }
  // An error outside any test (an unhandled rejection) fails the run too.
  if (code !== 0 && failed === 0) total.failed += 1;
}

function add(counts) {
  for (const key of Object.keys(total)) total[key] += counts[key];
}

const install = needsInstall();
if (install) console.error('npm test: installing packages (npm ci)');
await Promise.all([
  must('installing system packages', 'sh', [join(root, 'scripts', 'setup-system.sh')]),
  install ? unpack() : undefined,
]);
const compiled = install ? compile() : undefined;
const builder = join(root, 'scripts', 'build.mjs');
await must('building', process.execPath, install ? [builder, '--no-code'] : [builder]);
if (steps.includes('lint')) {
  say('lint');
  const { lint } = await import('./lint.mjs');
  add(lint());
}
await compiled;
if (install) await must('compiling in advance', process.execPath, [builder, '--code']);
const projects = steps.filter((step) => PROJECTS.includes(step));
if (projects.length > 0) await runProjects(projects);
say('done');
finish();
