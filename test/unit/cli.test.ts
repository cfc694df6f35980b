import { describe, expect, it } from 'vitest';
import { main, reportOf, type World } from '../../src/cli.js';
import { COMMANDS } from '../../src/commands/index.js';
import { B2Error, ExitCode } from '../../src/errors.js';
import { CaptureStream } from '../support/capture-stream.js';
import { ManualClock } from '../support/manual-clock.js';
import { sampleCommands, type SampleRun } from '../support/sample-commands.js';

async function b2(
  args: readonly string[],
  run: SampleRun = () => Promise.resolve({ data: 'x' }),
  env = {},
) {
  const stdout = new CaptureStream();
  const stderr = new CaptureStream();
  const abort = new AbortController();
  const world: World = {
    stdout,
    stderr,
    env: { B2_CONFIG: '/dev/null', ...env },
    homeDir: '/nonexistent',
    isRoot: false,
    clock: new ManualClock(),
    random: (n) => new Uint8Array(n),
    abort,
    commands: sampleCommands(run),
  };
  const code = await main(args, world);
  return { code, stdout: stdout.text, stderr: stderr.text };
}

/** The input that `restore` gets for a command line. */
async function inputOf(...args: readonly string[]) {
  let seen: unknown;
  const result = await b2(['restore', ...args], (context, input) => {
    seen = { ...input, repo: context.settings.repository.url, flags: context.flags };
    return Promise.resolve({ data: undefined });
  });
  expect(result).toEqual({ code: 0, stdout: 'answer undefined\n', stderr: '' });
  return seen;
}

describe('parsing', () => {
  it('gives defaults', async () => {
    expect(await inputOf('v', 't')).toEqual({
      arguments: { volume: 'v', target: 't' },
      options: {
        at: 'latest',
        format: 'raw',
        'chunk-size': undefined,
        tag: [],
        into: undefined,
        force: false,
        'no-verify': false,
      },
      repo: '/nonexistent/.local/share/b2/repo',
      flags: { json: false, quiet: false, verbose: false },
    });
  });

  it('gives what was typed, global options on either side', async () => {
    expect(
      await inputOf(
        '--repo',
        '/r',
        'v',
        '--no-verify',
        '-f',
        't',
        '--chunk-size=64K',
        '-t',
        'a',
        '--tag',
        'b',
        '-q',
      ),
    ).toMatchObject({
      arguments: { volume: 'v', target: 't' },
      options: { 'chunk-size': 65_536, tag: ['a', 'b'], force: true, 'no-verify': true },
      repo: '/r',
      flags: { quiet: true },
    });
  });

  it('takes the names of commands as arguments', async () => {
    const result = await b2(['--json', 'watch', 'restore', 'key']);
    expect(JSON.parse(result.stdout)).toEqual({ name: 'watch', device: ['restore', 'key'] });
  });

  it('takes many arguments, and dashes after --', async () => {
    const result = await b2(['--json', 'key', 'add', 'a', '--', '-b', '--json']);
    expect(JSON.parse(result.stdout)).toEqual({ name: 'key add', device: ['a', '-b', '--json'] });
  });

  it.each([
    [['restore', 'v'], /missing required argument 'TARGET'/, /"b2 restore --help"/],
    [['restore', 'v', 't', 'u'], /too many arguments/, /"b2 restore --help"/],
    [['restore', 'v', 't', '--forze'], /unknown option '--forze'/, /Did you mean --force\?/],
    [['restore', 'v', 't', '--at'], /argument missing/, /b2 restore --help/],
    [['restore', 'v', 't', '--format', 'zip'], /--format: "zip" is none of raw, qcow2/, /^/],
    [['restore', 'v', 't', '--chunk-size', '12Q'], /--chunk-size: "12Q" is not a size/, /^/],
    [['restor', 'v', 't'], /unknown command 'restor'/, /Did you mean restore\?/],
    // A later word that is a command makes no difference.
    [['restor', 'watch'], /unknown command 'restor'/, /Did you mean restore\?/],
    [['key', 'ad'], /unknown command 'ad'/, /b2 key --help/],
    [['watch'], /missing required argument 'DEVICE'/, /b2 watch --help/],
  ])('refuses %j with code 2, in words and as JSON', async (args, message, hint) => {
    const result = await b2(args);
    expect(result).toMatchObject({ code: 2, stdout: '' });
    expect(result.stderr).toMatch(message);
    expect(result.stderr).toMatch(hint);
    expect(result.stderr).toMatch(/^b2: /);
    const json = await b2([...args.slice(0, 2), '--json', ...args.slice(2)]);
    expect(json.code).toBe(2);
    expect(JSON.parse(json.stderr)).toMatchObject({
      type: 'error',
      code: 2,
      message: expect.stringMatching(message),
    });
  });

  it('shows help on stdout when asked and on stderr when nothing was asked', async () => {
    expect(await b2(['--help'])).toMatchObject({
      code: 0,
      stdout: expect.stringContaining('restore'),
      stderr: '',
    });
    expect(await b2([])).toMatchObject({
      code: 2,
      stdout: '',
      stderr: expect.stringContaining('restore'),
    });
    expect(await b2(['key'])).toMatchObject({
      code: 2,
      stdout: '',
      stderr: expect.stringContaining('add'),
    });
    const help = await b2(['restore', '--help']);
    expect(help.stdout).toContain('b2 restore [options] VOLUME TARGET');
    expect(help.stdout).toContain('b2 restore web1/sda /dev/sdb --at "5m ago"');
    expect(help.stdout).toContain('4 no such point');
    expect(help.stdout).toContain('raw, qcow2; default raw');
    expect(await b2(['help', 'restore'])).toEqual(help);
    expect((await b2(['help', 'key'])).stdout).toContain('add');
    expect((await b2(['--version'])).stdout).toMatch(/^\d+\.\d+\.\d+\n$/);
  });
});

describe('running', () => {
  it('prints the answer as text or as one JSON document, with its code', async () => {
    const run: SampleRun = () => Promise.resolve({ data: { a: 1 }, code: ExitCode.damage });
    expect(await b2(['restore', 'v', 't'], run)).toMatchObject({
      code: 5,
      stdout: 'answer [object Object]\n',
    });
    expect(await b2(['restore', 'v', 't', '--json'], run)).toMatchObject({
      code: 5,
      stdout: '{"a":1}\n',
    });
  });

  it('maps errors to codes and words', async () => {
    const fails =
      (error: unknown): SampleRun =>
      () =>
        Promise.reject(error);
    const error = new B2Error('not-found', 'no point', {
      hint: 'see b2 points',
      cause: new Error('deep'),
    });
    expect(await b2(['restore', 'v', 't'], fails(error))).toEqual({
      code: 4,
      stdout: '',
      stderr: 'b2: no point\n    see b2 points\n',
    });
    expect((await b2(['-v', 'restore', 'v', 't'], fails(error))).stderr).toContain('because: deep');
    const json = await b2(['--json', 'restore', 'v', 't'], fails(error));
    expect(JSON.parse(json.stderr)).toEqual({
      type: 'error',
      code: 4,
      message: 'no point',
      hint: 'see b2 points',
    });
    const system = Object.assign(new Error('ENOENT: no such file, open /x'), {
      code: 'ENOENT',
      syscall: 'open',
    });
    expect(await b2(['restore', 'v', 't'], fails(system))).toEqual({
      code: 1,
      stdout: '',
      stderr: 'b2: ENOENT: no such file, open /x\n',
    });
    const bug = await b2(['restore', 'v', 't'], fails(new TypeError('oops')));
    expect(bug).toMatchObject({
      code: 1,
      stderr: expect.stringMatching(/internal error: oops[\s\S]*\n {4}at /),
    });
  });

  it('ends with 130 when a signal stopped it', () => {
    const abort = new AbortController();
    abort.abort('SIGINT');
    expect(reportOf(abort.signal.reason, abort.signal, false)).toMatchObject({
      code: 130,
      message: 'interrupted (SIGINT)',
    });
    const aborted = new DOMException('aborted', 'AbortError');
    expect(reportOf(aborted, abort.signal, false).code).toBe(130);
    expect(reportOf(aborted, new AbortController().signal, false).code).toBe(1);
    expect(reportOf(new B2Error('damaged', 'x'), abort.signal, false).code).toBe(5);
  });

  it('reads the configuration file that the environment names', async () => {
    const result = await b2(['restore', 'v', 't'], undefined, { B2_CONFIG: '/nonexistent/c.yaml' });
    expect(result).toMatchObject({
      code: 2,
      stderr: expect.stringContaining('/nonexistent/c.yaml'),
    });
  });

  it('ends with 3, without a word, when the reader of the output left', async () => {
    const stdout = new CaptureStream();
    const stderr = new CaptureStream();
    stdout.fail = Object.assign(new Error('write EPIPE'), { code: 'EPIPE' });
    const abort = new AbortController();
    const code = await main(['restore', 'v', 't'], {
      stdout,
      stderr,
      env: { B2_CONFIG: '/dev/null' },
      homeDir: '/nonexistent',
      isRoot: false,
      clock: new ManualClock(),
      random: (n) => new Uint8Array(n),
      abort,
      commands: sampleCommands(() => Promise.resolve({ data: 1 })),
    });
    expect({ code, stderr: stderr.text, aborted: abort.signal.aborted }).toEqual({
      code: 3,
      stderr: '',
      aborted: true,
    });
  });
});

it('knows every exit code that the registry documents', () => {
  const codes = new Set<number>(Object.values(ExitCode));
  for (const command of COMMANDS) {
    for (const code of Object.keys(command.exitCodes ?? {})) expect(codes).toContain(Number(code));
  }
});
