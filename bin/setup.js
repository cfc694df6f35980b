// Makes a fresh clone ready to run: npm ci and npm run build, once, under a lock.
//
// The lock is flock(2) through util-linux's flock: the kernel gives it back when its holder dies, so there
// are no stale locks. Run as a program (by flock, from setUp) this file does the work; setUp is what
// bin/b2 calls.
'use strict';

const fs = require('fs');
const path = require('path');
const { spawnSync } = require('child_process');

const LOCK = '.b2-setup.lock';
/** The exit code that says: the reason has been told already. */
const TOLD = 97;

function say(text) {
  process.stderr.write(`b2: ${text}\n`);
}

function giveUp(message, hint) {
  say(message);
  if (hint) process.stderr.write(`    ${hint}\n`);
  process.exit(TOLD);
}

function hasDependencies(root) {
  return fs.existsSync(path.join(root, 'node_modules', '.package-lock.json'));
}

/** The bundle; or what somebody who works on b2 has compiled. */
function hasProgram(root) {
  return ['bundle', 'dist'].some((name) => fs.existsSync(path.join(root, name, 'cli.js')));
}

/** True for a package that npm installed (it has no lock file) and for a clone that has been set up. */
function isReady(root) {
  const isClone = fs.existsSync(path.join(root, 'package-lock.json'));
  return hasProgram(root) && (!isClone || hasDependencies(root));
}

function has(command) {
  const found = spawnSync('sh', ['-c', 'command -v "$1"', 'sh', command], { stdio: 'ignore' });
  return found.status === 0;
}

/** Without what an outer npm (`npm install -g .`) handed down, and with development dependencies. */
function cleanEnvironment() {
  const env = { ...process.env, NODE_ENV: 'development' };
  for (const name of Object.keys(env)) if (/^npm_/i.test(name)) delete env[name];
  return env;
}

/** Runs a command in `root`, keeping what it prints; ends with { ok, output }. */
function quietly(root, command, args) {
  const done = spawnSync(command, args, {
    cwd: root,
    encoding: 'utf8',
    stdio: ['ignore', 'pipe', 'pipe'],
    maxBuffer: 64 * 1024 * 1024,
    env: cleanEnvironment(),
  });
  if (done.error) return { ok: false, output: done.error.message };
  return { ok: done.status === 0, output: `${done.stdout}${done.stderr}` };
}

const NETWORK =
  /ENOTFOUND|EAI_AGAIN|ECONNREFUSED|ECONNRESET|ETIMEDOUT|ENETUNREACH|ERR_SOCKET_TIMEOUT/;
const COMPILER = /gyp ERR!|node-gyp|not found: make|find Python/i;

/** What went wrong stands at the beginning or at the end, with pages of usage or compiler output between. */
function excerpt(output) {
  const lines = output
    .trim()
    .split('\n')
    .filter((line) => !/^npm (warn|error)\s*$|^npm warn|complete log of this run/.test(line));
  const shown = lines.length <= 14 ? lines : [...lines.slice(0, 7), '…', ...lines.slice(-6)];
  return shown.join('\n    ');
}

function installDependencies(root) {
  const args = ['ci', '--include=dev', '--no-audit', '--no-fund', '--loglevel=error'];
  let done = quietly(root, 'npm', args);
  const missing = ['make', 'g++', 'python3'].filter((tool) => !has(tool));
  if (!done.ok && COMPILER.test(done.output) && missing.length > 0) {
    const isRoot = process.geteuid && process.geteuid() === 0;
    if (isRoot && has('apt-get')) {
      say(`sqlite3 has to be compiled here; installing ${missing.join(' ')} with apt-get`);
      const apt = 'apt-get update -qq && apt-get install -y -qq --no-install-recommends "$@"';
      quietly(root, 'sh', [
        '-c',
        `DEBIAN_FRONTEND=noninteractive; export DEBIAN_FRONTEND; ${apt}`,
        'sh',
        ...missing,
      ]);
      done = quietly(root, 'npm', args);
    } else {
      giveUp(
        `npm could not compile sqlite3: ${missing.join(', ')} is missing`,
        `Install it (Debian: sudo apt install ${missing.join(' ')}) and start b2 again.`,
      );
    }
  }
  if (done.ok) return;
  const hint = NETWORK.test(done.output)
    ? 'The package registry cannot be reached; connect this machine and start b2 again.'
    : `The same by hand: cd ${root} && npm ci`;
  giveUp(`npm ci failed in ${root}:\n    ${excerpt(done.output)}`, hint);
}

function build(root) {
  const done = quietly(root, process.execPath, [path.join(root, 'scripts', 'build.mjs')]);
  if (!done.ok) {
    giveUp(
      `the build failed in ${root}:\n    ${excerpt(done.output)}`,
      `The same by hand: cd ${root} && npm run build`,
    );
  }
}

/** Under the lock: whatever another start has done meanwhile is not done again. */
function work(root) {
  if (!hasDependencies(root)) installDependencies(root);
  if (!hasProgram(root)) build(root);
}

/** Sets the clone in `root` up, or ends the process with a message that says why it cannot. */
function setUp(root) {
  try {
    fs.accessSync(root, fs.constants.W_OK);
  } catch (error) {
    say(`b2 in ${root} is not set up yet, and this user may not write there (${error.code})`);
    process.stderr.write(
      '    Start it once as the owner of that directory, or install it: sudo npm install -g .\n',
    );
    process.exit(1);
  }
  for (const [command, hint] of [
    [
      'npm',
      'Install it: Debian has it as "npm" (sudo apt install npm); nodejs.org brings it along.',
    ],
    ['flock', 'Install it: Debian has it in "util-linux".'],
  ]) {
    if (has(command)) continue;
    say(`${command} is missing; the first start in a fresh clone needs it`);
    process.stderr.write(`    ${hint}\n`);
    process.exit(1);
  }
  say(`first start in ${root}: installing packages and building (once, a few minutes)`);
  // -o: the lock is flock's own; npm and the compilers it starts do not inherit it.
  const done = spawnSync(
    'flock',
    ['-o', path.join(root, LOCK), process.execPath, __filename, root],
    { stdio: 'inherit' },
  );
  if (done.status === 0 && hasDependencies(root) && hasProgram(root)) return;
  if (done.status !== TOLD) say(`setting up ${root} did not finish; start b2 again to go on`);
  process.exit(done.signal === 'SIGINT' ? 130 : 1);
}

module.exports = { isReady, setUp };

if (require.main === module) work(process.argv[2]);
