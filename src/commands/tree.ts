/** The registry as the tree that is typed: used by completions, man pages and checks. */
import { COMMANDS, GROUPS } from './index.js';
import { GLOBAL_OPTIONS } from './reference.js';
import type { ArgumentSpec, CommandSpec, OptionSpec } from './spec.js';

/** A word after `b2`: a command, or a group of them. */
export interface TopLevel {
  readonly word: string;
  readonly summary: string;
  /** One command of that very name, or the commands of the group. */
  readonly commands: readonly CommandSpec[];
  readonly isGroup: boolean;
}

/** In the registry's order; a group stands where its first command does. */
export function topLevel(commands: readonly CommandSpec[] = COMMANDS): readonly TopLevel[] {
  const words = [...new Set(commands.map((command) => firstWord(command.name)))];
  return words.map((word) => {
    const members = commands.filter((command) => firstWord(command.name) === word);
    const single = members.find((command) => command.name === word);
    return {
      word,
      summary: single?.summary ?? GROUPS[word] ?? '',
      commands: members,
      isGroup: single === undefined,
    };
  });
}

/** `key add` → `key`. */
export function firstWord(name: string): string {
  return name.split(' ', 1)[0] ?? name;
}

/** Options of a command with the global ones after them. */
export function allOptions(
  command: CommandSpec | undefined,
): readonly (readonly [string, OptionSpec])[] {
  return [...Object.entries(command?.options ?? {}), ...Object.entries(GLOBAL_OPTIONS)];
}

/** `DEVICE…`, `[NAME]`. */
export function argumentUsage(argument: ArgumentSpec): string {
  const text = argument.many === true ? `${argument.label}…` : argument.label;
  return argument.optional === true ? `[${text}]` : text;
}

/** `--chunk-size SIZE`, `-q, --quiet`. */
export function optionUsage(name: string, option: OptionSpec): string {
  const short = option.short === undefined ? '' : `-${option.short}, `;
  return `${short}--${name}${option.value === undefined ? '' : ` ${option.value}`}`;
}

/** `b2 init [--encryption KIND] [--json] …`: one line without the global options. */
export function commandUsage(command: CommandSpec): string {
  const options = Object.entries(command.options).map(([name, option]) => {
    const value = option.value === undefined ? '' : ` ${option.value}`;
    return `[--${name}${value}]${option.many === true ? '…' : ''}`;
  });
  const args = Object.values(command.arguments).map(argumentUsage);
  return ['b2', command.name, ...args, ...options].join(' ');
}

/** A value's description with what it allows and what it is by default. */
export function fullDescription(spec: ArgumentSpec | OptionSpec): string {
  const extra: string[] = [];
  if (spec.choices !== undefined) extra.push(spec.choices.join(', '));
  if ('default' in spec && spec.default !== undefined) extra.push(`default ${spec.default}`);
  return extra.length === 0 ? spec.description : `${spec.description} (${extra.join('; ')})`;
}
