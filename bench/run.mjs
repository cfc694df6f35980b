#!/usr/bin/env node
/**
 * Measures b2 against restic, borg, casync and what C programs need, on the same image, in rounds.
 *
 *   npm run bench -- [--size MIB] [--rounds N] [--cold] [--only REGEX] [--dir DIR] [--no-build]
 *                    [--json | --markdown]
 *   npm run bench -- --from RESULT.json [--json | --markdown]     (only shows earlier results)
 *
 * In every round each tool in turn (which goes first changes) makes a repository and does every operation; a
 * run includes the sync of what it wrote. Every restored image is compared with the original. Ratios are
 * formed within a round. The image is kept in DIR (/var/tmp/b2-bench), everything else is removed. --cold
 * (or COLD=1, as root) drops the page cache before each run.
 *
 * The table goes to stdout, progress to stderr. Exit status 1: b2 failed, or a restored image differs;
 * times never matter for it.
 */
import { spawnSync } from 'node:child_process';
import { mkdirSync, mkdtempSync, readFileSync, rmSync, statfsSync, statSync } from 'node:fs';
import os from 'node:os';
import path from 'node:path';
import { fileURLToPath } from 'node:url';
import { parseArgs } from 'node:util';
import { changeOnePercent, prepareImage } from './image.mjs';
import { CommandFailed, cleanUpOnSignals, diskBytes, measure, onExit, sh } from './measure.mjs';
import { asMarkdown, asText, compare } from './report.mjs';
import { OPERATIONS, PARTS, READ_TARGET, TOOLS, WARM } from './tools.mjs';

const ROOT = path.dirname(path.dirname(fileURLToPath(import.meta.url)));
const B2 = path.join(ROOT, 'bin', 'b2');
const MIB = 2 ** 20;

const say = (text) => process.stderr.write(`${text}\n`);

/** A wrong command line, or a machine on which the benchmark cannot run: one line, no stack. */
class Unusable extends Error {}

function readOptions() {
  const { values } = parseArgs({
    options: {
      size: { type: 'string', default: '4096' },
      rounds: { type: 'string', default: '3' },
      dir: { type: 'string', default: '/var/tmp/b2-bench' },
      only: { type: 'string', default: '' },
      from: { type: 'string' },
      cold: { type: 'boolean', default: process.env.COLD === '1' },
      'no-build': { type: 'boolean', default: false },
      json: { type: 'boolean', default: false },
      markdown: { type: 'boolean', default: false },
    },
  });
  const count = (name) => {
    const value = Number(values[name]);
    if (!Number.isSafeInteger(value) || value < 1)
      throw new Unusable(`--${name}: "${values[name]}" is not a whole number above 0`);
    return value;
  };
  return {
    ...values,
    only: new RegExp(values.only),
    sizeMiB: count('size'),
    rounds: count('rounds'),
  };
}

function output(command, ...args) {
  const { stdout, status } = spawnSync(command, args, { encoding: 'utf8' });
  return status === 0 ? (stdout.trim().split('\n')[0] ?? '') : '';
}

const VERSION_COMMANDS = {
  b2: [B2, '--version'],
  restic: ['restic', 'version'],
  borg: ['borg', '--version'],
  casync: ['casync', '--version'],
  b3sum: ['b3sum', '--version'],
  lz4: ['lz4', '--version'],
  openssl: ['openssl', 'version'],
};

/** Versions of the programs that are there. */
function readVersions() {
  const versions = { node: process.versions.node };
  for (const [name, command] of Object.entries(VERSION_COMMANDS)) {
    const text = output(...command);
    const version = /\d+\.\d+[\w.]*/.exec(text) ?? /\b\d+$/.exec(text);
    if (version !== null) versions[name] = version[0];
  }
  const commit = output('git', '-C', ROOT, 'describe', '--always', '--dirty');
  if (commit !== '') versions.commit = commit;
  return versions;
}

const load = () => os.loadavg()[0].toFixed(2);

function describeMachine(dir) {
  return {
    cpu: os.cpus()[0]?.model.trim() ?? 'unknown CPU',
    cores: os.availableParallelism(),
    memoryGiB: Math.round(os.totalmem() / 2 ** 30),
    kernel: os.release(),
    fileSystem: output('findmnt', '-n', '-o', 'FSTYPE', '-T', dir),
    loadBefore: load(),
  };
}

function setUp(options) {
  const peers = spawnSync('sh', [path.join(ROOT, 'scripts', 'setup-system.sh'), '--bench'], {
    stdio: ['ignore', 2, 2],
  });
  if (peers.status !== 0) say('some peers are missing; their rows will be, too');
  // In a fresh clone this installs what b2 needs to be built.
  if (spawnSync(B2, ['--version'], { stdio: ['ignore', 2, 2] }).status !== 0)
    throw new Unusable('b2 does not start');
  if (options['no-build']) return;
  say('building b2');
  const build = spawnSync(process.execPath, [path.join(ROOT, 'scripts', 'build.mjs')], {
    stdio: ['ignore', 2, 2],
  });
  if (build.status !== 0)
    throw new Unusable('b2 does not build; --no-build measures the last build');
}

function checkSpace(dir, sizeMiB) {
  const { bavail, bsize } = statfsSync(dir);
  const needMiB = sizeMiB * 3;
  const haveMiB = Math.floor((bavail * bsize) / MIB);
  if (haveMiB < needMiB)
    throw new Unusable(`${dir}: ${haveMiB} MiB free, about ${needMiB} needed; another --dir?`);
}

/** Everything that one round of one tool works with. */
function bench(tool, context) {
  const dir = path.join(context.scratch, 'tool');
  rmSync(dir, { recursive: true, force: true });
  mkdirSync(dir);
  const out = path.join(dir, 'out.img');
  const env = { IMG: context.image, DIR: dir, OUT: out, B2 };
  for (const [name, value] of Object.entries(tool.env)) env[name] = value.replace('$DIR', dir);
  return { dir, out, env };
}

function line(label, run) {
  const rss = `${Math.round(run.maxRssMiB)} MiB`;
  say(`  ${label.padEnd(58)} ${run.elapsedS.toFixed(2)} s, CPU ${run.cpuS.toFixed(2)} s, ${rss}`);
}

async function compareWithImage(place) {
  try {
    await sh('cmp "$IMG" "$OUT"', place.env);
  } catch (error) {
    if (error instanceof CommandFailed) error.isDifferent = true;
    throw error;
  }
}

/** Prepares an operation's target, runs it, and checks what it wrote. */
async function runOperation(tool, operation, place, context, round) {
  const run = (script) => measure(script, place.env, context);
  if (operation === 'rollback') {
    changeOnePercent(place.out, context.seed);
    round.parts.readTarget ??= await run(READ_TARGET);
  } else if (operation.startsWith('restore')) {
    rmSync(place.out, { force: true });
  }
  const result = await run(tool[operation]);
  if (operation.startsWith('restore') || operation === 'rollback') await compareWithImage(place);
  rmSync(path.join(place.dir, 'x'), { recursive: true, force: true });
  if (operation === 'full') result.storedMiB = diskBytes(path.join(place.dir, 'repo')) / MIB;
  line(`${tool.name}: ${OPERATIONS[operation]}`, result);
  return result;
}

async function runTool(tool, context, round) {
  const place = bench(tool, context);
  const results = {};
  round.runs[tool.name] = results;
  let operation = 'setUp';
  try {
    await sh(tool.setUp, place.env);
    for (operation of Object.keys(OPERATIONS)) {
      if (tool[operation] !== undefined)
        results[operation] = await runOperation(tool, operation, place, context, round);
    }
  } catch (error) {
    if (!(error instanceof CommandFailed)) throw error;
    say(`  FAILED ${tool.name} ${operation}: ${error.message}`);
    const matters = tool.isOurs === true || error.isDifferent === true;
    round.failures.push({ tool: tool.name, operation, message: error.message, matters });
  }
  rmSync(place.dir, { recursive: true, force: true });
}

/** The parts of the limit, for as much as b2 has stored in this round. */
async function runParts(context, round) {
  const storedMiB = round.runs['b2']?.full?.storedMiB;
  if (storedMiB === undefined) return;
  const place = bench({ env: {} }, context);
  place.env.STORED = String(Math.round(storedMiB * MIB));
  try {
    for (const [part, script] of Object.entries(PARTS)) {
      const warm = WARM[part];
      if (warm !== undefined) await sh(`cat ${warm} >/dev/null`, place.env);
      const cold = context.cold && warm === undefined;
      round.parts[part] = await measure(script, place.env, { ...context, cold });
      line(`limit: ${part}`, round.parts[part]);
    }
  } catch (error) {
    if (!(error instanceof CommandFailed)) throw error;
    say(`  FAILED limit: ${error.message}`);
    round.failures.push({ tool: 'limit', operation: 'parts', message: error.message });
  }
  rmSync(place.dir, { recursive: true, force: true });
}

/** One tool after the other, starting with another one each round; the limit directly after b2. */
async function runRound(number, tools, context) {
  const round = { parts: {}, runs: {}, failures: [] };
  const first = number % tools.length;
  for (const tool of [...tools.slice(first), ...tools.slice(0, first)]) {
    await runTool(tool, context, round);
    if (tool.name === 'b2') await runParts(context, round);
  }
  return round;
}

async function runAll(options) {
  setUp(options);
  mkdirSync(options.dir, { recursive: true });
  checkSpace(options.dir, options.sizeMiB);
  const image = prepareImage(options.dir, options.sizeMiB, say);
  const versions = readVersions();
  const tools = TOOLS.filter(({ name, program }) => {
    if (!options.only.test(name)) return false;
    if (versions[program] === undefined) say(`${name}: ${program} is not here, left out`);
    return versions[program] !== undefined;
  });
  if (tools.length === 0) throw new Unusable('--only leaves no tool');
  const data = {
    startedAt: new Date().toISOString(),
    machine: describeMachine(options.dir),
    versions,
    image: { sizeMiB: options.sizeMiB, diskMiB: Math.round((statSync(image).blocks * 512) / MIB) },
    cold: options.cold,
    tools: tools.map(({ name }) => name),
    rounds: [],
  };
  if (Number(data.machine.loadBefore) > 0.5)
    say(
      `the machine is busy (load ${data.machine.loadBefore}): times will be long, ratios uncertain`,
    );
  const scratch = mkdtempSync(path.join(options.dir, 'run-'));
  const release = onExit(() => rmSync(scratch, { recursive: true, force: true }));
  try {
    for (let number = 0; number < options.rounds; number += 1) {
      say(`round ${number + 1} of ${options.rounds} (load ${load()})`);
      const context = { image, scratch, cold: options.cold, seed: number + 1 };
      data.rounds.push(await runRound(number, tools, context));
    }
  } finally {
    release();
  }
  return data;
}

async function main() {
  const options = readOptions();
  cleanUpOnSignals();
  const data =
    options.from === undefined
      ? await runAll(options)
      : JSON.parse(readFileSync(options.from, 'utf8'));
  if (options.json) console.log(JSON.stringify({ ...data, ratios: compare(data.rounds) }, null, 2));
  else console.log(options.markdown ? asMarkdown(data) : asText(data));
  const failed = data.rounds.some(({ failures }) => failures.some(({ matters }) => matters));
  process.exitCode = failed ? 1 : 0;
}

try {
  await main();
} catch (error) {
  const isUsage = error instanceof Unusable || error.code?.startsWith('ERR_PARSE_ARGS');
  say(`bench: ${isUsage ? error.message : error.stack}`);
  process.exitCode = isUsage ? 2 : 1;
}
