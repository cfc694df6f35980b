/** Commands around a point: what they are told, how they end, and who ends them. */
import { readFileSync } from 'node:fs';
import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import { runHook } from '../../../../src/capture/freeze/hooks.js';
import { systemClock } from '../../../../src/clock.js';
import { tempDir, type TempDir } from '../../../support/tmp.js';

let dir: TempDir;
beforeEach(() => {
  dir = tempDir();
});
afterEach(() => dir.remove());

const clock = systemClock;

function isRunning(pid: number): boolean {
  try {
    return !/^State:\s+[ZX]/m.test(readFileSync(`/proc/${pid}/status`, 'utf8'));
  } catch {
    return false;
  }
}

describe('a hook', () => {
  it('gets its variables, and none of our secrets', async () => {
    process.env['B2_PASSWORD'] = 'secret';
    process.env['B2_PASSWORD_FILE'] = '/secret';
    try {
      await runHook('pre-point', `env >${dir.join('env')}`, { B2_VOLUME: 'h/d' }, { clock });
    } finally {
      delete process.env['B2_PASSWORD'];
      delete process.env['B2_PASSWORD_FILE'];
    }
    const env = readFileSync(dir.join('env'), 'utf8');
    expect(env).toMatch(/^B2_VOLUME=h\/d$/m);
    expect(env).not.toMatch(/secret/);
  });

  it('that fails says its exit code and what it said last', async () => {
    await expect(
      runHook('pre-point', 'echo one; echo "no database" >&2; exit 7', {}, { clock }),
    ).rejects.toMatchObject({
      kind: 'failed',
      message: 'the pre-point command ended with exit code 7: one / no database',
    });
    await expect(runHook('post-point', 'kill -9 $$', {}, { clock })).rejects.toThrow(
      'the post-point command was ended by SIGKILL',
    );
  });

  it('that takes too long is ended, with everybody it started', async () => {
    const command = `sh -c 'trap "" TERM; echo $$ >${dir.join('pid')}; while :; do sleep 0.1; done'; true`;
    await expect(runHook('pre-point', command, {}, { clock, timeoutMs: 700 })).rejects.toThrow(
      'the pre-point command took longer than 0.7 s and was ended',
    );
    const pid = Number(readFileSync(dir.join('pid'), 'utf8'));
    expect(pid).toBeGreaterThan(1);
    while (isRunning(pid)) await clock.sleep(10);
  });

  it('is ended when the caller gives up', async () => {
    const abort = new AbortController();
    const run = runHook('pre-point', 'sleep 1000', {}, { clock, signal: abort.signal });
    abort.abort();
    await expect(run).rejects.toMatchObject({ kind: 'interrupted' });
    await expect(
      runHook('pre-point', 'true', {}, { clock, signal: abort.signal }),
    ).rejects.toMatchObject({ kind: 'interrupted' });
  });

  it('may leave a process behind, which keeps the session of a database open until the other hook', async () => {
    await runHook(
      'pre-point',
      `sleep 1000 & echo $! >${dir.join('pid')}; echo said`,
      {},
      { clock },
    );
    const pid = Number(readFileSync(dir.join('pid'), 'utf8'));
    expect(isRunning(pid)).toBe(true);
    await runHook('post-point', `kill ${pid}`, {}, { clock });
    while (isRunning(pid)) await clock.sleep(10);
  });
});
