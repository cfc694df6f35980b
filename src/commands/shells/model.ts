/** The command tree reduced to what a shell completes: words, options and kinds of values per path. */
import { COMMANDS } from '../index.js';
import { GLOBAL_OPTIONS } from '../reference.js';
import type { ArgumentSpec, CommandSpec, OptionSpec } from '../spec.js';
import { topLevel } from '../tree.js';

export interface Word {
  readonly word: string;
  readonly summary: string;
}

export interface OptionEntry {
  readonly name: string;
  readonly spec: OptionSpec;
}

/** A place on the command line: `` (b2 itself), `restore`, `key` (a group), `key add`. */
export interface Place {
  readonly path: string;
  /** What may come next as a word; empty for a command. */
  readonly words: readonly Word[];
  /** Options that are understood here besides the global ones. */
  readonly options: readonly OptionEntry[];
  readonly arguments: readonly ArgumentSpec[];
}

function optionEntries(options: Readonly<Record<string, OptionSpec>>): readonly OptionEntry[] {
  return Object.entries(options).map(([name, spec]) => ({ name, spec }));
}

function commandPlace(command: CommandSpec): Place {
  return {
    path: command.name,
    words: [],
    options: optionEntries(command.options),
    arguments: Object.values(command.arguments),
  };
}

/** All places; the first is b2 itself. */
export function places(commands: readonly CommandSpec[] = COMMANDS): readonly Place[] {
  const tops = topLevel(commands);
  const root: Place = {
    path: '',
    words: tops.map(({ word, summary }) => ({ word, summary })),
    options: [{ name: 'version', spec: { short: 'V', description: 'print the version' } }],
    arguments: [],
  };
  const groups = tops
    .filter((top) => top.isGroup)
    .map((top) => ({
      path: top.word,
      words: top.commands.map((command) => ({
        word: command.name.slice(top.word.length + 1),
        summary: command.summary,
      })),
      options: [],
      arguments: [],
    }));
  return [root, ...groups, ...commands.map(commandPlace)];
}

/** Understood everywhere. */
export const globalOptions: readonly OptionEntry[] = [
  ...optionEntries(GLOBAL_OPTIONS),
  { name: 'help', spec: { short: 'h', description: 'show help' } },
];

/** `-q` and `--quiet`, as they are typed. */
export function flagsOf({ name, spec }: OptionEntry): readonly string[] {
  return spec.short === undefined ? [`--${name}`] : [`-${spec.short}`, `--${name}`];
}

/** Every flag that takes a value, anywhere: the word after it is no command. */
export function flagsWithValue(all: readonly Place[]): readonly string[] {
  const entries = [...globalOptions, ...all.flatMap((place) => place.options)];
  return [...new Set(entries.filter((e) => e.spec.value !== undefined).flatMap(flagsOf))];
}

/** `text` in single quotes for a POSIX-like shell. */
export function shellQuote(text: string): string {
  return `'${text.replaceAll("'", `'\\''`)}'`;
}
