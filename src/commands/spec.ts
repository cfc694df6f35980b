/**
 * What a command is: data, from which the command line parser (src/cli.ts), the help texts, the man
 * pages and the shell completions are all made. How to add one is said in src/commands/index.ts.
 *
 * `src/commands/NAME.ts` is the data and loads nothing heavy; `src/commands/run/NAME.ts` does the work and
 * is loaded only when the command runs.
 */
import type { Clock, Random } from '../clock.js';
import type { Config, Settings } from '../config.js';
import type { ExitCode } from '../errors.js';
import type { EventSink } from '../events.js';
import type { Style } from '../ui/style.js';

/** What a shell offers for a value: `words` come from `choices`, `none` offers nothing. */
export type Completion = 'file' | 'directory' | 'device' | 'command' | 'none';

interface ValueSpec {
  /** One sentence without a full stop's need: shown in help, man page and completion. */
  readonly description: string;
  /** The only values allowed; also completed. */
  readonly choices?: readonly string[];
  /** What the shell offers where there are no `choices`; default `none`. */
  readonly complete?: Completion;
  /**
   * Turns the text into the value, throwing a RangeError with the reason when it cannot
   * (src/human.ts has parseSize, parseDurationMs, parsePercent, parseWhole). Default: the text.
   */
  readonly parse?: (text: string) => unknown;
}

export interface ArgumentSpec extends ValueSpec {
  /** As it is shown: `DEVICE`. */
  readonly label: string;
  /** May be left out; only the last arguments can be. */
  readonly optional?: true;
  /** One or more (with `optional`: any number); only the last argument can be. */
  readonly many?: true;
}

export interface OptionSpec extends ValueSpec {
  /** Placeholder of the value, `SIZE`; an option without one is a switch. */
  readonly value?: string;
  /** One letter: `n` makes `-n`. */
  readonly short?: string;
  /** May be given several times; the values come as a list. */
  readonly many?: true;
  /** The value when it is not given, as it would be typed. */
  readonly default?: string;
  /** For `--no-verify` the key is `no-verify`: it stands for itself, true when given. */
}

/** In the order in which they are typed; the key is the name in code. */
export type ArgumentSpecs = Readonly<Record<string, ArgumentSpec>>;
/** The key is the long name without dashes. */
export type OptionSpecs = Readonly<Record<string, OptionSpec>>;

type Parsed<S extends ValueSpec> = S extends { readonly parse: (text: string) => infer T }
  ? T
  : S extends { readonly choices: readonly (infer C)[] }
    ? C
    : string;

type ArgumentValue<S extends ArgumentSpec> = S extends { readonly many: true }
  ? readonly Parsed<S>[]
  : S extends { readonly optional: true }
    ? Parsed<S> | undefined
    : Parsed<S>;

type OptionValue<S extends OptionSpec> = S extends { readonly value: string }
  ? S extends { readonly many: true }
    ? readonly Parsed<S>[]
    : S extends { readonly default: string }
      ? Parsed<S>
      : Parsed<S> | undefined
  : boolean;

/** What `run` gets: `input.arguments.device`, `input.options['chunk-size']`, typed by the specs. */
export interface Input<A extends ArgumentSpecs, O extends OptionSpecs> {
  readonly arguments: { readonly [K in keyof A]: ArgumentValue<A[K]> };
  readonly options: { readonly [K in keyof O]: OptionValue<O[K]> };
}

/** Everything a command may use of the world outside; tests hand in their own. */
export interface CommandContext {
  readonly settings: Settings;
  readonly config: Config;
  /** Reads and checks the configuration files again. Rejects with kind `config`, as at the start. */
  readonly reloadConfig: () => Promise<Config>;
  readonly env: Readonly<Record<string, string | undefined>>;
  readonly clock: Clock;
  readonly random: Random;
  /**
   * Aborted by the first SIGINT or SIGTERM, with the signal's name as its reason: stop cleanly, then
   * throw (exit code 130) or, where stopping is the normal end (`watch`, `serve`), return.
   */
  readonly signal: AbortSignal;
  readonly events: EventSink;
  readonly output: CommandOutput;
  readonly flags: { readonly json: boolean; readonly quiet: boolean; readonly verbose: boolean };
}

/** stdout while a command still runs. A command that ends with an answer just returns it. */
export interface CommandOutput {
  /** True where a person reads stdout: it is a terminal, and neither `--json` nor `--quiet` was given. */
  readonly interactive: boolean;
  /** A line of a command that goes on: `text` for people, `record` as one JSON line with `--json`. */
  line(record: { readonly type: string }, text: string): void;
  /** Bytes as they are (`cat`); resolves when the reader has taken them. Not to be mixed with the others. */
  bytes(data: Uint8Array): Promise<void>;
}

export interface Outcome<T> {
  /**
   * The answer: with `--json` it is printed as one document, so times are strings made by formatTimeNs,
   * sizes are bytes as numbers, keys are camelCase and never renamed. `undefined`: nothing is printed.
   */
  readonly data: T;
  /** Default {@link ExitCode}.ok. Anything that is not an answer is thrown as a B2Error instead. */
  readonly code?: ExitCode;
}

/** What `src/commands/run/NAME.ts` exports. */
export interface CommandModule<I, T> {
  run(context: CommandContext, input: I): Promise<Outcome<T>>;
  /** The answer for people, without a newline at the end; '' prints nothing. `style` is plain in a pipe. */
  text(data: T, style: Style): string;
}

export interface Example {
  /** As typed: `b2 restore web1/sda /dev/sdb --at "5m ago"`. Parsed by a test. */
  readonly command: string;
  /** What it does, one sentence. */
  readonly text: string;
}

export interface CommandDefinition<A extends ArgumentSpecs, O extends OptionSpecs, T> {
  /** The words after `b2`: `restore`, `key add`. */
  readonly name: string;
  /** One line for lists of commands; no full stop. */
  readonly summary: string;
  /** Paragraphs for help and man page; plain text, no markup. */
  readonly description: readonly string[];
  readonly arguments: A;
  readonly options: O;
  readonly examples: readonly Example[];
  /** The codes it ends with besides 0, 1, 2 and 130, with their meaning for this command. */
  readonly exitCodes?: Readonly<Partial<Record<ExitCode, string>>>;
  readonly load: () => Promise<CommandModule<Input<A, O>, T>>;
}

/** A command of which only the shape is known: what the registry holds. */
export type CommandSpec = CommandDefinition<ArgumentSpecs, OptionSpecs, unknown>;

/** Checks that the specs and the module that `load` brings fit together, and forgets the exact types. */
export function defineCommand<A extends ArgumentSpecs, O extends OptionSpecs, T>(
  definition: CommandDefinition<A, O, T>,
): CommandSpec {
  return definition;
}
