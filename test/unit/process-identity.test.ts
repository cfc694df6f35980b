import { spawn } from 'node:child_process';
import { describe, expect, test } from 'vitest';
import {
  currentIdentity,
  isProvablyAlive,
  isProvablyDead,
  type MachineFacts,
  machineFacts,
  sameProcessTable,
} from '../../src/process-identity.js';

describe('this process', () => {
  test('is alive, and says who it is', () => {
    const own = currentIdentity();
    expect(own.pid).toBe(process.pid);
    expect(own.host).not.toBe('');
    expect(own.bootId).toMatch(/^[0-9a-f-]{36}$/);
    expect(own.startTicks).toMatch(/^\d+$/);
    expect(own.namespaces).toMatch(/^pid:\[\d+\]/);
    expect(isProvablyDead(own)).toBe(false);
    expect(isProvablyAlive(own)).toBe(true);
  });

  test('survives as JSON', () => {
    expect(isProvablyAlive(JSON.parse(JSON.stringify(currentIdentity())) as never)).toBe(true);
  });
});

describe('another process', () => {
  test('is dead when it has ended, also before its parent has noticed', async () => {
    // Blocks reading its stdin, so that it lives until it is told to go.
    const child = spawn('cat', [], { stdio: ['pipe', 'ignore', 'ignore'] });
    const pid = child.pid ?? 0;
    const found = machineFacts().process(pid);
    expect(found).toMatchObject({ startTicks: expect.stringMatching(/^\d+$/) as string });
    const identity = { ...currentIdentity(), pid, ...(typeof found === 'object' ? found : {}) };
    expect(isProvablyDead(identity)).toBe(false);
    expect(isProvablyAlive(identity)).toBe(true);
    expect(isProvablyDead({ ...identity, startTicks: '1' })).toBe(true);
    expect(isProvablyAlive({ ...identity, startTicks: '1' })).toBe(false);
    expect(isProvablyDead({ ...identity, startTicks: '' })).toBe(false);
    const ended = new Promise((resolve) => child.once('exit', resolve));
    child.kill('SIGKILL');
    await ended;
    expect(isProvablyDead(identity)).toBe(true);
    expect(isProvablyAlive(identity)).toBe(false);
  });
});

describe('what can be proved', () => {
  const machine: MachineFacts = {
    host: 'web1',
    machineId: 'm1',
    bootId: 'b1',
    namespaces: 'pid:[1]',
    process: (pid) => (pid === 7 ? { startTicks: '70' } : pid === 8 ? 'unknown' : 'gone'),
  };
  const living = {
    host: 'web1',
    machineId: 'm1',
    bootId: 'b1',
    namespaces: 'pid:[1]',
    pid: 7,
    startTicks: '70',
  };
  test.each([
    ['the same process', {}, false, true],
    ['no such process', { pid: 9 }, true, false],
    ['another start time', { startTicks: '71' }, true, false],
    ['a process that is hidden from us', { pid: 8 }, false, false],
    ['an unknown start time', { startTicks: '' }, false, false],
    ['an earlier boot of this machine', { bootId: 'b0' }, true, false],
    ['another machine', { machineId: 'm2', bootId: 'b2', pid: 9 }, false, false],
    [
      'a clone of this machine under another name',
      { host: 'web2', bootId: 'b2', pid: 9 },
      false,
      false,
    ],
    ['another container of this boot', { namespaces: 'pid:[2]', pid: 9 }, false, false],
    ['a container without machine id', { machineId: '', bootId: 'b0', pid: 9 }, false, false],
    ['an unknown boot', { bootId: '', pid: 9 }, false, false],
    ['unknown namespaces', { namespaces: '', pid: 9 }, false, false],
  ])('%s', (_, difference, isDead, isAlive) => {
    const identity = { ...living, ...difference };
    expect(isProvablyDead(identity, machine)).toBe(isDead);
    expect(isProvablyAlive(identity, machine)).toBe(isAlive);
  });

  test('nothing, where this machine does not know its own boot or namespaces', () => {
    const blind = { ...machine, bootId: '', namespaces: '', machineId: '' };
    const identity = { ...living, pid: 9, bootId: '', namespaces: '', machineId: '' };
    expect(isProvablyDead(identity, blind)).toBe(false);
    expect(isProvablyDead({ ...living, pid: 9 }, blind)).toBe(false);
    expect(sameProcessTable(identity, blind)).toBe(false);
  });
});
