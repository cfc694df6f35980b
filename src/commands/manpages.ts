/** The man pages, made from the registry. scripts/gen-man.mjs writes them to man/; they are committed. */
import { ExitCode } from '../errors.js';
import { CONFIG_KEYS } from '../config.js';
import { COMMANDS } from './index.js';
import { ENVIRONMENT, EXIT_CODES, FILES, GLOBAL_OPTIONS } from './reference.js';
import type { ArgumentSpec, CommandSpec, OptionSpec } from './spec.js';
import { argumentUsage, fullDescription, topLevel, type TopLevel } from './tree.js';

/** Text for roff: backslashes and hyphens as they are typed, no line that starts as a request. */
function escape(text: string): string {
  return text
    .replaceAll('\\', '\\e')
    .replaceAll('-', '\\-')
    .replaceAll('…', '...')
    .replace(/^([.'])/gm, '\\&$1');
}

/** An argument of a macro: quotes would end it. */
function macroText(text: string): string {
  return escape(text).replaceAll('"', '\\(dq');
}

const bold = (text: string): string => `\\fB${escape(text)}\\fR`;
const italic = (text: string): string => `\\fI${escape(text)}\\fR`;

/** A full sentence of a description that is written without one's capital and stop. */
function sentence(text: string): string {
  const first = text.charAt(0).toUpperCase() + text.slice(1);
  return /[.!?]$/.test(first) ? first : `${first}.`;
}

function tagged(tag: string, text: string): string {
  return `.TP\n${tag}\n${escape(sentence(text))}`;
}

function optionTag(name: string, option: OptionSpec): string {
  const value = option.value === undefined ? '' : ` ${italic(option.value)}`;
  const short = option.short === undefined ? '' : `${bold(`-${option.short}`)}, `;
  return `${short}${bold(`--${name}`)}${value}`;
}

function argumentTag(argument: ArgumentSpec): string {
  return italic(argumentUsage(argument));
}

function optionList(options: Readonly<Record<string, OptionSpec>>): readonly string[] {
  return Object.entries(options).map(([name, option]) => {
    const many = option.many === true ? ' Can be given several times.' : '';
    return tagged(optionTag(name, option), `${sentence(fullDescription(option))}${many}`);
  });
}

function head(title: string, version: string): string {
  return `.\\" Made by "npm run man" from src/commands; do not edit.\n.TH "${macroText(title.toUpperCase())}" "1" "" "b2 ${version}" "b2 manual"`;
}

function paragraphs(texts: readonly string[]): readonly string[] {
  return texts.map((text, i) => (i === 0 ? escape(text) : `.PP\n${escape(text)}`));
}

function synopsis(command: CommandSpec): string {
  const options = Object.entries(command.options).map(([name, option]) => {
    const value = option.value === undefined ? '' : `\\ ${italic(option.value)}`;
    return `[${bold(`--${name}`)}${value}]${option.many === true ? '...' : ''}`;
  });
  const args = Object.values(command.arguments).map(argumentTag);
  return `.HP\n${[bold(`b2 ${command.name}`), ...args, ...options].join(' ')}`;
}

function exampleList(command: CommandSpec): readonly string[] {
  return command.examples.map(
    (example) => `.TP\n${bold(example.command)}\n${escape(sentence(example.text))}`,
  );
}

/** Those that open no repository, or may do without. */
const WITHOUT_REPOSITORY: readonly string[] = [
  'completion',
  'demo',
  'import-tape',
  'init',
  'tape verify',
  'umount',
];

/** What opening a repository can end with, for all that do. */
const OPENING: Readonly<Record<number, string>> = {
  [ExitCode.noRepository]: 'no repository there',
  [ExitCode.wrongKey]: 'wrong password or key',
};

function exitList(command: CommandSpec): readonly string[] {
  const own = {
    ...(WITHOUT_REPOSITORY.includes(command.name) ? {} : OPENING),
    ...command.exitCodes,
  };
  const codes = Object.entries({ ...EXIT_CODES, ...own }).filter(
    ([code]) =>
      Number(code) <= ExitCode.usage ||
      Number(code) === ExitCode.interrupted ||
      Object.hasOwn(own, code),
  );
  return codes.map(([code, text]) => tagged(bold(code), text));
}

/** What a command has to say, with headings made by `heading` (sections, or subsections in a group). */
function body(command: CommandSpec, heading: (title: string) => string): readonly string[] {
  const values = [
    ...Object.values(command.arguments).map((argument) =>
      tagged(argumentTag(argument), fullDescription(argument)),
    ),
    ...optionList(command.options),
  ];
  return [
    heading('DESCRIPTION'),
    ...paragraphs(command.description),
    ...(values.length === 0 ? [] : [heading('ARGUMENTS AND OPTIONS'), ...values]),
    ...(command.examples.length === 0 ? [] : [heading('EXAMPLES'), ...exampleList(command)]),
    heading('EXIT STATUS'),
    ...exitList(command),
  ];
}

const SEE_ALSO =
  '.SH SEE ALSO\n.BR b2 (1)\nhas the options and environment that all commands share.';

function commandPage(top: TopLevel, version: string): string {
  const section = (title: string): string => `.SH ${title}`;
  const parts = [
    head(`b2-${top.word}`, version),
    '.SH NAME',
    `b2\\-${escape(top.word)} \\- ${escape(top.summary)}`,
    '.SH SYNOPSIS',
    ...top.commands.map(synopsis),
  ];
  const only = top.commands[0];
  if (!top.isGroup && top.commands.length === 1 && only !== undefined) {
    parts.push(...body(only, section));
  } else {
    for (const command of top.commands) {
      parts.push(`.SH "${macroText(`b2 ${command.name}`.toUpperCase())}"`);
      parts.push(...body(command, (title) => `.SS ${title}`));
    }
  }
  return `${[...parts, SEE_ALSO].join('\n')}\n`;
}

function mainPage(tops: readonly TopLevel[], version: string): string {
  const parts = [
    head('b2', version),
    '.SH NAME',
    'b2 \\- block\\-continuous backup of disks',
    '.SH SYNOPSIS',
    `.HP\n${bold('b2')} [${italic('OPTION')}]... ${italic('COMMAND')} [${italic('ARGUMENT')}]...`,
    '.SH DESCRIPTION',
    escape(
      'b2 records the history of block devices in a repository, deduplicated and encrypted, and restores, mounts, serves and verifies them as they were at any recorded point in time.',
    ),
    '.SH COMMANDS',
    ...tops.map((top) => `.TP\n.BR b2\\-${escape(top.word)} (1)\n${escape(sentence(top.summary))}`),
    '.SH OPTIONS',
    'These are understood before and after the command.',
    ...optionList(GLOBAL_OPTIONS),
    tagged(`${bold('-h')}, ${bold('--help')}`, 'show help'),
    tagged(`${bold('-V')}, ${bold('--version')}`, 'print the version'),
    '.SH TIMES',
    escape(
      'Where a time is asked for: ISO 8601 with or without zone (local time without), now, latest, "5m ago", the name of a snapshot, or the id of a point ("#1234"). The newest exact point that is not after that time is taken, and printed. What is the very name of a snapshot, also one that reads as a date or time, means that snapshot.',
    ),
    '.SH CONFIGURATION',
    escape(
      'An option wins over the environment, the environment over the configuration files, these over the default. Configuration files are YAML; a key that is not in this list is an error.',
    ),
    ...Object.entries(CONFIG_KEYS).map(([key, { description }]) => tagged(bold(key), description)),
    '.SH ENVIRONMENT',
    ...ENVIRONMENT.map(({ name, description }) => tagged(bold(name), description)),
    '.SH FILES',
    ...FILES.map(({ name, description }) => tagged(italic(name), description)),
    '.SH EXIT STATUS',
    ...Object.entries(EXIT_CODES).map(([code, text]) => tagged(bold(code), text)),
  ];
  return `${parts.join('\n')}\n`;
}

/** File name (in man/) → contents. */
export function manPages(
  version: string,
  commands: readonly CommandSpec[] = COMMANDS,
): ReadonlyMap<string, string> {
  const tops = topLevel(commands);
  return new Map([
    ['b2.1', mainPage(tops, version)],
    ...tops.map((top) => [`b2-${top.word}.1`, commandPage(top, version)] as const),
  ]);
}
