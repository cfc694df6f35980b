/** The built program as a process: streams, exit codes, signals. */
import { spawnSync } from 'node:child_process';
import { fileURLToPath } from 'node:url';
import { describe, expect, it } from 'vitest';

const program = fileURLToPath(new URL('../../bin/b2', import.meta.url));

function b2(...args: readonly string[]) {
  const done = spawnSync(program, args, {
    encoding: 'utf8',
    env: { PATH: process.env['PATH'], HOME: '/nonexistent', B2_CONFIG: '/dev/null' },
  });
  return { code: done.status, stdout: done.stdout, stderr: done.stderr };
}

describe('b2', () => {
  it('prints its version and its help', () => {
    expect(b2('--version')).toMatchObject({
      code: 0,
      stdout: expect.stringMatching(/^\d+\.\d+\.\d+\n$/),
    });
    expect(b2('--help')).toMatchObject({ code: 0, stdout: expect.stringContaining('Usage: b2') });
    expect(b2()).toMatchObject({
      code: 2,
      stdout: '',
      stderr: expect.stringContaining('Usage: b2'),
    });
  });

  it('answers as text and as one JSON document', () => {
    expect(b2('completion', 'bash').stdout).toMatch(/^# bash completion for b2/);
    expect(JSON.parse(b2('completion', 'bash', '--json').stdout)).toMatchObject({ shell: 'bash' });
  });

  it('ends wrong usage with 2, a message and a hint', () => {
    expect(b2('complete')).toEqual({
      code: 2,
      stdout: '',
      stderr: 'b2: unknown command \'complete\'\n    Did you mean completion? See "b2 --help".\n',
    });
    const json = b2('completion', 'csh', '--json');
    expect(json).toMatchObject({ code: 2, stdout: '' });
    expect(JSON.parse(json.stderr)).toEqual({
      type: 'error',
      code: 2,
      message: 'SHELL: "csh" is none of bash, zsh, fish',
    });
  });

  it('ends quietly with 3 when the reader of its output leaves', () => {
    // A pipe without a reader from the start: what is written to it cannot arrive.
    const done = spawnSync(
      'sh',
      ['-c', '{ sleep 1; "$0" completion bash; echo $? >&2; } | true', program],
      { encoding: 'utf8', env: { PATH: process.env['PATH'], B2_CONFIG: '/dev/null' } },
    );
    expect(done.stderr).toBe('3\n');
  });

  it('says when its output cannot be stored', () => {
    const done = spawnSync('sh', ['-c', '"$0" completion bash > /dev/full', program], {
      encoding: 'utf8',
      env: { PATH: process.env['PATH'], B2_CONFIG: '/dev/null' },
    });
    expect(done.status).toBe(3);
    expect(done.stderr).toMatch(/^b2: cannot write to the standard output: .*ENOSPC.*\n$/);
  });
});
