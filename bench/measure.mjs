/** Runs a shell command under GNU time, and cleans up whatever way the benchmark ends. */
import { spawn, spawnSync } from 'node:child_process';
import { readdirSync, readFileSync, lstatSync, writeFileSync } from 'node:fs';
import path from 'node:path';

const cleaners = new Set();
let running;

/** Calls `clean` once: when the returned function is called, or when a signal ends the process. */
export function onExit(clean) {
  cleaners.add(clean);
  return () => {
    cleaners.delete(clean);
    clean();
  };
}

/** Ends the running command and removes what is there when the benchmark is interrupted. */
export function cleanUpOnSignals() {
  for (const [name, code] of [
    ['SIGINT', 130],
    ['SIGTERM', 143],
    ['SIGHUP', 129],
  ]) {
    process.once(name, () => {
      if (running !== undefined) {
        try {
          process.kill(-running.pid, 'SIGKILL');
        } catch (error) {
          if (error.code !== 'ESRCH') throw error;
        }
      }
      for (const clean of cleaners) clean();
      process.exit(code);
    });
  }
}

/** A command that could not be run or ended with a status other than 0. */
export class CommandFailed extends Error {}

/** Runs `script` with sh in a process group of its own; rejects with the end of what it said. */
export function sh(script, env, prefix = []) {
  return new Promise((resolve, reject) => {
    const [command, ...args] = [...prefix, 'sh', '-c', script];
    const child = spawn(command, args, {
      env: { ...process.env, ...env },
      stdio: ['ignore', 'pipe', 'pipe'],
      detached: true,
    });
    running = child;
    let said = '';
    const listen = (chunk) => {
      said = (said + String(chunk)).slice(-4000);
    };
    child.stdout.on('data', listen);
    child.stderr.on('data', listen);
    child.on('error', (error) => reject(new CommandFailed(error.message)));
    child.on('close', (status, signal) => {
      running = undefined;
      if (status === 0) resolve(said);
      else reject(new CommandFailed(`${script}\nended with ${signal ?? status}: ${said.trim()}`));
    });
  });
}

/** Blocks on disk of everything below `dir` that is there, in bytes. */
export function diskBytes(dir) {
  let bytes = 0;
  let entries;
  try {
    entries = readdirSync(dir, { withFileTypes: true });
  } catch (error) {
    if (error.code === 'ENOENT') return 0;
    throw error;
  }
  for (const entry of entries) {
    const file = path.join(dir, entry.name);
    bytes += entry.isDirectory() ? diskBytes(file) : lstatSync(file).blocks * 512;
  }
  return bytes;
}

/** Everything written so far reaches the disk before the clock starts; with `cold`, the page cache goes. */
function settle(cold) {
  spawnSync('sync');
  if (cold) writeFileSync('/proc/sys/vm/drop_caches', '1');
}

/**
 * One measured run of `script`, with the sync of the file system that it wrote to. Elapsed and CPU are in
 * seconds, memory is that of the largest process.
 */
export async function measure(script, env, { cold = false, scratch }) {
  settle(cold);
  const report = path.join(scratch, 'time');
  await sh(`{ ${script}\n} && sync -f "$DIR"`, env, [
    '/usr/bin/time',
    '-o',
    report,
    '-f',
    '%e %U %S %M',
  ]);
  const last = readFileSync(report, 'utf8').trim().split('\n').at(-1) ?? '';
  const [elapsedS, userS, sysS, maxRssKiB] = last.split(' ').map(Number);
  return { elapsedS, userS, sysS, cpuS: userS + sysS, maxRssMiB: maxRssKiB / 1024 };
}
