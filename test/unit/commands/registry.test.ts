import { existsSync, readFileSync } from 'node:fs';
import { describe, expect, it } from 'vitest';
import { main } from '../../../src/cli.js';
import { COMMANDS, GROUPS } from '../../../src/commands/index.js';
import { GLOBAL_OPTIONS } from '../../../src/commands/reference.js';
import { defineCommand, type CommandSpec, type OptionSpec } from '../../../src/commands/spec.js';
import { topLevel } from '../../../src/commands/tree.js';
import { CaptureStream } from '../../support/capture-stream.js';
import { ManualClock } from '../../support/manual-clock.js';

/** Words of a shell command up to a redirection, pipe, `;` or `&&`; quotes are taken off. */
function shellWords(command: string): readonly string[] {
  const words: string[] = [];
  for (const match of command.matchAll(/"([^"]*)"|'([^']*)'|[^\s"']+/g)) {
    const quoted = match[1] ?? match[2];
    if (quoted === undefined && /^(\d?>|<|\||;|&|#)/.test(match[0])) break;
    words.push(quoted ?? match[0]);
  }
  return words;
}

/** `sudo`, `NAME=value` before the command. */
const BEFORE = /^((sudo|[A-Z_][A-Z0-9_]*=\S*) )*/;

interface Typed {
  /** The command that would run. */
  readonly ran: string | undefined;
  readonly code: number;
  readonly stderr: string;
}

/** Parses a typed `b2 …` with commands that do nothing but say that they were meant. */
async function type(typed: string): Promise<Typed> {
  const [, ...args] = shellWords(typed.replace(BEFORE, ''));
  let ran: string | undefined;
  const commands: readonly CommandSpec[] = COMMANDS.map((command) =>
    defineCommand({
      ...command,
      load: () =>
        Promise.resolve({
          run: () => {
            ran = command.name;
            return Promise.resolve({ data: undefined });
          },
          text: () => '',
        }),
    }),
  );
  const stderr = new CaptureStream();
  const code = await main(args, {
    stdout: new CaptureStream(),
    stderr,
    env: { B2_CONFIG: '/dev/null' },
    homeDir: '/nonexistent',
    isRoot: false,
    clock: new ManualClock(),
    random: (n) => new Uint8Array(n),
    abort: new AbortController(),
    commands,
  });
  return { ran, code, stderr: stderr.text };
}

describe.each(COMMANDS.map((command) => [command.name, command] as const))(
  'b2 %s',
  (name, command) => {
    it('is described in full', () => {
      expect(name).toMatch(/^[a-z]+(-[a-z]+)*( [a-z]+(-[a-z]+)*)?$/);
      expect(command.summary).toMatch(/^[a-z0-9].*[^.]$/);
      expect(command.summary.length).toBeLessThanOrEqual(72);
      expect(command.description.length).toBeGreaterThan(0);
      expect(command.examples.length).toBeGreaterThan(0);
      for (const paragraph of command.description) expect(paragraph).toMatch(/[.:!?]$/);
      if (name.includes(' ')) expect(GROUPS).toHaveProperty(name.split(' ', 1)[0] ?? '');
    });

    it('has options and arguments that can be told apart', () => {
      const names = Object.keys(command.options);
      const specs: readonly OptionSpec[] = [
        ...Object.values(GLOBAL_OPTIONS),
        ...Object.values(command.options),
      ];
      const shorts = specs.map((option) => option.short).filter((short) => short !== undefined);
      expect(new Set([...shorts, 'h', 'V']).size).toBe(shorts.length + 2);
      for (const option of names) {
        expect(option).toMatch(/^[a-z][a-z0-9]*(-[a-z0-9]+)*$/);
        expect(Object.keys(GLOBAL_OPTIONS)).not.toContain(option);
        expect(['help', 'version']).not.toContain(option);
        if (option.startsWith('no-')) expect(names).not.toContain(option.slice(3));
      }
      const args = Object.values(command.arguments);
      for (const argument of args.slice(0, -1)) expect(argument.many).toBeUndefined();
      const firstOptional = args.findIndex((argument) => argument.optional === true);
      if (firstOptional >= 0) {
        expect(args.slice(firstOptional).every((argument) => argument.optional === true)).toBe(
          true,
        );
      }
      for (const [option, spec] of Object.entries(command.options)) {
        if (spec.value === undefined) {
          expect([option, spec.default, spec.many, spec.choices]).toEqual([
            option,
            undefined,
            undefined,
            undefined,
          ]);
        }
        if (spec.default !== undefined)
          expect(() => spec.parse?.(spec.default ?? '')).not.toThrow();
        if (spec.default !== undefined && spec.choices !== undefined) {
          expect(spec.choices).toContain(spec.default);
        }
      }
    });

    it.each(command.examples.map((example) => example.command))(
      'example parses: %s',
      async (example) => {
        expect(await type(example)).toEqual({ ran: name, code: 0, stderr: '' });
      },
    );

    it('can be loaded', async () => {
      const module = await command.load();
      expect(module.run).toBeTypeOf('function');
      expect(module.text).toBeTypeOf('function');
    });
  },
);

it('has unique names, and groups that are used', () => {
  const names = COMMANDS.map((command) => command.name);
  expect(new Set(names).size).toBe(names.length);
  for (const group of Object.keys(GROUPS)) {
    expect(names.some((name) => name.startsWith(`${group} `))).toBe(true);
  }
  for (const top of topLevel()) expect(top.summary).not.toBe('');
});

const README = new URL('../../../README.md', import.meta.url);
describe.runIf(existsSync(README))('README.md', () => {
  const text = existsSync(README) ? readFileSync(README, 'utf8') : '';
  const blocks = [...text.matchAll(/^```(\w*)\n([\s\S]*?)^```$/gm)];
  const lines = blocks
    .filter((block) => ['', 'sh', 'bash', 'shell', 'console'].includes(block[1] ?? ''))
    .flatMap((block) => (block[2] ?? '').replaceAll('\\\n', ' ').split('\n'))
    .map((line) => line.replace(/^[$#] /, '').trim())
    .filter((line) => /^(\.\/bin\/)?b2 /.test(line.replace(BEFORE, '')));

  it('shows every command', async () => {
    const shown = new Set((await Promise.all(lines.map(type))).map(({ ran }) => ran));
    expect(COMMANDS.map((command) => command.name).filter((name) => !shown.has(name))).toEqual([]);
  });

  it.each(lines)('can be typed: %s', async (line) => {
    expect(await type(line)).toMatchObject({ code: 0, stderr: '' });
  });
});
