/**
 * The command line: builds commander's tree from the registry of commands, runs one of them, and is the
 * only place where errors become exit codes.
 */
import { homedir } from 'node:os';
import { Argument, Command, Option, type CommanderError } from 'commander';
import { systemClock, systemRandom, type Clock, type Random } from './clock.js';
import { COMMANDS, GROUPS } from './commands/index.js';
import { EXIT_CODES, GLOBAL_OPTIONS } from './commands/reference.js';
import type { ArgumentSpec, CommandSpec, Input, OptionSpec } from './commands/spec.js';
import { argumentUsage, fullDescription, optionUsage } from './commands/tree.js';
import { loadConfig, resolveSettings, type Config } from './config.js';
import { B2Error, ExitCode, errnoOf, messageOf } from './errors.js';
import {
  createRenderer,
  type ErrorReport,
  type OutputStream,
  type Renderer,
} from './ui/renderer.js';
import { styleFor } from './ui/style.js';
import { programVersion } from './version.js';
import { threadsLoaded } from './workers.js';

/** The world outside, replaced in tests. */
export interface World {
  readonly stdout: OutputStream;
  readonly stderr: OutputStream;
  readonly env: Readonly<Record<string, string | undefined>>;
  readonly homeDir: string;
  readonly isRoot: boolean;
  readonly clock: Clock;
  readonly random: Random;
  /** Aborted by a signal, with its name as the reason; also aborted when stdout's reader has left. */
  readonly abort: AbortController;
  readonly commands: readonly CommandSpec[];
}

type GlobalInput = Input<Record<never, never>, typeof GLOBAL_OPTIONS>['options'];

/** A parse that ended without a command to run: help, version, or wrong usage. */
class ParseEnd extends Error {
  readonly commandPath: string;
  readonly commander: CommanderError;

  constructor(commander: CommanderError, commandPath: string) {
    super(commander.message);
    this.commander = commander;
    this.commandPath = commandPath;
  }
}

/** The key under which commander keeps an option, and whether it is one that commander turns round. */
function attributeOf(name: string): { readonly key: string; readonly negated: boolean } {
  const negated = name.startsWith('no-');
  const base = negated ? name.slice(3) : name;
  return { key: base.replace(/-(.)/g, (_, char: string) => char.toUpperCase()), negated };
}

function addOptions(command: Command, options: Readonly<Record<string, OptionSpec>>): void {
  for (const [name, spec] of Object.entries(options)) {
    const flags = optionUsage(name, spec).replace(
      / (\S+)$/,
      spec.value === undefined ? ' $1' : ' <$1>',
    );
    const option = new Option(flags, fullDescription(spec));
    if (spec.many === true) {
      option.argParser((text: string, before: readonly string[] | undefined) => [
        ...(before ?? []),
        text,
      ]);
    }
    command.addOption(option);
  }
}

function parseValue(what: string, spec: ArgumentSpec | OptionSpec, text: string): unknown {
  if (spec.choices !== undefined && !spec.choices.includes(text)) {
    throw new B2Error('usage', `${what}: "${text}" is none of ${spec.choices.join(', ')}`);
  }
  if (spec.parse === undefined) return text;
  try {
    return spec.parse(text);
  } catch (error) {
    if (!(error instanceof RangeError)) throw error;
    throw new B2Error('usage', `${what}: ${error.message}`, { cause: error });
  }
}

function readOptions(
  specs: Readonly<Record<string, OptionSpec>>,
  raw: Readonly<Record<string, unknown>>,
): Record<string, unknown> {
  const values: Record<string, unknown> = {};
  for (const [name, spec] of Object.entries(specs)) {
    const { key, negated } = attributeOf(name);
    const given = raw[key];
    const parse = (text: unknown): unknown => parseValue(`--${name}`, spec, String(text));
    if (spec.value === undefined) values[name] = given === !negated;
    else if (spec.many === true) values[name] = Array.isArray(given) ? given.map(parse) : [];
    else if (given !== undefined) values[name] = parse(given);
    else values[name] = spec.default === undefined ? undefined : parse(spec.default);
  }
  return values;
}

function readArguments(
  specs: Readonly<Record<string, ArgumentSpec>>,
  raw: readonly unknown[],
): Record<string, unknown> {
  const values: Record<string, unknown> = {};
  for (const [i, [name, spec]] of Object.entries(specs).entries()) {
    const given = raw[i];
    const parse = (text: unknown): unknown => parseValue(spec.label, spec, String(text));
    if (spec.many === true) values[name] = Array.isArray(given) ? given.map(parse) : [];
    else values[name] = given === undefined ? undefined : parse(given);
  }
  return values;
}

/** Examples and exit codes, below commander's own help of a command. */
function helpTail(spec: CommandSpec): string {
  const lines: string[] = [];
  if (spec.examples.length > 0) {
    lines.push('', 'Examples:');
    for (const { command, text } of spec.examples) lines.push(`  ${command}`, `      ${text}`);
  }
  const codes = Object.entries({ ...EXIT_CODES, ...spec.exitCodes }).filter(
    ([code]) => Number(code) <= ExitCode.usage || Object.hasOwn(spec.exitCodes ?? {}, code),
  );
  lines.push('', `Exit codes: ${codes.map(([code, text]) => `${code} ${text}`).join('; ')}.`);
  return lines.join('\n');
}

/** Where the parser writes help. */
interface Output {
  readonly stdout: { readonly write: (text: string) => unknown };
  readonly stderr: { readonly write: (text: string) => unknown };
}

type Chosen = {
  readonly spec: CommandSpec;
  readonly input: Input<{}, {}>;
  readonly globals: GlobalInput;
};

function buildProgram(
  out: Output,
  commands: readonly CommandSpec[],
  choose: (chosen: Chosen) => void,
): Command {
  const ended = (path: string) => (error: CommanderError) => {
    throw new ParseEnd(error, path);
  };
  const program = new Command('b2');
  program
    .description('Block-continuous backup: every point in time of a disk, restorable and verified.')
    .version(programVersion(), '-V, --version', 'print the version')
    .helpOption('-h, --help', 'show help')
    .helpCommand('help [command]', 'show the help of a command')
    .configureHelp({ showGlobalOptions: true })
    .configureOutput({
      writeOut: (text) => out.stdout.write(text),
      writeErr: (text) => out.stderr.write(text),
      // Errors are shown by the renderer, as every other error is.
      outputError: () => undefined,
    })
    .exitOverride(ended('b2'));
  addOptions(program, GLOBAL_OPTIONS);

  const groups = new Map<string, Command>();
  for (const spec of commands) {
    const words = spec.name.split(' ');
    const last = words.at(-1) ?? spec.name;
    const first = words[0] ?? spec.name;
    let parent = program;
    if (words.length > 1) {
      parent =
        groups.get(first) ??
        program
          .command(first)
          .description(GROUPS[first] ?? '')
          .exitOverride(ended(`b2 ${first}`));
      groups.set(first, parent);
    }
    const command = parent
      .command(last)
      .summary(spec.summary)
      .description(spec.description.join('\n\n'))
      .exitOverride(ended(`b2 ${spec.name}`))
      .addHelpText('after', helpTail(spec));
    for (const argument of Object.values(spec.arguments)) {
      const text = argument.many === true ? `${argument.label}...` : argument.label;
      command.addArgument(
        new Argument(
          argument.optional === true ? `[${text}]` : `<${text}>`,
          fullDescription(argument),
        ),
      );
    }
    command.usage(['[options]', ...Object.values(spec.arguments).map(argumentUsage)].join(' '));
    addOptions(command, spec.options);
    command.action(() => {
      const raw: Readonly<Record<string, unknown>> = command.optsWithGlobals();
      choose({
        spec,
        input: {
          arguments: readArguments(spec.arguments, command.processedArgs),
          options: readOptions(spec.options, raw),
        },
        globals: readGlobals(raw),
      });
    });
  }
  return program;
}

function readGlobals(raw: Readonly<Record<string, unknown>>): GlobalInput {
  const text = (value: unknown): string | undefined =>
    typeof value === 'string' ? value : undefined;
  return {
    repo: text(raw['repo']),
    config: text(raw['config']),
    'password-file': text(raw['passwordFile']),
    'key-file': text(raw['keyFile']),
    json: raw['json'] === true,
    quiet: raw['quiet'] === true,
    verbose: raw['verbose'] === true,
  };
}

/** "See 'b2 init --help'." for wrong usage, after commander's own suggestion if it has one. */
function usageReport(end: ParseEnd): ErrorReport {
  const [first = '', ...rest] = end.commander.message.replace(/^error: /, '').split('\n');
  const suggestion = rest
    .join(' ')
    .replace(/^\((.*)\)$/, '$1 ')
    .trim();
  const hint = `${suggestion === '' ? '' : `${suggestion} `}See "${end.commandPath} --help".`;
  return { code: ExitCode.usage, message: first, hint, details: [] };
}

function causes(error: Error): readonly string[] {
  const lines: string[] = [];
  for (let cause = error.cause; cause instanceof Error && lines.length < 8; cause = cause.cause) {
    lines.push(`because: ${cause.message}`);
  }
  return lines;
}

/** Everything that can be thrown → exit code and words. Exported for tests. */
export function reportOf(error: unknown, aborted: AbortSignal, verbose: boolean): ErrorReport {
  if (error instanceof ParseEnd) return usageReport(error);
  if (error instanceof B2Error) {
    return {
      code: error.code,
      message: error.message,
      ...(error.hint === undefined ? {} : { hint: error.hint }),
      details: verbose ? causes(error) : [],
    };
  }
  if (
    aborted.aborted &&
    (error === aborted.reason || (error instanceof Error && error.name === 'AbortError'))
  ) {
    return {
      code: ExitCode.interrupted,
      message: `interrupted (${String(aborted.reason)})`,
      details: [],
    };
  }
  const isSystemError =
    error instanceof Error && errnoOf(error) !== undefined && 'syscall' in error;
  if (isSystemError) {
    return { code: ExitCode.failed, message: error.message, details: verbose ? causes(error) : [] };
  }
  const stack = error instanceof Error ? (error.stack ?? '').split('\n').slice(1) : [];
  return {
    code: ExitCode.failed,
    message: `internal error: ${messageOf(error)}`,
    hint: 'This is a fault in b2; please report it with the lines below.',
    details: stack.map((line) => line.trim()),
  };
}

async function runCommand(world: World, chosen: Chosen, renderer: Renderer): Promise<number> {
  const { spec, input, globals } = chosen;
  const { env, homeDir, isRoot, clock, random, abort } = world;
  const reloadConfig = (): Promise<Config> => loadConfig({ option: globals.config, env, homeDir });
  const config = await reloadConfig();
  const settings = resolveSettings({
    options: {
      repo: globals.repo,
      passwordFile: globals['password-file'],
      keyFile: globals['key-file'],
    },
    env,
    config,
    homeDir,
    isRoot,
  });
  const command = await spec.load();
  const outcome = await command.run(
    {
      settings,
      config,
      reloadConfig,
      env,
      clock,
      random,
      signal: abort.signal,
      events: renderer.events,
      output: renderer,
      flags: { json: globals.json, quiet: globals.quiet, verbose: globals.verbose },
    },
    input,
  );
  const style = await styleFor({ isTty: world.stdout.isTTY === true, json: globals.json, env });
  renderer.answer(outcome.data, globals.json ? '' : command.text(outcome.data, style));
  return outcome.code ?? ExitCode.ok;
}

/** True where that option was given, also when the rest of the command line could not be parsed. */
function asksFor(option: string, args: readonly string[]): boolean {
  const end = args.indexOf('--');
  return (end < 0 ? args : args.slice(0, end)).includes(option);
}

/** The command line, understood; throws {@link ParseEnd} and usage errors, and has written the help where that was asked for. */
function parse(args: readonly string[], world: World): Chosen | undefined {
  // Which command it is, only words of the command line can say: with those of them that are commands the parser comes to the same
  // choice as with all, in a fraction of the time. For everything else (help, wrong usage) it has to know all.
  const named = world.commands.filter(({ name }) => args.includes(name.split(' ')[0] ?? name));
  if (named.length > 0 && named.length < world.commands.length) {
    const silent = { write: () => true };
    try {
      const chosen = parseWith(args, { stdout: silent, stderr: silent }, named);
      if (chosen !== undefined) return chosen;
    } catch {
      // The same again with all commands, aloud.
    }
  }
  return parseWith(args, world, world.commands);
}

function parseWith(
  args: readonly string[],
  out: Output,
  commands: readonly CommandSpec[],
): Chosen | undefined {
  let chosen: Chosen | undefined;
  buildProgram(out, commands, (choice) => {
    chosen = choice;
  }).parse([...args], { from: 'user' });
  return chosen;
}

/** Runs one command line (without node and script) and resolves to its exit code; never rejects. */
export async function main(args: readonly string[], world: World): Promise<number> {
  const { stdout, stderr, env, clock, abort } = world;
  let chosen: Chosen | undefined;
  let parseError: unknown;
  try {
    chosen = parse(args, world);
  } catch (error) {
    parseError = error;
  }
  if (parseError instanceof ParseEnd) {
    const { code, exitCode } = parseError.commander;
    if (exitCode === 0) return ExitCode.ok;
    // A command line without a command: commander has written the help to stderr.
    if (code === 'commander.help') return ExitCode.usage;
  }
  const json = chosen?.globals.json ?? asksFor('--json', args);
  const verbose = chosen?.globals.verbose ?? false;
  const renderer = createRenderer({
    stdout,
    stderr,
    json,
    quiet: chosen?.globals.quiet ?? false,
    verbose,
    clock,
    stderrStyle: await styleFor({ isTty: stderr.isTTY === true, json, env }),
    canDraw: env['TERM'] !== 'dumb',
    onOutputFailure: () => abort.abort('the reader of the output left'),
  });
  let code: number;
  try {
    if (chosen === undefined) throw parseError;
    code = await runCommand(world, chosen, renderer);
  } catch (error) {
    const report = reportOf(error, abort.signal, verbose);
    code = report.code;
    if (renderer.outputFailure() === undefined) renderer.error(report);
    // What runs plugins reads one line of stdout, and would take 2 for CRITICAL: a check that cannot be begun is UNKNOWN.
    if (asksFor('--nagios', args)) {
      const { nagios, nagiosCode } = await import('./commands/nagios.js');
      const answer = nagios('UNKNOWN', report.message, []);
      renderer.answer({ nagios: answer }, json ? '' : answer.line);
      code = nagiosCode(answer.state);
    }
  }
  await renderer.close();
  const failure = renderer.outputFailure();
  if (failure === undefined) return code;
  // `| head` leaving early is no failure to talk about, but not everything was delivered.
  if (failure !== 'closed')
    stderr.write(`b2: cannot write to the standard output: ${failure.reason}\n`);
  return code === ExitCode.ok || code === ExitCode.interrupted ? ExitCode.partial : code;
}

/** The world of this process. */
export function processWorld(abort: AbortController): World {
  return {
    stdout: process.stdout,
    stderr: process.stderr,
    env: process.env,
    homeDir: process.env['HOME'] ?? homedir(),
    isRoot: process.geteuid?.() === 0,
    clock: systemClock,
    random: systemRandom,
    abort,
    commands: COMMANDS,
  };
}

/** Called by bin/b2: runs this process's command line and ends the process. */
export async function runProcess(): Promise<never> {
  const abort = new AbortController();
  for (const name of ['SIGINT', 'SIGTERM'] as const) {
    process.on(name, () => {
      // The second time somebody means it: whatever hangs is cut off as by a crash, which loses nothing.
      if (abort.signal.aborted) process.exit(ExitCode.interrupted);
      abort.abort(name);
    });
  }
  const code = await main(process.argv.slice(2), processWorld(abort));
  await threadsLoaded();
  // A handle that is still open must not keep a finished command alive.
  process.exit(code);
}
